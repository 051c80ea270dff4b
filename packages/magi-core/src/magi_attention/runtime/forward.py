# SPDX-License-Identifier: Apache-2.0
"""The forward pass: compute stage by stage and merge by log-sum-exp."""

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.common.logsumexp import accumulation_dtype
from magi_attention.kernels.merge import merge_partials
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
    result: AttentionResult | None = None
    visits = []
    for stage, backends, (queries,), keys, values in job.walk([q], k, v):
        partial = backends.forward.forward(queries, keys, values, job.call_for(stage)) if len(stage.slices) else None
        if stage.queries_travel:
            visits.append(_Visit(job, stage, partial or _nothing(queries, v), q))
        elif partial is not None:
            result = partial if result is None else _merged(result, partial)
    for visit in visits:
        away = visit.wait()
        result = away if result is None else _merged(result, away)
    out, lse, max_logits = result or _nothing(q, v)
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


def _merged(first: AttentionResult, second: AttentionResult) -> AttentionResult:
    out, lse = merge_partials(first.out, first.lse, second.out, second.lse)
    if first.max_logits is None or second.max_logits is None:
        return AttentionResult(out, lse, second.max_logits if first.max_logits is None else first.max_logits)
    return AttentionResult(out, lse, torch.maximum(first.max_logits, second.max_logits))


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
