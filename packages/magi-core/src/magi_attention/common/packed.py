# SPDX-License-Identifier: Apache-2.0
"""Masks of packed documents: one builder for each family, over the documents' ends.

``ends`` is ``(n + 1,)``: document i starts at ``ends[i]`` and stops at ``ends[i + 1]``. No pair is covered twice, and
the cost grows with documents, not with tokens.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.bands import UNBOUNDED
from magi_attention.common.slices import SliceTable, expand_counts

Ends = NDArray[np.int64] | Sequence[int]
Column = NDArray[np.int64] | np.int64 | int


def varlen(ends: Ends, causal: bool = True) -> SliceTable:
    """Each document sees itself: what comes before a token and the token, or all of the document."""
    return sliding_window(ends, -1, 0 if causal else -1)


def sliding_window(ends: Ends, left: int, right: int) -> SliceTable:
    """Token i sees ``i - left`` to ``i + right`` of its document, both included; -1 means unlimited on that side."""
    start, stop = _documents(ends)
    lower, upper = (UNBOUNDED if side < 0 else side for side in (left, right))
    return _table(start, stop, start, stop, -lower, upper)


def block_causal(ends: Ends, block: int) -> SliceTable:
    """Tokens see their own block of the document, whole, and the blocks before it in the document."""
    start, stop = _documents(ends)
    document, step = expand_counts(-(-(stop - start) // block))
    first = start[document] + step * block
    last = np.minimum(first + block, stop[document])
    return _table(first, last, start[document], last, -UNBOUNDED, UNBOUNDED)


def prefix_lm(ends: Ends, share: float) -> SliceTable:
    """The first ``share`` of each document, at least one token of it, sees itself in full; the rest is causal."""
    start, stop = _documents(ends)
    prefix = _inside(start, stop, share)
    return _table(
        np.column_stack([start, prefix]).ravel(),
        np.column_stack([prefix, stop]).ravel(),
        np.repeat(start, 2),
        np.column_stack([prefix, stop]).ravel(),
        -UNBOUNDED,
        np.where(np.arange(2 * len(start)) % 2, 0, UNBOUNDED),
    )


def shared_question(ends: Ends, answers: int) -> SliceTable:
    """Of every ``1 + answers`` documents the first is a question, which the others, its answers, see too; all causal.

    Answers don't see one another.
    """
    start, stop = _documents(ends)
    document = np.arange(len(start))
    question = document - document % (1 + answers)
    answer = document[document != question]
    asked = question[answer]
    # Diagonals are relative, so one column of bounds serves both: everything of the question lies before the answer.
    return _table(
        np.concatenate([start, start[answer]]),
        np.concatenate([stop, stop[answer]]),
        np.concatenate([start, start[asked]]),
        np.concatenate([stop, stop[asked]]),
        -UNBOUNDED,
        0,
    )


def questions_and_answers(ends: Ends, share: float, answers: int) -> NDArray[np.int64]:
    """Cut each document into a question, the first ``share`` of it, and equally long answers: finer ``ends``."""
    start, stop = _documents(ends)
    cuts = np.linspace(_inside(start, stop, share), stop, answers + 1, axis=1).astype(np.int64)
    return np.append(np.column_stack([start, cuts[:, :-1]]), stop[-1:])


def _documents(ends: Ends) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    places = np.asarray(ends, np.int64)
    return places[:-1], places[1:]


def _inside(start: NDArray[np.int64], stop: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    length = stop - start
    return start + np.minimum(np.maximum(1, (length * share).astype(np.int64)), length)


def _table(*columns: Column) -> SliceTable:
    return SliceTable.from_bands(np.column_stack(np.broadcast_arrays(*columns)).astype(np.int64))
