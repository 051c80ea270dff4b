# SPDX-License-Identifier: Apache-2.0
"""One launch of the forward kernel.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys.
"""

import ctypes
import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.kernels.protocol import AttentionCall
from magi_kernels_hopper.driver import CUBINS, Kernel, TensorMap, TensorMaps
from magi_kernels_hopper.support import ELEMENT_OF
from magi_kernels_hopper.tables import DeviceRowTables, device_row_tables
from magi_kernels_hopper.variants import ForwardVariant

LARGEST_PACK = 8
"""How many query heads of a key head share a tile of queries at most."""

LOG2_E = math.log2(math.e)

SECTION_BYTES = 16 << 20
"""Keys and values that are computed with at a time, so that the L2 cache keeps them: a third of its 50 MB."""


class Params(ctypes.Structure):
    """``magi::forward::Params`` of csrc/forward/params.cuh."""

    _fields_ = (
        ("q", TensorMap),
        ("k", TensorMap),
        ("v", TensorMap),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("max_logits", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("tiles", ctypes.c_void_p),
        ("runs", ctypes.c_void_p),
        ("pieces", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("num_q", ctypes.c_int),
        ("num_heads", ctypes.c_int),
        ("log2_pack", ctypes.c_int),
        ("packs_per_kv_head", ctypes.c_int),
        ("num_tiles", ctypes.c_int),
        ("num_packs", ctypes.c_int),
        ("packs_per_section", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("to_log2", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("cap_slope", ctypes.c_float),
        ("out_is_float", ctypes.c_int),
        ("merges", ctypes.c_int),
        ("padding", ctypes.c_int * 3),
    )


class Geometry(NamedTuple):
    """How the work of one call is cut.

    Attributes:
        pack: neighboring query heads that share a tile of queries.
        tile_q: tokens of a tile.
        packs_per_kv_head: packs that read the same keys.
        num_packs: of all heads.
        packs_per_section: packs computed at a time.
    """

    pack: int
    tile_q: int
    packs_per_kv_head: int
    num_packs: int
    packs_per_section: int


def geometry(variant: ForwardVariant, num_heads_q: int, num_heads_kv: int, num_k: int) -> Geometry:
    """Decide how to cut the work of ``num_heads_q`` query heads over ``num_k`` keys."""
    group = num_heads_q // num_heads_kv
    pack = 1
    while pack < LARGEST_PACK and group % (2 * pack) == 0:
        pack *= 2
    packs_per_kv_head = group // pack
    bytes_per_head = 2 * max(num_k, 1) * (variant.head_dim + variant.head_dim_v)
    heads_per_section = max(min(SECTION_BYTES // bytes_per_head, num_heads_kv), 1)
    return Geometry(
        pack,
        variant.sizes.tile_m // pack,
        packs_per_kv_head,
        num_heads_q // pack,
        heads_per_section * packs_per_kv_head,
    )


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, out: Tensor, lse: Tensor, *, merge: bool
) -> Tensor | None:
    """Attend, on torch's current stream.

    Args:
        q: ``[tq, hq, d]``, not empty.
        k: ``[tk, hk, d]``, not empty.
        v: ``[tk, hk, dv]``.
        call: the mask and how to score.
        out: ``[tq, hq, dv]`` contiguous, written: of q's dtype or float32.
        lse: ``[tq, hq]`` float32, contiguous, written.
        merge: whether ``out``, which must be float32, and ``lse`` hold the attention to other keys, with which the
            result is merged, as :func:`magi_attention.kernels.merge.merge_partials` does.

    Returns:
        max_logits ``[hq]`` if the call asks for it.
    """
    q, k, v = (_aligned(x) for x in (q, k, v))
    scale = call.softmax_scale
    if scale <= 0:  # the kernel takes the largest product for the largest score
        q, scale = q * (-1 if scale < 0 else 0), abs(scale) or 1.0
    variant = ForwardVariant(q.shape[2], v.shape[2], ELEMENT_OF[q.dtype], call.softcap > 0)
    cut = geometry(variant, q.shape[1], k.shape[1], k.shape[0])
    box_k = variant.sizes.box_n
    tables = device_row_tables(call.slices, q.shape[0], k.shape[0], cut.tile_q, box_k, q.device)
    max_logits = lse.new_full(lse.shape[1:], -torch.inf) if call.max_logits else None
    stream = torch.cuda.current_stream(q.device).cuda_stream
    params = _params(variant, cut, tables, q, k, v)
    counters = _counters(q.device, stream)
    params.out, params.lse, params.counters = out.data_ptr(), lse.data_ptr(), counters.data_ptr()
    params.max_logits = None if max_logits is None else max_logits.data_ptr()
    params.scale, params.softcap = scale, call.softcap
    params.to_log2 = LOG2_E if call.softcap > 0 else LOG2_E * scale
    params.cap_slope = 2 * LOG2_E * scale / call.softcap if call.softcap > 0 else 0.0
    params.out_is_float, params.merges = out.dtype == torch.float32, merge
    multiprocessors = _multiprocessors(q.device) - call.sm_margin
    blocks = max(min(multiprocessors, params.num_tiles * params.num_packs), 1)
    _kernel(variant, q.device).launch(blocks, stream, params)
    return max_logits


def _params(variant: ForwardVariant, cut: Geometry, tables: DeviceRowTables, q: Tensor, k: Tensor, v: Tensor) -> Params:
    """What follows from tensors and mask."""
    maps = _tensor_maps(q.device)
    box_k = variant.sizes.box_n
    params = Params()
    for name, x, rows in (("q", q, (cut.pack, cut.tile_q)), ("k", k, (1, box_k)), ("v", v, (1, box_k))):
        swizzle_bytes = 128 if x.shape[2] % 64 == 0 else 64
        encoded = maps.get(x, (swizzle_bytes // 2, *rows), swizzle_bytes)
        ctypes.memmove(ctypes.addressof(getattr(params, name)), encoded, len(encoded))
    params.tiles, params.runs = tables.tiles.data_ptr(), tables.runs.data_ptr()
    params.pieces, params.order = tables.pieces.data_ptr(), tables.order.data_ptr()
    params.num_q, params.num_heads = q.shape[0], q.shape[1]
    params.log2_pack = cut.pack.bit_length() - 1
    params.packs_per_kv_head, params.num_tiles = cut.packs_per_kv_head, len(tables.tiles)
    params.num_packs, params.packs_per_section = cut.num_packs, cut.packs_per_section
    return params


def _aligned(x: Tensor) -> Tensor:
    """A tensor that the copy engine can read: x itself, or a contiguous copy."""
    strides = (each * x.element_size() for each in x.stride()[:2])
    if x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(each % 16 == 0 and each > 0 for each in strides):
        return x
    return (
        x.contiguous()
        if x.data_ptr() % 16 == 0 and not x.is_contiguous()
        else x.clone(memory_format=torch.contiguous_format)
    )


def _counters(device: torch.device, stream: int) -> Tensor:
    """Two zeros, which the kernel leaves as it finds them. Launches on one stream share them, one after another.

    A graph may be replayed on any stream, so that a launch that is captured has its own.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    return _stream_counters(device, stream)


@cache
def _stream_counters(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=device)


@cache
def _kernel(variant: ForwardVariant, device: torch.device) -> Kernel:
    index = device.index if device.index is not None else torch.cuda.current_device()
    cubin = CUBINS / f"{variant.name}.cubin"
    return Kernel(cubin, variant.entry, index, variant.sizes.threads, variant.shared_bytes)


@cache
def _tensor_maps(device: torch.device) -> TensorMaps:
    return TensorMaps()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
