"""What all method files must do alike: the same blocks, the same flags, real photographs, compiled steps."""

import argparse
import functools
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from scripts import PROJECT, TINY, load, result, run, same_weights
from torch.utils._python_dispatch import TorchDispatchMode
from trees import WEIGHTS, link_streets, needs_streets

import common

FILES = sorted(path.name for path in PROJECT.glob("*.py") if path.name not in ("common.py", "evaluate.py"))
METHODS = [name for name in FILES if name != "source_only.py"]


def test_shared_blocks_are_identical_in_every_method_file():
    marked = {
        name: re.findall(r"# --- same in every method file ---\n(.*?)# --- end ---", (PROJECT / name).read_text(), re.S)
        for name in FILES
    }
    assert len(marked) == 5 and len(marked["source_only.py"]) == 1
    assert all(blocks == marked["source_only.py"] for blocks in marked.values())


def test_methods_import_nothing_else_of_the_project():
    for name in FILES:
        text = (PROJECT / name).read_text()
        assert not [
            other for other in FILES if re.search(rf"^\s*(import|from) {other.removesuffix('.py')}\b", text, re.M)
        ]


def test_the_same_flags_mean_the_same_everywhere(monkeypatch):
    """Help, default and choices of every flag that several files share are the same but for each paper's own values."""
    parsers, flags = [], {}

    def stop_with(parser):
        parsers.append(parser)
        raise StopIteration

    monkeypatch.setattr(common, "parse", stop_with)
    for name in FILES:
        with pytest.raises(StopIteration):
            importlib.import_module(name.removesuffix(".py")).parse_args()
        for action in parsers[-1]._actions:
            for option in action.option_strings:
                flags.setdefault(option, {})[name] = (action.help, str(action.default), action.choices, action.metavar)
    assert sum(len(texts) == len(FILES) for texts in flags.values()) > 20
    for option in ("--init", "--warmup-iterations", "--warmup-lr", "--ramp", "--power", "--val-every"):
        assert list(flags[option]) == METHODS
    own = {"--iterations", "--lr"}  # and what only some papers have, with their own values
    for option, texts in flags.items():
        if len(texts) >= len(METHODS) and option not in own:
            assert len(set(texts.values())) == 1, option


@needs_streets
@pytest.mark.parametrize(
    "method, flags",
    [("scale_invariant.py", ["--rounds", 1, "--portion", 8]), ("cpsl.py", ["--bank", 64]),
     ("sdca.py", ["--ssl-iterations", 1]),
     ("drsl.py", ["--rounds", 1, "--head-iterations", 1, "--joint-iterations", 1])],
)
def test_real_photographs(tmp_path, method, flags):
    """Seven of the sixteen classes occur: the others have no pixels anywhere, and nothing breaks."""
    link_streets(tmp_path)
    run(tmp_path, method, "--source", "synthia", "--data-root", tmp_path, "--backbone", "resnet14",
        "--backbone-weights", WEIGHTS, "--workers", 0, *TINY, "--warmup-iterations", 2, "--iterations", 2, "--out",
        "run", *flags)
    scores = result(tmp_path / "run")
    assert sum(value is not None for value in scores["iou"].values()) >= 7 and scores["rare"] is None
    run(tmp_path, "evaluate.py", "run/last.pt", "--data-root", tmp_path, "--json", "table.json")
    table = json.loads((tmp_path / "table.json").read_text())["run/last"]
    assert (
        table["miou"] == pytest.approx(scores["miou"]) and table["iou"] == scores["iou"]
    )  # evaluate.py reads every method's checkpoint


FEW = {"source_only": [], "scale_invariant": ["--rounds", 1, "--portion", 2], "cpsl": ["--bank", 64, "--consistency"],
       "sdca": ["--ssl-iterations", 2, "--delta", 0.1],
       "drsl": ["--rounds", 1, "--head-iterations", 1, "--joint-iterations", 1]}
every_method = pytest.mark.parametrize("method", [name for name in FEW if name != "source_only"])


def play(monkeypatch, method, *flags):
    """The script's main() in this process, a few steps of it."""
    module = importlib.import_module(method)
    warmup = ["--warmup-iterations", 2] if method != "source_only" else []
    monkeypatch.setattr(sys, "argv", [method, *map(str, [*TINY, *warmup, "--iterations", 4, *FEW[method], *flags])])
    module.main()


READS = ("item", "_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "unique", "repeat_interleave")


class Watch(TorchDispatchMode):
    """Collects the operations for which a processor waits on its GPU: they read a value, or a shape depends on one."""

    def __init__(self):
        super().__init__()
        self.waits, self.steps = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::").rstrip("_").removeprefix("_unsafe_")
        masks = name in ("index", "index_put") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if masks or name.startswith(READS):
            self.waits.add(name)
        return function(*args, **(kwargs or {}))


@every_method
def test_no_step_waits_for_the_gpu_and_looking_at_the_score_changes_nothing(tmp_path, monkeypatch, capsys, method):
    """The real main(), watched while it computes the losses of every step, with and without looks at the score."""
    module, watch = importlib.import_module(method), Watch()
    step_losses = module.step_losses

    def watched(*given):
        with monkeypatch.context() as patched, watch:  # colours are drawn on the processor, as they should be
            patched.setattr(common, "colour_jitter", lambda images, *seed, strength=0.3: images)
            losses = step_losses(*given)
        watch.steps += 1
        return losses

    monkeypatch.setattr(module, "step_losses", watched)
    play(monkeypatch, method, "--out", tmp_path / "looking", "--val-every", 2)
    assert watch.steps >= 4 and not watch.waits
    with watch:
        torch.zeros(3)[torch.zeros(3) > 0]
    assert watch.waits  # or else this test could not fail

    looks = [line for line in log(tmp_path / "looking") if "val_miou" in line]
    assert [line["step"] for line in looks if line["stage"] == "adapt oracle"] == ["2/4", "4/4"]
    scores = result(tmp_path / "looking")
    assert looks[-1]["val_miou"] == scores["miou"]  # the last step's network is the one that is reported
    best = max(line["val_miou"] for line in looks)
    assert scores["best_on_validation"]["val_miou"] == best
    assert f"oracle, chosen by target labels: best mIoU on the way {best:.1f}" in capsys.readouterr().out
    if method == "drsl":
        play(monkeypatch, method, "--out", tmp_path / "blind")
        assert same_weights(tmp_path / "blind/last.pt", tmp_path / "looking/last.pt")
        assert "best_on_validation" not in result(tmp_path / "blind")


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def numbers(line):
    """What a line of the log tells of a step, without the time it took."""
    return {key: value for key, value in line.items()
            if key not in ("seconds", "waiting") and isinstance(value, (int, float))}


@pytest.mark.parametrize("method", FEW)
def test_compiled_steps_are_eager_steps(tmp_path, monkeypatch, method):
    """Every loss of every step the same, so the gradients too; what is captured once in a stage serves to its end.

    torch.compile captures and differentiates here without generating code, which needs a compiler and minutes.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counted, log_step = {}, common.Run.log_step

    def counting(run, stage, step, *rest, **values):
        counted.setdefault(stage, []).append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        log_step(run, stage, step, *rest, **values)

    monkeypatch.setattr(common.Run, "log_step", counting)
    play(monkeypatch, method, "--optimizer", "sgd", "--out", tmp_path / "eager")
    assert not any(sum(counted.values(), []))
    play(monkeypatch, method, "--optimizer", "sgd", "--compile", "--out", tmp_path / "compiled")
    for stage, graphs in counted.items():
        compiled = graphs[len(graphs) // 2:]
        assert compiled[0] > 0 and len(set(compiled[1:])) <= 1, stage
    for one, other in zip(log(tmp_path / "eager"), log(tmp_path / "compiled"), strict=True):
        assert numbers(one) == pytest.approx(numbers(other), rel=1e-3, abs=1e-5)
    assert same_keys(tmp_path / "eager/last.pt", tmp_path / "compiled/last.pt")


def same_keys(one, other):
    """Whether two checkpoints hold weights of the same names: nothing of a wrapper is saved."""
    return load(one)["model"].keys() == load(other)["model"].keys()


def test_a_compiled_run_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    flags = "drsl", "--compile", "--save-every", 2
    play(monkeypatch, *flags, "--out", tmp_path / "whole")
    time_to_save = common.Run.time_to_save

    def stopping(run, step, steps):
        if run.stage == "adapt" and step == 3:
            raise InterruptedError
        return time_to_save(run, step, steps)

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(common.Run, "time_to_save", stopping)
        play(patched, *flags, "--out", tmp_path / "cut")
    play(monkeypatch, *flags, "--out", tmp_path / "cut", "--resume")
    assert same_weights(tmp_path / "whole/last.pt", tmp_path / "cut/last.pt")


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")
@pytest.mark.parametrize("frozen", [False, True])
def test_generated_code_computes_the_same(frozen):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    if frozen:
        common.freeze_batch_norm(model)
    args, images, gradients = argparse.Namespace(compile=True), torch.randn(2, 3, 8, 8), []
    for network in (model, common.distribute(model, args)):
        model.zero_grad()
        network(images).square().mean().backward()
        gradients.append(model[0].weight.grad.clone())
    torch.testing.assert_close(*gradients)
