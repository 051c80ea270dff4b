# SPDX-License-Identifier: Apache-2.0
"""Carry out ``magi plan``."""

import json
from pathlib import Path

from rich.console import Console

from magi_attention.cli.plan.masks import NamedMask
from magi_attention.cli.plan.options import PlanOptions
from magi_attention.cli.plan.report import headline, sheets_of, to_json
from magi_attention.cli.plan.study import PlanStudy


def run_plan(options: PlanOptions, mask: NamedMask, png: Path | None, html: Path | None, as_json: bool) -> None:
    """Plan, write the pictures asked for, and print tables or JSON.

    Raises:
        ValueError: if the mask cannot be spread over so many ranks, or the options contradict each other.
    """
    study = PlanStudy(options, mask)
    title = f"{mask.name}: {mask.size} on {options.ranks:,} ranks"
    written = []
    if png is not None:
        from magi_attention.cli.picture import save_picture

        save_picture(png, study.figures, title)
        written.append(png)
    if html is not None:
        from magi_attention.cli.plan.page import page

        html.write_text(page(study, title), encoding="utf-8")
        written.append(html)
    if as_json:
        print(json.dumps(to_json(study)))
        return
    console = Console()
    console.print(headline(study), highlight=False)
    for sheet in sheets_of(study):
        console.print(sheet.for_terminal())
    for path in written:
        console.print(f"Written: [bold]{path}[/bold]", highlight=False)
