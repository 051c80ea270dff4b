# SPDX-License-Identifier: Apache-2.0
"""The kernels that the backends launch, as cases to compile ahead of time.

A case's ``variant`` is words. At most one names a mask that FlashAttention-4 knows itself; without one, the mask is
irregular. The others are:

- ``documents``: several packed documents of that mask,
- ``deterministic``, ``softcap``, ``max_logits``: as :class:`~magi_attention.kernels.protocol.AttentionCall` has them,
- ``dlse``: with a gradient of lse,
- ``short``: of so few queries and keys that they fit into one tile, for which some kernels are compiled apart.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, KernelSelection, PrecompileCase
from magi_kernels_blackwell.wheels import ARCHITECTURES

LENGTH, SHORT_LENGTH = 8192, 64
SOFTCAP = 15.0
"""Kernels with softcap are compiled for its value, so that a user's own is not among these."""

NATIVE_MASKS = ("full", "causal", "window", "left_window", "right_window")


def arch_number(arch: str) -> int:
    """Turn ``"sm_90"`` into 90."""
    return int(arch.removeprefix("sm_"))


def combinations(selection: KernelSelection, variants: Sequence[str]) -> Iterator[PrecompileCase]:
    """Every combination of a selection with ``variants``; none for an architecture without kernels."""
    if arch_number(selection.arch) not in ARCHITECTURES:
        return
    for dtype, heads, dims, direction, variant in product(
        selection.dtypes, selection.heads, selection.head_dims, selection.directions, variants
    ):
        yield PrecompileCase(selection.arch, dtype, *heads, *dims, direction, variant, selection.multiprocessors)


def request_of(case: PrecompileCase) -> AttentionRequest:
    """What a case asks of a backend."""
    words = case.variant.split()
    return AttentionRequest(
        torch.device("cuda"),
        case.dtype,
        case.num_heads_q,
        case.num_heads_kv,
        case.head_dim,
        case.head_dim_v,
        softcap="softcap" in words,
        max_logits="max_logits" in words,
        deterministic="deterministic" in words,
        direction=case.direction,
    )


def call_of(case: PrecompileCase) -> AttentionCall:
    """A call that launches the case's kernels."""
    words = case.variant.split()
    return AttentionCall(
        _slices(words),
        softmax_scale=case.head_dim**-0.5,
        softcap=SOFTCAP if "softcap" in words else 0.0,
        deterministic="deterministic" in words,
        max_logits="max_logits" in words,
    )


class CaseTensors(NamedTuple):
    """What a case's launch takes, as a backend gets it: lse and dlse ``[hq, tq]``, dlse None unless asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    dout: Tensor
    lse: Tensor
    dlse: Tensor | None


def tensors_of(case: PrecompileCase) -> CaseTensors:
    """Make a case's tensors, empty, on the GPU: for use inside ``compiling_for``, where they are fake."""
    words = case.variant.split()
    length = _length(words)

    def empty(heads: int, dim: int) -> Tensor:
        return torch.empty(length, heads, dim, dtype=case.dtype, device="cuda")

    lse = torch.empty(case.num_heads_q, length, dtype=torch.float32, device="cuda")
    return CaseTensors(
        q=empty(case.num_heads_q, case.head_dim),
        k=empty(case.num_heads_kv, case.head_dim),
        v=empty(case.num_heads_kv, case.head_dim_v),
        out=empty(case.num_heads_q, case.head_dim_v),
        dout=empty(case.num_heads_q, case.head_dim_v),
        lse=lse,
        dlse=torch.empty_like(lse) if "dlse" in words else None,
    )


def _length(words: Sequence[str]) -> int:
    return SHORT_LENGTH if "short" in words else LENGTH


def _slices(words: Sequence[str]) -> SliceTable:
    length = _length(words)
    mask = next((word for word in words if word in NATIVE_MASKS), None)
    if mask is None:
        part = length // 8
        rows = [[0, 2 * part, 0, 3 * part, 0], [2 * part, 6 * part, part, 5 * part, 1], [7 * part, length, 0, part, 2]]
        return SliceTable(rows)
    size = length // 2 if "documents" in words else length
    return SliceTable([row for start in range(0, length, size) for row in _document(mask, start, start + size)])


def _document(mask: str, start: int, stop: int) -> list[list[int]]:
    """A document's slices. A window reaches over a quarter of it."""
    reach = (stop - start) // 4
    match mask:
        case "full":
            return [[start, stop, start, stop, 0]]
        case "causal":
            return [[start, stop, start, stop, 1]]
        case "window":
            return [[start, start + reach, start, start + reach, 1], [start + reach, stop, start, stop, 3]]
        case "left_window":
            return [[start, stop, start, stop, 2]]
        case _:
            return [[start, stop - reach, start, stop, 1], [stop - reach, stop, start, stop, 0]]
