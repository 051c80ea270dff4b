# SPDX-License-Identifier: Apache-2.0
"""Lists of keys as the kernels of index attention read them: of every token, or united where tokens share tiles.

Keys that several neighboring tokens name are then loaded, and their gradients added, once for all of them. A tile of
queries has 64 rows in any case, so that nothing is lost where few query heads share a key head.

Shape suffixes: t tokens, h heads, d head dim, n entries of a list; q queries, k keys.
"""

import ctypes
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.kernels.protocol import IndexCall
from magi_kernels_hopper.driver import CUBINS, Kernel
from magi_kernels_hopper.launching import index_of, multiprocessors
from magi_kernels_hopper.variants import IndexSizes, IndexVariant

MOST_TOKENS = 8
"""That share a tile: an entry has a bit for each."""

LEAST_TILES = 4
"""Tiles of queries for each block: tokens share tiles where so many are left."""

WINDOW, UNIT_OF_WINDOW, UNITE_THREADS = 1 << 15, 1 << 12, 256
"""Keys that are looked at together, at most and in multiples of, and threads of a block that unites."""


class Lists(ctypes.Structure):
    """``magi::index::Lists`` of csrc/index/params.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k", "v", "indices", "bits")),
        *((name, ctypes.c_int64) for name in ("k_token_bytes", "k_head_bytes", "v_token_bytes", "v_head_bytes")),
        *((name, ctypes.c_int) for name in ("num_q", "num_k", "num_kv_heads", "longest", "pack", "packs_per_kv_head")),
        ("tokens", ctypes.c_int),
        ("num_tiles", ctypes.c_int),
    )

    @property
    def num_items(self) -> int:
        """Tiles of queries, of all heads."""
        return int(self.num_tiles * self.num_kv_heads * self.packs_per_kv_head)


class UniteParams(ctypes.Structure):
    """``magi::index::UniteParams``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("indices", "united", "bits")),
        *((name, ctypes.c_int) for name in ("num_q", "num_k", "num_kv_heads", "longest", "united_longest", "tokens")),
        ("window", ctypes.c_int),
    )


class TileLists(NamedTuple):
    """The lists of tiles of tokens.

    Attributes:
        indices: ``[tiles, hk, n]`` int32, n a multiple of a tile of keys.
        bits: the same, uint8, which of the tokens name an entry; None if a tile has one token.
        tokens: of a tile; the last one may have fewer.
    """

    indices: Tensor
    bits: Tensor | None
    tokens: int

    def params(self, q: Tensor, k: Tensor, v: Tensor) -> Lists:
        """What the kernels are told, of tensors that the copy engine can read."""
        pack, packs_per_kv_head = packs_of(q.shape[1], k.shape[1])
        pointers = (None if x is None else x.data_ptr() for x in (k, v, self.indices, self.bits))
        strides = (stride * x.element_size() for x in (k, v) for stride in x.stride()[:2])
        sizes = (len(q), len(k), k.shape[1], self.indices.shape[2], pack, packs_per_kv_head)
        return Lists(*pointers, *strides, *sizes, self.tokens, len(self.indices))

    def part(self, first: int, stop: int) -> "TileLists":
        """Those of some tiles."""
        return self._replace(
            indices=self.indices[first:stop], bits=None if self.bits is None else self.bits[first:stop]
        )


def packs_of(num_heads_q: int, num_heads_kv: int) -> tuple[int, int]:
    """How many neighboring query heads share gathered keys, and how many such packs a key head has."""
    group = num_heads_q // num_heads_kv
    pack = max(each for each in range(1, IndexSizes.rows + 1) if group % each == 0)
    return pack, group // pack


def tokens_of_tile(num_q: int, num_heads_q: int, num_heads_kv: int, blocks: int) -> int:
    """How many neighboring tokens share a tile of queries."""
    pack, packs_per_kv_head = packs_of(num_heads_q, num_heads_kv)
    tokens = 1
    while (
        packs_per_kv_head == 1
        and 2 * tokens <= min(MOST_TOKENS, IndexSizes.rows // pack)
        and -(-num_q // (2 * tokens)) * num_heads_kv >= LEAST_TILES * blocks
    ):
        tokens *= 2
    return tokens


def lists_of_tiles(variant: IndexVariant, call: IndexCall, q: Tensor, k: Tensor) -> TileLists:
    """The lists of a call, united on torch's current stream if its tokens share tiles."""
    indices, device = call.indices, q.device
    tokens = tokens_of_tile(len(q), q.shape[1], k.shape[1], blocks_of(variant, device, call.sm_margin))
    unit = IndexSizes.keys
    if tokens == 1:
        if excess := -indices.shape[2] % unit:
            indices = torch.nn.functional.pad(indices, (0, excess), value=-1)
        return TileLists(indices, None, 1)
    longest = -(-min(tokens * indices.shape[2], len(k)) // unit) * unit
    united = indices.new_empty(-(-len(q) // tokens), k.shape[1], longest)
    bits = torch.empty_like(united, dtype=torch.uint8)
    window = min(-(-len(k) // UNIT_OF_WINDOW) * UNIT_OF_WINDOW, WINDOW)
    pointers = (x.data_ptr() for x in (indices, united, bits))
    params = UniteParams(*pointers, len(q), len(k), *indices.shape[1:], longest, tokens, window)
    stream = torch.cuda.current_stream(device).cuda_stream
    _unite_kernel(variant, device, window).launch(len(united) * k.shape[1], stream, params)
    return TileLists(united, bits, tokens)


def blocks_of(variant: IndexVariant, device: torch.device, sm_margin: int) -> int:
    """How many blocks run at the same time."""
    return max(multiprocessors(device) - sm_margin, 1) * variant.sizes.blocks


@cache
def _unite_kernel(variant: IndexVariant, device: torch.device, window: int) -> Kernel:
    cubin = CUBINS / f"{variant.name}.cubin"
    return Kernel(cubin, variant.unite_entry, index_of(device), UNITE_THREADS, window)
