# SPDX-License-Identifier: Apache-2.0
"""What arrangements of a rank's kernels cost on its machine, as far as they differ in it."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from magi_attention.kernels.protocol import Direction
from magi_attention.plan.rates import BACKWARD_OVER_FORWARD_FLOP, LayerShape, Rates

BYTES_MERGED = {"forward": 8, "backward": 16}
"""What another kernel on the same queries costs, as memory traffic for one number of q: forward it reads q again, and
an out is written and read once more; backward it reads q, out and dout again and writes a partial dq by way of float32,
which is added."""

BYTES_SUMMED = {"forward": 0, "backward": 24}
"""Likewise for one number of k or v whose gradients of two kernels are summed up in float32."""

KERNELS_OF_EXCHANGE = 6
"""So many latencies of kernels an exchange takes besides the transfer: to pack, to unpack, and between streams."""

LATENCIES_PER_CALL = {"forward": 3, "backward": 7}
"""Another kernel costs so many latencies of kernels: backward it is several, and ends are not filled."""

LATENCIES_PER_MERGE, LOSS_OF_WINDOW = 5, 0.1
"""A forward kernel that merges what the received rows add to early queries comes last, and is one of few blocks: of 415
queries it took an H200 80 microseconds longer than its work. Few early queries leave much of a GPU idle, too: so much
of their work's time is lost, as far as it is to hide the travel."""

LATENCIES_PER_CUT = 200
"""So many latencies it costs in all to compute in two kernels backward what one can, regular masks or not: a quarter of
a causal mask of 32k tokens, where regular masks should save 1.3 ms, took 0.5 ms longer in two regular kernels on an
H200, their sum not counted; of packed documents with twice as many pairs two were as fast."""

ROWS_OF_WAVE, ROWS_OF_TILE = 128 * 192, 128
"""A kernel needs so many rows of queries, those of all heads counted, to have a tile for nearly every multiprocessor of
a GPU of today. Fewer take as long. Runs of queries have multiples of a tile's rows."""

LEAST_LATENCIES = 100
"""Where a pass takes less than so many latencies of kernels, the host would not keep up with more of them."""


@dataclass(frozen=True)
class Costs:
    """Seconds of one pass, as far as arrangements differ in them.

    Attributes:
        pair: to compute a pair of a query and a key.
        fetched_row: for a key row to travel.
        exchange: latency of an exchange.
        merged_row: to merge a query row's results, and to read it once more.
        summed_row: to sum up the gradients of a key row of several kernels.
        call: what another kernel costs, apart from its work.
        merge: what a kernel costs besides that merges what received rows add to early queries.
        regular: what it costs where it makes masks regular; infinite where these save nothing.
        least_work: passes that take less are not cut into more kernels.
        window: early queries come in multiples of so many; None where a few of them don't pay.
    """

    pair: float
    fetched_row: float
    exchange: float
    merged_row: float
    summed_row: float
    call: float
    merge: float
    regular: float
    least_work: float
    window: int | None

    @classmethod
    def of_layer(cls, rates: Rates, shape: LayerShape, direction: Direction, *, ranks_share_node: bool) -> "Costs":
        """The costs of a layer's forward or backward pass at a machine's rates.

        Forward kernels gain nothing from regular masks. Backward ones have much to do before and after a block's few
        queries: of a full mask of 128k keys, 1,536 queries apart cost 8 ms more on an H200 than among 32k others.

        Args:
            rates: of the machine.
            shape: of the layer.
            direction: of the pass.
            ranks_share_node: whether all ranks are joined by NVLink.
        """
        is_forward = direction == "forward"
        link = rates.nvlink_gbs if ranks_share_node else rates.link_gbs
        packing = 4 / rates.memory_gbs  # read and written before it travels, and again after
        latency = rates.kernel_latency_us * 1e-6
        flop = shape.flop_per_pair * (1 if is_forward else BACKWARD_OVER_FORWARD_FLOP)
        rows_per_wave = -(-ROWS_OF_WAVE // (shape.heads_q * ROWS_OF_TILE)) * ROWS_OF_TILE
        return cls(
            pair=flop / ((rates.forward_tflops if is_forward else rates.backward_tflops) * 1e12),
            fetched_row=shape.bytes_per_row * (1 / link + packing) * 1e-9,
            exchange=(rates.exchange_latency_us + KERNELS_OF_EXCHANGE * rates.kernel_latency_us) * 1e-6,
            merged_row=shape.heads_q * shape.head_dim * BYTES_MERGED[direction] / (rates.memory_gbs * 1e9),
            summed_row=2 * shape.heads_kv * shape.head_dim * BYTES_SUMMED[direction] / (rates.memory_gbs * 1e9),
            call=LATENCIES_PER_CALL[direction] * latency,
            merge=LATENCIES_PER_MERGE * latency,
            regular=math.inf if is_forward else LATENCIES_PER_CUT * latency,
            least_work=LEAST_LATENCIES * latency,
            window=rows_per_wave if is_forward else None,
        )

    def is_short(self, pairs: int) -> bool:
        """Whether the pass is too short over so many pairs to be cut, or for the host to be ahead."""
        return pairs * self.pair < self.least_work


class PassCosts(NamedTuple):
    """The costs of a layer's two passes."""

    forward: Costs
    backward: Costs

    @classmethod
    def of_layer(cls, rates: Rates, shape: LayerShape, *, ranks_share_node: bool) -> "PassCosts":
        """See :meth:`Costs.of_layer`."""
        forward, backward = (
            Costs.of_layer(rates, shape, direction, ranks_share_node=ranks_share_node)
            for direction in ("forward", "backward")
        )
        return cls(forward, backward)
