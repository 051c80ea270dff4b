# SPDX-License-Identifier: Apache-2.0
"""Documents: the parts of a mask that have no key in common, laid on the grid of chunks."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.slices import SliceTable
from magi_attention.plan import two_sided
from magi_attention.plan.chunks import ChunkWork

Array = NDArray[np.int64]
Owner = NDArray[np.signedinteger[Any]]
"""The rank of each of some chunks, or of their runs; narrow integers are quicker to compare."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Runs of chunks that are best kept together, laid out on a *line*: all chunks, the light end of each run first.

    Attributes:
        line: ``(num_chunks,)`` the chunk at each place of the line.
        start: ``(n,)`` the first place of each run.
        stop: ``(n,)`` the place after its last.
        area: ``(num_chunks + 1,)`` the mask area before each place.
        cut: ``(num_chunks + 1,)`` about how many key rows must travel more once the line is cut before that place.
        is_border: ``(num_chunks + 1,)`` whether another document of the mask starts at that place, or the line ends
            there; a run may be several short ones.
        read: ``(num_chunks,)`` how many rows, from its document's first chunk on, each chunk reads if it reads that
            chunk: all up to itself in a causal document, all in a full one; otherwise 0.
    """

    line: Array
    start: Array
    stop: Array
    area: Array
    cut: Array
    is_border: NDArray[np.bool_]
    read: Array

    @cached_property
    def read_before(self) -> Array:
        """``(num_chunks + 1,)`` what the chunk before each place reads, see ``read``."""
        return np.append(0, self.read)

    @cached_property
    def parted(self) -> Array:
        """``(num_chunks + 1,)`` the rows that a document has in the last chunk of the one before it, its neighbor.

        At places where no document starts, 0.
        """
        line, inner = self.line, np.flatnonzero(self.is_border)[1:-1]
        rows = np.zeros(len(line) + 1, np.int64)
        rows[inner] = self.cut[inner] * (line[inner] == line[inner - 1] + 1)
        return rows


def find_documents(
    slices: SliceTable, work: ChunkWork, num_ranks: int, largest_share: float, label: Array | None = None
) -> Documents:
    """Find the runs; neighbors are joined where parting them costs most, up to ``largest_share`` of a rank's part.

    With ``label``, the ascending document of each chunk, none has rows of several documents.
    """
    if work.deal_keys is not None:
        return find_two_sided_documents(work, num_ranks, largest_share)
    num_chunks = len(work.area)
    if label is None:
        label, loss, to_last = _label_chunks(slices, work)
    else:
        loss, to_last = np.zeros(num_chunks, np.int64), np.zeros(num_chunks, np.bool_)
    start = np.append(0, np.flatnonzero(label[1:] != label[:-1]) + 1)
    stop = np.append(start[1:], num_chunks)
    after = np.minimum(stop, num_chunks - 1)
    border = np.maximum(np.where(to_last[after], loss[after], 0), np.where(to_last[stop - 1], 0, loss[stop - 1]))
    line = np.arange(num_chunks)
    hull = key_hulls(work)
    documents = _lay_out(work.area, line, start, border[:-1], _cut_costs(*hull), num_ranks, largest_share)
    return replace(documents, read=_rows_read(documents, *hull, work.cuts))


def find_two_sided_documents(work: ChunkWork, num_ranks: int, largest_share: float) -> Documents:
    """The same where keys are of another sequence: a run is a component of the graph of query rows and key rows."""
    component = two_sided.chunk_components(work)
    line = np.argsort(component, kind="stable")
    start = np.flatnonzero(np.diff(component[line], prepend=-1))
    cut = two_sided.cut_costs(work, line)
    return _lay_out(work.area, line, start, cut[start[1:]], cut, num_ranks, largest_share)


def _lay_out(
    chunk_area: Array, line: Array, start: Array, border: Array, cut: Array, num_ranks: int, largest_share: float
) -> Documents:
    """Join runs of the line that start at ``start``, and turn those whose light end comes last."""
    num_chunks = len(line)
    stop = np.append(start[1:], num_chunks)
    area = _sums_before(chunk_area[line])
    first = _join_neighbors(
        stop - start,
        area[stop] - area[start],
        border,
        int(num_chunks * largest_share / num_ranks),
        int(area[-1] * largest_share / num_ranks),
    )
    is_border = np.zeros(num_chunks + 1, np.bool_)
    is_border[start] = is_border[-1] = True
    start = start[first]
    stop = np.append(start[1:], num_chunks)
    end = np.maximum(1, (stop - start) // 4)
    falling = 20 * (area[start + end] - area[start]) > 21 * (area[stop] - area[stop - end])
    for a, b in zip(start[falling].tolist(), stop[falling].tolist(), strict=True):
        line[a:b] = line[a:b][::-1]
        cut[a + 1 : b] = cut[a + 1 : b][::-1]
        is_border[a : b + 1] = is_border[a : b + 1][::-1]
    if falling.any():
        area = _sums_before(chunk_area[line])
    return Documents(line, start, stop, area, cut, is_border, np.zeros(num_chunks, np.int64))


def _sums_before(values: Array) -> Array:
    """``(n + 1,)`` the sum of the values before each place."""
    sums = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=sums[1:])
    return sums


def component_starts(slices: SliceTable) -> Array:
    """The first row of each connected component: slices whose hulls of query and key rows overlap belong together."""
    rows = slices.rows
    rows = rows[(rows[:, 1] > rows[:, 0]) & (rows[:, 3] > rows[:, 2])]
    hulls = np.column_stack([np.minimum(rows[:, 0], rows[:, 2]), np.maximum(rows[:, 1], rows[:, 3])])
    return hulls[two_sided.leaders(hulls), 0]


def _label_chunks(slices: SliceTable, work: ChunkWork) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Give each chunk to the component at its first or its last row, whichever would otherwise read more from afar.

    Returns the component of each chunk, the rows that the other one reads from afar, and whether the last one got it.
    """
    starts = component_starts(slices)
    begin, end = work.cuts[:-1], work.cuts[1:]
    first = np.searchsorted(starts, begin, side="right") - 1
    last = np.searchsorted(starts, end - 1, side="right") - 1
    entry = np.flatnonzero((first != last)[work.chunk])
    chunk, keys = work.chunk[entry], work.keys[entry]
    component = np.searchsorted(starts, keys[:, 0], side="right") - 1
    outside = np.maximum(begin[chunk] - keys[:, 0], 0) + np.maximum(keys[:, 1] - end[chunk], 0)
    loss_first, loss_last = np.zeros_like(begin), np.zeros_like(begin)
    np.maximum.at(loss_first, chunk, np.where(component == first[chunk], outside, 0))
    np.maximum.at(loss_last, chunk, np.where(component == last[chunk], outside, 0))
    to_last = loss_last > loss_first
    return np.where(to_last, last, first), np.minimum(loss_first, loss_last), to_last


def _join_neighbors(tokens: Array, area: Array, border: Array, most_tokens: int, most_area: int) -> Array:
    """Join neighbors, the dearest border first, while both sums stay within bounds; the first of each joint run."""
    size, weight = tokens.tolist(), area.tolist()
    root = list(range(len(size)))

    def find(run: int) -> int:
        while root[run] != run:
            root[run] = root[root[run]]
            run = root[run]
        return run

    by_dearness = np.argsort(-border, kind="stable").tolist() if border.any() else range(len(border))
    for run in by_dearness:
        a, b = find(run), run + 1
        if root[b] != b:
            b = find(b)
        if size[a] + size[b] <= most_tokens and weight[a] + weight[b] <= most_area:
            root[b] = a
            size[a] += size[b]
            weight[a] += weight[b]
    return np.array([run for run in range(len(root)) if root[run] == run], np.int64)


def key_hulls(work: ChunkWork) -> tuple[Array, Array]:
    """``(num_chunks,)`` the first key that each chunk reads and the one after the last; its first row for none."""
    begin, step = work.cuts[:-1], np.diff(work.chunk, prepend=-1)
    if len(step) and step.min() >= 0 and step.max() == 1 and work.chunk[-1] == len(begin) - 1:
        # Each chunk has entries, one after another.
        if len(step) == len(begin):
            return work.keys[:, 0], work.keys[:, 1]
        first, others = np.flatnonzero(step), np.flatnonzero(step == 0)
        low, high = work.keys[:, 0].take(first), work.keys[:, 1].take(first)
        np.minimum.at(low, work.chunk[others], work.keys[others, 0])
        np.maximum.at(high, work.chunk[others], work.keys[others, 1])
        return low, high
    low, high = np.full_like(begin, np.iinfo(np.int64).max), np.full_like(begin, -1)
    np.minimum.at(low, work.chunk, work.keys[:, 0])
    np.maximum.at(high, work.chunk, work.keys[:, 1])
    unread = high < 0
    low[unread], high[unread] = begin[unread], begin[unread]
    return low, high


def _cut_costs(low: Array, high: Array) -> Array:
    """For each border between chunks, the length that the hulls of the keys of both sides have in common."""
    costs = np.zeros(len(low) + 1, np.int64)
    costs[1:] = _rising(high)
    costs[:-1] += _rising(-low[::-1])[::-1]
    costs[-1] = 0
    return np.maximum(costs, 0, out=costs)


def _rising(values: Array) -> Array:
    """The greatest value up to each place; to see that values rise already takes a fraction of the time."""
    return values if (values[1:] >= values[:-1]).all() else np.maximum.accumulate(values)


def _rows_read(documents: Documents, low: Array, high: Array, cuts: Array) -> Array:
    """See :attr:`Documents.read`."""
    borders = np.flatnonzero(documents.is_border)
    length = np.diff(borders)
    first, last = documents.line[borders[:-1]], documents.line[borders[1:] - 1]
    low, high = low[documents.line], high[documents.line]
    begin, end = cuts[first].repeat(length), cuts[first + 1].repeat(length)
    read = np.where(low < end, high - begin, 0)
    falling = np.flatnonzero((first > last).repeat(length))
    low, high, begin, end = low[falling], high[falling], begin[falling], end[falling]
    read[falling] = np.where(high > begin, end - low, 0)
    return read
