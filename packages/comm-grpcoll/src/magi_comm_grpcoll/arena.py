# SPDX-License-Identifier: Apache-2.0
"""Memory of this rank that all ranks of a group can write, and theirs."""

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.comm.group import let_go_at_exit
from magi_comm_grpcoll.errors import CapacityError, first_line
from magi_comm_grpcoll.handshake import Handshake, raise_everywhere


class SharedMemory(Protocol):
    """As many bytes on every rank.

    Attributes:
        local: ``[num_bytes]`` uint8, this rank's.
        addresses: ``(num_ranks,)`` int64: where each rank's memory is mapped here.
        device_addresses: the same on the device, for kernels.
    """

    local: Tensor
    addresses: NDArray[np.int64]
    device_addresses: Tensor


class Allocator(Protocol):
    """Makes memory that all ranks of a group have."""

    def allocate(self, num_bytes: int) -> SharedMemory:
        """So many bytes, the same on all ranks. A collective.

        Raises:
            CapacityError: a rank has not so much memory left; on every rank.
            NotNativeError: a rank can't have that of the others; on every rank.
        """

    def free_unused(self) -> None:
        """Give back memory that no tensor lies in any more, if that does not happen by itself. A collective."""


class MappedAllocator:
    """PyTorch's symmetric memory: mapped on all ranks, which are on one host; it goes with its tensors.

    Args:
        device: this rank's GPU.
        group: the process group.
        handshake: with its ranks.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup, handshake: Handshake) -> None:
        self._device, self._group, self._handshake = device, group, handshake
        let_go_at_exit(self, "_group")

    def allocate(self, num_bytes: int) -> SharedMemory:
        """See :class:`Allocator`."""
        return _Mapped(num_bytes, self._device, self._group, self._handshake)

    def free_unused(self) -> None:
        """See :class:`Allocator`."""


class _Mapped:
    def __init__(self, num_bytes: int, device: torch.device, group: dist.ProcessGroup, handshake: Handshake) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        def attempt() -> str:
            try:
                self.local: Tensor = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
            except RuntimeError as error:  # of which running out of memory is one
                return first_line(error)
            return ""

        allocate_everywhere(handshake, attempt, num_bytes)
        failure = ""
        try:
            self._mapping = symmetric_memory.rendezvous(self.local, group)
        except RuntimeError as error:  # such as a process that may not see the others' GPUs
            failure = first_line(error)
        raise_everywhere(handshake, failure and f"memory of the others can't be mapped: {failure}")
        self.addresses: NDArray[np.int64] = np.array(self._mapping.buffer_ptrs, np.int64)
        self.device_addresses = torch.from_numpy(self.addresses).to(device)


def allocate_everywhere(handshake: Handshake, attempt: Callable[[], str], num_bytes: int) -> None:
    """Attempt something on all ranks, and once more without what PyTorch keeps to itself if it fails on one of them.

    Args:
        handshake: with the ranks.
        attempt: returns what went wrong.
        num_bytes: what is allocated.

    Raises:
        CapacityError: it failed again; on every rank.
    """
    for is_last in (False, True):
        answers = handshake.exchange(attempt().encode())
        rank = next((rank for rank, answer in enumerate(answers) if answer), None)
        if rank is None:
            return
        if not is_last:
            torch.cuda.empty_cache()
    assert rank is not None
    raise CapacityError(f"rank {rank} can't allocate {num_bytes} bytes to receive rows in: {answers[rank].decode()}")


class Arena:
    """A ring's slots on every rank.

    Args:
        num_slots: how many.
        allocator: of their memory.
        is_staged: whether there is one more, from which this rank's rows are sent.

    Attributes:
        slot_bytes: size of a slot.
        memory: the slots, one after another; None while nothing has been sent.
    """

    _STEP = 1 << 21

    def __init__(self, num_slots: int, allocator: Allocator, is_staged: bool = False) -> None:
        self.num_slots, self.slot_bytes, self._allocator = num_slots, 0, allocator
        self._num_all = num_slots + is_staged
        self.memory: SharedMemory | None = None

    @classmethod
    def most_in(cls, num_bytes: int, num_slots: int) -> int:
        """The size of a slot of which so many take at most ``num_bytes``."""
        return num_bytes // num_slots // cls._STEP * cls._STEP

    @property
    def stage_offset(self) -> int:
        """Where the slot is from which rows are sent."""
        return self.num_slots * self.slot_bytes

    def fits(self, num_bytes: int) -> bool:
        """Whether a slot can hold so many bytes."""
        return self.memory is not None and num_bytes <= self.slot_bytes

    def grow(self, num_bytes: int, most_bytes: int | None) -> None:
        """Make new slots, a collective. Nobody may write the old ones any more; tensors in them stay valid.

        Args:
            num_bytes: what a slot must hold.
            most_bytes: the most that it may hold; None for no limit.

        Raises:
            CapacityError: a rank has not so much memory left; on every rank, and the slots are as before, but new.
        """
        before = self.slot_bytes
        spare = num_bytes + num_bytes // 8 if before else max(num_bytes, 1)
        size = -(-spare // self._STEP) * self._STEP
        self.memory, self.slot_bytes = None, 0
        try:
            self._make(size if most_bytes is None else min(size, most_bytes))
        except CapacityError:
            if before:  # what fitted before shall go on, if there is room for it again
                with suppress(CapacityError):
                    self._make(before)
            raise

    def _make(self, slot_bytes: int) -> None:
        self.memory = self._allocator.allocate(self._num_all * slot_bytes)
        self.slot_bytes = slot_bytes

    def slot(self, number: int) -> Tensor:
        """``[slot_bytes]`` uint8: one of this rank's slots."""
        assert self.memory is not None
        return self.memory.local[number * self.slot_bytes : (number + 1) * self.slot_bytes]
