"""Scores, compares, draws and exports checkpoints of any method; segments pictures of your own.

    python evaluate.py runs/source_only-toy-s0/last.pt runs/drsl-toy-s0/last.pt --panel compare.png
    python evaluate.py CKPT --data-root DIR --scales 0.75 1.0 1.25 --flip
    python evaluate.py CKPT --data-root DIR --export predictions      # for the official Cityscapes evaluator
    python evaluate.py CKPT --images holiday.jpg photos/              # no labels, no data root
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
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import common

PICTURES = (".png", ".jpg", ".jpeg")


def titles_of(paths):
    """A short distinct name per checkpoint: the file's stem, or with parent folders where stems repeat."""
    for depth in range(1, 1 + max(len(path.parts) for path in paths)):
        titles = ["/".join(path.with_suffix("").parts[-depth:]) for path in paths]
        if len(set(titles)) == len(titles) and "last" not in titles:
            break
    return titles


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
    prob = common.predict(model, item["image"][None].to(args.device), size, args)  # (1, C, h, w)
    prob = F.interpolate(prob, size=(H, W), mode="bilinear")
    return picture, prob.max(1).indices[0].byte().cpu().numpy()


def segment_pictures(models, tasks, folders, args):
    """Writes the predictions of every model for the pictures of --images, and the panel if asked."""
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
        rows.append([picture, *row])
    if args.panel:
        common.draw_panel(args.panel, ["image", *models], rows)
    print(f"{len(pictures)} pictures segmented; written to {', '.join(map(str, folders))}")


def read_run(folder):
    """(seed, contents of result.json) of a finished run."""
    result, settings = common.read_json(folder / "result.json"), common.read_json(folder / "args.json")
    try:
        result["own"], result["columns"], result["seconds"], result["peak_memory_gb"]
        return settings["seed"], result
    except (KeyError, TypeError) as error:
        raise common.InputError(f"{folder}/result.json: not the result of a finished run (no {error})") from error


def paired(folders, others):
    """Text, a Markdown table: every mean and meter of two sets of runs, and their difference where both have a seed.

    The difference has the standard error of its mean: what lies within twice of it may be chance.
    """
    sides = []  # {seed: {measure: value}}
    for side in (folders, others):
        runs = dict(map(read_run, side))
        if len(runs) < len(side):
            raise common.InputError(f"{side[0]}, ...: a seed occurs twice; give one run of each seed")
        means = {seed: {title: result.get(key) for title, key in common.MEANS.items()} for seed, result in runs.items()}
        sides.append({seed: {**means[seed], **result.get("meters", {})} for seed, result in runs.items()})
    seeds = sorted(set(sides[0]) & set(sides[1]))
    if not seeds:
        raise common.InputError(f"{folders[0]}, ... and {others[0]}, ...: no seed in common")
    titles = [side[0].name.rstrip("-0123456789") or side[0].name for side in (folders, others)]
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
    for folder in folders:
        seed, result = read_run(folder)
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
    add("--export", type=Path, metavar="DIR", help="write predictions as PNGs; with --images None means predictions")
    add("--json", type=Path, metavar="FILE", help="write the table as JSON")
    common.add_machine_flags(parser)
    args = parser.parse_args()
    args.workers = 0 if isinstance(args.workers, common.BySource) else args.workers
    if args.against and not args.summary:
        parser.error("--against needs --summary with the runs to compare")
    if bool(args.checkpoints) == bool(args.summary):
        parser.error("give either checkpoints or --summary with run folders")
    return args


def main():
    args = parse_args()
    if args.summary:
        print(paired(args.summary, args.against) if args.against else summary(args.summary))
        return
    common.start_processes(args)
    models, tasks = {}, []
    for path, title in zip(args.checkpoints, titles_of(args.checkpoints)):
        checkpoint = common.read_checkpoint(path)
        models[title] = common.unpack_model(checkpoint, path).to(args.device, memory_format=torch.channels_last)
        task = argparse.Namespace(**vars(args))
        for key in ("source", "toy_world", "toy_images"):
            setattr(task, key, checkpoint[key])
        task.size = args.size or tuple(checkpoint["size"])
        tasks.append(task)
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
