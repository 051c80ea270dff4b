# SPDX-License-Identifier: Apache-2.0
"""Attention slices as one table, with exact cuts by rows and columns."""

from collections.abc import Callable, Iterable, Sequence
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands

Derived = TypeVar("Derived")


class SliceTable:
    """An immutable table of attention slices: ``(n, 5)`` int64 rows ``(q0, q1, k0, k1, type)``.

    ``type`` is 0 FULL, 1 CAUSAL (bottom-right aligned), 2 INVCAUSAL (top-left aligned) or 3 BICAUSAL (both).
    Two tables are equal, and hash alike, if their rows are the same in the same order.
    """

    __slots__ = ("_derived", "rows")

    def __init__(self, rows: NDArray[np.int64] | Sequence[Sequence[int]]) -> None:
        table = np.array(rows, dtype=np.int64).reshape(-1, 5)
        table.setflags(write=False)
        self.rows: NDArray[np.int64] = table
        self._derived: dict[object, object] = {}

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

    def derived(self, name: object, build: Callable[["SliceTable"], Derived]) -> Derived:
        """Return ``build(self)``, built once per ``name`` and kept as long as this table lives.

        Kernel backends keep their tile lists and device tables here, so that these live exactly as long as the plan.
        """
        if name not in self._derived:
            self._derived[name] = build(self)
        return self._derived[name]  # type: ignore[return-value]

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

    Rows are cut at every slice's ends, so that within a slab all slices span the same rows and their column extents
    are tight; only extents that overlap inside a slab need the exact count of common pairs.
    """
    bands, source = band.shrink(table.bands())
    if len(bands) < 2:
        return None
    ends = np.unique(bands[:, :2])
    first, last = np.searchsorted(ends, bands[:, 0]), np.searchsorted(ends, bands[:, 1])
    owner, step = expand_counts(last - first)
    slab = first[owner] + step
    pieces, kept = band.shrink(band.clip(bands[owner], band.Q0, ends[slab], ends[slab + 1]))
    owner, slab = owner[kept], slab[kept]
    order = np.lexsort((pieces[:, band.K0], slab))
    pieces, owner, slab = pieces[order], owner[order], slab[order]
    # One sortable key per (slab, column): a piece overlaps the later pieces of its slab that start before it ends.
    span = int(pieces[:, band.K1].max() - pieces[:, band.K0].min()) + 1
    base = slab * span - int(pieces[:, band.K0].min())
    starts, stops = base + pieces[:, band.K0], base + pieces[:, band.K1]
    left, offset = expand_counts(np.searchsorted(starts, stops) - np.arange(len(starts)) - 1)
    right = left + 1 + offset
    common = np.column_stack(
        [
            np.maximum(pieces[left, 0], pieces[right, 0]),
            np.minimum(pieces[left, 1], pieces[right, 1]),
            np.maximum(pieces[left, 2], pieces[right, 2]),
            np.minimum(pieces[left, 3], pieces[right, 3]),
            np.maximum(pieces[left, 4], pieces[right, 4]),
            np.minimum(pieces[left, 5], pieces[right, 5]),
        ]
    )
    doubled = band.shrink(common)[1]
    if not len(doubled):
        return None
    a, b = sorted((int(source[owner[left[doubled[0]]]]), int(source[owner[right[doubled[0]]]])))
    return a, b


def expand_counts(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Enumerate ``counts[i]`` entries for every i: returns the i of each entry and its number within i.

    >>> expand_counts(np.array([2, 0, 1]))
    (array([0, 0, 2]), array([0, 1, 0]))
    """
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
