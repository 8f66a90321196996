"""scale_invariant.py: every equation against an independent computation, then every wire of a step and of main().

Property names such as P3 number what a reimplementation of LSE must obey; the figures are hand values and closed forms.
"""

import argparse
import functools
import json
import math
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from scripts import SPLITTABLE, TINY, load, result, run, run_as_two, same_weights, trained_alike
from torch import nn
from trees import write_cityscapes, write_gta5

import common
import scale_invariant
from scale_invariant import (
    FCN8s, Views, class_means, class_thresholds, cut, enlarge, enlarge_labels, fcn8s_optimizer, focal_loss,
    image_confidence, image_uncertainty, keep_confident, kept_images, normalised_entropy, pixel_entropy, random_windows,
    ranked_images, round_portion, round_steps, segmentation_loss, select_images, step_losses, transfer_labels,
    view_agreement, view_examples)


def probabilities(*shape, seed=0, sharpness=3.0):
    g = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, generator=g, dtype=torch.float64)).softmax(-3)


# ------------------------------------------------ entropy and ranking ------------------------------------------------


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


def test_normalised_entropy_hand_values_and_a_loop_over_classes():  # P2
    entropy, label = torch.tensor([[0.2, 0.6, 1.0, 0.4]]), torch.zeros(1, 4, dtype=torch.long)
    assert normalised_entropy(entropy, label)[0].tolist() == pytest.approx([0, 0.5, 1, 0.25])
    assert class_means(normalised_entropy(entropy, label), label, 1).item() == pytest.approx(0.4375)
    entropy = 3 * torch.rand(13, 17, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    label = torch.randint(0, 6, (13, 17), generator=torch.Generator().manual_seed(2))
    for value, e, c in zip(normalised_entropy(entropy, label).flatten(), entropy.flatten(), label.flatten()):
        mine = entropy[label == c].tolist()
        assert value.item() == pytest.approx((e.item() - min(mine)) / (max(mine) - min(mine)), abs=1e-12)


def test_a_class_of_one_pixel_or_one_value_gives_zero_not_nan():  # P2
    entropy, label = torch.tensor([[0.7, 0.3, 0.9], [0.4, 0.4, 0.4]]), torch.tensor([[5, 0, 0], [1, 1, 1]])
    assert normalised_entropy(entropy, label).tolist() == [[0, 0, 1], [0, 0, 0]]


def test_confidence_and_uncertainty_against_a_loop():  # P5: only pixels predicted as c count
    prob = probabilities(6, 9, 11)
    prob[4] *= 1e-3
    prob = prob / prob.sum(0)
    confidence, uncertainty = image_confidence(prob), image_uncertainty(prob)
    assert confidence.shape == uncertainty.shape == (6,) and math.isnan(confidence[4]) and math.isnan(uncertainty[4])
    for c in (0, 1, 2, 3, 5):
        mine = [p for p in prob.flatten(1).T.tolist() if p.index(max(p)) == c]
        entropies = [-sum(v * math.log(v) for v in p) for p in mine]
        assert confidence[c].item() == pytest.approx(sum(map(max, mine)) / len(mine), abs=1e-12)
        low, high = min(entropies), max(entropies)
        expected = sum((e - low) / (high - low) for e in entropies) / len(entropies)
        assert uncertainty[c].item() == pytest.approx(expected, abs=1e-7)


def confidences(M, classes, seed=0):
    return torch.rand(M, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_ranking_and_its_ties():
    confidence = torch.tensor([[0.5, math.nan], [0.9, 0.3], [0.5, 0.3], [0.7, math.nan]], dtype=torch.float64)
    assert ranked_images(confidence[:, 0]) == [1, 3, 2, 0]  # equal confidence: the later file first
    assert ranked_images(confidence[:, 1]) == [2, 1]  # images without the class are not in its list


def test_the_seven_rounds(monkeypatch):  # P3, P4
    monkeypatch.setattr(sys, "argv", ["scale_invariant.py", "--source", "gta5"])
    args = scale_invariant.parse_args()
    assert (args.rounds, args.iterations, args.epochs, args.patches, args.lr) == (7, 0, 2, 4, 1e-6)
    assert (args.beta, args.gamma, args.view, args.mask_mode) == (0.1, 3.0, "enlarged", "nearest")
    assert args.focal and args.augment and args.network == "deeplab" and args.backbone == "resnet101"
    portions = [round_portion(args.portion, args.portion_step, r) for r in range(args.rounds)]
    assert portions == [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4]
    for portion, k in zip(portions, (15, 23, 31, 39, 46, 54, 62)):
        assert kept_images(2975, portion) == k
        selected, _ = select_images(confidences(2975, 19), portion)
        assert k < len(selected) <= 19 * k and selected.unique().tolist() == selected.tolist()
    # Where N_c p / 19 is a whole number that a float misses.
    assert [kept_images(380, portion) for portion in portions] == [2, 3, 4, 5, 6, 7, 8]
    assert 2660 * 0.35 / 19 < 49 and kept_images(2660, 0.35) == 49
    assert (kept_images(189, 0.1), kept_images(190, 0.1), kept_images(7, 19.5)) == (0, 1, 7)
    assert [round_steps(4 * images, 2, 1) for images in (167, 164)] == [1336, 1312]
    assert round_steps(4 * 167, 2, 2) == 668 and round_steps(1, 1, 8) == 1


def test_selection_against_sorted_lists():  # P5, P3
    confidence = confidences(60, 7)
    confidence[confidence < 0.3] = math.nan
    confidence[:, 6] = math.nan  # in no image
    selected, reference = select_images(confidence, 3.0)
    expected = set()
    for c in range(6):
        images = sorted((s, i) for i, s in enumerate(confidence[:, c].tolist()) if not math.isnan(s))[::-1]
        k = int(len(images) * 3 / 19)
        expected |= {i for _, i in images[:k]}
        assert reference[c].item() == images[k][1] and k > 0
    assert selected.tolist() == sorted(expected) and reference[6] == -1
    selected, reference = select_images(confidences(10, 2), 19.0)  # everything
    assert selected.tolist() == list(range(10)) and reference.tolist() == [-1, -1]
    selected, reference = select_images(confidences(5, 1), 0.1)  # nothing: the threshold comes from the best image
    assert selected.tolist() == [] and reference[0] == confidences(5, 1).argmax()


# ---------------------------------------------- thresholds and the mask ----------------------------------------------


def test_threshold_is_that_of_the_reference():  # P2, LSE-9
    confidence, uncertainty = confidences(40, 5), confidences(40, 5, seed=1)
    _, reference = select_images(confidence, 4.0)
    t = class_thresholds(confidence, uncertainty, reference)
    assert t.tolist() == [uncertainty[reference[c], c].item() for c in range(5)]


def test_threshold_of_a_degenerate_reference_comes_from_the_next_image():
    confidence = torch.tensor([[0.9, 0.2], [0.8, 0.9], [0.7, math.nan], [0.6, 0.5]], dtype=torch.float64)
    uncertainty = torch.tensor([[0.1, 0.0], [0.0, 0.0], [0.0, math.nan], [0.4, 0.0]], dtype=torch.float64)
    # Class 0: image 1 has one value, image 2 too, image 3 defines 0.4; image 0 stands before the reference. 1: none.
    assert class_thresholds(confidence, uncertainty, torch.tensor([1, 1])).tolist() == [0.4, 0.0]
    assert class_thresholds(confidence, uncertainty + 0.2, torch.tensor([-1, -1])).tolist() == [0.0, 0.0]
    label = torch.tensor([[1, 1, 0]])
    assert keep_confident(torch.zeros(1, 3), label, torch.tensor([0.4, 0.0])).tolist() == [[False, False, True]]


def test_mask_keeps_what_is_strictly_below_and_does_not_change_with_the_scale_of_entropy():  # P2
    entropy, label = torch.tensor([[1.0, 1.5, 2.0]]), torch.zeros(1, 3, dtype=torch.long)
    for threshold, mask in ((0.4375, [True, False, False]), (0.5, [True, False, False]), (0.51, [True, True, False])):
        assert keep_confident(normalised_entropy(entropy, label), label, torch.tensor([threshold])).tolist() == [mask]
    entropy = torch.rand(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = torch.randint(0, 5, (20, 30), generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64)
    a, b = torch.tensor([0.5, 2, 3, 4, 5.0])[label], torch.tensor([1, 0, 3, 7, 2.0])[label]
    mask = keep_confident(normalised_entropy(entropy, label), label, t)
    assert torch.equal(mask, keep_confident(normalised_entropy(a * entropy + b, label), label, t))
    for c in range(5):  # the most certain pixel always stays, the least certain one always goes
        mine = torch.where(label == c, entropy, math.nan).flatten()
        assert mask.flatten()[mine.nan_to_num(9).argmin()] and not mask.flatten()[mine.nan_to_num(-9).argmax()]


# ------------------------------------------------ patches and transfer ------------------------------------------------


def test_windows_fit_everywhere_and_nowhere_else():  # P6
    windows = random_windows(3000, 4, (512, 1024), torch.Generator().manual_seed(0))
    assert windows.shape == (3000, 4, 2)
    assert windows.amin((0, 1)).tolist() == [0, 0] and windows.amax((0, 1)).tolist() == [256, 512]  # both ends included
    assert windows.double().mean((0, 1)).tolist() == pytest.approx([128, 256], abs=6)
    image = torch.arange(3 * 8 * 12).view(3, 8, 12)
    assert torch.equal(cut(image, 3, 5, 4, 6), image[:, 3:7, 5:11])


def test_enlarging_keeps_corners_and_sums():  # P6
    prob = probabilities(19, 8, 16)
    large = enlarge(prob, (16, 32))
    for y in (0, -1):
        for x in (0, -1):
            torch.testing.assert_close(large[:, y, x], prob[:, y, x])
    torch.testing.assert_close(large.sum(0), torch.ones(16, 32, dtype=torch.float64), atol=1e-6, rtol=0)
    assert enlarge(torch.tensor([[[0.0, 1.0]]]), (1, 4)).flatten().tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    label = torch.tensor([[1, 255], [7, 0]])
    assert enlarge_labels(label, (4, 4)).tolist() == [[1, 1, 255, 255]] * 2 + [[7, 7, 0, 0]] * 2


def test_labels_are_decided_after_enlarging():  # P6
    A, B = [0.50, 0.05, 0.45], [0.05, 0.50, 0.45]
    prob = torch.tensor([A, B], dtype=torch.float64).T.reshape(3, 1, 2)
    assert transfer_labels(prob, torch.ones(1, 2, dtype=torch.bool), (1, 3)).tolist() == [[0, 2, 1]]
    prob, keep = probabilities(5, 6, 8), torch.rand(6, 8, generator=torch.Generator().manual_seed(3)) < 0.5
    for mode in ("nearest", "dilate"):  # scale one is the identity
        assert torch.equal(transfer_labels(prob, keep, (6, 8), mode), torch.where(keep, prob.argmax(0), 255))


def test_mask_growth():  # P7
    prob, keep = torch.full((2, 256, 512), 0.5), torch.zeros(256, 512, dtype=torch.bool)
    kept = lambda keep, *mode: transfer_labels(prob, keep, (512, 1024), *mode) != 255
    keep[100, 200] = True
    assert [kept(keep, *mode).sum().item() for mode in ((), ("nearest",), ("dilate",))] == [4, 4, 16]
    keep = torch.rand(256, 512, generator=torch.Generator().manual_seed(0)) < 0.5
    assert kept(keep).double().mean().item() == keep.double().mean().item()  # exactly
    assert kept(keep, "dilate").double().mean().item() == pytest.approx(0.937, abs=0.006)


def test_examples_of_each_view():
    corners = torch.tensor([[[3, 5], [0, 1]], [[16, 32], [2, 2]]])
    windows = [[7, 0, 3, 5, 16, 32], [7, 1, 0, 1, 16, 32], [9, 0, 16, 32, 16, 32], [9, 1, 2, 2, 16, 32]]
    assert view_examples("enlarged", [7, 9], corners, (32, 64)) == windows
    whole = [0, 0, 32, 64]
    assert view_examples("whole", [7, 9], corners, (32, 64)) == [[i, n, *whole] for i in (7, 9) for n in (0, 1)]
    both = [*windows[:2], [7, 2, *whole], *windows[2:], [9, 2, *whole]]
    assert view_examples("both", [7, 9], corners, (32, 64)) == both


def window_of(maps, window, size=(32, 64)):
    """The window (top, left, a, b) of maps (C, H, W), brought to `size`."""
    top, left, a, b = window
    maps = maps[None, :, top:top + a, left:left + b].float()
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)[0]


def test_views_are_the_windows_of_the_images(tmp_path):
    args = argparse.Namespace(source="toy", toy_world=0, toy_images=3, size=(32, 64), augment=False)
    examples = [[2, 0, 5, 9, 16, 32], [0, 3, 16, 32, 16, 32], [1, 4, 0, 0, 32, 64]]
    names = ["toy_target_train_0002_0", "toy_target_train_0000_3", "toy_target_train_0001_4"]
    written = torch.randint(0, 16, (3, 32, 64)).byte()
    for name, label in zip(names, written):
        common.write_label(tmp_path / f"{name}.png", label.numpy(), common.SYNTHIA_16)
    views = Views(args, examples, tmp_path)
    images = common.ToyStreets("target", "train", (32, 64), images=3)
    assert len(views) == 3 and [views[i]["name"] for i in range(3)] == names
    for i, (index, _, *window) in enumerate(examples):
        assert torch.equal(views[i]["label"], written[i].long())
        assert torch.equal(views[i]["image"], window_of(images[index]["image"], window).round().byte())
    assert "label" not in Views(args, examples)[0]
    args.augment = True
    torch.manual_seed(0)
    items, item = [Views(args, examples, tmp_path)[0] for _ in range(8)], views[0]
    mirrored = [torch.equal(other["label"], item["label"].flip(1)) for other in items]
    assert 0 < sum(mirrored) < 8
    for other, flipped in zip(items, mirrored):  # mirrored together, otherwise unchanged
        assert all(torch.equal(other[key], item[key].flip(-1) if flipped else item[key]) for key in ("image", "label"))


def test_agreement_of_views_against_a_loop():  # P12
    seen, there = probabilities(5, 4, 6), probabilities(5, 4, 6, seed=1)
    gap, cross_entropy, agreement = view_agreement(seen, there).tolist()
    terms = [0.0, 0.0, 0.0]
    for a, b in zip(seen.flatten(1).T.tolist(), there.flatten(1).T.tolist()):
        terms[0] += sum(v * math.log(v) for v in b) - sum(v * math.log(v) for v in a)
        terms[1] -= math.log(a[b.index(max(b))])
        terms[2] += a.index(max(a)) == b.index(max(b))
    assert [gap, cross_entropy, agreement] == pytest.approx([term / 24 for term in terms], abs=1e-9)
    certain = torch.eye(3, dtype=torch.float64)[:, None]  # (3, 1, 3): certain, and wrong everywhere
    gap, cross_entropy, agreement = view_agreement(certain, certain.roll(1, 0)).tolist()
    assert gap == 0 and agreement == 0 and cross_entropy == pytest.approx(-math.log(1e-12))  # which entropy cannot see


# ----------------------------------------------------- the losses -----------------------------------------------------


def test_focal_hand_values():  # P8
    def logits_of(*p):
        """Two-class logits (1, 2, 1, n) whose class 0 has the probabilities p."""
        p = torch.tensor(p, dtype=torch.float64)
        return torch.stack([p.log(), (1 - p).log()])[None, :, None]

    pixel = torch.zeros(1, 1, 1, dtype=torch.long)
    for p, ce, fl in ((0.9, 0.105361, 0.000105), (0.5, 0.693147, 0.086643), (0.1, 2.302585, 1.678585)):
        assert segmentation_loss(logits_of(p), pixel).item() == pytest.approx(ce, abs=1e-6)
        assert focal_loss(logits_of(p), pixel, 3.0).item() == pytest.approx(fl, abs=1e-6)
    two = torch.zeros(1, 1, 2, dtype=torch.long)
    assert focal_loss(logits_of(0.9, 0.1), two, 3.0).item() == pytest.approx(0.839345, abs=1e-6)  # not 0.412963
    assert focal_loss(logits_of(0.9, 0.1), two, 0.0).item() == pytest.approx(1.203973, abs=1e-6)  # the cross-entropy


@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_focal_of_certain_and_ignored_pixels_is_finite(gamma):
    for label in ([[[0, 255]]], [[[255, 255]]]):
        logits = torch.tensor([[200.0, 0.0], [-200.0, 0.0]]).view(1, 2, 1, 2).requires_grad_()
        loss = focal_loss(logits, torch.tensor(label), gamma)
        loss.backward()
        assert loss.item() == 0 and torch.isfinite(logits.grad).all() and logits.grad.abs().sum() == 0


# -------------------------------------------------- FCN8s, its Adam --------------------------------------------------


def test_fcn8s_gives_logits_of_the_input_size_and_each_score_teaches_its_stage():
    with torch.device("meta"):  # shapes and the graph only
        model = FCN8s(19).eval()
        for size in ((512, 1024), (720, 1280), (760, 1280), (80, 160), (33, 47)):
            assert model(torch.empty(2, 3, *size))[1].shape == (2, 19, *size)
        for stage in range(3):
            cuts = [model.classifier[other].register_forward_hook(lambda module, given, score: score.detach())
                    for other in range(3) if other != stage]
            taught = next(model.backbone[stage].parameters()), model.classifier[stage].bias
            torch.autograd.grad(model(torch.empty(1, 3, 16, 16))[1].sum(), taught)  # an error without a connection
            for hook in cuts:
                hook.remove()


@pytest.fixture(scope="module")
def fcn8s():
    """A VGG16 of random weights and the FCN8s that is built on it, of random scores."""
    import torchvision

    torch.manual_seed(0)
    with torch.device("meta"):  # torchvision's own initialisation takes seconds
        vgg = torchvision.models.vgg16()
    vgg.to_empty(device="cpu").eval()
    for p in vgg.parameters():
        bound = math.sqrt(6 / p[0].numel()) if p.ndim > 1 else 0.1
        p.data.uniform_(-bound, bound)
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "torchvision_network", lambda *given: asked.append(given) or vgg)
        model = FCN8s(3, "vgg16", "file.pth").eval()
    assert asked == [("vgg16", "file.pth")]
    for score in model.classifier:
        assert score.weight.abs().sum() == score.bias.abs().sum() == 0  # where they start
        nn.init.normal_(score.weight)
        nn.init.normal_(score.bias)
    return vgg, model


def test_fcn8s_against_its_description(fcn8s):
    """The network again as a functional chain: VGG16's layers, fc6 as a 7x7 convolution, scores, upsampling, crops."""
    vgg, model = fcn8s
    image = torch.randn(1, 3, 8, 40, generator=torch.Generator().manual_seed(0))
    convs = [m for stage in model.backbone for m in stage if isinstance(m, nn.Conv2d)]
    assert len(convs) == 15 and [m.p for m in model.modules() if isinstance(m, nn.Dropout2d)] == [0.5, 0.5]

    def enlarged(score, factor):  # bilinear kernel by its definition, one channel at a time
        row = torch.tensor([1 - abs(i + 0.5 - factor) / factor for i in range(2 * factor)])
        kernel = torch.outer(row, row)[None, None]
        return torch.cat([F.conv_transpose2d(score[:, c:c + 1], kernel, stride=factor) for c in range(3)], 1)

    with torch.no_grad():
        x, pools = F.pad(image, (99, 99, 99, 99)), []  # and one more by the first convolution's own padding
        for i, conv in enumerate(convs[:13]):
            x = F.conv2d(x, conv.weight, conv.bias, padding=1).relu()
            if i in (1, 3, 6, 9, 12):
                x = F.max_pool2d(x, 2, ceil_mode=True)
                pools.append(x)
        # fc6 and fc7 are VGG's classifier on windows of 7x7 cells: here, on the first one.
        first = vgg.classifier[:5](x[:, :, :7, :7].flatten(1))  # linear, ReLU, dropout (off), linear, ReLU
        for conv in convs[13:]:
            x = F.conv2d(x, conv.weight, conv.bias).relu()
        torch.testing.assert_close(x[:, :, 0, 0], first, rtol=1e-4, atol=1e-4)
        one, two, three = (
            F.conv2d(x, s.weight, s.bias) for x, s in zip((pools[2] * 0.0058, pools[3] * 0.58, x), model.classifier))
        up = enlarged(three, 2)
        up = enlarged(up + two[:, :, 5:, 5:][:, :, :up.shape[2], :up.shape[3]], 2)
        up = enlarged(up + one[:, :, 9:, 9:][:, :, :up.shape[2], :up.shape[3]], 8)
        torch.testing.assert_close(model(image)[1], up[:, :, 31:39, 31:71], rtol=1e-4, atol=1e-3)


def test_every_weight_is_trained_once_and_fcn8s_biases_at_twice_the_rate(fcn8s):  # P11
    _, model = fcn8s
    optimizer = fcn8s_optimizer(model, argparse.Namespace(device="cpu"))
    scale_invariant.set_lr(optimizer, 1e-6)
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(set(listed)) == len(listed) and set(listed) == {id(p) for p in model.parameters()}
    rates = {(p.ndim, group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    assert rates == {(4, 1e-6), (1, 2e-6)} and isinstance(optimizer, torch.optim.Adam)
    assert all(g["betas"] == (0.9, 0.99) and g["weight_decay"] == 0 for g in optimizer.param_groups)
    with torch.device("meta"):
        model = common.DeepLabV2(19)
    common.freeze_batch_norm(model)
    optimizer = scale_invariant.make_optimizer(model, argparse.Namespace(optimizer="sgd", head_lr=10.0, device="cpu"))
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(set(listed)) == len(listed) and set(listed) == {id(p) for p in model.parameters() if p.requires_grad}


# ------------------------------------------------------ one step ------------------------------------------------------


class Tiny(common.DeepLabV2):
    """A network with the parts of DeepLabV2 whose training step takes a moment."""

    def __init__(self, classes=16, *_):
        nn.Module.__init__(self)
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 8, stride=8), nn.BatchNorm2d(6), nn.ReLU())
        self.classifier = nn.ModuleList([nn.Conv2d(6, classes, 1)])
        self.feature_dim = 6


def step_arguments(**flags):
    defaults = {"device": "cpu", "precision": "fp32", "focal": True, "beta": 0.1, "gamma": 3.0}
    return argparse.Namespace(**{**defaults, **flags})


def step_batches(seed=0):
    g = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(2, 2, 3, 32, 64, generator=g), torch.randint(0, 16, (2, 2, 32, 64), generator=g)
    labels[:, :, :9] = 255
    return (images[0], labels[0]), (images[1], labels[1])


def independent_losses(logits_s, y_s, logits_t, y_t, focal=True, beta=0.1, gamma=3.0):
    """The terms of LSE-1 to LSE-4 from log-softmax, pixel by pixel."""
    def pixels(logits, label):
        up = F.interpolate(logits.double(), label.shape[1:], mode="bilinear", align_corners=False)  # Tiny's cells tile
        l = -up.log_softmax(1).gather(1, label.clamp(max=15)[:, None])[:, 0]
        return l[label != 255]

    l_s, l_t = pixels(logits_s, y_s), pixels(logits_t, y_t)
    terms = {"ce_s": l_s.mean(), "ce_t": l_t.mean()}
    if focal:
        terms["focal"] = ((1 - (-l_t).exp()) ** gamma * l_t).mean()
    return {**terms, "loss": terms["ce_s"] + terms["ce_t"] + (beta * terms["focal"] if focal else 0)}


@pytest.mark.parametrize("flags", [{}, {"gamma": 5.0, "beta": 0.7}, {"focal": False}])
def test_every_term_of_a_step_and_its_gradient(flags):
    torch.manual_seed(0)
    model, (source, target) = Tiny().train(), step_batches()
    losses = step_losses(model, source, target, step_arguments(**flags))
    expected = independent_losses(model(source[0])[1], source[1], model(target[0])[1], target[1], **flags)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), name
        mine, theirs = (torch.autograd.grad(term, list(model.parameters()), retain_graph=True)
                        for term in (losses[name], value))
        for a, b in zip(mine, theirs):  # body, batch norm and head
            assert b.abs().max() > 0
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_each_term_comes_from_its_own_domain():
    torch.manual_seed(0)
    model, (source, target) = Tiny().train(), step_batches()
    base, (other_source, other_target) = step_losses(model, source, target, step_arguments()), step_batches(1)
    for (a, b), untouched in (((other_source, target), {"ce_t", "focal"}), ((source, other_target), {"ce_s"})):
        losses = step_losses(model, a, b, step_arguments())
        assert {name for name in losses if torch.equal(losses[name], base[name])} == untouched
    nothing = target[0], torch.full_like(target[1], 255)  # P9: nothing of the patch is kept
    losses = step_losses(model, source, nothing, step_arguments())
    assert losses["ce_t"] == losses["focal"] == 0 and losses["loss"] == losses["ce_s"]
    gradients = torch.autograd.grad(losses["loss"], list(model.parameters()), retain_graph=True)
    assert all(map(torch.equal, gradients, torch.autograd.grad(losses["ce_s"], list(model.parameters()))))


# ------------------------------------------------- the wires of main --------------------------------------------------

FEW = [*TINY, "--warmup-iterations", 2, "--rounds", 2, "--iterations", 4, "--patches", 2, "--portion", 2]
QUICK = [*TINY, "--warmup-iterations", 1, "--rounds", 2, "--iterations", 4, "--patches", 2, "--portion", 4,
         "--portion-step", 4, "--lr", 0.02, "--optimizer", "sgd", "--ramp", 2]


class Trace(list):
    """What main() calls, in order, as (name, details)."""

    def of(self, name):
        return [details for called, details in self if called == name]

    def names(self):
        return [name for name, _ in self if name != "training_batches"]


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def equal_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def play(tmp_path, monkeypatch):
    """play(*flags, out=NAME): the real main() with a tiny network and without the table at its end.

    Returns the run folder and a Trace of its calls.
    """
    trace = Trace()

    def traced(owner, name, details):
        """From now on every call of owner.name is told to the trace: details before, and its result."""
        real = getattr(owner, name)

        def wrapper(*given, **named):
            told = details(*given, **named)
            trace.append((name, told))
            told["result"] = real(*given, **named)
            return told["result"]
        monkeypatch.setattr(owner, name, wrapper)

    for name in ("train_source", "fcn8s_optimizer"):
        traced(scale_invariant, name, lambda *given: {})
    traced(scale_invariant, "make_optimizer", lambda model, args: {
        "trained": [name for name, p in model.named_parameters() if p.requires_grad]})
    traced(scale_invariant, "validation_views", lambda model, run, args: {"state": state(model)})
    traced(scale_invariant, "start_round", lambda model, args, folder, r: {"model": model, "state": state(model)})
    traced(scale_invariant, "step_losses", lambda network, source, target, args: {
        "network": network, "training": [m.training for m in network.modules()], "state": state(network),
        "source": source, "target": target})
    traced(common, "training_batches", lambda dataset, args, seed, start, stop, jitter=0.3, share=1: {
        "dataset": dataset, "seed": seed, "steps": (start, stop), "jitter": jitter, "share": share})
    settle = common.settle_batch_norm

    def settle_and_tell(model, views, args):
        settle(model, views, args)
        trace.append(("settle", {"model": model, "views": views, "state": state(model)}))

    def tell_compare(models, args, run, source_model, **meters):
        trace.append(("compare", {"source": state(source_model), "states": {k: state(m) for k, m in models.items()},
                                  "meters": meters}))

    def tell_validate(run, stage, step, steps, model, views):
        trace.append(("validate", {"stage": (stage, step, steps), "model": model, "views": views}))

    def build_model(args, network):
        trace.append(("build_model", {"network": network}))
        torch.manual_seed(args.seed)
        return Tiny(len(common.task_classes(args.source)))

    monkeypatch.setattr(common, "settle_batch_norm", settle_and_tell)
    monkeypatch.setattr(common, "compare_with_source_only", tell_compare)
    monkeypatch.setattr(common.Run, "validate", tell_validate)
    monkeypatch.setattr(common, "build_model", build_model)

    def play(*flags, out="run"):
        trace.clear()
        arguments = ["scale_invariant.py", *QUICK, *flags, "--out", tmp_path / out]
        monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
        scale_invariant.main()
        return tmp_path / out, trace

    play.trace = trace
    return play


def lines(folder, stage=None):
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in found if stage is None or line["stage"] == stage]


def round_state(folder, r):
    return json.loads((folder / f"pseudo_labels/round{r}/round.json").read_text())


def stored_label(folder, r, name, n):
    return torch.from_numpy(common.read_label(folder / f"pseudo_labels/round{r}/{name}_{n}.png")).long()


def normal(images):
    """uint8 (..., 3, H, W) as the network sees them."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images / 255 - mean) / std


def prediction(look):
    """The function from a batch of normalised images to probabilities, of a network whose state the trace holds."""
    model = Tiny()
    model.load_state_dict(look["state"])
    model.eval()
    return lambda images: F.interpolate(model(images)[1], (32, 64), mode="bilinear").softmax(1).detach()


def toy_target(split, labelled=None):
    dataset = common.ToyStreets("target", split, (32, 64), images=12, labelled=labelled)
    return [dataset[i] for i in range(len(dataset))]


@pytest.mark.parametrize("policy", ["live", "target", "frozen"])
def test_stages_and_batch_norm(play, policy):
    """What comes when, with which network in which mode; statistics come before labels, optimizer and score."""
    folder, trace = play("--batch-norm", policy)
    steps = ["step_losses", "validate"]
    assert trace.names() == ["build_model", "train_source", "make_optimizer", "settle", "validation_views",
                             "make_optimizer", "start_round", *steps * 2, "settle", "start_round", *steps * 2, "settle",
                             "validation_views", "compare"]
    assert trace.of("build_model")[0]["network"] is common.DeepLabV2
    assert [call["stage"] for call in trace.of("validate")] == [("adapt", step, 4) for step in (1, 2, 3, 4)]
    model, views = trace.of("start_round")[0]["model"], trace.of("settle")[0]["views"]
    assert isinstance(views, Views) and views.folder is None and len(views) == 12 * 2
    assert sorted({example[0] for example in views.examples}) == list(range(12))  # all target images
    for call in trace.of("settle") + trace.of("validate"):
        assert call["views"] is views and call["model"] is model
    norm = [isinstance(module, nn.BatchNorm2d) for module in model.modules()].index(True)
    for call in trace.of("step_losses"):
        assert call["network"] is model and call["training"].pop(norm) == (policy == "live") and all(call["training"])
    # What labels and what is scored is the settled network.
    settled, labels, looks = (trace.of(name) for name in ("settle", "start_round", "validation_views"))
    for look, statistics in zip([looks[0], *labels, looks[1]], [settled[0], *settled]):
        assert equal_states(look["state"], statistics["state"])
    compared = trace.of("compare")[0]
    assert list(compared["states"]) == ["LSE"] and equal_states(compared["states"]["LSE"], settled[2]["state"])
    assert equal_states(load(folder / "last.pt")["model"], settled[2]["state"])
    # The source-only model of the table has its own statistics.
    source = compared["source"]
    assert equal_states(source, load(folder / "source_only.pt")["model"])
    mean = "backbone.1.running_mean"
    assert torch.equal(source[mean], settled[0]["state"][mean]) == (policy == "frozen")
    assert torch.equal(settled[0]["state"][mean], settled[2]["state"][mean]) == (policy != "live")
    assert ("backbone.1.weight" in trace.of("make_optimizer")[1]["trained"]) == (policy == "live")
    assert not torch.equal(source["classifier.0.weight"], settled[2]["state"]["classifier.0.weight"])


def test_the_distributed_network_is_trained_and_the_bare_one_does_the_rest(play, monkeypatch):
    class Distributed(nn.Module):
        def __init__(self, module, args):
            super().__init__()
            self.module = module

        def forward(self, images):
            return self.module(images)

    monkeypatch.setattr(common, "distribute", Distributed)
    _, trace = play()
    bare = trace.of("settle")[0]["model"]
    networks = [call["network"] for call in trace.of("step_losses")]
    assert all(isinstance(network, Distributed) and network.module is bare for network in networks)
    assert all(call["model"] is bare for call in trace.of("settle") + trace.of("start_round") + trace.of("validate"))


@pytest.mark.parametrize("view", ["enlarged", "whole", "both"])
def test_what_the_network_is_trained_on(play, view):
    """Each batch holds examples of its own round with the labels on disk, beside labelled source images."""
    folder, trace = play("--view", view, "--no-augment")
    images, used = toy_target("train"), set()
    sources = [common.ToyStreets("source", "train", (32, 64), images=12)[i]["label"] for i in range(12)]
    for number, call in enumerate(trace.of("step_losses")):
        r = 1 + number // 2
        (_, y_s), (x_t, y_t) = call["source"], call["target"]
        assert all(any(torch.equal(y, t) or torch.equal(y, t.flip(1)) for t in sources) for y in y_s)
        assert x_t.shape == (2, 3, 32, 64) and y_t.shape == (2, 32, 64)
        for x, label in zip(x_t, y_t):
            matches = []
            for index, n, *window in round_state(folder, r)["examples"]:
                there = normal(window_of(images[index]["image"], window).round())
                stored = stored_label(folder, r, images[index]["name"], n)
                if (x - there).abs().max() < 1e-5 and torch.equal(stored, label):
                    matches.append((r, index, n, window[2]))
            assert matches
            used.update(matches)
    assert len({(r, i, n) for r, i, n, _ in used}) > 4  # not the same example again and again
    per_image = {"enlarged": [16, 16], "whole": [32, 32], "both": [16, 16, 32]}[view]
    for r in (1, 2):
        told = lines(folder, f"round {r}")[0]
        assert [example[4] for example in round_state(folder, r)["examples"]] == per_image * told["images"]
        assert told["examples"] == len(per_image) * told["images"]
    views = trace.of("settle")[0]["views"]  # batch norm sees the same view
    assert [example[4] for example in views.examples] == per_image * 12 and not views.augment
    corners = [tuple(example[2:4]) for example in views.examples if example[4] == 16]
    assert view == "whole" or len(set(corners)) > 12


@pytest.mark.parametrize("flags, jitter", [([], 0.3), (["--no-augment"], 0)])
def test_what_the_loaders_are_asked_for(play, flags, jitter):
    """Sizes, seeds, colours; source and target loaders share the workers."""
    _, trace = play(*flags)
    asked = [call for call in trace.of("training_batches") if call["share"] > 1]
    assert [call["steps"] for call in asked] == [(0, 2), (0, 2), (2, 4), (0, 2)]  # the target's count in each round
    assert [type(call["dataset"]).__name__ for call in asked] == ["ToyStreets", "Views"] * 2
    assert [call["share"] for call in asked] == [2] * 4 and len({call["seed"] for call in asked}) == 3
    assert [call["jitter"] for call in asked] == [0.3, jitter] * 2
    assert [bool(call["dataset"].augment) for call in asked] == [True, not flags] * 2


def test_windows_are_drawn_anew_in_every_round_and_for_every_seed(play):
    places = {}
    for seed in (0, 1):
        folder, _ = play("--seed", seed, "--portion", 18, "--portion-step", 0.1, "--iterations", 2, out=f"seed{seed}")
        for r in (1, 2):
            places[seed, r] = {(index, n): (y, x) for index, n, y, x, *_ in round_state(folder, r)["examples"]}
            assert len(set(places[seed, r].values())) > len(places[seed, r]) // 2 > 5  # of 17 x 33 places
    for a in places:
        for b in places:
            shared = places[a].keys() & places[b].keys()
            assert len(shared) > 10 and (a == b or sum(places[a][key] == places[b][key] for key in shared) < 4)


@pytest.mark.parametrize("optimizer, power", [("sgd", 0.9), ("adamw", 0.0)])
def test_training_is_the_descent_of_the_sum(play, optimizer, power):  # P11
    """The steps again, from the batches that main() drew: rate, ramp, terms, gradients and both rates."""
    folder, trace = play("--batch-norm", "frozen", "--head-lr", 3, "--beta", 0.5, "--gamma", 2, "--power", power,
                         "--optimizer", optimizer)
    model = Tiny()
    model.load_state_dict(load(folder / "source_only.pt")["model"])
    common.freeze_batch_norm(model)
    groups = [{"params": [p for p in model.backbone.parameters() if p.requires_grad]},
              {"params": list(model.classifier.parameters())}]
    descent = {"sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=5e-4),
               "adamw": lambda: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.01)}[optimizer]()
    steps, log = trace.of("step_losses"), lines(folder, "adapt")
    assert len(steps) == len(log) == 4
    for number, (call, line) in enumerate(zip(steps, log)):
        for key, value in model.state_dict().items():
            torch.testing.assert_close(call["state"][key], value, atol=1e-6, rtol=1e-4)
        lr = 0.02 * min(1, (number + 1) / 2) * (1 - number / 4) ** power
        assert line["lr"] == pytest.approx(lr) and line["step"] == f"{number + 1}/4"
        descent.param_groups[0]["lr"], descent.param_groups[1]["lr"] = lr, 3 * lr
        (x_s, y_s), (x_t, y_t) = call["source"], call["target"]
        terms = independent_losses(model(x_s)[1], y_s, model(x_t)[1], y_t, beta=0.5, gamma=2)
        for name, value in terms.items():
            assert line[name] == pytest.approx(value.item(), rel=1e-4)
        descent.zero_grad()
        terms["loss"].backward()
        descent.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(load(folder / "last.pt")["model"][key], value, atol=1e-5, rtol=1e-4)
    moved = (model.backbone[0].weight - load(folder / "source_only.pt")["model"]["backbone.0.weight"]).abs().max()
    assert moved > 1e-3  # far more than the tolerance


def test_epochs(play):
    """Without --iterations a round lasts --epochs over its examples, the rate decaying anew in each."""
    folder, trace = play("--iterations", 0, "--epochs", 2, "--ramp", 0, "--no-augment")
    ends, names = [0], []
    for r in (1, 2):
        ends.append(ends[-1] + len(round_state(folder, r)["examples"]))  # twice, and a batch holds two
        names += [f"{step}/{ends[-1]}" for step in range(ends[-2] + 1, ends[-1] + 1)]
    log = lines(folder, "adapt")
    assert [line["step"] for line in log] == names and 2 < ends[1] < ends[2] - ends[1]  # the second round is longer
    assert log[0]["lr"] == log[ends[1]]["lr"] == 0.02 > log[1]["lr"] > log[ends[1] - 1]["lr"]
    seen = [tuple(x.flatten().tolist()) for call in trace.of("step_losses")[:ends[1]] for x in call["target"][0]]
    assert sorted(seen) == sorted(2 * [*set(seen)])  # each example twice


@pytest.mark.parametrize("flags", [[], ["--view", "both", "--mask-mode", "dilate"]])
def test_written_labels_are_those_of_the_equations(play, flags):
    """Ranking, thresholds, labels and what the log says of them again in both rounds, with loops over classes."""
    folder, trace = play(*flags, "--portion", 5, "--portion-step", 2.5)
    images = toy_target("train", labelled=True)
    for r, portion in ((1, 5.0), (2, 7.5)):  # LSE-13
        told, drawn = lines(folder, f"round {r}")[0], round_state(folder, r)
        predict = prediction(trace.of("start_round")[r - 1])
        batch = normal(torch.stack([item["image"] for item in images])).contiguous(memory_format=torch.channels_last)
        probs = [*predict(batch[:8]), *predict(batch[8:])]  # batches of eight, as in the script: they round alike
        labels, normalised = [prob.argmax(0) for prob in probs], [torch.zeros(32, 64) for _ in probs]
        for prob, label, value in zip(probs, labels, normalised):
            entropy = -(prob * (prob + 1e-12).log()).sum(0)
            for c in label.unique().tolist():
                mine = entropy[label == c]
                value[label == c] = (mine - mine.min()) / (mine.max() - mine.min()).clamp(min=1e-12)
        kept, references, thresholds = set(), [], []
        for c in range(16):
            shown = [i for i in range(12) if (labels[i] == c).any()]
            ranking = sorted(shown, key=lambda i: (probs[i].amax(0)[labels[i] == c].double().mean().item(), i))[::-1]
            k = int(len(ranking) * portion / 19)
            kept.update(ranking[:k])
            references.append(ranking[k] if ranking else -1)
            spread = [normalised[i][labels[i] == c].double().mean().item() for i in ranking[k:]]
            thresholds.append(next((t for t in spread if t > 0), 0))
        assert sorted(kept) == sorted({example[0] for example in drawn["examples"]})
        assert 0 < told["images"] == len(kept) < 10 + 3 * r and drawn["portion"] == told["portion"] == portion
        assert drawn["references"] == references and drawn["thresholds"] == pytest.approx(thresholds, abs=1e-5)
        shares, right, views = [], [], []
        for index, n, *window in drawn["examples"]:
            label = window_of(probs[index], window).argmax(0)
            keep = (normalised[index] < torch.tensor(thresholds)[labels[index]])[None].float()
            if flags:
                keep = window_of(keep, window)[0] > 0
            else:
                keep = F.interpolate(cut(keep, *window)[None], (32, 64), mode="nearest")[0, 0] > 0
            stored = stored_label(folder, r, images[index]["name"], n)
            assert (stored == torch.where(keep, label, 255)).double().mean() > 0.99  # other batches round differently
            truth = F.interpolate(cut(images[index]["label"], *window)[None, None].float(), (32, 64), mode="nearest")
            shares.append((stored != 255).double().mean().item())
            right.append(((stored == truth[0, 0]) & (stored != 255)).double().mean().item())
            if n == 0 and not flags:  # the premise, on the first window of each image
                view = window_of(normal(images[index]["image"]), window)
                views.append(view_agreement(predict(view[None])[0], window_of(probs[index], window)).tolist())
        files = list((folder / f"pseudo_labels/round{r}").glob("*.png"))
        assert len(files) == len(drawn["examples"]) == len({(index, n) for index, n, *_ in drawn["examples"]})
        assert told["kept"] == pytest.approx(sum(shares) / len(shares)) and 0 < told["kept"] < 1
        assert told["accuracy"] == pytest.approx(sum(right) / sum(shares))
        premise = [told[key] for key in ("entropy_gap", "cross_entropy", "agreement")]
        if views:
            assert premise == pytest.approx([sum(column) / len(views) for column in zip(*views)], abs=1e-3)
        assert "enlarged_miou" not in told and all(map(math.isfinite, premise))  # a round looks at no label for it


def test_meters_of_the_enlarged_views(play):
    """The 2 x 2 windows of all validation pictures, enlarged, against truth enlarged; before and after."""
    _, trace = play("--batch-norm", "target", "--portion", 5, "--view", "whole")
    meters, keys = trace.of("compare")[0]["meters"], ("entropy_gap", "cross_entropy", "agreement")
    assert set(meters) == {f"{name}_{when}" for name in (*keys, "enlarged_miou") for when in ("before", "after")}
    images = toy_target("val")
    for when, look in zip(("before", "after"), trace.of("validation_views")):
        predict, metric, terms = prediction(look), common.MeanIoU(16), []
        for item in images:
            image = normal(item["image"])
            prob = predict(image[None])[0]
            for y, x in ((0, 0), (0, 32), (16, 0), (16, 32)):
                seen = predict(window_of(image, (y, x, 16, 32))[None])[0]
                truth = item["label"][y:y + 16, x:x + 32].repeat_interleave(2, 0).repeat_interleave(2, 1)
                metric.update(seen.argmax(0), truth)
                terms.append(view_agreement(seen, window_of(prob, (y, x, 16, 32))).tolist())
        means = [sum(column) / len(terms) for column in zip(*terms)]
        assert [meters[f"{key}_{when}"] for key in keys] == pytest.approx(means, abs=1e-3)
        assert meters[f"enlarged_miou_{when}"] == pytest.approx(100 * metric.mean(metric.present()), abs=0.05)
    assert meters["enlarged_miou_before"] != meters["enlarged_miou_after"]


def test_fcn8s_is_trained_here_and_adapted_by_its_adam(play):
    folder, trace = play("--network", "fcn8s", "--head-lr", 5)
    assert trace.of("build_model")[0]["network"] is FCN8s
    assert json.loads((folder / "args.json").read_text())["backbone"] == "vgg16"
    assert trace.names().index("train_source") < trace.names().index("fcn8s_optimizer")
    assert len(trace.of("make_optimizer")) == len(trace.of("fcn8s_optimizer")) == 1  # the former for the warm-up
    groups, last = trace.of("fcn8s_optimizer")[0]["result"].param_groups, lines(folder, "adapt")[-1]["lr"]
    assert {(p.ndim, group["lr"]) for group in groups for p in group["params"]} == {(4, last), (1, 2 * last)}
    with pytest.raises(common.InputError, match="--init.*--network fcn8s"):
        play("--network", "fcn8s", "--init", "source_only.pt", out="other")


def test_init_is_the_same_as_training_the_source_model_here(play, tmp_path, monkeypatch):
    here, _ = play(out="here")
    monkeypatch.setattr(common, "unpack_model", functools.partial(common.unpack_model, network=Tiny))
    saved = load(here / "source_only.pt")
    torch.save({**saved, "method": "source_only", "iterations": saved["step"]}, tmp_path / "given.pt")
    given, trace = play("--init", tmp_path / "given.pt", out="there")
    assert "train_source" not in trace.names()
    assert all(same_weights(here / name, given / name) for name in ("source_only.pt", "last.pt"))


@pytest.mark.parametrize("policy, flags", [
    ("live", ["--iterations", 4]), ("target", ["--iterations", 0, "--epochs", 1, "--portion", 2, "--view", "both"])])
def test_stopped_anywhere_and_resumed_the_run_ends_the_same(play, monkeypatch, policy, flags):
    """Every session dies after some more written labels and steps than the one before, until one reaches the end."""
    arguments = [*flags, "--batch-norm", policy, "--optimizer", "adamw", "--save-every", 1]
    whole, trace = play(*arguments, out="whole")
    meters, left = trace.of("compare")[0]["meters"], 0

    class Cut(Exception):
        pass

    def limited(real):
        def wrapper(*given):
            nonlocal left
            left -= 1
            if left < 0:
                raise Cut
            return real(*given)
        return wrapper

    monkeypatch.setattr(scale_invariant, "step_losses", limited(scale_invariant.step_losses))
    monkeypatch.setattr(common, "write_label", limited(common.write_label))
    for session in range(60):
        left = 7 + 9 * session
        try:
            play(*arguments, *["--resume"] * (session > 0), out="cut")
            break
        except Cut:
            pass
    assert session > 1
    for name in ("source_only.pt", "last.pt"):
        assert same_weights(whole / name, whole.parent / "cut" / name)
    assert trace.of("compare")[0]["meters"] == meters


def test_a_portion_that_selects_nothing_is_refused_before_any_training(play, monkeypatch):
    with pytest.raises(common.InputError, match="12 target images.*give --portion 1.584 or more"):  # 19 / 12
        play("--portion", 1.583)
    assert not play.trace  # neither warm-up nor --init
    folder, trace = play("--portion", 1.584, "--portion-step", 0)  # the advice, in the same folder
    assert [told["portion"] for told in (lines(folder, f"round {r}")[0] for r in (1, 2))] == [1.584, 1.584]
    # Where the classes that are predicted are known, and no class is predicted often enough.
    confidence = torch.full((12, 16), math.nan, dtype=torch.float64)
    confidence[:5, 3] = confidence[4:9, 2] = 0.5
    monkeypatch.setattr(scale_invariant, "rank_target", lambda *_: (confidence, confidence))
    with pytest.raises(common.InputError, match="round 1: no class .* more than 5 images.*--portion 3.8 or more"):
        play("--portion", 3.7, out="rare")
    monkeypatch.setattr(scale_invariant, "rank_target", lambda *_: (confidence, 0 * confidence))
    with pytest.raises(common.InputError, match="round 1: .* leaves no labelled pixel"):
        play("--portion", 3.8, out="empty")


@pytest.mark.parametrize("flags", [
    ["--size", "24x64", "--crop", "16x16"], ["--lr", "nan"], ["--gamma", -1], ["--beta", "inf"], ["--portion", 0],
    ["--portion-step", -0.1], ["--patches", 0], ["--epochs", 0], ["--rounds", 0], ["--iterations", -1],
    ["--view", "window"], ["--network", "vgg16"], ["--mask-mode", "none"]])
def test_nonsense_is_refused(play, capsys, flags):
    with pytest.raises(SystemExit):
        play(*flags)
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("scorable", [True, False])
def test_a_real_format_from_start_to_end(play, tmp_path, monkeypatch, scorable):
    """No target training label is opened, and no label at all where the target has none."""
    write_gta5(tmp_path)
    write_cityscapes(tmp_path)
    for path in (tmp_path / "cityscapes/gtFine/train").rglob("*.png"):
        path.write_bytes(b"closed")
    if not scorable:
        for folder in ("gtFine", "leftImg8bit/val"):
            shutil.rmtree(tmp_path / "cityscapes" / folder)
    augment, sizes = common.training_augment, []
    monkeypatch.setattr(common, "training_augment", lambda args, *size: sizes.append(size) or augment(args, *size))
    folder, trace = play("--source", "gta5", "--data-root", tmp_path, "--source-size", "48x96", "--iterations", 2,
                         "--backbone-weights", "none", "--workers", 0, "--batch-norm", "live")
    assert ((48, 96),) in sizes  # source images are scaled and cropped from their own size
    told = lines(folder, "round 1")[0]
    assert "accuracy" not in told and 0 < told["kept"] < 1 and told["cross_entropy"] > 0
    assert len(trace.of("compare")[0]["meters"]) == (8 if scorable else 0)


# ----------------------------------------------------- the script -----------------------------------------------------


def test_one_command_runs_all_stages(tmp_path):
    out = run(tmp_path, "scale_invariant.py", *FEW)
    folder = tmp_path / "runs/scale_invariant-toy-s0"
    assert list(result(folder)["columns"]) == ["source only", "+ BN target", "LSE"]
    assert "motorcycle" in out and "enlarged_miou_after" in out and (folder / "panel.png").exists()
    rounds = [line for line in lines(folder) if "round" in line["stage"]]
    assert [r["portion"] for r in rounds] == [2.0, 2.5]  # LSE-13
    assert [line["step"] for line in lines(folder, "adapt")] == ["1/4", "2/4", "3/4", "4/4"]


def test_two_processes_share_one_run(tmp_path, start):
    """Ranking, thresholds, labels and meters are those of all images, the batch is split."""
    arguments = [*FEW, *SPLITTABLE, "--init", start, "--rounds", 1, "--lr", 0.02, "--ramp", 0]
    run(tmp_path, "scale_invariant.py", *arguments, "--out", "one")
    run_as_two(tmp_path, "scale_invariant.py", *arguments, "--out", "two")
    assert trained_alike(start, tmp_path / "one/last.pt", tmp_path / "two/last.pt")
    one, two = tmp_path / "one", tmp_path / "two"
    for key, tolerance in (("images", 0), ("kept", 0.02), ("accuracy", 0.02), ("entropy_gap", 1e-3),
                           ("cross_entropy", 1e-3), ("agreement", 1e-2)):
        assert lines(one, "round 1")[0][key] == pytest.approx(lines(two, "round 1")[0][key], abs=tolerance), key
    for key in ("references", "examples"):
        assert round_state(one, 1)[key] == round_state(two, 1)[key]
    assert round_state(one, 1)["thresholds"] == pytest.approx(round_state(two, 1)["thresholds"], abs=1e-3)
    assert len(list((two / "pseudo_labels/round1").glob("*.png"))) == len(round_state(two, 1)["examples"])
    for name, value in result(one)["meters"].items():
        if name.endswith("before"):  # of the same network
            assert value == pytest.approx(result(two)["meters"][name], abs=0.02), name
