# SPDX-License-Identifier: Apache-2.0
"""Deal chunks so that token counts and mask areas are equal while few key rows travel between ranks.

A rank receives a row if it reads it and does not own it. So documents (see :mod:`magi_attention.plan.documents`) should
stay whole, and one that a single rank cannot compute should be spread over as few ranks as possible;
:mod:`magi_attention.plan.deal` says how. Here its result is evened out and judged.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.slices import SliceTable
from magi_attention.plan.cells import Cells, cut_documents, first_rows_read_far
from magi_attention.plan.chunks import ChunkWork, measure_chunks
from magi_attention.plan.deal import Deal, hides_travel, most_beside_tile
from magi_attention.plan.demand import find_demand
from magi_attention.plan.documents import find_documents
from magi_attention.plan.even_out import even_out
from magi_attention.plan.exact_rows import Limits, hold_exact_rows
from magi_attention.plan.filling import Prefixes, find_most_sent
from magi_attention.plan.gather import RANKS_PER_CYCLE, ReceiverSwaps
from magi_attention.plan.layout import Layout
from magi_attention.plan.light_ends import part_light_ends
from magi_attention.plan.spread import MOST_ROUNDS, SenderSwaps
from magi_attention.plan.totals import totals

Array = NDArray[np.int64]
Owner = NDArray[np.int64]


class Terms(NamedTuple):
    """How chunks are dealt.

    Attributes:
        joined_share: short neighboring documents are joined up to this share of a rank's tokens and area, less
            LESS_JOINED / num_ranks and MUCH_LESS / num_ranks²: a small group has few units to choose from.
        most: the most area of a rank, in ten-thousandths of the mean.
        prefixes: how many prefixes of the light documents are tried as fillings.
        most_joined: the most that ``joined_share`` is after that.
        swaps: rounds of swaps for senders at most, and ranks for each cycle of those for receivers.
    """

    joined_share: float
    most: int
    prefixes: Prefixes
    most_joined: float = 1.0
    swaps: tuple[int, int] = (MOST_ROUNDS, RANKS_PER_CYCLE)


LESS_JOINED, MUCH_LESS = 1.2, 8.0
# Joined documents part fewer chunks that have rows of two documents. Cells have none; their areas change a little when
# cuts are shifted, up to SHIFTED.
CHUNKS, CELLS, SHIFTED = (
    Terms(0.5, 10198, Prefixes(1, 2, 0)),
    Terms(0.3, 10192, Prefixes(0, 2, 6, shorter=0.06, early=0.0), 0.18),
    10199,
)
# Where that was too much, they are dealt again.
CAREFUL = 10165
# Deals of so many ranks may take longer, and try more fillings. All cuts between their cells are shifted afterwards,
# which does part of what swaps do.
MANY_RANKS, CHUNKS_OF_MANY = 128, Prefixes(1, 4, 0)
CELLS_OF_MANY = Terms(0.45, CELLS.most, Prefixes(1, 4, 6, few=150, shorter=0.15), swaps=(1, 30))
# Where travel is hidden, areas are to be more even.
MOST_WHERE_HIDDEN = 10030
# Runs of documents with loads beyond this multiple of the mean are not taken.
MOST = 1.02
# Up to so many chunks, the result is compared with the rival's, and with those that join more documents: up to these
# shares of a rank. Of few ranks, each of which holds pieces of many documents, any may come out best.
COMPARED_CHUNKS, MORE_JOINED = 1024, (0.5, 1.0)


def deal_by_locality(
    slices: SliceTable,
    work: ChunkWork,
    chunk_size: int,
    num_ranks: int,
    rival: Callable[[], Owner],
) -> Owner:
    """Deal the chunks to the ranks; counts differ by at most one.

    Args:
        slices: the mask over the whole sequence.
        work: its chunks' work.
        chunk_size: rows of a chunk, on average.
        num_ranks: ranks of the group.
        rival: makes the deal of a simple algorithm, which is returned if it is better. It is asked for where the loads
            came out uneven, and where there are so few chunks that a comparison of the rows that travel is cheap.

    Returns:
        ``(num_chunks,)`` int64, the rank of each chunk.
    """
    chunks = CHUNKS._replace(prefixes=CHUNKS_OF_MANY) if num_ranks >= MANY_RANKS else CHUNKS
    owner, limit, *_ = _deal(slices, work, chunk_size, num_ranks, chunks)
    is_compared = len(work.area) <= COMPARED_CHUNKS
    if _peak(owner, work) <= limit and not is_compared:
        return owner
    deals, other = [owner], rival()
    if is_compared:
        joining = [chunks._replace(joined_share=math.inf, most_joined=share) for share in MORE_JOINED]
        deals += [_deal(slices, work, chunk_size, num_ranks, terms).owner for terms in joining]
    limit = max(limit, _peak(other, work) * _most_of(CHUNKS, num_ranks, work.total) // 10000)
    deals = [deal for deal in deals if _peak(deal, work) <= limit]
    return _least_travel(deals, other, work, chunk_size, num_ranks) if is_compared else [*deals, other][0]


def deal_documents(
    slices: SliceTable, total: int, cell_size: int, num_ranks: int, *, only_far: bool = False
) -> tuple[Array, Array] | None:
    """Deal rows to the ranks, with cuts that follow the documents; numbers of rows differ by at most one.

    Args:
        slices: the mask over the whole sequence.
        total: rows of the sequence.
        cell_size: rows of the cells that are dealt, on average.
        num_ranks: ranks of the group.
        only_far: whether to do so only where documents' first rows read far.

    Returns:
        ``(n + 1,)`` where runs start, and ``total``, and ``(n,)`` the rank of each run; None where first rows don't
        read far though they should, or the loads came out uneven.
    """
    num_cells = -(-total // (cell_size * num_ranks)) * num_ranks
    if num_cells > total:
        return None
    cuts, document = cut_documents(slices, total, num_cells)
    cells = Cells(measure_chunks(slices, cuts), document)
    if only_far and not first_rows_read_far(cells.work, document):
        return None
    each, more = divmod(total, num_ranks)
    wanted = each + (np.arange(num_ranks) < more)
    is_many = num_ranks >= MANY_RANKS
    tries = [CELLS_OF_MANY if is_many else CELLS]
    if not hides_travel(num_ranks, total):  # else the first one was as careful
        tries.append(tries[0]._replace(most=CAREFUL))
    for terms in tries:
        dealt = _deal(slices, cells.work, cell_size, num_ranks, terms, document)
        limit = dealt.limit * SHIFTED // terms.most
        limits = Limits(limit, None if dealt.is_even else np.minimum(limit, dealt.beside_tile), dealt.most_sent)
        held = hold_exact_rows(cells, dealt.owner, wanted, limits, is_recut=is_many)
        if int(held.load.max()) * num_ranks <= MOST * int(cells.area_before[-1]):
            return held.begin, held.rank
    return None


class Dealt(NamedTuple):
    """A deal.

    Attributes:
        owner: ``(num_chunks,)`` the rank of each chunk.
        limit: the most area that a rank should have.
        beside_tile: ``(num_ranks,)`` the same for ranks whose runs part costly tiles.
        most_sent: the most rows that a rank should send.
        is_even: whether ranks aim at more even areas than ``limit``.
    """

    owner: Owner
    limit: int
    beside_tile: Array
    most_sent: float
    is_even: bool


def _deal(
    slices: SliceTable, work: ChunkWork, chunk_size: int, num_ranks: int, terms: Terms, label: Array | None = None
) -> Dealt:
    """Deal and even out."""
    joined_share = terms.joined_share - LESS_JOINED / num_ranks - MUCH_LESS / num_ranks**2
    joined_share = min(max(0.0, joined_share), terms.most_joined)
    documents = find_documents(slices, work, num_ranks, joined_share, label)
    documents = part_light_ends(documents, num_ranks, chunk_size)
    each, more = divmod(len(work.area), num_ranks)
    capacities = [each + (rank < more) for rank in range(num_ranks)]
    limit = int(documents.area[-1]) * _most_of(terms, num_ranks, work.total) // (10000 * num_ranks)
    # With many rows per rank, one tile doesn't matter.
    parts_tiles = label is not None and bool(most_beside_tile(documents, num_ranks, documents.read.max()) < limit)
    deal = Deal(documents, capacities, chunk_size, terms.prefixes)
    hides = hides_travel(num_ranks, work.total)
    dealt = deal.run(terms.most / 10000, hides=hides, parts_tiles=parts_tiles, is_divided=label is not None)
    even = even_out(dealt, documents, num_ranks, limit)
    beside_tile = np.full(num_ranks, documents.area[-1])
    if parts_tiles:
        reach = np.zeros(num_ranks, np.int64)
        np.maximum.at(reach, even, documents.read)
        beside_tile = most_beside_tile(documents, num_ranks, reach)
    limits = np.minimum(limit, beside_tile)
    most_sent = find_most_sent(documents, num_ranks, chunk_size)
    spread = SenderSwaps(even, documents, num_ranks, chunk_size, limits, most_sent)
    most_rounds, ranks_per_cycle = terms.swaps
    swapped = ReceiverSwaps(spread.run(most_rounds), documents, num_ranks, chunk_size, limits, most_sent)
    swapped.sends = spread.sends
    owner = np.empty(len(work.area), np.int64)
    owner[documents.line] = swapped.run(ranks_per_cycle)
    return Dealt(owner, limit, beside_tile, most_sent * chunk_size, deal.is_even)


def _most_of(terms: Terms, num_ranks: int, total: int) -> int:
    return MOST_WHERE_HIDDEN if hides_travel(num_ranks, total) else terms.most


def _peak(owner: Owner, work: ChunkWork) -> int:
    return int(totals(owner, work.area, int(owner.max()) + 1).max())


def _least_travel(deals: Sequence[Owner], other: Owner, work: ChunkWork, chunk_size: int, num_ranks: int) -> Owner:
    """The deal with the fewest rows to travel and for the busiest rank to move; never more rows than of ``other``."""

    def travel(owner: Owner) -> tuple[int, int]:
        layout = Layout(work.total, work.total, chunk_size, num_ranks, owner, work.cuts)
        demand = find_demand(work.slices, layout, work.deal_keys(layout) if work.deal_keys else None)
        return demand.rows_received, demand.most_moved

    most, of_busiest = travel(other)
    best, least = other, most + num_ranks * of_busiest
    for deal in deals:
        received, of_busiest = travel(deal)
        if received <= most and received + num_ranks * of_busiest <= least:
            best, least = deal, received + num_ranks * of_busiest
    return best
