# SPDX-License-Identifier: Apache-2.0
"""A collective under way, and what is left to do once its rows have arrived."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from magi_attention.comm.streams import EventPool, current_stream

Result = TypeVar("Result")


class PendingWork(Generic[Result]):
    """A transfer of CPU tensors: waits for it, then finishes it.

    Args:
        transfer: the transfer under way; None if there is nothing to wait for.
        finish: computes the result from what arrived; called once.
        buffers: what the transfer reads or writes, kept alive until it is over.
    """

    def __init__(
        self, transfer: dist.Work | None, finish: Callable[[], Result], buffers: Sequence[object] = ()
    ) -> None:
        self._transfer = transfer
        self._finish: Callable[[], Result] | None = finish
        self._buffers = buffers

    def wait_packed(self) -> None:
        """See :class:`~magi_attention.comm.protocol.Work`."""

    def wait(self) -> Result:
        """Return the result. A second call returns the same again."""
        if self._finish is not None:
            if self._transfer is not None:
                self._transfer.wait()
            self._result = self._finish()
            self._finish, self._transfer, self._buffers = None, None, ()
        return self._result

    def release(self) -> None:
        """See :class:`~magi_attention.comm.protocol.Work`; nothing is lent."""


class StreamWork(Generic[Result]):
    """All of a collective, enqueued on another CUDA stream.

    Made when everything is enqueued. It keeps the buffers until the stream that they belong to is behind the
    collective; a work that nobody waits for makes that stream wait when it goes.

    Args:
        stream: the stream that it is enqueued on.
        caller: the stream that ``buffers`` and the result belong to.
        result: what ``wait`` returns.
        buffers: what the collective reads or writes of ``caller``'s, kept alive.
        packed: recorded on ``stream`` once the rows to send had been gathered.
        events: of the streams' GPU; gets ``packed``, and the one that is recorded now, when the work goes.
        owns_packed: whether it gets ``packed``, or another work gives it back.
    """

    def __init__(
        self,
        stream: torch.cuda.Stream,
        caller: torch.cuda.Stream,
        result: Result,
        buffers: Sequence[object],
        packed: "torch.cuda.Event | None",
        events: EventPool,
        owns_packed: bool = True,
    ) -> None:
        self._caller, self._result, self._buffers, self.packed = caller, result, buffers, packed
        self._events, self._recorded, self._owns_packed = events, events.take(), owns_packed
        self._recorded.record(stream)
        self._done: torch.cuda.Event | None = self._recorded

    def precede(self, stream: torch.cuda.Stream) -> None:
        """Let another stream wait, which gives up no buffers."""
        if self._done is not None:
            stream.wait_event(self._done)

    def wait_packed(self) -> None:
        """See :class:`~magi_attention.comm.protocol.Work`."""
        if self.packed is not None:
            self._caller.wait_event(self.packed)

    def wait(self) -> Result:
        """Return the result; it may be used on the current stream. A second call returns the same again."""
        if self._done is not None:
            current = current_stream(self._caller.device_index)
            current.wait_event(self._done)
            if current != self._caller:
                self._caller.wait_event(self._done)
            self._done, self._buffers = None, ()
            if not self._owns_packed:
                self.packed = None  # the work that owns it may go now, and others record it
        return self._result

    def release(self) -> None:
        """See :class:`~magi_attention.comm.protocol.Work`; nothing is lent."""

    def __del__(self) -> None:
        if self._done is not None:
            self._caller.wait_event(self._done)
        self._events.put(self._recorded)
        if self._owns_packed and self.packed is not None:
            self._events.put(self.packed)
