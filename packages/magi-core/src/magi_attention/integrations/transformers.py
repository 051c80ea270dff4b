# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Transformers: an attention that models choose by name, ``attn_implementation="magi"``."""

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from magi_attention.api import DistAttnRuntimeKey, calc_attn, get_position_ids
from magi_attention.common.enum import AttnMaskType

# "attention" is what "full_attention" was called before.
SUPPORTED_LAYER_TYPES = ("attention", "full_attention", "sliding_attention")
# Biases of scores, keys that an indexer chose (DeepSeek's and MiniMax's sparse attention), sinks of each row (Inkling).
REFUSED_ARGUMENTS = ("position_bias", "indices", "block_indices", "sinks")
_LAYERS_WITH_POSITIONS: WeakSet[nn.Module] = WeakSet()
_WIDEST_ROWS: WeakKeyDictionary[DistAttnRuntimeKey, int] = WeakKeyDictionary()


def register(name: str = "magi") -> None:
    """Make the attention known to Transformers, for ``from_pretrained(..., attn_implementation=name)``.

    The model is then called with this rank's tokens, ``input_ids`` ``[1, n_local]``, with their ``position_ids``,
    ``use_cache=False``, and with ``magi_key=key``. Models with a sliding window in some or all of their layers are
    given ``magi_window_key`` as well, the key of the same documents with that window.
    """
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, _no_mask)


def _no_mask(*_args: Any, attention_mask: Tensor | None = None, **_kwargs: Any) -> None:
    """The key says what is masked, so that the model need not build a mask; Transformers calls it by keywords.

    Raises:
        ValueError: The model was called with a mask.
    """
    if attention_mask is not None:
        raise ValueError(
            "attention_mask can't be used with magi attention: the key says what is masked. Call the model without "
            "one, and make documents of the sequences that it would tell apart"
        )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    magi_key: DistAttnRuntimeKey | None = None,
    magi_window_key: DistAttnRuntimeKey | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer, as Transformers calls it. Collective, as :func:`magi_attention.api.calc_attn` is.

    Args:
        module: the layer's attention.
        query: ``[1, hq, n_local, d]``, this rank's rows.
        key: ``[1, hk, n_local, d]``.
        value: ``[1, hk, n_local, dv]``.
        attention_mask: must be None.
        magi_key: what the rows of layers without a window attend to.
        magi_window_key: the same for layers with a window.
        scaling: factor of the scores; ``d ** -0.5`` for None.
        dropout: must be 0.
        sliding_window: the layer's window; None for a layer without, or whose window the config has.
        softcap: bound of the scores, or None.
        s_aux: ``[hq]`` logits of a learnable sink, or None.
        position_ids: ``[1, n_local]``, what the model has rotated by.
        others: further arguments of the model's call.

    Returns:
        ``[1, n_local, hq, dv]``, and None in place of attention weights.

    Raises:
        ValueError: The model was called without ``position_ids``, no key for this kind of layer, one whose window is
            wider than the layer's, a model with other layers than those of full or sliding attention, several sequences
            in a batch, a mask, dropout, or something else that would change the result and isn't supported.
    """
    _check_layer_types(module)
    if sliding_window is None:
        sliding_window = _window_of_mask(module)
    wanted, name = (magi_key, "magi_key") if sliding_window is None else (magi_window_key, "magi_window_key")
    if wanted is None:
        window = "no sliding window" if sliding_window is None else f"a sliding window of {sliding_window}"
        raise ValueError(
            f"a layer with {window} needs {name}: call the model with {name}=... If it was, the model doesn't hand it "
            "to its layers, and can't be used with magi attention"
        )
    # A compiled program serves keys that it can't look into.
    if sliding_window is not None and not torch.compiler.is_compiling():
        _check_window(wanted, sliding_window, getattr(module, "is_causal", False))
    if position_ids is not None:
        _check_positions(module, position_ids, wanted)
    unsupported = {
        "attention_mask": attention_mask is not None,
        "dropout": dropout > 0,
        **{name: others.get(name) is not None for name in REFUSED_ARGUMENTS},
        "output_attentions": bool(others.get("output_attentions")),
    }
    if wrong := [option for option, is_set in unsupported.items() if is_set]:
        raise ValueError(f"{', '.join(wrong)} can't be used with magi attention: the key says what is masked")
    if query.shape[0] != 1:
        raise ValueError(f"pack the {query.shape[0]} sequences of the batch into one, as documents of its mask")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast, rotary embeddings return float32
    sink = None if s_aux is None else s_aux[None]
    out, _ = calc_attn(q, k, v, wanted, sink=sink, softmax_scale=scaling, softcap=softcap or 0.0)
    return out[None], None


def _check_layer_types(module: nn.Module) -> None:
    """Refuse models with cross-attention, a third kind of mask (Llama 4's chunks), or rows in order (Mamba)."""
    config = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(
            "magi attention can't be used with an encoder-decoder or other cross-attention: one key would mask the "
            "model's self-attention and its cross-attention alike"
        )
    layer_types = getattr(config, "layer_types", None) or ()
    if others := sorted(set(layer_types).difference(SUPPORTED_LAYER_TYPES)):
        raise ValueError(
            f"magi attention can't be used with a model that has layers of {', '.join(others)}: it supports "
            "full_attention and sliding_attention"
        )


def _window_of_mask(module: nn.Module) -> int | None:
    """The window of a layer whose model has it in the mask alone (Qwen2-MoE, Phi-MoE), as the config says."""
    config = getattr(module, "config", None)
    if (window := getattr(config, "sliding_window", None)) is None:
        return None
    layer_types, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    has_window = layer_types is None or (layer is not None and layer_types[layer] == "sliding_attention")
    return window if has_window else None


def _check_positions(module: nn.Module, position_ids: Tensor, key: DistAttnRuntimeKey) -> None:
    """Refuse 0, 1, 2 and so on, which the model takes where none are given, for rows that aren't one after another.

    Looked at once for each layer, since the host waits for the answer, and not by a compiler.
    """
    if torch.compiler.is_compiling() or module in _LAYERS_WITH_POSITIONS:
        return
    _LAYERS_WITH_POSITIONS.add(module)
    rows = get_position_ids(key, position_ids.device)
    numbers = torch.arange(len(rows), device=rows.device)
    if not torch.equal(position_ids.flatten(), numbers):
        return
    # They may be right all the same: each row's place in a document, of which one goes on where the last one stops.
    is_real = rows.diff(prepend=rows[:1] - 1) > 0  # the last one is repeated for padding
    starts = torch.tensor([0, *(each.start for each in key.k_ranges)], device=rows.device)
    if not torch.isin((rows - numbers)[is_real], starts).all():
        raise ValueError(
            f"the model was called without position_ids, and took 0 to {len(rows) - 1}, but this rank's rows are not "
            "one after another: pass position_ids=get_position_ids(magi_key)[None], or these from where documents start"
        )


def _check_window(key: DistAttnRuntimeKey, sliding_window: int, is_causal: bool) -> None:
    """Refuse a window that is wider than the layer's, which has as many keys behind the token as before it, if any."""
    before = sliding_window - 1
    after = 0 if is_causal else before
    allowed = before + 1 + after
    if (widest := _widest_row(key)) > allowed:
        raise ValueError(
            f"the layer's sliding window is {allowed} keys with the token itself, but magi_window_key lets a row see "
            f"{widest}: make it with window_size=({before}, {after})"
        )


def _widest_row(key: DistAttnRuntimeKey) -> int:
    """The most keys that a row has in one slice, counted once for each key. Rows may have more, in several slices."""
    if key not in _WIDEST_ROWS:
        slices = [
            (k.seqlen, q.seqlen, mask_type is AttnMaskType.BICAUSAL)
            for q, k, mask_type in zip(key.q_ranges, key.k_ranges, key.attn_mask_type, strict=True)
        ]
        num_keys, num_rows, is_band = np.array(slices, dtype=np.int64).reshape(-1, 3).T
        _WIDEST_ROWS[key] = int(np.where(is_band, num_keys - num_rows + 1, num_keys).max(initial=0))
    return _WIDEST_ROWS[key]
