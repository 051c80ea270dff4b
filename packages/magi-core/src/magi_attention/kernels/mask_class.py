# SPDX-License-Identifier: Apache-2.0
"""What kind of mask a table of slices is: the fastest kernel depends on it.

Only tables of slices are looked at, never pairs. How a mask was cut into slices makes no difference: slices are turned
into bands, neighbors that one band could keep are joined, and rows that see the same keys are compared as runs.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.slices import SliceTable, count_slab_pieces, cut_into_slabs

Indices = NDArray[np.int64]

MASK_CLASSES: Final = (
    "full",
    "causal",
    "varlen_full",
    "varlen_causal",
    "sliding_window",
    "block_causal",
    "block_sparse",
    "general",
)
"""From the most regular to the least."""

LEAST_SHARE = 0.05
"""What makes up a smaller share of the pairs does not decide."""

PIECES_PER_SLICE, FREE_PIECES = 8, 1 << 14
"""How many pieces slices may be cut into: masks of more are not looked at closely, so that the cost stays linear."""

BOX, RAMP, WINDOW, SEVERAL = range(4)
FULL, CAUSAL, STAIRS, SLIDING, IRREGULAR = range(5)


def mask_class(slices: SliceTable) -> str:
    """Return the class of a mask, one of :data:`MASK_CLASSES`; computed once and kept with the table.

    - ``full``: one rectangle.
    - ``causal``: keys up to a diagonal, or from one on; also with a prefix that all see.
    - ``varlen_full``, ``varlen_causal``: several documents of those kinds, or most of the pairs in such.
    - ``sliding_window``: most pairs belong to rows whose keys move along at both ends; of any number of documents.
    - ``block_causal``: blocks of queries that see all keys up to a border of theirs; of any number of documents.
    - ``block_sparse``: other masks made of rectangles.
    - ``general``: other masks; also those without pairs.
    """
    return slices.derived("mask class", lambda: _classify(slices))


def _classify(slices: SliceTable) -> str:
    bands, _ = band.shrink(slices.bands())
    if not len(bands):
        return "general"
    if count_slab_pieces(bands) > PIECES_PER_SLICE * len(bands) + FREE_PIECES:
        return "general" if (band.left_moves(bands) | band.right_moves(bands)).any() else "block_sparse"
    slabs = _slabs(bands)
    document = np.cumsum(~_continues(slabs)) - 1
    areas = np.bincount(document, weights=slabs.area).astype(np.float64)
    kinds = _kinds_of_documents(slabs, document, areas)
    share = np.bincount(kinds, weights=areas, minlength=5) / areas.sum()
    if share[SLIDING] > 0.5:
        return "sliding_window"
    if share[IRREGULAR] + share[SLIDING] > LEAST_SHARE:
        return "block_sparse" if (slabs.shape != WINDOW).all() and not slabs.moves.any() else "general"
    kind = int(share[:SLIDING].argmax())
    if kind == STAIRS:
        return "block_causal"
    alone = areas.max() >= (1 - LEAST_SHARE) * areas.sum()
    return ("" if alone else "varlen_") + ("full" if kind == FULL else "causal")


@dataclass(frozen=True)
class _Slabs:
    """Runs of rows between which nothing changes but along diagonals, by row.

    Attributes:
        shape: BOX, RAMP (one end of the keys moves from row to row), WINDOW (both ends) or SEVERAL intervals.
        moves: whether any end of an interval moves.
        first_row: ``(n, 2)`` where the first row's keys start and stop.
        last_row: the same of the last row.
        area: pairs.
    """

    shape: Indices
    moves: NDArray[np.bool_]
    first_row: Indices
    last_row: Indices
    area: Indices


def _slabs(bands: Bands) -> _Slabs:
    """Cut bands into slabs, and join neighbors inside each."""
    pieces, _, slab = cut_into_slabs(bands)
    left, right = band.left_moves(pieces), band.right_moves(pieces)
    before, after = pieces[:-1], pieces[1:]
    straight = ~right[:-1] & ~left[1:] & (before[:, band.K1] == after[:, band.K0])
    along_a_diagonal = right[:-1] & left[1:] & (before[:, band.D1] + 1 == after[:, band.D0])
    new_slab = slab[1:] != slab[:-1]
    opens = np.append(True, new_slab | ~(straight | along_a_diagonal))
    head = np.flatnonzero(np.append(True, new_slab))
    tail = np.append(head[1:], len(pieces)) - 1
    first, last = pieces[head], pieces[tail]
    alone = np.add.reduceat(opens, head) == 1
    shape = np.where(alone, left[head].astype(np.int64) + right[tail], SEVERAL)
    return _Slabs(
        shape,
        np.logical_or.reduceat(left | right, head),
        np.column_stack([_start(first, first[:, band.Q0]), _stop(last, last[:, band.Q0])]),
        np.column_stack([_start(first, first[:, band.Q1] - 1), _stop(last, last[:, band.Q1] - 1)]),
        np.add.reduceat(band.area(pieces), head),
    )


def _continues(slabs: _Slabs) -> NDArray[np.bool_]:
    """Whether each slab belongs to the document of the one before: its first row sees a key of that one's last row."""
    before, after = slabs.last_row[:-1], slabs.first_row[1:]
    overlap = np.minimum(before[:, 1], after[:, 1]) > np.maximum(before[:, 0], after[:, 0])
    return np.append(False, overlap)


def _kinds_of_documents(slabs: _Slabs, document: Indices, areas: NDArray[np.float64]) -> Indices:
    def area_of(chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.bincount(document, weights=slabs.area * chosen, minlength=len(areas)).astype(np.float64)

    same = document[1:] == document[:-1]
    regular = slabs.shape <= RAMP
    both = regular[1:] & regular[:-1]
    before, after = slabs.last_row[:-1], slabs.first_row[1:]
    # One end of the keys stays for all rows; the other never goes back.
    keeps_start = np.append(True, ~both | ~same | ((before[:, 0] == after[:, 0]) & (before[:, 1] <= after[:, 1])))
    keeps_stop = np.append(True, ~both | ~same | ((before[:, 1] == after[:, 1]) & (before[:, 0] <= after[:, 0])))
    keeps_start &= ~regular | (slabs.first_row[:, 0] == slabs.last_row[:, 0])
    keeps_stop &= ~regular | (slabs.first_row[:, 1] == slabs.last_row[:, 1])
    stairs = (area_of(~keeps_start) == 0) | (area_of(~keeps_stop) == 0)
    unchanged = np.append(True, ~same | (before == after).all(axis=1))
    return np.select(
        [
            2 * area_of(slabs.shape == WINDOW) > areas,
            (area_of(slabs.shape == SEVERAL) > LEAST_SHARE * areas) | ~stairs,
            area_of(slabs.shape != BOX) > 0,
            area_of(~unchanged) > 0,
        ],
        [SLIDING, IRREGULAR, CAUSAL, STAIRS],
        FULL,
    )


def _start(bands: Bands, row: Indices) -> Indices:
    """Where the keys of one row of each band start."""
    return np.maximum(bands[:, band.K0], row + bands[:, band.D0])


def _stop(bands: Bands, row: Indices) -> Indices:
    return np.minimum(bands[:, band.K1], row + bands[:, band.D1] + 1)
