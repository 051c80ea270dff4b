# SPDX-License-Identifier: Apache-2.0
"""A small Llama-style transformer whose attention is given by the caller.

Shape suffixes: N tokens (of this rank), D model width, H heads (of queries, or of keys and values), K head size,
F feed-forward width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(q [N, hq, K], k [N, hk, K], v [N, hk, K]) -> [N, hq, K]``."""


@dataclass(frozen=True)
class ModelConfig:
    """The model's sizes."""

    layers: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int = 256
    rope_base: float = 10_000.0

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.dim // self.heads

    @property
    def feed_forward(self) -> int:
        """Width of the SwiGLU: 8/3 of the model's, rounded up to a multiple of 32."""
        return -(-8 * self.dim // 3 // 32) * 32


def rotary_tables(position_ids_N: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[N, 1, head_dim / 2]`` of rotary position embedding (RoFormer, arXiv 2104.09864)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=position_ids_N.device) / head_dim
    angle = position_ids_N[:, None, None].double() * base**-exponent
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_NHK: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs ``(i, i + K/2)`` of every head by the angles of the row."""
    cos, sin = tables
    a, b = x_NHK.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)
        self.key = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.value = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.output = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)

    def forward(self, x_ND: Tensor, tables: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Mix the rows as ``attend`` says."""
        q, k, v = (f(x_ND).unflatten(-1, (-1, self.head_dim)) for f in (self.query, self.key, self.value))
        return self.output(attend(rotate(q, tables), rotate(k, tables), v).flatten(1))


class SwiGLU(nn.Module):
    """The gated feed-forward layer of Llama (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.feed_forward, bias=False)
        self.up = nn.Linear(config.dim, config.feed_forward, bias=False)
        self.down = nn.Linear(config.feed_forward, config.dim, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Transform each row by itself."""
        return self.down(F.silu(self.gate(x_ND)) * self.up(x_ND))


class Block(nn.Module):
    """Attention and feed-forward, each behind an RMSNorm and with a residual connection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.feed_forward = SwiGLU(config)

    def forward(self, x_ND: Tensor, tables: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Transform the residual stream."""
        x_ND = x_ND + self.attention(self.attention_norm(x_ND), tables, attend)
        return x_ND + self.feed_forward(self.feed_forward_norm(x_ND))


class Llama(nn.Module):
    """A decoder over the rows that one rank holds; the embedding is also the output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_N: Tensor, position_ids_N: Tensor, attend: Attend) -> Tensor:
        """Return logits ``[N, vocabulary]``; ``position_ids_N`` are the rows' places in the packed sequence."""
        x_ND = self.embedding(tokens_N)
        tables = rotary_tables(position_ids_N, self.config.head_dim, self.config.rope_base, x_ND.dtype)
        for block in self.blocks:
            x_ND = block(x_ND, tables, attend)
        return F.linear(self.norm(x_ND), self.embedding.weight)
