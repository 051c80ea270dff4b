# SPDX-License-Identifier: Apache-2.0
"""What each kernel backend can run on this machine, and whether its results are right."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from magi_attention.cli.doctor.findings import Capability, Check, attempt
from magi_attention.common.slices import SliceTable
from magi_attention.env import general as environment
from magi_attention.kernels.mask_class import MASK_CLASSES
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, Direction, KernelBackend
from magi_attention.kernels.registry import UnloadableBackend, explain_choice, installed_backends
from magi_attention.testing.stages import NAMES, random_inputs, run_dense

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
FEATURES: dict[str, dict[str, Any]] = {
    "grouped heads": {"num_heads_q": 8, "num_heads_kv": 2},
    "softcap": {"softcap": True},
    "max_logits": {"max_logits": True},
    "deterministic": {"deterministic": True},
}

# A window, documents that are full, causal or a staircase, rows without keys, and ends inside of tiles.
CHECKED_MASK = SliceTable(
    [[0, 130, 0, 130, 1], [130, 300, 110, 300, 3], [300, 420, 300, 420, 0], [430, 500, 300, 512, 0]]
)
CHECKED_TOKENS = 512
ERROR_FACTOR, TRITON_FLOAT32_ERROR_FACTOR = 2.0, 4.0
"""How many times plain PyTorch's error is allowed; more for Triton's approximate exponential, on GPUs in float32."""


def default_device() -> torch.device:
    """The device that backends are asked about: the first GPU, or the CPU where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def capabilities(device: torch.device) -> list[Capability]:
    """Ask every installed backend what it can run, in both directions."""
    return [
        _capability(name, backend, _plain_request(device).toward(direction))
        for name, backend in installed_backends().items()
        for direction in DIRECTIONS
    ]


def choices(device: torch.device) -> dict[str, dict[str, dict[str, float]]]:
    """The backends to choose from for each mask class and direction, fastest first, with their expected TFLOP/s."""
    names = {"forward": environment.kernel_backend(), "backward": environment.kernel_backend_backward()}
    if names["backward"] == "same":
        names["backward"] = names["forward"]
    request = _plain_request(device)
    return {
        mask_class: {
            direction: explain_choice(request.toward(direction, mask_class), names[direction]).speeds
            for direction in DIRECTIONS
        }
        for mask_class in MASK_CLASSES
    }


def check_backends(device: torch.device) -> Iterator[Check]:
    """Hold each backend against the float64 oracle, once; slow where kernels are to be compiled first."""
    for name, backend in installed_backends().items():
        if isinstance(backend, UnloadableBackend):
            yield Check(name, "failed", backend.reason)
            continue
        for direction in DIRECTIONS:
            title = f"{name} {direction}"
            request = _checked_request(backend, device, direction)
            if isinstance(request, str):
                yield Check(title, "skipped", request)
            else:
                yield attempt(title, partial(_compare, backend, request))


def allowed_error(request: AttentionRequest) -> float:
    """How many times plain PyTorch's error a backend's may be."""
    is_triton_float32 = request.device.type != "cpu" and request.dtype == torch.float32
    return TRITON_FLOAT32_ERROR_FACTOR if is_triton_float32 else ERROR_FACTOR


def _plain_request(device: torch.device) -> AttentionRequest:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return AttentionRequest(device, dtype, 8, 8, 128, 128)


def _capability(name: str, backend: KernelBackend, request: AttentionRequest) -> Capability:
    refusals: dict[str, str] = {}

    def can(label: str, **changes: object) -> bool:
        support = backend.supports(replace(request, **changes))  # type: ignore[arg-type]
        if not support:
            refusals[label] = support.reason
        return bool(support)

    dtypes = [_name_of(dtype) for dtype in DTYPES if can(_name_of(dtype), dtype=dtype)]
    dims = [_text_of(pair) for pair in HEAD_DIMS if can(f"head dim {_text_of(pair)}", **_dims(pair))]
    asked = {label: changes for label, changes in FEATURES.items() if label != "max_logits" or _is_forward(request)}
    features = [label for label, changes in asked.items() if can(label, **changes)]
    speeds = {}
    if backend.supports(request):
        speeds = {each: backend.expected_tflops(replace(request, mask_class=each)) for each in MASK_CLASSES}
    return Capability(name, request.direction, dtypes, dims, features, refusals, speeds)


def _is_forward(request: AttentionRequest) -> bool:
    return request.direction == "forward"


def _checked_request(backend: KernelBackend, device: torch.device, direction: Direction) -> AttentionRequest | str:
    """A request of any data type that the backend supports, or why there is none."""
    request = AttentionRequest(device, DTYPES[0], 4, 2, 64, 64, direction=direction)
    supports = [(each, backend.supports(each)) for each in (replace(request, dtype=dtype) for dtype in DTYPES)]
    return next((each for each, support in supports if support), supports[0][1].reason)


def _compare(backend: KernelBackend, request: AttentionRequest) -> str:
    """Compute one attention; raise if its error is beyond what plain PyTorch's own allows."""
    heads, dims = (request.num_heads_q, request.num_heads_kv), (request.head_dim, request.head_dim_v)
    x = random_inputs(
        CHECKED_TOKENS, CHECKED_TOKENS, heads=heads, dims=dims, dtype=request.dtype, device=str(request.device)
    )
    call = AttentionCall(CHECKED_MASK, request.head_dim**-0.5)
    truth, plain = (run_dense(x, CHECKED_MASK, call.softmax_scale, 0.0, oracle=oracle) for oracle in (True, False))
    if _is_forward(request):
        result = backend.forward(x.q, x.k, x.v, call)
        actual, chosen = [result.out, result.lse], slice(0, 2)
    else:
        out, lse = plain[0].detach(), truth[1].detach().to(x.dlse.dtype)
        actual, chosen = list(backend.backward(x.dout, x.q, x.k, x.v, out, lse, x.dlse, call)), slice(3, 6)
    names = NAMES[chosen]
    errors = [_relative_error(*each) for each in zip(actual, truth[chosen], plain[chosen], strict=True)]
    text = ", ".join(f"{name} {error:.2f}" for name, error in zip(names, errors, strict=True))
    text = f"{_name_of(request.dtype)}: largest error of {text} times plain PyTorch's"
    allowed = allowed_error(request)
    if not max(errors) <= allowed:
        raise RuntimeError(f"{text}; allowed is {allowed:g}")
    return text


def _relative_error(actual: Tensor, truth: Tensor, plain: Tensor) -> float:
    """The largest error relative to plain PyTorch's, each with one unit in the last place; NaN stays NaN."""
    actual, truth, plain = (each.detach() for each in (actual, truth, plain))
    there = truth.isfinite()
    if not torch.equal(actual.double()[~there], truth[~there]):
        return float(np.inf)
    last_place = torch.finfo(plain.dtype).eps * float(truth[there].abs().max())
    errors = [float((each.double() - truth)[there].abs().max()) for each in (actual, plain)]
    return max(errors[0] - last_place, 0.0) / max(errors[1], last_place) if errors[0] == errors[0] else float(np.nan)


def _dims(pair: tuple[int, int]) -> dict[str, int]:
    return {"head_dim": pair[0], "head_dim_v": pair[1]}


def _text_of(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}/{pair[1]}"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
