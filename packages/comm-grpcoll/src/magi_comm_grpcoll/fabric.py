# SPDX-License-Identifier: Apache-2.0
"""What this host has for transfers between hosts, as far as can be seen without starting any."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from magi_comm_grpcoll.heap import reason_against_nvshmem
from magi_comm_grpcoll.kernels import LINKED_FATBINS, missing_kernels

ADAPTERS = Path("/sys/class/infiniband")
_DRIVER = Path("/proc/driver/nvidia/params")
# What scripts/enable_ibgda_on_host.sh sets, as the driver shows it.
_OPTIONS = ("EnableStreamMemOPs: 1", "PeerMappingOverride=1")


def nvshmem_fact() -> str:
    """The installed NVSHMEM, or why rows between hosts go by all-to-all."""
    if reason := missing_kernels(LINKED_FATBINS) or reason_against_nvshmem():
        return f"not used: {reason}"
    import nvshmem.core

    try:
        bindings = version("nvshmem4py-cu13")
    except PackageNotFoundError:
        bindings = "unknown"
    return f"{nvshmem.core.get_version().libnvshmem_version}, nvshmem4py {bindings}"


def adapters(folder: Path = ADAPTERS) -> list[str]:
    """The network adapters that can do RDMA, over InfiniBand or Ethernet."""
    return sorted(path.name for path in folder.glob("*"))


def ibgda_fact(folder: Path = ADAPTERS, driver: Path = _DRIVER) -> str:
    """Whether the host looks ready for puts by the GPU itself: network adapters, and options of the driver."""
    found = [name for name in adapters(folder) if name.startswith("mlx5_")]
    if not found:
        return "no Mellanox network adapter is visible"
    try:
        parameters = driver.read_text(encoding="utf-8")
    except OSError as error:
        return f"{len(found)} mlx5 network adapters; {driver} can't be read: {error.strerror}"
    unset = [option for option in _OPTIONS if option not in parameters]
    if unset:
        return (
            f"{len(found)} mlx5 network adapters; the driver is loaded without {' and '.join(unset)}: see docs/ibgda.md"
        )
    return f"{len(found)} mlx5 network adapters, and the driver is loaded with the options for it"
