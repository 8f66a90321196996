"""The toy world's premises, read from the generator alone: nobody loses them unnoticed. Runs in seconds on a CPU.

    PYTHONPATH=DIRECTORY_OF_COMMON python -m pytest test_toy.py
"""
import functools

import numpy as np
import pytest
import torch

from common import SYNTHIA_16, ToyStreets, toy_picture, toy_style

PICTURES = 200
TAIL = ("traffic light", "rider", "bus", "motorcycle", "bicycle")
CLOSE = 96 / 5  # pixels per metre at the nearest person: focal length 1.2 x 80 pixels, distance 5 m


@functools.lru_cache
def scenes(domain, world=1):
    """Images (M, H, W, 3), labels and looks (M, H, W) of one domain."""
    data = ToyStreets(domain, world=world, images=PICTURES)
    return tuple(np.stack(part) for part in zip(*(data.picture(i) for i in range(PICTURES))))


def index(name):
    return SYNTHIA_16.index(name)


def share(domain, *names):
    """Share of the pixels that belong to these classes, in percent."""
    label = scenes(domain)[1]
    return 100 * np.isin(label, [index(name) for name in names]).mean()


def occurrence(domain, name):
    """Share of the pictures that show the class."""
    return (scenes(domain)[1] == index(name)).any((1, 2)).mean()


def tallest(domain, name):
    """(M,): the longest vertical run of pixels of the class in each picture."""
    inside, run, best = scenes(domain)[1] == index(name), 0, 0
    for row in range(inside.shape[1]):
        run = (run + 1) * inside[:, row]  # (M, W): pixels of the run that ends in this row
        best = np.maximum(best, run)
    return best.max(1)


both = pytest.mark.parametrize("domain", ["source", "target"])


def test_pictures_are_a_function_of_world_domain_split_and_index():
    data = ToyStreets("target", world=3)
    first = data[5]["image"]
    toy_picture.cache_clear()
    assert torch.equal(first, data[5]["image"])
    others = [ToyStreets("target", world=3)[6], ToyStreets("target", world=4)[5], ToyStreets("source", world=3)[5],
              ToyStreets("target", "val", world=3)[5]]
    assert not any(torch.equal(first, other["image"]) for other in others)


def test_worlds_differ_in_colours_proportions_and_tint():
    a, b = toy_style(3, "source"), toy_style(4, "source")
    assert all(np.abs(a["colours"][name] - b["colours"][name]).max() > 1 for name in SYNTHIA_16)
    assert all(np.abs(a["shares"][name] - b["shares"][name]).max() > 1e-3 for name in SYNTHIA_16)
    assert np.abs(a["tint"] - b["tint"]).max() > 1e-3


@both
def test_items_keep_their_contract(domain):
    item = ToyStreets(domain, size=(48, 96), labelled=True)[0]
    assert item["image"].shape == (3, 48, 96) and item["image"].dtype == torch.uint8
    assert item["label"].shape == (48, 96) and item["label"].dtype == torch.int64 and item["label"].max() < 16
    assert ("label" in ToyStreets(domain)[0]) == (domain == "source") and "label" in ToyStreets(domain, "val")[0]
    with pytest.raises(IndexError):
        ToyStreets(domain)[400]


@both
def test_class_shares_have_the_shape_of_cityscapes(domain):
    assert set(range(16)) <= set(np.unique(scenes(domain)[1]))
    assert 60 < share(domain, "road", "building", "vegetation", "sky") < 88
    for name, low, high in (("road", 28, 45), ("building", 16, 30), ("vegetation", 10, 22), ("sky", 2, 10),
                            ("sidewalk", 3, 9), ("car", 4, 12), ("wall", 0.3, 1.5), ("fence", 0.3, 1.5),
                            ("pole", 0.8, 2.6), ("person", 0.6, 2), ("traffic sign", 0.25, 1)):
        assert low < share(domain, name) < high, name


@both
@pytest.mark.parametrize("name", TAIL)
def test_the_tail_occurs_rarely_and_is_visible(domain, name):
    label = scenes(domain)[1]
    assert 0.04 < share(domain, name) < 0.75
    assert occurrence(domain, name) < (0.5 if name == "bicycle" else 0.33)
    pixels = (label == index(name)).sum((1, 2))
    assert np.median(pixels[pixels > 0]) > 30  # half a cell of the grid at least


@both
def test_several_classes_lie_below_half_a_percent(domain):
    shares = [share(domain, name) for name in SYNTHIA_16]
    assert sum(value < 0.6 for value in shares) >= 4 and min(shares) < 0.3  # Cityscapes' rarest: 0.10 and 0.13


def test_the_target_shows_larger_things_than_any_source_picture():
    assert tallest("source", "person").max() <= 1.85 * CLOSE  # the nearest distance bounds them
    assert tallest("target", "person").max() > 1.3 * tallest("source", "person").max()
    assert np.percentile(tallest("target", "car"), 90) > 1.4 * np.percentile(tallest("source", "car"), 90)


@pytest.mark.parametrize("name", SYNTHIA_16)
def test_the_common_look_is_rare_in_the_other_domain(name):
    source, target = toy_style(1, "source")["shares"][name], toy_style(1, "target")["shares"][name]
    assert source[0] > 0.5 and source[2] < 0.2 and np.allclose(source, target[::-1])


@pytest.mark.parametrize("name", ["road", "sidewalk", "building", "vegetation", "sky", "person", "car"])
def test_looks_cover_the_pixels_as_the_proportions_say(name):
    for domain, common_look in (("source", 0), ("target", 2)):
        _, label, look = scenes(domain)
        shares = np.bincount(look[label == index(name)], minlength=3) / (label == index(name)).sum()
        assert len(shares) == 3 and shares.argmax() == common_look and shares[2 - common_look] < 0.25


@both
def test_looks_belong_to_the_labelled_pixels(domain):
    image, label, look = scenes(domain)
    assert set(np.unique(look)) == {0, 1, 2}
    data = ToyStreets(domain, world=1, labelled=True)
    assert np.array_equal(data.picture(7)[2], look[7]) and np.array_equal(data[7]["label"].numpy(), label[7])
    sky = [image[(label == index("sky")) & (look == kind)].mean(0) for kind in range(3)]
    assert sky[0][2] - sky[0][0] > sky[2][2] - sky[2][0] + 20  # look 0 is blue, look 2 grey
    inside = (label == index("road")).any((1, 2))  # one road a picture, so one look
    assert all(len(np.unique(look[i][label[i] == index("road")])) == 1 for i in np.flatnonzero(inside))


def test_the_photometric_shift_is_moderate():
    source, target = (scenes(domain)[0].astype(float) for domain in ("source", "target"))
    assert np.abs(source.mean((0, 1, 2)) - target.mean((0, 1, 2))).max() < 35  # of 255
    assert 0.7 < target.std((1, 2)).mean() / source.std((1, 2)).mean() < 1.2  # contrast within a picture


def test_classes_vary_differently():
    image, label, look = scenes("source")

    def spread(name):  # of the mean colour of the common look from picture to picture
        masks = [(label[i] == index(name)) & (look[i] == 0) for i in range(PICTURES)]
        return np.std([image[i][mask].mean(0) for i, mask in enumerate(masks) if mask.sum() > 20], 0).mean()

    assert spread("car") > 1.5 * spread("road")
