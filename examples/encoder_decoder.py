# SPDX-License-Identifier: Apache-2.0
"""Layers of a decoder that attend to their own text, then to an encoder's memory, with nothing moved between them.

Text and memory each have a key for attention to themselves, which lays their rows out over the ranks. The key of the
cross-attention is made between the two layouts. Several texts and their memories are packed into one sequence each.

    python examples/encoder_decoder.py
    torchrun --nproc-per-node 4 examples/encoder_decoder.py

Both print the same numbers.
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


class Attention(nn.Module):
    """Attention of rows ``x`` to rows ``y`` with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.to_q = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.to_kv = nn.Linear(WIDTH, 2 * KV_HEADS * HEAD_DIM, bias=False)
        self.output = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor, key: DistAttnRuntimeKey) -> torch.Tensor:
        """Attend as the key's mask says; ``x`` and ``y`` are this rank's rows, ``[n_local, WIDTH]`` each."""
        q = self.to_q(self.norm(x)).unflatten(-1, (HEADS, HEAD_DIM))
        k, v = self.to_kv(self.norm(y)).unflatten(-1, (2 * KV_HEADS, HEAD_DIM)).chunk(2, dim=1)
        return x + self.output(calc_attn(q, k, v, key)[0].flatten(1))


def main() -> None:
    """Run one layer of an encoder and two of a decoder, and differentiate."""
    distributed = "WORLD_SIZE" in os.environ  # set by torchrun
    if distributed:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    encode, *decode = layers = nn.ModuleList(Attention() for _ in range(5))

    texts, memories = torch.tensor([0, 300, 420, 700]), torch.tensor([0, 900, 1000, 1900])  # where documents end
    sizes = (HEADS, KV_HEADS, HEAD_DIM)
    within_text = magi_attn_varlen_key(texts, texts, *sizes, pad_size=0, cp_group_or_mesh=None, causal=True)
    within_memory = magi_attn_varlen_key(memories, memories, *sizes, pad_size=0, cp_group_or_mesh=None)
    to_memory = make_varlen_key_for_new_mask_after_dispatch(
        texts, memories, within_text, key_for_kv_dispatch=within_memory
    )

    text = dispatch(torch.randn(int(texts[-1]), WIDTH), within_text)
    memory = dispatch(torch.randn(int(memories[-1]), WIDTH), within_memory)
    memory = encode(memory, memory, within_memory)
    for own, cross in zip(decode[::2], decode[1::2], strict=True):
        text = own(text, text, within_text)
        text = cross(text, memory, to_memory)
    loss = undispatch(text, within_text).square().mean()
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
