# SPDX-License-Identifier: Apache-2.0
"""Rows of tensors as 8-byte words, which copy fastest, whatever the dtype."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.comm.routes import Rows
from magi_attention.utils.triton import has_triton

WORD_BYTES = 8


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
    shape, strides, itemsize = tensor.shape, tensor.stride(), tensor.itemsize
    size = shape[1:].numel()
    if not size or size * itemsize % WORD_BYTES or tensor.data_ptr() % WORD_BYTES:
        return None
    run = 1
    for length, stride in zip(reversed(shape[1:]), reversed(strides[1:]), strict=True):
        if length != 1 and stride != run:
            return None
        run *= length
    stride_bytes = strides[0] * itemsize
    if stride_bytes % WORD_BYTES:
        return None
    return WordRows(tensor, 0, stride_bytes // WORD_BYTES, size * itemsize // WORD_BYTES)


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
    if len(targets) > 2 or not _is_on_gpu(targets[0]) or not has_triton():
        return False
    into = [each if isinstance(each, WordRows) else words_of(each) for each in targets]
    origins = [each if isinstance(each, WordRows) else words_of(each) for each in sources]
    if None in into or None in origins:
        return False
    from magi_attention.comm.triton_rows import launch_move_rows

    launch_move_rows(into, origins, rows, num_rows, scatter=scatter)  # type: ignore[arg-type]
    return True


def _is_on_gpu(rows: WordRows | Tensor) -> bool:
    return (rows.tensor if isinstance(rows, WordRows) else rows).is_cuda
