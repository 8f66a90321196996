"""Lets the tests import the scripts of the project's folder from wherever pytest is started."""

import sys
from pathlib import Path

import pytest
import torch

torch.cuda.is_available = lambda: False  # what tests compute in this process they compute on the CPU, also beside a GPU
sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A source-only checkpoint of the tiny toy, from which the script tests of all methods start."""
    from scripts import TINY, run

    folder = tmp_path_factory.mktemp("start")
    run(folder, "source_only.py", *TINY, "--iterations", 2, "--out", "run")
    return folder / "run/last.pt"
