# SPDX-License-Identifier: Apache-2.0
"""What moves rows between global and local order, against plain torch, over several ranks."""

import pytest
import torch

from magi_attention.api import (
    AttnRanges,
    dispatch,
    get_position_ids,
    make_flex_key_for_new_mask_after_dispatch,
    roll,
    roll_simple,
    undispatch,
)
from magi_attention.testing.distributed import RankPool
from tests.distributed.small_keys import SHARDS, WORLD_SIZE, causal_key, draw, gathered


@pytest.fixture(scope="module")
def pool():
    with RankPool(WORLD_SIZE) as pool:
        yield pool


def check_dispatch(rank, world_size, total, chunk_size, uneven):
    key = causal_key(total, chunk_size, uneven)
    rows = dispatch(torch.arange(total), key, pad_value=-100)
    held = gathered(rows)
    real = torch.cat(held)
    assert sorted(real[real >= 0].tolist()) == list(range(total))
    assert int((real == -100).sum()) == key.pad_size
    assert all(each.tolist() == [*each[each >= 0].sort()[0].tolist(), *[-100] * int((each < 0).sum())] for each in held)
    assert uneven or len({len(each) for each in held}) == 1

    x = draw(total, 3, 2).requires_grad_()
    local = dispatch(x, key, pad_value=5.0)
    assert torch.equal(local[rows >= 0], x[rows[rows >= 0]])
    assert (local[rows < 0] == 5).all()
    assert local.is_contiguous()
    whole = undispatch(local, key)
    assert torch.equal(whole, x)
    for dtype in (torch.bool, torch.int16, torch.uint16, torch.float8_e4m3fn):
        assert torch.equal(undispatch(dispatch(x.to(dtype), key), key).double(), x.to(dtype).double())
    assert torch.equal(dispatch(whole, key, pad_value=5.0), local)
    rotations = torch.polar(torch.ones(total), torch.arange(float(total)))
    conjugated = rotations.conj()  # which PyTorch only notes
    assert torch.equal(undispatch(dispatch(rotations, key).conj(), key), conjugated)
    assert torch.equal(undispatch(dispatch(conjugated, key), key), conjugated)

    # Each rank's own local gradient: every rank gets them all, at their rows, with nothing summed.
    weight = draw(*local.shape, seed=1 + rank)
    gradient = torch.autograd.grad((local * weight).sum(), x)[0]
    expected = torch.zeros_like(x)
    for each, part in zip(held, gathered(weight), strict=True):
        expected[each[each >= 0]] = part[each >= 0]
    assert torch.equal(gradient, expected)
    assert torch.equal(torch.autograd.grad(undispatch(dispatch(x, key), key).sum(), x)[0], torch.ones_like(x))


@pytest.mark.parametrize("shard", SHARDS)
def test_dispatch_and_its_gradient(pool, shard):
    pool.run(check_dispatch, *SHARDS[shard])


def check_undispatch_gradients(rank, world_size, total, chunk_size, uneven):
    key = causal_key(total, chunk_size, uneven)
    rows = dispatch(torch.arange(total), key, pad_value=-1)
    local = draw(len(rows), 2, seed=rank).requires_grad_()
    weight = draw(total, 2, seed=10 + rank)  # another gradient on each rank
    own = torch.autograd.grad((undispatch(local, key) * weight).sum(), local)[0]
    total_weight = sum(gathered(weight))
    summed = torch.autograd.grad((undispatch(local, key, is_partial_grad=True) * weight).sum(), local)[0]
    for gradient, expected in ((own, weight), (summed, total_weight)):
        torch.testing.assert_close(gradient[rows >= 0], expected[rows[rows >= 0]])
        assert (gradient[rows < 0] == 0).all()


@pytest.mark.parametrize("shard", SHARDS)
def test_gradients_of_undispatch(pool, shard):
    pool.run(check_undispatch_gradients, *SHARDS[shard])


def check_roll(rank, world_size, total, chunk_size, uneven):
    key = causal_key(total, chunk_size, uneven)
    x = draw(total, 3).requires_grad_()
    weight = draw(len(get_position_ids(key)), 3, seed=rank)
    for shift in (0, 1, -1, 13, total // 2, total - 1, total, 5 * total + 2, -3 * total - 3):
        expected = dispatch(torch.roll(undispatch(dispatch(x, key), key), shift, 0), key)
        wanted = torch.autograd.grad((expected * weight).sum(), x)[0]
        for function, dim in ((roll, 0), (roll_simple, 0), (roll, 1)):
            local = dispatch(x, key)
            rolled = function(local, shift, 0, key) if dim == 0 else function(local.T, shift, 1, key).T
            assert torch.equal(rolled, expected), shift
            assert torch.equal(torch.autograd.grad((rolled * weight).sum(), x)[0], wanted), shift


@pytest.mark.parametrize("shard", SHARDS)
def test_roll_is_torch_roll_of_the_whole(pool, shard):
    pool.run(check_roll, *SHARDS[shard])


def move_rows_under_autocast(rank, world_size, dtype):
    key = causal_key(101)
    x = draw(101, 8).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        local = dispatch(x, key)
        assert torch.equal(undispatch(local, key).float(), x.float())
        rolled = undispatch(roll(local, 3, 0, key), key, is_partial_grad=dtype is torch.float16)
        assert torch.equal(rolled.float(), x.float().roll(3, 0))
        if dtype is torch.float16:
            (gradient,) = torch.autograd.grad(rolled, x, torch.ones_like(rolled))
            assert torch.equal(gradient, torch.full_like(gradient, world_size))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_rows_of_dtypes_that_autocast_does_not_take_move_as_they_are(pool, dtype):
    pool.run(move_rows_under_autocast, dtype)


def check_position_ids(rank, world_size, total, chunk_size, uneven):
    key = causal_key(total, chunk_size, uneven)
    ids = get_position_ids(key)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, dispatch(torch.arange(total), key, pad_value=total - 1))
    assert get_position_ids(key) is ids
    other = make_flex_key_for_new_mask_after_dispatch(
        AttnRanges.from_ranges([(0, 2)]), AttnRanges.from_ranges([(0, 2)]), "full", key
    )
    assert torch.equal(get_position_ids(other), ids)


@pytest.mark.parametrize("shard", SHARDS)
def test_position_ids_are_dispatched_positions(pool, shard):
    pool.run(check_position_ids, *SHARDS[shard])


def roll_labels(rank, world_size):
    key = causal_key(100)
    assert key.pad_size
    labels = torch.arange(100, dtype=torch.float64)
    local = dispatch(labels, key, pad_value=-100).requires_grad_()
    weight = torch.arange(len(local), dtype=torch.float64) + 1000 * rank
    for shift in (-1, 0, 100, -200, 37):
        rolled = roll(local, shift, 0, key)
        assert torch.equal(rolled, dispatch(torch.roll(labels, shift), key, pad_value=-100))
        assert rolled.data_ptr() != local.data_ptr()
        (gradient,) = torch.autograd.grad((rolled * weight).sum(), local)
        assert torch.equal(gradient, roll(weight, -shift, 0, key))
        assert torch.equal(gradient[local == -100], weight[local == -100])


def test_padding_keeps_what_it_holds_in_a_roll(pool):
    pool.run(roll_labels)
