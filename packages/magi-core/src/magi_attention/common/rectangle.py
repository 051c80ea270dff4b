# SPDX-License-Identifier: Apache-2.0
"""One rectangle of (query, key) pairs, cut by two diagonals: a band (see :mod:`magi_attention.common.bands`)."""

from __future__ import annotations

import numpy as np

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.enum import AttnMaskType
from magi_attention.common.errors import MagiTypeError, MagiValueError
from magi_attention.common.range import AttnRange


def mask_type_to_int(mask_type: AttnMaskType | int) -> int:
    """The integer of a mask type given as enum or integer."""
    if isinstance(mask_type, AttnMaskType):
        return mask_type.to_int_type()
    if not isinstance(mask_type, int | np.integer):
        raise MagiTypeError(f"a mask type must be an AttnMaskType or its integer, not {mask_type!r}")
    if not 0 <= mask_type < len(AttnMaskType):
        raise MagiValueError(f"a mask type's integer must be 0 to {len(AttnMaskType) - 1}, not {mask_type}")
    return int(mask_type)


class AttnRectangle:
    """The pairs ``(i, j)`` with i in ``q_range``, j in ``k_range`` and ``d_range.start <= j - i <= d_range.end``.

    Note that the range of diagonals ``d_range`` is closed. All three ranges are trimmed to what the others can reach,
    and are copies: the ranges given, and those returned, are never shared.

    Args:
        q_range: the queries.
        k_range: the keys.
        d_range: the diagonals; None for all.
        mask_type: cuts ``d_range`` further by the diagonals of this type of slice.

    Raises:
        MagiValueError: if no pair is left.
        MagiTypeError: if ``mask_type`` is neither an ``AttnMaskType`` nor an integer.
    """

    __slots__ = ("_band",)

    def __init__(
        self,
        q_range: AttnRange,
        k_range: AttnRange,
        d_range: AttnRange | None = None,
        mask_type: AttnMaskType | int = AttnMaskType.FULL,
    ) -> None:
        row = [*q_range.to_naive_range(), *k_range.to_naive_range(), mask_type_to_int(mask_type)]
        given = band.bands_from_slices(np.array([row], np.int64))
        if d_range is not None:
            given = band.clip(given, band.D0, *d_range.to_naive_range())
        trimmed, _ = band.shrink(given)
        if not len(trimmed):
            raise MagiValueError(f"no pair lies in {q_range} x {k_range}, {mask_type}, diagonals {d_range}")
        self._band: Bands = trimmed

    @classmethod
    def from_band(cls, trimmed: Bands) -> AttnRectangle:
        """Make a rectangle of one band ``(6,)`` that :func:`magi_attention.common.bands.shrink` returned."""
        rectangle = cls.__new__(cls)
        rectangle._band = trimmed.reshape(1, 6).copy()
        return rectangle

    def _get(self, axis: int) -> AttnRange:
        return AttnRange(*self._band[0, axis : axis + 2].tolist())

    def _set(self, axis: int, value: AttnRange) -> None:
        changed = self._band.copy()
        changed[0, axis : axis + 2] = value.to_naive_range()
        if not len(band.shrink(changed)[0]):
            raise MagiValueError(f"{value} leaves no pair of {self!r}")
        self._band = changed

    @property
    def q_range(self) -> AttnRange:
        """The queries, as a copy; setting a range that leaves no pair raises ``MagiValueError``."""
        return self._get(band.Q0)

    @q_range.setter
    def q_range(self, q_range: AttnRange) -> None:
        self._set(band.Q0, q_range)

    @property
    def k_range(self) -> AttnRange:
        """The keys, as a copy; setting a range that leaves no pair raises ``MagiValueError``."""
        return self._get(band.K0)

    @k_range.setter
    def k_range(self, k_range: AttnRange) -> None:
        self._set(band.K0, k_range)

    @property
    def d_range(self) -> AttnRange:
        """The closed range of diagonals, as a copy; setting one that leaves no pair raises ``MagiValueError``."""
        return self._get(band.D0)

    @d_range.setter
    def d_range(self, d_range: AttnRange) -> None:
        self._set(band.D0, d_range)

    def is_valid(
        self, q_range: AttnRange | None = None, k_range: AttnRange | None = None, d_range: AttnRange | None = None
    ) -> bool:
        """Whether a pair is left with the ranges given; None takes this rectangle's own."""
        row = self._band.copy()
        for axis, given in ((band.Q0, q_range), (band.K0, k_range), (band.D0, d_range)):
            if given is not None:
                row[0, axis : axis + 2] = given.to_naive_range()
        return len(band.shrink(row)[0]) > 0

    def check_valid(
        self, q_range: AttnRange | None = None, k_range: AttnRange | None = None, d_range: AttnRange | None = None
    ) -> None:
        """Raise ``MagiValueError`` unless :meth:`is_valid`."""
        if not self.is_valid(q_range, k_range, d_range):
            raise MagiValueError(f"no pair of {self!r} lies in {q_range} x {k_range}, diagonals {d_range}")

    def get_valid_or_none(self) -> AttnRectangle | None:
        """This rectangle if it keeps a pair, else None."""
        return self if self.is_valid() else None

    def _shrink(self, axis: int) -> bool:
        trimmed, kept = band.shrink(self._band)
        self._band[kept, axis : axis + 2] = trimmed[:, axis : axis + 2]
        return len(kept) > 0

    def shrink_q_range(self) -> bool:
        """Trim the queries to those that the keys and diagonals reach; returns whether a pair is left."""
        return self._shrink(band.Q0)

    def shrink_k_range(self) -> bool:
        """Trim the keys to those that the queries and diagonals reach; returns whether a pair is left."""
        return self._shrink(band.K0)

    def shrink_d_range(self) -> bool:
        """Trim the diagonals to those that meet the queries and keys; returns whether a pair is left."""
        return self._shrink(band.D0)

    def clone(self) -> AttnRectangle:
        """An equal rectangle."""
        return self.from_band(self._band)

    def _within(self, axis: int, start: int, stop: int) -> AttnRectangle | None:
        trimmed, _ = band.shrink(band.clip(self._band, axis, start, stop))
        return self.from_band(trimmed) if len(trimmed) else None

    def cut_q(self, cut_pos: int) -> tuple[AttnRectangle | None, AttnRectangle | None]:
        """The parts with queries before, and from, ``cut_pos``; None where a part keeps nothing."""
        return self._within(band.Q0, self.q_range.start, cut_pos), self._within(band.Q0, cut_pos, self.q_range.end)

    def cut_k(self, cut_pos: int) -> tuple[AttnRectangle | None, AttnRectangle | None]:
        """The parts with keys before, and from, ``cut_pos``; None where a part keeps nothing."""
        return self._within(band.K0, self.k_range.start, cut_pos), self._within(band.K0, cut_pos, self.k_range.end)

    def get_rect_within_q_segment(self, q_start: int, q_end: int) -> AttnRectangle | None:
        """The part with queries in ``[q_start, q_end)``, or None if it keeps nothing."""
        return self._within(band.Q0, q_start, q_end)

    def get_rect_within_k_segment(self, k_start: int, k_end: int) -> AttnRectangle | None:
        """The part with keys in ``[k_start, k_end)``, or None if it keeps nothing."""
        return self._within(band.K0, k_start, k_end)

    def intersection_q_id_on_left_boundary(self) -> int:
        """The query at which the lower diagonal meets the first key."""
        return self.k_range.start - self.d_range.start

    def intersection_q_id_on_right_boundary(self) -> int:
        """The query at which the upper diagonal meets the last key."""
        return self.k_range.end - 1 - self.d_range.end

    def _is_type(self, kind: int) -> bool:
        same_box = band.bands_from_slices(np.append(self._band[:, :4], [[kind]], axis=1))
        return np.array_equal(band.shrink(same_box)[0], band.shrink(self._band)[0])

    def is_full(self) -> bool:
        """Whether a FULL slice of the same queries and keys keeps the same pairs."""
        return self._is_type(band.FULL)

    def is_causal(self) -> bool:
        """Whether a CAUSAL slice of the same queries and keys keeps the same pairs."""
        return self._is_type(band.CAUSAL)

    def is_inv_causal(self) -> bool:
        """Whether an INVCAUSAL slice of the same queries and keys keeps the same pairs."""
        return self._is_type(band.INVCAUSAL)

    def is_bi_causal(self) -> bool:
        """Whether a BICAUSAL slice of the same queries and keys keeps the same pairs."""
        return self._is_type(band.BICAUSAL)

    def to_qk_range_mask_type(self) -> list[tuple[AttnRange, AttnRange, int]]:
        """The same pairs as up to three slices ``(queries, keys, type)``, top to bottom."""
        slices, _ = band.slices_from_bands(self._band)
        return [(AttnRange(q0, q1), AttnRange(k0, k1), kind) for q0, q1, k0, k1, kind in slices.tolist()]

    def area(self) -> int:
        """The number of pairs."""
        return int(band.area(self._band)[0])

    def __len__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttnRectangle) and np.array_equal(self._band, other._band)

    def __hash__(self) -> int:
        return hash(self._band.tobytes())

    def __repr__(self) -> str:
        d0, d1 = self._band[0, band.D0 :].tolist()
        return f"{self.q_range} x {self.k_range} diagonals [{d0}, {d1}]"
