# SPDX-License-Identifier: Apache-2.0
"""Flexible flash attention on one device, in the signature that the original's users know."""

import logging

import torch
from torch import Tensor

from magi_attention.common.enum import AttnSinkLayout
from magi_attention.common.errors import MagiValueError
from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.functional.compiled import flex_flash_attn_compiled
from magi_attention.functional.index_attention import attend_by_indices
from magi_attention.functional.single_device import (
    attend_on_one_device,
    check_tensors,
    configured_backends,
    make_job,
    slices_from_tensors,
)
from magi_attention.functional.utils import check_sink
from magi_attention.utils.torch_modes import is_one_operator

logger = logging.getLogger(__name__)


def flex_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ranges: Tensor | None = None,
    k_ranges: Tensor | None = None,
    attn_type_map: Tensor | None = None,
    *,
    index_attn_indices: Tensor | None = None,
    q_block_size: int = 1,
    k_block_size: int = 1,
    sink: Tensor | None = None,
    sink_layout: AttnSinkLayout = "sh",
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    disable_fwd_atomic_reduction: bool = False,
    disable_bwd_dkv_atomic_reduction: bool = False,
    ref_block_size: tuple[int, int] | None = None,
    max_seqlen_q: int | None = None,
    auto_range_merge: bool = False,
    swap_ab: bool = False,
    pack_gqa: bool = False,
    cat_gqa: bool = False,
    sparse_load: bool = False,
    index_attn: bool = False,
    swap_bwd_qk_loop: bool = False,
    return_max_logits: bool = False,
    skip_overlap_check: bool | None = None,
) -> tuple[Tensor, AttnForwardMeta]:
    """Attend over slices: slice i lets queries ``q_ranges[i]`` see keys ``k_ranges[i]`` as ``attn_type_map[i]`` says.

    A row's softmax is over all keys that any of its slices keeps. Rows that no slice covers give 0. Gradients flow to
    q, k, v and sink, from the output and from ``meta.lse``.

    Args:
        q: ``[tq, hq, d]``, of any dtype and device that an installed backend takes: float16 and bfloat16 on GPUs, up
            to float64 with the reference backend, which also serves CPUs.
        k: ``[tk, hk, d]``, with hq a multiple of hk: query head h reads head ``h // (hq // hk)``.
        v: ``[tk, hk, dv]``.
        q_ranges: ``[n, 2]`` integers, half-open ranges of queries; on the host or a device (which then waits for it).
        k_ranges: ``[n, 2]`` integers, half-open ranges of keys.
        attn_type_map: ``[n]`` integers: 0 FULL, 1 CAUSAL, 2 INVCAUSAL, 3 BICAUSAL; all FULL if None.
        index_attn_indices: in place of ranges and types, ``[tq, hk, n]`` integers: for each query and key head the rows
            of k and v to attend to, none of them twice, padded by -1 at the end; with one key head also
            ``[tq / m, m, n]``. See :func:`magi_attention.functional.index_attention.attend_by_indices`.
        q_block_size: of index attention, 1.
        k_block_size: of index attention, 1.
        sink: ``[s, hq]`` (layout "sh") or ``[tq, s, hq]`` ("ssh") learnable logits of extra keys with value zero.
        sink_layout: "sh" or "ssh".
        softmax_scale: factor on the scores, ``d ** -0.5`` if None.
        softcap: if positive, scores become ``softcap * tanh(score / softcap)``.
        deterministic: the same bits in every run, in the backward pass too.
        sm_margin: multiprocessors to leave to others, where a backend can.
        disable_fwd_atomic_reduction: a hint, without effect on the result; like all that follow but the last two.
        disable_bwd_dkv_atomic_reduction: a hint.
        ref_block_size: a hint.
        max_seqlen_q: a hint.
        auto_range_merge: a hint.
        swap_ab: a hint.
        pack_gqa: a hint.
        cat_gqa: a hint.
        sparse_load: a hint.
        index_attn: a hint, that keys are given by index_attn_indices.
        swap_bwd_qk_loop: a hint.
        return_max_logits: whether to return the largest scaled, uncapped score of every head.
        skip_overlap_check: whether to trust that no (query, key) pair is covered twice; by default what
            ``MAGI_ATTENTION_SKIP_OVERLAP_CHECK`` says.

    Returns:
        out ``[tq, hq, dv]`` in q's dtype, and the meta with lse ``[tq, hq]`` (-inf for rows without keys and sink) and
        max_logits ``[hq]`` (or None), both float32, or float64 for float64 inputs.

    Raises:
        ValueError: If an argument cannot be right, or if two slices keep a common pair; the message names both.
        TypeError: If ranges or types are not tensors of integers, or sm_margin is no integer.
        RuntimeError: If no installed backend can serve the call.
    """
    if (q_ranges is None) == (index_attn_indices is None):
        raise MagiValueError("give either q_ranges with k_ranges, or index_attn_indices, and not both")
    if (q_block_size, k_block_size) != (1, 1):
        raise MagiValueError(f"q_block_size and k_block_size must be 1, got {q_block_size} and {k_block_size}")
    if index_attn_indices is not None:
        if k_ranges is not None or attn_type_map is not None:
            raise MagiValueError("k_ranges and attn_type_map belong to q_ranges, not to index_attn_indices")
        return attend_by_indices(
            q,
            k,
            v,
            index_attn_indices,
            sink=sink,
            sink_layout=sink_layout,
            softmax_scale=softmax_scale,
            softcap=softcap,
            deterministic=deterministic,
            sm_margin=sm_margin,
            return_max_logits=return_max_logits,
            backend=None,
            backward_backend=None,
        )
    if index_attn:
        raise MagiValueError("index_attn says that keys are given by index_attn_indices, which are missing")
    if q_ranges is None or k_ranges is None:
        raise MagiValueError("k_ranges must be given together with q_ranges")
    if swap_bwd_qk_loop and (deterministic or disable_bwd_dkv_atomic_reduction):
        raise MagiValueError(
            "swap_bwd_qk_loop cannot be combined with deterministic or disable_bwd_dkv_atomic_reduction"
        )
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling:
        check_tensors(q, k, v)  # before ranges and sink, which are held against their rows
        if sink is not None:
            check_sink(sink, q.shape[0], q.shape[1], sink_layout)
    if is_compiling or is_one_operator(q):
        return flex_flash_attn_compiled(
            q,
            k,
            v,
            q_ranges,
            k_ranges,
            attn_type_map,
            sink,
            sink_layout,
            softmax_scale,
            softcap,
            deterministic,
            sm_margin,
            return_max_logits,
            skip_overlap_check,
        )
    hints = {
        "disable_fwd_atomic_reduction": disable_fwd_atomic_reduction,
        "disable_bwd_dkv_atomic_reduction": disable_bwd_dkv_atomic_reduction,
        "ref_block_size": ref_block_size,
        "max_seqlen_q": max_seqlen_q,
        "auto_range_merge": auto_range_merge,
        "swap_ab": swap_ab,
        "pack_gqa": pack_gqa,
        "cat_gqa": cat_gqa,
        "sparse_load": sparse_load,
        "swap_bwd_qk_loop": swap_bwd_qk_loop,
    }
    given = {name: value for name, value in hints.items() if value not in (None, False)}
    if given:
        logger.debug("flex_flash_attn_func: hints without effect on the result: %s", given)
    job = make_job(
        q,
        k,
        v,
        slices_from_tensors(q_ranges, k_ranges, attn_type_map, q.shape[0], k.shape[0], skip_overlap_check),
        softmax_scale=softmax_scale,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_max_logits=return_max_logits,
        backends=configured_backends(),
    )
    return attend_on_one_device(q, k, v, sink, job)
