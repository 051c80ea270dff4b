# SPDX-License-Identifier: Apache-2.0
"""How long the chunks should be where the user does not say."""

# A chunk is this long unless the sequence is short or very long: the rows of a kernel's tile.
TILE = 128
# Shorter chunks than this are only for sequences that need them to give each rank MIN_PER_RANK.
SHORT = 32
# Chunks are shorter than a tile where a rank would get fewer than GOOD_PER_RANK: heavy ones would make up too much of
# its area. They are so even where it would get fewer than FINE_PER_RANK if all ranks get no more than FINE_MANY then.
# They grow beyond a tile only while a rank has more than ENOUGH_PER_RANK and all ranks have more than MANY, for a quick
# plan.
MIN_PER_RANK, GOOD_PER_RANK, FINE_PER_RANK, ENOUGH_PER_RANK, FINE_MANY, MANY = 8, 64, 96, 128, 32768, 8192
# Cells are longer than a tile only if there would be more than MANY_CELLS.
MANY_CELLS = 32768
# The padding should be at most this part of the sequence.
PADDING_PART = 64


def choose_chunk_size(total: int, num_ranks: int) -> int:
    """Choose the rows of a chunk for a sequence of ``total`` rows: a power of two.

    Short chunks follow the ends of documents closely and balance areas finely; the runs that a rank gets are long
    anyway, as :mod:`magi_attention.plan.locality` keeps neighbors together. But a plan's cost grows with the number
    of chunks, and kernels like runs that start at a multiple of a tile. So chunks are one tile long, longer where there
    are very many, shorter where a rank would get few or where ``total``, padded to a multiple of ``num_ranks`` chunks,
    would become much longer.
    """
    chunk_size = TILE
    while total > chunk_size * max(MANY, ENOUGH_PER_RANK * num_ranks):
        chunk_size *= 2
    while chunk_size > SHORT and total < GOOD_PER_RANK * num_ranks * chunk_size:
        chunk_size //= 2
    while chunk_size > SHORT and 2 * total <= FINE_MANY * chunk_size and total < FINE_PER_RANK * num_ranks * chunk_size:
        chunk_size //= 2
    while chunk_size > 1 and total < MIN_PER_RANK * num_ranks * chunk_size:
        chunk_size //= 2
    while chunk_size > SHORT and -total % (num_ranks * chunk_size) * PADDING_PART > total:
        chunk_size //= 2
    return chunk_size


def choose_cell_size(total: int) -> int:
    """Choose the rows of a cell, where cuts follow documents: a power of two."""
    cell_size = TILE
    while total > cell_size * MANY_CELLS:
        cell_size *= 2
    return cell_size
