# SPDX-License-Identifier: Apache-2.0
"""One exchange after another through a ring of slots: the order of waits, data and flags."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from magi_comm_grpcoll.ring import Ring
from magi_comm_grpcoll.routes import Route
from magi_comm_grpcoll.wires import Wires


@dataclass(frozen=True)
class Prepared:
    """What one exchange of a plan needs, made once.

    Attributes:
        route: sends this rank's pieces.
        sources: the ranks that send something to this one.
    """

    route: Route
    sources: tuple[int, ...]


class SlotExchange:
    """A ring with its flags.

    Args:
        ring: the epochs.
        wires: the flags.
    """

    def __init__(self, ring: Ring, wires: Wires) -> None:
        self._ring, self._wires = ring, wires

    def begin(self) -> int:
        """Take the next epoch, and enqueue the wait until its slot is free on all ranks; returns the epoch."""
        epoch = self._ring.begin()
        self._wires.await_credit(self._ring.credit_needed(epoch), epoch)
        return epoch

    def send(self, prepared: Prepared, epoch: int, bases: Sequence[int]) -> None:
        """Enqueue the sending of the tensors at ``bases``, and the wait for what comes from others."""
        prepared.route.send(bases, epoch % self._ring.num_slots, epoch + 1)
        if prepared.sources:
            self._wires.await_arrival(prepared.sources, epoch + 1)

    def finish(self, epoch: int) -> None:
        """Enqueue, behind all that reads the slot on the arriving stream, the sign that nothing is missing."""
        self._wires.tell_finished(epoch + 1)

    def release(self, epoch: int, after: Any) -> None:
        """Give the epoch's slot back to the senders once the event ``after`` has come."""
        self._wires.tell_credit(self._ring.release(epoch), after)
