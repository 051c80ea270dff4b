# SPDX-License-Identifier: Apache-2.0
"""Combining the partial results that a group reduce brings back, in ascending order of the peers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from magi_attention.comm.packing import RowLayout
from magi_attention.comm.routes import Routes, Rows
from magi_attention.comm.segments import add_segments, can_add_segments
from magi_attention.common.logsumexp import accumulation_dtype, merge_lse, rescale_weight


def add_partials(into: Sequence[Tensor], buffer: Tensor, layout: RowLayout, routes: Routes, average: bool) -> None:
    """Add the rows that came back in ``buffer`` to the rows of ``into`` that they belong to.

    Args:
        into: one ``[num_source, ...]`` for each tensor of the buffer, changed in place and rounded once.
        buffer: what arrived.
        layout: of the buffer.
        routes: of the exchange table.
        average: divide by the number of terms, the old value of ``into`` counting as one.
    """
    if routes.num_sent == 0:
        return
    if not average and can_add_segments(into, layout):
        add_segments(into, buffer, layout, routes)
        return
    for number, target in enumerate(into):
        total = _accumulator(target, layout.columns[number].dtype)
        for rows, partial in _by_peer(layout.column(buffer, number), routes):
            _add_rows(total, rows, partial)
        if average:
            total = averaged(total, 1 + routes.casts_per_row)
        if total is not target:
            target.copy_(total)


def averaged(total: Tensor, terms: Tensor) -> Tensor:
    """Rows divided by how many terms they are the sums of, in place where that is possible; integers downward."""
    terms = terms.view(-1, *[1] * (total.dim() - 1))
    is_exact = total.is_floating_point() or total.is_complex()
    return total.div_(terms) if is_exact else total // terms.long()


def merge_partials_by_lse(into: Tensor, into_lse: Tensor, buffer: Tensor, layout: RowLayout, routes: Routes) -> None:
    """Merge partial outputs over disjoint keys: each is weighted by ``exp(lse - final lse)``.

    Partials and old values whose lse is -inf stand for no keys at all and are skipped, whatever they hold.

    Args:
        into: ``[num_source, heads, dim]``, changed in place.
        into_lse: ``[num_source, heads]``, changed in place.
        buffer: what arrived: partial outputs and their log-sum-exps.
        layout: of the buffer.
        routes: of the exchange table.
    """
    if routes.num_sent == 0:
        return
    outs, lses = (_by_peer(layout.column(buffer, number), routes) for number in range(2))
    old_lse = _accumulator(into_lse, layout.columns[1].dtype)
    final_lse = old_lse.clone()
    for rows, lse in lses:
        final_lse[rows] = merge_lse(final_lse[rows], lse).to(final_lse.dtype)
    total = _accumulator(into, layout.columns[0].dtype)
    _weigh(total, old_lse, final_lse)
    for (rows, partial), (_, lse) in zip(outs, lses, strict=True):
        share = partial.to(total.dtype, copy=True)
        _weigh(share, lse.to(final_lse.dtype), final_lse[rows])
        _add_rows(total, rows, share)
    into_lse.copy_(final_lse)
    if total is not into:
        into.copy_(total)


def _by_peer(partials: Tensor, routes: Routes) -> list[tuple[Rows, Tensor]]:
    """For each peer that sent any, the source rows that its partial results belong to, and these."""
    parts = partials.split(routes.send_counts)
    return [(rows, part) for rows, part in zip(routes.source_of, parts, strict=True) if len(part)]


def _accumulator(into: Tensor, partial_dtype: torch.dtype) -> Tensor:
    """``into`` itself where sums can be kept in it, else a copy of at least float32."""
    if not into.is_floating_point():
        return into
    return into.to(accumulation_dtype(into, torch.empty(0, dtype=partial_dtype)))


def _add_rows(total: Tensor, rows: Rows, terms: Tensor) -> None:
    """Add terms to rows that are all different, so that the order of the additions within a call doesn't matter."""
    terms = terms.to(total.dtype)  # not of every dtype would PyTorch add elements to others
    if isinstance(rows, slice):
        total[rows].add_(terms)
    else:
        total.index_add_(0, rows, terms)


def _weigh(out: Tensor, lse: Tensor, final_lse: Tensor) -> None:
    out.mul_(rescale_weight(lse, final_lse)[..., None]).masked_fill_((lse == -torch.inf)[..., None], 0)
