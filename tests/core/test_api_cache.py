# SPDX-License-Identifier: Apache-2.0
"""The cache of keys: what is kept, what gives way, and which key counts as the most recent."""

import gc
import io
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from magi_attention.api import (
    AttnMaskType,
    AttnRanges,
    DistAttnConfig,
    DistAttnRuntimeDictManager,
    DistAttnRuntimeKey,
    calc_attn,
    clear_cache,
    dispatch,
    dist_attn_runtime_dict_mgr,
    get_most_recent_key,
    get_position_ids,
    make_varlen_key_for_new_mask_after_dispatch,
    roll,
    undispatch,
)
from magi_attention.dist_attn_runtime_mgr import DistAttnRuntimeDict, init_dist_attn_runtime_key
from magi_attention.runtime import cache as cache_module
from tests.core.api_keys import key_for


def key_of(total: int, group: dist.ProcessGroup | None = None) -> DistAttnRuntimeKey:
    ranges = AttnRanges.from_ranges([(0, total)])
    types = [AttnMaskType.CAUSAL]
    return init_dist_attn_runtime_key(
        ranges, ranges, types, total, total, 4, 2, 64, 0, 8, group, None, DistAttnConfig()
    )


def planned(total: int, group: dist.ProcessGroup | None = None) -> DistAttnRuntimeKey:
    return key_for(total, [(0, total)], group=group)


@pytest.fixture
def group(tmp_path):
    """A default group of this process alone, with an empty cache."""
    clear_cache()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    clear_cache()
    dist.destroy_process_group()


def test_least_recent_key_gives_way():
    cache = DistAttnRuntimeDictManager(max_size_per_group=2)
    first, second, third = (key_of(total) for total in (8, 16, 24))
    cache[first], cache[second] = "first", "second"
    assert cache.get(first) == "first"  # now more recent than the second
    cache[third] = "third"
    assert cache.keys() == [first, third]
    assert second not in cache
    assert cache.get(second) is None
    assert cache.get(second, "nothing") == "nothing"
    with pytest.raises(KeyError):
        cache[second]


def test_looking_is_not_using():
    cache = DistAttnRuntimeDict(max_size=2)
    first, second = key_of(8), key_of(16)
    cache[first], cache[second] = "first", "second"
    assert first in cache
    assert cache[first] == "first"
    assert cache.get_most_recent_key() == second
    cache.get(first)
    assert cache.get_most_recent_key() == first
    cache[second] = "again"
    assert (cache.get_most_recent_key(), len(cache), cache[second]) == (second, 2, "again")


def test_what_is_used_alone_is_the_most_recent_but_gives_way_as_before():
    cache = DistAttnRuntimeDictManager(max_size_per_group=2)
    first, second, third = (key_of(total) for total in (8, 16, 24))
    cache[first], cache[second] = "first", "second"
    assert cache.use_alone(first) == "first"
    assert cache.keys() == [first, second]
    recent = [cache._dict_of((0,)).get_most_recent_key()]
    for use, key in ((cache.use_alone, second), (cache.use_alone, first), (cache.get, second)):
        use(key)
        recent.append(cache._dict_of((0,)).get_most_recent_key())
    assert recent == [first, second, first, second]
    cache.use_alone(first)
    cache[third] = "third"
    assert cache.keys() == [second, third]
    assert cache.use_alone(first) is None
    assert cache._dict_of((0,)).get_most_recent_key() == third


@pytest.mark.parametrize("max_size", [0, -1])
def test_a_cache_without_room_keeps_nothing(max_size):
    cache = DistAttnRuntimeDictManager(max_size)
    key = key_of(8)
    cache[key] = "manager"
    assert key not in cache
    assert cache.keys() == []


def test_a_key_of_a_cache_without_room_is_told_what_to_set(monkeypatch):
    monkeypatch.setattr(cache_module, "dist_attn_runtime_dict_mgr", DistAttnRuntimeDictManager(0))
    with pytest.raises(ValueError, match="MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE=0: set it to 1 or more"):
        cache_module.find_manager(key_of(8))


def test_the_environment_is_asked_when_the_size_is_first_needed(monkeypatch):
    cache = DistAttnRuntimeDictManager()
    monkeypatch.setenv("MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE", "many")
    with pytest.raises(ValueError, match="MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE='many': not a whole number"):
        cache[key_of(8)] = "manager"
    monkeypatch.setenv("MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE", "2")
    cache[key_of(8)] = "manager"
    monkeypatch.delenv("MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE")
    assert cache.max_size_per_group == 2


def test_each_group_has_its_own_dictionary(group):
    cache = DistAttnRuntimeDictManager(max_size_per_group=1)
    grouped = key_of(8, group)
    cache[grouped] = "grouped"
    assert cache.keys(group) == [grouped]
    assert cache.get_most_recent_key(group) == grouped
    cache.clear(group)
    assert cache.keys() == []
    assert cache.get_most_recent_key(group) is None


def test_groups_over_the_same_ranks_share_a_dictionary_but_no_keys(group):
    other = dist.new_group([0])
    cache = DistAttnRuntimeDictManager(max_size_per_group=4)
    cache[key_of(8, group)], cache[key_of(8, other)] = "default", "other"
    assert [cache[key] for key in cache.keys(group)] == ["default", "other"]
    assert cache.keys(other) == cache.keys(group)


def test_a_new_key_takes_the_place_of_those_of_destroyed_groups(group):
    other = dist.new_group([0])
    kept, gone = planned(64, group), planned(64, other)
    dist.destroy_process_group(other)
    alive, other = weakref.ref(other), None
    assert gone in dist_attn_runtime_dict_mgr
    new = planned(80, group)
    assert dist_attn_runtime_dict_mgr.keys() == [kept, new]
    del gone
    gc.collect()
    assert alive() is None


def test_a_module_that_holds_a_key_is_saved_and_loaded_with_it(group):
    other = dist.new_group([0])
    module = torch.nn.Linear(2, 2)
    module.key, module.other = planned(64, group), planned(64, other)
    file = io.BytesIO()
    torch.save(module, file)

    def load() -> torch.nn.Module:
        file.seek(0)
        return torch.load(file, weights_only=False)

    loaded = load()
    assert (loaded.key, loaded.other) == (module.key, module.other)
    assert (hash(loaded.key), hash(loaded.other)) == (hash(module.key), hash(module.other))
    assert loaded.other.cp_group is other
    assert loaded.key.local_rows == (64, 64)
    assert dispatch(torch.zeros(64), loaded.other).shape == (64,)
    # As another rank does, or a process without the group.
    dist.destroy_process_group(other)
    loaded = load()
    assert loaded.key == module.key
    assert loaded.other != module.other
    assert (loaded.other.cp_group, loaded.other.local_rows) == (None, None)
    with pytest.raises(ValueError, match="make it again"):
        dispatch(torch.zeros(64), loaded.other)


@pytest.mark.parametrize("call", [get_most_recent_key, clear_cache, lambda other: planned(8, other)])
def test_destroyed_groups_are_told(group, call):
    other = dist.new_group([0])
    dist.destroy_process_group(other)
    with pytest.raises(ValueError, match="this process group was destroyed"):
        call(other)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_meshes_of_destroyed_groups_are_told(tmp_path, shape):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("nodes", "ranks")[: len(shape)])
    planned(64, mesh)
    dist.destroy_process_group()
    for call in (get_most_recent_key, clear_cache, lambda mesh: planned(8, mesh)):
        with pytest.raises(ValueError, match="was destroyed: make the mesh again"):
            call(mesh)
    clear_cache()


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize(
    "use",
    [
        lambda key: dispatch(torch.zeros(64), key),
        lambda key: undispatch(torch.zeros(64), key),
        lambda key: roll(torch.zeros(64), 1, 0, key),
        lambda key: calc_attn(*[torch.zeros(64, heads, 64) for heads in (4, 2, 2)], key),
        lambda key: make_varlen_key_for_new_mask_after_dispatch([0, 64], [0, 64], key),
        get_position_ids,
    ],
    ids=["dispatch", "undispatch", "roll", "attend", "new mask", "position ids"],
)
def test_keys_of_destroyed_groups_are_told(group, use, is_cached):
    other = dist.new_group([0])
    key = planned(64, other)
    use(key)
    dist.destroy_process_group(other)
    if not is_cached:
        planned(64, group)
    with pytest.raises(ValueError, match="process group of this key was destroyed"):
        use(key)


def test_most_recent_key_is_the_one_made_asked_for_or_used_last(group):
    first, second = planned(64, group), planned(80, group)
    assert get_most_recent_key(group) == second
    dispatch(torch.zeros(64), first)
    assert get_most_recent_key(group) is first
    get_position_ids(second)
    assert get_most_recent_key(group) == second
    assert planned(64, group) == first  # asked for again
    assert get_most_recent_key(group) == first


def test_asking_again_plans_nothing(group):
    manager = dist_attn_runtime_dict_mgr[planned(64, group)]
    assert dist_attn_runtime_dict_mgr[planned(64, group)] is manager
    assert planned(64, group) is planned(64, group)


def test_most_recent_key_needs_a_group_with_keys(group):
    with pytest.raises(ValueError, match="no key yet"):
        get_most_recent_key(group)
    with pytest.raises(ValueError, match="cp_group is None"):
        get_most_recent_key(None)


@pytest.mark.parametrize("everything", [True, False])
def test_cleared_keys_cannot_be_used(group, everything):
    key = planned(64, group)
    clear_cache(None if everything else group)
    for use in (lambda: dispatch(torch.zeros(64), key), lambda: get_position_ids(key)):
        with pytest.raises(ValueError, match="The dist attn runtime key does not exist!"):
            use()
    assert dispatch(torch.zeros(64), planned(64, group)).shape == (64,)


def test_none_is_the_default_group_where_there_is_one(group):
    assert planned(64, None).cp_group is group


def test_only_keys_are_taken_for_keys():
    with pytest.raises(TypeError, match="not str"):
        dispatch(torch.zeros(4), "key")


@pytest.fixture
def eager_threads():
    """Threads take turns some ten thousand times as often as they do otherwise."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-7)
    yield
    sys.setswitchinterval(interval)


def test_threads_share_a_cache(eager_threads):
    cache = DistAttnRuntimeDict(max_size=4)
    keys = [key_of(8 * (1 + n)) for n in range(6)]
    deadline = time.monotonic() + 2.0

    def insert(first: int) -> None:
        while time.monotonic() < deadline:
            for key in keys[first::2]:
                cache[key] = "manager"

    def get(first: int) -> None:
        while time.monotonic() < deadline:
            for key in keys[first::2]:
                cache.get(key)
            cache.get_most_recent_key()
            cache.keys()

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(call, first) for call in (insert, get) for first in (0, 1)]:
            done.result()
    assert len(cache) == 4
