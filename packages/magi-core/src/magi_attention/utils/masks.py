# SPDX-License-Identifier: Apache-2.0
"""Dense masks."""

from collections.abc import Iterable, Sequence
from operator import index

import torch

from magi_attention.common.mask import AttnMask
from magi_attention.common.ranges import AttnRanges


def make_attn_mask_from_ffa_args(
    q_ranges: AttnRanges | Iterable[Sequence[int]],
    k_ranges: AttnRanges | Iterable[Sequence[int]],
    attn_type_map: Sequence[int],
    total_seqlen_q: int,
    total_seqlen_k: int,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The pairs that any of several slices keeps, as a bool tensor ``[total_seqlen_q, total_seqlen_k]``.

    Args:
        q_ranges: the slices' queries; a list of pairs will do, or a tensor ``[n, 2]``.
        k_ranges: the slices' keys.
        attn_type_map: the slices' types as integers: 0 FULL, 1 CAUSAL, 2 INVCAUSAL, 3 BICAUSAL.
        total_seqlen_q: the number of queries.
        total_seqlen_k: the number of keys.
        device: where the mask goes; None for the current GPU, or the CPU where there is none.

    Raises:
        ValueError: if the lists differ in length, a range is invalid or outside the totals, or a type is unknown.
    """
    queries, keys = AttnRanges.from_ranges(q_ranges), AttnRanges.from_ranges(k_ranges)
    mask = AttnMask.from_ranges(queries, keys, list(map(index, attn_type_map)), total_seqlen_q, total_seqlen_k)
    return mask.mask_tensor.squeeze(-1).to(device or ("cuda" if torch.cuda.is_available() else "cpu"), torch.bool)
