# SPDX-License-Identifier: Apache-2.0
"""Letting the wheels compile kernels without launching them, for any supported architecture, with or without a GPU.

The wheels compile a kernel when it is first launched, by tracing it with the launch's tensors. Under PyTorch's fake
tensors they do all but launch. What little they ask of a GPU meanwhile is answered here. One process compiles for one
architecture: the wheels, once imported, remember the first.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from magi_kernels_blackwell.cache import why_unkept
from magi_kernels_blackwell.wheels import ARCHITECTURES, HOPPER, capability_of, num_multiprocessors

MULTIPROCESSORS = {90: 132, 100: 148, 103: 148}
"""Of the common models: H100 SXM and H200, B200, B300."""


class Compiler:
    """Stands for ``cutlass.cute.compile``, counts, and compiles nothing that would not be kept.

    Attributes:
        count: how often something was compiled.
    """

    def __init__(self, compiler: Any) -> None:
        self._compiler = compiler
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compile.

        Raises:
            RuntimeError: If compiled kernels cannot be kept on disk.
        """
        if unkept := why_unkept():
            raise RuntimeError(unkept)
        self.count += 1
        return self._compiler(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiler, name)


class _Hardware:
    """Stands for ``cutlass.utils.HardwareInfo``; without a number, no kernel may ask for it."""

    def __init__(self, num_sms: int | None) -> None:
        self._num_sms = num_sms

    def __call__(self, *args: object, **kwargs: object) -> "_Hardware":
        return self

    def get_device_multiprocessor_count(self) -> int:
        if self._num_sms is None:
            raise RuntimeError("kernels of this architecture are kept for all numbers of multiprocessors")
        return self._num_sms

    def get_max_active_clusters(self, cluster_size: int) -> int:
        return self.get_device_multiprocessor_count() // cluster_size


def multiprocessors_of(arch: int, wanted: int | None = None) -> int:
    """How many multiprocessors to compile for: as wanted, as the GPU here has if it is of ``arch``, or the common."""
    if wanted is not None:
        return wanted
    if torch.cuda.is_available() and capability_of(device := torch.device("cuda", 0)) == arch:
        return num_multiprocessors(device)
    return MULTIPROCESSORS[arch]


@contextmanager
def compiling_for(arch: int, multiprocessors: int | None = None) -> Iterator[Compiler]:
    """Let both wheels compile for ``arch`` instead of launching. They must be imported inside, in a fresh process.

    Tensors made inside are fake, on ``cuda`` whatever is here.

    Args:
        arch: compute capability, as ``10 * major + minor``.
        multiprocessors: as of :func:`multiprocessors_of`.

    Raises:
        ValueError: If there are no kernels for ``arch``.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {sorted(ARCHITECTURES)}, not {arch}")
    num_sms = multiprocessors_of(arch, multiprocessors)
    hardware = _Hardware(None if arch == HOPPER else num_sms)
    variables = {
        "CUTE_DSL_ARCH": f"sm_{arch}a",
        "FLASH_ATTENTION_ARCH": f"sm_{arch}",
        "FLASH_ATTENTION_NUM_SMS": str(num_sms),
        "FLEX_ATTENTION_ARCH": f"sm_{arch}",
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, variables))
        import cutlass.utils.hardware_info
        from cutlass import cute
        from torch._subclasses.fake_tensor import FakeTensorMode

        compiler = stack.enter_context(mock.patch.object(cute, "compile", Compiler(cute.compile)))
        for module in (cutlass.utils, cutlass.utils.hardware_info):
            stack.enter_context(mock.patch.object(module, "HardwareInfo", hardware))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", return_value=0))
        stack.enter_context(FakeTensorMode())
        yield compiler


@contextmanager
def planning_for(arch: int) -> Iterator[None]:
    """Inside :func:`compiling_for`, let ``create_mask_plan`` of cudnn.flex_attention compile its kernels as well."""
    from cudnn.flex_attention.plan import builder, validation

    def empty_offsets(counts: torch.Tensor) -> torch.Tensor:
        return counts.new_empty(counts.numel() + 1, dtype=torch.int32)

    with (
        mock.patch.object(validation, "get_device_arch", return_value=arch),
        mock.patch.object(builder, "_exclusive_offsets", empty_offsets),
    ):
        yield
