# SPDX-License-Identifier: Apache-2.0
"""The compiled CUDA kernels: found beside this file, loaded and launched by cuda.core."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "_kernels"
FATBINS = ("push_bulk", "push_words", "reduce")
SETTING = "MAGI_GRPCOLL_NO_KERNELS"

# The stages of push_bulk.cu.
BULK_SHARED_BYTES = 14 * 16384
# The least compute capability of the kernels.
LEAST_CAPABILITY = (9, 0)


def missing_kernels() -> str:
    """Why there are no kernels to load; empty if there are."""
    if all((FOLDER / f"{name}.fatbin").exists() for name in FATBINS):
        return ""
    return (
        f"magi-comm-grpcoll was installed without its CUDA kernels (nvcc was not found, or {SETTING} was set): "
        "install its wheel, or reinstall it with nvcc on PATH"
    )


@cache
def _library(fatbin: str, device: int) -> Any:
    from cuda.core import Device, ObjectCode

    with torch.cuda.device(device):
        Device(device).set_current()
        return ObjectCode.from_fatbin(str(FOLDER / f"{fatbin}.fatbin"))


@cache
def kernel(fatbin: str, name: str, device: int, shared_bytes: int = 0) -> Any:
    """A kernel, ready to be launched on the device of that index with so much dynamic shared memory."""
    found = _library(fatbin, device).get_kernel(name)
    if shared_bytes:
        from cuda.bindings import driver

        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuKernelSetAttribute(limit, shared_bytes, found.handle, driver.CUdevice(device))
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name} can't have {shared_bytes} bytes of shared memory: {status.name}")
    return found


@cache
def launch_config(grid: int, block: tuple[int, int], shared_bytes: int = 0) -> Any:
    """The launch of ``grid`` blocks."""
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=grid, block=block, shmem_size=shared_bytes)


@cache
def core_stream(handle: int) -> Any:
    """cuda.core's name for a stream of PyTorch that lives as long as the process."""
    from cuda.core import Stream

    return Stream.from_handle(handle)


def launch(stream: "torch.cuda.Stream", config: Any, kernel: Any, *arguments: Any) -> None:
    """Launch a kernel; addresses are ints, numbers are numpy's scalars."""
    _launcher()(core_stream(stream.cuda_stream), config, kernel, *arguments)


@cache
def _launcher() -> Callable[..., None]:
    from cuda.core import launch as launch_kernel

    return launch_kernel
