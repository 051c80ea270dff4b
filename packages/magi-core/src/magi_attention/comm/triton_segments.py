# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of :mod:`magi_attention.comm.segments`; imported only where it is launched."""

import triton
import triton.language as tl
from torch import Tensor

_MOST_COLUMNS = 1024


@triton.jit
def _add_segments(into, terms, rows, bounds, first_elements, num_columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    segment = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_columns
    target = into + tl.load(rows + segment).to(tl.int64) * num_columns + column
    total = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    for number in range(tl.load(bounds + segment), tl.load(bounds + segment + 1)):
        first = tl.load(first_elements + number)
        total += tl.load(terms + first + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, total.to(into.dtype.element_ty), mask=inside)


def launch_add_segments(
    into: Tensor, terms: Tensor, rows: Tensor, bounds: Tensor, first_elements: Tensor, num_columns: int
) -> None:
    """Add ``terms[first_elements[n]:][:num_columns]`` for all n of segment s to row ``rows[s]`` of ``into``."""
    if not len(rows) or not num_columns:
        return
    block = min(triton.next_power_of_2(num_columns), _MOST_COLUMNS)
    grid = (len(rows), triton.cdiv(num_columns, block))
    _add_segments[grid](into, terms, rows, bounds, first_elements, num_columns, BLOCK=block, num_warps=4)
