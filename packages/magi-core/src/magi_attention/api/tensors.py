# SPDX-License-Identifier: Apache-2.0
"""Between the global sequence and this rank's rows: dispatch, undispatch, roll and position ids.

In cross-attention there are two sequences, and ``attn_role`` tells to which of them a tensor belongs.
"""

import torch
from torch import Tensor

from magi_attention.api.checks import as_integers, check_pad_value, check_rows
from magi_attention.api.compiled_tensors import (
    dispatch_compiled,
    position_ids_compiled,
    roll_compiled,
    undispatch_compiled,
)
from magi_attention.common.enum import AttnRole
from magi_attention.runtime.cache import find_manager
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.utils.torch_modes import is_one_operator


def dispatch(
    x: Tensor, key: DistAttnRuntimeKey, pad_value: float = 0.0, attn_role: AttnRole = AttnRole.QUERY
) -> Tensor:
    """Select this rank's rows of a global tensor. No communication, except that the backward pass is collective.

    Args:
        x: ``[S, ...]`` of any dtype, the same on all ranks; ``S`` without padding.
        key: the key.
        pad_value: what rows of padding are filled with; a value of x's dtype.
        attn_role: whether ``x`` goes with the queries or with the keys and values; all the same in self-attention.

    Returns:
        ``[n_local, ...]``, a copy. In the backward pass every rank gets the full global gradient of ``x``, gathered
        from the local gradients of all ranks.

    Raises:
        ValueError: ``x`` doesn't have ``S`` rows, its dtype doesn't have the ``pad_value``, or the cache doesn't hold
            the key.
        RuntimeError: With ``RuntimeConfig(sanity_check=True)``, on every rank, if they passed different tensors.
    """
    if torch.compiler.is_compiling():
        return dispatch_compiled(x, key, pad_value, attn_role)
    manager = find_manager(key, is_collective=False)
    check_rows("x", x, 0, manager.layout_of(attn_role).num_real, "the global sequence without padding")
    check_pad_value(x, pad_value)
    if is_one_operator(x):
        return dispatch_compiled(x, key, pad_value, attn_role)
    return manager.dispatch(x, pad_value, attn_role)


def undispatch(
    x: Tensor, key: DistAttnRuntimeKey, is_partial_grad: bool = False, attn_role: AttnRole = AttnRole.QUERY
) -> Tensor:
    """Gather the global tensor from all ranks' local rows. Collective.

    Args:
        x: ``[n_local, ...]``, this rank's rows.
        key: the key.
        is_partial_grad: how the gradient of the result is understood: as the same on all ranks, so that each takes its
            own rows (False), or as one term of a sum over the ranks (True; then the backward pass is collective).
        attn_role: as for :func:`dispatch`.

    Returns:
        ``[S, ...]`` without padding, on every rank.

    Raises:
        ValueError: ``x`` doesn't have ``n_local`` rows, or the cache doesn't hold the key.
    """
    if torch.compiler.is_compiling():
        return undispatch_compiled(x, key, is_partial_grad, attn_role)
    manager = find_manager(key)
    check_rows("x", x, 0, manager.num_local_rows(attn_role), "this rank's share")
    if is_one_operator(x):
        return undispatch_compiled(x, key, is_partial_grad, attn_role)
    return manager.undispatch(x, is_partial_grad, attn_role)


def roll(x: Tensor, shift: int, dim: int, key: DistAttnRuntimeKey, attn_role: AttnRole = AttnRole.QUERY) -> Tensor:
    """Roll the global sequence of a dispatched tensor. Collective, in the backward pass as well.

    Equal to ``undispatch``, ``torch.roll`` and ``dispatch``, but only rows that change rank travel, and rows of padding
    keep what they hold: labels their -100.

    Args:
        x: this rank's rows, ``n_local`` in ``dim``.
        shift: by how many rows; a positive shift moves rows towards the end.
        dim: the dim of the sequence.
        key: the key.
        attn_role: as for :func:`dispatch`.

    Raises:
        ValueError: ``x`` doesn't have ``n_local`` rows in ``dim``, or the cache doesn't hold the key.
        TypeError: ``shift`` or ``dim`` is no integer.
    """
    if torch.compiler.is_compiling():
        return roll_compiled(x, shift, dim, key, attn_role)
    manager = find_manager(key)
    shift, dim = as_integers(shift=shift, dim=dim)
    check_rows("x", x, dim, manager.num_local_rows(attn_role), "this rank's share")
    if is_one_operator(x):
        return roll_compiled(x, shift, dim, key, attn_role)
    return manager.roll(x, shift, dim, attn_role)


def roll_simple(
    x: Tensor, shift: int, dim: int, key: DistAttnRuntimeKey, attn_role: AttnRole = AttnRole.QUERY
) -> Tensor:
    """The same as :func:`roll`; an older name for another way to send the rows."""
    return roll(x, shift, dim, key, attn_role)


def get_position_ids(
    key: DistAttnRuntimeKey, device: torch.device | str | None = None, attn_role: AttnRole = AttnRole.QUERY
) -> Tensor:
    """The global position of each of this rank's rows, ``[n_local]`` int64; padding repeats the last real position.

    The same tensor is returned each time, until somebody changes it in place; in compiled functions, a copy.

    Args:
        key: the key.
        device: where the tensor shall lie; by default on the CPU for a gloo group or without GPU, else on the current
            CUDA device.
        attn_role: whether the queries' positions are asked for or those of the keys and values.

    Raises:
        ValueError: The cache doesn't hold the key.
    """
    if torch.compiler.is_compiling():
        return position_ids_compiled(key, device, attn_role)
    return find_manager(key, is_collective=False).get_position_ids(attn_role, device)
