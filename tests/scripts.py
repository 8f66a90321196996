"""Runs the project's scripts as a user would: in processes of their own, from another folder, offline.

They run on the CPU, or with DEVICE=cuda in the environment on the GPU, where nothing is the same bit for bit.

Starting Python and importing torch takes seconds, hundreds of times over. So one server process imports torch once and
forks a fresh process for every run; only `command` is the plain command line.
"""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

from common import read_checkpoint as load

PROJECT = Path(__file__).parent.parent
DEVICE = os.environ.get("DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # inherited by every run
TINY = ["--size", "32x64", "--toy-images", "12", "--batch-size", "2", "--log-every", "1"]  # one step takes a moment
os.environ.update(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")  # inherited by every run
os.environ.setdefault("OMP_NUM_THREADS", "2")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torchvision.transforms.v2"])


def command(script, *arguments):
    return [sys.executable, str(PROJECT / script), *map(str, arguments)]


def execute(folder, arguments, environment):
    """What the new process does: standard output and error go to files, then the script runs as the main program."""
    os.chdir(folder)
    os.environ.update(environment)
    if "RANK" in environment:
        torch.set_num_threads(1)  # as torchrun does
    torch.backends.cudnn.allow_tf32 = False  # a GPU's fp32 is that of a CPU
    for stream, name in ((1, ".stdout"), (2, ".stderr")):
        os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
    sys.argv, sys.path[0] = arguments, str(PROJECT)
    runpy.run_path(arguments[0], run_name="__main__")


def start(folder, script, *arguments, **environment):
    process = SERVER.Process(target=execute, args=(str(folder), command(script, *arguments)[1:], environment))
    process.start()
    return process


def texts(folder):
    """Standard output and standard error of the last run in a folder."""
    return [(Path(folder) / name).read_text() for name in (".stdout", ".stderr")]


def run(folder, script, *arguments, ok=True, **environment):
    """Standard output of a run that must succeed; the last line of standard error of one that must not."""
    process = start(folder, script, *arguments, **environment)
    process.join()
    output, errors = texts(folder)
    if ok:
        assert process.exitcode == 0, errors
        return output
    assert process.exitcode != 0, output
    assert "Traceback" not in errors, errors
    return errors.strip().splitlines()[-1]


def kill_when(folder, condition, script, *arguments, with_signal=signal.SIGKILL):
    """Starts a run and signals it as soon as `condition()` holds; returns (return code, standard error)."""
    process = start(folder, script, *arguments)
    deadline = time.time() + 120
    while not condition() and process.is_alive() and time.time() < deadline:
        time.sleep(0.01)
    assert process.is_alive(), f"ended by itself: {texts(folder)[1]}"
    os.kill(process.pid, with_signal)
    process.join(120)
    return process.exitcode, texts(folder)[1]


def start_two(folder, script, *arguments):
    """Starts a script in two processes with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        start(folder, script, *arguments, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
              MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in "01"
    ]


def run_as_two(folder, script, *arguments):
    team = start_two(folder, script, *arguments)
    for process in team:
        process.join()
    assert [process.exitcode for process in team] == [0, 0], texts(folder)[1]


SPLITTABLE = ["--batch-norm", "frozen", "--optimizer", "sgd"]  # nothing that magnifies rounding


def trained_alike(begun, one, two, tolerance=0.3):
    """Whether two checkpoints moved away from a third, to places apart by less than that share of the way moved.

    Not the same place: under torchrun losses are means over each process's own pixels.
    """
    a, b, c = (load(path)["model"] for path in (begun, one, two))
    trained = [key for key in b if not torch.equal(a[key], b[key])]
    assert {key for key in b if key.endswith("weight") and b[key].ndim == 4} <= set(trained)  # every convolution
    for key in trained:
        moved, apart = ((x[key].double() - b[key].double()).norm().item() for x in (a, c))
        assert apart < tolerance * moved, f"{key}: moved {moved}, apart {apart}"
    stages = [
        [json.loads(line)["stage"] for line in (Path(path).parent / "log.jsonl").read_text().splitlines()]
        for path in (one, two)
    ]
    assert stages[0] == stages[1], "only one process writes"
    return True


def logged(folder, stage, at_least=1):
    """Whether log.jsonl holds that many lines of a stage."""
    path = Path(folder) / "log.jsonl"
    return path.exists() and path.read_text().count(f'"stage": "{stage}"') >= at_least


exact = pytest.mark.skipif(DEVICE == "cuda", reason="the same bit for bit on the CPU only")


def same_weights(one, other):
    """Whether two checkpoints hold the same network, to the bit."""
    a, b = (load(path)["model"] for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def result(folder):
    return json.loads((Path(folder) / "result.json").read_text())
