# SPDX-License-Identifier: Apache-2.0
"""Which backward kernel computes a mask, where two can: the one that should take less time for what it has to compute.

Tiles of many queries and keys take less time for each pair; small tiles meet fewer pairs that the mask hides.
"""

from typing import NamedTuple

import numpy as np

from magi_attention.common.bands import Bands
from magi_attention.common.intervals import Intervals
from magi_kernels_hopper.backward_order import NO_KEYS, Work, WorkSizes, order_work
from magi_kernels_hopper.plan import FULL, RowTables, row_tables


class Costs(NamedTuple):
    """Nanoseconds of a multiprocessor, as measured on an H200 with 128 dims; NOTES.md has the measurements.

    Only how they compare matters, and other head dims are taken to be alike in that.

    Attributes:
        step: a tile of queries and a tile of keys.
        mask: what a step takes longer where some of its pairs are hidden.
        item: to begin and to end what a block takes from the list.
    """

    step: float
    mask: float
    item: float


COARSE_ROW = 2700 / 80
"""A row of queries in a step of the kernels for most masks."""

COARSE_MASK, COARSE_ITEM, FINE = 500.0, 15000.0, Costs(900, 200, 4000)
"""The other costs of these, and the kernels' for masks of small blocks, but for gradients of queries."""

QUERIES_PAIR, QUERIES_MASKED_PAIR, QUERIES_ROW = 1230 / 8192, 100 / 8192, 2300 / 128
"""The costs of the kernels that compute these: a pair of a row of a tile and a key of a box; what it takes longer in a
tile with a mask; and to begin and to end a tile, for each of its rows."""

MARGIN = 0.9
"""Of the time of the kernels for most masks: the others are taken where they should take less."""


class Choice(NamedTuple):
    """What computes a mask.

    Attributes:
        number: of the candidate.
        work: its work.
        queries: the tables of the kernel that computes gradients of queries, if that is another one.
    """

    number: int
    work: Work
    queries: RowTables | None


def choose_work(
    bands: Bands,
    area: int,
    num_q: int,
    num_k: int,
    candidates: tuple[WorkSizes, ...],
    *,
    ordered: bool,
    first_keys: Intervals = NO_KEYS,
) -> Choice:
    """Order the work of a mask for the kernel that should be faster.

    Args:
        bands: which (query, key) pairs count, as ``SliceTable.bands()`` gives them; no pair twice.
        area: how many these are.
        num_q: rows of the query tensor.
        num_k: rows of the key tensor.
        candidates: the sizes of the kernels, those for most masks first.
        ordered: as for :func:`order_work`.
        first_keys: likewise.
    """

    def choice(number: int, sizes: WorkSizes) -> Choice:
        work, apart = order_work(bands, num_q, num_k, sizes, ordered=ordered, first_keys=first_keys), sizes.queries
        of_queries = None if apart is None else row_tables(bands, num_q, num_k, apart.tile_q, apart.box_k)
        return Choice(number, work, of_queries)

    best = choice(0, candidates[0])
    time = MARGIN * _expected_time(best, candidates[0])
    for number, sizes in enumerate(candidates[1:], 1):
        if area * _least_time_of_a_pair(sizes) >= time:
            continue
        other = choice(number, sizes)
        if (other_time := _expected_time(other, sizes)) < time:
            best, time = other, other_time
    return best


def _least_time_of_a_pair(sizes: WorkSizes) -> float:
    """By small tiles in which the mask hides no pair: of all heads, by both kernels and all blocks."""
    assert sizes.queries is not None
    of_keys = FINE.step / (sizes.tile_m * sizes.tile_k) * sizes.group * sizes.num_kv_heads
    of_queries = QUERIES_PAIR * sizes.group * sizes.num_kv_heads
    return (of_keys + of_queries) / sizes.blocks


def _expected_time(choice: Choice, sizes: WorkSizes) -> float:
    if choice.queries is None or sizes.queries is None:
        return expected_time(choice.work, sizes, Costs(COARSE_ROW * sizes.tile_m, COARSE_MASK, COARSE_ITEM))
    boxes, masked = choice.queries.boxes, 2 * choice.queries.tiles[:, 2]
    rows = sizes.queries.tile_q * sizes.group * sizes.num_kv_heads // sizes.queries.num_packs
    pairs = (boxes * QUERIES_PAIR + masked * QUERIES_MASKED_PAIR) * sizes.queries.box_k
    items = rows * (pairs + QUERIES_ROW)
    of_queries = max(items.sum() * sizes.queries.num_packs / sizes.blocks, items.max(initial=0))
    return expected_time(choice.work, sizes, FINE) + of_queries


def expected_time(work: Work, sizes: WorkSizes, costs: Costs) -> float:
    """How many nanoseconds blocks should be at work on tiles of keys: all, or the one with the longest item."""
    tables = work.tables
    masked = tables.runs[:, 3] != FULL
    of_run = (tables.runs[:, 1] - tables.runs[:, 0]) * (costs.step + costs.mask * masked)
    # Runs are in the order of their tiles of keys.
    sums = np.concatenate([[0], np.cumsum(of_run)])
    of_tile = sums[tables.tiles[:, :2].sum(1)] - sums[tables.tiles[:, 0]]
    of_item = of_tile[work.items[:, 0]] * work.items[:, 3] + costs.item
    return float(max(of_item.sum() / sizes.blocks, of_item.max(initial=0)))
