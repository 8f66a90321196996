"""sdca.py: every equation against an independent computation, its gradient routing and its degenerate cases.

Property names such as P5 count through section "checkable properties" of the project's notes on SDCA; the reference values
are loops, closed forms, quadrature or hand values in float64.
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
from scripts import SPLITTABLE, TINY, kill_when, logged, result, run, run_as_two, same_weights, trained_alike
from torch.utils._python_dispatch import TorchDispatchMode
from trees import write_cityscapes, write_gta5, write_synthia

import common
import sdca
from sdca import (ClassStatistics, class_thresholds, confidence_histogram, contrastive_bound, cosines,
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


# --------------------------------------------------- class statistics ---------------------------------------------------


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
    """Three threads stand for three processes of 1, 40 and 300 pixels; their sum over processes waits until all have come."""
    barrier, given = threading.Barrier(3), {}

    def all_sum(tensor):
        given[threading.get_ident()] = tensor
        barrier.wait(60)
        total = sum(given.values())
        barrier.wait(60)
        return total

    monkeypatch.setattr(common, "all_sum", all_sum)
    batches = stream()[:3]
    parts = [collected([batch]) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(ClassStatistics.merge_processes, parts))
    for part in parts:
        assert_same(part, collected(batches))


def test_streamed_statistics_are_those_of_all_pixels():  # P1
    batches = stream()
    statistics = collected(batches)
    features, y = torch.cat([f for f, _ in batches]), torch.cat([y for _, y in batches])
    assert statistics.count.dtype == torch.int64 and statistics.count.tolist() == [(y == c).sum() for c in range(C)]
    for c in range(C):
        mine = features[y == c]
        if c == 7:
            assert statistics.mean[c].abs().sum() == 0 and statistics.variance[c].abs().sum() == 0 == statistics.count[c]
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
    again.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
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


# ------------------------------------------------------- the bound -------------------------------------------------------


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
    assert raw_bound(0.2 * f, y, mean, variance, tau).item() == pytest.approx(by_loop(0.2 * f, y, mean, variance, tau), abs=1e-12)
    unit = [F.normalize(t, dim=1) for t in (f, mean, variance)]
    assert contrastive_bound(f, y, mean, variance, tau).item() == pytest.approx(by_loop(unit[0], y, *unit[1:], tau), abs=1e-12)


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
    """SDCA-3 of one pixel by Gauss-Hermite quadrature: the positive enters only through s = f.m+ / tau, a Gaussian scalar."""
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


@pytest.mark.parametrize("tau, zero, ones", [(1.0, 0.3132617, 0.8132617), (0.5, 0.1269280, 2.1269280), (100.0, 0.6881597, 0.6882097)])
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
    """Near its own class mean a pixel's linear term is large; what is left falls with 1 / tau^2, whatever the covariance."""
    (mean, variance), y = gaussians(), labels(100)
    f = mean[y] + 0.1 * randn(100, D)
    unit, mu = F.normalize(f, dim=1), F.normalize(mean, dim=1)
    term = (unit * (mu[y] - mu.mean(0))).sum(1).mean().item()
    rest = {tau: contrastive_bound(f, y, mean, variance, tau).item() - math.log(C) + term / tau for tau in (100.0, 200.0)}
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


def test_masked_mean():
    assert common.masked_mean(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([True, False, True])).item() == 5


# ------------------------------------------------------ Lovasz-softmax ------------------------------------------------------


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


def test_source_loss():  # SDCA-1
    logits, label = randn(2, C, 4, 5).float(), labels(2 * 32 * 40).view(2, 32, 40)
    label[:, :3] = 255
    up = F.interpolate(logits, (32, 40), mode="bilinear", align_corners=True)
    expected = F.cross_entropy(up, label, ignore_index=255) + 0.75 * lovasz_softmax(up.softmax(1), label)
    torch.testing.assert_close(source_loss(logits, label, 0.75), expected)
    torch.testing.assert_close(source_loss(logits, label, 0.0), F.cross_entropy(up, label, ignore_index=255))
    void = torch.full((2, 32, 40), 255)
    assert source_loss(logits, void, 0.75).item() == 0


# ------------------------------------------------ labels on grid and target ------------------------------------------------


def test_grid_takes_the_top_left_pixel_of_each_cell():  # P12
    label = torch.randint(0, 256, (1, 720, 1280), generator=torch.Generator().manual_seed(0))
    assert torch.equal(common.grid_labels(label, (90, 160)), label[:, ::8, ::8])


def test_online_labels():  # P10
    logits = torch.tensor([[math.log(9.0), 0.0], [math.log(8.0), 0.0], [0.0, math.log(99.0)], [0.0, 0.0]]).T.view(1, 2, 1, 4)
    assert online_labels(logits, 0.89).flatten().tolist() == [0, 255, 1, 255]
    assert online_labels(10 * torch.ones(1, 2, 1, 1), 0.9).item() == 255  # large logits, no confidence: softmax comes first
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
    torch.testing.assert_close(class_thresholds(torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]])), torch.tensor([0.9]))
    assert (capped < theta).any() and (capped[:5] == theta[:5]).any()


@pytest.mark.parametrize("values, expected", [([], 0), ([0.5], 0.5), ([0.25, 0.5], 0.5), ([0.25, 0.5, 0.75], 0.75), ([1.0, 1.0], 1 - 2**-14)])
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
    assert pseudo_labels(prob, torch.tensor([0.6, 0.9])).flatten().tolist() == [0, 255, 255, 1]  # at the threshold: kept
    assert torch.equal(pseudo_labels(prob, torch.zeros(2)), prob.argmax(1))


# ------------------------------------------------------- the training -------------------------------------------------------


def test_gradients_go_where_they_should():
    """The feature level trains the backbone alone, the output level backbone and classifier; target pixels take part."""
    model = common.DeepLabV2(5, "resnet18")
    x = torch.randn(2, 3, 32, 64)
    for level in (0, 1):
        model.zero_grad()
        maps = model(x)[level]
        y = online_labels(model(x)[1], 0.0).flatten()
        r = sdca.representations(maps, argparse.Namespace(raw_statistics=False))
        contrastive_bound(r, y, *gaussians(5, r.shape[1])).backward()
        assert model.backbone[0].weight.grad.abs().sum() > 0
        assert [branch.weight.grad is not None for branch in model.classifier] == [level == 1] * 4


def test_raw_statistics_are_those_of_normalised_features():
    maps = randn(2, D, 3, 4)
    r = sdca.representations(maps, argparse.Namespace(raw_statistics=False))
    f = sdca.representations(maps, argparse.Namespace(raw_statistics=True))
    assert r[1 * 12 + 2 * 4 + 3].tolist() == maps[1, :, 2, 3].float().tolist()
    torch.testing.assert_close(f, F.normalize(maps.float(), dim=1).permute(0, 2, 3, 1).reshape(24, D))


def test_a_batch_is_pooled_as_by_update():
    one, other = collected(stream()), collected(stream())
    features, y = stream(seed=1)[3]
    sdca.pool_batch(one, features, y)
    other.update(features, y)
    assert_same(one, other, atol=0)


def test_schedule_and_the_authors_values(monkeypatch):  # P12
    monkeypatch.setattr(sys, "argv", ["sdca.py", "--source", "gta5"])
    args = sdca.parse_args()
    for base, steps in ((args.lr, args.iterations), (args.ssl_lr, args.ssl_iterations)):
        assert sdca.adaptation_lr(base, steps + 1, steps, args) == pytest.approx(0.398724 * base, rel=1e-6)  # the factor at STOP
        assert sdca.adaptation_lr(base, steps, steps, args) > 0.398724 * base
        assert sdca.adaptation_lr(base, args.ramp // 2, steps, args) == pytest.approx(0.5 * base, rel=0.02)
    assert (args.lr, args.ssl_lr, args.iterations, args.ssl_iterations) == (2.5e-4, 5e-4, 40000, 20000)
    assert args.iterations * args.horizon == 62500 and args.ssl_iterations * args.horizon == 31250
    assert (args.tau, args.delta, args.theta, args.lambda_lov, args.lambda_feat, args.lambda_out) == (100, 0.9, 0.9, 0.75, 1, 1)
    assert args.ssl and args.from_scratch_ssl and args.covariance and not args.raw_statistics
    monkeypatch.setattr(sys, "argv", ["sdca.py"])
    toy = sdca.parse_args()
    assert toy.iterations + toy.ssl_iterations == 240 and not toy.from_scratch_ssl and toy.horizon == 1


# -------------------------------------------------------- the script --------------------------------------------------------

FEW = [*TINY, "--warmup-iterations", 2, "--iterations", 3, "--ssl-iterations", 2, "--delta", 0.05]


def log(folder, stage):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One command, all stages, never interrupted: the folder in which it was started, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "runs/sdca-toy-s0", run(folder, "sdca.py", *FEW)


def same_training(one, other, name="sdca.pt"):
    """Whether two checkpoints hold the same network and the same class statistics, to the bit."""
    a, b = (torch.load(folder / name, weights_only=True) for folder in (one, other))
    return same_weights(one / name, other / name) and all(
        torch.equal(a[level][key], b[level][key]) for level in ("feat", "out") for key in ("mean", "variance", "count"))


def test_one_command_runs_all_stages(whole):
    folder, out = whole
    assert {"args.json", "log.jsonl", "source_only.pt", "sdca.pt", "last.pt", "panel.png", "result.json"} <= {
        p.name for p in folder.iterdir()}
    assert list(result(folder)["columns"]) == ["source only", "+ BN target", "SDCA, no SSL", "SDCA"]
    assert "SDCA, no SSL" in out and "motorcycle" in out
    grid = 24 * 4 * 8  # pixels of the source on the grid, some of them void
    passes = log(folder, "statistics")
    assert [line["level"] for line in passes] == ["feat", "out"] and 0.5 * grid < passes[0]["pixels"] == passes[1]["pixels"] <= grid
    saved = torch.load(folder / "sdca.pt", weights_only=True)
    assert passes[0]["pixels"] < saved["feat"]["count"].sum().item() <= grid + 3 * 2 * 4 * 8  # source batches only
    assert saved["feat"]["mean"].shape == (16, 512) and saved["out"]["variance"].shape == (16, 16) and saved["step"] == 3
    steps = log(folder, "adapt")
    assert all({"sup", "kept", "feat", "out", "own_feat", "other_feat", "own_out", "other_out"} <= set(line) for line in steps)
    assert all(line["loss"] == pytest.approx(line["sup"] + line["feat"] + line["out"], rel=1e-5) for line in steps)  # SDCA-9
    assert all(0 < line["kept"] <= 1 and -1 <= line["own_feat"] <= 1 for line in steps)
    labelled, = log(folder, "pseudo-labels")
    assert 0.45 < labelled["kept"] <= 1 and 0 <= labelled["accuracy"] <= 1 and labelled["theta_high"] <= 0.9
    files = sorted((folder / "pseudo_labels").iterdir())
    assert len(files) == 24 and common.read_label(files[0]).shape == (32, 64)
    assert Image.open(folder / "panel.png").width > 5 * 300  # image | truth | source only | SDCA, no SSL | SDCA


def test_statistics_come_first_and_from_source_pixels(tmp_path, start, monkeypatch):
    """In every step and at each level: pool the source pixels, then the two bounds with the statistics just pooled."""
    calls, pool, bound = [], sdca.pool_batch, sdca.contrastive_bound

    def pool_and_note(statistics, r, y):
        pool(statistics, r, y)
        calls.append(("pool", statistics.mean, r))

    def bound_and_note(r, y, mean, *options):
        calls.append(("bound", mean, r))
        return bound(r, y, mean, *options)

    monkeypatch.setattr(sdca, "pool_batch", pool_and_note)
    monkeypatch.setattr(sdca, "contrastive_bound", bound_and_note)
    monkeypatch.setattr(common.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["sdca.py", *map(str, FEW), "--init", str(start), "--no-ssl", "--out", str(tmp_path / "run")])
    sdca.main()
    assert len(calls) == 3 * 2 * 3
    for pooled, source, target in zip(calls[::3], calls[1::3], calls[2::3]):
        assert (pooled[0], source[0], target[0]) == ("pool", "bound", "bound")
        assert source[1] is pooled[1] and target[1] is pooled[1]
        assert source[2] is pooled[2] and target[2] is not pooled[2]


def test_killed_at_every_stage_and_resumed_the_run_ends_the_same(tmp_path, whole):
    """One run, killed by SIGKILL in each stage in turn."""
    arguments = ["sdca.py", *FEW, "--save-every", 1, "--out", "cut"]
    for stage in ("source", "statistics", "adapt", "pseudo-labels", "ssl"):
        resume = ["--resume"] if stage != "source" else []
        kill_when(tmp_path, lambda: logged(tmp_path / "cut", stage), *arguments, *resume)
    run(tmp_path, *arguments, "--resume")
    assert same_weights(tmp_path / "cut/source_only.pt", whole[0] / "source_only.pt")
    assert same_training(tmp_path / "cut", whole[0])
    assert same_weights(tmp_path / "cut/last.pt", whole[0] / "last.pt")
    assert result(tmp_path / "cut")["columns"] == result(whole[0])["columns"]


def test_the_total_loss_is_assembled_as_written(tmp_path, start):  # SDCA-9
    """With weights that differ; and padding, which a scale below 1 brings, is no confident pixel (delta 0 keeps all others)."""
    flags = ["--lambda-feat", 0.3, "--lambda-out", 2, "--tau", 0.5, "--delta", 0, "--no-ssl", "--scale-jitter", 0.5, 0.5]
    run(tmp_path, "sdca.py", *FEW, "--init", start, "--out", "run", *flags)
    steps = log(tmp_path / "run", "adapt")
    for line in steps:
        assert line["loss"] == pytest.approx(line["sup"] + 0.3 * line["feat"] + 2 * line["out"], rel=1e-5)
        assert 0.2 < line["kept"] < 0.4  # a quarter of the crop, and what the grid's corners add


def test_switching_levels_and_self_training_off(tmp_path, start):
    few = [*FEW, "--init", start]
    run(tmp_path, "sdca.py", *few, "--no-ssl", "--lambda-out", 0, "--out", "feat")
    assert same_weights(tmp_path / "feat/source_only.pt", start)
    assert list(result(tmp_path / "feat")["columns"]) == ["source only", "+ BN target", "SDCA"]
    assert same_weights(tmp_path / "feat/sdca.pt", tmp_path / "feat/last.pt") and not log(tmp_path / "feat", "ssl")
    assert not (tmp_path / "feat/pseudo_labels").exists() and [line["level"] for line in log(tmp_path / "feat", "statistics")] == ["feat"]
    last = log(tmp_path / "feat", "adapt")[-1]
    assert "feat" in last and "out" not in last
    run(tmp_path, "sdca.py", *few, "--no-ssl", "--lambda-feat", 0, "--no-covariance", "--delta", 2, "--out", "out")
    last = log(tmp_path / "out", "adapt")[-1]
    assert "out" in last and "feat" not in last and last["kept"] == last["own_out"] == 0  # no confident pixel: no accident
    run(tmp_path, "sdca.py", *few, "--lambda-feat", 0, "--lambda-out", 0, "--lambda-lov", 0, "--theta", 0.1, "--out", "plain")
    assert not log(tmp_path / "plain", "statistics") and log(tmp_path / "plain", "pseudo-labels")[0]["theta_high"] == pytest.approx(0.1)
    assert not same_weights(tmp_path / "feat/sdca.pt", tmp_path / "plain/sdca.pt")


def test_self_training_from_scratch_and_from_the_adapted_model(tmp_path, start):
    few = [*FEW, "--init", start, "--raw-statistics", "--tau", 0.5, "--horizon", 1.5625, "--precision", "bf16", "--ssl-iterations", 0]
    run(tmp_path, "sdca.py", *few, "--out", "on")
    assert same_weights(tmp_path / "on/sdca.pt", tmp_path / "on/last.pt")
    assert log(tmp_path / "on", "adapt")[-1]["lr"] > 0
    run(tmp_path, "sdca.py", *few, "--from-scratch-ssl", "--freeze-bn", "--out", "new")
    adapted, new = (torch.load(tmp_path / "new" / name, weights_only=True)["model"] for name in ("sdca.pt", "last.pt"))
    torch.manual_seed(common.mix_seed(0, 8))
    fresh = common.DeepLabV2(16, "resnet18")
    common.freeze_batch_norm(fresh)
    fresh = fresh.state_dict()
    assert all(torch.equal(new[key], fresh[key]) for key in fresh) and not torch.equal(new["classifier.0.weight"], adapted["classifier.0.weight"])


def test_real_formats_from_start_to_end(tmp_path):
    write_synthia(tmp_path)
    write_gta5(tmp_path)
    write_cityscapes(tmp_path)
    for path in (tmp_path / "cityscapes/gtFine/train").rglob("*.png"):
        path.write_bytes(b"closed")  # an adaptation that opened a target training label would stop here
    for source, classes in (("synthia", 16), ("gta5", 19)):
        run(tmp_path, "sdca.py", "--source", source, "--data-root", tmp_path, "--backbone", "resnet18", "--backbone-weights", "none",
            "--workers", 1, *FEW)
        folder = tmp_path / f"runs/sdca-{source}-s0"
        assert len(result(folder)["iou"]) == classes and ("miou13" in result(folder)) == (source == "synthia")
        assert len(list((folder / "pseudo_labels").iterdir())) == 6
        assert "accuracy" not in log(folder, "pseudo-labels")[0]


def test_a_checkpoint_or_network_that_does_not_fit_is_one_line(tmp_path, start):
    message = run(tmp_path, "sdca.py", *FEW, "--backbone", "resnet50", "--init", start, ok=False)
    assert "resnet18" in message and "resnet50" in message
    assert "gone.pt" in run(tmp_path, "sdca.py", *FEW, "--init", "gone.pt", ok=False)
    assert "vgg16-fcn8s" in run(tmp_path, "sdca.py", *FEW, "--backbone", "vgg16-fcn8s", ok=False)


def test_two_processes_share_one_run(tmp_path, start):
    """Pooled statistics, and bounds over all processes' pixels. Without Lovasz, which does not split over a batch."""
    arguments = [*FEW, *SPLITTABLE, "--init", start, "--lambda-lov", 0, "--lr", 0.02, "--ramp", 0, "--tau", 0.5]
    run(tmp_path, "sdca.py", *arguments, "--out", "one")
    run_as_two(tmp_path, "sdca.py", *arguments, "--out", "two")
    assert trained_alike(start, tmp_path / "one/sdca.pt", tmp_path / "two/sdca.pt")
    one, two = (torch.load(tmp_path / name / "sdca.pt", weights_only=True) for name in ("one", "two"))
    for level in ("feat", "out"):
        assert torch.equal(one[level]["count"], two[level]["count"])
        torch.testing.assert_close(one[level]["mean"], two[level]["mean"], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(one[level]["variance"], two[level]["variance"], atol=1e-4, rtol=1e-3)
    labelled = [log(tmp_path / name, "pseudo-labels")[0] for name in ("one", "two")]
    assert all(labelled[0][key] == pytest.approx(labelled[1][key], abs=1e-3) for key in ("theta_high", "kept", "accuracy"))
    assert len(list((tmp_path / "two/pseudo_labels").iterdir())) == 24
