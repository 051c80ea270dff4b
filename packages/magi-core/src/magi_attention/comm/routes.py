# SPDX-License-Identifier: Apache-2.0
"""Exchange tables as index tensors, built once per table and device."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.common.slices import expand_counts
from magi_attention.plan.exchange import ExchangeTable

# The rows of a tensor in some order: a slice where that is one contiguous run, so that it need not be copied.
Rows = slice | Tensor


@dataclass(frozen=True, eq=False)
class Routes:
    """An exchange table's rows on a device. *Packed* rows lie peer by peer, in the order in which they travel.

    Attributes:
        source: the source row of each packed row to send.
        received: the row of the receive buffer of each packed row to receive.
        packed: the inverse of ``received``: the packed row of each row of the receive buffer.
        peer_source: for each peer, the source rows sent to it.
        send_counts: packed rows for each peer to send.
        recv_counts: packed rows for each peer to receive.
    """

    source: Rows
    received: Rows
    packed: Rows
    peer_source: list[Rows]
    send_counts: list[int]
    recv_counts: list[int]
    _casts_per_row: NDArray[np.int64]
    _device: torch.device

    @property
    def num_sent(self) -> int:
        """Packed rows to send to all peers together."""
        return sum(self.send_counts)

    @cached_property
    def casts_per_row(self) -> Tensor:
        """``(num_source,)`` int64: to how many peers each source row goes."""
        return torch.from_numpy(self._casts_per_row).to(self._device)


def routes_of(table: ExchangeTable, device: torch.device) -> Routes:
    """The table's routes on ``device``, kept with the table."""
    return table.derived(("routes", device), lambda: _build(table, device))


def _build(table: ExchangeTable, device: torch.device) -> Routes:
    source, received = _listed(table.send), _listed(table.recv)
    send_counts = table.send_counts
    starts = [0, *accumulate(send_counts)]
    sent = _on_device(source, device)
    return Routes(
        source=sent,
        received=_on_device(received, device),
        packed=_on_device(np.argsort(received), device),
        peer_source=[_on_device(source[start:stop], device) for start, stop in pairwise(starts)],
        send_counts=send_counts,
        recv_counts=table.recv_counts,
        _casts_per_row=np.bincount(source, minlength=table.num_source),
        _device=device,
    )


def _listed(ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of ``(peer, start, stop)`` ranges, one after another."""
    owner, offset = expand_counts(ranges[:, 2] - ranges[:, 1])
    return ranges[owner, 1] + offset


def _part(source: NDArray[np.int64], sent: Rows, start: int, stop: int) -> Rows:
    """The rows of one peer; a view of the index tensor of all peers' rows where they are not one run."""
    run = _as_run(source[start:stop])
    if run is not None:
        return run
    assert isinstance(sent, Tensor), "rows that are one run have no part that is not"
    return sent[start:stop]


def _on_device(rows: NDArray[np.int64], device: torch.device) -> Rows:
    run = _as_run(rows)
    return torch.from_numpy(rows).to(device) if run is None else run


def _as_run(rows: NDArray[np.int64]) -> slice | None:
    if not len(rows):
        return slice(0, 0)
    if np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return slice(int(rows[0]), int(rows[0]) + len(rows))
    return None
