# SPDX-License-Identifier: Apache-2.0
"""What both backends ask of a request before their own limits."""

import torch

from magi_attention.kernels.protocol import AttentionRequest, Support
from magi_kernels_blackwell.wheels import ARCHITECTURES, capability_of, missing_wheels

DTYPES = (torch.bfloat16, torch.float16)


def refuse(reason: str) -> Support:
    """An answer of no."""
    return Support(False, reason)


def gpu_support(request: AttentionRequest, wheels: dict[str, str]) -> Support | None:
    """Return why no kernel of these wheels can run on the request's device and dtype; None if some may."""
    if request.device.type != "cuda" or torch.version.hip is not None:
        return refuse(f"the kernels run on NVIDIA GPUs only, the tensors are on {request.device}")
    if request.dtype not in DTYPES:
        other = "reference" if request.dtype == torch.float64 else "flex"
        return refuse(f"the kernels compute in bfloat16 or float16, not in {request.dtype}; use the backend {other!r}")
    if missing := missing_wheels(tuple(wheels.items())):
        return refuse(missing)
    if not torch.cuda.is_available():
        return refuse("no CUDA device is available")
    if (arch := capability_of(request.device)) not in ARCHITECTURES:
        known = ", ".join(f"{number / 10} {name}" for number, name in ARCHITECTURES.items())
        return refuse(f"the GPU has compute capability {arch / 10}, kernels are for {known}; use the backend 'flex'")
    return None
