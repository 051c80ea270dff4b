# SPDX-License-Identifier: Apache-2.0
"""Rows of several tensors side by side in one buffer of 8-byte words, so that one exchange serves every dtype.

A row of the buffer holds one row of each tensor. So a peer's rows are one run whatever travels, and each tensor's rows
are a view of the buffer as it arrives, whoever sent them.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.comm.routes import Rows

_WORD_BYTES = 8
# Kernels read columns where they arrive, and want rows of them aligned so.
_COLUMN_WORDS = 2


class RowFormat(NamedTuple):
    """A tensor's dtype and the shape of one of its rows."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def num_elements(self) -> int:
        """Elements of one row."""
        return self.shape.numel()

    @property
    def num_words(self) -> int:
        """Words that a row fills; the end is padded to a whole word."""
        return -(-self.num_elements * self.dtype.itemsize // _WORD_BYTES)


def row_formats(tensors: Sequence[Tensor]) -> tuple[RowFormat, ...]:
    """The formats of the tensors' rows."""
    return tuple(RowFormat(tensor.dtype, tensor.shape[1:]) for tensor in tensors)


class _Column(NamedTuple):
    """One tensor's part of the rows of a buffer: a view of as many rows has this shape and strides, in elements."""

    first_word: int
    num_words: int
    dtype: torch.dtype
    shape: torch.Size
    first_element: int
    strides: tuple[int, ...]


class RowLayout(NamedTuple):
    """How tensors share the rows of a buffer.

    Attributes:
        columns: of each tensor.
        num_words: words of a row.
    """

    columns: tuple[_Column, ...]
    num_words: int

    def column(self, buffer: Tensor, number: int) -> Tensor:
        """``[rows, *shape]``: one tensor's part of a buffer ``[rows, num_words]``, without a copy."""
        column = self.columns[number]
        elements = buffer.view(column.dtype)
        offset = elements.storage_offset() + column.first_element
        return elements.as_strided((buffer.shape[0], *column.shape), column.strides, offset)

    def words(self, buffer: Tensor, number: int) -> Tensor:
        """``[rows, words]``: the same as words."""
        column = self.columns[number]
        return buffer.narrow(1, column.first_word, column.num_words)


@lru_cache(maxsize=4096)
def lay_out(formats: tuple[RowFormat, ...]) -> RowLayout:
    """Lay out the rows of a buffer."""
    first_words, end = [], 0
    for row in formats:
        end += -end % _COLUMN_WORDS
        first_words.append(end)
        end += row.num_words
    if len(formats) > 1:
        end += -end % _COLUMN_WORDS
    columns = []
    for (dtype, shape), first, row in zip(formats, first_words, formats, strict=True):
        strides = [end * _WORD_BYTES // dtype.itemsize]
        strides += [shape[number + 1 :].numel() for number in range(len(shape))]
        columns.append(
            _Column(first, row.num_words, dtype, shape, first * _WORD_BYTES // dtype.itemsize, tuple(strides))
        )
    return RowLayout(tuple(columns), end)


def pack(tensors: Sequence[Tensor], rows: Rows, num_rows: int, layout: RowLayout) -> Tensor:
    """Gather rows in a new buffer ``[num_rows, num_words]``; one run of rows of a single tensor is not copied."""
    if len(tensors) == 1 and isinstance(rows, slice):
        words = _as_words(tensors[0])
        if words is not None and words.is_contiguous():
            return words[rows]
    buffer = tensors[0].new_empty((num_rows, layout.num_words), dtype=torch.int64)
    for number, tensor in enumerate(tensors):
        words = _as_words(tensor)
        source = tensor if words is None else words
        target = layout.column(buffer, number) if words is None else layout.words(buffer, number)
        if isinstance(rows, slice):
            target.copy_(source[rows])
        else:
            torch.index_select(source, 0, rows, out=target)
    return buffer


def deliver(buffer: Tensor, rows: Rows, layout: RowLayout, targets: Sequence[Tensor]) -> None:
    """Write a buffer's rows to the rows of the targets that they belong to.

    Args:
        buffer: what arrived.
        rows: the targets' rows.
        layout: of the buffer.
        targets: contiguous, one per tensor.
    """
    for number, target in enumerate(targets):
        put_rows(target, rows, layout.column(buffer, number))


def put_rows(target: Tensor, places: Rows, rows: Tensor) -> None:
    """Write rows to their places in a tensor of the same dtype."""
    target_words, words = _as_words(target), _as_words(rows)
    if target_words is not None and words is not None:
        target, rows = target_words, words
    if isinstance(places, slice):
        target[places].copy_(rows)
    else:
        target.index_copy_(0, places, rows)


def _as_words(tensor: Tensor) -> Tensor | None:
    """``[rows, words]``: a tensor as words, which copy fastest; None if its rows are not runs of whole words."""
    shape, itemsize = tensor.shape, tensor.itemsize
    if tensor.dtype == torch.int64 and len(shape) == 2 and tensor.stride(1) == 1:
        return tensor
    size = shape[1:].numel()
    if not size or size * itemsize % _WORD_BYTES or tensor.storage_offset() * itemsize % _WORD_BYTES:
        return None
    if not tensor.is_contiguous():
        strides = tensor.stride()
        run = 1
        for length, stride in zip(reversed(shape[1:]), reversed(strides[1:]), strict=True):
            if length != 1 and stride != run:
                return None
            run *= length
        if strides[0] * itemsize % _WORD_BYTES:
            return None
    if tensor.data_ptr() % _WORD_BYTES:
        return None
    return tensor.view(shape[0], size).view(torch.int64)
