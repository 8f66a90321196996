"""drsl.py: every equation against an independent computation, its gradient routing and its degenerate cases.

Property names such as P-M1 count through what a mode head on the unit sphere must obey; the numbers are closed forms.
"""

import argparse
import json
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scripts import SPLITTABLE, TINY, kill_when, logged, result, run, run_as_two, same_weights, trained_alike
from trees import write_cityscapes, write_gta5, write_synthia

import common
import drsl
from drsl import (ModeHead, assign_modes, balanced_labels, class_thresholds, draw_modes, kmeans_modes, margin_loss,
                  mode_cross_entropy, pseudo_labels, segmentation_loss, stochastic_mode_alignment)

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


# ---------------------------------------------------- the mode head ----------------------------------------------------


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


# ----------------------------------------------------- margin loss -----------------------------------------------------


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
    assert margin_loss(distances(e, one.expand(C, K, E)), y, 0.5).item() == pytest.approx(margin_loss(distances(e, one), y, 0.5).item())


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
    assert (accuracy == 1.0 and loss.item() < 1e-6) if solved else (accuracy <= 0.75 and loss.item() == pytest.approx(1, abs=0.02))


# --------------------------------------------------- mode cross-entropy ---------------------------------------------------


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
@pytest.mark.parametrize("posterior", ["soft", "max"])
def test_mode_cross_entropy_of_equal_modes(classes, expected, posterior):
    R = unit(1, E).expand(classes, K, E)
    value = mode_cross_entropy(distances(unit(9, E, seed=3), R), labels(9, classes=classes), 0.3, posterior)
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
    e, R, y = unit(50, E), unit(C, K, E, seed=2), labels(50)
    d2 = distances(e, R)
    for c in range(C):  # every class as likely as any other
        each = [math.exp(-mode_cross_entropy(d2[i:i + 1], torch.tensor([c]), 100.0).item()) for i in range(5)]
        assert max(abs(P - 1 / C) for P in each) <= 7e-6
    nearest = d2.min(2).values.argmin(1)
    single = [torch.stack([mode_cross_entropy(d2[i:i + 1], torch.tensor([c]), 0.02) for c in range(C)]).argmin() for i in range(50)]
    assert torch.equal(torch.stack(single), nearest)  # the likeliest class is that of the nearest mode
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
    assert mode_cross_entropy(one.expand(-1, -1, K), y, 0.3).item() == pytest.approx(mode_cross_entropy(one, y, 0.3).item())
    each = sum(math.exp(-mode_cross_entropy(d2[:1], torch.tensor([c]), 0.3).item()) for c in range(C))
    assert each == pytest.approx(1.0)  # the posterior sums to 1


def test_mode_cross_entropy_max_variant():  # P-C6
    R = orthogonal_modes()
    value = mode_cross_entropy(distances(R[2, 0][None], R), torch.tensor([2]), 0.5, "max").item()
    assert value == pytest.approx(7.2e-6, rel=0.02)


def test_mode_cross_entropy_pulls_to_own_modes():
    e, R = unit(1, E).requires_grad_(), unit(C, K, E, seed=2)
    before = distances(e, R)
    mode_cross_entropy(before, torch.tensor([5]), 0.3).backward()
    after = distances(F.normalize(e.detach() - 0.1 * e.grad, dim=1), R)
    assert after[0, 5].min() < before[0, 5].min()


@pytest.mark.parametrize("loss", [lambda d2, y: margin_loss(d2, y, 0.5), lambda d2, y: mode_cross_entropy(d2, y, 0.3)])
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


# ----------------------------------------------------- mode assignment -----------------------------------------------------


def test_assignment_is_the_argmin_inside_the_own_class():
    d2, y = torch.rand(50, C, K), labels(50)
    y[3] = 255
    m = assign_modes(d2, y)
    assert all(m[i] == d2[i, y[i]].argmin() for i in range(50) if y[i] != 255)
    others = torch.rand(50, C, K)  # P-Q4: other classes' distances never matter
    others[torch.arange(50), y.clamp(max=C - 1)] = d2[torch.arange(50), y.clamp(max=C - 1)]
    keep = y != 255
    assert torch.equal(assign_modes(others, y)[keep], m[keep])


def test_stochastic_assignment():
    d2, y = torch.rand(50, C, K), labels(50)
    assert torch.equal(draw_modes(d2, y, 1e-3), assign_modes(d2, y))  # P-Q2
    assert draw_modes(d2[:, :, :1], y, 0.3).eq(0).all() and assign_modes(d2[:, :, :1], y).eq(0).all()  # P-Q3
    many = draw_modes(torch.zeros(30000, 1, K), torch.zeros(30000, dtype=torch.long), 0.3)  # P-Q1: equal modes -> 1/K
    torch.testing.assert_close(torch.bincount(many, minlength=K) / 30000, torch.full((K,), 1 / K), atol=0.015, rtol=0)
    some = torch.tensor([[[0.1, 0.2, 0.4]]])
    drawn = draw_modes(some.expand(30000, 1, K), torch.zeros(30000, dtype=torch.long), 0.3)
    q = torch.tensor([math.exp(-v / (2 * 0.09)) for v in (0.1, 0.2, 0.4)])
    torch.testing.assert_close(torch.bincount(drawn, minlength=K) / 30000, q / q.sum(), atol=0.015, rtol=0)


def test_assignment_carries_no_gradient_and_takes_nothing():
    d2 = torch.rand(4, C, K, requires_grad=True)
    assert not assign_modes(d2, labels(4)).requires_grad and not draw_modes(d2, labels(4), 0.3).requires_grad
    empty = torch.zeros(0, dtype=torch.long)
    assert len(assign_modes(torch.rand(0, C, K), empty)) == 0 and len(draw_modes(torch.rand(0, C, K), empty, 0.3)) == 0


# ------------------------------------------------ stochastic mode alignment ------------------------------------------------


def both(e_s, e_t, y_s=None, m_s=None, y_t=None, m_t=None, **options):
    zeros = lambda e: torch.zeros(len(e), dtype=torch.long)
    return stochastic_mode_alignment(e_s, zeros(e_s) if y_s is None else y_s, zeros(e_s) if m_s is None else m_s,
                                     e_t, zeros(e_t) if y_t is None else y_t, zeros(e_t) if m_t is None else m_t, **options)


def test_alignment_hand_values():  # P-S1
    a, b = torch.eye(4, dtype=torch.float64)[:1], torch.eye(4, dtype=torch.float64)[1:2]
    assert both(a, a).item() == 0
    assert both(a, b).item() == pytest.approx(2)
    assert both(a, -a).item() == pytest.approx(4)


def test_alignment_without_a_shared_mode_is_exactly_zero():  # P-S2
    e_s, e_t = unit(5, 8).requires_grad_(), unit(5, 8, seed=1).requires_grad_()
    one = torch.ones(5, dtype=torch.long)
    for options in ({"m_t": one}, {"y_t": one}, {"y_t": 255 * one}, {"y_s": 255 * one, "y_t": 255 * one}):
        for form in ("pairwise", "triplet", "centroid"):
            value = both(e_s, e_t, form=form, **options)
            e_s.grad = e_t.grad = None
            value.backward()
            assert value.item() == 0 and e_s.grad.abs().sum() == 0 and e_t.grad.abs().sum() == 0
    assert both(torch.zeros(0, 8), e_t).item() == 0


def test_alignment_expectation():  # P-S3
    g = torch.Generator().manual_seed(0)
    e_s, e_t = unit(50, 8) + 0.5, unit(70, 8, seed=1)
    e_s = F.normalize(e_s, dim=1)
    mu_s, mu_t = e_s.mean(0), e_t.mean(0)
    expected = (mu_s - mu_t).square().sum() + e_s.var(0, correction=0).sum() + e_t.var(0, correction=0).sum()
    assert expected.item() == pytest.approx((2 - 2 * mu_s @ mu_t).item())
    draws = torch.stack([both(e_s, e_t, generator=g) for _ in range(2000)])
    assert draws.mean().item() == pytest.approx(expected.item(), abs=4 * draws.std().item() / 2000**0.5)
    centroid = both(e_s, e_t, form="centroid").item()  # P-S8
    assert centroid == pytest.approx((mu_s - mu_t).square().sum().item()) and centroid <= expected


def test_alignment_is_a_mean_over_shared_modes_not_over_pixels():
    """Mode (0, 0) has 30 pixels at distance 2, mode (1, 2) one pixel at distance 4: the mean is 3."""
    eye = torch.eye(4, dtype=torch.float64)
    e_s = torch.cat([eye[:1].expand(30, 4), eye[1:2]])
    e_t = torch.cat([eye[2:3].expand(30, 4), -eye[1:2]])
    y, m = torch.tensor([0] * 30 + [1]), torch.tensor([0] * 30 + [2])
    for form in ("pairwise", "centroid"):
        assert both(e_s, e_t, y, m, y, m, form=form).item() == pytest.approx(3)


def test_alignment_ignores_void_and_unshared_pixels():  # P-S4
    e_s, e_t, far = unit(6, 8), unit(6, 8, seed=1), 100 * unit(3, 8, seed=2)
    zero, void = torch.zeros(6, dtype=torch.long), torch.full((3,), 255)
    for form in ("pairwise", "centroid"):
        shape = (5, 1)  # what is drawn depends on it
        value = both(e_s, e_t, form=form, generator=torch.Generator().manual_seed(3), shape=shape).item()
        with_void = both(torch.cat([e_s, far]), e_t, torch.cat([zero, void]), torch.cat([zero, void * 0]), form=form,
                         generator=torch.Generator().manual_seed(3), shape=shape).item()
        unshared = both(torch.cat([e_s, far]), e_t, torch.cat([zero, void * 0 + 4]), torch.cat([zero, void * 0]), form=form,
                        generator=torch.Generator().manual_seed(3), shape=shape).item()
        assert value == with_void == unshared
    swapped = both(e_t, e_s, form="centroid").item()
    assert swapped == pytest.approx(both(e_s, e_t, form="centroid").item())
    g, means = torch.Generator().manual_seed(4), []
    for one, other in ((e_s, e_t), (e_t, e_s), (e_s.flip(0), e_t.roll(2, 0))):  # domains swapped, pixels in another order
        draws = torch.stack([both(one, other, generator=g) for _ in range(2000)])
        means.append((draws.mean().item(), draws.std().item() / 2000**0.5))
    assert all(mean == pytest.approx(means[0][0], abs=4 * (means[0][1] + error)) for mean, error in means)


@pytest.mark.parametrize("form", ["pairwise", "triplet", "centroid"])
def test_alignment_against_a_loop(form):
    """Every group by itself, the drawn pixels looked up in lists; the shape given or read from the labels, the same."""
    classes, modes, pairs = 4, 2, 8
    e_s, e_t, y_s, y_t = unit(60, 8), unit(50, 8, seed=1), labels(60, classes=classes), labels(50, seed=2, classes=classes)
    m_s, m_t = labels(60, seed=3, classes=modes), labels(50, seed=4, classes=modes)
    y_s[::5], y_t[::6] = 255, 255
    y_s[y_s == 1] = 0  # nobody in class 1 on the source side
    value = both(e_s, e_t, y_s, m_s, y_t, m_t, form=form, pairs=pairs, alpha=2.0, generator=torch.Generator().manual_seed(5),
                 shape=(classes, modes)).item()
    read = both(e_s, e_t, y_s, m_s, y_t, m_t, form=form, pairs=pairs, alpha=2.0, generator=torch.Generator().manual_seed(5)).item()
    assert value == read
    g = torch.Generator().manual_seed(5)
    u_s, u_t, u_n = (torch.rand(classes * modes, pairs, generator=g).tolist() for _ in range(3))
    ordered = sorted((i for i in range(60) if y_s[i] != 255), key=lambda i: (y_s[i].item(), m_s[i].item(), i))
    terms = []
    for c in range(classes):
        for k in range(modes):
            own_s = [i for i in range(60) if y_s[i] == c and m_s[i] == k]
            own_t = [i for i in range(50) if y_t[i] == c and m_t[i] == k]
            others = [i for i in ordered if y_s[i] != c]
            if not own_s or not own_t:
                continue
            if form == "centroid":
                terms.append((e_s[own_s].mean(0) - e_t[own_t].mean(0)).square().sum().item())
                continue
            row, each = c * modes + k, []
            for j in range(pairs):
                a, b = own_s[int(u_s[row][j] * len(own_s))], own_t[int(u_t[row][j] * len(own_t))]
                n = others[int(u_n[row][j] * len(others))]
                positive, negative = ((e_s[i] - e_t[b]).square().sum().item() for i in (a, n))
                each.append(positive if form == "pairwise" else max(0.0, positive - negative + 2.0))
            terms.append(sum(each) / pairs)
    assert len(terms) == 6
    assert value == pytest.approx(sum(terms) / len(terms))


@pytest.mark.parametrize("form", ["pairwise", "triplet", "centroid"])
def test_alignment_never_reads_a_value(form):
    """On the device "meta" tensors have no values: what would make a GPU wait for one fails."""
    e, y = torch.zeros(10, 8, device="meta", requires_grad=True), torch.zeros(10, dtype=torch.int64, device="meta")
    d2 = torch.zeros(10, C, K, device="meta")
    m_s, m_t = assign_modes(d2, y), draw_modes(d2, y, 0.3)
    both(e, e, y, m_s, y, m_t, form=form, shape=(C, K)).backward()
    assert e.grad.shape == (10, 8) and drsl.count_shared_modes(y, m_s, y, m_t, (C, K)).shape == ()
    with pytest.raises(RuntimeError):
        both(e, e, y, m_s, y, m_t, form=form)  # without the shape it has to look


def test_alignment_gradient():  # P-S5
    e_s, e_t = unit(5, 8).requires_grad_(), unit(7, 8, seed=1).requires_grad_()
    y_s, y_t = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 0, 1, 1, 1])  # two shared modes: |A| = 2
    both(e_s, e_t, y_s=y_s, y_t=y_t, pairs=64, generator=torch.Generator().manual_seed(0)).backward()
    torch.testing.assert_close(e_s.grad.sum(0), -e_t.grad.sum(0))
    g = torch.Generator().manual_seed(0)
    u_s, u_t = torch.rand(2, 64, generator=g).tolist(), torch.rand(2, 64, generator=g).tolist()
    expected = torch.zeros(5, 8, dtype=torch.float64)
    for mode, (first_s, n_s, first_t, n_t) in enumerate(((0, 3, 0, 4), (3, 2, 4, 3))):
        for j in range(64):
            i, k = first_s + int(u_s[mode][j] * n_s), first_t + int(u_t[mode][j] * n_t)
            expected[i] += 2 / (64 * 2) * (e_s[i] - e_t[k]).detach()
    torch.testing.assert_close(e_s.grad, expected)
    stopped = unit(5, 8).requires_grad_()
    both(stopped.detach(), e_t).backward()
    assert stopped.grad is None


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
    spread = {M: torch.stack([both(e_s, e_t, pairs=M, generator=g) for _ in range(600)]).var().item() for M in (16, 64, 256)}
    assert spread[16] / spread[64] == pytest.approx(4, rel=0.35) and spread[64] / spread[256] == pytest.approx(4, rel=0.35)


def test_triplet_alignment():
    """One pixel per class: positive and negative are certain, so the loss is a hand value."""
    eye = torch.eye(4, dtype=torch.float64)
    y, m = torch.tensor([0, 1]), torch.tensor([0, 0])
    e_s, e_t = eye[:2].clone().requires_grad_(), torch.stack([eye[0], eye[2]]).requires_grad_()
    # class 0: |e_t - e_s0|^2 - |e_t - e_s1|^2 = 0 - 2; class 1: 2 - 2
    value = both(e_s, e_t, y, m, y, m, form="triplet", alpha=0.5)
    assert value.item() == pytest.approx((0 + 0.5) / 2)
    value.backward()
    assert e_s.grad[0].abs().sum() > 0  # it is class 1's negative
    only = both(e_s[:1], e_t[:1], form="triplet")
    assert only.item() == 0  # no other class in the batch: nothing to compare with


def test_triplet_negatives_come_from_every_other_class_and_never_the_own():
    n = 400
    y_s, m_s = labels(n, classes=5), torch.zeros(n, dtype=torch.long)
    e_s = F.one_hot(y_s, 5).double().requires_grad_()
    target = F.one_hot(torch.tensor([2]), 5).double()
    value = both(e_s, target, y_s, m_s, torch.tensor([2]), torch.tensor([0]), form="triplet", pairs=2000, alpha=3.0)
    assert value.item() == pytest.approx(0 - 2 + 3)  # each negative at distance 2: none from class 2, at distance 0
    value.backward()
    assert all(e_s.grad[y_s == c].abs().sum() > 0 for c in (0, 1, 3, 4))


# ------------------------------------------------------- segmentation -------------------------------------------------------


def test_segmentation_loss():
    logits = torch.randn(2, C, 5, 6, dtype=torch.float64).float()
    label = torch.randint(0, C, (2, 40, 48))
    label[:, :7] = 255
    up = F.interpolate(logits, (40, 48), mode="bilinear", align_corners=True)
    torch.testing.assert_close(segmentation_loss(logits, label), F.cross_entropy(up, label, ignore_index=255))
    ignored = logits.clone()
    ignored[:, :, 0] += 9  # the first grid row reaches image rows 0 to 9 only
    far = label.clone()
    far[:, :10] = 255
    torch.testing.assert_close(segmentation_loss(ignored, far), segmentation_loss(logits, far))  # P-G6
    assert segmentation_loss(torch.zeros(1, C, 2, 2), torch.zeros(1, 16, 16, dtype=torch.long)).item() == pytest.approx(math.log(C))  # P-G1
    twice = segmentation_loss(logits.repeat(2, 1, 1, 1), label.repeat(2, 1, 1))  # P-G3
    torch.testing.assert_close(twice, segmentation_loss(logits, label))
    torch.testing.assert_close(segmentation_loss(logits + 3, label), segmentation_loss(logits, label))  # P-G5


def test_segmentation_loss_over_nothing():  # P-G2
    logits = torch.randn(1, C, 2, 2, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 16, 16), 255))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


# ------------------------------------------------------ pseudo-labels ------------------------------------------------------


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


# ---------------------------------------------------------- k-means ----------------------------------------------------------


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


# ------------------------------------------------------ pixel sampling ------------------------------------------------------


def test_balanced_labels():
    label = torch.tensor([0] * 30 + [1] * 5 + [255] * 5).view(1, 5, 8).repeat(3, 1, 1)
    label[2] = 255
    kept = balanced_labels(label, (5, 8), 7, torch.rand(3, 5, 8))
    assert kept.shape == (3, 5, 8) and ((kept == label) | (kept == 255)).all() and kept[2].eq(255).all()
    for image in kept[:2]:
        assert torch.bincount(image[image != 255]).tolist() == [7, 5]
    assert torch.equal(balanced_labels(label, (5, 8), 40, torch.rand(3, 5, 8)), label)
    often = torch.stack([balanced_labels(label[:1], (5, 8), 7, torch.rand(1, 5, 8)).flatten()[:30] != 255 for _ in range(300)])
    often = often.float().mean(0)
    assert often.min() > 0.1 and often.max() < 0.4  # each road pixel about 7 times in 30: no favourites


def test_balanced_labels_keep_the_smallest_random_numbers():
    label, u = torch.tensor([3, 3, 3, 7, 7, 255]).view(1, 1, 6), torch.tensor([0.5, 0.1, 0.9, 0.8, 0.2, 0.0]).view(1, 1, 6)
    assert balanced_labels(label, (1, 6), 1, u).flatten().tolist() == [255, 3, 255, 255, 7, 255]


def test_mode_losses_regularize_the_shared_network():
    """Their gradient reaches the backbone through the head; only the representatives are spared weight decay."""
    model, head = common.DeepLabV2(5, "resnet18"), ModeHead(512, 5, modes=2, embedding=8)
    e = common.as_pixels(head(model(torch.randn(2, 3, 32, 64))[0]))
    y = balanced_labels(torch.randint(0, 5, (2, 32, 64)), (4, 8), 32, torch.rand(2, 4, 8)).flatten()
    args = argparse.Namespace(alpha=0.5, sigma=0.3, posterior="soft", w_m=1.0, w_c=1.0, optimizer="sgd", head_lr=10.0)
    drsl.mode_loss(head.squared_distances(e), y, args).backward()
    assert model.backbone[0].weight.grad.abs().sum() > 0 and head.representatives.grad.abs().sum() > 0
    assert all(branch.weight.grad is None for branch in model.classifier)
    groups = drsl.make_optimizer_with_modes(model, head, args).param_groups
    assert [g["weight_decay"] for g in groups if any(p is head.representatives for p in g["params"])] == [0.0]
    assert sum(len(g["params"]) for g in groups) == len([*model.parameters(), *head.parameters()])


def test_shared_modes_are_counted():
    y_s, m_s, y_t, m_t = (torch.tensor(v) for v in ([0, 0, 1, 2, 255], [0, 1, 1, 0, 0], [0, 1, 2, 255], [1, 1, 1, 0]))
    assert drsl.count_shared_modes(y_s, m_s, y_t, m_t, (3, 2)).item() == 2
    assert drsl.count_shared_modes(y_s[:0], m_s[:0], y_t, m_t, (3, 2)).item() == 0


def test_labels_reach_the_grid_by_nearest_neighbour():
    label = torch.arange(16 * 24).view(1, 16, 24) % 250
    assert torch.equal(balanced_labels(label, (2, 3), 9, torch.rand(1, 2, 3)), label[:, ::8, ::8])


# -------------------------------------------------------- the script --------------------------------------------------------

FEW = [*TINY, "--warmup-iterations", 2, "--head-iterations", 2, "--joint-iterations", 1, "--rounds", 2, "--iterations", 4]


def test_one_command_runs_all_stages(tmp_path):
    out = run(tmp_path, "drsl.py", *FEW)
    folder = tmp_path / "runs/drsl-toy-s0"
    assert {"args.json", "log.jsonl", "source_only.pt", "modes.pt", "last.pt", "panel.png", "result.json"} <= {
        p.name for p in folder.iterdir()}
    assert list(result(folder)["columns"]) == ["source only", "+ BN target", "DRSL"]
    assert "source only" in out and "DRSL" in out and "motorcycle" in out
    rounds = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if '"round' in line]
    assert [r["portion"] for r in rounds] == pytest.approx([0.3, 0.4])  # DRSL-16
    assert all(0 < r["kept"] <= 1 and 0 <= r["accuracy"] <= 1 for r in rounds)
    files = sorted((folder / "pseudo_labels/round1").iterdir())
    assert len(files) == 24 and common.read_label(files[0]).shape == (32, 64)
    panel = Image.open(folder / "panel.png")
    assert panel.width > 4 * 300  # image | truth | source only | DRSL


def test_the_total_loss_is_assembled_as_written(tmp_path, start):  # DRSL-10
    weights = {"t": 0.7, "mm": 0.3, "sma": 0.2}
    run(tmp_path, "drsl.py", *FEW, "--init", start, "--out", "run", *[w for k, v in weights.items() for w in (f"--lambda-{k}", v)])
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines() if '"adapt"' in line]
    assert len(lines) == 4 and all(line["mm_s"] > 0 and line["mm_t"] > 0 and line["sma"] > 0 for line in lines)
    for line in lines:
        expected = line["ce_s"] + 0.7 * line["ce_t"] + 0.3 * (line["mm_s"] + line["mm_t"]) + 0.2 * line["sma"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)


def test_init_is_the_same_as_training_the_source_model_here(tmp_path, start):
    run(tmp_path, "drsl.py", *FEW, "--out", "here")
    run(tmp_path, "drsl.py", *FEW, "--init", start, "--out", "given")
    assert same_weights(start, tmp_path / "here/source_only.pt") and same_weights(start, tmp_path / "given/source_only.pt")
    assert same_weights(tmp_path / "here/last.pt", tmp_path / "given/last.pt")


def test_killed_at_every_stage_and_resumed_the_run_ends_the_same(tmp_path, uninterrupted):
    """One run, killed by SIGKILL in each stage in turn."""
    arguments = ["drsl.py", *FEW, "--save-every", 1, "--out", "cut"]
    for stage, lines in (("source", 1), ("modes", 1), ("round 1", 1), ("adapt", 1), ("adapt", 3)):
        resume = ["--resume"] if stage != "source" else []
        kill_when(tmp_path, lambda: logged(tmp_path / "cut", stage, lines), *arguments, *resume)
    run(tmp_path, *arguments, "--resume")
    for name in ("source_only.pt", "modes.pt", "last.pt"):
        assert same_weights(tmp_path / "cut" / name, uninterrupted / name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder, "drsl.py", *FEW, "--out", "run")
    return folder / "run"


def test_the_network_stands_still_while_the_head_warms_up(tmp_path, start):
    few = [*FEW, "--init", start, "--joint-iterations", 0]
    run(tmp_path, "drsl.py", *few, "--out", "run")
    run(tmp_path, "drsl.py", *few, "--lambda-mm", 0.5, "--out", "other")
    assert same_weights(start, tmp_path / "run/modes.pt")
    heads = [torch.load(tmp_path / name / "modes.pt", weights_only=True)["head"] for name in ("run", "other")]
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])  # the warm-up does not depend on lambda_mm
    assert not torch.equal(heads[0]["representatives"], torch.zeros_like(heads[0]["representatives"]))


def test_ctrl_c_and_resume(tmp_path, uninterrupted):
    arguments = ["drsl.py", *FEW, "--save-every", 100, "--out", "cut"]
    code, errors = kill_when(tmp_path, lambda: logged(tmp_path / "cut", "adapt", 1), *arguments, with_signal=signal.SIGINT)
    assert code == 1 and "--resume" in errors and "Traceback" not in errors
    run(tmp_path, *arguments, "--resume")
    assert same_weights(tmp_path / "cut/last.pt", uninterrupted / "last.pt")


@pytest.mark.parametrize("flags", [
    ["--lambda-mm", 0, "--lambda-sma", 0, "--precision", "bf16"],
    ["--lambda-sma", 0, "--assignment", "stochastic", "--posterior", "max", "--sigma", 0.5, "--modes", 1, "--w-m", 0],
    ["--lambda-mm", 0, "--alignment", "triplet", "--head-iterations", 0, "--joint-iterations", 0],
    ["--alignment", "centroid", "--stop-gradient", "--freeze-bn", "--mode-start", "random"],
])
def test_every_alternative_runs(tmp_path, start, flags):
    run(tmp_path, "drsl.py", *FEW, "--iterations", 2, "--init", start, *flags, "--out", "run")
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    plain = {"--lambda-mm", "--lambda-sma"} <= set(flags)
    assert ("sma" in lines[-1]) != plain and (tmp_path / "run/modes.pt").exists() != plain


def test_alignment_moves_both_domains_unless_asked_otherwise(tmp_path, start):
    for name, flags in (("both", []), ("target", ["--stop-gradient"])):
        run(tmp_path, "drsl.py", *FEW, "--init", start, "--rounds", 1, "--iterations", 2, "--lambda-sma", 1, *flags, "--out", name)
    assert not same_weights(tmp_path / "both/last.pt", tmp_path / "target/last.pt")


def test_real_formats_from_start_to_end(tmp_path):
    write_synthia(tmp_path)
    write_gta5(tmp_path)
    write_cityscapes(tmp_path)
    for path in (tmp_path / "cityscapes/gtFine/train").rglob("*.png"):
        path.write_bytes(b"closed")  # an adaptation that opened a target training label would stop here
    for source, classes in (("synthia", 16), ("gta5", 19)):
        run(tmp_path, "drsl.py", "--source", source, "--data-root", tmp_path, "--backbone", "resnet18", "--backbone-weights", "none",
            "--workers", 1, *FEW)
        scores = result(tmp_path / f"runs/drsl-{source}-s0")
        assert len(scores["iou"]) == classes and ("miou13" in scores) == (source == "synthia")


def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path, start):
    write_gta5(tmp_path)
    write_cityscapes(tmp_path)
    real = ["--source", "gta5", "--data-root", tmp_path, "--backbone", "resnet18", "--backbone-weights", "none", *FEW]
    message = run(tmp_path, "drsl.py", *real, "--init", start, ok=False)
    assert "last.pt" in message and "16 classes" in message and "19" in message
    message = run(tmp_path, "drsl.py", *FEW, "--backbone", "resnet50", "--init", start, ok=False)
    assert "resnet18" in message and "resnet50" in message
    assert "gone.pt" in run(tmp_path, "drsl.py", *FEW, "--init", "gone.pt", ok=False)
    message = run(tmp_path, "drsl.py", *FEW, "--init", start, "--toy-world", 1, ok=False)
    assert "--toy-world 0" in message and "--toy-world 1" in message
    torch.save({**torch.load(start, weights_only=True), "oracle": True}, tmp_path / "oracle.pt")
    assert "trained on target labels" in run(tmp_path, "drsl.py", *FEW, "--init", "oracle.pt", ok=False)
    (tmp_path / "file").touch()
    assert "--out names a folder" in run(tmp_path, "drsl.py", *FEW, "--out", "file", ok=False)


@pytest.mark.parametrize("form", ["pairwise", "triplet"])
def test_two_processes_share_one_run(tmp_path, start, form):
    """They draw the pixels that one process would draw, and partners of a mode are found across them."""
    arguments = [*FEW, "--toy-images", 20, *SPLITTABLE, "--init", start, "--rounds", 1, "--lr", 0.02, "--ramp", 0, "--alignment", form,
                 "--lambda-mm", 1, "--lambda-sma", 1, "--assignment", "stochastic"]
    run(tmp_path, "drsl.py", *arguments, "--out", "one")
    run_as_two(tmp_path, "drsl.py", *arguments, "--out", "two")
    assert trained_alike(start, tmp_path / "one/last.pt", tmp_path / "two/last.pt")
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True)["head"] for name in ("one", "two"))
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-2)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    for one, two in zip(*logs):
        for key in ("kept", "mm", "mm_s", "mm_t", "shared", "sma", "loss"):
            assert one.get(key, 0) == pytest.approx(two.get(key, 0), rel=1e-2), key
    assert len(list((tmp_path / "two/pseudo_labels/round1").iterdir())) == 20
