# SPDX-License-Identifier: Apache-2.0
"""Dry runs of one rank alone, by the backend "fake": shapes are right, and nobody waits for ranks that don't exist."""

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from magi_attention.api import (
    DistAttnConfig,
    OverlapConfig,
    calc_attn,
    dispatch,
    get_position_ids,
    magi_attn_varlen_key,
    make_varlen_key_for_new_mask_after_dispatch,
    roll,
    undispatch,
)
from magi_attention.config import RuntimeConfig
from magi_attention.testing.distributed import run_ranks


def run_dry(rank, world_size, degree, sanity_check):
    """A training step of rank 5 of 8."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    config = DistAttnConfig(
        overlap_config=OverlapConfig(degree=degree), runtime_config=RuntimeConfig(sanity_check=sanity_check)
    )
    cu_seqlens = [0, 30, 100]
    key = magi_attn_varlen_key(cu_seqlens, cu_seqlens, 4, 2, 8, 0, None, causal=True, dist_attn_config=config)
    window_key = make_varlen_key_for_new_mask_after_dispatch(cu_seqlens, cu_seqlens, key, window_size=(9, 0))
    x = torch.randn(100, 4, 8, requires_grad=True)
    local = dispatch(x, key)
    for each in (key, window_key):
        local, _ = calc_attn(local, local[:, :2], local[:, 2:], each)
    whole = undispatch(roll(local, 1, 0, key), key)
    whole.sum().backward()
    with pytest.raises(ValueError, match="never decrease"):
        magi_attn_varlen_key([0, 101, 100], [0, 101, 100], 4, 2, 8, 0, None)
    return len(local), len(get_position_ids(key)), key.total_seqlen_q, whole.shape, x.grad.shape


@pytest.mark.parametrize(("degree", "sanity_check"), [(1, False), ("auto", False), (2, True)])
def test_one_rank_of_a_fake_group_runs_alone(degree, sanity_check):
    ((num_local, num_positions, total, *shapes),) = run_ranks(1, run_dry, degree, sanity_check)
    assert num_local == num_positions == total // 8
    assert shapes == [(100, 4, 8), (100, 4, 8)]


def plan_and_send_nothing(rank, world_size):
    """A key of measured rates and a step of fake tensors, which only rank 0 takes; then all ranks send rows."""
    config = DistAttnConfig(overlap_config=OverlapConfig(degree="auto"))
    with FakeTensorMode():
        key = magi_attn_varlen_key([0, 30, 100], [0, 30, 100], 4, 2, 8, 0, None, causal=True, dist_attn_config=config)
        if rank == 0:
            x = torch.randn(100, 4, 8, requires_grad=True)
            local = dispatch(x, key)
            out, _ = calc_attn(local, local[:, :2], local[:, 2:], key)
            undispatch(roll(out, 1, 0, key), key).sum().backward()
            assert x.grad.shape == x.shape
    rows = torch.arange(100)
    return undispatch(roll(dispatch(rows, key), 1, 0, key), key).equal(rows.roll(1))


def test_fake_tensors_are_not_sent():
    assert run_ranks(2, plan_and_send_nothing, timeout_s=60) == [True, True]
