# SPDX-License-Identifier: Apache-2.0
"""Named masks over one packed sequence of any length, the same in every run: what benchmarks and pictures plan for."""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import packed
from magi_attention.common.slices import SliceTable

MEDIAN_LENGTH, LENGTH_SIGMA, LEAST_LENGTH = 4096, 1.2, 64

WINDOW = 1024
"""Keys that a query of ``swa_causal_1024`` sees, itself included."""

VIDEO_BLOCK = 4096
"""Rows of a block, for one of a video's frames, in ``varlen_block_causal_4k``."""

NUM_ANSWERS = 4
QUESTION_SHARE = PREFIX_SHARE = 0.25

LEAST_TOKENS = 4 * LEAST_LENGTH
"""The shortest sequence that documents can be drawn for, since none is longer than a quarter of it."""


def document_ends(total: int) -> NDArray[np.int64]:
    """``(n + 1,)`` where documents of long-tailed lognormal lengths start and end, from 0 to ``total``.

    No document is longer than a quarter of the sequence.
    """
    rng = np.random.default_rng(2025)
    cap, left, lengths = total // 4, total, [0]
    while left:
        drawn = int(np.clip(round(float(rng.lognormal(np.log(MEDIAN_LENGTH), LENGTH_SIGMA))), LEAST_LENGTH, cap))
        length = min(drawn, left)
        if left - length < LEAST_LENGTH:  # no tiny remainder: it joins this document, or the next if that is too long
            length = left if left <= cap else left - LEAST_LENGTH
        lengths.append(length)
        left -= length
    return np.cumsum(lengths)


def _whole(build: Callable[[packed.Ends], SliceTable], total: int) -> SliceTable:
    return build([0, total])


def _documents(build: Callable[[packed.Ends], SliceTable], total: int) -> SliceTable:
    return build(document_ends(total))


def _shared_question(total: int) -> SliceTable:
    ends = packed.questions_and_answers(document_ends(total), QUESTION_SHARE, NUM_ANSWERS)
    return packed.shared_question(ends, NUM_ANSWERS)


WORKLOADS: dict[str, Callable[[int], SliceTable]] = {
    "full": partial(_whole, partial(packed.varlen, causal=False)),
    "causal": partial(_whole, packed.varlen),
    "varlen_full": partial(_documents, partial(packed.varlen, causal=False)),
    "varlen_causal": partial(_documents, packed.varlen),
    "swa_causal_1024": partial(_whole, partial(packed.sliding_window, left=WINDOW - 1, right=0)),
    "varlen_block_causal_4k": partial(_documents, partial(packed.block_causal, block=VIDEO_BLOCK)),
    "prefix_lm": partial(_documents, partial(packed.prefix_lm, share=PREFIX_SHARE)),
    "shared_question": _shared_question,
}
"""Builders ``total -> SliceTable`` by name. No pair is covered twice."""


def make(name: str, total: int) -> SliceTable:
    """Build the mask ``name`` over ``total`` tokens.

    Raises:
        ValueError: if there is no such mask, or ``total`` is below ``LEAST_TOKENS``.
    """
    if name not in WORKLOADS:
        raise ValueError(f"there is no mask {name!r}; take one of {', '.join(WORKLOADS)}")
    if total < LEAST_TOKENS:
        raise ValueError(f"the mask {name} needs at least {LEAST_TOKENS} tokens, not {total}")
    return WORKLOADS[name](total)
