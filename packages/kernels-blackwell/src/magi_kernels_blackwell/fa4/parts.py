# SPDX-License-Identifier: Apache-2.0
"""A full mask's backward pass in parts: keys that somebody waits for first, some others while their gradients travel.

The others are keys of the last heads alone. Thread blocks that are computed at once share queries in the cache as long
as they are of one head, and each part begins with the first head again: with all other keys apart, a pass over 32k
tokens took 0.4 % more cycles. All parts add to one sum of dq, whose terms and whose way to dq are computed once.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from magi_attention.comm.protocol import RowsThere
from magi_attention.comm.streams import HIGHEST_PRIORITY, current_in_block
from magi_attention.common.intervals import subtract
from magi_attention.kernels.protocol import AttentionCall
from magi_kernels_blackwell.masks import PackedMask
from magi_kernels_blackwell.prepared import Begun, PreparedBackward

KEYS_OF_BLOCK = 128
BLOCKS_BESIDE_TRAVEL = 512
"""Thread blocks, of so many keys and a head each, that are left for the time of the travel: about 4 for each
multiprocessor, and more for over 128 dims, whose blocks are of fewer keys.

One that begins to travel waits for blocks to end.
"""

MOST_RUNS = 4

Run = tuple[int, int]
"""``(start, stop)``."""


class Extent(NamedTuple):
    """What of the keys and values a part is of; of the queries, all those of these heads."""

    heads: Run
    keys: Run

    def queries(self, group: int) -> Run:
        """The heads of queries, of which so many share one of keys."""
        return self.heads[0] * group, self.heads[1] * group


class PassTensors(NamedTuple):
    """The tensors of a backward pass, or views of those of a part.

    Attributes:
        dout, q, k, v, out: ``[rows, heads, dim]``.
        lse, dlse: ``[heads, rows]`` of queries.
        dq, dk, dv: gradients, to be written.
    """

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    dlse: Tensor | None
    dq: Tensor
    dk: Tensor
    dv: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All that have a row for each token, as kernels are given them."""
        return self[:5]

    @property
    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of q, k and v."""
        return self.dq, self.dk, self.dv

    def part(self, extent: Extent) -> "PassTensors":
        """Views of a part's rows and heads."""
        first, end = extent.queries(self.q.shape[1] // self.k.shape[1])
        (head, end_head), (start, stop) = extent

        def of_queries(x: Tensor) -> Tensor:
            return x.narrow(1, first, end - first)

        def of_keys(x: Tensor) -> Tensor:
            return x.narrow(0, start, stop - start).narrow(1, head, end_head - head)

        def of_rows(x: Tensor) -> Tensor:
            return x.narrow(0, first, end - first)

        return PassTensors(
            dout=of_queries(self.dout),
            q=of_queries(self.q),
            k=of_keys(self.k),
            v=of_keys(self.v),
            out=of_queries(self.out),
            lse=of_rows(self.lse),
            dlse=None if self.dlse is None else of_rows(self.dlse),
            dq=of_queries(self.dq),
            dk=of_keys(self.dk),
            dv=of_keys(self.dv),
        )


class Order(NamedTuple):
    """The parts of a pass: with all keys that somebody waits for, and the others."""

    awaited: list[Extent]
    others: list[Extent]


class Part(NamedTuple):
    """The kernels for a pass or a part of it, with tensors as they take them."""

    prepared: PreparedBackward
    tensors: PassTensors


def order_of_parts(packed: PackedMask | None, call: AttentionCall, heads: tuple[int, int], num_k: int) -> Order | None:
    """The parts of a backward pass; None where it is better computed at once. Found once and kept with the slices.

    That is where nobody waits, where sums have an order, where there is little to compute, and for all masks but full
    ones: of these any keys may come first, as all take equally long.

    Args:
        packed: the mask as documents, None for others.
        call: what is to be computed.
        heads: of queries, and of keys.
        num_k: keys.
    """

    def find() -> Order | None:
        is_full = packed is not None and packed.num_documents == 1 and packed.left is None and packed.right is None
        if not call.first_keys or call.deterministic or not is_full:
            return None
        others = [(first, end) for first, end in subtract(np.array([(0, num_k)]), np.array(call.first_keys)).tolist()]
        if not others or len(others) + len(call.first_keys) > MOST_RUNS:
            return None
        (heads_q, heads_k), num_blocks = heads, sum(-(-(end - first) // KEYS_OF_BLOCK) for first, end in others)
        num_last = -(-BLOCKS_BESIDE_TRAVEL // (num_blocks * (heads_q // heads_k)))
        if num_last > heads_k:
            return None
        last = heads_k - num_last, heads_k
        at_once = [Extent((0, last[0]), (0, num_k))] if last[0] else []
        return Order([*at_once, *(Extent(last, run) for run in call.first_keys)], [Extent(last, run) for run in others])

    return call.slices.derived(("order of parts", call.first_keys, call.deterministic, heads, num_k), find)


def launch_parts(
    whole: Part,
    order: Order,
    prepare: Callable[[Extent], Part],
    scale: float,
    keys_done: Callable[[RowsThere], object],
) -> None:
    """Launch all parts of a backward pass.

    Args:
        whole: all of it, of which only what comes before and after the parts is launched.
        order: the parts.
        prepare: finds the kernels for one.
        scale: of the softmax.
        keys_done: called once all gradients of keys and values are launched, before what is left to do for dq, with
            what lets a stream wait for those of the awaited parts.
    """
    prepared, tensors = whole
    group = tensors.q.shape[-2] // tensors.k.shape[-2]
    begun = prepared.begin(tensors.inputs, tensors.lse, tensors.dlse, tensors.dq)

    def with_sums(extent: Extent) -> tuple[Extent, Part, Sequence[Tensor]]:
        part = prepare(extent)
        return extent, part, part.prepared.sums_of_keys(tensors.lse, part.tensors.gradients[1:])

    def compute(parts: Sequence[tuple[Extent, Part, Sequence[Tensor]]]) -> None:
        for extent, part, sums in parts:
            first, end = extent.queries(group)
            of_heads = Begun(*(x.narrow(1, first, end - first) for x in begun))
            part.prepared.compute(part.tensors.inputs, of_heads, sums, scale)
        for _, part, sums in parts:
            part.prepared.round_keys(sums, part.tensors.gradients[1:], scale)

    # Sums begin as zeros before anything is ahead: beside such kernels, these would wait for them.
    awaited, others = ([*map(with_sums, kind)] for kind in order)
    keys_done(launch_ahead(begun.lse2.device, partial(compute, awaited), partial(compute, others)))
    prepared.round_queries(begun, tensors.dq, scale)


def launch_ahead(device: torch.device, awaited: Callable[[], None], others: Callable[[], None]) -> RowsThere:
    """Launch what somebody waits for on a stream of higher priority, and others beside it on the current one.

    Multiprocessors that are done with the first take the others at once, and none is idle between them. A transfer by
    a kernel that waits for the first, on a stream of that priority, is given some before all others are computed.

    Args:
        device: a GPU. Its current stream waits for both.
        awaited: launches kernels on the current stream.
        others: likewise.

    Returns:
        What lets a stream wait for the first.
    """
    current = torch.cuda.current_stream(device)
    ahead = _stream_ahead(device, current.cuda_stream)
    ahead.wait_stream(current)
    try:
        with current_in_block(ahead, current):
            awaited()
        are_there = ahead.record_event()
        others()
    except BaseException:
        current.wait_stream(ahead)  # what was launched before the error uses tensors that may go now
        raise
    current.wait_event(are_there)
    return lambda stream: stream.wait_event(are_there)


@cache
def _stream_ahead(device: torch.device, current: int) -> torch.cuda.Stream:
    """The stream ahead of another one, of which nothing else waits for the other; captured with it, if it is."""
    return torch.cuda.Stream(device, priority=HIGHEST_PRIORITY)
