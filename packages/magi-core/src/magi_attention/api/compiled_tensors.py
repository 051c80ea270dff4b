# SPDX-License-Identifier: Apache-2.0
"""Dispatch, undispatch, roll and position ids inside ``torch.compile`` and selective checkpoints, by opaque operators.

They name the key by its handle. The compiler knows of them nothing but the shapes of the results, and so sees neither
plans nor process groups.
"""

from typing import Any

import torch
from torch import Tensor

from magi_attention.api.checks import check_pad_value, check_rows
from magi_attention.common.enum import AttnRole
from magi_attention.kernels.opaque import operator
from magi_attention.runtime.cache import find_manager
from magi_attention.runtime.key import DistAttnRuntimeKey, key_of_handle
from magi_attention.runtime.machine import group_device
from magi_attention.runtime.manager import DistAttnRuntimeMgr
from magi_attention.runtime.rows import gather_rows, scatter_rows_sum, select_rows


def dispatch_compiled(x: Tensor, key: DistAttnRuntimeKey, pad_value: float, attn_role: AttnRole) -> Tensor:
    """:func:`magi_attention.api.dispatch` by an opaque operator.

    Raises:
        ValueError: the key was never planned, or ``pad_value`` is no float, as which it is handed on.
    """
    num_rows = _num_local_rows(key, attn_role)
    if float(pad_value) != pad_value and pad_value == pad_value:
        raise ValueError(f"pad_value={pad_value} is no float: dispatch outside of compiled functions and checkpoints")
    return _select(x, key.handle, attn_role.value, num_rows, True, pad_value)


def undispatch_compiled(x: Tensor, key: DistAttnRuntimeKey, is_partial_grad: bool, attn_role: AttnRole) -> Tensor:
    """:func:`magi_attention.api.undispatch` by an opaque operator."""
    is_query = attn_role is AttnRole.QUERY
    num_rows = key.total_seqlen_q - key.pad_size if is_query else key.total_seqlen_k - key.pad_size_k
    return _gather(x, key.handle, attn_role.value, num_rows, is_partial_grad)


def roll_compiled(x: Tensor, shift: int, dim: int, key: DistAttnRuntimeKey, attn_role: AttnRole) -> Tensor:
    """:func:`magi_attention.api.roll` by an opaque operator."""
    return _roll(x, key.handle, attn_role.value, shift, dim)


def position_ids_compiled(key: DistAttnRuntimeKey, device: torch.device | str | None, attn_role: AttnRole) -> Tensor:
    """:func:`magi_attention.api.get_position_ids` by an opaque operator, and hence a copy.

    Raises:
        ValueError: the key was never planned.
    """
    where = group_device(key.cp_group) if device is None else torch.device(device)
    return _position_ids(key.handle, attn_role.value, _num_local_rows(key, attn_role), where)


def _num_local_rows(key: DistAttnRuntimeKey, attn_role: AttnRole) -> int:
    if key.local_rows is None:
        raise ValueError("the key was never planned: make it by magi_attn_flex_key")
    return key.local_rows[0 if attn_role is AttnRole.QUERY else 1]


def _planned(handle: int, *, is_collective: bool = True) -> DistAttnRuntimeMgr:
    manager: DistAttnRuntimeMgr = find_manager(key_of_handle(handle), is_collective=is_collective)
    return manager


@operator("magi_attention::dispatch")
def _select(x: Tensor, handle: int, role: str, num_rows: int, is_input: bool, pad_value: float) -> Tensor:
    """The ``num_rows`` local rows of a global tensor; of one that is no gradient, ranks may be asked to compare it."""
    manager = _planned(handle, is_collective=False)
    layout = manager.layout_of(AttnRole(role))
    check_rows("x", x, 0, layout.num_real, "the global sequence without padding")
    check_pad_value(x, pad_value)
    if is_input:
        manager.check_sanity(x)
    return select_rows(x, layout, manager.rank, pad_value).contiguous()


@operator("magi_attention::undispatch")
def _gather(x: Tensor, handle: int, role: str, num_rows: int, is_partial_grad: bool) -> Tensor:
    """The ``num_rows`` global rows of local tensors."""
    manager = _planned(handle)
    check_rows("x", x, 0, manager.num_local_rows(AttnRole(role)), "this rank's share")
    return gather_rows(x, manager.layout_of(AttnRole(role)), manager.key.cp_group).contiguous()


@operator("magi_attention::scatter_sum")
def _scatter_sum(x: Tensor, handle: int, role: str, num_rows: int) -> Tensor:
    """The ``num_rows`` local rows of the sum of all ranks' global tensors."""
    manager = _planned(handle)
    layout = manager.layout_of(AttnRole(role))
    return scatter_rows_sum(x, layout, manager.rank, manager.key.cp_group).contiguous()


@operator("magi_attention::roll")
def _roll(x: Tensor, handle: int, role: str, shift: int, dim: int) -> Tensor:
    manager = _planned(handle)
    check_rows("x", x, dim, manager.num_local_rows(AttnRole(role)), "this rank's share")
    return manager.roll(x, shift, dim, AttnRole(role)).contiguous()


@operator("magi_attention::position_ids")
def _position_ids(handle: int, role: str, num_rows: int, device: torch.device) -> Tensor:
    """The global positions of the ``num_rows`` local rows."""
    return _planned(handle, is_collective=False).get_position_ids(AttnRole(role), device).clone()


@_position_ids.register_fake
def _(handle: int, role: str, num_rows: int, device: torch.device) -> Tensor:
    return torch.empty(num_rows, dtype=torch.int64, device=device)


@_select.register_fake
@_gather.register_fake
@_scatter_sum.register_fake
def _(x: Tensor, handle: int, role: str, num_rows: int, *options: Any) -> Tensor:
    return x.new_empty(num_rows, *x.shape[1:])


@_roll.register_fake
def _(x: Tensor, handle: int, role: str, shift: int, dim: int) -> Tensor:
    return x.new_empty(x.shape)


def _save_select(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.where, _num_rows, _is_input, _pad_value = inputs
    ctx.num_rows = x.shape[0]


def _select_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _gather(grad, *ctx.where, ctx.num_rows, False), None, None, None, None, None


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.where, _num_rows, ctx.is_partial_grad = inputs
    ctx.num_rows = x.shape[0]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    where = *ctx.where, ctx.num_rows
    local = _scatter_sum(grad, *where) if ctx.is_partial_grad else _select(grad, *where, False, 0.0)
    return local, None, None, None, None


def _save_roll(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.where, ctx.shift, ctx.dim = inputs


def _roll_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _roll(grad, *ctx.where, -ctx.shift, ctx.dim), None, None, None, None


_select.register_autograd(_select_backward, setup_context=_save_select)
_gather.register_autograd(_gather_backward, setup_context=_save_gather)
_roll.register_autograd(_roll_backward, setup_context=_save_roll)
