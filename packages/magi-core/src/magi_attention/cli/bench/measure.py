# SPDX-License-Identifier: Apache-2.0
"""Time the passes of one distributed attention on every rank of a group."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from magi_attention.api import calc_attn, magi_attn_flex_key
from magi_attention.cli.bench.options import BenchOptions
from magi_attention.cli.demo.command import DTYPES
from magi_attention.common import AttnMaskType, AttnRanges, workloads
from magi_attention.common.enum import AttnOverlapMode, AttnRole
from magi_attention.config import DistAttnConfig, OverlapConfig, RuntimeConfig
from magi_attention.kernels.protocol import AttentionRequest
from magi_attention.kernels.registry import backends_for_slices
from magi_attention.plan.simulate import BACKWARD_OVER_FORWARD_FLOP
from magi_attention.runtime.cache import find_manager
from magi_attention.runtime.key import DistAttnRuntimeKey

Passes = tuple[Callable[[], Tensor], Callable[[Tensor], object]]
"""What computes an output, and what computes its gradients."""

MOST_OF_TURN = 4
"""So many pairs of passes of a method are timed one after another, where several take turns."""

ERROR_OF_MEDIAN = 0.929
"""The standard error of a median of n normal numbers is so many times their interquartile range, over the root of n."""

HOST_REPEATS, HOST_REPEATS_S = 5, 0.5
"""How often each pass is called to find how long the host takes, and after how many seconds of passes no more."""


@dataclass(frozen=True)
class PassTimes:
    """What passes took.

    Attributes:
        forward: median over the timed passes of the slowest rank's time, in seconds.
        backward: the same for backward passes.
        forward_error: standard error of ``forward``, in seconds, by the quartiles of the passes.
        backward_error: the same for backward passes.
        host_forward: until the call of a pass returns, on the slowest rank, with an idle device at the start.
        host_backward: the same for backward passes.
        peak_bytes: the most memory that any rank's tensors took; of several methods that were timed in turns, what a
            pair of passes took besides all that these keep between passes. 0 on a CPU.
    """

    forward: float
    backward: float
    forward_error: float
    backward_error: float
    host_forward: float
    host_backward: float
    peak_bytes: int


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


def measure(options: BenchOptions, device: torch.device) -> Measurement:
    """Time an attention over the default group; every rank calls it. Rank 0 writes the trace, if one is asked for."""
    group = dist.group.WORLD
    assert group is not None
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

    times = time_passes(forward, backward, device, options.warmup, options.repeat)
    if options.trace is not None:
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


def time_passes(
    forward: Callable[[], Tensor],
    backward: Callable[[Tensor], object],
    device: torch.device,
    warmup: int,
    repeat: int,
) -> PassTimes:
    """Time both passes of one method; see :func:`time_in_turns`.

    Args:
        forward: computes the output.
        backward: computes its gradients.
        device: what they compute on.
        warmup: pairs of passes that are not timed.
        repeat: pairs of passes that are.
    """
    return time_in_turns([(forward, backward)], device, warmup, repeat)[0]


def time_in_turns(
    methods: Sequence[Passes], device: torch.device, warmup: int, repeat: int, seconds: float = 0.0
) -> list[PassTimes]:
    """Time both passes of several methods, one pair after another without a pause, as layers of a model follow.

    On a GPU, the host is then ahead of the device if it can be, and what it takes to launch a pass is hidden. What it
    takes is measured afterwards, apart. All ranks begin a pass together, and the slowest one counts: else a rank that
    is done early would wait for the others' rows in the next pass, at its expense. The methods take turns of some
    passes, in another order each time, since a GPU's clock depends on what it did before: after a rest it is up to a
    tenth faster. The first passes of a turn are not timed: what the method before still has under way, on streams of
    its own, would delay theirs, and its kernels would hide the time that theirs take to be launched.

    Args:
        methods: the passes of each.
        device: what they compute on.
        warmup: pairs of passes of each method that are not timed.
        repeat: pairs of passes that are, at least.
        seconds: for how long to run more of them.
    """
    marks: list[list[list[torch.cuda.Event | float]]] = [[] for _ in methods]
    peaks = [0] * len(methods)
    dist.barrier()
    _wait_for(device)
    for _ in range(warmup):
        for passes in methods:
            _mark_passes(passes, device)
    leading, timed_of_turn = int(len(methods) > 1), min(repeat, MOST_OF_TURN)
    count = -(-repeat // timed_of_turn)
    if seconds:
        first = _slowest([_mark_passes(passes, device) for passes in methods], device)
        of_turns = (leading + timed_of_turn) * first.sum().item()
        count = max(count, int(seconds / of_turns))  # on all ranks the same
    orders = np.random.default_rng(0)
    for _ in range(count):
        for number in orders.permutation(len(methods)):
            # Once, since the allocator's statistics take the host some tenths of a millisecond.
            reads_memory = device.type == "cuda" and not marks[number]
            held = 0
            if reads_memory:
                torch.cuda.reset_peak_memory_stats(device)
                held = torch.cuda.memory_allocated(device) if len(methods) > 1 else 0
            turn = [_mark_passes(methods[number], device) for _ in range(leading + timed_of_turn)]
            marks[number] += turn[leading:]
            if reads_memory:
                peaks[number] = torch.cuda.max_memory_allocated(device) - held
    return [_summarize(each, timed, peak, device) for each, timed, peak in zip(methods, marks, peaks, strict=True)]


def _summarize(
    passes: Passes, timed: "Sequence[list[torch.cuda.Event | float]]", peak: int, device: torch.device
) -> PassTimes:
    """What the group found of one method; also measures the host."""
    seconds = _slowest(timed, device).cpu().numpy()
    low, medians, high = np.quantile(seconds, [0.25, 0.5, 0.75], axis=0)
    forward, backward = medians.tolist()
    forward_error, backward_error = (ERROR_OF_MEDIAN / len(timed) ** 0.5 * (high - low)).tolist()
    repeats = max(1, min(HOST_REPEATS, int(HOST_REPEATS_S / (forward + backward))))
    host = torch.tensor(_host_seconds(*passes, device, repeats), dtype=torch.float64, device=device)
    dist.all_reduce(host, dist.ReduceOp.MAX)
    most = torch.tensor(peak, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    host_forward, host_backward = host.tolist()
    return PassTimes(forward, backward, forward_error, backward_error, host_forward, host_backward, int(most))


def _mark_passes(passes: Passes, device: torch.device) -> "list[torch.cuda.Event | float]":
    """Run a pair of passes; returns marks before and after each."""
    forward, backward = passes
    _align(device)
    marks = [_mark(device)]
    out = forward()
    marks.append(_mark(device))
    _align(device)
    marks.append(_mark(device))
    backward(out)
    return [*marks, _mark(device)]


def _slowest(marks: "Sequence[list[torch.cuda.Event | float]]", device: torch.device) -> Tensor:
    """``[pairs, 2]``: seconds of each pair of passes on the slowest rank."""
    timed = [[_seconds(*each[:2]), _seconds(*each[2:])] for each in marks]
    seconds = torch.tensor(timed, dtype=torch.float64, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds


def _host_seconds(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], object], device: torch.device, repeats: int
) -> list[float]:
    """The least time until the call of each pass returns."""
    least = [float("inf")] * 2
    for _ in range(repeats):
        out = None
        for number in range(2):
            dist.barrier()
            _wait_for(device)
            start = time.perf_counter()
            if out is None:
                out = forward()
            else:
                backward(out)
            least[number] = min(least[number], time.perf_counter() - start)
    return least


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _align(device: torch.device) -> None:
    """Let all ranks' devices go on together; on GPUs the hosts don't wait."""
    if device.type == "cuda":
        dist.all_reduce(torch.empty(1, device=device))
    else:
        dist.barrier()


def _mark(device: torch.device) -> "torch.cuda.Event | float":
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: "torch.cuda.Event | float", stop: "torch.cuda.Event | float") -> float:
    if isinstance(start, float) or isinstance(stop, float):
        assert isinstance(start, float)
        assert isinstance(stop, float)
        return stop - start
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


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
