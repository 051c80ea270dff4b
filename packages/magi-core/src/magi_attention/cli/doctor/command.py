# SPDX-License-Identifier: Apache-2.0
"""Carry out ``magi doctor``."""

import json

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from magi_attention.cli.doctor.backends import capabilities, check_backends, choices, default_device
from magi_attention.cli.doctor.communication import check_communication, communication_facts, peer_access
from magi_attention.cli.doctor.findings import Capability, Check, Findings, attempt
from magi_attention.cli.doctor.machine import driver_version, gpu_facts, machine_facts, package_versions
from magi_attention.cli.doctor.requirements import check_requirements
from magi_attention.cli.doctor.settings import check_kernel_folder, check_planner, check_variables, variables_set
from magi_attention.cli.sheets import folding

MARKS = {"ok": "[green]ok[/green]", "failed": "[bold red]failed[/bold red]", "skipped": "[dim]skipped[/dim]"}


def run_doctor(as_json: bool) -> int:
    """Examine and print; returns the exit code: 0, or 1 if a check failed."""
    progress = Console(stderr=True)
    with progress.status("Examining..."):
        findings = examine(progress)
    if as_json:
        print(json.dumps(findings.to_json()))
    else:
        print_findings(findings, Console())
    return int(bool(findings.failed))


def examine(progress: Console) -> Findings:
    """Collect all findings; what takes long is told to ``progress``."""
    device = default_device()
    checks = [*check_variables(), *check_requirements(), check_kernel_folder(), check_planner(), *check_communication()]
    found: dict[str, dict[str, dict[str, float]]] = {}

    def choose() -> str:
        found.update(choices(device))
        return f"every class of masks has a backend in both directions on {device}"

    checks.append(attempt("choice of backends", choose))
    if device.type == "cuda":
        progress.print("Compiling and running kernels; the first time, this takes a minute or more.")
    checks += check_backends(device)
    return Findings(
        machine=machine_facts(),
        gpus=gpu_facts(),
        packages=package_versions(),
        backends=capabilities(device),
        choices=found,
        communication=communication_facts(),
        peers=peer_access(),
        variables=variables_set(),
        checks=checks,
    )


def print_findings(findings: Findings, console: Console) -> None:
    """Print everything for people."""
    console.print(_facts("Machine", findings.machine))
    for number, gpu in enumerate(findings.gpus):
        console.print(_facts(f"GPU {number}", gpu))
    if not findings.gpus:
        console.print(
            f"[bold]No GPU[/bold] is visible to torch{_though_driver()}: kernels run on the CPU.", highlight=False
        )
    console.print(_facts("Packages", findings.packages))
    console.print(_capability_table(findings.backends))
    for line in _refusals(findings.backends):
        console.print(line, highlight=False)
    if findings.choices:
        console.print(_choice_table(findings.choices))
    console.print(_facts("Communication", findings.communication))
    if findings.peers:
        console.print(_facts("GPU to GPU", findings.peers))
    if findings.variables:
        texts = {name: f"{each['text']}  ({each['meaning']})" for name, each in findings.variables.items()}
        console.print(_facts("Environment variables that are set", texts))
    console.print(_check_table(findings.checks))
    console.print(
        f"[bold red]{len(findings.failed)} checks failed." if findings.failed else "[bold green]Nothing is wrong.",
        highlight=False,
    )


def _though_driver() -> str:
    """What may be wrong where there is a GPU's driver; empty without one."""
    if (driver := driver_version()) is None:
        return ""
    cause = "is a build without CUDA" if torch.version.cuda is None else "does not get at one"
    return f", though there is NVIDIA's driver {driver}; this torch, {torch.__version__}, {cause}"


def _facts(title: str, facts: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(escape(name), escape(value))
    return folding(table)


def _capability_table(backends: list[Capability]) -> Table:
    title = f"Kernel backends on {'the GPU' if torch.cuda.is_available() else 'this CPU'}"
    table = Table("backend", "pass", "dtypes", "head dims", "features", "TFLOP/s", title=title, title_justify="left")
    for each in backends:
        speeds = each.tflops.values()
        expected = f"{min(speeds):g} to {max(speeds):g}" if speeds else ""
        cells = (", ".join(each.dtypes), ", ".join(each.head_dims), ", ".join(each.features), expected)
        table.add_row(escape(each.backend), each.direction, *(cell or "[dim]none[/dim]" for cell in cells))
    table.caption = "TFLOP/s is what the backend expects of itself for 8 heads of 128, over the classes of masks."
    return folding(table)


def _refusals(backends: list[Capability]) -> list[str]:
    """One line per backend and reason: what it refuses and why."""
    lines = []
    for each in backends:
        by_reason: dict[str, list[str]] = {}
        for asked, reason in each.refusals.items():
            by_reason.setdefault(reason, []).append(asked)
        if not each.dtypes:  # then what bfloat16, the first asked for, is refused for is why; the rest says nothing
            by_reason = dict(list(by_reason.items())[:1])
        for reason, labels in by_reason.items():
            what = ", ".join(labels) if each.dtypes else "anything"
            lines.append(f"[bold]{escape(each.backend)}[/bold] {each.direction}, not {escape(what)}: {escape(reason)}")
    return lines


def _choice_table(choices: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = Table("mask", "forward", "backward", title="What would be chosen", title_justify="left")
    for mask_class, each in choices.items():
        cells = [", ".join(f"{name} {speed:g}" for name, speed in speeds.items()) for speeds in each.values()]
        table.add_row(mask_class, *map(escape, cells))
    table.caption = "The fastest first, with the TFLOP/s that are expected of each."
    return folding(table)


def _check_table(checks: list[Check]) -> Table:
    table = Table("check", "", "seen", title="Checks", title_justify="left")
    for each in checks:
        table.add_row(escape(each.name), MARKS[each.status], escape(each.detail))
    return folding(table)
