# SPDX-License-Identifier: Apache-2.0
"""Between the global sequence and the ranks' local rows."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from magi_attention.plan.layout import Layout

# torch 2.13 renamed these two and warns at every call by the older names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class RowIndex:
    """The index tensors that carry rows between global and local order, for one rank and device.

    Gathered rows are ``[num_ranks * longest, ...]``: each rank's local rows, padded to the longest rank's.
    """

    def __init__(self, layout: Layout, rank: int, device: torch.device) -> None:
        local = layout.positions(rank)
        self.num_real = layout.num_real
        self.num_ranks = layout.num_ranks
        self.num_local = len(local)
        self.longest = int(layout.rows_per_rank.max())
        # Padding has the highest positions, so that it comes last on its rank.
        self.local_real = torch.from_numpy(local[local < layout.num_real]).to(device)
        gathered = torch.full((self.num_ranks * self.longest,), self.num_real)
        for r in range(self.num_ranks):
            positions = torch.from_numpy(layout.positions(r))
            gathered[r * self.longest : r * self.longest + len(positions)] = positions.clamp(max=self.num_real)
        self.global_of_gathered = gathered.to(device)
        place = torch.empty(self.num_real + 1, dtype=torch.int64)
        place[gathered] = torch.arange(len(gathered))
        self.gathered_of_global = place[: self.num_real].to(device)

    def select(self, x: Tensor, pad_value: float) -> Tensor:
        """This rank's rows of the global ``x``, its padding filled with ``pad_value``."""
        return _padded(x.index_select(0, self.local_real), self.num_local, pad_value)

    def gather(self, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """The global tensor, without padding, of all ranks' local ``x``."""
        if self.num_ranks == 1:
            return x[: self.num_real].clone()
        gathered = x.new_empty(self.num_ranks * self.longest, *x.shape[1:])
        _all_gather(gathered, _padded(x, self.longest, 0).contiguous(), group=group)
        return gathered.index_select(0, self.gathered_of_global)

    def scatter_sum(self, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """This rank's rows of the sum of all ranks' global ``x``."""
        if self.num_ranks == 1:
            return self.select(x, 0)
        by_rank = _padded(x, self.num_real + 1, 0).index_select(0, self.global_of_gathered)
        mine = x.new_empty(self.longest, *x.shape[1:])
        _reduce_scatter(mine, by_rank, group=group)
        return mine[: self.num_local]


def _padded(x: Tensor, num_rows: int, value: float) -> Tensor:
    if len(x) == num_rows:
        return x
    return torch.cat([x, x.new_full((num_rows - len(x), *x.shape[1:]), value)])


def dispatch_rows(x: Tensor, index: RowIndex, group: dist.ProcessGroup | None, pad_value: float) -> Tensor:
    """Global, replicated rows to local rows; the gradient is gathered, so that every rank has all of it."""
    return _Dispatch.apply(x, index, group, pad_value)


def undispatch_rows(x: Tensor, index: RowIndex, group: dist.ProcessGroup | None, is_partial_grad: bool) -> Tensor:
    """Local rows to the global tensor on every rank.

    The gradient is this rank's rows of the global gradient, or with ``is_partial_grad`` of its sum over the ranks.
    """
    return _Undispatch.apply(x, index, group, is_partial_grad)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: RowIndex, group: dist.ProcessGroup | None, pad_value: float) -> Tensor:
        ctx.index, ctx.group = index, group
        return index.select(x, pad_value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.index.gather(grad, ctx.group), None, None, None


class _Undispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: RowIndex, group: dist.ProcessGroup | None, partial_grad: bool) -> Tensor:
        ctx.index, ctx.group, ctx.partial_grad = index, group, partial_grad
        return index.gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.partial_grad:
            return ctx.index.scatter_sum(grad, ctx.group), None, None, None
        return ctx.index.select(grad, 0), None, None, None
