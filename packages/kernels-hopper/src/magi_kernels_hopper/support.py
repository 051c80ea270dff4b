# SPDX-License-Identifier: Apache-2.0
"""What the kernels can do, and what keeps them from it."""

from dataclasses import replace
from functools import cache
from typing import Final

import torch

from magi_attention.kernels.protocol import AttentionRequest, Support
from magi_kernels_hopper.driver import CUBINS, why_no_bindings
from magi_kernels_hopper.variants import (
    HEAD_DIMS,
    Element,
    IndexBackwardVariant,
    IndexVariant,
    Variant,
    backward_variants,
    forward_variants,
)

ELEMENT_OF: Final[dict[torch.dtype, Element]] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def support_of(request: AttentionRequest) -> Support:
    """Whether the kernels serve a request, on the GPU that it names."""
    return _support_of(_that_decides(request))


def support_of_indices(request: AttentionRequest) -> Support:
    """Whether there is a kernel for index attention that serves a request, on the GPU that it names."""
    return _support_of(_that_decides(request), by_indices=True)


def _that_decides(request: AttentionRequest) -> AttentionRequest:
    """The request with the index of its GPU, and nothing of its mask: of masks there is no end."""
    device = request.device
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return replace(request, device=device, mask_class="general", num_pairs=None)


@cache
def _support_of(request: AttentionRequest, by_indices: bool = False) -> Support:
    if request.device.type != "cuda" or torch.version.hip is not None:
        return _refuse(f"the kernels run on NVIDIA GPUs only, the tensors are on {request.device}")
    if request.dtype not in ELEMENT_OF:
        other = "reference" if request.dtype == torch.float64 else "flex"
        return _refuse(f"the kernels compute in bfloat16 or float16, not in {request.dtype}; use the backend {other!r}")
    dims = (request.head_dim, request.head_dim_v)
    if dims not in HEAD_DIMS:
        known = ", ".join(f"{d}/{d_v}" if d != d_v else f"{d}" for d, d_v in HEAD_DIMS)
        return _refuse(f"head dims are {dims[0]}/{dims[1]}, kernels are for {known}; use the backend 'flex'")
    if not torch.cuda.is_available():
        return _refuse("no CUDA device is available")
    if (capability := torch.cuda.get_device_capability(request.device)) != (9, 0):
        major, minor = capability
        return _refuse(f"the GPU has compute capability {major}.{minor}, kernels are for 9.0; use the backend 'flex'")
    element, needed = ELEMENT_OF[request.dtype], list[Variant]()
    if by_indices:
        kind = IndexVariant if request.direction == "forward" else IndexBackwardVariant
        needed.append(kind(*dims, element, request.softcap))
    elif request.direction == "forward":
        needed += forward_variants(dims, element, request.softcap)
    else:
        needed += backward_variants(dims, element, request.softcap)
    for variant in needed:
        if not (CUBINS / f"{variant.name}.cubin").exists():
            return _refuse(
                f"this installation of magi-kernels-hopper has no kernel {variant.name}: it was not compiled, since "
                "nothing was built or because of MAGI_HOPPER_NO_KERNELS or MAGI_HOPPER_VARIANTS; install a published "
                "wheel, or build one without these variables"
            )
    if missing := why_no_bindings():
        return _refuse(missing)
    return Support(True)


def _refuse(reason: str) -> Support:
    return Support(False, reason)
