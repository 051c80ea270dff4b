# SPDX-License-Identifier: Apache-2.0
"""Masks of blocks as slices: the same pairs, none twice, and few slices."""

import pytest
import torch

from magi_attention.api import calc_attn, dispatch, magi_attn_flex_key, undispatch
from magi_attention.common.slices import SliceTable, find_double_cover
from magi_attention.testing.oracle import dense_mask, masked_attention
from magi_attention.utils.sparse_utils import block_mask_to_ranges


def slices_of(q_ranges, k_ranges):
    return SliceTable.from_lists(q_ranges.to_naive_ranges(), k_ranges.to_naive_ranges(), [0] * len(q_ranges))


@pytest.mark.parametrize("density", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize(("total_q", "total_k"), [(None, None), (37, 50), (33, 46)])
def test_slices_keep_the_pairs_of_the_blocks(density, total_q, total_k):
    kept = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) < density
    slices = slices_of(*block_mask_to_ranges(kept, 8, 9, total_q, total_k))
    num_q, num_k = total_q or 40, total_k or 54
    expected = kept.repeat_interleave(8, 0).repeat_interleave(9, 1)[:num_q, :num_k]
    assert torch.equal(dense_mask(slices, num_q, num_k), expected)
    assert find_double_cover(slices) is None
    assert len(slices) <= int(kept.sum())


def test_neighboring_blocks_are_one_slice():
    kept = torch.zeros(6, 6, dtype=torch.bool)
    kept[1:4, 2:5] = True
    kept[4:, 0] = True
    q_ranges, k_ranges = block_mask_to_ranges(kept, 10, 10)
    assert q_ranges.to_naive_ranges() == [(10, 40), (40, 60)]
    assert k_ranges.to_naive_ranges() == [(20, 50), (0, 10)]


def test_attention_over_blocks():
    kept = torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    key = magi_attn_flex_key(*block_mask_to_ranges(kept, 16, 16, 121, 121), "full", 121, 121, 4, 2, 8, 0, None)
    q, k, v = (torch.randn(121, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    out = undispatch(calc_attn(*(dispatch(x, key) for x in (q, k, v)), key)[0], key)
    mask = kept.repeat_interleave(16, 0).repeat_interleave(16, 1)[:121, :121]
    torch.testing.assert_close(out, masked_attention(q, k, v, mask)[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 2), 8, 8), TypeError, "must be a bool tensor, not torch.float32"),
        (([[True]], 8, 8), TypeError, "not list"),
        ((torch.ones(3, 2, 2).bool(), 8, 8), ValueError, r"for all heads alike; it is \[3, 2, 2\]"),
        ((torch.ones(2, 2).bool(), 0, 8), ValueError, "q_block_size must be positive, not 0"),
        ((torch.ones(2, 2).bool(), 8, 8, 17), ValueError, "2 blocks of 8 rows cannot be of total_seqlen_q=17"),
        ((torch.ones(2, 2).bool(), 8, 8, None, 8), ValueError, "cannot be of total_seqlen_k=8"),
    ],
)
def test_mistakes(arguments, error, message):
    with pytest.raises(error, match=message):
        block_mask_to_ranges(*arguments)
