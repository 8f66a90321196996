"""assets/figures.py and assets/tables.sh: what the pictures show follows the runs, what the script calls exists."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import PROJECT, load, result
from test_evaluate import TASK, train, write_run

sys.path.insert(0, str(PROJECT / "assets"))
import common
import cpsl
import drsl
import figures
import scale_invariant
import sdca
import source_only

ARGS = figures.parse_args(["flow", "--out", "x.png"])
RUNS = {"lse": (scale_invariant, "--rounds", 1, "--patches", 1, "--portion", 2), "cpsl": (cpsl, "--bank", 64),
        "sdca": (sdca, "--no-ssl"), "no_contrast": (sdca, "--no-ssl", "--lambda-feat", 0, "--lambda-out", 0),
        "drsl": (drsl, "--rounds", 1, "--head-iterations", 2, "--joint-iterations", 1)}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A folder with a tiny run of every method, all from one source-only model that predicts many classes."""
    folder = tmp_path_factory.mktemp("adapted")
    train(folder, source_only, "--iterations", 2, "--out", "source-0")
    start, rng = load(folder / "source-0/last.pt"), torch.Generator().manual_seed(0)
    for key, value in start["model"].items():
        if key.startswith("classifier") and key.endswith("weight"):
            value.normal_(std=0.05, generator=rng)
    torch.save(start, folder / "source-0/last.pt")
    few = ["--iterations", 2, "--ramp", 0, "--lr", 0.01, "--val-every", 1, "--init", "source-0/last.pt"]
    for name, (module, *flags) in RUNS.items():
        train(folder, module, *few, *flags, "--out", f"{name}-0")
    return folder


def draw(adapted, monkeypatch, *names):
    """The picture of an idea, the texts on it, and titles and rows where it is a panel."""
    texts, panels, write, grid = [], [], figures.write, figures.grid
    monkeypatch.setattr(figures, "write", lambda pen, xy, text, *rest, **more: texts.append(text) or write(
        pen, xy, text, *rest, **more))
    monkeypatch.setattr(figures, "grid", lambda titles, rows, *rest: panels.append((titles, rows)) or grid(
        titles, rows, *rest))
    picture = figures.draw_idea([adapted / f"{name}-0" for name in names], ARGS)
    assert 860 < picture.width <= 900
    return picture, texts, *(panels or [(None, None)])[0]


def opened(path):
    return common.unpack_model(common.read_checkpoint(path), path).eval()


def before(folder, file="last.pt"):
    return figures.model_before(folder, load(folder / file)["model"], "cpu")


def probability(model, image):
    """(C, 32, 64) of a picture uint8 (3, 32, 64), written out."""
    with torch.no_grad():
        logits = model(common.normalise(image[None]))[1]
    return torch.nn.functional.interpolate(logits, size=(32, 64), mode="bilinear", align_corners=True)[0].softmax(0)


def toy(split="val"):
    return common.ToyStreets("target", split, (32, 64), images=12, labelled=True)


def labels_of(picture):
    """The class indices of a picture in the official colours, 255 where it is black."""
    known = {tuple(colour): index for index, colour in enumerate(common.palette(common.SYNTHIA_16).tolist()[:16])}
    return np.array([[known.get(tuple(pixel), 255) for pixel in line] for line in np.array(picture).tolist()])


def mean_iou(pairs):
    predicted, truth = (np.concatenate([np.ravel(side[i]) for side in pairs]) for i in (0, 1))
    return 100 * np.mean([((predicted == c) & (truth == c)).sum() / ((predicted == c) | (truth == c)).sum()
                          for c in np.unique(truth)])


def shows(picture, colour):
    """Columns and rows at which a picture has a colour."""
    rows, columns = np.nonzero((np.array(picture) == colour).all(2))
    return columns, rows


# ======================================================= curves =======================================================


def write_log(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def step(stage, now, **values):
    return {"stage": stage, "step": now, **values, "seconds": 1.0}


def test_logged_curves_count_steps_through_the_stages():
    starts, curves = figures.logged_curves([
        step("source", "2/4", loss=4.0), step("source", "4/4", loss=3.0), step("round 1", "", kept=0.5, alone=1),
        step("adapt", "2/4", loss=9.0), step("adapt", "2/4", loss=2.0, lr=None), step("adapt oracle", "2/4", val=30.0),
        step("adapt", "4/4", loss=float("nan"), kept=0.7), step("adapt oracle", "4/4", val=31.0)])
    assert starts == {"source": 0, "adapt": 4}
    assert curves == {"loss": [(2, 4.0), (4, 3.0), (6, 2.0)], "kept": [(4, 0.5), (8, 0.7)],
                      "val": [(6, 30.0), (8, 31.0)]}
    starts, curves = figures.logged_curves([
        step("modes", "60/60", loss=5.0), step("joint", "20/240", loss=4.0), step("joint", "60/240", loss=3.0),
        step("adapt oracle", "60/240", val=30.0), step("adapt", "80/240", loss=2.0), step("labels", "80/240", val=31.0),
        step("adapt", "100/240", loss=1.0), step("adapt", "80/240", loss=2.5)])
    assert starts == {"modes": 0, "joint": 60, "adapt": 120, "labels": 140}
    assert curves == {"loss": [(60, 5.0), (80, 4.0), (120, 3.0), (140, 2.5), (160, 1.0)],
                      "val": [(120, 30.0), (140, 31.0)]}


def test_figure_of_curves(tmp_path):
    """One run: a panel per name, whose curve ends where the last value is; two runs: a column each, one scale."""
    write_log(tmp_path / "a", *(step("adapt", f"{n}/10", loss=10.0 - n, up=float(n)) for n in range(1, 11)))
    write_log(tmp_path / "b", *(step("adapt", f"{n}/10", loss=20.0 - n) for n in range(1, 11)))
    with open(tmp_path / "b/log.jsonl", "a") as file:
        file.write('{"stage": "adapt", "step": "1')  # a killed run's half line
    figures.main(["curves", str(tmp_path / "a"), "--out", str(tmp_path / "one.png")])
    x, y = shows(Image.open(tmp_path / "one.png"), (0, 0, 128))
    falls, rises = x < 308, x > 308
    assert (x[falls].max(), y[falls][x[falls].argmax()]) == (296, 134) and y[falls].min() == 44  # to the lower corner
    assert y[rises][x[rises].argmax()] == 44 and y[rises][x[rises].argmin()] == 134  # to the upper one
    x, y = shows(figures.draw_curves([tmp_path / "a", tmp_path / "b"]), (0, 0, 128))
    left, right = x < 450, x > 450
    at = lambda value: 44 + 90 * (19 - value) / 19  # both are drawn from 0 to 19
    for side, values in ((left, (9, 0)), (right, (19, 10))):
        own = y[side][y[side] < 140]
        assert own.min() == pytest.approx(at(values[0]), abs=1) and own.max() == pytest.approx(at(values[1]), abs=1)
    write_log(tmp_path / "empty")
    for folder, word in (("empty", "no curve"), ("gone", "log.jsonl")):
        with pytest.raises(common.InputError, match=word):
            figures.draw_curves([tmp_path / folder])


def write_steps(folder, world, base, own, values):
    """A finished run with validation lines at 10, 20, ... of two stages, and + BN target beside its own title."""
    half = len(values) // 2
    stages = [("adapt oracle", n) for n in range(1, half + 1)] + [("ssl oracle", n) for n in range(1, half + 1)]
    write_run(folder, world, world, own, **{"+ BN target": {"miou": base}, own: {"miou": values[-1]}})
    write_log(folder, step("adapt", "5/20", loss=1.0), *(step(stage, f"{10 * n}/{10 * half}", val_miou=value)
                                                         for (stage, n), value in zip(stages, values)))
    return folder


def test_figure_of_steps(tmp_path):
    """Means over worlds; the band: the error of the gain over + BN target of the same world; two horizontal lines."""
    folders = [write_steps(tmp_path / f"drsl-{w}", w, base, "DRSL", [base + 1, base + 2, base + gain, base + 5])
               for w, base, gain in ((0, 30.0, 2.0), (3, 34.0, 4.0))]
    folders += [write_steps(tmp_path / f"{name}-{w}", w, base, "LSE", [base, base]) for name in ("lse", "whole")
                for w, base in ((0, 30.0), (3, 34.0))]
    oracles = [Path(write_run(tmp_path / f"oracle-{w}", w, w, "oracle", oracle={"miou": miou}))
               for w, miou in ((0, 42.0), (3, 44.0))]
    for folder in oracles:
        write_log(folder, step("source", "5/20", loss=1.0))
    curves, levels, count = figures.curves_by_method([*folders, *oracles])
    assert curves["DRSL"] == [(10, 33, 0), (20, 34, 0), (30, 35, 1), (40, 37, 0)]
    assert set(curves) == {"DRSL", "LSE, lse", "LSE, whole"} and curves["LSE, lse"] == [(10, 32, 0), (20, 32, 0)]
    assert levels == {"+ BN target": 32, "oracle": 43} and count == "2 worlds, 2 seeds"

    assert figures.averaged([{10: 1.0, 20: 2.0}, {20: 4.0, 30: 9.0}], [0, 2]) == [(20, 3, 0)]  # where all are

    picture = figures.draw_steps([*folders[:2], *oracles])
    x, y = shows(picture, figures.COLOURS[0])
    x, y = x[x < 668], y[x < 668]  # without the name
    low, high, end = 31, 44, np.median(y[x == x.max()])  # 31: below + BN target, 44: above the oracle
    place = lambda value: 440 - 400 * (value - low) / (high - low)
    assert x.max() == pytest.approx(665, abs=4) and end == pytest.approx(place(37), abs=1)
    grey = (np.array(picture)[:, 46:660] == figures.GREY).all(2).sum(1)
    dashes = [line for line in range(picture.height) if grey[line] > 150]
    assert {round(line) for line in map(place, levels.values())} <= {line + d for line in dashes for d in (-1, 0, 1)}
    column = np.array(picture)[:, round(45 + 620 * 30 / 40)].astype(int)
    pale = [line for line in range(picture.height) if column[line, 2] > column[line, 0] + 15]  # the bluish band
    assert min(pale) == pytest.approx(place(36), abs=2) and max(pale) == pytest.approx(place(34), abs=2)

    with pytest.raises(common.InputError, match="second run"):
        figures.draw_steps([folders[0], write_steps(tmp_path / "other/drsl-0", 0, 30.0, "DRSL", [1.0, 2.0])])
    with pytest.raises(common.InputError, match="--val-every"):
        figures.draw_steps(oracles)


def test_names_beside_curves_stay_apart_and_in_order():
    places = [100.0, 101.0, 50.0, 102.0]
    moved = figures.apart(places, 36)
    assert sorted(range(4), key=moved.__getitem__) == sorted(range(4), key=places.__getitem__)
    assert np.diff(sorted(moved)).min() >= 36 and figures.apart([10.0, 90.0], 36) == [10, 90]


# ====================================================== pictures ======================================================


def test_the_model_before_has_the_batch_norm_of_its_adaptation(adapted):
    """CPSL keeps its warm-up model, which is the source-only model with the batch norm settled."""
    found, warm = before(adapted / "cpsl-0").state_dict(), load(adapted / "cpsl-0/warmup.pt")["model"]
    start = load(adapted / "source-0/last.pt")["model"]
    assert all(torch.equal(found[key], warm[key]) for key in warm if "num_batches" not in key)
    assert any(not torch.equal(found[key], start[key]) for key in start if "running_mean" in key)
    live = {key: value + 1 for key, value in load(adapted / "cpsl-0/last.pt")["model"].items()}
    found = figures.model_before(adapted / "cpsl-0", live, "cpu").state_dict()  # as if no norm had been frozen
    assert all(torch.equal(found[key], start[key]) for key in start)


def test_first_picture(adapted, tmp_path):
    """A column per run with its name and mIoU; every prediction is its model's; below, every class in its colour."""
    names = ("source", "lse", "drsl")
    figures.main(["panel", *(str(adapted / f"{name}-0") for name in names), "--out", str(tmp_path / "toy.png")])
    picture = np.array(Image.open(tmp_path / "toy.png"))
    assert picture.shape[1] == pytest.approx(1800, abs=8)
    column, top = 1804 // 5 - 4, None
    colours, data = common.palette(common.SYNTHIA_16), toy()
    first = np.array(Image.fromarray(colours[data[0]["label"]]).resize((column, column // 2), Image.Resampling.NEAREST))
    top = next(y for y in range(200) if np.array_equal(picture[y:y + column // 2, column + 4:2 * column + 4], first))
    for k, name in enumerate(names, 2):
        model = opened(adapted / f"{name}-0/last.pt")
        for line, index in enumerate((0, 1, 3, 5)):
            told = np.kron(probability(model, data[index]["image"]).argmax(0), np.ones((5, 5), int))[:160, :320]
            cell = picture[top + line * (column // 2 + 4):, k * (column + 4):][:column // 2, :column]
            shown = np.array(Image.fromarray(cell).resize((320, 160), Image.Resampling.NEAREST))
            assert (shown == colours[told]).all(2).mean() > 0.97
    for c in range(16):
        assert (picture[-72:] == colours[c]).all(2).sum() > 700
    other = tmp_path / "other"
    write_run(other, 1, 0, "X", X={"miou": 1.0})
    common.write_json(other / "args.json", {**common.read_json(adapted / "lse-0/args.json"), "toy_world": 1})
    with pytest.raises(common.InputError, match="one world"):
        figures.draw_panel([adapted / "lse-0", other], ARGS)


def test_figure_of_lse(adapted, monkeypatch):
    _, _, titles, rows = draw(adapted, monkeypatch, "lse")
    thresholds = json.loads((adapted / "lse-0/pseudo_labels/round1/round.json").read_text())["thresholds"]
    start, after, data = before(adapted / "lse-0"), opened(adapted / "lse-0/last.pt"), toy()
    pairs = [[], [], []]  # whole image, window before, window after
    enlarge = lambda maps: torch.nn.functional.interpolate(maps[None, :, 8:24, 16:48].float(), size=(32, 64),
                                                           mode="bilinear", align_corners=True)[0]
    for index in range(6):
        item = data[index]
        window = enlarge(item["image"]).round().byte()
        whole = probability(start, item["image"])
        truth = np.kron(item["label"][8:24, 16:48], np.ones((2, 2), int))
        maps = enlarge(whole), probability(start, window), probability(after, window)
        told = [one.argmax(0).numpy() for one in maps]
        for pair, prediction in zip(pairs, told):
            pair.append((prediction, truth))
        if index not in (0, 1, 2, 3, 5):
            continue
        row = rows[(0, 1, 2, 3, 5).index(index)]
        assert np.array_equal(row[0], common.to_picture(window))
        for picture, expected in zip((row[1], row[3], row[4], row[5]), (*told, truth)):
            assert (labels_of(picture) == expected).mean() > 0.995
        entropy, label = -(whole * (whole + 1e-12).log()).sum(0).numpy(), whole.argmax(0).numpy()
        keep = np.zeros((32, 64), bool)
        for c in np.unique(label):
            E = entropy[label == c]
            keep[label == c] = (E - E.min()) / max(np.ptp(E), 1e-9) < thresholds[c]
        kept = np.where(np.kron(keep[8:24, 16:48], np.ones((2, 2), bool)), told[0], 255)
        assert (labels_of(row[2]) == kept).mean() > 0.99
    for title, pair in zip((titles[1], titles[3], titles[4]), pairs):
        assert float(title.split()[-1]) == pytest.approx(mean_iou(pair), abs=0.06)
    assert (pairs[1][0][0] != pairs[2][0][0]).mean() > 0.1  # before and after differ


def test_figure_of_cpsl(adapted, monkeypatch):
    """P_ST, P_SL and their product, written out; what changed is green or red; r and the shares stand below."""
    _, texts, titles, rows = draw(adapted, monkeypatch, "cpsl")
    saved, data = load(adapted / "cpsl-0/last.pt"), toy("train")
    warm, momentum = opened(adapted / "cpsl-0/warmup.pt"), opened(adapted / "cpsl-0/last.pt")
    momentum.load_state_dict(saved["momentum"])
    c = torch.nn.functional.normalize(saved["momentum_head"]["prototypes"], dim=1)  # (K, D)
    pairs, changed, told = [[], [], []], [], []
    for item in data:
        p_st = probability(warm, item["image"])
        with torch.no_grad():
            features = torch.nn.functional.normalize(momentum(common.normalise(item["image"][None]))[0], dim=1)
        cosine = torch.nn.functional.interpolate(torch.einsum("ndhw,kd->nkhw", features, c), size=(32, 64),
                                                 mode="bilinear", align_corners=True)[0]
        p_sl = (cosine / 0.08).softmax(0)
        told.append([maps.argmax(0).numpy() for maps in (p_st, p_sl, p_st * p_sl)])
        for pair, label in zip(pairs, told[-1]):
            pair.append((label, item["label"].numpy()))
        changed.append((told[-1][0] != told[-1][2]).sum())
    for title, pair in zip(titles[1:4], pairs):
        assert float(title.split()[-1]) == pytest.approx(mean_iou(pair), abs=0.06)
    pictures = [np.array(common.to_picture(item["image"])) for item in data]
    shown = [next(i for i, p in enumerate(pictures) if np.array_equal(p, row[0])) for row in rows]
    assert len(rows) == 5 and [changed[i] for i in shown] == sorted(changed, reverse=True)[:5]
    assert changed[shown[0]] > 20
    for i, row in zip(shown, rows):
        truth, (st, _, product) = data[i]["label"].numpy(), told[i]
        for picture, label in zip((*row[1:4], row[5]), (*told[i], truth)):
            assert (labels_of(picture) == label).mean() > 0.995
        mark = np.array(row[4])
        for colour, where in ((figures.GREEN, (st != product) & (product == truth)),
                              (figures.RED, (st != product) & (product != truth))):
            assert ((mark == colour).all(2) == where).mean() > 0.995
    r, percent = saved["momentum_head"]["marginal"], texts.index("truth, %")
    truth = np.bincount(np.concatenate([item["label"].flatten() for item in data]), minlength=16) / (12 * 32 * 64)
    product = np.bincount(np.concatenate([label[2].ravel() for label in told]), minlength=16) / (12 * 32 * 64)
    cells = [text for text in texts[:percent] if re.fullmatch(r"[\d.e-]+", text)][-48:]
    for k in range(16):  # class after class: truth, r, labels
        assert list(map(float, cells[3 * k:3 * k + 3])) == pytest.approx(
            [100 * truth[k], 100 * r[k].item(), 100 * product[k]], rel=0.06, abs=0.06)


def test_figure_of_sdca(adapted, monkeypatch):
    """Its numbers are the runs' meters; its dots lie where cosines taken one by one say; the loss off stands below."""
    places, scatter = [], figures.scatter
    monkeypatch.setattr(figures, "scatter", lambda pen, left, top, width, points, *rest: places.append(
        (left, top, width, points, *rest)) or scatter(pen, left, top, width, points, *rest))
    picture, texts, _, _ = draw(adapted, monkeypatch, "sdca", "no_contrast")
    on, off = (result(adapted / f"{name}-0")["meters"] for name in ("sdca", "no_contrast"))
    for title, meters, when in (("before", on, "before"), ("after", on, "after"),
                                ("after, contrastive loss off", off, "after")):
        own, other = meters[f"own_feat_{when}"], meters[f"other_feat_{when}"]
        assert sum(text.startswith(f"{title}: own {own:.3f}, nearest other {other:.3f}; ") for text in texts) == 1
    assert abs(on["own_feat_after"] - on["own_feat_before"]) > 0.01
    saved, model, near = load(adapted / "sdca-0/sdca.pt"), opened(adapted / "sdca-0/sdca.pt"), {}
    for item in toy():
        with torch.no_grad():
            features = model(common.normalise(item["image"][None]))[0][0]  # (D, h, w)
        label = common.grid_labels(item["label"][None], features.shape[1:])[0]
        for r, y in zip(features.flatten(1).T, label.flatten().tolist()):
            cosines = torch.nn.functional.cosine_similarity(r[None], saved["feat"]["mean"].float(), dim=1)
            near.setdefault(common.SYNTHIA_16[y], []).append(
                (cosines[y].item(), torch.cat([cosines[:y], cosines[y + 1:]]).max().item()))
    pixels = np.array(picture)
    assert len(places) == 12
    for name, (left, top, width, points, colour, low) in zip(("road", "building", "car", "person"), places[4:8]):
        expected = sorted(near.get(name, []))
        assert np.allclose(np.reshape(sorted(points.T.tolist()), (-1, 2)), np.array(expected).reshape(-1, 2), atol=1e-3)
        if expected:
            assert f"{name}: own nearer {100 * np.mean([own > other for own, other in expected]):.0f} %" in texts
        for own, other in expected[:400]:
            x, y = left + width * (other - low) / (1 - low), top + width * (1 - own) / (1 - low)
            if left + 4 < x and y < top + width - 4:
                assert np.abs(pixels[int(y / 2), int(x / 2)].astype(int) - colour).max() < 80
    assert sum(map(len, near.values())) > 100 and len(near["road"]) > 20


def test_figure_of_drsl(adapted, monkeypatch):
    _, _, titles, rows = draw(adapted, monkeypatch, "drsl")
    assert titles == ["image", "building: looks", "building: modes", "car: looks", "car: modes"] and len(rows) == 5
    checkpoint, model, data = load(adapted / "drsl-0/last.pt"), opened(adapted / "drsl-0/last.pt"), toy()
    head = drsl.ModeHead(model.feature_dim, 16, 3, 64)
    head.load_state_dict(checkpoint["head"])
    R = torch.nn.functional.normalize(checkpoint["head"]["representatives"], dim=2)  # (C, K, E)
    tables, mixed, seen = {2: np.zeros((3, 3)), 12: np.zeros((3, 3))}, [], {}
    for index in range(6):
        item, looks, others = data[index], data.picture(index)[2], 1
        with torch.no_grad():
            e = head(model(common.normalise(item["image"][None]))[0])  # (1, E, h, w)
        for c, counts_of in tables.items():
            d2 = ((e[0][None] - R[c][:, :, None, None]) ** 2).sum(1)  # (K, h, w)
            modes = torch.nn.functional.interpolate(d2[None], size=(32, 64), mode="bilinear", align_corners=True)
            modes, mask = modes[0].argmin(0).numpy(), item["label"].numpy() == c
            np.add.at(counts_of, (modes[mask], looks[mask]), 1)
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
            for picture, values, colours in zip(pair, (looks, modes), (figures.LOOKS, figures.MODES)):
                picture = np.array(picture)
                assert (picture[mask] == np.array(colours)[values[mask]]).all(1).mean() > 0.99  # a tie may fall
                assert (np.ptp(picture[~mask], axis=1) == 0).all()  # the rest is grey
    for counts_of, picture in zip(tables.values(), (rows[4][2], rows[4][4])):
        for counts, bar, square in zip(counts_of, np.array(picture)[10::20], figures.MODES):  # a line of each bar
            assert (bar[:30] == square).all()
            for count, colour in zip(counts, figures.LOOKS):
                assert (bar == colour).all(1).sum() / 200 == pytest.approx(count / max(counts.sum(), 1), abs=0.01)


def test_ideas_need_a_run_of_a_method(adapted, tmp_path, capsys):
    for folder, word in ((adapted / "source-0", "a run of source_only; .*drsl"), (tmp_path, "args.json")):
        with pytest.raises(common.InputError, match=word):
            figures.draw_idea([folder], ARGS)
    for arguments, word in ((["idea", "--out", "x.png"], "at least one"), (["flow", "run", "--out", "x.png"], "flow"),
                            (["flow", "--out", "x.gif"], ".png")):
        with pytest.raises(SystemExit):
            figures.main(arguments)
        assert word in capsys.readouterr().err


def test_flow_of_the_four_methods(tmp_path):
    """Its table is the methods' wiring; every gradient comes from a loss and no box covers another."""
    figures.main(["flow", "--out", str(tmp_path / "flow.png")])
    picture = Image.open(tmp_path / "flow.png")
    assert picture.width == 900 and [title.split(":")[0] for title in figures.FLOW] == ["LSE", "CPSL", "SDCA", "DRSL"]
    reached = {}
    for title, (boxes, arrows) in figures.FLOW.items():
        pairs = [tuple(arrow.split()) for arrow in arrows.split(", ")]
        assert {key for pair in pairs for key in pair} == set(boxes)  # every box has an arrow
        back = {(a, b) for a, b in pairs if figures.learns_from(boxes[a][0], boxes[b][0])}
        reached[title.split(":")[0]] = {b for a, b in back if a == "net"}
        assert all(boxes[a][0] != "fixed" for a, _ in back)
        cells = [(column, row) for _, column, first, last, _ in boxes.values() for row in range(first, last + 1)]
        assert len(set(cells)) == len(cells)
    assert reached == {"LSE": {"ce", "ce_t"}, "CPSL": {"ce", "sce"}, "SDCA": {"ce", "bound"},
                       "DRSL": {"ce", "ce_t", "head"}}  # CPSL's self-labelling loss does not reach the network
    x, y = shows(picture, figures.ORANGE)
    lines = sorted(set(y[(x > 345) & (x < 360)]))  # right of the network: its gradients, one line each
    assert (np.diff(lines) > 1).sum() + 1 == sum(map(len, reached.values()))


# ===================================================== tables.sh =====================================================


def parsed(call, monkeypatch):
    """The arguments of a call "SCRIPT.py FLAGS" as its own parser reads them; SystemExit where it refuses them."""
    script, *flags = call.split()
    monkeypatch.setattr(sys, "argv", [script, *flags])
    return importlib.import_module(Path(script).stem).parse_args()


def calls_of_the_tables(folder, worlds, **variables):
    """[arguments of python] as assets/tables.sh calls it; run `oracle` of the first world counts as interrupted."""
    (folder / "python").write_text('#!/bin/sh\necho "$@" >> "$CALLS"\n')
    (folder / "python").chmod(0o755)
    common.write_json(folder / f"out/oracle-{worlds[0]}/args.json", {})
    common.write_json(folder / f"out/held-{worlds[-1]}/result.json", {})  # finished
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls"),
                   "OUT": str(folder / "out"), **variables}
    subprocess.run(["sh", PROJECT / "assets/tables.sh", *worlds], env=environment, check=True, cwd=folder)
    return (folder / "calls").read_text().splitlines()


def test_every_call_of_the_tables_is_understood(tmp_path, monkeypatch):
    """Every parser reads its calls; every row that is trained stands in a table, and no other."""
    out, rows, used = tmp_path / "out", {}, set()
    for call in calls_of_the_tables(tmp_path, ["3", "7"], STEPS="960", FLAGS="--log-every 7"):
        args = parsed(call, monkeypatch)
        if call.startswith(("evaluate", "assets")):
            used |= set(re.findall(r"out/(\w+-\d)", call))
            assert f"--out {out}/" in call or call.startswith("evaluate")  # not over the README's pictures
            continue
        name, world = Path(args.out).name.split("-")
        rows[name, world] = args
        assert str(args.out) == f"{out}/{name}-{world}" and args.log_every == 7
        assert args.toy_world == args.seed == int(world) and args.resume == ((name, world) == ("oracle", "3"))
        if name not in ("source", "oracle"):
            assert str(args.init) == f"{out}/source-{world}/last.pt" and args.val_every == 240
            assert args.iterations + getattr(args, "ssl_iterations", 0) == 960
    names = {name for name, _ in rows}
    assert {(name, world) for name in names for world in "37"} - set(rows) == {("held", "7")}
    assert used == {f"{name}-{world}" for name in names for world in "37"}
    row = lambda name: rows[name, "3"]
    assert row("oracle").oracle and row("plain").plain and not row("drsl").plain and row("held").hold_prototypes
    assert row("whole").view == "whole" and not row("fixed_labels").rectify and row("one_mode").modes == 1
    assert row("no_contrast").lambda_feat == row("no_contrast").lambda_out == 0 and row("sdca").ssl_iterations == 320


def test_the_tables_have_the_default_length(tmp_path, monkeypatch):
    calls = [call for call in calls_of_the_tables(tmp_path, ["0"]) if "--init" in call]
    lengths = lambda args: (args.iterations, getattr(args, "ssl_iterations", None))
    for call in calls:
        assert lengths(parsed(call, monkeypatch)) == lengths(parsed(call.split()[0], monkeypatch))
    assert len(calls) > 8
