# SPDX-License-Identifier: Apache-2.0
"""The sums over peers of a group reduce as one GPU kernel, with the bits of one addition per peer after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from magi_attention.comm.packing import RowLayout
from magi_attention.comm.routes import Routes
from magi_attention.comm.words import WORD_BYTES
from magi_attention.utils.triton import has_triton, relaunch

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Of a row of each of two tensors: CUDA launches no more than 65535 blocks along that side, of 1024 columns each.
_MOST_COLUMNS = 1 << 24


def can_add_segments(into: Sequence[Tensor], layout: RowLayout) -> bool:
    """Whether :func:`add_segments` can do it."""
    if not into[0].is_cuda or max(target.shape[1:].numel() for target in into) > _MOST_COLUMNS:
        return False
    for target, column in zip(into, layout.columns, strict=True):
        if not (target.dtype in _DTYPES and column.dtype in _DTYPES and target.is_contiguous()):
            return False
    return has_triton()


def add_segments(into: Sequence[Tensor], buffer: Tensor, layout: RowLayout, routes: Routes) -> None:
    """Add to each row of ``into`` all that came back for it, in float32 and in ascending order of the peers.

    Args:
        into: one ``[num_source, ...]`` for each tensor of the buffer, changed in place and rounded once.
        buffer: what arrived.
        layout: of the buffer.
        routes: of the exchange table.
    """
    (rows, bounds, places), device, start = routes.segments, buffer.get_device(), buffer.data_ptr()
    for number in range(0, len(into), 2):
        targets, columns = into[number : number + 2], layout.columns[number : number + 2]
        key = add_segments, rows.shape[0], buffer.stride(0), *[(x.dtype, x.shape) for x in targets], *columns
        first, last = (start + WORD_BYTES * column.first_word for column in (columns[0], columns[-1]))
        tables = rows.data_ptr(), bounds.data_ptr(), places.data_ptr()
        if not relaunch(key, device, (targets[0].data_ptr(), targets[-1].data_ptr(), first, last, *tables), ()):
            from magi_attention.comm.triton_segments import launch_add_segments

            terms = layout.all_columns(buffer)[number : number + 2]
            launch_add_segments(targets, terms, routes.segments, key)
