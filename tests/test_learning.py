"""Learning, in seconds and by wide margins: a few steps on one batch bring a loss down, and not with the idea off.

All that depends on the course of a training stands here. Another processor adds numbers in another order, so each
margin is several times what that changes; `.ci/run` runs this file a second time with an old processor's instructions.
PRECISION=bf16 in the environment lets the networks compute in bf16.
"""

import copy
import os
import sys
from types import SimpleNamespace

import pytest
import torch

import common
import cpsl
import drsl
import scale_invariant
import sdca
import source_only

STEPS = 12


def settings(module, *flags):
    """What the script's parse_args() gives for these flags."""
    before, sys.argv = sys.argv, [module.__name__, "--device", "cpu", "--precision",
                                  os.environ.get("PRECISION", "fp32"), *map(str, flags)]
    try:
        return module.parse_args()
    finally:
        sys.argv = before


def batch(domain):
    """Bytes (4, 3, 32, 64) and labels (4, 32, 64) of one batch."""
    items = [common.ToyStreets(domain, "val", (32, 64))[i] for i in range(4)]
    return [torch.stack([item[key] for item in items]) for key in ("image", "label")]


@pytest.fixture
def data():
    torch.manual_seed(0)
    return SimpleNamespace(model=common.DeepLabV2(16, "resnet14").train(), source=batch("source"),
                           target=batch("target"))


def descend(step, parameters, term, lr=1e-3):
    """Share of `term` that is left after a few steps of Adam on "loss"; both are among what step() returns."""
    optimizer, values = torch.optim.Adam(parameters, lr=lr), []
    for _ in range(STEPS):
        terms = step()
        values.append(terms[term].item())
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    print(f"\nleft of {term}: {values[-1] / values[0]:.3f}")
    return values[-1] / values[0]


def forward(model, images, args):
    with common.autocast(args):
        return model(common.normalise(images))


def test_source_training_learns_its_batch(data):
    args = settings(source_only)

    def step():
        return {"loss": source_only.segmentation_loss(forward(data.model, data.source[0], args)[1], data.source[1])}

    assert descend(step, data.model.parameters(), "loss") < 0.7


def test_lse_learns_the_labels_of_its_patches(data):
    """No source label, so that all that moves is what the patches teach."""
    args, nothing = settings(scale_invariant), torch.full_like(data.source[1], 255)

    def left(label):
        model = copy.deepcopy(data.model)

        def step():
            losses = scale_invariant.step_losses(model, (common.normalise(data.source[0]), nothing),
                                                 (common.normalise(data.target[0]), label), args)
            logits = forward(model, data.target[0], args)[1]
            return {**losses, "seen": scale_invariant.segmentation_loss(logits, data.target[1])}

        return descend(step, model.parameters(), "seen")

    assert left(data.target[1]) < 0.7 and left(torch.full_like(data.target[1], 255)) > 0.95


def test_cpsl_moves_its_prototypes_towards_their_pixels(data):
    def left(*flags):
        args = settings(cpsl, "--bank", 0, *flags)
        head = cpsl.SelfLabelingHead(16, data.model.feature_dim)
        torch.nn.init.normal_(head.prototypes, generator=torch.Generator().manual_seed(1))
        models = SimpleNamespace(network=data.model, self_labeling=head, head=head, warm_up=copy.deepcopy(data.model),
                                 momentum=copy.deepcopy(data.model), momentum_head=copy.deepcopy(head),
                                 bank=cpsl.MemoryBank(0, data.model.feature_dim))
        source = common.normalise(data.source[0]), data.source[1]
        return descend(lambda: cpsl.step_losses(models, source, data.target[0], args, 1), head.parameters(), "sl", 0.1)

    assert left() < 0.9 and left("--lambda-sl", 0) == pytest.approx(1, abs=0.01)


def test_sdca_pulls_pixels_to_their_class(data):
    """At a temperature at which the loss says something, without the variance, which hides it in so small a batch."""
    def left(weight):
        args = settings(sdca, "--tau", 0.1, "--no-covariance", "--lambda-lov", 0, "--lambda-feat", weight,
                        "--lambda-out", 0)
        model = copy.deepcopy(data.model)
        statistics = {level: sdca.ClassStatistics(16, dim) for level, dim in (("feat", model.feature_dim), ("out", 16))}
        x_s, x_t = common.normalise(data.source[0]), common.normalise(data.target[0])
        return descend(lambda: sdca.step_losses(model, statistics, x_s, data.source[1], x_t, args), model.parameters(),
                       "feat_s")

    assert left(10) < 0.7 * left(0)


def test_drsl_pulls_pixels_to_the_modes_of_their_class(data):
    def left(*flags):
        args, model = settings(drsl, *flags), copy.deepcopy(data.model)
        torch.manual_seed(2)
        head = drsl.ModeHead(model.feature_dim, 16, 3, 64)
        pairs = [(common.normalise(image), label) for image, label in (data.source, data.target)]
        step = lambda: drsl.step_losses(model, head, *pairs, args, torch.Generator().manual_seed(3))
        return descend(step, [*model.parameters(), *head.parameters()], "mm_t")

    assert left() < 0.8 and left("--lambda-mm", 0, "--lambda-sma", 0) > 0.95
