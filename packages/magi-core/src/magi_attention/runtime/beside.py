# SPDX-License-Identifier: Apache-2.0
"""Kernels of early queries on a stream of their own, so that those of the late ones fill what they leave idle.

A kernel ends with a few blocks that take as long as all before, and the next one of its stream waits for the last of
them. But early and late queries have nothing to do with each other: as soon as the late ones' keys have come, their
kernel may take every multiprocessor that the early ones' has no more work for. What the received rows add to early
queries runs there too, and fills the end of the late ones' kernel; and so do late kernels but the largest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import TracebackType

import torch
from torch import Tensor

from magi_attention.comm.streams import EventPool, current_in_block, current_stream, events_of
from magi_attention.runtime.job import AttentionJob


class Beside:
    """The other stream of one forward pass; with None everything stays on the current one.

    What runs there writes to tensors of the current stream, which hence has to wait for it before these go: at the
    latest when the ``with`` block of this object ends.
    """

    def __init__(self, current: "torch.cuda.Stream | None" = None, other: "torch.cuda.Stream | None" = None) -> None:
        self._current, self._other, self._is_ahead = current, other, False
        self._events = EventPool() if current is None else events_of(current.device_index)
        self._marks: list[torch.cuda.Event] = []

    @classmethod
    def of(cls, job: AttentionJob, q: Tensor) -> "Beside":
        """Another stream where a pass has two steps, of which the first computes some of the queries only.

        Args:
            job: what to compute.
            q: the rank's queries.
        """
        steps = job.forward.steps
        if q.device.type != "cuda" or len(steps) != 2 or job.max_logits or job.forward.schedule.most_results > 2:
            return cls()
        first, second = steps
        runs = [launch.queries for launch in first.launches]
        if first.step.exchange is not None or second.step.queries_travel or not runs or None in runs:
            return cls()
        return cls(current_stream(q.get_device()), _stream_of(q.get_device()))

    @property
    def is_used(self) -> bool:
        """Whether there is another stream."""
        return self._other is not None

    def now(self) -> "torch.cuda.Event | None":
        """All that the current stream has been given so far; of use until the block of this object ends."""
        if self._current is None:
            return None
        mark = self._events.take()
        mark.record(self._current)
        self._marks.append(mark)
        return mark

    @contextmanager
    def after(self, event: "torch.cuda.Event | None") -> Iterator[None]:
        """Launch what the block launches on the other stream, behind the event."""
        if self._other is None or self._current is None or event is None:
            yield
            return
        self._other.wait_event(event)
        self._is_ahead = True
        with current_in_block(self._other, self._current):
            yield

    def join(self) -> None:
        """Let the current stream wait for the other one."""
        if self._is_ahead and self._current is not None and self._other is not None:
            self._events.let_wait(self._current, self._other)
            self._is_ahead = False

    def __enter__(self) -> "Beside":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.join()
        while self._marks:
            self._events.put(self._marks.pop())


@cache
def _stream_of(device_index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device_index)
