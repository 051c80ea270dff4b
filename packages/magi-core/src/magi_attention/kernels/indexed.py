# SPDX-License-Identifier: Apache-2.0
"""Index attention in plain torch: every query attends to keys of its own, given by their rows.

It is what serves passes that no installed backend has a kernel for. Keys and values are gathered for some queries at a
time, so memory is bounded. Arithmetic is in the accumulation dtype, float64 for float64 inputs and float32 otherwise.

Shape suffixes: t tokens, h heads, d head dim, n entries of a list; q queries, k keys; g = hq / hk query heads share a
key head and its lists.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.common.logsumexp import accumulation_dtype
from magi_attention.kernels.protocol import AttentionResult, IndexCall

BYTES_AT_A_TIME = {"cpu": 24 << 20, "gpu": 320 << 20}
"""Of gathered keys and values; with what is made of them some three times as much is in use."""


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
        # Row 0 stands in for what is hidden: what it holds, which may not be finite, must not get into sums as 0 * inf.
        keys, values = (x[rows, heads].to(dtype).masked_fill_(ended[..., None], 0.0) for x in (k, v))
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
        places = part.rows * k.shape[1] + heads
        _add_rows(dk, places, dscores.mT @ part.q)
        _add_rows(dv, places, probabilities.mT @ part_dout)
    return dq, dk, dv


def _add_rows(into: Tensor, places: Tensor, terms: Tensor) -> None:
    """Add ``terms [..., d]`` to the rows ``places`` of ``into [tk, hk, d]``, counted over both dimensions.

    Rows that many queries name get a sum whose order is fixed: on a GPU ``index_put_`` sorts, on a CPU it adds by
    several threads as they come, where ``scatter_add_`` does not.
    """
    rows, places, terms = into.flatten(0, 1), places.flatten(), terms.flatten(0, -2)
    if into.is_cuda:
        rows.index_put_((places,), terms, accumulate=True)
    else:
        rows.scatter_add_(0, places[:, None].expand_as(terms), terms)
