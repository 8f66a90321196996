"""sdca.py: every equation against an independent computation, every wire of a training step and of main().

Property names such as P5 count through section "checkable properties" of the project's notes on SDCA; the reference
values are loops, closed forms, quadrature or hand values in float64.
"""

import argparse
import json
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scripts import (SPLITTABLE, TINY, exact, kill_when, load, logged, result, run, run_as_two, same_weights,
                     trained_alike)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from trees import write_cityscapes, write_gta5, write_synthia

import common
import sdca
from sdca import (ClassStatistics, class_thresholds, confidence_histogram, contrastive_bound, cosines, falling_order,
                  lovasz_softmax, online_labels, pseudo_labels, source_loss)

C, D = 19, 32


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n, seed=1, classes=C):
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))


def gaussians(classes=C, dim=D, seed=2):
    """Means (C, D) and variances (C, D) of some classes."""
    return randn(classes, dim, seed=seed), randn(classes, dim, seed=seed + 1).square()


def raw_bound(f, y, mean, variance=None, tau=1.0):
    """SDCA-5 for what is given, without the normalisation."""
    return contrastive_bound(f, y, mean, variance, tau, normalise=False)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is created inside."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


# ------------------------------------------------- class statistics -------------------------------------------------


def stream(seed=0):
    """Batches of uneven size with void pixels; class 7 never occurs, the means are far from zero."""
    sizes = (1, 40, 300, 17, 128)
    batches = [(5 + 3 * randn(n, D, seed=10 * seed + i), labels(n, seed=100 + i)) for i, n in enumerate(sizes)]
    for _, y in batches:
        y[y == 7] = 6
        y[3::5] = 255
    return batches


def collected(batches):
    statistics = ClassStatistics(C, D)
    for features, y in batches:
        statistics.update(features, y)
    return statistics


def assert_same(one, other, atol=1e-12):
    assert torch.equal(one.count, other.count)
    torch.testing.assert_close(one.mean, other.mean, atol=atol, rtol=0)
    torch.testing.assert_close(one.variance, other.variance, atol=atol, rtol=0)


def test_statistics_carry_no_graph():
    statistics = ClassStatistics(C, D)
    statistics.update(randn(40, D).requires_grad_(), labels(40))
    assert not statistics.mean.requires_grad and not statistics.variance.requires_grad


def test_statistics_of_three_processes_are_pooled_exactly(monkeypatch):
    """Three threads are processes of 1, 40 and 300 pixels; their sum over processes waits until all have come."""
    barrier, given = threading.Barrier(3), {}

    def all_sum(tensor):
        given[threading.get_ident()] = tensor
        barrier.wait(60)
        total = sum(given.values())
        barrier.wait(60)
        return total

    monkeypatch.setattr(common, "all_sum", all_sum)
    batches = stream()[:3]
    with ThreadPoolExecutor(3) as pool:
        everybody = list(pool.map(sdca.pooled, [collected([batch]) for batch in batches]))
    for statistics in everybody:
        assert_same(statistics, collected(batches))


def test_one_process_pools_its_own():
    statistics = collected(stream())
    everybody = sdca.pooled(statistics)
    assert_same(everybody, statistics, atol=0)
    everybody.count += 1
    assert not torch.equal(everybody.count, statistics.count)  # a copy


def test_streamed_statistics_are_those_of_all_pixels():  # P1
    batches = stream()
    statistics = collected(batches)
    features, y = torch.cat([f for f, _ in batches]), torch.cat([y for _, y in batches])
    assert statistics.count.dtype == torch.int64 and statistics.count.tolist() == [(y == c).sum() for c in range(C)]
    for c in range(C):
        mine = features[y == c]
        if c == 7:
            assert not statistics.mean[c].any() and not statistics.variance[c].any() and statistics.count[c] == 0
        else:
            torch.testing.assert_close(statistics.mean[c], mine.mean(0), atol=1e-12, rtol=0)
            torch.testing.assert_close(statistics.variance[c], mine.var(0, correction=0), atol=1e-12, rtol=0)


def test_statistics_depend_neither_on_order_nor_on_grouping():  # P2
    batches = stream()
    whole = collected(batches)
    assert_same(collected(batches[::-1]), whole)
    for cut in (1, 3):
        one, two = collected(batches[:cut]), collected(batches[cut:])
        one.merge(two)
        assert_same(one, whole)
    empty = ClassStatistics(C, D)
    empty.merge(whole)
    assert_same(empty, whole, atol=0)


@pytest.mark.parametrize("n, y", [(0, []), (3, [255] * 3)])  # P2
def test_nothing_new_changes_nothing(n, y):
    statistics, whole = collected(stream()), collected(stream())
    statistics.update(randn(n, D), torch.tensor(y, dtype=torch.long))
    assert_same(statistics, whole, atol=0)


def test_one_pixel_has_no_variance():
    statistics = ClassStatistics(2, 3)
    statistics.update(torch.tensor([[1.0, 2, 3]]), torch.tensor([1]))
    assert statistics.mean.tolist() == [[0, 0, 0], [1, 2, 3]] and statistics.variance.abs().sum() == 0
    statistics.update(torch.tensor([[3.0, 2, 7]]), torch.tensor([1]))
    assert statistics.mean[1].tolist() == [2, 2, 5] and statistics.variance[1].tolist() == [1, 0, 4]


def test_variance_does_not_cancel_in_float32():
    """Mean 1000, deviation 0.1: E[r^2] - m^2 in float32 has an error of 0.06, six times the variance."""
    features = (1000 + 0.1 * randn(4000, 4)).float()
    statistics = ClassStatistics(1, 4)
    for part in features.split(500):
        statistics.update(part, torch.zeros(500, dtype=torch.long))
    torch.testing.assert_close(statistics.variance[0], features.double().var(0, correction=0), rtol=2e-3, atol=0)


def test_counts_go_on_above_two_to_the_24():
    statistics, one = ClassStatistics(1, 1), ClassStatistics(1, 1)
    statistics.count += 2**24
    one.update(torch.ones(1, 1), torch.zeros(1, dtype=torch.long))
    statistics.merge(one)
    assert statistics.count.item() == 2**24 + 1 and torch.tensor(2.0**24) + 1 == 2**24
    assert statistics.mean.item() == pytest.approx(1 / (2**24 + 1), rel=1e-12)


def test_statistics_are_detached_and_stored_exactly(tmp_path):
    statistics = collected(stream())
    statistics.update(randn(5, D).requires_grad_(), labels(5))
    assert not statistics.mean.requires_grad and not statistics.variance.requires_grad
    torch.save(statistics.state_dict(), tmp_path / "s.pt")
    again = ClassStatistics(C, D)
    again.load_state_dict(load(tmp_path / "s.pt"))
    assert_same(again, statistics, atol=0)
    for s in (again, statistics):
        s.update(*stream(seed=1)[2])
    assert_same(again, statistics, atol=0)


def test_no_tensor_has_an_axis_for_pixels_classes_and_dimensions():
    n = 500
    with LargestTensor() as largest:
        ClassStatistics(C, D).update(randn(n, D), labels(n))
    assert n * C <= largest.elements <= n * D
    f = randn(n, D).requires_grad_()
    with LargestTensor() as largest:
        contrastive_bound(f, labels(n), *gaussians()).backward()
    assert largest.elements <= n * D


# ---------------------------------------------------- the bound -----------------------------------------------------


def by_loop(f, y, mean, variance, tau, full=False):
    """SDCA-4 and SDCA-5 from the definitions, pixel by pixel. variance (C, D), or (C, D, D) if full."""
    terms = []
    for i in range(len(f)):
        if y[i] != 255:
            quadratic = [(f[i] @ (variance[k] if full else variance[k].diag()) @ f[i]).item() for k in range(len(mean))]
            z = [(f[i] @ mean[k]).item() / tau + quadratic[k] / (2 * tau**2) for k in range(len(mean))]
            terms.append(math.log(sum(map(math.exp, z))) - (f[i] @ mean[y[i]]).item() / tau)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("tau", [0.5, 1.0, 100.0])
def test_bound_against_a_loop(tau):
    f, y, (mean, variance) = randn(40, D), labels(40), gaussians()
    y[::7] = 255
    expected = by_loop(0.2 * f, y, mean, variance, tau)
    assert raw_bound(0.2 * f, y, mean, variance, tau).item() == pytest.approx(expected, abs=1e-12)
    unit = [F.normalize(t, dim=1) for t in (f, mean, variance)]
    expected = by_loop(unit[0], y, *unit[1:], tau)
    assert contrastive_bound(f, y, mean, variance, tau).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0, 100.0])  # P3
def test_two_forms_of_the_bound_agree(tau):
    f, y, (mean, variance) = F.normalize(randn(50, D), dim=1), labels(50), gaussians()
    z = f @ mean.T / tau + f**2 @ variance.T / (2 * tau**2)
    code_form = F.cross_entropy(z, y) + (f**2 * variance[y]).sum(1).mean() / (2 * tau**2)
    torch.testing.assert_close(raw_bound(f, y, mean, variance, tau), code_form, atol=1e-12, rtol=1e-14)


def test_zero_covariance_is_the_contrast_of_prototypes():  # P4
    f, y, (mean, variance) = randn(50, D), labels(50), gaussians()
    expected = F.cross_entropy(F.normalize(f, dim=1) @ F.normalize(mean, dim=1).T / 0.3, y)
    torch.testing.assert_close(contrastive_bound(f, y, mean, None, 0.3), expected)
    torch.testing.assert_close(contrastive_bound(f, y, mean, 0 * variance, 0.3), expected)
    assert contrastive_bound(f, y, mean, variance, 0.3) > expected + 0.01


def expectation(f, y, mean, variance, tau):
    """SDCA-3 of one pixel by Gauss-Hermite quadrature: the positive enters only through s = f.m+ / tau, a Gaussian."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    linear, quadratic = mean @ f / tau, variance @ f**2 / tau**2  # (C,)
    others = [k for k in range(len(mean)) if k != y]
    negatives = (linear + quadratic / 2)[others].logsumexp(0)
    s = linear[y] + quadratic[y].sqrt() * nodes
    return (weights * (torch.logaddexp(s, negatives) - s)).sum().item()


def test_bound_lies_above_the_expectation():  # P5
    mean, variance = gaussians(classes=5, dim=8)
    f = F.normalize(randn(30, 8), dim=1)
    for i, y in enumerate(labels(30, classes=5).tolist()):
        gaps = []
        for scale in (1.0, 0.1, 0.01, 0.001):
            bound = raw_bound(f[i:i + 1], torch.tensor([y]), mean, scale * variance).item()
            gaps.append(bound - expectation(f[i], y, mean, scale * variance, 1.0))
        assert all(gap > 0 for gap in gaps)
        assert gaps[2] / gaps[3] == pytest.approx(10, rel=0.1)  # linear in a small Sigma


def test_expectation_is_the_limit_of_drawn_pairs_and_few_negatives_lie_below():  # P5, SDCA-2
    mean, variance = gaussians(classes=4, dim=6)
    f, y, rounds, tau = F.normalize(randn(1, 6, seed=5), dim=1)[0], 1, 20000, 1.0
    bound = raw_bound(f[None], torch.tensor([y]), mean, variance, tau).item()

    def drawn(negatives):
        """Mean and standard error of SDCA-2 with one positive and that many negatives of each class."""
        noise = randn(rounds, negatives + 1, 4, 6, seed=negatives)
        score = ((mean + variance.sqrt() * noise) @ f / tau).exp()  # (rounds, J + 1, C)
        a = score[:, 0, y]
        others = score[:, 1:, [0, 2, 3]].mean(1).sum(1)
        values = ((a + others) / a).log()
        return values.mean().item(), values.std().item() / rounds**0.5

    few, many = drawn(1), drawn(60)
    exact = expectation(f, y, mean, variance, tau)
    assert many[0] == pytest.approx(exact, abs=4 * many[1] + 0.02 * abs(exact))
    assert few[0] < many[0] < bound + 4 * many[1] and few[0] + 4 * few[1] < bound


@pytest.mark.parametrize("tau, zero, ones", [
    (1.0, 0.3132617, 0.8132617), (0.5, 0.1269280, 2.1269280), (100.0, 0.6881597, 0.6882097)])
def test_hand_values(tau, zero, ones):  # P6
    f, y, mean = torch.tensor([[1.0, 0]], dtype=torch.float64), torch.tensor([0]), torch.eye(2, dtype=torch.float64)
    assert raw_bound(f, y, mean, torch.zeros(2, 2), tau).item() == pytest.approx(zero, abs=1e-7)
    assert raw_bound(f, y, mean, torch.ones(2, 2), tau).item() == pytest.approx(ones, abs=1e-7)
    # the authors' normalisation makes a row of ones 1 / sqrt(2) each
    expected = math.log(math.exp(1 / tau) + 1) - 1 / tau + math.sqrt(0.5) / (2 * tau**2)
    assert contrastive_bound(f, y, mean, torch.ones(2, 2), tau).item() == pytest.approx(expected, abs=1e-12)


def test_identical_classes_lower_limit_and_monotonicity():  # P7
    f, y, (mean, variance) = randn(1, D), torch.tensor([3]), gaussians()
    same_mean, same_variance = mean[:1].expand(C, D), variance[:1].expand(C, D)
    quadratic = ((f**2) @ variance[0]).item() / 2
    assert raw_bound(f, y, same_mean, same_variance).item() == pytest.approx(math.log(C) + quadratic, abs=1e-12)
    value = raw_bound(f, y, mean, variance).item()
    assert value >= ((f**2) @ variance[3]).item() / 2
    for k in (3, 8):
        for a in (0, 17):
            more = variance.clone()
            more[k, a] += 0.5
            assert raw_bound(f, y, mean, more).item() >= value
    single = raw_bound(f, torch.tensor([0]), mean[:1], variance[:1]).item()  # C = 1: nothing to contrast with
    assert single == pytest.approx(quadratic, abs=1e-12)


def test_invariances():  # P8
    f, y, (mean, variance) = randn(50, D), labels(50), gaussians()
    value = contrastive_bound(f, y, mean, variance, 0.5).item()
    for changed in ((7 * f, y, mean, variance), (f, y, 0.1 * mean, variance), (f, y, mean, 1000 * variance)):
        assert contrastive_bound(*changed, 0.5).item() == pytest.approx(value, abs=1e-12)
    order = torch.randperm(C, generator=torch.Generator().manual_seed(0))
    renamed = order.argsort()[y]
    assert contrastive_bound(f, renamed, mean[order], variance[order], 0.5).item() == pytest.approx(value, abs=1e-12)
    assert raw_bound(7 * f, y, mean, variance).item() != pytest.approx(value)  # without the normalisation length counts


def test_range_at_the_authors_temperature():  # P9, SDCA-12
    best = contrastive_bound(torch.eye(C)[:1], torch.tensor([0]), torch.eye(C)).item()
    mean = torch.cat([torch.eye(2)[1:], torch.eye(2)[:1].expand(C - 1, 2)])
    worst = contrastive_bound(torch.eye(2)[:1], torch.tensor([0]), mean).item()
    assert (best, worst) == (pytest.approx(2.93497, abs=1e-5), pytest.approx(2.95392, abs=1e-5))
    f, (mean, variance), y = randn(300, D).abs(), gaussians(), labels(300)
    mean = mean.abs()
    for i in range(300):
        assert best - 1e-6 <= contrastive_bound(f[i:i + 1], y[i:i + 1], mean).item() <= worst + 1e-6
    gain = contrastive_bound(f, y, mean, variance).item() - contrastive_bound(f, y, mean).item()
    assert 0 <= gain <= 5e-5


def test_bound_is_almost_linear_at_the_authors_temperature():  # SDCA-12
    """Near its own class mean a pixel's linear term is large; what is left falls with 1 / tau^2, for any covariance."""
    (mean, variance), y = gaussians(), labels(100)
    f = mean[y] + 0.1 * randn(100, D)
    unit, mu = F.normalize(f, dim=1), F.normalize(mean, dim=1)
    term = (unit * (mu[y] - mu.mean(0))).sum(1).mean().item()
    rest = {tau: contrastive_bound(f, y, mean, variance, tau).item() - math.log(C) + term / tau
            for tau in (100.0, 200.0)}
    assert term / 100 > 5e-3 and abs(rest[100.0]) < 2e-4
    assert rest[100.0] / rest[200.0] == pytest.approx(4, rel=0.05)


def test_gradient_reaches_labelled_features_only():  # P10
    f, y = randn(20, D).requires_grad_(), labels(20)
    mean, variance = (t.requires_grad_() for t in gaussians())
    y[::3] = 255
    contrastive_bound(f, y, mean, variance, 0.5).backward()
    assert mean.grad is None and variance.grad is None
    length = f.grad.norm(dim=1)
    assert length[::3].max() == 0 and length[y != 255].min() > 0
    assert (f.grad * f).sum(1).abs().max() < 1e-15  # normalisation: orthogonal to the feature itself
    stepped = f.detach() - 0.1 * f.grad
    assert contrastive_bound(stepped, y, mean, variance, 0.5) < contrastive_bound(f, y, mean, variance, 0.5)
    small, void = randn(4, D).requires_grad_(), torch.tensor([1, 255, 3, 0])
    assert torch.autograd.gradcheck(lambda x: contrastive_bound(x, void, mean, variance, 0.5), small)


def test_a_silent_pixel_behind_a_relu_is_harmless():
    """A feature of length zero cannot be normalised; the ReLU that made it so stops its gradient."""
    before = torch.cat([-torch.ones(1, D), torch.ones(1, D)]).requires_grad_()
    value = contrastive_bound(before.relu(), torch.tensor([0, 1]), *(t.float() for t in gaussians()))
    value.backward()
    assert torch.isfinite(value) and before.grad[0].abs().sum() == 0 and torch.isfinite(before.grad).all()


@pytest.mark.parametrize("n, y", [(0, []), (3, [255, 255, 255])])  # P10
def test_bound_over_nothing_is_a_connected_zero(n, y):
    f, y = torch.randn(n, D, requires_grad=True), torch.tensor(y, dtype=torch.long)
    value = contrastive_bound(f, y, *gaussians())
    value.backward()
    assert value.item() == 0 and f.grad.abs().sum() == 0
    own, other = cosines(f, y, gaussians()[0])
    assert own.item() == other.item() == 0


def test_diagonal_is_the_full_form_of_a_diagonal_matrix():  # P11, SDCA-6
    f, y, (mean, variance) = 0.3 * randn(20, D), labels(20), gaussians()
    full = by_loop(f, y, mean, torch.diag_embed(variance), 0.7, full=True)
    assert raw_bound(f, y, mean, variance, 0.7).item() == pytest.approx(full, abs=1e-12)


def test_class_without_statistics_competes_with_logit_zero():
    f, y, (mean, variance) = randn(1, D), torch.tensor([1]), gaussians(classes=3)
    mean[2] = variance[2] = 0
    unit = [F.normalize(t, dim=1) for t in (f, mean, variance)]
    z = [(unit[0] @ unit[1][k] + (unit[0]**2) @ unit[2][k] / 2).item() for k in (0, 1)] + [0.0]
    expected = math.log(sum(map(math.exp, z))) - (unit[0] @ unit[1][1]).item()
    assert contrastive_bound(f, y, mean, variance, 1.0).item() == pytest.approx(expected, abs=1e-12)


def test_cosines():
    f, y, (mean, _) = randn(30, D), labels(30), gaussians()
    f[:20] += 2 * mean[y[:20]]  # for most pixels the own class is the nearest
    y[::5] = 255
    own, other = [], []
    for i in range(30):
        if y[i] != 255:
            cosine = [F.cosine_similarity(f[i], mean[k], dim=0).item() for k in range(C)]
            own.append(cosine[y[i]])
            other.append(max(cosine[k] for k in range(C) if k != y[i]))
    value = cosines(f.requires_grad_(), y, mean)
    assert value[0].item() == pytest.approx(sum(own) / 24) and value[1].item() == pytest.approx(sum(other) / 24)
    assert not value[0].requires_grad


# -------------------------------------------------- Lovasz-softmax --------------------------------------------------


def lovasz_by_sets(prob, label):
    """The Lovasz extension by its definition: sum of e_(i) times the growth of 1 - J when pixel (i) goes wrong too."""
    classes = prob.shape[1]
    p, y = prob.permute(0, 2, 3, 1).reshape(-1, classes), label.flatten()
    p, y = p[y != 255], y[y != 255]
    losses = []
    for c in sorted(set(y.tolist())):
        truth = (y == c).tolist()
        errors = [(1 - p[i, c] if truth[i] else p[i, c]).item() for i in range(len(y))]
        wrong, before, loss = set(), 0.0, 0.0
        for i in sorted(range(len(y)), key=lambda i: -errors[i]):
            wrong.add(i)
            right = sum(t for j, t in enumerate(truth) if j not in wrong)
            union = sum(truth) + sum(not truth[j] for j in wrong)
            loss += errors[i] * (1 - right / union - before)
            before = 1 - right / union
        losses.append(loss)
    return sum(losses) / len(losses)


def test_lovasz_against_the_definition():
    prob, label = randn(2, 5, 4, 6).mul(2).softmax(1), labels(48, classes=4).view(2, 4, 6)  # class 4 does not occur
    label[:, 1] = 255
    assert lovasz_softmax(prob, label).item() == pytest.approx(lovasz_by_sets(prob, label), abs=1e-12)
    assert lovasz_softmax(prob.float(), label).item() == pytest.approx(lovasz_by_sets(prob, label), abs=1e-6)


@pytest.mark.parametrize("classes", [1, 2, 19, 129, 150, 254])
def test_lovasz_for_any_number_of_classes(classes):
    """Many classes, few pixels: about half of the classes do not occur."""
    n = max(classes // 2, 40)
    prob, label = randn(1, classes, 4, n // 4, seed=3).mul(3).softmax(1), labels(n // 4 * 4, classes=classes)
    label = label.view(1, 4, -1)
    label[0, 0, ::3] = 255
    assert lovasz_softmax(prob, label).item() == pytest.approx(lovasz_by_sets(prob, label), abs=1e-12)
    assert lovasz_softmax(prob.float(), label).item() == pytest.approx(lovasz_by_sets(prob, label), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_falling_order(dtype):
    values = torch.cat([randn(500).abs(), randn(500, seed=1).abs() * 1e-30, torch.tensor([0, 0, 1, 1])]).to(dtype)
    order = falling_order(values)
    assert torch.equal(values[order], values.sort(descending=True).values)
    assert torch.equal(order.sort().values, torch.arange(len(values)))


def test_lovasz_of_very_many_pixels_does_not_round():
    """A million pixels in float32: the growth of 1 - J from one to the next would have an error of its own size."""
    n = 2**20
    label = (torch.arange(n) % 2).view(1, 1, n)
    wrong = torch.rand(1, 1, n, generator=torch.Generator().manual_seed(0))
    prob = torch.stack([torch.where(label == 0, 1 - wrong, wrong), torch.where(label == 0, wrong, 1 - wrong)], 1)
    assert lovasz_softmax(prob, label).item() == pytest.approx(lovasz_softmax(prob.double(), label).item(), rel=1e-6)


def test_lovasz_of_hard_predictions_is_one_minus_iou():
    label, pred = labels(200, classes=5).view(2, 10, 10), labels(200, seed=9, classes=5).view(2, 10, 10)
    metric = common.MeanIoU(5)
    metric.update(pred, label)
    prob = F.one_hot(pred, 5).permute(0, 3, 1, 2).double()
    assert lovasz_softmax(prob, label).item() == pytest.approx(1 - metric.mean(), abs=1e-12)
    perfect = F.one_hot(label, 5).permute(0, 3, 1, 2).double()
    assert lovasz_softmax(perfect, label).item() == 0
    assert lovasz_softmax(perfect.roll(1, 1), label).item() == pytest.approx(1)


def test_lovasz_is_taken_over_the_whole_batch_not_per_image():
    prob, label = randn(2, 3, 4, 4).softmax(1), labels(32, classes=3).view(2, 4, 4)
    assert lovasz_softmax(prob, label).item() == pytest.approx(lovasz_softmax(
        torch.cat([prob[0], prob[1]], 1)[None], torch.cat([label[0], label[1]], 0)[None]).item(), abs=1e-12)


def test_lovasz_gradient():
    logits, label = randn(1, 3, 3, 4).requires_grad_(), labels(12, classes=3).view(1, 3, 4)
    label[0, 0, 0] = 255
    assert torch.autograd.gradcheck(lambda x: lovasz_softmax(x.softmax(1), label), logits)
    lovasz_softmax(logits.softmax(1), label).backward()
    assert logits.grad[0, :, 0, 0].abs().sum() == 0 and logits.grad[0, :, 1].abs().min() > 0


@pytest.mark.parametrize("label", [torch.full((1, 2, 2), 255), torch.zeros(1, 0, 2, dtype=torch.long)])
def test_lovasz_over_nothing_is_a_connected_zero(label):
    prob = torch.rand(1, 3, *label.shape[1:], requires_grad=True)
    value = lovasz_softmax(prob, label)
    value.backward()
    assert value.item() == 0 and prob.grad.abs().sum() == 0


def test_lovasz_of_one_pixel_and_of_one_class():
    prob = torch.tensor([0.7, 0.3]).view(1, 2, 1, 1)
    assert lovasz_softmax(prob, torch.zeros(1, 1, 1, dtype=torch.long)).item() == pytest.approx(0.3)
    assert lovasz_softmax(torch.ones(1, 1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long)).item() == 0


# ----------------------------------------------- labels of the target -----------------------------------------------


def test_online_labels():  # P10
    logits = torch.tensor([[9.0, 1.0], [8.0, 1.0], [1.0, 99.0], [1.0, 1.0]]).log().T.view(1, 2, 1, 4)
    assert online_labels(logits, 0.89).flatten().tolist() == [0, 255, 1, 255]
    assert online_labels(10 * torch.ones(1, 2, 1, 1), 0.9).item() == 255  # large logits, but unsure: softmax first
    assert online_labels(torch.zeros(1, 2, 1, 1), 0.5).item() == 0  # exactly delta is kept
    assert online_labels(logits, 1.1).eq(255).all() and not online_labels(logits.requires_grad_(), 0.5).requires_grad
    assert online_labels(logits.bfloat16(), 0.5).shape == (1, 1, 4)


def test_thresholds_are_medians_to_the_bin():  # SDCA-14
    prob = (4 * randn(3, 6, 40, 50)).softmax(1).float()
    prob[:, 5] = 0  # never predicted
    histogram = sum(confidence_histogram(part) for part in prob.split(1))
    theta = class_thresholds(histogram, maximum=1.0)
    confidence, label = prob.max(1)
    assert histogram.sum().item() == label.numel() and theta[5] == 0
    for c in range(5):
        mine = sorted(confidence[label == c].tolist())
        exact = mine[round(0.5 * len(mine))]
        assert exact - 2**-14 < theta[c].item() <= exact
        assert ((pseudo_labels(prob, theta) == c).sum() >= (label == c).sum() // 2)
    capped = class_thresholds(histogram, maximum=0.76)
    torch.testing.assert_close(capped, theta.clamp(max=0.76))
    torch.testing.assert_close(class_thresholds(torch.tensor([15 * [0] + [9]])), torch.tensor([0.9]))
    assert (capped < theta).any() and (capped[:5] == theta[:5]).any()


@pytest.mark.parametrize("values, expected", [
    ([], 0), ([0.5], 0.5), ([0.25, 0.5], 0.5), ([0.25, 0.5, 0.75], 0.75), ([1.0, 1.0], 1 - 2**-14)])
def test_thresholds_of_tiny_sets(values, expected):
    """Element number round(n / 2), halves to even, counted from 0; a confidence of 1 falls into the last bin."""
    prob = torch.tensor([values, [0.0] * len(values)]).view(1, 2, 1, len(values))
    assert class_thresholds(confidence_histogram(prob), maximum=1.0).tolist() == [expected, 0]


def test_a_huge_histogram_does_not_round():
    histogram = torch.zeros(1, 4, dtype=torch.int64)
    histogram[0, 1], histogram[0, 2] = 2**40 + 1, 2**40 - 1
    assert class_thresholds(histogram).item() == 0.25
    histogram[0, 1], histogram[0, 2] = 2**40, 2**40
    assert class_thresholds(histogram).item() == 0.5


def test_pseudo_labels():
    prob = torch.tensor([[0.6, 0.4], [0.59, 0.41], [0.2, 0.8], [0.05, 0.95]]).T.view(1, 2, 1, 4)
    assert pseudo_labels(prob, torch.tensor([0.6, 0.9])).flatten().tolist() == [0, 255, 255, 1]  # at it: kept
    assert torch.equal(pseudo_labels(prob, torch.zeros(2)), prob.argmax(1))


# ------------------------------------------------- one training step -------------------------------------------------

SETTINGS = {"tau": 0.5, "delta": 0.3, "lambda_lov": 0.6, "lambda_feat": 0.3, "lambda_out": 2.0, "covariance": True,
            "raw_statistics": False, "precision": "fp32", "device": "cpu"}
TERMS = ("sup", "feat_s", "feat_t", "out_s", "out_t")


class Tiny(nn.Module):
    """A network of two convolutions, 5 classes, 6 features behind a ReLU, stride 8."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 6, 9, stride=8, padding=4)
        self.classifier = nn.Conv2d(6, 5, 1)
        for parameter, seed in zip(self.parameters(), range(4)):
            parameter.data = 0.3 * randn(*parameter.shape, seed=seed).float()

    def forward(self, images):
        features = self.backbone(images).relu()
        return features, self.classifier(features)


class Step:
    """Everything that enters one step, the same every time; fields may be changed before `losses` is asked for."""

    def __init__(self, **settings):
        self.args = argparse.Namespace(**{**SETTINGS, **settings})
        self.network = Tiny()
        self.x_s, self.x_t = (randn(2, 3, 32, 64, seed=s).float().requires_grad_() for s in (11, 12))
        self.y_s = labels(2 * 32 * 64, seed=13, classes=5).view(2, 32, 64)
        self.y_s[:, :, :20] = 255
        self.earlier = {"feat": randn(200, 6, seed=14).abs().float(), "out": randn(200, 5, seed=15).float()}
        self.earlier_labels = labels(200, seed=16, classes=5)
        self.statistics = {}
        for level, r in self.earlier.items():
            self.statistics[level] = ClassStatistics(5, r.shape[1])
            self.statistics[level].update(F.normalize(r, dim=1) if settings.get("raw_statistics") else r,
                                          self.earlier_labels)

    def losses(self):
        return sdca.step_losses(self.network, self.statistics, self.x_s, self.y_s, self.x_t, self.args)

    def pixels(self):
        """{level: (r_s, r_t)} and the labels y_s, y_t of the grid's pixels, computed pixel by pixel."""
        (features_s, logits_s), (features_t, logits_t) = self.network(self.x_s), self.network(self.x_t)
        flat = [[maps[i, :, j, k] for i in range(2) for j in range(4) for k in range(8)]
                for maps in (features_s, logits_s, features_t, logits_t)]
        f_s, o_s, f_t, o_t = (torch.stack(rows).double().detach() for rows in flat)
        y_s = common.grid_labels(self.y_s, (4, 8)).reshape(-1)
        prob = o_t.softmax(1)
        y_t = torch.tensor([row.argmax().item() if row.max() >= self.args.delta else 255 for row in prob])
        if self.args.raw_statistics:
            f_s, o_s, f_t, o_t = (r / r.norm(dim=1, keepdim=True).clamp(min=1e-12) for r in (f_s, o_s, f_t, o_t))
        return {"feat": (f_s, f_t), "out": (o_s, o_t)}, y_s, y_t

    def moments(self, level, r_s, y_s):
        """Mean and variance of each class over all source pixels so far, this batch included."""
        earlier = self.earlier[level].double()
        if self.args.raw_statistics:
            earlier = earlier / earlier.norm(dim=1, keepdim=True).clamp(min=1e-12)
        r, y = torch.cat([earlier, r_s]), torch.cat([self.earlier_labels, y_s])
        return (torch.stack([r[y == k].mean(0) for k in range(5)]),
                torch.stack([r[y == k].var(0, correction=0) for k in range(5)]), [(y == k).sum() for k in range(5)])

    def expected(self):
        """{term: value} of the bounds and cosines, independent of the functions under test."""
        levels, y_s, y_t = self.pixels()
        assert 0 < (y_t != 255).sum() < len(y_t)  # some are confident, some are not
        values = {"kept": (y_t != 255).double().mean().item()}
        for level, (r_s, r_t) in levels.items():
            mean, variance, _ = self.moments(level, r_s, y_s)
            if not self.args.covariance:
                variance = torch.zeros_like(variance)
            unit = (lambda t: t) if self.args.raw_statistics else lambda t: F.normalize(t, dim=1)
            for name, r, y in (("s", r_s, y_s), ("t", r_t, y_t)):
                values[f"{level}_{name}"] = by_loop(unit(r), y, unit(mean), unit(variance), self.args.tau)
            cosine = F.normalize(r_t, dim=1) @ F.normalize(mean, dim=1).T
            sure = (y_t != 255).nonzero()[:, 0].tolist()
            values[f"own_{level}"] = np.mean([cosine[i, y_t[i]].item() for i in sure])
            others = [max(cosine[i, k].item() for k in range(5) if k != y_t[i]) for i in sure]
            values[f"other_{level}"] = np.mean(others)
        return values


@pytest.mark.parametrize("settings", [{}, {"covariance": False}, {"raw_statistics": True}, {"tau": 0.2, "delta": 0.5},
                                      {"raw_statistics": True, "covariance": False}])
def test_every_term_of_a_step_equals_its_independent_value(settings):  # SDCA-1, -7 to -10, -13
    step = Step(**settings)
    losses, expected = step.losses(), step.expected()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=2e-5, abs=2e-6), name
    up = common.upsample(step.network(step.x_s)[1], (32, 64))
    sup = F.cross_entropy(up, step.y_s, ignore_index=255).item()
    sup += 0.6 * lovasz_softmax(up.softmax(1), step.y_s).item()
    assert losses["sup"].item() == pytest.approx(sup, rel=1e-5)
    total = (sup + 0.3 * (expected["feat_s"] + expected["feat_t"]) + 2 * (expected["out_s"] + expected["out_t"]))
    assert losses["loss"].item() == pytest.approx(total, rel=2e-5)  # SDCA-9
    assert set(losses) == {*expected, "sup", "loss"}


@pytest.mark.parametrize("raw", [False, True])
def test_a_step_adds_its_source_pixels_to_the_statistics_and_nothing_else(raw):  # SDCA-10
    step = Step(raw_statistics=raw)
    step.losses()
    levels, y_s, _ = step.pixels()
    for level, (r_s, _) in levels.items():
        mean, variance, count = step.moments(level, r_s, y_s)
        statistics = step.statistics[level]
        assert statistics.count.tolist() == count and not statistics.mean.requires_grad
        torch.testing.assert_close(statistics.mean, mean, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(statistics.variance, variance, atol=1e-6, rtol=1e-5)


# term: does its gradient reach the source image, the target image, the backbone, the classifier?
ROUTES = {"sup": (True, False, True, True), "feat_s": (True, False, True, False), "feat_t": (False, True, True, False),
          "out_s": (True, False, True, True), "out_t": (False, True, True, True), "loss": (True, True, True, True)}


@pytest.mark.parametrize("term", ROUTES)
def test_each_term_reaches_the_weights_that_it_should(term):
    step = Step()
    step.losses()[term].backward()
    reached = [t.grad is not None and t.grad.abs().sum().item() > 0 for t in (
        step.x_s, step.x_t, step.network.backbone.weight, step.network.classifier.weight)]
    assert tuple(reached) == ROUTES[term]


def gradients(settings, coefficients):
    """Gradient of each weight, of the sum of some terms with coefficients."""
    step = Step(**settings)
    losses = step.losses()
    sum(c * losses[term] for term, c in coefficients.items()).backward()
    return [parameter.grad for parameter in step.network.parameters()]


@pytest.mark.parametrize("feat, out", [(0.3, 2.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_the_total_pulls_with_the_weights_of_its_terms(feat, out):  # SDCA-9
    total = gradients({"lambda_feat": feat, "lambda_out": out}, {"loss": 1})
    parts = gradients({}, {"sup": 1, "feat_s": feat, "feat_t": feat, "out_s": out, "out_t": out})
    for one, other in zip(total, parts):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("flag, value, changed", [
    ("tau", 1.0, {"feat_s", "feat_t", "out_s", "out_t", "loss"}), ("lambda_lov", 0.0, {"sup", "loss"}),
    ("delta", 0.5, {"feat_t", "out_t", "kept", "own_feat", "other_feat", "own_out", "other_out", "loss"}),
    ("lambda_feat", 0.0, {"loss"}), ("lambda_out", 0.0, {"loss"}),
    ("covariance", False, {"feat_s", "feat_t", "out_s", "out_t", "loss"}),
    ("raw_statistics", True, {"feat_s", "feat_t", "out_s", "out_t", "own_feat", "other_feat", "own_out", "other_out",
                              "loss"})])
def test_each_flag_changes_what_it_says(flag, value, changed):
    usual, other = Step().losses(), Step(**{flag: value}).losses()
    assert {name for name in usual if usual[name].item() != other[name].item()} == changed


def test_a_step_without_a_confident_target_pixel_or_a_source_label():
    step = Step(delta=2.0)
    step.y_s[:] = 255
    losses = step.losses()
    losses["loss"].backward()
    assert all(losses[term].item() == 0 for term in (*TERMS, "loss", "kept", "own_out"))
    assert all(not parameter.grad.any() for parameter in step.network.parameters())  # zeros, connected
    assert step.statistics["feat"].count.tolist() == torch.bincount(step.earlier_labels, minlength=5).tolist()


def test_bf16_rounds_the_network_and_no_loss():
    step, exact = Step(precision="bf16").losses(), Step().losses()
    for name in (*TERMS, "loss"):
        assert step[name].dtype == torch.float32 and step[name].item() == pytest.approx(exact[name].item(), rel=0.05)
    assert any(step[name].item() != exact[name].item() for name in TERMS)


def test_the_two_networks_of_a_task_fit_the_step():
    """DeepLabV2 itself: the feature level trains the backbone alone, the output level backbone and classifier."""
    for term, classifier in (("feat_t", False), ("out_t", True)):
        step = Step(delta=0.0)
        step.network = common.DeepLabV2(5, "resnet18")
        step.statistics = {"feat": ClassStatistics(5, 512), "out": ClassStatistics(5, 5)}
        step.losses()[term].backward()
        assert step.network.backbone[0].weight.grad.abs().sum() > 0
        assert [branch.weight.grad is not None for branch in step.network.classifier] == [classifier] * 4


def test_source_loss():  # SDCA-1
    logits, label = randn(2, C, 5, 6).float(), labels(2 * 32 * 40).view(2, 32, 40)
    label[:, :3] = 255
    up = F.interpolate(logits, (32, 40), mode="bilinear", align_corners=True)
    expected = F.cross_entropy(up, label, ignore_index=255) + 0.75 * lovasz_softmax(up.softmax(1), label)
    torch.testing.assert_close(source_loss(logits, label, 0.75), expected)
    torch.testing.assert_close(source_loss(logits, label, 0.0), F.cross_entropy(up, label, ignore_index=255))
    assert source_loss(logits, torch.full((2, 32, 40), 255), 0.75).item() == 0


def test_raw_statistics_are_those_of_normalised_features():
    maps = randn(2, D, 3, 4)
    r = sdca.representations(maps, argparse.Namespace(raw_statistics=False))
    f = sdca.representations(maps, argparse.Namespace(raw_statistics=True))
    assert r[1 * 12 + 2 * 4 + 3].tolist() == maps[1, :, 2, 3].float().tolist()
    torch.testing.assert_close(f, F.normalize(maps.float(), dim=1).permute(0, 2, 3, 1).reshape(24, D))


def test_schedule_and_the_authors_values(monkeypatch):  # P12
    monkeypatch.setattr(sys, "argv", ["sdca.py", "--source", "gta5"])
    args = sdca.parse_args()
    for base, steps in ((args.lr, args.iterations), (args.ssl_lr, args.ssl_iterations)):
        assert sdca.adaptation_lr(base, steps + 1, steps, args) == pytest.approx(0.398724 * base, rel=1e-6)  # at STOP
        assert sdca.adaptation_lr(base, steps, steps, args) > 0.398724 * base
        assert sdca.adaptation_lr(base, args.ramp // 2, steps, args) == pytest.approx(0.5 * base, rel=0.02)
    assert (args.lr, args.ssl_lr, args.iterations, args.ssl_iterations) == (2.5e-4, 5e-4, 40000, 20000)
    assert args.iterations * args.horizon == 62500 and args.ssl_iterations * args.horizon == 31250
    assert (args.tau, args.delta, args.theta, args.lambda_lov) == (100, 0.9, 0.9, 0.75)
    assert (args.lambda_feat, args.lambda_out) == (1, 1)
    assert args.ssl and args.from_scratch_ssl and args.covariance and not args.raw_statistics
    monkeypatch.setattr(sys, "argv", ["sdca.py"])
    toy = sdca.parse_args()
    assert toy.iterations + toy.ssl_iterations == 240 and not toy.from_scratch_ssl and toy.horizon == 1


@pytest.mark.parametrize("flag, value", [
    (flag, value) for flag in ("--tau", "--lr", "--ssl-lr", "--horizon", "--delta", "--theta", "--lambda-lov",
                               "--lambda-feat", "--lambda-out", "--iterations", "--ssl-iterations")
    for value in ("nan", "inf", "-1")] + [("--tau", "0"), ("--lr", "0"), ("--horizon", "0.9"), ("--delta", "1.1"),
                                          ("--theta", "2"), ("--iterations", "1.5")])
def test_a_number_that_makes_no_sense_is_refused(monkeypatch, capsys, flag, value):
    monkeypatch.setattr(sys, "argv", ["sdca.py", f"{flag}={value}"])
    with pytest.raises(SystemExit):
        sdca.parse_args()
    assert flag in capsys.readouterr().err


# --------------------------------------------- main(), watched at work ----------------------------------------------

FEW = [*TINY, "--warmup-iterations", 2, "--iterations", 3, "--ssl-iterations", 2, "--delta", 0.05]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def watched(folder, start, *flags):
    """Runs main() on the tiny toy and returns what it did, in order: a list of (what, details)."""
    events = []

    def note(what, **details):
        events.append((what, details))

    with pytest.MonkeyPatch.context() as patch:
        def around(module, name, look):
            """Calls `look` with the arguments of every call of a function, then the function."""
            original = getattr(module, name)
            patch.setattr(module, name, lambda *given, **named: (look(*given, **named), original(*given, **named))[1])

        def step(network, statistics, x_s, y_s, x_t, args):
            """The real step, of which the total is replaced by the sum of all weights: a gradient of one for each."""
            model = network.model
            note("step", x_s=x_s, y_s=y_s, x_t=x_t, statistics=statistics, args=args, before=weights(model),
                 learning={name for name, p in model.named_parameters() if p.requires_grad})
            losses = real_step(network, statistics, x_s, y_s, x_t, args)
            losses["loss"] = sum(p.sum() for p in model.parameters() if p.requires_grad)
            return losses

        class Distributed:
            """What common.distribute gives: notes the mode of every forward of training."""

            def __init__(self, model):
                self.model = model

            def __call__(self, images):
                note("forward", training=self.model.training, images=images)
                return self.model(images)

        real_step = sdca.step_losses
        patch.setattr(sdca, "step_losses", step)
        patch.setattr(common, "distribute", Distributed)
        around(common, "settle_batch_norm", lambda model, views, args: note(
            "settle", domain=views.domain, split=views.split, augmented=views.augment is not None, args=args))
        around(sdca, "make_optimizer", lambda model, args: note(
            "optimizer", live=len(common.live_batch_norms(model)), start=weights(model)))
        around(sdca, "collect_statistics", lambda model, *_: note(
            "collect", live=len(common.live_batch_norms(model)), start=weights(model)))
        around(sdca, "target_cosines", lambda model, statistics, args: note(
            "cosines", start=weights(model), means={level: s.mean for level, s in statistics.items()}))
        around(sdca, "label_target", lambda model, args, folder: note("label", start=weights(model)))
        around(sdca, "segmentation_loss", lambda logits, label: note("segmentation", label=label))
        around(sdca, "train_source", lambda model, dataset, args, run, file, steps, lr, criterion: note(
            "warm-up", dataset=dataset, file=file, steps=steps, lr=lr, criterion=criterion))
        patch.setattr(common, "compare_with_source_only", lambda models, args, run, source_model, **meters: note(
            "compare", models={title: weights(model) for title, model in models.items()}, source=weights(source_model),
            meters=meters))
        patch.setattr(common.signal, "signal", lambda *_: None)
        begin = ["--init", start] if start else []
        patch.setattr(sys, "argv", ["sdca.py", *map(str, [*FEW, *begin, *flags, "--out", folder])])
        sdca.main()
    return events


def only(events, what):
    return [details for name, details in events if name == what]


def order(events, *names):
    return [name for name, _ in events if name in names]


SGD = ["--optimizer", "sgd", "--lr", 0.01, "--ssl-lr", 0.004, "--head-lr", 3, "--ramp", 2, "--horizon", 2,
       "--power", 0.7, "--precision", "fp32"]


@pytest.fixture(scope="module")
def main_on_target(tmp_path_factory, start):
    folder = tmp_path_factory.mktemp("watched") / "run"
    return folder, watched(folder, start, "--batch-norm", "target", *SGD, "--theta", 0.1)


def test_main_settles_batch_norm_before_all_that_depends_on_it(main_on_target):
    events = main_on_target[1]
    done = order(events, "settle", "optimizer", "collect", "cosines", "step", "label", "compare")
    assert done == ["settle", "optimizer", "collect", "settle", "cosines", "step", "step", "step", "settle", "cosines",
                    "label", "optimizer", "settle", "compare"]
    assert all((s["domain"], s["split"], s["augmented"]) == ("target", "train", True) for s in only(events, "settle"))
    assert all(o["live"] == 0 for o in only(events, "optimizer"))  # nothing of batch norm learns


def test_main_trains_in_training_mode_on_what_it_should(main_on_target):
    folder, events = main_on_target
    steps, forwards = only(events, "step"), only(events, "forward")
    assert len(steps) == 3 and len(forwards) == 2 * 3 + 2 and all(forward["training"] for forward in forwards)
    args = steps[0]["args"]
    datasets = [common.source_dataset(args, common.training_augment(args)),
                common.target_dataset(args, "train", common.training_augment(args))]
    batches = [list(common.training_batches(dataset, args, common.mix_seed(args.seed, purpose), 0, 3))
               for dataset, purpose in zip(datasets, (4, 5))]
    for step, (x_s, y_s), (x_t, y_t) in zip(steps, *batches):
        assert torch.equal(step["x_s"], x_s) and torch.equal(step["y_s"], y_s)
        assert torch.equal(step["x_t"], x_t) and y_t is None
    files = common.target_dataset(args, "train", common.training_augment(args), label_dir=folder / "pseudo_labels")
    stored = list(common.training_batches(files, args, common.mix_seed(args.seed, 6), 0, 2))
    seen = [details["label"] for details in only(events, "segmentation")][-2:]
    for (image, label), forward, given in zip(stored, forwards[-2:], seen):  # SDCA-11
        assert torch.equal(forward["images"], image) and torch.equal(given, label)


def test_main_steps_down_the_gradient_of_the_total_with_the_rates_of_the_schedule(main_on_target):
    """The total's gradient was made one everywhere: SGD with momentum and weight decay then follows by hand."""
    folder, events = main_on_target
    steps = only(events, "step")
    states = [step["before"] for step in steps] + [load(folder / "sdca.pt")["model"]]
    velocity = {}
    for number, (before, after) in enumerate(zip(states, states[1:]), 1):
        rate = 0.01 * min(1, number / 2) * (1 - (number - 1) / (2 * 3))**0.7
        for name in before:
            if name in steps[0]["learning"]:
                velocity[name] = 0.9 * velocity.get(name, 0) + 1 + 5e-4 * before[name]
                expected = before[name] - rate * (3 if name.startswith("classifier") else 1) * velocity[name]
                torch.testing.assert_close(after[name], expected, atol=1e-5, rtol=1e-5)
            else:  # batch norm
                assert torch.equal(after[name], before[name]), name


def test_main_carries_the_statistics_from_step_to_step(main_on_target):
    folder, events = main_on_target
    steps, saved = only(events, "step"), load(folder / "sdca.pt")
    valid = sum((common.grid_labels(step["y_s"], (5, 9)) != 255).sum().item() for step in steps)
    collected, = {line["pixels"] for line in log(folder, "statistics")}
    for level in ("feat", "out"):
        assert saved[level]["count"].sum().item() == collected + valid
        assert saved[level]["mean"] is not None and steps[0]["statistics"][level] is steps[2]["statistics"][level]
    first, last = only(events, "cosines")
    assert same(first["start"], steps[0]["before"]) and same(last["start"], saved["model"])
    assert torch.equal(last["means"]["feat"], saved["feat"]["mean"])


def test_main_labels_the_target_with_the_adapted_model(main_on_target):
    """The PNGs are what sdca.pt's model predicts, in evaluation mode, above min(--theta, the class's median)."""
    folder, events = main_on_target
    adapted = load(folder / "sdca.pt")["model"]
    assert same(only(events, "label")[0]["start"], adapted) and same(only(events, "optimizer")[1]["start"], adapted)
    args = only(events, "step")[0]["args"]
    model, dataset = common.load_model(folder / "sdca.pt", args), common.target_dataset(args, "train")
    confidence, label = zip(*(prob.max(1) for _, prob in common.predictions(model, dataset, args)))
    confidence, label, medians = torch.cat(confidence), torch.cat(label), []
    for k in range(16):
        mine = sorted(confidence[label == k].tolist())
        medians.append(math.floor(mine[round(0.5 * len(mine))] * 2**14) / 2**14 if mine else 0)  # its bin's edge
        theta = min(0.1, medians[k])
        label[(label == k) & (confidence < theta)] = 255
    stored = [common.read_label(folder / f"pseudo_labels/{item['name']}.png") for item in dataset]
    assert torch.equal(torch.from_numpy(np.stack(stored)).long(), label)
    assert 0.05 < (label == 255).double().mean() < 0.6 and max(medians) > 0.1 > min(m for m in medians if m)


def test_ssl_is_plain_training_on_the_stored_labels(main_on_target):  # SDCA-11
    """Both steps again, from sdca.pt with torch's own cross-entropy and optimizer."""
    folder, events = main_on_target
    args = only(events, "step")[0]["args"]
    model = common.load_model(folder / "sdca.pt", args)
    common.freeze_batch_norm(model)
    learning = [{"params": [p for p in model.backbone.parameters() if p.requires_grad]},
                {"params": list(model.classifier.parameters())}]
    optimizer = torch.optim.SGD(learning, lr=0.0, momentum=0.9, weight_decay=5e-4)
    files = common.target_dataset(args, "train", common.training_augment(args), label_dir=folder / "pseudo_labels")
    batches = common.training_batches(files, args, common.mix_seed(args.seed, 6), 0, 2)
    model.train()
    for number, (image, label) in enumerate(batches, 1):
        rate = 0.004 * min(1, number / 2) * (1 - (number - 1) / (2 * 2))**0.7
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, 3 * rate
        up = F.interpolate(model(image)[1], label.shape[1:], mode="bilinear", align_corners=True)
        optimizer.zero_grad()
        F.cross_entropy(up, label, ignore_index=255).backward()
        optimizer.step()
    saved = load(folder / "last.pt")["model"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_main_compares_the_models_it_names(main_on_target, start):
    folder, events = main_on_target
    compared, = only(events, "compare")
    saved = {name: load(folder / name)["model"] for name in ("sdca.pt", "last.pt")}
    assert list(compared["models"]) == ["SDCA, no SSL", "SDCA"]
    assert same(compared["models"]["SDCA, no SSL"], saved["sdca.pt"])
    assert same(compared["models"]["SDCA"], saved["last.pt"]) and not same(saved["sdca.pt"], saved["last.pt"])
    assert same(compared["source"], load(start)["model"])
    meters = compared["meters"]
    assert set(meters) == {f"{which}_{level}_{when}" for which in ("own", "other") for level in ("feat", "out")
                           for when in ("before", "after")}
    assert log(folder, "before")[0]["own_feat"] == meters["own_feat_before"] != meters["own_feat_after"]


def test_main_with_live_batch_norm(tmp_path, start):
    """Class statistics under the source's batch-norm statistics, labels and scores under the target's."""
    events = watched(tmp_path / "run", start, "--batch-norm", "live", *SGD)
    done = order(events, "settle", "optimizer", "collect", "cosines", "step", "label", "compare")
    assert done == ["optimizer", "collect", "settle", "cosines", "step", "step", "step", "settle", "cosines", "label",
                    "optimizer", "settle", "compare"]
    collect, first = only(events, "collect")[0], only(events, "step")[0]["before"]
    assert same(collect["start"], load(start)["model"]) and collect["live"] > 0
    assert not torch.equal(first["backbone.1.running_mean"], collect["start"]["backbone.1.running_mean"])
    assert only(events, "optimizer")[1]["live"] > 0 and all(f["training"] for f in only(events, "forward"))


def test_main_with_frozen_batch_norm_and_without_ssl(tmp_path, start):
    events = watched(tmp_path / "run", start, "--batch-norm", "frozen", "--no-ssl", *SGD)
    assert order(events, "settle", "optimizer", "collect", "step", "label", "compare") == [
        "settle", "optimizer", "collect", "settle", "step", "step", "step", "settle", "compare"]
    begun, end = load(start)["model"], load(tmp_path / "run/last.pt")
    assert all(torch.equal(end["model"][key], begun[key]) for key in begun if "running" in key)
    compared, = only(events, "compare")
    assert list(compared["models"]) == ["SDCA"] and same(compared["models"]["SDCA"], end["model"])
    assert same_weights(tmp_path / "run/sdca.pt", tmp_path / "run/last.pt")
    assert not (tmp_path / "run/pseudo_labels").exists()


def test_main_warms_up_with_the_loss_of_the_source(tmp_path):
    events = watched(tmp_path / "run", None, "--batch-norm", "target", "--no-ssl", "--lambda-lov", 0.4,
                     "--warmup-lr", 0.003)
    warm_up, = only(events, "warm-up")
    assert (warm_up["file"], warm_up["steps"], warm_up["lr"]) == ("source_only.pt", 2, 0.003)
    assert warm_up["dataset"].domain == "source" and warm_up["dataset"].augment is not None
    logits, label = randn(1, 16, 5, 9).float(), labels(32 * 64, classes=16).view(1, 32, 64)
    assert torch.equal(warm_up["criterion"](logits, label), source_loss(logits, label, 0.4))
    first = only(events, "step")[0]["before"]  # weights and affine part go on from the warm-up
    begun = load(tmp_path / "run/source_only.pt")["model"]
    assert all(torch.equal(first[key], begun[key]) for key in begun if "running" not in key and "tracked" not in key)


def test_ssl_from_scratch_starts_from_the_backbones_weights(tmp_path, start):
    events = watched(tmp_path / "run", start, "--batch-norm", "target", "--from-scratch-ssl", "--ssl-iterations", 0)
    adapted, new = (load(tmp_path / "run" / name)["model"] for name in ("sdca.pt", "last.pt"))
    torch.manual_seed(common.mix_seed(0, 8))
    fresh = common.DeepLabV2(16, "resnet14").state_dict()
    trained = [key for key in fresh if "running" not in key and "tracked" not in key]
    assert all(torch.equal(new[key], fresh[key]) for key in trained)
    assert not torch.equal(new["classifier.0.weight"], adapted["classifier.0.weight"])
    assert only(events, "optimizer")[1]["live"] > 0  # it learns its batch norm, as the warm-up does


def test_target_cosines_are_those_of_all_validation_pixels(start):
    """Against the cosine of each pixel, one by one, over more than one batch."""
    sys_args = argparse.Namespace(source="toy", toy_world=0, toy_images=48, size=(32, 64), batch_size=2, workers=0,
                                  device="cpu", precision="fp32", raw_statistics=False)
    model = common.load_model(start, sys_args)
    mean = {"feat": randn(16, model.feature_dim).abs(), "out": randn(16, 16)}
    statistics = {level: ClassStatistics(16, len(m[0])) for level, m in mean.items()}
    for level in mean:
        statistics[level].mean = mean[level]
    found, model = sdca.target_cosines(model.train(), statistics, sys_args), model.eval()
    own, other = {"feat": [], "out": []}, {"feat": [], "out": []}
    for item in common.target_dataset(sys_args, "val"):
        with torch.no_grad():
            maps = dict(zip(("feat", "out"), model(item["image"][None])))
        y = common.grid_labels(item["label"][None], (5, 9))[0]
        for level in maps:
            cosine = F.cosine_similarity(maps[level][0].double()[:, None], mean[level].T[:, :, None, None], dim=0)
            for i, j in (y != 255).nonzero().tolist():
                own[level].append(cosine[y[i, j], i, j].item())
                other[level].append(max(cosine[k, i, j].item() for k in range(16) if k != y[i, j]))
    assert len(own["feat"]) > 400
    for level in maps:
        assert found[f"own_{level}"] == pytest.approx(np.mean(own[level]), abs=1e-5)
        assert found[f"other_{level}"] == pytest.approx(np.mean(other[level]), abs=1e-5)


def test_collected_statistics_are_those_of_the_clean_source(start):
    """One pass, every source picture once, in evaluation mode."""
    args = argparse.Namespace(source="toy", toy_world=0, toy_images=10, size=(32, 64), workers=0, device="cpu",
                              precision="fp32", raw_statistics=False)
    model, lines = common.load_model(start, args), []
    statistics = {"feat": ClassStatistics(16, model.feature_dim), "out": ClassStatistics(16, 16)}
    notes = argparse.Namespace(log=lambda stage, **values: lines.append((stage, values)))
    sdca.collect_statistics(model.train(), statistics, args, notes)
    model.eval()
    rows, y = {"feat": [], "out": []}, []
    for item in common.source_dataset(args):
        with torch.no_grad():
            features, logits = model(item["image"][None])
        rows["feat"].append(common.as_pixels(features))
        rows["out"].append(common.as_pixels(logits))
        y.append(common.grid_labels(item["label"][None], (5, 9)).flatten())
    y = torch.cat(y)
    for level in rows:
        r = torch.cat(rows[level]).double()
        assert statistics[level].count.tolist() == [(y == k).sum() for k in range(16)]
        for k in y.unique().tolist():
            if k != 255:
                variance = r[y == k].var(0, correction=0)
                torch.testing.assert_close(statistics[level].mean[k], r[y == k].mean(0), atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(statistics[level].variance[k], variance, atol=1e-5, rtol=1e-3)
    seen = {"pixels": (y != 255).sum().item(), "classes": len(set(y.tolist()) - {255})}
    assert lines == [("statistics", {"level": level, **seen}) for level in ("feat", "out")]


# ---------------------------------------------------- the script ----------------------------------------------------


def log(folder, stage):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One command, all stages, never interrupted: the folder in which it was started, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "runs/sdca-toy-s0", run(folder, "sdca.py", *FEW, "--ssl-iterations", 3)


def same_training(one, other, name="sdca.pt"):
    """Whether two checkpoints hold the same network and the same class statistics, to the bit."""
    a, b = (load(folder / name) for folder in (one, other))
    return same_weights(one / name, other / name) and all(
        torch.equal(a[level][key], b[level][key]) for level in ("feat", "out") for key in ("mean", "variance", "count"))


def test_one_command_runs_all_stages(whole):
    folder, out = whole
    assert {"args.json", "log.jsonl", "source_only.pt", "sdca.pt", "last.pt", "panel.png", "result.json"} <= {
        p.name for p in folder.iterdir()}
    assert list(result(folder)["columns"]) == ["source only", "+ BN target", "SDCA, no SSL", "SDCA"]
    assert "SDCA, no SSL" in out and "motorcycle" in out and "own_feat_after" in out
    assert len(result(folder)["meters"]) == 8
    grid = 12 * 5 * 9  # pixels of the source on the grid, some of them void
    passes = log(folder, "statistics")
    assert [line["level"] for line in passes] == ["feat", "out"]
    assert 0.5 * grid < passes[0]["pixels"] == passes[1]["pixels"] <= grid
    saved = load(folder / "sdca.pt")
    assert saved["feat"]["mean"].shape == (16, 256) and saved["out"]["variance"].shape == (16, 16)
    assert saved["step"] == 3
    weight = json.loads((folder / "args.json").read_text())["lambda_feat"]
    for line in log(folder, "adapt"):
        bounds = sum(line[term] for term in TERMS[1:])
        assert line["loss"] == pytest.approx(line["sup"] + weight * bounds, rel=1e-5)  # SDCA-9, as logged
        assert 0 < line["kept"] <= 1 and -1 <= line["own_feat"] <= 1 and "other_out" in line
    labelled, = log(folder, "pseudo-labels")
    assert 0.45 < labelled["kept"] <= 1 and 0 <= labelled["accuracy"] <= 1
    assert labelled["theta_low"] <= labelled["theta_high"] <= 0.9
    files = sorted((folder / "pseudo_labels").iterdir())
    assert len(files) == 12 and common.read_label(files[0]).shape == (32, 64)
    assert Image.open(folder / "panel.png").width > 5 * 300  # image | truth | source only | SDCA, no SSL | SDCA


@exact
def test_killed_at_every_stage_and_resumed_the_run_ends_the_same(tmp_path, whole):
    """One run, killed by SIGKILL in each stage in turn; in two stages half-way, after the first step is saved."""
    arguments = ["sdca.py", *FEW, "--ssl-iterations", 3, "--save-every", 1, "--out", "cut"]
    for stage, lines in (("source", 1), ("statistics", 1), ("adapt", 2), ("pseudo-labels", 1), ("ssl", 2)):
        resume = ["--resume"] if stage != "source" else []
        kill_when(tmp_path, lambda: logged(tmp_path / "cut", stage, lines), *arguments, *resume)
    run(tmp_path, *arguments, "--resume")
    assert same_weights(tmp_path / "cut/source_only.pt", whole[0] / "source_only.pt")
    assert same_training(tmp_path / "cut", whole[0])
    assert same_weights(tmp_path / "cut/last.pt", whole[0] / "last.pt")
    assert result(tmp_path / "cut")["columns"] == result(whole[0])["columns"]
    assert result(tmp_path / "cut")["meters"] == result(whole[0])["meters"]


def test_without_the_contrastive_loss_the_same_steps_are_done(tmp_path, start):
    """The ablation: both weights 0. The pixels' cosines are measured all the same."""
    run(tmp_path, "sdca.py", *FEW, "--init", start, "--no-ssl", "--lambda-feat", 0, "--lambda-out", 0, "--out", "off")
    lines = log(tmp_path / "off", "adapt")
    assert len(lines) == 3 and all(line["loss"] == line["sup"] for line in lines)
    assert len(result(tmp_path / "off")["meters"]) == 8


def test_real_formats_from_start_to_end(tmp_path):
    write_synthia(tmp_path)
    write_gta5(tmp_path)
    write_cityscapes(tmp_path)
    for path in (tmp_path / "cityscapes/gtFine/train").rglob("*.png"):
        path.write_bytes(b"closed")  # an adaptation that opened a target training label would stop here
    for source, classes, workers in (("synthia", 16, 1), ("gta5", 19, 0)):
        run(tmp_path, "sdca.py", "--source", source, "--data-root", tmp_path, "--backbone", "resnet14",
            "--backbone-weights", "none", "--workers", workers, *FEW, "--iterations", 1, "--ssl-iterations", 1)
        folder = tmp_path / f"runs/sdca-{source}-s0"
        assert len(result(folder)["iou"]) == classes and ("miou13" in result(folder)) == (source == "synthia")
        assert len(list((folder / "pseudo_labels").iterdir())) == 6
        assert "accuracy" not in log(folder, "pseudo-labels")[0]


def test_a_checkpoint_or_network_that_does_not_fit_is_one_line(tmp_path, start):
    message = run(tmp_path, "sdca.py", *FEW, "--backbone", "resnet50", "--init", start, ok=False)
    assert "resnet14" in message and "resnet50" in message
    assert "gone.pt" in run(tmp_path, "sdca.py", *FEW, "--init", "gone.pt", ok=False)
    assert "vgg16-fcn8s" in run(tmp_path, "sdca.py", *FEW, "--backbone", "vgg16-fcn8s", ok=False)


def test_two_processes_share_one_run(tmp_path, start):
    """Pooled statistics, histograms and thresholds; losses are each process's own means."""
    arguments = [*FEW, *SPLITTABLE, "--init", start, "--lr", 0.02, "--ssl-lr", 0.02, "--ramp", 0, "--tau", 0.5,
                 "--lambda-feat", 1, "--lambda-out", 1]
    run(tmp_path, "sdca.py", *arguments, "--out", "one")
    run_as_two(tmp_path, "sdca.py", *arguments, "--out", "two")
    assert trained_alike(start, tmp_path / "one/sdca.pt", tmp_path / "two/sdca.pt")
    first = [load(tmp_path / name / "sdca.pt") for name in ("one", "two")]
    for level in ("feat", "out"):
        one, two = (saved[level] for saved in first)
        assert torch.equal(one["count"], two["count"])
        torch.testing.assert_close(one["mean"], two["mean"], atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(one["variance"], two["variance"], atol=2e-2, rtol=5e-2)
    passes = [[line["pixels"] for line in log(tmp_path / name, "statistics")] for name in ("one", "two")]
    before = [log(tmp_path / name, "before")[0] for name in ("one", "two")]
    assert passes[0] == passes[1]
    assert all(before[0][key] == pytest.approx(before[1][key], abs=1e-5) for key in ("own_feat", "other_out"))
    labelled = [log(tmp_path / name, "pseudo-labels")[0] for name in ("one", "two")]
    for key in ("theta_high", "kept", "accuracy"):
        assert labelled[0][key] == pytest.approx(labelled[1][key], abs=0.03)
    assert len(list((tmp_path / "two/pseudo_labels").iterdir())) == 12
