# SPDX-License-Identifier: Apache-2.0
"""The stream of early queries: what waits for what. The results are compared on GPUs, by the distributed tests."""

import pytest
import torch

from magi_attention.comm import streams
from magi_attention.runtime.beside import Beside


class Stream:
    """Writes down what it is told."""

    device_index = 0

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_event(self, event: "Event") -> None:
        self.log.append(f"{self.name} waits for {event.mark}")


class Event:
    """Is a mark of the stream that it is recorded on."""

    def record(self, stream: Stream) -> None:
        stream.log.append(f"{stream.name} marks")
        self.mark = f"mark of {stream.name}"


@pytest.fixture
def log(monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(streams, "_pools", {})
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: log.append(f"on {stream.name}"))
    return log


def test_the_other_stream_waits_for_a_mark_and_is_waited_for(log):
    with Beside(Stream("current", log), Stream("other", log)) as beside:
        assert beside.is_used
        with beside.after(beside.now()):
            log.append("launch")
        beside.join()
        beside.join()
    waits = ["current marks", "other waits for mark of current"]
    waits_again = ["other marks", "current waits for mark of other"]
    assert log == [*waits, "on other", "launch", "on current", *waits_again]


def test_after_an_error_nothing_is_left_running(log):
    with (
        pytest.raises(RuntimeError, match="no kernel"),
        Beside(Stream("current", log), Stream("other", log)) as beside,
        beside.after(beside.now()),
    ):
        raise RuntimeError("no kernel")
    assert log[-3:] == ["on current", "other marks", "current waits for mark of other"]


def test_marks_are_recorded_anew_only_by_later_passes(log):
    current, other = Stream("current", log), Stream("other", log)
    with Beside(current, other) as beside:
        first, second = beside.now(), beside.now()
        assert first is not second
    with Beside(current, other) as beside:
        assert {beside.now(), beside.now()} == {first, second}
        assert beside.now() not in (first, second)


def test_without_another_stream_nothing_waits(log):
    with Beside() as beside:
        assert not beside.is_used
        with beside.after(beside.now()):
            log.append("launch")
        beside.join()
    assert log == ["launch"]
