# SPDX-License-Identifier: Apache-2.0
"""One launch of the forward kernel.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys.
"""

import ctypes
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.kernels.protocol import AttentionCall
from magi_attention.kernels.table_streams import StreamsOfTables
from magi_kernels_hopper.combine import Combination
from magi_kernels_hopper.driver import CUBINS, ByAddresses, Kernel, Ready, TensorMap
from magi_kernels_hopper.launching import (
    aligned,
    counters,
    index_of,
    multiprocessors,
    put_maps,
    tensor_maps,
)
from magi_kernels_hopper.results import LOG2_E, Results, Scoring, scored_upward
from magi_kernels_hopper.support import ELEMENT_OF
from magi_kernels_hopper.tables import device_row_tables
from magi_kernels_hopper.variants import ForwardVariant

LARGEST_PACK = 8
"""How many query heads of a key head share a tile of queries at most."""

TOLERANCE = 8.0
"""By how much a score, as an exponent of 2, may exceed what exponentials are relative to, before all that was summed up
is multiplied (as in FlashAttention-4). Sums are up to 256 times larger for it, and as precise."""

SECTION_BYTES = 16 << 20
"""Keys and values that are computed with at a time, so that the L2 cache keeps them: a third of its 50 MB."""

Inputs = tuple[Tensor, Tensor, Tensor]
"""q, k and v."""

Outputs = tuple[Tensor, Tensor, Tensor | None]
"""out, lse, and max_logits if they are asked for."""


class Params(ctypes.Structure):
    """``magi::forward::Params`` of csrc/forward/params.cuh."""

    _fields_ = (
        ("q", TensorMap),
        ("k", TensorMap),
        ("v", TensorMap),
        ("out", TensorMap),
        ("results", Results),
        ("scoring", Scoring),
        ("counters", ctypes.c_void_p),
        ("tiles", ctypes.c_void_p),
        ("runs", ctypes.c_void_p),
        ("pieces", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("pack", ctypes.c_int),
        ("share_q", ctypes.c_int),
        ("packs_per_kv_head", ctypes.c_int),
        ("num_tiles", ctypes.c_int),
        ("num_tiles_q", ctypes.c_int),
        ("num_packs", ctypes.c_int),
        ("packs_per_section", ctypes.c_int),
        ("tolerance", ctypes.c_float),
        ("padding", ctypes.c_int * 28),
    )


class Geometry(NamedTuple):
    """How the work of one call is cut.

    Attributes:
        pack: neighboring query heads that share a tile of queries.
        share_q: tokens of a consumer, whose share of a tile they are.
        packs_per_kv_head: packs that read the same keys.
        num_packs: of all heads.
        packs_per_section: packs computed at a time.
    """

    pack: int
    share_q: int
    packs_per_kv_head: int
    num_packs: int
    packs_per_section: int


def geometry(variant: ForwardVariant, num_heads_q: int, num_heads_kv: int, num_k: int) -> Geometry:
    """Decide how to cut the work of ``num_heads_q`` query heads over ``num_k`` keys."""
    group = num_heads_q // num_heads_kv
    pack = max(each for each in range(1, LARGEST_PACK + 1) if group % each == 0)
    packs_per_kv_head = group // pack
    bytes_per_head = 2 * max(num_k, 1) * (variant.head_dim + variant.head_dim_v)
    heads_per_section = max(min(SECTION_BYTES // bytes_per_head, num_heads_kv), 1)
    return Geometry(
        pack,
        variant.sizes.consumer_rows // pack,
        packs_per_kv_head,
        num_heads_q // pack,
        heads_per_section * packs_per_kv_head,
    )


class PreparedForward:
    """All of a launch that does not change from call to call: made once for each mask and geometry, kept with the mask.

    Calls may score by other scales and softcaps, if none or all of them have a softcap.

    Args:
        variant: the kernel; the tall one is taken instead where it is faster.
        call: the mask.
        q: ``[tq, hq, d]``.
        k: ``[tk, hk, d]``.
    """

    def __init__(self, variant: ForwardVariant, call: AttentionCall, q: Tensor, k: Tensor) -> None:
        self._known = ByAddresses[Ready]()
        cut = geometry(variant, q.shape[1], k.shape[1], k.shape[0])
        blocks = max(multiprocessors(q.device) - call.sm_margin, 1)
        sizes = (q.shape[0], k.shape[0], cut.share_q)
        self.tables = device_row_tables(call.slices, *sizes, variant, q.device, copies=cut.num_packs, blocks=blocks)
        self.streams = StreamsOfTables(self.tables)
        variant = replace(variant, tall=self.tables.tall)
        self._kernel = _kernel(variant, q.device)
        self._combination = Combination(variant, self.tables, q.device) if self.tables.num_parts > 1 else None
        dims = (variant.head_dim, variant.head_dim, variant.head_dim_v, variant.head_dim_v)
        swizzles = [128 if dim % 64 == 0 else 64 for dim in dims]
        box_n = variant.sizes.box_n
        rows = [(cut.pack, cut.share_q), (1, box_n), (1, box_n), (cut.pack, cut.share_q)]
        self._boxes = [((swizzle // 2, *each), swizzle) for swizzle, each in zip(swizzles, rows, strict=True)]
        self._blocks = min(blocks, len(self.tables.order) * cut.num_packs)
        self._template = Params(
            tiles=self.tables.tiles.data_ptr(),
            runs=self.tables.runs.data_ptr(),
            pieces=self.tables.pieces.data_ptr(),
            order=self.tables.order.data_ptr(),
            pack=cut.pack,
            share_q=cut.share_q,
            packs_per_kv_head=cut.packs_per_kv_head,
            num_tiles=len(self.tables.order),
            num_tiles_q=len(self.tables.parts),
            num_packs=cut.num_packs,
            packs_per_section=cut.packs_per_section,
        )

    def launch(self, call: AttentionCall, tensors: Inputs, results: Outputs, merge: bool, stream: int) -> None:
        """Launch on a stream, which is the current one."""
        if self._combination is None:
            self._launch(call, tensors, results, merge, stream)
            return
        out, lse, max_logits = results
        parts = self._combination.parts_of(out)
        self._launch(call, tensors, (*parts, max_logits), False, stream)
        self._combination.launch(parts, out, lse, stream, merge=merge)

    def _launch(self, call: AttentionCall, tensors: Inputs, results: Outputs, merge: bool, stream: int) -> None:
        out, lse, max_logits = results
        zeros = counters(out.device, stream)
        addresses = [x.data_ptr() for x in (*tensors, out, lse, zeros)]
        strides = [x.stride() for x in (*tensors, lse)]
        largest = None if max_logits is None else max_logits.data_ptr()
        key = (*addresses, *strides, out.dtype, largest, merge, call.softmax_scale, call.softcap)
        ready = self._known.find(key)
        if ready is None:
            q, k, v = tensors
            readable = aligned(scored_upward(q, call.softmax_scale)), aligned(k), aligned(v)
            ready = self._fill(call, readable, results, merge, zeros)
            if all(mine is theirs for mine, theirs in zip(readable, tensors, strict=True)):
                self._known.keep(key, ready)
        self._kernel.launch_ready(self._blocks, stream, ready)

    def _fill(self, call: AttentionCall, tensors: Inputs, results: Outputs, merge: bool, zeros: Tensor) -> Ready:
        """The parameters of a launch, for tensors that the copy engine can read."""
        params = Params.from_buffer_copy(self._template)
        params.results = Results.of(*results, merge=merge)
        params.scoring = Scoring.of(call.softmax_scale, call.softcap)
        if results[2] is None:  # else the largest scores themselves are wanted
            params.tolerance = TOLERANCE / (LOG2_E * (abs(call.softmax_scale) or 1.0))
        staged = results[0] if results[0].dtype == tensors[0].dtype else tensors[0]  # else the map is not used
        put_maps(params, tensor_maps(staged.device), (*tensors, staged), self._boxes)
        params.counters = zeros.data_ptr()
        return Ready.of(params)


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
        lse: ``[tq, hq]`` float32, written.
        merge: whether ``out`` and ``lse`` hold the attention to other keys, with which the result is merged, as
            :func:`magi_attention.kernels.merge.merge_into` does.

    Returns:
        max_logits ``[hq]`` if the call asks for it.
    """
    device = q.device
    prepared = call.slices.derived(
        ("hopper forward", device, q.dtype, q.shape, k.shape, v.shape[2], call.softcap > 0, call.sm_margin),
        lambda: PreparedForward(
            ForwardVariant(q.shape[2], v.shape[2], ELEMENT_OF[q.dtype], call.softcap > 0), call, q, k
        ),
    )
    max_logits = lse.new_full(lse.shape[1:], -torch.inf) if call.max_logits else None
    prepared.streams.add_current()
    stream = torch._C._cuda_getCurrentRawStream(q.get_device())  # a Stream object costs microseconds
    prepared.launch(call, (q, k, v), (out, lse, max_logits), merge, stream)
    return max_logits


@cache
def _kernel(variant: ForwardVariant, device: torch.device) -> Kernel:
    cubin = CUBINS / f"{variant.name}.cubin"
    return Kernel(cubin, variant.entry, index_of(device), variant.sizes.threads, variant.shared_bytes)
