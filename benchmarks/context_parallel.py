# SPDX-License-Identifier: Apache-2.0
"""Context parallelism as others do it, on our kernels: all-gather of keys and values, and a ring.

Masks are exact for any slices: what differs is who holds which rows, and how they travel. Rows are dealt *contiguous*
(rank r holds the r-th share) or *zigzag* (the r-th chunk from the front and the r-th from the back, which balances a
causal mask).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.merge import merge_into
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, AttentionResult
from magi_attention.kernels.registry import backends_for_slices

Deal = Literal["contiguous", "zigzag"]
Runs = list[tuple[int, int]]

# torch 2.13 renamed these two and warns at every call by the older names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def runs_of(rank: int, num_ranks: int, tokens: int, deal: Deal) -> Runs:
    """The global rows that a rank holds, in its order; ``tokens`` must be a multiple of twice the ranks."""
    if tokens % (2 * num_ranks):
        raise ValueError(f"{tokens} tokens can't be dealt evenly to {num_ranks} ranks in two chunks each")
    half = tokens // (2 * num_ranks)
    if deal == "contiguous":
        return [(2 * rank * half, 2 * (rank + 1) * half)]
    return [(chunk * half, (chunk + 1) * half) for chunk in (rank, 2 * num_ranks - 1 - rank)]


def restrict(slices: SliceTable, queries: Runs, keys: Runs) -> SliceTable:
    """The part of a mask between the rows of two buffers, in their numbering."""
    parts, row = [], 0
    for q0, q1 in queries:
        mine, column = slices.clip_rows(q0, q1), 0
        for k0, k1 in keys:
            parts.append(mine.clip_columns(k0, k1).shift(row - q0, column - k0).rows)
            column += k1 - k0
        row += q1 - q0
    return SliceTable(np.concatenate(parts))


class Kernel:
    """The attention kernel of one device, for one head shape."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> None:
        self.request, self.backend = AttentionRequest.of_tensors(q, k, v), backend
        self.scale = q.shape[-1] ** -0.5

    def forward(self, q: Tensor, k: Tensor, v: Tensor, slices: SliceTable) -> AttentionResult:
        """Attend q to k and v."""
        backend = backends_for_slices(slices, self.request, self.backend).forward
        return backend.forward(q, k, v, AttentionCall(slices, self.scale))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, result: AttentionResult, slices: SliceTable
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiate by q, k and v, given the final result."""
        backend = backends_for_slices(slices, self.request, self.backend).backward
        return backend.backward(dout, q, k, v, result.out, result.lse, None, AttentionCall(slices, self.scale))


class Saved(NamedTuple):
    """What a forward pass leaves for the backward pass.

    Attributes:
        q: the rank's queries.
        k, v: its keys and values, or those of all ranks.
        result: the output and its log-sum-exp.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    result: AttentionResult


class SingleDevice:
    """The kernel alone, without any communication."""

    def __init__(self, kernel: Kernel, slices: SliceTable) -> None:
        self.kernel, self.slices = kernel, slices

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Saved:
        """Return the output, with what the backward pass needs."""
        return Saved(q, k, v, self.kernel.forward(q, k, v, self.slices))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v."""
        return self.kernel.backward(dout, *saved, self.slices)


class AllGather:
    """Every rank gathers all keys and values; their gradients are reduced and scattered.

    The gathered rows are kept for the backward pass, which costs memory but no time. Gradients travel in the inputs'
    dtype.
    """

    def __init__(self, kernel: Kernel, slices: SliceTable, tokens: int, deal: Deal) -> None:
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        self.kernel = kernel
        self.runs = runs_of(rank, num_ranks, tokens, deal)
        everything = [run for each in range(num_ranks) for run in runs_of(each, num_ranks, tokens, deal)]
        self.slices = restrict(slices, self.runs, everything if deal == "zigzag" else [(0, tokens)])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Saved:
        """Return the rank's output, with what the backward pass needs."""
        whole = [x.new_empty((len(x) * dist.get_world_size(), *x.shape[1:])) for x in (k, v)]
        works = [_all_gather(all_rows, own, async_op=True) for all_rows, own in zip(whole, (k, v), strict=True)]
        for work in works:
            work.wait()
        keys, values = whole
        return Saved(q, keys, values, self.kernel.forward(q, keys, values, self.slices))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of the rank's q, k and v."""
        q, k, v, result = saved
        dq, *partials = self.kernel.backward(dout, q, k, v, result, self.slices)
        partials = [partial.to(x.dtype) for partial, x in zip(partials, (k, v), strict=True)]
        mine = [x.new_empty((len(x) // dist.get_world_size(), *x.shape[1:])) for x in partials]
        works = [_reduce_scatter(own, x, async_op=True) for own, x in zip(mine, partials, strict=True)]
        for work in works:
            work.wait()
        return dq, mine[0], mine[1]


class Ring:
    """Keys and values go round a ring of zigzag shards; while one rank's are computed, the next rank's arrive.

    Partial outputs are merged by log-sum-exp. In the backward pass gradients of keys and values follow their rows round
    the ring, in float32, and take one more step home.
    """

    def __init__(self, kernel: Kernel, slices: SliceTable, tokens: int) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.kernel = kernel
        self.runs = runs_of(self.rank, self.num_ranks, tokens, "zigzag")
        owners = [(self.rank - step) % self.num_ranks for step in range(self.num_ranks)]
        self.steps = [restrict(slices, self.runs, runs_of(owner, self.num_ranks, tokens, "zigzag")) for owner in owners]

    def _pass_on(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[dist.Work]]:
        """Send tensors to the next rank and receive the previous one's of the same shapes."""
        received = [torch.empty_like(x) for x in tensors]
        following, previous = (self.rank + 1) % self.num_ranks, (self.rank - 1) % self.num_ranks
        sends = [dist.P2POp(dist.isend, x, following) for x in tensors]
        receives = [dist.P2POp(dist.irecv, x, previous) for x in received]
        return received, dist.batch_isend_irecv([*sends, *receives])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Saved:
        """Return the rank's output, with what the backward pass needs."""
        total: AttentionResult | None = None
        rows, coming = [k, v], [k, v]
        works: list[dist.Work] = []
        for step, slices in enumerate(self.steps):
            if step + 1 < self.num_ranks:
                coming, works = self._pass_on(rows)
            if len(slices):
                partial = self.kernel.forward(q, rows[0], rows[1], slices)
                if total is None:
                    total = AttentionResult(partial.out.float() if self.num_ranks > 2 else partial.out, partial.lse)
                else:
                    merge_into(total.out, total.lse, partial.out, partial.lse)
            for work in works:
                work.wait()
            rows, works = coming, []
        assert total is not None, "a rank whose queries see nothing"
        return Saved(q, k, v, AttentionResult(total.out.to(q.dtype), total.lse))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of the rank's q, k and v."""
        q, k, v, result = saved
        dq: Tensor | None = None
        rows, coming = [k, v], [k, v]
        works: list[dist.Work] = []
        gradients = [torch.zeros_like(x, dtype=torch.float32) for x in (k, v)]
        gradient_works: list[dist.Work] = []
        for step, slices in enumerate(self.steps):
            if step + 1 < self.num_ranks:
                coming, works = self._pass_on(rows)
            partials = self.kernel.backward(dout, q, rows[0], rows[1], result, slices) if len(slices) else None
            for work in gradient_works:  # those of this step's rows, from the rank that had them before
                work.wait()
            if partials is not None:
                dq = partials[0] if dq is None else dq.float().add_(partials[0])
                for total, partial in zip(gradients, partials[1:], strict=True):
                    total += partial
            sent = gradients  # kept until they have arrived
            gradients, gradient_works = self._pass_on(gradients)
            for work in works:
                work.wait()
            rows, works = coming, []
        for work in gradient_works:
            work.wait()
        del sent
        assert dq is not None
        return dq.to(q.dtype), gradients[0].to(k.dtype), gradients[1].to(v.dtype)
