# SPDX-License-Identifier: Apache-2.0
"""Bands against dense matrices written down from their definition."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.common import bands as band

SIZE = 20  # positions that the dense matrices show, from -ORIGIN on
ORIGIN = 4

row = st.tuples(
    st.integers(-2, 7), st.integers(0, 6), st.integers(-2, 7), st.integers(0, 6), st.integers(-9, 9), st.integers(-3, 9)
).map(lambda r: (r[0], r[0] + r[1], r[2], r[2] + r[3], r[4], r[4] + r[5]))
some_bands = st.lists(row, min_size=1, max_size=5).map(lambda rows: np.array(rows, np.int64))


def dense(one):
    q0, q1, k0, k1, d0, d1 = (int(x) for x in one)
    i, j = np.mgrid[-ORIGIN : SIZE - ORIGIN, -ORIGIN : SIZE - ORIGIN]
    return (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1) & (d0 <= j - i) & (j - i <= d1)


def dense_slice(one):
    """The definition of the four types, in terms of the slice's corners."""
    q0, q1, k0, k1, kind = (int(x) for x in one)
    i, j = np.mgrid[-ORIGIN : SIZE - ORIGIN, -ORIGIN : SIZE - ORIGIN]
    kept = (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1)
    if kind in (band.CAUSAL, band.BICAUSAL):
        kept &= j <= i + (k1 - q1)
    if kind in (band.INVCAUSAL, band.BICAUSAL):
        kept &= j >= i + (k0 - q0)
    return kept


slice_row = st.tuples(
    st.integers(-2, 6), st.integers(0, 6), st.integers(-2, 6), st.integers(0, 6), st.integers(0, 3)
).map(lambda r: (r[0], r[0] + r[1], r[2], r[2] + r[3], r[4]))


@given(st.lists(slice_row, min_size=1, max_size=4))
def test_slices_of_all_types_become_the_bands_they_mean(rows):
    for one, converted in zip(rows, band.bands_from_slices(np.array(rows, np.int64)), strict=True):
        assert np.array_equal(dense(converted), dense_slice(one))


@given(some_bands)
def test_shrinking_trims_to_what_is_kept_and_drops_what_keeps_nothing(bands):
    trimmed, source = band.shrink(bands)
    assert source.tolist() == [n for n, one in enumerate(bands) if dense(one).any()]
    for one, n in zip(trimmed, source, strict=True):
        kept = dense(one)
        assert np.array_equal(kept, dense(bands[n]))
        rows, columns = np.nonzero(kept)
        tight = [rows.min(), rows.max() + 1, columns.min(), columns.max() + 1]
        assert one[:4].tolist() == [x - ORIGIN for x in tight]
        assert one[4:].tolist() == [(columns - rows).min(), (columns - rows).max()]


@given(some_bands)
def test_area_counts_the_pairs(bands):
    assert band.area(bands).tolist() == [dense(one).sum() for one in bands]


@given(some_bands, st.integers(-6, 14))
def test_area_above_counts_the_pairs_of_the_first_rows(bands, stop):
    wanted = [dense(one)[: max(stop + ORIGIN, 0)].sum() for one in bands]
    assert band.area_above(bands, np.full(len(bands), stop)).tolist() == wanted


@given(some_bands, st.integers(-4, 9), st.integers(0, 6))
def test_clipping_keeps_the_rows_or_columns_inside(bands, start, length):
    inside = np.zeros(SIZE, bool)
    inside[max(start + ORIGIN, 0) : start + length + ORIGIN] = True
    for one, rows, columns in zip(
        bands,
        band.clip(bands, band.Q0, start, start + length),
        band.clip(bands, band.K0, start, start + length),
        strict=True,
    ):
        assert np.array_equal(dense(rows), dense(one) & inside[:, None])
        assert np.array_equal(dense(columns), dense(one) & inside[None, :])


@given(some_bands, st.integers(-2, 1), st.integers(-2, 1))
def test_shifting_moves_every_pair(bands, rows, columns):
    for one, moved in zip(bands, band.shift(bands, rows, columns), strict=True):
        i, j = np.nonzero(dense(one))
        assert set(zip(*np.nonzero(dense(moved)), strict=True)) == set(zip(i + rows, j + columns, strict=True))


@given(some_bands)
def test_transposing_swaps_queries_and_keys(bands):
    for one, swapped in zip(bands, band.transpose(bands), strict=True):
        assert np.array_equal(dense(swapped), dense(one).T)


@given(some_bands)
def test_a_band_becomes_at_most_three_disjoint_slices(bands):
    rows, source = band.slices_from_bands(bands)
    assert (np.diff(source) >= 0).all()
    for n, one in enumerate(bands):
        pieces = rows[source == n]
        assert len(pieces) <= 3
        cover = sum((dense_slice(piece).astype(int) for piece in pieces), np.zeros((SIZE, SIZE), int))
        assert np.array_equal(cover, dense(one).astype(int))
        assert (pieces[1:, 0] == pieces[:-1, 1]).all()  # top to bottom, without a gap
        assert all(dense_slice(piece).any() for piece in pieces)


@given(slice_row)
def test_a_slice_stays_one_slice(one):
    rows, _ = band.slices_from_bands(band.bands_from_slices(np.array([one], np.int64)))
    assert len(rows) == int(dense_slice(one).any())


def test_areas_of_long_sequences_are_exact():
    n = 1 << 24
    bands = band.bands_from_slices(np.array([[0, n, 0, n, kind] for kind in range(4)], np.int64))
    assert band.area(bands).tolist() == [n * n, n * (n + 1) // 2, n * (n + 1) // 2, n]


def test_no_bands_at_all():
    none = band.empty_bands()
    assert none.shape == (0, 6)
    assert band.area(none).tolist() == []
    assert band.shrink(none)[0].shape == (0, 6)
    assert band.slices_from_bands(none)[0].shape == (0, 5)
