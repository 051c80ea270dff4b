# SPDX-License-Identifier: Apache-2.0
"""What ``magi plan`` says: tables for people, and the same figures for machines."""

from dataclasses import asdict
from typing import Any

import numpy as np

from magi_attention.cli.figures import PlanFigures, saved_share, time_unit
from magi_attention.cli.plan.study import BOUND_TOLERANCE, PlanStudy
from magi_attention.cli.sheets import Sheet, rank_sheet
from magi_attention.plan.simulate import Prediction

JSON_VERSION = 1


def sheets_of(study: PlanStudy) -> list[Sheet]:
    """All tables about a plan."""
    sheets = [rank_sheet(study.figures, "Each rank's part of the attention"), comparison_sheet(study)]
    return [*sheets, simulation_sheet(study)] if study.simulation else sheets


def headline(study: PlanStudy) -> str:
    """The mask and the plan in two sentences."""
    layout, figures = study.layout, study.figures
    chunks = f"{len(layout.owner):,} chunks of {layout.chunk_size:,}"
    padding = f" and {layout.total - layout.num_real:,} rows of padding" if layout.total > layout.num_real else ""
    return (
        f"{study.mask.name}: {study.mask.tokens:,} tokens in {len(study.mask.slices):,} slices that keep "
        f"{study.mask.slices.area():,} pairs; {chunks}{padding} dealt to {layout.num_ranks:,} ranks by "
        f"{type(study.dispatch.alg).__name__}, {study.degree} remote stages. "
        f"The busiest rank computes {figures.imbalance:.3f} times the mean. Predicted for one layer: "
        f"{milliseconds(figures.prediction)}, {figures.prediction.efficiency:.0%} of ideal."
    )


def milliseconds(prediction: Prediction) -> str:
    """Both passes' time, in words."""
    scale, name = time_unit(prediction.seconds)
    forward, backward = prediction.forward.seconds * scale, prediction.backward.seconds * scale
    return f"{forward:.3g} {name} forward and {backward:.3g} {name} backward"


def comparison_sheet(study: PlanStudy) -> Sheet:
    """Show what others would receive, and how even their work would be."""
    figures = study.figures
    everything = int(figures.rows_of_others.sum())
    entries = [
        (f"this plan ({type(study.dispatch.alg).__name__})", int(figures.received.sum()), f"{figures.imbalance:.3f}"),
        *((each.name, each.rows_received, f"{each.imbalance:.3f}") for each in study.baselines.values()),
    ]
    if study.lower_bound is not None:
        entries.append(("lower bound for any even deal", study.lower_bound, f"≤ {1 + BOUND_TOLERANCE:.3f}"))
    return Sheet(
        title="Rows received by all ranks, per layer and forward pass",
        columns=("", "rows received", "saved", "most / mean pairs"),
        rows=[(name, f"{rows:,}", f"{saved_share(rows, everything):.0%}", even) for name, rows, even in entries],
        caption="Most / mean is the work of the busiest rank over the mean: 1 is perfect. The lower bound may be out "
        "of reach.",
    )


def simulation_sheet(study: PlanStudy) -> Sheet:
    """Show the predicted time for several overlap degrees."""
    scale, name = time_unit(study.figures.prediction.seconds)
    best = min(study.simulation, key=lambda degree: study.simulation[degree].prediction.seconds)
    rows = []
    for degree, figures in study.simulation.items():
        prediction = figures.prediction
        passes = (prediction.forward, prediction.backward, prediction)
        times = [f"{each.seconds * scale:.3f}" for each in passes]
        exposed = _share_not_computing(prediction)
        mark = " ←" if degree == best else ""
        rows.append((f"{degree}{mark}", *times, f"{exposed:.1%}", f"{prediction.efficiency:.1%}"))
    return Sheet(
        title=f"Predicted time of one attention layer on {study.layout.num_ranks:,} ranks",
        columns=("overlap degree", f"forward, {name}", f"backward, {name}", f"both, {name}", "waiting", "efficiency"),
        rows=rows,
        caption=f"Assumes {study.figures.assumptions}. Waiting is the share of its time in which the slowest rank "
        "does not compute. Efficiency is the time with evenly dealt work and nothing but full-speed kernels, "
        "over the predicted time.",
    )


def _share_not_computing(prediction: Prediction) -> float:
    idle = 0.0
    for timeline in (prediction.forward, prediction.backward):
        slowest = int(timeline.seconds_by_rank.argmax())
        idle += timeline.seconds - float(np.diff(timeline.compute[slowest]).sum())
    return idle / prediction.seconds


def to_json(study: PlanStudy) -> dict[str, Any]:
    """All figures as JSON types; the schema is described in the documentation of ``magi plan``."""
    figures, layout = study.figures, study.layout
    return {
        "version": JSON_VERSION,
        "mask": {
            "name": study.mask.name,
            "tokens": study.mask.tokens,
            "slices": len(study.mask.slices),
            "pairs": study.mask.slices.area(),
        },
        "plan": {
            "ranks": layout.num_ranks,
            "ranks_per_node": study.cluster.ranks_per_node,
            "algorithm": study.dispatch.alg.type.value,
            "chunk_size": layout.chunk_size,
            "chunks": len(layout.owner),
            "padding": layout.total - layout.num_real,
            "overlap_degree": study.degree,
            "imbalance": figures.imbalance,
            "rows_received": int(figures.received.sum()),
            "rows_received_lower_bound": study.lower_bound,
        },
        "compared": {
            name: {"rows_received": each.rows_received, "imbalance": each.imbalance}
            for name, each in study.baselines.items()
        },
        "assumed": {"cluster": asdict(study.cluster), "layer": asdict(study.shape)},
        "predicted": _predicted(figures),
        "ranks": _ranks(figures),
        "simulation": [
            {"overlap_degree": degree, **_predicted(each)} for degree, each in study.simulation.items()
        ],
    }  # fmt: skip


def _predicted(figures: PlanFigures) -> dict[str, float]:
    prediction = figures.prediction
    return {
        "forward_seconds": prediction.forward.seconds,
        "backward_seconds": prediction.backward.seconds,
        "ideal_seconds": prediction.ideal_seconds,
        "efficiency": prediction.efficiency,
    }


def _ranks(figures: PlanFigures) -> list[dict[str, Any]]:
    prediction = figures.prediction
    columns = {
        "tokens": figures.work.tokens,
        "pairs": figures.pairs,
        "rows_received": figures.received,
        "rows_sent": figures.sent,
        "forward_seconds": prediction.forward.seconds_by_rank,
        "backward_seconds": prediction.backward.seconds_by_rank,
    }
    lists = {name: column.tolist() for name, column in columns.items()}
    return [{name: values[rank] for name, values in lists.items()} for rank in range(figures.num_ranks)]
