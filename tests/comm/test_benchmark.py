# SPDX-License-Identifier: Apache-2.0
"""The benchmark of native collectives, where it can't run."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "grpcoll.py"


def test_it_says_that_it_needs_a_gpu():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--host"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert (run.returncode, run.stderr) == (1, "benchmarks/grpcoll.py needs a GPU\n")
