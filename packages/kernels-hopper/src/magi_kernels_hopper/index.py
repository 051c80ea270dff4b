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
from magi_kernels_hopper.index_lists import Lists, blocks_of, lists_of_tiles
from magi_kernels_hopper.launching import aligned, index_of, tensor_maps
from magi_kernels_hopper.results import Results, Scoring, scored_upward
from magi_kernels_hopper.support import ELEMENT_OF
from magi_kernels_hopper.variants import IndexVariant


class Params(ctypes.Structure):
    """``magi::index::Params`` of csrc/index/params.cuh."""

    _fields_ = (
        ("q", TensorMap),
        ("lists", Lists),
        ("results", Results),
        ("scoring", Scoring),
        ("padding", ctypes.c_int * 22),
    )


def set_map(params: ctypes.Structure, number: int, x: Tensor, lists: Lists) -> None:
    """Set one of the maps that a structure begins with: of ``x`` ``[tq, hq, d]``, in boxes of tiles."""
    swizzle_bytes = 128 if x.shape[2] % 64 == 0 else 64
    encoded = tensor_maps(x.device).get(x, (swizzle_bytes // 2, lists.pack, lists.tokens), swizzle_bytes)
    ctypes.memmove(ctypes.addressof(params) + number * len(encoded), encoded, len(encoded))


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
    device = q.device
    q, k, v = aligned(scored_upward(q, call.softmax_scale)), aligned(k), aligned(v)
    tiles = lists_of_tiles(variant, call, q, k)
    params = Params(
        lists=tiles.params(q, k, v),
        results=Results.of(out, lse, max_logits),
        scoring=Scoring.of(call.softmax_scale, call.softcap),
    )
    set_map(params, 0, q, params.lists)
    blocks = min(blocks_of(variant, device, call.sm_margin), params.lists.num_items)
    _kernel(variant, device).launch(blocks, torch.cuda.current_stream(device).cuda_stream, params)


@cache
def _kernel(variant: IndexVariant, device: torch.device) -> Kernel:
    cubin = CUBINS / f"{variant.name}.cubin"
    return Kernel(cubin, variant.entry, index_of(device), variant.sizes.threads, variant.shared_bytes)
