# SPDX-License-Identifier: Apache-2.0
"""Dispatch, undispatch and roll with an explicit :class:`DispatchMeta` instead of a key."""

import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.alltoall import AllToAllCollectives
from magi_attention.runtime.autograd import dist_attn_func
from magi_attention.runtime.dispatch import dispatch_rows, undispatch_rows
from magi_attention.runtime.dispatch_meta import DispatchMeta
from magi_attention.runtime.roll import roll_rows

__all__ = ["dispatch_func", "dist_attn_func", "roll_func", "roll_simple_func", "undispatch_func"]


def dispatch_func(
    x_global: Tensor, group: dist.ProcessGroup | None, meta: DispatchMeta, seq_dim: int = 0, pad_value: float = 0.0
) -> Tensor:
    """This rank's rows of a global tensor. Its gradient is gathered: every rank gets all of it.

    Args:
        x_global: the sequence without padding in ``seq_dim``, the same on all ranks.
        group: the context-parallel group; None for this process alone.
        meta: the layout.
        seq_dim: the dim of the sequence.
        pad_value: what rows of padding are filled with.
    """
    local = dispatch_rows(x_global.movedim(seq_dim, 0), meta.layout, meta.cp_rank, group, pad_value)
    return local.movedim(0, seq_dim)


def undispatch_func(
    x_local: Tensor,
    meta: DispatchMeta,
    group: dist.ProcessGroup | None,
    seq_dim: int = 0,
    is_partial_grad: bool = False,
) -> Tensor:
    """The global tensor, without padding, of all ranks' local rows.

    Args:
        x_local: this rank's rows in ``seq_dim``.
        meta: the layout.
        group: the context-parallel group; None for this process alone.
        seq_dim: the dim of the sequence.
        is_partial_grad: whether the ranks' gradients are terms of a sum, rather than all the same.
    """
    whole = undispatch_rows(x_local.movedim(seq_dim, 0), meta.layout, meta.cp_rank, group, is_partial_grad)
    return whole.movedim(0, seq_dim)


def roll_func(
    x_local: Tensor, shift: int, meta: DispatchMeta, group: dist.ProcessGroup | None, seq_dim: int = 0
) -> Tensor:
    """Roll the real global sequence, of which ``x_local`` holds this rank's rows in ``seq_dim``, by ``shift``.

    Rows of padding keep what they hold.
    """
    collectives = AllToAllCollectives(group)
    rolled = roll_rows(x_local.movedim(seq_dim, 0), shift, meta.layout, meta.cp_rank, collectives)
    return rolled.movedim(0, seq_dim)


roll_simple_func = roll_func
