# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that moves rows of one or two tensors; imported only where it is launched."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from magi_attention.comm.words import Side, WordRows
from magi_attention.utils.triton import launch, next_power_of_2

_ROWS, _MOST_WORDS = 4, 256


@triton.jit
def _move(  # type: ignore[no-untyped-def]
    target, source, to, origin, first, source_first, stride, source_stride, words, block, inside, BLOCK: tl.constexpr
):
    column = block * BLOCK + tl.arange(0, BLOCK)
    used = inside[:, None] & (column < words)[None, :]
    read = source.to(tl.pointer_type(tl.int64), bitcast=True) + source_first
    write = target.to(tl.pointer_type(tl.int64), bitcast=True) + first
    moved = tl.load(read + (origin * source_stride)[:, None] + column[None, :], mask=used)
    tl.store(write + (to * stride)[:, None] + column[None, :], moved, mask=used)


# Masks differ in these two numbers: nothing is compiled for some of their values.
@triton.jit(do_not_specialize=("num_rows", "start"))
def _move_rows(  # type: ignore[no-untyped-def]
    target,
    target2,
    source,
    source2,
    index,
    num_rows,
    start,
    first,
    first2,
    source_first,
    source_first2,
    stride,
    stride2,
    source_stride,
    source_stride2,
    words,
    words2,
    HAS_INDEX: tl.constexpr,
    OF_TARGETS: tl.constexpr,
    OF_SOURCES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program moves a block of words of some rows, of the first tensor or of the second."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    inside = row < num_rows
    named = tl.load(index + row, mask=inside, other=0).to(tl.int64) if HAS_INDEX else (start + row).to(tl.int64)
    row = row.to(tl.int64)
    to = named if OF_TARGETS else row
    origin = named if OF_SOURCES else row
    blocks = tl.cdiv(words, BLOCK)
    if block < blocks:
        _move(target, source, to, origin, first, source_first, stride, source_stride, words, block, inside, BLOCK)
    else:
        block -= blocks
        _move(
            target2, source2, to, origin, first2, source_first2, stride2, source_stride2, words2, block, inside, BLOCK
        )


def launch_move_rows(
    targets: Sequence[WordRows],
    sources: Sequence[WordRows],
    rows: slice | Tensor,
    num_rows: int,
    side: Side,
    key: object = None,
) -> None:
    """Copy rows of one or two tensors, the same ones of both.

    Args:
        targets, sources: what to write and to read, as many words a row.
        rows: a run of rows or int64 row numbers.
        num_rows: how many.
        side: whose ``rows`` these are; those of the other side are the first ``num_rows``.
        key: by which the launch is found again; None if it need not be.
    """
    most = max(each.words for each in sources)
    if not num_rows or not most:
        return
    block = min(next_power_of_2(most), _MOST_WORDS)
    second = sources[1].words if len(sources) > 1 else 0
    grid = (-(-num_rows // _ROWS), -(-sources[0].words // block) - (-second // block), 1)
    index, start = (sources[0].tensor, rows.start) if isinstance(rows, slice) else (rows, 0)
    a, a2, b, b2 = targets[0], targets[-1], sources[0], sources[-1]
    tensors = (a.tensor, a2.tensor, b.tensor, b2.tensor, index)
    fixed = (a.first, a2.first, b.first, b2.first, a.stride, a2.stride, b.stride, b2.stride, b.words, second)
    constants = {
        "HAS_INDEX": not isinstance(rows, slice),
        "OF_TARGETS": side != "sources",
        "OF_SOURCES": side != "targets",
        "ROWS": _ROWS,
        "BLOCK": block,
    }
    launch(_move_rows, grid, tensors, (num_rows, start), fixed, constants, key)
