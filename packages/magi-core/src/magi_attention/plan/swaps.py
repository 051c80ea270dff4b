# SPDX-License-Identifier: Apache-2.0
"""What swaps of runs between ranks need to know: who owns what, who reads how much of which document, who sends what.

What the ranks read is taken from the line: a rank's last chunk of a document says how many of the document's first rows
it reads (:attr:`~plan.documents.Documents.read`). That is right where rows read what is before them or a document's
first rows, as with causal, prefix and shared-question masks and full documents. Others are left alone.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_attention.plan.documents import Documents, Owner
from magi_attention.plan.totals import totals

Array = NDArray[np.int64]
Score = NDArray[np.int64] | NDArray[np.float64]


class Runs(NamedTuple):
    """The ranks' runs of chunks, one of each row: a run ends where the owner or the document changes.

    Attributes:
        first: the first place of each run.
        last: the place after its last.
        rank: its owner.
        document: its document.
        is_top: whether its owner has no higher run of the document.
        below: how many of the document's first rows the rank's next lower run reads, 0 if there is none.
        holdings: the pairs of documents and ranks of all runs, each once, as ``document * num_ranks + rank``.
        highest: the run that is the top of each holding.
        shared: ``(num_documents,)`` num_ranks times the number of each document in ``reads``, which has only those that
            several ranks hold; of the others, 0.
        reads: ``(num_ranks * (1 + shared documents),)`` how many first rows each rank reads of each such document.
    """

    first: Array
    last: Array
    rank: Array
    document: Array
    is_top: NDArray[np.bool_]
    below: Array
    holdings: Array
    highest: Array
    shared: Array
    reads: Array

    def read_by(self, document: Array, rank: Array) -> Array:
        """How many first rows of documents that others hold too, or alone, the ranks read."""
        return self.reads[self.shared[document] + rank]


class Swaps:
    """A deal that swaps change; the counts of chunks stay as they are.

    Args:
        owner: ``(num_chunks,)`` the rank of each place of the line.
        documents: the line.
        num_ranks: ranks of the group.
        chunk_size: rows of a chunk.
        most_area: the most mask area that a rank should have, or ``(num_ranks,)`` that each should have.
        most_sent: the most chunks that a rank should send, counted once for each rank that receives them.
    """

    def __init__(
        self,
        owner: Owner,
        documents: Documents,
        num_ranks: int,
        chunk_size: int,
        most_area: int | Array,
        most_sent: float,
    ) -> None:
        self.owner = owner.copy()
        self.documents = documents
        self.num_ranks, self.chunk_size = num_ranks, chunk_size
        self.most_area, self.most_sent = most_area, int(most_sent * chunk_size)
        borders = np.flatnonzero(documents.is_border)
        self.start, self.stop = borders[:-1], borders[1:]
        # How many of its document's first rows the chunk before each place reads.
        self.read = documents.read_before
        # How many rows documents have in the last chunk of the one before them, where that is their neighbor.
        self.border = documents.parted
        self.is_parted_dearly = bool(self.border.any())
        first = self._find_starts()
        self.load = totals(owner[first], np.diff(documents.area[first], append=documents.area[-1]), num_ranks)

    def _find_starts(self) -> Array:
        """Where runs start."""
        is_first = self.documents.is_border[:-1].copy()
        is_first[1:] |= self.owner[1:] != self.owner[:-1]
        return np.flatnonzero(is_first)

    def find_runs(self) -> Runs:
        """The runs as they are now."""
        first = self._find_starts()
        last = np.append(first[1:], len(self.owner))
        rank, document = self.owner[first].astype(np.int64), np.cumsum(self.documents.is_border[first]) - 1
        key = document * self.num_ranks + rank
        order = np.argsort(key, kind="stable")
        follows = key[order[1:]] == key[order[:-1]]
        below, is_top = np.zeros_like(first), np.zeros(len(first), np.bool_)
        below[order[1:][follows]] = self.read[last[order[:-1][follows]]]
        highest = order[np.append(~follows, True)]
        is_top[highest] = True
        is_shared = np.bincount(document[highest], minlength=len(self.start)) > 1
        shared = np.cumsum(is_shared) * is_shared * self.num_ranks
        reads = np.zeros(self.num_ranks + int(shared.max()), np.int64)
        held = highest[is_shared[document[highest]]]
        reads[shared[document[held]] + rank[held]] = self.read[last[held]]
        return Runs(first, last, rank, document, is_top, below, key[highest], highest, shared, reads)

    def count_sends(self, runs: Runs) -> Array:
        """``(num_chunks + 1,)`` the rows to send before each place, counted once for each rank that receives them."""
        document = runs.document[runs.highest]
        begin, end = self.start[document], self.stop[document]
        chunks = -(-self.read[runs.last[runs.highest]] // self.chunk_size)
        sends = np.zeros(len(self.owner) + 2, np.int64)
        np.add.at(sends, begin + 1, self.chunk_size)
        np.add.at(sends, np.minimum(begin + chunks, end) + 1, -self.chunk_size)
        sends = sends[:-1]
        np.cumsum(sends, out=sends)
        sends -= self.chunk_size  # the owner
        np.maximum(sends, 0, out=sends)
        return np.cumsum(sends, out=sends)

    def sent_by(self, runs: Runs, sends_before: Array) -> Array:
        """``(num_ranks,)`` the rows that each rank sends."""
        return totals(runs.rank, sends_before[runs.last] - sends_before[runs.first], self.num_ranks)

    def exchange(self, start: Array, stop: Array, other_start: Array, other_stop: Array, score: Score) -> int:
        """Swap pairs of pieces ``[start, stop)`` of the line, of each rank one: those with the lowest scores below 0.

        Returns how many ranks took part.
        """
        order = np.flatnonzero(score < 0)
        order = order[np.argsort(score[order], kind="stable")]
        owners, others = self.owner[start[order]].tolist(), self.owner[other_start[order]].tolist()
        area = self.documents.area
        used: set[int] = set()
        for pair, a, b in zip(order.tolist(), owners, others, strict=True):
            if a in used or b in used:
                continue
            used.update((a, b))
            given, taken = slice(start[pair], stop[pair]), slice(other_start[pair], other_stop[pair])
            self.owner[given], self.owner[taken] = b, a
            moved = area[given.stop] - area[given.start] - area[taken.stop] + area[taken.start]
            self.load[a] -= moved
            self.load[b] += moved
        return len(used)
