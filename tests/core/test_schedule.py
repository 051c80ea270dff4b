# SPDX-License-Identifier: Apache-2.0
"""However a rank arranges its stages, its kernels compute each of its pairs once, with the rows that have come."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common import packed
from magi_attention.common.slices import SliceTable
from magi_attention.config import LocalityDispatchAlg
from magi_attention.plan.build import build_plans
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange
from magi_attention.plan.layout import Layout
from magi_attention.plan.rates import LayerShape, default_rates
from magi_attention.plan.stages import StageOptions
from magi_attention.runtime import early
from magi_attention.runtime.costs import ROWS_OF_WAVE, Costs, PassCosts
from magi_attention.runtime.regular import MOST_RUNS, regular_runs
from magi_attention.runtime.schedule import make_schedule
from magi_attention.runtime.steps import Pass, Schedule, Step
from tests.core.test_plan import cast, dense_count, layouts, two_hop_cast

REST = {"pair": 1.0, "summed_row": 0.0, "call": 0.0, "merge": 0.0, "regular": 0.0, "least_work": 0.0, "window": 2}
COSTS = {
    "together": Costs(fetched_row=0.0, exchange=0.0, merged_row=1.0, **REST),
    "apart": Costs(fetched_row=1e9, exchange=1e9, merged_row=0.0, **REST),
    "rest together": Costs(fetched_row=0.1, exchange=5.0, merged_row=1e6, **REST),
    "window first": Costs(fetched_row=0.5, exchange=50.0, merged_row=1.0, **REST),
}


def in_both_passes(costs: Costs, backward_regular: float = 0.0) -> PassCosts:
    """Both passes by the same costs, but backward without windows, and cut where masks become regular or, if that is
    dear, not."""
    return PassCosts(costs, replace(costs, window=None, regular=backward_regular))


@pytest.fixture(autouse=True)
def short_runs_count(monkeypatch):
    monkeypatch.setattr(early, "LEAST_EARLY_ROWS", 1)
    monkeypatch.setattr(early, "LEAST_EARLY_SHARE", 1000)


def last_hop(step: Step) -> ExchangeTable:
    assert step.exchange is not None
    return step.exchange.intra if isinstance(step.exchange, TwoHopExchange) else step.exchange


def key_buffers(steps: list[Step], own: list[np.ndarray], per_node: int) -> list[np.ndarray]:
    """The global key rows in every rank's buffer of one step, which each rank may have arranged its own way."""
    buffers, exchanges, places = [], [], []
    for step, rows in zip(steps, own, strict=True):
        table = last_hop(step)
        assert table.num_received == step.num_keys
        buffer = np.full(step.num_keys, -1)
        for start, stop, place in [] if step.own_places is None else step.own_places.tolist():
            assert (buffer[place : place + stop - start] == -1).all()
            buffer[place : place + stop - start] = rows[start:stop]
        buffers.append(buffer)
        # What travels is carried out on buffers that hold nothing else.
        named = np.flatnonzero(np.isin(np.arange(step.num_keys), rows_named(table)))
        recv = table.recv.copy()
        recv[:, 1:] = np.searchsorted(named, recv[:, 1:])
        table = replace(table, recv=recv, num_received=len(named))
        is_two_hop = isinstance(step.exchange, TwoHopExchange)
        exchanges.append(replace(step.exchange, intra=table) if is_two_hop else table)
        places.append(named)
    is_two_hop = isinstance(exchanges[0], TwoHopExchange)
    received = two_hop_cast(exchanges, own, per_node) if is_two_hop else cast(exchanges, own)
    for buffer, place, rows in zip(buffers, places, received, strict=True):
        assert (buffer[place] == -1).all()
        buffer[place] = rows
        assert (buffer >= 0).all()
    return buffers


def rows_named(table: ExchangeTable) -> np.ndarray:
    return np.concatenate([np.arange(start, stop) for _, start, stop in table.recv.tolist()] or [np.empty(0, int)])


def steps_of(passes: list[Pass], number: int) -> list[Step]:
    """Every rank's step with the exchange of a stage."""
    steps = [[step for step in of.steps if step.number == number and step.exchange] for of in passes]
    assert all(len(each) == 1 for each in steps), "every rank takes part in every exchange, once"
    return [step for (step,) in steps]


def check_pass(of: Pass, num_queries: int, num_own: int) -> None:
    """Follow the flags: results are blank, or written before they are added to."""
    queries = np.full(num_queries, 1 if of.blank_queries else 0)
    keys = np.full(num_own, 1 if of.blank_keys else 0)
    late = np.full(num_own, 1 if of.blank_late_keys else 0)
    comes_home = False
    for step in of.steps:
        mine = late if comes_home else keys
        sums = mine if step.reads_own_alone else np.full(step.num_keys, 1 if step.blank_keys else 0)
        for call in step.calls:
            for total, run, known in ((queries, call.queries, call.queries_known), (sums, call.keys, call.keys_known)):
                if known:
                    assert total[run].all()
                total[run] += 1
        if step.own_places is not None:
            mine += 1
        if not step.reads_own_alone:
            comes_home = True
            assert keys.all()
    assert queries.all() or not any(step.calls for step in of.steps)
    assert of.most_results >= (queries - of.blank_queries).max(initial=0)
    num_returns = sum(step.exchange is not None for step in of.steps)
    most = (keys - of.blank_keys).max(initial=0) + (late - of.blank_late_keys).max(initial=0)
    assert of.most_key_results == num_returns + most
    if of.home_keys is not None:
        assert not (keys - of.blank_keys).any(), "only what comes home is known of own keys"
        assert late.all()
        home, sent = np.zeros(num_own, bool), np.zeros(num_own, bool)
        for run in of.home_keys:
            home[run] = True
        for step in of.steps:
            for table in step.exchange.tables if step.exchange else ():
                for _, start, stop in table.send.tolist():
                    sent[start:stop] = True  # what a second hop passes on lies behind the rank's own
        np.testing.assert_array_equal(home, sent)


@pytest.mark.parametrize("name", sorted(COSTS))
@given(
    case=layouts(), degree=st.integers(0, 3), per_node=st.sampled_from([None, 1, 2]), dear=st.sampled_from([0.0, 1e9])
)
@settings(max_examples=80, deadline=None)
def test_every_pair_once(name, case, degree, per_node, dear):
    slices, layout = case
    num_ranks = layout.num_ranks
    if per_node is not None and num_ranks % per_node:
        per_node = 1
    mesh_shape = None if per_node is None else (num_ranks // per_node, per_node)
    options = StageOptions(degree=degree, min_piece=2)
    plans = build_plans(slices, layout, range(num_ranks), options, mesh_shape=mesh_shape)
    schedules = [make_schedule(plan, in_both_passes(COSTS[name], dear)) for plan in plans]
    own = [np.concatenate([np.arange(a, b) for a, b, _ in layout.runs_of(r).tolist()]) for r in range(num_ranks)]
    counts = [np.zeros((layout.total, layout.total), int) for _ in range(3)]
    numbers = sorted({step.number for each in schedules for step in each.forward.steps if step.exchange is not None})
    forward, backward = (
        {number: key_buffers(steps_of(passes, number), own, per_node or 1) for number in numbers}
        for passes in ([each.forward for each in schedules], [each.backward for each in schedules])
    )
    for rank, each in enumerate(schedules):
        passes = (each.forward, forward), (each.backward, backward), (each.backward_with_rows, forward)
        for count, (of, buffers) in zip(counts, passes, strict=True):
            check_pass(of, len(own[rank]), len(own[rank]))
            assert [step.number for step in of.steps if step.exchange is not None] == numbers
            for step in of.steps:
                keys = own[rank] if step.exchange is None else buffers[step.number][rank]
                for call in step.calls:
                    rows, columns = own[rank][call.queries], keys[call.keys]
                    part = dense_count(call.slices, len(rows), len(columns))
                    count[np.ix_(rows, columns)] += part
    for count in counts:
        assert np.array_equal(count, dense_count(slices, layout.total, layout.total))


def two_ranks(slices: SliceTable, tokens: int, costs: PassCosts) -> list[Schedule]:
    layout = make_layout(
        slices, num_real=tokens, total=tokens, chunk_size=tokens // 16, num_ranks=2, algorithm=LocalityDispatchAlg()
    )
    return [make_schedule(plan, costs) for plan in build_plans(slices, layout, range(2), StageOptions(degree=1))]


def test_fast_links_leave_nothing_to_merge_backward():
    tokens = 1 << 16
    rates = replace(default_rates("H200"), nvlink_gbs=4000.0)
    costs = PassCosts.of_layer(rates, LayerShape(64, 8, 128), ranks_share_node=True)
    for schedule in two_ranks(SliceTable([[0, tokens, 0, tokens, 1]]), tokens, costs):
        assert schedule.backward.most_results == 1
        for step in schedule.backward.steps:
            for call in step.calls:
                assert call.slices.rows[:, 4].tolist() == [1], "each kernel has a plain causal mask"


def test_few_queries_hide_the_travel_where_all_need_what_comes():
    tokens = 1 << 16
    costs = PassCosts.of_layer(default_rates("H200"), LayerShape(64, 8, 128), ranks_share_node=True)
    for schedule in two_ranks(SliceTable([[0, tokens, 0, tokens, 0]]), tokens, costs):
        first, second = schedule.forward.steps
        (window,) = first.calls
        assert 0 < window.queries.stop - window.queries.start < tokens // 16
        assert second.own_places is not None
        assert [call.queries for call in second.calls if call.queries_known] == [window.queries]
        assert all(call.slices.rows[:, 4].tolist() == [0] for call in schedule.calls)


def test_half_of_the_queries_hide_a_travel_that_more_would_hide_safely():
    tokens, num_ranks = 1 << 15, 4
    rates = replace(default_rates("H200"), nvlink_gbs=70.0)
    costs = PassCosts.of_layer(rates, LayerShape(64, 8, 128), ranks_share_node=True)
    layout = Layout(tokens, tokens, tokens // num_ranks, num_ranks, np.arange(num_ranks))
    slices = SliceTable([[0, tokens, 0, tokens, 0]])
    for plan in build_plans(slices, layout, range(num_ranks), StageOptions(degree=1)):
        first, second = make_schedule(plan, costs).forward.steps
        (window,) = first.calls
        num_early = window.queries.stop - window.queries.start
        assert tokens // num_ranks // 2 - ROWS_OF_WAVE // 64 <= num_early <= tokens // num_ranks // 2
        travel = tokens * 3 // 4 * costs.forward.fetched_row
        assert window.slices.area() * costs.forward.pair < early.WINDOW_SLACK * travel
        assert [call.queries for call in second.calls if call.queries_known] == [window.queries]


def test_who_sends_more_than_it_receives_hides_that():
    tokens = 1 << 16
    costs = PassCosts.of_layer(default_rates("H200"), LayerShape(64, 8, 128), ranks_share_node=True)
    receives_least = two_ranks(SliceTable([[0, tokens, 0, tokens, 1]]), tokens, costs)[1]
    (window,) = receives_least.forward.steps[0].calls
    travel = costs.forward.exchange + tokens // 2 * costs.forward.fetched_row
    assert window.slices.area() * costs.forward.pair > travel
    assert (window.queries.stop - window.queries.start) * 64 >= ROWS_OF_WAVE


def test_with_all_rows_at_hand_one_kernel_does_backward_what_two_do_forward():
    costs = PassCosts.of_layer(default_rates("H200"), LayerShape(64, 8, 128), ranks_share_node=True)
    for tokens, num_kernels in ((1 << 14, 1), (1 << 16, 2)):
        rank0, _ = two_ranks(SliceTable([[0, tokens, 0, tokens, 1]]), tokens, costs)
        first, second = rank0.forward.steps
        assert len(first.calls) == len(second.calls) == 1
        assert second.own_places is not None
        of = rank0.backward_with_rows
        assert sum(len(step.calls) for step in of.steps) == num_kernels
        assert sum(step.exchange is not None for step in of.steps) == 1


def test_a_few_rows_that_come_take_no_kernel_of_their_own_backward():
    tokens, half = 1 << 14, 1 << 13
    costs = PassCosts.of_layer(default_rates("H200"), LayerShape(64, 8, 128), ranks_share_node=True)
    slices, layout = packed.varlen([0, half - 100, half + 3000, tokens]), Layout(tokens, tokens, half, 2, np.arange(2))
    gets_nothing, gets_100 = (
        make_schedule(plan, costs) for plan in build_plans(slices, layout, range(2), StageOptions(degree=1))
    )
    assert [step.exchange is None for step in gets_nothing.forward.steps] == [True, False]
    for of in (gets_100.backward, gets_100.backward_with_rows):
        (step,) = of.steps
        assert step.num_keys == half + 100
        assert len(step.calls) == 1


def test_what_is_cut_to_be_regular_forward_stays_one_kernel_backward():
    tokens = 1 << 10
    schedules = two_ranks(SliceTable([[0, tokens, 0, tokens, 1]]), tokens, in_both_passes(COSTS["together"], 1e9))
    assert [len(each.forward.steps[0].calls) for each in schedules] == [2, 1]
    for schedule in schedules:
        for of in (schedule.backward, schedule.backward_with_rows):
            (step,) = of.steps
            assert len(step.calls) == 1
            assert not of.blank_queries
            assert not step.blank_keys


def test_rows_fetched_again_are_not_waited_for_by_a_few_queries_backward():
    tokens = 1 << 17
    slices = SliceTable([[0, tokens, 0, tokens, 0]])
    layout = make_layout(
        slices, num_real=tokens, total=tokens, chunk_size=tokens // 16, num_ranks=4, algorithm=LocalityDispatchAlg()
    )
    costs = PassCosts.of_layer(default_rates("H200"), LayerShape(64, 8, 128), ranks_share_node=True)
    for plan in build_plans(slices, layout, range(4), StageOptions(degree=1)):
        schedule = make_schedule(plan, costs)
        assert len(schedule.calls) == 3, "a window, the rest, and what the received rows add to the window"
        for of in (schedule.backward, schedule.backward_with_rows):
            assert sum(len(step.calls) for step in of.steps) <= 2
            assert all(call.queries == slice(0, tokens // 4) for step in of.steps for call in step.calls)


def test_gradients_that_come_home_to_few_keys_are_added_to_these_alone():
    tokens = 200
    window = SliceTable([[0, 10, 0, 10, 1], [10, tokens, 0, tokens, 3]])  # every query sees the 10 keys before it
    layout = Layout(tokens, tokens, tokens // 2, 2, np.arange(2))
    plans = build_plans(window, layout, range(2), StageOptions(degree=1))
    first, second = (make_schedule(plan, in_both_passes(COSTS["apart"])) for plan in plans)
    assert first.backward_with_rows.home_keys == (slice(90, 100),)
    assert second.backward_with_rows.home_keys == ()
    assert first.forward.home_keys is None


def test_slow_links_are_hidden_behind_all_own_rows():
    tokens = 1 << 16
    costs = PassCosts.of_layer(default_rates("H200"), LayerShape(8, 8, 128), ranks_share_node=False)
    for schedule in two_ranks(SliceTable([[0, tokens, 0, tokens, 0]]), tokens, costs):
        first, second = schedule.forward.steps
        assert first.exchange is None
        assert second.own_places is None
        assert [step.number for step in schedule.backward_with_rows.steps] == [1, 0]


def test_masks_are_cut_where_they_become_regular():
    causal_then_more = SliceTable([[0, 100, 0, 100, 1], [100, 200, 0, 400, 0], [100, 200, 400, 500, 1]])
    assert regular_runs(causal_then_more, 0, 200) == [(0, 100), (100, 200)]
    assert regular_runs(packed.varlen([0, 50, 120, 200]), 0, 200) == [(0, 200)]
    assert regular_runs(SliceTable([[0, 40, 0, 90, 0], [40, 80, 0, 90, 0], [80, 99, 90, 95, 0]]), 0, 99) == [(0, 99)]
    assert regular_runs(SliceTable([[0, 40, 0, 40, 0], [60, 100, 60, 90, 0]]), 0, 100) == [(0, 40), (40, 60), (60, 100)]
    stairs = SliceTable([[20 * n, 20 * n + 20, 0, 20 * n + 20, 0] for n in range(MOST_RUNS + 1)])
    assert regular_runs(stairs, 0, 20 * MOST_RUNS + 20) == [(0, 20 * MOST_RUNS + 20)]
