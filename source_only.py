"""Source only: train on labelled source images, test on the target. The baseline that every method starts from.

A network that learned to segment rendered streets is asked to segment camera images without having seen one. What it
loses is the *domain gap*, and the method files next to this one try to close it without a single target label. With
`--oracle` the same loop trains on the target's own labels instead: the supervised bound that no method is expected
to reach. Between the two numbers lies all there is to win.

The algorithm, which the other files repeat as their warm-up:

1. Build DeepLabV2 on an ImageNet backbone (the toy world starts from random weights).
2. Draw a batch: randomly enlarged (not on the toy), cropped, flipped and colour-jittered source images with their labels.
3. Learning rate by the poly schedule; the classifier's is --head-lr times the backbone's (10, in the toy world 1).
4. Forward; logits upsampled bilinearly to the labels' size; cross-entropy over the pixels not labelled 255.
5. Backward, a step of SGD (toy: AdamW); now and then a line in the log and a checkpoint.
6. Evaluate the *last* checkpoint on the target's validation split: one confusion matrix, labels at full resolution.

equation                                                       function
SRC-1   L_seg = -(1/|V|) sum_{i in V} log P_i(y_i)             segmentation_loss   V: pixels with y_i != 255
SRC-2   lr(t) = lr_0 (1 - t/T)^0.9                             poly_lr             t: steps done, T: --iterations, lr_0: --lr

On real data the recipe is the one of the DeepLabV2 and adaptation literature (SGD, momentum 0.9, weight decay 5e-4, poly 0.9, head
x10); iterations, batch and crop are this project's own choice, the same for all methods. No result of any paper is
claimed for them.

The printed table has a second column, `+ BN target`: the same weights with batch-norm statistics re-estimated on
unlabelled target images. That is already a known adaptation, and methods whose batch norm is live while they train on
target images get it for free, so it stands in every comparison. (A VGG16 has no batch norm, hence no such column.)

Expect on the toy (mean of seeds 0 to 2, two cores of an AMD EPYC, bf16): source only 45.4, with re-estimated batch
norm 54.3, oracle 63.5 mIoU; 2 minutes, 1.2 GB.

    python source_only.py                                       # toy world, no data, a CPU will do
    python source_only.py --oracle
    python source_only.py --source synthia --data-root DIR      # then: python drsl.py ... --init runs/.../last.pt
"""

import torch
import torch.nn.functional as F

import common


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


def parse_args():
    parser = common.shared_parser(__doc__)
    add = parser.add_argument
    add("--iterations", type=common.positive_int, metavar="T", default=common.by_source(500, 60000), help="training steps")
    add("--lr", type=float, metavar="X", default=common.by_source(1e-3, 2.5e-4), help="base learning rate lr_0; the head's is --head-lr times it")
    add("--oracle", action="store_true", help="train on the target's own labels: the supervised bound")
    return common.parse(parser)


def main():
    args = parse_args()
    run = common.Run("oracle" if args.oracle else "source_only", args)
    classes = common.task_classes(args.source)
    size = args.size if args.oracle or args.source == "toy" else args.source_size
    augment = common.training_augment(size, args.crop, args.scale_jitter)
    if args.oracle:
        dataset = common.target_dataset(args, "train", augment, labelled=True)
    else:
        dataset = common.source_dataset(args, augment=augment)
    model = common.build_model(args)
    train_source(model, dataset, args, run, "last.pt", args.iterations, args.lr)
    columns = {"oracle": common.evaluate_target(model, args)} if args.oracle else common.evaluate_source_only(model, args)
    title = list(columns)[0]
    run.finish(columns, title)
    common.comparison_panel(run.folder / "panel.png", {title: model}, args)


if __name__ == "__main__":
    common.run(main)
