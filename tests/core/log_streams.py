# SPDX-License-Identifier: Apache-2.0
"""Streams and events that write down what they are told, without a GPU."""

import pytest
import torch

from magi_attention.comm import streams


class Stream:
    """Writes down what it is told."""

    device_index, device, cuda_stream = 0, torch.device("cuda", 0), 0

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.num_marks = name, log, 0

    def wait_event(self, event: "Event") -> None:
        self.log.append(f"{self.name} waits for {event.mark}")

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def record_event(self) -> "Event":
        event = Event()
        event.record(self)
        return event


class Event:
    """Is a mark of the stream that it is recorded on, whose marks are numbered."""

    def record(self, stream: Stream) -> None:
        stream.log.append(f"{stream.name} marks")
        stream.num_marks += 1
        self.mark = f"mark {stream.num_marks} of {stream.name}"


def log_of_streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let PyTorch's events and the current stream write to a log."""
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(streams, "_pools", {})
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: log.append(f"on {stream.name}"))
    return log
