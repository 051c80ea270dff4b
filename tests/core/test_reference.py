# SPDX-License-Identifier: Apache-2.0
"""The reference backend against the dense float64 oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.blocks import cut_into_blocks
from magi_attention.kernels.merge import merge_partials
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, KernelBackend
from magi_attention.kernels.reference import BACKEND
from magi_attention.testing.masks import MASK_FAMILIES, random_masks
from magi_attention.testing.oracle import dense_attention, dense_mask
from magi_attention.testing.stages import assert_stage_is_right, random_inputs, run_stage

HEADS = ((1, 1), (4, 4), (6, 2), (4, 1))


def test_satisfies_the_protocol():
    assert isinstance(BACKEND, KernelBackend)


@pytest.mark.parametrize("heads", HEADS)
def test_results_are_contiguous(heads):
    x = random_inputs(20, 20, heads=heads)
    result, gradients = run_stage(BACKEND, x, AttentionCall(SliceTable([[0, 20, 0, 20, 1]]), 0.25))
    assert all(tensor.is_contiguous() for tensor in (result.out, *gradients))


@settings(max_examples=60)
@given(random_masks(300), st.sampled_from(HEADS), st.sampled_from([0.0, 1.5]), st.booleans())
def test_float64_is_exact(mask, heads, softcap, max_logits):
    total, slices = mask
    x = random_inputs(total, total, heads=heads, dims=(8, 5))
    assert_stage_is_right(BACKEND, x, slices, softcap=softcap, max_logits=max_logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", MASK_FAMILIES)
def test_error_within_twice_pytorchs(family, dtype):
    total = 230
    slices = MASK_FAMILIES[family](total, np.random.default_rng(5))
    x = random_inputs(total, total, heads=(4, 2), dims=(32, 16), dtype=dtype)
    assert_stage_is_right(BACKEND, x, slices, max_logits=True)


@pytest.mark.parametrize(
    "slices",
    [
        SliceTable([[3, 8, 2, 7, 3]]),
        SliceTable([[0, 9, 1, 4, 1], [0, 9, 5, 8, 2]]),
        SliceTable([[0, 9, 1, 4, 3]]),
        SliceTable([]),
        SliceTable([[2, 2, 0, 5, 0], [1, 4, 6, 6, 1]]),
        SliceTable([[0, 1, 0, 1, 0], [8, 9, 10, 11, 0]]),
    ],
    ids=["bicausal sq=sk", "sq>sk", "bicausal sq>sk", "no slice", "empty slices", "corners"],
)
def test_edge_masks(slices):
    assert_stage_is_right(BACKEND, random_inputs(9, 11), slices, max_logits=True)


@pytest.mark.parametrize(("num_q", "num_k"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows(num_q, num_k):
    x = random_inputs(num_q, num_k)
    result, gradients = run_stage(BACKEND, x, AttentionCall(SliceTable([]), 1.0))
    assert result.out.shape == x.q.shape
    assert (result.lse == -torch.inf).all()
    assert [gradient.shape for gradient in gradients] == [x.q.shape, x.k.shape, x.v.shape]


def test_results_are_in_the_accumulation_dtype():
    x = random_inputs(20, 20, dtype=torch.bfloat16)
    call = AttentionCall(SliceTable([[0, 20, 0, 20, 1]]), 0.25)
    result, gradients = run_stage(BACKEND, x, call)
    assert {tensor.dtype for tensor in (result.out, result.lse, *gradients)} == {torch.float32}


@settings(max_examples=25)
@given(random_masks(120), st.integers(0, 120))
def test_stages_merge_to_the_whole(mask, cut):
    """Two stages over disjoint keys: outputs merge by lse, and gradients by the final out and lse simply add up."""
    total, slices = mask
    cut = min(cut, total)
    x = random_inputs(total, total)
    calls = [AttentionCall(part, 0.3, 2.0) for part in (slices.clip_columns(0, cut), slices.clip_columns(cut, total))]
    (out, lse, _), (out2, lse2, _) = (BACKEND.forward(x.q, x.k, x.v, call) for call in calls)
    out, lse = merge_partials(out, lse, out2, lse2)
    gradients = [BACKEND.backward(x.dout, x.q, x.k, x.v, out, lse, x.dlse, call) for call in calls]
    leaves = [tensor.requires_grad_() for tensor in x[:3]]
    truth, truth_lse, _ = dense_attention(*leaves, slices, softmax_scale=0.3, softcap=2.0)
    dlse = x.dlse.masked_fill(truth_lse == -torch.inf, 0.0)
    expected = torch.autograd.grad((truth, truth_lse), leaves, (x.dout, dlse))
    actual = tuple(a + b for a, b in zip(*gradients, strict=True))
    torch.testing.assert_close((out, lse, *actual), (truth, truth_lse, *expected), rtol=1e-10, atol=1e-10)


def test_same_bits_on_every_run():
    x = random_inputs(300, 300, dtype=torch.float32)
    call = AttentionCall(MASK_FAMILIES["overlapping_queries"](300, np.random.default_rng(0)), 0.25)
    (first, gradients), (second, gradients2) = run_stage(BACKEND, x, call), run_stage(BACKEND, x, call)
    for a, b in zip((first.out, first.lse, *gradients), (second.out, second.lse, *gradients2), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=60)
@given(random_masks(80), st.integers(1, 30), st.integers(1, 30))
def test_blocks_keep_exactly_the_mask(mask, max_rows, max_columns):
    total, slices = mask
    counted = np.zeros((total, total), int)
    for block in cut_into_blocks(slices, max_rows, max_columns):
        assert 0 < block.q1 - block.q0 <= max_rows
        assert 0 < block.k1 - block.k0 <= max_columns
        diagonal = np.arange(block.k0, block.k1) - np.arange(block.q0, block.q1)[:, None]
        kept = (diagonal >= block.d0) & (diagonal <= block.d1)
        assert block.masked or kept.all()
        counted[block.q0 : block.q1, block.k0 : block.k1] += kept
    assert np.array_equal(counted, dense_mask(slices, total, total).numpy())


def test_32k_causal_tokens_cost_their_area_and_no_square_matrix():
    total, max_rows, max_columns = 32768, 128, 2048
    slices = SliceTable([[0, total, 0, total, 1]])
    blocks = cut_into_blocks(slices, max_rows, max_columns)
    areas = [(block.q1 - block.q0) * (block.k1 - block.k0) for block in blocks]
    assert max(areas) <= max_rows * max_columns
    assert sum(areas) <= 1.01 * slices.area()
    assert sum(block.masked for block in blocks) <= 1.1 * total / max_rows * 2
    x = random_inputs(total, total, heads=(1, 1), dims=(16, 16), dtype=torch.float32)
    result = BACKEND.forward(x.q, x.k, x.v, AttentionCall(slices, 0.25))
    rows = torch.tensor([0, 1, 127, 128, 20000, total - 1])
    for row in rows.tolist():
        expected, lse, _ = dense_attention(x.q[row : row + 1], x.k, x.v, SliceTable([[0, 1, 0, row + 1, 0]]))
        torch.testing.assert_close(result.out[row : row + 1].double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.lse[row : row + 1].double(), lse, rtol=1e-5, atol=1e-5)


def test_tiny_slices_cost_no_more_than_themselves():
    slices = SliceTable([[10 * i, 10 * i + 3, 10 * i, 10 * i + 3, 0] for i in range(1000)])
    blocks = cut_into_blocks(slices, 128, 2048)
    assert sum((block.q1 - block.q0) * (block.k1 - block.k0) for block in blocks) == slices.area()


def test_refuses_integers():
    request = AttentionRequest(torch.device("cpu"), torch.int32, 2, 1, 16, 16)
    assert not BACKEND.supports(request)
    assert "torch.int32" in BACKEND.supports(request).reason


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", MASK_FAMILIES)
def test_on_gpu(family, dtype):
    total = 700
    slices = MASK_FAMILIES[family](total, np.random.default_rng(5))
    x = random_inputs(total, total, heads=(4, 2), dims=(64, 32), dtype=dtype, device="cuda")
    # In float32 both sides only round sums, in different orders: a matter of luck, so more is allowed.
    assert_stage_is_right(BACKEND, x, slices, max_logits=True, factor=4.0 if dtype == torch.float32 else 2.0)
    call = AttentionCall(slices, 0.125, deterministic=True)
    (first, gradients), (second, gradients2) = run_stage(BACKEND, x, call), run_stage(BACKEND, x, call)
    assert all(torch.equal(a, b) for a, b in zip((*first[:2], *gradients), (*second[:2], *gradients2), strict=True))
