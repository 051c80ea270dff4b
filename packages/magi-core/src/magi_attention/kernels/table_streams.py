# SPDX-License-Identifier: Apache-2.0
"""Tables that kernels read, on whichever streams: made once, kept with a mask, and dropped while launches may run.

Memory belongs to the stream that was current when it was allocated. A table that is dropped could be overwritten by
that stream's next tensors while a kernel on another stream still reads it, unless the allocator knows of the other.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor


class StreamsOfTables:
    """The streams whose launches read tables: their memory is not given to others before these launches are done.

    Args:
        tables: tensors, or tuples, lists and dataclasses that hold some; all on one GPU. What else they hold, and
            tensors elsewhere, are passed over.
    """

    def __init__(self, tables: object) -> None:
        self._tables = [each for each in _tensors_in(tables) if each.is_cuda]
        self._device = self._tables[0].get_device() if self._tables else -1
        self._known: set[int] = set()

    def add(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator of a stream, at its first launch."""
        if stream.cuda_stream in self._known:
            return
        for table in self._tables:
            table.record_stream(stream)
        self._known.add(stream.cuda_stream)

    def add_current(self) -> None:
        """Tell it of the stream that is current on the tables' GPU. Cheap, since it comes before every launch."""
        if self._tables and torch._C._cuda_getCurrentRawStream(self._device) not in self._known:
            self.add(torch.cuda.current_stream(self._device))


def settle(device: torch.device) -> None:
    """Wait for tables that were just made on the current stream, so that launches on all streams may read them."""
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.current_stream(device).synchronize()


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors_in(each)
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from _tensors_in(getattr(value, each.name))
