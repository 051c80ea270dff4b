# SPDX-License-Identifier: Apache-2.0
"""The compiled CUDA kernels: found beside this file, loaded by cuda.core, launched with prepared parameters."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from magi_comm_grpcoll.driver import ALL_BLOCKS_BEGUN, LAUNCH, LAUNCH_ATTRIBUTE, driver

FOLDER = Path(__file__).parent / "_kernels"
FATBINS = ("push_bulk", "push_words", "reduce")
# Of which the device code of NVSHMEM is a part.
LINKED_FATBINS = ("put",)
SETTING = "MAGI_GRPCOLL_NO_KERNELS"

# The stages of push_bulk.cu.
BULK_SHARED_BYTES = 14 * 16384
# The least compute capability of the kernels.
LEAST_CAPABILITY = (9, 0)


def missing_kernels(fatbins: Sequence[str] = FATBINS) -> str:
    """Why there are no kernels to load; empty if there are."""
    if all((FOLDER / f"{name}.fatbin").exists() for name in fatbins):
        return ""
    return (
        f"magi-comm-grpcoll was installed without its CUDA kernels (nvcc was not found, or {SETTING} was set): "
        "install its wheel, or reinstall it with nvcc on PATH"
    )


@cache
def library(fatbin: str, device: int) -> Any:
    """The loaded :class:`cuda.core.ObjectCode`."""
    from cuda.core import Device, ObjectCode

    with torch.cuda.device(device):
        Device(device).set_current()
        return ObjectCode.from_fatbin(str(FOLDER / f"{fatbin}.fatbin"))


@cache
def kernel(fatbin: str, name: str, device: int, shared_bytes: int = 0) -> int:
    """The driver's handle of a kernel that may have so much dynamic shared memory on the device of that index."""
    found = library(fatbin, device).get_kernel(name)
    if shared_bytes:
        from cuda.bindings import driver as cuda

        limit = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = cuda.cuKernelSetAttribute(limit, shared_bytes, found.handle, cuda.CUdevice(device))
        if status != cuda.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name} can't have {shared_bytes} bytes of shared memory: {status.name}")
    return int(found.handle)


class Launch:
    """A launch that is made ready once, and whose parameters can be changed before each time.

    Args:
        stream: where.
        kernel: what :func:`kernel` gave.
        grid: number of blocks.
        block: threads of a block in x and y.
        parameters: the kernel's, addresses and integers of up to 64 bits that are not negative.
        shared_bytes: dynamic shared memory of a block.

    Attributes:
        parameters: a word for each; a shorter one is in its low bytes.
        enqueue: launches with the parameters as they are.
    """

    def __init__(
        self,
        stream: "torch.cuda.Stream",
        kernel: int,
        grid: int,
        block: tuple[int, int],
        parameters: Sequence[int],
        shared_bytes: int = 0,
    ) -> None:
        self.parameters = (ctypes.c_uint64 * len(parameters))(*parameters)
        first = ctypes.addressof(self.parameters)
        self._addresses = (ctypes.c_uint64 * len(parameters))(*range(first, first + 8 * len(parameters), 8))
        self._attribute = np.zeros((), LAUNCH_ATTRIBUTE)  # and what lies between its fields, such as flags
        self._attribute["name"] = ALL_BLOCKS_BEGUN
        how = (grid, 1, 1), (*block, 1), shared_bytes, stream.cuda_stream, self._attribute.ctypes.data, 0
        self._launch = np.array(how, LAUNCH)
        # What changes from launch to launch: a field of numpy's takes several times as long to set.
        self._event = self._attribute["event"].reshape(1).data
        self._num_attributes = self._launch["num_attributes"].reshape(1).data
        self.enqueue = driver().launch(self._launch.ctypes.data, kernel, ctypes.addressof(self._addresses))

    def tell_begun(self, event: "torch.cuda.Event | None") -> None:
        """Let the next launches record an event once all their blocks have begun; it must have been recorded before."""
        self._num_attributes[0] = event is not None
        if event is not None:
            self._event[0] = event.cuda_event
