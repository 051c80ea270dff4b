# SPDX-License-Identifier: Apache-2.0
"""Index attention in plain torch: every query attends to keys of its own, given by their rows.

It is what serves calls that no installed backend has a kernel for, and the backward pass of all. Keys and values are
gathered for some queries at a time, so memory is bounded. Arithmetic is in the accumulation dtype, float64 for float64
inputs and float32 otherwise.

Shape suffixes: t tokens, h heads, d head dim, n entries of a list; q queries, k keys; g = hq / hk query heads share a
key head and its lists.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.common.logsumexp import accumulation_dtype
from magi_attention.kernels.protocol import AttentionResult, IndexCall

BYTES_AT_A_TIME = {"cpu": 64 << 20, "gpu": 1 << 30}
"""Of gathered keys and values."""


class _Part(NamedTuple):
    """Some queries with what they attend to.

    Attributes:
        tokens: which queries.
        rows: ``[tq, hk, n]`` int64, rows of k and v; 0 where there is none.
        hidden: ``[tq, hk, 1, n]``, where there is none.
        q: ``[tq, hk, g, d]``.
        k: ``[tq, hk, n, d]``.
        v: ``[tq, hk, n, dv]``.
        scores: ``[tq, hk, g, n]`` scaled and capped, -inf where hidden.
        tanh: that of the capped scores; None without a cap.
        largest: ``[hk, g]`` of the scaled, uncapped scores.
    """

    tokens: slice
    rows: Tensor
    hidden: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    tanh: Tensor | None
    largest: Tensor


def _parts(q: Tensor, k: Tensor, v: Tensor, call: IndexCall) -> Iterator[_Part]:
    dtype, (num_q, num_heads, _) = accumulation_dtype(q), q.shape
    heads = torch.arange(k.shape[1], device=k.device)[:, None]
    bytes_per_query = call.indices[0].numel() * (k.shape[2] + v.shape[2] + num_heads // k.shape[1]) * dtype.itemsize
    step = max(BYTES_AT_A_TIME["cpu" if q.device.type == "cpu" else "gpu"] // max(bytes_per_query, 1), 1)
    for first in range(0, num_q, step):
        tokens = slice(first, min(first + step, num_q))
        indices = call.indices[tokens].long()
        ended = (indices < 0).cumsum(-1) > 0  # a list ends at its first negative entry
        rows = indices.masked_fill(ended, 0)
        queries = q[tokens].to(dtype).unflatten(1, (k.shape[1], -1))
        keys, values = (x[rows, heads].to(dtype) for x in (k, v))
        scores = queries @ keys.mT * call.softmax_scale
        hidden = ended[:, :, None]
        largest = scores.masked_fill(hidden, -torch.inf).amax((0, 3))
        tanh = None
        if call.softcap > 0:
            tanh = torch.tanh(scores / call.softcap)
            scores = call.softcap * tanh
        scores = scores.masked_fill(hidden, -torch.inf)
        yield _Part(tokens, rows, hidden, queries, keys, values, scores, tanh, largest)


@torch.no_grad()
def attend_to_indices(q: Tensor, k: Tensor, v: Tensor, call: IndexCall) -> AttentionResult:
    """Attend q ``[tq, hq, d]`` to the rows of k ``[tk, hk, d]`` and v ``[tk, hk, dv]`` that ``call`` names.

    Returns ``out`` in q's dtype.
    """
    dtype = accumulation_dtype(q)
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=dtype)
    max_logits = lse.new_full((k.shape[1], q.shape[1] // k.shape[1]), -torch.inf)
    for part in _parts(q, k, v, call):
        part_lse = part.scores.logsumexp(-1)
        probabilities = torch.exp(part.scores - part_lse[..., None]).masked_fill_(part.hidden, 0.0)
        out[part.tokens] = (probabilities @ part.v).flatten(1, 2).to(q.dtype)
        lse[part.tokens] = part_lse.flatten(1, 2)
        max_logits = torch.maximum(max_logits, part.largest)
    return AttentionResult(out, lse, max_logits.flatten() if call.max_logits else None)


@torch.no_grad()
def differentiate_by_indices(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    call: IndexCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate :func:`attend_to_indices`; formulas and arguments are those of ``KernelBackend.backward``.

    Returns dq, dk and dv in the accumulation dtype.
    """
    dtype = accumulation_dtype(q)
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(dtype)
    heads = torch.arange(k.shape[1], device=k.device)[:, None]
    for part in _parts(q, k, v, call):

        def by_key_head(x: Tensor, tokens: slice = part.tokens) -> Tensor:
            return x[tokens].to(dtype).unflatten(1, (k.shape[1], -1))

        row_lse = by_key_head(lse)[..., None]
        hidden = part.hidden | (row_lse == -torch.inf)
        probabilities = torch.exp(part.scores - row_lse).masked_fill_(hidden, 0.0)
        part_dout = by_key_head(dout)
        dscores = probabilities * (part_dout @ part.v.mT - by_key_head(delta)[..., None])
        if part.tanh is not None:
            dscores = dscores * (1 - part.tanh.square())
        dscores = dscores * call.softmax_scale
        dq[part.tokens] = (dscores @ part.k).flatten(1, 2)
        # Keys that many queries name get a sum whose order is fixed, on a GPU too.
        places = (part.rows, heads.expand_as(part.rows))
        dk.index_put_(places, dscores.mT @ part.q, accumulate=True)
        dv.index_put_(places, probabilities.mT @ part_dout, accumulate=True)
    return dq, dk, dv
