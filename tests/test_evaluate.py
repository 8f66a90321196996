"""evaluate.py: tables, exports, own pictures, differences between runs, and the checks of its input."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import DEVICE, TINY, load, result, run
from trees import write_cityscapes

import common
import cpsl
import evaluate
import source_only

MEANS = ("mIoU", "mIoU, 13", "mIoU, rare", "histogram distance %", "recall, rare looks")


def train(folder, module, *arguments):
    """A tiny run of a script in this process, its run folder below `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [module.__name__, *TINY, *map(str, arguments)])
        module.main()


def checkpoint(path, source="synthia", network=common.DeepLabV2, method="source_only", seed=0, **other):
    """A random network, saved as a checkpoint of a task; its predictions are of many classes."""
    torch.manual_seed(seed)
    classes = common.task_classes(source)
    model = network(len(classes), "resnet14")
    for key, value in model.state_dict().items():
        if key.startswith("classifier") and value.ndim == 4:
            value.normal_(std=0.3)
    torch.save({"method": method, "source": source, "toy_world": 0, "toy_images": 12, "backbone": "resnet14",
                "size": [32, 64], "classes": list(classes), "network": network.__name__, "step": 4, "iterations": 4,
                "model": model.state_dict(), **other}, path)
    return model.eval()


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """An empty folder in which the test stands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(*arguments):
    """What evaluate.py writes with --json, by title of the checkpoint."""
    evaluate.main([*map(str, arguments), "--json", "t.json"])
    return json.loads(Path("t.json").read_text())


def refusal(*arguments):
    """The line with which evaluate.py refuses its input."""
    with pytest.raises(common.InputError) as error:
        evaluate.main(list(map(str, arguments)))
    assert "\n" not in str(error.value)
    return str(error.value)


def picture(path):
    return np.array(Image.open(path))


def test_table_json_and_panel(tmp_path):
    train(tmp_path, source_only, "--iterations", 2, "--out", "a")
    checkpoint(tmp_path / "b.pt", "toy")
    out = run(tmp_path, "evaluate.py", "a/last.pt", "b.pt", "--json", "t.json", "--panel", "p.png")
    scores = json.loads((tmp_path / "t.json").read_text())
    assert list(scores) == ["a/last", "b"] and len(scores["b"]["iou"]) == 16
    header, *rows = [line for line in out.splitlines() if line.strip()]
    assert header.split() == ["a/last", "b"] and rows[0].startswith("road")
    assert [row[:22].strip() for row in rows[16:]] == list(MEANS)
    assert rows[16].split() == ["mIoU", f"{scores['a/last']['miou']:.1f}", f"{scores['b']['miou']:.1f}"]
    assert Image.open(tmp_path / "p.png").width == 4 * 324 - 4  # image | truth | a | b
    told = result(tmp_path / "a")["columns"]["source only"]  # the number of the run itself
    assert scores["a/last"]["iou"] == pytest.approx(told["iou"], nan_ok=True)


def test_world_split_size_scales_and_mirror_image_count(inside):
    for world in (0, 1):
        checkpoint(f"{world}.pt", "toy", toy_world=world)
    scores = [table("0.pt")["0"], table("1.pt")["1"], table("0.pt", "--split", "train")["0"],
              table("0.pt", "--size", "48x96")["0"], table("0.pt", "--scales", "1.5")["0"],
              table("0.pt", "--flip")["0"]]
    assert len({one["miou"] for one in scores}) == len(scores)
    assert len({tuple(map(tuple, one["share"].values())) for one in scores}) == len(scores)
    again = table("0.pt", "1.pt", "--scales", "1.0")
    assert again["0"] == scores[0] and again["1"] == scores[1]  # each its own world


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_panel_shows_the_truth_of_the_split_that_has_one(inside, split):
    write_cityscapes(inside, splits=(split,), count=2)
    checkpoint("a.pt", "synthia")
    assert table("a.pt", "--data-root", ".", "--split", split, "--panel", "p.png")["a"]["miou"] > 0
    assert Image.open("p.png").width == 3 * 324 - 4  # image | truth | a


def test_networks_of_the_methods_own_files_are_rebuilt(inside, monkeypatch):
    checkpoint("proda.pt", "toy", cpsl.ProDANetwork, "cpsl")
    assert table("proda.pt")["proda"]["miou"] > 0
    checkpoint("plain.pt", "toy", method="cpsl")
    assert isinstance(evaluate.load_checkpoint(Path("plain.pt"), "cpu")[1], common.DeepLabV2)
    for network in ("sinkhorn", "argparse", "Nowhere"):
        torch.save({**load("plain.pt"), "network": network}, "odd.pt")
        assert "odd.pt" in refusal("odd.pt")
    Path("lurking.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(inside)
    torch.save({**load("plain.pt"), "method": "lurking", "network": "Net"}, "odd.pt")
    assert "odd.pt" in refusal("odd.pt")  # only the methods' own files are imported


def test_export_speaks_cityscapes(inside):
    """The exported files, scored from scratch with Cityscapes ids, give the table's numbers."""
    write_cityscapes(inside, splits=("val",))
    model = checkpoint("synthia.pt")
    scores = table("synthia.pt", "--data-root", ".", "--export", "out")["synthia"]
    names = [f"{city}_{i:06d}_000019" for city in ("aachen", "bonn") for i in range(3)]
    assert {p.name for p in Path("out/labelIds").iterdir()} == {f"{n}_pred_labelIds.png" for n in names}
    assert {p.name for p in Path("out/color").iterdir()} == {f"{n}_pred_color.png" for n in names}
    official = common.label_ids(common.SYNTHIA_16)
    pairs = [(picture(f"out/labelIds/{name}_pred_labelIds.png"),
              picture(f"cityscapes/gtFine/val/{name.split('_')[0]}/{name}_gtFine_labelIds.png")) for name in names]
    assert all(ids.shape == truth.shape == (64, 128) and set(np.unique(ids)) <= set(official) for ids, truth in pairs)
    predicted, truth = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    predicted, truth = predicted[truth > 6], truth[truth > 6]
    for name, index in zip(common.SYNTHIA_16, official):
        union = ((predicted == index) | (truth == index)).sum()
        hit = ((predicted == index) & (truth == index)).sum()
        assert scores["iou"][name] == (pytest.approx(100 * hit / union) if union else None)

    item = common.Cityscapes(inside, "val", size=(32, 64), classes=common.SYNTHIA_16)[0]
    task = evaluate.argparse.Namespace(device="cpu", precision="fp32")
    prediction = common.predict(model, common.normalise(item["image"][None]), (64, 128), task).argmax(1)[0]
    agreed = (picture(f"out/color/{names[0]}_pred_color.png") == common.palette(common.SYNTHIA_16)[prediction]).all(2)
    assert agreed.mean() == 1 if DEVICE == "cpu" else agreed.mean() > 0.99


def test_several_checkpoints_and_equal_file_names_never_overwrite_each_other(inside, capsys):
    write_cityscapes(inside, splits=("val",), count=1)
    for kind, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):  # as IDD-like data have it
        for city in ("aachen", "bonn"):
            [path] = Path(f"cityscapes/{kind}/val/{city}").iterdir()
            path.rename(path.with_name(f"frame_{ending}.png"))
    for source in ("synthia", "gta5"):
        checkpoint(f"{source}.pt", source)
    evaluate.main(["synthia.pt", "gta5.pt", "--data-root", ".", "--export", "out"])
    assert {p.name for p in Path("out").iterdir()} == {"synthia", "gta5"}
    assert all(len(list(Path(f"out/{source}/{kind}").iterdir())) == 2
               for source in ("synthia", "gta5") for kind in ("labelIds", "color"))
    [terrain] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("terrain")]
    assert terrain.split()[1] == "-"  # classes of both tasks, a dash where a model has none


def test_pictures_of_ones_own(inside):
    """No labels, no data root, any size and either format: three PNGs at the picture's own size."""
    model = checkpoint("a.pt", "toy")
    rng = np.random.default_rng(0)
    (inside / "album/deep").mkdir(parents=True)
    pixels = np.kron(rng.integers(0, 255, (5, 7, 3)), np.ones((20, 20, 1))).astype(np.uint8)
    Image.fromarray(pixels[:99, :133]).save("holiday.JPG", quality=95)
    Image.fromarray(pixels).save("album/street.PNG")
    Image.fromarray(pixels[:80]).save("album/deep/street.png")  # the same name in another folder
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held on its side
    Image.fromarray(pixels).save("album/deep/turned.JPEG", exif=turned)
    Path("album/notes.txt").write_text("no picture")
    Path("album/._street.png").write_bytes(b"what macOS leaves beside a file")
    evaluate.main(["a.pt", "--images", "holiday.JPG", "album", "album/street.PNG", "--panel", "panel.png"])
    sizes = {"holiday": (133, 99), "album-street.PNG": (140, 100), "album-deep-street.png": (140, 80),
             "turned": (100, 140)}
    for kind, suffix in (("labelIds", "pred_labelIds"), ("color", "pred_color"), ("overlay", "overlay")):
        files = {path.name: Image.open(path).size for path in Path("predictions", kind).iterdir()}
        assert files == {f"{name}_{suffix}.png": size for name, size in sizes.items()}
    ids, colour, overlay = (picture(f"predictions/{kind}/holiday_{suffix}.png").astype(int) for kind, suffix in (
        ("labelIds", "pred_labelIds"), ("color", "pred_color"), ("overlay", "overlay")))
    assert np.abs(overlay - (picture("holiday.JPG").astype(int) + colour) / 2).max() <= 1
    known = dict(zip(common.label_ids(common.SYNTHIA_16), common.palette(common.SYNTHIA_16)))
    assert all(np.array_equal(colour[y, x], known[ids[y, x]]) for y, x in ((0, 0), (50, 70), (98, 132)))
    assert Image.open("panel.png").width == 2 * 324 - 4  # image | prediction

    # The same scene as a validation picture gives what scoring it gives; averaging over scales does not.
    common.to_picture(common.ToyStreets("target", "val", (32, 64), images=12)[2]["image"]).save("scene.png")
    evaluate.main(["a.pt", "--images", "scene.png", "--export", "one"])
    evaluate.main(["a.pt", "--images", "scene.png", "--export", "mean", "--flip", "--scales", "1.5", "2"])
    evaluate.main(["a.pt", "--images", "scene.png", "--export", "large", "--size", "48x96"])
    evaluate.main(["a.pt", "--export", "all"])
    one, mean, large, scored = (picture(f"{path}_pred_labelIds.png") for path in (
        "one/labelIds/scene", "mean/labelIds/scene", "large/labelIds/scene", "all/labelIds/toy_target_val_0002"))
    assert (one == scored).mean() > 0.999 > max((one == mean).mean(), (one == large).mean())
    Image.open("scene.png").crop((0, 0, 32, 32)).save("square.png")  # goes into the network as a square
    task = evaluate.argparse.Namespace(device="cpu", precision="fp32")
    for side in (32, 48):
        evaluate.main(["a.pt", "--images", "square.png", "--export", "one", "--size", f"{side}x{2 * side}"])
        image = common.make_item(Image.open("square.png"), None, "", (side, side), None)["image"][None]
        prob = common.predict(model, common.normalise(image), (side, side), task)
        label = torch.nn.functional.interpolate(prob, size=(32, 32), mode="bilinear")[0].argmax(0)
        told = picture("one/color/square_pred_color.png") == common.palette(common.SYNTHIA_16)[label]
        assert told.all(2).mean() > 0.99
    Path("empty").mkdir()
    for wrong, word in (("nowhere", "nowhere"), ("album/notes.txt", "notes.txt"), ("empty", "no picture found")):
        assert word in refusal("a.pt", "--images", wrong)


def test_label_ids_are_those_of_the_official_scripts():
    labels = pytest.importorskip(
        "cityscapesscripts.helpers.labels", reason="the official cityscapesScripts are not installed"
    )
    ids = {label.name: label.id for label in labels.labels}
    assert [ids[name] for name in common.CLASSES] == common.label_ids(common.CLASSES)


def test_the_official_evaluator_gives_our_numbers(inside):
    """`pip install cityscapesscripts` for this check only: their tool on our export, to the last digit."""
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
                                   reason="the official cityscapesScripts are not installed")
    write_cityscapes(inside, splits=("val",))
    checkpoint("gta5.pt", "gta5")
    ours = table("gta5.pt", "--data-root", ".", "--export", "out")["gta5"]["iou"]
    predictions = sorted(map(str, Path("out/labelIds").iterdir()))
    truths = sorted(map(str, Path("cityscapes/gtFine/val").rglob("*_labelIds.png")))
    official.args.evalInstLevelScore, official.args.JSONOutput, official.args.quiet = False, False, True
    theirs = official.evaluateImgLists(predictions, truths, official.args)["classScores"]
    assert sum(bool(value) for value in ours.values()) >= 2  # several classes are hit
    for name, value in ours.items():
        assert np.isnan(theirs[name]) if value is None else value == pytest.approx(100 * theirs[name], abs=1e-9)


def test_a_target_without_labels_and_labels_without_classes(inside, capsys):
    write_cityscapes(inside, splits=("val",), count=1)
    checkpoint("synthia.pt")
    for path in Path("cityscapes/gtFine").rglob("*.png"):
        Image.fromarray(np.full((64, 128), 255, np.uint8)).save(path)
    scores = table("synthia.pt", "--data-root", ".")["synthia"]
    assert scores["miou"] is None and "NaN" not in Path("t.json").read_text()
    [miou] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mIoU  ")]
    assert miou.split() == ["mIoU", "-"]
    Path("cityscapes/gtFine").rename("elsewhere")
    line = refusal("synthia.pt", "--data-root", ".")
    assert "gtFine" in line and "--images" in line
    evaluate.main(["synthia.pt", "--images", "cityscapes/leftImg8bit/val"])
    assert len(list(Path("predictions/color").iterdir())) == 2
    assert "--images" not in refusal("synthia.pt", "--data-root", "elsewhere")  # there are no pictures either


def test_bad_input_is_one_line(inside, capsys):
    Path("noise.pt").write_bytes(b"noise")
    torch.save({"weights": torch.zeros(1)}, "foreign.pt")
    torch.save(torch.zeros(1), "tensor.pt")
    for name in ("noise.pt", "foreign.pt", "tensor.pt", "missing.pt"):
        assert name in refusal(name)
    checkpoint("synthia.pt")
    checkpoint("toy.pt", "toy")
    assert "--data-root" in refusal("synthia.pt")
    assert "one source" in refusal("synthia.pt", "toy.pt", "--panel", "p.png")
    saved = load("toy.pt")
    saved["model"] = {key: value * float("nan") if value.is_floating_point() else value
                      for key, value in saved["model"].items()}
    torch.save(saved, "nan.pt")
    assert "nan.pt" in refusal("nan.pt")
    Path("file").write_text("")
    for flag, path in (("--json", "file/t.json"), ("--panel", "file/p.png"), ("--export", "file/out")):
        assert "file" in refusal("toy.pt", flag, path)
    for arguments, word in (([], "either"), (["toy.pt", "--against", "run"], "--against needs"),
                            (["toy.pt", "--scales", "0"], "above 0"), (["toy.pt", "--panel", "p.jpg"], ".png"),
                            (["--summary", "run", "--panel", "p.png"], "no effect"),
                            (["toy.pt", "--images", "p.png", "--json", "t.json"], "no effect")):
        with pytest.raises(SystemExit):
            evaluate.main(arguments)
        assert word in capsys.readouterr().err


TASK = {"source": "toy", "toy_images": 400, "backbone": "resnet14", "size": [80, 160]}


def write_run(folder, world, seed, own, meters=None, **columns):
    """The files of a finished run. columns: {title: scores}; own: the title of its own result."""
    common.write_json(folder / "args.json", {**TASK, "toy_world": world, "seed": seed})
    common.write_json(folder / "result.json", {**columns[own], "own": own, "columns": columns, "meters": meters or {},
                                               "seconds": 100 + world, "peak_memory_gb": 1 + seed / 10})
    return str(folder)


def test_summary_over_worlds_and_seeds(inside):
    folders = []
    for world, seed, source, miou in ((0, 0, 30.0, 40.0), (3, 0, 32.0, 44.0), (3, 1, 34.0, 42.0)):
        start = {"miou": source, "miou13": source + 1}  # both methods start from the same source-only model
        for own, score in (("DRSL", miou), ("LSE", miou - 10)):
            folders.append(write_run(inside / f"{own}{world}{seed}", world, seed, own, **{
                "source only": start, own: {"miou": score, "rare": score / 2 if own == "DRSL" else None}}))
    title, _, header, _, source, drsl, lse = evaluate.summary(list(map(Path, folders))).splitlines()
    assert "2 worlds, 2 seeds" in title
    assert header == "| | runs | " + " | ".join(MEANS) + " | seconds | GB |"
    assert source == "| source only | 3 | 32.0 ± 2.0 | 33.0 ± 2.0 | - | - | - | - | - |"
    assert drsl == "| DRSL | 3 | 42.0 ± 2.0 | - | 21.0 ± 1.0 | - | - | 102 | 1.1 |"
    assert lse == "| LSE | 3 | 32.0 ± 2.0 | - | - | - | - | 102 | 1.1 |"
    one = evaluate.summary([Path(folders[0])]).splitlines()
    assert "1 world, 1 seed." in one[0] and one[-1].startswith("| DRSL | 1 | 40.0 | - | 20.0 |")
    write_run(inside / "none", 5, 0, "DRSL", DRSL={"miou": None})
    assert evaluate.summary([inside / "none"]).splitlines()[-1].startswith("| DRSL | 1 | - |")
    write_run(inside / "twice", 3, 1, "CPSL", **{"source only": {"miou": 33.0}, "CPSL": {"miou": 33.0}})
    assert "world 3, seed 1" in refusal("--summary", *folders, "twice")  # two source-only models
    assert "result.json" in refusal("--summary", folders[0], "gone")
    common.write_json(inside / "twice/args.json", {**TASK, "toy_world": 0, "seed": 0, "backbone": "vgg16"})
    assert "another task than" in refusal("--summary", *folders, "twice")
    common.write_json(inside / "twice/result.json", {})
    assert "not the folder of a finished run" in refusal("--summary", "twice")


def test_bound_of_the_t_test():
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 7: 2.365, 10: 2.228, 30: 2.042, 1000: 1.962}
    assert {n: evaluate.t_bound(n) for n in known} == pytest.approx(known, abs=6e-4)


def test_differences_are_paired_by_world_and_seed(inside):
    """Bold exactly where |difference| exceeds the bound, 4.303 standard errors of three pairs, whatever its sign."""
    pairs, sides = ((0, 0), (3, 0), (3, 1)), {"a": [], "b": []}
    wobble, zero = np.array([-1.0, 0.0, 1.0]), np.zeros(3)  # of which the standard error is 1 / sqrt(3)
    values = {"miou": (45 + 2 * wobble, 40 + wobble), "rare": (20 + zero + 4.31 / 3 ** 0.5, 20 + wobble),
              "miou13": (20 + zero - 4.31 / 3 ** 0.5, 20 + wobble),
              "histogram_distance": (5 + zero + 4.29 / 3 ** 0.5, 5 + wobble)}
    for i, (world, seed) in enumerate(pairs):
        for k, side in enumerate(sides):
            scores = {key: both[k][i] for key, both in values.items()}
            sides[side].append(write_run(inside / f"{side}-{world}{seed}", world, seed, "X", X=scores, meters={
                "noise": float(i), **({} if k else {"modes": 2.0})}))
    b = sides["b"][::-1] + [write_run(inside / "b-9", 9, 0, "X", X={"miou": 90.0})]  # order and surplus do not matter
    title, _, header, _, *rows = evaluate.differences(list(map(Path, sides["a"])), list(map(Path, b))).splitlines()
    assert "2 worlds, 2 seeds" in title and "3 pairs" in title and "Bold" in title and "4.30 standard errors" in title
    assert title.endswith(" mIoU in each world/seed: 0/0 +4.0, 3/0 +5.0, 3/1 +6.0.")
    assert header == "| | runs | a | b | difference |"
    assert rows == ["| mIoU | 3 | 45.00 | 40.00 | **+5.00 ± 0.58** |",
                    "| mIoU, 13 | 3 | 17.51 | 20.00 | **-2.49 ± 0.58** |",
                    "| mIoU, rare | 3 | 22.49 | 20.00 | **+2.49 ± 0.58** |",
                    "| histogram distance % | 3 | 7.48 | 5.00 | +2.48 ± 0.58 |",
                    "| noise | 3 | 1.00 | 1.00 | +0.00 ± 0.00 |"]  # `modes` is not known for both sides
    one = evaluate.differences([Path("a-00")], [Path("b-00")]).splitlines()
    assert one[-1] == "| noise | 1 | 0.00 | 0.00 | +0.00 |"
    assert "1 world, 1 seed" in one[0] and "Bold" not in one[0] and "each" not in one[0]
    assert "in common" in refusal("--summary", "a-00", "--against", "b-31")  # another seed of another world
    assert "in common" in refusal("--summary", "a-30", "--against", "b-31")
    assert "twice" in refusal("--summary", "a-00", "a-00", "--against", "b-00")


def test_titles_are_short_and_distinct():
    titles = lambda *names: evaluate.titles_of([Path(name) for name in names])
    assert titles("runs/x/last.pt", "runs/y/last.pt") == ["x/last", "y/last"]
    assert titles("x/best.pt", "y/other.pt") == ["best", "other"]
    assert titles("a/b/last.pt", "c/b/last.pt") == ["a/b/last", "c/b/last"]
    assert titles("runs/x/last.pt") == ["x/last"] and titles("last.pt") == ["last"]
    assert titles("a.pt", "a.pth") == ["a.pt", "a.pth"]
