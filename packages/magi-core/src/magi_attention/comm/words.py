# SPDX-License-Identifier: Apache-2.0
"""Rows of tensors as 8-byte words, which copy fastest, whatever the dtype."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from magi_attention.comm.routes import Rows
from magi_attention.utils.triton import has_triton, relaunch

WORD_BYTES = 8

Side = Literal["targets", "sources", "both"]
"""Which tensors' rows are given by number, in a copy of rows."""


class WordRows(NamedTuple):
    """Rows of a tensor as runs of words.

    Attributes:
        tensor: whose memory it is; its own shape and dtype do not matter.
        first: where the first row begins, in words from the tensor's first element.
        stride: from one row to the next.
        words: of a row.
    """

    tensor: Tensor
    first: int
    stride: int
    words: int


def words_of(tensor: Tensor) -> WordRows | None:
    """A tensor's rows; None if they are not runs of whole words, or not aligned so."""
    found = _count_words(tensor.dtype, tensor.shape, tensor.stride())
    return None if found is None or tensor.data_ptr() % WORD_BYTES else WordRows(tensor, 0, *found)


@lru_cache(maxsize=4096)
def _count_words(dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, int] | None:
    """From one row to the next, and of a row; None if rows are not runs of whole words."""
    size = shape[1:].numel()
    if not size or size * dtype.itemsize % WORD_BYTES:
        return None
    run = 1
    for length, stride in zip(reversed(shape[1:]), reversed(strides[1:]), strict=True):
        if length != 1 and stride != run:
            return None
        run *= length
    stride_bytes = strides[0] * dtype.itemsize
    if stride_bytes % WORD_BYTES:
        return None
    return stride_bytes // WORD_BYTES, size * dtype.itemsize // WORD_BYTES


def as_words(tensor: Tensor) -> Tensor | None:
    """``[rows, words]``: a tensor as words; None where :func:`words_of` is, or where PyTorch cannot view it so."""
    if tensor.dtype == torch.int64 and tensor.dim() == 2 and tensor.stride(1) == 1:
        return tensor
    rows = words_of(tensor)
    if rows is None or tensor.storage_offset() * tensor.itemsize % WORD_BYTES:
        return None
    return tensor.view(tensor.shape[0], tensor.shape[1:].numel()).view(torch.int64)


def move_rows(
    targets: Sequence[WordRows | Tensor],
    sources: Sequence[WordRows | Tensor],
    rows: Rows,
    num_rows: int,
    *,
    scatter: bool,
) -> bool:
    """Copy rows of one or two tensors by one GPU kernel; False, and nothing done, where that can't be.

    Args:
        targets, sources: what to write and to read, of the same formats.
        rows: which rows of the targets with ``scatter``, else of the sources. Those of the other side are the first.
        num_rows: how many.
        scatter: which side ``rows`` names.
    """
    return _move(targets, sources, rows, num_rows, "targets" if scatter else "sources")


def move_same_rows(
    targets: Sequence[WordRows | Tensor], sources: Sequence[WordRows | Tensor], rows: Rows, num_rows: int
) -> bool:
    """Like :func:`move_rows`, but to the rows with the same numbers: ``rows``, of which there are ``num_rows``."""
    return _move(targets, sources, rows, num_rows, "both")


def _move(
    targets: Sequence[WordRows | Tensor], sources: Sequence[WordRows | Tensor], rows: Rows, num_rows: int, side: Side
) -> bool:
    written, read = [_memory(each) for each in targets], [_memory(each) for each in sources]
    if len(written) > 2 or not written[0].is_cuda or not has_triton():
        return False
    index, start = (read[0], rows.start) if isinstance(rows, slice) else (rows, 0)
    key = _move, side, isinstance(rows, slice), num_rows, *map(_format, targets), *map(_format, sources)
    addresses = [each.data_ptr() for each in (written[0], written[-1], read[0], read[-1], index)]
    if relaunch(key, written[0].get_device(), addresses, (num_rows, start)):
        return True
    into, origins = (
        [each if isinstance(each, WordRows) else words_of(each) for each in of] for of in (targets, sources)
    )
    if any(each is None for each in (*into, *origins)):
        return False
    from magi_attention.comm.triton_rows import launch_move_rows

    launch_move_rows(into, origins, rows, num_rows, side, key)  # type: ignore[arg-type]
    return True


def _memory(rows: WordRows | Tensor) -> Tensor:
    return rows.tensor if isinstance(rows, WordRows) else rows


def _format(rows: WordRows | Tensor) -> tuple[object, ...]:
    """All that words depend on but the address."""
    return rows[1:] if isinstance(rows, WordRows) else (rows.dtype, rows.shape, rows.stride())
