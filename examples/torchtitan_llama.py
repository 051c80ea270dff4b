# SPDX-License-Identifier: Apache-2.0
"""A torchtitan Llama with FSDP2 whose inner attention spans the ranks of a context-parallel mesh.

Needs ``pip install torchtitan``, no GPU. Runs as one process, or on several, which all share one sequence:

    torchrun --nproc-per-node 2 examples/torchtitan_llama.py
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.models.llama3 import Llama3Model, llama3_configs

from magi_attention.integrations.torchtitan import MagiInnerAttention, prepare_input

BATCH, LENGTH, VOCABULARY = 2, 256, 512


def make_config() -> Llama3Model.Config:
    """The debug model of torchtitan, made smaller, with our inner attention in every layer."""
    config = llama3_configs["debugmodel"]("flex")
    config.layers = config.layers[:2]
    for layer in config.layers:
        layer.attention.inner_attention = MagiInnerAttention.Config()
    return config


def make_batch(config: Llama3Model.Config) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, shifted labels and positions ``[B, L]``, as a data loader that packs documents gives them."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=draw)
    positions = torch.arange(LENGTH).repeat(BATCH, 1)
    positions[0, 100:] -= 100  # the first row has two documents
    labels = tokens[:, 1:].clone()
    labels[0, 99] = -100
    return tokens[:, :-1], labels, positions


def make_model(config: Llama3Model.Config) -> Llama3Model:
    """The model with its initial weights, the same on every rank."""
    torch.manual_seed(0)
    model = config.build()
    model.init_states()
    return model


def step(mesh: DeviceMesh) -> tuple[float, float]:
    """Shard a model over a mesh, and take a step."""
    config = make_config()
    model = make_model(config)
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # FSDP averages gradients; torchtitan's own sharding sums them.
    return loss_and_norm(model, config, mesh, loss_factor=mesh.size())


def loss_and_norm(
    model: Llama3Model, config: Llama3Model.Config, mesh: DeviceMesh, loss_factor: int = 1
) -> tuple[float, float]:
    """Forward and backward; returns the loss of all ranks and the norm of the gradients."""
    inputs, labels, positions = make_batch(config)
    num_targets = (labels != -100).sum()
    attention = config.layers[0].attention
    heads = attention.n_heads, attention.n_kv_heads or attention.n_heads
    head_dim = attention.head_dim or attention.dim // attention.n_heads
    inputs, labels, kwargs = prepare_input(inputs, labels, {"positions": positions}, mesh, heads, head_dim)
    logits = model(inputs, **kwargs)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    loss = loss / num_targets
    (loss * loss_factor).backward()
    total = loss.detach()
    dist.all_reduce(total, group=mesh.get_group())
    # Each by itself, since under tensor parallelism some parameters are sharded over another mesh than others.
    squares = sum(each.grad.square().sum().full_tensor() for each in model.parameters() if each.grad is not None)
    return float(total), float(squares.sqrt())


def main() -> None:
    """One step over a mesh of all ranks."""
    if "WORLD_SIZE" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    loss, norm = step(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",)))
    if dist.get_rank() == 0:
        print(f"loss {loss:.6f}, gradient norm {norm:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # DTensor's caches keep gloo groups alive past this. A thread of gloo that lets go of a tensor while the interpreter
    # ends aborts the process: so end without it.
    sys.stdout.flush()
    os._exit(0)
