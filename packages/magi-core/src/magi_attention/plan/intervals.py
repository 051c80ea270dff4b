# SPDX-License-Identifier: Apache-2.0
"""Interval algebra, as the planner uses it."""

from magi_attention.common.intervals import Indices, Intervals, intersect, merge, overlaps, split_at, subtract

__all__ = ["Indices", "Intervals", "intersect", "merge", "overlaps", "split_at", "subtract"]
