"""LSE: learning from scale-invariant examples for domain adaptation of semantic segmentation.

    M. N. Subhani, M. Ali, "Learning from Scale-Invariant Examples for Domain Adaptation in Semantic Segmentation",
    ECCV 2020, arXiv 2007.14449. Authors' code: github.com/MNaseerSubhani/LSE, read at commit e0fe81b.

READ THIS FIRST. Of the paper only the abstract and the first lines of the introduction were available; the equations
come from the authors' released code and notebooks. Labels such as LSE-6 are this project's own; the paper's equation
numbers and symbols are unknown. Equations, steps and flags carry their origin:
    [P] the paper's abstract    [C] the authors' code    [N] their notebooks, which hold logs    [U] unknown: our choice

The idea in five sentences
--------------------------
1. What an object is does not depend on how large it appears, yet a network does worse on enlarged target patches than
   on the picture they were cut from (its entropy is higher [P]); so what it says of the picture can teach the patch.
2. A source-trained network predicts all target training images; per class they are ranked by the mean confidence of the
   pixels predicted as that class, and the union of every class's best few is selected.
3. In each class's list the best image that was not kept sets an entropy threshold for that class: it is dynamic,
   because it is found anew every round.
4. Random windows of half the height and width are cut from each selected image and enlarged by two; the prediction made
   on the whole image *before enlarging* is their label, but where its entropy misses the threshold of its class.
5. The network trains on source images by cross-entropy and on the enlarged patches by cross-entropy and a focal loss,
   which is there against class imbalance [P]; then the next round selects a larger share.

Notation
--------
    M target images   C classes (index c)   H x W image   h x w window (elsewhere the network's grid)   i, j pixels
    P_i    softmax at pixel i of the whole image   y_i = argmax P_i, q_i = max P_i   E_i entropy (nats), E^_i normalised
    s_c    confidence of an image in class c       N_c   images in which c is predicted at all   k_c   images kept for c
    x*_c   best image that c does not keep         u_c   mean E^ of an image's pixels with y_i = c   t_c   its threshold
    T_r    selected images of round r              p_r   portion of round r             n_p   patches per selected image
    l_i    -ln P_i(label_i) of the network in training      V_s, V_t   source, target pixels whose label is not 255

Equations, all from the authors' code [C]
-----------------------------------------
    LSE-1    L_src = mean_{V_s} l_i                                             source image, true label
    LSE-2    L_ce = mean_{V_t} l_i                                              enlarged patch, transferred label
    LSE-3    L_fl = mean_{V_t} (1 - exp(-l_i))^gamma l_i                        --focal pixel
             L_fl = (1 - exp(-L_ce))^gamma L_ce                                 --focal mean, see deviation 3
    LSE-4    L = L_src + L_ce + beta L_fl,   beta = 0.1, gamma = 3
    LSE-5    s_c = mean_{i: y_i = c} q_i
    LSE-6    k_c = int(N_c p_r / 19): so many images of largest s_c are kept for c; T_r is the union over the classes
    LSE-7    E^_i = (E_i - min_j E_j) / (max_j E_j - min_j E_j), j over the pixels of this image with y_j = y_i
    LSE-8    x*_c: place k_c, counted from 0, of the list of class c
    LSE-9    t_c = mean_{i in x*_c, y_i = c} E^_i, that is u_c of x*_c
    LSE-10   pixel i of a selected image is kept iff E^_i < t_{y_i}
    LSE-11   E_i = -sum_c P_i(c) ln(P_i(c) + 1e-12)
    LSE-12   patch: h x w = H/2 x W/2 at a random place; its pixels and P are enlarged to H x W, bilinear with aligned
             corners; label: argmax of the *enlarged* P, so that one can appear between two pixels that both lack it;
             255 where not kept
    LSE-13   p_r = p_0 + r delta_p, 0.10 to 0.40 in seven rounds of int(epochs n_p |T_r| / batch size) steps
E^ only ranks the pixels of one class inside one image: where the class has two entropies there and t_c > 0, its most
certain pixel stays and its least certain one goes, however good or bad the class is as a whole.

The algorithm [C]                                                           paper's notion -> function
-------------                                                               --------------------------
1. Source-only training, or --init.                                         train_source
2. Rounds. Rank all target images with the present network: LSE-5           rank_target, image_confidence
     select confident images and the image behind them: LSE-6, -8           select_images
     entropy, and the same normalised within its class: LSE-11, -7          pixel_entropy, normalised_entropy
     dynamic class-specific entropy threshold: LSE-9                        image_uncertainty, class_thresholds
3. Label n_p enlarged patches of every selected image with this network:    label_target
     filter: LSE-10                                                         keep_confident
     transfer the labels across scales: LSE-12                              random_windows, transfer_labels, Views
4. Train on source images and patches: LSE-1 to -4.                         step_losses
   Enlarge p, LSE-13, and go to 2.                                          round_portion, round_steps
5. Evaluate the last checkpoint.

What the method rests on is logged every round, by meters of ours [U], on one enlarged window of every selected image:
`entropy_gap`, the entropy on the enlarged view minus that of the whole image's prediction there, the premise in the
abstract's words; `cross_entropy` of the prediction on the enlarged view against the whole image's label there;
`agreement`, the share of equal argmax. Look at the last two: a network can be as *certain* on the enlarged view as on
the whole image and yet be wrong there, which entropy cannot see and which is what there is to learn. result.json holds
all three, `before` (the source-only model, its batch norm settled) and `after`, on the target's validation images cut
into their 2 x 2 half-size windows, each enlarged by two, and `enlarged_miou`, the mIoU on these views against the truth
enlarged alike.

Controls, --view. In all of them the network labels whole images and is scored on whole images.
    enlarged   the method: windows of half the size, enlarged by two.
    window     the same windows as they are: less context, but no other scale.
    whole      the whole image, n_p times: neither, plain self-training with the same labels.
    both       the n_p enlarged patches of an image and the image itself, 1 + n_p examples in random order, which the
               authors wrote and commented out. With --iterations 0 a round then has (1 + n_p) / n_p times the steps.

Deviations
----------
 1. Network. Authors: VGG16-FCN8s (the paper's headline); DeepLabV2 of which a misplaced `return` leaves two of four
    branches, on a ResNet that strides in its 1x1. Here: DeepLabV2 with four branches on torchvision's ResNet, which
    strides in its 3x3; --backbone vgg16-fcn8s is the other. Input. Authors: BGR, 0 to 255 minus Caffe's mean. Here:
    normalised RGB, for which FCN8s scales pool4 and pool3 by 0.58 and 0.0058, not by 0.01 and 0.0001 (common.FCN8s).
 2. SYNTHIA. Authors: 19 outputs; terrain, truck and train are neither ranked nor filtered, so nearly all their pixels
    become labels. Here: 16 outputs. The divisor in LSE-6 is 19 in both.
 3. Focal loss. Authors: per pixel for VGG; for DeepLab of one patch's mean cross-entropy, which modulates no pixel; and
    `--focal-loss False` leaves the loss on. Here: per pixel; --focal mean takes the mean of the batch.
 4. Mask. Authors: enlarged bilinearly and kept where not exactly 0, so that it grows: one pixel becomes 16, and of a
    random half 94 % stay. Here: nearest neighbour, one pixel becomes 4; --mask-mode dilate is the other.
 5. A class with one entropy in an image. Authors: 0/0, and comparisons with NaN keep the pixel, even the whole class if
    it happens in x*_c. Here: E^ = 0; t_c comes from the next image of the list that defines one; else the class is out.
 6. A class that is predicted nowhere. Authors: the program ends in an error. Here: it selects nothing.
 7. List of selected images. Authors: from the second round on it is walked shuffled with repeats, about 35 % of T_r are
    lost, and one image too many is cut. Here: each image of T_r exactly n_p times.
 8. Patches without a kept pixel. Authors: NaN. Here: a loss of zero.
 9. Batch norm. Authors: affine part frozen, statistics move at batch 1, patches mixed in. Here: --batch-norm, none of
    whose values is that; statistics for labelling and evaluation come from up to 400 views of the kind on which the
    network is trained, drawn from all target images.
10. Optimizer. Authors: DeepLab's SGD lists body weights about 3.06 times and head weights once, and moves each as often
    in every step; one SYNTHIA log has a rate of 1e-12 and the scores of the published row. Here: each weight once.
11. Batch. Authors: 1 + 1, two backward passes. Here: n + n, one pass of the sum (the same gradient), means over the
    batch's valid pixels, 1/n as many steps. To move weights as theirs: about --batch-size 1 --lr 3.1e-6 --head-lr 3.3.
12. Augmentation. Authors: none. Here: flip and colour jitter (source: also crop and scale, as in all files);
    --no-augment leaves the patches as they are.
13. Stopping. Authors: fixed rounds at the last commit; by the entropy on *validation* images in notebooks; up to 500
    steps of the last round are never saved. Here: fixed rounds, all of them saved.

    setting             authors                                      here
    rate over time      VGG constant, DeepLab poly in each round     poly, in each round with --iterations 0, after a
                                                                     --ramp; constant with --power 0 --ramp 0
    FCN8s               Adam, biases at twice the rate               the same with --optimizer adam --head-lr 1
    source-only start   files, their making partly known             trained here or by source_only.py
    evaluation          probabilities are upsampled                  logits are, as in all files here

Published, from a third party's table: GTA5 39.0 (VGG16), 47.5 (ResNet-101); SYNTHIA, 16 and 13 classes, 40.0 and 47.0
(VGG16), 42.6 and 49.4 (ResNet-101, the row of deviation 10, its start unknown). Nobody has run this file on them.

Expect on the toy (mean of seeds 0 to 4; fp32): source only 32.7, with re-estimated batch norm 33.0, LSE 35.1 mIoU (both
views 35.9, whole images 36.3), and on enlarged views 25.1 (24.5, 15.7) after 17.0; 8 minutes on one thread of an AVX2
core, 0.9 GB. It learns the scale that it is taught, and is scored at the other one.

    python scale_invariant.py                                   # toy world: warm-up, two rounds, table, picture
    python scale_invariant.py --view whole                      # self-training on whole images, not enlarged
    python scale_invariant.py --source synthia --data-root DIR --init runs/source_only-synthia-s0/last.pt
    python source_only.py --source gta5 --data-root DIR --backbone vgg16-fcn8s
    python scale_invariant.py --source gta5 --data-root DIR --backbone vgg16-fcn8s --optimizer adam --head-lr 1 \\
        --batch-size 1 --init runs/source_only-gta5-s0/last.pt
"""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Subset

import common


# ================================================== the equations ==================================================


def pixel_entropy(prob):
    """LSE-11: entropy (H, W) in nats of probabilities (C, H, W). Uniform: ln C."""
    return -(prob * (prob + 1e-12).log()).sum(0)


def normalised_entropy(entropy, label):
    """LSE-7: entropy (H, W) brought to [0, 1] in each predicted class of label (H, W); 0 in a class of one value."""
    E, y = entropy.flatten(), label.flatten()  # (H W,)
    low = E.new_full((256,), math.inf).scatter_reduce(0, y, E, "amin")  # (256,): enough for any number of classes
    high = E.new_full((256,), -math.inf).scatter_reduce(0, y, E, "amax")
    span = high - low
    # LSE-7
    return (entropy - low[label]) / torch.where(span > 0, span, 1)[label]


def class_means(values, label, num_classes):
    """Mean of values (H, W) over the pixels of each class of label (H, W): float64 (C,), NaN for an absent class."""
    total = torch.bincount(label.flatten(), values.flatten().double(), minlength=num_classes)
    return total / torch.bincount(label.flatten(), minlength=num_classes)


def image_confidence(prob):
    """LSE-5: s (C,), mean top-1 probability of the pixels predicted as each class; NaN where it is not predicted."""
    q, y = prob.max(0)  # (H, W)
    return class_means(q, y, len(prob))


def image_uncertainty(prob):
    """u (C,), mean normalised entropy of the pixels predicted as each class, of which LSE-9 picks; NaN without any."""
    y = prob.max(0).indices  # (H, W); on a CPU much faster than argmax
    return class_means(normalised_entropy(pixel_entropy(prob), y), y, len(prob))


def ranked_images(confidence):
    """One class's list: images that predict it, the most confident first, of equal ones the later; confidence (M,)."""
    predict_it = [(s, image) for image, s in enumerate(confidence.tolist()) if not math.isnan(s)]
    return [image for _, image in sorted(predict_it, reverse=True)]


DIVISOR = 19  # of LSE-6, the number of Cityscapes classes, also for SYNTHIA's 16


def kept_images(N, portion):
    """LSE-6: k, the number of images kept for a class that N images predict."""
    return min(N, int(N * portion / DIVISOR + 1e-6))  # 1e-6, because 2660 * 0.35 / 19 is 48.99999999999999


def select_images(confidence, portion):
    """LSE-6, -8. confidence (M, C) -> indices of T_r, sorted and unique; x* (C,): best image not kept, -1 for none."""
    selected, reference = set(), []
    for s in confidence.T:  # class after class, (M,)
        images = ranked_images(s)
        k = kept_images(len(images), portion)  # LSE-6
        selected.update(images[:k])
        reference.append(images[k] if k < len(images) else -1)  # LSE-8
    return torch.tensor(sorted(selected), dtype=torch.long), torch.tensor(reference)


def class_thresholds(confidence, uncertainty, reference):
    """LSE-9: t (C,). confidence, uncertainty (M, C): of every image and class; reference (C,): x*.

    An image in which all pixels of the class have one entropy defines no threshold (its uncertainty is 0): the next one
    of the list does. Without any, t is 0 and LSE-10 keeps nothing.
    """
    thresholds = []
    for s, u, best in zip(confidence.T, uncertainty.T.tolist(), reference.tolist()):  # class after class
        images = ranked_images(s)
        not_kept = images[images.index(best):] if best >= 0 else []
        thresholds.append(next((u[image] for image in not_kept if u[image] > 0), 0.0))  # LSE-9
    return torch.tensor(thresholds, dtype=uncertainty.dtype)


def keep_confident(normalised, label, thresholds):
    """LSE-10: mask (H, W) of the pixels whose normalised entropy is below the threshold (C,) of their label."""
    return normalised < thresholds[label]


def random_windows(images, patches, size, window, generator):
    """LSE-12: corners (images, patches, 2), y and x, uniform over all places where the window fits into a picture."""
    corners = [torch.randint(side - part + 1, (images, patches), generator=generator)
               for side, part in zip(size, window)]
    return torch.stack(corners, 2)


def cut(maps, y, x, h, w):
    """The window of maps (..., H, W) at (y, x) of h x w pixels."""
    return maps[..., y:y + h, x:x + w]


def enlarge(maps, size):
    """(C, h, w) -> (C, H, W), bilinear with aligned corners."""
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=True)[0]


def enlarge_labels(label, size):
    """(h, w) -> (H, W), nearest neighbour."""
    return F.interpolate(label[None, None].double(), size=size, mode="nearest")[0, 0].to(label.dtype)


def transfer_labels(prob, keep, size, mask_mode="nearest"):
    """LSE-12: labels (H, W) of an enlarged patch from what the whole image said there, prob (C, h, w) and keep (h, w).

    mask_mode: "nearest" keeps the share of kept pixels, "dilate" keeps what any kept pixel reaches bilinearly.
    """
    label = enlarge(prob, size).max(0).indices  # (H, W): enlarge first, then decide
    if mask_mode == "dilate":
        keep = enlarge(keep[None].double(), size)[0] > 0  # (H, W)
    else:
        keep = enlarge_labels(keep, size)  # (H, W)
    return torch.where(keep, label, common.IGNORE)


def view_agreement(seen, there):
    """What the method rests on, of one patch: entropy gap, cross-entropy and agreement, (3,).

    seen (C, H, W): probabilities predicted on the enlarged patch; there (C, H, W): those of the whole image, enlarged.
    """
    label = there.max(0).indices  # (H, W)
    gap = (pixel_entropy(seen) - pixel_entropy(there)).mean()
    cross_entropy = F.nll_loss((seen + 1e-12).log()[None], label[None])
    agreement = (seen.max(0).indices == label).to(seen.dtype).mean()
    return torch.stack([gap, cross_entropy, agreement])


def focal(l, gamma):
    """The expression of LSE-3 for a cross-entropy l: of each pixel, or L_ce, as in the authors' DeepLab."""
    doubt = -torch.expm1(-l)  # 1 - exp(-l)
    return doubt.clamp(min=1e-12) ** gamma * l  # clamped: for gamma < 1 the power's slope at 0 is infinite


def focal_loss(logits, label, gamma):
    """LSE-3 of logits (N, C, h, w), upsampled, against labels (N, H, W): mean over the pixels that are not 255.

    No valid pixel: a zero that is connected to the graph.
    """
    logits = common.upsample(logits.float(), label.shape[1:])  # (N, C, h, w) -> (N, C, H, W)
    l = F.cross_entropy(logits, label, ignore_index=common.IGNORE, reduction="none")  # (N, H, W), 0 where 255
    return focal(l, gamma).sum() / (label != common.IGNORE).sum().clamp(min=1)  # LSE-3


def round_portion(p_0, delta_p, r):
    """LSE-13: p of round r, counted from 0. Rounded, so that the log says 0.15 and not 0.15000000000000002."""
    return round(p_0 + r * delta_p, 9)


def round_steps(examples, epochs, batch_size):
    """LSE-13: training steps of one round, `epochs` times over its examples."""
    return max(1, epochs * examples // batch_size)


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


def step_losses(network, source, target, args):
    """The named losses of one step, `loss` LSE-4 of them. source, target: images (N, 3, H, W) and labels (N, H, W).

    Target images are patches, target labels the transferred ones. Two forward passes, so that batch norm, where it is
    live, normalises each domain by its own statistics.
    """
    (x_s, y_s), (x_t, y_t) = source, target
    with common.autocast(args):
        (_, logits_s), (_, logits_t) = network(x_s), network(x_t)  # (N, C, h, w)
    losses = {"ce_s": segmentation_loss(logits_s, y_s),  # LSE-1
              "ce_t": segmentation_loss(logits_t, y_t)}  # LSE-2
    if args.focal == "pixel":
        losses["focal"] = focal_loss(logits_t, y_t, args.gamma)  # LSE-3
    if args.focal == "mean":
        losses["focal"] = focal(losses["ce_t"], args.gamma)  # LSE-3
    losses["loss"] = losses["ce_s"] + losses["ce_t"] + args.beta * losses.get("focal", 0)  # LSE-4
    return losses


def faster_biases(optimizer):
    """FCN8s: biases learn at twice the rate. Splits every group in two."""
    for group in list(optimizer.param_groups):
        biases = [p for p in group["params"] if p.ndim == 1]
        group["params"] = [p for p in group["params"] if p.ndim > 1]
        optimizer.add_param_group({**group, "params": biases, "scale": 2 * group["scale"]})


def half(size):
    """Height and width of the windows."""
    return size[0] // 2, size[1] // 2


def view_size(args):
    """Height and width of the target images of --view."""
    return half(args.size) if args.view == "window" else args.size


def view_examples(view, images, corners, size):
    """The training examples of --view, [image, n, y, x, h, w]: window n of an image. corners (len(images), n_p, 2)."""
    examples = []
    for image, places in zip(images, corners.tolist()):
        windows = [(y, x, *half(size)) for y, x in places]
        if view == "whole":
            windows = [(0, 0, *size)] * len(places)
        if view == "both":
            windows.append((0, 0, *size))
        examples += [[image, n, *window] for n, window in enumerate(windows)]
    return examples


class Views(Dataset):
    """Target training images as the network is trained on them: `view_examples`, each brought to `view_size`.

    folder: where label_target wrote their labels; without it they have none, which is enough for batch norm.
    """

    def __init__(self, args, examples, folder=None):
        self.images, self.examples, self.folder = common.target_dataset(args, "train"), examples, folder
        self.size = view_size(args)
        uncropped = argparse.Namespace(size=self.size, crop=self.size, scale_jitter=(1, 1))
        self.augment = common.training_augment(uncropped) if args.augment else None

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, number):
        index, n, *window = self.examples[number]
        item = self.images[index]
        patch = common.to_picture(enlarge(cut(item["image"], *window), self.size))
        name = f"{item['name']}_{n}"
        label = common.read_label(self.folder / f"{name}.png") if self.folder else None
        return common.make_item(patch, label, name, None, self.augment)


def each_prediction(model, dataset, args):
    """Number, item and probabilities (C, H, W) of every image in this process's share of a data set."""
    number = common.rank()
    for batch, probabilities in common.predictions(model, dataset, args):
        for i, prob in enumerate(probabilities):
            yield number, {key: values[i] for key, values in batch.items()}, prob
            number += common.world_size()


def rank_target(model, dataset, args):
    """Step 2, one pass over the target: s and u of each image and class, (M, C) each."""
    C = len(common.task_classes(args.source))
    table = torch.zeros(len(dataset), 2 * C, dtype=torch.float64, device=args.device)
    for number, _, prob in each_prediction(model, dataset, args):
        table[number] = torch.cat([image_confidence(prob), image_uncertainty(prob)])
    return common.all_sum(table).cpu().split(C, dim=1)  # every row is zero in all processes but one


def label_target(model, args, folder, r):
    """Steps 2 and 3: selects images, draws their windows and writes label PNGs and round.json to `folder`.

    Returns what the log shows: portion, selected images, examples, what `compare_views` tells of the first window of
    each image and common.write_pseudo_labels of the labels.
    """
    dataset, portion = common.target_dataset(args, "train"), round_portion(args.portion, args.portion_step, r)  # LSE-13
    confidence, uncertainty = rank_target(model, dataset, args)
    predicted = int(confidence.isfinite().sum(0).max())
    check_portion(portion, predicted, f"round {r + 1}: no class is predicted in more than {predicted} images")
    selected, reference = select_images(confidence, portion)
    thresholds = class_thresholds(confidence, uncertainty, reference)  # (C,)
    generator = torch.Generator().manual_seed(common.mix_seed(args.seed, 6, r))  # the same in all processes
    corners = random_windows(len(selected), args.patches, args.size, half(args.size), generator)
    selected = selected.tolist()
    examples = view_examples(args.view, selected, corners, args.size)
    if common.rank() == 0:
        common.write_json(folder / "round.json", {"portion": portion, "thresholds": thresholds.tolist(),
                                                  "references": reference.tolist(), "examples": examples})
    views = compare_views(model, Subset(dataset, selected), corners[:, :1], args)
    told = common.write_pseudo_labels(folder, transferred(model, selected, examples, thresholds, args), args)
    if told["kept"] == 0:
        raise common.InputError(f"round {r + 1}: a portion of {portion} leaves no labelled pixel; choose another")
    return {"portion": portion, "images": len(selected), "examples": len(examples), **views, **told}


def transferred(model, selected, examples, thresholds, args):
    """Step 3: yields name, true label in the toy world, and transferred label of each example of selected images."""
    dataset = Subset(common.target_dataset(args, "train", labelled=args.source == "toy"), selected)
    t, size = thresholds.to(args.device), view_size(args)
    for i, item, prob in each_prediction(model, dataset, args):
        label = prob.max(0).indices  # (H, W)
        keep = keep_confident(normalised_entropy(pixel_entropy(prob), label), label, t)  # (H, W)
        for _, n, *window in (example for example in examples if example[0] == selected[i]):
            batch = {"name": [f"{item['name']}_{n}"]}
            if "label" in item:  # for the log's `accuracy`
                batch["label"] = enlarge_labels(cut(item["label"], *window), size)[None]  # (1, H, W)
            yield batch, transfer_labels(cut(prob, *window), cut(keep, *window), size, args.mask_mode)[None]


def compare_views(model, dataset, corners, args):
    """Means of `view_agreement` over enlarged windows at corners (len(dataset), n, 2); with labels also enlarged_miou.

    The windows are enlarged whatever --view says, so that the controls have the same meter.
    """
    total, size = torch.zeros(3, dtype=torch.float64, device=args.device), args.size
    metric = common.MeanIoU(len(common.task_classes(args.source)))
    for number, item, prob in each_prediction(model, dataset, args):
        windows = [(y, x, *half(size)) for y, x in corners[number].tolist()]
        views = torch.stack([enlarge(cut(item["image"], *window), size) for window in windows])  # (n, 3, H, W)
        for window, seen in zip(windows, common.predict(model, views, size, args)):  # seen: (C, H, W)
            total += view_agreement(seen, enlarge(cut(prob, *window), size))
            if "label" in item:
                truth = enlarge_labels(cut(item["label"], *window), size).to(args.device)  # (H, W)
                metric.update(seen.max(0).indices, truth)
    gap, cross_entropy, agreement = (common.all_sum(total) / (corners.numel() / 2)).tolist()
    told = {"entropy_gap": gap, "cross_entropy": cross_entropy, "agreement": agreement}
    metric.sum_processes(args.device)
    return {**told, "enlarged_miou": 100 * metric.mean(metric.present())} if metric.present() else told


def validation_views(model, args):
    """`compare_views` on the target's validation images, cut into their 2 x 2 half-size windows."""
    dataset, (h, w) = common.target_dataset(args, "val", labelled=True), half(args.size)
    quarters = torch.tensor([(0, 0), (0, w), (h, 0), (h, w)])  # (4, 2)
    return compare_views(model, dataset, quarters.expand(len(dataset), 4, 2), args)


def check_portion(portion, images, found):
    """Refuses a portion with which a class that so many images predict keeps none (LSE-6); says which would do."""
    if kept_images(images, portion) == 0:
        enough = math.ceil(1000 * DIVISOR / images) / 1000
        raise common.InputError(f"{found}, of which a class keeps int({images} x {portion} / {DIVISOR}) = 0; "
                                f"give --portion {enough} or more")


def parse_args():
    parser = common.shared_parser(__doc__, adapts=True)
    add = parser.add_argument
    add("--rounds", type=common.count, metavar="N", default=common.by_source(2, 7),
        help="rounds of ranking and training [C]")
    add("--iterations", type=common.natural, metavar="T", default=common.by_source(240, 0, small=6000),
        help="adaptation steps, all rounds together; 0: as --epochs says [C]")
    add("--epochs", type=common.count, metavar="N", default=2,
        help="with --iterations 0: times over the examples of a round, poly decay starting anew in each [C]")
    add("--lr", type=common.positive, metavar="X", default=common.by_source(2e-4, 1e-6, small=5e-5),
        help="base learning rate of the adaptation [C]")
    add("--portion", type=common.positive, metavar="p_0", default=common.by_source(1.0, 0.10),
        help="p of the first round: 19 times the share of images that a class keeps [C]")
    add("--portion-step", type=common.weight, metavar="X", default=common.by_source(0.5, 0.05),
        help="delta_p, its growth per round [C]")
    add("--patches", type=common.count, metavar="n_p", default=4, help="random patches per selected image [C]")
    add("--view", choices=("enlarged", "window", "whole", "both"), default="enlarged",
        help="target examples: half-size windows enlarged by two [C]; or, as controls, the same windows as they are, "
             "whole images, or patches and whole images")
    add("--mask-mode", choices=("nearest", "dilate"), default="nearest",
        help="how the mask of kept pixels is enlarged [U, C]")
    add("--focal", choices=("pixel", "mean", "off"), default="pixel",
        help="focal loss per pixel, of the mean cross-entropy, or none [C]")
    add("--beta", type=common.weight, metavar="X", default=0.1, help="weight of the focal loss [C]")
    add("--gamma", type=common.weight, metavar="X", default=3.0, help="its exponent [C; 5 in one notebook]")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="mirror patches, vary their colours [U]")
    args = common.parse(parser)
    if args.size[0] % 16 or args.size[1] % 16:
        parser.error(f"--size {args.size[0]}x{args.size[1]}: expected multiples of 16, for windows of half the size")
    return args


def main():
    args = parse_args()
    run = common.Run("scale_invariant", args)
    images = len(common.target_dataset(args, "train"))
    check_portion(args.portion, images, f"there are {images} target images")
    source = common.source_dataset(args, common.training_augment(args, args.source_size))

    # Step 1: the source-only model, trained here or given.
    model = common.build_model(args)
    if args.init:
        common.load_init(model, args, run)
    else:
        train_source(model, source, args, run, "source_only.pt", args.warmup_iterations, args.warmup_lr)
    source_model = copy.deepcopy(model)
    # What batch norm is settled on: views as the network is trained on, drawn from all target images.
    generator = torch.Generator().manual_seed(common.mix_seed(args.seed, 7))
    corners = random_windows(images, args.patches, args.size, half(args.size), generator)
    views = Views(args, view_examples(args.view, range(images), corners, args.size))
    common.settle_batch_norm(model, views, args)
    before = validation_views(model, args)

    # Steps 2 to 4: rounds of selection, labels and training on both domains. One optimizer for all of them.
    # done: steps of the run so far; first, last: where a round starts and ends; begin, end: where the poly decay does.
    network, optimizer, first = common.distribute(model), make_optimizer(model, args), 0
    if args.backbone == "vgg16-fcn8s":
        faster_biases(optimizer)
    done = run.load("last.pt", model, optimizer=optimizer)
    for r in range(args.rounds):
        folder = run.folder / "pseudo_labels" / f"round{r + 1}"
        if done <= first:  # a new round: images and labels by the present network
            if r > 0:  # for the first round it has just been done
                common.settle_batch_norm(model, views, args)
            run.log(f"round {r + 1}", **label_target(model, args, folder, r))
        target = Views(args, common.read_json(folder / "round.json")["examples"], folder)
        if args.iterations:
            last, begin, end = args.iterations * (r + 1) // args.rounds, 0, args.iterations
        else:
            last = first + round_steps(len(target), args.epochs, args.batch_size)
            begin, end = first, last  # the learning rate decays within the round
        batches_s = common.training_batches(source, args, common.mix_seed(args.seed, 4), done, last)
        batches_t = common.training_batches(target, args, common.mix_seed(args.seed, 5, r), done - first, last - first)
        model.train()
        for done, batch_s, batch_t in zip(range(done + 1, last + 1), batches_s, batches_t):
            set_lr(optimizer, common.ramp(done, args) * poly_lr(args.lr, done - 1 - begin, end - begin, args.power))
            losses = step_losses(network, batch_s, batch_t, args)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            run.log_step("adapt", done, end, lr=optimizer.param_groups[0]["lr"], **losses)
            run.validate("adapt", done, end, model, views)
            if run.time_to_save(done, last):
                run.save("last.pt", done, model, optimizer=optimizer)
        first = last

    # Step 5: the last checkpoint on the target's validation split, as it is and in enlarged views.
    common.settle_batch_norm(model, views, args)
    run.save("last.pt", done, model, optimizer=optimizer)
    after = validation_views(model, args)
    meters = {f"{name}_{when}": told[name] for name in before for when, told in (("before", before), ("after", after))}
    common.compare_with_source_only({"LSE": model}, args, run, source_model, **meters)


if __name__ == "__main__":
    common.run(main)
