# SPDX-License-Identifier: Apache-2.0
"""What launches of all kernels need besides their parameters."""

from functools import cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

from magi_kernels_hopper.driver import TensorMaps

Value = TypeVar("Value")


class ByAddresses(Generic[Value]):
    """What launches are made with, kept by the addresses of their tensors: a training comes back to the same memory."""

    MOST = 1024

    def __init__(self) -> None:
        self._known: dict[object, Value] = {}

    def find(self, key: object) -> Value | None:
        """What is kept for a key."""
        return self._known.get(key)

    def keep(self, key: object, value: Value) -> None:
        """Keep something, and forget all before it if there is too much of it."""
        if len(self._known) >= self.MOST:
            self._known.clear()
        self._known[key] = value


def aligned(x: Tensor) -> Tensor:
    """A tensor that the copy engine can read: x itself, or a contiguous copy."""
    token, head, element = x.stride()
    if element == 1 and not (x.data_ptr() | token * 2 | head * 2) % 16 and token > 0 and head > 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def counters(device: torch.device, stream: int) -> Tensor:
    """Four zeros, which the kernel leaves as it finds them. Launches on one stream share them, one after another.

    A graph may be replayed on any stream, so that a launch that is captured has its own.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(4, dtype=torch.int32, device=device)
    return _stream_counters(device, stream)


@cache
def _stream_counters(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(4, dtype=torch.int32, device=device)


@cache
def tensor_maps(device: torch.device) -> TensorMaps:
    """The maps of tensors on a device."""
    return TensorMaps()


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def index_of(device: torch.device) -> int:
    """The index of a CUDA device, the current one's if it does not say."""
    return torch.cuda.current_device() if device.index is None else device.index
