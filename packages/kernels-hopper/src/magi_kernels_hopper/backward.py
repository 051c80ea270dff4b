# SPDX-License-Identifier: Apache-2.0
"""One launch of the backward kernels: terms of rows, and gradients.

Shape suffixes: t tokens, h heads, d head dim, dv head dim of values; q queries, k keys.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.comm.protocol import RowsThere
from magi_attention.kernels.protocol import AttentionCall, KeysDone
from magi_attention.kernels.table_streams import StreamsOfTables
from magi_attention.utils.dtypes import as_dtype
from magi_kernels_hopper.backward_order import QuerySizes, WorkSizes
from magi_kernels_hopper.backward_params import Params, RowParams
from magi_kernels_hopper.backward_queries import PreparedQueries, number_of_kernel
from magi_kernels_hopper.driver import CUBINS, ByAddresses, Kernel, Ready
from magi_kernels_hopper.forward import Geometry, geometry
from magi_kernels_hopper.launching import (
    aligned,
    bell,
    counters,
    index_of,
    multiprocessors,
    put_maps,
    tensor_maps,
)
from magi_kernels_hopper.results import scored_upward
from magi_kernels_hopper.support import ELEMENT_OF
from magi_kernels_hopper.tables import DeviceColumnTables, device_column_tables
from magi_kernels_hopper.variants import BackwardSizes, BackwardVariant, ForwardSizes, ForwardVariant, backward_variants

GAP = 16
"""Terms of a tile are this many more than its rows, ``Traits::kTerms`` in csrc/backward/traits.cuh."""

PART_BYTES = 512
"""What parts of a workspace are aligned to, as PyTorch aligns tensors."""

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""q, dout, k, v, out, lse and dlse."""

Gradients = tuple[Tensor, Tensor, Tensor]
"""dq, dk and dv."""


class _Kernels(NamedTuple):
    prepare: Kernel
    backward: Kernel
    queries: tuple[Kernel, ...] = ()


class PreparedBackward:
    """All of a launch that does not change from call to call: made once for each mask and geometry, kept with the mask.

    Calls may score by other scales and softcaps, if none or all of them have a softcap.

    Args:
        candidates: the kernels, or two of which the mask decides, as :func:`.variants.backward_variants` gives them.
        call: the mask, whether gradients are to be added up in a fixed order, and which keys come first.
        q: ``[tq, hq, d]``.
        k: ``[tk, hk, d]``.
    """

    def __init__(self, candidates: Sequence[BackwardVariant], call: AttentionCall, q: Tensor, k: Tensor) -> None:
        self._known = ByAddresses[tuple[Ready, ...]]()
        (num_q, num_heads, head_dim), (num_k, num_kv_heads, _) = q.shape, k.shape
        available = max(multiprocessors(q.device) - call.sm_margin, 1)
        self.tables = tables = device_column_tables(
            call.slices,
            num_q,
            num_k,
            tuple(work_sizes(each, num_heads, num_kv_heads, num_k, available) for each in candidates),
            q.device,
            ordered=call.deterministic,
            first_keys=call.first_keys,
        )
        variant = candidates[tables.chosen]
        sizes = variant.sizes
        pack, tile_q = tables.pack, sizes.tile_m // tables.pack
        tiles_q = -(-num_q // tile_q)
        self.sizes, self.num_tiles = sizes, tiles_q * (num_heads // pack)
        # Halves of tiles of keys, of a head, to whose gradients several items add.
        self.num_shared = 2 * len(tables.tiles) * num_kv_heads if tables.split else 0
        self.num_awaited = 2 * tables.num_awaited * num_kv_heads
        self.blocks = min(available, len(tables.items))
        self.streams = StreamsOfTables(tables)
        self.kernels = _kernels(variant, q.device)
        swizzle_bytes = 128 if head_dim % 64 == 0 else 64
        rows_of_boxes = 2 * [(pack, tile_q)] + 2 * [(1, sizes.tile_n)]
        self.boxes = [((swizzle_bytes // 2, *each), swizzle_bytes) for each in rows_of_boxes]
        self.template = _template(tables, sizes, num_q, num_heads, num_kv_heads)
        self.row_template = RowParams(
            num_q=num_q,
            num_heads=num_heads,
            log2_pack=pack.bit_length() - 1,
            num_tiles_q=tiles_q,
            num_items_done=self.num_shared + 1,
            adders=tables.adders.data_ptr(),
        )
        self._queries = None
        if tables.queries is not None:
            cut = _cut_of_queries(variant, num_heads, num_kv_heads, num_k)
            self._queries = PreparedQueries(tables.queries, cut, num_q, self.template, available)
            self._queries_kernel = self.kernels.queries[number_of_kernel(cut)]
        self._lay_out_workspace(variant, head_dim)

    def _lay_out_workspace(self, variant: BackwardVariant, head_dim: int) -> None:
        """Sums of gradients, terms of rows, sums of items, and how far all of these have come."""
        sizes = variant.sizes
        rows = self.num_tiles * sizes.tile_m
        of_items = self.num_shared * 2 * sizes.tile_n // 2 * head_dim
        of_queries, parts = (0, 0) if variant.fine else (rows * head_dim, self.num_tiles * sizes.dq_parts)
        self._part_bytes = 4 * parts
        numbers = of_queries, 2 * (rows + GAP * self.num_tiles), of_items, 2 * parts + self.num_shared + 1
        starts = [*accumulate((-(-4 * each // PART_BYTES) * PART_BYTES for each in numbers), initial=0)]
        self._starts, self._num_bytes = starts[:-1], starts[-1]

    def workspace(self, device: torch.device) -> Tensor:
        """What the kernels hand on, in one piece; :meth:`_fill` says what lies where."""
        return torch.empty(self._num_bytes, dtype=torch.uint8, device=device)

    def launch(
        self,
        call: AttentionCall,
        inputs: Inputs,
        gradients: Gradients,
        workspace: Tensor,
        stream: int,
        keys_done: KeysDone | None,
    ) -> None:
        """Launch on a stream, which is the current one."""
        zeros = counters(workspace.device, stream)
        rung = bell(workspace.device, stream) if keys_done is not None and self.num_awaited else None
        given = [x for x in inputs if x is not None]
        addresses = [x.data_ptr() for x in (*given, *gradients, workspace, zeros)]
        layout = (*[x.stride() for x in given], *[x.dtype for x in given])
        awaited_there = 0 if rung is None else rung.address
        key = (*addresses, *layout, call.softmax_scale, call.softcap, awaited_there)
        ready = self._known.find(key)
        if ready is None:
            readable = self._readable(call, inputs)
            ready = self._fill(call, readable, gradients, workspace, zeros, awaited_there)
            if all(mine is theirs for mine, theirs in zip(readable, inputs, strict=True)):
                self._known.keep(key, ready)
        rows, params, *of_queries = ready
        self.kernels.prepare.launch_ready(self.num_tiles, stream, rows)
        rows_there: list[RowsThere] = []
        with nullcontext() if rung is None else rung.lock:
            self.kernels.backward.launch_ready(self.blocks, stream, params)
            if rung is not None:
                rows_there.append(rung.count_launch())
        if keys_done is not None:
            keys_done(*gradients[1:], *rows_there)
        if self._queries is not None:
            self._queries_kernel.launch_ready(self._queries.blocks, stream, *of_queries)

    def _readable(self, call: AttentionCall, inputs: Inputs) -> Inputs:
        """The inputs as the kernels read them: q, dout, k and v by the copy engine, out and dlse contiguous."""
        q, dout, k, v, out, lse, dlse = inputs
        q = scored_upward(q, call.softmax_scale)  # masked scores are -inf, before they are scaled
        dout, out = (aligned(as_dtype(x, q.dtype).contiguous()) for x in (dout, out))
        lse = as_dtype(lse, torch.float32)
        dlse = None if dlse is None else as_dtype(dlse, torch.float32).contiguous()
        return aligned(q), dout, aligned(k), aligned(v), out, lse, dlse

    def _fill(
        self,
        call: AttentionCall,
        inputs: Inputs,
        gradients: Gradients,
        workspace: Tensor,
        zeros: Tensor,
        awaited_there: int,
    ) -> tuple[Ready, ...]:
        """The parameters of all kernels; ``awaited_there`` is the address of a bell's word, or 0."""
        *tensors, out, lse, dlse = inputs
        q, dout, *_ = tensors
        dq, dk, dv = (gradient.data_ptr() for gradient in gradients)
        rows = RowParams.from_buffer_copy(self.row_template)
        rows.out, rows.dout, rows.lse, rows.dq = out.data_ptr(), dout.data_ptr(), lse.data_ptr(), dq
        rows.lse_token, rows.lse_head = lse.stride()
        if dlse is not None:
            rows.dlse = dlse.data_ptr()
        params = Params.from_buffer_copy(self.template)
        params.set_scores(call.softmax_scale, call.softcap)
        maps = tensor_maps(q.device)
        put_maps(params, maps, tensors, self.boxes)
        params.dq, params.dk, params.dv, params.counters = dq, dk, dv, zeros.data_ptr()
        sums, terms, partial, added = (workspace.data_ptr() + start for start in self._starts)
        params.dq_sums, params.partial = sums, partial
        parts = self._part_bytes
        for each in (rows, params):
            each.row_terms, each.added, each.complete, each.items_done = terms, added, added + parts, added + 2 * parts
        if awaited_there:
            params.awaited_done = params.items_done + 4 * self.num_shared
            params.awaited_there, params.num_awaited = awaited_there, self.num_awaited
        if self._queries is None:
            return Ready.of(rows), Ready.of(params)
        q, dout, k, v = tensors
        of_queries = self._queries.fill(call, maps, (q, k, v, dout), dq, terms, zeros.data_ptr())
        return Ready.of(rows), Ready.of(params), Ready.of(of_queries)


def _template(
    tables: DeviceColumnTables, sizes: BackwardSizes, num_q: int, num_heads: int, num_kv_heads: int
) -> Params:
    """The parameters without the addresses of tensors, and without how to score."""
    pack = tables.pack
    return Params(
        tiles=tables.tiles.data_ptr(),
        runs=tables.runs.data_ptr(),
        pieces=tables.pieces.data_ptr(),
        items=tables.items.data_ptr(),
        ranks=None if tables.ranks is None else tables.ranks.data_ptr(),
        keys=tables.keys.data_ptr(),
        num_kv_heads=num_kv_heads,
        log2_pack=pack.bit_length() - 1,
        packs_per_kv_head=num_heads // num_kv_heads // pack,
        num_tiles_q=-(-num_q // (sizes.tile_m // pack)),
        num_items=len(tables.items),
        adders=tables.adders.data_ptr(),
        num_q=num_q,
        num_packs=num_heads // pack,
        num_complete=tables.num_met * (num_heads // pack) * sizes.dq_parts,
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
    keys_done: KeysDone | None = None,
) -> Gradients:
    """Differentiate, on torch's current stream; see :meth:`KernelBackend.backward`.

    If given, ``keys_done`` is as of :meth:`FinishesKeysFirst.backward_keys_first`.

    q ``[tq, hq, d]``, k ``[tk, hk, d]`` and v ``[tk, hk, dv]`` are not empty; gradients are contiguous, of their dtype.
    """
    device, dtype, head_dim, head_dim_v = q.device, q.dtype, q.shape[2], v.shape[2]
    key = ("hopper backward", device, dtype, q.shape, k.shape, head_dim_v, call.softcap > 0)
    prepared = call.slices.derived(
        (*key, call.deterministic, call.sm_margin, call.first_keys),
        lambda: PreparedBackward(
            backward_variants((head_dim, head_dim_v), ELEMENT_OF[dtype], call.softcap > 0), call, q, k
        ),
    )
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    workspace = prepared.workspace(device)
    prepared.streams.add_current()
    stream = torch._C._cuda_getCurrentRawStream(q.get_device())  # a Stream object costs microseconds
    prepared.launch(call, (q, dout, k, v, out, lse, dlse), (dq, dk, dv), workspace, stream, keys_done)
    return dq, dk, dv


@cache
def _kernels(variant: BackwardVariant, device: torch.device) -> _Kernels:
    cubin, index, sizes = CUBINS / f"{variant.name}.cubin", index_of(device), variant.sizes
    return _Kernels(
        Kernel(cubin, variant.prepare_entry, index, sizes.row_threads, 0),
        Kernel(cubin, variant.entry, index, sizes.threads, sizes.shared_bytes),
        tuple(
            Kernel(cubin, each.entry, index, each.threads, sizes.shared_bytes // each.blocks)
            for each in variant.query_kernels
            if variant.fine
        ),
    )


def _cut_of_queries(variant: BackwardVariant, num_heads: int, num_kv_heads: int, num_k: int) -> Geometry:
    """How the kernel that computes gradients of queries apart cuts its work: as the forward kernel does."""
    return geometry(ForwardVariant(*variant.dims, variant.element), num_heads, num_kv_heads, num_k)


def work_sizes(variant: BackwardVariant, num_heads: int, num_kv_heads: int, num_k: int, blocks: int) -> WorkSizes:
    """How a kernel cuts its work."""
    sizes, apart = variant.sizes, None
    if variant.fine:
        cut = _cut_of_queries(variant, num_heads, num_kv_heads, num_k)
        kernel = variant.query_kernels[number_of_kernel(cut)]
        apart = QuerySizes(cut.share_q * (kernel.rows // ForwardSizes.consumer_rows), kernel.box_n, cut.num_packs)
    return WorkSizes(sizes.tile_m, sizes.tile_n, num_kv_heads, num_heads // num_kv_heads, blocks, variant.splits, apart)
