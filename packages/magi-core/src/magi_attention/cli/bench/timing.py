# SPDX-License-Identifier: Apache-2.0
"""Time passes of attention on every rank of a group, of several methods in turns."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.cli.bench.marks import Mark, Marker, cycles_between, is_reached, seconds_between, wait_for
from magi_attention.cli.bench.status_line import StatusLine

Passes = tuple[Callable[[], Tensor], Callable[[Tensor], object]]
"""What computes an output, and what computes its gradients."""

MOST_OF_TURN = 2
"""So many pairs of passes of a method are timed one after another, where several take turns: few, so that a GPU's clock
is about the same for all methods of a cycle."""

ERROR_OF_MEDIAN = 0.929
"""The standard error of a median of n normal numbers is so many times their interquartile range, over the root of n."""

HOST_REPEATS, HOST_REPEATS_S = 5, 0.5
"""How often each pass is called to find how long the host takes, and after how many seconds of passes no more."""


@dataclass(frozen=True)
class Medians:
    """What the passes of a method typically took.

    Attributes:
        forward: median over the timed passes of the slowest rank's time, in seconds. Of several methods in turns, the
            passes of each cycle are scaled before, all methods' alike, to the speed of the median cycle.
        backward: the same for backward passes.
        forward_error: standard error of ``forward``, in seconds, by the quartiles of what the median is taken of; of
            several methods, that of how ``forward`` stands to the others'.
        backward_error: the same for backward passes.
    """

    forward: float
    backward: float
    forward_error: float
    backward_error: float


@dataclass(frozen=True)
class PassTimes(Medians):
    """What passes took.

    Attributes:
        host_forward: until the call of a pass returns, on the slowest rank, with an idle device at the start.
        host_backward: the same for backward passes.
        peak_bytes: the most memory that any rank's tensors took; of several methods that were timed in turns, what a
            pair of passes took besides all that these keep between passes. 0 on a CPU.
        at_equal_clocks: the same medians of what passes would have taken had all run at the mean clock of all: by the
            cycles that a pass took on the rank where it took the most. None where clocks were not read.
    """

    host_forward: float
    host_backward: float
    peak_bytes: int
    at_equal_clocks: Medians | None


def time_in_turns(
    methods: Sequence[Passes],
    device: torch.device,
    warmup: int,
    repeat: int,
    seconds: float = 0.0,
    status: StatusLine | None = None,
    read_clocks: Callable[[], Tensor] | None = None,
) -> list[PassTimes]:
    """Time both passes of several methods, one pair after another without a pause, as layers of a model follow.

    On a GPU, the host is then ahead of the device if it can be, and what it takes to launch a pass is hidden. What it
    takes is measured afterwards, apart. All ranks begin a pass together, and the slowest one counts: else a rank that
    is done early would wait for the others' rows in the next pass, at its expense.

    A GPU at its power limit runs faster and slower for seconds at a time: on an H200, 740 W and 665 W took turns in
    keeping to 700 W on average, 5 % apart in speed. So methods take turns of some passes, in another order in each
    cycle of all of them, and are compared within a cycle: :class:`PassTimes` says how. The first pass of a turn is not
    timed: what the method before still has under way, on streams of its own, would delay it, and its kernels would
    hide the time that those of the pass take to be launched.

    Args:
        methods: the passes of each.
        device: what they compute on.
        warmup: pairs of passes of each method that are not timed.
        repeat: pairs of passes that are, at least.
        seconds: for how long to run more of them.
        status: where to tell which pass runs; None for nowhere.
        read_clocks: see :class:`Marker`. With it, there are medians at equal clocks, too.
    """
    status = status or StatusLine(is_shown=False)
    marker = Marker(device, read_clocks)
    dist.barrier()
    _wait_for(device)
    for number in range(warmup):
        status.count("warming up: pass", number + 1, warmup)
        for passes in methods:
            _mark_passes(passes, marker)
    leading, timed_of_turn = (1, min(repeat, MOST_OF_TURN)) if len(methods) > 1 else (0, 1)
    count = -(-repeat // timed_of_turn)
    if seconds:
        first = _slowest([_mark_passes(passes, marker) for passes in methods], device)
        count = max(count, int(seconds / ((leading + timed_of_turn) * first.sum().item())))  # on all ranks the same
    turns = _take_turns(methods, marker, count, leading, timed_of_turn, status)
    shape = len(methods), count, timed_of_turn, 2
    seconds_taken = _of_turns(turns, device, seconds_between).reshape(shape)
    medians = _medians(seconds_taken)
    at_equal_clocks: Sequence[Medians | None] = [None] * len(methods)
    if read_clocks is not None:
        cycles = _of_turns(turns, device, cycles_between).reshape(shape)
        at_equal_clocks = _medians(cycles * (seconds_taken.sum() / cycles.sum()))
    peaks = [each.peak_bytes for each in turns]
    return [_summarize(*each, device) for each in zip(methods, medians, at_equal_clocks, peaks, strict=True)]


@dataclass
class _Turns:
    """What is known of all turns of a method: the marks of its timed passes, and the most memory of the first turn."""

    marks: list[list[Mark]] = field(default_factory=list)
    peak_bytes: int = 0


def _take_turns(
    methods: Sequence[Passes], marker: Marker, count: int, leading: int, timed: int, status: StatusLine
) -> list[_Turns]:
    """Run so many cycles, in each of which every method has a turn: some leading pairs of passes, and timed ones."""
    turns = [_Turns() for _ in methods]
    counter = _PassCounter(status, count * len(methods) * (leading + timed))
    orders = np.random.default_rng(0)
    device, is_alone = marker.device, len(methods) == 1
    for _ in range(count):
        for number in orders.permutation(len(methods)):
            of_method = turns[number]
            # Once, since the allocator's statistics take the host some tenths of a millisecond.
            reads_memory = device.type == "cuda" and not of_method.marks
            if reads_memory:
                torch.cuda.reset_peak_memory_stats(device)
                of_method.peak_bytes = 0 if is_alone else -torch.cuda.memory_allocated(device)
            for place in range(leading + timed):
                marks = _mark_passes(methods[number], marker)
                counter.add(marks[-1])
                if place >= leading:
                    of_method.marks.append(marks)
            if reads_memory:
                of_method.peak_bytes += torch.cuda.max_memory_allocated(device)
    counter.wait()
    return turns


class _PassCounter:
    """Tells which pair of passes a device is at; the host may be far ahead of it."""

    def __init__(self, status: StatusLine, total: int) -> None:
        self._status, self._total, self._done = status, total, 0
        self._under_way: deque[Mark] = deque()
        status.count("pass", 1, total)

    def add(self, end: Mark) -> None:
        """Add the mark after another pair."""
        self._under_way.append(end)
        while self._under_way and is_reached(self._under_way[0]):
            self._pop()

    def wait(self) -> None:
        """Wait for the device, pair by pair."""
        while self._under_way:
            wait_for(self._under_way[0])
            self._pop()

    def _pop(self) -> None:
        self._under_way.popleft()
        self._done += 1
        if self._done < self._total:
            self._status.count("pass", self._done + 1, self._total)


def compare_in_cycles(seconds: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The typical time of each method and kind of pass, and its standard error, both ``[methods, kinds]`` in seconds.

    What all methods of a cycle have in common, the geometric mean of their times, is replaced by its median over the
    cycles, so that a change of the GPU's speed from cycle to cycle tells neither for nor against a method.

    Args:
        seconds: ``[methods, cycles, passes, kinds]``, of the slowest rank.
    """
    logs = np.log(np.median(seconds, axis=2))
    if len(logs) > 1:
        of_cycle = logs.mean(axis=0)
        logs -= of_cycle - np.median(of_cycle, axis=0)
    low, medians, high = np.exp(np.quantile(logs, [0.25, 0.5, 0.75], axis=1))
    return medians, ERROR_OF_MEDIAN / logs.shape[1] ** 0.5 * (high - low)


def _medians(seconds: NDArray[np.float64]) -> list[Medians]:
    """The medians of each method; the argument is that of :func:`compare_in_cycles`."""
    times, errors = compare_in_cycles(seconds)
    return [Medians(*each) for each in np.concatenate([times, errors], axis=1).tolist()]


def _summarize(
    passes: Passes, medians: Medians, at_equal_clocks: Medians | None, peak: int, device: torch.device
) -> PassTimes:
    """What the group found of one method; also measures the host."""
    repeats = max(1, min(HOST_REPEATS, int(HOST_REPEATS_S / (medians.forward + medians.backward))))
    host = torch.tensor(_host_seconds(*passes, device, repeats), dtype=torch.float64, device=device)
    dist.all_reduce(host, dist.ReduceOp.MAX)
    most = torch.tensor(peak, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    host_forward, host_backward = host.tolist()
    return PassTimes(
        **asdict(medians),
        host_forward=host_forward,
        host_backward=host_backward,
        peak_bytes=int(most),
        at_equal_clocks=at_equal_clocks,
    )


def _mark_passes(passes: Passes, marker: Marker) -> list[Mark]:
    """Run a pair of passes; returns marks before and after each."""
    forward, backward = passes
    marks = [marker.start()]
    out = forward()
    marks += [marker.stop(), marker.start()]
    backward(out)
    return [*marks, marker.stop()]


def _slowest(
    marks: Sequence[list[Mark]], device: torch.device, taken: Callable[[Mark, Mark], float] = seconds_between
) -> Tensor:
    """``[pairs, 2]``: what each pair of passes takes, by default seconds, on the rank where it takes the most."""
    most = torch.tensor([[taken(*each[:2]), taken(*each[2:])] for each in marks], dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most


def _of_turns(
    turns: Sequence[_Turns], device: torch.device, taken: Callable[[Mark, Mark], float]
) -> NDArray[np.float64]:
    """``[methods, pairs, 2]``: what each pair of timed passes took on the rank where it took the most."""
    found: NDArray[np.float64] = torch.stack([_slowest(each.marks, device, taken) for each in turns]).cpu().numpy()
    return found


def _host_seconds(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], object], device: torch.device, repeats: int
) -> list[float]:
    """The least time until the call of each pass returns."""
    least = [float("inf")] * 2
    for _ in range(repeats):
        out = None
        for number in range(2):
            dist.barrier()
            _wait_for(device)
            start = time.perf_counter()
            if out is None:
                out = forward()
            else:
                backward(out)
            least[number] = min(least[number], time.perf_counter() - start)
    return least


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
