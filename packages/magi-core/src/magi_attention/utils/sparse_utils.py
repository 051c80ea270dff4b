# SPDX-License-Identifier: Apache-2.0
"""Masks of blocks, as slices."""

import numpy as np
from torch import Tensor

from magi_attention.common.errors import MagiTypeError, MagiValueError
from magi_attention.common.ranges import AttnRanges


def block_mask_to_ranges(
    block_mask: Tensor,
    q_block_size: int,
    k_block_size: int,
    total_seqlen_q: int | None = None,
    total_seqlen_k: int | None = None,
) -> tuple[AttnRanges, AttnRanges]:
    """The slices, all ``"full"``, of a mask that keeps or drops whole blocks of queries and keys.

    Neighboring blocks are joined, first along the keys and then along the queries, since planning takes time by slices.

    Args:
        block_mask: ``[q_blocks, k_blocks]`` bool, True for blocks that are kept; on the host, or a device that waits.
        q_block_size: rows of a block of queries.
        k_block_size: rows of a block of keys.
        total_seqlen_q: rows of the queries, if the last block is shorter; else all blocks are whole.
        total_seqlen_k: the same for keys.

    Returns:
        Query ranges and key ranges of disjoint slices, from top to bottom; none for a mask that keeps nothing.

    Raises:
        TypeError: ``block_mask`` is no bool tensor.
        ValueError: it has not two dims, a size isn't positive, or a total doesn't end in the last block.

    Example:
        >>> import torch
        >>> block_mask_to_ranges(torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(), 8, 16, total_seqlen_k=40)
        ([[0, 8), [8, 16)], [[0, 32), [0, 40)])
    """
    kept = _checked(block_mask)
    rows, columns = kept.shape
    ends_q = _block_ends("q", rows, q_block_size, total_seqlen_q)
    ends_k = _block_ends("k", columns, k_block_size, total_seqlen_k)
    edges = np.diff(np.pad(kept, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    open_runs: dict[tuple[int, int], int] = {}
    found: list[tuple[int, int, int, int]] = []
    for row in range(rows + 1):
        runs = (
            []
            if row == rows
            else list(zip(*(np.flatnonzero(edges[row] == at).tolist() for at in (1, -1)), strict=True))
        )
        go_on = set(runs)
        for run in [each for each in open_runs if each not in go_on]:
            found.append((open_runs.pop(run), row, *run))
        for run in runs:
            open_runs.setdefault(run, row)
    found.sort()
    q_ranges = AttnRanges.from_ranges([(ends_q[q0], ends_q[q1]) for q0, q1, _, _ in found])
    return q_ranges, AttnRanges.from_ranges([(ends_k[k0], ends_k[k1]) for _, _, k0, k1 in found])


def _checked(block_mask: Tensor) -> np.ndarray:
    if not isinstance(block_mask, Tensor) or str(block_mask.dtype) != "torch.bool":
        given = block_mask.dtype if isinstance(block_mask, Tensor) else type(block_mask).__name__
        raise MagiTypeError(f"block_mask must be a bool tensor, not {given}")
    if block_mask.dim() != 2:
        raise MagiValueError(
            f"block_mask must be [q_blocks, k_blocks], for all heads alike; it is {list(block_mask.shape)}"
        )
    return block_mask.cpu().numpy()


def _block_ends(side: str, num_blocks: int, size: int, total: int | None) -> list[int]:
    """Where blocks start, and at last where they end."""
    if size < 1:
        raise MagiValueError(f"{side}_block_size must be positive, not {size}")
    if total is None:
        total = num_blocks * size
    if -(-total // size) != num_blocks:
        raise MagiValueError(f"{num_blocks} blocks of {size} rows cannot be of total_seqlen_{side}={total}")
    return [*range(0, num_blocks * size, size), total]
