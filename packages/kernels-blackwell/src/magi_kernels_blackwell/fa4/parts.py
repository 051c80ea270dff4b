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

    def of(
        self,
        heads: tuple[int, int],
        tensors: Sequence[Tensor],
        lse: Tensor,
        dlse: Tensor | None,
        gradients: Sequence[Tensor],
    ) -> tuple[Sequence[Tensor], Tensor, Tensor | None, Sequence[Tensor], Run]:
        """Views of a pass's tensors.

        Args:
            heads: how many queries have, and keys.
            tensors: dout, q, k, v and out, ``[rows, heads, dim]``.
            lse, dlse: ``[heads, rows]`` of queries.
            gradients: dq, dk and dv.

        Returns:
            The same in this order, and the heads of queries.
        """
        group = heads[0] // heads[1]
        first, end = queries = self.heads[0] * group, self.heads[1] * group
        (head, end_head), (start, stop) = self

        def of_queries(*given: Tensor) -> list[Tensor]:
            return [x.narrow(1, first, end - first) for x in given]

        def of_keys(*given: Tensor) -> list[Tensor]:
            return [x.narrow(0, start, stop - start).narrow(1, head, end_head - head) for x in given]

        (dout, q, k, v, out), (dq, dk, dv) = tensors, gradients
        some_lse, some_dlse = (None if x is None else x.narrow(0, first, end - first) for x in (lse, dlse))
        assert some_lse is not None
        views = [*of_queries(dout, q), *of_keys(k, v), *of_queries(out)]
        return views, some_lse, some_dlse, [*of_queries(dq), *of_keys(dk, dv)], queries


class Order(NamedTuple):
    """The parts of a pass: with all keys that somebody waits for, and the others."""

    awaited: list[Extent]
    others: list[Extent]


class Part(NamedTuple):
    """The kernels for a part, with tensors as they take them.

    Attributes:
        prepared: the kernels.
        queries: the heads of q.
        tensors: dout, q, k, v and out.
        gradients: dq, dk and dv, to be written.
    """

    prepared: PreparedBackward
    queries: Run
    tensors: Sequence[Tensor]
    gradients: Sequence[Tensor]


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
    awaited: Sequence[Part],
    others: Sequence[Part],
    lse: Tensor,
    dlse: Tensor | None,
    scale: float,
    keys_done: Callable[[RowsThere], object],
) -> None:
    """Launch all parts of a backward pass.

    Args:
        whole: all of it, of which only what comes before and after the parts is launched.
        awaited: parts with all keys that somebody waits for.
        others: the rest.
        lse, dlse: as the kernels take them.
        scale: of the softmax.
        keys_done: called once all gradients of keys and values are launched, before what is left to do for dq, with
            what lets a stream wait for those of ``awaited``.
    """
    dq = whole.gradients[0]
    begun = whole.prepared.begin(whole.tensors, lse, dlse, dq)
    # Zeros come first: beside the kernels that are ahead, they would wait for these.
    sums = [[part.prepared.sums_of_keys(lse, part.gradients[1:]) for part in kind] for kind in (awaited, others)]

    def compute(parts: Sequence[Part], sums: Sequence[Sequence[Tensor]]) -> None:
        for part, totals in zip(parts, sums, strict=True):
            first, end = part.queries
            of_heads = Begun(*(x.narrow(1, first, end - first) for x in begun))
            part.prepared.compute(part.tensors, of_heads, totals, scale)
        for part, totals in zip(parts, sums, strict=True):
            part.prepared.round_keys(totals, part.gradients[1:], scale)

    launches = (partial(compute, *each) for each in zip((awaited, others), sums, strict=True))
    keys_done(launch_ahead(lse.device, *launches))
    whole.prepared.round_queries(begun, dq, scale)


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
