# SPDX-License-Identifier: Apache-2.0
"""``dispatch``, ``undispatch``, ``roll`` and position ids in one process, without torch.distributed: a group of one."""

import math
from contextlib import nullcontext

import pytest
import torch

from magi_attention.api import (
    AttnRanges,
    dispatch,
    get_position_ids,
    magi_attn_flex_key,
    roll,
    roll_simple,
    undispatch,
)
from tests.core.api_single import PADDED, TOTAL


def test_dispatch_pads_and_undispatch_drops_the_padding(key):
    x = torch.randn(TOTAL, 3, 2, dtype=torch.float64, requires_grad=True)
    local = dispatch(x, key, pad_value=7.0)
    assert local.shape == (PADDED, 3, 2)
    assert local.is_contiguous()
    assert (local[TOTAL:] == 7).all()
    assert torch.equal(undispatch(local, key), x)
    weight = torch.randn(TOTAL, 3, 2, dtype=torch.float64)
    (undispatch(local, key) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_labels_are_padded_with_integers(key):
    local = dispatch(torch.arange(TOTAL), key, pad_value=-100)
    assert local.tolist() == [*range(TOTAL), *[-100] * 6]


@pytest.mark.parametrize(
    ("dtype", "pad_value"),
    [
        (torch.uint8, -100),
        (torch.int64, 0.5),
        (torch.int64, math.inf),
        (torch.int32, math.nan),
        (torch.bool, 2),
        (torch.float16, 1e10),
    ],
)
def test_a_pad_value_that_the_dtype_does_not_have_is_refused(key, dtype, pad_value):
    with pytest.raises(ValueError, match=f"pad_value={pad_value} is no value of {dtype}"):
        dispatch(torch.zeros(TOTAL, dtype=dtype), key, pad_value=pad_value)


@pytest.mark.parametrize(("dtype", "pad_value"), [(torch.bool, True), (torch.int64, 2**53 + 1), (torch.uint8, 255.0)])
def test_integers_are_padded_with_all_that_they_have(key, dtype, pad_value):
    assert (dispatch(torch.zeros(TOTAL, dtype=dtype), key, pad_value=pad_value)[TOTAL:] == pad_value).all()


@pytest.mark.parametrize("rows", [TOTAL - 1, TOTAL + 1, PADDED])
def test_dispatch_checks_the_length(key, rows):
    with pytest.raises(ValueError, match=f"x has {rows} rows in dim 0, but the global sequence .* has {TOTAL}"):
        dispatch(torch.zeros(rows), key)


@pytest.mark.parametrize(
    "call", [undispatch, lambda x, key: roll(x, 1, 0, key), lambda x, key: roll_simple(x, 1, 0, key)]
)
def test_local_functions_check_the_length(key, call):
    with pytest.raises(ValueError, match=f"x has {TOTAL} rows in dim 0, but this rank's share has {PADDED}"):
        call(torch.zeros(TOTAL), key)


def test_tensors_without_that_dim_are_refused(key):
    with pytest.raises(ValueError, match="no dim 0"):
        dispatch(torch.tensor(1.0), key)
    with pytest.raises(ValueError, match="no dim 2"):
        roll(torch.zeros(PADDED, 2), 1, 2, key)
    with pytest.raises(TypeError, match="x must be a tensor, not list"):
        dispatch([1.0] * TOTAL, key)


@pytest.mark.parametrize("shift", [0, 1, -1, 7, 49, 50, 63, -120])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("function", [roll, roll_simple])
def test_roll_rolls_the_real_sequence(key, function, dim, shift):
    x = torch.randn(TOTAL, 3, dtype=torch.float64, requires_grad=True)
    local = dispatch(x, key, pad_value=7)
    rolled = function(local if dim == 0 else local.T, shift, dim, key)
    rolled = rolled if dim == 0 else rolled.T
    expected = torch.roll(x, shift, 0)
    assert torch.equal(rolled[:TOTAL], expected)
    assert torch.equal(rolled[TOTAL:], local[TOTAL:])
    weight = torch.randn(PADDED, 3, dtype=torch.float64)
    gradient = torch.autograd.grad((rolled * weight).sum(), x)[0]
    assert torch.equal(gradient, torch.autograd.grad((expected * weight[:TOTAL]).sum(), x)[0])


def test_a_shift_is_an_integer(key):
    with pytest.raises(TypeError, match=r"shift must be an integer, not 1\.5"):
        roll(torch.zeros(PADDED), 1.5, 0, key)


def test_nested_and_sparse_tensors_are_refused(key):
    nested = torch.nested.nested_tensor([torch.zeros(60, 3), torch.zeros(40, 3)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"x is a nested tensor; pass its packed rows, x.values\(\)"):
        dispatch(nested, key)
    with pytest.raises(TypeError, match=r"x has the layout torch.sparse_coo; pass x.to_dense\(\)"):
        dispatch(torch.eye(TOTAL).to_sparse(), key)


def test_position_ids(key):
    ids = get_position_ids(key)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [*range(TOTAL), *[TOTAL - 1] * 6]
    assert get_position_ids(key) is ids


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_position_ids_that_somebody_changed_are_made_again(key, mode):
    expected = get_position_ids(key).clone()
    for _ in range(2):
        with mode():
            ids = get_position_ids(key)
            ids -= 50  # where the document starts
        assert torch.equal(ids, expected - 50)
    assert torch.equal(get_position_ids(key), expected)


def test_real_rows_without_slices_keep_their_position():
    ranges = AttnRanges.from_ranges([(0, 80)])
    key = magi_attn_flex_key(ranges, ranges, "causal", 100, 100, 4, 2, 8, 0, None)
    assert get_position_ids(key).tolist() == [*range(100), *[99] * 4]


@pytest.mark.parametrize(
    "call",
    [
        lambda role, key: dispatch(torch.zeros(TOTAL), key, attn_role=role),
        lambda role, key: undispatch(torch.zeros(PADDED), key, attn_role=role),
        lambda role, key: roll(torch.zeros(PADDED), 1, 0, key, attn_role=role),
        lambda role, key: get_position_ids(key, attn_role=role),
    ],
)
def test_a_role_is_an_attn_role(key, call):
    with pytest.raises(ValueError, match="attn_role must be an AttnRole, got 'key'"):
        call("key", key)
