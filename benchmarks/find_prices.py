# SPDX-License-Identifier: Apache-2.0
"""Find prices that prove a lower bound on received rows: ``python benchmarks/find_prices.py varlen_causal 4096k 256``.

The bound that prices prove (see :mod:`magi_attention.plan.prices`) is a concave function of them. It is maximized by
cutting planes: what each interval's best set of rows costs is linear in the prices, and bounds what they can prove from
above; a linear program finds the best prices within a box around the best so far. Once that gains little, intervals
are halved, which leaves the bound as it is, and the search goes on. Needs SciPy (``pip install scipy``) and takes
minutes to an hour; writes ``planner_prices.json``, which ``planner.py`` reads.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.optimize import linprog

from magi_attention.common import workloads
from magi_attention.plan.prices import LEAST_OF_AREA, TOGETHER, CellPrices, DocumentPrices, Gains, RowProgram

PRICES = Path(__file__).with_name("planner_prices.json")
Floats = NDArray[np.float64]

# At the start, the documents with the longest reaches stand alone, the others with those of at least 1 / ALIKE of the
# reach; each class has so many prices of rows, intervals of reach and of key places: of the first FINE documents, of
# those with more than LONG of a rank's rows, of the others.
ALONE, ALIKE, FINE, LONG = 5, 1.2, 4, 0.6
KNOTS, REACHES, PLACES = (22, 6, 3), (25, 6, 2), (24, 8, 2)
# How prices, and intervals of reach, crowd at the light end.
CROWDED, CROWDED_REACHES = 1.7, 1.2
# Cuts that are kept, for each variable; the box around the best prices and how it changes with success.
KEPT, SHARE = 4, 0.6
FIRST_BOX, BOX, WIDER, NARROWER, LEAST_BOX, MOST_BOX = 0.5, 0.03, 1.5, 0.93, 5e-3, 1.0
# Prices are halved once the box's best is no more than this share above what is proved.
CLOSE = 5e-4


@dataclass
class Problem:
    """Prices as a vector: rows, multipliers of rows, multipliers of areas, keys; and the maps to cells."""

    program: RowProgram
    classes: list[DocumentPrices]

    def __post_init__(self) -> None:
        program = self.program
        middle, top = (program.low + program.high) / 2, program.before + program.places
        self.interval = program.lay_out(self.classes).interval
        rows, keys, begin = [], [], 0
        for each in self.classes:
            stop = int(np.searchsorted(program.document, each.stop))
            units = np.eye(len(each.areas))
            rows.append(np.column_stack([np.interp(middle[begin:stop], each.areas, unit) for unit in units]))
            keys.append(np.eye(len(each.places))[np.searchsorted(each.places[:-1], top[begin:stop])])
            begin = stop
        self.to_rows, self.to_keys = sp.block_diag(rows).tocsr(), sp.block_diag(keys).tocsr()
        self.num_intervals = sum(len(each.reaches) for each in self.classes)
        sizes = [self.to_rows.shape[1], self.num_intervals, self.num_intervals, self.to_keys.shape[1]]
        self.ends = np.cumsum(sizes)

    def split(self, vector: Floats) -> list[Floats]:
        """Prices of rows, multipliers of rows and of areas, prices of keys."""
        return np.split(vector, self.ends[:-1])

    def vector(self) -> Floats:
        """The prices of the classes."""
        names = ("rows", "of_rows", "of_area", "keys")
        return np.concatenate([np.concatenate([getattr(each, name) for each in self.classes]) for name in names])

    def cells(self, vector: Floats) -> CellPrices:
        """Prices by cell."""
        rows, of_rows, of_area, keys = self.split(vector)
        return CellPrices(
            self.to_rows @ rows, self.to_keys @ keys, self.interval, of_rows, np.maximum(of_area, LEAST_OF_AREA)
        )

    def priced(self, vector: Floats) -> list[DocumentPrices]:
        """The classes with these prices."""
        classes, at = [], np.zeros(4, np.int64)
        parts = self.split(vector)
        for each in self.classes:
            size = np.array([len(each.areas), len(each.reaches), len(each.reaches), len(each.places)])
            rows, of_rows, of_area, keys = (
                part[a : a + n].tolist() for part, a, n in zip(parts, at, size, strict=True)
            )
            classes.append(
                DocumentPrices(each.stop, each.areas, rows, each.reaches, of_rows, of_area, each.places, keys)
            )
            at += size
        return classes


def first_prices(program: RowProgram) -> list[DocumentPrices]:
    """A guess: a rank pays its reach by its area, and rows of so many keys as its longest make that area."""
    reach = np.maximum.reduceat(program.before + program.places, program.start).astype(float)
    least = np.minimum.reduceat(program.first, program.start)
    rows = np.add.reduceat(program.num_rows, program.start)
    classes, begin = [], 0
    while begin < len(reach):
        stop = begin + 1
        while begin >= ALONE and stop < len(reach) and reach[stop] > reach[begin] / ALIKE - 1:
            stop += 1
        kind = 0 if begin < FINE else 1 if rows[begin] > LONG * program.most_rows else 2
        low, high = float(least[begin:stop].min()), float(reach[begin])
        span = max(high - low, 1.0)
        areas = low + span * np.linspace(0, 1, KNOTS[kind]) ** CROWDED
        reaches = low + span * np.linspace(0, 1, REACHES[kind] + 1)[1:] ** CROWDED_REACHES
        places = np.linspace(0, max(high, 1.0), PLACES[kind] + 1)[1:]
        classes.append(
            DocumentPrices(
                stop=stop,
                areas=areas.tolist(),
                rows=(areas**2 / program.most_area + 1.5).tolist(),
                reaches=reaches.tolist(),
                of_rows=[0.0] * len(reaches),
                of_area=(reaches / program.most_area).tolist(),
                places=places.tolist(),
                keys=[0.0] * len(places),
            )
        )
        begin = stop
    return classes


def refine(classes: list[DocumentPrices]) -> list[DocumentPrices]:
    """The same prices, with the intervals halved between prices of rows, and of reaches for the longest documents."""
    refined, begin = [], 0
    for each in classes:
        areas = np.sort(np.append(each.areas, np.convolve(each.areas, (0.5, 0.5), "valid")))
        rows = np.interp(areas, each.areas, each.rows)
        each = replace(each, areas=areas.tolist(), rows=rows.tolist())
        if begin < ALONE:
            ends = np.sort(np.append(each.reaches, np.convolve([0.0, *each.reaches], (0.5, 0.5), "valid")))
            each = replace(
                each,
                reaches=ends.tolist(),
                of_rows=np.repeat(each.of_rows, 2).tolist(),
                of_area=np.repeat(each.of_area, 2).tolist(),
            )
        refined.append(each)
        begin = each.stop
    return refined


class Search:
    """Cutting planes in a box around the best prices so far."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.program = problem, problem.program
        self.best = problem.vector()
        self.size = len(self.best)
        self.scale = np.ones(self.size)
        self.scale[problem.ends[1] : problem.ends[2]] = self.program.most_area  # multipliers of areas are tiny
        self.cuts, self.costs = sp.csr_matrix((0, self.size + 1)), np.zeros(0)
        self.intervals = np.unique(problem.interval)
        program = self.program
        self.paid = np.concatenate(
            [
                problem.to_rows.T @ program.num_rows,
                np.zeros(2 * problem.num_intervals),
                problem.to_keys.T @ program.readers,
            ]
        )
        self.reach = np.zeros(problem.num_intervals)
        np.maximum.at(self.reach, problem.interval, program.high)

    def prove(self, vector: Floats, most_cuts: int) -> float:
        """What the prices prove; adds the cuts of the intervals that hold the bound down."""
        problem, program = self.problem, self.program
        prices = problem.cells(vector)
        least = np.concatenate([program.least_cost(prices, some) for some in self._groups(self.intervals)])
        chosen = self.intervals[np.argsort(least, kind="stable")[:most_cuts]]
        for some in self._groups(chosen):
            self._add_cuts(prices, some)
        return program.num_ranks * least.min() + self.paid @ vector - program.total

    @staticmethod
    def _groups(intervals: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        return [intervals[some : some + TOGETHER] for some in range(0, len(intervals), TOGETHER)]

    def _add_cuts(self, prices: CellPrices, intervals: NDArray[np.int64]) -> None:
        """The sets of rows that these intervals choose, as rows of the linear program."""
        problem, program = self.problem, self.program
        gains = Gains(program, prices, intervals)
        place = np.arange(len(program.first))
        number = np.arange(len(intervals))
        top = np.full(gains.of_documents.shape, -1)
        best = gains.of_documents[:, program.document]
        row, cell = np.nonzero((gains.allowed == best) & (best > 0))
        top[row[::-1], program.document[cell[::-1]]] = cell[::-1]
        top[number, program.document[gains.anchor]] = gains.anchor
        of_cell = top[:, program.document]
        until = np.where(place < of_cell, gains.held, np.where(place == of_cell, gains.ends, program.low))
        count = program.times * (until - program.low)
        weight = (count * (until + program.low) / 2).sum(axis=1)
        reach = np.where(place == of_cell, gains.reach, 0.0)
        keys = np.where(place < of_cell, program.places, np.where(place == of_cell, reach - program.before, 0.0))
        rows = np.zeros((len(intervals), self.size + 1))
        rows[:, 0] = 1
        ends = problem.ends + 1
        rows[:, 1 : ends[0]] = count @ problem.to_rows
        rows[number, ends[0] + intervals] = program.most_rows - count.sum(axis=1)
        rows[number, ends[1] + intervals] = program.most_area - weight
        rows[:, ends[2] :] = keys @ problem.to_keys
        rows[:, 1:] /= self.scale
        self.cuts = sp.vstack([self.cuts, sp.csr_matrix(rows)]).tocsr()
        self.costs = np.append(self.costs, reach.sum(axis=1))

    def _box(self, box: float) -> list[tuple[float | None, float | None]]:
        """Bounds of the variables, scaled."""
        rows, of_rows, of_area, keys = self.problem.split(self.best)
        radius = np.concatenate(
            [
                box * (1 + 0.3 * rows),
                np.full_like(of_rows, 3 * box),
                box * (0.3 * of_area + 0.1 * self.reach / self.program.most_area),
                np.full_like(keys, box),
            ]
        )
        low, high = self.best - radius, self.best + radius
        low[: len(rows)] = np.maximum(low[: len(rows)], 0)
        low[self.problem.ends[1] :] = np.maximum(low[self.problem.ends[1] :], 0)
        high[self.problem.ends[2] :] = np.minimum(high[self.problem.ends[2] :], 1)
        return [(None, None), *zip(low * self.scale, high * self.scale, strict=True)]

    def run(self, until: float, enough: float, is_guess: bool) -> tuple[Floats, float]:
        """Search until the time is over or the box's best is close; the best prices and what they prove."""
        most = len(self.intervals)
        proved, box = self.prove(self.best, most), FIRST_BOX if is_guess else BOX
        number = 0
        while time.monotonic() < until:
            objective = -np.append(self.program.num_ranks, self.paid / self.scale)
            result = None
            for method in ("highs-ipm", "highs-ds"):
                result = linprog(objective, self.cuts, self.costs, bounds=self._box(box), method=method)
                if result.x is not None:
                    break
            if result is None or result.x is None:
                break
            hoped = -result.fun - self.program.total
            if number % 10 == 0:
                print(
                    f"{number:5} proved {proved / 1e6:9.4f} hoped {hoped / 1e6:9.4f} box {box:.4f} "
                    f"cuts {len(self.costs):6} {until - time.monotonic():6.0f} s left",
                    flush=True,
                )
            if number > 20 and hoped - proved < CLOSE * proved and box > 0.02:
                break
            if len(self.costs) > (KEPT + 2) * self.size:
                kept = np.sort(np.argsort(self.costs - self.cuts @ result.x)[: KEPT * self.size])
                self.cuts, self.costs = self.cuts[kept], self.costs[kept]
            candidate = SHARE * result.x[1:] / self.scale + (1 - SHARE) * self.best
            now = self.prove(candidate, most if number < 5 else max(60, most // 2))
            if now > proved:
                proved, self.best, box = now, candidate, min(box * WIDER, MOST_BOX)
            else:
                box = max(box * NARROWER, LEAST_BOX)
            number += 1
            if proved > enough:
                break
        return self.best, proved


def rounded(prices: DocumentPrices) -> dict[str, object]:
    """The prices with eight digits."""
    return {
        name: value if name == "stop" else [float(f"{number:.8g}") for number in value]
        for name, value in asdict(prices).items()
    }


def to_text(found: dict[str, list[dict[str, object]]]) -> str:
    """JSON with a line for each class of documents."""
    rows = (
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(each) for each in classes) + "\n]"
        for name, classes in sorted(found.items())
    )
    return "{\n" + ",\n".join(rows) + "\n}\n"


def main() -> None:
    """Search, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mask", choices=workloads.WORKLOADS)
    parser.add_argument("tokens", type=lambda text: int(text.removesuffix("k")) << 10, help="as 4096k")
    parser.add_argument("ranks", type=int)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long to search")
    parser.add_argument("--refine", type=int, default=1, help="how often to halve the prices")
    parser.add_argument("--enough", type=float, default=float("inf"), help="stop once so many rows are proved")
    parser.add_argument("--output", type=Path, default=PRICES)
    arguments = parser.parse_args()
    program = RowProgram(workloads.make(arguments.mask, arguments.tokens), arguments.tokens, arguments.ranks, 0.02)
    found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    name = f"{arguments.mask} {arguments.tokens} {arguments.ranks}"
    is_guess = name not in found
    classes = first_prices(program) if is_guess else [DocumentPrices(**each) for each in found[name]]
    until = time.monotonic() + 60 * arguments.minutes
    for halved in range(arguments.refine + 1):
        if halved:
            classes = refine(classes)
        problem = Problem(program, classes)
        print(f"{len(program.first)} cells, {problem.num_intervals} intervals of reach, {problem.ends[-1]} prices")
        best, proved = Search(problem).run(until, arguments.enough, is_guess)
        is_guess = False
        classes = problem.priced(best)
        found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        found[name] = [rounded(each) for each in classes]
        arguments.output.write_text(to_text(found))
        print(f"{name}: at least {program.prove(program.lay_out(classes)):.0f} rows ({proved:.0f})")
        if proved > arguments.enough or time.monotonic() > until:
            break


if __name__ == "__main__":
    main()
