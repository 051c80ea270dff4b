# SPDX-License-Identifier: Apache-2.0
"""Rows between global and local order, run by run, so that nothing of the sequence's length is kept for a layout."""

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.kernels.autograd import without_autocast
from magi_attention.plan.layout import Layout

# torch 2.13 renamed these two and warns at every call by the older names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

# What both gloo and NCCL gather. Rows of other data types travel as bytes.
_GATHERED_DTYPES = {torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16}
_GATHERED_DTYPES |= {torch.float32, torch.float64, torch.complex64, torch.complex128}


def select_rows(x: Tensor, layout: Layout, rank: int, pad_value: float) -> Tensor:
    """One rank's rows of the global ``x`` ``[num_real, ...]``, its padding filled with ``pad_value``; a copy."""
    # Padding has the highest positions, so that it comes last on its rank.
    return _join([x[start:stop] for start, stop, _ in layout.real_runs_of(rank)], x, _num_rows(layout, rank), pad_value)


def gather_rows(x: Tensor, layout: Layout, group: dist.ProcessGroup | None) -> Tensor:
    """The global tensor ``[num_real, ...]``, without padding, of all ranks' local ``x``. Collective."""
    if layout.num_ranks == 1:
        return x[: layout.num_real].clone()
    longest = int(layout.rows_per_rank.max())
    gathered = x.new_empty(layout.num_ranks * longest, *x.shape[1:])
    mine, all_rows = _join([x], x, longest, 0), gathered
    if x.dtype not in _GATHERED_DTYPES:
        mine, all_rows = mine.view(torch.uint8), gathered.view(torch.uint8)
    _all_gather(all_rows, mine, group=group)
    runs = [(rank * longest + local, stop - start) for start, stop, rank, local in layout.real_runs.tolist()]
    return concatenate([gathered.narrow(0, first, length) for first, length in runs])


def scatter_rows_sum(x: Tensor, layout: Layout, rank: int, group: dist.ProcessGroup | None) -> Tensor:
    """One rank's rows of the sum of all ranks' global ``x`` ``[num_real, ...]``; padding is 0. Collective."""
    if layout.num_ranks == 1:
        return select_rows(x, layout, rank, 0)
    longest = int(layout.rows_per_rank.max())
    parts = []
    for each in range(layout.num_ranks):
        runs = [x[start:stop] for start, stop, _ in layout.real_runs_of(each)]
        parts.append(_join(runs, x, longest, 0))
    mine = x.new_empty(longest, *x.shape[1:])
    _reduce_scatter(mine, concatenate(parts), group=group)
    return mine[: _num_rows(layout, rank)]


def concatenate(parts: list[Tensor], dim: int = 0) -> Tensor:
    """``torch.cat`` of tensors of one dtype. Under autocast, ``torch.cat`` itself refuses some dtypes, as of 8 bits."""
    with without_autocast(parts[0]):
        return torch.cat(parts, dim)


def _num_rows(layout: Layout, rank: int) -> int:
    return int(layout.rows_per_rank[rank])


def _join(runs: list[Tensor], like: Tensor, num_rows: int, pad_value: float) -> Tensor:
    """Rows one after another, contiguous, padded to ``num_rows``."""
    missing = num_rows - sum(len(run) for run in runs)
    if len(runs) == 1 and not missing and runs[0] is like:
        return like.contiguous()
    return concatenate([*runs, like.new_full((missing, *like.shape[1:]), pad_value)])
