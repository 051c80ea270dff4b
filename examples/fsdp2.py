# SPDX-License-Identifier: Apache-2.0
"""FSDP2 with context parallelism: a mesh of replicas times ranks of a sequence, parameters sharded over all of them.

Every replica trains on sequences of its own, of other documents and lengths. Runs as one process, or on several, of
which two share a sequence if their number is even:

    torchrun --nproc-per-node 4 examples/fsdp2.py
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from magi_attention.api import DistAttnRuntimeKey, calc_attn, dispatch, magi_attn_varlen_key

HEADS, KV_HEADS, DIM, VOCABULARY, LAYERS, SEQUENCES = 4, 2, 32, 256, 2, 12
WIDTH = HEADS * DIM


class Block(nn.Module):
    """Attention with a residual connection, over the rows that this rank holds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, key: DistAttnRuntimeKey) -> Tensor:
        """Add to x ``[n_local, width]`` what it attends to."""
        q, k, v = self.qkv(self.norm(x)).unflatten(1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        return x + self.out(calc_attn(q, k, v, key)[0].flatten(1))


class Model(nn.Module):
    """Tokens to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, key: DistAttnRuntimeKey) -> Tensor:
        """Logits ``[n_local, vocabulary]`` of this rank's tokens."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, key)
        return self.head(x)


def make_sequence(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and cumulative lengths of one packed sequence, equal on all ranks that ask for its number."""
    draw = torch.Generator().manual_seed(number)
    cu_seqlens = F.pad(torch.randint(50, 200, (4,), generator=draw).cumsum(0), (1, 0))
    tokens = torch.randint(VOCABULARY, (int(cu_seqlens[-1]),), generator=draw)
    labels = tokens.roll(-1)
    labels[cu_seqlens[1:] - 1] = -100
    return tokens, labels, cu_seqlens


def train(mesh: DeviceMesh) -> tuple[float, float]:
    """One step over all sequences; returns its loss and the norm of its gradients."""
    num_ranks = dist.get_world_size()
    everybody = mesh["dp", "cp"]._flatten("dp_cp")
    torch.manual_seed(0)
    model = Model()
    for block in model.blocks:
        fully_shard(block, mesh=everybody)
    fully_shard(model, mesh=everybody)

    batch = [make_sequence(number) for number in range(SEQUENCES)]
    num_targets = sum(int((labels != -100).sum()) for _, labels, _ in batch)  # of the whole batch
    total = torch.zeros(())
    for tokens, labels, cu_seqlens in batch[mesh.get_local_rank("dp") :: mesh["dp"].size()]:
        key = magi_attn_varlen_key(
            cu_seqlens, cu_seqlens, HEADS, KV_HEADS, DIM, pad_size=0, cp_group_or_mesh=mesh["cp"], causal=True
        )
        logits = model(dispatch(tokens, key), key)
        local_labels = dispatch(labels, key, pad_value=-100)
        loss = F.cross_entropy(logits, local_labels, ignore_index=-100, reduction="sum") / num_targets
        (loss * num_ranks).backward()  # FSDP averages gradients over ranks, which hold terms of a sum
        total += loss.detach()
    squares = sum(each.grad.square().sum() for each in model.parameters() if each.grad is not None)
    assert isinstance(squares, DTensor)
    norm = float(squares.full_tensor().sqrt())
    dist.all_reduce(total)
    return float(total), norm


def main() -> None:
    """Train on a mesh of all ranks."""
    if "WORLD_SIZE" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    num_ranks = dist.get_world_size()
    cp_size = 2 if num_ranks % 2 == 0 else 1
    if SEQUENCES * cp_size % num_ranks:
        sys.exit(f"{num_ranks // cp_size} replicas cannot share {SEQUENCES} sequences: each must take as many steps")
    mesh = init_device_mesh("cpu", (num_ranks // cp_size, cp_size), mesh_dim_names=("dp", "cp"))
    loss, norm = train(mesh)
    if dist.get_rank() == 0:
        print(f"loss {loss:.6f}, gradient norm {norm:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # DTensor's caches keep gloo groups alive past this. A thread of gloo that lets go of a tensor while the interpreter
    # ends aborts the process: so end without it.
    sys.stdout.flush()
    os._exit(0)
