# SPDX-License-Identifier: Apache-2.0
"""Prices of rows prove a lower bound on the rows that ranks receive: never more than the best deal has."""

import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from magi_attention.common import workloads
from magi_attention.common.bands import CAUSAL, FULL
from magi_attention.common.slices import SliceTable
from magi_attention.plan.bounds import received_lower_bound
from magi_attention.plan.documents import component_starts
from magi_attention.plan.prices import DocumentPrices, RowProgram, priced_lower_bound
from magi_attention.testing.masks import MASK_FAMILIES

TOTAL, RANKS, TOLERANCE = 12, 3, 0.1
REACHES = [1.5, 3.5, 6.5]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def deals() -> np.ndarray:
    """All ways to give three ranks four rows each, as owners; the first row is the first rank's."""
    found = []
    for first in itertools.combinations(range(1, TOTAL), 3):
        rest = [row for row in range(1, TOTAL) if row not in first]
        for second in itertools.combinations(rest[1:], 3):
            owner = np.full(TOTAL, 2)
            owner[[0, *first]] = 0
            owner[[rest[0], *second]] = 1
            found.append(owner)
    return np.array(found)


def fewest_received(slices: SliceTable, owners: np.ndarray) -> int | None:
    """Of all deals whose areas are within the tolerance, the fewest rows that ranks receive."""
    mask = np.zeros((TOTAL, TOTAL), bool)
    for q0, q1, k0, k1, d0, d1 in slices.bands().tolist():
        i, j = np.ogrid[:TOTAL, :TOTAL]
        mask |= (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1) & (d0 <= j - i) & (j - i <= d1)
    received, most = np.zeros(len(owners), np.int64), np.zeros(len(owners), np.int64)
    for rank in range(RANKS):
        mine = owners == rank
        received += np.count_nonzero((mine @ mask) & ~mine, axis=1)
        most = np.maximum(most, mine @ mask.sum(axis=1))
    allowed = most <= (1 + TOLERANCE) * mask.sum() / RANKS + 1e-9
    return int(received[allowed].min()) if allowed.any() else None


def by_keys(num_documents: int) -> DocumentPrices:
    """Prices of 1 for all keys, none for rows."""
    return DocumentPrices(num_documents, [0, 4, 12], [0.0] * 3, REACHES, [0.0] * 3, [0.0] * 3, REACHES, [1.0] * 3)


def of_both_kinds(num_documents: int) -> DocumentPrices:
    """Some of what a rank pays for its reach is paid for its rows."""
    return replace(by_keys(num_documents), rows=[0.5, 1.0, 2.0], of_area=[0.1] * 3, keys=[0.3] * 3)


def changed(prices: DocumentPrices, rng: np.random.Generator) -> DocumentPrices:
    """Prices nearby."""
    name, size = [("rows", 1.0), ("of_rows", 0.5), ("of_area", 0.3), ("keys", 0.3)][rng.integers(4)]
    values = np.array(getattr(prices, name)) + rng.normal(0, size, 3) * rng.integers(0, 2, 3)
    if name == "of_area":
        values = np.maximum(values, 0)
    if name == "keys":
        values = values.clip(0, 1)
    return replace(prices, **{name: values.tolist()})


@pytest.mark.parametrize("family", [*sorted(MASK_FAMILIES), "documents"])
def test_no_prices_prove_more_than_the_best_deal_receives(family: str) -> None:
    rng = np.random.default_rng(17)
    owners, climbed = deals(), 0
    for _ in range(3):
        slices = documents(rng) if family == "documents" else MASK_FAMILIES[family](TOTAL, rng)
        fewest = fewest_received(slices, owners)
        if fewest is None:
            continue
        num = len(component_starts(slices))
        if not num:
            continue
        program = RowProgram(slices, TOTAL, RANKS, TOLERANCE)
        for start in (by_keys(num), of_both_kinds(num)):
            best = [replace(start, stop=stop) for stop in sorted({(num + 1) // 2, num})]
            proved = program.prove(program.lay_out(best))
            for _ in range(300):
                tried = [changed(prices, rng) if rng.random() < 0.7 else prices for prices in best]
                bound = program.prove(program.lay_out(tried))
                assert bound <= fewest + 1e-6
                if bound >= proved:
                    best, climbed, proved = tried, climbed + (bound > proved), bound
    assert family != "documents" or climbed > 20


def documents(rng: np.random.Generator) -> SliceTable:
    """Packed causal documents of random lengths, some with a prefix that is read in both directions."""
    ends = np.append(np.sort(rng.choice(np.arange(1, TOTAL), int(rng.integers(1, 4)), replace=False)), TOTAL)
    rows, start = [], 0
    for end in ends.tolist():
        prefix = int(rng.integers(start, end))
        rows += [[start, prefix, start, prefix, FULL], [prefix, end, start, end, CAUSAL]]
        start = end
    return SliceTable(rows).without_empty()


def test_prices_of_keys_alone_prove_what_each_key_proves() -> None:
    length, ranks = 4096, 8
    slices = SliceTable([[0, length, 0, length, CAUSAL]])
    prices = DocumentPrices(1, [0, length], [0.0, 0.0], [length], [0.0], [0.0], [length], [1.0])
    # That bound treats keys in pieces, this one each for itself.
    in_pieces = received_lower_bound(slices, length, ranks)
    assert in_pieces <= priced_lower_bound(slices, length, ranks, [prices]) <= 1.01 * in_pieces
    full = SliceTable([[0, length, 0, length, FULL]])
    assert priced_lower_bound(full, length, ranks, [prices]) == 7 * length


def test_known_prices_prove_that_half_of_the_heaps_rows_is_out_of_reach() -> None:
    found = json.loads((BENCHMARKS / "planner_prices.json").read_text())["varlen_causal 4194304 256"]
    total, num_ranks = 4 << 20, 256
    with (BENCHMARKS / "planner_original.csv").open() as table:
        heap = {(row["mask"], int(row["tokens"]), int(row["cp"])): row for row in csv.DictReader(table)}
    received = float(heap["varlen_causal", total, num_ranks]["received_millions"]) * 1e6
    slices = workloads.make("varlen_causal", total)
    proved = priced_lower_bound(slices, total, num_ranks, [DocumentPrices(**each) for each in found])
    assert received / 2 < proved < received


def test_wrong_prices_are_refused() -> None:
    slices = SliceTable([[0, 4, 0, 4, FULL], [4, 12, 4, 12, CAUSAL]])
    with pytest.raises(ValueError, match="all 2 documents"):
        priced_lower_bound(slices, TOTAL, RANKS, [by_keys(1)])
    for wrong in ({"of_area": [-1.0, 0.0, 0.0]}, {"keys": [2.0, 0.0, 0.0]}):
        with pytest.raises(ValueError, match="must not be negative"):
            priced_lower_bound(slices, TOTAL, RANKS, [replace(by_keys(2), **wrong)])
