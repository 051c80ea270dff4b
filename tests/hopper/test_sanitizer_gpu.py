# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer finds no wrong access to memory, and no race in shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from magi_attention.kernels.protocol import AttentionRequest
from magi_kernels_hopper import BACKEND
from magi_kernels_hopper.variants import (
    IndexBackwardVariant,
    IndexVariant,
    backward_variants,
    compiler_options,
    forward_variants,
)

pytestmark = pytest.mark.gpu

CSRC = Path(__file__).parents[2] / "packages" / "kernels-hopper" / "csrc"
LIMIT_S = 600  # a kernel that waits for ever would let the sanitizer do so too
TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


def of_toolkit(name: str) -> str:
    """A program of the CUDA toolkit."""
    found = shutil.which(name) or next(filter(Path.is_file, (TOOLKIT / "bin" / name, TOOLKIT / name / name)), None)
    if found is None:
        pytest.skip(f"there is no {name}: it comes with the CUDA toolkit")
    return str(found)


@pytest.fixture(autouse=True, scope="module")
def hopper_gpu():
    if not (support := BACKEND.supports(AttentionRequest(torch.device("cuda"), torch.bfloat16, 4, 1, 128, 128))):
        pytest.skip(support.reason)


def assert_no_complaint(tool: str, *arguments: int | str | Path, options: tuple[str, ...] = ()) -> None:
    sanitizer = of_toolkit("compute-sanitizer")
    watch = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=magi_", *options]
    launch = [sys.executable, str(Path(__file__).with_name("sanitized.py")), *map(str, arguments)]
    done = subprocess.run([*watch, *launch], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "launched" in done.stdout


def test_memcheck():
    # Libraries probe for driver functions that are not there, which is no fault.
    assert_no_complaint("memcheck", 64, 128, 256, options=("--report-api-errors=no",))


def test_racecheck(tmp_path):
    """Of kernels in which every thread arrives at barriers for itself: one that does for its warp is not followed."""
    nvcc = of_toolkit("nvcc")
    variants = [
        *forward_variants((128, 128), "bf16", softcap=False),
        *backward_variants((128, 128), "bf16", softcap=False),
        IndexVariant(128, 128, "bf16"),
        IndexBackwardVariant(128, 128, "bf16"),
    ]
    for variant in variants:
        target = tmp_path / f"{variant.name}.cubin"
        options = [*compiler_options(variant), "-DMAGI_FOR_RACECHECK", str(CSRC / variant.source), "-o", str(target)]
        subprocess.run([nvcc, *options], check=True, timeout=LIMIT_S)
    assert_no_complaint("racecheck", 128, "--cubins", tmp_path)
