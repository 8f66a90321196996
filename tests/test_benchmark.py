"""benchmark.py still fits the functions that it measures (its timings are tested nowhere); no step waits for a GPU.

What --plan computes is held against counts by hand.
"""

import copy
import sys

import benchmark
import pytest
import torch
from torch import nn

import common


def step_of(name, device, precision, freeze=True, C=5):
    """That method's step on a small network and two images of each domain, and the network."""
    image = torch.zeros(2, 3, 32, 64, device=device)
    label = torch.zeros(2, 32, 64, dtype=torch.int64, device=device)
    model = common.build_network(C, "resnet14").to(device).train()
    if freeze:
        common.freeze_batch_norm(model)
    module, form, *flags = benchmark.STEPS[name]
    args = benchmark.settings(module, "--device", "cpu", "--precision", precision, *flags)
    return form(model, image, label, image, label, args), model


def test_every_step_can_be_measured(capsys):
    benchmark.steps("cpu", "fp32", "resnet14", (32, 64), 1, rounds=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines] == list(benchmark.STEPS)
    assert all("x plain" in line for line in lines)


@pytest.mark.parametrize("name", benchmark.STEPS)
def test_no_step_waits_for_the_device(name):
    """Tensors on the device "meta" have shapes, no values, so a step that reads one, or needs one for a shape fails.

    On a GPU the same step would wait there until everything before it is computed.
    """
    with benchmark.on_meta():
        step, _ = step_of(name, "meta", "fp32")
        step()
        step()
    for waits in (torch.Tensor.item, torch.nonzero,
                  lambda values: values[values > 0]):  # or else this test could not fail
        with pytest.raises((RuntimeError, NotImplementedError)):
            waits(torch.zeros(3, device="meta"))


N, H, W = 2, 6, 10


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cost_of_a_small_network_by_hand(precision):
    """3 -> 8 channels by 3x3, ReLU, 8 -> 2 channels by 1x1, squared error; SGD with momentum; a copy is kept."""
    pixels, weights, biases = N * H * W, 3 * 8 * 9 + 8 * 2, 8 + 2
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
        image = torch.zeros(N, 3, H, W)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def losses():
        with common.autocast(benchmark.argparse.Namespace(precision=precision)):
            logits = model(image)
        return {"loss": logits.float().square().sum()}

    with benchmark.on_meta():
        cost = benchmark.step_cost(benchmark.Step(optimizer, losses, [copy.deepcopy(model)]), model)
    assert cost["weights"] == cost["copies"] == weights + biases
    assert cost["state"] == 4 * 4 * (weights + biases)  # weights, copy, gradients and momentum in fp32
    # A multiply-add is two. Forward; gradients of the weights; of the second convolution's input, the first needs none.
    assert cost["flop"] == 2 * pixels * (weights + weights + 8 * 2)
    bytes_each = {"fp32": 4, "bf16": 2}[precision]
    # The image, the ReLU's output once, though it and the second convolution save it, and the fp32 logits; weights are
    # there anyhow, but not those in bf16.
    assert cost["saved"] == pixels * (3 + 8) * bytes_each + 4 * pixels * 2 + (precision == "bf16") * 2 * weights


@pytest.mark.parametrize("name", ["LSE", "CPSL with consistency"])
def test_as_much_is_saved_as_on_a_processor(name):
    """The device "meta" stands for one that computes, and what replaces autocast there for autocast."""
    for precision in ("fp32", "bf16"):  # live batch norm, of which nothing depends on the device
        computed = benchmark.step_cost(*step_of(name, "cpu", precision, freeze=False))
        with benchmark.on_meta():
            planned = benchmark.step_cost(*step_of(name, "meta", precision, freeze=False))
        assert planned == computed


def test_hours_and_gpu_by_hand():
    """36000 steps of 3.5 TFLOP at 35 % of 10 TFLOP/s: a step takes a second."""
    assert benchmark.SHARE == 0.35
    assert benchmark.hours(36000 * 3.5e12, 10) == pytest.approx(10)
    assert [benchmark.smallest_gpu(gib) for gib in (0.1, 8, 8.01, 23.9, 80.1)] == ["8", "8", "11", "24", ">80"]


def run_plan(monkeypatch, capsys, *flags):
    """What --plan prints for a network of few layers."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--plan", *flags, "--backbone", "resnet14", "--batch-size", "1"])
    benchmark.main()
    return capsys.readouterr().out


def test_the_plan_has_a_row_for_every_script(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PRESETS", {"full size": ()})
    text = run_plan(monkeypatch, capsys)
    assert text.startswith("Computed, not measured")
    assert "scale_invariant: warm-up 60000, rounds up to 41040\n" in text  # 5130 images, 4 patches, twice, one by one
    rows = [line.split() for line in text.splitlines() if line.split(" ")[0] in benchmark.PLANS]
    assert [row[0] for row in rows] == [*benchmark.PLANS]
    for _, *cells in rows:
        assert len(cells) == 10 + 2 * len(benchmark.GPUS) and all(float(cell) >= 0 for cell in cells)
    flop, weights, copies = ({row[0]: float(row[column]) for row in rows} for column in (1, 2, 3))
    # Beside one network that is trained: the source-only model, CPSL's warm-up model and its momentum copy.
    one = weights["source_only"]
    kept = {"source_only": 0, "scale_invariant": one, "cpsl": 3 * one, "sdca": 0, "drsl": one}
    assert copies == pytest.approx(kept, abs=0.2)
    # A source image forward and backward is three passes, a target image as well; CPSL's two labelling networks make
    # one each, its consistency three.
    passes = {"source_only": 3, "scale_invariant": 6, "cpsl": 11, "sdca": 6, "drsl": 6}
    assert {name: value / flop["source_only"] * 3 for name, value in flop.items()} == pytest.approx(passes, rel=0.1)


def test_plan_of_one_script_with_its_flags(monkeypatch, capsys):
    text = run_plan(monkeypatch, capsys, "cpsl", "--no-rectify", "--distill", "2", "--distill-iterations", "70")
    assert "  cpsl: warm-up 60000, self-training 90000, distillation 140\n" in text and "drsl" not in text
    assert text.count("\ncpsl ") == len(benchmark.PRESETS) == 2


def test_what_a_gpu_measured_stands_beside_the_plan(monkeypatch, capsys):
    """A row per script: milliseconds, then GiB, each in fp32 and bf16, of the script's own step."""
    asked = []

    def measured(form, args, target_size, precision):
        asked.append((form, args.backbone, target_size))
        return (10, 2) if precision == "fp32" else (5, 1)

    monkeypatch.setattr(benchmark, "measured_cost", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "toaster")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(benchmark, "PRESETS", {"full size": ()})
    text = run_plan(monkeypatch, capsys, "sdca", "cpsl", "--measure")
    assert "this toaster" in text and torch.backends.cudnn.benchmark
    assert [line.split() for line in text.splitlines()[-2:]] == [
        [name, "10.0", "5.0", "2.0", "1.0"] for name in ("sdca", "cpsl")]
    assert asked == [(form, "resnet14", (512, 1024)) for form in (benchmark.sdca_step, benchmark.cpsl_step)
                     for _ in ("fp32", "bf16")]


def test_help_explains_the_plan_and_foreign_flags_are_refused_without_it(monkeypatch, capsys):
    for flag, said in (("--help", "measure nothing, but compute"), ("--batch-size", "without --plan: --batch-size"),
                       ("--measure", "--measure needs --plan and a GPU")):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", flag])
        with pytest.raises(SystemExit):
            benchmark.main()
        told = capsys.readouterr()
        assert said in " ".join((told.out + told.err).split())
