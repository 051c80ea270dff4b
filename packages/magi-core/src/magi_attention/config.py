# SPDX-License-Identifier: Apache-2.0
"""What a caller can choose: how chunks are dealt, how communication overlaps, what computes and what travels.

All classes are frozen, hashable and compared field by field. A contradiction raises when the object is made:
``MagiValueError`` (both a ``ValueError`` and an ``AssertionError``) or, for a wrong type, ``MagiTypeError``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from magi_attention.common.algorithms import BatchToppHeapDispatchAlg as BatchToppHeapDispatchAlg
from magi_attention.common.algorithms import (
    BSDispatchAlg,
    DispatchAlg,
    DPDispatchAlg,
    GreedyOverlapAlg,
    LBDispatchAlg,
    LocalityDispatchAlg,
    MinHeapDispatchAlg,
    OverlapAlg,
    SequentialDispatchAlg,
    SortedSequentialSelectAlg,
    UniformOverlapAlg,
)
from magi_attention.common.algorithms import BTPDispatchAlg as BTPDispatchAlg
from magi_attention.common.algorithms import RandomSelectDispatchAlg as RandomSelectDispatchAlg
from magi_attention.common.algorithms import ToppHeapDispatchAlg as ToppHeapDispatchAlg
from magi_attention.common.enum import AttnOverlapMode, MagiAttentionPrecision
from magi_attention.common.errors import MagiTypeError, MagiValueError
from magi_attention.common.validation import check_positive, check_type
from magi_attention.env import comm as comm_env
from magi_attention.env import general as general_env
from magi_attention.env.variables import is_set

__all__ = [
    "BSDispatchAlg",
    "DPDispatchAlg",
    "DispatchAlg",
    "DispatchConfig",
    "DistAttnConfig",
    "GreedyOverlapAlg",
    "GrpCollConfig",
    "LBDispatchAlg",
    "LocalityDispatchAlg",
    "MinHeapDispatchAlg",
    "OverlapAlg",
    "OverlapConfig",
    "RuntimeConfig",
    "SequentialDispatchAlg",
    "SortedSequentialSelectAlg",
    "UniformOverlapAlg",
]


@dataclass(frozen=True)
class DispatchConfig:
    """How the sequence is cut and dealt.

    Attributes:
        chunk_size: the most rows of a chunk, of which every rank gets ``MAGI_ATTENTION_MIN_CHUNKS_PER_RANK`` at least;
            None to let the planner choose, which may also cut where documents start.
        uneven_shard: deal the sequence as it is, rather than padded so that all ranks hold equally many rows.
        alg: the algorithm that deals chunks to ranks.
    """

    chunk_size: int | None = None
    uneven_shard: bool = False
    alg: DispatchAlg = field(default_factory=LocalityDispatchAlg)

    def __post_init__(self) -> None:
        check_positive(self, ["chunk_size"], int, type(None))
        check_type(self, "uneven_shard", bool)
        if not hasattr(check_type(self, "alg", DispatchAlg), "type"):
            raise MagiTypeError("DispatchConfig.alg must be one of DispatchAlg's subclasses, not DispatchAlg itself")
        if self.uneven_shard and self.alg.is_equal_num_workloads:
            raise MagiValueError(
                f"{type(self.alg).__name__} deals equally many chunks to all ranks, which uneven_shard=True "
                "cannot have; use MinHeapDispatchAlg, for one"
            )


@dataclass(frozen=True)
class OverlapConfig:
    """How the exchange of keys and values overlaps with computing.

    Attributes:
        mode: whether ``degree`` is given (static) or chosen by the planner (dynamic). A degree of 0 or 1 is always
            static, ``"auto"`` always dynamic.
        degree: 0: exchange, then compute everything in one call. 1: one remote stage, exchanged while the rank computes
            with its own rows. N: N remote stages. ``"auto"``: the planner chooses from 1 on by the rates of this
            machine, both passes, and the key's heads. None: likewise by ``calc_cost_factor`` and ``comm_cost_factor``,
            forward alone; only with the dynamic mode.
        dynamic_max_degree: the most stages that the planner may choose.
        min_chunk_size: the least rows in a piece of remote keys that a stage takes as a whole.
        max_num_chunks: the most such pieces.
        alg: how pieces are dealt to stages.
        calc_cost_factor: the cost of computing one pair, in the unit of ``comm_cost_factor``.
        comm_cost_factor: the cost of exchanging one row.
    """

    mode: AttnOverlapMode = AttnOverlapMode.STATIC
    degree: int | Literal["auto"] | None = 1
    dynamic_max_degree: int | None = 8
    min_chunk_size: int = 512
    max_num_chunks: int = 64
    alg: OverlapAlg = field(default_factory=UniformOverlapAlg)
    calc_cost_factor: float = 1.0
    comm_cost_factor: float = 1.0

    def __post_init__(self) -> None:
        check_type(self, "mode", AttnOverlapMode)
        if not hasattr(check_type(self, "alg", OverlapAlg), "type"):
            raise MagiTypeError("OverlapConfig.alg must be one of OverlapAlg's subclasses, not OverlapAlg itself")
        if self.degree == "auto":
            object.__setattr__(self, "mode", AttnOverlapMode.DYNAMIC)
        elif isinstance(self.degree, str):
            raise MagiValueError(f"OverlapConfig.degree must be a number, 'auto' or None, not {self.degree!r}")
        else:
            check_type(self, "degree", int, type(None))
        check_positive(self, ["min_chunk_size", "max_num_chunks"], int)
        check_positive(self, ["calc_cost_factor", "comm_cost_factor"], int, float)
        if isinstance(self.degree, int) and self.degree < 0:
            raise MagiValueError(f"OverlapConfig.degree must be at least 0, not {self.degree}")
        if self.degree in (0, 1):
            object.__setattr__(self, "mode", AttnOverlapMode.STATIC)
        if self.mode is AttnOverlapMode.STATIC:
            self._check_static()
        else:
            self._check_dynamic()

    def _check_static(self) -> None:
        if not isinstance(self.degree, int):
            raise MagiValueError("OverlapConfig.degree=None needs mode=AttnOverlapMode.DYNAMIC")
        if self.degree > self.max_num_chunks:
            raise MagiValueError(
                f"OverlapConfig.degree={self.degree} stages need at least as many pieces, but "
                f"max_num_chunks={self.max_num_chunks}"
            )

    def _check_dynamic(self) -> None:
        if isinstance(self.degree, int):
            raise MagiValueError(
                f"OverlapConfig.mode=DYNAMIC chooses the degree itself: pass None or 'auto', not {self.degree}"
            )
        if self.dynamic_max_degree is None:
            raise MagiValueError("OverlapConfig.mode=DYNAMIC needs a positive dynamic_max_degree, not None")
        check_positive(self, ["dynamic_max_degree"], int)

    @property
    def no_overlap(self) -> bool:
        """Whether the exchange comes first and a single call computes everything (degree 0)."""
        return self.degree == 0

    @property
    def enable(self) -> bool:
        """Whether the remote rows are, or may be, split into several stages."""
        return not isinstance(self.degree, int) or self.degree >= 2


@dataclass(frozen=True)
class GrpCollConfig:
    """Resources of the native group collectives of MagiAttention v1.1.1; accepted for compatibility, without effect.

    Those of the ``magi-comm-grpcoll`` wheel size their buffers and choose what carries rows themselves.

    Attributes:
        num_sms: multiprocessors that a collective may occupy.
        nvl_chunk_size: rows sent at a time over NVLink.
        nvl_buffer_size: rows that a NVLink queue holds.
        rdma_chunk_size: rows sent at a time between nodes.
        rdma_buffer_size: rows that a queue between nodes holds.
        num_nvl_bytes: bytes of the buffer that peers of the node write to.
        num_rdma_bytes: bytes of the buffer that other nodes write to.
    """

    num_sms: int = 24
    nvl_chunk_size: int = 8
    nvl_buffer_size: int = 256
    rdma_chunk_size: int = 16
    rdma_buffer_size: int = 128
    num_nvl_bytes: int = int(2e9)
    num_rdma_bytes: int = 0

    _KNOWN_RANKS: ClassVar[tuple[int, ...]] = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)

    def __post_init__(self) -> None:
        sizes = ["nvl_chunk_size", "nvl_buffer_size", "rdma_chunk_size", "rdma_buffer_size"]
        check_positive(self, ["num_sms", *sizes], int)
        for name in ("num_nvl_bytes", "num_rdma_bytes"):
            if check_type(self, name, int) < 0:
                raise MagiValueError(f"GrpCollConfig.{name} must be at least 0, not {getattr(self, name)!r}")

    def to_kernel_config(self) -> dict[str, int]:
        """The fields that a collective kernel takes."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.name.endswith("_bytes")}

    def to_buffer_args(self) -> dict[str, int]:
        """The fields that size the communication buffers."""
        return {"num_nvl_bytes": self.num_nvl_bytes, "num_rdma_bytes": self.num_rdma_bytes}

    @staticmethod
    def get_default_group_cast_config(num_ranks: int) -> GrpCollConfig:
        """The settings to start from for a group cast among ``num_ranks`` ranks."""
        return GrpCollConfig._default_for(num_ranks)

    @staticmethod
    def get_default_group_reduce_config(num_ranks: int) -> GrpCollConfig:
        """The settings to start from for a group reduce among ``num_ranks`` ranks."""
        return GrpCollConfig._default_for(num_ranks)

    @staticmethod
    def _default_for(num_ranks: int) -> GrpCollConfig:
        if num_ranks not in GrpCollConfig._KNOWN_RANKS:
            raise MagiValueError(f"num_ranks must be one of {GrpCollConfig._KNOWN_RANKS}, not {num_ranks!r}")
        return GrpCollConfig()


@dataclass(frozen=True)
class RuntimeConfig:
    """What computes, in which precision, and what travels. None takes the environment variable's value.

    Attributes:
        kernel_backend: ``"auto"`` (for each stage and pass the fastest that supports it), hopper (also called ffa),
            blackwell (also called fa4), cudnn_flex, flex, reference (also called sdpa and sdpa_ol), or the name of an
            installed plug-in.
        kernel_backend_backward: the same for the backward pass alone, or ``"same"``.
        precision: the data type to compute in: bf16, fp16, fp32, fp64, or ``"input"`` for that of the tensors.
        deterministic: the same bits in every run.
        hierarchical_comm: exchange in two hops; needs a 2-D mesh.
        qo_comm: let queries travel to the keys and outputs back, wherever that moves fewer bytes than keys and values.
        native_grpcoll: exchange by the native group collectives.
        forward_high_precision_reduce: send partial outputs in at least float32; matters only with ``qo_comm``, since
            without it partial outputs stay where they are and are merged in at least float32 anyway.
        backward_high_precision_reduce: send partial gradients in at least float32.
        keep_received: keep received keys and values for the backward pass where they take little memory, at most half
            of what q and out take; else they are exchanged again.
        sink_grad_reduce: how the ranks' gradients of the sink are combined: none, sum or avg.
        forward_sm_margin: multiprocessors that forward kernels leave to communication. None leaves some where rows
            begin to travel beside a kernel by means that need any, and none elsewhere; a number holds for every kernel.
        backward_sm_margin: the same for backward kernels.
        flatten_head_groups: accepted for compatibility; all heads share one plan.
        auto_range_merge: accepted for compatibility; kernels here merge slices as suits them.
        check_plan: compare the ranks' plans once for every new key.
        check_plan_timeout: seconds to wait there for a rank that does not come, before all others raise.
        skip_overlap_check: don't check that no two slices keep a common pair.
        sanity_check: compare what ``dispatch`` is given on all ranks, and raise where it differs; slow, to look for
            mistakes of data loaders. Not inside ``torch.compile``.
    """

    kernel_backend: str | None = None
    kernel_backend_backward: str | None = None
    precision: str | None = None
    deterministic: bool | None = None
    hierarchical_comm: bool | None = None
    qo_comm: bool | None = None
    native_grpcoll: bool | None = None
    forward_high_precision_reduce: bool | None = None
    backward_high_precision_reduce: bool | None = None
    keep_received: bool | None = None
    sink_grad_reduce: str | None = None
    forward_sm_margin: int | None = None
    backward_sm_margin: int | None = None
    flatten_head_groups: bool | None = None
    auto_range_merge: bool | None = None
    check_plan: bool | None = None
    check_plan_timeout: int | None = None
    skip_overlap_check: bool | None = None
    sanity_check: bool | None = None

    def __post_init__(self) -> None:
        for name in _SWITCHES:
            check_type(self, name, bool, type(None))
        for name in ("forward_sm_margin", "backward_sm_margin"):
            margin = check_type(self, name, int, type(None))
            if margin is not None and margin < 0:
                raise MagiValueError(f"RuntimeConfig.{name} must be at least 0, not {margin}")
        check_positive(self, ["check_plan_timeout"], int, type(None))
        self._check_choice("precision", ["input", *MagiAttentionPrecision])
        self._check_choice("sink_grad_reduce", ["none", "sum", "avg"])
        self._check_backend("kernel_backend")
        self._check_backend("kernel_backend_backward", "same")
        self._check_combinations()

    def _check_choice(self, name: str, choices: Sequence[str]) -> None:
        value = check_type(self, name, str, type(None))
        if value is not None and value not in choices:
            raise MagiValueError(f"RuntimeConfig.{name} must be one of {', '.join(choices)}, not {value!r}")

    def _check_backend(self, name: str, *also: str) -> None:
        backend = check_type(self, name, str, type(None))
        if backend is not None and backend not in also and not general_env.is_known_kernel_backend(backend):
            known = ", ".join([*also, *general_env.known_kernel_backends()])
            raise MagiValueError(f"RuntimeConfig.{name} must be one of {known}, not {backend!r}")

    def _check_combinations(self) -> None:
        asked = [name for name in _SWITCHES if getattr(self, name)]
        # The original's name comes with the original's limits; of `blackwell` the backend itself says what it can do.
        if "fa4" in (self.kernel_backend, self.kernel_backend_backward):
            asked.append("fa4")
        for one, other in _CONTRADICTIONS:
            if one in asked and other in asked:
                raise MagiValueError(f"RuntimeConfig: {one} and {other} cannot be combined; switch one of them off")

    def resolved(self) -> RuntimeConfig:
        """Return a copy in which the environment has filled every field that was None.

        Margins stay None while their variables are not set: only with a plan is it known beside which kernels rows
        travel.
        """
        filled: dict[str, Any] = {name: read() for name, read in _ENVIRONMENT.items() if getattr(self, name) is None}
        for name, variable in _SM_MARGINS.items():
            if name in filled and not is_set(variable):
                del filled[name]
        return replace(self, **filled)


_ENVIRONMENT = {
    "kernel_backend": general_env.kernel_backend,
    "kernel_backend_backward": general_env.kernel_backend_backward,
    "precision": general_env.precision,
    "deterministic": general_env.is_deterministic_mode_enable,
    "hierarchical_comm": comm_env.is_hierarchical_comm_enable,
    "qo_comm": comm_env.is_qo_comm_enable,
    "native_grpcoll": comm_env.is_native_grpcoll_enable,
    "forward_high_precision_reduce": comm_env.is_forward_high_precision_reduce_enable,
    "backward_high_precision_reduce": comm_env.is_backward_high_precision_reduce_enable,
    "keep_received": comm_env.is_keep_received_enable,
    "sink_grad_reduce": comm_env.dsink_all_reduce_op,
    "forward_sm_margin": general_env.ffa_forward_sm_margin,
    "backward_sm_margin": general_env.ffa_backward_sm_margin,
    "flatten_head_groups": general_env.is_flatten_head_groups_enable,
    "auto_range_merge": general_env.is_auto_range_merge_enable,
    "check_plan": comm_env.is_plan_check_enable,
    "check_plan_timeout": comm_env.plan_check_timeout,
    "skip_overlap_check": general_env.is_overlap_check_skipped,
    "sanity_check": general_env.is_sanity_check_enable,
}

_SM_MARGINS = {
    "forward_sm_margin": "MAGI_ATTENTION_FFA_FORWARD_SM_MARGIN",
    "backward_sm_margin": "MAGI_ATTENTION_FFA_BACKWARD_SM_MARGIN",
}

_SWITCHES = [f.name for f in fields(RuntimeConfig) if f.type == "bool | None"]

_CONTRADICTIONS = [
    ("hierarchical_comm", "qo_comm"),
    ("hierarchical_comm", "native_grpcoll"),
    ("native_grpcoll", "deterministic"),
    ("fa4", "deterministic"),
    ("fa4", "forward_high_precision_reduce"),
    ("fa4", "backward_high_precision_reduce"),
    ("fa4", "qo_comm"),
]


@dataclass(frozen=True)
class DistAttnConfig:
    """Everything that can be chosen about one distributed attention.

    While ``MAGI_ATTENTION_QO_COMM`` is 1 and ``runtime_config`` doesn't say otherwise, the overlap config is replaced
    by ``OverlapConfig(degree=1)``, the only one that traveling queries allow; ``degree="auto"`` becomes it as well.
    """

    dispatch_config: DispatchConfig = field(default_factory=DispatchConfig)
    overlap_config: OverlapConfig = field(default_factory=OverlapConfig)
    grpcoll_config: GrpCollConfig = field(default_factory=GrpCollConfig)
    runtime_config: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        check_type(self, "dispatch_config", DispatchConfig)
        check_type(self, "overlap_config", OverlapConfig)
        check_type(self, "grpcoll_config", GrpCollConfig)
        qo_comm = check_type(self, "runtime_config", RuntimeConfig).qo_comm
        if (qo_comm is None and comm_env.is_qo_comm_enable()) or (qo_comm and self.overlap_config.degree == "auto"):
            object.__setattr__(self, "overlap_config", OverlapConfig(degree=1))
        elif qo_comm and self.overlap_config.degree != 1:
            raise MagiValueError(
                f"runtime_config.qo_comm needs OverlapConfig(degree=1), not degree={self.overlap_config.degree}"
            )

    def resolved(self) -> DistAttnConfig:
        """Return a copy whose runtime config is :meth:`resolved <RuntimeConfig.resolved>`; for when a key is made."""
        config = replace(self)  # the environment may have asked for traveling queries since
        return replace(config, runtime_config=config.runtime_config.resolved())
