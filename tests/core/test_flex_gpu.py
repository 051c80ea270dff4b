# SPDX-License-Identifier: Apache-2.0
"""Compiled FlexAttention against the dense float64 oracle. Each combination compiles for some seconds: they are few."""

import numpy as np
import pytest
import torch

from magi_attention.common.slices import SliceTable
from magi_attention.functional import flex_flash_attn_func
from magi_attention.kernels.flex import BACKEND
from magi_attention.kernels.merge import merge_partials
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest
from magi_attention.kernels.registry import choose_backend
from magi_attention.testing.masks import MASK_FAMILIES
from magi_attention.testing.metric import assert_within_pytorch_error
from magi_attention.testing.stages import Inputs, assert_stage_is_right, random_inputs, run_dense, run_stage

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning:torch.*")]

# Triton's exponentials and logarithms are approximations of a few units in the last place, which counts in float32.
# TF32 products, which must not happen, would be hundreds of times further off.
FLOAT32_FACTOR = 4.0


def inputs(total: int, dtype: torch.dtype = torch.bfloat16, dim: int = 64, heads: tuple[int, int] = (4, 2)) -> Inputs:
    return random_inputs(total, total, heads=heads, dims=(dim, dim), dtype=dtype, device="cuda")


@pytest.mark.parametrize("family", MASK_FAMILIES)
def test_families(family):
    for total in (333, 1024):
        assert_stage_is_right(BACKEND, inputs(total), MASK_FAMILIES[family](total, np.random.default_rng(total)))


@pytest.mark.parametrize(
    ("dtype", "dim", "heads"),
    [
        (torch.bfloat16, 128, (4, 4)),
        (torch.float16, 128, (8, 2)),
        (torch.float16, 64, (3, 1)),
        (torch.float32, 64, (4, 2)),
        (torch.float32, 128, (2, 2)),
    ],
    ids=str,
)
def test_dtypes_dims_and_heads(dtype, dim, heads):
    for family in ("causal", "varlen_causal", "sliding_window", "empty_rows"):
        slices = MASK_FAMILIES[family](700, np.random.default_rng(3))
        factor = FLOAT32_FACTOR if dtype == torch.float32 else 2.0
        assert_stage_is_right(BACKEND, inputs(700, dtype, dim, heads), slices, factor=factor)


def test_unequal_lengths_and_head_dims():
    x = random_inputs(300, 900, heads=(4, 2), dims=(64, 32), dtype=torch.bfloat16, device="cuda")
    assert_stage_is_right(BACKEND, x, SliceTable([[0, 300, 0, 900, 1]]))


def test_softcap():
    assert_stage_is_right(BACKEND, inputs(500), SliceTable([[0, 500, 0, 500, 1]]), softcap=1.5)


def test_max_logits():
    assert_stage_is_right(BACKEND, inputs(500), SliceTable([[5, 500, 0, 495, 1]]), max_logits=True)


def test_many_intervals_per_row():
    slices = SliceTable([[0, 400, k, k + 7, 0] for k in range(0, 400, 40)])
    assert_stage_is_right(BACKEND, inputs(400), slices)


def test_two_stages_merge_and_their_gradients_add_up():
    total, scale = 600, 0.125
    slices = MASK_FAMILIES["prefix_lm"](total, np.random.default_rng(2))
    x = inputs(total)
    calls = [AttentionCall(part, scale) for part in (slices.clip_columns(0, 250), slices.clip_columns(250, total))]
    (out, lse, _), (out2, lse2, _) = (BACKEND.forward(x.q, x.k, x.v, call) for call in calls)
    out, lse = merge_partials(out, lse, out2, lse2)
    gradients = [BACKEND.backward(x.dout, x.q, x.k, x.v, out, lse, x.dlse, call) for call in calls]
    actual = [out, lse, *(a.float() + b.float() for a, b in zip(*gradients, strict=True))]
    truth = run_dense(x, slices, scale, 0.0, oracle=True)
    plain = run_dense(x, slices, scale, 0.0, oracle=False)
    del truth[2], plain[2]  # the largest scores
    for ours, reference, pytorch in zip(actual, truth, plain, strict=True):
        assert_within_pytorch_error(ours, reference, pytorch)


def test_float32_stays_float32_where_the_process_allows_tf32():
    slices = SliceTable([[0, 512, 0, 512, 1]])
    x = inputs(512, torch.float32)
    allowed = torch.backends.cuda.matmul.allow_tf32
    call = AttentionCall(slices, 0.125)
    result, gradients = run_stage(BACKEND, x, call)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with_tf32, gradients_with_tf32 = run_stage(BACKEND, x, call)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.testing.assert_close(with_tf32.out, result.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients_with_tf32, gradients, rtol=1e-4, atol=1e-4)


def test_same_bits_on_every_run():
    call = AttentionCall(MASK_FAMILIES["block_causal"](1024, np.random.default_rng(0)), 0.125, deterministic=True)
    x = inputs(1024)
    (first, gradients), (second, gradients2) = run_stage(BACKEND, x, call), run_stage(BACKEND, x, call)
    assert all(torch.equal(a, b) for a, b in zip((*first[:2], *gradients), (*second[:2], *gradients2), strict=True))


def test_is_the_choice_on_a_gpu():
    request = AttentionRequest(torch.device("cuda"), torch.bfloat16, 4, 2, 64, 64)
    assert BACKEND.supports(request)
    assert choose_backend(request, "flex") is BACKEND


def test_flex_flash_attn_func_with_ranges_on_the_gpu(monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_KERNEL_BACKEND", "flex")
    x = inputs(333)
    leaves = [tensor.requires_grad_() for tensor in x[:3]]
    ranges = torch.tensor([[0, 100], [100, 333]], dtype=torch.int32, device="cuda")
    kinds = torch.ones(2, dtype=torch.int32, device="cuda")
    out, meta = flex_flash_attn_func(*leaves, ranges, ranges, kinds)
    gradients = torch.autograd.grad((out, meta.lse), leaves, (x.dout, x.dlse))
    slices = SliceTable([[0, 100, 0, 100, 1], [100, 333, 100, 333, 1]])
    truth, plain = (run_dense(x, slices, 64**-0.5, 0.0, oracle=oracle) for oracle in (True, False))
    del truth[2], plain[2]
    for ours, reference, pytorch in zip((out, meta.lse, *gradients), truth, plain, strict=True):
        assert_within_pytorch_error(ours, reference, pytorch)
