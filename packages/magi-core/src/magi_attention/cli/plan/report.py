# SPDX-License-Identifier: Apache-2.0
"""What ``magi plan`` says: tables for people, and the same figures for machines."""

from dataclasses import asdict
from typing import Any

import numpy as np

from magi_attention.cli.figures import PlanFigures, saved_share, time_unit
from magi_attention.cli.plan.study import BOUND_TOLERANCE, PlanStudy
from magi_attention.cli.sheets import Sheet, rank_sheet
from magi_attention.plan.layout import Layout
from magi_attention.plan.simulate import Prediction
from magi_attention.plan.stage_work import real_tokens

JSON_VERSION = 1


def sheets_of(study: PlanStudy) -> list[Sheet]:
    """All tables about a plan."""
    sheets = [rank_sheet(study.figures, "Each rank's part of the attention"), comparison_sheet(study)]
    return [*sheets, simulation_sheet(study)] if study.simulation else sheets


def headline(study: PlanStudy) -> str:
    """The mask and the plan in a few sentences."""
    figures, mask, options = study.figures, study.mask, study.options
    dealt = _chunks(study.layout)
    if mask.tokens_k is not None:
        dealt = f"queries in {dealt}, keys in {_chunks(study.key_layout)}"
    stages = "queries or keys travel" if options.qo else f"{study.degree} remote stage{'s' * (study.degree != 1)}"
    hops = ", in two hops" if options.hierarchical else ""
    slices = f"{len(mask.slices):,} slices that keep" if len(mask.slices) != 1 else "1 slice that keeps"
    return (
        f"{mask.name}: {mask.size} in {slices} {mask.slices.area():,} pairs; {dealt} "
        f"dealt to {study.layout.num_ranks:,} ranks by {_dealer(study)}, {stages}{hops}. "
        f"The busiest rank computes {figures.imbalance:.3f} times the mean. {_traveling(study)}"
        f"Predicted for one layer: {milliseconds(figures.prediction)}, "
        f"{figures.prediction.efficiency:.0%} of ideal."
    )


def _dealer(study: PlanStudy) -> str:
    name = type(study.dispatch.alg).__name__
    if not study.is_heap_deal:
        return name
    return f"{name}, which here leaves them to the greedy heap: shorter chunks may keep documents together"


def _chunks(layout: Layout) -> str:
    padding = f" and {layout.total - layout.num_real:,} rows of padding" if layout.total > layout.num_real else ""
    if layout.uneven_cuts is not None:
        return f"{len(layout.owner):,} runs that follow the documents{padding}"
    return f"{len(layout.owner):,} chunks of {layout.chunk_size:,}{padding}"


def _traveling(study: PlanStudy) -> str:
    """What is special about the exchanges, if anything."""
    work = study.figures.work
    if study.options.qo:
        queries = _query_rows(study.figures)
        return f"{queries:,} query rows and {work.received.sum() - queries:,} key/value rows travel. "
    if study.options.hierarchical:
        return f"{work.links.received_inter.sum():,} rows cross between nodes. "
    return ""


def _query_rows(figures: PlanFigures) -> int:
    """Query rows that all ranks receive."""
    return int(figures.work.received[:, figures.work.queries_travel].sum())


def milliseconds(prediction: Prediction) -> str:
    """Both passes' time, in words."""
    scale, name = time_unit(prediction.seconds)
    forward, backward = prediction.forward.seconds * scale, prediction.backward.seconds * scale
    return f"{forward:.3g} {name} forward and {backward:.3g} {name} backward"


def comparison_sheet(study: PlanStudy) -> Sheet:
    """Show what others would receive, and how even their work would be."""
    figures = study.figures
    everything = int(figures.rows_of_others.sum())
    note = ""
    received = study.rows_needed
    if study.options.qo:
        received = int(figures.received.sum())
        of_query, of_key = sum(study.shape.bytes_of_query_row), sum(study.shape.bytes_of_key_row)
        note = f" This plan's rows include {_query_rows(figures):,} of queries, which travel with their outputs: "
        note += f"{of_query:,} bytes in both passes, where a key/value row takes {of_key:,}."
    if study.options.hierarchical:
        note = (
            f" Rows are counted where they are read. {figures.work.links.received_inter.sum():,} cross between nodes."
        )
    entries = [
        (f"this plan ({type(study.dispatch.alg).__name__})", received, f"{figures.imbalance:.3f}"),
        *((each.name, each.rows_received, f"{each.imbalance:.3f}") for each in study.baselines.values()),
    ]
    if study.lower_bound is not None:
        entries.append(("lower bound for any even deal", study.lower_bound, f"≤ {1 + BOUND_TOLERANCE:.3f}"))
    return Sheet(
        title="Rows received by all ranks, per layer and forward pass",
        columns=("", "rows received", "saved", "most / mean pairs"),
        rows=[(name, f"{rows:,}", f"{saved_share(rows, everything):.0%}", even) for name, rows, even in entries],
        caption="Most / mean is the work of the busiest rank over the mean: 1 is perfect. The lower bound may be out "
        f"of reach.{note}",
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
            "key_tokens": study.mask.tokens_k,
            "slices": len(study.mask.slices),
            "pairs": study.mask.slices.area(),
        },
        "plan": {
            "ranks": layout.num_ranks,
            "ranks_per_node": study.cluster.ranks_per_node,
            "algorithm": study.dispatch.alg.type.value,
            "left_to_heap": study.is_heap_deal,
            "chunk_size": layout.chunk_size,
            "chunks": len(layout.owner),
            "padding": layout.total - layout.num_real,
            "keys": _key_plan(study),
            "overlap_degree": study.degree,
            "hops": 2 if study.options.hierarchical else 1,
            "queries_travel": study.options.qo,
            "imbalance": figures.imbalance,
            "rows_received": int(figures.received.sum()),
            "rows_received_between_nodes": int(figures.work.links.received_inter.sum()),
            "query_rows_received": _query_rows(figures),
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


def _key_plan(study: PlanStudy) -> dict[str, int] | None:
    """How the keys are cut, where they are of another sequence."""
    layout = study.key_layout
    if not study.figures.is_cross:
        return None
    padding = layout.total - layout.num_real
    return {"chunk_size": layout.chunk_size, "chunks": len(layout.owner), "padding": padding}


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
        "key_tokens": real_tokens(figures.key_layout),
        "pairs": figures.pairs,
        "rows_received": figures.received,
        "rows_sent": figures.sent,
        "forward_seconds": prediction.forward.seconds_by_rank,
        "backward_seconds": prediction.backward.seconds_by_rank,
    }
    lists = {name: column.tolist() for name, column in columns.items()}
    return [{name: values[rank] for name, values in lists.items()} for rank in range(figures.num_ranks)]
