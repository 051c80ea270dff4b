# SPDX-License-Identifier: Apache-2.0
"""A collective under way, and what is left to do once its rows have arrived."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


class PendingWork(Generic[Result]):
    """Waits for a transfer, then finishes it on the stream that is current in ``wait``.

    Args:
        transfer: the transfer under way; None if there is nothing to wait for.
        finish: computes the result from what arrived; called once.
        buffers: tensors that the transfer reads or writes, kept alive until it is over.
    """

    def __init__(
        self, transfer: dist.Work | None, finish: Callable[[], Result], buffers: Sequence[Tensor] = ()
    ) -> None:
        self._transfer = transfer
        self._finish: Callable[[], Result] | None = finish
        self._buffers = buffers

    def wait(self) -> Result:
        """Return the result; it may be used on the current stream. A second call returns the same again."""
        if self._finish is not None:
            if self._transfer is not None:
                self._transfer.wait()
            for buffer in self._buffers:
                if buffer.is_cuda:  # its memory may come from another stream than the one that uses it now
                    buffer.record_stream(torch.cuda.current_stream(buffer.device))
            self._result = self._finish()
            self._finish, self._transfer, self._buffers = None, None, ()
        return self._result
