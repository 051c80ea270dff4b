# SPDX-License-Identifier: Apache-2.0
"""One launch of the backward kernels of index attention.

Shape suffixes: t tokens, h heads, d head dim, dv head dim of values, n entries of a list; q queries, k keys.
"""

import ctypes
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.kernels.protocol import IndexCall
from magi_kernels_hopper.driver import CUBINS, Kernel, TensorMap
from magi_kernels_hopper.index import set_map
from magi_kernels_hopper.index_lists import Lists, TileLists, blocks_of, lists_of_tiles, packs_of
from magi_kernels_hopper.launching import aligned, index_of
from magi_kernels_hopper.results import LOG2_E, scored_upward
from magi_kernels_hopper.support import ELEMENT_OF
from magi_kernels_hopper.variants import IndexBackwardVariant

BYTES_AT_A_TIME = 1 << 30
"""Of the gradients that entries of lists have of their own, where these are added up in a fixed order."""


class Params(ctypes.Structure):
    """``magi::index::BackwardParams`` of csrc/index/params.cuh."""

    _fields_ = (
        ("q", TensorMap),
        ("dout", TensorMap),
        ("lists", Lists),
        ("places", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("delta", ctypes.c_void_p),
        ("dq", ctypes.c_void_p),
        ("dk", ctypes.c_void_p),
        ("dv", ctypes.c_void_p),
        ("to_log2", ctypes.c_float),
        ("cap_slope", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("dq_scale", ctypes.c_float),
        ("padding", ctypes.c_int * 24),
    )


class TermsParams(ctypes.Structure):
    """``magi::index::TermsParams``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "dout", "lse", "dlse", "lse_terms", "delta")),
        ("num_rows", ctypes.c_int64),
    )


class SumParams(ctypes.Structure):
    """``magi::index::SumParams``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("dk", "dv", "first", "dk_sums", "dv_sums")),
        ("num_rows", ctypes.c_int),
        ("packs", ctypes.c_int),
    )


class FinishParams(ctypes.Structure):
    """``magi::index::FinishParams``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("dk_sums", "dv_sums", "dk", "dv")),
        ("dk_scale", ctypes.c_float),
        ("num_rows", ctypes.c_int),
    )


class _Kernels(NamedTuple):
    prepare: Kernel
    backward: Kernel
    sum: Kernel
    finish: Kernel


class Order(NamedTuple):
    """Where entries of lists have gradients of their own: those of one row of keys lie side by side, by queries.

    Attributes:
        places: ``[tq, hk, n]`` int32, the place of each entry.
        first: ``[tk * hk + 1]`` int64, the first place of each row of keys.
    """

    places: Tensor
    first: Tensor


def order_of(indices: Tensor, num_k: int) -> Order:
    """Order the entries of lists ``[tq, hk, n]`` of ``num_k`` keys; those after a list's end come last."""
    num_kv_heads = indices.shape[1]
    heads = torch.arange(num_kv_heads, dtype=torch.int32, device=indices.device)[:, None]
    ended = (indices < 0).cumsum(-1, dtype=torch.int32) > 0
    rows = (indices * num_kv_heads + heads).masked_fill_(ended, num_k * num_kv_heads)
    in_order, entries = rows.flatten().sort(stable=True)
    places = torch.empty_like(rows).flatten()
    places[entries] = torch.arange(len(entries), dtype=torch.int32, device=indices.device)
    borders = torch.arange(num_k * num_kv_heads + 1, dtype=torch.int32, device=indices.device)
    return Order(places.view(indices.shape), torch.searchsorted(in_order, borders))


def launch_index_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    call: IndexCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate attention to indices, on torch's current stream; arguments as of :meth:`KernelBackend.backward`.

    q ``[tq, hq, d]``, k ``[tk, hk, d]``, v ``[tk, hk, dv]`` and the lists are not empty; gradients are contiguous, of
    their dtype.
    """
    device = q.device
    variant = IndexBackwardVariant(q.shape[2], v.shape[2], ELEMENT_OF[q.dtype], call.softcap > 0)
    kernels, stream = _kernels(variant, device), torch.cuda.current_stream(device).cuda_stream
    q, k, v = aligned(scored_upward(q, call.softmax_scale)), aligned(k), aligned(v)
    dout, out = (aligned(x.to(q.dtype).contiguous()) for x in (dout, out))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    scale, num_rows = abs(call.softmax_scale) or 1.0, k.shape[0] * k.shape[1]
    template = Params(
        to_log2=LOG2_E * scale,
        cap_slope=2 * LOG2_E * scale / call.softcap if call.softcap > 0 else 0.0,
        cap=LOG2_E * call.softcap,
        dq_scale=call.softmax_scale,
    )

    terms = torch.empty(2, *q.shape[:2], dtype=torch.float32, device=device)
    lse, dlse = lse.float().contiguous(), None if dlse is None else dlse.float().contiguous()
    of_rows = (None if x is None else x.data_ptr() for x in (out, dout, lse, dlse, *terms))
    kernels.prepare.launch(
        -(-lse.numel() // variant.sizes.rows_of_block(v.shape[2])), stream, TermsParams(*of_rows, lse.numel())
    )
    sums = [torch.zeros(x.shape, dtype=torch.float32, device=device) for x in (k, v)]
    tiles = lists_of_tiles(variant, call, q, k)
    for part, of_part in parts_of(call, tiles, q, v):
        lists = of_part.params(q[part], k, v)
        order, targets = None, sums
        if call.deterministic:
            order = order_of(of_part.indices, len(k))
            rows = order.places.numel() * lists.packs_per_kv_head
            targets = [torch.empty(rows, x.shape[2], dtype=torch.float32, device=device) for x in (k, v)]
        params = Params.from_buffer_copy(template)
        params.lists = lists
        params.places = None if order is None else order.places.data_ptr()
        params.lse, params.delta = (x[part].data_ptr() for x in terms)
        params.dq, params.dk, params.dv = dq[part].data_ptr(), *(x.data_ptr() for x in targets)
        for number, x in enumerate((q[part], dout[part])):
            set_map(params, number, x, lists)
        blocks = min(blocks_of(variant, device, call.sm_margin), lists.num_items)
        kernels.backward.launch(blocks, stream, params)
        if order is not None:
            pointers = (x.data_ptr() for x in (*targets, order.first, *sums))
            kernels.sum.launch(num_rows, stream, SumParams(*pointers, num_rows, lists.packs_per_kv_head))
    columns = num_rows * (k.shape[2] + v.shape[2])
    pointers = (x.data_ptr() for x in (*sums, dk, dv))
    kernels.finish.launch(
        -(-columns // (16 * variant.sizes.row_threads)), stream, FinishParams(*pointers, scale, num_rows)
    )
    return dq, dk, dv


def parts_of(call: IndexCall, tiles: TileLists, q: Tensor, v: Tensor) -> Iterator[tuple[slice, TileLists]]:
    """All tokens at once or, where entries have gradients of their own, so many that these are of bounded size."""
    num_tiles = step = len(tiles.indices)
    if call.deterministic:
        packs = packs_of(q.shape[1], tiles.indices.shape[1])[1]
        step = max(BYTES_AT_A_TIME // (4 * tiles.indices[0].numel() * packs * (q.shape[2] + v.shape[2])), 1)
    for first in range(0, num_tiles, step):
        stop = min(first + step, num_tiles)
        yield slice(first * tiles.tokens, min(stop * tiles.tokens, len(q))), tiles.part(first, stop)


@cache
def _kernels(variant: IndexBackwardVariant, device: torch.device) -> _Kernels:
    cubin, index, sizes = CUBINS / f"{variant.name}.cubin", index_of(device), variant.sizes
    rows = (variant.prepare_entry, variant.sum_entry, variant.finish_entry)
    prepare, add, finish = (Kernel(cubin, entry, index, sizes.row_threads, 0) for entry in rows)
    backward = Kernel(cubin, variant.entry, index, sizes.threads, variant.shared_bytes)
    return _Kernels(prepare, backward, add, finish)
