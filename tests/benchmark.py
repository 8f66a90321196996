"""What things cost, measured: hot functions, a step of every method, the pictures; and what real runs cost, computed.

    python tests/benchmark.py [--device cpu|cuda]         hot functions against their textbook form, steps against plain
    python tests/benchmark.py --data [ROOT]               processor time of every picture: of the toy, or of files
    python tests/benchmark.py --plan [SCRIPT ...] [FLAGS OF THE SCRIPTS]      what a run costs, without running it
    python tests/benchmark.py --plan --measure            and steps, labelling and evaluation on this machine beside it
    python tests/benchmark.py --gpu ROOT [FLAGS]          all that a GPU should be asked, in a quarter of an hour

Not a test: pytest does not collect this file, and no time here is asserted anywhere. Every time is the median of
several runs after a warm-up, and the steps take turns. Memory is the peak that the call adds, as the allocator on CUDA
tells it; on a CPU it is not measured. The functions named ..._textbook are the equations by the letter.
"""

import argparse
import contextlib
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

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

PROJECT = Path(__file__).parent.parent


def measure_once(function, device, clock=time.perf_counter):
    """Milliseconds and peak additional GiB (None on the CPU) of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    taken = 1000 * (clock() - started)
    return taken, (torch.cuda.max_memory_allocated() - before) / 2**30 if device == "cuda" else None


def measure(function, device, runs=7, warm_up=1):
    """Median milliseconds and peak additional GiB (None on the CPU) of one call, after a warm-up."""
    for _ in range(warm_up):
        function()
    times, peaks = zip(*(measure_once(function, device) for _ in range(runs)))
    return statistics.median(times), peaks[-1]


def report(title, ours, textbook, device, runs=7):
    (a, peak_a), (b, peak_b) = measure(ours, device), measure(textbook, device, runs)
    memory = "" if peak_a is None else f"   memory {peak_a:.3f} / {peak_b:.3f} GiB"
    print(f"{title:52} {a:9.2f} ms   textbook {b:9.2f} ms   {b / a:6.1f} x faster{memory}", flush=True)


# ==================================== hot functions against their textbook form ====================================


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


def class_statistics_textbook(features, labels, classes):
    """SDCA-10 for one batch as ISDA wrote it down: every pixel spread over all classes, (n, C, D) tensors."""
    member = torch.where(labels == common.IGNORE, classes, labels)  # (n,)
    member = F.one_hot(member, classes + 1)[:, :classes, None].to(features)  # (n, C, 1)
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


def sdca_equations(device):
    """One GTA5 feature map: 90 x 160 positions, a twentieth of them void, 2,048 channels; Lovasz on one crop."""
    C, D, n = 19, 2048, 90 * 160
    labels = torch.randint(C, (n,), device=device)
    labels[::20] = common.IGNORE
    features, known = torch.randn(n, D, device=device, requires_grad=True), sdca.ClassStatistics(C, D, device)
    known.update(features, labels)
    report("SDCA-10 class statistics", lambda: sdca.ClassStatistics(C, D, device).update(features, labels),
           lambda: class_statistics_textbook(features.detach(), labels, C), device, runs=2)
    report("SDCA-5 bound, forward and backward",
           lambda: sdca.contrastive_bound(features, labels, known.mean, known.variance).backward(),
           lambda: bound_textbook(features, labels, known.mean, known.variance).backward(), device)
    prob = torch.randn(1, C, 512, 1024, device=device).softmax(1).requires_grad_()
    label = torch.randint(C, (1, 512, 1024), device=device)
    report("SDCA-1 Lovasz-softmax, forward and backward", lambda: sdca.lovasz_softmax(prob, label).backward(),
           lambda: lovasz_textbook(prob, label).backward(), device)


# =============================== a step of every method, against plain self-training ===============================


def settings(module, *flags):
    """The arguments of a script with these flags; without any, its own for the toy."""
    with mock.patch.object(sys, "argv", [module.__name__, *flags]):
        return module.parse_args()


class Step:
    """A training step that minimises losses()["loss"]. kept: what the method holds beside what it trains."""

    def __init__(self, losses, *optimizers, kept=(), follow=lambda: None):
        self.losses, self.optimizers, self.kept, self.follow = losses, optimizers, kept, follow

    def __call__(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.losses()["loss"].backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.follow()


def seen(images):
    """What `common.training_batches` makes of bytes on the device."""
    return common.normalise(common.colour_jitter(images, 0, 2, 0))


# Each of these takes a network, (image, label) of both domains, the images as bytes, and the script's arguments.


def source_step(model, source, target, args):
    """The step of `train_source`, and of SDCA's training on pseudo-labels."""
    network = common.distribute(model, args)

    def losses():
        with common.autocast(args):
            _, logits = network(seen(source[0]))
        return {"loss": source_only.segmentation_loss(logits, source[1])}

    return Step(losses, source_only.make_optimizer(model, args))


def lse_step(model, source, target, args):
    network, (x_s, y_s), (x_t, y_t) = common.distribute(model, args), source, target
    make_optimizer = lse.fcn8s_optimizer if args.network == "fcn8s" else lse.make_optimizer
    return Step(lambda: lse.step_losses(network, (seen(x_s), y_s), (seen(x_t), y_t), args), make_optimizer(model, args))


def cpsl_step(model, source, target, args):
    """With a full bank, and with labels by the warm-up model and the momentum copy: two forward passes more."""
    (x_s, y_s), (x_t, _), D = source, target, model.feature_dim
    head = cpsl.SelfLabelingHead(len(common.task_classes(args.source)), D).to(x_s.device)
    torch.nn.init.normal_(head.prototypes)
    warm, momentum = copy.deepcopy(model).eval(), copy.deepcopy(model)
    momentum_head, bank = copy.deepcopy(head).requires_grad_(False), cpsl.MemoryBank(args.bank, D, x_s.device)
    bank.push(F.normalize(torch.randn(args.bank, D, device=x_s.device), dim=1))
    models = SimpleNamespace(
        network=common.distribute(model, args), self_labeling=common.distribute(head, args), head=head, bank=bank,
        warm_up=common.compiled(warm, args), momentum=common.compiled(momentum, args), momentum_head=momentum_head)

    def follow():
        cpsl.update_average(momentum, model, args.ema)
        cpsl.update_average(momentum_head, head, args.ema)

    return Step(lambda: cpsl.step_losses(models, (seen(x_s), y_s), x_t, args, 0),
                *cpsl.make_optimizers(model, head, args), kept=[warm, momentum, momentum_head, bank], follow=follow)


def distill_step(model, source, target, args):
    (x_s, y_s), (x_t, y_t), teacher = source, target, copy.deepcopy(model).eval()
    network, guide = common.distribute(model, args), common.compiled(teacher, args)

    def losses():
        strong = common.normalise(cpsl.strong_view(x_t, 0))
        return cpsl.distill_losses(network, guide, (seen(x_s), y_s), (strong, y_t), args)

    return Step(losses, cpsl.make_optimizer(model, args), kept=[teacher])


def sdca_step(model, source, target, args):
    (x_s, y_s), (x_t, _), C = source, target, len(common.task_classes(args.source))
    known = {level: sdca.ClassStatistics(C, D, x_s.device) for level, D in (("feat", model.feature_dim), ("out", C))}
    network = common.distribute(model, args)
    return Step(lambda: sdca.step_losses(network, known, seen(x_s), y_s, seen(x_t), args),
                sdca.make_optimizer(model, args))


def drsl_step(model, source, target, args):
    network, head, (x_s, y_s) = common.distribute(model, args), None, source
    if not args.plain:
        head = drsl.ModeHead(model.feature_dim, len(common.task_classes(args.source)), args.modes, args.embedding)
        head.to(x_s.device)
    mode_head = None if args.plain else common.distribute(head, args)

    def losses():
        labelled = None if target is None else (seen(target[0]), target[1])
        return drsl.step_losses(network, mode_head, (seen(x_s), y_s), labelled, args, None)

    return Step(losses, drsl.make_optimizer_with_modes(model, head, args))


def modes_step(model, source, target, args):  # before the joint steps the network stands still, which takes less
    return drsl_step(model, source, None, args)


def build_step(form, args, device):
    """A step of a script with pictures at the sizes that its arguments say, and its network."""
    C, N, network = len(common.task_classes(args.source)), args.batch_size, common.DeepLabV2
    if form is lse_step or getattr(args, "head", "") == "proda":
        network = cpsl.ProDANetwork if form is not lse_step else lse.NETWORKS[args.network]
    with torch.device(device):
        model = network(C, args.backbone).train().to(memory_format=torch.channels_last)
        batches = [(torch.randint(256, (N, 3, H, W), dtype=torch.uint8),
                    torch.randint(C, (N, H // 8, W // 8)).repeat_interleave(8, 1).repeat_interleave(8, 2))
                   for H, W in (args.crop, args.size if form is lse_step else args.crop)]  # LSE enlarges to --size
    if args.batch_norm != "live":
        common.freeze_batch_norm(model)
    return form(model, *batches, args), model


# title: script, step, flags. Of SDCA the dearest case: every target pixel is confident.
STEPS = {"plain self-training": (drsl, drsl_step, "--plain"), "LSE": (lse, lse_step),
         "CPSL": (cpsl, cpsl_step, "--no-consistency"), "CPSL with consistency": (cpsl, cpsl_step, "--consistency"),
         "SDCA": (sdca, sdca_step, "--delta", "0"), "DRSL": (drsl, drsl_step)}


def steps(device, *flags, rounds=15):
    """Milliseconds of one step of plain self-training and of every method, with these flags of the scripts."""
    chosen = [(form, settings(module, "--device", device, *flags, *own)) for module, form, *own in STEPS.values()]
    functions = []
    for form, args in chosen:
        args.size = args.crop  # or else the toy's LSE would have larger pictures than the others
        functions.append(build_step(form, args, device)[0])
    for function in functions:
        function()
    # They take turns, so that whatever else disturbs the machine disturbs all of them.
    times = [[measure_once(function, device) for function in functions] for _ in range(rounds)]
    for title, results in zip(STEPS, zip(*times)):
        taken = statistics.median(ms for ms, _ in results)
        ratio = statistics.median(ms / first[0][0] for (ms, _), first in zip(results, times))
        memory = "" if results[0][1] is None else f"   {results[-1][1]:.2f} GiB"
        print(f"step {args.backbone} {args.crop[0]}x{args.crop[1]} {args.batch_size}+{args.batch_size} {args.precision}"
              f"  {title:24} {taken:8.1f} ms   {ratio:.2f} x plain{memory}", flush=True)


# ========================== what a run costs, computed on a device without values ("meta") ==========================

PRESETS = {"full size": (), "the small preset": ("--preset", "small")}
SHARE = 0.35  # of the peaks below, for all of a training; a guess
# Published peaks of dense matrix products in TFLOP/s: TF32, torch's default in fp32 convolutions; bf16, sums in fp32.
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
            args = [self.done.setdefault(t, t.bfloat16()) if isinstance(t, torch.nn.Parameter) else
                    t.bfloat16() if torch.is_tensor(t) else t for t in args]
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_meta():
    """Lets steps run on the device "meta", for which torch has neither autocast nor random generators."""
    def autocast(args):
        return Bfloat16Convolutions() if args.precision == "bf16" else contextlib.nullcontext()

    with mock.patch.object(common, "autocast", autocast), mock.patch.object(common, "generator", lambda *_: None):
        yield


def storage_bytes(tensors):  # what several of them share counts once
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def step_cost(step, model):
    """Runs a step's forward and backward pass; returns what it costs.

    flop; weights: of what is trained; copies: weights of the models kept beside it; in bytes, state: all weights,
    gradients, optimizer state and what else is kept; saved: by autograd for the backward pass, beside the state.
    """
    trained = [p for optimizer in step.optimizers for group in optimizer.param_groups for p in group["params"]]
    weights = list({id(p): p for p in (*model.parameters(), *trained)}.values())  # frozen batch norms too
    kept = [t for part in step.kept for t in part.state_dict().values()]
    resident, saved = [*weights, *model.buffers(), *kept], []
    with FlopCounterMode(display=False) as counter:
        # `saved` holds the tensors themselves: were one freed, another could take its place and not be counted.
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            losses = step.losses()
        losses["loss"].backward()
    moments = []
    for optimizer in step.optimizers:
        optimizer.step()
        moments += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return {
        "flop": counter.get_total_flops(), "weights": sum(p.numel() for p in weights),
        "copies": sum(p.numel() for part in step.kept if isinstance(part, torch.nn.Module) for p in part.parameters()),
        "saved": storage_bytes([*saved, *resident]) - storage_bytes(resident),
        "state": storage_bytes([*resident, *moments, *(p.grad for p in trained if p.grad is not None)]),
    }


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
    "drsl": (drsl, drsl_step, [
        WARMUP, ("modes", lambda args: (not args.plain) * (args.head_iterations + args.joint_iterations), modes_step),
        ("rounds", lambda args: args.iterations - (not args.plain) * args.joint_iterations, drsl_step)], 1),
}


def planned_cost(form, args, precision):
    with on_meta():
        return step_cost(*build_step(form, SimpleNamespace(**{**vars(args), "precision": precision}), "meta"))


def hours(flop, peak):  # of so many operations at SHARE of a peak in TFLOP/s
    return flop / (SHARE * peak * 1e12) / 3600


def smallest_gpu(gib):  # the least of SIZES that holds so much
    return next((str(size) for size in SIZES if size >= gib), f">{SIZES[-1]}")


def plan(script, args, costs):
    """A script's row of the table and its schedule (text). costs: of steps, known so far."""
    _, own, stages, idle = PLANS[script]
    stages = [(stage, steps(args), form) for stage, steps, form in stages if steps(args)]
    for form in {own, *(form for _, _, form in stages)} - costs.keys():
        costs[form] = planned_cost(form, args, "fp32")
    flop = sum(steps * costs[form]["flop"] for _, steps, form in stages)
    fp32, bf16 = costs[own], planned_cost(own, args, "bf16")
    waiting = idle * costs[source_step]["weights"]
    state = (fp32["state"] + 4 * waiting) / 2**30
    saved = [cost["saved"] / 2**30 for cost in (fp32, bf16)]
    peaks = [state + gib + OVERHEAD for gib in saved]
    cells = [f"{script:15}{fp32['flop'] / 1e12:7.2f}"]
    cells += [f"{number / 1e6:7.1f}" for number in (fp32["weights"], fp32["copies"] + waiting)]
    cells += [f"{gib:6.1f}" for gib in (state, *saved, *peaks)] + [f"{smallest_gpu(gib):>5}" for gib in peaks]
    times = [hours(flop, peak) for pair in GPUS.values() for peak in pair]
    cells += [f"{h:6.1f}" if h >= 1 else f"{h:6.2f}" for h in times]
    return "".join(cells), ", ".join(f"{stage} {steps}" for stage, steps, _ in stages)


def print_plan(scripts, flags, device=None):
    """The table of what scripts cost with each preset and these flags of theirs. device: measures full size there."""
    peaks = ", ".join(f"{name} {fp32:g} / {bf16:g}" for name, (fp32, bf16) in GPUS.items())
    print(f"""Computed, not measured, on a device without values:
TFLOP      of one step of the method, forward and backward (a multiply-add is two)
M weights  in millions: trained, and in copies that the method keeps
GiB        state: weights, copies, gradients, optimizer; saved: by autograd for the backward pass; peak: both and
           {OVERHEAD} GiB for CUDA and what passes by
fits       the least memory that holds the peak, of {', '.join(map(str, SIZES))} GB
hours      all steps of all stages (below) at {SHARE:.0%} of the GPU's peak; labelling, scoring, slow disks come on top;
           peaks in TFLOP/s: {peaks}
All this is of eager steps. On an H200 a compiled bf16 step of source_only took 2.6 GiB, an eager one 5.1 (b70b40b).""")
    full = {}
    for preset, own in PRESETS.items():
        settled = {script: settings(PLANS[script][0], "--source", "gta5", "--device", "cpu", *own, *flags)
                   for script in scripts or PLANS}
        args, costs, schedules = next(iter(settled.values())), {}, []
        print(f"\n{preset}: {args.source}, {args.backbone}, {args.crop[0]}x{args.crop[1]}, {args.batch_size} images of "
              "each domain")
        print(f"{'':15}{'TFLOP':>7}{'M weights':>14}{'state':>6}{'saved GiB':>12}{'peak GiB':>12}"
              + f"{'fits GB':>10}" + "".join(f"{'h ' + name:>12}" for name in GPUS))
        print(f"{'':15}{'':7}{'train':>7}{'copy':>7}{'GiB':>6}" + f"{'fp32':>6}{'bf16':>6}" * 2
              + f"{'fp32':>5}{'bf16':>5}" + f"{'fp32':>6}{'bf16':>6}" * len(GPUS))
        for script, args in settled.items():
            row, schedule = plan(script, args, costs)
            print(row, flush=True)
            schedules.append(f"{script}: {schedule}")
        print("steps:", *schedules, sep="\n  ")
        full = full or settled
    if device:
        print_measured(full, device)


# ================================ steps, labelling and evaluation, on this machine ================================

KINDS = [(precision, compiled) for precision in ("fp32", "bf16") for compiled in (False, True)]


def measured_cost(form, args, precision, compiled, device):
    """Milliseconds of a step on this machine, and GiB that torch takes there (None on a CPU; CUDA itself takes more).

    Its first steps, in which it is compiled, do not count.
    """
    args = SimpleNamespace(**{**vars(args), "precision": precision, "compile": compiled, "device": device})
    torch.compiler.reset()  # what was compiled before counts towards torch's limit of recompilations
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, _ = build_step(form, args, device)
    milliseconds, _ = measure(step, device, runs=9, warm_up=3)
    return milliseconds, torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else None


def image_functions(args, device):
    """{title: a function that does it for one target image}: labels are written at --size, scored at twice that."""
    C, (H, W) = len(common.task_classes(args.source)), args.size
    model = common.DeepLabV2(C, args.backbone).to(device, memory_format=torch.channels_last).eval()
    image = torch.randint(256, (1, 3, H, W), dtype=torch.uint8, device=device)
    logits = torch.randn(1, C, *model(common.normalise(image))[1].shape[2:], device=device)
    label, metric = torch.randint(C, (1, 2 * H, 2 * W), device=device), common.MeanIoU(C)

    def labelled(size, flip):
        return common.predict(model, common.normalise(image), size, args, flip=flip).max(1).indices

    return {"label an image, with its mirror image": lambda: labelled((H, W), True).cpu(),
            "evaluate an image": lambda: metric.update(labelled((2 * H, 2 * W), False), label),
            "  of it: upsample, softmax, argmax": lambda: common.upsample(logits, (2 * H, 2 * W)).softmax(1).max(1),
            "  of it: confusion matrix": lambda: metric.update(label, label),
            "jitter and normalise an image": lambda: seen(image)}


def print_measured(settled, device):
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"\nmeasured on this {name}, torch {torch.__version__}: ms, and GiB that torch takes")
    heads = ["fp32", "compiled", "bf16", "compiled"]
    print(f"{'':38}" + "".join(f"{head:>10}" for head in ["ms " + heads[0], *heads[1:], "GiB " + heads[0], *heads[1:]]))

    def row(title, results):
        cells = [values[i] for i in (0, 1) for values in results]
        print(f"{title:38}" + "".join(f"{'-' if v is None else format(v, '.1f'):>10}" for v in cells), flush=True)

    for script, args in settled.items():
        row(f"a step of {script}", [measured_cost(PLANS[script][1], args, *kind, device) for kind in KINDS])
    with torch.no_grad():  # none of it is ever compiled
        found = {precision: image_functions(
            SimpleNamespace(**{**vars(args), "precision": precision, "device": device}), device)
            for precision in ("fp32", "bf16")}
        for title in found["fp32"]:
            row(title, [(None, None) if compiled else measure(found[precision][title], device)
                        for precision, compiled in KINDS])


# =========================================== pictures, and whole scripts ===========================================


def picture_sets(root, device, flags):
    """{title: (training set, arguments)} of the sets below `root`, as source_only.py reads them; None: the toy's."""
    def arguments(source):
        where = () if root is None else ("--data-root", str(root))
        return settings(source_only, "--source", source, *where, "--device", device, *flags)

    found = {}
    for source, title in (("toy", "toy source"),) if root is None else (("gta5", "GTA5"), ("synthia", "SYNTHIA")):
        args = arguments(source)
        augment = common.training_augment(args, args.source_size)
        with contextlib.suppress(common.InputError):
            found[title] = common.source_dataset(args, augment), args
    augment = common.training_augment(args)
    with contextlib.suppress(common.InputError):
        found["toy target" if root is None else "Cityscapes"] = common.target_dataset(args, "train", augment), args
    if not found:
        raise common.InputError(f"{root}: no pictures; expected GTA5/, RAND_CITYSCAPES/ or cityscapes/")
    return found


def picture_cost(dataset, device, number=48):
    """Medians over some pictures after the first: ms of the loader's part, of jitter and of normalising.

    Processor time, but of jitter and normalising on a GPU the time until it is done.
    """
    times, clock = [], time.perf_counter if device == "cuda" else time.process_time
    for index in range(min(number, len(dataset))):
        torch.manual_seed(index)
        item = []
        own, _ = measure_once(lambda: item.append(dataset[index]), "cpu", time.process_time)
        item.append(item[0]["image"][None].to(device))
        jitter, _ = measure_once(lambda: item.append(common.colour_jitter(item[1], 0, index)), device, clock)
        normalise, _ = measure_once(lambda: common.normalise(item[2]), device, clock)
        times.append((own, jitter, normalise))
    return [statistics.median(column) for column in zip(*times[1:] or times)]


def loader_rate(dataset, args):
    """Pictures per second that the loader processes deliver, once they are at work."""
    ahead = 2 * args.workers + 1
    for step, _ in enumerate(common.load(common.Batches(dataset, args.batch_size, 0), args, batch_size=None,
                                         sampler=range(5 * ahead))):
        started = time.perf_counter() if step <= ahead else started
    return (4 * ahead - 2) * args.batch_size / (time.perf_counter() - started)


def print_data(root, device, flags):
    torch.set_num_threads(1)  # as in loader processes
    print("processor ms per picture, one thread: the loader's part (reading, resizing, scale, crop, flip) and, on "
          f"{device}, the device's\n{'':12}{'loader':>10}{'jitter':>10}{'normalise':>11}   pictures/s of the loaders")
    costs = {}
    for title, (dataset, args) in picture_sets(root, device, flags).items():
        costs[title] = picture_cost(dataset, device)
        loader, jitter, normalise = costs[title]
        print(f"{title:12}{loader:10.1f}{jitter:10.1f}{normalise:11.1f}   {loader_rate(dataset, args):8.1f} "
              f"with --workers {args.workers}", flush=True)
    *sources, (target, cost) = costs.items()
    for source, own in sources:
        loader, rest = args.batch_size * (own[0] + cost[0]), args.batch_size * sum(own[1:] + cost[1:])
        print(f"a step's {args.batch_size} + {args.batch_size} pictures, {source} and {target}: loaders {loader:.0f} "
              f"ms ({loader / max(args.workers, 1):.0f} with --workers {args.workers}), {rest:.0f} on {device}")


TRAINING_STEPS = 120  # of a script, the last two thirds of which are timed


def print_training(root, device, flags):
    """Milliseconds per step of whole scripts by their own logs, and which share of it they waited for pictures."""
    print(f"end to end, {TRAINING_STEPS} steps: ms per step (share of it spent waiting for pictures)")
    print(f"{'':15}" + "".join(f"{precision + (' compiled' if go else ' eager'):>18}" for precision, go in KINDS))
    cells = {"source_only": [], "drsl": []}
    with tempfile.TemporaryDirectory() as folder:
        args, weights = settings(source_only, "--source", "gta5", *flags), Path(folder, "weights.pth")
        torch.save(common.torchvision_network(args.backbone, "none").state_dict(), weights)
        shared = ["--source", "gta5", "--data-root", root, "--device", device, "--backbone-weights", weights,
                  "--iterations", TRAINING_STEPS, "--log-every", max(1, TRAINING_STEPS // 6), *flags]
        start = Path(folder, "source_only0", "last.pt")
        for kind, (precision, compiled) in enumerate(KINDS):
            for script, own in (("source_only", ()), ("drsl", ("--init", start, "--rounds", 1, "--head-iterations", 0,
                                                               "--joint-iterations", 0))):
                out = Path(folder, f"{script}{kind}")
                command = [sys.executable, PROJECT / f"{script}.py", *shared, *own, "--out", out, "--precision",
                           precision, "--compile" if compiled else "--no-compile"]
                done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
                cells[script].append(step_time(out / "log.jsonl") if done.returncode == 0 else "failed")
                if done.returncode:
                    print(f"{script}: {done.stderr.strip()[-2000:]}", flush=True)
    for script, values in cells.items():
        print(f"{script:15}" + "".join(f"{value:>18}" for value in values), flush=True)


def step_time(log):
    """Text: milliseconds per step in the last two thirds of a log's training, and the share of waiting."""
    lines = [line for line in map(json.loads, log.read_text().splitlines()) if line["stage"] in ("source", "adapt")]
    steps, lines = [int(line["step"].split("/")[0]) for line in lines], lines[len(lines) // 3 - 1:]
    taken = (lines[-1]["seconds"] - lines[0]["seconds"]) / (steps[-1] - steps[-len(lines)])
    return f"{1000 * taken:.1f} ({statistics.mean(line.get('waiting', 0) for line in lines[1:]):.0%})"


# In this order; each takes the folder of pictures, the device and the flags for the scripts.
PARTS = {"plan": lambda root, device, flags: print_plan([], flags, device), "data": print_data, "train": print_training,
         "tests": lambda root, device, flags: subprocess.run(
             [sys.executable, str(PROJECT / "tests")], env={**os.environ, "DEVICE": device})}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="where")
    add("--plan", nargs="*", choices=PLANS, metavar="SCRIPT",
        help=f"measure nothing, but compute on any machine what runs on real data cost, of all scripts or of some of "
             f"{', '.join(PLANS)}: TFLOP per step, weights, memory, the GPU on which it fits, hours; flags that follow "
             "go to the scripts, as in --plan cpsl --batch-size 1")
    add("--measure", action="store_true", help="with --plan: also run full-size steps on this machine")
    add("--data", nargs="?", const="", metavar="ROOT",
        help="processor time per picture of the sets found in ROOT, of the toy without; flags go to source_only.py")
    add("--gpu", metavar="ROOT", help="--plan --measure, --data ROOT, whole runs on ROOT and the tests, in this order; "
                                      "ROOT holds GTA5/ and cityscapes/, flags go to the scripts")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help=f"with --gpu: only these of {', '.join(PARTS)}")
    args, flags = parser.parse_known_args()
    if args.measure and args.plan is None:
        parser.error("--measure needs --plan")
    if flags and args.plan is None and args.data is None and args.gpu is None:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    torch.backends.cudnn.benchmark = True  # as in every script
    if args.plan is not None:
        return print_plan(args.plan, flags, args.device if args.measure else None)
    print(common.versions(args.device))
    if args.data is not None:
        return print_data(args.data or None, args.device, flags)
    if args.gpu is not None:
        for part in args.parts:
            started = time.perf_counter()
            print(f"\n----- {part}", flush=True)
            PARTS[part](args.gpu, args.device, flags)
            print(f"({time.perf_counter() - started:.0f} s)", flush=True)
        return
    for equations in (drsl_equations, sdca_equations):
        equations(args.device)
    for precision in ("fp32", "bf16"):
        steps(args.device, "--precision", precision)
        if args.device == "cuda":
            steps(args.device, "--precision", precision, "--source", "gta5", "--no-compile", rounds=5)


if __name__ == "__main__":
    common.run(main)
