# SPDX-License-Identifier: Apache-2.0
"""One half-open range of token positions."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import TypeAlias

from magi_attention.common.errors import MagiTypeError

NaiveRange: TypeAlias = tuple[int, int]


class RangeError(Exception):
    """A range, or a list of ranges, is not what it has to be."""


class InvalidRangeError(RangeError, ValueError):
    """A range's start lies behind its end."""


class AttnRange:
    """The positions ``[start, end)``; they may be negative, and there may be none.

    Equality and hash go by the two numbers, which can be set, so don't change a range that is a key of a dictionary.

    Args:
        start: the first position.
        end: one past the last position.

    Raises:
        InvalidRangeError: if ``start > end``, here or when either is set.
        TypeError: if either is not an integer.
    """

    __slots__ = ("_end", "_start")

    def __init__(self, start: int, end: int) -> None:
        self._start, self._end = index(start), index(end)
        if self._start > self._end:
            self.check_valid()

    @staticmethod
    def from_range(attn_range: AttnRange | Sequence[int], check: bool = False) -> AttnRange:
        """Make a new range from another, or from a pair ``(start, end)``. ``check`` is implied."""
        if isinstance(attn_range, AttnRange):
            return attn_range.clone()
        try:
            start, end = attn_range
        except (TypeError, ValueError):
            raise MagiTypeError(f"a range must be an AttnRange or a pair (start, end), not {attn_range!r}") from None
        return AttnRange(start, end)

    @property
    def start(self) -> int:
        """The first position."""
        return self._start

    @start.setter
    def start(self, start: int) -> None:
        self.check_valid(start=index(start))
        self._start = index(start)

    @property
    def end(self) -> int:
        """One past the last position."""
        return self._end

    @end.setter
    def end(self, end: int) -> None:
        self.check_valid(end=index(end))
        self._end = index(end)

    @property
    def seqlen(self) -> int:
        """The number of positions."""
        return self._end - self._start

    def to_naive_range(self) -> NaiveRange:
        """The pair ``(start, end)``."""
        return self._start, self._end

    def clone(self) -> AttnRange:
        """An equal range."""
        return AttnRange(self._start, self._end)

    def offset(self, offset: int) -> AttnRange:
        """The range moved by ``offset`` positions."""
        return AttnRange(self._start + offset, self._end + offset)

    def truncate(self, start: int | None = None, end: int | None = None) -> AttnRange:
        """The part in ``[start, end)``, None meaning no bound; an empty range if nothing is left."""
        new_start = self._start if start is None else max(self._start, start)
        new_end = self._end if end is None else min(self._end, end)
        return AttnRange(new_start, max(new_start, new_end))

    def intersect(self, other: AttnRange) -> AttnRange:
        """The positions that both hold; an empty range at the smaller end if there are none."""
        end = min(self._end, other._end)
        return AttnRange(min(max(self._start, other._start), end), end)

    def intersect_size(self, other: AttnRange) -> int:
        """The number of positions that both hold."""
        return self.intersect(other).seqlen

    def union(self, other: AttnRange) -> list[AttnRange]:
        """The positions that either holds: one range where they overlap, else (also if they touch) both."""
        if self.is_empty() or other.is_empty() or not self.is_overlap_with(other):
            return [self.clone(), other.clone()]
        return [AttnRange(min(self._start, other._start), max(self._end, other._end))]

    def union_size(self, other: AttnRange) -> int:
        """The number of positions that either holds."""
        return sum(part.seqlen for part in self.union(other))

    def diff_by(self, other: AttnRange) -> list[AttnRange]:
        """The positions of ``other`` that this range does not hold, as up to two non-empty ranges."""
        if not self.is_overlap_with(other) or self.is_empty():
            parts = [other.to_naive_range()]
        else:
            parts = [(other._start, self._start), (self._end, other._end)]
        return [AttnRange(start, end) for start, end in parts if start < end]

    def is_subrange_of(self, other: AttnRange) -> bool:
        """Whether this range's bounds lie within ``other``'s."""
        return other._start <= self._start and self._end <= other._end

    def is_overlap_with(self, other: AttnRange) -> bool:
        """Whether the two have a position in common; an empty range strictly inside another counts as well."""
        return self._start < other._end and other._start < self._end

    def is_empty(self) -> bool:
        """Whether there is no position."""
        return self._start == self._end

    def is_valid_close(self, start: int | None = None, end: int | None = None) -> bool:
        """Whether ``start <= end``; None takes this range's own."""
        return (self._start if start is None else start) <= (self._end if end is None else end)

    def is_valid_open(self, start: int | None = None, end: int | None = None) -> bool:
        """Whether ``start < end``; None takes this range's own."""
        return (self._start if start is None else start) < (self._end if end is None else end)

    def check_valid(self, start: int | None = None, end: int | None = None) -> None:
        """Raise :class:`InvalidRangeError` unless ``start <= end``; None takes this range's own."""
        if not self.is_valid_close(start, end):
            moves = "" if start is end is None else ": to move it, set the bound that leads first, or take offset()"
            start, end = self._start if start is None else start, self._end if end is None else end
            raise InvalidRangeError(f"a range must not start behind its end: [{start}, {end}){moves}")

    def __len__(self) -> int:
        return self._end - self._start

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttnRange) and self._start == other._start and self._end == other._end

    def __hash__(self) -> int:
        return hash((self._start, self._end))

    def __repr__(self) -> str:
        return f"[{self._start}, {self._end})"
