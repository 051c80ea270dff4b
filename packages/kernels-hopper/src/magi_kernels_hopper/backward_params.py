# SPDX-License-Identifier: Apache-2.0
"""The structures of csrc/backward/params.cuh."""

import ctypes

from magi_kernels_hopper.driver import TensorMap
from magi_kernels_hopper.results import LOG2_E


class Params(ctypes.Structure):
    """``magi::backward::Params``."""

    _fields_ = (
        ("q", TensorMap),
        ("dout", TensorMap),
        ("k", TensorMap),
        ("v", TensorMap),
        ("dk", ctypes.c_void_p),
        ("dv", ctypes.c_void_p),
        ("dq_sums", ctypes.c_void_p),
        ("row_terms", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("tiles", ctypes.c_void_p),
        ("runs", ctypes.c_void_p),
        ("pieces", ctypes.c_void_p),
        ("items", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("num_kv_heads", ctypes.c_int),
        ("log2_pack", ctypes.c_int),
        ("packs_per_kv_head", ctypes.c_int),
        ("num_tiles_q", ctypes.c_int),
        ("num_items", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("to_log2", ctypes.c_float),
        ("cap_slope", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("out_mode", ctypes.c_int),
        ("adders", ctypes.c_void_p),
        ("dq", ctypes.c_void_p),
        ("added", ctypes.c_void_p),
        ("complete", ctypes.c_void_p),
        ("num_q", ctypes.c_int),
        ("num_packs", ctypes.c_int),
        ("dq_scale", ctypes.c_float),
        ("dq_mode", ctypes.c_int),
        ("num_complete", ctypes.c_int),
        ("partial", ctypes.c_void_p),
        ("items_done", ctypes.c_void_p),
        ("awaited_done", ctypes.c_void_p),
        ("awaited_there", ctypes.c_void_p),
        ("num_awaited", ctypes.c_int),
        ("padding", ctypes.c_int * 9),
    )

    def set_scores(self, softmax_scale: float, softcap: float) -> None:
        """Set how to score queries of :func:`.results.scored_upward`; without a cap ``softcap`` is 0."""
        self.scale = scale = abs(softmax_scale) or 1.0
        self.to_log2 = LOG2_E * scale
        self.cap_slope = 2 * LOG2_E * scale / softcap if softcap > 0 else 0.0
        self.cap = LOG2_E * softcap
        self.dq_scale = softmax_scale


class RowParams(ctypes.Structure):
    """``magi::backward::RowParams``."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("dout", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("lse_token", ctypes.c_int64),
        ("lse_head", ctypes.c_int64),
        ("dlse", ctypes.c_void_p),
        ("row_terms", ctypes.c_void_p),
        ("added", ctypes.c_void_p),
        ("complete", ctypes.c_void_p),
        ("items_done", ctypes.c_void_p),
        ("adders", ctypes.c_void_p),
        ("dq", ctypes.c_void_p),
        ("num_q", ctypes.c_int),
        ("num_heads", ctypes.c_int),
        ("log2_pack", ctypes.c_int),
        ("num_tiles_q", ctypes.c_int),
        ("num_items_done", ctypes.c_int),
        ("dq_mode", ctypes.c_int),
    )
