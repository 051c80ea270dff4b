# SPDX-License-Identifier: Apache-2.0
"""How the pieces of an exchange get to the peers: by copy engines, or by a kernel on a few multiprocessors."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from magi_comm_grpcoll import kernels
from magi_comm_grpcoll.arena import Arena, SharedMemory
from magi_comm_grpcoll.driver import driver
from magi_comm_grpcoll.puts import PutRoute, PutWires, stage
from magi_comm_grpcoll.switch import switch_bytes
from magi_comm_grpcoll.tables import TASK, ByteCopies
from magi_comm_grpcoll.tasks import MOST_TENSORS, LaunchPart, upload_tasks
from magi_comm_grpcoll.wires import DeviceWires

Transport = Literal["copy_engine", "push", "put"]

# Blocks of a push, one for each multiprocessor that it takes.
PUSH_BLOCKS = 8
# Of a piece. Longer ones go to few peers at a time: among four H200s 5 % less, and among two 1 % more.
PUSH_BYTES = 1 << 16
# So many take a copy engine about as long as it takes a kernel to start, which needs multiprocessors for them.
FEW_PIECES = 16
# Places among the parameters of a push: see csrc/push_bulk.cu.
SLOT_OFFSET, _VALUE = MOST_TENSORS + 1, MOST_TENSORS + 7


def choose_transport(copies: ByteCopies, device_name: str) -> Transport:
    """The faster transport for these pieces, which go to other ranks: a copy engine takes its time for each piece."""
    is_long = len(copies.size) <= FEW_PIECES or copies.size.mean() >= switch_bytes(device_name)
    return "copy_engine" if is_long else "push"


def device_name(device: torch.device) -> str:
    """The kind of GPU."""
    return torch.cuda.get_device_name(device)


class Route(Protocol):
    """The pieces of one exchange, ready to be sent."""

    def send(self, bases: Sequence[int], slot: int, epoch: int, begun: "torch.cuda.Event | None" = None) -> None:
        """Enqueue the pieces of the tensors at these addresses, to that slot of every peer, and what tells them.

        Args:
            bases: the first byte of each tensor.
            slot: number of the slot.
            epoch: what arrives.
            begun: has been recorded before, and is anew once kernels that send have their multiprocessors. Others that
                wait for it cannot take these, as they do if they start when the kernels are but enqueued.
        """


class CopyEngineRoute:
    """One batch of copies, which takes no multiprocessor.

    Args:
        copies: the pieces; none for this rank itself, whose copies a kernel does faster.
        arena: the ring's slots.
        wires: the ring's flags.
    """

    def __init__(self, copies: ByteCopies, arena: Arena, wires: DeviceWires) -> None:
        assert arena.memory is not None
        self._wires, self._tensor, self._offsets = wires, copies.tensor, copies.source
        self._bases = [0]
        self._sources, self._sizes = np.empty_like(copies.source), copies.size.copy()
        base = arena.memory.addresses[copies.peer] + copies.target
        self._targets = [base + number * arena.slot_bytes for number in range(arena.num_slots)]
        fixed = self._sources.ctypes.data, self._sizes.ctypes.data, len(copies.size), wires.send.cuda_stream
        self._copies = [driver().copies(targets.ctypes.data, *fixed) for targets in self._targets]

    def send(self, bases: Sequence[int], slot: int, epoch: int, begun: "torch.cuda.Event | None" = None) -> None:
        """See :class:`Route`."""
        if bases != self._bases:
            self._bases = [*bases]
            np.add(np.take(np.array(bases, np.int64), self._tensor), self._offsets, out=self._sources)
        self._copies[slot]()
        self._wires.tell_arrival(epoch)


class PushRoute:
    """A kernel that stores to the peers' memory, and tells them itself.

    Args:
        copies: the pieces.
        arena: the ring's slots.
        wires: the ring's flags.
        control: every rank's control block.
        tells: whether the ranks are told; not if another route follows in the same exchange.
        to_stage: whether the pieces go to where rows are sent from.
    """

    def __init__(
        self,
        copies: ByteCopies,
        arena: Arena,
        wires: DeviceWires,
        control: SharedMemory,
        tells: bool = True,
        to_stage: bool = False,
    ) -> None:
        assert arena.memory is not None
        self._wires, self._memory, self._control = wires, arena.memory, control
        self._granule, self._launches_by_granule = copies.granule, dict[int, list[kernels.Launch]]()
        self._bases: list[int] = []
        offsets = [number * arena.slot_bytes for number in range(arena.num_slots)]
        self._slot_offsets = [arena.stage_offset] * arena.num_slots if to_stage else offsets
        _, self._parts = upload_tasks(copies, PUSH_BLOCKS, PUSH_BYTES, wires.send, arena.memory.local.device)
        self._num_told = len(arena.memory.addresses) if tells else 0
        with torch.cuda.stream(wires.send):  # which alone uses it, so that it may be dropped at any time
            self._num_done = torch.zeros(1, dtype=torch.int32, device=arena.memory.local.device)

    def send(self, bases: Sequence[int], slot: int, epoch: int, begun: "torch.cuda.Event | None" = None) -> None:
        """See :class:`Route`."""
        if bases != self._bases:
            self._bases = [*bases]
            self._launches = self._launches_for(bases)
        for launch in self._launches:
            launch.parameters[SLOT_OFFSET] = self._slot_offsets[slot]
            launch.parameters[_VALUE] = epoch + 1
            launch.tell_begun(begun if launch is self._launches[-1] else None)
            launch.enqueue()

    def _launches_for(self, bases: Sequence[int]) -> "list[kernels.Launch]":
        """The launches for tensors at these addresses."""
        union = self._granule
        for base in bases:
            union |= base
        granule = union & -union
        if granule not in self._launches_by_granule:
            self._launches_by_granule[granule] = [self._launch(granule, part) for part in self._parts]
        launches = self._launches_by_granule[granule]
        for launch, part in zip(launches, self._parts, strict=True):
            for number, base in enumerate(part.bases_of(bases)):
                launch.parameters[number] = base
        return launches

    def _launch(self, granule: int, part: LaunchPart) -> kernels.Launch:
        told = self._control.device_addresses.data_ptr(), self._num_told if part.is_last else 0, self._wires.flag_offset
        arenas = self._memory.device_addresses.data_ptr()
        return push_launch(self._wires.send, PUSH_BLOCKS, part, granule, arenas, told, self._num_done.data_ptr())


def push_launch(
    stream: "torch.cuda.Stream",
    num_blocks: int,
    part: LaunchPart,
    granule: int,
    arenas: int,
    told: tuple[int, int, int],
    num_done: int,
) -> kernels.Launch:
    """A launch for pieces whose addresses and sizes are multiples of ``granule``.

    The addresses of the tensors and :data:`SLOT_OFFSET` are to be set, and with anybody to tell the value.

    Args:
        stream: where.
        num_blocks: one for each multiprocessor that it takes.
        part: the pieces.
        granule: 1, 2, 4, 8 or 16 bytes.
        arenas: where on the GPU the address is of each peer's slots.
        told: where the addresses are of the peers' control blocks, how many are told, and where there.
        num_done: where the kernel counts blocks, zero before and after.
    """
    is_bulk = granule >= 16
    shared = kernels.BULK_SHARED_BYTES if is_bulk else 0
    name = ("push_bulk", "push_bulk") if is_bulk else ("push_words", f"push_words_{granule}")
    parameters = [*[0] * MOST_TENSORS, arenas, 0, part.tasks.data_ptr(), len(part.tasks) // TASK.itemsize]
    kernel = kernels.kernel(*name, part.tasks.device.index, shared)
    block = (64 if is_bulk else 512), 1
    return kernels.Launch(stream, kernel, num_blocks, block, [*parameters, *told, 0, num_done], shared)


class RouteInTurns:
    """One route after another, of which the last tells the ranks."""

    def __init__(self, *routes: Route) -> None:
        self._routes = routes

    def send(self, bases: Sequence[int], slot: int, epoch: int, begun: "torch.cuda.Event | None" = None) -> None:
        """See :class:`Route`."""
        for route in self._routes:
            route.send(bases, slot, epoch, begun if route is self._routes[-1] else None)


def make_route(
    copies: ByteCopies,
    rank: int,
    arena: Arena,
    wires: DeviceWires,
    control: SharedMemory,
    transport: Transport | None = None,
) -> tuple[Route, Transport]:
    """Make the route for the pieces of ``rank``, by the given transport or the faster one; by puts over their wires."""
    stays: NDArray[np.bool_] = copies.peer == rank
    others, first = copies.select(~stays), list[Route]()
    chosen: Transport = "put"
    if isinstance(wires, PutWires):
        staged, put = stage(others, rank)
        parts = staged.by_granule() if len(staged.size) else []
        first += (PushRoute(part, arena, wires, control, tells=False, to_stage=True) for part in parts)
        last: Route = PutRoute(put, arena, wires)
    else:
        chosen = transport or choose_transport(others, device_name(control.local.device))
        if chosen == "push":
            *parts, end = copies.by_granule()
            first += (PushRoute(part, arena, wires, control, tells=False) for part in parts)
            return in_turns(*first, PushRoute(end, arena, wires, control)), chosen
        last = CopyEngineRoute(others, arena, wires)
    if stays.any():
        own = copies.select(stays).by_granule()
        first += (PushRoute(part, arena, wires, control, tells=False) for part in own)
    return in_turns(*first, last), chosen


def in_turns(*routes: Route) -> Route:
    """One route after another, of which the last tells the ranks."""
    return routes[0] if len(routes) == 1 else RouteInTurns(*routes)
