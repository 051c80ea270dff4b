# SPDX-License-Identifier: Apache-2.0
"""What an examination finds, as values."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

JSON_VERSION = 1


@dataclass(frozen=True)
class Check:
    """Something that was tried.

    Attributes:
        name: what.
        status: ``"skipped"`` for what does not apply to this machine.
        detail: what was seen, or why not.
    """

    name: str
    status: Literal["ok", "failed", "skipped"]
    detail: str


@dataclass(frozen=True)
class Capability:
    """What one backend can run here in one direction.

    Attributes:
        backend: its name.
        direction: ``"forward"`` or ``"backward"``.
        dtypes: the data types it takes.
        head_dims: the head dims, as ``"128"``, or ``"192/128"`` where values differ.
        features: which of grouped heads, softcap, max_logits and deterministic results.
        refusals: why not, by what was asked for.
        tflops: the speed it expects, by mask class, where it can run the plain request.
    """

    backend: str
    direction: str
    dtypes: list[str]
    head_dims: list[str]
    features: list[str]
    refusals: dict[str, str]
    tflops: dict[str, float]


@dataclass(frozen=True)
class Findings:
    """All that ``magi doctor`` says.

    Attributes:
        machine: facts by name.
        gpus: one dict of facts per GPU.
        packages: versions of installed distributions, by name.
        backends: what each kernel backend can run.
        choices: by mask class and direction, the backends to choose from, fastest first, with expected TFLOP/s.
        communication: facts by name.
        peers: by pair of GPUs, ``"0-1"``, how one reaches the other's memory.
        variables: the project's environment variables that are set: text and meaning.
        checks: what was tried.
    """

    machine: dict[str, str]
    gpus: list[dict[str, str]]
    packages: dict[str, str]
    backends: list[Capability]
    choices: dict[str, dict[str, dict[str, float]]]
    communication: dict[str, str]
    peers: dict[str, str]
    variables: dict[str, dict[str, str]]
    checks: list[Check]

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "failed"]

    def to_json(self) -> dict[str, Any]:
        """All of it, for machines."""
        return {"version": JSON_VERSION, "healthy": not self.failed, **asdict(self)}


def attempt(name: str, run: Callable[[], str]) -> Check:
    """Run a check that returns what it saw, and raises where something is wrong."""
    try:
        return Check(name, "ok", run())
    except Exception as error:  # whatever goes wrong is what the user wants to know
        return Check(name, "failed", f"{type(error).__name__}: {error}")
