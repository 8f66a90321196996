"""sdca.py: every equation against an independent computation, every wire of a training step and of main().

Reference values are loops, closed forms, quadrature, drawn samples or hand values in float64.
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
from scripts import SPLITTABLE, TINY, exact, load, result, run, run_as_two, same_weights, trained_alike
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from trees import write_cityscapes, write_synthia

import common
import sdca
from sdca import (ClassStatistics, class_thresholds, confidence_histogram, contrastive_bound, cosines, falling_order,
                  jaccard_drops, lovasz_softmax, online_labels, pseudo_labels, source_loss)

C, D = 19, 32


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n, seed=1, classes=C):
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))


def gaussians(classes=C, dim=D, seed=2):
    """Means (C, D) and variances (C, D) of some classes."""
    return randn(classes, dim, seed=seed), randn(classes, dim, seed=seed + 1).square()


def unit(rows):
    return F.normalize(rows, dim=1)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is created inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if torch.is_tensor(out):
            self.elements = max(self.elements, out.numel())
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


def test_streamed_statistics_are_those_of_all_pixels():
    batches = stream()
    statistics = collected(batches)
    features, y = torch.cat([f for f, _ in batches]), torch.cat([y for _, y in batches])
    assert statistics.count.dtype == torch.int64 and statistics.count.tolist() == [(y == c).sum() for c in range(C)]
    for c in range(C):
        mine = features[y == c]
        if c == 7:
            assert not statistics.mean[c].any() and not statistics.variance[c].any()
        else:
            torch.testing.assert_close(statistics.mean[c], mine.mean(0), atol=1e-12, rtol=0)
            torch.testing.assert_close(statistics.variance[c], mine.var(0, correction=0), atol=1e-12, rtol=0)
    for nothing in (torch.zeros(0, dtype=torch.long), torch.full((3,), 255)):
        statistics.update(randn(len(nothing), D), nothing)
        assert_same(statistics, collected(batches), atol=0)


def test_statistics_depend_neither_on_order_nor_on_grouping():
    batches = stream()
    whole = collected(batches)
    assert_same(collected(batches[::-1]), whole)
    one, two = collected(batches[:3]), collected(batches[3:])
    one.merge(two)
    assert_same(one, whole)


def test_statistics_of_three_processes_are_pooled_exactly(monkeypatch):
    """Three threads are processes of 1, 40 and 300 pixels; their sum over processes waits until all have come."""
    barrier, given = threading.Barrier(3), {}

    def all_sum(tensor):
        given[threading.get_ident()] = tensor
        barrier.wait(60)
        total = sum(given.values())
        barrier.wait(60)
        return total

    batches = stream()[:3]
    alone = collected(batches)
    everybody = sdca.pooled(alone)  # one process: a copy of its own
    everybody.count += 1
    assert torch.equal(everybody.mean, alone.mean) and torch.equal(everybody.count, alone.count + 1)
    monkeypatch.setattr(common, "all_sum", all_sum)
    with ThreadPoolExecutor(3) as pool:
        everybody = list(pool.map(sdca.pooled, [collected([batch]) for batch in batches]))
    for statistics in everybody:
        assert_same(statistics, alone)


def test_neither_variance_nor_count_rounds_in_float32():
    """Mean 1000, deviation 0.1: E[r^2] - m^2 in float32 has an error of 0.06, six times the variance."""
    features = (1000 + 0.1 * randn(4000, 4)).float()
    statistics, one = ClassStatistics(1, 4), ClassStatistics(1, 4)
    for part in features.split(500):
        statistics.update(part, torch.zeros(500, dtype=torch.long))
    torch.testing.assert_close(statistics.variance[0], features.double().var(0, correction=0), rtol=2e-3, atol=0)
    statistics.count += 2**24 - 4000
    one.update(features[:1], torch.zeros(1, dtype=torch.long))
    statistics.merge(one)
    assert statistics.count.item() == 2**24 + 1 and torch.tensor(2.0**24) + 1 == 2**24


def test_statistics_are_detached_and_stored_exactly(tmp_path):
    statistics = collected(stream())
    statistics.update(randn(5, D).requires_grad_(), labels(5))
    assert not statistics.mean.requires_grad and not statistics.variance.requires_grad
    torch.save(statistics.state_dict(), tmp_path / "s.pt")
    again = ClassStatistics(C, D)
    again.load_state_dict(load(tmp_path / "s.pt"))
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


def by_loop(features, y, mean, variance, tau):
    """SDCA-4 and SDCA-5 from the definitions, pixel by pixel, with a full matrix Sigma; lengths are made one."""
    terms, mu, sigma = [], unit(mean), torch.diag_embed(unit(variance))
    for f, own in zip(unit(features), y.tolist()):
        if own != 255:
            z = [((f @ mu[k]) / tau + (f @ sigma[k] @ f) / (2 * tau**2)).item() for k in range(len(mu))]
            terms.append(math.log(sum(map(math.exp, z))) - (f @ mu[own]).item() / tau)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("tau", [0.3, 100.0])
def test_bound_against_a_loop_and_in_the_authors_form(tau):
    """Class 4 has no pixels: it competes with the logit 0."""
    f, y, (mean, variance) = randn(40, D), labels(40), gaussians()
    y[::7], y[y == 4], mean[4], variance[4] = 255, 5, 0, 0
    value = contrastive_bound(f, y, mean, variance, tau).item()
    assert value == pytest.approx(by_loop(f, y, mean, variance, tau), abs=1e-12)
    centroids = contrastive_bound(f, y, mean, tau=tau).item()
    assert centroids == pytest.approx(by_loop(f, y, mean, 0 * variance, tau), abs=1e-12)
    f, y = unit(f)[y != 255], y[y != 255]
    quadratic = f.square() @ unit(variance).T / (2 * tau**2)
    authors = F.cross_entropy(f @ unit(mean).T / tau + quadratic, y) + quadratic.gather(1, y[:, None]).mean()
    assert value == pytest.approx(authors.item(), abs=1e-12)


def test_from_pairs_to_the_bound():
    """SDCA-3 by quadrature: a partner g enters only through the Gaussian number f.g / tau; SDCA-2 by drawing."""
    (mean, variance), y, tau, rounds = gaussians(classes=5, dim=8), labels(30, classes=5), 0.3, 4000
    f, mu, sigma = unit(randn(30, 8)), unit(mean), unit(variance)
    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(80))
    weights, infinite, bounds = weights / weights.sum(), [], []
    for i, own in enumerate(y.tolist()):
        x = (mu @ f[i] / tau)[:, None] + (sigma @ f[i]**2).sqrt()[:, None] / tau * nodes  # (C, 80)
        inner = (x.exp() * weights).sum(1)  # (C,)  E exp(f.g_k / tau)
        z = mu @ f[i] / tau + sigma @ f[i]**2 / (2 * tau**2)
        torch.testing.assert_close(inner.log(), z, atol=1e-10, rtol=0)  # SDCA-4
        infinite.append((weights * ((x[own].exp() + inner.sum() - inner[own]).log() - x[own])).sum().item())
        bounds.append(contrastive_bound(f[i:i + 1], y[i:i + 1], mean, variance, tau).item())
    assert all(bound > expected for bound, expected in zip(bounds, infinite))  # SDCA-5
    assert 0.03 < np.mean(bounds) - np.mean(infinite) < 1

    def drawn(partners):
        """SDCA-2 of pixel 0 with so many partners of each class."""
        g = mu + sigma.sqrt() * randn(rounds, partners + 1, 5, 8, seed=partners)
        score = (g @ f[0] / tau).exp()  # (rounds, partners + 1, C)
        a, others = score[:, 0, y[0]], score[:, 1:].mean(1).sum(1) - score[:, 1:, y[0]].mean(1)
        return ((a + others) / a).log().mean().item()

    assert drawn(1) < drawn(40) - 0.1 and drawn(40) == pytest.approx(infinite[0], abs=0.1)


def test_at_the_authors_temperature_only_the_means_count():  # SDCA-12
    """The bound of cosines in [0, 1] has a narrow range, to which the covariance adds at most 5e-5."""
    for classes, low, high in ((19, 2.9350, 2.9539), (16, 2.7632, 2.7820)):
        far = torch.cat([torch.eye(2)[1:], torch.eye(2)[:1].expand(classes - 1, 2)])
        best = contrastive_bound(torch.eye(classes)[:1], torch.tensor([0]), torch.eye(classes)).item()
        worst = contrastive_bound(torch.eye(2)[:1], torch.tensor([0]), far).item()
        assert (best, worst) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))
    (mean, variance), y = gaussians(), labels(100)
    gain = contrastive_bound(mean[y], y, mean, variance).item() - contrastive_bound(mean[y], y, mean).item()
    assert 0 < gain <= 5e-5
    f, mu = unit(mean[y] + 0.1 * randn(100, D)), unit(mean)
    term = (f * (mu[y] - mu.mean(0))).sum(1).mean().item()
    rest = {tau: contrastive_bound(f, y, mean, variance, tau).item() - math.log(C) + term / tau for tau in (100, 200)}
    assert term / 100 > 5e-3 and abs(rest[100]) < 2e-4 and rest[100] / rest[200] == pytest.approx(4, rel=0.05)


def test_gradient_of_the_bound_reaches_labelled_features_only():
    y, (mean, variance) = torch.tensor([1, 255, 3, 0]), (t.requires_grad_() for t in gaussians())
    f = randn(4, D).requires_grad_()
    contrastive_bound(f, y, mean, variance, 0.5).backward()
    assert mean.grad is None and variance.grad is None
    assert [row.any().item() for row in f.grad] == [True, False, True, True]
    assert torch.autograd.gradcheck(lambda x: contrastive_bound(x, y, mean, variance, 0.5), f)
    silent = torch.cat([-torch.ones(1, D), torch.ones(1, D)]).requires_grad_()  # length 0 behind a ReLU
    value = contrastive_bound(silent.relu(), y[[0, 2]], *(t.float() for t in gaussians()))
    value.backward()
    assert torch.isfinite(value) and not silent.grad[0].any() and torch.isfinite(silent.grad).all()


@pytest.mark.parametrize("n", [0, 3])
def test_bound_and_cosines_over_nothing_are_zero(n):
    f, y = torch.randn(n, D, requires_grad=True), torch.full((n,), 255)
    value = contrastive_bound(f, y, *gaussians())
    value.backward()  # connected to the graph
    assert value.item() == 0 and not f.grad.any() and cosines(f, y, gaussians()[0]) == (0, 0)


def test_cosines():
    f, y, (mean, _) = randn(30, D), labels(30), gaussians()
    f[:20] += 2 * mean[y[:20]]  # for most pixels the own class is the nearest
    y[::5] = 255
    own, other = [], []
    for i in (y != 255).nonzero()[:, 0].tolist():
        cosine = [F.cosine_similarity(f[i], mean[k], dim=0).item() for k in range(C)]
        own.append(cosine.pop(y[i]))
        other.append(max(cosine))
    value = cosines(f.requires_grad_(), y, mean)
    assert value[0].item() == pytest.approx(sum(own) / 24) and value[1].item() == pytest.approx(sum(other) / 24)
    assert not value[0].requires_grad


# -------------------------------------------------- Lovasz-softmax --------------------------------------------------


def lovasz_by_sets(prob, label):
    """The Lovasz extension by its definition: sum of e_(i) times the fall of J when pixel (i) goes wrong too."""
    classes = prob.shape[1]
    p, y = prob.permute(0, 2, 3, 1).reshape(-1, classes), label.flatten()
    p, y = p[y != 255], y[y != 255]
    losses = []
    for c in sorted(set(y.tolist())):
        truth = (y == c).tolist()
        errors = [(1 - p[i, c] if truth[i] else p[i, c]).item() for i in range(len(y))]
        wrong, before, loss = set(), 1.0, 0.0
        for i in sorted(range(len(y)), key=lambda i: -errors[i]):
            wrong.add(i)
            right = sum(t for j, t in enumerate(truth) if j not in wrong)
            union = sum(truth) + sum(not truth[j] for j in wrong)
            loss += errors[i] * (before - right / union)
            before = right / union
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("classes", [1, 5, 150])
def test_lovasz_against_the_definition(classes):
    """Over two images as one; some classes do not occur."""
    prob, label = randn(2, classes, 4, 6).mul(2).softmax(1), labels(48, classes=max(1, classes - 1)).view(2, 4, 6)
    label[:, 1] = 255
    assert lovasz_softmax(prob, label).item() == pytest.approx(lovasz_by_sets(prob, label), abs=1e-12)
    assert lovasz_softmax(prob.float(), label).item() == pytest.approx(lovasz_by_sets(prob, label), abs=1e-6)


def test_falls_of_the_jaccard_index_do_not_round():
    """A million pixels in float32: their differences would have errors of their own size. Together they fall by 1."""
    truth, errors = torch.arange(2**20) % 2 == 0, randn(2**20).abs().float()
    drops = jaccard_drops(errors, truth)
    torch.testing.assert_close(drops.double(), jaccard_drops(errors.double(), truth), atol=0, rtol=1e-5)
    assert drops.double().sum().item() == pytest.approx(1, abs=1e-5)
    assert not jaccard_drops(errors, torch.zeros_like(truth)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_falling_order(dtype):
    values = torch.cat([randn(500).abs(), randn(500, seed=1).abs() * 1e-30, torch.tensor([0, 0, 1, 1])]).to(dtype)
    order = falling_order(values)
    assert torch.equal(values[order], values.sort(descending=True).values)
    assert torch.equal(order.sort().values, torch.arange(len(values)))


def test_lovasz_gradient():
    logits, label = randn(1, 3, 3, 4).requires_grad_(), labels(12, classes=3).view(1, 3, 4)
    label[0, 0, 0] = 255
    assert torch.autograd.gradcheck(lambda x: lovasz_softmax(x.softmax(1), label), logits)
    lovasz_softmax(logits.softmax(1), label).backward()
    assert not logits.grad[0, :, 0, 0].any() and logits.grad[0, :, 1].abs().min() > 0


@pytest.mark.parametrize("height", [0, 2])
def test_lovasz_over_nothing_is_a_connected_zero(height):
    prob, label = torch.rand(1, 3, height, 2, requires_grad=True), torch.full((1, height, 2), 255)
    value = lovasz_softmax(prob, label)
    value.backward()
    assert value.item() == 0 and not prob.grad.any()


# ----------------------------------------------- labels of the target -----------------------------------------------


def test_online_labels():
    logits = torch.tensor([[9.0, 1.0], [8.0, 1.0], [1.0, 99.0], [1.0, 1.0]]).log().T.view(1, 2, 1, 4)
    assert online_labels(logits.requires_grad_(), 0.89).flatten().tolist() == [0, 255, 1, 255]
    assert not online_labels(logits, 0.89).requires_grad and online_labels(logits.bfloat16(), 0.5).shape == (1, 1, 4)
    assert online_labels(10 * torch.ones(1, 2, 1, 1), 0.9).item() == 255  # large logits, but unsure: softmax first
    assert online_labels(torch.zeros(1, 2, 1, 1), 0.5).item() == 0  # exactly delta is kept


def test_thresholds_are_medians_to_the_bin():
    prob = (4 * randn(3, 6, 40, 50)).softmax(1).float()
    prob[:, 5] = 0  # never predicted
    histogram = sum(confidence_histogram(part) for part in prob.split(1))
    theta = class_thresholds(histogram, maximum=1.0)
    confidence, label = prob.max(1)
    assert histogram.sum().item() == label.numel() and theta[5] == 0
    for c in range(5):
        mine = sorted(confidence[label == c].tolist())
        median = mine[round(0.5 * len(mine))]
        assert median - 2**-14 < theta[c].item() <= median
        assert (pseudo_labels(prob, theta) == c).sum() >= (label == c).sum() // 2
    capped = class_thresholds(histogram, maximum=0.76)
    torch.testing.assert_close(capped, theta.clamp(max=0.76))
    assert (capped < theta).any() and (capped[:5] == theta[:5]).any()
    assert class_thresholds(torch.tensor([15 * [0] + [9]])).item() == pytest.approx(0.9)


@pytest.mark.parametrize("values, expected", [
    ([], 0), ([0.5], 0.5), ([0.25, 0.5], 0.5), ([0.25, 0.5, 0.75], 0.75), ([1.0, 1.0], 1 - 2**-14)])
def test_thresholds_of_tiny_sets(values, expected):
    """Element number round(n / 2), halves to even, counted from 0; a confidence of 1 falls into the last bin."""
    prob = torch.tensor([values, [0.0] * len(values)]).view(1, 2, 1, len(values))
    assert class_thresholds(confidence_histogram(prob), maximum=1.0).tolist() == [expected, 0]
    huge = torch.tensor([[0, 2**40 + 1, 2**40 - 1, 0], [0, 2**40 + 1, 2**40 + 1, 0]])
    assert class_thresholds(huge).tolist() == [0.25, 0.5]  # nothing rounds


def test_pseudo_labels():
    prob = torch.tensor([[0.6, 0.4], [0.59, 0.41], [0.2, 0.8], [0.05, 0.95]]).T.view(1, 2, 1, 4)
    assert pseudo_labels(prob, torch.tensor([0.6, 0.9])).flatten().tolist() == [0, 255, 255, 1]  # at it: kept


# ------------------------------------------------- one training step -------------------------------------------------

SETTINGS = {"tau": 0.5, "delta": 0.3, "lambda_lov": 0.6, "lambda_feat": 0.3, "lambda_out": 2.0, "covariance": True,
            "precision": "fp32", "device": "cpu"}
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
        self.statistics = {level: ClassStatistics(5, r.shape[1]) for level, r in self.earlier.items()}
        for level, r in self.earlier.items():
            self.statistics[level].update(r, self.earlier_labels)

    def losses(self):
        return sdca.step_losses(self.network, self.statistics, self.x_s, self.y_s, self.x_t, self.args)

    def pixels(self):
        """{level: (r_s, r_t)} and the labels y_s, y_t of the grid's pixels."""
        f_s, o_s, f_t, o_t = (maps.permute(0, 2, 3, 1).reshape(64, -1).double().detach()
                              for images in (self.x_s, self.x_t) for maps in self.network(images))
        y_s, prob = common.grid_labels(self.y_s, (4, 8)).reshape(-1), o_t.softmax(1)
        y_t = torch.tensor([row.argmax().item() if row.max() >= self.args.delta else 255 for row in prob])
        return {"feat": (f_s, f_t), "out": (o_s, o_t)}, y_s, y_t

    def moments(self, level, r_s, y_s):
        """Mean and variance of each class over all source pixels so far, this batch included."""
        r, y = torch.cat([self.earlier[level].double(), r_s]), torch.cat([self.earlier_labels, y_s])
        return (torch.stack([r[y == k].mean(0) for k in range(5)]),
                torch.stack([r[y == k].var(0, correction=0) for k in range(5)]), [(y == k).sum() for k in range(5)])

    def expected(self):
        """{term: value} of the bounds and cosines, independent of the functions under test."""
        levels, y_s, y_t = self.pixels()
        assert 0 < (y_t != 255).sum() < len(y_t)  # some are confident, some are not
        values = {"kept": (y_t != 255).double().mean().item()}
        for level, (r_s, r_t) in levels.items():
            mean, variance, _ = self.moments(level, r_s, y_s)
            for name, r, y in (("s", r_s, y_s), ("t", r_t, y_t)):
                values[f"{level}_{name}"] = by_loop(r, y, mean, variance * self.args.covariance, self.args.tau)
            cosine = unit(r_t) @ unit(mean).T
            sure = (y_t != 255).nonzero()[:, 0].tolist()
            values[f"own_{level}"] = np.mean([cosine[i, y_t[i]].item() for i in sure])
            others = [max(cosine[i, k].item() for k in range(5) if k != y_t[i]) for i in sure]
            values[f"other_{level}"] = np.mean(others)
        return values


@pytest.mark.parametrize("settings", [{}, {"covariance": False}, {"tau": 0.2, "delta": 0.5},
                                      {"lambda_lov": 0.0, "lambda_feat": 0.0, "lambda_out": 0.0}])
def test_every_term_of_a_step_equals_its_independent_value(settings):  # SDCA-1, -7 to -10, -13
    step = Step(**settings)
    losses, expected = step.losses(), step.expected()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=2e-5, abs=2e-6), name
    up = common.upsample(step.network(step.x_s)[1], (32, 64))  # SDCA-1
    sup = F.cross_entropy(up, step.y_s, ignore_index=255).item()
    sup += step.args.lambda_lov * lovasz_softmax(up.softmax(1), step.y_s).item()
    assert losses["sup"].item() == pytest.approx(sup, rel=1e-5)
    total = sup + step.args.lambda_feat * (expected["feat_s"] + expected["feat_t"])
    total += step.args.lambda_out * (expected["out_s"] + expected["out_t"])
    assert losses["loss"].item() == pytest.approx(total, rel=2e-5)  # SDCA-9
    assert set(losses) == {*expected, "sup", "loss"}
    levels, y_s, _ = step.pixels()
    for level, (r_s, _) in levels.items():  # SDCA-10: this step's source pixels and nothing else
        mean, variance, count = step.moments(level, r_s, y_s)
        assert step.statistics[level].count.tolist() == count
        torch.testing.assert_close(step.statistics[level].mean, mean, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(step.statistics[level].variance, variance, atol=1e-6, rtol=1e-5)


# term: does its gradient reach the source image, the target image, the backbone, the classifier?
ROUTES = {"sup": (True, False, True, True), "feat_s": (True, False, True, False), "feat_t": (False, True, True, False),
          "out_s": (True, False, True, True), "out_t": (False, True, True, True)}


def test_each_term_reaches_what_it_should_and_the_total_is_their_sum():  # SDCA-7 to SDCA-9
    reached, sums = {}, {}
    for term in (*TERMS, "loss"):
        step = Step()
        step.losses()[term].backward()
        ends = [step.x_s, step.x_t, step.network.backbone.weight, step.network.classifier.weight]
        sums[term] = [torch.zeros_like(end) if end.grad is None else end.grad for end in ends]
        reached[term] = tuple(gradient.any().item() for gradient in sums[term])
    assert reached == {**ROUTES, "loss": (True, True, True, True)}
    for total, sup, *bounds in zip(sums["loss"], *(sums[term] for term in TERMS)):
        expected = sup + sum(weight * bound for weight, bound in zip((0.3, 0.3, 2.0, 2.0), bounds))
        torch.testing.assert_close(total, expected, atol=1e-6, rtol=1e-4)


def test_a_step_without_a_confident_target_pixel_or_a_source_label():
    step = Step(delta=2.0)
    step.y_s[:] = 255
    losses = step.losses()
    losses["loss"].backward()
    assert all(losses[term].item() == 0 for term in (*TERMS, "loss", "kept", "own_out"))
    assert all(not parameter.grad.any() for parameter in step.network.parameters())  # zeros, connected
    assert step.statistics["feat"].count.tolist() == torch.bincount(step.earlier_labels, minlength=5).tolist()


def test_bf16_rounds_the_network_and_no_loss():
    bf16, fp32 = Step(precision="bf16").losses(), Step().losses()
    for name in (*TERMS, "loss"):
        assert bf16[name].dtype == torch.float32 and bf16[name].item() == pytest.approx(fp32[name].item(), rel=0.05)
    assert any(bf16[name].item() != fp32[name].item() for name in TERMS)


def test_schedule_and_the_authors_values(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sdca.py", "--source", "gta5"])
    args = sdca.parse_args()
    for base, steps in ((args.lr, args.iterations), (args.ssl_lr, args.ssl_iterations)):
        assert sdca.adaptation_lr(base, steps + 1, steps, args) == pytest.approx(0.398724 * base, rel=1e-6)  # at STOP
        assert sdca.adaptation_lr(base, args.ramp // 2, steps, args) == pytest.approx(0.5 * base, rel=0.02)
    assert (args.lr, args.ssl_lr, args.iterations, args.ssl_iterations) == (2.5e-4, 5e-4, 40000, 20000)
    assert args.iterations * args.horizon == 62500 and args.ssl_iterations * args.horizon == 31250
    assert (args.tau, args.delta, args.theta, args.lambda_lov) == (100, 0.9, 0.9, 0.75)
    assert (args.lambda_feat, args.lambda_out) == (1, 1)
    assert args.ssl and args.from_scratch_ssl and args.covariance
    monkeypatch.setattr(sys, "argv", ["sdca.py"])
    toy = sdca.parse_args()
    assert (toy.lambda_feat, toy.lambda_out, toy.horizon, toy.from_scratch_ssl) == (10, 10, 1, False)


def test_a_number_that_makes_no_sense_is_refused(monkeypatch, capsys):
    flags = ["tau", "lr", "ssl-lr", "horizon", "delta", "theta", "lambda-lov", "lambda-feat", "lambda-out",
             "iterations", "ssl-iterations"]
    wrong = [(flag, value) for flag in flags for value in ("nan", "-1")]
    for flag, value in [*wrong, ("tau", "0"), ("lr", "0"), ("horizon", "0.9"), ("delta", "1.1"), ("theta", "2")]:
        monkeypatch.setattr(sys, "argv", ["sdca.py", f"--{flag}={value}"])
        with pytest.raises(SystemExit):
            sdca.parse_args()
        assert f"--{flag}" in capsys.readouterr().err


# --------------------------------------------- main(), watched at work ----------------------------------------------

FEW = [*TINY, "--workers", 0, "--warmup-iterations", 2, "--iterations", 3, "--ssl-iterations", 2, "--delta", 0.05]


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

            def __init__(self, model, args):
                self.model = model

            def __call__(self, images):
                note("forward", training=self.model.training, images=images)
                return self.model(images)

        real_step = sdca.step_losses
        patch.setattr(sdca, "step_losses", step)
        patch.setattr(common, "distribute", Distributed)
        around(common, "settle_batch_norm", lambda model, views, args: note(
            "settle", domain=views.domain, split=views.split, augmented=views.augment is not None))
        around(common, "training_batches", lambda dataset, *_, share=1: note("loader", of=dataset.domain, share=share))
        around(sdca, "make_optimizer", lambda model, args: note(
            "optimizer", live=len(common.live_batch_norms(model)), start=weights(model)))
        around(sdca, "collect_statistics", lambda model, *_: note(
            "collect", live=len(common.live_batch_norms(model)), start=weights(model)))
        around(sdca, "target_cosines", lambda model, statistics, args: note(
            "cosines", start=weights(model), means={level: s.mean for level, s in statistics.items()}))
        around(sdca, "label_target", lambda model, args, folder: note("label", start=weights(model)))
        around(sdca, "train_source", lambda model, dataset, args, run, file, steps, lr, criterion: note(
            "warm-up", dataset=dataset, file=file, steps=steps, lr=lr, criterion=criterion))
        patch.setattr(common, "compare_with_source_only", lambda models, args, run, source_model, **meters: note(
            "compare", models={title: weights(model) for title, model in models.items()}, source=weights(source_model),
            meters=meters))
        begin = ["--init", start] if start else []
        patch.setattr(sys, "argv", ["sdca.py", *map(str, [*FEW, *begin, *flags, "--out", folder])])
        sdca.main()
    return events


def only(events, what):
    return [details for name, details in events if name == what]


def order(events, *names):
    return [name for name, _ in events if name in names]


SGD = ["--optimizer", "sgd", "--lr", 0.01, "--ssl-lr", 0.004, "--head-lr", 3, "--ramp", 2, "--horizon", 2,
       "--power", 0.7]


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
    assert [loader["of"] for loader in only(events, "loader") if loader["share"] == 2] == ["source", "target"]


def test_main_adapts_in_training_mode_on_what_it_should(main_on_target):
    events = main_on_target[1]
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
        assert steps[0]["statistics"][level] is steps[2]["statistics"][level]
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
        label[(label == k) & (confidence < min(0.1, medians[k]))] = 255
    stored = [common.read_label(folder / f"pseudo_labels/{item['name']}.png") for item in dataset]
    assert torch.equal(torch.from_numpy(np.stack(stored)).long(), label)
    assert 0.05 < (label == 255).double().mean() < 0.6 and max(medians) > 0.1 > min(m for m in medians if m)
    told, = log(folder, "pseudo-labels")
    assert told["kept"] == (label != 255).double().mean().item() and 0 <= told["accuracy_classes"] <= 1
    used = [min(0.1, m) for m in medians]
    assert (told["theta_low"], told["theta_high"]) == (pytest.approx(min(used)), pytest.approx(max(used)))


def test_ssl_is_plain_training_on_the_stored_labels(main_on_target):  # SDCA-11
    """Both steps again, from sdca.pt with torch's own cross-entropy and optimizer."""
    folder, events = main_on_target
    args = only(events, "step")[0]["args"]
    model = common.load_model(folder / "sdca.pt", args)
    common.freeze_batch_norm(model)
    learning = [{"params": [p for p in part.parameters() if p.requires_grad]}
                for part in (model.backbone, model.classifier)]
    optimizer = torch.optim.SGD(learning, lr=0.0, momentum=0.9, weight_decay=5e-4)
    files = common.target_dataset(args, "train", common.training_augment(args), label_dir=folder / "pseudo_labels")
    model.train()
    for number, (image, label) in enumerate(common.training_batches(files, args, common.mix_seed(0, 6), 0, 2), 1):
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
    adapted = log(folder, "adapt")[0]
    assert {*TERMS, "loss", "lr", "kept", "own_feat", "other_feat", "own_out", "other_out"} <= set(adapted)


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


# ---------------------------------------------- passes over a data set ----------------------------------------------


def passing(start):
    """Arguments, model and statistics for a pass over the tiny toy."""
    args = argparse.Namespace(source="toy", toy_world=0, toy_images=20, size=(32, 64), workers=0, device="cpu",
                              precision="fp32", batch_size=2)
    model = common.load_model(start, args)
    return args, model, {"feat": ClassStatistics(16, model.feature_dim), "out": ClassStatistics(16, 16)}


@torch.no_grad()
def grid_pixels(model, dataset):
    """{level: representations (n, D)} and labels (n,) of all pictures, one by one, in evaluation mode."""
    rows, y = {"feat": [], "out": []}, []
    for item in dataset:
        for level, maps in zip(rows, model.eval()(common.normalise(item["image"][None]))):
            rows[level].append(common.as_pixels(maps).double())
        y.append(common.grid_labels(item["label"][None].long(), (5, 9)).flatten())
    return {level: torch.cat(parts) for level, parts in rows.items()}, torch.cat(y)


def test_target_cosines_are_those_of_all_validation_pixels(start):
    """Over more than one batch; the model comes in training mode."""
    args, model, statistics = passing(start)
    for known in statistics.values():
        known.mean = randn(*known.mean.shape).abs()
    found = sdca.target_cosines(model.train(), statistics, args)
    rows, y = grid_pixels(model, common.target_dataset(args, "val"))
    assert len(y) > 8 * 45
    for level, r in rows.items():
        own, other = cosines(r, y, statistics[level].mean)
        assert found[f"own_{level}"] == pytest.approx(own.item(), abs=1e-5)
        assert found[f"other_{level}"] == pytest.approx(other.item(), abs=1e-5)


def test_collected_statistics_are_those_of_the_clean_source(start):
    """One pass, every source picture once, in evaluation mode."""
    args, model, statistics = passing(start)
    lines = []
    notes = argparse.Namespace(log=lambda stage, **values: lines.append((stage, values)))
    sdca.collect_statistics(model.train(), statistics, args, notes)
    rows, y = grid_pixels(model, common.source_dataset(args))
    for level, r in rows.items():
        expected = ClassStatistics(*statistics[level].mean.shape)
        expected.update(r, y)
        assert torch.equal(statistics[level].count, expected.count)
        torch.testing.assert_close(statistics[level].mean, expected.mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(statistics[level].variance, expected.variance, atol=1e-5, rtol=1e-3)
    seen = {"pixels": (y != 255).sum().item(), "classes": len(set(y.tolist()) - {255})}
    assert lines == [("statistics", {"level": level, **seen}) for level in ("feat", "out")]


# ---------------------------------------------------- the script ----------------------------------------------------


def log(folder, stage):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def test_one_command_runs_all_stages(tmp_path):
    out, folder = run(tmp_path, "sdca.py", *FEW), tmp_path / "runs/sdca-toy-s0"
    assert {"args.json", "log.jsonl", "source_only.pt", "sdca.pt", "last.pt", "panel.png", "result.json"} <= {
        p.name for p in folder.iterdir()}
    assert list(result(folder)["columns"]) == ["source only", "+ BN target", "SDCA, no SSL", "SDCA"]
    assert "SDCA, no SSL" in out and "motorcycle" in out and "own_feat_after" in out
    assert len(result(folder)["meters"]) == 8 and len(list((folder / "pseudo_labels").iterdir())) == 12
    saved = load(folder / "sdca.pt")
    assert saved["feat"]["mean"].shape == (16, 256) and saved["out"]["variance"].shape == (16, 16)


def main_in_process(folder, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sdca.py", *map(str, [*FEW, *flags, "--out", folder])])
        sdca.main()


class Stopped(Exception):
    pass


@exact
def test_stopped_in_every_stage_and_resumed_the_run_ends_the_same(tmp_path, monkeypatch):
    """One run, stopped in each stage in turn; in two stages half-way, after the first step is saved."""
    cut, whole, write = tmp_path / "cut", tmp_path / "whole", common.Run.log
    main_in_process(whole)
    for stage, lines in (("source", 1), ("statistics", 1), ("adapt", 2), ("pseudo-labels", 1), ("ssl", 2)):
        def stop(self, name, *given, **values):
            write(self, name, *given, **values)
            if name == stage and len(log(cut, name)) >= lines:
                raise Stopped

        monkeypatch.setattr(common.Run, "log", stop)
        with pytest.raises(Stopped):
            main_in_process(cut, "--save-every", 1, *["--resume"] * (stage != "source"))
    monkeypatch.setattr(common.Run, "log", write)
    main_in_process(cut, "--save-every", 1, "--resume")
    for name in ("source_only.pt", "sdca.pt", "last.pt"):
        assert same_weights(cut / name, whole / name)
    one, other = (load(folder / "sdca.pt") for folder in (cut, whole))
    assert all(same(one[level], other[level]) for level in ("feat", "out"))
    assert all(result(cut)[key] == result(whole)[key] for key in ("columns", "meters"))


def test_a_target_without_any_labels(tmp_path):
    """Real formats: all stages run, what needs labels is left out."""
    write_synthia(tmp_path)
    write_cityscapes(tmp_path)
    (tmp_path / "cityscapes/gtFine").rename(tmp_path / "elsewhere")
    folder = tmp_path / "run"
    main_in_process(folder, "--source", "synthia", "--data-root", tmp_path, "--backbone", "resnet14",
                    "--backbone-weights", "none", "--iterations", 1, "--ssl-iterations", 1)
    assert not log(folder, "before") and len(log(folder, "ssl")) == 1 and load(folder / "last.pt")["step"] == 1
    assert "accuracy" not in log(folder, "pseudo-labels")[0] and len(list((folder / "pseudo_labels").iterdir())) == 6


def test_two_processes_share_one_run(tmp_path, start):
    """Pooled statistics, histograms and thresholds; losses are each process's own means."""
    arguments = [*SPLITTABLE, "--init", start, "--lr", 0.02, "--ssl-lr", 0.02, "--ramp", 0, "--tau", 0.5,
                 "--lambda-feat", 1, "--lambda-out", 1]
    main_in_process(tmp_path / "one", *arguments)
    run_as_two(tmp_path, "sdca.py", *FEW, *arguments, "--out", "two")
    assert trained_alike(start, tmp_path / "one/sdca.pt", tmp_path / "two/sdca.pt")
    saved = [load(tmp_path / name / "sdca.pt") for name in ("one", "two")]
    for one, two in ((saved[0][level], saved[1][level]) for level in ("feat", "out")):
        assert torch.equal(one["count"], two["count"])
        torch.testing.assert_close(one["mean"], two["mean"], atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(one["variance"], two["variance"], atol=2e-2, rtol=5e-2)
    for stage, key, gap in (("statistics", "pixels", 0), ("before", "own_feat", 1e-5), ("before", "other_out", 1e-5),
                            ("pseudo-labels", "theta_high", 0.03), ("pseudo-labels", "kept", 0.03)):
        one, two = (log(tmp_path / name, stage)[0][key] for name in ("one", "two"))
        assert one == pytest.approx(two, abs=gap, rel=0), key
    assert len(list((tmp_path / "two/pseudo_labels").iterdir())) == 12
