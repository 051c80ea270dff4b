# SPDX-License-Identifier: Apache-2.0
"""One forward or backward pass by FlashAttention-4's kernels, natively masked or by tables of intervals.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from magi_attention.kernels.protocol import AttentionCall
from magi_kernels_blackwell.fa4.library import Library
from magi_kernels_blackwell.fa4.tables import (
    SparseTables,
    backward_tables,
    backward_tiling,
    forward_tables,
    forward_tiling,
    to_device,
)
from magi_kernels_blackwell.masks import PackedMask, packed_mask


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
    num_q, num_k = q.shape[0], k.shape[0]
    packed = packed_mask(call.slices, num_q, num_k)
    out = q.new_empty(num_q, q.shape[1], v.shape[2]) if into is None else into
    lse = q.new_empty(q.shape[1], num_q, dtype=torch.float32)
    options = {"softmax_scale": call.softmax_scale, "softcap": call.softcap or None, "_arch": arch, "return_lse": True}
    if packed is not None and packed.num_documents > 1:
        lengths = _documents(call, packed, q.device)
        library.forward(q, k, v, out=out, lse=lse, **lengths, **_window(packed), **options)
        return out, lse
    batch = [x.unsqueeze(0) for x in (q, k, v)]
    if packed is not None:
        library.forward(*batch, out=out.unsqueeze(0), lse=lse.unsqueeze(0), **_window(packed), **options)
        return out, lse
    tiling = forward_tiling(arch, q.shape[2], v.shape[2])
    tables = forward_tables(call.slices, num_q, num_k, tiling, q.device)
    masks = library.masks
    with masks.bound():
        library.forward(
            *batch,
            out=out.unsqueeze(0),
            lse=lse.unsqueeze(0),
            pack_gqa=False,
            mask_mod=masks.by_intervals if arch == 90 else masks.keys_by_intervals,
            aux_tensors=[tables.offsets, tables.bounds],
            block_sparse_tensors=_sparse(library, tables, (tiling.block_q, tiling.block_k), ranks=False),
            **options,
        )
    return out, lse


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
    """
    num_q, num_k = q.shape[0], k.shape[0]
    packed = packed_mask(call.slices, num_q, num_k)
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    gradients = Gradients(q.new_empty(q.shape) if into is None else into, dk, dv)
    options: dict[str, Any] = {
        "softmax_scale": call.softmax_scale,
        "softcap": call.softcap,
        "deterministic": call.deterministic,
    }
    tensors = (q, k, v, out, dout, lse)
    if packed is not None and packed.num_documents > 1:
        options |= {"dlse": dlse, **gradients._asdict(), **_documents(call, packed, q.device), **_window(packed)}
        library.backward(*tensors, **options)
        return gradients
    options["dlse"] = None if dlse is None else dlse.unsqueeze(0)
    options |= {name: x.unsqueeze(0) for name, x in gradients._asdict().items()}
    batch = [x.unsqueeze(0) for x in tensors]
    if packed is not None:
        library.backward(*batch, **_window(packed), **options)
        return gradients
    tiling = backward_tiling(arch, q.shape[2])
    tables = backward_tables(call.slices, num_q, num_k, tiling, q.device)
    with library.masks.bound():
        library.backward(
            *batch,
            mask_mod=library.masks.by_intervals,
            aux_tensors=[tables.offsets, tables.bounds],
            block_sparse_tensors=_sparse(library, tables, (tiling.block_q, tiling.block_k), ranks=call.deterministic),
            **options,
        )
    return gradients


def _window(packed: PackedMask) -> dict[str, Any]:
    if packed.left is None and packed.right == 0:
        return {"causal": True}
    return {"window_size_left": packed.left, "window_size_right": packed.right}


def _documents(call: AttentionCall, packed: PackedMask, device: torch.device) -> dict[str, Any]:
    """Return where the documents begin, on the device, and the longest document's length."""

    def build() -> dict[str, Any]:
        ends = {"q": packed.q_offsets, "k": packed.k_offsets}
        offsets = {f"cu_seqlens_{name}": to_device(table, device) for name, table in ends.items()}
        return offsets | {f"max_seqlen_{name}": int((table[1:] - table[:-1]).max()) for name, table in ends.items()}

    key = ("fa4 documents", int(packed.q_offsets[-1]), int(packed.k_offsets[-1]), device)
    return call.slices.derived(key, build)


def _sparse(library: Library, tables: SparseTables, block_size: tuple[int, int], *, ranks: bool) -> Any:
    return library.sparse_tensors(
        tables.partial_counts,
        tables.partial_tiles,
        tables.full_counts,
        tables.full_tiles,
        block_size=block_size,
        dq_write_order=tables.partial_ranks if ranks else None,
        dq_write_order_full=tables.full_ranks if ranks else None,
        spt=False if ranks else None,
    )
