# SPDX-License-Identifier: Apache-2.0
"""What a key holds, and what a mask, a shape or a configuration that cannot be right is told."""

import dataclasses
import itertools
import warnings

import numpy as np
import pytest
import torch

from magi_attention.api import (
    AttnMaskType,
    DispatchConfig,
    DistAttnConfig,
    GreedyOverlapAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
    SequentialDispatchAlg,
    compute_pad_size,
    dist_attn_runtime_dict_mgr,
    magi_attn_flex_key,
    magi_attn_varlen_key,
)
from magi_attention.api.checks import resolve_chunk_size
from magi_attention.common import RangeError
from magi_attention.config import LocalityDispatchAlg, RuntimeConfig
from magi_attention.plan.chunk_size import choose_chunk_size
from tests.core.api_keys import chunks, key_for, ranges

pytestmark = pytest.mark.usefixtures("empty_cache")


def test_key_of_a_padded_sequence():
    key = key_for(total=1001, q=[(0, 1001)], config=chunks(512))
    assert key.chunk_size == 126  # ceil(1001 / 8), below the 512 asked for
    assert key.pad_size == 7
    assert key.total_seqlen_q == key.total_seqlen_k == 1008
    assert key.q_ranges.to_naive_ranges() == [(0, 1001), (1001, 1008)]
    assert key.k_ranges.to_naive_ranges() == [(0, 1001), (0, 0)]
    assert key.attn_mask_type == (AttnMaskType.CAUSAL, AttnMaskType.FULL)
    assert key.slices.rows.tolist() == [[0, 1001, 0, 1001, 1], [1001, 1008, 0, 0, 0]]
    assert (key.num_heads_q, key.num_heads_kv, key.head_dim) == (4, 2, 64)
    assert (key.cp_group, key.cp_mesh, key.uneven_shard) == (None, None, False)


def test_key_of_an_uneven_shard_is_not_padded():
    key = key_for(total=1001, q=[(0, 1001)], config=chunks(100, uneven_shard=True))
    assert (key.chunk_size, key.pad_size, key.total_seqlen_q, key.uneven_shard) == (100, 0, 1001, True)
    assert len(key.q_ranges) == 1


@pytest.mark.parametrize(
    ("total", "cp_size", "limit", "chunk_size"),
    [
        (1001, 1, 512, 126),
        (1001, 1, 100, 100),
        (1001, 1, None, 126),
        (4096, 4, 512, 128),
        (4096, 4, 64, 64),
        (3, 3, 512, 1),
    ],
)
def test_chunk_size_is_bounded_by_the_least_number_of_chunks(total, cp_size, limit, chunk_size):
    assert resolve_chunk_size(total, cp_size, limit, MinHeapDispatchAlg()) == chunk_size
    if limit is not None or cp_size == 1:
        assert resolve_chunk_size(total, cp_size, limit, LocalityDispatchAlg()) == chunk_size


def test_planner_chooses_the_chunks_that_suit_it():
    assert resolve_chunk_size(1 << 20, 8, None, LocalityDispatchAlg()) == choose_chunk_size(1 << 20, 8) == 128


def test_least_number_of_chunks_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_MIN_CHUNKS_PER_RANK", "1")
    assert resolve_chunk_size(1001, 1, 512, MinHeapDispatchAlg()) == 512
    assert resolve_chunk_size(1001, 2, None, MinHeapDispatchAlg()) == 501


def test_what_the_planner_chooses_is_bounded_by_the_least_number_of_chunks(monkeypatch):
    for total, cp_size in itertools.product([*range(8, 3000, 7), 1 << 20], [2, 3, 8]):
        assert resolve_chunk_size(total, cp_size, None, LocalityDispatchAlg()) == choose_chunk_size(total, cp_size)
    monkeypatch.setenv("MAGI_ATTENTION_MIN_CHUNKS_PER_RANK", "100")
    assert resolve_chunk_size(1001, 2, None, LocalityDispatchAlg()) == 6
    assert resolve_chunk_size(1 << 20, 2, None, LocalityDispatchAlg()) == choose_chunk_size(1 << 20, 2)
    monkeypatch.setenv("MAGI_ATTENTION_MIN_CHUNKS_PER_RANK", "none")
    with pytest.raises(ValueError, match="MIN_CHUNKS_PER_RANK='none': not a whole number"):
        resolve_chunk_size(1001, 2, None, LocalityDispatchAlg())


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_a_given_chunk_size_is_kept_in_short_sequences_if_a_rank_may_have_one_chunk(monkeypatch, cp_size):
    monkeypatch.setenv("MAGI_ATTENTION_MIN_CHUNKS_PER_RANK", "1")
    totals = range(8 * cp_size, 100 * cp_size)  # as the page on torchtitan has it for a loss in 8 pieces
    assert {resolve_chunk_size(total, cp_size, 8, LocalityDispatchAlg()) for total in totals} == {8}
    monkeypatch.delenv("MAGI_ATTENTION_MIN_CHUNKS_PER_RANK")
    for total in range(60 * cp_size + 1, 1000 * cp_size):
        chunk_size = resolve_chunk_size(total, cp_size, None, LocalityDispatchAlg())
        assert (total + compute_pad_size(total, cp_size, chunk_size)) % (8 * cp_size) == 0


@pytest.mark.parametrize("total", [0, 1, 3])
def test_fewer_rows_than_ranks_are_refused(total):
    with pytest.raises(ValueError, match=f"{total} rows cannot be shared by 4 ranks") as error:
        resolve_chunk_size(total, 4, None, LocalityDispatchAlg())
    assert isinstance(error.value, AssertionError)


def test_keys_are_compared_by_value():
    key, again = key_for(), key_for()
    assert key == again
    assert hash(key) == hash(again)
    different = [
        key_for(types="full"),
        key_for(q=[(0, 99)]),
        key_for(total=101),
        key_for(num_heads_q=8),
        key_for(head_dim=128),
        key_for(config=chunks(7)),
        key_for(config=DistAttnConfig(dispatch_config=DispatchConfig(alg=SequentialDispatchAlg()))),
        key_for(config=DistAttnConfig(overlap_config=OverlapConfig(degree=0))),
        key_for(config=DistAttnConfig(runtime_config=RuntimeConfig(deterministic=True))),
        key_for(config=DistAttnConfig(runtime_config=RuntimeConfig(backward_high_precision_reduce=True))),
    ]
    assert len({key, *different}) == 1 + len(different)


def test_key_takes_the_environment_as_it_is_when_made(monkeypatch):
    before = key_for()
    monkeypatch.setenv("MAGI_ATTENTION_DETERMINISTIC_MODE", "1")
    monkeypatch.setenv("MAGI_ATTENTION_PRECISION", "fp32")
    after = key_for()
    monkeypatch.undo()
    assert (before.is_deterministic_mode_enable, before.precision) == (False, "input")
    assert (after.is_deterministic_mode_enable, after.precision) == (True, "fp32")
    assert before != after
    chosen = RuntimeConfig(deterministic=True, precision="fp32")
    assert key_for(config=DistAttnConfig(runtime_config=chosen)) == after


def test_key_is_a_copy_of_what_it_is_made_of():
    q_ranges, k_ranges = ranges((0, 96)), ranges((0, 96))
    key = key_for(total=96, q_ranges=q_ranges, k_ranges=k_ranges)
    before = hash(key), key.slices
    q_ranges[0].end = 40
    q_ranges.append(k_ranges[0])
    assert key.q_ranges.to_naive_ranges() == [(0, 96)]
    assert key == key_for(total=96, q=[(0, 96)])
    assert (hash(key.replaced()), key.slices) == before


def test_caller_s_ranges_are_not_padded():
    q_ranges = ranges((0, 100))
    assert key_for(q_ranges=q_ranges, k_ranges=q_ranges).pad_size == 4
    assert q_ranges.to_naive_ranges() == [(0, 100)]


def test_key_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        key_for().pad_size = 3


@pytest.mark.parametrize("types", ["full", AttnMaskType.FULL, ["full", AttnMaskType.FULL], ("full", "full")], ids=str)
def test_mask_types_by_name_by_member_one_or_each(types):
    key = key_for(q=[(0, 50), (50, 96)], total=96, types=types)
    assert key.attn_mask_type == (AttnMaskType.FULL,) * 2


@pytest.mark.parametrize("types", [1, [1], None, {"full"}, ["full", 0]], ids=str)
def test_mask_types_that_are_no_types_are_refused(types):
    with pytest.raises(TypeError, match="mask type") as error:
        key_for(q=[(0, 50), (50, 100)][: len(types) if isinstance(types, list) else 1], types=types)
    assert isinstance(error.value, AssertionError)


def test_unknown_mask_type_name_is_refused():
    with pytest.raises(ValueError, match="'casual' is not a mask type; known are full, causal, inv_causal, bi_causal"):
        key_for(types="casual")


MISTAKES = {
    "q after the end": (
        {"q": [(0, 101)], "k": [(0, 100)]},
        "q_ranges end at 101, after the last row of a sequence of 100",
    ),
    "k after the end": ({"k": [(0, 101)]}, "k_ranges end at 101"),
    "other number of types": ({"types": ["full", "full"]}, "2 entries for 1 q ranges"),
    "other number of k ranges": ({"k": [(0, 50), (50, 100)]}, "1 q_ranges and 2 k_ranges"),
    "cross-attention lengths": ({"total_seqlen_k": 120}, "total_seqlen_q=100 and total_seqlen_k=120 must be equal"),
    "doubly kept pair": (
        {"q": [(0, 60), (60, 100), (40, 80)], "types": ["full", "causal", "causal"]},
        r"slice 0 \(q \[0, 60\), k \[0, 60\), full\) and slice 2 \(q \[40, 80\), k \[40, 80\), causal\) keep a common",
    ),
    "heads that don't divide": ({"num_heads_q": 7}, "num_heads_q=7 must be a multiple of num_heads_kv=2"),
    "no heads": ({"num_heads_kv": 0}, "num_heads_kv=0 and head_dim=64 must be at least 1"),
    "hierarchical without a mesh": (
        {"config": DistAttnConfig(runtime_config=RuntimeConfig(hierarchical_comm=True))},
        "needs a 2-D DeviceMesh",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_value_errors_and_assertion_errors(mistake):
    arguments, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message) as error:
        key_for(**arguments)
    assert isinstance(error.value, AssertionError)
    assert not dist_attn_runtime_dict_mgr.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": []}, "q_ranges is empty"),
        ({"q": [(0, 100)], "k": []}, "k_ranges is empty"),
        ({"q": [(0, 100)], "k": [(5, 5)]}, "every slice of the mask is empty"),
        ({"total": 2**31, "total_seqlen_k": 2**31}, "a sequence of 2147483648 rows is too long"),
        ({"group": "world"}, "cp_group_or_mesh must be a ProcessGroup.*'world'"),
        ({"group": -100}, "cp_group_or_mesh must be a ProcessGroup.*-100"),
        ({"is_k_permutable": False}, "is_k_permutable=False"),
        ({"is_q_permutable": False}, "is_q_permutable=False"),
    ],
)
def test_other_mistakes_are_value_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        key_for(**arguments)


def test_ranges_must_be_attn_ranges():
    with pytest.raises(TypeError, match="q_ranges must be AttnRanges, not list"):
        key_for(q_ranges=[(0, 100)])


def test_a_range_below_zero_is_a_range_error_and_a_value_error():
    with pytest.raises(RangeError, match=r"\[-3, 100\)") as error:
        key_for(q=[(-3, 100)], k=[(0, 100)])
    assert isinstance(error.value, ValueError)


def cross_key_for(total_q=100, total_k=60, **more):
    return key_for(
        q=[(0, total_q)], k=[(0, total_k)], total_seqlen_q=total_q, total_seqlen_k=total_k, is_same_source=False, **more
    )


def test_key_of_two_sequences_pads_each():
    key = cross_key_for(1001, 60)
    assert (key.chunk_size, key.pad_size, key.total_seqlen_q) == (126, 7, 1008)
    assert (key.chunk_size_k, key.pad_size_k, key.total_seqlen_k) == (8, 4, 64)
    assert key.slices.rows.tolist() == [[0, 1001, 0, 60, 1], [1001, 1008, 0, 0, 0]]
    key = cross_key_for(96, 60)
    assert (key.pad_size, key.pad_size_k, len(key.q_ranges)) == (0, 4, 1)
    key = cross_key_for(config=chunks(5, uneven_shard=True))
    assert (key.chunk_size, key.chunk_size_k, key.pad_size_k, key.total_seqlen_k) == (5, 5, 0, 60)


def test_key_of_one_sequence_tells_the_same_of_keys_as_of_queries():
    key = key_for()
    assert (key.is_same_source, key.chunk_size_k, key.pad_size_k) == (True, key.chunk_size, key.pad_size)


def test_flags_take_part_in_the_key():
    keys = {cross_key_for(100, 100, is_q_permutable=q, is_k_permutable=k) for q in (True, False) for k in (True, False)}
    assert len({key_for(), *keys}) == 5
    assert cross_key_for(100, 100) in keys


MISTAKES_IN_FLAGS = {
    "only keys permuted": ({"is_q_permutable": False}, "the same rows, so that none is permuted without the other"),
    "only queries permuted": ({"is_k_permutable": False}, "the same rows, so that none is permuted without the other"),
    "neither permuted": (
        {"is_q_permutable": False, "is_k_permutable": False},
        r"choose DispatchConfig\(alg=SequentialDispatchAlg\(\)\)",
    ),
    "other length of keys": ({"total_seqlen_k": 120}, "different sequences, set is_same_source=False"),
    "keys after their end": (
        {"is_same_source": False, "total_seqlen_k": 60},
        "k_ranges end at 100, after the last row of a sequence of 60",
    ),
    "no keys": ({"is_same_source": False, "total_seqlen_k": 0, "k": [(0, 0)]}, "0 rows cannot be shared by 1 ranks"),
}


@pytest.mark.parametrize("mistake", MISTAKES_IN_FLAGS)
def test_flags_that_make_no_sense_are_refused_with_a_reason(mistake):
    arguments, message = MISTAKES_IN_FLAGS[mistake]
    with pytest.raises(ValueError, match=message):
        key_for(**arguments)


def test_fields_of_a_key_of_two_sequences_need_chunks_of_keys():
    with pytest.raises(ValueError, match="chunk_size_k is 0"):
        cross_key_for().replaced(chunk_size_k=0)


def test_greedy_overlap_is_not_implemented():
    config = DistAttnConfig(overlap_config=OverlapConfig(degree=2, alg=GreedyOverlapAlg()))
    with pytest.raises(NotImplementedError, match="GreedyOverlapAlg"):
        key_for(config=config)


def test_contradictory_flags_from_the_environment(monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_NATIVE_GRPCOLL", "1")
    monkeypatch.setenv("MAGI_ATTENTION_DETERMINISTIC_MODE", "1")
    with pytest.raises(AssertionError, match="native_grpcoll and deterministic"):
        key_for()


@pytest.mark.parametrize("how", ["config", "environment"])
def test_overlap_check_can_be_skipped(how, monkeypatch):
    config = DistAttnConfig()
    if how == "config":
        config = DistAttnConfig(runtime_config=RuntimeConfig(skip_overlap_check=True))
    else:
        monkeypatch.setenv("MAGI_ATTENTION_SKIP_OVERLAP_CHECK", "1")
    assert len(key_for(total=96, q=[(0, 60), (40, 96)], types="full", config=config).slices) == 2


def test_queries_may_be_shared_by_slices_with_different_keys():
    key = key_for(total=96, q=[(0, 96), (0, 96)], k=[(0, 40), (40, 96)], types="full")
    assert key.slices.area() == 96 * 96


def test_deprecated_chunk_size():
    with pytest.warns(DeprecationWarning, match="chunk_size is deprecated"):
        key = key_for(chunk_size=7)
    assert key.chunk_size == 7
    with pytest.warns(DeprecationWarning, match="chunk_size"):
        assert key_for(config=chunks(7), chunk_size=7) == key_for(config=chunks(7))
    with (
        pytest.warns(DeprecationWarning, match="chunk_size"),
        pytest.raises(ValueError, match="chunk_size=8 contradicts"),
    ):
        key_for(config=chunks(7), chunk_size=8)


def test_deprecated_pad_size_is_ignored():
    with pytest.warns(DeprecationWarning, match="pad_size is deprecated"):
        assert key_for(pad_size=28) == key_for()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        key_for(pad_size=0)


@pytest.mark.parametrize(
    "make_key",
    [
        lambda: magi_attn_varlen_key([0, 96], [0, 96], 4, 2, 64, 28, None, chunk_size=7),
        lambda: magi_attn_flex_key(ranges((0, 96)), ranges((0, 96)), "full", 96, 96, 4, 2, 64, 28, None, chunk_size=7),
    ],
)
def test_deprecated_arguments_are_told_of_at_the_line_that_passes_them(make_key):
    with pytest.warns(DeprecationWarning, match="is deprecated") as told:
        make_key()
    assert [each.filename for each in told] == [__file__] * 2


@pytest.mark.parametrize("name", ["total_seqlen_q", "total_seqlen_k", "num_heads_q", "num_heads_kv", "head_dim"])
@pytest.mark.parametrize("count", [64.0, "64", True, torch.tensor(64.0), torch.tensor([64, 64])])
def test_counts_must_be_integers(name, count):
    with pytest.raises(TypeError, match=name):
        key_for(64, q=((0, 64),), **{name: count})


def test_counts_may_be_integers_of_any_kind():
    expected = key_for(64, q=((0, 64),))
    for kind in (np.int32, torch.tensor):
        assert key_for(kind(64), q=((0, 64),), num_heads_q=kind(4), head_dim=kind(64)) == expected
