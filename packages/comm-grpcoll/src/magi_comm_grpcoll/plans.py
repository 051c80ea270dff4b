# SPDX-License-Identifier: Apache-2.0
"""What all ranks must know of an exchange before its first run: gathered on the host once per table and row format."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from magi_attention.comm.packing import RowFormat
from magi_attention.plan.exchange import ExchangeTable
from magi_comm_grpcoll.errors import CapacityError, PlanMismatchError
from magi_comm_grpcoll.handshake import Handshake
from magi_comm_grpcoll.rounds import MOST_ROUNDS, packed, split_rounds
from magi_comm_grpcoll.tables import (
    ByteCopies,
    Ints,
    SlotLayout,
    aligned,
    byte_copies,
    cast_copies,
    check_match,
    lay_out_slots,
    reduce_copies,
)

_TABLE_MARK = b"table "


@dataclass(frozen=True)
class Plan:
    """One rank's part of one round of a cast or a reduce of tensors of given row formats.

    Attributes:
        copies: the pieces that this rank sends.
        layout: where the tensors lie in every rank's slot.
        sources: the ranks that send something to this one, itself included.
        table: what travels in this round, as this rank sees it.
        num_rows: rows of each tensor in this rank's slot.
        landing: which rows of the receive buffer those of a cast are; None for all, in their order.
        stage_bytes: what a slot must hold for rows to be sent from it; 0 if they are sent from where they are.
    """

    copies: ByteCopies
    layout: SlotLayout
    sources: tuple[int, ...]
    table: ExchangeTable
    num_rows: int
    landing: Ints | None = None
    stage_bytes: int = 0

    @property
    def names_all_rows(self) -> bool:
        """Whether a cast brings every row of the receive buffer."""
        return sum(self.table.recv_counts) == self.table.num_received

    @property
    def slot_bytes(self) -> int:
        """What the largest slot must hold."""
        return max(int(self.layout.sizes.max()), self.stage_bytes)


def gather_plans(
    handshake: Handshake,
    operation: str,
    table: ExchangeTable,
    formats: Sequence[RowFormat],
    rank: int,
    most_bytes: int | None = None,
    is_staged: bool = False,
) -> list[Plan]:
    """Show this rank's table to the others, and make the plans from everybody's. All ranks must call it.

    Args:
        handshake: with the ranks of the group.
        operation: "cast" or "reduce".
        table: this rank's.
        formats: of the tensors that travel.
        rank: this rank.
        most_bytes: what a slot may hold at most; None for no limit.
        is_staged: whether rows are sent from a slot.

    Returns:
        A plan for each round; several only if one would not fit.

    Raises:
        PlanMismatchError: the ranks' calls don't fit each other; on every rank.
        CapacityError: the exchange does not fit in any number of rounds; on every rank.
    """
    tables = gather_tables(handshake, operation, table, formats)
    check_match(tables)
    num_rounds = 1
    while True:
        plans = make_plans(operation, tables, formats, rank, num_rounds, is_staged)
        needed = max(plan.slot_bytes for plan in plans)
        if most_bytes is None or needed <= most_bytes:
            return plans
        num_rounds *= 2
        if num_rounds > MOST_ROUNDS or num_rounds > 2 * max(each.num_source for each in tables):
            raise CapacityError(
                f"a {operation} needs slots of {needed} bytes even in {len(plans)} rounds, but {most_bytes} is the "
                "most that the capacity allows"
            )


def gather_tables(
    handshake: Handshake, operation: str, table: ExchangeTable, formats: Sequence[RowFormat] = ()
) -> list[ExchangeTable]:
    """Show this rank's table to the others; returns those of all ranks. See :func:`gather_plans`."""
    messages = handshake.exchange(_message(operation, table, formats))
    check_same_kind(messages, _TABLE_MARK)
    answers = [_parse(message) for message in messages]
    _check_same_call([header for header, _ in answers])
    return [_table(header, ranges) for header, ranges in answers]


def check_same_kind(messages: Sequence[bytes], mark: bytes) -> None:
    """Raise :class:`PlanMismatchError`, as on every rank, unless all ranks' messages begin with this one's mark."""
    differing = [rank for rank, message in enumerate(messages) if not message.startswith(mark)]
    if differing:
        raise PlanMismatchError(
            f"ranks {differing} of the group don't do what this one does: some ranks come to the first use of an "
            "exchange table, others to the growth of the slots or the end of the context"
        )


def make_plans(
    operation: str,
    tables: Sequence[ExchangeTable],
    formats: Sequence[RowFormat],
    rank: int,
    num_rounds: int = 1,
    is_staged: bool = False,
) -> list[Plan]:
    """The plans of ``rank``, given the tables of all ranks, which must match. See :func:`gather_plans`."""
    if num_rounds == 1:
        return [_plan(operation, tables, formats, rank, is_staged)]
    rounds = split_rounds(tables, num_rounds)
    if operation == "reduce":
        return [_plan(operation, each, formats, rank, is_staged) for each in rounds]
    plans = []
    for each in rounds:
        together, landing = zip(*map(packed, each), strict=True)
        plans.append(replace(_plan(operation, together, formats, rank, is_staged), landing=landing[rank]))
    return plans


def _plan(
    operation: str, tables: Sequence[ExchangeTable], formats: Sequence[RowFormat], rank: int, is_staged: bool
) -> Plan:
    row_bytes = [row.num_bytes for row in formats]
    mine = tables[rank]
    if operation == "cast":
        runs, rows, counts = cast_copies(tables, rank), [table.num_received for table in tables], mine.recv_counts
        most_sent = max(min(sum(table.send_counts), table.num_source) for table in tables)
    else:
        runs, rows, counts = reduce_copies(tables, rank), [sum(t.send_counts) for t in tables], mine.send_counts
        most_sent = max(min(sum(table.recv_counts), table.num_received) for table in tables)
    layout = lay_out_slots(rows, row_bytes)
    sources = tuple(source for source, count in enumerate(counts) if count)
    stage_bytes = sum(aligned(most_sent * width) for width in row_bytes) if is_staged else 0
    copies = byte_copies(runs, layout, row_bytes, rank)
    return Plan(copies, layout, sources, mine, rows[rank], stage_bytes=stage_bytes)


def _message(operation: str, table: ExchangeTable, formats: Sequence[RowFormat]) -> bytes:
    header = {
        "call": [operation, [[str(row.dtype), list(row.shape)] for row in formats]],
        "table": [table.num_ranks, table.num_source, table.num_received, len(table.send)],
    }
    ranges = np.concatenate([table.send, table.recv]).astype("<i8")
    return _TABLE_MARK + json.dumps(header).encode() + b"\n" + ranges.tobytes()


def _parse(message: bytes) -> tuple[dict[str, Any], bytes]:
    header, _, ranges = message.removeprefix(_TABLE_MARK).partition(b"\n")
    return json.loads(header), ranges


def _table(header: dict[str, Any], ranges: bytes) -> ExchangeTable:
    num_ranks, num_source, num_received, num_sent = header["table"]
    both = np.frombuffer(ranges, "<i8").astype(np.int64).reshape(-1, 3)
    return ExchangeTable(both[:num_sent], both[num_sent:], num_ranks, num_source, num_received)


def _check_same_call(headers: Sequence[dict[str, Any]]) -> None:
    calls = [header["call"] for header in headers]
    differing = [rank for rank, call in enumerate(calls) if call != calls[0]]
    if differing:
        other = differing[0]
        raise PlanMismatchError(
            f"ranks {differing} of the group call another collective than rank 0: a {_told(calls[other])} on rank "
            f"{other}, a {_told(calls[0])} on rank 0"
        )


def _told(call: Any) -> str:
    operation, formats = call
    return f"{operation} of rows {', '.join(f'{tuple(shape)} {dtype}' for dtype, shape in formats)}"
