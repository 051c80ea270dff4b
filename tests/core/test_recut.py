# SPDX-License-Identifier: Apache-2.0
"""All cuts within documents are shifted at once: fewer rows are received, and the ranks keep their limits."""

import numpy as np
import pytest
from numpy.typing import NDArray

from magi_attention.common.slices import SliceTable
from magi_attention.plan import locality
from magi_attention.plan.cells import Cells, cut_documents
from magi_attention.plan.chunks import measure_chunks
from magi_attention.plan.demand import find_demand
from magi_attention.plan.exact_rows import Held, Limits, hold_exact_rows, received
from magi_attention.plan.layout import Layout
from magi_attention.plan.primal_dual import Prices, Program, solve
from magi_attention.plan.recut import Recut, RowRuns
from magi_attention.plan.totals import totals
from magi_attention.testing.masks import MASK_FAMILIES
from tests.core.test_locality import packed

Array = NDArray[np.int64]

STEPS, PACE = 3000, 5.0


def no_prices(program: Program) -> Prices:
    return Prices(np.zeros_like(program.bounds), np.zeros(len(program.rank)))


ENDS = [0, 2]
"""The cuts between both ranks; that between two runs of one rank may be anywhere."""


def two_pairs(spare_area: float, spare_sent: float = 1e6) -> Program:
    """One document in four runs: both ranks have a light and a heavy one, and the second rank reads less."""
    return Program(
        rank=np.array([0, 1, 1, 0]),
        length=np.array([400.0, 300.0, 200.0, 100.0]),
        readers=np.array([1.0, 1.0, 1.0, 0.0]),
        weight=np.array([1.0, 2.0, 3.0]),
        cost=np.array([0.0, 0.0, 1.0]),
        least=np.full(3, -500.0),
        most=np.full(3, 500.0),
        bounds=np.array([[0.0, 0.0], [spare_area] * 2, [spare_sent] * 2]),
    )


def test_a_rank_takes_heavy_rows_for_light_ones_as_far_as_its_area_allows() -> None:
    # If both cuts go down by x rows, the first rank gets x rows that weigh 3 for x that weigh 1.
    shift, _ = solve(program := two_pairs(120.0), no_prices(program), STEPS, PACE)
    assert np.allclose(shift[ENDS], -60.0, atol=0.5)


def test_no_run_loses_more_rows_than_it_has() -> None:
    shift, _ = solve(program := two_pairs(1e6), no_prices(program), STEPS, PACE)
    # The light run of the first rank can lose 400, then the other's ones are where it was.
    assert np.allclose(shift[ENDS], -400.0, atol=1.0)
    shift, _ = solve(program := two_pairs(1e6)._replace(least=np.full(3, -150.0)), no_prices(program), STEPS, PACE)
    assert np.allclose(shift[ENDS], -150.0, atol=0.5)


def test_a_rank_sends_no_more_than_it_may() -> None:
    program = two_pairs(1e6)._replace(readers=np.array([0.0, 0.0, 0.0, 1.0]))
    bounds = program.bounds.copy()
    bounds[2] = 70.0
    shift, _ = solve(program._replace(bounds=bounds), no_prices(program), STEPS, PACE)
    assert np.allclose(shift[ENDS], -70.0, atol=0.5)


def test_area_is_worth_what_it_saves() -> None:
    _, prices = solve(program := two_pairs(120.0), no_prices(program), STEPS, PACE)
    # One row more for the first rank saves a row, and takes up 2 of area; the other one has area left.
    assert prices.of_rank[1] == pytest.approx([0.5, 0.0], abs=0.02)
    assert (prices.of_rank[2] == 0).all()


def lengths(total: int, seed: int, mean: int = 1500) -> list[int]:
    """Long-tailed lengths of documents that sum to ``total``."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean), 1.2, total).astype(int).clip(64, total // 4)
    ends = np.minimum(np.cumsum(drawn), total)
    return [int(n) for n in np.diff(ends, prepend=0) if n]


TOTAL, NUM_RANKS, CELL = 1 << 18, 32, 64


def cells_of(slices: SliceTable, total: int = TOTAL, num_cells: int = TOTAL // CELL) -> Cells:
    cuts, document = cut_documents(slices, total, num_cells)
    return Cells(measure_chunks(slices, cuts), document)


def dealt(cells: Cells, is_recut: bool, num_ranks: int = NUM_RANKS) -> Held:
    terms = locality.CELLS_OF_MANY
    found = locality._deal(cells.work.slices, cells.work, CELL, num_ranks, terms, cells.document)
    limit = found.limit * locality.SHIFTED // terms.most
    wanted = np.full(num_ranks, int(cells.cuts[-1]) // num_ranks)
    limits = Limits(limit, np.full(num_ranks, limit), found.most_sent)
    return hold_exact_rows(cells, found.owner, wanted, limits, is_recut=is_recut)


def check(cells: Cells, held: Held, num_ranks: int = NUM_RANKS) -> None:
    """All rows are dealt, equally many to each rank, within documents, and areas are what is said."""
    total = int(cells.cuts[-1])
    assert (held.begin[0], held.begin[-1]) == (0, total)
    assert (np.diff(held.begin) > 0).all()
    assert (totals(held.rank, np.diff(held.begin), num_ranks) == total // num_ranks).all()
    starts = cells.cuts[cells.first]
    assert np.isin(starts, held.begin).all() or len(starts) > len(held.begin)
    demand = find_demand(cells.work.slices, Layout(total, total, CELL, num_ranks, held.rank, held.begin))
    assert np.abs(demand.area - held.load).max() <= 1e-3 * demand.area.mean()
    assert received(cells, held) == int((demand.remote[:, 2] - demand.remote[:, 1]).sum())


@pytest.mark.parametrize("kind", ["causal", "prefix", "blocks"])
def test_fewer_rows_are_received(kind: str) -> None:
    before = after = 0
    for seed in range(3):
        cells = cells_of(packed(TOTAL, kind, lengths(TOTAL, seed)))
        one, other = (dealt(cells, is_recut) for is_recut in (False, True))
        check(cells, other)
        assert other.load.max() <= max(one.load.max(), 1.02 * other.load.mean())
        before, after = before + received(cells, one), after + received(cells, other)
    assert after < 0.995 * before


@pytest.mark.parametrize("kind", ["full", "inverse"])
def test_masks_of_other_kinds_receive_no_more(kind: str) -> None:
    cells = cells_of(packed(TOTAL, kind, lengths(TOTAL, 1)))
    one, other = (dealt(cells, is_recut) for is_recut in (False, True))
    check(cells, other)
    assert received(cells, other) <= received(cells, one)


@pytest.mark.parametrize("family", sorted(MASK_FAMILIES))
def test_random_masks_are_dealt_exactly(family: str) -> None:
    slices = MASK_FAMILIES[family](1 << 10, np.random.default_rng(3))
    cells = cells_of(SliceTable(slices.rows * [256, 256, 256, 256, 1]))
    one, other = (dealt(cells, is_recut, 16) for is_recut in (False, True))
    check(cells, other, 16)
    assert received(cells, other) <= received(cells, one)


def test_whole_documents_stay_as_they_are() -> None:
    total, num_ranks = 1 << 12, 4
    cells = cells_of(packed(total, "causal", [total // num_ranks] * num_ranks), total, 64)
    runs = RowRuns(np.arange(num_ranks + 1) * total // num_ranks, np.arange(num_ranks), np.arange(num_ranks))
    limit = np.full(num_ranks, int(cells.area_before[-1]))
    found = Recut(cells, np.full(num_ranks, total // num_ranks), limit, 1e9).run(runs)
    assert all(np.array_equal(a, b) for a, b in zip(found, runs, strict=True))


def test_documents_of_a_row_are_not_lost() -> None:
    total = 4096
    cells = cells_of(packed(total, "causal", [1, 2, 3, 994, 1000, 1, 3, 1092, 1000]), total, total)
    starts = cells.cuts[cells.first]
    begin = np.sort(np.append(starts, [500, 1500, total]))
    document = np.searchsorted(starts, begin[:-1], side="right") - 1
    runs = RowRuns(begin, np.arange(len(document)) % 3, document)
    wanted = totals(runs.rank, np.diff(begin), 3)
    found = Recut(cells, wanted, np.full(3, int(cells.area_before[-1])), 1e9).run(runs)
    assert (found.begin[0], found.begin[-1]) == (0, total)
    assert np.isin(starts, found.begin).all()
    assert np.array_equal(found.document, np.searchsorted(starts, found.begin[:-1], side="right") - 1)


def recut(cells: Cells, runs: RowRuns, num_ranks: int) -> RowRuns:
    """With as much area as ranks like."""
    wanted = totals(runs.rank, np.diff(runs.begin), num_ranks)
    return Recut(cells, wanted, np.full(num_ranks, int(cells.area_before[-1])), 1e9).run(runs)


def test_a_few_rows_at_the_end_of_a_document_vanish() -> None:
    """The first rank reads a long document for its last 40 rows; the other one, that has the rest, takes them."""
    long, other = 6000, 2000
    cells = cells_of(packed(2 * long, "causal", [long, other, 2 * long - long - other]), 2 * long, 400)
    begin = np.array([0, long - 40, long, long + 1000, long + other, 2 * long])
    runs = RowRuns(begin, np.array([1, 0, 1, 0, 0]), np.array([0, 0, 1, 1, 2]))
    found = recut(cells, runs, 2)
    assert ((found.document == 0) & (found.rank == 0)).sum() == 0
    rows = totals(found.rank, np.diff(found.begin), 2)
    assert np.abs(rows - totals(runs.rank, np.diff(begin), 2)).max() <= 8


def test_cuts_are_shifted_to_the_starts_of_blocks() -> None:
    """A rank that holds 20 rows of a block reads all of it, unless the next one takes them for light rows."""
    length, block = 1024, 256
    cells = cells_of(packed(4 * length, "blocks", [length] * 4), 4 * length, 256)
    begin = np.array([0, 2 * block + 20, length, length + 40, 2 * length, 3 * length, 4 * length])
    runs = RowRuns(begin, np.array([0, 1, 1, 0, 0, 1]), np.array([0, 0, 1, 1, 2, 3]))
    found = recut(cells, runs, 2)
    assert 2 * block - 40 <= found.begin[1] <= 2 * block
    assert np.isin(begin[[2, 4, 5, 6]], found.begin).all()
