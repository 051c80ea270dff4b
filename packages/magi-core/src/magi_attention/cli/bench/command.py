# SPDX-License-Identifier: Apache-2.0
"""Carry out ``magi bench``."""

import json
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from magi_attention.cli.bench.measure import Measurement, measure, runtime_config
from magi_attention.cli.bench.options import CPU_TOKENS, BenchOptions
from magi_attention.cli.bench.overlap import Overlap, read_overlap
from magi_attention.cli.bench.status_line import StatusLine
from magi_attention.cli.devices import DTYPES, check_one_hop, choose_device
from magi_attention.cli.logs import log_to_stderr
from magi_attention.comm.registry import check_native
from magi_attention.env.variables import check_texts
from magi_attention.kernels.protocol import AttentionRequest
from magi_attention.kernels.registry import choose_backend
from magi_attention.testing.distributed import run_ranks

TIMEOUT_S = 1800.0


def run_bench(options: BenchOptions, as_json: bool, console: Console, *, any_tokens: bool = False) -> None:
    """Measure on the ranks of torchrun, or on ranks of its own, and print what was found.

    Args:
        options: whose length is that for GPUs where it is open.
        as_json: whether to print JSON.
        console: where to print tables.
        any_tokens: whether the length is open.

    Raises:
        ValueError: ``--processes`` under torchrun, more processes than GPUs, an unknown backend, or an environment
            variable without sense.
        RuntimeError: the backend can't compute this, there are no native collectives, or a rank failed.
    """
    check_one_hop()
    is_launched = dist.is_torchelastic_launched()
    if is_launched and options.processes is not None:
        raise ValueError("--processes starts ranks itself, but torchrun has started them; leave one of them away")
    processes = options.processes or 1
    device = choose_device(options.device, processes, torch.cuda.device_count())
    if any_tokens and device == "cpu":
        options = replace(options, tokens=CPU_TOKENS)
    if is_launched:
        found = _measure_under_torchrun(options, torch.device(device))
    else:
        _check(options, torch.device(device))
        found = _measure_on_own_ranks(options, processes, "nccl" if device == "cuda" else "gloo")
    if found is not None:
        overlap = read_overlap(options.trace) if options.trace else None
        _print(options, found, overlap, as_json, console)


def _check(options: BenchOptions, device: torch.device) -> None:
    """Refuse a backend, a transport or an environment before any process is started."""
    check_texts()
    sizes = options.heads_q, options.heads_kv, options.head_dim, options.head_dim
    choose_backend(AttentionRequest(device, DTYPES[options.precision], *sizes), options.backend)
    check_native(runtime_config(options), device)


def _measure_on_own_ranks(options: BenchOptions, processes: int, transport: str) -> Measurement:
    """What rank 0 found, which shows on the same terminal what it does."""
    status = StatusLine()
    status.show(f"starting {processes} rank{'s' * (processes > 1)}")
    try:
        found: list[Measurement] = run_ranks(
            processes, _measure_on_rank, options, backend=transport, timeout_s=TIMEOUT_S
        )
    finally:
        status.show("")
    return found[0]


def _measure_on_rank(rank: int, world_size: int, options: BenchOptions) -> Measurement:
    log_to_stderr()
    on_gpu = dist.get_backend() == "nccl"
    return measure(options, torch.device("cuda", rank) if on_gpu else torch.device("cpu"), StatusLine(rank == 0))


def _measure_under_torchrun(options: BenchOptions, device: torch.device) -> Measurement | None:
    """What rank 0 found; None on other ranks."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    status = StatusLine(dist.get_rank() == 0)
    try:
        if device.type == "cuda":
            device = torch.device("cuda", dist.get_node_local_rank())
            torch.cuda.set_device(device)
        found = measure(options, device, status)
        return found if dist.get_rank() == 0 else None
    finally:
        status.show("")
        dist.destroy_process_group()


def _print(options: BenchOptions, found: Measurement, overlap: Overlap | None, as_json: bool, console: Console) -> None:
    if as_json:
        chosen: dict[str, Any] = asdict(options) | {"trace": None if options.trace is None else str(options.trace)}
        measured = asdict(found) | {"overlap": None if overlap is None else asdict(overlap) | {"share": overlap.share}}
        print(json.dumps({"version": 1, "options": chosen, "measured": measured}))
        return
    heads = f"{options.heads_q}/{options.heads_kv} heads of {options.head_dim}, {options.precision.value}"
    stages = "1 stage" if found.stages == 1 else f"{found.stages} stages with that of own rows"
    console.print(
        f"[bold]{options.mask}[/bold], {options.tokens:,} tokens, {heads}; {found.ranks} x {found.device}, kernel "
        f"backend {found.backend}; {stages}, rank 0 receives {found.rows_received:,} key rows",
        highlight=False,
    )
    table = Table()
    for name in ("pass", "ms", "TFLOP/s per rank"):
        table.add_column(name, justify="right")
    for name, seconds, rate in (
        ("forward", found.times.forward, found.forward_tflops),
        ("backward", found.times.backward, found.backward_tflops),
    ):
        table.add_row(name, f"{seconds * 1e3:.3f}", f"{rate:.3g}")
    console.print(table)
    if found.times.peak_bytes:
        console.print(f"Most memory of a rank: {found.times.peak_bytes / 2**30:.2f} GiB", highlight=False)
    if options.trace is not None:
        console.print(f"Trace of rank 0: [bold]{options.trace}[/bold]", highlight=False)
        console.print(_overlap_line(overlap), highlight=False)


def _overlap_line(overlap: Overlap | None) -> str:
    if overlap is None:
        return "It has no kernels: overlap is measured on GPUs only."
    return (
        f"Overlap: communication ran for {overlap.communication * 1e3:.3f} ms, of which {overlap.both * 1e3:.3f} ms "
        f"({overlap.share:.0%}) beside attention kernels, which ran for {overlap.attention * 1e3:.3f} ms."
    )
