# SPDX-License-Identifier: Apache-2.0
"""Fillings of two documents are the cheapest, and ranks whose runs part costly tiles get less area."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common.bands import CAUSAL
from magi_attention.common.slices import SliceTable
from magi_attention.plan.chunks import measure_chunks
from magi_attention.plan.deal import TILED, WHOLE, Deal, most_beside_tile
from magi_attention.plan.documents import Documents, find_documents
from magi_attention.plan.filling import Prefixes
from magi_attention.plan.layout import even_cuts
from magi_attention.plan.locality import CELLS_OF_MANY, MANY_RANKS
from magi_attention.plan.totals import totals

CHUNK, NUM_RANKS, CHUNKS_PER_RANK = 32, 8, 64


def causal_documents(lengths: list[int], num_ranks: int) -> Documents:
    """Causal documents of so many chunks."""
    ends = np.append(0, np.cumsum(lengths)) * CHUNK
    slices = SliceTable([[a, b, a, b, CAUSAL] for a, b in itertools.pairwise(ends.tolist())])
    return find_documents(slices, measure_chunks(slices, even_cuts(int(ends[-1]), CHUNK)), num_ranks, 0.0)


def documents_of(seed: int) -> Documents:
    """Causal documents of lengths that differ, the last as long as what is left."""
    lengths = np.random.default_rng(seed).permutation(np.arange(2, 27)).tolist()
    return causal_documents([*lengths, NUM_RANKS * CHUNKS_PER_RANK - sum(lengths)], NUM_RANKS)


@pytest.mark.parametrize("most", [17, 30, 41, 64])
@pytest.mark.parametrize("seed", range(3))
def test_the_cheapest_filling_by_two_documents_is_found(seed: int, most: int) -> None:
    documents = documents_of(seed)
    deal = Deal(documents, [CHUNKS_PER_RANK] * NUM_RANKS, CHUNK, Prefixes(0, 2, 3))
    deal.light_first = deal._list_blocks()
    deal.room, anchor = most, len(documents.start) - 1
    lights = deal._lightest(anchor)
    longest = int(np.searchsorted(lights.tokens, most, side="right")) - 1
    # Costs that are not those of the lightest filling alone.
    paid = [1000 * (number % 3) for number in range(longest + 1)]
    used = {document for document, _, _ in lights.pieces[:longest]} | {anchor}
    free = deal.length.copy()
    free[list(used)] = 0
    least, number, pair = deal._pair(free, lights, longest, most, paid, lambda tokens, areas: areas + 0.0)

    length, area = documents.stop - documents.start, documents.area[documents.stop] - documents.area[documents.start]
    others = [each for each in range(len(length)) if each not in used]
    fillings = [
        lights.areas[first] + paid[first] + sum(int(area[each]) for each in chosen)
        for first in range(max(0, longest - 2), longest + 1)
        for number_of in range(3)
        for chosen in itertools.combinations(others, number_of)
        if lights.tokens[first] + sum(int(length[each]) for each in chosen) == most
    ]
    if not fillings:
        assert least == np.inf
        return
    assert least == min(fillings)
    assert lights.tokens[number] + length[pair].sum() == most
    assert lights.areas[number] + paid[number] + area[pair].sum() == least


@pytest.mark.parametrize("shorter", [0, 3])
@pytest.mark.parametrize("most", [3, 17, 41, 64])
@pytest.mark.parametrize("seed", range(3))
def test_the_cheapest_filling_by_a_document_and_an_end_is_found(seed: int, most: int, shorter: int) -> None:
    documents = documents_of(seed)
    number_of = len(documents.start)
    deal = Deal(documents, [CHUNKS_PER_RANK] * NUM_RANKS, CHUNK, Prefixes(0, 2, 0, number_of - 1))
    free = deal.length.copy()
    free[-1] = 0

    def cost(tokens: np.ndarray, areas: np.ndarray) -> np.ndarray:
        return np.abs(areas - 30_000) - 100.0 * tokens

    least, pieces = deal._extend_by_two(free, most, shorter, cost)
    area, cut = documents.area, documents.cut
    costs = []
    for first, other in itertools.permutations(range(number_of - 1), 2):
        size = min(most - int(free[first]), int(free[other]))
        if size <= 0 or size + free[first] < most - shorter:
            continue
        start, stop = int(documents.start[other]), int(documents.stop[other])
        for low, high, inner in ((start, start + size, start + size), (stop - size, stop, stop - size)):
            filled = area[documents.stop[first]] - area[documents.start[first]] + area[high] - area[low]
            costs.append(float(cost(free[first] + size, filled)) + (cut[inner] if size < free[other] else 0))
    assert least == min(costs, default=np.inf)
    if costs:
        (a, b), (c, d) = ((start, stop) for _, start, stop in pieces)
        assert most - shorter <= b - a + d - c <= most
        assert b <= c or d <= a
    deal.prefixes = deal.prefixes._replace(few=number_of - 2)
    assert deal._extend_by_two(free, most, shorter, cost) == (np.inf, [])


@pytest.mark.parametrize("lengths", [[192] * 3 + [128] * 3, [140, 116] * 4, [150, 106] * 4], ids=str)
def test_both_ends_of_a_document_fill_ranks_where_other_documents_would_be_cut(lengths: list[int]) -> None:
    num_ranks = sum(lengths) // CHUNKS_PER_RANK
    documents = causal_documents(lengths, num_ranks)
    deal = Deal(documents, [CHUNKS_PER_RANK] * num_ranks, CHUNK, Prefixes(1, 2, 0))
    parts = np.split(deal.run(1.0192, hides=False, parts_tiles=False), documents.start[1:])
    for part, length in zip(parts, lengths, strict=True):
        assert len(np.unique(part)) <= -(-length // CHUNKS_PER_RANK) + 1


def test_ranks_that_read_far_get_less_area_where_runs_part_tiles() -> None:
    documents = documents_of(0)
    loads = []
    for parts_tiles in (False, True):
        deal = Deal(documents, [CHUNKS_PER_RANK] * NUM_RANKS, CHUNK, Prefixes(0, 2, 6))
        owner = deal.run(1.0192, hides=False, parts_tiles=parts_tiles)
        loads.append(totals(owner, np.diff(documents.area), NUM_RANKS))
        assert (np.bincount(owner) == CHUNKS_PER_RANK).all()
    reach = documents.read.max()
    most = int(most_beside_tile(documents, NUM_RANKS, np.array(reach)))
    mean = documents.area[-1] / NUM_RANKS
    assert loads[1][0] <= most < loads[0][0]
    assert WHOLE * mean - 1 <= most <= TILED * mean


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=12),
    read=st.lists(st.sampled_from([0.0, 0.2, 0.5, 1.0]), min_size=12, max_size=12),
    chunks_per_rank=st.integers(3, 20),
)
def test_every_rank_of_many_is_filled(lengths: list[int], read: list[float], chunks_per_rank: int) -> None:
    num_chunks = MANY_RANKS * chunks_per_rank
    ends = [0, *(np.cumsum(lengths) * num_chunks * CHUNK // sum(lengths)).tolist()]
    rows = [
        [a, b, a, a + int(part * (b - a)), CAUSAL] for (a, b), part in zip(itertools.pairwise(ends), read, strict=False)
    ]
    slices = SliceTable(rows).without_empty()
    line = find_documents(slices, measure_chunks(slices, even_cuts(ends[-1], CHUNK)), MANY_RANKS, 0.3)
    owner = Deal(line, [chunks_per_rank] * MANY_RANKS, CHUNK, CELLS_OF_MANY.prefixes).run(
        1.0192, hides=False, parts_tiles=True
    )
    assert (np.bincount(owner, minlength=MANY_RANKS) == chunks_per_rank).all()
