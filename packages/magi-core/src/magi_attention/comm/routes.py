# SPDX-License-Identifier: Apache-2.0
"""Exchange tables as index tensors, built once per table and device."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.common.derived import KeepsDerived
from magi_attention.common.slices import expand_counts
from magi_attention.plan.exchange import ExchangeTable

# The rows of a tensor in some order: a slice where that is one contiguous run, so that it need not be copied.
Rows = slice | Tensor


@dataclass(frozen=True, eq=False)
class Places(KeepsDerived):
    """Rows of a buffer that belong to those of another tensor, one after another.

    Attributes:
        runs: ``(n, 2)`` int64, the first row of each run and the one behind its last.
        rows: the same row by row, on the buffer's device.
    """

    runs: NDArray[np.int64]
    rows: Rows

    @cached_property
    def num_rows(self) -> int:
        """How many there are."""
        return int((self.runs[:, 1] - self.runs[:, 0]).sum())

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """Rows that all of them lie between, the least of which is not after row 0."""
        return int(self.runs.min(initial=0)), int(self.runs.max(initial=0))


@dataclass(frozen=True, eq=False)
class Routes(KeepsDerived):
    """An exchange table's rows on a device, peer by peer, each peer's in the order in which they travel.

    Attributes:
        source: the source rows sent to all peers.
        received: the rows of the receive buffer that come from all peers.
        source_of: the source rows sent to each peer.
        send_counts: how many rows each peer is sent.
        recv_counts: how many rows come from each peer.
        num_sent: rows sent to all peers together.
        num_arriving: rows that come from all peers together.
    """

    source: Rows
    received: Rows
    source_of: tuple[Rows, ...]
    send_counts: list[int]
    recv_counts: list[int]
    num_sent: int
    num_arriving: int
    _all_source: NDArray[np.int64]
    _all_received: NDArray[np.int64]
    _num_source: int
    _device: torch.device

    @cached_property
    def received_of(self) -> tuple[Rows, ...]:
        """The rows of the receive buffer that come from each peer."""
        return _by_peer(self._all_received, self.received, self.recv_counts)

    @cached_property
    def receives_runs(self) -> bool:
        """Whether the rows that come from each peer lie one after another in the receive buffer."""
        return all(isinstance(rows, slice) for rows in self.received_of)

    @cached_property
    def casts_per_row(self) -> Tensor:
        """``(num_source,)`` int64: to how many peers each source row goes."""
        return torch.from_numpy(np.bincount(self._all_source, minlength=self._num_source)).to(self._device)

    @cached_property
    def segments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the partial results of each row that was sent come back, for one reduction over all peers.

        Returns:
            The rows ``(n,)``, ascending; ``offsets`` ``(n + 1,)``; and ``places`` ``(num_sent,)``: row i's results are
            those with the numbers ``places[offsets[i]:offsets[i + 1]]`` of all that were sent, by ascending peer. All
            int32.
        """
        places = np.argsort(self._all_source, kind="stable")
        rows, counts = np.unique(self._all_source, return_counts=True)
        tables = (rows, np.append(0, np.cumsum(counts)), places)
        rows_, offsets, places_ = (torch.from_numpy(table.astype(np.int32)).to(self._device) for table in tables)
        return rows_, offsets, places_


def places_of(runs: NDArray[np.int64], device: torch.device) -> Places:
    """The rows of these runs, of a buffer on ``device``."""
    return Places(runs, _as_rows(_listed(runs), device))


def routes_of(table: ExchangeTable, device: torch.device) -> Routes:
    """The table's routes on ``device``, kept with the table."""
    return table.derived(("routes", device), lambda: _build(table, device))


def _build(table: ExchangeTable, device: torch.device) -> Routes:
    source, received = _listed(table.send[:, 1:]), _listed(table.recv[:, 1:])
    all_source = _as_rows(source, device)
    return Routes(
        source=all_source,
        received=_as_rows(received, device),
        source_of=_by_peer(source, all_source, table.send_counts),
        send_counts=table.send_counts,
        recv_counts=table.recv_counts,
        num_sent=len(source),
        num_arriving=len(received),
        _all_source=source,
        _all_received=received,
        _num_source=table.num_source,
        _device=device,
    )


def _listed(runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of ``(start, stop)`` runs, one after another."""
    owner, offset = expand_counts(runs[:, 1] - runs[:, 0])
    return runs[owner, 0] + offset


def _as_rows(rows: NDArray[np.int64], device: torch.device) -> Rows:
    """A slice if the rows are one run, else an index tensor."""
    run = _as_run(rows)
    return torch.from_numpy(rows).to(device) if run is None else run


def _by_peer(rows: NDArray[np.int64], all_rows: Rows, counts: list[int]) -> tuple[Rows, ...]:
    """Cut rows by peer; those that are not one run are views of the index tensor of all."""
    ends = [0, *accumulate(counts)]
    if isinstance(all_rows, slice):
        return tuple(slice(all_rows.start + first, all_rows.start + last) for first, last in pairwise(ends))
    runs = [_as_run(rows[first:last]) for first, last in pairwise(ends)]
    parts = all_rows.split(counts)
    return tuple(part if run is None else run for run, part in zip(runs, parts, strict=True))


def _as_run(rows: NDArray[np.int64]) -> slice | None:
    if not len(rows):
        return slice(0, 0)
    if np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return slice(int(rows[0]), int(rows[0]) + len(rows))
    return None
