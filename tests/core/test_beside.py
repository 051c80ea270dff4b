# SPDX-License-Identifier: Apache-2.0
"""The stream of early queries: what waits for what. The results are compared on GPUs, by the distributed tests."""

import pytest
import torch

from magi_attention.runtime.beside import Beside


class Stream:
    """Writes down what it is told."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        self.log.append(f"{self.name} marks")
        return f"mark of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch):
    log: list[str] = []
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
    assert log == [*waits, "on other", "launch", "on current", "current waits for other"]


def test_after_an_error_nothing_is_left_running(log):
    with (
        pytest.raises(RuntimeError, match="no kernel"),
        Beside(Stream("current", log), Stream("other", log)) as beside,
        beside.after(beside.now()),
    ):
        raise RuntimeError("no kernel")
    assert log[-2:] == ["on current", "current waits for other"]


def test_without_another_stream_nothing_waits(log):
    with Beside() as beside:
        assert not beside.is_used
        with beside.after(beside.now()):
            log.append("launch")
        beside.join()
    assert log == ["launch"]
