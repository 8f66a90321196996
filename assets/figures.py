"""Draws every picture of the README from run folders.

    python assets/figures.py curves RUN [RUN ...] --out curves.png   losses and meters over the steps, run beside run
    python assets/figures.py steps RUN [RUN ...] --out steps.png     validation mIoU over the steps, a curve per method
    python assets/figures.py panel RUN [RUN ...] --out toy.png       image, truth, and what the model of each run says
    python assets/figures.py idea RUN [OFF] --out idea.png           what is special to the method of the run
    python assets/figures.py flow --out flow.png                     who labels whom, and what receives a gradient

`steps` needs runs made with --val-every. Runs of one method in several worlds (folders NAME-0, NAME-1, ...) are
averaged, and runs without such a curve serve for the two horizontal lines: + BN target, oracle. For SDCA, `idea` takes
a second run, the one with the contrastive loss off. All pictures are of the target's validation split but CPSL's, which
shows the labels of training images.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))  # the project's modules

import common
import evaluate

WIDTH = 900  # of every picture, in the README's pixels
RED, BLUE, YELLOW, GREEN, VIOLET = (225, 75, 60), (45, 120, 215), (245, 190, 50), (50, 160, 90), (150, 85, 200)
DARK, GREY, PALE = (70, 70, 70), (150, 150, 150), (215, 215, 215)
COLOURS = BLUE, RED, GREEN, VIOLET, (230, 150, 30), (0, 150, 160), (200, 80, 160), DARK
LOOKS = RED, BLUE, YELLOW
MODES = GREEN, VIOLET, (245, 130, 190), (80, 200, 210), (130, 100, 60)  # more modes: from the start


# ====================================================== drawing ======================================================


def write(pen, xy, text, anchor="lm", size=14, fill="black"):
    """Text whose anchor (left, middle, right; then ascender, middle, descender) is at the point xy."""
    pen.text(xy, text, fill=fill, anchor=anchor, font=ImageFont.load_default(size), align="center", spacing=2)


def wrap(text, width, size=14):
    """The text with line breaks between words, so that it fits the width."""
    font, lines = ImageFont.load_default(size), [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if not lines[-1] or font.getlength(longer) <= width else [lines[-1], word]
    return "\n".join(lines)


def grid(titles, rows, width=WIDTH, size=14):
    """A picture of that width: one row per scene, one column per title, pictures scaled to the columns."""
    column = (width + 4) // len(titles) - 4
    titles = ["\n".join(wrap(line, column, size) for line in title.split("\n")) for title in titles]
    top = (size + 4) * (1 + max(title.count("\n") for title in titles)) + 4
    height = round(column * rows[0][0].height / rows[0][0].width)
    sheet = Image.new("RGB", (len(titles) * (column + 4) - 4, top + len(rows) * (height + 4) - 4), "white")
    for k, title in enumerate(titles):
        write(ImageDraw.Draw(sheet), (k * (column + 4) + column / 2, top - 4), title, "md", size)
        for line, row in enumerate(rows):
            picture = row[k].resize((column, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (k * (column + 4), top + line * (height + 4)))
    return sheet


def stack(*pictures):
    """The pictures below each other."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height + 8 for p in pictures) - 8), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + 8
    return sheet


def class_colour(name):
    """The official colour of a class, for Pillow."""
    return tuple(common.palette([name])[0].tolist())


def legend(classes, width=WIDTH, size=14, columns=8):
    """A picture: the name of every class beside its official colour."""
    sheet = Image.new("RGB", (width, -(-len(classes) // columns) * (size + 8)), "white")
    pen = ImageDraw.Draw(sheet)
    for k, name in enumerate(classes):
        x, y = k % columns * width / columns, (k // columns + 0.5) * (size + 8)
        pen.rectangle([x, y - size / 2, x + size, y + size / 2], fill=class_colour(name))
        write(pen, (x + 1.3 * size, y), name, size=size)
    return sheet


def save(file, picture):
    with common.writing(file) as temporary:
        picture.save(temporary)


# ==================================================== run folders ====================================================


def read_log(folder):
    """The lines of a run's log.jsonl as dicts, without the half line that a killed run may leave at the end."""
    try:
        texts = (folder / "log.jsonl").read_text(errors="replace").splitlines()
        return [json.loads(text) for text in texts if text.endswith("}")]
    except (OSError, ValueError) as error:
        raise common.InputError(f"{folder / 'log.jsonl'}: expected the log of a run ({error})") from error


def open_run(folder, args, file="last.pt"):
    """Contents of a checkpoint in a run folder, its network, and the run's settings, with those given here instead."""
    checkpoint, model = evaluate.load_checkpoint(folder / file, args.device)
    settings = common.read_json(folder / "args.json") | {k: v for k, v in vars(args).items() if v is not None}
    return checkpoint, model, evaluate.task_of(checkpoint, argparse.Namespace(**settings))


def model_before(folder, adapted, device):
    """The source-only model from which a run started, with the batch norm of its adaptation.

    That is, where the run froze a norm (its weights are the same as before), with the statistics of the adapted
    model's state.
    """
    _, model = evaluate.load_checkpoint(folder / "source_only.pt", device)
    state = model.state_dict()  # the model's own memory
    for key in state:
        norm, _, statistic = key.rpartition(".")
        if statistic in ("running_mean", "running_var"):
            if torch.equal(state[f"{norm}.weight"].cpu(), adapted[f"{norm}.weight"]):
                state[key].copy_(adapted[key])
    return model


def predict(model, images, task):
    """Probabilities (N, C, H, W) of pictures uint8 (N, 3, H, W)."""
    return common.predict(model, common.normalise(images.to(task.device)), images.shape[2:], task).cpu()


# ======================================================= curves =======================================================


def logged_curves(lines):
    """What log.jsonl's dicts `lines` hold to draw: ({stage: step at which it starts}, {name: [(step, value), ...]}).

    Steps are counted through all stages; a stage that goes on where the one before stands ("joint 60/240", then "adapt
    80/240") shares its count. What is logged between two steps stands at the one before. After a resume the later value
    of a step counts. What is not a finite number is left out, and so is a name with a single value.
    """
    starts, origins, curves, now, before = {}, {}, {}, 0, (0, "")  # origins: where a stage's step 0 is
    for line in lines:
        step, _, total = str(line.get("step")).partition("/")
        if step.isdecimal():
            stage = str(line.get("stage")).removesuffix(" oracle")
            goes_on = total == before[1] and int(step) >= before[0]
            starts.setdefault(stage, now)
            now = origins.setdefault(stage, now - before[0] * goes_on) + int(step)
            before = int(step), total
        for name, value in line.items():
            if name not in ("step", "seconds") and isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(name, {})[now] = value
    return starts, {name: sorted(points.items()) for name, points in curves.items() if len(points) > 1}


def draw_curves(folders):
    """Losses and meters: a panel per name; of several runs a column per run, with the same scale for all.

    Pale: every value; dark: their means over a sixtieth of the steps. Grey lines: where a stage starts. Over each
    panel its last value and its range.
    """
    logs = [logged_curves(read_log(folder)) for folder in folders]
    names = list(dict.fromkeys(name for _, curves in logs for name in curves))
    if not names:
        raise common.InputError(f"{folders[0]}: its log holds no curve yet")
    cells = [(k, name) for name in names for k in range(len(logs))]
    columns = 3 if len(logs) == 1 else len(logs)
    last = max(points[-1][0] for _, curves in logs for points in curves.values())
    width, height = (WIDTH - 12) // columns - 12, 90
    sheet = Image.new("RGB", (WIDTH, 40 + -(-len(cells) // columns) * (height + 30)), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (folder, (starts, _)) in enumerate(zip(folders, logs)):
        stages = ", ".join(f"{stage} from {start}" for stage, start in starts.items())
        write(pen, (12 + k * (width + 12), 2), folder.name + f", steps 0 to {last}: {stages}" * (len(logs) == 1), "la")
    for i, (k, name) in enumerate(cells):
        (starts, curves), everywhere = logs[k], [v for _, c in logs for _, v in c.get(name, [])]
        if name not in curves:
            continue
        low, high = min(everywhere), max(everywhere)
        left, top = 12 + i % columns * (width + 12), 44 + i // columns * (height + 30)
        pen.rectangle([left, top, left + width, top + height], outline="silver")
        points = np.array(curves[name], float)  # (n, 2): step, value
        write(pen, (left, top - 10), f"{name}   {points[-1, 1]:.4g}   ({points[:, 1].min():.4g} to "
                                     f"{points[:, 1].max():.4g})", size=13)
        for x in (left + width * start / last for start in starts.values()):
            pen.line([x, top, x, top + height], fill="silver")
        places = (points - (0, high)) * (width / last, -height / (high - low or 1)) + (left, top)  # (n, 2): x, y
        means = [part.mean(0) for part in np.split(places, 1 + np.flatnonzero(np.diff(points[:, 0] * 60 // last)))]
        for line, colour in ((places, "lightsteelblue"), (means, "navy")):
            pen.line(np.array(line).flatten().tolist(), fill=colour)
    return sheet


def validation_curve(lines):
    """{step: mIoU} of a log's `val_miou` lines, steps counted through the stages in which there are any."""
    points, starts = {}, {}
    for line in lines:
        if line.get("val_miou") is not None:
            start = starts.setdefault(line["stage"], max(points, default=0))
            points[start + int(line["step"].split("/")[0])] = line["val_miou"]
    return points


def averaged(curves, bases):
    """[(step, mean, standard error of the gain)] over curves {step: value}, at the steps that all of them have.

    The gain is that over the base of each curve, the + BN target of its world: worlds differ more than methods do.
    """
    table = []
    for step in sorted(set.intersection(*map(set, curves))):
        values = np.array([curve[step] for curve in curves])
        error = (values - bases).std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        table.append((step, values.mean(), error))
    return table


def curves_by_method(folders):
    """({title: averaged curve}, {"+ BN target", "oracle": mean mIoU}, text that counts worlds and seeds)."""
    groups, owns, levels, runs = {}, {}, {}, evaluate.read_runs(folders)
    for folder, (pair, result) in zip(folders, runs):
        for title in {"+ BN target", "oracle"} & set(result["columns"]):
            levels.setdefault(title, {})[pair] = result["columns"][title]["miou"]
        if curve := validation_curve(read_log(folder)):
            name = re.sub(r"-s?\d+$", "", folder.name)
            owns[name] = result["own"]
            if pair in groups.setdefault(name, {}):
                raise common.InputError(f"{folder}: a second run {name} in world {pair[0]} with seed {pair[1]}")
            groups[name][pair] = curve
    if not groups:
        raise common.InputError(f"{folders[0]}, ...: no curve in any log; make the runs with --val-every")
    titles = {name: own if list(owns.values()).count(own) == 1 else f"{own}, {name}" for name, own in owns.items()}
    base = levels.get("+ BN target", {})
    curves = {titles[name]: averaged(list(group.values()), [base.get(pair, 0) for pair in group])
              for name, group in groups.items()}
    return curves, {title: np.mean(list(values.values())) for title, values in levels.items()}, evaluate.counted(
        [pair for group in groups.values() for pair in group])


def apart(places, least):
    """The numbers, moved as little as needed to be `least` apart, in the order given."""
    order, moved = np.argsort(places, kind="stable"), np.array(places, float)
    for before, after in zip(order, order[1:]):
        moved[after] = max(moved[after], moved[before] + least)
    return (moved - max(0, moved.max() - max(places)) / 2).tolist()


def draw_steps(folders):
    """Validation mIoU over adaptation steps: per method the mean, and the standard error of its gain; two baselines."""
    curves, levels, count = curves_by_method(folders)
    last = max(table[-1][0] for table in curves.values())
    values = [v for table in curves.values() for _, mean, error in table for v in (mean - error, mean + error)]
    low, high = math.floor(min([*values, *levels.values()]) - 0.5), math.ceil(max([*values, *levels.values()]) + 0.5)
    left, right, top, bottom = 90, 1330, 80, 880  # drawn at twice the size
    x_of = lambda step: left + (right - left) * step / last
    y_of = lambda value: bottom - (bottom - top) * (value - low) / (high - low)
    sheet = Image.new("RGB", (2 * WIDTH, 980), "white")
    pen = ImageDraw.Draw(sheet, "RGBA")
    write(pen, (left, 30), f"the target's validation mIoU, mean over {count}; band: ± standard error of the gain over "
                           "+ BN target", size=30)
    for value in range(low, high + 1, max(1, (high - low) // 8)):
        pen.line([left, y_of(value), right, y_of(value)], fill=PALE, width=1)
        write(pen, (left - 12, y_of(value)), str(value), "rm", 28)
    for k in range(5):
        write(pen, (x_of(last * k / 4), bottom + 12), f"{last * k / 4:.0f}", "ma", 28)
    write(pen, ((left + right) / 2, bottom + 50), "adaptation steps", "ma", 28)
    coloured = [(title, table, COLOURS[k % len(COLOURS)]) for k, (title, table) in enumerate(curves.items())]
    for _, table, colour in coloured:
        edge = [(x_of(step), y_of(mean + error)) for step, mean, error in table]
        edge += [(x_of(step), y_of(mean - error)) for step, mean, error in reversed(table)]
        pen.polygon(edge, fill=(*colour, 40))
    ends = []
    for title, value in levels.items():
        for x in range(left, right, 24):
            pen.line([x, y_of(value), x + 12, y_of(value)], fill=GREY, width=4)
        ends.append((y_of(value), f"{title} {value:.1f}", DARK))
    for title, table, colour in coloured:
        line = [(x_of(step), y_of(mean)) for step, mean, _ in table]
        pen.line(line, fill=colour, width=6, joint="curve")
        for x, y in line:
            pen.ellipse([x - 7, y - 7, x + 7, y + 7], fill=colour)
        ends.append((line[-1][1], f"{title} {table[-1][1]:.1f}", colour))
    for y, (_, text, colour) in zip(apart([y for y, _, _ in ends], 36), ends):
        write(pen, (right + 24, y), text, size=30, fill=colour)
    return sheet.reduce(2)


# ================================================= the first picture =================================================


def draw_panel(folders, args, scenes=4):
    """Image, truth and the prediction of every run's last model for some validation pictures; the classes' colours."""
    runs = evaluate.read_runs(folders)
    if len({world for (world, _), _ in runs}) > 1:
        raise common.InputError("a panel needs runs of one world")
    opened = [open_run(folder, args) for folder in folders]
    task, rows = opened[0][2], []
    classes = common.task_classes(task.source)
    for item in common.some(common.target_dataset(task, "val", labelled=True), scenes):
        labels = [item["label"]]
        for _, model, _ in opened:
            label = predict(model, item["image"][None], task).argmax(1)[0]
            labels.append(torch.where(item["label"] == common.IGNORE, common.IGNORE, label))
        rows.append([common.to_picture(item["image"]), *(common.colour_label(label, classes) for label in labels)])
    told = [f"mIoU {result['miou']:.1f}" if result.get("miou") is not None else "" for _, result in runs]
    titles = ["image", "truth", *(f"{result['own']}\n{miou}".strip() for (_, result), miou in zip(runs, told))]
    return stack(grid(titles, rows, 2 * WIDTH, 28), legend(classes, 2 * WIDTH, 28))  # twice the size: for a closer look


# ================================================= the ideas at work =================================================


def draw_lse(folders, args, scenes=5):
    """The middle of some pictures, enlarged by two, and what is said of it. mIoU: of the middles of all pictures.

    The source-only model's prediction of the whole image teaches what LSE-10 keeps of it. Then the predictions of the
    enlarged window, before and after.
    """
    import scale_invariant as lse

    checkpoint, model, task = open_run(folders[0], args)
    before, classes = model_before(folders[0], checkpoint["model"], task.device), common.task_classes(task.source)
    size, (h, w), rows = task.size, lse.half(task.size), []
    thresholds = torch.tensor(common.read_json(folders[0] / "pseudo_labels/round1/round.json")["thresholds"])
    dataset = common.target_dataset(task, "val", labelled=True)
    shown, metrics = set(common.some(range(len(dataset)), scenes)), [common.MeanIoU(len(classes)) for _ in range(3)]
    middle = lambda maps: lse.cut(maps, h // 2, w // 2, h, w)
    for index in range(len(dataset)):
        item = dataset[index]
        view = lse.enlarge(middle(item["image"]).float(), size).round().byte()  # (3, H, W)
        truth = lse.enlarge_labels(middle(item["label"]), size)
        whole, *seen = (predict(one, image[None], task)[0]  # (C, H, W)
                        for one, image in ((before, item["image"]), (before, view), (model, view)))
        label = whole.max(0).indices  # (H, W)
        keep = lse.keep_confident(lse.normalised_entropy(lse.pixel_entropy(whole), label), label, thresholds)
        taught, kept = (lse.transfer_labels(middle(whole), middle(mask), size)
                        for mask in (torch.ones_like(keep), keep))
        predictions = [taught, *(prob.max(0).indices for prob in seen)]  # (H, W) each
        for metric, prediction in zip(metrics, predictions):
            metric.update(prediction, truth)
        if index in shown:
            labels = [taught, kept, *predictions[1:], truth]
            rows.append([common.to_picture(view), *(common.colour_label(label, classes) for label in labels)])
    whole, seen, after = (f"mIoU {100 * metric.mean(metric.present()):.1f}" for metric in metrics)
    return grid(["window,\nenlarged by 2", f"whole image said:\n{whole}", "kept of it\n(LSE-10)",
                 f"window, before:\n{seen}", f"window, after:\n{after}", "truth"], rows)


@torch.no_grad()
def cpsl_labels(folder, args):
    """A function of pictures uint8 (N, 3, H, W): argmax P_ST, argmax P_SL, rectified labels; then r (K,) and the task.

    All by what the run kept: the frozen warm-up model, the momentum network and its prototypes at the end.
    """
    import cpsl

    checkpoint, momentum, task = open_run(folder, args)
    _, warm, _ = open_run(folder, args, "warmup.pt")
    state, temperature = checkpoint["momentum_head"], common.read_json(folder / "args.json")["temperature"]
    common.load_weights(momentum, checkpoint["momentum"], folder / "last.pt", "the momentum network")
    head = cpsl.SelfLabelingHead(*state["prototypes"].shape).to(task.device)
    common.load_weights(head, state, folder / "last.pt", "the self-labelling head")

    @torch.no_grad()
    def labels(images):
        p_st = predict(warm, images, task)  # (N, K, H, W)
        with common.autocast(task):
            features, _ = momentum(common.normalise(images.to(task.device)))  # (N, D, h, w)
        cosine = common.upsample(head.cosine(features), images.shape[2:]).cpu()  # (N, K, H, W)
        return p_st.argmax(1), cosine.argmax(1), cpsl.rectify(p_st, cosine, temperature)

    return labels, head.marginal.cpu(), task


def changes(picture, before, after, truth):
    """The picture, pale but for the pixels whose label changed: green if it is now right, red if it is wrong."""
    colour = torch.where(after == truth, 0, 1)
    return tint(picture, colour, (before != after) & (truth != common.IGNORE), (GREEN, RED))


def share_table(rows, classes):
    """A picture: a column per class, with its colour and name, a row per {title: shares (K,)}, in percent."""
    size, left = 13, 64
    step, top = (WIDTH - left) / len(classes), 46
    broken = lambda word: word if len(word) < 8 or " " in word else f"{word[:len(word) // 2]}-\n{word[len(word) // 2:]}"
    sheet = Image.new("RGB", (WIDTH, top + 20 * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for k, name in enumerate(classes):
        x = left + (k + 0.5) * step
        pen.rectangle([x - step / 2 + 3, 0, x + step / 2 - 3, 7], fill=class_colour(name))
        write(pen, (x, 12), broken(name).replace(" ", "\n"), "ma", size)
        for line, shares in enumerate(rows.values()):
            write(pen, (x, top + 20 * line + 8), f"{100 * shares[k]:.2g}" if shares[k] else "0", "mm", size)
    for line, title in enumerate(rows):
        write(pen, (0, top + 20 * line + 8), title, size=size)
    return sheet


def draw_cpsl(folders, args, scenes=5, images=400):
    """Labels of training images: P_ST, P_SL, their product, and what the product changed; below, the class shares.

    The scenes are those in which it changed most. The truth is looked at here and used nowhere.
    """
    labels, r, task = cpsl_labels(folders[0], args)
    classes, rows = common.task_classes(task.source), []
    metrics = [common.MeanIoU(len(classes)) for _ in range(3)]
    for item in common.some(common.target_dataset(task, "train", labelled=True), images):
        truth, told = item["label"], [label[0] for label in labels(item["image"][None])]  # (H, W) each
        for metric, label in zip(metrics, told):
            metric.update(label, truth)
        picture = common.to_picture(item["image"])
        changed = int(((told[0] != told[2]) & (truth != common.IGNORE)).sum())
        row = [picture, *(common.colour_label(label, classes) for label in told),
               changes(picture, told[0], told[2], truth), common.colour_label(truth, classes)]
        rows = sorted([*rows, (changed, row)], key=lambda scene: -scene[0])[:scenes]
    st, sl, product = (f"mIoU {100 * metric.mean(metric.present()):.1f}" for metric in metrics)
    panel = grid(["target image", f"P_ST\n{st}", f"P_SL\n{sl}", f"product\n{product}",
                  "changed: right green, wrong red", "truth"], [row for _, row in rows])
    share = lambda counts: counts.double() / counts.sum().clamp(min=1)
    confusion = metrics[2].confusion
    shares = {"truth, %": share(confusion.sum(1)), "r, %": r, "labels, %": share(confusion.sum(0))}
    return stack(panel, share_table(shares, classes))


@torch.no_grad()
def labelled_features(model, dataset, task):
    """Yields SDCA's representations r (n, D) of the feature grid's labelled pixels, and their labels (n,)."""
    for batch in common.evaluation_batches(dataset, task):
        with common.autocast(task):
            features, _ = model(batch["image"])  # (N, D, h, w)
        y = common.grid_labels(batch["label"].to(task.device), features.shape[2:]).flatten()
        yield common.as_pixels(features.float())[y != common.IGNORE], y[y != common.IGNORE]


def class_cosines(model, mean, task):
    """f.mu_y, max_{k != y} f.mu_k and y of the validation pixels, (n,) each, for class means (C, D)."""
    columns, mu = [], F.normalize(mean.to(task.device), dim=1).float()
    for r, y in labelled_features(model, common.target_dataset(task, "val", labelled=True), task):
        similarity, y = F.normalize(r, dim=1) @ mu.T, y[:, None]  # (n, C), (n, 1)
        columns.append(torch.cat([similarity.gather(1, y), similarity.scatter(1, y, -1.0).amax(1, True), y], 1))
    return torch.cat(columns).T.cpu()  # (3, n)


def sdca_cosines(folders, args):
    """{title: `class_cosines`} of the source-only model, of the adapted one and, from a second run, with the loss off.

    After: model and class means of sdca.pt, because the self-training that may follow knows no means.
    """
    import sdca

    saved, after, task = open_run(folders[0], args, "sdca.pt")
    mean, before = saved["feat"]["mean"], model_before(folders[0], saved["model"], task.device)
    statistics = sdca.ClassStatistics(*mean.shape, task.device)
    for r, y in labelled_features(before, common.some(common.source_dataset(task), 400), task):
        statistics.update(r, y)
    sides = {"before": class_cosines(before, statistics.mean, task), "after": class_cosines(after, mean, task)}
    if len(folders) > 1:
        saved, off, task = open_run(folders[1], args, "sdca.pt")
        sides["after, contrastive loss off"] = class_cosines(off, saved["feat"]["mean"], task)
    return sides


def scatter(pen, left, top, width, points, colour, low, most=400):
    """A square of pixels by their cosines with the own class mean (up) and the nearest other (right), from low to 1."""
    pen.rectangle([left, top, left + width, top + width], outline=GREY)
    pen.line([left, top + width, left + width, top], fill=GREY, width=2)
    own, other = points[:, torch.randperm(points.shape[1], generator=torch.Generator().manual_seed(0))[:most]]
    for x, y in zip((left + width * (other - low) / (1 - low)).tolist(),
                    (top + width * (1 - own) / (1 - low)).tolist()):
        if x > left and y < top + width:
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)


def draw_sdca(folders, args, names=("road", "building", "car", "person")):
    """Target pixels of four classes by their cosines with class means: a column per class, a row per model."""
    sides, (_, _, task) = sdca_cosines(folders, args), open_run(folders[0], args)
    classes, width = common.task_classes(task.source), 400
    low = min(side[:2].flatten().sort().values[len(side.T) // 100].item() for side in sides.values())
    low = math.floor(10 * low) / 10
    sheet = Image.new("RGB", (2 * WIDTH, len(sides) * (width + 96) + 60), "white")
    pen = ImageDraw.Draw(sheet)
    for line, (title, (own, other, y)) in enumerate(sides.items()):
        top = 92 + line * (width + 96)
        nearer = lambda mask: f"{100 * (own > other)[mask].float().mean():.0f} %" if mask.any() else "-"
        write(pen, (70, top - 70), f"{title}: own {own.mean():.3f}, nearest other {other.mean():.3f}; "
                                   f"own nearer for {nearer(y >= 0)} of all pixels", size=28)
        for value in (low, 1):
            write(pen, (60, top + width * (1 - value) / (1 - low)), f"{value:.2g}", "rm", 26)
        for k, name in enumerate(names):
            left, mask = 70 + k * (width + 34), y == classes.index(name)
            write(pen, (left + width / 2, top - 24), f"{name}: own nearer {nearer(mask)}", "mm", 28)
            scatter(pen, left, top, width, torch.stack([own, other])[:, mask], class_colour(name), low)
    write(pen, (70, sheet.height - 30), "rightwards: cosine with the nearest other class mean; up: with the own one; "
                                        "above the diagonal it is nearer", size=28)
    return sheet.reduce(2)


@torch.no_grad()
def modes_of(model, head, item, c, task):
    """(H, W): the nearest mode of class c at every pixel, from distances that are upsampled as logits are."""
    with common.autocast(task):
        features, _ = model(common.normalise(item["image"][None].to(task.device)))  # (1, D, h, w)
    _, d2 = head(features.float(), distances=True)  # (n, C, K)
    d2 = d2[:, c].T.reshape(1, -1, *features.shape[2:])  # (1, K, h, w)
    return common.upsample(d2, item["label"].shape).argmin(1)[0].cpu()


def tint(picture, values, mask, colours):
    """The picture, pale but for the pixels of the mask (H, W), which have the colours of their values (H, W)."""
    pale = 160 + 10 * (np.array(picture.convert("L").convert("RGB")) // 32)  # (H, W, 3), few tones: a small file
    chosen = np.array(colours, np.uint8)[values.numpy() % len(colours)]
    return Image.fromarray(np.where(mask.numpy()[:, :, None], chosen, pale).astype(np.uint8))


def look_bars(table, colours=None):
    """A picture of one bar per row of table (k, 3), which shows its shares of the looks; colours: squares before it.

    A row without pixels has no bar.
    """
    share = table.cumsum(1) / table.sum(1, keepdim=True).clamp(min=1)  # (k, 3)
    place = ((torch.arange(200) + 0.5) / 200).expand(len(table), 200)
    bars = np.array([*LOOKS, (255, 255, 255)], np.uint8)[(place[:, :, None] > share[:, None]).sum(2)]  # (k, 200, 3)
    squares = np.full((len(table), 40, 3), 255, np.uint8)
    if colours:
        squares[:, :30] = np.array(colours)[np.arange(len(table)) % len(colours), None]
    bars = np.concatenate([squares, bars], 1).repeat(20, 0)  # (20 k, 240, 3)
    bars[::20] = bars[1::20] = 255
    return Image.fromarray(bars)


def look_legend(size):
    """What the colours of the looks mean."""
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    write(pen, (4, 10), "shares in all pictures:")
    for look, text in enumerate(("look 0: the source's", "look 1", "look 2: the target's")):
        pen.rectangle([4, 23 + 20 * look, 17, 36 + 20 * look], fill=LOOKS[look])
        write(pen, (24, 30 + 20 * look), text)
    return picture


def draw_drsl(folders, args, names=("building", "car")):
    """Pixels of two classes by their nearest mode; on the toy beside their true looks, and the looks of every mode.

    The toy's four pictures are those with the most pixels of these classes in other looks than the picture's commonest.
    """
    import drsl

    checkpoint, model, task = open_run(folders[0], args)
    if "head" not in checkpoint:
        raise common.InputError(f"{folders[0]}: a run without modes")
    C, K, E = checkpoint["head"]["representatives"].shape
    head, toy = drsl.ModeHead(model.feature_dim, C, K, E).to(task.device), task.source == "toy"
    common.load_weights(head, checkpoint["head"], folders[0] / "last.pt", f"{K} modes of {C} classes")
    dataset, scenes = common.target_dataset(task, "val", labelled=True), []
    tables = {name: torch.zeros(K, 3) for name in names}  # pixels by mode and look
    for index in range(len(dataset)) if toy else common.some(range(len(dataset)), 4):
        item, mixed = dataset[index], 1
        row = [common.to_picture(item["image"])]
        for name, table in tables.items():
            c = common.task_classes(task.source).index(name)
            mask, modes = item["label"] == c, modes_of(model, head, item, c, task)  # (H, W)
            if toy:
                looks = torch.from_numpy(dataset.picture(index)[2]).long()
                counts = torch.bincount((3 * modes + looks)[mask], minlength=3 * K).view(K, 3)
                table += counts
                mixed *= (counts.sum() - counts.sum(0).max()).item()
                row.append(tint(row[0], looks, mask, LOOKS))
            row.append(tint(row[0], modes, mask, MODES))
        scenes.append((mixed, row))
    rows = [row for _, row in sorted(scenes, key=lambda scene: -scene[0])[:4]]
    titles = ["image"] + [f"{name}: {what}" for name in names for what in (["looks"] * toy + ["modes"])]
    if toy:
        width = (WIDTH + 4) // len(titles) - 4
        bars = [(look_bars(table.sum(0, True)), look_bars(table, MODES)) for table in tables.values()]
        rows.append([look_legend((width, round(width * rows[0][0].height / rows[0][0].width))), *sum(bars, ())])
    return grid(titles, rows)


IDEAS = {"scale_invariant": draw_lse, "cpsl": draw_cpsl, "sdca": draw_sdca, "drsl": draw_drsl}


def draw_idea(folders, args):
    """The picture of the method of the first run."""
    method = common.read_json(folders[0] / "args.json").get("method")
    if method not in IDEAS:
        raise common.InputError(f"{folders[0]}: a run of {method}; there are pictures for {', '.join(IDEAS)}")
    return IDEAS[method](folders, args)


# ================================================== who labels whom ==================================================
# Per method the boxes, {key: (kind, column, first row, last row, text)}, and the arrows, from box to box. A gradient
# flows back along the arrows that end in a loss or lead from one learning part to another: kind "learns".

KINDS = {"picture": ("pictures", (214, 232, 248)), "learns": ("learns", (255, 212, 140)),
         "fixed": ("network without gradient", (222, 222, 222)), "label": ("labels, statistics", (214, 238, 196)),
         "loss": ("loss", (250, 208, 204))}
ORANGE = (225, 105, 10)


def boxes(last, ce="cross-entropy with the true label", **others):
    """What all methods have, a source image, the network over the rows 0 to last, a loss, and the `others`."""
    return {"source": ("picture", 0, 0, 0, "source image"), "net": ("learns", 1, 0, last, "network"),
            "ce": ("loss", 4, 0, 0, ce), **others}


FLOW = {
    "LSE: what the whole image says teaches its enlarged windows": (boxes(
        1,
        window=("picture", 0, 1, 1, "window of a target image, enlarged"),
        ce_t=("loss", 4, 1, 2, "cross-entropy, focal loss"),
        image=("picture", 0, 2, 2, "the whole target image"),
        still=("fixed", 1, 2, 2, "network at the start of the round"),
        sure=("label", 2, 2, 2, "sure pixels of each class's best images"),
        cut=("label", 3, 2, 2, "the same window of them, enlarged")),
        "source net, net ce, window net, net ce_t, image still, still sure, sure cut, cut ce_t"),
    "CPSL: prototypes, kept in balance by the class shares r, correct fixed labels": (boxes(
        1,
        view=("picture", 0, 1, 1, "target image, other colours"),
        sce=("loss", 4, 1, 2, "symmetric cross-entropy"),
        image=("picture", 0, 2, 3, "target image"),
        warm=("fixed", 1, 2, 2, "warm-up model"),
        momentum=("fixed", 1, 3, 3, "momentum copy of the network"),
        p_st=("label", 2, 2, 2, "P_ST, fixed"),
        proto=("learns", 2, 3, 3, "prototypes: P_SL"),
        product=("label", 3, 2, 2, "labels: argmax of the product P_SL P_ST"),
        q=("label", 3, 4, 4, "transport: assignment Q with class shares r"),
        sl=("loss", 4, 3, 4, "self-labelling loss")),
        "source net, net ce, view net, net sce, image warm, image momentum, warm p_st, momentum proto, p_st product, "
        "proto product, product sce, proto q, q sl, proto sl"),
    "SDCA: pixels of both domains are pulled to the source's class distributions": (boxes(
        3, "cross-entropy and Lovasz-softmax",
        target=("picture", 0, 1, 3, "target image"),
        bound=("loss", 4, 1, 3, "contrastive bound on the pixels of both domains"),
        statistics=("label", 2, 2, 2, "source: mean and variance of each class"),
        sure=("label", 2, 3, 3, "target: its own sure predictions"),
        image=("picture", 0, 4, 4, "afterwards: target image"),
        still=("fixed", 1, 4, 4, "adapted network"),
        labels=("label", 2, 4, 4, "labels above each class's threshold"),
        ce_t=("loss", 4, 4, 4, "cross-entropy of the network with them")),
        "source net, net ce, target net, net bound, net statistics, net sure, statistics bound, sure bound, "
        "image still, still labels, labels ce_t"),
    "DRSL: modes inside each class, aligned between the domains (without the mode head: plain self-training)": (boxes(
        3,
        target=("picture", 0, 1, 3, "target image"),
        head=("learns", 2, 1, 2, "mode head: some modes for each class"),
        modes=("loss", 4, 1, 1, "mode losses on both domains"),
        align=("loss", 4, 2, 2, "alignment: pixels of one mode, both domains"),
        ce_t=("loss", 4, 3, 4, "cross-entropy"),
        image=("picture", 0, 4, 4, "target image"),
        still=("fixed", 1, 4, 4, "network at the start of the round"),
        labels=("label", 2, 4, 4, "labels above each class's threshold")),
        "source net, net ce, target net, net head, head modes, head align, net ce_t, image still, still labels, "
        "labels ce_t, labels head"),
}


def box_place(box, top):
    """Left, top, right, bottom of a box of a method whose first row begins at `top`; everything at twice the size."""
    _, column, first, last, _ = box
    return 4 + 370 * column, top + 84 * first, 312 + 370 * column, top + 84 * last + 66


def arrow_ends(a, b):
    """Where an arrow from place a to place b starts and ends: level or upright if they face each other."""
    low, high = max(a[1], b[1]), min(a[3], b[3])  # the rows that both have: in the first of them
    if low < high:
        return (a[2], low + 33), (b[0], low + 33)
    if a[0] == b[0]:  # same column
        x = (a[0] + a[2]) / 2
        return ((x, a[1]), (x, b[3])) if a[1] > b[1] else ((x, a[3]), (x, b[1]))
    down = b[1] > a[3]
    return (a[2], a[3] - 16 if down else a[1] + 16), (b[0], b[1] + 16 if down else b[3] - 16)


def draw_arrow(pen, start, end, colour, width):
    """A line with a head at its end."""
    (x, y), (u, v) = start, end
    length = math.hypot(u - x, v - y)
    dx, dy = (u - x) / length, (v - y) / length
    base = u - 20 * dx, v - 20 * dy
    pen.line([x, y, *base], fill=colour, width=width)
    pen.polygon([(u, v), (base[0] - 10 * dy, base[1] + 10 * dx), (base[0] + 10 * dy, base[1] - 10 * dx)], fill=colour)


def learns_from(a, b):
    """Whether a gradient flows back along an arrow between boxes of these kinds."""
    return a == "learns" and b in ("learns", "loss")


def draw_flow():
    """The four methods as boxes and arrows: who labels whom, and what receives a gradient."""
    heights = [84 * (1 + max(box[3] for box in kinds.values())) for kinds, _ in FLOW.values()]
    sheet = Image.new("RGB", (2 * WIDTH, 90 + sum(heights) + 70 * len(FLOW)), "white")
    pen, top = ImageDraw.Draw(sheet), 90
    for x, (text, colour) in zip((4, 200, 370, 760, 1080), KINDS.values()):
        pen.rounded_rectangle([x, 10, x + 30, 40], 6, fill=colour)
        write(pen, (x + 40, 25), text, size=26)
    draw_arrow(pen, (1370, 25), (1430, 25), ORANGE, 8)
    write(pen, (1440, 25), "a gradient flows back here", size=26)
    for (title, (kinds, arrows)), height in zip(FLOW.items(), heights):
        write(pen, (4, top), title, size=32)
        top += 36
        places = {key: box_place(box, top) for key, box in kinds.items()}
        for a, b in (arrow.split() for arrow in arrows.split(", ")):
            back = learns_from(kinds[a][0], kinds[b][0])
            draw_arrow(pen, *arrow_ends(places[a], places[b]), ORANGE if back else DARK, 8 if back else 3)
        for key, (kind, *_, text) in kinds.items():
            place = places[key]
            pen.rounded_rectangle(place, 12, fill=KINDS[kind][1], outline=GREY, width=2)
            write(pen, ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2), wrap(text, 290, 27), "mm", 27)
        top += height + 34
    return sheet.reduce(2)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("figure", choices=("curves", "steps", "panel", "idea", "flow"), help="what to draw")
    add("runs", nargs="*", metavar="RUN", type=Path, help="run folders")
    add("--out", required=True, metavar="FILE.png", type=Path, help="the picture")
    add("--data-root", metavar="DIR", help="holds the data; None means the run's")
    common.add_machine_flags(parser)
    args = parser.parse_args(argv)
    if bool(args.runs) == (args.figure == "flow"):
        parser.error("flow takes no run folder, every other figure at least one")
    if args.out.suffix.lower() != ".png":
        parser.error(f"--out {args.out}: expected a name that ends in .png")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.figure == "flow":
        picture = draw_flow()
    elif args.figure in ("curves", "steps"):
        picture = {"curves": draw_curves, "steps": draw_steps}[args.figure](args.runs)
    else:
        picture = {"panel": draw_panel, "idea": draw_idea}[args.figure](args.runs, args)
    save(args.out, picture)


if __name__ == "__main__":
    common.run(main)
