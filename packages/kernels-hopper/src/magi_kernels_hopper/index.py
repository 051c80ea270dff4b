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


class Lists(ctypes.Structure):
    """``magi::index::Lists`` of csrc/index/params.cuh."""

    _fields_ = (
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("k_token_bytes", ctypes.c_int64),
        ("k_head_bytes", ctypes.c_int64),
        ("v_token_bytes", ctypes.c_int64),
        ("v_head_bytes", ctypes.c_int64),
        ("num_q", ctypes.c_int),
        ("num_k", ctypes.c_int),
        ("num_kv_heads", ctypes.c_int),
        ("longest", ctypes.c_int),
        ("pack", ctypes.c_int),
        ("packs_per_kv_head", ctypes.c_int),
    )

    @classmethod
    def of(cls, k: Tensor, v: Tensor, indices: Tensor, num_heads_q: int) -> "Lists":
        """Lists ``indices`` ``[tq, hk, n]``, :func:`padded`, of rows of k and v, which are :func:`aligned`."""
        pack, packs_per_kv_head = packs_of(num_heads_q, k.shape[1])
        strides = (stride * x.element_size() for x in (k, v) for stride in x.stride()[:2])
        pointers = (x.data_ptr() for x in (k, v, indices))
        sizes = (len(indices), len(k), k.shape[1], indices.shape[2])
        return cls(*pointers, *strides, *sizes, pack, packs_per_kv_head)

    @property
    def num_items(self) -> int:
        """Tiles of queries."""
        return int(self.num_q * self.num_kv_heads * self.packs_per_kv_head)


class Params(ctypes.Structure):
    """``magi::index::Params`` of csrc/index/params.cuh."""

    _fields_ = (
        ("q", TensorMap),
        ("lists", Lists),
        ("results", Results),
        ("scoring", Scoring),
        ("padding", ctypes.c_int * 26),
    )


def packs_of(num_heads_q: int, num_heads_kv: int) -> tuple[int, int]:
    """How many neighboring query heads share gathered keys, and how many such packs a key head has."""
    group = num_heads_q // num_heads_kv
    pack = max(each for each in range(1, IndexSizes.rows + 1) if group % each == 0)
    return pack, group // pack


def padded(indices: Tensor) -> Tensor:
    """The lists ``[tq, hk, n]``, with as many entries as tiles of keys have."""
    excess = -indices.shape[2] % IndexSizes.keys
    return torch.nn.functional.pad(indices, (0, excess), value=-1) if excess else indices


def set_map(params: ctypes.Structure, number: int, x: Tensor, pack: int) -> None:
    """Set one of the maps that a structure begins with: of ``x`` ``[tq, hq, d]``, in boxes of ``pack`` rows."""
    swizzle_bytes = 128 if x.shape[2] % 64 == 0 else 64
    encoded = tensor_maps(x.device).get(x, (swizzle_bytes // 2, pack, 1), swizzle_bytes)
    ctypes.memmove(ctypes.addressof(params) + number * len(encoded), encoded, len(encoded))


def blocks_for(variant: IndexVariant, lists: Lists, device: torch.device, sm_margin: int) -> int:
    """How many blocks share the work."""
    available = max(multiprocessors(device) - sm_margin, 1) * variant.sizes.blocks
    return min(available, lists.num_items)


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
    indices = padded(call.indices)
    params = Params(
        lists=Lists.of(k, v, indices, q.shape[1]),
        results=Results.of(out, lse, max_logits),
        scoring=Scoring.of(call.softmax_scale, call.softcap),
    )
    set_map(params, 0, q, params.lists.pack)
    blocks = blocks_for(variant, params.lists, device, call.sm_margin)
    _kernel(variant, device).launch(blocks, torch.cuda.current_stream(device).cuda_stream, params)


@cache
def _kernel(variant: IndexVariant, device: torch.device) -> Kernel:
    cubin = CUBINS / f"{variant.name}.cubin"
    return Kernel(cubin, variant.entry, index_of(device), variant.sizes.threads, variant.shared_bytes)
