"""source_only.py: the loop's parts against closed forms, and the script as a user runs it."""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from scripts import (TINY, command, exact, kill_when, load, logged, result, run, same_weights, start_two, texts,
                     trained_alike)
from trees import write_cityscapes, write_gta5, write_synthia

import common
import source_only


def test_poly_schedule():
    assert source_only.poly_lr(2.0, 0, 10, 0.9) == 2.0
    assert source_only.poly_lr(1.0, 40000, 62500, 0.9) == pytest.approx(0.398724, abs=1e-6)  # (1 - 0.64) ** 0.9
    assert source_only.poly_lr(3.0, 7, 10, 0.0) == 3.0


def test_optimizers():
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2), "classifier": torch.nn.Linear(2, 2)})
    model.backbone, model.classifier = model["backbone"], model["classifier"]
    model.backbone.bias.requires_grad_(False)
    args = argparse.Namespace(optimizer="sgd", head_lr=10.0, device="cpu")
    optimizer = source_only.make_optimizer(model, args)
    source_only.set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 5.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]
    assert all(group["momentum"] == 0.9 and group["weight_decay"] == 5e-4 for group in optimizer.param_groups)
    args.optimizer = "adamw"
    optimizer = source_only.make_optimizer(model, args)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["weight_decay"] == 0.01


def test_segmentation_loss_against_a_loop():
    torch.manual_seed(0)
    logits, label = torch.randn(2, 3, 3, 5, requires_grad=True), torch.randint(0, 3, (2, 16, 32))
    label[0, :5] = 255
    up = torch.nn.functional.interpolate(logits.double(), (16, 32), mode="bilinear", align_corners=True)
    terms = [-up[n, :, y, x].log_softmax(0)[label[n, y, x]] for n in range(2) for y in range(16) for x in range(32)
             if label[n, y, x] != 255]
    loss = source_only.segmentation_loss(logits, label)
    torch.testing.assert_close(loss.double(), torch.stack(terms).mean())
    empty = source_only.segmentation_loss(logits, torch.full_like(label, 255))
    assert empty == 0
    empty.backward()  # connected to the graph
    assert not logits.grad.any()


def test_training_is_in_training_mode_and_batch_norm_settles_nothing(tmp_path, monkeypatch):
    """The loop's wires: training mode, the schedule's rate, the criterion it is given, the labels of the batch."""
    args = argparse.Namespace(source="toy", toy_world=0, toy_images=4, backbone="resnet18", backbone_weights="none",
                              size=(32, 64), source_size=(32, 64), crop=(32, 64), scale_jitter=[1.0, 1.0],
                              batch_norm="live", optimizer="sgd", head_lr=10.0, batch_size=2, seed=0, device="cpu",
                              precision="fp32", compile=False, workers=0, log_every=1, save_every=100, val_every=0,
                              out=str(tmp_path / "run"), resume=False, data_root=None, iterations=2)
    model, seen = common.build_model(args), []
    run_folder = common.Run("source_only", args)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def criterion(logits, label):
        seen.append((model.training, tuple(logits.shape), tuple(label.shape)))
        return 3 * source_only.segmentation_loss(logits, label)

    source_only.train_source(
        model, common.source_dataset(args, common.training_augment(args)), args, run_folder, "x.pt", 2, 0.5, criterion
    )
    assert seen == [(True, (2, 16, 5, 9), (2, 32, 64))] * 2
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [0.5, 0.5 * 0.5**0.9] and lines[0]["loss"] == pytest.approx(
        3 * 2.77, abs=0.4
    )
    still = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert not still  # every weight and every statistic moves
    assert load(tmp_path / "run/x.pt")["step"] == 2


def test_run_folder(tmp_path):
    out = run(tmp_path, "source_only.py", *TINY, "--iterations", 3)
    folder = tmp_path / "runs/source_only-toy-s0"
    assert {p.name for p in folder.iterdir()} == {
        "args.json", "log.jsonl", "last.pt", "panel.png", "result.json"}
    told = [line.endswith(" s left]") for line in out.splitlines() if line.startswith("source  ")]
    assert told == [False, True, False]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == ["1/3", "2/3", "3/3"] and all(line["loss"] > 0 for line in lines)
    scores = result(folder)
    assert list(scores["columns"]) == ["source only", "+ BN target"] and len(scores["iou"]) == 16
    assert {"miou", "miou13", "seconds", "peak_memory_gb", "versions"} <= set(scores)
    assert "traffic light" in out and "mIoU" in out
    again = run(tmp_path, "source_only.py", *TINY, "--iterations", 3, ok=False)
    assert "holds a run already" in again and "--resume" in again
    other = run(tmp_path, "source_only.py", *TINY, "--iterations", 4, "--resume", ok=False)
    assert "had iterations 3" in other


def test_a_half_line_in_the_log_does_not_outlive_a_resume(tmp_path):
    arguments = ["source_only.py", *TINY, "--iterations", 4, "--save-every", 2, "--out", "run"]
    run(tmp_path, *arguments)
    log = tmp_path / "run/log.jsonl"
    log.write_text(log.read_text()[:-9])  # as a kill or a full disk leaves it
    run(tmp_path, *arguments, "--resume")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == ["1/4", "2/4", "3/4"]
    run(tmp_path, "source_only.py", *TINY, "--oracle", "--iterations", 1, "--out", "oracle")
    assert load(tmp_path / "oracle/last.pt")["method"] == "oracle"
    assert load(tmp_path / "run/last.pt")["method"] == "source_only"


@exact
def test_sigkill_and_resume_give_the_same_weights(tmp_path):
    arguments = ["source_only.py", *TINY, "--iterations", 12, "--save-every", 3]
    run(tmp_path, *arguments, "--out", "whole")
    kill_when(tmp_path, lambda: logged(tmp_path / "cut", "source", 5), *arguments, "--out", "cut")
    assert not (tmp_path / "cut/result.json").exists()
    run(tmp_path, *arguments, "--out", "cut", "--resume")
    assert same_weights(tmp_path / "whole/last.pt", tmp_path / "cut/last.pt")
    assert result(tmp_path / "whole")["iou"] == result(tmp_path / "cut")["iou"]
    run(tmp_path, *arguments, "--seed", 1, "--lr", 1e-9, "--out", "other")
    start = [load(tmp_path / f"{name}/last.pt")["model"]["backbone.4.0.conv1.weight"] for name in ("whole", "other")]
    assert torch.corrcoef(torch.stack([w.flatten() for w in start]))[0, 1].abs() < 0.5  # other weights to begin with


def test_ctrl_c_ends_with_one_line_that_says_how_to_go_on(tmp_path):
    arguments = ["source_only.py", *TINY, "--iterations", 500, "--save-every", 2, "--out", "run"]
    code, errors = kill_when(
        tmp_path, lambda: logged(tmp_path / "run", "source", 3), *arguments, with_signal=signal.SIGINT)
    assert code == 1 and "--resume" in errors and "Traceback" not in errors
    assert load(tmp_path / "run/last.pt")["step"] >= 2


def test_torchrun_gives_the_single_process_result(tmp_path):
    """VGG16, because torch synchronises live batch norm on GPUs only."""
    arguments = ["source_only.py", *TINY, "--toy-images", 8, "--precision", "fp32", "--optimizer", "sgd",
                 "--backbone", "vgg16", "--lr", 0.02]
    run(tmp_path, *arguments, "--iterations", 1, "--lr", 1e-9, "--out", "start")
    run(tmp_path, *arguments, "--iterations", 3, "--out", "one")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         *command(*arguments, "--iterations", 3, "--out", "two")[1:]],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert trained_alike(tmp_path / "start/last.pt", tmp_path / "one/last.pt", tmp_path / "two/last.pt")
    assert result(tmp_path / "one")["miou"] == pytest.approx(result(tmp_path / "two")["miou"], abs=1)
    assert list(result(tmp_path / "one")["columns"]) == ["source only"]  # no batch norm to estimate


def test_live_batch_norm_in_two_processes_on_a_cpu_is_one_line(tmp_path):
    team = start_two(tmp_path, "source_only.py", *TINY, "--device", "cpu", "--iterations", 1, "--out", "run")
    for process in team:
        process.join(120)
    assert all(process.exitcode == 1 for process in team)
    errors = texts(tmp_path)[1]
    assert "--batch-norm" in errors and "Traceback" not in errors


def test_real_formats(tmp_path):
    write_synthia(tmp_path)
    write_gta5(tmp_path)
    write_cityscapes(tmp_path)
    small = ["--data-root", tmp_path, "--backbone", "resnet14", "--backbone-weights", "none", "--workers", 1,
             "--iterations", 2, *TINY]
    for source, classes in (("synthia", 16), ("gta5", 19)):
        run(tmp_path, "source_only.py", "--source", source, *small)
        assert len(result(tmp_path / f"runs/source_only-{source}-s0")["iou"]) == classes
    run(tmp_path, "source_only.py", "--source", "gta5", *small, "--oracle")
    assert list(result(tmp_path / "runs/oracle-gta5-s0")["columns"]) == ["oracle"]
    torn = tmp_path / "cityscapes/gtFine/val/bonn/bonn_000002_000019_gtFine_labelIds.png"
    torn.write_bytes(torn.read_bytes()[:60])
    message = run(tmp_path, "source_only.py", "--source", "synthia", *small, "--out", "torn", ok=False)
    assert message.startswith("error: ") and torn.name in message and not (tmp_path / "torn").exists()


def test_a_target_without_labels_is_trained_on_all_the_same(tmp_path):
    write_synthia(tmp_path)
    write_cityscapes(tmp_path)
    shutil.rmtree(tmp_path / "cityscapes/gtFine")
    arguments = ["--source", "synthia", "--data-root", tmp_path, "--backbone", "resnet14", "--backbone-weights", "none",
                 "--workers", 0, "--iterations", 2, *TINY]
    out = run(tmp_path, "source_only.py", *arguments, "--out", "run")
    assert "no validation labels" in out.splitlines()[1] and "evaluate.py run/last.pt --images" in out
    assert load(tmp_path / "run/last.pt")["step"] == 2 and result(tmp_path / "run")["columns"] == {}
    assert Image.open(tmp_path / "run/panel.png").size[0] == 2 * 324 - 4  # image and prediction, no truth
    run(tmp_path, "evaluate.py", "run/last.pt", "--images", "cityscapes/leftImg8bit/val", "--export", "seen")
    assert len(list((tmp_path / "seen/labelIds").rglob("*.png"))) == 6
    assert "gtFine" in run(tmp_path, "source_only.py", *arguments, "--oracle", "--out", "oracle", ok=False)
    looking = run(tmp_path, "drsl.py", "--plain", *arguments, "--val-every", 1, "--out", "looking", ok=False)
    assert "gtFine/val" in looking
    assert "target val: no labels" in run(tmp_path, "common.py", "--source", "synthia", "--data-root", tmp_path)


def test_validation_labels_without_a_class_are_no_number(tmp_path):
    write_synthia(tmp_path)
    write_cityscapes(tmp_path)
    for path in (tmp_path / "cityscapes/gtFine/val").rglob("*.png"):
        Image.new("L", (128, 64), 255).save(path)
    out = run(tmp_path, "drsl.py", "--source", "synthia", "--data-root", tmp_path, "--backbone", "resnet14",
              "--backbone-weights", "none", "--workers", 0, *TINY, "--warmup-iterations", 1, "--head-iterations", 0,
              "--joint-iterations", 0, "--rounds", 1, "--iterations", 2, "--val-every", 1, "--out", "run")
    assert re.search(r"^mIoU +- +- +-$", out, re.M) and result(tmp_path / "run")["miou"] is None
    assert "NaN" not in (tmp_path / "run/result.json").read_text() + (tmp_path / "run/log.jsonl").read_text()


def test_any_terminal_and_any_reader_of_the_output_will_do(tmp_path):
    """One that knows no umlauts, and one that has seen enough after a line."""
    line = [*command("source_only.py", *TINY, "--iterations", 2, "--out", "~/\u00fcber lauf")]
    done = subprocess.run(f"{shlex.join(line)} | head -n 1", shell=True, cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii", "HOME": str(tmp_path)})
    assert done.stderr == "stopped; nobody reads the output any more\n" and "\\xfcber lauf  python" in done.stdout
    assert (tmp_path / "\u00fcber lauf/args.json").exists()


def test_numbers_out_of_range_are_refused(monkeypatch, capsys):
    refused = {
        "source_only": [["--log-every", "0"], ["--save-every", "0"], ["--iterations", "0"], ["--seed", "-1"],
                        ["--seed", "18446744073709551616"], ["--size", "64"], ["--size", "60x90"], ["--lr", "-1"],
                        ["--lr", "nan"], ["--lr", "inf"], ["--head-lr", "0"], ["--scale-jitter", "2", "1"],
                        ["--scale-jitter", "0", "1"], ["--batch-size", "1.5"], ["--data-root", "."],
                        ["--source-size", "64x128"]],
        "cpsl": [["--ema", "2"], ["--temperature", "0"], ["--epsilon", "-1"], ["--alpha", "nan"],
                 ["--lambda-sl", "-1"], ["--confidence", "1.5"]],
        "sdca": [["--tau", "0"], ["--tau", "-5"], ["--theta", "2"], ["--delta", "-0.1"], ["--lambda-feat", "-1"]],
        "scale_invariant": [["--gamma", "-1"], ["--beta", "inf"], ["--portion", "0"]],
        "drsl": [["--sigma", "0"], ["--lambda-mm", "-1"], ["--lambda-sma", "nan"], ["--portion", "2"],
                 ["--power", "-1"]]}
    for method, flag in ((method, flag) for method, flags in refused.items() for flag in flags):
        monkeypatch.setattr(sys, "argv", [method, *flag])
        with pytest.raises(SystemExit):
            importlib.import_module(method).parse_args()
        assert flag[0] in capsys.readouterr().err.splitlines()[-1]


def test_bad_input_is_one_line(tmp_path):
    def refused(*arguments, script="source_only.py", **environment):
        return run(tmp_path, script, *TINY, *arguments, ok=False, **environment)

    assert "--data-root" in run(tmp_path, "source_only.py", "--source", "gta5", ok=False)
    assert "GTA5" in run(tmp_path, "source_only.py", "--source", "gta5", "--data-root", tmp_path, ok=False)
    assert "--crop 64x64" in refused("--crop", "64x64", "--out", "b")
    assert "--device" in refused("--device", "cuda", "--out", "d", CUDA_VISIBLE_DEVICES="")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert "tensor.pt" in refused("--init", "tensor.pt", "--out", "e", script="drsl.py")
    message = refused("--backbone-weights", "imagenet", "--out", "f", TORCH_HOME=str(tmp_path))
    assert "--backbone-weights imagenet" in message  # tests have no network
    (tmp_path / "file").write_text("")
    assert "file" in refused("--out", "file/run") and "file" in refused("--out", "file")
    assert not [path for path in tmp_path.glob("?/log.jsonl") if path.read_text()]  # all before any training
    assert "nothing to resume" in refused("--resume", "--out", "c")


def test_the_target_is_looked_at_before_training(tmp_path):
    write_synthia(tmp_path)
    message = run(tmp_path, "source_only.py", "--source", "synthia", "--data-root", tmp_path, "--backbone-weights",
                  "none", "--backbone", "resnet18", *TINY, "--out", "run", ok=False)
    assert "cityscapes/leftImg8bit/train: no such folder" in message and not (tmp_path / "run").exists()


# What --preset small changes in each file besides the common recipe; everything else stays as in the paper.
SMALL = {
    "source_only": {"iterations": 10000, "lr": 1e-4},
    "scale_invariant": {"iterations": 6000, "lr": 5e-5},
    "cpsl": {"iterations": 6000, "lr": 5e-5, "prototype_lr": 1.2e-4, "distill_iterations": 6000, "distill_lr": 1e-4},
    "sdca": {"iterations": 4000, "lr": 5e-5, "horizon": 1.0, "lambda_feat": 10.0, "lambda_out": 10.0,
             "from_scratch_ssl": False, "ssl_iterations": 2000, "ssl_lr": 5e-5},
    "drsl": {"iterations": 6000, "head_iterations": 500, "joint_iterations": 500},
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("source, aspect", [("gta5", 1914 / 1052), ("synthia", 1280 / 760)])
def test_every_file_has_the_small_preset(name, source, aspect, monkeypatch):
    def parsed(*flags):
        monkeypatch.setattr(sys, "argv", [name, "--source", source, *flags])
        return vars(importlib.import_module(name).parse_args())

    paper, small = parsed(), parsed("--preset", "small")
    common_part = {"preset": "small", "backbone": "resnet50", "size": (256, 512), "source_size": (368, 640),
                   "crop": (256, 512), "batch_norm": "live", "optimizer": "adamw", "batch_size": 4}
    if name != "source_only":
        common_part |= {"warmup_iterations": 10000, "warmup_lr": 1e-4}
    assert {key: value for key, value in small.items() if value != paper[key]} == common_part | SMALL[name]
    height, width = small["source_size"]
    assert width / height == pytest.approx(aspect, rel=0.05)
    for size in (small["size"], small["source_size"]):
        common.training_augment(argparse.Namespace(**small), size)  # the crop fits
    typed = parsed("--preset", "small", "--backbone", "resnet101", "--size", "128x256", "--iterations", "7000")
    assert (typed["backbone"], typed["iterations"], typed["optimizer"]) == ("resnet101", 7000, "adamw")
    assert typed["size"] == typed["crop"] == typed["source_size"] == (128, 256)
    monkeypatch.setattr(sys, "argv", [name, "--preset", "small"])
    with pytest.raises(SystemExit):
        importlib.import_module(name).parse_args()


def test_init_takes_a_source_only_model_of_the_same_task(tmp_path, start):
    def refused(checkpoint, *flags):
        return run(tmp_path, "drsl.py", *TINY, "--init", checkpoint, "--out", "run", *flags, ok=False)

    run(tmp_path, "source_only.py", *TINY, "--oracle", "--iterations", 1, "--out", "oracle")
    assert "it is one of method oracle" in refused("oracle/last.pt")
    saved = load(start)
    torch.save({**saved, "method": "cpsl"}, tmp_path / "cpsl.pt")
    assert "it is one of method cpsl" in refused("cpsl.pt")
    torch.save({**saved, "step": saved["step"] - 1}, tmp_path / "half.pt")
    assert f"half.pt: stands at step {saved['step'] - 1} of {saved['step']}; let" in refused("half.pt")
    assert "expected a checkpoint of toy_world 1; it is one of toy_world 0" in refused(start, "--toy-world", 1)
    assert "of backbone vgg16; it is one of backbone resnet14" in refused(start, "--backbone", "vgg16")
    assert "no such file" in refused(start.parent)


def test_a_resumed_run_needs_no_init_any_more(tmp_path, start):
    shutil.copy(start, tmp_path / "begin.pt")
    arguments = ["scale_invariant.py", *TINY, "--init", "begin.pt", "--rounds", 1, "--portion", 2,
                 "--iterations", 2, "--out", "run"]
    run(tmp_path, *arguments)
    columns = result(tmp_path / "run")["columns"]
    (tmp_path / "begin.pt").unlink()
    run(tmp_path, *arguments, "--resume")
    assert result(tmp_path / "run")["columns"] == columns
    other = run(tmp_path, "drsl.py", *TINY, "--out", "run", "--resume", ok=False)
    assert "not the settings of a run of drsl" in other


def test_a_damaged_run_folder_is_one_line(tmp_path):
    arguments = ["source_only.py", *TINY, "--iterations", 2, "--out", "run"]
    run(tmp_path, *arguments)
    settings, log = (tmp_path / "run/args.json").read_text(), (tmp_path / "run/log.jsonl").read_text()
    changed = run(tmp_path, *arguments, "--resume", "--size", "64x128", "--crop", "32x32", ok=False)
    assert "had size [32, 64]" in changed
    for text in ("{", "[1, 2]"):
        (tmp_path / "run/args.json").write_text(text)
        assert "args.json" in run(tmp_path, *arguments, "--resume", ok=False)
    (tmp_path / "run/args.json").write_text(settings)
    (tmp_path / "run/log.jsonl").write_text("not json\n7\n{}\n" + log)
    run(tmp_path, *arguments, "--resume")
    assert (tmp_path / "run/log.jsonl").read_text() == "{}\n" + log
    whole = (tmp_path / "run/last.pt").read_bytes()
    (tmp_path / "run/last.pt").write_bytes(whole[:len(whole) // 2])
    assert "last.pt: not a checkpoint that can be read safely" in run(tmp_path, *arguments, "--resume", ok=False)
    torch.save({"a": 1}, tmp_path / "run/last.pt")
    assert "last.pt: not a checkpoint of this project" in run(tmp_path, *arguments, "--resume", ok=False)
