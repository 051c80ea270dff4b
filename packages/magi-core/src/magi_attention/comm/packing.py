# SPDX-License-Identifier: Apache-2.0
"""Rows of several tensors in one flat buffer of 8-byte words, so that one exchange serves every dtype.

The buffer holds a part for each peer, and each part a block of rows for each tensor. So rows of one tensor that come
from one peer are contiguous as they arrive.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.comm.routes import Rows

_WORD_BYTES = 8
# Kernels read blocks where they arrive, and want them aligned to 128 bytes.
_BLOCK_WORDS = 16


class RowFormat(NamedTuple):
    """A tensor's dtype and the shape of one of its rows."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def num_elements(self) -> int:
        """Elements of one row."""
        return self.shape.numel()

    def num_words(self, num_rows: int) -> int:
        """Words that so many rows fill; the end is padded to a whole word."""
        return -(-num_rows * self.num_elements * self.dtype.itemsize // _WORD_BYTES)


def row_formats(tensors: Sequence[Tensor]) -> tuple[RowFormat, ...]:
    """The formats of the tensors' rows."""
    return tuple(RowFormat(tensor.dtype, tensor.shape[1:]) for tensor in tensors)


class Blocks(NamedTuple):
    """Where rows lie in a buffer.

    Attributes:
        formats: of each tensor.
        counts: rows of each peer.
        words_per_peer: words of each peer's part.
        first_words: for each tensor the word at which its block of each peer starts.
    """

    formats: tuple[RowFormat, ...]
    counts: tuple[int, ...]
    words_per_peer: tuple[int, ...]
    first_words: tuple[tuple[int, ...], ...]

    @property
    def num_words(self) -> int:
        """Words of the buffer."""
        return sum(self.words_per_peer)

    def block(self, buffer: Tensor, tensor: int, peer: int) -> Tensor:
        """``[rows, *shape]``: one tensor's rows of one peer, contiguous, without a copy."""
        row, count, first = self.formats[tensor], self.counts[peer], self.first_words[tensor][peer]
        words = buffer[first : first + row.num_words(count)]
        return words.view(row.dtype)[: count * row.num_elements].view(count, *row.shape)

    def blocks(self, buffer: Tensor, tensor: int, rows: Sequence[Rows]) -> list[tuple[Rows, Tensor]]:
        """For each peer that has any, the ``rows`` that belong to the peer and one tensor's block of them."""
        return [(rows[peer], self.block(buffer, tensor, peer)) for peer, count in enumerate(self.counts) if count]


@lru_cache(maxsize=4096)
def lay_out(formats: tuple[RowFormat, ...], counts: tuple[int, ...]) -> Blocks:
    """Lay out a buffer of ``counts`` rows of each peer."""
    first_words: list[list[int]] = [[] for _ in formats]
    words_per_peer = []
    start = 0
    for count in counts:
        end = start
        for number, (row, firsts) in enumerate(zip(formats, first_words, strict=True)):
            if number:
                end += (start - end) % _BLOCK_WORDS
            firsts.append(end)
            end += row.num_words(count)
        words_per_peer.append(end - start)
        start = end
    return Blocks(formats, counts, tuple(words_per_peer), tuple(map(tuple, first_words)))


def pack(tensors: Sequence[Tensor], rows: Sequence[Rows], run: slice | None, blocks: Blocks) -> Tensor:
    """Gather the rows of each peer in a new buffer.

    Args:
        tensors: where the rows are taken from.
        rows: those of each peer.
        run: those of all peers together, if they are one run; such rows of a single tensor are not copied.
        blocks: the buffer's layout.
    """
    tensors = [tensor.contiguous() for tensor in tensors]
    if len(tensors) == 1 and run is not None and (words := _as_words(tensors[0])) is not None:
        return words[run].view(-1)
    buffer = tensors[0].new_empty(blocks.num_words, dtype=torch.int64)
    for number, tensor in enumerate(tensors):
        for taken, block in blocks.blocks(buffer, number, rows):
            _copy_rows(tensor, block, taken)
    return buffer


def deliver(buffer: Tensor, rows: Sequence[Rows], blocks: Blocks, targets: Sequence[Tensor]) -> None:
    """Write the rows that came from each peer to where they belong.

    Args:
        buffer: what arrived.
        rows: the targets' rows that come from each peer.
        blocks: the buffer's layout.
        targets: contiguous, one per tensor.
    """
    for number, target in enumerate(targets):
        for written, block in blocks.blocks(buffer, number, rows):
            words, target_words = _as_words(block), _as_words(target)
            if words is not None and target_words is not None:
                block, target = words, target_words
            if isinstance(written, slice):
                target[written].copy_(block)
            else:
                target.index_copy_(0, written, block)


def _copy_rows(source: Tensor, block: Tensor, rows: Rows) -> None:
    words, block_words = _as_words(source), _as_words(block)
    if words is not None and block_words is not None:
        source, block = words, block_words
    if isinstance(rows, slice):
        block.copy_(source[rows])
    else:
        torch.index_select(source, 0, rows, out=block)


def _as_words(tensor: Tensor) -> Tensor | None:
    """``[rows, words]``: a contiguous tensor as words, which copy fastest; None if its rows are not whole words."""
    flat = tensor.view(len(tensor), tensor.shape[1:].numel())
    is_aligned = tensor.data_ptr() % _WORD_BYTES == 0 and tensor.storage_offset() * tensor.itemsize % _WORD_BYTES == 0
    is_whole = flat.shape[1] * tensor.itemsize % _WORD_BYTES == 0
    return flat.view(torch.int64) if is_whole and is_aligned else None
