# SPDX-License-Identifier: Apache-2.0
"""Attention over packed documents, forward and backward, on this process alone or spread over several.

    python examples/quickstart.py
    torchrun --nproc-per-node 4 examples/quickstart.py

Both print the same numbers.
"""

import os

import torch
import torch.distributed as dist

from magi_attention.api import AttnRanges, calc_attn, dispatch, get_position_ids, magi_attn_flex_key, undispatch


def main() -> None:
    """Project a random sequence, let its documents attend to themselves, and differentiate."""
    distributed = "WORLD_SIZE" in os.environ  # set by torchrun
    if distributed:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    total, heads, kv_heads, head_dim = 1000, 8, 2, 64
    x = torch.randn(total, 512)  # the whole sequence, the same on every rank
    project = torch.nn.Linear(512, (heads + 2 * kv_heads) * head_dim)

    # Two packed documents, each causal. The key stands for the plan of who computes and who sends what.
    documents = AttnRanges.from_ranges([(0, 600), (600, 1000)])
    key = magi_attn_flex_key(
        q_ranges=documents,
        k_ranges=documents,
        attn_mask_type="causal",
        total_seqlen_q=total,
        total_seqlen_k=total,
        num_heads_q=heads,
        num_heads_kv=kv_heads,
        head_dim=head_dim,
        pad_size=0,
        cp_group_or_mesh=None,  # the default process group or, without one, this process alone
    )
    local_x = dispatch(x, key)  # the rows that this rank holds
    positions = get_position_ids(key)  # their places in the sequence, for rotary embeddings
    q, k, v = project(local_x).unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    out, _ = calc_attn(q, k, v, key)  # over the rows of all ranks; the second result has each row's log-sum-exp
    y = undispatch(out, key)  # the whole sequence again, on every rank
    y.square().mean().backward()

    for parameter in project.parameters():
        if distributed and parameter.grad is not None:
            dist.all_reduce(parameter.grad)  # each rank has the part that comes from its own rows
    gradient_norm = torch.nn.utils.clip_grad_norm_(project.parameters(), float("inf"))
    if not distributed or dist.get_rank() == 0:
        print(f"output {tuple(y.shape)}, norm {y.norm():.4f}; gradient norm {gradient_norm:.6f}")
    print(f"{len(positions)} of the {total} rows were here")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
