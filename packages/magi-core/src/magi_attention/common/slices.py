# SPDX-License-Identifier: Apache-2.0
"""Attention slices as one table, with exact cuts by rows and columns."""

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.derived import KeepsDerived

# The longest sequence: kernels count rows in 32 bits, and pairs of so many rows can be summed in 64.
MOST_ROWS = 2**31 - 1


class SliceTable(KeepsDerived):
    """An immutable table of attention slices: ``(n, 5)`` int64 rows ``(q0, q1, k0, k1, type)``.

    ``type`` is 0 FULL, 1 CAUSAL (bottom-right aligned), 2 INVCAUSAL (top-left aligned) or 3 BICAUSAL (both).
    Two tables are equal, and hash alike, if their rows are the same in the same order. Kernel backends keep their tile
    lists and device tables with it (:meth:`derived`), so that these live as long as the plan.
    """

    def __init__(self, rows: NDArray[np.int64] | Sequence[Sequence[int]]) -> None:
        table = np.array(rows, dtype=np.int64).reshape(-1, 5)
        table.setflags(write=False)
        self.rows: NDArray[np.int64] = table

    @classmethod
    def from_lists(
        cls,
        q_ranges: Iterable[Sequence[int]],
        k_ranges: Iterable[Sequence[int]],
        types: Iterable[int],
    ) -> Self:
        """Build a table from three parallel lists: ``(start, end)`` pairs of queries and keys, and type ints."""
        return cls([[*q, *k, t] for q, k, t in zip(q_ranges, k_ranges, types, strict=True)])

    @classmethod
    def from_bands(cls, bands: Bands) -> Self:
        """Build the table that keeps what the bands keep, each band as at most three slices."""
        return cls(band.slices_from_bands(bands)[0])

    def bands(self) -> Bands:
        """The slices as ``(n, 6)`` bands, row by row (see :mod:`magi_attention.common.bands`)."""
        return band.bands_from_slices(self.rows)

    def areas(self) -> NDArray[np.int64]:
        """The number of (query, key) pairs that each slice keeps."""
        return band.area(self.bands())

    def area(self) -> int:
        """The number of (query, key) pairs that all slices keep together."""
        return int(self.areas().sum())

    def clip_rows(self, start: int, stop: int) -> Self:
        """Keep the queries in ``[start, stop)`` only. Exact; slices that lose everything are dropped."""
        return self.from_bands(band.clip(self.bands(), band.Q0, start, stop))

    def clip_columns(self, start: int, stop: int) -> Self:
        """Keep the keys in ``[start, stop)`` only. Exact: a slice may become up to three."""
        return self.from_bands(band.clip(self.bands(), band.K0, start, stop))

    def shift(self, rows: int, columns: int) -> Self:
        """Move every slice by ``rows`` along the queries and by ``columns`` along the keys."""
        return type(self)(self.rows + np.array([rows, rows, columns, columns, 0]))

    def without_empty(self) -> Self:
        """Drop the slices that keep no pair."""
        return type(self)(self.rows[self.areas() > 0])

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SliceTable) and np.array_equal(self.rows, other.rows)

    def __hash__(self) -> int:
        return hash(self.rows.tobytes())

    def __repr__(self) -> str:
        return f"SliceTable({self.rows.tolist()})"

    def __getstate__(self) -> NDArray[np.int64]:
        return self.rows

    def __setstate__(self, rows: NDArray[np.int64]) -> None:
        self.__init__(rows)  # type: ignore[misc]


def find_double_cover(table: SliceTable) -> tuple[int, int] | None:
    """Find two slices that keep a common (query, key) pair; None if there are none.

    Slices of which no two share a query, or no two a key, as those of packed documents, are seen at once. Else rows are
    cut at every slice's ends, so that within a slab all slices span the same rows and their column extents
    are tight; only extents that overlap inside a slab need the exact count of common pairs. Queries and keys change
    places where that leaves fewer pieces.
    """
    bands, source = band.shrink(table.bands())
    if any(_are_apart(bands[:, axis : axis + 2]) for axis in (band.Q0, band.K0)):
        return None
    transposed = band.transpose(bands)
    if count_slab_pieces(transposed) < count_slab_pieces(bands):
        bands = transposed
    pieces, owner, slab = cut_into_slabs(bands)
    # One sortable key per (slab, column): a piece overlaps the later pieces of its slab that start before it ends.
    span = int(pieces[:, band.K1].max() - pieces[:, band.K0].min()) + 1
    base = slab * span - int(pieces[:, band.K0].min())
    starts, stops = base + pieces[:, band.K0], base + pieces[:, band.K1]
    left, offset = expand_counts(np.searchsorted(starts, stops) - np.arange(len(starts)) - 1)
    right = left + 1 + offset
    starting, ending = [band.Q0, band.K0, band.D0], [band.Q1, band.K1, band.D1]
    common = np.empty((len(left), 6), np.int64)
    common[:, starting] = np.maximum(pieces[left][:, starting], pieces[right][:, starting])
    common[:, ending] = np.minimum(pieces[left][:, ending], pieces[right][:, ending])
    doubled = band.shrink(common)[1]
    if not len(doubled):
        return None
    a, b = sorted(int(source[owner[side[doubled[0]]]]) for side in (left, right))
    return a, b


def _are_apart(intervals: NDArray[np.int64]) -> bool:
    """Whether no two of some intervals, none of them empty, overlap."""
    start, stop = intervals[np.argsort(intervals[:, 0], kind="stable")].T
    return bool((start[1:] >= stop[:-1]).all())


def _slabs_of(bands: Bands) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """All ends of rows, and the first slab between them and the one after the last that each band spans."""
    ends = distinct(bands[:, : band.K0])
    return ends, np.searchsorted(ends, bands[:, band.Q0]), np.searchsorted(ends, bands[:, band.Q1])


def count_slab_pieces(bands: Bands) -> int:
    """How many pieces :func:`cut_into_slabs` cuts bands into."""
    _, first, last = _slabs_of(bands)
    return int((last - first).sum())


def cut_into_slabs(bands: Bands) -> tuple[Bands, NDArray[np.int64], NDArray[np.int64]]:
    """Cut bands at all ends of rows: the trimmed pieces, by slab and column, and the band and the slab of each."""
    ends, first, last = _slabs_of(bands)
    owner, step = expand_counts(last - first)
    slab = first[owner] + step
    pieces, kept = band.shrink(band.clip(bands[owner], band.Q0, ends[slab], ends[slab + 1]))
    owner, slab = owner[kept], slab[kept]
    order = np.lexsort((pieces[:, band.K0], slab))
    return pieces[order], owner[order], slab[order]


def expand_counts(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Enumerate ``counts[i]`` entries for every i: returns the i of each entry and its number within i.

    >>> expand_counts(np.array([2, 0, 1]))
    (array([0, 0, 2]), array([0, 1, 0]))
    """
    owner = np.repeat(np.arange(len(counts)), counts)
    step = np.arange(len(owner))
    step -= (np.cumsum(counts) - counts).take(owner)
    return owner, step


def distinct(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The different values of an array of any shape, ascending; several times as fast as ``np.unique``, which hashes.

    >>> distinct(np.array([[4, 2], [2, 7]]))
    array([2, 4, 7])
    """
    ordered = np.sort(values, axis=None)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]
