"""What all method files must do alike: the same blocks, the same flags, real photographs, learning on the toy."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from scripts import PROJECT, TINY, exact, result, run, same_weights
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


@exact
@pytest.mark.parametrize("method, flags", [
    ("scale_invariant.py", ["--rounds", 2, "--portion", 2]), ("cpsl.py", ["--bank", 64]),
    ("sdca.py", ["--ssl-iterations", 2]),
    ("drsl.py", ["--rounds", 2, "--head-iterations", 1, "--joint-iterations", 1])])
def test_looking_at_the_validation_score_changes_nothing(tmp_path, method, flags):
    few = [*TINY, "--warmup-iterations", 2, "--iterations", 4, *flags]
    printed = run(tmp_path, method, *few, "--out", "looking", "--val-every", 2)
    lines = [json.loads(line) for line in (tmp_path / "looking" / "log.jsonl").read_text().splitlines()]
    looks = [line for line in lines if "val_miou" in line]
    assert [line["step"] for line in looks if line["stage"] == "adapt oracle"] == ["2/4", "4/4"]
    scores = result(tmp_path / "looking")
    assert looks[-1]["val_miou"] == scores["miou"]  # the last step's network is the one that is reported
    assert scores["best_on_validation"]["val_miou"] == max(line["val_miou"] for line in looks)
    assert (
        f"oracle, chosen by target labels: best mIoU on the way {max(line['val_miou'] for line in looks):.1f}"
        in printed
    )
    if method == "drsl.py":
        run(tmp_path, method, *few, "--out", "blind")
        assert same_weights(tmp_path / "blind" / "last.pt", tmp_path / "looking" / "last.pt")
        assert "best_on_validation" not in result(tmp_path / "blind")


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


@pytest.mark.parametrize("method, flags", [
    ("scale_invariant", ["--rounds", 1, "--portion", 2]), ("cpsl", ["--bank", 64]), ("cpsl", ["--no-rectify"]),
    ("sdca", ["--no-ssl", "--delta", 0.1]), ("drsl", ["--rounds", 1, "--head-iterations", 0, "--joint-iterations", 0])])
def test_no_step_of_the_loop_waits_for_the_gpu(tmp_path, monkeypatch, method, flags):
    """The real main(), watched while it computes the losses of every adaptation step."""
    module, watch = importlib.import_module(method), Watch()
    step_losses = module.step_losses
    arguments = [*TINY, "--warmup-iterations", 1, "--iterations", 3, "--out", tmp_path, *flags]
    monkeypatch.setattr(sys, "argv", [method, *map(str, arguments), "--log-every", "50"])

    def watched(*given):
        with watch:
            losses = step_losses(*given)
        watch.steps += 1
        return losses

    monkeypatch.setattr(module, "step_losses", watched)
    module.main()
    assert watch.steps >= 3 and not watch.waits
    with watch:
        torch.zeros(3)[torch.zeros(3) > 0]
    assert watch.waits  # or else this test could not fail


# ----------------------------------------------------- learning -----------------------------------------------------

SHORT = [*TINY, "--crop", "32x64", "--toy-images", 32]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of a source-only model that has seen something of the world."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder, "source_only.py", *SHORT, "--iterations", 120, "--out", "run")
    return folder / "run"


def log(folder, stage, key):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if line["stage"] == stage]


def test_source_training_learns(trained):
    """Chance is about 3 mIoU; 120 steps on small pictures must leave it far behind, and the loss must fall."""
    losses = log(trained, "source", "loss")
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    assert result(trained)["columns"]["source only"]["miou"] > 10


@pytest.mark.parametrize(
    "method, term, flags, off",
    [
        ("scale_invariant.py", "ce_t", ["--rounds", 1, "--portion", 3, "--iterations", 40, "--batch-size", 4], None),
        ("cpsl.py", "sl", ["--bank", 512], ["--lambda-sl", 0]),
        ("sdca.py", "feat_t", ["--no-ssl", "--delta", 0.5, "--tau", 1, "--lambda-feat", 1, "--lambda-out", 1],
         ["--lambda-feat", 0, "--lambda-out", 0]),
        ("drsl.py", "mm_t", ["--rounds", 1, "--head-iterations", 20, "--joint-iterations", 0],
         ["--lambda-mm", 0, "--lambda-sma", 0]),
    ],
)
def test_a_short_adaptation_moves_what_it_claims_to_move(tmp_path, trained, method, term, flags, off):
    """Its own target term falls, and further than with the idea off."""
    def fall(*more):
        name = f"run{len(more)}"
        run(tmp_path, method, *SHORT, "--iterations", 30, "--lr", 1e-4, "--ramp", 5, "--init", trained / "last.pt",
            "--out", name, *flags, *more)
        values = log(tmp_path / name, "adapt", term)
        return sum(values[:10]) - sum(values[-10:])

    falls = fall()
    assert falls > 0
    if off:
        assert falls > fall(*off)
