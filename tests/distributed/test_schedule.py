# SPDX-License-Identifier: Apache-2.0
"""All arrangements of a rank's kernels give the same attention, with and without rows kept for the backward pass."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from magi_attention.comm.alltoall import AllToAllCollectives
from magi_attention.config import DistAttnConfig, OverlapConfig, RuntimeConfig
from magi_attention.kernels.merge import merge_into
from magi_attention.kernels.reference import ReferenceBackend
from magi_attention.runtime import early, manager
from magi_attention.runtime.cache import dist_attn_runtime_dict_mgr
from magi_attention.testing.distributed import RankPool
from magi_attention.testing.masks import MASK_FAMILIES
from tests.core.test_schedule import COSTS, in_both_passes
from tests.distributed.attention_case import Answer, Case, assert_right, attend, group_of

BACKENDS = ["gloo", pytest.param("nccl", marks=pytest.mark.gpu(2))]


@pytest.fixture(scope="module", params=BACKENDS)
def pool(request):
    size = 4 if request.param == "gloo" else min(torch.cuda.device_count(), 4)
    with RankPool(size, request.param) as pool:
        yield pool


def reduce_at_once(self, *arguments, _reduce=AllToAllCollectives.reduce, **options):
    work = _reduce(self, *arguments, **options)
    work.wait()
    return work


def attend_arranged(
    rank: int, world_size: int, case: Case, name: str, both: bool, eager: bool = False
) -> Answer | None:
    """Run the case twice, on every rank as ``name`` says, or on odd ranks as by default."""
    dist_attn_runtime_dict_mgr.clear()
    with pytest.MonkeyPatch.context() as patch:
        if both or rank % 2 == 0:
            patch.setattr(manager, "_costs", lambda *_: in_both_passes(replace(COSTS[name], window=8)))
            patch.setattr(early, "LEAST_EARLY_ROWS", 8)
            patch.setattr(early, "LEAST_EARLY_SHARE", 1000)
        if eager:
            # On GPUs gradients come home while kernels run; on CPUs they would only at the end.
            patch.setattr(AllToAllCollectives, "reduce", reduce_at_once)
        try:
            answers = [attend(case, group_of(case) if case.mesh_shape else dist.group.WORLD) for _ in range(2)]
            (key,) = dist_attn_runtime_dict_mgr.keys()
            (job,) = dist_attn_runtime_dict_mgr[key].dist_attn_runtime.jobs
            assert job.keeps_received == bool(case.config.runtime_config.keep_received)
        finally:
            dist_attn_runtime_dict_mgr.clear()
    for tensor_name, tensor in answers[0].tensors().items():
        assert torch.equal(tensor, answers[1].tensors()[tensor_name]), f"{tensor_name} changed on a second run"
    return answers[0] if rank == 0 else None


def case_of(pool: RankPool, family: str, degree: int, **options) -> Case:
    if pool.backend == "nccl":
        # Arrangements and streams are what counts here: other kernels may compile for longer than all cases run.
        options = {"kernel_backend": "reference"} | options
    config = DistAttnConfig(
        overlap_config=OverlapConfig(degree=degree, min_chunk_size=16),
        # Kernels for GPUs may else add up in any order.
        runtime_config=RuntimeConfig(sink_grad_reduce="sum", deterministic=True, **options),
    )
    total = 64 * pool.world_size
    slices = MASK_FAMILIES[family](total, np.random.default_rng(5))
    # Many query heads to a key head, so that received rows take little memory.
    heads = {"num_heads_q": 32, "num_heads_kv": 1} if options.get("keep_received") else {}
    case = Case(total, slices, pool.world_size, config=config, num_sinks=1, **heads)
    if pool.backend == "nccl":
        case = replace(case, dtype=torch.bfloat16, head_dim=64, head_dim_v=64, max_logits=False)
    return case


@pytest.mark.parametrize("keep", [False, True], ids=["exchanged again", "kept"])
@pytest.mark.parametrize("degree", [0, 1, 2])
@pytest.mark.parametrize("name", sorted(COSTS))
@pytest.mark.parametrize("family", ["causal", "varlen_causal", "random_tiling"])
def test_arrangements(pool, family, name, degree, keep):
    case = case_of(pool, family, degree, keep_received=keep)
    assert_right(case, pool.run(attend_arranged, case, name, True)[0])


@pytest.mark.parametrize("keep", [False, True], ids=["exchanged again", "kept"])
@pytest.mark.parametrize("name", sorted(COSTS))
def test_gradients_may_come_home_at_any_time(pool, name, keep):
    for degree in (1, 2):
        case = case_of(pool, "varlen_causal", degree, keep_received=keep)
        assert_right(case, pool.run(attend_arranged, case, name, True, True)[0])


@pytest.mark.parametrize("name", sorted(COSTS))
def test_ranks_may_arrange_differently(pool, name):
    case = case_of(pool, "varlen_causal", 1, keep_received=True, kernel_backend="auto")
    assert_right(case, pool.run(attend_arranged, case, name, False)[0])


@pytest.mark.parametrize("name", sorted(COSTS))
def test_arrangements_where_queries_travel(pool, name):
    case = case_of(pool, "random_tiling", 1, qo_comm=True, keep_received=False)
    assert_right(case, pool.run(attend_arranged, case, name, True)[0])


@pytest.mark.parametrize("name", sorted(COSTS))
def test_arrangements_in_two_hops(pool, name):
    if pool.world_size % 4:
        pytest.skip(f"a mesh of 2 by 2 does not fit {pool.world_size} GPUs")
    case = replace(case_of(pool, "random_tiling", 1, hierarchical_comm=True, keep_received=False), mesh_shape=(2, 2))
    assert_right(case, pool.run(attend_arranged, case, name, True)[0])


@pytest.mark.parametrize("name", sorted(COSTS))
def test_low_precision_and_high_precision_reduce(pool, name):
    for high_precision in (False, True):
        case = case_of(pool, "varlen_causal", 1, backward_high_precision_reduce=high_precision, keep_received=False)
        case = replace(case, dtype=torch.bfloat16, head_dim=32, head_dim_v=32, num_sinks=4)
        assert_right(case, pool.run(attend_arranged, case, name, True)[0])


def attend_merging(rank: int, world_size: int, case: Case) -> tuple[Answer, int]:
    """Run the case with a backend that merges its results where they are written, and count how often it does."""
    merged = []

    def forward_onto(self, out, lse, q, k, v, call):
        result = self.forward(q, k, v, call)
        merge_into(out, lse, result.out, result.lse)
        merged.append(len(q))
        return result.max_logits

    dist_attn_runtime_dict_mgr.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceBackend, "forward_onto", forward_onto, raising=False)
        try:
            return attend(case, dist.group.WORLD), len(merged)
        finally:
            dist_attn_runtime_dict_mgr.clear()


@pytest.mark.parametrize("family", ["causal", "random_tiling"])
def test_kernels_that_merge(pool, family):
    case = case_of(pool, family, 2, keep_received=False)
    case = replace(case, max_logits=pool.backend == "gloo")
    answers = pool.run(attend_merging, case)
    assert_right(case, answers[0][0])
    assert any(merged for _, merged in answers)
