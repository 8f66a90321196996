"""What is hot, measured: each function against its textbook form, and each step of a method against plain self-training.

    python tests/benchmark.py [--device cpu|cuda]

Not a test: pytest does not collect this file, and no figure here is asserted anywhere. Every number is the median of
several runs after a warm-up; memory is the peak that the call adds (on CUDA as the allocator tells it; on the CPU it is
not measured).
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import drsl
import scale_invariant as lse


def measure(function, device, runs=7):
    """Median milliseconds and peak additional GiB (None on the CPU) of one call."""
    function()
    times, peak = [], None
    for _ in range(runs):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times), peak


def report(title, ours, textbook, device, runs=7):
    (a, peak_a), (b, peak_b) = measure(ours, device), measure(textbook, device, runs)
    memory = "" if peak_a is None else f"   memory {peak_a:.3f} / {peak_b:.3f} GiB"
    print(f"{title:52} {a:9.2f} ms   textbook {b:9.2f} ms   {b / a:6.1f} x faster{memory}", flush=True)


def squared_distances_textbook(e, R):
    """Every difference written out: an (n, C, K, E) tensor."""
    return (e[:, None, None] - R[None]).square().sum(3)


def alignment_textbook(e_s, y_s, m_s, e_t, y_t, m_t, pairs=64):
    """DRSL-9A as one would first write it: a loop over the shared modes."""
    terms = []
    for c, k in {*zip(y_s.tolist(), m_s.tolist())} & {*zip(y_t.tolist(), m_t.tolist())}:
        a = ((y_s == c) & (m_s == k)).nonzero()[:, 0]
        b = ((y_t == c) & (m_t == k)).nonzero()[:, 0]
        a = a[torch.randint(len(a), (pairs,), device=a.device)]
        b = b[torch.randint(len(b), (pairs,), device=b.device)]
        terms.append((e_s[a] - e_t[b]).square().sum(1).mean())
    return torch.stack(terms).mean()


def thresholds_textbook(confidence, label, num_classes, portion):
    """DRSL-14 by full sorts in the order of the description."""
    tau = torch.ones(num_classes, device=confidence.device)
    for c in range(num_classes):
        values = confidence[label == c].sort(descending=True).values
        if int(portion * len(values)):
            tau[c] = values[int(portion * len(values)) - 1]
    return tau


def confusion_textbook(pred, label, classes):
    """A loop over the pairs of classes."""
    return torch.tensor([[((label == i) & (pred == j)).sum() for j in range(classes)] for i in range(classes)])


def equations(device):
    """The sizes of the real task: 65 x 129 grid positions, 19 classes, 3 modes, 256 dimensions."""
    C, K, E, n = 19, 3, 256, 65 * 129
    head = drsl.ModeHead(2048, C, K, E).to(device)
    e = F.normalize(torch.randn(n, E, device=device), dim=1).requires_grad_()
    e_t = F.normalize(torch.randn(n, E, device=device), dim=1).requires_grad_()
    y, y_t = torch.randint(C, (n,), device=device), torch.randint(C, (n,), device=device)
    m, m_t = torch.randint(K, (n,), device=device), torch.randint(K, (n,), device=device)
    R = F.normalize(head.representatives, dim=2)
    report("DRSL distances, forward and backward", lambda: head.squared_distances(e).sum().backward(),
           lambda: squared_distances_textbook(e, R.detach().requires_grad_()).sum().backward(), device)
    report("DRSL-9A alignment, forward and backward", lambda: drsl.stochastic_mode_alignment(e, y, m, e_t, y_t, m_t).backward(),
           lambda: alignment_textbook(e, y, m, e_t, y_t, m_t).backward(), device)
    confidence, label = torch.rand(2_000_000, device=device), torch.randint(C, (2_000_000,), device=device)
    report("DRSL-14 thresholds of 2 million pixels", lambda: drsl.class_thresholds(confidence, label, C, 0.3),
           lambda: thresholds_textbook(confidence, label, C, 0.3), device)
    pred, label = torch.randint(C, (1024, 2048), device=device), torch.randint(C, (1024, 2048), device=device)
    metric = common.MeanIoU(C)
    report("confusion matrix at 1024x2048", lambda: metric.update(pred, label), lambda: confusion_textbook(pred, label, C), device)


def steps(device, precision, backbone, size, batch):
    """One training step with all of DRSL's losses against the same step with cross-entropies only."""
    C = 19
    model = common.DeepLabV2(C, backbone).to(device, memory_format=torch.channels_last)
    common.freeze_batch_norm(model.train())
    head = drsl.ModeHead(model.feature_dim, C).to(device)
    args = argparse.Namespace(optimizer="sgd", head_lr=10.0, alpha=0.5, sigma=0.3, posterior="soft")
    optimizer = drsl.make_optimizer_with_modes(model, head, args)
    drsl.set_lr(optimizer, 1e-6)
    x = torch.randn(2 * batch, 3, *size, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(C, (2 * batch, size[0] // 16, size[1] // 16), device=device).repeat_interleave(16, 1).repeat_interleave(16, 2)

    def step(regularized):
        with common.autocast(device, precision):
            features, logits = model(x)
        loss = drsl.segmentation_loss(logits[:batch], y[:batch]) + drsl.segmentation_loss(logits[batch:], y[batch:])
        if regularized:
            sides = []
            for maps, label in ((features[:batch], y[:batch]), (features[batch:], y[batch:])):
                with common.autocast(device, precision):
                    e = head(maps)
                e, label = drsl.balanced_pixels(e, label, 256)
                d2 = head.squared_distances(e)
                loss = loss + 0.1 * drsl.mode_loss(d2, label, args)
                sides += [e, label, drsl.assign_modes(d2, label)]
            loss = loss + 0.1 * drsl.stochastic_mode_alignment(*sides)
        drsl.descend(loss, optimizer, model, head)

    plain, plain_peak = measure(lambda: step(False), device)
    full, full_peak = measure(lambda: step(True), device)
    memory = "" if plain_peak is None else f"   memory {full_peak:.2f} / {plain_peak:.2f} GiB"
    print(f"step {backbone} {size[0]}x{size[1]} {batch}+{batch} {precision}: self-training {plain:.0f} ms, DRSL {full:.0f} ms, "
          f"ratio {full / plain:.2f}{memory}", flush=True)


def filter_textbook(normalised, prob, thresholds):
    """LSE-10 pixel by pixel, each deciding for itself which class it belongs to: the form of the authors' loop. numpy arrays."""
    keep = np.zeros(normalised.shape, bool)
    for y in range(keep.shape[0]):
        for x in range(keep.shape[1]):
            keep[y][x] = normalised[y][x] < thresholds[np.argmax(prob[y][x])]
    return keep


def ranking_textbook(prob):
    """LSE-5, -7 and -11 of one image pixel by pixel, prob (H, W, C) as a list: s and u, None for an absent class."""
    pixels = [[] for _ in prob[0][0]]
    for row in prob:
        for p in row:
            best = max(p)
            pixels[p.index(best)].append((best, -sum(v * math.log(v + 1e-12) for v in p)))
    s, u = [], []
    for mine in pixels:
        entropies = [e for _, e in mine]
        low, span = (min(entropies), max(entropies) - min(entropies) or 1) if mine else (0, 1)
        s.append(sum(q for q, _ in mine) / len(mine) if mine else None)
        u.append(sum((e - low) / span for e in entropies) / len(mine) if mine else None)
    return s, u


def lse_equations(device):
    """One target image of the real task: 512x1024, 19 classes."""
    C, H, W = 19, 512, 1024
    logits = 3 * torch.randn(1, C, H // 8, W // 8, device=device).to(memory_format=torch.channels_last)  # as networks give them
    prob = common.upsample(logits, (H, W)).softmax(1)[0]
    label, thresholds = prob.argmax(0), torch.rand(C, device=device)
    normalised = lse.normalised_entropy(lse.pixel_entropy(prob), label)
    arrays = normalised.cpu().numpy(), prob.permute(1, 2, 0).contiguous().cpu().numpy(), thresholds.cpu().numpy()
    report("LSE-10 filter of an image, predicted classes given", lambda: lse.keep_confident(normalised, label, thresholds),
           lambda: filter_textbook(*arrays), device, runs=3)
    report("LSE-10 filter of an image from its probabilities", lambda: lse.keep_confident(normalised, prob.max(0).indices, thresholds),
           lambda: filter_textbook(*arrays), device, runs=3)
    report("LSE-5, -7, -11 ranking statistics of an image", lambda: (lse.image_confidence(prob), lse.image_uncertainty(prob)),
           lambda: ranking_textbook(arrays[1].tolist()), device, runs=3)


def lse_steps(device, precision, backbone, size, batch):
    """One training step of LSE, focal loss included, against the same step with cross-entropies only."""
    C = 19
    model = common.build_network(C, backbone).to(device, memory_format=torch.channels_last).train()
    common.freeze_batch_norm(model)
    optimizer = lse.make_optimizer(model, argparse.Namespace(optimizer="sgd", head_lr=10.0))
    lse.set_lr(optimizer, 1e-6)
    x = torch.randn(2, batch, 3, *size, device=device)
    y = torch.randint(C, (2, batch, size[0] // 16, size[1] // 16), device=device).repeat_interleave(16, 2).repeat_interleave(16, 3)

    def step(focal):
        with common.autocast(device, precision):
            logits_s, logits_t = (model(images.to(memory_format=torch.channels_last))[1] for images in x)
        loss = lse.segmentation_loss(logits_s, y[0]) + lse.segmentation_loss(logits_t, y[1])
        if focal:
            loss = loss + 0.1 * lse.focal_loss(logits_t, y[1], 3.0)
        lse.descend(loss, optimizer, model)

    (plain, plain_peak), (full, full_peak) = (measure(lambda: step(focal), device) for focal in (False, True))
    memory = "" if plain_peak is None else f"   memory {full_peak:.2f} / {plain_peak:.2f} GiB"
    print(f"step {backbone} {size[0]}x{size[1]} {batch}+{batch} {precision}: self-training {plain:.0f} ms, LSE {full:.0f} ms, "
          f"ratio {full / plain:.2f}{memory}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="where")
    args = parser.parse_args()
    print(common.versions())
    equations(args.device)
    lse_equations(args.device)
    for precision in ("fp32", "bf16"):
        steps(args.device, precision, "resnet18", (80, 160), 4)
        lse_steps(args.device, precision, "resnet18", (80, 160), 4)
        if args.device == "cuda":
            steps(args.device, precision, "resnet101", (512, 1024), 2)
            lse_steps(args.device, precision, "resnet101", (512, 1024), 2)
            lse_steps(args.device, precision, "vgg16-fcn8s", (512, 1024), 1)


if __name__ == "__main__":
    main()
