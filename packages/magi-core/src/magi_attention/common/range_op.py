# SPDX-License-Identifier: Apache-2.0
"""Copy, fill and reduce ranges of rows, in plain torch. Not differentiable; equal bits in every run.

Ranges are an integer tensor ``[n, 2]`` of ``[start, end)`` rows, or a list of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from magi_attention.common.errors import MagiValueError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from magi_attention.common.enum import GroupReduceOp, OutMaybeWithLSE

    Ranges = Tensor | Sequence[Sequence[int]]


def range_gather(input: Tensor, ranges: Ranges, dim: int = 0, output: Tensor | None = None, **meta: object) -> Tensor:
    """Concatenate the ranges of ``input`` along ``dim``; ``output``, if given, receives them and is returned.

    ``meta`` may carry precomputed values for a kernel; there is none here that needs them.
    """
    gathered = input.index_select(dim, _rows(ranges, input.device))
    return gathered if output is None else output.copy_(gathered)


def range_fill_(input: Tensor, ranges: Ranges, val: float, dim: int = 0, **meta: object) -> Tensor:
    """Set the ranges of ``input`` along ``dim`` to ``val``, in place; returns ``input``."""
    return input.index_fill_(dim, _rows(ranges, input.device), val)


def range_reduce(
    input: Tensor,
    output: Tensor,
    input_ranges: Ranges,
    output_ranges: Ranges,
    dim: int = 0,
    deterministic: bool = False,
    reduce_op: GroupReduceOp = "sum",
    reduce_dtype: torch.dtype | None = None,
    acc_reduce: bool = True,
    input_lse: Tensor | None = None,
    output_lse: Tensor | None = None,
    **meta: object,
) -> OutMaybeWithLSE:
    """Combine input range i into output range i, for all i in order; output ranges may overlap.

    Rows that no output range names keep what they hold. The order of the terms is always fixed.

    Args:
        input: the terms.
        output: changed in place.
        input_ranges: ranges of ``input`` along ``dim``.
        output_ranges: as many ranges of ``output``, of the same lengths.
        dim: the dimension of the rows; 0 for ``"lse"``.
        deterministic: accepted; the result always is.
        reduce_op: ``"sum"``; ``"avg"``, which divides by the number of terms; or ``"lse"``, which merges attention
            outputs ``[rows, heads, dim]`` by their ``[rows, heads]`` log-sum-exps.
        reduce_dtype: the dtype to compute in; None for at least float32.
        acc_reduce: whether what ``output`` holds counts as a term.
        input_lse: the terms' log-sum-exps, for ``"lse"``.
        output_lse: the output's, changed in place, for ``"lse"``.

    Returns:
        ``output``, and ``output_lse`` with ``"lse"``.
    """
    import torch

    source, target = _rows(input_ranges, input.device), _rows(output_ranges, output.device)
    if len(source) != len(target):
        raise MagiValueError(f"input ranges hold {len(source)} rows, output ranges {len(target)}; they must match")
    if reduce_op not in ("sum", "avg", "lse"):
        raise MagiValueError(f"reduce_op must be sum, avg or lse, not {reduce_op!r}")
    if reduce_op == "lse" and (input_lse is None or output_lse is None or dim != 0):
        raise MagiValueError("reduce_op='lse' needs input_lse, output_lse and dim=0")
    dtype = reduce_dtype or torch.promote_types(output.dtype, torch.float32)
    total = output.movedim(dim, 0).to(dtype)
    terms = input.movedim(dim, 0)
    count = torch.full((len(total),), int(acc_reduce), device=output.device)
    total_lse = None if output_lse is None else output_lse.to(torch.promote_types(output_lse.dtype, torch.float32))
    if not acc_reduce:
        total = total.index_fill(0, target, 0.0)
        total_lse = None if total_lse is None else total_lse.index_fill(0, target, float("-inf"))
    for row, term in _distinct_rounds(target, source):
        value = terms[term].to(dtype)
        count[row] += 1
        if reduce_op == "lse":
            assert total_lse is not None
            assert input_lse is not None
            total[row], total_lse[row] = _merge(total[row], total_lse[row], value, input_lse[term].to(total_lse.dtype))
        else:
            total[row] += value
    if reduce_op == "avg":
        total /= count.clamp(min=1).reshape(-1, *[1] * (total.dim() - 1))
    touched = torch.unique(target)
    output.movedim(dim, 0)[touched] = total[touched].to(output.dtype)
    if reduce_op != "lse":
        return output
    assert output_lse is not None
    assert total_lse is not None
    output_lse[touched] = total_lse[touched].to(output_lse.dtype)
    return output, output_lse


def _rows(ranges: Ranges, device: torch.device) -> Tensor:
    """The rows that the ranges name, one after another."""
    import torch

    bounds = torch.as_tensor(ranges, dtype=torch.int64, device=device).reshape(-1, 2)
    length = bounds[:, 1] - bounds[:, 0]
    before = length.cumsum(0) - length
    first = torch.repeat_interleave(bounds[:, 0] - before, length)
    return first + torch.arange(len(first), device=device)


def _distinct_rounds(target: Tensor, source: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Deal the pairs of rows to rounds so that no target comes twice in one, keeping the order of its sources."""
    import torch

    ordered, by_target = torch.sort(target, stable=True)
    _, counts = torch.unique_consecutive(ordered, return_counts=True)
    before = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    turn = torch.arange(len(ordered), device=target.device) - before
    rounds = int(counts.max()) if len(counts) else 0
    return [(ordered[turn == n], source[by_target[turn == n]]) for n in range(rounds)]


def _merge(out: Tensor, lse: Tensor, term: Tensor, term_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two attention outputs by log-sum-exp; a term with -inf, even together with -inf, weighs nothing."""
    from magi_attention.common.logsumexp import merge_lse, rescale_weight  # here, since it needs torch

    merged = merge_lse(lse, term_lse)
    weight, term_weight = rescale_weight(lse, merged), rescale_weight(term_lse, merged)
    return (out * weight.unsqueeze(-1) + term * term_weight.unsqueeze(-1)).to(out.dtype), merged
