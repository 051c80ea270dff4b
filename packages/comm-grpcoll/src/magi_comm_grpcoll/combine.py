# SPDX-License-Identifier: Apache-2.0
"""Combining what a group reduce brought into the slots, by one kernel per tensor, in ascending order of the ranks."""

import torch
from torch import Tensor

from magi_attention.comm.packing import RowFormat
from magi_comm_grpcoll import kernels

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_THREADS = 256


class Segments:
    """Which rows of the slots belong to which row: see :attr:`magi_attention.comm.routes.Routes.segments`.

    Args:
        rows, offsets, places: as described there.

    Attributes:
        launches: made ready before, by what they are for.
    """

    def __init__(self, rows: Tensor, offsets: Tensor, places: Tensor) -> None:
        self.rows, self.offsets, self.places = rows, offsets, places
        self.launches: dict[object, kernels.Launch] = {}


def can_combine(partial: torch.dtype, into: torch.dtype) -> bool:
    """Whether there is a kernel for partial results and results of these dtypes."""
    known = partial in _NAMES and into in _NAMES
    return known and (partial == into or torch.float32 in (partial, into))


def add_slots(stream: "torch.cuda.Stream", into: Tensor, slots: Tensor, segments: Segments, average: bool) -> None:
    """Add the slots' rows to the rows of ``into`` that they belong to.

    Args:
        stream: where it is launched.
        into: ``[num_source, ...]``, contiguous, changed in place and rounded once.
        slots: ``[num_sent, ...]``.
        segments: which rows of the slots belong to which of ``into``.
        average: divide by the number of terms, the old value of ``into`` counting as one.
    """
    _launch(stream, "add", into, slots, segments, into.shape[1:].numel(), [into, slots], [int(average)])


def merge_slots(
    stream: "torch.cuda.Stream",
    into: Tensor,
    into_lse: Tensor,
    old_lse: Tensor,
    slots: Tensor,
    slots_lse: Tensor,
    segments: Segments,
) -> None:
    """Merge the slots' partial outputs by log-sum-exp.

    Args:
        stream: where it is launched.
        into: ``[num_source, heads, dim]``, contiguous, changed in place.
        into_lse: ``[num_source, heads]`` float32, changed in place.
        old_lse: a copy of ``into_lse``.
        slots: ``[num_sent, heads, dim]``.
        slots_lse: ``[num_sent, heads]`` float32.
        segments: which rows of the slots belong to which of ``into``.
    """
    heads, dim = into.shape[1:]
    tensors = [into, into_lse, old_lse, slots, slots_lse]
    _launch(stream, "merge", into, slots, segments, dim, tensors, [dim], of_row=heads)


def _launch(
    stream: "torch.cuda.Stream",
    what: str,
    into: Tensor,
    slots: Tensor,
    segments: Segments,
    run: int,
    tensors: list[Tensor],
    last: list[int],
    of_row: int | None = None,
) -> None:
    """Launch a kernel of reduce.cu; ``run`` is how many elements vectors must divide."""
    is_aligned = (into.data_ptr() | slots.data_ptr()) % 16 == 0
    key = what, into.dtype, into.shape, slots.dtype, is_aligned, *last, stream.cuda_stream
    launch = segments.launches.get(key)
    if launch is None:
        columns, num_rows = into.shape[1:].numel(), len(segments.rows)
        if not num_rows or not columns:
            return
        width = 8 if into.dtype == slots.dtype and into.dtype in _SIXTEEN_BITS else 4
        if run % width or not is_aligned:
            width = 1
        across = 1
        while across < min(-(-columns // width), _THREADS):
            across *= 2
        block = across, _THREADS // across
        kernel = f"{what}_{_NAMES[slots.dtype]}_{_NAMES[into.dtype]}_{width}"
        tables = [table.data_ptr() for table in (segments.rows, segments.offsets, segments.places)]
        parameters = [*[0] * len(tensors), *tables, num_rows, columns if of_row is None else of_row, *last]
        handle = kernels.kernel("reduce", kernel, into.device.index)
        launch = kernels.Launch(stream, handle, -(-num_rows // block[1]), block, parameters)
        segments.launches[key] = launch
    for number, tensor in enumerate(tensors):
        launch.parameters[number] = tensor.data_ptr()
    launch()


def formats_combine(partials: tuple[RowFormat, ...], into: list[Tensor], op: str) -> bool:
    """Whether kernels can combine partial results of these formats onto ``into``; for "lse" the last are the lse."""
    if op == "lse" and partials[-1].dtype != torch.float32:
        return False
    return all(can_combine(row.dtype, target.dtype) for row, target in zip(partials, into, strict=False))
