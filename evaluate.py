"""Scores, compares, draws and exports checkpoints of any method.

    python evaluate.py runs/source_only-toy-s0/last.pt runs/drsl-toy-s0/last.pt --panel compare.png
    python evaluate.py CKPT --data-root DIR --scales 0.75 1.0 1.25 --flip
    python evaluate.py CKPT --data-root DIR --export predictions      # for the official Cityscapes evaluator
    python evaluate.py --summary runs/drsl-0 runs/drsl-1 runs/drsl-2   # mean ± deviation over seeds, one row per method

One table: classes down, checkpoints across; then mIoU (the mean over the classes that occur in the labels), for models of
the 16 SYNTHIA classes also the mean over 13, the mean over the long tail, and `misplaced`, the share of pixels by which the
predicted class histogram is wrong. Source, size (unless --size is given) and classes come from the checkpoint. Images go in at
that size, logits are upsampled to the labels' full resolution, one confusion matrix collects the whole split. Several scales
and mirror images are averaged as probabilities; the numbers of this project are single-scale.

`--export DIR` writes two folders, because the official evaluator accepts one file per image in the folder it searches:

    DIR/labelIds/CITY_SEQUENCE_FRAME_pred_labelIds.png    Cityscapes labelIds at label resolution: CITYSCAPES_RESULTS
    DIR/color/CITY_SEQUENCE_FRAME_pred_color.png          the same in the official colours

With several checkpoints each gets such a pair in a folder of its own.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common


def titles_of(paths):
    """A short distinct name per checkpoint: the file's stem, or with parent folders where stems repeat."""
    for depth in range(1, 1 + max(len(path.parts) for path in paths)):
        titles = ["/".join(path.with_suffix("").parts[-depth:]) for path in paths]
        if len(set(titles)) == len(titles) and "last" not in titles:
            break
    return titles


def exporter(folder, classes):
    """A function (names, predictions (N, H, W)) that writes labelId and colour PNGs below `folder`."""
    ids = np.array(common.label_ids(classes), np.uint8)
    for kind in ("labelIds", "color"):
        (folder / kind).mkdir(parents=True, exist_ok=True)

    def export(names, predictions):
        for name, prediction in zip(names, predictions.cpu().numpy()):
            Image.fromarray(ids[prediction]).save(folder / "labelIds" / f"{name}_pred_labelIds.png")
            common.colour_label(prediction, classes).save(folder / "color" / f"{name}_pred_color.png")

    return export


def summary(folders):
    """Text, a Markdown table: mean and sample standard deviation over the seeds of every column that the runs report.

    Columns of one title are one method: where runs share a source-only model, it counts once per seed. Seconds and memory
    are those of the runs whose own result it is.
    """
    columns, costs = {}, {}  # {title: {seed: scores}}, {title: [(seconds, GB)]}
    for folder in folders:
        try:
            result = json.loads((folder / "result.json").read_text())
            seed = json.loads((folder / "args.json").read_text())["seed"]
            reported = result["columns"]
            costs.setdefault(result["own"], []).append((result["seconds"], result["peak_memory_gb"]))
        except (OSError, ValueError, KeyError) as error:
            raise common.InputError(f"{folder / 'result.json'}: not the result of a finished run ({type(error).__name__})") from error
        for title, scores in reported.items():
            known = columns.setdefault(title, {}).setdefault(seed, scores)
            if abs(known["miou"] - scores["miou"]) > 0.1:  # a GPU may differ in the last digits
                raise common.InputError(f"{folder}: another result of {title!r} with seed {seed}; summarise such runs apart")
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


def positive(text):
    """argparse type: a number above zero."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CKPT", type=Path, help="checkpoints of any method, scored in this order")
    add("--summary", nargs="+", metavar="RUN", type=Path, help="instead: mean and deviation over these run folders")
    add("--data-root", metavar="DIR", help="holds cityscapes/; the toy world needs none")
    add("--split", choices=("train", "val"), default="val", help="of the target; its labels are opened either way")
    add("--size", type=common.height_width, metavar="HxW", help="input size; None means the checkpoint's")
    add("--scales", type=positive, nargs="+", default=[1.0], metavar="X", help="input scales to average over")
    add("--flip", action="store_true", help="average with the mirror image")
    add("--panel", type=common.png_file, metavar="FILE.png", help="draw image | truth | one column per checkpoint")
    add("--export", type=Path, metavar="DIR", help="write the predictions as PNGs")
    add("--json", type=Path, metavar="FILE", help="write the table as JSON")
    add("--device", type=common.available_device, choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--precision", choices=("fp32", "bf16"), default=common.default_precision(), help="of the network")
    add("--workers", type=common.natural_number, default=0, metavar="N", help="processes that read images")
    args = parser.parse_args()
    if bool(args.checkpoints) == bool(args.summary):
        parser.error("give either checkpoints or --summary with run folders")
    return args


def main():
    args = parse_args()
    if args.summary:
        print(summary(args.summary))
        return
    checkpoints = [common.read_checkpoint(path) for path in args.checkpoints]
    networks = [common.unpack_model(checkpoint, path) for checkpoint, path in zip(checkpoints, args.checkpoints)]
    tasks = []
    for checkpoint in checkpoints:
        task = argparse.Namespace(**vars(args))
        task.source, task.toy_world, task.toy_images = (checkpoint[key] for key in ("source", "toy_world", "toy_images"))
        task.size = args.size or tuple(checkpoint["size"])
        tasks.append(task)
    if args.panel and len({(task.source, task.toy_world, task.size) for task in tasks}) > 1:
        raise common.InputError("--panel needs checkpoints of one source, toy world and size")

    columns, models = {}, {}
    for checkpoint, model, task, title in zip(checkpoints, networks, tasks, titles_of(args.checkpoints)):
        visit = None
        if args.export is not None:
            folder = args.export / title.replace("/", "-") if len(checkpoints) > 1 else args.export
            visit = exporter(folder, checkpoint["classes"])
        models[title] = model.to(args.device, memory_format=torch.channels_last)
        columns[title] = common.evaluate_target(model, task, args.split, scales=args.scales, flip=args.flip, visit=visit)
    print(common.score_table(columns))
    if args.json:
        common.write_atomically(args.json, lambda path: path.write_text(json.dumps(columns, indent=1)))
    if args.panel:
        common.comparison_panel(args.panel, models, tasks[0], args.split)


if __name__ == "__main__":
    common.run(main)
