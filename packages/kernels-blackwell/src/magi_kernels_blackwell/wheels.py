# SPDX-License-Identifier: Apache-2.0
"""Which published wheels the backends need, whether they are here, and which GPU they would run on. Imports none."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

CUTLASS = "nvidia-cutlass-dsl"
FLASH_ATTENTION = {"flash-attn-4": "4.0.0b36", "quack-kernels": "0.6.5", CUTLASS: "4.8.1"}
CUDNN_FRONTEND = {"nvidia-cudnn-frontend": "1.32.0", CUTLASS: "4.8.1"}
"""Exact versions: the backends call functions that these projects may change in any release."""

ARCHITECTURES = {90: "Hopper", 100: "Blackwell (B200)", 103: "Blackwell (B300)"}
"""Compute capabilities, as ``10 * major + minor``, that both projects have kernels for."""

HOPPER = 90


@cache
def missing_wheels(required: tuple[tuple[str, str], ...]) -> str:
    """Say which of the ``(project, version)`` pairs is not installed, or is without effect; empty if all are."""
    for project, needed in required:
        try:
            installed = version(project)
        except PackageNotFoundError:
            return f"{project} is not installed: pip install 'magi-attention[blackwell]'"
        if installed != needed:
            return f"{project} {installed} is installed, needed is {needed}: pip install '{project}=={needed}'"
        if project == CUTLASS and find_spec("cutlass") is None:
            return (
                f"{project} is installed, but Python finds no module cutlass: its path is in a .pth file, which Python "
                f"reads in its own site-packages alone; install it there: pip install '{project}=={needed}'"
            )
    return ""


@cache
def capability_of(device: torch.device) -> int:
    """The compute capability of a CUDA device, as ``10 * major + minor``."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def num_multiprocessors(device: torch.device) -> int:
    """How many streaming multiprocessors a CUDA device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count
