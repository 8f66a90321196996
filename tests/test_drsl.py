"""drsl.py: every equation against an independent computation, every wire of a training step and of main().

Property names such as P-M1 count through what a mode head on the unit sphere must obey; the numbers are closed forms.
"""

import argparse
import copy
import json
import math
import signal
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
from trees import write_cityscapes, write_gta5, write_synthia

import common
import drsl
from drsl import (ModeHead, assign_modes, balanced_assignment, balanced_labels, class_thresholds, effective_modes,
                  kmeans_modes, margin_loss, mode_cross_entropy, nearest_modes, own_class, own_mode_cross_entropy,
                  pseudo_labels, segmentation_loss, stochastic_mode_alignment)

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


def settings(**changed):
    """What parse_args() gives without any flag, but for `changed`."""
    before, sys.argv = sys.argv, ["drsl.py", "--device", "cpu", "--precision", "fp32"]
    args = drsl.parse_args()
    sys.argv = before
    assert changed.keys() <= vars(args).keys()
    return argparse.Namespace(**{**vars(args), **changed})


# --------------------------------------------------- the mode head ----------------------------------------------------


def test_head_gives_unit_embeddings_and_the_distances_of_the_definition():
    head = ModeHead(32, 5, modes=2, embedding=16)
    e = head(torch.randn(2, 32, 3, 4))
    assert e.shape == (2, 16, 3, 4)
    torch.testing.assert_close(e.norm(dim=1), torch.ones(2, 3, 4))
    pixels = common.as_pixels(e)
    with torch.no_grad():
        head.representatives.mul_(7)  # normalised on use: their length must not matter
    expected = distances(pixels.double(), F.normalize(head.representatives.double(), dim=2))
    d2 = head.squared_distances(pixels)
    assert d2.shape == (24, 5, 2)
    torch.testing.assert_close(d2.double(), expected, atol=1e-5, rtol=0)
    own = F.normalize(head.representatives, dim=2).flatten(0, 1)
    assert (head.squared_distances(own) >= 0).all()  # 2 - 2 cos is clamped


def test_pixels_and_labels_flatten_in_the_same_order():
    maps = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).float()
    assert common.as_pixels(maps)[1 * 20 + 2 * 5 + 3].tolist() == maps[1, :, 2, 3].tolist()


# ---------------------------------------------------- margin loss -----------------------------------------------------


def test_margin_against_a_loop():
    e, R, y = unit(40, E), unit(C, K, E, seed=2), labels(40)
    y[::7] = 255
    terms = []
    for i in range(40):
        if y[i] != 255:
            own = min((e[i] - R[y[i], k]).square().sum().item() for k in range(K))
            other = min((e[i] - R[c, k]).square().sum().item() for c in range(C) for k in range(K) if c != y[i])
            terms.append(max(0.0, own - other + 0.5))
    assert margin_loss(distances(e, R), y, 0.5).item() == pytest.approx(sum(terms) / len(terms), abs=1e-12)


def test_margin_of_equal_modes_is_alpha():  # P-M1
    R = unit(1, E).expand(C, K, E)
    assert margin_loss(distances(unit(50, E, seed=3), R), labels(50), 0.7).item() == pytest.approx(0.7, abs=1e-12)


@pytest.mark.parametrize("alpha, expected", [(0.5, 0.0), (2.0, 0.0), (3.0, 1.0)])  # P-M2
def test_margin_on_an_own_mode(alpha, expected):
    R = orthogonal_modes()
    assert margin_loss(distances(R[4, 1][None], R), torch.tensor([4]), alpha).item() == pytest.approx(expected)


def test_margin_on_an_impostor_mode():  # P-M3
    R = orthogonal_modes()
    assert margin_loss(distances(R[4, 1][None], R), torch.tensor([3]), 0.5).item() == pytest.approx(2.5)


def test_margin_range():  # P-M4
    e, R, y = unit(200, E), unit(C, K, E, seed=2), labels(200)
    each = torch.stack([margin_loss(distances(e[i:i + 1], R), y[i:i + 1], 0.5) for i in range(200)])
    assert 0 <= each.min() and each.max() <= 4.5
    opposite = torch.stack([-e[0].expand(K, E), e[0].expand(K, E)])
    assert margin_loss(distances(e[:1], opposite), torch.tensor([0]), 0.5).item() == pytest.approx(4.5)


def test_margin_invariances():  # P-M5
    e, R, y = unit(60, E), unit(C, K, E, seed=2), labels(60)
    value = margin_loss(distances(e, R), y, 0.5).item()
    turn, _ = torch.linalg.qr(torch.randn(E, E, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    assert margin_loss(distances(e, R[:, [2, 0, 1]]), y, 0.5).item() == pytest.approx(value)
    assert margin_loss(distances(e @ turn, R @ turn), y, 0.5).item() == pytest.approx(value)
    one = R[:, :1]
    single = margin_loss(distances(e, one), y, 0.5).item()
    assert margin_loss(distances(e, one.expand(C, K, E)), y, 0.5).item() == pytest.approx(single)


def test_margin_of_random_vectors():  # P-M6: above alpha, because 54 impostors come nearer than 3 own modes
    value = margin_loss(distances(unit(4000, E), unit(C, K, E, seed=2)), labels(4000), 0.5).item()
    assert value == pytest.approx(0.68, abs=0.02)


def test_margin_gradient_reaches_two_modes_and_does_not_depend_on_e():  # P-M7, P-M8
    e, R = unit(1, E).requires_grad_(), unit(C, K, E, seed=2).requires_grad_()
    d2, y = distances(e, R), torch.tensor([6])
    margin_loss(d2, y, 3.0).backward()  # alpha 3: surely active
    own = d2[0, 6].argmin().item()
    masked = d2[0].detach().clone()
    masked[6] = math.inf
    c, k = divmod(masked.argmin().item(), K)
    torch.testing.assert_close(e.grad[0], 2 * (R[c, k] - R[6, own]).detach())
    torch.testing.assert_close(R.grad[6, own], (-2 * (e[0] - R[6, own])).detach())
    torch.testing.assert_close(R.grad[c, k], (2 * (e[0] - R[c, k])).detach())
    assert (R.grad.abs().sum(2) > 0).sum() == 2  # every other mode: exactly nothing

    e.grad = None
    own_mode = orthogonal_modes()
    at = own_mode[4, 1][None].clone().requires_grad_()
    margin_loss(distances(at, own_mode), torch.tensor([4]), 0.5).backward()
    assert at.grad.abs().max() == 0  # inactive


def test_margin_towards_a_given_mode():
    d2, y, m = distances(unit(40, E), unit(C, K, E, seed=2)), labels(40), labels(40, seed=3, classes=K)
    y[::7] = 255
    terms = []
    for i in range(40):
        if y[i] != 255:
            other = min(d2[i, c, k].item() for c in range(C) for k in range(K) if c != y[i])
            terms.append(max(0.0, d2[i, y[i], m[i]].item() - other + 0.5))
    assert margin_loss(d2, y, 0.5, m).item() == pytest.approx(sum(terms) / len(terms), abs=1e-12)
    d2 = d2[:1].requires_grad_()
    margin_loss(d2, torch.tensor([6]), 3.0, torch.tensor([2])).backward()
    assert d2.grad[0, 6].tolist() == [0, 0, 1] and d2.grad.sum() == 0  # the given mode, nearest or not


@pytest.mark.parametrize("modes, solved", [(1, False), (2, True), (3, True)])
@pytest.mark.parametrize("seed", range(4))
def test_margin_learns_xor_only_with_several_modes(modes, solved, seed):  # P-M9
    g = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[1.5, 1.5], [-1.5, -1.5], [1.5, -1.5], [-1.5, 1.5]])
    points = (centres[:, None] + 0.25 * torch.randn(4, 100, 2, generator=g)).flatten(0, 1)
    y = torch.tensor([0, 0, 1, 1]).repeat_interleave(100)
    R = (0.1 * torch.randn(2, modes, 2, generator=g)).requires_grad_()
    for _ in range(400):
        loss = margin_loss(distances(points, R), y, 1.0)
        R.data -= 0.2 * torch.autograd.grad(loss, R)[0]
    accuracy = (distances(points, R).min(2).values.argmin(1) == y).float().mean().item()
    if solved:
        assert accuracy == 1.0 and loss.item() < 1e-6
    else:
        assert accuracy <= 0.75 and loss.item() == pytest.approx(1, abs=0.02)


# ------------------------------------------------- mode cross-entropy -------------------------------------------------


def test_mode_cross_entropy_against_a_loop():
    d2, y = distances(unit(30, E), unit(C, K, E, seed=2)), labels(30)
    y[::4] = 255
    terms = []
    for i in range(30):
        if y[i] != 255:
            p = [[math.exp(-d2[i, c, k].item() / (2 * 0.3**2)) for k in range(K)] for c in range(C)]
            terms.append(-math.log(sum(p[y[i]]) / sum(map(sum, p))))
    assert mode_cross_entropy(d2, y, 0.3).item() == pytest.approx(sum(terms) / len(terms), abs=1e-12)


@pytest.mark.parametrize("classes, expected", [(19, 2.944439), (16, 2.772589)])  # P-C1
def test_mode_cross_entropy_of_equal_modes(classes, expected):
    R = unit(1, E).expand(classes, K, E)
    value = mode_cross_entropy(distances(unit(9, E, seed=3), R), labels(9, classes=classes), 0.3)
    assert value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sigma, expected", [  # P-C2
    (0.5, {1: 0.28494, 3: 0.66993, 5: 0.93054}),
    (0.3, {1: 2.7e-4, 3: 8.1e-4, 5: 1.34e-3}),
    (1.0, {1: 2.031, 3: 2.521, 5: 2.667}),
])
def test_mode_cross_entropy_on_an_own_mode(sigma, expected):
    for modes, value in expected.items():
        R = orthogonal_modes(modes=modes)
        loss = mode_cross_entropy(distances(R[2, 0][None], R), torch.tensor([2]), sigma).item()
        assert loss == pytest.approx(value, rel=5e-3 if value < 0.01 else 3e-4)
        tiny = math.exp(-1 / sigma**2)
        assert loss == pytest.approx(-math.log((1 + (modes - 1) * tiny) / (1 + (C * modes - 1) * tiny)), abs=1e-12)


def test_mode_cross_entropy_limits_of_sigma():  # P-C3
    e, R = unit(50, E), unit(C, K, E, seed=2)
    d2 = distances(e, R)
    for c in range(C):  # every class as likely as any other
        each = [math.exp(-mode_cross_entropy(d2[i:i + 1], torch.tensor([c]), 100.0).item()) for i in range(5)]
        assert max(abs(P - 1 / C) for P in each) <= 7e-6
    nearest = d2.min(2).values.argmin(1)
    for i in range(50):  # the likeliest class is that of the nearest mode
        each = torch.stack([mode_cross_entropy(d2[i:i + 1], torch.tensor([c]), 0.02) for c in range(C)])
        assert each.argmin() == nearest[i]
    assert mode_cross_entropy(d2, nearest, 0.02).item() < 0.3
    assert mode_cross_entropy(d2, (nearest + 1) % C, 0.02).item() > 3


def test_mode_cross_entropy_is_a_cosine_softmax():  # P-C4: temperature sigma^2
    e, R, y = unit(50, E), unit(C, K, E, seed=2), labels(50)
    cosine = torch.einsum("ne,cke->nck", e, R) / 0.3**2
    expected = F.cross_entropy(cosine.logsumexp(2), y)
    torch.testing.assert_close(mode_cross_entropy(distances(e, R), y, 0.3), expected)


def test_mode_cross_entropy_invariances():  # P-C5, P-C7
    e, R, y = unit(50, E), unit(C, K, E, seed=2), labels(50)
    d2 = distances(e, R)
    value = mode_cross_entropy(d2, y, 0.3).item()
    assert mode_cross_entropy(d2[:, :, [1, 2, 0]], y, 0.3).item() == pytest.approx(value)
    assert mode_cross_entropy(d2 + 1.7, y, 0.3).item() == pytest.approx(value)
    turn, _ = torch.linalg.qr(torch.randn(E, E, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    assert mode_cross_entropy(distances(e @ turn, R @ turn), y, 0.3).item() == pytest.approx(value)
    one = d2[:, :, :1]
    single = mode_cross_entropy(one, y, 0.3).item()
    assert mode_cross_entropy(one.expand(-1, -1, K), y, 0.3).item() == pytest.approx(single)
    each = sum(math.exp(-mode_cross_entropy(d2[:1], torch.tensor([c]), 0.3).item()) for c in range(C))
    assert each == pytest.approx(1.0)  # the posterior sums to 1


def test_mode_cross_entropy_pulls_to_own_modes():
    e, R = unit(1, E).requires_grad_(), unit(C, K, E, seed=2)
    before = distances(e, R)
    mode_cross_entropy(before, torch.tensor([5]), 0.3).backward()
    after = distances(F.normalize(e.detach() - 0.1 * e.grad, dim=1), R)
    assert after[0, 5].min() < before[0, 5].min()


def test_own_mode_cross_entropy_against_a_loop():
    d2, y, m = distances(unit(30, E), unit(C, K, E, seed=2)), labels(30), labels(30, seed=3, classes=K)
    y[::4] = 255
    terms = []
    for i in range(30):
        if y[i] != 255:
            p = [math.exp(-d2[i, y[i], k].item() / (2 * 0.3**2)) for k in range(K)]
            terms.append(-math.log(p[m[i]] / sum(p)))
    assert own_mode_cross_entropy(d2, y, m, 0.3).item() == pytest.approx(sum(terms) / len(terms), abs=1e-12)
    equal = torch.ones(9, C, K, dtype=torch.float64)
    assert own_mode_cross_entropy(equal, labels(9), m[:9], 0.3).item() == pytest.approx(math.log(K))
    assert own_mode_cross_entropy(d2[:, :, :1], y, 0 * m, 0.3).item() == 0  # K = 1: nothing to choose


def test_own_mode_cross_entropy_moves_only_the_own_class():
    d2 = distances(unit(1, E), unit(C, K, E, seed=2)).requires_grad_()
    own_mode_cross_entropy(d2, torch.tensor([5]), torch.tensor([1]), 0.3).backward()
    assert d2.grad[0, 5, 1] > 0 and (d2.grad[0, 5, [0, 2]] < 0).all()
    assert (d2.grad != 0).sum() == K


@pytest.mark.parametrize("loss", [lambda d2, y: margin_loss(d2, y, 0.5), lambda d2, y: mode_cross_entropy(d2, y, 0.3),
                                  lambda d2, y: own_mode_cross_entropy(d2, y, 0 * y % 3, 0.3)])
@pytest.mark.parametrize("n, y", [(0, []), (3, [255, 255, 255]), (1, [2])])
def test_mode_losses_over_nothing_are_a_connected_zero(loss, n, y):
    d2 = torch.rand(n, C, K, requires_grad=True)
    value = loss(d2, torch.tensor(y, dtype=torch.long))
    value.backward()
    assert torch.isfinite(value) and d2.grad is not None and torch.isfinite(d2.grad).all()
    if n != 1:
        assert value.item() == 0 and d2.grad.abs().sum() == 0


def test_mode_losses_with_a_single_class_are_zero_without_nan():
    d2 = torch.rand(4, 1, K, requires_grad=True)
    y = torch.zeros(4, dtype=torch.long)
    value = margin_loss(d2, y, 0.5) + mode_cross_entropy(d2, y, 0.3)
    value.backward()
    assert value.item() == 0 and torch.isfinite(d2.grad).all()


# -------------------------------------------------- mode assignment ---------------------------------------------------


def test_assignment_is_the_argmin_inside_the_own_class():
    d2, y = torch.rand(50, C, K), labels(50)
    y[3] = 255
    m = assign_modes(d2, y)
    assert all(m[i] == d2[i, y[i]].argmin() for i in range(50) if y[i] != 255)
    others = torch.rand(50, C, K)  # P-Q4: other classes' distances never matter
    others[torch.arange(50), y.clamp(max=C - 1)] = d2[torch.arange(50), y.clamp(max=C - 1)]
    keep = y != 255
    assert torch.equal(assign_modes(others, y)[keep], m[keep])
    assert assign_modes(d2[:, :, :1], y).eq(0).all()  # P-Q3


def test_nearest_of_all_modes():
    d2 = torch.rand(50, C, K)
    c, k = nearest_modes(d2)
    for i in range(50):
        assert min((d2[i, a, b].item(), a, b) for a in range(C) for b in range(K)) == (d2[i].min().item(), c[i], k[i])


def sinkhorn(d2, epsilon, iterations):
    """The textbook: for one class, rows and columns of exp(-d2 / epsilon) scaled in turn, rows first and last."""
    q = [[math.exp(-v / epsilon) for v in row] for row in d2.tolist()]
    q = [[v / sum(row) for v in row] for row in q]
    for _ in range(iterations):
        column = [sum(row[k] for row in q) for k in range(len(q[0]))]
        q = [[v / column[k] * len(q) / len(column) for k, v in enumerate(row)] for row in q]
        q = [[v / sum(row) for v in row] for row in q]
    return torch.tensor(q, dtype=torch.float64)


def test_balanced_assignment_is_sinkhorn_inside_every_class():  # DRSL-17
    own, y = distances(unit(60, 8), unit(1, K, 8, seed=2))[:, 0], labels(60, classes=4)
    y[::6], y[y == 2] = 255, 1  # nobody in class 2
    for epsilon, iterations in ((0.05, 3), (0.5, 1), (0.2, 7)):
        q = balanced_assignment(own, y, 5, epsilon, iterations)
        assert q.shape == (60, K) and torch.isfinite(q).all()
        for c in (0, 1, 3):
            torch.testing.assert_close(q[y == c], sinkhorn(own[y == c], epsilon, iterations))
    torch.testing.assert_close(balanced_assignment(own, y, 5), balanced_assignment(own, y, 5, 0.05, 3))


def test_balanced_assignment_shares_every_class_out_evenly():
    """Where all pixels are nearest to one mode, and in every class to another one."""
    own, y = torch.rand(400, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), labels(400, classes=4)
    own[torch.arange(400), y % K] -= 1.0
    q = balanced_assignment(own, y, 4, epsilon=0.05, iterations=100)
    for c in range(4):
        torch.testing.assert_close(q[y == c].mean(0), torch.full((K,), 1 / K, dtype=torch.float64), atol=1e-3, rtol=0)
        assert (own[y == c].argmin(1) == c % K).float().mean() > 0.95
        assert (torch.bincount(q[y == c].argmax(1), minlength=K) > 0.25 * (y == c).sum()).all()
    torch.testing.assert_close(q.sum(1), torch.ones(400, dtype=torch.float64))  # P-Q1


def test_balanced_assignment_of_separate_modes_is_the_nearest():
    own = torch.tensor([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]]).repeat(5, 1)
    assert torch.equal(balanced_assignment(own, torch.zeros(15, dtype=torch.long), 1).argmax(1), own.argmin(1))
    equal = balanced_assignment(torch.ones(6, K), torch.zeros(6, dtype=torch.long), 1)
    torch.testing.assert_close(equal, torch.full((6, K), 1 / K))
    assert balanced_assignment(torch.rand(7, 1), labels(7), C).eq(1).all()  # K = 1
    far = balanced_assignment(torch.tensor([[0.0, 4.0, 4.0]]).repeat(9, 1), torch.zeros(9, dtype=torch.long), 1)
    assert torch.isfinite(far).all()  # exp(-80) is still a float


def test_classes_are_balanced_apart():
    """What other classes' pixels say never changes an assignment."""
    own, y = torch.rand(60, K), labels(60, classes=2)
    other = torch.where(y[:, None] == 0, own, torch.rand(60, K))
    torch.testing.assert_close(balanced_assignment(own, y, 2)[y == 0], balanced_assignment(other, y, 2)[y == 0])


def test_assignments_carry_no_gradient_and_take_nothing():
    d2 = torch.rand(4, C, K, requires_grad=True)
    assert not assign_modes(d2, labels(4)).requires_grad
    assert not balanced_assignment(own_class(d2, labels(4)), labels(4), C).requires_grad
    empty = torch.zeros(0, dtype=torch.long)
    assert len(assign_modes(torch.rand(0, C, K), empty)) == 0 and len(nearest_modes(torch.rand(0, C, K))[0]) == 0
    assert balanced_assignment(torch.rand(0, K), empty, C).shape == (0, K)
    void = balanced_assignment(torch.rand(3, K), torch.full((3,), 255), C)
    assert torch.isfinite(void).all()


def test_effective_modes():  # DRSL-20
    counts = torch.tensor([[5, 0, 0], [4, 4, 4], [2, 2, 0], [0, 0, 0], [55, 30, 15]])
    one, three, two, nan, skew = effective_modes(counts).tolist()
    assert (one, three, two) == pytest.approx((1, 3, 2)) and math.isnan(nan)
    assert skew == pytest.approx(math.exp(-sum(s * math.log(s) for s in (0.55, 0.3, 0.15))))


def looks(classes=4, modes=3, dim=16, seed=0):
    """Centres (C, K, D) of features: every class has looks that are nearer to one another than to other classes."""
    g = torch.Generator().manual_seed(seed)
    base = 1.5 * torch.randn(classes, 1, dim, generator=g)
    return base + torch.randn(classes, modes, dim, generator=g), g


def draw_looks(centres, shares, g, n):
    """n maps (n, D, 12, 12) of features with labels and looks (n, 12, 12), whose looks have the given shares."""
    classes, _, dim = centres.shape
    y = torch.randint(0, classes, (n, 12, 12), generator=g)
    look = torch.multinomial(torch.tensor(shares), y.numel(), replacement=True, generator=g).view_as(y)
    x = centres[y, look] + 0.5 * torch.randn(n, 12, 12, dim, generator=g)
    return x.permute(0, 3, 1, 2).contiguous(), y, look


def test_balanced_modes_live_and_find_the_looks_and_others_die():
    """The abstract's premise: what is common in one domain is rare in the other, and every class is multi-modal."""
    alive, purity = {}, {}
    for balance in (True, False):
        centres, g = looks()
        torch.manual_seed(0)
        head, scores = ModeHead(16, 4, modes=3, embedding=16), nn.Conv2d(16, 4, 1)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
        args = settings(balance=balance, pixels=64)
        for _ in range(120):
            (x_s, y_s, _), (x_t, y_t, _) = (draw_looks(centres, s, g, 2) for s in ((.55, .3, .15), (.15, .3, .55)))
            terms = drsl.step_losses(lambda x: (x, scores(x)), head, (x_s, y_s), (x_t, y_t), args, g)
            optimizer.zero_grad()
            (0.3 * (terms["mm_s"] + terms["mm_t"]) + terms["sma"]).backward()
            optimizer.step()
        x, y, look = draw_looks(centres, (.55, .3, .15), g, 10)
        with torch.no_grad():
            m = assign_modes(head(x, distances=True)[1], y.flatten())
        joint = torch.zeros(4, 3, 3).index_put((y.flatten(), look.flatten(), m), torch.ones(()), accumulate=True)
        alive[balance] = effective_modes(joint.sum(1)).mean().item()
        purity[balance] = (joint.amax(1).sum() / joint.sum()).item()  # share of pixels of their mode's commonest look
    assert alive[True] > 2 and alive[False] < 1.6, alive
    assert purity[True] > 0.85 > purity[False], purity


# --------------------------------------------- stochastic mode alignment ----------------------------------------------


def both(e_s, e_t, y_s=None, m_s=None, y_t=None, m_t=None, **options):
    zeros = lambda e: torch.zeros(len(e), dtype=torch.long)
    return stochastic_mode_alignment(e_s, zeros(e_s) if y_s is None else y_s, zeros(e_s) if m_s is None else m_s,
                                     e_t, zeros(e_t) if y_t is None else y_t, zeros(e_t) if m_t is None else m_t,
                                     **options)


def test_alignment_hand_values():  # P-S1
    a, b = torch.eye(4, dtype=torch.float64)[:1], torch.eye(4, dtype=torch.float64)[1:2]
    assert both(a, a).item() == 0
    assert both(a, b).item() == pytest.approx(2)
    assert both(a, -a).item() == pytest.approx(4)


def test_alignment_without_a_shared_mode_is_exactly_zero():  # P-S2
    e_s, e_t = unit(5, 8).requires_grad_(), unit(5, 8, seed=1).requires_grad_()
    one = torch.ones(5, dtype=torch.long)
    for options in ({"m_t": one}, {"y_t": one}, {"y_t": 255 * one}, {"y_s": 255 * one, "y_t": 255 * one}):
        for shape in (None, (2, 2)):
            value = both(e_s, e_t, shape=shape, **options)
            e_s.grad = e_t.grad = None
            value.backward()
            assert value.item() == 0 and e_s.grad.abs().sum() == 0 and e_t.grad.abs().sum() == 0
    empty = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    both(empty, e_t).backward()
    assert both(empty, e_t).item() == 0 and both(e_s, empty).item() == 0


def test_alignment_expectation():  # P-S3
    g = torch.Generator().manual_seed(0)
    e_s, e_t = unit(50, 8) + 0.5, unit(70, 8, seed=1)
    e_s = F.normalize(e_s, dim=1)
    mu_s, mu_t = e_s.mean(0), e_t.mean(0)
    expected = (mu_s - mu_t).square().sum() + e_s.var(0, correction=0).sum() + e_t.var(0, correction=0).sum()
    assert expected.item() == pytest.approx((2 - 2 * mu_s @ mu_t).item())
    draws = torch.stack([both(e_s, e_t, generator=g) for _ in range(1000)])
    assert draws.mean().item() == pytest.approx(expected.item(), abs=4 * draws.std().item() / 1000**0.5)


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
    for shape in (None, (classes, modes), (classes + 3, modes)):
        assert both(e_s, e_t, y_s, m_s, y_t, m_t, shape=shape).item() == 0
    shifted = 3 * e_t.detach() + 0 * e_s.sum()
    value = both(e_s, shifted, y_s, m_s, y_t, m_t, pairs=4000)
    assert value.item() == pytest.approx(4)  # |1 - 3|^2 in every pair
    value.backward()
    assert ((e_s.grad.abs().sum(1) > 0) == (y_s != 255)).all()  # every source pixel of a shared mode has been drawn


def test_alignment_against_its_own_draws():  # P-S5, and the estimate itself
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


def test_alignment_moves_both_domains():
    e_s, e_t = unit(5, 8).requires_grad_(), unit(7, 8, seed=1).requires_grad_()
    both(e_s, e_t).backward()
    assert e_s.grad.abs().sum() > 0 and e_t.grad.abs().sum() > 0


def test_alignment_does_not_depend_on_order_or_direction():  # P-S4
    e_s, e_t = unit(6, 8), unit(6, 8, seed=1)
    g, means = torch.Generator().manual_seed(4), []
    for one, other in ((e_s, e_t), (e_t, e_s), (e_s.flip(0), e_t.roll(2, 0))):
        draws = torch.stack([both(one, other, generator=g) for _ in range(500)])
        means.append((draws.mean().item(), draws.std().item() / 500**0.5))
    assert all(mean == pytest.approx(means[0][0], abs=4 * (means[0][1] + error)) for mean, error in means)


def test_alignment_never_reads_a_value():
    """On the device "meta" tensors have no values: what would make a processor wait for its GPU fails."""
    e = torch.zeros(10, 8, device="meta", requires_grad=True)
    y, d2 = torch.zeros(10, dtype=torch.int64, device="meta"), torch.zeros(10, C, K, device="meta")
    m_s, (y_t, m_t) = balanced_assignment(own_class(d2, y), y, C).argmax(1), nearest_modes(d2)
    both(e, e, y, m_s, y_t, m_t, shape=(C, K)).backward()
    assert e.grad.shape == (10, 8)
    with pytest.raises(RuntimeError):
        both(e, e, y, m_s, y_t, m_t)  # without the shape it has to look


def test_alignment_alone_would_collapse():  # P-S6
    constant = unit(1, 8).expand(20, 8)
    assert both(constant, constant).item() == pytest.approx(0, abs=1e-12)
    R = unit(C, K, 8, seed=2)
    y = labels(20)
    spread = R[y, 0]
    assert mode_cross_entropy(distances(constant, R), y, 0.3) > mode_cross_entropy(distances(spread, R), y, 0.3)


def test_alignment_variance_falls_with_the_number_of_pairs():  # P-S7
    e_s, e_t = unit(50, 8), unit(70, 8, seed=1)
    g = torch.Generator().manual_seed(0)
    spread = {M: torch.stack([both(e_s, e_t, pairs=M, generator=g) for _ in range(600)]).var().item()
              for M in (16, 64, 256)}
    assert spread[16] / spread[64] == pytest.approx(4, rel=0.35)
    assert spread[64] / spread[256] == pytest.approx(4, rel=0.35)


# ---------------------------------------------------- segmentation ----------------------------------------------------


def test_segmentation_loss():
    logits = torch.randn(2, C, 5, 6, dtype=torch.float64).float()
    label = torch.randint(0, C, (2, 33, 41))
    label[:, :7] = 255
    up = F.interpolate(logits, (33, 41), mode="bilinear", align_corners=True)
    torch.testing.assert_close(segmentation_loss(logits, label), F.cross_entropy(up, label, ignore_index=255))
    ignored = logits.clone()
    ignored[:, :, 0] += 9  # the first grid row reaches image rows 0 to 7 only
    far = label.clone()
    far[:, :8] = 255
    torch.testing.assert_close(segmentation_loss(ignored, far), segmentation_loss(logits, far))  # P-G6
    uniform = segmentation_loss(torch.zeros(1, C, 2, 2), torch.zeros(1, 16, 16, dtype=torch.long))  # P-G1
    assert uniform.item() == pytest.approx(math.log(C))
    twice = segmentation_loss(logits.repeat(2, 1, 1, 1), label.repeat(2, 1, 1))  # P-G3
    torch.testing.assert_close(twice, segmentation_loss(logits, label))
    torch.testing.assert_close(segmentation_loss(logits + 3, label), segmentation_loss(logits, label))  # P-G5


def test_segmentation_loss_over_nothing():  # P-G2
    logits = torch.randn(1, C, 2, 2, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 16, 16), 255))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


# --------------------------------------------------- pseudo-labels ----------------------------------------------------


@pytest.mark.parametrize("portion, kept", [(0.2, 200), (0.5, 500), (0.29, 290)])  # P-L1
def test_thresholds_keep_the_asked_portion_of_every_class(portion, kept):
    confidence = torch.rand(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = torch.arange(3000) % 3
    tau = class_thresholds(confidence, label, 4, portion)
    for c in range(3):
        mine = confidence[label == c]
        assert (mine >= tau[c]).sum() == kept
        assert tau[c] == sorted(mine.tolist(), reverse=True)[kept - 1]  # DRSL-14 by the letter
    assert tau[3] == 1  # P-L5: never predicted


def test_thresholds_fall_with_the_portion():  # P-L2
    confidence, label = torch.rand(500), torch.randint(0, 3, (500,))
    taus = [class_thresholds(confidence, label, 3, p) for p in (0.2, 0.25, 0.5)]
    assert (taus[0] >= taus[1]).all() and (taus[1] >= taus[2]).all()
    prob = torch.rand(2, 3, 8, 8).softmax(1)
    confidence, label = prob.max(1)
    kept = [confidence >= class_thresholds(confidence.flatten(), label.flatten(), 3, p)[label] for p in (0.2, 0.5)]
    assert (kept[1] | ~kept[0]).all() and kept[0].sum() < kept[1].sum()  # nested


def test_thresholds_of_tiny_sets():
    assert class_thresholds(torch.zeros(0), torch.zeros(0, dtype=torch.long), 3, 0.5).tolist() == [1, 1, 1]
    assert class_thresholds(torch.tensor([0.4]), torch.tensor([1]), 3, 0.5).tolist() == [1, 1, 1]  # floor(0.5) = 0
    assert class_thresholds(torch.tensor([0.5]), torch.tensor([1]), 3, 1.0).tolist() == [1, 0.5, 1]


def test_pseudo_labels_are_the_weighted_argmax():
    prob = torch.tensor([0.6, 0.4]).view(1, 2, 1, 1)
    assert pseudo_labels(prob, torch.tensor([0.9, 0.3])).item() == 1  # P-L4
    assert pseudo_labels(prob, torch.tensor([0.9, 0.5])).item() == 255
    assert pseudo_labels(prob, torch.tensor([0.6, 1.0])).item() == 0  # exactly at the threshold: kept
    prob = torch.rand(2, 5, 6, 7).softmax(1)
    assert torch.equal(pseudo_labels(prob, torch.full((5,), 0.01)), prob.argmax(1))  # P-L3
    sure = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)  # P-L5: tau = 1 keeps only certainty
    assert pseudo_labels(sure, torch.tensor([0.5, 1.0])).item() == 1
    assert pseudo_labels(torch.tensor([0.01, 0.99]).view(1, 2, 1, 1), torch.tensor([0.5, 1.0])).item() == 255


# ------------------------------------------------------ k-means -------------------------------------------------------


def test_kmeans_finds_the_modes_of_each_class():
    centres = F.normalize(torch.randn(4, K, 32, generator=torch.Generator().manual_seed(0)), dim=2)
    y = torch.arange(4).repeat_interleave(K * 40)
    e = F.normalize(centres.flatten(0, 1).repeat_interleave(40, 0) + 0.03 * torch.randn(4 * K * 40, 32), dim=1)
    start = torch.randn(5, K, 32)
    R = kmeans_modes(e, y, start)
    for c in range(4):
        assert (R[c] @ centres[c].T).amax(0).min() > 0.99  # each true mode has a centre near it
    torch.testing.assert_close(R[4], F.normalize(start[4], dim=1))  # a class that never occurs keeps its start
    torch.testing.assert_close(R.norm(dim=2), torch.ones(5, K))


def test_kmeans_with_fewer_distinct_pixels_than_modes():
    e = unit(1, 8).float().expand(10, 8)
    R = kmeans_modes(e, torch.zeros(10, dtype=torch.long), torch.randn(1, K, 8))
    assert torch.isfinite(R).all()
    torch.testing.assert_close(R[0], e[:K])


# --------------------------------------------------- pixel sampling ---------------------------------------------------


def test_balanced_labels():
    label = torch.tensor([0] * 30 + [1] * 5 + [255] * 5).view(1, 5, 8).repeat(3, 1, 1)
    label[2] = 255
    kept = balanced_labels(label, (5, 8), 7, torch.rand(3, 5, 8))
    assert kept.shape == (3, 5, 8) and ((kept == label) | (kept == 255)).all() and kept[2].eq(255).all()
    for image in kept[:2]:
        assert torch.bincount(image[image != 255]).tolist() == [7, 5]
    assert torch.equal(balanced_labels(label, (5, 8), 40, torch.rand(3, 5, 8)), label)
    often = [balanced_labels(label[:1], (5, 8), 7, torch.rand(1, 5, 8)).flatten()[:30] != 255 for _ in range(300)]
    often = torch.stack(often).float().mean(0)
    assert often.min() > 0.1 and often.max() < 0.4  # each road pixel about 7 times in 30: no favourites


def test_balanced_labels_keep_the_smallest_random_numbers():
    label = torch.tensor([3, 3, 3, 7, 7, 255]).view(1, 1, 6)
    u = torch.tensor([0.5, 0.1, 0.9, 0.8, 0.2, 0.0]).view(1, 1, 6)
    assert balanced_labels(label, (1, 6), 1, u).flatten().tolist() == [255, 3, 255, 255, 7, 255]


def test_labels_reach_the_grid_by_the_pixel_at_the_centre_of_each_cell():
    label = torch.arange(16 * 24).view(1, 16, 24) % 250
    u = torch.rand(1, 2, 3)
    assert torch.equal(balanced_labels(label, (2, 3), 9, u), label[:, 4::8, 4::8])  # cells that tile the picture
    assert torch.equal(balanced_labels(label, (3, 4), 9, torch.rand(1, 3, 4)), common.grid_labels(label, (3, 4)))


# ------------------------------------------------- a training step --------------------------------------------------


class Tiny(common.DeepLabV2):
    """A network of one convolution with stride 8, batch norm and a classifier, in the form of DeepLabV2."""

    def __init__(self, classes=16):
        nn.Module.__init__(self)
        convolution = nn.Conv2d(3, 32, 9, stride=8, padding=4)
        self.backbone, self.feature_dim = nn.Sequential(convolution, nn.BatchNorm2d(32), nn.ReLU()), 32
        self.classifier = nn.ModuleList([nn.Conv2d(32, classes, 1)])


def tiny_step(target=True, **changed):
    """A network, a head, a source and a target batch, and the arguments of a step on them."""
    g = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    args = settings(**{"pixels": 999, **changed})
    network, head = Tiny(5), ModeHead(32, 5, args.modes, 16)
    x_s, x_t = torch.randn(2, 2, 3, 32, 64, generator=g)
    y_s, y_t = torch.randint(0, 5, (2, 2, 4, 8), generator=g).repeat_interleave(8, 2).repeat_interleave(8, 3)
    y_s[0, :16, :16], y_t[1, :, 24:] = 255, 255
    return network, head, (x_s, y_s), (x_t, y_t) if target else None, args


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
        own = d2[y == c, c].detach().double()
        m[y == c] = sinkhorn(own, epsilon, 3).argmax(1)
    return m


def cross_entropy(logits, y):
    return F.cross_entropy(F.interpolate(logits, y.shape[1:], mode="bilinear"), y, ignore_index=255)


@pytest.mark.parametrize("align_over", ["all", "pseudo"])
@pytest.mark.parametrize("balance", [True, False])
def test_every_term_of_a_step(balance, align_over):
    network, head, source, target, args = tiny_step(
        balance=balance, align_over=align_over, lambda_t=0.7, lambda_mm=0.4, lambda_sma=2.0, w_own=0.6, sigma=0.4,
        alpha=0.8, epsilon=0.07, pairs=16)
    terms = losses_of(network, head, source, target, args)
    assert list(terms) == ["loss", "ce_s", "ce_t", "mm_s", "mm_t", "sma"]
    l_s, e_s, d2_s, y_s = one_domain(network, head, *source)
    l_t, e_t, d2_t, y_t = one_domain(network, head, *target)
    expected = {"ce_s": cross_entropy(l_s, source[1]), "ce_t": cross_entropy(l_t, target[1])}  # DRSL-1, DRSL-2
    d2, y = torch.cat([d2_s, d2_t]), torch.cat([y_s, y_t])
    m = textbook_modes(d2, y, 0.07) if balance else assign_modes(d2, y)
    assert not torch.equal(m, textbook_modes(d2, y, 0.07)) or balance
    m_s, m_t = m.split([64, 64])
    for name, d2, y, m in (("mm_s", d2_s, y_s, m_s), ("mm_t", d2_t, y_t, m_t)):  # DRSL-7
        expected[name] = (margin_loss(d2, y, 0.8, m) + mode_cross_entropy(d2, y, 0.4)
                          + 0.6 * own_mode_cross_entropy(d2, y, m, 0.4))
    g = torch.Generator().manual_seed(11)
    torch.rand(2, 4, 8, generator=g), torch.rand(2, 4, 8, generator=g)  # which pixels the mode losses see: here all
    if align_over == "all":
        y_t, m_t = nearest_modes(d2_t)
        assert (target[1][:, 4::8, 4::8].flatten() == 255).any() and (y_t != 255).all()
    expected["sma"] = stochastic_mode_alignment(e_s, y_s, m_s, e_t, y_t, m_t, 16, g, (5, 3))  # DRSL-9A
    expected["loss"] = (expected["ce_s"] + 0.7 * expected["ce_t"] + 0.4 * (expected["mm_s"] + expected["mm_t"])
                        + 2.0 * expected["sma"])  # DRSL-10
    for name in terms:
        torch.testing.assert_close(terms[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert len({round(v.item(), 4) for v in terms.values()}) == 6


def test_terms_of_a_step_without_a_target():
    network, head, source, _, args = tiny_step(target=False, lambda_mm=0.4, w_own=0.6)
    terms = losses_of(network, head, source, None, args)
    logits, _, d2, y = one_domain(network, head, *source)
    m = textbook_modes(d2, y, 0.05)
    mm = margin_loss(d2, y, 0.5, m) + mode_cross_entropy(d2, y, 0.3) + 0.6 * own_mode_cross_entropy(d2, y, m, 0.3)
    ce = cross_entropy(logits, source[1])
    assert list(terms) == ["loss", "ce_s", "mm_s"]
    for name, value in (("ce_s", ce), ("mm_s", mm), ("loss", ce + 0.4 * mm)):
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-6)


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
    assert seen == [[torch.float32] * 3] * 2 and all(value.dtype == torch.float32 for value in terms.values())
    exact = losses_of(*tiny_step())
    assert terms["ce_s"].item() != exact["ce_s"].item()  # the network itself did compute in bf16
    assert terms["mm_s"].item() == pytest.approx(exact["mm_s"].item(), rel=0.05)


def test_the_head_learns_at_the_network_s_own_rate_and_its_modes_do_not_decay():
    network, head, *_, args = tiny_step(optimizer="sgd", head_lr=10.0)
    groups = drsl.make_optimizer_with_modes(network, head, args).param_groups
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == {*network.parameters(), *head.parameters()}
    of = lambda wanted: [(g["scale"], g["weight_decay"]) for g in groups if any(p is wanted for p in g["params"])]
    assert of(head.representatives) == [(1.0, 0.0)] and of(head.project[0].weight) == [(1.0, 5e-4)]
    assert of(network.backbone[0].weight) == [(1.0, 5e-4)] and of(network.classifier[0].weight) == [(10.0, 5e-4)]


# ------------------------------------------------- the wires of main ------------------------------------------------

QUICK = [*TINY, "--precision", "fp32", "--toy-images", 12, "--warmup-iterations", 1, "--head-iterations", 2,
         "--joint-iterations", 2, "--rounds", 2, "--iterations", 4, "--ramp", 2]


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
            entry = describe(*given, **named)
            trace.append((name, entry))
            out = called(*given, **named)
            if entry is not None:
                entry["out"] = out
            return out

        monkeypatch.setattr(module, name, recorded)

    def build_model(args):
        torch.manual_seed(args.seed)
        models.append(Tiny(len(common.task_classes(args.source))))
        return models[-1]

    def describe_step(network, head, source, target, args, generator):
        if len([name for name, _ in trace if name == "step_losses"]) == play_on.stop_at:
            raise Stop
        bare = models[-1]
        return {"network": network, "head": head, "source": source, "target": target, "training": bare.training,
                "norm": bare.backbone[1].training, "weights": weights(), "modes": copy.deepcopy(head.state_dict()),
                "draw": torch.rand(3, generator=generator.clone_state()).tolist()}

    def describe_batches(dataset, args, seed, start, stop):
        inner = dataset
        return {"domain": inner.domain, "labels": inner.label_dir and Path(inner.label_dir).name, "seed": seed,
                "augmented": inner.augment is not None, "labelled": inner.labelled, "steps": (start, stop)}

    note(drsl, "step_losses", describe_step)
    note(drsl, "set_lr", lambda optimizer, lr: {"lr": lr})
    note(drsl, "place_modes", lambda model, head, *_: {"modes": head.representatives.detach().clone()})
    note(drsl, "log_modes", lambda *given: {"weights": weights()})
    note(drsl, "label_target", lambda model, args, folder, portion: {
        "model": model is models[-1], "folder": folder, "portion": portion, "weights": weights()})
    note(common, "settle_batch_norm", lambda model, views, args: {"model": model is models[-1], "views": views})
    note(common, "training_batches", describe_batches)
    monkeypatch.setattr(common, "build_model", build_model)
    monkeypatch.setattr(common, "compare_with_source_only", lambda compared, args, run, source_model, **meters: (
        trace.append(("compare", {"models": compared, "source": source_model, "meters": meters}))))
    monkeypatch.setattr(common.Run, "validate", lambda run, stage, step, steps, model, views: trace.append(
        ("validate", {"stage": stage, "step": step, "steps": steps, "model": model is models[-1], "views": views})))
    monkeypatch.setattr(common.signal, "signal", lambda *_: None)  # Ctrl-C stays pytest's

    def play_on(*flags, out="run", stop_at=None):
        trace.clear()
        play_on.stop_at = stop_at
        arguments = ["drsl.py", *map(str, [*QUICK, *flags]), "--out", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", arguments)
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


def test_fcn8s_is_refused(tmp_path):
    assert "vgg16-fcn8s" in run(tmp_path, "drsl.py", *TINY, "--backbone", "vgg16-fcn8s", ok=False)


@pytest.mark.parametrize("flags, title", [
    (["--lambda-mm", "0", "--lambda-sma", "0"], "plain self-training"),
    (["--lambda-mm", "0"], "DRSL"), (["--lambda-sma", "0"], "DRSL")])
def test_the_control_has_a_title_of_its_own(play, flags, title):
    assert list(entries(play(*flags), "compare")[0]["models"]) == [title]


@pytest.mark.parametrize("policy", ["live", "target", "frozen"])
def test_stages_and_batch_norm(play, policy):
    trace = play("--batch-norm", policy)
    interesting = ("settle_batch_norm", "step_losses", "place_modes", "log_modes", "label_target", "compare")
    told = [name for name, _ in trace if name in interesting]
    a_round = ["log_modes", "settle_batch_norm", "label_target", "step_losses", "step_losses"]
    assert told == ["settle_batch_norm", *["step_losses"] * 2, "place_modes", *["step_losses"] * 2,
                    *a_round, *a_round, "log_modes", "settle_batch_norm", "compare"]
    for settled in entries(trace, "settle_batch_norm"):  # on what the network is trained on, without labels
        views = settled["views"]
        assert settled["model"] and views.domain == "target" and views.split == "train" and views.augment is not None
        assert not views.labelled and views.label_dir is None
    steps = entries(trace, "step_losses")
    assert all(step["training"] and step["norm"] == (policy == "live") for step in steps)
    assert [step["target"] is None for step in steps] == [True] * 4 + [False] * 4
    final, source = play.models[-1].state_dict(), entries(trace, "compare")[0]["source"].state_dict()
    assert entries(trace, "compare")[0]["models"] == {"DRSL": play.models[-1]}
    assert differ(source, final) >= {"backbone.0.weight", "classifier.0.weight"}
    assert differ(source, steps[2]["weights"]) <= STATISTICS  # the network stands still while the head warms up
    labelled_with = [entry["weights"] for entry in entries(trace, "label_target")]
    if policy == "frozen":
        assert not differ(source, labelled_with[0]) & STATISTICS
    else:
        assert differ(source, labelled_with[0]) >= STATISTICS - {"backbone.1.num_batches_tracked"}
    changed = differ(labelled_with[0], labelled_with[1]) & STATISTICS
    assert bool(changed) == (policy == "live")  # estimated before each labelling, or never again
    saved = load(play.folder / "run/last.pt")
    assert not differ(saved["model"], final) and saved["step"] == 4


def test_what_every_stage_is_trained_on(play):
    trace = play("--batch-norm", "frozen", "--seed", 3)
    mixed = {n: common.mix_seed(3, n) for n in range(10)}
    asked = [(b["domain"], b["labels"], b["seed"], b["steps"]) for b in entries(trace, "training_batches")]
    look = [("source", None, mixed[9], (0, 6)), ("target", None, mixed[9], (0, 6))]
    assert asked == [("source", None, 3, (0, 1)), ("source", None, mixed[1], (0, 4)),
                     ("source", None, mixed[8], (0, 6)), *look,
                     ("source", None, mixed[4], (0, 2)), ("target", "round1", mixed[5], (0, 2)), *look,
                     ("source", None, mixed[4], (2, 4)), ("target", "round2", mixed[5], (2, 4)), *look]
    for batches in entries(trace, "training_batches"):
        assert batches["augmented"] and batches["labelled"] == (batches["domain"] == "source")
    steps = entries(trace, "step_losses")
    assert len({tuple(step["draw"]) for step in steps}) == 8  # other random numbers in every step
    for step in steps[4:]:
        assert not torch.equal(step["source"][0], step["target"][0])
        assert (step["target"][1] == 255).any() and (step["source"][1] != 255).all()
    sources = torch.stack([step["source"][0] for step in steps])
    assert all(not torch.equal(a, b) for i, a in enumerate(sources) for b in sources[:i])


def test_training_follows_the_gradient_of_the_right_loss(play, monkeypatch):
    """SGD's first steps: weights move by the rate times the gradient of L_mm^s, then of the total, and decay."""
    steps, called = [], drsl.step_losses

    def watched(network, head, source, target, args, generator):
        terms = called(network, head, source, target, args, generator)
        objective = terms["loss"] if steps else terms["mm_s"]
        bare = play.models[-1]
        named = [*bare.named_parameters(), *((f"head.{name}", p) for name, p in head.named_parameters())]
        grads = torch.autograd.grad(objective, [p for _, p in named], retain_graph=True, allow_unused=True)
        steps.append({name: (p.detach().clone(), grad) for (name, p), grad in zip(named, grads)})
        return terms

    monkeypatch.setattr(drsl, "step_losses", watched)
    trace = play("--optimizer", "sgd", "--head-lr", 10, "--lr", 0.02, "--warmup-lr", 0.05, "--power", 0, "--ramp", 0,
                 "--batch-norm", "live", "--head-iterations", 1, "--joint-iterations", 2, "--rounds", 1)
    assert len(steps) == 1 + 2 + 4
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

    without_modes = {name: value for name, value in steps[0].items() if name != "head.representatives"}
    steps[0] = without_modes  # k-means places R after this step
    moved(0, 0.05)
    assert all(grad is None for name, (_, grad) in steps[0].items() if not name.startswith("head."))
    moved(3, 0.02)  # the first step of the adaptation, with a fresh optimizer
    assert all(grad is not None for _, grad in steps[3].values())
    assert [entry["lr"] for entry in entries(trace, "set_lr")[1:]] == [0.05, 0.02, 0.02] + [0.02] * 4


def test_learning_rates(play):
    trace = play("--lr", 0.01, "--warmup-lr", 0.004, "--power", 0.5, "--ramp", 3, "--iterations", 6)
    expected = [0.01 * min(1, (t + 1) / 3) * (1 - t / 6) ** 0.5 for t in range(6)]
    assert [entry["lr"] for entry in entries(trace, "set_lr")] == pytest.approx(
        [0.004, 0.004, 0.004, 0.01, 0.01, *expected])


def test_kmeans_places_the_modes_once_after_the_head_has_warmed_up(play, monkeypatch):
    found, asked, called = [], [], drsl.kmeans_modes

    def watched(e, labels, representatives):
        asked.append((e, labels))
        found.append(called(e, labels, representatives))
        return found[-1]

    monkeypatch.setattr(drsl, "kmeans_modes", watched)
    steps = entries(play("--optimizer", "adamw"), "step_losses")
    assert len(found) == 1 and torch.equal(steps[2]["modes"]["representatives"], found[0])
    e, y = asked[0]
    assert (y != 255).all() and e.shape == (len(y), 64)
    torch.testing.assert_close(e.norm(dim=1), torch.ones(len(e)))
    assert torch.bincount(y).max() <= 12 * math.ceil(2000 / 12) and len(y) == 12 * 4 * 8  # here every pixel
    state = load(play.folder / "run/modes.pt")["optimizer"]["state"]  # R is its last parameter
    assert state[max(state)]["step"] == 2 and state[max(state) - 1]["step"] == 4  # R began anew
    assert len(entries(play("--head-iterations", 0, out="none"), "place_modes")) == 0


def test_several_processes_start_from_the_first_one_s_modes(monkeypatch):
    given = []
    args = settings(size=(32, 64), crop=(32, 64), batch_size=2, toy_images=4)
    source = common.source_dataset(args, common.training_augment(args))
    monkeypatch.setattr(common, "all_sum", lambda tensor: given.append(tensor.clone()) or tensor + 5)
    for rank in (0, 1):
        head = ModeHead(32, 16, embedding=16)
        monkeypatch.setattr(common, "rank", lambda: rank)
        monkeypatch.setattr(common, "training_batches", lambda dataset, *_: [
            (torch.stack([source[i]["image"]]), torch.stack([source[i]["label"]])) for i in range(2)])
        drsl.place_modes(Tiny().train(), head, source, args)
        assert given[-1].any() == (rank == 0) and torch.equal(head.representatives, given[-1] + 5)


def test_plain_self_training_is_untouched_by_modes_but_has_their_joint_steps(play):
    plain = ["--lambda-mm", 0, "--lambda-sma", 0]
    end = {}
    for name, flags in {"three": [], "one": ["--modes", 1, "--alpha", 2], "fewer": ["--joint-iterations", 0],
                        "modes": ["--lambda-mm", 0.3], "aligned": ["--lambda-sma", 1]}.items():
        trace = play(*plain, *flags, out=name)
        assert len(entries(trace, "step_losses")) == (6 if name == "fewer" else 8)
        end[name] = copy.deepcopy(play.models[-1].state_dict())
    assert not differ(end["three"], end["one"])
    for name in ("fewer", "modes", "aligned"):
        assert "backbone.0.weight" in differ(end["three"], end[name]), name


def test_portions_and_sizes_of_the_head(play):
    trace = play("--portion", 0.2, "--portion-step", 0.3, "--portion-max", 0.6, "--rounds", 3, "--modes", 2,
                 "--embedding", 8)
    assert [entry["portion"] for entry in entries(trace, "label_target")] == pytest.approx([0.2, 0.5, 0.6])  # DRSL-16
    assert [entry["folder"].name for entry in entries(trace, "label_target")] == ["round1", "round2", "round3"]
    assert all(entry["model"] for entry in entries(trace, "label_target"))
    head = entries(trace, "step_losses")[-1]["head"]
    assert head.representatives.shape == (16, 2, 8)
    assert [b["steps"] for b in entries(trace, "training_batches") if b["labels"]] == [(0, 1), (1, 2), (2, 4)]


def test_the_score_is_watched_without_labels(play):
    looks = entries(play(), "validate")
    assert [(look["stage"], look["step"], look["steps"]) for look in looks] == [("adapt", n, 4) for n in (1, 2, 3, 4)]
    assert all(look["model"] and not look["views"].labelled and look["views"].label_dir is None for look in looks)


def test_pseudo_labels_are_those_of_the_equations(play):
    """Written labels and what the log says of them, once more from the model that labelled, in two ways around."""
    entry = entries(play("--rounds", 1, "--portion", 0.4), "label_target")[0]
    model = Tiny()
    model.load_state_dict(entry["weights"])
    model.eval()
    dataset = common.ToyStreets("target", "train", (32, 64), images=12, labelled=True)
    with torch.no_grad():
        items = [dataset[i] for i in range(12)]
        images = torch.stack([item["image"] for item in items])
        up = lambda logits: F.interpolate(logits, (32, 64), mode="bilinear").softmax(1)
        prob = (up(model(images)[1]) + up(model(images.flip(3))[1].flip(3))) / 2
    confidence, predicted = prob[::4, :, ::8, ::8].max(1)
    tau = class_thresholds(confidence.flatten(), predicted.flatten(), 16, 0.4)
    expected = pseudo_labels(prob, tau)
    written = torch.stack([torch.from_numpy(common.read_label(path)) for path in sorted(entry["folder"].iterdir())])
    assert (written == expected).float().mean() > 0.999 and (written == 255).any()
    truth, kept = torch.stack([item["label"] for item in items]), written != 255
    assert entry["out"]["portion"] == 0.4
    assert entry["out"]["kept"] == pytest.approx(kept.float().mean().item())
    assert entry["out"]["accuracy"] == pytest.approx((written == truth)[kept].float().mean().item())
    each = [(truth == c)[written == c].float().mean().item() for c in range(16) if (written == c).any()]
    assert len(each) > 2 and entry["out"]["accuracy_classes"] == pytest.approx(sum(each) / len(each))


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


@pytest.mark.parametrize("policy, every", [("live", 2), ("target", 3)])
def test_stopped_before_any_step_and_resumed_the_run_ends_the_same(play, policy, every):
    flags = ["--batch-norm", policy, "--save-every", every, "--optimizer", "adamw"]
    play(*flags, out="whole")
    saved = lambda name: load(play.folder / name / "last.pt")
    whole = saved("whole")
    for stop_at in range(0, 8, every):
        with pytest.raises(Stop):
            play(*flags, out=f"cut{stop_at}", stop_at=stop_at)
        play(*flags, "--resume", out=f"cut{stop_at}")
        cut = saved(f"cut{stop_at}")
        assert not differ(whole["model"], cut["model"]) and not differ(whole["head"], cut["head"]), stop_at


def test_a_finished_run_resumed_tells_the_same_again(play):
    first = entries(play(), "compare")[0]
    again = play("--resume")
    assert not entries(again, "step_losses") and not entries(again, "label_target")
    assert entries(again, "compare")[0]["meters"] == first["meters"]
    assert not differ(first["source"].state_dict(), entries(again, "compare")[0]["source"].state_dict())


@pytest.mark.parametrize("flag, value", [
    ("--sigma", "0"), ("--sigma", "nan"), ("--alpha", "-1"), ("--epsilon", "0"), ("--lambda-mm", "-1"),
    ("--lambda-sma", "inf"), ("--lambda-t", "nan"), ("--w-own", "-1"), ("--portion", "1.5"), ("--portion-step", "-0.1"),
    ("--portion-max", "nan"), ("--modes", "0"), ("--embedding", "0"), ("--pairs", "0"), ("--pixels", "0"),
    ("--rounds", "0"), ("--iterations", "-1"), ("--head-iterations", "-1"), ("--joint-iterations", "x"), ("--lr", "0"),
    ("--align-over", "none")])
def test_nonsense_is_refused(monkeypatch, capsys, flag, value):
    monkeypatch.setattr(sys, "argv", ["drsl.py", f"{flag}={value}"])
    with pytest.raises(SystemExit):
        drsl.parse_args()
    assert flag in capsys.readouterr().err


# --------------------------------------------------- the script -----------------------------------------------------

FEW = [*TINY, "--warmup-iterations", 2, "--head-iterations", 2, "--joint-iterations", 1, "--rounds", 2,
       "--iterations", 4]


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
    panel = Image.open(folder / "panel.png")
    assert panel.width > 4 * 300  # image | truth | source only | DRSL
    for line in (line for line in lines if line["stage"] == "adapt"):  # DRSL-10 with the defaults
        expected = line["ce_s"] + line["ce_t"] + 0.3 * (line["mm_s"] + line["mm_t"]) + line["sma"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)


@exact
def test_init_is_the_same_as_training_the_source_model_here(tmp_path, start, uninterrupted):
    run(tmp_path, "drsl.py", *FEW, "--init", start, "--out", "given")
    for folder in (uninterrupted / "run", tmp_path / "given"):
        assert same_weights(start, folder / "source_only.pt")
    assert same_weights(uninterrupted / "run/last.pt", tmp_path / "given/last.pt")


@exact
def test_killed_and_resumed_the_run_ends_the_same(tmp_path, uninterrupted):
    """One run, killed by SIGKILL in several stages in turn, and once by Ctrl-C."""
    arguments = ["drsl.py", *FEW, "--save-every", 1, "--out", "cut"]
    for stage, lines in (("modes", 1), ("round 1", 1), ("adapt", 3)):
        resume = ["--resume"] if stage != "modes" else []
        how = signal.SIGINT if lines == 3 else signal.SIGKILL
        code, errors = kill_when(tmp_path, lambda: logged(tmp_path / "cut", stage, lines), *arguments, *resume,
                                 with_signal=how)
    assert code == 1 and "--resume" in errors and "Traceback" not in errors
    run(tmp_path, *arguments, "--resume")
    for name in ("source_only.pt", "modes.pt", "last.pt"):
        assert same_weights(tmp_path / "cut" / name, uninterrupted / "run" / name)


@pytest.mark.parametrize("source, classes", [("synthia", 16), ("gta5", 19)])
def test_real_formats_from_start_to_end(tmp_path, source, classes):
    write_synthia(tmp_path)
    write_gta5(tmp_path)
    write_cityscapes(tmp_path)
    for path in (tmp_path / "cityscapes/gtFine/train").rglob("*.png"):
        path.write_bytes(b"closed")  # an adaptation that opened a target training label would stop here
    run(tmp_path, "drsl.py", "--source", source, "--data-root", tmp_path, "--backbone", "resnet18",
        "--backbone-weights", "none", "--workers", 0, *FEW, "--rounds", 1, "--iterations", 1)
    scores = result(tmp_path / f"runs/drsl-{source}-s0")
    assert len(scores["iou"]) == classes and ("miou13" in scores) == (source == "synthia")
    assert "noise" not in scores["meters"] and scores["meters"]["effective_modes_source"] >= 1


def test_two_processes_share_one_run(tmp_path, start):
    """What is counted is one process's; the network and the head learn as one process's; the mode warm-up runs."""
    arguments = [*FEW, *SPLITTABLE, "--init", start, "--rounds", 1, "--lr", 0.02, "--ramp", 0,
                 "--lambda-mm", 0.1, "--lambda-sma", 0.1, "--pairs", 1024, "--joint-iterations", 0]
    run(tmp_path, "drsl.py", *arguments, "--head-iterations", 0, "--out", "one")
    run_as_two(tmp_path, "drsl.py", *arguments, "--head-iterations", 0, "--out", "two")
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
    run_as_two(tmp_path, "drsl.py", *arguments, "--head-iterations", 1, "--joint-iterations", 1, "--iterations", 1,
               "--out", "modes")
