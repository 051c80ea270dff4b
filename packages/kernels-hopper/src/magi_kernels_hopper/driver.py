# SPDX-License-Identifier: Apache-2.0
"""The CUDA driver's calls that launch kernels from cubins, through NVIDIA's cuda-bindings.

cuda-bindings is imported when a kernel is first needed: this package can be imported, and asked what it supports, on
machines without it and without a GPU.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

CUBINS = Path(__file__).parent / "cubin"

Value = TypeVar("Value")


class TensorMap(ctypes.Structure):
    """What the copy engine knows of a tensor: 128 bytes, which the driver fills."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


class Kernel:
    """A kernel in one device's memory.

    Args:
        cubin: its file.
        entry: its name there.
        device: index of the GPU, whose context is current.
        threads: of a block.
        shared_bytes: of a block's memory.
    """

    def __init__(self, cubin: Path, entry: str, device: int, threads: int, shared_bytes: int) -> None:
        driver = _driver()
        self._library = _load(cubin)
        kernel = check(driver.cuLibraryGetKernel(self._library, entry.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuKernelSetAttribute(attribute, shared_bytes, kernel, driver.CUdevice(device)))
        self._function = driver.CUfunction(int(kernel))
        self._threads, self._shared_bytes, self._launch = threads, shared_bytes, driver.cuLaunchKernel

    def launch(self, blocks: int, stream: int, params: ctypes.Structure) -> None:
        """Launch ``blocks`` blocks on a stream of the current context; ``params`` is copied."""
        self.launch_ready(blocks, stream, Ready.of(params))

    def launch_ready(self, blocks: int, stream: int, ready: "Ready") -> None:
        """The same with parameters that are launched with again and again."""
        answer = self._launch(
            self._function, blocks, 1, 1, self._threads, 1, 1, self._shared_bytes, stream, ready.address, 0
        )
        if answer[0]:
            check(answer)


class Ready(NamedTuple):
    """Parameters of a kernel as the driver takes them.

    Attributes:
        params: themselves.
        pointers: to them.
        address: of the pointers.
    """

    params: ctypes.Structure
    pointers: "ctypes.Array[ctypes.c_void_p]"
    address: int

    @classmethod
    def of(cls, params: ctypes.Structure) -> "Ready":
        """Make parameters ready."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        return cls(params, pointers, ctypes.addressof(pointers))


def _load(cubin: Path) -> Any:
    """Load kernels; drivers that are older than the compiler may not know their format."""
    driver = _driver()
    try:
        return check(driver.cuLibraryLoadFromFile(bytes(cubin), [], [], 0, [], [], 0))
    except RuntimeError as error:
        version = check(driver.cuDriverGetVersion())
        raise RuntimeError(
            f"{error} (while loading {cubin.name}). The NVIDIA driver is for CUDA {version // 1000}."
            f"{version % 1000 // 10}, kernels of the published wheel are compiled for CUDA 13: install driver 580 or "
            "newer, or use the backend 'flex'"
        ) from error


class ByAddresses(Generic[Value]):
    """What launches are made with, kept by the addresses of their tensors: a training comes back to the same memory."""

    MOST = 1024

    def __init__(self) -> None:
        self._known: dict[object, Value] = {}

    def find(self, key: object) -> Value | None:
        """What is kept for a key."""
        return self._known.get(key)

    def keep(self, key: object, value: Value) -> None:
        """Keep something, and forget all before it if there is too much of it."""
        if len(self._known) >= self.MOST:
            self._known.clear()
        self._known[key] = value


class TensorMaps:
    """The maps of tensors, kept by address and shape."""

    def __init__(self) -> None:
        self._known = ByAddresses[bytes]()

    def get(self, x: Tensor, box: tuple[int, int, int], swizzle_bytes: int) -> bytes:
        """Return the 128 bytes of the map of x ``[t, h, d]``, bf16 or fp16.

        Args:
            x: with a contiguous last dim; its address and other strides are multiples of 16 bytes.
            box: what one copy loads: elements of a head, heads, tokens.
            swizzle_bytes: 128 or 64, the width of the box's rows in shared memory.
        """
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, box, swizzle_bytes)
        found = self._known.find(key)
        if found is None:
            found = _encode(x, box, swizzle_bytes)
            self._known.keep(key, found)
        return found


def _encode(x: Tensor, box: tuple[int, int, int], swizzle_bytes: int) -> bytes:
    driver = _driver()
    types = driver.CUtensorMapDataType
    swizzles = driver.CUtensorMapSwizzle
    dtype = {
        torch.bfloat16: types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float16: types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    }[x.dtype]
    tokens, heads, dim = x.shape
    size = x.element_size()
    encoded = check(
        driver.cuTensorMapEncodeTiled(
            dtype,
            3,
            x.data_ptr(),
            [driver.cuuint64_t(each) for each in (dim, heads, tokens)],
            [driver.cuuint64_t(each * size) for each in (x.stride(1), x.stride(0))],
            [driver.cuuint32_t(each) for each in box],
            [driver.cuuint32_t(1)] * 3,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            {128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B, 64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B}[swizzle_bytes],
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.string_at(encoded.getPtr(), ctypes.sizeof(TensorMap))


def wait_until_reached(stream: int, address: int, value: int) -> None:
    """Let a stream wait until the 32-bit word at an address of device memory has reached a value."""
    driver = _driver()
    at_least = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
    check(driver.cuStreamWaitValue32(stream, address, value, int(at_least)))


def check(answer: tuple[Any, ...]) -> Any:
    """Return what a call of the driver returned besides its status.

    Raises:
        RuntimeError: If it failed; with the driver's name of the error and what it means.
    """
    status, *values = answer
    driver = _driver()
    if status != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(status)
        _, text = driver.cuGetErrorString(status)
        raise RuntimeError(f"CUDA driver: {(name or b'unknown error').decode()}: {(text or b'').decode()}")
    return values[0] if values else None


def why_no_bindings() -> str:
    """Say why cuda-bindings cannot be imported, whatever else goes by the name of ``cuda``; empty if it can."""
    try:
        _driver()
    except ImportError as error:
        return f"cuda-bindings cannot be imported ({error}): pip install 'cuda-bindings>=13,<14'"
    return ""


@cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver
