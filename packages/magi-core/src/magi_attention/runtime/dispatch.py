# SPDX-License-Identifier: Apache-2.0
"""Dispatch and undispatch as differentiable operations."""

from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.group import GroupHandle, group_size, has_peers
from magi_attention.kernels.autograd import KernelFunction, on_real_memory, only_once_differentiable
from magi_attention.plan.layout import Layout
from magi_attention.runtime.rows import gather_rows, scatter_rows_sum, select_rows


def dispatch_rows(
    x: Tensor, layout: Layout, rank: int, group: dist.ProcessGroup | None, pad_value: float = 0.0
) -> Tensor:
    """Global, replicated rows to local rows; the gradient is gathered, so that every rank has all of it."""
    return _Dispatch.apply(x, layout, rank, group, pad_value)


def undispatch_rows(
    x: Tensor, layout: Layout, rank: int, group: dist.ProcessGroup | None, is_partial_grad: bool = False
) -> Tensor:
    """Local rows to the global tensor on every rank.

    The gradient is this rank's rows of the global gradient, or with ``is_partial_grad`` of its sum over the ranks.
    """
    return _Undispatch.apply(x, layout, rank, group, is_partial_grad)


def check_same_on_all_ranks(x: Tensor, plan_digest: bytes, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank unless all ranks of ``group`` pass the same. Collective; the host waits for ``x``.

    Args:
        x: the global tensor.
        plan_digest: of the key's plan; keys that are cached were compared long ago, maybe each with others.
        group: the process group.

    Raises:
        RuntimeError: some ranks passed another tensor or another key's plan; names them by their global ranks.
    """
    if not has_peers(group):
        return
    content = x.detach().resolve_conj().contiguous().cpu().view(torch.uint8).numpy().tobytes()
    given = plan_digest, sha256(f"{tuple(x.shape)} {x.dtype} ".encode() + content).digest()
    everyone = [given] * group_size(group)
    dist.all_gather_object(everyone, given, group=group)
    ranks = dist.get_process_group_ranks(group)
    for what, digests in zip(("a key of another plan", "another tensor"), zip(*everyone, strict=True), strict=True):
        if differing := [rank for rank, each in zip(ranks, digests, strict=True) if each != digests[0]]:
            raise RuntimeError(
                f"dispatch was given {what} on ranks {differing} than on rank {ranks[0]}: all ranks of the key's "
                f"group {ranks} pass the same sequence. Is that the context-parallel group, and do its data loaders "
                "agree?"
            )


class _Dispatch(KernelFunction):
    @staticmethod
    @on_real_memory
    def forward(
        ctx: Any, x: Tensor, layout: Layout, rank: int, group: dist.ProcessGroup | None, pad_value: float
    ) -> Tensor:
        ctx.layout, ctx.handle = layout, GroupHandle(group)
        return select_rows(x, layout, rank, pad_value)

    @staticmethod
    @only_once_differentiable
    @on_real_memory
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return gather_rows(grad, ctx.layout, ctx.handle.group), None, None, None, None


class _Undispatch(KernelFunction):
    @staticmethod
    @on_real_memory
    def forward(
        ctx: Any, x: Tensor, layout: Layout, rank: int, group: dist.ProcessGroup | None, is_partial_grad: bool
    ) -> Tensor:
        ctx.layout, ctx.rank, ctx.handle = layout, rank, GroupHandle(group)
        ctx.is_partial_grad = is_partial_grad
        return gather_rows(x, layout, group)

    @staticmethod
    @only_once_differentiable
    @on_real_memory
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.is_partial_grad:
            local = scatter_rows_sum(grad, ctx.layout, ctx.rank, ctx.handle.group)
        else:
            local = select_rows(grad, ctx.layout, ctx.rank, 0)
        return local, None, None, None, None
