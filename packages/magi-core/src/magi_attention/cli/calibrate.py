# SPDX-License-Identifier: Apache-2.0
"""Carry out ``magi calibrate``."""

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from magi_attention.cli.devices import check_one_hop
from magi_attention.cli.sheets import Sheet
from magi_attention.comm.group import group_rank, group_size
from magi_attention.comm.registry import make_collectives
from magi_attention.config import DistAttnConfig
from magi_attention.env import comm as comm_env
from magi_attention.plan.rates import Rates, default_rates
from magi_attention.runtime.machine import Machine, count_ranks_per_node, machine_of, make_layer
from magi_attention.runtime.rates import measure_together
from magi_attention.runtime.rates_file import load_rates, rates_path
from magi_attention.utils.dist_env import clearup_dist_env, setup_dist_env
from magi_attention.utils.folders import why_unwritable

UNITS = {"gbs": "GB/s", "tflops": "Tflop/s", "us": "µs"}


def run_calibrate(
    heads: tuple[int, int, int], precision: str, backend: str, device_type: str, console: Console
) -> None:
    """Measure on this process, or on all that torchrun started, keep the rates and show them.

    Args:
        heads: query heads, key/value heads, size of a head.
        precision: bf16, fp16, fp32 or fp64, or ``"input"`` for what is usual on the device.
        backend: kernel backend by name, or ``"auto"``.
        device_type: ``"cuda"``, ``"cpu"`` or ``"auto"``.
        console: where rank 0 reports.

    Raises:
        ValueError: the heads don't fit, there is no such backend, there are too few GPUs, or exchanges in two hops.
        RuntimeError: no kernel backend can compute this, or the rates can't be kept.
    """
    check_one_hop()
    launched = dist.is_torchelastic_launched()
    num_local = (comm_env.local_world_size() or 1) if launched else 1
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.device_count() >= num_local else "cpu"
    elif device_type == "cuda" and torch.cuda.device_count() < num_local:
        raise ValueError(f"--device cuda: {num_local} processes need a GPU each, there are {torch.cuda.device_count()}")
    if not launched:
        device = torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
        _measure(heads, precision, backend, device, None, console)
        return
    environment = setup_dist_env("nccl" if device_type == "cuda" else "gloo")
    try:
        _measure(heads, precision, backend, environment.device, environment.world_group, console)
    finally:
        clearup_dist_env()


def _measure(
    heads: tuple[int, int, int],
    precision: str,
    backend: str,
    device: torch.device,
    group: dist.ProcessGroup | None,
    console: Console,
) -> None:
    layer = make_layer(heads, device, precision, backend)
    collectives = make_collectives(group, None, DistAttnConfig())
    machine = machine_of(layer, group, collectives.name, count_ranks_per_node(group))
    if reason := why_unwritable(rates_path(machine).parent):
        raise _cannot_keep(machine, f": {reason}")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=group_rank(group) > 0) as progress:
        task = progress.add_task("", total=2 if group_size(group) > 1 else 1)
        steps: list[str] = []

        def on_step(step: str) -> None:
            progress.update(task, description=f"measuring {step}", completed=len(steps))
            steps.append(step)

        rates = measure_together(layer, machine, group, collectives, on_step=on_step)
    if group_rank(group) == 0:
        console.print(rates_sheet(machine, rates).for_terminal())
        if load_rates(machine) != rates:
            raise _cannot_keep(machine)
        console.print(f"Kept in [bold]{rates_path(machine)}[/bold]", highlight=False, soft_wrap=True)


def _cannot_keep(machine: Machine, reason: str = "") -> RuntimeError:
    return RuntimeError(
        f"these rates can't be kept in {rates_path(machine)}{reason}; set MAGI_ATTENTION_CACHE_DIR to a folder that "
        "can be written"
    )


def rates_sheet(machine: Machine, rates: Rates) -> Sheet:
    """Show measured rates beside the round numbers for such a device."""
    default = default_rates(machine.device).to_json()
    unmeasured = _unmeasured(machine)
    rows = []
    for name, value in rates.to_json().items():
        words, _, unit = name.rpartition("_")
        measured = "not measured" if name in unmeasured else f"{value:g}"
        rows.append((words.replace("_", " "), measured, f"{default[name]:g}", UNITS[unit]))
    ranks = f"{machine.num_ranks} ranks" if machine.num_ranks > 1 else "1 rank"
    return Sheet(
        title=f"{machine.device}, {ranks}: {machine.kernel_backend} kernels, {machine.dtype}, head dim "
        f"{machine.head_dim}",
        columns=("rate", "measured", "default", "unit"),
        rows=rows,
        caption="link: between nodes; nvlink: within a node, whatever joins the ranks. The slowest rank's rates.",
    )


def _unmeasured(machine: Machine) -> set[str]:
    """The rates for which the group has no ranks to measure between."""
    missing = set()
    if machine.num_ranks == 1:
        missing |= {"exchange_latency_us"}
    if machine.num_ranks == machine.ranks_per_node:
        missing |= {"link_gbs"}
    if machine.ranks_per_node == 1:
        missing |= {"nvlink_gbs"}
    return missing
