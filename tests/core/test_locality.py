# SPDX-License-Identifier: Apache-2.0
"""The deal that keeps rows at home: even counts, even loads, few rows received, and the bound below them."""

import itertools

import numpy as np
import pytest

from magi_attention.common.bands import BICAUSAL, CAUSAL, FULL, INVCAUSAL
from magi_attention.common.slices import SliceTable
from magi_attention.config import MinHeapDispatchAlg
from magi_attention.plan import locality
from magi_attention.plan.bounds import received_lower_bound
from magi_attention.plan.chunk_size import choose_chunk_size
from magi_attention.plan.chunks import measure_chunks
from magi_attention.plan.demand import find_demand
from magi_attention.plan.dispatch import min_heap, random_select, sequential
from magi_attention.plan.layout import Layout, even_cuts
from magi_attention.testing.masks import MASK_FAMILIES

ALGORITHM = MinHeapDispatchAlg()


def deal(slices: SliceTable, total: int, chunk_size: int, num_ranks: int) -> np.ndarray:
    work = measure_chunks(slices, even_cuts(total, chunk_size))
    capacity = -(-len(work.area) // num_ranks)
    return locality.deal_by_locality(
        slices, work, chunk_size, num_ranks, lambda: min_heap(work, num_ranks, capacity, ALGORITHM)
    )


def judge(slices: SliceTable, owner: np.ndarray, total: int, chunk_size: int, num_ranks: int) -> tuple[float, int]:
    """The largest area over the mean, and the rows that all ranks receive."""
    demand = find_demand(slices, Layout(total, total, chunk_size, num_ranks, owner))
    received = int((demand.remote[:, 2] - demand.remote[:, 1]).sum())
    return float(demand.area.max() / demand.area.mean()) if demand.area.any() else 1.0, received


def lengths_of_documents(total: int) -> list[int]:
    """Long-tailed lengths that sum to ``total``."""
    drawn = np.random.default_rng(7).lognormal(np.log(total / 256), 1.2, 4096).astype(int).clip(4, total // 4)
    ends = np.minimum(np.cumsum(drawn), total)
    return [int(n) for n in np.diff(ends, prepend=0) if n]


def packed(total: int, kind: str, lengths: list[int] | None = None) -> SliceTable:
    rows, start = [], 0
    for length in lengths or lengths_of_documents(total):
        end, middle = start + length, start + length // 4
        if kind == "prefix":
            rows += [[start, middle, start, middle, FULL], [middle, end, start, end, CAUSAL]]
        elif kind == "blocks":
            rows += [[a, min(a + 256, end), start, min(a + 256, end), FULL] for a in range(start, end, 256)]
        else:
            rows.append([start, end, start, end, {"full": FULL, "causal": CAUSAL, "inverse": INVCAUSAL}[kind]])
        start = end
    return SliceTable(rows).without_empty()


@pytest.mark.parametrize("num_ranks", [8, 32])
@pytest.mark.parametrize("kind", ["full", "causal", "inverse", "prefix", "blocks"])
def test_packed_documents_are_balanced_and_move_half_the_heaps_rows(kind: str, num_ranks: int) -> None:
    total, chunk_size = 1 << 17, 64
    slices = packed(total, kind)
    owner = deal(slices, total, chunk_size, num_ranks)
    work = measure_chunks(slices, even_cuts(total, total // num_ranks // 8))
    heap = min_heap(work, num_ranks, 8, ALGORITHM)
    balance, received = judge(slices, owner, total, chunk_size, num_ranks)
    _, received_by_heap = judge(slices, heap, total, total // num_ranks // 8, num_ranks)
    assert np.ptp(np.bincount(owner, minlength=num_ranks)) == 0
    assert balance <= (1.0031 if num_ranks == 8 else 1.02)
    assert received <= 0.6 * received_by_heap
    assert received >= received_lower_bound(slices, total, num_ranks)


@pytest.mark.parametrize("chunks_per_rank", [16, 32])
@pytest.mark.parametrize("kind", ["full", "causal", "prefix", "blocks"])
def test_few_heavy_chunks_are_evened_out_rather_than_left_to_the_heap(kind: str, chunks_per_rank: int) -> None:
    total, num_ranks = 1 << 17, 128
    chunk_size = total // num_ranks // chunks_per_rank
    slices = packed(total, kind)
    work = measure_chunks(slices, even_cuts(total, chunk_size))
    assert work.area.max() > 0.05 * work.area.sum() / num_ranks
    heap = min_heap(work, num_ranks, chunks_per_rank, ALGORITHM)
    balance, received = judge(slices, deal(slices, total, chunk_size, num_ranks), total, chunk_size, num_ranks)
    _, received_by_heap = judge(slices, heap, total, chunk_size, num_ranks)
    assert balance <= 1.02
    assert received <= 0.5 * received_by_heap


@pytest.mark.parametrize(("kind", "ratio"), [("causal", 1.5), ("inverse", 1.5), ("prefix", 1.8), ("blocks", 1.5)])
def test_no_rank_sends_much_more_than_another_receives(kind: str, ratio: float) -> None:
    total, chunk_size, num_ranks = 1 << 17, 64, 64
    slices = packed(total, kind)
    owner = deal(slices, total, chunk_size, num_ranks)
    demand = find_demand(slices, Layout(total, total, chunk_size, num_ranks, owner))
    reader, start, stop = demand.remote.T
    received = np.bincount(reader, weights=stop - start, minlength=num_ranks)
    readers = np.zeros(total + 1, np.int64)
    np.add.at(readers, start, 1)
    np.add.at(readers, stop, -1)
    sent = np.bincount(owner.repeat(chunk_size), weights=np.cumsum(readers)[:-1], minlength=num_ranks)
    assert sent.sum() == received.sum() == demand.rows_received
    assert max(sent.max(), received.max()) == demand.most_moved
    assert sent.max() <= ratio * received.max()


@pytest.mark.parametrize("num_ranks", [2, 7, 16])
def test_causal_mask_comes_within_the_tolerance_of_its_bound(num_ranks: int) -> None:
    total, chunk_size = 64 * 16 * num_ranks, 16
    slices = SliceTable([[0, total, 0, total, CAUSAL]])
    balance, received = judge(slices, deal(slices, total, chunk_size, num_ranks), total, chunk_size, num_ranks)
    assert balance <= 1.02
    assert received_lower_bound(slices, total, num_ranks) <= received
    assert received <= 1.1 * received_lower_bound(slices, total, num_ranks, tolerance=0.0)


@pytest.mark.parametrize(
    "slices",
    [
        pytest.param(SliceTable([[0, 4096, 0, 4096, FULL]]), id="full"),
        pytest.param(SliceTable([[0, 64, 0, 64, CAUSAL], [64, 4096, 1, 4096, BICAUSAL]]), id="sliding window"),
        pytest.param(SliceTable([[a, a + 256, a, a + 256, FULL] for a in range(0, 4096, 256)]), id="equal documents"),
    ],
)
def test_uniform_masks_are_dealt_in_one_run_per_rank(slices: SliceTable) -> None:
    owner = deal(slices, 4096, 16, 8)
    assert np.count_nonzero(np.diff(owner)) == 7


@pytest.mark.parametrize("family", sorted(MASK_FAMILIES))
def test_random_masks_never_do_worse_than_the_heap(family: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(8):
        num_ranks, chunk_size = int(rng.integers(2, 9)), int(rng.integers(1, 9))
        total = num_ranks * chunk_size * int(rng.integers(1, 24))
        slices = MASK_FAMILIES[family](total, rng)
        owner = deal(slices, total, chunk_size, num_ranks)
        heap = min_heap(
            measure_chunks(slices, even_cuts(total, chunk_size)), num_ranks, total // chunk_size // num_ranks, ALGORITHM
        )
        balance, received = judge(slices, owner, total, chunk_size, num_ranks)
        heap_balance, received_by_heap = judge(slices, heap, total, chunk_size, num_ranks)
        assert np.ptp(np.bincount(owner, minlength=num_ranks)) == 0
        assert balance <= max(1.02, 1.02 * heap_balance)
        assert received <= received_by_heap


@pytest.mark.parametrize("kind", ["full", "causal", "prefix"])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_of_few_chunks_several_deals_are_compared(kind: str, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What travels and what the busiest rank moves become less in all, and never more."""
    total, chunk_size, rng = num_ranks << 12, 64, np.random.default_rng(5)

    def burden(slices: SliceTable) -> int:
        layout = Layout(total, total, chunk_size, num_ranks, deal(slices, total, chunk_size, num_ranks))
        demand = find_demand(slices, layout)
        assert demand.area.max() <= 1.02 * demand.area.mean()
        return demand.rows_received + num_ranks * demand.most_moved

    masks = []
    for _ in range(6):
        ends = np.unique(np.append(rng.integers(1, total, 3 * num_ranks), total))
        masks.append(packed(total, kind, np.diff(ends, prepend=0).tolist()))
    compared = [burden(slices) for slices in masks]
    monkeypatch.setattr(locality, "MORE_JOINED", ())
    alone = [burden(slices) for slices in masks]
    assert all(a <= b for a, b in zip(compared, alone, strict=True))
    assert sum(compared) < sum(alone)


@pytest.mark.parametrize("num_chunks", [9, 31, 200])
def test_uneven_counts_differ_by_at_most_one(num_chunks: int) -> None:
    slices = SliceTable([[0, num_chunks * 8 - 3, 0, num_chunks * 8 - 3, CAUSAL]])
    owner = deal(slices, num_chunks * 8 - 3, 8, 8)
    assert np.ptp(np.bincount(owner, minlength=8)) == (num_chunks % 8 > 0)


def test_masks_without_any_pair_are_dealt_evenly() -> None:
    owner = deal(SliceTable([]), 640, 8, 5)
    assert np.bincount(owner, minlength=5).tolist() == [16] * 5


def test_the_deal_depends_on_the_mask_alone() -> None:
    slices = packed(1 << 14, "causal")
    shuffled = SliceTable(np.random.default_rng(0).permutation(slices.rows))
    first, again, other = (deal(table, 1 << 14, 16, 8) for table in (slices, slices, shuffled))
    assert first.tolist() == again.tolist() == other.tolist()


def test_dense_chunks_of_a_document_are_not_scattered() -> None:
    total, num_ranks = 1 << 16, 16
    owner = deal(packed(total, "causal"), total, 32, num_ranks)
    assert np.count_nonzero(np.diff(owner)) <= 10 * num_ranks


@pytest.mark.parametrize("family", sorted(MASK_FAMILIES))
def test_bound_holds_for_every_algorithm(family: str) -> None:
    rng = np.random.default_rng(11)
    for _ in range(6):
        num_ranks = int(rng.integers(2, 7))
        total = num_ranks * int(rng.integers(4, 60))
        slices = MASK_FAMILIES[family](total, rng)
        work = measure_chunks(slices, even_cuts(total, 1))
        capacity = total // num_ranks
        deals = [make(work, num_ranks, capacity, ALGORITHM) for make in (min_heap, sequential, random_select)]
        for owner in [*deals, deal(slices, total, 1, num_ranks)]:
            balance, received = judge(slices, owner, total, 1, num_ranks)
            # A deal that is less balanced than the tolerance is bounded with its own balance as the tolerance.
            bound = received_lower_bound(slices, total, num_ranks, tolerance=max(balance - 1, 0) + 1e-9)
            assert bound <= received


@pytest.mark.parametrize("family", sorted(MASK_FAMILIES))
def test_bound_holds_for_every_deal_of_a_tiny_mask(family: str) -> None:
    rng = np.random.default_rng(5)
    total, num_ranks = 9, 3
    deals = [
        np.array(owner)
        for owner in itertools.product(range(num_ranks), repeat=total)
        if owner[0] == 0 and all(owner.count(rank) == 3 for rank in range(num_ranks))
    ]
    for _ in range(2):
        slices = MASK_FAMILIES[family](total, rng)
        mask = np.zeros((total, total), bool)
        for q0, q1, k0, k1, d0, d1 in slices.bands().tolist():
            i, j = np.ogrid[:total, :total]
            mask |= (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1) & (d0 <= j - i) & (j - i <= d1)
        for tolerance in (0.02, 0.3):
            bound = received_lower_bound(slices, total, num_ranks, tolerance)
            most = (1 + tolerance) * mask.sum() / num_ranks + 1e-9
            for owner in deals:
                parts = [mask[owner == rank] for rank in range(num_ranks)]
                if max(part.sum() for part in parts) <= most:
                    needed = [np.count_nonzero(part.any(0) & (owner != rank)) for rank, part in enumerate(parts)]
                    assert bound <= sum(needed)


def test_bound_is_exact_for_a_full_mask() -> None:
    assert received_lower_bound(SliceTable([[0, 1000, 0, 1000, FULL]]), 1000, 8) == 7 * 1000


@pytest.mark.parametrize("num_ranks", [1, 2, 6, 64, 1024])
@pytest.mark.parametrize("total", [1, 100, 4096, 1_000_003, 1 << 22])
def test_chosen_chunks_are_neither_many_nor_few_and_pad_little(total: int, num_ranks: int) -> None:
    chunk_size = choose_chunk_size(total, num_ranks)
    assert chunk_size & (chunk_size - 1) == 0
    if total >= 8 * num_ranks:
        assert total >= 8 * num_ranks * chunk_size
    assert total <= chunk_size * max(8192, 64 * num_ranks)
    if total >= 64 * 16 * num_ranks:
        assert -total % (chunk_size * num_ranks) <= total / 64
