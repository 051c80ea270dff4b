# SPDX-License-Identifier: Apache-2.0
"""Layers that look at whole documents, and between them layers with a sliding window, over one layout.

The first key decides which rank holds which rows. A key for another mask is made from it, so that both take the same
local tensors and nothing has to be moved between layers.

    python examples/second_mask.py
    torchrun --nproc-per-node 4 examples/second_mask.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn

from magi_attention.api import (
    DistAttnRuntimeKey,
    calc_attn,
    dispatch,
    magi_attn_varlen_key,
    make_varlen_key_for_new_mask_after_dispatch,
    undispatch,
)

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 32, 128
WINDOW = 64


class Layer(nn.Module):
    """Attention with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.project = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.output = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, key: DistAttnRuntimeKey) -> torch.Tensor:
        """Attend as the key's mask says; ``x`` is ``[n_local, WIDTH]``."""
        q, k, v = self.project(self.norm(x)).unflatten(-1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        return x + self.output(calc_attn(q, k, v, key)[0].flatten(1))


def main() -> None:
    """Run four layers over three documents and differentiate."""
    distributed = "WORLD_SIZE" in os.environ  # set by torchrun
    if distributed:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer() for _ in range(4))

    ends = torch.tensor([0, 500, 640, 1200])  # where the documents start and end
    whole = magi_attn_varlen_key(ends, ends, HEADS, KV_HEADS, HEAD_DIM, pad_size=0, cp_group_or_mesh=None, causal=True)
    window = make_varlen_key_for_new_mask_after_dispatch(ends, ends, whole, window_size=(WINDOW - 1, 0))

    x = dispatch(torch.randn(int(ends[-1]), WIDTH), whole)
    for layer, key in zip(layers, (window, whole, window, whole), strict=True):
        x = layer(x, key)
    loss = undispatch(x, whole).square().mean()
    loss.backward()

    for parameter in layers.parameters():
        if distributed and parameter.grad is not None:
            dist.all_reduce(parameter.grad)  # each rank has the part that comes from its own rows
    gradient_norm = torch.nn.utils.clip_grad_norm_(layers.parameters(), float("inf"))
    if not distributed or dist.get_rank() == 0:
        print(f"loss {loss:.6f}, gradient norm {gradient_norm:.6f}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
