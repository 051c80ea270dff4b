# SPDX-License-Identifier: Apache-2.0
"""The tables that FlexAttention reads: block lists in both directions and each query's key intervals."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.slices import SliceTable
from magi_attention.kernels.device_tiles import DeviceIntervals, interval_bounds, interval_table, padded_lists
from magi_attention.kernels.table_streams import StreamsOfTables, settle
from magi_attention.kernels.tiles import TileRuns, bands_from_intervals, row_intervals, tile_runs

BLOCK = 128
"""Queries and keys of a tile."""

INTERVALS_PER_LAYER = (1, 2, 4, 8)
"""How many intervals per row a kernel may unroll; each number is compiled once."""


class LayerTables(NamedTuple):
    """A part of a mask in which no row has more than eight key intervals, on a device, as int32.

    Shapes: M blocks of queries, N blocks of keys, W the longest list of a direction, R intervals per row.

    Attributes:
        kv_num_blocks, kv_indices: ``[1, 1, M]`` and ``[1, 1, M, W]``, the partial tiles of each block of queries.
        full_kv_num_blocks, full_kv_indices: the same for full tiles.
        q_num_blocks, q_indices: ``[1, 1, N]`` and ``[1, 1, N, W]``, the partial tiles of each block of keys.
        full_q_num_blocks, full_q_indices: the same for full tiles.
        bounds: ``[2 * R, M * BLOCK]``: row 2i holds where the i-th interval of each query starts, row 2i + 1 where it
            stops.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor
    bounds: Tensor


class MaskLayers(NamedTuple):
    """A mask's layers, none for one without pairs, and the streams of the launches that read them."""

    layers: list[LayerTables]
    streams: StreamsOfTables


def num_blocks(num_tokens: int) -> int:
    """How many blocks a tensor is padded to: at least two, since compilers treat size one as a case of its own."""
    return max(-(-num_tokens // BLOCK), 2)


def layers_of(slices: SliceTable, num_q: int, num_k: int, device: torch.device) -> list[LayerTables]:
    """Return the layers whose union is the mask, none for a mask without pairs. Built once and kept with the table.

    They may be read on the stream that is current, until they are dropped.
    """

    def build() -> MaskLayers:
        bands = slices.bands()
        intervals = interval_table(bands, num_q, device)
        most = int(intervals.counts.max()) if num_q else 0
        if most <= INTERVALS_PER_LAYER[-1]:
            parts = [(bands, 0, most)] if most else []
        else:
            on_host = row_intervals(bands, num_q)
            cuts = [*range(0, most, INTERVALS_PER_LAYER[-1]), most]
            parts = [(bands_from_intervals(on_host, first, last), first, last) for first, last in pairwise(cuts)]
        layers = [_layer(part, intervals, first, last, num_q, num_k, device) for part, first, last in parts]
        settle(device)
        return MaskLayers(layers, StreamsOfTables(layers))

    layers, streams = slices.derived(("flex layers", num_q, num_k, device), build)
    streams.add_current()
    return layers


def _layer(
    bands: Bands, intervals: DeviceIntervals, first: int, last: int, num_q: int, num_k: int, device: torch.device
) -> LayerTables:
    # Measured against the padded keys, a tile that reaches into the padding is partial: no padded key is ever seen.
    # Padded queries may see keys: nobody reads their output, and their gradient is zero.
    rows, columns = num_blocks(num_q), num_blocks(num_k)
    by_query = tile_runs(bands, num_q, columns * BLOCK, BLOCK, BLOCK)
    by_key = tile_runs(band.transpose(bands), columns * BLOCK, num_q, BLOCK, BLOCK)
    lists = [*_padded_lists(by_query, rows, device), *_padded_lists(by_key, columns, device)]
    width = next(number for number in INTERVALS_PER_LAYER if number >= last - first)
    lists.append(interval_bounds(intervals, first, last, width, rows * BLOCK))
    return LayerTables(*lists)


def _padded_lists(runs: TileRuns, num_rows: int, device: torch.device) -> list[Tensor]:
    """Return counts ``[1, 1, num_rows]`` and indices ``[1, 1, num_rows, W]`` of both, rows that are missing empty.

    The kernels find both kinds' lists by the strides of the partial ones, so that both must be equally wide.
    """
    width = max(int(runs.partial.sizes.max(initial=0)), int(runs.full.sizes.max(initial=0)), 2)
    lists = [padded_lists(each, device, width=width, num_rows=num_rows) for each in (runs.partial, runs.full)]
    return [table[None, None] for pair in lists for table in pair]
