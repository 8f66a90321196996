"""benchmark.py still fits the functions that it measures (its timings are tested nowhere); no step waits for a GPU.

What --plan computes is held against counts by hand.
"""

import copy
import json
import sys

import benchmark
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from trees import write_cityscapes, write_gta5

import common

TINY = "--crop 32x64 --size 32x64 --batch-size 1 --backbone resnet14".split()


def step_of(name, device, precision, *more):
    """That method's step on a small network and two images of each domain, and the network."""
    module, form, *flags = benchmark.STEPS[name]
    args = benchmark.settings(module, "--device", "cpu", "--precision", precision, *TINY, *flags, *more)
    return benchmark.build_step(form, args, device)


def test_every_step_can_be_measured(capsys):
    benchmark.steps("cpu", *TINY, rounds=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines] == list(benchmark.STEPS)
    assert all("x plain" in line for line in lines)


class NothingFromTheProcessor(TorchFunctionMode):
    """Refuses torch.tensor(values, device=...), which copies, and on a GPU waits until everything before is done."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor) or "device" not in (kwargs or {}), "waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", benchmark.STEPS)
def test_no_step_waits_for_the_device(name):
    """Tensors on the device "meta" have shapes, no values, so a step that reads one, or needs one for a shape fails.

    On a GPU the same step would wait there until everything before it is computed. The first step may.
    """
    with benchmark.on_meta():
        step, _ = step_of(name, "meta", "fp32")
        step()
        with NothingFromTheProcessor():
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
        cost = benchmark.step_cost(benchmark.Step(losses, optimizer, kept=[copy.deepcopy(model)]), model)
    assert cost["weights"] == cost["copies"] == weights + biases
    assert cost["state"] == 4 * 4 * (weights + biases)  # weights, copy, gradients and momentum in fp32
    # A multiply-add is two. Forward; gradients of the weights; of the second convolution's input, the first needs none.
    assert cost["flop"] == 2 * pixels * (weights + weights + 8 * 2)
    bytes_each = {"fp32": 4, "bf16": 2}[precision]
    # The image, the ReLU's output once, though it and the second convolution save it, and the fp32 logits; weights are
    # there anyhow, but not those in bf16.
    assert cost["saved"] == pixels * (3 + 8) * bytes_each + 4 * pixels * 2 + (precision == "bf16") * 2 * weights


@pytest.mark.parametrize("name, precision", [("LSE", "fp32"), ("CPSL with consistency", "bf16")])
def test_as_much_is_saved_as_on_a_processor(name, precision):
    """The device "meta" stands for one that computes, and what replaces autocast there for autocast."""
    live = "--batch-norm", "live"  # of which nothing depends on the device
    computed = benchmark.step_cost(*step_of(name, "cpu", precision, *live))
    with benchmark.on_meta():
        assert benchmark.step_cost(*step_of(name, "meta", precision, *live)) == computed


def test_hours_and_gpu_by_hand():
    """36000 steps of 3.5 TFLOP at 35 % of 10 TFLOP/s: a step takes a second."""
    assert benchmark.SHARE == 0.35
    assert benchmark.hours(36000 * 3.5e12, 10) == pytest.approx(10)
    assert [benchmark.smallest_gpu(gib) for gib in (0.1, 8, 8.01, 23.9, 80.1)] == ["8", "8", "11", "24", ">80"]


def run(monkeypatch, capsys, *flags):
    """What benchmark.py prints."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, flags)])
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    benchmark.main()
    return capsys.readouterr().out


def test_the_plan_has_a_row_for_every_script(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PRESETS", {"full size": ()})
    text = run(monkeypatch, capsys, "--plan", "--backbone", "resnet14", "--batch-size", 1)
    assert text.startswith("Computed, not measured")
    assert "scale_invariant: warm-up 60000, rounds up to 41040\n" in text  # 5130 images, 4 patches, twice, one by one
    assert "drsl: warm-up 60000, modes 4000, rounds 10000\n" in text  # 5000 of the 12000 are joint steps
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


def test_plan_of_one_script_with_its_flags_and_what_this_machine_measured(monkeypatch, capsys):
    """Milliseconds, then GiB, each eager and compiled in fp32 and bf16; of images nothing is compiled."""
    costs = {("fp32", False): (10, 2), ("fp32", True): (8, 1), ("bf16", False): (5, 0.7), ("bf16", True): (4, 0.5)}
    asked = []
    cost = {"flop": 1e12, "weights": 1e6, "copies": 0, "saved": 2**30, "state": 2**30}
    monkeypatch.setattr(benchmark, "planned_cost", lambda *_: cost)
    monkeypatch.setattr(benchmark, "measured_cost", lambda form, args, precision, compiled, device: (
        asked.append((form, args.backbone, args.crop)) or costs[precision, compiled]))
    text = run(monkeypatch, capsys, "--plan", "cpsl", "--no-rectify", "--distill", 2, "--distill-iterations", 70,
               "--measure", "--device", "cpu", *TINY)
    assert "  cpsl: warm-up 60000, self-training 90000, distillation 140\n" in text and "drsl" not in text
    assert text.count("\ncpsl ") == len(benchmark.PRESETS) == 2
    assert asked == 4 * [(benchmark.cpsl_step, "resnet14", (32, 64))]  # at full size, not with the small preset
    rows = text.split("measured on this CPU")[1].splitlines()[2:]
    assert rows[0].split() == "a step of cpsl 10.0 8.0 5.0 4.0 2.0 1.0 0.7 0.5".split()
    assert [row.split()[-8:][1::2] for row in rows[1:]] == 5 * [["-"] * 4]
    assert all(float(cell) >= 0 for row in rows[1:] for cell in row.split()[-8:-4:2])


def test_a_measured_step_is_compiled_if_so_asked(monkeypatch):
    built = []
    monkeypatch.setattr(torch, "compile", lambda module: built.append(module) or module)
    args = benchmark.settings(benchmark.cpsl, "--device", "cpu", *TINY)
    monkeypatch.setattr(benchmark, "measure", lambda step, device, **options: benchmark.measure_once(step, device))
    milliseconds, gib = benchmark.measured_cost(benchmark.cpsl_step, args, "fp32", True, "cpu")
    assert milliseconds > 0 and gib is None and len(built) == 4  # network, head, warm-up model, momentum copy
    benchmark.measured_cost(benchmark.source_step, args, "fp32", False, "cpu")
    assert len(built) == 4


def test_pictures_of_the_sets_that_are_there_and_of_the_toy(tmp_path, monkeypatch, capsys):
    write_gta5(tmp_path, 3)
    write_cityscapes(tmp_path, ["train"], 1)
    flags = [*TINY, "--source-size", "48x80", "--scale-jitter", 1, 1, "--workers", 0, "--device", "cpu"]
    text = run(monkeypatch, capsys, "--data", tmp_path, *flags)
    rows = [line.split() for line in text.splitlines()[3:]]
    assert [row[0] for row in rows] == ["GTA5", "Cityscapes", "a"]
    assert all(float(cell) >= 0 for row in rows[:2] for cell in row[1:5])
    assert "a step's 1 + 1 pictures, GTA5 and Cityscapes" in text
    assert "\ntoy source " in run(monkeypatch, capsys, "--data", "--device", "cpu", "--toy-images", 4)
    with pytest.raises(common.InputError, match="no pictures"):
        run(monkeypatch, capsys, "--data", tmp_path / "GTA5", *flags)


def test_whole_scripts_are_timed_by_their_own_logs(tmp_path, monkeypatch, capsys):
    """The last two thirds of the steps; each script in fp32 and bf16, eager and compiled; DRSL starts from it."""
    commands = []

    def execute(command, **options):
        commands.append(command)
        out = benchmark.Path(command[command.index("--out") + 1])
        out.mkdir()
        stage = "source" if "source_only" in command[1] else "adapt"
        lines = [{"stage": "round 1", "step": "", "seconds": 1.0}]
        lines += [{"stage": stage, "step": f"{20 * k}/120", "seconds": 5.0 + (k > 2) * k, "waiting": 0.5}
                  for k in range(1, 7)]
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return benchmark.SimpleNamespace(returncode=int("--compile" in command), stderr="no compiler")

    monkeypatch.setattr(benchmark.subprocess, "run", execute)
    monkeypatch.setattr(benchmark.common, "versions", lambda device: "toaster")
    text = run(monkeypatch, capsys, "--gpu", tmp_path, "--parts", "train", "--device", "cpu", *TINY)
    assert text.startswith("toaster\n") and text.count("no compiler") == 4
    for script in ("source_only", "drsl"):  # 80 steps in 6 s
        assert f"\n{script:15}{'75.0 (50%)':>18}{'failed':>18}{'75.0 (50%)':>18}{'failed':>18}\n" in text
    assert len(commands) == 8 and all("--init" in command for command in commands if "drsl" in command[1])
    for command in commands:  # which the script understands
        module = benchmark.drsl if "drsl" in command[1] else benchmark.source_only
        assert benchmark.settings(module, *command[2:]).iterations == benchmark.TRAINING_STEPS


def test_help_explains_the_plan_and_foreign_flags_are_refused_without_it(monkeypatch, capsys):
    for flag, said in (("--help", "measure nothing, but compute"), ("--batch-size", "arguments: --batch-size"),
                       ("--measure", "--measure needs --plan")):
        with pytest.raises(SystemExit):
            run(monkeypatch, capsys, flag)
        told = capsys.readouterr()
        assert said in " ".join((told.out + told.err).split())
