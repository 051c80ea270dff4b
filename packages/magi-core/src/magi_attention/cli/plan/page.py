# SPDX-License-Identifier: Apache-2.0
"""A plan as one web page that needs nothing else: charts as inline SVG, with details under the mouse."""

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

import matplotlib.image
import numpy as np
from matplotlib.colors import to_hex

from magi_attention.cli.figures import MOST_SHOWN_RANKS, PlanFigures, saved_share, short, time_unit
from magi_attention.cli.plan.report import headline, sheets_of
from magi_attention.cli.plan.study import PlanStudy
from magi_attention.cli.plan.svg import Chart, ticks
from magi_attention.cli.raster import Color, Pixels, mask_image, ownership_image, rank_colors, thin_window
from magi_attention.cli.sheets import Sheet
from magi_attention.plan.layout import Layout

MASK_PIXELS = 720
OWNERSHIP_COLUMNS, OWNERSHIP_ROWS = 900, 256
TRAFFIC_COLOR = (0.13, 0.52, 0.77)  # stands out from white as from black

Colors = Sequence[Color]


def page(study: PlanStudy, title: str) -> str:
    """The page's HTML."""
    figures = study.figures
    colors = rank_colors(figures.num_ranks)
    whole = ((0, figures.layout.num_real), (0, figures.key_layout.num_real))
    left = [_panel(figures.mask_title, _mask(figures, colors, *whole), _rank_legend(colors))]
    sides = {"queries": figures.layout, "keys": figures.key_layout} if figures.is_cross else {"rows": figures.layout}
    for rows, layout in sides.items():
        left.append(_panel(f"Ownership: which rank holds which {rows}", _ownership(layout, colors, rows)))
    right = [
        _panel(f"Work: most / mean = {figures.imbalance:.3f}", _work(figures, colors)),
        _panel(_rows_title(figures), _rows(figures, colors), _rows_legend(figures)),
    ]
    traffic = _panel(_traffic_title(figures), _traffic(figures))
    window = thin_window(figures.mask, figures.layout, figures.key_layout)
    if window is None:
        right.append(traffic)
    else:
        zoomed = figures.layout.num_real / (window[1] - window[0])
        right.insert(
            0, _panel(f"The mask's middle, enlarged {zoomed:.0f} times", _mask(figures, colors, window, window))
        )
        left.append(traffic)
    timeline = _panel(_timeline_title(figures), _timeline(figures, colors), _timeline_legend(figures))
    template = files("magi_attention.cli.plan").joinpath("page.html").read_text(encoding="utf-8")
    values = {
        "TITLE": escape(title),
        "SUMMARY": escape(headline(study)),
        "LEFT": "".join(left),
        "RIGHT": "".join(right),
        "TIMELINE": timeline,
        "TABLES": "".join(_table(sheet) for sheet in sheets_of(study)),
        "DATA": json.dumps(_data(figures)),
    }
    for name, value in values.items():
        template = template.replace(f"<!--{name}-->", value)
    return template


def _panel(title: str, content: str, legend: str = "") -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{legend}{content}</figure>"


def _legend(*entries: tuple[str, str]) -> str:
    keys = "".join(f'<span><i class="{style}"></i>{escape(name)}</span>' for style, name in entries)
    return f'<div class="legend">{keys}</div>'


def _timeline_legend(figures: PlanFigures) -> str:
    return _legend(("compute", "compute"), ("fetch", "rows travel"), ("home", f"{figures.home} go home"))


def _rows_legend(figures: PlanFigures) -> str:
    if figures.num_ranks > MOST_SHOWN_RANKS:
        return _legend(("received", "received"), ("sent", "sent"))
    return _legend(("compute", "received, a segment a stage"), ("home", "sent"), ("others", "all-gather or ring"))


def _rank_legend(colors: Colors) -> str:
    if len(colors) > MOST_SHOWN_RANKS:
        return ""
    keys = "".join(
        f'<span><i style="background:{to_hex(color)}"></i>rank {rank}</span>' for rank, color in enumerate(colors)
    )
    return f'<div class="legend">{keys}</div>'


def _data(figures: PlanFigures) -> dict[str, Any]:
    """What the page's script looks up under the mouse; of each sequence, its runs. Keys may share the queries'."""
    sides = [
        {"starts": each.runs[:, 0].tolist(), "owners": each.runs[:, 2].tolist(), "tokens": each.num_real}
        for each in ([figures.layout, figures.key_layout] if figures.is_cross else [figures.layout])
    ]
    return {
        "queries": sides[0],
        "keys": sides[1] if figures.is_cross else None,
        "ranks": figures.num_ranks,
        "traffic": figures.work.traffic.tolist(),
    }


def _mask(figures: PlanFigures, colors: Colors, window: tuple[int, int], keys: tuple[int, int]) -> str:
    chart = Chart(560, 560, keys, window, left=58)
    pixels = min(MASK_PIXELS, max(stop - start for start, stop in (window, keys)))
    chart.image(_png(mask_image(figures.mask, figures.layout, colors, pixels, window, keys)), "mask")
    chart.x_axis("key", _quarters(*keys))
    chart.y_names(_quarters(*window))
    return chart.render("The mask's pairs, colored by the rank that computes them")


def _quarters(start: int, stop: int) -> list[tuple[float, str]]:
    places = [start + (stop - start) * part / 4 for part in range(5)]
    return [(place, short(round(place))) for place in places]


def _ownership(layout: Layout, colors: Colors, rows: str) -> str:
    num_ranks = layout.num_ranks
    chart = Chart(560, 300, (0, layout.total), (-0.5, num_ranks - 0.5), left=58)
    width, height = min(OWNERSHIP_COLUMNS, layout.total), min(num_ranks, OWNERSHIP_ROWS)
    plane = "key-ownership" if rows == "keys" else "ownership"
    chart.image(_png(ownership_image(layout, colors, width, height)), plane)
    places = [layout.total * part // 4 for part in range(5)]
    chart.x_axis("row of the sequence", [(place, short(place)) for place in places])
    chart.y_names(_rank_names(num_ranks))
    return chart.render(f"Which rank holds which {rows}")


def _rank_names(num_ranks: int) -> list[tuple[float, str]]:
    if num_ranks <= MOST_SHOWN_RANKS:
        return [(rank, str(rank)) for rank in range(num_ranks)]
    return [(rank, f"{rank:g}") for rank in ticks(num_ranks - 1, 4)]


def _work(figures: PlanFigures, colors: Colors) -> str:
    pairs, num_ranks = figures.pairs, figures.num_ranks
    mean = max(float(pairs.mean()), 1.0)
    if num_ranks <= MOST_SHOWN_RANKS:
        chart = _rank_chart(figures, float(pairs.max()) * 1.18)
        for rank, count in enumerate(pairs.tolist()):
            tip = f"rank {rank}: {count:,} pairs, {count / mean:.1%} of the mean; {figures.work.tokens[rank]:,} tokens"
            chart.bar(0, count, rank - 0.36, rank + 0.36, "bar", tip, to_hex(colors[rank]))
            chart.text(count, rank, short(count), dx=6)
        chart.line(mean, -0.6, mean, num_ranks - 0.4, "mean")
        factor, unit = _unit(float(pairs.max()))
        chart.x_axis(f"(query, key) pairs computed{unit}; the line is the mean", factor=factor)
        return chart.render("Pairs that each rank computes")
    order = np.argsort(-pairs, kind="stable")
    relative = pairs[order] / mean
    chart = Chart(560, 300, (0, 100), (float(relative[0]) * 1.12, 0), left=58)
    share = (np.arange(num_ranks + 1) / num_ranks * 100).tolist()
    for place, (rank, height) in enumerate(zip(order.tolist(), relative.tolist(), strict=True)):
        tip = f"rank {rank}: {pairs[rank]:,} pairs, {height:.1%} of the mean"
        chart.bar(share[place], share[place + 1], height, 0, "work", tip)
    chart.line(0, 1, 100, 1, "mean")
    words = (f"most {relative[0]:.3f}", f"median {np.median(relative):.3f}", f"least {relative[-1]:.3f}")
    for at, anchor, word in zip((1, 50, 99), ("start", "middle", "end"), words, strict=True):
        chart.text(at, 0.07 * float(relative[0]), word, anchor, style="on")
    chart.y_names([(tick, f"{tick:g}") for tick in ticks(float(relative[0]))])
    chart.x_axis(f"share of the {num_ranks:,} ranks, most work first, %; height is pairs over their mean")
    return chart.render("Pairs of the ranks over their mean, sorted")


def _rows(figures: PlanFigures, colors: Colors) -> str:
    work = figures.work
    if figures.num_ranks > MOST_SHOWN_RANKS:
        return _rows_of_many(figures)
    others = figures.rows_of_others
    largest = float(max(others.max(), figures.sent.max(), 1))
    chart = _rank_chart(figures, largest * 1.22)
    for rank in range(figures.num_ranks):
        tip = f"an all-gather or a ring brings {others[rank]:,} rows"
        chart.bar(0, others[rank], rank - 0.4, rank + 0.4, "others", tip)
        start = 0
        for stage, count in enumerate(work.received[rank].tolist()):
            tip = f"rank {rank}, stage {stage}: receives {count:,} rows, sends {work.sent[rank, stage]:,}"
            chart.bar(start, start + count, rank - 0.32, rank + 0.08, "bar", tip, to_hex(colors[rank]))
            start += count
        tip = f"rank {rank}: sends {figures.sent[rank]:,} rows"
        chart.bar(0, figures.sent[rank], rank + 0.14, rank + 0.34, "home", tip)
        end = max(others[rank], figures.sent[rank])
        chart.text(end, rank, f"{short(figures.received[rank])} of {short(others[rank])}", dx=6)
    factor, unit = _unit(largest)
    chart.x_axis(f"{figures.row} rows{unit}, per layer", factor=factor)
    return chart.render("Rows that each rank receives in each stage, and sends")


def _rows_of_many(figures: PlanFigures) -> str:
    tables = {"received": figures.work.received, "sent": figures.work.sent}
    stages = [stage for stage in range(figures.work.received.shape[1]) if figures.work.received[:, stage].any()]
    largest = float(max(1, *(table.max() for table in tables.values())))
    height = Chart.TOP + Chart.BOTTOM + max(100, 46 * len(stages))
    chart = Chart(560, height, (0, largest * 1.3), (-0.55, max(len(stages), 1) - 0.45), left=58)
    for place, stage in enumerate(stages):
        for offset, (style, table) in zip((-0.2, 0.2), tables.items(), strict=True):
            rows = table[:, stage]
            low, fifth, middle, high, most = np.quantile(rows, [0, 0.05, 0.5, 0.95, 1]).tolist()
            tip = (
                f"stage {stage}, rows {style} by a rank: least {low:,.0f}, 5 % {fifth:,.0f}, median {middle:,.0f}, "
                f"95 % {high:,.0f}, most {most:,.0f} (rank {int(rows.argmax())}); all {rows.sum():,}"
            )
            chart.bar(low, most, place + offset - 0.06, place + offset + 0.06, f"{style} range", tip)
            chart.bar(fifth, high, place + offset - 0.16, place + offset + 0.16, f"{style} most-ranks", tip)
            chart.line(middle, place + offset - 0.18, middle, place + offset + 0.18, "median")
            chart.text(most, place + offset, f"{short(middle)}, most {short(most)}", dx=6)
    chart.y_names([(place, f"stage {stage}") for place, stage in enumerate(stages)])
    factor, unit = _unit(largest)
    chart.x_axis(f"{figures.row} rows of a rank{unit}: range, middle 90 %, median", factor=factor)
    return chart.render("Rows that ranks receive and send in each stage")


def _traffic(figures: PlanFigures) -> str:
    traffic = figures.work.traffic
    edges = (-0.5, figures.num_ranks - 0.5)
    chart = Chart(560, 420, edges, edges, left=58)
    strength = traffic / max(traffic.max(), 1)
    image = np.concatenate(
        [
            np.broadcast_to(TRAFFIC_COLOR, (*traffic.shape, 3)),
            np.where(traffic > 0, 0.06 + 0.94 * strength, 0)[..., None],
        ],
        axis=2,
    )
    chart.image(_png(image), "traffic")
    names = _rank_names(figures.num_ranks)
    chart.x_axis(f"across: from rank; down: to rank; the strongest color is {int(traffic.max()):,} rows", names)
    chart.y_names(names)
    return chart.render("Rows that each rank receives from each other")


def _timeline(figures: PlanFigures, colors: Colors) -> str:
    prediction, shown = figures.prediction, figures.ranks_to_show()
    scale, unit = time_unit(prediction.seconds)
    height = Chart.TOP + Chart.BOTTOM + _row_height(len(shown)) * len(shown)
    chart = Chart(1160, height, (0, prediction.seconds * scale), (-0.6, len(shown) - 0.4), left=96)
    start = 0.0
    chart.x_axis(f"{unit}; {figures.assumptions}")
    tables = (figures.work.pairs, figures.work.received, figures.work.sent)
    queries_travel = figures.work.queries_travel.tolist()
    for name, timeline in (("forward", prediction.forward), ("backward", prediction.backward)):
        for place, rank in enumerate(shown):
            for stage in range(timeline.compute.shape[1]):
                head = f"rank {rank}, {name}, stage {stage}"
                pairs, rows, sent = (table[rank, stage] for table in tables)
                row, result = ("query rows", "results") if queries_travel[stage] else ("rows", "gradients")
                for style, spans, top, bottom, what in (
                    ("bar", timeline.compute, -0.4, 0.1, f"computes {pairs:,} pairs"),
                    ("fetch", timeline.fetch, 0.14, 0.28, f"receives {rows:,} {row} and sends {sent:,}"),
                    (
                        "home",
                        timeline.send_home,
                        0.3,
                        0.44,
                        f"{result} of {rows:,} {row} go home, those of {sent:,} come",
                    ),
                ):
                    first, last = spans[rank, stage]
                    if last > first:
                        tip = f"{head}: {what} in {(last - first) * scale:.3g} {unit}"
                        begin, end = (start + first) * scale, (start + last) * scale
                        fill = to_hex(colors[rank]) if style == "bar" else ""
                        chart.bar(begin, end, place + top, place + bottom, style, tip, fill)
        start += timeline.seconds
        chart.line(start * scale, -0.6, start * scale, len(shown) - 0.4, "mean")
    chart.y_names(list(enumerate(figures.names_of_ranks_to_show())))
    return chart.render(f"When stages receive rows, compute and send {figures.home} home")


def _row_height(num_rows: int) -> int:
    return max(26, min(60, 240 // num_rows))


def _rank_chart(figures: PlanFigures, largest: float) -> Chart:
    height = Chart.TOP + Chart.BOTTOM + _row_height(figures.num_ranks) * figures.num_ranks
    chart = Chart(560, height, (0, largest or 1.0), (-0.6, figures.num_ranks - 0.4), left=58)
    chart.y_names([(rank, f"rank {rank}") for rank in range(figures.num_ranks)])
    return chart


def _rows_title(figures: PlanFigures) -> str:
    saved = saved_share(figures.received.sum(), figures.rows_of_others.sum())
    return f"Rows received: {short(figures.received.sum())}, {saved:.0%} fewer than by all-gather or ring"


def _traffic_title(figures: PlanFigures) -> str:
    group = -(-figures.num_ranks // len(figures.work.traffic))
    return "Traffic between ranks" if group == 1 else f"Traffic between groups of {group} ranks"


def _timeline_title(figures: PlanFigures) -> str:
    prediction = figures.prediction
    scale, unit = time_unit(prediction.seconds)
    forward, backward = prediction.forward.seconds * scale, prediction.backward.seconds * scale
    return (
        f"One layer, predicted: forward {forward:.3g} {unit}, then backward {backward:.3g} {unit}; "
        f"{prediction.efficiency:.0%} of ideal"
    )


def _table(sheet: Sheet) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in sheet.columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in sheet.rows)
    foot = "".join(f"<td>{escape(cell)}</td>" for cell in sheet.summary)
    return (
        f'<section><h2>{escape(sheet.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody>{f'<tfoot><tr>{foot}</tr></tfoot>' if foot else ''}</table></div>"
        f"<p>{escape(sheet.caption)}</p></section>"
    )


def _png(pixels: Pixels) -> str:
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, np.clip(pixels, 0, 1), format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _unit(largest: float) -> tuple[float, str]:
    for factor, name in ((1e12, ", trillions"), (1e9, ", billions"), (1e6, ", millions"), (1e3, ", thousands")):
        if largest >= factor:
            return factor, name
    return 1.0, ""
