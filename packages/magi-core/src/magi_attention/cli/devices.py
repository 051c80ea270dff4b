# SPDX-License-Identifier: Apache-2.0
"""Devices, data types and transports that several subcommands choose."""

import torch

from magi_attention.cli.demo.options import Device, Precision
from magi_attention.env import comm as comm_env

DTYPES = {
    Precision.FP64: torch.float64,
    Precision.FP32: torch.float32,
    Precision.BF16: torch.bfloat16,
    Precision.FP16: torch.float16,
}


def choose_device(wish: Device, processes: int, num_gpus: int) -> str:
    """Return ``"cuda"`` or ``"cpu"``; every process needs a GPU of its own."""
    if wish is Device.AUTO:
        return "cuda" if num_gpus >= processes else "cpu"
    if wish is Device.CUDA and num_gpus < processes:
        raise ValueError(
            f"--device cuda needs a GPU for each process: {processes} processes, {num_gpus} GPUs are visible; "
            + (f"take --processes {num_gpus} or --device cpu" if num_gpus else "take --device cpu")
        )
    return wish.value


def check_one_hop() -> None:
    """Refuse exchanges in two hops: the commands that compute know of no nodes."""
    if comm_env.is_hierarchical_comm_enable():
        raise ValueError(
            "MAGI_ATTENTION_HIERARCHICAL_COMM=1 needs a mesh of nodes and their ranks, and this command makes none: "
            "unset it"
        )
