# SPDX-License-Identifier: Apache-2.0
"""Which published wheels the backends need, whether they are here, and which GPU they would run on. Imports none."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

FLASH_ATTENTION = {"flash-attn-4": "4.0.0b36", "quack-kernels": "0.6.5", "nvidia-cutlass-dsl": "4.8.1"}
CUDNN_FRONTEND = {"nvidia-cudnn-frontend": "1.32.0", "nvidia-cutlass-dsl": "4.8.1"}
"""Exact versions: the backends call functions that these projects may change in any release."""

ARCHITECTURES = {90: "Hopper", 100: "Blackwell (B200)", 103: "Blackwell (B300)"}
"""Compute capabilities, as ``10 * major + minor``, that both projects have kernels for."""

HOPPER = 90


@cache
def missing_wheels(required: tuple[tuple[str, str], ...]) -> str:
    """Say which of the ``(project, version)`` pairs is not installed; empty if all are."""
    for project, needed in required:
        try:
            installed = version(project)
        except PackageNotFoundError:
            return f"{project} is not installed: pip install 'magi-attention[blackwell]'"
        if installed != needed:
            return f"{project} {installed} is installed, needed is {needed}: pip install '{project}=={needed}'"
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
