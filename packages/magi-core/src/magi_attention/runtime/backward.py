# SPDX-License-Identifier: Apache-2.0
"""The backward pass: keys and values travel again, their gradients travel back to the owners."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from magi_attention.common.logsumexp import accumulation_dtype
from magi_attention.plan.build import Stage
from magi_attention.runtime.job import AttentionJob
from magi_attention.runtime.streams import Returns


class SavedAttention(NamedTuple):
    """What the forward pass leaves for the backward pass: its inputs, and its final output and log-sum-exp."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


def differentiate(
    job: AttentionJob, saved: SavedAttention, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's q, k and v, in their dtypes.

    Partial gradients of keys travel in the inputs' dtype, or in at least float32 with
    ``backward_high_precision_reduce``; they are added up in at least float32 and in a fixed order.
    """
    q, k, v, out, lse = saved
    total = _GradientSums(job, q, k, v)
    queries_travel = any(stage.queries_travel for stage in job.runtime.plan.stages)
    travelers = [q, dout, lse, _row_term(saved, dout, dlse)] if queries_travel else [q]
    for number, stage, rows, keys, values in job.walk(travelers, k, v):
        total.send()
        call, backend = job.call_for(number, backward=True), job.backends[number].backward
        run = job.runtime.plan.kernel_work[number].queries
        with record_function(f"magi: attention stage {number}"):
            if not len(stage.slices):
                dq, dk, dv = torch.zeros_like(rows[0]), torch.zeros_like(keys), torch.zeros_like(values)
            elif stage.queries_travel:
                queries, douts, lses, row_terms = rows
                no_out = torch.zeros_like(douts)
                dq, dk, dv = backend.backward(douts, queries, keys, values, no_out, lses, row_terms, call)
            else:
                dlse_run = None if dlse is None else dlse[run]
                dq, dk, dv = backend.backward(dout[run], q[run], keys, values, out[run], lse[run], dlse_run, call)
        total.add_queries(number, stage, dq, run)
        total.add_keys(number, stage, dk, dv)
        del rows, keys, values, dq, dk, dv
    return total.finish()


def _row_term(saved: SavedAttention, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """``dlse - rowsum(dout * out)``: all that a gradient reads of either, so that ``out`` itself need not travel."""
    delta = (dout.to(saved.lse.dtype) * saved.out.to(saved.lse.dtype)).sum(-1)
    return -delta if dlse is None else dlse - delta


class _GradientSums:
    """Sums of the stages' gradients; those of received rows are under way to their owners until ``finish``.

    The first gradient of q is kept as it is, and a second and last one is added in its dtype, rounded once like the sum
    of both in float32. All other sums are kept in at least float32.
    """

    def __init__(self, job: AttentionJob, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.inputs = q, k, v
        self.dtype = accumulation_dtype(q)
        high_precision = job.runtime.options.backward_high_precision_reduce
        self.returns = Returns(job.runtime.collectives, self.dtype if high_precision else q.dtype)
        self.send = self.returns.send
        stages = job.runtime.plan.stages
        self.num_dq_left = sum(1 for stage in stages if len(stage.slices) and not stage.queries_travel)
        self.keys_add_up = any(stage.exchange is not None for stage in stages)
        self.dq: Tensor | None = None
        self.dq_from_away: Tensor | None = None
        self.dk: Tensor | None = None
        self.dv: Tensor | None = None

    def add_queries(self, number: int, stage: Stage, dq: Tensor, rows: slice) -> None:
        """Add the gradient of a stage's queries, of which the kernel took ``rows``."""
        if stage.queries_travel:
            assert self.dq_from_away is None
            self.dq_from_away = torch.zeros_like(self.inputs[0], dtype=self.dtype)
            self.returns.put(number, stage, [dq], [self.dq_from_away])
        elif len(stage.slices):
            self.num_dq_left -= 1
            if self.dq is None:
                self.dq = dq
                return
            if self.num_dq_left:
                self.dq = self.dq.to(self.dtype)
            self.dq[rows] += dq

    def add_keys(self, number: int, stage: Stage, dk: Tensor, dv: Tensor) -> None:
        """Add the gradients of a stage's keys and values. Stages that read own rows come before those that don't."""
        num_own = len(self.inputs[1]) if stage.reads_own else 0
        if self.dk is None or self.dv is None:
            dtype = self.dtype if self.keys_add_up else dk.dtype
            self.dk, self.dv = dk[:num_own].to(dtype), dv[:num_own].to(dtype)
        elif num_own:
            self.dk += dk
            self.dv += dv
        if stage.exchange is not None and not stage.queries_travel:
            self.returns.put(number, stage, [dk[num_own:], dv[num_own:]], [self.dk, self.dv])

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients, in the inputs' dtypes."""
        self.returns.finish()
        q, k, v = self.inputs
        assert self.dk is not None
        assert self.dv is not None
        dq = torch.zeros_like(q) if self.dq is None else self.dq
        if self.dq_from_away is not None:
            dq = self.dq_from_away.add_(dq)
        return dq.to(q.dtype), self.dk.to(k.dtype), self.dv.to(v.dtype)
