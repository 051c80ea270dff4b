# SPDX-License-Identifier: Apache-2.0
"""Sums by rank, by chunk, and the like."""

import numpy as np
from numpy.typing import NDArray


def totals(index: NDArray[np.int64], values: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """``(size,)`` the sum of the ``values`` of each ``index``; exact, where ``np.bincount`` rounds sums beyond 2^53."""
    sums = np.zeros(size, np.int64)
    np.add.at(sums, index, values)
    return sums
