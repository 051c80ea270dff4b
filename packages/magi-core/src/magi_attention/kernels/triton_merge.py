# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of :func:`magi_attention.kernels.merge.merge_into`; imported only where it is launched."""

import triton
import triton.language as tl
from torch import Tensor

from magi_attention.utils.triton import launch, next_power_of_2

_ELEMENTS_PER_PROGRAM = 2048


@triton.jit(do_not_specialize=("num_pairs",))
def _merge(  # type: ignore[no-untyped-def]
    out,
    lse,
    out2,
    lse2,
    num_pairs,
    num_heads,
    dim,
    out_token,
    out_head,
    lse_token,
    lse_head,
    out2_token,
    out2_head,
    lse2_token,
    lse2_head,
    PAIRS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Each program merges ``PAIRS`` pairs of a token and a head."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    token, head = (pair // num_heads).to(tl.int64), (pair % num_heads).to(tl.int64)
    inside = pair < num_pairs
    nothing = float("-inf")
    at = lse + token * lse_token + head * lse_head
    first = tl.load(at, mask=inside, other=nothing)
    second = tl.load(lse2 + token * lse2_token + head * lse2_head, mask=inside, other=nothing)
    changes = second != nothing
    largest = tl.where(changes, tl.maximum(first, second), 0.0)
    share, share2 = tl.exp(first - largest), tl.exp(second - largest)
    total = share + share2
    column = tl.arange(0, DIM)
    used = changes[:, None] & (column < dim)[None, :]
    is_old = used & (first != nothing)[:, None]
    place = out + (token * out_token + head * out_head)[:, None] + column[None, :]
    place2 = out2 + (token * out2_token + head * out2_head)[:, None] + column[None, :]
    old = tl.load(place, mask=is_old, other=0.0).to(tl.float32)
    new = tl.load(place2, mask=used, other=0.0).to(tl.float32)
    scale = 1.0 / tl.where(changes, total, 1.0)
    merged = old * (share * scale)[:, None] + new * (share2 * scale)[:, None]
    tl.store(place, merged.to(out.dtype.element_ty), mask=used)
    tl.store(at, largest + tl.log(tl.where(changes, total, 1.0)), mask=changes)


def launch_merge(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor, key: object = None) -> None:
    """Merge ``out2`` ``[tq, hq, dv]``, ``lse2`` ``[tq, hq]`` into ``out``, ``lse``; the last stride of outputs is 1."""
    num_tokens, num_heads, dim = out.shape
    width = next_power_of_2(dim)
    pairs = max(_ELEMENTS_PER_PROGRAM // width, 1)
    num_pairs = num_tokens * num_heads
    if not num_pairs:
        return
    strides = (*out.stride()[:2], *lse.stride(), *out2.stride()[:2], *lse2.stride())
    tensors, fixed = (out, lse, out2, lse2), (num_heads, dim, *strides)
    launch(
        _merge,
        (-(-num_pairs // pairs), 1, 1),
        tensors,
        (num_pairs,),
        fixed,
        {"PAIRS": pairs, "DIM": width},
        key,
        num_warps=4,
    )
