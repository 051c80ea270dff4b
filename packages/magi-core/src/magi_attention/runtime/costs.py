# SPDX-License-Identifier: Apache-2.0
"""What arrangements of a rank's kernels cost on its machine, as far as they differ in it."""

import math
from dataclasses import dataclass

from magi_attention.plan.rates import LayerShape, Rates

BYTES_PER_MERGED_NUMBER, BYTES_MERGED_FORWARD = 24, 8
"""What another kernel on the same queries costs in both passes, as memory traffic for one number of q: it reads q, out
and dout again, writes a partial out and dq, the latter by way of float32, and both are merged. Forward alone it reads
q again, and an out is written and read once more."""

BYTES_PER_SUMMED_NUMBER = 24
"""Likewise for one number of k or v whose gradients of two kernels are summed up in float32."""

KERNELS_OF_EXCHANGE = 4
"""Kernels that pack and unpack, before and after the transfer of keys and of values."""

LATENCIES_PER_CALL, LATENCIES_FORWARD = 10, 3
"""Another kernel costs so many latencies of kernels in both passes, and in a forward pass alone: backward it is
several, and ends are not filled."""

LATENCIES_PER_CUT = 200
"""So many latencies it costs in all to compute in two kernels backward what one can, regular masks or not: a quarter of
a causal mask of 32k tokens, where regular masks should save 1.3 ms, took 0.5 ms longer in two regular kernels on an
H200, their sum not counted; of packed documents with twice as many pairs two were as fast."""

ROWS_OF_WAVE, ROWS_OF_TILE = 128 * 192, 128
"""A kernel needs so many rows of queries, those of all heads counted, to have a tile for nearly every multiprocessor of
a GPU of today. Fewer take as long. Runs of queries have multiples of a tile's rows."""

LEAST_LATENCIES = 150
"""Where a forward pass takes less than so many latencies of kernels, the host would not keep up with more of them."""


@dataclass(frozen=True)
class Costs:
    """Seconds, as far as arrangements differ in them.

    Attributes:
        pair: to compute a pair of a query and a key, forward; backward it takes at least twice as long.
        fetched_row: for a key row to travel.
        exchange: latency of an exchange.
        merged_row: to merge a query row's results in the arranged passes, and to read it once more.
        summed_row: to sum up the gradients of a key row of several kernels.
        call: what another kernel costs in the arranged passes, apart from its work.
        regular: what it costs where it makes masks regular; infinite where these save nothing.
        cut: what it costs in a backward pass that has all rows from the start.
        least_work: forward passes that take less are not cut into more kernels.
        window: early queries come in multiples of so many.
        fetches_again: whether the backward pass is arranged as the forward pass, and fetches all rows again; else it
            has them from the start.
    """

    pair: float
    fetched_row: float
    exchange: float
    merged_row: float
    summed_row: float
    call: float
    regular: float
    cut: float
    least_work: float
    window: int
    fetches_again: bool

    @classmethod
    def of_layer(cls, rates: Rates, shape: LayerShape, ranks_share_node: bool, *, keeps_received: bool) -> "Costs":
        """The costs of a layer at a machine's rates.

        Args:
            rates: of the machine.
            shape: of the layer.
            ranks_share_node: whether all ranks are joined by NVLink.
            keeps_received: whether the backward pass has what the forward pass received. Then only the forward pass is
                arranged by these costs, whose kernels gain nothing from regular masks.
        """
        link = rates.nvlink_gbs if ranks_share_node else rates.link_gbs
        packing = 4 / rates.memory_gbs  # read and written before it travels, and again after
        latency = rates.kernel_latency_us * 1e-6
        call = (LATENCIES_FORWARD if keeps_received else LATENCIES_PER_CALL) * latency
        merged_bytes = BYTES_MERGED_FORWARD if keeps_received else BYTES_PER_MERGED_NUMBER
        summed_bytes = 0 if keeps_received else BYTES_PER_SUMMED_NUMBER
        return cls(
            pair=shape.flop_per_pair / (rates.forward_tflops * 1e12),
            fetched_row=shape.bytes_per_row * (1 / link + packing) * 1e-9,
            exchange=(rates.exchange_latency_us + KERNELS_OF_EXCHANGE * rates.kernel_latency_us) * 1e-6,
            merged_row=shape.heads_q * shape.head_dim * merged_bytes / (rates.memory_gbs * 1e9),
            summed_row=2 * shape.heads_kv * shape.head_dim * summed_bytes / (rates.memory_gbs * 1e9),
            call=call,
            regular=math.inf if keeps_received else call,
            cut=LATENCIES_PER_CUT * latency,
            least_work=LEAST_LATENCIES * latency,
            window=-(-ROWS_OF_WAVE // (shape.heads_q * ROWS_OF_TILE)) * ROWS_OF_TILE,
            fetches_again=not keeps_received,
        )

    def is_short(self, pairs: int) -> bool:
        """Whether a forward pass over so many pairs is too short to be cut, or for the host to be ahead."""
        return pairs * self.pair < self.least_work
