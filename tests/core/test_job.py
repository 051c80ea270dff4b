# SPDX-License-Identifier: Apache-2.0
"""What is resolved once for a distributed attention's shapes, before anything is launched."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from magi_attention.api import DispatchConfig, DistAttnConfig, clear_cache, magi_attn_varlen_key
from magi_attention.api.attention_checks import check_attention_call
from magi_attention.comm import AllToAllCollectives
from magi_attention.common.enum import AttnRole
from magi_attention.common.slices import SliceTable
from magi_attention.config import OverlapConfig, RuntimeConfig
from magi_attention.kernels.protocol import Support
from magi_attention.kernels.reference import BACKEND as REFERENCE
from magi_attention.plan.build import build_plans
from magi_attention.plan.layout import Layout
from magi_attention.plan.stages import StageOptions
from magi_attention.runtime.cache import find_manager
from magi_attention.runtime.job import MOST_JOBS, AttentionJob
from magi_attention.runtime.job import _takes_little as takes_little
from magi_attention.runtime.launches import LaunchPass, wants_room
from magi_attention.runtime.manager import DistAttnRuntimeMgr

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


def make_manager(num_ranks: int, **options: object) -> DistAttnRuntimeMgr:
    """Of a causal mask."""
    config = DistAttnConfig(
        dispatch_config=DispatchConfig(chunk_size=256),
        overlap_config=OverlapConfig(degree=2, min_chunk_size=256),
        runtime_config=RuntimeConfig(kernel_backend="reference", check_plan=False, **options),
    )
    group = dist.group.WORLD if num_ranks > 1 else None
    ends = [0, TOTAL]
    key = magi_attn_varlen_key(ends, ends, 8, 8, 64, 0, group, causal=True, dist_attn_config=config)
    return find_manager(key)


def margins(num_ranks: int, **options: object) -> dict[str, list[int]]:
    """What the kernels of each pass leave to communication, in their order."""
    manager = make_manager(num_ranks, **options)
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


def test_scores_that_change_from_step_to_step_leave_nothing_behind(num_ranks):
    manager = make_manager(num_ranks)
    runtime, tensors = manager.dist_attn_runtime, [torch.empty(manager.num_local_rows(AttnRole.QUERY), 8, 64)] * 3
    check_attention_call(*tensors, manager, None, None, 0.0, False)
    num_checked = len(manager.checked_calls)
    first = runtime.job_for(*tensors, None, 0.0, False)
    assert runtime.job_for(*tensors, None, 0.0, False) is first
    for step in range(2 * MOST_JOBS):
        scale = 0.1 + step / 1000
        check_attention_call(*tensors, manager, None, scale, 0.0, False)
        job = runtime.job_for(*tensors, scale, 0.0, False)
        assert len(runtime.jobs) <= MOST_JOBS
    assert len(manager.checked_calls) == num_checked
    for before, after in zip(passes_of(first), passes_of(job), strict=True):
        for one, other in zip(before.steps, after.steps, strict=True):
            assert other.own_places is one.own_places
            for launch, scored in zip(one.launches, other.launches, strict=True):
                assert (launch.call.softmax_scale, scored.call.softmax_scale) == (0.125, scale)
                assert scored == launch._replace(call=replace(launch.call, softmax_scale=scale))


def test_calls_with_and_without_a_softcap_have_jobs_of_their_own(num_ranks):
    manager = make_manager(num_ranks)
    runtime, tensors = manager.dist_attn_runtime, [torch.empty(manager.num_local_rows(AttnRole.QUERY), 8, 64)] * 3
    plain, capped, other = (runtime.job_for(*tensors, 0.5, softcap, False) for softcap in (0.0, 15.0, 30.0))
    for job, softcap in ((plain, 0.0), (capped, 15.0), (other, 30.0)):
        scores = {
            (launch.call.softmax_scale, launch.call.softcap)
            for of in passes_of(job)
            for step in of.steps
            for launch in step.launches
        }
        assert scores == {(0.5, softcap)}


def test_a_backend_without_softcap_is_not_taken_because_it_served_a_call_without(num_ranks, monkeypatch):
    manager = make_manager(num_ranks)
    runtime, tensors = manager.dist_attn_runtime, [torch.empty(manager.num_local_rows(AttnRole.QUERY), 8, 64)] * 3
    monkeypatch.setattr(
        type(REFERENCE), "supports", lambda self, request: Support(not request.softcap, "it has no softcap")
    )
    runtime.job_for(*tensors, 0.5, 0.0, False)
    with pytest.raises(RuntimeError, match="it has no softcap"):
        runtime.job_for(*tensors, 0.5, 15.0, False)


def test_all_ranks_keep_what_they_receive_or_none_does():
    """Else one would exchange in the backward pass what the others keep, and wait for them."""
    slices = SliceTable([[0, 64, 0, 64, 1]])
    layout = Layout(64, 64, 16, 3, np.array([0, 1, 0, 2]))  # the ranks differ in own rows and in received ones
    plans = build_plans(slices, layout, range(3), StageOptions(min_piece=4))
    answers = [{takes_little(plan, 1, query_row) for plan in plans} for query_row in range(1, 32)]
    assert all(len(each) == 1 for each in answers)
    assert {True} in answers
    assert {False} in answers


def test_every_kind_of_number_becomes_a_float(num_ranks):
    manager = make_manager(num_ranks)
    runtime, tensors = manager.dist_attn_runtime, [torch.empty(manager.num_local_rows(AttnRole.QUERY), 8, 64)] * 3
    for number in (1, np.float32(0.5)):
        job = runtime.job_for(*tensors, number, number, False)
        call = job.forward.steps[0].launches[0].call
        assert type(call.softmax_scale) is type(call.softcap) is float
        assert call.softmax_scale == call.softcap == float(number)


def passes_of(job: AttentionJob) -> tuple[LaunchPass, ...]:
    return job.forward, job.backward, job.backward_with_rows


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
