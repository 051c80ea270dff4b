# SPDX-License-Identifier: Apache-2.0
"""Measure from which length of ranges on copy engines should carry them: ``python -m magi_comm_grpcoll.calibrate``.

The answer is kept per kind of GPU in the folder of ``MAGI_ATTENTION_CACHE_DIR``.
"""

from argparse import ArgumentParser

import numpy as np
import torch
import torch.distributed as dist

from magi_attention.plan.exchange import ExchangeTable
from magi_attention.testing.distributed import RankPool
from magi_comm_grpcoll.context import ContextOptions, GroupContext
from magi_comm_grpcoll.routes import Transport
from magi_comm_grpcoll.switch import keep_switch, switch_bytes

_SIZES = [1 << bits for bits in range(15, 24)]
_PEER_BYTES, _ROW_BYTES = 1 << 26, 1 << 12
_WARMUP, _TIMES = 3, 10
_TRANSPORTS: tuple[Transport, ...] = ("copy_engine", "push")


def measure(rank: int, num_ranks: int) -> dict[str, dict[int, float]]:
    """GB/s that the slowest rank sends, by transport and size of a range. All ranks must call it."""
    world = dist.group.WORLD
    assert world is not None
    rates: dict[str, dict[int, float]] = {}
    for transport in _TRANSPORTS:
        context = GroupContext(world, ContextOptions(transport=transport))
        rates[transport] = {}
        for size in _SIZES:
            table = exchange_in_turns(rank, num_ranks, size // _ROW_BYTES, _PEER_BYTES // size)
            seconds = torch.tensor(_seconds(context, table), device=context.device)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            rates[transport][size] = _PEER_BYTES * (num_ranks - 1) / seconds.item() / 1e9
        context.close()
    return rates


def _seconds(context: GroupContext, table: ExchangeTable) -> float:
    rows = torch.zeros(table.num_source, _ROW_BYTES, dtype=torch.uint8, device=context.device)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for number in range(_WARMUP + _TIMES):
        if number == _WARMUP:
            start.record()
        work = context.cast([rows], table, lend=True)
        work.wait()
        work.release()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / _TIMES


def exchange_in_turns(rank: int, num_ranks: int, rows: int, count: int) -> ExchangeTable:
    """All ranks send ``count`` ranges of ``rows`` rows to all others, where they land in turns and backwards.

    So no range continues another one.
    """
    peers = [peer for peer in range(num_ranks) if peer != rank]
    first = np.arange(count) * rows
    send = [np.column_stack([np.full(count, peer), first, first + rows]) for peer in peers]
    landing = [(np.arange(count)[::-1] * len(peers) + turn) * rows for turn in range(len(peers))]
    recv = [np.column_stack([np.full(count, peer), at, at + rows]) for peer, at in zip(peers, landing, strict=True)]
    total = count * rows
    return ExchangeTable(np.concatenate(send), np.concatenate(recv), num_ranks, total, total * len(peers))


def main() -> None:
    """Measure among all GPUs of this machine, keep and print."""
    what = "Measure among all GPUs of this machine from which length of ranges on copy engines should carry them."
    ArgumentParser("python -m magi_comm_grpcoll.calibrate", description=what).parse_args()
    num_ranks = torch.cuda.device_count()
    if num_ranks < 2:
        raise SystemExit(f"there is nothing to measure between {num_ranks} GPUs")
    with RankPool(num_ranks, "nccl") as pool:
        rates = pool.run(measure, timeout_s=300)[0]
    name = torch.cuda.get_device_name(0)
    path = keep_switch(name, rates)
    print(f"{'range':>9} {'copies':>7} {'push':>7}  GB/s in one direction, {num_ranks} GPUs")
    for size in _SIZES:
        print(f"{size >> 10:6d}KiB {rates['copy_engine'][size]:7.0f} {rates['push'][size]:7.0f}")
    print(f"copy engines from {switch_bytes(name) >> 10} KiB on, kept in {path}")


if __name__ == "__main__":
    main()
