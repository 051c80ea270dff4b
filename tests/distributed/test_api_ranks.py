# SPDX-License-Identifier: Apache-2.0
"""The API over several ranks: new masks, meshes, the cache, and compiled functions."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from magi_attention.api import (
    AttnRanges,
    DistAttnConfig,
    calc_attn,
    clear_cache,
    dispatch,
    dist_attn_runtime_dict_mgr,
    flex_flash_attn_func,
    get_most_recent_key,
    get_position_ids,
    magi_attn_flex_key,
    magi_attn_varlen_key,
    make_flex_key_for_new_mask_after_dispatch,
    make_varlen_key_for_new_mask_after_dispatch,
    roll,
    undispatch,
)
from magi_attention.common import AttnMaskType
from magi_attention.common.slices import SliceTable
from magi_attention.config import OverlapConfig
from magi_attention.dist_attn_runtime_mgr import init_dist_attn_runtime_mgr
from magi_attention.meta import make_dispatch_meta_from_qk_ranges
from magi_attention.runtime import cache
from magi_attention.testing.distributed import RankPool
from magi_attention.testing.oracle import dense_attention
from tests.distributed.small_keys import SHARDS, WORLD_SIZE, causal_key, draw


@pytest.fixture(scope="module")
def pool():
    with RankPool(WORLD_SIZE) as pool:
        yield pool


def attend(key, inputs):
    out, meta = calc_attn(*(dispatch(x, key) for x in inputs), key)
    return undispatch(out, key), undispatch(meta.lse, key)


def check_new_masks(rank, world_size, total, chunk_size, uneven):
    first = causal_key(total, chunk_size, uneven)
    half = total // 2
    second = make_varlen_key_for_new_mask_after_dispatch([0, half, total], [0, half, total], first, window_size=(5, 2))
    third = make_flex_key_for_new_mask_after_dispatch(
        AttnRanges.from_ranges([(0, half)]), AttnRanges.from_ranges([(half, total)]), ["full"], second
    )
    inputs = [draw(total, heads, 8, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    local = [dispatch(x, first) for x in inputs]
    for key in (first, second, third):
        out, _ = calc_attn(*local, key)
        expected, _, _ = dense_attention(*inputs, key.slices.without_empty())
        torch.testing.assert_close(undispatch(out, first), expected, rtol=1e-10, atol=1e-10)
        assert torch.equal(undispatch(out, key), undispatch(out, first))
        weight = draw(*expected.shape)
        got = torch.autograd.grad((undispatch(out, key) * weight).sum(), inputs, retain_graph=True)
        want = torch.autograd.grad((expected * weight).sum(), inputs)
        for each, other in zip(got, want, strict=True):
            torch.testing.assert_close(each, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shard", ["even", "uneven"])
def test_new_masks_over_the_same_layout(pool, shard):
    pool.run(check_new_masks, *SHARDS[shard])


def check_cache(rank, world_size):
    clear_cache()
    group = dist.group.WORLD
    first, second = causal_key(64), causal_key(80)
    assert first.cp_group is group  # None is the default group
    assert get_most_recent_key(group) == second
    dispatch(torch.zeros(64), first)
    assert get_most_recent_key(group) == first
    assert causal_key(80) == second
    assert get_most_recent_key(group) == second

    pair = [rank // 2 * 2, rank // 2 * 2 + 1]
    subgroup = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]
    third = causal_key(64, group=subgroup)
    assert third != first
    assert sorted(dist.get_process_group_ranks(third.cp_group)) == pair
    assert get_most_recent_key(group) == second
    assert get_most_recent_key(subgroup) == third
    inputs = [draw(64, heads, 8) for heads in (4, 2, 2)]
    for whole, half in zip(attend(first, inputs), attend(third, inputs), strict=True):
        torch.testing.assert_close(whole, half, rtol=1e-10, atol=1e-10)

    clear_cache(subgroup)
    assert dist_attn_runtime_dict_mgr.keys(subgroup) == []
    with pytest.raises(ValueError, match="no key yet"):
        get_most_recent_key(subgroup)
    with pytest.raises(ValueError, match="does not exist"):
        dispatch(torch.zeros(64), third)
    assert first in dist_attn_runtime_dict_mgr
    clear_cache()
    assert dist_attn_runtime_dict_mgr.keys() == []
    assert causal_key(64) == first  # planned again, by all ranks


def test_cache_per_group(pool):
    pool.run(check_cache)


def look_at_old_keys_alone(rank, world_size, compiled):
    """One rank looks at keys as no other does; then all make more than the cache keeps, and those again."""
    clear_cache()
    torch._dynamo.reset()
    old = [causal_key(64 + total) for total in range(3)]
    if rank == 1:
        for call in (lambda key: dispatch(torch.zeros(key.total_seqlen_q - key.pad_size), key), get_position_ids):
            (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)(old[0])
            assert get_most_recent_key(dist.group.WORLD) == old[0]
    with mock.patch.object(dist_attn_runtime_dict_mgr._dict_of(old[0].group_ranks), "max_size", 3):
        causal_key(80)
        kept = dist_attn_runtime_dict_mgr.keys()
        causal_key(64, check_plan_timeout=10)
    clear_cache()
    return [key.total_seqlen_q - key.pad_size for key in kept]


@pytest.mark.parametrize("compiled", [False, True])
def test_what_one_rank_looks_at_alone_keeps_no_key_there(pool, compiled):
    assert pool.run(look_at_old_keys_alone, compiled) == [[65, 66, 80]] * WORLD_SIZE


def check_meshes(rank, world_size):
    clear_cache()
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    nested = init_device_mesh("cpu", (2, 2), mesh_dim_names=("inter", "intra"))
    inputs = [draw(64, heads, 8) for heads in (4, 2, 2)]
    keys = [
        causal_key(64),
        causal_key(64, group=flat),
        causal_key(64, group=nested),
        causal_key(64, group=nested, hierarchical_comm=True),
    ]
    assert [key.cp_mesh for key in keys] == [None, flat, nested, nested]
    assert get_most_recent_key(nested) is get_most_recent_key(flat) is keys[3]  # all are over the same ranks
    assert len(set(keys)) == 4
    assert causal_key(64, group=nested) == keys[2]
    answers = [attend(key, inputs) for key in keys]
    for answer in answers[1:]:
        for got, want in zip(answer, answers[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)

    for mesh, options, message in (
        (init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("a", "b", "c")), {}, "1-D or 2-D"),
        (flat, {"hierarchical_comm": True}, "must be 2-D"),
        (dist.group.WORLD, {"hierarchical_comm": True}, "needs a 2-D DeviceMesh"),
        (DeviceMesh("cpu", torch.arange(4).view(2, 2)), {}, "mesh_dim_names"),
        (init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp")), {}, r"\('dp', 'cp'\): pass mesh\[\"cp\"\]"),
    ):
        with pytest.raises(AssertionError, match=message) as error:
            causal_key(64, group=mesh, **options)
        assert isinstance(error.value, ValueError)
    outside = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="that this process is part of"):
            causal_key(64, group=outside)
    with pytest.raises(ValueError, match="3 rows cannot be shared by 4 ranks: pad it to 4 rows"):
        causal_key(3)
    clear_cache(nested)
    with pytest.raises(ValueError, match="no key yet"):
        get_most_recent_key(flat)


def attend_to_fewer_rows_than_ranks(rank, world_size, num_rows):
    """As the error says that others get: padded to as many rows as there are ranks."""
    rows = AttnRanges.from_ranges([(0, num_rows)])
    key = magi_attn_flex_key(rows, rows, "causal", world_size, world_size, 4, 2, 8, 0, None)
    shapes = [(world_size, heads, 8) for heads in (4, 2, 2)]
    generator = torch.Generator().manual_seed(num_rows)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    out = undispatch(calc_attn(*(dispatch(x, key) for x in inputs), key)[0], key)
    slices = SliceTable.from_lists([(0, num_rows)], [(0, num_rows)], [1])
    expected, *_ = dense_attention(*inputs, slices)
    torch.testing.assert_close(out, expected)
    found, wanted = (torch.autograd.grad(each.square().sum(), inputs) for each in (out, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_fewer_rows_than_ranks_can_be_padded(pool, num_rows):
    pool.run(attend_to_fewer_rows_than_ranks, num_rows)


def test_meshes(pool):
    pool.run(check_meshes)


def forget_everything(rank, world_size):
    key = causal_key(96)
    layout = weakref.ref(dist_attn_runtime_dict_mgr[key].layout)
    x = dispatch(torch.ones(96, 2), key)
    roll(x, 3, 0, key)
    undispatch(x, key)
    clear_cache()
    gc.collect()
    assert layout() is None


def test_a_cleared_cache_keeps_nothing_alive(pool):
    pool.run(forget_everything)


def use_many_keys(rank, world_size):
    group = dist.group.WORLD
    with mock.patch.object(cache, "NUM_KEYS_WITH_TABLES", 2):
        keys = [causal_key(total, group=group) for total in (64, 68, 72)]
        tables = []
        for key in (*keys, keys[0]):
            mine = [dispatch(draw(key.total_seqlen_q - key.pad_size, heads, 8), key) for heads in (4, 2, 2)]
            calc_attn(*mine, key)
            tables.append([call.slices for call in dist_attn_runtime_dict_mgr[key].dist_attn_runtime.schedule.calls])
        # The second mask's tables gave way when the first one's came back; the plan itself is still there.
        assert [any("_derived" in vars(table) for table in of_key) for of_key in tables[:3]] == [True, False, True]
        assert all(key in dist_attn_runtime_dict_mgr for key in keys)


def test_only_recent_keys_keep_tables_for_devices(pool):
    pool.run(use_many_keys)


def check_runtime_manager(rank, world_size):
    ranges = AttnRanges.from_ranges([(0, 96)])
    mask = (ranges, ranges, [AttnMaskType.CAUSAL], 96, 96)
    planned = init_dist_attn_runtime_mgr(*mask, 4, 2, 8, 6, dist.group.WORLD)
    inputs = [draw(96, heads, 8) for heads in (4, 2, 2)]
    expected = dense_attention(*inputs, SliceTable([[0, 96, 0, 96, 1]]))[0]
    out, _ = planned.calc_attn(*(planned.dispatch_qo(x) for x in inputs))
    torch.testing.assert_close(planned.undispatch_qo(out), expected, rtol=1e-10, atol=1e-10)

    meta, _ = make_dispatch_meta_from_qk_ranges(*mask, 3, world_size, rank)
    kept = init_dist_attn_runtime_mgr(*mask, 4, 2, 8, 3, dist.group.WORLD, ref_dispatch_meta_q=meta)
    assert torch.equal(kept.get_position_ids(), meta.position_ids)
    with pytest.raises(AssertionError, match="must be a multiple of 20"):
        init_dist_attn_runtime_mgr(*mask, 4, 2, 8, 5, dist.group.WORLD)


def test_runtime_manager_without_padding_or_cache(pool):
    pool.run(check_runtime_manager)


def compile_a_step(rank, world_size):
    """Everything of a training step in one graph, for two keys, and with gradients of all ranks.

    PyTorch before 2.13 breaks the graph where positions are looked up, since it can't hash keys.
    """
    torch._dynamo.reset()

    def step(x, key):
        local = dispatch(x, key) + get_position_ids(key)[:, None, None] / 100
        out, _ = calc_attn(local, local[:, :2], local[:, 2:], key)
        return undispatch(roll(out, 5, 0, key), key, is_partial_grad=True)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=torch.__version__ >= "2.13")
    for total in (101, 90):
        key = causal_key(total, uneven=True, keep_received=False)
        x, weight = draw(total, 4, 8).requires_grad_(), draw(total, 4, 8, seed=1 + rank)
        expected, actual = (each(x, key) for each in (step, compiled))
        torch.testing.assert_close(actual, expected)
        gradients = [torch.autograd.grad((each * weight).sum(), x)[0] for each in (actual, expected)]
        torch.testing.assert_close(*gradients)


def test_a_compiled_step(pool):
    pool.run(compile_a_step)


def compile_the_backward_pass(rank, world_size):
    """Of a step that was not compiled itself: the compiler leaves attention and its exchanges out."""
    torch._dynamo.reset()
    key, x, weight = causal_key(101), draw(101, 4, 8).requires_grad_(), draw(101, 4, 8, seed=1)

    def loss():
        local = dispatch(x, key)
        out, _ = calc_attn(local, local[:, :2], local[:, 2:], key)
        return (undispatch(roll(out, 5, 0, key), key) * weight).sum()

    (expected,) = torch.autograd.grad(loss(), x)
    compiled = loss()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        compiled.backward()
    torch.testing.assert_close(x.grad, expected)


def test_a_compiled_backward_pass(pool):
    pool.run(compile_the_backward_pass)


def evaluate_then_train(rank, world_size):
    """What is kept for later calls must not be of inference mode, which training could not use."""
    config = DistAttnConfig(overlap_config=OverlapConfig(degree=2, min_chunk_size=8))

    def step(x, rotation, key):
        local = dispatch(x, key) * rotation[get_position_ids(key)]
        out, _ = calc_attn(local, local[:, :2], local[:, 2:], key)
        return undispatch(roll(out, 5, 0, key), key)

    with torch.inference_mode():
        key = magi_attn_varlen_key([0, 90], [0, 90], 4, 2, 8, 0, None, causal=True, dist_attn_config=config)
        evaluated = step(draw(90, 4, 8), draw(90, 1, 1, seed=1), key)
    inputs = draw(90, 4, 8).requires_grad_(), draw(90, 1, 1, seed=1).requires_grad_()
    trained = step(*inputs, key)
    torch.testing.assert_close(trained, evaluated)
    assert all(each.abs().sum() > 0 for each in torch.autograd.grad(trained.square().sum(), inputs))


def test_training_after_evaluation_in_inference_mode(pool):
    pool.run(evaluate_then_train)


def plan_in_a_thread(rank, world_size):
    """A thread makes all keys, in the same order on all ranks, however far it is ahead of the steps."""
    lengths = [32 + 4 * step for step in range(12)]
    results = []
    with ThreadPoolExecutor(1) as planner:
        planned = [planner.submit(causal_key, total) for total in lengths]
        for total, upcoming in zip(lengths, planned, strict=True):
            key = upcoming.result()
            x = draw(total, 4, 8).requires_grad_()
            local = dispatch(x, key)
            undispatch(calc_attn(local, local, local, key)[0], key).square().sum().backward()
            results.append(x.grad)
    return results


def test_keys_may_be_made_ahead_in_a_thread(pool):
    every = pool.run(plan_in_a_thread)
    for results in zip(*every, strict=True):
        x = draw(len(results[0]), 4, 8).double().requires_grad_()
        rows = SliceTable(np.array([[0, len(x), 0, len(x), 1]]))
        dense_attention(x, x, x, rows)[0].square().sum().backward()
        for gradient in results:
            torch.testing.assert_close(gradient.double(), x.grad, rtol=1e-4, atol=1e-5)


def pass_dtensors(rank, world_size):
    """Their own communication would run among ours, and not on all ranks alike."""
    key = causal_key(64)
    mesh = init_device_mesh("cpu", (world_size,))
    whole = distribute_tensor(draw(64, 4, 8), mesh, [Shard(0)])
    local = DTensor.from_local(draw(16, 4, 8), mesh, [Replicate()])
    calls = {
        "dispatch": lambda: dispatch(whole, key),
        "undispatch": lambda: undispatch(local, key),
        "roll": lambda: roll(local, 1, 0, key),
        "calc_attn": lambda: calc_attn(local, local, local, key),
        "sink": lambda: calc_attn(*[draw(16, 4, 8)] * 3, key, sink=local[0, :1]),
        "flex_flash_attn_func": lambda: flex_flash_attn_func(local, local, local, *[torch.tensor([[0, 16]])] * 2),
    }
    for call in calls.values():
        with pytest.raises(TypeError, match=r"is a DTensor with placements .*; pass \w+\.to_local\(\)"):
            call()


def test_dtensors_are_refused(pool):
    pool.run(pass_dtensors)
