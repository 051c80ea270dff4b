# SPDX-License-Identifier: Apache-2.0
"""``flex_flash_attn_func`` on a CPU, by its documentation; and the errors that it raises."""

import logging
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common.slices import SliceTable
from magi_attention.functional import ffa_fa4_func, flex_flash_attn_func, index_job
from magi_attention.kernels.reference import BACKEND as REFERENCE
from magi_attention.testing.masks import random_masks
from magi_attention.testing.metric import assert_within_pytorch_error
from magi_attention.testing.oracle import dense_attention, dense_mask, masked_attention
from magi_attention.testing.stages import random_inputs


def tensors_of(slices: SliceTable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = torch.from_numpy(slices.rows.astype(np.int32))
    return rows[:, :2], rows[:, 2:4], rows[:, 4]


@settings(max_examples=40)
@given(random_masks(80), st.sampled_from([0.0, 2.0]), st.sampled_from([None, "sh", "ssh"]), st.booleans())
def test_everything_in_float64(mask, softcap, layout, max_logits):
    total, slices = mask
    x = random_inputs(total, total)
    leaves = [tensor.requires_grad_() for tensor in x[:3]]
    sink = None
    if layout is not None:
        sink = torch.randn((3, 4) if layout == "sh" else (total, 3, 4), dtype=torch.float64, requires_grad=True)
        leaves.append(sink)
    out, meta = flex_flash_attn_func(
        *leaves[:3],
        *tensors_of(slices),
        sink=sink,
        sink_layout=layout or "sh",
        softmax_scale=0.3,
        softcap=softcap,
        return_max_logits=max_logits,
    )
    truth, lse, largest = dense_attention(*leaves[:3], slices, softmax_scale=0.3, softcap=softcap, sink=sink)
    dlse = x.dlse.masked_fill(lse == -torch.inf, 0.0)
    expected = torch.autograd.grad((truth, lse), leaves, (x.dout, dlse))
    gradients = torch.autograd.grad((out, meta.lse), leaves, (x.dout, dlse))
    torch.testing.assert_close((out, meta.lse, *gradients), (truth, lse, *expected), rtol=1e-10, atol=1e-10)
    if max_logits:
        assert not meta.max_logits.requires_grad
        torch.testing.assert_close(meta.max_logits, largest, rtol=1e-12, atol=1e-12)
    else:
        assert meta.max_logits is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    slices = SliceTable([[0, 60, 0, 60, 1], [60, 150, 30, 150, 3]])
    x = random_inputs(150, 150, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in x[:3]]
    out, meta = flex_flash_attn_func(*leaves, *tensors_of(slices))
    assert (out.dtype, meta.lse.dtype) == (dtype, torch.float32)
    gradients = torch.autograd.grad(out, leaves, x.dout)
    assert {gradient.dtype for gradient in gradients} == {dtype}
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    truth = dense_attention(*exact, slices)[0]
    plain = masked_attention(*leaves, dense_mask(slices, 150, 150))[0]
    assert_within_pytorch_error(out, truth, plain)
    for gradient, reference, pytorch in zip(
        gradients,
        torch.autograd.grad(truth, exact, x.dout.double()),
        torch.autograd.grad(plain, leaves, x.dout),
        strict=True,
    ):
        assert_within_pytorch_error(gradient, reference, pytorch)


def test_gradient_flows_through_lse_alone():
    x = random_inputs(20, 20)
    leaves = [tensor.requires_grad_() for tensor in x[:3]]
    ranges = torch.tensor([[0, 20]])
    _, meta = flex_flash_attn_func(*leaves, ranges, ranges, torch.tensor([1]))
    dq, dk, dv = torch.autograd.grad(meta.lse, leaves, x.dlse, allow_unused=True)
    expected = torch.autograd.grad(dense_attention(*leaves, SliceTable([[0, 20, 0, 20, 1]]))[1], leaves[:2], x.dlse)
    torch.testing.assert_close((dq, dk), expected, rtol=1e-10, atol=1e-10)
    assert not dv.any()


def test_types_default_to_full_and_hints_change_nothing(caplog):
    x = random_inputs(12, 12, dtype=torch.float32)
    ranges = torch.tensor([[0, 5], [5, 12]])
    plain, _ = flex_flash_attn_func(x.q, x.k, x.v, ranges, ranges)
    with caplog.at_level(logging.DEBUG, logger="magi_attention.functional"):
        hinted, _ = flex_flash_attn_func(
            x.q, x.k, x.v, ranges, ranges, auto_range_merge=True, ref_block_size=(64, 64), max_seqlen_q=7, pack_gqa=True
        )
    assert torch.equal(plain, hinted)
    assert len(caplog.records) == 1
    assert "ref_block_size" in caplog.text
    truth = dense_attention(x.q, x.k, x.v, SliceTable([[0, 5, 0, 5, 0], [5, 12, 5, 12, 0]]))[0]
    torch.testing.assert_close(plain, truth.float(), rtol=1e-5, atol=1e-5)


def test_ranges_may_overlap_as_long_as_pairs_do_not():
    x = random_inputs(8, 8)
    q_ranges, k_ranges = torch.tensor([[0, 8], [0, 8]]), torch.tensor([[0, 4], [4, 8]])
    out, _ = flex_flash_attn_func(x.q, x.k, x.v, q_ranges, k_ranges)
    torch.testing.assert_close(out, dense_attention(x.q, x.k, x.v, SliceTable([[0, 8, 0, 8, 0]]))[0])


def test_pairs_covered_twice_are_refused_by_name_unless_trusted(monkeypatch):
    x = random_inputs(8, 8)
    q_ranges, k_ranges = torch.tensor([[0, 4], [4, 8], [6, 8]]), torch.tensor([[0, 8], [0, 4], [3, 5]])
    with pytest.raises(ValueError, match=r"1 \[4, 8, 0, 4, 0\] and 2 \[6, 8, 3, 5, 0\]"):
        flex_flash_attn_func(x.q, x.k, x.v, q_ranges, k_ranges)
    flex_flash_attn_func(x.q, x.k, x.v, q_ranges, k_ranges, skip_overlap_check=True)
    monkeypatch.setenv("MAGI_ATTENTION_SKIP_OVERLAP_CHECK", "1")
    flex_flash_attn_func(x.q, x.k, x.v, q_ranges, k_ranges)
    with pytest.raises(ValueError, match="common"):
        flex_flash_attn_func(x.q, x.k, x.v, q_ranges, k_ranges, skip_overlap_check=False)


@pytest.mark.parametrize("number", [1, np.float32(0.5), np.float64(0.5), Fraction(1, 2)], ids=repr)
@pytest.mark.parametrize("by_indices", [False, True])
def test_every_kind_of_number_becomes_a_float(monkeypatch, number, by_indices):
    """As of ``1 / np.sqrt(d)``: compilers take numpy's numbers for tensors, and kernels not every kind."""
    x, calls = random_inputs(8, 8), []
    module, name = (index_job, "attend_to_indices") if by_indices else (REFERENCE, "forward")
    attend = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(args[-1]) or attend(*args))
    mask = (None,) * 2 if by_indices else (WHOLE, WHOLE)
    indices = torch.zeros(8, x.k.shape[1], 1, dtype=torch.int32) if by_indices else None
    flex_flash_attn_func(x.q, x.k, x.v, *mask, index_attn_indices=indices, softmax_scale=number, softcap=number)
    (call,) = calls
    assert type(call.softmax_scale) is type(call.softcap) is float
    assert call.softmax_scale == call.softcap == float(number)


WHOLE = torch.tensor([[0, 8]])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q_ranges": None}, ValueError, "not both"),
        ({"index_attn_indices": WHOLE}, ValueError, "not both"),
        ({"k_ranges": None}, ValueError, "k_ranges"),
        ({"index_attn": True}, ValueError, "index_attn_indices, which are missing"),
        ({"q_ranges": torch.tensor([[0, 9]])}, ValueError, r"q_ranges\[0\] is \[0, 9\].*\[0, 8\]"),
        ({"k_ranges": torch.tensor([[5, 2]])}, ValueError, r"k_ranges\[0\] is \[5, 2\]"),
        ({"k_ranges": torch.tensor([[-1, 2]])}, ValueError, r"k_ranges\[0\]"),
        ({"q_ranges": torch.tensor([0, 8])}, ValueError, r"\[n, 2\]"),
        ({"q_ranges": [[0, 8]]}, TypeError, "q_ranges.*list"),
        ({"k_ranges": torch.tensor([[0.0, 8.0]])}, TypeError, "k_ranges.*float32"),
        ({"k_ranges": torch.tensor([[0, 4], [4, 8]])}, ValueError, "1, 2 and 1"),
        ({"attn_type_map": torch.tensor([4])}, ValueError, "0 to 3"),
        ({"attn_type_map": torch.tensor([[1]])}, ValueError, r"\[n\]"),
        ({"q": torch.zeros(8, 4)}, ValueError, r"q must have shape.*\[8, 4\]"),
        ({"q": torch.zeros(1, 8, 4, 16)}, ValueError, r"q must have shape.*\[1, 8, 4, 16\]"),
        ({"q": [1.0]}, TypeError, "q must be a tensor, not list"),
        ({"k": torch.zeros(8, 2, 16, dtype=torch.float64)}, ValueError, "float64"),
        ({"v": torch.zeros(7, 2, 16)}, ValueError, r"\[7, 2, 16\]"),
        ({"q": torch.zeros(8, 3, 16)}, ValueError, "multiple of the key heads, got 3 and 2"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"softmax_scale": math.nan}, ValueError, "softmax_scale is nan"),
        ({"softmax_scale": -math.inf}, ValueError, "softmax_scale is -inf"),
        ({"sm_margin": -3}, ValueError, "sm_margin must be at least 0, not -3"),
        ({"sm_margin": 1.5}, TypeError, "sm_margin must be int, not 1.5"),
        ({"sink": torch.zeros(1, 3)}, ValueError, "sink"),
        ({"sink": [0.0]}, TypeError, "sink must be a tensor, not list"),
        ({"deterministic": True, "swap_bwd_qk_loop": True}, ValueError, "swap_bwd_qk_loop"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(changes, error, message):
    arguments = {
        "q": torch.zeros(8, 4, 16),
        "k": torch.zeros(8, 2, 16),
        "v": torch.zeros(8, 2, 16),
        "q_ranges": WHOLE,
        "k_ranges": WHOLE,
    }
    with pytest.raises(error, match=message) as raised:
        flex_flash_attn_func(**(arguments | changes))
    if error is ValueError:
        assert isinstance(raised.value, AssertionError)  # what callers of the original catch


def test_the_configured_backend_is_used(monkeypatch):
    x = random_inputs(8, 8)
    monkeypatch.setenv("MAGI_ATTENTION_KERNEL_BACKEND", "flex")
    with pytest.raises(RuntimeError, match="CPU"):
        flex_flash_attn_func(x.q, x.k, x.v, WHOLE, WHOLE)
    for name in ("reference", "sdpa", "auto"):
        monkeypatch.setenv("MAGI_ATTENTION_KERNEL_BACKEND", name)
        flex_flash_attn_func(x.q, x.k, x.v, WHOLE, WHOLE)


def test_ffa_fa4_func_asks_for_the_wheel_or_names_why_not():
    x = random_inputs(8, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"fa4|blackwell"):
        ffa_fa4_func(x.q, x.k, x.v, WHOLE, WHOLE)
    with pytest.raises(TypeError, match="q must be a tensor, not list"):
        ffa_fa4_func([1.0], x.k, x.v, WHOLE, WHOLE)
