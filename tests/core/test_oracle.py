# SPDX-License-Identifier: Apache-2.0
"""The oracle against PyTorch's own attention, and against finite differences; the error metric; the mask families."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.nn.functional import scaled_dot_product_attention

from magi_attention.common.slices import SliceTable, find_double_cover
from magi_attention.testing import assert_close, assert_within_pytorch_error, parameterize, ref_attn_func
from magi_attention.testing.masks import MASK_FAMILIES, random_masks
from magi_attention.testing.oracle import dense_attention, dense_mask
from magi_attention.testing.stages import random_inputs


def test_mask_of_each_type_written_out():
    def rows(kind: int, num_q: int, num_k: int) -> list[str]:
        mask = dense_mask(SliceTable([[0, num_q, 0, num_k, kind]]), num_q, num_k)
        return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]

    assert rows(0, 2, 3) == ["xxx", "xxx"]
    assert rows(1, 2, 3) == ["xx.", "xxx"]
    assert rows(1, 3, 2) == ["..", "x.", "xx"]
    assert rows(2, 2, 3) == ["xxx", ".xx"]
    assert rows(2, 3, 2) == ["xx", ".x", ".."]
    assert rows(3, 2, 3) == ["xx.", ".xx"]
    assert rows(3, 2, 2) == ["x.", ".x"]
    assert rows(3, 3, 2) == ["..", "..", ".."]


@pytest.mark.parametrize("family", MASK_FAMILIES)
def test_family_covers_no_pair_twice_and_stays_inside(family):
    rng = np.random.default_rng(3)
    for total in (1, 2, 17, 60):
        slices = MASK_FAMILIES[family](total, rng)
        assert find_double_cover(slices) is None
        assert int(dense_mask(slices, total, total).sum()) == slices.area()


@settings(max_examples=20)
@given(random_masks(40))
def test_oracle_agrees_with_pytorch_attention(mask):
    total, slices = mask
    x = random_inputs(total, total)
    seen = dense_mask(slices, total, total)
    seen_rows = seen.any(1)
    expected = scaled_dot_product_attention(
        *(tensor.transpose(0, 1) for tensor in x[:3]), attn_mask=seen, scale=0.3, enable_gqa=True
    ).transpose(0, 1)
    out, lse, largest = dense_attention(*x[:3], slices, softmax_scale=0.3)
    torch.testing.assert_close(out[seen_rows], expected[seen_rows], rtol=1e-10, atol=1e-10)
    assert not out[~seen_rows].any()
    assert torch.equal(lse == -torch.inf, ~seen_rows[:, None].expand_as(lse))
    assert (largest <= lse.amax(0)).all()


@pytest.mark.parametrize(("num_q", "num_k"), [(0, 3), (3, 0), (0, 0)])
def test_oracle_without_queries_or_keys(num_q, num_k):
    x = random_inputs(num_q, num_k)
    out, lse, largest = dense_attention(*x[:3], SliceTable([]), sink=torch.zeros(1, 4))
    assert torch.equal(out, torch.zeros_like(x.dout))
    assert torch.equal(lse, torch.zeros(num_q, 4, dtype=torch.float64))
    assert largest.tolist() == [-torch.inf] * 4


def test_oracle_gradients_by_finite_differences():
    slices = SliceTable([[0, 4, 0, 3, 1], [4, 5, 0, 0, 0]])
    x = random_inputs(5, 3, heads=(2, 1), dims=(3, 2))
    sink = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    leaves = [tensor.requires_grad_() for tensor in x[:3]]

    def attend(q, k, v, sink):
        return dense_attention(q, k, v, slices, softcap=0.7, sink=sink)[:2]

    assert torch.autograd.gradcheck(attend, (*leaves, sink))


def test_sink_equals_extra_keys_with_value_zero():
    x = random_inputs(6, 6, heads=(1, 1), dims=(4, 4))
    sink = torch.full((3, 1), 0.25, dtype=torch.float64)
    extra = torch.zeros(3, 1, 4, dtype=torch.float64)
    padded_q = torch.cat([x.q, torch.ones(6, 1, 1, dtype=torch.float64)], -1)
    keys = torch.cat([torch.cat([x.k, torch.zeros(6, 1, 1, dtype=torch.float64)], -1), torch.zeros(3, 1, 5)])
    keys[6:, :, 4] = 0.25
    full = SliceTable([[0, 6, 0, 9, 0]])
    expected = dense_attention(padded_q, keys, torch.cat([x.v, extra]), full, softmax_scale=1.0)
    actual = dense_attention(x.q, x.k, x.v, SliceTable([[0, 6, 0, 6, 0]]), softmax_scale=1.0, sink=sink)
    torch.testing.assert_close(actual[:2], expected[:2], rtol=1e-12, atol=1e-12)


def test_metric_compares_with_pytorch_error():
    truth = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    plain = torch.tensor([1.01, -torch.inf])
    assert_within_pytorch_error(torch.tensor([1.019, -torch.inf]), truth, plain)
    for wrong in ([1.021, -torch.inf], [1.0, 3.0], [torch.nan, -torch.inf], [1.0, torch.inf]):
        with pytest.raises(AssertionError):
            assert_within_pytorch_error(torch.tensor(wrong), truth, plain)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_pytorch_error(torch.ones(3), truth, plain)


def test_assert_close_allows_a_share_of_mismatches():
    a, b = torch.zeros(10), torch.zeros(10)
    a[0] = 1
    assert_close(a, b, mismatch_threshold=0.1)
    with pytest.raises(AssertionError, match=r"case 7.*10\.000%"):
        assert_close(a, b, mismatch_threshold=0.05, test_case="case 7")
    assert_close(torch.empty(0), torch.empty(0))


def test_parameterize_loops_over_all_combinations():
    calls = []

    @parameterize("a", [1, 2])
    @parameterize("b", "xy")
    def test(fixture: int, a: int, b: str) -> None:
        calls.append((fixture, a, b))

    test(fixture=0)
    assert calls == [(0, 1, "x"), (0, 1, "y"), (0, 2, "x"), (0, 2, "y")]


def test_ref_attn_func_returns_what_is_asked_for():
    x = random_inputs(5, 5, dtype=torch.float32)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    truth = dense_attention(*x[:3], SliceTable([[0, 5, 0, 5, 1]]))
    out, meta = ref_attn_func(*x[:3], mask)
    assert out.dtype == torch.float32
    assert (meta.lse, meta.max_logits) == (None, None)
    out, meta = ref_attn_func(*x[:3], mask, high_precision=True, return_lse=True, return_max_logits=True)
    torch.testing.assert_close((out, meta.lse, meta.max_logits), truth)
    with pytest.raises(ValueError, match="shd"):
        ref_attn_func(*x[:3], mask, sink_layout="shd")
