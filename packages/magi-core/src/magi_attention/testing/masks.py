# SPDX-License-Identifier: Apache-2.0
"""Generators of masks: every family that training uses, and some that only a test would think of."""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import Generator

from magi_attention.common.bands import BICAUSAL, CAUSAL, FULL, INVCAUSAL, UNBOUNDED
from magi_attention.common.slices import SliceTable

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

MaskFamily = Callable[[int, Generator], SliceTable]


def random_cuts(total: int, rng: Generator, max_parts: int = 6) -> list[tuple[int, int]]:
    """Cut ``[0, total)`` at random into at most ``max_parts`` neighboring, non-empty ranges."""
    cuts = rng.integers(1, max(total, 2), size=int(rng.integers(0, max_parts)))
    ends = np.unique(np.concatenate([[0], np.minimum(cuts, total), [total]])).tolist()
    return list(pairwise(ends))


def full(total: int, rng: Generator) -> SliceTable:
    """Every query sees every key."""
    return SliceTable([[0, total, 0, total, FULL]])


def causal(total: int, rng: Generator) -> SliceTable:
    """Every query sees the keys up to itself."""
    return SliceTable([[0, total, 0, total, CAUSAL]])


def varlen_full(total: int, rng: Generator) -> SliceTable:
    """Packed documents, each seeing itself."""
    return SliceTable([[a, b, a, b, FULL] for a, b in random_cuts(total, rng)])


def varlen_causal(total: int, rng: Generator) -> SliceTable:
    """Packed documents, each causal."""
    return SliceTable([[a, b, a, b, CAUSAL] for a, b in random_cuts(total, rng)])


def sliding_window(total: int, rng: Generator) -> SliceTable:
    """A window of random reach to the left and, often, to the right."""
    left, right = rng.integers(0, max(total // 2, 1), size=2)
    if rng.integers(2):
        right = 0
    return SliceTable.from_bands(np.array([[0, total, 0, total, -left, right]]))


def varlen_sliding_window(total: int, rng: Generator) -> SliceTable:
    """Packed documents, each with the same causal window."""
    left = int(rng.integers(0, max(total // 3, 1)))
    return SliceTable.from_bands(np.array([[a, b, a, b, -left, 0] for a, b in random_cuts(total, rng)]))


def block_causal(total: int, rng: Generator) -> SliceTable:
    """Blocks that see themselves and all blocks before them."""
    return SliceTable([[a, b, 0, b, FULL] for a, b in random_cuts(total, rng)])


def prefix_lm(total: int, rng: Generator) -> SliceTable:
    """Packed documents whose prefix is seen by all of the document and whose rest is causal."""
    rows = []
    for a, b in random_cuts(total, rng):
        prefix = int(rng.integers(a, b + 1))
        rows += [[a, prefix, a, prefix, FULL], [prefix, b, a, b, CAUSAL]]
    return SliceTable(rows).without_empty()


def shared_question(total: int, rng: Generator) -> SliceTable:
    """A causal question, then causal answers that see the question but not each other."""
    (_, question), *answers = random_cuts(total, rng)
    rows = [[0, question, 0, question, CAUSAL]]
    for a, b in answers:
        rows += [[a, b, 0, question, FULL], [a, b, a, b, CAUSAL]]
    return SliceTable(rows)


def random_tiling(total: int, rng: Generator) -> SliceTable:
    """A grid of rectangles, most of them holding a slice of a random type."""
    rows = [
        [q0, q1, k0, k1, int(rng.integers(4))]
        for q0, q1 in random_cuts(total, rng)
        for k0, k1 in random_cuts(total, rng)
        if rng.random() < 0.7
    ]
    return SliceTable(rows)


def empty_rows(total: int, rng: Generator) -> SliceTable:
    """Slices with rows between them that see nothing, an empty slice, and rows that the diagonal leaves empty."""
    rows = [[0, 0, 0, total, FULL]]
    for a, b in random_cuts(total, rng):
        middle = (a + b + 1) // 2
        # More rows than keys: the first rows of a CAUSAL and the last of an INVCAUSAL slice see nothing.
        rows.append([a, middle, 0, (middle - a + 1) // 2, int(rng.choice([CAUSAL, INVCAUSAL, BICAUSAL]))])
    return SliceTable(rows)


def overlapping_queries(total: int, rng: Generator) -> SliceTable:
    """Slices whose query ranges overlap partly while their keys are disjoint."""
    rows = []
    for k0, k1 in random_cuts(total, rng):
        q0, q1 = np.sort(rng.choice(total + 1, size=2, replace=False)).tolist()
        rows.append([q0, q1, k0, k1, int(rng.integers(4))])
    return SliceTable(rows)


def crossing_diagonals(total: int, rng: Generator) -> SliceTable:
    """One box cut along a diagonal into two bands that share tiles but no pair."""
    cut = int(rng.integers(-total // 2, total // 2 + 1))
    bands = [[0, total, 0, total, -UNBOUNDED, cut], [0, total, 0, total, cut + 1, UNBOUNDED]]
    return SliceTable.from_bands(np.array(bands))


MASK_FAMILIES: dict[str, MaskFamily] = {
    family.__name__: family
    for family in (
        full,
        causal,
        varlen_full,
        varlen_causal,
        sliding_window,
        varlen_sliding_window,
        block_causal,
        prefix_lm,
        shared_question,
        random_tiling,
        empty_rows,
        overlapping_queries,
        crossing_diagonals,
    )
}
"""Builders ``(total, rng) -> SliceTable`` by name. No pair is ever covered twice, some tables keep no pair at all."""


def random_masks(max_tokens: int) -> "SearchStrategy[tuple[int, SliceTable]]":
    """Return a hypothesis strategy for ``(total, slices)`` of any family, with ``1 <= total <= max_tokens``."""
    from hypothesis import strategies  # a test-only dependency

    def build(total: int, name: str, seed: int) -> tuple[int, SliceTable]:
        return total, MASK_FAMILIES[name](total, np.random.default_rng(seed))

    return strategies.builds(
        build,
        strategies.integers(1, max_tokens),
        strategies.sampled_from(sorted(MASK_FAMILIES)),
        strategies.integers(0, 2**32 - 1),
    )


def rectangular_masks(max_tokens: int) -> "SearchStrategy[tuple[tuple[int, int], SliceTable]]":
    """Return a hypothesis strategy for ``((queries, keys), slices)`` over two sequences: windows of square masks."""
    from hypothesis import strategies  # a test-only dependency

    def build(
        mask: tuple[int, SliceTable], q: tuple[int, int], k: tuple[int, int]
    ) -> tuple[tuple[int, int], SliceTable]:
        total, slices = mask
        (q0, q1), (k0, k1) = (sorted((start % total, stop % total)) for start, stop in (q, k))
        window = slices.clip_rows(q0, q1 + 1).clip_columns(k0, k1 + 1)
        return (q1 + 1 - q0, k1 + 1 - k0), window.shift(-q0, -k0)

    ends = strategies.tuples(strategies.integers(0, max_tokens), strategies.integers(0, max_tokens))
    return strategies.builds(build, random_masks(max_tokens), ends, ends)
