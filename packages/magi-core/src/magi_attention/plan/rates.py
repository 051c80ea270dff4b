# SPDX-License-Identifier: Apache-2.0
"""What machines do per second, and what an attention layer asks of them: the numbers behind every predicted time."""

import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, fields
from typing import NamedTuple, Self

TILE = 128
"""Queries and keys of a kernel's tile: a tile of which the mask keeps any pair is computed as a whole."""

MERGE_BYTES = 10
"""Memory traffic to merge one number of a partial result: read in bf16, the float32 sum read and written."""

LSE_BYTES = 4
"""A row's log-sum-exp, and its term of the gradients, are float32 numbers, one per head."""

BACKWARD_OVER_FORWARD_FLOP = 2.5

EARLY_SHARES = (1.0, 0.0, 0.125, 0.25, 0.5)
"""Shares of a rank's queries that the runtime may compute with own rows before the first received ones come: all of
them, none or some; see :mod:`magi_attention.runtime.schedule`."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of one rank's device and links, each way. The defaults are round numbers for H100 in bf16.

    Attributes:
        link_gbs: what one rank can send, and receive, from other nodes, in GB/s.
        nvlink_gbs: the same within its node.
        forward_tflops: rate of the forward kernel on full tiles, in Tflop/s.
        backward_tflops: rate of the backward kernel.
        memory_gbs: rate of the device's memory, in GB/s.
        exchange_latency_us: time that an exchange takes however few rows travel, in microseconds.
        kernel_latency_us: time that a kernel takes however few pairs it computes.
    """

    link_gbs: float = 50.0
    nvlink_gbs: float = 400.0
    forward_tflops: float = 600.0
    backward_tflops: float = 500.0
    memory_gbs: float = 3000.0
    exchange_latency_us: float = 20.0
    kernel_latency_us: float = 10.0

    def __post_init__(self) -> None:
        for field, value in zip(fields(self), astuple(self), strict=True):
            if not 0 <= value < math.inf or (value == 0 and "latency" not in field.name):
                raise ValueError(f"{field.name} must be positive, not {value}")

    def to_json(self) -> dict[str, float]:
        """The fields by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, entries: object) -> Self:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: ``entries`` isn't a mapping of exactly the fields to positive numbers; says what is wrong.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(entries, Mapping) or set(entries) != names:
            found = sorted(map(str, entries)) if isinstance(entries, Mapping) else repr(entries)
            raise ValueError(f"rates must have the entries {', '.join(sorted(names))}, not {found}")
        for name, value in entries.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number, not {value!r}")
        return cls(**entries)


@dataclass(frozen=True, kw_only=True)
class Cluster(Rates):
    """The rates of all ranks, and who shares a node.

    Attributes:
        ranks_per_node: neighboring ranks that NVLink joins.
    """

    ranks_per_node: int = 8

    @classmethod
    def of_nodes(cls, rates: Rates, ranks_per_node: int) -> Self:
        """Nodes of so many ranks of the given rates."""
        return cls(**rates.to_json(), ranks_per_node=ranks_per_node)


class RowBytes(NamedTuple):
    """Bytes of one row that go out and come home in either pass."""

    out_forward: int
    home_forward: int
    out_backward: int
    home_backward: int


@dataclass(frozen=True)
class LayerShape:
    """The heads of an attention layer.

    Attributes:
        heads_q: query heads.
        heads_kv: key/value heads; must divide ``heads_q``.
        head_dim: size of a head.
        bytes_per_number: of what travels; 2 for bf16.
    """

    heads_q: int = 32
    heads_kv: int = 8
    head_dim: int = 128
    bytes_per_number: int = 2

    def __post_init__(self) -> None:
        for field, value in zip(fields(self), astuple(self), strict=True):
            if value < 1:
                raise ValueError(f"{field.name} must be at least 1, not {value}")
        if self.heads_q % self.heads_kv:
            raise ValueError(f"heads_q must be a multiple of heads_kv={self.heads_kv}, not {self.heads_q}")

    @property
    def flop_per_pair(self) -> int:
        """Floating-point operations per (query, key) pair, forward, all heads."""
        return 4 * self.heads_q * self.head_dim

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one token's keys and values, or of their gradients."""
        return 2 * self.heads_kv * self.head_dim * self.bytes_per_number

    @property
    def bytes_of_key_row(self) -> RowBytes:
        """What travels where keys and values do: they in both passes, and their gradients in the second."""
        return RowBytes(self.bytes_per_row, 0, self.bytes_per_row, self.bytes_per_row)

    @property
    def bytes_of_query_row(self) -> RowBytes:
        """What travels where queries do: q and out with lse; q, dout, lse and a row's term, and dq."""
        vector, number = self.heads_q * self.head_dim * self.bytes_per_number, self.heads_q * LSE_BYTES
        return RowBytes(vector, vector + number, 2 * vector + 2 * number, vector)


DEFAULT_RATES: dict[str, Rates] = {
    "B200": Rates(link_gbs=50.0, nvlink_gbs=700.0, forward_tflops=1200.0, backward_tflops=950.0, memory_gbs=6500.0),
    "H200": Rates(memory_gbs=4000.0),
    "H100": Rates(),
    "A100": Rates(link_gbs=25.0, nvlink_gbs=240.0, forward_tflops=200.0, backward_tflops=160.0, memory_gbs=1600.0),
    "cpu": Rates(
        link_gbs=1.0,
        nvlink_gbs=1.0,
        forward_tflops=0.02,
        backward_tflops=0.02,
        memory_gbs=5.0,
        exchange_latency_us=500.0,
        kernel_latency_us=500.0,
    ),
}
"""Round numbers by a part of the device's name: kernels in bf16 and NCCL; for CPUs float32 on one core and gloo."""


def default_rates(device_name: str) -> Rates:
    """The round numbers for a device, as ``torch.cuda.get_device_name`` or ``"cpu"`` names it; else those for H100."""
    return next((rates for name, rates in DEFAULT_RATES.items() if name in device_name), Rates())
