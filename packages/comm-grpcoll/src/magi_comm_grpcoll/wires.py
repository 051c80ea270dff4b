# SPDX-License-Identifier: Apache-2.0
"""The flags of a ring on the GPUs: words in shared memory that streams wait for, and that peers write.

Nothing here takes a multiprocessor: the stream's own front end waits, and the words are written by copy engines. Since
CUDA 13.1 a stream can't write a word of another GPU itself.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from magi_comm_grpcoll.arena import SharedMemory
from magi_comm_grpcoll.driver import MOST_MEMORY_OPERATIONS, driver, memory_operations

WORD = 8
_NONE = np.empty(0, np.int64)


class Wires(Protocol):
    """What an exchange does to the flags of its ring, on one rank. Every call only enqueues."""

    def await_credit(self, value: int, epoch: int) -> None:
        """Before sending: wait until every rank's credit has reached ``value``."""

    def tell_arrival(self, value: int) -> None:
        """After sending: tell every rank that so many epochs of this rank have arrived."""

    def await_arrival(self, sources: Sequence[int], value: int) -> None:
        """Before reading: wait until so many epochs of these ranks have arrived."""

    def tell_finished(self, value: int) -> None:
        """Tell the watchdog of this rank that so many epochs have been read or lent out."""

    def tell_credit(self, value: int, after: "torch.cuda.Event") -> None:
        """After ``after``: tell every rank that this one is done with so many epochs."""


class Words:
    """The addresses of one ring's words in a rank's control block: ``arrived`` and ``credit`` of each rank, ``outbox``.

    Args:
        num_ranks: ranks of the group.
        ring: the ring's number.
    """

    def __init__(self, num_ranks: int, ring: int) -> None:
        first = ring * self.num_bytes(num_ranks)
        self.arrived = first + WORD * np.arange(num_ranks)
        self.credit = self.arrived + WORD * num_ranks
        self.outbox_arrived, self.outbox_credit = (first + WORD * (2 * num_ranks + i) for i in range(2))

    @staticmethod
    def num_bytes(num_ranks: int) -> int:
        """Bytes of one ring's words."""
        return WORD * (2 * num_ranks + 2)


class _Operations:
    """Writes of one number to some words, then waits until others have reached another; enqueued with any numbers."""

    def __init__(self, waits: NDArray[np.int64], writes: Sequence[int] = ()) -> None:
        self._table = memory_operations(waits, writes)
        self._write, self._wait = np.split(self._table["value"], [len(writes)])
        size = self._table.itemsize
        self._parts = [
            (self._table.ctypes.data + first * size, min(MOST_MEMORY_OPERATIONS, len(self._table) - first))
            for first in range(0, len(self._table), MOST_MEMORY_OPERATIONS)
        ]

    def enqueue(self, stream: int, write: int = 0, wait: int = 0) -> None:
        self._write.fill(write)
        self._wait.fill(wait)
        for address, count in self._parts:
            driver().enqueue_memory_operations(address, count, stream)


class _Letter:
    """Writes a word of this rank, and copies it to the same place on every rank."""

    def __init__(self, outbox: int, targets: NDArray[np.int64]) -> None:
        self._outbox = _Operations(_NONE, [outbox])
        self._targets = targets.astype(np.uint64)
        self._sources = np.full(len(targets), outbox, np.uint64)
        self._sizes = np.full(len(targets), WORD, np.uint64)
        self._batch = self._targets.ctypes.data, self._sources.ctypes.data, self._sizes.ctypes.data, len(targets)

    def enqueue(self, stream: int, value: int) -> None:
        self._outbox.enqueue(stream, write=value)
        driver().copy(*self._batch, stream)


class DeviceWires:
    """See :class:`Wires`.

    Args:
        control: every rank's control block.
        words: the ring's part of it.
        rank: this rank.
        progress: ``[2]`` int64 in pinned memory: epochs that could start as far as this rank goes, and those finished.
        send: the stream that sends.
        arrive: the stream that waits for what arrives.
        credit: the stream that tells what is done with.
    """

    def __init__(
        self,
        control: SharedMemory,
        words: Words,
        rank: int,
        progress: torch.Tensor,
        send: "torch.cuda.Stream",
        arrive: "torch.cuda.Stream",
        credit: "torch.cuda.Stream",
    ) -> None:
        self.send, self.arrive, self.credit = send, arrive, credit
        here = int(control.addresses[rank])
        self._arrived = here + words.arrived
        self.flag_offset = int(words.arrived[rank])
        self._finished = _Operations(_NONE, [progress.data_ptr() + WORD])
        self._credits = _Operations(here + words.credit, [progress.data_ptr()])
        self._arrivals: dict[tuple[int, ...], _Operations] = {}
        self._arrival_letter = _Letter(here + words.outbox_arrived, control.addresses + words.arrived[rank])
        self._credit_letter = _Letter(here + words.outbox_credit, control.addresses + words.credit[rank])

    def await_credit(self, value: int, epoch: int) -> None:
        """See :class:`Wires`."""
        self._credits.enqueue(self.send.cuda_stream, write=epoch + 1, wait=value)

    def tell_arrival(self, value: int) -> None:
        """See :class:`Wires`."""
        self._arrival_letter.enqueue(self.send.cuda_stream, value)

    def await_arrival(self, sources: Sequence[int], value: int) -> None:
        """See :class:`Wires`."""
        key = tuple(sources)
        if key not in self._arrivals:
            self._arrivals[key] = _Operations(self._arrived[list(key)])
        self._arrivals[key].enqueue(self.arrive.cuda_stream, wait=value)

    def tell_finished(self, value: int) -> None:
        """See :class:`Wires`."""
        self._finished.enqueue(self.arrive.cuda_stream, write=value)

    def tell_credit(self, value: int, after: "torch.cuda.Event") -> None:
        """See :class:`Wires`."""
        self.credit.wait_event(after)
        self._credit_letter.enqueue(self.credit.cuda_stream, value)
