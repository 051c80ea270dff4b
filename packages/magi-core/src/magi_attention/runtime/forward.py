# SPDX-License-Identifier: Apache-2.0
"""The forward pass: compute step by step; queries that several kernels compute are merged by log-sum-exp."""

from contextlib import closing, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.common.logsumexp import accumulation_dtype
from magi_attention.kernels.merge import merge_into
from magi_attention.kernels.protocol import AttentionResult, attend_to_nothing
from magi_attention.kernels.sink import fold_sink
from magi_attention.runtime.beside import Beside
from magi_attention.runtime.job import AttentionJob
from magi_attention.runtime.launches import Launch
from magi_attention.runtime.steps import Step
from magi_attention.runtime.streams import walk_steps
from magi_attention.utils.dtypes import as_dtype
from magi_attention.utils.profiling import named
from magi_attention.utils.torch_modes import outside_inference_mode


@outside_inference_mode
def attend(
    job: AttentionJob, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, kept: list[Tensor] | None = None
) -> AttentionResult:
    """Attend this rank's queries to all keys that the mask names.

    Args:
        job: what to compute.
        q: ``[tq, hq, d]`` local queries.
        k: ``[tk, hk, d]`` local keys.
        v: ``[tk, hk, dv]`` local values.
        sink: ``[s, hq]`` logits that join every row's softmax with value 0, or None.
        kept: takes the keys and the values of every exchange, for the backward pass; None to drop them.

    Returns:
        ``out`` in q's dtype; ``lse``, sink included, in at least float32; ``max_logits`` of the group if asked for.
    """
    results = _Results(job, q, v)
    visits = []
    beside = Beside.of(job, q)
    walk = walk_steps(job.forward.steps, job.collectives, [q], k, v, lend=kept is None)
    with closing(walk) as steps, beside:
        for (step, _, launches), (queries,), keys, values in steps:
            if kept is not None and step.exchange is not None:
                kept += [keys, values]
            if step.queries_travel:
                visits.append(_Visit(job, step, _attend_visitors(launches, queries, keys, values), q))
            elif step.exchange is None:
                if beside.is_used:
                    results.allocate(q.dtype)
                with beside.after(beside.now()):
                    for launch in launches:
                        results.compute(launch, queries, keys, values)
            else:
                have_come = beside.now()
                for launch in launches:
                    with nullcontext() if launch.is_main else beside.after(have_come):
                        results.compute(launch, queries, keys, values)
                beside.join()
            del queries, keys, values
    for visit in visits:
        results.merge(None, visit.wait())
    out, lse, max_logits = results.finish()
    if sink is not None:
        lse = fold_sink(out, lse, sink)
    if job.max_logits:
        max_logits = _group_maximum(job, max_logits, lse)
    return AttentionResult(as_dtype(out, q.dtype), lse, max_logits if job.max_logits else None)


def _attend_visitors(launches: tuple[Launch, ...], queries: Tensor, keys: Tensor, values: Tensor) -> AttentionResult:
    (launch,) = launches
    if not len(launch.call.slices):
        return attend_to_nothing(queries, values)
    with named(launch.name):
        result: AttentionResult = launch.run(queries, keys, values, launch.call)
    return result


class _Visit:
    """Outputs of visiting queries on their way home, and those of this rank's queries that come from elsewhere."""

    def __init__(self, job: AttentionJob, step: Step, partial: AttentionResult, q: Tensor) -> None:
        away = attend_to_nothing(q, partial.out)
        self.out, self.lse = away.out.to(away.lse.dtype), away.lse
        self.max_logits = partial.max_logits
        assert step.exchange is not None
        travel_dtype = away.lse.dtype if job.options.forward_high_precision_reduce else q.dtype
        self.work = job.collectives.reduce(
            [partial.out.to(travel_dtype)], step.exchange, [self.out], "lse", partial.lse, self.lse
        )

    def wait(self) -> AttentionResult:
        """The own queries' attention to the keys of the ranks that they visited."""
        self.work.wait()
        return AttentionResult(self.out, self.lse, self.max_logits)


class _Results:
    """What the kernels computed, put together.

    A kernel that has all queries first gives the tensors that others are merged into; else there are tensors for all
    queries, into which kernels write their runs where they can. They keep the kernels' dtype where no query has more
    than two partial results, and at least float32 otherwise.
    """

    def __init__(self, job: AttentionJob, q: Tensor, v: Tensor) -> None:
        self._schedule = job.forward.schedule
        self._most = self._schedule.most_results + sum(each.step.queries_travel for each in job.forward.steps)
        self._q, self._v = q, v
        self._held: tuple[Tensor, Tensor] | None = None  # out and lse of all queries
        self._max_logits: Tensor | None = None

    def compute(self, launch: Launch, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Launch a kernel on its runs of queries and keys."""
        run, keys, call, *_ = launch
        if run is not None:
            q = q[run]
        if keys is not None:
            k, v = k[keys], v[keys]
        if launch.queries_known and launch.run_onto is not None and self._held is not None:
            out, lse = _rows(self._held, run)
            with named(launch.name):
                self._add_max_logits(launch.run_onto(out, lse, q, k, v, call))
            return
        if run is None or launch.queries_known or launch.run_into is None or self._most > 2:
            with named(launch.name):
                partial = launch.run(q, k, v, call)
            if launch.queries_known:
                self.merge(run, partial)
            else:
                self._put(run, partial)
            return
        targets = _rows(self.allocate(q.dtype), run)
        with named(launch.name):
            partial = launch.run_into(*targets, q, k, v, call)
        self._fill(targets, partial)

    def merge(self, run: slice | None, partial: AttentionResult) -> None:
        """Merge results of queries that have some; these must not be used afterwards."""
        if self._held is None:
            self._put(run, partial)
            return
        out, lse = _rows(self._held, run)
        with named("magi: merge"):
            merge_into(out, lse, partial.out, partial.lse)
        self._add_max_logits(partial.max_logits)

    def finish(self) -> AttentionResult:
        """Everything together."""
        if self._held is None:
            return attend_to_nothing(self._q, self._v)
        return AttentionResult(*self._held, self._max_logits)

    def _put(self, run: slice | None, partial: AttentionResult) -> None:
        """Keep the first results of some queries."""
        dtype = accumulation_dtype(partial.out) if self._most > 2 else partial.out.dtype
        if run is None and self._held is None:
            self._held = as_dtype(partial.out, dtype), partial.lse
            self._add_max_logits(partial.max_logits)
        else:
            self._fill(_rows(self.allocate(dtype), run), partial)

    def _fill(self, targets: tuple[Tensor, Tensor], partial: AttentionResult) -> None:
        """Copy to out and lse what a kernel has not written there itself."""
        for target, result in zip(targets, partial[:2], strict=True):
            if target.data_ptr() != result.data_ptr():
                target.copy_(result)
        self._add_max_logits(partial.max_logits)

    def allocate(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Out and lse of all queries, made now if there are none yet."""
        if self._held is None:
            blank, q = self._schedule.blank_queries, self._q
            out = (q.new_zeros if blank else q.new_empty)((*q.shape[:2], self._v.shape[2]), dtype=dtype)
            # By head, as kernels return it.
            lse = q.new_empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q)).T
            if blank:
                lse.fill_(float("-inf"))
            self._held = out, lse
        return self._held

    def _add_max_logits(self, max_logits: Tensor | None) -> None:
        if self._max_logits is None:
            self._max_logits = max_logits
        elif max_logits is not None:
            self._max_logits = torch.maximum(self._max_logits, max_logits)


def _rows(held: tuple[Tensor, Tensor], run: slice | None) -> tuple[Tensor, Tensor]:
    """Out and lse of a run of queries, or of all."""
    out, lse = held
    return held if run is None else (out[run], lse[run])


def _group_maximum(job: AttentionJob, max_logits: Tensor | None, lse: Tensor) -> Tensor:
    if max_logits is None:
        max_logits = lse.new_full(lse.shape[1:], float("-inf"))
    if job.num_ranks > 1:
        dist.all_reduce(max_logits, dist.ReduceOp.MAX, group=job.group)
    return max_logits
