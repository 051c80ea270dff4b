# SPDX-License-Identifier: Apache-2.0
"""Rows of several tensors in one buffer of 8-byte words, so that one exchange serves every dtype.

They lie side by side: a row of the buffer holds one row of each tensor. So a peer's rows are one run whatever travels,
and each tensor's rows are a view of the buffer as it arrives, whoever sent them. Or all rows of a tensor lie together:
then a peer gets as many runs as there are tensors, but rows that are a run of their tensor need not be copied first.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.comm.routes import Routes, Rows
from magi_attention.comm.words import WORD_BYTES, BufferRows, as_integers, as_words, move_rows, move_same_rows

# Of a row. Pieces of shorter ones are small beside what another message costs.
LEAST_APART_BYTES = 256

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
    def num_bytes(self) -> int:
        """Bytes of one row."""
        return self.num_elements * self.dtype.itemsize

    @property
    def num_words(self) -> int:
        """Words that a row fills; the end is padded to a whole word."""
        return -(-self.num_bytes // WORD_BYTES)


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
    """How tensors share the rows of a buffer, or the buffer.

    Attributes:
        columns: of each tensor.
        num_words: words of a row.
        runs: of each tensor, as of :class:`~magi_attention.comm.words.BufferRows`.
        is_apart: whether all rows of a tensor lie together.
    """

    columns: tuple[_Column, ...]
    num_words: int
    runs: tuple[tuple[int, int, int], ...]
    is_apart: bool = False

    def column(self, buffer: Tensor, number: int) -> Tensor:
        """``[rows, *shape]``: one tensor's part of a buffer ``[rows, num_words]``, without a copy."""
        return self.all_columns(buffer)[number]

    def all_columns(self, buffer: Tensor) -> list[Tensor]:
        """:meth:`column` of every tensor."""
        if not self.num_words:  # nor any bytes, of which PyTorch could make views of every dtype
            return [buffer.new_empty((len(buffer), *column.shape), dtype=column.dtype) for column in self.columns]
        found, dtype, elements = [], buffer.dtype, buffer
        for column in self.columns:
            if column.dtype != dtype:
                dtype, elements = column.dtype, buffer.view(column.dtype)
            offset = elements.storage_offset() + column.first_element
            found.append(elements.as_strided((buffer.shape[0], *column.shape), column.strides, offset))
        return found

    def words(self, buffer: Tensor, number: int) -> Tensor:
        """``[rows, words]``: the same as words, of a tensor that lies beside others."""
        column = self.columns[number]
        return buffer.narrow(1, column.first_word, column.num_words)

    def pieces(self, buffer: Tensor, counts: Sequence[int]) -> list[list[Tensor]]:
        """Of a buffer whose tensors lie apart, the rows of each tensor, cut to pieces of so many."""
        words, sizes = buffer.view(-1), [column.num_words for column in self.columns]
        of_each = words.split([len(buffer) * size for size in sizes])
        return [[*each.view(-1, size).split(counts)] for each, size in zip(of_each, sizes, strict=True)]

    def word_rows(self, buffer: Tensor) -> BufferRows:
        """The same of all tensors, without views."""
        return BufferRows(buffer, self.runs)


class Pieces(NamedTuple):
    """What goes to and comes from each peer, as words ``[rows, words]``: of each tensor a list, by peer."""

    sent: list[list[Tensor]]
    landed: list[list[Tensor]]


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
    columns = tuple(_column(row, first, end) for row, first in zip(formats, first_words, strict=True))
    return RowLayout(columns, end, tuple((each.first_word, end, each.num_words) for each in columns))


def can_lie_apart(formats: tuple[RowFormat, ...]) -> bool:
    """Whether rows of these tensors may lie apart, and should: they are several, and long enough to copy."""
    return len(formats) > 1 and all(
        row.num_bytes >= LEAST_APART_BYTES and row.num_bytes % (_COLUMN_WORDS * WORD_BYTES) == 0 for row in formats
    )


@lru_cache(maxsize=4096)
def lay_out_apart(formats: tuple[RowFormat, ...], num_rows: int) -> RowLayout:
    """Lay out ``num_rows`` rows of each tensor that lie together, one tensor behind the other."""
    *firsts, end = accumulate((row.num_words for row in formats), initial=0)
    columns = tuple(_column(row, num_rows * first, row.num_words) for row, first in zip(formats, firsts, strict=True))
    runs = tuple((each.first_word, each.num_words, each.num_words) for each in columns)
    return RowLayout(columns, end, runs, is_apart=True)


def _column(row: RowFormat, first_word: int, stride: int) -> _Column:
    """Of rows that begin so many words after one another."""
    dtype, shape = row
    # Bytes come first: a number of complex128 is two words.
    first_element, first_stride = first_word * WORD_BYTES // dtype.itemsize, stride * WORD_BYTES // dtype.itemsize
    strides = (first_stride, *[shape[number + 1 :].numel() for number in range(len(shape))])
    return _Column(first_word, row.num_words, dtype, shape, first_element, strides)


def runs_for_peers(tensors: Sequence[Tensor], routes: Routes) -> list[list[Tensor]] | None:
    """The words of the rows that came from each peer, of each tensor, as they lie; None where some are no run."""
    words = [each for tensor in tensors if (each := as_words(tensor)) is not None and each.is_contiguous()]
    if len(words) < len(tensors) or not routes.receives_runs:
        return None
    return [[each[rows] for rows in routes.received_of] for each in words]


def packed_for_peers(tensors: Sequence[Tensor], routes: Routes) -> list[list[Tensor]]:
    """Copies of the words of the rows that came from each peer, of each tensor."""
    layout = lay_out_apart(row_formats(tensors), routes.num_arriving)
    buffer = tensors[0].new_empty((routes.num_arriving, layout.num_words), dtype=torch.int64)
    if not move_rows(layout.word_rows(buffer), tensors, routes.received, routes.num_arriving, scatter=False):
        for target, tensor in zip(layout.all_columns(buffer), tensors, strict=True):
            target.copy_(tensor[routes.received])
    return layout.pieces(buffer, routes.recv_counts)


def pack(tensors: Sequence[Tensor], rows: Rows, num_rows: int, layout: RowLayout) -> Tensor:
    """Gather rows in a new buffer ``[num_rows, num_words]``; one run of rows of a single tensor is not copied."""
    if len(tensors) == 1 and isinstance(rows, slice):
        words = as_words(tensors[0])
        if words is not None and words.is_contiguous():
            return words[rows]
    buffer = tensors[0].new_empty((num_rows, layout.num_words), dtype=torch.int64)
    if move_rows(layout.word_rows(buffer), tensors, rows, num_rows, scatter=False):
        return buffer
    for number, tensor in enumerate(tensors):
        words = as_words(tensor)
        if words is None:
            source, target = as_integers(tensor), as_integers(layout.column(buffer, number))
        else:
            source, target = words, layout.words(buffer, number)
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
    if not move_rows(targets, layout.word_rows(buffer), rows, buffer.shape[0], scatter=True):
        for number, target in enumerate(targets):
            put_rows(target, rows, layout.column(buffer, number))


def put_all_rows(targets: Sequence[Tensor], places: Rows, tensors: Sequence[Tensor]) -> None:
    """Write all rows of tensors to their places in tensors of the same dtypes."""
    if not move_rows(targets, tensors, places, tensors[0].shape[0], scatter=True):
        for target, tensor in zip(targets, tensors, strict=True):
            put_rows(target, places, tensor)


def copy_rows(targets: Sequence[Tensor], sources: Sequence[Tensor], rows: Rows, num_rows: int) -> None:
    """Copy some rows of tensors, ``num_rows``, to those with the same numbers of tensors of the same formats."""
    if not move_same_rows(targets, sources, rows, num_rows):
        for target, source in zip(targets, sources, strict=True):
            put_rows(target, rows, source[rows])


def take_all_rows(targets: Sequence[Tensor], places: Rows, tensors: Sequence[Tensor]) -> None:
    """Write rows of tensors to all rows of others, which may have other dtypes."""
    is_same = all(target.dtype == tensor.dtype for target, tensor in zip(targets, tensors, strict=True))
    if not (is_same and move_rows(targets, tensors, places, targets[0].shape[0], scatter=False)):
        for target, tensor in zip(targets, tensors, strict=True):
            target.copy_(tensor[places])


def put_rows(target: Tensor, places: Rows, rows: Tensor) -> None:
    """Write rows to their places in a tensor of the same dtype."""
    target_words, words = as_words(target), as_words(rows)
    if target_words is not None and words is not None:
        target, rows = target_words, words
    else:
        target, rows = as_integers(target), as_integers(rows)
    if isinstance(places, slice):
        target[places].copy_(rows)
    else:
        target.index_copy_(0, places, rows)
