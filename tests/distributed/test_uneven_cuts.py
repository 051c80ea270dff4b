# SPDX-License-Identifier: Apache-2.0
"""Layouts whose cuts follow documents, through the public API: as for very long sequences, but with few rows."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.api import dispatch, get_position_ids, make_varlen_key_for_new_mask_after_dispatch, roll, undispatch
from magi_attention.common import packed
from magi_attention.config import DistAttnConfig, OverlapConfig, RuntimeConfig
from magi_attention.plan import dispatch as dealing
from magi_attention.runtime.cache import dist_attn_runtime_dict_mgr, find_manager
from magi_attention.testing.distributed import RankPool
from tests.distributed.attention_case import Answer, Case, assert_right, attend, device, key_of

WORLD_SIZE = 4
ENDS = [0, 37, 400, 407, 450, 1103, 1190, 1201, 1500, 2311, 2400, 2777, 3000]


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu(2))])
def pool(request):
    size = WORLD_SIZE if request.param == "gloo" else min(torch.cuda.device_count(), WORLD_SIZE)
    with RankPool(size, request.param) as pool:
        yield pool


def few_rows_are_enough(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dealing, "FEWEST_ROWS", 0)
    patch.setattr(dealing, "COMPARED_CHUNKS", 0)


def check_and_attend(rank: int, world_size: int, case: Case) -> Answer:
    """What is dispatched comes back, shifted or not, and lies where position ids say; then the attention."""
    group = dist.group.WORLD
    with pytest.MonkeyPatch.context() as patch:
        few_rows_are_enough(patch)
        try:
            key = key_of(case, group)
            layout = find_manager(key).layout
            assert layout.uneven_cuts is not None
            assert len(set(layout.rows_per_rank.tolist())) == 1
            x = torch.arange(case.total, device=device())
            local = dispatch(x, key, pad_value=-1)
            assert torch.equal(undispatch(local, key), x)
            assert torch.equal(undispatch(roll(local, 1, 0, key), key)[1:], x[:-1])
            real = local >= 0
            assert torch.equal(local[real], get_position_ids(key)[real])
            halves = [0, case.total // 2, case.total]
            other = make_varlen_key_for_new_mask_after_dispatch(halves, halves, key)
            assert find_manager(other).layout is layout
            return attend(case, group)
        finally:
            dist_attn_runtime_dict_mgr.clear()


def case_of(pool: RankPool, ends: list[int], *, causal: bool, degree: int = 1) -> Case:
    config = DistAttnConfig(
        overlap_config=OverlapConfig(degree=degree, min_chunk_size=16),
        runtime_config=RuntimeConfig(kernel_backend="reference", deterministic=True),
    )
    on_gpu = pool.backend == "nccl"
    return Case(
        ends[-1],
        packed.varlen(ends, causal=causal),
        pool.world_size,
        config=config,
        dtype=torch.float32 if on_gpu else torch.float64,
        max_logits=not on_gpu,
    )


@pytest.mark.parametrize("degree", [0, 1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents(pool, causal, degree):
    case = case_of(pool, ENDS, causal=causal, degree=degree)
    assert_right(case, pool.run(check_and_attend, case)[0])


@given(st.lists(st.integers(1, 300), min_size=WORLD_SIZE, max_size=30), st.booleans())
@settings(max_examples=8, deadline=None)
def test_documents_of_any_lengths(pool, lengths, causal):
    ends = np.cumsum([0, *lengths, 64 * WORLD_SIZE]).tolist()
    case = case_of(pool, ends, causal=causal)
    answer = pool.run(attend_with_few_rows, case)[0]
    assert_right(case, answer)


def attend_with_few_rows(rank: int, world_size: int, case: Case) -> Answer:
    with pytest.MonkeyPatch.context() as patch:
        few_rows_are_enough(patch)
        try:
            return attend(case, dist.group.WORLD)
        finally:
            dist_attn_runtime_dict_mgr.clear()
