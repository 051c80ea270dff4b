# SPDX-License-Identifier: Apache-2.0
"""What the host takes to launch one distributed attention: ``python benchmarks/host_time.py``. Needs no GPU.

A process group that sends nothing stands for NCCL. On a CPU, kernels that only allocate their results stand in for
attention as well: what is left is our own Python and PyTorch's dispatch of small tensors.

With ``--device cuda`` one GPU plays rank 0 of a group of any size. Its kernels, streams and events are real, and rows
that others would send are random, so that each pass takes the host and the GPU what it would take if rows traveled in
no time. ``--backend none`` leaves the attention kernels out there too. With ``--exchange HOST GPU GBS`` every
collective takes the host so many microseconds more, as NCCL does, and the stream it runs on so many and the time that
the received bytes take at so many GB/s. With ``--every-rank`` it plays all ranks, one after the other, and a line tells
how much longer than the mean the slowest takes, for which all would wait: a plan that is even may have uneven kernels,
and travel that only some ranks can hide.

Figures are microseconds per call in the steady state, the median of many calls that each begin with an idle GPU. On a
GPU two more tell when it is idle again, and two how long a pass takes if eight are launched one after another, as
layers of a model are.

With ``--parts`` lines below each of our methods tell in which part of the code that time is spent, of which telling it
takes some.

magi/N      our calc_attn and its backward pass by autograd, with N remote stages; "kept" with rows kept for backward.
gather      the peer: two all-gathers and the kernel, a reduce-scatter of gradients; without autograd.
"""

import argparse
import cProfile
import math
import pstats
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import context_parallel
import torch
import torch.distributed as dist
from context_parallel import AllGather, Kernel
from host_parts import Parts
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from magi_attention.api import calc_attn, magi_attn_flex_key
from magi_attention.cli.bench.turns import Passes
from magi_attention.comm.alltoall import AllToAllCollectives
from magi_attention.common import AttnMaskType, AttnRanges, workloads
from magi_attention.common.enum import AttnRole
from magi_attention.config import DispatchConfig, DistAttnConfig, OverlapConfig, RuntimeConfig
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, AttentionResult, Support
from magi_attention.kernels.registry import installed_backends
from magi_attention.runtime.cache import dist_attn_runtime_dict_mgr, find_manager

MASKS = ("causal", "varlen_causal")
IN_A_ROW = 8
METHODS = {"magi/0": (0, False), "magi/1": (1, False), "magi/1 kept": (1, True), "magi/2": (2, False)}
"""Remote stages, and whether received rows are kept."""

Result = TypeVar("Result")


class NoKernels:
    """A kernel backend that computes nothing."""

    name = "reference"

    def supports(self, request: AttentionRequest) -> Support:
        """Everything."""
        return Support(True)

    def expected_tflops(self, request: AttentionRequest) -> float:
        """More than any other."""
        return 1e9

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionResult:
        """Allocate the results."""
        return AttentionResult(q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32))

    def forward_into(
        self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> AttentionResult:
        """Return what is given."""
        return AttentionResult(out, lse)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
        """Allocate the gradients."""
        return self.backward_into(None, dout, q, k, v)

    def backward_into(
        self, target: Tensor | None, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Allocate what is not given."""
        return torch.empty_like(q) if target is None else target, k.new_empty(k.shape), v.new_empty(v.shape)


class Setting(NamedTuple):
    """What is attended to.

    Attributes:
        ranks: of the group.
        mask: a name of :mod:`magi_attention.common.workloads`.
        tokens: of a rank.
        heads: of queries, and of keys and values.
        head_dim: their size.
        chunk: rows that are dealt together; None for the planner's choice.
        backend: of kernels; ``"none"`` for none.
        device: ``"cpu"`` or ``"cuda"``.
    """

    ranks: int
    mask: str
    tokens: int
    heads: tuple[int, int]
    head_dim: int
    chunk: int | None
    backend: str
    device: str

    @property
    def kernels(self) -> str:
        """The backend's name in the registry."""
        return "reference" if self.backend == "none" else self.backend

    def tensors(self, rows: int) -> list[Tensor]:
        """q, k, v and dout."""
        heads = (self.heads[0], self.heads[1], self.heads[1], self.heads[0])
        return [torch.randn(rows, each, self.head_dim, device=self.device).bfloat16() for each in heads]


def magi(setting: Setting, degree: int, keep: bool) -> Passes:
    """Our passes."""
    total = setting.tokens * setting.ranks
    rows = workloads.make(setting.mask, total).rows.tolist()
    if keep and setting.device == "cpu":  # enough query heads to a key head that received rows are few beside queries
        setting = setting._replace(heads=(16 * setting.ranks, 1))
    config = DistAttnConfig(
        dispatch_config=DispatchConfig(chunk_size=setting.chunk),
        overlap_config=OverlapConfig(degree=degree, min_chunk_size=setting.chunk or 512),
        runtime_config=RuntimeConfig(kernel_backend=setting.kernels, check_plan=False, keep_received=keep),
    )
    key = magi_attn_flex_key(
        AttnRanges.from_ranges([row[:2] for row in rows]),
        AttnRanges.from_ranges([row[2:4] for row in rows]),
        [AttnMaskType.from_int_type(row[4]) for row in rows],
        total,
        total,
        *setting.heads,
        setting.head_dim,
        pad_size=0,
        cp_group_or_mesh=dist.group.WORLD,
        dist_attn_config=config,
    )
    *leaves, dout = setting.tensors(find_manager(key).num_local_rows(AttnRole.QUERY))
    q, k, v = (x.requires_grad_() for x in leaves)

    def backward(out: Tensor) -> object:
        # In this thread: in a training, one thread goes through all layers, and is not woken for each.
        with torch.autograd.set_multithreading_enabled(False):
            return torch.autograd.grad(out, (q, k, v), dout)

    return lambda: calc_attn(q, k, v, key)[0], backward


def gather(setting: Setting) -> Passes:
    """The peer's passes."""
    q, k, v, dout = setting.tensors(setting.tokens)
    total = setting.tokens * setting.ranks
    method = AllGather(Kernel(q, k, v, setting.kernels), workloads.make(setting.mask, total), total, "zigzag")
    return partial(method.forward, q, k, v), partial(method.backward, dout)


class Times(NamedTuple):
    """Microseconds until the call of a pass returns, until the GPU is idle again, and for one of many passes."""

    host: float
    whole: float
    of_many: float = 0.0


def measure(passes: Passes, repeat: int, device: str) -> tuple[Times, Times]:
    """The medians of both passes."""
    idle = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: tuple[list[Times], list[Times]] = ([], [])

    def timed(run: Callable[[], Result], into: list[Times]) -> Result:
        idle()
        start = time.perf_counter()
        result = run()
        returned = time.perf_counter()
        idle()
        into.append(Times((returned - start) * 1e6, (time.perf_counter() - start) * 1e6))
        return result

    for _ in range(repeat):
        out = timed(passes[0], times[0])
        timed(partial(passes[1], out), times[1])
    forward, backward = (
        Times(*(statistics.median(column) for column in zip(*rows[repeat // 4 :], strict=True))) for rows in times
    )
    if device == "cpu":
        return forward, backward
    bursts: tuple[list[Times], list[Times]] = ([], [])
    for _ in range(max(repeat // IN_A_ROW, 3)):
        outs = timed(lambda: [passes[0]() for _ in range(IN_A_ROW)], bursts[0])
        timed(partial(_run_all, passes[1], outs), bursts[1])
    of_forward, of_backward = (statistics.median(each.whole for each in burst) / IN_A_ROW for burst in bursts)
    return forward._replace(of_many=of_forward), backward._replace(of_many=of_backward)


def _run_all(backward: Callable[[Tensor], object], outs: Sequence[Tensor]) -> None:
    for out in outs:
        backward(out)


class Exchanges:
    """Lets collectives of the fake group bring random rows, since others take a GPU less power, and take time.

    Args:
        host_us: of the host, each.
        gpu_us: of the stream that it runs on, each.
        gbs: GB/s that its rank receives.
    """

    def __init__(self, host_us: float = 0.0, gpu_us: float = 0.0, gbs: float = math.inf) -> None:
        self.host_us, self.gpu_us, self.gbs = host_us, gpu_us, gbs
        self._random = torch.empty(0, dtype=torch.bfloat16, device="cuda")
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):
            start.record()
            torch.cuda._sleep(10_000_000)
            stop.record()
            torch.cuda.synchronize()
        self.cycles_per_us = 10_000_000 / (start.elapsed_time(stop) * 1e3)
        self.stream = torch.cuda.Stream(priority=-1)

    def fill(self, received: Tensor) -> None:
        """Copy random rows there, as each exchange writes its own: what was there before may be anything."""
        numbers = received.view(torch.bfloat16).view(-1)
        if len(self._random) < len(numbers):
            torch.cuda.synchronize()  # streams may still read the shorter one, and any will read this one
            self._random = torch.randn(len(numbers), dtype=torch.bfloat16, device="cuda")
            torch.cuda.synchronize()
        numbers.copy_(self._random[: len(numbers)])

    def take(self, num_bytes: int) -> None:
        """Spend the time of a collective that receives so many bytes, on the current stream."""
        until = time.perf_counter() + self.host_us * 1e-6
        cycles = int((self.gpu_us + num_bytes / self.gbs * 1e-3) * self.cycles_per_us)
        if cycles:
            torch.cuda._sleep(cycles)
        while time.perf_counter() < until:
            pass

    def install(self) -> None:
        """Let ours and the peer's collectives take it; those of the peer run on a stream of their own, as NCCL's do."""
        send = AllToAllCollectives._send

        def send_slowly(collectives: Any, packed: Tensor, landed: Tensor, *rest: Any, **options: Any) -> Any:
            self.take(landed.nbytes)
            work = send(collectives, packed, landed, *rest, **options)
            self.fill(landed)
            return work

        mock.patch.object(AllToAllCollectives, "_send", send_slowly).start()
        for name in ("_all_gather", "_reduce_scatter"):
            setattr(context_parallel, name, self._aside)

    def _aside(self, received: Tensor, sent: Tensor, **options: Any) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            share = (dist.get_world_size() - 1) / dist.get_world_size()
            self.take(int(max(received.nbytes, sent.nbytes) * share))
            self.fill(received)
            done = self.stream.record_event()
        return SimpleNamespace(wait=lambda: torch.cuda.current_stream().wait_event(done))


def profile(passes: Passes, repeat: int, lines: int) -> None:
    """Print which functions the host spends its time in, both passes together."""
    profiler = cProfile.Profile()
    for _ in range(repeat):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profiler.enable()
        passes[1](passes[0]())
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(lines)


def compare(
    setting: Setting, rank: int, methods: Sequence[str], options: argparse.Namespace, parts: Parts | None
) -> dict[str, tuple[Times, Times]]:
    """Measure all methods on one rank, whose group is there, and print a line for each."""
    on_cpu, results = setting.device == "cpu", {}
    for name in methods:
        passes = magi(setting, *METHODS[name]) if name in METHODS else gather(setting)
        forward, backward = results[name] = measure(passes, options.repeat, setting.device)
        pairs = list(zip((forward, backward), results[methods[0]], strict=True))
        cells = [f"{mine.host:10.0f}" for mine, _ in pairs] + [f"{a.host / b.host:10.2f}" for a, b in pairs]
        if not on_cpu:
            cells += [f"{mine.whole:10.0f}" for mine, _ in pairs] + [f"{mine.of_many:10.0f}" for mine, _ in pairs]
        print(f"{rank:>4}/{setting.ranks:<4} {setting.mask:24}{name:14}", *cells, flush=True)
        if parts is not None and name in METHODS:
            parts.measure(passes, options.repeat, (lambda: None) if on_cpu else torch.cuda.synchronize)
        if options.profile and name == methods[1]:
            profile(passes, options.repeat, options.profile)
    return results


def tell_slowest(setting: Setting, ranks: Sequence[dict[str, tuple[Times, Times]]]) -> None:
    """Print how much longer than the mean the slowest rank takes, with each method in either direction."""
    for name in ranks[0]:
        cells = []
        for number, direction in enumerate(("forward", "backward")):
            times = [each[name][number] for each in ranks]
            of_many = [each.of_many or each.host for each in times]
            cells.append(f"{direction} {max(of_many):.0f}, {max(of_many) / statistics.mean(of_many):.3f} of the mean")
        print(f"{'all':>4}/{setting.ranks:<4} {setting.mask:24}{name:14} slowest: {'; '.join(cells)}", flush=True)


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="sizes of the group")
    parser.add_argument("--every-rank", action="store_true", help="play all ranks of each group")
    parser.add_argument("--masks", nargs="+", choices=sorted(workloads.WORKLOADS), default=MASKS)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--repeat", type=int, default=300)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, help="of a rank; 512, on a GPU 8192")
    parser.add_argument("--heads", type=int, nargs=2, help="of queries and of keys; 8 2, on a GPU 64 8")
    parser.add_argument("--head-dim", type=int, help="16, on a GPU 128")
    parser.add_argument("--backend", default=None, help="kernels; none on a CPU, on a GPU auto")
    parser.add_argument(
        "--exchange", type=float, nargs=3, metavar=("HOST", "GPU", "GBS"), help="what a collective takes; on a GPU"
    )
    parser.add_argument("--parts", action="store_true", help="also tell which part of the code takes how long")
    parser.add_argument("--profile", type=int, default=0, metavar="LINES", help="profile the first method of each mask")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    options = arguments()
    on_cpu = options.device == "cpu"
    tokens, heads, head_dim, backend = (512, (8, 2), 16, "none") if on_cpu else (8192, (64, 8), 128, "auto")
    backend = options.backend or backend
    torch.set_num_threads(1)
    if backend == "none":
        installed_backends()["reference"] = NoKernels()
    print("microseconds of the host per call" + ("" if on_cpu else f", {torch.cuda.get_device_name()}, {backend}"))
    if not on_cpu:
        Exchanges(*(options.exchange or ())).install()
    if options.exchange:
        print(
            "a collective takes the host {:.0f} us more, and the GPU {:.0f} us at {:.0f} GB/s".format(*options.exchange)
        )
    parts = Parts() if options.parts else None  # behind what stands in for collectives, which is no part of ours
    gpu_columns = ("GPU fwd", "GPU bwd", "of many", "of many")
    columns = ("forward", "backward", "/ gather", "/ gather", *(() if on_cpu else gpu_columns))
    print(f"{'rank':>9} {'mask':24}{'method':14}", *(f"{column:>10}" for column in columns))
    for ranks in options.ranks:
        for mask in options.masks:
            setting = Setting(
                ranks,
                mask,
                options.tokens or tokens,
                tuple(options.heads or heads),
                options.head_dim or head_dim,
                64 if on_cpu else None,
                backend,
                options.device,
            )
            results = []
            for rank in range(ranks if options.every_rank else 1):
                dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
                results.append(compare(setting, rank, ("gather", *options.methods), options, parts))
                dist_attn_runtime_dict_mgr.clear()
                dist.destroy_process_group()
            if options.every_rank:
                tell_slowest(setting, results)


if __name__ == "__main__":
    main()
