# SPDX-License-Identifier: Apache-2.0
"""Sums by index stay exact beyond what float64 holds."""

import numpy as np

from magi_attention.plan.totals import totals


def test_sums_are_exact_beyond_float64_and_zero_where_nothing_is() -> None:
    values = np.array([1 << 60, 1, 7, 1 << 53, 1])
    assert totals(np.array([2, 2, 0, 3, 3]), values, 5).tolist() == [7, 0, (1 << 60) + 1, (1 << 53) + 1, 0]
    assert totals(np.empty(0, np.int64), np.empty(0, np.int64), 2).tolist() == [0, 0]
