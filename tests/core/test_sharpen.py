# SPDX-License-Identifier: Apache-2.0
"""Areas that ranks have left are used up row by row: later ranks read less, and numbers of rows stay as they are."""

import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.slices import SliceTable
from magi_attention.plan.chunks import measure_areas, measure_chunks
from magi_attention.plan.demand import find_demand
from magi_attention.plan.layout import Layout
from magi_attention.plan.sharpen import BEYOND, sharpen
from magi_attention.plan.totals import totals

Array = NDArray[np.int64]

LENGTH, SHORT, NUM_RANKS = 8000, 1000, 4


def causal(lengths: list[int]) -> SliceTable:
    ends = np.append(0, np.cumsum(lengths)).tolist()
    return SliceTable([[a, b, a, b, band.CAUSAL] for a, b in itertools.pairwise(ends)])


def dealt() -> tuple[SliceTable, Array, Array, Array]:
    """A long document in a light and a heavy run for each rank, and a short one: its runs' starts, ranks, documents."""
    begin = np.array([0, 500, 1100, 1600, 2500, 4500, 6100, 7100, LENGTH, LENGTH + SHORT])
    rank, document = np.array([0, 1, 2, 3, 3, 2, 1, 0, 3]), np.array([0] * 8 + [1])
    return causal([LENGTH, SHORT]), begin, rank, document


def area_before(slices: SliceTable, rows: Array) -> Array:
    """The exact area before each row."""
    bands = slices.bands()
    return np.array([int(band.area_above(bands, np.full(len(bands), row)).sum()) for row in rows.tolist()])


def columns_of(slices: SliceTable) -> Array:
    return np.ascontiguousarray(band.shrink(slices.bands())[0].T)


def run(slices: SliceTable, begin: Array, rank: Array, document: Array, limit: Array) -> tuple[Array, Array, Array]:
    """Loads before; starts and loads after."""
    measure = partial(measure_areas, columns_of(slices))
    load = totals(rank, measure(begin), len(limit))
    return load, *sharpen(begin, rank, document, load, limit, partial(area_before, slices), measure)


def received(slices: SliceTable, begin: Array, rank: Array) -> int:
    total = int(begin[-1])
    remote = find_demand(slices, Layout(total, total, 1, NUM_RANKS, rank, begin)).remote
    return int((remote[:, 2] - remote[:, 1]).sum())


def test_ranks_get_the_area_they_may_have_and_fewer_rows_are_received() -> None:
    slices, begin, rank, document = dealt()
    limit = totals(rank, measure_areas(columns_of(slices), begin), NUM_RANKS)
    limit[:3] += limit[:3] // 50
    load, after, loads = run(slices, begin, rank, document, limit)
    assert np.array_equal(totals(rank, np.diff(after), NUM_RANKS), totals(rank, np.diff(begin), NUM_RANKS))
    assert np.array_equal(loads, totals(rank, np.diff(area_before(slices, after)), NUM_RANKS))
    assert (loads <= limit + limit // BEYOND).all()
    # The first three ranks use up what they may have, but for a row or two; the last one has less to compute.
    assert (limit[:3] - loads[:3] <= 2 * LENGTH + limit[:3] // BEYOND).all()
    assert loads[3] < load[3]
    assert received(slices, after, rank) < received(slices, begin, rank)


def test_ranks_with_too_much_area_give_heavy_rows_back() -> None:
    slices, begin, rank, document = dealt()
    load = totals(rank, measure_areas(columns_of(slices), begin), NUM_RANKS)
    limit = np.full(NUM_RANKS, 2 * int(load.max()))
    limit[0] = load[0] - load[0] // 100
    _, _, loads = run(slices, begin, rank, document, limit)
    assert loads[0] <= limit[0] + limit[0] // BEYOND


def test_ranks_without_both_kinds_of_runs_are_left_alone() -> None:
    slices = causal([1000, 1000])
    begin, rank, document = np.array([0, 1000, 2000]), np.array([0, 1]), np.array([0, 1])
    load, after, loads = run(slices, begin, rank, document, np.full(2, 1 << 40))
    assert np.array_equal(after, begin)
    assert np.array_equal(loads, load)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(2, 5), st.integers(0, 1 << 30))
def test_rows_of_ranks_and_documents_stay_and_no_limit_is_passed(lengths: list[int], num_ranks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    slices, ends = causal(lengths), np.append(0, np.cumsum(lengths))
    cuts = np.unique(np.concatenate([ends, rng.integers(0, int(ends[-1]) + 1, 12)]))
    document = np.searchsorted(ends, cuts[:-1], side="right") - 1
    rank = rng.integers(0, num_ranks, len(document))
    rank[0] = num_ranks - 1
    load = totals(rank, measure_areas(columns_of(slices), cuts), num_ranks)
    limit = load + rng.integers(-50, 500, num_ranks)
    _, after, loads = run(slices, cuts, rank, document, limit)
    assert (np.diff(after) > 0).all()
    assert np.array_equal(totals(rank, np.diff(after), num_ranks), totals(rank, np.diff(cuts), num_ranks))
    assert np.isin(ends, after).all()
    assert (loads <= np.maximum(limit + limit // BEYOND, load)).all()


@pytest.mark.parametrize("cuts", [[0, 1, 700, 8999, 9000], [0, 4000, 9000]])
def test_areas_of_runs_are_those_of_chunks(cuts: list[int]) -> None:
    slices = SliceTable([*causal([LENGTH, SHORT]).rows.tolist(), [100, 900, 8100, 8600, band.BICAUSAL]])
    places = np.array(cuts)
    areas = measure_areas(columns_of(slices), places)
    assert np.array_equal(areas, np.diff(area_before(slices, places)))
    assert np.array_equal(areas, measure_chunks(slices, places).area)
