# SPDX-License-Identifier: Apache-2.0
"""Set up and tear down the default process group of a program started by a launcher such as torchrun."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from magi_attention.env import comm as comm_env
from magi_attention.utils.seeds import set_random_seed


class DistEnv(NamedTuple):
    """Where this process stands.

    Attributes:
        rank: its rank among all.
        local_rank: its rank on its node.
        world_size: the number of ranks.
        num_nodes: the number of nodes.
        num_local_ranks: the ranks of each node.
        world_group: the group of all ranks.
        device: the device to compute on: the GPU of the local rank with nccl, else the CPU.
        seed: the seed of this rank; None if none was asked for.
    """

    rank: int
    local_rank: int
    world_size: int
    num_nodes: int
    num_local_ranks: int
    world_group: dist.ProcessGroup
    device: torch.device
    seed: int | None


def setup_dist_env(
    backend: str = "nccl", base_seed: int | None = None, seed_bias: Callable[[int], int] = lambda rank: 0
) -> DistEnv:
    """Initialize the default process group, unless it is already, from the variables that the launcher sets.

    Args:
        backend: the group's backend; with nccl, the GPU of the local rank becomes the current one.
        base_seed: seeds all generators with ``base_seed + seed_bias(rank)``; None leaves them alone.
        seed_bias: what to add to the seed on each rank.
    """
    if not dist.is_initialized():
        dist.init_process_group(backend)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    num_local_ranks = comm_env.local_world_size() or world_size
    local_rank = dist.get_node_local_rank(fallback_rank=rank % num_local_ranks)
    device = torch.device("cpu")
    if "nccl" in backend:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    seed = None if base_seed is None else base_seed + seed_bias(rank)
    if seed is not None:
        set_random_seed(seed)
    world_group = dist.group.WORLD
    assert world_group is not None
    return DistEnv(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        num_nodes=-(-world_size // num_local_ranks),
        num_local_ranks=num_local_ranks,
        world_group=world_group,
        device=device,
        seed=seed,
    )


def clearup_dist_env() -> None:
    """Destroy the default process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
