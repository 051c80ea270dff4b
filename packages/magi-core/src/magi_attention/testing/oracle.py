# SPDX-License-Identifier: Apache-2.0
"""Dense attention: the whole score matrix at once, differentiable, as independent of the kernels as can be.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys; s sinks.
"""

import torch
from torch import Tensor

from magi_attention.common.slices import SliceTable


def dense_mask(slices: SliceTable, num_q: int, num_k: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the bool mask ``[num_q, num_k]`` of the pairs that any slice keeps, written down cell by cell."""
    mask = torch.zeros(num_q, num_k, dtype=torch.bool)
    for q0, q1, k0, k1, kind in slices.rows.tolist():
        row = torch.arange(q0, q1)[:, None]
        column = torch.arange(k0, k1)[None, :]
        kept = torch.ones(max(q1 - q0, 0), max(k1 - k0, 0), dtype=torch.bool)
        if kind in (1, 3):  # bottom-right aligned
            kept &= column <= row + (k1 - q1)
        if kind in (2, 3):  # top-left aligned
            kept &= column >= row + (k0 - q0)
        mask[q0:q1, k0:k1] |= kept
    return mask.to(device)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend densely in the dtype of the inputs: what plain PyTorch computes.

    Args:
        q: ``[tq, hq, d]``.
        k: ``[tk, hk, d]``, with hq a multiple of hk.
        v: ``[tk, hk, dv]``.
        mask: ``[tq, tk]`` bool, True where a pair counts.
        softmax_scale: factor on the scores; ``d ** -0.5`` if None.
        softcap: if positive, scores become ``softcap * tanh(score / softcap)``.
        sink: ``[s, hq]`` or ``[tq, s, hq]`` logits of extra keys whose values are zero.

    Returns:
        out ``[tq, hq, dv]`` (0 for rows without keys), lse ``[tq, hq]`` (-inf for rows without keys and sink) and the
        largest scaled, uncapped score per head ``[hq]`` (-inf without any pair, not differentiable).
    """
    num_q, num_heads = q.shape[:2]
    group = num_heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    masked = scores.masked_fill(~mask, -torch.inf)
    no_pair = scores.new_full((num_heads, num_q, 1), -torch.inf)
    max_logits = torch.cat([masked.flatten(1), scores.new_full((num_heads, 1), -torch.inf)], 1).detach().amax(1)
    if softcap > 0:
        masked = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
    if sink is not None:
        per_row = sink.expand(num_q, *sink.shape[-2:])
        masked = torch.cat([masked, per_row.permute(2, 0, 1).to(masked.dtype)], -1)
    largest = torch.cat([masked, no_pair], -1).detach().amax(-1, keepdim=True)
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    weight = torch.exp(masked - largest)
    total = weight.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    out = torch.einsum("hqk,khd->qhd", (weight / total)[..., : k.shape[0]], v)
    lse = (total.log() + largest).masked_fill(empty, -torch.inf)
    return out, lse.squeeze(-1).T, max_logits


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slices: SliceTable,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend over ``slices`` in float64: the truth that everything else is measured against.

    Arguments and results are those of :func:`masked_attention`, whatever the inputs' dtype all computed and returned in
    float64. Gradients flow to q, k, v and sink, through out and lse.
    """
    mask = dense_mask(slices, q.shape[0], k.shape[0], q.device)
    sink64 = None if sink is None else sink.double()
    return masked_attention(
        q.double(), k.double(), v.double(), mask, softmax_scale=softmax_scale, softcap=softcap, sink=sink64
    )
