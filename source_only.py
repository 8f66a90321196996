"""Source only: train on labelled source images, test on the target. The baseline that every method starts from.

A network that learned to segment rendered streets is asked to segment camera images without having seen one. What it
loses is the *domain gap*, and the method files next to this one try to close it without a single target label. With
`--oracle` the same loop trains on the target's own labels instead: the supervised bound that no method is expected
to reach. Between the two numbers lies all there is to win.

The algorithm, which the other files repeat as their warm-up:

1. Build DeepLabV2 on an ImageNet backbone (the toy world starts from random weights).
2. Draw a batch of source images with their labels: randomly enlarged (not on the toy), cropped, flipped and recoloured.
3. Learning rate by the poly schedule; the classifier's is --head-lr times the backbone's (10, in the toy world 1).
4. Forward; logits upsampled bilinearly to the labels' size; cross-entropy over the pixels not labelled 255.
5. Backward, a step of SGD (toy: AdamW); now and then a line in the log and a checkpoint.
6. Evaluate the *last* checkpoint on the target's validation split: one confusion matrix, labels at full resolution.

equation                                                       function
SRC-1   L_seg = -(1/|V|) sum_{i in V} log P_i(y_i)             segmentation_loss   P: softmax; V: y_i != 255
SRC-2   lr(t) = lr_0 (1 - t/T)^0.9                             poly_lr             t: steps done, T of them, lr_0: --lr

On real data the recipe is the one of the DeepLabV2 and adaptation literature (SGD, momentum 0.9, weight decay 5e-4,
poly 0.9, head x10); iterations, batch and crop are this project's own choice, the same for all methods. No result of
any paper is claimed for them. Batch norm: pretrained statistics stay frozen unless --batch-norm says otherwise; with
random weights it is live, or nothing would be learned. --preset small is for one small GPU and an evening: ResNet-50 at
256x512, AdamW, live batch norm. Nobody has measured it on the real data yet.

The printed table has a second column, `+ BN target`: the same weights with batch-norm statistics estimated on
unlabelled target images. That is already a known adaptation, so it stands in every comparison. (VGG16 has no batch
norm, hence no such column.)

Expect on the toy (mean ± standard deviation over the README's eight worlds): source only 30.8 ± 1.1, with re-estimated
batch norm 31.7 ± 1.2, oracle 44.1 ± 1.3 mIoU. It takes 3 minutes on one thread of an AVX2 core and 0.9 GB.

    python source_only.py                                       # toy world, no data, a CPU will do
    python source_only.py --oracle
    python source_only.py --source synthia --data-root DIR      # then: python drsl.py ... --init runs/.../last.pt
"""

import torch
import torch.nn.functional as F

import common


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


def parse_args():
    parser = common.shared_parser(__doc__)
    add = parser.add_argument
    add("--iterations", type=common.count, metavar="T", default=common.by_source(600, 60000, small=10000),
        help="T, training steps")
    add("--lr", type=common.positive, metavar="X", default=common.by_source(1e-3, 2.5e-4, small=1e-4),
        help="lr_0, base learning rate; the head's is --head-lr times it")
    add("--oracle", action="store_true", help="train on the target's own labels: the supervised bound")
    return common.parse(parser)


def main():
    args = parse_args()
    run = common.Run("oracle" if args.oracle else "source_only", args)
    if args.oracle:
        dataset = common.target_dataset(args, "train", common.training_augment(args), labelled=True)
    else:
        dataset = common.source_dataset(args, common.training_augment(args, args.source_size))
    model = common.build_model(args)
    train_source(model, dataset, args, run, "last.pt", args.iterations, args.lr)
    title, columns = "oracle" if args.oracle else "source only", {}
    if run.scorable and args.oracle:
        columns = {title: common.evaluate_target(model, args)}
    elif run.scorable:
        columns = common.evaluate_source_only(model, args)
    run.finish(columns, title)
    common.comparison_panel(run.folder / "panel.png", {title: model}, args)


if __name__ == "__main__":
    common.run(main)
