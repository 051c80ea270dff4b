# SPDX-License-Identifier: Apache-2.0
"""What launches of all kernels need besides their parameters."""

import ctypes
from collections.abc import Iterable
from functools import cache
from threading import Lock

import torch
from torch import Tensor

from magi_attention.comm.protocol import RowsThere
from magi_kernels_hopper.driver import TensorMaps, wait_until_reached

Box = tuple[tuple[int, int, int], int]
"""Elements of a box by dims, heads and tokens, and the bytes of its swizzle."""


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


class Bell:
    """A word that kernels of one stream raise by one, each when it has what others wait for, before it ends.

    Launches of a stream run one after another, so that the n-th of those that ring raises it to n. Hold ``lock`` from
    a launch until it is counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.lock, self._count = Lock(), 0
        self._word = torch.zeros(1, dtype=torch.int32, device=device)
        self.address = self._word.data_ptr()
        torch.cuda.current_stream(device).synchronize()  # others must not find what was there before the zero

    def count_launch(self) -> RowsThere:
        """Count a launch that will ring; returns what lets a stream wait until it has."""
        self._count += 1
        address, count = self.address, self._count & 0xFFFFFFFF  # the driver compares modulo 2^32
        return lambda stream: wait_until_reached(stream.cuda_stream, address, count)


def bell(device: torch.device, stream: int) -> Bell | None:
    """The bell of a stream, which is the current one.

    None where launches are captured, as replays aren't counted, and where the driver lets no stream wait for memory.
    """
    return None if torch.cuda.is_current_stream_capturing() else _stream_bell(device, stream)


@cache
def _stream_bell(device: torch.device, stream: int) -> Bell | None:
    rung = Bell(device)
    try:
        wait_until_reached(torch.cuda.Stream(device).cuda_stream, rung.address, 0)  # which it has
    except RuntimeError:
        return None
    return rung


@cache
def tensor_maps(device: torch.device) -> TensorMaps:
    """The maps of tensors on a device."""
    return TensorMaps()


def put_maps(params: ctypes.Structure, maps: TensorMaps, tensors: Iterable[Tensor], boxes: Iterable[Box]) -> None:
    """Set the maps that parameters begin with, one for each tensor."""
    address = ctypes.addressof(params)
    for x, (box, swizzle_bytes) in zip(tensors, boxes, strict=True):
        encoded = maps.get(x, box, swizzle_bytes)
        ctypes.memmove(address, encoded, len(encoded))
        address += len(encoded)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def index_of(device: torch.device) -> int:
    """The index of a CUDA device, the current one's if it does not say."""
    return torch.cuda.current_device() if device.index is None else device.index
