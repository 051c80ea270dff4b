# SPDX-License-Identifier: Apache-2.0
"""Areas of rows by runs, against the rows themselves one by one; and how little memory long sequences take."""

import tracemalloc

import numpy as np
import pytest

from magi_attention.common.bands import CAUSAL, FULL, INVCAUSAL
from magi_attention.common.slices import SliceTable
from magi_attention.plan.bounds import received_lower_bound
from magi_attention.plan.row_areas import STEEP_PARTS, LightestRows, RowAreas
from magi_attention.testing.masks import MASK_FAMILIES
from magi_attention.testing.oracle import dense_mask


def lightest_one_by_one(areas: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.interp(rows, np.arange(len(areas) + 1), np.append(0, np.cumsum(np.sort(areas))))


@pytest.mark.parametrize("family", sorted(MASK_FAMILIES))
def test_runs_agree_with_rows_one_by_one(family: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(10):
        total = int(rng.integers(1, 200))
        slices = MASK_FAMILIES[family](total, rng)
        expected = dense_mask(slices, total, total).sum(1).numpy()
        areas = RowAreas.of(slices, total)
        np.testing.assert_array_equal(areas.of_rows(), expected)
        np.testing.assert_array_equal(areas.before(np.arange(total + 1)), np.append(0, np.cumsum(expected)))
        rows = np.append(rng.uniform(-1, total + 1, 50), [0, total])
        np.testing.assert_allclose(LightestRows.of(areas).area(rows), lightest_one_by_one(expected, rows), rtol=1e-12)


@pytest.mark.parametrize("kind", [CAUSAL, INVCAUSAL])
def test_rows_of_steep_runs_count_as_light_as_any_of_their_part(kind: int) -> None:
    total = 3 * STEEP_PARTS
    steep = [[0, total, 0, total, kind], [0, total, total, 2 * total, kind]]
    slices = SliceTable([*steep, [total, total + 9, 0, 7, FULL]])
    areas = RowAreas.of(slices, total + 9)
    rows = np.linspace(0, total + 9, 500)
    found = LightestRows.of(areas).area(rows)
    exact = lightest_one_by_one(areas.of_rows(), rows)
    assert (found <= exact * (1 + 1e-12)).all()
    np.testing.assert_allclose(found, exact, atol=2 * total * total / STEEP_PARTS)


def test_memory_of_the_lower_bound_does_not_grow_with_rows() -> None:
    total = 1 << 26
    tracemalloc.start()
    try:
        bound = received_lower_bound(SliceTable([[0, total, 0, total, CAUSAL]]), total, 8)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert 3 * total < bound < 7 * total
