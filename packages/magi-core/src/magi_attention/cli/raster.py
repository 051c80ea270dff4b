# SPDX-License-Identifier: Apache-2.0
"""A plan as pixels: the mask colored by who computes it, and which ranks hold which rows."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from magi_attention.common.slices import SliceTable
from magi_attention.plan.layout import Layout

Color = tuple[float, float, float]
Pixels = NDArray[np.float64]

# Wong's palette (Nature Methods 8, 441), which color-blind people can tell apart; more ranks share a continuous map.
RANK_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#B8A800")

ROWS_PER_PIXEL = 3
LEAST_STRENGTH = 0.45

ZOOM = 16
"""How much of a long sequence whose mask is a thin diagonal the zoomed picture shows: one part in this many."""


def rank_colors(num_ranks: int) -> list[Color]:
    """One RGB color per rank."""
    if num_ranks <= len(RANK_COLORS):
        return [to_rgb(color) for color in RANK_COLORS[:num_ranks]]
    spectrum = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, num_ranks))
    return [(float(r), float(g), float(b)) for r, g, b, _ in spectrum]


def coverage(mask: SliceTable, rows: NDArray[np.int64], edges: NDArray[np.float64]) -> Pixels:
    """Which share of each interval ``[edges[j], edges[j + 1])`` of the keys each of the sorted ``rows`` sees.

    Returns ``(len(rows), len(edges) - 1)``.
    """
    seen = np.zeros((len(rows), len(edges) - 1))
    for q0, q1, k0, k1, lower, upper in mask.bands().tolist():
        first, last = np.searchsorted(rows, [q0, q1])
        row = rows[first:last, None]
        start = np.maximum(k0, row + lower)
        stop = np.maximum(start, np.minimum(k1, row + upper + 1))
        # Only the intervals that some row of the slice reaches.
        if first < last:
            left = max(int(np.searchsorted(edges, start.min(), side="right")) - 1, 0)
            right = int(np.searchsorted(edges, stop.max())) + 1
            seen[first:last, left : right - 1] += np.diff(np.clip(edges[left:right], start, stop), axis=1)
    return seen / np.diff(edges)


def mask_image(
    mask: SliceTable,
    layout: Layout,
    colors: Sequence[Color],
    pixels: int,
    window: tuple[int, int] | None = None,
    keys: tuple[int, int] | None = None,
) -> Pixels:
    """Color every kept pair by the rank that computes it, the owner of its query, on a grid of ``pixels``².

    Args:
        mask: the mask.
        layout: who owns which queries.
        colors: one per rank.
        pixels: the picture's height and width.
        window: the queries to show; None for all.
        keys: the keys to show; None for the same as ``window``.

    Returns:
        ``(pixels, pixels, 4)`` RGBA, transparent where no pair is kept.
    """
    start, stop = window or (0, layout.num_real)
    num_samples = pixels * ROWS_PER_PIXEL
    rows = start + (2 * np.arange(num_samples) + 1) * (stop - start) // (2 * num_samples)
    owner = layout.owner[np.searchsorted(layout.cuts, rows, side="right") - 1]
    # Thin diagonals would vanish in proportion; a root keeps them visible.
    strength = np.sqrt(coverage(mask, rows, np.linspace(*(keys or (start, stop)), pixels + 1)))[..., None]
    image = np.concatenate([strength * np.array(colors)[owner][:, None], strength], axis=2)
    image = image.reshape(pixels, ROWS_PER_PIXEL, pixels, 4).mean(axis=1)
    alpha = image[..., 3:]
    return np.concatenate([image[..., :3] / np.where(alpha > 0, alpha, 1), alpha], axis=2)


def thin_window(mask: SliceTable, layout: Layout, key_layout: Layout) -> tuple[int, int] | None:
    """Where to zoom in on a mask that is too thin a diagonal to be made out in whole; None for other masks.

    That takes queries and keys of one sequence.

    The window is the middle one of ``ZOOM`` equal parts of the sequence.
    """
    if key_layout is not layout:
        return None
    bands = mask.bands()
    reach = np.minimum(bands[:, 5], bands[:, 3] - 1 - bands[:, 0]) - np.maximum(bands[:, 4], bands[:, 2] - bands[:, 1])
    part = layout.num_real // ZOOM
    area = mask.areas()
    if part < ZOOM or (reach * area).sum() > part * area.sum():
        return None
    start = (layout.num_real - part) // 2
    return start, start + part


def ownership_image(layout: Layout, colors: Sequence[Color], width: int, height: int) -> Pixels:
    """Which share of a part of the sequence (columns) each rank, or some neighboring ranks together (rows), hold.

    Returns ``(height, width, 4)`` RGBA in the ranks' colors, transparent where nothing is held; ``height`` is at most
    the number of ranks.
    """
    edges = np.linspace(0, layout.total, width + 1)
    group = np.arange(layout.num_ranks) * height // layout.num_ranks
    held = np.zeros((height, width))
    # Every run adds to the columns that it meets, at most two of them in part.
    start, stop, rank, _ = layout.runs.T
    first = np.searchsorted(edges, start, side="right") - 1
    last = np.searchsorted(edges, stop)
    for column_step in range(int((last - first).max())):
        column = np.minimum(first + column_step, width - 1)
        length = np.minimum(stop, edges[column + 1]) - np.maximum(start, edges[column])
        np.add.at(held, (group[rank], column), np.where(first + column_step < last, np.maximum(length, 0), 0))
    # What is held at all stays visible, however small its share.
    strength = np.where(held > 0, np.clip(held * width / layout.total, LEAST_STRENGTH, 1), 0)
    color = np.array(colors)[np.searchsorted(group, np.arange(height))]
    return np.concatenate([np.repeat(color[:, None], width, axis=1), strength[..., None]], axis=2)
