"""SDCA: semantic distribution-aware contrastive adaptation of semantic segmentation.

    S. Li, B. Xie, B. Zang, C. H. Liu, X. Cheng, R. Yang, G. Wang, "Semantic Distribution-aware Contrastive Adaptation
    for Semantic Segmentation", 2021, arXiv 2105.05013. The authors' code: BIT-DA/SDCA at commit d00e7ba.

READ THIS FIRST. Of the paper only the first page (title, authors, abstract) was available; the equations below are
those of the authors' released code, and the two steps between the contrastive loss and its bound were worked out again.
Labels such as SDCA-5 are this project's own, the paper's equation numbers are unknown. Sentences, equations and the
real data's defaults carry their origin; the toy's defaults are ours:

    [P] stated by the paper's abstract       [C] the authors' code       [T] the authors in an issue thread
    [D] derived here, checked numerically

The idea in five sentences
--------------------------
1. A pixel should look like its class in both domains: its representation should lie near the *distribution* that its
   class has on the labelled source [P], for source pixels by their labels, for target pixels by confident predictions
   [C].
2. A contrastive loss over pixels does that: it pulls a pixel towards its class and away from all others [P].
3. Instead of drawing pairs of pixels, every class is described by mean and variance of all its source pixels [C], and
   the loss is taken over infinitely many pairs [P].
4. That loss has an upper bound [P] in closed form, as cheap as a linear classifier, and the bound is trained [C].
5. Self-supervised learning improves the result further [P]: the adapted network labels the target, and a network is
   trained on the labels it is sure of (SSL) [C].

The algorithm                                                              paper's notion -> function
-------------                                                              --------------------------
1. Source-only training with SDCA-1 [C], or --init.                        train_source, source_loss, lovasz_softmax
2. One pass over the clean source: class statistics of features and        collect_statistics, ClassStatistics
   logits, SDCA-10.
3. Contrastive adaptation on source and target images, SDCA-9:             adapt, step_losses
     source labels at the grid's cells, target labels by SDCA-13           common.grid_labels, online_labels
     statistics first, with the batch's source pixels, SDCA-10             pooled, ClassStatistics.merge
     then the bound for features and for logits, SDCA-4 to SDCA-8          contrastive_bound
4. One round of pseudo-labels for the target train images, SDCA-14.        label_target, class_thresholds, pseudo_labels
5. Self-supervised training on them alone, SDCA-11.                        train_ssl
6. Evaluate the last checkpoint, and the model before step 4 beside it.

Notation
--------
    N images   C classes (index k)   D dimension of a representation   n pixels   h x w feature grid (stride 8)
    r_i    representation of grid pixel i: backbone features (level feat) or logits (level out, D = C)
    f_i    r_i / |r_i|      y_i  label: truth (source) or confident prediction (target), 255 = ignore
    M_k, V_k, n_k   mean, variance per dimension and number of the *source* pixels of class k, over raw r
    mu_k   M_k / |M_k|      sigma_k  V_k / |V_k|: each row of the statistics has unit length in the loss [C]
    tau temperature   delta, theta_k confidence thresholds   J_k Jaccard index of class k   P softmax probabilities
    f'     f as a row      Sigma_k  covariance, diag(sigma_k)   up  upsampled to the label's size   e_(i)  i-th largest

Equations
---------
    SDCA-1   L_sup = CE(up(logits_s), y_s) + lambda_lov Lovasz(softmax(up(logits_s)), y_s)                      [C]
             Lovasz = mean over the classes in the batch of  sum_i e_(i) (Delta_i - Delta_{i-1}),  Delta_i = 1 - J_k
             if the i worst pixels were wrong, e = |1[y = k] - P(k)|, largest first   (Berman et al., arXiv 1705.08790)
    SDCA-2   l(f, y) = -mean_p log( a_p / (a_p + sum_{k != y} mean_j exp(f.m_kj / tau)) )                       [D]
             a_p = exp(f.m+_p / tau); pairs m+_p of the own class, m_kj of each other class; every class weighs the
             same, however frequent
    SDCA-3   l_inf = E_{m+ ~ y} log( exp(f.m+ / tau) + sum_{k != y} E_{m ~ k} exp(f.m / tau) ) - f.mu_y / tau   [D]
             infinitely many pairs [P]; class k is Gaussian, m ~ N(mu_k, Sigma_k), as the bound's form implies
    SDCA-4   z_k = f.mu_k / tau + f' Sigma_k f / (2 tau^2)            log of E_{m ~ k} exp(f.m / tau)           [C]
    SDCA-5   bound(f, y) = log sum_k exp(z_k) - f.mu_y / tau  =  CE(z, y) + f' Sigma_y f / (2 tau^2)  >=  l_inf [C]
             by Jensen's inequality on the logarithm [D]. Theirs is the second form, ours the first.
    SDCA-6   f' Sigma_k f = sum_d f_d^2 sigma_kd     diagonal [C], for want of memory [T]
    SDCA-7   L_feat = mean bound(source features, y_s) + mean bound(target features, y_t)                       [C]
    SDCA-8   L_out  = the same with logits and their own statistics; the same labels                            [C]
    SDCA-9   L = L_sup + lambda_feat L_feat + lambda_out L_out                                                  [C]
    SDCA-10  b pixels of class k in a batch, of mean m and variance v (divisor b), are pooled exactly, nothing is
             forgotten: w = b / (b + n_k),  V_k <- (1 - w) V_k + w v + w (1 - w) (M_k - m)^2 with the old M_k,
             M_k <- (1 - w) M_k + w m,  n_k <- n_k + b                                                          [C]
    SDCA-11  L_ssl = CE(up(logits_t), y_t) with stored pseudo-labels: target images only                        [C]
    SDCA-12  bound = log C - f.(mu_y - mean_k mu_k) / tau + O(1 / tau^2)                                        [D]
    SDCA-13  y_t = argmax_c P(c) at stride 8, 255 where max_c P(c) < delta; anew in every step                  [C]
    SDCA-14  y_t = argmax_c P(c) at full size, 255 where max_c P(c) < theta_{y_t}, theta_k = min(0.9, median of
             max_c P(c) over the target pixels predicted k), 0 if there are none; once, after the adaptation    [C]

What tau = 100 means, by SDCA-12 [D]
------------------------------------
Cosines of features behind a ReLU lie in [0, 1], so for 19 classes the bound on features lies between 2.9350 and 2.9539
whatever happens (2.7632 and 2.7820 for the toy's 16): its value says nothing. Watch instead `own_feat` (f.mu_y) against
`other_feat` (max_{k != y} f.mu_k), and the same for logits: in the log for confident target pixels, in result.json for
the validation pixels, before and after step 3. The covariance adds at most 5e-5: "distribution-aware" is numerically
"centroid-aware" (--no-covariance) unless tau is 1 or less.

How strong the pull is, by a rule of thumb that leaves out momentum and the network: about (sum of rates) x lambda /
tau. The authors' poly decay has a mean factor of about 0.7 over 40,000 steps at 2.5e-4: 7 x 1 / 100 = 0.07 (the
classifier ten times that). The toy's 160 steps at 2e-4, of which 40 are the ramp, have one of about 0.42: 0.0133 lambda
/ 100, so that under SGD lambda = 530 would be as strong. AdamW divides a gradient by its size, so that only the shares
of the losses count, and there 100 is already too much: the pull then moves the representations of the source as well,
and the score falls. The toy's default is 10.

Deviations, where they are more than settings
---------------------------------------------
 1. Authors: the best checkpoint of each of three stages by the target's validation labels. Here: always the last.
 2. Authors: whole images in stages 1 to 3, without flip or scale; source images of stage 3 are jittered, sometimes
    grey, and blurred; SSL crops from 1024x2048 scaled by 0.5 to 1.5, padded, and for ResNet-101 jitters, greys and
    blurs too. Here: the recipe of all methods for both domains in every training stage: scale, crop, flip, jitter.
 3. Authors: source images drawn by rare classes, p ~ 1 / log(1.01 + share). Here: every image once per epoch.
 4. Authors: stages 1 to 3 freeze batch norm (without epsilon), SSL trains it. Here: --batch-norm (with epsilon) for
    steps 2 to 5; only with --from-scratch-ssl is SSL like the warm-up, live unless frozen and pretrained.
 5. Authors: SSL starts from ImageNet weights. Here: the same on real data; on the toy and with --preset small from the
    adapted model, because from such a start so few steps are hopeless. One round [C], though the authors call several
    usual [T].
 6. Authors: a model of stage 1 has seen the Lovasz term. Here: ours too, but one of source_only.py (--init) has not.
 7. Authors: thresholds at 512x1024, labels at 1024x2048, all confidences in memory (about 19 GB). Here: both at
    --size; a histogram of 16,384 bins per class, so that theta_k is too low by less than 2^-14, never too high.
 8. Authors: each GPU keeps statistics of its own. Here: the pixels of all processes are pooled in every step. The
    losses are each process's own means, here and there.
 9. Authors: a batch without a confident target pixel gives NaN. Here: a zero. (Before July 2021 their code compared
    raw logits with delta; which form made the published figures is unknown.)
10. Authors: statistics are not saved and counts are float32. Here: they are part of sdca.pt, counts are int64.
11. Authors: max-pooling rounds down, 64x128 cells for 512x1024, and a cell's source label is the pixel at its corner.
    Here: it rounds up, 65x129 cells, and the label is the pixel at the cell's centre (common.grid_labels).
12. Authors: SSL models are scored at 1024x2048, the others at 512x1024. Here: all at --size (evaluate.py has a flag).
13. Authors: VGG16 has Caffe's weights and reads BGR from 0 to 255. Here: torchvision's weights and normalised RGB.
14. Authors: the paper's Sigma is a full matrix, says a reader, and it reports a PDD metric of unknown definition.
    Here: neither.

setting                       authors                               real data, without --preset   here on the toy
images per step, stage 1      8 source                              --batch-size 2                4
images per step, stage 3      4 source, 4 target                    2 and 2                       4 and 4
images per step, SSL          8 target                              2                             4
colour jitter b, c, s, h      .5, .5, .5, .2 (stage 3, SSL)         .3, .3, .3, .05, all stages   the same
steps and rate, stage 1       20,000 of 31,250 at 5e-4              60,000 at 2.5e-4              600 at 1e-3
steps and rate, stage 3       40,000 of 62,500 at 2.5e-4            the same (--horizon 1.5625)   160 at 2e-4, to zero
steps and rate, SSL           20,000 of 31,250 at 5e-4              the same                      80 at 2e-4, to zero
optimizer, head's rate        SGD, x10                              the same, after --ramp 500    AdamW, x1, --ramp 40
lambda_feat, lambda_out       1, 1                                  the same                      10, 10

With --raw-statistics f is normalised first, and M and V of f are used as they are (as in the authors' later SePiCo):
then the Gaussians are the data's own; normalised variances keep a class's profile but lose how wide it is [D].

Expect on the toy (mean of seeds 0 to 4; fp32): source only 32.7, with re-estimated batch norm 33.0, SDCA 35.3 mIoU and
16.7 of the rare classes (idea off 35.0, 15.8), before the SSL 35.5 (35.7); own and nearest other cosine of features
0.68 and 0.64 before, 0.71 and 0.60 after (idea off 0.67, 0.64); 5 minutes on one thread of an AVX2 core, 0.9 GB.

    python sdca.py                                              # toy world: all stages, table, picture
    python sdca.py --lambda-feat 0 --lambda-out 0               # the idea off: no contrastive loss, the same steps
    python sdca.py --no-ssl                                     # the contrastive adaptation alone
    python sdca.py --tau 0.5 --lambda-feat 1 --lambda-out 1     # a temperature at which the covariance counts ...
    python sdca.py --tau 0.5 --lambda-feat 1 --lambda-out 1 --no-covariance      # ... and without it: centroid-aware
    python sdca.py --source gta5 --data-root DIR --init runs/source_only-gta5-s0/last.pt
"""

import argparse

import torch
import torch.nn.functional as F

import common


# ================================================== the equations ==================================================


def contrastive_bound(features, labels, mean, variance=None, tau=100.0, normalise=True):
    """SDCA-5, nats: upper bound of the expected contrastive loss, mean over the pixels that are not 255. Scalar.

    features (n, D), labels (n,), mean (C, D), variance (C, D), or None for zero (centroid-aware). Gradients reach the
    features only. normalise: features and each row of mean and variance get unit length first, as in the authors' code;
    without it the equation is taken for what is given. A class without pixels (zeros) competes with the logit 0.
    No valid pixel: a zero that is connected to the graph.
    """
    f, mu = features, mean.detach().to(features)
    sigma = torch.zeros_like(mu) if variance is None else variance.detach().to(features)
    if normalise:
        f, mu, sigma = F.normalize(f, dim=1), F.normalize(mu, dim=1), F.normalize(sigma, dim=1)
    similarity = f @ mu.T / tau  # (n, D) @ (D, C) -> (n, C)
    z = similarity + f.square() @ sigma.T / (2 * tau**2)  # (n, C)  SDCA-4, SDCA-6
    valid = labels != common.IGNORE
    own = similarity.gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]  # (n,)  f.mu_y / tau
    bound = z.logsumexp(1) - own  # (n,)  SDCA-5
    return torch.where(valid, bound, 0).sum() / valid.sum().clamp(min=1)


class ClassStatistics:
    """SDCA-10: mean, variance (divided by n) and number of all pixels ever seen, for every class, exact.

    mean (C, D) and variance (C, D) are float64, count (C,) is int64: in float32 a counter stops at 2^24. A class
    without pixels has zeros. state_dict and load_state_dict make them a part of a checkpoint.
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
        batch = ClassStatistics(*self.mean.shape, features.device)
        member = labels[:, None] == torch.arange(len(self.count), device=labels.device)  # (n, C), 255: a row of False
        batch.count = member.sum(0)
        share = member.to(features) / batch.count.clamp(min=1)  # (n, C)
        m = share.T @ features  # (C, n) @ (n, D) -> (C, D)
        deviation = features - m[labels.clamp(max=len(m) - 1)]  # (n, D); ignored pixels have no share below
        batch.mean, batch.variance = m.double(), (share.T @ deviation.square()).double()  # (C, D)
        self.merge(batch)

    def merge(self, other):
        """Pools the pixels of `other` into these; the result does not depend on order or grouping."""
        # SDCA-10
        count = self.count + other.count
        w = (other.count.double() / count.clamp(min=1))[:, None]  # (C, 1)
        between = w * (1 - w) * (self.mean - other.mean).square()
        self.variance = (1 - w) * self.variance + w * other.variance + between
        self.mean = (1 - w) * self.mean + w * other.mean
        self.count = count

    def state_dict(self):
        return {"mean": self.mean, "variance": self.variance, "count": self.count}

    def load_state_dict(self, state):
        for name, value in self.state_dict().items():
            value.copy_(state[name])


@torch.no_grad()
def cosines(features, labels, mean):
    """What to watch instead of the bound (SDCA-12): means over the pixels of f.mu_y and of max_{k != y} f.mu_k."""
    similarity = F.normalize(features, dim=1) @ F.normalize(mean, dim=1).to(features).T  # (n, C)
    valid = labels != common.IGNORE
    y = torch.where(valid, labels, 0)[:, None]  # (n, 1)
    own, other = similarity.gather(1, y)[:, 0], similarity.scatter(1, y, -1.0).amax(1)  # (n,)
    return tuple(torch.where(valid, cosine, 0).sum() / valid.sum().clamp(min=1) for cosine in (own, other))


def lovasz_softmax(prob, label):
    """SDCA-1, second term: Lovasz extension of the Jaccard loss, mean over the classes that occur in the batch. Scalar.

    prob (N, C, H, W), label (N, H, W), 255 ignored.
    """
    p, y = common.as_pixels(prob), label.flatten()  # (n, C), (n,)
    total, present = 0, 0
    for k in range(p.shape[1]):
        truth = y == k  # (n,)
        errors = torch.where(y != common.IGNORE, (truth.to(p) - p[:, k]).abs(), 0)  # (n,); ignored pixels come last
        order = falling_order(errors.detach())
        e, truth = errors[order], truth[order]
        # Intersection and union of truth and prediction, after the i worst pixels have gone wrong. Delta in double
        # precision, because what counts are differences of numbers near 1.
        intersection = truth.sum() - truth.cumsum(0)  # (n,)
        union = truth.sum() + (~truth).cumsum(0)  # (n,)
        delta = 1 - intersection.double() / union  # (n,)
        growth = torch.diff(delta, prepend=delta.new_zeros(1)).to(p)  # (n,)  Delta_i - Delta_{i-1}
        total = total + truth.any() * (e * growth).sum()  # SDCA-1
        present = present + truth.any().long()
    return total / present.clamp(min=1)


def falling_order(values):
    """Indices (n,) of the values (n,) >= 0, largest first.

    The bits of such floats, read as integers, have the same order; a CPU sorts integers several times faster.
    """
    return values.view(torch.int64 if values.dtype == torch.float64 else torch.int32).argsort(stable=True).flip(0)


def online_labels(logits, delta):
    """SDCA-13: logits (N, C, h, w) -> labels (N, h, w), 255 where the probability is below delta. No gradient."""
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
    """Cross-entropy of logits (N, C, h, w), upsampled, against labels (N, H, W); mean over the pixels not 255.

    No valid pixel: a zero that is connected to the graph.
    """
    logits = common.upsample(logits.float(), label.shape[1:])  # (N, C, h, w) -> (N, C, H, W)
    loss = F.cross_entropy(logits, label, ignore_index=common.IGNORE, reduction="sum")
    return loss / (label != common.IGNORE).sum().clamp(min=1)


def poly_lr(base, step, steps, power=0.9):
    """The poly schedule: base * (1 - step / steps) ** power."""
    return base * (1 - step / steps) ** power


def make_optimizer(model, args):
    """SGD (momentum 0.9, weight decay 5e-4), Adam or AdamW; `scale` remembers how much faster the classifier learns."""
    groups = [{"params": [p for p in model.backbone.parameters() if p.requires_grad], "scale": 1.0},
              {"params": list(model.classifier.parameters()), "scale": args.head_lr}]
    kind, options = {"adamw": (torch.optim.AdamW, {"weight_decay": 0.01}),
                     "adam": (torch.optim.Adam, {"betas": (0.9, 0.99)}),
                     "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 5e-4})}[args.optimizer]
    return kind(groups, lr=0.0, fused=args.device == "cuda", **options)


def set_lr(optimizer, lr):
    """Gives every parameter group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def train_source(model, dataset, args, run, file, steps, lr, criterion=segmentation_loss):
    """Supervised training of `model` in place; keeps its checkpoints in `file` of the run folder and resumes there."""
    network, optimizer = common.distribute(model), make_optimizer(model, args)
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


def source_loss(logits, label, lambda_lov):
    """SDCA-1: cross-entropy and Lovasz-softmax of stride-8 logits (N, C, h, w) at the size of the labels (N, H, W)."""
    logits = common.upsample(logits.float(), label.shape[1:])  # (N, C, h, w) -> (N, C, H, W)
    loss = segmentation_loss(logits, label)  # which leaves them as they are
    if lambda_lov > 0:
        loss = loss + lambda_lov * lovasz_softmax(logits.softmax(1), label)
    return loss  # SDCA-1


def representations(maps, args):
    """Feature or logit maps (N, D, h, w) -> r (n, D); with --raw-statistics f, so that statistics are those of f."""
    r = common.as_pixels(maps.float())
    return F.normalize(r, dim=1) if args.raw_statistics else r


def pooled(statistics):
    """SDCA-10 over all processes: the ClassStatistics of everybody's pixels, by three sums. With one process a copy."""
    everybody = ClassStatistics(*statistics.mean.shape, statistics.mean.device)
    everybody.count = common.all_sum(statistics.count.clone())
    share = (statistics.count.double() / everybody.count.clamp(min=1))[:, None]  # (C, 1)
    everybody.mean = common.all_sum(share * statistics.mean)
    between = (statistics.mean - everybody.mean).square()
    everybody.variance = common.all_sum(share * (statistics.variance + between))
    return everybody


def step_losses(network, statistics, x_s, y_s, x_t, args):
    """SDCA-9: the terms of one step of the adaptation, of which "loss" is the total. The whole method, in its order.

    x_s, x_t (N, 3, H, W) source and target images, y_s (N, H, W). statistics: {"feat", "out": ClassStatistics} of the
    source so far, to which this batch is added. "kept" is the share of confident target pixels; for "own_.." and
    "other_.." see cosines.
    """
    with common.autocast(args):
        (features_s, logits_s), (features_t, logits_t) = network(x_s), network(x_t)  # (N, D, h, w), (N, C, h, w)
    losses = {"sup": source_loss(logits_s, y_s, args.lambda_lov)}  # SDCA-1

    y_s = common.grid_labels(y_s, logits_s.shape[2:]).flatten()  # (n,)
    y_t = online_labels(logits_t, args.delta).flatten()  # (n,)  SDCA-13
    losses["kept"] = (y_t != common.IGNORE).float().mean()
    for level, maps_s, maps_t in (("feat", features_s, features_t), ("out", logits_s, logits_t)):
        r_s, r_t = representations(maps_s, args), representations(maps_t, args)  # (n, D)
        batch = ClassStatistics(*statistics[level].mean.shape, r_s.device)
        batch.update(r_s, y_s)  # source pixels only
        statistics[level].merge(pooled(batch))  # SDCA-10, before the loss
        M, V = statistics[level].mean, statistics[level].variance if args.covariance else None
        losses[f"{level}_s"] = contrastive_bound(r_s, y_s, M, V, args.tau, normalise=not args.raw_statistics)
        losses[f"{level}_t"] = contrastive_bound(r_t, y_t, M, V, args.tau, normalise=not args.raw_statistics)
        losses[f"own_{level}"], losses[f"other_{level}"] = cosines(r_t, y_t, M)
    L_feat = losses["feat_s"] + losses["feat_t"]  # SDCA-7
    L_out = losses["out_s"] + losses["out_t"]  # SDCA-8
    losses["loss"] = losses["sup"] + args.lambda_feat * L_feat + args.lambda_out * L_out  # SDCA-9
    return losses


@torch.no_grad()
def collect_statistics(model, statistics, args, run):
    """Step 2: fills {level: ClassStatistics} in one pass over the source, not augmented."""
    model.eval()
    for batch in common.evaluation_batches(common.source_dataset(args), args):
        with common.autocast(args):
            features, logits = model(batch["image"])  # (N, D, h, w), (N, C, h, w)
        y = common.grid_labels(batch["label"].to(args.device), logits.shape[2:]).flatten()  # (n,)
        for level, maps in (("feat", features), ("out", logits)):
            statistics[level].update(representations(maps, args), y)
    for level in statistics:
        statistics[level] = pooled(statistics[level])
        count = statistics[level].count
        run.log("statistics", level=level, pixels=count.sum().item(), classes=(count > 0).sum().item())


@torch.no_grad()
def target_cosines(model, statistics, args):
    """The meter: `cosines` of the target's validation pixels with the source's class means, by their true classes."""
    model.eval()
    sums = {level: torch.zeros(3, dtype=torch.float64, device=args.device) for level in statistics}
    for batch in common.evaluation_batches(common.target_dataset(args, "val"), args):
        with common.autocast(args):
            features, logits = model(batch["image"])  # (N, D, h, w), (N, C, h, w)
        y = common.grid_labels(batch["label"].to(args.device), logits.shape[2:]).flatten()  # (n,)
        pixels = (y != common.IGNORE).sum()
        for level, maps in (("feat", features), ("out", logits)):
            own, other = cosines(representations(maps, args), y, statistics[level].mean)
            sums[level] += torch.stack([own * pixels, other * pixels, pixels])  # (3,)
    meters = {}
    for level, total in sums.items():
        own, other, pixels = common.all_sum(total).tolist()
        if pixels:
            meters.update({f"own_{level}": own / pixels, f"other_{level}": other / pixels})
    return meters


def adaptation_lr(base, step, steps, args):
    """Learning rate of step 1 .. steps: the ramp, then poly over `horizon` times the steps (authors: MAX / STOP)."""
    return common.ramp(step, args) * poly_lr(base, step - 1, args.horizon * steps, args.power)


def adapt(model, source, target, args, run):
    """Steps 2 and 3: adapts `model` in place; returns the class statistics at the end. Checkpoints: sdca.pt."""
    if args.batch_norm != "live":
        common.settle_batch_norm(model, target, args)
    dims = {"feat": model.feature_dim, "out": len(common.task_classes(args.source))}
    statistics = {level: ClassStatistics(dims["out"], dim, args.device) for level, dim in dims.items()}
    network, optimizer, steps = common.distribute(model), make_optimizer(model, args), args.iterations
    start = run.load("sdca.pt", model, optimizer=optimizer, **statistics)
    if not statistics["out"].count.any():
        # Live batch norm still has the source's statistics here: in step 3, too, each domain is normalised by its own.
        collect_statistics(model, statistics, args, run)
        common.settle_batch_norm(model, target, args)
        run.log("before", **target_cosines(model, statistics, args))
        run.save("sdca.pt", 0, model, optimizer=optimizer, **statistics)

    batches_s = common.training_batches(source, args, common.mix_seed(args.seed, 4), start, steps)
    batches_t = common.training_batches(target, args, common.mix_seed(args.seed, 5), start, steps)
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
    """Step 4: pseudo-labels of the target train images, written to `folder` as PNGs. Two passes, bounded memory.

    Returns what the log shows: the lowest and highest threshold and what common.write_pseudo_labels tells.
    """
    dataset = common.target_dataset(args, "train", labelled=args.source == "toy")  # the toy's truth is for the log
    histogram = sum(confidence_histogram(prob) for _, prob in common.predictions(model, dataset, args))
    thresholds = class_thresholds(common.all_sum(histogram), args.theta)
    labelled = ((batch, pseudo_labels(prob, thresholds)) for batch, prob in common.predictions(model, dataset, args))
    return {"theta_low": thresholds.min().item(), "theta_high": thresholds.max().item(),
            **common.write_pseudo_labels(folder, labelled, args)}


def train_ssl(model, args, run, labels):
    """Step 5: trains `model` in place on target images with the pseudo-labels in a folder. Checkpoints: last.pt."""
    network, optimizer, steps = common.distribute(model), make_optimizer(model, args), args.ssl_iterations
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


def parse_args():
    parser = common.shared_parser(__doc__, adapts=True)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--iterations", type=common.natural, metavar="T", default=common.by_source(160, 40000, small=4000),
        help="steps of the contrastive adaptation [C]")
    add("--lr", type=common.positive, metavar="X", default=common.by_source(2e-4, 2.5e-4, small=5e-5),
        help="its base learning rate [C]")
    add("--horizon", type=common.number(float, 1), metavar="X", default=common.by_source(1.0, 1.5625, small=1.0),
        help="end of the poly decay as a multiple of the steps: MAX / STOP [C]")
    add("--tau", type=common.positive, default=100.0, help="temperature [C]; below 1 the covariance counts")
    add("--delta", type=common.fraction, default=0.9, help="least confidence of a target pixel in the adaptation [C]")
    add("--lambda-lov", type=common.weight, default=0.75,
        help="weight of Lovasz-softmax on source, also in the warm-up [C]")
    add("--lambda-feat", type=common.weight, default=common.by_source(10.0, 1.0, small=10.0),
        help="weight of the bound on features [C]; 0 for none")
    add("--lambda-out", type=common.weight, default=common.by_source(10.0, 1.0, small=10.0),
        help="weight of the bound on logits [C]; 0 for none")
    add("--covariance", action=switch, default=True, help="without: zero covariance, centroid-aware")
    add("--raw-statistics", action=switch, default=False,
        help="use statistics as they are, those of normalised features")
    add("--ssl", action=switch, default=True, help="self-supervised training after the adaptation [P]")
    add("--theta", type=common.fraction, default=0.9, help="upper bound of its pseudo-labels' class thresholds [C]")
    add("--from-scratch-ssl", action=switch, default=common.by_source(False, True, small=False),
        help="start it from the backbone's weights [C]; else from the adapted model")
    add("--ssl-iterations", type=common.natural, metavar="T", default=common.by_source(80, 20000, small=2000),
        help="its steps [C]")
    add("--ssl-lr", type=common.positive, metavar="X", default=common.by_source(2e-4, 5e-4, small=5e-5),
        help="its base learning rate [C]")
    return common.parse(parser)


def main():
    args = parse_args()
    if args.backbone == "vgg16-fcn8s":
        raise common.InputError("--backbone vgg16-fcn8s: SDCA needs features and logits on one grid, DeepLabV2's")
    run = common.Run("sdca", args)
    source = common.source_dataset(args, common.training_augment(args, args.source_size))
    target = common.target_dataset(args, "train", common.training_augment(args))

    # Step 1: the source-only model, trained here with SDCA-1 or given.
    model = common.build_model(args)
    if args.init:
        common.load_init(model, args, run)
    else:
        train_source(model, source, args, run, "source_only.pt", args.warmup_iterations, args.warmup_lr,
                     lambda logits, label: source_loss(logits, label, args.lambda_lov))

    # Steps 2 and 3: class statistics of the source, contrastive adaptation.
    statistics = adapt(model, source, target, args, run)
    before = next((line for line in run.logged() if line["stage"] == "before"), {})
    after = target_cosines(model, statistics, args)
    meters = {f"{name}_{when}": cosine for when, values in (("before", before), ("after", after))
              for name, cosine in values.items() if name in after}

    # Steps 4 and 5: pseudo-labels by the adapted model, then training on them alone.
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

    # Step 6: all models on the target's validation split.
    common.compare_with_source_only(models, args, run, common.load_model(run.folder / "source_only.pt", args), **meters)


if __name__ == "__main__":
    common.run(main)
