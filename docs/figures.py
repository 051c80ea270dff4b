# SPDX-License-Identifier: Apache-2.0
"""Draw the picture of the front page from a real plan: ``python docs/figures.py [output.png]``."""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.slices import SliceTable
from magi_attention.config import MinHeapDispatchAlg
from magi_attention.plan.build import Plan, build_plans
from magi_attention.plan.dispatch import make_layout

TOTAL, CHUNK, NUM_RANKS = 512, 16, 4
RANK_COLORS = [to_rgb(color) for color in ("#4477aa", "#ee6677", "#228833", "#ccbb44")]
EMPTY = to_rgb("#f2f2f2")
INK = "#333333"
GAP = 34  # between the ranks' panels, in rows: room for a caption

FULL, CAUSAL, BICAUSAL = band.FULL, band.CAUSAL, band.BICAUSAL


def packed_mask() -> SliceTable:
    """Five documents: causal, sliding window, prefix LM, full, and two answers that share a question."""
    return SliceTable([
        (0, 130, 0, 130, CAUSAL),
        (130, 170, 130, 170, CAUSAL), (170, 260, 130, 260, BICAUSAL),
        (260, 300, 260, 300, FULL), (300, 370, 260, 370, CAUSAL),
        (370, 420, 370, 420, FULL),
        (420, 450, 420, 450, CAUSAL),
        (450, 480, 420, 450, FULL), (450, 480, 450, 480, CAUSAL),
        (480, 512, 420, 450, FULL), (480, 512, 480, 512, CAUSAL),
    ])  # fmt: skip


def kept_pairs(slices: SliceTable, num_rows: int, num_columns: int) -> NDArray[np.bool_]:
    """The mask as a dense matrix."""
    i, j = np.ogrid[:num_rows, :num_columns]
    kept = np.zeros((num_rows, num_columns), bool)
    for q0, q1, k0, k1, low, high in slices.bands():
        kept |= (i >= q0) & (i < q1) & (j >= k0) & (j < k1) & (j - i >= low) & (j - i <= high)
    return kept


def tint(color: tuple[float, float, float], strength: float) -> NDArray[np.float64]:
    """Mix a color with white."""
    return strength * np.array(color) + (1 - strength)


def paint(kept: NDArray[np.bool_], colors: NDArray[np.float64]) -> NDArray[np.float64]:
    """An RGB picture of ``kept``, whose rows have the given colors."""
    picture = np.broadcast_to(np.array(EMPTY), (*kept.shape, 3)).copy()
    picture[kept] = np.broadcast_to(colors[:, None], (*kept.shape, 3))[kept]
    return picture


def show(axes: Axes, picture: NDArray[np.float64], left: float, top: float) -> None:
    """Place a picture with one row and column per unit, and frame it."""
    height, width = picture.shape[:2]
    axes.imshow(picture, extent=(left, left + width, top + height, top), interpolation="none", zorder=1)
    axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=INK, linewidth=0.6, zorder=2))


def arrow(axes: Axes, start: float, stop: float, height: float, name: str) -> None:
    """Draw one of the three calls."""
    axes.annotate(
        "", (stop, height), (start, height), arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.6}, zorder=3
    )
    middle = (start + stop) / 2
    axes.text(middle, height - 10, name, ha="center", va="bottom", family="monospace", fontsize=10, color=INK)


def draw_rank(axes: Axes, plan: Plan, left: float, top: float) -> None:
    """Draw what one rank computes: its rows against the keys it owns, then against those it receives."""
    color, rows = RANK_COLORS[plan.rank], int(plan.layout.rows_per_rank[plan.rank])
    own, *received = plan.stages
    buffers = [(own.slices, rows, 1.0), *((stage.slices, stage.num_received, 0.55) for stage in received)]
    column = left
    for slices, width, strength in buffers:
        show(axes, paint(kept_pairs(slices, rows, width), np.tile(tint(color, strength), (rows, 1))), column, top)
        column += width + 6
    area = sum(stage.slices.area() for stage in plan.stages)
    text = f"rank {plan.rank}: {area / packed_mask().area():.1%} of the pairs, receives {received_rows(plan)} key rows"
    axes.text(left, top + rows + 5, text, va="top", fontsize=8.5, color=INK)


def received_rows(plan: Plan) -> str:
    """How many rows a rank receives, of those it does not own."""
    received = sum(stage.num_received for stage in plan.stages)
    return f"{received} of {plan.layout.total - int(plan.layout.rows_per_rank[plan.rank])}"


def draw() -> Figure:
    """Draw the whole picture."""
    mask = packed_mask()
    layout = make_layout(
        mask, num_real=TOTAL, total=TOTAL, chunk_size=CHUNK, num_ranks=NUM_RANKS, algorithm=MinHeapDispatchAlg()
    )
    plans = build_plans(mask, layout, range(NUM_RANKS))
    rank_of_row = np.repeat(layout.owner, CHUNK)[:TOTAL]
    row_colors = np.array(RANK_COLORS)[rank_of_row]

    figure = mpl.figure.Figure(figsize=(11, 5.75), dpi=150, facecolor="white")
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    show(axes, paint(kept_pairs(mask, TOTAL, TOTAL), row_colors), 0, 0)
    show(axes, np.broadcast_to(row_colors[:, None], (TOTAL, 14, 3)), -22, 0)
    panels, strip = 660, 1270
    top = -1.5 * GAP
    for plan in plans:
        draw_rank(axes, plan, panels, top)
        top += int(layout.rows_per_rank[plan.rank]) + GAP
    show(axes, np.broadcast_to(row_colors[:, None], (TOTAL, 14, 3)), strip, 0)

    middle = TOTAL / 2
    arrow(axes, 528, panels - 14, middle, "dispatch")
    arrow(axes, strip - 140, strip - 14, middle, "undispatch")
    title = {"fontsize": 10.5, "color": INK, "va": "bottom"}
    caption = "one packed sequence: queries down, keys across;\ncolors: the rank that computes the row"
    axes.text(0, -10, caption, **title)
    axes.text(panels, -62, "calc_attn", family="monospace", **title)
    axes.text(panels + 112, -62, "on each rank: own keys, received keys", **title)
    axes.text(strip + 14, -10, "output", ha="right", **title)
    axes.set(xlim=(-32, strip + 24), ylim=(TOTAL + 84, -92), aspect="equal")
    axes.axis("off")
    return figure


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "_static" / "idea.png"
    draw().savefig(target, metadata={"Software": None})
