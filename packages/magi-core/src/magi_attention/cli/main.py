# SPDX-License-Identifier: Apache-2.0
"""The ``magi`` command's subcommands and flags. Bodies import what they need, so that help and errors come at once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from magi_attention.cli.arguments import check_output, fail, parse_degree
from magi_attention.cli.bench.options import CPU_TOKENS, BenchOptions
from magi_attention.cli.demo.options import HEAD_DIM, DemoOptions, Device, MaskFamily, Precision
from magi_attention.cli.logs import log_to_stderr
from magi_attention.cli.plan.options import PlanOptions

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

DEFAULT = DemoOptions()
PLAN_DEFAULT = PlanOptions(mask="causal", tokens=1)
BENCH_DEFAULT = BenchOptions()
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")
PAGE_SUFFIXES = (".html", ".htm")
TRACE_SUFFIXES = (".json", ".gz")
EXISTING_FILE: dict[str, Any] = {"metavar": "FILE", "exists": True, "dir_okay": False, "readable": True}


def print_version(is_asked: bool) -> None:
    """Print the version and end."""
    if is_asked:
        from magi_attention import __version__

        typer.echo(f"magi-attention {__version__}")
        raise typer.Exit


@app.callback()
def magi(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Context-parallel attention for ultra-long, packed, irregularly masked sequences."""
    try:
        log_to_stderr()
    except ValueError as error:
        if context.invoked_subcommand != "doctor":  # which shows all that is wrong
            fail(error)


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
        Precision | None,
        typer.Option(
            help="Numbers to compute with; bf16 and fp16 for the attention alone. By default bf16 on GPUs, else fp32.",
            show_default=False,
        ),
    ] = None,
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
    dim: Annotated[
        int | None,
        typer.Option(help="Width of the model. By default 64 for each head on GPUs, else 32.", show_default=False),
    ] = None,
) -> None:
    """Train a small model on one process and on several with context parallelism, and compare.

    The losses must agree at every step.

    Shows what each rank holds, computes and receives, and draws the last step's plan.
    """
    try:
        options = DemoOptions(
            processes=processes,
            steps=steps,
            mask=mask,
            tokens=tokens,
            backend=backend,
            device=device,
            precision=precision or DEFAULT.precision,
            overlap_degree=parse_degree(overlap_degree),
            uneven=uneven,
            seed=seed,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            dim=heads * HEAD_DIM if dim is None else dim,
            files=tuple(files or ()),
        )
        check_output("--out", out, PICTURE_SUFFIXES)
    except ValueError as error:
        fail(error)
    from rich.console import Console

    from magi_attention.cli.demo.command import fit_to_device, prepare, run_demo

    try:
        options = fit_to_device(options, any_precision=precision is None, any_dim=dim is None)
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
    cu_seqlens_k: Annotated[
        Path | None, typer.Option(**EXISTING_FILE, help="The same for keys of another sequence (cross-attention).")
    ] = None,
    causal: Annotated[bool | None, typer.Option("--causal/--full", help="Documents of --cu-seqlens.")] = None,
    window: Annotated[
        tuple[int, int] | None, typer.Option(metavar="L R", help="Keys left and right that a token sees; -1 for all.")
    ] = None,
    slices: Annotated[
        Path | None, typer.Option(**EXISTING_FILE, help='JSON list of slices, such as [0, 64, 0, 64, "causal"].')
    ] = None,
    tokens_k: Annotated[
        int | None, typer.Option(help="Length of the other sequence that the keys of --slices are of.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(help=f"Ranks of the group; {PLAN_DEFAULT.ranks} if not given.")] = None,
    chunk_size: Annotated[int | None, typer.Option(help="Most rows of a chunk; else the planner chooses.")] = None,
    algorithm: Annotated[
        str | None, typer.Option(metavar="NAME", help="How chunks are dealt: locality if not given, min-heap, ...")
    ] = None,
    overlap_degree: Annotated[
        str, typer.Option(metavar="N|auto", help="Stages in which remote rows are fetched; 0 for no overlap.")
    ] = str(PLAN_DEFAULT.overlap_degree),
    hierarchical: Annotated[
        bool, typer.Option("--hierarchical", help="Rows cross to each node once, and are spread there.")
    ] = PLAN_DEFAULT.hierarchical,
    qo: Annotated[
        bool, typer.Option("--qo", help="Let queries travel to keys where that moves fewer bytes.")
    ] = PLAN_DEFAULT.qo,
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
    rates: Annotated[
        str | None,
        typer.Option(metavar="measured|FILE", help="Rates as magi calibrate writes them; else round numbers for H100."),
    ] = None,
    link: Annotated[
        float | None, typer.Option(metavar="GB/s", help="Each rank's link to other nodes; 50 unless --rates say more.")
    ] = None,
    nvlink: Annotated[float | None, typer.Option(metavar="GB/s", help="The same within a node; else 400.")] = None,
    tflops: Annotated[float | None, typer.Option(metavar="T", help="Rate of the forward kernel; else 600.")] = None,
    png: Annotated[Path | None, typer.Option(help="Where to draw the plan (PNG, SVG or PDF).")] = None,
    html: Annotated[Path | None, typer.Option(help="Where to write the plan as a page for a browser.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON, and nothing else.")] = False,
) -> None:
    """Plan a mask for any number of ranks, without any of them, and show what each would compute and exchange.

    Masks by name:

    full, causal, varlen_full, varlen_causal, swa_causal_1024, varlen_block_causal_4k, prefix_lm, shared_question.
    """
    try:
        if simulate is not None and ranks not in (simulate, None):
            raise ValueError(f"--simulate {simulate} and --ranks {ranks} differ; give one of them")
        if simulate is not None and simulate < 1:
            raise ValueError(f"--simulate must be at least 1, not {simulate}")
        options = PlanOptions(
            mask=mask,
            tokens=tokens,
            cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            causal=causal,
            window=window,
            slices=slices,
            tokens_k=tokens_k,
            ranks=next((number for number in (simulate, ranks) if number is not None), PLAN_DEFAULT.ranks),
            nodes=nodes,
            simulate=simulate is not None,
            chunk_size=chunk_size,
            algorithm=algorithm,
            overlap_degree=parse_degree(overlap_degree),
            hierarchical=hierarchical,
            qo=qo,
            uneven=uneven,
            heads_q=heads_q,
            heads_kv=heads_kv,
            head_dim=head_dim,
            rates=rates,
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
def calibrate(
    heads_q: Annotated[int, typer.Option(min=1, help="Query heads.")] = PLAN_DEFAULT.heads_q,
    heads_kv: Annotated[int, typer.Option(min=1, help="Key/value heads.")] = PLAN_DEFAULT.heads_kv,
    head_dim: Annotated[int, typer.Option(min=1, help="Size of a head.")] = PLAN_DEFAULT.head_dim,
    precision: Annotated[
        Precision | None, typer.Option(help="Numbers to compute with; else bf16 on GPUs and fp32 on CPUs.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Kernel backend, by its name; auto takes the best.")] = "auto",
    device: Annotated[Device, typer.Option(help="auto takes GPUs if each process can have one.")] = Device.AUTO,
) -> None:
    """Measure this machine's kernels, memory and links, and keep the rates for OverlapConfig(degree="auto").

    Alone, it measures kernels and memory. Under torchrun it measures the links between all ranks as well:

    torchrun --nproc-per-node 8 -m magi_attention.cli calibrate
    """
    from rich.console import Console

    from magi_attention.cli.calibrate import run_calibrate

    wanted = "input" if precision is None else precision.value
    try:
        run_calibrate((heads_q, heads_kv, head_dim), wanted, backend, device.value, Console())
    except (ValueError, RuntimeError) as error:
        fail(error)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print all findings as JSON, and nothing else.")] = False,
) -> None:
    """Show what is installed, what each kernel backend can run here and why not, and check that it works.

    Computes a small attention with every backend, forward and backward, and compares with float64.

    The exit status is 1 if anything is wrong.
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
    multiprocessors: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the GPUs, where kernels depend on it; by default as the GPU here, or a common model, has."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Compilers at a time.")] = 4,
) -> None:
    """Compile kernels into the backends' caches on disk, also for another GPU and on a machine without one.

    Options but --direction, --multiprocessors and --jobs can be given several times; all combinations are compiled.

    What the cache has is left alone. MAGI_ATTENTION_FFA_FA4_CACHE_DIR names the cache's folder.
    """
    from rich.console import Console

    from magi_attention.cli.precompile.command import run_precompile
    from magi_attention.cli.precompile.options import read_selections
    from magi_attention.cli.precompile.worker import find_tasks, without_kernels

    asked = f"none of {', '.join(backend)}" if backend else "no backend"
    try:
        selections = read_selections(arch or [], dtype or [], heads or [], head_dim or [], direction, multiprocessors)
        tasks = find_tasks(selections, backend or [])
        if not tasks:
            raise ValueError(f"{asked} supports any of these combinations; there is nothing to compile")
    except ValueError as error:
        fail(error)
    for missing in without_kernels(selections, tasks):
        typer.echo(f"magi: {asked} has kernels for {missing}; nothing is compiled for it", err=True)
    raise typer.Exit(run_precompile(tasks, jobs, Console()))


@app.command()
def bench(
    mask: Annotated[
        str, typer.Option(metavar="NAME", help="A mask by name, one of those of magi plan.")
    ] = BENCH_DEFAULT.mask,
    tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Length of the sequence over all ranks; {BENCH_DEFAULT.tokens} by default, on CPUs {CPU_TOKENS}.",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", "-p", help="Ranks to start here; none under torchrun, else 1.")
    ] = None,
    heads_q: Annotated[int, typer.Option(help="Query heads.")] = BENCH_DEFAULT.heads_q,
    heads_kv: Annotated[int, typer.Option(help="Key/value heads.")] = BENCH_DEFAULT.heads_kv,
    head_dim: Annotated[int, typer.Option(help="Size of a head.")] = BENCH_DEFAULT.head_dim,
    precision: Annotated[Precision, typer.Option(help="Of the inputs.")] = BENCH_DEFAULT.precision,
    backend: Annotated[
        str, typer.Option(help="Kernel backend, by its name; auto takes the best.")
    ] = BENCH_DEFAULT.backend,
    device: Annotated[
        Device, typer.Option(help="auto takes GPUs if each process can have one.")
    ] = BENCH_DEFAULT.device,
    overlap_degree: Annotated[
        str, typer.Option(metavar="N|auto", help="Stages in which remote rows are fetched; 0 for no overlap.")
    ] = str(BENCH_DEFAULT.overlap_degree),
    sm_margin: Annotated[
        int | None,
        typer.Option(help="Multiprocessors that kernels leave to communication; by default as in a training."),
    ] = BENCH_DEFAULT.sm_margin,
    native_grpcoll: Annotated[
        bool | None,
        typer.Option(
            "--native/--no-native", help="Move rows by native group collectives; by default as in a training."
        ),
    ] = BENCH_DEFAULT.native_grpcoll,
    warmup: Annotated[int, typer.Option(help="Passes before the timed ones.")] = BENCH_DEFAULT.warmup,
    repeat: Annotated[int, typer.Option(help="Timed passes; the median counts.")] = BENCH_DEFAULT.repeat,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a Chrome trace (.json, .json.gz) and measure overlap.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")] = False,
) -> None:
    """Time one distributed attention, forward and backward, on GPUs or CPUs.

    Starts its own ranks, or runs on those of torchrun: torchrun --nproc-per-node 4 -m magi_attention.cli bench.
    """
    try:
        options = BenchOptions(
            mask=mask,
            tokens=BENCH_DEFAULT.tokens if tokens is None else tokens,
            processes=processes,
            heads_q=heads_q,
            heads_kv=heads_kv,
            head_dim=head_dim,
            precision=precision,
            backend=backend,
            device=device,
            overlap_degree=parse_degree(overlap_degree),
            sm_margin=sm_margin,
            native_grpcoll=native_grpcoll,
            warmup=warmup,
            repeat=repeat,
            trace=None if trace is None else trace.absolute(),
        )
        check_output("--trace", trace, TRACE_SUFFIXES)
    except ValueError as error:
        fail(error)
    from rich.console import Console

    from magi_attention.cli.bench.command import run_bench

    try:
        run_bench(options, as_json, Console(), any_tokens=tokens is None)
    except (ValueError, RuntimeError, TimeoutError) as error:
        fail(error)
