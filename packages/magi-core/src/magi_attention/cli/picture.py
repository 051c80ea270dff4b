# SPDX-License-Identifier: Apache-2.0
"""A picture of a plan: the mask and who computes which part of it, each rank's work, and the stages in time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from magi_attention.cli.shares import RankShare, imbalance, predict_timeline, share_of
from magi_attention.common.slices import SliceTable
from magi_attention.plan.build import Plan
from magi_attention.plan.layout import Layout

PAIRS_PER_ROW = 750.0
"""Pairs computed while one key/value row is received, for the timeline: 600 Tflop/s and 400 GB/s (bf16, GPUs joined by
NVLink), a pair taking ``4 * head_dim`` flop per query head and a row ``4 * head_dim`` bytes per key/value head, with
two query heads for each of those."""

# Wong's palette (Nature Methods 8, 441), which colour-blind people can tell apart; more ranks share a continuous map.
RANK_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#B8A800")
BACKGROUND = np.array(to_rgb("#F3F4F6"))
TRAVEL_COLOUR = "#B4BBC4"
TEXT_COLOUR = "#22272E"

MASK_PIXELS = 900
ROWS_PER_PIXEL = 3
MOST_LABELLED_RANKS = 16


def save_picture(path: Path, mask: SliceTable, plans: Sequence[Plan], title: str) -> None:
    """Draw the plans of all ranks, in the order of the ranks, and write them to ``path`` (PNG, SVG or PDF)."""
    colours = rank_colours(len(plans))
    shares = [share_of(plan) for plan in plans]
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.edgecolor": "#C5CAD1",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "text.color": TEXT_COLOUR,
        "axes.labelcolor": TEXT_COLOUR,
        "xtick.color": TEXT_COLOUR,
        "ytick.color": TEXT_COLOUR,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(13, 10), layout="constrained")
        figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
        grid = figure.add_gridspec(3, 2, width_ratios=(1.35, 1), height_ratios=(1, 1, 1.15), hspace=0.06, wspace=0.04)
        draw_mask(figure.add_subplot(grid[:2, 0]), mask, plans[0].layout, colours)
        draw_work(figure.add_subplot(grid[0, 1]), shares, colours)
        draw_rows(figure.add_subplot(grid[1, 1]), shares, colours)
        draw_timeline(figure.add_subplot(grid[2, :]), plans, colours, PAIRS_PER_ROW)
        figure.savefig(path, dpi=130)


def rank_colours(num_ranks: int) -> list[tuple[float, float, float]]:
    """One RGB colour per rank."""
    if num_ranks <= len(RANK_COLOURS):
        return [to_rgb(colour) for colour in RANK_COLOURS[:num_ranks]]
    spectrum = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, num_ranks))
    return [(float(r), float(g), float(b)) for r, g, b, _ in spectrum]


def coverage(mask: SliceTable, rows: NDArray[np.int64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Which share of each interval ``[edges[j], edges[j + 1])`` of the keys each of the sorted ``rows`` sees.

    Returns ``(len(rows), len(edges) - 1)``.
    """
    seen = np.zeros((len(rows), len(edges) - 1))
    for q0, q1, k0, k1, lower, upper in mask.bands().tolist():
        first, last = np.searchsorted(rows, [q0, q1])
        row = rows[first:last, None]
        start = np.maximum(k0, row + lower)
        stop = np.maximum(start, np.minimum(k1, row + upper + 1))
        seen[first:last] += np.diff(np.clip(edges, start, stop), axis=1)
    return seen / np.diff(edges)


def mask_image(
    mask: SliceTable, layout: Layout, colours: Sequence[tuple[float, float, float]], pixels: int
) -> NDArray[np.float64]:
    """Colour every kept pair by the rank that computes it, the owner of its query, on a grid of ``pixels``².

    Returns ``(pixels, pixels, 3)`` RGB.
    """
    num_samples = pixels * ROWS_PER_PIXEL
    rows = (2 * np.arange(num_samples) + 1) * layout.num_real // (2 * num_samples)
    owner = layout.owner[rows // layout.chunk_size]
    # Thin diagonals would vanish in proportion; a root keeps them visible.
    strength = np.sqrt(coverage(mask, rows, np.linspace(0, layout.num_real, pixels + 1)))[..., None]
    image: NDArray[np.float64] = BACKGROUND + strength * (np.array(colours)[owner][:, None] - BACKGROUND)
    return np.asarray(image.reshape(pixels, ROWS_PER_PIXEL, pixels, 3).mean(axis=1))


def draw_mask(axes: Axes, mask: SliceTable, layout: Layout, colours: Sequence[tuple[float, float, float]]) -> None:
    """Draw the mask with its pairs coloured by rank, and beside it which rank holds which rows."""
    size = layout.num_real
    pixels = min(MASK_PIXELS, size)
    axes.imshow(mask_image(mask, layout, colours, pixels), extent=(0, size, size, 0), interpolation="antialiased")
    axes.set(title="Mask: who computes which pairs", xlabel="key", ylabel="query")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    strip = axes.inset_axes((1.01, 0, 0.025, 1), sharey=axes)
    strip.imshow(
        layout.owner[(np.arange(pixels) * size // pixels) // layout.chunk_size][:, None],
        extent=(0, 1, size, 0),
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap(list(colours)),
        vmin=0,
        vmax=len(colours) - 1,
    )
    strip.set_xticks([])
    strip.tick_params(left=False, labelleft=False)
    if len(colours) <= MOST_LABELLED_RANKS:
        handles = [Patch(color=colour, label=f"rank {rank}") for rank, colour in enumerate(colours)]
        axes.legend(handles=handles, loc="upper right", frameon=True, framealpha=0.95, edgecolor="#C5CAD1")


def draw_work(axes: Axes, shares: Sequence[RankShare], colours: Sequence[tuple[float, float, float]]) -> None:
    """Draw the pairs that each rank computes, and their mean."""
    pairs = np.array([share.pairs for share in shares])
    mean = pairs.mean()
    unit, name = _unit(pairs.max())
    _rank_bars(axes, pairs / unit, np.full(len(pairs), pairs.max() / unit), [_short(count) for count in pairs], colours)
    axes.axvline(mean / unit, color=TEXT_COLOUR, linewidth=1, linestyle=(0, (4, 3)), label=f"mean {_short(mean)}")
    axes.set(title=f"Work: most / mean = {imbalance(shares):.3f}", xlabel=f"(query, key) pairs computed{name}")
    _legend_above(axes)


def draw_rows(axes: Axes, shares: Sequence[RankShare], colours: Sequence[tuple[float, float, float]]) -> None:
    """Draw the rows that each rank receives, before those that an all-gather or a ring would bring."""
    received = np.array([share.rows_received for share in shares])
    others = np.array([share.rows_of_others for share in shares])
    unit, name = _unit(others.max())
    labels = [f"{_short(count)} of {_short(most)}" for count, most in zip(received, others, strict=True)]
    axes.barh(np.arange(len(shares)), others / unit, color="#DDE1E6", height=0.72, label="all-gather or ring")
    _rank_bars(axes, received / unit, others / unit, labels, colours)
    saved = 1 - received.sum() / max(others.sum(), 1)
    axes.set(title=f"Rows received: {saved:.0%} fewer", xlabel=f"key/value rows{name}, per layer")
    _legend_above(axes)


def draw_timeline(
    axes: Axes, plans: Sequence[Plan], colours: Sequence[tuple[float, float, float]], pairs_per_row: float
) -> None:
    """Draw, for every rank, when its stages receive rows (thin bars) and compute (thick bars)."""
    timelines = [predict_timeline(plan, pairs_per_row) for plan in plans]
    end = max(max(timing.compute_stop, timing.receive_stop) for timeline in timelines for timing in timeline)
    unit, name = _unit(end)
    for rank, timeline in enumerate(timelines):
        for number, timing in enumerate(timeline):
            compute = (timing.compute_start / unit, timing.pairs / unit)
            axes.barh(rank - 0.14, compute[1], left=compute[0], height=0.5, color=colours[rank], edgecolor="white")
            travel = (timing.receive_start / unit, (timing.receive_stop - timing.receive_start) / unit)
            axes.barh(rank + 0.28, travel[1], left=travel[0], height=0.26, color=TRAVEL_COLOUR, edgecolor="white")
            if len(plans) <= MOST_LABELLED_RANKS:
                pairs, rows = f"{_short(timing.pairs)} pairs", f"{_short(timing.rows)} rows"
                work = (f"stage {number}: {pairs}", pairs, _short(timing.pairs))
                goods = (f"for stage {number}: {rows}", rows, _short(timing.rows))
                _label_if_it_fits(axes, work, compute, rank - 0.14, end / unit, _ink_on(colours[rank]))
                _label_if_it_fits(axes, goods, travel, rank + 0.28, end / unit, TEXT_COLOUR)
    axes.set_xlim(0, end / unit * 1.005)
    _name_ranks(axes, len(plans))
    axes.set(
        title="Stages in time, predicted (forward, one layer): rows travel while the stage before is computed",
        xlabel=f"time, in pairs computed{name}; receiving one row is drawn as long as computing "
        f"{pairs_per_row:,.0f} pairs (bf16, 600 Tflop/s, 400 GB/s, 2 query heads per key/value head)",
    )
    _legend_above(axes, [Patch(color=colours[0], label="compute"), Patch(color=TRAVEL_COLOUR, label="receive")])


def _rank_bars(
    axes: Axes,
    lengths: NDArray[np.float64],
    label_places: NDArray[np.float64],
    labels: Sequence[str],
    colours: Sequence[tuple[float, float, float]],
) -> None:
    axes.barh(np.arange(len(lengths)), lengths, color=list(colours), height=0.72)
    _name_ranks(axes, len(lengths))
    axes.set_xlim(0, max(float(label_places.max()), 1e-9) * 1.26)
    if len(lengths) <= MOST_LABELLED_RANKS:
        for rank, (place, label) in enumerate(zip(label_places, labels, strict=True)):
            axes.annotate(label, (place, rank), xytext=(6, 0), textcoords="offset points", va="center")


def _legend_above(axes: Axes, handles: Sequence[Patch] | None = None) -> None:
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.3)


def _name_ranks(axes: Axes, num_ranks: int) -> None:
    axes.set_ylim(num_ranks - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if num_ranks <= MOST_LABELLED_RANKS:
        axes.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)])
    else:
        axes.set_ylabel("rank")


def _label_if_it_fits(
    axes: Axes, texts: Sequence[str], bar: tuple[float, float], height: float, whole: float, colour: str
) -> None:
    """Write the first of ``texts``, longest first, that has room in the bar ``(start, length)``."""
    start, length = bar
    fitting = [text for text in texts if length / whole > 0.0058 * len(text)]
    if fitting:
        axes.text(start + length / 2, height, fitting[0], ha="center", va="center", color=colour, fontsize=8)


def _ink_on(colour: tuple[float, float, float]) -> str:
    luminance = 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]
    return "white" if luminance < 0.5 else TEXT_COLOUR


def _unit(largest: float) -> tuple[float, str]:
    """Return the power of a thousand to show numbers up to ``largest`` in, and its name as it follows a label."""
    for unit, name in ((1e9, ", billions"), (1e6, ", millions"), (1e3, ", thousands")):
        if largest >= unit:
            return unit, name
    return 1.0, ""


def _short(number: float) -> str:
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{suffix}"
    return f"{number:.0f}"
