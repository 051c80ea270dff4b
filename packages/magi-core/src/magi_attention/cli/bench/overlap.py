# SPDX-License-Identifier: Apache-2.0
"""How much of the communication in a Chrome trace ran while attention kernels did."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.intervals import Intervals, intersect, merge

COMMUNICATION = ("magi: cast", "magi: reduce")
ATTENTION = ("magi: attention",)
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Overlap:
    """Times in seconds that the device was busy with either and with both."""

    communication: float
    attention: float
    both: float

    @property
    def share(self) -> float:
        """The share of the communication that ran beside attention kernels; 1 without any communication."""
        return self.both / self.communication if self.communication else 1.0


def read_overlap(path: Path) -> Overlap | None:
    """Read a trace that ``magi bench --trace`` wrote; None if it has no kernels, as on a CPU.

    A kernel counts as communication, or as attention, if it was launched in a range of that name: the profiler shows
    such a range on the stream of its kernels too.
    """
    data = path.read_bytes()
    trace = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    return overlap_of(trace["traceEvents"])


def overlap_of(events: list[dict[str, Any]]) -> Overlap | None:
    """The same from the events of a trace."""
    kernels = [event for event in events if event.get("cat") in _KERNELS]
    ranges = [event for event in events if event.get("cat") == "gpu_user_annotation"]
    if not kernels:
        return None
    communication = _busy(kernels, [each for each in ranges if each["name"].startswith(COMMUNICATION)])
    attention = _busy(kernels, [each for each in ranges if each["name"].startswith(ATTENTION)])
    both, _, _ = intersect(communication, attention)
    return Overlap(_seconds(communication), _seconds(attention), _seconds(both))


def _busy(kernels: list[dict[str, Any]], ranges: list[dict[str, Any]]) -> Intervals:
    """When any kernel ran that lies in one of the ranges, on the same stream; in nanoseconds, disjoint, ascending."""
    found = [np.empty((0, 2), np.int64)]
    for stream in {each["tid"] for each in ranges}:
        ran = merge(_intervals(kernels, stream))
        found.append(intersect(ran, merge(_intervals(ranges, stream)))[0])
    return merge(np.concatenate(found))


def _intervals(events: list[dict[str, Any]], stream: object) -> NDArray[np.int64]:
    times = [(event["ts"], event["ts"] + event["dur"]) for event in events if event["tid"] == stream]
    return np.rint(np.array(times).reshape(-1, 2) * 1e3).astype(np.int64)


def _seconds(intervals: Intervals) -> float:
    return float((intervals[:, 1] - intervals[:, 0]).sum()) / 1e9
