# SPDX-License-Identifier: Apache-2.0
"""Light ends of documents that no rank can hold become runs of their own; all else stays as it is."""

from dataclasses import replace

import numpy as np
import pytest

from magi_attention.common.bands import CAUSAL, FULL
from magi_attention.common.slices import SliceTable
from magi_attention.plan.chunks import measure_chunks
from magi_attention.plan.documents import Documents, find_documents
from magi_attention.plan.layout import even_cuts
from magi_attention.plan.light_ends import DEAREST, LIGHT, part_light_ends
from magi_attention.testing.masks import MASK_FAMILIES

CHUNK, NUM_RANKS = 16, 16
# Of 64 chunks per rank: some that fit, three with heavy ends that fill a rank, one too heavy for that, a very long one.
LENGTHS = [20, 48, 30, 64, 72, 30, 88, 100, 30, 200, 342]


def documents_of(kind: int, lengths: list[int] = LENGTHS) -> Documents:
    ends = np.cumsum([0, *lengths]) * CHUNK
    rows = [[a, b, a, b, kind] for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
    total = int(ends[-1])
    return find_documents(SliceTable(rows), measure_chunks(SliceTable(rows), even_cuts(total, CHUNK)), NUM_RANKS, 0.0)


def test_heavy_ends_that_fill_a_rank_stay_together_and_longer_documents_are_cut_where_rows_get_dear() -> None:
    documents = documents_of(CAUSAL)
    parted = part_light_ends(documents, NUM_RANKS, CHUNK)
    added = np.setdiff1d(parted.start, documents.start)
    chunk_area, room = np.diff(documents.area), len(documents.line) // NUM_RANKS
    found = {}
    for cut in added.tolist():
        document = int(np.searchsorted(documents.start, cut, side="right")) - 1
        start, stop = int(documents.start[document]), int(documents.stop[document])
        found[stop - start] = stop - cut
        if stop - cut != room:
            assert chunk_area[start:cut].max() <= LIGHT * chunk_area.mean() < chunk_area[cut]
    assert set(found) == {72, 88, 100, 200}
    assert [found[length] == room for length in (72, 88, 100)] == [True, True, True]
    assert found[200] > room


def test_documents_that_are_equally_dense_are_left_alone() -> None:
    documents = documents_of(FULL)
    assert part_light_ends(documents, NUM_RANKS, CHUNK).start.tolist() == documents.start.tolist()


def test_without_longer_documents_both_ends_stay_together() -> None:
    documents = documents_of(CAUSAL, [*LENGTHS[:-2], 222, 320])
    assert part_light_ends(documents, NUM_RANKS, CHUNK).start.tolist() == documents.start.tolist()


def test_a_cut_that_costs_many_more_rows_than_it_parts_is_not_made() -> None:
    documents = documents_of(CAUSAL)
    dear = replace(documents, cut=documents.cut * int(2 * DEAREST))
    assert part_light_ends(dear, NUM_RANKS, CHUNK).start.tolist() == documents.start.tolist()


@pytest.mark.parametrize("family", sorted(MASK_FAMILIES))
def test_runs_still_cover_the_line(family: str) -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        num_ranks, chunk_size = int(rng.integers(2, 17)), int(rng.integers(1, 9))
        total = num_ranks * chunk_size * int(rng.integers(1, 64))
        slices = MASK_FAMILIES[family](total, rng)
        documents = find_documents(slices, measure_chunks(slices, even_cuts(total, chunk_size)), num_ranks, 0.0)
        parted = part_light_ends(documents, num_ranks, chunk_size)
        assert parted.start[0] == 0
        assert parted.stop[-1] == len(documents.line)
        assert parted.start[1:].tolist() == parted.stop[:-1].tolist()
        assert (parted.stop > parted.start).all()
        assert set(documents.start.tolist()) <= set(parted.start.tolist())
