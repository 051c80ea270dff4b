# SPDX-License-Identifier: Apache-2.0
"""Keys, managers and deprecated functions in one process, without torch.distributed, and how it ends."""

import pickle
import subprocess
import sys

import pytest
import torch

from magi_attention.api import (
    AttnRanges,
    DispatchConfig,
    dispatch,
    dist_attn_runtime_dict_mgr,
    magi_attn_flex_dispatch,
    magi_attn_varlen_dispatch,
    magi_attn_varlen_key,
)
from magi_attention.common import AttnMaskType
from magi_attention.dist_attn_runtime_mgr import init_dist_attn_runtime_mgr
from magi_attention.functional import dispatch_func
from magi_attention.meta import make_dispatch_meta_from_qk_ranges
from magi_attention.runtime.manager import build_manager
from magi_attention.testing.oracle import dense_attention
from tests.core.api_single import SLICES, TOTAL, qkv


def test_deprecated_dispatch_returns_tensor_and_key(key):
    x = torch.randn(TOTAL, 2)
    with pytest.warns(DeprecationWarning, match="magi_attn_varlen_dispatch"):
        local, same = magi_attn_varlen_dispatch(x, [0, 30, 50], [0, 30, 50], 4, 2, 8, 0, None, causal=True)
    assert same == key
    assert torch.equal(local, dispatch(x, key))
    ranges = AttnRanges.from_ranges([(0, 30), (30, 50)])
    with pytest.warns(DeprecationWarning, match="magi_attn_flex_dispatch"):
        local, same = magi_attn_flex_dispatch(x, ranges, ranges, "causal", 50, 50, 4, 2, 8, 0, None)
    assert same == key
    assert torch.equal(local, dispatch(x, key))


def test_runtime_manager_without_padding_or_cache():
    ranges = AttnRanges.from_ranges([(0, 30), (30, 50)])
    manager = init_dist_attn_runtime_mgr(ranges, ranges, [AttnMaskType.CAUSAL] * 2, 50, 50, 4, 2, 8, 16, None)
    inputs = qkv(TOTAL)
    out, _ = manager.calc_attn(*[manager.dispatch_qo(x) for x in inputs])
    torch.testing.assert_close(manager.undispatch_qo(out), dense_attention(*inputs, SLICES)[0])
    assert (manager.key.chunk_size, manager.key.pad_size) == (16, 0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((4, 2, 8, 0), "chunk_size is 0; it must be positive"), ((3, 2, 8, 4), "num_heads_q=3 must be a multiple of")],
)
def test_runtime_manager_refuses_sizes_that_cannot_be(sizes, message):
    ranges = AttnRanges.from_ranges([(0, 48)])
    with pytest.raises(ValueError, match=message):
        init_dist_attn_runtime_mgr(ranges, ranges, [AttnMaskType.CAUSAL], 48, 48, *sizes, None)


def test_dispatch_meta_lists_each_rank_s_chunks():
    ranges = AttnRanges.from_ranges([(0, 100)])
    meta, of_keys = make_dispatch_meta_from_qk_ranges(
        ranges, ranges, [AttnMaskType.CAUSAL], 100, 100, 16, 3, 1, DispatchConfig(uneven_shard=True)
    )
    chunks_by_rank = [chunk for chunks in meta.partitions for chunk in chunks]
    assert sorted(chunks_by_rank) == list(range(7))
    assert all(chunks == sorted(chunks) for chunks in meta.partitions)
    assert meta.partitions_perm_idxs == chunks_by_rank
    assert [meta.partitions_perm_idxs[place] for place in meta.partitions_unperm_idxs] == list(range(7))
    assert meta.chunk_actual_sizes == [16] * 6 + [4]
    rows = [
        [row for chunk in chunks for row in range(16 * chunk, min(16 * chunk + 16, 100))] for chunks in meta.partitions
    ]
    assert meta.split_sizes == [len(each) for each in rows]
    assert meta.position_ids.tolist() == rows[1]
    assert [[p for r in held for p in range(r.start, r.end)] for held in meta.host_ranges_per_rank] == rows
    assert (meta.layout.owner == [next(r for r in range(3) if c in meta.partitions[r]) for c in range(7)]).all()
    assert of_keys.partitions == meta.partitions
    assert of_keys.attn_role is not meta.attn_role


def test_a_pickled_key_is_an_equal_key_whose_hash_is_computed_anew(key):
    state = pickle.loads(pickle.dumps(key))
    assert "_hash" not in vars(state)
    assert state == key
    assert hash(state) == hash(key)


def test_managers_know_their_layout_and_equal_plans_are_equal(key):
    manager = dist_attn_runtime_dict_mgr[key]
    x = torch.arange(TOTAL)
    assert torch.equal(dispatch_func(x, None, manager.dispatch_meta_q), dispatch(x, key))
    assert manager == build_manager(key)
    assert manager != build_manager(magi_attn_varlen_key([0, 7], [0, 7], 4, 2, 8, 0, None))


@pytest.mark.parametrize("ends", [[0.5, 1], "04", [0, "8"]])
def test_documents_end_at_integers(ends):
    with pytest.raises(TypeError, match="must be integers"):
        magi_attn_varlen_key(ends, ends, 4, 2, 8, 0, None)


EXITING_PROGRAM = """
import atexit, gc, os, sys

def count_threads():  # registered first, and so called last
    gc.collect()
    print(len(os.listdir("/proc/self/task")))

atexit.register(count_threads)
import torch
import torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
import torch.distributed.nn
from magi_attention.api import calc_attn, dispatch, magi_attn_varlen_key
key = magi_attn_varlen_key([0, 64], [0, 64], 2, 2, 8, 0, dist.group.WORLD, causal=True)
x = dispatch(torch.randn(64, 2, 8, requires_grad=True), key)
out, meta = calc_attn(x, x, x, key)
dist.destroy_process_group()
"""


def test_no_process_group_outlives_the_interpreter(tmp_path):
    command = [sys.executable, "-c", EXITING_PROGRAM, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
