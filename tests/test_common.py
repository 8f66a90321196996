"""common.py: formats on files the tests write, the toy world, batches, the network, the metric, the run folder."""

import argparse
import itertools
import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scripts import run, texts
from trees import blocks, write_cityscapes, write_gta5, write_palette, write_png16, write_synthia

import common
from common import CLASSES, SYNTHIA_13, SYNTHIA_16, Cityscapes, DeepLabV2, GTA5, InputError, MeanIoU, Synthia, ToyStreets


# ------------------------------------------------------- classes -------------------------------------------------------


def test_tasks():
    assert len(CLASSES) == 19 and CLASSES[0] == "road" and CLASSES[18] == "bicycle"
    assert set(CLASSES) - set(SYNTHIA_16) == {"terrain", "truck", "train"} and len(SYNTHIA_16) == 16
    assert set(SYNTHIA_16) - set(SYNTHIA_13) == {"wall", "fence", "pole"} and len(SYNTHIA_13) == 13
    assert [len(common.task_classes(s)) for s in ("gta5", "synthia", "toy")] == [19, 16, 16]


def test_id_tables_are_those_of_the_data_sets():
    cityscapes = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
                  28: 15, 31: 16, 32: 17, 33: 18}
    synthia = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 1: 9, 10: 10, 17: 11, 8: 12, 19: 13, 12: 14, 11: 15}
    for table, known in ((common.id_table(CLASSES, 0), cityscapes), (common.id_table(SYNTHIA_16, 1), synthia)):
        assert [table[i] for i in range(256)] == [known.get(i, 255) for i in range(256)]
    assert common.label_ids(SYNTHIA_16)[-3:] == [28, 32, 33]
    assert common.palette(CLASSES)[13].tolist() == [0, 0, 142] and common.palette(SYNTHIA_16)[255].tolist() == [0, 0, 0]


# ------------------------------------------------------- formats -------------------------------------------------------


@pytest.mark.parametrize("filters", [(0,), (1,), (2,), (3,), (4,), (0, 1, 2, 3, 4)])
def test_synthia_labels_are_read_from_16_bits(tmp_path, filters):
    pixels = np.random.default_rng(0).integers(0, 65536, (11, 7, 3)).astype(np.uint16)
    pixels[:, :, 0] %= 23
    write_png16(tmp_path / "label.png", pixels, filters)
    assert np.array_equal(common.read_synthia_label(tmp_path / "label.png"), pixels[:, :, 0])
    assert common.read_synthia_label(tmp_path / "label.png").dtype == np.uint8
    assert np.array(Image.open(tmp_path / "label.png"))[:, :, 0].max() == 0  # what Pillow alone makes of it


def test_synthia_reader_refuses_8_bit_files(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "label.png")
    with pytest.raises(InputError, match="label.png.*16-bit"):
        common.read_synthia_label(tmp_path / "label.png")


def test_synthia(tmp_path):
    write_synthia(tmp_path)
    data = Synthia(tmp_path)
    item = data[0]
    assert len(data) == 4 and item["name"] == "0000000"
    assert item["image"].shape == (3, 48, 80) and item["image"].dtype == torch.float32  # alpha dropped
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
    assert np.array_equal(full["label"].numpy() == 13, raw == 26) and np.array_equal(full["label"].numpy() == 255, raw < 7)
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
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(image[:, 0, 0], torch.tensor(expected))
    assert common.to_picture(image).getpixel((0, 0)) == (255, 0, 51)


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


# ------------------------------------------------------ bad input ------------------------------------------------------


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
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    assert "colour.png" in message(lambda: common.read_label(tmp_path / "colour.png"))
    Image.fromarray(np.full((4, 4), 1792, np.uint16)).save(tmp_path / "deep.png")  # its low byte is 0: road
    assert "deep.png" in message(lambda: common.read_label(tmp_path / "deep.png"))
    assert "larger than" in message(lambda: common.training_augment((64, 128), (65, 128), (1, 1)))
    assert "moon" in message(lambda: ToyStreets("moon"))
    assert "resnet7" in message(lambda: DeepLabV2(2, "resnet7"))


# ----------------------------------------------------- the toy world -----------------------------------------------------


def test_toy_pictures_are_a_function_of_world_domain_split_and_index():
    def draw(domain="source", split="train", world=0, index=3, size=(40, 80)):
        return ToyStreets(domain, split, size, world)[index]["image"]

    first = draw()
    assert torch.equal(first, draw())
    others = [draw(domain="target"), draw(split="val"), draw(world=1), draw(index=4)]
    for a, b in itertools.combinations([first, *others], 2):
        assert not torch.equal(a, b)
    assert draw(size=(48, 96)).shape == (3, 48, 96)


def test_toy_contains_all_classes_with_a_long_tail():
    for domain in ("source", "target"):
        data = ToyStreets(domain, "val")
        counts = torch.zeros(16)
        for i in range(60):
            label = data[i]["label"]
            assert label.max() < 16  # every pixel has a class
            counts += torch.bincount(label.flatten(), minlength=16)
        share = dict(zip(SYNTHIA_16, (counts / counts.sum()).tolist()))
        assert min(share.values()) > 0.003
        rare = ("wall", "fence", "traffic light", "traffic sign", "rider", "bus", "motorcycle", "bicycle")
        assert share["road"] > 0.2 and all(share[c] < 0.04 for c in rare)


def test_toy_domains_mix_the_looks_differently():
    source, target = common.toy_style(0, "source"), common.toy_style(0, "target")
    for name in SYNTHIA_16:
        assert source["shares"][name].sum() == pytest.approx(1) and target["shares"][name].sum() == pytest.approx(1)
        assert target["shares"][name].min() > 0.1
        assert source["shares"][name].argmax() == target["shares"][name].argmin()
        assert np.array_equal(source["colours"][name], target["colours"][name])


def test_toy_stops_at_its_end():
    data = ToyStreets("target", "val")
    assert len(data) == 100 and len(ToyStreets("target", images=6)) == 6 and len(ToyStreets("target", "val", images=6)) == 1
    with pytest.raises(IndexError):
        data[100]


# ------------------------------------------------ augmentation and batches ------------------------------------------------


def test_a_scale_of_one_changes_nothing_and_larger_ones_never_pad():
    """torchvision's ScaleJitter takes (width, height) where everything else takes (height, width)."""
    image = torch.randint(0, 256, (3, 40, 80), dtype=torch.uint8)
    label = torch.randint(0, 16, (40, 80), dtype=torch.uint8)
    augment = common.training_augment((40, 80), (40, 80), (1.0, 1.0), jitter=0.0)
    for _ in range(4):
        x, y = augment(image, label)
        flipped = not torch.equal(y, label)
        assert torch.equal(x.flip(2) if flipped else x, image) and torch.equal(y.flip(1) if flipped else y, label)
    enlarge = common.training_augment((40, 80), (40, 80), (1.0, 1.5), jitter=0.0)
    shrink = common.with_padding_mask(common.training_augment((40, 80), (40, 80), (0.5, 0.5), jitter=0.0))
    for _ in range(8):
        assert not (enlarge(image, label)[1] == 255).any()
        assert (shrink(image, None)[1] == 255).float().mean() == 0.75


def test_augmentation_moves_image_and_label_together():
    label = torch.from_numpy(blocks(range(5), (32, 64), np.random.default_rng(0)).repeat(2, 0).repeat(2, 1).astype(np.uint8))
    image = (label * 50)[None].expand(3, -1, -1).contiguous()
    augment = common.training_augment((64, 128), (48, 96), (0.5, 1.5), jitter=0.0)
    torch.manual_seed(0)
    for _ in range(10):
        x, y = augment(image, label)
        assert x.shape == (3, 48, 96) and y.shape == (48, 96) and type(x) is type(y) is torch.Tensor
        inner = y != 255
        agree = ((x[0].float() / 50).round() == y)[inner]
        assert agree.float().mean() > 0.9  # but for the soft edges of a bilinear resize
        assert set(y.unique().tolist()) <= {0, 1, 2, 3, 4, 255}
    x, y = augment(image, None)
    assert x.shape == (3, 48, 96) and y is None


def test_batches_are_a_function_of_seed_and_step():
    args = argparse.Namespace(batch_size=3, workers=0, device="cpu")
    data = ToyStreets("source", "val", (32, 64), augment=common.training_augment((32, 64), (32, 64), (0.8, 1.2)))
    run = lambda seed, start, stop: list(common.training_batches(data, args, seed, start, stop))
    state = torch.get_rng_state()
    whole, tail = run(0, 0, 5), run(0, 3, 5)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone
    assert torch.equal(whole[3]["image"], tail[0]["image"]) and torch.equal(whole[4]["label"], tail[1]["label"])
    assert not torch.equal(whole[0]["image"], run(1, 0, 1)[0]["image"])
    args.workers = 2
    assert torch.equal(run(0, 0, 5)[4]["image"], whole[4]["image"])


def test_an_epoch_sees_every_picture_once():
    args = argparse.Namespace(batch_size=4, workers=0, device="cpu")
    data = ToyStreets("source", "val", (16, 32))
    names = [name for batch in common.training_batches(data, args, 7, 0, 50) for name in batch["name"]]
    assert len(set(names[:100])) == 100 and len(set(names[100:])) == 100 and names[:100] != names[100:]


# ---------------------------------------------------- the network ----------------------------------------------------


@pytest.mark.parametrize("backbone, dim", [("resnet18", 512), ("resnet50", 2048), ("resnet101", 2048), ("vgg16", 1024)])
def test_network_shapes(backbone, dim):
    model = DeepLabV2(16, backbone).eval()
    with torch.no_grad():
        features, logits = model(torch.randn(1, 3, 64, 128))
    assert model.feature_dim == dim and features.shape == (1, dim, 8, 16) and logits.shape == (1, 16, 8, 16)


def test_all_four_branches_are_summed_and_learn():
    model = DeepLabV2(5, "resnet18")
    features, logits = model(torch.randn(1, 3, 32, 512))  # a grid 64 wide, on which every dilation reaches something
    expected = sum(F.conv2d(features, b.weight, b.bias, padding=d, dilation=d) for b, d in zip(model.classifier, (6, 12, 18, 24)))
    torch.testing.assert_close(logits, expected)
    logits.square().sum().backward()
    assert len(model.classifier) == 4 and all(branch.weight.grad.abs().sum() > 0 for branch in model.classifier)


def test_dilated_stages_keep_the_weights_and_the_field_of_view():
    """Every second feature of the dilated network is the strided network's.

    All but one convolution see the same: the first of the stage, which strides there and has dilation 1, has 2 here.
    """
    import torchvision

    torch.manual_seed(0)
    strided = torchvision.models.resnet18().eval()
    dilated = DeepLabV2(2, "resnet18").eval()
    layers = [strided.conv1, strided.bn1, strided.relu, strided.maxpool, strided.layer1, strided.layer2, strided.layer3]
    for ours, theirs in zip(dilated.backbone, layers):
        ours.load_state_dict(theirs.state_dict())
    x, first = torch.randn(1, 3, 256, 256), dilated.backbone[6][0].conv1
    with torch.no_grad():
        assert dilated.backbone[:7](x).shape[2:] == (32, 32)
        first.dilation = first.padding = (1, 1)
        torch.testing.assert_close(dilated.backbone[:7](x)[..., ::2, ::2], torch.nn.Sequential(*layers)(x), atol=1e-4, rtol=1e-4)
        first.dilation = first.padding = (2, 2)
    assert [m.dilation for m in dilated.backbone[6].modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)] == [(2, 2)] * 4
    assert [m.dilation for m in dilated.backbone[7].modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)] == [(4, 4)] * 4


def test_vgg_has_the_form_of_sdca():
    convs = [m for m in DeepLabV2(3, "vgg16").backbone if isinstance(m, torch.nn.Conv2d)]
    pools = [m for m in DeepLabV2(3, "vgg16").backbone if isinstance(m, torch.nn.MaxPool2d)]
    assert len(pools) == 3 and [c.dilation[0] for c in convs] == [1] * 10 + [2] * 3 + [4] * 2
    assert [c.out_channels for c in convs[-2:]] == [1024, 1024]


def test_backbone_weights_from_a_file(tmp_path):
    import torchvision

    state = torchvision.models.resnet18().state_dict()
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "w.pth")
    model = DeepLabV2(4, "resnet18", str(tmp_path / "w.pth"))
    torch.testing.assert_close(model.backbone[0].weight, state["conv1.weight"].half().float())
    with pytest.raises(InputError, match="w.pth.*resnet50"):
        DeepLabV2(4, "resnet50", str(tmp_path / "w.pth"))
    with pytest.raises(InputError, match="nothing.pth"):
        DeepLabV2(4, "resnet18", str(tmp_path / "nothing.pth"))


def test_frozen_batch_norm_neither_learns_nor_moves():
    model = DeepLabV2(4, "resnet18")
    common.freeze_batch_norm(model)
    model.train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [n.running_mean.clone() for n in norms]
    model(3 + torch.randn(2, 3, 32, 32))[1].sum().backward()
    assert all(torch.equal(n.running_mean, b) and n.weight.grad is None and not n.training for n, b in zip(norms, before))
    assert model.training and model.classifier[0].weight.grad is not None


def test_batch_norm_statistics_are_those_of_augmented_target_images():
    args = argparse.Namespace(source="toy", toy_world=0, toy_images=400, size=(32, 64), crop=(32, 64), scale_jitter=(1.0, 1.5), batch_size=4,
                              workers=0, device="cpu", precision="fp32")
    model = DeepLabV2(4, "resnet18").train()
    common.adapt_batch_norm(model, args, images=12)
    target = ToyStreets("target", "train", (32, 64), augment=common.training_augment((32, 64), (32, 64), (1.0, 1.5)))
    inputs = [model.backbone[0](batch["image"]) for batch in common.training_batches(target, args, 0, 0, 3)]
    torch.testing.assert_close(model.backbone[1].running_mean, torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0))
    assert not model.training and model.backbone[1].momentum == 0.1
    common.freeze_batch_norm(model)
    before = model.backbone[1].running_mean.clone()
    args.size = args.crop = (48, 96)
    common.adapt_batch_norm(model, args, images=4)
    assert torch.equal(model.backbone[1].running_mean, before)


def test_upsample_aligns_corners():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    up = common.upsample(x, (9, 17))
    expected = torch.linspace(0, 3, 9)[:, None] + torch.linspace(0, 2, 17)  # a plane stays a plane up to its edges
    torch.testing.assert_close(up[0, 0], expected)
    assert common.upsample(x, (2, 3)) is x


# ------------------------------------------------------- the metric -------------------------------------------------------


def test_miou_against_sets():
    g = torch.Generator().manual_seed(0)
    pred, label = torch.randint(0, 4, (3, 7, 5), generator=g), torch.randint(0, 4, (3, 7, 5), generator=g)
    label[0, :3] = 255
    metric = MeanIoU(6)
    for p, l in zip(pred, label):
        metric.update(p, l)
    for c in range(6):
        mine = {i for i, (p, l) in enumerate(zip(pred.flatten().tolist(), label.flatten().tolist())) if l != 255 and p == c}
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


@pytest.mark.parametrize("row, sixteen, thirteen", [
    ("59.2 30.2 68.5 22.9 1.0 36.2 32.7 28.3 86.2 75.4 68.6 27.7 82.7 26.3 24.3 52.7", 45.18, 50.98),
    ("67.7 32.2 73.9 10.7 1.6 37.4 22.2 31.2 80.8 80.5 60.8 29.1 82.8 25.0 19.4 45.3", 43.79, 50.07),
    ("53.6 23.7 75.0 12.5 0.3 36.4 23.5 26.3 84.8 74.7 67.2 17.5 84.5 28.4 15.2 55.8", 42.46, 48.48),
    ("83.6 39.6 79.3 3.6 0.9 25.3 14.1 26.1 79.4 76.5 51.0 18.1 75.7 22.5 12.0 32.1", 39.99, 46.92),
    ("82.9 43.1 78.1 9.3 0.6 28.2 9.1 14.4 77.0 83.5 58.1 25.9 71.9 38.0 29.4 31.2", 42.54, 49.43),
])
def test_means_over_16_and_13_are_those_of_published_tables(row, sixteen, thirteen):
    """A confusion matrix with the published IoUs (MLSL, CRST, CBST, LSE with VGG16 and ResNet-101) must give their means."""
    metric = with_ious(row)
    result = common.scores(metric, SYNTHIA_16)
    rare = [float(row.split()[i]) for i in (3, 4, 6, 7, 11, 13, 14, 15)]
    assert result["rare"] == pytest.approx(sum(rare) / 8)
    assert result["miou"] == pytest.approx(sixteen, abs=0.01) and result["miou13"] == pytest.approx(thirteen, abs=0.01)


@pytest.mark.parametrize("row, nineteen", [
    ("86.0 26.0 76.7 33.1 13.2 21.8 30.1 16.5 78.8 25.8 74.7 50.6 18.7 81.8 22.5 30.5 12.3 16.9 25.4", 39.02),
    ("90.2 40.0 83.5 31.9 26.4 32.6 38.7 37.5 81.0 34.2 84.6 61.6 33.4 82.5 32.8 45.9 6.7 29.1 30.6", 47.54)])
def test_mean_over_19_is_that_of_a_published_table(row, nineteen):
    metric = with_ious(row)
    result = common.scores(metric, CLASSES)
    assert result["miou"] == pytest.approx(nineteen, abs=0.01) and "miou13" not in result
    zero = [CLASSES.index(name) for name in ("terrain", "truck", "train")]  # a network that knows 16 classes, scored over 19
    metric.iou = lambda: torch.tensor([0.0 if i in zero else 0.4256 for i in range(19)], dtype=torch.float64)
    assert metric.mean() * 19 / 16 == pytest.approx(0.4256)


@pytest.mark.parametrize("row, tail, nineteen", [
    ("91.7 52.9 83.6 43.0 32.3 43.7 51.3 42.8 85.4 37.6 81.1 69.5 30.0 88.1 44.1 59.9 24.9 47.2 48.4", 42.40, 55.7),
    ("93.0 60.6 85.5 46.7 34.6 48.1 57.6 52.8 88.1 48.2 80.7 71.9 32.3 89.1 46.5 65.3 23.7 49.7 54.2", 46.35, 59.4),
    ("92.8 57.7 85.4 45.7 36.7 48.9 59.5 54.5 88.7 48.5 84.9 73.2 36.8 89.2 49.9 67.8 29.2 49.9 55.6", 48.54, 60.8)])
def test_long_tail_of_19_classes_is_that_of_the_logs(row, tail, nineteen):
    """CPSL's three stages on GTA5, from the authors' logs: the mean over the ten classes that Figure 1 marks, truck and train too."""
    metric = with_ious(row)
    result = common.scores(metric, CLASSES)
    assert result["rare"] == pytest.approx(tail, abs=0.05) and result["miou"] == pytest.approx(nineteen, abs=0.06)


def test_absent_classes_do_not_dilute_the_mean():
    metric = MeanIoU(16)
    metric.update(torch.tensor([0, 0, 1, 3]), torch.tensor([0, 0, 1, 1]))  # 3 is only predicted
    result = common.scores(metric, SYNTHIA_16)
    assert result["miou"] == pytest.approx(75) and result["iou"]["wall"] == 0 and result["iou"]["car"] is None
    assert result["rare"] is None  # no class of the long tail occurs in the labels
    assert result["share"]["road"] == (50, 50) and result["share"]["sidewalk"] == (25, 50) and result["share"]["wall"] == (25, 0)
    assert result["misplaced"] == pytest.approx(25)
    assert "miou13" not in common.scores(MeanIoU(19), CLASSES)


class Constant(torch.nn.Module):
    """Predicts the class that the image's red channel names, on the stride-8 grid."""

    def forward(self, images):
        value = F.avg_pool2d(images[:, :1], 8)
        return value, torch.cat([-(value - c).square() for c in range(3)], 1) * 50


def test_evaluation_at_the_labels_own_resolution():
    image = torch.zeros(1, 3, 16, 32)
    image[:, :, :, 16:] = 2.0
    label = torch.zeros(1, 40, 80, dtype=torch.long)
    label[:, :, 40:] = 2
    label[:, :2] = 255
    seen = []
    metric = common.evaluate(Constant().train(), [{"image": image, "label": label, "name": ["a"]}], 3, "cpu",
                             visit=lambda names, pred: seen.append((names, pred.shape)))
    assert metric.confusion.sum() == 38 * 80 and metric.iou()[2] > 0.8 and seen == [(["a"], (1, 40, 80))]


def test_predictions_average_scales_and_mirror_images():
    image = 2 * torch.rand(2, 3, 2, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)

    def model(images):  # sees more on the right
        value = F.avg_pool2d(images[:, :1], 8) + torch.linspace(0, 1, images.shape[3] // 8)
        return value, torch.cat([-(value - c).square() for c in range(3)], 1)

    one = common.predict(model, image, (16, 32))
    assert (one - common.predict(model, image.flip(3), (16, 32)).flip(3)).abs().max() > 0.1
    torch.testing.assert_close(one.sum(1), torch.ones(2, 16, 32))
    mirrored = common.predict(model, image.flip(3), (16, 32)).flip(3)
    torch.testing.assert_close(common.predict(model, image, (16, 32), flip=True), (one + mirrored) / 2)
    double = common.upsample(model(F.interpolate(image, scale_factor=2, mode="bilinear"))[1], (16, 32)).softmax(1)
    torch.testing.assert_close(common.predict(model, image, (16, 32), scales=(1.0, 2.0)), (one + double) / 2)


# ------------------------------------------------- run folder and checkpoints -------------------------------------------------


def test_defaults_depend_on_the_source_and_are_printed():
    parser = common.shared_parser("Title.\n\nMore.")
    toy, real = common.parse(parser, []), common.parse(common.shared_parser("T"), ["--source", "synthia"])
    assert (toy.size, toy.backbone, toy.freeze_bn) == ((80, 160), "resnet18", False)
    assert (real.size, real.source_size, real.backbone, real.freeze_bn) == ((512, 1024), (760, 1280), "resnet101", True)
    small = common.parse(common.shared_parser("T"), ["--source", "gta5", "--size", "64x128", "--crop", "32x64"])
    assert small.source_size == (64, 128) and small.crop == (32, 64)
    text = " ".join(parser.format_help().split())
    assert "toy 80x160, gta5 512x1024, synthia 512x1024" in text and "Title." in text and "More." not in text
    for wrong in ("80", "x", "80x", "0x5", "-1x5", "axb"):
        with pytest.raises(argparse.ArgumentTypeError):
            common.height_width(wrong)


def test_ramp():
    assert [common.ramp(step, argparse.Namespace(ramp=4)) for step in (1, 2, 4, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert common.ramp(1, argparse.Namespace(ramp=0)) == 1.0


def test_files_are_written_atomically(tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("old")

    def full_disk(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="last.pt.*No space left"):
        common.write_atomically(path, full_disk)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["last.pt"]
    common.write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["last.pt"]


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """A limit on the size of files stands for the disk: the second checkpoint does not fit."""
    resource = pytest.importorskip("resource", reason="limits on files need a Unix")
    run = common.Run("drsl", argparse.Namespace(out=str(tmp_path / "run"), device="cpu", precision="fp32", resume=False, seed=0))
    run.save("last.pt", {"model": {"weight": torch.ones(10)}})
    before, limits = (run.folder / "last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(InputError, match="last.pt: cannot be written"):
            run.save("last.pt", {"model": {"weight": torch.ones(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Run had taken it over
    assert (run.folder / "last.pt").read_bytes() == before
    assert sorted(os.listdir(run.folder)) == ["args.json", "last.pt"]


def test_not_finite_stops_with_step_and_terms(tmp_path):
    run = common.Run("drsl", argparse.Namespace(out=str(tmp_path / "run"), device="cpu", precision="fp32", resume=False, seed=0,
                                                log_every=2, save_every=100))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run.save("last.pt", {"model": {"weight": torch.ones(3)}})
    before = (run.folder / "last.pt").read_bytes()
    with pytest.raises(InputError, match=r"adapt step 3: not finite \(loss 1, ce_t nan\)"):
        run.watch("adapt", 3, 9, loss=torch.tensor(1.0), ce_t=torch.tensor(math.nan))
    with pytest.raises(InputError, match="last.pt: weights are not finite"):
        run.save("last.pt", {"model": {"weight": torch.tensor([1.0, math.inf])}})
    assert (run.folder / "last.pt").read_bytes() == before


def test_versions_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "commit none" in common.versions()


def test_a_batch_that_does_not_split_over_the_processes_is_one_line(monkeypatch):
    monkeypatch.setattr(common, "world_size", lambda: 2)
    with pytest.raises(InputError, match="--batch-size 3"):
        common.Batches([], 3, 0)


def test_looking_at_data(tmp_path):
    out = run(tmp_path, "common.py", "--toy-images", 8, "--picture", "look/toy.png")
    assert "source train: 8 images" in out and "building" in out and (tmp_path / "look/toy.png").exists()
    write_synthia(tmp_path)
    write_cityscapes(tmp_path)
    look = ["common.py", "--source", "synthia", "--data-root", tmp_path, "--samples", 0]
    out = run(tmp_path, *look)
    assert "source train: 4 images, 4 labels; 4 read" in out and "target train: 6 images, no labels" in out
    torn = tmp_path / "RAND_CITYSCAPES/RGB/0000001.png"
    torn.write_bytes(torn.read_bytes()[:200])
    (tmp_path / "preview.png").unlink()
    assert "0000001.png" in run(tmp_path, *look, ok=False)
    out = texts(tmp_path)[0]
    assert "1 of 4 broken, the first: " in out and "3 source and 4 target scenes" in out and (tmp_path / "preview.png").exists()


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
    args = argparse.Namespace(source="toy", toy_world=2, toy_images=8, backbone="resnet18", size=(80, 160))
    model = DeepLabV2(16, "resnet18")
    torch.save(common.pack_model(model, args), tmp_path / "m.pt")
    saved = common.read_checkpoint(tmp_path / "m.pt")
    again = common.unpack_model(saved, "m.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    with pytest.raises(InputError, match="m.pt.*resnet50"):
        common.unpack_model({**saved, "backbone": "resnet50"}, "m.pt")
    with pytest.raises(InputError, match="m.pt.*not a checkpoint"):
        common.unpack_model({"state": 1}, "m.pt")


def test_panel_has_a_column_per_title(tmp_path):
    rows = [[Image.new("RGB", (16, 8), (i * 40, 0, 0)) for i in range(3)] for _ in range(2)]
    common.draw_panel(tmp_path / "panel.png", ["image", "truth", "model"], rows, width=32)
    sheet = Image.open(tmp_path / "panel.png")
    assert sheet.size == (3 * 36 - 4, 16 + 2 * 20 - 4) and sheet.getpixel((36 + 5, 25)) == (40, 0, 0)


# -------------------------------------------------------- FCN8s --------------------------------------------------------


@pytest.mark.parametrize("size", [(512, 1024), (720, 1280), (760, 1280), (80, 160), (33, 47)])
def test_fcn8s_gives_logits_of_the_input_size(size):
    with torch.device("meta"):  # shapes only
        features, logits = common.build_network(19, "vgg16-fcn8s").eval()(torch.empty(2, 3, *size))
    assert logits.shape == (2, 19, *size)
    assert features.shape == (2, 4096, -(-size[0] // 32), -(-size[1] // 32))


@pytest.fixture(scope="module")
def fcn8s():
    torch.manual_seed(0)
    model = common.FCN8s(3).eval()
    for score in model.classifier:  # which start at zero
        assert score.weight.abs().sum() == score.bias.abs().sum() == 0
        torch.nn.init.normal_(score.weight)
        torch.nn.init.normal_(score.bias)
    return model


def test_fcn8s_against_its_description(fcn8s):
    """The network again as one functional chain: VGG16's layers, fc6 as a 7x7 convolution, scores, bilinear enlargement, crops."""
    image = torch.randn(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    convs = [m for stage in fcn8s.backbone for m in stage if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 15 and sum(isinstance(m, torch.nn.Dropout2d) for m in fcn8s.modules()) == 2
    x, pools = F.pad(image, (99, 99, 99, 99)), []  # and one more by the first convolution's own padding
    for i, conv in enumerate(convs[:13]):
        x = F.conv2d(x, conv.weight, conv.bias, padding=1).relu()
        if i in (1, 3, 6, 9, 12):
            x = F.max_pool2d(x, 2, ceil_mode=True)
            pools.append(x)
    for conv in convs[13:]:
        x = F.conv2d(x, conv.weight, conv.bias).relu()

    def enlarged(score, factor):  # bilinear kernel by its definition, one channel at a time
        k = torch.tensor([[(1 - abs(i + 0.5 - factor) / factor) * (1 - abs(j + 0.5 - factor) / factor) for j in range(2 * factor)]
                          for i in range(2 * factor)])[None, None]
        return torch.cat([F.conv_transpose2d(score[:, c:c + 1], k, stride=factor) for c in range(3)], 1)

    with torch.no_grad():
        one, two, three = (F.conv2d(x, s.weight, s.bias) for x, s in zip((pools[2] * 0.0058, pools[3] * 0.58, x), fcn8s.classifier))
        up = enlarged(three, 2)
        up = enlarged(up + two[:, :, 5:, 5:][:, :, :up.shape[2], :up.shape[3]], 2)
        up = enlarged(up + one[:, :, 9:, 9:][:, :, :up.shape[2], :up.shape[3]], 8)
        torch.testing.assert_close(fcn8s(image)[1], up[:, :, 31:55, 31:71], rtol=1e-4, atol=1e-4)


def test_fcn8s_takes_fc6_and_fc7_from_the_classifier(monkeypatch):
    import torchvision

    torch.manual_seed(0)
    vgg = torchvision.models.vgg16().eval()
    monkeypatch.setattr(common, "torchvision_network", lambda *_: vgg)
    pool5 = torch.randn(1, 512, 7, 7)
    with torch.no_grad():
        expected = vgg.classifier[:5](pool5.flatten(1))  # linear, ReLU, dropout (off), linear, ReLU
        top = common.FCN8s(2).eval().backbone[2][7:]  # behind pool5
        torch.testing.assert_close(top(pool5)[:, :, 0, 0], expected, rtol=1e-4, atol=1e-5)


def test_fcn8s_trains_everything_but_the_enlargement(fcn8s):
    assert all(not p.requires_grad for p in fcn8s.enlarge.parameters()) and len(list(fcn8s.enlarge.parameters())) == 3
    trained = {id(p) for part in (fcn8s.backbone, fcn8s.classifier) for p in part.parameters()}
    assert trained == {id(p) for p in fcn8s.parameters() if p.requires_grad}
    fcn8s(torch.randn(1, 3, 16, 16))[1].square().sum().backward()
    assert all(score.weight.grad.abs().sum() > 0 for score in fcn8s.classifier) and fcn8s.backbone[0][0].weight.grad.abs().sum() > 0
    for layer in fcn8s.enlarge:  # inside, bilinear enlargement keeps a constant
        k = layer.kernel_size[0]
        inside = layer(torch.ones(1, 3, 6, 6))[:, :, k:-k, k:-k]
        torch.testing.assert_close(inside, torch.ones(1, 3, inside.shape[2], inside.shape[2]))
        assert inside.numel() > 0


def test_dropout_resumes_where_it_stopped(tmp_path):
    """Checkpoints hold the state of torch's random numbers, so that a resumed run drops what an uninterrupted one drops."""
    args = argparse.Namespace(source="toy", toy_world=0, toy_images=4, backbone="resnet18", size=(32, 64))
    model = torch.nn.Sequential(torch.nn.Dropout2d(0.5), torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(3)
    model(torch.ones(1, 50, 2, 2))
    torch.save(common.pack_training(model, optimizer, args, 7), tmp_path / "state.pt")
    whole = model(torch.ones(1, 50, 2, 2))
    torch.manual_seed(9)
    assert common.load_training(tmp_path / "state.pt", model, optimizer) == 7
    assert torch.equal(model(torch.ones(1, 50, 2, 2)), whole)


def test_augmentation_without_scaling_keeps_every_pixel():
    label = torch.arange(32 * 64).view(32, 64).remainder(250).byte()
    augment = common.training_augment((32, 64), (32, 64), None, jitter=0.0)
    seen = {tuple(augment(label[None].expand(3, -1, -1), label)[1].flatten().tolist()) for _ in range(20)}
    assert seen == {tuple(label.flatten().tolist()), tuple(label.flip(1).flatten().tolist())}
