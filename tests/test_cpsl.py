"""cpsl.py: every equation against an independent computation, every wire of a training step and of main().

P1 to P14 are properties of the method that can be checked without its data; the numbers are closed forms or hand
values.
"""

import argparse
import copy
import json
import math
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scripts import (DEVICE, SPLITTABLE, TINY, exact, kill_when, load, logged, result, run, run_as_two, same_weights,
                     trained_alike)
from torch import nn
from trees import write_cityscapes, write_synthia

import common
import cpsl
from cpsl import (MemoryBank, SelfLabelingHead, class_sums, confident_labels, kl_divergence, pick_pixels, rectify,
                  self_labeling_loss, sinkhorn, symmetric_cross_entropy, take_pixels, update_average)

K = 19
# The authors' marginal for GTA5 -> Cityscapes, in percent, in trainId order.
SHIPPED = [37.922, 4.930, 22.665, 1.551, 1.721, 1.403, 0.219, 0.221, 13.338, 2.424,
           4.341, 1.315, 0.161, 6.605, 0.408, 0.279, 0.185, 0.123, 0.191]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def labels(*shape, classes=K, seed=1):
    return torch.randint(0, classes, shape, generator=seeded(seed))


def picture(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=seeded(seed), dtype=torch.uint8)


def random_scores(*shape, seed=0, dtype=torch.float64):
    return (0.3 * randn(*shape, seed=seed, dtype=dtype)).clamp(-1, 1)


def long_tail(dtype=torch.float64):
    r = torch.tensor(SHIPPED, dtype=dtype)
    return r / r.sum()


def make_head(prototypes):
    """A head with these prototypes."""
    head = SelfLabelingHead(*prototypes.shape)
    head.prototypes.data = prototypes.clone()
    return head


def sinkhorn_by_the_letter(scores, marginal, epsilon=0.05, iterations=3):
    """CPSL-6 on a B x K matrix of plain numbers, in float64."""
    Q = np.exp(scores.double().numpy() / epsilon)  # (B, K)
    B = len(Q)
    for _ in range(iterations):
        for k, share in enumerate(marginal.tolist()):
            Q[:, k] *= share / Q[:, k].sum()
        for b in range(B):
            Q[b] /= Q[b].sum() * B
    return B * torch.from_numpy(Q)


def variation(p, q):
    """Total variation distance."""
    return 0.5 * (p - q).abs().sum().item()


# ----------------------------------------------------- Sinkhorn -----------------------------------------------------


def test_sinkhorn_against_a_loop():  # CPSL-6
    scores, r = random_scores(40, K), long_tail()
    for epsilon, iterations in ((0.05, 1), (0.05, 10), (0.2, 2)):
        expected = sinkhorn_by_the_letter(scores, r, epsilon, iterations)
        torch.testing.assert_close(sinkhorn(scores, r, epsilon, iterations), expected, atol=1e-12, rtol=1e-9)
    Q = sinkhorn(scores.requires_grad_(), r)  # the authors' values
    torch.testing.assert_close(Q, sinkhorn_by_the_letter(scores.detach(), r), atol=1e-12, rtol=1e-9)
    assert not Q.requires_grad
    stacked = random_scores(3, 50, K)  # several problems
    torch.testing.assert_close(sinkhorn(stacked, r), torch.stack([sinkhorn(s, r) for s in stacked]))


def test_sinkhorn_approaches_the_class_marginal():  # P1, P2
    scores, r = random_scores(20000, K), long_tail()
    for iterations, expected, tolerance in ((1, 0.41, 0.02), (3, 0.19, 0.02), (10, 0.02, 0.02), (50, 0, 1e-5)):
        Q = sinkhorn(scores, r, iterations=iterations)
        assert variation(Q.mean(0), r) == pytest.approx(expected, abs=tolerance)
        torch.testing.assert_close(Q.sum(1), torch.ones(20000, dtype=torch.float64))


def test_sinkhorn_solves_the_transport_problem():  # CPSL-5, at convergence
    scores, r = random_scores(6, 4, seed=3), torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    Q = sinkhorn(scores, r, 0.2, 2000) / 6

    def objective(plan):
        return (plan * scores).sum() - 0.2 * (plan * plan.log()).sum()

    assert variation(Q.sum(0), r) < 1e-9
    for seed in range(20):  # every small change that keeps both marginals makes it worse
        change = randn(6, 4, seed=seed, dtype=torch.float64)
        change = change - change.mean(0) - change.mean(1, keepdim=True) + change.mean()
        assert objective(Q + 1e-4 * Q.min() * change) < objective(Q)


def test_sinkhorn_in_float32_and_under_autocast():
    scores, r = random_scores(3000, K), long_tail()
    with torch.autocast("cpu", torch.bfloat16):
        Q, half = sinkhorn(scores.float(), r.float()), sinkhorn(scores.bfloat16(), r.bfloat16())
    assert Q.dtype == half.dtype == torch.float32
    torch.testing.assert_close(Q.double(), sinkhorn(scores, r), atol=1e-5, rtol=0)
    low = sinkhorn(torch.tensor([[1.0, 0.9], [0.0, 0.1]]), torch.tensor([0.5, 0.5]), epsilon=0.005)  # exp(-180) is 0
    assert low[0].sum().item() == pytest.approx(1, rel=1e-6) and low[1].tolist() == [0, 0]
    high = sinkhorn(scores.float() + 100, r.float())  # exp(100 / 0.05) alone would overflow
    torch.testing.assert_close(high.double(), sinkhorn(scores, r), atol=2e-3, rtol=0)


def test_sinkhorn_with_classes_of_zero_mass_and_cosines_at_their_ends():
    scores, r = random_scores(100, 5, dtype=torch.float32), torch.tensor([0.7, 0.0, 0.3, 0.0, 0.0])
    scores[0] = torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0])  # a pixel that likes only what gets nothing
    Q = sinkhorn(scores, r, iterations=5)
    assert (Q[:, r == 0] == 0).all()
    torch.testing.assert_close(Q.sum(1), torch.ones(100))
    torch.testing.assert_close(Q[:, r > 0], sinkhorn(scores[:, r > 0], r[r > 0], iterations=5))


# ------------------------------------------------ assignment and bank ------------------------------------------------


def test_bank_is_first_in_first_out():  # P10
    bank = MemoryBank(65536, 4)
    for push in range(256):
        assert not bank.full and len(bank.usable()) == 0 and len(bank.items()) == 256 * push
        bank.push(torch.full((256, 4), float(push)))
    assert bank.full and bank.usable() is bank.items()
    bank.push(torch.full((256, 4), 256.0))
    assert bank.items().shape == (65536, 4) and bank.full
    torch.testing.assert_close(bank.items()[:, 0], torch.arange(1.0, 257).repeat_interleave(256))
    small, none = MemoryBank(3, 1), MemoryBank(0, 1)
    small.push(torch.arange(5.0)[:, None].requires_grad_())
    assert small.items().tolist() == [[2], [3], [4]] and not small.items().requires_grad
    none.push(torch.ones(2, 1))
    assert none.full and none.items().shape == none.usable().shape == (0, 1)


@pytest.mark.parametrize("size", [0, 100])
def test_assignment_is_the_last_rows_of_each_images_own_problem(size):  # P10
    scores, past, r = random_scores(3, 20, K), random_scores(size, K, seed=1), long_tail()
    for settings in ((), (0.2, 5)):
        expected = torch.stack([sinkhorn_by_the_letter(torch.cat([past, s]), r, *settings)[-20:] for s in scores])
        torch.testing.assert_close(cpsl.assign(scores, past, r, *settings), expected)


# ------------------------------------------------------ sampling ------------------------------------------------------


def long_tailed_maps(count, seed=0):
    """Labels (count, 6, 10) of four classes with 41, 13, 5 and 1 pixels, each map in its own order."""
    flat = torch.tensor([0] * 41 + [1] * 13 + [2] * 5 + [3])
    return torch.stack([flat[torch.randperm(60, generator=seeded(seed + i))] for i in range(count)]).view(count, 6, 10)


@pytest.mark.parametrize("n", [1, 16, 59, 60])
def test_proportional_sampling_gives_every_class_its_share(n):  # CPSL-18
    label = long_tailed_maps(300)
    position = pick_pixels(label, n, torch.rand(300, 6, 10, generator=seeded(5)))
    assert position.shape == (300, n)
    counts = F.one_hot(label.flatten(1).gather(1, position), 4).sum(1).double()  # (300, 4)
    share = torch.tensor([41.0, 13, 5, 1], dtype=torch.float64) * n / 60
    assert ((counts - share).abs() < 1).all()
    torch.testing.assert_close(counts.mean(0), share, atol=0.15, rtol=0)  # and on average exactly it
    assert all(len(set(row.tolist())) == n for row in position)


@pytest.mark.parametrize("proportional", [True, False])
def test_no_pixel_is_favoured_by_sampling(proportional):  # CPSL-18
    label = long_tailed_maps(1).expand(20000, -1, -1)
    position = pick_pixels(label, 16, torch.rand(20000, 6, 10, generator=seeded()), proportional)
    often = torch.bincount(position.flatten(), minlength=60) / 20000
    assert (often - 16 / 60).abs().max() < 5 * math.sqrt(16 / 60 * 44 / 60 / 20000)
    together = (position == position[0, 0]).any(1) & (position == position[0, 1]).any(1)
    assert 0 < together.double().mean() < 2 * (16 / 60) ** 2  # two pixels are no couple


def test_uniform_sampling_is_blind_to_the_labels():
    u = torch.rand(50, 6, 10, generator=seeded())
    position = pick_pixels(long_tailed_maps(50), 16, u, False)
    assert torch.equal(position, pick_pixels(long_tailed_maps(50, seed=9), 16, u, False))
    assert not torch.equal(pick_pixels(long_tailed_maps(50), 16, u), position)
    everything = pick_pixels(long_tailed_maps(50), 100, u, False)
    assert all(sorted(row.tolist()) == list(range(60)) for row in everything)


def test_take_pixels():
    maps = torch.arange(2.0 * 3 * 5 * 8).view(2, 3, 5, 8)
    taken = take_pixels(maps, torch.tensor([[9, 0], [39, 1]]))
    assert taken.shape == (2, 2, 3)
    assert taken[1, 0].tolist() == maps[1, :, 4, 7].tolist() and taken[0, 0].tolist() == maps[0, :, 1, 1].tolist()


# --------------------------------------------------- self-labelling ---------------------------------------------------


def test_self_labeling_loss_against_a_loop():  # CPSL-7
    z, c, q = randn(15, 8), 3 * randn(4, 8, seed=1), randn(15, 4, seed=2).softmax(1)
    terms = []
    for i in range(15):
        cosine = [(z[i].double() @ c[k].double() / z[i].double().norm() / c[k].double().norm()).item() / 0.08
                  for k in range(4)]
        norm = math.log(sum(map(math.exp, cosine)))
        terms.append(-sum(q[i, k].item() * (cosine[k] - norm) for k in range(4)))
    assert self_labeling_loss(z, c, q).item() == pytest.approx(sum(terms) / 15, rel=1e-5)
    stacked = make_head(c)(z.view(3, 5, 8), q.view(3, 5, 4), 0.08)
    assert stacked.item() == pytest.approx(sum(terms) / 15, rel=1e-5)
    assert self_labeling_loss(z, c, q, temperature=1e9).item() == pytest.approx(math.log(4), rel=1e-5)
    nothing = self_labeling_loss(z[:0], c.requires_grad_(), q[:0])
    nothing.backward()
    assert nothing.item() == 0 and c.grad.abs().sum() == 0


def test_self_labeling_trains_the_prototypes_only():  # P6
    head, z, q = make_head(F.normalize(randn(5, 8), dim=1)), randn(10, 8, seed=1), randn(10, 5, seed=2).softmax(1)
    loss = head(z.requires_grad_(), q.requires_grad_(), 0.08)
    loss.backward()
    assert head.prototypes.grad.abs().sum() > 0 and z.grad is None and q.grad is None
    along = (head.prototypes.grad * head.prototypes).sum(1)
    torch.testing.assert_close(along, torch.zeros(5), atol=1e-5, rtol=0)  # a prototype's length does not matter
    assert self_labeling_loss(z, head.prototypes - 0.01 * head.prototypes.grad, q) < loss


def test_head_scores_are_cosines_and_only_prototypes_are_learnt():
    head, features = make_head(5 * randn(6, 12)), randn(2, 12, 3, 4, seed=1)
    expected = torch.cosine_similarity(features[:, None], head.prototypes[None, :, :, None, None], dim=2)
    torch.testing.assert_close(head.cosine(features), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert head.cosine(features.bfloat16()).shape == (2, 6, 3, 4)
    assert [name for name, _ in head.named_parameters()] == ["prototypes"]
    assert set(head.state_dict()) == {"prototypes", "start", "marginal"}
    head.start.copy_(randn(6, 12, seed=2))
    assert head.moved().item() == pytest.approx(1 - torch.cosine_similarity(head.prototypes, head.start).mean().item())


def test_class_sums_against_a_loop():
    features, label = randn(3, 4, 5, 6), labels(3, 5, 6, classes=3, seed=0)
    label[0][label[0] == 2] = 1
    label[1] = 0
    label[1, 0, :2] = 2  # two pixels: too few for least = 3
    label[1, 1, :3] = 1  # three: just enough
    sums, images = class_sums(features, label, 4, least=3)
    for k in range(4):
        means = [features[n][:, label[n] == k].mean(1) for n in range(3) if (label[n] == k).sum() >= 3]
        assert images[k] == len(means)
        torch.testing.assert_close(sums[k], sum(means) if means else torch.zeros(4))
    assert images.tolist() == [3, 3, 1, 0]


# --------------------------------------------------- rectification ---------------------------------------------------


def test_rectification_hand_values():  # P7
    p, cosine = torch.tensor([0.6, 0.4]).view(1, 2, 1, 1), torch.tensor([0.1, 0.2]).view(1, 2, 1, 1)
    label = rectify(p, cosine)  # weights 1 : 3.490, product 0.6 : 1.396
    assert label.shape == (1, 1, 1) and label.dtype == torch.int64 and label.item() == 1
    assert rectify(p, cosine, temperature=1.0).item() == 0  # 0.6 > 0.4 e^0.1
    # e^(d / 0.08) = 1.5 at d = 0.0324: the weight ratio decides there
    assert rectify(p, torch.tensor([0.0, 0.0323]).view(1, 2, 1, 1)).item() == 0
    assert rectify(p, torch.tensor([0.0, 0.0326]).view(1, 2, 1, 1)).item() == 1


def test_rectification_against_the_product():  # CPSL-16, CPSL-17, P7
    p, cosine = randn(2, K, 6, 7).softmax(1), random_scores(2, K, 6, 7, seed=1, dtype=torch.float32)
    expected = ((cosine.double() / 0.08).softmax(1) * p.double()).argmax(1)
    assert torch.equal(rectify(p, cosine), expected) and not torch.equal(expected, p.argmax(1))
    assert not torch.equal(expected, cosine.argmax(1))
    assert torch.equal(rectify(p, torch.full_like(cosine, 0.3)), p.argmax(1))  # uniform P_SL
    y = labels(2, 6, 7)
    sure = F.one_hot(y, K).permute(0, 3, 1, 2).float()
    assert torch.equal(rectify(sure, 1000 * cosine), y)  # weights that underflow as numbers


# ---------------------------------------------- symmetric cross-entropy ----------------------------------------------


def test_symmetric_cross_entropy_hand_values():  # P8
    logits, label = torch.zeros(1, K, 2, 3), labels(1, 2, 3)
    assert symmetric_cross_entropy(logits, label, 0, 1).item() == pytest.approx(8.725586, abs=1e-5)
    assert symmetric_cross_entropy(logits, label, 1, 0).item() == pytest.approx(2.944439, abs=1e-6)
    assert symmetric_cross_entropy(logits, label).item() == pytest.approx(9.020030, abs=1e-5)
    perfect = 100 * F.one_hot(label, K).permute(0, 3, 1, 2).float()
    assert symmetric_cross_entropy(perfect, label).item() == 0
    wrong = symmetric_cross_entropy(perfect, (label + 1) % K, 0, 1)
    assert wrong.item() == pytest.approx(9.210340, abs=1e-5)  # A: bounded, where CE is 100


def test_symmetric_cross_entropy_against_the_clamped_definition():  # P8: CPSL-3 with its clamps, pixel by pixel
    logits, label = 2 * randn(2, 5, 3, 4), labels(2, 24, 32, classes=5)
    label[0, :2] = 255
    maps, terms = common.upsample(logits, (24, 32)), []
    for n, y, x in (label != 255).nonzero().tolist():
        p = maps[n, :, y, x].double().softmax(0)
        target = torch.zeros(5, dtype=torch.float64)
        target[label[n, y, x]] = 1
        reverse = -(p.clamp(1e-7, 1) * target.clamp(1e-4, 1).log()).sum().item()
        terms.append(0.1 * -p[label[n, y, x]].log().item() + reverse)
    assert symmetric_cross_entropy(logits, label).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


@pytest.mark.parametrize("p, pull", [(0.5, 2.353), (0.01, 0.190)])
def test_symmetric_cross_entropy_hardly_pulls_at_a_confident_mistake(p, pull):
    """By hand: (1 - p) (alpha + beta A p) on the label's logit. So few steps learn little from reverse CE alone."""
    logits = torch.tensor([math.log(p), math.log(1 - p)]).view(1, 2, 1, 1).requires_grad_()
    symmetric_cross_entropy(logits, torch.zeros(1, 1, 1, dtype=torch.long)).backward()
    assert logits.grad.flatten().tolist() == pytest.approx([-pull, pull], abs=6e-4)


@pytest.mark.parametrize("shape", [(1, 4, 6), (0, 4, 6)])
def test_losses_over_nothing_are_a_connected_zero(shape):
    logits, label = randn(shape[0], 5, 4, 6).requires_grad_(), torch.full(shape, 255)
    loss = symmetric_cross_entropy(logits, label)
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


# -------------------------------------------- consistency and distillation --------------------------------------------


def test_divergence_is_a_mean_over_classes_too_and_trains_the_follower():  # P6, P9
    t, s = (2 * randn(2, K, 4, 5)).requires_grad_(), randn(2, K, 4, 5, seed=1).requires_grad_()
    assert kl_divergence(t, t).item() == pytest.approx(0, abs=1e-7)
    log_t, log_s = t.detach().double().log_softmax(1), s.detach().double().log_softmax(1)
    each = (log_t.exp() * (log_t - log_s)).sum(1)  # nats per pixel
    loss = kl_divergence(t, s)
    assert loss.item() == pytest.approx(each.mean().item() / 19, rel=1e-5)
    loss.backward()
    assert t.grad is None and s.grad.abs().sum() > 0


def test_divergence_is_never_negative_where_the_authors_form_is():  # P13
    one_hot = (200 * F.one_hot(torch.tensor([3]), K).float()).view(1, K, 1, 1)
    t = one_hot.softmax(1)
    authors = torch.where(t > 0, t * (t.log() - t), 0).mean()  # the student's softmax in place of its logarithm
    assert authors.item() == pytest.approx(-1 / 19)
    assert kl_divergence(one_hot, one_hot).item() == 0


def test_strong_view_changes_looks_and_not_geometry(monkeypatch):
    dataset = common.ToyStreets("target", size=(48, 64))
    images = torch.stack([dataset[i]["image"] for i in range(16)])
    view = cpsl.strong_view(images, 5)
    assert view.shape == images.shape and view.dtype == torch.uint8
    assert torch.equal(view, cpsl.strong_view(images, 5)) and not torch.equal(view, cpsl.strong_view(images, 6))
    same = (view == images).flatten(1).all(1)
    assert 1 <= same.sum() <= 10  # a quarter of the pictures stays, the others change each in its own way
    for before, after in zip(images.float(), view.float()):
        edges = [(image[:, :, 1:] - image[:, :, :-1]).abs().mean(0).flatten() for image in (before, after)]
        assert torch.corrcoef(torch.stack(edges))[0, 1] > 0.5
    one = images[:1].repeat(16, 1, 1, 1)
    assert len({tuple(v.flatten()[:50].tolist()) for v in cpsl.strong_view(one, 5)}) > 4
    state = torch.get_rng_state()
    cpsl.strong_view(images, 7)
    assert torch.equal(state, torch.get_rng_state())
    with monkeypatch.context() as patch:
        patch.setattr(common, "rank", lambda: 1)  # the second process's share is distorted as in one process
        patch.setattr(common, "world_size", lambda: 2)
        assert torch.equal(cpsl.strong_view(images[8:], 5), view[8:])
    monkeypatch.setattr(common, "colour_jitter", lambda images, *seed, strength: images)
    sharpness = [(x[..., 1:].float() - x[..., :-1].float()).abs().mean((1, 2, 3))
                 for x in (images, cpsl.strong_view(images, 5))]
    blurred = sharpness[1] < 0.95 * sharpness[0]
    assert 3 <= blurred.sum() <= 13 and torch.equal(sharpness[0][~blurred], sharpness[1][~blurred])


def test_confident_labels():
    prob = torch.tensor([[0.95, 0.05], [0.04, 0.96], [0.5, 0.5]]).T.view(1, 2, 1, 3)
    assert confident_labels(prob, 0.95).tolist() == [[[255, 1, 255]]]  # above, not at
    assert confident_labels(prob, 0.0).tolist() == [[[0, 1, 0]]]


# ------------------------------------------------- momentum and rates -------------------------------------------------


def test_momentum_copy():  # P11
    model, average = (nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)) for _ in range(2))
    start = [p.detach().clone() for p in average.parameters()]
    for _ in range(1000):
        update_average(average, model, 0.999)
    for a, s, m in zip(average.parameters(), start, model.parameters()):
        torch.testing.assert_close(a, 0.3677 * s + 0.6323 * m, atol=2e-4, rtol=0)  # 0.999 ** 1000 = 0.3677
        assert a.grad is None and m.grad is None
    average.train()(randn(4, 2, 5, 5))  # its own statistics move, ...
    model.train()(randn(4, 2, 5, 5, seed=1))
    assert not torch.equal(average[1].running_mean, model[1].running_mean)
    update_average(average, model, 0.999)  # ... and are overwritten
    assert all(torch.equal(a, m) for a, m in zip(average.buffers(), model.buffers()))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_learning_rates(optimizer):  # P14
    assert cpsl.poly_lr(5e-4, 999, 90000, 0.9) == pytest.approx(4.950e-4, abs=1e-7)
    model, head = common.DeepLabV2(5, "resnet14"), make_head(randn(5, 256))
    args = argparse.Namespace(optimizer=optimizer, head_lr=10.0, head_scale=5.0, hold_prototypes=False, device="cpu")
    network, prototypes = cpsl.make_optimizers(model, head, args)
    cpsl.set_lr(network, 1e-4)
    cpsl.set_lr(prototypes, 7e-4)
    assert [group["lr"] for group in network.param_groups] == pytest.approx([1e-4, 5e-4])
    assert sum(len(group["params"]) for group in network.param_groups) == len([*model.parameters()])
    (group,) = prototypes.param_groups
    assert type(prototypes) is torch.optim.SGD and group["params"] == [head.prototypes]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (7e-4, 0.9, 0)


# --------------------------------------------------- one step ---------------------------------------------------

SETTINGS = dict(alpha=0.3, beta=0.7, temperature=0.1, epsilon=0.07, sinkhorn_iterations=2, pixels=32, lambda_sl=0.4,
                lambda_cons=3.0, sampling="proportional", rectify=True, consistency=True, seed=3, device="cpu",
                precision="fp32", lambda_kd=0.6)


class Tiny(nn.Module):
    """A network of two layers: 6 features, 5 classes, stride 8. It notes what it is shown."""

    def __init__(self, seed):
        super().__init__()
        self.backbone = nn.Conv2d(3, 6, 9, stride=8, padding=4)
        self.classifier = nn.Conv2d(6, 5, 1)
        self.seen = []
        for parameter, offset in zip(self.parameters(), range(4)):
            parameter.data = 0.3 * randn(*parameter.shape, seed=10 * seed + offset)

    def forward(self, images):
        self.seen.append(images)
        features = self.backbone(images)
        return features, 3 * self.classifier(features)


class Step:
    """Everything that enters one step, the same every time; fields may be changed before `terms` is asked for."""

    def __init__(self, past=50, size=50, step=2, **settings):
        self.args, self.step = argparse.Namespace(**{**SETTINGS, **settings}), step
        self.network, self.warm_up, self.momentum = Tiny(1), Tiny(2), Tiny(3)
        self.head, self.momentum_head = make_head(randn(5, 6, seed=41)), make_head(randn(5, 6, seed=42))
        self.head.marginal.copy_(torch.tensor([0.5, 0.3, 0.1, 0.07, 0.03]))
        self.momentum_head.requires_grad_(False)
        self.past = F.normalize(randn(past, 6, seed=43), dim=1)
        self.bank = MemoryBank(size, 6)
        self.bank.push(self.past)
        self.x_s, self.x_t = randn(2, 3, 32, 64, seed=51), picture(2, 3, 32, 64, seed=52)
        self.y_s = labels(2, 32, 64, classes=5, seed=53)
        self.y_s[:, :, :20] = 255
        self.models = SimpleNamespace(network=self.network, self_labeling=self.head, head=self.head, bank=self.bank,
                                      warm_up=self.warm_up, momentum=self.momentum, momentum_head=self.momentum_head)

    def terms(self):
        return cpsl.step_losses(self.models, (self.x_s, self.y_s), self.x_t, self.args, self.step)

    def views(self):
        """The target images as who labels sees them, as the network learns them, distorted."""
        seed = self.args.seed
        return map(common.normalise, (self.x_t, common.colour_jitter(self.x_t, seed, 6, self.step),
                                      cpsl.strong_view(self.x_t, seed, 8, self.step)))

    @torch.no_grad()
    def expected(self):
        """{term: value} and what the bank holds afterwards, in float64 and without the functions under test."""
        args, up, (clean, jittered, strong) = self.args, lambda x: common.upsample(x.double(), (32, 64)), self.views()
        (features, _), (_, logits_warm) = self.momentum(clean), self.warm_up(clean)
        (_, logits_s), (_, logits_t) = self.network(self.x_s), self.network(jittered)
        features_strong, _ = self.network(strong)

        def cosine(features, prototypes):
            prototypes = prototypes.double()[None, :, :, None, None]
            return torch.cosine_similarity(features.double()[:, None], prototypes, dim=2)

        p_st, similar = up(logits_warm).softmax(1), cosine(features, self.momentum_head.prototypes)
        fixed = p_st.argmax(1)
        y = (p_st * (up(similar) / args.temperature).softmax(1)).argmax(1) if args.rectify else fixed  # CPSL-16, -17
        log_p = up(logits_t).log_softmax(1).gather(1, y[:, None])
        values = {"ce_s": F.cross_entropy(up(logits_s), self.y_s, ignore_index=255).item(),
                  "sce_t": (args.alpha * -log_p - args.beta * math.log(1e-4) * (1 - log_p.exp())).mean().item()}
        values["loss"] = values["ce_s"] + values["sce_t"]
        if not args.rectify:
            return values, self.past.double()
        # Which 32 pixels: all of them. Fewer: see the tests of pick_pixels.
        u = torch.rand(2, 4, 8, generator=common.generator(args, 7, self.step))
        position = pick_pixels(common.grid_labels(y, (4, 8)), args.pixels, u, args.sampling == "proportional")
        unit = F.normalize(features.double(), dim=1).flatten(2)  # (N, D, h w)
        c = F.normalize(self.head.prototypes.double(), dim=1)
        past = self.past.double() if len(self.past) == self.bank.size else self.past[:0].double()
        parts, pushed = [], []
        for image, places in zip(unit, position):
            z = image[:, places].T
            q = sinkhorn_by_the_letter(torch.cat([past, z]) @ c.T, self.head.marginal, args.epsilon,
                                       args.sinkhorn_iterations)[-len(z):]
            parts.append(-(q * (z @ c.T / args.temperature).log_softmax(1)).sum(1).mean())
            pushed.append(z)
        values["sl"] = torch.stack(parts).mean().item()
        values["changed"] = (y != fixed).double().mean().item()
        values["loss"] += args.lambda_sl * values["sl"]
        if args.consistency:
            t = (similar / args.temperature).softmax(1)
            s = (cosine(features_strong, self.momentum_head.prototypes) / args.temperature).softmax(1)
            values["cons"] = (t * (t.log() - s.log())).mean().item()
            values["loss"] += args.lambda_cons * values["cons"]
        return values, torch.cat([self.past.double(), *pushed])[-self.bank.size:]


@pytest.mark.parametrize("settings", [
    {}, {"pixels": 10, "seed": 4}, {"pixels": 10, "sampling": "uniform"}, {"rectify": False}, {"consistency": False},
    {"past": 30}, {"temperature": 0.08, "epsilon": 0.05, "sinkhorn_iterations": 3, "alpha": 0.1, "beta": 1.0},
    {"size": 20, "past": 20, "step": 5}])
def test_every_term_of_a_step_equals_its_independent_value(settings):  # CPSL-1 to -11, -16 to -18
    step = Step(**settings)
    expected, memory = step.expected()
    terms = step.terms()
    assert set(terms) == set(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=3e-5, abs=2e-6), name
    torch.testing.assert_close(step.bank.items().double(), memory, atol=1e-5, rtol=0)
    if step.args.rectify:
        assert 0.1 < expected["changed"] < 0.9  # neither the warm-up model nor the prototypes alone decide


# term: does its gradient reach the backbone, the classifier, the prototypes?
ROUTES = {"ce_s": (True, True, False), "sce_t": (True, True, False), "sl": (False, False, True),
          "cons": (True, False, False), "loss": (True, True, True)}


@pytest.mark.parametrize("term", ROUTES)
def test_each_term_reaches_the_weights_that_it_should(term):  # P6
    step = Step()
    step.terms()[term].backward()
    reached = [p.grad is not None and p.grad.abs().sum().item() > 0 for p in (
        step.network.backbone.weight, step.network.classifier.weight, step.head.prototypes)]
    assert tuple(reached) == ROUTES[term]
    frozen = [*step.warm_up.parameters(), *step.momentum.parameters(), *step.momentum_head.parameters()]
    assert all(p.grad is None for p in frozen) and not step.bank.items().requires_grad


def test_who_labels_sees_the_clean_picture_and_who_learns_the_jittered_one():
    step = Step(step=4)
    clean, jittered, strong = step.views()
    step.terms()
    assert all((a - b).abs().mean() > 0.01 for a, b in ((clean, jittered), (clean, strong), (jittered, strong)))
    for model, images in ((step.network, (step.x_s, jittered, strong)), (step.warm_up, (clean,)),
                          (step.momentum, (clean,))):
        assert len(model.seen) == len(images) and all(map(torch.equal, model.seen, images))
    assert not any(labels.requires_grad for labels in cpsl.target_labels(clean, step.models, step.args))
    without = Step(rectify=False)
    without.terms()
    assert [len(model.seen) for model in (without.network, without.warm_up, without.momentum)] == [2, 1, 0]
    assert torch.equal(without.warm_up.seen[0], clean)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_lambda_sl_scales_the_motion_of_the_prototypes_and_held_ones_stay(optimizer):
    moved = {}
    for weight, hold in ((0.1, False), (0.4, False), (0.0, False), (0.4, True)):
        step = Step(lambda_sl=weight, hold_prototypes=hold, optimizer=optimizer, head_lr=1.0, head_scale=1.0)
        _, prototypes = cpsl.make_optimizers(step.network, step.head, step.args)
        cpsl.set_lr(prototypes, 0.05)
        before = step.head.prototypes.detach().clone()
        step.terms()["loss"].backward()
        prototypes.step()
        moved[weight, hold] = step.head.prototypes.detach() - before
    assert moved[0.1, False].abs().max() > 1e-4
    torch.testing.assert_close(moved[0.4, False], 4 * moved[0.1, False], rtol=1e-3, atol=1e-6)
    assert moved[0.0, False].abs().max() == 0 and moved[0.4, True].abs().max() == 0


def test_the_self_labelling_loss_goes_through_the_distributed_head():
    """DistributedDataParallel averages the gradients of what goes through it, and of nothing else."""
    step, calls = Step(), []
    step.models.self_labeling = lambda z, q, T: calls.append((z, q, T)) or z.sum()
    step.terms()
    (z, q, temperature), = calls
    assert z.shape == (2, 32, 6) and q.shape == (2, 32, 5) and temperature == 0.1 and not q.requires_grad


def test_a_step_without_a_source_label_and_with_a_single_predicted_class():
    step = Step()
    step.y_s[:] = 255
    step.warm_up.classifier.bias.data = torch.tensor([0, 0, 1e4, 0, 0])
    step.head.marginal.copy_(torch.tensor([0, 0, 1.0, 0, 0]))  # r_k = 0 for all the others
    terms = step.terms()
    terms["loss"].backward()
    assert terms["ce_s"].item() == 0 and terms["changed"].item() == 0
    assert all(math.isfinite(term.item()) for term in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in (*step.network.parameters(), step.head.prototypes))


def test_bf16_rounds_the_network_and_no_loss():
    exact, rounded = Step().terms(), Step(precision="bf16").terms()
    for name in ("ce_s", "sce_t", "sl", "cons", "loss"):
        assert rounded[name].dtype == torch.float32
        assert rounded[name].item() == pytest.approx(exact[name].item(), rel=0.1)
    assert any(rounded[name].item() != exact[name].item() for name in exact)


def test_every_term_of_a_distillation_step():  # CPSL-12, CPSL-13
    network, teacher, args = Tiny(1), Tiny(2), argparse.Namespace(**SETTINGS)
    x_s, x_t = randn(2, 3, 32, 64, seed=1), randn(2, 3, 32, 64, seed=2)
    y_s, y_t = labels(2, 32, 64, classes=5, seed=3), labels(2, 32, 64, classes=5, seed=4)
    y_s[0, :9], y_t[1, :, 20:] = 255, 255
    terms = cpsl.distill_losses(network, teacher, (x_s, y_s), (x_t, y_t), args)
    with torch.no_grad():
        (_, out_s), (_, out_t), (_, out_teacher) = network(x_s), network(x_t), teacher(x_t)
        expected = {name: F.cross_entropy(common.upsample(out, (32, 64)), y, ignore_index=255).item()
                    for name, out, y in (("ce_s", out_s, y_s), ("ce_t", out_t, y_t))}
        t, s = out_teacher.double().softmax(1), out_t.double().softmax(1)
        expected["kd"] = (t * (t.log() - s.log())).mean().item()
    expected["loss"] = expected["ce_s"] + expected["ce_t"] + 0.6 * expected["kd"]
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)
    for name in ("kd", "ce_t", "ce_s", "loss"):
        network.zero_grad()
        terms[name].backward(retain_graph=True)
        assert all(p.grad.abs().sum() > 0 for p in network.parameters())
    assert all(p.grad is None for p in teacher.parameters())


# ------------------------------------------- preparation, labels and meters -------------------------------------------


def toy_args(**settings):
    return argparse.Namespace(**{**dict(source="toy", toy_world=0, toy_images=24, size=(32, 64), batch_size=2,
                                        workers=0, device="cpu", precision="fp32", seed=0, marginal="pseudo",
                                        rectify=True, temperature=0.08, confidence=0.95, batch_norm="frozen"),
                                 **settings})


class Maps(nn.Module):
    """A warm-up model that returns the given features and logits, batch after batch."""

    def __init__(self, features, logits):
        super().__init__()
        self.batches = iter(zip(features.split(2), logits.split(2)))

    def forward(self, images):
        assert not self.training
        return next(self.batches)


@pytest.mark.parametrize("marginal", ["pseudo", "uniform"])
def test_prepare_against_a_loop(monkeypatch, marginal):
    """r: the share of each predicted class. Prototypes: means over images of the means over a class's pixels."""
    features, logits = randn(6, 8, 100, 100), randn(6, 4, 100, 100, seed=1)
    logits[:, 3] = -1e4  # never
    logits[:, 2] -= 3.2  # rarely
    logits[2:, 2] = -1e4
    logits[0, 2], logits[1, 2] = -1e4, -1e4
    logits[0, 2, 0, :2], logits[1, 2, 0, :3] = 1e4, 1e4  # 2 of 10000 are too few, 3 enough, as 10 of 33153
    asked, sums = [], []
    true_dataset = common.target_dataset
    monkeypatch.setattr(common, "target_dataset",
                        lambda *given, **named: asked.append((given[1:], named)) or true_dataset(*given, **named))
    monkeypatch.setattr(common, "evaluation_batches", lambda dataset, args: iter([{"image": None}] * 3))
    monkeypatch.setattr(common, "all_sum", lambda tensor: sums.append(tensor.shape) or tensor)
    head = SelfLabelingHead(4, 8)
    cpsl.prepare(Maps(features, logits).train(), head, toy_args(marginal=marginal))
    label = logits.argmax(1)
    share = torch.tensor([(label == k).sum().item() for k in range(4)]) / 60000
    assert share[3] == 0 and share[2] > 0
    torch.testing.assert_close(head.marginal, share if marginal == "pseudo" else torch.full((4,), 0.25))
    for k in range(3):
        images = [0, 1, 2, 3, 4, 5] if k < 2 else [1]
        means = torch.stack([features[n][:, label[n] == k].mean(1) for n in images])
        torch.testing.assert_close(head.prototypes[k].detach(), F.normalize(means.mean(0), dim=0), atol=1e-4, rtol=0)
    torch.testing.assert_close(head.prototypes.detach().norm(dim=1), torch.ones(4))  # the absent class: at random
    assert torch.equal(head.start, head.prototypes) and head.start.data_ptr() != head.prototypes.data_ptr()
    assert asked == [(("train",), {})]  # clean images, no labels
    assert sums == [(4,), (4, 8), (4,)]  # over the processes


@pytest.fixture(scope="module")
def trained(start):
    """A source-only network, its momentum copy and momentum prototypes that have moved."""
    warm, head = common.load_model(start, toy_args()).eval(), SelfLabelingHead(16, 256)
    cpsl.prepare(warm, head, toy_args())
    head.prototypes.data += 0.05 * randn(16, 256, seed=7)
    return warm, copy.deepcopy(warm), head.requires_grad_(False)


@pytest.mark.parametrize("number", [None, 7])
def test_label_meters_are_the_miou_of_the_target_train_labels(trained, number):
    warm, momentum, head = copy.deepcopy(trained)
    views = common.target_dataset(toy_args(), "train")
    meters = cpsl.measure_labels(warm.train(), momentum.train(), head, views, toy_args(), number)
    assert momentum.training and len(common.live_batch_norms(momentum)) > 0  # a copy was settled, not this one
    dataset = common.target_dataset(toy_args(), "train", labelled=True)
    confusion = {name: np.zeros((16, 16)) for name in ("rectified", "fixed", "p_sl")}
    for item in list(map(dataset.__getitem__, range(24)))[:number]:
        with torch.no_grad():
            image = common.normalise(item["image"][None])
            p_st = common.upsample(warm.eval()(image)[1], (32, 64)).softmax(1)
            cosine = head.cosine(momentum.eval()(image)[0])
        p_sl = (common.upsample(cosine, (32, 64)) / 0.08).softmax(1)
        for name, prob in (("rectified", p_sl * p_st), ("fixed", p_st), ("p_sl", p_sl)):
            true, guess = item["label"].flatten(), prob.argmax(1).flatten()
            np.add.at(confusion[name], (true[true != 255].numpy(), guess[true != 255].numpy()), 1)
    for name, table in confusion.items():
        hit, present = table.diagonal(), table.sum(1) > 0
        iou = hit / np.maximum(table.sum(0) + table.sum(1) - hit, 1)
        rare = present & [title in common.RARE for title in common.SYNTHIA_16]
        assert rare.any()
        assert meters[f"labels_{name}"] == pytest.approx(100 * iou[present].mean(), abs=0.02)
        assert meters[f"labels_{name}_rare"] == pytest.approx(100 * iou[rare].mean(), abs=0.02)
    assert len(meters) == 6 and len({meters[f"labels_{name}"] for name in confusion}) == 3


def test_distillation_labels_are_the_flip_averaged_sure_ones(trained, tmp_path):
    warm, dataset = copy.deepcopy(trained[0]), common.target_dataset(toy_args(), "train", labelled=True)
    prob = []
    with torch.no_grad():
        for item in dataset:
            image = common.normalise(item["image"][None])
            both = [common.upsample(warm(x)[1], (32, 64)) for x in (image, image.flip(3))]
            prob.append((both[0].softmax(1) + both[1].flip(3).softmax(1))[0] / 2)
    best, label = torch.stack(prob).max(1)
    threshold = best.median().item() + 1e-4
    label[best <= threshold] = 255
    shown = cpsl.label_target(warm.train(), toy_args(confidence=threshold), tmp_path / "labels")
    stored = torch.stack([torch.from_numpy(common.read_label(tmp_path / f"labels/{item['name']}.png")).long()
                          for item in dataset])
    assert (stored != label).double().mean() < 1e-3  # rounding at the threshold
    assert 0.3 < shown["kept"] < 0.6 and 0 <= shown["accuracy"] <= 1


# --------------------------------------------------- command line ---------------------------------------------------


def parsed(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["cpsl.py", *map(str, flags)])
    return cpsl.parse_args()


def test_the_authors_values(monkeypatch):
    args = parsed(monkeypatch, "--source", "gta5")
    assert (args.temperature, args.epsilon, args.sinkhorn_iterations) == (0.08, 0.05, 3)
    assert (args.pixels, args.bank, args.ema) == (256, 65536, 0.999)
    assert (args.alpha, args.beta, args.lambda_sl, args.lambda_cons, args.lambda_kd) == (0.1, 1, 0.1, 5, 1)
    assert (args.lr, args.head_scale, args.prototype_lr, args.iterations) == (1e-4, 5, 5e-4, 90000)
    assert (args.distill_lr, args.distill_iterations, args.confidence) == (6e-4, 90000, 0.95)
    assert args.rectify and args.consistency and args.marginal == "pseudo" and args.sampling == "proportional"
    assert not args.hold_prototypes and args.distill == 0
    toy, small = parsed(monkeypatch), parsed(monkeypatch, "--source", "synthia", "--preset", "small")
    assert (toy.pixels, toy.bank, toy.ema) == (64, 4096, 0.99) and not toy.consistency
    # The same way for the prototypes: rate times steps.
    assert small.prototype_lr * small.iterations == pytest.approx(toy.prototype_lr * toy.iterations)


NUMBERS = ("--lr", "--head-scale", "--prototype-lr", "--temperature", "--epsilon", "--sinkhorn-iterations", "--pixels",
           "--bank", "--ema", "--alpha", "--beta", "--lambda-sl", "--lambda-cons", "--distill", "--distill-iterations",
           "--distill-lr", "--confidence", "--lambda-kd", "--iterations")


@pytest.mark.parametrize("flags", [[f"{flag}=nan" for flag in NUMBERS], [f"{flag}=-1" for flag in NUMBERS],
                                   ["--temperature=0", "--epsilon=0", "--pixels=0", "--sinkhorn-iterations=0", "--lr=0",
                                    "--prototype-lr=0", "--ema=1.1", "--confidence=2", "--marginal=true",
                                    "--sampling=all"]])
def test_a_value_that_makes_no_sense_is_refused(monkeypatch, capsys, flags):
    for flag in flags:
        with pytest.raises(SystemExit):
            parsed(monkeypatch, flag)
        assert flag.split("=")[0] in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_is_refused_at_once(monkeypatch, tmp_path, start):
    for flags, words in ((["--head", "proda", "--init", start], ["--init", "--head proda"]),
                         (["--backbone", "resnet18", "--init", start], ["resnet14", "resnet18"]),
                         (["--init", tmp_path / "gone.pt"], ["gone.pt"])):
        monkeypatch.setattr(sys, "argv", ["cpsl.py", *map(str, [*FEW, *flags, "--out", tmp_path / "run"])])
        with pytest.raises((common.InputError, OSError)) as error:
            cpsl.main()
        assert all(word in str(error.value) for word in words)


def test_the_authors_head():
    model = cpsl.ProDANetwork(5, "resnet18", weights="none")
    features, logits = model(randn(2, 3, 32, 64))
    assert features.shape == (2, 256, 5, 9) and logits.shape == (2, 5, 5, 9) and model.feature_dim == 256
    assert (features < 0).float().mean() > 0.3  # signed
    groups = features.view(2, 32, -1).mean(2)
    torch.testing.assert_close(groups, torch.zeros(2, 32), atol=1e-4, rtol=0)  # GroupNorm comes last
    torch.testing.assert_close(logits, F.conv2d(features, model.classifier["classify"].weight))
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.classifier.parameters())
    assert [branch[0].dilation[0] for branch in model.classifier["branches"]] == [1, 6, 12, 18, 24]


# --------------------------------------------- main(), watched at work ---------------------------------------------

# 32 pixels per step: the bank is full after two.
FEW = [*TINY, "--consistency", "--warmup-iterations", 2, "--iterations", 4, "--pixels", 16, "--bank", 64,
       "--distill-iterations", 2]
SGD = ["--optimizer", "sgd", "--lr", 0.01, "--head-scale", 3, "--prototype-lr", 0.07, "--head-lr", 2, "--ramp", 2,
       "--distill-lr", 0.004, "--ema", 0.8]
LABELS = {f"labels_{kind}" for kind in ("rectified", "fixed", "p_sl")}


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    """Whether two nested checkpoints are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def statistic(name):
    """Whether a network's weight of that name is batch norm's and not learnt."""
    return "running" in name or "num_batches" in name


def watched(folder, start, *flags, unit=True):
    """Runs main() on the tiny toy and returns what it did, in order: a list of (what, details).

    unit: replace the total loss by the sum of all weights, a gradient of one for each, which can be followed by hand.
    """
    events = []

    def note(what, **details):
        events.append((what, details))

    class Called:
        """What common.distribute and common.compiled give: notes the mode of every forward of training."""

        def __init__(self, module, args):
            self.module = module

        def __call__(self, *given):
            note("forward", module=type(self.module).__name__, training=self.module.training)
            return self.module(*given)

    class Compiled(Called):
        def __call__(self, *given):
            return self.module(*given)

    def pull(terms, *modules):
        if unit:
            terms["loss"] = sum(p.sum() for m in modules for p in m.parameters() if p.requires_grad)
        return terms

    def step(models, source, images, args, number):
        given = dict(model=models.network.module, head=models.head, warm_up=models.warm_up.module,
                     momentum=models.momentum.module, momentum_head=models.momentum_head)
        before = {name: weights(m) for name, m in given.items()}  # its forwards move batch norm's statistics
        terms = true_step(models, source, images, args, number)
        note("step", number=number, source=source, images=images, args=args, before=before, terms=terms.keys(),
             given=given, self_labeling=models.self_labeling, filled=len(models.bank.items()),
             training={name: m.training for name, m in given.items()},
             live=len(common.live_batch_norms(given["momentum"])))
        return pull(terms, given["model"], models.head)

    def distil(network, teacher, source, target, args):
        note("distil", teacher=weights(teacher.module), mode=teacher.module.training, training=network.module.training,
             before=weights(network.module), source=source, target=target, args=args)
        return pull(true_distil(network, teacher, source, target, args), network.module)

    true_step, true_distil, true_build = cpsl.step_losses, cpsl.distill_losses, cpsl.build_model
    true_settle = common.settle_batch_norm
    with pytest.MonkeyPatch.context() as patch:
        def around(module, name, look):
            """Calls `look` with the arguments of every call of a function, then the function."""
            original = getattr(module, name)
            patch.setattr(module, name, lambda *given, **named: (look(*given, **named), original(*given, **named))[1])

        patch.setattr(cpsl, "step_losses", step)
        patch.setattr(cpsl, "distill_losses", distil)
        patch.setattr(common, "distribute", Called)
        patch.setattr(common, "compiled", Compiled)
        # Both leave a model in evaluation mode, which no training loop may rely upon.
        patch.setattr(common, "settle_batch_norm", lambda model, views, args: (
            note("settle", model=model, domain=views.domain, split=views.split, augmented=views.augment is not None),
            true_settle(model, views, args), model.eval()))
        patch.setattr(cpsl, "build_model", lambda args: true_build(args).eval())
        around(cpsl, "prepare", lambda warm, head, args: note(
            "prepare", start=weights(warm), live=len(common.live_batch_norms(warm))))
        around(cpsl, "make_optimizers", lambda model, head, args: note(
            "optimizer", live=len(common.live_batch_norms(model))))
        around(cpsl, "assign", lambda scores, past, marginal, epsilon, iterations: note(
            "assign", past=len(past), marginal=marginal.clone(), epsilon=epsilon, iterations=iterations))
        around(cpsl, "measure_labels", lambda *given: note(
            "measure", given=[weights(m) for m in given[:3]], views=given[3], number=given[5:]))
        around(cpsl, "label_target", lambda model, args, folder: note("label", start=weights(model), folder=folder))
        around(cpsl, "train_source", lambda model, dataset, args, run, file, steps, lr: note(
            "warm-up", dataset=dataset, file=file, steps=steps, lr=lr))
        around(common, "training_batches", lambda *given, share=1, **named: note("batches", share=share))
        patch.setattr(common, "compare_with_source_only", lambda models, args, run, source_model, **meters: note(
            "compare", models={title: weights(model) for title, model in models.items()}, source=weights(source_model),
            meters=meters))
        begin = ["--init", start] if start else []
        patch.setattr(sys, "argv", ["cpsl.py", *map(str, [*FEW, *begin, *flags, "--out", folder])])
        cpsl.main()
    return events


def only(events, what):
    return [details for name, details in events if name == what]


def order(events):
    return [name for name, _ in events if name not in ("forward", "assign", "batches")]


def lines_of(folder, stage):
    return [line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if line["stage"] == stage]


@pytest.fixture(scope="module")
def main_on_target(tmp_path_factory, start):
    folder = tmp_path_factory.mktemp("watched") / "run"
    return folder, watched(folder, start, "--batch-norm", "target", "--distill", 2, *SGD)


def test_main_settles_batch_norm_before_all_that_depends_on_it(main_on_target, start):
    folder, events = main_on_target
    measure = ["measure", "settle"]
    assert order(events) == ["settle", "prepare", "optimizer", *measure, *["step", *measure] * 4, "settle", *measure,
                             *["label", "distil", "distil", "settle"] * 2, "compare"]
    assert all((s["domain"], s["split"], s["augmented"]) == ("target", "train", True) for s in only(events, "settle"))
    given, settled = only(events, "step")[0]["given"], [s["model"] for s in only(events, "settle")]
    assert settled[0] is settled[6] is given["model"] and given["momentum"] not in settled  # a copy is measured
    assert only(events, "prepare")[0]["live"] == only(events, "optimizer")[0]["live"] == 0
    prepared, given = only(events, "prepare")[0]["start"], load(start)["model"]
    differ = {key for key in given if not torch.equal(given[key], prepared[key])}
    assert differ and all(map(statistic, differ))
    assert same(prepared, dict(load(folder / "warmup.pt")["model"]))
    shares = [b["share"] for b in only(events, "batches")]
    assert shares.count(2) == 2 + 2 * 2  # two loaders at a time wherever it trains on both domains


def test_main_starts_all_copies_from_the_warm_up_model_and_keeps_it(main_on_target):
    folder, events = main_on_target
    steps, warm = only(events, "step"), load(folder / "warmup.pt")
    for name in ("model", "warm_up", "momentum"):
        assert same(steps[0]["before"][name], dict(warm["model"])), name
    for name in ("head", "momentum_head"):
        assert same(steps[0]["before"][name], dict(warm["head"])), name
    assert all(same(step["before"]["warm_up"], steps[0]["before"]["warm_up"]) for step in steps)
    modules = steps[0]["given"]
    pointers = [p.data_ptr() for m in modules.values() for p in m.parameters()]
    assert len(set(pointers)) == len(pointers)  # nothing is shared
    for name in ("warm_up", "momentum", "momentum_head"):
        assert all(p.grad is None for p in modules[name].parameters()), name
    assert not modules["momentum_head"].prototypes.requires_grad


def test_main_trains_in_training_mode_on_what_it_should(main_on_target):
    folder, events = main_on_target
    steps, forwards = only(events, "step"), only(events, "forward")
    assert [step["number"] for step in steps] == [1, 2, 3, 4]
    for step in steps:
        assert step["training"]["model"] and step["training"]["momentum"] and not step["training"]["warm_up"]
        assert step["terms"] == {"loss", "ce_s", "sce_t", "sl", "cons", "changed"}
        assert step["self_labeling"].module is step["given"]["head"]
    assert all(forward["training"] for forward in forwards)
    assert [f["module"] for f in forwards].count("SelfLabelingHead") == 4
    assert [f["module"] for f in forwards].count("DeepLabV2") == 4 * 3 + 2 * 2 * 2
    args = steps[0]["args"]
    datasets = [common.source_dataset(args, common.training_augment(args)),
                common.target_dataset(args, "train", common.training_augment(args))]
    batches = [list(common.training_batches(dataset, args, common.mix_seed(args.seed, purpose), 0, 4, jitter))
               for dataset, purpose, jitter in zip(datasets, (4, 5), (0.3, None))]
    for step, (x_s, y_s), (images, _) in zip(steps, *batches):
        assert torch.equal(step["source"][0], x_s) and torch.equal(step["source"][1], y_s)
        assert torch.equal(step["images"], images) and images.dtype == torch.uint8


def test_main_does_not_use_the_bank_before_it_is_full(main_on_target):  # P10
    _, events = main_on_target
    assert [step["filled"] for step in only(events, "step")] == [32, 64, 64, 64]  # after the step
    assigned = only(events, "assign")
    assert [a["past"] for a in assigned] == [0, 0, 64, 64]
    r = load(main_on_target[0] / "warmup.pt")["head"]["marginal"]
    assert all(torch.equal(a["marginal"], r) for a in assigned) and r.max() > 0.1
    assert all((a["epsilon"], a["iterations"]) == (0.05, 3) for a in assigned)


def follow(states, rates, scales):
    """SGD by hand, every gradient being one: yields what each weight must be after each step, and what it is."""
    velocity = {}
    for rate, before, after in zip(rates, states, states[1:]):
        for name in before:
            if (scale := scales(name)) is None:
                continue
            decay = 0 if name == "prototypes" else 5e-4
            velocity[name] = 0.9 * velocity.get(name, 0) + 1 + decay * before[name]
            yield name, before[name] - rate * scale * velocity[name], after[name]


def test_main_steps_down_the_gradient_of_the_total_with_the_rates_of_the_schedule(main_on_target):
    """Network, classifier and prototypes, each at its rate; no weight decay on prototypes."""
    folder, events = main_on_target
    steps, saved = only(events, "step"), load(folder / "stage1.pt")
    rates = [0.01 * min(1, k / 2) * (1 - (k - 1) / 4)**0.9 for k in range(1, 5)]
    learning = {name for name, p in steps[0]["given"]["model"].named_parameters() if p.requires_grad}
    assert learning == {name for name, p in common.DeepLabV2(16, "resnet14").named_parameters()
                        if p.ndim == 4 or name.startswith("classifier")}
    checks = 0
    scale = {name: 3 if name.startswith("classifier") else 1 for name in learning} | {"prototypes": 7}
    for part in ("model", "head"):
        states = [step["before"][part] for step in steps] + [saved[part]]
        for name, expected, actual in follow(states, rates, scale.get):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5, msg=name)
            checks += 1
    assert checks == 4 * (len(learning) + 1)


@pytest.mark.parametrize("copied, original", [("momentum", "model"), ("momentum_head", "head")])
def test_main_lets_both_momentum_copies_follow_in_every_step(main_on_target, copied, original):  # P11
    folder, events = main_on_target
    states = [step["before"] for step in only(events, "step")] + [load(folder / "stage1.pt")]
    for before, after in zip(states, states[1:]):
        for name in before[copied]:
            if statistic(name) or name in ("start", "marginal"):
                assert torch.equal(after[copied][name], after[original][name])
            else:
                expected = 0.8 * before[copied][name] + 0.2 * after[original][name]
                torch.testing.assert_close(after[copied][name], expected, atol=1e-6, rtol=1e-5, msg=name)


def test_main_measures_and_compares_what_it_trained(main_on_target, start):
    folder, events = main_on_target
    saved, measured, (compared,) = load(folder / "stage1.pt"), only(events, "measure"), only(events, "compare")
    assert [m["number"] for m in measured] == [(100,)] * 5 + [()]  # at the start, after each quarter, in the end all
    states = [step["before"] for step in only(events, "step")]
    for m, state in zip(measured, [*states, saved, saved]):
        for given, name in zip(m["given"], ("warm_up", "momentum", "momentum_head")):
            assert same(given, dict(state[name] if name in state else load(folder / "warmup.pt")["model"])), name
    logged_labels = lines_of(folder, "labels")
    assert [line["step"] for line in logged_labels] == [f"{k}/4" for k in range(5)]
    assert all(LABELS <= set(line) for line in logged_labels)
    assert list(compared["models"]) == ["CPSL"]
    assert same(compared["models"]["CPSL"], dict(load(folder / "last.pt")["model"]))
    assert same(compared["source"], dict(load(start)["model"]))
    assert {*LABELS, "prototype_cosine"} <= set(compared["meters"])
    cosine = torch.cosine_similarity(saved["head"]["prototypes"], saved["head"]["start"]).mean().item()
    assert compared["meters"]["prototype_cosine"] == pytest.approx(cosine, abs=1e-6) and cosine < 0.999


def test_main_distils_twice_each_time_into_a_fresh_student(main_on_target):
    folder, events = main_on_target
    names, labelled, steps = ["stage1.pt", "stage2.pt", "last.pt"], only(events, "label"), only(events, "distil")
    states = [load(folder / name)["model"] for name in names]
    args = steps[0]["args"]
    source = common.source_dataset(args, common.training_augment(args))
    rates = [0.004 * min(1, k / 2) * (1 - (k - 1) / 2)**0.9 for k in (1, 2)]
    for stage, (begun, label, student) in enumerate(zip(states, labelled, states[1:]), 2):
        mine = steps[2 * stage - 4:2 * stage - 2]
        assert same(label["start"], dict(begun))  # the previous model labels, ...
        assert all(same(step["teacher"], dict(begun)) and not step["mode"] for step in mine)  # ... and teaches
        assert label["folder"] == folder / f"pseudo_labels/stage{stage}" and len(list(label["folder"].iterdir())) == 12
        torch.manual_seed(common.mix_seed(0, 9, stage))
        fresh = common.DeepLabV2(16, "resnet14").state_dict()
        assert same(mine[0]["before"], dict(fresh)) and all(step["training"] for step in mine)
        target = common.target_dataset(args, "train", common.training_augment(args), label_dir=label["folder"])
        batches = [list(common.training_batches(dataset, args, common.mix_seed(0, purpose, stage), 0, 2, jitter))
                   for dataset, purpose, jitter in ((source, 10, 0.3), (target, 11, None))]
        for number, (step, (x_s, y_s), (images, y_t)) in enumerate(zip(mine, *batches), 1):
            assert torch.equal(step["source"][0], x_s) and torch.equal(step["source"][1], y_s)
            strong = common.normalise(cpsl.strong_view(images, 0, 12, stage, number))
            assert torch.equal(step["target"][0], strong) and torch.equal(step["target"][1], y_t)
        followed = follow([step["before"] for step in mine] + [student], rates, lambda name: None if statistic(name)
                          else 2 if name.startswith("classifier") else 1)
        for name, expected, actual in followed:
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5, msg=name)
        assert student["backbone.1.num_batches_tracked"] == 6  # settled: an average over 12 images


def test_main_with_live_batch_norm_and_held_prototypes(tmp_path, start):
    """The warm-up model keeps the target's statistics; the network's move, and its momentum copy takes them over."""
    events = watched(tmp_path / "run", start, "--batch-norm", "live", "--iterations", 2, "--marginal", "uniform",
                     "--hold-prototypes", *SGD)
    prepare, (one, two), saved = only(events, "prepare")[0], only(events, "step"), load(tmp_path / "run/last.pt")
    mean = "backbone.1.running_mean"
    assert not torch.equal(prepare["start"][mean], load(start)["model"][mean])
    assert prepare["live"] > 0 and one["live"] > 0 and two["live"] > 0  # the momentum network sees the batch's own
    assert not torch.equal(one["before"]["model"][mean], two["before"]["model"][mean])
    for name in two["before"]["model"]:
        if statistic(name):
            assert torch.equal(two["before"]["model"][name], two["before"]["momentum"][name]), name
            assert torch.equal(two["before"]["warm_up"][name], prepare["start"][name])
    assert all(torch.equal(a["marginal"], torch.full((16,), 1 / 16)) for a in only(events, "assign"))
    compared = only(events, "compare")[0]["models"]["CPSL"]
    assert same(compared, dict(saved["model"])) and saved["model"]["backbone.1.num_batches_tracked"] == 6
    for name in ("head", "momentum_head"):
        torch.testing.assert_close(saved[name]["prototypes"], saved[name]["start"], atol=1e-6, rtol=0)
    assert "sl" in two["terms"]  # still told
    assert [line["step"] for line in lines_of(tmp_path / "run", "labels")] == ["0/2", "1/2", "2/2"]


def test_main_without_rectification_trains_on_the_fixed_labels(tmp_path, start):
    events = watched(tmp_path / "run", start, "--batch-norm", "frozen", "--no-rectify", "--iterations", 2, *SGD,
                     unit=False)
    assert [name for name in order(events) if name != "settle"] == ["prepare", "optimizer", "step", "step", "compare"]
    assert all(step["terms"] == {"loss", "ce_s", "sce_t"} for step in only(events, "step"))
    assert not only(events, "assign") and only(events, "compare")[0]["meters"] == {}
    assert list(only(events, "compare")[0]["models"]) == ["fixed labels"]
    begun, saved = load(start)["model"], load(tmp_path / "run/last.pt")
    assert torch.equal(saved["head"]["prototypes"], saved["head"]["start"]) and saved["bank"]["memory"].shape[0] == 0
    assert all(torch.equal(saved["model"][key], begun[key]) for key in begun if statistic(key))
    assert not torch.equal(saved["model"]["backbone.0.weight"], begun["backbone.0.weight"])


def test_main_warms_up_where_no_model_is_given_and_keeps_the_authors_head(tmp_path):
    events = watched(tmp_path / "run", None, "--head", "proda", "--distill", 1, "--warmup-lr", 0.003, "--iterations", 1,
                     "--warmup-iterations", 1, "--distill-iterations", 1, "--no-consistency", "--toy-images", 4,
                     unit=False)
    warm_up, = only(events, "warm-up")
    assert (warm_up["file"], warm_up["steps"], warm_up["lr"]) == ("source_only.pt", 1, 0.003)
    assert warm_up["dataset"].domain == "source" and warm_up["dataset"].augment is not None
    begun, prepared = load(tmp_path / "run/source_only.pt")["model"], only(events, "prepare")[0]["start"]
    assert all(torch.equal(begun[key], prepared[key]) for key in begun if not statistic(key))
    assert only(events, "step")[0]["terms"] == {"loss", "ce_s", "sce_t", "sl", "changed"}
    saved = load(tmp_path / "run/last.pt")
    assert saved["network"] == "ProDANetwork"
    model = common.unpack_model(saved, "last.pt", network=cpsl.ProDANetwork)
    assert torch.equal(model.classifier["classify"].weight, saved["model"]["classifier.classify.weight"])


# ---------------------------------------------------- the script ----------------------------------------------------

DISTILLED = [*FEW, "--distill", 1, "--distill-iterations", 3, "--confidence", 0.1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of all stages that nobody interrupted; what it printed and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    out = run(folder, "cpsl.py", *DISTILLED)
    return out, folder / "runs/cpsl-toy-s0"


def test_one_command_runs_all_stages(whole, start):
    out, folder = whole
    assert {"args.json", "log.jsonl", "source_only.pt", "warmup.pt", "stage1.pt", "last.pt", "panel.png",
            "result.json"} <= {p.name for p in folder.iterdir()}
    scores = result(folder)
    assert list(scores["columns"]) == ["source only", "+ BN target", "CPSL"] and "motorcycle" in out
    assert {*LABELS, "prototype_cosine"} <= set(scores["meters"])
    assert Image.open(folder / "panel.png").width > 4 * 300  # image | truth | source only | CPSL
    for line in lines_of(folder, "adapt"):
        parts = [line["ce_s"], line["sce_t"], 0.1 * line["sl"], 5 * line["cons"]]
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-5)  # CPSL-11
        assert 0 <= line["changed"] <= 1 and line["moved"] > -1e-6
    assert scores["meters"]["prototype_cosine"] == pytest.approx(1 - line["moved"], abs=1e-6)
    first, *steps = lines_of(folder, "stage 2")
    assert 0 <= first["kept"] <= 1 and 0 <= first["accuracy"] <= 1
    assert len(steps) == 3 and all(step["kd"] >= 0 for step in steps)
    warm_up, = lines_of(folder, "warm-up")
    r = load(folder / "warmup.pt")["head"]["marginal"]
    assert warm_up["classes"] == (r > 0).sum().item() and warm_up["rarest"] == pytest.approx(r[r > 0].min().item())
    if DEVICE == "cpu":
        assert same_weights(start, folder / "source_only.pt")  # --init is the same as training the model here


@exact
def test_killed_in_two_stages_and_resumed_the_run_ends_the_same(tmp_path, whole):
    """Every checkpoint equals in all it holds."""
    arguments = ["cpsl.py", *DISTILLED, "--save-every", 1, "--out", "cut"]
    # The second stage logs its labels first; after its step 2 the checkpoint of step 1 is there.
    for stage, lines, resume in (("adapt", 3, []), ("stage 2", 3, ["--resume"])):
        code, errors = kill_when(tmp_path, lambda: logged(tmp_path / "cut", stage, lines), *arguments, *resume)
        assert code == -signal.SIGKILL and "Traceback" not in errors
    run(tmp_path, *arguments, "--resume")
    for name in ("source_only.pt", "warmup.pt", "stage1.pt", "last.pt"):
        assert same(load(tmp_path / "cut" / name), load(whole[1] / name)), name
    for key in ("columns", "meters"):
        assert result(tmp_path / "cut")[key] == result(whole[1])[key]


def test_a_real_format_from_start_to_end(tmp_path):
    write_synthia(tmp_path)
    write_cityscapes(tmp_path)
    for path in (tmp_path / "cityscapes/gtFine/train").rglob("*.png"):
        path.write_bytes(b"closed")  # an adaptation that opened a target training label would stop here
    run(tmp_path, "cpsl.py", "--source", "synthia", "--data-root", tmp_path, "--backbone", "resnet14",
        "--backbone-weights", "none", *FEW, "--warmup-iterations", 1, "--distill", 1, "--distill-iterations", 1,
        "--iterations", 2, "--workers", 0)
    folder = tmp_path / "runs/cpsl-synthia-s0"
    scores = result(folder)
    assert len(scores["iou"]) == 16 and set(scores["meters"]) == {"prototype_cosine"} and "miou13" in scores
    assert len(list((folder / "pseudo_labels/stage2").iterdir())) == 6 and not lines_of(folder, "labels")
    assert "accuracy" not in lines_of(folder, "stage 2")[0]


def test_two_processes_share_one_run(tmp_path, start):
    """The marginal and the prototypes' start are of all images, the bank is of each process's own pixels."""
    arguments = [*FEW, *SPLITTABLE, "--init", start, "--lr", 0.02, "--prototype-lr", 1, "--ramp", 0]
    run(tmp_path, "cpsl.py", *arguments, "--out", "one")
    run_as_two(tmp_path, "cpsl.py", *arguments, "--out", "two")
    one, two = tmp_path / "one", tmp_path / "two"
    assert trained_alike(start, one / "last.pt", two / "last.pt")
    a, b = load(one / "warmup.pt"), load(two / "warmup.pt")
    torch.testing.assert_close(a["head"], b["head"], atol=1e-4, rtol=0)
    a, b = load(one / "last.pt"), load(two / "last.pt")
    assert b["bank"]["memory"].shape == (64, 256)  # 4 steps of 1 image of 16 pixels
    torch.testing.assert_close(a["momentum_head"], b["momentum_head"], atol=2e-2, rtol=0)
    moved = [(saved["head"]["prototypes"] - saved["head"]["start"]).norm() for saved in (a, b)]
    assert moved[0] > 0 and moved[1] == pytest.approx(moved[0], rel=0.5)
    for name in LABELS:
        assert result(one)["meters"][name] == pytest.approx(result(two)["meters"][name], abs=1.5)
