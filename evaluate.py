"""Scores, compares and exports checkpoints of any method; segments pictures of your own.

    python evaluate.py runs/source_only-toy-s0/last.pt runs/drsl-toy-s0/last.pt --panel compare.png
    python evaluate.py CKPT --data-root DIR --scales 0.75 1.0 1.25 --flip
    python evaluate.py CKPT --data-root DIR --export predictions      # for the official Cityscapes evaluator
    python evaluate.py CKPT --images holiday.jpg photos/              # no labels, no data root
    python evaluate.py --summary runs/drsl-? runs/plain-?             # mean ± deviation, one row per method
    python evaluate.py --summary runs/drsl-? --against runs/plain-?   # paired differences ± standard error

One table: classes down, checkpoints across; then mIoU (the mean over the classes that occur in the labels), for models
of the 16 SYNTHIA classes also the mean over 13, the mean over the long tail, and the total variation distance between
the predicted and the true class histogram. Source, size (unless --size is given) and classes come from the checkpoint.
Images go in at that size, logits are upsampled to the labels' full resolution, one confusion matrix collects the whole
split. Several scales and mirror images are averaged as probabilities; the numbers of this project are single-scale.

`--summary` reads run folders of several worlds and seeds. A replicate is a pair of both, and errors are over
replicates: several worlds measure a method, several seeds of one world only the chance in its training. `--against`
pairs the runs of two sets by replicate.

`--export DIR` writes two folders, because the official evaluator accepts one file per image in the folder it searches:

    DIR/labelIds/CITY_SEQUENCE_FRAME_pred_labelIds.png    Cityscapes labelIds at label resolution: CITYSCAPES_RESULTS
    DIR/color/CITY_SEQUENCE_FRAME_pred_color.png          the same in the official colours

With `--images` a third one, DIR/overlay/NAME_overlay.png, has the colours over the picture; all three have the
picture's own size. The picture goes into the network at the height of --size, its proportions kept. With several
checkpoints each gets such folders in a folder of its own. Cityscapes' test split, which has no public labels, is
segmented in this way too: --images cityscapes/leftImg8bit/test.
"""

import argparse
import importlib
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import common

METHODS = ("scale_invariant", "cpsl", "sdca", "drsl")


def load_checkpoint(path, device):
    """Contents of a checkpoint and its network on the device: DeepLabV2, or a class in the file of its method."""
    checkpoint, network = common.read_checkpoint(path), common.DeepLabV2
    if isinstance(checkpoint, dict) and checkpoint.get("method") in METHODS:
        found = getattr(importlib.import_module(checkpoint["method"]), str(checkpoint.get("network")), None)
        network = found if isinstance(found, type) and issubclass(found, torch.nn.Module) else network
    model = common.unpack_model(checkpoint, path, network=network)
    return checkpoint, model.to(device, memory_format=torch.channels_last).eval()


def task_of(checkpoint, args):
    """The arguments with the task, source, world and size, of a checkpoint."""
    task = argparse.Namespace(**vars(args))
    for key in ("source", "toy_world", "toy_images"):
        setattr(task, key, checkpoint[key])
    task.size = tuple(getattr(args, "size", None) or checkpoint["size"])
    if isinstance(task.workers, common.BySource):
        task.workers = task.workers[task.source]
    return task


def titles_of(paths):
    """A short distinct name per checkpoint: the file's stem, with parent folders where stems repeat, or its path."""
    for depth in range(1, 1 + max(len(path.parts) for path in paths)):
        titles = ["/".join(path.with_suffix("").parts[-depth:]) for path in paths]
        if len(set(titles)) == len(titles) and "last" not in titles:
            return titles
    return titles if len(set(titles)) == len(titles) else list(map(str, paths))


# ==================================================== predictions ====================================================


def export(folder, name, pred, classes):
    """Writes a prediction (H, W) as labelId and colour PNGs below `folder`; returns the colour picture."""
    ids = np.array(common.label_ids(classes), np.uint8)
    colour = common.colour_label(pred, classes)
    for kind, picture in (("labelIds", Image.fromarray(ids[pred])), ("color", colour)):
        with common.writing(folder / kind / f"{name}_pred_{kind}.png") as temporary:
            picture.save(temporary)
    return colour


def find_pictures(paths):
    """{name: path} of the PNG and JPEG files among `paths` and in the folders among them; InputError without any.

    The name is the file's, or its whole path where a file name occurs twice.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise common.InputError(f"{path}: no such file or folder")
        inside = [path]
        if path.is_dir():  # files whose name begins with a dot are not the user's
            inside = sorted(p for p in path.rglob("[!.]*") if p.suffix.lower() in common.PICTURES)
        if not inside:
            raise common.InputError(f"{path}: no picture found; expected files in {', '.join(common.PICTURES)}")
        found += inside
    found = list(dict.fromkeys(found))
    stems = [path.stem for path in found]
    names = [path.stem if stems.count(path.stem) == 1 else "-".join(path.parts).strip("/") for path in found]
    return dict(zip(names, found))


def segment(model, path, task):
    """The picture of a file, upright, and its prediction: PIL RGB, class indices uint8 (H, W)."""
    picture = ImageOps.exif_transpose(common.read_image(path))
    W, H = picture.size
    size = (task.size[0], max(8, round(task.size[0] * W / H / 8) * 8))  # proportions kept, multiples of 8
    item = common.make_item(picture, None, path.stem, size, None)
    image = common.normalise(item["image"][None].to(task.device))
    prob = common.predict(model, image, size, task, task.scales, task.flip)  # (1, C, h, w)
    prob = F.interpolate(prob, size=(H, W), mode="bilinear")
    return picture, prob.max(1).indices[0].byte().cpu().numpy()


def segment_pictures(models, tasks, folders, args):
    """Writes the predictions of every model for the pictures of --images; the first eight into the panel if asked."""
    pictures, rows = find_pictures(args.images), []
    for name, path in pictures.items():
        row = []
        for model, task, folder in zip(models.values(), tasks, folders):
            picture, pred = segment(model, path, task)
            overlay = Image.blend(picture, export(folder, name, pred, common.task_classes(task.source)), 0.5)
            with common.writing(folder / "overlay" / f"{name}_overlay.png") as temporary:
                overlay.save(temporary)
            row.append(overlay)
        if args.panel and len(rows) < 8:
            rows.append([ImageOps.pad(shown, (640, 320), color="white") for shown in (picture, *row)])
    if args.panel:
        common.draw_panel(args.panel, ["image", *models], rows)
    print(f"{len(pictures)} pictures segmented; written to {', '.join(map(str, folders))}")


def score(model, task, folder):
    """`common.scores` of a model on the target's --split; its predictions go to `folder`, if that is not None."""
    def visit(batch, pred):
        for name, one in zip(batch["name"], pred.byte().cpu().numpy()):
            export(folder, name, one, common.task_classes(task.source))

    common.target_dataset(task, task.split, labelled=False)
    try:
        common.target_dataset(task, task.split, labelled=True)
    except common.InputError as error:
        raise common.InputError(f"{error}; without labels there is no score, but --images shows predictions") from error
    return common.evaluate_target(model, task, task.split, scales=task.scales, flip=task.flip,
                                  visit=visit if folder else None)


# ===================================================== the runs ======================================================


def read_runs(folders):
    """[((world, seed), contents of result.json)] of finished runs; InputError, naming the folder, if one is not.

    All runs must be of one task, whose worlds and seeds alone may differ.
    """
    runs, tasks = [], []
    for folder in folders:
        result, settings = common.read_json(folder / "result.json"), common.read_json(folder / "args.json")
        try:
            result["own"], result["columns"], result["seconds"], result["peak_memory_gb"]
            runs.append(((settings["toy_world"], settings["seed"]), result))
            tasks.append({key: settings[key] for key in ("source", "toy_images", "backbone", "size")})
        except (KeyError, TypeError) as error:
            raise common.InputError(f"{folder}: not the folder of a finished run (no {error})") from error
        if different := [f"{key} {value}" for key, value in tasks[-1].items() if value != tasks[0][key]]:
            raise common.InputError(f"{folder}: another task than {folders[0]}, {', '.join(different)}")
    return runs


def counted(replicates):
    """Text: how many worlds and seeds are in the pairs of both, such as "8 worlds, 1 seed"."""
    numbers = [len(set(side)) for side in zip(*replicates)]
    return ", ".join(f"{n} {what}{'s' * (n > 1)}" for n, what in zip(numbers, ("world", "seed")))


def t_bound(freedom):
    """What |t| exceeds with a probability of 5 % if there is no difference, at so many degrees of freedom.

    With t = sqrt(freedom) tan(angle), the density of the angle is in proportion to cos(angle) ** (freedom - 1).
    """
    angle = (np.arange(10**6) + 0.5) * (math.pi / 2 / 10**6)
    mass = np.cumsum(np.cos(angle) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(angle[np.searchsorted(mass, 0.95 * mass[-1])])


def differences(folders, others):
    """Text, a Markdown table: every mean and meter of two sets of runs, and their difference, paired by replicate."""
    sides, all_runs = [], read_runs([*folders, *others])  # {(world, seed): {measure: value}}
    for side, pairs in ((folders, all_runs[:len(folders)]), (others, all_runs[len(folders):])):
        runs = dict(pairs)
        if len(runs) < len(side):
            raise common.InputError(f"{side[0]}, ...: a pair of world and seed occurs twice; give one run of each")
        sides.append({pair: {title: result.get(key) for title, key in common.MEANS.items()} | result.get("meters", {})
                      for pair, result in runs.items()})
    pairs = sorted(set(sides[0]) & set(sides[1]))
    if not pairs:
        raise common.InputError(f"{folders[0]}, ... and {others[0]}, ...: no pair of world and seed in common")
    lines = [f"Difference of means over {counted(pairs)}, paired ({len(pairs)} pairs)."]
    if len(pairs) > 1:
        bound = t_bound(len(pairs) - 1)
        lines = [f"Difference of means ± standard error over {counted(pairs)}, paired ({len(pairs)} pairs). "
                 f"Bold, gain or loss: beyond the 5 % bound of a two-sided t-test, {bound:.2f} standard errors."]
    names = [re.sub(r"-s?\d+$", "", side[0].name) for side in (folders, others)]
    lines += ["", f"| | runs | {names[0]} | {names[1]} | difference |", "|---" * 5 + "|"]
    for measure in sides[0][pairs[0]]:
        a, b = (np.array([side[pair].get(measure) for pair in pairs], np.float64) for side in sides)
        if np.isnan(a - b).any():
            continue
        text = f"{(a - b).mean():+.2f}"
        if len(pairs) > 1:
            error = (a - b).std(ddof=1) / math.sqrt(len(pairs))
            text = f"{text} ± {error:.2f}"
            text = f"**{text}**" if abs((a - b).mean()) > bound * error else text
        lines.append(f"| {measure} | {len(pairs)} | {a.mean():.2f} | {b.mean():.2f} | {text} |")
        if measure == "mIoU" and len(pairs) > 1:
            each = ", ".join(f"{world}/{seed} {d:+.1f}" for (world, seed), d in zip(pairs, a - b))
            lines[0] += f" mIoU in each world/seed: {each}."
    return "\n".join(lines)


def summary(folders):
    """Text, a Markdown table: mean and sample standard deviation over the replicates of every column in the runs.

    Columns of one title are one method: where runs share a source-only model, it counts once per replicate. Seconds
    and memory are those of the runs whose own result it is.
    """
    columns, costs, runs = {}, {}, read_runs(folders)  # {title: {(world, seed): scores}}, {title: [(seconds, GB)]}
    for folder, (pair, result) in zip(folders, runs):
        costs.setdefault(result["own"], []).append((result["seconds"], result["peak_memory_gb"]))
        for title, scores in result["columns"].items():
            known = columns.setdefault(title, {}).setdefault(pair, scores)
            if abs((known["miou"] or 0) - (scores["miou"] or 0)) > 0.1:  # a GPU may differ in the last digits
                raise common.InputError(f"{folder}: another result of {title!r} in world {pair[0]}, seed {pair[1]}; "
                                        "summarise it apart")
    lines = [f"Mean ± standard deviation over {counted([pair for pair, _ in runs])}.", "",
             "| | runs | " + " | ".join(common.MEANS) + " | seconds | GB |", "|---" * (4 + len(common.MEANS)) + "|"]
    for title, replicates in columns.items():
        cells = [title, str(len(replicates))]
        for key in common.MEANS.values():
            values = np.array([scores[key] for scores in replicates.values() if scores.get(key) is not None])
            deviation = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{deviation}" if len(values) else "-")
        seconds, memory = zip(*costs[title]) if title in costs else ((), ())
        cells += [f"{np.mean(seconds):.0f}", f"{max(memory):.1f}"] if seconds else ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CKPT", type=Path, help="checkpoints of any method, scored in this order")
    add("--summary", nargs="+", metavar="RUN", type=Path, help="instead: mean and deviation over these run folders")
    add("--against", nargs="+", metavar="RUN", type=Path, help="with --summary: paired differences to these runs")
    add("--images", nargs="+", metavar="FILE|DIR", type=Path, help="instead of scoring: segment these PNGs and JPEGs")
    add("--data-root", metavar="DIR", help="holds cityscapes/; the toy world needs none")
    add("--split", choices=("train", "val"), default="val", help="of the target; its labels are opened either way")
    add("--size", type=common.height_width, metavar="HxW", help="input size; None means the checkpoint's")
    add("--scales", type=common.positive, nargs="+", default=[1.0], metavar="X", help="input scales to average over")
    add("--flip", action="store_true", help="average with the mirror image")
    add("--panel", type=Path, metavar="FILE.png", help="draw image | truth | one column per checkpoint")
    add("--export", type=Path, metavar="DIR", help="write predictions as PNGs; with --images None means predictions")
    add("--json", type=Path, metavar="FILE", help="write the table as JSON")
    common.add_machine_flags(parser)
    args = parser.parse_args(argv)
    args.checkpoints = list(dict.fromkeys(args.checkpoints))
    if args.against and not args.summary:
        parser.error("--against needs --summary with the runs to compare")
    if bool(args.checkpoints) == bool(args.summary):
        parser.error("give either checkpoints or --summary with run folders")
    if args.panel and args.panel.suffix.lower() != ".png":
        parser.error(f"--panel {args.panel}: expected a name that ends in .png")
    useless = {"summary": ("images", "panel", "export", "json", "flip"), "images": ("data_root", "json")}
    for mode, key in ((mode, key) for mode, keys in useless.items() for key in keys):
        if getattr(args, mode) and getattr(args, key):
            parser.error(f"--{key.replace('_', '-')} has no effect with --{mode}")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.summary:
        print(differences(args.summary, args.against) if args.against else summary(args.summary))
        return
    common.start_processes(args)
    if common.world_size() > 1 and args.images:
        raise common.InputError("--images is work for one process, without torchrun")
    models, tasks = {}, []
    for path, title in zip(args.checkpoints, titles_of(args.checkpoints)):
        checkpoint, models[title] = load_checkpoint(path, args.device)
        tasks.append(task_of(checkpoint, args))
    export_to = args.export or (Path("predictions") if args.images else None)
    folders = [export_to / title.replace("/", "-") if export_to and len(models) > 1 else export_to for title in models]
    if args.images:
        segment_pictures(models, tasks, folders, args)
        return
    if args.panel and len({(task.source, task.toy_world, task.size) for task in tasks}) > 1:
        raise common.InputError("--panel needs checkpoints of one source, toy world and size")
    columns = {title: score(models[title], task, folder) for title, task, folder in zip(models, tasks, folders)}
    if common.rank() == 0:
        print(common.score_table(columns))
        if args.json:
            common.write_json(args.json, columns)
    if args.panel:
        common.comparison_panel(args.panel, models, tasks[0], args.split)


if __name__ == "__main__":
    common.run(main)
