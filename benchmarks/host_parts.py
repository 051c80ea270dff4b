# SPDX-License-Identifier: Apache-2.0
"""Which part of the code the host's time goes to, for ``host_time.py --parts``.

Functions at the seams between parts are replaced by ones that take the time. What a part calls of another one counts
for that one alone; what belongs to none, autograd and the walk through the steps, is the rest. Each crossing of a seam
takes some 0.3 us itself, most of which counts for the caller's part.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

from magi_attention.comm import reduction, words
from magi_attention.comm.alltoall import AllToAllCollectives
from magi_attention.comm.work import StreamWork
from magi_attention.kernels.registry import installed_backends
from magi_attention.runtime import forward

Result = TypeVar("Result")

SEAMS: dict[str, list[tuple[Any, str]]] = {
    "exchanges": [(AllToAllCollectives, "cast"), (AllToAllCollectives, "reduce"), (StreamWork, "wait")],
    "transfers": [(AllToAllCollectives, "_send")],
    "rows": [(words, "_move"), (reduction, "add_segments")],
    "merges": [(forward, "merge_into")],
}
KERNELS = ("forward", "forward_into", "forward_onto", "backward", "backward_into", "backward_keys_first")
REST = "rest"


class Parts:
    """Takes the time of all parts, from when it is made on; of kernels, if they are prepared after that."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        for name, functions in SEAMS.items():
            for owner, function in functions:
                setattr(owner, function, self._timed(name, getattr(owner, function)))
        for backend in installed_backends().values():
            for function in KERNELS:
                if hasattr(backend, function):
                    setattr(backend, function, self._timed("kernels", getattr(backend, function)))

    def _timed(self, name: str, function: Callable[..., Result]) -> Callable[..., Result]:
        def run(*arguments: Any, **options: Any) -> Result:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                taken = time.perf_counter() - start
                self._seconds[name] += taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        return run

    def of(self, run: Callable[[], Result]) -> tuple[Result, dict[str, float]]:
        """Run something; returns its result, and the microseconds of each part."""
        self._seconds.clear()
        result = self._timed(REST, run)()
        return result, {name: seconds * 1e6 for name, seconds in self._seconds.items()}

    def measure(
        self, passes: tuple[Callable[[], Any], Callable[[Any], object]], repeat: int, idle: Callable[[], object]
    ) -> None:
        """Print the medians of a forward and a backward pass, each begun when ``idle`` returns."""
        calls: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
        for _ in range(repeat):
            idle()
            out, of_forward = self.of(passes[0])
            idle()
            _, of_backward = self.of(lambda out=out: passes[1](out))  # type: ignore[misc]
            for each, of_pass in zip(calls, (of_forward, of_backward), strict=True):
                each.append(of_pass)
        for name in ("kernels", *SEAMS, REST):
            medians = [statistics.median(call.get(name, 0.0) for call in of_pass[repeat // 4 :]) for of_pass in calls]
            if any(medians):
                print(f"{'':31}{name:14}", *(f"{median:10.0f}" for median in medians), flush=True)
