# SPDX-License-Identifier: Apache-2.0
"""Tables outlive the launches that read them on every stream."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.flex_tables import layers_of
from magi_attention.kernels.table_streams import StreamsOfTables


@dataclass
class Holder:
    table: torch.Tensor
    name: str = "x"


@pytest.fixture
def recorded(monkeypatch):
    """Every tensor is on a GPU; what the allocator is told of."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda table, stream: calls.append((table, stream.cuda_stream)))
    return calls


def run_on(monkeypatch, stream: int) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: stream, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=stream))


def test_each_stream_is_told_once_of_every_table(recorded, monkeypatch):
    tables = [torch.zeros(1) for _ in range(4)]
    streams = StreamsOfTables((tables[0], None, True, [tables[1], (tables[2], 0.5)], Holder(tables[3])))
    for stream in (0, 7, 0, 7):
        run_on(monkeypatch, stream)
        streams.add_current()
    streams.add(SimpleNamespace(cuda_stream=7))
    streams.add(SimpleNamespace(cuda_stream=8))
    assert [stream for _, stream in recorded] == [0] * 4 + [7] * 4 + [8] * 4
    assert all(table is tables[number % 4] for number, (table, _) in enumerate(recorded))


def test_tables_on_the_host_need_no_streams(monkeypatch):
    told = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *args: told.append(args))
    run_on(monkeypatch, 3)
    streams = StreamsOfTables((torch.zeros(1),))
    streams.add_current()
    streams.add(SimpleNamespace(cuda_stream=7))
    assert not told


def test_layers_of_flex_are_told_of_streams_whenever_they_are_read(recorded, monkeypatch):
    slices = SliceTable([[0, 300, 0, 300, 1]])
    run_on(monkeypatch, 3)
    (layer,) = layers_of(slices, 300, 300, torch.device("cpu"))
    assert {id(table) for table, _ in recorded} == {id(table) for table in layer}
    recorded.clear()
    layers_of(slices, 300, 300, torch.device("cpu"))
    assert not recorded
    run_on(monkeypatch, 4)
    layers_of(slices, 300, 300, torch.device("cpu"))
    assert [stream for _, stream in recorded] == [4] * len(layer)
