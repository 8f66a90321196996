"""scale_invariant.py: every equation against an independent computation, its gradient routing and its degenerate cases.

Property names such as P3 number what a reimplementation of LSE must obey; the figures are hand values and closed forms.
"""

import argparse
import json
import math
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scripts import SPLITTABLE, TINY, kill_when, logged, result, run, run_as_two, same_weights, trained_alike
from trees import write_cityscapes, write_gta5, write_synthia

import common
import scale_invariant
from scale_invariant import (class_means, class_thresholds, cut, enlarge, focal_loss, focal_of_mean, image_confidence,
                             image_uncertainty, keep_confident, normalised_entropy, pixel_entropy, random_windows, rank_images,
                             round_portion, round_steps, segmentation_loss, select_images, transfer_labels)

C = 19


def probabilities(*shape, seed=0, sharpness=3.0):
    g = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, generator=g, dtype=torch.float64)).softmax(-3)


# ------------------------------------------------------- entropy -------------------------------------------------------


def test_entropy_hand_values_and_a_loop():  # P1
    uniform = torch.full((19, 2, 3), 1 / 19, dtype=torch.float64)
    assert pixel_entropy(uniform).flatten().tolist() == pytest.approx([2.944439] * 6, abs=1e-6)
    certain = F.one_hot(torch.tensor([[4, 7]]), 19).permute(2, 0, 1).double()
    assert pixel_entropy(certain).abs().max() < 1e-11 and pixel_entropy(certain.float()).abs().max() < 1e-11
    prob = probabilities(5, 3, 4)
    for y in range(3):
        for x in range(4):
            expected = -sum(p * math.log(p) for p in prob[:, y, x].tolist())
            assert pixel_entropy(prob)[y, x].item() == pytest.approx(expected, abs=1e-9)


def test_normalised_entropy_hand_values():  # P2
    entropy = torch.tensor([[0.2, 0.6, 1.0, 0.4]])
    assert normalised_entropy(entropy, torch.zeros(1, 4, dtype=torch.long))[0].tolist() == pytest.approx([0, 0.5, 1, 0.25])
    assert class_means(normalised_entropy(entropy, torch.zeros(1, 4, dtype=torch.long)), torch.zeros(1, 4, dtype=torch.long), 1
                       ).item() == pytest.approx(0.4375)


def test_normalised_entropy_against_a_loop_over_classes():
    entropy = 3 * torch.rand(13, 17, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    label = torch.randint(0, 6, (13, 17), generator=torch.Generator().manual_seed(2))
    value = normalised_entropy(entropy, label)
    for y in range(13):
        for x in range(17):
            mine = entropy[label == label[y, x]].tolist()
            assert value[y, x].item() == pytest.approx((entropy[y, x].item() - min(mine)) / (max(mine) - min(mine)), abs=1e-12)


def test_a_class_of_one_pixel_or_one_value_gives_zero_not_nan():  # P2
    entropy, label = torch.tensor([[0.7, 0.3, 0.9], [0.4, 0.4, 0.4]]), torch.tensor([[5, 0, 0], [1, 1, 1]])
    assert normalised_entropy(entropy, label).tolist() == [[0, 0, 1], [0, 0, 0]]
    assert normalised_entropy(entropy[:1, :1], label[:1, :1]).tolist() == [[0]]  # an image of one pixel
    assert normalised_entropy(entropy[:0], label[:0]).shape == (0, 3)


# ------------------------------------------------------- ranking -------------------------------------------------------


def test_class_means_and_confidence_against_a_loop():  # P5: only pixels predicted as c count
    prob = probabilities(6, 9, 11)
    prob[4] *= 1e-3
    prob = prob / prob.sum(0)
    confidence, uncertainty = image_confidence(prob), image_uncertainty(prob)
    assert confidence.shape == uncertainty.shape == (6,) and math.isnan(confidence[4]) and math.isnan(uncertainty[4])
    for c in (0, 1, 2, 3, 5):
        best, entropies = [], []
        for y in range(9):
            for x in range(11):
                p = prob[:, y, x].tolist()
                if p.index(max(p)) == c:
                    best.append(max(p))
                    entropies.append(-sum(v * math.log(v) for v in p))
        assert confidence[c].item() == pytest.approx(sum(best) / len(best), abs=1e-12)
        low, high = min(entropies), max(entropies)
        assert uncertainty[c].item() == pytest.approx(sum((e - low) / (high - low) for e in entropies) / len(entropies), abs=1e-7)


def test_confidence_ignores_pixels_of_other_classes():  # P5
    prob = probabilities(4, 6, 6)
    label, other = prob.argmax(0), prob.clone()
    uniform = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)[:, None]
    other[:, label == 3] = uniform  # still predicted as 3, with other probabilities
    assert torch.equal(image_confidence(prob)[:3], image_confidence(other)[:3])
    assert image_confidence(other)[3].item() == pytest.approx(0.4)


def confidences(M, classes, seed=0):
    return torch.rand(M, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_ranking_and_its_ties():
    confidence = torch.tensor([[0.5, math.nan], [0.9, 0.3], [0.5, 0.3], [0.7, math.nan]], dtype=torch.float64)
    order = rank_images(confidence)
    assert order[:, 0].tolist() == [1, 3, 2, 0]  # equal confidence: the later file first
    assert order[:2, 1].tolist() == [2, 1] and set(order[2:, 1].tolist()) == {0, 3}  # without the class: last


@pytest.mark.parametrize("r, k", list(enumerate([15, 23, 31, 39, 46, 54, 62])))  # P3
def test_selection_size_of_the_seven_rounds(r, k):
    portion = round_portion(0.10, 0.05, r)
    selected, reference = select_images(confidences(2975, 1), portion)
    assert len(selected) == k == int(2975 * (10 + 5 * r) / 1900) and reference.shape == (1,)
    selected, _ = select_images(confidences(2975, 19), portion)
    assert k < len(selected) <= 19 * k and selected.unique().tolist() == selected.tolist()


def test_selection_of_rare_classes():  # P3
    for present, expected in ((189, 0), (190, 1)):
        confidence = confidences(400, 2)
        confidence[present:, 0] = math.nan
        confidence[:, 1] = math.nan  # in no image
        selected, reference = select_images(confidence, 0.1)
        order = confidence[:present, 0].argsort(descending=True).tolist()
        assert selected.tolist() == order[:expected]
        assert reference.tolist() == [order[expected], -1]  # P5: list position k_c
    assert select_images(confidences(5, 3), 0.1)[0].tolist() == []
    assert select_images(torch.zeros(0, 3), 0.1)[1].tolist() == [-1, -1, -1]


def test_selection_against_sorted_lists():  # P5, P3
    confidence = confidences(60, 7)
    confidence[confidence < 0.3] = math.nan
    selected, reference = select_images(confidence, 3.0)
    expected = set()
    for c in range(7):
        images = sorted((s, i) for i, s in enumerate(confidence[:, c].tolist()) if not math.isnan(s))[::-1]
        k = int(len(images) * 3 / 19)
        expected |= {i for _, i in images[:k]}
        assert reference[c].item() == images[k][1] and k > 0
        assert reference[c].item() not in [i for _, i in images[:k]]
        assert all(s >= confidence[reference[c], c] for s, _ in images[:k])
    assert selected.tolist() == sorted(expected)


def test_selection_of_everything_has_no_reference():
    selected, reference = select_images(confidences(10, 2), 19.0)
    assert selected.tolist() == list(range(10)) and reference.tolist() == [-1, -1]


def test_portions_that_floats_would_miss():  # P4
    assert [round_portion(0.10, 0.05, r) for r in range(7)] == [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4]
    for r in range(7):  # N_c p / 19 is a whole number for N_c = 380
        assert len(select_images(confidences(380, 1), round_portion(0.10, 0.05, r))[0]) == 2 + r
    assert 2660 * 0.35 / 19 < 49 and len(select_images(confidences(2660, 1), 0.35)[0]) == 49


def test_exactly_seven_rounds_and_their_steps(monkeypatch):  # P4
    monkeypatch.setattr(sys, "argv", ["scale_invariant.py", "--source", "gta5"])
    args = scale_invariant.parse_args()
    portions = [round_portion(args.portion, args.portion_step, r) for r in range(args.rounds + 1)]
    assert args.rounds == 7 == sum(p <= 0.4 for p in portions)
    assert (args.iterations, args.epochs, args.patches, args.beta, args.gamma, args.lr, args.scale) == (0, 2, 4, 0.1, 3.0, 1e-6, 2)
    assert [round_steps(4 * images, 2, 1) for images in (167, 164)] == [1336, 1312]
    assert round_steps(4 * 167, 2, 2) == 668 and round_steps(1, 1, 8) == 1


# ----------------------------------------------------- thresholds -----------------------------------------------------


def test_threshold_is_that_of_the_reference():  # P2, LSE-9
    confidence, uncertainty = confidences(40, 5), confidences(40, 5, seed=1)
    _, reference = select_images(confidence, 4.0)
    t = class_thresholds(confidence, uncertainty, reference)
    assert t.tolist() == [uncertainty[reference[c], c].item() for c in range(5)]


def test_threshold_of_a_degenerate_reference_comes_from_the_next_image():
    confidence = torch.tensor([[0.9, 0.2], [0.8, 0.9], [0.7, math.nan], [0.6, 0.5]], dtype=torch.float64)
    uncertainty = torch.tensor([[0.1, 0.0], [0.0, 0.0], [0.0, math.nan], [0.4, 0.0]], dtype=torch.float64)
    reference = torch.tensor([1, 1])
    # class 0: image 1 has one value, image 2 too, image 3 defines 0.4; image 0 stands before the reference. Class 1: none.
    assert class_thresholds(confidence, uncertainty, reference).tolist() == [0.4, 0.0]
    assert class_thresholds(confidence, uncertainty + 0.2, torch.tensor([-1, -1])).tolist() == [0.0, 0.0]
    label = torch.tensor([[1, 1, 0]])
    assert keep_confident(torch.zeros(1, 3), label, torch.tensor([0.4, 0.0])).tolist() == [[False, False, True]]


def test_mask_hand_values():  # P2
    entropy, label = torch.tensor([[1.0, 1.5, 2.0]]), torch.zeros(1, 3, dtype=torch.long)
    mask = keep_confident(normalised_entropy(entropy, label), label, torch.tensor([0.4375]))
    assert mask.tolist() == [[True, False, False]]
    assert keep_confident(torch.tensor([[0.4375]]), label[:, :1], torch.tensor([0.4375])).tolist() == [[False]]  # strict


def test_mask_does_not_change_with_the_scale_of_entropy():  # P2
    entropy = torch.rand(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = torch.randint(0, 5, (20, 30), generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64)
    a, b = torch.tensor([0.5, 2, 3, 4, 5.0])[label], torch.tensor([1, 0, 3, 7, 2.0])[label]
    mask = keep_confident(normalised_entropy(entropy, label), label, t)
    assert torch.equal(mask, keep_confident(normalised_entropy(a * entropy + b, label), label, t))
    for c in range(5):  # the most certain pixel always stays, the least certain one always goes
        mine = torch.where(label == c, entropy, math.nan).flatten()
        assert mask.flatten()[mine.nan_to_num(9).argmin()] and not mask.flatten()[mine.nan_to_num(-9).argmax()]


# ------------------------------------------------- patches and transfer -------------------------------------------------


def test_windows_fit_everywhere_and_nowhere_else():  # P6
    g = torch.Generator().manual_seed(0)
    windows = random_windows(3000, 4, (512, 1024), 2, g)
    assert windows.shape == (3000, 4, 2)
    assert windows.amin((0, 1)).tolist() == [0, 0] and windows.amax((0, 1)).tolist() == [256, 512]  # both ends included
    assert windows.double().mean((0, 1)).tolist() == pytest.approx([128, 256], abs=6)
    assert random_windows(5, 2, (512, 1024), 1, g).abs().sum() == 0  # scale 1: the whole image
    assert random_windows(2000, 1, (33, 65), 2, g).amax((0, 1)).tolist() == [17, 33]
    image = torch.arange(3 * 8 * 12).view(3, 8, 12)
    assert torch.equal(cut(image, 3, 5, 2), image[:, 3:7, 5:11]) and torch.equal(cut(image, 0, 0, 1), image)


def test_enlarging_keeps_corners_constants_and_sums():  # P6
    prob = probabilities(C, 8, 16)
    large = enlarge(prob, (16, 32))
    for y in (0, -1):
        for x in (0, -1):
            torch.testing.assert_close(large[:, y, x], prob[:, y, x])
    torch.testing.assert_close(large.sum(0), torch.ones(16, 32, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(enlarge(torch.full((1, 3, 4), 0.3), (6, 8)), torch.full((1, 6, 8), 0.3))
    row = enlarge(torch.tensor([[[0.0, 1.0]]]), (1, 4))[0, 0]
    assert row.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_labels_are_decided_after_enlarging():  # P6
    A, B = [0.50, 0.05, 0.45], [0.05, 0.50, 0.45]
    prob = torch.tensor([A, B], dtype=torch.float64).T.reshape(3, 1, 2)
    assert transfer_labels(prob, torch.ones(1, 2, dtype=torch.bool), (1, 3)).tolist() == [[0, 2, 1]]
    single = prob[:, :, :1]
    assert transfer_labels(single, torch.ones(1, 1, dtype=torch.bool), (2, 2)).tolist() == [[0, 0], [0, 0]]


def test_mask_growth():  # P7
    prob, keep = torch.full((2, 256, 512), 0.5), torch.zeros(256, 512, dtype=torch.bool)
    keep[100, 200] = True
    counts = {mode: (transfer_labels(prob, keep, (512, 1024), mode) != 255).sum().item() for mode in ("nearest", "dilate")}
    assert counts == {"nearest": 4, "dilate": 16}
    for share, grown in ((0.3, 0.757), (0.5, 0.937), (0.7, 0.991)):
        keep = torch.rand(256, 512, generator=torch.Generator().manual_seed(0)) < share
        near, dilated = ((transfer_labels(prob, keep, (512, 1024), mode) != 255).double().mean() for mode in ("nearest", "dilate"))
        assert near.item() == keep.double().mean().item()  # exactly
        assert dilated.item() == pytest.approx(grown, abs=0.006)
    for mode in ("nearest", "dilate"):
        assert (transfer_labels(prob, ~keep & keep, (512, 1024), mode) == 255).all()
        assert (transfer_labels(prob, ~keep | keep, (512, 1024), mode) != 255).all()


def test_scale_one_is_the_identity():
    prob = probabilities(5, 6, 8)
    keep = torch.rand(6, 8, generator=torch.Generator().manual_seed(3)) < 0.5
    for mode in ("nearest", "dilate"):
        assert torch.equal(transfer_labels(prob, keep, (6, 8), mode), torch.where(keep, prob.argmax(0), 255))


def test_patches_are_the_windows_of_the_images(tmp_path):
    """Image and label of a patch belong together: the label, painted as grey, is the image that was cut."""
    args = argparse.Namespace(source="toy", toy_world=0, toy_images=3, size=(32, 64), scale=2, augment=False)
    (tmp_path / "round.json").write_text(json.dumps({"patches": [[2, 0, 5, 9], [0, 3, 16, 32]]}))
    written = torch.randint(0, 16, (2, 32, 64)).byte()
    for name, label in zip(("toy_target_train_0002_0", "toy_target_train_0000_3"), written):
        common.write_label(tmp_path / f"{name}.png", label.numpy(), common.SYNTHIA_16)
    patches = scale_invariant.Patches(args, tmp_path)
    whole = common.ToyStreets("target", "train", (32, 64), images=3)
    assert len(patches) == 2 and [patches[i]["name"] for i in (0, 1)] == ["toy_target_train_0002_0", "toy_target_train_0000_3"]
    for i, (index, y, x) in enumerate(((2, 5, 9), (0, 16, 32))):
        assert torch.equal(patches[i]["label"], written[i].long())
        expected = F.interpolate(whole[index]["image"][None, :, y:y + 16, x:x + 32], scale_factor=2, mode="bilinear", align_corners=True)[0]
        torch.testing.assert_close(patches[i]["image"], expected, atol=0.6 / 255 / 0.22, rtol=0)  # kept with 8 bits
    args.augment = True
    jittered = scale_invariant.Patches(args, tmp_path)
    items = [jittered[0] for _ in range(20)]
    mirrored = [torch.equal(item["label"], written[0].long().flip(1)) for item in items]
    assert 0 < sum(mirrored) < 20 and all(m or torch.equal(item["label"], written[0].long()) for m, item in zip(mirrored, items))
    assert (items[0]["image"] - items[1]["image"]).abs().max() > 0.05


# ------------------------------------------------------- the losses -------------------------------------------------------


def logits_of(p):
    """Two-class logits (1, 2, 1, n) whose class 0 has the probabilities p."""
    p = torch.tensor(p, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()])[None, :, None]


@pytest.mark.parametrize("p, ce, focal, total", [  # P8
    (0.9, 0.105361, 0.000105, 0.105371), (0.5, 0.693147, 0.086643, 0.701812), (0.1, 2.302585, 1.678585, 2.470444)])
def test_focal_hand_values(p, ce, focal, total):
    label = torch.zeros(1, 1, 1, dtype=torch.long)
    assert segmentation_loss(logits_of([p]), label).item() == pytest.approx(ce, abs=1e-6)
    assert focal_loss(logits_of([p]), label, 3.0).item() == pytest.approx(focal, abs=1e-6)
    assert ce + 0.1 * focal_loss(logits_of([p]), label, 3.0).item() == pytest.approx(total, abs=2e-6)  # LSE-4


def test_focal_per_pixel_and_of_the_mean_differ():  # P8
    logits, label = logits_of([0.9, 0.1]), torch.zeros(1, 1, 2, dtype=torch.long)
    ce = segmentation_loss(logits, label)
    assert focal_loss(logits, label, 3.0).item() == pytest.approx(0.839345, abs=1e-6)
    assert focal_of_mean(ce, 3.0).item() == pytest.approx(0.412963, abs=1e-6)
    assert focal_loss(logits, label, 0.0).item() == pytest.approx(ce.item())  # gamma = 0 is the cross-entropy
    assert focal_loss(logits, label, 1000.0).item() == pytest.approx(0, abs=1e-12)  # gamma -> infinity leaves LSE-2 alone
    assert focal_of_mean(ce, 0.0).item() == pytest.approx(ce.item())


def test_focal_against_a_loop_at_another_resolution():
    g = torch.Generator().manual_seed(0)
    logits, label = torch.randn(2, 4, 3, 5, generator=g), torch.randint(0, 4, (2, 9, 15), generator=g)
    label[:, :2] = 255
    up = F.interpolate(logits, (9, 15), mode="bilinear", align_corners=True).double().log_softmax(1)
    terms = [(1 - math.exp(v)) ** 3 * -v for n in range(2) for y in range(9) for x in range(15) if label[n, y, x] != 255
             for v in [up[n, label[n, y, x], y, x].item()]]
    assert focal_loss(logits, label, 3.0).item() == pytest.approx(sum(terms) / len(terms), abs=1e-6)


def test_focal_gradient_of_a_probability():
    """d/dp of (1 - p)^3 (-ln p) is 3 (1 - p)^2 ln p - (1 - p)^3 / p; by the logit z of p it is that times p (1 - p)."""
    z = torch.tensor([1.3], requires_grad=True)
    focal_loss(torch.stack([z, torch.zeros(1)])[None, :, None], torch.zeros(1, 1, 1, dtype=torch.long), 3.0).backward()
    p = 1 / (1 + math.exp(-1.3))
    assert z.grad.item() == pytest.approx((3 * (1 - p) ** 2 * math.log(p) - (1 - p) ** 3 / p) * p * (1 - p), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.0])
def test_focal_of_certain_and_ignored_pixels_is_finite(gamma):
    logits = torch.tensor([[200.0, 0.0], [-200.0, 0.0]]).view(1, 2, 1, 2).requires_grad_()
    loss = focal_loss(logits, torch.tensor([[[0, 255]]]), gamma)
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(logits.grad).all() and logits.grad.abs().sum() == 0
    sure = torch.tensor(0.0, requires_grad=True)
    focal_of_mean(sure, gamma).backward()
    assert torch.isfinite(sure.grad)


def test_an_unlabelled_patch_leaves_the_source_gradient_alone():  # P9
    weights = torch.randn(3, 2, requires_grad=True)
    x, nothing = torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 255)
    logits = lambda: torch.einsum("nchw,cd->ndhw", x, weights)
    source = segmentation_loss(logits(), torch.zeros(1, 4, 4, dtype=torch.long))
    ce, fl = segmentation_loss(logits(), nothing), focal_loss(logits(), nothing, 3.0)
    assert ce.item() == fl.item() == focal_of_mean(ce, 3.0).item() == 0
    expected = torch.autograd.grad(source, weights, retain_graph=True)[0]
    for focal in (fl, focal_of_mean(ce, 3.0)):
        assert torch.equal(torch.autograd.grad(source + ce + 0.1 * focal, weights, retain_graph=True)[0], expected)


def test_one_backward_pass_of_the_sum_is_the_two_of_the_authors():  # P11
    weights, g = torch.randn(3, 4, requires_grad=True), torch.Generator().manual_seed(0)
    x_s, x_t = torch.randn(2, 1, 3, 5, 5, generator=g)
    y_s, y_t = torch.randint(0, 4, (2, 1, 5, 5), generator=g)
    f = lambda x: torch.einsum("nchw,cd->ndhw", x, weights)
    target = lambda: segmentation_loss(f(x_t), y_t) + 0.1 * focal_loss(f(x_t), y_t, 3.0)
    segmentation_loss(f(x_s), y_s).backward()
    target().backward()
    both = torch.autograd.grad(segmentation_loss(f(x_s), y_s) + target(), weights)[0]
    torch.testing.assert_close(weights.grad, both)


def test_optimizer_lists_every_weight_once_and_doubles_the_rate_of_biases():  # P11
    with torch.device("meta"):
        models = {name: common.build_network(C, name) for name in ("resnet101", "vgg16-fcn8s")}
    for name, model in models.items():
        common.freeze_batch_norm(model)
        optimizer = scale_invariant.make_optimizer(model, argparse.Namespace(optimizer="adam", head_lr=1.0))
        if name == "vgg16-fcn8s":
            scale_invariant.faster_biases(optimizer)
        listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(set(listed)) == len(listed) and set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
    scale_invariant.set_lr(optimizer, 1e-6)
    rates = {p.ndim: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {4: 1e-6, 1: 2e-6} and all(len({p.ndim for p in g["params"]}) == 1 for g in optimizer.param_groups)
    assert all(g["betas"] == (0.9, 0.99) and g["weight_decay"] == 0 for g in optimizer.param_groups)
    enlarging = {id(p) for p in model.enlarge.parameters()}
    assert len(enlarging) == 3 and not enlarging & set(listed)  # the bilinear kernels never learn


# -------------------------------------------------------- the script --------------------------------------------------------

FEW = [*TINY, "--warmup-iterations", 2, "--rounds", 2, "--iterations", 4, "--patches", 2]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    out = run(folder, "scale_invariant.py", *FEW)
    (folder / "out.txt").write_text(out)
    return folder / "runs/scale_invariant-toy-s0"


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_one_command_runs_all_stages(uninterrupted):
    assert {"args.json", "log.jsonl", "source_only.pt", "last.pt", "panel.png", "result.json"} <= {p.name for p in uninterrupted.iterdir()}
    assert list(result(uninterrupted)["columns"]) == ["source only", "+ BN target", "LSE"]
    out = (uninterrupted.parent.parent / "out.txt").read_text()
    assert "source only" in out and "LSE" in out and "motorcycle" in out
    rounds = [line for line in lines(uninterrupted) if "round" in line["stage"]]
    assert [r["portion"] for r in rounds] == [1.0, 1.5]  # LSE-13
    assert all(0 < r["kept"] < 1 and 0 <= r["accuracy"] <= 1 and math.isfinite(r["entropy_gap"]) for r in rounds)  # P12
    assert all(r["patches"] == 2 * r["images"] and 0 < r["images"] <= 24 for r in rounds)  # P4: no image too many
    for r, logged_round in enumerate(rounds):
        folder = uninterrupted / f"pseudo_labels/round{r + 1}"
        state, files = json.loads((folder / "round.json").read_text()), sorted(folder.glob("*.png"))
        assert len(files) == len(state["patches"]) == logged_round["patches"] and len({tuple(p[:2]) for p in state["patches"]}) == len(files)
        assert common.read_label(files[0]).shape == (32, 64) and len(state["thresholds"]) == 16
        shares = [(common.read_label(file) != 255).mean() for file in files]
        assert sum(shares) / len(shares) == pytest.approx(logged_round["kept"])
    steps = [line for line in lines(uninterrupted) if line["stage"] == "adapt"]
    assert [line["step"] for line in steps] == ["1/4", "2/4", "3/4", "4/4"] and all(line["focal"] > 0 for line in steps)
    for line in steps:
        assert line["loss"] == pytest.approx(line["ce_s"] + line["ce_t"] + 0.1 * line["focal"], rel=1e-5)  # LSE-4
    assert Image.open(uninterrupted / "panel.png").width > 4 * 300  # image | truth | source only | LSE


def test_written_labels_are_those_of_the_equations(tmp_path, start):
    """Ranking, thresholds and labels of a round again, image by image, with loops over the classes."""
    run(tmp_path, "scale_invariant.py", *FEW, "--init", start, "--iterations", 1, "--rounds", 1, "--freeze-bn", "--precision", "fp32",
        "--out", "run")
    folder = tmp_path / "run/pseudo_labels/round1"
    state = json.loads((folder / "round.json").read_text())
    model = common.unpack_model(common.read_checkpoint(start), start).eval()
    images = common.ToyStreets("target", "train", (32, 64), images=24)
    probs = [common.predict(model, images[i]["image"][None], (32, 64))[0] for i in range(24)]
    lists = []
    for c in range(16):
        shown = [(prob.amax(0)[prob.argmax(0) == c].mean().item(), i) for i, prob in enumerate(probs) if (prob.argmax(0) == c).any()]
        lists.append([i for _, i in sorted(shown)[::-1]])
    kept = {i for images in lists for i in images[:int(len(images) / 19)]}
    assert sorted(kept) == sorted({p[0] for p in state["patches"]}) and len(kept) > 0
    assert state["references"] == [images[int(len(images) / 19)] if images else -1 for images in lists]
    gaps = []
    entropy_of = lambda prob: -(prob * (prob + 1e-12).log()).sum(0).mean().item()
    for index, n, y, x in state["patches"]:
        if n == 0:  # P12: the enlarged patch predicted, against the whole image's prediction enlarged
            patch = F.interpolate(images[index]["image"][None, :, y:y + 16, x:x + 32], scale_factor=2, mode="bilinear", align_corners=True)
            there = F.interpolate(probs[index][None, :, y:y + 16, x:x + 32], scale_factor=2, mode="bilinear", align_corners=True)[0]
            gaps.append(entropy_of(common.predict(model, patch, (32, 64))[0]) - entropy_of(there))
    assert next(line for line in lines(tmp_path / "run") if "entropy_gap" in line)["entropy_gap"] == pytest.approx(
        sum(gaps) / len(gaps), abs=2e-4)
    for index, n, y, x in state["patches"][:6]:
        prob, label = probs[index], probs[index].argmax(0)
        entropy, keep = -(prob * prob.log()).sum(0), torch.zeros(32, 64, dtype=torch.bool)
        for c in label.unique().tolist():
            mine = entropy[label == c]
            scaled = (mine - mine.min()) / (mine.max() - mine.min()).clamp(min=1e-9)
            keep[label == c] = scaled < state["thresholds"][c]
        up = F.interpolate(prob[None, :, y:y + 16, x:x + 32], scale_factor=2, mode="bilinear", align_corners=True)[0].argmax(0)
        mask = keep[y:y + 16, x:x + 32].repeat_interleave(2, 0).repeat_interleave(2, 1)
        stored = torch.from_numpy(common.read_label(folder / f"{images[index]['name']}_{n}.png")).long()
        agree = (stored == torch.where(mask, up, 255)).double().mean().item()
        assert agree > 0.995  # the batch of the script and the single images here round differently


def test_init_is_the_same_as_training_the_source_model_here(tmp_path, start, uninterrupted):
    run(tmp_path, "scale_invariant.py", *FEW, "--init", start, "--out", "given")
    assert same_weights(start, uninterrupted / "source_only.pt") and same_weights(start, tmp_path / "given/source_only.pt")
    assert same_weights(uninterrupted / "last.pt", tmp_path / "given/last.pt")


def test_killed_at_every_stage_and_resumed_the_run_ends_the_same(tmp_path, uninterrupted):
    """One run, killed by SIGKILL in each stage in turn, also while it writes labels."""
    arguments = ["scale_invariant.py", *FEW, "--save-every", 1, "--out", "cut"]
    labelling = lambda: any((tmp_path / "cut/pseudo_labels").glob("round1/*.png"))
    for stage, count in (("source", 1), ("labels", 1), ("adapt", 1), ("adapt", 3)):
        resume = ["--resume"] if stage != "source" else []
        kill_when(tmp_path, labelling if stage == "labels" else lambda: logged(tmp_path / "cut", stage, count), *arguments, *resume)
    run(tmp_path, *arguments, "--resume")
    for name in ("source_only.pt", "last.pt"):
        assert same_weights(tmp_path / "cut" / name, uninterrupted / name)


def test_ctrl_c_and_resume_with_epochs(tmp_path, start):
    """Without --iterations a round lasts --epochs over its patches, which a resumed run must find again."""
    arguments = ["scale_invariant.py", *FEW, "--init", start, "--iterations", 0, "--epochs", 1, "--portion", 0.8, "--portion-step", 0.8,
                 "--patches", 4, "--ramp", 0]
    run(tmp_path, *arguments, "--out", "whole")
    code, errors = kill_when(tmp_path, lambda: logged(tmp_path / "cut", "round 2", 1), *arguments, "--out", "cut", with_signal=signal.SIGINT)
    assert code == 1 and "--resume" in errors and "Traceback" not in errors
    run(tmp_path, *arguments, "--out", "cut", "--resume")
    assert same_weights(tmp_path / "whole/last.pt", tmp_path / "cut/last.pt")
    log = lines(tmp_path / "whole")
    rounds, steps = ([line for line in log if name in line["stage"]] for name in ("round", "adapt"))
    one, both = rounds[0]["patches"] // 2, (rounds[0]["patches"] + rounds[1]["patches"]) // 2  # two patches per step
    assert [line["step"] for line in steps] == [f"{i}/{one}" for i in range(1, one + 1)] + [f"{i}/{both}" for i in range(one + 1, both + 1)]
    assert one > 1 and steps[0]["lr"] == steps[one]["lr"] > steps[one - 1]["lr"]  # the poly decay starts anew in each round


@pytest.mark.parametrize("flags", [
    ["--mask-mode", "dilate", "--focal", "mean", "--rank", "global", "--gamma", 5, "--freeze-bn", "--precision", "bf16"],
    ["--scale", 1, "--focal", "off", "--no-augment", "--optimizer", "adam"]])
def test_every_alternative_runs(tmp_path, start, flags):
    run(tmp_path, "scale_invariant.py", *FEW, "--iterations", 1, "--rounds", 1, "--init", start, *flags, "--out", "run")
    log = lines(tmp_path / "run")
    assert ("focal" in log[-1]) == ("off" not in flags)
    state = json.loads((tmp_path / "run/pseudo_labels/round1/round.json").read_text())
    if "--scale" in flags:
        assert {tuple(p[2:]) for p in state["patches"]} == {(0, 0)} and log[0]["entropy_gap"] == pytest.approx(0, abs=1e-6)
    if "mean" in flags:
        assert log[-1]["focal"] == pytest.approx((1 - math.exp(-log[-1]["ce_t"])) ** 5 * log[-1]["ce_t"], rel=1e-4)


def test_real_formats_from_start_to_end(tmp_path):
    write_synthia(tmp_path)
    write_gta5(tmp_path)
    write_cityscapes(tmp_path)
    for path in (tmp_path / "cityscapes/gtFine/train").rglob("*.png"):
        path.write_bytes(b"closed")  # an adaptation that opened a target training label would stop here
    for source, classes in (("synthia", 16), ("gta5", 19)):
        run(tmp_path, "scale_invariant.py", "--source", source, "--data-root", tmp_path, "--backbone", "resnet18", "--backbone-weights", "none",
            "--workers", 1, *FEW, "--iterations", 2, "--portion", 4)
        scores = result(tmp_path / f"runs/scale_invariant-{source}-s0")
        assert len(scores["iou"]) == classes and ("miou13" in scores) == (source == "synthia")


def test_bad_input_is_one_line(tmp_path, start):
    message = run(tmp_path, "scale_invariant.py", *FEW, "--init", start, "--portion", 0.1, "--out", "none", ok=False)
    assert "0.792 or more" in message  # 19 / 24, rounded up
    run(tmp_path, "scale_invariant.py", *FEW, "--init", start, "--portion", 0.792, "--out", "advised")
    write_gta5(tmp_path)
    write_cityscapes(tmp_path)
    real = ["--source", "gta5", "--data-root", tmp_path, "--backbone", "resnet18", "--backbone-weights", "none", *FEW]
    message = run(tmp_path, "scale_invariant.py", *real, "--init", start, ok=False)
    assert "last.pt" in message and "16 classes" in message and "19" in message


def test_two_processes_share_one_run(tmp_path, start):
    """Ranking, thresholds and labels are those of all images, the batch is split."""
    arguments = [*FEW, *SPLITTABLE, "--init", start, "--rounds", 1, "--lr", 0.02, "--ramp", 0]
    run(tmp_path, "scale_invariant.py", *arguments, "--out", "one")
    run_as_two(tmp_path, "scale_invariant.py", *arguments, "--out", "two")
    assert trained_alike(start, tmp_path / "one/last.pt", tmp_path / "two/last.pt")
    logs = [lines(tmp_path / name) for name in ("one", "two")]
    for key, tolerance in (("images", 0), ("kept", 0.02), ("entropy_gap", 1e-3), ("accuracy", 0.02)):
        assert logs[0][0][key] == pytest.approx(logs[1][0][key], abs=tolerance)
    states = [json.loads((tmp_path / name / "pseudo_labels/round1/round.json").read_text()) for name in ("one", "two")]
    assert states[0]["patches"] == states[1]["patches"]
    assert len(list((tmp_path / "two/pseudo_labels/round1").glob("*.png"))) == len(states[1]["patches"])
