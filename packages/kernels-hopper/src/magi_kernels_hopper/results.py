# SPDX-License-Identifier: Apache-2.0
"""What forward kernels share of their parameters: how to score, and where results go.

Shape suffixes: t tokens, h heads, d head dim; q queries.
"""

import ctypes
import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


class Scoring(ctypes.Structure):
    """``magi::forward::Scoring`` of csrc/forward/params.cuh."""

    _fields_ = (
        ("scale", ctypes.c_float),
        ("to_log2", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("cap_slope", ctypes.c_float),
    )

    @classmethod
    def of(cls, softmax_scale: float, softcap: float) -> "Scoring":
        """Scores of :func:`scored_upward` queries; without a cap ``softcap`` is 0."""
        scale = abs(softmax_scale) or 1.0
        if softcap > 0:
            return cls(scale, LOG2_E, softcap, 2 * LOG2_E * scale / softcap)
        return cls(scale, LOG2_E * scale, 0.0, 0.0)


class Results(ctypes.Structure):
    """``magi::forward::Results`` of csrc/forward/params.cuh."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("max_logits", ctypes.c_void_p),
        ("lse_token", ctypes.c_int64),
        ("lse_head", ctypes.c_int64),
        ("num_q", ctypes.c_int),
        ("num_heads", ctypes.c_int),
        ("out_is_float", ctypes.c_int),
        ("merges", ctypes.c_int),
    )

    @classmethod
    def of(cls, out: Tensor, lse: Tensor, max_logits: Tensor | None, *, merge: bool = False) -> "Results":
        """What is written to ``out`` ``[tq, hq, dv]``, contiguous, ``lse`` ``[tq, hq]`` and ``max_logits`` ``[hq]``.

        Parts lie one after another: ``[parts, tq, hq, dv]`` and ``[parts, tq, hq]``.
        """
        largest = None if max_logits is None else max_logits.data_ptr()
        is_float = out.dtype == torch.float32
        return cls(out.data_ptr(), lse.data_ptr(), largest, *lse.stride()[-2:], *lse.shape[-2:], is_float, merge)


def scored_upward(q: Tensor, softmax_scale: float) -> Tensor:
    """The queries whose largest products are the largest scores, with the scale's absolute value (1 for 0)."""
    if softmax_scale > 0:
        return q
    return -q if softmax_scale < 0 else torch.zeros_like(q)
