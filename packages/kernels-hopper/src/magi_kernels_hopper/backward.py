# SPDX-License-Identifier: Apache-2.0
"""One launch of the backward kernels: terms of rows, and gradients.

Shape suffixes: t tokens, h heads, d head dim, dv head dim of values; q queries, k keys.
"""

import ctypes
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.kernels.protocol import AttentionCall
from magi_attention.kernels.table_streams import StreamsOfTables
from magi_kernels_hopper.backward_order import WorkSizes
from magi_kernels_hopper.backward_params import Params, RowParams
from magi_kernels_hopper.driver import CUBINS, Kernel, TensorMap
from magi_kernels_hopper.launching import (
    aligned,
    counters,
    index_of,
    multiprocessors,
    tensor_maps,
)
from magi_kernels_hopper.results import LOG2_E, scored_upward
from magi_kernels_hopper.support import ELEMENT_OF
from magi_kernels_hopper.tables import device_column_tables
from magi_kernels_hopper.variants import BackwardVariant

GAP = 16
"""Terms of a tile are this many more than its rows, ``Traits::kTerms`` in csrc/backward/traits.cuh."""

MAP_BYTES = ctypes.sizeof(TensorMap)


class _Kernels(NamedTuple):
    prepare: Kernel
    backward: Kernel


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
        group, available = num_heads // num_kv_heads, max(multiprocessors(q.device) - call.sm_margin, 1)
        self.tables = tables = device_column_tables(
            call.slices,
            num_q,
            num_k,
            WorkSizes(sizes.tile_m, sizes.tile_n, num_kv_heads, group, available),
            q.device,
            ordered=call.deterministic,
        )
        pack, tile_q = tables.pack, sizes.tile_m // tables.pack
        tiles_q = -(-num_q // tile_q)
        self.sizes, self.num_tiles = sizes, tiles_q * (num_heads // pack)
        # Halves of tiles of keys, of a head, to whose gradients several items add.
        self.num_shared = 2 * len(tables.tiles) * num_kv_heads if tables.split else 0
        self.blocks = min(available, len(tables.items))
        self.streams = StreamsOfTables(tables)
        self.kernels = _kernels(variant, q.device)
        self.swizzle_bytes = 128 if head_dim % 64 == 0 else 64
        panel = self.swizzle_bytes // 2
        self.boxes = [(panel, *each) for each in 2 * [(pack, tile_q)] + 2 * [(1, sizes.tile_n)]]
        scale = abs(call.softmax_scale) or 1.0
        capped = call.softcap > 0
        self.template = Params(
            tiles=tables.tiles.data_ptr(),
            runs=tables.runs.data_ptr(),
            pieces=tables.pieces.data_ptr(),
            items=tables.items.data_ptr(),
            ranks=None if tables.ranks is None else tables.ranks.data_ptr(),
            keys=tables.keys.data_ptr(),
            num_kv_heads=num_kv_heads,
            log2_pack=pack.bit_length() - 1,
            packs_per_kv_head=group // pack,
            num_tiles_q=tiles_q,
            num_items=len(tables.items),
            scale=scale,
            to_log2=LOG2_E * scale,
            cap_slope=2 * LOG2_E * scale / call.softcap if capped else 0.0,
            cap=LOG2_E * call.softcap,
            adders=tables.adders.data_ptr(),
            num_q=num_q,
            num_packs=num_heads // pack,
            dq_scale=call.softmax_scale,
            num_complete=tables.num_met * (num_heads // pack) * sizes.dq_parts,
        )
        self.row_template = RowParams(
            num_q=num_q,
            num_heads=num_heads,
            log2_pack=pack.bit_length() - 1,
            num_tiles_q=tiles_q,
            num_items_done=self.num_shared,
            adders=tables.adders.data_ptr(),
        )

    def workspace(self, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the kernels hand on: sums of gradients, terms of rows, sums of items, and how far they have come."""
        rows, parts = self.num_tiles * self.sizes.tile_m, self.num_tiles * self.sizes.dq_parts
        return (
            torch.empty(rows * head_dim, dtype=torch.float32, device=device),
            torch.empty(2 * (rows + GAP * self.num_tiles), dtype=torch.float32, device=device),
            torch.empty(self.num_shared * 2 * self.sizes.tile_n // 2 * head_dim, dtype=torch.float32, device=device),
            torch.empty(2 * parts + self.num_shared, dtype=torch.int32, device=device),
        )


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

    q ``[tq, hq, d]``, k ``[tk, hk, d]`` and v ``[tk, hk, dv]`` are not empty; gradients are contiguous, of their dtype.
    """
    device, head_dim, head_dim_v = q.device, q.shape[2], v.shape[2]
    variant = BackwardVariant(head_dim, head_dim_v, ELEMENT_OF[q.dtype], call.softcap > 0)
    key = ("hopper backward", variant, device, q.shape, k.shape, call.softmax_scale, call.softcap, call.deterministic)
    prepared = call.slices.derived(
        (*key, call.sm_margin),
        lambda: PreparedBackward(variant, call, q, k),
    )
    q = scored_upward(q, call.softmax_scale)  # masked scores are -inf, before they are scaled
    dout, out = (aligned(x.to(q.dtype).contiguous()) for x in (dout, out))
    lse, dlse = lse.float().contiguous(), None if dlse is None else dlse.float().contiguous()
    tensors = (aligned(q), dout, aligned(k), aligned(v))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    sums, terms, partial, progress = prepared.workspace(head_dim, device)
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
    params.dq, params.dk, params.dv = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    params.dq_sums, params.partial, params.counters = sums.data_ptr(), partial.data_ptr(), zeros.data_ptr()
    parts = 4 * prepared.num_tiles * prepared.sizes.dq_parts  # bytes
    for each in (rows, params):
        each.row_terms, each.added = terms.data_ptr(), progress.data_ptr()
        each.complete, each.items_done = each.added + parts, each.added + 2 * parts

    prepared.kernels.prepare.launch(prepared.num_tiles, stream, rows)
    prepared.kernels.backward.launch(prepared.blocks, stream, params)
    return dq, dk, dv


@cache
def _kernels(variant: BackwardVariant, device: torch.device) -> _Kernels:
    cubin, index, sizes = CUBINS / f"{variant.name}.cubin", index_of(device), variant.sizes
    return _Kernels(
        Kernel(cubin, variant.prepare_entry, index, sizes.row_threads, 0),
        Kernel(cubin, variant.entry, index, sizes.threads, sizes.shared_bytes),
    )
