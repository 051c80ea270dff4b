# SPDX-License-Identifier: Apache-2.0
"""Rows of several tensors side by side in one buffer of 8-byte words, so that one exchange serves every dtype."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from magi_attention.comm.routes import Rows

_WORD_BYTES = 8


@dataclass(frozen=True)
class RowFormat:
    """How one tensor's rows lie in the buffer.

    Attributes:
        dtype: the tensor's dtype.
        shape: the shape of one row.
        first_word: the buffer's column at which the row starts.
        num_words: columns of the row; its end is padded to whole words.
    """

    dtype: torch.dtype
    shape: torch.Size
    first_word: int
    num_words: int

    @property
    def num_elements(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape)

    @property
    def is_whole_words(self) -> bool:
        """Whether the row fills its words, and so can be copied as words, whatever its dtype."""
        return self.num_elements * self.dtype.itemsize == self.num_words * _WORD_BYTES

    def columns(self, buffer: Tensor) -> Tensor:
        """``[rows, num_words]``: the tensor's part of the buffer."""
        return buffer[:, self.first_word : self.first_word + self.num_words]

    def elements(self, buffer: Tensor) -> Tensor:
        """``[rows, *shape]``: the tensor's part of the buffer in its own dtype, without a copy."""
        return self.flat_elements(buffer).view(len(buffer), *self.shape)

    def flat_elements(self, buffer: Tensor) -> Tensor:
        """``[rows, num_elements]``: the same with flat rows."""
        return self.columns(buffer).view(self.dtype)[:, : self.num_elements]


def row_formats(tensors: Sequence[Tensor]) -> list[RowFormat]:
    """Lay the tensors' rows side by side."""
    words = [-(-tensor.shape[1:].numel() * tensor.dtype.itemsize // _WORD_BYTES) for tensor in tensors]
    firsts = [0, *accumulate(words)]
    return [RowFormat(t.dtype, t.shape[1:], first, n) for t, first, n in zip(tensors, firsts, words, strict=False)]


def pack(tensors: Sequence[Tensor], rows: Rows, num_rows: int) -> Tensor:
    """Copy rows of the tensors to a new ``[num_rows, words]`` int64 buffer.

    A contiguous run of a single tensor's rows is not copied: the buffer is then a view.
    """
    tensors = [tensor.contiguous() for tensor in tensors]
    formats = row_formats(tensors)
    if len(tensors) == 1 and isinstance(rows, slice) and _can_view_words(tensors[0], formats[0]):
        return _flat(tensors[0]).view(torch.int64)[rows]
    num_words = formats[-1].first_word + formats[-1].num_words
    buffer = tensors[0].new_empty((num_rows, num_words), dtype=torch.int64)
    for tensor, row in zip(tensors, formats, strict=True):
        if _can_view_words(tensor, row):
            _take(_flat(tensor).view(torch.int64), rows, row.columns(buffer))
        else:
            _take(_flat(tensor), rows, row.flat_elements(buffer))
    return buffer


def unpack(buffer: Tensor, row: RowFormat, rows: Rows) -> Tensor:
    """Return rows of one tensor of the buffer, contiguous; the whole of a buffer that holds nothing else as a view."""
    part = row.columns(buffer) if row.is_whole_words else row.flat_elements(buffer)
    taken = part[rows].contiguous() if isinstance(rows, slice) else part.index_select(0, rows)
    return taken.view(row.dtype).view(len(taken), *row.shape)


def _can_view_words(tensor: Tensor, row: RowFormat) -> bool:
    aligned = tensor.data_ptr() % _WORD_BYTES == 0 and tensor.storage_offset() * tensor.itemsize % _WORD_BYTES == 0
    return row.is_whole_words and aligned


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(len(tensor), tensor.shape[1:].numel())


def _take(source: Tensor, rows: Rows, target: Tensor) -> None:
    if isinstance(rows, slice):
        target.copy_(source[rows])
    else:
        torch.index_select(source, 0, rows, out=target)
