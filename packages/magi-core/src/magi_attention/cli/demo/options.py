# SPDX-License-Identifier: Apache-2.0
"""What the user of ``magi demo`` can choose; light to import, since the help text needs it."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class MaskFamily(StrEnum):
    """How the documents of one packed sequence may look at each other and at themselves."""

    VARLEN_CAUSAL = "varlen-causal"
    CAUSAL = "causal"
    SLIDING_WINDOW = "sliding-window"
    BLOCK_CAUSAL = "block-causal"
    PREFIX_LM = "prefix-lm"
    SHARED_QUESTION = "shared-question"


class Device(StrEnum):
    """Where to train; ``auto`` takes the GPUs if there is one for every process."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    """The numbers to compute with. The two short ones hold for the attention alone; all else is then float32."""

    FP64 = "fp64"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def tolerance(self) -> float:
        """The relative difference that the losses of the two runs may have."""
        return {"fp64": 1e-10, "fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}[self.value]


HEAD_DIM = 32
"""A head's share of the model's width, where that is open; small, for CPUs."""


@dataclass(frozen=True)
class DemoOptions:
    """All choices of one demo, checked.

    Attributes:
        processes: ranks of the context-parallel run.
        steps: optimizer steps of each run.
        mask: family of masks.
        tokens: length of the packed sequence.
        backend: kernel backend, or ``"auto"``.
        device: where to train.
        precision: what to compute with.
        overlap_degree: remote stages of each attention; None for automatic.
        uneven: whether ranks may hold unequal numbers of tokens, instead of padding.
        seed: for the weights and for the packing.
        layers: blocks of the model.
        heads: query heads.
        kv_heads: key/value heads.
        dim: width of the residual stream.
        files: text files to train on; empty for the texts that come with Python.
    """

    processes: int = 4
    steps: int = 20
    mask: MaskFamily = MaskFamily.VARLEN_CAUSAL
    tokens: int = 8192
    backend: str = "auto"
    device: Device = Device.AUTO
    precision: Precision = Precision.FP32
    overlap_degree: int | None = 2
    uneven: bool = False
    seed: int = 0
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    dim: int = 4 * HEAD_DIM
    files: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot work, in the words of the command line."""
        for name in ("processes", "steps", "layers", "heads", "kv_heads", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.seed >= 2**63:
            raise ValueError(f"--seed must be less than 2**63, not {self.seed}")
        if self.tokens < 16 * self.processes:
            raise ValueError(
                f"--tokens {self.tokens} is too few for {self.processes} processes; take {16 * self.processes} or more"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"--heads {self.heads} must be a multiple of --kv-heads {self.kv_heads}")
        if self.dim % (8 * self.heads):
            raise ValueError(
                f"--dim {self.dim} must be a multiple of 8 * heads = {8 * self.heads}: a head's size is a multiple of 8"
            )
