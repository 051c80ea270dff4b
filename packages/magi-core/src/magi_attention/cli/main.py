# SPDX-License-Identifier: Apache-2.0
"""The ``magi`` command's subcommands and flags. Bodies import what they need, so that help and errors come at once."""

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from magi_attention.cli.demo.options import DemoOptions, Device, MaskFamily, Precision
from magi_attention.cli.plan.options import PlanOptions

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

DEFAULT = DemoOptions()
PLAN_DEFAULT = PlanOptions(mask="causal", tokens=1)
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")
PAGE_SUFFIXES = (".html", ".htm")
EXISTING_FILE: dict[str, Any] = {"metavar": "FILE", "exists": True, "dir_okay": False, "readable": True}


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
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = DEFAULT.steps,
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
        check_output("--out", out, PICTURE_SUFFIXES)
    except ValueError as error:
        fail(error)
    from rich.console import Console

    from magi_attention.cli.demo.command import prepare, run_demo

    try:
        setup = prepare(options)
    except (ValueError, RuntimeError) as error:
        fail(error)
    raise typer.Exit(run_demo(options, setup, out, Console()))


@app.command()
def plan(
    mask: Annotated[
        str | None, typer.Option(metavar="NAME", help="A mask by name, one of those above; needs --tokens.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Length of the sequence.")] = None,
    cu_seqlens: Annotated[
        Path | None, typer.Option(**EXISTING_FILE, help="Documents' cumulative lengths from 0: text, .npy or .json.")
    ] = None,
    causal: Annotated[bool | None, typer.Option("--causal/--full", help="Documents of --cu-seqlens.")] = None,
    window: Annotated[
        tuple[int, int] | None, typer.Option(metavar="L R", help="Keys left and right that a token sees; -1 for all.")
    ] = None,
    slices: Annotated[
        Path | None, typer.Option(**EXISTING_FILE, help='JSON list of slices, such as [0, 64, 0, 64, "causal"].')
    ] = None,
    ranks: Annotated[int, typer.Option(help="Ranks of the group.")] = PLAN_DEFAULT.ranks,
    chunk_size: Annotated[int | None, typer.Option(help="Most rows of a chunk; else the planner chooses.")] = None,
    algorithm: Annotated[str | None, typer.Option(metavar="NAME", help="How chunks are dealt to ranks.")] = None,
    overlap_degree: Annotated[
        str, typer.Option(metavar="N|auto", help="Stages in which remote rows are fetched; 0 for no overlap.")
    ] = str(PLAN_DEFAULT.overlap_degree),
    uneven: Annotated[
        bool, typer.Option("--uneven", help="Let ranks hold unequal numbers of tokens, instead of padding.")
    ] = PLAN_DEFAULT.uneven,
    heads_q: Annotated[int, typer.Option(help="Query heads.")] = PLAN_DEFAULT.heads_q,
    heads_kv: Annotated[int, typer.Option(help="Key/value heads.")] = PLAN_DEFAULT.heads_kv,
    head_dim: Annotated[int, typer.Option(help="Size of a head.")] = PLAN_DEFAULT.head_dim,
    simulate: Annotated[
        int | None, typer.Option(metavar="RANKS", help="As --ranks, and compare overlap degrees.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines of the cluster; 8 ranks each if not given.")] = None,
    link: Annotated[float, typer.Option(metavar="GB/s", help="Each rank's link to other nodes.")] = PLAN_DEFAULT.link,
    nvlink: Annotated[float, typer.Option(metavar="GB/s", help="The same within a node.")] = PLAN_DEFAULT.nvlink,
    tflops: Annotated[float, typer.Option(metavar="T", help="Rate of the forward kernel.")] = PLAN_DEFAULT.tflops,
    png: Annotated[Path | None, typer.Option(help="Where to draw the plan (PNG, SVG or PDF).")] = None,
    html: Annotated[Path | None, typer.Option(help="Where to write the plan as a page for a browser.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON, and nothing else.")] = False,
) -> None:
    """Plan a mask for any number of ranks, without any of them, and show what each would compute and exchange.

    Masks by name: full, causal, varlen_full, varlen_causal, swa_causal_1024, varlen_block_causal_4k, prefix_lm,
    shared_question.
    """
    try:
        if simulate is not None and ranks not in (simulate, PLAN_DEFAULT.ranks):
            raise ValueError(f"--simulate {simulate} and --ranks {ranks} differ; give one of them")
        options = PlanOptions(
            mask=mask,
            tokens=tokens,
            cu_seqlens=cu_seqlens,
            causal=causal,
            window=window,
            slices=slices,
            ranks=ranks if simulate is None else simulate,
            nodes=nodes,
            simulate=simulate is not None,
            chunk_size=chunk_size,
            algorithm=algorithm,
            overlap_degree=parse_degree(overlap_degree),
            uneven=uneven,
            heads_q=heads_q,
            heads_kv=heads_kv,
            head_dim=head_dim,
            link=link,
            nvlink=nvlink,
            tflops=tflops,
        )
        check_output("--png", png, PICTURE_SUFFIXES)
        check_output("--html", html, PAGE_SUFFIXES)
    except ValueError as error:
        fail(error)
    from magi_attention.cli.plan.command import run_plan
    from magi_attention.cli.plan.masks import read_mask

    try:
        run_plan(options, read_mask(options), png, html, as_json)
    except ValueError as error:
        fail(error)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print all findings as JSON, and nothing else.")] = False,
) -> None:
    """Show what is installed, what each kernel backend can run here and why not, and check that it works.

    Computes a small attention with every backend, forward and backward, and compares with float64. Exit status 1 if
    anything is wrong.
    """
    from magi_attention.cli.doctor.command import run_doctor

    raise typer.Exit(run_doctor(as_json))


@app.command()
def precompile(
    arch: Annotated[
        list[str] | None, typer.Option(help="Architecture such as sm_90, whatever GPU is here; by default its own.")
    ] = None,
    head_dim: Annotated[
        list[str] | None,
        typer.Option(metavar="D|D/DV", help="Size of a head; both where values differ. By default 64 and 128."),
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16 (by default), fp16 or fp32.")] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(metavar="Q/KV", help="Query heads and key/value heads. By default 32/32 and 32/8."),
    ] = None,
    direction: Annotated[str, typer.Option(help="forward, backward or both.")] = "both",
    backend: Annotated[list[str] | None, typer.Option(help="A backend's name; by default all that can.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Compilers at a time.")] = 4,
) -> None:
    """Compile kernels into the backends' caches on disk, also for another GPU and on a machine without one.

    Options but --direction and --jobs can be given several times; all combinations are compiled. What the cache has is
    left alone. The environment variable MAGI_ATTENTION_FFA_FA4_CACHE_DIR names the cache's folder.
    """
    from rich.console import Console

    from magi_attention.cli.precompile.command import run_precompile
    from magi_attention.cli.precompile.options import read_selections
    from magi_attention.cli.precompile.worker import find_tasks

    try:
        selections = read_selections(arch or [], dtype or [], heads or [], head_dim or [], direction)
        tasks = find_tasks(selections, backend or [])
        if not tasks:
            raise ValueError("no backend supports any of these combinations; there is nothing to compile")
    except ValueError as error:
        fail(error)
    raise typer.Exit(run_precompile(tasks, jobs, Console()))


def parse_degree(text: str) -> int | None:
    """Return the overlap degree, None for ``auto``."""
    if text == "auto":
        return None
    if not text.isdecimal():
        raise ValueError(f"--overlap-degree must be 0 or more, or auto, not {text}")
    return int(text)


def check_output(flag: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    """Refuse a path that nothing can be written to, or another kind of file, before anything is computed."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{flag} {path} must end in one of {', '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{flag} {path}: there is no folder {path.absolute().parent}; make it first")


def fail(error: Exception) -> NoReturn:
    """Say what is wrong and how to put it right, without a traceback."""
    typer.echo(f"magi: {error}", err=True)
    raise typer.Exit(2)
