# SPDX-License-Identifier: Apache-2.0
"""The reference backend: attention in plain torch, on any device and in every floating dtype up to float64.

It is the specification that other backends are tested against, and what a CPU runs. Blocks of queries meet blocks of
keys under an online softmax (Milakov and Gimelshein, 2018; Dao et al., 2022), so memory is bounded by the block and
work by the mask's area. All arithmetic is in the accumulation dtype, float64 for float64 inputs and float32 otherwise,
and so are all results: merging stages loses nothing. Nothing depends on the order of threads: the same call gives the
same bits. On a GPU, float32 products follow PyTorch's own setting (``torch.set_float32_matmul_precision``).

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys; g = hq / hk query heads share a key head. Inside, the
query heads of a key head are interleaved with the queries, ``[hk, tq * g, d]``, so that one batched product serves
them all and no key is repeated.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.common.logsumexp import accumulation_dtype
from magi_attention.common.slices import SliceTable
from magi_attention.kernels.blocks import Block, cut_into_blocks
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, AttentionResult, Support

# Scores held at once, over all heads: what a core's cache holds, or what fills a GPU.
SCORES_PER_BLOCK = {"cpu": 1 << 18, "gpu": 1 << 25}
ROWS_PER_BLOCK = {"cpu": 128, "gpu": 1024}
TFLOPS = {"cpu": 0.05, "gpu": 5.0}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Scores(NamedTuple):
    """The scores of one block, ``[hk, rows * g, columns]``, -inf where the mask keeps nothing.

    ``tanh`` is that of the capped score, needed for its derivative; None without a cap.
    """

    masked: Tensor
    tanh: Tensor | None
    largest_uncapped: Tensor | None


class ReferenceBackend:
    """See :class:`magi_attention.kernels.protocol.KernelBackend`. Results are in the accumulation dtype."""

    name = "reference"

    def supports(self, request: AttentionRequest) -> Support:
        """See the protocol."""
        if request.dtype not in DTYPES:
            return Support(False, f"{request.dtype} is not one of {', '.join(map(str, DTYPES))}")
        return Support(True)

    def expected_tflops(self, request: AttentionRequest) -> float:
        """See the protocol. Of the right order only: any kernel is faster."""
        return TFLOPS["cpu" if request.device.type == "cpu" else "gpu"]

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionResult:
        """See the protocol."""
        num_heads, dim_v = q.shape[1], v.shape[2]
        group = num_heads // k.shape[1]
        keys, values = _by_head(k), _by_head(v)
        queries = _by_head(q, group)
        out = queries.new_zeros(*queries.shape[:2], dim_v)
        # Starting from the smallest finite number instead of -inf keeps every difference of maxima defined.
        largest = queries.new_full(queries.shape[:2], torch.finfo(queries.dtype).min)
        total = torch.zeros_like(largest)
        max_logits = queries.new_full((keys.shape[0], group), -torch.inf) if call.max_logits else None
        for block in _blocks(call.slices, num_heads, q.device):
            rows = slice(block.q0 * group, block.q1 * group)
            columns = slice(block.k0, block.k1)
            scores = _scores(queries[:, rows], keys[:, columns], block, group, call)
            _accumulate(scores.masked, values[:, columns], out[:, rows], largest[:, rows], total[:, rows])
            if max_logits is not None and scores.largest_uncapped is not None:
                max_logits = torch.maximum(max_logits, scores.largest_uncapped)
        empty = total == 0
        lse = (largest + total.log()).masked_fill_(empty, -torch.inf)
        out /= total.masked_fill_(empty, 1.0)[..., None]
        result = max_logits.flatten() if max_logits is not None else None
        return AttentionResult(_by_token(out, group), _by_token(lse[..., None], group)[..., 0], result)

    @torch.no_grad()
    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        call: AttentionCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the protocol."""
        num_heads = q.shape[1]
        group = num_heads // k.shape[1]
        keys, values, douts = _by_head(k), _by_head(v), _by_head(dout, group)
        queries = _by_head(q, group)
        dtype = queries.dtype
        # dscore = p * (dout·v - delta), with what the protocol calls rowsum(dout * out) - dlse as delta.
        delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
        if dlse is not None:
            delta -= dlse.to(dtype)
        delta = _by_head(delta[..., None], group)
        # exp(score - inf) = 0: rows without keys, whose lse is -inf, have no gradient.
        row_lse = _by_head(lse.to(dtype).masked_fill(lse == -torch.inf, torch.inf)[..., None], group)
        dqueries, dkeys, dvalues = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for block in _blocks(call.slices, num_heads, q.device):
            rows = slice(block.q0 * group, block.q1 * group)
            columns = slice(block.k0, block.k1)
            scores = _scores(queries[:, rows], keys[:, columns], block, group, call)
            probability = scores.masked.sub_(row_lse[:, rows]).exp_()
            dvalues[:, columns].baddbmm_(probability.mT, douts[:, rows])
            dscores = torch.baddbmm(delta[:, rows], douts[:, rows], values[:, columns].mT, beta=-1)
            dscores *= probability
            if scores.tanh is not None:
                dscores *= 1 - scores.tanh.square()
            dqueries[:, rows].baddbmm_(dscores, keys[:, columns], alpha=call.softmax_scale)
            dkeys[:, columns].baddbmm_(dscores.mT, queries[:, rows], alpha=call.softmax_scale)
        return _by_token(dqueries, group), _by_token(dkeys), _by_token(dvalues)


BACKEND = ReferenceBackend()


def _by_head(x: Tensor, group: int = 1) -> Tensor:
    """``[t, h, d]`` to a contiguous ``[h / group, t * group, d]`` copy in the accumulation dtype."""
    num_tokens, num_heads, dim = x.shape
    per_head = x.view(num_tokens, num_heads // group, group, dim).permute(1, 0, 2, 3)
    target = torch.empty(per_head.shape, dtype=accumulation_dtype(x), device=x.device)
    return target.copy_(per_head).view(num_heads // group, num_tokens * group, dim)


def _by_token(x: Tensor, group: int = 1) -> Tensor:
    """The inverse of :func:`_by_head`, contiguous."""
    num_heads, length, dim = x.shape
    per_token = x.view(num_heads, length // group, group, dim).permute(1, 0, 2, 3)
    return per_token.contiguous().view(length // group, num_heads * group, dim)


def _blocks(slices: SliceTable, num_heads: int, device: torch.device) -> list[Block]:
    kind = "cpu" if device.type == "cpu" else "gpu"
    max_rows = ROWS_PER_BLOCK[kind]
    max_columns = max(SCORES_PER_BLOCK[kind] // (num_heads * max_rows), 128)
    key = ("reference blocks", max_rows, max_columns)
    return slices.derived(key, lambda: cut_into_blocks(slices, max_rows, max_columns))


def _scores(queries: Tensor, keys: Tensor, block: Block, group: int, call: AttentionCall) -> _Scores:
    """Multiply the block's queries ``[hk, rows * g, d]`` by its keys ``[hk, columns, d]``; scale, cap and mask."""
    scores = torch.baddbmm(queries.new_empty(()), queries, keys.mT, beta=0, alpha=call.softmax_scale)
    hidden = _hidden_pairs(block, scores.device)[:, None, :] if block.masked else None
    # One row per (query, head of the group): the same mask for each of them.
    per_query = scores.view(scores.shape[0], -1, group, scores.shape[2])
    largest_uncapped = None
    if call.max_logits:
        kept = per_query if hidden is None else per_query.masked_fill(hidden, -torch.inf)
        largest_uncapped = kept.amax((1, 3))
    tanh = None
    if call.softcap > 0:
        tanh = torch.tanh_(scores.div_(call.softcap))
        scores = tanh * call.softcap
        per_query = scores.view_as(per_query)
    if hidden is not None:
        per_query.masked_fill_(hidden, -torch.inf)
    return _Scores(scores, tanh, largest_uncapped)


def _hidden_pairs(block: Block, device: torch.device) -> Tensor:
    """The pairs ``[rows, columns]`` of a block that its diagonals cut off, as bool."""
    row = torch.arange(block.q0, block.q1, device=device)
    diagonal = torch.arange(block.k0, block.k1, device=device) - row[:, None]
    return (diagonal < block.d0) | (diagonal > block.d1)


def _accumulate(scores: Tensor, values: Tensor, out: Tensor, largest: Tensor, total: Tensor) -> None:
    """Take one block into the online softmax of its rows, in place; ``scores`` is used up.

    ``total`` and ``out`` are the sums of ``exp(score - largest)`` and of the same times the values.
    """
    new_largest = torch.maximum(largest, scores.amax(-1))
    shrink = torch.exp(largest - new_largest)
    weight = scores.sub_(new_largest[..., None]).exp_()
    total.mul_(shrink).add_(weight.sum(-1))
    out.mul_(shrink[..., None]).baddbmm_(weight, values)
    largest.copy_(new_largest)
