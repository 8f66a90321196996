"""CPSL: class-balanced pixel-level self-labeling for domain adaptation of semantic segmentation.

    R. Li, S. Li, C. He, Y. Zhang, X. Jia, L. Zhang, "Class-Balanced Pixel-Level Self-Labeling for Domain Adaptive Semantic
    Segmentation", CVPR 2022, arXiv 2203.09744. Authors' code: github.com/lslrh/CPSL, derived from microsoft/ProDA.

Of the paper only abstract and Figure 1 with its caption were available; the equations below come from the authors' released
code, checked against their training logs. Labels such as CPSL-6 are this project's own, the paper's equation numbers are
unknown. Origin of equations, steps and flags:

    [P] the paper's abstract or Figure 1     [C] the authors' code only     [U] unknown: a choice of ours

The idea in five sentences
--------------------------
1. A warmed-up model labels the target: fixed soft pseudo-labels P_ST [P] (here by a frozen copy of it, deviation 3).
2. While the network trains on the target, a momentum copy of it supplies pixel features, and a self-labelling head [P], one
   prototype per class compared by cosine [C], learns online from optimal-transport assignments of randomly sampled pixels and
   a memory bank of past ones [P].
3. The transport problem is told how much of the target each class covers, namely what the pseudo-labels say: that makes
   the self-labelling class-balanced [P, C]. A uniform marginal would give the tail more than its share [U].
4. The momentum head's soft assignment P_SL rectifies the fixed labels, and the network learns from P_SL * P_ST [P].
5. What the network learned is then distilled twice [C], here only if asked (--distill 2) and each time into a fresh one [U].

Notation
--------
    N images   K classes = prototypes (index k)   D feature channels   h x w feature grid
    B = M + n pixels in one transport problem: M of the memory bank, n of one image
    x     target image   f, f'  the network and its momentum copy         t, s  softmax of a teacher and of a student
    z_i   feature of pixel i from f'   c_k, c'_k  prototypes and their momentum average; a cosine takes all at unit length
    P     softmax of the segmentation network    P_ST  the warm-up model's    P_SL  the momentum head's    y  label, 255 = ignore
    S_ik  score of pixel i for class k     Q_i  assignment of pixel i, sums to 1     r  class marginal, sums to 1     A = -ln 1e-4
    T     temperature    eps  weight of the entropy H    alpha, beta, lambda_SL, lambda_cons, lambda_KD  weights of losses

Equations
---------
    CPSL-1   L_src = mean_i -log P_i[y_i] on source                                                                [C]
    CPSL-2   CE    = mean_i -log P_i[y_i] on target, y of CPSL-17                                    that [P], form [C]
    CPSL-3   RCE   = mean_i -sum_k P_i[k] log clamp(onehot(y_i)[k], 1e-4, 1) = mean_i A (1 - P_i[y_i])             [C]
             (theirs also lifts P to at least 1e-7, which adds less than 2e-5)
    CPSL-4   L_t   = alpha CE + beta RCE, alpha 0.1, beta 1                                                        [C]
    CPSL-5   Q = argmax <Q, S> + eps H(Q) over Q >= 0 (K x B) whose columns sum to 1/B and rows to r   that [P], form [C]
    CPSL-6   solved by Sinkhorn-Knopp: Q = exp(S / eps); 3 times: scale row k to sum r_k, then each column to sum 1/B;
             return (B Q)^T. One problem per image: S = cos(z, c) of [bank; its pixels]; only its pixels' rows are kept. [C]
    CPSL-7   L_SL  = mean_i -sum_k Q_i[k] log softmax_k(cos(z_i, c_k) / T)                            that [P], form [C]
    CPSL-8   the same with Q from S = the momentum network's logits at unit length, added to CPSL-7 (--output-term) [C]
    CPSL-9   L_SL  = CPSL-7 + CPSL-8
    CPSL-10  L_cons = mean over valid (n, k, h, w) of t (log t - log s): a KL divergence divided by K;              [C]
             t = softmax_k(cos(f'(x), c'_k) / T), s = softmax_k(cos(f(strong view of x), c'_k) / T)
    CPSL-11  L = L_src + L_t + lambda_cons L_cons + lambda_SL L_SL, weights 5 and 0.1                               [C]
    CPSL-12  later stages: L = L_src + CE(student, y of the previous student) + lambda_KD L_KD                      [C]
    CPSL-13  L_KD = mean over (n, k, h, w) of t (log t - log s), t previous student, s student              [U, see 8]
    CPSL-16  P_SL = softmax_k(cos(f'(x), c'_k) / T), T = 0.08                                         that [P], form [C]
    CPSL-17  y    = argmax_k P_SL[k] P_ST[k]                                                 product [P], hard label [C]

Gradients: L_SL reaches the prototypes c and nothing else [P]; L_cons the network and not c' [C]; Q, y and the momentum copies
receive none. Left out: the authors' contrastive term CPSL-14 (deviation 1), colour transfer in LAB space (deviation 2), the
adversarial warm-up CPSL-15 (deviation 12).

The algorithm                                                                          paper's notion -> function
-------------                                                                          --------------------------
1. Source-only training, or --init.                                                    train_source
2. The warm-up model: its batch norm re-estimated on the target [U]; then              prepare
   r, the histogram of its labels, and the prototypes, class means of its features.    class_sums
3. Self-training. Each step, on a batch of source and a batch of target images:        main
     P_ST by the frozen warm-up model, P_SL by the momentum network and head,
     their product as label, CPSL-16, -17                                              SelfLabelingHead, rectify
     source CE and symmetric CE on the target, CPSL-1 to -4                            segmentation_loss,
                                                                                       symmetric_cross_entropy
     random pixels, their assignment together with the bank's, CPSL-5, -6              prototype_losses, pick_pixels,
                                                                                       MemoryBank, assign, sinkhorn
     the prototypes learn from it, CPSL-7, -8                                          self_labeling_loss
     a distorted view must be seen as the momentum network sees the plain one, CPSL-10 strong_view, kl_divergence
     both momentum copies follow                                                       update_average
4. --distill N: N times a fresh student learns from the last one, CPSL-12, -13.        label_target, distill
5. Evaluate the last student: mIoU, that of the rare classes, and the predicted class histogram (`misplaced`).

Deviations: authors' code (or paper) / here
-------------------------------------------
 1. Contrastive term, weight 0.001, whose labels are misaligned with its features twice; it never falls in their log / none.
 2. LAB colour transfer of GTA5 to random target images; RandAugment with geometry, a flip and cutout in the strong view, labels
    warped along / none; the strong view is blur and colour jitter, each with probability 0.5 and per image.
 3. P_ST of the whole target on disk, 7.5 GB, from clean images, its probabilities resized / the frozen warm-up model sees the
    same augmented images as the student, every step, its logits resized: no file and no geometry to replay. r still comes
    from clean whole images, so that marginal and sampled pixels differ a little.
 4. The momentum network sees whole clean images, its features are resized and cropped to match the student's / it sees the
    student's batch.
 5. Labels and target loss at a quarter of the resolution, features upsampled and then compared / compared on the stride-8 grid,
    cosines and logits upsampled to full resolution.
 6. CutMix for half of the batches, at first without pasting the labels, most likely also in the released 55.7 / --cutmix, off
    by default, image and label pasted at the same place.
 7. CPSL-8 and the consistency always on / CPSL-8 off by default, because Fig. 1 has one L_SL; the consistency on for real data
    and off on the toy, to keep it fast: --consistency. --no-rectify has no prototypes and so no consistency either: compare it
    with a run with --no-consistency.
 8. The distillation loss takes the student's softmax for its logarithm and is no divergence (their log goes below zero) /
    the KL divergence.
 9. Bank scores use prototypes that are not of unit length; c and c' share memory until the first update / of unit length; a copy.
10. The pixels of an image enter the bank before the next image is solved; one draw of positions for all images / every image
    has its problem with the same bank, then all enter; a draw per image, not from padding. Before the bank is full it is not
    used / the same.
11. The momentum network in training mode: batch norm of the whole image, Dropout2d on / training mode, so that live batch norm
    sees the target batch's own statistics (frozen batch norm: no difference); there is no dropout.
12. Warm-up by adversarial training (LSGAN) to 41.4 mIoU / source-only training; the author expects a drop from that.
13. Prototypes: four passes, image means of classes with at least 10 of 33 153 positions, at most 3000 images / one pass, the
    same share of the grid, no bound. A class that no image has enough pixels of starts from a random prototype; one that is
    never predicted has r_k = 0 as well.
14. Features: 256 signed channels of ProDA's head / the shared DeepLabV2's last layer, after its ReLU. --head proda has the
    authors' head without Dropout2d; it trains its own source-only model, and only this file can rebuild its checkpoints. With
    ResNet-101's 2048 channels the bank takes 0.5 GB, in memory and in every checkpoint, with 256 an eighth of that.
15. SGD, rate 1e-4 and five times that for head and prototypes, weight decay 2e-4; past 90 000 steps its poly schedule takes a
    root of a negative number; stopped at about 81 000 / the same rates on real data after --ramp steps, though for 2 + 2 images
    instead of 4 + 4, decay 5e-4 but none on prototypes; it ends with --iterations. On the toy AdamW, one rate of 2e-4 for all,
    64 pixels per image, a bank of 4096 and a momentum of 0.99.
16. Synchronised batch norm; RGB/255; crops of 896x512 from images 2200 wide, scaled by 0.5 to 1.5, evaluation at 2048x1024 /
    the recipe of all methods here: frozen batch norm, ImageNet mean and deviation, images and evaluation at --size, scaled by
    1.0 to 1.5, and colour jitter in the weak view too. On the toy no scaling and live batch norm: the statistics of every
    student are re-estimated on target images before it is scored or labels them (common.adapt_batch_norm).
17. Distillation: SimCLR weights and a batch norm more, the second round starts from the first's student / each round starts
    from --backbone-weights. Labels with confidence above 0.95 of flip-averaged softmax / the same.
18. The checkpoint that is best on the target's validation labels is reported / the last one.

For orientation, the authors' GTA5 runs (best on validation): warm-up 41.4, step 3 55.7, after one and two distillations 59.4
and 60.8 mIoU. Nobody has run this file on GTA5.

Expect on the toy (mean of seeds 0 to 2, two cores of an AMD EPYC, bf16): source only 45.4, with re-estimated batch
norm 54.3, CPSL 55.4 mIoU (54.8 with --no-rectify); 2 1/2 minutes from nothing, 1.3 GB.

    python cpsl.py                                      # toy world: warm-up, self-training, table, picture
    python cpsl.py --marginal uniform                   # the same with a transport problem that knows nothing of the classes
    python cpsl.py --no-rectify                         # plain self-training on argmax P_ST
    python cpsl.py --distill 2                          # with both distillation stages
    python cpsl.py --head proda                         # the authors' head under the prototypes
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

    CPSL-5 lays Q out the other way round, K x B. In float32 at least, also under autocast. The first round is in logarithms,
    which no score over- or underflows; from then on every pixel has a distribution and no class with r_k > 0 is empty. The
    mean over the pixels approaches r with more rounds; r_k = 0 gets nothing.
    """
    S = scores.to(torch.promote_types(scores.dtype, torch.float32))
    r = marginal.to(S)
    # CPSL-6, first round: class k gets the mass r_k, then every pixel 1, which is 1/B up to a factor that cancels
    q = ((S / epsilon).log_softmax(-2) + r.log()).softmax(-1)  # (..., B, K)
    for _ in range(iterations - 1):
        # CPSL-6, the same again
        q = q * (r / q.sum(-2, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny))
        q = q / q.sum(-1, keepdim=True)
    return q


def rectify(soft_label, similarity, temperature=0.08):
    """CPSL-16, CPSL-17: P_ST (N, K, H, W) and cosines (N, K, H, W) to the prototypes -> hard labels (N, H, W).

    The argmax of the product is that of the sum of logarithms.
    """
    log_p_sl = (similarity.float() / temperature).log_softmax(1)  # CPSL-16
    # CPSL-17
    return (log_p_sl + soft_label.float().log()).max(1).indices  # (N, H, W); on a CPU much faster than argmax


def symmetric_cross_entropy(logits, label, alpha=0.1, beta=1.0):
    """CPSL-4, mean over the pixels that are not 255. logits (N, K, h, w), upsampled to the labels' size; label (N, H, W)."""
    logits = common.upsample(logits.float(), label.shape[1:])  # (N, K, h, w) -> (N, K, H, W)
    # CPSL-2
    ce = F.cross_entropy(logits, label, ignore_index=common.IGNORE, reduction="none")  # (N, H, W), 0 where ignored
    # CPSL-3, with P[y] = exp(-CE)
    rce = math.log(1e-4) * torch.expm1(-ce)
    # CPSL-4
    return common.masked_mean(alpha * ce + beta * rce, label != common.IGNORE)


def self_labeling_loss(features, prototypes, assignment, temperature=0.08):
    """CPSL-7 (and CPSL-8, with the other assignment). features (..., D), prototypes (K, D), assignment Q (..., K).

    Only the prototypes receive a gradient.
    """
    cosine = F.normalize(features.detach().float(), dim=-1) @ F.normalize(prototypes.float(), dim=1).T  # (..., K)
    # CPSL-7
    loss = -(assignment.detach() * (cosine / temperature).log_softmax(-1)).sum(-1)  # (...)
    return loss.sum() / max(loss.numel(), 1)


def kl_divergence(teacher, student, valid):
    """CPSL-10 and CPSL-13: KL divergence of softmaxes, from logits (N, K, h, w), mean over the K entries of all valid (N, h, w).

    The teacher's side is cut from the graph.
    """
    log_t, log_s = teacher.detach().float().log_softmax(1), student.float().log_softmax(1)  # (N, K, h, w)
    # CPSL-10, CPSL-13
    return common.masked_mean((log_t.exp() * (log_t - log_s)).mean(1), valid)


class SelfLabelingHead(nn.Module):
    """f_SL: one prototype per class; the score of a pixel is the cosine between its feature and the prototype."""

    def __init__(self, prototypes):
        super().__init__()
        self.prototypes = nn.Parameter(F.normalize(prototypes.float(), dim=1))  # (K, D)

    def forward(self, features):
        """(N, D, h, w) -> cosines (N, K, h, w)."""
        return F.conv2d(F.normalize(features.float(), dim=1), F.normalize(self.prototypes, dim=1)[:, :, None, None])


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
    """For the prototypes' start: sum over images of the mean feature of every class in the image, and how many images had it.

    features (N, D, h, w), label (N, h, w) -> (K, D), (K,). An image counts for a class with at least `least` pixels of it.
    """
    member = F.one_hot(label.flatten(1), num_classes).float()  # (N, h w, K)
    count = member.sum(1)  # (N, K)
    means = member.transpose(1, 2) @ features.float().flatten(2).transpose(1, 2) / count.clamp(min=1)[:, :, None]  # (N, K, D)
    seen = count >= least
    return (means * seen[:, :, None]).sum(0), seen.sum(0)


def pick_pixels(valid, pixels, u):
    """Positions (N, n) of n different pixels in each map, not where `valid` (N, h, w) is false: those with the smallest of
    the random numbers u (N, h, w).

    Where an image has fewer valid pixels, they repeat; where it has none, position 0 stands for them. n is `pixels`, or h w
    if that is smaller.
    """
    valid = valid.flatten(1)  # (N, h w)
    shuffled = u.flatten(1).masked_fill(~valid, 2.0).argsort(1)
    place = torch.arange(min(pixels, valid.shape[1]), device=valid.device) % valid.sum(1, keepdim=True).clamp(min=1)  # (N, n)
    return shuffled.gather(1, place)


def take_pixels(maps, position):
    """maps (N, D, h, w) at position (N, n) -> (N, n, D)."""
    return maps.flatten(2).transpose(1, 2).gather(1, position[:, :, None].expand(-1, -1, maps.shape[1]))


def cutmix_box(height, width, generator):
    """A random rectangle (top, bottom, left, right) that covers half of the area, its height at least half."""
    u = torch.rand(3, generator=generator).tolist()
    h = round((0.5 + 0.5 * u[0]) * height)
    w = round(0.5 * height * width / h)
    top, left = int(u[1] * (height - h + 1)), int(u[2] * (width - w + 1))
    return top, top + h, left, left + w


def cutmix(x_s, y_s, x_t, y_t, generator):
    """With probability 0.5 the target batch with one rectangle of the source batch pasted in, images and labels alike.

    x (N, 3, H, W), y (N, H, W), generator on the CPU.
    """
    paste = torch.rand((), generator=generator) < 0.5
    top, bottom, left, right = cutmix_box(*y_t.shape[1:], generator)
    if not paste:
        return x_t, y_t
    x, y = x_t.clone(), y_t.clone()
    x[:, :, top:bottom, left:right] = x_s[:, :, top:bottom, left:right]
    y[:, top:bottom, left:right] = y_s[:, top:bottom, left:right]
    return x, y


def confident_labels(prob, confidence):
    """(N, K, H, W) probabilities -> (N, H, W) labels, 255 where the best class has no more than `confidence`."""
    best, label = prob.max(1)
    return torch.where(best > confidence, label, common.IGNORE)


@torch.no_grad()
def update_average(average, model, momentum):
    """The momentum copy follows: n steps towards a constant model leave momentum ** n of the way. Buffers are copied."""
    for mean, new in zip(average.parameters(), model.parameters()):
        mean.lerp_(new, 1 - momentum)
    for mean, new in zip(average.buffers(), model.buffers()):
        mean.copy_(new)


class ProDANetwork(common.DeepLabV2):
    """The shared backbone under the authors' head (--head proda) [C]: a signed feature of 256 channels for the prototypes.

    Five branches of 256 channels side by side, reweighted by squeeze and excitation, merged by a 3x3 convolution.
    """

    def __init__(self, num_classes, backbone="resnet101", weights="none"):
        super().__init__(num_classes, backbone, weights)
        kernels = [{"kernel_size": 1}] + [{"kernel_size": 3, "padding": d, "dilation": d} for d in (6, 12, 18, 24)]
        self.classifier = nn.ModuleDict({
            "branches": nn.ModuleList(
                nn.Sequential(nn.Conv2d(self.feature_dim, 256, **kernel), nn.GroupNorm(32, 256), nn.ReLU(inplace=True))
                for kernel in kernels),
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
    plain = torch.stack([images[:, i] * common.STD[i] + common.MEAN[i] for i in range(3)], 1).clamp(0, 1)  # (N, 3, H, W)
    views = []
    with torch.random.fork_rng(devices=[]):
        for number, image in enumerate(plain, common.rank() * len(plain)):
            torch.manual_seed(common.mix_seed(*seed, number))
            views.append(distort(image))
    views = torch.stack(views)
    views = torch.stack([(views[:, i] - common.MEAN[i]) / common.STD[i] for i in range(3)], 1)
    return views.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def prepare(model, args, run):
    """Step 2: the warm-up model W, which stays as it is, the class marginal r (K,) and the prototypes' start (K, D).

    One pass over the target train images as they are; kept in warmup.pt.
    """
    warm, path = copy.deepcopy(model), run.folder / "warmup.pt"
    if args.resume and path.exists():
        saved = common.read_checkpoint(path)
        warm.load_state_dict(saved["model"])
        return warm.eval(), saved["marginal"].to(args.device), saved["prototypes"].to(args.device)
    common.adapt_batch_norm(warm, args)
    warm.eval()
    K = len(common.task_classes(args.source))
    pixels, images = torch.zeros(2, K, dtype=torch.int64, device=args.device).unbind()
    sums = torch.zeros(K, model.feature_dim, device=args.device)
    for batch in common.evaluation_loader(common.target_dataset(args, "train"), args):
        with common.autocast(args.device, args.precision):
            image = batch["image"].to(args.device, memory_format=torch.channels_last)
            features, logits = warm(image)  # (N, D, h, w), (N, K, h, w)
        label = logits.argmax(1)  # (N, h, w)
        pixels += torch.bincount(label.flatten(), minlength=K)
        least = max(1, round(10 / 33153 * label[0].numel()))  # 10 of the authors' 129 x 257 positions
        part, seen = class_sums(features, label, K, least)  # (K, D), (K,)
        sums += part
        images += seen
    pixels, sums, images = (common.all_sum(t) for t in (pixels, sums, images))
    marginal = pixels / pixels.sum()
    random = torch.randn(sums.shape, generator=torch.Generator().manual_seed(common.mix_seed(args.seed, 13))).to(sums)
    prototypes = F.normalize(torch.where(images[:, None] > 0, sums, random), dim=1)
    run.log("warm-up", classes=int((pixels > 0).sum()), rarest=marginal[marginal > 0].min().item())
    run.save("warmup.pt", {**common.pack_model(warm, args), "marginal": marginal, "prototypes": prototypes})
    return warm, marginal, prototypes


def assign(scores, past, marginal, args):
    """Q_cur (N, n, K): CPSL-6 for every image by itself, on the bank's pixels and its own.

    scores (N, n, K) of the images' pixels; past (M, K) of the bank's, M = 0 before it is full.
    """
    both = torch.cat([past.expand(len(scores), -1, -1), scores], 1)  # (N, M + n, K)
    return sinkhorn(both, marginal, args.epsilon, args.sinkhorn_iterations)[:, len(past):]


def prototype_losses(features_e, logits_e, inside, head, bank, logit_bank, marginal, args, step):
    """CPSL-7 and, with --output-term, CPSL-8: the prototypes learn from the assignment of random pixels, which enter the banks.

    features_e (N, D, h, w), logits_e (N, K, h, w) of the momentum network; inside (N, h, w): not padding.
    """
    position = pick_pixels(inside, args.pixels, common.draw(inside.shape, common.generator(args, 7, step)))  # (N, n)
    z = F.normalize(take_pixels(features_e, position).float(), dim=2)  # (N, n, D)
    c = F.normalize(head.prototypes.detach(), dim=1)  # (K, D)
    q = assign(z @ c.T, bank.usable() @ c.T, marginal, args)  # CPSL-5, CPSL-6: (N, n, K)
    losses = {"sl": self_labeling_loss(z, head.prototypes, q, args.temperature)}  # CPSL-7
    bank.push(common.all_gather(z.flatten(0, 1)))  # so that all processes keep the same bank
    if args.output_term:
        o = F.normalize(take_pixels(logits_e, position).float(), dim=2)  # (N, n, K)
        q = assign(o, logit_bank.usable(), marginal, args)
        losses["sl_out"] = self_labeling_loss(z, head.prototypes, q, args.temperature)  # CPSL-8
        logit_bank.push(common.all_gather(o.flatten(0, 1)))
    return losses


def make_optimizer_with_prototypes(model, head, args):
    """The shared groups plus, without weight decay because they are normalised on use, the prototypes."""
    optimizer = make_optimizer(model, args)
    optimizer.add_param_group({"params": [head.prototypes], "weight_decay": 0.0})
    for group in optimizer.param_groups[1:]:  # the classifier's and the prototypes'
        group["scale"] = args.head_scale
    return optimizer


def label_target(model, args, folder):
    """Step 4: hard labels of the target train images from flip-averaged softmax, 255 where not surer than --confidence; as PNGs.

    Returns what the log shows, see common.write_pseudo_labels.
    """
    dataset = common.target_dataset(args, "train", labelled=args.source == "toy")
    labelled = ((batch, confident_labels(prob, args.confidence)) for batch, prob in common.predictions(model, dataset, args, flip=True))
    return common.write_pseudo_labels(folder, labelled, args)


def distill(teacher, source, args, run, stage, file):
    """Step 4: a student that starts anew learns from source labels, from the teacher's sure labels and from its softmax."""
    torch.manual_seed(common.mix_seed(args.seed, 9, stage))
    student, steps = build_model(args), args.distill_iterations
    optimizer, done = make_optimizer(student, args), 0
    if args.resume and (run.folder / file).exists():
        done = common.load_training(run.folder / file, student, optimizer)
    teacher.eval()
    labels = run.folder / "pseudo_labels" / f"stage{stage}"
    if done == 0:
        run.log(f"stage {stage}", **label_target(teacher, args, labels))
    augment = common.training_augment(args.size, args.crop, args.scale_jitter)
    target = common.target_dataset(args, "train", augment, label_dir=labels)
    batches_s = common.training_batches(source, args, seed=common.mix_seed(args.seed, 10, stage), start=done, stop=steps)
    batches_t = common.training_batches(target, args, seed=common.mix_seed(args.seed, 11, stage), start=done, stop=steps)
    student.train()
    for done, batch_s, batch_t in zip(range(done + 1, steps + 1), batches_s, batches_t):
        set_lr(optimizer, common.ramp(done, args) * poly_lr(args.distill_lr, done - 1, steps, args.power))
        x_s, y_s = common.to_device(batch_s, args.device)
        x_t, y_t = common.to_device(batch_t, args.device)
        x_t = strong_view(x_t, args.seed, 12, stage, done)
        with common.autocast(args.device, args.precision):
            (_, logits_s), (_, logits_t) = student(x_s), student(x_t)  # (N, K, h, w)
            with torch.no_grad():
                _, logits_teacher = teacher(x_t)
        everywhere = torch.ones_like(logits_t[:, 0], dtype=torch.bool)  # (N, h, w)
        losses = {"ce_s": segmentation_loss(logits_s, y_s), "ce_t": segmentation_loss(logits_t, y_t),
                  "kd": kl_divergence(logits_teacher, logits_t, everywhere)}  # CPSL-13
        loss = losses["ce_s"] + losses["ce_t"] + args.lambda_kd * losses["kd"]  # CPSL-12
        descend(loss, optimizer, student)
        run.watch(f"stage {stage}", done, steps, lr=optimizer.param_groups[0]["lr"], loss=loss, **losses)
        run.validate(f"stage {stage}", done, steps, student)
        if run.time_to_save(done, steps):
            run.save(file, common.pack_training(student, optimizer, args, done))
    common.adapt_batch_norm(student, args)
    run.save(file, common.pack_training(student, optimizer, args, done))
    return student


def parse_args():
    parser = common.shared_parser(__doc__, adapts=True)
    add, both = parser.add_argument, argparse.BooleanOptionalAction
    add("--iterations", type=common.natural_number, metavar="T", default=common.by_source(240, 90000), help="steps of self-training [C]")
    add("--lr", type=float, metavar="X", default=common.by_source(2e-4, 1e-4), help="its base learning rate [C]")
    add("--head-scale", type=float, metavar="X", default=common.by_source(1.0, 5.0),
        help="multiple of it for classifier and prototypes [C]; --head-lr is that of warm-up and distillation")
    add("--head", choices=("deeplab", "proda"), default="deeplab", help="proda: the authors' head, with its own warm-up")
    add("--marginal", choices=("pseudo", "uniform"), default="pseudo", help="r: share of the warm-up model's labels [P], or 1/K")
    add("--rectify", action=both, default=True, help="without: self-training on argmax P_ST; no prototypes, no momentum copy, no consistency")
    add("--temperature", type=float, metavar="T", default=0.08, help="of the cosine softmax [C]")
    add("--epsilon", type=float, default=0.05, help="eps, weight of the entropy in the transport problem [C]")
    add("--sinkhorn-iterations", type=common.positive_int, metavar="N", default=3, help="n_it [C]")
    add("--pixels", type=common.positive_int, metavar="N", default=common.by_source(64, 256), help="pixels per image in L_SL [C]")
    add("--bank", type=common.natural_number, metavar="N", default=common.by_source(4096, 65536), help="pixels in the memory bank, 0 for none [C]")
    add("--ema", type=float, metavar="X", default=common.by_source(0.99, 0.999), help="momentum of the two copies [C]")
    add("--alpha", type=float, default=0.1, help="weight of CE on the target [C]")
    add("--beta", type=float, default=1.0, help="weight of reverse CE on the target [C]")
    add("--lambda-sl", type=float, default=0.1, help="weight of the self-labelling loss [C]")
    add("--consistency", action=both, default=common.by_source(False, True), help="CPSL-10 [C], one more view of the target per step")
    add("--lambda-cons", type=float, default=5.0, help="its weight [C]")
    add("--output-term", action="store_true", help="add CPSL-8 [C]")
    add("--cutmix", action="store_true", help="paste source rectangles into half of the target batches [C]")
    add("--distill", type=common.natural_number, metavar="N", default=0, help="distillation stages after the self-training [C: 2]")
    add("--distill-iterations", type=common.natural_number, metavar="T", default=common.by_source(240, 90000), help="steps of each [C]")
    add("--distill-lr", type=float, metavar="X", default=common.by_source(1e-3, 6e-4), help="their base learning rate [C]")
    add("--confidence", type=float, metavar="X", default=0.95, help="that a label needs in the distillation [C]")
    add("--lambda-kd", type=float, default=1.0, help="weight of the distillation loss [C]")
    return common.parse(parser)


def main():
    args = parse_args()
    if args.head == "proda" and args.init:
        raise common.InputError("--init: no checkpoint of source_only.py has the --head proda, which trains its own warm-up model")
    if args.backbone == "vgg16-fcn8s":
        raise common.InputError("--backbone vgg16-fcn8s: CPSL needs features and logits on one grid, DeepLabV2's")
    run = common.Run("cpsl", args)
    source_size = args.size if args.source == "toy" else args.source_size
    source = common.source_dataset(args, augment=common.training_augment(source_size, args.crop, args.scale_jitter))
    augment = common.with_padding_mask(common.training_augment(args.size, args.crop, args.scale_jitter))
    target = common.target_dataset(args, "train", augment)
    common.target_dataset(args, "val")  # say now if something is missing

    # Step 1: the source-only model, trained here or given.
    model = build_model(args)
    if args.init:
        common.load_init(model, args, run)
    else:
        train_source(model, source, args, run, "source_only.pt", args.warmup_iterations, args.warmup_lr)
    source_model = copy.deepcopy(model)

    # Step 2: the frozen warm-up model, the class marginal, the prototypes; momentum copies and empty banks.
    warm, marginal, prototypes = prepare(model, args, run)
    if args.marginal == "uniform":
        marginal = torch.full_like(marginal, 1 / len(marginal))
    head = SelfLabelingHead(prototypes)
    # Neither momentum copy is given to the optimizer. The network's parameters keep requires_grad, because a batch norm
    # without it counts as frozen.
    teacher, teacher_head = copy.deepcopy(model), copy.deepcopy(head).requires_grad_(False)
    bank, logit_bank = MemoryBank(args.bank, model.feature_dim, args.device), MemoryBank(args.bank, len(marginal), args.device)
    parts = {"head": head, "teacher": teacher, "teacher_head": teacher_head, "bank": bank, "logit_bank": logit_bank}

    # Step 3: self-training. Names end in s for source, t for target, e for the momentum network ("teacher"), w for the warm-up
    # model, v for the strong view. The last stage of the run writes last.pt.
    files = [f"stage{k}.pt" for k in range(1, args.distill + 1)] + ["last.pt"]
    optimizer, done = make_optimizer_with_prototypes(model, head, args), 0
    if args.resume and (run.folder / files[0]).exists():
        done = common.load_training(run.folder / files[0], model, optimizer, **parts)
    batches_s = common.training_batches(source, args, seed=common.mix_seed(args.seed, 4), start=done, stop=args.iterations)
    batches_t = common.training_batches(target, args, seed=common.mix_seed(args.seed, 5), start=done, stop=args.iterations)
    model.train()
    teacher.train()
    for done, batch_s, batch_t in zip(range(done + 1, args.iterations + 1), batches_s, batches_t):
        set_lr(optimizer, common.ramp(done, args) * poly_lr(args.lr, done - 1, args.iterations, args.power))
        x_s, y_s = common.to_device(batch_s, args.device)
        x_t, padding = common.to_device(batch_t, args.device)  # (N, 3, H, W), (N, H, W): 255 outside the picture, else 0
        valid = padding != common.IGNORE  # (N, H, W)

        # Labels of the target batch.
        with torch.no_grad():
            with common.autocast(args.device, args.precision):
                _, logits_w = warm(x_t)  # (N, K, h, w)
                features_e, logits_e = teacher(x_t) if args.rectify else (None, None)  # (N, D, h, w), (N, K, h, w)
            p_st = common.upsample(logits_w.float(), valid.shape[1:]).softmax(1)  # P_ST, (N, K, H, W)
            y_t = p_st.max(1).indices  # (N, H, W)
            if args.rectify:
                cosine_e = teacher_head(features_e)  # (N, K, h, w)
                rectified = rectify(p_st, common.upsample(cosine_e, valid.shape[1:]), args.temperature)  # CPSL-16, CPSL-17
                changed = common.masked_mean((rectified != y_t).float(), valid)
                y_t = rectified
            y_t = torch.where(valid, y_t, common.IGNORE)

        x_mixed = x_t
        if args.cutmix:
            x_mixed, y_t = cutmix(x_s, y_s, x_t, y_t, torch.Generator().manual_seed(common.mix_seed(args.seed, 6, done)))
        with common.autocast(args.device, args.precision):
            (_, logits_s), (_, logits_t) = model(x_s), model(x_mixed)  # (N, K, h, w)
        losses = {"ce_s": segmentation_loss(logits_s, y_s),  # CPSL-1
                  "sce_t": symmetric_cross_entropy(logits_t, y_t, args.alpha, args.beta)}  # CPSL-4
        loss = losses["ce_s"] + losses["sce_t"]

        if args.rectify:
            inside = common.grid_labels(padding, features_e.shape[2:]) != common.IGNORE  # (N, h, w)
            learned = prototype_losses(features_e, logits_e, inside, head, bank, logit_bank, marginal, args, done)
            losses.update(learned)
            loss = loss + args.lambda_sl * sum(learned.values())  # CPSL-9, CPSL-11
            if args.consistency:
                view = strong_view(x_t, args.seed, 8, done)
                with common.autocast(args.device, args.precision):
                    features_v, _ = model(view)  # (N, D, h, w)
                cosine_v = teacher_head(features_v)  # (N, K, h, w)
                losses["cons"] = kl_divergence(cosine_e / args.temperature, cosine_v / args.temperature, inside)  # CPSL-10
                loss = loss + args.lambda_cons * losses["cons"]  # CPSL-11
            losses["changed"] = changed  # share of pixels whose label the rectification changed

        descend(loss, optimizer, model, head)
        if args.rectify:
            update_average(teacher, model, args.ema)
            update_average(teacher_head, head, args.ema)
        run.watch("adapt", done, args.iterations, lr=optimizer.param_groups[0]["lr"], loss=loss, **losses)
        run.validate("adapt", done, args.iterations, model)
        if run.time_to_save(done, args.iterations):
            run.save(files[0], common.pack_training(model, optimizer, args, done, **parts))
    common.adapt_batch_norm(model, args)
    run.save(files[0], common.pack_training(model, optimizer, args, done, **parts))

    # Step 4: distillation.
    for stage, file in enumerate(files[1:], 2):
        model = distill(model, source, args, run, stage, file)

    # Step 5: both models on the target's validation split, the rare classes and the class histogram among the figures.
    common.compare_with_source_only({"CPSL": model}, args, run, source_model)


if __name__ == "__main__":
    common.run(main)
