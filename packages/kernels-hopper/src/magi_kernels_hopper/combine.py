# SPDX-License-Identifier: Apache-2.0
"""One launch of the kernel that puts the parts of tiles of queries together.

Shape suffixes: t tokens, h heads, d head dim; q queries.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from magi_kernels_hopper.driver import CUBINS, Kernel
from magi_kernels_hopper.launching import index_of
from magi_kernels_hopper.results import Results
from magi_kernels_hopper.tables import DeviceRowTables
from magi_kernels_hopper.variants import ForwardVariant

ROWS_OF_BLOCK = 8


class CombineParams(ctypes.Structure):
    """``magi::forward::CombineParams`` of csrc/forward/combine.cuh."""

    _fields_ = (
        ("results", Results),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("tile_q", ctypes.c_int),
    )


class Combination:
    """The results of the parts of one pass, and the launch that makes them its result.

    Args:
        variant: the kernel that computes the parts.
        tables: which parts there are.
        out: ``[tq, hq, dv]``, what is to come of them.
    """

    def __init__(self, variant: ForwardVariant, tables: DeviceRowTables, out: Tensor) -> None:
        self._kernel = _kernel(variant, out.device)
        self._tables = tables
        shape = (tables.num_parts, *out.shape)
        self.out = out.new_empty(shape, dtype=torch.float32)
        self.lse = out.new_empty(shape[:-1], dtype=torch.float32)

    def launch(self, out: Tensor, lse: Tensor, stream: int, *, merge: bool) -> None:
        """Write ``out`` ``[tq, hq, dv]`` and ``lse`` ``[tq, hq]``, or merge with what is there."""
        params = CombineParams(
            Results.of(out, lse, None, merge=merge),
            self.out.data_ptr(),
            self.lse.data_ptr(),
            self._tables.parts.data_ptr(),
            self._tables.tile_q,
        )
        self._kernel.launch(-(-lse.numel() // ROWS_OF_BLOCK), stream, params)


@cache
def _kernel(variant: ForwardVariant, device: torch.device) -> Kernel:
    cubin, threads = CUBINS / f"{variant.name}.cubin", 32 * ROWS_OF_BLOCK
    return Kernel(cubin, variant.combine_entry, index_of(device), threads, 0)
