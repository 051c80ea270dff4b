# SPDX-License-Identifier: Apache-2.0
"""The word by which a kernel says that what others wait for is there; needs no GPU."""

from types import SimpleNamespace

import pytest
import torch

from magi_kernels_hopper import launching


def test_a_bell_counts_launches_modulo_two_to_the_32(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(launching, "wait_until_reached", lambda *x: waits.append(x))
    bell, stream = launching.Bell(torch.device("cpu")), SimpleNamespace(cuda_stream=7)
    first, second = bell.count_launch(), bell.count_launch()
    second(stream)
    first(stream)
    bell._count = 2**32 - 1
    bell.count_launch()(stream)
    assert waits == [(7, bell.address, count) for count in (2, 1, 0)]


@pytest.mark.parametrize("can_wait", [True, False])
def test_without_waits_for_memory_there_is_no_bell(monkeypatch, can_wait):
    """So that all of a pass is launched by then: a rank that finds out later would leave its peers waiting."""
    waits = []

    def wait(*given):
        waits.append(given)
        if not can_wait:
            raise RuntimeError("not supported")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=9))
    monkeypatch.setattr(launching, "wait_until_reached", wait)
    launching._stream_bell.cache_clear()
    found = [launching.bell(torch.device("cpu"), 7) for _ in range(2)]
    launching._stream_bell.cache_clear()
    assert found[0] is found[1]
    assert (found[0] is not None) == can_wait
    assert [(stream, value) for stream, _, value in waits] == [(9, 0)]
