"""evaluate.py as a user runs it: tables, exports, panels, and the checks of its input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import PROJECT, TINY, result, run
from trees import write_cityscapes

import common
import evaluate


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    for name, seed in (("a", 0), ("b", 1)):
        run(folder, "source_only.py", *TINY, "--iterations", 2, "--seed", seed, "--out", name)
    return folder


def real_checkpoint(folder, source="synthia"):
    """A random network saved as a checkpoint of a real task."""
    import argparse

    torch.manual_seed(0)
    classes = common.task_classes(source)
    model = common.DeepLabV2(len(classes), "resnet18")
    args = argparse.Namespace(source=source, toy_world=0, toy_images=400, backbone="resnet18", size=(32, 64))
    torch.save(common.pack_model(model, args), folder / f"{source}.pt")
    return model


def test_table_json_and_panel(toy):
    out = run(toy, "evaluate.py", "a/last.pt", "b/last.pt", "--json", "t.json", "--panel", "p.png")
    table = json.loads((toy / "t.json").read_text())
    assert list(table) == ["a/last", "b/last"] and len(table["a/last"]["iou"]) == 16
    header, *rows = [line for line in out.splitlines() if line.strip()]
    assert header.split() == ["a/last", "b/last"] and rows[0].startswith("road") and rows[-1].startswith("misplaced")
    assert rows[16].split() == ["mIoU", f"{table['a/last']['miou']:.1f}", f"{table['b/last']['miou']:.1f}"]
    assert Image.open(toy / "p.png").width == 4 * 324 - 4  # image | truth | a | b
    written = json.loads((toy / "a/result.json").read_text())["columns"]["source only"]
    assert table["a/last"]["iou"] == pytest.approx(written["iou"], nan_ok=True)  # the number of the run itself
    assert result(toy / "a")["miou"] == pytest.approx(table["a/last"]["miou"]) and result(toy / "a")["own"] == "source only"


def test_other_worlds_and_splits(toy, tmp_path):
    """A checkpoint remembers its world; the train split is scored with labels that training never opened."""
    run(tmp_path, "source_only.py", *TINY, "--toy-world", 1, "--iterations", 2, "--out", "w")
    for split in ("val", "train"):
        run(tmp_path, "evaluate.py", "w/last.pt", "--device", "cpu", "--precision", "fp32", "--split", split, "--flip", "--json", f"{split}.json")
    run(tmp_path, "evaluate.py", "w/last.pt", "--device", "cpu", "--json", "plain.json")
    tables = {name: json.loads((tmp_path / f"{name}.json").read_text())["w/last"] for name in ("val", "train", "plain")}
    assert tables["plain"]["iou"] == result(tmp_path / "w")["columns"]["source only"]["iou"]
    assert tables["train"]["iou"] != tables["val"]["iou"] != tables["plain"]["iou"]


def test_scales_and_flip_change_the_numbers_a_little(toy):
    run(toy, "evaluate.py", "a/last.pt", "--json", "1.json")
    run(toy, "evaluate.py", "a/last.pt", "--json", "2.json", "--scales", 0.75, 1.25, "--flip")
    run(toy, "evaluate.py", "a/last.pt", "--json", "3.json", "--size", "48x96")
    one, two, three = (json.loads((toy / f"{i}.json").read_text())["a/last"]["miou"] for i in (1, 2, 3))
    assert len({one, two, three}) == 3


def test_export_speaks_cityscapes(tmp_path):
    write_cityscapes(tmp_path, splits=("val",))
    model = real_checkpoint(tmp_path).eval()
    run(tmp_path, "evaluate.py", "synthia.pt", "--data-root", tmp_path, "--export", "out", "--precision", "fp32", "--json", "t.json")
    names = [f"{city}_{i:06d}_000019" for city in ("aachen", "bonn") for i in range(3)]
    assert {p.name for p in (tmp_path / "out/labelIds").iterdir()} == {f"{n}_pred_labelIds.png" for n in names}
    assert {p.name for p in (tmp_path / "out/color").iterdir()} == {f"{n}_pred_color.png" for n in names}

    # The exported files, scored from scratch with Cityscapes ids, give the table's numbers.
    table = json.loads((tmp_path / "t.json").read_text())["synthia"]
    pairs = []
    for name in names:
        ids = np.array(Image.open(tmp_path / f"out/labelIds/{name}_pred_labelIds.png"))
        truth = np.array(Image.open(tmp_path / f"cityscapes/gtFine/val/{name.split('_')[0]}/{name}_gtFine_labelIds.png"))
        assert ids.shape == truth.shape == (64, 128) and set(np.unique(ids)) <= set(common.label_ids(common.SYNTHIA_16))
        pairs.append((ids, truth))
    predicted, truth = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    predicted, truth = predicted[truth > 6], truth[truth > 6]
    for name, index in zip(common.SYNTHIA_16, common.label_ids(common.SYNTHIA_16)):
        union = ((predicted == index) | (truth == index)).sum()
        if union:
            assert table["iou"][name] == pytest.approx(100 * ((predicted == index) & (truth == index)).sum() / union)
        else:
            assert table["iou"][name] is None

    item = common.Cityscapes(tmp_path, "val", size=(32, 64), classes=common.SYNTHIA_16)[0]
    prediction = common.predict(model, item["image"][None], (64, 128)).argmax(1)[0]
    colours = np.array(Image.open(tmp_path / f"out/color/{names[0]}_pred_color.png"))
    assert np.array_equal(colours, common.palette(common.SYNTHIA_16)[prediction.numpy()])


def test_several_checkpoints_export_into_folders_of_their_own(tmp_path):
    write_cityscapes(tmp_path, splits=("val",), count=1)
    for source in ("synthia", "gta5"):
        real_checkpoint(tmp_path, source)
    out = run(tmp_path, "evaluate.py", "synthia.pt", "gta5.pt", "--data-root", tmp_path, "--export", "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"synthia", "gta5"}
    assert "terrain" in out  # classes of both tasks, a dash where a model has none


def test_label_ids_are_those_of_the_official_scripts():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels", reason="the official cityscapesScripts are not installed")
    ids = {label.name: label.id for label in labels.labels}
    assert [ids[name] for name in common.CLASSES] == common.label_ids(common.CLASSES)


def test_the_official_evaluator_gives_our_numbers(tmp_path):
    """`pip install cityscapesscripts` for this check only: their tool on our export, to the last digit."""
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
                                   reason="the official cityscapesScripts are not installed")
    write_cityscapes(tmp_path, splits=("val",))
    model = real_checkpoint(tmp_path, "gta5")
    for branch in model.classifier:
        torch.nn.init.normal_(branch.weight, std=1.0)  # predictions of many classes
    checkpoint = torch.load(tmp_path / "gta5.pt", weights_only=True)
    torch.save({**checkpoint, "model": model.state_dict()}, tmp_path / "gta5.pt")
    run(tmp_path, "evaluate.py", "gta5.pt", "--data-root", tmp_path, "--export", "out", "--precision", "fp32", "--json", "t.json")
    predictions = sorted(str(path) for path in (tmp_path / "out/labelIds").iterdir())
    truths = sorted(str(path) for path in (tmp_path / "cityscapes/gtFine/val").rglob("*_labelIds.png"))
    official.args.evalInstLevelScore, official.args.JSONOutput, official.args.quiet = False, False, True
    theirs = official.evaluateImgLists(predictions, truths, official.args)["classScores"]
    ours = json.loads((tmp_path / "t.json").read_text())["gta5"]["iou"]
    assert sum(bool(value) for value in ours.values()) >= 2  # several classes are hit
    for name, value in ours.items():
        assert np.isnan(theirs[name]) if value is None else value == pytest.approx(100 * theirs[name], abs=1e-9)


def test_bad_input_is_one_line(toy, tmp_path):
    (tmp_path / "noise.pt").write_bytes(b"noise")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "foreign.pt")
    for name in ("noise.pt", "foreign.pt", "missing.pt"):
        assert name in run(tmp_path, "evaluate.py", name, ok=False)
    real_checkpoint(tmp_path)
    assert "--data-root" in run(tmp_path, "evaluate.py", "synthia.pt", ok=False)
    assert "--panel" in run(tmp_path, "evaluate.py", "synthia.pt", toy / "a/last.pt", "--panel", "p.png", ok=False)
    assert "above zero" in run(tmp_path, "evaluate.py", "synthia.pt", "--scales", 0, ok=False)
    assert ".png" in run(tmp_path, "evaluate.py", "synthia.pt", "--panel", "picture", ok=False)


def test_summary_over_seeds(tmp_path):
    for i, (source, drsl) in enumerate([(30.0, 40.0), (32.0, 44.0), (34.0, 42.0)]):
        for method, own in (("DRSL", drsl), ("LSE", drsl - 10)):  # both start from the same source-only model
            folder = tmp_path / f"{method}{i}"
            folder.mkdir()
            columns = {"source only": {"miou": source, "miou13": source + 1}, method: {"miou": own, "rare": own / 2}}
            (folder / "result.json").write_text(json.dumps({"own": method, "columns": columns, "seconds": 100 + i, "peak_memory_gb": 1 + i / 10}))
            (folder / "args.json").write_text(json.dumps({"seed": i}))
    folders = [f"{method}{i}" for method in ("DRSL", "LSE") for i in range(3)]
    header, _, source, drsl, lse = run(tmp_path, "evaluate.py", "--summary", *folders).splitlines()
    assert header == "| | seeds | mIoU | mIoU, 13 | mIoU, rare | misplaced % | seconds | GB |"
    assert source == "| source only | 3 | 32.0 ± 2.0 | 33.0 ± 2.0 | - | - | - | - |"
    assert drsl == "| DRSL | 3 | 42.0 ± 2.0 | - | 21.0 ± 1.0 | - | 101 | 1.2 |" and lse.startswith("| LSE | 3 | 32.0 ± 2.0 |")
    (tmp_path / "LSE0/args.json").write_text(json.dumps({"seed": 1}))  # now seed 1 has two source-only models
    assert "another result" in run(tmp_path, "evaluate.py", "--summary", *folders, ok=False)
    assert "result.json" in run(tmp_path, "evaluate.py", "--summary", "DRSL0", "gone", ok=False)
    assert "either" in run(tmp_path, "evaluate.py", ok=False)


def test_titles_are_short_and_distinct():
    from pathlib import Path

    titles = lambda *names: evaluate.titles_of([Path(name) for name in names])
    assert titles("runs/x/last.pt", "runs/y/last.pt") == ["x/last", "y/last"]
    assert titles("x/best.pt", "y/other.pt") == ["best", "other"]
    assert titles("a/b/last.pt", "c/b/last.pt") == ["a/b/last", "c/b/last"]
    assert titles("runs/x/last.pt") == ["x/last"] and titles("last.pt") == ["last"]
    assert len(titles("a.pt", "a.pt")) == 2


def test_every_help_answers_offline_and_leaves_nothing_behind(tmp_path):
    for script in sorted(p.name for p in PROJECT.glob("*.py")):
        assert "usage" in run(tmp_path, script, "--help")
    assert {path.name for path in tmp_path.iterdir()} == {".stdout", ".stderr"}  # what the test itself wrote
