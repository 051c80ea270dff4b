# SPDX-License-Identifier: Apache-2.0
"""Native group casts against NCCL's all-to-all: ``python benchmarks/grpcoll.py --ranks 2``.

Every rank sends as many bytes to every other one, cut into ranges that don't touch on the receiver's side; two casts
are in flight at a time. GB/s are the bytes that a rank sends to others over the slowest rank's time, so they are those
of one direction while both are busy.

copies      the native cast by copy engines.
push        the native cast by a kernel on a few multiprocessors.
puts        the native cast by NVSHMEM, as between hosts but over NVLink, where NVSHMEM is installed.
a2a         the core's all-to-all over NCCL: pack, exchange, unpack.
nccl        NCCL's all_to_all_single alone, of the same number of bytes, packed beforehand.
best/a2a    the better native cast over the core's all-to-all; best/nccl over NCCL alone.
us          host time of one cast, in microseconds: the median.

The second table repeats some rows beside attention (scaled_dot_product_attention, causal) that never stops meanwhile;
``slower`` is by how much that is slowed down while it lasts.

``--host`` measures instead what the host spends on a call, by number of ranges; ranks may share a GPU then, so that one
is enough. All rows are measured several times in turns. Each number is the median of calls one after another, on the
rank and in the turn where it was least, and after a slash the least call of all.

cast        the native cast of K and V rows that are lent, by either transport.
release     wait for it, and give back what was lent.
reduce      the native reduce of the same rows, summed in bfloat16 onto float32.
torch cast  what the same ranges cost as copies by PyTorch, one ``copy_`` each, to memory of the same GPU.
torch/cast  that over the faster native cast.
python      nanoseconds that Python takes for a turn of an empty loop, least and most beside the row's calls: where they
            differ much, the host is not equally fast all the time, as virtual machines are not.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from magi_attention.comm import AllToAllCollectives
from magi_attention.testing.distributed import RankPool
from magi_comm_grpcoll import ContextOptions, GroupContext
from magi_comm_grpcoll.calibrate import exchange_in_turns
from magi_comm_grpcoll.capability import SHARING
from magi_comm_grpcoll.heap import reason_against_nvshmem
from magi_comm_grpcoll.kernels import LINKED_FATBINS, missing_kernels
from magi_comm_grpcoll.routes import Transport

ROW_BYTES = 4096
_TRANSPORTS: dict[str, Transport] = {"copies": "copy_engine", "push": "push"}
if not (missing_kernels(LINKED_FATBINS) or reason_against_nvshmem()):
    _TRANSPORTS["puts"] = "put"
METHODS = (*_TRANSPORTS, "a2a", "nccl")
# Casts go on beside attention for so many of its kernels, if that is longer, and the host is so many of them ahead.
LEAST_ATTENTIONS, AHEAD = 10, 4
WARM_UP, LOOP_TURNS = 16, 2000
_contexts: dict[str, GroupContext] = {}


def context(method: str) -> GroupContext:
    if method not in _contexts:
        world = dist.group.WORLD
        assert world is not None
        _contexts[method] = GroupContext(world, ContextOptions(transport=_TRANSPORTS[method], timeout_s=60))
    return _contexts[method]


def caster(method: str, rank: int, num_ranks: int, peer_bytes: int, range_bytes: int) -> Callable[[], Any]:
    """A function that starts one exchange and returns its work."""
    device = torch.device("cuda", rank)
    if method == "nccl":
        packed = torch.zeros(num_ranks * peer_bytes, dtype=torch.uint8, device=device)
        landed = torch.empty_like(packed)
        sizes = [0 if peer == rank else peer_bytes for peer in range(num_ranks)]
        total = sum(sizes)
        return lambda: dist.all_to_all_single(landed[:total], packed[:total], sizes, sizes, async_op=True)
    table = exchange_in_turns(rank, num_ranks, range_bytes // ROW_BYTES, peer_bytes // range_bytes)
    rows = torch.zeros(table.num_source, ROW_BYTES // 2, dtype=torch.bfloat16, device=device)
    collectives = AllToAllCollectives(dist.group.WORLD) if method == "a2a" else context(method)
    return lambda: collectives.cast([rows], table, lend=True)


def run_many(cast: Callable[[], Any], times: int, between: Callable[[], None] = lambda: None) -> list[float]:
    """Enqueue so many exchanges, two in flight, and do something after each; returns the host's seconds of each."""
    works: deque[Any] = deque()
    seconds = []
    for _ in range(times):
        if len(works) == 2:
            finish(works.popleft())
        started = time.perf_counter()
        works.append(cast())
        seconds.append(time.perf_counter() - started)
        between()
    while works:
        finish(works.popleft())
    return seconds


def finish(work: Any) -> None:
    work.wait()
    if hasattr(work, "release"):
        work.release()


def slowest(seconds: float) -> float:
    longest = torch.tensor(seconds, device="cuda")
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.item()


def time_stream(enqueue: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    enqueue()
    stop.record()
    return start, stop


def time_alone(
    rank: int, num_ranks: int, method: str, peer_bytes: int, range_bytes: int, times: int
) -> tuple[float, float]:
    """GB/s in one direction, and the host's microseconds of one call."""
    cast = caster(method, rank, num_ranks, peer_bytes, range_bytes)
    run_many(cast, 3)
    torch.cuda.synchronize()
    dist.barrier()
    host: list[float] = []
    start, stop = time_stream(lambda: host.extend(run_many(cast, times)))
    torch.cuda.synchronize()
    seconds = slowest(start.elapsed_time(stop) / 1e3 / times)
    return peer_bytes * (num_ranks - 1) / seconds / 1e9, statistics.median(host) * 1e6


def time_beside_attention(
    rank: int, num_ranks: int, method: str, peer_bytes: int, range_bytes: int, times: int
) -> tuple[float, float]:
    """GB/s in one direction beside attention, and by how much attention is slower, as a ratio."""
    cast = caster(method, rank, num_ranks, peer_bytes, range_bytes)
    q, k, v = (torch.randn(1, 32, 16384, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def attend(count: int) -> None:
        for _ in range(count):
            F.scaled_dot_product_attention(q, k, v, is_causal=True)

    run_many(cast, 3)
    attend(2)
    torch.cuda.synchronize()
    start, stop = time_stream(lambda: attend(10))
    torch.cuda.synchronize()
    alone = start.elapsed_time(stop) / 10
    dist.barrier()
    start, stop = time_stream(lambda: run_many(cast, times))
    torch.cuda.synchronize()
    times = max(times, math.ceil(times * slowest(LEAST_ATTENTIONS * alone / start.elapsed_time(stop))))
    dist.barrier()
    attentions = [time_stream(lambda: attend(1)) for _ in range(AHEAD)]
    main_stream = torch.cuda.current_stream()

    def go_on() -> None:
        with torch.cuda.stream(main_stream):
            while attentions[-AHEAD][1].query():
                attentions.append(time_stream(lambda: attend(1)))

    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(2_000_000)  # attention is under way on all ranks
        first, last = time_stream(lambda: run_many(cast, times, go_on))
    while not last.query():
        go_on()
    torch.cuda.synchronize()
    origin = attentions[0][0]
    begun, done = origin.elapsed_time(first), origin.elapsed_time(last)
    meanwhile = [
        one.elapsed_time(other)
        for one, other in attentions
        if origin.elapsed_time(one) > begun and origin.elapsed_time(other) < done
    ]
    seconds = slowest((done - begun) / 1e3 / times)
    return peer_bytes * (num_ranks - 1) / seconds / 1e9, statistics.mean(meanwhile) / alone - 1


@cache
def host_calls(rank: int, num_ranks: int, method: str, ranges: int) -> dict[str, Callable[[], Any]]:
    """Exchanges of so many ranges per tensor and peer, by name."""
    device = torch.device("cuda", torch.cuda.current_device())
    table = exchange_in_turns(rank, num_ranks, 8, ranges)
    kv = [torch.zeros(table.num_source, ROW_BYTES // 2, dtype=torch.bfloat16, device=device) for _ in range(2)]
    if method == "torch":
        landed = torch.empty(table.num_received, ROW_BYTES // 2, dtype=torch.bfloat16, device=device)
        firsts = [8 * number for number in range(ranges)] * (num_ranks - 1)
        copies = [(landed[i * 8 : i * 8 + 8], x[first : first + 8]) for x in kv for i, first in enumerate(firsts)]
        return {"cast": lambda: [target.copy_(source) for target, source in copies]}
    native = context(method)
    partials = [torch.zeros(table.num_received, *x.shape[1:], dtype=x.dtype, device=device) for x in kv]
    totals = [torch.zeros(x.shape, device=device) for x in kv]
    return {
        "cast": lambda: native.cast(kv, table, lend=True),
        "reduce": lambda: native.reduce(partials, table, totals),
    }


def time_host(rank: int, num_ranks: int, method: str, ranges: int, times: int) -> dict[str, tuple[float, float]]:
    """Microseconds of the host, median and least, of each part of an exchange, and nanoseconds of Python's loop."""
    calls, before = host_calls(rank, num_ranks, method, ranges), time_loop()
    if method == "torch":
        parts = {"cast": timed(calls["cast"], times)[0]}
    else:
        cast, release = timed(calls["cast"], times, finish)
        parts = {"cast": cast, "release": release, "reduce": timed(calls["reduce"], times, finish)[0]}
    after = time_loop()
    return {**parts, "python": (min(before, after), max(before, after))}


def time_loop() -> float:
    """Nanoseconds that a turn of an empty loop takes Python."""
    started = time.perf_counter()
    for _ in range(LOOP_TURNS):
        pass
    return (time.perf_counter() - started) / LOOP_TURNS * 1e9


def timed(
    call: Callable[[], Any], times: int, after: Callable[[Any], None] = lambda result: None
) -> list[tuple[float, float]]:
    """Microseconds of a call, and of what comes after it: median and least of each."""
    seconds: list[tuple[float, float]] = []
    for number in range(times + WARM_UP):
        started = time.perf_counter()
        result = call()
        called = time.perf_counter()
        after(result)
        del result  # what a work costs when it goes is not the next call's
        done = time.perf_counter()
        if number % 8 == 7:  # GPUs fall behind, and would let the host wait at last
            torch.cuda.synchronize()
        if number >= WARM_UP:
            seconds.append((called - started, done - called))
    return [(statistics.median(each) * 1e6, min(each) * 1e6) for each in zip(*seconds, strict=True)]


def run_host_table(pool: RankPool, options: argparse.Namespace) -> dict[str, dict[str, tuple[float, float]]]:
    """Print the host's microseconds by number of ranges that a rank sends; returns the cells."""
    seen: defaultdict[str, defaultdict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    turns = [*product(range(options.turns), options.ranges, (*_TRANSPORTS, "torch"))]
    # NVSHMEM, once started, makes all of a process's calls a tenth slower.
    for _, count, name in sorted(turns, key=lambda turn: turn[2] == "puts"):
        ranges = max(1, count // 2 // (options.ranks - 1))  # of each tensor to each peer
        for parts in pool.run(time_host, name, ranges, options.times, timeout_s=120):
            for part, numbers in parts.items():
                seen[f"{count} ranges"][part if part == "python" else f"{name} {part}"].append(numbers)
    cells = {row: {name: summed_up(name, numbers) for name, numbers in seen[row].items()} for row in seen}
    columns = [f"{name} {part}" for name in _TRANSPORTS for part in ("cast", "release", "reduce")] + ["torch cast"]
    print(f"{'ranges':>7} {''.join(f'{name:>16}' for name in [*columns, 'torch/cast', 'python'])}", flush=True)
    for count in options.ranges:
        row = cells[f"{count} ranges"]
        text = "".join(f"{'{:.1f}/{:.1f}'.format(*row[name]):>16}" for name in columns)
        ratio = row["torch cast"][0] / min(row[f"{name} cast"][0] for name in _TRANSPORTS)
        print(f"{count:7d} {text}{ratio:16.1f}{'{:.1f}/{:.1f}'.format(*row['python']):>16}", flush=True)
    return cells


def summed_up(column: str, numbers: list[tuple[float, float]]) -> tuple[float, float]:
    """Of all turns and ranks, the least medians and the least calls; of Python's loops, the least and the most."""
    firsts, seconds = zip(*numbers, strict=True)
    return min(firsts), max(seconds) if column == "python" else min(seconds)


def run_tables(pool: RankPool, options: argparse.Namespace) -> dict[str, dict[str, tuple[float, float]]]:
    """Print both tables; returns their cells by range and method."""
    cells = {}
    print(f"{'range':>9} {''.join(f'{name:>8}    us' for name in METHODS)}  best/a2a best/nccl", flush=True)
    for kib in options.kib:
        row = cells[f"alone {kib} KiB"] = run_row(pool, options, time_alone, kib)
        text = "".join(f"{speed:8.0f}{host:6.0f}" for speed, host in row.values())
        best = max(row[name][0] for name in _TRANSPORTS)
        print(f"{kib:6d}KiB {text}  {best / row['a2a'][0]:8.2f} {best / row['nccl'][0]:9.2f}", flush=True)
    print(f"\nbeside attention\n{'range':>9} {''.join(f'{name:>8}  slower' for name in METHODS)}", flush=True)
    for kib in options.beside_kib:
        row = cells[f"beside {kib} KiB"] = run_row(pool, options, time_beside_attention, kib)
        print(f"{kib:6d}KiB {''.join(f'{speed:8.0f}{slower:8.1%}' for speed, slower in row.values())}", flush=True)
    return cells


def run_row(
    pool: RankPool, options: argparse.Namespace, measure: Callable[..., tuple[float, float]], kib: int
) -> dict[str, tuple[float, float]]:
    """The numbers of every method for ranges of one size."""
    arguments = options.mib << 20, kib << 10, options.times
    return {name: attempt(partial(pool.run, measure, name, *arguments, timeout_s=60)) for name in METHODS}


def attempt(run: Callable[[], list[tuple[float, float]]]) -> tuple[float, float]:
    """The numbers of rank 0, or none and why."""
    try:
        return run()[0]
    except (RuntimeError, TimeoutError) as error:
        print(f"failed: {error}", flush=True)
        return float("nan"), float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mib", type=int, default=128, help="MiB to each peer")
    parser.add_argument("--kib", type=int, nargs="*", default=[16, 32, 64, 256, 1024, 4096, 16384])
    parser.add_argument("--beside-kib", type=int, nargs="*", default=[32, 4096])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--turns", type=int, default=8, help="how often --host measures everything")
    parser.add_argument("--host", action="store_true", help="measure the host's time alone; works with one GPU")
    parser.add_argument("--ranges", type=int, nargs="*", default=[2, 50, 500], help="that a rank sends, for --host")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/grpcoll.py needs a GPU")
    is_shared = torch.cuda.device_count() < options.ranks
    if is_shared and not options.host:
        parser.error(f"{options.ranks} ranks need as many GPUs; only --host does with fewer")
    if is_shared:
        os.environ[SHARING] = "1"  # NCCL refuses to share one
    with RankPool(options.ranks, "gloo" if is_shared else "nccl") as pool:
        cells = run_host_table(pool, options) if options.host else run_tables(pool, options)
    if options.json:
        options.json.write_text(json.dumps(cells, indent=1))


if __name__ == "__main__":
    main()
