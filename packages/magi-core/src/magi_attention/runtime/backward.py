# SPDX-License-Identifier: Apache-2.0
"""The backward pass: keys and values travel again, their gradients travel back to the owners."""

from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.comm.protocol import Work
from magi_attention.common.logsumexp import accumulation_dtype
from magi_attention.plan.build import Stage
from magi_attention.runtime.job import AttentionJob


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
    for stage, backends, rows, keys, values in job.walk(travelers, k, v):
        call = job.call_for(stage, backward=True)
        if not len(stage.slices):
            dq, dk, dv = torch.zeros_like(rows[0]), torch.zeros_like(keys), torch.zeros_like(values)
        elif stage.queries_travel:
            queries, douts, lses, row_terms = rows
            no_out = torch.zeros_like(douts)
            dq, dk, dv = backends.backward.backward(douts, queries, keys, values, no_out, lses, row_terms, call)
        else:
            dq, dk, dv = backends.backward.backward(dout, q, keys, values, out, lse, dlse, call)
        total.add_queries(stage, dq)
        total.add_keys(stage, dk, dv)
    return total.finish()


def _row_term(saved: SavedAttention, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """``dlse - rowsum(dout * out)``: all that a gradient reads of either, so that ``out`` itself need not travel."""
    delta = (dout.to(saved.lse.dtype) * saved.out.to(saved.lse.dtype)).sum(-1)
    return -delta if dlse is None else dlse - delta


class _GradientSums:
    """Sums of the stages' gradients; those of received rows are under way to their owners until ``finish``."""

    def __init__(self, job: AttentionJob, q: Tensor, k: Tensor, v: Tensor) -> None:
        dtype = accumulation_dtype(q)
        self.collectives = job.runtime.collectives
        self.result_dtype = q.dtype
        self.travel_dtype = dtype if job.runtime.options.backward_high_precision_reduce else q.dtype
        self.dq, self.dk, self.dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
        self.traveling: Work[None] | None = None

    def add_queries(self, stage: Stage, dq: Tensor) -> None:
        if stage.queries_travel:
            self._send_home(stage, [dq], [self.dq])
        elif len(stage.slices):
            self.dq += dq

    def add_keys(self, stage: Stage, dk: Tensor, dv: Tensor) -> None:
        num_own = len(self.dk) if stage.reads_own else 0
        if num_own:
            self.dk += dk[:num_own]
            self.dv += dv[:num_own]
        if stage.exchange is not None and not stage.queries_travel:
            self._send_home(stage, [dk[num_own:], dv[num_own:]], [self.dk, self.dv])

    def _send_home(self, stage: Stage, partials: list[Tensor], into: list[Tensor]) -> None:
        assert stage.exchange is not None
        partials = [x.to(self.travel_dtype) for x in partials]
        arriving = self.traveling
        self.traveling = self.collectives.reduce(partials, stage.exchange, into)
        if arriving is not None:  # of the stage before; what is added now need not be kept any longer
            arriving.wait()

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.traveling is not None:
            self.traveling.wait()
        dq, dk, dv = (x.to(self.result_dtype) for x in (self.dq, self.dk, self.dv))
        return dq, dk, dv
