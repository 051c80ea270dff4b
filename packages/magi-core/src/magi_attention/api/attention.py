# SPDX-License-Identifier: Apache-2.0
"""Distributed attention."""

import math

import torch
from torch import Tensor

from magi_attention.common.enum import AttnRole
from magi_attention.common.errors import MagiTypeError, MagiValueError
from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.common.slices import SliceTable
from magi_attention.runtime.cache import find_manager
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.manager import DistAttnRuntimeMgr

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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
        ``out`` ``[n_local, hq, dv]`` in q's dtype, and the meta: ``lse`` ``[n_local, hq]`` of all scores of a row, the
        sink included (natural logarithm, at least float32, -inf for a row without keys and sink), and if asked for
        ``max_logits`` ``[hq]`` over the whole sequence, before softcap. Gradients flow to q, k, v and sink, from
        ``out`` and from ``lse``.

    Raises:
        ValueError: Shapes, devices or options that don't fit each other or the key, or a key that the cache doesn't
            hold.
        TypeError: No floating-point tensors, or different dtypes. Where older versions raised ``AssertionError``, the
            error is one as well.
    """
    manager = find_manager(key)
    _check_tensors(q, k, v, sink, key.is_same_source)
    _check_rows("q has", q, manager, AttnRole.QUERY)
    _check_rows("k and v have", k, manager, AttnRole.KEY)
    if not 0 <= softcap < math.inf:
        raise MagiValueError(f"softcap is {softcap}; it must be positive and finite, or 0 for none")
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise MagiValueError(f"softmax_scale is {softmax_scale}; it must be finite, or None for head_dim ** -0.5")
    if key.is_flatten_head_groups_enable and (sink is not None or return_max_logits):
        raise MagiValueError("flattened head groups exclude a sink and max_logits: switch off flatten_head_groups")
    return manager.calc_attn(
        q,
        k,
        v,
        sink=sink,
        softmax_scale=softmax_scale,
        softcap=softcap,
        return_max_logits=return_max_logits,
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, is_same_source: bool) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise MagiTypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3 or k.shape[:2] != v.shape[:2]:
        raise MagiValueError(f"q must be [n, hq, d], k [n, hk, d], v [n, hk, dv]; they are {shapes}")
    if is_same_source and len(q) != len(k):
        raise MagiValueError(f"q, k and v must have the same number of rows; they are {shapes}")
    if q.shape[2] != k.shape[2]:
        raise MagiValueError(f"q and k must have the same head size; they are {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise MagiValueError(f"the {q.shape[1]} query heads must be a multiple of the {k.shape[1]} key heads")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in FLOAT_DTYPES:
        raise MagiTypeError(
            f"q, k and v must have one dtype of {', '.join(map(str, FLOAT_DTYPES))}; they have {q.dtype}, {k.dtype}, "
            f"{v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise MagiValueError(f"q, k and v must be on one device; they are on {q.device}, {k.device}, {v.device}")
    if sink is not None:
        _check_sink(sink, q)


def _check_sink(sink: Tensor, q: Tensor) -> None:
    if not isinstance(sink, Tensor):
        raise MagiTypeError(f"sink must be a tensor, not {type(sink).__name__}")
    if sink.dim() != 2 or sink.shape[1] != q.shape[1]:
        raise MagiValueError(f"sink must be [s, {q.shape[1]}], one column per query head; it is {tuple(sink.shape)}")
    if sink.dtype not in FLOAT_DTYPES:
        raise MagiTypeError(f"sink must be floating-point, best float32; it is {sink.dtype}")
    if sink.device != q.device:
        raise MagiValueError(f"sink is on {sink.device}; it must be on q's device {q.device}")


def _rows_named(slices: SliceTable, attn_role: AttnRole) -> int:
    """How many rows a tensor of that role needs to hold every row that a slice names."""
    end = 1 if attn_role is AttnRole.QUERY else 3
    return slices.derived(("rows named", attn_role), lambda: int(slices.without_empty().rows[:, end].max(initial=0)))


def _check_rows(subject: str, x: Tensor, manager: DistAttnRuntimeMgr, attn_role: AttnRole) -> None:
    num_local, layout = manager.num_local_rows(attn_role), manager.layout_of(attn_role)
    if len(x) == num_local:
        return
    if layout.num_ranks == 1 and _rows_named(manager.key.slices, attn_role) <= len(x) < num_local:
        return
    raise MagiValueError(
        f"{subject} {len(x)} rows, but rank {manager.rank} of the group holds {num_local} of the padded "
        f"sequence's {layout.total}: pass dispatched tensors"
    )
