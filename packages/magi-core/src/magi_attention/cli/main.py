# SPDX-License-Identifier: Apache-2.0
"""The ``magi`` command's subcommands and flags. Bodies import what they need, so that help and errors come at once."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from magi_attention.cli.demo.options import DemoOptions, Device, MaskFamily, Precision

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

DEFAULT = DemoOptions()
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


@app.callback()
def magi() -> None:
    """Context-parallel attention for ultra-long, packed, irregularly masked sequences."""


@app.command()
def demo(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            exists=True,
            dir_okay=False,
            readable=True,
            help="Texts to train on, each one document; by default Python's own help.",
        ),
    ] = None,
    processes: Annotated[int, typer.Option("--processes", "-p", help="Ranks of the second run.")] = DEFAULT.processes,
    steps: Annotated[int, typer.Option(help="Optimiser steps of each run.")] = DEFAULT.steps,
    mask: Annotated[MaskFamily, typer.Option(help="How documents may look at themselves and others.")] = DEFAULT.mask,
    tokens: Annotated[int, typer.Option(help="Length of the packed sequence.")] = DEFAULT.tokens,
    backend: Annotated[str, typer.Option(help="Kernel backend, by its name; auto takes the best.")] = DEFAULT.backend,
    device: Annotated[Device, typer.Option(help="auto takes GPUs if each process can have one.")] = DEFAULT.device,
    precision: Annotated[
        Precision, typer.Option(help="Numbers to compute with; bf16 and fp16 for the attention alone.")
    ] = DEFAULT.precision,
    overlap_degree: Annotated[
        str, typer.Option(metavar="N|auto", help="Stages in which remote rows are fetched; 0 for no overlap.")
    ] = str(DEFAULT.overlap_degree),
    uneven: Annotated[
        bool, typer.Option("--uneven", help="Let ranks hold unequal numbers of tokens, instead of padding.")
    ] = DEFAULT.uneven,
    out: Annotated[Path, typer.Option(help="Where to write the picture (PNG, SVG or PDF).")] = Path("plan.png"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and packing.")] = DEFAULT.seed,
    layers: Annotated[int, typer.Option(help="Blocks of the model.")] = DEFAULT.layers,
    heads: Annotated[int, typer.Option(help="Query heads.")] = DEFAULT.heads,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads.")] = DEFAULT.kv_heads,
    dim: Annotated[int, typer.Option(help="Width of the model.")] = DEFAULT.dim,
) -> None:
    """Train a small model on one process and on several with context parallelism, and compare.

    The losses must agree at every step. Shows what each rank holds, computes and receives, and draws the last step's
    plan.
    """
    try:
        options = DemoOptions(
            processes=processes,
            steps=steps,
            mask=mask,
            tokens=tokens,
            backend=backend,
            device=device,
            precision=precision,
            overlap_degree=parse_degree(overlap_degree),
            uneven=uneven,
            seed=seed,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            files=tuple(files or ()),
        )
        check_picture(out)
    except ValueError as error:
        fail(error)
    from rich.console import Console

    from magi_attention.cli.demo.command import prepare, run_demo

    try:
        setup = prepare(options)
    except (ValueError, RuntimeError) as error:
        fail(error)
    raise typer.Exit(run_demo(options, setup, out, Console()))


def parse_degree(text: str) -> int | None:
    """Return the overlap degree, None for ``auto``."""
    if text == "auto":
        return None
    if not text.isdecimal():
        raise ValueError(f"--overlap-degree must be 0 or more, or auto, not {text}")
    return int(text)


def check_picture(path: Path) -> None:
    """Refuse a path that no picture can be written to, before anything is computed."""
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"--out {path} must end in one of {', '.join(PICTURE_SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.absolute().parent}; make it first")


def fail(error: Exception) -> NoReturn:
    """Say what is wrong and how to put it right, without a traceback."""
    typer.echo(f"magi: {error}", err=True)
    raise typer.Exit(2)
