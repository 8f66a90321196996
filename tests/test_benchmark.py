"""benchmark.py still fits the functions that it measures (its figures are tested nowhere); no step waits for a GPU."""

import contextlib

import benchmark
import pytest
import torch

import common


def test_every_step_can_be_measured(capsys):
    benchmark.steps("cpu", "fp32", "resnet14", (32, 64), 1, rounds=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines] == list(benchmark.STEPS)
    assert all("x plain" in line for line in lines)


@pytest.mark.parametrize("name", benchmark.STEPS)
def test_no_step_waits_for_the_device(monkeypatch, name):
    """Tensors on the device "meta" have shapes, no values, so a step that reads one, or needs one for a shape fails.

    On a GPU the same step would wait there until everything before it is computed.
    """
    monkeypatch.setattr(common, "autocast", lambda *_: contextlib.nullcontext())  # there is none for "meta"
    monkeypatch.setattr(common, "generator", lambda *_: None)  # nor this
    image = torch.zeros(2, 3, 32, 64, device="meta")
    label = torch.zeros(2, 32, 64, dtype=torch.int64, device="meta")
    model = common.build_network(5, "resnet14").to("meta").train()
    common.freeze_batch_norm(model)
    step = benchmark.STEPS[name](model, image, label, image, label, "fp32")
    step()
    step()
    for waits in (
        torch.Tensor.item,
        torch.nonzero,
        lambda values: values[values > 0],
    ):  # or else this test could not fail
        with pytest.raises((RuntimeError, NotImplementedError)):
            waits(torch.zeros(3, device="meta"))
