# SPDX-License-Identifier: Apache-2.0
"""What a rank does in each pass, step by step: which kernels run once which rows are there, and what they add to."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.intervals import intersect, merge
from magi_attention.common.slices import SliceTable
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange

MOST_RUNS_HOME = 4
"""Each takes two kernels to clear and two to add, of keys and of values."""

Runs = NDArray[np.int64]
"""``(n, 3)`` rows ``(start, stop, position)``: key rows of the sequence, ascending, and where they lie in a buffer."""


class KernelCall(NamedTuple):
    """One launch of a kernel.

    Attributes:
        queries: the run of the rank's queries that it takes, or of the visitors.
        keys: the run of rows of the key buffer.
        slices: what of these to compute, counted from the start of both runs.
        queries_known: whether earlier calls have results for these queries, which this call's are added to.
        keys_known: the same for the keys and gradients.
    """

    queries: slice
    keys: slice
    slices: SliceTable
    queries_known: bool = False
    keys_known: bool = False


@dataclass(frozen=True, eq=False)
class Step:
    """An exchange, and the kernels that are launched once its rows are there.

    Attributes:
        number: the plan's stage.
        exchange: what brings rows; None where own rows are enough. It names rows of the key buffer.
        calls: the kernels.
        num_keys: rows of the key buffer.
        own_places: where the rank's own rows lie in a key buffer that received rows lie in too; None where they are not
            in it, or where they are the buffer.
        queries_travel: whether the exchange is of queries.
        blank_keys: whether gradients of a key buffer other than the rank's own rows start as zeros.
    """

    number: int
    exchange: ExchangeTable | TwoHopExchange | None
    calls: tuple[KernelCall, ...]
    num_keys: int
    own_places: Runs | None = None
    queries_travel: bool = False
    blank_keys: bool = False

    @property
    def reads_own_alone(self) -> bool:
        """Whether the key buffer is the rank's own rows."""
        return self.exchange is None or self.queries_travel


@dataclass(frozen=True, eq=False)
class Pass:
    """The steps of one pass.

    Attributes:
        steps: in the order in which they are computed.
        blank_queries: whether results of queries start as those of queries without keys, since no call is for some of
            them, or a call finds some known and some not.
        blank_keys: the same for gradients of the rank's own keys, until those of others begin to come home.
        blank_late_keys: the same for those of kernels on own rows after that, which must not touch what comes home.
        home_keys: where nothing but what comes home is known of own keys before those kernels, and it is for few runs
            of these, the runs: all others need neither zeros nor a sum. None elsewhere.
        most_results: how many calls have results for a query, at most.
        most_key_results: how many calls and returning gradients there are for one of the rank's keys, at most.
    """

    steps: tuple[Step, ...]
    blank_queries: bool
    blank_keys: bool
    blank_late_keys: bool
    home_keys: tuple[slice, ...] | None
    most_results: int
    most_key_results: int


@dataclass(frozen=True, eq=False)
class Schedule:
    """What a rank does in both passes.

    Attributes:
        forward: own rows first, while others travel.
        backward: likewise, arranged for itself; the last of several kernels on own rows comes last, while gradients
            travel.
        backward_with_rows: the backward pass where the forward pass left the received rows: own rows last, or in one
            kernel with the received ones where they lie among them.
    """

    forward: Pass
    backward: Pass
    backward_with_rows: Pass

    @property
    def calls(self) -> list[KernelCall]:
        """All kernels of the forward pass."""
        return [call for step in self.forward.steps for call in step.calls]


def make_pass(steps: Sequence[Step], num_queries: int, num_keys: int) -> Pass:
    """A pass of steps without flags: which calls add to results of earlier ones, and whether results start blank.

    Args:
        steps: in their order.
        num_queries: the rank's queries.
        num_keys: its keys.
    """
    queries, own, late = _Coverage(num_queries), _Coverage(num_keys), _Coverage(num_keys)
    flagged, num_returns = [], 0
    for step in steps:
        of_own = late if num_returns else own
        keys = of_own if step.reads_own_alone else _Coverage(step.num_keys)
        calls = []
        for call in step.calls:
            known = False if step.queries_travel else queries.add(call.queries)
            calls.append(call._replace(queries_known=known, keys_known=keys.add(call.keys)))
        if step.own_places is not None:
            of_own.add(slice(0, num_keys))
        num_returns += not step.reads_own_alone
        flagged.append(replace(step, calls=tuple(calls), blank_keys=not keys.is_exact and not step.reads_own_alone))
    return Pass(
        steps=tuple(flagged),
        blank_queries=not queries.is_exact,
        blank_keys=not own.is_exact,
        blank_late_keys=not late.is_exact,
        home_keys=_home_keys(steps, num_keys) if late.most and not own.most else None,
        most_results=queries.most,
        most_key_results=own.most + late.most + num_returns,
    )


def _home_keys(steps: Sequence[Step], num_keys: int) -> tuple[slice, ...] | None:
    """The runs of own keys to which gradients come home, if they are few and none of queries come."""
    if any(step.queries_travel for step in steps):
        return None
    sent = [table.send[:, 1:] for step in steps if step.exchange is not None for table in step.exchange.tables]
    runs = intersect(merge(np.concatenate(sent)), np.array([(0, num_keys)]))[0]  # a second hop also passes others' on
    is_few = len(runs) <= MOST_RUNS_HOME and 2 * int((runs[:, 1] - runs[:, 0]).sum()) <= num_keys
    return tuple(slice(start, stop) for start, stop in runs.tolist()) if is_few else None


class _Coverage:
    """Which of some rows have been written, by runs that were written equally often: their borders, and how often."""

    def __init__(self, num_rows: int) -> None:
        self._borders = [0, num_rows]
        self._times = [0] if num_rows else []
        self._is_exact = True

    def add(self, run: slice) -> bool:
        """Write a run; returns whether any of its rows had been written before."""
        first, end = self._cut(run.start), self._cut(run.stop)
        before = self._times[first:end]
        self._times[first:end] = [times + 1 for times in before]
        known = any(before)
        self._is_exact &= not known or all(before)
        return known

    def _cut(self, row: int) -> int:
        """The number of the run that begins with a row; one that begins before it is cut there."""
        number = bisect_left(self._borders, row)
        if self._borders[number] != row:
            self._borders.insert(number, row)
            self._times.insert(number, self._times[number - 1])
        return number

    @property
    def is_exact(self) -> bool:
        """Whether all rows were written, and each run was either new or known as a whole."""
        return self._is_exact and all(self._times)

    @property
    def most(self) -> int:
        """How often a row was written, at most."""
        return max(self._times, default=0)
