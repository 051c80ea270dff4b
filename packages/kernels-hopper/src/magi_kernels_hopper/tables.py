# SPDX-License-Identifier: Apache-2.0
"""The kernels' tables on a device: uploaded once for each mask and geometry, and kept with the mask."""

from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.device_tiles import upload
from magi_kernels_hopper.backward_plan import column_tables, ranks
from magi_kernels_hopper.plan import row_tables


class DeviceRowTables(NamedTuple):
    """:class:`magi_kernels_hopper.plan.RowTables`, as int32."""

    tiles: Tensor
    runs: Tensor
    pieces: Tensor
    order: Tensor


def device_row_tables(
    slices: SliceTable, num_q: int, num_k: int, tile_q: int, box_k: int, device: torch.device
) -> DeviceRowTables:
    """Build and upload the tables of a mask; see :func:`magi_kernels_hopper.plan.row_tables`."""

    def build() -> DeviceRowTables:
        tables = row_tables(slices.bands(), num_q, num_k, tile_q, box_k)
        return DeviceRowTables(
            *(upload(each, device) for each in (tables.tiles, tables.runs, tables.pieces, tables.order))
        )

    return slices.derived(("hopper rows", num_q, num_k, tile_q, box_k, device), build)


class DeviceColumnTables(NamedTuple):
    """:class:`magi_kernels_hopper.backward_plan.ColumnTables`, as int32, and the ranks if they are needed."""

    tiles: Tensor
    runs: Tensor
    pieces: Tensor
    order: Tensor
    ranks: Tensor | None


def device_column_tables(
    slices: SliceTable, num_q: int, num_k: int, tile_q: int, tile_k: int, device: torch.device, *, ordered: bool
) -> DeviceColumnTables:
    """Build and upload the tables of a mask, with the ranks if gradients are to be added up in order."""

    def build() -> DeviceColumnTables:
        tables = column_tables(slices.bands(), num_q, num_k, tile_q, tile_k)
        return DeviceColumnTables(
            tiles=upload(tables.tiles, device),
            runs=upload(tables.runs, device),
            pieces=upload(tables.pieces, device),
            order=upload(tables.order, device),
            ranks=upload(ranks(tables), device) if ordered else None,
        )

    return slices.derived(("hopper columns", num_q, num_k, tile_q, tile_k, device, ordered), build)
