# SPDX-License-Identifier: Apache-2.0
"""The forward pass: compute stage by stage and merge by log-sum-exp."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from magi_attention.common.logsumexp import accumulation_dtype
from magi_attention.kernels.merge import merge_into
from magi_attention.kernels.protocol import AttentionResult
from magi_attention.kernels.sink import apply_sink
from magi_attention.plan.build import Stage
from magi_attention.runtime.job import AttentionJob


def attend(job: AttentionJob, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> AttentionResult:
    """Attend this rank's queries to all keys that the mask names.

    Args:
        job: what to compute.
        q: ``[tq, hq, d]`` local queries.
        k: ``[tk, hk, d]`` local keys.
        v: ``[tk, hk, dv]`` local values.
        sink: ``[s, hq]`` logits that join every row's softmax with value 0, or None.

    Returns:
        ``out`` in q's dtype; ``lse``, sink included, in at least float32; ``max_logits`` of the group if asked for.
    """
    total = _Total(sum(1 for stage in job.runtime.plan.stages if len(stage.slices) or stage.queries_travel))
    visits = []
    for number, stage, (queries,), keys, values in job.walk([q], k, v):
        partial, run = None, job.runtime.plan.kernel_work[number].queries
        if len(stage.slices):
            with record_function(f"magi: attention stage {number}"):
                backend = job.backends[number].forward
                partial = backend.forward(queries[run], keys, values, job.call_for(number))
        if stage.queries_travel:
            visits.append(_Visit(job, stage, partial or _nothing(queries, v), q))
        elif partial is not None:
            total.merge(partial, run)
        del queries, keys, values, partial
    for visit in visits:
        total.merge(visit.wait(), slice(None))
    out, lse, max_logits = total.result or _nothing(q, v)
    if sink is not None:
        out, lse = apply_sink(out, lse, sink)
    if job.max_logits:
        max_logits = _group_maximum(job, max_logits, lse)
    return AttentionResult(out.to(q.dtype), lse, max_logits if job.max_logits else None)


class _Visit:
    """Outputs of visiting queries on their way home, and those of this rank's queries that come from elsewhere."""

    def __init__(self, job: AttentionJob, stage: Stage, partial: AttentionResult, q: Tensor) -> None:
        away = _nothing(q, partial.out)
        self.out, self.lse = away.out.to(away.lse.dtype), away.lse
        self.max_logits = partial.max_logits
        assert stage.exchange is not None
        travel_dtype = away.lse.dtype if job.runtime.options.forward_high_precision_reduce else q.dtype
        self.work = job.runtime.collectives.reduce(
            [partial.out.to(travel_dtype)], stage.exchange, [self.out], "lse", partial.lse, self.lse
        )

    def wait(self) -> AttentionResult:
        """The own queries' attention to the keys of the ranks that they visited."""
        self.work.wait()
        return AttentionResult(self.out, self.lse, self.max_logits)


class _Total:
    """The merge of partial results, in their dtype where there are at most two, else in at least float32 meanwhile.

    Args:
        num_partials: how many will be merged.
    """

    def __init__(self, num_partials: int) -> None:
        self.result: AttentionResult | None = None
        self._num_left = num_partials

    def merge(self, partial: AttentionResult, rows: slice) -> None:
        """Merge one more, which is of those ``rows`` and must not be used afterwards. The first is of all rows."""
        self._num_left -= 1
        if self.result is None:
            self.result = partial
            return
        out, lse, largest = self.result
        if self._num_left:
            out = out.to(accumulation_dtype(out))
        with record_function("magi: merge"):
            merge_into(out[rows], lse[rows], partial.out, partial.lse)
        if largest is None:
            largest = partial.max_logits
        elif partial.max_logits is not None:
            largest = torch.maximum(largest, partial.max_logits)
        self.result = AttentionResult(out, lse, largest)


def _nothing(q: Tensor, v: Tensor) -> AttentionResult:
    """The result of queries that attend to no key at all; ``v`` tells the head dim of the output."""
    dtype = accumulation_dtype(q)
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    return AttentionResult(out, q.new_full(q.shape[:2], float("-inf"), dtype=dtype))


def _group_maximum(job: AttentionJob, max_logits: Tensor | None, lse: Tensor) -> Tensor:
    if max_logits is None:
        max_logits = lse.new_full(lse.shape[1:], float("-inf"))
    if job.runtime.plan.layout.num_ranks > 1:
        dist.all_reduce(max_logits, dist.ReduceOp.MAX, group=job.runtime.group)
    return max_logits
