# SPDX-License-Identifier: Apache-2.0
"""Turns of methods whose passes are timed: how many passes each has, and when they start and stop."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from magi_attention.cli.bench.marks import Mark, Marker, is_reached, wait_for
from magi_attention.cli.bench.status_line import StatusLine

Passes = tuple[Callable[[], Any], Callable[[Any], object]]
"""A forward pass, and the backward one of what it returns; where methods take turns, that is called several times."""

TIMED_S, LEAST_TIMED, MOST_TIMED = 0.2, 2, 100
"""In a turn passes of one kind are timed for about so long, but at least and at most so many, after half as many more
that are not."""

LEAST_CYCLES = 2
"""The fewest turns of each method."""


class Span(NamedTuple):
    """A pass: the marks before and after it."""

    start: Mark
    stop: Mark


class Counts(NamedTuple):
    """How many passes of one kind a turn has, in a row: first those that are not timed."""

    leading: int
    timed: int


OfTurn = tuple[Counts, Counts]
"""The forward and the backward passes of a turn."""

ONE_PAIR: OfTurn = Counts(0, 1), Counts(0, 1)


def plan_turns(first: NDArray[np.float64], repeat: int, seconds: float) -> tuple[OfTurn, int]:
    """How many passes a turn of each method has, and how many turns: the same for all methods.

    Args:
        first: ``[methods, 2]``, seconds of a forward and a backward pass.
        repeat: passes of each kind that are timed in all, at least.
        seconds: for how long to run more of them.
    """
    timed = [min(max(math.ceil(TIMED_S / mean), LEAST_TIMED), MOST_TIMED) for mean in first.mean(axis=0).tolist()]
    forward, backward = (Counts(math.ceil(each / 2), each) for each in timed)
    cycle = (first * [sum(forward), sum(backward)]).sum()
    enough = -(-repeat // min(forward.timed, backward.timed))
    return (forward, backward), max(LEAST_CYCLES, enough, int(seconds / cycle))


@dataclass
class Turns:
    """All turns of a method.

    Attributes:
        forward: its forward passes that are timed, turn by turn.
        backward: the same for backward passes.
        peak_bytes: the most memory that tensors took in the first turn; where several methods take turns, besides all
            that these keep between turns. 0 on a CPU.
    """

    forward: list[Span] = field(default_factory=list)
    backward: list[Span] = field(default_factory=list)
    peak_bytes: int = 0


def take_turns(
    methods: Sequence[Passes], marker: Marker, of_turn: OfTurn, count: int, status: StatusLine
) -> list[Turns]:
    """Run so many cycles, in each of which every method has a turn, in another order."""
    turns = [Turns() for _ in methods]
    counter = _PassCounter(status, count * len(methods) * sum(map(sum, of_turn)))
    orders = np.random.default_rng(0)
    device, is_alone = marker.device, len(methods) == 1
    for _ in range(count):
        for number in orders.permutation(len(methods)):
            of_method = turns[number]
            # Once, since the allocator's statistics take the host some tenths of a millisecond.
            reads_memory = device.type == "cuda" and not of_method.forward
            if reads_memory:
                torch.cuda.reset_peak_memory_stats(device)
                of_method.peak_bytes = 0 if is_alone else -torch.cuda.memory_allocated(device)
            forward, backward = take_turn(methods[number], marker, of_turn, counter.add)
            of_method.forward += forward
            of_method.backward += backward
            if reads_memory:
                of_method.peak_bytes += torch.cuda.max_memory_allocated(device)
    counter.wait()
    return turns


def take_turn(
    passes: Passes, marker: Marker, of_turn: OfTurn, done: Callable[[Mark], object] = lambda _: None
) -> tuple[list[Span], list[Span]]:
    """Run forward passes in a row, and then backward passes of the last one; returns those that are to be timed.

    Args:
        passes: of a method.
        marker: marks them.
        of_turn: how many.
        done: is told the mark after each pass.
    """
    forward, backward = passes
    result: Any = None

    def attend() -> None:
        nonlocal result
        result = None  # not to be kept beside the next one
        result = forward()

    spans: tuple[list[Span], list[Span]] = [], []
    for taken, counts, run in zip(spans, of_turn, (attend, lambda: backward(result)), strict=True):
        for place in range(sum(counts)):
            start = marker.start()
            run()
            span = Span(start, marker.stop())
            done(span.stop)
            if place >= counts.leading:
                taken.append(span)
    return spans


class _PassCounter:
    """Tells which pass a device is at; the host may be far ahead of it."""

    def __init__(self, status: StatusLine, total: int) -> None:
        self._status, self._total, self._done = status, total, 0
        self._under_way: deque[Mark] = deque()
        status.count("pass", 1, total)

    def add(self, end: Mark) -> None:
        """Add the mark after another pass."""
        self._under_way.append(end)
        while self._under_way and is_reached(self._under_way[0]):
            self._pop()

    def wait(self) -> None:
        """Wait for the device, pass by pass."""
        while self._under_way:
            wait_for(self._under_way[0])
            self._pop()

    def _pop(self) -> None:
        self._under_way.popleft()
        self._done += 1
        if self._done < self._total:
            self._status.count("pass", self._done + 1, self._total)
