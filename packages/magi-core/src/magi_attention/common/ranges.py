# SPDX-License-Identifier: Apache-2.0
"""Lists of ranges, and their algebra as sets of positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np

from magi_attention.common import intervals
from magi_attention.common.errors import MagiTypeError, MagiValueError
from magi_attention.common.intervals import Intervals
from magi_attention.common.range import AttnRange, NaiveRange, RangeError

if TYPE_CHECKING:
    import torch

NaiveRanges: TypeAlias = Sequence[NaiveRange]

__all__ = ["AttnRange", "AttnRanges", "NaiveRanges", "RangeError", "check_valid_cu_seqlens", "is_valid_cu_seqlens"]


def is_valid_cu_seqlens(cu_seqlens: Sequence[int], seq_len: int) -> bool:
    """Whether ``cu_seqlens`` starts at 0, strictly increases and ends at ``seq_len``."""
    rises = all(a < b for a, b in pairwise(cu_seqlens))
    return len(cu_seqlens) > 0 and cu_seqlens[0] == 0 and cu_seqlens[-1] == seq_len and rises


def check_valid_cu_seqlens(cu_seqlens: Sequence[int], seq_len: int) -> None:
    """Raise ``ValueError`` unless :func:`is_valid_cu_seqlens`."""
    if not is_valid_cu_seqlens(cu_seqlens, seq_len):
        raise ValueError(f"cu_seqlens must start at 0, strictly increase and end at {seq_len}, not be {cu_seqlens!r}")


class AttnRanges:
    """An ordered list of :class:`AttnRange`.

    The list holds the very objects that were appended; what its methods return never shares an object with it, except
    indexing, slicing and iteration. Equality and hash go by content, so don't change a list that is a dictionary's key.
    """

    __slots__ = ("_ranges",)

    def __init__(self) -> None:
        self._ranges: list[AttnRange] = []

    # Making and changing

    @staticmethod
    def from_ranges(ranges: AttnRanges | Iterable[AttnRange | Sequence[int]], check: bool = False) -> AttnRanges:
        """Copy ranges given as ``(start, end)`` pairs or :class:`AttnRange`. An invalid one raises ``ValueError``."""
        return _as_ranges(AttnRange.from_range(each, check) for each in ranges)

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Sequence[int], seq_len: int) -> AttnRanges:
        """The documents between cumulative lengths, which start at 0, strictly increase and end at ``seq_len``."""
        check_valid_cu_seqlens(cu_seqlens, seq_len)
        return _as_ranges(AttnRange(a, b) for a, b in pairwise(cu_seqlens))

    def append(self, attn_range: AttnRange, check: bool = False) -> None:
        """Add a range at the end: the object itself, not a copy."""
        self._ranges.append(_checked(attn_range))

    def insert(self, idx: int, attn_range: AttnRange, check: bool = False) -> None:
        """Add a range before position ``idx``: the object itself, not a copy."""
        self._ranges.insert(idx, _checked(attn_range))

    def extend(self, attn_ranges: AttnRanges | Iterable[AttnRange], check: bool = False) -> None:
        """Add ranges at the end: the objects themselves, not copies."""
        self._ranges.extend([_checked(each) for each in attn_ranges])

    def pop(self, idx: int = -1) -> AttnRange:
        """Remove a range and return it; ``IndexError`` if there is none."""
        return self._ranges.pop(idx)

    def clone(self) -> AttnRanges:
        """A copy, ranges included."""
        return _as_ranges(each.clone() for each in self)

    def clear_empty(self) -> AttnRanges:
        """A copy without empty ranges."""
        return _as_ranges(each.clone() for each in self if not each.is_empty())

    def sort(self) -> AttnRanges:
        """A copy sorted by start; ranges of equal start keep their order."""
        return _as_ranges(each.clone() for each in sorted(self, key=lambda each: each.start))

    def merge(self) -> AttnRanges:
        """The sorted union: overlapping and touching ranges joined, empty ones dropped."""
        return _from_array(intervals.merge(self._array()))

    def merge_with_split_alignment(self, split_alignment: int = 1) -> AttnRanges:
        """As :meth:`merge`, after rounding every range outwards to multiples of ``split_alignment``."""
        if split_alignment < 1:
            raise MagiValueError(f"split_alignment must be at least 1, not {split_alignment}")
        rows = self.clear_empty()._array()
        start, end = rows[:, 0] // split_alignment, -(-rows[:, 1] // split_alignment)
        return _from_array(intervals.merge(np.column_stack([start, end]) * split_alignment))

    def chunk(self, chunk_size: int, check: bool = True) -> list[AttnRanges]:
        """Cut the ranges, in their order, into pieces of exactly ``chunk_size`` positions; the last may be shorter.

        Raises:
            MagiValueError: if ``chunk_size < 1`` or, with ``check``, if ranges overlap.
        """
        if chunk_size < 1:
            raise MagiValueError(f"chunk_size must be at least 1, not {chunk_size}")
        if check and not self.is_non_overlap():
            raise MagiValueError(f"only ranges that don't overlap can be cut in chunks, not {self!r}")
        pieces, before = intervals.split_at(self._array(), np.arange(0, self.total_seqlen, chunk_size))
        cuts = np.flatnonzero(np.diff(before // chunk_size)) + 1
        return [_from_array(piece) for piece in np.split(pieces, cuts)] if len(pieces) else []

    def truncate(self, start: int | None = None, end: int | None = None) -> AttnRanges:
        """The parts in ``[start, end)``, None meaning no bound, without empty ones."""
        return _as_ranges(part for part in (each.truncate(start, end) for each in self) if not part.is_empty())

    # Questions

    def is_valid(self) -> bool:
        """Whether no range starts behind its end, which :class:`AttnRange` sees to."""
        return all(each.is_valid_close() for each in self)

    def check_valid(self) -> None:
        """Raise ``ValueError`` unless :meth:`is_valid`."""
        for each in self:
            each.check_valid()

    def is_sorted(self) -> bool:
        """Whether the starts don't decrease."""
        return bool(np.all(np.diff(self._array()[:, 0]) >= 0))

    def is_merged(self) -> bool:
        """Whether the ranges ascend with a gap between neighbors."""
        rows = self._array()
        return bool(np.all(rows[1:, 0] > rows[:-1, 1]))

    def is_non_overlap(self) -> bool:
        """Whether no position lies in two ranges."""
        return self.intersect_size() == 0

    def is_cu_seqlens(self, seq_len: int) -> bool:
        """Whether the ranges follow one another without gap from 0 to ``seq_len``, none empty."""
        rows = self._array()
        return bool(np.all(rows[1:, 0] == rows[:-1, 1])) and is_valid_cu_seqlens(_boundaries(rows), seq_len)

    def to_cu_seqlens(self, seq_len: int) -> list[int]:
        """The cumulative lengths; ``MagiValueError`` unless :meth:`is_cu_seqlens`."""
        if not self.is_cu_seqlens(seq_len):
            raise MagiValueError(f"the ranges must follow one another from 0 to {seq_len}, not be {self!r}")
        return _boundaries(self._array())

    def is_empty(self) -> bool:
        """Whether the list holds no range."""
        return not self._ranges

    @property
    def size(self) -> int:
        """The number of ranges."""
        return len(self._ranges)

    @property
    def total_seqlen(self) -> int:
        """The sum of the ranges' lengths."""
        return sum(each.seqlen for each in self)

    @property
    def max_seqlen(self) -> int:
        """The longest range's length; 0 without ranges."""
        return max((each.seqlen for each in self), default=0)

    @property
    def start(self) -> int:
        """The least start; ``ValueError`` without ranges."""
        self._check_not_empty("start")
        return min(each.start for each in self)

    @property
    def end(self) -> int:
        """The greatest end; ``ValueError`` without ranges."""
        self._check_not_empty("end")
        return max(each.end for each in self)

    @property
    def points(self) -> list[int]:
        """The sorted distinct starts and ends."""
        return sorted({point for each in self for point in each.to_naive_range()})

    def intersect_size(self) -> int:
        """How often positions are held again: the sum over positions of the ranges that hold it, less one."""
        return self.total_seqlen - _measure(intervals.merge(self._array()))

    def intersect_size_with(self, other: AttnRanges) -> int:
        """The number of positions that both lists hold."""
        return _measure(self._intersection(other, False, False))

    def union_size(self) -> int:
        """The sum of the ranges' lengths; positions held twice count twice."""
        return self.total_seqlen

    def union_size_with(self, other: AttnRanges) -> int:
        """The sum of both lists' lengths; positions held twice count twice."""
        return self.total_seqlen + other.total_seqlen

    # Packed storage, and algebra with another list

    def make_range_local(
        self, other_range: AttnRange, is_self_merged: bool = False, prefix_offset: Sequence[int] | None = None
    ) -> tuple[AttnRange, AttnRange]:
        """Say where ``other_range`` lies if this list's merged ranges are stored one after another from 0 on.

        Args:
            other_range: lies inside one merged range.
            is_self_merged: the promise that this list :meth:`is_merged`.
            prefix_offset: where each merged range is stored, if known already.

        Returns:
            The stored range, and the merged range that holds ``other_range``.

        Raises:
            MagiValueError: if no merged range holds ``other_range``.
        """
        merged = self._merged(is_self_merged)
        local, target = _localise(merged, np.array([other_range.to_naive_range()]), prefix_offset)
        return AttnRange(*local[0].tolist()), AttnRange(*merged[target[0]].tolist())

    def make_ranges_local(self, other_attn_ranges: AttnRanges, is_self_merged: bool = False) -> AttnRanges:
        """As :meth:`make_range_local` for each of several ranges, in their order."""
        return _from_array(_localise(self._merged(is_self_merged), other_attn_ranges._array(), None)[0])

    def find_hole_ranges(
        self, other_attn_ranges: AttnRanges, is_self_merged: bool = False, is_other_merged: bool = False
    ) -> AttnRanges:
        """The positions of this list that ``other_attn_ranges`` doesn't hold, merged."""
        return _from_array(intervals.subtract(self._merged(is_self_merged), other_attn_ranges._merged(is_other_merged)))

    def find_overlap_ranges(
        self, other_attn_ranges: AttnRanges, is_self_merged: bool = False, is_other_merged: bool = False
    ) -> AttnRanges:
        """The positions that both lists hold, merged."""
        return _from_array(self._intersection(other_attn_ranges, is_self_merged, is_other_merged))

    # Conversion and the list protocol

    def to_naive_ranges(self) -> list[NaiveRange]:
        """The ``(start, end)`` pairs."""
        return [each.to_naive_range() for each in self]

    def to_tensor(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The pairs as an int32 tensor ``[n, 2]``."""
        import torch  # here, so that ranges can be used where torch is not

        return torch.tensor(self.to_naive_ranges(), dtype=torch.int32, device=device).reshape(-1, 2)

    @overload
    def __getitem__(self, idx: int) -> AttnRange: ...
    @overload
    def __getitem__(self, idx: slice) -> AttnRanges: ...
    def __getitem__(self, idx: int | slice) -> AttnRange | AttnRanges:
        return _as_ranges(self._ranges[idx]) if isinstance(idx, slice) else self._ranges[idx]

    def __setitem__(self, idx: int | slice, value: Any) -> None:
        if not isinstance(idx, slice):
            self._ranges[idx] = _checked(value)
            return
        new = [_checked(each) for each in value]
        if len(new) != len(self._ranges[idx]):
            raise MagiValueError(f"cannot replace {len(self._ranges[idx])} ranges by {len(new)}")
        self._ranges[idx] = new

    def __iter__(self) -> Iterator[AttnRange]:
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttnRanges) and self._ranges == other._ranges

    def __hash__(self) -> int:
        return hash(tuple(self._ranges))

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self))}]" if self._ranges else "[[,)]"

    def _array(self) -> Intervals:
        return np.array(self.to_naive_ranges(), np.int64).reshape(-1, 2)

    def _merged(self, is_merged: bool) -> Intervals:
        return self._array() if is_merged else intervals.merge(self._array())

    def _intersection(self, other: AttnRanges, is_self_merged: bool, is_other_merged: bool) -> Intervals:
        return intervals.intersect(self._merged(is_self_merged), other._merged(is_other_merged))[0]

    def _check_not_empty(self, name: str) -> None:
        if not self._ranges:
            raise ValueError(f"an empty AttnRanges has no {name}")


def _checked(attn_range: object) -> AttnRange:
    if not isinstance(attn_range, AttnRange):
        raise MagiTypeError(f"AttnRanges holds AttnRange objects, not {attn_range!r}; see AttnRanges.from_ranges")
    return attn_range


def _as_ranges(items: Iterable[AttnRange]) -> AttnRanges:
    ranges = AttnRanges()
    ranges._ranges = list(items)
    return ranges


def _from_array(rows: Intervals) -> AttnRanges:
    return _as_ranges(AttnRange(start, end) for start, end in rows.tolist())


def _measure(rows: Intervals) -> int:
    return int((rows[:, 1] - rows[:, 0]).sum())


def _boundaries(rows: Intervals) -> list[int]:
    return [*rows[:1, 0].tolist(), *rows[:, 1].tolist()]


def _localise(
    merged: Intervals, rows: Intervals, prefix_offset: Sequence[int] | None
) -> tuple[Intervals, intervals.Indices]:
    """Move ``rows`` to where ``merged`` is stored; returns them and, for each, the index of its merged range."""
    target = np.searchsorted(merged[:, 0], rows[:, 0], side="right") - 1
    outside = np.flatnonzero((target < 0) | (rows[:, 1] > np.append(merged[:, 1], 0)[target]))
    if len(outside):
        start, end = rows[outside[0]].tolist()
        raise MagiValueError(f"[{start}, {end}) does not lie inside one of the merged ranges {_from_array(merged)!r}")
    length = merged[:, 1] - merged[:, 0]
    stored = np.cumsum(length) - length if prefix_offset is None else np.asarray(prefix_offset, np.int64)
    return rows + (stored - merged[:, 0])[target][:, None] if len(rows) else rows, target
