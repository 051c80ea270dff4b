# SPDX-License-Identifier: Apache-2.0
"""Which transport carries the group collectives of a process group.

Transports are found by entry points of the group ``magi_attention.comm``; those of the core are listed there too.
"""

from collections.abc import Callable
from importlib.metadata import entry_points

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.comm.alltoall import AllToAllCollectives
from magi_attention.comm.hierarchical import HierarchicalCollectives
from magi_attention.comm.protocol import GroupCollectives
from magi_attention.config import DistAttnConfig, RuntimeConfig

ENTRY_POINT_GROUP = "magi_attention.comm"
_NATIVE = "native"


def make_collectives(
    group: dist.ProcessGroup | None, mesh: DeviceMesh | None, config: DistAttnConfig
) -> GroupCollectives:
    """Make the transport that ``config.runtime_config`` asks for; all-to-all by default.

    Args:
        group: the context-parallel group.
        mesh: for hierarchical collectives the same ranks as ``(nodes, ranks of a node)``.
        config: its ``hierarchical_comm`` and ``native_grpcoll`` choose the transport.

    Raises:
        ValueError: ``hierarchical_comm`` without a 2-D mesh.
        RuntimeError: ``native_grpcoll`` and no native transport is installed, or it can't serve this machine.
    """
    asked = config.runtime_config.resolved()
    if asked.native_grpcoll:
        has_gpu = torch.cuda.is_available()
        return find_native(torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu"))(group)
    if asked.hierarchical_comm:
        if mesh is None or mesh.ndim != 2:
            shape = None if mesh is None else tuple(mesh.shape)
            raise ValueError(f"hierarchical_comm needs a 2-D mesh (nodes, ranks of a node), not one of shape {shape}")
        return HierarchicalCollectives(*(AllToAllCollectives(mesh.get_group(hop)) for hop in range(2)))
    return AllToAllCollectives(group)


def check_native(asked: RuntimeConfig, device: torch.device) -> None:
    """Raise ``RuntimeError`` if native collectives are asked for, but can't be had for tensors of ``device``."""
    if asked.resolved().native_grpcoll:
        find_native(device)


def find_native(device: torch.device) -> Callable[[dist.ProcessGroup | None], GroupCollectives]:
    """Return what makes the native transport of a group.

    Raises:
        RuntimeError: none is installed, or it can't serve this machine.
    """
    found = entry_points(group=ENTRY_POINT_GROUP, name=_NATIVE)
    if not found:
        raise RuntimeError(
            'native_grpcoll needs a package that is not installed: pip install "magi-attention[comm]", '
            "or switch native_grpcoll off"
        )
    transport = next(iter(found)).load()
    if not (support := transport.supports(device)):
        raise RuntimeError(f"native_grpcoll can't be used on {device}: {support.reason}")
    return transport
