# SPDX-License-Identifier: Apache-2.0
"""Reading the options of ``magi precompile``."""

import re
from collections.abc import Sequence
from typing import get_args

import torch

from magi_attention.kernels.protocol import Direction, KernelSelection
from magi_attention.kernels.speeds import arch_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_DTYPES, DEFAULT_HEADS, DEFAULT_HEAD_DIMS = ("bf16",), ("32/32", "32/8"), ("64", "128")


def read_selections(
    archs: Sequence[str],
    dtypes: Sequence[str],
    heads: Sequence[str],
    head_dims: Sequence[str],
    direction: str,
    multiprocessors: int | None = None,
) -> list[KernelSelection]:
    """Read the options, one selection per architecture; for what is empty, take the common cases.

    Args:
        archs: such as ``"sm_90"``; empty for that of the GPU here.
        dtypes: keys of ``DTYPES``.
        heads: such as ``"32/8"``.
        head_dims: such as ``"128"`` or ``"192/128"``.
        direction: ``"forward"``, ``"backward"`` or ``"both"``.
        multiprocessors: of the GPUs; None for the usual number.

    Raises:
        ValueError: if one of them cannot be read, or there is neither an architecture nor a GPU.
    """
    if not archs and not torch.cuda.is_available():
        raise ValueError("there is no GPU here: say for which architecture to compile, such as --arch sm_90")
    dtypes, heads, head_dims = dtypes or DEFAULT_DTYPES, heads or DEFAULT_HEADS, head_dims or DEFAULT_HEAD_DIMS
    directions: tuple[Direction, ...] = get_args(Direction)
    if direction != "both" and direction not in directions:
        raise ValueError(f"--direction must be forward, backward or both, not {direction}")
    unknown = [dtype for dtype in dtypes if dtype not in DTYPES]
    if unknown:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {unknown[0]}")
    pairs = tuple(_pair("--heads", text) for text in heads)
    for text, (heads_q, heads_kv) in zip(heads, pairs, strict=True):
        if heads_q % heads_kv:
            raise ValueError(f"--heads {text}: the query heads must be a multiple of the key/value heads")
    return [
        KernelSelection(
            arch=_arch(arch),
            dtypes=tuple(DTYPES[dtype] for dtype in dtypes),
            heads=pairs,
            head_dims=tuple(_pair("--head-dim", text) for text in head_dims),
            directions=tuple(each for each in directions if direction in ("both", each)),
            multiprocessors=multiprocessors,
        )
        for arch in dict.fromkeys(archs or [arch_of(torch.device("cuda"))])
    ]


def _arch(text: str) -> str:
    if not re.fullmatch(r"sm_\d{2,3}", text):
        raise ValueError(f"--arch must be like sm_90 or sm_100, not {text}")
    return text


def _pair(option: str, text: str) -> tuple[int, int]:
    """Read ``"a/b"``, or ``"a"`` for both."""
    found = re.fullmatch(r"([1-9]\d*)(?:/([1-9]\d*))?", text)
    if not found:
        raise ValueError(f"{option} must be a number or two, like 128 or 192/128, not {text}")
    return int(found[1]), int(found[2] or found[1])
