# SPDX-License-Identifier: Apache-2.0
"""Lists of rectangles of (query, key) pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from magi_attention.common import bands as band
from magi_attention.common import intervals
from magi_attention.common.bands import Bands
from magi_attention.common.enum import AttnMaskType
from magi_attention.common.errors import MagiTypeError, MagiValueError
from magi_attention.common.ranges import AttnRanges
from magi_attention.common.rectangle import AttnRectangle, mask_type_to_int


class AttnRectangles:
    """An ordered list of :class:`AttnRectangle`."""

    __slots__ = ("_rectangles",)

    def __init__(self) -> None:
        self._rectangles: list[AttnRectangle] = []

    @staticmethod
    def from_ranges(
        q_ranges: AttnRanges | Iterable[Sequence[int]],
        k_ranges: AttnRanges | Iterable[Sequence[int]],
        mask_types: Sequence[AttnMaskType | int],
        check: bool = False,
    ) -> AttnRectangles:
        """Make a rectangle of each slice that keeps a pair; the others are dropped.

        Raises:
            MagiValueError: if the three lists differ in length.
        """
        q_ranges, k_ranges = AttnRanges.from_ranges(q_ranges), AttnRanges.from_ranges(k_ranges)
        if not len(q_ranges) == len(k_ranges) == len(mask_types):
            raise MagiValueError(
                "q_ranges, k_ranges and mask_types must be equally long, "
                f"not {len(q_ranges)}, {len(k_ranges)} and {len(mask_types)}"
            )
        kinds = [mask_type_to_int(each) for each in mask_types]
        rows = [
            (*q.to_naive_range(), *k.to_naive_range(), t) for q, k, t in zip(q_ranges, k_ranges, kinds, strict=True)
        ]
        return _from_bands(band.bands_from_slices(np.array(rows, np.int64).reshape(-1, 5)))

    def append(self, attn_rect: AttnRectangle, check: bool = False) -> None:
        """Add a rectangle at the end."""
        self._rectangles.append(_checked(attn_rect))

    def extend(self, attn_rects: AttnRectangles | Iterable[AttnRectangle], check: bool = False) -> None:
        """Add rectangles at the end."""
        self._rectangles.extend([_checked(each) for each in attn_rects])

    def is_valid(self) -> bool:
        """Whether every rectangle keeps a pair."""
        return all(each.is_valid() for each in self)

    def check_valid(self) -> None:
        """Raise ``MagiValueError`` unless :meth:`is_valid`."""
        for each in self:
            each.check_valid()

    def is_empty(self) -> bool:
        """Whether the list holds no rectangle."""
        return not self._rectangles

    @property
    def size(self) -> int:
        """The number of rectangles."""
        return len(self._rectangles)

    @property
    def area(self) -> int:
        """The sum of the rectangles' numbers of pairs."""
        return int(band.area(self._bands()).sum())

    def get_qo_ranges_union(self) -> AttnRanges:
        """The queries of all rectangles, merged."""
        return AttnRanges.from_ranges(intervals.merge(self._bands()[:, band.Q0 : band.K0]).tolist())

    def get_kv_ranges_union(self) -> AttnRanges:
        """The keys of all rectangles, merged."""
        return AttnRanges.from_ranges(intervals.merge(self._bands()[:, band.K0 : band.D0]).tolist())

    def total_seqlen_qo(self) -> int:
        """The number of distinct queries."""
        return self.get_qo_ranges_union().total_seqlen

    def total_seqlen_kv(self) -> int:
        """The number of distinct keys."""
        return self.get_kv_ranges_union().total_seqlen

    def cut_q(self, cut_pos: int) -> tuple[AttnRectangles, AttnRectangles]:
        """The parts with queries before, and from, ``cut_pos``."""
        return self._within(band.Q0, -band.UNBOUNDED, cut_pos), self._within(band.Q0, cut_pos, band.UNBOUNDED)

    def cut_k(self, cut_pos: int) -> tuple[AttnRectangles, AttnRectangles]:
        """The parts with keys before, and from, ``cut_pos``."""
        return self._within(band.K0, -band.UNBOUNDED, cut_pos), self._within(band.K0, cut_pos, band.UNBOUNDED)

    def get_rects_within_q_segment(self, q_start: int, q_end: int) -> AttnRectangles:
        """The parts with queries in ``[q_start, q_end)``."""
        return self._within(band.Q0, q_start, q_end)

    def get_rects_within_k_segment(self, k_start: int, k_end: int) -> AttnRectangles:
        """The parts with keys in ``[k_start, k_end)``."""
        return self._within(band.K0, k_start, k_end)

    @overload
    def __getitem__(self, idx: int) -> AttnRectangle: ...
    @overload
    def __getitem__(self, idx: slice) -> AttnRectangles: ...
    def __getitem__(self, idx: int | slice) -> AttnRectangle | AttnRectangles:
        return _as_rectangles(self._rectangles[idx]) if isinstance(idx, slice) else self._rectangles[idx]

    def __setitem__(self, idx: int | slice, value: Any) -> None:
        if not isinstance(idx, slice):
            self._rectangles[idx] = _checked(value)
            return
        new = [_checked(each) for each in value]
        if len(new) != len(self._rectangles[idx]):
            raise MagiValueError(f"cannot replace {len(self._rectangles[idx])} rectangles by {len(new)}")
        self._rectangles[idx] = new

    def __iter__(self) -> Iterator[AttnRectangle]:
        return iter(self._rectangles)

    def __len__(self) -> int:
        return len(self._rectangles)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttnRectangles) and self._rectangles == other._rectangles

    def __hash__(self) -> int:
        return hash(tuple(self._rectangles))

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self))}]"

    def _bands(self) -> Bands:
        return np.concatenate([each._band for each in self]) if self._rectangles else band.empty_bands()

    def _within(self, axis: int, start: int | np.int64, stop: int | np.int64) -> AttnRectangles:
        return _from_bands(band.clip(self._bands(), axis, np.asarray(start), np.asarray(stop)))


def _checked(rectangle: object) -> AttnRectangle:
    if not isinstance(rectangle, AttnRectangle):
        raise MagiTypeError(f"AttnRectangles holds AttnRectangle objects, not {rectangle!r}")
    return rectangle


def _as_rectangles(items: Iterable[AttnRectangle]) -> AttnRectangles:
    rectangles = AttnRectangles()
    rectangles._rectangles = list(items)
    return rectangles


def _from_bands(bands: Bands) -> AttnRectangles:
    return _as_rectangles(AttnRectangle.from_band(row) for row in band.shrink(bands)[0])
