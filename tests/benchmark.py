"""What is hot, measured: each function against its textbook form, each step of a method against plain self-training.

    python tests/benchmark.py [--device cpu|cuda]
    python tests/benchmark.py --plan [SCRIPT ...] [FLAGS OF THE SCRIPTS]      # what a run costs, computed, not measured
    python tests/benchmark.py --plan --measure                                # and, on a GPU, a step of each beside it

Not a test: pytest does not collect this file, and no time here is asserted anywhere. Every time is the median of
several runs after a warm-up, and the steps take turns. Memory is the peak that the call adds, on CUDA as the allocator
tells it. On the CPU it is measured for SDCA's statistics alone, in processes of their own, which time two calls and
report the faster; their textbook form needs 6.3 GiB.
"""

import argparse
import contextlib
import copy
import gc
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
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import cpsl
import drsl
import scale_invariant as lse
import sdca
import source_only


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
    report("CPSL-4 symmetric CE at 512x1024, forward and backward",
           lambda: cpsl.symmetric_cross_entropy(logits, label).backward(),
           lambda: symmetric_cross_entropy_textbook(logits, label).backward(), device)
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
    report("DRSL-9A alignment, forward and backward",
           lambda: drsl.stochastic_mode_alignment(e, y, m, e_t, y_t, m_t, shape=(C, K)).backward(),
           lambda: alignment_textbook(e, y, m, e_t, y_t, m_t).backward(), device)
    confidence, label = torch.rand(2_000_000, device=device), torch.randint(C, (2_000_000,), device=device)
    report("DRSL-14 thresholds of 2 million pixels", lambda: drsl.class_thresholds(confidence, label, C, 0.3),
           lambda: thresholds_textbook(confidence, label, C, 0.3), device)
    pred, label = torch.randint(C, (1024, 2048), device=device), torch.randint(C, (1024, 2048), device=device)
    metric = common.MeanIoU(C)
    report("confusion matrix at 1024x2048", lambda: metric.update(pred, label),
           lambda: confusion_textbook(pred, label, C), device)


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
    return lambda: sdca.ClassStatistics(C, features.shape[1], device).update(features, labels)


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
    known = sdca.ClassStatistics(C, features.shape[1], device)
    known.update(features, labels)
    report("SDCA-5 bound, forward and backward",
           lambda: sdca.contrastive_bound(features, labels, known.mean, known.variance).backward(),
           lambda: bound_textbook(features, labels, known.mean, known.variance).backward(), device)
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
    report("LSE-10 filter of an image, predicted classes given",
           lambda: lse.keep_confident(normalised, label, thresholds), lambda: filter_textbook(*arrays), device, runs=3)
    report("LSE-10 filter of an image from its probabilities",
           lambda: lse.keep_confident(normalised, prob.max(0).indices, thresholds), lambda: filter_textbook(*arrays),
           device, runs=3)
    report("LSE-5, -7, -11 ranking statistics of an image",
           lambda: (lse.image_confidence(prob), lse.image_uncertainty(prob)),
           lambda: ranking_textbook(arrays[1].tolist()), device, runs=3)


# One step of each method on the same network and batch, against plain self-training: cross-entropy on both domains.


def settings(module, *flags):
    """The arguments of a script with these flags; without any, its own for the toy."""
    with mock.patch.object(sys, "argv", [module.__name__, *flags]):
        return module.parse_args()


class Step:
    """A training step that minimises losses()["loss"]. kept: what the method holds beside what it trains."""

    def __init__(self, optimizer, losses, kept=(), follow=lambda: None):
        self.optimizer, self.losses, self.kept, self.follow = optimizer, losses, kept, follow

    def __call__(self):
        self.optimizer.zero_grad()
        self.losses()["loss"].backward()
        self.optimizer.step()
        self.follow()


def lse_step(model, x_s, y_s, x_t, y_t, args):
    return Step(lse.make_optimizer(model, args), lambda: lse.step_losses(model, (x_s, y_s), (x_t, y_t), args))


def cpsl_step(model, x_s, y_s, x_t, y_t, args):
    """With a full bank, and with labels by the warm-up model and the momentum copy: two forward passes more."""
    K, device = model.classifier[0].out_channels, x_s.device
    head = cpsl.SelfLabelingHead(K, model.feature_dim).to(device)
    torch.nn.init.normal_(head.prototypes)
    frozen = copy.deepcopy(model).eval(), copy.deepcopy(model), copy.deepcopy(head).requires_grad_(False)
    bank = cpsl.MemoryBank(args.bank, model.feature_dim, device)
    bank.push(F.normalize(torch.randn(args.bank, model.feature_dim, device=device), dim=1))

    def follow():
        cpsl.update_average(frozen[1], model, args.ema)
        cpsl.update_average(frozen[2], head, args.ema)

    return Step(cpsl.make_optimizer_with_prototypes(model, head, args),
                lambda: cpsl.step_losses(model, head, frozen, head, bank, (x_s, y_s), x_t, args, 0),
                [*frozen, bank], follow)


def sdca_step(model, x_s, y_s, x_t, y_t, args):
    C = model.classifier[0].out_channels
    known = {level: sdca.ClassStatistics(C, D, x_s.device) for level, D in (("feat", model.feature_dim), ("out", C))}
    return Step(sdca.make_optimizer(model, args), lambda: sdca.step_losses(model, known, x_s, y_s, x_t, args))


def drsl_step(model, x_s, y_s, x_t, y_t, args):
    head = drsl.ModeHead(model.feature_dim, model.classifier[0].out_channels, args.modes, args.embedding).to(x_s.device)
    target = None if x_t is None else (x_t, y_t)
    return Step(drsl.make_optimizer_with_modes(model, head, args),
                lambda: drsl.step_losses(model, head, (x_s, y_s), target, args, None))


# title: script, step, flags. Of SDCA the dearest case: every target pixel is confident.
STEPS = {"plain self-training": (lse, lse_step, "--focal", "off"), "LSE": (lse, lse_step),
         "CPSL": (cpsl, cpsl_step, "--no-consistency"), "CPSL with consistency": (cpsl, cpsl_step, "--consistency"),
         "SDCA": (sdca, sdca_step, "--delta", "0"), "DRSL": (drsl, drsl_step)}


def steps(device, precision, backbone, size, batch, C=19, rounds=15):
    """Milliseconds of one step of plain self-training and of every method; batch norm is frozen.

    The methods' arguments are the toy's; at the size of the real tasks those of GTA5.
    """
    source = "gta5" if size[0] >= 512 else "toy"
    images = [torch.randn(batch, 3, *size, device=device).to(memory_format=torch.channels_last) for _ in range(2)]
    labels = [
        torch.randint(C, (batch, size[0] // 16, size[1] // 16), device=device)
        .repeat_interleave(16, 1)
        .repeat_interleave(16, 2)
        for _ in range(2)
    ]
    functions = []
    for module, form, *flags in STEPS.values():
        model = common.build_network(C, backbone).to(device, memory_format=torch.channels_last).train()
        common.freeze_batch_norm(model)
        args = settings(module, "--source", source, "--device", device, "--precision", precision, *flags)
        functions.append(form(model, images[0], labels[0], images[1], labels[1], args))
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


# What a run costs, computed on the device "meta": tensors there have shapes and no values, so it takes no GPU, no data.

PRESETS = {"full size": (), "the small preset": ("--preset", "small")}
SHARE = 0.35  # of the peaks below, for all of a training; a guess
# Published peaks of dense matrix products in TFLOP/s, for fp32 and bf16. For fp32 those of TF32, which torch's
# convolutions take unless forbidden: on the two GeForces as fast as fp32 itself, on the A100 8 times (19.5). For bf16
# those with sums in fp32.
GPUS = {"RTX 3060": (12.7, 25.5), "RTX 4090": (82.6, 165.2), "A100": (156, 312)}
SIZES = (8, 11, 16, 24, 40, 80)  # GiB of memory, which are sold as GB
# GiB for what is not counted: gradients of activations on their way (followed through a step on "meta": 0.1 to 0.5),
# CUDA itself, the convolutions' workspaces and gaps between tensors (a guess).
OVERHEAD = 1.5
TARGET_IMAGES = 2975  # Cityscapes train


class Bfloat16Convolutions(TorchFunctionMode):
    """What autocast does to DeepLabV2, as torch has none for "meta": a weight, too, is cast once in the context."""

    def __init__(self):
        super().__init__()
        self.done = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.conv2d:
            args = [self.cast(t) if torch.is_tensor(t) else t for t in args]
        return function(*args, **(kwargs or {}))

    def cast(self, t):
        if not isinstance(t, torch.nn.Parameter):
            return t.bfloat16()
        if t not in self.done:
            self.done[t] = t.bfloat16()
        return self.done[t]


@contextlib.contextmanager
def on_meta():
    """Lets steps run on the device "meta", for which torch has neither autocast nor random generators."""
    def autocast(args):
        return Bfloat16Convolutions() if args.precision == "bf16" else contextlib.nullcontext()

    with mock.patch.object(common, "autocast", autocast), mock.patch.object(common, "generator", lambda *_: None):
        yield


def storage_bytes(tensors):
    """Bytes that these tensors occupy; what several of them share counts once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def step_cost(step, model):
    """Runs a step's forward and backward pass; returns what it costs.

    flop; weights: of what is trained; copies: weights of the models kept beside it; in bytes, state: all weights,
    gradients, optimizer state and what else is kept; saved: by autograd for the backward pass, beside the state.
    """
    trained = [p for group in step.optimizer.param_groups for p in group["params"]]
    weights = list({id(p): p for p in (*model.parameters(), *trained)}.values())  # frozen batch norms too
    kept = [t for part in step.kept for t in part.state_dict().values()]
    resident, saved = [*weights, *model.buffers(), *kept], []
    with FlopCounterMode(display=False) as counter:
        # `saved` holds the tensors themselves: were one freed, another could take its place and not be counted.
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            losses = step.losses()
        losses["loss"].backward()
    step.optimizer.step()
    moments = [t for state in step.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return {
        "flop": counter.get_total_flops(),
        "weights": sum(p.numel() for p in weights),
        "copies": sum(p.numel() for part in step.kept if isinstance(part, torch.nn.Module) for p in part.parameters()),
        "saved": storage_bytes([*saved, *resident]) - storage_bytes(resident),
        "state": storage_bytes([*resident, *moments, *(p.grad for p in trained if p.grad is not None)]),
    }


def source_step(model, x_s, y_s, x_t, y_t, args):
    """The step of `train_source`, and of SDCA's training on pseudo-labels."""
    def losses():
        with common.autocast(args):
            _, logits = model(x_s)
        return {"loss": source_only.segmentation_loss(logits, y_s)}

    return Step(source_only.make_optimizer(model, args), losses)


def modes_step(model, x_s, y_s, x_t, y_t, args):
    """The step of DRSL's mode warm-up (its first part, in which the network stands still, takes less)."""
    return drsl_step(model, x_s, y_s, None, None, args)


def distill_step(model, x_s, y_s, x_t, y_t, args):
    teacher = copy.deepcopy(model)
    return Step(cpsl.make_optimizer(model, args),
                lambda: cpsl.distill_losses(model, teacher, (x_s, y_s), (x_t, y_t), args), [teacher])


def lse_steps(args):
    """Steps of LSE's rounds, at most: as if no image were selected for two classes."""
    if args.iterations:
        return args.iterations
    steps, C = 0, len(common.task_classes(args.source))
    for r in range(args.rounds):
        kept = lse.kept_images(TARGET_IMAGES, lse.round_portion(args.portion, args.portion_step, r))
        examples = min(C * kept, TARGET_IMAGES) * (args.patches + (args.view == "both"))
        steps += lse.round_steps(examples, args.epochs, args.batch_size)
    return steps


# script: module, its own step, all that its main() trains, stage after stage: (name, how many steps, which), and how
# many models it keeps that no step uses: the source-only model waits for the table at the end.
WARMUP = ("warm-up", lambda args: args.warmup_iterations, source_step)
PLANS = {
    "source_only": (source_only, source_step, [("training", lambda args: args.iterations, source_step)], 0),
    "scale_invariant": (lse, lse_step, [WARMUP, ("rounds up to", lse_steps, lse_step)], 1),
    "cpsl": (cpsl, cpsl_step, [WARMUP, ("self-training", lambda args: args.iterations, cpsl_step),
                               ("distillation", lambda args: args.distill * args.distill_iterations, distill_step)], 1),
    "sdca": (sdca, sdca_step, [WARMUP, ("adaptation", lambda args: args.iterations, sdca_step),
                               ("pseudo-labels", lambda args: args.ssl * args.ssl_iterations, source_step)], 0),
    "drsl": (drsl, drsl_step, [WARMUP, ("modes", lambda args: args.head_iterations + args.joint_iterations, modes_step),
                               ("rounds", lambda args: args.iterations, drsl_step)], 1),
}


def build_step(form, args, target_size, device):
    """A step of a script, with pictures at the sizes that its arguments say, and its network."""
    C, N = len(common.task_classes(args.source)), args.batch_size
    with torch.device(device):
        model = common.build_network(C, args.backbone).train().to(memory_format=torch.channels_last)
        batches = [t for size in (args.crop, target_size) for t in (
            torch.randn(N, 3, *size).to(memory_format=torch.channels_last), torch.randint(C, (N, *size)))]
    if args.batch_norm != "live":
        common.freeze_batch_norm(model)
    return form(model, *batches, args), model


def planned_cost(form, args, target_size, precision):
    """`step_cost` of a step with a script's arguments."""
    args = argparse.Namespace(**{**vars(args), "precision": precision})
    with on_meta():
        return step_cost(*build_step(form, args, target_size, "meta"))


def measured_cost(form, args, target_size, precision):
    """Milliseconds of such a step on this machine's GPU, and GiB that torch takes there (CUDA itself takes more)."""
    args = argparse.Namespace(**{**vars(args), "precision": precision, "device": "cuda"})
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step, _ = build_step(form, args, target_size, "cuda")
    milliseconds, _ = measure(step, "cuda", runs=5)
    return milliseconds, torch.cuda.max_memory_reserved() / 2**30


def hours(flop, peak):
    """Hours for so many operations at SHARE of a peak in TFLOP/s."""
    return flop / (SHARE * peak * 1e12) / 3600


def smallest_gpu(gib):
    """The least of SIZES that holds so much."""
    return next((str(size) for size in SIZES if size >= gib), f">{SIZES[-1]}")


def plan(script, flags, costs, on_gpu=False):
    """A script's row of the table, its schedule and the row of what was measured (all text) and its arguments.

    costs: of steps, known so far. on_gpu: run its step, or else that row is empty.
    """
    module, own, stages, idle = PLANS[script]
    args = settings(module, "--source", "gta5", "--device", "cpu", *flags)
    target_size = lse.view_size(args) if module is lse else args.crop
    stages = [(stage, steps(args), form) for stage, steps, form in stages if steps(args)]
    for form in {own, *(form for _, _, form in stages)} - costs.keys():
        costs[form] = planned_cost(form, args, target_size, "fp32")
    flop = sum(steps * costs[form]["flop"] for _, steps, form in stages)
    fp32, bf16 = costs[own], planned_cost(own, args, target_size, "bf16")
    waiting = idle * costs[source_step]["weights"]
    state = (fp32["state"] + 4 * waiting) / 2**30
    saved = [cost["saved"] / 2**30 for cost in (fp32, bf16)]
    peaks = [state + gib + OVERHEAD for gib in saved]
    cells = [f"{script:15}{fp32['flop'] / 1e12:7.2f}"]
    cells += [f"{number / 1e6:7.1f}" for number in (fp32["weights"], fp32["copies"] + waiting)]
    cells += [f"{gib:6.1f}" for gib in (state, *saved, *peaks)] + [f"{smallest_gpu(gib):>5}" for gib in peaks]
    times = [hours(flop, peak) for pair in GPUS.values() for peak in pair]
    cells += [f"{h:6.1f}" if h >= 1 else f"{h:6.2f}" for h in times]
    measured = ""
    if on_gpu:
        results = [measured_cost(own, args, target_size, precision) for precision in ("fp32", "bf16")]
        measured = f"{script:15}" + "".join(f"{value:9.1f}" for values in zip(*results) for value in values)
    return "".join(cells), ", ".join(f"{stage} {steps}" for stage, steps, _ in stages), measured, args


def print_plan(scripts, flags, on_gpu=False):
    """The table of what the scripts cost with each preset; flags: theirs, beside the preset's."""
    peaks = ", ".join(f"{name} {fp32:g} / {bf16:g}" for name, (fp32, bf16) in GPUS.items())
    print(f"""Computed, not measured, on a device without values:
TFLOP      of one step of the method, forward and backward (a multiply-add is two)
M weights  in millions: trained, and in copies that the method keeps
GiB        state: weights, copies, gradients, optimizer; saved: by autograd for the backward pass; peak: both and
           {OVERHEAD} GiB for CUDA and what passes by
fits       the least memory that holds the peak, of {', '.join(map(str, SIZES))} GB
hours      all steps of all stages (below) at {SHARE:.0%} of the GPU's peak; labelling, scoring, slow disks come on top;
           peaks in TFLOP/s: {peaks}""")
    for preset, own in PRESETS.items():
        costs, schedules, measured = {}, [], []
        for script in scripts or PLANS:
            row, schedule, on_this, args = plan(script, [*own, *flags], costs, on_gpu)
            if not schedules:
                size = "x".join(map(str, args.crop))
                print(f"\n{preset}: {args.source}, {args.backbone}, {size}, {args.batch_size} images of each domain")
                print(f"{'':15}{'TFLOP':>7}{'M weights':>14}{'state':>6}{'saved GiB':>12}{'peak GiB':>12}"
                      + f"{'fits GB':>10}" + "".join(f"{'h ' + name:>12}" for name in GPUS))
                print(f"{'':15}{'':7}{'train':>7}{'copy':>7}{'GiB':>6}" + f"{'fp32':>6}{'bf16':>6}" * 2
                      + f"{'fp32':>5}{'bf16':>5}" + f"{'fp32':>6}{'bf16':>6}" * len(GPUS))
            print(row, flush=True)
            schedules.append(f"{script}: {schedule}")
            measured.append(on_this)
        print("steps:", *schedules, sep="\n  ")
        if on_gpu:
            print(f"\nmeasured on this {torch.cuda.get_device_name()}: a step, and what torch takes of the memory")
            print(f"{'':15}{'ms fp32':>9}{'bf16':>9}{'GiB fp32':>9}{'bf16':>9}", *measured, sep="\n", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="where"
    )
    parser.add_argument(
        "--plan",
        nargs="*",
        choices=PLANS,
        metavar="SCRIPT",
        help=f"measure nothing, but compute on any machine what runs on real data cost, of all scripts or of some of "
             f"{', '.join(PLANS)}: TFLOP per step, weights, memory, the GPU on which it fits, hours; flags that follow "
             "go to the scripts, as in --plan cpsl --batch-size 1",
    )
    parser.add_argument("--measure", action="store_true", help="with --plan: also run steps on this machine's GPU")
    args, flags = parser.parse_known_args()
    if args.measure and (args.plan is None or not torch.cuda.is_available()):
        parser.error("--measure needs --plan and a GPU")
    torch.backends.cudnn.benchmark = True  # as in every script
    if args.plan is not None:
        return print_plan(args.plan, flags, args.measure)
    if flags:
        parser.error(f"unrecognized arguments without --plan: {' '.join(flags)}")
    print(common.versions(args.device))
    for equations in (drsl_equations, lse_equations, cpsl_equations, sdca_equations):
        equations(args.device)
    for precision in ("fp32", "bf16"):
        steps(args.device, precision, "resnet14", (64, 128), 4)
        if args.device == "cuda":
            steps(args.device, precision, "resnet101", (512, 1024), 2, rounds=5)


if __name__ == "__main__":
    main()
