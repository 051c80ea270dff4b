# SPDX-License-Identifier: Apache-2.0
"""What carries rows between ranks on this machine."""

from datetime import timedelta
from importlib.metadata import EntryPoint, entry_points

import torch
import torch.distributed as dist

from magi_attention.cli.doctor.findings import Check, attempt
from magi_attention.comm.registry import ENTRY_POINT_GROUP

TIMEOUT = timedelta(seconds=30)


def communication_facts() -> dict[str, str]:
    """Which process groups torch can make, and which transports of group collectives are installed."""
    if not dist.is_available():
        return {"torch.distributed": "not part of this build of torch"}
    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    points = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name)
    return {
        **{name: "available" if there else "not part of this build of torch" for name, there in available.items()},
        "transports": ", ".join(point.name for point in points),
        **{f"transport {name}": fact for point in points for name, fact in _ask(point).items()},
    }


def _ask(point: EntryPoint) -> dict[str, str]:
    """Whether a transport that can tell supports the first GPU, or the CPU where there is none, and its own facts."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    facts = {}
    try:
        transport = point.load()
        if hasattr(transport, "supports"):
            support = transport.supports(device)
            facts[point.name] = f"supports {device}" if support else f"not on {device}: {support.reason}"
        if hasattr(transport, "facts"):
            facts |= {f"{point.name}, {name}": fact for name, fact in transport.facts().items()}
    except Exception as error:  # of whatever is installed
        facts[point.name] = f"failed to load: {type(error).__name__}: {error}"
    return facts


def peer_access() -> dict[str, str]:
    """How each GPU reaches the memory of each other one, by ``"from-to"``."""
    count = torch.cuda.device_count()
    links = _nvlinks() if count > 1 else None
    access = {}
    for one in range(count):
        for other in range(count):
            if one != other:
                direct = "direct" if torch.cuda.can_device_access_peer(one, other) else "through the host"
                lanes = f", {links[one][other]} NVLinks" if links is not None else ""
                access[f"{one}-{other}"] = direct + lanes
    return access


def check_communication() -> list[Check]:
    """Reduce a number in a group of this process alone, by gloo and, on a GPU, by NCCL."""
    if not dist.is_available():
        return [Check("gloo", "skipped", "torch.distributed is not part of this build of torch")]
    checks = [
        attempt("gloo", lambda: _all_reduce("gloo", torch.device("cpu")))
        if dist.is_gloo_available()
        else Check("gloo", "skipped", "not part of this build of torch")
    ]
    if not torch.cuda.is_available():
        return [*checks, Check("nccl", "skipped", "there is no GPU")]
    if not dist.is_nccl_available():
        return [*checks, Check("nccl", "failed", "there is a GPU, but NCCL is not part of this build of torch")]
    return [*checks, attempt("nccl", lambda: _all_reduce("nccl", torch.device("cuda", 0)))]


def _all_reduce(backend: str, device: torch.device) -> str:
    x = torch.ones(4, device=device)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    try:
        dist.all_reduce(x)
    finally:
        dist.destroy_process_group()
    if not bool((x == 1).all()):
        raise RuntimeError(f"reducing ones over one rank gave {x.tolist()}")
    return "all-reduce in a group of one"


def _nvlinks() -> list[list[int]] | None:
    """How many NVLinks connect each pair of GPUs, where this torch can tell."""
    import torch._C._distributed_c10d as c10d

    detect = getattr(c10d, "_detect_dma_connectivity", None)
    if detect is None:
        return None
    try:
        matrix: list[list[int]] = detect(torch._C._autograd.DeviceType.CUDA, "nvlink").matrix
    except RuntimeError:  # the driver's management library is not there
        return None
    return matrix
