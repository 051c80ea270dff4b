# SPDX-License-Identifier: Apache-2.0
"""The machine and what is installed on it."""

import platform
import re
from importlib import metadata
from pathlib import Path

import torch

from magi_attention.comm.registry import ENTRY_POINT_GROUP as TRANSPORTS
from magi_attention.kernels.registry import ENTRY_POINT_GROUP as BACKENDS
from magi_attention.kernels.speeds import arch_of

DRIVER_FILE = Path("/proc/driver/nvidia/version")


def machine_facts() -> dict[str, str]:
    """Python, torch and what torch was built for, and the GPU's driver."""
    return {
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none: this is a build without CUDA",
        "ROCm of torch": torch.version.hip or "none",
        "driver": driver_version() or "none found",
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "needs a GPU",
        "cuDNN": str(torch.backends.cudnn.version() or "none"),
    }


def driver_version() -> str | None:
    """The version of NVIDIA's kernel driver."""
    if not DRIVER_FILE.is_file():
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER_FILE.read_text())
    return found[0] if found else None


def gpu_facts() -> list[dict[str, str]]:
    """Name, architecture and size of every GPU that this process sees."""
    facts = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        facts.append(
            {
                "name": gpu.name,
                "architecture": arch_of(torch.device("cuda", number)),
                "memory": f"{gpu.total_memory / 2**30:.0f} GiB",
                "multiprocessors": str(gpu.multi_processor_count),
            }
        )
    return facts


def package_versions() -> dict[str, str]:
    """The distributions that bring backends or transports, and what these require, as far as it is installed."""
    versions = {}
    for point in (*metadata.entry_points(group=BACKENDS), *metadata.entry_points(group=TRANSPORTS)):
        if point.dist is None:
            continue
        names = [point.dist.name, *(re.split(r"[^\w.-]", each)[0] for each in point.dist.requires or ())]
        for name in names:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:  # of an extra that was not asked for
                continue
    return dict(sorted(versions.items()))
