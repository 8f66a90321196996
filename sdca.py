"""SDCA: semantic distribution-aware contrastive adaptation of semantic segmentation.

    S. Li, B. Xie, B. Zang, C. H. Liu, X. Cheng, R. Yang, G. Wang, "Semantic Distribution-aware Contrastive Adaptation
    for Semantic Segmentation", 2021, arXiv 2105.05013. The authors' code: BIT-DA/SDCA at commit d00e7ba.

READ THIS FIRST. Only the paper's first page (title, authors, abstract) was available. The equations below are those of
the authors' released code, and the steps from the contrastive loss to its bound were derived again. Labels such as
SDCA-5 are this project's own, because the paper's numbers are unknown. Origin of equations and flags:

    [P] stated by the paper's abstract       [C] the authors' code       [T] the authors in an issue thread
    [D] derived here, checked numerically    no mark: ours

A flag's origin is that of its value on real data; the toy's own values and those of --preset small are ours.

The idea in five sentences
--------------------------
1. In both domains the representation of a pixel should lie near the *distribution* that its class has on the labelled
   source [P]. A source pixel's class is its label, a target pixel's class is the network's own prediction, where that
   is confident [C].
2. A contrastive loss over pixels does that: it pulls a pixel towards its class and away from all others [P].
3. Instead of drawing pairs of pixels, the loss is taken over infinitely many of them [P]: every class is described by
   the mean and the variance of all its source pixels [C].
4. That loss has an upper bound, which is minimised in its place [P]. It has a closed form, as cheap as a linear
   classifier [C].
5. Self-supervised learning (SSL) improves the result further [P]: the adapted network labels the target where it is
   sure, and a network is trained on these labels [C].
At the authors' temperature, tau = 100, the variances change the loss by at most 5e-5: "distribution-aware" is
numerically "centroid-aware", and only the means count [D]. See "What tau = 100 means" below.

Notation
--------
    N images   C classes (index k)   h x w feature grid (stride 8)   n pixels: the grid's cells in all images (index i)
    r_i        representation of pixel i, D numbers: backbone features (level feat) or logits (level out, D = C)
    f_i        r_i / |r_i|, and f' is f as a row     y_i  label: truth (source) or confident prediction (target)
    M_k, V_k, n_k   mean, variance per dimension and number of all *source* pixels of class k so far, over raw r
    mu_k       M_k / |M_k|: the statistics, too, have unit length in the loss [C]
    sigma^2_k  V_k / |V_k|: a variance per dimension, not a deviation     Sigma_k  covariance, diag(sigma^2_k)
    tau  temperature     delta, theta_k  confidence thresholds     P  softmax probabilities, P(k) that of class k
    up   upsampled to the label's size     CE  cross-entropy, mean over the pixels that are not 255 (ignore)
    lambda_lov, lambda_feat, lambda_out  weights of losses: 0.75, 1, 1 (on the toy 0.75, 10, 10)

Equations
---------
    SDCA-1   L_sup = CE(up(logits_s), y_s) + lambda_lov Lovasz(softmax(up(logits_s)), y_s)                      [C]
             Lovasz = mean over the classes k in the batch of  sum_j e_j (J_{j-1} - J_j), where e_j is the j-th largest
             error |1[y = k] - P(k)| of a pixel, and J_j is the Jaccard index (IoU) that class k would have if the j
             pixels with the largest errors were wrong and all others right: J_0 = 1 (Berman et al., arXiv 1705.08790)
    SDCA-2   l(f, y) = -mean_{g+} log( exp(f.g+ / tau) / (exp(f.g+ / tau) + sum_{k != y} mean_{g_k} exp(f.g_k / tau)) )
             for a pixel f of class y. Its partners are pixels too: g+ of its own class, g_k of another class k;
             every class weighs the same, however frequent it is                                                [D]
    SDCA-3   l_inf = E_{g+} log( exp(f.g+ / tau) + sum_{k != y} E_{g_k} exp(f.g_k / tau) ) - f.mu_y / tau       [D]
             the same over infinitely many partners [P]. The form of the bound implies that class k is a Gaussian
             with mean mu_k and covariance Sigma_k. Then f.g_k / tau is a Gaussian number, with mean f.mu_k / tau and
             variance f' Sigma_k f / tau^2. Every Gaussian number a has E exp(a) = exp(mean + variance / 2), by its
             moment-generating function. So the inner expectation has the logarithm
    SDCA-4   z_k = log E_{g_k} exp(f.g_k / tau) = f.mu_k / tau + f' Sigma_k f / (2 tau^2)                       [C]
             Jensen's inequality, E log(x) <= log E(x), moves the outer expectation into the logarithm:
    SDCA-5   bound(f, y) = log sum_k exp(z_k) - f.mu_y / tau  >=  l_inf                                         [D]
             = -log softmax_y(z) + f' Sigma_y f / (2 tau^2)          (bound_textbook in tests/benchmark.py)     [C]
    SDCA-6   f' Sigma_k f = sum_d f_d^2 sigma^2_kd     a diagonal covariance [C], for want of memory [T]
    SDCA-7   L_feat = mean bound(source features, y_s) + mean bound(target features, y_t)                       [C]
    SDCA-8   L_out  = the same with logits and their statistics, and with the same labels                       [C]
    SDCA-9   L = L_sup + lambda_feat L_feat + lambda_out L_out                                                  [C]
    SDCA-10  A batch has b pixels of class k, with mean m and variance v (divisor b). They join all earlier ones:
             q = b / (b + n_k),  V_k <- (1 - q) V_k + q v + q (1 - q) (M_k - m)^2 with the old M_k,
             M_k <- (1 - q) M_k + q m,  n_k <- n_k + b                                                          [C]
    SDCA-11  L_ssl = CE(up(logits_t), y_t) with stored pseudo-labels: target images only                        [C]
    SDCA-12  bound = log C - f.(mu_y - mean_k mu_k) / tau + O(1 / tau^2)                                        [D]
    SDCA-13  y_t = argmax_k P(k) at stride 8, 255 where max_k P(k) < delta, anew in every step                  [C]
    SDCA-14  y_t = argmax_k P(k) at image size, 255 where max_k P(k) < theta_{y_t}, once, after the adaptation.
             theta_k = min(0.9, median of max P over the target pixels predicted k), 0 if there are none        [C]
    SDCA-15  images with rare classes are drawn more often: not done here, deviation 2                          [C]

The algorithm, by stages                                                   paper's notion -> function
------------------------                                                   --------------------------
1. Source-only training with SDCA-1 [C], or --init.                        train_source, source_loss, lovasz_softmax
2. One pass over the clean source: class statistics of features and        collect_statistics, ClassStatistics
   logits, SDCA-10.
3. Contrastive adaptation on source and target images, SDCA-9:             adapt, step_losses
     source labels at the grid's cells, target labels by SDCA-13           common.grid_labels, online_labels
     statistics first, with the batch's source pixels, SDCA-10             pooled, ClassStatistics.merge
     then the bound for features and for logits, SDCA-4 to SDCA-8          contrastive_bound
4. One round of pseudo-labels for the target train images, SDCA-14.        label_target, class_thresholds, pseudo_labels
5. Self-supervised training on these images alone, SDCA-11.                train_ssl
6. Scores of the last checkpoint, and of the model before stage 4.         common.compare_with_source_only

What tau = 100 means, by SDCA-12 [D]
------------------------------------
Cosines of features after a ReLU lie in [0, 1]. So the bound on features always lies between 2.935 and 2.954 for 19
classes (2.763 and 2.782 for the toy's 16), and its value says nothing. Watch instead `own_feat` (f.mu_y) against
`other_feat` (max_{k != y} f.mu_k), and the same for logits: in the log for confident target pixels, in result.json for
the validation pixels, before and after stage 3. The covariance counts only where tau is 1 or less (compare
--no-covariance). The pull has the strength lambda / tau. Why lambda is 10 on the toy stands above parse_args.

Deviations that change the method (the others, and a table of settings, stand above parse_args)
-----------------------------------------------------------------------------------------------
 1. Authors: Sigma is a full matrix in the paper, as a reader of it says, and a diagonal in the code. Here: a diagonal.
 2. Authors: SDCA-15. A class k is drawn in proportion to 1 / log(1.01 + its share so far), then an image that shows it.
    Here: every image once per epoch.
 3. Authors: batch norm is frozen until the SSL, which trains it. Here: --batch-norm decides for stages 2 to 5. For a
    network that --from-scratch-ssl starts anew, it is as in stage 1.
 4. Authors: the SSL starts from ImageNet weights. Here: the same on real data. The toy and --preset small have too few
    steps for that and start from the adapted model. One round [C], though the authors call several usual [T].
 5. Authors: in each of three stages the best checkpoint by the target's validation labels is kept. Here: the last.

Expect on the toy (mean over the README's eight worlds, ± standard error of a difference): source only 30.8, with
re-estimated batch norm 31.7, SDCA 33.3 mIoU. The contrast gains 0.1 ± 0.1 mIoU, 0.9 ± 0.2 of the rare classes and 0.9
± 0.1 recall on looks that are rare in the source. Own and nearest other cosine of features: 0.66 and 0.64 before, 0.70
and 0.59 after, with the idea off 0.66 and 0.63. It takes 6 minutes on one thread of an AVX2 core, warm-up included, and
0.9 GB.

    python sdca.py                                              # toy world: all stages, table, picture
    python sdca.py --lambda-feat 0 --lambda-out 0               # the idea off: no contrastive loss, the same steps
    python sdca.py --no-ssl                                     # the contrastive adaptation alone
    python sdca.py --tau 0.5 --lambda-feat 1 --lambda-out 1     # a temperature at which the covariance counts
    python sdca.py --tau 0.5 --lambda-feat 1 --lambda-out 1 --no-covariance      # the same without it: centroid-aware
    python sdca.py --source gta5 --data-root DIR --init runs/source_only-gta5-s0/last.pt
"""

import argparse

import torch
import torch.nn.functional as F

import common


# =================================================== the equations ====================================================


def contrastive_bound(features, labels, mean, variance=None, tau=100.0):
    """SDCA-5, nats: upper bound of the expected contrastive loss, mean over the pixels that are not 255. Scalar.

    features (n, D), labels (n,), mean (C, D), variance (C, D), or None for zero (centroid-aware); all are brought to
    unit length here. Gradients reach the features only. A class without pixels (zeros) competes with the logit 0.
    No valid pixel: a zero that is connected to the graph.
    """
    f, mu = F.normalize(features, dim=1), F.normalize(mean.detach().to(features), dim=1)
    z = similarity = f @ mu.T / tau  # (n, D) @ (D, C) -> (n, C)
    if variance is not None:
        variance = F.normalize(variance.detach().to(features), dim=1)  # sigma^2
        z = similarity + f.square() @ variance.T / (2 * tau**2)  # (n, C)  SDCA-4, SDCA-6
    valid = labels != common.IGNORE
    own = similarity.gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]  # (n,)  f.mu_y / tau
    bound = z.logsumexp(1) - own  # (n,)  SDCA-5
    return torch.where(valid, bound, 0).sum() / valid.sum().clamp(min=1)


class ClassStatistics:
    """SDCA-10: mean, variance (divided by n) and number of all pixels ever seen, for every class, exact.

    mean (C, D) and variance (C, D) are float64, count (C,) is int64: in float32 a counter stops at 2^24. A class
    without pixels has zeros. state_dict and load_state_dict put all three into checkpoints.
    """

    def __init__(self, num_classes, dim, device="cpu"):
        self.mean = torch.zeros(num_classes, dim, dtype=torch.float64, device=device)
        self.variance = torch.zeros_like(self.mean)
        self.count = torch.zeros(num_classes, dtype=torch.int64, device=device)

    def update(self, features, labels):
        """Adds pixels: features (n, D), labels (n,), 255 ignored. Memory O(n D): no tensor has all three axes.

        Two passes within the batch, because E[r^2] - m^2 cancels in float32.
        """
        features = features.detach()
        batch = ClassStatistics(*self.mean.shape, features.device)
        member = labels[:, None] == torch.arange(len(self.count), device=labels.device)  # (n, C), 255: a row of False
        batch.count = member.sum(0)
        share = member.to(features) / batch.count.clamp(min=1)  # (n, C)
        m = share.T @ features  # (C, n) @ (n, D) -> (C, D)
        deviation = features - m[labels.clamp(max=len(m) - 1)]  # (n, D); ignored pixels have no share below
        batch.mean, batch.variance = m.double(), (share.T @ deviation.square()).double()  # (C, D)
        self.merge(batch)

    def merge(self, other):
        """Adds the pixels that `other` describes. Order and grouping make no difference."""
        # SDCA-10
        count = self.count + other.count
        q = (other.count.double() / count.clamp(min=1))[:, None]  # (C, 1)
        between = q * (1 - q) * (self.mean - other.mean).square()
        self.variance = (1 - q) * self.variance + q * other.variance + between
        self.mean = (1 - q) * self.mean + q * other.mean
        self.count = count

    def state_dict(self):
        return {"mean": self.mean, "variance": self.variance, "count": self.count}

    def load_state_dict(self, state):
        for name, value in self.state_dict().items():
            value.copy_(state[name])


def lovasz_softmax(prob, label):
    """SDCA-1, second term: Lovasz extension of the Jaccard loss, mean over the classes that occur in the batch. Scalar.

    prob (N, C, H, W), label (N, H, W), 255 ignored. tests/benchmark.py has the textbook form, lovasz_textbook.
    """
    p, y = prob.transpose(0, 1).flatten(1), label.flatten()  # (C, n), (n,)
    truth = y == torch.arange(len(p), device=y.device)[:, None]  # (C, n); an ignored pixel belongs to no class
    errors = (truth.to(p) - p).abs() * (y != common.IGNORE)  # (C, n)
    drops = torch.stack([jaccard_drops(e, t) for e, t in zip(errors.detach(), truth)])  # (C, n), no gradient
    return (errors * drops).sum() / truth.any(1).sum().clamp(min=1)  # SDCA-1


def jaccard_drops(errors, truth):
    """J_{j-1} - J_j of SDCA-1 for one class, of each pixel (n,) at its own place; zeros for a class without pixels.

    errors (n,), truth (n,): whether the pixel belongs to the class. Only the order of the errors counts here, so this
    is also the gradient of the Lovasz extension.
    """
    order = falling_order(errors)
    truth = truth[order]
    # Intersection I and union U of truth and prediction when the j worst pixels are wrong: J_j = I / U. If pixel j is
    # of the class, it has just left I, and J falls by 1 / U. If not, it has just joined U, and J falls by
    # I / (U - 1) - I / U = I / U / (U - 1). Differences of J itself would be lost to rounding in float32.
    intersection = (truth.sum() - truth.cumsum(0)).to(errors)  # (n,)
    union = (truth.sum() + (~truth).cumsum(0)).to(errors)  # (n,)
    drops = torch.where(truth, 1 / union, intersection / union / (union - 1).clamp(min=1))  # (n,)
    return torch.empty_like(drops).scatter(0, order, drops)


def falling_order(values):
    """Indices (n,) of the values (n,) >= 0, largest first.

    The bits of such floats, read as integers, have the same order, and a CPU sorts integers several times faster.
    """
    return values.view(torch.int64 if values.dtype == torch.float64 else torch.int32).argsort(stable=True).flip(0)


def online_labels(logits, delta):
    """SDCA-13: logits (N, C, h, w) -> labels (N, h, w), 255 where the probability is below delta. No gradient."""
    confidence, label = logits.detach().float().softmax(1).max(1)  # (N, h, w)
    return torch.where(confidence < delta, common.IGNORE, label)


def confidence_histogram(prob, bins=2**14):
    """(C, bins) int64: how many pixels of prob (N, C, H, W) are predicted as each class, by confidence.

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


# ================================================= one training step ==================================================


def source_loss(logits, label, lambda_lov):
    """SDCA-1: cross-entropy and Lovasz-softmax of stride-8 logits (N, C, h, w) at the size of the labels (N, H, W)."""
    logits = common.upsample(logits.float(), label.shape[1:])  # (N, C, h, w) -> (N, C, H, W)
    loss = segmentation_loss(logits, label)  # upsamples no further
    if lambda_lov > 0:
        loss = loss + lambda_lov * lovasz_softmax(logits.softmax(1), label)
    return loss  # SDCA-1


def pooled(statistics):
    """SDCA-10 over all processes: the ClassStatistics of their pixels together. With one process a copy."""
    total = ClassStatistics(*statistics.mean.shape, statistics.mean.device)
    total.count = common.all_sum(statistics.count.clone())
    q = (statistics.count.double() / total.count.clamp(min=1))[:, None]  # (C, 1)
    total.mean = common.all_sum(q * statistics.mean)
    between = (statistics.mean - total.mean).square()
    total.variance = common.all_sum(q * (statistics.variance + between))
    return total


def step_losses(network, statistics, x_s, y_s, x_t, args):
    """SDCA-9, "loss", and its terms: one whole step of the adaptation.

    x_s, x_t (N, 3, H, W) source and target images, y_s (N, H, W). statistics: {"feat", "out": ClassStatistics} of the
    source so far, to which this batch is added. Meters beside the losses: "kept", the share of confident target pixels,
    and "own_feat", "other_feat", "own_out", "other_out" as in `cosines`.
    """
    with common.autocast(args):
        (features_s, logits_s), (features_t, logits_t) = network(x_s), network(x_t)  # (N, D, h, w), (N, C, h, w)
    losses = {"sup": source_loss(logits_s, y_s, args.lambda_lov)}  # SDCA-1

    y_s = common.grid_labels(y_s, logits_s.shape[2:]).flatten()  # (n,)
    y_t = online_labels(logits_t, args.delta).flatten()  # (n,)  SDCA-13
    losses["kept"] = (y_t != common.IGNORE).float().mean()
    for level, maps_s, maps_t in (("feat", features_s, features_t), ("out", logits_s, logits_t)):
        r_s, r_t = common.as_pixels(maps_s.float()), common.as_pixels(maps_t.float())  # (N, D, h, w) -> (n, D)
        batch = ClassStatistics(*statistics[level].mean.shape, r_s.device)
        batch.update(r_s, y_s)  # source pixels only
        statistics[level].merge(pooled(batch))  # SDCA-10, before the loss
        M, V = statistics[level].mean, statistics[level].variance if args.covariance else None
        losses[f"{level}_s"] = contrastive_bound(r_s, y_s, M, V, args.tau)
        losses[f"{level}_t"] = contrastive_bound(r_t, y_t, M, V, args.tau)
        losses[f"own_{level}"], losses[f"other_{level}"] = cosines(r_t, y_t, M)
    L_feat = losses["feat_s"] + losses["feat_t"]  # SDCA-7
    L_out = losses["out_s"] + losses["out_t"]  # SDCA-8
    losses["loss"] = losses["sup"] + args.lambda_feat * L_feat + args.lambda_out * L_out  # SDCA-9
    return losses


# --- same in every method file ---
def segmentation_loss(logits, label):
    """Cross-entropy of logits (N, C, h, w), upsampled, against labels (N, H, W); mean over pixels not labelled 255.

    No valid pixel: a zero that is connected to the graph.
    """
    logits = common.upsample(logits.float(), label.shape[1:])  # (N, C, h, w) -> (N, C, H, W)
    loss = F.cross_entropy(logits, label, ignore_index=common.IGNORE, reduction="sum")
    return loss / (label != common.IGNORE).sum().clamp(min=1)


def poly_lr(base, step, steps, power=0.9):
    """The poly schedule: base * (1 - step / steps) ** power."""
    return base * (1 - step / steps) ** power


def make_optimizer(model, args):
    """SGD (momentum 0.9, weight decay 5e-4) or AdamW; `scale` remembers how much faster the classifier learns."""
    groups = [{"params": [p for p in model.backbone.parameters() if p.requires_grad], "scale": 1.0},
              {"params": list(model.classifier.parameters()), "scale": args.head_lr}]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.01, fused=args.device == "cuda")
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=5e-4, fused=args.device == "cuda")


def set_lr(optimizer, lr):
    """Gives every parameter group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def train_source(model, dataset, args, run, file, steps, lr, criterion=segmentation_loss):
    """Supervised training of `model` in place; keeps its checkpoints in `file` of the run folder, resumes from it."""
    network, optimizer = common.distribute(model, args), make_optimizer(model, args)
    start = run.load(file, model, optimizer=optimizer)
    model.train()
    for step, (image, label) in enumerate(common.training_batches(dataset, args, args.seed, start, steps), start + 1):
        set_lr(optimizer, poly_lr(lr, step - 1, steps))
        with common.autocast(args):
            _, logits = network(image)  # (N, 3, H, W) -> (N, C, h, w)
        loss = criterion(logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log_step("source", step, steps, lr=optimizer.param_groups[0]["lr"], loss=loss)
        if run.time_to_save(step, steps):
            run.save(file, step, model, optimizer=optimizer)
# --- end ---


# ==================================================== the training ====================================================


@torch.no_grad()
def collect_statistics(model, statistics, args, run):
    """Stage 2: fills {level: ClassStatistics} in one pass over the source, not augmented."""
    model.eval()
    for batch in common.evaluation_batches(common.source_dataset(args), args):
        with common.autocast(args):
            features, logits = model(batch["image"])  # (N, D, h, w), (N, C, h, w)
        y = common.grid_labels(batch["label"].to(args.device), logits.shape[2:]).flatten()  # (n,)
        for level, maps in (("feat", features), ("out", logits)):
            statistics[level].update(common.as_pixels(maps.float()), y)
    for level in statistics:
        statistics[level] = pooled(statistics[level])
        count = statistics[level].count
        run.log("statistics", level=level, pixels=count.sum().item(), classes=(count > 0).sum().item())


def adaptation_lr(base, step, steps, args):
    """Learning rate of step 1 .. steps: the ramp, times a poly schedule that would end after `horizon` x the steps."""
    return common.ramp(step, args) * poly_lr(base, step - 1, args.horizon * steps, args.power)


def adapt(model, source, target, args, run):
    """Stages 2 and 3: adapts `model` in place; returns the class statistics at the end. Checkpoints: sdca.pt."""
    if args.batch_norm != "live":
        common.settle_batch_norm(model, target, args)
    dims = {"feat": model.feature_dim, "out": len(common.task_classes(args.source))}
    statistics = {level: ClassStatistics(dims["out"], dim, args.device) for level, dim in dims.items()}
    network, optimizer, steps = common.distribute(model, args), make_optimizer(model, args), args.iterations
    start = run.load("sdca.pt", model, optimizer=optimizer, **statistics)
    if not statistics["out"].count.any():
        # Live batch norm still has the source's statistics here. In stage 3, too, each domain is normalised by its own.
        collect_statistics(model, statistics, args, run)
        common.settle_batch_norm(model, target, args)
        if run.scorable:
            run.log("before", **target_cosines(model, statistics, args))
        run.save("sdca.pt", 0, model, optimizer=optimizer, **statistics)

    batches_s = common.training_batches(source, args, common.mix_seed(args.seed, 4), start, steps, share=2)
    batches_t = common.training_batches(target, args, common.mix_seed(args.seed, 5), start, steps, share=2)
    model.train()
    for step, (x_s, y_s), (x_t, _) in zip(range(start + 1, steps + 1), batches_s, batches_t):
        set_lr(optimizer, adaptation_lr(args.lr, step, steps, args))
        losses = step_losses(network, statistics, x_s, y_s, x_t, args)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        run.log_step("adapt", step, steps, lr=optimizer.param_groups[0]["lr"], **losses)
        run.validate("adapt", step, steps, model, target)
        if run.time_to_save(step, steps):
            run.save("sdca.pt", step, model, optimizer=optimizer, **statistics)
    common.settle_batch_norm(model, target, args)
    run.save("sdca.pt", steps, model, optimizer=optimizer, **statistics)
    return statistics


def label_target(model, args, folder):
    """Stage 4: pseudo-labels of the target train images, written to `folder` as PNGs. Two passes, bounded memory.

    Returns what the log shows: the lowest and the highest threshold, and what common.write_pseudo_labels returns.
    """
    dataset = common.target_dataset(args, "train", labelled=args.source == "toy")  # the toy's truth is for the log
    histogram = sum(confidence_histogram(prob) for _, prob in common.predictions(model, dataset, args))
    thresholds = class_thresholds(common.all_sum(histogram), args.theta)
    labelled = ((batch, pseudo_labels(prob, thresholds)) for batch, prob in common.predictions(model, dataset, args))
    return {"theta_low": thresholds.min().item(), "theta_high": thresholds.max().item(),
            **common.write_pseudo_labels(folder, labelled, args)}


def train_ssl(model, args, run, labels):
    """Stage 5: trains `model` in place on target images with the pseudo-labels in a folder. Checkpoints: last.pt."""
    network, optimizer, steps = common.distribute(model, args), make_optimizer(model, args), args.ssl_iterations
    start = run.load("last.pt", model, optimizer=optimizer)
    target = common.target_dataset(args, "train", common.training_augment(args), label_dir=labels)
    batches = common.training_batches(target, args, common.mix_seed(args.seed, 6), start, steps)
    model.train()
    for step, (image, label) in enumerate(batches, start + 1):
        set_lr(optimizer, adaptation_lr(args.ssl_lr, step, steps, args))
        with common.autocast(args):
            _, logits = network(image)  # (N, C, h, w)
        loss = segmentation_loss(logits, label)  # SDCA-11
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log_step("ssl", step, steps, lr=optimizer.param_groups[0]["lr"], loss=loss)
        run.validate("ssl", step, steps, model, target)
        if run.time_to_save(step, steps):
            run.save("last.pt", step, model, optimizer=optimizer)
    common.settle_batch_norm(model, target, args)
    run.save("last.pt", steps, model, optimizer=optimizer)


# =================================================== meters (ours) ====================================================


@torch.no_grad()
def cosines(features, labels, mean):
    """What to watch instead of the bound (SDCA-12): means over the pixels of f.mu_y and of max_{k != y} f.mu_k."""
    similarity = F.normalize(features, dim=1) @ F.normalize(mean, dim=1).to(features).T  # (n, C)
    valid = labels != common.IGNORE
    y = torch.where(valid, labels, 0)[:, None]  # (n, 1)
    own, other = similarity.gather(1, y)[:, 0], similarity.scatter(1, y, -1.0).amax(1)  # (n,)
    return tuple(torch.where(valid, cosine, 0).sum() / valid.sum().clamp(min=1) for cosine in (own, other))


@torch.no_grad()
def target_cosines(model, statistics, args):
    """`cosines` of the target's validation pixels, by their true classes, with the source's class means."""
    model.eval()
    sums = {level: torch.zeros(3, dtype=torch.float64, device=args.device) for level in statistics}
    for batch in common.evaluation_batches(common.target_dataset(args, "val"), args):
        with common.autocast(args):
            features, logits = model(batch["image"])  # (N, D, h, w), (N, C, h, w)
        y = common.grid_labels(batch["label"].to(args.device), logits.shape[2:]).flatten()  # (n,)
        pixels = (y != common.IGNORE).sum()
        for level, maps in (("feat", features), ("out", logits)):
            own, other = cosines(common.as_pixels(maps.float()), y, statistics[level].mean)
            sums[level] += torch.stack([own * pixels, other * pixels, pixels])  # (3,)
    meters = {}
    for level, total in sums.items():
        own, other, pixels = common.all_sum(total).tolist()
        if pixels:
            meters.update({f"own_{level}": own / pixels, f"other_{level}": other / pixels})
    return meters


# ================================================= further deviations =================================================
# Numbered on from the docstring's.
#
#  6. Authors: whole images in stages 1 to 3, neither flipped nor scaled. Stage 3 jitters and blurs the source images,
#     and turns some grey. SSL trains on crops of 512x1024 from images of 1024x2048 scaled by 0.5 to 1.5, and for
#     ResNet-101 distorts them as stage 3 does. Here: scale, crop, flip and jitter for all methods, domains and stages.
#  7. Authors: max-pooling rounds sizes down, to 64x128 cells for 512x1024 pixels, and a cell's source label is that of
#     the pixel at its corner. Here: sizes are rounded up, to 65x129 cells, and the label is that of the pixel at the
#     cell's centre (common.grid_labels).
#  8. Authors: stage 1 has the Lovasz term. Here: the same, but a model of source_only.py (--init) was trained without.
#  9. Authors: a batch without a confident target pixel gives NaN. Here: a zero.
# 10. Authors: before July 2021 their code compared raw logits with delta, since then probabilities. Which of the two
#     made the published figures is unknown. Here: probabilities.
# 11. Authors: each GPU keeps statistics of its own. Here: the pixels of all processes are pooled in every step. Both
#     take losses as means over a process's own pixels.
# 12. Authors: statistics are not saved, and counts are float32. Here: they are part of sdca.pt, and counts are int64.
# 13. Authors: thresholds at 512x1024, labels at 1024x2048, all confidences in memory (about 19 GB). Here: both at
#     --size, by a histogram of 16,384 bins per class. So theta_k is too low by less than 2^-14, and never too high.
# 14. Authors: SSL models are scored at 1024x2048, the others at 512x1024. Here: all at --size (evaluate.py has a flag).
# 15. Authors: frozen batch norm has no epsilon. Here: it has.
# 16. Authors: VGG16 has Caffe's weights and reads BGR from 0 to 255. Here: torchvision's weights and normalised RGB.
# 17. Authors: as a reader says, the paper measures PDD, a discrimination distance of pixels. Its definition was not
#     available. Here: not measured. Our meters are the two cosines.
#
# setting                       authors                               real data, without --preset   here on the toy
# images per step, stage 1      8 source                              --batch-size 2                4
# images per step, stage 3      4 source, 4 target                    2 and 2                       4 and 4
# images per step, SSL          8 target                              2                             4
# colour jitter b, c, s, h      .5, .5, .5, .2 (stage 3, SSL)         .3, .3, .3, .05, all stages   the same
# steps and rate, stage 1       20,000 of 31,250 at 5e-4              60,000 at 2.5e-4              600 at 1e-3
# steps and rate, stage 3       40,000 of 62,500 at 2.5e-4            the same (--horizon 1.5625)   160 at 2e-4, to zero
# steps and rate, SSL           20,000 of 31,250 at 5e-4              the same                      80 at 2e-4, to zero
# optimizer, head's rate        SGD, x10                              the same, after --ramp 500    AdamW, x1, --ramp 40
# lambda_feat, lambda_out       1, 1                                  the same                      10, 10
#
# How strong is the pull? A rule of thumb that leaves out momentum and the network: (sum of rates) x lambda / tau. The
# authors take 40,000 steps at 2.5e-4, times 0.7, the mean of their decay: 7 x 1 / 100 = 0.07 (for the classifier ten
# times that). The toy takes 160 steps at 2e-4, times 0.42 because of ramp and decay: 0.0133 lambda / 100. Under SGD
# lambda = 530 would be as strong. But the toy has AdamW, which divides a gradient by its size, so that only the
# proportions of the losses count. There lambda = 100 is already too much: the pull then moves the source's
# representations as well, and the score falls.


def parse_args():
    parser = common.shared_parser(__doc__, adapts=True)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--iterations", type=common.natural, metavar="T", default=common.by_source(160, 40000, small=4000),
        help="steps of the contrastive adaptation [C]")
    add("--lr", type=common.positive, metavar="X", default=common.by_source(2e-4, 2.5e-4, small=5e-5),
        help="base learning rate of the adaptation [C]")
    add("--horizon", type=common.number(float, 1), metavar="X", default=common.by_source(1.0, 1.5625, small=1.0),
        help="end of the poly decay as a multiple of the steps: MAX / STOP [C]")
    add("--tau", type=common.positive, default=100.0, help="temperature [C]; at 1 or below the covariance counts")
    add("--delta", type=common.fraction, default=0.9, help="least confidence of a target pixel in the adaptation [C]")
    add("--lambda-lov", type=common.weight, default=0.75,
        help="weight of Lovasz-softmax on source, also in the warm-up [C]")
    add("--lambda-feat", type=common.weight, default=common.by_source(10.0, 1.0, small=10.0),
        help="weight of the bound on features [C]; 0 for none")
    add("--lambda-out", type=common.weight, default=common.by_source(10.0, 1.0, small=10.0),
        help="weight of the bound on logits [C]; 0 for none")
    add("--covariance", action=switch, default=True, help="use the variances; without them: centroid-aware")
    add("--ssl", action=switch, default=True, help="self-supervised training after the adaptation [P]")
    add("--theta", type=common.fraction, default=0.9, help="upper bound of the class thresholds in SSL [C]")
    add("--from-scratch-ssl", action=switch, default=common.by_source(False, True, small=False),
        help="start SSL from the backbone's weights [C]; else from the adapted model")
    add("--ssl-iterations", type=common.natural, metavar="T", default=common.by_source(80, 20000, small=2000),
        help="steps of SSL [C]")
    add("--ssl-lr", type=common.positive, metavar="X", default=common.by_source(2e-4, 5e-4, small=5e-5),
        help="base learning rate of SSL [C]")
    return common.parse(parser)


def main():
    args = parse_args()
    run = common.Run("sdca", args)
    source = common.source_dataset(args, common.training_augment(args, args.source_size))
    target = common.target_dataset(args, "train", common.training_augment(args))

    # Stage 1: the source-only model, trained here with SDCA-1 or given.
    model = common.build_model(args)
    if args.init:
        common.load_init(model, args, run)
    else:
        train_source(model, source, args, run, "source_only.pt", args.warmup_iterations, args.warmup_lr,
                     lambda logits, label: source_loss(logits, label, args.lambda_lov))

    # Stages 2 and 3: class statistics of the source, contrastive adaptation.
    statistics = adapt(model, source, target, args, run)
    before = next((line for line in run.logged() if line["stage"] == "before"), {})
    after = target_cosines(model, statistics, args) if run.scorable else {}
    meters = {f"{name}_{when}": cosine for when, values in (("before", before), ("after", after))
              for name, cosine in values.items() if name in after}

    # Stages 4 and 5: pseudo-labels by the adapted model, then training on them alone.
    if args.ssl:
        labels = run.folder / "pseudo_labels"
        if not (args.resume and (run.folder / "last.pt").exists()):
            run.log("pseudo-labels", **label_target(model, args, labels))
        if args.from_scratch_ssl:
            torch.manual_seed(common.mix_seed(args.seed, 8))  # the start does not depend on what was drawn before
            model = common.build_model(args)
        train_ssl(model, args, run, labels)
        models = {"SDCA, no SSL": common.load_model(run.folder / "sdca.pt", args), "SDCA": model}
    else:
        run.save("last.pt", args.iterations, model)
        models = {"SDCA": model}

    # Stage 6: all models on the target's validation split.
    common.compare_with_source_only(models, args, run, common.load_model(run.folder / "source_only.pt", args), **meters)


if __name__ == "__main__":
    common.run(main)
