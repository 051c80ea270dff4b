# SPDX-License-Identifier: Apache-2.0
"""Pieces put by NVSHMEM, each with a signal that raises the receiver's flag: between nodes over the network.

A rank names a place on another one by the address of the same place in its own memory. See ``csrc/put.cu`` for how the
flags count.
"""

from collections.abc import Sequence
from functools import cache, cached_property

import numpy as np
import torch

from magi_attention.common.intervals import merge
from magi_comm_grpcoll import kernels
from magi_comm_grpcoll.arena import Arena
from magi_comm_grpcoll.errors import first_line
from magi_comm_grpcoll.handshake import Handshake, raise_everywhere
from magi_comm_grpcoll.heap import link
from magi_comm_grpcoll.tables import TASK, ByteCopies, aligned
from magi_comm_grpcoll.tasks import upload_tasks
from magi_comm_grpcoll.wires import DeviceWires, forget_if_many

# kUnit of csrc/put.cu.
UNIT = 1 << 28
# One for each multiprocessor that it takes.
PUT_BLOCKS = 16
# Of a piece, each of which costs a put by all threads of a block.
PUT_BYTES = 1 << 18
_PUT_THREADS, _FLAG_THREADS = 512, 128
# Places among the parameters of a put.
_SLOT, _VALUE = 1, 8


@cache
def put_kernel(name: str, device: int) -> int:
    """The driver's handle of a kernel of ``csrc/put.cu``, which knows where NVSHMEM's memory is."""
    _link_once(device)
    return kernels.kernel("put", name, device)


@cache
def _link_once(device: int) -> None:
    link(kernels.library("put", device))


def link_everywhere(handshake: Handshake, device: torch.device) -> None:
    """Load the kernels on all ranks, a collective; raises ``NotNativeError`` on all of them if one can't."""
    failure = ""
    try:
        put_kernel("put_signal", device.index)
    except Exception as error:  # whatever the driver or NVSHMEM has against them
        failure = f"the kernel that puts can't be loaded: {first_line(error)}"
    raise_everywhere(handshake, failure)


class PutWires(DeviceWires):
    """Flags between nodes: NVSHMEM's signals, sent by kernels. See :class:`DeviceWires` for the arguments."""

    unit = UNIT

    @cached_property
    def flag(self) -> int:
        """Where this rank's word is that tells of its arrivals: the address on every rank."""
        return self.control.local.data_ptr() + self.flag_offset

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return len(self.control.addresses)

    @cached_property
    def _telling(self) -> kernels.Launch:
        word = self.control.local.data_ptr() + int(self.words.credit[self.rank])
        return self._launch("tell_all", self.credit, [word, 0, self.num_ranks, self.rank])

    @cached_property
    def _seeing(self) -> dict[tuple[int, ...], tuple[kernels.Launch, torch.Tensor]]:
        return {}

    def _launch(self, name: str, stream: "torch.cuda.Stream", parameters: list[int]) -> kernels.Launch:
        kernel = put_kernel(name, self.control.local.device.index)
        return kernels.Launch(stream, kernel, 1, (_FLAG_THREADS, 1), parameters)

    def tell_arrival(self, epoch: int) -> None:
        """See :class:`~magi_comm_grpcoll.wires.Wires`; puts tell it themselves."""

    def await_arrival(self, sources: tuple[int, ...], epoch: int) -> None:
        """See :class:`~magi_comm_grpcoll.wires.Wires`.

        A kernel follows the wait, in which NVSHMEM makes what a network adapter has written visible.
        """
        super().await_arrival(sources, epoch)
        if not sources:
            return
        if sources not in self._seeing:
            forget_if_many(self._seeing)
            words = self.control.local.data_ptr() + self.words.arrived[list(sources)]
            with torch.cuda.stream(self.arrive):
                uploaded = torch.from_numpy(words).pin_memory().to(self.control.local.device, non_blocking=True)
            parameters = [uploaded.data_ptr(), len(words), 0]
            self._seeing[sources] = self._launch("see_arrived", self.arrive, parameters), uploaded
        launch, _ = self._seeing[sources]
        launch.parameters[2] = (epoch + 1) * self.unit
        launch.enqueue()

    def tell_credit(self, credit: int, after: "torch.cuda.Event") -> None:
        """See :class:`~magi_comm_grpcoll.wires.Wires`."""
        self.credit.wait_event(after)
        self._telling.parameters[1] = credit
        self._telling.enqueue()


def stage(copies: ByteCopies, rank: int) -> tuple[ByteCopies, ByteCopies]:
    """Send pieces by way of a place in this rank's own symmetric memory, where each byte lies once, tensor by tensor.

    A network adapter reads only memory that NVSHMEM has registered. Gathering costs little beside the network.

    Returns:
        The pieces on their way there, and from there to their peers.
    """
    there, source, first = [], np.empty_like(copies.source), 0
    for tensor in np.unique(copies.tensor):
        sent = copies.tensor == tensor
        start = copies.source[sent]
        runs = merge(np.column_stack([start, start + copies.size[sent]]))
        sizes = runs[:, 1] - runs[:, 0]
        place = first + np.cumsum(sizes) - sizes
        run = np.searchsorted(runs[:, 0], start, side="right") - 1
        source[sent] = start + (place - runs[:, 0])[run]
        same = np.ones_like(sizes)
        there.append(ByteCopies(tensor * same, rank * same, runs[:, 0], place, sizes))
        first += aligned(int(sizes.sum()))
    onward = copies._replace(tensor=np.zeros_like(copies.tensor), source=source)
    columns = zip(copies.select(np.empty(0, np.int64)), *there, strict=True)
    return ByteCopies(*map(np.concatenate, columns)), onward


class PutRoute:
    """A kernel whose blocks put pieces in turns.

    Args:
        copies: the pieces, which have been staged.
        arena: the ring's slots.
        wires: the ring's flags.
    """

    def __init__(self, copies: ByteCopies, arena: Arena, wires: PutWires) -> None:
        assert arena.memory is not None
        self._memory, device = arena.memory, arena.memory.local.device
        base = self._memory.local.data_ptr()
        self._slots = [base + number * arena.slot_bytes for number in range(arena.num_slots)]
        pieces, (part,) = upload_tasks(copies, PUT_BLOCKS, PUT_BYTES, wires.send, device)
        counts = np.bincount(pieces.peer, minlength=wires.num_ranks).astype(np.uint32)
        with torch.cuda.stream(wires.send):
            num_done = torch.zeros(1, dtype=torch.int32, device=device)
            num_pieces = torch.from_numpy(counts.view(np.int32)).pin_memory().to(device, non_blocking=True)
        self._kept = part.tasks, num_done, num_pieces
        parameters = [base + arena.stage_offset, 0, part.tasks.data_ptr(), len(part.tasks) // TASK.itemsize]
        parameters += [num_pieces.data_ptr(), wires.num_ranks, wires.rank, wires.flag, 0, num_done.data_ptr()]
        kernel = put_kernel("put_signal", device.index)
        self._launch = kernels.Launch(wires.send, kernel, PUT_BLOCKS, (_PUT_THREADS, 1), parameters)

    def send(self, bases: Sequence[int], slot: int, epoch: int, begun: "torch.cuda.Event | None" = None) -> None:
        """See :class:`~magi_comm_grpcoll.routes.Route`."""
        self._launch.parameters[_SLOT] = self._slots[slot]
        self._launch.parameters[_VALUE] = (epoch + 1) * UNIT
        self._launch.tell_begun(begun)
        self._launch.enqueue()
