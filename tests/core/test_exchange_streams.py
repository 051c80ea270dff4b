# SPDX-License-Identifier: Apache-2.0
"""An exchange on a stream of its own: what is enqueued where, and waits for what. Results are compared on GPUs."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from magi_attention.comm import alltoall, work
from magi_attention.comm.alltoall import AllToAllCollectives
from magi_attention.comm.hierarchical import HierarchicalCollectives
from magi_attention.comm.routes import places_of
from magi_attention.comm.streams import current_in_block, running_on
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange
from tests.core.log_streams import Stream, log_of_streams

BEFORE = ["caller marks", "side waits for mark 1 of caller", "on side", "gather", "side marks", "send"]
MEANWHILE = ["caller waits for mark 1 of side", "on caller", "meanwhile", "on side"]
BEHIND_MEANWHILE = ["caller marks", "side waits for mark 2 of caller"]


class Exchange:
    """An exchange whose steps write down that they are made; one of them may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log = log_of_streams(monkeypatch)
        caller, side = Stream("caller", self.log), Stream("side", self.log)
        for module in (alltoall, work):
            monkeypatch.setattr(module, "current_stream", lambda index: caller)
        self.collectives = AllToAllCollectives(None)
        self.landed, self.packed = torch.zeros(3, 2), torch.ones(3, 2)
        self.collectives._streams[self.landed.device] = side
        monkeypatch.setattr(self.collectives, "_send", self.send)
        self.fails = ""

    def step(self, name: str) -> None:
        self.log.append(name)
        if name == self.fails:
            raise RuntimeError(f"no {name}")

    def send(self, packed: torch.Tensor, landed: torch.Tensor, counts: object, async_op: bool) -> None:
        assert packed is self.packed
        assert landed is self.landed
        assert not async_op
        self.step("send")

    def gather(self) -> torch.Tensor:
        self.step("gather")
        return self.packed

    def finish(self) -> str:
        self.step("finish")
        return "result"

    def start(self, meanwhile: bool, early: bool = False) -> work.StreamWork[str]:
        steps = self.gather, self.landed, ([3], [3]), self.finish, []
        others = (lambda: self.step("meanwhile")) if meanwhile else None
        return self.collectives._exchange(*steps, others, goes_early=early)


@pytest.fixture
def exchange(monkeypatch):
    return Exchange(monkeypatch)


@pytest.mark.parametrize(
    ("meanwhile", "between"), [(False, []), (True, MEANWHILE + BEHIND_MEANWHILE)], ids=["alone", "meanwhile"]
)
def test_the_order_of_an_exchange(exchange, meanwhile, between):
    pending = exchange.start(meanwhile)
    assert exchange.log == [*BEFORE, *between, "finish", "side marks", "on caller"]
    exchange.log.clear()
    pending.wait_packed()
    assert pending.wait() == "result"
    assert exchange.log == [f"caller waits for mark {number} of side" for number in (1, 2)]


@pytest.mark.parametrize("meanwhile", [False, True])
def test_rows_that_are_there_travel_before_the_caller_is_done(exchange, meanwhile):
    """But what arrives is added behind all that the caller was given: own rows may be written until then."""
    pending = exchange.start(meanwhile, early=True)
    between = [*(MEANWHILE if meanwhile else []), "caller marks", "side waits for mark 1 of caller"]
    assert exchange.log == [*BEFORE[2:], *between, "finish", "side marks", "on caller"]
    assert pending.wait() == "result"


NINE = np.array([[0, 0, 9]])
WHERE = {"a run": NINE, "several runs": np.array([[0, 0, 4], [0, 5, 9], [0, 4, 5]])}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", ["rows", "rows that are copied", "short rows", "rows that nobody tells of"])
def test_a_reduce_sends_early_what_it_sends_as_it_lies(exchange, monkeypatch, kind, where):
    """Copies are made behind all that the caller was given; and memory of its stream is in use until then.

    The group's stream waits first, which joins it to a graph that is being captured, and has the memory then.
    """
    collectives, log, given = exchange.collectives, exchange.log, []
    monkeypatch.setattr(collectives, "_can_send_pieces", lambda device: True)
    monkeypatch.setattr(collectives, "_exchange", lambda *_, goes_early: given.append(goes_early))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *how, **more: log.append("room") or new_empty(*how, **more))
    dtype, width = (torch.complex64 if "copied" in kind else torch.float32), 1 if "short" in kind else 64
    partials = [torch.ones(9, width, dtype=dtype) for _ in range(2)]
    sent = [x.conj() for x in partials] if "copied" in kind else partials
    table = ExchangeTable(NINE, WHERE[where], num_ranks=1, num_source=9, num_received=9)
    goes_early = kind == "rows" and where == "a run"
    assert collectives.sends_early(table, torch.device("cpu")) == (where == "a run")
    rows_there = None if "nobody" in kind else lambda stream: log.append(f"{stream.name} waits for rows")
    collectives.reduce(sent, table, [torch.zeros_like(x) for x in partials], rows_there=rows_there)
    assert given == [goes_early]
    assert log == (["side waits for rows", "on side", "room", "on caller"] if goes_early else ["room"])


def test_only_exchanges_in_pieces_go_early(monkeypatch):
    collectives, hop = AllToAllCollectives(None), AllToAllCollectives(None)
    table = ExchangeTable(NINE, NINE, num_ranks=1, num_source=9, num_received=9)
    assert not collectives.sends_early(table, torch.device("cpu"))
    assert not HierarchicalCollectives(hop, hop).sends_early(table, torch.device("cpu"))
    monkeypatch.setattr(collectives, "_can_send_pieces", lambda device: True)
    assert not collectives.sends_early(object.__new__(TwoHopExchange), torch.device("cpu"))


@pytest.mark.parametrize(
    ("fails", "until"),
    [
        ("gather", BEFORE[:4]),
        ("send", BEFORE),
        ("meanwhile", BEFORE + MEANWHILE),
        ("finish", [*BEFORE, *MEANWHILE, *BEHIND_MEANWHILE, "finish"]),
    ],
)
def test_after_an_error_the_caller_waits_for_what_has_begun(exchange, fails, until):
    exchange.fails = fails
    with pytest.raises(RuntimeError, match=f"no {fails}"):
        exchange.start(meanwhile=True)
    number = 1 if fails == "gather" else 2
    assert exchange.log == [*until, "side marks", f"caller waits for mark {number} of side", "on caller"]


def test_own_rows_are_copied_once_those_to_send_are_packed(monkeypatch):
    log = []
    collectives = AllToAllCollectives(None)
    under_way = SimpleNamespace(wait_packed=lambda: log.append("packed"))
    monkeypatch.setattr(collectives, "_exchange", lambda *_: under_way)
    monkeypatch.setattr(alltoall, "put_all_rows", lambda *_: log.append("copy"))
    runs = np.array([[0, 0, 1]])
    own_places = places_of(np.array([[1, 3]]), torch.device("cpu"))
    assert collectives.cast([torch.ones(2, 2)], ExchangeTable(runs, runs, 1, 2, 3), own_places=own_places) is under_way
    assert log == ["packed", "copy"]


@pytest.mark.parametrize("fails", [False, True])
def test_after_an_error_in_a_later_hop_the_caller_waits_too(monkeypatch, fails):
    log = log_of_streams(monkeypatch)
    caller, side = Stream("caller", log), Stream("side", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: caller)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: current_in_block(stream, caller))
    with pytest.raises(RuntimeError, match="no hop") if fails else nullcontext(), running_on(side):
        log.append("hop")
        if fails:
            raise RuntimeError("no hop")
    waits = ["side marks", "caller waits for mark 1 of side"] if fails else []
    assert log == ["caller marks", "side waits for mark 1 of caller", "on side", "hop", *waits, "on caller"]
