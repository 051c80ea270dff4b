# SPDX-License-Identifier: Apache-2.0
"""Distributed attention against the float64 oracle: every mask family, shard, overlap degree and precision."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magi_attention.api import calc_attn, magi_attn_flex_key
from magi_attention.common import AttnRanges
from magi_attention.common.enum import AttnOverlapMode
from magi_attention.common.slices import SliceTable
from magi_attention.config import (
    BSDispatchAlg,
    DispatchConfig,
    DistAttnConfig,
    MinHeapDispatchAlg,
    OverlapConfig,
    RuntimeConfig,
    SequentialDispatchAlg,
    ToppHeapDispatchAlg,
    UniformOverlapAlg,
)
from magi_attention.testing.distributed import RankPool
from magi_attention.testing.masks import MASK_FAMILIES, random_masks
from tests.distributed.attention_case import Answer, Case, assert_right, attend, attend_twice, dense_answer

NUM_CPU_RANKS = 8
DEGREES = [0, 1, 2, 4, None]


@pytest.fixture(scope="module", params=["gloo", "nccl"])
def pool(request):
    """Eight processes on the CPU; or one for each GPU, which then stands for all larger groups."""
    num_ranks = NUM_CPU_RANKS if request.param == "gloo" else min(torch.cuda.device_count(), NUM_CPU_RANKS)
    if num_ranks < 2:
        pytest.skip(f"NCCL between ranks needs 2 GPUs, this machine has {num_ranks}")
    with RankPool(num_ranks, request.param) as pool:
        yield pool


def answer_of(pool: RankPool, case: Case) -> Answer:
    return pool.run(attend_twice, replace(case, cp=min(case.cp, pool.world_size)))[0]


def config_of(
    degree=1, uneven=False, high_precision=False, chunk_size=None, algorithm=MinHeapDispatchAlg(), **runtime
) -> DistAttnConfig:
    mode = AttnOverlapMode.DYNAMIC if degree is None else AttnOverlapMode.STATIC
    return DistAttnConfig(
        dispatch_config=DispatchConfig(chunk_size=chunk_size, uneven_shard=uneven, alg=algorithm),
        overlap_config=OverlapConfig(mode=mode, degree=degree, min_chunk_size=4, comm_cost_factor=20.0),
        runtime_config=RuntimeConfig(
            forward_high_precision_reduce=high_precision,
            backward_high_precision_reduce=high_precision,
            sink_grad_reduce="sum",
            **runtime,
        ),
    )


@st.composite
def cases(draw) -> Case:
    """Any mask over 1, 2, 3, 4 or 8 ranks."""
    total, slices = draw(random_masks(120))
    uneven = draw(st.booleans())
    usable = [MinHeapDispatchAlg(), SequentialDispatchAlg(), BSDispatchAlg()]
    return Case(
        total=total,
        slices=slices,
        cp=draw(st.sampled_from([cp for cp in (1, 2, 3, 4, 8) if cp <= total])),
        config=config_of(
            degree=draw(st.sampled_from(DEGREES)),
            uneven=uneven,
            high_precision=draw(st.booleans()),
            chunk_size=draw(st.one_of(st.none(), st.integers(1, 16))),
            algorithm=draw(st.sampled_from(usable if uneven else [*usable, ToppHeapDispatchAlg(top_p=0.5)])),
        ),
        num_heads_q=4,
        num_heads_kv=draw(st.sampled_from([1, 2, 4])),
        head_dim_v=draw(st.sampled_from([8, 16])),
        num_sinks=draw(st.integers(0, 2)),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        softmax_scale=draw(st.sampled_from([None, 0.7])),
        seed=draw(st.integers(0, 2**16)),
    )


def has_pairs(slices: SliceTable) -> bool:
    return bool(((slices.rows[:, 1] > slices.rows[:, 0]) & (slices.rows[:, 3] > slices.rows[:, 2])).any())


@given(cases().filter(lambda case: has_pairs(case.slices)))
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_random_cases_in_float64(pool, case):
    assert_right(case, answer_of(pool, case))


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_every_size_shard_and_degree(pool, cp, uneven, degree):
    rng = np.random.default_rng(cp)
    slices = MASK_FAMILIES["random_tiling"](157, rng)
    case = Case(157, slices, cp, config=config_of(degree, uneven), num_sinks=1)
    assert_right(case, answer_of(pool, case))


@pytest.mark.parametrize("high_precision", [False, True], ids=["own-precision", "high-precision"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", sorted(MASK_FAMILIES))
def test_every_family_in_low_precision(pool, family, dtype, high_precision):
    slices = MASK_FAMILIES[family](192, np.random.default_rng(7))
    config = config_of(degree=2, high_precision=high_precision)
    case = Case(192, slices, 4, config=config, dtype=dtype, head_dim=32, head_dim_v=32, num_sinks=4)
    assert_right(case, answer_of(pool, case))


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("mesh_shape", [(2, 2), (2, 4), (4, 2), (1, 2), (2, 1)])
def test_two_hops_over_a_mesh(pool, mesh_shape, degree):
    if pool.world_size % (mesh_shape[0] * mesh_shape[1]):
        pytest.skip(f"a mesh of {mesh_shape} does not fit {pool.world_size} GPUs")
    slices = MASK_FAMILIES["random_tiling"](157, np.random.default_rng(3))
    config = config_of(degree, hierarchical_comm=True)
    case = Case(157, slices, mesh_shape[0] * mesh_shape[1], config=config, mesh_shape=mesh_shape, num_sinks=1)
    assert_right(case, answer_of(pool, case))


def test_a_mesh_without_two_hops_is_its_flat_group(pool):
    mesh_shape = (2, pool.world_size // 2)
    case = Case(96, SliceTable([[0, 96, 0, 96, 1]]), pool.world_size, config=config_of(), mesh_shape=mesh_shape)
    assert_right(case, answer_of(pool, case))


@given(cases().filter(lambda case: has_pairs(case.slices)), st.sampled_from([1, 2, 4]))
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_queries_travel_where_that_is_cheaper(pool, case, num_heads_kv):
    config = replace(
        case.config,
        overlap_config=OverlapConfig(degree=1),
        runtime_config=replace(case.config.runtime_config, qo_comm=True),
    )
    case = replace(case, config=config, num_heads_q=4, num_heads_kv=num_heads_kv)
    assert_right(case, answer_of(pool, case))


@pytest.mark.parametrize("high_precision", [False, True], ids=["own-precision", "high-precision"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traveling_queries_in_low_precision(pool, dtype, high_precision):
    # The last rank's queries are few and read everything; with as many key heads as query heads they travel.
    slices = SliceTable([[0, 128, 0, 128, 1], [180, 192, 0, 192, 0]])
    config = config_of(degree=1, high_precision=high_precision, qo_comm=True)
    case = Case(192, slices, 4, config=config, dtype=dtype, num_heads_kv=4, head_dim=32, head_dim_v=32, num_sinks=4)
    assert_right(case, answer_of(pool, case))


def max_logits_below_zero(rank: int, world_size: int) -> None:
    """One chunk has pairs, so that all ranks but one compute nothing."""
    chunk, total = AttnRanges.from_ranges([(0, 4)]), 4 * world_size
    config = config_of(chunk_size=4)
    key = magi_attn_flex_key(chunk, chunk, ["full"], total, total, 2, 2, 8, 0, None, dist_attn_config=config)
    q = torch.ones(4, 2, 8, dtype=torch.float64)
    _, meta = calc_attn(q, -q, q, key, softmax_scale=0.5, return_max_logits=True)
    assert meta.max_logits.tolist() == [-4.0, -4.0]


@pytest.mark.parametrize("pool", ["gloo"], indirect=True)
def test_ranks_without_pairs_have_no_part_in_max_logits(pool):
    pool.run(max_logits_below_zero)


def test_random_stage_ends(pool):
    config = DistAttnConfig(
        overlap_config=OverlapConfig(
            degree=4, min_chunk_size=1, alg=UniformOverlapAlg(random_costs=True, random_seed=5)
        ),
        runtime_config=RuntimeConfig(sink_grad_reduce="sum"),
    )
    case = Case(96, SliceTable([[0, 96, 0, 96, 1]]), 4, config=config)
    assert_right(case, answer_of(pool, case))


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
def test_compute_precision_may_differ_from_the_inputs(pool, precision):
    case = Case(
        96,
        SliceTable([[0, 96, 0, 96, 1]]),
        2,
        config=config_of(precision=precision),
        dtype=torch.float32,
    )
    answer = answer_of(pool, case)
    assert answer.out.dtype == torch.float32
    error = (answer.out.double() - dense_answer(case, torch.float64).out).abs().max().item()
    assert error < {"bf16": 3e-2, "fp32": 2e-6, "fp64": 2e-7}[precision]
    assert (error > 1e-4) == (precision == "bf16")


@given(cases().filter(lambda case: case.cp == 1 and has_pairs(case.slices)))
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_one_process_needs_no_group(case):
    assert_right(case, attend(case, None))
