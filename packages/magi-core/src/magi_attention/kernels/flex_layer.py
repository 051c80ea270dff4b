# SPDX-License-Identifier: Apache-2.0
"""One layer of a mask by FlexAttention, and how it is compiled.

Queries and keys are padded to whole tiles, and only the numbers of tiles are left dynamic. So one kernel serves every
mask and length; dtype, head counts, head dims, softmax scale, softcap and the number of intervals (1, 2, 4 or 8) are
compiled in, forward and backward apart.

Shape suffixes: h heads, d head dim; q queries, k keys; M and N blocks of queries and of keys.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from magi_attention.kernels.flex_tables import BLOCK, LayerTables

# Variants of one compiled function: far beyond what a program needs, but PyTorch's default of 8 is not.
MAX_COMPILATIONS = 256


class LayerResult(NamedTuple):
    """One layer's ``out`` ``[hq, M * BLOCK, dv]`` and, float32 ``[hq, M * BLOCK]``, its lse and largest scores."""

    out: Tensor
    lse: Tensor
    max_scores: Tensor | None


AttendLayer = Callable[[Tensor, Tensor, Tensor, LayerTables, float, float, bool], LayerResult]


def attend_layer(
    q: Tensor, k: Tensor, v: Tensor, layer: LayerTables, softmax_scale: float, softcap: float, max_scores: bool
) -> LayerResult:
    """Compute one layer by FlexAttention. Meant to be compiled: run eagerly, it builds the dense score matrix.

    Args:
        q: ``[hq, M, BLOCK, d]``.
        k: ``[hk, N, BLOCK, d]``.
        v: ``[hk, N, BLOCK, dv]``.
        layer: what the queries see.
        softmax_scale: factor on the scores.
        softcap: cap on the scores, 0 for none.
        max_scores: whether to return the largest score of each row.
    """
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    bounds = layer.bounds

    def is_seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key >= bounds[0, query]) & (key < bounds[1, query])
        for row in range(2, bounds.shape[0], 2):
            seen = seen | ((key >= bounds[row, query]) & (key < bounds[row + 1, query]))
        return seen

    def cap(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    # Merged only here, so that a compiler knows the lengths to be multiples of BLOCK and drops the boundary checks.
    q, k, v = (x.flatten(1, 2)[None] for x in (q, k, v))
    block_mask = BlockMask(
        seq_lengths=(q.shape[2], k.shape[2]),
        BLOCK_SIZE=(BLOCK, BLOCK),
        kv_num_blocks=layer.kv_num_blocks,
        kv_indices=layer.kv_indices,
        full_kv_num_blocks=layer.full_kv_num_blocks,
        full_kv_indices=layer.full_kv_indices,
        q_num_blocks=layer.q_num_blocks,
        q_indices=layer.q_indices,
        full_q_num_blocks=layer.full_q_num_blocks,
        full_q_indices=layer.full_q_indices,
        mask_mod=is_seen,
    )
    # The decoding kernel for few queries knows less than the general one. Float32 stays float32, whatever the process
    # allows elsewhere: rounding products to TF32 would be a silent loss.
    options: Any = {"FORCE_USE_FLEX_ATTENTION": True}
    if q.dtype == torch.float32:
        options["FLOAT32_PRECISION"] = "'ieee'"
    out, aux = flex_attention(
        q,
        k,
        v,
        score_mod=cap if softcap > 0 else None,
        block_mask=block_mask,
        scale=softmax_scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=options,
        return_aux=AuxRequest(lse=True, max_scores=max_scores),
    )
    assert aux.lse is not None
    return LayerResult(out[0], aux.lse[0], None if aux.max_scores is None else aux.max_scores[0])


@cache
def _compiled() -> AttendLayer:
    return torch.compile(attend_layer, fullgraph=True)


def attend_compiled(
    q: Tensor, k: Tensor, v: Tensor, layer: LayerTables, softmax_scale: float, softcap: float, max_scores: bool
) -> LayerResult:
    """Compute :func:`attend_layer`, compiled at the first call of each kind.

    Raises:
        RuntimeError: If there are too many kinds.
    """
    import torch._dynamo.exc  # costly, and only needed where something is compiled

    for x in (q, k, v):
        torch._dynamo.maybe_mark_dynamic(x, 1)
    for table in layer[:-1]:
        torch._dynamo.maybe_mark_dynamic(table, list(range(2, table.ndim)))
    torch._dynamo.maybe_mark_dynamic(layer.bounds, 1)
    try:
        with torch._dynamo.config.patch(recompile_limit=MAX_COMPILATIONS, automatic_dynamic_shapes=False):
            return _compiled()(q, k, v, layer, softmax_scale, softcap, max_scores)
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise RuntimeError(
            f"backend 'flex' has compiled {MAX_COMPILATIONS} kinds of calls, and compiles no more: every softmax_scale "
            "and softcap is one. Multiply q by a factor that changes from step to step, and keep softmax_scale"
        ) from error
