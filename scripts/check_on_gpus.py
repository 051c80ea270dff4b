# SPDX-License-Identifier: Apache-2.0
"""All that CI can't see, on the GPUs that are here: ``python scripts/check_on_gpus.py FOLDER``.

Runs the GPU tests of all suites, of which those that need few GPUs run at once, and then what fills the tables of
docs/benchmarks.md, one after another. What each prints is in ``FOLDER/NAME.txt``, its last line and time here. Exits
with 1 if one of them failed. Needs all four wheels, pytest and pytest-xdist, and benchmarks what their pages name.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]
DISTRIBUTED = ("benchmarks/distributed.py", "--equal-clocks", "--methods", "magi", "native", "gather", "gather-zz")
MILLION = ("bench", "--device", "cuda", "--mask", "causal", "--tokens", "1048576", "--heads-q", "64", "--heads-kv", "8")
PARTS = ("tests", "tables", "million")
THREADS = "2"  # of each of the many processes, unless the caller says otherwise

Gpus = Literal["first", "last", "all"]


@dataclass(frozen=True)
class Step:
    """A command of Python's, and which GPUs it sees."""

    name: str
    arguments: tuple[str, ...]
    gpus: Gpus = "all"


Lane = list[Step]
"""Steps one after another."""


def suite(name: str, processes: int, gpus: Gpus = "all", how: str = "loadfile") -> Step:
    """The GPU tests of a suite, in so many processes."""
    spread = f"--numprocesses={processes}", f"--dist={how}"
    return Step(name, ("-m", "pytest", "-q", "-m", "gpu", *spread, f"tests/{name}"), gpus)


def tests() -> list[list[Lane]]:
    """Rounds of lanes that run at once. Ranks that wait for each other want the GPUs to themselves."""
    jobs = str(max(1, (os.cpu_count() or 1) * 2 // 3))
    alone = Step("alone", ("-m", "pytest", "-q", "-m", "gpu and alone", "tests/comm"), "last")
    compile_kernels = Step("compile", ("-m", "tests.blackwell.warm", "--jobs", jobs), "last")
    return [
        [
            [suite("hopper", 4, "first", "worksteal")],
            [compile_kernels, suite("blackwell", 6, "last", "worksteal")],
            [suite("core", 3, "last")],
        ],
        [[suite("distributed", 6, how="worksteal")]],
        [[suite("comm", 3)]],
        [[alone]],
    ]


def tables(num_gpus: int) -> list[list[Lane]]:
    """The same of benchmarks, which share a GPU with nothing else."""
    long = Step("kernels-32k", ("benchmarks/kernels.py", "--tokens", "32768"), "first")
    short = Step("kernels-8k", ("benchmarks/kernels.py", "--tokens", "8192", "16384"), "last")
    kernels: list[list[Lane]] = [[[long], [short]]] if num_gpus > 1 else [[[long, short]]]
    alone = [Step("host", ("benchmarks/grpcoll.py", "--host"))]
    if num_gpus > 1:
        size = ("--gpus", str(num_gpus))
        alone += [
            Step("distributed-8k", (*DISTRIBUTED, *size, "--tokens", "8192", "--seconds", "10")),
            Step("distributed-32k", (*DISTRIBUTED, "ring-zz", *size, "--tokens", "32768", "--seconds", "11")),
            Step("grpcoll", ("benchmarks/grpcoll.py", "--ranks", str(num_gpus))),
        ]
    alone.append(Step("demo", ("-m", "magi_attention.cli", "demo", "--device", "cuda", "-p", str(num_gpus))))
    return [[[step]] for step in alone] + kernels


def million(num_gpus: int) -> list[list[Lane]]:
    """A sequence of a million tokens, forward and backward."""
    how = ("--processes", str(num_gpus), "--warmup", "0", "--repeat", "1")
    return [[[Step("million", ("-m", "magi_attention.cli", *MILLION, *how))]]]


def visible(gpus: Gpus, num_gpus: int) -> str:
    """The numbers of the GPUs that a step sees."""
    return {"first": "0", "last": str(num_gpus - 1)}.get(gpus) or ",".join(map(str, range(num_gpus)))


def run_step(step: Step, folder: Path, num_gpus: int) -> bool:
    """Run a step and say how it went; returns whether it went well."""
    shown = {"CUDA_VISIBLE_DEVICES": visible(step.gpus, num_gpus), "PYTHONUNBUFFERED": "1"}
    environment = {"OMP_NUM_THREADS": THREADS} | os.environ | shown
    path, started = folder / f"{step.name}.txt", time.monotonic()
    with path.open("wb") as file:
        command = [sys.executable, *step.arguments]
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    lines = path.read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    how = "" if status == 0 else f"FAILED ({status}), see {path}: "
    print(f"[{time.monotonic() - started:4.0f} s] {step.name}: {how}{last.strip(' =')}", flush=True)
    return status == 0


def run(rounds: Sequence[Sequence[Lane]], folder: Path, num_gpus: int) -> bool:
    """Run rounds one after another, all lanes of one at once; returns whether all went well."""
    went_well = True
    for lanes in rounds:
        with ThreadPoolExecutor(len(lanes)) as pool:
            of_lanes = pool.map(lambda lane: [run_step(step, folder, num_gpus) for step in lane], lanes)
            went_well &= all(all(each) for each in of_lanes)
    return went_well


def count_gpus() -> int:
    """How many GPUs PyTorch sees."""
    import torch

    return torch.cuda.device_count()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write what is printed")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:2], help="what to run (tests tables)")
    options = parser.parse_args(arguments)
    if not (num_gpus := count_gpus()):
        parser.error("PyTorch sees no GPU here")
    options.folder.mkdir(parents=True, exist_ok=True)
    rounds = {"tests": tests(), "tables": tables(num_gpus), "million": million(num_gpus)}
    return int(not run([each for part in options.parts for each in rounds[part]], options.folder.resolve(), num_gpus))


if __name__ == "__main__":
    sys.exit(main())
