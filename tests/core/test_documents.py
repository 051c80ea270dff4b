# SPDX-License-Identifier: Apache-2.0
"""What a line of documents says of the rows that its chunks read."""

import itertools

import numpy as np
import pytest

from magi_attention.common.slices import SliceTable
from magi_attention.plan.chunks import measure_chunks
from magi_attention.plan.documents import find_documents, key_hulls
from magi_attention.plan.layout import even_cuts
from magi_attention.testing.masks import MASK_FAMILIES

MOST_ROWS = 8


def short_documents(total: int, rng: np.random.Generator) -> SliceTable:
    """Documents of one of the longest chunks each, of different kinds, which are joined."""
    ends = [*range(0, total, MOST_ROWS), total]
    return SliceTable([[a, b, a, b, int(rng.integers(4))] for a, b in itertools.pairwise(ends)]).without_empty()


FAMILIES = MASK_FAMILIES | {"short_documents": short_documents}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rows_read_reach_from_a_documents_first_chunk_on(family: str) -> None:
    rng = np.random.default_rng(11)
    for _ in range(60):
        num_ranks, chunk_size = int(rng.integers(2, 9)), int(rng.choice([1, 3, 5, MOST_ROWS]))
        cuts = even_cuts(num_ranks * chunk_size * int(rng.integers(1, 24)), chunk_size)
        slices = FAMILIES[family](int(cuts[-1]), rng)
        work = measure_chunks(slices, cuts)
        documents = find_documents(slices, work, num_ranks, 0.5)
        low, high = key_hulls(work)
        for start, stop in itertools.pairwise(np.flatnonzero(documents.is_border)):
            chunks = documents.line[start:stop]
            begin, end = cuts[chunks[0]], cuts[chunks[0] + 1]
            for chunk, read in zip(chunks, documents.read[start:stop], strict=True):
                if chunks[0] <= chunks[-1]:  # first rows first
                    expected = high[chunk] - begin if low[chunk] < end else 0
                else:
                    expected = end - low[chunk] if high[chunk] > begin else 0
                assert read == expected
