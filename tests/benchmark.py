"""What is hot, measured: each function against its textbook form, and each step of a method against plain self-training.

    python tests/benchmark.py [--device cpu|cuda]

Not a test: pytest does not collect this file, and no figure here is asserted anywhere. Every number is the median of
several runs after a warm-up; memory is the peak that the call adds (on CUDA as the allocator tells it; on the CPU it is
not measured).
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import cpsl
import drsl


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


def report(title, ours, textbook, device):
    (a, peak_a), (b, peak_b) = measure(ours, device), measure(textbook, device)
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


def sinkhorn_textbook(problems, marginal, epsilon=0.05, iterations=3):
    """CPSL-6 by the letter, one problem (B, K) after the other: K x B matrices of exponentials."""
    results = []
    for scores in problems:
        Q = (scores / epsilon).exp().T
        Q = Q / Q.sum()
        for _ in range(iterations):
            Q = Q * (marginal / Q.sum(1))[:, None]
            Q = Q / Q.sum(0) / Q.shape[1]
        results.append((Q * Q.shape[1]).T)
    return torch.stack(results)


def symmetric_cross_entropy_textbook(logits, label, alpha=0.1, beta=1.0):
    """CPSL-2 to CPSL-4 with probabilities, one-hot labels and clamps."""
    p = logits.softmax(1)
    one_hot = F.one_hot(label, logits.shape[1]).permute(0, 3, 1, 2).float()
    reverse = -(p.clamp(1e-7, 1) * one_hot.clamp(1e-4, 1).log()).sum(1)
    return (alpha * -(one_hot * p.clamp(min=1e-7).log()).sum(1) + beta * reverse).mean()


def class_sums_textbook(features, label, num_classes):
    """A loop over images and classes."""
    sums = features.new_zeros(num_classes, features.shape[1])
    for maps, y in zip(features, label):
        for k in range(num_classes):
            if (y == k).any():
                sums[k] += maps[:, y == k].mean(1)
    return sums


def cpsl_equations(device):
    """The sizes of the real task: 2 images, 19 classes, a bank of 65536 and 256 pixels per image, 65 x 129 grid positions."""
    C = 19
    scores, marginal = torch.rand(2, 65536 + 256, C, device=device) * 2 - 1, torch.rand(C, device=device).softmax(0)
    report("CPSL-6 Sinkhorn, 2 images with a full bank", lambda: cpsl.sinkhorn(scores, marginal),
           lambda: sinkhorn_textbook(scores, marginal), device)
    logits = torch.randn(2, C, 512, 1024, device=device, requires_grad=True)
    label = torch.randint(C, (2, 512, 1024), device=device)
    report("CPSL-4 symmetric CE at 512x1024, forward and backward", lambda: cpsl.symmetric_cross_entropy(logits, label).backward(),
           lambda: symmetric_cross_entropy_textbook(logits, label).backward(), device)
    features, label = torch.randn(2, 2048, 65, 129, device=device), torch.randint(C, (2, 65, 129), device=device)
    report("CPSL class means of 2 feature maps", lambda: cpsl.class_sums(features, label, C),
           lambda: class_sums_textbook(features, label, C), device)


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


def cpsl_steps(device, precision, backbone, size, batch, bank, pixels):
    """CPSL's step against plain self-training on the same labels; then with the consistency term, which is one view more."""
    C = 19
    model = common.DeepLabV2(C, backbone).to(device, memory_format=torch.channels_last)
    common.freeze_batch_norm(model.train())
    warm, teacher = copy.deepcopy(model).eval(), copy.deepcopy(model)
    head = cpsl.SelfLabelingHead(torch.randn(C, model.feature_dim, device=device))
    teacher_head = copy.deepcopy(head).requires_grad_(False)
    memory, marginal = cpsl.MemoryBank(bank, model.feature_dim, device), torch.full((C,), 1 / C, device=device)
    memory.push(F.normalize(torch.randn(bank, model.feature_dim, device=device), dim=1))
    args = argparse.Namespace(optimizer="sgd", head_lr=10.0, head_scale=5.0, epsilon=0.05, sinkhorn_iterations=3)
    optimizer = cpsl.make_optimizer_with_prototypes(model, head, args)
    cpsl.set_lr(optimizer, 1e-6)
    x_s, x_t = (torch.randn(batch, 3, *size, device=device).to(memory_format=torch.channels_last) for _ in range(2))
    y_s = torch.randint(C, (batch, size[0] // 16, size[1] // 16), device=device).repeat_interleave(16, 1).repeat_interleave(16, 2)

    def step(rectified, consistent):
        with torch.no_grad():
            with common.autocast(device, precision):
                _, logits = warm(x_t)
                features, _ = teacher(x_t) if rectified else (None, None)
            p_st = common.upsample(logits.float(), size).softmax(1)
            if rectified:
                cosine = teacher_head(features)
                y_t = cpsl.rectify(p_st, common.upsample(cosine, size))
            else:
                y_t = p_st.argmax(1)
        with common.autocast(device, precision):
            (_, logits_s), (_, logits_t) = model(x_s), model(x_t)
        loss = cpsl.segmentation_loss(logits_s, y_s) + cpsl.symmetric_cross_entropy(logits_t, y_t)
        if rectified:
            valid = torch.ones(batch, *features.shape[2:], dtype=torch.bool, device=device)
            z = F.normalize(cpsl.take_pixels(features, cpsl.pick_pixels(valid, pixels)).float(), dim=2)
            c = F.normalize(head.prototypes.detach(), dim=1)
            q = cpsl.assign(z @ c.T, memory.usable() @ c.T, marginal, args)
            loss = loss + 0.1 * cpsl.self_labeling_loss(z, head.prototypes, q)
            memory.push(z.flatten(0, 1))
            if consistent:
                with common.autocast(device, precision):
                    strong, _ = model(cpsl.strong_view(x_t, 0))
                loss = loss + 5 * cpsl.kl_divergence(cosine / 0.08, teacher_head(strong) / 0.08, valid)
        cpsl.descend(loss, optimizer, model, head)
        if rectified:
            cpsl.update_average(teacher, model, 0.999)
            cpsl.update_average(teacher_head, head, 0.999)

    times = [measure(lambda: step(*form), device) for form in ((False, False), (True, False), (True, True))]
    (plain, plain_peak), (full, full_peak), (more, more_peak) = times
    memory_text = "" if plain_peak is None else f"   memory {full_peak:.2f}, {more_peak:.2f} / {plain_peak:.2f} GiB"
    print(f"step {backbone} {size[0]}x{size[1]} {batch}+{batch} {precision}: self-training {plain:.0f} ms, CPSL {full:.0f} ms, "
          f"ratio {full / plain:.2f}, with consistency {more:.0f} ms, ratio {more / plain:.2f}{memory_text}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="where")
    args = parser.parse_args()
    print(common.versions())
    equations(args.device)
    cpsl_equations(args.device)
    for precision in ("fp32", "bf16"):
        steps(args.device, precision, "resnet18", (80, 160), 4)
        cpsl_steps(args.device, precision, "resnet18", (80, 160), 4, bank=4096, pixels=64)
        if args.device == "cuda":
            steps(args.device, precision, "resnet101", (512, 1024), 2)
            cpsl_steps(args.device, precision, "resnet101", (512, 1024), 2, bank=65536, pixels=256)


if __name__ == "__main__":
    main()
