# SPDX-License-Identifier: Apache-2.0
"""The mask and padding helpers against the formulas that define them."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.api.functools import (
    apply_padding,
    compute_pad_size,
    infer_attn_mask_from_cu_seqlens,
    infer_attn_mask_from_sliding_window,
    infer_varlen_mask_from_batch,
    pad_at_dim,
    squash_batch_dim,
    unpad_at_dim,
)
from magi_attention.common import AttnMaskType, AttnRange, AttnRanges
from magi_attention.common import bands as band

FULL, CAUSAL, INVCAUSAL, BICAUSAL = AttnMaskType


def kept_by_slices(q_ranges, k_ranges, types, total_q, total_k):
    """How many slices keep each pair, from the definition of the four types."""
    i, j = np.indices((total_q, total_k))
    count = np.zeros((total_q, total_k), int)
    for q, k, kind in zip(q_ranges, k_ranges, types, strict=True):
        kept = (i >= q.start) & (i < q.end) & (j >= k.start) & (j < k.end)
        if kind in (CAUSAL, BICAUSAL):
            kept &= j <= i + k.end - q.end
        if kind in (INVCAUSAL, BICAUSAL):
            kept &= j >= i + k.start - q.start
        count += kept
    return count


def kept_by_window(q0, q1, k0, k1, window, total_q, total_k, num_global=0):
    i, j = np.indices((total_q, total_k))
    (left, right), off, widest = window, k1 - q1, k1 - k0 - 1
    kept = np.ones((total_q, total_k), bool)
    if left != -1 and left < widest:
        kept &= (j >= i + off - left) | (j < k0 + num_global)
    if right != -1 and right < widest:
        kept &= j <= i + off + right
    return (kept & (i >= q0) & (i < q1) & (j >= k0) & (j < k1)).astype(int)


@pytest.mark.parametrize("window", list(itertools.product([-1, 0, 1, 3, 9], repeat=2)), ids=str)
def test_sliding_window_keeps_what_its_formula_says(window):
    for sq, sk, q0, k0 in itertools.product([1, 2, 5, 8], [1, 3, 5, 8], [0, 3], [0, 2]):
        slices = infer_attn_mask_from_sliding_window(AttnRange(q0, q0 + sq), AttnRange(k0, k0 + sk), window)
        expected = kept_by_window(q0, q0 + sq, k0, k0 + sk, window, 12, 12)
        np.testing.assert_array_equal(kept_by_slices(*slices, 12, 12), expected, str((sq, sk)))
        assert len(slices[2]) <= 3
        assert slices[0].is_sorted()
        assert all(q.seqlen and k.seqlen for q, k in zip(*slices[:2], strict=True))


def test_sliding_window_of_a_long_document():
    q_ranges, k_ranges, types = infer_attn_mask_from_sliding_window(AttnRange(0, 4096), AttnRange(0, 4096), (1023, 0))
    assert types == [CAUSAL, BICAUSAL]
    assert q_ranges.to_naive_ranges() == [(0, 1023), (1023, 4096)]
    assert k_ranges.to_naive_ranges() == [(0, 1023), (0, 4096)]


def test_sliding_window_is_one_of_ranges():
    with pytest.raises(TypeError, match=r"k_range must be an AttnRange\(start, end\), not \(0, 4\)"):
        infer_attn_mask_from_sliding_window(AttnRange(0, 4), (0, 4), (1, 0))


@pytest.mark.parametrize("window", [(1,), (1, 2, 3), (-2, 0), (0, -5)])
def test_sliding_window_refuses_what_is_no_window(window):
    with pytest.raises(ValueError, match="window_size") as error:
        infer_attn_mask_from_sliding_window(AttnRange(0, 4), AttnRange(0, 4), window)
    assert isinstance(error.value, AssertionError)


@st.composite
def documents(draw):
    lengths = st.lists(st.integers(0, 7), min_size=1, max_size=4)
    q = draw(lengths)
    k = draw(st.one_of(st.just(q), st.lists(st.integers(0, 7), min_size=len(q), max_size=len(q))))
    return [0, *itertools.accumulate(q)], [0, *itertools.accumulate(k)]


@given(documents(), st.tuples(*[st.integers(-1, 8)] * 2), st.integers(0, 9))
@settings(max_examples=200)
def test_windows_in_documents_with_global_keys(cu_seqlens, window, num_global):
    cu_q, cu_k = cu_seqlens
    *slices, total_q, total_k = infer_attn_mask_from_cu_seqlens(
        cu_q, cu_k, window_size=window, global_window_size=num_global
    )
    assert (total_q, total_k) == (cu_q[-1], cu_k[-1])
    expected = sum(
        kept_by_window(*q, *k, window, total_q, total_k, num_global)
        for q, k in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True)
    )
    np.testing.assert_array_equal(kept_by_slices(*slices, total_q, total_k), expected)


def test_global_keys_stay_inside_the_right_window():
    *slices, _, _ = infer_attn_mask_from_cu_seqlens([0, 6], [0, 6], window_size=(1, 0), global_window_size=2)
    row, column = np.indices((6, 6))
    expected = ((column >= row - 1) & (column <= row)) | (column < np.minimum(2, row + 1))
    np.testing.assert_array_equal(kept_by_slices(*slices, 6, 6), expected)


@pytest.mark.parametrize(("causal", "kind"), [(True, CAUSAL), (False, FULL)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_documents_without_window(causal, kind, dtype):
    cu_seqlens = torch.tensor([0, 3, 3, 8], dtype=dtype)
    q_ranges, k_ranges, types, *totals = infer_attn_mask_from_cu_seqlens(cu_seqlens, cu_seqlens, causal)
    assert q_ranges.to_naive_ranges() == k_ranges.to_naive_ranges() == [(0, 3), (3, 3), (3, 8)]
    assert types == [kind] * 3
    assert totals == [8, 8]


def test_cu_seqlens_changed_in_place_give_a_new_answer():
    cu_seqlens = torch.tensor([0, 4, 8])
    first = infer_attn_mask_from_cu_seqlens(cu_seqlens, cu_seqlens)
    cu_seqlens[1] = 6
    second = infer_attn_mask_from_cu_seqlens(cu_seqlens, cu_seqlens)
    assert first[0].to_naive_ranges() == [(0, 4), (4, 8)]
    assert second[0].to_naive_ranges() == [(0, 6), (6, 8)]


@pytest.mark.parametrize("window", [[2, 0], np.array([2, 0]), torch.tensor([2, 0])], ids=["list", "numpy", "tensor"])
def test_windows_may_be_of_any_kind(window):
    expected = infer_attn_mask_from_cu_seqlens([0, 8], [0, 8], False, (2, 0))
    assert infer_attn_mask_from_cu_seqlens([0, 8], [0, 8], False, window) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0, 4], [0, 4], True, (2, 0)), ValueError, "causal=True excludes"),
        (([0, 4], [0, 4], False, (2,)), ValueError, "window_size"),
        (([0, 4], [0, 4], False, 2), TypeError, r"window_size must be \(left, right\), not 2"),
        (([0, 4], [0, 4], False, (2, 0), -1), ValueError, "global_window_size is -1"),
        (([0, 4], [0, 2, 4]), ValueError, "2 entries and cu_seqlens_k 3"),
        (([1, 4], [0, 4]), ValueError, r"cu_seqlens_q is \[1, 4\]"),
        (([0, 4], [0, 5, 4]), ValueError, r"cu_seqlens_k is \[0, 5, 4\]"),
        (([0], [0]), ValueError, "cu_seqlens_q"),
        ((torch.zeros(2, 2, dtype=torch.int32), [0, 4]), TypeError, "1-D and integer"),
        ((torch.zeros(2), [0, 4]), TypeError, "torch.float32"),
    ],
)
def test_bad_cu_seqlens_are_refused(arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        infer_attn_mask_from_cu_seqlens(*arguments)
    assert isinstance(raised.value, AssertionError)


def test_varlen_mask_from_batch():
    cu_q, cu_k = infer_varlen_mask_from_batch(3, 5)
    assert cu_q is cu_k
    assert cu_q.dtype == torch.int32
    assert cu_q.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert cu_q.tolist() == [0, 5, 10, 15]
    assert infer_varlen_mask_from_batch(2, 4, device="cpu")[0].device.type == "cpu"
    assert infer_varlen_mask_from_batch(0, 4)[0].tolist() == [0]
    for sizes, message in (((-2, 50), "not be negative"), ((2, -1), "not be negative"), ((3, 2**30), "are too long")):
        with pytest.raises(ValueError, match=message):
            infer_varlen_mask_from_batch(*sizes)


@given(st.integers(0, 200), st.integers(1, 8), st.integers(1, 20))
def test_pad_size_is_the_smallest_that_fits(total, cp_size, chunk_size):
    fitting = (pad for pad in itertools.count() if (total + pad) % (chunk_size * cp_size) == 0)
    assert compute_pad_size(total, cp_size, chunk_size) == next(fitting)


@pytest.mark.parametrize("sizes", [(0, 4), (2, 0)])
def test_pad_size_needs_positive_sizes(sizes):
    with pytest.raises(ValueError, match="must be positive"):
        compute_pad_size(10, *sizes)


def test_squash_batch_dim():
    x = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(squash_batch_dim(x), x.reshape(6, 4))
    assert torch.equal(squash_batch_dim(x[..., 0]), x.reshape(6, 4)[:, 0])
    with pytest.raises(ValueError, match=r"\(3,\)"):
        squash_batch_dim(torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pad_and_unpad_one_dim(dim, side, dtype):
    x = torch.ones(2, 3, 4, dtype=dtype)
    value = 1 if dtype == torch.bool else -100
    padded = pad_at_dim(x, dim, 5, value=value, side=side)
    assert padded.dtype == dtype
    assert padded.shape[dim] == x.shape[dim] + 5
    start = 5 if side == "left" else 0
    assert torch.equal(padded.narrow(dim, start, x.shape[dim]), x)
    assert (padded.narrow(dim, 0 if side == "left" else x.shape[dim], 5) == value).all()
    if side == "right":
        assert torch.equal(unpad_at_dim(padded, dim, 5), x)


def test_padding_passes_gradients():
    x = torch.randn(3, 2, requires_grad=True)
    weight = torch.randn(3, 4)
    (pad_at_dim(x, 1, 2) * weight).sum().backward()
    assert torch.equal(x.grad, weight[:, :2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_padding_under_autocast_of_another_dtype(dtype):
    x = torch.ones(2, 3).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        padded = pad_at_dim(x, 1, 1)
    assert padded.dtype == dtype
    assert padded.float().tolist() == [[1, 1, 1, 0]] * 2


@pytest.mark.parametrize(
    "call",
    [
        lambda x: pad_at_dim(x, -1, 2),
        lambda x: pad_at_dim(x, 2, 2),
        lambda x: pad_at_dim(x, 0, -1),
        lambda x: pad_at_dim(x, 0, 1, side="top"),
        lambda x: unpad_at_dim(x, -1, 1),
        lambda x: unpad_at_dim(x, 0, 4),
    ],
)
def test_bad_padding_is_refused(call):
    with pytest.raises(ValueError, match=r"dim is|pad_size is|side is"):
        call(torch.zeros(3, 2))


def test_apply_padding_leaves_its_arguments_alone():
    q_ranges, k_ranges = AttnRanges.from_ranges([(0, 10)]), AttnRanges.from_ranges([(0, 10)])
    types = [CAUSAL]
    padded = apply_padding(q_ranges, k_ranges, types, 10, 6)
    assert padded[0].to_naive_ranges() == [(0, 10), (10, 16)]
    assert padded[1].to_naive_ranges() == [(0, 10), (0, 0)]
    assert padded[2] == [CAUSAL, FULL]
    assert (len(q_ranges), len(k_ranges), types) == (1, 1, [CAUSAL])
    padded[0][0].end = 5
    assert q_ranges[0].end == 10


def test_windows_of_many_documents_are_made_at_once(monkeypatch):
    calls, whole = [], band.slices_from_bands

    def counted(bands):
        calls.append(len(bands))
        return whole(bands)

    monkeypatch.setattr(band, "slices_from_bands", counted)
    lengths = [3, 0, 1, 40, 7, 2] * 20
    ends = [0, *itertools.accumulate(lengths)]
    *mask, total_q, total_k = infer_attn_mask_from_cu_seqlens(ends, ends, window_size=(4, 10**30))
    assert calls == [2 * len(lengths)]
    assert (total_q, total_k) == (ends[-1], ends[-1])
    alone = [
        infer_attn_mask_from_sliding_window(AttnRange(*document), AttnRange(*document), (4, 10**30))
        for document in itertools.pairwise(ends)
    ]
    for of_all, of_each in zip(mask, zip(*alone, strict=True), strict=True):
        assert list(of_all) == list(itertools.chain.from_iterable(of_each))
