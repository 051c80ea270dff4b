# SPDX-License-Identifier: Apache-2.0
"""Which kernels a rank launches on which rows, and when: a plan's stages, arranged for the least time on its machine.

A stage's exchange is as planned, since all ranks take part in it. Which of the rank's own pairs are computed before its
rows arrive, and which together with theirs, concerns the rank alone. To compute all of them before hides the most
travel, but what the received rows add must then be merged row by row, which with many query heads to a key head takes
longer than the rows travel over fast links. So there are four arrangements, of which each pass takes the one with the
least predicted overhead, unless the backward pass has all rows from the start:

- *apart*: own rows first, and what comes merged with that;
- *together*: one kernel over own and received rows, in their order in the sequence, as if the rank held them all;
- *rest together*: the same, but long runs of queries that need no received rows go before, while these travel;
- *window first*, forward: the same with just as many of the first or last queries, whatever they need, as hide the
  travel, or part of it; what the received rows add to these few is merged.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.intervals import Intervals, intersect, subtract
from magi_attention.common.slices import SliceTable
from magi_attention.plan.build import Plan, Stage, slices_in
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange
from magi_attention.runtime.costs import Costs, PassCosts
from magi_attention.runtime.early import choose_early, in_rows, travel_seconds
from magi_attention.runtime.regular import regular_runs
from magi_attention.runtime.steps import KernelCall, Runs, Schedule, Step, make_pass

REGULAR_GAIN = 0.05
"""The share of a kernel's time that a regular mask saves."""


def make_schedule(plan: Plan, costs: PassCosts) -> Schedule:
    """Arrange the plan's stages."""
    num_queries = int(plan.layout.rows_per_rank[plan.rank])
    num_keys = int(plan.key_layout.rows_per_rank[plan.rank])
    forward = _arrange(plan, num_queries, costs.forward, with_rows=costs.backward)
    backward = _arrange(plan, num_queries, costs.backward)
    receives = any(each.exchange is not None for each in forward)
    with_rows = _with_rows(plan, forward, num_queries, costs.backward) if receives else backward
    own, *others = backward
    if others and own.exchange is None and not own.queries_travel and len(own.calls) > 1:
        before, after = replace(own, calls=own.calls[:-1]), replace(own, calls=own.calls[-1:])
        backward = [before, *others, after]
    return Schedule(*(make_pass(each, num_queries, num_keys) for each in (forward, backward, with_rows)))


def _with_rows(plan: Plan, steps: list[Step], num_queries: int, costs: Costs) -> list[Step]:
    """The backward pass of a forward pass that leaves the rows which it received."""
    own, *others = steps
    if own.own_places is not None and len(own.calls) > 1:
        return [_whole(plan, own, num_queries, costs), *others]
    if own.exchange is not None or not others or any(each.queries_travel for each in others):
        return steps
    whole = _in_one(plan, own, others[0], num_queries, costs)
    return [*others, own] if whole is None else [whole, *others[1:]]


def _in_one(plan: Plan, own: Step, other: Step, num_queries: int, costs: Costs) -> Step | None:
    """What the step of own rows and the next one compute, in fewer kernels, if own rows lie among the received ones.

    None where that saves less than it takes gradients to travel home, which a last kernel on own rows would hide.
    """
    if other.own_places is None or not own.calls:
        return None
    whole = _whole(plan, other, num_queries, costs)
    num_saved = len(own.calls) + len(other.calls) - len(whole.calls)
    return whole if travel_seconds(plan.stages[other.number], costs) < num_saved * costs.regular else None


def _whole(plan: Plan, step: Step, num_queries: int, costs: Costs) -> Step:
    """A step whose rows come among the own ones, for all queries at once, cut only where that is worth it backward."""
    everything, nothing = np.array([(0, num_queries)]), np.empty((0, 2), np.int64)
    return _together(plan, step.number, plan.stages[step.number], nothing, everything, costs)


def _arrange(plan: Plan, num_queries: int, costs: Costs, with_rows: Costs | None = None) -> list[Step]:
    """The steps without flags; the first reads own rows alone.

    ``with_rows`` are the costs of the backward pass which a forward pass leaves the rows that it received.
    """
    num_own = int(plan.key_layout.rows_per_rank[plan.rank])
    everything = [(0, num_queries)]
    first = next((n for n, stage in enumerate(plan.stages) if stage.exchange is not None), None)
    if first is None:
        return [Step(0, None, _calls(plan.stages[0].slices, everything, costs), num_own)]
    stage = plan.stages[first]
    rest = [_as_planned(n, each, num_own, num_queries, costs) for n, each in enumerate(plan.stages) if n > first]
    if any(each.queries_travel for each in plan.stages) or stage.received is None:
        return [_as_planned(n, each, num_own, num_queries, costs) for n, each in enumerate(plan.stages)]
    early = np.empty((0, 2), np.int64) if first == 0 else choose_early(plan, stage, num_queries, costs, with_rows)
    late = subtract(np.array(everything), early)
    if not len(late):
        return [_as_planned(n, each, num_own, num_queries, costs) for n, each in enumerate(plan.stages)]
    own = plan.key_layout.runs_of(plan.rank)
    calls = _calls(slices_in(in_rows(plan.bands, early), own), early.tolist(), costs) if len(early) else ()
    own_step = [Step(0, None, calls, num_own)] if calls else []
    return [*own_step, _together(plan, first, stage, early, late, costs), *rest]


def _as_planned(number: int, stage: Stage, num_own: int, num_queries: int, costs: Costs) -> Step:
    """A stage whose kernels take what it is planned to compute, and only the run of queries that it is for."""
    num_keys = num_own if stage.reads_own else stage.num_received
    if stage.queries_travel:
        keys = slice(0, num_own if len(stage.slices) else 0)
        calls: Sequence[KernelCall] = (KernelCall(slice(0, stage.num_received), keys, stage.slices),)
    elif not len(stage.slices):
        calls = ()
    elif stage.exchange is None:
        calls = _calls(stage.slices, [(0, num_queries)], costs)
    else:
        rows = stage.slices.rows
        calls = _calls(stage.slices, [(int(rows[:, 0].min()), int(rows[:, 1].max()))], costs)
    return Step(number, stage.exchange, tuple(calls), num_keys, queries_travel=stage.queries_travel)


def _together(plan: Plan, number: int, stage: Stage, early: Intervals, late: Intervals, costs: Costs) -> Step:
    """One stage's received rows and the own ones in one buffer, in their order in the sequence.

    The late queries read both; those of the early ones that need any received rows read these alone.
    """
    assert stage.exchange is not None
    assert stage.received is not None
    own = plan.key_layout.runs_of(plan.rank)
    both = np.concatenate([own, stage.received])
    order = np.argsort(both[:, 0])
    length = (both[:, 1] - both[:, 0])[order]
    start = np.empty(len(both), np.int64)
    start[order] = np.cumsum(length) - length
    own_places = np.column_stack([own[:, 2], own[:, 2] + own[:, 1] - own[:, 0], start[: len(own)]])
    place = start[len(own) :]
    buffer = _joined(np.column_stack([both[order, :2], start[order]]))
    exchange = _received_at(stage.exchange, stage.received, place, int(length.sum()))
    calls = _calls(slices_in(in_rows(plan.bands, late), buffer), late.tolist(), costs)
    received = np.column_stack([stage.received[:, :2], place])
    calls += _calls(slices_in(in_rows(plan.bands, early), received), early.tolist(), costs)
    return Step(number, exchange, calls, int(length.sum()), own_places[np.argsort(own_places[:, 0])])


def _joined(runs: Runs) -> Runs:
    """Join runs that go on in the sequence; their rows are packed."""
    first = np.flatnonzero(np.append(True, runs[1:, 0] != runs[:-1, 1]))
    joined = runs[first]
    joined[:, 1] = runs[np.append(first[1:], len(runs)) - 1, 1]
    return joined


def _received_at(
    exchange: ExchangeTable | TwoHopExchange, received: Runs, place: NDArray[np.int64], num_keys: int
) -> ExchangeTable | TwoHopExchange:
    """The exchange with the received runs at other places, in a buffer of ``num_keys`` rows."""
    last_hop = exchange.intra if isinstance(exchange, TwoHopExchange) else exchange
    lies = np.column_stack([received[:, 2], received[:, 2] + received[:, 1] - received[:, 0]])
    pieces, owner, run = intersect(last_hop.recv[:, 1:], lies)
    moved = pieces + (place - received[:, 2])[run, None]
    recv = np.column_stack([last_hop.recv[owner, 0], moved])
    last_hop = replace(last_hop, recv=recv, num_received=num_keys)
    return replace(exchange, intra=last_hop) if isinstance(exchange, TwoHopExchange) else last_hop


def _calls(slices: SliceTable, runs: Iterable[Sequence[int]], costs: Costs) -> tuple[KernelCall, ...]:
    """The kernels for some runs of queries; a run is cut where that makes its masks regular, if it is worth it."""
    calls = []
    for start, stop in runs:
        parts = regular_runs(slices, start, stop)
        if len(parts) > 1:
            seconds = costs.pair * slices.clip_rows(start, stop).area()
            if seconds < 2 * costs.least_work or seconds * REGULAR_GAIN < (len(parts) - 1) * costs.regular:
                parts = [(start, stop)]
        calls += [_call(slices, *part) for part in parts]
    return tuple(call for call in calls if len(call.slices))


def _call(slices: SliceTable, first: int, last: int) -> KernelCall:
    """The kernel for a run of queries and for the run of keys that they see."""
    rows = slices.rows
    if len(rows) and (rows[:, 0].min() < first or rows[:, 1].max() > last):
        slices = slices.clip_rows(first, last)
        rows = slices.rows
    if not len(rows):
        return KernelCall(slice(first, last), slice(0, 0), slices)
    keys = slice(int(rows[:, 2].min()), int(rows[:, 3].max()))
    moved = slices.shift(-first, -keys.start) if first or keys.start else slices
    return KernelCall(slice(first, last), keys, moved)
