# SPDX-License-Identifier: Apache-2.0
"""Compiling kernels ahead of time, for any supported architecture, on a machine with or without a GPU.

The wheels compile a kernel when it is first launched, by tracing it with the launch's tensors. Under PyTorch's fake
tensors they do all but launch. What little they ask of a GPU meanwhile is answered here. One process compiles for one
architecture: the wheels remember the first answer.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

MULTIPROCESSORS = {90: 132, 100: 148, 103: 148}
"""Of the common models: H100 SXM and H200, B200, B300."""


class _Hardware:
    """Stands for ``cutlass.utils.HardwareInfo``."""

    def __init__(self, num_sms: int) -> None:
        self._num_sms = num_sms

    def __call__(self, *args: object, **kwargs: object) -> "_Hardware":
        return self

    def get_device_multiprocessor_count(self) -> int:
        return self._num_sms

    def get_max_active_clusters(self, cluster_size: int) -> int:
        return self._num_sms // cluster_size


@contextmanager
def compiling_for(arch: int, num_sms: int) -> Iterator[None]:
    """Let both wheels compile for ``arch`` with ``num_sms`` multiprocessors instead of launching.

    Tensors made inside are fake, on ``cuda`` whatever is here.

    Args:
        arch: compute capability, as ``10 * major + minor``.
        num_sms: multiprocessors of the GPU model.
    """
    variables = {
        "CUTE_DSL_ARCH": f"sm_{arch}a",
        "FLASH_ATTENTION_ARCH": f"sm_{arch}",
        "FLASH_ATTENTION_NUM_SMS": str(num_sms),
        "FLEX_ATTENTION_ARCH": f"sm_{arch}",
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, variables))
        import cutlass.utils
        from torch._subclasses.fake_tensor import FakeTensorMode

        stack.enter_context(mock.patch.object(cutlass.utils, "HardwareInfo", _Hardware(num_sms)))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: 0))
        stack.enter_context(FakeTensorMode())
        yield


@contextmanager
def compiling_plans_for(arch: int) -> Iterator[None]:
    """Inside :func:`compiling_for`, let ``create_mask_plan`` of cudnn.flex_attention compile its kernels as well."""
    from magi_kernels_blackwell.cudnn_flex import library

    library.load()
    from cudnn.flex_attention.plan import builder, validation

    def empty_offsets(counts: torch.Tensor) -> torch.Tensor:
        return counts.new_empty(counts.numel() + 1, dtype=torch.int32)

    with (
        mock.patch.object(validation, "get_device_arch", lambda index=None: arch),
        mock.patch.object(builder, "_exclusive_offsets", empty_offsets),
    ):
        yield
