# SPDX-License-Identifier: Apache-2.0
"""The sum over peers of a group reduce as one GPU kernel, with the bits of one addition per peer after the other."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.comm.packing import Blocks
from magi_attention.comm.routes import Routes
from magi_attention.common.slices import expand_counts
from magi_attention.utils.triton import has_triton

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def can_add_segments(into: Tensor, blocks: Blocks, tensor: int) -> bool:
    """Whether :func:`add_segments` can do it."""
    row = blocks.formats[tensor]
    return into.is_cuda and row.dtype in _DTYPES and into.dtype in _DTYPES and into.is_contiguous() and has_triton()


def add_segments(into: Tensor, buffer: Tensor, blocks: Blocks, tensor: int, routes: Routes) -> None:
    """Add to each row of ``into`` all that came back for it, in float32 and in ascending order of the peers.

    Args:
        into: ``[num_source, ...]``, changed in place and rounded once.
        buffer: what arrived.
        blocks: the buffer's layout.
        tensor: which of its tensors to add.
        routes: of the exchange table.
    """
    from magi_attention.comm.triton_segments import launch_add_segments

    rows, bounds, places = routes.segments
    row = blocks.formats[tensor]
    first_elements = routes.derived(
        ("first elements", blocks.formats, tensor),
        lambda: torch.from_numpy(_first_elements(blocks, tensor)).to(into.device)[places.long()],
    )
    launch_add_segments(into, buffer.view(row.dtype), rows, bounds, first_elements, row.num_elements)


def _first_elements(blocks: Blocks, tensor: int) -> NDArray[np.int64]:
    """``(num_sent,)``: where in the buffer, counted in elements, each row starts."""
    row = blocks.formats[tensor]
    starts = np.array(blocks.first_words[tensor], np.int64) * (8 // row.dtype.itemsize)
    owner, number = expand_counts(np.array(blocks.counts))
    return starts[owner] + number * row.num_elements
