# SPDX-License-Identifier: Apache-2.0
"""AttnMask against dense matrices."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.common import AttnMask, AttnMaskType, AttnRange, AttnRanges
from magi_attention.common.protocols import AttnMaskProtocol
from magi_attention.common.slices import SliceTable

SIZE = 12
row = st.tuples(st.integers(0, 7), st.integers(0, 5), st.integers(0, 7), st.integers(0, 5), st.integers(0, 3)).map(
    lambda r: (r[0], r[0] + r[1], r[2], r[2] + r[3], r[4])
)
rows = st.lists(row, max_size=4)


def dense(table, size=SIZE):
    i, j = np.mgrid[:size, :size]
    kept = np.zeros((size, size), bool)
    for q0, q1, k0, k1, kind in table:
        one = (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1)
        if kind & 1:
            one &= j <= i + (k1 - q1)
        if kind & 2:
            one &= j >= i + (k0 - q0)
        kept |= one
    return kept


def mask_of(table, size=SIZE):
    kinds = [AttnMaskType.from_int_type(r[4]) for r in table]
    q, k = AttnRanges.from_ranges([r[:2] for r in table]), AttnRanges.from_ranges([r[2:4] for r in table])
    return AttnMask.from_ranges(q, k, kinds, size, size)


@given(rows)
def test_a_mask_is_the_union_of_its_slices(table):
    mask, wanted = mask_of(table), dense(table)
    assert np.array_equal(mask.mask_flag_array, wanted)
    assert mask.mask_flag_array.dtype == np.int32
    assert mask.mask_tensor.shape == (SIZE, SIZE, 1)
    assert mask.mask_tensor.dtype == torch.int32
    assert np.array_equal(mask.mask_tensor[..., 0].numpy(), wanted)
    assert mask.area == wanted.sum()
    assert mask.is_empty() == (not wanted.any())
    assert mask.tuples() == [(AttnRange(*r[:2]), AttnRange(*r[2:4]), AttnMaskType.from_int_type(r[4])) for r in table]


@given(rows, st.integers(0, 8), st.integers(0, 4), st.integers(0, 8), st.integers(0, 4))
def test_sub_masks(table, q0, rows_kept, k0, columns_kept):
    mask = mask_of(table)
    part = AttnRange(q0, q0 + rows_kept), AttnRange(k0, k0 + columns_kept)
    wanted = dense(table)[q0 : q0 + rows_kept, k0 : k0 + columns_kept]
    assert np.array_equal(mask.make_sub_mask(*part).mask_flag_array, wanted)
    assert mask.calc_sub_area(*part) == wanted.sum()


runs = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), min_size=1, max_size=10)


@given(runs)
def test_a_matrix_with_one_run_per_row_comes_back(ends):
    matrix = np.zeros((len(ends), SIZE), np.int32)
    for i, (start, length) in enumerate(ends):
        matrix[i, start : start + length] = 1
    for given_as in (matrix, torch.from_numpy(matrix), matrix.tolist()):
        mask = AttnMask.from_mask(given_as)
        assert np.array_equal(mask.mask_flag_array, matrix)
        assert mask.slices.area() == matrix.sum()


@pytest.mark.parametrize("kind", AttnMaskType)
@pytest.mark.parametrize("box", [(0, 6, 0, 6), (2, 6, 1, 9)])
def test_a_slice_is_found_again_as_one_slice(kind, box):
    found = AttnMask.from_mask(dense([(*box, kind.to_int_type())])).tuples()
    assert found == [(AttnRange(*box[:2]), AttnRange(*box[2:]), kind)]


@given(rows, rows)
def test_equality_goes_by_the_pairs_kept(a, b):
    one, other = mask_of(a), mask_of(b)
    assert (one == other) == np.array_equal(dense(a), dense(b))
    if one == other:
        assert hash(one) == hash(other)


def test_masks_of_different_size_or_kind_differ():
    assert AttnMask.causal(4) != AttnMask.causal(5)
    assert AttnMask.causal(4) != "causal"
    whole = AttnRanges.from_ranges([(0, 4)])
    assert AttnMask.from_ranges(whole, whole, AttnMaskType.CAUSAL) == AttnMask.causal(4)
    assert AttnMask.from_ranges(whole, whole, AttnMaskType.CAUSAL, total_seqlen_q=5) != AttnMask.causal(4)


cuts = st.lists(st.integers(1, SIZE - 1), unique=True, max_size=4).map(lambda inner: [0, *sorted(inner), SIZE])
index = np.mgrid[:SIZE, :SIZE]


@given(cuts, st.booleans())
def test_varlen(cu_seqlens, causal):
    i, j = index
    document = np.searchsorted(cu_seqlens, np.arange(SIZE), side="right")
    wanted = (document[:, None] == document[None, :]) & ((j <= i) | (not causal))
    mask = AttnMask.varlen(cu_seqlens, causal)
    assert np.array_equal(mask.mask_flag_array, wanted)
    singles = len(cu_seqlens) == SIZE + 1
    assert mask.is_varlen_causal() == (causal or singles)
    assert mask.is_varlen_full() == (not causal or singles)


@given(st.integers(-1, SIZE), st.integers(-1, SIZE))
def test_sliding_window(left, right):
    i, j = index
    wanted = ((j >= i - left) | (left == -1)) & ((j <= i + right) | (right == -1))
    assert np.array_equal(AttnMask.sliding_window(SIZE, (left, right)).mask_flag_array, wanted)


@given(st.integers(1, SIZE + 1))
def test_block_causal(block):
    i, j = index
    assert np.array_equal(AttnMask.block_causal(SIZE, block).mask_flag_array, j // block <= i // block)


@given(st.integers(0, SIZE))
def test_prefix_lm(prefix):
    i, j = index
    assert np.array_equal(AttnMask.prefix_lm(SIZE, prefix).mask_flag_array, (j <= i) | (j < prefix))


@given(rows)
def test_questions_about_the_whole_mask(table):
    mask, wanted = mask_of(table), dense(table)
    assert mask.is_square()
    assert mask.is_pure_full() == wanted.all()
    assert mask.is_pure_causal() == np.array_equal(wanted, np.tri(SIZE, dtype=bool))


def test_named_masks_are_recognized():
    assert AttnMask.causal(5).is_pure_causal()
    assert AttnMask.from_mask([[1, 1, 0], [1, 1, 1]]).is_pure_causal()
    assert not AttnMask.from_mask([[1, 0, 0], [1, 1, 0]]).is_pure_causal()
    assert AttnMask.from_mask([[1, 1], [1, 1]]).is_pure_full()
    assert not AttnMask.from_mask([[1, 1, 0], [1, 1, 1]]).is_square()
    assert not AttnMask.sliding_window(5, (1, 0)).is_varlen_causal()
    assert not AttnMask.from_mask([[0, 1], [1, 0]]).is_varlen_full()
    assert isinstance(AttnMask.causal(5), AttnMaskProtocol)


@pytest.mark.parametrize(("sq", "sk"), [(3, 5), (5, 3), (4, 4)])
def test_causal_matrices(sq, sk):
    i, j = np.mgrid[:sq, :sk]
    assert np.array_equal(AttnMask.make_causal_mask(sq, sk), j <= i + sk - sq)
    top_left = AttnMask.make_causal_mask(sq, sk, align="top-left", dtype=torch.bool)
    assert np.array_equal(top_left, j <= i)
    assert top_left.dtype == torch.bool
    assert AttnMask.make_causal_mask(sq, sk).dtype == torch.int32


def test_millions_of_tokens_need_no_matrix():
    mask = AttnMask.varlen(list(range(0, 4_000_001, 4000)))
    assert mask.area == 1000 * 4000 * 4001 // 2
    assert mask.calc_sub_area(AttnRange(0, 4000), AttnRange(0, 4_000_000)) == 4000 * 4001 // 2


def test_what_a_mask_returns_is_the_callers_own():
    mask = AttnMask.causal(4)
    mask.mask_flag_array[:] = 0
    mask.mask_tensor.zero_()
    assert mask == AttnMask.causal(4)


ranges = AttnRanges.from_ranges([(0, 4)])


@pytest.mark.parametrize(
    ("mistake", "error", "words"),
    [
        (lambda: AttnMask(), RuntimeError, "from_ranges"),
        (lambda: AttnMask.from_ranges(ranges, ranges, []), ValueError, "equally long"),
        (lambda: AttnMask.from_ranges(ranges, ranges, ["causal"]), TypeError, "mask type"),
        (lambda: AttnMask.from_ranges(ranges, ranges, [7]), ValueError, "0 to 3"),
        (lambda: AttnMask.from_ranges(ranges, ranges, [0], total_seqlen_q=3), ValueError, r"\[0, 4\).*3 queries"),
        (lambda: AttnMask.from_slices(SliceTable([[-1, 2, 0, 2, 0]]), 4, 4), ValueError, r"\[-1, 2\)"),
        (lambda: AttnMask.from_mask([[1, 0, 1]]), AssertionError, "row 0 keeps several runs"),
        (lambda: AttnMask.from_mask([1, 0]), ValueError, "two dimensions"),
        (lambda: AttnMask.make_causal_mask(2, 2, align="left"), ValueError, "align"),
    ],
)
def test_mistakes(mistake, error, words):
    with pytest.raises(error, match=words):
        mistake()


def test_a_picture_shows_every_slice(tmp_path):
    table = [(0, 6, 0, 6, 1), (6, 9, 0, 9, 0), (9, 12, 3, 12, 3)]
    axes = mask_of(table).visualize(str(tmp_path / "mask.png"), title="three slices")
    (drawn,) = axes.collections
    assert len(drawn.get_paths()) == 3
    assert axes.get_title() == "three slices"
    assert (tmp_path / "mask.png").stat().st_size > 1000
    # The straight line through a diagonal's steps leaves the area as it is: half the cross product of a quadrangle's
    # diagonals.
    for one, path in zip(table, drawn.get_paths(), strict=True):
        (ax, ay), (bx, by) = path.vertices[2] - path.vertices[0], path.vertices[3] - path.vertices[1]
        assert abs(ax * by - ay * bx) / 2 == pytest.approx(dense([one]).sum())


def test_importing_the_values_is_light():
    code = "import sys, magi_attention.common.mask as m; print('matplotlib' in sys.modules, 'triton' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (shown.stdout.split(), shown.stderr) == (["False", "False"], "")
