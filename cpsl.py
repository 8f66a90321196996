"""CPSL: class-balanced pixel-level self-labeling for domain adaptation of semantic segmentation.

    R. Li, S. Li, C. He, Y. Zhang, X. Jia, L. Zhang, "Class-Balanced Pixel-Level Self-Labeling for Domain Adaptive
    Semantic Segmentation", CVPR 2022, arXiv 2203.09744. Authors' code: github.com/lslrh/CPSL, derived from
    microsoft/ProDA.

Of the paper only abstract and Figure 1 with its caption were available; the equations below come from the authors'
released code, checked against their training logs. Labels such as CPSL-6 are this project's own. Of the paper's own
numbers two are known, from a question that its first author answered (issue 5 of the code): Eq. 9, the sampling, and
Eq. 12, the constraint of the transport problem. Origin of equations and flags ("that [P]": the paper has such a term):

    [P] the paper's abstract or Figure 1   [A] the author in that issue   [C] the authors' code only   [U] our choice

The idea in five sentences
--------------------------
1. A warmed-up model labels the target: fixed soft pseudo-labels P_ST [P] (here by a frozen copy of it, deviation 3).
2. While the network trains on the target, a momentum copy of it supplies pixel features, and a self-labelling head [P],
   one prototype per class compared by cosine [C], learns online from optimal-transport assignments of sampled pixels
   and a memory bank of past ones [P].
3. The transport problem is told how much of the target each class covers, namely what the pseudo-labels say: that makes
   the self-labelling class-balanced [P, C]. A uniform marginal would give the tail more than its share.
4. The momentum head's soft assignment P_SL rectifies the fixed labels, and the network learns from P_SL * P_ST [P].
5. What the network learned is then distilled twice [C], here if asked (--distill 2), each time into a fresh one [U].

Notation
--------
    N images   K classes = prototypes (index k)   D feature channels   h x w feature grid
    B = M + n pixels in one transport problem: M of the memory bank, n of one image
    x     target image   f, f'  features of the network, of its momentum copy   t, s  softmax of a teacher, a student
    z_i   feature of pixel i from f'   c_k, c'_k  prototypes, their momentum average; a cosine takes all at unit length
    P     softmax of the segmentation network   P_ST  the warm-up model's   P_SL  the momentum head's   y  label
    S_ik  score of pixel i for class k     Q_i  assignment of pixel i, sums to 1     r  class marginal, sums to 1
    T     temperature    eps  weight of the entropy H    alpha, beta, lambda_SL, lambda_cons, lambda_KD  loss weights
    A     -ln 1e-4 = 9.2103

Equations
---------
    CPSL-1   L_src = mean_i -log P_i[y_i] on source                                                               [C]
    CPSL-2   CE    = mean_i -log P_i[y_i] on target, y of CPSL-17                                   that [P], form [C]
    CPSL-3   RCE   = mean_i -sum_k P_i[k] log clamp(onehot(y_i)[k], 1e-4, 1) = mean_i A (1 - P_i[y_i])            [C]
             (theirs also lifts P to at least 1e-7, which adds less than 2e-5)
    CPSL-4   L_t   = alpha CE + beta RCE, alpha 0.1, beta 1                                                       [C]
    CPSL-5   Q = argmax <Q, S> + eps H(Q) over Q >= 0 (K x B) whose columns sum to 1/B and rows to r              [C]
             the constraint on the rows is the paper's Eq. 12                                                     [A]
    CPSL-6   solved by Sinkhorn-Knopp: Q = exp(S / eps); 3 times: scale row k to sum r_k, then each column to sum 1/B;
             return (B Q)^T. A problem per image: S = cos(z, c) of [bank; its pixels], whose rows alone are kept  [C]
    CPSL-7   L_SL  = mean_i -sum_k Q_i[k] log softmax_k(cos(z_i, c_k) / T)                           that [P], form [C]
    CPSL-10  L_cons = mean over (n, k, h, w) of t (log t - log s): a KL divergence divided by K;                  [C]
             t = softmax_k(cos(f'(x), c'_k) / T), s = softmax_k(cos(f(strong view of x), c'_k) / T)
    CPSL-11  L = L_src + L_t + lambda_cons L_cons + lambda_SL L_SL, weights 5 and 0.1                             [C]
    CPSL-12  later stages: L = L_src + CE(student on strong view, y of the previous student) + lambda_KD L_KD     [C]
    CPSL-13  L_KD = mean over (n, k, h, w) of t (log t - log s), t previous student, s student            [U, see 8]
    CPSL-16  P_SL = softmax_k(cos(f'(x), c'_k) / T), T = 0.08                                        that [P], form [C]
    CPSL-17  y    = argmax_k P_SL[k] P_ST[k]                                                product [P], hard label [C]
    CPSL-18  of an image's n sampled pixels class k gets n n_k / (h w), rounded up or down,      Eq. 9 [A], form [U]
             n_k: cells of the grid with y = k

Gradients: L_SL reaches the prototypes c and nothing else [P]; L_cons the network and not c' [C]; Q, y and the momentum
copies receive none.

The algorithm                                                                 paper's notion -> function
-------------                                                                 --------------------------
1. Source-only training, or --init.                                           train_source
2. The warm-up model: its batch norm as --batch-norm says; then               prepare
   r, the histogram of its labels, and the prototypes, class means.           class_sums
3. Self-training. Each step, on a batch of source and one of target images:   step_losses
     P_ST by the frozen warm-up model, P_SL by the momentum network and head,
     their product as label, CPSL-16, -17                                     SelfLabelingHead, rectify
     source CE and symmetric CE on the target, CPSL-1 to -4                   segmentation_loss,
                                                                              symmetric_cross_entropy
     sampled pixels, CPSL-18, and their assignment together with the          pick_pixels, MemoryBank,
     bank's, CPSL-5, -6                                                       assign, sinkhorn
     the prototypes learn from it, CPSL-7                                     self_labeling_loss
     a distorted view must be seen as the momentum network sees the plain     strong_view, kl_divergence
     one, CPSL-10; then both momentum copies follow                           update_average
4. --distill N: N times a fresh student learns from the last, CPSL-12, -13.   label_target, distill
5. Evaluate the last student.

Deviations
----------
 1. Left out: the contrastive term CPSL-14 (its labels are misaligned with its features twice, in the authors' log it
    never falls), CPSL-8 (a second L_SL from logits; Figure 1 has one), CutMix (whose labels the authors' code did not
    paste at first), colour transfer in LAB space, adversarial warm-up CPSL-15.
 2. Strong view. Authors: RandAugment with geometry, a flip and cutout, labels warped along. Here: blur and colour
    jitter, each with probability 0.5 and per image.
 3. P_ST. Authors: of the whole target on disk, 7.5 GB, from clean images, probabilities resized. Here: the frozen
    warm-up model sees the augmented images of the student, every step, its logits resized: no file, no geometry.
    r comes from clean whole images, so that marginal and sampled pixels differ a little.
 4. Momentum network. Authors: it sees whole clean images; features are resized and cropped to match the student's.
    Here: it sees the student's batch.
 5. Resolution of labels and target loss. Authors: a quarter, features upsampled and then compared. Here: compared on
    the stride-8 grid, cosines and logits upsampled to full resolution.
 6. Sampling. Paper: class by class, Eq. 9. Authors' code: uniform over the pixels, one draw for all images.
    Here: --sampling proportional, a stratified draw per image by the rectified labels [U], or uniform.
 7. Consistency. Authors: always. Here: on for real data; off on the toy, to keep it fast. --no-rectify has no
    prototypes and so no consistency either: compare it with a run with --no-consistency.
 8. Distillation loss. Authors: the student's softmax in place of its logarithm, no divergence (their log goes below
    zero). Here: the KL divergence.
 9. Bank scores. Authors: with prototypes that are not of unit length; c and c' share memory until the first update.
    Here: unit length; a copy. Where r_k = 0 theirs gives NaN, ours nothing for class k.
10. Order. Authors: the pixels of an image enter the bank before the next image is solved. Here: every image has its
    problem with the same bank, then all enter. Before the bank is full it is not used, as theirs. Under torchrun each
    process keeps a bank of its own pixels, and after a resume all start with the first one's.
11. Momentum network's mode. Authors: training mode with Dropout2d. Here: training mode, so that live batch norm sees
    the batch's own statistics; there is no dropout.
12. Prototypes' start. Authors: four passes, image means of classes with at least 10 of 33 153 positions, a running mean
    that after 3000 images weighs each further one by 1/3001. Here: one pass, the same share of the grid, a plain mean.
    A class that no image has enough pixels of starts from a random prototype.
13. Features. Authors: 256 signed channels of ProDA's head. Here: the shared DeepLabV2's last layer, after its ReLU, or
    with --head proda the authors' head without Dropout2d, which trains its own source-only model; only this file can
    rebuild its checkpoints. With ResNet-101's 2048 channels the bank takes 0.5 GB, with 256 an eighth of that.
14. Optimizer. Authors: SGD, rate 1e-4 and five times that for head and prototypes, weight decay 2e-4; past 90 000 steps
    its schedule takes a root of a negative number. Here: their rates on real data without --preset, after --ramp steps,
    for 2 + 2 images instead of 4 + 4, decay 5e-4 but none on prototypes. Toy and small preset: AdamW, twice the rate
    for the prototypes. AdamW moves them by that rate however small lambda_SL is. Moved far (five times the rate), they
    encode the class shares; P_ST encodes them as well, so the product counts them twice and the labels get worse.
15. Distillation. Authors: SimCLR weights and a batch norm more, the second round starts from the first's student. Here:
    each round starts from --backbone-weights.
16. Reported. Authors: the checkpoint that is best on the target's validation labels. Here: the last one.

    setting                              authors                         here
    batch norm                           synchronised, live              --batch-norm, as in all files
    input                                RGB/255                         ImageNet mean and deviation
    training images                      896x512 of 2200 wide, 0.5-1.5   --crop, 1.0-1.5 (toy: no scaling), and jitter
                                                                         of their colours, in the weak view too
    evaluation                           2048x1024                       --size
    pixels, bank, momentum on the toy    256, 65536, 0.999               64, 4096, 0.99
    weight alpha of CE on the toy        0.1                             1: so few steps learn little from RCE alone

For orientation, the authors' GTA5 runs (best on validation): warm-up 41.4, step 3 55.7, after one and two distillations
59.4 and 60.8 mIoU. Nobody has run this file on GTA5.

Expect on the toy (mean of seeds 0 to 4; fp32): source only 32.7, with re-estimated batch norm 33.0, CPSL 33.4 mIoU
(--no-rectify 32.7, --marginal uniform 34.9); labels of the train images 33.3 fixed, 33.9 rectified; 6 minutes on one
thread of an AVX2 core, 1.0 GB. With --distill 2 the toy ends at 22.1 (seed 0): the students start from random weights,
for which 240 steps are too few. The shares of the pseudo-labels starve the tail themselves, and P_SL P_ST counts them
twice: see the README.

    python cpsl.py                                      # toy world: warm-up, self-training, table, picture
    python cpsl.py --marginal uniform                   # a transport problem that knows nothing of the classes
    python cpsl.py --no-rectify                         # self-training on argmax P_ST
    python cpsl.py --distill 2                          # with both distillation stages
    python cpsl.py --source synthia --data-root DIR --init runs/source_only-synthia-s0/last.pt
"""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

import common


# ================================================== the equations ==================================================


@torch.no_grad()
def sinkhorn(scores, marginal, epsilon=0.05, iterations=3):
    """CPSL-6: scores S (..., B, K), class marginal r (K,) -> assignments (..., B, K): each pixel's K values sum to 1.

    CPSL-5 lays Q out the other way round, K x B. In logarithms, which no score over- or underflows, and in float32 at
    least, also under autocast. The mean over the pixels approaches r with more rounds; r_k = 0 gets nothing.
    """
    log_q = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon  # (..., B, K)
    log_r = marginal.to(log_q).log()  # (K,)
    for _ in range(iterations):
        # CPSL-6, rows: the values of class k sum to r_k (-inf - -inf where r_k is 0)
        log_q = (log_q.log_softmax(-2) + log_r).nan_to_num(nan=-math.inf, neginf=-math.inf)
        # CPSL-6, columns: the values of every pixel sum to 1, which is 1/B up to the factor B
        log_q = log_q.log_softmax(-1)
    return log_q.exp()


def assign(scores, past, marginal, epsilon=0.05, iterations=3):
    """Q of the present pixels (N, n, K): CPSL-6 for every image by itself, on the bank's pixels and its own.

    scores (N, n, K) of the images' pixels; past (M, K) of the bank's, M = 0 before it is full.
    """
    both = torch.cat([past.expand(len(scores), -1, -1), scores], 1)  # (N, M + n, K)
    return sinkhorn(both, marginal, epsilon, iterations)[:, len(past):]


def rectify(soft_label, similarity, temperature=0.08):
    """CPSL-16, CPSL-17: P_ST (N, K, H, W) and cosines (N, K, H, W) to the prototypes -> hard labels (N, H, W).

    The argmax of the product is that of the sum of logarithms.
    """
    # CPSL-16
    log_p_sl = (similarity.float() / temperature).log_softmax(1)
    # CPSL-17
    return (log_p_sl + soft_label.float().log()).max(1).indices  # (N, H, W); on a CPU much faster than argmax


def symmetric_cross_entropy(logits, label, alpha=0.1, beta=1.0):
    """CPSL-4: logits (N, K, h, w), upsampled to the size of label (N, H, W); mean over the pixels that are not 255."""
    logits = common.upsample(logits.float(), label.shape[1:])  # (N, K, h, w) -> (N, K, H, W)
    # CPSL-2
    ce = F.cross_entropy(logits, label, ignore_index=common.IGNORE, reduction="none")  # (N, H, W), 0 where ignored
    # CPSL-3, with P[y] = exp(-CE)
    rce = math.log(1e-4) * torch.expm1(-ce)
    # CPSL-4
    return (alpha * ce + beta * rce).sum() / (label != common.IGNORE).sum().clamp(min=1)


def self_labeling_loss(features, prototypes, assignment, temperature=0.08):
    """CPSL-7: features (..., D), prototypes (K, D), assignment Q (..., K). Only the prototypes receive a gradient."""
    cosine = F.normalize(features.detach().float(), dim=-1) @ F.normalize(prototypes.float(), dim=1).T  # (..., K)
    # CPSL-7
    loss = -(assignment.detach() * (cosine / temperature).log_softmax(-1)).sum(-1)  # (...)
    return loss.sum() / max(loss.numel(), 1)


def kl_divergence(teacher, student):
    """CPSL-10 and CPSL-13: KL divergence of softmaxes, from logits (N, K, h, w), mean over all entries.

    The teacher's side is cut from the graph.
    """
    log_t, log_s = teacher.detach().float().log_softmax(1), student.float().log_softmax(1)  # (N, K, h, w)
    # CPSL-10, CPSL-13
    return (log_t.exp() * (log_t - log_s)).mean()


class SelfLabelingHead(nn.Module):
    """f_SL: one prototype per class; the score of a pixel is the cosine between its feature and the prototype.

    It also keeps what step 2 finds: the class marginal r and where the prototypes started.
    """

    def __init__(self, num_classes, dim):
        super().__init__()
        self.prototypes = nn.Parameter(torch.zeros(num_classes, dim))
        self.register_buffer("start", torch.zeros(num_classes, dim))
        self.register_buffer("marginal", torch.full((num_classes,), 1 / num_classes))

    def cosine(self, features):
        """(N, D, h, w) -> cosines (N, K, h, w)."""
        weight = F.normalize(self.prototypes, dim=1)[:, :, None, None]  # (K, D, 1, 1)
        return F.conv2d(F.normalize(features.float(), dim=1), weight)

    def forward(self, features, assignment, temperature):
        """CPSL-7. It is computed in here because DistributedDataParallel averages gradients of what goes through it."""
        return self_labeling_loss(features, self.prototypes, assignment, temperature)


class MemoryBank:
    """The last `size` pixels, oldest first. Until it is full, `items()` is shorter."""

    def __init__(self, size, dim, device=None):
        self.size, self.memory = size, torch.zeros(0, dim, device=device)

    def push(self, items):
        """Appends items (n, dim); the oldest fall out."""
        items = items.detach().to(self.memory)[-self.size:] if self.size else self.memory
        self.memory = torch.cat([self.memory[max(0, len(self.memory) + len(items) - self.size):], items])

    def items(self):
        return self.memory  # (n, dim), n <= size

    @property
    def full(self):
        return len(self.memory) == self.size

    def usable(self):
        """The items once it is full, before that none."""
        return self.memory if self.full else self.memory[:0]

    def state_dict(self):
        return {"memory": self.memory}

    def load_state_dict(self, state):
        self.memory = state["memory"].to(self.memory.device)


def class_sums(features, label, num_classes, least=1):
    """For the prototypes' start: sum over images of the mean feature of every class, and how many images had it.

    features (N, D, h, w), label (N, h, w) -> (K, D), (K,). An image counts for a class with `least` pixels of it.
    """
    member = F.one_hot(label.flatten(1), num_classes).float()  # (N, h w, K)
    count = member.sum(1)  # (N, K)
    sums = member.transpose(1, 2) @ features.float().flatten(2).transpose(1, 2)  # (N, K, D)
    means, seen = sums / count.clamp(min=1)[:, :, None], count >= least
    return (means * seen[:, :, None]).sum(0), seen.sum(0)


def pick_pixels(label, pixels, u, proportional=True):
    """Positions (N, n) of n different pixels of each map, n = `pixels` or h w if that is smaller.

    label (N, h, w): their classes; u (N, h, w): random numbers in [0, 1). Uniform: the pixels with the smallest u.
    Proportional, CPSL-18: the pixels are laid out class by class, in random order within a class, and every
    (h w / n)-th one is taken.
    """
    label, u = label.flatten(1), u.flatten(1).double()  # (N, h w)
    n = min(pixels, label.shape[1])
    if not proportional:
        return u.argsort(1)[:, :n]
    start = u.sum(1, keepdim=True) % 1  # (N, 1): a random number that favours no pixel
    # CPSL-18
    place = ((torch.arange(n, device=u.device) + start) * (label.shape[1] / n)).long()  # (N, n)
    return (label + u).argsort(1).gather(1, place)


def take_pixels(maps, position):
    """maps (N, D, h, w) at position (N, n) -> (N, n, D)."""
    return maps.flatten(2).transpose(1, 2).gather(1, position[:, :, None].expand(-1, -1, maps.shape[1]))


def confident_labels(prob, confidence):
    """(N, K, H, W) probabilities -> (N, H, W) labels, 255 where the best class has no more than `confidence`."""
    best, label = prob.max(1)
    return torch.where(best > confidence, label, common.IGNORE)


@torch.no_grad()
def update_average(average, model, momentum):
    """The momentum copy follows: n steps to a constant model leave momentum ** n of the way. Buffers are copied."""
    for mean, new in zip(average.parameters(), model.parameters()):
        mean.lerp_(new, 1 - momentum)
    for mean, new in zip(average.buffers(), model.buffers()):
        mean.copy_(new)


class ProDANetwork(common.DeepLabV2):
    """The shared backbone under the authors' head (--head proda) [C]: signed features of 256 channels.

    Five branches of 256 channels side by side, reweighted by squeeze and excitation, merged by a 3x3 convolution.
    """

    def __init__(self, num_classes, backbone="resnet101", weights="none"):
        super().__init__(num_classes, backbone, weights)
        shapes = [{"kernel_size": 1}] + [{"kernel_size": 3, "padding": d, "dilation": d} for d in (6, 12, 18, 24)]
        self.classifier = nn.ModuleDict({
            "branches": nn.ModuleList(
                nn.Sequential(nn.Conv2d(self.feature_dim, 256, **shape), nn.GroupNorm(32, 256), nn.ReLU(inplace=True))
                for shape in shapes),
            "excite": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(1280, 80, 1), nn.ReLU(inplace=True),
                                    nn.Conv2d(80, 1280, 1), nn.Sigmoid()),
            "merge": nn.Sequential(nn.Conv2d(1280, 256, 3, padding=1), nn.GroupNorm(32, 256)),
            "classify": nn.Conv2d(256, num_classes, 1, bias=False)})
        nn.init.normal_(self.classifier["classify"].weight, std=0.01)
        self.feature_dim = 256

    def forward(self, images):
        features = self.backbone(images)  # (N, 3, H, W) -> (N, D, h, w)
        maps = torch.cat([branch(features) for branch in self.classifier["branches"]], 1)  # (N, 1280, h, w)
        features = self.classifier["merge"](maps * self.classifier["excite"](maps))  # (N, 256, h, w)
        return features, self.classifier["classify"](features)


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


def build_model(args):
    """The network with the head that was asked for."""
    return common.build_model(args, ProDANetwork if args.head == "proda" else common.build_network)


def strong_view(images, *seed):
    """The same scenes, some blurred, some with other colours: (N, 3, H, W) normalised -> the same. Geometry stays.

    seed: numbers; every image of the whole batch gets its own distortion, in whichever process it is.
    """
    from torchvision.transforms import v2

    distort = v2.Compose([v2.RandomApply([v2.GaussianBlur(5, 1.0)], 0.5),
                          v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.5)])
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (common.MEAN, common.STD))
    views = []
    with torch.random.fork_rng(devices=[]):
        for number, image in enumerate(images, common.rank() * len(images)):
            torch.manual_seed(common.mix_seed(*seed, number))
            views.append((distort((image * std + mean).clamp(0, 1)) - mean) / std)
    return torch.stack(views).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def prepare(warm, head, args):
    """Step 2, one pass over the target train images as they are: the class marginal r and the prototypes' start."""
    warm.eval()
    K, D = head.prototypes.shape
    pixels, images = torch.zeros(2, K, dtype=torch.int64, device=args.device).unbind()
    sums = torch.zeros(K, D, device=args.device)
    for batch in common.evaluation_batches(common.target_dataset(args, "train"), args):
        with common.autocast(args):
            features, logits = warm(batch["image"])  # (N, D, h, w), (N, K, h, w)
        label = logits.argmax(1)  # (N, h, w)
        pixels += torch.bincount(label.flatten(), minlength=K)
        least = max(1, round(10 / 33153 * label[0].numel()))  # 10 of the authors' 129 x 257 positions
        part, seen = class_sums(features, label, K, least)  # (K, D), (K,)
        sums += part
        images += seen
    pixels, sums, images = (common.all_sum(t) for t in (pixels, sums, images))
    generator = torch.Generator().manual_seed(common.mix_seed(args.seed, 13))
    random = torch.randn(sums.shape, generator=generator).to(sums)  # for classes of which no image has enough pixels
    head.start.copy_(F.normalize(torch.where(images[:, None] > 0, sums, random), dim=1))
    head.prototypes.copy_(head.start)
    if args.marginal == "pseudo":
        head.marginal.copy_(pixels / pixels.sum())


def target_labels(x_t, warm, teacher, teacher_head, args):
    """Labels y (N, H, W) of a target batch, argmax P_ST beside them, and the momentum network's features (N, D, h, w).

    Without rectification y is argmax P_ST, and there are no features.
    """
    with torch.no_grad():
        with common.autocast(args):
            _, logits_w = warm(x_t)  # (N, K, h, w)
        p_st = common.upsample(logits_w.float(), x_t.shape[2:]).softmax(1)  # P_ST, (N, K, H, W)
        fixed = p_st.max(1).indices  # (N, H, W)
        if not args.rectify:
            return fixed, fixed, None
        with common.autocast(args):
            features_e, _ = teacher(x_t)  # (N, D, h, w)
        cosine_e = common.upsample(teacher_head.cosine(features_e), x_t.shape[2:])  # (N, K, H, W)
        return rectify(p_st, cosine_e, args.temperature), fixed, features_e  # CPSL-16, CPSL-17


def prototype_loss(features_e, y, head, self_labeling, bank, args, generator):
    """CPSL-7: the prototypes learn from the assignment of sampled pixels, which then enter the bank.

    features_e (N, D, h, w) of the momentum network, y (N, h, w) its labels; self_labeling: the distributed head.
    """
    u = torch.rand(y.shape, generator=generator, device=y.device)
    position = pick_pixels(y, args.pixels, u, args.sampling == "proportional")  # (N, n), CPSL-18
    z = F.normalize(take_pixels(features_e, position).float(), dim=2)  # (N, n, D)
    c = F.normalize(head.prototypes.detach(), dim=1)  # (K, D)
    # CPSL-5, CPSL-6
    q = assign(z @ c.T, bank.usable() @ c.T, head.marginal, args.epsilon, args.sinkhorn_iterations)  # (N, n, K)
    bank.push(z.flatten(0, 1))
    return self_labeling(z, q, args.temperature)


def step_losses(network, self_labeling, labellers, head, bank, source, x_t, args, step):
    """CPSL-11 and its terms: {"loss", "ce_s", "sce_t"} and, with rectification, "sl", perhaps "cons", and "changed".

    network, self_labeling: what learns, as training calls it; labellers: the warm-up model, the momentum network and
    the momentum head. source: (image, label). "changed": the share of pixels whose label the rectification changed.
    """
    warm, teacher, teacher_head = labellers
    y_t, fixed, features_e = target_labels(x_t, warm, teacher, teacher_head, args)
    with common.autocast(args):
        (_, logits_s), (_, logits_t) = network(source[0]), network(x_t)  # (N, K, h, w)
    terms = {"ce_s": segmentation_loss(logits_s, source[1]),  # CPSL-1
             "sce_t": symmetric_cross_entropy(logits_t, y_t, args.alpha, args.beta)}  # CPSL-4
    loss = terms["ce_s"] + terms["sce_t"]
    if args.rectify:
        y = common.grid_labels(y_t, features_e.shape[2:])  # (N, h, w)
        terms["sl"] = prototype_loss(features_e, y, head, self_labeling, bank, args, common.generator(args, 7, step))
        loss = loss + args.lambda_sl * terms["sl"]  # CPSL-11
        if args.consistency:
            view = strong_view(x_t, args.seed, 8, step)
            with common.autocast(args):
                features_v, _ = network(view)  # (N, D, h, w)
            cosine_e, cosine_v = teacher_head.cosine(features_e), teacher_head.cosine(features_v)  # (N, K, h, w)
            terms["cons"] = kl_divergence(cosine_e / args.temperature, cosine_v / args.temperature)  # CPSL-10
            loss = loss + args.lambda_cons * terms["cons"]  # CPSL-11
        terms["changed"] = (y_t != fixed).float().mean()
    return {"loss": loss, **terms}


def make_optimizer_with_prototypes(model, head, args):
    """The shared groups plus the prototypes: at their own rate, and without weight decay, normalised on use."""
    optimizer = make_optimizer(model, args)
    optimizer.param_groups[1]["scale"] = args.head_scale  # the classifier's
    optimizer.add_param_group({"params": [head.prototypes], "weight_decay": 0.0, "scale": args.prototype_scale})
    return optimizer


@torch.no_grad()
def measure_labels(labellers, head, args):
    """Meters: how far the prototypes moved, and on the toy the mIoU of the labels before and after rectification.

    The labels are those of the target train images; the truth is looked at here and used nowhere.
    """
    meters = {"prototype_cosine": F.cosine_similarity(head.prototypes, head.start, dim=1).mean().item()}
    if args.source == "toy":
        metrics = {name: common.MeanIoU(len(head.marginal)) for name in ("labels_rectified", "labels_fixed")}
        for module in labellers:
            module.eval()
        for batch in common.evaluation_batches(common.target_dataset(args, "train", labelled=True), args):
            for metric, label in zip(metrics.values(), target_labels(batch["image"], *labellers, args)):
                metric.update(label.cpu(), batch["label"])
        rare = [i for i, name in enumerate(common.task_classes(args.source)) if name in common.RARE]
        for name, metric in metrics.items():
            metric.sum_processes(args.device)
            present = metric.present()
            meters[name] = 100 * metric.mean(present)
            if set(rare) & set(present):
                meters[f"{name}_rare"] = 100 * metric.mean(sorted(set(rare) & set(present)))
    return meters


def label_target(model, args, folder):
    """Step 4: hard labels of the target train images, from flip-averaged softmax surer than --confidence; as PNGs.

    Returns what the log shows, see common.write_pseudo_labels.
    """
    dataset = common.target_dataset(args, "train", labelled=args.source == "toy")
    labelled = ((batch, confident_labels(prob, args.confidence))
                for batch, prob in common.predictions(model, dataset, args, flip=True))
    return common.write_pseudo_labels(folder, labelled, args)


def distill_losses(network, teacher, source, target, args):
    """CPSL-12 and its terms: source labels, the teacher's sure labels, the teacher's softmax. target: strong view."""
    with common.autocast(args):
        (_, logits_s), (_, logits_t) = network(source[0]), network(target[0])  # (N, K, h, w)
        with torch.no_grad():
            _, logits_teacher = teacher(target[0])
    terms = {"ce_s": segmentation_loss(logits_s, source[1]), "ce_t": segmentation_loss(logits_t, target[1]),
             "kd": kl_divergence(logits_teacher, logits_t)}  # CPSL-13
    return {"loss": terms["ce_s"] + terms["ce_t"] + args.lambda_kd * terms["kd"], **terms}  # CPSL-12


def distill(teacher, source, views, args, run, stage, file):
    """Step 4: a student that starts anew learns from the teacher."""
    torch.manual_seed(common.mix_seed(args.seed, 9, stage))
    student, steps = build_model(args), args.distill_iterations
    optimizer = make_optimizer(student, args)
    done = run.load(file, student, optimizer=optimizer)
    labels = run.folder / "pseudo_labels" / f"stage{stage}"
    if done == 0:
        run.log(f"stage {stage}", **label_target(teacher, args, labels))
    teacher.eval()
    target = common.target_dataset(args, "train", common.training_augment(args), label_dir=labels)
    batches_s = common.training_batches(source, args, common.mix_seed(args.seed, 10, stage), done, steps)
    batches_t = common.training_batches(target, args, common.mix_seed(args.seed, 11, stage), done, steps)
    network = common.distribute(student)
    student.train()
    for done, batch_s, (x_t, y_t) in zip(range(done + 1, steps + 1), batches_s, batches_t):
        set_lr(optimizer, common.ramp(done, args) * poly_lr(args.distill_lr, done - 1, steps, args.power))
        terms = distill_losses(network, teacher, batch_s, (strong_view(x_t, args.seed, 12, stage, done), y_t), args)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        run.log_step(f"stage {stage}", done, steps, lr=optimizer.param_groups[0]["lr"], **terms)
        run.validate(f"stage {stage}", done, steps, student, views)
        if run.time_to_save(done, steps):
            run.save(file, done, student, optimizer=optimizer)
    common.settle_batch_norm(student, views, args)
    run.save(file, done, student, optimizer=optimizer)
    return student


def parse_args():
    parser = common.shared_parser(__doc__, adapts=True)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--iterations", type=common.natural, metavar="T", default=common.by_source(240, 90000, small=6000),
        help="steps of self-training [C]")
    add("--lr", type=common.positive, metavar="X", default=common.by_source(2e-4, 1e-4, small=5e-5),
        help="its base learning rate [C]")
    add("--head-scale", type=common.positive, metavar="X", default=common.by_source(1.0, 5.0),
        help="multiple of it for the classifier [C]; --head-lr is that of warm-up and distillation")
    add("--prototype-scale", type=common.positive, metavar="X", default=common.by_source(2.0, 5.0, small=2.0),
        help="multiple of it for the prototypes [C]")
    add("--head", choices=("deeplab", "proda"), default="deeplab",
        help="proda: the authors' head, with its own warm-up")
    add("--marginal", choices=("pseudo", "uniform"), default="pseudo",
        help="r: class shares of the pseudo-labels [P], those of the warm-up model [C], or 1/K")
    add("--sampling", choices=("proportional", "uniform"), default="proportional",
        help="of pixels in L_SL: class by class, the paper's Eq. 9 [A], or over all pixels [C]")
    add("--rectify", action=switch, default=True,
        help="without: self-training on argmax P_ST; no prototypes, no momentum copy, no consistency")
    add("--temperature", type=common.positive, metavar="T", default=0.08, help="T of the cosine softmax [C]")
    add("--epsilon", type=common.positive, metavar="X", default=0.05, help="eps, weight of the entropy [C]")
    add("--sinkhorn-iterations", type=common.count, metavar="N", default=3, help="rounds of CPSL-6 [C]")
    add("--pixels", type=common.count, metavar="N", default=common.by_source(64, 256),
        help="pixels per image in L_SL [C]")
    add("--bank", type=common.natural, metavar="N", default=common.by_source(4096, 65536),
        help="pixels in the memory bank, 0 for none [C]")
    add("--ema", type=common.fraction, metavar="X", default=common.by_source(0.99, 0.999),
        help="momentum of the two copies [C]")
    add("--alpha", type=common.weight, metavar="X", default=common.by_source(1.0, 0.1),
        help="weight of CE on the target [C]")
    add("--beta", type=common.weight, metavar="X", default=1.0, help="weight of reverse CE on the target [C]")
    add("--lambda-sl", type=common.weight, metavar="X", default=0.1,
        help="weight of the self-labelling loss [C]; under AdamW without effect, see deviation 14")
    add("--consistency", action=switch, default=common.by_source(False, True),
        help="CPSL-10 [C], one more view of the target per step")
    add("--lambda-cons", type=common.weight, metavar="X", default=5.0, help="its weight [C]")
    add("--distill", type=common.natural, metavar="N", default=0, help="distillation stages afterwards [C: 2]")
    add("--distill-iterations", type=common.natural, metavar="T", default=common.by_source(240, 90000, small=6000),
        help="steps of each [C]")
    add("--distill-lr", type=common.positive, metavar="X", default=common.by_source(1e-3, 6e-4, small=1e-4),
        help="their base learning rate [C]")
    add("--confidence", type=common.fraction, metavar="X", default=0.95, help="that a label needs in distillation [C]")
    add("--lambda-kd", type=common.weight, metavar="X", default=1.0, help="weight of the distillation loss [C]")
    return common.parse(parser)


def main():
    args = parse_args()
    if args.head == "proda" and args.init:
        raise common.InputError("--init: no checkpoint of source_only.py has the --head proda, which trains its own")
    if args.backbone == "vgg16-fcn8s":
        raise common.InputError("--backbone vgg16-fcn8s: CPSL needs features and logits on one grid, DeepLabV2's")
    run = common.Run("cpsl", args)
    source = common.source_dataset(args, common.training_augment(args, args.source_size))
    views = common.target_dataset(args, "train", common.training_augment(args))

    # Step 1: the source-only model, trained here or given.
    model = build_model(args)
    if args.init:
        common.load_init(model, args, run)
    else:
        train_source(model, source, args, run, "source_only.pt", args.warmup_iterations, args.warmup_lr)
    source_model = copy.deepcopy(model)

    # Step 2: the frozen warm-up model, the class marginal, the prototypes; momentum copies and an empty bank.
    common.settle_batch_norm(model, views, args)
    warm = copy.deepcopy(model).eval()
    head = SelfLabelingHead(len(common.task_classes(args.source)), model.feature_dim).to(args.device)
    if run.load("warmup.pt", warm, head=head) == 0:
        prepare(warm, head, args)
        r = head.marginal
        run.log("warm-up", classes=int((r > 0).sum()), rarest=r[r > 0].min().item())
        run.save("warmup.pt", 1, warm, head=head)
    # Neither copy is given to the optimizer. The network's keeps requires_grad, without which a batch norm is frozen.
    teacher, teacher_head = copy.deepcopy(model), copy.deepcopy(head).requires_grad_(False)
    bank, labellers = MemoryBank(args.bank, model.feature_dim, args.device), (warm, teacher, teacher_head)

    # Step 3: self-training. The last stage of the run writes last.pt.
    files = [f"stage{k}.pt" for k in range(1, args.distill + 1)] + ["last.pt"]
    optimizer = make_optimizer_with_prototypes(model, head, args)
    parts = {"optimizer": optimizer, "head": head, "teacher": teacher, "teacher_head": teacher_head, "bank": bank}
    done = run.load(files[0], model, **parts)
    batches_s = common.training_batches(source, args, common.mix_seed(args.seed, 4), done, args.iterations)
    batches_t = common.training_batches(views, args, common.mix_seed(args.seed, 5), done, args.iterations)
    network, self_labeling = common.distribute(model), common.distribute(head)
    model.train()
    teacher.train()
    for done, batch_s, (x_t, _) in zip(range(done + 1, args.iterations + 1), batches_s, batches_t):
        set_lr(optimizer, common.ramp(done, args) * poly_lr(args.lr, done - 1, args.iterations, args.power))
        terms = step_losses(network, self_labeling, labellers, head, bank, batch_s, x_t, args, done)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        if args.rectify:  # without, nobody asks the momentum copies
            update_average(teacher, model, args.ema)
            update_average(teacher_head, head, args.ema)
        moved = 1 - F.cosine_similarity(head.prototypes.detach(), head.start, dim=1).mean()
        run.log_step("adapt", done, args.iterations, lr=optimizer.param_groups[0]["lr"], **terms, moved=moved)
        run.validate("adapt", done, args.iterations, model, views)
        if run.time_to_save(done, args.iterations):
            run.save(files[0], done, model, **parts)
    common.settle_batch_norm(model, views, args)
    run.save(files[0], done, model, **parts)
    common.settle_batch_norm(teacher, views, args)
    meters = measure_labels(labellers, head, args) if args.rectify else {}

    # Step 4: distillation.
    for stage, file in enumerate(files[1:], 2):
        model = distill(model, source, views, args, run, stage, file)

    # Step 5: both models on the target's validation split, the rare classes and the class histogram among the figures.
    title = "CPSL" if args.rectify else "fixed labels"
    common.compare_with_source_only({title: model}, args, run, source_model, **meters)


if __name__ == "__main__":
    common.run(main)
