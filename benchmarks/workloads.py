# SPDX-License-Identifier: Apache-2.0
"""The mask workloads of the benchmarks: deterministic, over one packed sequence, no pair covered twice."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from magi_attention.common.bands import BICAUSAL, CAUSAL, FULL
from magi_attention.common.slices import SliceTable

WINDOW = 1024  # a query of the sliding window sees itself and the 1023 keys before it
VIDEO_BLOCK = 4096
NUM_ANSWERS = 4
QUESTION_SHARE = PREFIX_SHARE = 0.25
MEDIAN_LENGTH, LENGTH_SIGMA, LEAST_LENGTH = 4096, 1.2, 64

Slice = tuple[int, int, int, int, int]


def document_lengths(total: int) -> list[int]:
    """Long-tailed lognormal lengths that sum to ``total``; no document is longer than a quarter of it."""
    rng = np.random.default_rng(2025)
    cap, left, lengths = total // 4, total, []
    while left:
        drawn = int(np.clip(round(float(rng.lognormal(np.log(MEDIAN_LENGTH), LENGTH_SIGMA))), LEAST_LENGTH, cap))
        length = min(drawn, left)
        if left - length < LEAST_LENGTH:  # no tiny remainder: it joins this document, or the next if that is too long
            length = left if left <= cap else left - LEAST_LENGTH
        lengths.append(length)
        left -= length
    return lengths


def documents(total: int) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(document_lengths(total)).tolist()
    return zip([0, *ends[:-1]], ends, strict=True)


def full(total: int) -> Iterator[Slice]:
    yield 0, total, 0, total, FULL


def causal(total: int) -> Iterator[Slice]:
    yield 0, total, 0, total, CAUSAL


def varlen_full(total: int) -> Iterator[Slice]:
    for start, end in documents(total):
        yield start, end, start, end, FULL


def varlen_causal(total: int) -> Iterator[Slice]:
    for start, end in documents(total):
        yield start, end, start, end, CAUSAL


def swa_causal_1024(total: int) -> Iterator[Slice]:
    yield 0, WINDOW, 0, WINDOW, CAUSAL
    yield WINDOW, total, 1, total, BICAUSAL


def varlen_block_causal_4k(total: int) -> Iterator[Slice]:
    """Video: blocks inside a document, each sees itself and every earlier block."""
    for start, end in documents(total):
        for block in range(start, end, VIDEO_BLOCK):
            stop = min(block + VIDEO_BLOCK, end)
            yield block, stop, start, stop, FULL


def prefix_lm(total: int) -> Iterator[Slice]:
    """Each document's first quarter attends to itself in full, the rest is causal over the whole document."""
    for start, end in documents(total):
        prefix = start + max(1, int((end - start) * PREFIX_SHARE))
        yield start, prefix, start, prefix, FULL
        yield prefix, end, start, end, CAUSAL


def shared_question(total: int) -> Iterator[Slice]:
    """Each document is one causal question and four answers, each causal in itself and seeing the question."""
    for start, end in documents(total):
        question = start + max(1, int((end - start) * QUESTION_SHARE))
        yield start, question, start, question, CAUSAL
        cuts = np.linspace(question, end, NUM_ANSWERS + 1).astype(int).tolist()
        for first, last in pairwise(cuts):
            yield first, last, start, question, FULL
            yield first, last, first, last, CAUSAL


WORKLOADS: dict[str, Callable[[int], Iterator[Slice]]] = {
    build.__name__: build
    for build in (
        full,
        causal,
        varlen_full,
        varlen_causal,
        swa_causal_1024,
        varlen_block_causal_4k,
        prefix_lm,
        shared_question,
    )
}


def make(name: str, total: int) -> SliceTable:
    """The slices of one workload; those with an empty side are left out."""
    return SliceTable([row for row in WORKLOADS[name](total) if row[0] < row[1] and row[2] < row[3]])
