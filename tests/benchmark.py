"""What is hot, measured: each function against its textbook form, each step of a method against plain self-training.

    python tests/benchmark.py [--device cpu|cuda]

Not a test: pytest does not collect this file, and no figure here is asserted anywhere. Every number is the median of
several runs after a warm-up, and the steps take turns. Memory is the peak that the call adds (on CUDA as the allocator
tells it; on the CPU it is measured for SDCA's statistics alone, in processes of their own; their textbook form needs
6.3 GiB).
"""

import argparse
import copy
import math
import multiprocessing
import re
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import cpsl
import drsl
import scale_invariant as lse
import sdca


def measure_once(function, device):
    """Milliseconds and peak additional GiB (None on the CPU) of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    taken = 1000 * (time.perf_counter() - started)
    return taken, (torch.cuda.max_memory_allocated() - before) / 2**30 if device == "cuda" else None


def measure(function, device, runs=7):
    """Median milliseconds and peak additional GiB (None on the CPU) of one call, after a warm-up."""
    function()
    times, peaks = zip(*(measure_once(function, device) for _ in range(runs)))
    return statistics.median(times), peaks[-1]


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
    """The sizes of the real task: 2 images, 19 classes, a bank of 65536 and 256 pixels per image, a 65 x 129 grid."""
    C = 19
    scores, marginal = torch.rand(2, 65536 + 256, C, device=device) * 2 - 1, torch.rand(C, device=device).softmax(0)
    report("CPSL-6 Sinkhorn, 2 images with a full bank", lambda: cpsl.sinkhorn(scores, marginal),
           lambda: sinkhorn_textbook(scores, marginal), device)
    logits = torch.randn(2, C, 512, 1024, device=device, requires_grad=True)
    label = torch.randint(C, (2, 512, 1024), device=device)
    report(
        "CPSL-4 symmetric CE at 512x1024, forward and backward",
        lambda: cpsl.symmetric_cross_entropy(logits, label).backward(),
        lambda: symmetric_cross_entropy_textbook(logits, label).backward(),
        device,
    )
    features, label = torch.randn(2, 2048, 65, 129, device=device), torch.randint(C, (2, 65, 129), device=device)
    report("CPSL class means of 2 feature maps", lambda: cpsl.class_sums(features, label, C),
           lambda: class_sums_textbook(features, label, C), device)


def drsl_equations(device):
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
    report(
        "DRSL-9A alignment, forward and backward",
        lambda: drsl.stochastic_mode_alignment(e, y, m, e_t, y_t, m_t, shape=(C, K)).backward(),
        lambda: alignment_textbook(e, y, m, e_t, y_t, m_t).backward(),
        device,
    )
    confidence, label = torch.rand(2_000_000, device=device), torch.randint(C, (2_000_000,), device=device)
    report("DRSL-14 thresholds of 2 million pixels", lambda: drsl.class_thresholds(confidence, label, C, 0.3),
           lambda: thresholds_textbook(confidence, label, C, 0.3), device)
    pred, label = torch.randint(C, (1024, 2048), device=device), torch.randint(C, (1024, 2048), device=device)
    metric = common.MeanIoU(C)
    report(
        "confusion matrix at 1024x2048",
        lambda: metric.update(pred, label),
        lambda: confusion_textbook(pred, label, C),
        device,
    )


def class_statistics_textbook(features, labels, classes):
    """SDCA-10 for one batch as ISDA wrote it down: every pixel spread over all classes, (n, C, D) tensors."""
    member = F.one_hot(torch.where(labels == common.IGNORE, classes, labels), classes + 1)[:, :classes, None].to(
        features
    )  # (n, C, 1)
    count = member.sum(0).clamp(min=1)  # (C, 1)
    spread = features[:, None] * member  # (n, C, D)
    mean = spread.sum(0) / count  # (C, D)
    return mean, ((spread - mean) * member).square().sum(0) / count


def bound_textbook(features, labels, mean, variance, tau=100.0):
    """SDCA-5's right form: cross-entropy, and the variance of its own class gathered for every pixel."""
    keep = labels != common.IGNORE
    f, y = F.normalize(features[keep], dim=1), labels[keep]
    mu, sigma = F.normalize(mean.to(f), dim=1), F.normalize(variance.to(f), dim=1)
    z = (f @ mu.T + 0.5 * f.square() @ (sigma / tau).T) / tau
    return F.cross_entropy(z, y) + (0.5 * f.square() * sigma[y]).sum(1).mean() / tau**2


def lovasz_textbook(prob, label):
    """The loop over classes, with differences of Jaccard indices."""
    C = prob.shape[1]
    p, y = prob.permute(0, 2, 3, 1).reshape(-1, C), label.flatten()
    p, y = p[y != common.IGNORE], y[y != common.IGNORE]
    losses = []
    for c in y.unique():
        truth = (y == c).float()
        errors, order = (truth - p[:, c]).abs().sort(descending=True)
        truth = truth[order]
        jaccard = 1 - (truth.sum() - truth.cumsum(0)) / (truth.sum() + (1 - truth).cumsum(0))
        losses.append(errors @ torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]]))
    return torch.stack(losses).mean()


def medians_textbook(prob):
    """SDCA-14 by sorting every pixel's confidence."""
    confidence, label = prob.max(1)
    values = [confidence[label == c].sort().values for c in range(prob.shape[1])]
    return torch.stack([v[round(len(v) / 2)].clamp(max=0.9) if len(v) else v.new_zeros(()) for v in values])


def one_feature_map(device, n=90 * 160, D=2048, C=19):
    """Features and labels of one GTA5 image at stride 8, a twentieth of it void."""
    labels = torch.randint(C, (n,), device=device)
    labels[::20] = common.IGNORE
    return torch.randn(n, D, device=device), labels, C


def statistics_form(textbook, device="cpu"):
    """A function without arguments that computes the class statistics of one feature map."""
    features, labels, C = one_feature_map(device)
    if textbook:
        return lambda: class_statistics_textbook(features, labels, C)
    return lambda: sdca.ClassStatistics(C, features.shape[1]).update(features, labels)


def peak_resident():
    """Peak resident bytes of this process. On Linux not ru_maxrss, which begins with what the parent process held."""
    status = Path("/proc/self/status")
    return (
        1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1))
        if status.exists()
        else common.peak_memory()
    )


def measure_alone(textbook, queue):
    """For a process of its own: milliseconds (the faster of two calls) and peak GiB that the calls add."""
    function = statistics_form(textbook)
    if Path("/proc/self/clear_refs").exists():  # Linux: the peak starts anew from what is in use now
        Path("/proc/self/clear_refs").write_text("5")
    before, times = peak_resident(), []
    for _ in range(2):
        started = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - started))
    queue.put((min(times), (peak_resident() - before) / 2**30))


def sdca_equations(device):
    """One GTA5 feature map: 90 x 160 grid positions, 2,048 channels, 19 classes; Lovasz on one crop of 512x1024."""
    title = "SDCA-10 class statistics"
    if device == "cuda":
        report(title, statistics_form(False, device), statistics_form(True, device), device)
    else:  # the peak of a process's memory never falls: each form gets a process
        results, context = [], multiprocessing.get_context("spawn")
        for textbook in (False, True):
            queue = context.Queue()
            process = context.Process(target=measure_alone, args=(textbook, queue))
            process.start()
            results.append(queue.get())
            process.join()
        (a, peak_a), (b, peak_b) = results
        print(
            f"{title:52} {a:9.2f} ms   textbook {b:9.2f} ms  {b / a:6.1f} x faster  memory {peak_a:.3f} / {peak_b:.3f} "
            f"GiB ({peak_b / max(peak_a, 1e-3):.0f} x less)",
            flush=True,
        )
    features, labels, C = one_feature_map(device)
    features.requires_grad_()
    known = sdca.ClassStatistics(C, features.shape[1])
    known.update(features, labels)
    report(
        "SDCA-5 bound, forward and backward",
        lambda: sdca.contrastive_bound(features, labels, known.mean, known.variance).backward(),
        lambda: bound_textbook(features, labels, known.mean, known.variance).backward(),
        device,
    )
    prob = torch.randn(1, C, 512, 1024, device=device).softmax(1).requires_grad_()
    label = torch.randint(C, (1, 512, 1024), device=device)
    report("SDCA-1 Lovasz-softmax, forward and backward", lambda: sdca.lovasz_softmax(prob, label).backward(),
           lambda: lovasz_textbook(prob, label).backward(), device)
    report("SDCA-14 medians of half a million pixels", lambda: sdca.class_thresholds(sdca.confidence_histogram(prob)),
           lambda: medians_textbook(prob), device)


def filter_textbook(normalised, prob, thresholds):
    """LSE-10 pixel by pixel, each finding its class for itself: the form of the authors' loop. numpy arrays."""
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
    logits = 3 * torch.randn(1, C, H // 8, W // 8, device=device).to(
        memory_format=torch.channels_last
    )  # as networks give them
    prob = common.upsample(logits, (H, W)).softmax(1)[0]
    label, thresholds = prob.argmax(0), torch.rand(C, device=device)
    normalised = lse.normalised_entropy(lse.pixel_entropy(prob), label)
    arrays = normalised.cpu().numpy(), prob.permute(1, 2, 0).contiguous().cpu().numpy(), thresholds.cpu().numpy()
    report(
        "LSE-10 filter of an image, predicted classes given",
        lambda: lse.keep_confident(normalised, label, thresholds),
        lambda: filter_textbook(*arrays),
        device,
        runs=3,
    )
    report(
        "LSE-10 filter of an image from its probabilities",
        lambda: lse.keep_confident(normalised, prob.max(0).indices, thresholds),
        lambda: filter_textbook(*arrays),
        device,
        runs=3,
    )
    report(
        "LSE-5, -7, -11 ranking statistics of an image",
        lambda: (lse.image_confidence(prob), lse.image_uncertainty(prob)),
        lambda: ranking_textbook(arrays[1].tolist()),
        device,
        runs=3,
    )


# One step of each method on the same network and batch, against plain self-training: cross-entropy on both domains.


def settings(module, *flags):
    """The arguments of a method on the toy."""
    with mock.patch.object(sys, "argv", [module.__name__, *flags]):
        return module.parse_args()


def step_of(optimizer, losses):
    """A training step that minimises losses()["loss"]."""
    def step():
        optimizer.zero_grad()
        losses()["loss"].backward()
        optimizer.step()

    return step


def plain_step(model, x_s, y_s, x_t, y_t, precision):
    args = settings(lse, "--precision", precision, "--focal", "off")
    return step_of(lse.make_optimizer(model, args), lambda: lse.step_losses(model, (x_s, y_s), (x_t, y_t), args))


def lse_step(model, x_s, y_s, x_t, y_t, precision):
    args = settings(lse, "--precision", precision)
    return step_of(lse.make_optimizer(model, args), lambda: lse.step_losses(model, (x_s, y_s), (x_t, y_t), args))


def cpsl_step(model, x_s, y_s, x_t, y_t, precision, *flags):
    """With a full bank, and with labels by the warm-up model and the momentum copy: two forward passes more."""
    args, K, device = settings(cpsl, "--precision", precision, *flags), model.classifier[0].out_channels, x_s.device
    if x_s.shape[2] >= 512:
        args.bank, args.pixels = 65536, 256
    head = cpsl.SelfLabelingHead(K, model.feature_dim).to(device)
    torch.nn.init.normal_(head.prototypes)
    frozen = copy.deepcopy(model).eval(), copy.deepcopy(model), copy.deepcopy(head).requires_grad_(False)
    bank = cpsl.MemoryBank(args.bank, model.feature_dim, device)
    bank.push(F.normalize(torch.randn(args.bank, model.feature_dim, device=device), dim=1))
    step = step_of(cpsl.make_optimizer_with_prototypes(model, head, args),
                   lambda: cpsl.step_losses(model, head, frozen, head, bank, (x_s, y_s), x_t, args, 0))

    def step_and_follow():
        step()
        cpsl.update_average(frozen[1], model, args.ema)
        cpsl.update_average(frozen[2], head, args.ema)

    return step_and_follow


def sdca_step(model, x_s, y_s, x_t, y_t, precision):
    """In the dearest case: every target pixel is confident."""
    args, C = settings(sdca, "--precision", precision, "--delta", "0"), model.classifier[0].out_channels
    known = {level: sdca.ClassStatistics(C, D, x_s.device) for level, D in (("feat", model.feature_dim), ("out", C))}
    return step_of(sdca.make_optimizer(model, args), lambda: sdca.step_losses(model, known, x_s, y_s, x_t, args))


def drsl_step(model, x_s, y_s, x_t, y_t, precision):
    args = settings(drsl, "--precision", precision)
    head = drsl.ModeHead(model.feature_dim, model.classifier[0].out_channels, args.modes, args.embedding).to(x_s.device)
    return step_of(drsl.make_optimizer_with_modes(model, head, args),
                   lambda: drsl.step_losses(model, head, (x_s, y_s), (x_t, y_t), args, None))


STEPS = {
    "plain self-training": plain_step,
    "LSE": lse_step,
    "CPSL": cpsl_step,
    "CPSL with consistency": lambda *given: cpsl_step(*given, "--consistency"),
    "SDCA": sdca_step,
    "DRSL": drsl_step,
}


def steps(device, precision, backbone, size, batch, C=19, rounds=15):
    """Milliseconds of one step of plain self-training and of every method; batch norm is frozen."""
    images = [torch.randn(batch, 3, *size, device=device).to(memory_format=torch.channels_last) for _ in range(2)]
    labels = [
        torch.randint(C, (batch, size[0] // 16, size[1] // 16), device=device)
        .repeat_interleave(16, 1)
        .repeat_interleave(16, 2)
        for _ in range(2)
    ]
    functions = []
    for form in STEPS.values():
        model = common.build_network(C, backbone).to(device, memory_format=torch.channels_last).train()
        common.freeze_batch_norm(model)
        functions.append(form(model, images[0], labels[0], images[1], labels[1], precision))
    for function in functions:
        function()
    # They take turns, so that whatever else disturbs the machine disturbs all of them.
    times = [[measure_once(function, device) for function in functions] for _ in range(rounds)]
    for title, results in zip(STEPS, zip(*times)):
        taken = statistics.median(ms for ms, _ in results)
        ratio = statistics.median(ms / first[0][0] for (ms, _), first in zip(results, times))
        memory = "" if results[0][1] is None else f"   {results[-1][1]:.2f} GiB"
        print(f"step {backbone} {size[0]}x{size[1]} {batch}+{batch} {precision}  {title:24} {taken:8.1f} ms   "
              f"{ratio:.2f} x plain{memory}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="where"
    )
    args = parser.parse_args()
    print(common.versions())
    for equations in (drsl_equations, lse_equations, cpsl_equations, sdca_equations):
        equations(args.device)
    for precision in ("fp32", "bf16"):
        steps(args.device, precision, "resnet14", (64, 128), 4)
        if args.device == "cuda":
            steps(args.device, precision, "resnet101", (512, 1024), 2)


if __name__ == "__main__":
    main()
