# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer finds no wrong access to memory, and no race in shared memory."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from magi_attention.kernels.protocol import AttentionRequest
from magi_kernels_hopper import BACKEND

pytestmark = pytest.mark.gpu

PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")


@pytest.mark.parametrize(("tool", "dims"), [("memcheck", ["64", "128", "256"]), ("racecheck", ["128"])])
def test_no_complaint(tool, dims):
    if not (support := BACKEND.supports(AttentionRequest(torch.device("cuda"), torch.bfloat16, 4, 1, 128, 128))):
        pytest.skip(support.reason)
    sanitizer = shutil.which("compute-sanitizer") or next((place for place in PLACES if Path(place).exists()), None)
    if sanitizer is None:
        pytest.skip("there is no compute-sanitizer: it comes with the CUDA toolkit")
    # Libraries probe for driver functions that are not there, which is no fault.
    options = ["--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=magi_"]
    # One thread of a warp arrives at a barrier for all of them.
    of_tool = {"memcheck": "--report-api-errors=no", "racecheck": "--racecheck-indirect-barrier-dependency"}
    options.append(of_tool[tool])
    script = Path(__file__).with_name("sanitized.py")
    done = subprocess.run([sanitizer, *options, sys.executable, str(script), *dims], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "launched" in done.stdout
