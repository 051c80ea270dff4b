# SPDX-License-Identifier: Apache-2.0
"""Locality where keys are of another sequence: components on two axes, and deals that keep them whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common import bands as band
from magi_attention.common.slices import SliceTable
from magi_attention.config import LocalityDispatchAlg, MinHeapDispatchAlg, SequentialDispatchAlg
from magi_attention.plan import two_sided
from magi_attention.plan.bounds import received_lower_bound
from magi_attention.plan.chunks import measure_chunks
from magi_attention.plan.demand import find_demand
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.key_dispatch import make_key_layout
from magi_attention.plan.layout import Layout, even_cuts
from magi_attention.testing.masks import rectangular_masks

LOCALITY, HEAP = LocalityDispatchAlg(), MinHeapDispatchAlg()


def deal(slices, totals, chunk_sizes, num_ranks, algorithm) -> tuple[Layout, Layout]:
    def deal_keys(layout: Layout) -> Layout:
        total, chunk_size = totals[1], chunk_sizes[1]
        return make_key_layout(slices, layout, num_real=total, total=total, chunk_size=chunk_size, is_permutable=True)

    layout = make_layout(
        slices,
        num_real=totals[0],
        total=totals[0],
        chunk_size=chunk_sizes[0],
        num_ranks=num_ranks,
        algorithm=algorithm,
        deal_keys=deal_keys,
    )
    return layout, deal_keys(layout)


def judge(slices, layouts) -> tuple[float, int]:
    """The largest area over the mean, and the rows that all ranks receive."""
    demand = find_demand(slices, *layouts)
    balance = float(demand.area.max() / demand.area.mean()) if demand.area.any() else 1.0
    return balance, int((demand.remote[:, 2] - demand.remote[:, 1]).sum())


def packed(num_documents, totals, seed=0, kind=0, scattered=False) -> SliceTable:
    """Documents of long-tailed lengths; with ``scattered``, their keys lie in another order than their queries."""
    rng = np.random.default_rng(seed)
    ends = []
    for total in totals:
        share = np.clip(rng.lognormal(0, 0.8, num_documents), 0.2, 4)
        ends.append([0, *np.round(np.cumsum(share) / share.sum() * total).astype(int)])
    order = rng.permutation(num_documents) if scattered else range(num_documents)
    q, k = ends
    return SliceTable([[q[i], q[i + 1], k[j], k[j + 1], kind] for i, j in enumerate(order)])


@pytest.mark.parametrize("scattered", [False, True], ids=["in-order", "scattered"])
@pytest.mark.parametrize("kind", [0, 1], ids=["full", "causal"])
@pytest.mark.parametrize("num_ranks", [8, 32])
def test_packed_documents_are_balanced_and_move_a_fraction_of_the_heaps_rows(num_ranks, kind, scattered):
    totals = (1 << 17, 1 << 16)
    slices = packed(256, totals, kind=kind, scattered=scattered)
    layouts = deal(slices, totals, (64, 64), num_ranks, LOCALITY)
    balance, received = judge(slices, layouts)
    for layout in layouts:
        assert np.ptp(np.bincount(layout.owner, minlength=num_ranks)) == 0
    assert balance <= 1.02
    assert received <= 0.3 * judge(slices, deal(slices, totals, (64, 64), num_ranks, HEAP))[1]
    assert received >= received_lower_bound(slices, totals[0], num_ranks, total_keys=totals[1])


def test_documents_of_equal_length_stay_at_home():
    slices = SliceTable([[64 * i, 64 * i + 64, 32 * (i * 5 % 16), 32 * (i * 5 % 16) + 32, 0] for i in range(16)])
    assert judge(slices, deal(slices, (1024, 512), (16, 16), 4, LOCALITY)) == (1.0, 0)


def test_queries_that_share_keys_meet_although_they_lie_apart():
    # Eight pictures; the queries of each lie in four places of the text.
    rows = [[64 * i, 64 * i + 64, 128 * (i % 8), 128 * (i % 8) + 128, 0] for i in range(32)]
    layout, keys = deal(SliceTable(rows), (2048, 1024), (32, 32), 8, LOCALITY)
    assert judge(SliceTable(rows), (layout, keys)) == (1.0, 0)
    assert all(len(set(layout.owner[2 * i :: 16])) == 1 for i in range(8))


@given(rectangular_masks(90), st.integers(1, 6), st.integers(1, 6), st.integers(2, 6))
@settings(max_examples=80)
def test_random_masks_never_receive_more_than_by_the_heap(mask, chunk_q, chunk_k, num_ranks):
    totals, slices = mask
    totals = tuple(max(total, num_ranks * chunk) for total, chunk in zip(totals, (chunk_q, chunk_k), strict=True))
    balance, received = judge(slices, deal(slices, totals, (chunk_q, chunk_k), num_ranks, LOCALITY))
    heap_balance, received_by_heap = judge(slices, deal(slices, totals, (chunk_q, chunk_k), num_ranks, HEAP))
    assert received <= received_by_heap
    assert balance <= max(1.02, 1.02 * heap_balance)


@given(rectangular_masks(60), st.integers(2, 5))
@settings(max_examples=60)
def test_bound_holds_for_every_algorithm(mask, num_ranks):
    totals, slices = mask
    totals = tuple(-(-max(total, num_ranks) // num_ranks) * num_ranks for total in totals)
    for algorithm in (LOCALITY, HEAP, SequentialDispatchAlg()):
        balance, received = judge(slices, deal(slices, totals, (1, 1), num_ranks, algorithm))
        # A deal that is less balanced than the tolerance is bounded with its own balance as the tolerance.
        tolerance = max(balance - 1, 0) + 1e-9
        assert received_lower_bound(slices, totals[0], num_ranks, tolerance, totals[1]) <= received


@given(rectangular_masks(60), st.integers(1, 7))
def test_components_against_a_search_over_rows(mask, chunk_size):
    (num_queries, _), slices = mask
    bands, source = band.shrink(slices.bands())
    rest, component = set(range(len(bands))), np.full(len(bands), -1)
    while rest:
        group, border = set(), {min(rest)}
        while border:
            group |= border
            rest -= border
            touched = [bands[one] for one in border]
            border = {other for other in rest if any(_meet(bands[other], one) for one in touched)}
        component[list(group)] = min(group)
    work = measure_chunks(slices, even_cuts(num_queries, chunk_size))
    read = {}
    for chunk, index, (start, stop) in zip(work.chunk, work.slice_index, work.keys, strict=True):
        of = component[np.searchsorted(source, index)]
        read.setdefault(chunk, {}).setdefault(of, 0)
        read[chunk][of] += stop - start
    found = two_sided.chunk_components(work)
    # Chunks of one found component share a true one of which each reads most.
    for number in np.unique(found):
        most = [{of for of, rows in read[c].items() if rows == max(read[c].values())}
                for c in np.flatnonzero(found == number) if c in read]  # fmt: skip
        assert not most or set.intersection(*most)
    assert np.unique(found, return_index=True)[1].tolist() == sorted(np.unique(found, return_index=True)[1])


def _meet(one, other) -> bool:
    return any(max(one[a], other[a]) < min(one[a + 1], other[a + 1]) for a in (band.Q0, band.K0))


@given(rectangular_masks(60), st.integers(1, 7), st.randoms())
def test_cut_costs_count_the_rows_read_on_both_sides(mask, chunk_size, random):
    (num_queries, num_keys), slices = mask
    work = measure_chunks(slices, even_cuts(num_queries, chunk_size))
    line = list(range(len(work.area)))
    random.shuffle(line)
    reads = np.zeros((len(line), num_keys), bool)
    for chunk, (start, stop) in zip(work.chunk, work.keys, strict=True):
        reads[chunk, start:stop] = True
    reads = reads[line]
    expected = [(reads[:place].any(axis=0) & reads[place:].any(axis=0)).sum() for place in range(len(line) + 1)]
    assert two_sided.cut_costs(work, np.array(line)).tolist() == expected
