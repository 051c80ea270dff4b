# SPDX-License-Identifier: Apache-2.0
"""Time our planner beside the original's recorded figures: ``python benchmarks/planner.py``.

*plan ms* is all that one rank needs, from the mask to its stages and exchange tables, the median of several runs, and
*least* the shortest of them, which tells more on a busy machine; *limit* the goal: a tenth of the original's time or
10 ms, whichever is longer, but at most 100 ms (400 ms for 1,024 ranks). *max/mean* is the largest rank's mask area over
the mean; *received* the key rows that all ranks receive together, in millions; *bound* what any deal of equally many
rows with areas within 2 % must receive, followed by ours over the bound, and the bound over the original's (*of it*).
Some bounds are proved by prices (``planner_prices.json``, found by ``find_prices.py``); they are checked here, so that
nothing depends on how they were found. The original's figures (``planner_original.csv``: MagiAttention v1.1.1, Python
backend, minimum heap, one stage, the exchange of its planning data included) were recorded once on two cores; they are
not measured in this run.

``encoder_decoder`` is cross-attention: in packed documents, every query sees all of its document's keys, of which there
are four times as many; *tokens* are the keys.
"""

import argparse
import csv
import json
import statistics
import time
from pathlib import Path

import numpy as np

from magi_attention.api.checks import resolve_chunk_size
from magi_attention.common import workloads
from magi_attention.common.slices import SliceTable
from magi_attention.config import DispatchAlg, LocalityDispatchAlg, MinHeapDispatchAlg
from magi_attention.plan.bounds import received_lower_bound
from magi_attention.plan.build import Plan, build_plan
from magi_attention.plan.demand import find_demand
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.key_dispatch import make_key_layout
from magi_attention.plan.layout import Layout
from magi_attention.plan.prices import DocumentPrices, priced_lower_bound

ORIGINAL = Path(__file__).with_name("planner_original.csv")
PRICES = Path(__file__).with_name("planner_prices.json")
LARGEST = {"tokens": str(4 << 20), "cp": "1024"}  # beyond what was recorded of the original


ALGORITHMS = {"locality": LocalityDispatchAlg(), "min-heap": MinHeapDispatchAlg()}


CROSS = "encoder_decoder"
CROSS_SIZES = ({"tokens": str(1 << 20), "cp": "64"}, LARGEST)
KEYS_PER_QUERY = 4


def plan_for_one_rank(
    slices: SliceTable, num_queries: int, num_keys: int | None, num_ranks: int, algorithm: DispatchAlg
) -> Plan:
    """All that one rank derives, with chunks of the size that a key gets if the user names none.

    With ``num_keys``, keys are of another sequence.
    """

    def padded(num_real: int) -> dict[str, int]:
        chunk_size = resolve_chunk_size(num_real, num_ranks, None, algorithm)
        total = -(-num_real // (chunk_size * num_ranks)) * chunk_size * num_ranks
        return {"num_real": num_real, "total": total, "chunk_size": chunk_size}

    def deal_keys(queries: Layout) -> Layout:
        return queries if num_keys is None else make_key_layout(slices, queries, **padded(num_keys), is_permutable=True)

    layout = make_layout(
        slices,
        **padded(num_queries),
        num_ranks=num_ranks,
        algorithm=algorithm,
        deal_keys=None if num_keys is None else deal_keys,
        is_even=False,
    )
    return build_plan(slices, layout, rank=num_ranks // 2, key_layout=deal_keys(layout))


def make_mask(name: str, tokens: int) -> SliceTable:
    """One of the workloads; in cross-attention, over so many keys."""
    if name != CROSS:
        return workloads.make(name, tokens)
    keys = workloads.document_ends(tokens)
    queries = keys // KEYS_PER_QUERY
    full = np.zeros(len(keys) - 1, np.int64)
    return SliceTable(np.column_stack([queries[:-1], queries[1:], keys[:-1], keys[1:], full]))


def lower_bound(mask: str, slices: SliceTable, num_ranks: int, plan: Plan, num_keys: int | None) -> int:
    """The better one of the bounds on received rows, where prices are known."""
    total = plan.layout.total
    bound = received_lower_bound(
        slices, total, num_ranks, total_keys=None if num_keys is None else plan.key_layout.total
    )
    found = json.loads(PRICES.read_text()).get(f"{mask} {total} {num_ranks}")
    if not found:
        return bound
    return max(bound, priced_lower_bound(slices, total, num_ranks, [DocumentPrices(**each) for each in found]))


def measure(row: dict[str, str], repeat: int, algorithm: DispatchAlg) -> None:
    """Measure one row of the table and print it."""
    tokens, num_ranks = int(row["tokens"]), int(row["cp"])
    num_queries, num_keys = (tokens // KEYS_PER_QUERY, tokens) if row["mask"] == CROSS else (tokens, None)
    slices = make_mask(row["mask"], tokens)
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        plan = plan_for_one_rank(slices, num_queries, num_keys, num_ranks, algorithm)
        seconds.append(time.perf_counter() - start)
    demand = find_demand(slices, plan.layout, plan.key_layout)
    received = demand.rows_received
    bound = lower_bound(row["mask"], slices, num_ranks, plan, num_keys)
    original_ms = float(row.get("plan_ms", "nan")) + float(row.get("exchange_ms", "nan"))
    limit_ms = 400.0 if num_ranks == 1024 else min(max(original_ms / 10, 10.0), 100.0)
    original = float(row.get("received_millions", "nan"))
    print(f"{row['mask']:24}{tokens >> 10:>7}k{num_ranks:>5}{plan.layout.chunk_size:>7}", end="")
    print(f"{statistics.median(seconds) * 1e3:>9.1f}{min(seconds) * 1e3:>7.1f}", end="")
    print(f"{limit_ms:>7.0f}{original_ms:>10.0f}", end="")
    print(f"{demand.area.max() / demand.area.mean():>10.3f}{float(row.get('max_over_mean', 'nan')):>9.3f}", end="")
    print(f"{received / 1e6:>12.2f}{original:>9.2f}{received / 1e6 / original:>7.2f}", end="")
    print(
        f"{bound / 1e6:>9.2f}{received / bound if bound else float('nan'):>7.2f}{bound / 1e6 / original:>7.3f}",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only masks whose name contains this")
    parser.add_argument("--repeat", type=int, default=5, help="runs per row")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="locality", help="how chunks are dealt")
    arguments = parser.parse_args()
    print(
        f"{'mask':24}{'tokens':>8}{'cp':>5}{'chunk':>7}{'plan ms':>9}{'least':>7}{'limit':>7}{'original':>10}", end=""
    )
    print(f"{'max/mean':>10}{'original':>9}{'received M':>12}{'original':>9}{'ratio':>7}", end="")
    print(f"{'bound M':>9}{'ratio':>7}{'of it':>7}")
    rows = [*csv.DictReader(ORIGINAL.open()), *({"mask": name, **LARGEST} for name in workloads.WORKLOADS)]
    rows += [{"mask": CROSS, **size} for size in CROSS_SIZES]
    for row in rows:
        if arguments.only in row["mask"]:
            measure(row, arguments.repeat, ALGORITHMS[arguments.algorithm])


if __name__ == "__main__":
    main()
