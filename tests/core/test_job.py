# SPDX-License-Identifier: Apache-2.0
"""What is resolved once for a distributed attention's shapes, before anything is launched."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from magi_attention.api import DispatchConfig, DistAttnConfig, clear_cache, magi_attn_varlen_key
from magi_attention.comm import AllToAllCollectives
from magi_attention.common.enum import AttnRole
from magi_attention.config import OverlapConfig, RuntimeConfig
from magi_attention.runtime.cache import find_manager
from magi_attention.runtime.launches import wants_room

TOTAL = 4096


@pytest.fixture(params=[1, 2])
def num_ranks(request):
    """This process alone, or as rank 0 of a group that sends nothing."""
    if request.param > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    clear_cache()
    if request.param > 1:
        dist.destroy_process_group()


def margins(num_ranks: int, **options: object) -> dict[str, list[int]]:
    """What the kernels of each pass leave to communication, in their order."""
    config = DistAttnConfig(
        dispatch_config=DispatchConfig(chunk_size=256),
        overlap_config=OverlapConfig(degree=2, min_chunk_size=256),
        runtime_config=RuntimeConfig(kernel_backend="reference", check_plan=False, **options),
    )
    group = dist.group.WORLD if num_ranks > 1 else None
    ends = [0, TOTAL]
    key = magi_attn_varlen_key(ends, ends, 8, 8, 64, 0, group, causal=True, dist_attn_config=config)
    manager = find_manager(key)
    q, k, v = (torch.empty(manager.num_local_rows(AttnRole.QUERY), 8, 64) for _ in range(3))
    job = manager.dist_attn_runtime.job_for(q, k, v, None, 0.0, False)
    return {
        name: [launch.call.sm_margin for step in of.steps for launch in step.launches]
        for name, of in (("forward", job.forward), ("backward", job.backward))
    }


def test_kernels_leave_multiprocessors_only_to_rows_that_travel_beside_them(num_ranks):
    found = margins(num_ranks)
    if num_ranks == 1:
        assert not any(found["forward"] + found["backward"])
        return
    assert len(found["forward"]) > 1
    assert found["forward"][0] == 4
    assert found["forward"][-1] == 0
    assert found["backward"][0] == 4


def test_none_are_left_to_a_transport_that_takes_none(num_ranks, monkeypatch):
    monkeypatch.setattr(AllToAllCollectives, "needs_multiprocessors", False)
    found = margins(num_ranks)
    assert not any(found["forward"] + found["backward"])


def test_a_margin_that_was_chosen_holds_for_all_kernels(num_ranks, monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_FFA_BACKWARD_SM_MARGIN", "7")
    found = margins(num_ranks, forward_sm_margin=5)
    assert set(found["forward"]) == {5}
    assert set(found["backward"]) == {7}


def test_rows_travel_ahead_of_their_step_and_gradients_behind():
    own = SimpleNamespace(exchange=None, queries_travel=False)
    visitors = SimpleNamespace(exchange=1, queries_travel=True, own_places=None)
    apart = SimpleNamespace(exchange=1, queries_travel=False, own_places=None)
    late = SimpleNamespace(exchange=1, queries_travel=False, own_places=())

    def beside(steps, *, is_forward=True, fetches=True):
        of = SimpleNamespace(steps=steps)
        return [wants_room(of, number, is_forward, fetches) for number in range(len(steps))]

    assert beside([own]) == [False]
    assert beside([own, apart]) == [True, False]
    assert beside([own, late]) == [False, False], "the first exchange is under way before"
    assert beside([own, late, apart]) == [True, True, False]
    assert beside([late, own], is_forward=False) == [False, True]
    assert beside([own, late, own], is_forward=False) == [False, False, True]
    assert beside([own, apart, own], is_forward=False) == [True, False, True]
    assert beside([late, own], is_forward=False, fetches=False) == [False, True]
    assert beside([own, visitors, late]) == [True, True, True]
