# SPDX-License-Identifier: Apache-2.0
"""Queries and keys of two sequences, each with a layout of its own, against the float64 oracle."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magi_attention.api import (
    AttnRanges,
    calc_attn,
    dispatch,
    dist_attn_runtime_dict_mgr,
    get_position_ids,
    magi_attn_varlen_key,
    make_flex_key_for_new_mask_after_dispatch,
    make_varlen_key_for_new_mask_after_dispatch,
    roll,
    roll_simple,
    undispatch,
)
from magi_attention.common import AttnMaskType
from magi_attention.common.enum import AttnOverlapMode, AttnRole, AttnType
from magi_attention.common.slices import SliceTable
from magi_attention.config import (
    DispatchConfig,
    DistAttnConfig,
    LocalityDispatchAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
    RuntimeConfig,
)
from magi_attention.dist_attn_runtime_mgr import init_dist_attn_runtime_mgr
from magi_attention.testing.distributed import RankPool
from magi_attention.testing.masks import rectangular_masks
from magi_attention.testing.oracle import dense_attention
from tests.distributed.attention_case import (
    Answer,
    Case,
    assert_right,
    attend,
    attend_twice,
    device,
    group_of,
    inputs_of,
    key_of,
)

WORLD_SIZE = 4
PERMUTABLE = {"both": (True, True), "queries": (True, False), "keys": (False, True), "none": (False, False)}


@pytest.fixture(scope="module", params=["gloo", "nccl"])
def pool(request):
    """Four processes on the CPU; or one for each GPU, up to four, which then stands for all larger groups."""
    num_ranks = WORLD_SIZE if request.param == "gloo" else min(torch.cuda.device_count(), WORLD_SIZE)
    if num_ranks < 2:
        pytest.skip(f"NCCL between ranks needs 2 GPUs, this machine has {num_ranks}")
    with RankPool(num_ranks, request.param) as pool:
        yield pool


def answer_of(pool: RankPool, case: Case) -> Answer:
    return pool.run(attend_twice, replace(case, cp=min(case.cp, pool.world_size)))[0]


def skip_unless_fits(pool: RankPool, mesh_shape: tuple[int, int]) -> None:
    if pool.world_size % (mesh_shape[0] * mesh_shape[1]):
        pytest.skip(f"a mesh of {mesh_shape} does not fit {pool.world_size} GPUs")


def config_of(degree=1, uneven=False, chunk_size=None, algorithm=MinHeapDispatchAlg(), **runtime) -> DistAttnConfig:
    mode = AttnOverlapMode.DYNAMIC if degree is None else AttnOverlapMode.STATIC
    return DistAttnConfig(
        dispatch_config=DispatchConfig(chunk_size=chunk_size, uneven_shard=uneven, alg=algorithm),
        overlap_config=OverlapConfig(mode=mode, degree=degree, min_chunk_size=4, comm_cost_factor=20.0),
        runtime_config=RuntimeConfig(sink_grad_reduce="sum", **runtime),
    )


def tiling(num_queries: int, num_keys: int, seed: int = 0) -> SliceTable:
    """A grid of rectangles of random types, with a gap between the last ones."""
    rng = np.random.default_rng(seed)
    q_ends, k_ends = (
        [0, *np.sort(rng.choice(total - 1, 3, replace=False)) + 1, total] for total in (num_queries, num_keys)
    )
    rows = [[*q, *k, int(rng.integers(4))] for q in pairwise(q_ends) for k in pairwise(k_ends)]
    return SliceTable(np.array(rows)[[*range(10), 12, 13, 15]])


@st.composite
def cases(draw) -> Case:
    """Any mask of up to 100 queries and keys over 1, 2 or 4 ranks."""
    (total, total_k), slices = draw(rectangular_masks(100).filter(lambda mask: mask[1].area() > 0))
    is_q_permutable, is_k_permutable = draw(st.sampled_from(sorted(PERMUTABLE.values())))
    return Case(
        total,
        slices,
        cp=draw(st.sampled_from([cp for cp in (1, 2, 4) if cp <= min(total, total_k)])),
        config=config_of(
            degree=draw(st.sampled_from([0, 1, 2, None])),
            uneven=draw(st.booleans()),
            chunk_size=draw(st.one_of(st.none(), st.integers(1, 16))),
            algorithm=draw(st.sampled_from([MinHeapDispatchAlg(), LocalityDispatchAlg()])),
            backward_high_precision_reduce=draw(st.booleans()),
        ),
        num_heads_kv=draw(st.sampled_from([1, 2, 4])),
        head_dim_v=draw(st.sampled_from([8, 16])),
        num_sinks=draw(st.integers(0, 2)),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        seed=draw(st.integers(0, 2**16)),
        total_k=total_k,
        is_q_permutable=is_q_permutable,
        is_k_permutable=is_k_permutable,
    )


@given(cases())
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_random_cases_in_float64(pool, case):
    assert_right(case, answer_of(pool, case))


@given(cases().filter(lambda case: case.cp == 1))
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
def test_one_process_needs_no_group(case):
    assert_right(case, attend(case, None))


@pytest.mark.parametrize("degree", [0, 1, 2, None])
@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("permutable", PERMUTABLE)
def test_every_layout_shard_size_and_degree(pool, permutable, uneven, cp, degree):
    q, k = PERMUTABLE[permutable]
    config = config_of(degree, uneven)
    case = Case(
        83, tiling(83, 131, cp), cp, config=config, num_sinks=1, total_k=131, is_q_permutable=q, is_k_permutable=k
    )
    assert_right(case, answer_of(pool, case))


@given(cases(), st.sampled_from([1, 4]))
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
def test_queries_travel_where_that_is_cheaper(pool, case, num_heads_kv):
    config = replace(
        case.config,
        overlap_config=OverlapConfig(degree=1),
        runtime_config=replace(case.config.runtime_config, qo_comm=True),
    )
    case = replace(case, config=config, num_heads_kv=num_heads_kv)
    assert_right(case, answer_of(pool, case))


@pytest.mark.parametrize("degree", [0, 1, 2, None])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("mesh_shape", [(2, 2), (1, 2), (2, 1)])
def test_two_hops_over_a_mesh(pool, mesh_shape, uneven, degree):
    skip_unless_fits(pool, mesh_shape)
    config = config_of(degree, uneven, hierarchical_comm=True)
    case = Case(
        131,
        tiling(131, 83),
        mesh_shape[0] * mesh_shape[1],
        config=config,
        mesh_shape=mesh_shape,
        num_sinks=1,
        total_k=83,
    )
    assert_right(case, answer_of(pool, case))


@pytest.mark.parametrize("algorithm", [MinHeapDispatchAlg(), LocalityDispatchAlg()], ids=["heap", "locality"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("qo_comm", [False, True], ids=["keys-travel", "either-travels"])
def test_low_precision(pool, dtype, qo_comm, algorithm):
    config = config_of(1, algorithm=algorithm, qo_comm=qo_comm)
    case = Case(96, tiling(96, 200), 4, config=config, dtype=dtype, head_dim=32, head_dim_v=32, total_k=200)
    assert_right(case, answer_of(pool, case))


def test_many_keys_draw_few_queries(pool):
    """The queries of the last document are few and its keys many: with as many key heads as query heads they travel."""
    slices = SliceTable([[0, 128, 0, 64, 0], [128, 192, 64, 128, 1], [180, 192, 128, 640, 0]])
    config = config_of(1, qo_comm=True, forward_high_precision_reduce=True, backward_high_precision_reduce=True)
    case = Case(192, slices, 4, config=config, num_heads_kv=4, num_sinks=2, total_k=640)
    assert_right(case, answer_of(pool, case))


def check_key_side(rank: int, world_size: int, case: Case) -> None:
    """Dispatch, undispatch, roll and position ids of both sides, against plain torch on global tensors."""
    key = key_of(case, group_of(case))
    manager = dist_attn_runtime_dict_mgr[key]
    assert manager.dispatch_meta_k.attn_type is AttnType.CROSS_ATTN
    assert manager.dispatch_meta_k.total_seqlen == key.total_seqlen_k
    for role, total in ((AttnRole.QUERY, case.total), (AttnRole.KEY, case.num_keys), (AttnRole.VALUE, case.num_keys)):
        rows = dispatch(torch.arange(total), key, pad_value=-1, attn_role=role)
        parts: list[torch.Tensor] = [rows] * world_size
        dist.all_gather_object(parts, rows)
        held = torch.cat(parts)
        assert sorted(held[held >= 0].tolist()) == list(range(total))
        is_permutable = case.is_q_permutable if role is AttnRole.QUERY else case.is_k_permutable
        assert is_permutable or held[held >= 0].tolist() == list(range(total))
        if not key.uneven_shard:
            assert len({len(part) for part in parts}) == 1
            assert int((held < 0).sum()) == (key.pad_size if role is AttnRole.QUERY else key.pad_size_k)

        ids = get_position_ids(key, attn_role=role)
        assert torch.equal(ids.cpu(), torch.where(rows < 0, total - 1, rows))
        assert get_position_ids(key, attn_role=role) is ids
        x = torch.randn(total, 3, generator=torch.Generator().manual_seed(total)).to(device()).requires_grad_()
        local = dispatch(x, key, attn_role=role)
        assert torch.equal(undispatch(local, key, attn_role=role), x)
        assert torch.equal(torch.autograd.grad(undispatch(local, key, attn_role=role).sum(), x)[0], torch.ones_like(x))
        for function in (roll, roll_simple):
            for shift in (0, 1, -7, total + 2):
                expected = dispatch(torch.roll(x, shift, 0), key, attn_role=role)
                assert torch.equal(function(dispatch(x, key, attn_role=role), shift, 0, key, role), expected)


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("permutable", PERMUTABLE)
def test_each_side_has_its_own_rows(pool, permutable, uneven):
    q, k = PERMUTABLE[permutable]
    config = config_of(1, uneven, chunk_size=5)
    slices = tiling(83, 131)
    pool.run(
        check_key_side,
        Case(83, slices, pool.world_size, config=config, total_k=131, is_q_permutable=q, is_k_permutable=k),
    )


def on_device(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.to(device()) for x in tensors]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slices: SliceTable) -> torch.Tensor:
    return dense_attention(q.cpu(), k.cpu(), v.cpu(), slices)[0].to(q.device)


def attend_with_a_second_mask(rank: int, world_size: int, case: Case) -> None:
    first = key_of(case, group_of(case))
    ranges = [AttnRanges.from_ranges([(0, total)]) for total in (case.total, case.num_keys)]
    second = make_flex_key_for_new_mask_after_dispatch(*ranges, "causal", first)
    assert (second.pad_size_k, second.chunk_size_k) == (first.pad_size_k, first.chunk_size_k)
    old, new = dist_attn_runtime_dict_mgr[first], dist_attn_runtime_dict_mgr[second]
    assert (new.layout, new.key_layout) == (old.layout, old.key_layout)
    q, k, v = on_device(inputs_of(case)[0])
    keys = [dispatch(x, first, attn_role=AttnRole.KEY) for x in (k, v)]
    out, _ = calc_attn(dispatch(q, first), *keys, second)
    expected = dense(q, k, v, SliceTable([[0, case.total, 0, case.num_keys, 1]]))
    torch.testing.assert_close(undispatch(out, first), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_a_second_mask_keeps_both_layouts(pool, uneven):
    pool.run(
        attend_with_a_second_mask, Case(83, tiling(83, 131), pool.world_size, config=config_of(1, uneven), total_k=131)
    )


def attend_with_a_manager(rank: int, world_size: int) -> None:
    q_ranges, k_ranges = (AttnRanges.from_ranges(ends) for ends in ([(0, 40), (40, 96)], [(0, 30), (30, 48)]))
    mask = (q_ranges, k_ranges, [AttnMaskType.FULL, AttnMaskType.CAUSAL], 96, 48)
    arguments = (*mask, 4, 2, 8, 6, dist.group.WORLD)
    planned = init_dist_attn_runtime_mgr(*arguments, is_same_source=False)
    q, k, v = on_device(inputs_of(Case(96, SliceTable([]), total_k=48))[0])
    out, _ = planned.calc_attn(planned.dispatch_qo(q), planned.dispatch_kv(k), planned.dispatch_kv(v))
    expected = dense(q, k, v, planned.key.slices)
    torch.testing.assert_close(planned.undispatch_qo(out), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(planned.undispatch_kv(planned.dispatch_kv(k)), k)
    kept = init_dist_attn_runtime_mgr(
        *arguments, is_same_source=False, is_k_permutable=False, ref_dispatch_meta_k=planned.dispatch_meta_k
    )
    assert kept.dispatch_meta_k == planned.dispatch_meta_k
    with pytest.raises(ValueError, match=f"total_seqlen_k is 50; for an even shard over {world_size} ranks"):
        init_dist_attn_runtime_mgr(*mask[:4], 50, *arguments[5:], is_same_source=False)


def test_runtime_manager_without_padding_or_cache(pool):
    pool.run(attend_with_a_manager)


def attend_between_layers(rank: int, world_size: int) -> None:
    """A decoder and an encoder that attend to themselves, each by its own key, and the one to the other."""
    decoder, encoder = (
        magi_attn_varlen_key([0, half, total], [0, half, total], 4, 2, 8, 0, None, causal=causal)
        for total, half, causal in ((83, 40, True), (131, 50, False))
    )
    metas = [dist_attn_runtime_dict_mgr[key].dispatch_meta_q for key in (decoder, encoder)]
    q_ranges, k_ranges = (AttnRanges.from_ranges(ends) for ends in ([(0, 40), (40, 83)], [(0, 50), (50, 131)]))
    totals = [key.total_seqlen_q for key in (decoder, encoder)]
    arguments = (*totals, 4, 2, 8, decoder.chunk_size, dist.group.WORLD)
    manager = init_dist_attn_runtime_mgr(
        q_ranges,
        k_ranges,
        [AttnMaskType.FULL] * 2,
        *arguments,
        is_same_source=False,
        ref_dispatch_meta_q=metas[0],
        ref_dispatch_meta_k=metas[1],
    )
    q, k, v = on_device(inputs_of(Case(83, SliceTable([]), total_k=131))[0])
    out, _ = manager.calc_attn(dispatch(q, decoder), dispatch(k, encoder), dispatch(v, encoder))
    expected = dense(q, k, v, SliceTable([[0, 40, 0, 50, 0], [40, 83, 50, 131, 0]]))
    torch.testing.assert_close(undispatch(out, decoder), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="but the layout to keep is of"):
        init_dist_attn_runtime_mgr(
            q_ranges, k_ranges, [AttnMaskType.FULL] * 2, *arguments, is_same_source=False, ref_dispatch_meta_k=metas[0]
        )


def test_layouts_of_self_attention_can_be_kept(pool):
    pool.run(attend_between_layers)


def attend_between_keys(rank: int, world_size: int, config: DistAttnConfig) -> None:
    """Two layers that alternate between self- and cross-attention; nothing moves between them. With gradients."""
    decoder = magi_attn_varlen_key([0, 40, 83], [0, 40, 83], 4, 2, 8, 0, None, causal=True, dist_attn_config=config)
    encoder = magi_attn_varlen_key([0, 50, 131], [0, 50, 131], 4, 2, 8, 0, None, dist_attn_config=config)
    documents = ([0, 40, 83], [0, 50, 131])
    cross = make_varlen_key_for_new_mask_after_dispatch(*documents, decoder, key_for_kv_dispatch=encoder)
    back = make_varlen_key_for_new_mask_after_dispatch(*documents[::-1], encoder, key_for_kv_dispatch=decoder)
    assert cross != back
    generator = torch.Generator().manual_seed(1)
    text, memory = (torch.randn(n, 4, 8, generator=generator, dtype=torch.float64) for n in (83, 131))
    mask = SliceTable([[0, 40, 0, 50, 0], [40, 83, 50, 131, 0]])
    masks = (SliceTable([[0, 40, 0, 40, 1], [40, 83, 40, 83, 1]]), mask, SliceTable(mask.rows[:, [2, 3, 0, 1, 4]]))

    def layers(x, y, attends):
        own, to_memory, to_text = attends
        x = own(x, x[:, :2], x[:, 2:])
        x = x + to_memory(x, y[:, :2], y[:, 2:])
        return to_text(y, x[:, :2], x[:, 2:])

    given = [each.to(device()).requires_grad_() for each in (text, memory)]
    local = (dispatch(given[0], decoder), dispatch(given[1], encoder))
    attends = [lambda q, k, v, key=key: calc_attn(q, k, v, key)[0] for key in (decoder, cross, back)]
    out = undispatch(layers(*local, attends), encoder)
    out.square().sum().backward()
    plain = [each.requires_grad_() for each in (text, memory)]
    expected = layers(*plain, [lambda q, k, v, m=m: dense_attention(q, k, v, m)[0] for m in masks])
    expected.square().sum().backward()
    pairs = [(out, expected), *((one.grad, other.grad) for one, other in zip(given, plain, strict=True))]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("algorithm", [MinHeapDispatchAlg(), LocalityDispatchAlg()], ids=["heap", "locality"])
@pytest.mark.parametrize("degree", [1, None])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_keys_between_the_layouts_of_two_keys(pool, uneven, degree, algorithm):
    pool.run(attend_between_keys, config_of(degree, uneven, algorithm=algorithm))


def join_groups_that_differ(rank: int, world_size: int) -> None:
    alone = [dist.new_group([each]) for each in range(world_size)][rank]
    both = magi_attn_varlen_key([0, 8], [0, 8], 4, 2, 8, 0, None)
    mine = magi_attn_varlen_key([0, 8], [0, 8], 4, 2, 8, 0, alone)
    with pytest.raises(ValueError, match=r"key_for_kv_dispatch of \[\d\]; both must be made with the same group"):
        make_varlen_key_for_new_mask_after_dispatch([0, 8], [0, 8], both, key_for_kv_dispatch=mine)


def test_keys_of_different_groups_are_not_joined(pool):
    pool.run(join_groups_that_differ)


def refuse_few_keys(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=f"1 rows cannot be shared by {world_size} ranks"):
        key_of(Case(83, SliceTable([[0, 83, 0, 1, 0]]), world_size, total_k=1), dist.group.WORLD)


def test_fewer_keys_than_ranks_are_refused(pool):
    pool.run(refuse_few_keys)


def differ_in_a_flag(rank: int, world_size: int) -> str:
    documents = SliceTable([[n, n + 2, n, n + 2, 0] for n in range(0, 64, 2)])
    case = Case(64, documents, 4, config=config_of(), total_k=64, is_k_permutable=rank != 1)
    with pytest.raises(RuntimeError) as error:
        key_of(case, dist.group.WORLD)
    return str(error.value)


def test_ranks_with_other_key_layouts_are_named(pool):
    messages = pool.run(differ_in_a_flag, timeout_s=60)
    assert all("ranks [1] differ" in message for message in messages), messages
