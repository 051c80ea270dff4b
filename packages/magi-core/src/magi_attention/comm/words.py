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
# Of a row that a kernel moves, of two tensors at most: CUDA launches no more than 65535 blocks along that side, of 256
# words each. PyTorch copies longer ones as fast.
MOST_WORDS = 1 << 22

# What PyTorch takes rows of by number, of every size; of some dtypes, as those of 8 bits, it does not.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

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


class BufferRows(NamedTuple):
    """Rows of several tensors in one buffer.

    Attributes:
        buffer: the buffer.
        runs: of each tensor, the fields of :class:`WordRows` but the first.
    """

    buffer: Tensor
    runs: tuple[tuple[int, int, int], ...]

    def of_each(self) -> list[WordRows]:
        """The rows of each tensor."""
        return [WordRows(self.buffer, *run) for run in self.runs]


Sources = Sequence[Tensor] | BufferRows
"""Tensors whose rows are moved from or to, or all tensors of a buffer."""


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


def as_integers(tensor: Tensor) -> Tensor:
    """The same elements as integers of their size, if there are such."""
    dtype = _INTEGERS.get(tensor.itemsize)
    return tensor if dtype is None else tensor.view(dtype)


def move_rows(targets: Sources, sources: Sources, rows: Rows, num_rows: int, *, scatter: bool) -> bool:
    """Copy rows of one or two tensors by one GPU kernel; False, and nothing done, where that can't be.

    Args:
        targets, sources: what to write and to read, of the same formats.
        rows: which rows of the targets with ``scatter``, else of the sources. Those of the other side are the first.
        num_rows: how many.
        scatter: which side ``rows`` names.
    """
    return _move(targets, sources, rows, num_rows, "targets" if scatter else "sources")


def move_same_rows(targets: Sources, sources: Sources, rows: Rows, num_rows: int) -> bool:
    """Like :func:`move_rows`, but to the rows with the same numbers: ``rows``, of which there are ``num_rows``."""
    return _move(targets, sources, rows, num_rows, "both")


def _move(targets: Sources, sources: Sources, rows: Rows, num_rows: int, side: Side) -> bool:
    (target, target2, into), (source, source2, origins) = _side(targets), _side(sources)
    if len(into) > 2 or not target.is_cuda or not has_triton():
        return False
    index, start, index_dtype = (source, rows.start, None) if isinstance(rows, slice) else (rows, 0, rows.dtype)
    key = _move, side, index_dtype, num_rows, into, origins
    addresses = [each.data_ptr() for each in (target, target2, source, source2, index)]
    if relaunch(key, target.get_device(), addresses, (num_rows, start)):
        return True
    written, read = _words_of_all(targets), _words_of_all(sources)
    if written is None or read is None or max(each.words for each in read) > MOST_WORDS:
        return False
    from magi_attention.comm.triton_rows import launch_move_rows

    launch_move_rows(written, read, rows, num_rows, side, key)
    return True


def _side(rows: Sources) -> tuple[Tensor, Tensor, tuple[object, ...]]:
    """The first and the last tensor, and all that words depend on but the addresses."""
    if isinstance(rows, BufferRows):
        return rows.buffer, rows.buffer, rows.runs
    return rows[0], rows[-1], tuple([(x.dtype, x.shape, x.stride()) for x in rows])


def _words_of_all(rows: Sources) -> list[WordRows] | None:
    if isinstance(rows, BufferRows):
        return rows.of_each()
    words = [each for x in rows if (each := words_of(x)) is not None]
    return words if len(words) == len(rows) else None
