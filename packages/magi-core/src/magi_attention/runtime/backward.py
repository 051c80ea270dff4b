# SPDX-License-Identifier: Apache-2.0
"""The backward pass: keys and values travel again, their gradients travel back to the owners."""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.comm.protocol import RowsThere
from magi_attention.comm.routes import Rows
from magi_attention.comm.words import move_rows
from magi_attention.common.logsumexp import accumulation_dtype
from magi_attention.kernels.protocol import KeysDone
from magi_attention.runtime.job import AttentionJob
from magi_attention.runtime.launches import Launch, LaunchStep
from magi_attention.runtime.streams import Returns, walk_steps
from magi_attention.utils.dtypes import as_dtype
from magi_attention.utils.profiling import named


class SavedAttention(NamedTuple):
    """What the forward pass leaves for the backward pass.

    Attributes:
        q, k, v: its inputs.
        out, lse: its final output and log-sum-exp.
        kept: the keys and the values of every exchange, one after another; None if they are to be exchanged again.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    kept: Sequence[Tensor] | None = None


def differentiate(
    job: AttentionJob, saved: SavedAttention, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's q, k and v, in their dtypes.

    Partial gradients of keys travel in the inputs' dtype, or in at least float32 with
    ``backward_high_precision_reduce``; they are added up in at least float32 and in a fixed order.
    """
    q, k, v, _, lse, kept = saved
    sums = _GradientSums(job, saved, dout, dlse)
    travelers = [q, dout, lse, _row_term(saved, dout, dlse)] if job.queries_travel else [q]
    of_pass = job.backward if kept is None else job.backward_with_rows
    walk = walk_steps(of_pass.steps, job.collectives, travelers, k, v, kept)
    with closing(walk) as steps:
        for each, rows, keys, values in steps:
            sums.returns.send()
            if each.step.queries_travel:
                sums.compute_visitors(each, rows, keys, values)
            else:
                sums.compute(each, keys, values)
            del rows, keys, values
    return sums.finish()


def _row_term(saved: SavedAttention, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """``dlse - rowsum(dout * out)``: all that a gradient reads of either, so that ``out`` itself need not travel."""
    delta = (dout.to(saved.lse.dtype) * saved.out.to(saved.lse.dtype)).sum(-1)
    return -delta if dlse is None else dlse - delta


class _Sum:
    """The sum of gradients of some rows, whose kernels are each for a run of them.

    While there is a single gradient of a run, beside which all other rows would be zeros, it is kept as it is.

    Args:
        like: of what: as many rows, of its shape and on its device.
        is_blank: whether it starts as zeros, since not every run is new or known as a whole.
        dtype: to keep it in; None for that of the first gradient.
        read: the runs that anybody reads; None for all.
    """

    def __init__(
        self,
        like: Tensor,
        is_blank: bool,
        dtype: torch.dtype | None,
        read: Sequence[slice] | None = None,
    ) -> None:
        self._like, self._is_blank, self._dtype, self._read = like, is_blank, dtype, read
        self._total: Tensor | None = None
        self._part: tuple[slice, Tensor] | None = None

    @property
    def is_new(self) -> bool:
        """Whether nothing has been added, nor asked for."""
        return self._total is None and self._part is None

    def add(self, run: slice | None, gradient: Tensor, is_known: bool) -> None:
        """Add the gradient of a run of rows, or of all, for which the sum ``is_known`` already or not."""
        if self.is_new:
            if run is None:
                self._total = gradient if self._dtype is None else as_dtype(gradient, self._dtype)
                return
            if self._is_blank and self._read is None:
                self._part = run, gradient
                return
        target = self.allocated(gradient.dtype)
        if run is not None:
            target = target[run]
        if is_known:
            target += gradient
        elif target.data_ptr() != gradient.data_ptr():
            target.copy_(gradient)

    def add_sum(self, other: "_Sum") -> None:
        """Add another sum of the same rows, which is not new."""
        run, gradient = other._part or (None, other._total)
        assert gradient is not None
        self.add(run, gradient, not self.is_new)

    def allocated(self, dtype: torch.dtype) -> Tensor:
        """The sum so far; of ``dtype``, unless it has one, where it is made now."""
        if self._total is None:
            is_blank = self._is_blank and self._read is None
            make = self._like.new_zeros if is_blank else self._like.new_empty
            part, self._part = self._part, None
            self._total = make(self._like.shape, dtype=self._dtype or (dtype if part is None else part[1].dtype))
            if part is not None:
                self._total[part[0]].copy_(part[1])
            for run in self._read or ():
                self._total[run].zero_()
        return self._total


def take_rows(tensors: Sequence[Tensor], rows: Rows) -> list[Tensor]:
    """The same rows of one or two tensors; views where they are one run, and most of all."""
    if isinstance(rows, slice):
        views = [x[rows] for x in tensors]
        return [view if 2 * len(view) >= len(x) else view.clone() for view, x in zip(views, tensors, strict=True)]
    num_rows = rows.shape[0]
    taken = [x.new_empty((num_rows, *x.shape[1:])) for x in tensors]
    if not move_rows(taken, tensors, rows, num_rows, scatter=False):
        for target, x in zip(taken, tensors, strict=True):
            torch.index_select(x, 0, rows, out=target)
    return taken


class _GradientSums:
    """Sums of the kernels' gradients; those of received rows are under way to their owners until ``finish``.

    While others' gradients come home to the rank's own keys, these belong to the collectives: what kernels on own rows
    find meanwhile is summed up apart. Where a query has at most two gradients, and a key at most three (those of
    several ranks that come home together count as one), they are added in the first one's dtype. All other sums of
    several are kept in at least float32.
    """

    def __init__(self, job: AttentionJob, saved: SavedAttention, dout: Tensor, dlse: Tensor | None) -> None:
        self._saved, self._dout, self._dlse = saved, dout, dlse
        q, k, v, *_ = saved
        schedule = (job.backward if saved.kept is None else job.backward_with_rows).schedule
        self._dtype = dtype = accumulation_dtype(q)
        high_precision = job.options.backward_high_precision_reduce
        self.returns = Returns(job.collectives, dtype if high_precision else q.dtype)
        self._dq = _Sum(q, schedule.blank_queries, dtype if schedule.most_results > 2 else None)
        key_dtype = dtype if schedule.most_key_results > 3 else None
        self._home = home = schedule.home_keys
        self._own = [_Sum(x, schedule.blank_keys, key_dtype, home) for x in (k, v)]
        self._late = [_Sum(x, schedule.blank_late_keys, key_dtype) for x in (k, v)]
        self._sums = self._own
        self._dq_from_away: Tensor | None = None

    def compute(self, each: LaunchStep, keys: Tensor, values: Tensor) -> None:
        """Launch a step's kernels, send what still waits of the step before, and let what belongs to others go home."""
        step, _, launches = each
        sums = self._sums
        if not step.reads_own_alone:
            dtype = self._dtype if len(launches) > 1 else None
            sums = [_Sum(x, step.blank_keys, dtype) for x in (keys, values)]
        for launch in launches:
            dq = self._launch(launch, keys, values, partial(self._take_keys, each, launch, sums))
            self._dq.add(launch.queries, dq, launch.queries_known)
        if not launches or launches[-1].run_keys_first is None:
            self._finish_keys(each, sums)

    def _take_keys(
        self,
        each: LaunchStep,
        launch: Launch,
        sums: Sequence[_Sum],
        dk: Tensor,
        dv: Tensor,
        rows_there: RowsThere | None = None,
    ) -> None:
        """Add a kernel's gradients of keys and values; the last ones go home while it finishes those of queries.

        With ``rows_there`` they do while it computes those of own keys.
        """
        for total, gradient in zip(sums, (dk, dv), strict=True):
            total.add(launch.keys, gradient, launch.keys_known)
        if launch.run_keys_first is not None:
            self._finish_keys(each, sums, rows_there)
            self.returns.send(before_kernels=True)

    def _finish_keys(self, each: LaunchStep, sums: Sequence[_Sum], rows_there: RowsThere | None = None) -> None:
        """Send what still waits of the step before, and let this step's gradients of received rows go home next."""
        step, places, _ = each
        self.returns.send()
        if step.exchange is None:
            return
        partials = [total.allocated(self._saved.k.dtype) for total in sums]
        copied_on_the_way = None
        is_new = partials[0].dtype == self.returns.dtype and self._own[0].is_new
        if is_new and places is not None and isinstance(places.rows, Tensor):
            copied_on_the_way = places
        elif places is not None:
            for own, taken in zip(self._sums, take_rows(partials, places.rows), strict=True):
                own.add(None, taken, not own.is_new)
        self._sums = self._late
        into = [own.allocated(partials[0].dtype) for own in self._own]
        self.returns.put(step, partials, into, copied_on_the_way, rows_there)

    def compute_visitors(self, each: LaunchStep, rows: Sequence[Tensor], keys: Tensor, values: Tensor) -> None:
        """Launch the kernel on visiting queries, whose gradients then go home."""
        (launch,) = each.launches
        queries, douts, lses, row_terms = rows
        if not len(launch.call.slices):
            dq = torch.zeros_like(queries)
        else:
            with named(launch.name):
                dq, dk, dv = launch.run(
                    douts, queries, keys, values, torch.zeros_like(douts), lses, row_terms, launch.call
                )
            for total, gradient in zip(self._own, (dk, dv), strict=True):
                total.add(launch.keys, gradient, launch.keys_known)
        self.returns.send()
        assert self._dq_from_away is None
        self._dq_from_away = torch.zeros_like(self._saved.q, dtype=self._dtype)
        self.returns.put(each.step, [dq], [self._dq_from_away])

    def _launch(self, launch: Launch, keys: Tensor, values: Tensor, keys_done: KeysDone) -> Tensor:
        """Launch a kernel; returns the gradient of its queries, and gives those of its keys and values away."""
        q, _, _, out, lse, _ = self._saved
        dout, dlse, run = self._dout, self._dlse, launch.queries
        if launch.keys is not None:
            keys, values = keys[launch.keys], values[launch.keys]
        if run is not None:
            q, dout, out, lse = q[run], dout[run], out[run], lse[run]
            dlse = None if dlse is None else dlse[run]
        tensors = (dout, q, keys, values, out, lse, dlse, launch.call)
        target = None
        if run is not None and not launch.queries_known and launch.run_into is not None:
            whole = self._dq.allocated(q.dtype)
            target = whole[run] if whole.dtype == q.dtype else None
        with named(launch.name):
            if launch.run_keys_first is not None:
                kernel_dq: Tensor = launch.run_keys_first(keys_done, target, *tensors)[0]
                return kernel_dq
            if target is not None and launch.run_into is not None:
                dq, dk, dv = launch.run_into(target, *tensors)
            else:
                dq, dk, dv = launch.run(*tensors)
        keys_done(dk, dv)
        return dq

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients, in the inputs' dtypes."""
        self.returns.finish()
        q, k, v, *_ = self._saved
        dq = self._dq.allocated(q.dtype)
        if self._dq_from_away is not None:
            dq = self._dq_from_away.add_(dq)
        dk, dv = map(self._of_keys, self._own, self._late)
        return as_dtype(dq, q.dtype), as_dtype(dk, k.dtype), as_dtype(dv, v.dtype)

    def _of_keys(self, own: _Sum, late: _Sum) -> Tensor:
        """The gradient of own keys or values: also what kernels have found while others' came home."""
        dtype = self._saved.k.dtype
        if self._home is not None and not own.is_new and not late.is_new:
            home, total = own.allocated(dtype), late.allocated(dtype)
            for run in self._home:
                total[run].add_(home[run])  # not "+=", which also assigns what is there already
            return total
        if not late.is_new:
            own.add_sum(late)
        return own.allocated(dtype)
