# SPDX-License-Identifier: Apache-2.0
"""Whole attention masks: built by name or from slices, to and from a dense matrix, measured, cut and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common import packed
from magi_attention.common.bands import Bands
from magi_attention.common.enum import AttnMaskType
from magi_attention.common.errors import MagiValueError
from magi_attention.common.range import AttnRange
from magi_attention.common.ranges import AttnRanges
from magi_attention.common.rectangle import mask_type_to_int
from magi_attention.common.slices import SliceTable, expand_counts, find_double_cover

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes


def dense_mask(bands: Bands, num_rows: int, num_columns: int) -> NDArray[np.bool_]:
    """The pairs that any of ``bands`` keeps, as a ``(num_rows, num_columns)`` matrix.

    Every row of a band adds 1 where it starts and takes it back where it ends; the running sum counts the cover.
    """
    inside = band.clip(band.clip(bands, band.Q0, 0, num_rows), band.K0, 0, num_columns)
    q0, q1, k0, k1, d0, d1 = band.shrink(inside)[0].T
    owner, step = expand_counts(q1 - q0)
    row = q0[owner] + step
    edges = np.zeros((num_rows, num_columns + 1), np.int32)
    np.add.at(edges, (row, np.maximum(k0[owner], row + d0[owner])), 1)
    np.add.at(edges, (row, np.minimum(k1[owner], row + d1[owner] + 1)), -1)
    return np.cumsum(edges, axis=1)[:, :num_columns] > 0


class AttnMask:
    """A mask of ``total_seqlen_q`` queries by ``total_seqlen_k`` keys: the union of its slices.

    Made by the class methods only. Two masks are equal if they keep the same pairs. The dense matrix is only made where
    one is asked for, or where slices overlap.

    Attributes:
        slices: the slices.
        total_seqlen_q: the number of queries.
        total_seqlen_k: the number of keys.
    """

    slices: SliceTable
    total_seqlen_q: int
    total_seqlen_k: int

    def __init__(self) -> None:
        raise RuntimeError("make an AttnMask by its class methods, for one AttnMask.from_ranges")

    @classmethod
    def from_slices(cls, slices: SliceTable, total_seqlen_q: int, total_seqlen_k: int) -> AttnMask:
        """Make a mask of a table of slices, which must lie inside the totals."""
        ends = slices.rows[:, [1, 3]].max(axis=0, initial=0)
        starts = slices.rows[:, [0, 2]].min(axis=0, initial=0)
        if starts.min() < 0 or ends[0] > total_seqlen_q or ends[1] > total_seqlen_k:
            raise MagiValueError(
                f"slices reach over queries [{starts[0]}, {ends[0]}) and keys [{starts[1]}, {ends[1]}), "
                f"outside of {total_seqlen_q} queries and {total_seqlen_k} keys"
            )
        mask = cls.__new__(cls)
        mask.slices, mask.total_seqlen_q, mask.total_seqlen_k = slices, total_seqlen_q, total_seqlen_k
        return mask

    @classmethod
    def from_ranges(
        cls,
        q_ranges: AttnRanges,
        k_ranges: AttnRanges,
        attn_mask_type: Sequence[AttnMaskType | int] | AttnMaskType,
        total_seqlen_q: int | None = None,
        total_seqlen_k: int | None = None,
    ) -> AttnMask:
        """Make a mask of slices of any of the four types.

        Args:
            q_ranges: the slices' queries.
            k_ranges: the slices' keys.
            attn_mask_type: the slices' types, or one for all.
            total_seqlen_q: the number of queries; None for the greatest end.
            total_seqlen_k: the number of keys; None for the greatest end.

        Raises:
            MagiValueError: if the lists differ in length, or a range lies outside the totals.
        """
        types = [attn_mask_type] * len(q_ranges) if isinstance(attn_mask_type, AttnMaskType) else attn_mask_type
        if not len(q_ranges) == len(k_ranges) == len(types):
            raise MagiValueError(
                "q_ranges, k_ranges and attn_mask_type must be equally long, "
                f"not {len(q_ranges)}, {len(k_ranges)} and {len(types)}"
            )
        slices = SliceTable.from_lists(
            q_ranges.to_naive_ranges(), k_ranges.to_naive_ranges(), map(mask_type_to_int, types)
        )
        total_q = q_ranges.end if total_seqlen_q is None else total_seqlen_q
        return cls.from_slices(slices, total_q, k_ranges.end if total_seqlen_k is None else total_seqlen_k)

    @classmethod
    def from_mask(cls, mask: Any) -> AttnMask:
        """Make a mask of a matrix of 0 and 1, as tensor, array or nested lists, whose rows each keep one run of keys.

        Neighboring rows join a slice as long as both ends of their runs go on standing still or moving by one key.

        Raises:
            MagiValueError: if the matrix is not two-dimensional, or a row keeps several runs.
        """
        dense = np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask).astype(bool)
        if dense.ndim != 2:
            raise MagiValueError(f"a mask must have two dimensions, not shape {dense.shape}")
        steps = np.diff(dense.astype(np.int8), axis=1, prepend=0, append=0)
        runs = (steps == 1).sum(axis=1)
        if (runs > 1).any():
            raise MagiValueError(f"row {int(np.argmax(runs > 1))} keeps several runs of keys; each row may keep one")
        rows = np.flatnonzero(runs)
        first, last = steps[rows].argmax(axis=1), steps[rows].argmin(axis=1)
        return cls.from_slices(_slices_of_runs(rows, first, last), *dense.shape)

    @classmethod
    def causal(cls, total_seqlen: int) -> AttnMask:
        """Every token sees itself and what comes before."""
        return cls.varlen([0, total_seqlen])

    @classmethod
    def varlen(cls, cu_seqlens: Sequence[int], causal: bool = True) -> AttnMask:
        """Packed documents between cumulative lengths, each seeing itself only."""
        return cls.from_slices(packed.varlen(cu_seqlens, causal), cu_seqlens[-1], cu_seqlens[-1])

    @classmethod
    def sliding_window(cls, total_seqlen: int, window_size: tuple[int, int]) -> AttnMask:
        """Token i sees ``i - left`` to ``i + right``, both included; -1 means unlimited on that side."""
        return cls.from_slices(packed.sliding_window([0, total_seqlen], *window_size), total_seqlen, total_seqlen)

    @classmethod
    def block_causal(cls, total_seqlen: int, block_size: int) -> AttnMask:
        """Tokens see their own block, whole, and the blocks before."""
        return cls.from_slices(packed.block_causal([0, total_seqlen], block_size), total_seqlen, total_seqlen)

    @classmethod
    def prefix_lm(cls, total_seqlen: int, prefix: int) -> AttnMask:
        """All tokens see the first ``prefix`` ones; the rest is causal."""
        rest = (prefix, total_seqlen)
        slices = SliceTable.from_lists([(0, prefix), rest], [(0, prefix), (0, total_seqlen)], [band.FULL, band.CAUSAL])
        return cls.from_slices(slices, total_seqlen, total_seqlen)

    @staticmethod
    def make_causal_mask(
        seqlen_q: int,
        seqlen_k: int,
        align: Literal["bottom-right", "top-left"] = "bottom-right",
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """A triangular matrix ``[seqlen_q, seqlen_k]`` of 0 and 1, its diagonal in the given corner; default int32."""
        import torch

        if align not in ("bottom-right", "top-left"):
            raise MagiValueError(f"align must be 'bottom-right' or 'top-left', not {align!r}")
        ones = torch.ones(seqlen_q, seqlen_k, dtype=dtype or torch.int32, device=device)
        return ones.tril(seqlen_k - seqlen_q if align == "bottom-right" else 0)

    @cached_property
    def _dense(self) -> NDArray[np.bool_]:
        dense = dense_mask(self.slices.bands(), self.total_seqlen_q, self.total_seqlen_k)
        dense.setflags(write=False)
        return dense

    @property
    def mask_flag_array(self) -> NDArray[np.int32]:
        """The mask as a new ``(queries, keys)`` int32 array of 0 and 1."""
        return self._dense.astype(np.int32)

    @property
    def mask_tensor(self) -> torch.Tensor:
        """The mask as a new int32 tensor ``[queries, keys, 1]`` of 0 and 1."""
        import torch

        return torch.from_numpy(self.mask_flag_array).unsqueeze(-1)

    @cached_property
    def area(self) -> int:
        """The number of pairs kept."""
        return self.slices.area() if find_double_cover(self.slices) is None else int(self._dense.sum())

    def tuples(self) -> list[tuple[AttnRange, AttnRange, AttnMaskType]]:
        """The slices as (queries, keys, type)."""
        return [
            (AttnRange(q0, q1), AttnRange(k0, k1), AttnMaskType.from_int_type(kind))
            for q0, q1, k0, k1, kind in self.slices.rows.tolist()
        ]

    def make_sub_mask(self, q_range: AttnRange, k_range: AttnRange) -> AttnMask:
        """The mask of some of the queries and keys, renumbered from 0."""
        inside = self.slices.clip_rows(*q_range.to_naive_range()).clip_columns(*k_range.to_naive_range())
        return self.from_slices(inside.shift(-q_range.start, -k_range.start), q_range.seqlen, k_range.seqlen)

    def calc_sub_area(self, q_range: AttnRange, k_range: AttnRange) -> int:
        """The number of pairs kept of some of the queries and keys."""
        return self.make_sub_mask(q_range, k_range).area

    def is_square(self) -> bool:
        """Whether there are as many queries as keys."""
        return self.total_seqlen_q == self.total_seqlen_k

    def is_empty(self) -> bool:
        """Whether no pair is kept."""
        return self.area == 0

    def is_pure_full(self) -> bool:
        """Whether every pair is kept."""
        return self.area == self.total_seqlen_q * self.total_seqlen_k

    def is_pure_causal(self) -> bool:
        """Whether this is one triangle with its diagonal in the bottom-right corner."""
        row = [[0, self.total_seqlen_q, 0, self.total_seqlen_k, band.CAUSAL]]
        return self == self.from_slices(SliceTable(row), self.total_seqlen_q, self.total_seqlen_k)

    def is_varlen_full(self) -> bool:
        """Whether this is a square mask of packed documents, each seeing all of itself and nothing else."""
        return self._is_varlen(causal=False)

    def is_varlen_causal(self) -> bool:
        """Whether this is a square mask of packed documents, each causal and seeing nothing else."""
        return self._is_varlen(causal=True)

    def _is_varlen(self, causal: bool) -> bool:
        if not self.is_square() or self.total_seqlen_q == 0:
            return False
        # If it is one, a document starts where the token sees no token before itself.
        starts = np.flatnonzero(self._dense.argmax(axis=1) == np.arange(self.total_seqlen_q))
        return self == self.varlen([*dict.fromkeys([0, *starts.tolist(), self.total_seqlen_q])], causal)

    def visualize(self, path: str | None = None, ax: Axes | None = None, title: str = "") -> Axes:
        """Draw the mask: queries downwards, keys to the right, one color for each type of slice.

        Args:
            path: where to save the picture, if anywhere.
            ax: the matplotlib axes to draw into; None for new ones.
            title: the picture's title.

        Returns:
            The axes. Needs matplotlib (``pip install "magi-attention[cli]"``).
        """
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure

        ax = ax or Figure(figsize=(6, 6), layout="constrained").add_subplot()
        trimmed = SliceTable.from_bands(self.slices.bands())
        corners, colors = _outlines(trimmed), [f"C{kind}" for kind in trimmed.rows[:, 4]]
        ax.add_collection(PolyCollection(list(corners), facecolors=colors))
        ax.set(xlim=(0, self.total_seqlen_k), ylim=(self.total_seqlen_q, 0), xlabel="key", ylabel="query", title=title)
        ax.set_aspect("equal")
        if path is not None:
            ax.get_figure(root=True).savefig(path)  # type: ignore[union-attr]
        return ax

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AttnMask):
            return False
        if (self.total_seqlen_q, self.total_seqlen_k) != (other.total_seqlen_q, other.total_seqlen_k):
            return False
        return self.slices == other.slices or (self.area == other.area and np.array_equal(self._dense, other._dense))

    def __hash__(self) -> int:
        return hash((self.total_seqlen_q, self.total_seqlen_k, self.area))

    def __repr__(self) -> str:
        return f"AttnMask({self.total_seqlen_q} x {self.total_seqlen_k}, {self.slices!r})"


def _slices_of_runs(rows: NDArray[np.int64], first: NDArray[np.int64], last: NDArray[np.int64]) -> SliceTable:
    """Slices that keep columns ``[first, last)`` of each of the ascending ``rows``, longest first from the top."""
    moves = np.column_stack([np.diff(first), np.diff(last)])
    joinable = (np.diff(rows) == 1) & ((moves == 0) | (moves == 1)).all(axis=1)
    table, start = [], 0
    for row in range(len(rows)):
        goes_on = row + 1 < len(rows) and joinable[row] and (row == start or (moves[row] == moves[row - 1]).all())
        if not goes_on:
            lower, upper = moves[row - 1] if row > start else (0, 0)
            kind = band.INVCAUSAL * lower + band.CAUSAL * upper
            table.append((rows[start], rows[row] + 1, first[start], last[row], kind))
            start = row + 1
    return SliceTable(table)


def _outlines(slices: SliceTable) -> NDArray[np.float64]:
    """``(n, 4, 2)`` corners (key, query) of slices whose diagonals end in the corners; steps become straight lines."""
    q0, q1, k0, k1, kind = slices.rows.T
    height = q1 - q0
    lower, upper = (kind & band.INVCAUSAL) > 0, (kind & band.CAUSAL) > 0
    # A diagonal's step covers one key per row; the straight line runs through the middle of the steps.
    left = np.where(lower, k0 - 0.5, k0), np.where(lower, k0 + height - 0.5, k0)
    right = np.where(upper, k1 - height + 0.5, k1), np.where(upper, k1 + 0.5, k1)
    corners = [(left[0], q0), (right[0], q0), (right[1], q1), (left[1], q1)]
    return np.stack([np.column_stack(corner) for corner in corners], axis=1).astype(np.float64)
