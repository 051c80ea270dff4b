# SPDX-License-Identifier: Apache-2.0
"""Whether the GPUs of a group can exchange natively, as all its ranks agree."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from magi_comm_grpcoll.fabric import reason_against_network
from magi_comm_grpcoll.handshake import Handshake
from magi_comm_grpcoll.heap import reason_against_nvshmem
from magi_comm_grpcoll.kernels import LEAST_CAPABILITY, LINKED_FATBINS, missing_kernels

# PyTorch's own setting, for tests: with 1, symmetric memory lets ranks share a GPU.
SHARING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"

# A driver attribute: streams can wait for and write 64-bit words.
_MEMORY_OPERATIONS = 122


class Needs(NamedTuple):
    """What a context asks of its ranks' machines.

    Attributes:
        nvshmem: whether NVSHMEM.
        one_host: whether one host, whose GPUs reach each other directly.
    """

    nvshmem: bool = False
    one_host: bool = True


_NO_MORE = Needs()


def reason_against(device: torch.device) -> str:
    """Why this process can't take part on ``device``, whoever the others are; empty if it can."""
    if device.type != "cuda":
        return f"it needs CUDA GPUs, not {device}: switch native_grpcoll off, all-to-all runs on every device"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        needed = ".".join(map(str, LEAST_CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {needed} (Hopper)"
    try:
        import cuda.core  # noqa: F401
    except ImportError as error:  # also where something else goes by the name of cuda
        return f'cuda.core cannot be imported ({error}): pip install "magi-comm-grpcoll"'
    if torch.cuda.get_allocator_backend() != "native":
        return (
            f"PyTorch's allocator {torch.cuda.get_allocator_backend()} has no pools, which symmetric memory is of: use "
            "its own, without backend:cudaMallocAsync in PYTORCH_CUDA_ALLOC_CONF"
        )
    return missing_kernels() or _driver_reason(device)


def _driver_reason(device: torch.device) -> str:
    from cuda.bindings import driver as cuda

    from magi_comm_grpcoll.driver import driver

    try:
        driver()
    except (OSError, RuntimeError, AttributeError) as error:
        return f"the CUDA driver can't do it: {error}"
    attribute = cuda.CUdevice_attribute(_MEMORY_OPERATIONS)
    index = torch.cuda.current_device() if device.index is None else device.index
    status, able = cuda.cuDeviceGetAttribute(attribute, cuda.CUdevice(index))
    if status != cuda.CUresult.CUDA_SUCCESS or not able:
        return f"the driver does not let streams of {device} wait for words of memory"
    return ""


def agree(handshake: Handshake, device: torch.device, needs: Needs = _NO_MORE) -> str:
    """Compare what the ranks' machines can do; returns why the group can't exchange natively, the same on all ranks."""
    shares = os.environ.get(SHARING) == "1"
    reason = reason_against(device)
    if not reason and needs.nvshmem:
        reason = missing_kernels(LINKED_FATBINS) or reason_against_nvshmem()
    mine = {"reason": reason, "host": host(), "device": None, "shares": shares, "network": reason_against_network()}
    if device.type == "cuda":
        mine["device"] = str(torch.cuda.get_device_properties(device).uuid)
    ranks = [json.loads(answer) for answer in handshake.exchange(json.dumps(mine).encode())]
    for rank, answer in enumerate(ranks):
        if answer["reason"]:
            return f"on rank {rank} {answer['reason']}"
    num_hosts = len({answer["host"] for answer in ranks})
    if needs.one_host and num_hosts > 1:
        return f"its ranks are on {num_hosts} hosts, and a context is for one"
    alone = next((rank for rank, answer in enumerate(ranks) if answer["network"]), None)
    if num_hosts > 1 and alone is not None:  # NVSHMEM would end the processes
        return f"on rank {alone} {ranks[alone]['network']}"
    if len({answer["device"] for answer in ranks}) < len(ranks) and not all(answer["shares"] for answer in ranks):
        return f"several of its ranks share one GPU (for tests, set {SHARING}=1 on all ranks)"
    if num_hosts > 1:
        return ""
    out_of_reach = _out_of_reach(device, [answer["device"] for answer in ranks])
    answers = [answer.decode() for answer in handshake.exchange(out_of_reach.encode())]
    return next((answer for answer in answers if answer), "")


def host() -> str:
    """Tells machines apart; containers of one machine are not."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _out_of_reach(device: torch.device, uuids: list[str]) -> str:
    """A device of the group that ``device`` can't write, where this process sees it."""
    for other in range(torch.cuda.device_count()):
        is_member = str(torch.cuda.get_device_properties(other).uuid) in uuids
        if other != device.index and is_member and not torch.cuda.can_device_access_peer(device.index, other):
            return (
                f"{device} has no direct access to cuda:{other}: {torch.cuda.get_device_name(device)} without NVLink?"
            )
    return ""
