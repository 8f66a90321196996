"""LSE: learning from scale-invariant examples for domain adaptation of semantic segmentation.

    M. N. Subhani, M. Ali, "Learning from Scale-Invariant Examples for Domain Adaptation in Semantic Segmentation",
    ECCV 2020, arXiv 2007.14449. Authors' code: github.com/MNaseerSubhani/LSE, read at commit e0fe81b.

READ THIS FIRST. Of the paper only the abstract and the first lines of the introduction were available. The equations
come from the authors' released code and notebooks. Labels such as LSE-6 are this project's own, because the paper's
equation numbers and symbols are unknown. Equations, steps and flags (at full size) carry their origin:
    [P] the paper's abstract    [C] the authors' code    [N] their notebooks, which hold logs    [U] unknown: our choice

The idea in five sentences
--------------------------
1. What an object is does not depend on how large it appears, yet a network is less certain of an enlarged part of an
   image than of the whole image, so its prediction of the whole can teach it the enlarged part.
2. A source-trained network predicts all target training images, and for every class those images are selected in which
   it is most confident of this class.
3. The best image that was not selected for a class sets an entropy threshold for this class, anew in every round.
4. Random windows of half the height and width are cut from the selected images and enlarged by two, and the prediction
   of the whole image, enlarged with them, is their label wherever its entropy is below the threshold of its class.
5. The network trains on source images and on enlarged windows by cross-entropy, on the windows also by a focal loss
   against class imbalance, and the next round selects more images.

The abstract states the first sentence, and it names confident images, a dynamic class-specific entropy threshold, the
transfer of labels between scales and the focal loss [P]. How each of them is done is known from the code alone [C].
The idea is in the labels and not in the losses: `step_losses` knows nothing of scale. Read `label_target` first.

Why does the best image not selected set the threshold? It is the first one that is not trusted for the class. A pixel
of a trusted image becomes a label only if it is surer, relative to its class and image, than that image's pixels are on
average. As more images are selected, the threshold follows. This is our reading [U], since the code gives no reason.

The abstract's premise is that enlarged patches have a higher entropy than the image they come from [P]. On the toy it
hardly holds: the source-only model's entropy is only 0.16 nats (of at most 2.77) higher on enlarged windows, while the
cross-entropy between its two predictions there is 1.58. It is nearly as certain, and wrong. Entropy cannot show that.
After training the two are 0.09 and 0.69 (means over the README's worlds). Both are measured: see "meters (ours)".

Notation
--------
    M target images    N images of a batch    C classes (index c)    H x W image    h x w grid of the network
    window   part of an image, a x b pixels    patch   a window enlarged to H x W, n_p of them per selected image
    view     what the network is shown of an image: a patch or, as a control, the whole image
    i, j     pixels                                _s, _t    of the source, of the target
    P_i      softmax at pixel i of the whole image, by the network that labels
    y_i      argmax P_i, the predicted class       q_i     max P_i
    E_i      entropy of P_i in nats                E^_i    the same, normalised inside the class y_i (LSE-7)
    s_c      confidence of an image in class c     u_c     mean E^_i of an image's pixels with y_i = c
    N_c      images in which c is predicted        k_c     how many of them are kept for c
    x*_c     the best image not kept for c         tau_c   entropy threshold of c
    p_r      portion of round r = 0, 1, ...        T_r     images selected in round r
    l_i      cross-entropy at pixel i: -ln of the probability which the network in training gives to the label there
    V_s, V_t    the source and the target pixels whose label is not 255

Equations LSE-1 to LSE-13, all from the authors' code [C]
---------------------------------------------------------
The ranking of a class lists the images in which it is predicted, by falling s_c. The authors divide the portion p_r
among the 19 classes of Cityscapes, also for SYNTHIA: hence the 19 in LSE-6.
    LSE-1    L_src = mean_{V_s} l_i                                             source image, true label
    LSE-2    L_ce = mean_{V_t} l_i                                              patch, transferred label
    LSE-3    L_fl = mean_{V_t} (1 - exp(-l_i))^gamma l_i                        the same pixels
    LSE-4    L = L_src + L_ce + beta L_fl,   beta = 0.1, gamma = 3
    LSE-5    s_c = mean_{i: y_i = c} q_i
    LSE-6    k_c = int(N_c p_r / 19): the first k_c images of the ranking of c are kept, and T_r is their union over c
    LSE-7    E^_i = (E_i - min_j E_j) / (max_j E_j - min_j E_j), j over the pixels of this image with y_j = y_i
    LSE-8    x*_c: the image at place k_c, counted from 0, of the ranking of c
    LSE-9    tau_c = mean_{i in x*_c, y_i = c} E^_i, that is u_c of x*_c
    LSE-10   pixel i of a selected image is kept iff E^_i < tau_{y_i}
    LSE-11   E_i = -sum_c P_i(c) ln(P_i(c) + 1e-12)
    LSE-12   patch: a window of a x b = H/2 x W/2 pixels at a random place, whose image and P are enlarged to H x W,
             bilinear with aligned corners. Its label is the argmax of the *enlarged* P, so that a class can appear
             between two pixels that both lack it, and 255 where the enlarged mask of LSE-10 is 0 (deviation 4).
    LSE-13   p_r = p_0 + r delta_p, 0.10 to 0.40 in seven rounds of int(epochs n_p |T_r| / batch size) steps
E^ only ranks the pixels of one class inside one image. Unless all have the same entropy, the most certain one is kept
(if tau_c > 0) and the least certain one is not (if tau_c <= 1), however good the prediction is as a whole.

The algorithm [C]                                                           paper's notion -> function
-----------------                                                           --------------------------
1. Source-only training, or --init.                                         train_source
2. Rounds. Rank all target images with the present network: LSE-5           rank_target, image_confidence
     select confident images and the image behind them: LSE-6, -8           select_images
     entropy, and the same normalised within its class: LSE-11, -7          pixel_entropy, normalised_entropy
     dynamic class-specific entropy threshold: LSE-9                        image_uncertainty, class_thresholds
3. Label n_p patches of every selected image with this network:             label_target
     filter: LSE-10                                                         keep_confident
     transfer the labels across scales: LSE-12                              random_windows, transfer_labels, Views
4. Train on source images and patches: LSE-1 to -4.                         step_losses
   Increase p, LSE-13, and go to 2.                                         round_portion, round_steps
5. Evaluate the last checkpoint.

Deviations that change the method (the others stand at the end of this file)
----------------------------------------------------------------------------
1. Network. Authors: VGG16-FCN8s (the abstract's headline [P]), or DeepLabV2 of which a misplaced `return` leaves two
   branches. Here: DeepLabV2 with four branches, as in all files. --network fcn8s is the authors' other one.
2. Classes of SYNTHIA. Authors: 19 outputs. Terrain, truck and train are never filtered, so nearly all pixels predicted
   as one of them become labels. Here: 16 outputs.
3. Focal loss. Authors: per pixel for VGG, but for DeepLab LSE-3 of a patch's mean cross-entropy, which treats all
   pixels alike. Here: per pixel for both. (Their flag `--focal-loss False` leaves the loss on, --no-focal does not.)
4. Mask of kept pixels. Authors: enlarged bilinearly, kept where not exactly 0. So it grows: a single pixel becomes 16.
   Here: nearest neighbour, a single pixel becomes 4. --mask-mode dilate is the authors' form.

Published scores of LSE with focal loss, from a third party's table: GTA5 39.0 (VGG16), 47.5 (ResNet-101). SYNTHIA, 16
and 13 classes: 40.0 and 47.0 (VGG16), 42.6 and 49.4 (ResNet-101, see deviation 10). Nobody has run this file on them.

Expect on the toy (mean over the README's eight worlds ± standard error of a difference): source only 30.8, re-estimated
batch norm 31.7, LSE 34.1 mIoU, plain self-training 34.2. With --view whole 35.6: enlarging costs 1.5 ± 0.5 on whole
images, which are scored, and wins 9.9 ± 0.3 on enlarged views (24.0 after 15.6 before). Batch norm,
whose statistics come from the views, is not the cause: estimated again on whole images after the training, the cost is
1.6 ± 0.4. It takes 7 minutes on one thread of an AVX2 core, warm-up included, and 0.9 GB.

    python scale_invariant.py                                   # toy world: warm-up, two rounds, table, picture
    python scale_invariant.py --view whole                      # self-training on whole images, not enlarged
    python scale_invariant.py --source synthia --data-root DIR --init runs/source_only-synthia-s0/last.pt
    python scale_invariant.py --source gta5 --data-root DIR --network fcn8s --batch-size 1
"""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, Subset

import common


# ================================================== the equations ==================================================


def pixel_entropy(prob):
    """LSE-11: entropy (H, W) in nats of probabilities (C, H, W). Uniform: ln C."""
    return -(prob * (prob + 1e-12).log()).sum(0)


def normalised_entropy(entropy, label):
    """LSE-7: entropy (H, W) brought to [0, 1] in each class of label (H, W), or to 0 where a class has one value."""
    E, y = entropy.flatten(), label.flatten()  # (H W,)
    low = E.new_full((256,), math.inf).scatter_reduce(0, y, E, "amin")  # (256,): enough for any number of classes
    high = E.new_full((256,), -math.inf).scatter_reduce(0, y, E, "amax")
    span = high - low
    return (entropy - low[label]) / torch.where(span > 0, span, 1)[label]  # LSE-7


def class_means(values, label, num_classes):
    """Mean of values (H, W) over the pixels of each class of label (H, W): float64 (C,), NaN for an absent class."""
    total = torch.bincount(label.flatten(), values.flatten().double(), minlength=num_classes)
    return total / torch.bincount(label.flatten(), minlength=num_classes)


def image_confidence(prob):
    """LSE-5: s (C,), mean top-1 probability of the pixels predicted as each class, NaN for a class without any."""
    q, y = prob.max(0)  # (H, W)
    return class_means(q, y, len(prob))


def image_uncertainty(prob):
    """u (C,), from which LSE-9 picks: mean normalised entropy of the pixels predicted as each class, or NaN."""
    y = prob.max(0).indices  # (H, W); on a CPU much faster than argmax
    return class_means(normalised_entropy(pixel_entropy(prob), y), y, len(prob))


def ranked_images(confidence):
    """The ranking of one class by its confidence (M,): images that predict it, surest first, of equals the later."""
    predict_it = [(s, image) for image, s in enumerate(confidence.tolist()) if not math.isnan(s)]
    return [image for _, image in sorted(predict_it, reverse=True)]


DIVISOR = 19  # of LSE-6, the number of Cityscapes classes, also for SYNTHIA's 16


def kept_images(images, portion):
    """LSE-6: k, how many are kept for a class that is predicted in N_c = `images` images."""
    return min(images, int(images * portion / DIVISOR + 1e-6))  # 1e-6, as 2660 * 0.35 / 19 is 48.99999999999999


def select_images(confidence, portion):
    """LSE-6, -8: confidence (M, C) -> sorted indices of T_r, and x* (C,), the best image not kept, -1 for none."""
    selected, reference = set(), []
    for s in confidence.T:  # class by class, (M,)
        images = ranked_images(s)
        k = kept_images(len(images), portion)  # LSE-6
        selected.update(images[:k])
        reference.append(images[k] if k < len(images) else -1)  # LSE-8
    return torch.tensor(sorted(selected), dtype=torch.long), torch.tensor(reference)


def class_thresholds(confidence, uncertainty, reference):
    """LSE-9: tau (C,). s and u of every image and class are confidence and uncertainty (M, C), x* is reference (C,).

    If all pixels of the class in x* have one entropy, its uncertainty is 0, which is no threshold. Then the next image
    of the ranking gives it. If none does, tau is 0 and LSE-10 keeps nothing.
    """
    thresholds = []
    for s, u, best in zip(confidence.T, uncertainty.T.tolist(), reference.tolist()):  # class by class
        images = ranked_images(s)
        not_kept = images[images.index(best):] if best >= 0 else []
        thresholds.append(next((u[image] for image in not_kept if u[image] > 0), 0.0))  # LSE-9
    return torch.tensor(thresholds, dtype=uncertainty.dtype)


def keep_confident(normalised, label, thresholds):
    """LSE-10: mask (H, W) of the pixels whose normalised entropy is below tau of their label, thresholds (C,)."""
    return normalised < thresholds[label]


def half(size):
    """Height and width of the windows, a x b."""
    return size[0] // 2, size[1] // 2


def random_windows(images, patches, size, generator):
    """LSE-12: corners (images, patches, 2), top and left, uniform over all places where a window fits in an image."""
    corners = [torch.randint(side - part + 1, (images, patches), generator=generator)
               for side, part in zip(size, half(size))]
    return torch.stack(corners, 2)


def cut(maps, top, left, a, b):
    """The window of a x b pixels of maps (..., H, W) with its first pixel at row `top`, column `left`."""
    return maps[..., top:top + a, left:left + b]


def enlarge(maps, size):
    """(C, a, b) -> (C, H, W), bilinear with aligned corners."""
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=True)[0]


def enlarge_labels(label, size):
    """(a, b) -> (H, W), nearest neighbour."""
    return F.interpolate(label[None, None].double(), size=size, mode="nearest")[0, 0].to(label.dtype)


def transfer_labels(prob, keep, size, mask_mode="nearest"):
    """LSE-12: labels (H, W) of a patch from the whole image's prediction in its window, prob (C, a, b) and keep (a, b).

    mask_mode: "nearest" leaves the share of kept pixels as it is. "dilate" keeps a pixel if any of the pixels between
    which it is interpolated is kept.
    """
    label = enlarge(prob, size).max(0).indices  # (H, W): enlarge first, then decide
    if mask_mode == "dilate":
        keep = enlarge(keep[None].double(), size)[0] > 0  # (H, W)
    else:
        keep = enlarge_labels(keep, size)  # (H, W)
    return torch.where(keep, label, common.IGNORE)


def round_portion(p_0, delta_p, r):
    """LSE-13: p of round r = 0, 1, .... Rounded, so that the log says 0.15 and not 0.15000000000000002."""
    return round(p_0 + r * delta_p, 9)


def round_steps(examples, epochs, batch_size):
    """LSE-13: training steps of one round, `epochs` times over its examples, but at least one."""
    return max(1, epochs * examples // batch_size)


def focal_loss(logits, label, gamma):
    """LSE-3 of logits (N, C, h, w), upsampled, against labels (N, H, W): mean over the pixels that are not 255.

    No valid pixel: a zero that is connected to the graph.
    """
    logits = common.upsample(logits.float(), label.shape[1:])  # (N, C, h, w) -> (N, C, H, W)
    l = F.cross_entropy(logits, label, ignore_index=common.IGNORE, reduction="none")  # (N, H, W), 0 where 255
    doubt = -torch.expm1(-l)  # 1 - exp(-l)
    focal = doubt.clamp(min=1e-12) ** gamma * l  # clamped: for gamma < 1 the power's slope at 0 is infinite
    return focal.sum() / (label != common.IGNORE).sum().clamp(min=1)  # LSE-3


def step_losses(network, source, target, args):
    """The losses of one step by name: "loss" is LSE-4, the sum that is minimised.

    source: images (N, 3, H, W) and true labels (N, H, W). target: patches and transferred labels. Each domain has its
    own forward pass, so that live batch norm normalises it by its own statistics.
    """
    (image_s, label_s), (image_t, label_t) = source, target
    with common.autocast(args):
        (_, logits_s), (_, logits_t) = network(image_s), network(image_t)  # (N, C, h, w)
    losses = {"ce_s": segmentation_loss(logits_s, label_s),  # LSE-1
              "ce_t": segmentation_loss(logits_t, label_t)}  # LSE-2
    if args.focal:
        losses["focal"] = focal_loss(logits_t, label_t, args.gamma)  # LSE-3
    losses["loss"] = losses["ce_s"] + losses["ce_t"] + args.beta * losses.get("focal", 0)  # LSE-4
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


# =============================================== labelling and training ===============================================


def each_prediction(model, dataset, args):
    """Yields number, item and probabilities (C, H, W) of every image in this process's share of a data set."""
    number = common.rank()
    for batch, probabilities in common.predictions(model, dataset, args):
        for i, prob in enumerate(probabilities):
            yield number, {key: values[i] for key, values in batch.items()}, prob
            number += common.world_size()


def rank_target(model, dataset, args):
    """Step 2, one pass over the target: s (M, C) and u (M, C) of each image and class."""
    C = len(common.task_classes(args.source))
    table = torch.zeros(len(dataset), 2 * C, dtype=torch.float64, device=args.device)
    for number, _, prob in each_prediction(model, dataset, args):
        table[number] = torch.cat([image_confidence(prob), image_uncertainty(prob)])
    return common.all_sum(table).cpu().split(C, dim=1)  # every row is zero in all processes but one


def check_portion(portion, images, found):
    """Refuses a portion so small that a class keeps none of `images` images (LSE-6), and says which would do."""
    if kept_images(images, portion) == 0:
        enough = math.ceil(1000 * DIVISOR / images) / 1000
        raise common.InputError(f"{found}, of which a class keeps int({images} x {portion} / {DIVISOR}) = 0; "
                                f"give --portion {enough} or more")


def view_examples(view, images, corners, size):
    """The training examples of --view, [image, n, top, left, a, b]: window n of an image. corners (images, n_p, 2).

    enlarged: the method. whole: the whole image n_p times, self-training with the same selection of images and pixels.
    both: the n_p windows and the whole image, as in lines of the authors' code that are commented out.
    """
    examples = []
    for image, places in zip(images, corners.tolist()):
        windows = [(top, left, *half(size)) for top, left in places]
        if view == "whole":
            windows = [(0, 0, *size)] * len(places)
        if view == "both":
            windows.append((0, 0, *size))
        examples += [[image, n, *window] for n, window in enumerate(windows)]
    return examples


def label_target(model, examples, thresholds, args):
    """Step 3, the idea: what the network says of a whole image becomes the label (1, H, W) of its patches.

    Yields what common.write_pseudo_labels takes, on the toy with the truth, which only the log sees.
    """
    images = sorted({image for image, *_ in examples})  # T_r
    dataset = Subset(common.target_dataset(args, "train", labelled=args.source == "toy"), images)
    for number, item, prob in each_prediction(model, dataset, args):
        label = prob.max(0).indices  # (H, W)
        normalised = normalised_entropy(pixel_entropy(prob), label)  # LSE-11, -7: (H, W)
        keep = keep_confident(normalised, label, thresholds.to(args.device))  # LSE-10: (H, W)
        for n, *window in (example for image, *example in examples if image == images[number]):
            batch = {"name": [f"{item['name']}_{n}"]}
            if "label" in item:
                batch["label"] = enlarge_labels(cut(item["label"], *window), args.size)[None]  # (1, H, W)
            # LSE-12
            yield batch, transfer_labels(cut(prob, *window), cut(keep, *window), args.size, args.mask_mode)[None]


def start_round(model, args, folder, r):
    """Steps 2 and 3 of round r: selects images, draws windows, writes their labels and round.json into `folder`.

    Returns what the log shows. `compare_views` looks at the first window of each image.
    """
    dataset = common.target_dataset(args, "train")
    portion = round_portion(args.portion, args.portion_step, r)  # LSE-13
    confidence, uncertainty = rank_target(model, dataset, args)
    predicted = int(confidence.isfinite().sum(0).max())
    check_portion(portion, predicted, f"round {r + 1}: no class is predicted in more than {predicted} images")
    selected, reference = select_images(confidence, portion)
    thresholds = class_thresholds(confidence, uncertainty, reference)  # (C,)
    generator = torch.Generator().manual_seed(common.mix_seed(args.seed, 6, r))  # the same in all processes
    corners = random_windows(len(selected), args.patches, args.size, generator)
    examples = view_examples(args.view, selected.tolist(), corners, args.size)
    if common.rank() == 0:
        common.write_json(folder / "round.json", {"portion": portion, "thresholds": thresholds.tolist(),
                                                  "references": reference.tolist(), "examples": examples})
    views = compare_views(model, Subset(dataset, selected.tolist()), corners[:, :1], args)
    labels = common.write_pseudo_labels(folder, label_target(model, examples, thresholds, args), args)
    if labels["kept"] == 0:
        raise common.InputError(f"round {r + 1}: a portion of {portion} leaves no labelled pixel; choose another")
    return {"portion": portion, "images": len(selected), "examples": len(examples), **views, **labels}


class Views(Dataset):
    """The data set of `view_examples`: windows of target training images, enlarged to --size.

    folder: where their labels were written. Without it they have none, which is enough to estimate batch norm.
    """

    def __init__(self, args, examples, folder=None):
        self.images, self.examples, self.folder = common.target_dataset(args, "train"), examples, folder
        self.size, uncropped = args.size, argparse.Namespace(size=args.size, crop=args.size, scale_jitter=(1, 1))
        self.augment = common.training_augment(uncropped) if args.augment else None  # a flip

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, number):
        index, n, *window = self.examples[number]
        item = self.images[index]
        patch = enlarge(cut(item["image"], *window).float(), self.size).round().byte()  # (3, H, W)
        name = f"{item['name']}_{n}"
        label = common.read_label(self.folder / f"{name}.png") if self.folder else None
        return common.make_item(common.to_picture(patch), label, name, None, self.augment)


# ================================================ the authors' network ================================================


class FCN8s(nn.Module):
    """FCN-8s (Long et al., arXiv 1411.4038) on torchvision's VGG16, in the "at once" form of Caffe.

    `forward(images (N, 3, H, W))` returns fc7 and logits (N, C, H, W), which have the size of the input, unlike
    DeepLabV2's. fc6 and fc7 take over the weights of VGG's classifier.

    Caffe multiplies pool4 by 0.01 and pool3 by 0.0001, so that the finer scores learn as fast as the coarse one [C].
    Its VGG sees images of 0 to 255, torchvision's sees them divided by 255 and by a deviation of about 0.226. Here both
    factors are therefore 255 * 0.226 = 58 times as large [U], which nobody has measured on real data.
    """

    def __init__(self, num_classes, backbone="vgg16", weights="none"):
        super().__init__()
        net = common.torchvision_network(backbone, weights)
        layers = list(net.features)
        layers[0].padding = (100, 100)  # so that fc6 fits on an image of any size and the crops below have room
        for layer in layers:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True
        fc6, fc7 = nn.Conv2d(512, 4096, 7), nn.Conv2d(4096, 4096, 1)
        for convolution, linear in ((fc6, net.classifier[0]), (fc7, net.classifier[3])):
            convolution.weight = nn.Parameter(linear.weight.detach().view_as(convolution.weight))
            convolution.bias = linear.bias
        top = [fc6, nn.ReLU(inplace=True), nn.Dropout2d(0.5), fc7, nn.ReLU(inplace=True), nn.Dropout2d(0.5)]
        self.backbone = nn.ModuleList([nn.Sequential(*layers[:17]), nn.Sequential(*layers[17:24]),  # to pool3, to pool4
                                       nn.Sequential(*layers[24:], *top)])
        self.classifier = nn.ModuleList(nn.Conv2d(channels, num_classes, 1) for channels in (256, 512, 4096))
        for score in self.classifier:
            nn.init.zeros_(score.weight)
            nn.init.zeros_(score.bias)

    def forward(self, images):
        pool3 = self.backbone[0](images)  # (N, 256, .., ..), stride 8
        pool4 = self.backbone[1](pool3)  # (N, 512, .., ..), stride 16
        fc7 = self.backbone[2](pool4)  # (N, 4096, .., ..), stride 32
        score3, score4 = self.classifier[0](0.0058 * pool3), self.classifier[1](0.58 * pool4)
        coarse = self.classifier[2](fc7)  # (N, C, .., ..), stride 32
        with torch.autocast("cuda" if images.is_cuda else "cpu", enabled=False):  # full-size logits stay fp32
            score = bilinear_upsampling(coarse.float(), 2)  # (N, C, .., ..), stride 16
            score = bilinear_upsampling(score + cut(score4, 5, 5, *score.shape[2:]), 2)  # stride 8
            score = bilinear_upsampling(score + cut(score3, 9, 9, *score.shape[2:]), 8)
            return fc7, cut(score, 31, 31, *images.shape[2:])  # (N, C, H, W)


def bilinear_upsampling(maps, factor):
    """(N, C, h, w) -> (N, C, factor (h + 1), factor (w + 1)), by a transposed convolution that never learns."""
    line = 1 - (torch.arange(2 * factor, device=maps.device) + 0.5 - factor).abs() / factor  # a triangle
    kernel = (line[:, None] * line).expand(maps.shape[1], 1, -1, -1)  # (C, 1, 2 factor, 2 factor)
    return F.conv_transpose2d(maps, kernel, stride=factor, groups=maps.shape[1])


def fcn8s_optimizer(model, args):
    """The authors' Adam for FCN8s: no weight decay, and biases learn at twice the rate [C]."""
    groups = [{"params": [p for p in model.parameters() if p.requires_grad and p.ndim > 1], "scale": 1.0},
              {"params": [p for p in model.parameters() if p.requires_grad and p.ndim == 1], "scale": 2.0}]
    return torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.99), fused=args.device == "cuda")


NETWORKS = {"deeplab": common.DeepLabV2, "fcn8s": FCN8s}


# =================================================== meters (ours) ===================================================
# How far the prediction of an enlarged window is from that of the same pixels in the whole image. The log gives it in
# every round, for one window of each selected image. result.json gives it for the target's validation images, cut into
# 2 x 2 windows, `before` (the source-only model under the adaptation's batch norm) and `after`.


def view_agreement(patch, whole):
    """entropy_gap, cross_entropy and agreement of two predictions of the same pixels, (3,).

    patch (C, H, W): probabilities predicted on a patch. whole (C, H, W): those of the whole image in its window,
    enlarged. The abstract's premise is a positive gap. Cross-entropy and agreement are with the label by `whole`.
    """
    label = whole.max(0).indices  # (H, W)
    entropy_gap = (pixel_entropy(patch) - pixel_entropy(whole)).mean()
    cross_entropy = F.nll_loss((patch + 1e-12).log()[None], label[None])
    agreement = (patch.max(0).indices == label).to(patch.dtype).mean()
    return torch.stack([entropy_gap, cross_entropy, agreement])


def compare_views(model, dataset, corners, args):
    """Means of `view_agreement` over the patches at corners (len(dataset), n, 2), whatever --view is.

    If the data set has labels, also enlarged_miou: the mIoU of the patches' predictions against the enlarged truth.
    """
    total, size = torch.zeros(3, dtype=torch.float64, device=args.device), args.size
    metric = common.MeanIoU(len(common.task_classes(args.source)))
    for number, item, prob in each_prediction(model, dataset, args):
        windows = [(top, left, *half(size)) for top, left in corners[number].tolist()]
        patches = torch.stack([enlarge(cut(item["image"], *window), size) for window in windows])  # (n, 3, H, W)
        for window, patch_prob in zip(windows, common.predict(model, patches, size, args)):  # (C, H, W)
            total += view_agreement(patch_prob, enlarge(cut(prob, *window), size))
            if "label" in item:
                truth = enlarge_labels(cut(item["label"], *window), size).to(args.device)  # (H, W)
                metric.update(patch_prob.max(0).indices, truth)
    means = (common.all_sum(total) / (corners.numel() / 2)).tolist()
    meters = dict(zip(("entropy_gap", "cross_entropy", "agreement"), means))
    metric.sum_processes(args.device)
    return {**meters, "enlarged_miou": 100 * metric.mean(metric.present())} if metric.present() else meters


def validation_views(model, run, args):
    """`compare_views` on the target's validation images, cut into 2 x 2 windows. Nothing without labels."""
    if not run.scorable:
        return {}
    dataset, (a, b) = common.target_dataset(args, "val", labelled=True), half(args.size)
    quarters = torch.tensor([(0, 0), (0, b), (a, 0), (a, b)])  # (4, 2)
    return compare_views(model, dataset, quarters.expand(len(dataset), 4, 2), args)


# ==================================================== the command ====================================================


def parse_args():
    parser = common.shared_parser(__doc__, adapts=True)
    add = parser.add_argument
    add("--network", choices=NETWORKS, default="deeplab",
        help="deeplab: as in all files; fcn8s: the authors' VGG16-FCN8s with their Adam, trained here, without --init")
    add("--rounds", type=common.count, metavar="N", default=common.by_source(2, 7),
        help="rounds of ranking and training [C]")
    add("--iterations", type=common.natural, metavar="T", default=common.by_source(240, 0, small=6000),
        help="adaptation steps, all rounds together; 0: as --epochs says [C]")
    add("--epochs", type=common.count, metavar="N", default=2,
        help="with --iterations 0: passes over the examples of a round, poly decay anew in each round [C]")
    add("--lr", type=common.positive, metavar="X", default=common.by_source(2e-4, 1e-6, small=5e-5),
        help="base learning rate of the adaptation [C]")
    add("--portion", type=common.positive, metavar="p_0", default=common.by_source(1.0, 0.10),
        help="p of the first round: 19 times the share of images that a class keeps [C]")
    add("--portion-step", type=common.weight, metavar="X", default=common.by_source(0.5, 0.05),
        help="delta_p, growth of p per round [C]")
    add("--patches", type=common.count, metavar="n_p", default=4, help="random patches per selected image [C]")
    add("--view", choices=("enlarged", "whole", "both"), default="enlarged",
        help="what is shown of the target: half-size windows enlarged by two [C] or, as controls, whole images or both")
    add("--mask-mode", choices=("nearest", "dilate"), default="nearest",
        help="how the mask of kept pixels is enlarged: nearest [U] or dilate [C]")
    add("--focal", action=argparse.BooleanOptionalAction, default=True, help="add LSE-3, the focal loss [C]")
    add("--beta", type=common.weight, metavar="X", default=0.1, help="weight of the focal loss [C]")
    add("--gamma", type=common.weight, metavar="X", default=3.0, help="focal exponent [C; 5 in one notebook]")
    add("--augment", action=argparse.BooleanOptionalAction, default=True,
        help="mirror patches, vary their colours (authors: no)")
    args = common.parse(parser)
    if args.size[0] % 16 or args.size[1] % 16:
        parser.error(f"--size {args.size[0]}x{args.size[1]}: expected multiples of 16, for windows of half the size")
    if args.network == "fcn8s":
        if args.init:
            raise common.InputError("--init: a checkpoint of source_only.py is a DeepLabV2; --network fcn8s trains its "
                                    "own source-only model")
        args.backbone = "vgg16"
    return args


def main():
    args = parse_args()
    run = common.Run("scale_invariant", args)
    images = len(common.target_dataset(args, "train"))
    check_portion(args.portion, images, f"there are {images} target images")
    source = common.source_dataset(args, common.training_augment(args, args.source_size))

    # Step 1: the source-only model, trained here or given.
    model = common.build_model(args, NETWORKS[args.network])
    if args.init:
        common.load_init(model, args, run)
    else:
        train_source(model, source, args, run, "source_only.pt", args.warmup_iterations, args.warmup_lr)
    source_model = copy.deepcopy(model)
    # Batch norm is estimated on views of the kind on which the network is trained, from all target images.
    generator = torch.Generator().manual_seed(common.mix_seed(args.seed, 7))
    corners = random_windows(images, args.patches, args.size, generator)
    views = Views(args, view_examples(args.view, range(images), corners, args.size))
    common.settle_batch_norm(model, views, args)
    before = validation_views(model, run, args)

    # Steps 2 to 4: rounds of selection, labels and training on both domains. One optimizer for all of them.
    # done: steps of the run so far. A round goes from step `first` to `last`, the poly decay from `begin` to `end`.
    network, first = common.distribute(model, args), 0
    optimizer = fcn8s_optimizer(model, args) if args.network == "fcn8s" else make_optimizer(model, args)
    done = run.load("last.pt", model, optimizer=optimizer)
    for r in range(args.rounds):
        folder = run.folder / "pseudo_labels" / f"round{r + 1}"
        if done <= first:  # a new round: images and labels by the present network
            if r > 0:  # for the first round it has just been done
                common.settle_batch_norm(model, views, args)
            run.log(f"round {r + 1}", **start_round(model, args, folder, r))
        target = Views(args, common.read_json(folder / "round.json")["examples"], folder)
        if args.iterations:
            last, begin, end = args.iterations * (r + 1) // args.rounds, 0, args.iterations
        else:
            last = first + round_steps(len(target), args.epochs, args.batch_size)
            begin, end = first, last  # the learning rate decays within the round
        batches_s = common.training_batches(source, args, common.mix_seed(args.seed, 4), done, last, share=2)
        batches_t = common.training_batches(target, args, common.mix_seed(args.seed, 5, r), done - first, last - first,
                                            jitter=0.3 if args.augment else 0, share=2)
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
    after = validation_views(model, run, args)
    meters = {f"{name}_{when}": seen[name] for name in before for when, seen in (("before", before), ("after", after))}
    common.compare_with_source_only({"LSE": model}, args, run, source_model, **meters)


if __name__ == "__main__":
    common.run(main)


# ================================================ further deviations ================================================
#  5. Input. Authors: BGR, 0 to 255 minus Caffe's mean. Here: normalised RGB, for which FCN8s has other factors. Their
#     ResNet strides in its 1x1 convolutions, torchvision's in its 3x3.
#  6. A class with a single entropy in an image. Authors: LSE-7 is 0/0, and NaN drops no pixel. In x*_c it makes tau_c
#     NaN and keeps every pixel of c. Here: E^ = 0, and tau_c comes from the next image of the ranking that defines one.
#     If none does, c gives no label.
#  7. Empty cases. Authors: a class that is predicted nowhere ends the program with an error, and a patch without a kept
#     pixel has a loss of NaN. Here: the class selects nothing, and the loss is zero.
#  8. List of selected images. Authors: the first image of T_r is cut twice. From the second round on the list is read
#     shuffled and with repeats, so that about 35 % of T_r are lost. Here: each image of T_r has exactly n_p patches.
#  9. Optimizer of DeepLab. Authors: it lists most body weights three times and head weights once, and a weight that is
#     listed three times moves three times per step. Here: each once. To move them about as far as the authors' code,
#     give --batch-size 1 --lr 3.1e-6 --head-lr 3.3.
# 10. The published ResNet-101 row of SYNTHIA. The log [N] of just these scores has a learning rate of 1e-12, with which
#     no weight moves. They are the scores of its start, whose origin is unknown, under new batch-norm statistics.
# 11. Learning rate. Authors: constant for VGG, poly decay in each round for DeepLab. Here: a --ramp, then poly decay
#     over all --iterations, or in each round with --iterations 0. Constant: --power 0 --ramp 0.
# 12. Batch. Authors: one source image and one patch, two backward passes. Here: n and n, one backward pass of the sum,
#     which has the same gradient, and 1/n as many steps. Means are over the valid pixels of the whole batch.
# 13. Batch norm. Authors: affine part frozen, while statistics move with every image of either domain. Here: a policy
#     of --batch-norm, none of which is that. Statistics for labelling and evaluation come from up to 400 views of the
#     kind on which the network is trained, drawn from all target images.
# 14. Augmentation. Authors: none. Here: flip and colour jitter, of source images also crop and scale, as in all files.
#     --no-augment leaves the patches as they are.
# 15. Rounds. Authors: seven at the last commit, in notebooks until the entropy of *validation* images says stop. Up to
#     500 steps of the last round are never saved. Here: a fixed number, all steps saved. On the toy --iterations is
#     divided evenly among them. With --iterations 0, --view both has (1 + n_p) / n_p times the steps.
# 16. Source-only start. Authors: files whose origin is partly known. Here: trained by source_only.py or in this file,
#     FCN8s too, by --optimizer. The authors' Adam begins with the adaptation.
