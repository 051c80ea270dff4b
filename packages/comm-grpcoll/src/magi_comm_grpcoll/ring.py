# SPDX-License-Identifier: Apache-2.0
"""Who may write when: the epochs of a ring of receive slots, as plain numbers.

All ranks run the same exchanges in the same order, so that each is known everywhere by its number, the *epoch* e, which
uses slot ``e % num_slots`` on every rank. Two kinds of counters that only grow keep them apart:

- ``arrived[s]`` on rank r: how many epochs rank s has written to rank r;
- ``credit[d]`` on rank r: how many epochs rank d is done with, so that their slots may be written again.

Epoch e may be written to rank d once ``credit[d] >= e - num_slots + 1``, and read on d once ``arrived[s] >= e + 1`` for
every rank s that sends something. Nothing waits for all ranks.
"""

from magi_comm_grpcoll.errors import SlotLentError


class Ring:
    """One rank's view of a ring of slots.

    Args:
        num_slots: how many exchanges may hold rows at a time.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._num_begun = 0
        self._num_credited = 0
        self._released: set[int] = set()

    @property
    def num_begun(self) -> int:
        """How many epochs have begun."""
        return self._num_begun

    def begin(self) -> int:
        """Take the next epoch.

        Raises:
            SlotLentError: its slot is still lent out by the exchange ``num_slots`` before.
        """
        self.check_room(1)
        self._num_begun += 1
        return self._num_begun - 1

    def check_room(self, count: int) -> None:
        """Raise :class:`SlotLentError` if so many epochs more, each released at once, can't begin now."""
        num_taken = self._num_begun - self._num_credited
        if num_taken and num_taken + count > self.num_slots:
            raise SlotLentError(
                f"rows that were lent and not released, and exchanges after them, hold {num_taken} of {self.num_slots} "
                f"slots, and {count} more are needed: release the oldest before the next exchange"
            )

    def take_back(self) -> None:
        """Forget that the last epoch began, of which nobody has been told: the next one to begin has its number."""
        self._num_begun -= 1

    def credit_needed(self, epoch: int) -> int:
        """What every peer's credit must be before the epoch may be written."""
        return max(0, epoch - self.num_slots + 1)

    def release(self, epoch: int) -> int:
        """Give back an epoch's slot; returns how many epochs, without a gap, are given back now."""
        if epoch < self._num_credited or epoch in self._released or epoch >= self._num_begun:
            raise ValueError(f"epoch {epoch} is not lent")
        self._released.add(epoch)
        while self._num_credited in self._released:
            self._released.remove(self._num_credited)
            self._num_credited += 1
        return self._num_credited
