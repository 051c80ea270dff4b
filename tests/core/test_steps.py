# SPDX-License-Identifier: Apache-2.0
"""Which calls of a pass add to earlier results, against rows one by one; and how little memory it takes to know."""

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.common.slices import SliceTable
from magi_attention.plan.build import build_plans
from magi_attention.plan.layout import Layout
from magi_attention.plan.rates import LayerShape, default_rates
from magi_attention.plan.stages import StageOptions
from magi_attention.runtime.costs import PassCosts
from magi_attention.runtime.schedule import make_schedule
from magi_attention.runtime.steps import KernelCall, Step, make_pass

NUM_QUERIES, NUM_KEYS = 12, 9


def runs(num_rows: int) -> st.SearchStrategy[slice]:
    rows = st.integers(0, num_rows)
    return st.tuples(rows, rows).map(lambda ends: slice(*sorted(ends)))


@given(st.lists(st.tuples(runs(NUM_QUERIES), runs(NUM_KEYS)), max_size=6))
def test_calls_know_what_earlier_ones_wrote(places: list[tuple[slice, slice]]) -> None:
    calls = tuple(KernelCall(queries, keys, SliceTable([])) for queries, keys in places)
    made = make_pass([Step(0, None, calls, NUM_KEYS)], NUM_QUERIES, NUM_KEYS)
    times, is_exact = [np.zeros(NUM_QUERIES, int), np.zeros(NUM_KEYS, int)], [True, True]
    for call in made.steps[0].calls:
        for side, (run, known) in enumerate(((call.queries, call.queries_known), (call.keys, call.keys_known))):
            before = times[side][run]
            assert known == before.any()
            is_exact[side] &= not known or bool(before.all())
            times[side][run] += 1
    blank = [not (exact and each.all()) for exact, each in zip(is_exact, times, strict=True)]
    assert [made.blank_queries, made.blank_keys] == blank
    assert [made.most_results, made.most_key_results] == [each.max() for each in times]


def test_memory_of_a_schedule_does_not_grow_with_rows() -> None:
    total = 1 << 27
    slices = SliceTable([[0, total, 0, total, 0]])
    layout = Layout(total, total, total // 2, 2, np.arange(2))
    (plan,) = build_plans(slices, layout, [1], StageOptions(degree=1))
    costs = PassCosts.of_layer(default_rates("NVIDIA H200"), LayerShape(64, 8, 128), ranks_share_node=True)
    tracemalloc.start()
    try:
        schedule = make_schedule(plan, costs)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert sum(call.slices.area() for call in schedule.calls) == total * total // 2
