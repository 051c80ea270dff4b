# SPDX-License-Identifier: Apache-2.0
"""A native collective under way."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from magi_attention.comm.streams import EventPool, current_stream
from magi_attention.comm.work import StreamWork

Result = TypeVar("Result")


class NativeWork(StreamWork[Result], Generic[Result]):
    """See :class:`~magi_attention.comm.protocol.Work`.

    Args:
        stream: the stream on which everything has happened once it gets here.
        caller: the stream that ``buffers`` and the result belong to.
        result: what ``wait`` returns.
        buffers: what the collective reads or writes of ``caller``'s, kept alive.
        packed: recorded when nothing but the transfer is left, and has its multiprocessors.
        check: raises if the context has given up.
        give_back: called once with a stream behind which the lent rows are not read any more; None if none are lent.
        events: to record; gets those of this work when it goes.
    """

    def __init__(
        self,
        stream: "torch.cuda.Stream",
        caller: "torch.cuda.Stream",
        result: Result,
        buffers: Sequence[object],
        packed: "torch.cuda.Event | None",
        check: Callable[[], None],
        give_back: "Callable[[torch.cuda.Stream], None] | None",
        events: EventPool,
    ) -> None:
        self._check, self._give_back = check, give_back
        super().__init__(stream, caller, result, buffers, packed, events)

    def wait(self) -> Result:
        """Return the result; it may be used on the current stream. A second call returns the same again.

        Raises:
            PeerTimeoutError: a rank did not come in time to a collective of this context.
        """
        self._check()
        return super().wait()

    def wait_host(self) -> Result:
        """Let the host wait until the result is there; otherwise as ``wait``.

        Raises:
            PeerTimeoutError: as ``wait``, and if it happens meanwhile.
        """
        if (done := self._done) is not None:
            done.synchronize()
        return self.wait()

    def release(self) -> None:
        """See :class:`~magi_attention.comm.protocol.Work`."""
        self._release_behind(current_stream(self._caller.device_index))

    def _release_behind(self, stream: "torch.cuda.Stream") -> None:
        if self._give_back is None:
            return
        give_back, self._give_back = self._give_back, None
        if self._done is not None:
            super().wait()
        give_back(stream)

    def __del__(self) -> None:
        self._release_behind(self._caller)  # it may go on any thread, whose current stream says nothing
        super().__del__()
