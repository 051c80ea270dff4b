# SPDX-License-Identifier: Apache-2.0
"""Measure what a machine reaches: kernels, memory and links, by what attention itself calls.

Clocks run on the host around a few calls and a synchronization, and the shortest of several such times counts: what a
call costs on top of its work, launching it included, is part of the latencies.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.comm.protocol import GroupCollectives
from magi_attention.common.slices import SliceTable
from magi_attention.kernels.merge import merge_into
from magi_attention.kernels.protocol import AttentionCall
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange, exchange_of_stage, two_hop_exchange
from magi_attention.plan.layout import Layout
from magi_attention.plan.rates import BACKWARD_OVER_FORWARD_FLOP, MERGE_BYTES
from magi_attention.runtime.machine import Layer

NUM_BATCHES, CALLS_PER_BATCH = 5, 2

FEW_TOKENS = 16
"""So few that a kernel takes its latency."""

FIRST_TOKENS = {"cpu": 128, "cuda": 1024}
ENOUGH_SECONDS = {"cpu": 0.02, "cuda": 0.004}
MOST_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Kernels are measured on twice as many tokens until they take ``ENOUGH_SECONDS``, or q has ``MOST_NUMBERS``."""

BYTES_RECEIVED = {"cpu": 1 << 20, "cuda": 1 << 26}
MOST_PEERS = 8
"""What a rank receives, and from how many ranks at most, to measure links."""


@dataclass(frozen=True)
class KernelTimes:
    """Kernels and memory; fields as in :class:`magi_attention.plan.rates.Rates`."""

    forward_tflops: float
    backward_tflops: float
    memory_gbs: float
    kernel_latency_us: float


@dataclass(frozen=True)
class LinkTimes:
    """Links, and the latency of the slower kind; None where the group has no ranks to measure between."""

    link_gbs: float | None
    nvlink_gbs: float | None
    exchange_latency_us: float


@torch.no_grad()
def measure_kernels(layer: Layer) -> KernelTimes:
    """Measure the layer's kernels on a full mask, and a merge of two partial results. Needs no other rank."""
    heads, dim = layer.shape.heads_q, layer.shape.head_dim
    few = [_seconds(call, layer.device) for call in _passes(layer, FEW_TOKENS)]
    num_tokens = FIRST_TOKENS[layer.device.type]
    while True:
        forward, backward = _passes(layer, num_tokens)
        seconds = _seconds(forward, layer.device)
        more = 2 * num_tokens
        if seconds >= ENOUGH_SECONDS[layer.device.type] or more * heads * dim > MOST_NUMBERS[layer.device.type]:
            break
        num_tokens = more
    flop = layer.shape.flop_per_pair * num_tokens**2
    several = (seconds, _seconds(backward, layer.device))
    lse, partial_lse = (torch.zeros(num_tokens, heads, device=layer.device) for _ in range(2))
    partial_out = torch.zeros(num_tokens, heads, dim, dtype=layer.dtype, device=layer.device)
    merge = _seconds(partial(merge_into, partial_out.float(), lse, partial_out, partial_lse), layer.device)
    return KernelTimes(
        forward_tflops=_rate(flop, several[0], few[0]) / 1e12,
        backward_tflops=_rate(flop * BACKWARD_OVER_FORWARD_FLOP, several[1], few[1]) / 1e12,
        memory_gbs=MERGE_BYTES * partial_out.numel() / merge / 1e9,
        kernel_latency_us=sum(few) / len(few) * 1e6,
    )


def _passes(layer: Layer, num_tokens: int) -> list[Callable[[], object]]:
    """The forward and the backward kernel on a full mask of so many queries and keys."""
    # Zeros would flatter a GPU, which then draws less power; the generator of the training stays as it is.
    generator = torch.Generator(layer.device).manual_seed(0)

    def draw(heads: int) -> Tensor:
        shape = (num_tokens, heads, layer.shape.head_dim)
        return torch.randn(shape, generator=generator, dtype=layer.dtype, device=layer.device)

    q, k, v, dout = (draw(heads) for heads in (layer.shape.heads_q, *2 * [layer.shape.heads_kv], layer.shape.heads_q))
    call = AttentionCall(SliceTable([[0, num_tokens, 0, num_tokens, 0]]), layer.shape.head_dim**-0.5)
    out, lse, _ = layer.backends.forward.forward(q, k, v, call)
    return [
        partial(layer.backends.forward.forward, q, k, v, call),
        partial(layer.backends.backward.backward, dout, q, k, v, out.to(layer.dtype), lse, None, call),
    ]


@torch.no_grad()
def measure_links(
    layer: Layer,
    collectives: GroupCollectives,
    rank: int,
    num_ranks: int,
    ranks_per_node: int,
    mesh_shape: tuple[int, int] | None = None,
) -> LinkTimes:
    """Measure the links between the ranks of a group, all of which must call this.

    Args:
        layer: whose keys and values travel.
        collectives: how.
        rank: this rank.
        num_ranks: of the group, at least 2.
        ranks_per_node: neighboring ranks that share a node.
        mesh_shape: ``(nodes, ranks per node)`` for exchanges in two hops; None for direct ones.
    """
    everyone = np.arange(num_ranks)
    node, place = everyone // ranks_per_node, everyone % ranks_per_node
    within = [
        np.column_stack([everyone, node * ranks_per_node + (place + step) % ranks_per_node])
        for step in range(1, min(ranks_per_node - 1, MOST_PEERS) + 1)
    ]
    across = [
        np.column_stack([everyone, (everyone + step * ranks_per_node) % num_ranks])
        for step in range(1, min(num_ranks // ranks_per_node - 1, MOST_PEERS) + 1)
    ]

    def exchange_seconds(pairs: NDArray[np.int64], rows: int) -> float:
        owned = Layout(num_ranks * rows, num_ranks * rows, rows, num_ranks, everyone)
        pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
        remote = np.column_stack([pairs[:, 0], pairs[:, 1] * rows, (pairs[:, 1] + 1) * rows])
        table: ExchangeTable | TwoHopExchange
        if mesh_shape is None:
            table = exchange_of_stage(remote, owned, rank)
        else:
            table = two_hop_exchange(remote, owned, rank, mesh_shape)
        shape = (rows, layer.shape.heads_kv, layer.shape.head_dim)
        keys, values = (torch.zeros(shape, dtype=layer.dtype, device=layer.device) for _ in range(2))
        return _seconds(lambda: collectives.cast([keys, values], table).wait(), layer.device)

    rates: list[float | None] = []
    latency = 0.0
    for pairs in (np.concatenate(steps) if steps else None for steps in (within, across)):
        if pairs is None:
            rates.append(None)
            continue
        num_peers = len(pairs) // num_ranks
        rows = -(-BYTES_RECEIVED[layer.device.type] // (layer.shape.bytes_per_row * num_peers))
        latency = exchange_seconds(pairs, 1)
        rates.append(_rate(rows * num_peers * layer.shape.bytes_per_row, exchange_seconds(pairs, rows), latency) / 1e9)
    return LinkTimes(nvlink_gbs=rates[0], link_gbs=rates[1], exchange_latency_us=latency * 1e6)


def _rate(amount: float, seconds: float, latency: float) -> float:
    """Amount per second beyond the latency, which noise must not make longer than the whole."""
    return amount / max(seconds - latency, 0.1 * seconds)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The time of one call, the first of which (compiling, allocating) doesn't count."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    call()
    wait()
    shortest = float("inf")
    for _ in range(NUM_BATCHES):
        start = time.perf_counter()
        for _ in range(CALLS_PER_BATCH):
            call()
        wait()
        shortest = min(shortest, (time.perf_counter() - start) / CALLS_PER_BATCH)
    return shortest
