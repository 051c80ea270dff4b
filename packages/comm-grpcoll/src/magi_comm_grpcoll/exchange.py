# SPDX-License-Identifier: Apache-2.0
"""One exchange after another through a ring of slots: the order of waits, data and flags."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
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
        on_told: called with each event that :meth:`release` was given, once it is not used any more.
    """

    def __init__(self, ring: Ring, wires: Wires, on_told: Callable[[Any], None] = lambda event: None) -> None:
        self._ring, self._wires, self._on_told = ring, wires, on_told
        self._released = deque[tuple[int, Any]]()
        self._lock, self._is_telling = threading.RLock(), False

    @property
    def num_begun(self) -> int:
        """How many epochs have begun."""
        return self._ring.num_begun

    def check_room(self, count: int) -> None:
        """Raise ``SlotLentError`` if lent rows would stop so many exchanges, each released at once."""
        self._ring.check_room(count)

    def begin(self) -> int:
        """Take the next epoch, and enqueue the wait until its slot is free on all ranks; returns the epoch."""
        epoch = self._ring.begin()
        self._wires.await_credit(self._ring.credit_needed(epoch), epoch)
        return epoch

    def send(self, prepared: Prepared, epoch: int, bases: Sequence[int], begun: Any = None) -> None:
        """Enqueue the sending of the tensors at ``bases``. After an error the epoch has not begun, and may again.

        ``begun`` is an event, or None; see :class:`~magi_comm_grpcoll.routes.Route`.
        """
        try:
            prepared.route.send(bases, epoch % self._ring.num_slots, epoch, begun)
        except BaseException:
            self._ring.take_back()
            raise

    def arrive(self, prepared: Prepared, epoch: int) -> None:
        """Enqueue the wait for what comes, and until this rank's own tensors have been sent."""
        self._wires.await_arrival(prepared.sources, epoch)

    def credit_needed(self, epoch: int) -> int:
        """What a rank's credit must be before the epoch's slot may be written there."""
        return self._ring.credit_needed(epoch)

    def release(self, epoch: int, after: Any) -> None:
        """Give the epoch's slot back to the senders once the event ``after`` has come.

        Works go on any thread and, with the garbage collector, in the middle of another one's release. Of two that ran
        into each other, one could tell of both slots before it has waited for both events. So they take turns.
        """
        self._released.append((epoch, after))
        while self._released:
            with self._lock:
                if self._is_telling:  # this very thread, further out, and will not stop before this one
                    return
                self._is_telling = True
                try:
                    while self._released:
                        epoch, after = self._released.popleft()
                        self._wires.tell_credit(self._ring.release(epoch), after)
                        self._on_told(after)
                finally:
                    self._is_telling = False
