"""Everything that is not any paper's idea: data sets, DeepLabV2, mIoU, run folders, the toy world.

The method files (`source_only.py`, `drsl.py`, ...) import this module and nothing else of the project. There is no
loss, no pseudo-label rule and no training loop in here.

Shapes are written with the same letters everywhere:
    N batch    C classes    H x W image    h x w feature grid (stride 8)    D feature channels    n a list of pixels
Labels are indices into the task's class list; 255 means "ignore" wherever a label can stand.

In this order: classes and ids - files - data sets - augmentation and batches - networks - mIoU and pictures - command
line and run folder - several processes - looking at data - the toy world.

Look at a data set before you train on it (counts, sizes, class shares, what is wrong with files, a preview picture):

    python common.py                                     # the built-in toy world
    python common.py --source synthia --data-root DIR    # SYNTHIA -> Cityscapes
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

IGNORE = 255


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line: what was found, where, what was expected."""


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
    for index, name in enumerate(classes):
        table[_CLASSES[name][column]] = index
    return table


def palette(classes):
    """uint8 (256, 3): colour of each class index in the official Cityscapes colours; 255 (ignore) is black."""
    colours = np.zeros((256, 3), np.uint8)
    for index, name in enumerate(classes):
        colours[index] = _CLASSES[name][2]
    return colours


# ======================================================= files =======================================================


def open_image(path, what="image"):
    """The decoded PIL image of a file. Raises InputError, naming the file, if it cannot be read."""
    try:
        image = Image.open(path)
        image.load()
        return image
    except (OSError, SyntaxError) as error:  # Pillow reports broken PNG chunks as SyntaxError
        raise InputError(f"{path}: cannot read this {what} ({error})") from error


def read_image(path):
    """PIL image, RGB (an alpha channel is dropped)."""
    return open_image(path).convert("RGB")


def read_label(path):
    """uint8 (H, W): the ids of an 8-bit or palette PNG as they stand in the file, never converted to colours."""
    image = open_image(path, "label")
    if image.mode not in ("L", "P"):
        raise InputError(f"{path}: expected a label with one channel of 8-bit class ids, found mode {image.mode}")
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
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path}: cannot read this label ({error})") from error


def find_folder(root, relative):
    """Path of `relative` below `root`, each part matched without regard to case. Raises InputError if missing."""
    if root is None:
        raise InputError("no --data-root given: it must hold GTA5/ or RAND_CITYSCAPES/, and cityscapes/")
    path = Path(root)
    for part in Path(relative).parts:
        try:
            matches = [p for p in path.iterdir() if p.name.lower() == part.lower()] if path.is_dir() else []
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        if not matches:
            raise InputError(f"{path / part}: no such folder; expected {relative} below --data-root {root}")
        path = matches[0]
    return path


def list_images(folder, pattern="*.png"):
    """Sorted image paths below `folder`; a count of zero is an InputError."""
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"{folder}: cannot be read (permission denied)")
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise InputError(f"{folder}: no image found; expected files like {pattern}")
    return paths


def pair_labels(images, label_of):
    """Label path of every image; an image without a label is an InputError that names the first and counts them."""
    labels = [label_of(path) for path in images]
    existing = {path for folder in {label.parent for label in labels} if folder.is_dir() for path in folder.iterdir()}
    missing = [i for i, label in enumerate(labels) if label not in existing]
    if missing:
        raise InputError(f"{images[missing[0]]}: image without label, expected {labels[missing[0]]} "
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
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be written ({reason}); an earlier file of this name is intact") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_json(path):
    """Contents of a JSON file; InputError, naming the file, if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a file of JSON ({error})") from error


def write_json(path, contents):
    """Writes `contents` as JSON, atomically."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=1))


def write_label(path, label, classes):
    """Writes class indices (H, W) as a palette PNG: indices for programs, Cityscapes colours for eyes."""
    image = Image.fromarray(np.ascontiguousarray(label, np.uint8), mode="P")
    image.putpalette(palette(classes).flatten().tolist())
    with writing(path) as temporary:
        image.save(temporary)


# ===================================================== data sets =====================================================

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB: what torchvision's weights expect


def make_item(image, label, name, size, augment, full_label=False):
    """The dict that every data set returns: `image` float32 (3, H, W) normalised, `label` int64 (H, W), `name`.

    image: PIL RGB. label: uint8 (H, W) class indices or None. Both are resized to `size` (image bicubic, label
    nearest); with `full_label` the label keeps its own resolution, which is how mIoU is measured.
    """
    if size is not None:
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
        if label is not None and not full_label:
            label = np.array(Image.fromarray(label).resize((size[1], size[0]), Image.Resampling.NEAREST))
    image = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    label = None if label is None else torch.from_numpy(np.ascontiguousarray(label))
    if augment is not None:
        image, label = augment(image, label)
    image = (image.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    item = {"image": image.contiguous(), "name": name}
    if label is not None:
        item["label"] = label.long()
    return item


class GTA5(Dataset):
    """Labelled source: root/GTA5/images/*.png with root/GTA5/labels/*.png of the same name.

    Labels are palette PNGs whose *index* is the Cityscapes labelId. Image and label are each resized to `size`, so
    the two frames whose label has another size than the image (15188, 17705) need no exception; without `size`
    a label is resized to its image.
    """

    def __init__(self, root, size=None, augment=None, classes=CLASSES):
        self.images = list_images(find_folder(root, "GTA5/images"))
        folder = find_folder(root, "GTA5/labels")
        self.labels = pair_labels(self.images, lambda path: folder / path.name)
        self.size, self.augment = size, augment
        self.table = id_table(classes, 0)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        path = self.images[index]
        image, label = read_image(path), self.table[read_label(self.labels[index])]
        return make_item(image, label, path.stem, self.size or image.size[::-1], self.augment)


class Synthia(Dataset):
    """Labelled source: root/RAND_CITYSCAPES/RGB/*.png with root/RAND_CITYSCAPES/GT/LABELS/*.png (16-bit)."""

    def __init__(self, root, size=None, augment=None, classes=SYNTHIA_16):
        self.images = list_images(find_folder(root, "RAND_CITYSCAPES/RGB"))
        folder = find_folder(root, "RAND_CITYSCAPES/GT/LABELS")
        self.labels = pair_labels(self.images, lambda path: folder / path.name)
        self.size, self.augment = size, augment
        self.table = id_table(classes, 1)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        path = self.images[index]
        label = self.table[read_synthia_label(self.labels[index])]
        return make_item(read_image(path), label, path.stem, self.size, self.augment)


class Cityscapes(Dataset):
    """Target: root/cityscapes/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/.../*_gtFine_labelIds.png.

    labelled    open the label files; default: every split but train, whose labels stay closed
    label_dir   take the labels from this folder instead (pseudo-labels, NAME.png, class indices)
    full_label  keep labels at full resolution while images are resized: the evaluation protocol
    """

    def __init__(self, root, split="train", size=None, augment=None, classes=CLASSES, labelled=None, label_dir=None,
                 full_label=False):
        self.images = list_images(find_folder(root, f"cityscapes/leftImg8bit/{split}"), "*/*_leftImg8bit.png")
        self.labels = None
        if split != "train" if labelled is None else labelled:
            folder = find_folder(root, f"cityscapes/gtFine/{split}")
            self.labels = pair_labels(self.images, lambda path: (
                folder / path.parent.name / path.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png")))
        self.size, self.augment, self.label_dir, self.full_label = size, augment, label_dir, full_label
        self.table = id_table(classes, 0)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        path, label = self.images[index], None
        name = path.name.removesuffix("_leftImg8bit.png")
        if self.label_dir is not None:
            label = read_label(Path(self.label_dir) / f"{name}.png")
        elif self.labels is not None:
            label = self.table[read_label(self.labels[index])]
        return make_item(read_image(path), label, name, self.size, self.augment, self.full_label)


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


def training_augment(args, size=None, jitter=0.3):
    """Random scale, crop, flip and colour jitter as --scale-jitter and --crop say: (image, label or None) -> the same.

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
        scale if (low, high) != (1, 1) else v2.Identity(),
        v2.RandomCrop(args.crop),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter, hue=jitter / 6)]))


def apply_augment(transform, image, label):
    """The transform on an image and, if there is one, its label."""
    from torchvision import tv_tensors

    if label is None:
        return transform(tv_tensors.Image(image)).as_subclass(torch.Tensor), None
    image, label = transform(tv_tensors.Image(image), tv_tensors.Mask(label))
    return image.as_subclass(torch.Tensor), label.as_subclass(torch.Tensor)


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


def load(dataset, args, **options):
    """DataLoader with args.workers processes, which leave Ctrl-C to the main one. Draws no random number of its own."""
    return DataLoader(dataset, num_workers=args.workers, pin_memory=args.device == "cuda", generator=torch.Generator(),
                      worker_init_fn=ignore_interrupt, **options)


def ignore_interrupt(_):
    """Makes a loader process go on after Ctrl-C, because the main process wants to finish its step and save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def training_batches(dataset, args, seed, start, stop):
    """Yields (image (N, 3, H, W), label (N, H, W) or None) of the steps start..stop-1, on the device."""
    for batch in load(Batches(dataset, args.batch_size, seed), args, batch_size=None, sampler=range(start, stop)):
        label = batch["label"].to(args.device, non_blocking=True) if "label" in batch else None
        yield batch["image"].to(args.device, memory_format=torch.channels_last, non_blocking=True), label


def evaluation_batches(dataset, args):
    """Yields every picture of a data set once, in order, as batches with `image` on the device.

    Under torchrun each process has every n-th picture.
    """
    batch_size = 8 if args.source == "toy" else 1  # full-resolution labels may differ in size
    for batch in load(dataset, args, batch_size=batch_size, sampler=range(rank(), len(dataset), world_size())):
        batch["image"] = batch["image"].to(args.device, memory_format=torch.channels_last)
        yield batch


# ===================================================== networks =====================================================

BACKBONES = ("resnet101", "resnet50", "resnet18", "vgg16", "vgg16-fcn8s")
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class DeepLabV2(nn.Module):
    """DeepLabV2 (Chen et al., arXiv 1606.00915) on torchvision's ResNet-18/50/101 or VGG16, output stride 8.

    `forward(images (N, 3, H, W))` returns `(features (N, D, h, w), logits (N, C, h, w))`. The head is four parallel
    3x3 convolutions with dilation 6, 12, 18 and 24 whose outputs are *all* summed (in AdaptSegNet's widely copied
    code a misplaced `return` leaves the last two out). Resize the logits with `upsample`.

    A ResNet's max-pooling rounds sizes up, as in the papers' code: cell j of the grid is centred at pixel 8 j, and the
    last one lies at the picture's edge, 65x129 cells for 512x1024 pixels. (torchvision rounds down; the last cell is
    then centred 7 pixels before the edge, where upsampling paints it.) VGG16's cells tile the picture, centred at
    8 j + 3.5.

    weights   "none": random; "imagenet": downloaded by torchvision; otherwise the path of a torchvision state dict
              of this backbone. A file that does not fit is an InputError.
    """

    def __init__(self, num_classes, backbone="resnet101", weights="none"):
        super().__init__()
        net = torchvision_network(backbone, weights)
        if backbone == "vgg16":
            self.backbone, self.feature_dim = vgg16_stride_8(net), 1024
        else:
            net.maxpool.ceil_mode = True
            dilate(net.layer3, 2)
            dilate(net.layer4, 4)
            self.backbone = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool,
                                          net.layer1, net.layer2, net.layer3, net.layer4)
            self.feature_dim = net.fc.in_features
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


def torchvision_network(backbone, weights):
    """torchvision's classification network of that name; `weights` as for DeepLabV2."""
    import torchvision

    builders = {name: getattr(torchvision.models, name) for name in BACKBONES[:4]}
    if backbone not in builders:
        raise InputError(f"backbone {backbone!r} is not one of {', '.join(BACKBONES)}")
    # From random weights a ResNet learns much faster if every residual block starts as the identity.
    start = {"zero_init_residual": True} if backbone != "vgg16" and weights == "none" else {}
    try:
        net = builders[backbone](weights="IMAGENET1K_V1" if weights == "imagenet" else None, **start)
    except OSError as error:
        raise InputError(f"--backbone-weights imagenet: cannot be downloaded ({error}); give a file or none") from error
    if weights not in ("imagenet", "none"):
        load_weights(net, read_checkpoint(weights), weights, f"torchvision {backbone}")
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
    for layer in layers[-6:]:  # conv5_1 .. conv5_3
        if isinstance(layer, nn.Conv2d):
            layer.dilation = layer.padding = (2, 2)
    for channels in (512, 1024):
        layers += [nn.Conv2d(channels, 1024, 3, padding=4, dilation=4), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class FCN8s(nn.Module):
    """FCN-8s (Long et al., arXiv 1411.4038) on torchvision's VGG16, in the "at once" form of Caffe.

    `forward(images (N, 3, H, W))` returns `(features (N, 4096, H/32, W/32), logits (N, C, H, W))`: unlike DeepLabV2's,
    these logits have the size of the input, so that `upsample` to it changes nothing. Features are fc7, whose cell j
    lies at pixel 32 j + 12.5. fc6 and fc7 take over the weights of VGG's classifier.

    Caffe multiplies pool4 by 0.01 and pool3 by 0.0001, so that the finer scores learn as fast as the coarse one. Its
    VGG sees images of 0 to 255; torchvision's sees them divided by 255 and by a deviation of about 0.226, and with
    Caffe's factors pool3 would never learn. Both are therefore 255 * 0.226 = 58 times as large here. (Not measured on
    real data.)
    """

    def __init__(self, num_classes, weights="none"):
        super().__init__()
        net = torchvision_network("vgg16", weights)
        layers = list(net.features)
        layers[0].padding = (100, 100)  # so that fc6 fits on an image of any size and the crops below have room
        for layer in layers:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True
        fc6, fc7 = nn.Conv2d(512, 4096, 7), nn.Conv2d(4096, 4096, 1)
        for convolution, linear in ((fc6, net.classifier[0]), (fc7, net.classifier[3])):
            convolution.weight = nn.Parameter(linear.weight.detach().view_as(convolution.weight))
            convolution.bias = linear.bias
        top = [fc6, nn.ReLU(inplace=True), nn.Dropout2d(0.5), fc7, nn.ReLU(inplace=True), nn.Dropout2d(0.5)]
        self.backbone = nn.ModuleList([nn.Sequential(*layers[:17]), nn.Sequential(*layers[17:24]),  # to pool3, to pool4
                                       nn.Sequential(*layers[24:], *top)])
        self.feature_dim = 4096
        self.classifier = nn.ModuleList(nn.Conv2d(channels, num_classes, 1) for channels in (256, 512, 4096))
        for score in self.classifier:
            nn.init.zeros_(score.weight)
            nn.init.zeros_(score.bias)
        self.upsampling = nn.ModuleList(bilinear_upsampling(num_classes, factor) for factor in (8, 2, 2))

    def forward(self, images):
        H, W = images.shape[2:]
        pool3 = self.backbone[0](images)  # (N, 256, .., ..), stride 8
        pool4 = self.backbone[1](pool3)  # (N, 512, .., ..), stride 16
        fc7 = self.backbone[2](pool4)  # (N, 4096, .., ..), stride 32
        score3, score4 = self.classifier[0](0.0058 * pool3), self.classifier[1](0.58 * pool4)
        coarse = self.classifier[2](fc7)
        with torch.autocast("cuda" if images.is_cuda else "cpu", enabled=False):  # full-size logits stay fp32
            score = self.upsampling[2](coarse.float())  # stride 16
            score = score + score4[:, :, 5:5 + score.shape[2], 5:5 + score.shape[3]]
            score = self.upsampling[1](score)  # stride 8
            score = score + score3[:, :, 9:9 + score.shape[2], 9:9 + score.shape[3]]
            logits = self.upsampling[0](score)[:, :, 31:31 + H, 31:31 + W]  # (N, C, H, W)
        return fc7[:, :, :math.ceil(H / 32), :math.ceil(W / 32)], logits


def bilinear_upsampling(channels, factor):
    """Transposed convolution that upsamples each channel bilinearly by `factor`. It never learns."""
    kernel = 1 - (torch.arange(2 * factor) + 0.5 - factor).abs() / factor  # a triangle
    layer = nn.ConvTranspose2d(channels, channels, 2 * factor, stride=factor, groups=channels, bias=False)
    layer.requires_grad_(False).weight.copy_((kernel[:, None] * kernel).expand_as(layer.weight))
    return layer


def build_network(num_classes, backbone, weights="none"):
    """DeepLabV2 on that backbone, or FCN8s for "vgg16-fcn8s"."""
    return FCN8s(num_classes, weights) if backbone == "vgg16-fcn8s" else DeepLabV2(num_classes, backbone, weights)


def build_model(args, network=build_network):
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
        return
    was_training, steps = model.training, math.ceil(min(images, len(views)) / args.batch_size)
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # cumulative average
    model.train()
    for image, _ in training_batches(views, args, seed=0, start=0, stop=steps):
        with autocast(args):
            model(image)
    for module in norms:
        module.momentum = 0.1
        for statistic in (module.running_mean, module.running_var):
            statistic.copy_(all_sum(statistic.clone()) / world_size())
    model.train(was_training)


def settle_batch_norm(model, views, args):
    """What --batch-norm asks for whenever a model is about to be adapted, to label images or to be scored.

    live: statistics are estimated on `views`. target: the same the first time, then frozen. frozen: frozen as they are.
    """
    if args.batch_norm != "frozen":
        estimate_batch_norm(model, views, args)
    if args.batch_norm != "live":
        freeze_batch_norm(model)


def tiles(grid, size):
    """Whether a grid's cells (h, w) tile a picture (H, W), as VGG16's do; a ResNet has one cell more, edge to edge."""
    return size[0] % grid[0] == 0 and size[0] // grid[0] == size[1] / grid[1] >= 8


def upsample(logits, size):
    """(N, C, h, w) -> (N, C, H, W), bilinear: every cell of the grid is painted where the network is centred on it.

    A ResNet's first and last cells lie on the picture's edges (aligned corners), a VGG16's cells tile the picture.
    Sizes are multiples of 8; then this holds to within a pixel.
    """
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=not tiles(logits.shape[2:], size))


def grid_labels(label, size):
    """(N, H, W) -> (N, h, w): the label of the pixel at the centre of each cell, the inverse of `upsample`."""
    tiled = tiles(size, label.shape[1:])
    for axis, (cells, pixels) in enumerate(zip(size, label.shape[1:]), 1):
        cell = torch.arange(cells, device=label.device, dtype=torch.float64)
        centre = (cell + 0.5) * pixels / cells if tiled else cell * (pixels - 1) / max(cells - 1, 1)
        label = label.index_select(axis, centre.round().long())
    return label


def as_pixels(maps):
    """(N, D, h, w) -> (N h w, D): the order in which labels (N, h, w) flatten."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def autocast(args):
    """Context in which the network computes in args.precision: fp32 or bf16."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")


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
        pairs = label * classes + pred
        counts = torch.bincount(pairs, minlength=classes * classes)
        self.confusion = self.confusion.to(pred.device) + counts.view(classes, classes)

    def iou(self):
        hit = self.confusion.diagonal().double()
        return hit / (self.confusion.sum(0) + self.confusion.sum(1) - hit)  # 0 / 0 = NaN

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
            total = total + upsample(logits, size).softmax(1)
    return total / (len(scales) * (1 + flip))


def predictions(model, dataset, args, flip=False):
    """Yields each batch of this process's share of a data set and its probabilities (N, C, H, W)."""
    model.eval()
    for batch in evaluation_batches(dataset, args):
        yield batch, predict(model, batch["image"], batch["image"].shape[2:], args, flip=flip)


def evaluate(model, dataset, args, scales=(1.0,), flip=False, visit=None):
    """`scores` of a model on labelled data, at the labels' own resolution. `visit(batch, pred (N, H, W))` sees all."""
    was_training, classes = model.training, task_classes(args.source)
    model.eval()
    metric = MeanIoU(len(classes))
    for batch in evaluation_batches(dataset, args):
        label = batch["label"].to(args.device)
        prob = predict(model, batch["image"], label.shape[1:], args, scales, flip)  # (N, C, H, W)
        pred = prob.max(1).indices  # (N, H, W); on a CPU much faster than argmax
        metric.update(pred, label)
        if visit is not None:
            visit(batch, pred)
    model.train(was_training)
    metric.confusion = all_sum(metric.confusion.to(args.device))
    return scores(metric, classes)


def evaluate_target(model, args, split="val", **options):
    """`evaluate` on a split of the target, labels at full resolution."""
    return evaluate(model, target_dataset(args, split, labelled=True, full_label=True), args, **options)


def evaluate_source_only(model, args):
    """Table columns of a source-only model: as it is, and with batch-norm statistics estimated on the target."""
    columns, adapted = {"source only": evaluate_target(model, args)}, copy.deepcopy(model)
    for parameter in adapted.parameters():
        parameter.requires_grad_(True)  # so that frozen norms take part
    if live_batch_norms(adapted):
        estimate_batch_norm(adapted, target_dataset(args, "train", training_augment(args)), args)
        columns["+ BN target"] = evaluate_target(adapted, args)
    return columns


def compare_with_source_only(models, args, run, source_model, **meters):
    """The end of every method: {title: model} beside the run's source-only model, as table, result.json and picture.

    meters: {name: number}, what the method measures of its own idea.
    """
    columns = evaluate_source_only(source_model, args)
    columns.update({title: evaluate_target(model, args) for title, model in models.items()})
    run.finish(columns, **meters)
    comparison_panel(run.folder / "panel.png", {"source only": source_model, **models}, args)


def scores(metric, classes):
    """The plain dict that result.json and the tables hold: IoU per class and means, in percent, None for NaN.

    `miou` is the mean over the classes that occur in the labels: for SYNTHIA's task the mIoU over 16. There `miou13`
    stands beside it, another mean over the same 16-class predictions; `rare` is the mean over the long tail. A mean
    over classes of which none occurs is None. `share` tells how many of the labelled pixels each class takes as
    predicted and in truth; `histogram_distance` is half the sum of their differences (total variation distance), what
    a classifier that balances its classes keeps low.
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
MEANS = {"mIoU": "miou", "mIoU, 13": "miou13", "mIoU, rare": "rare", "histogram distance %": "histogram_distance"}


def score_table(columns):
    """Text: one row per class, one column per model. columns: {title: scores(...)}."""
    titles, results = list(columns), list(columns.values())
    widths = [max(len(title), 7) for title in titles]
    lines = [" " * 22 + "  ".join(title.rjust(width) for title, width in zip(titles, widths))]
    names = list(dict.fromkeys(name for result in results for name in result["iou"]))
    rows = [(name, [result["iou"].get(name) for result in results]) for name in names]
    rows += [(title, [result.get(key) for result in results]) for title, key in MEANS.items()]
    for name, values in rows:
        cells = ["-" if v is None or math.isnan(v) else f"{v:.1f}" for v in values]
        lines.append(f"{name:22}" + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths)))
    return "\n".join(lines)


def colour_label(label, classes):
    """Class indices (H, W) as a PIL picture in the official Cityscapes colours, ignored pixels black."""
    return Image.fromarray(palette(classes)[np.asarray(label, np.uint8)])


def to_picture(image):
    """A normalised image (3, H, W) as a PIL picture."""
    image = image.cpu() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def draw_panel(path, titles, rows, width=320):
    """Writes a grid of pictures: one row per scene, one titled column per entry of `titles`, each `width` wide."""
    height = round(width * rows[0][0].height / rows[0][0].width)
    sheet = Image.new("RGB", (len(titles) * (width + 4) - 4, 16 + len(rows) * (height + 4) - 4), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((column * (width + 4) + 4, 2), title, fill="black")
        for line, row in enumerate(rows):
            picture = row[column].resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * (width + 4), 16 + line * (height + 4)))
    with writing(path) as temporary:
        sheet.save(temporary)


def comparison_panel(path, models, args, split="val", scenes=4):
    """Writes image | truth | one column per model of {title: model} for `scenes` pictures of a split of the target."""
    dataset, classes, rows = target_dataset(args, split, labelled=True), task_classes(args.source), []
    for index in np.linspace(0, len(dataset) - 1, scenes).astype(int).tolist():
        item = dataset[index]
        row = [to_picture(item["image"]), colour_label(item["label"], classes)]
        for model in models.values():
            model.eval()
            image = item["image"][None].to(args.device)
            pred = predict(model, image, image.shape[2:], args).argmax(1)[0].cpu()  # (H, W)
            row.append(colour_label(torch.where(item["label"] == IGNORE, IGNORE, pred), classes))
        rows.append(row)
    if rank() == 0:
        draw_panel(path, ["image", "truth", *models], rows)


# ============================================ command line and run folder ============================================


class BySource(dict):
    """A default that depends on --source. argparse prints it in --help; `parse` picks the entry."""

    def __str__(self):
        texts = {k: "x".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in self.items()}
        return ", ".join(f"{source} {text}" for source, text in texts.items())


def by_source(toy, gta5, synthia=None):
    """Defaults for the three sources; synthia's are gta5's unless given."""
    return BySource(toy=toy, gta5=gta5, synthia=gta5 if synthia is None else synthia)


def number(kind, low, high=math.inf, above=False):
    """argparse type: a finite number of that kind, int or float, from low to high (or above low)."""
    def convert(text):
        value = kind(text)  # argparse reports the ValueError
        if not (math.isfinite(value) and low <= value <= high) or above and value == low:
            bound = f"above {low}" if above else f"of at least {low}"
            bound += f", at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not a number {bound}")
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


def png_file(text):
    """argparse type: the name of a PNG."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text}: expected a name that ends in .png")
    return text


def default_precision():
    """bf16 on a CPU with bf16 instructions (see the README for what that gains), fp32 elsewhere."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # unknown to older versions of torch
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16" if fast and not torch.cuda.is_available() else "fp32"


def add_data_flags(parser):
    """The flags that name a task and its data."""
    add = parser.add_argument
    add("--source", choices=("toy", "gta5", "synthia"), default="toy",
        help="labelled source; the toy world needs nothing, the others adapt to Cityscapes")
    add("--data-root", metavar="DIR", help="holds GTA5/ or RAND_CITYSCAPES/, and cityscapes/, as their archives unpack")
    add("--toy-world", type=natural, default=0, metavar="N", help="which world of the toy generator")
    add("--toy-images", type=count, default=400, metavar="N", help="training images per domain of the toy world")


def add_machine_flags(parser):
    """The flags that say where to compute, and how."""
    add = parser.add_argument
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cuda", "cpu"), default=best, help="where to compute")
    add("--precision", choices=("fp32", "bf16"), default=default_precision(), help="of the network; every loss is fp32")
    add("--workers", type=natural, metavar="N", default=by_source(0, 4), help="processes that read and augment images")


def shared_parser(doc, adapts=False):
    """The parser with the flags that mean the same in every script; each file adds its paper's own.

    doc: the script's docstring, whose first paragraph becomes the description. adapts: also those of every method.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add_data_flags(parser)
    add("--out", metavar="DIR", help="run folder; None means runs/METHOD-SOURCE-sSEED")
    add("--resume", action="store_true", help="continue the run in its folder, on the CPU to the bit")
    add("--backbone", choices=BACKBONES, default=by_source("resnet18", "resnet101"),
        help="network under the DeepLabV2 head, or FCN8s on VGG16")
    add("--backbone-weights", metavar="FILE|imagenet|none", default=by_source("none", "imagenet"),
        help="its start: a torchvision state dict, torchvision's download, or random")
    add("--size", type=height_width, metavar="HxW", default=by_source((80, 160), (512, 1024)),
        help="working size of target images, and of evaluation")
    add("--source-size", type=height_width, metavar="HxW", default=by_source((80, 160), (720, 1280), (760, 1280)),
        help="size to which source images are resized; --size, where only that is given")
    add("--crop", type=height_width, metavar="HxW", default=by_source((80, 160), (512, 1024)),
        help="random crop on which the network is trained; --size, where only that is given")
    add("--scale-jitter", type=positive, nargs=2, metavar=("LOW", "HIGH"), default=by_source([1.0, 1.0], [1.0, 1.5]),
        help="range of the random scale in training; the smallest picture must hold the crop")
    add("--batch-norm", choices=("live", "target", "frozen"), default=by_source("live", "frozen"),
        help="while adapting: live; or frozen, with the target's statistics or with the source-only model's")
    add("--optimizer", choices=("sgd", "adam", "adamw"), default=by_source("adamw", "sgd"),
        help="SGD as in the papers; AdamW learns faster from random weights; Adam as LSE for FCN8s")
    add("--head-lr", type=positive, metavar="X", default=by_source(1.0, 10.0),
        help="learning rate of new layers as a multiple of the backbone's (10 when that is pretrained)")
    add("--batch-size", type=count, metavar="N", default=by_source(4, 2),
        help="images per step and domain, over all processes")
    add("--seed", type=natural, default=0, metavar="N", help="of weights, data order and augmentation")
    add_machine_flags(parser)
    add("--log-every", type=count, metavar="N", default=by_source(20, 100), help="steps between two lines of the log")
    add("--save-every", type=count, metavar="N", default=by_source(100, 1000), help="steps between two checkpoints")
    if adapts:
        add("--init", metavar="CKPT", help="start from this source_only.py checkpoint instead of training one")
        add("--warmup-iterations", type=count, metavar="T", default=by_source(500, 60000),
            help="steps of source-only training")
        add("--warmup-lr", type=positive, metavar="X", default=by_source(1e-3, 2.5e-4), help="its base learning rate")
        add("--ramp", type=natural, metavar="T", default=by_source(40, 500),
            help="steps over which the adaptation's learning rate rises")
        add("--power", type=weight, metavar="X", default=0.9, help="exponent of its poly decay afterwards, 0 for none")
        add("--val-every", type=natural, default=0, metavar="N",
            help="steps between two looks at the target's validation score, an oracle that chooses nothing; 0 for none")
    return parser


def parse(parser, argv=None):
    """Parsed arguments with every default that depends on the source filled in."""
    args = parser.parse_args(argv)
    if args.source == "toy" and args.data_root:
        parser.error("--data-root without --source gta5 or synthia: the toy world reads no data")
    if not isinstance(getattr(args, "size", None), (BySource, type(None))):
        for key in ("source_size", "crop"):
            if isinstance(getattr(args, key), BySource):
                setattr(args, key, args.size)
    for key, value in vars(args).items():
        if isinstance(value, BySource):
            setattr(args, key, value[args.source])
    if args.source == "toy" and hasattr(args, "size"):
        args.source_size = args.size
    if hasattr(args, "scale_jitter") and args.scale_jitter[0] > args.scale_jitter[1]:
        parser.error(f"--scale-jitter {args.scale_jitter[0]} {args.scale_jitter[1]}: expected LOW HIGH")
    return args


def as_typed(key, value):
    """A setting as it is typed: --size 80x160, --no-focal, --lr 0.001."""
    flag = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if isinstance(value, list):
        return f"--{flag} " + ("x" if all(isinstance(v, int) for v in value) else " ").join(map(str, value))
    return f"--{flag} {value}" if value is not None else f"no --{flag}"


def ramp(step, args):
    """Share of the adaptation's learning rate at step 1, 2, ...: rises to 1 over --ramp steps.

    Without it the first steps of a fresh optimizer, whose statistics are those of one batch, throw the network about.
    """
    return min(1.0, step / max(args.ramp, 1))


class Run:
    """The folder of one run: args.json, log.jsonl, checkpoints, panel.png, result.json. No other run may write to it.

    Also holds what every loop asks between two steps: whether to log, to save, to stop, and the time spent.
    """

    def __init__(self, method, args):
        self.method, self.args, self.interrupted = method, args, False
        self.folder = Path(args.out or f"runs/{method}-{args.source}-s{args.seed}")
        self.seconds_before, self.started = 0.0, time.time()
        start_processes(args)
        check_data(args)
        torch.manual_seed(args.seed)
        settings = {"method": method, **vars(args)}
        lines = self.check_resume(settings) if args.resume else []
        if not args.resume and self.folder.is_dir() and any(self.folder.glob("*.pt")):
            raise InputError(f"{self.folder}: holds a run already; add --resume to continue it or choose another --out")
        if rank() == 0:
            self.lock = lock_folder(self.folder)
            with writing(self.folder / "log.jsonl") as temporary:  # again, because the file may end in half a line
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
            write_json(self.folder / "args.json", settings)
            print(f"{self.folder}  {versions()}  {args.device}  {args.precision}", flush=True)
        if lines:
            self.seconds_before = lines[-1]["seconds"]
        if world_size() == 1:
            signal.signal(signal.SIGINT, self.interrupt)
        else:
            dist.barrier()  # all have looked at the folder before anybody writes a checkpoint

    def check_resume(self, settings):
        """The log's lines. InputError where --resume finds no run, or one with other arguments; some may change."""
        if not (self.folder / "args.json").exists():
            raise InputError(f"{self.folder}: nothing to resume; expected the args.json of an earlier run there")
        before, now = read_json(self.folder / "args.json"), json.loads(json.dumps(settings))
        if not isinstance(before, dict):
            raise InputError(f"{self.folder / 'args.json'}: expected the settings of a run")
        free = ("resume", "out", "device", "workers", "log_every", "save_every", "val_every", "data_root")
        changed = [as_typed(k, before.get(k)) for k in now if k not in free and now[k] != before.get(k)]
        if changed:
            raise InputError(f"{self.folder}: the run to resume had {', '.join(changed)}; give the same arguments")
        return self.logged()

    def interrupt(self, *_):
        """First Ctrl-C: finish the step, save, stop. Second: stop at once. (Several processes: they die and resume.)"""
        self.interrupted = True
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def seconds(self):
        """Seconds of work on this run so far, earlier sessions included."""
        return self.seconds_before + time.time() - self.started

    def time_to_log(self, step, steps):
        """Whether `log_step` writes a line after this step: every `log_every` steps and at the end."""
        return step % self.args.log_every == 0 or step == steps

    def time_to_save(self, step, steps):
        """Whether a checkpoint is due after this step: every `save_every` steps, at the end, and after Ctrl-C."""
        return step % self.args.save_every == 0 or step == steps or self.interrupted

    def log_step(self, stage, step, steps, **values):
        """Every `log_every` steps a line on the screen and in log.jsonl; stops the run at a NaN or infinite value.

        values: numbers or scalar tensors. On a GPU they are read only when they are logged or about to be saved,
        because reading them makes the processor wait for the GPU.
        """
        logged = self.time_to_log(step, steps)
        if not (logged or self.args.device == "cpu" or self.time_to_save(step, steps)):
            return
        values = {name: float(value.detach() if torch.is_tensor(value) else value) for name, value in values.items()}
        if not all(math.isfinite(value) for value in values.values()):
            terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            raise InputError(f"{stage} step {step}: not finite ({terms}); {self.last_checkpoint()}")
        if logged:
            self.log(stage, f"{step}/{steps}", **values)

    def last_checkpoint(self):
        """What is left after a run has failed, for its message."""
        files = sorted(self.folder.glob("*.pt"), key=lambda path: path.stat().st_mtime)
        return f"the last checkpoint, {files[-1]}, is intact" if files else "there is no checkpoint yet"

    def log(self, stage, step="", **values):
        """One line on the screen and one object in log.jsonl."""
        if rank() == 0:
            entry = {"stage": stage, "step": step, **values, "seconds": round(self.seconds(), 1)}
            try:
                with open(self.folder / "log.jsonl", "a") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                reason = f"cannot be written ({error}); {self.last_checkpoint()}"
                raise InputError(f"{self.folder / 'log.jsonl'}: {reason}") from error
            text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
            print(f"{stage:14} {step:>9}  {text}  [{self.seconds():.0f} s]", flush=True)

    def logged(self):
        """The lines of log.jsonl so far, as dicts, without the half line that a killed run may leave at the end."""
        path, lines = self.folder / "log.jsonl", []
        texts = path.read_text(errors="replace").splitlines() if path.exists() else []
        for number, text in enumerate(texts, 1):
            try:
                lines.append(json.loads(text))
                lines[-1]["seconds"]
            except (ValueError, TypeError, KeyError) as error:
                if number == len(texts):
                    return lines[:number - 1]
                raise InputError(f"{path}: line {number} is damaged; take it out to go on") from error
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
        """Writes a checkpoint atomically; after Ctrl-C ends the program.

        It holds what `unpack_model` needs to rebuild the model anywhere, the step, the random numbers' state (dropout)
        and the state_dict of each named part. Tensors, numbers, strings and plain dicts.
        """
        args, states = self.args, {name: part.state_dict() for name, part in {"model": model, **parts}.items()}
        if not all(torch.isfinite(t).all() for state in states.values() for t in state.values() if torch.is_tensor(t)):
            raise InputError(f"{file}: weights are not finite; {self.last_checkpoint()}")
        task = {key: getattr(args, key) for key in ("source", "toy_world", "toy_images", "backbone")}
        task |= {"size": list(args.size), "classes": list(task_classes(args.source))}
        task["network"] = getattr(args, "head", "deeplab")
        contents = {"method": self.method, **task, "step": step, "random": torch.get_rng_state(), **states}
        if rank() == 0:
            with writing(self.folder / file) as temporary:
                torch.save(contents, temporary)
        if self.interrupted:
            sys.exit(f"stopped; to continue: the same command with --resume (the run is in {self.folder})")

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
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"{path}: not the checkpoint of a run with these arguments ({reason})") from error

    def finish(self, columns, own=None, **meters):
        """Prints the table of {title: scores}; writes result.json: all columns, on top those of `own`, last.pt's.

        own: the last column if not given. meters: {name: number}, what a method measures of its own idea.
        """
        own = own or list(columns)[-1]
        if rank() == 0:
            peak = torch.cuda.max_memory_allocated() if self.args.device == "cuda" else peak_memory()
            result = {**columns[own], "own": own, "columns": columns, "meters": meters, "versions": versions(),
                      "seconds": round(self.seconds(), 1), "peak_memory_gb": round(peak / 2**30, 2)}
            looks = [line for line in self.logged() if "val_miou" in line]
            if looks:
                best = result["best_on_validation"] = max(looks, key=lambda line: line["val_miou"])
                print(f"\noracle, chosen by target labels: best mIoU on the way {best['val_miou']:.1f} "
                      f"({best['stage']} {best['step']})")
            write_json(self.folder / "result.json", result)
            for name, value in meters.items():
                print(f"{name}: {value:.4g}")
            print(f"\n{score_table(columns)}\n\n{self.seconds():.0f} s, {result['peak_memory_gb']} GB; "
                  f"written to {self.folder}", flush=True)


def check_data(args):
    """Opens the folders of source and target, so that what is missing is said before any training."""
    source_dataset(args)
    for split in ("train", "val"):
        target_dataset(args, split)


def lock_folder(folder):
    """Makes a run folder and takes its lock, which ends with the process; InputError where another run holds it.

    Windows has no such lock; there nothing is checked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); --out names a folder") from error
    try:
        import fcntl
    except ImportError:
        return None
    lock = open(folder / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(f"{folder}: another run is writing there; choose another --out") from error
    return lock


def peak_memory():
    """Peak resident memory of this process in bytes, 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions():
    """One line: python, torch, the commit of these files if there is one, the processor or GPU."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    device = f"{os.cpu_count()} CPUs ({platform.machine()})"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return f"python {platform.python_version()}, torch {torch.__version__}, commit {commit or 'none'}, {device}"


def read_checkpoint(path):
    """Contents of a file of tensors and plain values, on the CPU. Cannot execute code; InputError if unreadable."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; expected a checkpoint") from error
    except Exception as error:  # a damaged or foreign file can fail in any way inside the unpickler
        raise InputError(f"{path}: not a checkpoint that can be read safely ({type(error).__name__})") from error


def load_weights(model, state, path, what):
    """Strict load_state_dict of finite weights; InputError, naming the file, where they do not fit."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path}: does not fit {what} ({reason})") from error
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise InputError(f"{path}: holds weights that are not finite")


def unpack_model(checkpoint, path, model=None):
    """The network of a checkpoint of any method, or `model` with its weights; InputError if the file is not ours."""
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path}: not a checkpoint of this project but a {type(checkpoint).__name__}")
    fits = {"method": lambda v: isinstance(v, str), "source": lambda v: v in ("toy", "gta5", "synthia"),
            "toy_world": lambda v: isinstance(v, int), "toy_images": lambda v: isinstance(v, int),
            "backbone": lambda v: v in BACKBONES, "network": lambda v: isinstance(v, str),
            "classes": lambda v: v in (list(CLASSES), list(SYNTHIA_16)), "model": lambda v: isinstance(v, dict),
            "size": lambda v: isinstance(v, list) and len(v) == 2 and all(isinstance(s, int) and s > 0 for s in v)}
    wrong = [key for key, fit in fits.items() if key not in checkpoint or not fit(checkpoint[key])]
    if wrong:
        raise InputError(f"{path}: not a checkpoint of this project (no proper {', '.join(wrong)} in it)")
    if model is None:
        if checkpoint["network"] != "deeplab":  # cpsl.py --head proda
            raise InputError(f"{path}: trained with --head {checkpoint['network']}, which only that script can rebuild")
        model = build_network(len(checkpoint["classes"]), checkpoint["backbone"])
    what = f"a {checkpoint['backbone']} of {len(checkpoint['classes'])} classes"
    load_weights(model, checkpoint["model"], path, what)
    return model


def load_model(path, args):
    """The network of a checkpoint, on the device that computes."""
    return unpack_model(read_checkpoint(path), path).to(args.device, memory_format=torch.channels_last)


def load_init(model, args, run):
    """Starts `model` from the checkpoint args.init of a source_only.py run; keeps a copy of it in the run folder."""
    saved = read_checkpoint(args.init)
    given = unpack_model(saved, args.init)  # says what is wrong with a file that is not a checkpoint of ours
    if saved["method"] != "source_only":
        raise InputError(f"{args.init}: a checkpoint of {saved['method']}; expected one of source_only.py, no --oracle")
    keys = ("source", "toy_world", "backbone")
    wrong = [key for key in keys if saved[key] != getattr(args, key)]
    if wrong:
        raise InputError(f"{args.init}: trained with " + ", ".join(as_typed(key, saved[key]) for key in wrong)
                         + "; this run has " + ", ".join(as_typed(key, getattr(args, key)) for key in wrong))
    model.load_state_dict(given.state_dict())
    run.save("source_only.pt", 0, model)


def write_pseudo_labels(folder, labelled, args):
    """Writes pseudo-labels as PNGs into `folder`, one per image under its name.

    labelled: iterator over (batch with "name" and perhaps "label", pseudo-labels (N, H, W)). Returns what the log
    shows: the share of pixels kept and, in the toy world only, their accuracy against the truth, which is used nowhere.
    """
    total, kept, right = torch.zeros(3, dtype=torch.int64).unbind()
    for batch, pseudo in labelled:
        pseudo = pseudo.byte().cpu()
        for name, values in zip(batch["name"], pseudo):
            write_label(Path(folder) / f"{name}.png", values.numpy(), task_classes(args.source))
        total += pseudo.numel()
        kept += (pseudo != IGNORE).sum()
        if "label" in batch:
            right += ((pseudo == batch["label"]) & (pseudo != IGNORE)).sum()
    # The sum also waits until all processes have written.
    total, kept, right = all_sum(torch.stack([total, kept, right]).to(args.device)).tolist()
    return {"kept": kept / total, **({"accuracy": right / max(kept, 1)} if args.source == "toy" else {})}


def run(main):
    """Calls a script's main(); an InputError, Ctrl-C or a file that cannot be used ends it with one line."""
    try:
        main()
    except InputError as error:
        # An error raised in a loader process arrives with that process's traceback in front of it.
        sys.exit("error: " + str(error).strip().splitlines()[-1].removeprefix("common.InputError: "))
    except KeyboardInterrupt:
        sys.exit("stopped at once; the same command with --resume goes on from the last checkpoint")
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"error: {error.filename}: {error.strerror}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


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
    """Joins the other processes if torchrun started this one, and takes its GPU; InputError where there is none."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here, expected cpu")
    if "LOCAL_RANK" in os.environ:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.benchmark = True


def distribute(module):
    """The module as training must call it: under torchrun wrapped so that backward() averages gradients over processes.

    Everything else (evaluation, copies, checkpoints) uses the bare module, whose weights are the same.
    """
    if world_size() == 1:
        return module
    if next(module.parameters()).device.type == "cpu" and live_batch_norms(module):
        raise InputError("several processes on CPUs need --init and --batch-norm frozen or target, or a network "
                         "without batch norm: torch synchronises live batch norm on GPUs only")
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


def all_sum(tensor):
    """Sum of a tensor over all processes."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


# ================================================== looking at data ==================================================


def describe(title, dataset, classes, samples):
    """Prints a data set's number of images, sizes, class shares, broken files, and what else looks wrong.

    Returns four rows (image, label) to look at, and what is wrong with each file that could not be used.
    """
    samples = min(samples or len(dataset), len(dataset))
    chosen = np.unique(np.linspace(0, len(dataset) - 1, samples).astype(int)).tolist()
    counts, sizes, rows, broken = np.zeros(256, np.int64), {}, [], []
    for index in chosen:
        try:
            item = dataset[index]
        except InputError as error:
            broken.append(str(error))
            continue
        size = "x".join(map(str, item["image"].shape[1:]))
        sizes[size] = sizes.get(size, 0) + 1
        if "label" in item:
            counts += np.bincount(item["label"].numpy().ravel(), minlength=256)
        if len(rows) < 4:
            picture = to_picture(item["image"])
            label = item.get("label", torch.full(picture.size[::-1], IGNORE))
            rows.append([picture, colour_label(label, classes)])
    labels = len(dataset) if counts.any() else "no"
    print(f"{title}: {len(dataset)} images, {labels} labels; {len(chosen)} read, sizes "
          + ", ".join(f"{size} ({number} images)" for size, number in sizes.items()))
    if counts.any():
        for name, pixels in [*zip(classes, counts), ("ignored", counts[IGNORE])]:
            print(f"    {name:14}{100 * pixels / counts.sum():6.2f} %")
    if broken:
        print(f"    {len(broken)} of {len(chosen)} broken, the first: {broken[0]}")
    if hasattr(dataset, "images"):
        for line in suspicions(dataset, [i for i in chosen if i < len(dataset.images)]):
            print(f"    look: {line}")
    return rows, broken


def suspicions(dataset, chosen):
    """Lines on what a data set of files silently leaves out or may have got wrong, judged by the chosen indices."""
    used, lines = set(dataset.images), []
    others = [path for folder in sorted({path.parent for path in used}) for path in sorted(folder.iterdir())
              if path not in used and path.suffix.lower() in (".png", ".jpg", ".jpeg")]
    if others:
        lines.append(f"{len(others)} files that are not read, such as {others[0]}; expected names like "
                     f"{dataset.images[0].name}")
    if dataset.labels is None:
        return lines
    different, ids = [], set()
    for index in chosen:
        with contextlib.suppress(InputError, OSError):  # broken files have been counted
            with Image.open(dataset.images[index]) as image, Image.open(dataset.labels[index]) as label:
                if image.size != label.size:
                    different.append(index)
            if not isinstance(dataset, Synthia):
                ids.update(np.unique(read_label(dataset.labels[index])).tolist())
    if different:
        lines.append(f"{len(different)} of {len(chosen)} labels have another size than their image, such as "
                     f"{dataset.labels[different[0]]}; they are resized")
    if ids == {IGNORE}:
        lines.append(f"every pixel of the labels is 255, such as in {dataset.labels[0]}; expected Cityscapes labelIds")
    elif ids and max(ids - {IGNORE}) < len(CLASSES):
        lines.append(f"no label id is above {len(CLASSES) - 1}, as in trainIds, such as in {dataset.labels[0]}; "
                     f"expected Cityscapes labelIds (road is 7, car is 26)")
    return lines


def main():
    parser = argparse.ArgumentParser(description="Look at a source and its target before training on them.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_data_flags(parser)
    add = parser.add_argument
    add("--samples", type=natural, default=100, metavar="N", help="images to read per data set, 0 for all")
    add("--picture", type=png_file, default="preview.png", metavar="FILE", help="where to draw the preview")
    args = parse(parser)
    classes = task_classes(args.source)
    # Without a size each image and label is read as it stands in its file.
    args.size, args.source_size = ((80, 160), None) if args.source == "toy" else (None, None)
    source_rows, source_broken = describe("source train", source_dataset(args), classes, args.samples)
    _, train_broken = describe("target train", target_dataset(args, "train"), classes, args.samples)
    target_rows, val_broken = describe("target val", target_dataset(args, "val"), classes, args.samples)
    if rows := source_rows + target_rows:
        draw_panel(args.picture, ["image", "label"], rows)
        print(f"{len(source_rows)} source and {len(target_rows)} target scenes drawn into {args.picture}")
    if broken := source_broken + train_broken + val_broken:
        raise InputError(broken[0])


# =================================================== the toy world ===================================================


class ToyStreets(Dataset):
    """Street scenes drawn with Pillow and numpy: a teaching instrument with the 16 SYNTHIA classes and no files.

    Every picture is a function of (world, domain, split, index) alone. The ingredients, and who needs them:

    * Perspective. A pinhole camera looks down a street; the same car, person or sign occurs from a few pixels to
      half the picture (scale invariance, LSE).
    * A long tail. Lights, signs, riders, motorcycles and bicycles are rare and small (class balance, CPSL).
    * Looks. Buildings, cars, clothes, road surfaces... come in three kinds each. Both domains have all kinds, but
      what is common in one is rare in the other (modes, DRSL; class distributions, SDCA).
    * The shift. The source is a rendering: clean, saturated, evenly lit. The target is a camera: textured surfaces,
      sun and cast shadows, haze that grows with distance, a colour cast, lower contrast and saturation, blur, sensor
      noise. Its strength differs from picture to picture, as weather does.
    * The layout. The target's streets are narrower and busier, its buildings lower, its camera less steady.

    `world` draws other colours, other proportions of the looks and another colour cast from the same generator.
    `images` is the length of a train split; val has a quarter of it. The target's train split carries no label unless
    `labelled=True`; `label_dir` as in Cityscapes.
    """

    def __init__(self, domain, split="train", size=(80, 160), world=0, augment=None, labelled=None, label_dir=None,
                 full_label=False, images=400):
        if domain not in ("source", "target") or split not in ("train", "val"):
            raise InputError(f"the toy world has domains source and target, splits train and val, not {domain} {split}")
        self.domain, self.split, self.size, self.world = domain, split, size, world
        self.labelled = (domain == "source" or split != "train") if labelled is None else labelled
        self.augment, self.label_dir, self.full_label = augment, label_dir, full_label
        self.length = images if split == "train" else max(1, images // 4)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        image, label = toy_picture(self.world, self.domain, self.split, index, tuple(self.size))
        name = f"toy_{self.domain}_{self.split}_{index:04d}"
        if self.label_dir is not None:
            label = read_label(Path(self.label_dir) / f"{name}.png")
        elif not self.labelled:
            label = None
        return make_item(Image.fromarray(image), label, name, None, self.augment, self.full_label)


@functools.lru_cache(4000)
def toy_picture(world, domain, split, index, size):
    """Image and label of one scene. They are drawn once and kept, 50 kB each, because every stage of a run asks again."""
    rng = np.random.default_rng([world, domain == "target", split == "val", index])
    return draw_street(rng, toy_style(world, domain), size)


# Three looks per class. Colour tells most classes apart in the source; the target's light and tint move it.
_LOOKS = {
    "road": [(90, 90, 95), (108, 102, 96), (75, 78, 90)],
    "sidewalk": [(190, 170, 160), (172, 158, 164), (206, 190, 174)],
    "building": [(165, 90, 70), (150, 155, 172), (205, 185, 140)],
    "wall": [(120, 92, 78), (136, 112, 100), (106, 88, 96)],
    "fence": [(124, 76, 36), (146, 104, 48), (98, 62, 40)],
    "pole": [(44, 44, 48), (60, 55, 50), (38, 48, 56)],
    "traffic light": [(196, 144, 26), (160, 128, 36), (208, 168, 64)],
    "traffic sign": [(220, 30, 40), (30, 70, 220), (245, 215, 40)],
    "vegetation": [(60, 120, 50), (100, 130, 50), (45, 90, 60)],
    "sky": [(120, 170, 230), (190, 205, 220), (215, 205, 200)],
    "person": [(96, 48, 142), (152, 60, 132), (62, 48, 112)],
    "rider": [(240, 118, 28), (196, 218, 40), (250, 160, 62)],
    "car": [(190, 40, 40), (60, 80, 150), (215, 215, 215)],
    "bus": [(60, 160, 118), (84, 192, 172), (28, 122, 100)],
    "motorcycle": [(74, 20, 32), (112, 30, 44), (50, 26, 44)],
    "bicycle": [(40, 170, 200), (84, 202, 222), (30, 130, 172)],
}


def toy_style(world, domain):
    """The constants of one domain of one world: colours and proportions of the looks, and the camera."""
    rng = np.random.default_rng([world, 2024])
    colours = {name: np.clip(np.array(looks) + rng.normal(0, 14, (3, 3)), 10, 245) for name, looks in _LOOKS.items()}
    # Source proportions .55, .30, .15 in some order; in the target the common look is rare and the rare one common.
    shares = {name: rng.permutation([0.55, 0.3, 0.15]) for name in _LOOKS}
    cast = rng.normal(0, 1, 3)
    cast = 0.14 * (cast - cast.mean()) / np.linalg.norm(cast - cast.mean())  # a tint: leaves the brightness alone
    if domain == "target":
        shares = {name: (0.7 - share) / 1.1 for name, share in shares.items()}
    return {"colours": colours, "shares": shares, "cast": cast, "target": domain == "target"}


def draw_street(rng, style, size):
    """One scene of the toy world: image uint8 (H, W, 3), label uint8 (H, W). See ToyStreets for what it contains."""
    target = style["target"]
    smooth = 2  # drawn at twice the size and averaged, so that edges are as soft as a camera's
    h, w = size[0] * smooth, size[1] * smooth
    image, label = Image.new("RGB", (w, h)), Image.new("L", (w, h), IGNORE)
    shade = Image.new("L", (w, h), 255)  # cast shadows, multiplied onto the picture at the end
    ink, tag, dark = ImageDraw.Draw(image), ImageDraw.Draw(label), ImageDraw.Draw(shade)

    # The camera. X right, Y up, Z ahead, in metres; the picture's height equals the focal length.
    strength = rng.uniform(0.2, 1.0) if target else 0.0  # of the shift, this picture's weather
    horizon, centre = h * rng.uniform(0.36, 0.48), w * rng.uniform(0.4, 0.6)
    eye, lateral, focal = rng.uniform(1.4, 1.9), rng.uniform(-1.2, 1.2), 1.35 * h
    roll = rng.normal(0, 0.02) if target else 0.0
    haze = np.array([200, 205, 210.0]) * (1 + style["cast"])

    def at(x, y, z):
        u, v = centre + focal * (x - lateral) / z, horizon + focal * (eye - y) / z
        return (u, v + roll * (u - centre))

    def paint(name, shape, points, colour, z, **options):
        fade = math.exp(-z * 0.016 * strength)  # what is far takes the colour of the haze
        colour = tuple(int(c) for c in np.clip(colour * fade + haze * (1 - fade), 0, 255))
        getattr(ink, shape)(points, fill=colour, **options)
        if name is not None:  # None: decoration (windows, wheels, markings) that keeps the label beneath it
            getattr(tag, shape)(points, fill=SYNTHIA_16.index(name), **options)

    def box(name, x, y, z, width, height, colour, shape="rectangle"):
        (u0, v1), (u1, v0) = at(x - width / 2, y, z), at(x + width / 2, y + height, z)
        paint(name, shape, [min(u0, u1), min(v0, v1), max(u0, u1), max(v0, v1)], colour, z)

    def look(name):
        kind = rng.choice(3, p=style["shares"][name])
        return kind, style["colours"][name][kind] * rng.uniform(0.85, 1.12)

    def ground(x0, x1, z0, z1):  # corners of a rectangle that lies on the ground
        return [at(x0, 0, z0), at(x1, 0, z0), at(x1, 0, z1), at(x0, 0, z1)]

    def upright(x, y0, y1, z0, z1):  # corners of a rectangle that stands along the street
        return [at(x, y0, z0), at(x, y0, z1), at(x, y1, z1), at(x, y1, z0)]

    # Sky, skyline and ground.
    _, sky = look("sky")
    tag.rectangle([0, 0, w, h], fill=SYNTHIA_16.index("sky"))
    for row in range(0, int(horizon + h * 0.1), 4):
        level = row / horizon
        ink.rectangle([0, row, w, row + 4], fill=tuple(int(min(255, c * (0.8 + 0.2 * level) + 25 * level)) for c in sky))
    for x in range(-90, 90, 12):
        name = "building" if rng.random() < 0.6 else "vegetation"
        box(name, x + 6, -2, 45, 13, rng.uniform(4, 14) if name == "building" else rng.uniform(3, 7), look(name)[1])
    street = rng.uniform(3.2, 4.6) if target else rng.uniform(3.8, 6.0)  # half its width
    front = street + rng.uniform(1.8, 3.5)  # where the houses stand
    _, pavement = look("sidewalk")
    surface, asphalt = look("road")
    paint("sidewalk", "polygon", ground(-60, 60, 1.2, 45), pavement, 6)
    paint("road", "polygon", ground(-street, street, 1.2, 60), asphalt, 6)
    for side in (-street, street):  # kerbs
        paint("sidewalk", "polygon", ground(side, side * 1.04, 1.2, 45), pavement * 0.75, 6)
    for z in range(2, 30, 4):  # lane markings, or the joints of concrete slabs
        if surface != 1:
            paint(None, "polygon", ground(-0.08, 0.08, z, z + 2), np.array([215, 215, 205.0]), z)
        else:
            paint(None, "polygon", ground(-street, street, z, z + 0.3), asphalt * 0.85, z)

    # The two sides of the street, from far to near.
    shady = rng.choice([-1, 1])  # the side whose houses hide the sun
    for side in (-1, 1):
        light = 1 - 0.3 * strength * (side == shady)
        z1 = 45.0
        while z1 > 2.5:
            z0 = max(1.3, z1 - rng.uniform(4, 9))
            x, middle = side * (front + rng.uniform(0, 0.8)), (z0 + z1) / 2
            name = rng.choice(["building", "vegetation", "wall", "fence"], p=[0.46, 0.2, 0.17, 0.17])
            if name in ("wall", "fence"):  # something stands behind it
                behind = rng.choice(["building", "vegetation"])
                shape = upright(x + side * 3, 0, rng.uniform(4, 8), z0, z1)
                paint(behind, "polygon", shape, look(behind)[1] * light, middle)
            kind, colour = look(name)
            colour = colour * light
            if name == "building":
                height = rng.uniform(4, 9) if target else rng.uniform(5, 13)
                paint(name, "polygon", upright(x, 0, height, z0, z1), colour, middle)
                columns, rows = ((3, 4), (6, 3), (2, 2))[kind]
                glass = colour * (0.45, 1.35, 0.65)[kind]
                for i in range(columns):
                    for j in range(rows):
                        za, zb = z0 + (z1 - z0) * (i + 0.25) / columns, z0 + (z1 - z0) * (i + 0.75) / columns
                        ya, yb = height * (j + 0.3) / rows, height * (j + 0.75) / rows
                        paint(None, "polygon", upright(x, ya, yb, za, zb), glass, za)
            elif name == "vegetation":
                paint(name, "polygon", upright(x + side, 0, rng.uniform(1.5, 3), z0, z1), colour * 0.8, middle)
                for _ in range(7):
                    z, y, r = rng.uniform(z0, z1), rng.uniform(1.5, 4.5), rng.uniform(0.8, 1.8)
                    box(name, x + side * rng.uniform(-0.5, 1.5), y, z, 2 * r, 1.6 * r, colour * rng.uniform(0.7, 1.25), "ellipse")
            elif name == "wall":
                paint(name, "polygon", upright(x, 0, rng.uniform(2.2, 3.2), z0, z1), colour, middle)
                for y in (0.7, 1.4, 2.1):
                    paint(None, "line", [at(x, y, z0), at(x, y, z1)], colour * 0.65, z0, width=smooth)
            else:
                height = rng.uniform(1.8, 2.6)
                paint(name, "polygon", upright(x, 0, height, z0, z1), colour, middle)
                for z in np.linspace(z0, z1, 9):
                    paint(None, "line", [at(x, 0, z), at(x, height, z)], colour * 0.4, z, width=2 * smooth)
            z1 = z0
        if target and side == shady:  # the houses' shadow on the ground
            reach = side * rng.uniform(0.5, street)
            dark.polygon(ground(side * front * 1.3, reach, 1.2, 45), fill=int(255 - 110 * strength))

    # Things that stand and move, from far to near. Rare: lights, signs, riders, two-wheelers, buses.
    busy = 1.3 if target else 1.0
    things = [("car", rng.uniform(4, 20), rng.choice([-1, 1])) for _ in range(rng.poisson(3 * busy))]
    things += [("person", rng.uniform(3.5, 11), rng.choice([-1, 1])) for _ in range(rng.poisson(2.6 * busy))]
    things += [("bus", rng.uniform(7, 16), rng.choice([-1, 1])) for _ in range(rng.random() < 0.35)]
    things += [("cycle", rng.uniform(3.5, 8), rng.choice([-1, 1])) for _ in range(rng.poisson(1.7 * busy))]
    things += [("pole", rng.uniform(4, 11), rng.choice([-1, 1])) for _ in range(2 + rng.poisson(1.5))]
    for kind, z, side in sorted(things, key=lambda thing: -thing[1]):
        if kind == "car":
            shape, colour = look("car")
            length, height = (3.8, 4.6, 4.2)[shape], (1.4, 2.1, 1.7)[shape]
            x, lower = side * rng.uniform(0.35, 0.8) * street, (0.6, 0.5, 0.55)[shape] * height
            if target:
                dark.polygon(ground(x - 1.3, x + 1.3, z, z + length), fill=130)
            inner = x - 0.9 * np.sign(x - lateral)  # the flank that the camera sees
            flank = [at(inner, 0.2, z), at(inner, 0.2, z + length), at(inner, lower, z + length),
                     at(inner, height, z + length * 0.7), at(inner, height, z + 0.4), at(inner, lower, z)]
            paint("car", "polygon", flank, colour * 0.8, z)
            box("car", x, 0.2, z, 1.8, lower, colour)
            box("car", x, lower, z + 0.2, (1.4, 1.75, 1.6)[shape], height - lower, colour * 0.9)
            box(None, x, lower * 1.1, z + 0.2, 1.25, (height - lower) * 0.75, np.array([55, 65, 75.0]))
            for wheel in (-0.7, 0.7):
                box("car", x + wheel, 0, z, 0.32, 0.5, np.array([25, 25, 28.0]))
                box(None, x + wheel, lower * 0.75, z, 0.3, 0.2, np.array([235, 60, 50.0] if side > 0 else [245, 240, 200.0]))
        elif kind == "bus":
            shape, colour = look("bus")
            x, height = side * 0.55 * street, (3.1, 3.6, 2.9)[shape]
            inner = x - 1.25 * np.sign(x - lateral)
            paint("bus", "polygon", upright(inner, 0.3, height, z, z + 9), colour * 0.8, z)
            box("bus", x, 0.3, z, 2.5, height - 0.3, colour)
            glass = np.array([50, 60, 75.0])
            box(None, x, height * 0.5, z, 2.2, height * 0.3, glass)
            paint(None, "polygon", upright(inner, height * 0.5, height * 0.8, z + 0.5, z + 8.5), glass, z)
            for wheel in (-0.9, 0.9):
                box("bus", x + wheel, 0, z, 0.4, 0.7, np.array([25, 25, 28.0]))
        elif kind == "person":
            _, colour = look("person")
            x = side * (rng.uniform(street, front) if rng.random() < 0.75 else rng.uniform(0, street))
            tall = rng.uniform(1.55, 1.9)
            box("person", x, 0, z, 0.55, tall * 0.5, colour * 0.55)
            box("person", x, tall * 0.42, z, 0.8, tall * 0.42, colour, "ellipse")
            box("person", x, tall * 0.82, z, 0.4, tall * 0.22, np.array([200, 150, 120.0]), "ellipse")
        elif kind == "cycle":
            name = "motorcycle" if rng.random() < 0.45 else "bicycle"
            _, colour = look(name)
            x, ridden = side * rng.uniform(0.5, 1.05) * street, rng.random() < 0.65
            thick = 0.28 if name == "motorcycle" else 0.14
            for wheel in (-0.55, 0.55):
                box(name, x + wheel, 0, z, 0.85, 0.85, colour * 0.5, "ellipse")
                if name == "bicycle":
                    box(None, x + wheel, 0.2, z, 0.45, 0.45, asphalt, "ellipse")
            paint(name, "line", [at(x - 0.55, 0.45, z), at(x, 0.85, z), at(x + 0.55, 0.45, z)], colour, z,
                  width=max(2, int(focal * thick / z)))
            if name == "motorcycle":
                box(name, x, 0.35, z, 0.9, 0.65, colour)
            if ridden:
                _, coat = look("rider")
                box("rider", x - 0.1, 0.75, z, 0.42, 0.45, coat * 0.6)
                box("rider", x, 1.05, z, 0.62, 0.75, coat, "ellipse")
                box("rider", x + 0.1, 1.7, z, 0.36, 0.38, colour * 0.9, "ellipse")  # a helmet, unlike a pedestrian
        else:
            _, colour = look("pole")
            x, top = side * (street + 0.4), rng.uniform(4, 6)
            box("pole", x, 0, z, 0.36, top, colour)
            kind = rng.choice(["light", "sign", "lamp"], p=[0.35, 0.4, 0.25])
            if kind == "light":
                _, housing = look("traffic light")
                box("traffic light", x, 2.4, z, 1.0, 2.2, housing)
                lit = rng.integers(3)
                for lamp in range(3):
                    glow = np.array([[60, 220, 110], [250, 190, 50], [250, 60, 50.0]][lamp]) * (1.0 if lamp == lit else 0.3)
                    box(None, x, 2.5 + 0.7 * lamp, z, 0.6, 0.6, glow, "ellipse")
            elif kind == "sign":
                shape, face = look("traffic sign")
                box("traffic sign", x, 2.2, z, 1.6, 1.6, face, ("ellipse", "rectangle", "rectangle")[shape])
                box(None, x, 2.7, z, 0.8, 0.6, np.array([240, 240, 235.0]) if shape < 2 else np.array([40, 40, 40.0]))

    # The camera's part: texture, light, colour, optics, noise.
    label = np.array(label)[::smooth, ::smooth]
    picture = np.array(image.reduce(smooth), np.float32)  # (H, W, 3)
    grain = 0.02 + 0.06 * strength
    coarse = Image.fromarray(rng.normal(0, 1, (size[0] // 8 + 1, size[1] // 8 + 1)).astype(np.float32))
    coarse = np.array(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    fine = rng.normal(0, 1, size) * np.isin(label, [0, 1, 2, 3, 8])  # surfaces are rough, skies and cars are not
    picture *= (1 + grain * (coarse + 0.6 * fine))[:, :, None]
    if target:
        soft = shade.reduce(smooth).filter(ImageFilter.GaussianBlur(1.0))
        picture *= np.array(soft, np.float32)[:, :, None] / 255
        picture = 255 * np.clip(picture / 255, 0, 1) ** (1 + 0.5 * strength * rng.uniform(-1, 1))  # exposure
        grey = picture.mean(2, keepdims=True)
        picture = grey + (picture - grey) * (1 - 0.3 * strength)  # colours fade
        picture = 128 + (picture - 128) * (1 - 0.2 * strength)  # contrast falls
        picture = picture * (1 + style["cast"] * (0.4 + strength))  # the tint
        blurred = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6 * strength))
        picture = np.array(blurred, np.float32) + rng.normal(0, 2 + 4 * strength, (*size, 3))
    return np.clip(picture, 0, 255).astype(np.uint8), label


if __name__ == "__main__":
    run(main)
