# SPDX-License-Identifier: Apache-2.0
"""Where the deterministic backward pass of index attention keeps gradients of entries of lists, without a GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.kernels.protocol import IndexCall
from magi_attention.testing.lists import random_lists
from magi_kernels_hopper import index_backward
from magi_kernels_hopper.index_backward import order_of, parts_of


@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 20), st.integers(1, 25), st.integers(0, 1000))
def test_entries_of_a_key_lie_side_by_side_in_the_order_of_queries(num_q, num_kv_heads, num_k, longest, seed):
    lists = random_lists(num_q, num_kv_heads, num_k, longest, seed=seed)
    # What follows the end of a list may be anything.
    ended = (lists < 0).cumsum(-1)
    lists = lists.masked_fill(ended > 1, 1 << 30)
    places, first = order_of(lists, num_k)
    assert sorted(places.flatten().tolist()) == list(range(lists.numel()))
    expected = {row: [] for row in range(num_k * num_kv_heads)}
    for query in range(num_q):
        for head in range(num_kv_heads):
            for entry in range(longest):
                if not ended[query, head, entry]:
                    row = int(lists[query, head, entry]) * num_kv_heads + head
                    expected[row].append(int(places[query, head, entry]))
    for row, of_row in expected.items():
        assert of_row == list(range(int(first[row]), int(first[row + 1])))
    assert first[0] == 0
    assert first[-1] == int((ended == 0).sum())


def test_a_key_that_a_list_names_twice_has_both():
    places, first = order_of(torch.tensor([[[1, 0, 1]]], dtype=torch.int32), 2)
    assert places.tolist() == [[[1, 0, 2]]]
    assert first.tolist() == [0, 1, 3]


@pytest.mark.parametrize("heads", [(4, 2), (128, 1)])
def test_parts_are_of_bounded_size(heads, monkeypatch):
    q, v = torch.empty(100, heads[0], 128), torch.empty(50, heads[1], 128)
    lists = torch.zeros(100, heads[1], 64, dtype=torch.int32)
    assert list(parts_of(IndexCall(lists, 1.0), lists, q, v)) == [slice(0, 100)]
    monkeypatch.setattr(index_backward, "BYTES_AT_A_TIME", 8 << 20)
    parts = list(parts_of(IndexCall(lists, 1.0, deterministic=True), lists, q, v))
    rows_of_entry = 2 if heads[0] == 128 else 1
    step = (8 << 20) // (heads[1] * 64 * 2 * 128 * 4 * rows_of_entry)
    assert parts == [slice(first, min(first + step, 100)) for first in range(0, 100, step)]
    assert len(parts) > 1
