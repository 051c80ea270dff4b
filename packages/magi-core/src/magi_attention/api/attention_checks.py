# SPDX-License-Identifier: Apache-2.0
"""What a call of the distributed attention must fulfill, before anything is sent."""

import torch
from torch import Tensor

from magi_attention.common.enum import AttnRole
from magi_attention.common.errors import MagiTypeError, MagiValueError
from magi_attention.common.slices import SliceTable
from magi_attention.common.validation import check_scores
from magi_attention.runtime.manager import DistAttnRuntimeMgr
from magi_attention.utils.tensors import check_plain_tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_attention_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    manager: DistAttnRuntimeMgr,
    sink: Tensor | None,
    softmax_scale: float | None,
    softcap: float,
    return_max_logits: bool,
) -> None:
    """Raise what :func:`magi_attention.api.calc_attn` says about its arguments; what passed once passes at once."""
    asked: tuple[object, ...] | None = None
    check_scores(softmax_scale, softcap)  # each time, so that nothing is kept for each scale
    try:
        asked = q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device
        asked += q.__class__, k.__class__, v.__class__, return_max_logits
        if sink is not None:
            asked += sink.shape, sink.dtype, sink.device, sink.__class__
        if asked in manager.checked_calls:
            return
    except (AttributeError, TypeError):  # no tensors, of which the checks will tell
        asked = None
    key = manager.key
    _check_tensors(q, k, v, sink, key.is_same_source)
    _check_rows("q has", q, manager, AttnRole.QUERY)
    _check_rows("k and v have", k, manager, AttnRole.KEY)
    if key.is_flatten_head_groups_enable and (sink is not None or return_max_logits):
        raise MagiValueError("flattened head groups exclude a sink and max_logits: switch off flatten_head_groups")
    if asked is not None:
        manager.checked_calls.add(asked)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, is_same_source: bool) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_plain_tensor(name, tensor)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3 or k.shape[:2] != v.shape[:2]:
        raise MagiValueError(f"q must be [n, hq, d], k [n, hk, d], v [n, hk, dv]; they are {shapes}")
    if is_same_source and len(q) != len(k):
        raise MagiValueError(f"q, k and v must have the same number of rows; they are {shapes}")
    if q.shape[2] != k.shape[2]:
        raise MagiValueError(f"q and k must have the same head size; they are {shapes}")
    if 0 in (q.shape[1], q.shape[2], v.shape[2]):
        raise MagiValueError(f"there must be heads, and of a size; they are {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise MagiValueError(f"the {q.shape[1]} query heads must be a multiple of the {k.shape[1]} key heads")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in FLOAT_DTYPES:
        hint = "; autocast leaves them as they are, so cast them" if torch.is_autocast_enabled(q.device.type) else ""
        raise MagiTypeError(
            f"q, k and v must have one dtype of {', '.join(map(str, FLOAT_DTYPES))}; they have {q.dtype}, {k.dtype}, "
            f"{v.dtype}{hint}"
        )
    if not q.device == k.device == v.device:
        raise MagiValueError(f"q, k and v must be on one device; they are on {q.device}, {k.device}, {v.device}")
    if sink is not None:
        _check_sink(sink, q)


def _check_sink(sink: Tensor, q: Tensor) -> None:
    check_plain_tensor("sink", sink)
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
