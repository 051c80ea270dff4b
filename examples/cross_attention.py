# SPDX-License-Identifier: Apache-2.0
"""Decoder rows that attend to an encoder's memory: queries and keys of two sequences, each spread over the ranks.

Three texts are packed into one sequence and the three memories that they belong to, of images or speech, say, into
another. Every text attends to its own memory.

    python examples/cross_attention.py
    torchrun --nproc-per-node 4 examples/cross_attention.py

Both print the same numbers.
"""

import os

import torch
import torch.distributed as dist

from magi_attention.api import calc_attn, dispatch, get_position_ids, magi_attn_varlen_key, undispatch
from magi_attention.common.enum import AttnRole


def main() -> None:
    """Project random texts to queries and random memories to keys and values, attend, and differentiate."""
    distributed = "WORLD_SIZE" in os.environ  # set by torchrun
    if distributed:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    heads, kv_heads, head_dim, width = 8, 2, 32, 128
    text, memory = torch.randn(700, width), torch.randn(1900, width)  # whole, the same on every rank
    to_queries = torch.nn.Linear(width, heads * head_dim)
    to_keys_and_values = torch.nn.Linear(width, 2 * kv_heads * head_dim)

    key = magi_attn_varlen_key(
        cu_seqlens_q=[0, 300, 420, 700],  # where the texts start and end
        cu_seqlens_k=[0, 900, 1000, 1900],  # the same of their memories
        num_heads_q=heads,
        num_heads_kv=kv_heads,
        head_dim=head_dim,
        pad_size=0,
        cp_group_or_mesh=None,  # the default process group or, without one, this process alone
        is_same_source=False,  # queries and keys are dealt to the ranks each for itself
    )
    # What belongs to the memory says so; everything else goes with the queries.
    local_text, local_memory = dispatch(text, key), dispatch(memory, key, attn_role=AttnRole.KEY)
    q = to_queries(local_text).unflatten(-1, (heads, head_dim))
    k, v = to_keys_and_values(local_memory).unflatten(-1, (2 * kv_heads, head_dim)).split(kv_heads, dim=1)
    out, _ = calc_attn(q, k, v, key)  # rows of the text
    y = undispatch(out, key)
    y.square().mean().backward()

    parameters = [*to_queries.parameters(), *to_keys_and_values.parameters()]
    for parameter in parameters:
        if distributed and parameter.grad is not None:
            dist.all_reduce(parameter.grad)  # each rank has the part that comes from its own rows
    gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf"))
    if not distributed or dist.get_rank() == 0:
        print(f"output {tuple(y.shape)}, norm {y.norm():.4f}; gradient norm {gradient_norm:.6f}")
    num_text, num_memory = (len(get_position_ids(key, attn_role=role)) for role in (AttnRole.QUERY, AttnRole.KEY))
    print(f"{num_text} rows of the text and {num_memory} of the memory were here")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
