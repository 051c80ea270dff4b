# SPDX-License-Identifier: Apache-2.0
"""Time the passes of one distributed attention on every rank of a group."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from magi_attention.api import calc_attn, magi_attn_flex_key
from magi_attention.cli.bench.options import BenchOptions
from magi_attention.cli.bench.status_line import StatusLine
from magi_attention.cli.bench.timing import PassTimes, time_in_turns
from magi_attention.cli.devices import DTYPES
from magi_attention.common import AttnMaskType, AttnRanges, workloads
from magi_attention.common.enum import AttnOverlapMode, AttnRole
from magi_attention.config import DistAttnConfig, OverlapConfig, RuntimeConfig
from magi_attention.kernels.protocol import AttentionRequest
from magi_attention.kernels.registry import backends_for_slices
from magi_attention.plan.simulate import BACKWARD_OVER_FORWARD_FLOP
from magi_attention.runtime.cache import find_manager
from magi_attention.runtime.key import DistAttnRuntimeKey


@dataclass(frozen=True)
class Measurement:
    """What one measurement found.

    Attributes:
        device: the device's name.
        backend: the kernel backend.
        ranks: size of the group.
        pairs: (query, key) pairs that the mask keeps, over all ranks.
        rows_received: key rows that rank 0 receives in each pass.
        stages: of each rank in each pass, that of its own rows included.
        times: of the passes.
        forward_tflops: per rank, of the pairs that the mask keeps: four floating-point operations per pair, query head
            and element of a head.
        backward_tflops: likewise, with 2.5 times as many.
    """

    device: str
    backend: str
    ranks: int
    pairs: int
    rows_received: int
    stages: int
    times: PassTimes
    forward_tflops: float
    backward_tflops: float


def tflops(pairs: int, ranks: int, heads_q: int, head_dim: int, seconds: float) -> float:
    """A forward pass's rate per rank, in Tflop/s."""
    return 4 * pairs * heads_q * head_dim / ranks / seconds / 1e12


def runtime_config(options: BenchOptions) -> RuntimeConfig:
    """What computes, and what moves rows; where the options don't say, the environment does."""
    return RuntimeConfig(
        kernel_backend=options.backend,
        forward_sm_margin=options.sm_margin,
        backward_sm_margin=options.sm_margin,
        native_grpcoll=options.native_grpcoll,
    )


def make_key(options: BenchOptions, group: dist.ProcessGroup) -> DistAttnRuntimeKey:
    """Plan the options' mask for the ranks of a group."""
    slices = workloads.make(options.mask.replace("-", "_"), options.tokens)
    rows = slices.rows.tolist()
    is_auto = options.overlap_degree is None
    overlap = OverlapConfig(AttnOverlapMode.DYNAMIC if is_auto else AttnOverlapMode.STATIC, options.overlap_degree)
    return magi_attn_flex_key(
        q_ranges=AttnRanges.from_ranges([row[0:2] for row in rows]),
        k_ranges=AttnRanges.from_ranges([row[2:4] for row in rows]),
        attn_mask_type=[AttnMaskType.from_int_type(row[4]) for row in rows],
        total_seqlen_q=options.tokens,
        total_seqlen_k=options.tokens,
        num_heads_q=options.heads_q,
        num_heads_kv=options.heads_kv,
        head_dim=options.head_dim,
        pad_size=0,
        cp_group_or_mesh=group,
        dist_attn_config=DistAttnConfig(overlap_config=overlap, runtime_config=runtime_config(options)),
    )


def measure(options: BenchOptions, device: torch.device, status: StatusLine) -> Measurement:
    """Time an attention over the default group; every rank calls it. Rank 0 writes the trace, if one is asked for."""
    group = dist.group.WORLD
    assert group is not None
    status.show("planning")
    key = make_key(options, group)
    manager = find_manager(key)
    rows = manager.num_local_rows(AttnRole.QUERY)
    shapes = ((options.heads_q,), (options.heads_kv,), (options.heads_kv,), (options.heads_q,))
    draw = torch.Generator(device).manual_seed(dist.get_rank())
    q, k, v, dout = (
        torch.randn(rows, *heads, options.head_dim, generator=draw, device=device, dtype=DTYPES[options.precision])
        for heads in shapes
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def forward() -> Tensor:
        return calc_attn(q, k, v, key)[0]

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out, inputs, dout)

    times = time_in_turns([(forward, backward)], device, options.warmup, options.repeat, status=status)[0]
    if options.trace is not None:
        status.show("tracing")
        trace_pass(forward, backward, device, str(options.trace))
    plan = manager.dist_attn_runtime.plan
    pairs = workloads.make(options.mask.replace("-", "_"), options.tokens).area()
    shape = (pairs, dist.get_world_size(), options.heads_q, options.head_dim)
    request = AttentionRequest.of_tensors(q, k, v)
    calls = manager.dist_attn_runtime.schedule.calls
    names = [backends_for_slices(call.slices, request, options.backend).name for call in calls]
    return Measurement(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        backend=", ".join(dict.fromkeys(names)),
        ranks=dist.get_world_size(),
        pairs=pairs,
        rows_received=sum(stage.num_received for stage in plan.stages),
        stages=len(plan.stages),
        times=times,
        forward_tflops=tflops(*shape, times.forward),
        backward_tflops=BACKWARD_OVER_FORWARD_FLOP * tflops(*shape, times.backward),
    )


def trace_pass(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], object], device: torch.device, path: str
) -> None:
    """Run both passes under the profiler; rank 0 writes its Chrome trace."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    dist.barrier()
    with profile(activities=activities) as profiler:
        backward(forward())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if dist.get_rank() == 0:
        profiler.export_chrome_trace(path)
