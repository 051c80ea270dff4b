# SPDX-License-Identifier: Apache-2.0
"""How FlashAttention-4's kernels read an irregular mask: sorted intervals of every row, or column, and bit masks.

A thread of an attention kernel holds scores of a few *lines* of a tile, many *positions* each. Lines are queries in
the forward pass and, mostly, keys in the backward pass. The mask is given as two tables: ``offsets[line]`` to
``offsets[line + 1]`` are the numbers of the line's intervals, ``bounds[number]`` is ``(start, stop)``. For each line a
loop, whose length is only known at run time, turns the intervals into one bit per score, and predicated selects apply
the bits. So one compiled kernel serves every mask.

The SM100 forward kernel takes such a function as it is: a mask function of 128 keys at once. All others ask the class
``AttentionMask`` for every tile, which :func:`bound` replaces by :class:`IntervalMask` while a kernel may be traced.
The SM90 backward kernel has it for good: see :mod:`magi_kernels_blackwell.fa4.grouped_kernel`. The replacement answers
the base class's way unless the kernel was asked for with the marker :func:`by_intervals`, so that other users of
FlashAttention-4 in the process get what they always get.

This module imports the CUTLASS DSL: only :mod:`magi_kernels_blackwell.fa4.library` may import it.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import cutlass
import flash_attn.cute.flash_bwd_sm100
import flash_attn.cute.flash_fwd_sm90
from cutlass import Boolean, Float32, Int32, Uint32, const_expr, cute
from flash_attn.cute.mask import (
    AttentionMask,
    r2p_bitmask_above,
    r2p_bitmask_below,
    row_to_r2p_idx,
    sm90_col_to_r2p_idx,
)
from flash_attn.cute.utils import AuxData
from quack.layout_utils import reshape_acc_to_mn

BITS = 32
"""Scores per word of a bit mask."""

KEYS_PER_CALL = 128
"""Keys that the SM100 forward kernel asks for at once: a row of its tile."""

WARPGROUPS_SM100_BACKWARD = 2
"""How many groups of warps share the scores of the SM100 backward kernel, in turns of rows."""

_KERNEL_MODULES = (flash_attn.cute.flash_fwd_sm90, flash_attn.cute.flash_bwd_sm100)
_binding = RLock()


@cute.jit
def keys_by_intervals(batch: Any, head: Any, query: Any, keys: Any, seqlen_info: Any, tables: Any) -> Any:
    """Return the bits of 128 consecutive keys for one query: FlashAttention-4's vectorized mask function."""
    offsets, bounds = tables
    line, first = query[0], keys[0]
    words = cute.make_rmem_tensor(KEYS_PER_CALL // BITS, Uint32)
    for c in cutlass.range_constexpr(KEYS_PER_CALL // BITS):
        words[c] = Uint32(0)
    for number in cutlass.range(offsets[line], offsets[line + 1], unroll=1):
        start, stop = bounds[number, 0] - first, bounds[number, 1] - first
        for c in cutlass.range_constexpr(KEYS_PER_CALL // BITS):
            words[c] = words[c] | (r2p_bitmask_below(stop, c) & r2p_bitmask_above(start, c))
    return words.load()


def by_intervals(*args: object) -> None:
    """Mark a kernel that :class:`IntervalMask` masks. It is never called: without the class it says what is wrong."""
    raise RuntimeError("FlashAttention-4 traced a kernel with its own mask class instead of magi_kernels_blackwell's")


# FlashAttention-4 finds compiled kernels by these hashes, in this process and on disk: they must change with the code.
_CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
keys_by_intervals.__vec_size__ = KEYS_PER_CALL
keys_by_intervals.__cute_hash__ = f"magi keys_by_intervals {_CODE}"
by_intervals.__cute_hash__ = f"magi by_intervals {_CODE}"  # type: ignore[attr-defined]


@dataclass(frozen=True)
class IntervalMask(AttentionMask):
    """FlashAttention-4's mask class, for kernels marked by :func:`by_intervals`; else what it inherits."""

    @cute.jit
    def apply_mask(
        self,
        acc_S: cute.Tensor,
        batch_idx: Int32,
        head_idx: Int32,
        m_block: Int32,
        n_block: Int32,
        thr_mma: cute.TiledMma,
        mask_seqlen: cutlass.Constexpr[bool],
        mask_causal: cutlass.Constexpr[bool],
        mask_local: cutlass.Constexpr[bool] = False,
        mask_mod: cutlass.Constexpr = None,
        aux_data: AuxData = AuxData(),  # noqa: B008  the base class's
        fastdiv_mods: tuple[Any, Any] = (None, None),
    ) -> None:
        """Mask a tile of an SM90 kernel. Lines are the rows of the matrix product: keys if it is swapped."""
        if const_expr(mask_mod is by_intervals):
            scores = reshape_acc_to_mn(acc_S)
            shape = (self.tile_n, self.tile_m) if const_expr(self.swap_AB) else (self.tile_m, self.tile_n)
            identity = cute.make_identity_tensor(shape)
            mine = reshape_acc_to_mn(thr_mma.partition_C(identity))
            num_lines, num_positions = const_expr(cute.size(mine.shape[0])), const_expr(cute.size(mine.shape[1]))
            _check_positions_sm90(reshape_acc_to_mn(thr_mma.get_slice(0).partition_C(identity)), num_positions)
            line_block, position_block = (n_block, m_block) if const_expr(self.swap_AB) else (m_block, n_block)
            first = mine[0][1] + position_block * const_expr(shape[1])
            num_words = const_expr((num_positions + BITS - 1) // BITS)
            words = cute.make_rmem_tensor(num_words, Uint32)
            offsets, bounds = aux_data.tensors[0], aux_data.tensors[1]
            for r in cutlass.range_constexpr(num_lines):
                line = mine[r, 0][0] + line_block * const_expr(shape[0])
                for c in cutlass.range_constexpr(num_words):
                    words[c] = Uint32(0)
                for number in cutlass.range(offsets[line], offsets[line + 1], unroll=1):
                    start = sm90_col_to_r2p_idx(cutlass.max(bounds[number, 0] - first, 0))
                    stop = sm90_col_to_r2p_idx(cutlass.max(bounds[number, 1] - first, 0))
                    for c in cutlass.range_constexpr(num_words):
                        words[c] = words[c] | (r2p_bitmask_below(stop, c) & r2p_bitmask_above(start, c))
                for c in cutlass.range_constexpr(num_words):
                    for i in cutlass.range_constexpr(min(BITS, num_positions - c * BITS)):
                        kept = Boolean(words[c] & (Uint32(1) << i))
                        scores[r, c * BITS + i] = scores[r, c * BITS + i] if kept else -Float32.inf
        else:
            AttentionMask.apply_mask(
                self,
                acc_S,
                batch_idx,
                head_idx,
                m_block,
                n_block,
                thr_mma,
                mask_seqlen,
                mask_causal,
                mask_local,
                mask_mod,
                aux_data,
                fastdiv_mods,
            )

    @cute.jit
    def apply_mask_sm100_transposed(
        self,
        acc_S: cute.Tensor,
        tScS_t2r: cute.Tensor,
        t0ScS_t2r: cute.Tensor,
        m_block: Int32,
        n_block: Int32,
        mask_seqlen: cutlass.Constexpr,
        mask_causal: cutlass.Constexpr,
        mask_local: cutlass.Constexpr,
        mask_mod: cutlass.Constexpr = None,
        batch_idx: Int32 = None,
        head_idx: Int32 = None,
        aux_data: AuxData = AuxData(),  # noqa: B008  the base class's
        fastdiv_mods: tuple[Any, Any] = (None, None),
        is_full_block: bool = False,
        check_m_boundary: bool = True,
    ) -> None:
        """Mask a tile of the SM100 backward kernel, in which each thread holds many queries of one key."""
        if const_expr(mask_mod is by_intervals):
            q_axis, k_axis = (1, 0) if const_expr(self.swap_AB) else (0, 1)
            num_positions = const_expr(cute.size(acc_S.shape))
            num_words = const_expr((num_positions + BITS - 1) // BITS)
            run = const_expr(cute.size(tScS_t2r, mode=[0]))
            _check_positions_sm100(t0ScS_t2r, q_axis, run, num_positions)
            first = tScS_t2r[0][q_axis] + m_block * self.tile_m
            line = tScS_t2r[0][k_axis] + n_block * self.tile_n
            words = cute.make_rmem_tensor(num_words, Uint32)
            if is_full_block:
                # Only the tensors' ends can cut a full tile.
                end = row_to_r2p_idx(cutlass.max(self.seqlen_q - first, 0), run, WARPGROUPS_SM100_BACKWARD)
                if line >= self.seqlen_k:
                    end = Int32(0)
                for c in cutlass.range_constexpr(num_words):
                    words[c] = r2p_bitmask_below(end, c)
            else:
                offsets, bounds = aux_data.tensors[0], aux_data.tensors[1]
                for c in cutlass.range_constexpr(num_words):
                    words[c] = Uint32(0)
                for number in cutlass.range(offsets[line], offsets[line + 1], unroll=1):
                    start = cutlass.max(bounds[number, 0] - first, 0)
                    stop = cutlass.max(bounds[number, 1] - first, 0)
                    start = row_to_r2p_idx(start, run, WARPGROUPS_SM100_BACKWARD)
                    stop = row_to_r2p_idx(stop, run, WARPGROUPS_SM100_BACKWARD)
                    for c in cutlass.range_constexpr(num_words):
                        words[c] = words[c] | (r2p_bitmask_below(stop, c) & r2p_bitmask_above(start, c))
            if not is_full_block or check_m_boundary or line >= self.seqlen_k:
                for c in cutlass.range_constexpr(num_words):
                    for i in cutlass.range_constexpr(min(BITS, num_positions - c * BITS)):
                        kept = Boolean(words[c] & (Uint32(1) << i))
                        acc_S[c * BITS + i] = acc_S[c * BITS + i] if kept else -Float32.inf
        else:
            AttentionMask.apply_mask_sm100_transposed(
                self,
                acc_S,
                tScS_t2r,
                t0ScS_t2r,
                m_block,
                n_block,
                mask_seqlen,
                mask_causal,
                mask_local,
                mask_mod,
                batch_idx,
                head_idx,
                aux_data,
                fastdiv_mods,
                is_full_block,
                check_m_boundary,
            )


@contextmanager
def bound() -> Iterator[None]:
    """Let FlashAttention-4's kernels be traced with :class:`IntervalMask`, in this thread alone at a time."""
    with _binding:
        for module in _KERNEL_MODULES:
            module.AttentionMask = IntervalMask
        try:
            yield
        finally:
            for module in _KERNEL_MODULES:
                module.AttentionMask = AttentionMask


def _check_positions_sm90(coordinates: Any, num_positions: int) -> None:
    """Assert, while tracing, that score i of a thread is at the position that :func:`sm90_col_to_r2p_idx` says.

    Thread 0's coordinates are known then; the other threads' differ by a constant.
    """
    positions = [coordinates[0, i][1] for i in range(num_positions)]
    elements = [(p - positions[0]) // 8 * 2 + min((p - positions[0]) % 8, 2) for p in positions]
    assert elements == list(range(num_positions)), f"scores of a thread are at unexpected positions {positions}"


def _check_positions_sm100(coordinates: Any, axis: int, run: int, num_positions: int) -> None:
    """Assert, while tracing, that score i of a thread is at the position that :func:`row_to_r2p_idx` says."""
    positions = [coordinates[i][axis] for i in range(num_positions)]
    period = run * WARPGROUPS_SM100_BACKWARD
    elements = [(p - positions[0]) // period * run + min((p - positions[0]) % period, run) for p in positions]
    assert elements == list(range(num_positions)), f"scores of a thread are at unexpected positions {positions}"
