"""SDCA: semantic distribution-aware contrastive adaptation of semantic segmentation.

    S. Li, B. Xie, B. Zang, C. H. Liu, X. Cheng, R. Yang, G. Wang, "Semantic Distribution-aware Contrastive Adaptation for
    Semantic Segmentation", 2021, arXiv 2105.05013. The authors' code: BIT-DA/SDCA at commit d00e7ba.

READ THIS FIRST. Of the paper only the first page (title, authors, abstract) was available; the equations below are those
of the authors' released code, and the two steps between the contrastive loss and its bound were worked out again. Labels
such as SDCA-5 are this project's own, the paper's equation numbers are unknown. Sentences, equations and the real data's
defaults carry their origin; the toy's defaults are ours:

    [P] stated by the paper's abstract       [C] the authors' code       [T] the authors in an issue thread
    [D] derived here, checked numerically

The idea in five sentences
--------------------------
1. A pixel should look like its class in both domains: its representation should lie near the *distribution* that its
   class has on the labelled source [P], for source pixels by their labels, for target pixels by confident predictions [C].
2. A contrastive loss over pixels does that: it pulls a pixel towards pixels of its class and away from all others [P].
3. Instead of drawing pairs of pixels, every class is described by mean and variance of all its source pixels [C], and the
   loss is taken over infinitely many pairs [P].
4. That loss has an upper bound [P] in closed form, as cheap as a linear classifier, and the bound is trained [C].
5. Self-supervised learning improves the result further [P]: the adapted network labels the target, and a network is trained
   on the labels it is sure of (SSL) [C].

Notation
--------
    N images   C classes (index k)   D dimension of a representation   n pixels   h x w feature grid (stride 8)   tau temperature
    r_i    representation of grid pixel i: backbone features (feature level) or logits (output level, D = C)
    f_i    r_i / |r_i|      y_i  label: truth (source) or confident prediction (target), 255 = ignore
    M_k, V_k, n_k   mean, variance per dimension and number of the *source* pixels of class k, over raw r
    mu_k   M_k / |M_k|      sigma_k  V_k / |V_k|: each row of the statistics has unit length in the loss [C]
    delta, theta_k   confidence thresholds      J_k  Jaccard index of class k      P  softmax probabilities

Equations
---------
    SDCA-1   L_sup = CE(up(logits_s), y_s) + lambda_lov Lovasz(softmax(up(logits_s)), y_s)                           [C]
             Lovasz = mean over the classes in the batch of  sum_i e_(i) (Delta_i - Delta_{i-1}),  Delta = 1 - J_k if the
             i worst pixels were wrong, e = |1[y = k] - P(k)| in descending order         Berman et al., arXiv 1705.08790
    SDCA-2   l(f, y) = -mean_p log( a_p / (a_p + sum_{k != y} mean_j exp(f.m_kj / tau)) ),  a_p = exp(f.m+_p / tau)    [D]
             pairs m+_p of the own class, m_kj of each other class; every class weighs the same, however frequent
    SDCA-3   l_inf = E_{m+ ~ y} log( exp(f.m+ / tau) + sum_{k != y} E_{m ~ k} exp(f.m / tau) ) - f.mu_y / tau            [D]
             infinitely many pairs [P]; class k is Gaussian, m ~ N(mu_k, Sigma_k), as the bound's form implies
    SDCA-4   z_k = f.mu_k / tau + f' Sigma_k f / (2 tau^2)            log of E_{m ~ k} exp(f.m / tau)                 [C]
    SDCA-5   bound(f, y) = log sum_k exp(z_k) - f.mu_y / tau  =  CE(z, y) + f' Sigma_y f / (2 tau^2)  >=  l_inf   [C, >= D]
             Jensen's inequality on the logarithm. Theirs is the second form; the first, here, needs no variance per pixel.
    SDCA-6   f' Sigma_k f = sum_a f_a^2 sigma_ka           diagonal [C], for want of memory [T]; the paper's is full, says a reader
    SDCA-7   L_feat = mean bound(source features, y_s) + mean bound(target features, y_t)                             [C]
    SDCA-8   L_out  = the same with logits and their own statistics; the same labels                                  [C]
    SDCA-9   L = L_sup + lambda_feat L_feat + lambda_out L_out                                                        [C]
    SDCA-10  a batch with b, m, v (number, mean, variance / b) of class k is pooled exactly, nothing is forgotten     [C]
             w = b / (b + n_k),  V_k <- (1 - w) V_k + w v + w (1 - w) (M_k - m)^2,  M_k <- (1 - w) M_k + w m,  n_k <- n_k + b
    SDCA-11  L_ssl = CE(up(logits_t), y_t) with stored pseudo-labels: target images only                              [C]
    SDCA-12  bound = log C - f.(mu_y - mean_k mu_k) / tau + O(1 / tau^2)                                              [D]
    SDCA-13  y_t = argmax_c P(c) at stride 8, 255 where max_c P(c) < delta; anew in every step                        [C]
    SDCA-14  y_t = argmax_c P(c) at full size, 255 where max_c P(c) < theta_{y_t}, theta_k = min(0.9, median of
             max_c P(c) over the target pixels predicted k), 0 if there are none; once, after the adaptation          [C]

What SDCA-12 means for tau = 100 [D]. Features behind a ReLU have cosines in [0, 1], so for 19 classes the bound lies
between 2.9350 and 2.9539 whatever happens (the log's `feat` is the sum of source and target, `out` varies twice as much): its
value says nothing. Watch instead, for the confident target pixels, `own_feat` and `own_out` (f.mu_y) against `other_feat` and
`other_out` (max_{k != y} f.mu_k). The loss is an almost linear pull of weight 1/tau. And the covariance adds at most 5e-5:
with the authors' tau, "distribution-aware" is numerically almost the same as "centroid-aware" (--no-covariance). To see what
the distribution adds, take tau between 0.1 and 1.

The algorithm                                                                          paper's notion -> function
-------------                                                                          --------------------------
1. Source-only training with SDCA-1 [C], or --init.                                    train_source, source_loss,
                                                                                       lovasz_softmax
2. One pass over the clean source: class statistics at both levels, SDCA-10.           collect_statistics, ClassStatistics
3. Contrastive adaptation on batches of source and target images:                      main
     source labels on the grid by nearest neighbour, target labels by SDCA-13          common.grid_labels, online_labels
     statistics first, with the batch's source pixels                                  pool_batch
     then the bound at both levels, SDCA-4 to -9                                       contrastive_bound
4. One round of pseudo-labels for the target train images, SDCA-14.                    label_target, class_thresholds,
                                                                                       pseudo_labels
5. Self-supervised training on them, SDCA-11: from the backbone's own weights          train_ssl
   (--from-scratch-ssl, the authors' way) or from the adapted model.
6. Evaluate the last checkpoint, and the model before step 4 beside it.

Deviations: authors' code / here
--------------------------------
 1. Model selection. The best of all checkpoints by target validation labels, after each of three stages / always the last.
 2. Augmentation. Stages 1 to 3 whole images, no flip or scale; in stage 3 source images jittered, blurred, sometimes grey /
    the recipe of all methods: scale 1 to 1.5, crop, flip and colour jitter for both domains in every training stage; on the toy no
    scaling. Their SSL crops from images of 1024x2048 scaled by 0.5 to 1.5, ours from --size. Where a target picture is padded
    no pixel is confident.
 3. Source sampling. Images drawn by rare classes, p ~ 1 / log(1.01 + share) (SDCA-15) / every image once per epoch.
 4. Batch. 4 source + 4 target images on four GPUs, 8 target images in SSL / --batch-size of each domain, 2 by default
    on real data: with their steps half their images, in SSL a quarter. Optimizer on the toy: AdamW, one rate for all layers.
 5. Source training. 20,000 steps, lr 5e-4, early stop / --warmup-iterations, --warmup-lr, poly to zero, as for all methods.
    A model of source_only.py given by --init was trained without the Lovasz term.
 6. Schedule. Poly over MAX steps stopped early at STOP (62500 / 40000 and 31250 / 20000), so that the last factor is 0.3987
    and not 0 / --horizon = MAX / STOP reproduces that in steps 3 and 5 on real data; the toy decays to zero (--horizon 1).
    The rate rises over the first --ramp steps.
 7. Batch norm. Frozen in stages 1 to 3, without epsilon, live and synchronised in SSL / frozen everywhere, with epsilon. On
    the toy live: step 2 uses the source model's own running statistics (the source's), in step 3 each domain's batch is
    normalised by its own statistics, and re-estimation on the target (common.adapt_batch_norm) comes only before labelling and evaluation.
 8. SSL start. ImageNet weights / the same on real data; on the toy the adapted model, because there the network would start
    from random weights and 80 steps are hopeless. One round [C], though the authors describe rounds as usual [T].
 9. Pseudo-labels. Thresholds at 512x1024, labels at 1024x2048, all confidences kept in memory (about 19 GB) / both at
    --size; a histogram of 16,384 bins per class, summed over processes. theta is the lower edge of the median's bin, so it
    is too low by less than 2^-14, never too high.
10. Several GPUs. Each keeps statistics of its own and averages over its own pixels / pixels are pooled in every step, and
    the bounds are means over all processes' pixels. Lovasz stays a mean over processes: it does not split over a batch.
11. No confident target pixel. Not a number / a zero.
12. Resuming. Statistics were not saved / they are part of the checkpoint sdca.pt, counts are 64-bit integers.
13. Evaluation. SSL models at 1024x2048, the others at 512x1024, which mixes two effects / all at --size; evaluate.py --size
    1024x2048 tells the other.
14. Before July 2021 the code compared raw logits with delta; which form made the published figures is unknown / softmax.
15. Full covariance is not implemented, nor are labels by majority on the grid, statistics that forget, more rounds of SSL,
    the PDD metric (definition unknown) and Cross-City.

With --raw-statistics f is normalised first, and M and V of f are used as they are (as in the authors' later SePiCo): then
the Gaussians are the data's own, while normalised variances keep a class's profile but lose how wide it is [D].

Expect on the toy (mean of seeds 0 to 2, two cores of an AMD EPYC, bf16): source only 45.4, with re-estimated batch
norm 54.3, SDCA 57.1 mIoU (55.6 without SSL), all from source_only.py's models. From nothing, with Lovasz in the warm-up too
(seed 0, two threads): 47.0, 56.3 and 58.2 (56.8); 2 1/2 minutes, 1.4 GB.

    python sdca.py                                                # toy world: all stages, table, picture
    python sdca.py --tau 0.5                                      # a temperature at which the covariance counts
    python sdca.py --tau 0.5 --no-covariance                      # ... and without it: centroid-aware
    python sdca.py --lambda-out 0 --no-ssl                        # feature level alone, no self-training
    python sdca.py --source gta5 --data-root DIR --init runs/source_only-gta5-s0/last.pt
"""

import argparse

import torch
import torch.nn.functional as F

import common


# ================================================== the equations ==================================================


class ClassStatistics:
    """SDCA-10: mean, variance (divided by n) and number of all pixels ever seen, for every class, exact.

    mean (C, D) and variance (C, D) are float64, count (C,) is int64: in float32 a counter stops at 2^24. A class without
    pixels has zeros. They follow the pixels to their device. state_dict and load_state_dict make them a part of a checkpoint.
    """

    def __init__(self, num_classes, dim, device="cpu"):
        self.mean = torch.zeros(num_classes, dim, dtype=torch.float64, device=device)
        self.variance = torch.zeros_like(self.mean)
        self.count = torch.zeros(num_classes, dtype=torch.int64, device=device)

    def update(self, features, labels):
        """Adds pixels: features (n, D), labels (n,), 255 ignored. Memory O(n D): no tensor has an axis for n, C and D.

        Two passes within the batch, because E[r^2] - m^2 cancels in float32.
        """
        features = features.detach()
        member = labels[:, None] == torch.arange(len(self.count), device=labels.device)  # (n, C), a row of False for 255
        one_hot = member.to(features)  # (n, C)
        batch = ClassStatistics(*self.mean.shape, features.device)
        batch.count = member.sum(0)
        b = batch.count.clamp(min=1)[:, None]  # (C, 1)
        m = one_hot.T @ features / b  # (C, n) @ (n, D) -> (C, D)
        deviation = m[labels.clamp(max=len(m) - 1)].sub_(features)  # (n, D); ignored pixels get a weight of zero below
        batch.mean, batch.variance = m.double(), (one_hot.T @ deviation.square_() / b).double()  # (C, D)
        self.merge(batch)

    def merge(self, other):
        """Pools the pixels of `other` into these; the result does not depend on order or grouping."""
        mean, variance, count = (t.to(other.mean.device) for t in (self.mean, self.variance, self.count))
        # SDCA-10
        self.count = count + other.count
        w = (other.count.double() / self.count.clamp(min=1))[:, None]  # (C, 1)
        self.variance = (1 - w) * variance + w * other.variance + w * (1 - w) * (mean - other.mean).square()
        self.mean = (1 - w) * mean + w * other.mean

    def merge_processes(self):
        """Pools these statistics over all processes, by three sums; afterwards all hold the same."""
        count = common.all_sum(self.count.clone())
        share = (self.count.double() / count.clamp(min=1))[:, None]  # (C, 1)
        mean = common.all_sum(share * self.mean)
        # SDCA-10 for any number of parts: within plus between
        self.variance = common.all_sum(share * (self.variance + (self.mean - mean).square()))
        self.mean, self.count = mean, count

    def state_dict(self):
        return {"mean": self.mean, "variance": self.variance, "count": self.count}

    def load_state_dict(self, state):
        for name, value in self.state_dict().items():
            value.copy_(state[name])


def contrastive_bound(features, labels, mean, variance=None, tau=100.0, normalise=True):
    """SDCA-5, nats: upper bound of the expected contrastive loss, mean over the pixels that are not 255. Scalar.

    features (n, D), labels (n,), mean (C, D), variance (C, D), or None for zero (centroid-aware). Gradients reach the
    features only. normalise: features and each row of mean and variance get unit length first, as in the authors' code;
    without it the equation is taken for what is given. A class without pixels (zeros) competes with the logit 0.
    """
    f, mu = features, mean.detach().to(features)
    sigma = None if variance is None else variance.detach().to(features)
    if normalise:
        f, mu = F.normalize(f, dim=1), F.normalize(mu, dim=1)
        sigma = None if sigma is None else F.normalize(sigma, dim=1)
    similarity = f @ mu.T / tau  # (n, D) @ (D, C) -> (n, C)
    z = similarity
    if sigma is not None:
        z = similarity + f.square() @ sigma.T / (2 * tau**2)  # SDCA-4, SDCA-6
    valid = labels != common.IGNORE
    own = similarity.gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]  # (n,)
    # SDCA-5
    return common.masked_mean(z.logsumexp(1) - own, valid)


@torch.no_grad()
def cosines(features, labels, mean):
    """What to watch instead of the bound (SDCA-12): means over the pixels of f.mu_y and of max_{k != y} f.mu_k."""
    similarity = F.normalize(features, dim=1) @ F.normalize(mean, dim=1).to(features).T  # (n, C)
    valid = labels != common.IGNORE
    y = torch.where(valid, labels, 0)[:, None]  # (n, 1)
    other = similarity.scatter(1, y, -1.0).amax(1)  # (n,)
    return tuple(common.masked_mean(values, valid) for values in (similarity.gather(1, y)[:, 0], other))


def lovasz_softmax(prob, label):
    """SDCA-1, second term: Lovasz extension of the Jaccard loss, mean over the classes that occur in the batch. Scalar.

    prob (N, C, H, W), label (N, H, W), 255 ignored. All classes are sorted at once. With I = pixels of the class still right
    and U = union, a wrong pixel of the class costs 1 / U and one of another class I / (U (U - 1)): the differences of 1 - J,
    without subtracting two numbers near 1.
    """
    C = prob.shape[1]
    p = prob.transpose(0, 1).flatten(1)  # (N, C, H, W) -> (C, n)
    y = label.flatten()  # (n,)
    truth = y == torch.arange(C, device=y.device)[:, None]  # (C, n)
    errors = torch.where(y != common.IGNORE, (truth.to(p) - p).abs(), 0)  # ignored pixels come last and cost nothing
    # All classes at once, by falling error within each: one row of integers sorts many times faster than C rows of floats.
    # Errors that differ by less than the last digit may stand in any order.
    digits, integer = (53, torch.int64) if errors.dtype == torch.float64 else (24, torch.int32)
    c = torch.arange(C, dtype=integer, device=y.device)[:, None]  # (C, 1)
    key = ((1 - errors.detach()) * 2**digits).to(integer).add_(c * 2 ** (digits + 1))  # (C, n)
    order = key.flatten().argsort(stable=True)  # (C n,)
    truth = truth.flatten()[order].view(C, -1)  # (C, n)
    i = torch.arange(1, len(y) + 1, dtype=torch.int32, device=y.device)  # (n,)
    total = truth.sum(1, keepdim=True, dtype=torch.int32)  # (C, 1)
    I = total - truth.cumsum(1, dtype=torch.int32)  # (C, n), after the i worst pixels went wrong
    I, U = I.to(p), (I + i).to(p)  # union: the class's own pixels, and the others among the i worst
    cost = torch.where(truth, 1 / U.clamp(min=1), I / (U * (U - 1)).clamp(min=1))  # Delta_i - Delta_{i-1}
    cost = torch.empty_like(cost.flatten()).scatter(0, order, cost.flatten()).view(C, -1)  # back to the pixels
    # SDCA-1: a class that does not occur has cost 0 everywhere
    return (errors * cost).sum() / (total > 0).sum().clamp(min=1)


def online_labels(logits, delta):
    """SDCA-13: logits (N, C, h, w) -> labels (N, h, w), 255 where the softmax probability is below delta. No gradient."""
    confidence, label = logits.detach().float().softmax(1).max(1)  # (N, h, w)
    return torch.where(confidence < delta, common.IGNORE, label)


def confidence_histogram(prob, bins=2**14):
    """(C, bins) int64: how many pixels of prob (N, C, H, W) are predicted as each class with a confidence in each bin.

    Bin i holds [i, i + 1) / bins, the last one also 1. A power of two makes the bin of a float exact.
    """
    confidence, label = prob.max(1)  # (N, H, W)
    place = (confidence * bins).long().clamp(max=bins - 1)
    C = prob.shape[1]
    return torch.bincount((label * bins + place).flatten(), minlength=C * bins).view(C, bins)


def class_thresholds(histogram, maximum=0.9):
    """SDCA-14: theta (C,) = min(maximum, median confidence) from a histogram (C, bins); 0 for a class without pixels.

    The median is pixel number round(n / 2), counted from 0 upwards, rounded down to the lower edge of its bin.
    """
    bins = histogram.shape[1]
    n = histogram.sum(1, keepdim=True)  # (C, 1)
    rank = (n.double() / 2).round().long()
    median = (histogram.cumsum(1) <= rank).sum(1) / bins  # (C,): the first bin in which the count exceeds the rank
    return torch.where(n[:, 0] > 0, median.clamp(max=maximum), 0)


def pseudo_labels(prob, thresholds):
    """SDCA-14: (N, C, H, W) probabilities -> (N, H, W) labels, 255 where the best class is below its threshold."""
    confidence, label = prob.max(1)  # (N, H, W)
    return torch.where(confidence < thresholds[label], common.IGNORE, label)


# =================================================== the training ===================================================


# --- same in every method file ---
def segmentation_loss(logits, label):
    """Cross-entropy of logits (N, C, h, w), enlarged, against labels (N, H, W), mean over the pixels that are not 255.

    No valid pixel: a zero that is connected to the graph.
    """
    logits = common.upsample(logits.float(), label.shape[1:])  # (N, C, h, w) -> (N, C, H, W)
    loss = F.cross_entropy(logits, label, ignore_index=common.IGNORE, reduction="none")  # (N, H, W)
    return common.masked_mean(loss, label != common.IGNORE)


def poly_lr(base, step, steps, power):
    """The poly schedule: base * (1 - step / steps) ** power."""
    return base * (1 - step / steps) ** power


def make_optimizer(model, args):
    """SGD (momentum 0.9, weight decay 5e-4), Adam or AdamW; `scale` remembers how much faster the classifier learns."""
    groups = [{"params": [p for p in model.backbone.parameters() if p.requires_grad], "scale": 1.0},
              {"params": list(model.classifier.parameters()), "scale": args.head_lr}]
    fused = next(model.parameters()).is_cuda  # all weights in one kernel
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.01, fused=fused)
    if args.optimizer == "adam":
        return torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.99), fused=fused)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=5e-4, fused=fused)


def set_lr(optimizer, lr):
    """Gives every parameter group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def descend(loss, optimizer, *modules):
    """One step of gradient descent; under torchrun every process takes the same one."""
    optimizer.zero_grad()
    loss.backward()
    common.average_gradients(*modules)
    optimizer.step()


def train_source(model, dataset, args, run, file, steps, lr, criterion=segmentation_loss):
    """Supervised training of `model` in place; keeps its checkpoints in `file` of the run folder and resumes there."""
    optimizer, start = make_optimizer(model, args), 0
    if args.resume and (run.folder / file).exists():
        start = common.load_training(run.folder / file, model, optimizer)
    model.train()
    batches = common.training_batches(dataset, args, seed=args.seed, start=start, stop=steps)
    for step, batch in enumerate(batches, start + 1):
        set_lr(optimizer, poly_lr(lr, step - 1, steps, 0.9))
        image, label = common.to_device(batch, args.device)
        with common.autocast(args.device, args.precision):
            _, logits = model(image)
        loss = criterion(logits, label)
        descend(loss, optimizer, model)
        run.watch("source", step, steps, lr=optimizer.param_groups[0]["lr"], loss=loss)
        if run.time_to_save(step, steps):
            run.save(file, common.pack_training(model, optimizer, args, step))
    for buffer in model.buffers():  # live batch norm under torchrun: all go on with the statistics that were saved
        common.broadcast(buffer)
    model.eval()
# --- end ---


def source_loss(logits, label, lambda_lov):
    """SDCA-1: cross-entropy and Lovasz-softmax of stride-8 logits (N, C, h, w) at the size of the labels (N, H, W)."""
    logits = common.upsample(logits.float(), label.shape[1:])  # (N, C, h, w) -> (N, C, H, W)
    loss = segmentation_loss(logits, label)  # which leaves them as they are
    if lambda_lov > 0:
        loss = loss + lambda_lov * lovasz_softmax(logits.softmax(1), label)
    return loss  # SDCA-1


def representations(maps, args):
    """Feature or logit maps (N, D, h, w) -> r (n, D); with --raw-statistics f, so that the statistics are those of f."""
    r = common.as_pixels(maps.float())
    return F.normalize(r, dim=1) if args.raw_statistics else r


def pool_batch(statistics, r, labels):
    """SDCA-10 with the pixels r (n, D), labels (n,) of all processes."""
    batch = ClassStatistics(*statistics.mean.shape, r.device)
    batch.update(r, labels)
    batch.merge_processes()
    statistics.merge(batch)


@torch.no_grad()
def collect_statistics(model, statistics, args, run):
    """Step 2: fills {level: ClassStatistics} in one pass over the source, not augmented, with running batch-norm statistics.

    These are still the source's own: nothing has re-estimated them yet.
    """
    model.eval()
    for batch in common.evaluation_loader(common.source_dataset(args), args):
        image, label = common.to_device(batch, args.device)
        with common.autocast(args.device, args.precision):
            features, logits = model(image)  # (N, D, h, w), (N, C, h, w)
        y = common.grid_labels(label, logits.shape[2:]).flatten()  # (n,)
        for level, maps in (("feat", features), ("out", logits)):
            if level in statistics:
                statistics[level].update(representations(maps, args), y)
    for level in statistics:
        statistics[level].merge_processes()
        count = statistics[level].count
        run.log("statistics", level=level, pixels=count.sum().item(), classes=(count > 0).sum().item())


def label_target(model, args, folder):
    """Step 4: pseudo-labels of the target train images, written to `folder` as PNGs. Two passes, bounded memory.

    Returns what the log shows: the lowest and highest threshold and what common.write_pseudo_labels tells.
    """
    model.eval()
    dataset = common.target_dataset(args, "train", labelled=args.source == "toy")
    histogram = sum(confidence_histogram(prob) for _, prob in common.predictions(model, dataset, args))
    thresholds = class_thresholds(common.all_sum(histogram), args.theta)

    labelled = ((batch, pseudo_labels(prob, thresholds)) for batch, prob in common.predictions(model, dataset, args))
    return {"theta_low": thresholds.min().item(), "theta_high": thresholds.max().item(),
            **common.write_pseudo_labels(folder, labelled, args)}


def train_ssl(model, args, run, labels):
    """Step 5: trains `model` in place on target images with the pseudo-labels in the folder `labels`. Checkpoints: last.pt."""
    optimizer, start, steps = make_optimizer(model, args), 0, args.ssl_iterations
    if args.resume and (run.folder / "last.pt").exists():
        start = common.load_training(run.folder / "last.pt", model, optimizer)
    augment = common.training_augment(args.size, args.crop, args.scale_jitter)
    target = common.target_dataset(args, "train", augment, label_dir=labels)
    model.train()
    batches = common.training_batches(target, args, seed=common.mix_seed(args.seed, 6), start=start, stop=steps)
    for step, batch in enumerate(batches, start + 1):
        set_lr(optimizer, adaptation_lr(args.ssl_lr, step, steps, args))
        image, label = common.to_device(batch, args.device)
        with common.autocast(args.device, args.precision):
            _, logits = model(image)
        loss = segmentation_loss(logits, label)  # SDCA-11
        descend(loss, optimizer, model)
        run.watch("ssl", step, steps, lr=optimizer.param_groups[0]["lr"], loss=loss)
        run.validate("ssl", step, steps, model)
        if run.time_to_save(step, steps):
            run.save("last.pt", common.pack_training(model, optimizer, args, step))
    common.adapt_batch_norm(model, args)
    run.save("last.pt", common.pack_training(model, optimizer, args, steps))


def adaptation_lr(base, step, steps, args):
    """Learning rate of step 1 .. steps: the ramp, then poly over `horizon` times the steps (authors: MAX / STOP)."""
    return common.ramp(step, args) * poly_lr(base, step - 1, args.horizon * steps, args.power)


def parse_args():
    parser = common.shared_parser(__doc__, adapts=True)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--iterations", type=common.natural_number, metavar="T", default=common.by_source(160, 40000), help="steps of the contrastive adaptation [C]")
    add("--lr", type=float, metavar="X", default=common.by_source(2e-4, 2.5e-4), help="its base learning rate [C]")
    add("--horizon", type=float, metavar="X", default=common.by_source(1.0, 1.5625),
        help="end of the poly decay as a multiple of the steps: MAX / STOP [C]")
    add("--tau", type=float, default=100.0, help="temperature [C]; below 1 the covariance counts")
    add("--delta", type=float, default=0.9, help="confidence from which on a target pixel takes part in the adaptation [C]")
    add("--lambda-lov", type=float, default=0.75, help="weight of Lovasz-softmax on source, also in the warm-up [C]")
    add("--lambda-feat", type=float, default=1.0, help="weight of the bound on features, 0 for none [C]")
    add("--lambda-out", type=float, default=1.0, help="weight of the bound on logits, 0 for none [C]")
    add("--covariance", action=switch, default=True, help="without: zero covariance, centroid-aware")
    add("--raw-statistics", action="store_true", help="use statistics as they are, those of normalised features")
    add("--ssl", action=switch, default=True, help="self-supervised training after the adaptation [P]")
    add("--theta", type=float, default=0.9, help="upper bound of the class thresholds of its pseudo-labels [C]")
    add("--from-scratch-ssl", action=switch, default=common.by_source(False, True),
        help="start it from the backbone's weights [C]; else from the adapted model")
    add("--ssl-iterations", type=common.natural_number, metavar="T", default=common.by_source(80, 20000), help="its steps [C]")
    add("--ssl-lr", type=float, metavar="X", default=common.by_source(2e-4, 5e-4), help="its base learning rate [C]")
    return common.parse(parser)


def main():
    args = parse_args()
    if args.horizon < 1:
        raise common.InputError(f"--horizon {args.horizon}: the poly decay cannot end before the last step, give 1 or more")
    if args.backbone == "vgg16-fcn8s":
        raise common.InputError("--backbone vgg16-fcn8s: SDCA needs features and logits on one grid, DeepLabV2's")
    run = common.Run("sdca", args)
    classes = common.task_classes(args.source)
    source_size = args.size if args.source == "toy" else args.source_size
    source = common.source_dataset(args, augment=common.training_augment(source_size, args.crop, args.scale_jitter))
    augment = common.training_augment(args.size, args.crop, args.scale_jitter)
    target = common.target_dataset(args, "train", common.with_padding_mask(augment))
    common.target_dataset(args, "val")  # say now if something is missing

    # Step 1: the source-only model, trained here with SDCA-1 or given.
    model = common.build_model(args)
    if args.init:
        common.load_init(model, args, run)
    else:
        train_source(model, source, args, run, "source_only.pt", args.warmup_iterations, args.warmup_lr,
                     lambda logits, label: source_loss(logits, label, args.lambda_lov))

    # Step 2: class statistics of the source at every level that is used.
    weights = {level: weight for level, weight in (("feat", args.lambda_feat), ("out", args.lambda_out)) if weight > 0}
    dims = {"feat": model.feature_dim, "out": len(classes)}
    statistics = {level: ClassStatistics(len(classes), dims[level]) for level in weights}
    optimizer, done = make_optimizer(model, args), 0
    if args.resume and (run.folder / "sdca.pt").exists():
        done = common.load_training(run.folder / "sdca.pt", model, optimizer, **statistics)
    else:
        if statistics:
            collect_statistics(model, statistics, args, run)
        run.save("sdca.pt", common.pack_training(model, optimizer, args, 0, **statistics))

    # Step 3: contrastive adaptation.
    batches_s = common.training_batches(source, args, seed=common.mix_seed(args.seed, 4), start=done, stop=args.iterations)
    batches_t = common.training_batches(target, args, seed=common.mix_seed(args.seed, 5), start=done, stop=args.iterations)
    model.train()
    for done, batch_s, batch_t in zip(range(done + 1, args.iterations + 1), batches_s, batches_t):
        set_lr(optimizer, adaptation_lr(args.lr, done, args.iterations, args))
        x_s, y_s = common.to_device(batch_s, args.device)
        x_t, padding = common.to_device(batch_t, args.device)  # (N, 3, H, W), (N, H, W): 255 outside the picture, else 0
        with common.autocast(args.device, args.precision):
            (features_s, logits_s), (features_t, logits_t) = model(x_s), model(x_t)  # (N, D, h, w), (N, C, h, w)
        losses = {"sup": source_loss(logits_s, y_s, args.lambda_lov)}  # SDCA-1
        loss = losses["sup"]

        y_s = common.grid_labels(y_s, logits_s.shape[2:]).flatten()  # (n,)
        y_t = online_labels(logits_t, args.delta)  # (N, h, w), SDCA-13
        y_t = torch.where(common.grid_labels(padding, y_t.shape[1:]) == 0, y_t, common.IGNORE).flatten()  # (n,)
        losses["kept"] = (y_t != common.IGNORE).float().mean()
        for level, maps_s, maps_t in (("feat", features_s, features_t), ("out", logits_s, logits_t)):
            if level in weights:
                r_s, r_t = representations(maps_s, args), representations(maps_t, args)  # (n, D)
                pool_batch(statistics[level], r_s, y_s)  # SDCA-10, source pixels only, before the loss
                mean, variance = statistics[level].mean, (statistics[level].variance if args.covariance else None)
                losses[level] = sum(contrastive_bound(r, y, mean, variance, args.tau, not args.raw_statistics)
                                    for r, y in ((r_s, y_s), (r_t, y_t)))  # SDCA-7, SDCA-8
                if run.time_to_log(done, args.iterations):
                    losses[f"own_{level}"], losses[f"other_{level}"] = cosines(r_t, y_t, mean)
                loss = loss + weights[level] * losses[level]  # SDCA-9

        descend(loss, optimizer, model)
        run.watch("adapt", done, args.iterations, lr=optimizer.param_groups[0]["lr"], loss=loss, **losses)
        run.validate("adapt", done, args.iterations, model)
        if run.time_to_save(done, args.iterations):
            run.save("sdca.pt", common.pack_training(model, optimizer, args, done, **statistics))
    common.adapt_batch_norm(model, args)
    run.save("sdca.pt", common.pack_training(model, optimizer, args, done, **statistics))

    if not args.ssl:
        run.save("last.pt", common.pack_training(model, optimizer, args, done, **statistics))
        common.compare_with_source_only({"SDCA": model}, args, run)
        return

    # Steps 4 and 5: pseudo-labels by the adapted model, then training on them alone.
    labels = run.folder / "pseudo_labels"
    if not (args.resume and (run.folder / "last.pt").exists()):
        run.log("pseudo-labels", **label_target(model, args, labels))
    if args.from_scratch_ssl:
        torch.manual_seed(common.mix_seed(args.seed, 8))  # the start does not depend on what was drawn before
        model = common.build_model(args)
    train_ssl(model, args, run, labels)

    # Step 6: all models on the target's validation split.
    before = common.load_model(run.folder / "sdca.pt", args)
    common.compare_with_source_only({"SDCA, no SSL": before, "SDCA": model}, args, run)


if __name__ == "__main__":
    common.run(main)
