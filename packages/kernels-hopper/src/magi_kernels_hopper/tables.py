# SPDX-License-Identifier: Apache-2.0
"""The kernels' tables on a device: uploaded once for each mask and geometry, and kept with the mask."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.device_tiles import upload
from magi_kernels_hopper.backward_choice import choose_work
from magi_kernels_hopper.backward_order import WorkSizes
from magi_kernels_hopper.backward_plan import adders, ranks, rests
from magi_kernels_hopper.plan import RowTables, row_tables
from magi_kernels_hopper.split import most_boxes
from magi_kernels_hopper.variants import ForwardVariant, forward_variants

TALL_PAIRS = 1.05
"""How many times the pairs of the other kernel a tall one may compute and still be faster: it was 6 to 9 % faster for
each (NOTES.md)."""


AWAITED = 1 << 15
"""With the rests of a tile of keys: somebody waits for its gradients; ``kAwaited`` in csrc/backward/params.cuh."""

MOST_RANKS = 2**31 - 1
"""How many ranks the kernel can tell apart: tables are int32."""


class DeviceRowTables(NamedTuple):
    """:class:`magi_kernels_hopper.plan.RowTables`, as int32.

    Attributes:
        tiles: as are the next four, see there.
        runs: see there.
        pieces: see there.
        order: see there.
        parts: see there.
        num_parts: the most parts of a tile.
        tile_q: queries of a tile.
        tall: whether they are for the tall kernel.
    """

    tiles: Tensor
    runs: Tensor
    pieces: Tensor
    order: Tensor
    parts: Tensor
    num_parts: int
    tile_q: int
    tall: bool


def device_row_tables(
    slices: SliceTable,
    num_q: int,
    num_k: int,
    share_q: int,
    variant: ForwardVariant,
    device: torch.device,
    *,
    copies: int,
    blocks: int,
) -> DeviceRowTables:
    """Build and upload the tables of a mask, for the kernel that computes it faster.

    Args:
        slices: the mask.
        num_q: rows of the query tensor.
        num_k: rows of the key tensor.
        share_q: queries of a consumer of a tile.
        variant: the kernel that is not tall.
        device: where to upload to.
        copies: how often each tile of queries is computed, for other heads.
        blocks: that work at a time.
    """
    candidates = forward_variants((variant.head_dim, variant.head_dim_v), variant.element, variant.softcap)
    cuts = [(share_q * each.sizes.consumers, each.sizes.box_n) for each in candidates]

    def build() -> DeviceRowTables:
        choices = [row_tables(slices.bands(), num_q, num_k, *cut) for cut in cuts]
        pairs = [_pairs(tables, *cut) for tables, cut in zip(choices, cuts, strict=True)]
        tall = len(cuts) > 1 and pairs[-1] < TALL_PAIRS * pairs[0]
        chosen, cut = choices[tall], cuts[tall]
        if (limit := most_boxes(chosen.boxes, copies, blocks)) is not None:
            chosen = row_tables(slices.bands(), num_q, num_k, *cut, limit)
        elif not tall:
            return _uncut_rows(slices, chosen, num_q, num_k, cut, device)
        return _upload_rows(chosen, cut[0], device, tall=tall)

    return slices.derived(("hopper rows", num_q, num_k, *cuts, device, copies, blocks), build)


def _uncut_rows(
    slices: SliceTable, tables: RowTables, num_q: int, num_k: int, cut: tuple[int, int], device: torch.device
) -> DeviceRowTables:
    """Tables of which no tile is cut into parts, uploaded once for both passes."""
    key = ("hopper uncut rows", num_q, num_k, *cut, device)
    return slices.derived(key, lambda: _upload_rows(tables, cut[0], device, tall=False))


def _upload_rows(tables: RowTables, tile_q: int, device: torch.device, *, tall: bool) -> DeviceRowTables:
    return DeviceRowTables(
        tiles=upload(tables.tiles, device),
        runs=upload(tables.runs, device),
        pieces=upload(tables.pieces, device),
        order=upload(tables.order, device),
        parts=upload(tables.parts, device),
        num_parts=int(tables.parts.max(initial=1)),
        tile_q=tile_q,
        tall=tall,
    )


class DeviceColumnTables(NamedTuple):
    """:class:`magi_kernels_hopper.backward_order.Work` and the tables that it is of, as int32.

    Attributes:
        chosen: the number of the kernel that they are for.
        pack: query heads that share a tile of queries.
        split: whether the packs of a head are several items.
        tiles: as are the next two, of :class:`magi_kernels_hopper.backward_plan.ColumnTables`.
        runs: see there.
        pieces: see there.
        keys: as it is there, with :func:`magi_kernels_hopper.backward_plan.rests` and :data:`AWAITED` beside it.
        items: the work, in order.
        adders: :func:`magi_kernels_hopper.backward_plan.adders`.
        num_met: tiles of queries, of one pack, that some tile of keys meets.
        num_awaited: tiles of keys whose gradients somebody waits for.
        ranks: :func:`magi_kernels_hopper.backward_plan.ranks`, if gradients are to be added up in order.
        queries: what the kernel that computes gradients of queries reads, if that is another one.
    """

    chosen: int
    pack: int
    split: bool
    tiles: Tensor
    runs: Tensor
    pieces: Tensor
    keys: Tensor
    items: Tensor
    adders: Tensor
    num_met: int
    num_awaited: int
    ranks: Tensor | None
    queries: DeviceRowTables | None


def device_column_tables(
    slices: SliceTable,
    num_q: int,
    num_k: int,
    candidates: tuple[WorkSizes, ...],
    device: torch.device,
    *,
    ordered: bool,
    first_keys: tuple[tuple[int, int], ...] = (),
) -> DeviceColumnTables:
    """Build and upload the tables of a mask, for the kernel that should be faster.

    Args:
        slices: the mask.
        num_q: rows of the query tensor.
        num_k: rows of the key tensor.
        candidates: the sizes of a kernel or of two, see :func:`magi_kernels_hopper.backward_choice.choose_work`.
        device: where to upload to.
        ordered: whether gradients are to be added up in order, which takes ranks.
        first_keys: as for :func:`magi_kernels_hopper.backward_order.order_work`.

    Raises:
        RuntimeError: If the mask is too large to have ranks.
    """

    def build() -> DeviceColumnTables:
        awaited = np.array(first_keys, np.int64).reshape(-1, 2)
        how = slices.bands(), slices.area(), num_q, num_k, candidates
        choice = choose_work(*how, ordered=ordered, first_keys=awaited)
        work, tables, sizes = choice.work, choice.work.tables, candidates[choice.number]
        ranked = ordered and sizes.queries is None
        if ranked and (num_ranks := int(tables.tiles[:, 2].sum())) > MOST_RANKS:
            raise RuntimeError(
                f"backend 'hopper': the deterministic backward pass needs a number for each of {num_ranks} pairs of "
                f"tiles, and can have {MOST_RANKS}; use more GPUs, or do without determinism"
            )
        tile_q = sizes.tile_m // work.pack
        of_queries = adders(tables, -(-num_q // tile_q))
        of_keys = rests(tables, slices.bands(), num_q, num_k, tile_q, sizes.tile_k)
        of_keys[:, 0] |= AWAITED * work.awaited
        return DeviceColumnTables(
            chosen=choice.number,
            pack=work.pack,
            split=work.split,
            tiles=upload(tables.tiles, device),
            runs=upload(tables.runs, device),
            pieces=upload(tables.pieces, device),
            keys=upload(np.column_stack([tables.keys, of_keys]), device),
            items=upload(work.items, device),
            adders=upload(of_queries, device),
            num_met=int((of_queries > 0).sum()),
            num_awaited=int(work.awaited.sum()),
            ranks=upload(ranks(tables, work.order), device) if ranked else None,
            queries=None
            if choice.queries is None or sizes.queries is None
            else _uncut_rows(slices, choice.queries, num_q, num_k, sizes.queries[:2], device),
        )

    return slices.derived(("hopper columns", num_q, num_k, candidates, device, ordered, first_keys), build)


def _pairs(tables: RowTables, tile_q: int, box_k: int) -> int:
    """The pairs of queries and keys that all tiles compute; the last tile of keys may be half."""
    return int(tables.boxes.sum()) * box_k * tile_q
