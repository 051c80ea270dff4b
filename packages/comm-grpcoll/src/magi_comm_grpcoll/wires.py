# SPDX-License-Identifier: Apache-2.0
"""The flags of a ring on the GPUs: words in shared memory that streams wait for, and that peers write.

Nothing here takes a multiprocessor, for which it would have to wait until an attention kernel ends. The stream's own
front end waits for words and writes this rank's, and copy engines write those of others: since CUDA 13.1 a stream can't
write a word of another GPU itself. (A copy within one GPU would be a kernel.)

Nothing but stream order stands between two copies, and they may take different engines and links. So what is told is
written to an outbox behind the data, which a stream does only after a fence for all that it wrote before, and goes to
the others from there. Whatever an outbox holds is true, also if a late copy finds a later number. Who has seen an
arrival writes a word too before anybody reads what arrived, so that a fence stands between these as well.
"""

import ctypes
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from magi_comm_grpcoll.arena import SharedMemory
from magi_comm_grpcoll.driver import (
    MOST_MEMORY_OPERATIONS,
    VALUE_OFFSET,
    WAIT_VALUE,
    WRITE_VALUE,
    driver,
    memory_operations,
)

WORD = 8

# Sets of ranks that send something, for which operations are kept: in large groups every mask may have its own.
MOST_KNOWN = 512


class Wires(Protocol):
    """What an exchange does to the flags of its ring, on one rank. Every call only enqueues."""

    def await_credit(self, credit: int, epoch: int) -> None:
        """Before sending: wait until every rank's credit has reached the number."""

    def tell_arrival(self, epoch: int) -> None:
        """After sending: tell every rank that this epoch of this rank has arrived."""

    def await_arrival(self, sources: tuple[int, ...], epoch: int) -> None:
        """Before reading: wait until this epoch of these ranks has arrived, and of this one."""

    def tell_credit(self, credit: int, after: "torch.cuda.Event") -> None:
        """After ``after``: tell every rank that this one is done with so many epochs."""


class Words:
    """Where one ring's words are in a rank's control block.

    They are ``arrived`` and ``credit`` of each rank, which streams wait for, side by side in the bytes ``awaited``, and
    outboxes from which a number is copied to the others.

    Args:
        num_ranks: ranks of the group.
        ring: the ring's number.
    """

    def __init__(self, num_ranks: int, ring: int) -> None:
        first = ring * self.num_bytes(num_ranks)
        self.arrived = first + WORD * np.arange(num_ranks)
        self.credit = self.arrived + WORD * num_ranks
        self.awaited = slice(first, first + WORD * 2 * num_ranks)
        self.outboxes = first + WORD * (2 * num_ranks + np.arange(2))

    @staticmethod
    def num_bytes(num_ranks: int) -> int:
        """Bytes of one ring's words."""
        return WORD * (2 * num_ranks + 2)


class _Operations:
    """Operations on words, one after another, made once and enqueued on a stream with other numbers each time."""

    def __init__(self, stream: int, *parts: tuple[int, NDArray[np.int64]]) -> None:
        self._table = memory_operations(*parts)
        size = self._table.itemsize
        # The table as words, and which of them is each value: what a call does is microseconds of many.
        self._words = (ctypes.c_uint64 * (len(self._table) * size // WORD)).from_address(self._table.ctypes.data)
        places = iter(range(VALUE_OFFSET // WORD, len(self._words), size // WORD))
        self._places = [(next(places), part) for part, (_, words) in enumerate(parts) for _ in words]
        self._calls = [
            driver().memory_operations(
                self._table.ctypes.data + first * size, min(MOST_MEMORY_OPERATIONS, len(self._table) - first), stream
            )
            for first in range(0, len(self._table), MOST_MEMORY_OPERATIONS)
        ]

    def enqueue(self, *numbers: int) -> None:
        """Enqueue them with a number for each part."""
        words = self._words
        for place, part in self._places:
            words[place] = numbers[part]
        for call in self._calls:
            call()


class _Letter:
    """Copies a word of this rank to words of other ranks."""

    def __init__(self, stream: int, outbox: int, targets: NDArray[np.int64]) -> None:
        self._targets = targets.astype(np.uint64)
        self._sources = np.full(len(targets), outbox, np.uint64)
        self._sizes = np.full(len(targets), WORD, np.uint64)
        addresses = self._targets.ctypes.data, self._sources.ctypes.data, self._sizes.ctypes.data
        self.enqueue = driver().copies(*addresses, len(targets), stream)


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

    Attributes:
        unit: by how much one epoch raises the words of arrival.
    """

    unit = 1

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
        self.control, self.words, self.rank = control, words, rank
        here, mark = int(control.addresses[rank]), progress.data_ptr()
        self._arrived = here + words.arrived
        others = np.arange(len(control.addresses)) != rank
        self.flag_offset = int(words.arrived[rank])
        outboxes = here + words.outboxes
        started, self._finished = _word(mark), _word(mark + WORD)
        sending, crediting = send.cuda_stream, credit.cuda_stream
        self._before_sending = _Operations(sending, (WRITE_VALUE, started), (WAIT_VALUE, here + words.credit))
        own_arrived = self._arrived[rank : rank + 1]
        self._after_sending = _Operations(sending, (WRITE_VALUE, outboxes[:1]), (WRITE_VALUE, own_arrived))
        self._arrival_letter = _Letter(sending, int(outboxes[0]), (control.addresses + words.arrived[rank])[others])
        self._before_reading: dict[tuple[int, ...], _Operations] = {}
        own_credit = here + words.credit[rank : rank + 1]
        self._before_own = _Operations(arrive.cuda_stream, (WAIT_VALUE, own_credit))
        self._before_crediting = _Operations(crediting, (WRITE_VALUE, outboxes[1:]), (WRITE_VALUE, own_credit))
        self._credit_letter = _Letter(crediting, int(outboxes[1]), (control.addresses + words.credit[rank])[others])

    def await_credit(self, credit: int, epoch: int) -> None:
        """See :class:`Wires`."""
        self._before_sending.enqueue(epoch + 1, credit)

    def await_own_credit(self, credit: int) -> None:
        """Let the arriving stream wait until this rank's own credit has reached the number."""
        self._before_own.enqueue(credit)

    def tell_arrival(self, epoch: int) -> None:
        """See :class:`Wires`."""
        self._after_sending.enqueue(epoch + 1, epoch + 1)
        self._arrival_letter.enqueue()

    def await_arrival(self, sources: tuple[int, ...], epoch: int) -> None:
        """See :class:`Wires`; also marks the epoch as finished."""
        operations = self._before_reading.get(sources)
        if operations is None:
            forget_if_many(self._before_reading)
            awaited = sorted({*sources, self.rank})
            # The write is behind a fence, which also keeps what follows from being read before the waits are over.
            operations = self._before_reading[sources] = _Operations(
                self.arrive.cuda_stream, (WAIT_VALUE, self._arrived[awaited]), (WRITE_VALUE, self._finished)
            )
        operations.enqueue((epoch + 1) * self.unit, epoch + 1)

    def tell_credit(self, credit: int, after: "torch.cuda.Event") -> None:
        """See :class:`Wires`."""
        self.credit.wait_event(after)
        self._before_crediting.enqueue(credit, credit)
        self._credit_letter.enqueue()


def forget_if_many(known: dict[tuple[int, ...], Any]) -> None:
    """Forget all that is kept for sets of ranks, if there is too much of it. What was enqueued needs none of it."""
    if len(known) >= MOST_KNOWN:
        known.clear()


def _word(address: int) -> NDArray[np.int64]:
    return np.array([address])
