"""evaluate.py as a user runs it: tables, exports, panels, and the checks of its input."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import DEVICE, PROJECT, TINY, load, result, run
from trees import write_cityscapes, write_synthia

import common
import drsl
import evaluate

EXPORT = ["--export", "out", "--precision", "fp32", "--json", "t.json"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    for name, seed in (("a", 0), ("b", 1)):
        run(folder, "source_only.py", *TINY, "--iterations", 2, "--seed", seed, "--out", name)
    return folder


def real_checkpoint(folder, source="synthia"):
    """A random network saved as a checkpoint of a real task."""
    torch.manual_seed(0)
    classes = common.task_classes(source)
    model = common.DeepLabV2(len(classes), "resnet18")
    torch.save(
        {"method": "source_only", "source": source, "toy_world": 0, "toy_images": 400, "backbone": "resnet18",
         "size": [32, 64], "classes": list(classes), "network": "deeplab", "step": 4, "iterations": 4,
         "model": model.state_dict()},
        folder / f"{source}.pt",
    )
    return model


def test_table_json_and_panel(toy):
    out = run(toy, "evaluate.py", "a/last.pt", "b/last.pt", "--json", "t.json", "--panel", "p.png")
    table = json.loads((toy / "t.json").read_text())
    assert list(table) == ["a/last", "b/last"] and len(table["a/last"]["iou"]) == 16
    header, *rows = [line for line in out.splitlines() if line.strip()]
    assert header.split() == ["a/last", "b/last"] and rows[0].startswith("road")
    assert rows[-2].startswith("histogram distance %") and rows[-1].startswith("recall, rare looks")
    assert rows[16].split() == ["mIoU", f"{table['a/last']['miou']:.1f}", f"{table['b/last']['miou']:.1f}"]
    assert Image.open(toy / "p.png").width == 4 * 324 - 4  # image | truth | a | b
    written = json.loads((toy / "a/result.json").read_text())["columns"]["source only"]
    assert table["a/last"]["iou"] == pytest.approx(written["iou"], nan_ok=True)  # the number of the run itself
    assert (
        result(toy / "a")["miou"] == pytest.approx(table["a/last"]["miou"])
        and result(toy / "a")["own"] == "source only"
    )


def test_other_worlds_and_splits(toy, tmp_path):
    """A checkpoint remembers its world; the train split is scored with labels that training never opened."""
    run(tmp_path, "source_only.py", *TINY, "--toy-world", 1, "--iterations", 2, "--out", "w")
    for split in ("val", "train"):
        run(tmp_path, "evaluate.py", "w/last.pt", "--precision", "fp32", "--split", split, "--flip",
            "--json", f"{split}.json")
    run(tmp_path, "evaluate.py", "w/last.pt", "--json", "plain.json")
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
    run(tmp_path, "evaluate.py", "synthia.pt", "--data-root", tmp_path, *EXPORT)
    names = [f"{city}_{i:06d}_000019" for city in ("aachen", "bonn") for i in range(3)]
    assert {p.name for p in (tmp_path / "out/labelIds").iterdir()} == {f"{n}_pred_labelIds.png" for n in names}
    assert {p.name for p in (tmp_path / "out/color").iterdir()} == {f"{n}_pred_color.png" for n in names}

    # The exported files, scored from scratch with Cityscapes ids, give the table's numbers.
    table = json.loads((tmp_path / "t.json").read_text())["synthia"]
    pairs = []
    for name in names:
        ids = np.array(Image.open(tmp_path / f"out/labelIds/{name}_pred_labelIds.png"))
        truth = np.array(
            Image.open(tmp_path / f"cityscapes/gtFine/val/{name.split('_')[0]}/{name}_gtFine_labelIds.png")
        )
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
    prediction = common.predict(
        model, item["image"][None], (64, 128), argparse.Namespace(device="cpu", precision="fp32")
    ).argmax(1)[0]
    colours = np.array(Image.open(tmp_path / f"out/color/{names[0]}_pred_color.png"))
    agreed = (colours == common.palette(common.SYNTHIA_16)[prediction.numpy()]).all(2).mean()
    assert agreed == 1 if DEVICE == "cpu" else agreed > 0.99


def test_several_checkpoints_export_into_folders_of_their_own(tmp_path):
    write_cityscapes(tmp_path, splits=("val",), count=1)
    for source in ("synthia", "gta5"):
        real_checkpoint(tmp_path, source)
    out = run(tmp_path, "evaluate.py", "synthia.pt", "gta5.pt", "--data-root", tmp_path, "--export", "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"synthia", "gta5"}
    assert "terrain" in out  # classes of both tasks, a dash where a model has none


def test_pictures_of_ones_own(toy, tmp_path):
    """No labels, no data root, any size and either format: three PNGs at the picture's own size."""
    rng = np.random.default_rng(0)
    (tmp_path / "album/deep").mkdir(parents=True)
    pixels = np.kron(rng.integers(0, 255, (5, 7, 3)), np.ones((20, 20, 1))).astype(np.uint8)
    Image.fromarray(pixels[:99, :133]).save(tmp_path / "holiday.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "album/street.PNG")
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held on its side
    Image.fromarray(pixels).save(tmp_path / "album/deep/turned.jpeg", exif=turned)
    (tmp_path / "album/notes.txt").write_text("no picture")
    out = run(tmp_path, "evaluate.py", toy / "a/last.pt", "--images", "holiday.jpg", "album",
              "--panel", "panel.png")
    assert "3 pictures" in out
    sizes = {"holiday": (133, 99), "street": (140, 100), "turned": (100, 140)}
    for kind, suffix in (("labelIds", "pred_labelIds"), ("color", "pred_color"), ("overlay", "overlay")):
        folder = tmp_path / "predictions" / kind
        assert {path.name for path in folder.iterdir()} == {f"{name}_{suffix}.png" for name in sizes}
        assert all(Image.open(folder / f"{name}_{suffix}.png").size == size for name, size in sizes.items())
    ids = np.array(Image.open(tmp_path / "predictions/labelIds/holiday_pred_labelIds.png"))
    assert set(np.unique(ids)) <= set(common.label_ids(common.SYNTHIA_16))
    colour = np.array(Image.open(tmp_path / "predictions/color/holiday_pred_color.png")).astype(int)
    overlay = np.array(Image.open(tmp_path / "predictions/overlay/holiday_overlay.png")).astype(int)
    picture = np.array(Image.open(tmp_path / "holiday.jpg")).astype(int)
    assert np.abs(overlay - (picture + colour) / 2).max() <= 1
    table = dict(zip(common.label_ids(common.SYNTHIA_16), common.palette(common.SYNTHIA_16)))
    assert all(np.array_equal(colour[y, x], table[ids[y, x]]) for y, x in ((0, 0), (50, 70), (98, 132)))
    assert Image.open(tmp_path / "panel.png").width == 2 * 324 - 4  # image | prediction
    # The same scene as a validation picture gives what scoring it gives.
    item = common.ToyStreets("target", "val", (32, 64), images=12)[2]
    common.to_picture(item["image"]).save(tmp_path / "scene.png")
    same = ["--precision", "fp32"]
    run(tmp_path, "evaluate.py", toy / "a/last.pt", "--images", "scene.png", "--export", "one", *same)
    run(tmp_path, "evaluate.py", toy / "a/last.pt", "--export", "all", *same)
    one, scored = (
        np.array(Image.open(tmp_path / path))
        for path in ("one/labelIds/scene_pred_labelIds.png", "all/labelIds/toy_target_val_0002_pred_labelIds.png")
    )
    assert (one == scored).mean() > 0.999
    run(tmp_path, "evaluate.py", toy / "a/last.pt", "--images", "scene.png", "--export", "mean", *same, "--flip",
        "--scales", 1.5, 2)
    averaged = np.array(Image.open(tmp_path / "mean/labelIds/scene_pred_labelIds.png"))
    assert 0.1 < (one == averaged).mean() < 0.999
    for wrong, word in (("nowhere", "nowhere"), (".stdout", ".stdout"), ("predictions/empty", "no picture found")):
        (tmp_path / "predictions/empty").mkdir(exist_ok=True)
        assert word in run(tmp_path, "evaluate.py", toy / "a/last.pt", "--images", wrong, ok=False)


def test_label_ids_are_those_of_the_official_scripts():
    labels = pytest.importorskip(
        "cityscapesscripts.helpers.labels", reason="the official cityscapesScripts are not installed"
    )
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
    checkpoint = load(tmp_path / "gta5.pt")
    torch.save({**checkpoint, "model": model.state_dict()}, tmp_path / "gta5.pt")
    run(tmp_path, "evaluate.py", "gta5.pt", "--data-root", tmp_path, *EXPORT)
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
    assert "above 0" in run(tmp_path, "evaluate.py", "synthia.pt", "--scales", 0, ok=False)
    saved = load(toy / "a/last.pt")
    torch.save({**saved, "model": {key: value * float("nan") if value.is_floating_point() else value
                                   for key, value in saved["model"].items()}}, tmp_path / "nan.pt")
    assert "nan.pt: holds weights that are not finite" in run(tmp_path, "evaluate.py", "nan.pt", ok=False)
    torch.save({**saved, "size": ["x"], "classes": 3}, tmp_path / "odd.pt")
    assert "odd.pt: not a checkpoint of this project (no proper classes, size in it)" in run(
        tmp_path, "evaluate.py", "odd.pt", ok=False
    )
    (tmp_path / "file").write_text("")
    for flag, path in (("--json", "file/t.json"), ("--panel", "file/p.png"), ("--export", "file/out"),
                       ("--export", "file")):
        assert "file" in run(tmp_path, "evaluate.py", toy / "a/last.pt", flag, path, ok=False)
    assert ".png" in run(tmp_path, "evaluate.py", "synthia.pt", "--panel", "picture", ok=False)


METHODS = {"scale_invariant": ["--rounds", 1, "--patches", 1, "--portion", 2], "cpsl": ["--bank", 64],
           "sdca": ["--no-ssl"], "drsl": ["--rounds", 1, "--head-iterations", 2, "--joint-iterations", 1]}


@pytest.fixture(scope="module")
def adapted(start, tmp_path_factory):
    """A folder with a tiny run of every method, all from one source-only model that predicts many classes."""
    folder = tmp_path_factory.mktemp("adapted")
    checkpoint = load(start)
    rng = torch.Generator().manual_seed(0)
    for key, value in checkpoint["model"].items():
        if key.startswith("classifier") and key.endswith("weight"):
            value.normal_(std=0.05, generator=rng)
    torch.save(checkpoint, folder / "start.pt")
    few = [*TINY, "--toy-images", 12, "--precision", "fp32", "--iterations", 2, "--ramp", 0, "--lr", 0.01]
    for method, flags in METHODS.items():
        run(folder, f"{method}.py", *few, "--init", "start.pt", "--out", method, *flags)
    return folder


def draw(adapted, tmp_path, monkeypatch, method):
    """Draws in this process. Returns the file, the texts on it, and titles and rows where it is a panel."""
    texts, panels, write, panel = [], [], evaluate.write_text, common.draw_panel
    monkeypatch.setattr(evaluate, "write_text", lambda pen, xy, text, *rest: texts.append(text) or write(
        pen, xy, text, *rest))
    monkeypatch.setattr(common, "draw_panel", lambda file, titles, rows, width: panels.append((titles, rows)) or panel(
        file, titles, rows, width))
    path = adapted / method / "last.pt"
    checkpoint = common.read_checkpoint(path)
    args = argparse.Namespace(source="toy", toy_world=0, toy_images=12, size=(32, 64), device="cpu", precision="fp32",
                              workers=0)
    model = common.unpack_model(checkpoint, path).eval()
    evaluate.IDEAS[method](tmp_path / "idea.png", path, checkpoint, model, args)
    return tmp_path / "idea.png", texts, *(panels or [(None, None)])[0]


def validation():
    return common.ToyStreets("target", "val", (32, 64), images=12)  # six pictures


def labels_of(picture):
    """The class indices of a picture in the official colours, 255 where it is black."""
    table = {tuple(colour): index for index, colour in enumerate(common.palette(common.SYNTHIA_16).tolist()[:16])}
    return np.array([[table.get(tuple(pixel), 255) for pixel in line] for line in np.array(picture).tolist()])


def test_every_method_has_a_figure_and_source_only_has_none(adapted, tmp_path):
    for method in METHODS:
        out = run(tmp_path, "evaluate.py", adapted / method / "last.pt", "--idea", f"{method}.png")
        assert out == "" and 860 < Image.open(tmp_path / f"{method}.png").width <= 900
        assert (tmp_path / f"{method}.png").stat().st_size < 200_000
    wrong = run(tmp_path, "evaluate.py", adapted / "start.pt", "--idea", "p.png", ok=False)
    assert "start.pt: a checkpoint of source_only" in wrong and all(method in wrong for method in METHODS)
    two = [adapted / "cpsl/last.pt", adapted / "sdca/last.pt"]
    assert "one checkpoint" in run(tmp_path, "evaluate.py", *two, "--idea", "p.png", ok=False)
    assert ".png" in run(tmp_path, "evaluate.py", two[0], "--idea", "p.jpg", ok=False)
    (tmp_path / "alone.pt").write_bytes((adapted / "cpsl/last.pt").read_bytes())
    assert "source_only.pt: no such file" in run(tmp_path, "evaluate.py", "alone.pt", "--idea", "p.png", ok=False)
    no_modes = run(tmp_path, "evaluate.py", adapted / "drsl/source_only.pt", "--idea", "p.png", ok=False)
    assert "no modes" in no_modes and not list(tmp_path.glob("p.*"))


def test_the_model_before_has_the_batch_norm_of_its_adaptation(adapted):
    """CPSL keeps its warm-up model, which is the source-only model with the batch norm settled."""
    path = adapted / "cpsl/last.pt"
    before = evaluate.model_before(path, common.read_checkpoint(path), argparse.Namespace(device="cpu")).state_dict()
    warm = load(adapted / "cpsl/warmup.pt")["model"]
    start = load(adapted / "start.pt")["model"]
    assert all(torch.equal(before[key], warm[key]) for key in warm if "num_batches" not in key)
    assert any(not torch.equal(before[key], start[key]) for key in start if "running_mean" in key)
    live = common.read_checkpoint(path)
    for value in live["model"].values():
        value += 1  # as if no norm had been frozen: the statistics stay the source's
    before = evaluate.model_before(path, live, argparse.Namespace(device="cpu")).state_dict()
    assert all(torch.equal(before[key], start[key]) for key in start)


def test_figure_of_lse(adapted, tmp_path, monkeypatch):
    _, _, titles, rows = draw(adapted, tmp_path, monkeypatch, "scale_invariant")
    thresholds = json.loads((adapted / "scale_invariant/pseudo_labels/round1/round.json").read_text())["thresholds"]
    path, data = adapted / "scale_invariant/last.pt", validation()
    after = common.unpack_model(common.read_checkpoint(path), path).eval()
    before = evaluate.model_before(path, common.read_checkpoint(path), argparse.Namespace(device="cpu"))
    probability = lambda model, image: torch.nn.functional.interpolate(
        model(image[None])[1], size=(32, 64), mode="bilinear", align_corners=True)[0].softmax(0).detach()
    pairs = [[], [], []]  # whole image, window before, window after
    for index in range(6):
        item = data[index]
        window = torch.nn.functional.interpolate(item["image"][None, :, 8:24, 16:48], size=(32, 64), mode="bilinear",
                                                 align_corners=True)[0]
        whole = probability(before, item["image"])
        enlarged = torch.nn.functional.interpolate(whole[None, :, 8:24, 16:48], size=(32, 64), mode="bilinear",
                                                   align_corners=True)[0]
        truth = np.kron(item["label"][8:24, 16:48], np.ones((2, 2), int))
        told = [enlarged.argmax(0).numpy(), *(probability(one, window).argmax(0).numpy() for one in (before, after))]
        for pair, prediction in zip(pairs, told):
            pair.append((prediction, truth))
        if index not in (0, 1, 2, 3, 5):
            continue
        row = rows[(0, 1, 2, 3, 5).index(index)]
        assert np.abs(np.array(row[0]).astype(int) - np.array(common.to_picture(window))).max() == 0
        for picture, expected in zip((row[1], row[3], row[4], row[5]), (*told, truth)):
            assert (labels_of(picture) == expected).mean() > 0.999
        entropy, label = -(whole * (whole + 1e-12).log()).sum(0).numpy(), whole.argmax(0).numpy()
        keep = np.zeros((32, 64), bool)
        for c in np.unique(label):
            E = entropy[label == c]
            keep[label == c] = (E - E.min()) / max(np.ptp(E), 1e-9) < thresholds[c]
        kept = np.where(np.kron(keep[8:24, 16:48], np.ones((2, 2), bool)), told[0], 255)
        assert (labels_of(row[2]) == kept).mean() > 0.99
    for title, pair in zip((titles[1], titles[3], titles[4]), pairs):
        predicted, truth = (np.concatenate([side[i].ravel() for side in pair]) for i in (0, 1))
        ious = [((predicted == c) & (truth == c)).sum() / ((predicted == c) | (truth == c)).sum()
                for c in np.unique(truth)]
        assert float(title.split()[-1]) == pytest.approx(100 * np.mean(ious), abs=0.06)
    assert (pairs[1][0][0] != pairs[2][0][0]).mean() > 0.1  # before and after differ


def test_figure_of_cpsl(adapted, tmp_path, monkeypatch):
    """The bars are as high as the shares that the table of these checkpoints holds."""
    file, texts, _, _ = draw(adapted, tmp_path, monkeypatch, "cpsl")
    run(tmp_path, "evaluate.py", adapted / "cpsl/warmup.pt", adapted / "cpsl/last.pt",
        "--precision", "fp32", "--json", "t.json")
    warm, own = json.loads((tmp_path / "t.json").read_text()).values()
    for title, scores in (("warm-up", warm), ("CPSL", own)):
        assert f"{title} (histogram distance {scores['histogram_distance']:.1f} %)" in texts
    true = {name: share for name, (_, share) in own["share"].items() if share > 0}
    names = sorted(true, key=lambda name: -true[name])
    assert [text.replace("\n", " ") for text in texts[-len(names):]] == names
    pixels = np.array(Image.open(file))[25:286]  # below the legend, to the bars' foot
    for i, name in enumerate(names):
        columns = pixels[:, round(50 + 850 * i / len(names)):round(50 + 850 * (i + 1) / len(names))]
        for colour, share in ((evaluate.DARK, true[name]), (evaluate.ORANGE, warm["share"][name][0]),
                              (evaluate.BLUE, own["share"][name][0])):
            height = (columns == colour).all(2).any(1).sum()
            assert height == pytest.approx(1 + 60 * max(0, np.log10(max(share, 1e-9) / 0.01)), abs=1.01), name
    assert sum(abs(warm["share"][name][0] - own["share"][name][0]) > 0.1 for name in names) > 3


def test_figure_of_sdca(adapted, tmp_path, monkeypatch):
    """Its numbers are the run's meters; its dots lie where cosines taken one by one say."""
    file, texts, _, _ = draw(adapted, tmp_path, monkeypatch, "sdca")
    meters, saved = result(adapted / "sdca")["meters"], common.read_checkpoint(adapted / "sdca/sdca.pt")
    for when in ("before", "after"):
        own, other = meters[f"own_feat_{when}"], meters[f"other_feat_{when}"]
        assert sum(text.startswith(f"{when}: own {own:.3f}, nearest other {other:.3f}; ") for text in texts) == 1
    assert abs(meters["own_feat_after"] - meters["own_feat_before"]) > 0.01
    mean, model = saved["feat"]["mean"].float(), common.unpack_model(saved, "sdca.pt").eval()
    near, points = {}, []
    for item in validation():
        with torch.no_grad():
            features = model(item["image"][None])[0][0]  # (D, 4, 8) and one more to either side
        label = common.grid_labels(item["label"][None], features.shape[1:])[0]
        for r, y in zip(features.flatten(1).T, label.flatten().tolist()):
            cosines = torch.nn.functional.cosine_similarity(r[None], mean, dim=1)
            own, other = cosines[y].item(), torch.cat([cosines[:y], cosines[y + 1:]]).max().item()
            near.setdefault(common.SYNTHIA_16[y], []).append(own > other)
            points.append((own, other))
    assert texts[-len(near):] and {text.rsplit(" ", 2)[0] for text in texts[-len(near):]} == set(near)
    for text in texts[-len(near):]:
        name, _, after = text.rsplit(" ", 2)
        assert float(after) == pytest.approx(100 * np.mean(near[name]), abs=0.51)
    pixels, low = np.array(Image.open(file)), float(texts[1])
    inside = [(505 + 390 * (other - low) / (1 - low), 30 + 390 * (1 - own) / (1 - low)) for own, other in points]
    inside = [(u, v) for u, v in inside if u > 507 and v < 418]
    assert len(points) < 3000 and len(inside) > 0.9 * len(points)
    assert all((pixels[round(v), round(u)] != 255).any() for u, v in inside)


def test_figure_of_drsl(adapted, tmp_path, monkeypatch):
    _, _, titles, rows = draw(adapted, tmp_path, monkeypatch, "drsl")
    assert titles == ["image", "building: looks", "building: modes", "car: looks", "car: modes"] and len(rows) == 5
    path, data = adapted / "drsl/last.pt", validation()
    checkpoint = common.read_checkpoint(path)
    model = common.unpack_model(checkpoint, path).eval()
    head = drsl.ModeHead(model.feature_dim, 16, 3, 64)
    head.load_state_dict(checkpoint["head"])
    R = torch.nn.functional.normalize(checkpoint["head"]["representatives"], dim=2)  # (C, K, E)
    tables, mixed, seen = {2: np.zeros((3, 3)), 12: np.zeros((3, 3))}, [], {}
    for index in range(6):
        item, looks, others = data[index], data.picture(index)[2], 1
        with torch.no_grad():
            e = head(model(item["image"][None])[0])  # (1, E, h, w)
        for c, table in tables.items():
            d2 = ((e[0][None] - R[c][:, :, None, None]) ** 2).sum(1)  # (K, h, w)
            modes = torch.nn.functional.interpolate(d2[None], size=(32, 64), mode="bilinear", align_corners=True)
            modes, mask = modes[0].argmin(0).numpy(), item["label"].numpy() == c
            np.add.at(table, (modes[mask], looks[mask]), 1)
            counts = np.bincount(looks[mask], minlength=3)
            others *= counts.sum() - counts.max()
            seen[index, c] = looks, modes, mask
        mixed.append(others)
    pictures = [np.array(common.to_picture(data[index]["image"])) for index in range(6)]
    chosen = [next(i for i, p in enumerate(pictures) if np.array_equal(p, np.array(row[0]))) for row in rows[:4]]
    assert [mixed[i] for i in chosen] == sorted(mixed, reverse=True)[:4]
    for index, row in zip(chosen, rows):
        for c, pair in ((2, row[1:3]), (12, row[3:5])):
            looks, modes, mask = seen[index, c]
            for picture, values, colours in zip(pair, (looks, modes), (evaluate.LOOKS, evaluate.MODES)):
                picture = np.array(picture)
                assert (picture[mask] == np.array(colours)[values[mask]]).all(1).mean() > 0.99  # a tie may fall
                assert (np.ptp(picture[~mask], axis=1) == 0).all()  # the rest is grey
    for table, picture in zip(tables.values(), (rows[4][2], rows[4][4])):
        bars = np.array(picture)[10::20]  # a line of every mode's bar
        for counts, bar, square in zip(table, bars, evaluate.MODES):
            assert (bar[:30] == square).all()
            for count, colour in zip(counts, evaluate.LOOKS):
                assert (bar == colour).all(1).sum() / 200 == pytest.approx(count / max(counts.sum(), 1), abs=0.01)


def test_figures_of_real_data(tmp_path):
    """No looks, pixels without a label, absent classes, sizes that differ: every method's figure is drawn."""
    write_cityscapes(tmp_path, splits=("val",), count=1)
    write_synthia(tmp_path)
    model, (data, folder) = real_checkpoint(tmp_path), (tmp_path, tmp_path / "run")
    torch.manual_seed(0)
    head, statistics = drsl.ModeHead(model.feature_dim, 16, 5, 8), {"mean": torch.rand(16, model.feature_dim)}
    for method in METHODS:
        saved = {**load(tmp_path / "synthia.pt"), "method": method}
        for name in ("source_only", "last", "sdca"):
            common.write_json(folder / "args.json", {"source_size": [48, 80], "raw_statistics": False})
            torch.save({**saved, "head": head.state_dict(), "feat": statistics}, folder / f"{name}.pt")
        common.write_json(folder / "pseudo_labels/round1/round.json", {"thresholds": [0.5] * 16})
        run(tmp_path, "evaluate.py", folder / "last.pt", "--data-root", data, "--idea", f"{method}.png")
    assert Image.open(tmp_path / "drsl.png").width == 3 * 300 - 4  # image | building: modes | car: modes


TASK = {"source": "toy", "toy_world": 0, "toy_images": 400, "backbone": "resnet14", "size": [80, 160]}


def test_summary_over_seeds(tmp_path):
    for i, (source, drsl) in enumerate([(30.0, 40.0), (32.0, 44.0), (34.0, 42.0)]):
        for method, own in (("DRSL", drsl), ("LSE", drsl - 10)):  # both start from the same source-only model
            folder = tmp_path / f"{method}{i}"
            folder.mkdir()
            columns = {"source only": {"miou": source, "miou13": source + 1}, method: {"miou": own, "rare": own / 2}}
            (folder / "result.json").write_text(
                json.dumps({"own": method, "columns": columns, "seconds": 100 + i, "peak_memory_gb": 1 + i / 10})
            )
            (folder / "args.json").write_text(json.dumps({**TASK, "seed": i}))
    folders = [f"{method}{i}" for method in ("DRSL", "LSE") for i in range(3)]
    header, _, source, drsl, lse = run(tmp_path, "evaluate.py", "--summary", *folders).splitlines()
    assert (
        header
        == "| | seeds | mIoU | mIoU, 13 | mIoU, rare | histogram distance % | recall, rare looks | seconds | GB |"
    )
    assert source == "| source only | 3 | 32.0 ± 2.0 | 33.0 ± 2.0 | - | - | - | - | - |"
    assert drsl == "| DRSL | 3 | 42.0 ± 2.0 | - | 21.0 ± 1.0 | - | - | 101 | 1.2 |" and lse.startswith(
        "| LSE | 3 | 32.0 ± 2.0 |"
    )
    (tmp_path / "LSE0/args.json").write_text(json.dumps({**TASK, "seed": 1}))  # now seed 1 has two source-only models
    assert "another result" in run(tmp_path, "evaluate.py", "--summary", *folders, ok=False)
    assert "result.json" in run(tmp_path, "evaluate.py", "--summary", "DRSL0", "gone", ok=False)
    assert "either" in run(tmp_path, "evaluate.py", ok=False)
    (tmp_path / "LSE2/args.json").write_text(json.dumps({**TASK, "seed": 2, "toy_world": 1}))
    other = run(tmp_path, "evaluate.py", "--summary", *folders, ok=False)
    assert "LSE2: another task than DRSL0, --toy-world 1" in other
    assert "no effect" in run(tmp_path, "evaluate.py", "--summary", *folders, "--panel", "p.png", ok=False)


def test_differences_are_paired_by_seed(tmp_path):
    for name, values in (("drsl", [40.0, 44.0, 42.0]), ("plain", [39.0, 41.0, 41.5])):
        for seed, value in enumerate(values):
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            meters = {"modes": 2.0 + seed} if name == "drsl" else {}
            (folder / "result.json").write_text(
                json.dumps(
                    {"own": name, "columns": {}, "seconds": 1, "peak_memory_gb": 1, "miou": value,
                     "rare": None if seed else 3.0, "meters": meters}
                )
            )
            (folder / "args.json").write_text(json.dumps({**TASK, "seed": seed}))
    a, b = ([f"{name}-{seed}" for seed in range(3)] for name in ("drsl", "plain"))
    header, _, row = run(tmp_path, "evaluate.py", "--summary", *a, "--against", *b).splitlines()
    assert header == "| | seeds | drsl | plain | difference ± standard error |"
    differences = np.array([1.0, 3.0, 0.5])  # the mean of `rare` and of `modes` is not known for both sides
    assert row == f"| mIoU | 3 | 42.00 | 40.50 | +1.50 ± {differences.std(ddof=1) / 3 ** 0.5:.2f} |"
    assert "no seed in common" in run(tmp_path, "evaluate.py", "--summary", a[0], "--against", b[1], ok=False)
    assert "twice" in run(tmp_path, "evaluate.py", "--summary", a[0], a[0], "--against", *b, ok=False)
    assert "--against" in run(tmp_path, "evaluate.py", "--against", *b, ok=False)


def test_titles_are_short_and_distinct():
    from pathlib import Path

    titles = lambda *names: evaluate.titles_of([Path(name) for name in names])
    assert titles("runs/x/last.pt", "runs/y/last.pt") == ["x/last", "y/last"]
    assert titles("x/best.pt", "y/other.pt") == ["best", "other"]
    assert titles("a/b/last.pt", "c/b/last.pt") == ["a/b/last", "c/b/last"]
    assert titles("runs/x/last.pt") == ["x/last"] and titles("last.pt") == ["last"]
    assert titles("a.pt", "a.pth") == ["a.pt", "a.pth"]


def test_every_help_answers_offline_and_leaves_nothing_behind(tmp_path):
    for script in sorted(p.name for p in PROJECT.glob("*.py")):
        assert "usage" in run(tmp_path, script, "--help")
    assert {path.name for path in tmp_path.iterdir()} == {".stdout", ".stderr"}  # what the test itself wrote
