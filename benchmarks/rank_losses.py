# SPDX-License-Identifier: Apache-2.0
"""Where a plan receives more rows than its bound: ``python benchmarks/rank_losses.py varlen_causal 4096k 256``.

Prices of rows and keys (``planner_prices.json``) prove a lower bound on the rows that all ranks receive. By the same
prices, what a plan receives more than that falls upon its ranks: each *loses* what its reaches cost beyond the prices
of its rows and keys, less the least that any set of rows can cost beyond them (``magi_attention.plan.prices``). A rank
that loses nothing holds rows that a best plan could give it. So losses show which ranks are dealt badly, and which need
no further thought.

Ranks are listed by how far they reach into the document of which they read most keys: how many there are, what they
lose together and each in thousands of rows, their largest and mean area over the mean of all, and how many documents
they hold in part. *keys* is what the bound's prices of keys pay beyond the ranks that must read them. Losses and keys
add up to what is received beyond the bound, where each row reads the first keys of its document.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from magi_attention.api.checks import resolve_chunk_size
from magi_attention.common import workloads
from magi_attention.config import LocalityDispatchAlg
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.prices import TOGETHER, CellPrices, DocumentPrices, RowProgram, locate_rows

PRICES = Path(__file__).with_name("planner_prices.json")
TOLERANCE = 0.02
# Ends of the intervals of reach, in rows of one rank.
REACHES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, np.inf)
Array = NDArray[np.int64]
Floats = NDArray[np.float64]


class Holdings:
    """What each rank holds of each document; all arrays are ``(num_documents, num_ranks)``.

    Attributes:
        rows: numbers of rows.
        area: their areas.
        reach: the most keys that one of them reads.
        for_rows: the prices of these rows.
        for_keys: the prices of the keys up to the reach.
    """

    def __init__(
        self, program: RowProgram, prices: CellPrices, document: Array, keys_read: Array, owner: Array
    ) -> None:
        shape = (len(program.start), program.num_ranks)
        held = document * program.num_ranks + owner
        size = shape[0] * shape[1]
        beyond = int(keys_read.max()) + 1
        first = program.document * beyond + program.first
        cell = np.searchsorted(first, document * beyond + keys_read, side="right") - 1
        self.rows = np.bincount(held, minlength=size).reshape(shape)
        self.area = np.bincount(held, keys_read, size).reshape(shape)
        reach = np.zeros(size, np.int64)
        np.maximum.at(reach, held, keys_read)
        self.reach = reach.reshape(shape)
        self.for_rows = np.bincount(held, prices.rows[cell], size).reshape(shape)
        self.for_keys = np.zeros(shape)
        stops = np.append(program.start[1:], len(program.first))
        for place, (begin, stop) in enumerate(zip(program.start.tolist(), stops.tolist(), strict=True)):
            top = np.append(0, program.before[begin:stop] + program.places[begin:stop])
            keys = np.append(0, np.cumsum(prices.keys[begin:stop] * program.places[begin:stop]))
            self.for_keys[place] = np.interp(self.reach[place], top, keys)


def least_cost(program: RowProgram, prices: CellPrices) -> float:
    """The least that a rank's reaches can cost beyond the prices of its rows and keys."""
    intervals = np.unique(prices.interval)
    parts = [intervals[some : some + TOGETHER] for some in range(0, len(intervals), TOGETHER)]
    return min(float(program.least_cost(prices, part).min()) for part in parts)


def report(program: RowProgram, prices: CellPrices, holdings: Holdings) -> None:
    """Print the table."""
    reach, room = holdings.reach.max(axis=0), program.most_rows
    loss = (holdings.reach - holdings.for_rows - holdings.for_keys).sum(axis=0) - least_cost(program, prices)
    keys = holdings.for_keys.sum() - (prices.keys * program.readers).sum()
    area = holdings.area.sum(axis=0) / (holdings.area.sum() / program.num_ranks)
    parts = ((holdings.rows > 0) & (holdings.rows < holdings.rows.sum(axis=1, keepdims=True))).sum(axis=0)
    print(f"{'reach':>17}{'ranks':>7}{'lost k':>9}{'each':>7}{'most area':>11}{'mean':>7}{'parts':>7}")
    for low, high in zip((0.0, *REACHES[:-1]), REACHES, strict=True):
        mine = (reach > low * room) & (reach <= high * room)
        if mine.any():
            print(f"{low * room:>8.0f} {min(high * room, reach.max()):>8.0f}{mine.sum():>7}", end="")
            print(f"{loss[mine].sum() / 1e3:>9.1f}{loss[mine].mean() / 1e3:>7.1f}", end="")
            print(f"{area[mine].max():>11.3f}{area[mine].mean():>7.3f}{parts[mine].mean():>7.1f}")
    bound, received = program.prove(prices), int(holdings.reach.sum()) - program.total
    print(f"received {received / 1e6:.3f} M, bound {bound / 1e6:.3f} M,", end=" ")
    print(f"lost {loss.sum() / 1e6:.3f} M, keys {keys / 1e6:.3f} M")


def main() -> None:
    """Plan, and print what each rank loses."""
    found = json.loads(PRICES.read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mask", choices=workloads.WORKLOADS)
    parser.add_argument("tokens", type=lambda text: int(text.removesuffix("k")) << 10, help="as 4096k")
    parser.add_argument("ranks", type=int)
    arguments = parser.parse_args()
    name = f"{arguments.mask} {arguments.tokens} {arguments.ranks}"
    if name not in found:
        parser.error(f"prices are known for {', '.join(sorted(found))}; find_prices.py finds others")
    algorithm, total = LocalityDispatchAlg(), arguments.tokens
    slices = workloads.make(arguments.mask, total)
    chunk_size = resolve_chunk_size(total, arguments.ranks, None, algorithm)
    layout = make_layout(
        slices,
        num_real=total,
        total=total,
        chunk_size=chunk_size,
        num_ranks=arguments.ranks,
        algorithm=algorithm,
        is_even=False,
    )
    program = RowProgram(slices, total, arguments.ranks, TOLERANCE)
    prices = program.lay_out([DocumentPrices(**each) for each in found[name]])
    owner = np.repeat(layout.owner, np.diff(layout.cuts))
    report(program, prices, Holdings(program, prices, *locate_rows(slices, total), owner))


if __name__ == "__main__":
    main()
