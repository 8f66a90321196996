"""Runs all tests, as many files at a time as there are processors: `python tests`. One: `python -m pytest -q FILE`.

pytest runs one test after the other, and hardly any of them keeps two processors busy.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def run(path):
    """Runs a file of tests, with the flags that were given, prints what pytest says and returns its exit status."""
    command = [sys.executable, "-m", "pytest", "-q", str(path), *sys.argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    print(f"{path.name}\n{done.stdout}{done.stderr}", flush=True)
    return done.returncode


if __name__ == "__main__":
    files = sorted(Path(__file__).parent.glob("test_*.py"), reverse=True)  # of which the last ones are short
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sys.exit(max(pool.map(run, files)))
