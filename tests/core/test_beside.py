# SPDX-License-Identifier: Apache-2.0
"""The stream of early queries: what waits for what. The results are compared on GPUs, by the distributed tests."""

import pytest

from magi_attention.runtime.beside import Beside
from tests.core.log_streams import Stream, log_of_streams


@pytest.fixture
def log(monkeypatch):
    return log_of_streams(monkeypatch)


def test_the_other_stream_waits_for_a_mark_and_is_waited_for(log):
    with Beside(Stream("current", log), Stream("other", log)) as beside:
        assert beside.is_used
        with beside.after(beside.now()):
            log.append("launch")
        beside.join()
        beside.join()
    waits = ["current marks", "other waits for mark 1 of current"]
    waits_again = ["other marks", "current waits for mark 1 of other"]
    assert log == [*waits, "on other", "launch", "on current", *waits_again]


def test_after_an_error_nothing_is_left_running(log):
    with (
        pytest.raises(RuntimeError, match="no kernel"),
        Beside(Stream("current", log), Stream("other", log)) as beside,
        beside.after(beside.now()),
    ):
        raise RuntimeError("no kernel")
    assert log[-3:] == ["on current", "other marks", "current waits for mark 1 of other"]


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
