# SPDX-License-Identifier: Apache-2.0
"""Time our planner beside the original's recorded figures: ``python benchmarks/planner.py``.

*plan ms* is all that one rank needs, from the mask to its stages and exchange tables, the median of several runs;
*limit* the goal: a tenth of the original's time or 10 ms, whichever is longer, but at most 100 ms (400 ms for 1,024
ranks). *max/mean* is the largest rank's mask area over the mean; *received* the key rows that all ranks receive
together, in millions; *bound* what any deal of equally many rows with areas within 2 % must receive. The original's
figures (``planner_original.csv``: MagiAttention v1.1.1, Python backend, minimum heap, one stage, the exchange of its
planning data included) were recorded once on two cores; they are not measured in this run.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

from magi_attention.api.checks import resolve_chunk_size
from magi_attention.common import workloads
from magi_attention.common.slices import SliceTable
from magi_attention.config import DispatchAlg, LocalityDispatchAlg, MinHeapDispatchAlg
from magi_attention.plan.bounds import received_lower_bound
from magi_attention.plan.build import Plan, build_plan
from magi_attention.plan.demand import find_demand
from magi_attention.plan.dispatch import make_layout

ORIGINAL = Path(__file__).with_name("planner_original.csv")
LARGEST = {"tokens": str(4 << 20), "cp": "1024"}  # beyond what was recorded of the original


ALGORITHMS = {"locality": LocalityDispatchAlg(), "min-heap": MinHeapDispatchAlg()}


def plan_for_one_rank(slices: SliceTable, num_real: int, num_ranks: int, algorithm: DispatchAlg) -> Plan:
    """All that one rank derives for a sequence, with chunks of the size that a key gets if the user names none."""
    chunk_size = resolve_chunk_size(num_real, num_ranks, None, algorithm)
    layout = make_layout(
        slices,
        num_real=num_real,
        total=-(-num_real // (chunk_size * num_ranks)) * chunk_size * num_ranks,
        chunk_size=chunk_size,
        num_ranks=num_ranks,
        algorithm=algorithm,
    )
    return build_plan(slices, layout, rank=num_ranks // 2)


def measure(row: dict[str, str], repeat: int, algorithm: DispatchAlg) -> None:
    """Measure one row of the table and print it."""
    tokens, num_ranks = int(row["tokens"]), int(row["cp"])
    slices = workloads.make(row["mask"], tokens)
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        plan = plan_for_one_rank(slices, tokens, num_ranks, algorithm)
        seconds.append(time.perf_counter() - start)
    demand = find_demand(slices, plan.layout)
    received = int((demand.remote[:, 2] - demand.remote[:, 1]).sum())
    bound = received_lower_bound(slices, plan.layout.total, num_ranks)
    original_ms = float(row.get("plan_ms", "nan")) + float(row.get("exchange_ms", "nan"))
    limit_ms = 400.0 if num_ranks == 1024 else min(max(original_ms / 10, 10.0), 100.0)
    original = float(row.get("received_millions", "nan"))
    print(f"{row['mask']:24}{tokens >> 10:>7}k{num_ranks:>5}{plan.layout.chunk_size:>7}", end="")
    print(f"{statistics.median(seconds) * 1e3:>9.1f}{limit_ms:>7.0f}{original_ms:>10.0f}", end="")
    print(f"{demand.area.max() / demand.area.mean():>10.3f}{float(row.get('max_over_mean', 'nan')):>9.3f}", end="")
    print(f"{received / 1e6:>12.2f}{original:>9.2f}{received / 1e6 / original:>7.2f}", end="")
    print(f"{bound / 1e6:>9.2f}{received / bound if bound else float('nan'):>7.2f}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only masks whose name contains this")
    parser.add_argument("--repeat", type=int, default=5, help="runs per row")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="locality", help="how chunks are dealt")
    arguments = parser.parse_args()
    print(f"{'mask':24}{'tokens':>8}{'cp':>5}{'chunk':>7}{'plan ms':>9}{'limit':>7}{'original':>10}", end="")
    print(f"{'max/mean':>10}{'original':>9}{'received M':>12}{'original':>9}{'ratio':>7}{'bound M':>9}{'ratio':>7}")
    rows = [*csv.DictReader(ORIGINAL.open()), *({"mask": name, **LARGEST} for name in workloads.WORKLOADS)]
    for row in rows:
        if arguments.only in row["mask"]:
            measure(row, arguments.repeat, ALGORITHMS[arguments.algorithm])


if __name__ == "__main__":
    main()
