# SPDX-License-Identifier: Apache-2.0
"""Keys that ranks make differently, or that one of them can't make: all ranks get an error that names it."""

import contextlib
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from magi_attention.api import (
    AttnRanges,
    clear_cache,
    dispatch,
    dist_attn_runtime_dict_mgr,
    magi_attn_flex_key,
    magi_attn_varlen_key,
    make_flex_key_for_new_mask_after_dispatch,
    make_varlen_key_for_new_mask_after_dispatch,
    undispatch,
)
from magi_attention.config import DistAttnConfig, RuntimeConfig
from magi_attention.testing.distributed import RankPool
from tests.distributed.small_keys import SHARDS, WORLD_SIZE, causal_key
from tests.distributed.test_moved_rows import check_dispatch


@pytest.fixture(scope="module")
def pool():
    with RankPool(WORLD_SIZE) as pool:
        yield pool


def plan_what_differs(rank, world_size, difference):
    clear_cache()
    started = time.monotonic()
    total, odd = 64, rank == 2
    try:
        if difference == "mask":
            magi_attn_varlen_key([0, 30 + odd, total], [0, 30 + odd, total], 4, 2, 8, 0, None)
        elif difference == "type":
            magi_attn_varlen_key([0, total], [0, total], 4, 2, 8, 0, None, causal=odd)
        elif difference == "length":
            causal_key(total + 16 * odd)
        elif difference == "chunk":
            causal_key(total, 1 + odd)
        elif difference == "heads":
            ranges = AttnRanges.from_ranges([(0, total)])
            magi_attn_flex_key(ranges, ranges, "full", total, total, 4 + 4 * odd, 2, 8, 0, None)
        elif difference == "head size":
            ranges = AttnRanges.from_ranges([(0, total)])
            magi_attn_flex_key(ranges, ranges, "full", total, total, 4, 2, 8 + 8 * odd, 0, None)
        elif difference == "options":
            causal_key(total, backward_high_precision_reduce=odd)
    except RuntimeError as error:
        assert time.monotonic() - started < 30
        assert not dist_attn_runtime_dict_mgr.keys()
        return str(error)
    return None


@pytest.mark.parametrize("difference", ["mask", "type", "length", "chunk", "heads", "head size", "options"])
def test_ranks_that_disagree_are_named_on_every_rank(pool, difference):
    messages = pool.run(plan_what_differs, difference, timeout_s=60)
    assert all("ranks [2] differ from ranks [0, 1, 3]" in message for message in messages), messages
    assert all(message.endswith("are its keys made in one order, by one thread alone?") for message in messages)
    # The group is still good: the same ranks then agree on a key.
    pool.run(check_dispatch, *SHARDS["even"])


def stay_away(rank, world_size):
    group = dist.new_group([0, 1, 2])  # a group of their own, so that the others' next keys stay in step
    with contextlib.ExitStack() as stack:
        if rank in (0, 2):
            stack.enter_context(pytest.raises(RuntimeError, match=r"ranks \[1\] of the group \[0, 1, 2\] did not come"))
            causal_key(64, group=group, check_plan_timeout=2)


def test_ranks_that_stay_away_are_named_by_the_others(pool):
    pool.run(stay_away, timeout_s=60)


def fail_while_planning(rank, world_size):
    if rank == 2:
        # Slices that keep a pair twice are found only while the key is planned.
        twice = AttnRanges.from_ranges([(0, 64), (10, 20)])
        with pytest.raises(ValueError, match=r"slice 0 .* and slice 1 .* keep a common"):
            magi_attn_flex_key(twice, twice, "full", 64, 64, 4, 2, 8, 0, None)
    else:
        with pytest.raises(RuntimeError, match="rank 2 failed to make its key: MagiValueError: slice 0"):
            causal_key(64)
    causal_key(64)  # and the group is still good


def test_a_rank_that_fails_while_planning_is_named_at_once(pool):
    started = time.monotonic()
    pool.run(fail_while_planning, timeout_s=60)
    assert time.monotonic() - started < 25


def fail_here_or_hear_of_it(rank, culprits, make, error, message, told):
    """Make a wrong key on some ranks, of which all others hear of the first, and what it raised."""
    if rank in culprits:
        with pytest.raises(error, match=message):
            make()
    else:
        with pytest.raises(RuntimeError, match=rf"rank {min(culprits)} failed to make its key: {told}"):
            causal_key(60)


def fail_by_arguments(rank, world_size):
    """A mistake in the arguments of one rank, then of all ranks, and each way to make a key."""
    key = causal_key(64)
    beyond = AttnRanges.from_ranges([(0, 65)])
    makers = (
        lambda: magi_attn_flex_key(beyond, beyond, "full", 64, 64, 4, 2, 8, 0, None),
        lambda: magi_attn_varlen_key([0, 65, 64], [0, 65, 64], 4, 2, 8, 0, None),
        lambda: make_flex_key_for_new_mask_after_dispatch(beyond, beyond, "full", key),
        lambda: make_varlen_key_for_new_mask_after_dispatch([0, 64], [0, 60, 64], key),
    )
    for number, make in enumerate(makers):
        for culprits in ({number}, {0, 1, 2, 3}):
            fail_here_or_hear_of_it(rank, culprits, make, ValueError, r"65|entries", "MagiValueError: ")
        causal_key(32 + number)  # and the group is still good


def test_a_rank_whose_arguments_are_wrong_is_named_at_once(pool):
    started = time.monotonic()
    pool.run(fail_by_arguments, timeout_s=60)
    assert time.monotonic() - started < 25


def fail_by_config(rank, world_size):
    """What is no config on one rank, or one that contradicts the environment or the group there."""
    key = causal_key(64)
    ranges = AttnRanges.from_ranges([(0, 64)])
    in_two_hops = DistAttnConfig(runtime_config=RuntimeConfig(hierarchical_comm=True))
    makers = (
        (TypeError, lambda: magi_attn_flex_key(ranges, ranges, "full", 64, 64, 4, 2, 8, 0, None, {"degree": 2})),
        (TypeError, lambda: magi_attn_varlen_key([0, 64], [0, 64], 4, 2, 8, 0, None, dist_attn_config={})),
        (ValueError, lambda: causal_key(64, hierarchical_comm=True)),
        (TypeError, lambda: make_flex_key_for_new_mask_after_dispatch(ranges, ranges, "full", key, dist_attn_config=3)),
        (
            ValueError,
            lambda: make_varlen_key_for_new_mask_after_dispatch([0, 64], [0, 64], key, False, (-1, -1), in_two_hops),
        ),
    )
    for number, (error, make) in enumerate(makers):
        message = "must be a DistAttnConfig|needs a 2-D DeviceMesh"
        fail_here_or_hear_of_it(rank, {number % world_size}, make, error, message, f".*({message})")
        causal_key(32 + number)  # and the group is still good


def test_a_rank_whose_config_is_wrong_is_named_at_once(pool):
    started = time.monotonic()
    pool.run(fail_by_config, timeout_s=60)
    assert time.monotonic() - started < 25


def make_a_second_key_without_the_first(rank, world_size):
    """One rank's cache has lost the key whose layout a new mask takes over."""
    makers = (
        lambda key: make_flex_key_for_new_mask_after_dispatch(key.q_ranges, key.k_ranges, "full", key),
        lambda key: make_varlen_key_for_new_mask_after_dispatch([0, 40, 64], [0, 40, 64], key),
    )
    for make in makers:
        key = causal_key(64)
        if rank == 1:
            clear_cache()
        with pytest.raises(
            ValueError if rank == 1 else RuntimeError,
            match="^The dist attn runtime key does not exist" if rank == 1 else "rank 1 failed to make its key: ValueE",
        ):
            make(key)
        clear_cache()
    causal_key(64)  # and the group is still good


def test_a_rank_without_the_key_for_dispatch_is_named_at_once(pool):
    started = time.monotonic()
    pool.run(make_a_second_key_without_the_first, timeout_s=60)
    assert time.monotonic() - started < 25


def make_a_native_key(rank, world_size):
    with pytest.raises(RuntimeError, match="native_grpcoll"):
        causal_key(64, native_grpcoll=True)
    causal_key(64)


def test_a_transport_that_is_missing_stops_all_ranks(pool):
    pool.run(make_a_native_key, timeout_s=60)


def make_a_hierarchical_key(rank, world_size):
    mesh = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("node", "local"))
    with pytest.raises(ValueError, match=r"must ascend row by row, unlike \[\[0, 2\], \[1, 3\]\]"):
        causal_key(64, group=mesh, hierarchical_comm=True)


def test_a_mesh_that_is_not_numbered_node_by_node_is_refused(pool):
    pool.run(make_a_hierarchical_key, timeout_s=60)


def dispatch_in_a_checkpoint(x, key):
    contexts = partial(create_selective_checkpoint_contexts, [])
    return checkpoint(dispatch, x, key, use_reentrant=False, context_fn=contexts)


WAYS_TO_DISPATCH = {
    "plain": dispatch,
    "compiled": torch.compile(dispatch, backend="aot_eager", fullgraph=True),
    "in a selective checkpoint": dispatch_in_a_checkpoint,
}


def dispatch_what_differs(rank, world_size, way):
    """The message of one rank's other tokens, of another data type, and of equal tensors of any kind."""
    torch._dynamo.reset()
    key = causal_key(64, sanity_check=True)
    messages = []
    tokens = torch.arange(64)
    same = tokens > 3, torch.ones(64, 2).T.mT, torch.ones(64, 2, dtype=torch.complex64).conj()
    for x in (tokens + (rank == 2), tokens.int() if rank == 2 else tokens, *same):
        try:
            WAYS_TO_DISPATCH[way](x.requires_grad_(x.is_floating_point()), key)
            messages.append(None)
        except RuntimeError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("way", WAYS_TO_DISPATCH)
def test_ranks_that_dispatch_other_tensors_are_named_on_every_rank(pool, way):
    for messages in pool.run(dispatch_what_differs, way):
        assert all("another tensor on ranks [2] than on rank 0" in message for message in messages[:2]), messages
        assert messages[2:] == [None] * 3


def dispatch_by_keys_that_differ(rank, world_size):
    """The message where one rank takes another of the keys that all have made, which no rank then compares again."""
    keys = [causal_key(64, chunk_size, sanity_check=True) for chunk_size in (1, 2)]
    with pytest.raises(RuntimeError, match=r"a key of another plan on ranks \[2\] than on rank 0"):
        dispatch(torch.arange(64), keys[rank == 2])
    dispatch(torch.arange(64), keys[0])


def test_ranks_that_dispatch_by_other_keys_are_named_on_every_rank(pool):
    pool.run(dispatch_by_keys_that_differ)


def undispatch_for_losses_that_differ(rank, world_size):
    key = causal_key(64, sanity_check=True)
    compiled = torch.compile(undispatch, backend="aot_eager", fullgraph=True)
    local = torch.zeros(key.local_rows[0], requires_grad=True)
    (compiled(local, key) * rank).sum().backward()
    return local.grad.unique().tolist()


def test_gradients_may_differ_where_tensors_are_compared(pool):
    assert pool.run(undispatch_for_losses_that_differ) == [[rank] for rank in range(WORLD_SIZE)]


def dispatch_unchecked(rank, world_size):
    return dispatch(torch.full((64,), rank), causal_key(64)).unique().tolist()


def test_tensors_are_compared_only_where_that_is_asked_for(pool):
    assert pool.run(dispatch_unchecked) == [[rank] for rank in range(WORLD_SIZE)]
