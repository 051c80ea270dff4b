# SPDX-License-Identifier: Apache-2.0
"""Distributed attention against other ways of context parallelism: ``python benchmarks/distributed.py``.

Every number is TFLOP/s per GPU of the pairs that the mask keeps, from the median over the passes of the slowest rank's
time. All methods but ``torch`` run in the same processes and in turns, of forward passes in a row and then of backward
passes in a row, in random order. They are compared within each cycle of all of them, since GPUs at their power limit
run up to a tenth faster and slower for seconds at a time. ``torch`` runs after the others. All but ``torch`` call the
same kernel backend.

single      the kernel alone, on every GPU at once without communication: the same mask family, over as many tokens as
            have (to 256 tokens) the mask area that a GPU has in the distributed attention.
magi/N      ours, with N remote stages, or as many as are predicted to be the best (auto).
native/N    the same with native group collectives. With magi beside it, ``native`` are its eff and its ratio to magi.
eff         the best magi/N over single.
gather      all-gather of keys and values, reduce-scatter of their gradients; contiguous shards.
gather-zz   the same with zigzag shards.
ring-zz     a ring over zigzag shards, double-buffered, merged by log-sum-exp.
torch       torch's own context parallelism: its ring around SDPA, zigzag where causal. Full and causal masks alone.
best/base   the best magi/N over the best of gather, gather-zz, ring-zz and torch.
+-%         the standard error of that ratio in percent, by the quartiles of the cycles; what is within twice of it is a
            tie.

With ``--equal-clocks``, the lines ``cycles`` tell what passes, by the cycles that they took, would have reached had all
run at the mean clock of all: what a GPU's power limit does to its speed meanwhile is left out, and a per mille is seen.
It needs triton, as PyTorch has it.
With ``--host-time``, the lines ``host`` are microseconds until the call of a pass returns, on the slowest rank: where a
kernel takes less, the host is what limits. With ``--breakdown``, a trace of rank 0 tells what each stream of ours did.
A cell that fails shows why below the table; the others go on. On a CPU (``--device cpu``) toy sizes work.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from distributed_methods import OURS, Cell, Measured, run_cells

from magi_attention.cli.bench.breakdown import Share
from magi_attention.cli.bench.measure import tflops
from magi_attention.cli.bench.options import BenchOptions
from magi_attention.cli.bench.status_line import StatusLine
from magi_attention.cli.bench.timing import Medians
from magi_attention.cli.demo.options import Precision
from magi_attention.common import workloads
from magi_attention.plan.simulate import BACKWARD_OVER_FORWARD_FLOP
from magi_attention.testing.distributed import RankError, RankPool

MASKS = ("causal", "varlen_causal", "full", "varlen_block_causal_4k")
BASELINES = ("gather", "gather-zz", "ring-zz", "torch")
CELL_TIMEOUT_S = 240.0
NAN = math.nan


@dataclass(frozen=True)
class Rates:
    """Of a method, forward and backward: TFLOP/s and their relative errors."""

    tflops: tuple[float, float]
    errors: tuple[float, float]


@dataclass(frozen=True)
class Figures:
    """What is printed of a method: its rates, the host's seconds, and rates at equal clocks if these were read."""

    rates: Rates
    host: tuple[float, float]
    at_equal_clocks: Rates | None


@dataclass(frozen=True)
class RowOptions:
    """How to measure a row: its mask and shape, for how many seconds, at which clocks, and whether with a trace."""

    bench: BenchOptions
    seconds: float
    at_equal_clocks: bool
    breakdown: bool


def measure_row(
    pool: RankPool, world_size: int, options: RowOptions, methods: list[str]
) -> tuple[dict[str, Figures], list[str], list[dict[str, object]]]:
    """Measure all methods on one mask: figures by method, what failed, and records for JSON."""
    where = f"{world_size} x {options.bench.tokens // world_size} {options.bench.mask}"
    found: dict[str, Measured] = {}
    reasons: dict[str, str] = {}
    status = StatusLine()
    status.show(f"{where} ")
    for group in ([name for name in methods if name != "torch"], [name for name in methods if name == "torch"]):
        found |= measure_together(pool, options, group, reasons)
    status.show("")
    figures, records = {}, []
    for method in methods:
        record: dict[str, object] = {"ranks": world_size, "mask": options.bench.mask, "tokens": options.bench.tokens}
        records.append(record | {"method": method})
        if method in reasons:
            records[-1] |= {"error": reasons[method]}
            continue
        times, pairs, shares = found[method].times, found[method].pairs, found[method].shares
        per_second = tflops(pairs, 1, options.bench.heads_q, options.bench.head_dim, 1.0)
        rates = rates_of(times, per_second)
        at_equal_clocks = None if times.at_equal_clocks is None else rates_of(times.at_equal_clocks, per_second)
        figures[method] = Figures(rates, (times.host_forward, times.host_backward), at_equal_clocks)
        records[-1] |= {"forward_tflops": rates.tflops[0], "backward_tflops": rates.tflops[1], **asdict(times)}
        if shares:
            records[-1]["breakdown"] = [asdict(share) for share in shares]
            print_breakdown(f"{where} {method}", shares)
    return figures, [f"{where} {method}: {reason}" for method, reason in reasons.items()], records


def rates_of(times: Medians, per_second: float) -> Rates:
    """The rates of passes, of which a forward one in a second would have ``per_second`` TFLOP/s."""
    rates = per_second / times.forward, BACKWARD_OVER_FORWARD_FLOP * per_second / times.backward
    return Rates(rates, (times.forward_error / times.forward, times.backward_error / times.backward))


def measure_together(
    pool: RankPool, options: RowOptions, methods: list[str], reasons: dict[str, str]
) -> dict[str, Measured]:
    """Measure methods in turns; if one fails, which is found out by each alone, only the others.

    Args:
        pool: the ranks.
        options: of the row.
        methods: of which those that failed before are left out.
        reasons: why methods failed; more are added.
    """
    how = options.seconds, options.at_equal_clocks
    cells = [
        Cell(method, method_options(options.bench, method), options.breakdown and method.startswith(OURS))
        for method in methods
        if method not in reasons
    ]
    if len(cells) > 1:
        with suppress(RankError, TimeoutError):
            found = pool.run(run_cells, cells, *how, timeout_s=CELL_TIMEOUT_S)[0]
            return without_failures(cells, found, reasons)
    alone: dict[str, Measured] = {}
    for cell in cells:
        try:
            found = pool.run(run_cells, [cell], *how, timeout_s=CELL_TIMEOUT_S)[0]
            alone |= without_failures([cell], found, reasons)
        except (RankError, TimeoutError) as error:
            lines = [line for line in str(error).splitlines() if line and not line.startswith("(ranks")]
            reasons[cell.method] = lines[-1]
    if 1 < len(alone) < len(cells):
        return measure_together(pool, options, [*alone], reasons)
    return alone


def without_failures(
    cells: Sequence[Cell], found: Sequence[Measured | str], reasons: dict[str, str]
) -> dict[str, Measured]:
    """What was found of each method; why there is nothing of others is added to ``reasons``."""
    of_method = {cell.method: each for cell, each in zip(cells, found, strict=True)}
    reasons |= {method: each for method, each in of_method.items() if isinstance(each, str)}
    return {method: each for method, each in of_method.items() if isinstance(each, Measured)}


def method_options(options: BenchOptions, method: str) -> BenchOptions:
    """The options of one of our methods."""
    degree = method.partition("/")[2]
    return replace(
        options,
        overlap_degree=int(degree) if degree.isdigit() else None,
        native_grpcoll=method.startswith("native/"),
    )


def print_row(
    world_size: int, options: BenchOptions, methods: list[str], figures: dict[str, Figures], host_time: bool
) -> None:
    """Print a row's two passes."""
    where = f"{world_size:>4}{options.tokens // world_size:>8}  {options.mask:24}"
    at_equal_clocks = {method: each.at_equal_clocks for method, each in figures.items() if each.at_equal_clocks}
    for number, name in enumerate(("fwd", "bwd")):
        print_rates(f"{where}{name:11}", number, methods, {method: each.rates for method, each in figures.items()})
        if at_equal_clocks:
            print_rates(f"{'':38}{name + ' cycles':11}", number, methods, at_equal_clocks)
        if host_time:
            host = {method: each.host[number] * 1e6 for method, each in figures.items()}
            print(f"{'':38}{name + ' host':11}" + "".join(f"{host.get(method, NAN):>10.0f}" for method in methods))


def print_rates(start: str, number: int, methods: list[str], rates: dict[str, Rates]) -> None:
    """Print one line: the rates of one pass, and what they tell of ours."""
    of = {method: each.tflops[number] for method, each in rates.items()}
    ours, our_error = best_of(rates, number, [method for method in of if method.startswith("magi/")])
    native, _ = best_of(rates, number, [method for method in of if method.startswith("native/")])
    best, error = best_of(rates, number, [method for method in of if method in BASELINES])
    single = of.get("single", NAN)
    print(start + "".join(f"{of.get(method, NAN):>10.4g}" for method in methods), end="")
    print(f"{ours / single:>7.3f}{ours / best:>10.3f}{100 * math.hypot(our_error, error):>6.2f}", end="")
    print("" if math.isnan(native) else f"{native / single:>9.3f}{native / ours:>7.3f}", flush=True)


def best_of(rates: dict[str, Rates], number: int, methods: list[str]) -> tuple[float, float]:
    """The highest rate of some methods in one pass, and its relative error."""
    return max(((rates[each].tflops[number], rates[each].errors[number]) for each in methods), default=(NAN, NAN))


def print_breakdown(where: str, shares: list[Share]) -> None:
    """Print what each stream of a trace did."""
    print(f"{where}, rank 0, one forward and one backward pass:")
    for stream in dict.fromkeys(share.stream for share in shares):
        mine = [share for share in shares if share.stream == stream]
        print(f"  stream {stream}: " + ", ".join(f"{s.name} {s.seconds * 1e3:.3f} ms ({s.kernels})" for s in mine))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[1, 2, 4], help="group sizes; larger than present: left out"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 8192], help="tokens per GPU")
    parser.add_argument("--masks", nargs="+", choices=sorted(workloads.WORKLOADS), default=MASKS)
    parser.add_argument("--methods", nargs="+", choices=("magi", "native", *BASELINES), default=("magi", *BASELINES))
    parser.add_argument("--overlap-degree", nargs="+", default=["1"], help="remote stages of magi: numbers or auto")
    parser.add_argument("--heads", type=int, nargs=2, metavar=("Q", "KV"), default=[64, 8])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--precision", choices=list(Precision), default=Precision.BF16)
    parser.add_argument("--backend", default="auto", help="kernel backend")
    parser.add_argument(
        "--sm-margin", type=int, help="multiprocessors that our kernels leave to others; by default as in a training"
    )
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument(
        "--repeat", type=int, default=4, help="timed passes of each method, at least; the median counts"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="time so many that a row takes so long")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--equal-clocks", action="store_true", help="print rates at the mean clock, by the cycles that passes take, too"
    )
    parser.add_argument("--host-time", action="store_true", help="print what the host takes to call each pass, too")
    parser.add_argument("--breakdown", action="store_true", help="print what each stream of ours did, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    arguments = parser.parse_args()
    if any(degree != "auto" and not degree.isdigit() for degree in arguments.overlap_degree):
        parser.error(f"--overlap-degree takes numbers or auto, not {' '.join(arguments.overlap_degree)}")
    return arguments


def main() -> None:
    """Print the table."""
    arguments = parse_arguments()
    on_gpu = arguments.device == "cuda"
    present = torch.cuda.device_count() if on_gpu else max(arguments.gpus)
    if arguments.equal_clocks and not on_gpu:
        sys.exit("--equal-clocks reads the clocks of GPUs; leave it out with --device cpu")
    sizes = [size for size in arguments.gpus if size <= present]
    if not sizes:
        sys.exit(f"{present} GPUs are present, fewer than any of --gpus {arguments.gpus}; --device cpu needs none")
    ours = [f"{name}/{degree}" for name in ("magi", "native") for degree in arguments.overlap_degree]
    methods = ["single", *(name for name in (*ours, *BASELINES) if name.partition("/")[0] in arguments.methods)]
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(
        f"{name}, {arguments.heads[0]}/{arguments.heads[1]} heads of {arguments.head_dim}, {arguments.precision}, "
        f"kernel backend {arguments.backend}; TFLOP/s per GPU"
    )
    print(f"{'gpus':>4}{'tokens':>8}  {'mask':24}{'':11}" + "".join(f"{method:>10}" for method in methods), end="")
    of_native = f"{'native':>9}{'/magi':>7}" if "native" in arguments.methods else ""
    print(f"{'eff':>7}{'best/base':>10}{'+-%':>6}{of_native}")
    failures: list[str] = []
    records: list[dict[str, object]] = []
    for world_size in sizes:
        with RankPool(world_size, "nccl" if on_gpu else "gloo") as pool:
            for tokens in arguments.tokens:
                for mask in arguments.masks:
                    options = BenchOptions(
                        mask=mask,
                        tokens=tokens * world_size,
                        heads_q=arguments.heads[0],
                        heads_kv=arguments.heads[1],
                        head_dim=arguments.head_dim,
                        precision=Precision(arguments.precision),
                        backend=arguments.backend,
                        sm_margin=arguments.sm_margin,
                        warmup=arguments.warmup,
                        repeat=arguments.repeat,
                    )
                    usable = [
                        method
                        for method in methods
                        if (world_size > 1 or method not in BASELINES)
                        and (method != "torch" or mask in ("full", "causal"))
                    ]
                    row = RowOptions(options, arguments.seconds, arguments.equal_clocks, arguments.breakdown)
                    figures, failed, measured = measure_row(pool, world_size, row, usable)
                    print_row(world_size, options, methods, figures, arguments.host_time)
                    failures += failed
                    records += measured
    for failure in failures:
        print(f"failed: {failure}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"version": 1, "device": name, "cells": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
