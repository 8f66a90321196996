"""DRSL: distribution regularized self-supervised learning for domain adaptation of semantic segmentation.

    J. Iqbal, H. Rawal, R. Hafiz, Y.-T. Chi, M. Ali, "Distribution Regularized Self-Supervised Learning for Domain
    Adaptation of Semantic Segmentation", Image and Vision Computing, 2022, arXiv 2206.09683.

READ THIS FIRST. This file is DRSL-style, *reconstructed from the paper's abstract*, and not a reproduction. No official
code was found, and of the paper only title, abstract, keywords, the caption of Figure 1 and the header of its project
page were available. Labels such as DRSL-6 are this project's own, since the paper's equation numbers are unknown. No
mIoU of the paper is quoted, because none was found. Equations, steps and flags (at full size) carry their origin:
    [P] stated by the paper (abstract, keywords, Fig. 1)     [R] RepMet (arXiv 1806.04728), the likely ancestor
    [F] field convention (AdaptSegNet, DeepLab, CBST, CRST)  [I] inferred for this reconstruction
    [U] unknown: a choice of ours
RepMet classifies boxes by their distance to several learned centres of each class. For CBST and CRST see below.

The idea in five sentences [P]
------------------------------
1. Cross-entropy learns only what separates classes from one another, and under a domain shift that boundary is
   misaligned on the target, so the labels that the network gives there (pseudo-labels) are noisy.
2. DRSL also models the variation *inside* a class, as a distribution of pixels with several modes (class-aware
   multi-modal distribution learning, MMDL), so that the features tell more and the pseudo-labels have less noise.
3. Two heads share one base network: the segmentation head learns by cross-entropy on pseudo-labels, and the
   multi-modal head by a distance metric learning loss over pseudo-labels.
4. The metric loss flows back into the shared network and regularizes it.
5. Stochastic mode alignment reduces the distance between target and source pixels that map to the same mode.

Plain self-training (--plain), the method without modes
-------------------------------------------------------
The network labels the target's images itself, trains on the labels of which it is sure as if they were true, and labels
again. Each class keeps the same share of the pixels predicted as it, lest the easy classes give all the labels. This is
class-balanced self-training (CBST, arXiv 1810.07911): DRSL-1, -2 and -14 to -16. Below, "CRST" is the code of its
successor, confidence regularized self-training (arXiv 1908.09822). That DRSL builds on CBST is inferred [I].
The weakness of self-training: a confident label can be wrong. Training on it makes the network surer of it, and the
next round keeps it again.

Notation
--------
    N images   C classes (index c)   K modes per class (index k)   n pixels   E embedding size   H x W image
    h x w   grid of the features, of D channels each        mode  one of the K clusters of a class's pixels
    y_i     ground truth (source) or pseudo-label (target) of pixel i, 255 = ignore      V  pixels with y_i != 255
    P_i(c)  probability of class c at pixel i, by the segmentation head      tau_c  threshold of class c
    e_i     embedding of pixel i, unit length       R_ck   representative (centre) of mode k of class c, unit length
    d2_ck   squared distance |e - R_ck|^2 = 2 - 2 <e, R_ck>, in [0, 4]      sigma  common width of all modes
    m_i     mode of pixel i inside its class        q_ik   share of pixel i that mode k of its class gets
    epsilon  softness of q: near 0 one mode gets all of a pixel      alpha  margin
    A  modes with pixels of both domains    M  pairs of pixels per mode    lambda_*, w_own  weights
    ^s, ^t  of the source, of the target    [x]_+ = max(x, 0)
    look    how a thing of the toy is drawn: three ways per class. What is common in one domain is rare in the other.

Equations
---------
    DRSL-1   L_seg^s = -(1/|V^s|) sum_{i in V^s} log P_i(y_i)                                 kind [P], form [F]
    DRSL-2   L_seg^t = the same on the target with pseudo-labels                              kind [P], form [F]
    DRSL-3   p_ck(e) = exp(-d2_ck(e) / (2 sigma^2)), up to a constant, with one sigma and equal weights      [R]
    DRSL-4   P_mm(c|e) = sum_k p_ck / sum_{c',k'} p_c'k'                                                     [R]
    DRSL-5   L_mmce = -mean_i log P_mm(y_i | e_i)                                                            [R]
    DRSL-6   L_marg = mean_i [ d2_{y_i m_i} - min_{c != y_i, k} d2_ck + alpha ]_+         RepMet: m_i by DRSL-8 [R]
    DRSL-7   L_mm = L_marg + L_mmce + w_own L_own    L_marg + L_mmce [R], w_own L_own [U]
             on the target "over pseudo-labels" [P], on the source with the ground truth [I]
    DRSL-8   m_i = argmin_k d2_{y_i k}(e_i)          the nearest mode [U], inside the class [P]          --no-balance
    DRSL-9A  L_sma = (1/|A|) sum_{(c,k) in A} (1/M) sum_{j=1..M} |e^s_{a_j} - e^t_{b_j}|^2    kind [P], form [U]
             a_j, b_j: a random source and a random target pixel of the mode, with replacement. A source pixel's mode
             is m_i, a target pixel's is that of DRSL-19. The alignment moves both domains [U].
    DRSL-10  L = L_seg^s + lambda_t L_seg^t + lambda_mm (L_mm^s + L_mm^t) + lambda_sma L_sma  form [I], weights [U]
    DRSL-14  tau_c = the j-th largest confidence of the n_c target pixels predicted as c, j = floor(portion n_c),
             or 1 if j = 0                                                                             CBST  [F]
    DRSL-15  y_i = argmax_c P_i(c)/tau_c, kept if P_i(y_i)/tau_{y_i} >= 1, else 255                          [F]
    DRSL-16  portion of the next round = min(portion + portion_step, portion_max)                            [F]
    DRSL-17  q_ik = exp(-d2_{y_i k}(e_i) / epsilon), divided by its sum over k. Then three times: q_ik is divided by
             its sum over all pixels of the class y_i, and by its sum over k. m_i = argmax_k q_ik            [U]
    DRSL-18  L_own = -mean_i log [ p_{y_i m_i} / sum_k p_{y_i k} ]                                           [U]
    DRSL-19  the mode to which any target pixel maps: argmin_{c,k} d2_ck                      --align-over all [U]
    DRSL-20  effective modes of class c = exp(-sum_k s_ck log s_ck), s_ck: share of mode k in c's pixels   (a meter)

The gap is on purpose: DRSL-9B to -9D and -11 to -13 are alternatives that were left out, named above parse_args. No
gradient flows through m, q and pseudo-labels.

Why are the modes balanced? With DRSL-8 alone, a mode that is nearest to most pixels is pulled to still more of them. On
the toy every class is left with one mode after a few hundred steps, and there is no multi-modal distribution to learn
from. DRSL-17 is Sinkhorn's algorithm, which draws the modes of a class towards equal shares of its pixels. Three rounds
of it nearly get there where modes lie close together. Modes that lie far apart stay as unequal as their clusters.

The algorithm                                                             paper's notion -> function
-------------                                                             --------------------------
1. Source-only training [F], or --init.                                   train_source
2. Mode warm-up on source [I]: for --head-iterations the head learns      train_modes
   and the network stands still, then k-means per class sets R.           kmeans_modes
3. --iterations steps of the network, as many as with --plain: first      step_losses
   --joint-iterations on source alone, L_seg^s + lambda_mm L_mm^s [I],
   then rounds [F]. A round labels the target train images,               label_target, class_thresholds,
   class-balanced (DRSL-14 to -16), and trains on both domains, DRSL-10:  pseudo_labels
     segmentation head, DRSL-1, -2                                        segmentation_loss
     multi-modal head, its e and d2                                       ModeHead
     multi-modal distribution learning, DRSL-7:                           mode_loss
       DRSL-3 to -5, DRSL-6, DRSL-18                                      mode_cross_entropy, margin_loss,
                                                                          own_mode_cross_entropy
     mode assignment, DRSL-8, -17, -19                                    assign_modes, balanced_assignment,
                                                                          nearest_modes
     stochastic mode alignment, DRSL-9A                                   stochastic_mode_alignment
4. Evaluate the last checkpoint. The multi-modal head is dropped: it only regularizes [I].

Choices that change the method, where the sources are silent or differ (the rest: above parse_args)
---------------------------------------------------------------------------------------------------
1. Mode of a pixel. RepMet: the nearest of its class. Here: balanced (DRSL-17), and L_own pulls to that mode.
2. Pixels of the mode losses. Paper: not known. Here: up to --pixels random ones per class and image (balanced_labels).
3. Pixels of the alignment. Paper: not known. Here: on the source those of the mode losses, on the target all, with or
   without a pseudo-label (--align-over all).
4. Not here: features that are "explicitly disentangled" (both heads read the same ones, and nothing but L_mm asks for
   the variation inside a class). The margins over other methods, 2.3 and 2.5 points on SYNTHIA [P], were never tested.

    setting                        RepMet or CRST      here
    sigma                          0.5                 0.3: L_mmce can reach 0.0008; at 0.5 only 0.67 (orthogonal R)
    K, E                           5, 256              3, 256 (toy 64)
    scale of the training images   0.5 to 1.5          1 to 1.5, colour jitter (toy: no scaling)
    lambda_mm, lambda_sma, M       no counterpart      0.3, 1, 64

Expect on the toy (mean over the README's eight worlds ± standard error): source only 30.8, + BN target 31.7,
plain self-training 34.2, DRSL 34.5 mIoU, a gain of 0.4 ± 0.4 over plain self-training. It takes 4 minutes on two idle
AVX2 cores, warm-up included, and 0.9 GB. Three modes score what one does (0.0 ± 0.1 apart), so several modes gain
nothing: on this toy they are mostly parts of things that both domains share, not looks. That the labels of the last
round are less noisy, as the abstract says, is hardly seen: 5.7 % of them are wrong with three modes, 5.4 % with one,
and 5.8 % in plain self-training (0.2 ± 0.4 and 0.4 ± 0.4 fewer).

    python drsl.py                                                # toy world: warm-up, two rounds, table, picture
    python drsl.py --plain                                        # plain self-training, in runs/plain-toy-s0
    python drsl.py --lambda-mm 0 --lambda-sma 0                   # the idea off, everything else the same
    python drsl.py --modes 1                                      # one mode per class
    python drsl.py --source synthia --data-root DIR --init runs/source_only-synthia-s0/last.pt
"""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

import common


# ================================================== the equations ==================================================


class ModeHead(nn.Module):
    """The multi-modal head: embeds pixels on the unit sphere and holds the K representatives of each class.

    The layers are inferred [I], and so is that they read the very features that the segmentation head reads. RepMet has
    two hidden layers of 1024 units on detected boxes, and E = 256. Unit length is RepMet's [R].
    """

    def __init__(self, feature_dim, num_classes, modes=3, embedding=256):
        super().__init__()
        self.project = nn.Sequential(nn.Conv2d(feature_dim, 256, 1, bias=False), nn.GroupNorm(32, 256), nn.ReLU(),
                                     nn.Conv2d(256, embedding, 1))
        self.representatives = nn.Parameter(F.normalize(torch.randn(num_classes, modes, embedding), dim=2))

    def forward(self, features, distances=False):
        """(N, D, h, w) -> embeddings (N, E, h, w) of unit length and, with `distances`, d2 (n, C, K) of all pixels.

        d2 is computed in here because DistributedDataParallel averages the gradients of what goes through `forward`.
        """
        e = F.normalize(self.project(features), dim=1)
        return (e, self.squared_distances(common.as_pixels(e))) if distances else e

    def squared_distances(self, e):
        """Unit vectors (n, E) -> d2 (n, C, K) in [0, 4]: |e - R|^2 = 2 - 2 <e, R>. R is normalised on use."""
        R = F.normalize(self.representatives, dim=2).flatten(0, 1)  # (C, K, E) -> (C K, E)
        d2 = (2 - 2 * e @ R.T).clamp(min=0)  # (n, C K), clamped because rounding may give -1e-7
        return d2.view(len(e), *self.representatives.shape[:2])  # (n, C, K)


def mean_over_valid(values, labels):
    """Mean of values (n,) over the pixels whose label is not 255, or a zero connected to the graph if all are."""
    valid = labels != common.IGNORE
    return torch.where(valid, values, 0).sum() / valid.sum().clamp(min=1)


def own_class(d2, labels):
    """d2 (n, C, K) -> distances (n, K) to the modes of each pixel's own class. Without meaning where labels are 255."""
    y = torch.where(labels == common.IGNORE, 0, labels)
    return d2[torch.arange(len(d2), device=d2.device), y]


def mode_cross_entropy(d2, labels, sigma):
    """DRSL-5 in nats, all in log space: cross-entropy of the class posterior P_mm that the modes imply.

    d2 (n, C, K), labels (n,), 255 ignored.
    """
    # DRSL-3
    z = -d2 / (2 * sigma**2)  # log p_ck, (n, C, K)
    # DRSL-4
    logits = z.logsumexp(2)  # log of the numerator, (n, C). The cross-entropy divides by the sum over classes
    # DRSL-5
    return mean_over_valid(F.cross_entropy(logits, labels, ignore_index=common.IGNORE, reduction="none"), labels)


def margin_loss(d2, labels, alpha, modes=None):
    """DRSL-6: the pixel's own mode must be nearer than any mode of another class, by alpha in squared distance.

    d2 (n, C, K), labels (n,), 255 ignored. modes (n,): every pixel's own mode m, the nearest of its class if not given.
    Of the modes only this one and the nearest foreign one get a gradient, so modes can specialise.
    """
    y = torch.where(labels == common.IGNORE, 0, labels)[:, None]  # (n, 1)
    modes = assign_modes(d2, labels) if modes is None else modes
    own = own_class(d2, labels).gather(1, modes[:, None])[:, 0]  # (n,)
    impostor = d2.min(2).values.scatter(1, y, math.inf).min(1).values  # (n,)
    # DRSL-6
    return mean_over_valid(F.relu(own - impostor + alpha), labels)


def own_mode_cross_entropy(d2, labels, modes, sigma):
    """DRSL-18 in nats: cross-entropy towards mode m among the K modes of the own class. Exactly 0 if K = 1.

    d2 (n, C, K), labels (n,), 255 ignored, modes m (n,).
    """
    z = -own_class(d2, labels) / (2 * sigma**2)  # (n, K)
    # DRSL-18
    return mean_over_valid(F.cross_entropy(z, modes, reduction="none"), labels)


def assign_modes(d2, labels):
    """DRSL-8: index (n,) of the nearest mode inside the pixel's own class. Without meaning where labels are 255."""
    # DRSL-8
    return own_class(d2, labels).argmin(1)


def balanced_assignment(d2_own, labels, num_classes, epsilon=0.05, iterations=3):
    """DRSL-17: q (n, K), the share of each pixel that each mode of its class gets; all modes get about equal sums.

    d2_own (n, K): distances to the modes of the own class, labels (n,), 255 ignored. Sinkhorn's algorithm, for all
    classes at once: in turn every mode is scaled to the same mass and every pixel to a sum of 1. No gradient.
    """
    member = (labels[:, None] == torch.arange(num_classes, device=labels.device)).to(d2_own)  # (n, C)
    # DRSL-17
    q = (-d2_own.detach() / epsilon).softmax(1)  # (n, K)
    for _ in range(iterations):
        mass = member.T @ q  # (C, K): what every mode has
        q = q / (member @ mass).clamp(min=1e-30)  # now every mode has 1 (a pixel labelled 255 has no class)
        q = q / q.sum(1, keepdim=True)  # now every pixel has 1
    return q


def nearest_modes(d2):
    """DRSL-19: class (n,) and mode (n,) of the nearest of all C K modes. d2 (n, C, K)."""
    # DRSL-19
    nearest = d2.flatten(1).argmin(1)  # (n, C K) -> (n,)
    return nearest // d2.shape[2], nearest % d2.shape[2]


def stochastic_mode_alignment(e_s, labels_s, modes_s, e_t, labels_t, modes_t, pairs=64, generator=None, *, shape):
    """DRSL-9A: mean squared distance of random pairs, a source and a target pixel of the same (class, mode).

    e (n, E), labels (n,), 255 ignored, modes (n,), shape (C, K). Exactly 0 if the domains share no mode. All modes are
    computed at once. tests/benchmark.py has the textbook form, a loop over the shared ones.
    """
    if len(e_s) == 0 or len(e_t) == 0:
        return 0 * (e_s.sum() + e_t.sum())
    C, K = shape
    mode = torch.arange(C * K, device=e_s.device)[:, None]  # (C K, 1): number c K + k of every mode
    of_s, of_t = labels_s * K + modes_s == mode, labels_t * K + modes_t == mode  # (C K, n): its pixels, no 255
    A = of_s.any(1) & of_t.any(1)  # (C K,)
    # A mode outside A draws from all pixels, and what it draws does not count.
    a, b = (torch.multinomial((of | ~A[:, None]).float(), pairs, replacement=True, generator=generator)
            for of in (of_s, of_t))  # (C K, M)
    distance = (e_s[a] - e_t[b]).square().sum(2).mean(1)  # (C K, M, E) -> (C K,)
    # DRSL-9A
    return torch.where(A, distance, 0).sum() / A.sum().clamp(min=1)


def class_thresholds(confidence, label, num_classes, portion):
    """DRSL-14: tau (C,), the confidence that the surest `portion` of the pixels predicted as each class reaches.

    confidence (n,) in [0, 1], label (n,) predicted classes. A class that may keep no pixel gets 1.
    """
    tau = torch.ones(num_classes, dtype=confidence.dtype, device=confidence.device)
    for c in range(num_classes):
        falling = confidence[label == c].sort(descending=True).values  # (n_c,)
        place = int(portion * len(falling) + 1e-6)  # floor, with 1e-6 so that 0.29 * 100 is 29
        if place > 0:
            # DRSL-14
            tau[c] = falling[place - 1]
    return tau


def pseudo_labels(prob, thresholds):
    """DRSL-15: (N, C, H, W) probabilities -> (N, H, W) labels, 255 where even the best class misses its threshold."""
    # DRSL-15
    ratio, label = (prob / thresholds.view(1, -1, 1, 1)).max(1)  # (N, H, W)
    return torch.where(ratio >= 1, label, common.IGNORE)


def kmeans_modes(e, labels, representatives, iterations=10):
    """Spherical k-means inside every class: (C, K, E) unit vectors from which the representatives start [I].

    e (n, E) unit vectors, labels (n,). The first centre is the pixel nearest to the class mean, each further one the
    pixel farthest from all centres so far. A class with fewer than K pixels keeps its rows of `representatives`.
    """
    C, K, _ = representatives.shape
    R = F.normalize(representatives, dim=2)
    for c in range(C):
        x = e[labels == c]  # (n_c, E)
        if len(x) < K:
            continue
        centres = x[(x @ x.mean(0)).argmax()][None]  # (1, E)
        while len(centres) < K:
            centres = torch.cat([centres, x[(x @ centres.T).amax(1).argmin()][None]])
        for _ in range(iterations):
            nearest = F.one_hot((x @ centres.T).argmax(1), K).to(x)  # (n_c, K)
            sums = nearest.T @ x  # (K, E), the directions of the means
            centres = torch.where(nearest.sum(0)[:, None] > 0, F.normalize(sums, dim=1), centres)  # an empty mode stays
        R[c] = centres
    return R


def balanced_labels(label, size, limit, u):
    """Labels (N, h, w) of which at most `limit` per class and image remain, lest road and building dominate [U].

    label (N, H, W) is brought to the grid `size` = (h, w) by the pixel at each cell's centre. u (N, h, w) are random
    numbers below 1. Of each class in each image the pixels with the smallest ones are kept, the others become 255.
    """
    label = common.grid_labels(label, size)  # (N, h, w)
    image = torch.arange(len(label), device=label.device).view(-1, 1, 1)
    group = (256 * image + label).flatten()
    order = (group + u.flatten().double()).argsort()  # by group and, because u is below 1, by u inside it
    group = group[order]
    place = torch.arange(len(group), device=label.device) - torch.searchsorted(group, group)  # inside its own group
    place = torch.empty_like(place).scatter(0, order, place).view_as(label)  # back to the pixels
    return torch.where(place < limit, label, common.IGNORE)


# ================================================= a training step ==================================================


def embed(head, features, label, args, generator):
    """The pixels of features (N, D, h, w) as the mode losses see them: e (n, E), d2 (n, C, K) and labels y (n,).

    label (N, H, W). y is 255 where a pixel has no label or is not among the --pixels drawn.
    """
    e, d2 = head(features.float(), distances=True)  # (N, E, h, w), (n, C, K)
    u = torch.rand(e[:, 0].shape, generator=generator, device=e.device)  # (N, h, w)
    y = balanced_labels(label, e.shape[2:], args.pixels, u).flatten()  # (N, H, W) -> (n,)
    return common.as_pixels(e), d2, y


def own_modes(d2, y, args):
    """m (n,), the mode of its own class to which each pixel is pulled: by DRSL-17, with --no-balance by DRSL-8."""
    if not args.balance:
        return assign_modes(d2, y)
    return balanced_assignment(own_class(d2, y), y, d2.shape[1], args.epsilon).argmax(1)


def mode_loss(d2, y, m, args):
    """L_mm of one domain's pixels: d2 (n, C, K), labels y (n,), own modes m (n,)."""
    # DRSL-7
    return (margin_loss(d2, y, args.alpha, m) + mode_cross_entropy(d2, y, args.sigma)
            + args.w_own * own_mode_cross_entropy(d2, y, m, args.sigma))


def step_losses(network, head, source, target, args, generator):
    """The terms of DRSL-10 by name, ce_s, ce_t, mm_s, mm_t and sma, and their weighted sum "loss".

    source, target: (images, labels), on the target pseudo-labels. A joint step has no target, and so only the terms of
    the source. Plain self-training has no head, and so only the two cross-entropies.
    """
    with common.autocast(args):
        features_s, logits_s = network(source[0])  # (N, 3, H, W) -> (N, D, h, w), (N, C, h, w)
    # DRSL-1
    ce_s = segmentation_loss(logits_s, source[1])
    if target is None:
        _, d2_s, y_s = embed(head, features_s, source[1], args, generator)
        mm_s = mode_loss(d2_s, y_s, own_modes(d2_s, y_s, args), args)  # DRSL-7
        # DRSL-10, its source terms
        return {"loss": ce_s + args.lambda_mm * mm_s, "ce_s": ce_s, "mm_s": mm_s}

    with common.autocast(args):
        features_t, logits_t = network(target[0])
    # DRSL-2
    ce_t = segmentation_loss(logits_t, target[1])
    if head is None:  # DRSL-10 without modes
        return {"loss": ce_s + args.lambda_t * ce_t, "ce_s": ce_s, "ce_t": ce_t}

    # Both domains are balanced together, so that a mode may have most of its pixels in one of them.
    e, d2, y = embed(head, torch.cat([features_s, features_t]), torch.cat([source[1], target[1]]), args, generator)
    m = own_modes(d2, y, args)
    (e_s, e_t), (d2_s, d2_t), (y_s, y_t), (m_s, m_t) = (both.chunk(2) for both in (e, d2, y, m))
    mm_s, mm_t = mode_loss(d2_s, y_s, m_s, args), mode_loss(d2_t, y_t, m_t, args)  # DRSL-7

    if args.align_over == "all":
        y_t, m_t = nearest_modes(d2_t)  # DRSL-19
    # DRSL-9A
    sma = stochastic_mode_alignment(e_s, y_s, m_s, e_t, y_t, m_t, args.pairs, generator, shape=d2.shape[1:])

    # DRSL-10
    loss = ce_s + args.lambda_t * ce_t + args.lambda_mm * (mm_s + mm_t) + args.lambda_sma * sma
    return {"loss": loss, "ce_s": ce_s, "ce_t": ce_t, "mm_s": mm_s, "mm_t": mm_t, "sma": sma}


# =================================================== the training ===================================================


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


def make_optimizer_with_modes(model, head, args):
    """The shared groups and two more at the network's own rate: the head's layers [U], and R as in RepMet [R].

    R is normalised on use and has no weight decay.
    """
    optimizer = make_optimizer(model, args)
    if head is None:  # plain self-training
        return optimizer
    optimizer.add_param_group({"params": list(head.project.parameters()), "scale": 1.0})
    optimizer.add_param_group({"params": [head.representatives], "scale": 1.0, "weight_decay": 0.0})
    return optimizer


def train_modes(model, source, args, run):
    """Step 2: a new head with modes of the source classes, before any pseudo-label exists [I]. Checkpoints: modes.pt.

    For --head-iterations the head learns from L_mm^s while the network stands still. Then k-means places the modes.
    """
    torch.manual_seed(common.mix_seed(args.seed, 7))  # the head's start does not depend on what was drawn before
    head = ModeHead(model.feature_dim, len(common.task_classes(args.source)), args.modes, args.embedding)
    head.to(args.device)
    optimizer, steps = make_optimizer_with_modes(model, head, args), args.head_iterations
    start = run.load("modes.pt", model, optimizer=optimizer, head=head)
    mode_head = common.distribute(head, args)
    model.train()
    batches = common.training_batches(source, args, common.mix_seed(args.seed, 1), start, steps)
    for step, (image, label) in enumerate(batches, start + 1):
        set_lr(optimizer, args.warmup_lr)
        with torch.no_grad(), common.autocast(args):
            features, _ = model(image)
        _, d2, y = embed(mode_head, features, label, args, common.generator(args, 2, step))
        mm_s = mode_loss(d2, y, own_modes(d2, y, args), args)
        optimizer.zero_grad()
        mm_s.backward()
        optimizer.step()
        run.log_step("modes", step, steps, lr=optimizer.param_groups[0]["lr"], mm_s=mm_s)
        if step == steps:
            place_modes(model, head, source, args)
        if run.time_to_save(step, steps):
            run.save("modes.pt", step, model, optimizer=optimizer, head=head)
    return head


@torch.no_grad()
def place_modes(model, head, source, args, images=400, per_class=2000):
    """Step 2, k-means: sets the representatives, from up to about `per_class` embeddings of every class."""
    images, embeddings, labels = min(images, len(source)), [], []
    steps, seed = math.ceil(images / args.batch_size), common.mix_seed(args.seed, 8)
    for step, (image, label) in enumerate(common.training_batches(source, args, seed, 0, steps)):
        with common.autocast(args):
            features, _ = model(image)
        e = head(features.float())  # (N, E, h, w)
        u = torch.rand(e[:, 0].shape, generator=common.generator(args, 3, step), device=e.device)  # (N, h, w)
        y = balanced_labels(label, e.shape[2:], math.ceil(per_class / images), u).flatten()  # (n,)
        embeddings.append(common.as_pixels(e)[y != common.IGNORE])
        labels.append(y[y != common.IGNORE])
    R = kmeans_modes(torch.cat(embeddings), torch.cat(labels), head.representatives)
    head.representatives.copy_(common.all_sum(R * (common.rank() == 0)))  # the first process's for all of them


def label_target(model, args, folder, portion):
    """Step 3: writes pseudo-labels of the target train images as PNGs to `folder`, returns what the log shows."""
    dataset = common.target_dataset(args, "train", labelled=args.source == "toy")  # only the log sees the truth

    # Every 8th row and column of every 4th image: enough confidences for a threshold, and they fit in memory.
    some = torch.utils.data.Subset(dataset, range(0, len(dataset), 4))
    confidence = torch.zeros(len(some), args.size[0] // 8, args.size[1] // 8, device=args.device)
    label = torch.zeros_like(confidence, dtype=torch.int64)
    number = common.rank()  # each process fills in the images that it has looked at, and the sum is the whole
    for _, prob in common.predictions(model, some, args, flip=True):  # (N, C, H, W)
        for best, index in zip(*prob[:, :, ::8, ::8].max(1)):  # (H / 8, W / 8)
            confidence[number], label[number] = best, index
            number += common.world_size()
    confidence, label = common.all_sum(confidence).flatten(), common.all_sum(label).flatten()
    tau = class_thresholds(confidence, label, len(common.task_classes(args.source)), portion)

    predictions = common.predictions(model, dataset, args, flip=True)  # all images
    labelled = ((batch, pseudo_labels(prob, tau)) for batch, prob in predictions)
    labels = common.write_pseudo_labels(folder, labelled, args)
    if labels["kept"] == 0:
        raise common.InputError(f"{folder}: a portion of {portion} leaves no labelled pixel; choose another")
    return {"portion": portion, **labels}


# =================================================== meters (ours) ===================================================


def effective_modes(counts):
    """DRSL-20: counts (C, K) of pixels -> (C,), from 1 (one mode has all) to K, NaN for classes without any."""
    share = counts.double() / counts.sum(1, keepdim=True)  # (C, K)
    # DRSL-20
    return torch.special.entr(share).sum(1).exp()


@torch.no_grad()
def log_modes(model, head, source, target, args, run, images=40):
    """Logs the effective modes of every class in training images of both domains, returns their means as meters.

    A source pixel counts for the nearest mode of its class, a target pixel for the nearest of all. The network is in
    training mode, so that batch norm is the one under which the modes were learned.
    """
    C, K, _ = head.representatives.shape
    meters = {}
    model.train()
    for domain, views in (("source", source), ("target", target)):
        counts = torch.zeros(C * K, dtype=torch.int64, device=args.device)
        steps = math.ceil(min(images, len(views)) / args.batch_size)
        for image, label in common.training_batches(views, args, common.mix_seed(args.seed, 9), 0, steps):
            with common.autocast(args):
                features, _ = model(image)
            _, d2 = head(features.float(), distances=True)  # (n, C, K)
            c, k = nearest_modes(d2)
            if label is not None:
                c = common.grid_labels(label, features.shape[2:]).flatten()
                k = assign_modes(d2, c)
            counts += torch.bincount((c * K + k)[c != common.IGNORE], minlength=C * K)
        effective = effective_modes(common.all_sum(counts).view(C, K))  # (C,)
        run.log(f"modes {domain}", effective=[None if math.isnan(x) else round(x, 2) for x in effective.tolist()])
        meters[f"effective_modes_{domain}"] = effective.nanmean().item()
    return meters


# ================================================ further deviations ================================================
#  5. Distance in the margin. RepMet prints d, its code uses d2. Here: d2.
#  6. Weights inside L_mm. RepMet: a mean of cross-entropies, and margins summed over boxes that were mined as hard and
#     divided by 512. Here: three means over the same pixels.
#  7. Where modes start. RepMet: a random point per class plus offsets that all classes share. Here: k-means.
#  8. What is "stochastic" in stochastic mode alignment. Paper: not known. Here: the pairs of pixels.
#  9. What is embedded. RepMet: boxes. Here: the cells of the stride-8 grid, each labelled by the pixel at its centre.
# 10. Optimizer. CRST: SGD at a constant rate, a fresh one every round. Here: one for all --iterations, with a ramp and
#     poly decay over them (--power 0: no decay).
# 11. Batch norm. CRST: frozen statistics. Here: what --batch-norm says, from the mode warm-up on. If it is live, each
#     domain's batch is normalised by its own statistics, and those for labelling are estimated on target views.
# 12. Source images in a round. CRST: 3 to 6 % of the source set. Here: a fresh source batch every step.
# 13. Pseudo-labels. CRST: inputs scaled by 0.9 and mirrored, labels at 1024x2048, thresholds from every 4th pixel.
#     Here: inputs of --size, mirrored, labels at --size, thresholds from every 8th row and column of every 4th image.
# 14. Several processes. Each balances and aligns the pixels of its own images.
# Left out, because neither the abstract nor a measurement asks for it:
# * in place of DRSL-4 the scaled maximum of the p_ck of a class, which RepMet's code trains
# * in place of DRSL-8 modes drawn at random, with the probabilities p_ck inside the class (DRSL-9B)
# * in place of pairs triplets (DRSL-9C) or centroids (DRSL-9D), though the abstract speaks of pixels
# * alignment that moves only one domain, and focal loss
# * other metric losses: SoftTriple (DRSL-11), Magnet (DRSL-12), triplets (DRSL-13)


def parse_args():
    parser = common.shared_parser(__doc__, adapts=True)
    add = parser.add_argument
    add("--plain", action="store_true",
        help="plain self-training: every step on both domains, no modes, no alignment (their flags do nothing)")
    add("--head-iterations", type=common.natural, metavar="T", default=common.by_source(60, 2000, small=500),
        help="steps of the head alone, at --warmup-lr, before k-means; 0: modes start at random places [U]")
    add("--joint-iterations", type=common.natural, metavar="T", default=common.by_source(60, 2000, small=500),
        help="how many of --iterations come first, on source alone: modes and network learn together [U]")
    add("--rounds", type=common.count, metavar="N", default=common.by_source(2, 4),
        help="rounds of pseudo-labels [U: 3 to 6]")
    add("--iterations", type=common.natural, metavar="T", default=common.by_source(240, 12000, small=6000),
        help="steps of the network: the joint ones and all rounds [F: 2 epochs a round]")
    add("--lr", type=common.positive, metavar="X", default=common.by_source(2e-4, 5e-5),
        help="base learning rate of the adaptation [F]")
    add("--portion", type=common.fraction, metavar="X", default=common.by_source(0.3, 0.2),
        help="kept share of the pixels predicted as each class, first round [F]")
    add("--portion-step", type=common.fraction, metavar="X", default=common.by_source(0.1, 0.05),
        help="growth of --portion per round [F]")
    add("--portion-max", type=common.fraction, metavar="X", default=0.5, help="largest kept share [F]")
    add("--modes", type=common.count, metavar="K", default=3, help="K, modes per class [U; RepMet 5]")
    add("--embedding", type=common.count, metavar="E", default=common.by_source(64, 256),
        help="E, embedding size [U; RepMet 256]")
    add("--sigma", type=common.positive, metavar="X", default=0.3, help="width of a mode [U; RepMet 0.5]")
    add("--alpha", type=common.weight, metavar="X", default=0.5, help="margin on squared distances [R]")
    add("--pixels", type=common.count, metavar="N", default=common.by_source(32, 256),
        help="pixels per class and image in the mode losses, at most [U]")
    add("--balance", action=argparse.BooleanOptionalAction, default=True,
        help="draw the modes of a class towards equal shares (DRSL-17); otherwise the nearest (DRSL-8) [U]")
    add("--epsilon", type=common.positive, metavar="X", default=0.05, help="softness of the balanced assignment [U]")
    add("--w-own", type=common.weight, metavar="X", default=1.0, help="weight of L_own in L_mm [U]")
    add("--align-over", choices=("all", "pseudo"), default="all",
        help="target pixels to align: all, with the nearest of all modes (DRSL-19), or the pseudo-labelled ones [U]")
    add("--pairs", type=common.count, metavar="M", default=64, help="M, pairs per shared mode [U]")
    add("--lambda-t", type=common.weight, metavar="X", default=1.0, help="weight of the target cross-entropy [U]")
    add("--lambda-mm", type=common.weight, metavar="X", default=0.3, help="weight of the mode losses [U]")
    add("--lambda-sma", type=common.weight, metavar="X", default=1.0, help="weight of stochastic mode alignment [U]")
    args = common.parse(parser)
    if args.joint_iterations > args.iterations and not args.plain:
        parser.error(f"--joint-iterations {args.joint_iterations}: they are part of --iterations {args.iterations}")
    return args


def main():
    args = parse_args()
    run = common.Run("plain" if args.plain else "drsl", args)
    source = common.source_dataset(args, common.training_augment(args, args.source_size))
    augment = common.training_augment(args)
    views = common.target_dataset(args, "train", augment)

    # Step 1: the source-only model, trained here or given.
    model = common.build_model(args)
    if args.init:
        common.load_init(model, args, run)
    else:
        train_source(model, source, args, run, "source_only.pt", args.warmup_iterations, args.warmup_lr)
    source_model = copy.deepcopy(model)
    common.settle_batch_norm(model, views, args)

    # Step 2: modes of the source classes, under the adaptation's batch norm. Plain self-training has no modes.
    head = None if args.plain else train_modes(model, source, args, run)

    # Step 3: the joint steps on source (r = 0), then rounds of pseudo-labels and training on both domains.
    optimizer = make_optimizer_with_modes(model, head, args)
    parts = {"optimizer": optimizer} if args.plain else {"optimizer": optimizer, "head": head}
    done = run.load("last.pt", model, **parts)
    network, mode_head = common.distribute(model, args), None if args.plain else common.distribute(head, args)
    joint = 0 if args.plain else args.joint_iterations
    # Round r ends after step ends[r].
    ends = [joint + (args.iterations - joint) * r // args.rounds for r in range(args.rounds + 1)]
    for r, (first, last) in enumerate(zip([0, *ends], ends)):
        if done >= last:
            continue
        batches_s = common.training_batches(source, args, common.mix_seed(args.seed, 4), done, last, share=1 + (r > 0))
        batches_t = [None] * (last - done)
        if r > 0:
            labels = run.folder / "pseudo_labels" / f"round{r}"
            if done == first:  # a new round: labels by the present network
                if not args.plain:
                    log_modes(model, head, source, views, args, run)
                common.settle_batch_norm(model, views, args)
                # DRSL-16
                portion = min(args.portion + (r - 1) * args.portion_step, args.portion_max)
                run.log(f"round {r}", **label_target(model, args, labels, portion))
            target = common.target_dataset(args, "train", augment, label_dir=labels)
            batches_t = common.training_batches(target, args, common.mix_seed(args.seed, 5), done, last, share=2)
        model.train()
        for done, batch_s, batch_t in zip(range(done + 1, last + 1), batches_s, batches_t):
            set_lr(optimizer, common.ramp(done, args) * poly_lr(args.lr, done - 1, args.iterations, args.power))
            terms = step_losses(network, mode_head, batch_s, batch_t, args, common.generator(args, 6, done))
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            run.log_step("adapt" if r else "joint", done, args.iterations, lr=optimizer.param_groups[0]["lr"], **terms)
            run.validate("adapt", done, args.iterations, model, views)
            if run.time_to_save(done, args.iterations):
                run.save("last.pt", done, model, **parts)

    # Step 4: both models on the target's validation split. Noise: the share of wrong labels in the last round.
    meters = {} if args.plain else log_modes(model, head, source, views, args, run)
    labelling = [line for line in run.logged() if "accuracy" in line]
    if labelling:
        meters["noise"] = 100 * (1 - labelling[-1]["accuracy"])
        meters["noise_classes"] = 100 * (1 - labelling[-1]["accuracy_classes"])
    common.settle_batch_norm(model, views, args)
    run.save("last.pt", done, model, **parts)
    title = "plain self-training" if args.plain else "DRSL"
    common.compare_with_source_only({title: model}, args, run, source_model, **meters)


if __name__ == "__main__":
    common.run(main)
