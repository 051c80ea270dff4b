# SPDX-License-Identifier: Apache-2.0
"""The methods that ``benchmarks/distributed.py`` compares, and how a rank times them."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import torch.distributed as dist
from context_parallel import AllGather, Kernel, Ring, SingleDevice
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from magi_attention.api import calc_attn
from magi_attention.cli.bench.breakdown import Share, break_down
from magi_attention.cli.bench.measure import make_key, trace_pass
from magi_attention.cli.bench.options import BenchOptions
from magi_attention.cli.bench.timing import PassTimes, time_in_turns
from magi_attention.cli.bench.turns import Passes
from magi_attention.cli.devices import DTYPES
from magi_attention.common import workloads
from magi_attention.common.enum import AttnRole
from magi_attention.runtime.cache import dist_attn_runtime_dict_mgr, find_manager
from magi_attention.runtime.key import DistAttnRuntimeKey

OURS = ("magi/", "native/")
SINGLE_STEP = 256


@dataclass(frozen=True)
class Cell:
    """One measurement: a method on a mask; ``options.tokens`` are those of all ranks together."""

    method: str
    options: BenchOptions
    breakdown: bool = False


class Ready(NamedTuple):
    """A cell that can be run: its passes, and the mask area per rank that they are for."""

    passes: Passes
    pairs: int


@dataclass(frozen=True)
class Measured:
    """What one rank found: its times, the mask area per rank that they are for, and what a trace shows."""

    times: PassTimes
    pairs: int
    shares: list[Share]


def area(mask: str, tokens: int) -> int:
    return workloads.make(mask, tokens).area()


def tokens_for_area(mask: str, wanted: float, most: int) -> int:
    """The tokens, a multiple of 256 and at most ``most``, over which the mask's area is next to the one wanted."""
    low, high = 1, -(-most // SINGLE_STEP)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if area(mask, middle * SINGLE_STEP) < wanted else (low, middle)
    return min((max(low - 1, 1), low), key=lambda n: abs(area(mask, n * SINGLE_STEP) - wanted)) * SINGLE_STEP


def run_cells(
    rank: int, world_size: int, cells: Sequence[Cell], seconds: float, at_equal_clocks: bool
) -> list[Measured | str]:
    """Time cells on this rank, in turns for so many seconds or as often as they say; or why one can't be made ready."""
    read_clocks = import_module("clocks").read_clocks if at_equal_clocks else None  # needs triton
    on_gpu, options = dist.get_backend() == "nccl", cells[0].options
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    try:
        with ExitStack() as stack:
            ready = [attempt_ready(cell, rank, world_size, device, stack) for cell in cells]
            methods = [each.passes for each in ready if isinstance(each, Ready)]
            how_often = options.warmup, options.repeat, seconds
            times = iter(time_in_turns(methods, device, *how_often, read_clocks=read_clocks) if methods else [])
            return [
                Measured(next(times), each.pairs, shares_of(each.passes, device, rank) if cell.breakdown else [])
                if isinstance(each, Ready)
                else each
                for each, cell in zip(ready, cells, strict=True)
            ]
    finally:
        dist_attn_runtime_dict_mgr.clear()
        if on_gpu:
            torch.cuda.empty_cache()


def attempt_ready(cell: Cell, rank: int, world_size: int, device: torch.device, stack: ExitStack) -> Ready | str:
    """A cell that is ready on all ranks, or why it isn't."""
    ready: Ready | str
    try:
        ready = make_ready(cell, rank, world_size, device, stack)
    except Exception as error:  # whatever it is, other methods can be measured
        ready = f"{type(error).__name__}: {error}".splitlines()[0]
    is_ready = torch.tensor(isinstance(ready, Ready), dtype=torch.int32, device=device)
    dist.all_reduce(is_ready, dist.ReduceOp.MIN)
    return ready if is_ready.item() or isinstance(ready, str) else "another rank failed"


def make_ready(cell: Cell, rank: int, world_size: int, device: torch.device, stack: ExitStack) -> Ready:
    """Make the inputs and the passes of a cell; what they need is there until ``stack`` closes."""
    options = cell.options
    slices = workloads.make(options.mask, options.tokens)
    tokens, pairs = options.tokens // world_size, slices.area() // world_size
    if cell.method == "single":
        tokens = tokens_for_area(options.mask, pairs, options.tokens)
        slices = workloads.make(options.mask, tokens)
        pairs = slices.area()
    key = None
    if cell.method.startswith(OURS):
        key = make_key(options, _world())
        tokens = find_manager(key).num_local_rows(AttnRole.QUERY)
    draw = torch.Generator(device).manual_seed(rank)
    q, k, v, dout = (
        torch.randn(tokens, heads, options.head_dim, generator=draw, device=device, dtype=DTYPES[options.precision])
        for heads in (options.heads_q, options.heads_kv, options.heads_kv, options.heads_q)
    )
    if key is not None:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        return Ready(differentiable(partial(calc, key, *leaves), leaves, dout), pairs)
    if cell.method == "torch":
        return Ready(torch_context_parallel(options, q, k, v, dout, stack), pairs)
    return Ready(baseline(cell, Kernel(q, k, v, options.backend), q, k, v, dout), pairs)


def shares_of(passes: Passes, device: torch.device, rank: int) -> list[Share]:
    """What the streams of rank 0 do in a pair of passes."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        trace_pass(*passes, device, str(path))
        return break_down(json.loads(path.read_text())["traceEvents"]) if rank == 0 else []


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def calc(key: DistAttnRuntimeKey, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Our attention's output."""
    return calc_attn(q, k, v, key)[0]


def differentiable(forward: Callable[[], Tensor], leaves: list[Tensor], dout: Tensor) -> Passes:
    """Passes whose backward pass is autograd's.

    It runs in the thread that calls it: in a training one thread goes through all layers, and is not woken for each. It
    may be called again.
    """

    def backward(out: Tensor) -> object:
        with torch.autograd.set_multithreading_enabled(False):
            return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return forward, backward


def baseline(cell: Cell, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Passes:
    """The passes of one of our own baselines, or of the kernel alone."""
    mask, tokens = cell.options.mask, cell.options.tokens
    method: SingleDevice | AllGather | Ring
    if cell.method == "single":
        method = SingleDevice(kernel, workloads.make(mask, len(q)))
    elif cell.method == "ring-zz":
        method = Ring(kernel, workloads.make(mask, tokens), tokens)
    else:
        is_zigzag = cell.method == "gather-zz"
        method = AllGather(kernel, workloads.make(mask, tokens), tokens, "zigzag" if is_zigzag else "contiguous")

    return partial(method.forward, q, k, v), partial(method.backward, dout)


def torch_context_parallel(
    options: BenchOptions, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, stack: ExitStack
) -> Passes:
    """The passes of torch's context parallelism, which is on until ``stack`` closes."""
    from torch.distributed.tensor.experimental import context_parallel

    if options.mask not in ("full", "causal"):
        raise ValueError("torch's context parallelism has full and causal masks alone")
    mesh = dist.init_device_mesh(q.device.type, (dist.get_world_size(),))
    # The context wants a buffer to shard, from which it takes the sequence's length; q, k and v are shards already.
    positions = torch.arange(options.tokens, device=q.device)
    queries, keys, values = leaves = [x.transpose(0, 1)[None].contiguous().requires_grad_() for x in (q, k, v)]
    stack.enter_context(sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True))
    stack.enter_context(
        context_parallel(mesh, buffers=[positions], buffer_seq_dims=[0], no_restore_buffers={positions})
    )

    def forward() -> Tensor:
        is_causal, is_grouped = options.mask == "causal", q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=is_causal, enable_gqa=is_grouped)

    return differentiable(forward, leaves, dout.transpose(0, 1)[None].contiguous())
