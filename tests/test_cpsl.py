"""cpsl.py: every equation against an independent computation, every wire of a training step and of main().

P1 to P15 are properties of the method that can be checked without its data; the numbers are closed forms or hand values.
"""

import argparse
import copy
import json
import math
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from scripts import SPLITTABLE, TINY, kill_when, logged, result, run, run_as_two, same_weights, trained_alike
from torch import nn
from trees import write_cityscapes, write_gta5, write_synthia

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
    """CPSL-6 on a K x B matrix of plain numbers, in float64."""
    Q = np.exp(scores.double().numpy().T / epsilon)  # (K, B)
    Q = Q / Q.sum()
    B = len(scores)
    for _ in range(iterations):
        for k, share in enumerate(marginal.tolist()):
            Q[k] *= share / Q[k].sum()
        for b in range(B):
            Q[:, b] /= Q[:, b].sum() * B
    return B * torch.from_numpy(Q.T)  # (B, K)


def swav(scores, epsilon=0.05, iterations=3):
    """SwAV's solver (arXiv 2006.09882, algorithm 1 of its appendix): uniform over clusters."""
    Q = (scores / epsilon).exp().T
    Q /= Q.sum()
    clusters, B = Q.shape
    for _ in range(iterations):
        Q /= Q.sum(1, keepdim=True)
        Q /= clusters
        Q /= Q.sum(0, keepdim=True)
        Q /= B
    return (Q * B).T


def variation(p, q):
    """Total variation distance."""
    return 0.5 * (p - q).abs().sum().item()


# ----------------------------------------------------- Sinkhorn -----------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_sinkhorn_against_a_loop(iterations):  # CPSL-6
    scores, r = random_scores(40, K), long_tail()
    for epsilon in (0.05, 0.2):
        expected = sinkhorn_by_the_letter(scores, r, epsilon, iterations)
        torch.testing.assert_close(sinkhorn(scores, r, epsilon, iterations), expected, atol=1e-12, rtol=1e-9)


def test_sinkhorn_defaults_are_those_of_the_authors():
    scores, r = random_scores(40, K), long_tail()
    torch.testing.assert_close(sinkhorn(scores, r), sinkhorn_by_the_letter(scores, r, 0.05, 3), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("iterations", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinkhorn_rows_are_distributions(iterations, dtype):  # P1
    Q = sinkhorn(random_scores(500, K, dtype=dtype), long_tail(dtype), iterations=iterations)
    assert Q.dtype == dtype and Q.shape == (500, K) and (Q >= 0).all()
    torch.testing.assert_close(Q.sum(1), torch.ones(500, dtype=dtype), atol=1e-6, rtol=0)


def test_sinkhorn_approaches_the_class_marginal():  # P2
    scores, r = random_scores(65792, K), long_tail()
    off = {n: variation(sinkhorn(scores, r, iterations=n).mean(0), r) for n in (1, 3, 10, 40)}
    assert off[40] < 1e-5
    for n, expected in ((1, 0.41), (3, 0.19), (10, 0.02)):
        assert off[n] == pytest.approx(expected, abs=0.02)


def test_sinkhorn_of_separated_features_is_near_the_marginal_at_once():
    r = long_tail()
    label = torch.multinomial(r, 65792, replacement=True, generator=seeded(0))
    scores = 0.8 * F.one_hot(label, K).double() + 0.05 * randn(65792, K, seed=1, dtype=torch.float64)
    assert variation(sinkhorn(scores, r).mean(0), r) == pytest.approx(0.004, abs=0.002)


def test_sinkhorn_does_not_see_an_offset_of_a_class():  # P3
    scores, r = random_scores(200, K), long_tail()
    offset = randn(K, seed=1, dtype=torch.float64)
    plain = {n: sinkhorn(scores, r, iterations=n) for n in (1, 3, 7, 2000)}
    for n in (1, 3, 7):
        torch.testing.assert_close(sinkhorn(scores + offset, r, iterations=n), plain[n], atol=1e-12, rtol=0)
    tilt = randn(200, 1, seed=2, dtype=torch.float64)  # an offset of a pixel counts until convergence
    assert (sinkhorn(scores + tilt, r, iterations=3) - plain[3]).abs().max() > 0.1
    torch.testing.assert_close(sinkhorn(scores + tilt, r, iterations=2000), plain[2000], atol=1e-6, rtol=0)


def test_sinkhorn_of_scores_that_say_nothing_is_the_marginal():  # P4
    r = long_tail()
    torch.testing.assert_close(sinkhorn(torch.full((50, K), 0.7, dtype=torch.float64), r), r.expand(50, K))
    torch.testing.assert_close(sinkhorn(random_scores(50, K), r, epsilon=1e9), r.expand(50, K), atol=1e-8, rtol=0)


def test_sinkhorn_with_a_uniform_marginal_is_that_of_swav():  # P4
    scores = random_scores(200, K)
    torch.testing.assert_close(sinkhorn(scores, torch.full((K,), 1 / K, dtype=torch.float64)), swav(scores))


def test_sinkhorn_only_rescales_rows_and_columns():  # P5
    scores = random_scores(200, K)
    rest = sinkhorn(scores, long_tail()).log() - scores / 0.05
    rest = rest - rest.mean(0) - rest.mean(1, keepdim=True) + rest.mean()
    assert rest.abs().max() < 1e-10


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
    exact = sinkhorn(scores, r)
    torch.testing.assert_close(sinkhorn(scores.float(), r.float()).double(), exact, atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        Q = sinkhorn(scores.float(), r.float())
        half = sinkhorn(scores.bfloat16(), r.bfloat16())
    assert Q.dtype == half.dtype == torch.float32
    torch.testing.assert_close(Q.double(), exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(half, sinkhorn(scores.bfloat16().float(), r.bfloat16().float()))
    far = sinkhorn(1000 * scores.float(), r.float())  # exp(1000 / 0.05) would overflow, exp(-1000 / 0.05) leave nothing
    assert torch.isfinite(far).all()
    torch.testing.assert_close(far.sum(1), torch.ones(3000), atol=1e-5, rtol=0)


def test_sinkhorn_with_classes_of_zero_mass():
    scores, r = random_scores(100, 5, dtype=torch.float32), torch.tensor([0.7, 0.0, 0.3, 0.0, 0.0])
    Q = sinkhorn(scores, r, iterations=5)
    assert torch.isfinite(Q).all() and (Q[:, r == 0] == 0).all()
    torch.testing.assert_close(Q[:, r > 0], sinkhorn(scores[:, r > 0], r[r > 0], iterations=5))
    alone = sinkhorn(scores, torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(alone, torch.tensor([0.0, 0, 1, 0, 0]).expand(100, 5))


def test_sinkhorn_of_no_or_one_pixel_one_class_and_several_problems():
    r = long_tail()
    assert sinkhorn(random_scores(0, K), r).shape == (0, K)
    torch.testing.assert_close(sinkhorn(random_scores(1, K), r), r[None])  # one pixel must carry the whole marginal
    torch.testing.assert_close(sinkhorn(random_scores(7, 1), torch.ones(1)), torch.ones(7, 1, dtype=torch.float64))
    scores = random_scores(3, 50, K)
    torch.testing.assert_close(sinkhorn(scores, r), torch.stack([sinkhorn(s, r) for s in scores]))
    assert not sinkhorn(scores.requires_grad_(), r).requires_grad


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
    small = MemoryBank(3, 1)
    small.push(torch.arange(5.0)[:, None].requires_grad_())
    assert small.items().tolist() == [[2], [3], [4]] and not small.items().requires_grad
    small.push(torch.zeros(0, 1))
    assert small.items().tolist() == [[2], [3], [4]]
    none = MemoryBank(0, 1)
    none.push(torch.ones(2, 1))
    assert none.full and none.items().shape == none.usable().shape == (0, 1)


def test_bank_state():
    bank, other = MemoryBank(4, 2), MemoryBank(4, 2)
    bank.push(randn(3, 2))
    other.load_state_dict(bank.state_dict())
    assert torch.equal(bank.items(), other.items()) and not other.full


@pytest.mark.parametrize("size", [0, 100])
def test_assignment_is_the_last_rows_of_each_images_own_problem(size):  # P10
    scores, past, r = random_scores(3, 20, K), random_scores(size, K, seed=1), long_tail()
    for settings in ((), (0.2, 5)):
        expected = torch.stack([sinkhorn_by_the_letter(torch.cat([past, s]), r, *settings)[-20:] for s in scores])
        torch.testing.assert_close(cpsl.assign(scores, past, r, *settings), expected)
    assert cpsl.assign(scores[:, :0], past, r).shape == (3, 0, K)


def test_the_bank_gives_the_tail_its_share():
    """256 pixels of three classes, alone, must fill all 19; beside a bank with the true shares they need not."""
    g, r = seeded(), long_tail(torch.float32)
    classes = torch.multinomial(r, 8192, replacement=True, generator=g)
    own = torch.tensor([0, 2, 8]).repeat(86)[:256]

    def scores_of(y):
        return 0.8 * F.one_hot(y, K) + 0.05 * torch.randn(len(y), K, generator=g)

    scores = scores_of(own)[None]
    alone = cpsl.assign(scores, torch.zeros(0, K), r)[0][torch.arange(256), own].mean()
    beside = cpsl.assign(scores, scores_of(classes), r)[0][torch.arange(256), own].mean()
    assert beside > 0.95 and alone < 0.85


# ------------------------------------------------------ sampling ------------------------------------------------------


def long_tailed_maps(count, seed=0):
    """Labels (count, 6, 10) of four classes with 41, 13, 5 and 1 pixels, each map in its own order."""
    flat = torch.tensor([0] * 41 + [1] * 13 + [2] * 5 + [3])
    return torch.stack([flat[torch.randperm(60, generator=seeded(seed + i))] for i in range(count)]).view(count, 6, 10)


@pytest.mark.parametrize("n", [1, 7, 16, 59, 60])
def test_proportional_sampling_gives_every_class_its_share(n):  # CPSL-18
    label = long_tailed_maps(300)
    position = pick_pixels(label, n, torch.rand(300, 6, 10, generator=seeded(5)))
    assert position.shape == (300, n)
    counts = F.one_hot(label.flatten(1).gather(1, position), 4).sum(1).double()  # (300, 4)
    share = torch.tensor([41, 13, 5, 1]) * n / 60
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
    assert all(len(set(row.tolist())) == 16 for row in position)
    counts = F.one_hot(long_tailed_maps(50).flatten(1).gather(1, position), 4).sum(1)[:, 0]
    assert (counts - 41 * 16 / 60).abs().max() > 2  # unlike class by class
    assert not torch.equal(pick_pixels(long_tailed_maps(50), 16, u), position)


@pytest.mark.parametrize("proportional", [True, False])
def test_sampling_from_one_class_and_of_more_pixels_than_there_are(proportional):
    u = torch.rand(3, 5, 8, generator=seeded())
    one = torch.full((3, 5, 8), 2)
    position = pick_pixels(one, 12, u, proportional)
    assert position.shape == (3, 12) and all(len(set(row.tolist())) == 12 for row in position)
    assert len({tuple(sorted(row.tolist())) for row in position}) == 3  # a draw per image
    everything = pick_pixels(one, 100, u, proportional)
    assert all(sorted(row.tolist()) == list(range(40)) for row in everything)
    assert pick_pixels(one[:0], 12, u[:0], proportional).shape == (0, 12)


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
    stacked = self_labeling_loss(z.view(3, 5, 8), c, q.view(3, 5, 4))
    assert stacked.item() == pytest.approx(sum(terms) / 15, rel=1e-5)
    assert make_head(c)(z, q, 0.08).item() == pytest.approx(sum(terms) / 15, rel=1e-5)
    assert self_labeling_loss(z, c, q, temperature=1e9).item() == pytest.approx(math.log(4), rel=1e-5)


def test_self_labeling_trains_the_prototypes_only():  # P6
    model, head = common.DeepLabV2(5, "resnet14"), make_head(F.normalize(randn(5, 256), dim=1))
    features, _ = model(randn(1, 3, 32, 64))
    z = take_pixels(features, torch.arange(10)[None])[0]
    q = sinkhorn(F.normalize(z, dim=1) @ head.prototypes.T, torch.full((5,), 0.2)).requires_grad_()
    loss = head(z, q, 0.08)
    loss.backward()
    assert head.prototypes.grad.abs().sum() > 0 and q.grad is None
    assert all(p.grad is None for p in model.parameters())
    along = (head.prototypes.grad * head.prototypes).sum(1)
    torch.testing.assert_close(along, torch.zeros(5), atol=1e-5, rtol=0)  # a prototype's length does not matter
    assert self_labeling_loss(z, head.prototypes - 0.01 * head.prototypes.grad, q) < loss


def test_self_labeling_loss_over_nothing():
    c = randn(4, 8).requires_grad_()
    loss = self_labeling_loss(torch.zeros(0, 8), c, torch.zeros(0, 4))
    loss.backward()
    assert loss.item() == 0 and c.grad.abs().sum() == 0


def test_head_scores_are_cosines():
    head, features = make_head(5 * randn(6, 12)), randn(2, 12, 3, 4, seed=1)
    expected = torch.cosine_similarity(features[:, None], head.prototypes[None, :, :, None, None], dim=2)
    torch.testing.assert_close(head.cosine(features), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert head.cosine(features.bfloat16()).shape == (2, 6, 3, 4)


def test_head_keeps_the_marginal_and_the_start_but_learns_the_prototypes():
    head = SelfLabelingHead(6, 12)
    assert [name for name, _ in head.named_parameters()] == ["prototypes"]
    assert set(head.state_dict()) == {"prototypes", "start", "marginal"}
    torch.testing.assert_close(head.marginal, torch.full((6,), 1 / 6))


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
    w = (cosine / 0.08).softmax(1)
    assert (w[0, 1] / w[0, 0]).item() == pytest.approx(3.490, abs=5e-4)
    assert (0.4 * w[0, 1] / w[0, 0]).item() == pytest.approx(1.396, abs=5e-4)
    label = rectify(p, cosine)
    assert label.shape == (1, 1, 1) and label.dtype == torch.int64 and label.item() == 1
    assert rectify(p, cosine, temperature=1.0).item() == 0  # 0.6 > 0.4 e^0.1
    # e^(d / 0.08) = 1.5 at d = 0.0324: the weight ratio decides there
    assert rectify(p, torch.tensor([0.0, 0.0323]).view(1, 2, 1, 1)).item() == 0
    assert rectify(p, torch.tensor([0.0, 0.0326]).view(1, 2, 1, 1)).item() == 1


def test_rectification_against_the_product():  # CPSL-16, CPSL-17
    p, cosine = randn(2, K, 6, 7).softmax(1), random_scores(2, K, 6, 7, seed=1, dtype=torch.float32)
    expected = ((cosine.double() / 0.08).softmax(1) * p.double()).argmax(1)
    assert torch.equal(rectify(p, cosine), expected) and not torch.equal(expected, p.argmax(1))
    assert not torch.equal(expected, cosine.argmax(1))


def test_rectification_invariances():  # P7
    p, cosine = randn(2, K, 6, 7).softmax(1), random_scores(2, K, 6, 7, seed=1, dtype=torch.float32)
    assert torch.equal(rectify(p, torch.full_like(cosine, 0.3)), p.argmax(1))  # uniform P_SL
    assert torch.equal(rectify(7 * p, cosine), rectify(p, cosine))
    y = labels(2, 6, 7)
    sure = F.one_hot(y, K).permute(0, 3, 1, 2).float()
    assert torch.equal(rectify(sure, cosine), y)
    assert torch.equal(rectify(sure, 1000 * cosine), y)  # weights that underflow as numbers
    assert torch.equal(rectify(p[:, :1], cosine[:, :1]), torch.zeros(2, 6, 7, dtype=torch.long))


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
    logits, label = 2 * randn(2, 5, 4, 3), labels(2, 4, 3, classes=5)
    label[0, :2] = 255
    terms = []
    for n, y, x in (label != 255).nonzero().tolist():
        p = logits[n, :, y, x].double().softmax(0)
        target = torch.zeros(5, dtype=torch.float64)
        target[label[n, y, x]] = 1
        rce = -(p.clamp(1e-7, 1) * target.clamp(1e-4, 1).log()).sum().item()
        assert rce == pytest.approx(9.210340 * (1 - p[label[n, y, x]].item()), abs=1e-5)
        terms.append(0.1 * -p[label[n, y, x]].log().item() + rce)
    assert symmetric_cross_entropy(logits, label).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


@pytest.mark.parametrize("p, pull", [(0.5, 2.353), (0.01, 0.190), (0.99, 0.092)])
def test_symmetric_cross_entropy_hardly_pulls_at_a_confident_mistake(p, pull):
    """By hand: (1 - p) (alpha + beta A p) on the label's logit."""
    logits = torch.tensor([math.log(p), math.log(1 - p)]).view(1, 2, 1, 1).requires_grad_()
    symmetric_cross_entropy(logits, torch.zeros(1, 1, 1, dtype=torch.long)).backward()
    assert -logits.grad[0, 0].item() == pytest.approx((1 - p) * (0.1 + 9.210340 * p), rel=1e-4)
    assert logits.grad.flatten().tolist() == pytest.approx([-pull, pull], abs=6e-4)


def test_symmetric_cross_entropy_is_taken_at_the_labels_size_and_gradients_stay_finite():
    logits, label = randn(1, 5, 3, 4), labels(1, 24, 32, classes=5)
    expected = symmetric_cross_entropy(common.upsample(logits, (24, 32)), label)
    torch.testing.assert_close(symmetric_cross_entropy(logits, label), expected)
    extreme = torch.tensor([80.0, -80.0]).view(1, 2, 1, 1).requires_grad_()
    symmetric_cross_entropy(extreme, torch.ones(1, 1, 1, dtype=torch.long)).backward()
    torch.testing.assert_close(extreme.grad.flatten(), torch.tensor([0.1, -0.1]))  # only CE still pulls


@pytest.mark.parametrize("shape", [(1, 4, 6), (0, 4, 6)])
def test_losses_over_nothing_are_a_connected_zero(shape):
    logits, label = randn(shape[0], 5, 4, 6).requires_grad_(), torch.full(shape, 255)
    loss = symmetric_cross_entropy(logits, label)
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_symmetric_cross_entropy_of_one_class_is_zero():
    assert symmetric_cross_entropy(randn(1, 1, 4, 6), torch.zeros(1, 4, 6, dtype=torch.long)).item() == 0


# -------------------------------------------- consistency and distillation --------------------------------------------


def test_divergence_normalisation():  # P9: also over the classes
    t, s = 2 * randn(2, K, 4, 5), randn(2, K, 4, 5, seed=1)
    assert kl_divergence(t, t).item() == pytest.approx(0, abs=1e-7)
    log_t, log_s = t.double().log_softmax(1), s.double().log_softmax(1)
    each = (log_t.exp() * (log_t - log_s)).sum(1)  # nats per pixel
    one = kl_divergence(t[1:, :, 2:3, 3:4], s[1:, :, 2:3, 3:4])
    assert one.item() == pytest.approx(each[1, 2, 3].item() / 19, rel=1e-5)
    assert kl_divergence(t, s).item() == pytest.approx(each.mean().item() / 19, rel=1e-5)
    assert kl_divergence(s, t).item() != pytest.approx(kl_divergence(t, s).item(), rel=0.05)
    assert kl_divergence(t[:, :1], s[:, :1]).item() == 0  # one class


def test_divergence_is_never_negative_where_the_authors_form_is():  # P13
    one_hot = (200 * F.one_hot(torch.tensor([3]), K).float()).view(1, K, 1, 1)
    t = one_hot.softmax(1)
    authors = torch.where(t > 0, t * (t.log() - t), 0).mean()  # the student's softmax in place of its logarithm
    assert authors.item() == pytest.approx(-1 / 19)
    assert kl_divergence(one_hot, one_hot).item() == 0
    for seed in range(50):
        t, s = 5 * randn(2, 1, K, 1, 1, seed=seed)
        assert kl_divergence(t, s).item() >= 0


def test_divergence_trains_the_student_and_not_the_momentum_prototypes():  # P6
    model, head = common.DeepLabV2(5, "resnet14"), make_head(randn(5, 256)).requires_grad_(False)
    features, _ = model(randn(2, 3, 32, 64))
    teacher = randn(2, 5, 5, 9).requires_grad_()
    kl_divergence(teacher, head.cosine(features) / 0.08).backward()
    assert model.backbone[0].weight.grad.abs().sum() > 0
    assert head.prototypes.grad is None and teacher.grad is None
    assert all(branch.weight.grad is None for branch in model.classifier)


def test_strong_view_changes_looks_and_not_geometry(monkeypatch):
    dataset = common.ToyStreets("target", size=(48, 64))
    images = torch.stack([dataset[i]["image"] for i in range(8)])
    view = cpsl.strong_view(images, 5)
    assert view.shape == images.shape
    assert torch.equal(view, cpsl.strong_view(images, 5)) and not torch.equal(view, cpsl.strong_view(images, 6))
    moved = (view - images).abs().flatten(1).mean(1)
    # A quarter of the pictures stays, the others change each in its own way.
    assert (moved < 1e-5).any() and (moved > 0.02).any()
    torch.testing.assert_close(view[moved < 1e-5], images[moved < 1e-5], atol=1e-5, rtol=0)
    for before, after in zip(images, view):
        edges = [(image[:, :, 1:] - image[:, :, :-1]).abs().mean(0).flatten() for image in (before, after)]
        assert torch.corrcoef(torch.stack(edges))[0, 1] > 0.5
    state = torch.get_rng_state()
    cpsl.strong_view(images, 7)
    assert torch.equal(state, torch.get_rng_state())
    same = images[:1].repeat(8, 1, 1, 1)
    assert len({tuple(v.flatten()[:50].tolist()) for v in cpsl.strong_view(same, 5)}) > 3
    monkeypatch.setattr(common, "rank", lambda: 1)  # the second process's share is distorted as in one process
    assert torch.equal(cpsl.strong_view(images[4:], 5), view[4:])


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
    assert 0.999**1000 == pytest.approx(0.3677, abs=5e-5)
    for a, s, m in zip(average.parameters(), start, model.parameters()):
        torch.testing.assert_close(a, 0.3677 * s + 0.6323 * m, atol=2e-4, rtol=0)
        assert a.grad is None and m.grad is None
    average.train()(randn(4, 2, 5, 5))  # its own statistics move, ...
    model.train()(randn(4, 2, 5, 5, seed=1))
    assert not torch.equal(average[1].running_mean, model[1].running_mean)
    update_average(average, model, 0.999)  # ... and are overwritten
    assert all(torch.equal(a, m) for a, m in zip(average.buffers(), model.buffers()))


@pytest.mark.parametrize("momentum, left", [(0.0, 0.0), (1.0, 1.0)])
def test_momentum_at_its_ends(momentum, left):
    model, average = nn.Linear(2, 2), nn.Linear(2, 2)
    before = average.weight.detach().clone()
    update_average(average, model, momentum)
    torch.testing.assert_close(average.weight, left * before + (1 - left) * model.weight)


def test_learning_rates():  # P14
    assert cpsl.poly_lr(5e-4, 999, 90000, 0.9) == pytest.approx(4.950e-4, abs=1e-7)
    assert cpsl.poly_lr(6e-3, 75999, 90000, 0.9) == pytest.approx(1.1243e-3, abs=1e-6)
    model, head = common.DeepLabV2(5, "resnet14"), make_head(randn(5, 256))
    args = argparse.Namespace(optimizer="sgd", head_lr=10.0, head_scale=5.0, prototype_scale=7.0, device="cpu")
    optimizer = cpsl.make_optimizer_with_prototypes(model, head, args)
    cpsl.set_lr(optimizer, 1e-4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 5e-4, 7e-4])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 5e-4, 0.0]
    assert optimizer.param_groups[2]["params"] == [head.prototypes]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len([*model.parameters()]) + 1


# ---------------------------------------------------- does it work? ----------------------------------------------------


def test_self_labels_recover_a_tail_that_the_pseudo_labels_miss():  # P15
    """Gaussian classes with a long tail, and P_ST that takes much of the tail for the head's classes."""
    g = seeded(0)
    share = torch.tensor([0.6, 0.3, 0.06, 0.04])
    y = torch.multinomial(share, 4000, replacement=True, generator=g)
    centres = F.normalize(torch.randn(4, 16, generator=g), dim=1)
    z = F.normalize(centres[y] + 0.15 * torch.randn(4000, 16, generator=g), dim=1)
    logits = 1.5 * F.one_hot(y, 4) + share.log() / 2 + torch.randn(4000, 4, generator=g)
    p_st = logits.softmax(1)
    biased = p_st.argmax(1)

    def train(marginal):
        start = class_sums(z.T.reshape(1, 16, 40, 100), biased.view(1, 40, 100), 4)[0]
        c = nn.Parameter(F.normalize(start, dim=1))
        optimizer = torch.optim.SGD([c], lr=0.05)
        for step in range(60):
            pick = torch.randint(4000, (256,), generator=g)
            q = sinkhorn(z[pick] @ F.normalize(c.detach(), dim=1).T, marginal)
            optimizer.zero_grad()
            self_labeling_loss(z[pick], c, q).backward()
            optimizer.step()
        cosine = z @ F.normalize(c.detach(), dim=1).T
        return rectify(p_st.T.reshape(1, 4, 40, 100), cosine.T.reshape(1, 4, 40, 100)).flatten()

    def recall(label):
        return (label == y)[y >= 2].float().mean().item()

    def right(label):
        return (label == y).float().mean().item()

    balanced, uniform = train(share), train(torch.full((4,), 0.25))
    assert recall(balanced) > recall(biased) + 0.1
    # A uniform marginal inflates the tail.
    assert right(balanced) > right(biased) and right(balanced) > right(uniform)
