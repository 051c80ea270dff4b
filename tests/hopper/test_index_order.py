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
from magi_kernels_hopper.index_lists import TileLists, tokens_of_tile


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


@pytest.mark.parametrize(("heads", "tokens"), [((4, 2), 1), ((128, 1), 1), ((4, 2), 8)])
def test_parts_are_of_bounded_size(heads, tokens, monkeypatch):
    q, v = torch.empty(100, heads[0], 128), torch.empty(50, heads[1], 128)
    num_tiles = -(-100 // tokens)
    lists = torch.zeros(num_tiles, heads[1], 64, dtype=torch.int32)
    tiles = TileLists(lists, None if tokens == 1 else lists.byte(), tokens)
    ((everything, of_all),) = parts_of(IndexCall(lists, 1.0), tiles, q, v)
    assert (everything, len(of_all.indices)) == (slice(0, 100), num_tiles)
    monkeypatch.setattr(index_backward, "BYTES_AT_A_TIME", 1 << 20)
    parts = list(parts_of(IndexCall(lists, 1.0, deterministic=True), tiles, q, v))
    rows_of_entry = 2 if heads[0] == 128 else 1
    step = (1 << 20) // (heads[1] * 64 * 2 * 128 * 4 * rows_of_entry)
    assert step >= 1
    firsts = range(0, num_tiles, step)
    assert [part for part, _ in parts] == [slice(i * tokens, min((i + step) * tokens, 100)) for i in firsts]
    assert [len(each.indices) for _, each in parts] == [min(step, num_tiles - i) for i in firsts]
    assert len(parts) > 1


@pytest.mark.parametrize(
    ("heads", "num_q", "tokens"),
    [
        ((64, 8), 8192, 8),  # 8 heads each
        ((64, 8), 1000, 4),  # enough tiles are left for all blocks
        ((64, 8), 100, 1),
        ((16, 1), 65536, 4),
        ((64, 1), 65536, 1),  # heads fill a tile
        ((130, 1), 65536, 1),  # several packs of heads
        ((8, 8), 8192, 8),
        ((48, 4), 65536, 4),
    ],
)
def test_tokens_share_what_rows_heads_leave(heads, num_q, tokens):
    assert tokens_of_tile(num_q, *heads, blocks=264) == tokens
