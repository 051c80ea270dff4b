# SPDX-License-Identifier: Apache-2.0
"""Notices ranks that don't come: a stream waits for a word for ever, so a thread of the host looks after it."""

import threading
import time
import weakref
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

PERIOD_S = 0.05
# Far above every epoch, and as a difference to one still positive in 64 bits.
RELEASED = 1 << 61


class Watched(NamedTuple):
    """What the watchdog reads of one ring: words of the host that the ring's streams write.

    Attributes:
        name: the ring's name, for messages.
        progress: ``[2]``: epochs that could start as far as this rank goes, and those finished.
    """

    name: str
    progress: NDArray[np.int64]


class Owner(Protocol):
    """Who keeps a watchdog."""

    def give_up(self, ring: int, epoch: int) -> None:
        """Called from the watchdog's thread, with the number of the ring that stands still and its epoch."""


class Watchdog:
    """Calls its owner's ``give_up`` once an exchange that could start has not finished within ``timeout_s``.

    It looks at words in the host's memory alone, and makes no CUDA call before it gives up.

    Args:
        rings: what to watch.
        owner: a weak reference, so that the thread ends with its owner.
        timeout_s: from the moment at which nothing but the peers is missing.
    """

    def __init__(self, rings: Sequence[Watched], owner: "weakref.ref[Owner]", timeout_s: float) -> None:
        self._rings, self._owner, self._timeout_s = rings, owner, timeout_s
        self._since: list[tuple[int, float] | None] = [None] * len(rings)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="magi grpcoll watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()

    def look(self, now: float) -> tuple[int, int] | None:
        """A ring and its epoch that have taken too long at the time ``now``."""
        for number, ring in enumerate(self._rings):
            started, finished = (int(word) for word in ring.progress)
            since = self._since[number]
            if started <= finished:
                self._since[number] = None
            elif since is None or since[0] != finished:
                self._since[number] = finished, now
            elif now - since[1] > self._timeout_s:
                return number, finished
        return None

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            if (late := self.look(time.monotonic())) is not None:
                if (owner := self._owner()) is not None:
                    owner.give_up(*late)
                return
            if self._owner() is None:
                return
