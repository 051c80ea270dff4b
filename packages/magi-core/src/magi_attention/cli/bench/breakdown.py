# SPDX-License-Identifier: Apache-2.0
"""Where the time of a trace goes on each CUDA stream: by named range, and idle."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
UNNAMED, IDLE = "other", "idle"


@dataclass(frozen=True)
class Share:
    """A share of a stream's time.

    Attributes:
        stream: the stream.
        name: of the innermost range that the kernels were launched in; ``"other"`` outside of all, ``"idle"`` for the
            time between kernels.
        kernels: how many.
        seconds: how long they ran.
    """

    stream: int
    name: str
    kernels: int
    seconds: float


def break_down(events: Sequence[dict[str, Any]]) -> list[Share]:
    """Break down a Chrome trace, stream by stream, in the order in which the names first occur."""
    streams: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    ranges: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in KERNELS:
            streams[event["tid"]].append(event)
        elif event.get("cat") == "gpu_user_annotation" and event["name"].startswith("magi: "):
            ranges[event["tid"]].append(event)
    shares = []
    for stream, kernels in sorted(streams.items()):
        kernels.sort(key=lambda event: event["ts"])
        totals: dict[str, tuple[int, float]] = {}
        idle, last = 0.0, kernels[0]["ts"]
        for kernel in kernels:
            name = _name(kernel, ranges[stream])
            count, microseconds = totals.get(name, (0, 0.0))
            totals[name] = count + 1, microseconds + kernel["dur"]
            idle += max(kernel["ts"] - last, 0.0)
            last = max(last, kernel["ts"] + kernel["dur"])
        totals[IDLE] = 0, idle
        shares += [Share(stream, name, count, time / 1e6) for name, (count, time) in totals.items()]
    return shares


def _name(kernel: dict[str, Any], ranges: Sequence[dict[str, Any]]) -> str:
    """The shortest range around a kernel's start."""
    start = kernel["ts"]
    around = [each for each in ranges if each["ts"] <= start <= each["ts"] + each["dur"]]
    return min(around, key=lambda each: each["dur"])["name"].removeprefix("magi: ") if around else UNNAMED
