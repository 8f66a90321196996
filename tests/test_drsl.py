"""drsl.py: every equation against an independent computation, every wire of a training step and of main()."""

import argparse
import copy
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scripts import (SPLITTABLE, TINY, exact, kill_when, load, logged, result, run, run_as_two, same_weights,
                     trained_alike)
from torch import nn
from trees import write_cityscapes, write_synthia

import common
import drsl
from drsl import (ModeHead, assign_modes, balanced_assignment, balanced_labels, class_thresholds, effective_modes,
                  kmeans_modes, margin_loss, mode_cross_entropy, nearest_modes, own_class, own_mode_cross_entropy,
                  pseudo_labels, stochastic_mode_alignment)

C, K, E = 19, 3, 256


def unit(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


def distances(e, R):
    """|e - R|^2 by the definition: e (n, E), R (C, K, E) -> (n, C, K)."""
    return (e[:, None, None] - R[None]).square().sum(-1)


def orthogonal_modes(classes=C, modes=K, dim=E):
    return torch.eye(dim, dtype=torch.float64)[: classes * modes].view(classes, modes, dim)


def labels(n, seed=1, classes=C):
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))


def settings(*flags, **changed):
    """What parse_args() gives with these flags, but for `changed`."""
    before, sys.argv = sys.argv, ["drsl.py", "--device", "cpu", *map(str, flags)]
    try:
        args = drsl.parse_args()
    finally:
        sys.argv = before
    assert changed.keys() <= vars(args).keys()
    return argparse.Namespace(**{**vars(args), **changed})


# ----------------------------------------------- the mode head and its losses ----------------------------------------


def test_head_gives_unit_embeddings_and_the_distances_of_the_definition():
    head = ModeHead(32, 5, modes=2, embedding=16)
    e, d2 = head(torch.randn(2, 32, 3, 4), distances=True)
    assert e.shape == (2, 16, 3, 4) and d2.shape == (24, 5, 2)
    torch.testing.assert_close(e.norm(dim=1), torch.ones(2, 3, 4))
    pixels = common.as_pixels(e)
    with torch.no_grad():
        head.representatives.mul_(7)  # normalised on use: their length must not matter
    R = F.normalize(head.representatives, dim=2)
    torch.testing.assert_close(d2.double(), distances(pixels.double(), R.double()), atol=1e-5, rtol=0)
    torch.testing.assert_close(head.squared_distances(pixels), d2)
    assert (head.squared_distances(R.flatten(0, 1)) >= 0).all()  # 2 - 2 cos is clamped


def test_mode_losses_against_loops():
    """DRSL-3 to -6 and -18 by the letter, with pixels to ignore and with given modes."""
    d2, y, m = distances(unit(40, E), unit(C, K, E, seed=2)), labels(40), labels(40, seed=3, classes=K)
    y[::7] = 255
    margin, given, posterior, own = [], [], [], []
    for i in range(40):
        if y[i] != 255:
            d = d2[i].tolist()
            other = min(d[c][k] for c in range(C) for k in range(K) if c != y[i])
            margin.append(max(0.0, min(d[y[i]]) - other + 0.5))
            given.append(max(0.0, d[y[i]][m[i]] - other + 0.5))
            p = [[math.exp(-d[c][k] / (2 * 0.3**2)) for k in range(K)] for c in range(C)]
            posterior.append(-math.log(sum(p[y[i]]) / sum(map(sum, p))))
            own.append(-math.log(p[y[i]][m[i]] / sum(p[y[i]])))
    mean = lambda terms: pytest.approx(sum(terms) / len(terms), abs=1e-12)
    assert margin_loss(d2, y, 0.5).item() == mean(margin) and margin_loss(d2, y, 0.5, m).item() == mean(given)
    assert mode_cross_entropy(d2, y, 0.3).item() == mean(posterior)
    assert own_mode_cross_entropy(d2, y, m, 0.3).item() == mean(own)
    assert own_mode_cross_entropy(d2[:, :, :1], y, 0 * m, 0.3).item() == 0  # K = 1: nothing to choose


@pytest.mark.parametrize("y, alpha, expected", [(4, 0.5, 0.0), (4, 2.0, 0.0), (4, 3.0, 1.0), (3, 0.5, 2.5)])
def test_margin_on_an_own_mode_and_on_an_impostor(y, alpha, expected):
    R = orthogonal_modes()
    assert margin_loss(distances(R[4, 1][None], R), torch.tensor([y]), alpha).item() == pytest.approx(expected)


def test_margin_gradient_reaches_two_modes_and_does_not_depend_on_e():
    e, R = unit(1, E).requires_grad_(), unit(C, K, E, seed=2).requires_grad_()
    d2, y = distances(e, R), torch.tensor([6])
    margin_loss(d2, y, 3.0).backward()  # alpha 3: surely active
    own = d2[0, 6].argmin().item()
    masked = d2[0].detach().clone()
    masked[6] = math.inf
    c, k = divmod(masked.argmin().item(), K)
    torch.testing.assert_close(e.grad[0], 2 * (R[c, k] - R[6, own]).detach())
    assert [(i, j) for i, j in (R.grad.abs().sum(2) > 0).nonzero().tolist()] == sorted([(6, own), (c, k)])


@pytest.mark.parametrize("sigma, expected", [(0.5, 0.66993), (0.3, 8.1e-4)])
def test_how_low_the_mode_cross_entropy_can_go(sigma, expected):
    """On an own mode, with orthogonal modes: the reason for sigma 0.3."""
    R = orthogonal_modes()
    loss = mode_cross_entropy(distances(R[2, 0][None], R), torch.tensor([2]), sigma).item()
    assert loss == pytest.approx(expected, rel=5e-3)


def test_own_mode_cross_entropy_moves_only_the_own_class():
    d2 = distances(unit(1, E), unit(C, K, E, seed=2)).requires_grad_()
    own_mode_cross_entropy(d2, torch.tensor([5]), torch.tensor([1]), 0.3).backward()
    assert d2.grad[0, 5, 1] > 0 and (d2.grad[0, 5, [0, 2]] < 0).all()
    assert (d2.grad != 0).sum() == K


@pytest.mark.parametrize("n, classes, y", [(0, C, []), (3, C, [255, 255, 255]), (3, 1, [0, 0, 0])])
def test_mode_losses_over_nothing_are_a_connected_zero(n, classes, y):
    """No pixel, no valid pixel; no other class."""
    y = torch.tensor(y, dtype=torch.long)
    for loss in (lambda d2: margin_loss(d2, y, 0.5), lambda d2: mode_cross_entropy(d2, y, 0.3),
                 lambda d2: own_mode_cross_entropy(d2[:, :, :1], y, 0 * y, 0.3)):
        d2 = torch.rand(n, classes, K, requires_grad=True)
        value = loss(d2)
        value.backward()
        assert value.item() == 0 and torch.isfinite(d2.grad).all()


# -------------------------------------------------- mode assignment ---------------------------------------------------


def test_assignment_is_the_argmin_inside_the_own_class_or_over_all():
    d2, y = torch.rand(50, C, K), labels(50)
    y[3] = 255
    m, (c, k) = assign_modes(d2, y), nearest_modes(d2)
    assert all(m[i] == d2[i, y[i]].argmin() for i in range(50) if y[i] != 255)
    assert all(d2[i, c[i], k[i]] == d2[i].min() for i in range(50))


def sinkhorn(d2, epsilon, iterations):
    """The textbook: for one class, rows and columns of exp(-d2 / epsilon) scaled in turn, rows first and last."""
    q = [[math.exp(-v / epsilon) for v in row] for row in d2.tolist()]
    q = [[v / sum(row) for v in row] for row in q]
    for _ in range(iterations):
        column = [sum(row[k] for row in q) for k in range(len(q[0]))]
        q = [[v / column[k] * len(q) / len(column) for k, v in enumerate(row)] for row in q]
        q = [[v / sum(row) for v in row] for row in q]
    return torch.tensor(q, dtype=torch.float64)


def test_balanced_assignment_is_sinkhorn_inside_every_class():
    own, y = distances(unit(60, 8), unit(1, K, 8, seed=2))[:, 0], labels(60, classes=4)
    y[::6], y[y == 2] = 255, 1  # nobody in class 2
    for epsilon, iterations in ((0.05, 3), (0.5, 1), (0.2, 7)):
        q = balanced_assignment(own, y, 5, epsilon, iterations)
        assert q.shape == (60, K) and torch.isfinite(q).all()
        for c in (0, 1, 3):
            torch.testing.assert_close(q[y == c], sinkhorn(own[y == c], epsilon, iterations))
    torch.testing.assert_close(balanced_assignment(own, y, 5), balanced_assignment(own, y, 5, 0.05, 3))


def test_balanced_assignment_keeps_modes_alive():
    """Every pixel of a class is nearest to one mode, in every class to another one: DRSL-8 has one mode a class."""
    g = torch.Generator().manual_seed(0)
    y, own = labels(400, classes=4), torch.rand(400, K, dtype=torch.float64, generator=g)
    near = 0.1 * own
    near[torch.arange(400), y % K] -= 0.1
    q, nearest = balanced_assignment(near, y, 4), near.argmin(1)
    for c in range(4):
        counts = [torch.bincount(m[y == c], minlength=K)[None] for m in (q.argmax(1), nearest)]
        assert effective_modes(counts[0]) > 2.5 and effective_modes(counts[1]) < 1.5
    own[torch.arange(400), y % K] -= 1
    q = balanced_assignment(own, y, 4, iterations=100)  # modes far apart take more rounds
    for c in range(4):
        torch.testing.assert_close(q[y == c].mean(0), torch.full((K,), 1 / K, dtype=torch.float64), atol=1e-3, rtol=0)


def test_balanced_assignment_of_separate_modes_is_the_nearest():
    own = torch.tensor([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]]).repeat(5, 1)
    assert torch.equal(balanced_assignment(own, torch.zeros(15, dtype=torch.long), 1).argmax(1), own.argmin(1))
    assert balanced_assignment(torch.rand(7, 1), labels(7), C).eq(1).all()  # K = 1
    far = balanced_assignment(torch.tensor([[0.0, 4.0, 4.0]]).repeat(9, 1), torch.zeros(9, dtype=torch.long), 1)
    assert torch.isfinite(far).all()  # exp(-80) is still a float
    void = balanced_assignment(torch.rand(3, K), torch.full((3,), 255), C)
    assert torch.isfinite(void).all() and balanced_assignment(torch.rand(0, K), labels(0), C).shape == (0, K)
    assert not balanced_assignment(torch.rand(7, K, requires_grad=True), labels(7), C).requires_grad


def test_effective_modes():
    counts = torch.tensor([[5, 0, 0], [4, 4, 4], [2, 2, 0], [0, 0, 0], [55, 30, 15]])
    one, three, two, nan, skew = effective_modes(counts).tolist()
    assert (one, three, two) == pytest.approx((1, 3, 2)) and math.isnan(nan)
    assert skew == pytest.approx(math.exp(-sum(s * math.log(s) for s in (0.55, 0.3, 0.15))))


# --------------------------------------------- stochastic mode alignment ----------------------------------------------


def both(e_s, e_t, y_s=None, m_s=None, y_t=None, m_t=None, shape=(2, 3), **options):
    zeros = lambda e: torch.zeros(len(e), dtype=torch.long, device=e.device)
    return stochastic_mode_alignment(e_s, zeros(e_s) if y_s is None else y_s, zeros(e_s) if m_s is None else m_s,
                                     e_t, zeros(e_t) if y_t is None else y_t, zeros(e_t) if m_t is None else m_t,
                                     shape=shape, **options)


def test_alignment_without_a_shared_mode_is_exactly_zero():
    e_s, e_t = unit(5, 8).requires_grad_(), unit(5, 8, seed=1).requires_grad_()
    one = torch.ones(5, dtype=torch.long)
    for options in ({"m_t": one}, {"y_t": one}, {"y_t": 255 * one}, {"y_s": 255 * one, "y_t": 255 * one}):
        value = both(e_s, e_t, **options)
        e_s.grad = e_t.grad = None
        value.backward()
        assert value.item() == 0 and e_s.grad.abs().sum() == 0 and e_t.grad.abs().sum() == 0
    empty = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    both(empty, e_t).backward()
    assert both(empty, e_t).item() == 0 and both(e_s, empty).item() == 0


def test_alignment_is_a_mean_over_shared_modes_not_over_pixels():
    """Mode (0, 0) has 30 pixels at distance 2, mode (1, 2) one pixel at distance 4: the mean is 3."""
    eye = torch.eye(4, dtype=torch.float64)
    e_s = torch.cat([eye[:1].expand(30, 4), eye[1:2]])
    e_t = torch.cat([eye[2:3].expand(30, 4), -eye[1:2]])
    y, m = torch.tensor([0] * 30 + [1]), torch.tensor([0] * 30 + [2])
    assert both(e_s, e_t, y, m, y, m).item() == pytest.approx(3)


def test_alignment_draws_from_every_shared_mode_of_its_own_and_from_nothing_else():
    """Pixels of mode j hold the one-hot vector j: a pair across modes, or with a void pixel, is at distance 2."""
    classes, modes = 4, 2
    y_s, y_t, m_s, m_t = (labels(200, seed=s, classes=n) for s, n in ((0, 4), (1, 4), (2, 2), (3, 2)))
    y_s[::5], y_t[::6] = 255, 255
    y_s[y_s == 1] = 0  # nobody in class 1 on the source side
    code = lambda y, m: F.one_hot(torch.where(y == 255, 9, y * modes + m), 10).double().requires_grad_()
    e_s, e_t = code(y_s, m_s), code(y_t, m_t)
    for more in (0, 3):  # also with classes that nobody has
        assert both(e_s, e_t, y_s, m_s, y_t, m_t, shape=(classes + more, modes)).item() == 0
    shifted = 3 * e_t.detach() + 0 * e_s.sum()
    value = both(e_s, shifted, y_s, m_s, y_t, m_t, shape=(classes, modes), pairs=4000)
    assert value.item() == pytest.approx(4)  # |1 - 3|^2 in every pair
    value.backward()
    assert ((e_s.grad.abs().sum(1) > 0) == (y_s != 255)).all()  # every source pixel of a shared mode has been drawn


def test_alignment_against_its_own_draws():
    """The pixels that were drawn are read off the gradient: with e_t = 0, dL/de_s is 2 (times drawn) e_s / (M |A|)."""
    e_s, e_t = unit(9, 8).requires_grad_(), torch.zeros(7, 8, dtype=torch.float64, requires_grad=True)
    y_s, y_t = torch.tensor([0] * 5 + [1] * 4), torch.tensor([0] * 4 + [1] * 3)  # two shared modes: |A| = 2
    both(e_s, e_t, y_s=y_s, y_t=y_t, pairs=32, generator=torch.Generator().manual_seed(0)).backward()
    times = (e_s.grad * e_s.detach()).sum(1) * 32 * 2 / 2
    torch.testing.assert_close(times, times.round())
    assert times[:5].sum().item() == pytest.approx(32) and times[5:].sum().item() == pytest.approx(32)
    torch.testing.assert_close(e_s.grad.sum(0), -e_t.grad.sum(0))
    many = [both(e_s, e_t, y_s=y_s, y_t=y_t, pairs=1, generator=torch.Generator().manual_seed(s)) for s in range(200)]
    counts = sum(torch.autograd.grad(value, e_s)[0].norm(dim=1) > 0 for value in many)
    assert (counts > 20).all()  # uniform: of 200 draws each of 5 or 4 pixels gets 40 or 50


def test_alignment_never_reads_a_value():
    """On the device "meta" tensors have no values: what would make a processor wait for its GPU fails."""
    e = torch.zeros(10, 8, device="meta", requires_grad=True)
    y, d2 = torch.zeros(10, dtype=torch.int64, device="meta"), torch.zeros(10, C, K, device="meta")
    m_s, (y_t, m_t) = balanced_assignment(own_class(d2, y), y, C).argmax(1), nearest_modes(d2)
    both(e, e, y, m_s, y_t, m_t, shape=(C, K)).backward()
    assert e.grad.shape == (10, 8)


# --------------------------------------- pseudo-labels, k-means, pixel sampling ---------------------------------------


@pytest.mark.parametrize("portion, n, kept", [(0.2, 1000, 200), (0.5, 1000, 500), (0.29, 100, 29)])
def test_thresholds_keep_the_asked_portion_of_every_class(portion, n, kept):
    confidence = torch.rand(3 * n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = torch.arange(3 * n) % 3
    tau = class_thresholds(confidence, label, 4, portion)
    for c in range(3):
        assert tau[c] == sorted(confidence[label == c].tolist(), reverse=True)[kept - 1]  # DRSL-14 by the letter
    assert tau[3] == 1  # never predicted


def test_thresholds_of_tiny_sets():
    assert class_thresholds(torch.zeros(0), torch.zeros(0, dtype=torch.long), 3, 0.5).tolist() == [1, 1, 1]
    assert class_thresholds(torch.tensor([0.4]), torch.tensor([1]), 3, 0.5).tolist() == [1, 1, 1]  # floor(0.5) = 0
    assert class_thresholds(torch.tensor([0.5]), torch.tensor([1]), 3, 1.0).tolist() == [1, 0.5, 1]


def test_pseudo_labels_are_the_weighted_argmax():
    prob = torch.tensor([0.6, 0.4]).view(1, 2, 1, 1)
    assert pseudo_labels(prob, torch.tensor([0.9, 0.3])).item() == 1  # though 0.6 is more than 0.4
    assert pseudo_labels(prob, torch.tensor([0.9, 0.5])).item() == 255
    assert pseudo_labels(prob, torch.tensor([0.6, 1.0])).item() == 0  # exactly at the threshold: kept
    prob = torch.rand(2, 5, 6, 7).softmax(1)
    assert torch.equal(pseudo_labels(prob, torch.full((5,), 0.01)), prob.argmax(1))


def test_kmeans_finds_the_modes_of_each_class():
    centres = F.normalize(torch.randn(4, K, 32, generator=torch.Generator().manual_seed(0)), dim=2)
    y = torch.arange(4).repeat_interleave(K * 40)
    e = F.normalize(centres.flatten(0, 1).repeat_interleave(40, 0) + 0.03 * torch.randn(4 * K * 40, 32), dim=1)
    start = torch.randn(5, K, 32)
    R = kmeans_modes(e, y, start)
    for c in range(4):
        assert (R[c] @ centres[c].T).amax(0).min() > 0.99  # each true mode has a centre near it
    means = F.normalize(torch.stack([x.mean(0) for x in e.view(4 * K, 40, 32)]), dim=1)
    torch.testing.assert_close((R[:4].flatten(0, 1) @ means.T).amax(1), torch.ones(12))  # which is its pixels' mean
    torch.testing.assert_close(R[4], F.normalize(start[4], dim=1))  # a class that never occurs keeps its start
    same = unit(1, 8).float().expand(10, 8)  # fewer distinct pixels than modes
    torch.testing.assert_close(kmeans_modes(same, torch.zeros(10, dtype=torch.long), torch.randn(1, K, 8))[0], same[:K])


def test_balanced_labels():
    label = torch.tensor([0] * 30 + [1] * 5 + [255] * 5).view(1, 5, 8).repeat(3, 1, 1)
    label[2] = 255
    kept = balanced_labels(label, (5, 8), 7, torch.rand(3, 5, 8))
    assert kept.shape == (3, 5, 8) and ((kept == label) | (kept == 255)).all() and kept[2].eq(255).all()
    for image in kept[:2]:
        assert torch.bincount(image[image != 255]).tolist() == [7, 5]
    assert torch.equal(balanced_labels(label, (5, 8), 40, torch.rand(3, 5, 8)), label)
    label = torch.tensor([3, 3, 3, 7, 7, 255]).view(1, 1, 6)
    u = torch.tensor([0.5, 0.1, 0.9, 0.8, 0.2, 0.0]).view(1, 1, 6)  # of each class the smallest are kept
    assert balanced_labels(label, (1, 6), 1, u).flatten().tolist() == [255, 3, 255, 255, 7, 255]
    label = torch.arange(16 * 24).view(1, 16, 24) % 250
    assert torch.equal(balanced_labels(label, (2, 3), 9, torch.rand(1, 2, 3)), label[:, 4::8, 4::8])  # cells' centres


# ------------------------------------------------- a training step --------------------------------------------------


class Tiny(common.DeepLabV2):
    """A network of one convolution with stride 8, batch norm and a classifier, in the form of DeepLabV2."""

    def __init__(self, classes=16):
        nn.Module.__init__(self)
        convolution = nn.Conv2d(3, 32, 9, stride=8, padding=4)
        self.backbone, self.feature_dim = nn.Sequential(convolution, nn.BatchNorm2d(32), nn.ReLU()), 32
        self.classifier = nn.ModuleList([nn.Conv2d(32, classes, 1)])


def tiny_step(**changed):
    """A network, a head, a source and a target batch, and the arguments of a step on them."""
    g = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    args = settings(**{"pixels": 999, **changed})
    network, head = Tiny(5), ModeHead(32, 5, args.modes, 16)
    x_s, x_t = torch.randn(2, 2, 3, 32, 64, generator=g)
    y_s, y_t = torch.randint(0, 5, (2, 2, 4, 8), generator=g).repeat_interleave(8, 2).repeat_interleave(8, 3)
    y_s[0, :16, :16], y_t[1, :, 24:] = 255, 255
    return network, head, (x_s, y_s), (x_t, y_t), args


def losses_of(network, head, source, target, args):
    return drsl.step_losses(network, head, source, target, args, torch.Generator().manual_seed(11))


def one_domain(network, head, x, y):
    """logits, e (n, E), d2 (n, C, K) and labels (n,) of one domain by their definitions."""
    features, logits = network(x)
    e = head(features).permute(0, 2, 3, 1).flatten(0, 2)
    R = F.normalize(head.representatives, dim=2)
    return logits, e, distances(e, R), y[:, 4::8, 4::8].flatten()


def textbook_modes(d2, y, epsilon):
    m = torch.zeros_like(y)
    for c in range(5):
        m[y == c] = sinkhorn(d2[y == c, c].detach().double(), epsilon, 3).argmax(1)
    return m


def textbook_mode_loss(d2, y, m):  # DRSL-7
    return margin_loss(d2, y, 0.8, m) + mode_cross_entropy(d2, y, 0.4) + 0.6 * own_mode_cross_entropy(d2, y, m, 0.4)


def cross_entropy(logits, y):
    return F.cross_entropy(F.interpolate(logits, y.shape[1:], mode="bilinear"), y, ignore_index=255)


ODD = {"lambda_t": 0.7, "lambda_mm": 0.4, "lambda_sma": 2.0, "w_own": 0.6, "sigma": 0.4, "alpha": 0.8, "epsilon": 0.07,
       "pairs": 16}


@pytest.mark.parametrize("align_over", ["all", "pseudo"])
@pytest.mark.parametrize("balance", [True, False])
def test_every_term_of_a_step(balance, align_over):
    network, head, source, target, args = tiny_step(balance=balance, align_over=align_over, **ODD)
    terms = losses_of(network, head, source, target, args)
    assert list(terms) == ["loss", "ce_s", "ce_t", "mm_s", "mm_t", "sma"]
    l_s, e_s, d2_s, y_s = one_domain(network, head, *source)
    l_t, e_t, d2_t, y_t = one_domain(network, head, *target)
    d2, y = torch.cat([d2_s, d2_t]), torch.cat([y_s, y_t])
    m = textbook_modes(d2, y, 0.07) if balance else assign_modes(d2, y)
    assert not torch.equal(m, textbook_modes(d2, y, 0.07)) or balance
    m_s, m_t = m.split([64, 64])
    expected = {"ce_s": cross_entropy(l_s, source[1]), "ce_t": cross_entropy(l_t, target[1]),  # DRSL-1, DRSL-2
                "mm_s": textbook_mode_loss(d2_s, y_s, m_s), "mm_t": textbook_mode_loss(d2_t, y_t, m_t)}
    g = torch.Generator().manual_seed(11)
    torch.rand(4, 4, 8, generator=g)  # which pixels the mode losses see: here all
    if align_over == "all":
        y_t, m_t = nearest_modes(d2_t)
        assert (target[1][:, 4::8, 4::8].flatten() == 255).any() and (y_t != 255).all()
    expected["sma"] = stochastic_mode_alignment(e_s, y_s, m_s, e_t, y_t, m_t, 16, g, shape=(5, 3))  # DRSL-9A
    expected["loss"] = (expected["ce_s"] + 0.7 * expected["ce_t"] + 0.4 * (expected["mm_s"] + expected["mm_t"])
                        + 2.0 * expected["sma"])  # DRSL-10
    for name in terms:
        torch.testing.assert_close(terms[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert len({round(v.item(), 4) for v in terms.values()}) == 6


def test_terms_of_a_joint_step_and_of_plain_self_training():
    network, head, source, target, args = tiny_step(**ODD)
    (l_s, _, d2, y), (l_t, *_) = one_domain(network, head, *source), one_domain(network, head, *target)
    ce_s, ce_t = cross_entropy(l_s, source[1]), cross_entropy(l_t, target[1])
    mm_s = textbook_mode_loss(d2, y, textbook_modes(d2, y, 0.07))
    joint, plain = losses_of(network, head, source, None, args), losses_of(network, None, source, target, args)
    for terms, expected in ((joint, {"loss": ce_s + 0.4 * mm_s, "ce_s": ce_s, "mm_s": mm_s}),
                            (plain, {"loss": ce_s + 0.7 * ce_t, "ce_s": ce_s, "ce_t": ce_t})):
        assert list(terms) == list(expected)
        for name in terms:
            torch.testing.assert_close(terms[name], expected[name], rtol=1e-4, atol=1e-6)


ROUTES = {"ce_s": ("backbone classifier", "s"), "ce_t": ("backbone classifier", "t"),
          "mm_s": ("backbone project representatives", "s"), "mm_t": ("backbone project representatives", "t"),
          "sma": ("backbone project", "st"), "loss": ("backbone classifier project representatives", "st")}


@pytest.mark.parametrize("term", ROUTES)
def test_gradient_of_every_term_reaches_what_it_should(term):
    """The mode losses regularize the shared network; nothing of them reaches the classifier, and alignment no R."""
    network, head, (x_s, y_s), (x_t, y_t), args = tiny_step()
    network.eval()  # batch statistics would not mix domains either, but they would make zeros of 1e-9
    x_s.requires_grad_(), x_t.requires_grad_()
    losses_of(network, head, (x_s, y_s), (x_t, y_t), args)[term].backward()
    groups = {"backbone": network.backbone, "classifier": network.classifier, "project": head.project}
    reached = [name for name, module in groups.items()
               if sum(0 if p.grad is None else p.grad.abs().sum() for p in module.parameters())]
    if head.representatives.grad is not None and head.representatives.grad.abs().sum() > 0:
        reached.append("representatives")
    domains = "".join(name for name, x in (("s", x_s), ("t", x_t)) if x.grad is not None and x.grad.abs().sum() > 0)
    assert (" ".join(reached), domains) == ROUTES[term]
    if term == "loss":  # as DistributedDataParallel needs it
        assert all(p.grad is not None for p in [*network.parameters(), *head.parameters()])


MODES = {"mm_s", "mm_t", "sma", "loss"}


@pytest.mark.parametrize("flag, value, changed", [
    ("alpha", 0.9, {"mm_s", "mm_t", "loss"}), ("sigma", 0.5, {"mm_s", "mm_t", "loss"}),
    ("w_own", 0.2, {"mm_s", "mm_t", "loss"}), ("balance", False, MODES), ("epsilon", 1.0, MODES),
    ("pixels", 2, MODES), ("pairs", 8, {"sma", "loss"}), ("align_over", "pseudo", {"sma", "loss"}),
    ("lambda_t", 0.5, {"loss"}), ("lambda_mm", 0.5, {"loss"}), ("lambda_sma", 0.5, {"loss"})])
def test_every_flag_of_a_step_changes_what_it_says(flag, value, changed):
    before, after = losses_of(*tiny_step()), losses_of(*tiny_step(**{flag: value}))
    assert {name for name in before if before[name].item() != after[name].item()} == changed


def test_a_step_over_void_labels_is_finite_and_reaches_every_weight():
    network, head, (x_s, y_s), (x_t, y_t), args = tiny_step()
    terms = losses_of(network, head, (x_s, torch.full_like(y_s, 255)), (x_t, torch.full_like(y_t, 255)), args)
    assert all(value.item() == 0 for value in terms.values())  # no source pixel: no shared mode either
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in [*network.parameters(), *head.parameters()])


def test_mode_losses_are_fp32():
    network, head, source, target, args = tiny_step(precision="bf16")
    seen = []
    head.register_forward_hook(lambda module, given, out: seen.append([t.dtype for t in (*given, *out)]))
    terms = losses_of(network, head, source, target, args)
    assert seen == [[torch.float32] * 3] and all(value.dtype == torch.float32 for value in terms.values())
    exactly = losses_of(*tiny_step())
    assert terms["ce_s"].item() != exactly["ce_s"].item()  # the network itself did compute in bf16
    assert terms["ce_t"].item() != exactly["ce_t"].item()
    assert terms["mm_s"].item() == pytest.approx(exactly["mm_s"].item(), rel=0.05)


def test_the_head_learns_at_the_network_s_own_rate_and_its_modes_do_not_decay():
    network, head, *_, args = tiny_step(optimizer="sgd", head_lr=10.0)
    groups = drsl.make_optimizer_with_modes(network, head, args).param_groups
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == {*network.parameters(), *head.parameters()}
    of = lambda wanted: [(g["scale"], g["weight_decay"]) for g in groups if any(p is wanted for p in g["params"])]
    assert of(head.representatives) == [(1.0, 0.0)] and of(head.project[0].weight) == [(1.0, 5e-4)]
    assert of(network.backbone[0].weight) == [(1.0, 5e-4)] and of(network.classifier[0].weight) == [(10.0, 5e-4)]
    assert len(drsl.make_optimizer_with_modes(network, None, args).param_groups) == 2  # plain self-training


# ------------------------------------------------- the wires of main ------------------------------------------------

QUICK = [*TINY, "--warmup-iterations", 1, "--head-iterations", 2, "--joint-iterations", 2, "--rounds", 2,
         "--iterations", 6, "--ramp", 2]  # two joint steps, two of each round


class Stop(Exception):
    """Ends a run in its middle, as a crash would."""


@pytest.fixture
def play(tmp_path, monkeypatch):
    """play(*flags) runs main() on a tiny network and tells what it called, in order: (name, what it was given)."""
    trace, models = [], []

    def weights():
        return copy.deepcopy(models[-1].state_dict())

    def note(module, name, describe):
        called = getattr(module, name)

        def recorded(*given, **named):
            if (entry := describe(*given, **named)) is None:
                return called(*given, **named)
            trace.append((name, entry))
            if len(entries(trace, "embed") + entries(trace, "step_losses")) == play_on.stop_at:
                raise Stop
            entry["out"] = called(*given, **named)
            return entry["out"]

        monkeypatch.setattr(module, name, recorded)

    def build_model(args):
        torch.manual_seed(args.seed)
        models.append(Tiny(len(common.task_classes(args.source))))
        return models[-1]

    def describe_step(network, head, source, target, args, generator):
        bare = models[-1]
        return {"network": network, "head": head, "source": source, "target": target, "training": bare.training,
                "norm": bare.backbone[1].training, "weights": weights(),
                "modes": head and copy.deepcopy(head.state_dict()),
                "draw": torch.rand(3, generator=generator.clone_state()).tolist()}

    def describe_embed(head, features, label, args, generator):  # of the head's warm-up, not inside step_losses
        if sys._getframe(2).f_code.co_name == "train_modes":
            return {"training": models[-1].training, "draw": torch.rand(3, generator=generator.clone_state()).tolist()}

    def describe_batches(dataset, args, seed, start, stop, share=1):
        return {"domain": dataset.domain, "labels": dataset.label_dir and Path(dataset.label_dir).name, "seed": seed,
                "augmented": dataset.augment is not None, "labelled": dataset.labelled, "steps": (start, stop),
                "share": share}

    note(drsl, "step_losses", describe_step)
    note(drsl, "embed", describe_embed)
    note(drsl, "set_lr", lambda optimizer, lr: {"lr": lr})
    note(drsl, "place_modes", lambda model, head, *_: {"weights": weights()})
    note(drsl, "log_modes", lambda *given: {"weights": weights()})
    note(drsl, "label_target", lambda model, args, folder, portion: {
        "model": model is models[-1], "folder": folder, "portion": portion, "weights": weights()})
    note(common, "settle_batch_norm", lambda model, views, args: {"model": model is models[-1], "views": views})
    note(common, "training_batches", describe_batches)
    monkeypatch.setattr(common, "build_model", build_model)
    monkeypatch.setattr(common, "compare_with_source_only", lambda compared, args, run, source_model, **meters: (
        trace.append(("compare", {"models": compared, "source": source_model, "meters": meters, "run": run}))))
    monkeypatch.setattr(common.Run, "validate", lambda run, stage, step, steps, model, views: trace.append(
        ("validate", {"stage": stage, "step": step, "steps": steps, "model": model is models[-1], "views": views})))
    def play_on(*flags, out="run", stop_at=None):
        trace.clear()
        play_on.stop_at = stop_at
        monkeypatch.setattr(sys, "argv", ["drsl.py", *map(str, [*QUICK, *flags]), "--out", str(tmp_path / out)])
        drsl.main()
        return list(trace)

    play_on.folder, play_on.models = tmp_path, models
    return play_on


def entries(trace, name):
    return [entry for called, entry in trace if called == name]


def differ(one, other):
    """Names of the tensors in which two state dicts differ."""
    return {key for key in one if not torch.equal(one[key], other[key])}


STATISTICS = {"backbone.1.running_mean", "backbone.1.running_var", "backbone.1.num_batches_tracked"}


@pytest.mark.parametrize("policy", ["live", "target", "frozen"])
def test_stages_and_batch_norm(play, policy):
    trace = play("--batch-norm", policy)
    interesting = ("settle_batch_norm", "embed", "step_losses", "place_modes", "log_modes", "label_target", "compare")
    told = [name for name, _ in trace if name in interesting]
    a_round = ["log_modes", "settle_batch_norm", "label_target", "step_losses", "step_losses"]
    assert told == ["settle_batch_norm", "embed", "embed", "place_modes", "step_losses", "step_losses",
                    *a_round, *a_round, "log_modes", "settle_batch_norm", "compare"]
    for settled in entries(trace, "settle_batch_norm"):  # on what the network is trained on, without labels
        views = settled["views"]
        assert settled["model"] and views.domain == "target" and views.split == "train" and views.augment is not None
        assert not views.labelled and views.label_dir is None
    steps = entries(trace, "step_losses")
    assert all(step["training"] and step["norm"] == (policy == "live") for step in steps)
    assert all(step["training"] for step in entries(trace, "embed"))
    assert [step["target"] is None for step in steps] == [True] * 2 + [False] * 4
    final, source = play.models[-1].state_dict(), entries(trace, "compare")[0]["source"].state_dict()
    assert entries(trace, "compare")[0]["models"] == {"DRSL": play.models[-1]}
    assert differ(source, final) >= {"backbone.0.weight", "classifier.0.weight"}
    for entry in (entries(trace, "place_modes")[0], steps[0]):  # the network stands still while the head warms up
        assert differ(source, entry["weights"]) <= STATISTICS
    labelled_with = [entry["weights"] for entry in entries(trace, "label_target")]
    if policy == "frozen":
        assert not differ(source, labelled_with[0]) & STATISTICS
    else:
        assert differ(source, labelled_with[0]) >= STATISTICS - {"backbone.1.num_batches_tracked"}
    changed = differ(labelled_with[0], labelled_with[1]) & STATISTICS
    assert bool(changed) == (policy == "live")  # estimated before each labelling, or never again
    saved = load(play.folder / "run/last.pt")
    assert not differ(saved["model"], final) and saved["step"] == 6 and saved["method"] == "drsl"


def test_what_every_stage_is_trained_on(play):
    trace = play("--batch-norm", "frozen", "--seed", 3, "--portion", 0.2, "--portion-step", 0.3, "--portion-max", 0.6,
                 "--rounds", 3, "--iterations", 5, "--modes", 2, "--embedding", 8)
    mixed = {n: common.mix_seed(3, n) for n in range(10)}
    asked = [(b["domain"], b["labels"], b["seed"], b["steps"], b["share"]) for b in entries(trace, "training_batches")]
    look = [("source", None, mixed[9], (0, 6), 1), ("target", None, mixed[9], (0, 6), 1)]
    a_round = lambda r: [*look, ("source", None, mixed[4], (r + 1, r + 2), 2),
                         ("target", f"round{r}", mixed[5], (r + 1, r + 2), 2)]
    assert sorted(asked, key=str) == sorted([
        ("source", None, 3, (0, 1), 1), ("source", None, mixed[1], (0, 2), 1), ("source", None, mixed[8], (0, 6), 1),
        ("source", None, mixed[4], (0, 2), 1), *a_round(1), *a_round(2), *a_round(3), *look], key=str)
    for batches in entries(trace, "training_batches"):
        assert batches["augmented"] and batches["labelled"] == (batches["domain"] == "source")
    rounds = entries(trace, "label_target")
    assert [entry["portion"] for entry in rounds] == pytest.approx([0.2, 0.5, 0.6])  # DRSL-16
    assert [entry["folder"].name for entry in rounds] == ["round1", "round2", "round3"]
    assert all(entry["model"] for entry in rounds)
    steps = entries(trace, "step_losses")
    assert steps[-1]["head"].representatives.shape == (16, 2, 8)
    draws = [tuple(step["draw"]) for step in entries(trace, "embed") + steps]
    assert len(set(draws)) == 7  # other random numbers in every step
    for step in steps[2:]:
        assert not torch.equal(step["source"][0], step["target"][0])
        assert (step["target"][1] == 255).any() and (step["source"][1] != 255).all()
    sources = torch.stack([step["source"][0] for step in steps])
    assert all(not torch.equal(a, b) for i, a in enumerate(sources) for b in sources[:i])
    looks = entries(trace, "validate")
    assert [(look["stage"], look["step"], look["steps"]) for look in looks] == [("adapt", n + 1, 5) for n in range(5)]
    assert all(look["model"] and not look["views"].labelled and look["views"].label_dir is None for look in looks)


def test_plain_self_training_is_every_step_and_without_modes(play):
    trace = play("--plain", "--joint-iterations", 99)
    told = [name for name, _ in trace if name in ("settle_batch_norm", "step_losses", "label_target", "compare")]
    a_round = ["settle_batch_norm", "label_target", *["step_losses"] * 3]
    assert told == ["settle_batch_norm", *a_round, *a_round, "settle_batch_norm", "compare"]
    assert not entries(trace, "log_modes") and not entries(trace, "embed") and not entries(trace, "place_modes")
    steps, compared = entries(trace, "step_losses"), entries(trace, "compare")[0]
    assert all(step["head"] is None and step["target"] is not None for step in steps)
    assert list(compared["models"]) == ["plain self-training"] and compared["run"].method == "plain"
    assert list(compared["meters"]) == ["noise", "noise_classes"]
    assert "head" not in load(play.folder / "run/last.pt")
    play("--plain", "--modes", 5, "--alpha", 2, "--lambda-mm", 9, out="again")  # flags that do nothing
    one, again = (load(play.folder / name / "last.pt")["model"] for name in ("run", "again"))
    assert not differ(one, again)
    play("--plain", "--lambda-t", 0.1, out="other")
    assert differ(one, load(play.folder / "other/last.pt")["model"])


def test_the_default_folder_tells_plain_self_training_apart(monkeypatch):
    for flags, name in (([], "drsl"), (["--plain"], "plain")):
        asked = []
        monkeypatch.setattr(common, "Run", lambda method, args: asked.append(method) or sys.exit())
        monkeypatch.setattr(sys, "argv", ["drsl.py", *flags])
        with pytest.raises(SystemExit):
            drsl.main()
        assert asked == [name]


def test_training_follows_the_gradient_of_the_right_loss(play, monkeypatch):
    """SGD's first steps: weights move by the rate times the gradient of L_mm^s, then of the total, and decay."""
    steps = []

    def watch(name, chosen):
        called = getattr(drsl, name)

        def watched(*given):
            out = called(*given)
            if (objective := chosen(out)) is not None:
                bare, head = play.models[-1], play.head
                named = [*bare.named_parameters(), *((f"head.{name}", p) for name, p in head.named_parameters())]
                grads = torch.autograd.grad(objective, [p for _, p in named], retain_graph=True, allow_unused=True)
                steps.append({name: (p.detach().clone(), grad) for (name, p), grad in zip(named, grads)})
            return out

        monkeypatch.setattr(drsl, name, watched)

    head_of = drsl.ModeHead
    monkeypatch.setattr(drsl, "ModeHead", lambda *given: setattr(play, "head", head_of(*given)) or play.head)
    watch("mode_loss", lambda out: out if not steps else None)  # the head's warm-up, one step
    watch("step_losses", lambda out: out["loss"])
    trace = play("--optimizer", "sgd", "--head-lr", 10, "--lr", 0.02, "--warmup-lr", 0.05, "--power", 0, "--ramp", 0,
                 "--batch-norm", "live", "--head-iterations", 1, "--joint-iterations", 0, "--rounds", 1)
    assert len(steps) == 1 + 6
    monkeypatch.undo()

    def moved(step, rate):
        for name, (before, grad) in steps[step].items():
            if grad is None:
                assert torch.equal(steps[step + 1][name][0], before), name
                continue
            decay = 0 if name == "head.representatives" else 5e-4
            scale = 10 if name.startswith("classifier") else 1
            expected = before - rate * scale * (grad + decay * before)
            torch.testing.assert_close(steps[step + 1][name][0], expected, msg=name)

    steps[0].pop("head.representatives")  # k-means places R after this step
    assert all(grad is None for name, (_, grad) in steps[0].items() if not name.startswith("head."))
    moved(0, 0.05)
    moved(1, 0.02)  # the first step on both domains, with a fresh optimizer
    assert all(grad is not None for _, grad in steps[1].values())
    assert [entry["lr"] for entry in entries(trace, "set_lr")[1:]] == [0.05] + [0.02] * 6


@pytest.mark.parametrize("plain", [[], ["--plain"]])
def test_the_schedule_runs_over_all_steps(play, plain):
    """The same rate at the same step in DRSL and plain self-training, joint steps included."""
    trace = play("--lr", 0.01, "--warmup-lr", 0.004, "--power", 0.5, "--ramp", 3, *plain)
    expected = [0.01 * min(1, (t + 1) / 3) * (1 - t / 6) ** 0.5 for t in range(6)]
    warmup = [0.004] if plain else [0.004] * 3
    assert [entry["lr"] for entry in entries(trace, "set_lr")] == pytest.approx([*warmup, *expected])


def test_kmeans_places_the_modes_once_after_the_head_has_warmed_up(play, monkeypatch):
    found, asked, called = [], [], drsl.kmeans_modes

    def watched(e, labels, representatives):
        asked.append((e, labels))
        found.append(called(e, labels, representatives))
        return found[-1]

    monkeypatch.setattr(drsl, "kmeans_modes", watched)
    steps = entries(play(), "step_losses")
    assert len(found) == 1 and torch.equal(steps[0]["modes"]["representatives"], found[0])
    assert torch.equal(load(play.folder / "run/modes.pt")["head"]["representatives"], found[0])
    e, y = asked[0]
    assert (y != 255).all() and e.shape == (len(y), 64)
    torch.testing.assert_close(e.norm(dim=1), torch.ones(len(e)))
    assert len(y) == 12 * 4 * 8  # here every pixel
    assert not entries(play("--head-iterations", 0, out="none"), "place_modes")


def test_several_processes_start_from_the_first_one_s_modes(monkeypatch):
    given = []
    args = settings(size=(32, 64), crop=(32, 64), batch_size=2, toy_images=4)
    source = common.source_dataset(args, common.training_augment(args))
    monkeypatch.setattr(common, "all_sum", lambda tensor: given.append(tensor.clone()) or tensor + 5)
    for rank in (0, 1):
        head = ModeHead(32, 16, embedding=16)
        monkeypatch.setattr(common, "rank", lambda: rank)
        monkeypatch.setattr(common, "training_batches", lambda dataset, *_: [
            (common.normalise(source[i]["image"][None]), source[i]["label"][None]) for i in range(2)])
        drsl.place_modes(Tiny().train(), head, source, args)
        assert given[-1].any() == (rank == 0) and torch.equal(head.representatives, given[-1] + 5)


def test_labels_without_a_labelled_pixel_stop_the_run(play):
    with pytest.raises(common.InputError, match="a portion of 0.0 leaves no labelled pixel"):
        play("--rounds", 1, "--portion", 0)


def test_pseudo_labels_are_those_of_the_equations(play):
    """Written labels and what the log says of them, once more from the model that labelled, in two ways around."""
    entry = entries(play("--rounds", 1, "--portion", 0.4), "label_target")[0]
    model = Tiny()
    model.load_state_dict(entry["weights"])
    model.eval()
    dataset = common.ToyStreets("target", "train", (32, 64), images=12, labelled=True)
    with torch.no_grad():
        items = [dataset[i] for i in range(12)]
        images = common.normalise(torch.stack([item["image"] for item in items]))
        up = lambda logits: F.interpolate(logits, (32, 64), mode="bilinear").softmax(1)
        prob = (up(model(images)[1]) + up(model(images.flip(3))[1].flip(3))) / 2
    confidence, predicted = prob[::4, :, ::8, ::8].max(1)
    tau = class_thresholds(confidence.flatten(), predicted.flatten(), 16, 0.4)
    written = torch.stack([torch.from_numpy(common.read_label(path)) for path in sorted(entry["folder"].iterdir())])
    assert (written == pseudo_labels(prob, tau)).float().mean() > 0.999 and (written == 255).any()
    assert entry["out"]["portion"] == 0.4
    assert entry["out"]["kept"] == pytest.approx((written != 255).float().mean().item())
    assert {"accuracy", "accuracy_classes"} <= entry["out"].keys()


def test_meters(play):
    """Effective modes counted once more; noise is what the last labelling's log line says."""
    trace = play("--batch-norm", "frozen")
    compared = entries(trace, "compare")[0]
    steps, meters = entries(trace, "step_losses"), compared["meters"]
    assert list(meters) == ["effective_modes_source", "effective_modes_target", "noise", "noise_classes"]
    last = entries(trace, "label_target")[-1]["out"]
    assert meters["noise"] == pytest.approx(100 * (1 - last["accuracy"]))
    assert meters["noise_classes"] == pytest.approx(100 * (1 - last["accuracy_classes"]))
    model, head = play.models[-1], steps[-1]["head"]
    args = settings(size=(32, 64), crop=(32, 64), batch_size=2, toy_images=12)
    for domain in ("source", "target"):
        views = common.ToyStreets(domain, "train", (32, 64), augment=common.training_augment(args), images=12)
        counts = np.zeros((16, 3))
        for image, label in common.training_batches(views, args, common.mix_seed(0, 9), 0, 6):
            with torch.no_grad():
                d2 = head.squared_distances(common.as_pixels(head(model(image)[0])))
            for i, row in enumerate(d2):
                c = row.min(1).values.argmin() if label is None else label[:, 4::8, 4::8].flatten()[i]
                counts[c, row[c].argmin()] += 1
        expected = effective_modes(torch.from_numpy(counts))
        assert meters[f"effective_modes_{domain}"] == pytest.approx(expected.nanmean().item())
        lines = [json.loads(line) for line in (play.folder / "run/log.jsonl").read_text().splitlines()]
        shown = [line for line in lines if line["stage"] == f"modes {domain}"]
        assert len(shown) == 3
        assert shown[-1]["effective"] == [None if math.isnan(v) else round(v, 2) for v in expected.tolist()]


@pytest.mark.parametrize("flags, total, stops", [
    (["--batch-norm", "live"], 8, (2, 4, 6)), (["--plain"], 6, (4,))])
def test_stopped_before_any_step_and_resumed_the_run_ends_the_same(play, flags, total, stops):
    """Stopped in the head's warm-up, in the joint steps, in a round, and before the first step of one."""
    saved = lambda name: load(play.folder / name / "last.pt")
    play(*flags, out="whole")
    for stop_at in stops:  # the step that is not done
        with pytest.raises(Stop):
            play(*flags, "--save-every", 1, out=f"cut{stop_at}", stop_at=stop_at)
        resumed = play(*flags, "--save-every", 1, "--resume", out=f"cut{stop_at}")
        assert len(entries(resumed, "embed") + entries(resumed, "step_losses")) == total + 1 - stop_at
        for part in saved("whole").keys() & {"model", "head"}:
            assert not differ(saved("whole")[part], saved(f"cut{stop_at}")[part]), stop_at
    again = play(*flags, "--resume", out="whole")  # a finished run tells the same again
    assert not entries(again, "step_losses") and not entries(again, "label_target")
    assert len(entries(again, "compare")) == 1


@pytest.mark.parametrize("flag, value", [
    ("--sigma", "0"), ("--sigma", "nan"), ("--alpha", "-1"), ("--epsilon", "0"), ("--lambda-mm", "-1"),
    ("--lambda-sma", "inf"), ("--lambda-t", "nan"), ("--w-own", "-1"), ("--portion", "1.5"), ("--portion-step", "-0.1"),
    ("--portion-max", "nan"), ("--modes", "0"), ("--embedding", "0"), ("--pairs", "0"), ("--pixels", "0"),
    ("--rounds", "0"), ("--iterations", "-1"), ("--head-iterations", "-1"), ("--joint-iterations", "x"), ("--lr", "0"),
    ("--align-over", "none"), ("--joint-iterations", "241")])
def test_nonsense_is_refused(capsys, flag, value):
    with pytest.raises(SystemExit):
        settings(f"{flag}={value}")
    assert flag in capsys.readouterr().err


def test_plain_self_training_takes_any_number_of_steps():
    assert settings("--plain", "--iterations", 10).joint_iterations > 10  # which would be refused without --plain


# --------------------------------------------------- the script -----------------------------------------------------

FEW = [*TINY, "--warmup-iterations", 2, "--head-iterations", 2, "--joint-iterations", 1, "--rounds", 2,
       "--iterations", 5]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A folder with the run "run" and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "printed").write_text(run(folder, "drsl.py", *FEW, "--out", "run"))
    return folder


def test_one_command_runs_all_stages(uninterrupted):
    printed, folder = (uninterrupted / "printed").read_text(), uninterrupted / "run"
    assert {"args.json", "log.jsonl", "source_only.pt", "modes.pt", "last.pt", "panel.png", "result.json"} <= {
        p.name for p in folder.iterdir()}
    assert list(result(folder)["columns"]) == ["source only", "+ BN target", "DRSL"]
    assert "source only" in printed and "DRSL" in printed and "motorcycle" in printed and "noise_classes" in printed
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if "portion" in line]
    assert all(0 < r["kept"] <= 1 and 0 <= r["accuracy"] <= 1 and 0 <= r["accuracy_classes"] <= 1 for r in rounds)
    assert result(folder)["meters"]["noise"] == pytest.approx(100 * (1 - rounds[-1]["accuracy"]))
    assert all(1 <= result(folder)["meters"][f"effective_modes_{domain}"] <= 3 for domain in ("source", "target"))
    files = sorted((folder / "pseudo_labels/round1").iterdir())
    assert len(files) == 12 and common.read_label(files[0]).shape == (32, 64)
    assert Image.open(folder / "panel.png").width > 4 * 300  # image | truth | source only | DRSL
    steps = [(line["stage"], line["step"]) for line in lines if "ce_s" in line]
    assert steps == [("joint", "1/5"), *(("adapt", f"{n}/5") for n in (2, 3, 4, 5))]
    for line in (line for line in lines if line["stage"] == "adapt"):  # DRSL-10 with the defaults
        expected = line["ce_s"] + line["ce_t"] + 0.3 * (line["mm_s"] + line["mm_t"]) + line["sma"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)


@exact
def test_killed_and_resumed_the_run_ends_the_same(tmp_path, uninterrupted):
    """One run, killed in two stages in turn."""
    arguments = ["drsl.py", *FEW, "--save-every", 1, "--out", "cut"]
    for stage, lines, resume in (("joint", 1, []), ("adapt", 3, ["--resume"])):
        kill_when(tmp_path, lambda: logged(tmp_path / "cut", stage, lines), *arguments, *resume)
    run(tmp_path, *arguments, "--resume")
    for name in ("source_only.pt", "modes.pt", "last.pt"):
        assert same_weights(tmp_path / "cut" / name, uninterrupted / "run" / name)


def test_real_formats_from_start_to_end(tmp_path):
    write_synthia(tmp_path)
    write_cityscapes(tmp_path)
    for path in (tmp_path / "cityscapes/gtFine/train").rglob("*.png"):
        path.write_bytes(b"closed")  # an adaptation that opened a target training label would stop here
    run(tmp_path, "drsl.py", "--source", "synthia", "--data-root", tmp_path, "--backbone", "resnet14",
        "--backbone-weights", "none", "--workers", 0, *FEW, "--rounds", 1, "--iterations", 2)
    scores = result(tmp_path / "runs/drsl-synthia-s0")
    assert len(scores["iou"]) == 16 and "noise" not in scores["meters"]
    assert scores["meters"]["effective_modes_source"] >= 1


def test_two_processes_share_one_run(tmp_path, start):
    """What is counted is one process's; the network and the head learn as one process's."""
    arguments = [*FEW, *SPLITTABLE, "--init", start, "--rounds", 1, "--iterations", 3, "--lr", 0.02, "--ramp", 0,
                 "--lambda-mm", 0.1, "--lambda-sma", 0.1, "--pairs", 1024, "--head-iterations", 0,
                 "--joint-iterations", 0, "--no-balance"]  # each process balances the pixels of its own images
    run(tmp_path, "drsl.py", *arguments, "--out", "one")
    run_as_two(tmp_path, "drsl.py", *arguments, "--out", "two")
    assert trained_alike(start, tmp_path / "one/last.pt", tmp_path / "two/last.pt")
    heads = [load(tmp_path / name / "last.pt")["head"] for name in ("one", "two")]
    for key in heads[0]:
        assert F.cosine_similarity(heads[0][key].flatten(), heads[1][key].flatten(), dim=0) > 0.99, key
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("one", "two")]
    effective = [[line["effective"] for line in log if "effective" in line][:2] for log in logs]  # before any step
    for one, two in zip(*effective):
        assert one == pytest.approx(two, abs=0.05)
    one, two = (next(line for line in log if "kept" in line) for log in logs)
    for key in ("kept", "accuracy", "accuracy_classes"):
        assert one[key] == pytest.approx(two[key], rel=1e-3), key
    assert len(list((tmp_path / "two/pseudo_labels/round1").iterdir())) == 12
