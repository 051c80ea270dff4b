# SPDX-License-Identifier: Apache-2.0
"""What measured rates hold for: devices, kernels, links and versions, as a key's group uses them."""

from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import groupby

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.comm.group import group_size
from magi_attention.common.enum import MagiAttentionPrecision
from magi_attention.env import comm as comm_env
from magi_attention.kernels.protocol import AttentionRequest
from magi_attention.kernels.registry import BackendPair, choose_backends
from magi_attention.plan.rates import LayerShape
from magi_attention.runtime.key import DistAttnRuntimeKey


@dataclass(frozen=True)
class Machine:
    """Rates measured for one machine hold for all equal ones.

    Attributes:
        device: the device's name; ``"cpu"`` for CPUs.
        kernel_backend: what computes.
        dtype: in which numbers.
        head_dim: size of a head.
        transport: how rows travel, and over which backend of torch.distributed; empty for a single rank.
        num_ranks: ranks of the group.
        ranks_per_node: neighboring ranks that share a node.
        versions: of this package, of torch, and of CUDA if torch has it.
    """

    device: str
    kernel_backend: str
    dtype: str
    head_dim: int
    transport: str
    num_ranks: int
    ranks_per_node: int
    versions: str


@dataclass(frozen=True)
class Layer:
    """The attention to measure.

    Attributes:
        shape: its heads, and the size of a number.
        dtype: the numbers that it is computed in.
        device: where.
        backends: what computes it.
    """

    shape: LayerShape
    dtype: torch.dtype
    device: torch.device
    backends: BackendPair


def layer_of(key: DistAttnRuntimeKey) -> Layer:
    """What ``key`` will compute, as :func:`make_layer` says."""
    options = key.dist_attn_config.runtime_config
    return make_layer(
        (key.num_heads_q, key.num_heads_kv, key.head_dim),
        group_device(key.cp_group),
        options.precision or "input",
        options.kernel_backend or "auto",
        deterministic=bool(options.deterministic),
    )


def make_layer(
    heads: tuple[int, int, int], device: torch.device, precision: str, backend: str, *, deterministic: bool = False
) -> Layer:
    """Find the kernels of an attention.

    Args:
        heads: query heads, key/value heads, size of a head.
        device: where to compute.
        precision: bf16, fp16, fp32 or fp64; ``"input"`` for what tensors mostly are: bfloat16 on GPUs, float32 on CPUs.
        backend: the kernel backend by name, or ``"auto"``.
        deterministic: whether the same bits are wanted in every run.

    Raises:
        ValueError: the query heads are no multiple of the key/value heads, or there is no such backend.
        RuntimeError: no kernel backend can compute it.
    """
    if precision == "input":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    else:
        dtype = MagiAttentionPrecision(precision).to_torch_dtype()
    shape = LayerShape(*heads, dtype.itemsize)
    request = AttentionRequest(
        device=device,
        dtype=dtype,
        num_heads_q=shape.heads_q,
        num_heads_kv=shape.heads_kv,
        head_dim=shape.head_dim,
        head_dim_v=shape.head_dim,
        deterministic=deterministic,
    )
    return Layer(shape, dtype, device, choose_backends(replace(request, mask_class="full"), backend))


def machine_of(layer: Layer, group: dist.ProcessGroup | None, transport: str, ranks_per_node: int) -> Machine:
    """The machine that ``layer`` runs on, with rows of ``group`` traveling by the collectives named ``transport``."""
    cuda = f", cuda {torch.version.cuda}" if torch.version.cuda else ""
    return Machine(
        device=device_name(layer.device),
        kernel_backend=layer.backends.name,
        dtype=str(layer.dtype).removeprefix("torch."),
        head_dim=layer.shape.head_dim,
        transport=f"{transport} over {dist.get_backend(group)}" if group_size(group) > 1 else "",
        num_ranks=group_size(group),
        ranks_per_node=ranks_per_node,
        versions=f"magi-attention {version('magi-attention')}, torch {torch.__version__}{cuda}",
    )


def device_name(device: torch.device) -> str:
    """The name of a GPU as its driver gives it; the type of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def group_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where a group's tensors are: on the CPU for a gloo group or without GPU, else on the current CUDA device."""
    on_cpu = not torch.cuda.is_available() or (group is not None and dist.get_backend(group) == "gloo")
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def count_ranks_per_node(group: dist.ProcessGroup | None, mesh: DeviceMesh | None = None) -> int:
    """How many neighboring ranks of a group share a node.

    A 2-D mesh says it. Else the launcher's ``LOCAL_WORLD_SIZE`` tells the node of a rank; without, all ranks count as
    being on one, and where nodes hold unequal runs of the group's ranks, each rank as being on its own.
    """
    if mesh is not None and mesh.ndim == 2:
        return mesh.size(1)
    local = comm_env.local_world_size()
    if group is None or local is None:
        return group_size(group)
    runs = [len(list(run)) for _, run in groupby(rank // local for rank in dist.get_process_group_ranks(group))]
    return runs[0] if len(set(runs)) == 1 else 1
