# SPDX-License-Identifier: Apache-2.0
"""``DispatchMeta``: which chunks each rank holds, as lists."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor

from magi_attention.common.enum import AttnMaskType, AttnRole, AttnType
from magi_attention.common.ranges import AttnRanges
from magi_attention.common.slices import SliceTable
from magi_attention.config import DispatchConfig
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.layout import Layout


@dataclass
class DispatchMeta:
    """One rank's view of the layout of queries or of keys.

    Attributes:
        attn_role: whether queries or keys are laid out.
        attn_type: self- or cross-attention.
        total_seqlen: rows of the sequence, padding included.
        shard_seqlen: rows of this rank.
        max_valid_ids: rows of the sequence without padding.
        chunk_size: rows of a chunk, unless ``chunk_actual_sizes`` says otherwise.
        num_chunks: chunks of the sequence.
        cp_rank: this rank.
        cp_size: ranks of the group.
        partitions: each rank's chunks, ascending.
        partitions_perm_idxs: the same as one list: the chunk at each place of the ranks' joined rows.
        partitions_unperm_idxs: the inverse: the place of each chunk.
        chunk_actual_sizes: rows of each chunk; None if all have ``chunk_size``.
        split_sizes: rows of each rank; None if all have as many.
    """

    attn_role: AttnRole
    attn_type: AttnType
    total_seqlen: int
    shard_seqlen: int
    max_valid_ids: int
    chunk_size: int
    num_chunks: int
    cp_rank: int
    cp_size: int
    partitions: list[list[int]]
    partitions_perm_idxs: list[int]
    partitions_unperm_idxs: list[int]
    chunk_actual_sizes: list[int] | None = None
    split_sizes: list[int] | None = None

    @classmethod
    def from_layout(
        cls,
        layout: Layout,
        rank: int,
        attn_role: AttnRole = AttnRole.QUERY,
        attn_type: AttnType = AttnType.SELF_ATTN,
    ) -> Self:
        """Describe a layout as ``rank`` sees it."""
        partitions = [layout.chunks_of(each).tolist() for each in range(layout.num_ranks)]
        order = np.concatenate(partitions).astype(np.int64)
        sizes = np.diff(layout.cuts)
        rows = layout.rows_per_rank
        return cls(
            attn_role=attn_role,
            attn_type=attn_type,
            total_seqlen=layout.total,
            shard_seqlen=int(rows[rank]),
            max_valid_ids=layout.num_real,
            chunk_size=layout.chunk_size,
            num_chunks=len(layout.owner),
            cp_rank=rank,
            cp_size=layout.num_ranks,
            partitions=partitions,
            partitions_perm_idxs=order.tolist(),
            partitions_unperm_idxs=np.argsort(order).tolist(),
            chunk_actual_sizes=sizes.tolist() if (sizes != layout.chunk_size).any() else None,
            split_sizes=rows.tolist() if (rows != rows[0]).any() else None,
        )

    @cached_property
    def layout(self) -> Layout:
        """The layout that this describes."""
        owner = np.empty(self.num_chunks, np.int64)
        for rank, chunks in enumerate(self.partitions):
            owner[chunks] = rank
        sizes = self.chunk_actual_sizes
        cuts = None if sizes is None else np.append(0, np.cumsum(sizes))
        return Layout(self.max_valid_ids, self.total_seqlen, self.chunk_size, self.cp_size, owner, cuts)

    @property
    def host_ranges_per_rank(self) -> list[AttnRanges]:
        """Each rank's rows as global ranges, ascending, neighboring chunks joined."""
        return [AttnRanges.from_ranges(self.layout.runs_of(rank)[:, :2].tolist()) for rank in range(self.cp_size)]

    @cached_property
    def position_ids(self) -> Tensor:
        """The global position of each of this rank's rows, int64; padding repeats the last real position."""
        return torch.from_numpy(self.layout.positions(self.cp_rank)).clamp(max=self.max_valid_ids - 1)


def make_dispatch_meta_from_qk_ranges(
    q_ranges: AttnRanges,
    k_ranges: AttnRanges,
    attn_mask_type: Sequence[AttnMaskType],
    total_seqlen_q: int,
    total_seqlen_k: int,
    chunk_size: int,
    cp_size: int,
    cp_rank: int,
    dispatch_config: DispatchConfig = DispatchConfig(),  # noqa: B008 - frozen
) -> tuple[DispatchMeta, DispatchMeta]:
    """Deal the sequence of a self-attention, taken as it is without padding, to ranks.

    Args:
        q_ranges: query rows of the mask's slices.
        k_ranges: key rows of the slices.
        attn_mask_type: the slices' types.
        total_seqlen_q: rows of the sequence.
        total_seqlen_k: the same number: queries and keys share their layout.
        chunk_size: rows of a chunk.
        cp_size: ranks of the group.
        cp_rank: the rank whose view is returned.
        dispatch_config: its algorithm deals the chunks.

    Returns:
        The layouts of queries and of keys.

    Raises:
        ValueError: Different totals, or fewer chunks than ranks.
    """
    if total_seqlen_q != total_seqlen_k:
        raise ValueError(f"{total_seqlen_q=} and {total_seqlen_k=} must be equal: queries and keys share their layout")
    layout = make_layout(
        SliceTable.from_lists(
            q_ranges.to_naive_ranges(), k_ranges.to_naive_ranges(), [each.to_int_type() for each in attn_mask_type]
        ),
        num_real=total_seqlen_q,
        total=total_seqlen_q,
        chunk_size=chunk_size,
        num_ranks=cp_size,
        algorithm=dispatch_config.alg,
    )
    return (
        DispatchMeta.from_layout(layout, cp_rank, AttnRole.QUERY),
        DispatchMeta.from_layout(layout, cp_rank, AttnRole.KEY),
    )
