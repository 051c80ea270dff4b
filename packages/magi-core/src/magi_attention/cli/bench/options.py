# SPDX-License-Identifier: Apache-2.0
"""What the user of ``magi bench`` can choose; light to import, since the help text needs it."""

from dataclasses import dataclass
from pathlib import Path

from magi_attention.cli.demo.options import Device, Precision
from magi_attention.common.slices import MOST_ROWS
from magi_attention.common.workloads import LEAST_TOKENS, WORKLOADS

CPU_TOKENS = 1024
"""The length where it is open on CPUs, on which plain PyTorch would take days for that for GPUs."""


@dataclass(frozen=True)
class BenchOptions:
    """All choices of one measurement, checked.

    Attributes:
        mask: name of a mask of :mod:`magi_attention.common.workloads`.
        tokens: length of the sequence over all ranks.
        processes: ranks to spawn; None for those of torchrun, or a single one.
        heads_q: query heads.
        heads_kv: key/value heads.
        head_dim: size of a head.
        precision: of the inputs.
        backend: kernel backend, or ``"auto"``.
        device: where to compute.
        overlap_degree: remote stages; None for automatic.
        sm_margin: multiprocessors that kernels leave to communication, where a backend can; None for as many as in a
            training, by the environment.
        native_grpcoll: whether native group collectives move the rows; None for what the environment says.
        warmup: passes before those that are timed.
        repeat: passes that are timed.
        trace: where rank 0 writes a Chrome trace; None for no trace.
    """

    mask: str = "causal"
    tokens: int = 65536
    processes: int | None = None
    heads_q: int = 64
    heads_kv: int = 8
    head_dim: int = 128
    precision: Precision = Precision.BF16
    backend: str = "auto"
    device: Device = Device.AUTO
    overlap_degree: int | None = 1
    sm_margin: int | None = None
    native_grpcoll: bool | None = None
    warmup: int = 3
    repeat: int = 10
    trace: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work, in the words of the command line."""
        for name in ("tokens", "processes", "heads_q", "heads_kv", "head_dim", "repeat"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.mask.replace("-", "_") not in WORKLOADS:
            raise ValueError(f"--mask {self.mask} is none of {', '.join(WORKLOADS)}")
        if self.tokens < LEAST_TOKENS:
            raise ValueError(
                f"--tokens {self.tokens} is too few for masks of several documents; take {LEAST_TOKENS} or more"
            )
        if self.tokens > MOST_ROWS:
            raise ValueError(f"--tokens must be at most {MOST_ROWS}, not {self.tokens}")
        for name in ("sm_margin", "warmup"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, not {value}")
        if self.heads_q % self.heads_kv:
            raise ValueError(f"--heads-q {self.heads_q} must be a multiple of --heads-kv {self.heads_kv}")
