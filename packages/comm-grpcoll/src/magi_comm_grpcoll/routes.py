# SPDX-License-Identifier: Apache-2.0
"""How the pieces of an exchange get to the peers: by copy engines, or pushed by a kernel on a few multiprocessors."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from magi_comm_grpcoll import kernels
from magi_comm_grpcoll.arena import Arena, SharedMemory
from magi_comm_grpcoll.driver import driver
from magi_comm_grpcoll.switch import switch_bytes
from magi_comm_grpcoll.tables import ByteCopies, cut, tasks_of
from magi_comm_grpcoll.wires import DeviceWires

Transport = Literal["copy_engine", "push"]

# Blocks of a push, one for each multiprocessor that it takes.
PUSH_BLOCKS = 8
_MOST_TENSORS = 4  # of one launch
_LEAST_TASK_BYTES, _MOST_TASK_BYTES, _TASKS_PER_BLOCK = 1 << 15, 1 << 18, 8


def choose_transport(copies: ByteCopies, device_name: str) -> Transport:
    """The faster transport for these pieces, which go to other ranks: a copy engine takes its time for each piece."""
    is_long = not len(copies.size) or copies.size.mean() >= switch_bytes(device_name)
    return "copy_engine" if is_long else "push"


def device_name(device: torch.device) -> str:
    """The kind of GPU."""
    return torch.cuda.get_device_name(device)


class Route(Protocol):
    """The pieces of one exchange, ready to be sent."""

    def send(self, bases: Sequence[int], slot: int, epoch: int) -> None:
        """Enqueue the pieces of the tensors at these addresses, to that slot of every peer, and what tells them.

        Args:
            bases: the first byte of each tensor.
            slot: number of the slot.
            epoch: what arrives.
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
        self._stream, self._bases = wires.send.cuda_stream, [0]
        self._sources, self._sizes = np.empty_like(copies.source), copies.size.copy()
        base = arena.memory.addresses[copies.peer] + copies.target
        self._targets = [base + number * arena.slot_bytes for number in range(arena.num_slots)]
        self._fixed = [
            (targets.ctypes.data, self._sources.ctypes.data, self._sizes.ctypes.data, len(targets))
            for targets in self._targets
        ]

    def send(self, bases: Sequence[int], slot: int, epoch: int) -> None:
        """See :class:`Route`."""
        if bases != self._bases:
            self._bases = [*bases]
            np.add(np.take(np.array(bases, np.int64), self._tensor), self._offsets, out=self._sources)
        driver().copy(*self._fixed[slot], self._stream)
        self._wires.tell_arrival(epoch)


class PushRoute:
    """A kernel that stores to the peers' memory, and tells them itself.

    Args:
        copies: the pieces.
        arena: the ring's slots.
        wires: the ring's flags.
        control: every rank's control block.
        tells: whether the peers are told; not if another route follows in the same exchange.
    """

    def __init__(
        self, copies: ByteCopies, arena: Arena, wires: DeviceWires, control: SharedMemory, tells: bool = True
    ) -> None:
        assert arena.memory is not None
        self._wires, self._device = wires, arena.memory.local.device
        self._granule, self._known = copies.granule, dict[int, tuple[object, object]]()
        self._slot_offsets = [np.uint64(number * arena.slot_bytes) for number in range(arena.num_slots)]
        share = int(copies.size.sum()) // (PUSH_BLOCKS * _TASKS_PER_BLOCK)
        most = min(max(share, _LEAST_TASK_BYTES), _MOST_TASK_BYTES) // 16384 * 16384
        pieces = cut(copies, most)
        self._kept: list[torch.Tensor] = [torch.zeros(1, dtype=torch.int32, device=self._device)]
        num_tensors = int(pieces.tensor.max(initial=0)) + 1
        groups = list(pairwise([*range(0, num_tensors, _MOST_TENSORS), num_tensors]))
        self._launches = []
        for first, stop in groups:
            chosen = pieces.select((pieces.tensor >= first) & (pieces.tensor < stop))
            tasks = torch.from_numpy(tasks_of(chosen._replace(tensor=chosen.tensor - first)).view(np.uint8))
            tasks = tasks.to(self._device)
            num_told = len(arena.memory.addresses) if tells and stop == num_tensors else 0
            self._kept.append(tasks)
            self._launches.append((first, stop, tasks.data_ptr(), np.uint32(len(chosen.size)), np.uint32(num_told)))
        self._arenas, self._controls = arena.memory.device_addresses.data_ptr(), control.device_addresses.data_ptr()
        self._kept += [arena.memory.device_addresses, control.device_addresses]
        self._flag_offset, self._num_done = np.uint64(wires.flag_offset), self._kept[0].data_ptr()

    def send(self, bases: Sequence[int], slot: int, epoch: int) -> None:
        """See :class:`Route`."""
        union = self._granule
        for base in bases:
            union |= base
        kernel, config = self._kernel(union & -union)
        offset, value = self._slot_offsets[slot], np.uint64(epoch + 1)
        for first, stop, tasks, num_tasks, num_told in self._launches:
            sources = [*bases[first:stop], *[0] * (_MOST_TENSORS - (stop - first))]
            pieces = self._arenas, offset, tasks, num_tasks
            told = self._controls, num_told, self._flag_offset, value, self._num_done
            kernels.launch(self._wires.send, config, kernel, *sources, *pieces, *told)

    def _kernel(self, granule: int) -> tuple[object, object]:
        """The kernel for pieces whose addresses and sizes are multiples of ``granule``, and its launch."""
        if granule not in self._known:
            index = self._device.index
            if granule >= 16:
                shared = kernels.BULK_SHARED_BYTES
                kernel = kernels.kernel("push_bulk", "push_bulk", index, shared)
                self._known[granule] = kernel, kernels.launch_config(PUSH_BLOCKS, (64, 1), shared)
            else:
                kernel = kernels.kernel("push_words", f"push_words_{granule}", index)
                self._known[granule] = kernel, kernels.launch_config(PUSH_BLOCKS, (512, 1))
        return self._known[granule]


class RouteWithOwn:
    """Copies of this rank to itself by a kernel, then those to others.

    Args:
        own: the route of the pieces that stay here, which tells nobody.
        others: the route of the other pieces.
    """

    def __init__(self, own: Route, others: Route) -> None:
        self._own, self._others = own, others

    def send(self, bases: Sequence[int], slot: int, epoch: int) -> None:
        """See :class:`Route`."""
        self._own.send(bases, slot, epoch)
        self._others.send(bases, slot, epoch)


def make_route(
    copies: ByteCopies,
    rank: int,
    arena: Arena,
    wires: DeviceWires,
    control: SharedMemory,
    transport: Transport | None = None,
) -> tuple[Route, Transport]:
    """Make the route for the pieces of ``rank``, by the given transport or the faster one."""
    stays: NDArray[np.bool_] = copies.peer == rank
    others = copies.select(~stays)
    chosen = transport or choose_transport(others, device_name(control.local.device))
    if chosen == "push":
        return PushRoute(copies, arena, wires, control), chosen
    by_copies = CopyEngineRoute(others, arena, wires)
    if not stays.any():
        return by_copies, chosen
    return RouteWithOwn(PushRoute(copies.select(stays), arena, wires, control, tells=False), by_copies), chosen
