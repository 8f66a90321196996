"""Everything that is not any paper's idea: data sets, DeepLabV2, mIoU, run folders, the toy world.

The method files (`source_only.py`, `drsl.py`, ...) import this module and nothing else of the project. There is no
loss, no pseudo-label rule and no training loop in here.

Letters that mean the same in every file:
    N  images in a batch        C  classes, index c      D  feature channels      n  a list of pixels
    H x W  image, in pixels     h x w  feature grid, one cell for 8 x 8 pixels
    x  image    y  label    _s  of the source    _t  of the target    P  softmax probabilities
Labels are indices into the task's class list; 255 means "ignore" wherever a label can stand.

In this order: classes and ids - files - data sets - augmentation and batches - networks - mIoU and pictures - command
line and run folder - several processes - looking at data - the toy world.

Look at a data set before you train on it (counts, sizes, class shares, what is wrong with files, a preview picture):

    python common.py                                     # the built-in toy world
    python common.py --source synthia --data-root DIR    # SYNTHIA -> Cityscapes
"""

import argparse
import bisect
import collections
import contextlib
import copy
import functools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

IGNORE = 255


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line: what was found, where, what was expected."""


def one_line(error):
    """What an exception says, its last line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


# ================================================== classes and ids ==================================================

# Cityscapes name: (labelId on disk, also in GTA5; raw SYNTHIA id; official colour), in trainId order.
_CLASSES = {
    "road": (7, 3, (128, 64, 128)),
    "sidewalk": (8, 4, (244, 35, 232)),
    "building": (11, 2, (70, 70, 70)),
    "wall": (12, 21, (102, 102, 156)),
    "fence": (13, 5, (190, 153, 153)),
    "pole": (17, 7, (153, 153, 153)),
    "traffic light": (19, 15, (250, 170, 30)),
    "traffic sign": (20, 9, (220, 220, 0)),
    "vegetation": (21, 6, (107, 142, 35)),
    "terrain": (22, 16, (152, 251, 152)),
    "sky": (23, 1, (70, 130, 180)),
    "person": (24, 10, (220, 20, 60)),
    "rider": (25, 17, (255, 0, 0)),
    "car": (26, 8, (0, 0, 142)),
    "truck": (27, 18, (0, 0, 70)),
    "bus": (28, 19, (0, 60, 100)),
    "train": (31, 20, (0, 80, 100)),
    "motorcycle": (32, 12, (0, 0, 230)),
    "bicycle": (33, 11, (119, 11, 32)),
}
CLASSES = tuple(_CLASSES)  # 19 names in trainId order
SYNTHIA_16 = tuple(c for c in CLASSES if c not in ("terrain", "truck", "train"))
SYNTHIA_13 = tuple(c for c in SYNTHIA_16 if c not in ("wall", "fence", "pole"))
# The long tail: the classes that the statistics figure of CPSL marks.
RARE = ("wall", "fence", "traffic light", "traffic sign", "rider", "truck", "bus", "train", "motorcycle", "bicycle")


def task_classes(source):
    """Names of the classes that a model of this source predicts: 19 for gta5, 16 for synthia and toy."""
    return CLASSES if source == "gta5" else SYNTHIA_16


def label_ids(classes):
    """Cityscapes labelId of each class, in the order of `classes`: what the official evaluator reads."""
    return [_CLASSES[name][0] for name in classes]


def id_table(classes, column):
    """uint8 (256,): id on disk -> index into `classes`, 255 for every other id. column 0: labelIds, 1: SYNTHIA."""
    table = np.full(256, IGNORE, np.uint8)
    table[[_CLASSES[name][column] for name in classes]] = range(len(classes))
    return table


def palette(classes):
    """uint8 (256, 3): colour of each class index in the official Cityscapes colours; 255 (ignore) is black."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:len(classes)] = [_CLASSES[name][2] for name in classes]
    return colours


# ======================================================= files =======================================================

PICTURES = (".png", ".jpg", ".jpeg")  # in capitals too
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on a bad file


def open_image(path, what="image"):
    """The decoded PIL image of a file. Raises InputError, naming the file, if it cannot be read."""
    try:
        image = Image.open(path)
        image.info["stored"] = image.tile[0][3] if image.tile else image.mode  # before loading unpacks it
        image.load()
        return image
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot read this {what} ({one_line(error)})") from error


def read_image(path):
    """PIL image, RGB (an alpha channel is dropped)."""
    image = open_image(path)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would cut off at 255 what is brighter
        image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def read_label(path):
    """uint8 (H, W): the ids of an 8-bit or palette PNG as they stand in the file, never converted to colours."""
    image = open_image(path, "label")
    stored = image.info["stored"] if image.format == "PNG" else image.mode
    # A JPEG would blur ids, and those of a grey PNG of 2 or 4 bits (L;2, L;4) are stretched by Pillow to 0 .. 255.
    if image.format != "PNG" or stored not in ("L", "P", "P;1", "P;2", "P;4"):
        raise InputError(f"{path}: expected a PNG of 8-bit class ids, found {image.format} of mode {stored}")
    return np.array(image)


def read_synthia_label(path):
    """uint8 (H, W): raw SYNTHIA class ids of a 16-bit RGB label PNG, the id standing in the first channel.

    Pillow reduces 16-bit RGB to 8 bits by keeping the *high* byte, which is 0 for every id. Telling it that the
    file's only tile is little-endian makes it keep the low byte: PNG is big-endian, so the byte that Pillow then
    takes for the high one is the low one.
    """
    try:
        image = Image.open(path)
        if not image.tile or image.tile[0][3] != "RGB;16B":
            raise InputError(f"{path}: expected a 16-bit RGB PNG as in GT/LABELS, found mode {image.mode}")
        codec, box, offset, _ = image.tile[0]
        image.tile = [(codec, box, offset, "RGB;16L")]
        return np.array(image)[:, :, 0]  # (H, W, 3) -> (H, W)
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot read this label ({one_line(error)})") from error


def find_folder(root, relative):
    """Path of `relative` below `root`, spelt like that or all in lower case. Raises InputError if missing."""
    if root is None:
        raise InputError("no --data-root given: it must hold GTA5/ or RAND_CITYSCAPES/, and cityscapes/")
    for path in (Path(root, relative), Path(root, relative.lower())):
        if path.is_dir():
            return path
    raise InputError(f"{Path(root, relative)}: no such folder; expected {relative} below --data-root {root}")


def list_images(folder, pattern="*"):
    """Sorted paths of the PNGs and JPEGs below `folder`; what is hidden does not count. None is an InputError."""
    paths = sorted(path for path in folder.glob(f"{pattern}.*") if path.suffix.lower() in PICTURES
                   and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not paths:
        raise InputError(f"{folder}: no image found; expected files like {pattern}.png")
    if broken := [path for path in paths if not path.is_file()]:
        raise InputError(f"{broken[0]}: a link to nothing or a folder, no image ({len(broken)} of {len(paths)} are)")
    return paths


def unique_names(paths, folder):
    """Distinct names of paths below `folder`: the stem or, where that repeats, the place, such as "201/frame0029"."""
    names = [path.stem for path in paths]
    for tell in (lambda path: path.with_suffix(""), lambda path: path):  # with the suffix where x.png and x.jpg exist
        times = collections.Counter(names)
        names = [name if times[name] == 1 else tell(path.relative_to(folder)).as_posix()
                 for name, path in zip(names, paths)]
    return names


def pair_labels(images, label_of):
    """Label path of every image; an image without a label is an InputError that names the first and counts them."""
    labels = [label_of(path) for path in images]
    if missing := [pair for pair in zip(images, labels) if not pair[1].exists()]:
        raise InputError(f"{missing[0][0]}: image without label, expected {missing[0][1]} "
                         f"({len(missing)} of {len(images)} images have none)")
    return labels


@contextlib.contextmanager
def writing(path):
    """Gives a temporary path to write to and renames it to `path` at the end: a killed run leaves the old file whole.

    Makes the folder where it is missing. InputError, naming the file, where it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # the suffix tells Pillow the format
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise InputError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_json(path):
    """Contents of a JSON file; InputError, naming the file, if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a file of JSON ({error})") from error


def as_json(contents, **options):
    """JSON text of `contents`, with null for NaN and infinities, which JSON does not know."""
    return json.dumps(json.loads(json.dumps(contents), parse_constant=lambda word: None), **options)


def write_json(path, contents):
    """Writes `contents` as JSON, atomically."""
    with writing(path) as temporary:
        temporary.write_text(as_json(contents, indent=1))


def write_label(path, label, classes):
    """Writes class indices (H, W) as a palette PNG: indices for programs, Cityscapes colours for eyes."""
    image = Image.fromarray(np.ascontiguousarray(label, np.uint8), mode="P")
    image.putpalette(palette(classes).flatten().tolist())
    with writing(path) as temporary:
        image.save(temporary)


# ===================================================== data sets =====================================================

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB: what torchvision's weights expect


def make_item(image, label, name, size, augment, full_label=False):
    """The dict that every data set returns: `image` uint8 (3, H, W) RGB, `label` int64 (H, W), `name`.

    image: PIL RGB. label: uint8 (H, W) class indices or None. Both are resized to `size`, the label to the nearest
    neighbour; with `full_label` it keeps its own resolution, which is how mIoU is measured. Images to be trained on
    (`augment`) are averaged down by a whole number and then resized bilinearly, which is three times as fast as the
    bicubic resizing of those to be labelled or scored. Normalised they are on the device, see `training_batches`.
    """
    if size is not None:
        fast = {"resample": Image.Resampling.BILINEAR, "reducing_gap": 1.0}
        image = image.resize((size[1], size[0]), **(fast if augment else {"resample": Image.Resampling.BICUBIC}))
        if label is not None and not full_label:
            label = np.array(Image.fromarray(label).resize((size[1], size[0]), Image.Resampling.NEAREST))
    image = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    label = None if label is None else torch.from_numpy(np.ascontiguousarray(label))
    if augment is not None:
        image, label = augment(image, label)
    return {"image": image.contiguous(), "name": name, **({} if label is None else {"label": label.long()})}


class GTA5(Dataset):
    """Labelled source: root/GTA5/images/*.png with root/GTA5/labels/*.png of the same name.

    Labels are palette PNGs whose *index* is the Cityscapes labelId. Image and label are each resized to `size`, so
    the two frames whose label has another size than the image (15188, 17705) need no exception; without `size`
    a label is resized to its image.
    """

    folders, read_ids, table = ("GTA5/images", "GTA5/labels"), staticmethod(read_label), id_table(CLASSES, 0)
    label_dir, full_label = None, False  # see Cityscapes

    def __init__(self, root, size=None, augment=None):
        pictures, labels = (find_folder(root, folder) for folder in self.folders)
        self.images = list_images(pictures)
        self.labels = pair_labels(self.images, lambda path: labels / f"{path.stem}.png")
        self.names, self.size, self.augment = unique_names(self.images, pictures), size, augment

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        name, image, label = self.names[index], read_image(self.images[index]), None
        if self.label_dir is not None:
            label = read_label(Path(self.label_dir) / f"{name}.png")
        elif self.labels is not None:
            label = self.table[self.read_ids(self.labels[index])]
        return make_item(image, label, name, self.size or image.size[::-1], self.augment, self.full_label)


class Synthia(GTA5):
    """Labelled source: root/RAND_CITYSCAPES/RGB/*.png with root/RAND_CITYSCAPES/GT/LABELS/*.png (16-bit)."""

    folders = "RAND_CITYSCAPES/RGB", "RAND_CITYSCAPES/GT/LABELS"
    read_ids, table = staticmethod(read_synthia_label), id_table(SYNTHIA_16, 1)


class Cityscapes(GTA5):
    """Target: root/cityscapes/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/.../*_gtFine_labelIds.png.

    labelled    open the label files; default: every split but train, whose labels stay closed
    label_dir   take the labels from this folder instead (pseudo-labels, NAME.png, class indices)
    full_label  keep labels at full resolution while images are resized: the evaluation protocol
    """

    def __init__(self, root, split="train", size=None, augment=None, classes=CLASSES, labelled=None, label_dir=None,
                 full_label=False):
        pictures, self.labels = find_folder(root, f"cityscapes/leftImg8bit/{split}"), None
        self.images = list_images(pictures, "*/*_leftImg8bit")
        self.names = [name.removesuffix("_leftImg8bit") for name in unique_names(self.images, pictures)]
        if split != "train" if labelled is None else labelled:
            folder = find_folder(root, f"cityscapes/gtFine/{split}")
            self.labels = pair_labels(self.images, lambda path: (
                folder / path.parent.name / f"{path.stem.removesuffix('_leftImg8bit')}_gtFine_labelIds.png"))
        self.size, self.augment, self.label_dir, self.full_label = size, augment, label_dir, full_label
        self.table = id_table(classes, 0)


def source_dataset(args, augment=None):
    """The labelled source that args.source names."""
    if args.source == "toy":
        return ToyStreets("source", "train", args.size, args.toy_world, augment, images=args.toy_images)
    return {"gta5": GTA5, "synthia": Synthia}[args.source](args.data_root, args.source_size, augment)


def target_dataset(args, split, augment=None, **options):
    """The target of args.source: the toy's other domain or Cityscapes. Options as for the data set's class."""
    if args.source == "toy":
        return ToyStreets("target", split, args.size, args.toy_world, augment, images=args.toy_images, **options)
    return Cityscapes(args.data_root, split, args.size, augment, task_classes(args.source), **options)


# ============================================== augmentation and batches ==============================================


def training_augment(args, size=None):
    """Random scale, crop and flip as --scale-jitter and --crop say: (image, label or None) -> the same.

    image uint8 (3, H, W), label uint8 (H, W); size: theirs, if not --size. Draws from torch's global generator, which
    `Batches` seeds for every item. What is returned can be pickled, which loader processes that are not forked need.
    """
    from torchvision.transforms import v2

    size, (low, high) = size or args.size, args.scale_jitter
    if any(crop > math.floor(low * full) for crop, full in zip(args.crop, size)):
        raise InputError(f"--crop {args.crop[0]}x{args.crop[1]} is larger than images of {size[0]}x{size[1]} scaled by "
                         f"{low} (--size, --source-size, --scale-jitter)")
    scale = v2.ScaleJitter(size[::-1], (low, high))  # which takes (W, H), unlike RandomCrop
    return functools.partial(apply_augment, v2.Compose([
        scale if (low, high) != (1, 1) else v2.Identity(), v2.RandomCrop(args.crop), v2.RandomHorizontalFlip()]))


def apply_augment(transform, image, label):
    """The transform on an image and, if there is one, its label."""
    from torchvision import tv_tensors

    image, label = transform(tv_tensors.Image(image), None if label is None else tv_tensors.Mask(label))
    return image.as_subclass(torch.Tensor), None if label is None else label.as_subclass(torch.Tensor)


def mix_seed(*numbers):
    """A well-mixed 63-bit seed from several non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def generator(args, purpose, step):
    """Random generator that is a function of (seed, purpose, step, process): a resumed run draws the same numbers."""
    return torch.Generator(args.device).manual_seed(mix_seed(args.seed, purpose, step, rank()))


class Batches(Dataset):
    """Item number `step` is the whole batch of that training step, a function of (seed, step) alone.

    So a run that resumes at step k sees exactly the batches of one that was never interrupted, with any number of
    workers. Every epoch is a new permutation. Under torchrun each process gets its share of the global batch.
    """

    def __init__(self, dataset, batch_size, seed):
        if batch_size % world_size():
            raise InputError(f"--batch-size {batch_size} cannot be split over {world_size()} processes")
        self.dataset, self.seed, self.batch_size = dataset, seed, batch_size
        self.share = range(batch_size * rank() // world_size(), batch_size * (rank() + 1) // world_size())

    def __getitem__(self, step):
        items = []
        for k in self.share:
            n = step * self.batch_size + k  # number of this picture in the whole run
            epoch, position = divmod(n, len(self.dataset))
            order = torch.Generator().manual_seed(mix_seed(self.seed, 0, epoch))
            index = torch.randperm(len(self.dataset), generator=order)[position].item()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(mix_seed(self.seed, 1, n))
                items.append(self.dataset[index])
        return default_collate(items)


def processors():
    """How many processors this process may use, 16 at most; under torchrun its part of them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def load(dataset, args, share=1, **options):
    """DataLoader with the `share`-th part of args.workers as processes. Draws no random number of its own."""
    return DataLoader(dataset, num_workers=math.ceil(args.workers / share), pin_memory=args.device == "cuda",
                      generator=torch.Generator(), **options)


@functools.cache
def channel_statistics(device):
    """MEAN and STD (3, 1, 1) on that device. Kept, because a GPU would be waited for in every copy."""
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD)]


def normalise(images):
    """uint8 (N, 3, H, W) -> what networks read: float32, ImageNet's mean and deviation taken out."""
    mean, std = channel_statistics(images.device)
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def colour_jitter(images, *seed, strength=0.3):
    """uint8 (N, 3, H, W) in other colours: brightness, contrast, saturation and, by a sixth of that, hue.

    Every image gets random numbers of its own, a function of the whole numbers `seed` and of its place in the whole
    batch, in whichever process it is. They are drawn on the processor, so that nothing waits for a GPU.
    """
    from torchvision.transforms import v2

    jitter, views = v2.ColorJitter(strength, strength, strength, strength / 6), []
    with torch.random.fork_rng(devices=[]):
        for place, image in enumerate(images, rank() * len(images)):
            torch.manual_seed(mix_seed(*seed, place))
            views.append(jitter(image))
    return torch.stack(views)


waited = 0.0  # seconds that training in this process has waited for pictures; Run.log_step tells their share


def training_batches(dataset, args, seed, start, stop, jitter=0.3, share=1):
    """Yields (image (N, 3, H, W), label (N, H, W) or None) of the steps start..stop-1, on the device.

    Images come in other colours, by `jitter` (0: as they are), and normalised. With None they are left as bytes, for a
    method that makes views of its own. share: how many of these work at the same time, each with its part of --workers.

    InputError if no pixel of the first hundred steps has a label.
    """
    global waited
    batches = iter(load(Batches(dataset, args.batch_size, seed), args, share, batch_size=None,
                        sampler=range(start, stop)))
    labelled = False
    for step in range(start, stop):
        began = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - began
        image, label = batch["image"].to(args.device, non_blocking=True), batch.get("label")
        if label is not None:
            labelled = labelled or bool((label != IGNORE).any())
            if not labelled and step - start == 99:
                raise InputError(f"{type(dataset).__name__}: no pixel of the first hundred steps has a label; look at "
                                 "the ids in the label files with python common.py")
            label = label.to(args.device, non_blocking=True)
        if jitter:
            image = colour_jitter(image, seed, 2, step, strength=jitter)
        yield image if jitter is None else normalise(image), label


def evaluation_batches(dataset, args):
    """Yields a data set's pictures in order (under torchrun every n-th) in batches, normalised on the device."""
    batch_size = 8 if args.source == "toy" else 1  # full-resolution labels may differ in size
    for batch in load(dataset, args, batch_size=batch_size, sampler=range(rank(), len(dataset), world_size())):
        yield {**batch, "image": normalise(batch["image"].to(args.device, non_blocking=True))}


# ===================================================== networks =====================================================

BACKBONES = ("resnet101", "resnet50", "resnet18", "resnet14", "vgg16")
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class DeepLabV2(nn.Module):
    """DeepLabV2 (Chen et al., arXiv 1606.00915) on torchvision's ResNet-18/50/101 or VGG16, output stride 8.

    "resnet14" is the toy's: ResNet-18 without its last stage, which takes three quarters of the time.

    `forward(images (N, 3, H, W))` returns `(features (N, D, h, w), logits (N, C, h, w))`. The head is four parallel
    3x3 convolutions with dilation 6, 12, 18 and 24 whose outputs are *all* summed (in AdaptSegNet's widely copied
    code a misplaced `return` leaves the last two out). Resize the logits with `upsample`.

    A ResNet's max-pooling rounds sizes up, as in the widely copied code: cell j of the grid is centred at pixel 8 j,
    and the last one lies at the picture's edge, 65x129 cells for 512x1024 pixels. (torchvision rounds down; the last
    cell is then centred 7 pixels before the edge, where upsampling paints it.) VGG16's cells tile the picture, centred
    at 8 j + 3.5.

    weights   "none": random; "imagenet": downloaded by torchvision; otherwise the path of a torchvision state dict
              of this backbone, for resnet14 of ResNet-18. Only what the network uses must be in it. A file that does
              not fit is an InputError.
    """

    def __init__(self, num_classes, backbone="resnet101", weights="none"):
        super().__init__()
        unused = ("fc.", "classifier.", "layer4.") if backbone == "resnet14" else ("fc.", "classifier.")
        net = torchvision_network(backbone, weights, unused)
        if backbone == "vgg16":
            self.backbone, self.feature_dim = vgg16_stride_8(net), 1024
        else:
            net.maxpool.ceil_mode = True
            dilate(net.layer3, 2)
            dilate(net.layer4, 4)
            stages = [net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4]
            self.backbone = nn.Sequential(*stages[:7 if backbone == "resnet14" else 8])
            self.feature_dim = 256 if backbone == "resnet14" else net.fc.in_features
        self.classifier = nn.ModuleList(
            nn.Conv2d(self.feature_dim, num_classes, 3, padding=d, dilation=d) for d in (6, 12, 18, 24))
        for branch in self.classifier:
            nn.init.normal_(branch.weight, std=0.01)

    def forward(self, images):
        features = self.backbone(images)  # (N, 3, H, W) -> (N, D, h, w)
        logits = sum(branch(features) for branch in self.classifier)  # (N, D, h, w) -> (N, C, h, w)
        return features, logits

    def train(self, mode=True):
        """As nn.Module.train, but batch norms frozen by `freeze_batch_norm` stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, BATCH_NORMS) and not module.weight.requires_grad:
                module.eval()
        return self


def torchvision_network(backbone, weights, unused=()):
    """torchvision's classification network of that name; `weights` as for DeepLabV2.

    unused: beginnings of the names of weights that a file need not have, because the caller throws them away.
    """
    import torchvision

    if backbone not in BACKBONES:
        raise InputError(f"backbone {backbone!r} is not one of {', '.join(BACKBONES)}")
    build = getattr(torchvision.models, "resnet18" if backbone == "resnet14" else backbone)
    if weights == "imagenet":
        choice = torchvision.models.get_model_weights(build).IMAGENET1K_V1
        try:
            return build(weights=choice)
        except Exception as error:  # without a network, or with half a file, it can fail in any way
            file = Path(torch.hub.get_dir(), "checkpoints", Path(choice.url).name)
            raise InputError(f"--backbone-weights imagenet: no usable download ({one_line(error)}); delete {file} if "
                             "it is there and start again, or give a file or none") from error
    # From random weights a ResNet learns much faster if every residual block starts as the identity.
    net = build(**({"zero_init_residual": True} if backbone != "vgg16" and weights == "none" else {}))
    if weights != "none":
        load_weights(net, read_checkpoint(weights), weights, f"torchvision's {build.__name__}", unused)
    return net


def dilate(stage, dilation):
    """Removes the stride of 2 of a ResNet stage and dilates its 3x3 convolutions: it computes the same on a finer grid.

    What follows the convolution that strode now finds its neighbours twice as far apart, that convolution itself does
    not: it keeps the dilation of the stage before. (torchvision does the same for bottlenecks, not for ResNet-18.)
    """
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            if module.kernel_size == (3, 3):
                spacing = dilation // 2 if module.stride == (2, 2) else dilation
                module.dilation = module.padding = (spacing, spacing)
            module.stride = (1, 1)


def vgg16_stride_8(net):
    """VGG16's convolutions without pool4 and pool5, conv5 dilated by 2, then two 3x3 convolutions of 1024 channels.

    The form of the SDCA and FADA code; the two last convolutions start at random, not from VGG's classifier.
    """
    layers = [layer for i, layer in enumerate(net.features) if i not in (23, 30)]  # pool4, pool5
    for convolution in layers[-6::2]:  # conv5_1 .. conv5_3, each before its ReLU
        convolution.dilation = convolution.padding = (2, 2)
    for channels in (512, 1024):
        layers += [nn.Conv2d(channels, 1024, 3, padding=4, dilation=4), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def build_model(args, network=DeepLabV2):
    """The network that every method trains, on its device; the batch norm of pretrained weights frozen if so asked."""
    model = network(len(task_classes(args.source)), args.backbone, args.backbone_weights)
    if world_size() > 1 and args.device == "cuda":  # on CPUs `distribute` asks for frozen batch norm
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.batch_norm == "frozen" and args.backbone_weights != "none":
        freeze_batch_norm(model)
    return model.to(args.device, memory_format=torch.channels_last)


def live_batch_norms(model):
    """The batch norms of a model that `freeze_batch_norm` has not frozen."""
    return [module for module in model.modules() if isinstance(module, BATCH_NORMS) and module.weight.requires_grad]


def freeze_batch_norm(model):
    """From now on every batch norm uses its running statistics, and neither they nor its affine part change."""
    for module in live_batch_norms(model):
        module.requires_grad_(False)
    model.train(model.training)


@torch.no_grad()
def estimate_batch_norm(model, views, args, images=400):
    """Replaces live batch norms' running statistics by their averages over images of the data set `views`.

    Without labels: the simplest adaptation there is (AdaBN, Li et al., arXiv 1603.04779). `views` are the augmented
    images that the network is trained on, so that the statistics fit its weights. Frozen norms stay as they are.
    """
    if not (norms := live_batch_norms(model)):
        return  # update_bn would reset frozen ones too
    steps, jitter = math.ceil(min(images, len(views)) / args.batch_size), 0.3 if getattr(args, "augment", True) else 0
    with autocast(args):
        update_bn((image for image, _ in training_batches(views, args, 0, 0, steps, jitter)), model)
    for norm in norms:
        for statistic in (norm.running_mean, norm.running_var):
            statistic.copy_(all_sum(statistic.clone()) / world_size())


def settle_batch_norm(model, views, args):
    """What --batch-norm asks for whenever a model is about to be adapted, to label images or to be scored.

    live: statistics are estimated on `views`. target: the same the first time, then frozen. frozen: frozen as they are.
    """
    if args.batch_norm != "frozen":
        estimate_batch_norm(model, views, args)
    if args.batch_norm != "live":
        freeze_batch_norm(model)


def tiles(grid, size):
    """Whether a grid's cells (h, w) tile the network's input (H, W), as VGG16's do; a ResNet has one cell more."""
    return all(pixels in (cells, 8 * cells) for cells, pixels in zip(grid, size))


def upsample(logits, size, seen=None):
    """(N, C, h, w) -> (N, C, H, W), bilinear: every cell of the grid is painted where the network is centred on it.

    A ResNet's first and last cells lie on the picture's edges (aligned corners), a VGG16's cells tile the picture.
    `seen` is the size of the network's input, in multiples of 8, if it is not `size`.
    """
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=not tiles(logits.shape[2:], seen or size))


def grid_labels(label, size):
    """(N, H, W) -> (N, h, w): the label of the pixel at the centre of each cell, the inverse of `upsample`."""
    tiled = tiles(size, label.shape[1:])
    for axis, (cells, pixels) in enumerate(zip(size, label.shape[1:]), 1):
        cell = torch.arange(cells, device=label.device, dtype=torch.float64)
        centre = (cell + 0.5) * pixels / cells - 0.5 if tiled else cell * (pixels - 1) / max(cells - 1, 1)
        label = label.index_select(axis, centre.round().long())
    return label


def as_pixels(maps):
    """(N, D, h, w) -> (N h w, D): the order in which labels (N, h, w) flatten."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def autocast(args):
    """Context in which the network computes in args.precision: fp32 or bf16."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")


# ================================================= mIoU and pictures =================================================


class MeanIoU:
    """One confusion matrix over a whole split, on the tensors' own device.

    `update(pred, label)` takes two integer tensors of the same shape, any shape, any device. `iou()` is (C,) with NaN
    where a class is in neither prediction nor label, `mean(indices)` the mean over some classes or all, without the
    NaNs. Pixels whose label is 255 do not count.
    """

    def __init__(self, num_classes):
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # rows: label, columns: prediction

    def update(self, pred, label):
        if pred.shape != label.shape:
            raise ValueError(f"prediction {tuple(pred.shape)} and label {tuple(label.shape)} differ in shape")
        classes = len(self.confusion)
        valid = label != IGNORE
        pred, label = pred[valid].long(), label[valid].long()
        if len(pred) and not (0 <= min(pred.min(), label.min()) and max(pred.max(), label.max()) < classes):
            raise ValueError(f"a prediction or label is not one of {classes} classes")
        counts = torch.bincount(label * classes + pred, minlength=classes * classes)
        self.confusion = self.confusion.to(pred.device) + counts.view(classes, classes)

    def sum_processes(self, device):
        """Adds up what all processes have seen. device: where the processes exchange tensors, args.device."""
        self.confusion = all_sum(self.confusion.to(device))

    def iou(self):
        hit = self.confusion.diagonal().double()
        return hit / (self.confusion.sum(0) + self.confusion.sum(1) - hit)  # 0 / 0 = NaN

    def recall(self):
        """(C,): the share of each class's pixels that are found, NaN for a class without any."""
        return self.confusion.diagonal().double() / self.confusion.sum(1)

    def mean(self, indices=None):
        iou = self.iou()
        return (iou if indices is None else iou[list(indices)]).nanmean().item()

    def present(self):
        """Indices of the classes that occur in the labels."""
        return self.confusion.sum(1).nonzero()[:, 0].tolist()


@torch.no_grad()
def predict(model, images, size, args, scales=(1.0,), flip=False):
    """Class probabilities (N, C, H, W) at `size`, averaged over `scales` of the input and, if asked, mirror images."""
    total = 0
    for scale in scales:
        scaled = images
        if scale != 1:  # to multiples of 8, see upsample
            size_in = [max(8, round(scale * pixels / 8) * 8) for pixels in images.shape[2:]]
            scaled = F.interpolate(images, size=size_in, mode="bilinear")
        for mirrored in (False, True)[: 1 + flip]:
            with autocast(args):
                _, logits = model(scaled.flip(3) if mirrored else scaled)
            logits = logits.float().flip(3) if mirrored else logits.float()
            total = total + upsample(logits, size, scaled.shape[2:]).softmax(1)
    return total / (len(scales) * (1 + flip))


def predictions(model, dataset, args, scales=(1.0,), flip=False):
    """Yields the batches of this process's share of a data set and probabilities (N, C, H, W) at the labels' size."""
    model.eval()
    for batch in evaluation_batches(dataset, args):
        yield batch, predict(model, batch["image"], batch.get("label", batch["image"]).shape[-2:], args, scales, flip)


def evaluate(model, dataset, args, scales=(1.0,), flip=False, visit=None):
    """`scores` of a model on labelled data, at the labels' own resolution. `visit(batch, pred (N, H, W))` sees all."""
    classes = task_classes(args.source)
    metric, rare_looks = MeanIoU(len(classes)), MeanIoU(len(classes))
    for batch, prob in predictions(model, dataset, args, scales, flip):
        label, pred = batch["label"].to(args.device), prob.max(1).indices  # (N, H, W); on a CPU much faster than argmax
        metric.update(pred, label)
        if "look" in batch:  # the toy's
            rare_looks.update(pred, torch.where(batch["look"].to(args.device) == 2, label, IGNORE))
        if visit is not None:
            visit(batch, pred)
    for part in (metric, rare_looks):
        part.sum_processes(args.device)
    result = scores(metric, classes)
    if rare_looks.present():
        result["rare_looks"] = 100 * rare_looks.recall()[rare_looks.present()].mean().item()
    return result


def scorable(args, split="val"):
    """Whether a target split has labels. Real data may have none for val: then a network is trained all the same."""
    with contextlib.suppress(InputError):
        return args.source == "toy" or find_folder(args.data_root, f"cityscapes/gtFine/{split}").is_dir()
    return False


def evaluate_target(model, args, split="val", **options):
    """`evaluate` on a split of the target, labels at full resolution."""
    return evaluate(model, target_dataset(args, split, labelled=True, full_label=True), args, **options)


def evaluate_source_only(model, args):
    """Table columns of a source-only model: as it is, and with batch-norm statistics estimated on the target."""
    columns = {"source only": evaluate_target(model, args)}
    adapted = copy.deepcopy(model).requires_grad_(True)  # so that frozen norms take part
    if live_batch_norms(adapted):
        estimate_batch_norm(adapted, target_dataset(args, "train", training_augment(args)), args)
        columns["+ BN target"] = evaluate_target(adapted, args)
    return columns


def compare_with_source_only(models, args, run, source_model, **meters):
    """The end of every method: {title: model} beside the run's source-only model, as table, result.json and picture.

    meters: {name: number}, what the method measures of its own idea. A target without labels: the picture alone.
    """
    columns = evaluate_source_only(source_model, args) if run.scorable else {}
    columns.update({title: evaluate_target(model, args) for title, model in models.items() if run.scorable})
    run.finish(columns, **meters)
    comparison_panel(run.folder / "panel.png", {"source only": source_model, **models}, args)


def scores(metric, classes):
    """The plain dict that result.json and the tables hold: IoU per class and means, in percent, None for NaN.

    `miou` is the mean over the classes that occur in the labels: for SYNTHIA's task the mIoU over 16. There `miou13`
    stands beside it, another mean over the same 16-class predictions; `rare` is the mean over the long tail. A mean
    over classes of which none occurs is None. `share` tells how many of the labelled pixels each class takes as
    predicted and in truth; `histogram_distance` is half the sum of their differences (total variation distance).
    """
    def mean(names):
        indices = [i for i in metric.present() if classes[i] in names]
        return 100 * metric.mean(indices) if indices else None

    result = {"iou": {name: None if math.isnan(v) else 100 * v for name, v in zip(classes, metric.iou().tolist())},
              "miou": mean(classes)}
    if tuple(classes) == SYNTHIA_16:
        result["miou13"] = mean(SYNTHIA_13)
    result["rare"] = mean(RARE)
    pixels = 100 * metric.confusion.double() / metric.confusion.sum().clamp(min=1)
    predicted, true = pixels.sum(0), pixels.sum(1)  # (C,)
    result["share"] = dict(zip(classes, zip(predicted.tolist(), true.tolist())))
    result["histogram_distance"] = (predicted - true).abs().sum().item() / 2
    return result


# Title in tables: key in `scores`.
MEANS = {"mIoU": "miou", "mIoU, 13": "miou13", "mIoU, rare": "rare", "histogram distance %": "histogram_distance",
         "recall, rare looks": "rare_looks"}


def score_table(columns):
    """Text: one row per class, one column per model. columns: {title: scores(...)}."""
    titles, results = list(columns), list(columns.values())
    widths = [max(len(title), 7) for title in titles]
    lines = [" " * 22 + "  ".join(title.rjust(width) for title, width in zip(titles, widths))]
    names = list(dict.fromkeys(name for result in results for name in result["iou"]))
    rows = [(name, [result["iou"].get(name) for result in results]) for name in names]
    rows += [(title, [result.get(key) for result in results]) for title, key in MEANS.items()]
    for name, values in rows:
        cells = ["-" if v is None else f"{v:.1f}" for v in values]
        lines.append(f"{name:22}" + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths)))
    return "\n".join(lines)


def colour_label(label, classes):
    """Class indices (H, W) as a PIL picture in the official Cityscapes colours, ignored pixels black."""
    return Image.fromarray(palette(classes)[np.asarray(label, np.uint8)])


def to_picture(image):
    """An image, uint8 (3, H, W), as a PIL picture."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def draw_panel(path, titles, rows, width=320):
    """Writes a grid of pictures: one row per scene, one titled column per entry of `titles`, each `width` wide."""
    height = round(width * rows[0][0].height / rows[0][0].width)
    head = 22  # of the titles
    sheet = Image.new("RGB", (len(titles) * (width + 4) - 4, head + len(rows) * (height + 4) - 4), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((column * (width + 4) + 4, 2), title, fill="black", font=ImageFont.load_default(14))
        for line, row in enumerate(rows):
            picture = row[column].resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * (width + 4), head + line * (height + 4)))
    with writing(path) as temporary:
        sheet.save(temporary)


def some(dataset, number):
    """At most `number` items of a data set or range, evenly spaced."""
    return Subset(dataset, np.linspace(0, len(dataset) - 1, min(number, len(dataset))).astype(int).tolist())


def comparison_panel(path, models, args, split="val", scenes=4):
    """Writes image | truth | one column per model of {title: model} for `scenes` pictures of a split of the target."""
    classes, labelled, rows = task_classes(args.source), scorable(args, split), []
    split = split if labelled else "train"  # without labels there may be no other, and there is no truth to show
    for item in some(target_dataset(args, split, labelled=labelled), scenes):
        label = item.get("label")
        row = [to_picture(item["image"])] + ([colour_label(label, classes)] if labelled else [])
        for model in models.values():
            model.eval()
            image = normalise(item["image"][None].to(args.device))
            pred = predict(model, image, image.shape[2:], args).argmax(1)[0].cpu()  # (H, W)
            row.append(colour_label(torch.where(label == IGNORE, IGNORE, pred) if labelled else pred, classes))
        rows.append(row)
    if rank() == 0:
        draw_panel(path, ["image", *["truth"][:labelled], *models], rows)


# ============================================ command line and run folder ============================================


class BySource(dict):
    """A default that depends on --source and --preset. argparse prints it in --help; `parse` picks the entry."""

    def __str__(self):
        texts = {k: "x".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in self.items()}
        return ", ".join(f"{source} {text}" for source, text in texts.items())


def by_source(toy, gta5, synthia=None, small=None):
    """Defaults for the three sources and --preset small; synthia's are gta5's unless given, small's the source's."""
    values = BySource(toy=toy, gta5=gta5, synthia=gta5 if synthia is None else synthia)
    return values if small is None else BySource(values, small=small)


def number(kind, low, high=math.inf, above=False):
    """argparse type: a finite number of that kind, int or float, from low to high (or above low)."""
    def convert(text):
        value = kind(text)  # argparse reports the ValueError
        if not (math.isfinite(value) and low <= value <= high) or above and value == low:
            bounds = f"{'above' if above else 'from'} {low}" + (f" to {high}" if high < math.inf else " on")
            raise argparse.ArgumentTypeError(f"{text} is not a number {bounds}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"  # for argparse's own message
    return convert


count, natural = number(int, 1), number(int, 0, 2**63 - 1)  # argparse types: 1, 2, ...; 0, 1, 2, ...
positive, weight, fraction = number(float, 0, above=True), number(float, 0), number(float, 0, 1)  # > 0; >= 0; in [0, 1]


def height_width(text):
    """argparse type: "512x1024" -> (512, 1024), rows first. In multiples of 8, so that grid and pixels agree."""
    sides = [int(side) if side.isdecimal() else 0 for side in text.split("x")]
    if len(sides) != 2 or any(side == 0 or side % 8 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form HxW, such as 512x1024, in multiples of 8")
    return tuple(sides)


def add_data_flags(parser):
    """The flags that name a task and its data."""
    add = parser.add_argument
    add("--source", choices=("toy", "gta5", "synthia"), default="toy",
        help="labelled source; the toy world needs nothing, the others adapt to Cityscapes")
    add("--data-root", type=os.path.expanduser, metavar="DIR",
        help="holds GTA5/ or RAND_CITYSCAPES/, and cityscapes/, as their archives unpack")
    add("--toy-world", type=natural, default=0, metavar="N", help="which world of the toy generator")
    add("--toy-images", type=count, default=400, metavar="N", help="training images per domain of the toy world")


def add_machine_flags(parser):
    """The flags that say where to compute, and how."""
    add = parser.add_argument
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cuda", "cpu"), default=best, help="where to compute")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network; every loss is fp32")
    add("--workers", type=natural, metavar="N", default=by_source(0, processors()),
        help="processes that read and augment images, over all loaders of a step; 0: none besides this one")


def shared_parser(doc, adapts=False):
    """The parser of a script with docstring `doc`: the flags that mean the same everywhere; adapts: in every method."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add_data_flags(parser)
    add("--preset", choices=("small",), help="gta5, synthia: an evening on one small GPU (computed, not measured)")
    add("--out", type=os.path.expanduser, metavar="DIR", help="run folder; None means runs/METHOD-SOURCE-sSEED")
    add("--resume", action="store_true", help="continue the run in its folder, on the CPU to the bit")
    add("--backbone", choices=BACKBONES, default=by_source("resnet14", "resnet101", small="resnet50"),
        help="network under the DeepLabV2 head")
    add("--backbone-weights", type=os.path.expanduser, metavar="FILE|imagenet|none",
        default=by_source("none", "imagenet"), help="its start: torchvision's state dict, its download, or random")
    add("--size", type=height_width, metavar="HxW", default=by_source((80, 160), (512, 1024), small=(256, 512)),
        help="working size of target images, and of evaluation")
    add("--source-size", type=height_width, metavar="HxW",
        default=by_source((80, 160), (720, 1280), (760, 1280), small=(368, 640)),
        help="size to which source images are resized; --size, where only that is given")
    add("--crop", type=height_width, metavar="HxW", default=by_source((64, 128), (512, 1024), small=(256, 512)),
        help="random crop on which the network is trained; --size, where only that is given")
    add("--scale-jitter", type=positive, nargs=2, metavar=("LOW", "HIGH"), default=by_source([1.0, 1.0], [1.0, 1.5]),
        help="range of the random scale in training; the smallest picture must hold the crop")
    add("--batch-norm", choices=("live", "target", "frozen"), default=by_source("target", "frozen", small="live"),
        help="frozen: pretrained statistics throughout; target: live in source training, then estimated on the target "
             "and frozen; live: never frozen")
    add("--optimizer", choices=("sgd", "adamw"), default=by_source("adamw", "sgd", small="adamw"),
        help="SGD as in the papers; AdamW learns faster from random weights")
    add("--head-lr", type=positive, metavar="X", default=by_source(1.0, 10.0),
        help="learning rate of new layers as a multiple of the backbone's (10 when that is pretrained)")
    add("--batch-size", type=count, metavar="N", default=by_source(4, 2, small=4),
        help="images per step and domain, over all processes")
    add("--seed", type=natural, default=0, metavar="N", help="of weights, data order and augmentation")
    add_machine_flags(parser)
    add("--compile", action=argparse.BooleanOptionalAction, default=None,
        help="torch.compile what is trained: faster, in less memory, after a minute; None: on a GPU, for real data")
    add("--log-every", type=count, metavar="N", default=by_source(20, 100), help="steps between two lines of the log")
    add("--save-every", type=count, metavar="N", default=by_source(100, 1000), help="steps between two checkpoints")
    if adapts:
        add("--init", type=os.path.expanduser, metavar="CKPT",
            help="start from this source_only.py checkpoint instead of training one")
        add("--warmup-iterations", type=count, metavar="T", default=by_source(600, 60000, small=10000),
            help="steps of source-only training")
        add("--warmup-lr", type=positive, metavar="X", default=by_source(1e-3, 2.5e-4, small=1e-4),
            help="its base learning rate")
        add("--ramp", type=natural, metavar="T", default=by_source(40, 500),
            help="steps over which the adaptation's learning rate rises")
        add("--power", type=weight, metavar="X", default=0.9, help="exponent of its poly decay afterwards, 0 for none")
        add("--val-every", type=natural, default=0, metavar="N",
            help="steps between two looks at the target's validation score, an oracle that chooses nothing; 0 for none")
    return parser


def parse(parser, argv=None):
    """Parsed arguments with every default that depends on the source and the preset filled in."""
    args = parser.parse_args(argv)
    for flag, given, reason in (("--preset", args.preset, "is small already"),
                                ("--data-root", args.data_root, "reads no data"),
                                ("--source-size", isinstance(args.source_size, tuple), "draws everything at --size")):
        if args.source == "toy" and given:
            parser.error(f"{flag} without --source gta5 or synthia: the toy world {reason}")
    as_size = {key: args.size for key in ("source_size", "crop") if isinstance(args.size, tuple)}
    for key, value in vars(args).items():
        if isinstance(value, BySource):
            setattr(args, key, as_size.get(key, value.get(args.preset, value[args.source])))
    if args.compile is None:
        args.compile = args.device == "cuda" and args.source != "toy"
    if args.scale_jitter[0] > args.scale_jitter[1]:
        parser.error(f"--scale-jitter {args.scale_jitter[0]} {args.scale_jitter[1]}: expected LOW HIGH")
    return args


def ramp(step, args):
    """Share of the adaptation's learning rate at step 1, 2, ...: rises to 1 over --ramp steps.

    Without it the first steps of a fresh optimizer, whose averages rest on a single batch, are too large.
    """
    return min(1.0, step / max(args.ramp, 1))


def time_left(seconds, done, remaining):
    """Text such as ", 5 min left": `done` steps took `seconds`, `remaining` are to come. Empty if either is none."""
    if min(done, remaining) <= 0:
        return ""
    left = seconds / done * remaining
    size, unit = (1, "s") if left < 120 else (60, "min") if left < 36000 else (3600, "h")
    return f", {left / size:.0f} {unit} left"


class Run:
    """The folder of one run, and of no other: args.json, log.jsonl, checkpoints, panel.png, result.json.

    Also holds what every loop asks between two steps: whether to log, to save, to score, and the time spent.
    """

    current = None  # the run of this process; `run` tells what is left of it
    stage = None  # of the last step; `stage_step` and `stage_started` are its first in this session

    def __init__(self, method, args):
        self.method, self.args = method, args
        self.folder = Path(args.out or f"runs/{method}-{args.source}-s{args.seed}")
        self.started = self.line_at = time.time()
        self.waited = waited  # at `line_at`, when the last line was logged
        start_processes(args)
        self.scorable = check_data(args)  # whether the target has validation labels
        torch.manual_seed(args.seed)
        settings = json.loads(json.dumps({"method": method, **vars(args)}))
        lines = self.check_resume(settings) if args.resume else []
        self.seconds_before = lines[-1].get("seconds", 0.0) if lines else 0.0
        if not args.resume and self.folder.is_dir() and any(self.folder.glob("[!.]*.pt")):
            raise InputError(f"{self.folder}: holds a run already; add --resume to continue it or choose another --out")
        if rank() == 0:
            with writing(self.folder / "log.jsonl") as temporary:  # again, because the file may end in half a line
                temporary.write_text("".join(as_json(line) + "\n" for line in lines))
            write_json(self.folder / "args.json", settings)
            print(f"{self.folder}  {versions(args.device)}  {args.device}  {args.precision}", flush=True)
            if not self.scorable:
                print("the target has no validation labels (cityscapes/gtFine/val): this run trains and saves, but "
                      "nothing can be scored", flush=True)
            for flag in ("iterations", "ssl_iterations"):
                if 0 < getattr(args, flag, 0) <= getattr(args, "ramp", 0):
                    print(f"--ramp {args.ramp} is as long as --{flag.replace('_', '-')} {getattr(args, flag)} or "
                          "longer: the learning rate will stay far below what was asked for", flush=True)
        Run.current = self
        if world_size() > 1:
            dist.barrier()  # all have looked at the folder before anybody writes a checkpoint

    def check_resume(self, settings):
        """The log's lines. InputError where --resume finds no run, or one with other arguments; some may change."""
        if not (self.folder / "args.json").exists():
            raise InputError(f"{self.folder}: nothing to resume; expected the args.json of an earlier run there")
        before = read_json(self.folder / "args.json")
        if not isinstance(before, dict) or before.get("method") != self.method:
            raise InputError(f"{self.folder / 'args.json'}: not the settings of a run of {self.method}")
        free = ("resume", "out", "device", "workers", "compile", "log_every", "save_every", "val_every", "data_root")
        if changed := [f"{key} {before.get(key)}" for key, value in settings.items()
                       if key not in free and value != before.get(key)]:
            raise InputError(f"{self.folder}: the run to resume had {', '.join(changed)}; give the same arguments")
        return self.logged()

    def seconds(self):
        """Seconds of work on this run so far, earlier sessions included."""
        return self.seconds_before + time.time() - self.started

    def time_to_save(self, step, steps):
        """Whether a checkpoint is due after this step: every `save_every` steps and at the end."""
        return step % self.args.save_every == 0 or step == steps

    def log_step(self, stage, step, steps, **values):
        """Every `log_every` steps a line on the screen and in log.jsonl; stops the run at a NaN or infinite value.

        values: numbers or scalar tensors, which on a GPU are read only when a line or a checkpoint is due, as reading
        waits for it. `waiting`: share of the time since the last line spent in waiting for pictures, if above 3 %.
        """
        if stage != self.stage:
            self.stage, self.stage_step, self.stage_started = stage, step, time.time()
        logged = step % self.args.log_every == 0 or step == steps
        if not (logged or self.args.device == "cpu" or self.time_to_save(step, steps)):
            return
        values = {name: float(value.detach() if torch.is_tensor(value) else value) for name, value in values.items()}
        if not all(math.isfinite(value) for value in values.values()):
            terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            raise InputError(f"{stage} step {step}: not finite ({terms})")
        if logged:
            if (share := (waited - self.waited) / max(time.time() - self.line_at, 1e-9)) > 0.03:
                values["waiting"] = round(share, 2)
            self.line_at, self.waited = time.time(), waited
            seconds = time.time() - self.stage_started
            self.log(stage, f"{step}/{steps}", time_left(seconds, step - self.stage_step, steps - step), **values)

    def last_checkpoint(self):
        """What is left after a run has failed, for the end of its message."""
        files = sorted(self.folder.glob("[!.]*.pt"), key=lambda path: path.stat().st_mtime)
        return f"; the last checkpoint is {files[-1]}" if files else ""

    def log(self, stage, step="", left="", **values):
        """One line on the screen, with the text `left` at its end, and one object in log.jsonl."""
        if rank() == 0:
            entry = {"stage": stage, "step": step, **values, "seconds": round(self.seconds(), 1)}
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(as_json(entry) + "\n")
            text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
            print(f"{stage:14} {step:>9}  {text}  [{self.seconds():.0f} s{left}]", flush=True)

    def logged(self):
        """The lines of log.jsonl so far, as dicts, without the half line that a killed run may leave."""
        path, lines = self.folder / "log.jsonl", []
        for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError, TypeError):
                lines.append(dict(json.loads(text)))
        return lines

    def validate(self, stage, step, steps, model, views):
        """Every `val_every` steps the target's validation mIoU in the log, of a copy with settled batch norm.

        It looks at the target's labels, so nothing may depend on it; `finish` prints the best one as an oracle.
        """
        if self.args.val_every and (step % self.args.val_every == 0 or step == steps):
            copied = copy.deepcopy(model)
            settle_batch_norm(copied, views, self.args)
            self.log(f"{stage} oracle", f"{step}/{steps}", val_miou=evaluate_target(copied, self.args)["miou"])

    def save(self, file, step, model, **parts):
        """Writes a checkpoint atomically: what `unpack_model` needs to rebuild the model anywhere, the step, the random
        numbers' state (dropout) and the state_dict of each named part.
        """
        args, states = self.args, {name: part.state_dict() for name, part in {"model": model, **parts}.items()}
        if not all(torch.isfinite(t).all() for state in states.values() for t in state.values() if torch.is_tensor(t)):
            raise InputError(f"{file}: weights are not finite")
        task = {key: getattr(args, key) for key in ("source", "toy_world", "toy_images", "backbone", "iterations")}
        task |= {"size": list(args.size), "classes": list(task_classes(args.source)), "network": type(model).__name__}
        if rank() == 0:
            with writing(self.folder / file) as temporary:
                torch.save({"method": self.method, **task, "step": step, "random": torch.get_rng_state(), **states},
                           temporary)

    def load(self, file, model, **parts):
        """Restores what `save` stored and returns its step; 0, and nothing happens, without --resume or such a file."""
        path = self.folder / file
        if not (self.args.resume and path.exists()):
            return 0
        saved = read_checkpoint(path)
        unpack_model(saved, path, model)
        try:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            torch.set_rng_state(saved["random"])
            return int(saved["step"])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not the checkpoint of a run with these arguments ({one_line(error)})") from error

    def finish(self, columns, own=None, **meters):
        """Prints the table of {title: scores}; writes result.json: all columns, on top those of `own`, last.pt's.

        own: the last column if not given; there is none where the target has no labels. meters: {name: number}, what a
        method measures of its own idea. Seconds count all sessions of the run, the peak memory is the last one's.
        """
        if rank() > 0:
            return
        own = own or (list(columns) or [None])[-1]
        result = {**columns.get(own, {}), "own": own, "columns": columns, "meters": meters,
                  "versions": versions(self.args.device), "seconds": round(self.seconds(), 1),
                  "peak_memory_gb": round(peak_memory(self.args.device) / 2**30, 2)}
        if looks := [line for line in self.logged() if line.get("val_miou") is not None]:
            best = result["best_on_validation"] = max(looks, key=lambda line: line["val_miou"])
            print(f"\noracle, chosen by target labels: best mIoU on the way {best['val_miou']:.1f} "
                  f"({best['stage']} {best['step']})")
        write_json(self.folder / "result.json", result)
        for name, value in meters.items():
            print(f"{name}: {value:.4g}")
        if columns:
            print(f"\n{score_table(columns)}")
        else:
            print(f"\nno validation labels, hence no score; to look at predictions:\n    python evaluate.py "
                  f"{self.folder / 'last.pt'} --images PICTURES")
        print(f"\n{self.seconds():.0f} s, {result['peak_memory_gb']} GB; written to {self.folder}", flush=True)


def check_data(args):
    """Opens source and target and reads a few files of each, so that what is wrong is said before any training.

    Returns `scorable`.
    """
    source, labelled = source_dataset(args), scorable(args)
    if getattr(args, "val_every", 0) and not labelled:
        raise InputError("--val-every: the target has no validation labels (cityscapes/gtFine/val)")
    if args.source != "toy":
        if all((item["label"] == IGNORE).all() for item in some(source, 8)):
            raise InputError(f"{source.labels[0]}: neither here nor in seven others does a pixel belong to a class; "
                             f"look at the ids with python common.py --source {args.source} --data-root DIR")
        for split in ("train", "val")[:1 + labelled]:
            list(some(target_dataset(args, split), 8))
    return labelled


def peak_memory(device):
    """Peak memory in bytes: of the GPU, or resident of this process, 0 where the system does not tell (Windows)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(ImportError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def versions(device):
    """One line: python, torch, the commit of these files if there is one, the processor or GPU that computes."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPUs ({platform.machine()})"
    return f"python {platform.python_version()}, torch {torch.__version__}, commit {commit or 'none'}, {machine}"


def read_checkpoint(path):
    """Contents of a file of tensors and plain values, on the CPU. Cannot execute code; InputError if unreadable."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; expected a checkpoint, such as last.pt in a run folder")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can fail in any way inside the unpickler
        raise InputError(f"{path}: not a checkpoint that can be read safely ({type(error).__name__})") from error


def load_weights(model, state, path, what, unused=()):
    """Strict load_state_dict of finite weights; InputError, naming the file, where they do not fit.

    A `module.` in front of all names, which nn.DataParallel leaves, does not count. Names that begin with one of
    `unused` are not asked for and not read.
    """
    def shapes(weights):
        return {name: list(value.shape) for name, value in weights.items()
                if not name.startswith(unused) and not name.endswith("num_batches_tracked")}

    if not (isinstance(state, dict) and state and all(map(torch.is_tensor, state.values()))):
        raise InputError(f"{path}: expected a dict of tensors, the weights of {what}")
    state, own = {str(name).removeprefix("module."): value for name, value in state.items()}, model.state_dict()
    needed, given = shapes(own), shapes(state)
    if wrong := [name for name in needed | given if needed.get(name) != given.get(name)]:
        raise InputError(f"{path}: does not fit {what}: {len(wrong)} weights differ, such as {wrong[0]}, expected "
                         f"{needed.get(wrong[0], 'none')}, found {given.get(wrong[0], 'none')}")
    if not all(torch.isfinite(state[name]).all() for name in needed):
        raise InputError(f"{path}: holds weights that are not finite")
    model.load_state_dict({name: value if name.startswith(unused) else state.get(name, value)
                           for name, value in own.items()})


def unpack_model(checkpoint, path, model=None, network=DeepLabV2):
    """The network of a checkpoint of any method, or `model` with its weights; InputError if the file is not ours.

    network: the class to build. Those of one paper alone stand in that paper's file.
    """
    needed = {"method", "source", "toy_world", "toy_images", "step", "iterations", "backbone", "network", "classes",
              "size", "model"}
    if not isinstance(checkpoint, dict) or needed - set(checkpoint):
        raise InputError(f"{path}: not a checkpoint of this project")
    network, classes = network if model is None else type(model), checkpoint["classes"]
    if checkpoint["network"] != network.__name__:
        raise InputError(f"{path}: holds the network {checkpoint['network']} of {checkpoint['method']}.py, "
                         f"expected {network.__name__}")
    if checkpoint["source"] not in ("toy", "gta5", "synthia") or classes != list(task_classes(checkpoint["source"])):
        raise InputError(f"{path}: not a checkpoint of this project, whose classes are others")
    model = model or network(len(classes), checkpoint["backbone"])
    load_weights(model, checkpoint["model"], path, f"a {checkpoint['backbone']} of {len(classes)} classes")
    return model


def load_model(path, args):
    """The network of a checkpoint, on the device that computes."""
    return unpack_model(read_checkpoint(path), path).to(args.device, memory_format=torch.channels_last)


def load_init(model, args, run):
    """Starts `model` from the checkpoint args.init of a source_only.py run, or a resumed run from its copy of that."""
    if run.load("source_only.pt", model):
        return
    saved = read_checkpoint(args.init)
    wanted = {"method": "source_only", **{key: getattr(args, key) for key in ("source", "toy_world", "backbone")}}
    for key, value in wanted.items():
        if isinstance(saved, dict) and saved.get(key, value) != value:
            raise InputError(f"{args.init}: expected a checkpoint of {key} {value}; it is one of {key} {saved[key]}")
    unpack_model(saved, args.init, model)
    if saved["step"] < saved["iterations"]:
        raise InputError(f"{args.init}: stands at step {saved['step']} of {saved['iterations']}; "
                         "let source_only.py finish (--resume)")
    run.save("source_only.pt", saved["step"], model)


def write_pseudo_labels(folder, labelled, args):
    """Writes pseudo-labels as PNGs into `folder`, one per image under its name.

    labelled: iterator over (batch with "name" and perhaps "label", pseudo-labels (N, H, W)). Returns what the log
    shows: the share of pixels kept and, in the toy world only, how many of these are right: of all, and of those given
    to each class, mean over the classes. The truth is looked at here and used nowhere.
    """
    classes = task_classes(args.source)
    metric, pixels = MeanIoU(len(classes)), torch.zeros(2, dtype=torch.int64)  # pixels: all, kept
    for batch, pseudo in labelled:
        pseudo = pseudo.cpu()
        for name, values in zip(batch["name"], pseudo):
            write_label(Path(folder) / f"{name}.png", values.numpy(), classes)
        pixels += torch.tensor([pseudo.numel(), (pseudo != IGNORE).sum()])
        if "label" in batch:
            truth = batch["label"]
            metric.update(truth, torch.where(truth == IGNORE, IGNORE, pseudo))  # a row per pseudo-label
    total, kept = all_sum(pixels.to(args.device)).tolist()  # which also waits until all processes have written
    told = {"kept": kept / total}
    if args.source == "toy":
        metric.sum_processes(args.device)
        right = metric.confusion.diagonal().sum() / metric.confusion.sum().clamp(min=1)
        told |= {"accuracy": right.item(), "accuracy_classes": metric.recall().nanmean().item()}
    return told


def run(main):
    """Calls a script's main(); what a user can mend ends it with one line, anything else with Python's traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter of a file's name
    try:
        main()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or else Python tries once more at its end
        sys.exit("stopped; nobody reads the output any more")
    except KeyboardInterrupt:
        sys.exit("stopped; a training run goes on from its last checkpoint with --resume")
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        if (told := in_one_line(error)) is None:
            raise
        sys.exit(f"error: {told}{Run.current.last_checkpoint() if Run.current else ''}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def in_one_line(error):
    """What a user can do about an error, None for what is a mistake of ours."""
    text = str(error)
    if isinstance(error, InputError):  # from a loader process it comes with that process's traceback in front
        return one_line(error).removeprefix("common.InputError: ")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return "out of memory; use less with --precision bf16, --batch-size 1, a smaller --crop or --preset small"
    if isinstance(error, OSError):  # of files: a full disk, no permission, too many open
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed ({one_line(error)[:100]}); it needs a C compiler; go on with --no-compile"
    if "DataLoader worker (pid" in text or "shared memory" in text:  # not an error of ours in such a process
        return (f"a process that reads pictures has died ({one_line(error)[:100]}); its memory or /dev/shm may be too "
                "small: fewer --workers, or --workers 0")
    return None


# ================================================= several processes =================================================
# Under torchrun every process runs the whole script on its share of each batch and of each data set. Gradients are
# averaged by DistributedDataParallel: losses are means over each process's own pixels, so the average differs from one
# process's loss where processes have different numbers of valid pixels. What is counted is summed exactly.


def rank():
    """Number of this process under torchrun, else 0. Only process 0 writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Number of processes under torchrun, else 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes(args):
    """Joins the other processes if torchrun started this one, and takes a GPU; InputError where there is none."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here, expected cpu")
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if "LOCAL_RANK" in os.environ:
        # NCCL asks for a GPU per process; gloo lets several share one, for a test.
        enough = args.device == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= gpus
        dist.init_process_group("nccl" if enough else "gloo")
    if args.device == "cuda":
        torch.cuda.set_device(local % gpus)
        torch.backends.cudnn.benchmark = True


def distribute(module, args):
    """The module as training must call it: compiled if so asked, and under torchrun with averaged gradients.

    Everything else (evaluation, copies, checkpoints) uses the bare module, whose weights are the same.
    """
    if world_size() > 1:
        if next(module.parameters()).device.type == "cpu" and live_batch_norms(module):
            raise InputError("live batch norm in several processes needs GPUs; give --init and --batch-norm target")
        module = nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)
    return compiled(module, args)


def compiled(module, args):
    """The module for forwards inside a training step: with --compile a faster one of the same weights."""
    return torch.compile(module) if args.compile else module


def all_sum(tensor):
    """Sum of a tensor over all processes."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


# ================================================== looking at data ==================================================


def describe(title, dataset, classes, samples):
    """Prints a data set's number of images, sizes, class shares, and what looks wrong. A broken file is an InputError.

    Returns at most four rows (image, label) to look at.
    """
    chosen, sizes, rows = some(dataset, samples or len(dataset)).indices, collections.Counter(), []
    counts, lost = np.zeros(256, np.int64), np.zeros(256, np.int64)  # pixels of each class; of each id that is none
    for index in chosen:
        item = dataset[index]
        image, label = item["image"], item.get("label", torch.full(item["image"].shape[1:], IGNORE)).numpy()
        sizes["x".join(map(str, image.shape[1:]))] += 1
        counts += np.bincount(label.ravel(), minlength=256)
        if getattr(dataset, "labels", None) is not None:
            ids = dataset.read_ids(dataset.labels[index])
            lost += np.bincount(ids[dataset.table[ids] == IGNORE], minlength=256)
        if len(rows) < 4:
            rows.append([to_picture(image), colour_label(label, classes)])
    shares = 100 * counts / counts.sum()
    labels = f"{100 - shares[IGNORE]:.1f} % of the pixels labelled" if "label" in item else "no labels"
    print(f"{title}: {len(dataset)} images, {labels}; {len(chosen)} read, sizes "
          + ", ".join(f"{size} ({number} images)" for size, number in sizes.items()))
    for name, share in [*zip(classes, shares), ("ignored", shares[IGNORE])] if "label" in item else ():
        print(f"    {name:14}{share:6.2f} %")
    for line in suspicions(dataset, 100 * lost / counts.sum()):
        print(f"    look: {line}")
    return rows


def suspicions(dataset, lost):
    """Lines on what a data set of files leaves out or may have got wrong. lost: % by id that is no class."""
    used, lines = set(getattr(dataset, "images", ())), []
    others = [path for folder in sorted({path.parent for path in used}) for path in sorted(folder.iterdir())
              if path not in used and path.suffix.lower() in PICTURES]
    if others:
        lines.append(f"{len(others)} files that are not read, such as {others[0]}; expected names like "
                     f"{dataset.images[0].name}")
    if lost.any():
        found = ", ".join(f"{i} ({lost[i]:.1f} %)" for i in np.argsort(-lost)[:5] if lost[i])
        kind = ("SYNTHIA ids in the first of three 16-bit channels (road is 3, car is 8)"
                if isinstance(dataset, Synthia) else "Cityscapes labelIds, not trainIds (road is 7, car is 26)")
        lines.append(f"pixels without a class have the ids {found}; expected are {kind}")
    return lines


def main():
    parser = argparse.ArgumentParser(description="Look at a source and its target before training on them.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_data_flags(parser)
    add = parser.add_argument
    add("--samples", type=natural, default=100, metavar="N", help="images to read per data set, 0 for all")
    add("--picture", type=Path, default="preview.png", metavar="FILE.png", help="where to draw the preview")
    parser.set_defaults(preset=None, size=None, source_size=None, compile=False, scale_jitter=(1, 1))  # parse asks
    args = parse(parser)
    if args.picture.suffix.lower() not in PICTURES:
        parser.error(f"--picture {args.picture}: expected a name that ends in .png")
    # Without a size each image and label is read as it stands in its file.
    args.size, args.source_size = ((80, 160), None) if args.source == "toy" else (None, None)
    sets = {"source train": source_dataset(args), "target train": target_dataset(args, "train")}
    if scorable(args):
        sets["target val"] = target_dataset(args, "val")
    else:
        print("target val: no labels (cityscapes/gtFine/val); a network can be adapted to it, but not scored")
    rows = [row for title, dataset in sets.items()
            for row in describe(title, dataset, task_classes(args.source), args.samples)]
    draw_panel(args.picture, ["image", "label"], rows)
    print(f"{len(rows)} scenes drawn into {args.picture}")


# =================================================== the toy world ===================================================


class ToyStreets(Dataset):
    """Street scenes drawn with Pillow and numpy: a measuring instrument with the 16 SYNTHIA classes and no files.

    Every picture is a function of (world, domain, split, index, size) alone. What it is made of, and for whom:

    * Zoom (LSE). The target's focal length is 1 to 2 times the source's: near things are larger than in the source.
    * A long tail (CPSL). Class shares have the shape of Cityscapes'. What is rare is in few pictures, but not small.
    * Looks (DRSL, SDCA). Three per class, of other shape, texture, colour. Look 0 is common in the source and rare in
      the target, look 2 the other way round. Within a look colours vary too, in some classes more than in others.
    * Weather and layout. The target has a tint, haze, shadows and noise, all moderate because new batch-norm statistics
      undo them; its streets are narrower and its houses lower.

    `world` draws other colours, proportions of the looks and another tint. `images` is the length of a train split; val
    has half of it. The target's train split carries no label unless `labelled=True`; `label_dir` as in Cityscapes.
    """

    def __init__(self, domain, split="train", size=(80, 160), world=0, augment=None, labelled=None, label_dir=None,
                 full_label=False, images=400):
        if domain not in ("source", "target") or split not in ("train", "val"):
            raise InputError(f"the toy world has domains source and target, splits train and val, not {domain} {split}")
        self.domain, self.split, self.size, self.world = domain, split, tuple(size), world
        self.labelled = (domain == "source" or split != "train") if labelled is None else labelled
        self.augment, self.label_dir, self.full_label = augment, label_dir, full_label
        self.length = images if split == "train" else max(1, images // 2)

    def __len__(self):
        return self.length

    def picture(self, index):
        """Image (H, W, 3), label (H, W) and looks (H, W) of one scene, all uint8."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return toy_picture(self.world, self.domain, self.split, index, self.size)

    def __getitem__(self, index):
        image, label, look = self.picture(index)
        name = f"toy_{self.domain}_{self.split}_{index:04d}"
        if self.label_dir is not None:
            label = read_label(Path(self.label_dir) / f"{name}.png")
        elif not self.labelled:
            label = None
        item = make_item(Image.fromarray(image), label, name, None, self.augment)
        if self.full_label:  # for the evaluation
            item["look"] = torch.from_numpy(look)
        return item


@functools.lru_cache(4000)
def toy_picture(world, domain, split, index, size):
    """Image, label, looks of a scene. Drawn once and kept, 65 kB each, because every stage of a run asks again."""
    rng = np.random.default_rng([world, domain == "target", split == "val", index])
    scene = Scene(rng, toy_style(world, domain), size)
    draw_street(scene)
    draw_things(scene)
    return develop(scene)


# Per class: how much colours vary from thing to thing; colour and roughness of each look; where look 2's colour leans.
_LOOKS = {
    "road": (6, ((82, 82, 88), 0.06), ((120, 114, 108), 0.03), ((153, 138, 130), 0.12)),  # sidewalk
    "sidewalk": (8, ((186, 166, 154), 0.08), ((158, 152, 150), 0.05), ((128, 119, 119), 0.06)),  # road
    "building": (16, ((164, 92, 72), 0.06), ((204, 186, 142), 0.03), ((133, 141, 160), 0.02)),  # sky
    "wall": (8, ((122, 108, 92), 0.12), ((146, 144, 140), 0.04), ((153, 96, 78), 0.08)),  # building
    "fence": (10, ((126, 80, 40), 0.06), ((60, 62, 66), 0.02), ((108, 103, 60), 0.10)),  # vegetation
    "pole": (6, ((46, 46, 50), 0.02), ((112, 84, 58), 0.06), ((150, 150, 148), 0.03)),  # wall
    "traffic light": (8, ((206, 158, 36), 0.02), ((86, 100, 60), 0.02), ((103, 86, 46), 0.02)),  # pole
    "traffic sign": (10, ((214, 38, 44), 0.01), ((36, 76, 206), 0.01), ((222, 196, 60), 0.01)),  # traffic light
    "vegetation": (12, ((62, 112, 50), 0.12), ((36, 84, 62), 0.10), ((117, 112, 58), 0.12)),  # fence
    "sky": (6, ((120, 168, 228), 0.01), ((176, 198, 222), 0.01), ((190, 192, 192), 0.02)),  # building
    "person": (26, ((92, 54, 132), 0.04), ((60, 66, 88), 0.04), ((166, 92, 79), 0.05)),  # rider
    "rider": (18, ((236, 118, 34), 0.04), ((196, 212, 54), 0.04), ((140, 80, 94), 0.04)),  # person
    "car": (34, ((184, 52, 50), 0.01), ((62, 82, 150), 0.01), ((212, 212, 206), 0.02)),  # bus
    "bus": (10, ((216, 206, 180), 0.01), ((72, 168, 126), 0.01), ((190, 110, 96), 0.02)),  # car
    "motorcycle": (12, ((78, 24, 34), 0.02), ((40, 44, 56), 0.02), ((66, 111, 133), 0.02)),  # bicycle
    "bicycle": (12, ((48, 166, 196), 0.02), ((92, 196, 132), 0.02), ((73, 80, 95), 0.02)),  # motorcycle
}
_ROUGHNESS = np.array([roughness for name in SYNTHIA_16 for _, roughness in _LOOKS[name][1:]])  # (48,), by tag


@functools.lru_cache
def toy_style(world, domain):
    """The constants of one domain of one world: colours and proportions of the looks, and the tint."""
    rng = np.random.default_rng([world, 2024])
    shares = np.array([0.63, 0.25, 0.12]) * rng.uniform(0.8, 1.25, (len(_LOOKS), 3))  # of looks 0, 1, 2 in the source
    shares = (shares / shares.sum(1, keepdims=True))[:, :: -1 if domain == "target" else 1]
    shift = rng.normal(0, 7, (len(_LOOKS), 1, 3)) + rng.normal(0, 5, (len(_LOOKS), 3, 3))
    tint = rng.normal(0, 1, 3)
    tint = 0.06 * (tint - tint.mean()) / np.linalg.norm(tint - tint.mean())  # leaves the brightness alone
    colours = {name: shift[i] + [colour for colour, _ in looks[1:]] for i, (name, looks) in enumerate(_LOOKS.items())}
    cumulated = dict(zip(_LOOKS, shares[:, :2].cumsum(1).tolist()))
    return {"colours": colours, "shares": dict(zip(_LOOKS, shares)), "cumulated": cumulated, "tint": tint,
            "target": domain == "target"}


class Scene:
    """A picture in the making: its camera, its random numbers and its pens.

    X points right, Y up, Z ahead, in metres; the camera is at (lateral, eye, 0). Whatever is drawn leaves colour in the
    image and a tag, 3 x class index + look, in the tags. Drawn at twice the size: edges as soft as a camera's.
    """

    def __init__(self, rng, style, size):
        self.rng, self.style, self.target = rng, style, style["target"]
        self.h, self.w = 2 * size[0], 2 * size[1]
        self.image, self.tags, self.shade = (Image.new(mode, (self.w, self.h), "white") for mode in ("RGB", "L", "L"))
        self.ink, self.tag_ink, self.shadow = (ImageDraw.Draw(canvas) for canvas in (self.image, self.tags, self.shade))
        self.strength = rng.uniform(0.3, 1.0) if self.target else 0.0  # of this picture's weather
        # The focal length in pixels: 1.2 picture heights see 80 degrees from left to right, 2.4 see 45.
        self.focal = 1.2 * self.h * (rng.uniform(1, 2) if self.target else 1)
        self.horizon, self.centre = self.h * rng.uniform(0.36, 0.48), self.w * rng.uniform(0.4, 0.6)
        self.eye, self.lateral = rng.uniform(1.4, 1.9), rng.uniform(-1.2, 1.2)
        self.street = rng.uniform(3.6, 5.0) if self.target else rng.uniform(4.2, 6.0)  # half its width
        self.front = self.street + rng.uniform(2.2, 3.6)  # where the houses stand

    def at(self, x, y, z):
        """Picture coordinates of a point."""
        return self.centre + self.focal * (x - self.lateral) / z, self.horizon + self.focal * (self.eye - y) / z

    def look(self, name):
        """Draws a look for a thing of that class: its number and its paint, which is a tag and a colour."""
        kind, spread = bisect.bisect(self.style["cumulated"][name], self.rng.random()), _LOOKS[name][0]
        colour = self.style["colours"][name][kind] * self.rng.normal(1, 0.008 * spread) + self.rng.normal(0, spread, 3)
        return kind, (3 * SYNTHIA_16.index(name) + kind, colour.clip(8, 245).tolist())

    def draw(self, shape, points, paint, tone, z, **options):
        """A shape of ImageDraw, z metres away; what is far takes the colour of the haze.

        tone: a factor on the paint's colour, a colour of its own, or None for what one sees through: the tag alone.
        """
        tag, colour = paint
        if tone is not None:
            (r, g, b), tone = (tone, 1.0) if isinstance(tone, tuple) else (colour, tone)
            fade = math.exp(-0.008 * z * self.strength)
            tone, haze = tone * fade, 205 * (1 - fade)
            fill = int(tone * r + haze), int(tone * g + haze), int(tone * b + haze)  # Pillow cuts at 255
            getattr(self.ink, shape)(points, fill=fill, **options)
        getattr(self.tag_ink, shape)(points, fill=tag, **options)

    def box(self, x, y, z, width, height, paint, tone=1.0, shape="rectangle"):
        """A rectangle, ellipse, cone (a triangle) or ring that faces the camera, x at its middle, y at its foot."""
        (u0, v1), (u1, v0) = self.at(x - width / 2, y, z), self.at(x + width / 2, y + height, z)
        if shape == "cone":
            self.draw("polygon", [(u0, v1), (u1, v1), ((u0 + u1) / 2, v0)], paint, tone, z)
        elif shape == "ring":  # a wheel: one sees through it, but it is labelled whole
            self.draw("ellipse", [u0, v0, u1, v1], paint, None, z)
            self.draw("arc", [u0, v0, u1, v1], paint, tone, z, start=0, end=360, width=max(2, round((u1 - u0) / 6)))
        else:
            self.draw(shape, [u0, v0, u1, v1], paint, tone, z)

    def ground(self, x0, x1, z0, z1, paint=None, tone=1.0):
        """A rectangle that lies on the ground; without paint, a shadow there."""
        points = [self.at(x0, 0, z0), self.at(x1, 0, z0), self.at(x1, 0, z1), self.at(x0, 0, z1)]
        if paint is None:
            self.shadow.polygon(points, fill=180)
        else:
            self.draw("polygon", points, paint, tone, z0)

    def side(self, x, y0, y1, z0, z1, paint, tone=1.0):
        """A rectangle that stands along the street."""
        points = [self.at(x, y0, z0), self.at(x, y0, z1), self.at(x, y1, z1), self.at(x, y1, z0)]
        self.draw("polygon", points, paint, tone, z0)


def draw_street(s):
    """Sky, skyline, ground and what stands along the pavements, from far to near."""
    kind, sky = s.look("sky")  # clear, with clouds, or grey
    for v in range(0, s.h, 8):
        s.draw("rectangle", [0, v, s.w, v + 8], sky, 0.88 + 0.24 * v / s.h, 0)
    for _ in range((0, 9, 3)[kind]):
        u, v, r = s.rng.uniform((0, 0, 0.03 * s.h), (s.w, 0.4 * s.h, 0.1 * s.h))
        s.draw("ellipse", [u - 3 * r, v - r, u + 3 * r, v + r], sky, (1, 1.15, 0.93)[kind], 0)
    for x in range(-84, 90, 12):
        name, tallest = ("building", 22) if s.rng.random() < 0.5 else ("vegetation", 14)
        s.box(x, -2, 50, 13, s.rng.uniform(6, tallest), s.look(name)[1])
    draw_ground(s)
    shady = s.rng.choice([-1, 1])  # the side whose houses hide the sun
    for side in (-1, 1):
        far = 50.0
        while far > 2.5:
            near = max(1.3, far - s.rng.uniform(5, 10))
            name = s.rng.choice(["building", "vegetation", "wall", "fence"], p=[0.54, 0.33, 0.06, 0.07])
            x, light = side * (s.front + s.rng.uniform(0, 0.8)), 1 - 0.2 * s.strength * (side == shady)
            if name in ("wall", "fence"):  # something else stands behind
                draw_front(s, s.rng.choice(["building", "vegetation"]), x + side * 3, near, far, light)
            draw_front(s, name, x, near, far, light)
            far = near
        if s.target and side == shady:
            s.ground(side * s.front * 1.3, side * s.rng.uniform(0.5, s.street), 1.2, 50)


def draw_ground(s):
    """Asphalt with markings, concrete slabs or cobbles; pavements of plates, or of asphalt behind a pale kerb."""
    paving, pavement = s.look("sidewalk")
    s.ground(-60, 60, 1.2, 50, pavement)
    for z in () if paving == 2 else 1.25 ** np.arange(1, 16):
        s.ground(-12, 12, z, z * 1.02, pavement, 0.82)
    surface, road = s.look("road")
    s.ground(-s.street, s.street, 1.2, 60, road)
    for side in (-s.street, s.street):
        s.ground(side, side * 1.04, 1.2, 50, pavement, (0.75, 0.85, 1.7)[paving])
    for z in 1.13 ** np.arange(3, 30) if surface == 2 else np.arange(1.5, 40, 4):
        if surface == 0:
            s.ground(-0.08, 0.08, z, z + 2, road, (215, 215, 205))
        else:
            s.ground(-s.street, s.street, z, z * 1.02, road, 0.8)


def draw_front(s, name, x, near, far, light):
    """A house, a hedge with trees, a wall or a fence, along the street from `near` to `far` metres."""
    kind, (tag, colour) = s.look(name)
    draw = {"building": draw_house, "vegetation": draw_trees, "wall": draw_wall, "fence": draw_fence}[name]
    draw(s, kind, (tag, [light * channel for channel in colour]), x, near, far)


def draw_house(s, kind, paint, x, near, far):
    """Brick with small dark windows, plaster with large ones, or a curtain of glass in bands."""
    height = s.rng.uniform(8, 15) if s.target else s.rng.uniform(9, 18)
    s.side(x, 0, height, near, far, paint)
    columns, rows, wide, tall, tone = ((4, 4, 0.4, 0.45, 0.4), (3, 3, 0.6, 0.6, 0.65), (1, 7, 1.0, 0.5, 1.3))[kind]
    deep, storey = (far - near) / columns, height / rows
    for z in near + deep * (np.arange(columns) + 0.5 - wide / 2):
        for y in storey * (np.arange(rows) + 0.3):
            s.side(x, y, y + tall * storey, z, z + wide * deep, paint, tone)


def draw_trees(s, kind, paint, x, near, far):
    """A hedge with round crowns, firs, or autumn trees whose crowns let the sky through."""
    if kind < 2:
        s.side(x * 1.1, 0, s.rng.uniform(1.5, 3), near, far, paint, 0.8)
    for z in -np.sort(-s.rng.uniform(near, far, (10, 4, 12)[kind])):
        shift, size, tone = s.rng.uniform((-0.8, 2.2, 0.75), (1.5, 4.8, 1.25))
        middle = x + np.sign(x) * shift
        if kind == 1:
            s.box(middle, 0.5, z, size, 4 + 1.5 * size, paint, tone, "cone")
        else:
            s.box(middle, 0, z, 0.4, 4, paint, 0.5)
            width = size if kind == 0 else 0.7 * size
            s.box(middle, s.rng.uniform(1.5, 6.5), z, width, 0.8 * size, paint, tone, "ellipse")


def draw_wall(s, kind, paint, x, near, far):
    """Rubble in courses, concrete in panels, or bricks, as the houses have them."""
    s.side(x, 0, 2.6, near, far, paint)
    draw_grid(s, paint, x, 2.6, near, far, (9, 1.5, 9)[kind], (0.6, 9, 0.3)[kind], 0.7)


def draw_fence(s, kind, paint, x, near, far):
    """Boards, or bars or wire through which one sees what stands behind."""
    s.side(x, 0, 2.2, near, far, paint, 1.0 if kind == 0 else None)
    draw_grid(s, paint, x, 2.2, near, far, (0.5, 0.4, 1.2)[kind], (9, 1.2, 0.4)[kind], 0.6 if kind == 0 else 1.0)


def draw_grid(s, paint, x, height, near, far, deep, tall, tone):
    """Upright lines every `deep` metres and level ones every `tall` metres."""
    for z in np.arange(near, far, deep):
        s.draw("line", [s.at(x, 0, z), s.at(x, height, z)], paint, tone, z, width=2)
    for y in np.arange(0.3, height, tall):
        s.draw("line", [s.at(x, y, near), s.at(x, y, far)], paint, tone, near, width=1)


# A thing is a list of parts, from back to front: shape, middle and foot, width and height in metres, tone. "side" is a
# rectangle along the street: where the flank is, its foot, its length and height.
_BOX, _DISC, _CONE, _RING, _SIDE = "rectangle", "ellipse", "cone", "ring", "side"
_GLASS, _TYRE, _SKIN, _PALE = (55, 65, 75), (25, 25, 28), (200, 150, 120), (240, 240, 235)


def vehicle(width, length, height, belt, roof, *windows):
    """A car or bus: body up to the belt line, cabin as wide as the roof, windows at these heights, wheels, lights."""
    body, cabin, pane = belt - 0.2, height - belt, 0.25 * (1 + belt)
    flank = [(_SIDE, width / 2, 0.2, length, body, 0.8), (_SIDE, roof / 2, belt, 0.8 * length, cabin, 0.75)]
    flank += [(_SIDE, roof / 2, y, 0.75 * length, pane, _GLASS) for y in windows]
    front = [(_BOX, 0, 0.2, width, body, 1.0), (_BOX, 0, belt, roof, cabin, 0.92)]
    front += [(_BOX, 0, y, 0.85 * roof, pane, _GLASS) for y in windows]
    for x in (-0.38 * width, 0.38 * width):
        front += [(_BOX, x, 0, 0.3, 0.45, _TYRE), (_BOX, x, 0.7 * belt, 0.3, 0.18, (235, 90, 60))]
    return flank + front


def human(hips, wide, legs, head, *trunk):
    """Legs `hips` metres long that end 0.9 m above the ground, trunk and head; `legs` and `head` are their tones."""
    return [(_BOX, 0, 0.9 - hips, wide, hips, legs), *trunk, (_DISC, 0.05, 1.45, 0.3, 0.33, head)]


def cycle(wheel, reach, size, tone, *frame):
    """Two wheels whose hubs are `reach` metres from the middle, and what lies between them."""
    return [(wheel, -reach, 0, size, size, tone), (wheel, reach, 0, size, size, tone), *frame]


def lamps(*places):
    """A bright green one, a dark yellow one and a dark red one."""
    glows = (60, 220, 110), (95, 75, 30), (95, 35, 30)
    return [(_DISC, x, y, 0.45, 0.45, glow) for (x, y), glow in zip(places, glows)]


_THINGS = {  # the parts of each of the three looks
    "car": [vehicle(1.8, 4.2, 1.4, 0.8, 1.35, 0.85), vehicle(1.8, 4.5, 1.7, 0.9, 1.6, 1.0),
            vehicle(1.85, 4.6, 2.1, 1.1, 1.8, 1.3)],
    "bus": [vehicle(2.5, 10, 3.1, 1.2, 2.5, 1.7), vehicle(2.5, 9, 4.2, 1.2, 2.5, 1.4, 3.0),
            vehicle(2.2, 7, 2.7, 1.0, 2.0, 1.6)],
    "person": [human(0.9, 0.44, 0.45, _SKIN, (_DISC, 0, 0.75, 0.62, 0.75, 1.0)),
               human(0.9, 0.30, 0.30, _SKIN, (_CONE, 0, 0.15, 0.9, 1.6, 1.0)),
               human(0.9, 0.30, _SKIN, (60, 40, 30), (_CONE, 0, 0.4, 0.8, 1.0, 0.6), (_BOX, 0, 0.8, 0.5, 0.65, 1.0),
                     (_BOX, 0.36, 0.5, 0.34, 0.5, 0.5))],
    "rider": [human(0.45, 0.4, 0.5, 0.8, (_DISC, 0, 0.85, 0.62, 0.75, 1.0)),
              human(0.45, 0.4, 0.4, _PALE, (_BOX, 0, 0.9, 0.66, 0.65, 1.0)),
              human(0.45, 0.5, 0.45, _SKIN, (_DISC, 0.1, 0.85, 0.75, 0.6, 1.0))],
    "motorcycle": [cycle(_DISC, 0.6, 0.68, _TYRE, (_DISC, 0, 0.3, 1.3, 0.75, 1.0)),
                   cycle(_DISC, 0.6, 0.7, _TYRE, (_BOX, 0, 0.35, 1.0, 0.5, 1.0)),
                   cycle(_DISC, 0.55, 0.48, _TYRE, (_BOX, -0.3, 0.3, 0.8, 0.6, 1.0),
                         (_BOX, 0.45, 0.3, 0.3, 0.95, 1.1))],
    "bicycle": [cycle(_RING, 0.55, 0.72, 0.55, (_CONE, 0, 0.3, 1.0, 0.65, 1.0), (_BOX, 0.4, 0.9, 0.3, 0.12, 0.5)),
                cycle(_RING, 0.6, 0.8, 0.55, (_BOX, 0, 0.5, 0.9, 0.15, 1.0), (_BOX, 0.35, 0.6, 0.14, 0.45, 1.0)),
                cycle(_RING, 0.5, 0.56, 0.8, (_BOX, 0, 0.3, 0.9, 0.14, 1.0), (_BOX, -0.3, 0.3, 0.14, 0.6, 1.0),
                      (_BOX, 0.4, 0.3, 0.14, 0.7, 1.0))],
    "pole": [[(_BOX, 0, 0, 0.3, 5.5, 1.0), (_BOX, 0, 5.4, 1.6, 0.25, 1.0)],
             [(_BOX, 0, 0, 0.4, 4.5, 1.0), (_BOX, 0, 4.0, 1.2, 0.2, 0.8)],
             [(_BOX, 0, 0, 0.35, 4.0, 1.0)] + [(_BOX, 0, y, 0.35, 0.5, 0.6) for y in (0.5, 1.5, 2.5, 3.5)]],
    "traffic light": [[(_BOX, 0, 2.4, 0.75, 1.8, 1.0), *lamps((0, 2.5), (0, 3.1), (0, 3.65))],
                      [(_DISC, 0, 2.2, 1.0, 2.2, 1.0), *lamps((0, 2.5), (0, 3.1), (0, 3.65))],
                      [(_BOX, 0, 2.6, 1.8, 0.75, 1.0), *lamps((-0.55, 2.75), (0, 2.75), (0.55, 2.75))]],
    "traffic sign": [[(_DISC, 0, 2.2, 1.2, 1.2, 1.0), (_BOX, 0, 2.7, 0.8, 0.25, _PALE)],
                     [(_BOX, 0, 2.2, 1.2, 1.2, 1.0), (_BOX, 0, 2.5, 0.5, 0.6, _PALE)],
                     [(_CONE, 0, 2.2, 1.6, 1.4, 1.0), (_BOX, 0, 2.4, 0.25, 0.6, 0.3)]],
}

# How many a source and a target picture has, how near and how far in metres, and where across the street: 0 its middle,
# 1 the kerb. The target has fewer cars and people, as its camera enlarges them. The nearest distance bounds their size.
_CAST = {"car": (6.0, 2.8, 6, 26, 0.35, 0.85), "person": (2.8, 1.7, 5, 18, 0.6, 1.4),
         "bus": (0.1, 0.1, 10, 24, 0.4, 0.6), "motorcycle": (0.13, 0.13, 6, 12, 0.4, 1.0),
         "bicycle": (0.55, 0.5, 6, 12, 0.6, 1.1), "pole": (0.9, 0.9, 7, 18, 1.06, 1.12),
         "traffic light": (0.3, 0.3, 7, 13, 1.06, 1.12), "traffic sign": (0.75, 0.65, 7, 15, 1.06, 1.12)}


def draw_things(s):
    """What stands and moves, from far to near. Lights and signs hang on poles; some two-wheelers are ridden."""
    things = []
    for name, (source, target, nearest, farthest, inner, outer) in _CAST.items():
        for _ in range(s.rng.poisson(target if s.target else source)):
            x = s.street * s.rng.choice([-1, 1]) * s.rng.uniform(inner, outer)
            things.append((s.rng.uniform(nearest, farthest), x, name))
    for z, x, name in sorted(things, reverse=True):
        if name in ("traffic light", "traffic sign"):
            draw_thing(s, "pole", x, z)
        draw_thing(s, name, x, z)
        if s.rng.random() < {"bicycle": 0.3, "motorcycle": 0.6}.get(name, 0):
            draw_thing(s, "rider", x, z)


def draw_thing(s, name, x, z):
    """One thing in one of its looks, its foot at x, z metres."""
    kind, paint = s.look(name)
    if s.target and name in ("car", "bus"):
        s.ground(x - 1.2, x + 1.2, z, z + 4)
    for shape, middle, foot, width, height, tone in _THINGS[name][kind]:
        if shape == "side":
            s.side(x - middle * np.sign(x - s.lateral), foot, foot + height, z, z + width, paint, tone)
        else:
            s.box(x + middle, foot, z, width, height, paint, tone, shape)


def develop(s):
    """The camera's part: texture, shadows, contrast, tint, blur, noise. Returns image, label and looks, uint8."""
    tags = np.array(s.tags)[::2, ::2]  # (H, W)
    picture = np.array(s.image.reduce(2), np.float32)  # (H, W, 3)
    picture *= 1 + (_ROUGHNESS[tags] * s.rng.standard_normal(tags.shape, np.float32))[:, :, None]
    if s.target:
        picture *= np.array(s.shade.reduce(2), np.float32)[:, :, None] / 255
        picture = 118 + (picture - 118) * (1 - 0.12 * s.strength) + s.rng.normal(0, 6)
        picture = np.clip(picture * (1 + s.style["tint"] * (0.5 + s.strength)), 0, 255).astype(np.uint8)
        picture = np.array(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.4 * s.strength)), np.float32)
        picture += s.rng.standard_normal(picture.shape, np.float32) * (1 + 2 * s.strength)
    return np.clip(picture, 0, 255).astype(np.uint8), tags // 3, tags % 3


if __name__ == "__main__":
    run(main)
