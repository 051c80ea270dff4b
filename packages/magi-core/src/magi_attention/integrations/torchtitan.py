# SPDX-License-Identifier: Apache-2.0
"""torchtitan: an inner attention for model configs, and what cuts a batch for it.

torchtitan hands ``attention_masks`` to every layer as it is. Here that is a key.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.protocols.module import Module

from magi_attention.api import (
    DistAttnConfig,
    DistAttnRuntimeKey,
    calc_attn,
    dispatch,
    get_position_ids,
    magi_attn_varlen_key,
    make_varlen_key_for_new_mask_after_dispatch,
)
from magi_attention.api.groups import GroupOrMesh

IGNORED_LABEL = -100
# By the default group, since process groups go with it.
_GROUPS_OF_THIS_PROCESS: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


class MagiInnerAttention(Module):
    """The ``inner_attention`` of a torchtitan attention, which attends over all ranks of the key's group."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """Nothing to configure: the key knows everything."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()

    def forward(  # torchtitan's tensor parallelism finds the arguments by these names
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: DistAttnRuntimeKey | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Attend ``[1, n_local, heads, head_dim]``. Collective.

        Args:
            q_BLNH: queries of this rank's rows, and of its heads under tensor parallelism.
            k_BLNH: keys of the same rows.
            v_BLNH: their values.
            attention_masks: the key.
            scale: factor of the scores; ``head_dim ** -0.5`` for None.
            enable_gqa: not needed, since query heads may always share key heads.
            out_transform: what a model does to the output, given it and the log-sum-exp ``[1, n_local, heads]``, as
                gpt_oss does for its sinks.

        Raises:
            ValueError: ``attention_masks`` is no key, or the batch isn't packed into one sequence.
        """
        if not isinstance(attention_masks, DistAttnRuntimeKey):
            raise ValueError(
                f"attention_masks must be the key that prepare_input makes, not {type(attention_masks).__name__}"
            )
        if q_BLNH.shape[0] != 1:
            raise ValueError(f"pack the {q_BLNH.shape[0]} sequences of the batch into one, as prepare_input does")
        out, meta = calc_attn(q_BLNH[0], k_BLNH[0], v_BLNH[0], attention_masks, softmax_scale=scale)
        if out_transform is None:
            return out[None]
        assert meta.lse is not None
        return out_transform(out[None], meta.lse[None])


def prepare_input(
    inputs: Tensor,
    labels: Tensor,
    extra_kwargs: dict[str, Any],
    cp_mesh: DeviceMesh | None,
    num_heads: tuple[int, int],
    head_dim: int,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),  # noqa: B008 - frozen
    windows: Mapping[str, int | None] | None = None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """This rank's part of a batch, in place of torchtitan's ``prepare_context_parallel_input``. Collective.

    The batch becomes one packed sequence. A document, which is causal, starts where its row of the batch does, and
    wherever the positions start again at 0.

    Args:
        inputs: ``[B, L]`` token ids, the same on all ranks of the mesh.
        labels: ``[B, L]``, already shifted, as torchtitan's data loaders make them.
        extra_kwargs: further arguments of the model, with ``positions`` ``[B, L]`` if documents are packed in rows.
        cp_mesh: the mesh of context parallelism, or None for this process alone.
        num_heads: query heads, and key heads, of one rank of tensor parallelism.
        head_dim: size of a head.
        dist_attn_config: as for :func:`magi_attention.api.magi_attn_flex_key`.
        windows: for models whose layers have different ones: by the names that layers look their mask up with, how many
            keys a token sees, itself included, or None for all of its document.

    Returns:
        ``inputs`` and ``labels`` ``[1, n_local]``, padded with 0 and -100, and the arguments, with ``positions``
        ``[1, n_local]`` in their documents, and as ``attention_masks`` the key, or a dict of keys by the names of
        ``windows``.

    Raises:
        ValueError: Another argument of the model has a value for each token, and all that
            :func:`magi_attention.api.magi_attn_varlen_key` raises.
    """
    batch, length = inputs.shape
    if uncut := [
        name
        for name, x in extra_kwargs.items()
        if name != "positions" and isinstance(x, Tensor) and x.shape[:2] == inputs.shape
    ]:
        raise ValueError(f"extra_kwargs {uncut} have a value for each token, but only positions are dispatched")
    cp_group: GroupOrMesh = _group_of_this_process() if cp_mesh is None else cp_mesh
    positions = extra_kwargs.get("positions")
    if positions is None:
        positions = torch.arange(length, device=inputs.device).expand(batch, length)
    is_start = positions == 0
    is_start[:, 0] = True
    cu_seqlens = [*is_start.flatten().nonzero().flatten().tolist(), batch * length]
    key = magi_attn_varlen_key(
        cu_seqlens, cu_seqlens, *num_heads, head_dim, 0, cp_group, causal=True, dist_attn_config=dist_attn_config
    )
    # Positions of the data loader are kept, for rows of the batch that start amid a document.
    local = positions.flatten()[get_position_ids(key, device=positions.device)]
    local_inputs = dispatch(inputs.flatten(), key)
    local_labels = dispatch(labels.flatten(), key, pad_value=IGNORED_LABEL)
    masks = key if windows is None else {name: _with_window(key, cu_seqlens, size) for name, size in windows.items()}
    return local_inputs[None], local_labels[None], extra_kwargs | {"positions": local[None], "attention_masks": masks}


def _with_window(key: DistAttnRuntimeKey, cu_seqlens: list[int], size: int | None) -> DistAttnRuntimeKey:
    if size is None:
        return key
    return make_varlen_key_for_new_mask_after_dispatch(cu_seqlens, cu_seqlens, key, window_size=(size - 1, 0))


def _group_of_this_process() -> dist.ProcessGroup | None:
    """A group of one rank, since to the key None is the default group, which here holds other replicas."""
    if not dist.is_initialized():
        return None
    world = dist.distributed_c10d._get_default_group()
    if world not in _GROUPS_OF_THIS_PROCESS:
        # No other rank takes part: they may have groups of more, or make theirs at another time.
        _GROUPS_OF_THIS_PROCESS[world] = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return _GROUPS_OF_THIS_PROCESS[world]
