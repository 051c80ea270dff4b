# SPDX-License-Identifier: Apache-2.0
"""Fake tensors, by which memory is estimated: they have shapes, and leave nothing behind for tensors with values."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from magi_attention.api import (
    calc_attn,
    clear_cache,
    dispatch,
    flex_flash_attn_func,
    get_position_ids,
    magi_attn_varlen_key,
    roll,
    undispatch,
)

HEADS, KV_HEADS, DIM, TOTAL = 4, 2, 8, 47


def make_key():
    clear_cache()
    return magi_attn_varlen_key([0, 30, TOTAL], [0, 30, TOTAL], HEADS, KV_HEADS, DIM, 0, None, causal=True)


@pytest.fixture
def key():
    yield make_key()
    clear_cache()


def step(q, k, v, key):
    q, k, v = (dispatch(x, key) for x in (q, k, v))
    out, meta = calc_attn(q + get_position_ids(key)[:, None, None] / TOTAL, k, v, key, return_max_logits=True)
    return undispatch(roll(out, -3, 0, key), key, is_partial_grad=True), meta.lse, meta.max_logits


def draw(**options):
    return [torch.randn(TOTAL, heads, DIM, requires_grad=True, **options) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def gradients(inputs, out, lse, _):
    return torch.autograd.grad(out.square().sum() + lse.where(lse.isfinite(), 0.0).sum(), inputs)


def test_a_step_has_its_shapes_and_the_next_one_its_values(key):
    inputs = draw(dtype=torch.float64)
    results = step(*inputs, key)
    expected = *results, *gradients(inputs, *results)
    key = make_key()
    with FakeTensorMode():
        fakes = draw(dtype=torch.float64)
        results = step(*fakes, key)
        found = *results, *gradients(fakes, *results)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]
    results = step(*inputs, key)
    torch.testing.assert_close((*results, *gradients(inputs, *results)), expected, rtol=0, atol=0)
    assert type(get_position_ids(key)) is torch.Tensor


def test_position_ids_that_were_asked_for_before_are_fake_there(key):
    get_position_ids(key)
    with FakeTensorMode():
        assert (torch.randn(key.local_rows[0]) + get_position_ids(key)).shape == key.local_rows[:1]


def test_fake_tensors_outside_of_their_mode(key):
    with FakeTensorMode():
        inputs = draw()
        q, k, v = (dispatch(x, key) for x in inputs)
    out = undispatch(roll(calc_attn(q, k, v, key)[0], 1, 0, key), key)
    assert [x.shape for x in torch.autograd.grad(out.sum(), inputs)] == [x.shape for x in inputs]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_on_one_device(device):
    with FakeTensorMode():
        q, k, v = draw(device=device)
        ranges = torch.empty(2, 2, dtype=torch.int32, device=device)
        lists = torch.empty(TOTAL, KV_HEADS, 5, dtype=torch.int32, device=device)
        for mask in ({"q_ranges": ranges, "k_ranges": ranges}, {"index_attn_indices": lists}):
            out, meta = flex_flash_attn_func(q, k, v, **mask)
            assert meta.lse.shape == (TOTAL, HEADS)
            assert torch.autograd.grad(out.sum(), k)[0].shape == k.shape
        with pytest.raises(ValueError, match="index_attn_indices must have shape"):
            flex_flash_attn_func(q, k, v, index_attn_indices=lists[1:])


def test_lists_without_values():
    q, k, v = draw(device="meta")
    lists = torch.empty(TOTAL, KV_HEADS, 5, dtype=torch.int32, device="meta")
    out, _ = flex_flash_attn_func(q, k, v, index_attn_indices=lists)
    assert torch.autograd.grad(out.sum(), k)[0].shape == k.shape
