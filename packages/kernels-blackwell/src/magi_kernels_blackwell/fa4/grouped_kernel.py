# SPDX-License-Identifier: Apache-2.0
"""A backward kernel for Hopper in which a block of keys meets the queries of all heads that share it.

FlashAttention-4 gives each query head's pass over a block of keys a thread block of its own, which loads the keys and
values, and adds its gradients of them to the other heads' in global memory. For masks of which a block of keys sees
few queries, such as windows and short documents, that costs as much as some tiles do. Here one thread block walks over
the heads of a group in turn: it loads keys and values once, keeps their gradients in registers, and writes them once,
in the tensors' dtype.

Here it is compiled, and what it takes is put in order; :mod:`.grouped_device` is what runs on the GPU, and
:mod:`.grouped` launches it.

This module imports the CUTLASS DSL: only :mod:`magi_kernels_blackwell.fa4.library` may import it.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from cutlass import Float32, Int32, cute
from flash_attn.cute.block_sparsity import BlockSparseTensors
from flash_attn.cute.cache_utils import get_jit_cache
from flash_attn.cute.interface import (
    _bwd_postprocess_convert,
    _bwd_preprocess,
    _compile_bwd_postprocess,
    _compile_bwd_preprocess,
    _tile_size_bwd_sm90,
    torch2cute_dtype_map,
)
from flash_attn.cute.utils import AuxData, create_softcap_scoremod, create_softcap_scoremod_bwd
from quack.compile_utils import make_fake_tensor

from magi_kernels_blackwell.fa4 import grouped_device
from magi_kernels_blackwell.fa4.grouped_device import kernel_class
from magi_kernels_blackwell.fa4.masks import by_intervals
from magi_kernels_blackwell.prepared import direct

ARCH = 90
# Kernels are found by these, in this process and on disk: they change with the code that is compiled.
_CODE = (
    *(hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for file in (__file__, grouped_device.__file__)),
    by_intervals.__cute_hash__,  # type: ignore[attr-defined]
)
_main_cache = get_jit_cache("magi_grouped_bwd")


class Runs(NamedTuple):
    """A mask's tiles, int32 on the device: block n of keys meets the blocks of queries that its runs hold.

    Attributes:
        work: ``[blocks of keys * key heads]``, the order of the work: ``block * heads + head``.
        partial_offsets: ``[n + 1]``; the block's runs of partial tiles are those with these numbers, and
        partial_runs: ``[runs, 2]``, ``(start, stop)`` of each.
        full_offsets, full_runs: the same for full tiles.
    """

    work: Any
    partial_offsets: Any
    partial_runs: Any
    full_offsets: Any
    full_runs: Any


class Geometry(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        dtype: of all tensors, as PyTorch names it.
        head_dim, head_dim_v: of queries and keys, and of values.
        group: query heads for each key and value head.
        block_q: queries of a tile.
        softcap: 0 for none.
    """

    dtype: Any
    head_dim: int
    head_dim_v: int
    group: int
    block_q: int
    softcap: float


class Kernels(NamedTuple):
    """Compiled kernels, each called with tensors on the GPU and launched on the current stream.

    Attributes:
        before: writes dpsum and lse for base 2, and clears the sum of dq: ``(out, dout, dpsum, lse, lse2, dq_sum,
            None, None, dlse, None, None, 1.0, None, None)``.
        main: as :func:`arguments` orders it.
        after: turns the sum of dq into dq: ``(dq_sum, dq, scale, None, None, None, None)``.
    """

    before: Any
    main: Any
    after: Any


@cache
def kernels(geometry: Geometry, has_dlse: bool) -> Kernels:
    """The kernels of a backward pass, compiled unless this process or the cache on disk has them."""
    g, dtype = geometry, torch2cute_dtype_map[geometry.dtype]
    config = tile_config(g.head_dim, g.head_dim_v, g.block_q)
    multiple = 64 if config.dKV_swapAB else 32
    before: tuple[Any, ...] = (dtype, g.head_dim, g.head_dim_v, g.block_q, False, False, has_dlse)
    before += (True, False, True, True, False, False, 1, 1, False, multiple, False)
    threads = 128 if config.dQ_single_wg else config.num_wg * 128
    after: tuple[Any, ...] = (dtype, g.head_dim, g.block_q, threads, config.AtomLayoutMdQ, config.dQ_swapAB)
    after += (False, False, False, 1, ARCH, False, None, multiple, None)
    found = (
        _find_or_compile(_bwd_preprocess.compile_cache, before, lambda: _compile_bwd_preprocess(*before)),
        _find_or_compile(_main_cache, (*_CODE, str(g.dtype), *g[1:]), lambda: _compile_main(g)),
        _find_or_compile(_bwd_postprocess_convert.compile_cache, after, lambda: _compile_bwd_postprocess(*after)),
    )
    return Kernels(*map(direct, found))


def arguments(tensors: tuple[Any, ...], scale: Any, intervals: tuple[Any, Any], runs: Runs) -> tuple[Any, ...]:
    """Order what the main kernel takes.

    Args:
        tensors: q, k, v, dout ``[1, t, h, d]``, lse2 and dpsum ``[1, hk, rows]``, the sum of dq ``[1, hk, rows * d]``,
            dk, dv; rows are those of a group's query heads, each padded to whole tiles.
        scale: of the softmax.
        intervals: offsets and bounds of the lines that masks are looked up by.
        runs: the tiles.
    """
    work, *lists = runs
    return (*tensors, scale, *(None,) * 9, AuxData(list(intervals), None), BlockSparseTensors(*lists), work)


def tile_config(head_dim: int, head_dim_v: int, block_q: int) -> Any:
    """FlashAttention-4's choice of tiles for head dims: that with blocks of ``block_q`` queries."""
    choices = (_tile_size_bwd_sm90(head_dim, head_dim_v, causal, False, block_q) for causal in (True, False))
    return next(each for each in choices if each.m_block_size == block_q)


def _find_or_compile(kept: Any, key: tuple[Any, ...], compile_it: Callable[[], Any]) -> Any:
    if key not in kept:
        kept[key] = compile_it()
    return kept[key]


def _compile_main(geometry: Geometry) -> Any:
    dtype = torch2cute_dtype_map[geometry.dtype]
    config = tile_config(geometry.head_dim, geometry.head_dim_v, geometry.block_q)
    softcap = geometry.softcap
    kernel = kernel_class(geometry.group)(
        dtype,
        geometry.head_dim,
        geometry.head_dim_v,
        tile_m=config.m_block_size,
        tile_n=config.n_block_size,
        Q_stage=config.num_stages_Q,
        dO_stage=config.num_stages_dO,
        PdS_stage=config.num_stages_PdS,
        SdP_swapAB=config.SdP_swapAB,
        dKV_swapAB=config.dKV_swapAB,
        dQ_swapAB=config.dQ_swapAB,
        AtomLayoutMSdP=config.AtomLayoutMSdP,
        AtomLayoutNdKV=config.AtomLayoutNdKV,
        AtomLayoutMdQ=config.AtomLayoutMdQ,
        num_threads=(config.num_wg + 1) * 128,
        dQ_single_wg=config.dQ_single_wg,
        score_mod=create_softcap_scoremod(softcap) if softcap else None,
        score_mod_bwd=create_softcap_scoremod_bwd(softcap) if softcap else None,
        mask_mod=by_intervals,
        has_aux_tensors=True,
    )
    num = cute.sym_int
    tq, tk, heads_q, heads_k, d, dv, rows, rows_d = (num() for _ in range(8))

    def tensor(*shape: Any, of: Any = dtype) -> Any:
        return make_fake_tensor(of, shape, divisibility=128 // of.width)

    def table(*shape: Any) -> Any:
        return make_fake_tensor(Int32, shape)

    tensors = (
        tensor(1, tq, heads_q, d),
        tensor(1, tk, heads_k, d),
        tensor(1, tk, heads_k, dv),
        tensor(1, tq, heads_q, dv),
        *(tensor(1, heads_k, rows, of=Float32) for _ in range(2)),
        tensor(1, heads_k, rows_d, of=Float32),
        tensor(1, tk, heads_k, d),
        tensor(1, tk, heads_k, dv),
    )
    blocks = num()
    runs = Runs(table(num()), table(blocks), table(num(), 2), table(blocks), table(num(), 2))
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    inputs = arguments(tensors, Float32(1.0), (table(num()), table(num(), 2)), runs)
    return cute.compile(kernel, *inputs, stream, options="--enable-tvm-ffi")
