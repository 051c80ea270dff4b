# SPDX-License-Identifier: Apache-2.0
"""Deals whose cuts follow the documents: all ranks get equally many rows, areas stay even, few rows travel."""

from dataclasses import replace

import numpy as np
import pytest

from magi_attention.common.slices import SliceTable
from magi_attention.config import LocalityDispatchAlg, MinHeapDispatchAlg
from magi_attention.plan import deal as dealing
from magi_attention.plan import dispatch, locality
from magi_attention.plan.cells import Cells, cut_documents
from magi_attention.plan.chunks import measure_chunks
from magi_attention.plan.demand import find_demand
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.layout import Layout
from magi_attention.plan.settle import Settling
from magi_attention.plan.totals import totals
from magi_attention.runtime.dispatch_meta import DispatchMeta
from magi_attention.testing.masks import MASK_FAMILIES
from tests.core.test_locality import packed

CHUNK = 64


@pytest.fixture(autouse=True)
def few_rows_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "FEWEST_ROWS", 0)
    monkeypatch.setattr(dispatch, "MOST_SLICES", 1 << 20)
    # Of so few rows, a parted tile would be a large share.
    monkeypatch.setattr(dealing, "TILED", 2.0)


def lengths(total: int, seed: int, mean: int) -> list[int]:
    """Long-tailed lengths of documents that sum to ``total``."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean), 1.2, total).astype(int).clip(1, total // 4)
    ends = np.minimum(np.cumsum(drawn), total)
    return [int(n) for n in np.diff(ends, prepend=0) if n]


def deal(slices: SliceTable, total: int, num_ranks: int, *, is_even: bool = False) -> Layout:
    return make_layout(
        slices,
        num_real=total,
        total=total,
        chunk_size=CHUNK,
        num_ranks=num_ranks,
        algorithm=LocalityDispatchAlg(),
        is_even=is_even,
    )


def received(slices: SliceTable, layout: Layout) -> int:
    remote = find_demand(slices, layout).remote
    return int((remote[:, 2] - remote[:, 1]).sum())


@pytest.mark.parametrize("many", [1, 128], ids=["more fillings", "fewer fillings"])
@pytest.mark.parametrize("num_ranks", [8, 32])
@pytest.mark.parametrize("kind", ["full", "causal", "prefix", "blocks"])
def test_rows_are_equally_many_and_fewer_travel_than_with_equal_chunks(
    kind: str, num_ranks: int, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locality, "MANY_RANKS", many)
    total = 1 << 17
    even = uneven = 0
    for seed in range(10):
        slices = packed(total, kind, lengths(total, seed, 512))
        layout = deal(slices, total, num_ranks)
        assert (layout.rows_per_rank == total // num_ranks).all()
        area = find_demand(slices, layout).area
        assert area.max() <= 1.02 * area.mean()
        uneven += received(slices, layout)
        even += received(slices, deal(slices, total, num_ranks, is_even=True))
    assert uneven < even


def test_whole_documents_start_where_runs_do() -> None:
    total, documents = 1 << 17, lengths(1 << 17, 3, 512)
    layout = deal(packed(total, "blocks", documents), total, 16)
    ends = np.cumsum(documents)
    within = np.setdiff1d(layout.runs[1:, 0], ends)
    assert len(within) < 0.5 * len(documents)
    before, after = (
        layout.owner[np.searchsorted(layout.cuts, rows, side="right") - 1] for rows in (ends - 1, ends[:-1])
    )
    assert (before[:-1] != after).any()
    assert np.isin(ends[:-1][before[:-1] != after], layout.runs[:, 0]).all()


@pytest.mark.parametrize("total", [100_352, 1 << 17])
@pytest.mark.parametrize("mean", [1, 3, 70, 500])
def test_short_documents_are_dealt_too(mean: int, total: int) -> None:
    slices = packed(total, "causal", lengths(total, 5, mean))
    layout = deal(slices, total, 8)
    assert np.ptp(layout.rows_per_rank) == 0
    assert layout.rows_per_rank.sum() == total


@pytest.mark.parametrize("family", sorted(MASK_FAMILIES))
def test_random_masks_are_dealt_in_equal_shares(family: str) -> None:
    total = 1 << 17
    slices = MASK_FAMILIES[family](1 << 9, np.random.default_rng(2))
    slices = SliceTable(slices.rows * [256, 256, 256, 256, 1])
    layout = deal(slices, total, 16)
    assert (layout.rows_per_rank == total // 16).all()
    heap = make_layout(
        slices, num_real=total, total=total, chunk_size=CHUNK, num_ranks=16, algorithm=MinHeapDispatchAlg()
    )
    areas, heap_areas = (find_demand(slices, each).area for each in (layout, heap))
    assert areas.max() <= max(1.02 * areas.mean(), 1.02 * heap_areas.max())


@pytest.mark.parametrize(("total", "fewest", "most"), [(1 << 15, 0, 999), (1 << 17, 16385, 999), (1 << 17, 0, 99)])
def test_chunks_are_equal_where_there_are_few_or_few_rows_or_many_slices(
    total: int, fewest: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "FEWEST_ROWS", fewest)
    monkeypatch.setattr(dispatch, "MOST_SLICES", most)
    assert deal(packed(total, "causal", lengths(total, 1, 512)), total, 8).uneven_cuts is None


@pytest.mark.parametrize(("kind", "follows"), [("causal", False), ("full", False), ("prefix", True), ("blocks", True)])
def test_with_fewer_rows_cuts_follow_documents_whose_first_rows_read_far(
    kind: str, follows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    total, num_ranks = 1 << 17, 8
    monkeypatch.setattr(dispatch, "FEWEST_ROWS", total)
    monkeypatch.setattr(dispatch, "FEWEST_OF_MANY", total // num_ranks)
    slices = packed(total, kind, lengths(total, 1, 512))
    for many, expected in ((num_ranks, follows), (num_ranks + 1, False)):
        monkeypatch.setattr(dispatch, "MANY_RANKS", many)
        assert (deal(slices, total, num_ranks).uneven_cuts is not None) == expected


def test_deal_does_not_depend_on_the_order_of_slices() -> None:
    slices = packed(1 << 17, "prefix", lengths(1 << 17, 1, 512))
    shuffled = SliceTable(np.random.default_rng(0).permutation(slices.rows))
    assert np.array_equal(deal(slices, 1 << 17, 16).runs, deal(shuffled, 1 << 17, 16).runs)


@pytest.mark.parametrize("num_cells", [64, 1000])
@pytest.mark.parametrize("mean", [2, 40, 1000])
def test_cells_are_as_many_as_asked_for_and_about_equal(mean: int, num_cells: int) -> None:
    total = 50_000
    documents = lengths(total, 9, mean)
    cuts, document = cut_documents(packed(total, "causal", documents), total, num_cells)
    assert len(cuts) == num_cells + 1
    assert (cuts[0], cuts[-1]) == (0, total)
    assert (np.diff(cuts) > 0).all()
    starts = cuts[:-1][np.diff(document, prepend=-1) != 0]
    assert np.isin(starts, [0, *np.cumsum(documents)]).all()
    if mean == 1000:  # documents are longer than cells
        assert np.diff(cuts).max() <= 2.5 * total / num_cells


@pytest.mark.parametrize("mean", [5, 60, 400])
@pytest.mark.parametrize("seed", range(8))
def test_any_deal_of_cells_is_settled_exactly(seed: int, mean: int) -> None:
    random = np.random.default_rng(seed)
    num_ranks, num_cells, total = 7, 140, 10_007
    slices = packed(total, "causal", lengths(total, seed, mean))
    cuts, document = cut_documents(slices, total, num_cells)
    area = random.integers(0, 1000, num_cells)
    owner = random.permutation(np.repeat(np.arange(num_ranks), num_cells // num_ranks))
    each, more = divmod(total, num_ranks)
    wanted = each + (np.arange(num_ranks) < more)
    cells = Cells(replace(measure_chunks(slices, cuts), area=area), document)
    settling = Settling(cells, cuts, owner, wanted, np.full(num_ranks, int(1.05 * area.sum() / num_ranks)))
    begin, rank = settling.run()
    assert (begin[0], begin[-1]) == (0, total)
    assert (np.diff(begin) >= 0).all()
    assert np.array_equal(totals(rank, np.diff(begin), num_ranks), wanted)
    assert abs(int(settling.load.sum()) - int(area.sum())) <= len(rank)


def test_a_long_document_is_given_to_one_rank_that_lacks_enough() -> None:
    """Whole documents leave two ranks with 10 rows too many; the one with a short document serves two others."""
    rows, owner = np.array([100, 910, 1010, 995, 985]), np.array([0, 0, 1, 2, 3])
    cuts, wanted = np.append(0, np.cumsum(rows)), np.full(4, 1000)
    slices = packed(4000, "causal", rows.tolist())
    cells = Cells(replace(measure_chunks(slices, cuts), area=rows), np.arange(5))
    begin, rank = Settling(cells, cuts, owner, wanted, np.full(4, 2000)).run()
    assert totals(rank, np.diff(begin), 4).tolist() == wanted.tolist()
    pieces = np.bincount(np.searchsorted(cuts, begin[:-1], side="right") - 1)
    assert pieces.tolist() == [3, 1, 2, 1, 1]


def test_dispatch_meta_lists_runs_as_chunks() -> None:
    total = 1 << 17
    layout = deal(packed(total, "causal", lengths(total, 1, 512)), total, 8)
    assert layout.uneven_cuts is not None
    meta = DispatchMeta.from_layout(layout, rank=3)
    assert meta.chunk_actual_sizes == np.diff(layout.uneven_cuts).tolist()
    assert (meta.num_chunks, meta.shard_seqlen, meta.split_sizes) == (len(layout.owner), total // 8, None)
    assert np.array_equal(meta.layout.runs, layout.runs)
    assert np.array_equal(meta.position_ids.numpy(), layout.positions(3))
