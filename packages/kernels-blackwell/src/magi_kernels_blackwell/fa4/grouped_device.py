# SPDX-License-Identifier: Apache-2.0
"""What of the backward kernel for groups of heads runs on the GPU: its class, and its loops over tiles.

The kernel is FlashAttention-4's, read as one with a head for each group and a sequence that holds the group's query
heads one after another, each padded to whole tiles. That is also how its buffers of statistics and of dq lie in memory,
so that FlashAttention-4's own kernels before and after it need no change. The tiles of a block of keys come as runs:
of partial tiles, masked by intervals, and of full ones, which are not masked at all.

This module imports the CUTLASS DSL: only :mod:`magi_kernels_blackwell.fa4.grouped_kernel` may import it.
"""

import sys
from functools import cache, partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from typing import Any

import cutlass
from cutlass import Boolean, Int32, const_expr, cute
from flash_attn.cute.named_barrier import NamedBarrierBwd
from flash_attn.cute.seqlen_info import SeqlenInfoQK
from flash_attn.cute.tile_scheduler import SingleTileScheduler, WorkTileInfo
from quack import copy_utils

from magi_kernels_blackwell.fa4.masks import IntervalMask

WARP = 32


@cache
def kernel_class(group: int) -> type:
    """FlashAttention-4's kernel of a private copy of its module, in which it walks runs of tiles and groups of heads.

    The module that others import stays as it is.
    """
    module = _private_copy("flash_attn.cute.flash_bwd_sm90", f"group_of_{group}")
    schedule = module.TileSchedulerArguments

    def schedule_groups(blocks: Any, heads: Any, *args: Any, cu_total_m_blocks_ptr: Any, **named: Any) -> Any:
        # The order of work comes in the place of a table that only packed documents have.
        return schedule(blocks, heads // group, *args, num_splits_dynamic_ptr=cu_total_m_blocks_ptr, **named)

    module.TileSchedulerArguments = schedule_groups
    module.SingleTileScheduler = _ListedWork
    module.AttentionMask = IntervalMask
    module.SeqlenInfoQK = _GroupLengths
    module.get_total_q_block_count_bwd = _count_runs
    module.produce_block_sparse_q_loads_bwd_sm90 = _load_tiles
    module.consume_block_sparse_mma_bwd_sm90 = _multiply_tiles
    module.dQaccum_store_block_sparse_bwd_sm90 = _store_tiles

    class GroupedBackward(module.FlashAttentionBackwardSm90):  # type: ignore[name-defined]
        """A kernel with a head for each group, whose sequence holds the group's query heads one after another."""

        def __init__(self, *args: Any, **options: Any) -> None:
            # The factor is what the kernel hands on to the functions above; it makes no other use of it.
            super().__init__(*args, q_subtile_factor=group, **options)

        def kernel(self, q: Any, k: Any, v: Any, dout: Any, *args: Any) -> Any:
            """Launch the kernel with q and dout cut into tiles, all heads of a group in one sequence."""
            return super().kernel(self._by_group(q), k, v, self._by_group(dout), *args)

        def _by_group(self, x: Any) -> Any:
            """Turn ``(t, d, h, b)`` into ``((tile, tiles, group), d, groups, b)``."""
            cut = cute.logical_divide(x, (self.tile_m, None, group))
            shape, stride = (((t[0], t[1], h[0]), d, h[1], b) for t, d, h, b in (cut.layout.shape, cut.layout.stride))
            return cute.make_tensor(cut.iterator, cute.make_layout(shape, stride=stride))

    return GroupedBackward


def _private_copy(name: str, label: str) -> Any:
    original = find_spec(name)
    assert original is not None
    assert original.origin is not None
    spec = spec_from_file_location(f"{__name__}.{label}", original.origin)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where classes look up their module while they are made
    spec.loader.exec_module(module)
    return module


class _ListedWork(SingleTileScheduler):
    """FlashAttention-4's scheduler of one piece of work for each thread block, taken from a list."""

    @staticmethod
    def create(params: Any, ctx: Any = None, *, loc: Any = None, ip: Any = None) -> Any:
        """Make one for this thread block."""
        return _ListedWork(params, cute.arch.block_idx(), loc=loc, ip=ip)

    def get_current_work(self, *, loc: Any = None, ip: Any = None) -> Any:
        """Return block, head, batch and split."""
        x, y, batch = self._blk_coord
        work = self.params.num_splits_dynamic_ptr[y * self.params.num_block + x]
        heads = self.params.num_head
        return WorkTileInfo((work // heads, work % heads, batch, Int32(0)), self._is_first_block)

    def __new_from_mlir_values__(self, values: Any) -> Any:
        other = super().__new_from_mlir_values__(values)
        other.__class__ = _ListedWork
        return other


class _GroupLengths(SeqlenInfoQK):
    """FlashAttention-4's lengths, of which a group's is the number of all its rows."""

    @staticmethod
    def create(batch_idx: Any, *, seqlen_q_static: Any, **options: Any) -> Any:
        """Make them for a kernel, which names the length of queries as a tuple."""
        return SeqlenInfoQK.create(batch_idx, seqlen_q_static=cute.size(seqlen_q_static), **options)


@cute.jit
def _count_runs(
    runs: Any, batch: Any, head: Any, n_block: Any, q_subtile_factor: cutlass.Constexpr, m_block_max: Any
) -> Any:
    """Return how many runs a block of keys has: the kernel asks only whether there are any."""
    partial_runs = runs.mask_block_cnt[n_block + 1] - runs.mask_block_cnt[n_block]
    return partial_runs + runs.full_block_cnt[n_block + 1] - runs.full_block_cnt[n_block]


@cute.jit
def _load_tiles(
    runs: Any,
    batch: Any,
    head: Any,
    n_block: Any,
    state_q: Any,
    state_dout: Any,
    pipeline_q: Any,
    pipeline_dout: Any,
    load_k: Any,
    load_v: Any,
    load_q: Any,
    load_dout: Any,
    load_lse: Any,
    load_dpsum: Any,
    bytes_k: Any,
    bytes_v: Any,
    Q_stage_eq_dO_stage: cutlass.Constexpr,
    q_subtile_factor: cutlass.Constexpr,
    m_block_max: Any,
) -> Any:
    """Load the tiles' queries and what belongs to them, with the first tile keys and values: the producer's loop."""
    load = partial(
        _load_tile,
        pipeline_q=pipeline_q,
        pipeline_dout=pipeline_dout,
        load_k=load_k,
        load_v=load_v,
        load_q=load_q,
        load_dout=load_dout,
        load_lse=load_lse,
        load_dpsum=load_dpsum,
        bytes_k=bytes_k,
        bytes_v=bytes_v,
        same_stages=Q_stage_eq_dO_stage,
    )
    state_q, state_dout, _ = _walk(
        runs, n_block, q_subtile_factor, m_block_max, load, (state_q, state_dout, Boolean(True))
    )
    return state_q, state_dout


@cute.jit
def _load_tile(
    first: Any,
    m_block: Any,
    is_partial: cutlass.Constexpr,
    states: Any,
    pipeline_q: Any,
    pipeline_dout: Any,
    load_k: Any,
    load_v: Any,
    load_q: Any,
    load_dout: Any,
    load_lse: Any,
    load_dpsum: Any,
    bytes_k: Any,
    bytes_v: Any,
    same_stages: cutlass.Constexpr,
) -> Any:
    state_q, state_dout, is_first = states
    state = state_q if const_expr(same_stages) else state_dout
    if is_first:
        pipeline_q.producer_acquire(state_q, extra_tx_count=bytes_k)
        load_k(tma_bar_ptr=pipeline_q.producer_get_barrier(state_q))
    else:
        pipeline_q.producer_acquire(state_q)
    load_q(first + m_block, producer_state=state_q)
    if is_first:
        # The kernel before this one, which may still run, writes the statistics and clears dq.
        cute.arch.griddepcontrol_wait()
    load_lse(first + m_block, producer_state=state_q)
    if is_first:
        pipeline_dout.producer_acquire(state, extra_tx_count=bytes_v)
        load_v(tma_bar_ptr=pipeline_dout.producer_get_barrier(state))
    else:
        pipeline_dout.producer_acquire(state)
    load_dout(first + m_block, producer_state=state)
    load_dpsum(first + m_block, producer_state=state)
    state_q.advance()
    state_dout.advance()
    return state_q, state_dout, Boolean(False)


@cute.jit
def _multiply_tiles(
    runs: Any,
    batch: Any,
    head: Any,
    n_block: Any,
    state_q: Any,
    state_dout: Any,
    multiply_tile: Any,
    mask: Any,
    mask_mod: Any,
    is_causal: cutlass.Constexpr,
    is_local: cutlass.Constexpr,
    thr_mma_SdP: Any,
    score_mod_fn: Any,
    score_mod_bwd_fn: Any,
    q_subtile_factor: cutlass.Constexpr,
    m_block_max: Any,
    aux_data: Any,
    fastdiv_mods: Any,
) -> Any:
    """Compute the tiles: the loop of the warps that multiply."""
    apply_mask = partial(
        mask.apply_mask,
        batch_idx=batch,
        head_idx=head,
        n_block=n_block,
        thr_mma=thr_mma_SdP,
        mask_seqlen=False,
        mask_causal=False,
        mask_mod=mask_mod,
        aux_data=aux_data,
    )
    multiply = partial(multiply_tile, score_mod_fn=score_mod_fn, score_mod_bwd_fn=score_mod_bwd_fn)

    def visit(first: Any, m_block: Any, is_partial: bool, states: Any) -> Any:
        state_q, state_dout, is_later = states
        mask_fn = apply_mask if is_partial else None
        return *multiply(m_block, state_q, state_dout, mask_fn=mask_fn, dKV_accumulate=is_later), Boolean(True)

    state_q, state_dout, _ = _walk(
        runs, n_block, q_subtile_factor, m_block_max, visit, (state_q, state_dout, Boolean(False))
    )
    return state_q, state_dout


@cute.jit
def _store_tiles(
    runs: Any,
    batch: Any,
    head: Any,
    n_block: Any,
    shared_dq: Any,
    global_dq: Any,
    q_subtile_factor: cutlass.Constexpr,
    m_block_max: Any,
    num_dQ_warp_groups: cutlass.Constexpr,
    num_threads_per_warp_group: cutlass.Constexpr,
    tma_copy_bytes_dQ: Any,
) -> Any:
    """Add each tile's dq to the sum in global memory: the loop of the warp that stores."""
    store = partial(
        _store_tile,
        shared_dq=shared_dq,
        global_dq=global_dq,
        warp_groups=num_dQ_warp_groups,
        num_threads=num_threads_per_warp_group + WARP,
        num_bytes=tma_copy_bytes_dQ,
    )
    _walk(runs, n_block, q_subtile_factor, m_block_max, store, (Int32(0),))


@cute.jit
def _store_tile(
    first: Any,
    m_block: Any,
    is_partial: cutlass.Constexpr,
    states: Any,
    shared_dq: Any,
    global_dq: Any,
    warp_groups: cutlass.Constexpr,
    num_threads: cutlass.Constexpr,
    num_bytes: Any,
) -> Any:
    for group in cutlass.range_constexpr(warp_groups):
        # The group may overwrite its part of shared memory once the sum before has been read from there.
        cute.arch.cp_async_bulk_wait_group(warp_groups - 1 - group, read=True)
        cute.arch.barrier_arrive(barrier_id=int(NamedBarrierBwd.dQEmptyWG0) + group, number_of_threads=num_threads)
    for group in cutlass.range_constexpr(warp_groups):
        cute.arch.barrier(barrier_id=int(NamedBarrierBwd.dQFullWG0) + group, number_of_threads=num_threads)
        with cute.arch.elect_one():
            copy_utils.cpasync_reduce_bulk_add_f32(
                shared_dq[None, group].iterator, global_dq[(None, group), first + m_block].iterator, num_bytes
            )
        cute.arch.cp_async_bulk_commit_group()
    return states


@cute.jit
def _walk(runs: Any, n_block: Any, group: cutlass.Constexpr, m_blocks: Any, visit: Any, states: Any) -> Any:
    """Visit the tiles of a block of keys, head by head of the group: partial ones before full ones.

    ``visit(first, m_block, is_partial, states)`` gets the number of the head's first tile in the sequence, the number
    of the tile in the head, and what the last visit returned.
    """
    for member in cutlass.range(group, unroll=1):
        first = member * (m_blocks // group)
        states = _walk_runs(runs.mask_block_cnt, runs.mask_block_idx, n_block, visit, first, True, states)
        states = _walk_runs(runs.full_block_cnt, runs.full_block_idx, n_block, visit, first, False, states)
    return states


@cute.jit
def _walk_runs(
    offsets: Any, bounds: Any, n_block: Any, visit: Any, first: Any, is_partial: cutlass.Constexpr, states: Any
) -> Any:
    for run in cutlass.range(offsets[n_block], offsets[n_block + 1], unroll=1):
        for m_block in cutlass.range(bounds[run, 0], bounds[run, 1], unroll=1):
            states = visit(first, m_block, is_partial, states)
    return states
