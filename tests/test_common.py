"""common.py: formats on files the tests write, the toy world, batches, the network, the metric, the run folder."""

import argparse
import colorsys
import json
import math
import os
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scripts import load, run, texts
from torch.utils.data import default_collate
from trees import blocks, write_cityscapes, write_gta5, write_palette, write_png, write_png16, write_synthia

import common
from common import (CLASSES, SYNTHIA_13, SYNTHIA_16, Cityscapes, DeepLabV2, GTA5, InputError, MeanIoU, Synthia,
                    ToyStreets)

def settings(**changes):
    """Arguments of a tiny toy run."""
    args = {"source": "toy", "toy_world": 0, "toy_images": 8, "data_root": None, "out": None, "resume": False,
            "seed": 0, "backbone": "resnet18", "backbone_weights": "none", "size": (32, 64), "source_size": (32, 64),
            "crop": (32, 64), "scale_jitter": [1.0, 1.0], "batch_norm": "live", "batch_size": 4, "workers": 0,
            "device": "cpu", "precision": "fp32", "compile": False, "log_every": 2, "save_every": 100, "val_every": 0,
            "iterations": 8}
    return argparse.Namespace(**{**args, **changes})


# ------------------------------------------------------ classes ------------------------------------------------------


def test_tasks():
    assert len(CLASSES) == 19 and CLASSES[0] == "road" and CLASSES[18] == "bicycle"
    assert set(CLASSES) - set(SYNTHIA_16) == {"terrain", "truck", "train"} and len(SYNTHIA_16) == 16
    assert set(SYNTHIA_16) - set(SYNTHIA_13) == {"wall", "fence", "pole"} and len(SYNTHIA_13) == 13
    assert [len(common.task_classes(s)) for s in ("gta5", "synthia", "toy")] == [19, 16, 16]


def test_id_tables_are_those_of_the_data_sets():
    cityscapes = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
                  27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    synthia = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 1: 9, 10: 10, 17: 11, 8: 12, 19: 13, 12: 14,
               11: 15}
    for table, known in ((common.id_table(CLASSES, 0), cityscapes), (common.id_table(SYNTHIA_16, 1), synthia)):
        assert [table[i] for i in range(256)] == [known.get(i, 255) for i in range(256)]
    assert common.label_ids(SYNTHIA_16)[-3:] == [28, 32, 33]
    assert common.palette(CLASSES)[13].tolist() == [0, 0, 142] and common.palette(SYNTHIA_16)[255].tolist() == [0, 0, 0]


# ------------------------------------------------------ formats ------------------------------------------------------


@pytest.mark.parametrize("filters", [(0,), (1,), (2,), (3,), (4,), (0, 1, 2, 3, 4)])
def test_synthia_labels_are_read_from_16_bits(tmp_path, filters):
    pixels = np.random.default_rng(0).integers(0, 65536, (11, 7, 3)).astype(np.uint16)
    pixels[:, :, 0] %= 23
    write_png16(tmp_path / "label.png", pixels, filters)
    assert np.array_equal(common.read_synthia_label(tmp_path / "label.png"), pixels[:, :, 0])
    assert common.read_synthia_label(tmp_path / "label.png").dtype == np.uint8
    assert np.array(Image.open(tmp_path / "label.png"))[:, :, 0].max() == 0  # what Pillow alone makes of it


def test_synthia(tmp_path):
    write_synthia(tmp_path)
    data = Synthia(tmp_path)
    item = data[0]
    assert len(data) == 4 and item["name"] == "0000000"
    assert item["image"].shape == (3, 48, 80) and item["image"].dtype == torch.uint8  # alpha dropped
    assert item["label"].shape == (48, 80) and item["label"].dtype == torch.int64
    raw = common.read_synthia_label(tmp_path / "RAND_CITYSCAPES/GT/LABELS/0000000.png")
    for index, raw_id in ((0, 3), (1, 4), (2, 2), (9, 1), (10, 10), (12, 8)):
        assert np.array_equal(item["label"].numpy() == index, raw == raw_id)
    assert np.array_equal(item["label"].numpy() == 255, np.isin(raw, [0, 16, 22]))  # void, terrain, lane marking
    assert Synthia(tmp_path, size=(24, 40))[1]["label"].shape == (24, 40)


def test_gta5_reads_the_palette_index(tmp_path):
    write_gta5(tmp_path)
    item = GTA5(tmp_path)[2]
    raw = np.array(Image.open(tmp_path / "GTA5/labels/00003.png"))
    assert item["name"] == "00003" and item["image"].shape == (3, 48, 80)
    for index, raw_id in ((0, 7), (1, 8), (2, 11), (8, 21), (10, 23), (13, 26)):
        assert np.array_equal(item["label"].numpy() == index, raw == raw_id)
    assert np.array_equal(item["label"].numpy() == 255, np.isin(raw, [0, 34, 35]))


@pytest.mark.parametrize("bits, colour, row, ids", [
    (4, 0, b"\x01\x78", None), (2, 0, b"\x1b", None), (1, 0, b"\x50", None),  # grey: Pillow makes 119 of the id 7
    (8, 0, b"\x00\x01\x07\x08", [0, 1, 7, 8]), (4, 3, b"\x01\x78", [0, 1, 7, 8]), (2, 3, b"\x1b", [0, 1, 2, 3]),
    (1, 3, b"\x50", [0, 1, 0, 1])])
def test_label_pngs_of_few_bits(tmp_path, bits, colour, row, ids):
    """Ids are read as they stand in the file, or not at all."""
    path = tmp_path / "label.png"
    write_png(path, struct.pack(">IIBBBBB", 4, 1, bits, colour, 0, 0, 0), b"\0" + row, palette=bytes(48))
    if ids:
        assert common.read_label(path).tolist() == [ids]
    else:
        found = {4: "L;4", 2: "L;2", 1: "1"}[bits]
        with pytest.raises(InputError, match=f"label.png: expected .* 8-bit class ids, found PNG of mode {found}$"):
            common.read_label(path)


def test_gta5_pair_of_different_sizes(tmp_path):
    write_gta5(tmp_path, count=1)
    write_palette(tmp_path / "GTA5/labels/00001.png", blocks([7, 8], (46, 78), np.random.default_rng(0)))
    item = GTA5(tmp_path, size=(32, 64))[0]
    assert item["label"].shape == item["image"].shape[1:] == (32, 64)
    assert GTA5(tmp_path)[0]["label"].shape == (48, 80)  # without a size the image's


def test_cityscapes(tmp_path):
    write_cityscapes(tmp_path)
    data = Cityscapes(tmp_path, "val", size=(32, 64))
    item = data[0]
    assert len(data) == 6 and item["name"] == "aachen_000000_000019"
    assert item["image"].shape == (3, 32, 64) and item["label"].shape == (32, 64)
    full = Cityscapes(tmp_path, "val", size=(32, 64), full_label=True)[0]
    raw = np.array(Image.open(tmp_path / "cityscapes/gtFine/val/aachen/aachen_000000_000019_gtFine_labelIds.png"))
    assert full["image"].shape == (3, 32, 64) and full["label"].shape == raw.shape
    assert np.array_equal(full["label"].numpy() == 13, raw == 26) and np.array_equal(
        full["label"].numpy() == 255, raw < 7
    )
    sixteen = Cityscapes(tmp_path, "val", classes=SYNTHIA_16)[0]["label"].numpy()
    assert np.array_equal(sixteen == SYNTHIA_16.index("car"), raw == 26)


def test_target_train_labels_stay_closed(tmp_path):
    write_cityscapes(tmp_path)
    for path in (tmp_path / "cityscapes/gtFine/train").rglob("*.png"):
        path.write_bytes(b"not a label")
    assert "label" not in Cityscapes(tmp_path, "train")[0]
    with pytest.raises(InputError, match="gtFine_labelIds.png"):
        Cityscapes(tmp_path, "train", labelled=True)[0]
    assert "label" not in ToyStreets("target", "train")[0]
    assert "label" in ToyStreets("target", "train", labelled=True)[0] and "label" in ToyStreets("target", "val")[0]


def test_images_are_normalised_for_torchvision_weights(tmp_path):
    (tmp_path / "GTA5/images").mkdir(parents=True)
    (tmp_path / "GTA5/labels").mkdir()
    Image.new("RGB", (2, 2), (255, 0, 51)).save(tmp_path / "GTA5/images/1.png")
    write_palette(tmp_path / "GTA5/labels/1.png", np.full((2, 2), 7))
    image = GTA5(tmp_path)[0]["image"]
    normalised = common.normalise(image[None])
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(normalised[0, :, 0, 0], torch.tensor(expected))
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    assert common.to_picture(image).getpixel((0, 0)) == (255, 0, 51)


def test_pictures_of_every_spelling_have_a_name_of_their_own(tmp_path):
    """The same file name in two folders, JPEGs, capitals; what macOS hides beside a picture is none."""
    for split in ("train", "val"):
        for folder in ("201", "202"):
            images = tmp_path / f"cityscapes/leftImg8bit/{split}/{folder}"
            labels = tmp_path / f"cityscapes/gtFine/{split}/{folder}"
            images.mkdir(parents=True), labels.mkdir(parents=True)
            for stem, suffix in (("frame0029", "png"), (f"only{folder}", "JPG")):
                Image.new("RGB", (16, 8), (int(folder), 0, 0)).save(images / f"{stem}_leftImg8bit.{suffix}")
                Image.new("L", (16, 8), 7).save(labels / f"{stem}_gtFine_labelIds.png")
            (images / "._frame0029_leftImg8bit.png").write_bytes(b"a resource fork")
        (images.parent / ".thumbnails").mkdir()
        (images.parent / ".thumbnails/small_leftImg8bit.png").write_bytes(b"hidden")
    data = Cityscapes(tmp_path, "val", classes=SYNTHIA_16)
    assert data.names == ["201/frame0029", "only201", "202/frame0029", "only202"]
    assert [item["image"][0, 0, 0].item() // 2 for item in data] == [100, 100, 101, 101] and data[1]["label"].any() == 0
    args = settings(source="synthia", data_root=tmp_path, size=(8, 16))
    pseudo = ((batch, torch.full((1, 8, 16), i)) for i, batch in
              enumerate(common.evaluation_batches(common.target_dataset(args, "train"), args)))
    assert common.write_pseudo_labels(tmp_path / "labels", pseudo, args) == {"kept": 1.0}
    taught = common.target_dataset(args, "train", label_dir=tmp_path / "labels")
    assert [item["label"].unique().tolist() for item in taught] == [[0], [1], [2], [3]]  # to each picture its own
    stems = [tmp_path / name for name in ("a/x.png", "a/x.jpg", "y.png")]
    assert common.unique_names(stems, tmp_path) == ["a/x.png", "a/x.jpg", "y"]


def test_training_pictures_are_resized_fast_and_others_bicubic():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (16, 32, 3), dtype=np.uint8))
    keep = lambda image, label: (image, label)
    half = common.make_item(image, None, "", (8, 16), keep)["image"]
    expected = np.array(image, float).reshape(8, 2, 16, 2, 3).mean((1, 3))  # (8, 16, 3)
    assert np.abs(half.permute(1, 2, 0).numpy() - expected).max() <= 1
    scored = common.make_item(image, None, "", (8, 16), None)["image"]
    assert np.array_equal(scored.permute(1, 2, 0), np.array(image.resize((16, 8), Image.Resampling.BICUBIC)))


def test_pictures_of_every_kind_are_rgb(tmp_path):
    """16-bit grey keeps its tones, of which Pillow would make white; alpha is dropped, a palette looked up."""
    Image.fromarray(np.full((2, 2), 25600, np.uint16)).save(tmp_path / "deep.png")
    indexed = Image.new("P", (2, 2))
    indexed.putpalette([100, 100, 100] * 256)
    indexed.save(tmp_path / "palette.png")
    Image.new("RGBA", (2, 2), (100, 100, 100, 0)).save(tmp_path / "alpha.png")
    Image.new("L", (1, 1), 100).save(tmp_path / "pixel.png")
    for name in ("deep", "palette", "alpha", "pixel"):
        image = common.read_image(tmp_path / f"{name}.png")
        item = common.make_item(image, None, name, (8, 16), lambda image, label: (image, label))
        assert torch.equal(item["image"], torch.full((3, 8, 16), 100, dtype=torch.uint8)), name


def test_lower_case_folders_are_found(tmp_path):
    write_gta5(tmp_path)
    (tmp_path / "GTA5").rename(tmp_path / "gta5")
    assert len(GTA5(tmp_path)) == 4


def test_stored_labels_replace_the_truth(tmp_path):
    write_cityscapes(tmp_path)
    label = np.random.default_rng(0).integers(0, 16, (64, 128)).astype(np.uint8)
    label[:9] = 255
    common.write_label(tmp_path / "aachen_000000_000019.png", label, SYNTHIA_16)
    item = Cityscapes(tmp_path, "train", label_dir=tmp_path)[0]
    assert np.array_equal(item["label"].numpy(), label)
    with pytest.raises(InputError, match="aachen_000001_000019.png"):
        Cityscapes(tmp_path, "train", label_dir=tmp_path)[1]


# ----------------------------------------------------- bad input -----------------------------------------------------


def test_bad_input_is_one_line_that_names_the_file(tmp_path):
    def message(make):
        with pytest.raises(InputError) as caught:
            make()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "--data-root" in message(lambda: GTA5(None))
    assert "GTA5" in message(lambda: GTA5(tmp_path))
    assert "cityscapes" in message(lambda: Cityscapes(tmp_path, "val"))
    write_synthia(tmp_path)
    label = tmp_path / "RAND_CITYSCAPES/GT/LABELS/0000002.png"
    label.rename(tmp_path / "gone.png")
    assert all(part in message(lambda: Synthia(tmp_path)) for part in ("0000002.png", "without label", "1 of 4"))
    label.write_bytes((tmp_path / "gone.png").read_bytes()[:-60])
    assert "0000002.png" in message(lambda: Synthia(tmp_path)[2])
    image = tmp_path / "RAND_CITYSCAPES/RGB/0000001.png"
    image.write_bytes(image.read_bytes()[:200])
    assert "0000001.png" in message(lambda: Synthia(tmp_path)[1])
    for path in (tmp_path / "RAND_CITYSCAPES/RGB").iterdir():
        path.unlink()
    assert "no image found" in message(lambda: Synthia(tmp_path))
    (tmp_path / "cityscapes/leftImg8bit/train/x").mkdir(parents=True)
    assert "no image found" in message(lambda: Cityscapes(tmp_path, "train"))
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    assert "bomb.png" in message(lambda: common.read_image(tmp_path / "bomb.png"))
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    assert "colour.png" in message(lambda: common.read_label(tmp_path / "colour.png"))
    assert "16-bit" in message(lambda: common.read_synthia_label(tmp_path / "colour.png"))
    Image.fromarray(np.full((4, 4), 1792, np.uint16)).save(tmp_path / "deep.png")  # its low byte is 0: road
    assert "deep.png" in message(lambda: common.read_label(tmp_path / "deep.png"))
    Image.new("L", (4, 4), 7).save(tmp_path / "blurred.png", "JPEG")
    assert "found JPEG" in message(lambda: common.read_label(tmp_path / "blurred.png"))
    for pictures in ("RAND_CITYSCAPES/RGB", "cityscapes/leftImg8bit/train/x"):
        (tmp_path / pictures / "1_leftImg8bit.png").symlink_to(tmp_path / "gone/away.png")
    assert "a link to nothing" in message(lambda: Synthia(tmp_path))
    assert "a link to nothing" in message(lambda: Cityscapes(tmp_path, "train"))
    assert "larger than" in message(lambda: common.training_augment(settings(size=(64, 128), crop=(72, 128))))
    assert "scaled by 0.5" in message(lambda: common.training_augment(settings(scale_jitter=[0.5, 1.0])))
    assert "moon" in message(lambda: ToyStreets("moon"))
    assert "resnet7" in message(lambda: DeepLabV2(2, "resnet7"))


# --------------------------------------------------- the toy world ---------------------------------------------------


def test_toy_stops_at_its_end():
    data = ToyStreets("target", "val")
    assert len(data) == 200
    assert len(ToyStreets("target", images=6)) == 6 and len(ToyStreets("target", "val", images=6)) == 3
    with pytest.raises(IndexError):
        data[200]


# ---------------------------------------------- augmentation and batches ----------------------------------------------


def test_a_scale_of_one_changes_nothing_and_larger_ones_never_pad():
    """torchvision's ScaleJitter takes (width, height) where everything else takes (height, width)."""
    image = torch.randint(0, 256, (3, 40, 80), dtype=torch.uint8)
    label = torch.randint(0, 16, (40, 80), dtype=torch.uint8)
    same = {"size": (40, 80), "crop": (40, 80)}
    augment = common.training_augment(settings(**same))
    for _ in range(4):
        x, y = augment(image, label)
        flipped = not torch.equal(y, label)
        assert torch.equal(x.flip(2) if flipped else x, image) and torch.equal(y.flip(1) if flipped else y, label)
    larger = common.training_augment(settings(**same, scale_jitter=[1.0, 1.5]))
    shrunk = common.training_augment(settings(size=(40, 80), crop=(16, 40), scale_jitter=[0.5, 0.5]))
    for _ in range(8):
        x, y = larger(image, label)
        assert y.shape == (40, 80) and y.max() < 16
        x, y = shrunk(image, label)
        assert y.shape == (16, 40) and y.max() < 16 and x.shape == (3, 16, 40)


def test_augmentation_moves_image_and_label_together():
    label = torch.from_numpy(
        blocks(range(5), (32, 64), np.random.default_rng(0)).repeat(2, 0).repeat(2, 1).astype(np.uint8)
    )
    image = (label * 50)[None].expand(3, -1, -1).contiguous()
    augment = common.training_augment(settings(size=(64, 128), crop=(48, 96), scale_jitter=[0.75, 1.5]))
    torch.manual_seed(0)
    for _ in range(10):
        x, y = augment(image, label)
        assert x.shape == (3, 48, 96) and y.shape == (48, 96) and type(x) is type(y) is torch.Tensor
        agree = (x[0].float() / 50).round() == y
        assert agree.float().mean() > 0.9  # but for the soft edges of a bilinear resize
        assert set(y.unique().tolist()) <= {0, 1, 2, 3, 4}
    x, y = augment(image, None)
    assert x.shape == (3, 48, 96) and y is None


def test_batches_are_a_function_of_seed_and_step():
    args = settings(batch_size=3, scale_jitter=[1.0, 1.2])
    data = ToyStreets("source", "val", (32, 64), augment=common.training_augment(args))
    batches = lambda seed, start, stop: list(common.training_batches(data, args, seed, start, stop))
    state = torch.get_rng_state()
    whole, tail = batches(0, 0, 5), batches(0, 3, 5)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone
    assert torch.equal(whole[3][0], tail[0][0]) and torch.equal(whole[4][1], tail[1][1])
    assert not torch.equal(whole[0][0], batches(1, 0, 1)[0][0])
    args.workers = 2
    assert torch.equal(batches(0, 0, 5)[4][0], whole[4][0])
    unlabelled = ToyStreets("target", "train", (32, 64))
    assert next(common.training_batches(unlabelled, args, 0, 0, 1))[1] is None


def test_colours_vary_on_the_device_picture_by_picture(monkeypatch):
    images = torch.randint(0, 256, (1, 3, 8, 16), dtype=torch.uint8).expand(4, -1, -1, -1)
    state = torch.get_rng_state()
    seen = common.colour_jitter(images, 5, 1)
    assert torch.equal(torch.get_rng_state(), state) and seen.dtype == torch.uint8
    assert len({tuple(view.flatten().tolist()) for view in seen}) == 4  # each its own
    assert torch.equal(seen, common.colour_jitter(images, 5, 1))
    assert not torch.equal(seen, common.colour_jitter(images, 5, 2))
    assert torch.equal(common.colour_jitter(images, 5, 1, strength=0.0), images)
    grey = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    tones = torch.cat([common.colour_jitter(grey, 6, i, strength=0.3) for i in range(60)])[:, 0, 0, 0].float() / 100
    assert 0.69 <= tones.min() < 0.8 and 1.2 < tones.max() <= 1.31  # brightness by as much; grey has no other colour
    red = torch.tensor([150, 100, 100], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    seen_red = [common.colour_jitter(red, 7, i)[0, :, 0, 0].tolist() for i in range(40)]
    turns = [(colorsys.rgb_to_hsv(*view)[0] + 0.5) % 1 - 0.5 for view in seen_red]
    assert 0.03 < max(map(abs, turns)) < 0.065  # of the hue's circle, 0.3 / 6 and rounding
    monkeypatch.setattr(common, "rank", lambda: 1)  # the second of two processes: pictures 2 and 3 of the batch
    assert torch.equal(common.colour_jitter(images[:2], 5, 1), seen[2:])


def test_batches_come_jittered_clean_or_as_bytes():
    args = settings(batch_size=2)
    data = ToyStreets("source", "val", (32, 64), images=8)
    take = lambda **how: next(common.training_batches(data, args, 3, 2, 3, **how))
    raw, clean, jittered = take(jitter=None), take(jitter=0), take()
    assert raw[0].dtype == torch.uint8 and all(torch.equal(other[1], raw[1]) for other in (clean, jittered))
    assert torch.equal(clean[0], common.normalise(raw[0]))
    assert torch.equal(jittered[0], common.normalise(common.colour_jitter(raw[0], 3, 2, 2)))
    assert torch.equal(take(jitter=0.1)[0], common.normalise(common.colour_jitter(raw[0], 3, 2, 2, strength=0.1)))


def test_loaders_of_a_step_share_the_workers(monkeypatch):
    made = []
    monkeypatch.setattr(common, "DataLoader", lambda *_, **options: made.append(options["num_workers"]) or [])
    for workers, share in ((16, 1), (16, 2), (5, 2), (1, 2), (0, 2)):
        common.load([], settings(workers=workers), share)
    assert made == [16, 8, 3, 1, 0]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(40)), raising=False)
    assert common.processors() == 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 9}, raising=False)
    assert common.processors() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert common.processors() == 1


class Void(torch.utils.data.Dataset):
    """Pictures of which only number 150 has a labelled pixel."""

    def __len__(self):
        return 200

    def __getitem__(self, index):
        label = torch.full((8, 8), 255)
        label[0, 0] = 255 if index < 150 else 3
        return {"image": torch.zeros(3, 8, 8, dtype=torch.uint8), "label": label}


def test_labels_without_a_class_stop_a_run_before_it_starts(tmp_path):
    write_gta5(tmp_path)
    write_cityscapes(tmp_path)
    args = settings(source="gta5", data_root=tmp_path, out=str(tmp_path / "run"))
    assert common.check_data(args)
    labels = (tmp_path / "cityscapes/gtFine/val").rename(tmp_path / "away")
    assert not common.check_data(args)
    with pytest.raises(InputError, match="--val-every: the target has no validation labels"):
        common.check_data(settings(**{**vars(args), "val_every": 1}))
    labels.rename(tmp_path / "cityscapes/gtFine/val")
    for path in (tmp_path / "GTA5/labels").iterdir():
        write_palette(path, blocks([58, 76, 107], (48, 80), np.random.default_rng(1)))  # grey tones
    with pytest.raises(InputError, match="00001.png: neither here nor in seven others does a pixel belong to a class"):
        common.Run("drsl", args)
    assert not (tmp_path / "run").exists()


def test_training_without_any_label_stops_after_a_hundred_steps(monkeypatch):
    monkeypatch.setattr(common.Batches, "__getitem__", lambda self, step: default_collate([self.dataset[step]]))
    args = settings(batch_size=1)
    batches = common.training_batches(Void(), args, 0, 0, 200, jitter=0)
    assert len([next(batches) for _ in range(99)]) == 99
    with pytest.raises(InputError, match="Void: no pixel of the first hundred steps has a label"):
        next(batches)
    assert len(list(common.training_batches(Void(), args, 0, 60, 200, jitter=0))) == 140  # the ninety-first has one


def test_the_share_of_waiting_is_told(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(common.time, "time", lambda: clock[0])
    run = common.Run("drsl", settings(out=str(tmp_path / "run"), log_every=2))
    for step, waits in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 0.05), (5, 4.0), (6, 4.0)):
        clock[0] += 5
        monkeypatch.setattr(common, "waited", common.waited + waits)
        run.log_step("adapt", step, 9, loss=1.0)
    assert [line.get("waiting") for line in run.logged()] == [0.1, None, 0.8]
    before = common.waited
    list(common.training_batches(ToyStreets("source", "val", (32, 64), images=8), settings(), 0, 0, 2))
    assert common.waited > before


class Draws(torch.utils.data.Dataset):
    """Three pictures that are nothing but their number and a random one."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(())])


def test_an_epoch_sees_every_picture_once_and_no_view_comes_again(monkeypatch):
    whole = torch.stack([common.Batches(Draws(), 2, 7)[step] for step in range(6)])  # (6, 2, 2)
    order, draws = whole.flatten(0, 1).T.tolist()
    assert len(set(draws)) == 12
    epochs = [order[i:i + 3] for i in range(0, 12, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1
    monkeypatch.setattr(common, "world_size", lambda: 2)
    for rank in (0, 1):  # of two processes each has its half
        monkeypatch.setattr(common, "rank", lambda: rank)
        assert torch.equal(common.Batches(Draws(), 2, 7)[4], whole[4, rank:rank + 1])
    with pytest.raises(InputError, match="--batch-size 3"):
        common.Batches([], 3, 0)


# ---------------------------------------------------- the network ----------------------------------------------------


@pytest.mark.parametrize(
    "backbone, dim", [("resnet14", 256), ("resnet18", 512), ("resnet50", 2048), ("resnet101", 2048), ("vgg16", 1024)]
)
def test_network_shapes(backbone, dim):
    with torch.device("meta"):  # shapes only
        model = DeepLabV2(16, backbone).eval()
        features, logits = model(torch.empty(1, 3, 64, 128))
    assert model.feature_dim == dim and features.shape[1] == dim
    grid = (8, 16) if backbone == "vgg16" else (9, 17)
    assert features.shape[2:] == logits.shape[2:] == grid and logits.shape[1] == 16


def test_all_four_branches_are_summed_and_learn():
    model = DeepLabV2(5, "resnet18")
    features, logits = model(torch.randn(1, 3, 32, 512))  # a grid 64 wide, on which every dilation reaches something
    expected = sum(
        F.conv2d(features, b.weight, b.bias, padding=d, dilation=d) for b, d in zip(model.classifier, (6, 12, 18, 24))
    )
    torch.testing.assert_close(logits, expected)
    logits.square().sum().backward()
    assert len(model.classifier) == 4 and all(branch.weight.grad.abs().sum() > 0 for branch in model.classifier)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet101"])
def test_dilation_keeps_the_function(backbone):
    """Where the strided network computes, the dilated one computes the same: every second and fourth position."""
    import torchvision

    torch.manual_seed(0)
    strided = getattr(torchvision.models, backbone)().double().eval()
    strided.maxpool.ceil_mode = True
    for module in strided.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics as after training: no two channels alike
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
    dilated = DeepLabV2(2, backbone).double().eval()
    layers = [strided.conv1, strided.bn1, strided.relu, strided.maxpool, strided.layer1, strided.layer2, strided.layer3,
              strided.layer4]
    for ours, theirs in zip(dilated.backbone, layers):
        ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 96, 128, dtype=torch.float64)
    with torch.no_grad():
        for depth, step in ((7, 2), (8, 4)):  # layer3, layer4
            expected = torch.nn.Sequential(*layers[:depth])(x)
            ours = dilated.backbone[:depth](x)
            assert ours.shape[2:] == (13, 17)
            assert (ours[..., ::step, ::step] - expected).norm() < 1e-5 * expected.norm() and expected.std() > 0.01


def cell_centres(backbone, axis):
    """Where the network is centred: slope and offset, in pixels, of the cells' centres along one axis.

    Found from the gradient of the network itself. All weights are made positive and max-pooling averages over its own
    windows, so that the gradient of a cell spreads over all pixels it sees; its centre of mass is the cell's centre.
    """
    model = DeepLabV2(1, backbone).eval()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.MaxPool2d):
                setattr(
                    module, name, torch.nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                )
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 1 / module.weight[0].numel())
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    size = (16, 2048) if axis == 1 else (2048, 16)
    image = torch.ones(1, 3, *size, requires_grad=True)
    line = model.backbone(image)[0].sum(0).sum(1 - axis)  # one value per cell along the long side
    cells = range(len(line) // 2 - 3, len(line) // 2 + 4, 3)
    centres = []
    for j in cells:
        weight = torch.autograd.grad(line[j], image, retain_graph=True)[0].abs().sum((0, 1)).sum(1 - axis).double()
        centres.append(((weight * torch.arange(len(weight))).sum() / weight.sum()).item())
    slope, offset = np.polyfit(list(cells), centres, 1)
    assert np.abs(np.polyval([slope, offset], list(cells)) - centres).max() < 0.05
    return slope, offset


@pytest.mark.parametrize("backbone, axis", [("resnet18", 0), ("resnet18", 1), ("resnet50", 1), ("vgg16", 0),
                                            ("vgg16", 1)])
def test_cells_and_pixels_coincide_in_both_directions(backbone, axis):
    """To one pixel: `upsample` paints a cell, and `grid_labels` reads its label, where the network is centred on it."""
    slope, offset = cell_centres(backbone, axis)
    assert slope == pytest.approx(8, abs=0.01)
    for size in ((32, 64), (80, 160), (64, 128), (512, 1024), (760, 1280)):
        with torch.device("meta"):
            grid = DeepLabV2(1, backbone).eval()(torch.empty(1, 3, *size))[1].shape[2:]
        cells, pixels = grid[axis], size[axis]
        centres = (slope * torch.arange(cells) + offset).clamp(0, pixels - 1)
        across = [1, 1]
        across[axis] = cells
        one_hot = torch.eye(cells).view(cells, 1, *across).expand(-1, -1, *grid)  # picture j has cell j lit
        painted = common.upsample(one_hot.contiguous(), size).amax((1, 3 - axis))  # (cells, pixels)
        peak = painted >= painted.amax(1, keepdim=True) - 1e-6
        place = (peak * torch.arange(pixels)).sum(1) / peak.sum(1)
        inner = slice(1, -1)  # at an edge half of a tile's paint lies outside
        assert (place - centres)[inner].abs().max() <= 1.001
        assert peak[0, 0] and peak[-1, -1]
        ruler = torch.arange(pixels).view([-1 if d == axis else 1 for d in range(2)]).expand(size)[None]
        read = common.grid_labels(ruler, tuple(grid))
        assert read.shape[1:] == grid and (read[0].select(1 - axis, 0) - centres).abs().max() <= 1.001


@pytest.mark.parametrize("backbone, offset, seen, size", [
    ("vgg16", 3.5, (384, 768), (1024, 2048)), ("vgg16", 3.5, (640, 1280), (1024, 2048)),
    ("vgg16", 3.5, (512, 1024), (1080, 1920)), ("resnet18", 0, (72, 152), (80, 160)),
    ("resnet18", 0, (504, 1016), (1024, 2048))])
def test_what_is_painted_at_another_size_stays_in_place(backbone, offset, seen, size):
    """Sizes at which a grid could be taken for the other kind, such as a ResNet's 64x128 cells for 1024x2048 pixels."""
    with torch.device("meta"):
        grid = DeepLabV2(1, backbone).eval()(torch.empty(1, 3, *seen))[1].shape[2:]
    place = (8.0 * torch.arange(grid[1]) + offset).expand(1, 1, *grid)  # the column at which a cell is centred
    painted = common.upsample(place, size, seen)[0, 0, 0]
    true = (torch.arange(size[1]) + 0.5) * seen[1] / size[1] - 0.5  # the column of the input that a pixel shows
    assert (painted - true).abs()[16:-16].max() <= (1.001 if offset == 0 else 0.01)


def test_prediction_paints_what_was_seen_at_every_scale(monkeypatch):
    sizes = []

    def upsample(logits, size, seen):
        sizes.append(tuple(seen))
        return torch.zeros(1, 2, *size)

    monkeypatch.setattr(common, "upsample", upsample)
    common.predict(lambda images: (None, images), torch.zeros(1, 2, 32, 64), (32, 64), settings(), scales=(0.5, 1, 2))
    assert sizes == [(16, 32), (32, 64), (64, 128)]


def test_grid_labels_keep_255_and_the_empty_batch():
    label = torch.full((2, 32, 64), 255)
    assert torch.equal(common.grid_labels(label, (5, 9)), torch.full((2, 5, 9), 255))
    assert common.grid_labels(label[:0], (5, 9)).shape == (0, 5, 9)
    assert common.grid_labels(label, (1, 1)).shape == (2, 1, 1)


def test_vgg_has_the_form_of_sdca():
    with torch.device("meta"):
        layers = DeepLabV2(3, "vgg16").backbone
    convs, pools = ([m for m in layers if isinstance(m, kind)] for kind in (torch.nn.Conv2d, torch.nn.MaxPool2d))
    assert len(pools) == 3 and [c.dilation[0] for c in convs] == [1] * 10 + [2] * 3 + [4] * 2
    assert [c.out_channels for c in convs[-2:]] == [1024, 1024]


def test_backbone_weights_from_a_file(tmp_path):
    """Half precision, the `module.` of nn.DataParallel, and without what the network throws away."""
    import torchvision

    state = torchvision.models.resnet18().state_dict()
    fc = ("fc.weight", "fc.bias")
    for name, contents, backbone in (
            ("half", {k: v.half() if v.is_floating_point() else v for k, v in state.items()}, "resnet18"),
            ("parallel", {f"module.{k}": v for k, v in state.items()}, "resnet18"),
            ("headless", {k: v for k, v in state.items() if k not in fc}, "resnet18"),
            ("other_head", {**state, "fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}, "resnet18"),
            ("stem", {k: v for k, v in state.items() if k not in fc and "layer4" not in k}, "resnet14"),
            ("old", {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, "resnet18")):
        torch.save(contents, tmp_path / f"{name}.pth")
        model = DeepLabV2(4, backbone, str(tmp_path / f"{name}.pth"))
        for index, key in ((0, "conv1.weight"), (6, "layer3.0.conv1.weight")):
            weight = model.backbone[0].weight if index == 0 else model.backbone[6][0].conv1.weight
            torch.testing.assert_close(weight, contents.get(key, state[key]).float())
    torch.save({0: torch.zeros(1)}, tmp_path / "numbers.pth")
    torch.save({**state, "layer1.9.conv1.weight": torch.zeros(1)}, tmp_path / "more.pth")
    (tmp_path / "folder.pth").mkdir()
    for name, backbone, words in (("half", "resnet50", "does not fit torchvision's resnet50: .* weights differ"),
                                  ("stem", "resnet18", "layer4.0.conv1.weight, expected .*, found none"),
                                  ("numbers", "resnet18", "found none"),
                                  ("more", "resnet18", "layer1.9.conv1.weight, expected none"),
                                  ("nothing", "resnet18", "no such file"), ("folder", "resnet18", "no such file")):
        with pytest.raises(InputError, match=f"{name}.pth.*{words}") as caught:
            DeepLabV2(4, backbone, str(tmp_path / f"{name}.pth"))
        assert len(str(caught.value)) < 600 + len(str(tmp_path)) and "\n" not in str(caught.value)
    for contents in ([1], {"state_dict": state}, {}):
        torch.save(contents, tmp_path / "odd.pth")
        with pytest.raises(InputError, match="odd.pth: expected a dict of tensors"):
            DeepLabV2(4, "resnet18", str(tmp_path / "odd.pth"))


def test_a_damaged_download_is_named(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    file = tmp_path / "hub/checkpoints" / weights.url.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), file)
    good = file.read_bytes()
    for damaged in (good[:len(good) // 2], good[:10], b"<html>not found</html>", b""):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=f"no usable download .*delete .*{file.name}"):
            DeepLabV2(4, "resnet18", "imagenet")
    file.write_bytes(good)
    DeepLabV2(4, "resnet18", "imagenet")


def test_json_knows_no_nan(tmp_path):
    common.write_json(tmp_path / "x.json", {"a": [math.nan, 1.5], "b": {"c": math.inf, "d": -math.inf}})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": [None, 1.5], "b": {"c": None, "d": None}} and "NaN" not in text
    run = common.Run("drsl", settings(out=str(tmp_path / "run")))
    run.log("modes", effective=[math.nan, 2])
    assert "NaN" not in (tmp_path / "run/log.jsonl").read_text() and run.logged()[0]["effective"] == [None, 2]


def test_what_a_user_can_mend_is_one_line(tmp_path, monkeypatch):
    def told(error):
        def main():
            raise error

        with pytest.raises(SystemExit) as caught:
            common.run(main)
        assert "\n" not in caught.value.code
        return caught.value.code

    monkeypatch.setattr(common.Run, "current", None)
    memory = told(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert all(flag in memory for flag in ("--precision bf16", "--batch-size 1", "--crop", "--preset small"))
    assert told(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")) == memory
    assert told(OSError(12, "Cannot allocate memory")) == memory  # where loader processes are made
    run = common.Run("drsl", settings(out=str(tmp_path / "run")))
    assert told(MemoryError()) == memory  # there is no checkpoint yet
    assert told(OSError(24, "Too many open files")).startswith("error: a file: Too many open files")
    run.save("last.pt", 0, torch.nn.Linear(2, 2))
    died = told(RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ..."))
    assert "--workers 0" in died and f"the last checkpoint is {run.folder / 'last.pt'}" in died and "/dev/shm" in died
    torn = told(InputError("Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
                           "last):\n  ...\ncommon.InputError: x.png: torn\n"))
    assert torn == f"error: x.png: torn; the last checkpoint is {run.folder / 'last.pt'}"
    from torch._inductor.exc import InvalidCxxCompiler
    broken = InvalidCxxCompiler()
    for broken.args in (broken.args, ("out of resource: shared memory",)):
        assert "--no-compile" in told(broken)
    for ours in ("ours", "Caught RuntimeError in DataLoader worker process 0.\nOriginal ...\nRuntimeError: ours"):
        with pytest.raises(RuntimeError, match="ours"):
            common.run(lambda: (_ for _ in ()).throw(RuntimeError(ours)))


def test_frozen_batch_norm_neither_learns_nor_moves():
    model = DeepLabV2(4, "resnet18")
    common.freeze_batch_norm(model)
    model.train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [n.running_mean.clone() for n in norms]
    model(3 + torch.randn(2, 3, 32, 32))[1].sum().backward()
    assert all(
        torch.equal(n.running_mean, b) and n.weight.grad is None and not n.training for n, b in zip(norms, before)
    )
    assert model.training and model.classifier[0].weight.grad is not None


def test_batch_norm_statistics_are_those_of_augmented_target_images():
    args = settings(toy_images=400, scale_jitter=[1.0, 1.5])
    model = DeepLabV2(4, "resnet18").eval()
    target = ToyStreets("target", "train", (32, 64), augment=common.training_augment(args))
    common.estimate_batch_norm(model, target, args, images=12)
    inputs = [model.backbone[0](image) for image, _ in common.training_batches(target, args, 0, 0, 3)]
    torch.testing.assert_close(model.backbone[1].running_mean, torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0))
    assert not model.training and model.backbone[1].momentum == 0.1
    common.freeze_batch_norm(model)
    before = model.backbone[1].running_mean.clone()
    common.estimate_batch_norm(model, ToyStreets("source", "train", (32, 64)), args, images=4)
    assert torch.equal(model.backbone[1].running_mean, before)


def test_batch_norm_policies():
    """live: estimated whenever it is settled; target: the first time, then frozen; frozen: never, and frozen."""
    views, others = (ToyStreets(domain, "train", (32, 64), images=8) for domain in ("target", "source"))
    for policy, moves_first, moves_again, live in (("live", True, True, True), ("target", True, False, False),
                                                   ("frozen", False, False, False)):
        args, model = settings(batch_norm=policy), DeepLabV2(16, "resnet18").train()
        statistics = [model.backbone[1].running_mean.clone()]
        for data in (views, others):
            common.settle_batch_norm(model, data, args)
            statistics.append(model.backbone[1].running_mean.clone())
        assert [not torch.equal(a, b) for a, b in zip(statistics, statistics[1:])] == [moves_first, moves_again]
        assert bool(common.live_batch_norms(model)) == live and model.training
        assert model.backbone[1].training == model.backbone[1].weight.requires_grad == live


def test_pretrained_batch_norm_starts_frozen_and_random_weights_live(tmp_path):
    build = lambda **changes: common.live_batch_norms(common.build_model(settings(**changes)))
    assert build(batch_norm="frozen") and build(batch_norm="target")
    import torchvision
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    assert not build(batch_norm="frozen", backbone_weights=str(tmp_path / "w.pth"))
    assert build(batch_norm="target", backbone_weights=str(tmp_path / "w.pth"))


# ----------------------------------------------------- the metric -----------------------------------------------------


def test_miou_against_sets():
    g = torch.Generator().manual_seed(0)
    pred, label = torch.randint(0, 4, (3, 7, 5), generator=g), torch.randint(0, 4, (3, 7, 5), generator=g)
    label[0, :3] = 255
    metric = MeanIoU(6)
    for p, l in zip(pred, label):
        metric.update(p, l)
    for c in range(6):
        mine = {
            i for i, (p, l) in enumerate(zip(pred.flatten().tolist(), label.flatten().tolist())) if l != 255 and p == c
        }
        true = {i for i, l in enumerate(label.flatten().tolist()) if l == c}
        if mine | true:
            assert metric.iou()[c].item() == pytest.approx(len(mine & true) / len(mine | true))
        else:
            assert math.isnan(metric.iou()[c])
    assert metric.mean() == pytest.approx(metric.iou()[:4].mean().item())
    assert metric.mean([1, 5]) == pytest.approx(metric.iou()[1].item())
    assert metric.present() == [0, 1, 2, 3]


def test_miou_degenerate_cases():
    metric = MeanIoU(3)
    metric.update(torch.zeros(4, dtype=torch.long), torch.full((4,), 255))
    metric.update(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    assert metric.iou().isnan().all() and math.isnan(metric.mean()) and metric.present() == []
    metric.update(torch.tensor(2), torch.tensor(2))  # one pixel
    assert metric.iou()[2] == 1 and metric.mean() == 1
    with pytest.raises(ValueError, match="shape"):
        metric.update(torch.zeros(2), torch.zeros(3))
    metric.update(torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8))
    assert metric.iou()[2] == 0.5 and metric.iou()[1] == 0
    for pred, label in ((3, 0), (-1, 0), (0, 3)):
        with pytest.raises(ValueError, match="not one of 3 classes"):
            metric.update(torch.tensor([pred]), torch.tensor([label]))
    metric.update(torch.tensor([77]), torch.tensor([255]))  # where nothing is asked any answer will do


def with_ious(row):
    """A MeanIoU that has these IoUs, in percent, in each of its classes."""
    iou = torch.tensor([float(v) for v in row.split()], dtype=torch.float64) / 100
    metric = MeanIoU(len(iou))
    metric.iou = lambda: iou
    metric.confusion += 1
    return metric


def test_means_are_those_of_published_tables():
    """Published IoUs must give their published means: over 16 and 13 (MLSL, CRST), 19, and the long tail (CPSL)."""
    for row, sixteen, thirteen in (
            ("59.2 30.2 68.5 22.9 1.0 36.2 32.7 28.3 86.2 75.4 68.6 27.7 82.7 26.3 24.3 52.7", 45.18, 50.98),
            ("67.7 32.2 73.9 10.7 1.6 37.4 22.2 31.2 80.8 80.5 60.8 29.1 82.8 25.0 19.4 45.3", 43.79, 50.07)):
        result = common.scores(with_ious(row), SYNTHIA_16)
        assert [result["miou"], result["miou13"]] == pytest.approx([sixteen, thirteen], abs=0.01)
        assert result["rare"] == pytest.approx(sum(float(row.split()[i]) for i in (3, 4, 6, 7, 11, 13, 14, 15)) / 8)
    result = common.scores(with_ious("91.7 52.9 83.6 43.0 32.3 43.7 51.3 42.8 85.4 37.6 81.1 69.5 30.0 88.1 44.1 59.9 "
                                     "24.9 47.2 48.4"), CLASSES)
    assert [result["miou"], result["rare"]] == pytest.approx([55.7, 42.4], abs=0.06)
    assert "miou13" not in result


def test_absent_classes_do_not_dilute_the_mean():
    metric = MeanIoU(16)
    metric.update(torch.tensor([0, 0, 1, 3]), torch.tensor([0, 0, 1, 1]))  # 3 is only predicted
    result = common.scores(metric, SYNTHIA_16)
    assert result["miou"] == pytest.approx(75) and result["iou"]["wall"] == 0 and result["iou"]["car"] is None
    assert result["rare"] is None  # no class of the long tail occurs in the labels
    assert [result["share"][name] for name in ("road", "sidewalk", "wall")] == [(50, 50), (25, 50), (25, 0)]
    assert result["histogram_distance"] == pytest.approx(25)


class Constant(torch.nn.Module):
    """Predicts the class that the image's red channel names, on the stride-8 grid."""

    def forward(self, images):
        value = F.avg_pool2d(images[:, :1], 8)
        return value, torch.cat([-(value - c).square() for c in range(3)], 1) * 50


def test_evaluation_at_the_labels_own_resolution(monkeypatch):
    image = torch.full((1, 3, 16, 32), 124, dtype=torch.uint8)  # 0 in the red channel, as good as
    image[:, :, :, 16:] = 240  # 1.99
    label = torch.zeros(1, 40, 80, dtype=torch.long)
    label[:, :, 40:] = 2
    label[:, :2] = 255
    seen = []
    item = {"image": image[0], "label": label[0], "name": "a"}
    monkeypatch.setattr(common, "task_classes", lambda source: ("road", "car", "bus"))
    result = common.evaluate(Constant().train(), [item], settings(),
                             visit=lambda batch, pred: seen.append((batch["name"], pred.shape)))
    assert result["share"]["bus"][1] == 50 and result["iou"]["bus"] > 80 and seen == [(["a"], (1, 40, 80))]


def test_recall_on_looks_that_are_rare_in_the_source():
    """Against a loop over the pixels of look 2."""
    args, model = settings(toy_images=24), DeepLabV2(16, "resnet14")
    data = common.target_dataset(args, "val", labelled=True, full_label=True)
    hits, seen, preds = np.zeros(16), np.zeros(16), []
    result = common.evaluate(model, data, args, visit=lambda batch, pred: preds.extend(pred.numpy()))
    for i, pred in enumerate(preds):
        _, label, look = data.picture(i)
        for p, l, k in zip(pred.ravel(), label.ravel(), look.ravel()):
            seen[l] += k == 2
            hits[l] += k == 2 and p == l
    assert result["rare_looks"] == pytest.approx(100 * (hits[seen > 0] / seen[seen > 0]).mean())


def test_predictions_average_scales_and_mirror_images():
    image = 2 * torch.rand(2, 3, 2, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)

    def model(images):  # sees more on the right
        value = F.avg_pool2d(images[:, :1], 8) + torch.linspace(0, 1, images.shape[3] // 8)
        return value, torch.cat([-(value - c).square() for c in range(3)], 1)

    args = settings()
    one = common.predict(model, image, (16, 32), args)
    assert (one - common.predict(model, image.flip(3), (16, 32), args).flip(3)).abs().max() > 0.1
    torch.testing.assert_close(one.sum(1), torch.ones(2, 16, 32))
    mirrored = common.predict(model, image.flip(3), (16, 32), args).flip(3)
    torch.testing.assert_close(common.predict(model, image, (16, 32), args, flip=True), (one + mirrored) / 2)
    large = F.interpolate(image, scale_factor=2, mode="bilinear")
    double = common.upsample(model(large)[1], (16, 32), (32, 64)).softmax(1)
    torch.testing.assert_close(common.predict(model, image, (16, 32), args, scales=(1.0, 2.0)), (one + double) / 2)


# --------------------------------------------- run folder and checkpoints ---------------------------------------------


def test_defaults_depend_on_the_source_and_are_printed():
    parser = common.shared_parser("Title.\n\nMore.")
    toy, real = common.parse(parser, []), common.parse(common.shared_parser("T"), ["--source", "synthia"])
    assert (toy.size, toy.backbone, toy.source_size) == ((80, 160), "resnet14", (80, 160))
    assert (real.size, real.source_size, real.backbone, real.batch_norm) == (
        (512, 1024), (760, 1280), "resnet101", "frozen")
    small = common.parse(common.shared_parser("T"), ["--source", "gta5", "--size", "64x128", "--crop", "32x64"])
    assert small.source_size == (64, 128) and small.crop == (32, 64)
    text = " ".join(parser.format_help().split())
    assert "toy 80x160, gta5 512x1024, synthia 512x1024" in text and "Title." in text and "More." not in text
    for wrong in ("80", "x", "80x", "0x8", "-8x8", "axb", "8x8x8", "12x16"):
        with pytest.raises(argparse.ArgumentTypeError):
            common.height_width(wrong)


def test_small_preset(tmp_path, capsys):
    def parse(*flags):
        return common.parse(common.shared_parser("T", adapts=True), flags)

    assert (parse("--source", "gta5").preset, parse("--source", "gta5").warmup_iterations) == (None, 60000)
    small = parse("--source", "gta5", "--preset", "small", "--batch-norm", "frozen")
    assert (small.backbone, small.warmup_iterations, small.batch_norm) == ("resnet50", 10000, "frozen")
    assert (small.head_lr, small.ramp, small.scale_jitter) == (10.0, 500, [1.0, 1.5])  # the papers'
    text = " ".join(common.shared_parser("T").format_help().split())
    assert "--preset {small}" in text and "gta5 720x1280, synthia 760x1280, small 368x640" in text
    with pytest.raises(SystemExit):
        parse("--preset", "small")
    assert "the toy world is small already" in capsys.readouterr().err

    common.Run("drsl", settings(out=str(tmp_path / "run"), preset="small"))
    assert common.read_json(tmp_path / "run/args.json")["preset"] == "small"
    with pytest.raises(InputError, match="had preset small; give the same"):
        common.Run("drsl", settings(out=str(tmp_path / "run"), preset=None, resume=True))


def test_time_left(tmp_path, monkeypatch, capsys):
    assert common.time_left(10, 2, 4) == ", 20 s left" and common.time_left(119.4, 1, 1) == ", 119 s left"
    assert common.time_left(120, 1, 1) == ", 2 min left" and common.time_left(60, 1, 599) == ", 599 min left"
    assert common.time_left(60, 1, 600) == ", 10 h left"
    assert common.time_left(5, 0, 9) == common.time_left(5, 9, 0) == common.time_left(5, -1, 9) == ""

    clock = [1000.0]
    monkeypatch.setattr(common.time, "time", lambda: clock[0])

    def session(steps, **changes):
        """The ends of the lines that a session prints which does those (stage, step)s of 10, 3 seconds each."""
        run = common.Run("drsl", settings(out=str(tmp_path / "run"), log_every=1, **changes))
        capsys.readouterr()
        for stage, step in steps:
            clock[0] += 3
            run.log_step(stage, step, 10, loss=1.0)
        return [line.split("[")[1] for line in capsys.readouterr().out.splitlines()]

    both = [("source", 9), ("source", 10), ("adapt", 1), ("adapt", 2), ("adapt", 3)]
    assert session(both) == ["3 s]", "6 s]", "9 s]", "12 s, 24 s left]", "15 s, 21 s left]"]
    clock[0] += 5000  # nothing runs
    assert session([("adapt", 3), ("adapt", 4), ("adapt", 5)], resume=True) == [
        "18 s]", "21 s, 18 s left]", "24 s, 15 s left]"]
    assert "left" not in (tmp_path / "run/log.jsonl").read_text()


def test_ramp():
    assert [common.ramp(step, argparse.Namespace(ramp=4)) for step in (1, 2, 4, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert common.ramp(1, argparse.Namespace(ramp=0)) == 1.0


def test_a_ramp_as_long_as_the_run_is_told(tmp_path, capsys):
    """--preset small has a ramp of 500 steps: with --iterations 240 the rate would never have come near --lr."""
    for name, ramp, steps, told in (("a", 500, {"iterations": 240}, ["--iterations 240"]), ("b", 39, {}, []),
                                    ("c", 60, {"iterations": 80, "ssl_iterations": 60}, ["--ssl-iterations 60"]),
                                    ("d", 40, {"iterations": 0, "ssl_iterations": 0}, []), ("e", 40, {}, ["40"])):
        values = {"iterations": 40, **steps, "ramp": ramp, "out": str(tmp_path / name)}
        common.Run("sdca", settings(**values))
        lines = capsys.readouterr().out.splitlines()[1:]
        assert len(lines) == len(told)
        assert all(line.startswith(f"--ramp {ramp} is as long as --") and f"{text} or longer" in line
                   for line, text in zip(lines, told))


def test_files_are_written_atomically(tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("old")

    with pytest.raises(InputError, match="last.pt.*No space left"), common.writing(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["last.pt"]
    with common.writing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["last.pt"]
    with pytest.raises(InputError, match="below.*cannot be written"), common.writing(path / "below"):
        pass


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """A limit on the size of files stands for the disk: the second checkpoint does not fit."""
    resource = pytest.importorskip("resource", reason="limits on files need a Unix")
    run = common.Run("drsl", settings(out=str(tmp_path / "run")))
    run.save("last.pt", 0, torch.nn.Linear(4, 1))
    before, limits = (run.folder / "last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(InputError, match="last.pt: cannot be written"):
            run.save("last.pt", 1, torch.nn.Linear(400, 400))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run.folder / "last.pt").read_bytes() == before
    assert sorted(os.listdir(run.folder)) == ["args.json", "last.pt", "log.jsonl"]


def test_not_finite_stops_with_step_and_terms(tmp_path):
    run, model = common.Run("drsl", settings(out=str(tmp_path / "run"))), torch.nn.Linear(3, 1)
    with pytest.raises(InputError, match=r"adapt step 3: not finite \(loss 1, ce_t nan\)"):
        run.log_step("adapt", 3, 9, loss=torch.tensor(1.0), ce_t=torch.tensor(math.nan))
    (run.folder / ".last.tmp.pt").write_bytes(b"half")  # as a kill leaves it
    assert run.last_checkpoint() == ""
    run.save("last.pt", 2, model)
    before = (run.folder / "last.pt").read_bytes()
    with pytest.raises(InputError, match=r"adapt step 3: not finite \(loss inf\)"):
        run.log_step("adapt", 3, 9, loss=torch.tensor(math.inf))
    torch.nn.init.constant_(model.bias, math.inf)
    with pytest.raises(InputError, match="last.pt: weights are not finite"):
        run.save("last.pt", 3, model)
    assert (run.folder / "last.pt").read_bytes() == before


def test_a_panel_shows_no_picture_twice():
    assert common.some(range(2), 4).indices == [0, 1] and common.some(range(10), 4).indices == [0, 3, 6, 9]


def test_versions_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert "commit none" in common.versions("cpu") and "CPUs" in common.versions("cpu")
    assert common.versions("cuda").endswith("a GPU")


@pytest.mark.parametrize("device, gpus, backend, taken", [
    ("cpu", 0, "gloo", None), ("cpu", 8, "gloo", None), ("cuda", 2, "nccl", 1), ("cuda", 1, "gloo", 0)])
def test_every_process_takes_a_gpu_and_several_may_share_one(monkeypatch, device, gpus, backend, taken):
    """The second of two processes of a machine; NCCL asks for a GPU for each."""
    did = {}
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: did.update(taken=index))
    monkeypatch.setattr(common.dist, "init_process_group", lambda name: did.update(backend=name))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    common.start_processes(settings(device=device))
    assert did == {"backend": backend, **({} if taken is None else {"taken": taken})}
    assert torch.backends.cudnn.benchmark == (device == "cuda")


def test_looking_at_data(tmp_path):
    out = run(tmp_path, "common.py", "--toy-images", 8, "--picture", "look/toy.png")
    assert "source train: 8 images, 100.0 % of the pixels labelled" in out and (tmp_path / "look/toy.png").exists()
    write_synthia(tmp_path)
    write_cityscapes(tmp_path)
    look = ["common.py", "--source", "synthia", "--data-root", tmp_path, "--samples", 0]
    out = run(tmp_path, *look)
    assert "source train: 4 images, " in out and "target train: 6 images, no labels; 6 read" in out
    assert "look: pixels without a class have the ids " in out
    torn = tmp_path / "RAND_CITYSCAPES/RGB/0000001.png"
    torn.write_bytes(torn.read_bytes()[:200])
    assert "0000001.png" in run(tmp_path, *look, ok=False)
    assert "x.txt" in run(tmp_path, "common.py", "--picture", "x.txt", ok=False)


def looks(capsys, dataset):
    """What is printed of a data set, and what looks wrong with it."""
    common.describe("set", dataset, SYNTHIA_16, 0)
    lines = capsys.readouterr().out.splitlines()
    return lines[0], [line.strip() for line in lines if "look:" in line]


def test_looking_at_data_says_what_would_stay_silent(tmp_path, capsys):
    """Files that are not read, labels that hold trainIds, grey tones or nothing."""
    write_gta5(tmp_path)
    shares, found = looks(capsys, GTA5(tmp_path))
    raw = np.stack([common.read_label(path) for path in sorted((tmp_path / "GTA5/labels").iterdir())])
    void = 100 * np.isin(raw, (0, 34, 35)).mean()
    assert f"{100 - void:.1f} % of the pixels labelled" in shares and len(found) == 1
    assert f"0 ({100 * (raw == 0).mean():.1f} %)" in found[0] and "7 (" not in found[0]
    assert "expected are Cityscapes labelIds, not trainIds" in found[0]
    write_cityscapes(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "cityscapes/leftImg8bit/val/bonn/bonn_1.png")
    found = "\n".join(looks(capsys, Cityscapes(tmp_path, "val"))[1])
    assert "look: 1 files that are not read, such as" in found and "bonn_1.png" in found
    write_synthia(tmp_path)
    for path in (tmp_path / "RAND_CITYSCAPES/GT/LABELS").iterdir():  # blue, green, red, as OpenCV's users write it
        label = common.read_synthia_label(path)
        write_png16(path, np.stack([label * 0, label * 0, label], 2))
    shares, found = looks(capsys, Synthia(tmp_path))
    assert "0.0 % of the pixels labelled" in shares
    assert "0 (100.0 %)" in found[0] and "SYNTHIA ids in the first of three 16-bit channels" in found[0]


def test_a_checkpoint_cannot_execute_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    for name in ("evil.pt", "noise.pt", "missing.pt"):
        with pytest.raises(InputError, match=name):
            common.read_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_models_travel_through_checkpoints(tmp_path):
    run, model = common.Run("drsl", settings(out=str(tmp_path), toy_world=2)), DeepLabV2(16, "resnet18")
    run.save("m.pt", 0, model)
    saved = common.read_checkpoint(tmp_path / "m.pt")
    assert (saved["method"], saved["toy_world"], saved["size"], saved["network"]) == ("drsl", 2, [32, 64], "DeepLabV2")
    again = common.unpack_model(saved, "m.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    with pytest.raises(InputError, match="m.pt.*resnet50"):
        common.unpack_model({**saved, "backbone": "resnet50"}, "m.pt")
    for nonsense in ({"state": 1}, [1], {**saved, "classes": ["road"]}, {**saved, "classes": 3},
                     {**saved, "source": 7}):
        with pytest.raises(InputError, match="m.pt.*not a checkpoint of this project"):
            common.unpack_model(nonsense, "m.pt")
    with pytest.raises(InputError, match="m.pt: holds the network ProDANetwork of cpsl.py, expected DeepLabV2"):
        common.unpack_model({**saved, "method": "cpsl", "network": "ProDANetwork"}, "m.pt")
    saved["model"]["classifier.0.bias"][0] = math.nan
    with pytest.raises(InputError, match="m.pt: holds weights that are not finite"):
        common.unpack_model(saved, "m.pt")


def test_panel_has_a_column_per_title(tmp_path):
    rows = [[Image.new("RGB", (16, 8), (i * 40, 0, 0)) for i in range(3)] for _ in range(2)]
    common.draw_panel(tmp_path / "panel.png", ["image", "truth", "model"], rows, width=32)
    sheet = Image.open(tmp_path / "panel.png")
    assert sheet.size == (3 * 36 - 4, 22 + 2 * 20 - 4) and sheet.getpixel((36 + 5, 31)) == (40, 0, 0)


def test_dropout_resumes_where_it_stopped(tmp_path):
    """Checkpoints hold the state of torch's random numbers, so that a resumed run drops the same."""
    model = DeepLabV2(16, "resnet18")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = common.Run("drsl", settings(out=str(tmp_path)))
    dropped = lambda: torch.nn.functional.dropout(torch.ones(50))
    torch.manual_seed(3)
    dropped()
    assert run.load("state.pt", model, optimizer=optimizer) == 0
    run.save("state.pt", 7, model, optimizer=optimizer)
    whole = dropped()
    torch.manual_seed(9)
    assert run.load("state.pt", model, optimizer=optimizer) == 0  # only --resume looks
    run.args.resume = True
    assert run.load("state.pt", model, optimizer=optimizer) == 7 and torch.equal(dropped(), whole)
    torch.save({"model": 1}, tmp_path / "foreign.pt")
    for file, parts in (("foreign.pt", {}), ("state.pt", {"head": model})):
        with pytest.raises(InputError, match=file):
            run.load(file, model, **parts)
