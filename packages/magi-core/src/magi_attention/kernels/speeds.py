# SPDX-License-Identifier: Apache-2.0
"""How fast backends are: figures of one's own machine, from a file, which override the backends' own."""

import json
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch

from magi_attention.common.errors import MagiValueError
from magi_attention.env import general as environment
from magi_attention.kernels.mask_class import MASK_CLASSES
from magi_attention.kernels.protocol import AttentionRequest

# Names that callers of the original use, where no backend has the name itself. `sdpa` and `sdpa_ol` were its two plain
# torch backends.
ALIASES = {"ffa": "hopper", "fa4": "blackwell", "sdpa": "reference", "sdpa_ol": "reference"}

_ARCH = re.compile(r"sm_\d{2,3}|gfx\S+|[a-z]+")


def arch_of(device: torch.device) -> str:
    """The architecture of a device: ``"sm_90"`` and the like, AMD's name, or the device's type where there is none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    return _gpu_arch(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _gpu_arch(index: int) -> str:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(index).gcnArchName)
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@dataclass(frozen=True)
class MeasuredSpeed:
    """One measured figure; what is None holds for all.

    Attributes:
        backend: the name of the backend's entry point, or one of ``ALIASES``.
        tflops: 10^12 operations per second, counted as :meth:`KernelBackend.expected_tflops` says; 0 rules it out as
            long as another can serve the request.
        arch: as :func:`arch_of` returns it.
        direction: ``"forward"`` or ``"backward"``.
        mask_class: one of ``MASK_CLASSES``.
        head_dim: size of a head of queries and keys.
    """

    backend: str
    tflops: float
    arch: str | None = None
    direction: str | None = None
    mask_class: str | None = None
    head_dim: int | None = None

    @classmethod
    def from_json(cls, entry: Any) -> Self:
        """Read an object of the file.

        Raises:
            ValueError: if a name is unknown or missing, or a value cannot be.
        """
        names = [each.name for each in fields(cls)]
        if not isinstance(entry, dict) or not {"backend", "tflops"} <= set(entry) <= set(names):
            raise ValueError(
                f"must be an object with backend and tflops, and else only {', '.join(names[2:])}: {entry}"
            )
        for name, kind in (("backend", str), ("arch", str), ("head_dim", int)):
            if not isinstance(entry.get(name), kind | None) or isinstance(entry.get(name), bool):
                raise ValueError(f"{name} must be of type {kind.__name__}, got {entry[name]!r}")
        speed = cls(**entry | {"backend": ALIASES.get(entry["backend"], entry["backend"])})
        if not environment.is_known_kernel_backend(speed.backend):
            known = ", ".join(environment.known_kernel_backends())
            raise ValueError(f"backend must be one of {known}, got {speed.backend!r}")
        if speed.arch is not None and not _ARCH.fullmatch(speed.arch):
            raise ValueError(f"arch must be written as sm_90 or cpu are, got {speed.arch!r}")
        if isinstance(speed.tflops, bool) or not isinstance(speed.tflops, int | float) or not speed.tflops >= 0:
            raise ValueError(f"tflops must be a number of at least 0, got {speed.tflops!r}")
        if speed.direction not in (None, "forward", "backward"):
            raise ValueError(f"direction must be forward or backward, got {speed.direction!r}")
        if speed.mask_class not in (None, *MASK_CLASSES):
            raise ValueError(f"mask_class must be one of {', '.join(MASK_CLASSES)}, got {speed.mask_class!r}")
        return speed

    def applies_to(self, backend: str, request: AttentionRequest) -> bool:
        """Whether the figure is of this backend and request."""
        wanted = (backend, arch_of(request.device), request.direction, request.mask_class, request.head_dim)
        own = (self.backend, self.arch, self.direction, self.mask_class, self.head_dim)
        return all(mine is None or mine == theirs for mine, theirs in zip(own, wanted, strict=True))


def measured_tflops(backend: str, request: AttentionRequest) -> float | None:
    """The figure that the file ``MAGI_ATTENTION_KERNEL_SPEEDS`` has for a backend; of several, the last."""
    path = environment.kernel_speeds()
    figures = read_speeds(path) if path else ()
    return next((each.tflops for each in reversed(figures) if each.applies_to(backend, request)), None)


@cache
def read_speeds(path: str) -> tuple[MeasuredSpeed, ...]:
    """Read a JSON list of figures; each file once per process.

    Raises:
        ValueError: if the file cannot be read, or an entry is wrong; names it.
    """
    try:
        entries = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise MagiValueError(f"MAGI_ATTENTION_KERNEL_SPEEDS={path}: not a readable JSON file: {error}") from None
    if not isinstance(entries, list):
        raise MagiValueError(f"MAGI_ATTENTION_KERNEL_SPEEDS={path}: must hold a list, not {type(entries).__name__}")
    figures = []
    for number, entry in enumerate(entries):
        try:
            figures.append(MeasuredSpeed.from_json(entry))
        except ValueError as error:
            raise MagiValueError(f"MAGI_ATTENTION_KERNEL_SPEEDS={path}: entry {number}: {error}") from None
    return tuple(figures)
