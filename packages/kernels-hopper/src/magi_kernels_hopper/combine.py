# SPDX-License-Identifier: Apache-2.0
"""One launch of the kernel that puts the parts of tiles of queries together.

Shape suffixes: t tokens, h heads, d head dim; q queries.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from magi_kernels_hopper.driver import CUBINS, ByAddresses, Kernel, Ready
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
    """The launches that make results of parts the result of a pass.

    Args:
        variant: the kernel that computes the parts.
        tables: which parts there are.
        device: of the tensors.
    """

    def __init__(self, variant: ForwardVariant, tables: DeviceRowTables, device: torch.device) -> None:
        self._kernel = _kernel(variant, device)
        self._tables = tables
        self._known = ByAddresses[Ready]()

    def parts_of(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Where the parts of ``out`` ``[tq, hq, dv]`` and of its lse go."""
        shape = (self._tables.num_parts, *out.shape)
        return out.new_empty(shape, dtype=torch.float32), out.new_empty(shape[:-1], dtype=torch.float32)

    def launch(self, parts: tuple[Tensor, Tensor], out: Tensor, lse: Tensor, stream: int, *, merge: bool) -> None:
        """Write ``out`` ``[tq, hq, dv]`` and ``lse`` ``[tq, hq]``, or merge with what is there."""
        key = (*[x.data_ptr() for x in (*parts, out, lse)], out.dtype, lse.stride(), merge)
        ready = self._known.find(key)
        if ready is None:
            params = CombineParams(
                Results.of(out, lse, None, merge=merge),
                *[x.data_ptr() for x in parts],
                self._tables.parts.data_ptr(),
                self._tables.tile_q,
            )
            ready = Ready.of(params)
            self._known.keep(key, ready)
        self._kernel.launch_ready(-(-lse.numel() // ROWS_OF_BLOCK), stream, ready)


@cache
def _kernel(variant: ForwardVariant, device: torch.device) -> Kernel:
    cubin, threads = CUBINS / f"{variant.name}.cubin", 32 * ROWS_OF_BLOCK
    return Kernel(cubin, variant.combine_entry, index_of(device), threads, 0)
