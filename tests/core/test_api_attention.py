# SPDX-License-Identifier: Apache-2.0
"""``calc_attn`` in one process, without torch.distributed, of one sequence and of two."""

import math
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from magi_attention.api import (
    AttnRanges,
    DistAttnConfig,
    calc_attn,
    clear_cache,
    dispatch,
    flex_flash_attn_func,
    magi_attn_flex_key,
    magi_attn_varlen_key,
    roll,
    undispatch,
)
from magi_attention.common.enum import AttnRole
from magi_attention.common.slices import SliceTable
from magi_attention.config import RuntimeConfig
from magi_attention.kernels.reference import BACKEND as REFERENCE
from magi_attention.testing.oracle import dense_attention
from tests.core.api_single import PADDED, SLICES, TOTAL, qkv


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("with_sink", [True, False])
def test_attention_and_gradients(key, padded, with_sink):
    inputs = [x.requires_grad_() for x in qkv(TOTAL)]
    sink = torch.randn(2, 4, dtype=torch.float64, requires_grad=True) if with_sink else None
    local = [dispatch(x, key) for x in inputs] if padded else inputs
    out, meta = calc_attn(*local, key, sink=sink, softcap=3.0, softmax_scale=0.5, return_max_logits=True)
    assert out.shape == (PADDED if padded else TOTAL, 4, 8)
    expected, lse, max_logits = dense_attention(*inputs, SLICES, softmax_scale=0.5, softcap=3.0, sink=sink)
    torch.testing.assert_close(out[:TOTAL], expected)
    torch.testing.assert_close(meta.lse[:TOTAL], lse)
    torch.testing.assert_close(meta.max_logits.double(), max_logits.double(), rtol=1e-5, atol=1e-5)
    wanted = [*inputs, *([sink] if with_sink else [])]
    weight = torch.randn_like(expected)
    for name, got, want in zip(
        ["q", "k", "v", "sink"],
        torch.autograd.grad((out[:TOTAL] * weight).sum() + meta.lse[:TOTAL].sum(), wanted),
        torch.autograd.grad((expected * weight).sum() + lse.sum(), wanted),
        strict=False,
    ):
        torch.testing.assert_close(got, want, msg=lambda m, name=name: f"d{name}: {m}")


def by_key(key, q, k, v, softmax_scale):
    return calc_attn(*[dispatch(x, key) for x in (q, k, v)], key, softmax_scale=softmax_scale)


def by_ranges(key, q, k, v, softmax_scale):
    """The same mask, with as many rows that attend to nothing."""
    q = torch.cat([q, q.new_zeros(PADDED - TOTAL, *q.shape[1:])])
    ranges = torch.tensor([[0, 30], [30, 50]])
    return flex_flash_attn_func(q, k, v, ranges, ranges, torch.tensor([1, 1]), softmax_scale=softmax_scale)


@pytest.mark.parametrize("attend", [by_key, by_ranges])
def test_no_kernel_sees_gradients_of_the_lse_of_padding(key, attend):
    """Selecting rows after squaring sends 0 * -inf to the others."""
    backend, seen = type(REFERENCE), []

    def watched(*args):
        seen.append(args[7])
        return backward(*args)

    inputs, backward = [x.requires_grad_() for x in qkv(TOTAL)], backend.backward
    with mock.patch.object(backend, "backward", watched):
        _, meta = attend(key, *inputs, 0.37)  # a scale that no other test has, for which nothing is kept
        assert (meta.lse[TOTAL:] == -math.inf).all()
        loss = meta.lse.square()[:TOTAL].sum()
        gradients = torch.autograd.grad(loss, inputs[:2])
    assert seen
    assert all(dlse.isfinite().all() for dlse in seen)
    expected = torch.autograd.grad(dense_attention(*inputs, SLICES, softmax_scale=0.37)[1].square().sum(), inputs[:2])
    torch.testing.assert_close(gradients, expected)


def test_padding_attends_to_nothing(key):
    out, meta = calc_attn(*[dispatch(x, key) for x in qkv(TOTAL)], key)
    assert (out[TOTAL:] == 0).all()
    assert (meta.lse[TOTAL:] == float("-inf")).all()
    assert meta.max_logits is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_out_has_the_dtype_of_q(key, dtype):
    inputs = qkv(TOTAL, dtype)
    out, meta = calc_attn(*inputs, key)
    assert (out.dtype, meta.lse.dtype) == (dtype, torch.float32)
    expected, _, _ = dense_attention(*inputs, SLICES)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


MISTAKES = {
    "too short": (lambda: (qkv(TOTAL - 1), {}), ValueError, "49 rows, but rank 0 of the group holds 56"),
    "too long": (lambda: (qkv(PADDED + 1), {}), ValueError, "57 rows"),
    "different rows": (lambda: ([qkv(TOTAL)[0], *qkv(PADDED)[1:]], {}), ValueError, "same number of rows"),
    "no heads": (lambda: ([x[:, 0] for x in qkv(TOTAL)], {}), ValueError, r"q must be \[n, hq, d\]"),
    "zero heads": (lambda: (qkv(TOTAL, heads=(0, 2, 2)), {}), ValueError, "there must be heads, and of a size"),
    "heads of size 0": (lambda: (qkv(TOTAL, dims=(0, 0, 8)), {}), ValueError, "there must be heads, and of a size"),
    "k and v differ": (lambda: (qkv(TOTAL, heads=(4, 2, 1)), {}), ValueError, r"v \(50, 1, 8\)"),
    "head sizes": (lambda: (qkv(TOTAL, dims=(8, 16, 16)), {}), ValueError, "the same head size"),
    "head counts": (lambda: (qkv(TOTAL, heads=(4, 3, 3)), {}), ValueError, "4 query heads must be a multiple of the 3"),
    "dtypes": (lambda: ([qkv(TOTAL)[0].float(), *qkv(TOTAL)[1:]], {}), TypeError, "torch.float32, torch.float64"),
    "learned scale": (
        lambda: (qkv(TOTAL), {"softmax_scale": torch.tensor(0.3)}),
        TypeError,
        "softmax_scale must be a number, not Tensor; multiply q",
    ),
    "integers": (lambda: ([x.long() for x in qkv(TOTAL)], {}), TypeError, "torch.int64"),
    "device": (lambda: ([qkv(TOTAL)[0].to("meta"), *qkv(TOTAL)[1:]], {}), ValueError, "they are on meta, cpu, cpu"),
    "softcap": (lambda: (qkv(TOTAL), {"softcap": -1.0}), ValueError, "softcap is -1.0"),
    "sink shape": (lambda: (qkv(TOTAL), {"sink": torch.zeros(1, 2)}), ValueError, r"sink must be \[s, 4\]"),
    "sink dim": (lambda: (qkv(TOTAL), {"sink": torch.zeros(4)}), ValueError, r"it is \(4,\)"),
    "sink dtype": (lambda: (qkv(TOTAL), {"sink": torch.zeros(1, 4, dtype=torch.int32)}), TypeError, "torch.int32"),
    "sink device": (lambda: (qkv(TOTAL), {"sink": torch.zeros(1, 4, device="meta")}), ValueError, "sink is on meta"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_attention_arguments(key, mistake):
    make, error, message = MISTAKES[mistake]
    tensors, options = make()
    with pytest.raises(error, match=message) as raised:
        calc_attn(*tensors, key, **options)
    assert isinstance(raised.value, AssertionError)


@pytest.mark.parametrize("bad", [[1.0], None, 3])
def test_what_is_no_tensor_is_a_type_error(key, bad):
    q, k, v = qkv(PADDED)
    for arguments in ((bad, k, v), (q, bad, v), (q, k, bad)):
        with pytest.raises(TypeError, match="must be a tensor, not"):
            calc_attn(*arguments, key)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"softcap": math.nan}, "softcap is nan"), ({"softmax_scale": math.inf}, "softmax_scale is inf")],
)
def test_options_that_are_not_finite_are_refused(key, options, message):
    with pytest.raises(ValueError, match=message):
        calc_attn(*qkv(PADDED), key, **options)


def test_autocast_is_named_where_it_left_other_dtypes(key):
    q, k, v = qkv(TOTAL, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="autocast leaves them as they are"):
        calc_attn(q, k, v.bfloat16(), key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_attention_in_its_inputs_dtype(key, dtype):
    q, k, v = (x.detach().requires_grad_() for x in qkv(PADDED, dtype))
    expected, meta = calc_attn(q, k, v, key)
    gradients = torch.autograd.grad(expected.sum(), (q, k, v))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, meta_autocast = calc_attn(q, k, v, key)
        assert torch.equal(out, expected)
        assert torch.equal(meta_autocast.lse, meta.lse)
        for actual, wanted in zip(torch.autograd.grad(out.sum(), (q, k, v)), gradients, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize(
    "options", [{"sink": torch.zeros(1, 4)}, {"return_max_logits": True}], ids=["sink", "max_logits"]
)
def test_flattened_head_groups_exclude_sink_and_max_logits(options):
    config = DistAttnConfig(runtime_config=RuntimeConfig(flatten_head_groups=True))
    key = magi_attn_varlen_key([0, 50], [0, 50], 4, 2, 8, 0, None, dist_attn_config=config)
    calc_attn(*qkv(TOTAL), key)  # whose tensors are right, as they are below
    with pytest.raises(AssertionError, match="flatten_head_groups"):
        calc_attn(*qkv(TOTAL), key, **options)


def test_a_sink_of_another_dtype_is_checked_anew(key):
    sink = torch.zeros(1, 4)
    calc_attn(*qkv(TOTAL), key, sink=sink)
    with pytest.raises(TypeError, match=r"torch\.int32"):
        calc_attn(*qkv(TOTAL), key, sink=sink.int())


def test_calls_with_and_without_max_logits_do_not_take_turns_by_mistake(key):
    for wanted in (False, True, False):
        _, meta = calc_attn(*qkv(TOTAL), key, return_max_logits=wanted)
        assert (meta.max_logits is not None) is wanted


def test_results_may_be_modified_in_place(key):
    q, k, v = (x.detach().requires_grad_() for x in qkv(PADDED))
    expected, _ = calc_attn(q, k, v, key)
    out, meta = calc_attn(q, k, v, key)
    out.mul_(2)
    meta.lse.mul_(2)
    assert torch.equal(out, 2 * expected)
    # As for softmax, the backward pass reads the output, and says so if that is not what it was.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("depends", [False, True])
def test_gradients_of_gradients_are_refused(key, depends):
    q, k, v = (x.requires_grad_() for x in qkv(PADDED))
    out, _ = calc_attn(q, k, v, key)
    weight = torch.ones_like(out).requires_grad_(depends)
    (gradient,) = torch.autograd.grad((weight * out).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention has no second derivative"):
        (gradient.square().sum() + q.sum()).backward()


@pytest.mark.parametrize("by_lse", [False, True])
def test_gradients_of_gradients_are_not_left_out_where_other_paths_lead_to_an_input(key, by_lse):
    q, k, v = (x.requires_grad_() for x in qkv(PADDED))
    out, meta = calc_attn(q, k, v, key)
    (gradient,) = torch.autograd.grad(meta.lse.sum() if by_lse else out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention has no second derivative"):
        torch.autograd.grad((gradient * q).sum(), q)


def test_gradients_of_gradients_are_refused_in_checkpoints(key):
    q, k, v = (x.requires_grad_() for x in qkv(PADDED))
    out, _ = checkpoint(calc_attn, q, k, v, key, use_reentrant=False)
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("function", [undispatch, lambda x, key: roll(x, 1, 0, key), dispatch])
def test_gradients_of_gradients_are_refused_by_what_deals_rows(key, function):
    x = torch.randn(TOTAL if function is dispatch else PADDED, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x, key).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad((gradient * x).sum(), x)


FUNCTIONS = {
    "attention": lambda x, key: calc_attn(x, x, x, key)[0],
    "dispatch": lambda x, key: dispatch(x[:TOTAL], key),
    "undispatch": undispatch,
    "roll": lambda x, key: roll(x, 1, 0, key),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_of_torch_func_are_refused(key, name):
    def function(x):
        return FUNCTIONS[name](x, key)

    x = torch.randn(PADDED, 2, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"transforms of torch\.func"):
        torch.vmap(function)(x[None])
    with pytest.raises(RuntimeError, match=r"transforms of torch\.func"):
        torch.func.grad(lambda x: function(x).sum())(x)


def test_a_graph_of_the_backward_pass_changes_no_gradient(key):
    found = []
    for create_graph in (False, True):
        q, k, v = (x.requires_grad_() for x in qkv(PADDED))
        out, _ = calc_attn(q, k, v, key)
        found.append(torch.autograd.grad(out.sum(), (q, k), create_graph=create_graph))
    assert all(torch.equal(plain, with_graph) for plain, with_graph in zip(*found, strict=True))


def test_tensors_without_values_have_shapes(key):
    q, k, v = (x.to("meta").requires_grad_() for x in qkv(PADDED))
    out, meta = calc_attn(q, k, v, key)
    undispatch(out, key).sum().backward()
    assert (out.shape, meta.lse.shape, k.grad.shape) == (q.shape, q.shape[:2], k.shape)


@pytest.fixture(scope="module")
def cross_key():
    q_ranges, k_ranges = AttnRanges.from_ranges([(0, 30), (30, 50)]), AttnRanges.from_ranges([(0, 10), (10, 90)])
    yield magi_attn_flex_key(q_ranges, k_ranges, "full", 50, 90, 4, 2, 8, 0, None, is_same_source=False)
    clear_cache()


@pytest.mark.parametrize("padded", [True, False])
def test_cross_attention_and_gradients(cross_key, padded):
    inputs = [x.requires_grad_() for x in (qkv(50)[0], *qkv(90)[1:])]
    roles = (AttnRole.QUERY, AttnRole.KEY, AttnRole.VALUE)
    local = [dispatch(x, cross_key, attn_role=role) for x, role in zip(inputs, roles, strict=True)]
    assert [len(x) for x in local] == [56, 96, 96]
    out, _ = calc_attn(*(local if padded else inputs), cross_key)
    expected = dense_attention(*inputs, SliceTable([[0, 30, 0, 10, 0], [30, 50, 10, 90, 0]]))[0]
    torch.testing.assert_close(out[:50], expected)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((out[:50] * weight).sum(), inputs)
    for got, want in zip(gradients, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((96, 96), "q has 96 rows, but rank 0 of the group holds 56 of the padded sequence's 56"),
        ((56, 56), "k and v have 56 rows, but rank 0 of the group holds 96 of the padded sequence's 96"),
    ],
)
def test_each_side_of_cross_attention_has_its_own_rows(cross_key, rows, message):
    with pytest.raises(ValueError, match=message):
        calc_attn(qkv(rows[0])[0], *qkv(rows[1])[1:], cross_key)
    with pytest.raises(ValueError, match="x has 50 rows in dim 0, but the global sequence without padding has 90"):
        dispatch(torch.zeros(50), cross_key, attn_role=AttnRole.KEY)
    with pytest.raises(ValueError, match="x has 56 rows in dim 0, but this rank's share has 96"):
        undispatch(torch.zeros(56), cross_key, attn_role=AttnRole.VALUE)
