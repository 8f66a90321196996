"""cpsl.py: every equation against an independent computation, its gradient routing and its degenerate cases.

P1 to P15 are properties of the method that can be checked without its data; the numbers are closed forms or hand values.
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
from torch import nn
from trees import write_cityscapes, write_gta5, write_synthia

import common
import cpsl
from cpsl import (MemoryBank, SelfLabelingHead, class_sums, confident_labels, cutmix, cutmix_box, kl_divergence, pick_pixels,
                  rectify, self_labeling_loss, sinkhorn, symmetric_cross_entropy, take_pixels, update_average)

K = 19
# The authors' marginal for GTA5 -> Cityscapes, in percent, in trainId order.
SHIPPED = [37.922, 4.930, 22.665, 1.551, 1.721, 1.403, 0.219, 0.221, 13.338, 2.424,
           4.341, 1.315, 0.161, 6.605, 0.408, 0.279, 0.185, 0.123, 0.191]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_scores(*shape, seed=0, dtype=torch.float64):
    return (0.3 * torch.randn(*shape, generator=seeded(seed), dtype=dtype)).clamp(-1, 1)


def long_tail(dtype=torch.float64):
    r = torch.tensor(SHIPPED, dtype=dtype)
    return r / r.sum()


def sinkhorn_by_the_letter(scores, marginal, epsilon=0.05, iterations=3):
    """CPSL-6 as a loop over rows and columns of a K x B matrix, in float64."""
    Q = [[math.exp(s / epsilon) for s in column] for column in scores.double().T.tolist()]  # K rows of B
    total = sum(map(sum, Q))
    Q = [[q / total for q in row] for row in Q]
    B = len(scores)
    for _ in range(iterations):
        Q = [[r * q / sum(row) for q in row] for row, r in zip(Q, marginal.tolist())]
        columns = [sum(row[b] for row in Q) for b in range(B)]
        Q = [[q / columns[b] / B for b, q in enumerate(row)] for row in Q]
    return B * torch.tensor(Q, dtype=torch.float64).T  # (B, K)


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


# ------------------------------------------------------- Sinkhorn -------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_sinkhorn_against_a_loop(iterations):
    scores, r = random_scores(40, K), long_tail()
    for epsilon in (0.05, 0.2):
        expected = sinkhorn_by_the_letter(scores, r, epsilon, iterations)
        torch.testing.assert_close(sinkhorn(scores, r, epsilon, iterations), expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("iterations", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinkhorn_rows_are_distributions(iterations, dtype):  # P1
    Q = sinkhorn(random_scores(500, K, dtype=dtype), long_tail(dtype), iterations=iterations)
    assert Q.dtype == dtype and Q.shape == (500, K) and (Q >= 0).all()
    torch.testing.assert_close(Q.sum(1), torch.ones(500, dtype=dtype), atol=1e-6, rtol=0)


def test_sinkhorn_approaches_the_class_marginal():  # P2
    scores, r = random_scores(65792, K), long_tail()
    off = {n: variation(sinkhorn(scores, r, iterations=n).mean(0), r) for n in (1, 3, 10, 50)}
    assert off[50] < 1e-5
    for n, expected in ((1, 0.41), (3, 0.19), (10, 0.02)):
        assert off[n] == pytest.approx(expected, abs=0.02)


def test_sinkhorn_of_separated_features_is_near_the_marginal_at_once():
    r = long_tail()
    label = torch.multinomial(r, 65792, replacement=True, generator=seeded(0))
    scores = 0.8 * F.one_hot(label, K).double() + 0.05 * torch.randn(65792, K, generator=seeded(1), dtype=torch.float64)
    assert variation(sinkhorn(scores, r).mean(0), r) == pytest.approx(0.004, abs=0.002)


def test_sinkhorn_does_not_see_an_offset_of_a_class():  # P3
    scores, r = random_scores(300, K), long_tail()
    offset = torch.randn(K, generator=seeded(1), dtype=torch.float64)
    plain = {n: sinkhorn(scores, r, iterations=n) for n in (1, 3, 7, 3000)}
    for n in (1, 3, 7):
        torch.testing.assert_close(sinkhorn(scores + offset, r, iterations=n), plain[n], atol=1e-12, rtol=0)
    tilt = torch.randn(300, 1, generator=seeded(2), dtype=torch.float64)  # an offset of a pixel counts until convergence
    assert (sinkhorn(scores + tilt, r, iterations=3) - plain[3]).abs().max() > 0.1
    torch.testing.assert_close(sinkhorn(scores + tilt, r, iterations=3000), plain[3000], atol=1e-6, rtol=0)


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
        change = torch.randn(6, 4, generator=seeded(seed), dtype=torch.float64)
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


def test_sinkhorn_of_one_pixel_one_class_and_several_problems():
    r = long_tail()
    torch.testing.assert_close(sinkhorn(random_scores(1, K), r), r[None])  # one pixel must carry the whole marginal
    torch.testing.assert_close(sinkhorn(random_scores(7, 1), torch.ones(1)), torch.ones(7, 1, dtype=torch.float64))
    scores = random_scores(3, 50, K)
    torch.testing.assert_close(sinkhorn(scores, r), torch.stack([sinkhorn(s, r) for s in scores]))
    assert not sinkhorn(scores.requires_grad_(), r).requires_grad


# ----------------------------------------------------- assignment and bank -----------------------------------------------------


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
    assert none.full and none.items().shape == (0, 1)


def test_bank_state():
    bank, other = MemoryBank(4, 2), MemoryBank(4, 2)
    bank.push(torch.randn(3, 2))
    other.load_state_dict(bank.state_dict())
    assert torch.equal(bank.items(), other.items()) and not other.full


@pytest.mark.parametrize("size", [0, 100])
def test_assignment_is_the_last_rows_of_each_images_own_problem(size):  # P10
    scores, past, r = random_scores(3, 20, K), random_scores(size, K, seed=1), long_tail()
    args = argparse.Namespace(epsilon=0.05, sinkhorn_iterations=3)
    expected = torch.stack([sinkhorn_by_the_letter(torch.cat([past, s]), r)[-20:] for s in scores])
    torch.testing.assert_close(cpsl.assign(scores, past, r, args), expected)


def test_the_bank_gives_the_tail_its_share():
    """256 pixels of three classes, alone, must fill all 19; beside a bank with the true shares they need not."""
    g, r = seeded(), long_tail(torch.float32)
    classes = torch.multinomial(r, 8192, replacement=True, generator=g)
    own = torch.tensor([0, 2, 8]).repeat(86)[:256]
    scores_of = lambda y: 0.8 * F.one_hot(y, K) + 0.05 * torch.randn(len(y), K, generator=g)
    args, scores = argparse.Namespace(epsilon=0.05, sinkhorn_iterations=3), scores_of(own)[None]
    alone = cpsl.assign(scores, torch.zeros(0, K), r, args)[0][torch.arange(256), own].mean()
    beside = cpsl.assign(scores, scores_of(classes), r, args)[0][torch.arange(256), own].mean()
    assert beside > 0.95 and alone < 0.85


def test_pixels_are_drawn_at_random_without_repetition_and_never_from_padding():
    valid = torch.ones(3, 5, 8, dtype=torch.bool)
    valid[1, :, 4:] = False  # 20 valid
    valid[2] = False
    valid[2, 2, 3] = True
    position = pick_pixels(valid, 12, torch.rand(3, 5, 8, generator=seeded()))
    assert position.shape == (3, 12)
    assert all(len(set(row.tolist())) == 12 for row in position[:2])
    assert valid.flatten(1).gather(1, position).all()
    assert (position[2] == 2 * 8 + 3).all()  # one valid pixel: it repeats
    assert pick_pixels(valid, 100, torch.rand(3, 5, 8)).shape == (3, 40)
    assert sorted(pick_pixels(valid, 100, torch.rand(3, 5, 8))[0].tolist()) == list(range(40))
    assert valid.flatten(1).gather(1, pick_pixels(valid, 100, torch.rand(3, 5, 8))).all()
    often = torch.stack([torch.bincount(pick_pixels(valid[:1], 10, torch.rand(1, 5, 8))[0], minlength=40) for _ in range(400)]).float().mean(0)
    assert often.min() > 0.12 and often.max() < 0.4  # each a quarter of the time
    maps = torch.arange(2.0 * 3 * 5 * 8).view(2, 3, 5, 8)
    assert take_pixels(maps, torch.tensor([[9, 0], [39, 1]]))[1, 0].tolist() == maps[1, :, 4, 7].tolist()
    assert take_pixels(maps, torch.tensor([[9, 0], [39, 1]]))[0, 0].tolist() == maps[0, :, 1, 1].tolist()


# ------------------------------------------------------- self-labelling -------------------------------------------------------


def test_self_labeling_loss_against_a_loop():  # CPSL-7
    z, c, q = torch.randn(15, 8), 3 * torch.randn(4, 8), torch.rand(15, 4).softmax(1)
    terms = []
    for i in range(15):
        cosine = [(z[i].double() @ c[k].double() / z[i].double().norm() / c[k].double().norm()).item() / 0.08 for k in range(4)]
        norm = math.log(sum(map(math.exp, cosine)))
        terms.append(-sum(q[i, k].item() * (cosine[k] - norm) for k in range(4)))
    assert self_labeling_loss(z, c, q).item() == pytest.approx(sum(terms) / 15, rel=1e-5)
    stacked = self_labeling_loss(z.view(3, 5, 8), c, q.view(3, 5, 4))
    assert stacked.item() == pytest.approx(sum(terms) / 15, rel=1e-5)
    assert self_labeling_loss(z, c, q, temperature=1e9).item() == pytest.approx(math.log(4), rel=1e-5)


def test_self_labeling_trains_the_prototypes_only():  # P6
    model, head = common.DeepLabV2(5, "resnet18"), SelfLabelingHead(torch.randn(5, 512))
    features, _ = model(torch.randn(1, 3, 32, 64))
    z = take_pixels(features, torch.arange(10)[None])[0]
    q = sinkhorn(F.normalize(z, dim=1) @ head.prototypes.T, torch.full((5,), 0.2)).requires_grad_()
    loss = self_labeling_loss(z, head.prototypes, q)
    loss.backward()
    assert head.prototypes.grad.abs().sum() > 0 and q.grad is None
    assert all(p.grad is None for p in model.parameters())
    along = (head.prototypes.grad * head.prototypes).sum(1)
    torch.testing.assert_close(along, torch.zeros(5), atol=1e-5, rtol=0)  # a prototype's length does not matter
    stepped = self_labeling_loss(z, head.prototypes - 0.01 * head.prototypes.grad, q)
    assert stepped < loss


def test_self_labeling_loss_over_nothing():
    c = torch.randn(4, 8, requires_grad=True)
    loss = self_labeling_loss(torch.zeros(0, 8), c, torch.zeros(0, 4))
    loss.backward()
    assert loss.item() == 0 and c.grad.abs().sum() == 0


def test_head_scores_are_cosines():
    head, features = SelfLabelingHead(5 * torch.randn(6, 12)), torch.randn(2, 12, 3, 4)
    torch.testing.assert_close(head.prototypes.norm(dim=1), torch.ones(6))
    expected = torch.cosine_similarity(features[:, None], head.prototypes[None, :, :, None, None], dim=2)
    torch.testing.assert_close(head(features), expected)
    with torch.no_grad():
        head.prototypes.mul_(3)
    torch.testing.assert_close(head(features), expected)


def test_class_sums_against_a_loop():
    features, label = torch.randn(3, 4, 5, 6), torch.randint(0, 3, (3, 5, 6), generator=seeded())
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


# ------------------------------------------------------- rectification -------------------------------------------------------


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


def test_rectification_against_the_product():
    p, cosine = torch.rand(2, K, 6, 7).softmax(1), 2 * torch.rand(2, K, 6, 7) - 1
    expected = ((cosine.double() / 0.08).softmax(1) * p.double()).argmax(1)
    assert torch.equal(rectify(p, cosine), expected) and not torch.equal(expected, p.argmax(1))


def test_rectification_invariances():  # P7
    g = seeded()
    p, cosine = torch.rand(2, K, 6, 7, generator=g).softmax(1), 2 * torch.rand(2, K, 6, 7, generator=g) - 1
    assert torch.equal(rectify(p, torch.full_like(cosine, 0.3)), p.argmax(1))  # uniform P_SL
    assert torch.equal(rectify(7 * p, cosine), rectify(p, cosine))
    y = torch.randint(0, K, (2, 6, 7), generator=g)
    sure = F.one_hot(y, K).permute(0, 3, 1, 2).float()
    assert torch.equal(rectify(sure, cosine), y)
    assert torch.equal(rectify(sure, 1000 * cosine), y)  # weights that underflow as numbers
    assert torch.equal(rectify(p[:, :1], cosine[:, :1]), torch.zeros(2, 6, 7, dtype=torch.long))


# ------------------------------------------------- symmetric cross-entropy -------------------------------------------------


def test_symmetric_cross_entropy_hand_values():  # P8
    logits, label = torch.zeros(1, K, 2, 3), torch.randint(0, K, (1, 2, 3))
    assert symmetric_cross_entropy(logits, label, 0, 1).item() == pytest.approx(8.725586, abs=1e-5)
    assert symmetric_cross_entropy(logits, label, 1, 0).item() == pytest.approx(2.944439, abs=1e-6)
    assert symmetric_cross_entropy(logits, label).item() == pytest.approx(9.020030, abs=1e-5)
    perfect = 100 * F.one_hot(label, K).permute(0, 3, 1, 2).float()
    assert symmetric_cross_entropy(perfect, label).item() == 0
    wrong = symmetric_cross_entropy(perfect, (label + 1) % K, 0, 1)
    assert wrong.item() == pytest.approx(9.210340, abs=1e-5)  # A: bounded, where CE is 100


def test_symmetric_cross_entropy_against_the_clamped_definition():  # P8: CPSL-3 with its clamps, pixel by pixel
    logits, label = 2 * torch.randn(2, 5, 4, 3), torch.randint(0, 5, (2, 4, 3), generator=seeded())
    label[0, :2] = 255
    terms = []
    for n in range(2):
        for y in range(4):
            for x in range(3):
                if label[n, y, x] != 255:
                    p = logits[n, :, y, x].double().softmax(0)
                    target = torch.zeros(5, dtype=torch.float64)
                    target[label[n, y, x]] = 1
                    rce = -(p.clamp(1e-7, 1) * target.clamp(1e-4, 1).log()).sum().item()
                    assert rce == pytest.approx(9.210340 * (1 - p[label[n, y, x]].item()), abs=1e-5)
                    terms.append(0.1 * -p[label[n, y, x]].log().item() + rce)
    assert symmetric_cross_entropy(logits, label).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_symmetric_cross_entropy_is_taken_at_the_labels_size_and_gradients_stay_finite():
    logits, label = torch.randn(1, 5, 3, 4), torch.randint(0, 5, (1, 24, 32))
    expected = symmetric_cross_entropy(common.upsample(logits, (24, 32)), label)
    torch.testing.assert_close(symmetric_cross_entropy(logits, label), expected)
    extreme = torch.tensor([80.0, -80.0]).view(1, 2, 1, 1).requires_grad_()
    symmetric_cross_entropy(extreme, torch.ones(1, 1, 1, dtype=torch.long)).backward()
    torch.testing.assert_close(extreme.grad.flatten(), torch.tensor([0.1, -0.1]))  # only CE still pulls


@pytest.mark.parametrize("shape", [(1, 4, 6), (0, 4, 6)])
def test_losses_over_nothing_are_a_connected_zero(shape):
    logits, label = torch.randn(shape[0], 5, 4, 6, requires_grad=True), torch.full(shape, 255)
    loss = symmetric_cross_entropy(logits, label) + kl_divergence(torch.randn(shape[0], 5, 4, 6), logits, label != 255)
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


# ------------------------------------------------- consistency and distillation -------------------------------------------------


def test_divergence_normalisation():  # P9: also over the classes, and not over padding
    t, s = torch.randn(2, K, 4, 5), torch.randn(2, K, 4, 5)
    everywhere = torch.ones(2, 4, 5, dtype=torch.bool)
    assert kl_divergence(t, t, everywhere).item() == pytest.approx(0, abs=1e-7)
    log_t, log_s = t.double().log_softmax(1), s.double().log_softmax(1)
    each = (log_t.exp() * (log_t - log_s)).sum(1)  # nats per pixel
    one = torch.zeros_like(everywhere)
    one[1, 2, 3] = True
    assert kl_divergence(t, s, one).item() == pytest.approx(each[1, 2, 3].item() / 19, rel=1e-5)
    some = torch.rand(2, 4, 5, generator=seeded()) < 0.5
    value = kl_divergence(t, s, some).item()
    assert value == pytest.approx(each[some].mean().item() / 19, rel=1e-5)
    changed = torch.where(some[:, None], s, 50.0)
    assert kl_divergence(t, changed, some).item() == pytest.approx(value)


def test_divergence_is_never_negative_where_the_authors_form_is():  # P13
    everywhere = torch.ones(1, 1, 1, dtype=torch.bool)
    one_hot = (200 * F.one_hot(torch.tensor([3]), K).float()).view(1, K, 1, 1)
    t = one_hot.softmax(1)
    authors = torch.where(t > 0, t * (t.log() - t), 0).mean()  # the student's softmax in place of its logarithm
    assert authors.item() == pytest.approx(-1 / 19)
    assert kl_divergence(one_hot, one_hot, everywhere).item() == 0
    for seed in range(50):
        t, s = torch.randn(2, 1, K, 1, 1, generator=seeded(seed)) * 5
        assert kl_divergence(t, s, everywhere).item() >= 0


def test_divergence_trains_the_student_and_not_the_momentum_prototypes():  # P6
    model, head = common.DeepLabV2(5, "resnet18"), SelfLabelingHead(torch.randn(5, 512)).requires_grad_(False)
    features, _ = model(torch.randn(2, 3, 32, 64))
    teacher = torch.randn(2, 5, 4, 8, requires_grad=True)
    kl_divergence(teacher, head(features) / 0.08, torch.ones(2, 4, 8, dtype=torch.bool)).backward()
    assert model.backbone[0].weight.grad.abs().sum() > 0
    assert head.prototypes.grad is None and teacher.grad is None
    assert all(branch.weight.grad is None for branch in model.classifier)


def test_strong_view_changes_looks_and_not_geometry():
    dataset = common.ToyStreets("target", size=(48, 64))
    images = torch.stack([dataset[i]["image"] for i in range(8)])
    view = cpsl.strong_view(images, 5)
    assert view.shape == images.shape
    assert torch.equal(view, cpsl.strong_view(images, 5)) and not torch.equal(view, cpsl.strong_view(images, 6))
    moved = (view - images).abs().flatten(1).mean(1)
    assert (moved < 1e-5).any() and (moved > 0.02).any()  # a quarter of the pictures stays, the others change each in its own way
    torch.testing.assert_close(view[moved < 1e-5], images[moved < 1e-5], atol=1e-5, rtol=0)
    for before, after in zip(images, view):
        edges = [(image[:, :, 1:] - image[:, :, :-1]).abs().mean(0).flatten() for image in (before, after)]
        assert torch.corrcoef(torch.stack(edges))[0, 1] > 0.5
    state = torch.get_rng_state()
    cpsl.strong_view(images, 7)
    assert torch.equal(state, torch.get_rng_state())


def test_confident_labels():
    prob = torch.tensor([[0.95, 0.05], [0.04, 0.96], [0.5, 0.5]]).T.view(1, 2, 1, 3)
    assert confident_labels(prob, 0.95).tolist() == [[[255, 1, 255]]]  # above, not at
    assert confident_labels(prob, 0.0).tolist() == [[[0, 1, 0]]]


# ------------------------------------------------- momentum, CutMix, rates -------------------------------------------------


def test_momentum_copy():  # P11
    model, average = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    start = [p.detach().clone() for p in average.parameters()]
    for _ in range(1000):
        update_average(average, model, 0.999)
    assert 0.999**1000 == pytest.approx(0.3677, abs=5e-5)
    for a, s, m in zip(average.parameters(), start, model.parameters()):
        torch.testing.assert_close(a, 0.3677 * s + 0.6323 * m, atol=2e-4, rtol=0)
        assert a.grad is None and m.grad is None
    average.train()(torch.randn(4, 2, 5, 5))  # its own statistics move, ...
    model.train()(torch.randn(4, 2, 5, 5))
    assert not torch.equal(average[1].running_mean, model[1].running_mean)
    update_average(average, model, 0.999)  # ... and are overwritten
    assert all(torch.equal(a, m) for a, m in zip(average.buffers(), model.buffers()))


def test_cutmix_covers_half_and_pastes_image_and_label_alike():  # P12
    boxes = [cutmix_box(512, 896, seeded(seed)) for seed in range(200)]
    for top, bottom, left, right in boxes:
        assert 0 <= top < bottom <= 512 and 0 <= left < right <= 896 and bottom - top >= 256
        assert (bottom - top) * (right - left) / (512 * 896) == pytest.approx(0.5, abs=0.002)
    assert len({box[0] for box in boxes}) > 20 and len({box[2] for box in boxes}) > 20
    x_s, x_t = torch.ones(2, 3, 48, 64), torch.zeros(2, 3, 48, 64)
    y_s, y_t = torch.randint(0, 9, (2, 48, 64)), torch.randint(9, 19, (2, 48, 64))
    pasted = 0
    for seed in range(100):
        x, y = cutmix(x_s, y_s, x_t, y_t, seeded(seed))
        inside = x[:, 0] == 1
        assert torch.equal(y, torch.where(inside, y_s, y_t)) and torch.equal(x, inside[:, None].expand(-1, 3, -1, -1).float())
        pasted += inside.any().item()
        assert not inside.any() or inside.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert 35 <= pasted <= 65
    assert x_t.eq(0).all() and y_t.min() >= 9  # the inputs stay


def test_learning_rates():  # P14
    assert cpsl.poly_lr(5e-4, 999, 90000, 0.9) == pytest.approx(4.950e-4, abs=1e-7)
    assert cpsl.poly_lr(6e-3, 75999, 90000, 0.9) == pytest.approx(1.1243e-3, abs=1e-6)
    model, head = common.DeepLabV2(5, "resnet18"), SelfLabelingHead(torch.randn(5, 512))
    args = argparse.Namespace(optimizer="sgd", head_lr=10.0, head_scale=5.0)
    optimizer = cpsl.make_optimizer_with_prototypes(model, head, args)
    cpsl.set_lr(optimizer, 1e-4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 5e-4, 5e-4])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 5e-4, 0.0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len([*model.parameters(), *head.parameters()])


def test_padding_of_unlabelled_images_is_known():
    augment = common.with_padding_mask(common.training_augment((80, 80), (80, 80), (0.5, 0.5), jitter=0.0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image, mask = augment(torch.zeros(3, 80, 80, dtype=torch.uint8), None)
    assert mask.shape == (80, 80) and (mask == 255).sum() == 3 * (mask == 0).sum() == 80 * 80 * 3 / 4
    assert (image[:, mask == 255] > 0).all() and (image[:, mask == 0] == 0).all()
    assert (common.grid_labels(mask[None], (10, 10)) == 0).sum() == pytest.approx(25, abs=11)


# ------------------------------------------------------- does it work? -------------------------------------------------------


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
        c = nn.Parameter(F.normalize(class_sums(z.T.reshape(1, 16, 40, 100), biased.view(1, 40, 100), 4)[0], dim=1))
        optimizer = torch.optim.SGD([c], lr=0.05)
        for step in range(60):
            pick = torch.randint(4000, (256,), generator=g)
            q = sinkhorn(z[pick] @ F.normalize(c.detach(), dim=1).T, marginal)
            optimizer.zero_grad()
            self_labeling_loss(z[pick], c, q).backward()
            optimizer.step()
        cosine = z @ F.normalize(c.detach(), dim=1).T
        return rectify(p_st.T.reshape(1, 4, 40, 100), cosine.T.reshape(1, 4, 40, 100)).flatten()

    tail = y >= 2
    recall = lambda label: (label == y)[tail].float().mean().item()
    right = lambda label: (label == y).float().mean().item()
    balanced, uniform = train(share), train(torch.full((4,), 0.25))
    assert recall(balanced) > recall(biased) + 0.1
    assert right(balanced) > right(biased) and right(balanced) > right(uniform)  # a uniform marginal inflates the tail


# -------------------------------------------------------- the script --------------------------------------------------------

# 32 pixels per image: the bank is full after two steps.
FEW = [*TINY, "--consistency", "--warmup-iterations", 2, "--iterations", 4, "--bank", 128, "--distill-iterations", 2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of all stages that nobody interrupted; what it printed and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    out = run(folder, "cpsl.py", *FEW, "--distill", 2)
    return out, folder / "runs/cpsl-toy-s0"


def lines_of(folder, stage):
    return [line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if line["stage"] == stage]


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two nested checkpoints are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_one_command_runs_all_stages(whole):
    out, folder = whole
    assert {"args.json", "log.jsonl", "source_only.pt", "warmup.pt", "stage1.pt", "stage2.pt", "last.pt", "panel.png",
            "result.json"} <= {p.name for p in folder.iterdir()}
    scores = result(folder)
    assert list(scores["columns"]) == ["source only", "+ BN target", "CPSL"] and "motorcycle" in out
    assert Image.open(folder / "panel.png").width > 4 * 300  # image | truth | source only | CPSL
    assert len(list((folder / "pseudo_labels/stage3").iterdir())) == 24
    for stage in ("stage 2", "stage 3"):
        first, *steps = lines_of(folder, stage)
        assert 0 <= first["kept"] <= 1 and 0 <= first["accuracy"] <= 1
        assert len(steps) == 2 and all(step["kd"] >= 0 for step in steps)
    weights = [load(folder / name)["model"]["backbone.0.weight"] for name in ("stage1.pt", "stage2.pt", "last.pt")]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_the_warm_up_model_and_the_marginal(whole, tmp_path):
    """warmup.pt is the source-only model with batch norm of the target; r and the prototypes follow from it."""
    _, folder = whole
    saved, given = load(folder / "warmup.pt"), load(folder / "source_only.pt")
    differ = {key for key in given["model"] if not torch.equal(given["model"][key], saved["model"][key])}
    assert differ and all("running" in key or "num_batches" in key for key in differ)
    model = common.unpack_model(saved, "warmup.pt").eval()
    args = argparse.Namespace(**json.loads((folder / "args.json").read_text()))
    args.size = tuple(args.size)
    counts, means = torch.zeros(16), [[] for _ in range(16)]
    for item in common.target_dataset(args, "train"):
        with torch.no_grad(), common.autocast("cpu", args.precision):
            features, logits = model(item["image"][None])
        label = logits.argmax(1)[0]
        counts += torch.bincount(label.flatten(), minlength=16)
        for k in label.unique().tolist():
            means[k].append(features[0].float()[:, label == k].mean(1))
    # In bf16 a batch of another size may flip a pixel.
    torch.testing.assert_close(saved["marginal"], counts / counts.sum(), atol=0.01, rtol=0)
    assert saved["marginal"].sum().item() == pytest.approx(1)
    biggest = counts.argmax().item()
    expected = F.normalize(torch.stack(means[biggest]).mean(0), dim=0)
    assert (saved["prototypes"][biggest] @ expected).item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(saved["prototypes"].norm(dim=1), torch.ones(16))


def test_state_after_self_training(whole):  # P10, P11
    _, folder = whole
    saved, start = load(folder / "stage1.pt"), load(folder / "warmup.pt")
    memory = saved["bank"]["memory"]
    assert memory.shape == (128, 512)
    torch.testing.assert_close(memory.norm(dim=1), torch.ones(128))
    assert saved["logit_bank"]["memory"].shape == (0, 16)
    head, average, first = saved["head"]["prototypes"], saved["teacher_head"]["prototypes"], start["prototypes"]
    assert not torch.equal(head, first)
    assert 0 < (average - first).norm() < 0.1 * (head - first).norm()  # four steps at 0.99
    student, teacher = saved["model"]["classifier.0.weight"], saved["teacher"]["classifier.0.weight"]
    begun = start["model"]["classifier.0.weight"]
    assert 0 < (teacher - begun).norm() < 0.1 * (student - begun).norm()


@pytest.fixture
def here(monkeypatch):
    """Runs the script in this process, so that the test can watch it."""
    handler, state = signal.getsignal(signal.SIGINT), torch.get_rng_state()

    def script(*arguments):
        monkeypatch.setattr(sys, "argv", ["cpsl.py", *map(str, arguments)])
        cpsl.main()

    yield script
    signal.signal(signal.SIGINT, handler)
    torch.set_rng_state(state)


def test_the_loop_routes_gradients_and_solves_before_it_pushes(tmp_path, start, monkeypatch, here):  # P6, P10
    """Problem sizes, order of bank and solver, who has gradients."""
    events, models = [], []
    solve, push = cpsl.sinkhorn, MemoryBank.push

    def update(average, model, momentum):
        models.append((average, model))
        update_average(average, model, momentum)

    marginals, labellers, labels = [], [], []
    true_prepare, true_rectify, true_loss = cpsl.prepare, cpsl.rectify, cpsl.symmetric_cross_entropy
    monkeypatch.setattr(cpsl, "prepare", lambda *a: labellers.append(true_prepare(*a)) or labellers[-1])
    monkeypatch.setattr(cpsl, "rectify", lambda p, c, t: labels.append((p, c, true_rectify(p, c, t))) or labels[-1][2])
    monkeypatch.setattr(cpsl, "symmetric_cross_entropy", lambda logits, y, *rest: labels.append(y) or true_loss(logits, y, *rest))
    monkeypatch.setattr(cpsl, "sinkhorn", lambda scores, *rest: (events.append(scores.shape[1]), marginals.append(rest[0]),
                                                                 solve(scores, *rest))[2])
    monkeypatch.setattr(MemoryBank, "push", lambda bank, items: events.append("push") or push(bank, items))
    monkeypatch.setattr(cpsl, "update_average", update)
    here(*FEW, "--init", start, "--out", tmp_path / "run", "--precision", "fp32", "--scale-jitter", 0.5, 1.0)
    warm, marginal, _ = labellers[0]
    assert not warm.training and same(dict(warm.state_dict()), load(tmp_path / "run/warmup.pt")["model"])  # it stayed as it was
    assert all(torch.equal(used, load(tmp_path / "run/warmup.pt")["marginal"]) for used in marginals)
    padded = False
    for (_, _, rectified), y in zip(labels[::2], labels[1::2]):
        assert torch.equal(y[y != 255], rectified[y != 255])
        padded = padded or (y == 255).any()
    assert padded  # scales below 1 bring padding, which has no label
    marginals.clear()
    here(*FEW, "--init", start, "--out", tmp_path / "uniform", "--marginal", "uniform", "--iterations", 1)
    assert all(torch.equal(used, torch.full((16,), 1 / 16)) for used in marginals) and len(marginals) == 1
    del events[-2:], models[-2:]
    assert events == [32, "push", 32, "push", 128 + 32, "push", 128 + 32, "push"]
    assert len(models) == 2 * 4
    for average, model in models:
        assert all(p.grad is None for p in average.parameters())
        assert any(p.grad is not None for p in model.parameters())
        assert not {id(p) for p in average.parameters()} & {id(p) for p in model.parameters()}
    networks = [average for average, _ in models if not isinstance(average, SelfLabelingHead)]
    assert len(networks) == 4 and all(m.training for m in networks[0].modules() if isinstance(m, nn.BatchNorm2d))  # live


def test_self_labelling_moves_the_prototypes_and_not_the_network(tmp_path, start, here):  # P6
    few = [*FEW, "--iterations", 1, "--optimizer", "sgd", "--lr", 1, "--ramp", 1, "--no-consistency", "--init", start]
    for weight in (0, 1):
        here(*few, "--lambda-sl", weight, "--out", tmp_path / f"sl{weight}")
    assert same_weights(tmp_path / "sl0/last.pt", tmp_path / "sl1/last.pt")
    first = load(tmp_path / "sl0/warmup.pt")["prototypes"]
    torch.testing.assert_close(load(tmp_path / "sl0/last.pt")["head"]["prototypes"], first, atol=1e-7, rtol=0)
    assert (load(tmp_path / "sl1/last.pt")["head"]["prototypes"] - first).abs().max() > 1e-3


def test_init_is_the_same_as_training_the_source_model_here(tmp_path, start, whole):
    _, folder = whole
    run(tmp_path, "cpsl.py", *FEW, "--init", start, "--out", "given")
    assert same_weights(start, folder / "source_only.pt") and same_weights(start, tmp_path / "given/source_only.pt")
    assert same_weights(tmp_path / "given/last.pt", folder / "stage1.pt")


def test_killed_at_every_stage_and_resumed_the_run_ends_the_same(tmp_path, whole):
    """Killed in each stage in turn, once by Ctrl-C; every checkpoint equals the uninterrupted run's in all it holds."""
    arguments = ["cpsl.py", *FEW, "--distill", 2, "--save-every", 1, "--out", "cut"]
    for stage, lines in (("source", 1), ("warm-up", 1), ("adapt", 3), ("stage 2", 1), ("stage 3", 2)):
        how = signal.SIGINT if stage == "warm-up" else signal.SIGKILL
        resume = [] if stage == "source" else ["--resume"]
        code, errors = kill_when(tmp_path, lambda: logged(tmp_path / "cut", stage, lines), *arguments, *resume, with_signal=how)
        assert code == (-signal.SIGKILL if how == signal.SIGKILL else 1) and "Traceback" not in errors
        assert how == signal.SIGKILL or "--resume" in errors
    run(tmp_path, *arguments, "--resume")
    for name in ("source_only.pt", "warmup.pt", "stage1.pt", "stage2.pt", "last.pt"):
        assert same(load(tmp_path / "cut" / name), load(whole[1] / name)), name
    assert result(tmp_path / "cut")["columns"] == result(whole[1])["columns"]


@pytest.mark.parametrize("flags, terms", [
    (["--no-rectify", "--precision", "bf16"], {"ce_s", "sce_t"}),
    (["--marginal", "uniform", "--no-consistency", "--output-term", "--cutmix"], {"ce_s", "sce_t", "sl", "sl_out", "changed"}),
    (["--bank", 0, "--freeze-bn", "--sinkhorn-iterations", 1, "--pixels", 5, "--precision", "fp32"],
     {"ce_s", "sce_t", "sl", "cons", "changed"}),
])
def test_every_alternative_runs(tmp_path, start, flags, terms):
    run(tmp_path, "cpsl.py", *FEW, "--iterations", 3, "--init", start, *flags, "--out", "run")
    last = lines_of(tmp_path / "run", "adapt")[-1]
    assert set(last) - {"stage", "step", "seconds", "lr", "loss"} == terms
    parts = [last["ce_s"], last["sce_t"], 0.1 * last.get("sl", 0), 0.1 * last.get("sl_out", 0), 5 * last.get("cons", 0)]
    assert last["loss"] == pytest.approx(sum(parts), rel=1e-5)  # CPSL-11
    if "--freeze-bn" in flags:
        before, after = (load(tmp_path / "run" / name)["model"] for name in ("source_only.pt", "last.pt"))
        assert all(torch.equal(before[key], after[key]) for key in before if "running" in key)


def test_real_formats_from_start_to_end(tmp_path):
    write_synthia(tmp_path)
    write_gta5(tmp_path)
    write_cityscapes(tmp_path)
    for path in (tmp_path / "cityscapes/gtFine/train").rglob("*.png"):
        path.write_bytes(b"closed")  # an adaptation that opened a target training label would stop here
    for source, classes, flags in (("synthia", 16, ["--distill", 1]), ("gta5", 19, ["--cutmix"])):
        run(tmp_path, "cpsl.py", "--source", source, "--data-root", tmp_path, "--backbone", "resnet18",
            "--backbone-weights", "none", "--workers", 1, *FEW, *flags)
        scores = result(tmp_path / f"runs/cpsl-{source}-s0")
        assert len(scores["iou"]) == classes
        assert ("miou13" in scores) == (source == "synthia")


def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path, start):
    message = run(tmp_path, "cpsl.py", *FEW, "--backbone", "resnet50", "--init", start, ok=False)
    assert "resnet18" in message and "resnet50" in message


def test_the_authors_head():
    model = cpsl.ProDANetwork(5, "resnet18")
    features, logits = model(torch.randn(2, 3, 32, 64))
    assert features.shape == (2, 256, 4, 8) and logits.shape == (2, 5, 4, 8) and model.feature_dim == 256
    assert (features < 0).float().mean() > 0.3  # signed
    torch.testing.assert_close(features.view(2, 32, -1).mean(2), torch.zeros(2, 32), atol=1e-4, rtol=0)  # GroupNorm comes last
    torch.testing.assert_close(logits, F.conv2d(features, model.classifier["classify"].weight))
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.classifier.parameters())
    assert [branch[0].dilation[0] for branch in model.classifier["branches"]] == [1, 6, 12, 18, 24]
    common.freeze_batch_norm(model.train())
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_the_authors_head_from_start_to_end(tmp_path, start, here):
    message = run(tmp_path, "cpsl.py", *FEW, "--head", "proda", "--init", start, ok=False)
    assert "--init" in message and "--head proda" in message
    here(*FEW, "--head", "proda", "--distill", 1, "--out", tmp_path / "run")
    assert list(result(tmp_path / "run")["columns"]) == ["source only", "+ BN target", "CPSL"]
    assert load(tmp_path / "run/stage1.pt")["bank"]["memory"].shape == (128, 256)
    assert load(tmp_path / "run/warmup.pt")["prototypes"].shape == (16, 256)
    message = run(tmp_path, "evaluate.py", tmp_path / "run/last.pt", "--device", "cpu", ok=False)
    assert "last.pt" in message and "--head proda" in message


def test_two_processes_share_one_run(tmp_path, start):
    """The marginal is of all images, the bank holds all pixels, both processes draw what one would draw."""
    arguments = [*FEW, *SPLITTABLE, "--init", start, "--distill", 1, "--bank", 256, "--lr", 0.02, "--ramp", 0]
    run(tmp_path, "cpsl.py", *arguments, "--out", "one")
    run_as_two(tmp_path, "cpsl.py", *arguments, "--out", "two")
    one, two = tmp_path / "one", tmp_path / "two"
    assert trained_alike(start, one / "stage1.pt", two / "stage1.pt")
    a, b = load(one / "warmup.pt"), load(two / "warmup.pt")
    torch.testing.assert_close(a["marginal"], b["marginal"], atol=2e-3, rtol=0)
    torch.testing.assert_close(a["prototypes"], b["prototypes"], atol=0.02, rtol=0)
    a, b = load(one / "stage1.pt"), load(two / "stage1.pt")
    assert b["bank"]["memory"].shape == (256, 512)  # 4 steps of 2 images of 32 pixels
    for part in ("bank", "head", "teacher_head"):
        torch.testing.assert_close(a[part], b[part], atol=2e-3, rtol=1e-2)
    assert len(list((two / "pseudo_labels/stage2").iterdir())) == 24
