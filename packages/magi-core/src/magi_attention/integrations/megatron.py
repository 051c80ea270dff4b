# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core: a core attention for layer specs, and what a training step hands to it.

Megatron cuts sequences for its own ring attention: into 2·cp pieces, of which each rank gets two. Here the planner
deals rows, so a step dispatches its batch by :func:`dispatch_batch` instead of ``get_batch_on_this_cp_rank``, and
rotary embeddings take the positions of the dealt rows (:func:`use_dispatched_positions`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

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
from magi_attention.runtime.cache import find_manager

IS_CAUSAL = {
    AttnMaskType.causal: True,
    AttnMaskType.padding_causal: True,
    AttnMaskType.no_mask: False,
    AttnMaskType.padding: False,
}


@dataclass
class MagiPackedSeqParams(PackedSeqParams):
    """The packed sequence of a step, as Megatron hands it to every layer, in recomputed ones as well.

    ``qkv_format`` is "sbhd": to everything but the attention, this rank's rows are one sequence like any other.
    ``max_seqlen_q`` and ``max_seqlen_kv`` are None, so that Megatron's own rotary embedding, which would rotate by
    wrong positions, fails where :func:`use_dispatched_positions` was forgotten.

    Attributes:
        magi_key: the key of the documents.
        window_key: the same with the config's window, for layers that have one.
        window_size: that window, as the config has it.
        positions: ``[n_local]`` int64, the place of each of this rank's rows in its document.
        causal: whether the documents are causal.
    """

    magi_key: DistAttnRuntimeKey | None = None
    window_key: DistAttnRuntimeKey | None = None
    window_size: tuple[int, int] | None = None
    positions: Tensor | None = None
    causal: bool = True


def plan_packed_sequence(
    packed: PackedSeqParams,
    config: TransformerConfig,
    *,
    causal: bool = True,
    cp_group: GroupOrMesh = None,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),  # noqa: B008 - frozen
) -> MagiPackedSeqParams:
    """Plan the attention of a packed sequence. Collective; the same sequence is planned once.

    Args:
        packed: the documents of the *whole* sequence: ``cu_seqlens_q`` and, if there is padding between documents,
            ``cu_seqlens_q_padded``; best on the CPU, since the host plans. Padding attends to itself, and nothing else
            attends to it.
        config: the model's config, which has the heads, their size, the window and the parallel sizes.
        causal: whether the documents are causal, as the model's layers must be by their ``attn_mask_type``.
        cp_group: the context-parallel group; for None that of ``packed``, which Megatron's hybrid context parallelism
            gives to each sequence, or Megatron's own.
        dist_attn_config: as for :func:`magi_attention.api.magi_attn_flex_key`.

    Returns:
        What the model is called with, as ``packed_seq_params``. A config without ``calculate_per_token_loss`` is warned
        of.

    Raises:
        ValueError: No ``cu_seqlens_q``, a padded one that doesn't fit it, rows of a rank that sequence parallelism
            can't share out or pipeline stages don't expect, and all that
            :func:`magi_attention.api.magi_attn_varlen_key` raises.
        TypeError: ``cu_seqlens_q`` or ``cu_seqlens_q_padded`` is no tensor.
    """
    starts, cu_seqlens = _document_starts(packed)
    if cp_group is None:
        cp_group = packed.cp_group or parallel_state.get_context_parallel_group()
    tp_size = config.tensor_model_parallel_size
    heads = config.num_attention_heads // tp_size, max(config.num_query_groups // tp_size, 1)
    key = magi_attn_varlen_key(
        cu_seqlens, cu_seqlens, *heads, config.kv_channels, 0, cp_group, causal, dist_attn_config=dist_attn_config
    )
    _check_rows_of_ranks(key, config)
    if len(key.group_ranks) > 1 and not config.calculate_per_token_loss:
        warnings.warn(
            "context-parallel ranks hold different numbers of targets, and Megatron averages the means of all: set "
            "calculate_per_token_loss=True",
            stacklevel=2,
        )
    rows = get_position_ids(key)
    starts = starts.to(rows.device)
    positions = rows - starts[torch.searchsorted(starts, rows, right=True) - 1]
    return MagiPackedSeqParams(
        qkv_format="sbhd",
        magi_key=key,
        window_key=_window_key(key, cu_seqlens, config, causal),
        window_size=_window_size(config),
        positions=positions,
        causal=causal,
    )


def _window_size(config: TransformerConfig) -> tuple[int, int] | None:
    return tuple(config.window_size) if config.window_size else None


def _window_key(
    key: DistAttnRuntimeKey, cu_seqlens: Tensor, config: TransformerConfig, causal: bool
) -> DistAttnRuntimeKey | None:
    """The key of layers with a window, None without one; the documents' own where it bounds nothing further."""
    if (window := _window_size(config)) is None:
        return None
    left, right = window[0], 0 if causal else window[1]
    if left == -1 and (causal or right == -1):
        return key
    return make_varlen_key_for_new_mask_after_dispatch(cu_seqlens, cu_seqlens, key, window_size=(left, right))


def _check_rows_of_ranks(key: DistAttnRuntimeKey, config: TransformerConfig) -> None:
    """Refuse rows that Megatron can't pass on; by those of all ranks, so that all raise alike and none waits."""
    rows_per_rank = find_manager(key).layout.rows_per_rank
    tp_size = config.tensor_model_parallel_size
    for rank, num_rows in enumerate(rows_per_rank.tolist()):
        if config.sequence_parallel and num_rows % tp_size:
            raise ValueError(
                f"sequence parallelism shares out context-parallel rank {rank}'s {num_rows} rows to "
                f"{tp_size} ranks: choose a DispatchConfig(chunk_size=...) that is a multiple of {tp_size}"
            )
    num_real = key.total_seqlen_q - key.pad_size
    is_as_expected = (rows_per_rank * len(rows_per_rank) == num_real).all()
    if config.pipeline_model_parallel_size > 1 and not config.variable_seq_lengths and not is_as_expected:
        raise ValueError(
            f"pipeline_model_parallel_size={config.pipeline_model_parallel_size}: stages expect seq_length / "
            f"context_parallel_size rows of {num_real} on each rank, but ranks have {rows_per_rank.tolist()} "
            f"(key.pad_size={key.pad_size}): set variable_seq_lengths=True, or choose a "
            "DispatchConfig(chunk_size=...) by which the sequence needs no padding, without uneven_shard"
        )


def _document_starts(packed: PackedSeqParams) -> tuple[Tensor, Tensor]:
    """The first rows of the documents and the total; the same with padding behind documents as documents of its own."""
    if packed.cu_seqlens_q is None:
        raise ValueError("packed has no cu_seqlens_q: it names the first row of each document, and at last the total")
    ends = _on_host(packed.cu_seqlens_q, "cu_seqlens_q")
    if packed.cu_seqlens_q_padded is None:
        return ends, ends
    starts = _on_host(packed.cu_seqlens_q_padded, "cu_seqlens_q_padded")
    if len(starts) != len(ends):
        raise ValueError(
            f"cu_seqlens_q_padded has {len(starts)} entries and cu_seqlens_q has {len(ends)}; both have one for each "
            "document, and one more"
        )
    lengths, padded = ends.diff(), starts.diff()
    if too_long := (lengths > padded).nonzero().flatten().tolist():
        at = too_long[0]
        raise ValueError(
            f"document {at} has {int(lengths[at])} rows by cu_seqlens_q, but only {int(padded[at])} with its padding "
            "by cu_seqlens_q_padded"
        )
    pairs = torch.stack([starts[:-1], starts[:-1] + lengths], dim=1)
    return starts, torch.cat([pairs.flatten(), starts[-1:]])


def _on_host(cu_seqlens: Tensor, name: str) -> Tensor:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
        found = cu_seqlens.shape if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{name} must be a 1-D tensor of integers, not {found}")
    return cu_seqlens.cpu().long()


def _planned(params: PackedSeqParams | None) -> tuple[MagiPackedSeqParams, DistAttnRuntimeKey, Tensor]:
    """The same, if it is of a planned sequence, with its key and its positions."""
    if not isinstance(params, MagiPackedSeqParams) or params.magi_key is None or params.positions is None:
        raise ValueError(
            f"the packed sequence must be what plan_packed_sequence(...) returned, not {type(params).__name__}: call "
            "the model with packed_seq_params=plan_packed_sequence(...)"
        )
    return params, params.magi_key, params.positions


def dispatch_batch(batch: Mapping[str, Tensor | None], params: MagiPackedSeqParams) -> dict[str, Tensor | None]:
    """This rank's part of a batch, in place of Megatron's ``get_batch_on_this_cp_rank``.

    Args:
        batch: tensors ``[1, S, ...]`` of the whole sequence: ``tokens``, ``labels``, ``loss_mask``, ``padding_mask``
            and whatever else belongs to rows. What ``params`` knows better, ``position_ids`` and ``attention_mask``,
            may be anything.
        params: what :func:`plan_packed_sequence` returned.

    Returns:
        The same names with ``[1, n_local, ...]``, None where None was given, with ``position_ids``, and None as
        ``attention_mask``. Rows of padding are 0, in ``loss_mask`` too: a loss without that mask counts their labels.
        In ``padding_mask``, by which routers of experts leave rows out, they are True.

    Raises:
        ValueError: What has no value for each row of the planned sequence, such as Megatron's ``cu_seqlens``, or
            ``params`` that weren't planned.
    """
    _, key, positions = _planned(params)
    num_rows = key.total_seqlen_q - key.pad_size
    local: dict[str, Tensor | None] = dict.fromkeys(batch)
    for name, x in batch.items():
        if x is None or name in ("attention_mask", "position_ids"):
            continue
        if not isinstance(x, Tensor) or x.shape[:2] != (1, num_rows):
            found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"type {type(x).__name__}"
            raise ValueError(
                f"batch[{name!r}] has {found}; what belongs to rows of the planned sequence has [1, {num_rows}, ...]: "
                "leave out what doesn't, such as cu_seqlens and max_seqlen"
            )
        local[name] = dispatch(x[0], key, pad_value=1.0 if name == "padding_mask" else 0.0)[None]
    return local | {"attention_mask": None, "position_ids": positions[None]}


class MagiCoreAttention(MegatronModule):
    """The ``core_attention`` of a self-attention's submodules, in place of ``TEDotProductAttention``.

    The arguments are those that Megatron builds core attentions with.

    Raises:
        ValueError: The config asks for something that isn't supported, and would change the result.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        unsupported = {
            f"attention_dropout={dropout}: set it to 0": dropout > 0,
            f"{attention_type} attention: use self attention": attention_type != "self",
            f"attn_mask_type {attn_mask_type.name}": attn_mask_type not in IS_CAUSAL,
            "multi_latent_attention": config.multi_latent_attention,
            "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
            "qk_clip and log_max_attention_logit": config.qk_clip or config.log_max_attention_logit,
            "experimental_attention_variant": bool(getattr(config, "experimental_attention_variant", None)),
            "multi-token prediction, which rolls labels itself": bool(config.mtp_num_layers),
        }
        if wrong := [option for option, is_set in unsupported.items() if is_set]:
            raise ValueError(f"MagiCoreAttention doesn't support {'; '.join(wrong)}")
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.softmax_type = config.softmax_type
        if self.softmax_type == "learnable":
            self.softmax_offset = self._make_softmax_offset(config)
        self.has_window = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, max(layer_number, 1)
        )

    @staticmethod
    def _make_softmax_offset(config: TransformerConfig) -> nn.Parameter:
        """The sink's logit of each of this tensor-parallel rank's heads, named and drawn as Megatron does."""
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        num_heads = config.num_attention_heads // config.tensor_model_parallel_size
        offset = nn.Parameter(torch.empty(num_heads, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            config.init_method(offset)
        set_tensor_model_parallel_attributes(offset, is_parallel=True, dim=0, stride=1)
        return offset

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The learnable sink, cut by heads, for distributed checkpoints."""
        groups = {"tp_group": parallel_state.get_tensor_model_parallel_group()}
        if metadata and "dp_cp_group" in metadata:
            groups["dp_cp_group"] = metadata["dp_cp_group"]
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {"softmax_offset": 0}, sharded_offsets, **groups
        )

    def _sink(self, query: Tensor) -> Tensor | None:
        """Logits ``[1, hq]`` that join each row's softmax with value 0: learnable, 0, or none."""
        if self.softmax_type == "learnable":
            return self.softmax_offset[None]
        return query.new_zeros(1, query.shape[-2]) if self.softmax_type == "off-by-one" else None

    def _key_with_window(self, params: MagiPackedSeqParams) -> DistAttnRuntimeKey:
        wanted = _window_size(self.config)
        if params.window_key is None or params.window_size != wanted:
            raise ValueError(
                f"the model's config has window_size={wanted}, but that of plan_packed_sequence had "
                f"{params.window_size}: plan with the model's config"
            )
        return params.window_key

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend ``[n_local, 1, heads, head_dim]``; ``[n_local, 1, hq * head_dim]`` come out. Collective.

        What is masked is said by ``packed_seq_params`` alone.

        Raises:
            ValueError: Params that weren't planned, or not for this layer; an ``attention_mask`` or ``attention_bias``.
        """
        params, magi_key, _ = _planned(packed_seq_params)
        if attention_mask is not None or attention_bias is not None:
            raise ValueError(
                "MagiCoreAttention takes no attention_mask and no attention_bias, since packed_seq_params say what is "
                "masked: call the model with attention_mask=None, as dispatch_batch has it"
            )
        if params.causal != IS_CAUSAL[self.attn_mask_type]:
            raise ValueError(
                f"the layer's attn_mask_type is {self.attn_mask_type.name}, but the sequence was planned with "
                f"causal={params.causal}: change one of them"
            )
        if self.has_window:
            magi_key = self._key_with_window(params)
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        out, _ = calc_attn(q, k, v, magi_key, sink=self._sink(q), softmax_scale=self.softmax_scale)
        return out.flatten(1)[:, None]


def use_dispatched_positions(model: nn.Module) -> None:
    """Have a ``GPTModel`` rotate by the positions of the dealt rows. Call it once, on every pipeline stage's model.

    Raises:
        ValueError: The model has other than plain rotary embeddings, such as YaRN's, is wrapped in another, or has
            Mamba's or linear attention's layers.
    """
    if convolution := next((name for name, _ in model.named_parameters() if "conv1d" in name), None):
        raise ValueError(
            f"the model has a convolution over the sequence ({convolution}): layers of Mamba and linear attention need "
            "their rows in order, as dealt rows aren't, so that it can't be dispatched"
        )
    rotary = getattr(model, "rotary_pos_emb", None)
    if rotary is None:
        if any(isinstance(each, RotaryEmbedding) for each in model.modules()):
            raise ValueError(
                f"{type(model).__name__} has its rotary embedding in a module below: pass the GPTModel itself, as "
                "model_provider makes it"
            )
        return  # learned positions, or none: position_ids are dispatched
    if type(rotary) is not RotaryEmbedding:
        raise ValueError(f"the model rotates by {type(rotary).__name__}; only RotaryEmbedding is supported")
    model.rotary_pos_emb = DispatchedRotaryEmbedding(rotary)


class DispatchedRotaryEmbedding(nn.Module):
    """A model's rotary embedding, at the positions of a step's rows instead of those of Megatron's own pieces.

    A model asks for the sequence's length first, with the step's ``packed_seq_params``, then for the angles.

    Args:
        rotary: the model's own.
    """

    def __init__(self, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.rotary = rotary
        self._positions: Tensor | None = None

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: TransformerConfig,
        packed_seq_params: PackedSeqParams | None = None,
        **_kwargs: Any,
    ) -> int:
        """This rank's rows; remembers where they are."""
        _, _, self._positions = _planned(packed_seq_params)
        return len(self._positions)

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """Angles ``[n_local, 1, 1, rotary_dim]`` of this rank's rows.

        Raises:
            ValueError: :meth:`get_rotary_seq_len` wasn't called before.
        """
        if self._positions is None:
            raise ValueError("the rotary embedding doesn't know the step's rows: call get_rotary_seq_len before")
        inv_freq = self.rotary.inv_freq.to(self._positions.device)
        self.rotary.inv_freq = inv_freq  # moved once
        positions = (self._positions + offset).to(inv_freq.dtype)
        if self.rotary.seq_len_interpolation_factor is not None:
            positions *= 1 / self.rotary.seq_len_interpolation_factor
        angles = torch.outer(positions, inv_freq)  # inv_freq has the scaling, and the part of a head that is rotated
        doubled = (
            angles.repeat_interleave(2, dim=1) if self.rotary.rotary_interleaved else torch.cat([angles, angles], dim=1)
        )
        return doubled[:, None, None]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Old checkpoints hold ``inv_freq`` under the name of the model's own embedding, which drops it too."""
        state_dict.pop(f"{prefix}inv_freq", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
