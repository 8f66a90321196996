"""DRSL: distribution regularized self-supervised learning for domain adaptation of semantic segmentation.

    J. Iqbal, H. Rawal, R. Hafiz, Y.-T. Chi, M. Ali, "Distribution Regularized Self-Supervised Learning for Domain
    Adaptation of Semantic Segmentation", Image and Vision Computing, 2022, arXiv 2206.09683.

READ THIS FIRST. This file is DRSL-style, *reconstructed from the paper's abstract*; it is not a reproduction. No
official code was found, and of the paper only title, abstract, keywords, the caption of Figure 1 and the project page
were available. Labels such as DRSL-6 are this project's own, the paper's equation numbers are unknown, and no mIoU of
the paper is quoted because none was found. Equations, steps and flags carry their origin:

    [P] stated by the paper (abstract, keywords, Fig. 1)     [R] RepMet (arXiv 1806.04728), the likely ancestor
    [G] the same group's earlier code (LSE, MLSL)            [F] field convention (CRST, AdaptSegNet, DeepLab)
    [I] inferred for this reconstruction                     [U] unknown: a choice of ours

The idea in five sentences [P]
------------------------------
1. Cross-entropy on pseudo-labels learns only what separates classes from one another, and under a domain shift that
   boundary is misaligned on the target, so the pseudo-labels are noisy.
2. DRSL also models the variation *inside* a class: every pixel is embedded, and every class is a distribution with
   several modes (class-aware multi-modal distribution learning, MMDL).
3. Two heads share one base network: the segmentation head learns by cross-entropy on pseudo-labels, and the
   multi-modal head by a distance metric learning loss over the same pseudo-labels.
4. The metric loss flows back into the shared network and regularizes it.
5. Stochastic mode alignment pulls target pixels and source pixels that map to the same mode towards each other.

Notation
--------
    N images   C classes (index c)   K modes per class (index k)   E embedding size   n pixels   h x w feature grid
    e_i    embedding of pixel i, unit length       R_ck   representative (centre) of mode k of class c, unit length
    d2_ck  squared distance |e - R_ck|^2 = 2 - 2 <e, R_ck>, in [0, 4]      sigma  common width of all modes
    y_i    ground truth (source) or pseudo-label (target), 255 = ignore    m_i    mode of pixel i inside its class
    J = C K modes in all    M pairs drawn per mode
    P      softmax of the segmentation head    tau_c  class threshold    p  kept portion    V  pixels with y_i != 255

Equations
---------
    DRSL-1   L_seg^s = -(1/|V_s|) sum_{i in V_s} log P_i(y_i)                                source, kind [P], form [F]
    DRSL-2   L_seg^t = the same on the target with pseudo-labels                                    kind [P], form [F]
    DRSL-3   p_ck(e) = exp(-d2_ck(e) / (2 sigma^2)), up to a constant; one sigma, no mixture weights              [R]
    DRSL-4a  P_mm(c|e) = sum_k p_ck / sum_{c',k'} p_c'k'          (--posterior soft)                              [R]
    DRSL-4c  P_mm(c|e) = softmax_c(s max_k p_ck), s = 15          (--posterior max; RepMet's code, sigma = 0.5)   [R]
    DRSL-5   L_mmce = -mean_i log P_mm(y_i | e_i)                                                                 [R]
    DRSL-6   L_marg = mean_i [ min_k d2_yk - min_{c != y, k} d2_ck + alpha ]_+                                    [R]
    DRSL-7   L_mm = w_m L_marg + w_c L_mmce, on target "over pseudo-labels" [P], on source with y [I], w = 1 [R, for DRSL U]
    DRSL-8   m_i = argmin_k d2_{y_i k}(e_i)                       (--assignment hard)             inside the class [P], rest [U]
             m_i ~ Cat(q), q_k = p_yk / sum_k' p_yk'              (--assignment stochastic, DRSL-9B)              [U]
    DRSL-9A  L_sma = (1/|A|) sum_{(c,k) in A} (1/M) sum_{j=1..M} |e^s_{a_j} - e^t_{b_j}|^2        kind [P], form [U]
             A: the (c,k) with a source and a target pixel in the batch; a_j, b_j uniform with replacement
    DRSL-9C  triplet: [ |e^t - e^s_+|^2 - |e^t - e^s_-|^2 + alpha ]_+, e^s_- of another class                     [U]
    DRSL-9D  centroid: mean over A of |mu^s_ck - mu^t_ck|^2                                                       [U]
    DRSL-10  L = L_seg^s + lambda_t L_seg^t + lambda_mm (L_mm^s + L_mm^t) + lambda_sma L_sma           form [I], weights [U]
    DRSL-14  tau_c = confidence number floor(p N_c) of the N_c target pixels predicted c, in descending order;
             1 if floor(p N_c) = 0                                                        CBST, arXiv 1810.07911  [F]
    DRSL-15  y_i = argmax_c P_i(c)/tau_c, kept if P_i(y_i)/tau_{y_i} >= 1, else 255                               [F]
    DRSL-16  p_{r+1} = min(p_r + delta_p, p_max)                                                                  [F]

No gradient flows through m, q and pseudo-labels. DRSL-4, -5, -6 and -9 run over the pixels that choice 4 leaves. Not
implemented: focal loss (2f), the unscaled maximum (4b), SoftTriple, Magnet and triplet losses in place of 6 (11 to 13),
gradient clipping, the mining of rare classes, the filter that asks both heads to agree on a pseudo-label.

The algorithm                                                                          paper's notion -> function
-------------                                                                          --------------------------
1. Source-only training [F], or --init.                                                train_source
2. Mode warm-up on source [I]: the head alone for a while, then K-means per class      train_modes, kmeans_modes
   on the sphere sets R, then head and network jointly (not on the toy).
3. Rounds [F]: label the target train images with the present network,                 label_target, class_thresholds,
   class-balanced (DRSL-14, -15, -16);                                                 pseudo_labels
   then train on batches of source and target images with DRSL-10:                     main
     segmentation head, DRSL-1, -2                                                     segmentation_loss
     multi-modal head and its distances, DRSL-3                                        ModeHead
     multi-modal distribution learning, DRSL-4 to -7                                   mode_cross_entropy, margin_loss
     mode assignment, DRSL-8                                                           assign_modes, draw_modes
     stochastic mode alignment, DRSL-9                                                 stochastic_mode_alignment
4. Evaluate the last checkpoint. The multi-modal head is dropped: it only regularizes [I].

Choices where the sources are silent or differ: source / here
-------------------------------------------------------------
 1. Distance in the margin loss. RepMet prints d, its code uses d^2 / d^2.
 2. sigma with DRSL-4a. RepMet 0.5 / 0.3, because with orthogonal modes 0.5 leaves 0.67 nats (C = 19, K = 3) on a pixel that lies
    exactly on its mode, 0.3 leaves 0.0008.
 3. Resolution of the mode losses. Unknown / stride 8, labels by nearest neighbour.
 4. Class balance of the mode losses and the alignment. Unknown / at most --pixels random pixels per class and image.
 5. K, E, lambdas, M, whether alignment moves both domains. Unknown / 3, 256 (toy 64), 0.1 and 0.1, 64, yes; all flags.
    What "stochastic" means in stochastic mode alignment. Unknown / random pixel pairs; random modes are a flag.
 6. Pseudo-labels. Unknown; CRST: CBST on inputs scaled by 0.9 and mirrored, labels at 1024x2048, thresholds from every 4th
    pixel / CBST on inputs of --size and mirrored, labels at --size, thresholds from every 4th image, 8th row and column.
 7. Optimizer. CRST: SGD at a constant rate, a fresh one every round / one for all rounds, poly decay (--power 0 for none), a
    rate that rises over the first --ramp steps, because the first steps of a fresh AdamW move every weight by the full rate, no
    clipping of gradients. None of these was measured by itself.
 8. Batch norm. CRST: running statistics / the same on real data. On the toy live: each domain's batch is normalised by its
    own statistics, and those for labelling and evaluation are re-estimated on target images (common.adapt_batch_norm). The
    head's warm-up and k-means see features under the source model's running statistics.
 9. Source images in a round. CRST: 3 to 6 % of the source set / a fresh source batch every step.
10. Background score. RepMet has one for detection / none: void pixels are ignored.
11. Images in an SMA step, dead modes. Unknown / the --batch-size images of each domain, no memory bank; modes are not
    seeded again. The log's `shared` is |A|: how many of the C K modes had partners in the step.
12. Learning rate of the mode head. Unknown / ten times the backbone's, whatever --head-lr says.
13. Augmentation. CRST: scale 0.5 to 1.5, crop, flip / scale 1 to 1.5, crop, flip, colour jitter; on the toy no scaling.

Expect on the toy (mean of seeds 0 to 2, two cores of an AMD EPYC, bf16): source only 45.4, with re-estimated batch
norm 54.3, DRSL 58.3 mIoU (plain self-training 58.2); 2 1/2 minutes from nothing, 1.3 GB.

    python drsl.py                                                # toy world: warm-up, two rounds, table, picture
    python drsl.py --lambda-mm 0 --lambda-sma 0                   # plain class-balanced self-training
    python drsl.py --source synthia --data-root DIR --init runs/source_only-synthia-s0/last.pt
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common


# ================================================== the equations ==================================================


class ModeHead(nn.Module):
    """The multi-modal head: embeds pixels on the unit sphere and holds the K representatives of each class.

    Layers are inferred [I]: 1x1 convolution, GroupNorm, ReLU, 1x1 convolution, unit length. RepMet has two hidden layers
    of 1024 on detection boxes and E = 256 [R].
    """

    def __init__(self, feature_dim, num_classes, modes=3, embedding=256):
        super().__init__()
        self.project = nn.Sequential(nn.Conv2d(feature_dim, 256, 1, bias=False), nn.GroupNorm(32, 256), nn.ReLU(inplace=True),
                                     nn.Conv2d(256, embedding, 1))
        self.representatives = nn.Parameter(F.normalize(torch.randn(num_classes, modes, embedding), dim=2))

    def forward(self, features):
        """(N, D, h, w) -> embeddings (N, E, h, w) of unit length."""
        return F.normalize(self.project(features).float(), dim=1)

    def squared_distances(self, e):
        """Unit vectors (n, E) -> d2 (n, C, K) in [0, 4]: |e - R|^2 = 2 - 2 <e, R>; R is normalised on use."""
        R = F.normalize(self.representatives, dim=2).flatten(0, 1)  # (C, K, E) -> (C K, E)
        d2 = (2 - 2 * e @ R.T).clamp(min=0)  # (n, C K); rounding may give -1e-7
        return d2.view(len(e), *self.representatives.shape[:2])  # (n, C, K)


def mode_cross_entropy(d2, labels, sigma, posterior="soft", s=15.0):
    """DRSL-5, nats: cross-entropy of the class posterior that the modes imply. d2 (n, C, K), labels (n,), 255 ignored.

    posterior "soft" is DRSL-4a, "max" is DRSL-4c with multiplier `s`. Everything stays in log space.
    """
    z = -d2 / (2 * sigma**2)  # DRSL-3: z = log p_ck, (n, C, K)
    if posterior == "soft":
        logits = z.logsumexp(2)  # DRSL-4a, (n, C)
    else:
        logits = s * z.amax(2).exp()  # DRSL-4c, (n, C)
    valid = labels != common.IGNORE
    loss = F.cross_entropy(logits, labels, ignore_index=common.IGNORE, reduction="none")  # (n,)
    # DRSL-5
    return common.masked_mean(loss, valid)


def margin_loss(d2, labels, alpha):
    """DRSL-6: the nearest own mode must be nearer than the nearest mode of any other class, by alpha (squared distance).

    d2 (n, C, K), labels (n,), 255 ignored. Only the nearest own and the nearest foreign mode get a gradient:
    that lets modes specialise.
    """
    nearest = d2.min(2).values  # (n, C)
    valid = labels != common.IGNORE
    y = torch.where(valid, labels, 0)[:, None]  # (n, 1)
    own = nearest.gather(1, y)[:, 0]  # (n,)
    impostor = nearest.scatter(1, y, math.inf).min(1).values  # (n,)
    # DRSL-6
    return common.masked_mean(F.relu(own - impostor + alpha), valid)


def assign_modes(d2, labels):
    """DRSL-8, hard: index (n,) of the nearest mode inside the pixel's own class. Without meaning where labels are 255."""
    return own_class(d2, labels).argmin(1)


def draw_modes(d2, labels, sigma, generator=None):
    """DRSL-8, stochastic: mode index (n,) drawn from q_k = p_yk / sum_k' p_yk' inside the pixel's own class.

    Without meaning where labels are 255.
    """
    q = (-own_class(d2, labels) / (2 * sigma**2)).softmax(1)  # (n, K)
    u = torch.rand(len(q), 1, generator=generator, device=q.device)
    return (q.cumsum(1)[:, :-1] <= u).sum(1)  # mode k owns the k-th stretch of [0, 1)


def own_class(d2, labels):
    """d2 (n, C, K) -> the distances (n, K) to the modes of each pixel's own class, cut from the graph."""
    y = torch.where(labels == common.IGNORE, 0, labels)
    return d2.detach()[torch.arange(len(d2), device=d2.device), y]


def mode_groups(labels, modes, shape):
    """The pixels by class and mode, of which there are J = C K: group (n,) = c K + k, J where ignored, and sizes (J,).

    shape: (C, K). No shape depends on values, here and in the alignment, so that a step need not wait for the GPU to count.
    """
    J = shape[0] * shape[1]
    group = torch.where(labels == common.IGNORE, J, labels * shape[1] + modes)  # (n,)
    sizes = torch.zeros(J + 1, dtype=torch.int64, device=group.device).index_add(0, group, torch.ones_like(group))
    return group, sizes[:J]


def stochastic_mode_alignment(e_s, labels_s, modes_s, e_t, labels_t, modes_t, pairs=64, form="pairwise", alpha=0.5,
                              generator=None, shape=None):
    """DRSL-9: distance between source and target pixels of the same (class, mode), mean over the modes both domains have.

    e (n, E), labels (n,), modes (n,). form: "pairwise" (DRSL-9A), "triplet" (DRSL-9C, uses alpha) or "centroid" (DRSL-9D);
    in the first two `pairs` pixels per mode and domain are drawn with replacement. Exactly 0 if no mode is shared. The triplet's
    negatives are source pixels of all other classes; a mode without any does not count.
    shape: (C, K), read from labels and modes if not given; what a generator draws depends on it.
    """
    if len(e_s) == 0 or len(e_t) == 0:
        return 0 * (e_s.sum() + e_t.sum())
    if shape is None:
        valid = torch.cat([labels_s, labels_t]) != common.IGNORE
        shape = [1 + torch.where(valid, torch.cat(both), 0).max().item() for both in ((labels_s, labels_t), (modes_s, modes_t))]
    (g_s, n_s), (g_t, n_t) = mode_groups(labels_s, modes_s, shape), mode_groups(labels_t, modes_t, shape)  # (n,), (J,)
    A = (n_s > 0) & (n_t > 0)  # (J,)

    if form == "centroid":
        sum_s = e_s.new_zeros(len(A) + 1, e_s.shape[1]).index_add(0, g_s, e_s)[:-1]  # (J, E)
        sum_t = e_t.new_zeros(len(A) + 1, e_t.shape[1]).index_add(0, g_t, e_t)[:-1]
        # (J, E)
        difference = sum_s / n_s.clamp(min=1)[:, None] - sum_t / n_t.clamp(min=1)[:, None]
        # DRSL-9D
        return common.masked_mean(difference.square().sum(1), A)

    def draw(first, count):
        """(J, M) random positions first .. first + count - 1, one row per mode; without meaning where count is 0."""
        u = torch.rand(len(A), pairs, generator=generator, device=e_s.device)
        return first[:, None] + (u * count[:, None]).long()

    # Sorted by mode, the pixels of one mode (and of one class) stand in one run.
    order_s, order_t = g_s.argsort(stable=True), g_t.argsort(stable=True)
    start_s, start_t = n_s.cumsum(0) - n_s, n_t.cumsum(0) - n_t
    a = order_s[draw(start_s, n_s).clamp(max=len(g_s) - 1)]  # (J, M)
    b = order_t[draw(start_t, n_t).clamp(max=len(g_t) - 1)]
    positive = (e_s[a] - e_t[b]).square().sum(2)  # (J, M, E) -> (J, M)
    if form == "pairwise":
        # DRSL-9A
        return common.masked_mean(positive.mean(1), A)

    # A source pixel of another class is one at any position outside the run of the own class.
    class_start = start_s.view(shape)[:, :1].expand(shape).flatten()[:, None]  # (J, 1)
    class_size = n_s.view(shape).sum(1, keepdim=True).expand(shape).flatten()  # (J,)
    others = n_s.sum() - class_size  # (J,)
    position = draw(torch.zeros_like(others), others)  # (J, M)
    position = torch.where(position >= class_start, position + class_size[:, None], position).clamp(max=len(g_s) - 1)
    negative = (e_s[order_s[position]] - e_t[b]).square().sum(2)  # (J, M)
    # DRSL-9C
    return common.masked_mean(F.relu(positive - negative + alpha).mean(1), A & (others > 0))


def count_shared_modes(labels_s, modes_s, labels_t, modes_t, shape):
    """|A| of DRSL-9: in how many (class, mode) of `shape` = (C, K) lie both source and target pixels."""
    (_, n_s), (_, n_t) = mode_groups(labels_s, modes_s, shape), mode_groups(labels_t, modes_t, shape)
    return ((n_s > 0) & (n_t > 0)).sum()


def class_thresholds(confidence, label, num_classes, portion):
    """DRSL-14: tau (C,), the confidence above which the best `portion` of the pixels predicted as each class lies.

    confidence (n,) in [0, 1], label (n,) predicted classes. A class with nothing to keep gets 1.
    """
    tau = torch.ones(num_classes, dtype=confidence.dtype, device=confidence.device)
    for c in range(num_classes):
        values = confidence[label == c]
        keep = int(portion * len(values) + 1e-6)  # floor; 1e-6 so that 0.29 * 100 is 29
        if keep:
            tau[c] = values.kthvalue(len(values) - keep + 1).values  # number `keep` from the top
    return tau


def pseudo_labels(prob, thresholds):
    """DRSL-15: (N, C, H, W) probabilities -> (N, H, W) labels, 255 where even the best class misses its threshold."""
    ratio, label = (prob / thresholds.view(1, -1, 1, 1)).max(1)  # (N, H, W)
    return torch.where(ratio >= 1, label, common.IGNORE)


def kmeans_modes(e, labels, representatives, iterations=10):
    """Spherical k-means inside every class: (C, K, E) unit vectors that start the representatives [I].

    e (n, E) unit vectors, labels (n,). The first centre is the pixel nearest to the class mean, each further one the pixel
    farthest from all centres so far. A class with fewer than K pixels keeps its rows of `representatives` (C, K, E).
    """
    C, K, _ = representatives.shape
    R = F.normalize(representatives, dim=2).clone()
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
    """At most `limit` random labels per class and image, so that road and building do not dominate; the others become 255 [U].

    label (N, H, W) is brought to the grid `size` = (h, w) by nearest neighbour -> (N, h, w).
    u (N, h, w): random numbers; of each class in each image the pixels with the smallest ones are kept.
    """
    label = common.grid_labels(label, size)  # (N, h, w)
    image = torch.arange(len(label), device=label.device).view(-1, 1, 1)
    group = (256 * image + label).flatten()
    order = (group + u.flatten().double()).argsort()  # by group and, because u is below 1, by u inside it
    group = group[order]
    place = torch.arange(len(group), device=label.device) - torch.searchsorted(group, group)  # inside its own group
    place = torch.empty_like(place).scatter(0, order, place).view_as(label)  # back to the pixels
    return torch.where(place < limit, label, common.IGNORE)


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


def batch_pixels(e, label, args, generator):
    """Embeddings e (N, E, h, w) as pixels (n, E) and their balanced labels (n,), from the images of all processes.

    So every process computes the mode losses and the alignment of the whole batch, as a single one would: they are small beside
    the network, and partners of a mode may lie in different processes.
    """
    y = balanced_labels(label, e.shape[2:], args.pixels, common.draw(e[:, 0].shape, generator))  # (N, h, w)
    return common.all_gather(common.as_pixels(e)), common.all_gather(y.flatten())


def mode_loss(d2, labels, args):
    """DRSL-7 on one domain: margin and mode cross-entropy."""
    margin, cross_entropy = margin_loss(d2, labels, args.alpha), mode_cross_entropy(d2, labels, args.sigma, args.posterior)
    return args.w_m * margin + args.w_c * cross_entropy  # DRSL-7


def train_modes(model, head, dataset, args, run):
    """Step 2: the multi-modal head learns on source before any pseudo-label exists [I]. Checkpoints: modes.pt.

    For --head-iterations the network stands still and the head learns from L_mm^s, then k-means places the representatives,
    then for --joint-iterations head and network learn together from L_seg^s + lambda_mm L_mm^s.
    """
    optimizer, start, steps = make_optimizer_with_modes(model, head, args), 0, args.head_iterations + args.joint_iterations
    if args.resume and (run.folder / "modes.pt").exists():
        start = common.load_training(run.folder / "modes.pt", model, optimizer, head=head)
    if start == 0 and args.head_iterations == 0 and args.mode_start == "kmeans":  # modes of an untrained head
        place_modes(model, head, args)
    if steps == 0:
        run.save("modes.pt", common.pack_training(model, optimizer, args, 0, head=head))
    batches = common.training_batches(dataset, args, seed=common.mix_seed(args.seed, 1), start=start, stop=steps)
    for step, batch in enumerate(batches, start + 1):
        joint = step > args.head_iterations
        model.train(joint)
        set_lr(optimizer, args.lr)
        image, label = common.to_device(batch, args.device)
        with common.autocast(args.device, args.precision), torch.set_grad_enabled(joint):
            features, logits = model(image)
        with common.autocast(args.device, args.precision):
            e = head(features)  # (N, E, h, w)
        e, y = batch_pixels(e, label, args, common.generator(args, 2, step))  # (n, E), (n,)
        mm = mode_loss(head.squared_distances(e), y, args)
        loss = segmentation_loss(logits, label) + args.lambda_mm * mm if joint else mm
        descend(loss, optimizer, *([model, head] if joint else [head]))
        run.watch("modes", step, steps, mm=mm, loss=loss)
        if step == args.head_iterations and args.mode_start == "kmeans":
            place_modes(model, head, args)
            optimizer.state.pop(head.representatives, None)  # momentum of the representatives that k-means replaced
        if run.time_to_save(step, steps):
            run.save("modes.pt", common.pack_training(model, optimizer, args, step, head=head))


@torch.no_grad()
def place_modes(model, head, args, images=400, per_class=2000):
    """Step 2, k-means: sets the representatives from about `per_class` embeddings of every class, at most, evenly over images."""
    model.eval()
    dataset = common.source_dataset(args)
    subset = torch.utils.data.Subset(dataset, np.linspace(0, len(dataset) - 1, min(images, len(dataset))).astype(int).tolist())
    share = math.ceil(per_class / len(subset))
    es, labels = [], []
    loader = torch.utils.data.DataLoader(subset, args.batch_size, num_workers=args.workers, generator=torch.Generator(),
                                         worker_init_fn=common.ignore_interrupt)
    for batch in loader:
        image, label = common.to_device(batch, args.device)
        with common.autocast(args.device, args.precision):
            e = head(model(image)[0])  # (N, E, h, w)
        u = torch.rand(e[:, 0].shape, generator=common.generator(args, 3, len(es)), device=e.device)  # (N, h, w)
        y = balanced_labels(label, e.shape[2:], share, u).flatten()  # (n,)
        es.append(common.as_pixels(e)[y != common.IGNORE])
        labels.append(y[y != common.IGNORE])
    head.representatives.copy_(kmeans_modes(torch.cat(es), torch.cat(labels), head.representatives))
    common.broadcast(head.representatives)  # one set of modes for all processes


def label_target(model, args, folder, portion):
    """Step 3: pseudo-labels of the target train images, written to `folder` as PNGs. Two passes, bounded memory.

    Returns what the log shows: the portion asked for and what common.write_pseudo_labels tells.
    """
    model.eval()
    classes = common.task_classes(args.source)
    dataset = common.target_dataset(args, "train", labelled=args.source == "toy")
    confidence, label = [torch.zeros(0, device=args.device)], [torch.zeros(0, dtype=torch.uint8, device=args.device)]
    some = torch.utils.data.Subset(dataset, range(0, len(dataset), 4))
    for _, prob in common.predictions(model, some, args, flip=True):  # (N, C, H, W)
        best, index = prob[:, :, ::8, ::8].max(1)  # (N, H / 8, W / 8): enough for a quantile
        confidence.append(best.flatten())
        label.append(index.flatten().byte())
    confidence, label = torch.cat(confidence), torch.cat(label)  # (n,)
    # A process with an image less than others adds ignored pixels, so that n is the same in all.
    n = math.ceil(len(some) / common.world_size()) * math.ceil(args.size[0] / 8) * math.ceil(args.size[1] / 8)
    confidence, label = (common.all_gather(F.pad(values, (0, n - len(values)), value=common.IGNORE)) for values in (confidence, label))
    thresholds = class_thresholds(confidence, label, len(classes), portion)  # (C,)

    labelled = ((batch, pseudo_labels(prob, thresholds)) for batch, prob in common.predictions(model, dataset, args, flip=True))
    return {"portion": portion, **common.write_pseudo_labels(folder, labelled, args)}


def make_optimizer_with_modes(model, head, args):
    """The shared groups plus the head's layers and, without weight decay because they are normalised on use, R."""
    optimizer = make_optimizer(model, args)
    optimizer.add_param_group({"params": list(head.project.parameters()), "scale": 10.0})
    optimizer.add_param_group({"params": [head.representatives], "scale": 10.0, "weight_decay": 0.0})
    return optimizer


def parse_args():
    parser = common.shared_parser(__doc__, adapts=True)
    add = parser.add_argument
    add("--head-iterations", type=common.natural_number, metavar="T", default=common.by_source(60, 2000), help="mode warm-up, network standing still [U]")
    add("--joint-iterations", type=common.natural_number, metavar="T", default=common.by_source(0, 5000), help="mode warm-up, network learning too [U]")
    add("--rounds", type=common.positive_int, metavar="N", default=common.by_source(2, 4), help="rounds of pseudo-labels [U: 3 to 6]")
    add("--iterations", type=common.natural_number, metavar="T", default=common.by_source(240, 12000), help="adaptation steps, all rounds together")
    add("--lr", type=float, metavar="X", default=common.by_source(2e-4, 5e-5), help="base learning rate of the adaptation [F]")
    add("--portion", type=float, metavar="p_0", default=common.by_source(0.3, 0.2), help="kept share of each predicted class, first round [F]")
    add("--portion-step", type=float, metavar="X", default=common.by_source(0.1, 0.05), help="delta_p, its growth per round [F]")
    add("--portion-max", type=float, metavar="p_max", default=common.by_source(0.5, 0.5), help="its bound [F]")
    add("--modes", type=common.positive_int, metavar="K", default=3, help="K, modes per class [U; RepMet 5]")
    add("--mode-start", choices=("kmeans", "random"), default="kmeans", help="representatives after the head's warm-up [U]")
    add("--embedding", type=common.positive_int, metavar="E", default=common.by_source(64, 256), help="E, embedding size [U; RepMet 256]")
    add("--sigma", type=float, default=0.3, help="width of a mode [U; RepMet 0.5 saturates with --posterior soft]")
    add("--alpha", type=float, default=0.5, help="margin on squared distances [R]")
    add("--w-m", type=float, default=1.0, help="weight of the margin loss in L_mm [R]")
    add("--w-c", type=float, default=1.0, help="weight of the mode cross-entropy in L_mm [R]")
    add("--posterior", choices=("soft", "max"), default="soft", help="DRSL-4a; or DRSL-4c with s = 15, for which RepMet's --sigma is 0.5 [U]")
    add("--pixels", type=common.positive_int, metavar="N", default=common.by_source(32, 256), help="pixels per class and image in L_mm and L_sma, at most [U]")
    add("--lambda-t", type=float, default=1.0, help="weight of the target cross-entropy [U]")
    add("--lambda-mm", type=float, default=0.1, help="weight of the mode losses [U]")
    add("--lambda-sma", type=float, default=0.1, help="weight of stochastic mode alignment [U]")
    add("--assignment", choices=("hard", "stochastic"), default="hard", help="DRSL-8: nearest mode, or drawn from q [U]")
    add("--alignment", choices=("pairwise", "triplet", "centroid"), default="pairwise", help="DRSL-9A, 9C or 9D [U]")
    add("--pairs", type=common.positive_int, metavar="M", default=64, help="M, pairs per shared mode [U]")
    add("--stop-gradient", action="store_true", help="alignment moves target embeddings only [U]")
    return common.parse(parser)


def main():
    args = parse_args()
    run = common.Run("drsl", args)
    classes = common.task_classes(args.source)
    source_size = args.size if args.source == "toy" else args.source_size
    source = common.source_dataset(args, augment=common.training_augment(source_size, args.crop, args.scale_jitter))
    common.target_dataset(args, "train"), common.target_dataset(args, "val")  # say now if something is missing

    # Step 1: the source-only model, trained here or given.
    model = common.build_model(args)
    if args.init:
        common.load_init(model, args, run)
    else:
        train_source(model, source, args, run, "source_only.pt", args.warmup_iterations, args.warmup_lr)

    # Step 2: modes of the source classes. Without mode losses there is no use for them.
    torch.manual_seed(common.mix_seed(args.seed, 7))  # the head's start does not depend on what was drawn before
    head = ModeHead(model.feature_dim, len(classes), args.modes, args.embedding).to(args.device)
    use_modes = args.lambda_mm > 0 or args.lambda_sma > 0
    resumed = args.resume and (run.folder / "last.pt").exists()
    if use_modes and not resumed:
        train_modes(model, head, source, args, run)

    # Step 3: rounds of pseudo-labels and training on both domains.
    optimizer, done = make_optimizer_with_modes(model, head, args), 0
    if resumed:
        done = common.load_training(run.folder / "last.pt", model, optimizer, head=head)
    augment = common.training_augment(args.size, args.crop, args.scale_jitter)
    for r in range(args.rounds):
        first, last = args.iterations * r // args.rounds, args.iterations * (r + 1) // args.rounds
        if done >= last:
            continue
        labels = run.folder / "pseudo_labels" / f"round{r + 1}"
        if done <= first:  # a new round: labels by the present network
            done = first
            common.adapt_batch_norm(model, args)
            portion = min(args.portion + r * args.portion_step, args.portion_max)  # DRSL-16
            run.log(f"round {r + 1}", **label_target(model, args, labels, portion))
        target = common.target_dataset(args, "train", augment, label_dir=labels)
        batches_s = common.training_batches(source, args, seed=common.mix_seed(args.seed, 4), start=done, stop=last)
        batches_t = common.training_batches(target, args, seed=common.mix_seed(args.seed, 5), start=done, stop=last)
        model.train()
        for done, batch_s, batch_t in zip(range(done + 1, last + 1), batches_s, batches_t):
            set_lr(optimizer, common.ramp(done, args) * poly_lr(args.lr, done - 1, args.iterations, args.power))
            x_s, y_s = common.to_device(batch_s, args.device)
            x_t, y_t = common.to_device(batch_t, args.device)  # y_t: pseudo-labels
            with common.autocast(args.device, args.precision):
                (features_s, logits_s), (features_t, logits_t) = model(x_s), model(x_t)  # (N, D, h, w), (N, C, h, w)
            losses = {"ce_s": segmentation_loss(logits_s, y_s), "ce_t": segmentation_loss(logits_t, y_t)}  # DRSL-1, DRSL-2
            loss = losses["ce_s"] + args.lambda_t * losses["ce_t"]

            if use_modes:
                with common.autocast(args.device, args.precision):
                    e_s, e_t = head(features_s), head(features_t)  # (N, E, h, w)
                generator = common.generator(args, 6, done)
                e_s, y_s = batch_pixels(e_s, y_s, args, generator)  # (n, E), (n,)
                e_t, y_t = batch_pixels(e_t, y_t, args, generator)
                d2_s, d2_t = head.squared_distances(e_s), head.squared_distances(e_t)  # (n, C, K)
                losses["mm_s"], losses["mm_t"] = mode_loss(d2_s, y_s, args), mode_loss(d2_t, y_t, args)  # DRSL-7
                if args.assignment == "hard":  # DRSL-8
                    m_s, m_t = assign_modes(d2_s, y_s), assign_modes(d2_t, y_t)
                else:
                    m_s, m_t = draw_modes(d2_s, y_s, args.sigma, generator), draw_modes(d2_t, y_t, args.sigma, generator)
                if run.time_to_log(done, args.iterations):
                    losses["shared"] = count_shared_modes(y_s, m_s, y_t, m_t, d2_s.shape[1:])  # |A|: without partners L_sma is 0
                losses["sma"] = stochastic_mode_alignment(e_s.detach() if args.stop_gradient else e_s, y_s, m_s, e_t, y_t, m_t,
                                                          pairs=args.pairs, form=args.alignment, alpha=args.alpha,
                                                          generator=generator, shape=d2_s.shape[1:])  # DRSL-9
                loss = loss + args.lambda_mm * (losses["mm_s"] + losses["mm_t"]) + args.lambda_sma * losses["sma"]  # DRSL-10

            descend(loss, optimizer, model, head)
            run.watch("adapt", done, args.iterations, lr=optimizer.param_groups[0]["lr"], loss=loss, **losses)
            run.validate("adapt", done, args.iterations, model)
            if run.time_to_save(done, args.iterations):
                run.save("last.pt", common.pack_training(model, optimizer, args, done, head=head))

    # Step 4: both models on the target's validation split.
    common.adapt_batch_norm(model, args)
    run.save("last.pt", common.pack_training(model, optimizer, args, done, head=head))
    common.compare_with_source_only({"DRSL": model}, args, run)


if __name__ == "__main__":
    common.run(main)
