# SPDX-License-Identifier: Apache-2.0
"""Time passes of attention on every rank of a group, of several methods in turns."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.cli.bench.marks import Mark, Marker, clock_of, seconds_between
from magi_attention.cli.bench.status_line import StatusLine
from magi_attention.cli.bench.turns import ONE_PAIR, Passes, Span, plan_turns, take_turn, take_turns

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
        peak_bytes: the most memory that any rank's tensors took; of several methods that were timed in turns, what
            passes took besides all that these keep between turns. 0 on a CPU.
        at_equal_clocks: the same medians of what passes would have taken had all of a kind run at the same clock, the
            mean of theirs. Of the ranks the slowest clock counts, as the others wait. None where clocks were not read.
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
    """Time both passes of several methods.

    Passes follow one another without a pause. On a GPU, the host is then ahead of the device if it can be, and what it
    takes to launch a pass is hidden. What it takes is measured afterwards, apart. All ranks begin a pass together, and
    the slowest one counts: else a rank that is done early would wait for the others' rows in the next pass, at its
    expense.

    A GPU at its power limit runs faster and slower for seconds at a time: on an H200, 740 W and 665 W took turns in
    keeping to 700 W on average, 5 % apart in speed. So methods take turns, in another order in each cycle of all of
    them, and are compared within a cycle: :class:`Medians` says how. What draws less power also leaves the GPU faster
    for what comes next: among backward passes that often wait, forward passes were 2 % faster than in a row. So a turn
    is forward passes in a row, as layers of a model follow one another, and then the backward pass of the last one, as
    often as it takes; the first passes of either kind are not timed. Of one method alone both kinds alternate.

    Args:
        methods: the passes of each.
        device: what they compute on.
        warmup: pairs of passes of each method that are not timed.
        repeat: passes of each kind that are, at least.
        seconds: for how long to run more of them.
        status: where to tell which pass runs; None for nowhere.
        read_clocks: see :class:`Marker`. With it, there are medians at equal clocks, too.
    """
    status = status or StatusLine(is_shown=False)
    marker = Marker(device, read_clocks)
    dist.barrier()
    _wait_for(device)
    for number in range(warmup):
        status.count("warming up: pair of passes", number + 1, warmup)
        for passes in methods:
            take_turn(passes, marker, ONE_PAIR)
    of_turn, count = ONE_PAIR, repeat
    if len(methods) > 1:
        turns_of_one = [take_turn(passes, marker, ONE_PAIR) for passes in methods]
        pairs = [[*forward, *backward] for forward, backward in turns_of_one]
        of_turn, count = plan_turns(_of_ranks(pairs, device, seconds_between, dist.ReduceOp.MAX), repeat, seconds)
    turns = take_turns(methods, marker, of_turn, count, status)
    kinds = [each.forward for each in turns], [each.backward for each in turns]
    seconds_taken = [_of_ranks(spans, device, seconds_between, dist.ReduceOp.MAX) for spans in kinds]
    medians = _medians(seconds_taken, count)
    at_equal_clocks: Sequence[Medians | None] = [None] * len(methods)
    if read_clocks is not None:
        by_clock = [_at_mean_clock(spans, taken, device) for spans, taken in zip(kinds, seconds_taken, strict=True)]
        at_equal_clocks = _medians(by_clock, count)
    peaks = [each.peak_bytes for each in turns]
    return [_summarize(*each, device) for each in zip(methods, medians, at_equal_clocks, peaks, strict=True)]


def compare_in_cycles(seconds: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The typical time of each method, and its standard error, both ``[methods]`` in seconds.

    What all methods of a cycle have in common, the geometric mean of their times, is replaced by its median over the
    cycles, so that a change of the GPU's speed from cycle to cycle tells neither for nor against a method.

    Args:
        seconds: ``[methods, cycles, passes]``, of the slowest rank.
    """
    logs = np.log(np.median(seconds, axis=2))
    if len(logs) > 1:
        of_cycle = logs.mean(axis=0)
        logs -= of_cycle - np.median(of_cycle)
    low, medians, high = np.exp(np.quantile(logs, [0.25, 0.5, 0.75], axis=1))
    return medians, ERROR_OF_MEDIAN / logs.shape[1] ** 0.5 * (high - low)


def _medians(of_kinds: Sequence[NDArray[np.float64]], count: int) -> list[Medians]:
    """The medians of each method, of forward and backward passes, each ``[methods, passes of all turns]``."""
    found = [compare_in_cycles(each.reshape(len(each), count, -1)) for each in of_kinds]
    (forward, forward_error), (backward, backward_error) = found
    columns = forward, backward, forward_error, backward_error
    return [Medians(*map(float, each)) for each in zip(*columns, strict=True)]


def _at_mean_clock(
    spans: Sequence[Sequence[Span]], seconds: NDArray[np.float64], device: torch.device
) -> NDArray[np.float64]:
    """What passes of one kind, ``[methods, passes]``, would have taken at their mean clock."""
    cycles = seconds * _of_ranks(spans, device, clock_of, dist.ReduceOp.MIN)
    return cycles * float(seconds.sum() / cycles.sum())


def _of_ranks(
    of_methods: Sequence[Sequence[Span]],
    device: torch.device,
    read: Callable[[Mark, Mark], float],
    which: "dist.ReduceOp.RedOpType",
) -> NDArray[np.float64]:
    """``[methods, passes]``: what is read of each pass, of that rank where it is the most or the least."""
    values = [[read(*span) for span in spans] for spans in of_methods]
    of_ranks = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(of_ranks, which)
    found: NDArray[np.float64] = of_ranks.cpu().numpy()
    return found


def _summarize(
    passes: Passes, medians: Medians, at_equal_clocks: Medians | None, peak: int, device: torch.device
) -> PassTimes:
    """What the group found of one method; also measures the host."""
    repeats = max(1, min(HOST_REPEATS, int(HOST_REPEATS_S / (medians.forward + medians.backward))))
    host = torch.tensor(_host_seconds(passes, device, repeats), dtype=torch.float64, device=device)
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


def _host_seconds(passes: Passes, device: torch.device, repeats: int) -> list[float]:
    """The least time until the call of each pass returns."""
    forward, backward = passes
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
