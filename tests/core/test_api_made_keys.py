# SPDX-License-Identifier: Apache-2.0
"""Keys made of the ends of documents, and keys of new masks over layouts that exist."""

import pytest
import torch
from torch.utils.data import DataLoader

from magi_attention.api import (
    AttnMaskType,
    DispatchConfig,
    DistAttnConfig,
    MinHeapDispatchAlg,
    OverlapConfig,
    clear_cache,
    dist_attn_runtime_dict_mgr,
    magi_attn_varlen_dispatch,
    magi_attn_varlen_key,
    make_flex_key_for_new_mask_after_dispatch,
    make_varlen_key_for_new_mask_after_dispatch,
)
from magi_attention.config import RuntimeConfig
from magi_attention.dist_attn_runtime_mgr import init_dist_attn_runtime_mgr
from tests.core.api_keys import chunks, key_for, ranges

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.mark.parametrize("as_tensor", [True, False])
def test_varlen_key_is_the_flex_key_of_its_documents(as_tensor):
    cu_seqlens = [0, 30, 30, 100]
    cu = torch.tensor(cu_seqlens, dtype=torch.int32) if as_tensor else cu_seqlens
    causal = magi_attn_varlen_key(cu, cu, 4, 2, 64, 0, None, causal=True)
    assert causal == key_for(q=[(0, 30), (30, 30), (30, 100)], types="causal")
    full = magi_attn_varlen_key(cu, cu, 4, 2, 64, 0, None)
    assert full.attn_mask_type[0] is AttnMaskType.FULL
    window = magi_attn_varlen_key(cu, cu, 4, 2, 64, 0, None, window_size=(3, 0))
    assert window.slices.area() == sum(min(row + 1, 4) for length in (30, 70) for row in range(length))


def test_varlen_key_refuses_causal_with_a_window():
    with pytest.raises(AssertionError, match="causal=True excludes"):
        magi_attn_varlen_key([0, 8], [0, 8], 4, 2, 64, 0, None, causal=True, window_size=(2, 0))


def test_varlen_key_refuses_other_lengths_of_keys():
    with pytest.raises(ValueError, match="must be equal in self-attention"):
        magi_attn_varlen_key([0, 8], [0, 9], 4, 2, 64, 0, None)


VARLEN = ([0, 30, 100], [0, 40, 60], 4, 2, 64, 0, None)


def test_varlen_key_of_two_sequences_is_the_flex_key_of_its_documents():
    key = magi_attn_varlen_key(*VARLEN, is_same_source=False, is_k_permutable=False)
    documents = {"q": [(0, 30), (30, 100)], "k": [(0, 40), (40, 60)], "types": "full"}
    assert key == key_for(**documents, total_seqlen_k=60, is_same_source=False, is_k_permutable=False)
    with pytest.warns(DeprecationWarning, match="magi_attn_varlen_dispatch"):
        x, dispatched = magi_attn_varlen_dispatch(torch.zeros(100, 2), *VARLEN, is_same_source=False)
    assert (len(x), dispatched) == (100 + dispatched.pad_size, magi_attn_varlen_key(*VARLEN, is_same_source=False))


def test_varlen_key_refuses_flags_that_make_no_sense():
    with pytest.raises(ValueError, match="set both, or is_same_source=False"):
        magi_attn_varlen_key([0, 8], [0, 8], 4, 2, 64, 0, None, is_k_permutable=False)


def test_new_mask_between_two_layouts():
    decoder, encoder = key_for(), key_for(q=[(0, 61)], total_seqlen_q=61, total_seqlen_k=61)
    cross = make_varlen_key_for_new_mask_after_dispatch([0, 30, 100], [0, 40, 61], decoder, key_for_kv_dispatch=encoder)
    assert not cross.is_same_source
    assert (cross.total_seqlen_q, cross.pad_size, cross.chunk_size) == (
        decoder.total_seqlen_q, decoder.pad_size, decoder.chunk_size
    )  # fmt: skip
    assert (cross.total_seqlen_k, cross.pad_size_k, cross.chunk_size_k) == (
        encoder.total_seqlen_q, encoder.pad_size, encoder.chunk_size
    )  # fmt: skip
    managers = [dist_attn_runtime_dict_mgr[key] for key in (decoder, encoder, cross)]
    assert managers[2].layout is managers[0].layout
    assert managers[2].key_layout is managers[1].layout
    again = make_varlen_key_for_new_mask_after_dispatch([0, 30, 100], [0, 40, 61], cross)
    assert again is cross
    own = magi_attn_varlen_key([0, 30, 100], [0, 40, 61], 8, 2, 64, 0, None, is_same_source=False)
    assert own != cross


def test_new_mask_between_two_layouts_of_one_sequence_is_self_attention():
    decoder, encoder = key_for(), key_for(q=[(0, 61)], total_seqlen_q=61, total_seqlen_k=61)
    one = (ranges((0, 100)), ranges((0, 100)), "full")
    cross = make_flex_key_for_new_mask_after_dispatch(
        ranges((0, 9)), ranges((0, 9)), "full", decoder, key_for_kv_dispatch=encoder
    )
    expected = make_flex_key_for_new_mask_after_dispatch(*one, decoder)
    assert expected.is_same_source
    for queries, keys in ((decoder, decoder), (cross, decoder), (expected, decoder)):
        assert make_flex_key_for_new_mask_after_dispatch(*one, queries, key_for_kv_dispatch=keys) is expected
    backwards = make_flex_key_for_new_mask_after_dispatch(
        ranges((0, 61)), ranges((0, 100)), "full", encoder, key_for_kv_dispatch=decoder
    )
    assert (backwards.total_seqlen_q, backwards.total_seqlen_k) == (encoder.total_seqlen_q, decoder.total_seqlen_q)


def test_new_mask_between_two_layouts_is_checked():
    decoder, encoder = key_for(), key_for(q=[(0, 61)], total_seqlen_q=61, total_seqlen_k=61)
    with pytest.raises(ValueError, match="k_ranges end at 62, after the last row of a sequence of 61"):
        make_flex_key_for_new_mask_after_dispatch(
            ranges((0, 62)), ranges((0, 62)), "full", decoder, key_for_kv_dispatch=encoder
        )
    clear_cache()
    decoder = key_for()
    with pytest.raises(ValueError, match="does not exist"):
        make_flex_key_for_new_mask_after_dispatch(
            ranges((0, 9)), ranges((0, 9)), "full", decoder, key_for_kv_dispatch=encoder
        )


def test_new_mask_keeps_the_layout():
    old = key_for(config=chunks(8, alg=MinHeapDispatchAlg()))
    new = make_flex_key_for_new_mask_after_dispatch(ranges((0, 60)), ranges((20, 80)), "full", old)
    for name in (
        "total_seqlen_q",
        "total_seqlen_k",
        "pad_size",
        "chunk_size",
        "cp_group",
        "uneven_shard",
        "num_heads_q",
    ):
        assert getattr(new, name) == getattr(old, name)
    assert new.slices.rows.tolist() == [[0, 60, 20, 80, 0], [100, 104, 0, 0, 0]]
    assert new.dist_attn_config.dispatch_config == old.dist_attn_config.dispatch_config
    managers = [dist_attn_runtime_dict_mgr[key] for key in (old, new)]
    assert managers[0].layout is managers[1].layout


def test_new_mask_takes_overlap_but_not_dispatch_from_a_new_config():
    old = key_for(config=chunks(5))
    given = DistAttnConfig(
        dispatch_config=DispatchConfig(chunk_size=2),
        overlap_config=OverlapConfig(degree=0),
        runtime_config=RuntimeConfig(deterministic=True),
    )
    new = make_varlen_key_for_new_mask_after_dispatch([0, 50, 100], [0, 50, 100], old, dist_attn_config=given)
    assert new.dist_attn_config.dispatch_config == old.dist_attn_config.dispatch_config
    assert new.dist_attn_config.overlap_config == given.overlap_config
    assert new.is_deterministic_mode_enable
    heads = make_flex_key_for_new_mask_after_dispatch(
        ranges((0, 9)), ranges((0, 9)), "causal", old, num_heads_q=16, num_heads_kv=8, head_dim=32
    )
    assert (heads.num_heads_q, heads.num_heads_kv, heads.head_dim) == (16, 8, 32)


def test_new_mask_never_meets_the_same_mask_with_its_own_layout():
    first, own = key_for(q=[(0, 50)]), key_for(q=[(0, 20)])
    shared = make_flex_key_for_new_mask_after_dispatch(ranges((0, 20)), ranges((0, 20)), "causal", first)
    assert shared != own
    assert dist_attn_runtime_dict_mgr[shared].layout is dist_attn_runtime_dict_mgr[first].layout
    third = make_flex_key_for_new_mask_after_dispatch(ranges((0, 20)), ranges((0, 20)), "causal", shared)
    assert third == shared


@pytest.mark.parametrize(
    ("q", "types", "error", "message"),
    [
        ([(0, 101)], "full", ValueError, "q_ranges end at 101, after the last row of a sequence of 100"),
        ([(0, 50), (30, 60)], "full", ValueError, "slice 0 .* and slice 1 .* keep a common"),
        ([(0, 50)], ["full", "full"], ValueError, "2 entries for 1"),
        ([(0, 50)], 3, TypeError, "mask type"),
    ],
)
def test_new_mask_is_checked(q, types, error, message):
    old = key_for()
    with pytest.raises(error, match=message):
        make_flex_key_for_new_mask_after_dispatch(ranges(*q), ranges(*q), types, old)


def test_the_config_of_a_key_is_no_part_of_one():
    old, part, message = key_for(), OverlapConfig(degree=2), "dist_attn_config must be a DistAttnConfig, not OverlapC"
    with pytest.raises(TypeError, match=message):
        key_for(dist_attn_config=part)
    with pytest.raises(TypeError, match=message):
        make_flex_key_for_new_mask_after_dispatch(ranges((0, 9)), ranges((0, 9)), "full", old, dist_attn_config=part)
    with pytest.raises(TypeError, match=message):
        make_varlen_key_for_new_mask_after_dispatch([0, 100], [0, 100], old, dist_attn_config=part)


def test_new_mask_needs_a_living_key():
    old = key_for()
    clear_cache()
    with pytest.raises(ValueError, match="does not exist"):
        make_flex_key_for_new_mask_after_dispatch(ranges((0, 9)), ranges((0, 9)), "causal", old)


@pytest.mark.parametrize("types", [AttnMaskType.CAUSAL, "causal", ["causal", AttnMaskType.CAUSAL]])
def test_managers_take_mask_types_as_keys_do(types):
    mask = ranges((0, 30), (30, 100)), ranges((0, 30), (30, 100))
    manager = init_dist_attn_runtime_mgr(*mask, types, 100, 100, 4, 2, 64, 10, None)
    assert manager.key.attn_mask_type == (AttnMaskType.CAUSAL, AttnMaskType.CAUSAL)


@pytest.mark.parametrize(
    ("types", "message"), [("casual", "known are full"), ([1, 1], "or its name"), (["full"], "1 ")]
)
def test_managers_refuse_what_are_no_mask_types(types, message):
    mask = ranges((0, 30), (30, 100)), ranges((0, 30), (30, 100))
    with pytest.raises((ValueError, TypeError), match=message):
        init_dist_attn_runtime_mgr(*mask, types, 100, 100, 4, 2, 64, 10, None)


def make_in_a_worker(maker):
    """Make a key while the samples of a data loader are put together in another process."""

    def collate(samples):
        maker([0, 30, 100])
        return samples

    return list(DataLoader([0, 1], collate_fn=collate, num_workers=1, multiprocessing_context="fork", timeout=60))


def test_workers_of_data_loaders_make_no_keys():
    """A forked one would share the rank's store, and could not hand its key over."""
    old = key_for()
    for maker in (
        lambda cu_seqlens: magi_attn_varlen_key(cu_seqlens, cu_seqlens, 4, 2, 64, 0, None),
        lambda cu_seqlens: make_varlen_key_for_new_mask_after_dispatch(cu_seqlens, cu_seqlens, old),
        lambda cu_seqlens: key_for(),  # found again, if it were not for the worker
    ):
        with pytest.raises(RuntimeError, match="a worker process of a data loader can't make keys"):
            make_in_a_worker(maker)
        maker([0, 30, 100])
