# SPDX-License-Identifier: Apache-2.0
"""Sparse attention whose keys a small indexer selects, trained on one device.

Every query attends to the keys of the largest index scores among those before it. The indexer learns to agree with the
attention of all heads: its loss is the divergence between both distributions over the selected keys, printed beside
that of even weights.

    python examples/index_attention.py
"""

import torch
from torch import Tensor, nn

from magi_attention.functional import flex_flash_attn_func

TOKENS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, INDEX_DIM, SELECTED = 256, 128, 8, 1, 64, 16, 32


class SparseLayer(nn.Module):
    """Attention to selected keys with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.index = nn.Linear(WIDTH, 2 * INDEX_DIM, bias=False)
        self.output = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)

    def select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of the best keys ``[t, 1, SELECTED]``, -1 where there are fewer, and their scores."""
        query, key = self.index(x.detach()).chunk(2, -1)
        scores = query @ key.T / INDEX_DIM**0.5
        later = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
        best, keys = scores.masked_fill(later, -torch.inf).topk(SELECTED)
        return keys.masked_fill(best == -torch.inf, -1).int()[:, None], best

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's output, the indexer's loss, and what it would be for even weights; x is ``[t, WIDTH]``."""
        q, k, v = self.project(x).unflatten(-1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], -2)
        indices, scores = self.select(x)
        out, meta = flex_flash_attn_func(q, k, v, index_attn_indices=indices)
        lse = meta.lse
        assert lse is not None
        target = self.attention(q.detach(), k.detach(), lse.detach(), indices)
        return x + self.output(out.flatten(1)), divergence(target, scores), divergence(target, scores.clamp(0, 0))

    def attention(self, q: Tensor, k: Tensor, lse: Tensor, indices: Tensor) -> Tensor:
        """The mean of all heads' probabilities of the selected keys ``[t, SELECTED]``."""
        keys = k[indices.clamp(min=0)[:, 0].long(), 0]
        attention = torch.exp(torch.einsum("thd,tnd->thn", q, keys) * HEAD_DIM**-0.5 - lse[..., None])
        return attention.mean(1).masked_fill(indices[:, 0] < 0, 0.0)


def divergence(target: Tensor, scores: Tensor) -> Tensor:
    """How far the softmax of ``scores``, where there is a target, is from ``target`` (Kullback and Leibler)."""
    log_index = scores.masked_fill(target == 0, -torch.inf).log_softmax(-1).masked_fill(target == 0, 0.0)
    return (target * (target.clamp(min=1e-9).log() - log_index)).sum(-1).mean()


def main() -> None:
    """Train, and print the first losses and the last."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    layer = SparseLayer().to(device)
    x = torch.randn(TOKENS, WIDTH, device=device)
    wanted = x.roll(3, 0)  # every token is to tell the third before it
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    for step in range(60):
        with torch.autocast(device, dtype, enabled=device == "cuda"):
            out, index_loss, even = layer(x)
        loss = nn.functional.mse_loss(out.float(), wanted)
        optimizer.zero_grad()
        (loss + index_loss).backward()
        optimizer.step()
        if step in (0, 59):
            index = f"indexer {index_loss.item():.4f}, even weights {even.item():.4f}"
            print(f"step {step:2}: loss {loss.item():.4f}, {index}")


if __name__ == "__main__":
    main()
