"""Tiny data sets in the real on-disk formats, written by the tests themselves."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def write_png(path, header, data, palette=bytes(3)):
    """A PNG of this IHDR chunk, a palette for colour type 3, and these rows, each after the number of its filter."""
    indexed = ((b"PLTE", palette),) if header[9] == 3 else ()
    chunks = ((b"IHDR", header), *indexed, (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ))


def write_png16(path, pixels, filters=(0, 1, 2, 3, 4)):
    """Writes uint16 (H, W, 3) as a 16-bit RGB PNG whose rows use the given PNG filters in turn.

    Written from the PNG specification, so that the reader under test is not checked against Pillow's own idea of it.
    """
    height, width, _ = pixels.shape
    rows = pixels.astype(">u2").tobytes()
    stride, bpp = width * 6, 6
    data, above = b"", bytes(stride)
    for y in range(height):
        row, kind = rows[y * stride:(y + 1) * stride], filters[y % len(filters)]
        line = bytearray()
        for i in range(stride):
            left, up = row[i - bpp] if i >= bpp else 0, above[i]
            corner = above[i - bpp] if i >= bpp else 0
            paeth = min((left, up, corner), key=lambda v: abs(left + up - corner - v))
            line.append((row[i] - (0, left, up, (left + up) // 2, paeth)[kind]) % 256)
        data, above = data + bytes([kind]) + bytes(line), row

    write_png(path, struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0), data)


def picture(label, rng):
    """An image in which every id has its own grey, so that a network can learn something from it."""
    image = np.repeat((np.asarray(label, np.float32) * 37 % 256)[:, :, None], 3, 2) + rng.normal(
        0, 6, (*label.shape, 3)
    )
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def blocks(ids, size, rng):
    """A label map of 16-pixel blocks of random ids."""
    small = rng.choice(ids, (-(-size[0] // 16), -(-size[1] // 16)))
    return small.repeat(16, 0).repeat(16, 1)[: size[0], : size[1]].astype(np.uint16)


def write_synthia(root, count=4, size=(48, 80), seed=0):
    rng = np.random.default_rng(seed)
    (root / "RAND_CITYSCAPES/RGB").mkdir(parents=True)
    (root / "RAND_CITYSCAPES/GT/LABELS").mkdir(parents=True)
    for i in range(count):
        label = blocks([0, 1, 2, 3, 4, 8, 10, 16, 22], size, rng)
        instance = rng.integers(0, 60000, size).astype(np.uint16)  # the second channel, which must not matter
        picture(label, rng).convert("RGBA").save(root / f"RAND_CITYSCAPES/RGB/{i:07d}.png")
        write_png16(root / f"RAND_CITYSCAPES/GT/LABELS/{i:07d}.png", np.stack([label, instance, label * 0], 2))


def write_gta5(root, count=4, size=(48, 80), seed=0):
    rng = np.random.default_rng(seed)
    (root / "GTA5/images").mkdir(parents=True)
    (root / "GTA5/labels").mkdir(parents=True)
    for i in range(count):
        label = blocks([0, 7, 8, 11, 21, 23, 26, 34, 35], size, rng)
        picture(label, rng).save(root / f"GTA5/images/{i + 1:05d}.png")
        write_palette(root / f"GTA5/labels/{i + 1:05d}.png", label)


def write_palette(path, label):
    image = Image.fromarray(label.astype(np.uint8), mode="P")
    image.putpalette([v for i in range(256) for v in (i * 7 % 256, i * 13 % 256, 255 - i)])
    image.save(path)


def write_cityscapes(root, splits=("train", "val"), count=3, size=(64, 128), seed=1):
    rng = np.random.default_rng(seed)
    for split in splits:
        for city in ("aachen", "bonn"):
            images, labels = root / "cityscapes/leftImg8bit" / split / city, root / "cityscapes/gtFine" / split / city
            images.mkdir(parents=True)
            labels.mkdir(parents=True)
            for i in range(count):
                label = blocks([0, 4, 7, 8, 11, 23, 24, 26], size, rng)
                name = f"{city}_{i:06d}_000019"
                picture(label, rng).save(images / f"{name}_leftImg8bit.png")
                Image.fromarray(label.astype(np.uint8)).save(labels / f"{name}_gtFine_labelIds.png")


STREETS = Path(__file__).parent.parent.parent / "shared/data/streets"  # real photographs, not part of the project
WEIGHTS = STREETS.parent.parent / "weights/resnet18_partial.pth"
needs_streets = pytest.mark.skipif(not (STREETS.exists() and WEIGHTS.exists()),
                                   reason="needs ../shared/data/streets and ../shared/weights")


def link_streets(root, count=12):
    """A tree of links to the first photographs of each set, with their labels."""
    for folder in ("RAND_CITYSCAPES/RGB", "RAND_CITYSCAPES/GT/LABELS", "cityscapes/leftImg8bit/train",
                   "cityscapes/leftImg8bit/val", "cityscapes/gtFine/train", "cityscapes/gtFine/val"):
        for path in sorted((STREETS / folder).rglob("*.png"))[:count]:
            link = root / path.relative_to(STREETS)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
