# SPDX-License-Identifier: Apache-2.0
"""One launch of the kernel of index attention.

Shape suffixes: t tokens, h heads, d head dim, n entries of a list; q queries, k keys.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from magi_attention.kernels.protocol import IndexCall
from magi_kernels_hopper.driver import CUBINS, Kernel, TensorMap
from magi_kernels_hopper.launching import aligned, index_of, multiprocessors, tensor_maps
from magi_kernels_hopper.results import Results, Scoring, scored_upward
from magi_kernels_hopper.support import ELEMENT_OF
from magi_kernels_hopper.variants import IndexSizes, IndexVariant


class Params(ctypes.Structure):
    """``magi::index::Params`` of csrc/index/params.cuh."""

    _fields_ = (
        ("q", TensorMap),
        ("results", Results),
        ("scoring", Scoring),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("k_token_bytes", ctypes.c_int64),
        ("k_head_bytes", ctypes.c_int64),
        ("v_token_bytes", ctypes.c_int64),
        ("v_head_bytes", ctypes.c_int64),
        ("num_k", ctypes.c_int),
        ("num_kv_heads", ctypes.c_int),
        ("longest", ctypes.c_int),
        ("pack", ctypes.c_int),
        ("packs_per_kv_head", ctypes.c_int),
        ("padding", ctypes.c_int * 27),
    )


def packs_of(num_heads_q: int, num_heads_kv: int) -> tuple[int, int]:
    """How many neighboring query heads share gathered keys, and how many such packs a key head has."""
    group = num_heads_q // num_heads_kv
    pack = max(each for each in range(1, IndexSizes.rows + 1) if group % each == 0)
    return pack, group // pack


def launch_index(
    q: Tensor, k: Tensor, v: Tensor, call: IndexCall, out: Tensor, lse: Tensor, max_logits: Tensor | None
) -> None:
    """Attend to indices, on torch's current stream.

    Args:
        q: ``[tq, hq, d]``, not empty.
        k: ``[tk, hk, d]``, not empty.
        v: ``[tk, hk, dv]``.
        call: the lists, not empty, and how to score.
        out: ``[tq, hq, dv]`` contiguous, written: of q's dtype or float32.
        lse: ``[tq, hq]`` float32, written.
        max_logits: ``[hq]`` float32, -inf, written; None for none.
    """
    variant = IndexVariant(q.shape[2], v.shape[2], ELEMENT_OF[q.dtype], call.softcap > 0)
    device, sizes, size = q.device, variant.sizes, q.element_size()
    q, k, v = aligned(scored_upward(q, call.softmax_scale)), aligned(k), aligned(v)
    indices = call.indices
    if excess := -indices.shape[2] % sizes.keys:
        indices = torch.nn.functional.pad(indices, (0, excess), value=-1)
    pack, packs_per_kv_head = packs_of(q.shape[1], k.shape[1])
    params = Params(
        results=Results.of(out, lse, max_logits),
        scoring=Scoring.of(call.softmax_scale, call.softcap),
        k=k.data_ptr(),
        v=v.data_ptr(),
        indices=indices.data_ptr(),
        k_token_bytes=k.stride(0) * size,
        k_head_bytes=k.stride(1) * size,
        v_token_bytes=v.stride(0) * size,
        v_head_bytes=v.stride(1) * size,
        num_k=k.shape[0],
        num_kv_heads=k.shape[1],
        longest=indices.shape[2],
        pack=pack,
        packs_per_kv_head=packs_per_kv_head,
    )
    swizzle_bytes = 128 if q.shape[2] % 64 == 0 else 64
    q_map = tensor_maps(device).get(q, (swizzle_bytes // 2, pack, 1), swizzle_bytes)
    ctypes.memmove(ctypes.addressof(params), q_map, ctypes.sizeof(TensorMap))
    tiles = q.shape[0] * k.shape[1] * packs_per_kv_head
    blocks = min(max(multiprocessors(device) - call.sm_margin, 1) * sizes.blocks, tiles)
    _kernel(variant, device).launch(blocks, torch.cuda.current_stream(device).cuda_stream, params)


@cache
def _kernel(variant: IndexVariant, device: torch.device) -> Kernel:
    cubin = CUBINS / f"{variant.name}.cubin"
    return Kernel(cubin, variant.entry, index_of(device), variant.sizes.threads, variant.shared_bytes)
