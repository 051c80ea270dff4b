# SPDX-License-Identifier: Apache-2.0
"""Distributed attention."""

import torch
from torch import Tensor

from magi_attention.api.attention_checks import check_attention_call
from magi_attention.api.compiled import calc_attn_compiled
from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.runtime.cache import find_manager
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.utils.torch_modes import is_one_operator


def calc_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: DistAttnRuntimeKey,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_max_logits: bool = False,
) -> tuple[Tensor, AttnForwardMeta]:
    """Attend this rank's queries to the keys of all ranks, as the key's mask says. Collective, as is the backward pass.

    Args:
        q: ``[n_local, hq, d]`` in local order, fp16, bf16, fp32 or fp64 where the backend takes it.
        k: ``[n_local, hk, d]``; hq is a multiple of hk, and query head h uses key head ``h // (hq / hk)``. In
            cross-attention, k and v have as many rows as ``dispatch`` gives them with ``attn_role=AttnRole.KEY``.
        v: ``[n_local, hk, dv]``, with dv = d unless the backend takes another.
        key: the key. In a group of one, q, k and v may be shorter than the padded sequence, as long as they hold
            every row that a slice names.
        sink: ``[s, hq]`` learnable logits, the same on all ranks, which join every row's softmax with value 0.
        softmax_scale: factor of the scores; ``d ** -0.5`` for None.
        softcap: if positive, scores become ``softcap * tanh(scores / softcap)``.
        return_max_logits: whether to return the largest score per head.

    Returns:
        ``out`` ``[n_local, hq, dv]``, contiguous, in q's dtype, and the meta: ``lse`` ``[n_local, hq]`` of all scores
        of a row, the sink included (natural logarithm, at least float32, -inf for a row without keys and sink), and if
        asked for ``max_logits`` ``[hq]`` over the whole sequence, before softcap. Gradients flow to q, k, v and sink,
        from ``out`` and from ``lse``.

    Raises:
        ValueError: Shapes, devices or options that don't fit each other or the key, or a key that the cache doesn't
            hold.
        TypeError: No floating-point tensors, or different dtypes. Where older versions raised ``AssertionError``, the
            error is one as well.
    """
    if torch.compiler.is_compiling():
        return calc_attn_compiled(q, k, v, key, sink, softmax_scale, softcap, return_max_logits)
    manager = find_manager(key)
    check_attention_call(q, k, v, manager, sink, softmax_scale, softcap, return_max_logits)
    if is_one_operator(q):
        return calc_attn_compiled(q, k, v, key, sink, softmax_scale, softcap, return_max_logits)
    return manager.calc_attn(
        q,
        k,
        v,
        sink=sink,
        softmax_scale=softmax_scale,
        softcap=softcap,
        return_max_logits=return_max_logits,
    )
