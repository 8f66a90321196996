"""LSE: learning from scale-invariant examples for domain adaptation of semantic segmentation.

    M. N. Subhani, M. Ali, "Learning from Scale-Invariant Examples for Domain Adaptation in Semantic Segmentation",
    ECCV 2020, arXiv 2007.14449. Authors' code: github.com/MNaseerSubhani/LSE, read at commit e0fe81b.

READ THIS FIRST. Of the paper only the abstract and the first lines of the introduction were available; the equations come
from the authors' released code and notebooks. Labels such as LSE-6 are this project's own; the paper's equation numbers and
symbols are unknown. Equations, steps and flags carry their origin:

    [P] the paper's abstract     [C] the authors' code     [N] their notebooks, which hold logs     [U] unknown: a choice of ours

The idea in five sentences
--------------------------
1. What an object is does not depend on how large it appears, yet on enlarged target patches a network is less certain than
   on the picture they were cut from [P], so the prediction at the original scale can teach the enlarged view.
2. A source-trained network predicts all target training images; per class they are ranked by the mean confidence of the
   pixels predicted as that class, and the union of every class's best few is selected.
3. In each class's list the best image that was not kept sets an entropy threshold for that class: it is dynamic, because it
   is found anew every round.
4. Random crops of half the size are cut from each selected image and enlarged by two, and the prediction made on the whole
   image *before enlarging* becomes their label, except where its entropy misses the threshold of its class.
5. The network trains on source images by cross-entropy and on the enlarged patches by cross-entropy and a focal loss, which
   is there against class imbalance [P]; then the next round selects a larger share.

Notation
--------
    M target images   C classes (index c)   H x W image   i a pixel
    h x w patch before enlarging, in LSE-12 and its functions; after the network the stride-8 grid
    P_i    softmax at pixel i of the whole image   y_i = argmax P_i, q_i = max P_i   E_i entropy, nats   E^_i normalised
    s_c    confidence of an image in class c       N_c   images in which c is predicted at all   k_c   images kept for c
    x*_c   best image that c does not keep         u_c    mean E^ of an image's pixels with y_i = c
    t_c    entropy threshold of c                  T_r    selected images of round r
    p_r    portion of round r     n_p patches per image     beta weight, gamma exponent of the focal loss
    l_i    -ln P_i(label_i) of the network in training      V pixels whose label is not 255

Equations, all from the authors' code [C]
-----------------------------------------
    LSE-1    L_src = mean_{V_s} l_i                                                   source image, true label
    LSE-2    L_ce = mean_{V_t} l_i                                                    enlarged patch, transferred label
    LSE-3    L_fl = mean_{V_t} (1 - exp(-l_i))^gamma l_i                              (--focal pixel)
             L_fl = (1 - exp(-L_ce))^gamma L_ce                                       (--focal mean, see deviation 3)
    LSE-4    L = L_src + L_ce + beta L_fl,   beta = 0.1, gamma = 3
    LSE-5    s_c = mean_{i: y_i = c} q_i
    LSE-6    k_c = int(N_c p_r / 19): so many images of largest s_c are kept for c; T_r is the union over the classes
    LSE-7    E^_i = (E_i - min_j E_j) / (max_j E_j - min_j E_j), j over the pixels of this image with y_j = y_i
    LSE-8    x*_c: place k_c, counted from 0, of the list of class c
    LSE-9    t_c = mean_{i in x*_c, y_i = c} E^_i, that is u_c of x*_c
    LSE-10   pixel i of a selected image is kept iff E^_i < t_{y_i}
    LSE-11   E_i = -sum_c P_i(c) ln(P_i(c) + 1e-12)
    LSE-12   patch: h x w at a random place; its pixels and P are enlarged to H x W, bilinear with aligned corners;
             label: argmax of the *enlarged* P, so that one can appear between two pixels that both lack it; 255 where not kept
    LSE-13   p_r = p_0 + r delta_p, 0.10 to 0.40 in seven rounds

The mask of LSE-10 only compares pixels of one class inside one image: wherever the class has two different entropies there
and t_c is above 0, its most certain pixel stays and its least certain one goes, however good or bad the class is as a whole.

The algorithm [C]                                                                      paper's notion -> function
-------------                                                                          --------------------------
1. Source-only training, or --init.                                                    train_source
2. Rounds. Rank all target images with the present network: LSE-5                      rank_target, image_confidence
     select confident images and the image behind them, LSE-6, -8                      select_images
     entropy, and the same normalised within its class, LSE-11, -7                     pixel_entropy, normalised_entropy
     dynamic class-specific entropy threshold, LSE-9                                   image_uncertainty, class_thresholds
3. Label n_p enlarged patches of every selected image with the same network:           label_target
     filter, LSE-10                                                                    keep_confident
     transfer the labels across scales, LSE-12                                         random_windows, transfer_labels, Patches
4. Train on source images and patches, LSE-1 to -4, --epochs times over the patches.   main, segmentation_loss, focal_loss
   Enlarge p, LSE-13, and go to 2.                                                     round_portion, round_steps
5. Evaluate the last checkpoint.

Every round logs what the method rests on [P]: `entropy_gap`, the mean entropy on enlarged patches minus that of the
enlarged prediction of the whole image. On the toy it is hardly above zero (-0.003 to 0.045 nats), so that the premise is weak
there and --scale 1 is better. In the toy world it also logs the accuracy of the labels, which nothing uses.

Deviations: authors' code / here
--------------------------------
 1. Network. VGG16-FCN8s (the paper's headline) and DeepLabV2 of which a misplaced `return` leaves two of four branches /
    DeepLabV2 with four branches as in all files here; --backbone vgg16-fcn8s is the other.
 2. SYNTHIA. 19 outputs; terrain, truck and train are neither ranked nor filtered, so nearly all their pixels become labels /
    16 outputs. The divisor in LSE-6 is 19 in both.
 3. Focal loss. Per pixel for VGG; for DeepLab of the mean cross-entropy of one patch, which modulates no pixel; gamma is 5 in
    the GTA5 DeepLab notebook [N]; the option `--focal-loss False` leaves the loss on / per pixel for both; --focal mean takes
    the mean of the batch (under torchrun not the same as in one process); --focal off, or --beta 0, drops it.
 4. Mask. Enlarged bilinearly and kept where not exactly 0, which lets it grow: one pixel becomes 16, and of a random half
    94 % stay / nearest neighbour, one pixel becomes 4; --mask-mode dilate is the other.
 5. A class with one pixel or one entropy in an image. 0/0, and comparisons with NaN keep the pixel, even the whole class if
    it happens in x*_c / E^ = 0; t_c comes from the next image of the list that defines one. A class that has none is dropped.
 6. List of selected images. From the second round on it is walked shuffled with repeats, about 35 % of T_r are lost, and one
    image too many is cut / each image of T_r exactly n_p times.
 7. Patches without a kept pixel. NaN / a loss of zero.
 8. Batch norm. Running statistics move at batch 1, enlarged patches mixed in / frozen on real data. On the toy live: each
    domain's batch is normalised by its own statistics, and those for ranking, labelling and evaluation are re-estimated on
    target images (common.adapt_batch_norm).
 9. Optimizer. DeepLab: SGD that lists most weights three or four times and so moves them three or four times as far as the
    rate says, and one SYNTHIA log with a rate of 1e-12 whose scores are the published row / each weight once, rate 1e-6 on real
    data as the code's default. FCN8s: Adam, no weight decay, twice the rate for biases / the same with --optimizer adam
    --head-lr 1. Rates are constant for VGG, poly anew each round for DeepLab / poly, anew each round with --iterations 0, and
    rising over the first --ramp steps; --power 0 --ramp 0 turns both off.
10. Batch. 1 + 1, two backward passes / n + n, one backward pass of the sum: the same gradient from more memory, means over the
    valid pixels of the whole batch, and with --batch-size 2 half as many steps. With 9 the default run moves DeepLab's weights
    about a seventh as far as theirs did: try --batch-size 1 --lr 3.5e-6.
11. Augmentation. None: whole source images, patches as they are / the source as in all files here (random scale but on the toy, crop,
    flip, colour jitter), patches with flip and colour jitter; --no-augment for plain patches.
12. Stopping. Fixed rounds at the last commit; notebooks stop by the entropy on the *validation* images / fixed rounds.
13. Toy: two rounds with larger portions, because 0.10 of 400 images is two per class, and --iterations for both rounds in all.
14. --rank global. Coded in [N] and off, form unknown / the same number of images, by mean confidence over all pixels;
    thresholds stay those of the classes.
15. Source-only start. Given files, their making only partly known / trained here. RGB and ImageNet statistics, not BGR, for
    which FCN8s scales pool3 and pool4 otherwise (see its docstring).
16. The tail of the last round, up to 500 steps, was never saved / last.pt is saved at the end of every round.
17. Evaluation. Probabilities are upsampled / logits are, as in all files here.

Published rows, from a third party's table: GTA5 39.0 (VGG16), 47.5 (ResNet-101); SYNTHIA, 16 and 13 classes: 40.0 and 47.0
(VGG16), 42.6 and 49.4 (ResNet-101, the row of deviation 9, from a start of unknown origin). Nobody has run this file on them.

Expect on the toy (mean of seeds 0 to 2, two cores of an AMD EPYC, bf16): source only 45.4, with re-estimated batch
norm 54.3, LSE 54.9 mIoU (59.0 with --scale 1); 2 1/2 minutes from nothing, 1.3 GB.

    python scale_invariant.py                                     # toy world: warm-up, two rounds, table, picture
    python scale_invariant.py --scale 1                           # self-training on whole images, not enlarged
    python scale_invariant.py --source synthia --data-root DIR --init runs/source_only-synthia-s0/last.pt
    python source_only.py --source gta5 --data-root DIR --backbone vgg16-fcn8s
    python scale_invariant.py --source gta5 --data-root DIR --backbone vgg16-fcn8s --optimizer adam --head-lr 1 \\
        --batch-size 1 --init runs/source_only-gta5-s0/last.pt
"""

import argparse
import json
import math

import torch
import torch.nn.functional as F

import common


# ================================================== the equations ==================================================


def pixel_entropy(prob):
    """LSE-11: entropy (H, W) in nats of probabilities (C, H, W). Uniform: ln C."""
    return -(prob * (prob + 1e-12).log()).sum(0)


def normalised_entropy(entropy, label):
    """LSE-7: entropy (H, W) brought to [0, 1] inside each predicted class; label (H, W). 0 for a class with one value."""
    E, y = entropy.flatten(), label.flatten()
    low = E.new_full((256,), math.inf).scatter_reduce(0, y, E, "amin")  # (256,): enough for any number of classes
    high = E.new_full((256,), -math.inf).scatter_reduce(0, y, E, "amax")
    span = high - low
    # LSE-7
    return (entropy - low[label]) / torch.where(span > 0, span, 1)[label]


def class_means(values, label, num_classes):
    """Mean of values (H, W) over the pixels of each class of label (H, W): (C,) in float64, NaN for a class without any."""
    total = torch.bincount(label.flatten(), values.flatten().double(), minlength=num_classes)
    return total / torch.bincount(label.flatten(), minlength=num_classes)


def image_confidence(prob):
    """LSE-5: s (C,), the mean top-1 probability of the pixels predicted as each class; NaN where it is not predicted."""
    q, y = prob.max(0)  # (H, W)
    return class_means(q, y, len(prob))


def image_uncertainty(prob):
    """u (C,), the mean normalised entropy of the pixels predicted as each class, of which LSE-9 picks; NaN without any."""
    y = prob.max(0).indices  # (H, W); on a CPU much faster than argmax
    return class_means(normalised_entropy(pixel_entropy(prob), y), y, len(prob))


def rank_images(confidence):
    """Every class's list: image indices (M, C) by falling confidence (M, C); equal ones from the back, NaN at the end."""
    values = confidence.nan_to_num(nan=-1.0).flip(0)
    return len(confidence) - 1 - values.argsort(dim=0, descending=True, stable=True)


DIVISOR = 19  # of LSE-6, the number of Cityscapes classes, also for SYNTHIA's 16


def select_images(confidence, portion):
    """LSE-6 and LSE-8. confidence (M, C) -> (indices of T_r, sorted and unique; x* (C,): best image not kept, -1 if none)."""
    order = rank_images(confidence)  # (M, C)
    N = confidence.isfinite().sum(0)  # (C,)
    k = (N.double() * portion / DIVISOR + 1e-6).long().clamp(max=N)  # LSE-6; 1e-6, because 2660 * 0.35 / 19 is 48.99999999999999
    place = torch.arange(len(order), device=order.device)[:, None]
    selected = order[place < k].unique()
    # LSE-8
    reference = torch.cat([order, order.new_zeros(1, len(k))]).gather(0, k[None])[0]  # (C,); a row more, because k may be M
    return selected, torch.where(k < N, reference, -1)


def class_thresholds(confidence, uncertainty, reference):
    """LSE-9: t (C,). confidence, uncertainty (M, C): of every image and class; reference (C,): x*.

    An image where all pixels of the class have one entropy defines no threshold (its uncertainty is 0): the next one of the
    list does. Without any, t is 0 and LSE-10 keeps nothing.
    """
    order = rank_images(confidence)  # (M, C)
    u = uncertainty.gather(0, order)  # (M, C), along each class's list
    usable = ((order == reference).cumsum(0) > 0) & (u > 0)  # (M, C): x* and all behind it, where they define a threshold
    first = usable.int().argmax(0)[None]  # (1, C)
    # LSE-9
    return torch.where(usable.any(0), u.gather(0, first)[0], 0)


def keep_confident(normalised, label, thresholds):
    """LSE-10: mask (H, W) of the pixels whose normalised entropy is below the threshold (C,) of their label."""
    return normalised < thresholds[label]


def random_windows(images, patches, size, scale, generator):
    """LSE-12: corners (images, patches, 2), y and x, of windows of 1/scale of `size`, uniform over all places where they fit."""
    corners = [torch.randint(full - full // scale + 1, (images, patches), generator=generator) for full in size]
    return torch.stack(corners, 2)


def cut(maps, y, x, scale):
    """The window of maps (..., H, W) at (y, x) that has 1/scale of their height and width."""
    return maps[..., y:y + maps.shape[-2] // scale, x:x + maps.shape[-1] // scale]


def enlarge(maps, size):
    """(C, h, w) -> (C, H, W), bilinear with aligned corners."""
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=True)[0]


def transfer_labels(prob, keep, size, mask_mode="nearest"):
    """LSE-12: labels (H, W) of an enlarged patch from what the whole image said there, prob (C, h, w) and keep (h, w).

    mask_mode: "nearest" keeps the share of kept pixels, "dilate" keeps what any kept pixel reaches bilinearly.
    """
    label = enlarge(prob, size).max(0).indices  # (H, W): enlarge first, then decide
    keep = keep[None].to(prob.dtype)  # (1, h, w)
    keep = enlarge(keep, size) if mask_mode == "dilate" else F.interpolate(keep[None], size=size, mode="nearest")[0]
    return torch.where(keep[0] > 0, label, common.IGNORE)


def focal_loss(logits, label, gamma):
    """LSE-3 of logits (N, C, h, w) against labels (N, H, W): mean over the pixels that are not 255, a connected zero for none."""
    logits = common.upsample(logits.float(), label.shape[1:])  # (N, C, h, w) -> (N, C, H, W)
    l = F.cross_entropy(logits, label, ignore_index=common.IGNORE, reduction="none")  # (N, H, W), 0 where 255
    doubt = -torch.expm1(-l)  # 1 - exp(-l)
    focal = doubt.clamp(min=1e-12) ** gamma * l  # clamped, because for gamma < 1 the power has no slope at 0
    # LSE-3
    return common.masked_mean(focal, label != common.IGNORE)


def focal_of_mean(cross_entropy, gamma):
    """LSE-3 as the authors' DeepLab computes it: from the mean cross-entropy L_ce, a scalar."""
    return (-torch.expm1(-cross_entropy)).clamp(min=1e-12) ** gamma * cross_entropy


def round_portion(p_0, delta_p, r):
    """LSE-13: p of round r, counted from 0. Rounded, because the seventh of 0.1, 0.15, ... must be 0.4."""
    return round(p_0 + r * delta_p, 9)


def round_steps(patches, epochs, batch_size):
    """Training steps of one round: `epochs` times over its patches."""
    return max(1, epochs * patches // batch_size)


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


def faster_biases(optimizer):
    """Deviation 9, FCN8s: biases learn at twice the rate. Splits every group in two."""
    for group in list(optimizer.param_groups):
        biases = [p for p in group["params"] if p.ndim == 1]
        group["params"] = [p for p in group["params"] if p.ndim > 1]
        optimizer.add_param_group({**group, "params": biases, "scale": 2 * group["scale"]})


class Patches(torch.utils.data.Dataset):
    """The enlarged patches of one round (LSE-12) with the labels that label_target wrote to `folder`."""

    def __init__(self, args, folder):
        self.images, self.folder, self.size = common.target_dataset(args, "train"), folder, args.size
        self.patches, self.scale = json.loads((folder / "round.json").read_text())["patches"], args.scale
        self.augment = common.training_augment(args.size, args.size, None) if args.augment else None

    def __len__(self):
        return len(self.patches)

    def __getitem__(self, number):
        index, n, y, x = self.patches[number]
        item = self.images[index]
        patch = enlarge(cut(item["image"], y, x, self.scale), self.size)  # (3, H, W)
        name = f"{item['name']}_{n}"
        return common.make_item(common.to_picture(patch), common.stored_label(self.folder, name), name, None, self.augment, False)


def predictions(model, dataset, args):
    """Number, item and probabilities (C, H, W) of every image in this process's share of a data set."""
    number = common.rank()
    for batch, probabilities in common.predictions(model, dataset, args):
        for i, prob in enumerate(probabilities):
            yield number, {key: values[i] for key, values in batch.items()}, prob
            number += common.world_size()


def rank_target(model, dataset, args):
    """Step 2, one pass over the target: of each image s (M, C), u (M, C) and the mean confidence of all its pixels (M,)."""
    C = len(common.task_classes(args.source))
    table = torch.zeros(len(dataset), 2 * C + 1, dtype=torch.float64, device=args.device)
    for number, _, prob in predictions(model, dataset, args):
        table[number] = torch.cat([image_confidence(prob), image_uncertainty(prob), prob.amax(0).double().mean()[None]])
    confidence, uncertainty, overall = common.all_sum(table).cpu().split([C, C, 1], dim=1)
    return confidence, uncertainty, overall[:, 0]


def label_target(model, args, folder, r):
    """Steps 2 and 3: selects images, draws their patches and writes label PNGs and round.json to `folder`.

    Returns what the log shows: portion, selected images, patches, entropy_gap, measured on the first patch of each image, and
    what common.write_pseudo_labels tells.
    """
    model.eval()
    size = args.size
    dataset = common.target_dataset(args, "train", labelled=args.source == "toy")
    portion = round_portion(args.portion, args.portion_step, r)  # LSE-13
    confidence, uncertainty, overall = rank_target(model, dataset, args)
    selected, reference = select_images(confidence, portion)
    if len(selected) == 0:
        most = confidence.isfinite().sum(0).max().item()  # at least 1, because every pixel is predicted as something
        raise common.InputError(f"round {r + 1}: a portion of {portion} selects no image, because a class keeps 1/{DIVISOR} of that "
                                f"share and none is predicted in more than {most}; give --portion "
                                f"{math.ceil(1000 * DIVISOR / most) / 1000} or more")
    thresholds = class_thresholds(confidence, uncertainty, reference)  # (C,)
    if args.rank == "global":
        selected = overall.topk(len(selected)).indices.sort().values
    generator = torch.Generator().manual_seed(common.mix_seed(args.seed, 6, r))  # the same in all processes
    windows = random_windows(len(selected), args.patches, size, args.scale, generator).tolist()
    patches = [[index, n, y, x] for index, corners in zip(selected.tolist(), windows) for n, (y, x) in enumerate(corners)]
    if common.rank() == 0:
        state = {"portion": portion, "thresholds": thresholds.tolist(), "references": reference.tolist(), "patches": patches}
        common.write_atomically(folder / "round.json", lambda path: path.write_text(json.dumps(state)))

    thresholds = thresholds.to(args.device).float()
    gap = torch.zeros((), dtype=torch.float64, device=args.device)

    def labelled():
        """Name, transferred label and, in the toy world, true label of every patch of this process's images."""
        for i, item, prob in predictions(model, torch.utils.data.Subset(dataset, selected.tolist()), args):
            entropy, label = pixel_entropy(prob), prob.max(0).indices  # (H, W)
            keep = keep_confident(normalised_entropy(entropy, label), label, thresholds)
            for _, n, y, x in patches[i * args.patches:(i + 1) * args.patches]:
                patch = {"name": [f"{item['name']}_{n}"]}
                if "label" in item:
                    truth = cut(item["label"], y, x, args.scale)[None, None].float()
                    patch["label"] = F.interpolate(truth, size=size, mode="nearest")[0]  # (1, H, W)
                there = cut(prob, y, x, args.scale)  # (C, h, w)
                yield patch, transfer_labels(there, cut(keep, y, x, args.scale), size, args.mask_mode)[None]  # (1, H, W)
                if n == 0:
                    view = enlarge(cut(item["image"], y, x, args.scale), size)[None]  # (1, 3, H, W)
                    gap.add_(pixel_entropy(common.predict(model, view, size, args.precision)[0]).mean()
                             - pixel_entropy(enlarge(there, size)).mean())

    told = common.write_pseudo_labels(folder, labelled(), args)
    if told["kept"] == 0:
        raise common.InputError(f"round {r + 1}: a portion of {portion} leaves no labelled pixel; choose another --portion")
    return {"portion": portion, "images": len(selected), "patches": len(patches),
            "entropy_gap": (common.all_sum(gap) / len(selected)).item(), **told}


def parse_args():
    parser = common.shared_parser(__doc__, adapts=True)
    add = parser.add_argument
    add("--rounds", type=common.positive_int, metavar="N", default=common.by_source(2, 7), help="rounds of ranking and training [C]")
    add("--iterations", type=common.natural_number, metavar="T", default=common.by_source(240, 0),
        help="adaptation steps, all rounds together; 0: as --epochs says [C]")
    add("--epochs", type=common.positive_int, metavar="N", default=2,
        help="with --iterations 0: times over the patches of a round, poly decay starting anew in each [C]")
    add("--lr", type=float, metavar="X", default=common.by_source(2e-4, 1e-6), help="base learning rate of the adaptation [C]")
    add("--portion", type=float, metavar="p_0", default=common.by_source(1.0, 0.10),
        help="p of the first round: 19 times the share of images that a class keeps [C]")
    add("--portion-step", type=float, metavar="X", default=common.by_source(0.5, 0.05), help="delta_p, its growth per round [C]")
    add("--patches", type=common.positive_int, metavar="n_p", default=4, help="random patches per selected image [C]")
    add("--scale", type=int, choices=(1, 2), default=2, help="how much patches are enlarged; 1: self-training on whole images, all n_p patches the same [C]")
    add("--rank", choices=("class", "global"), default="class", help="images confident in a class, or as many confident ones [C, N]")
    add("--mask-mode", choices=("nearest", "dilate"), default="nearest", help="how the mask of kept pixels is enlarged [U, C]")
    add("--focal", choices=("pixel", "mean", "off"), default="pixel", help="focal loss per pixel, of the mean, or none [C]")
    add("--beta", type=float, default=0.1, help="weight of the focal loss [C]")
    add("--gamma", type=float, default=3.0, help="its exponent [C; 5 in one notebook]")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="mirror patches and vary their colours [U]")
    return common.parse(parser)


def main():
    args = parse_args()
    run = common.Run("scale_invariant", args)
    source_size = args.size if args.source == "toy" else args.source_size
    source = common.source_dataset(args, augment=common.training_augment(source_size, args.crop, args.scale_jitter))
    common.target_dataset(args, "train"), common.target_dataset(args, "val")  # say now if something is missing

    # Step 1: the source-only model, trained here or given.
    model = common.build_model(args)
    if args.init:
        common.load_init(model, args, run)
    else:
        train_source(model, source, args, run, "source_only.pt", args.warmup_iterations, args.warmup_lr)

    # Steps 2 to 4: rounds of selection, labels and training on both domains. One optimizer for all of them.
    # done: steps of the whole run so far; first, last: where a round starts and ends; begin, end: where the poly decay does.
    optimizer, done, first = make_optimizer(model, args), 0, 0
    if args.backbone == "vgg16-fcn8s":
        faster_biases(optimizer)
    if args.resume and (run.folder / "last.pt").exists():
        done = common.load_training(run.folder / "last.pt", model, optimizer)
    for r in range(args.rounds):
        folder = run.folder / "pseudo_labels" / f"round{r + 1}"
        if done <= first:  # a new round: images and labels by the present network
            common.adapt_batch_norm(model, args)
            run.log(f"round {r + 1}", **label_target(model, args, folder, r))
        target = Patches(args, folder)
        if args.iterations:
            last, begin, end = args.iterations * (r + 1) // args.rounds, 0, args.iterations
        else:
            last = first + round_steps(len(target), args.epochs, args.batch_size)
            begin, end = first, last  # the learning rate decays within the round
        if done >= last:
            first = last
            continue
        batches_s = common.training_batches(source, args, seed=common.mix_seed(args.seed, 4), start=done, stop=last)
        batches_t = common.training_batches(target, args, seed=common.mix_seed(args.seed, 5, r), start=done - first, stop=last - first)
        model.train()
        for done, batch_s, batch_t in zip(range(done + 1, last + 1), batches_s, batches_t):
            set_lr(optimizer, common.ramp(done, args) * poly_lr(args.lr, done - 1 - begin, end - begin, args.power))
            x_s, y_s = common.to_device(batch_s, args.device)
            x_t, y_t = common.to_device(batch_t, args.device)  # y_t: transferred labels
            with common.autocast(args.device, args.precision):
                (_, logits_s), (_, logits_t) = model(x_s), model(x_t)  # (N, C, h, w)
            losses = {"ce_s": segmentation_loss(logits_s, y_s), "ce_t": segmentation_loss(logits_t, y_t)}  # LSE-1, LSE-2
            loss = losses["ce_s"] + losses["ce_t"]
            if args.focal != "off":  # LSE-3
                losses["focal"] = (focal_loss(logits_t, y_t, args.gamma) if args.focal == "pixel"
                                   else focal_of_mean(losses["ce_t"], args.gamma))
                loss = loss + args.beta * losses["focal"]  # LSE-4
            descend(loss, optimizer, model)
            run.watch("adapt", done, end, lr=optimizer.param_groups[0]["lr"], loss=loss, **losses)
            run.validate("adapt", done, end, model)
            if run.time_to_save(done, last):
                run.save("last.pt", common.pack_training(model, optimizer, args, done))
        first = last

    # Step 5: both models on the target's validation split.
    common.adapt_batch_norm(model, args)
    run.save("last.pt", common.pack_training(model, optimizer, args, done))
    common.compare_with_source_only({"LSE": model}, args, run)


if __name__ == "__main__":
    common.run(main)
