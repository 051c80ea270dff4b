# SPDX-License-Identifier: Apache-2.0
"""Swaps that spare the ranks rows to send and to receive: counts stay, areas stay within their limit, rows fall."""

import numpy as np
import pytest

from magi_attention.common.bands import BICAUSAL, CAUSAL, FULL
from magi_attention.common.slices import SliceTable
from magi_attention.plan.chunks import measure_chunks
from magi_attention.plan.demand import find_demand
from magi_attention.plan.documents import Documents, find_documents
from magi_attention.plan.gather import ReceiverSwaps
from magi_attention.plan.layout import Layout, even_cuts
from magi_attention.plan.spread import SenderSwaps
from magi_attention.plan.swaps import Swaps
from magi_attention.plan.totals import totals

CHUNK = 32
LENGTHS = [96, 24, 8, 40, 16, 8, 64, 8, 12, 20, 4, 84]  # of documents, in chunks
NUM_RANKS = 12


def packed(kind: int) -> SliceTable:
    ends = np.cumsum([0, *LENGTHS]) * CHUNK
    return SliceTable([[a, b, a, b, kind] for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)])


def documents_of(slices: SliceTable) -> Documents:
    total = sum(LENGTHS) * CHUNK
    return find_documents(slices, measure_chunks(slices, even_cuts(total, CHUNK)), NUM_RANKS, 0.0)


def chunks_sent(slices: SliceTable, owner: np.ndarray) -> tuple[np.ndarray, int]:
    """The chunks that each rank sends, counted once for each receiver, and the rows that all receive."""
    total = len(owner) * CHUNK
    remote = find_demand(slices, Layout(total, total, CHUNK, NUM_RANKS, owner)).remote
    change = np.zeros(total + 1, np.int64)
    np.add.at(change, remote[:, 1], 1)
    np.add.at(change, remote[:, 2], -1)
    rows = np.cumsum(change)[:-1].reshape(-1, CHUNK).sum(axis=1)
    return totals(owner, rows, NUM_RANKS) // CHUNK, int((remote[:, 2] - remote[:, 1]).sum())


def random_owner(seed: int) -> np.ndarray:
    """Runs of a few chunks, dealt at random, equally many chunks to each rank."""
    random = np.random.default_rng(seed)
    runs = np.repeat(random.permutation(np.arange(sum(LENGTHS) // 4) % NUM_RANKS), 4)
    return runs.astype(np.int64)


@pytest.mark.parametrize("kind", [FULL, CAUSAL])
@pytest.mark.parametrize("seed", range(4))
def test_the_busiest_sender_sends_less_and_counts_and_areas_stay(kind: int, seed: int) -> None:
    slices, owner = packed(kind), random_owner(seed)
    documents = documents_of(slices)
    area = np.diff(documents.area)
    load = totals(owner, area, NUM_RANKS)
    sent, received = chunks_sent(slices, owner)
    most_sent = 0.9 * float(sent.max())
    swapped = SenderSwaps(owner, documents, NUM_RANKS, CHUNK, int(load.max()), most_sent).run()
    assert np.array_equal(np.bincount(swapped), np.bincount(owner))
    assert totals(swapped, area, NUM_RANKS).max() <= load.max()
    sent_then, received_then = chunks_sent(slices, swapped)
    assert sent_then.max() < sent.max()
    # A row that the busiest need not send costs at most 0.7 rows more to receive.
    assert received_then - received <= 0.7 * CHUNK * np.maximum(sent - most_sent, 0).sum()


@pytest.mark.parametrize("kind", [FULL, CAUSAL])
def test_what_ranks_send_is_known_without_the_exact_demand(kind: int) -> None:
    slices, owner = packed(kind), random_owner(0)
    swaps = Swaps(owner, documents_of(slices), NUM_RANKS, CHUNK, 1 << 40, 1e9)
    runs = swaps.find_runs()
    sent = swaps.sent_by(runs, swaps.count_sends(runs))
    assert np.array_equal(sent, chunks_sent(slices, owner)[0] * CHUNK)


@pytest.mark.parametrize("kind", [FULL, CAUSAL])
@pytest.mark.parametrize("seed", range(4))
def test_fewer_rows_are_received_and_counts_and_areas_stay_and_nobody_sends_more(kind: int, seed: int) -> None:
    slices, owner = packed(kind), random_owner(seed)
    documents = documents_of(slices)
    area = np.diff(documents.area)
    load = totals(owner, area, NUM_RANKS)
    sent, received = chunks_sent(slices, owner)
    swapped = ReceiverSwaps(owner, documents, NUM_RANKS, CHUNK, int(load.max()), float(sent.max())).run()
    assert np.array_equal(np.bincount(swapped), np.bincount(owner))
    assert totals(swapped, area, NUM_RANKS).max() <= load.max()
    sent_then, received_then = chunks_sent(slices, swapped)
    assert sent_then.max() <= sent.max()
    assert received_then < 0.9 * received


@pytest.mark.parametrize("kind", [FULL, CAUSAL])
def test_what_a_swap_saves_is_known_without_the_exact_demand(kind: int) -> None:
    slices, owner = packed(kind), random_owner(0)
    swaps = ReceiverSwaps(owner, documents_of(slices), NUM_RANKS, CHUNK, 1 << 40, 1e9)
    runs = swaps.find_runs()
    pairs = swaps._pairs(runs)
    cost = swaps._cost(runs, pairs)
    received = chunks_sent(slices, owner)[1]
    for pair in np.random.default_rng(0).choice(len(cost), 50, replace=False).tolist():
        swapped = owner.copy()
        swapped[pairs.start[pair] : pairs.stop[pair]] = pairs.taker[pair]
        swapped[pairs.other_start[pair] : pairs.other_stop[pair]] = pairs.giver[pair]
        assert chunks_sent(slices, swapped)[1] - received == cost[pair]


@pytest.mark.parametrize("swaps", [SenderSwaps, ReceiverSwaps])
def test_a_sliding_window_is_left_alone(swaps: type[SenderSwaps] | type[ReceiverSwaps]) -> None:
    total, window = sum(LENGTHS) * CHUNK, 8 * CHUNK
    slices = SliceTable([[0, window, 0, window, CAUSAL], [window, total, 1, total, BICAUSAL]])
    owner = np.repeat(np.arange(NUM_RANKS), sum(LENGTHS) // NUM_RANKS)
    assert np.array_equal(swaps(owner, documents_of(slices), NUM_RANKS, CHUNK, 1 << 40, 100.0).run(), owner)


@pytest.mark.parametrize("swaps", [SenderSwaps, ReceiverSwaps])
def test_a_mask_without_any_pair_is_left_alone(swaps: type[SenderSwaps] | type[ReceiverSwaps]) -> None:
    slices, owner = SliceTable([]), random_owner(0)
    assert np.array_equal(swaps(owner, documents_of(slices), NUM_RANKS, CHUNK, 0, 1.0).run(), owner)
