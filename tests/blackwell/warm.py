# SPDX-License-Identifier: Apache-2.0
"""Compile what the GPU tests launch, in many processes: ``python -m tests.blackwell.warm --jobs 14``.

The tests compile what they need themselves, but one after another. Run this before them, with
``MAGI_ATTENTION_FFA_FA4_CACHE_DIR`` set as for them, or leave it unset for both. No GPU is needed.
"""

import argparse
import io
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from multiprocessing import get_context

import torch

from magi_attention.kernels.protocol import PrecompileCase
from magi_kernels_blackwell.cases import NATIVE_MASKS
from tests.blackwell.matrix import BACKENDS, makes_sense

Job = tuple[str, PrecompileCase]

BF16, FP16 = torch.bfloat16, torch.float16
PLAIN = (128, 128)
DIMS = (PLAIN, (64, 64), (192, 128), (192, 192), (256, 256), (96, 96))
SMALL_AND_ODD = (((8, 8), (4, 2)), ((32, 32), (4, 2)), ((72, 72), (4, 2)), ((40, 104), (4, 4)), ((72, 40), (4, 4)))
HEADS = ((8, 2), (4, 4), (8, 1))
OWN_MASKS = (*NATIVE_MASKS[:3], *(f"documents {mask}" for mask in NATIVE_MASKS[:3]))


def jobs(arch: str) -> list[Job]:
    """What the tests of the GPU launch most, those of ``test_gpu.py`` first."""
    wanted = [
        *_all_masks(arch, (4, 2), PLAIN, BF16, ("", "dlse")),
        *_all_masks(arch, (8, 2), PLAIN, BF16, ("", "dlse")),
        *_case(arch, "cudnn_flex", (4, 2), PLAIN, BF16, "max_logits", "deterministic dlse"),
        *(job for heads in ((4, 4), (6, 2), (8, 1)) for job in _few_masks(arch, heads, PLAIN, FP16)),
        *(job for dims in DIMS for heads in HEADS[:2] for job in _few_masks(arch, heads, dims, BF16)),
        *(job for dims, heads in SMALL_AND_ODD for job in _case(arch, "cudnn_flex", heads, dims, BF16, "", "dlse")),
        *(
            job
            for dtype in (BF16, FP16)
            for dims in DIMS
            for heads in HEADS
            for job in (
                *_all_masks(arch, heads, dims, dtype, ("dlse",)),
                *_case(arch, "cudnn_flex", heads, dims, dtype, "", "deterministic dlse"),
            )
        ),
    ]
    return [job for job in dict.fromkeys(wanted) if makes_sense(*job)]


def _all_masks(
    arch: str, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, options: tuple[str, ...]
) -> Iterator[Job]:
    for backend, masks in (("fa4", ("", *OWN_MASKS)), ("cudnn_flex", ("",))):
        for mask in masks:
            for option in options:
                yield from _case(arch, backend, heads, dims, dtype, mask, f"{mask} {option}".strip())


def _few_masks(arch: str, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> Iterator[Job]:
    for backend, masks in (("fa4", ("", "causal")), ("cudnn_flex", ("",))):
        for mask in masks:
            yield from _case(arch, backend, heads, dims, dtype, mask, f"{mask} dlse".strip())


def _case(
    arch: str,
    backend: str,
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: torch.dtype,
    forward: str,
    backward: str,
) -> Iterator[Job]:
    yield backend, PrecompileCase(arch, dtype, *heads, *dims, "forward", forward)
    yield backend, PrecompileCase(arch, dtype, *heads, *dims, "backward", backward)


def compile_job(job: Job) -> str:
    """Compile one; says how it went."""
    backend, case = job
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            return "compiled" if BACKENDS[backend].precompile(case) else "cached"
    except Exception as error:  # the others are compiled all the same
        print(f"{backend} {case}: {type(error).__name__}: {error}", flush=True)
        return "failed"


def main() -> int:
    """Compile all; returns 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    wanted, counts = jobs(options.arch), Counter[str]()
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        for number, done in enumerate(as_completed([pool.submit(compile_job, job) for job in wanted]), 1):
            counts[done.result()] += 1
            if number % 20 == 0 or number == len(wanted):
                print(f"{number} of {len(wanted)}: {', '.join(f'{n} {how}' for how, n in counts.items())}", flush=True)
    return counts["failed"] > 0


if __name__ == "__main__":
    sys.exit(main())
