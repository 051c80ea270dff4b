# SPDX-License-Identifier: Apache-2.0
"""Index attention on a CPU: every query's own keys, against the dense oracle with the mask that they make."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from magi_attention.functional import flex_flash_attn_func, index_job
from magi_attention.kernels import indexed, registry
from magi_attention.kernels.protocol import AttentionRequest, IndexCall, Support
from magi_attention.testing.lists import dense_index_attention, random_lists
from magi_attention.testing.metric import assert_within_pytorch_error
from magi_attention.testing.stages import random_inputs

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50))


@settings(max_examples=60)
@given(
    SHAPES,
    st.sampled_from([(4, 2), (3, 1), (2, 2)]),
    st.sampled_from([0.0, 2.0]),
    st.sampled_from([None, "sh", "ssh"]),
    st.integers(0, 1000),
)
def test_everything_in_float64(shape, heads, softcap, layout, seed):
    num_q, num_k, longest = shape
    x = random_inputs(num_q, num_k, heads=heads, dims=(16, 8))
    leaves = [each.requires_grad_() for each in x[:3]]
    lists = random_lists(num_q, heads[1], num_k, longest, seed=seed)
    sink = None
    if layout is not None:
        sink = torch.randn(3, heads[0], dtype=torch.float64) if layout == "sh" else x.dlse[:, None] * torch.ones(3, 1)
        leaves.append(sink.requires_grad_())
    scoring = {"softmax_scale": 0.3, "softcap": softcap, "sink": sink}
    out, meta = flex_flash_attn_func(
        *leaves[:3], index_attn_indices=lists, sink_layout=layout or "sh", return_max_logits=True, **scoring
    )
    truth, lse, largest = dense_index_attention(*leaves[:3], lists, **scoring)
    dlse = x.dlse.masked_fill(lse == -torch.inf, 0.0)
    expected = torch.autograd.grad((truth, lse), leaves, (x.dout, dlse))
    gradients = torch.autograd.grad((out, meta.lse), leaves, (x.dout, dlse))
    torch.testing.assert_close((out, meta.lse, *gradients), (truth, lse, *expected), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(meta.max_logits, largest, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_lse_of_empty_lists_change_nothing():
    """Selecting rows after squaring sends 0 * -inf to the others."""
    x = random_inputs(20, 30)
    leaves = [each.requires_grad_() for each in (x.q, x.k)]
    lists = random_lists(20, 2, 30, 10)
    lists[::3] = -1
    _, meta = flex_flash_attn_func(*leaves, x.v, index_attn_indices=lists)
    has_keys = meta.lse > -torch.inf
    gradients = torch.autograd.grad(meta.lse.square()[has_keys].sum(), leaves)
    truth = dense_index_attention(*leaves, x.v, lists)[1]
    expected = torch.autograd.grad(truth[has_keys].square().sum(), leaves)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-10)


def test_lists_written_over_before_the_backward_pass():
    x = random_inputs(20, 30, dtype=torch.float32)
    q = x.q.requires_grad_()
    lists = random_lists(20, 2, 30, 10).int()
    out, _ = flex_flash_attn_func(q, x.k, x.v, index_attn_indices=lists)
    lists.copy_(lists.flip(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(x.dout)


def test_keys_that_nobody_names_may_hold_anything():
    x = random_inputs(20, 30, dtype=torch.float32)
    leaves = [each.requires_grad_() for each in x[:3]]
    lists = random_lists(20, 2, 30, 10)
    lists = torch.where(lists == 0, 1, lists)
    spoilt = [each.detach().clone() for each in leaves]
    for each in spoilt[1:]:
        each[0] = torch.nan
    results = []
    for tensors in (leaves, [each.requires_grad_() for each in spoilt]):
        out, _ = flex_flash_attn_func(*tensors, index_attn_indices=lists)
        results.append((out, *torch.autograd.grad(out, tensors, x.dout)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_at_a_time(dtype, monkeypatch):
    monkeypatch.setitem(indexed.BYTES_AT_A_TIME, "cpu", 1 << 14)
    x = random_inputs(50, 90, dtype=dtype)
    leaves = [each.requires_grad_() for each in x[:3]]
    lists = random_lists(50, 2, 90, 40)
    out, meta = flex_flash_attn_func(*leaves, index_attn_indices=lists, index_attn=True)
    assert (out.dtype, meta.lse.dtype, meta.max_logits) == (dtype, torch.float32, None)
    gradients = torch.autograd.grad(out, leaves, x.dout)
    exact = [each.detach().double().requires_grad_() for each in leaves]
    truth, _, _ = dense_index_attention(*exact, lists)
    plain, _, _ = dense_index_attention(*leaves, lists)
    expected = torch.autograd.grad(truth, exact, x.dout.double())
    torchs = torch.autograd.grad(plain, leaves, x.dout)
    for mine, right, pytorch in zip((out, *gradients), (truth, *expected), (plain, *torchs), strict=True):
        assert_within_pytorch_error(mine, right, pytorch)


def test_lists_of_several_heads_over_one_head_of_rows():
    """Heads flattened to rows, as callers of kernels for one key head do."""
    x = random_inputs(20, 30, heads=(4, 2))
    lists = random_lists(20, 2, 30, 10)
    expected, meta = flex_flash_attn_func(x.q, x.k, x.v, index_attn_indices=lists)
    rows = torch.where(lists < 0, lists, 2 * lists + torch.arange(2)[:, None])
    q = x.q.unflatten(1, (2, 2)).flatten(0, 1)
    k, v = (each.flatten(0, 1)[:, None] for each in (x.k, x.v))
    out, flat_meta = flex_flash_attn_func(q, k, v, index_attn_indices=rows.int())
    torch.testing.assert_close(out.view_as(expected), expected)
    torch.testing.assert_close(flat_meta.lse.view_as(meta.lse), meta.lse)


@pytest.mark.parametrize(("num_q", "num_k", "longest"), [(0, 5, 3), (5, 0, 3), (5, 5, 0), (5, 5, 3)])
def test_nothing_to_attend_to(num_q, num_k, longest):
    x = random_inputs(num_q, num_k, dtype=torch.float32)
    leaves = [each.requires_grad_() for each in x[:3]]
    lists = torch.full((num_q, 2, longest), -1, dtype=torch.int32)
    out, meta = flex_flash_attn_func(*leaves, index_attn_indices=lists, return_max_logits=True)
    assert not out.any()
    assert (meta.lse == -torch.inf).all()
    assert meta.max_logits.tolist() == [-torch.inf] * 4
    assert not any(each.any() for each in torch.autograd.grad(out, leaves, x.dout))


class Recording:
    """A backend that has index attention of plain torch, in some directions."""

    def __init__(self, *directions: str) -> None:
        self._directions = directions
        self.calls: list[tuple[str, IndexCall]] = []

    def supports_indices(self, request: AttentionRequest) -> Support:
        return Support(request.direction in self._directions)

    def forward_indices(self, q, k, v, call):
        self.calls.append(("forward", call))
        return indexed.attend_to_indices(q, k, v, call)

    def backward_indices(self, dout, q, k, v, out, lse, dlse, call):
        self.calls.append(("backward", call))
        return indexed.differentiate_by_indices(dout, q, k, v, out, lse, dlse, call)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("names", "called"),
    [
        (("auto", "same"), [("hopper", "forward"), ("hopper", "backward")]),
        (("flex", "same"), [("flex", "forward")]),
        (("flex", "hopper"), [("flex", "forward"), ("hopper", "backward")]),
    ],
)
def test_backends_that_have_kernels_are_asked(names, called, deterministic, monkeypatch):
    backends = {"hopper": Recording("forward", "backward"), "flex": Recording("forward")}
    monkeypatch.setattr(registry, "installed_backends", lambda: backends)
    monkeypatch.setenv("MAGI_ATTENTION_KERNEL_BACKEND", names[0])
    monkeypatch.setenv("MAGI_ATTENTION_KERNEL_BACKEND_BACKWARD", names[1])
    x = random_inputs(10, 12, dtype=torch.float32)
    q = x.q.requires_grad_()
    out, _ = flex_flash_attn_func(
        q, x.k, x.v, index_attn_indices=random_lists(10, 2, 12, 5), deterministic=deterministic
    )
    out.backward(x.dout)
    calls = [(name, which, call) for name, backend in backends.items() for which, call in backend.calls]
    assert sorted(each[:2] for each in calls) == sorted(called)
    assert all(call.deterministic == deterministic for _, _, call in calls)


def keeping(*, attention: bool):
    """A selective checkpoint that keeps the results of index attention, or computes them again."""
    index_attention = torch.ops.magi_attention.index_attention.default

    def policy(ctx, operator, *args, **kwargs):
        keeps = attention and operator is index_attention
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return lambda attend: partial(checkpoint, attend, use_reentrant=False, context_fn=contexts)


WAYS_AROUND = {
    "compiled": lambda attend: torch.compile(attend, backend="aot_eager", fullgraph=True),
    "kept": keeping(attention=True),
    "computed again": keeping(attention=False),
}


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("way", WAYS_AROUND)
def test_compiled_or_in_a_selective_checkpoint_it_is_an_operator(way, with_sink, monkeypatch):
    calls = []
    compute = index_job.attend_to_indices
    monkeypatch.setattr(index_job, "attend_to_indices", lambda *args: calls.append(args) or compute(*args))
    x = random_inputs(10, 12)
    lists = random_lists(10, 2, 12, 5)
    leaves = [each.requires_grad_() for each in (*x[:3], *[torch.randn(2, 4, dtype=torch.float64)] * with_sink)]

    def attend(q, k, v, sink=None):
        out, meta = flex_flash_attn_func(
            q.sin(), k, v, index_attn_indices=lists, sink=sink, softcap=2.0, return_max_logits=True
        )
        return out * 2, meta.lse, meta.max_logits

    results = []
    for function in (attend, WAYS_AROUND[way](attend)):
        calls.clear()
        out, lse, largest = function(*leaves)
        objective = (out * x.dout).sum() + lse.where(lse.isfinite(), 0.0).square().sum()
        results.append((out, lse, largest, *torch.autograd.grad(objective, leaves)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    assert len(calls) == (2 if way == "computed again" else 1)


def test_compiled_functions_read_the_environment_in_each_call(monkeypatch):
    x, lists = random_inputs(8, 8), torch.zeros(8, 2, 4, dtype=torch.int32)
    attend = torch.compile(flex_flash_attn_func, backend="aot_eager", fullgraph=True)
    attend(x.q, x.k, x.v, index_attn_indices=lists)
    monkeypatch.setenv("MAGI_ATTENTION_KERNEL_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        attend(x.q, x.k, x.v, index_attn_indices=lists)


LISTS = torch.zeros(8, 2, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"index_attn_indices": LISTS[:7]}, ValueError, r"\[8, 2, n\], got \[7, 2, 4\]"),
        ({"index_attn_indices": LISTS[0]}, ValueError, r"got \[2, 4\]"),
        ({"index_attn_indices": LISTS.float()}, TypeError, "float32"),
        ({"index_attn_indices": LISTS.tolist()}, TypeError, "list"),
        ({"index_attn_indices": LISTS + 9}, ValueError, "has 9, but k has 9 rows"),
        ({"index_attn_indices": LISTS.to("meta")}, ValueError, "on cpu, not on meta"),
        ({"k_ranges": torch.tensor([[0, 8]])}, ValueError, "belong to q_ranges"),
        ({"q_block_size": 2}, ValueError, "must be 1, got 2 and 1"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"softmax_scale": math.nan}, ValueError, "softmax_scale is nan"),
        ({"softmax_scale": -math.inf}, ValueError, "softmax_scale is -inf"),
        ({"sm_margin": -3}, ValueError, "sm_margin must be at least 0, not -3"),
        ({"sm_margin": 1.5}, TypeError, "sm_margin must be int, not 1.5"),
        ({"sink": torch.zeros(1, 3)}, ValueError, "sink"),
        ({"sink": torch.zeros(1, 4), "sink_layout": "ssh"}, ValueError, "'ssh' must have shape"),
        ({"sink": torch.zeros(1, 4), "q": torch.zeros(8)}, ValueError, r"q must have shape.*\[8\]"),
        ({"k": torch.zeros(9, 2, 8)}, ValueError, "shapes must be"),
    ],
)
def test_errors_say_what_is_wrong(changes, error, message):
    arguments = {
        "q": torch.zeros(8, 4, 16),
        "k": torch.zeros(9, 2, 16),
        "v": torch.zeros(9, 2, 16),
        "index_attn_indices": LISTS,
    }
    caching, _ = create_selective_checkpoint_contexts([])
    for around in (nullcontext(), caching):
        with around, pytest.raises(error, match=message):
            flex_flash_attn_func(**{**arguments, **changes})
