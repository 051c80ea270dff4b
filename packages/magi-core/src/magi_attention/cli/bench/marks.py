# SPDX-License-Identifier: Apache-2.0
"""Moments of a device's work, and the time and the clock between them."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Mark(NamedTuple):
    """A moment of a device: an event, or seconds of the host on a CPU; and its clocks, where they are read."""

    at: "torch.cuda.Event | float"
    clocks: Tensor | None


class Marker:
    """Marks where passes start and stop.

    Args:
        device: what computes them.
        read_clocks: reads its clocks in stream order, ``[multiprocessors, 2]`` int64 cycles and nanoseconds, zeros
            where they are not read. None to read none.
    """

    def __init__(self, device: torch.device, read_clocks: Callable[[], Tensor] | None = None) -> None:
        self.device, self._read_clocks = device, read_clocks

    def start(self) -> Mark:
        """A mark, after which the devices of all ranks go on together; on GPUs the hosts don't wait."""
        if self.device.type == "cuda":
            dist.all_reduce(torch.empty(1, device=self.device))
        else:
            dist.barrier()
        clocks = self._clocks()  # not timed
        return Mark(self._now(), clocks)

    def stop(self) -> Mark:
        """A mark after what was launched since the start."""
        return Mark(self._now(), self._clocks())

    def _clocks(self) -> Tensor | None:
        return None if self._read_clocks is None else self._read_clocks()

    def _now(self) -> "torch.cuda.Event | float":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def is_reached(mark: Mark) -> bool:
    """Whether the device is there."""
    return isinstance(mark.at, float) or bool(mark.at.query())


def wait_for(mark: Mark) -> None:
    """Wait until the device is there."""
    if not isinstance(mark.at, float):
        mark.at.synchronize()


def seconds_between(start: Mark, stop: Mark) -> float:
    """Seconds from one mark to the other; waits for it."""
    if isinstance(start.at, float) or isinstance(stop.at, float):
        assert isinstance(start.at, float)
        assert isinstance(stop.at, float)
        return stop.at - start.at
    wait_for(stop)
    return float(start.at.elapsed_time(stop.at)) / 1e3


def clock_of(start: Mark, stop: Mark) -> float:
    """The device's clock in Hz between two marks, both of which read it."""
    assert start.clocks is not None
    assert stop.clocks is not None
    return clock_between(start.clocks, stop.clocks)


def clock_between(before: Tensor, after: Tensor) -> float:
    """The clock in Hz between two readings, as :class:`Marker` has them; zeros don't count."""
    is_read = (before[:, 1] > 0) & (after[:, 1] > 0)
    passed = (after - before)[is_read].double()
    return float((passed[:, 0] / passed[:, 1]).median()) * 1e9
