# SPDX-License-Identifier: Apache-2.0
"""Carry out ``magi demo``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from magi_attention.cli.demo.data import pack, read_documents
from magi_attention.cli.demo.launch import train_on_ranks
from magi_attention.cli.demo.options import DemoOptions, Device, Precision
from magi_attention.cli.demo.report import Comparison, count_processes, loss_table, time_table, verdict
from magi_attention.cli.demo.train import StepResult, attention_config, train
from magi_attention.cli.devices import DTYPES, check_one_hop, choose_device
from magi_attention.cli.figures import figures_of_plans
from magi_attention.cli.picture import save_picture
from magi_attention.cli.sheets import rank_sheet
from magi_attention.comm.registry import check_native
from magi_attention.env.variables import check_texts
from magi_attention.kernels.protocol import AttentionRequest
from magi_attention.kernels.registry import choose_backend
from magi_attention.plan.rates import Cluster, LayerShape

GPU_HEAD_DIM = 64
"""The smallest head that the kernels of the plug-ins have."""


@dataclass(frozen=True)
class Setup:
    """What the options come to on this machine.

    Attributes:
        documents: the texts.
        device: ``"cpu"`` or ``"cuda"``.
        backend: name of the kernel backend that will compute.
    """

    documents: list[bytes]
    device: str
    backend: str


def fit_to_device(options: DemoOptions, *, any_precision: bool, any_dim: bool) -> DemoOptions:
    """Choose the device, and on GPUs what their fast kernels can compute, where the user left that open.

    Args:
        options: whose precision and width are those for a CPU where they are open.
        any_precision: whether the precision is open.
        any_dim: whether the width is.

    Raises:
        ValueError: if the GPUs are too few.
    """
    device = Device(choose_device(options.device, options.processes, torch.cuda.device_count()))
    if device is Device.CPU:
        return replace(options, device=device)
    precision = Precision.BF16 if any_precision else options.precision
    dim = options.heads * GPU_HEAD_DIM if any_dim else options.dim
    return replace(options, device=device, precision=precision, dim=dim)


def prepare(options: DemoOptions) -> Setup:
    """Find texts, device and kernel backend.

    Raises:
        ValueError: if the texts are empty, the sequence too short, the GPUs too few, the backend unknown, or an
            environment variable makes no sense, alone or here.
        RuntimeError: if the backend, or native collectives, are not installed or cannot serve this; it says why.
    """
    check_texts()
    check_one_hop()
    documents = read_documents(options.files)
    pack(documents, options.tokens, options.mask, options.seed, step=0)
    device = choose_device(options.device, options.processes, torch.cuda.device_count())
    request = AttentionRequest(
        device=torch.device(device, 0) if device == "cuda" else torch.device(device),
        dtype=DTYPES[options.precision],
        num_heads_q=options.heads,
        num_heads_kv=options.kv_heads,
        head_dim=options.dim // options.heads,
        head_dim_v=options.dim // options.heads,
    )
    backend = choose_backend(request, options.backend).name
    check_native(attention_config(options).runtime_config, request.device)
    return Setup(documents, device, backend)


def run_demo(options: DemoOptions, setup: Setup, out: Path, console: Console) -> int:
    """Train twice, compare, draw; returns the exit code: 0, or 1 if the losses disagree."""
    console.print(_headline(options, setup), highlight=False)
    single: list[StepResult] = []
    several: list[StepResult] = []
    with _progress(console) as track:
        train(setup.documents, options, torch.device(setup.device), None, track("1 process", options.steps, single))
        report_step = track(count_processes(options.processes), options.steps, several)
        plans = train_on_ranks(setup.documents, options, setup.device, report_step)
    comparison = Comparison(single, several, options.precision.tolerance)
    mask = pack(setup.documents, options.tokens, options.mask, options.seed, options.steps - 1).mask
    title = f"magi demo, step {options.steps}: {options.mask.value} mask, {options.tokens:,} tokens, {len(plans)} ranks"
    # A sequence as short as the demo's would show little but latencies.
    cluster = Cluster(ranks_per_node=len(plans), exchange_latency_us=0, kernel_latency_us=0)
    shape = LayerShape(options.heads, options.kv_heads, options.dim // options.heads)
    figures = figures_of_plans(mask, plans, cluster, shape)
    for table in (
        loss_table(comparison, options.processes),
        rank_sheet(figures, "The last step's attention, rank by rank").for_terminal(),
        time_table(comparison, options.processes),
    ):
        console.print(table)
    save_picture(out, figures, title)
    console.print(f"Picture of the last step's plan: [bold]{out}[/bold]", highlight=False)
    disagrees = bool(comparison.disagreeing_steps)
    console.print(f"[bold {'red' if disagrees else 'green'}]{verdict(comparison)}", highlight=False)
    return int(disagrees)


def _headline(options: DemoOptions, setup: Setup) -> str:
    size = sum(map(len, setup.documents))
    return (
        f"[bold]magi demo[/bold]: a Llama of {options.layers} layers ({options.heads} query heads, {options.kv_heads} "
        f"key/value heads, width {options.dim}) learns {len(setup.documents)} documents, {size:,} bytes.\n"
        f"{options.steps} steps of {options.tokens:,} tokens, mask family {options.mask.value}; on {setup.device}, "
        f"kernel backend {setup.backend}, {options.precision.value}."
    )


@contextmanager
def _progress(
    console: Console,
) -> Iterator[Callable[[str, int, list[StepResult]], Callable[[StepResult], None]]]:
    """Yield a function that adds a bar for a run and returns what to call after each of its steps."""
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def track(name: str, steps: int, results: list[StepResult]) -> Callable[[StepResult], None]:
            task = progress.add_task(name, total=steps, loss="-")

            def report(result: StepResult) -> None:
                results.append(result)
                progress.update(task, advance=1, loss=f"{result.loss:.4f}")

            return report

        yield track
