# SPDX-License-Identifier: Apache-2.0
"""A picture of a plan: mask, ownership, each rank's work and traffic, and the stages in time.

With many ranks a bar for each could not be told apart: quantiles, pixels and the slowest ranks stand for all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from magi_attention.cli.figures import MOST_SHOWN_RANKS, PlanFigures, saved_share, short, time_unit
from magi_attention.cli.raster import Color, mask_image, ownership_image, rank_colors, thin_window
from magi_attention.plan.layout import Layout

BACKGROUND_COLOR = "#F3F4F6"
EDGE_COLOR = "#C5CAD1"
REFERENCE_COLOR = "#DDE1E6"
FETCH_COLOR = "#AEB6C0"
HOME_COLOR = "#6B7683"
TEXT_COLOR = "#22272E"
RECEIVED_COLOR, SENT_COLOR = "#0072B2", "#D55E00"

MASK_PIXELS = 900

Colors = Sequence[Color]


def save_picture(path: Path, figures: PlanFigures, title: str) -> None:
    """Draw a plan and write it to ``path`` (PNG, SVG or PDF)."""
    colors = rank_colors(figures.num_ranks)
    many = figures.num_ranks > MOST_SHOWN_RANKS
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.edgecolor": EDGE_COLOR,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "text.color": TEXT_COLOR,
        "axes.labelcolor": TEXT_COLOR,
        "xtick.color": TEXT_COLOR,
        "ytick.color": TEXT_COLOR,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(13, 13), layout="constrained")
        figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
        grid = figure.add_gridspec(
            4, 2, width_ratios=(1.35, 1), height_ratios=(1, 1, 0.9, 1.05), hspace=0.06, wspace=0.04
        )
        draw_mask(figure.add_subplot(grid[:2, 0]), figures, colors)
        (draw_work_of_many if many else draw_work)(figure.add_subplot(grid[0, 1]), figures, colors)
        (draw_rows_of_many if many else draw_rows)(figure.add_subplot(grid[1, 1]), figures, colors)
        if figures.is_cross:
            part = grid[2, 0].subgridspec(2, 1)
            draw_ownership(figure.add_subplot(part[0]), figures.layout, colors, "queries")
            draw_ownership(figure.add_subplot(part[1]), figures.key_layout, colors, "keys")
        else:
            draw_ownership(figure.add_subplot(grid[2, 0]), figures.layout, colors, "rows")
        draw_traffic(figure.add_subplot(grid[2, 1]), figures)
        draw_timeline(figure.add_subplot(grid[3, :]), figures, colors)
        figure.savefig(path, dpi=130)


def draw_mask(axes: Axes, figures: PlanFigures, colors: Colors) -> None:
    """Draw the mask with its pairs colored by rank; where it is a thin diagonal, a part of it larger in a corner."""
    size = figures.layout.num_real
    _draw_pairs(axes, figures, colors, (0, size), (0, figures.key_layout.num_real), MASK_PIXELS)
    axes.set(title=figures.mask_title, xlabel="key", ylabel="query")
    if (window := thin_window(figures.mask, figures.layout, figures.key_layout)) is not None:
        part = axes.inset_axes((0.03, 0.03, 0.45, 0.45))
        _draw_pairs(part, figures, colors, window, window, MASK_PIXELS // 2)
        part.set_title(f"enlarged {size / (window[1] - window[0]):.0f} times", fontsize=8.5, fontweight="normal")
        part.set_xticks([])
        part.set_yticks([])
        start, stop = window
        axes.add_patch(Rectangle((start, start), stop - start, stop - start, fill=False, edgecolor=TEXT_COLOR, lw=0.8))
    if figures.num_ranks <= MOST_SHOWN_RANKS:
        handles = [Patch(color=color, label=f"rank {rank}") for rank, color in enumerate(colors)]
        axes.legend(handles=handles, loc="upper right", frameon=True, framealpha=0.95, edgecolor=EDGE_COLOR)


def _draw_pairs(
    axes: Axes, figures: PlanFigures, colors: Colors, window: tuple[int, int], keys: tuple[int, int], pixels: int
) -> None:
    pixels = min(pixels, max(stop - start for start, stop in (window, keys)))
    axes.set_facecolor(BACKGROUND_COLOR)
    axes.imshow(
        mask_image(figures.mask, figures.layout, colors, pixels, window, keys),
        extent=(*keys, *window[::-1]),
        aspect="auto" if figures.is_cross else "equal",
        interpolation="antialiased",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda row, _: short(row))


def draw_ownership(axes: Axes, layout: Layout, colors: Colors, rows: str) -> None:
    """Draw which rank holds which rows of a sequence, called ``rows``."""
    axes.set_facecolor(BACKGROUND_COLOR)
    axes.imshow(
        ownership_image(layout, colors, min(MASK_PIXELS, layout.total), min(layout.num_ranks, 256)),
        extent=(0, layout.total, layout.num_ranks - 0.5, -0.5),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set(title=f"Ownership: which rank holds which {rows}", xlabel="row of the sequence")
    axes.xaxis.set_major_formatter(lambda row, _: short(row))
    _name_ranks(axes, range(layout.num_ranks))
    if rows != "rows":  # two pictures share the room of one
        axes.set_yticks([0, layout.num_ranks - 1])
        axes.set_ylabel("rank")


def draw_work(axes: Axes, figures: PlanFigures, colors: Colors) -> None:
    """Draw the pairs that each rank computes, and their mean."""
    pairs = figures.pairs
    unit, name = _unit(float(pairs.max()))
    axes.barh(np.arange(len(pairs)), pairs / unit, color=list(colors), height=0.72)
    mean = pairs.mean()
    # The mean's line must not cross the number beside a bar that ends shortly before it.
    places = np.where(pairs > 0.75 * mean, np.maximum(pairs, mean), pairs)
    _label_bars(axes, places / unit, [short(count) for count in pairs])
    axes.axvline(mean / unit, color=TEXT_COLOR, linewidth=1, linestyle=(0, (4, 3)), label=f"mean {short(mean)}")
    _name_ranks(axes, range(len(pairs)))
    axes.set(title=f"Work: most / mean = {figures.imbalance:.3f}", xlabel=f"(query, key) pairs computed{name}")
    _legend_above(axes)


def draw_work_of_many(axes: Axes, figures: PlanFigures, colors: Colors) -> None:
    """Draw the ranks' pairs by size, relative to their mean."""
    mean = max(figures.pairs.mean(), 1)
    relative = np.sort(figures.pairs)[::-1] / mean
    share = (np.arange(len(relative)) + 0.5) / len(relative) * 100
    axes.fill_between(share, relative, color=RECEIVED_COLOR, alpha=0.25, step="mid", linewidth=0)
    axes.step(share, relative, where="mid", color=RECEIVED_COLOR)
    axes.axhline(1, color=TEXT_COLOR, linewidth=1, linestyle=(0, (4, 3)), label=f"mean {short(mean)} pairs")
    texts = (f"most {relative[0]:.3f}", f"median {np.median(relative):.3f}", f"least {relative[-1]:.3f}")
    for place, align, text in zip((0, 50, 100), ("left", "center", "right"), texts, strict=True):
        axes.annotate(text, (place, 0.08 * relative[0]), ha=align, xytext=(0, 0), textcoords="offset points")
    axes.set(
        title=f"Work: most / mean = {figures.imbalance:.3f}",
        xlabel=f"share of the {figures.num_ranks:,} ranks, most work first, %",
        ylabel="pairs / mean",
        xlim=(0, 100),
        ylim=(0, relative[0] * 1.08),
    )
    axes.spines[["top", "right"]].set_visible(False)
    _legend_above(axes)


def draw_rows(axes: Axes, figures: PlanFigures, colors: Colors) -> None:
    """Draw the rows that each rank receives in each stage, before those that an all-gather or a ring would bring."""
    others = figures.rows_of_others
    unit, name = _unit(float(max(others.max(), figures.sent.max())))
    ranks = np.arange(figures.num_ranks)
    axes.barh(ranks, others / unit, color=REFERENCE_COLOR, height=0.78, label="all-gather, ring")
    left = np.zeros(figures.num_ranks)
    for rows in figures.work.received.T:
        axes.barh(ranks - 0.12, rows / unit, left=left / unit, color=list(colors), height=0.44, edgecolor="white")
        left += rows
    axes.barh(ranks + 0.24, figures.sent / unit, color=HOME_COLOR, height=0.2, label="sent")
    labels = [f"{short(count)} of {short(most)}" for count, most in zip(figures.received, others, strict=True)]
    _label_bars(axes, np.maximum(others, figures.sent) / unit, labels)
    _name_ranks(axes, range(figures.num_ranks))
    axes.set(title=_rows_title(figures), xlabel=f"{figures.row} rows{name}, per layer; a segment is a stage")
    _legend_above(axes)


def draw_rows_of_many(axes: Axes, figures: PlanFigures, colors: Colors) -> None:
    """Draw for each stage how many rows the ranks receive and send: range, middle 90 % and median."""
    work = figures.work
    stages = [stage for stage in range(work.received.shape[1]) if work.received[:, stage].any()]
    unit, name = _unit(float(max(work.received.max(), work.sent.max())))
    for place, stage in enumerate(stages):
        for offset, color, table in ((-0.19, RECEIVED_COLOR, work.received), (0.19, SENT_COLOR, work.sent)):
            low, fifth, middle, high, most = np.quantile(table[:, stage], [0, 0.05, 0.5, 0.95, 1]) / unit
            axes.barh(place + offset, most - low, left=low, height=0.12, color=color, alpha=0.35)
            axes.barh(place + offset, high - fifth, left=fifth, height=0.3, color=color, alpha=0.55)
            axes.plot([middle] * 2, [place + offset - 0.17, place + offset + 0.17], color=TEXT_COLOR, linewidth=1.6)
            label = f"{short(middle * unit)}, most {short(most * unit)}"
            axes.annotate(label, (most, place + offset), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(stages)), [f"stage {stage}" for stage in stages])
    axes.set_ylim(len(stages) - 0.4, -0.6)
    axes.set_xlim(0, max(work.received.max(), work.sent.max(), 1) / unit * 1.35)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(title=_rows_title(figures), xlabel=f"{figures.row} rows of a rank{name}: range, middle 90 %, median")
    _legend_above(axes, [Patch(color=RECEIVED_COLOR, label="received"), Patch(color=SENT_COLOR, label="sent")])


def draw_traffic(axes: Axes, figures: PlanFigures) -> None:
    """Draw how many rows each rank, or group of ranks, receives from each other."""
    traffic = figures.work.traffic
    unit, name = _unit(float(traffic.max()))
    picture = axes.imshow(
        np.where(traffic > 0, traffic, np.nan) / unit,
        cmap="YlGnBu",
        vmin=0,
        extent=(-0.5, figures.num_ranks - 0.5, figures.num_ranks - 0.5, -0.5),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_facecolor(BACKGROUND_COLOR)
    group = -(-figures.num_ranks // len(traffic))
    title = "Traffic" if group == 1 else f"Traffic between groups of {group} ranks"
    axes.set(title=title, xlabel="from rank", ylabel="to rank")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    bar = axes.get_figure(root=True).colorbar(picture, ax=axes, shrink=0.9)  # type: ignore[union-attr]
    bar.set_label(f"rows{name}")
    bar.outline.set_visible(False)


def draw_timeline(axes: Axes, figures: PlanFigures, colors: Colors) -> None:
    """Draw when the stages fetch rows, compute and send results home; of many ranks, the slowest and two others."""
    passes = (figures.prediction.forward, figures.prediction.backward)
    scale, name = time_unit(figures.prediction.seconds)
    start = 0.0
    shown = figures.ranks_to_show()
    for timeline in passes:
        parts = ((timeline.compute, -0.14, 0.5), (timeline.fetch, 0.22, 0.16), (timeline.send_home, 0.38, 0.16))
        for part, (spans, offset, height) in enumerate(parts):
            left = (start + spans[shown, :, 0]) * scale
            width = (spans[shown, :, 1] - spans[shown, :, 0]) * scale
            bar: dict[str, Any] = {"height": height, "edgecolor": "white", "linewidth": 0.5}
            for place, rank in enumerate(shown):
                color = (colors[rank], FETCH_COLOR, HOME_COLOR)[part]
                axes.barh(place + offset, width[place], left=left[place], color=color, **bar)
        start += timeline.seconds
        axes.axvline(start * scale, color=TEXT_COLOR, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, figures.prediction.seconds * scale * 1.005)
    _name_ranks(axes, shown)
    axes.set_yticks(range(len(shown)), figures.names_of_ranks_to_show())
    forward, backward = (timeline.seconds * scale for timeline in passes)
    axes.set(
        title=f"One layer, predicted: forward {forward:.3g} {name}, backward {backward:.3g} {name}; "
        f"{figures.prediction.efficiency:.0%} of ideal",
        xlabel=f"{name}; {figures.assumptions}",
    )
    _legend_above(
        axes,
        [
            Patch(color=colors[shown[0]], label="compute"),
            Patch(color=FETCH_COLOR, label="rows travel"),
            Patch(color=HOME_COLOR, label=f"{figures.home} go home"),
        ],
    )


def _rows_title(figures: PlanFigures) -> str:
    saved = saved_share(figures.received.sum(), figures.rows_of_others.sum())
    return f"Rows received: {short(figures.received.sum())}, {saved:.0%} saved"


def _label_bars(axes: Axes, places: NDArray[np.float64], labels: Sequence[str]) -> None:
    axes.set_xlim(0, max(float(places.max()), 1e-9) * 1.26)
    for rank, (place, label) in enumerate(zip(places, labels, strict=True)):
        axes.annotate(label, (place, rank), xytext=(6, 0), textcoords="offset points", va="center")


def _legend_above(axes: Axes, handles: Sequence[Patch] | None = None) -> None:
    axes.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1, 0.985),
        ncols=3,
        frameon=False,
        borderaxespad=0,
        fontsize=8.5,
        handlelength=1,
        columnspacing=1,
    )


def _name_ranks(axes: Axes, ranks: Sequence[int]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(len(ranks) - 0.4, -0.6)
    if len(ranks) <= MOST_SHOWN_RANKS:
        axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    else:
        axes.set_ylabel("rank")


def _unit(largest: float) -> tuple[float, str]:
    """Return the power of a thousand to show numbers up to ``largest`` in, and its name as it follows a label."""
    for unit, name in ((1e9, ", billions"), (1e6, ", millions"), (1e3, ", thousands")):
        if largest >= unit:
            return unit, name
    return 1.0, ""
