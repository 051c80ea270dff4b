# SPDX-License-Identifier: Apache-2.0
"""The plan: all that one rank needs to compute its share of an attention, from the mask alone."""

from dataclasses import dataclass

from magi_attention.common.slices import SliceTable
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange
from magi_attention.plan.layout import Layout


@dataclass(frozen=True, eq=False)
class Stage:
    """One kernel call of a rank.

    Its key buffer is the rank's own rows, if ``reads_own``, followed by the rows received by ``exchange``, if any.

    Attributes:
        slices: (local query rows, rows of the key buffer).
        reads_own: whether the key buffer starts with the rank's own rows.
        exchange: how the other rows of the key buffer come; None where no rank of the group receives any.
    """

    slices: SliceTable
    reads_own: bool
    exchange: ExchangeTable | TwoHopExchange | None


@dataclass(frozen=True, eq=False)
class Plan:
    """What one rank computes and exchanges. Stage 0 reads its own rows; every rank has the same number of stages.

    Attributes:
        layout: who owns which rows, equal on all ranks.
        rank: this rank.
        stages: in the order of their computation.
        digest: 32 bytes over mask, layout and options: equal on ranks that planned the same.
    """

    layout: Layout
    rank: int
    stages: tuple[Stage, ...]
    digest: bytes
