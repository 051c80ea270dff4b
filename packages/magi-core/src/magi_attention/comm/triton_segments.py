# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of :mod:`magi_attention.comm.segments`; imported only where it is launched."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from magi_attention.utils.triton import launch, next_power_of_2

_MOST_COLUMNS = 1024


@triton.jit
def _add_row(into, terms, row, first, last, places, row_stride, columns, block, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    target = into + row * columns + column
    total = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    for number in range(first, last):
        term = terms + tl.load(places + number).to(tl.int64) * row_stride + column
        total += tl.load(term, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, total.to(into.dtype.element_ty), mask=inside)


@triton.jit
def _add_segments(  # type: ignore[no-untyped-def]
    into,
    into2,
    terms,
    terms2,
    rows,
    bounds,
    places,
    row_stride,
    row_stride2,
    columns,
    columns2,
    BLOCK: tl.constexpr,
):
    segment, block = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + segment).to(tl.int64)
    first, last = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    blocks = tl.cdiv(columns, BLOCK)
    if block < blocks:
        _add_row(into, terms, row, first, last, places, row_stride, columns, block, BLOCK)
    else:
        _add_row(into2, terms2, row, first, last, places, row_stride2, columns2, block - blocks, BLOCK)


def launch_add_segments(
    into: Sequence[Tensor], terms: Sequence[Tensor], segments: tuple[Tensor, Tensor, Tensor], key: object = None
) -> None:
    """Add to rows of one or two tensors.

    Args:
        into: the tensors, contiguous.
        terms: what to add to each: rows that lie a stride apart, each contiguous.
        segments: ``rows``, ``bounds`` and ``places``: to row ``rows[s]`` are added the terms
            ``places[bounds[s]:bounds[s + 1]]``, one after another.
        key: by which the launch is found again; None if it need not be.
    """
    rows, bounds, places = segments
    columns = [target[:1].numel() for target in into]
    if not len(rows) or not any(columns):
        return
    block = min(next_power_of_2(max(columns)), _MOST_COLUMNS)
    grid = (len(rows), sum(-(-each // block) for each in columns), 1)
    tensors = (into[0], into[-1], terms[0], terms[-1], rows, bounds, places)
    fixed = (terms[0].stride(0), terms[-1].stride(0), columns[0], columns[-1])
    launch(_add_segments, grid, tensors, (), fixed, {"BLOCK": block}, key, num_warps=4)
