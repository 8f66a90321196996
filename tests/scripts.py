"""Runs the project's scripts as a user would: by subprocess, from another folder, offline, on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

PROJECT = Path(__file__).parent.parent
TINY = ["--device", "cpu", "--size", "32x64", "--toy-images", "24", "--batch-size", "2", "--log-every", "1"]  # one step takes a moment
ENVIRONMENT = {**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "OMP_NUM_THREADS": "2"}


def command(script, *arguments):
    return [sys.executable, str(PROJECT / script), *map(str, arguments)]


def run(folder, script, *arguments, ok=True):
    """Standard output of a run that must succeed; the last line of standard error of one that must not."""
    result = subprocess.run(command(script, *arguments), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    if ok:
        assert result.returncode == 0, result.stderr
        return result.stdout
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stderr, result.stderr
    return result.stderr.strip().splitlines()[-1]


def kill_when(folder, condition, script, *arguments, with_signal=signal.SIGKILL):
    """Starts a run and signals it as soon as `condition()` holds; returns (return code, standard error)."""
    process = subprocess.Popen(command(script, *arguments), cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, f"ended by itself: {process.communicate()[1]}"
    process.send_signal(with_signal)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def logged(folder, stage, at_least=1):
    """Whether log.jsonl holds that many lines of a stage."""
    path = Path(folder) / "log.jsonl"
    return path.exists() and path.read_text().count(f'"stage": "{stage}"') >= at_least


def same_weights(one, other):
    """Whether two checkpoints hold the same network, to the bit."""
    a, b = (torch.load(path, weights_only=True)["model"] for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def result(folder):
    return json.loads((Path(folder) / "result.json").read_text())
