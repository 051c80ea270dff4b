# SPDX-License-Identifier: Apache-2.0
"""The order in which the backward kernel takes tiles of keys, so that what it reads and adds to stays in the L2 cache.

Blocks that work at the same time should meet the same tiles of queries at about the same time: otherwise queries,
gradients of outputs and above all the sums of gradients of queries are moved from and to device memory again and again,
up to 96 KB for each pair of tiles, several times what device memory can move in the time.
"""

import heapq
from typing import NamedTuple

import numpy as np

from magi_attention.common.bands import Bands
from magi_kernels_hopper.backward_plan import ColumnTables, column_tables, mark_first
from magi_kernels_hopper.plan import Indices

LARGEST_PACK = 2
"""How many query heads of a key head share a tile of queries at most; a power of two.

The more heads, the fewer tiles are partly hidden by the mask. Where neighboring tiles of keys meet other tiles of
queries, it is one, so that they follow each other at a short distance.
"""

START_COST, SPLIT_COST = 2, 3
"""Steps that it takes to begin and end an item of all packs of a head, and one of a part of them."""

SPLIT_TILE = 128
"""Keys of a tile of kernels that can cut the packs of a head into several items."""

FEW_HEADS = 2
"""Query heads of an item at most, where an item is to have few: queries and sums of as many fit the L2 cache."""

TAILS = (0.05, 0.15)
"""Shares of the work that may be done last, shortest items at the end."""

WORTHWHILE = 0.98
"""How much less time must be taken by an order that is further from that of ``clusters``."""

MOST_ITEMS = 1 << 14
"""Lists of more items are balanced enough with the smallest tail."""


def drifts(tables: ColumnTables) -> bool:
    """Whether neighboring tiles of keys mostly begin with other tiles of queries, as those of a sliding window do.

    Tiles of queries then have one head each, so that neighbors follow each other at a short distance.
    """
    last = _last_tiles(tables)
    steps = tables.tiles[:, 2]
    both = (steps[1:] > 0) & (steps[:-1] > 0)
    moved = both & (last[1:] != last[:-1])
    return bool(2 * steps[1:][moved].sum() > steps[1:][both].sum())


def clusters(tables: ColumnTables) -> Indices:
    """Order tiles of keys: side by side those that share most of their tiles of queries, the longest lists first."""
    steps, last = tables.tiles[:, 2], _last_tiles(tables)
    first = np.where(steps > 0, last - steps + 1, 0)  # as if lists had no gaps
    shared = np.minimum(last[1:], last[:-1]) - np.maximum(first[1:], first[:-1]) + 1
    group = np.concatenate([[0][: len(steps)], np.cumsum(2 * shared < steps[1:])]).astype(np.int64)
    longest = np.zeros(group[-1] + 1, np.int64)
    np.maximum.at(longest, group, steps)
    order = np.lexsort((group, -longest[group]))
    # Within a group from its longer end.
    starts = np.flatnonzero(np.concatenate([[True], np.diff(group[order]) != 0]))
    ends = np.append(starts[1:], len(order))
    backward = steps[order[ends - 1]] > steps[order[starts]]
    place = np.arange(len(order))
    run = np.searchsorted(starts, place, side="right") - 1
    return order[np.where(backward[run], starts[run] + ends[run] - 1 - place, place)]


class WorkSizes(NamedTuple):
    """What the order of work depends on, besides the mask.

    Attributes:
        tile_m: rows of a tile of queries.
        tile_k: keys of a tile.
        num_kv_heads: key heads.
        group: query heads of a key head.
        blocks: how many work at the same time.
    """

    tile_m: int
    tile_k: int
    num_kv_heads: int
    group: int
    blocks: int


class Work(NamedTuple):
    """The work of one mask.

    Attributes:
        pack: query heads of a key head that share a tile of queries; it has ``tile_m // pack`` tokens.
        split: how many items the packs of one head are.
        tables: the mask, in tiles.
        items: ``(n, 4)``, in order: tile of keys, key head, first of its packs, number of packs.
        order: tiles of keys in the order in which they are taken for each head.
    """

    pack: int
    split: int
    tables: ColumnTables
    items: Indices
    order: Indices


def order_work(bands: Bands, num_q: int, num_k: int, sizes: WorkSizes) -> Work:
    """Decide how to cut the work of a mask, and its order.

    Args:
        bands: which (query, key) pairs count, as ``SliceTable.bands()`` gives them; no pair twice.
        num_q: rows of the query tensor.
        num_k: rows of the key tensor.
        sizes: see there.
    """
    pack = min(sizes.group & -sizes.group, LARGEST_PACK)
    tables = column_tables(bands, num_q, num_k, sizes.tile_m // pack, sizes.tile_k)
    drifting = drifts(tables)
    if drifting and pack > 1:
        pack, tables = 1, column_tables(bands, num_q, num_k, sizes.tile_m, sizes.tile_k)
    packs = sizes.group // pack
    order, split = _best_order(tables, sizes, packs, spread=not drifting)
    items = np.empty((len(order), 4), np.int64)
    items[:, 0], part, items[:, 3] = order[:, 0], order[:, 1], packs // split
    items[:, 1], items[:, 2] = part // split, part % split * (packs // split)
    once = order[part == 0, 0]
    return Work(pack, split, mark_first(tables, once), items, once)


def _best_order(tables: ColumnTables, sizes: WorkSizes, packs: int, *, spread: bool) -> tuple[Indices, int]:
    """Order items ``(tile, part of all heads)``, and say how many parts a head has.

    As near to the order of ``clusters``, part by part, and of as few parts, as balance allows; but where blocks meet
    tiles of queries that are ``spread``, and not a band of them, an item has few heads.
    """
    order, steps = clusters(tables), tables.tiles[:, 2]
    splits = [each for each in range(1, packs + 1) if packs % each == 0] if sizes.tile_k == SPLIT_TILE else [1]
    few = [each for each in splits if packs // each * sizes.group <= FEW_HEADS * packs]
    if spread and few and len(order) and steps.min() < steps.max():
        splits = few
    if len(order) * sizes.num_kv_heads * splits[0] > MOST_ITEMS:
        return _with_tail(tables, order, sizes.num_kv_heads * splits[0], TAILS[0]), splits[0]
    best: tuple[float, Indices, int] | None = None
    for split in splits[:2]:
        costs = steps * (packs // split) + (START_COST if split == 1 else SPLIT_COST)
        for tail in TAILS:
            candidate = _with_tail(tables, order, sizes.num_kv_heads * split, tail)
            time = _time(costs[candidate[:, 0]], sizes.blocks)
            if best is None or time < best[0] * WORTHWHILE:
                best = time, candidate, split
    assert best is not None
    return best[1:]


def _with_tail(tables: ColumnTables, order: Indices, num_parts: int, tail: float) -> Indices:
    """Items ``(tile, part)`` part by part, but for the shortest of them, which come last."""
    steps = tables.tiles[order, 2]
    by_length = np.argsort(steps, kind="stable")
    reached = np.cumsum(steps[by_length])
    num_short = int(np.searchsorted(reached, tail * reached[-1])) if len(order) else 0
    is_short = np.zeros(len(order), bool)
    is_short[by_length[:num_short]] = True
    both = order[~is_short], order[by_length[:num_short][::-1]]
    return np.concatenate(
        [np.column_stack([np.tile(each, num_parts), np.repeat(np.arange(num_parts), len(each))]) for each in both]
    )


def _time(costs: Indices, blocks: int) -> int:
    """How long it takes until all is done, if each block takes the next item when it is done with one."""
    free = [0] * blocks
    for cost in costs.tolist():
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


def _last_tiles(tables: ColumnTables) -> Indices:
    """The last tile of queries of each tile of keys; -1 if it has none."""
    first_run, num_runs = tables.tiles[:, 0], tables.tiles[:, 1]
    last = np.full(len(tables.tiles), -1, np.int64)
    some = num_runs > 0
    last[some] = tables.runs[(first_run + num_runs - 1)[some], 1] - 1
    return last
