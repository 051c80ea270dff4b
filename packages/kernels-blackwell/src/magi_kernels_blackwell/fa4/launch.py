# SPDX-License-Identifier: Apache-2.0
"""One forward or backward pass by FlashAttention-4's kernels, natively masked or by tables of intervals.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from magi_attention.kernels.device_tiles import upload
from magi_attention.kernels.protocol import AttentionCall, KeysDone
from magi_attention.kernels.table_streams import settle
from magi_kernels_blackwell.fa4.grouped import gradients_like, launch_grouped_backward
from magi_kernels_blackwell.fa4.library import Library
from magi_kernels_blackwell.fa4.parts import Extent, Part, PassTensors, launch_parts, order_of_parts
from magi_kernels_blackwell.fa4.tables import (
    SparseTables,
    backward_tables,
    backward_tiling,
    forward_tables,
    forward_tiling,
)
from magi_kernels_blackwell.masks import PackedMask, packed_mask
from magi_kernels_blackwell.prepared import (
    PreparedBackward,
    PreparedForward,
    check_sums,
    ignore,
    layout_of,
    noted,
    watched,
)
from magi_kernels_blackwell.wheels import HOPPER

SCALE_AT = 5
DLSE_AT, SEMAPHORES_AT = 8, (16, 17, 18)
"""Places among the arguments of FlashAttention-4's kernels."""


class Gradients(NamedTuple):
    """Gradients of q ``[tq, hq, d]``, k ``[tk, hk, d]`` and v ``[tk, hk, dv]``."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


def launch_forward(
    library: Library, arch: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return out ``[tq, hq, dv]`` and lse ``[hq, tq]``. There must be some queries and keys.

    Args:
        library: the loaded wheel.
        arch: the kernels' compute capability, as ``10 * major + minor``.
        q: ``[tq, hq, d]``.
        k: ``[tk, hk, d]``.
        v: ``[tk, hk, dv]``.
        call: the mask and how to score.
        into: where to write out; None for a new tensor.
    """
    q, k, v = (library.aligned(x) for x in (q, k, v))
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2]) if into is None else into
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    packed = packed_mask(call.slices, q.shape[0], k.shape[0])
    tensors = _as_batch(packed, q, k, v, out, lse)
    key = ("fa4 forward", arch, call.softcap, *layout_of(q, k, v))
    prepared = call.slices.derived(key, lambda: _prepare_forward(library, arch, tensors, packed, call))
    if prepared is not None:
        prepared.streams.add_current()
        prepared.kernel(*tensors, call.softmax_scale, *prepared.rest)
    return out, lse


def _prepare_forward(
    library: Library, arch: int, tensors: tuple[Tensor, ...], packed: PackedMask | None, call: AttentionCall
) -> PreparedForward | None:
    """Find the kernel for tensors as they are given to it; None where it is only compiled."""
    q, k, v, out, lse = tensors
    options: dict[str, Any] = {
        "softmax_scale": call.softmax_scale,
        "softcap": call.softcap or None,
        "_arch": arch,
        "return_lse": True,
        "out": out,
        "lse": lse,
    }
    if packed is not None:
        options |= _window(packed) | _documents(packed, q.device)
    else:
        tiling = forward_tiling(arch, q.shape[-1], v.shape[-1])
        tables = forward_tables(call.slices, q.shape[1], k.shape[1], tiling, q.device)
        options |= {
            "pack_gqa": False,
            "mask_mod": library.masks.by_intervals if arch == HOPPER else library.masks.keys_by_intervals,
            "aux_tensors": [tables.offsets, tables.bounds],
            "block_sparse_tensors": _sparse(library, tables, (tiling.block_q, tiling.block_k)),
        }
    with watched(library.forward) as (launches,), library.masks.bound():
        library.forward(q, k, v, **options)
        settle(q.device)
    return (
        PreparedForward.of_launch(launches[-1], SCALE_AT) if noted(launches, is_tracing=library.is_tracing()) else None
    )


def launch_backward(
    library: Library,
    arch: int,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    call: AttentionCall,
    into: Tensor | None = None,
    keys_done: KeysDone = ignore,
) -> Gradients:
    """Return the gradients. There must be some queries and keys.

    Args:
        library: the loaded wheel.
        arch: the kernels' compute capability, as ``10 * major + minor``.
        dout, out: ``[tq, hq, dv]``, of q's dtype.
        q: ``[tq, hq, d]``.
        k: ``[tk, hk, d]``.
        v: ``[tk, hk, dv]``.
        lse, dlse: ``[hq, tq]`` float32, contiguous.
        call: the mask and how to score.
        into: where to write dq; None for a new tensor.
        keys_done: called with dk and dv once they are launched; where some come first, also with what lets a stream
            wait for these.
    """
    dout, q, k, v, out = (library.aligned(x) for x in (dout, q, k, v, out))
    packed = packed_mask(call.slices, q.shape[0], k.shape[0])
    launch = launch_grouped_backward if arch == HOPPER and _suits_groups(packed, q, k, v) else launch_own_backward
    return Gradients(*launch(library, arch, dout, q, k, v, out, lse, dlse, call, into, keys_done))


def _suits_groups(packed: PackedMask | None, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel for groups of heads is needed on Hopper, or faster than FlashAttention-4's as it is.

    It is faster for windows, of which a block of keys sees few queries, and all blocks as many; measured for 128 dims,
    while for 64 it is slower. The other kernel has no grouped heads of unequal dims.
    """
    if packed is None or (q.shape[2] != v.shape[2] and q.shape[1] != k.shape[1]):
        return True
    is_window = packed.left is not None or packed.right not in (None, 0)
    return is_window and q.shape[2] > 64


def launch_own_backward(
    library: Library,
    arch: int,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    call: AttentionCall,
    into: Tensor | None = None,
    keys_done: KeysDone = ignore,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by FlashAttention-4's backward pass as it is; arguments as of :func:`launch_backward`."""
    packed = packed_mask(call.slices, q.shape[0], k.shape[0])
    gradients = gradients_like(q, k, v, into)
    tensors = PassTensors(dout, q, k, v, out, lse, dlse, *gradients)
    prepare, scale = partial(_prepare, library, arch, packed, call), call.softmax_scale
    whole = prepare(tensors)
    if whole is None:
        return gradients
    done = partial(keys_done, *gradients[1:])
    order = order_of_parts(packed, call, (q.shape[1], k.shape[1]), k.shape[0]) if arch == HOPPER else None
    if order is None:
        prepared, given = whole
        prepared(given.inputs, given.lse, given.dlse, given.gradients, scale, done)
        return gradients

    def prepare_part(extent: Extent) -> Part:
        found = prepare(tensors.part(extent))
        assert found is not None, "a part of what is launched is only compiled"
        return found

    launch_parts(whole, order, prepare_part, scale, done)
    return gradients


def _prepare(
    library: Library, arch: int, packed: PackedMask | None, call: AttentionCall, tensors: PassTensors
) -> Part | None:
    """The kernels for a pass, or a part of one, whose mask is alike; found once and kept with the slices.

    Args:
        library, arch, call: as of :func:`launch_backward`.
        packed: the whole mask.
        tensors: of the pass or part.

    Returns:
        None where kernels are only compiled.
    """
    given = PassTensors(*_as_batch(packed, *tensors))
    layout = layout_of(tensors.q, tensors.k, tensors.v, tensors.dout, tensors.out)
    prepared = call.slices.derived(
        ("fa4 backward", arch, call.softcap, call.deterministic, tensors.dlse is None, *layout),
        lambda: _prepare_backward(library, arch, given, packed, call),
    )
    return None if prepared is None else Part(prepared, given)


def _prepare_backward(
    library: Library, arch: int, tensors: PassTensors, packed: PackedMask | None, call: AttentionCall
) -> PreparedBackward | None:
    """Find the kernels for tensors as they are given to them; None where they are only compiled."""
    dout, q, k, v, out = tensors.inputs
    options: dict[str, Any] = {
        "softmax_scale": call.softmax_scale,
        "softcap": call.softcap,
        "deterministic": call.deterministic,
        "dlse": tensors.dlse,
        "dq": tensors.dq,
        "dk": tensors.dk,
        "dv": tensors.dv,
    }
    if packed is not None:
        options |= _window(packed) | _documents(packed, q.device)
    else:
        tiling = backward_tiling(q.shape[-1])
        tables = backward_tables(call.slices, q.shape[1], k.shape[1], tiling, q.device, ranks=call.deterministic)
        options |= {
            "mask_mod": library.masks.by_intervals,
            "aux_tensors": [tables.offsets, tables.bounds],
            "block_sparse_tensors": _sparse(library, tables, (tiling.block_q, tiling.block_k)),
        }
    with watched(*library.backward_parts) as (before, main, after), library.masks.bound():
        library.backward(q, k, v, out, dout, tensors.lse, **options)
        settle(q.device)
    if not noted(main, is_tracing=library.is_tracing()):
        return None
    check_sums(main[0], after, tensors.gradients)
    return PreparedBackward(before[0], main[0], after, DLSE_AT, SEMAPHORES_AT)


def _as_batch(packed: PackedMask | None, *tensors: Any) -> tuple[Any, ...]:
    """Shape tensors as the kernels expect them: a batch of one sequence, but for several documents none."""
    if packed is not None and packed.num_documents > 1:
        return tensors
    return tuple(None if x is None else x.unsqueeze(0) for x in tensors)


def _window(packed: PackedMask) -> dict[str, Any]:
    if packed.left is None and packed.right == 0:
        return {"causal": True}
    return {"window_size_left": packed.left, "window_size_right": packed.right}


def _documents(packed: PackedMask, device: torch.device) -> dict[str, Any]:
    """Return where documents begin, on the device, and the longest document's length; nothing for a single one."""
    if packed.num_documents == 1:
        return {}
    ends = {"q": packed.q_offsets, "k": packed.k_offsets}
    offsets = {f"cu_seqlens_{name}": upload(table, device) for name, table in ends.items()}
    return offsets | {f"max_seqlen_{name}": int((table[1:] - table[:-1]).max()) for name, table in ends.items()}


def _sparse(library: Library, tables: SparseTables, block_size: tuple[int, int]) -> Any:
    return library.sparse_tensors(
        tables.partial_counts,
        tables.partial_tiles,
        tables.full_counts,
        tables.full_tiles,
        block_size=block_size,
        dq_write_order=tables.partial_ranks,
        dq_write_order_full=tables.full_ranks,
        spt=None if tables.partial_ranks is None else False,
    )
