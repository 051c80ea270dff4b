# SPDX-License-Identifier: Apache-2.0
"""Helpers that build masks and pad tensors. They need no process group."""

import operator
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from magi_attention.common import bands as band
from magi_attention.common.enum import AttnMaskType
from magi_attention.common.errors import MagiTypeError, MagiValueError
from magi_attention.common.range import AttnRange
from magi_attention.common.ranges import AttnRanges
from magi_attention.common.slices import MOST_ROWS
from magi_attention.runtime.rows import concatenate

Mask = tuple[AttnRanges, AttnRanges, list[AttnMaskType]]
UNLIMITED = -1


def compute_pad_size(total_seqlen_q: int, cp_size: int, chunk_size: int) -> int:
    """The smallest number of rows that makes ``total_seqlen_q`` a multiple of ``chunk_size * cp_size``.

    It takes ``chunk_size`` as given, while a key may use smaller chunks: see ``key.chunk_size`` and ``key.pad_size``.

    Raises:
        ValueError: ``cp_size`` or ``chunk_size`` isn't positive.
    """
    if cp_size < 1 or chunk_size < 1:
        raise ValueError(f"cp_size and chunk_size must be positive, but are {cp_size} and {chunk_size}")
    return -total_seqlen_q % (chunk_size * cp_size)


def squash_batch_dim(x: Tensor) -> Tensor:
    """Join batch and sequence: ``[b, s, ...]`` becomes ``[b * s, ...]``."""
    if x.dim() < 2:
        raise ValueError(f"x must have a batch and a sequence dim, but its shape is {tuple(x.shape)}")
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def pad_at_dim(x: Tensor, dim: int, pad_size: int, value: float = 0.0, side: str = "right") -> Tensor:
    """Append (``side="right"``) or prepend (``"left"``) ``pad_size`` entries of ``value`` to one dim."""
    _check_dim(x, dim)
    if pad_size < 0:
        raise ValueError(f"pad_size is {pad_size}; it must not be negative")
    if side not in ("left", "right"):
        raise ValueError(f'side is {side!r}; it must be "left" or "right"')
    padding = x.new_full((*x.shape[:dim], pad_size, *x.shape[dim + 1 :]), value)
    return concatenate([x, padding] if side == "right" else [padding, x], dim)


def unpad_at_dim(x: Tensor, dim: int, pad_size: int) -> Tensor:
    """Drop the last ``pad_size`` entries of one dim."""
    _check_dim(x, dim)
    if not 0 <= pad_size <= x.shape[dim]:
        raise ValueError(f"pad_size is {pad_size}; dim {dim} has {x.shape[dim]} entries to drop")
    return x.narrow(dim, 0, x.shape[dim] - pad_size)


def _check_dim(x: Tensor, dim: int) -> None:
    if not 0 <= dim < x.dim():
        raise ValueError(f"dim is {dim}; for a tensor of shape {tuple(x.shape)} it must be from 0 to {x.dim() - 1}")


def apply_padding(
    q_ranges: AttnRanges,
    k_ranges: AttnRanges,
    attn_mask_type: Sequence[AttnMaskType],
    total_seqlen: int,
    pad_size: int,
) -> Mask:
    """Append a slice for rows ``[total_seqlen, total_seqlen + pad_size)`` that attend to nothing, to copies."""
    q_ranges, k_ranges = q_ranges.clone(), k_ranges.clone()
    q_ranges.append(AttnRange(total_seqlen, total_seqlen + pad_size))
    k_ranges.append(AttnRange(0, 0))
    return q_ranges, k_ranges, [*attn_mask_type, AttnMaskType.FULL]


def infer_varlen_mask_from_batch(
    batch_size: int, seq_len: int, device: torch.device | str = "cuda"
) -> tuple[Tensor, Tensor]:
    """Cumulative lengths of ``batch_size`` documents of ``seq_len`` tokens each.

    Args:
        batch_size: number of documents.
        seq_len: tokens of each.
        device: where the tensors go; on a machine without a GPU, ``"cuda"`` means the CPU.

    Returns:
        ``(cu_seqlens_q, cu_seqlens_k)``, the same int32 tensor ``[batch_size + 1]`` twice.

    Raises:
        ValueError: a number is negative, or there are more tokens than a sequence can have.
    """
    if batch_size < 0 or seq_len < 0:
        raise ValueError(f"batch_size and seq_len must not be negative, but are {batch_size} and {seq_len}")
    if batch_size * seq_len > MOST_ROWS:
        raise ValueError(f"{batch_size} documents of {seq_len} tokens are too long: together {MOST_ROWS} at most")
    if device == "cuda" and not torch.cuda.is_available():
        device = "cpu"
    cu_seqlens = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * seq_len
    return cu_seqlens, cu_seqlens


def infer_attn_mask_from_sliding_window(q_range: AttnRange, k_range: AttnRange, window_size: tuple[int, int]) -> Mask:
    """Slices of a sliding window over one document.

    Row i keeps the keys ``i + off - left <= j <= i + off + right`` of ``k_range``, where ``off = k_range.end -
    q_range.end``: the window is inclusive, and aligned to the document's end as in FlashAttention.

    Args:
        q_range: the document's queries.
        k_range: its keys.
        window_size: ``(left, right)``; -1, or at least ``k_range.seqlen - 1``, means no limit on that side.

    Returns:
        Query ranges, key ranges and types of at most three disjoint slices, from top to bottom.

    Raises:
        TypeError: A range that is no :class:`AttnRange`, or a window that isn't two integers.
        ValueError: A side of the window below -1, or another number of sides than two.
    """
    for name, given in (("q_range", q_range), ("k_range", k_range)):
        if not isinstance(given, AttnRange):
            raise MagiTypeError(f"{name} must be an AttnRange(start, end), not {given!r}")
    documents_q, documents_k = [(q_range.start, q_range.end)], [(k_range.start, k_range.end)]
    return _window_slices(documents_q, documents_k, window_size, num_global_keys=0)


def infer_attn_mask_from_cu_seqlens(
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    causal: bool = False,
    window_size: tuple[int, int] = (UNLIMITED, UNLIMITED),
    global_window_size: int = 0,
) -> tuple[AttnRanges, AttnRanges, list[AttnMaskType], int, int]:
    """Slices of packed documents that attend to themselves only.

    Args:
        cu_seqlens_q: ``[documents + 1]`` integers, the documents' first queries and at last the total.
        cu_seqlens_k: the same for keys.
        causal: each document is causal; not together with a window.
        window_size: a sliding window inside each document, see :func:`infer_attn_mask_from_sliding_window`.
        global_window_size: with a window, every row also sees its document's first ``global_window_size`` keys, as far
            as the window's right side admits them.

    Returns:
        Query ranges, key ranges, types, total of queries, total of keys.

    Raises:
        ValueError: Lengths that don't start at 0, shrink, or differ in number; contradictory options.
    """
    ends_q, ends_k = _cumulative("cu_seqlens_q", cu_seqlens_q), _cumulative("cu_seqlens_k", cu_seqlens_k)
    if len(ends_q) != len(ends_k):
        raise MagiValueError(
            f"cu_seqlens_q has {len(ends_q)} entries and cu_seqlens_k {len(ends_k)}; both need one per "
            "document and the total"
        )
    if global_window_size < 0:
        raise MagiValueError(f"global_window_size is {global_window_size}; it must not be negative")
    has_window = _checked_window(window_size) != (UNLIMITED, UNLIMITED)
    if causal and has_window:
        raise MagiValueError(f"causal=True excludes window_size={window_size}; a causal window is (left, 0)")
    documents_q, documents_k = list(pairwise(ends_q)), list(pairwise(ends_k))
    if has_window:
        q_ranges, k_ranges, types = _window_slices(documents_q, documents_k, window_size, global_window_size)
    else:
        q_ranges, k_ranges = AttnRanges.from_ranges(documents_q), AttnRanges.from_ranges(documents_k)
        types = [AttnMaskType.CAUSAL if causal else AttnMaskType.FULL] * len(documents_q)
    return q_ranges, k_ranges, types, ends_q[-1], ends_k[-1]


def _window_slices(
    documents_q: Sequence[tuple[int, int]],
    documents_k: Sequence[tuple[int, int]],
    window_size: tuple[int, int],
    num_global_keys: int,
) -> Mask:
    """Each document's first ``num_global_keys`` keys without the left limit, and the window over its other keys."""
    (q0, q1), (k0, k1) = np.array(documents_q).T, np.array(documents_k).T
    offset, widest = k1 - q1, k1 - k0 - 1
    longest = int(widest.max()) + 1  # numbers beyond it, which NumPy may not hold, mean the same
    left, right = (min(side, longest) for side in _checked_window(window_size))
    lower = np.where((left == UNLIMITED) | (left >= widest), -band.UNBOUNDED, offset - left)
    upper = np.where((right == UNLIMITED) | (right >= widest), band.UNBOUNDED, offset + right)
    split = np.minimum(k0 + min(num_global_keys, longest), k1)
    first = np.column_stack([q0, q1, k0, split, np.full_like(lower, -band.UNBOUNDED), upper])
    others = np.column_stack([q0, q1, split, k1, lower, upper])
    rows = band.slices_from_bands(np.stack([first, others], axis=1).reshape(-1, 6))[0].tolist()
    q_ranges = AttnRanges.from_ranges([(q0, q1) for q0, q1, _, _, _ in rows])
    k_ranges = AttnRanges.from_ranges([(k0, k1) for _, _, k0, k1, _ in rows])
    return q_ranges, k_ranges, [AttnMaskType.from_int_type(kind) for *_, kind in rows]


def _checked_window(window_size: tuple[int, int]) -> tuple[int, int]:
    try:
        left, right = map(operator.index, window_size)
    except TypeError:
        raise MagiTypeError(f"window_size must be (left, right), not {window_size!r}") from None
    except ValueError:
        raise MagiValueError(f"window_size is {window_size}; it must be (left, right)") from None
    if left < UNLIMITED or right < UNLIMITED:
        raise MagiValueError(f"window_size is {window_size}; each side must be at least 0, or -1 for no limit")
    return left, right


def _cumulative(name: str, cu_seqlens: Tensor | Sequence[int]) -> list[int]:
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
            raise MagiTypeError(
                f"{name} is a {cu_seqlens.dtype} tensor of shape {tuple(cu_seqlens.shape)}; it must be 1-D and integer"
            )
        cu_seqlens = cu_seqlens.tolist()
    try:
        ends = [operator.index(end) for end in cu_seqlens]
    except TypeError:
        raise MagiTypeError(f"{name} is {cu_seqlens!r}; it must be integers") from None
    if len(ends) < 2 or ends[0] != 0 or any(end < start for start, end in pairwise(ends)):
        raise MagiValueError(
            f"{name} is {ends}; it must start at 0, never decrease, and have one entry per document and the total"
        )
    return ends
