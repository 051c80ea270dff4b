# SPDX-License-Identifier: Apache-2.0
"""Bands: boxes cut by two diagonals, the form in which attention slices are clipped, measured and compared.

A band is a row ``(q0, q1, k0, k1, d0, d1)`` of an ``(n, 6)`` int64 array. It keeps the pairs ``(i, j)`` with
``q0 <= i < q1``, ``k0 <= j < k1`` and ``d0 <= j - i <= d1``. Unlike the four slice types, bands are closed
under every cut by rows or columns, so no piece ever has to be split.
"""

import numpy as np
from numpy.typing import NDArray

Bands = NDArray[np.int64]
Column = NDArray[np.int64]

Q0, Q1, K0, K1, D0, D1 = range(6)

# Beyond any diagonal of a real mask, and far enough from the int64 limits that sums cannot overflow.
UNBOUNDED = np.int64(1) << 40

FULL, CAUSAL, INVCAUSAL, BICAUSAL = range(4)


def empty_bands() -> Bands:
    """No bands: an array of shape ``(0, 6)``."""
    return np.empty((0, 6), np.int64)


def bands_from_slices(rows: NDArray[np.int64]) -> Bands:
    """Convert ``(n, 5)`` slices ``(q0, q1, k0, k1, type)`` to bands, row by row."""
    q0, q1, k0, k1, kind = rows.T
    lower = np.where(kind & INVCAUSAL, k0 - q0, -UNBOUNDED)
    upper = np.where(kind & CAUSAL, k1 - q1, UNBOUNDED)
    return np.column_stack([q0, q1, k0, k1, lower, upper])


def shrink(bands: Bands) -> tuple[Bands, NDArray[np.int64]]:
    """Trim every box to the rows and columns that its diagonals reach, and drop the bands that keep nothing.

    Returns the trimmed bands and, for each, the index of the band it came from.
    """
    trimmed, kept = trim(*bands.T)
    if len(kept) == len(bands):
        return np.column_stack(trimmed), kept
    return np.column_stack([column[kept] for column in trimmed]), kept


def trim(
    q0: Column, q1: Column, k0: Column, k1: Column, d0: Column, d1: Column
) -> tuple[tuple[Column, Column, Column, Column, Column, Column], Column]:
    """The same on columns, the dropped bands left among them: the trimmed columns, and the indices of those to keep."""
    # Row i reaches columns [i + d0, i + d1]; column j is reached by rows [j - d1, j - d0].
    new_q0, new_q1 = np.maximum(q0, k0 - d1), np.minimum(q1, k1 - d0)
    new_k0, new_k1 = np.maximum(k0, q0 + d0), np.minimum(k1, q1 + d1)
    lower = np.maximum(d0, new_k0 - (new_q1 - 1))
    upper = np.minimum(d1, (new_k1 - 1) - new_q0)
    kept = np.flatnonzero((new_q1 > new_q0) & (new_k1 > new_k0) & (upper >= lower))
    return (new_q0, new_q1, new_k0, new_k1, lower, upper), kept


def clip(bands: Bands, axis: int, start: NDArray[np.int64] | int, stop: NDArray[np.int64] | int) -> Bands:
    """Cut each band to ``[start, stop)`` along ``axis`` (``Q0`` for rows, ``K0`` for columns), without trimming."""
    cut = bands.copy()
    cut[:, axis] = np.maximum(cut[:, axis], start)
    cut[:, axis + 1] = np.minimum(cut[:, axis + 1], stop)
    return cut


def shift(bands: Bands, rows: NDArray[np.int64] | int, columns: NDArray[np.int64] | int) -> Bands:
    """Move bands by ``rows`` along the query axis and by ``columns`` along the key axis."""
    moved = bands.copy()
    moved[:, Q0:K0] += np.asarray(rows)[..., None]
    moved[:, K0:D0] += np.asarray(columns)[..., None]
    moved[:, D0:] += (np.asarray(columns) - np.asarray(rows))[..., None]
    return moved


def transpose(bands: Bands) -> Bands:
    """Swap queries and keys."""
    return np.column_stack([bands[:, K0:D0], bands[:, Q0:K0], -bands[:, D1], -bands[:, D0]])


def ramp_area(last: Column, width: Column) -> Column:
    """The sum of ``clamp(x, 0, width)`` over all ``x <= last``."""
    ramp = np.clip(last, 0, width)
    pairs = ramp * (ramp + 1)
    pairs >>= 1
    beyond = last - width
    if (beyond > 0).any():
        pairs += np.maximum(beyond, 0) * width
    return pairs


def _pairs_below(q0: Column, k0: Column, width: Column, stop: Column, diagonal: Column) -> Column:
    """Count the pairs of boxes of ``width`` columns with ``i < stop`` and ``j - i <= diagonal``.

    Row ``i`` keeps ``clamp(i + diagonal - k0 + 1, 0, width)`` columns, an arithmetic series cut at both ends.
    """
    columns_before_row_zero = diagonal - k0
    return ramp_area(stop + columns_before_row_zero, width) - ramp_area(q0 + columns_before_row_zero, width)


def area_above(bands: Bands, stop: Column) -> Column:
    """Count the kept pairs ``(i, j)`` of each band with ``i < stop``, in closed form.

    ``stop`` is clamped to the band's rows, so differences over growing stops give the area of runs of rows.
    """
    q0, q1, k0, k1, d0, d1 = bands.T
    return column_area(q0, np.clip(stop, q0, np.maximum(q0, q1)), k0, k1, d0, d1)


def column_area(q0: Column, q1: Column, k0: Column, k1: Column, d0: Column, d1: Column) -> Column:
    """Count the pairs that each band keeps, the bands given by columns, ``q1`` not below ``q0``."""
    width = np.maximum(k1 - k0, 0)
    pairs = _pairs_below(q0, k0, width, q1, d1)
    # Where the lower diagonal cuts nothing off, there is nothing below it.
    cut = np.flatnonzero(d0 > k0 - q1 + 1)
    pairs[cut] -= _pairs_below(q0[cut], k0[cut], width[cut], q1[cut], d0[cut] - 1)
    return np.where(d1 >= d0, pairs, 0)


def area(bands: Bands) -> NDArray[np.int64]:
    """Count the pairs that each band keeps."""
    return area_above(bands, bands[:, Q1])


def left_moves(bands: Bands) -> NDArray[np.bool_]:
    """Whether the first column of each trimmed band's rows moves from row to row."""
    return bands[:, Q1] - 1 + bands[:, D0] > bands[:, K0]


def right_moves(bands: Bands) -> NDArray[np.bool_]:
    """Whether the last column of each trimmed band's rows moves from row to row."""
    return bands[:, Q0] + bands[:, D1] + 1 < bands[:, K1]


def slices_from_bands(bands: Bands) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Convert bands to slices of the four types, splitting a band by rows into at most three.

    A band's rows fall into three runs, of which any may be empty: those whose left end follows the lower
    diagonal or not, crossed with those whose right end follows the upper diagonal or not.

    Returns the ``(m, 5)`` slices, sorted by band and then by row, and for each the index of its band.
    """
    trimmed, source = shrink(bands)
    q0, q1, k0, k1, d0, d1 = trimmed.T
    # Rows from `left` on follow the lower diagonal, rows before `right` the upper one. A row that lies on a diagonal
    # and on the box's edge at once may count as either: alone, it is not worth a slice.
    left, right = k0 - d0, k1 - d1
    left = np.where(left >= q1 - 1, q1, np.maximum(left, q0))
    right = np.where(right <= q0 + 1, q0, np.minimum(right, q1))
    cuts = np.column_stack([q0, np.minimum(left, right), np.maximum(left, right), q1])
    start, stop = cuts[:, :-1], cuts[:, 1:]
    follows_lower = start >= left[:, None]
    follows_upper = stop <= right[:, None]
    first = np.where(follows_lower, start + d0[:, None], k0[:, None])
    last = np.where(follows_upper, stop + d1[:, None], k1[:, None])
    kind = CAUSAL * follows_upper + INVCAUSAL * follows_lower
    band, run = np.nonzero(stop > start)
    rows = np.column_stack([a[band, run] for a in (start, stop, first, last, kind)])
    rows[rows[:, 1] - rows[:, 0] == 1, 4] = FULL  # one row has no diagonal
    return rows, source[band]
