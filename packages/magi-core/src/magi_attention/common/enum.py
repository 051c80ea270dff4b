# SPDX-License-Identifier: Apache-2.0
"""The public enumerations and the names of alternatives."""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import torch

GroupReduceOp = Literal["sum", "avg", "lse"]
AttnSinkLayout = Literal["sh", "shd", "ssh"]
OutMaybeWithLSE: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"


class AttnType(Enum):
    """Whether queries and keys come from the same sequence."""

    SELF_ATTN = "self_attn"
    CROSS_ATTN = "cross_attn"


class AttnRole(Enum):
    """What a tensor is to an attention."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"


class AttnMaskType(Enum):
    """The shape that a slice keeps of its rectangle of queries ``[q0, q1)`` and keys ``[k0, k1)``.

    ``FULL`` keeps everything; ``CAUSAL`` keys ``j <= i + (k1 - q1)``; ``INVCAUSAL`` keys ``j >= i + (k0 - q0)``;
    ``BICAUSAL`` what both keep.
    """

    FULL = "full"
    CAUSAL = "causal"
    INVCAUSAL = "inv_causal"
    BICAUSAL = "bi_causal"

    def to_int_type(self) -> int:
        """The type's integer in slice tables: 0 to 3 in the order above."""
        return list(AttnMaskType).index(self)

    @classmethod
    def from_int_type(cls, int_type: int) -> AttnMaskType:
        """The inverse of :meth:`to_int_type`; ``KeyError`` for other numbers."""
        members = list(cls)
        if int_type not in range(len(members)):
            raise KeyError(f"{int_type!r} is not an attention mask type; known are 0 to {len(members) - 1}")
        return members[int_type]


class AttnOverlapMode(Enum):
    """Who chooses the number of overlap stages: the caller (static) or the planner (dynamic)."""

    STATIC = "static"
    DYNAMIC = "dynamic"


class DispatchAlgType(Enum):
    """How chunks are dealt to ranks; see the algorithms in :mod:`magi_attention.config`."""

    LOWER_BOUND = "lower_bound"
    DYNAMIC_PROGRAMMING = "dynamic_programming"
    BINARY_SEARCH = "binary_search"
    MIN_HEAP = "min_heap"
    LOCALITY = "locality"
    TOPP_HEAP = "topp_heap"
    BATCH_TOPP_HEAP = "batch_topp_heap"
    BACKTRACKING_PRUNING = "backtracking_pruning"
    RANDOM_SELECT = "random_select"
    SEQUENTIAL_SELECT = "sequential_select"
    SORTED_SEQUENTIAL_SELECT = "sorted_sequential_select"


class OverlapAlgType(Enum):
    """How remote rows are dealt to overlap stages."""

    UNIFORM = "uniform"
    GREEDY = "greedy"


class DynamicAttnAlgType(Enum):
    """How the solver that also moves queries and outputs assigns slices to ranks."""

    NON_COMMUNICATION_QO = "non_communication_qo"
    GREEDY_RANDOM_GRID = "greedy_random_grid"
    SIMPLEX_NETWORK_FLOW = "simplex_network_flow"
    FAST_SIMPLEX_NETWORK_FLOW = "fast_simplex_network_flow"
    BINARY_GREEDY = "binary_greedy"


class MagiAttentionKernelBackend(StrEnum):
    """The kernel backends that have a fixed name; an installed plug-in may add others.

    ``AUTO`` takes the best one that supports the call. ``FFA`` is the native Hopper kernel, ``FA4`` the one for Hopper
    and Blackwell, ``SDPA`` and ``SDPA_OL`` are other names of ``REFERENCE``, and ``FLEX`` is FlexAttention.
    """

    AUTO = "auto"
    FFA = "ffa"
    FA4 = "fa4"
    SDPA = "sdpa"
    SDPA_OL = "sdpa_ol"
    REFERENCE = "reference"
    FLEX = "flex"


class MagiAttentionPrecision(StrEnum):
    """The data type that an attention computes in."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    FP64 = "fp64"

    def to_torch_dtype(self) -> torch.dtype:
        """The torch data type of this precision."""
        import torch  # here, so that the values can be used where torch is not

        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}[self.value]


class GrpCollBufferName(Enum):
    """The communication buffers that native group collectives keep apart."""

    GROUP_CAST_KV = "group_cast_kv"
    GROUP_CAST_QO = "group_cast_qo"
    GROUP_REDUCE_KV = "group_reduce_kv"
    GROUP_REDUCE_QO = "group_reduce_qo"
