# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments that keys are made of, and the rules that turn them into a key's fields."""

import math
import operator
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from magi_attention.common.enum import AttnMaskType
from magi_attention.common.errors import MagiTypeError, MagiValueError
from magi_attention.common.ranges import AttnRanges
from magi_attention.common.slices import MOST_ROWS
from magi_attention.config import DispatchAlg, DistAttnConfig, LocalityDispatchAlg
from magi_attention.env import general
from magi_attention.env.comm import is_plan_check_enable
from magi_attention.plan.chunk_size import choose_chunk_size
from magi_attention.utils.tensors import check_plain_tensor

GeneralAttnMaskType = str | AttnMaskType | Sequence[str | AttnMaskType]
"""A mask type or its name, for all slices alike or one per slice."""


def resolve_mask_types(attn_mask_type: GeneralAttnMaskType, num_slices: int) -> list[AttnMaskType]:
    """One mask type per slice; a single type or name stands for all of them.

    Raises:
        TypeError: Something else than names and mask types.
        ValueError: An unknown name, or a list of another length.
    """
    if isinstance(attn_mask_type, str | AttnMaskType):
        return [_resolve_mask_type(attn_mask_type)] * num_slices
    if not isinstance(attn_mask_type, list | tuple):
        raise MagiTypeError(f"attn_mask_type must be a mask type, its name, or a list of them, not {attn_mask_type!r}")
    if len(attn_mask_type) != num_slices:
        raise MagiValueError(f"attn_mask_type has {len(attn_mask_type)} entries for {num_slices} q ranges")
    return [_resolve_mask_type(each) for each in attn_mask_type]


def _resolve_mask_type(mask_type: str | AttnMaskType) -> AttnMaskType:
    if not isinstance(mask_type, str | AttnMaskType):
        raise MagiTypeError(f"a mask type must be an AttnMaskType or its name, not {mask_type!r}")
    try:
        return AttnMaskType(mask_type)
    except ValueError:
        known = ", ".join(each.value for each in AttnMaskType)
        raise ValueError(f"{mask_type!r} is not a mask type; known are {known}") from None


def as_integers(**counts: int) -> list[int]:
    """The counts as plain integers, be they numpy's or tensors of one.

    Raises:
        TypeError: one is not an integer; names it.
    """
    return [_as_integer(name, count) for name, count in counts.items()]


def _as_integer(name: str, count: int) -> int:
    try:
        if not isinstance(count, bool):
            return operator.index(count)
    except TypeError:
        pass
    raise MagiTypeError(f"{name} must be an integer, not {count!r}")


def check_ranges(q_ranges: AttnRanges, k_ranges: AttnRanges, total_seqlen_q: int, total_seqlen_k: int) -> None:
    """Raise unless there are equally many query and key ranges, at least one, and none ends after its sequence."""
    for name, ranges, total_seqlen in (("q_ranges", q_ranges, total_seqlen_q), ("k_ranges", k_ranges, total_seqlen_k)):
        if not isinstance(ranges, AttnRanges):
            raise MagiTypeError(f"{name} must be AttnRanges, not {type(ranges).__name__}; see AttnRanges.from_ranges")
        if ranges.is_empty():
            raise ValueError(f"{name} is empty: a mask needs at least one slice")
        if ranges.end > total_seqlen:
            raise MagiValueError(f"{name} end at {ranges.end}, after the last row of a sequence of {total_seqlen}")
        if total_seqlen > MOST_ROWS:
            raise ValueError(f"a sequence of {total_seqlen} rows is too long: it can have {MOST_ROWS} at most")
    if len(q_ranges) != len(k_ranges):
        raise MagiValueError(
            f"every slice has one range of each, but there are {len(q_ranges)} q_ranges and {len(k_ranges)} k_ranges"
        )


def check_sources(
    total_seqlen_q: int, total_seqlen_k: int, is_same_source: bool, is_q_permutable: bool, is_k_permutable: bool
) -> None:
    """Raise unless the flags and totals fit each other; where sources differ, all do."""
    if not is_same_source:
        return
    flags = f"{is_same_source=}, {is_q_permutable=}, {is_k_permutable=}"
    if is_q_permutable != is_k_permutable:
        raise ValueError(
            f"queries and keys of one source are the same rows, so that none is permuted without the other, unlike "
            f"{flags}: set both, or is_same_source=False if they are of different sequences"
        )
    if not is_q_permutable:
        raise ValueError(
            f"a sequence that attends to itself is always dealt by the dispatch algorithm, unlike {flags}: to keep it "
            "in contiguous shares, choose DispatchConfig(alg=SequentialDispatchAlg())"
        )
    if total_seqlen_q != total_seqlen_k:
        raise MagiValueError(
            f"{total_seqlen_q=} and {total_seqlen_k=} must be equal in self-attention; for queries and keys of "
            "different sequences, set is_same_source=False"
        )


def check_config(config: object) -> None:
    """Raise unless it is a :class:`DistAttnConfig`, of which the other configs are parts."""
    if not isinstance(config, DistAttnConfig):
        raise TypeError(f"dist_attn_config must be a DistAttnConfig, not {config!r}")


def checks_plan(config: object) -> bool:
    """Whether the ranks compare their plans, by what was passed as config; by the environment if that is none."""
    asked = config.runtime_config.check_plan if isinstance(config, DistAttnConfig) else None
    return is_plan_check_enable() if asked is None else asked


def with_chunk_limit(config: DistAttnConfig, chunk_size: int | None) -> DistAttnConfig:
    """The config with the most rows of a chunk, if the deprecated argument gives them."""
    limit = config.dispatch_config.chunk_size
    if chunk_size is None:
        return config
    warn_deprecated("chunk_size is deprecated: pass DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=...))")
    if limit is not None and limit != chunk_size:
        raise ValueError(f"chunk_size={chunk_size} contradicts the chunk_size={limit} of dist_attn_config")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be positive")
    return replace(config, dispatch_config=replace(config.dispatch_config, chunk_size=chunk_size))


def warn_deprecated(message: str) -> None:
    """Warn at the line where a program called this package: Python hides such warnings of other lines by default."""
    depth = 1
    while sys._getframe(depth).f_globals.get("__name__", "").startswith("magi_attention."):
        depth += 1
    warnings.warn(message, DeprecationWarning, stacklevel=depth + 1)


def resolve_chunk_size(total_seqlen: int, cp_size: int, limit: int | None, alg: DispatchAlg) -> int:
    """The rows of a chunk: at most ``limit``, and so few that every rank gets its least number of chunks.

    Without a limit, :class:`LocalityDispatchAlg` has the planner choose one, which knows what suits it.

    Raises:
        ValueError: The sequence has fewer rows than there are ranks.
    """
    if limit is None and cp_size > 1 and isinstance(alg, LocalityDispatchAlg) and total_seqlen >= cp_size:
        limit = choose_chunk_size(total_seqlen, cp_size)
    auto = -(-total_seqlen // (general.min_chunks_per_rank() * cp_size))
    chunk_size = auto if limit is None else min(auto, limit)
    if total_seqlen < cp_size or -(-total_seqlen // chunk_size) < cp_size:
        raise MagiValueError(
            f"a sequence of {total_seqlen} rows cannot be shared by {cp_size} ranks: pad it to {cp_size} rows, the "
            "last of which no slice names, or join it with others"
        )
    return chunk_size


def check_heads(num_heads_q: int, num_heads_kv: int, head_dim: int) -> None:
    """Raise unless there are heads, of a size, and as many query heads for each key head."""
    if min(num_heads_q, num_heads_kv, head_dim) < 1:
        raise MagiValueError(f"{num_heads_q=}, {num_heads_kv=} and {head_dim=} must be at least 1")
    if num_heads_q % num_heads_kv:
        raise MagiValueError(f"{num_heads_q=} must be a multiple of {num_heads_kv=}")


def check_pad_value(x: Tensor, pad_value: float) -> None:
    """Raise unless x's dtype has ``pad_value``, on ranks without padding too: -100 would become 156 among bytes."""
    if x.is_complex():
        return
    if x.is_floating_point():
        has_it = not math.isfinite(pad_value) or abs(pad_value) <= torch.finfo(x.dtype).max
    else:
        least, most = (0, 1) if x.dtype is torch.bool else (torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max)
        has_it = least <= pad_value <= most and int(pad_value) == pad_value
    if not has_it:
        wider = "x.double()" if x.is_floating_point() else "x.long()"
        raise MagiValueError(f"pad_value={pad_value!r} is no value of {x.dtype}: pass {wider}, for one")


def check_rows(name: str, x: Tensor, dim: int, num_rows: int, what: str) -> None:
    """Raise unless ``x`` is a tensor that has ``num_rows`` rows in ``dim``, as ``what`` has."""
    check_plain_tensor(name, x)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{name} has shape {tuple(x.shape)}, and so no dim {dim} for the sequence")
    if x.shape[dim] != num_rows:
        raise ValueError(f"{name} has {x.shape[dim]} rows in dim {dim}, but {what} has {num_rows}")
