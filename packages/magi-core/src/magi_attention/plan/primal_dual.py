# SPDX-License-Identifier: Apache-2.0
"""Solve the linear program of cuts: how far to shift each, so that few rows are received and ranks keep their limits.

The method is the primal-dual hybrid gradient, reflected and anchored at its last restart, as for large linear programs
in "PDLP" (Applegate et al. 2021) and "Restarted Halpern PDHG" (Lu and Yang 2024). All is done element by element or
summed in order, so that it comes out the same on every rank.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]
Floats = NDArray[np.float64]

# Weights of the areas and of the rows sent beside those of the rows that ranks hold; steps of the method follow.
FOR_AREA, FOR_SENT = 0.5, 0.05
# The method starts anew after so many steps, from where it is.
PERIOD = 100


class Program(NamedTuple):
    """A linear program in the shifts of cuts.

    Runs of rows lie side by side, and a cut between each and the next: if it is shifted by x rows, the first one grows
    by x, the other shrinks. What shifts cost in all is to be least.

    Attributes:
        rank: ``(n,)`` the rank of each run.
        length: ``(n,)`` its rows, which must not fall below 0.
        readers: ``(n,)`` how many other ranks read it.
        weight: ``(n - 1,)`` the area of a row at each cut.
        cost: ``(n - 1,)`` what shifting it by a row costs.
        least: ``(n - 1,)`` how far it may be shifted down, at most 0.
        most: ``(n - 1,)`` how far up.
        bounds: ``(3, num_ranks)`` how many rows each rank must gain, how much area it may, and how many rows more it
            may send.
    """

    rank: Array
    length: Floats
    readers: Floats
    weight: Floats
    cost: Floats
    least: Floats
    most: Floats
    bounds: Floats


class Prices(NamedTuple):
    """Prices by which shifts are chosen, and which a program like the last one can start with.

    Attributes:
        of_rank: ``(3, num_ranks)`` of a row, of area and of a row sent, for each rank.
        of_run: ``(n,)`` of a row that a run has left to lose.
    """

    of_rank: Floats
    of_run: Floats


def solve(program: Program, prices: Prices, steps: int, pace: float) -> tuple[Floats, Prices]:
    """Nearly solve the program.

    Args:
        program: the program; at least two runs.
        prices: where to start.
        steps: how many steps to take.
        pace: how many rows shifts go in a step for each row that they save; prices go the less far.

    Returns:
        ``(n - 1,)`` the shifts, and the prices.
    """
    rank, length, readers, weight, cost, least, most, bounds = program
    n, num_ranks = len(rank), bounds.shape[1]
    row_of = np.concatenate([rank, rank + num_ranks, rank + 2 * num_ranks])
    is_free = (most > least).astype(np.float64)
    # Steps are as short as the entries of a row or a column are many and large.
    touched = np.zeros((3, n))
    for cut in (slice(None, -1), slice(1, None)):
        touched[:, cut] += is_free, is_free * weight, is_free * readers[cut]
    rate = 1 / pace / np.maximum(np.bincount(row_of, touched.ravel(), 3 * num_ranks), 0.01)
    rate *= np.repeat([1.0, FOR_AREA, FOR_SENT], num_ranks)
    step = is_free * pace / (4 + 2 * FOR_AREA * weight + FOR_SENT * (readers[:-1] + readers[1:]))
    step_of = np.stack([step, step * weight])
    step_cost = step * cost
    bound = bounds.ravel() * rate
    run_rate = 0.5 / pace
    run_bound = run_rate * length
    # One array holds shifts and prices; after, and anchor, are others like it.
    state = np.concatenate([np.zeros(n - 1), prices.of_rank.ravel(), prices.of_run])
    anchor, after = state.copy(), np.empty_like(state)
    parts = [n - 1, n - 1 + 3 * num_ranks]
    (shift, price, run_price), (new_shift, new_price, new_run_price) = np.split(state, parts), np.split(after, parts)
    bounded_price = new_price[num_ranks:]
    # What cuts have moved of rows and area, with nothing before the first one and after the last.
    moved, gained, value, slope = np.zeros((2, n + 1)), np.empty((3, n)), np.empty((3, n)), np.empty((2, n - 1))
    # Their parts are views, made once, since that takes as long as to add some hundred numbers.
    (moved_rows, moved_area), at_start, at_end = moved[:, 1:-1], moved[:, :-1], moved[:, 1:]
    gained_flat, gained_two, (gained_rows, _, gained_sent) = gained.reshape(-1), gained[:2], gained
    value_flat, (value_rows, _, value_sent), below, above = value.reshape(-1), value, value[:2, :-1], value[:2, 1:]
    slope_rows, slope_area = slope
    since = 0
    for number in range(1, steps + 1):
        price.take(row_of, out=value_flat, mode="clip")
        value_sent *= readers
        value_rows += value_sent
        value_rows -= run_price
        np.subtract(below, above, out=slope)
        slope *= step_of
        np.subtract(shift, slope_rows, out=new_shift)
        new_shift -= slope_area
        new_shift -= step_cost
        np.maximum(new_shift, least, out=new_shift)
        np.minimum(new_shift, most, out=new_shift)
        np.add(new_shift, new_shift, out=moved_rows)
        moved_rows -= shift
        np.multiply(moved_rows, weight, out=moved_area)
        np.subtract(at_end, at_start, out=gained_two)
        np.multiply(gained_rows, readers, out=gained_sent)
        np.multiply(np.bincount(row_of, gained_flat, 3 * num_ranks), rate, out=new_price)
        new_price -= bound
        new_price += price
        np.maximum(bounded_price, 0, out=bounded_price)
        np.multiply(gained_rows, run_rate, out=new_run_price)
        np.subtract(run_price, new_run_price, out=new_run_price)
        new_run_price -= run_bound
        np.maximum(new_run_price, 0, out=new_run_price)
        since += 1
        if since == PERIOD or number == steps:
            state[:], anchor[:], since = after, after, 0
        else:
            # Reflected: as far again. Anchored: the less so, the longer ago the start is.
            after += after
            after -= state
            after *= since / (since + 1)
            np.multiply(anchor, 1 / (since + 1), out=state)
            state += after
    return shift, Prices(price.reshape(3, -1), run_price)
