# SPDX-License-Identifier: Apache-2.0
"""Combining what a group reduce brought into the slots, by one kernel per tensor, in ascending order of the ranks."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from magi_attention.comm.packing import RowFormat, row_formats
from magi_attention.comm.protocol import ReduceOp
from magi_comm_grpcoll import kernels

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_THREADS, _VECTOR_BYTES = 256, 16
# Which of a kernel's tensors is that of the slot; the first is changed. Both are read in vectors, if they are aligned.
_SLOT_AT = {"add": 1, "merge": 3}


class Segments(NamedTuple):
    """Which rows of the slots belong to which row: see :attr:`magi_attention.comm.routes.Routes.segments`.

    Attributes:
        rows, offsets, places: as described there.
    """

    rows: Tensor
    offsets: Tensor
    places: Tensor


def can_combine(partial: torch.dtype, into: torch.dtype) -> bool:
    """Whether there is a kernel for partial results and results of these dtypes."""
    known = partial in _NAMES and into in _NAMES
    return known and (partial == into or torch.float32 in (partial, into))


class Combination:
    """The launches that combine a slot's rows with the rows of tensors that they belong to.

    Args:
        stream: where.
        op: ``"sum"`` and ``"avg"`` add each of the slot's tensors to the target in the same place; for ``"avg"`` the
            old value of the target counts as a term. ``"lse"`` merges partial outputs by log-sum-exp.
        targets: tensors like those that will be changed, ``[num_source, ...]``; for ``"lse"`` the outputs
            ``[num_source, heads, dim]`` and their float32 lse ``[num_source, heads]``.
        slots: dtypes of the slot's tensors; for ``"lse"`` those of partial outputs and of their float32 lse.
        segments: which rows of the slot belong to which of the targets.
    """

    def __init__(
        self,
        stream: "torch.cuda.Stream",
        op: ReduceOp,
        targets: Sequence[Tensor],
        slots: Sequence[torch.dtype],
        segments: Segments,
    ) -> None:
        self._is_merge = op == "lse"
        if self._is_merge:
            heads, dim = targets[0].shape[1:]
            self._combiners = [_Combiner("merge", stream, targets[0], slots[0], segments, dim, (heads, dim))]
            return
        self._combiners = []
        for target, slot in zip(targets, slots, strict=True):
            columns = target.shape[1:].numel()
            last = columns, int(op == "avg")
            self._combiners.append(_Combiner("add", stream, target, slot, segments, columns, last))

    def enqueue(self, targets: Sequence[int], slots: Sequence[int]) -> None:
        """Launch them.

        Args:
            targets: addresses of the targets, contiguous, changed in place and rounded once; for ``"lse"`` also that
                of a copy of the old lse.
            slots: addresses of the slot's tensors.
        """
        if self._is_merge:
            self._combiners[0].enqueue(*targets, *slots)
        else:
            for combiner, target, slot in zip(self._combiners, targets, slots, strict=True):
                combiner.enqueue(target, slot)


class _Combiner:
    """A kernel of reduce.cu for tensors of one kind; ``run`` is how many elements vectors must divide."""

    def __init__(
        self,
        what: Literal["add", "merge"],
        stream: "torch.cuda.Stream",
        into: Tensor,
        slots: torch.dtype,
        segments: Segments,
        run: int,
        last: tuple[int, int],
    ) -> None:
        self._what, self._stream, self._segments, self._run, self._last = what, stream, segments, run, last
        self._into, self._slots, self._device = into.dtype, slots, into.device.index
        self._columns, self._slot_at = into.shape[1:].numel(), _SLOT_AT[what]
        self._launches: dict[bool, kernels.Launch] = {}

    def enqueue(self, *addresses: int) -> None:
        """Launch it for tensors at these addresses."""
        is_aligned = (addresses[0] | addresses[self._slot_at]) % _VECTOR_BYTES == 0
        launch = self._launches.get(is_aligned)
        if launch is None:
            if not len(self._segments.rows) or not self._columns:
                return
            launch = self._launches[is_aligned] = self._launch(is_aligned, len(addresses))
        parameters = launch.parameters
        for number, address in enumerate(addresses):
            parameters[number] = address
        launch.enqueue()

    def _launch(self, is_aligned: bool, num_tensors: int) -> kernels.Launch:
        columns, num_rows = self._columns, len(self._segments.rows)
        width = 8 if self._into == self._slots and self._into in _SIXTEEN_BITS else 4
        if self._run % width or not is_aligned:
            width = 1
        across = 1
        while across < min(-(-columns // width), _THREADS):
            across *= 2
        block = across, _THREADS // across
        kernel = f"{self._what}_{_NAMES[self._slots]}_{_NAMES[self._into]}_{width}"
        tables = [table.data_ptr() for table in self._segments]
        parameters = [*[0] * num_tensors, *tables, num_rows, *self._last]
        handle = kernels.kernel("reduce", kernel, self._device)
        return kernels.Launch(self._stream, handle, -(-num_rows // block[1]), block, parameters)


def formats_combine(partials: tuple[RowFormat, ...], into: list[Tensor], op: str) -> bool:
    """Whether kernels can combine partial results of these formats onto ``into``; for "lse" the last are the lse."""
    if op == "lse" and not partials[-1].dtype == into[-1].dtype == torch.float32:
        return False
    return all(can_combine(row.dtype, target.dtype) for row, target in zip(partials, into, strict=False))


def check_combine(partials: Sequence[Tensor], into: Sequence[Tensor], op: str) -> None:
    """Raise ``TypeError`` unless a kernel combines partial results with results of these dtypes."""
    if not formats_combine(row_formats(partials), [*into], op):
        told = ", ".join(f"{x.dtype} onto {y.dtype}" for x, y in zip(partials, into, strict=True))
        raise TypeError(f"no kernel combines {told}: use bfloat16, float16 or float32, and a float32 log-sum-exp")
