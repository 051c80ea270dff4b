# SPDX-License-Identifier: Apache-2.0
"""A first look at a GPU machine: versions, and one small forward and backward pass of each backend and kind of mask.

Run it as ``python tests/blackwell/smoke.py``; exits with 1 if anything is wrong.
"""

import logging
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version

import torch

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest
from magi_attention.testing.stages import NAMES, random_inputs, run_dense, run_stage
from magi_kernels_blackwell import CUDNN_FLEX_BACKEND, FLASH_ATTENTION_4_BACKEND

PACKAGES = "torch triton numpy flash-attn-4 quack-kernels nvidia-cutlass-dsl nvidia-cudnn-frontend apache-tvm-ffi"
MASKS = {
    "irregular": [[0, 200, 0, 300, 0], [200, 600, 100, 500, 1], [620, 700, 0, 40, 2], [620, 640, 300, 340, 3]],
    "full": [[0, 700, 0, 700, 0]],
    "varlen causal": [[0, 300, 0, 300, 1], [300, 700, 300, 700, 1]],
}


def installed(package: str) -> str:
    """A package's version, or that it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def check(backend, rows: list[list[int]], heads: tuple[int, int], dim: int) -> str:
    """Run one stage; returns each result's error over the error that plain PyTorch makes."""
    x = random_inputs(700, 700, heads=heads, dims=(dim, dim), dtype=torch.bfloat16, device="cuda")
    slices, scale = SliceTable(rows), dim**-0.5
    result, gradients = run_stage(backend, x, AttentionCall(slices, scale))
    torch.cuda.synchronize()
    truth, plain = (run_dense(x, slices, scale, 0.0, oracle=oracle) for oracle in (True, False))
    ratios = []
    for name, ours, right, torchs in zip(NAMES, (*result, *gradients), truth, plain, strict=True):
        if ours is not None:
            finite = right.isfinite()
            error, allowed = ((y.double() - right)[finite].abs().max().item() for y in (ours, torchs))
            same = torch.equal(ours[~finite].double(), right[~finite])
            ratios.append(
                f"{name} {error / max(allowed, 1e-6):.2f}{'' if error <= 2 * allowed + 1e-2 and same else ' WRONG'}"
            )
    return ", ".join(ratios)


def main() -> int:
    """Print everything, whatever fails."""
    logging.basicConfig(level=logging.WARNING)
    print(sys.version.split()[0], *(f"{package} {installed(package)}" for package in PACKAGES.split()), sep=", ")
    print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), "CUDA", torch.version.cuda)
    failures = 0
    for backend in (CUDNN_FLEX_BACKEND, FLASH_ATTENTION_4_BACKEND):
        request = AttentionRequest(torch.device("cuda"), torch.bfloat16, 8, 2, 128, 128)
        print(f"--- {backend.name}: {backend.supports(request)}")
        for label, rows in MASKS.items():
            start = time.time()
            try:
                line = check(backend, rows, (8, 2), 128)
            except Exception:
                line = "FAILED\n" + traceback.format_exc(limit=-6)
            failures += "FAILED" in line or "WRONG" in line
            print(f"{label:14} {time.time() - start:5.1f} s  error / PyTorch's error: {line}", flush=True)
    print("all right" if not failures else f"{failures} of {2 * len(MASKS)} failed")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
