# SPDX-License-Identifier: Apache-2.0
"""Time our planner beside the original's recorded figures: ``python benchmarks/planner.py [--only NAME] [--repeat N]``.

*plan ms* is all that one rank needs, from the mask to its stages and exchange tables, the median of several runs.
*max/mean* is the largest rank's mask area over the mean; *received* the key rows that all ranks receive together, in
millions. The original's figures (``planner_original.csv``: MagiAttention v1.1.1, Python backend, minimum heap, one
stage, the exchange of its planning data included) were recorded once on two cores; they are not measured in this run.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import workloads

from magi_attention.config import MinHeapDispatchAlg
from magi_attention.plan.build import Plan, build_plan
from magi_attention.plan.demand import find_demand
from magi_attention.plan.dispatch import make_layout

ORIGINAL = Path(__file__).with_name("planner_original.csv")


def plan_for_one_rank(slices: workloads.SliceTable, total: int, chunk_size: int, num_ranks: int) -> Plan:
    layout = make_layout(
        slices,
        num_real=total,
        total=total,
        chunk_size=chunk_size,
        num_ranks=num_ranks,
        algorithm=MinHeapDispatchAlg(),
    )
    return build_plan(slices, layout, rank=num_ranks // 2)


def measure(row: dict[str, str], repeat: int) -> dict[str, float]:
    total, num_ranks, chunk_size = int(row["tokens"]), int(row["cp"]), int(row["chunk"])
    slices = workloads.make(row["mask"], total)
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        plan = plan_for_one_rank(slices, total, chunk_size, num_ranks)
        seconds.append(time.perf_counter() - start)
    demand = find_demand(slices, plan.layout)
    return {
        "ms": statistics.median(seconds) * 1e3,
        "balance": demand.area.max() / demand.area.mean(),
        "received": (demand.remote[:, 2] - demand.remote[:, 1]).sum() / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only masks whose name contains this")
    parser.add_argument("--repeat", type=int, default=5, help="runs per row")
    arguments = parser.parse_args()
    print(f"{'mask':24}{'tokens':>8}{'cp':>5}{'chunk':>7}{'plan ms':>9}{'original':>9}{'ratio':>8}", end="")
    print(f"{'max/mean':>10}{'original':>9}{'received M':>12}{'original':>9}{'ratio':>7}")
    slowest = 0.0
    for row in csv.DictReader(ORIGINAL.open()):
        if arguments.only not in row["mask"]:
            continue
        ours = measure(row, arguments.repeat)
        original = float(row["plan_ms"]) + float(row["exchange_ms"])
        slowest = max(slowest, ours["ms"])
        received = float(row["received_millions"])
        print(f"{row['mask']:24}{int(row['tokens']) // 1024:>7}k{row['cp']:>5}{row['chunk']:>7}", end="")
        print(f"{ours['ms']:>9.1f}{original:>9.0f}{ours['ms'] / original:>8.3f}", end="")
        print(f"{ours['balance']:>10.3f}{float(row['max_over_mean']):>9.3f}", end="")
        print(f"{ours['received']:>12.2f}{received:>9.2f}{ours['received'] / received:>7.2f}", flush=True)
    print(f"slowest row: {slowest:.1f} ms")


if __name__ == "__main__":
    main()
