"""benchmark.py still fits the functions that it measures; its figures are tested nowhere."""

import benchmark


def test_every_step_can_be_measured(capsys):
    benchmark.steps("cpu", "fp32", "resnet18", (32, 64), 1, rounds=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines] == ["plain self-training", "LSE", "CPSL", "CPSL with consistency", "SDCA", "DRSL"]
    assert all("x plain" in line for line in lines)
