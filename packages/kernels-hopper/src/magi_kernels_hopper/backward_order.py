# SPDX-License-Identifier: Apache-2.0
"""The order in which the backward kernel takes tiles of keys, so that what it reads and adds to stays in the L2 cache.

Blocks that work at the same time should meet the same tiles of queries at about the same time: otherwise queries,
gradients of outputs and above all the sums of gradients of queries are moved from and to device memory again and again,
up to 96 KB for each pair of tiles, several times what device memory can move in the time.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.bands import Bands
from magi_attention.common.intervals import Intervals, overlaps
from magi_attention.common.slices import expand_counts
from magi_kernels_hopper.backward_plan import ColumnTables, shortest_tables
from magi_kernels_hopper.plan import Indices

LARGEST_PACK = 2
"""How many query heads of a key head share a tile of queries at most; a power of two.

The more heads, the fewer tiles are partly hidden by the mask. Where neighboring tiles of keys meet other tiles of
queries, it is one, so that they follow each other at a short distance.
"""

LONGEST, MOST_STEPS = 0.2, 160
"""The most that an item may be, if its head can be cut: of what one block computes, and in tiles of queries.

Tiles of keys of a causal document have lists of unlike length. Were their items all packs of a head, their blocks would
soon be at unlike packs, and share nothing in the L2 cache any more.
"""

SMALL, SORTED = 0.1, 0.1
"""Shares of the work, at the end: of what is cut to single packs, and of what is done by length, the longest first.

What is done by length shares little in the cache. NOTES.md has what other shares do.
"""

LEFT_FOR_LAST = 0.02
"""The share of the work that comes after all keys whose gradients somebody waits for, if other keys have so much.

They travel for as long at 8k tokens. So much disturbs no balance: with twice as much, long items of other keys come so
late that the last block is done 1 to 1.5 % later, of packed documents in blocks (NOTES.md).
"""

LARGEST_SHARE = 0.5
"""The most that an item may be of what one block computes, where nothing is added up by several blocks: then it makes
little difference what others are at work on, and the fewer items the better."""


NO_KEYS: Intervals = np.empty((0, 2), np.int64)


class QuerySizes(NamedTuple):
    """How a kernel that computes gradients of queries alone cuts its work.

    Attributes:
        tile_q: queries of a tile.
        box_k: keys of a box.
        num_packs: how often each tile of queries is computed, for other heads.
    """

    tile_q: int
    box_k: int
    num_packs: int


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
    longest = np.zeros(group[-1] + 1 if len(group) else 0, np.int64)
    np.maximum.at(longest, group, steps)
    order = np.lexsort((group, -longest[group]))
    # Within a group from its longer end.
    starts = np.flatnonzero(np.concatenate([[True], np.diff(group[order]) != 0])[: len(order)])
    ends = np.append(starts[1:], len(order))[: len(starts)]
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
        splits: whether the kernel can cut the packs of a head into several items.
        queries: if another kernel computes the gradients of queries, how it does; else all tiles of keys add to them.
    """

    tile_m: int
    tile_k: int
    num_kv_heads: int
    group: int
    blocks: int
    splits: bool = True
    queries: QuerySizes | None = None


class Work(NamedTuple):
    """The work of one mask.

    Attributes:
        pack: query heads of a key head that share a tile of queries; it has ``tile_m // pack`` tokens.
        split: whether the packs of a head are several items, of some tile of keys.
        tables: the mask, in tiles.
        items: ``(n, 4)``, in order: tile of keys, key head, first of its packs, number of packs.
        order: tiles of keys in an order in which all heads and packs take them, if that was asked for.
        awaited: of each tile of keys, whether somebody waits for gradients of some of them.
    """

    pack: int
    split: bool
    tables: ColumnTables
    items: Indices
    order: Indices
    awaited: NDArray[np.bool_]


def order_work(
    bands: Bands, num_q: int, num_k: int, sizes: WorkSizes, *, ordered: bool = False, first_keys: Intervals = NO_KEYS
) -> Work:
    """Decide how to cut the work of a mask, and its order.

    Args:
        bands: which (query, key) pairs count, as ``SliceTable.bands()`` gives them; no pair twice.
        num_q: rows of the query tensor.
        num_k: rows of the key tensor.
        sizes: see there.
        ordered: whether all heads and packs must take tiles of keys in the same order.
        first_keys: runs of keys, ascending and apart, whose gradients somebody waits for; not used if ``ordered``.
    """
    pack = min(sizes.group & -sizes.group, LARGEST_PACK)
    tables = shortest_tables(bands, num_q, num_k, sizes.tile_m // pack, sizes.tile_k)
    if pack > 1 and drifts(tables):
        pack, tables = 1, shortest_tables(bands, num_q, num_k, sizes.tile_m, sizes.tile_k)
    packs, order = sizes.group // pack, clusters(tables)
    steps, awaited = tables.tiles[:, 2], _meet(tables.keys, NO_KEYS if ordered else first_keys)
    is_cut = sizes.splits and bool(steps.any())
    if not is_cut:
        parts = np.ones_like(steps)
    elif sizes.queries is not None:
        parts = _parts(steps, packs, LARGEST_SHARE, sizes)
    elif ordered:
        # A tile that is done with a pack sooner than those before it would wait for them at the next pack.
        parts = np.full_like(steps, 1 if steps.min() == steps.max() else packs)
    else:
        parts = _parts(steps, packs, LONGEST, sizes, MOST_STEPS)
    items = _items(order, parts, packs, sizes.num_kv_heads)
    if is_cut and sizes.queries is not None:
        items = _by_length(items, steps)
    elif is_cut and not ordered:
        items = _by_length(_with_small_end(items, steps, packs), steps)
    items = _others_last(items, steps, awaited)
    return Work(pack, bool((items[:, 3] < packs).any()), tables, items, order, awaited)


def _meet(tiles: Intervals, runs: Intervals) -> NDArray[np.bool_]:
    """Which tiles of keys have any of some runs."""
    met = np.zeros(len(tiles), np.bool_)
    met[overlaps(tiles, runs)[0]] = True
    return met


def _others_last(items: Indices, steps: Indices, awaited: NDArray[np.bool_]) -> Indices:
    """The items, at whose end those of awaited keys come before as much of others as is to be left."""
    if not awaited.any():
        return items
    waits, work = awaited[items[:, 0]], steps[items[:, 0]] * items[:, 3]
    left = np.cumsum((work * ~waits)[::-1])[::-1]  # of others, from each item on
    start = max(int((left >= LEFT_FOR_LAST * work.sum()).sum()) - 1, 0)
    end, waits = items[start:], waits[start:]
    return np.concatenate([items[:start], end[waits], end[~waits]])


def _parts(steps: Indices, packs: int, share: float, sizes: WorkSizes, most_steps: float = np.inf) -> Indices:
    """Into how many items the packs of each tile of keys are cut: none is more than a share of a block's work."""
    longest = min(share * steps.sum() * packs * sizes.num_kv_heads / sizes.blocks, most_steps)
    divisors = np.array([each for each in range(1, packs + 1) if packs % each == 0])
    enough = np.searchsorted(divisors, steps * packs / longest)
    return divisors[np.minimum(enough, len(divisors) - 1)]


def _items(order: Indices, parts: Indices, packs: int, num_heads: int) -> Indices:
    """Head by head the first parts of all tiles of keys, in order, then the second ones of those that have more."""
    place, part = expand_counts(parts[order])
    by_part = np.argsort(part, kind="stable")
    tile, part = order[place[by_part]], part[by_part]
    size = packs // parts[tile]
    head = np.repeat(np.arange(num_heads), len(tile))
    return np.column_stack([np.tile(tile, num_heads), head, np.tile(part * size, num_heads), np.tile(size, num_heads)])


def _at_end(items: Indices, steps: Indices, share: float) -> NDArray[np.bool_]:
    """Which items are the last ``share`` of the work."""
    work = steps[items[:, 0]] * items[:, 3]
    return np.cumsum(work[::-1])[::-1] <= share * work.sum()


def _with_small_end(items: Indices, steps: Indices, packs: int) -> Indices:
    """The items, but for those tiles and heads all of which is in the last share: these pack by pack."""
    last = _at_end(items, steps, SMALL)
    key = items[:, :2] @ [items[:, 1].max() + 1, 1]
    last &= ~np.isin(key, key[~last])
    each = items[last & (items[:, 2] == 0)]
    cut = np.tile(each, (packs, 1))
    cut[:, 2], cut[:, 3] = np.repeat(np.arange(packs), len(each)), 1
    return np.concatenate([items[~last], cut])


def _by_length(items: Indices, steps: Indices) -> Indices:
    """The items, but for the last share: these the longest first, and parts of the same length in turns."""
    last = _at_end(items, steps, SORTED)
    end = items[last]
    return np.concatenate([items[~last], end[np.lexsort((end[:, 2], -steps[end[:, 0]] * end[:, 3]))]])


def _last_tiles(tables: ColumnTables) -> Indices:
    """The last tile of queries of each tile of keys; -1 if it has none."""
    first_run, num_runs = tables.tiles[:, 0], tables.tiles[:, 1]
    last = np.full(len(tables.tiles), -1, np.int64)
    some = num_runs > 0
    last[some] = tables.runs[(first_run + num_runs - 1)[some], 1] - 1
    return last
