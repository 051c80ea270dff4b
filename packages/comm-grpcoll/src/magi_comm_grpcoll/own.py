# SPDX-License-Identifier: Apache-2.0
"""A rank's own rows, on their way to the places that they have among those which it receives."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from magi_attention.comm.packing import RowFormat, row_formats
from magi_attention.comm.routes import Places
from magi_comm_grpcoll.routes import SLOT_OFFSET, push_launch
from magi_comm_grpcoll.tables import RowCopies, byte_copies, lay_out_slots
from magi_comm_grpcoll.tasks import MOST_TENSORS, upload_tasks

# Multiprocessors that copy. Each moves as much as it can, whatever their number: few leave attention the others, until
# the memory is the limit.
NUM_BLOCKS = 16
# Rows go in pieces of at most so much, which all blocks get their share of.
_MOST_BYTES = 1 << 16
# Shorter runs, on average, are copied faster by all multiprocessors, row by row.
_LEAST_BYTES = 1 << 14
_BULK_BYTES = 16


class OwnCopies:
    """Copies rows beside kernels that take every multiprocessor, which would else wait for it, or it for them.

    Copy engines could, but the driver copies inside a GPU by kernels whatever it is asked for.

    Args:
        places: of the rows.
        formats: of the tensors.
        num_received: rows that receive buffers have.
        stream: where the copies are enqueued, and nothing else uses what is made here.
        device: the GPU.
    """

    def __init__(
        self,
        places: Places,
        formats: Sequence[RowFormat],
        num_received: int,
        stream: "torch.cuda.Stream",
        device: torch.device,
    ) -> None:
        row_bytes = [row.num_bytes for row in formats]
        self._layout = lay_out_slots([num_received], row_bytes)
        self._formats, self._num_received, self._device = formats, num_received, device
        length = places.runs[:, 1] - places.runs[:, 0]
        runs = RowCopies(np.zeros_like(length), np.cumsum(length) - length, places.runs[:, 0], length)
        copies = byte_copies(runs, self._layout, row_bytes, 0)
        # Tensors whose rows have no bytes have no address either, and all others lie behind the first one's.
        is_bulk = copies.granule == _BULK_BYTES and len(formats) <= MOST_TENSORS and all(row_bytes)
        self.is_worth_it = is_bulk and len(copies.size) > 0 and copies.size.mean() >= _LEAST_BYTES
        if not self.is_worth_it:
            return
        _, (part,) = upload_tasks(copies, NUM_BLOCKS, _MOST_BYTES, stream, device)
        with torch.cuda.stream(stream):
            zeros = torch.zeros(2, dtype=torch.int64, device=device)
        self._kept = part, zeros
        # Addresses start from zero; nobody is told when all blocks are done, which the other one counts.
        zero, num_done = zeros.data_ptr(), zeros.data_ptr() + zeros.itemsize
        self._launch = push_launch(stream, NUM_BLOCKS, part, _BULK_BYTES, zero, (zero, 0, 0), num_done)

    def can_copy(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are worth it, and lie where bulk copies can read them."""
        return self.is_worth_it and not any(tensor.data_ptr() % _BULK_BYTES for tensor in tensors)

    def new_buffers(self) -> list[Tensor]:
        """Receive buffers that rows can be copied to: one behind another, as in a slot."""
        memory = torch.empty(int(self._layout.sizes[0]), dtype=torch.uint8, device=self._device)
        return tensors_at(memory, self._layout.starts[0].tolist(), self._formats, self._num_received)

    def enqueue(self, sources: Sequence[int], target: int, begun: "torch.cuda.Event") -> None:
        """Copy the rows of tensors at these addresses to the receive buffers, of which the first is at ``target``.

        An event is recorded once the multiprocessors are there; it must have been recorded before.
        """
        self._launch.tell_begun(begun)
        self._launch.parameters[: len(sources)] = [*sources]
        self._launch.parameters[SLOT_OFFSET] = target
        self._launch.enqueue()


class OwnRows(NamedTuple):
    """A rank's own rows among those that it receives.

    Attributes:
        places: rows of the receive buffers.
        tensors: what belongs there.
        copies: copies it by a few multiprocessors; None if all shall do so.
    """

    places: Places
    tensors: Sequence[Tensor]
    copies: OwnCopies | None


def own_rows(
    places: Places,
    tensors: Sequence[Tensor],
    num_received: int,
    stream: "torch.cuda.Stream",
    device: torch.device,
    buffers: Sequence[Tensor] | None,
) -> OwnRows:
    """The rows, with what copies them on a stream, made once, unless to buffers of the caller's: these are not one."""
    if buffers is not None:
        return OwnRows(places, tensors, None)
    formats = row_formats(tensors)
    copies = places.derived(
        (stream.cuda_stream, device, formats, num_received),
        lambda: OwnCopies(places, formats, num_received, stream, device),
    )
    return OwnRows(places, tensors, copies if copies.can_copy(tensors) else None)


def tensors_at(memory: Tensor, starts: Sequence[int], formats: Sequence[RowFormat], num_rows: int) -> list[Tensor]:
    """``[num_rows, *row.shape]`` for each format: tensors that lie in bytes ``[n]`` of memory, where each starts."""
    return [
        memory[start : start + num_rows * row.num_bytes].view(row.dtype).view(num_rows, *row.shape)
        for start, row in zip(starts, formats, strict=True)
    ]
