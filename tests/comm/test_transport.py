# SPDX-License-Identifier: Apache-2.0
"""The native transport as the core finds and asks it, without a GPU."""

import json
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
from cuda.bindings import driver

from magi_attention.comm import GroupCollectives
from magi_attention.comm.registry import make_collectives
from magi_attention.config import DistAttnConfig, RuntimeConfig
from magi_comm_grpcoll import ContextOptions, NativeCollectives
from magi_comm_grpcoll.capability import SHARING, Needs, agree, reason_against
from magi_comm_grpcoll.kernels import missing_kernels
from tests.distributed.exchanges import RandomNeeds, random_tensor, two_hop


def test_transport_is_found_by_its_entry_point() -> None:
    (point,) = entry_points(group="magi_attention.comm", name="native")
    assert point.load() is NativeCollectives


def test_it_supports_gpus_and_says_why_not_the_cpu() -> None:
    support = NativeCollectives.supports(torch.device("cuda", 0))
    assert support.ok == (not support.reason)
    support = NativeCollectives.supports(torch.device("cpu"))
    assert not support
    assert "needs CUDA GPUs, not cpu: switch native_grpcoll off" in support.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_asking_for_it_by_configuration_gives_the_reason() -> None:
    config = DistAttnConfig(runtime_config=RuntimeConfig(native_grpcoll=True))
    with pytest.raises(RuntimeError, match="native_grpcoll can't be used on cpu: it needs CUDA GPUs, not cpu"):
        make_collectives(None, None, config)


def test_alone_nothing_has_to_travel() -> None:
    native, needs = NativeCollectives(None), RandomNeeds(seed=4, num_ranks=1)
    assert isinstance(native, GroupCollectives)
    rows = random_tensor(0, (int(needs.num_rows[0]), 3), torch.float32)
    (received,) = native.cast([rows], needs.table(0), lend=True).wait()
    assert torch.equal(received, needs.received([rows], 0))
    with pytest.raises(TypeError, match="two-hop"):
        native.cast([rows], two_hop(RandomNeeds(seed=3, num_ranks=4), 0, 2))


def test_missing_kernels_name_the_fix(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("magi_comm_grpcoll.kernels.FOLDER", tmp_path)
    assert "without its CUDA kernels" in missing_kernels()
    assert "with nvcc on PATH" in missing_kernels()
    assert "it needs CUDA GPUs, not cpu" in reason_against(torch.device("cpu"))


def test_an_allocator_without_pools_is_refused_before_anything_is_allocated(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert "without backend:cudaMallocAsync in" in reason_against(torch.device("cuda", 0))


def test_another_module_named_cuda_is_told(monkeypatch, tmp_path):
    (tmp_path / "cuda.py").touch()
    for name in [each for each in sys.modules if each.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    reason = reason_against(torch.device("cuda", 0))
    assert reason.startswith("cuda.core cannot be imported")
    assert reason.endswith('pip install "magi-comm-grpcoll"')


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch) -> None:
    asked = []

    def attribute_of(attribute: object, device: driver.CUdevice) -> tuple[driver.CUresult, int]:
        asked.append(int(device))
        return driver.CUresult.CUDA_SUCCESS, 1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr("magi_comm_grpcoll.capability.missing_kernels", lambda: "")
    monkeypatch.setattr("magi_comm_grpcoll.driver.driver", lambda: None)
    monkeypatch.setattr(driver, "cuDeviceGetAttribute", attribute_of)
    assert all(NativeCollectives.supports(torch.device(name)) for name in ("cuda", "cuda:1"))
    assert asked == [3, 1]


class Mirror:
    """Every rank of the group answers as this one does."""

    def exchange(self, message: bytes) -> list[bytes]:
        return [message] * 2


class OfTwoHosts:
    """The other rank has another GPU on another host."""

    def exchange(self, message: bytes) -> list[bytes]:
        return [message, json.dumps({**json.loads(message), "host": "other", "device": "other"}).encode()]


def test_ranks_share_a_gpu_only_when_told_to(monkeypatch) -> None:
    monkeypatch.setattr("magi_comm_grpcoll.capability.reason_against", lambda device: "")
    monkeypatch.delenv(SHARING, raising=False)
    assert f"several of its ranks share one GPU (for tests, set {SHARING}=1" in agree(Mirror(), torch.device("cpu"))
    monkeypatch.setenv(SHARING, "1")
    assert not agree(Mirror(), torch.device("cpu"))


def test_puts_need_nvshmem_and_reach_other_hosts(monkeypatch, tmp_path) -> None:
    cpu, needs = torch.device("cpu"), Needs(nvshmem=True, one_host=False)
    monkeypatch.setattr("magi_comm_grpcoll.capability.reason_against", lambda device: "")
    monkeypatch.setattr("magi_comm_grpcoll.capability.reason_against_nvshmem", lambda: "NVSHMEM is not there")
    monkeypatch.setattr("magi_comm_grpcoll.capability.missing_kernels", lambda fatbins: "")
    assert agree(Mirror(), cpu, needs) == "on rank 0 NVSHMEM is not there"
    assert "on rank 0 no mlx5 network adapter is visible" in agree(OfTwoHosts(), cpu, Needs(one_host=False))
    monkeypatch.setattr("magi_comm_grpcoll.capability.reason_against_network", lambda: "")
    assert not agree(OfTwoHosts(), cpu, Needs(one_host=False))
    assert agree(OfTwoHosts(), cpu) == "its ranks are on 2 hosts, and a context is for one"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transport": "pigeon"}, "transport must be 'copy_engine', 'push', 'put' or None, not 'pigeon'"),
        ({"allocator": "malloc"}, "allocator must be 'torch', 'nvshmem' or None, not 'malloc'"),
        ({"transport": "put", "allocator": "torch"}, "transport 'put' needs the memory of allocator 'nvshmem'"),
        ({"transport": "put", "capacity_bytes": 8 << 20}, "capacity_bytes gives none of 3 slots 2 MiB: 8388608"),
        ({"capacity_bytes": -1}, "capacity_bytes gives none of 2 slots 2 MiB: -1"),
        ({"num_slots": 0}, "num_slots must be at least 1, not 0"),
        ({"timeout_s": 0.0}, "timeout_s must be positive, not 0.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextOptions(**options)  # type: ignore[arg-type]


def test_who_says_when_rows_are_there_is_handed_on() -> None:
    native, table, given = NativeCollectives(None), RandomNeeds(0, 2).table(0), []
    native.context = SimpleNamespace(reduce=lambda *arguments: given.extend(arguments))
    arguments = [torch.zeros(1)], table, [torch.zeros(1)], "sum", None, None, object(), object()
    native.reduce(*arguments)
    assert given == [*arguments]
