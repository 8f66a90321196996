"""source_only.py: the loop's parts against closed forms, and the script as a user runs it."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from scripts import SPLITTABLE, TINY, command, kill_when, logged, result, run, same_weights, start_two, texts, trained_alike
from trees import write_cityscapes, write_gta5, write_synthia

import common
import source_only


def test_poly_schedule():
    assert source_only.poly_lr(2.0, 0, 10, 0.9) == 2.0
    assert source_only.poly_lr(1.0, 40000, 62500, 0.9) == pytest.approx(0.398724, abs=1e-6)  # (1 - 0.64) ** 0.9
    assert source_only.poly_lr(3.0, 7, 10, 0.0) == 3.0


def test_optimizer_groups():
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2), "classifier": torch.nn.Linear(2, 2)})
    model.backbone, model.classifier = model["backbone"], model["classifier"]
    model.backbone.bias.requires_grad_(False)
    optimizer = source_only.make_optimizer(model, argparse.Namespace(optimizer="sgd", head_lr=10.0))
    source_only.set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 5.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]
    assert all(group["momentum"] == 0.9 and group["weight_decay"] == 5e-4 for group in optimizer.param_groups)


def test_every_weight_learns_also_with_frozen_batch_norm():
    args = argparse.Namespace(source="toy", backbone="resnet18", backbone_weights="none", freeze_bn=True, device="cpu")
    model = common.build_model(args).train()
    optimizer = source_only.make_optimizer(model, argparse.Namespace(optimizer="sgd", head_lr=1.0))
    source_only.set_lr(optimizer, 1e-3)
    image, label = torch.randn(2, 3, 64, 128), torch.randint(16, (2, 64, 128))
    source_only.descend(source_only.segmentation_loss(model(image)[1], label), optimizer, model)
    dead = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert not dead and not any("bn" in name and p.requires_grad for name, p in model.named_parameters())


def test_run_folder(tmp_path):
    out = run(tmp_path, "source_only.py", *TINY, "--iterations", 3)
    folder = tmp_path / "runs/source_only-toy-s0"
    assert {p.name for p in folder.iterdir()} == {"args.json", "log.jsonl", "last.pt", "panel.png", "result.json"}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == ["1/3", "2/3", "3/3"] and all(line["loss"] > 0 for line in lines)
    scores = result(folder)
    assert list(scores["columns"]) == ["source only", "+ BN target"] and len(scores["iou"]) == 16
    assert {"miou", "miou13", "seconds", "peak_memory_gb", "versions"} <= set(scores)
    assert "traffic light" in out and "mIoU" in out
    again = run(tmp_path, "source_only.py", *TINY, "--iterations", 3, ok=False)
    assert "holds a run already" in again and "--resume" in again
    other = run(tmp_path, "source_only.py", *TINY, "--iterations", 4, "--resume", ok=False)
    assert "--iterations 3" in other


def test_a_half_line_in_the_log_does_not_outlive_a_resume(tmp_path):
    arguments = ["source_only.py", *TINY, "--iterations", 4, "--save-every", 2, "--out", "run"]
    run(tmp_path, *arguments)
    log = tmp_path / "run/log.jsonl"
    log.write_text(log.read_text()[:-9])  # as a kill or a full disk leaves it
    run(tmp_path, *arguments, "--resume")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == ["1/4", "2/4", "3/4"]
    run(tmp_path, "source_only.py", *TINY, "--oracle", "--iterations", 1, "--out", "oracle")
    assert torch.load(tmp_path / "oracle/last.pt", weights_only=True)["oracle"] is True
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["oracle"] is False


def test_same_seed_same_weights_other_seed_other_weights(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path, "source_only.py", *TINY, "--iterations", 2, "--seed", seed, "--out", name)
    assert same_weights(tmp_path / "a/last.pt", tmp_path / "b/last.pt")
    assert not same_weights(tmp_path / "a/last.pt", tmp_path / "c/last.pt")


def test_sigkill_and_resume_give_the_same_weights(tmp_path):
    arguments = ["source_only.py", *TINY, "--iterations", 12, "--save-every", 3]
    run(tmp_path, *arguments, "--out", "whole")
    kill_when(tmp_path, lambda: logged(tmp_path / "cut", "source", 5), *arguments, "--out", "cut")
    assert not (tmp_path / "cut/result.json").exists()
    run(tmp_path, *arguments, "--out", "cut", "--resume")
    assert same_weights(tmp_path / "whole/last.pt", tmp_path / "cut/last.pt")
    assert result(tmp_path / "whole")["iou"] == result(tmp_path / "cut")["iou"]


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    arguments = ["source_only.py", *TINY, "--iterations", 500, "--save-every", 500, "--out", "run"]
    code, errors = kill_when(tmp_path, lambda: logged(tmp_path / "run", "source", 3), *arguments, with_signal=signal.SIGINT)
    assert code == 1 and "--resume" in errors and "Traceback" not in errors
    assert 3 <= torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] < 500


def test_nan_stops_the_run_and_names_the_term(tmp_path):
    message = run(tmp_path, "source_only.py", *TINY, "--iterations", 30, "--save-every", 1, "--lr", 1e25, "--out", "run", ok=False)
    assert re.search(r"(source step \d+|last.pt): .*not finite", message)  # whichever the first step breaks
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)["model"] if (tmp_path / "run/last.pt").exists() else {}
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_torchrun_gives_the_single_process_result(tmp_path, start):
    arguments = ["source_only.py", *TINY, *SPLITTABLE, "--iterations", 3, "--lr", 0.02]
    run(tmp_path, *arguments, "--out", "one")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                    *command(*arguments, "--out", "two")[1:]], cwd=tmp_path, check=True, capture_output=True)
    assert trained_alike(start, tmp_path / "one/last.pt", tmp_path / "two/last.pt")
    assert result(tmp_path / "one")["miou"] == pytest.approx(result(tmp_path / "two")["miou"], abs=0.1)


def test_ctrl_c_in_one_process_stops_all_of_them_after_the_same_step(tmp_path):
    arguments = ["source_only.py", *TINY, "--freeze-bn", "--iterations", 500, "--out", "run"]
    team = start_two(tmp_path, *arguments)
    deadline = time.time() + 120
    while not logged(tmp_path / "run", "source", 3) and time.time() < deadline:
        time.sleep(0.01)
    os.kill(team[1].pid, signal.SIGINT)  # not the one that writes
    for process in team:
        process.join(120)
    assert [process.exitcode for process in team] == [1, 1] and "--resume" in texts(tmp_path)[1]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert steps[-1] == f"{torch.load(tmp_path / 'run/last.pt', weights_only=True)['step']}/500" != "500/500"


def test_real_formats(tmp_path):
    write_synthia(tmp_path)
    write_gta5(tmp_path)
    write_cityscapes(tmp_path)
    small = ["--data-root", tmp_path, "--backbone", "resnet18", "--backbone-weights", "none", "--workers", 1, "--iterations", 2,
             *TINY, "--no-freeze-bn"]
    for source, classes in (("synthia", 16), ("gta5", 19)):
        for oracle in ([], ["--oracle"]):
            run(tmp_path, "source_only.py", "--source", source, *small, *oracle)
        assert len(result(tmp_path / f"runs/source_only-{source}-s0")["iou"]) == classes
        assert list(result(tmp_path / f"runs/oracle-{source}-s0")["columns"]) == ["oracle"]
    (tmp_path / "RAND_CITYSCAPES/GT/LABELS/0000001.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    message = run(tmp_path, "source_only.py", "--source", "synthia", *small, "--out", "torn", ok=False)
    assert message.startswith("error: ") and "0000001.png" in message  # although a loader process met it


@pytest.mark.parametrize("backbone", ["vgg16", "vgg16-fcn8s"])
def test_networks_without_batch_norm(tmp_path, backbone):
    run(tmp_path, "source_only.py", *TINY, "--backbone", backbone, "--optimizer", "sgd", "--iterations", 1, "--out", "run")
    assert list(result(tmp_path / "run")["columns"]) == ["source only"]
    run(tmp_path, "evaluate.py", "run/last.pt", "--device", "cpu", "--json", "table.json")
    table = json.loads((tmp_path / "table.json").read_text())["run/last"]
    assert table["miou"] == pytest.approx(result(tmp_path / "run")["miou"])


def test_bad_input_is_one_line(tmp_path):
    assert "--data-root" in run(tmp_path, "source_only.py", "--source", "gta5", ok=False)
    assert "GTA5" in run(tmp_path, "source_only.py", "--source", "gta5", "--data-root", tmp_path, "--out", "a", ok=False)
    assert "--crop 64x64" in run(tmp_path, "source_only.py", *TINY, "--crop", "64x64", "--out", "b", ok=False)
    for flags in (["--log-every", 0], ["--save-every", 0], ["--iterations", 0], ["--seed", -1], ["--size", "64"]):
        assert flags[0] in run(tmp_path, "source_only.py", *TINY, *flags, "--out", "d", ok=False)
    if not torch.cuda.is_available():
        for script in ("source_only.py", "evaluate.py"):
            assert "--device" in run(tmp_path, script, *TINY[2:4], "--device", "cuda", ok=False)
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert "tensor.pt" in run(tmp_path, "drsl.py", *TINY, "--init", "tensor.pt", "--out", "e", ok=False)
    message = run(tmp_path, "source_only.py", *TINY, "--backbone-weights", "imagenet", "--out", "f", ok=False, TORCH_HOME=str(tmp_path))
    assert "--backbone-weights imagenet" in message  # tests have no network
    assert not list(tmp_path.glob("?/log.jsonl"))  # all before any training
    assert "nothing to resume" in run(tmp_path, "source_only.py", "--resume", "--out", "c", ok=False)
