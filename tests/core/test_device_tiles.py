# SPDX-License-Identifier: Apache-2.0
"""Tables made on a device equal those of the host. The device is the CPU; on a GPU, one large mask is compared."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magi_attention.common import bands as band
from magi_attention.common import workloads
from magi_attention.common.bands import Bands
from magi_attention.common.slices import SliceTable
from magi_attention.kernels import device_tiles
from magi_attention.kernels.device_tiles import (
    DeviceIntervals,
    device_row_intervals,
    interval_bounds,
    interval_table,
    padded_lists,
)
from magi_attention.kernels.tiles import RowIntervals, row_intervals, tile_runs
from magi_attention.testing.masks import random_masks
from magi_attention.testing.tiles import IndexLists

CPU = torch.device("cpu")


def both_directions(slices: SliceTable, num_q: int, num_k: int) -> list[tuple[Bands, int, int]]:
    return [(slices.bands(), num_q, num_k), (band.transpose(slices.bands()), num_k, num_q)]


def assert_equal(on_device: Tensor, on_host: np.ndarray) -> None:
    assert on_device.dtype == torch.int32
    assert np.array_equal(on_device.cpu().numpy(), on_host)


def assert_lists_are_equal(runs: RowIntervals, device: torch.device, more_width: int, more_rows: int) -> None:
    lists = IndexLists.from_intervals(runs)
    width = int(lists.counts.max(initial=0))
    padded = padded_lists(runs, device)
    assert_equal(padded.counts, lists.counts)
    assert_equal(padded.indices, lists.padded(width))
    wider = padded_lists(runs, device, width=width + more_width, num_rows=len(lists.counts) + more_rows)
    assert_equal(wider.counts, np.pad(lists.counts, (0, more_rows)))
    assert_equal(wider.indices, np.pad(lists.padded(width + more_width), ((0, more_rows), (0, 0))))


def assert_intervals_are_equal(on_device: DeviceIntervals, on_host: RowIntervals) -> None:
    assert_equal(on_device.offsets, on_host.offsets)
    assert_equal(on_device.starts, on_host.starts)
    assert_equal(on_device.stops, on_host.stops)


@settings(max_examples=100)
@given(random_masks(70), st.integers(1, 20), st.integers(1, 20), st.integers(0, 9), st.integers(0, 3))
def test_tile_lists(mask, block_q, block_k, more, padding):
    total, slices = mask
    blocks = (block_q, block_k), (block_k, block_q)
    for (bands, num_rows, num_columns), sizes in zip(both_directions(slices, total + more, total), blocks, strict=True):
        runs = tile_runs(bands, num_rows, num_columns, *sizes)
        assert_lists_are_equal(runs.full, CPU, padding, more)
        assert_lists_are_equal(runs.partial, CPU, padding, more)


@settings(max_examples=100)
@given(random_masks(70), st.integers(0, 9), st.integers(0, 9))
def test_interval_tables(mask, more_q, more_k):
    total, slices = mask
    for bands, num_rows, _ in both_directions(slices, total + more_q, total + more_k):
        on_host = row_intervals(bands, num_rows)
        assert_intervals_are_equal(device_row_intervals(bands, num_rows, CPU), on_host)
        table = interval_table(bands, num_rows, CPU)
        assert_intervals_are_equal(table, on_host)
        most = int(on_host.counts.max())
        bounds = interval_bounds(table, 0, most, most + 1, num_rows + 3)
        assert bounds.shape == (2 * most + 2, num_rows + 3)
        for row in range(num_rows):
            own = slice(on_host.offsets[row], on_host.offsets[row + 1])
            expected = np.column_stack([on_host.starts[own], on_host.stops[own]]).flatten()
            assert_equal(bounds[: len(expected), row], expected)
            assert not bounds[len(expected) :, row].any()


def test_covered_twice_and_touching():
    slices = SliceTable([[0, 1, 0, 3, 0], [0, 1, 3, 5, 0], [0, 1, 1, 4, 0], [0, 2, 7, 8, 0]])
    assert_intervals_are_equal(device_row_intervals(slices.bands(), 2, CPU), row_intervals(slices.bands(), 2))


def test_long_tables_are_made_on_the_device(monkeypatch):
    made = []
    monkeypatch.setattr(device_tiles, "MOST_HOST_ROWS", 4)
    monkeypatch.setattr(device_tiles, "device_row_intervals", lambda *args: made.append(args))
    bands = SliceTable([[0, 5, 0, 5, 1]]).bands()
    interval_table(bands, 4, CPU)
    assert not made
    interval_table(bands, 5, CPU)
    assert len(made) == 1


@pytest.mark.parametrize("num_rows", [0, 3])
def test_no_tiles(num_rows):
    bands = SliceTable([]).bands()
    assert_lists_are_equal(tile_runs(bands, num_rows, 5, 2, 2).full, CPU, 2, 1)
    assert_intervals_are_equal(device_row_intervals(bands, num_rows, CPU), row_intervals(bands, num_rows))


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(workloads.WORKLOADS))
def test_on_a_gpu(name):
    total, device = 1 << 17, torch.device("cuda")
    for bands, num_rows, num_columns in both_directions(workloads.make(name, total), total, total):
        runs = tile_runs(bands, num_rows, num_columns, 128, 128)
        assert_lists_are_equal(runs.full, device, 2, 1)
        assert_lists_are_equal(runs.partial, device, 0, 0)
        assert_intervals_are_equal(interval_table(bands, num_rows, device), row_intervals(bands, num_rows))
