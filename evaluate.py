"""Scores, compares, draws and exports checkpoints of any method; segments pictures of your own.

    python evaluate.py runs/source_only-toy-s0/last.pt runs/drsl-toy-s0/last.pt --panel compare.png
    python evaluate.py CKPT --data-root DIR --scales 0.75 1.0 1.25 --flip
    python evaluate.py CKPT --data-root DIR --export predictions      # for the official Cityscapes evaluator
    python evaluate.py CKPT --images holiday.jpg photos/              # no labels, no data root
    python evaluate.py runs/drsl-toy-s0/last.pt --idea idea.png       # LSE, CPSL, SDCA, DRSL: the idea at work
    python evaluate.py --summary runs/drsl-0 runs/drsl-1 runs/drsl-2  # mean ± deviation over seeds, one row per method
    python evaluate.py --summary runs/drsl-? --against runs/plain-?   # differences, paired by seed, ± standard error

One table: classes down, checkpoints across; then mIoU (the mean over the classes that occur in the labels), for models
of the 16 SYNTHIA classes also the mean over 13, the mean over the long tail, and the total variation distance between
the predicted and the true class histogram. Source, size (unless --size is given) and classes come from the checkpoint.
Images go in at that size, logits are upsampled to the labels' full resolution, one confusion matrix collects the whole
split. Several scales and mirror images are averaged as probabilities; the numbers of this project are single-scale.

`--export DIR` writes two folders, because the official evaluator accepts one file per image in the folder it searches:

    DIR/labelIds/CITY_SEQUENCE_FRAME_pred_labelIds.png    Cityscapes labelIds at label resolution: CITYSCAPES_RESULTS
    DIR/color/CITY_SEQUENCE_FRAME_pred_color.png          the same in the official colours

With `--images` a third one, DIR/overlay/NAME_overlay.png, has the colours over the picture; all three have the
picture's own size. The picture goes into the network at the height of --size, its proportions kept. With several
checkpoints each gets such folders in a folder of its own.

`--idea FILE.png` draws what is special to the checkpoint's method: enlarged windows (LSE), class histograms (CPSL),
cosines with class means (SDCA), modes beside looks (DRSL). It reads the run folder in which the checkpoint lies.
"""

import argparse
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

import common

PICTURES = (".png", ".jpg", ".jpeg")


def titles_of(paths):
    """A short distinct name per checkpoint: the file's stem, with parent folders where stems repeat, or its path."""
    for depth in range(1, 1 + max(len(path.parts) for path in paths)):
        titles = ["/".join(path.with_suffix("").parts[-depth:]) for path in paths]
        if len(set(titles)) == len(titles) and "last" not in titles:
            return titles
    return titles if len(set(titles)) == len(titles) else list(map(str, paths))


def export(folder, name, pred, classes):
    """Writes a prediction (H, W) as labelId and colour PNGs below `folder`; returns the colour picture."""
    ids = np.array(common.label_ids(classes), np.uint8)
    colour = common.colour_label(pred, classes)
    for kind, picture in (("labelIds", Image.fromarray(ids[pred])), ("color", colour)):
        with common.writing(folder / kind / f"{name}_pred_{kind}.png") as temporary:
            picture.save(temporary)
    return colour


def find_pictures(paths):
    """{name: path} of the PNG and JPEG files among `paths` and in the folders among them; InputError without any."""
    found = []
    for path in paths:
        if not path.exists():
            raise common.InputError(f"{path}: no such file or folder")
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES) if path.is_dir() else [path]
        if not inside:
            raise common.InputError(f"{path}: no picture found; expected files that end in {', '.join(PICTURES)}")
        found += inside
    stems = [path.stem for path in found]
    return {path.stem if stems.count(path.stem) == 1 else "-".join(path.parts).strip("/"): path for path in found}


def segment(model, path, args):
    """The picture of a file, upright, and its prediction: PIL RGB, class indices uint8 (H, W)."""
    picture = ImageOps.exif_transpose(common.open_image(path)).convert("RGB")
    W, H = picture.size
    size = (args.size[0], max(8, round(args.size[0] * W / H / 8) * 8))  # proportions kept, multiples of 8
    item = common.make_item(picture, None, path.stem, size, None)
    image = item["image"][None].to(args.device)
    prob = common.predict(model, image, size, args, args.scales, args.flip)  # (1, C, h, w)
    prob = F.interpolate(prob, size=(H, W), mode="bilinear")
    return picture, prob.max(1).indices[0].byte().cpu().numpy()


def segment_pictures(models, tasks, folders, args):
    """Writes the predictions of every model for the pictures of --images; the first eight into the panel if asked."""
    pictures, rows = find_pictures(args.images), []
    for name, path in pictures.items():
        row = []
        for model, task, folder in zip(models.values(), tasks, folders):
            picture, pred = segment(model.eval(), path, task)
            colour = export(folder, name, pred, common.task_classes(task.source))
            overlay = Image.blend(picture, colour, 0.5)
            with common.writing(folder / "overlay" / f"{name}_overlay.png") as temporary:
                overlay.save(temporary)
            row.append(overlay)
        if args.panel and len(rows) < 8:
            rows.append([ImageOps.pad(shown, (640, 320), color="white") for shown in (picture, *row)])
    if args.panel:
        common.draw_panel(args.panel, ["image", *models], rows)
    print(f"{len(pictures)} pictures segmented; written to {', '.join(map(str, folders))}")


# ================================================= the ideas at work =================================================
# One figure per method, of the target's validation pictures, 900 pixels wide. "Before" is the run's source-only model.

BLUE, ORANGE, DARK = (45, 120, 215), (240, 160, 60), (70, 70, 70)
LOOKS = (225, 75, 60), BLUE, (245, 190, 50)
MODES = (50, 160, 90), (150, 85, 200), (245, 130, 190), (80, 200, 210), (130, 100, 60)  # more modes: from the start


def class_colour(name):
    """The official colour of a class, for Pillow."""
    return tuple(common.palette([name])[0].tolist())


def write_text(pen, xy, text, anchor="mm", size=12):
    """Black text whose anchor (left, middle, right; then ascender, middle) is at the point xy."""
    pen.text(xy, text, fill="black", anchor=anchor, font=ImageFont.load_default(size), align="center")


def model_before(path, checkpoint, args):
    """The source-only model from which the run of a checkpoint started, with the batch norm of its adaptation.

    That is, where the run froze a norm (its weights are the same as before), with the checkpoint's statistics.
    """
    start = path.parent / "source_only.pt"
    model, adapted = common.unpack_model(common.read_checkpoint(start), start), checkpoint["model"]
    state = model.state_dict()  # the model's own memory
    for key in state:
        norm, _, statistic = key.rpartition(".")
        if statistic in ("running_mean", "running_var"):
            if torch.equal(state[f"{norm}.weight"], adapted[f"{norm}.weight"]):
                state[key].copy_(adapted[key])
    return model.to(args.device, memory_format=torch.channels_last).eval()


def draw_lse(file, path, checkpoint, model, args):
    """The middle of five pictures, enlarged by two, and what is said of it. mIoU: of the middles of all pictures.

    The source-only model's prediction of the whole image teaches what LSE-10 keeps of it. Then the predictions of the
    enlarged window, before and after.
    """
    import scale_invariant as lse

    before, size, classes = model_before(path, checkpoint, args), args.size, common.task_classes(args.source)
    thresholds = torch.tensor(common.read_json(path.parent / "pseudo_labels/round1/round.json")["thresholds"])
    dataset, (h, w), rows = common.target_dataset(args, "val", labelled=True), lse.half(size), []
    shown, metrics = set(common.some(range(len(dataset)), 5)), [common.MeanIoU(len(classes)) for _ in range(3)]
    middle = lambda maps: lse.cut(maps, h // 2, w // 2, h, w)
    for index in range(len(dataset)):
        item = dataset[index]
        view, truth = lse.enlarge(middle(item["image"]), size), lse.enlarge_labels(middle(item["label"]), size)
        whole, *seen = (common.predict(one, image[None].to(args.device), size, args)[0].cpu()  # (C, H, W)
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
    common.draw_panel(file, ["window, enlarged by 2", f"whole image: {whole}", "kept of it (LSE-10)",
                             f"window before: {seen}", f"window after: {after}", "truth"], rows, width=146)


def draw_cpsl(file, path, checkpoint, model, args):
    """Class histograms on a logarithmic axis: truth, warm-up, method. Classes that occur, the most frequent first."""
    results = [common.evaluate_target(one, args) for one in (model_before(path, checkpoint, args), model)]
    true = {name: share for name, (_, share) in results[0]["share"].items() if share}  # in percent
    bars = [(DARK, "truth", true)]
    for colour, title, result in zip((ORANGE, BLUE), ("warm-up", "CPSL"), results):
        title = f"{title} (histogram distance {result['histogram_distance']:.1f} %)"
        bars.append((colour, title, {name: share for name, (share, _) in result["share"].items()}))
    picture = Image.new("RGB", (900, 330), "white")
    pen, left, bottom, step = ImageDraw.Draw(picture), 50, 285, 850 / len(true)
    level = lambda percent: bottom - 60 * (2 + math.log10(max(percent, 0.01)))  # 60 pixels for a factor of 10
    for percent in (0.01, 0.1, 1, 10, 100):
        pen.line([left, level(percent), 900, level(percent)], fill="lightgrey")
        write_text(pen, (left - 6, level(percent)), f"{percent:g} %", "rm")
    for x, (colour, title, _) in zip((50, 130, 420), bars):
        pen.rectangle([x, 8, x + 12, 20], fill=colour)
        write_text(pen, (x + 18, 14), title, "lm")
    for i, name in enumerate(sorted(true, key=true.get, reverse=True)):
        x = left + (i + 0.1) * step
        for k, (colour, _, share) in enumerate(bars):
            pen.rectangle([x + k * step / 4, level(share[name]), x + (k + 1) * step / 4 - 2, bottom], fill=colour)
        pen.rectangle([x, bottom + 5, x + 0.75 * step - 2, bottom + 11], fill=class_colour(name))
        write_text(pen, (x + 0.37 * step, bottom + 15), name.replace(" ", "\n"), "ma", 10)
    with common.writing(file) as temporary:
        picture.save(temporary)


@torch.no_grad()
def labelled_features(model, dataset, args):
    """Yields SDCA's representations r (n, D) of the feature grid's labelled pixels, and their labels (n,)."""
    import sdca

    for batch in common.evaluation_batches(dataset, args):
        with common.autocast(args):
            features, _ = model(batch["image"])  # (N, D, h, w)
        y = common.grid_labels(batch["label"].to(args.device), features.shape[2:]).flatten()
        yield sdca.representations(features, args)[y != common.IGNORE], y[y != common.IGNORE]


def class_cosines(model, mean, args):
    """f.mu_y, max_{k != y} f.mu_k and y of the validation pixels, (n,) each, for class means (C, D)."""
    columns, mu = [], F.normalize(mean, dim=1).float()
    for r, y in labelled_features(model, common.target_dataset(args, "val", labelled=True), args):
        similarity, y = F.normalize(r, dim=1) @ mu.T, y[:, None]  # (n, C), (n, 1)
        columns.append(torch.cat([similarity.gather(1, y), similarity.scatter(1, y, -1.0).amax(1, True), y], 1))
    return torch.cat(columns).T.cpu()  # (3, n)


def draw_sdca(file, path, checkpoint, model, args):
    """3000 target pixels by their cosines with the own class mean (up) and the nearest other (right), before and after.

    After: model and class means of sdca.pt, because SSL, which may follow, knows no means.
    """
    import sdca

    args = argparse.Namespace(**{**common.read_json(path.parent / "args.json"), **vars(args)})
    saved, classes = common.read_checkpoint(path.parent / "sdca.pt"), common.task_classes(args.source)
    before, mean = model_before(path, checkpoint, args), saved["feat"]["mean"].to(args.device)
    after = common.unpack_model(saved, path.parent / "sdca.pt").to(args.device).eval()
    statistics = sdca.ClassStatistics(*mean.shape, args.device)
    for r, y in labelled_features(before, common.some(common.source_dataset(args), 400), args):
        statistics.update(r, y)
    sides = class_cosines(before, statistics.mean, args), class_cosines(after, mean, args)
    low = math.floor(10 * min(side[:2].flatten().sort().values[len(side.T) // 100].item() for side in sides)) / 10
    picture = Image.new("RGB", (900, 570), "white")
    pen, width = ImageDraw.Draw(picture), 390
    for left, title, (own, other, y) in zip((50, 505), ("before", "after"), sides):
        u, v = left + width * (other - low) / (1 - low), 30 + width * (1 - own) / (1 - low)  # (n,)
        chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:3000]
        for x, z, c in zip(u[chosen].tolist(), v[chosen].tolist(), y[chosen].int().tolist()):
            if x > left and z < 30 + width:
                pen.ellipse([x - 1.5, z - 1.5, x + 1.5, z + 1.5], fill=class_colour(classes[c]))
        pen.rectangle([left, 30, left + width, 30 + width], outline="black")
        pen.line([left, 30 + width, left + width, 30], fill="black")
        title += f": own {own.mean():.3f}, nearest other {other.mean():.3f}"
        write_text(pen, (left + width / 2, 15), f"{title}; own nearer: {100 * (own > other).float().mean():.0f} %")
        for value in (low, (1 + low) / 2, 1):
            write_text(pen, (left + width * (value - low) / (1 - low), 40 + width), f"{value:.2g}")
            write_text(pen, (left - 5, 30 + width * (1 - value) / (1 - low)), f"{value:.2g}", "rm")
        write_text(pen, (left + width / 2, 56 + width), "cosine with the nearest other class mean")
        write_text(pen, (left + 6, 42), "cosine with the own class mean", "lm")
    write_text(pen, (50, 480), "Pixels above the diagonal, nearer to their own class mean, in %: before, after", "lm")
    for i, c in enumerate(sides[0][2].unique().int().tolist()):
        shares = [100 * (own > other)[y == c].float().mean() for own, other, y in sides]
        x, z = 50 + 170 * (i // 4), 500 + 18 * (i % 4)
        pen.rectangle([x, z - 6, x + 12, z + 6], fill=class_colour(classes[c]))
        write_text(pen, (x + 18, z), f"{classes[c]} {shares[0]:.0f}, {shares[1]:.0f}", "lm")
    with common.writing(file) as temporary:
        picture.save(temporary)


@torch.no_grad()
def modes_of(model, head, item, c, args):
    """(H, W): the nearest mode of class c at every pixel, from distances that are upsampled as logits are."""
    with common.autocast(args):
        features, _ = model(item["image"][None].to(args.device))  # (1, D, h, w)
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


def draw_drsl(file, path, checkpoint, model, args, names=("building", "car")):
    """Pixels of two classes by their nearest mode; on the toy beside their true looks, and the looks of every mode.

    The toy's four pictures are those with the most pixels of these classes in other looks than the picture's commonest.
    """
    import drsl

    if "head" not in checkpoint:
        raise common.InputError(f"{path}: no modes in it; expected last.pt")
    C, K, E = checkpoint["head"]["representatives"].shape
    head, toy = drsl.ModeHead(model.feature_dim, C, K, E), args.source == "toy"
    common.load_weights(head.to(args.device), checkpoint["head"], path, f"{K} modes of {C} classes")
    dataset, scenes = common.target_dataset(args, "val", labelled=True), []
    tables = {name: torch.zeros(K, 3) for name in names}  # pixels by mode and look
    for index in range(len(dataset)) if toy else common.some(range(len(dataset)), 4):
        item, mixed = dataset[index], 1
        row = [common.to_picture(item["image"])]
        for name, table in tables.items():
            c = common.task_classes(args.source).index(name)
            mask, modes = item["label"] == c, modes_of(model, head, item, c, args)  # (H, W)
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
    width = 900 // len(titles) - 4
    if toy:
        size = width, round(width * rows[0][0].height / rows[0][0].width)
        legend = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(legend)
        write_text(pen, (4, 10), "shares in all pictures:", "lm")
        for look, text in enumerate(("look 0, most of the source", "look 1", "look 2, most of the target")):
            pen.rectangle([4, 24 + 18 * look, 16, 36 + 18 * look], fill=LOOKS[look])
            write_text(pen, (22, 30 + 18 * look), text, "lm")
        bars = [(look_bars(table.sum(0, True)), look_bars(table, MODES)) for table in tables.values()]
        rows.append([legend, *sum(bars, ())])
    common.draw_panel(file, titles, rows, width)


IDEAS = {"scale_invariant": draw_lse, "cpsl": draw_cpsl, "sdca": draw_sdca, "drsl": draw_drsl}


# ===================================================== the runs ======================================================


def read_runs(folders):
    """[(seed, contents of result.json)] of finished runs of one task; InputError, naming the folder, if one is not."""
    runs, tasks = [], []
    for folder in folders:
        result, settings = common.read_json(folder / "result.json"), common.read_json(folder / "args.json")
        try:
            result["own"], result["columns"], result["seconds"], result["peak_memory_gb"]
            runs.append((settings["seed"], result))
            tasks.append({key: settings[key] for key in ("source", "toy_world", "toy_images", "backbone", "size")})
        except (KeyError, TypeError) as error:
            raise common.InputError(f"{folder}: not the folder of a finished run (no {error})") from error
        if tasks[-1] != tasks[0]:
            different = [common.as_typed(key, value) for key, value in tasks[-1].items() if value != tasks[0][key]]
            raise common.InputError(f"{folder}: another task than {folders[0]}, {', '.join(different)}")
    return runs


def paired(folders, others):
    """Text, a Markdown table: every mean and meter of two sets of runs, and their difference where both have a seed.

    The difference has the standard error of its mean: what lies within twice of it may be chance.
    """
    sides, all_runs = [], read_runs([*folders, *others])  # {seed: {measure: value}}
    for side, pairs in ((folders, all_runs[:len(folders)]), (others, all_runs[len(folders):])):
        runs = dict(pairs)
        if len(runs) < len(side):
            raise common.InputError(f"{side[0]}, ...: a seed occurs twice; give one run of each seed")
        means = {seed: {title: result.get(key) for title, key in common.MEANS.items()} for seed, result in runs.items()}
        sides.append({seed: {**means[seed], **result.get("meters", {})} for seed, result in runs.items()})
    seeds = sorted(set(sides[0]) & set(sides[1]))
    if not seeds:
        raise common.InputError(f"{folders[0]}, ... and {others[0]}, ...: no seed in common")
    titles = [re.sub(r"-s?\d+$", "", side[0].name) for side in (folders, others)]
    lines = [f"| | seeds | {titles[0]} | {titles[1]} | difference ± standard error |", "|---" * 5 + "|"]
    for measure in sides[0][seeds[0]]:
        a, b = (np.array([side[seed].get(measure) for seed in seeds], np.float64) for side in sides)
        if not np.isnan(a - b).any():
            error = f" ± {(a - b).std(ddof=1) / len(seeds) ** 0.5:.2f}" if len(seeds) > 1 else ""
            cells = [measure, str(len(seeds)), f"{a.mean():.2f}", f"{b.mean():.2f}", f"{(a - b).mean():+.2f}{error}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(folders):
    """Text, a Markdown table: mean and sample standard deviation over the seeds of every column that the runs report.

    Columns of one title are one method: where runs share a source-only model, it counts once per seed. Seconds and
    memory are those of the runs whose own result it is.
    """
    columns, costs = {}, {}  # {title: {seed: scores}}, {title: [(seconds, GB)]}
    for folder, (seed, result) in zip(folders, read_runs(folders)):
        costs.setdefault(result["own"], []).append((result["seconds"], result["peak_memory_gb"]))
        for title, scores in result["columns"].items():
            known = columns.setdefault(title, {}).setdefault(seed, scores)
            if abs(known["miou"] - scores["miou"]) > 0.1:  # a GPU may differ in the last digits
                raise common.InputError(f"{folder}: another result of {title!r} with seed {seed}; summarise it apart")
    lines = ["| | seeds | " + " | ".join(common.MEANS) + " | seconds | GB |", "|---" * (4 + len(common.MEANS)) + "|"]
    for title, seeds in columns.items():
        cells = [title, str(len(seeds))]
        for key in common.MEANS.values():
            values = np.array([scores[key] for scores in seeds.values() if scores.get(key) is not None])
            deviation = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{deviation}" if len(values) else "-")
        if title in costs:
            seconds, memory = zip(*costs[title])
            cells += [f"{np.mean(seconds):.0f}", f"{max(memory):.1f}"]
        else:
            cells += ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CKPT", type=Path, help="checkpoints of any method, scored in this order")
    add("--summary", nargs="+", metavar="RUN", type=Path, help="instead: mean and deviation over these run folders")
    add("--against", nargs="+", metavar="RUN", type=Path, help="with --summary: differences to these, paired by seed")
    add("--images", nargs="+", metavar="FILE|DIR", type=Path, help="instead of scoring: segment these PNGs and JPEGs")
    add("--data-root", metavar="DIR", help="holds cityscapes/; the toy world needs none")
    add("--split", choices=("train", "val"), default="val", help="of the target; its labels are opened either way")
    add("--size", type=common.height_width, metavar="HxW", help="input size; None means the checkpoint's")
    add("--scales", type=common.positive, nargs="+", default=[1.0], metavar="X", help="input scales to average over")
    add("--flip", action="store_true", help="average with the mirror image")
    add("--panel", type=common.png_file, metavar="FILE.png", help="draw image | truth | one column per checkpoint")
    add("--idea", type=common.png_file, metavar="FILE.png",
        help="instead of scoring: draw what is special to the method of the one checkpoint; needs its run folder")
    add("--export", type=Path, metavar="DIR", help="write predictions as PNGs; with --images None means predictions")
    add("--json", type=Path, metavar="FILE", help="write the table as JSON")
    common.add_machine_flags(parser)
    args = parser.parse_args()
    args.checkpoints = list(dict.fromkeys(args.checkpoints))
    if args.against and not args.summary:
        parser.error("--against needs --summary with the runs to compare")
    if bool(args.checkpoints) == bool(args.summary):
        parser.error("give either checkpoints or --summary with run folders")
    if args.idea and len(args.checkpoints) != 1:
        parser.error("--idea draws one checkpoint")
    ignored = {"summary": ("idea", "images", "panel", "export", "json", "flip"),
               "idea": ("images", "panel", "export", "json", "flip"), "images": ("data_root", "json")}
    for mode in [mode for mode in ignored if getattr(args, mode)]:
        for key in [key for key in ignored[mode] if getattr(args, key)]:
            parser.error(f"--{key.replace('_', '-')} has no effect with --{mode}")
    return args


def main():
    args = parse_args()
    if args.summary:
        print(paired(args.summary, args.against) if args.against else summary(args.summary))
        return
    common.start_processes(args)
    if common.world_size() > 1 and (args.images or args.idea):
        raise common.InputError("--images and --idea are work for one process, without torchrun")
    models, tasks = {}, []
    for path, title in zip(args.checkpoints, titles_of(args.checkpoints)):
        checkpoint = common.read_checkpoint(path)
        model = common.unpack_model(checkpoint, path).to(args.device, memory_format=torch.channels_last)
        models[title] = model
        task = argparse.Namespace(**vars(args))
        for key in ("source", "toy_world", "toy_images"):
            setattr(task, key, checkpoint[key])
        task.size = args.size or tuple(checkpoint["size"])
        if isinstance(task.workers, common.BySource):
            task.workers = task.workers[task.source]
        tasks.append(task)
    if args.idea:
        if checkpoint["method"] not in IDEAS:
            raise common.InputError(f"{path}: a checkpoint of {checkpoint['method']}; --idea draws {', '.join(IDEAS)}")
        IDEAS[checkpoint["method"]](args.idea, path, checkpoint, model.eval(), tasks[0])
        return
    export_to = args.export or (Path("predictions") if args.images else None)
    folders = [export_to / title.replace("/", "-") if export_to and len(models) > 1 else export_to for title in models]
    if args.images:
        segment_pictures(models, tasks, folders, args)
        return
    if args.panel and len({(task.source, task.toy_world, task.size) for task in tasks}) > 1:
        raise common.InputError("--panel needs checkpoints of one source, toy world and size")

    columns = {}
    for (title, model), task, folder in zip(models.items(), tasks, folders):
        def visit(batch, pred):
            for name, one in zip(batch["name"], pred.byte().cpu().numpy()):
                export(folder, name, one, common.task_classes(task.source))

        columns[title] = common.evaluate_target(model, task, args.split, scales=args.scales, flip=args.flip,
                                                visit=visit if folder else None)
    if common.rank() == 0:
        print(common.score_table(columns))
        if args.json:
            common.write_json(args.json, columns)
    if args.panel:
        common.comparison_panel(args.panel, models, tasks[0], args.split)


if __name__ == "__main__":
    common.run(main)
