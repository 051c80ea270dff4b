# SPDX-License-Identifier: Apache-2.0
"""Part the light ends of documents that no rank can hold whole, before ranks are served.

A document of more rows than a rank holds is cut in any case, and where it is cut decides what its parts are good for.
The first rows of a causal document weigh little. They go well with the heavy rows of a longer one, and a cut there
costs no more rows than lie below it. Left to the deal, they end on the ranks that are served last, which could hold
heavier ones. Good solutions of the linear program of :mod:`magi_attention.plan.prices` cut such documents in two ways:

- If a rank can compute the heaviest rows that fill it, these are its only ones. What is below them is a light document.
- Otherwise the cut is where rows get dear, at 0.3 of the mean area of a row.
"""

from dataclasses import replace

import numpy as np

from magi_attention.plan.documents import Documents

# A row is light up to this share of the mean area of a row.
LIGHT = 0.3
# So many rows of a document must be light, as shares of a rank's rows: few are not worth a cut, many need no help.
FEWEST, MOST = 0.1, 0.5
# Documents of more ranks' rows are left to the deal, since many ranks read their light ends.
MOST_RANKS = 5
# The heavy end of a document of up to so many ranks' rows is to fill a rank.
LONGEST = 2.0
# The most area of a rank, as a multiple of the mean.
MOST_AREA = 1.02
# A cut may cost so many rows for each row below it: video blocks read on to their end.
DEAREST = 2.0


def part_light_ends(documents: Documents, num_ranks: int, chunk_size: int) -> Documents:
    """Make runs of their own of the light ends of documents that no rank can hold.

    Args:
        documents: the line.
        num_ranks: ranks of the group.
        chunk_size: rows of a chunk.

    Returns:
        The same line with more runs.
    """
    area, num_chunks = documents.area, len(documents.line)
    room = num_chunks // num_ranks
    length = documents.stop - documents.start
    chosen = np.flatnonzero((length > room) & (length <= MOST_RANKS * room))
    # Light ends go with heavy rows of longer documents; without these, both ends of a document stay together.
    if not len(chosen) or length.max() <= MOST_RANKS * room:
        return documents
    start, stop, length = documents.start[chosen], documents.stop[chosen], length[chosen]
    dear = np.append(np.flatnonzero(np.diff(area) * num_chunks > LIGHT * area[-1]), num_chunks)
    light = np.minimum(dear[np.searchsorted(dear, start)], stop) - start
    heavy_start = stop - room
    fills = (area[stop] - area[heavy_start]) * num_ranks <= MOST_AREA * area[-1]
    fills &= length <= LONGEST * room
    cut = np.where(fills, heavy_start, start + light)
    is_worth_it = (light >= FEWEST * room) & (light <= MOST * room)
    is_worth_it &= documents.cut[cut] <= DEAREST * chunk_size * (cut - start)
    cuts = cut[is_worth_it]
    return replace(documents, start=np.union1d(documents.start, cuts), stop=np.union1d(documents.stop, cuts))
