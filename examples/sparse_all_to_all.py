# SPDX-License-Identifier: Apache-2.0
"""A sparse all-to-all outside attention: tokens travel to the experts that they chose, and results come back summed.

A group cast sends each row to any number of ranks, once to each; the group reduce of the same exchange brings one
result per row back from each of them, and adds them up in a fixed order. On GPUs that reach each other directly the
native transport carries both, if magi-comm-grpcoll is installed and supports them; anywhere else all-to-all does.

    torchrun --nproc-per-node 4 examples/sparse_all_to_all.py
"""

import os
import sys
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm import GroupCollectives, make_collectives
from magi_attention.comm.primitive import exchange_of_splits
from magi_attention.config import DistAttnConfig, RuntimeConfig
from magi_attention.plan.exchange import ExchangeTable

TOKENS, WIDTH, EXPERTS_PER_TOKEN, STEPS = 512, 256, 2, 3


def choose_experts(num_ranks: int) -> Tensor:
    """``[num_ranks, TOKENS, EXPERTS_PER_TOKEN]``: for every token of every rank the ranks of its experts."""
    draw = torch.Generator().manual_seed(0)  # every rank makes the same choice for all, as a planner would
    scores = torch.rand(num_ranks, TOKENS, num_ranks, generator=draw)
    return scores.topk(min(EXPERTS_PER_TOKEN, num_ranks), dim=-1).indices.sort(dim=-1).values


def plan_exchange(chosen: Tensor, rank: int) -> ExchangeTable:
    """Send each token to its experts; tokens from one rank arrive together, in their order there."""
    num_ranks = len(chosen)
    arriving = [(chosen[source] == rank).any(-1).sum().item() for source in range(num_ranks)]
    return exchange_of_splits(
        input_split_sizes=[1] * TOKENS,
        dst_indices=chosen[rank].tolist(),
        output_split_sizes=[1] * int(sum(arriving)),
        src_index=[source for source, count in enumerate(arriving) for _ in range(int(count))],
        num_ranks=num_ranks,
    )


def step(collectives: GroupCollectives, exchange: ExchangeTable, tokens: Tensor, expert: Tensor) -> Tensor:
    """One layer of experts: dispatch, compute, combine."""
    dispatched = collectives.cast([tokens], exchange, lend=True)
    (rows,) = dispatched.wait()
    results = rows @ expert
    dispatched.release()  # the rows were lent, and nothing reads them any more
    combined = torch.zeros_like(tokens)
    collectives.reduce([results], exchange, into=[combined]).wait()
    return combined


def has_native(device: torch.device) -> bool:
    """Whether rows on ``device`` could travel natively; to ask for that on another one is an error."""
    if find_spec("magi_comm_grpcoll") is None:
        return False
    from magi_comm_grpcoll import NativeCollectives

    return bool(NativeCollectives.supports(device))


def main() -> None:
    """Run a few steps and compare with every expert computed here."""
    if "WORLD_SIZE" not in os.environ:
        sys.exit(f"this needs several processes: torchrun --nproc-per-node 4 {__file__}")
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    config = DistAttnConfig(runtime_config=RuntimeConfig(native_grpcoll=has_native(device)))
    collectives = make_collectives(dist.group.WORLD, None, config)

    chosen = choose_experts(num_ranks)
    exchange = plan_exchange(chosen, rank)  # once; the steps below only enqueue
    draw = torch.Generator().manual_seed(1)
    experts = torch.randn(num_ranks, WIDTH, WIDTH, generator=draw).to(device) / WIDTH**0.5
    tokens = torch.randn(num_ranks, TOKENS, WIDTH, generator=draw).to(device)[rank]
    for _ in range(STEPS):
        combined = step(collectives, exchange, tokens, experts[rank])

    expected = sum(tokens[:, None] @ experts[chosen[rank, :, i].to(device)] for i in range(chosen.shape[-1]))
    error = (combined - expected[:, 0]).abs().max()
    print(
        f"rank {rank} by {collectives.name}: {exchange.num_received} tokens dispatched here, largest error {error:.1e}"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
