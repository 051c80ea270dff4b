# SPDX-License-Identifier: Apache-2.0
"""Readings of a GPU's clocks in stream order, by which ``distributed.py --equal-clocks`` scales its times."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer, smid


@triton.jit
def read_clocks_kernel(readings):  # type: ignore[no-untyped-def]
    """Each block writes the cycles and nanoseconds of its multiprocessor to ``readings[multiprocessor]``."""
    place = readings + 2 * smid()
    cycles = tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    tl.store(place, cycles)
    tl.store(place + 1, globaltimer())


def read_clocks() -> Tensor:
    """Read the clocks of the current device, on its current stream.

    Returns:
        ``[multiprocessors, 2]`` int64: cycles, and nanoseconds of a clock that all have in common. Zeros for a
        multiprocessor that took no block, such as one that other streams keep busy.
    """
    num_multiprocessors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    readings = torch.zeros(num_multiprocessors, 2, dtype=torch.int64, device="cuda")
    read_clocks_kernel[(num_multiprocessors,)](readings, num_warps=1)
    return readings
