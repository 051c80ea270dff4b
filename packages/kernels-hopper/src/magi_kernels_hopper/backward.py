# SPDX-License-Identifier: Apache-2.0
"""One launch of the backward kernels: terms of rows, gradients, and the conversion of those of queries.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys.
"""

import ctypes
import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.kernels.protocol import AttentionCall
from magi_attention.kernels.table_streams import StreamsOfTables
from magi_kernels_hopper.backward_params import Params, RowParams
from magi_kernels_hopper.driver import CUBINS, Kernel, TensorMap
from magi_kernels_hopper.launching import (
    aligned,
    counters,
    index_of,
    multiprocessors,
    tensor_maps,
)
from magi_kernels_hopper.support import ELEMENT_OF
from magi_kernels_hopper.tables import device_column_tables
from magi_kernels_hopper.variants import BackwardVariant

LARGEST_PACK = 2
"""How many query heads of a key head share a tile of queries at most; a power of two.

The more heads, the fewer tiles are partly hidden by the mask, but the longer it takes until the next tile of keys meets
the same queries.
"""

ITEMS_PER_MULTIPROCESSOR = 2
"""Tiles of keys that are worked on before those of other heads: few, so that their queries stay in the L2 cache."""

GAP = 16
"""Terms of a tile are this many more than its rows, ``Traits::kTerms`` in csrc/backward/traits.cuh."""

LOG2_E = math.log2(math.e)

MAP_BYTES = ctypes.sizeof(TensorMap)


class Geometry(NamedTuple):
    """How the work of one call is cut.

    Attributes:
        pack: neighboring query heads that share a tile of queries.
        tile_q: tokens of a tile of queries.
        tiles_q: how many there are, of one pack.
        num_tiles: of queries, of all packs.
    """

    pack: int
    tile_q: int
    tiles_q: int
    num_tiles: int


def geometry(variant: BackwardVariant, num_q: int, num_heads_q: int, num_heads_kv: int) -> Geometry:
    """Decide how to cut the work of ``num_q`` queries."""
    group = num_heads_q // num_heads_kv
    pack = min(group & -group, LARGEST_PACK)
    tile_q = variant.sizes.tile_m // pack
    tiles_q = -(-num_q // tile_q)
    return Geometry(pack, tile_q, tiles_q, tiles_q * (num_heads_q // pack))


class _Kernels(NamedTuple):
    prepare: Kernel
    backward: Kernel
    convert: Kernel


class PreparedBackward:
    """All of a launch that does not change from call to call: made once for each mask and geometry, kept with the mask.

    Args:
        variant: the kernels.
        call: the mask, and how to score.
        q: ``[tq, hq, d]``.
        k: ``[tk, hk, d]``.
    """

    def __init__(self, variant: BackwardVariant, call: AttentionCall, q: Tensor, k: Tensor) -> None:
        (num_q, num_heads, head_dim), (num_k, num_kv_heads, _) = q.shape, k.shape
        sizes = variant.sizes
        cut = geometry(variant, num_q, num_heads, num_kv_heads)
        self.sizes, self.num_tiles, self.ordered = sizes, cut.num_tiles, call.deterministic
        self.tables = device_column_tables(
            call.slices, num_q, num_k, cut.tile_q, sizes.tile_n, q.device, ordered=self.ordered
        )
        self.streams = StreamsOfTables(self.tables)
        self.kernels = _kernels(variant, q.device)
        self.swizzle_bytes = 128 if head_dim % 64 == 0 else 64
        panel = self.swizzle_bytes // 2
        self.boxes = [(panel, *each) for each in 2 * [(cut.pack, cut.tile_q)] + 2 * [(1, sizes.tile_n)]]
        num_tiles_k = len(self.tables.tiles)
        num_multiprocessors = multiprocessors(q.device)
        self.blocks = max(min(num_multiprocessors - call.sm_margin, num_tiles_k * num_kv_heads), 1)
        items = ITEMS_PER_MULTIPROCESSOR * num_multiprocessors
        scale = abs(call.softmax_scale) or 1.0
        capped = call.softcap > 0
        self.template = Params(
            tiles=self.tables.tiles.data_ptr(),
            runs=self.tables.runs.data_ptr(),
            pieces=self.tables.pieces.data_ptr(),
            order=self.tables.order.data_ptr(),
            ranks=None if self.tables.ranks is None else self.tables.ranks.data_ptr(),
            num_k=num_k,
            num_kv_heads=num_kv_heads,
            log2_pack=cut.pack.bit_length() - 1,
            packs_per_kv_head=num_heads // num_kv_heads // cut.pack,
            num_tiles_q=cut.tiles_q,
            num_tiles_k=num_tiles_k,
            heads_per_section=min(-(-items // num_tiles_k), num_kv_heads),
            scale=scale,
            to_log2=LOG2_E * scale,
            cap_slope=2 * LOG2_E * scale / call.softcap if capped else 0.0,
            cap=LOG2_E * call.softcap,
        )
        self.row_template = RowParams(
            num_q=num_q,
            num_heads=num_heads,
            log2_pack=cut.pack.bit_length() - 1,
            num_tiles_q=cut.tiles_q,
            scale=call.softmax_scale,
        )

    def workspace(self, head_dim: int, device: torch.device) -> list[Tensor]:
        """What the kernels hand on: sums of gradients, terms of rows, and semaphores if there is an order."""
        rows = self.num_tiles * self.sizes.tile_m
        work = [
            torch.empty(rows * head_dim, dtype=torch.float32, device=device),
            torch.empty(2 * (rows + GAP * self.num_tiles), dtype=torch.float32, device=device),
        ]
        if self.ordered:
            work.append(torch.empty(self.num_tiles * self.sizes.dq_parts, dtype=torch.int32, device=device))
        return work


def launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate, on torch's current stream; see :meth:`KernelBackend.backward`.

    q ``[tq, hq, d]`` and k ``[tk, hk, d]`` are not empty; gradients are contiguous, of their dtype.
    """
    device, head_dim = q.device, q.shape[2]
    key = ("hopper backward", device, q.dtype, q.shape, k.shape, call.softmax_scale, call.softcap, call.deterministic)
    prepared = call.slices.derived(
        (*key, call.sm_margin),
        lambda: PreparedBackward(BackwardVariant(head_dim, ELEMENT_OF[q.dtype], call.softcap > 0), call, q, k),
    )
    if call.softmax_scale <= 0:  # masked scores are -inf, before they are scaled
        q = -q if call.softmax_scale < 0 else torch.zeros_like(q)
    dout, out = (aligned(x.to(q.dtype).contiguous()) for x in (dout, out))
    lse, dlse = lse.float().contiguous(), None if dlse is None else dlse.float().contiguous()
    tensors = (aligned(q), dout, aligned(k), aligned(v))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    work = prepared.workspace(head_dim, device)
    torch_stream = torch.cuda.current_stream(device)
    prepared.streams.add(torch_stream)
    stream = torch_stream.cuda_stream

    rows = RowParams.from_buffer_copy(prepared.row_template)
    rows.out, rows.dout, rows.lse, rows.dq = out.data_ptr(), dout.data_ptr(), lse.data_ptr(), dq.data_ptr()
    if dlse is not None:
        rows.dlse = dlse.data_ptr()
    params = Params.from_buffer_copy(prepared.template)
    maps = tensor_maps(device)
    address = ctypes.addressof(params)  # the maps come first
    for x, box in zip(tensors, prepared.boxes, strict=True):
        ctypes.memmove(address, maps.get(x, box, prepared.swizzle_bytes), MAP_BYTES)
        address += MAP_BYTES
    zeros = counters(device, stream)
    params.dk, params.dv, params.counters = dk.data_ptr(), dv.data_ptr(), zeros.data_ptr()
    for each in (rows, params):
        each.dq_sums, each.row_terms = work[0].data_ptr(), work[1].data_ptr()
        if prepared.ordered:
            each.semaphores = work[2].data_ptr()

    prepared.kernels.prepare.launch(prepared.num_tiles, stream, rows)
    prepared.kernels.backward.launch(prepared.blocks, stream, params)
    prepared.kernels.convert.launch(prepared.num_tiles * prepared.sizes.dq_parts, stream, rows)
    return dq, dk, dv


@cache
def _kernels(variant: BackwardVariant, device: torch.device) -> _Kernels:
    cubin, index, sizes = CUBINS / f"{variant.name}.cubin", index_of(device), variant.sizes
    return _Kernels(
        Kernel(cubin, variant.prepare_entry, index, sizes.row_threads, 0),
        Kernel(cubin, variant.entry, index, sizes.threads, sizes.shared_bytes),
        Kernel(cubin, variant.convert_entry, index, sizes.row_threads, 0),
    )
