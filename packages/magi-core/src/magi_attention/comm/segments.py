# SPDX-License-Identifier: Apache-2.0
"""The sums over peers of a group reduce as one GPU kernel, with the bits of one addition per peer after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from magi_attention.comm.packing import RowLayout
from magi_attention.comm.routes import Routes
from magi_attention.utils.triton import has_triton

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def can_add_segments(into: Sequence[Tensor], layout: RowLayout) -> bool:
    """Whether :func:`add_segments` can do it."""
    if not into[0].is_cuda:
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
    from magi_attention.comm.triton_segments import launch_add_segments

    terms = layout.all_columns(buffer)
    for number in range(0, len(into), 2):
        launch_add_segments(into[number : number + 2], terms[number : number + 2], routes.segments)
