# SPDX-License-Identifier: Apache-2.0
"""Merging by log-sum-exp, the sink, and the public correction functions, against the oracle and by algebra."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention import functional
from magi_attention.common.slices import SliceTable
from magi_attention.functional import utils
from magi_attention.kernels.merge import merge_partials, rescale
from magi_attention.kernels.sink import apply_sink, fold_sink, sink_gradient
from magi_attention.testing.oracle import dense_attention
from magi_attention.testing.stages import random_inputs

INF = math.inf
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def parts_of(num_parts: int, total: int = 12):
    """A causal attention cut by keys into parts, and the whole; the first rows see no key of the later parts."""
    x = random_inputs(total, total)
    slices = SliceTable([[1, total, 0, total - 1, 1]])  # row 0 sees nothing at all
    cuts = [total * i // num_parts for i in range(num_parts + 1)]
    parts = [dense_attention(x.q, x.k, x.v, slices.clip_columns(cuts[i], cuts[i + 1]))[:2] for i in range(num_parts)]
    return parts, dense_attention(x.q, x.k, x.v, slices)[:2]


@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_merging_parts_gives_the_whole_in_any_order(num_parts):
    parts, whole = parts_of(num_parts)
    for order in (parts, parts[::-1]):
        out, lse = order[0]
        for out2, lse2 in order[1:]:
            out, lse = merge_partials(out, lse, out2, lse2)
        torch.testing.assert_close((out, lse), whole, **TIGHT)


def test_merging_nothing_with_nothing_stays_nothing():
    out, lse = torch.zeros(2, 1, 3), torch.full((2, 1), -INF)
    merged, merged_lse = merge_partials(out, lse, out.clone(), lse.clone())
    assert not merged.any()
    assert torch.equal(merged_lse, lse)


@pytest.mark.parametrize(
    ("out_dtype", "lse_dtype", "merged"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_merging_is_in_at_least_float32_and_leaves_its_arguments(out_dtype, lse_dtype, merged):
    out, lse = torch.ones(2, 1, 3, dtype=out_dtype), torch.zeros(2, 1, dtype=lse_dtype)
    result, result_lse = merge_partials(out, lse, 3 * out, lse)
    assert result.dtype == merged
    assert (result == 2).all()
    torch.testing.assert_close(result_lse, torch.full_like(lse, math.log(2)))
    assert (out == 1).all()
    assert not lse.any()


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 4), st.sampled_from(["sh", "ssh"]), st.integers(0, 2**31))
def test_sink_and_its_gradient(total, num_sinks, layout, seed):
    x = random_inputs(total, total, seed=seed)
    slices = SliceTable([[total // 3, total, 0, total, 1]])  # the first rows see only the sink
    shape = (num_sinks, 4) if layout == "sh" else (total, num_sinks, 4)
    sink = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out, lse, _ = dense_attention(x.q, x.k, x.v, slices, sink=sink)
    expected = torch.autograd.grad((out, lse), sink, (x.dout, x.dlse))[0]
    plain, plain_lse, _ = dense_attention(x.q, x.k, x.v, slices)
    actual, actual_lse = apply_sink(plain, plain_lse, sink.detach())
    torch.testing.assert_close((actual, actual_lse), (out, lse), **TIGHT)
    gradient = sink_gradient(sink.detach(), actual, x.dout, actual_lse, x.dlse)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)
    without_dlse = utils.sink_bwd(sink.detach(), actual_lse, actual, x.dout, layout)
    torch.testing.assert_close(
        without_dlse, sink_gradient(sink.detach(), actual, x.dout, actual_lse, torch.zeros_like(x.dlse)), **TIGHT
    )


def test_sink_of_minus_infinity_changes_nothing():
    out, lse = torch.ones(2, 1, 3), torch.tensor([[0.5], [-INF]])
    sink = torch.full((2, 1), -INF)
    actual, actual_lse = apply_sink(out * (lse > -INF)[..., None], lse, sink)
    assert torch.equal(actual_lse, lse)
    assert torch.equal(actual, torch.tensor([1.0, 0.0])[:, None, None].expand(2, 1, 3))
    assert not sink_gradient(sink, actual, torch.ones(2, 1, 3), lse, torch.ones(2, 1)).any()


@pytest.mark.parametrize("sink_dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sink_of_any_precision_joins_in_that_of_the_lse(dtype, sink_dtype):
    x = random_inputs(5, 5, dtype=dtype)
    slices = SliceTable([[0, 4, 0, 5, 0]])
    sink = torch.randn(3, 4, dtype=torch.float64).to(sink_dtype)
    expected = dense_attention(x.q, x.k, x.v, slices, sink=sink)[:2]
    ranges = torch.tensor([[0, 4]]), torch.tensor([[0, 5]])
    out, meta = functional.flex_flash_attn_func(x.q, x.k, x.v, *ranges, sink=sink)
    assert (out.dtype, meta.lse.dtype) == (dtype, dtype)
    tolerance = TIGHT if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close((out.double(), meta.lse.double()), expected, **tolerance)


def test_sink_gradient_is_not_rounded_before_ranks_add_up():
    sink = torch.zeros(1, 2, dtype=torch.bfloat16)
    out = torch.ones(3, 2, 4)
    assert sink_gradient(sink, out, out, torch.zeros(3, 2), None).dtype == torch.float32


def test_correction_functions_agree_with_the_merge():
    (part, part2), whole = parts_of(2)
    (out, lse), (out2, lse2) = part, part2
    torch.testing.assert_close(functional.correct_attn_lse(lse, lse2), whole[1], **TIGHT)
    torch.testing.assert_close(functional.correct_attn_out(out, lse, out2, lse2, whole[1]), whole[0], **TIGHT)
    torch.testing.assert_close(functional.correct_attn_out_lse(out, lse, out2, lse2), whole, **TIGHT)
    torch.testing.assert_close(rescale(out, lse, lse), out, **TIGHT)


def test_corrections_in_place_write_into_the_first_argument():
    (part, part2), whole = parts_of(2)
    out, lse = part
    result = functional.correct_attn_out_lse(out, lse, *part2, inplace=True)
    assert result[0] is out
    assert result[1] is lse
    torch.testing.assert_close((out, lse), whole, **TIGHT)


def test_corrections_keep_the_dtype_of_their_first_argument():
    out, lse = torch.ones(2, 1, 4, dtype=torch.bfloat16), torch.zeros(2, 1)
    corrected, corrected_lse = functional.correct_attn_out_lse(out, lse, out, lse)
    assert (corrected.dtype, corrected_lse.dtype) == (torch.bfloat16, torch.float32)
    sink = torch.zeros(1, 1)
    assert functional.correct_attn_out_with_sink(out, lse, sink).dtype == torch.bfloat16


def test_corrections_by_a_sink():
    x = random_inputs(5, 5)
    slices = SliceTable([[0, 4, 0, 5, 0]])
    sink = torch.randn(2, 4, dtype=torch.float64)
    out, lse, _ = dense_attention(x.q, x.k, x.v, slices)
    whole = dense_attention(x.q, x.k, x.v, slices, sink=sink)[:2]
    for given_sink, layout in ((sink, "sh"), (sink.expand(5, 2, 4), "ssh")):
        torch.testing.assert_close(
            functional.correct_attn_out_lse_with_sink(out, lse, given_sink, layout), whole, **TIGHT
        )
        torch.testing.assert_close(functional.correct_attn_lse_with_sink(lse, given_sink, layout), whole[1], **TIGHT)
        torch.testing.assert_close(
            functional.correct_attn_out_with_sink(out, lse, given_sink, layout), whole[0], **TIGHT
        )
        torch.testing.assert_close(utils.calc_lse_sink(given_sink, 5, layout), sink.logsumexp(0).expand(5, 4), **TIGHT)


def test_gradients_flow_through_corrections_to_parts_and_sink():
    x = random_inputs(12, 12)
    slices = SliceTable([[1, 12, 0, 11, 1]])  # row 0 has no keys, the first rows none in the second part
    leaves = [tensor.clone().requires_grad_() for tensor in (x.q, x.k, x.v)]
    part, part2 = (dense_attention(*leaves, slices.clip_columns(*cut))[:2] for cut in ((0, 6), (6, 12)))
    whole = dense_attention(*leaves, slices)[:2]
    dlse = x.dlse.clone()
    dlse[0] = 0  # that of a row without keys
    corrected = functional.correct_attn_out_lse(*part, *part2)
    torch.testing.assert_close(gradients(corrected, leaves, x.dout, dlse), gradients(whole, leaves, x.dout, dlse))
    corrected_lse = functional.correct_attn_lse(part[1], part2[1])
    corrected_out = functional.correct_attn_out(*part, *part2, corrected_lse)
    assert torch.equal(corrected_out, corrected[0])
    leaves.append(torch.randn(2, 4, dtype=torch.float64, requires_grad=True))
    corrected = functional.correct_attn_out_lse_with_sink(corrected_out, corrected_lse, leaves[-1])
    whole = dense_attention(*leaves[:3], slices, sink=leaves[-1])[:2]
    torch.testing.assert_close(gradients(corrected, leaves, x.dout, x.dlse), gradients(whole, leaves, x.dout, x.dlse))


def gradients(outputs, leaves, *grad_outputs):
    return torch.autograd.grad(outputs, leaves, grad_outputs, retain_graph=True)


@pytest.mark.parametrize(
    ("sink", "layout", "error", "message"),
    [
        (torch.zeros(1, 2, 4), "shd", NotImplementedError, "shd"),
        (torch.zeros(1, 2), "hs", ValueError, "'hs'"),
        (torch.zeros(1, 5), "sh", ValueError, r"\[1, 5\]"),
        (torch.zeros(2, 1, 2), "ssh", ValueError, "tq=3"),
        (torch.zeros(1, 2, dtype=torch.int32), "sh", ValueError, "int32"),
    ],
)
def test_wrong_sinks_are_named(sink, layout, error, message):
    with pytest.raises(error, match=message):
        functional.correct_attn_lse_with_sink(torch.zeros(3, 2), sink, layout)


def test_corrections_refuse_mixed_dtypes():
    lse = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"float32.*float64"):
        functional.correct_attn_lse(lse, lse.double())


def test_safe_algebra_where_there_is_nothing():
    x = torch.tensor([[0.0, 1.0], [-INF, -INF]], dtype=torch.float64, requires_grad=True)
    lse = utils.safe_lse(x)
    assert lse[1] == -INF
    torch.testing.assert_close(lse[0], x[0].logsumexp(0))
    assert torch.equal(torch.autograd.grad(lse[1], x)[0], torch.zeros(2, 2, dtype=torch.float64))
    weights = utils.safe_softmax(x.detach())
    torch.testing.assert_close(weights[0], x[0].detach().softmax(0))
    assert not weights[1].any()
    assert torch.equal(weights, utils.safe_softmax(x.detach(), lse.detach()))
    assert utils.safe_subtract(lse, lse).tolist() == [0.0, -INF]
    assert utils.calc_lse_rescale_weight(lse.detach(), lse.detach()).tolist() == [[1.0], [0.0]]


def test_softmax_bwd_is_the_softmaxs_derivative():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    out, dout = x.softmax(-1), torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(utils.softmax_bwd(dout, out.detach()), torch.autograd.grad(out, x, dout)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["sh", "ssh"])
def test_folding_a_sink_in_place_gives_the_same(dtype, layout):
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    out, lse = torch.randn(5, 2, 3).to(dtype), torch.randn(5, 2, dtype=accumulated)
    out[1], lse[1] = 0, -INF
    sink = torch.randn((4, 2) if layout == "sh" else (5, 4, 2))
    expected, expected_lse = apply_sink(out, lse, sink)
    before = lse.clone()
    assert torch.equal(fold_sink(out, lse, sink), expected_lse)
    assert torch.equal(out, expected.to(dtype))
    assert torch.equal(lse, before)
