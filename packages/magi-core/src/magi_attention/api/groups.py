# SPDX-License-Identifier: Apache-2.0
"""Who makes keys: from what a caller passes as group or mesh to the context-parallel group."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import get_worker_info

from magi_attention.comm.group import is_destroyed
from magi_attention.common.errors import MagiValueError

GroupOrMesh = dist.ProcessGroup | DeviceMesh | None


def check_makes_keys() -> None:
    """Raise if this process is a worker of a data loader: it is no rank, and if forked, shares the rank's store.

    Raises:
        RuntimeError: It is one.
    """
    if get_worker_info() is not None:
        raise RuntimeError(
            "a worker process of a data loader can't make keys, which belong to the process that attends: hand over "
            "what the key is made of, cu_seqlens for one, and make it there, or choose num_workers=0"
        )


def resolve_group(cp_group_or_mesh: GroupOrMesh) -> tuple[dist.ProcessGroup | None, DeviceMesh | None]:
    """Find the context-parallel group.

    Args:
        cp_group_or_mesh: a group, a 1-D mesh, a 2-D mesh (nodes, ranks of a node), or None for the default group or,
            where torch.distributed isn't initialized, for this process alone.

    Returns:
        The group (None for this process alone) and the mesh (None unless a mesh was given).

    Raises:
        ValueError: Neither a group nor a mesh, a group that was destroyed, a mesh of the wrong shape, one that this
            process isn't part of, or one with other kinds of parallelism in it.
    """
    if isinstance(cp_group_or_mesh, DeviceMesh):
        return _group_of_mesh(cp_group_or_mesh), cp_group_or_mesh
    if cp_group_or_mesh is None:
        return (dist.group.WORLD if dist.is_initialized() else None), None
    if not isinstance(cp_group_or_mesh, dist.ProcessGroup):
        raise ValueError(
            "cp_group_or_mesh must be a ProcessGroup that this process is part of, a DeviceMesh or None, not "
            f"{cp_group_or_mesh!r}"
        )
    if is_destroyed(cp_group_or_mesh):
        raise ValueError("this process group was destroyed: pass one that was made since")
    return cp_group_or_mesh, None


def check_takes_two_hops(cp_group_or_mesh: GroupOrMesh) -> None:
    """Raise unless rows can travel in two hops: by a 2-D mesh, its ranks numbered node by node."""
    if not isinstance(cp_group_or_mesh, DeviceMesh):
        raise MagiValueError(
            f"hierarchical communication needs a 2-D DeviceMesh (nodes, ranks of a node), not {cp_group_or_mesh!r}"
        )
    if cp_group_or_mesh.ndim != 2:
        raise MagiValueError(
            f"cp_group_or_mesh is a mesh of shape {tuple(cp_group_or_mesh.shape)}; it must be 2-D (nodes, ranks of a "
            "node) for hierarchical communication"
        )
    members = cp_group_or_mesh.mesh.flatten().tolist()
    if members != sorted(members):
        raise MagiValueError(
            "hierarchical communication numbers the ranks node by node: the mesh's ranks must ascend row by row, "
            f"unlike {cp_group_or_mesh.mesh.tolist()}"
        )


def _group_of_mesh(mesh: DeviceMesh) -> dist.ProcessGroup:
    if mesh.ndim not in (1, 2):
        raise MagiValueError(f"cp_group_or_mesh is a mesh of shape {tuple(mesh.shape)}; it must be 1-D or 2-D")
    if mesh.get_coordinate() is None:
        raise MagiValueError(f"global rank {dist.get_rank()} is not part of the mesh {mesh}")
    if mesh.ndim == 2 and not mesh.mesh_dim_names:
        raise MagiValueError(
            'a 2-D mesh must be named to be flattened: pass mesh_dim_names=("inter", "intra"), for one'
        )
    if mesh.ndim == 2 and mesh.mesh_dim_names and "cp" in mesh.mesh_dim_names:
        raise MagiValueError(
            f"a 2-D mesh is a context-parallel group of nodes and their ranks, but the dimensions of this one are "
            f'{mesh.mesh_dim_names}: pass mesh["cp"]'
        )
    flat = mesh._flatten() if mesh.ndim == 2 else mesh
    try:
        return flat.get_group()
    except RuntimeError as error:  # torch finds a mesh's group by its name
        raise ValueError(f"the process group of {mesh} was destroyed: make the mesh again ({error})") from error
