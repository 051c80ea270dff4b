# SPDX-License-Identifier: Apache-2.0
"""Which backward kernel a mask is given to, where two can compute it."""

import numpy as np
import pytest
import torch

from magi_attention.common import workloads
from magi_attention.common.slices import SliceTable
from magi_kernels_hopper.backward import work_sizes
from magi_kernels_hopper.backward_choice import Costs, choose_work, expected_time
from magi_kernels_hopper.backward_order import WorkSizes, order_work
from magi_kernels_hopper.tables import device_column_tables, device_row_tables
from magi_kernels_hopper.variants import ForwardVariant, backward_variants


def candidates(num_kv_heads=8, group=8, blocks=132):
    variants = backward_variants((128, 128), "bf16", softcap=False)
    return tuple(work_sizes(each, num_kv_heads * group, num_kv_heads, 8192, blocks) for each in variants)


def scattered(total, share, size=64):
    row, column = np.nonzero(np.random.default_rng(0).random((total // size,) * 2) < share)
    return np.column_stack([row, row + 1, column, column + 1, np.zeros_like(row)]) * [[size] * 4 + [1]]


def chosen(rows, total, sizes):
    slices = SliceTable(rows)
    choice = choose_work(slices.bands(), slices.area(), total, total, sizes, ordered=False)
    work = order_work(slices.bands(), total, total, sizes[choice.number])
    np.testing.assert_array_equal(choice.work.items, work.items)
    assert (choice.queries is None) == (choice.number == 0)
    return choice.number


@pytest.mark.parametrize("total", [8192, 32768])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.1])
def test_scattered_blocks_are_given_to_the_fine_kernel(total, share):
    assert chosen(scattered(total, share), total, candidates()) == 1


@pytest.mark.parametrize("total", [8192, 32768])
@pytest.mark.parametrize("name", sorted(workloads.WORKLOADS))
def test_other_masks_are_given_to_the_coarse_kernel(total, name):
    assert chosen(workloads.make(name, total).rows, total, candidates()) == 0


def test_of_a_mixture_what_most_of_the_time_is_spent_on_decides():
    blocks = scattered(8192, 0.05)
    document = [[8192, 16384, 8192, 16384, 1]]
    assert chosen(np.concatenate([blocks, document]), 16384, candidates()) == 0
    assert chosen(np.concatenate([blocks, [[8192, 8704, 8192, 8704, 1]]]), 16384, candidates()) == 1


def test_large_blocks_are_given_to_the_coarse_kernel():
    assert chosen(scattered(32768, 0.05, 512), 32768, candidates()) == 0


def test_one_kernel_needs_no_choice():
    assert chosen(scattered(8192, 0.05), 8192, candidates()[:1]) == 0


def test_the_expected_time_counts_every_step():
    # Of two tiles of keys one meets 4 tiles of queries, the other 2 of which one has a mask.
    slices = SliceTable([[0, 64, 0, 32, 0], [32, 56, 32, 64, 0]])
    sizes = WorkSizes(16, 32, 2, 1, 3)
    work = order_work(slices.bands(), 64, 64, sizes)
    costs = Costs(step=10, mask=3, item=100)
    assert expected_time(work, sizes, costs) == max((2 * (100 + 40) + 2 * (100 + 23)) / 3, 140)
    assert expected_time(work, sizes._replace(blocks=100), costs) == 140


def test_both_passes_share_the_tables_of_queries():
    slices, device = SliceTable(scattered(8192, 0.05)), torch.device("cpu")
    variant = ForwardVariant(128, 128, "bf16")
    rows = device_row_tables(slices, 8192, 8192, 8, variant, device, copies=8, blocks=132)
    assert device_column_tables(slices, 8192, 8192, candidates(), device, ordered=True).queries is rows
