# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a request in which direction, and what a user is told when none does."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from magi_attention.common.slices import SliceTable
from magi_attention.env import general
from magi_attention.kernels import registry
from magi_attention.kernels.protocol import AttentionRequest, KernelBackend, Support
from magi_attention.kernels.registry import (
    backends_for_slices,
    choose_backend,
    choose_backends,
    choose_for_indices,
    explain_choice,
    installed_backends,
)

REQUEST = AttentionRequest(torch.device("cpu"), torch.float32, 4, 2, 64, 64)


class FakeBackend:
    """Refuses with ``reason`` if there is one; as fast as ``forward`` and ``backward``, by mask class if a dict."""

    def __init__(self, name: str, forward: float | dict, backward: float | None = None, reason: str = "") -> None:
        self.name, self.reason = name, reason
        self.speeds = {"forward": forward, "backward": forward if backward is None else backward}

    def supports(self, request: AttentionRequest) -> Support:
        return Support(not self.reason, self.reason)

    def expected_tflops(self, request: AttentionRequest) -> float:
        speed = self.speeds[request.direction]
        return speed[request.mask_class] if isinstance(speed, dict) else speed


@pytest.fixture
def install(monkeypatch):
    """Pretend that exactly these backends are installed; an exception stands for one that cannot be imported."""

    def load(backend):
        if isinstance(backend, BaseException):
            raise backend
        return backend

    def pretend(**backends):
        points = [SimpleNamespace(name=name, load=lambda b=backend: load(b)) for name, backend in backends.items()]

        def entry_points(group):
            return points if group == "magi_attention.kernels" else []

        monkeypatch.setattr(registry, "entry_points", entry_points)
        monkeypatch.setattr(general, "metadata", SimpleNamespace(entry_points=entry_points))
        monkeypatch.setattr(registry, "_logged", set())
        installed_backends.cache_clear()

    yield pretend
    installed_backends.cache_clear()


def test_the_core_installs_its_own_backends():
    backends = installed_backends()
    assert {"flex", "reference"} <= set(backends)
    assert all(isinstance(backend, KernelBackend) for backend in backends.values())
    assert choose_backend(REQUEST).name == "reference"


def test_the_fastest_that_supports_the_request_wins(install):
    install(slow=FakeBackend("slow", 1), fast=FakeBackend("fast", 9), best=FakeBackend("best", 10, reason="old GPU"))
    assert choose_backend(REQUEST).name == "fast"
    choice = explain_choice(REQUEST)
    assert (choice.speeds, choice.refusals) == ({"fast": 9, "slow": 1}, {"best": "old GPU"})


def test_each_direction_has_its_own_backend(install):
    install(a=FakeBackend("a", 2, 1), b=FakeBackend("b", 1, 2))
    assert [backend.name for backend in choose_backends(REQUEST)] == ["a", "b"]
    assert [backend.name for backend in choose_backends(REQUEST, "b")] == ["b", "b"]
    assert [backend.name for backend in choose_backends(REQUEST, "auto", "A")] == ["a", "a"]
    assert [backend.name for backend in choose_backends(REQUEST, "b", "auto")] == ["b", "b"]


def test_the_backward_pass_is_asked_for_without_max_logits(install):
    class NoLogits(FakeBackend):
        def supports(self, request: AttentionRequest) -> Support:
            return Support(not request.max_logits, "no max_logits")

    install(plain=FakeBackend("plain", 1), quick=NoLogits("quick", 5))
    assert [backend.name for backend in choose_backends(replace(REQUEST, max_logits=True))] == ["plain", "quick"]


def test_the_class_of_the_mask_decides(install):
    install(a=FakeBackend("a", {"full": 2, "causal": 1}), b=FakeBackend("b", {"full": 1, "causal": 2}))
    full, causal = SliceTable([[0, 9, 0, 9, 0]]), SliceTable([[0, 9, 0, 9, 1]])
    assert backends_for_slices(full, REQUEST).forward.name == "a"
    assert backends_for_slices(causal, REQUEST).forward.name == "b"


def test_the_size_of_the_mask_decides_and_is_not_logged(install, caplog):
    class Short(FakeBackend):
        def expected_tflops(self, request: AttentionRequest) -> float:
            return 1 if request.num_pairs is None or request.num_pairs > 100 else 9

    install(long=FakeBackend("long", 5), short=Short("short", 0))
    with caplog.at_level("INFO"):
        masks = [SliceTable([[0, size, 0, size, 0]]) for size in (9, 10, 11, 12)]
        chosen = [backends_for_slices(each, REQUEST).forward.name for each in masks]
    assert chosen == ["short", "short", "long", "long"]
    assert len([line for line in caplog.messages if line.startswith("Kernel backends")]) == 2
    assert choose_backend(REQUEST).name == "long"


def test_a_choice_is_made_once_per_mask(install):
    install(a=FakeBackend("a", 1))
    slices = SliceTable([[0, 9, 0, 9, 0]])
    first = backends_for_slices(slices, REQUEST)
    install()
    assert backends_for_slices(slices, REQUEST) is first


@pytest.fixture
def speeds(tmp_path, monkeypatch):
    def write(entries: object) -> None:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
        monkeypatch.setenv("MAGI_ATTENTION_KERNEL_SPEEDS", str(path))

    return write


def test_measured_figures_override_those_of_the_backends(install, speeds):
    install(a=FakeBackend("a", 3), b=FakeBackend("b", 2))
    speeds(
        [
            {"backend": "b", "tflops": 1},
            {"backend": "b", "tflops": 5, "direction": "backward", "arch": "cpu", "head_dim": 64},
            {"backend": "b", "tflops": 9, "direction": "forward", "mask_class": "causal"},
            {"backend": "b", "tflops": 99, "arch": "sm_90"},
        ]
    )
    assert [backend.name for backend in choose_backends(REQUEST)] == ["a", "b"]
    assert [backend.name for backend in choose_backends(replace(REQUEST, mask_class="causal"))] == ["b", "b"]
    assert [backend.name for backend in choose_backends(replace(REQUEST, head_dim=128))] == ["a", "a"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("no json", "not a readable JSON"),
        ({}, "must hold a list, not dict"),
        ([{"backend": "a", "tflops": 1}, {"backend": "a"}], "entry 1: must be an object with backend and tflops"),
        ([{"backend": "a", "tflops": 1, "mask": "full"}], "mask_class"),
        ([{"backend": "a", "tflops": "1"}], "number of at least 0, got '1'"),
        ([{"backend": "a", "tflops": 1, "direction": "up"}], "forward or backward, got 'up'"),
        ([{"backend": "a", "tflops": 1, "mask_class": "odd"}], "one of full, causal.*got 'odd'"),
        ([{"backend": "refrence", "tflops": 1}], "backend must be one of .*reference.*got 'refrence'"),
        ([{"backend": ["a"], "tflops": 1}], "backend must be of type str"),
        ([{"backend": "a", "tflops": 1, "arch": 90}], "arch must be of type str, got 90"),
        ([{"backend": "a", "tflops": 1, "head_dim": "64"}], "head_dim must be of type int, got '64'"),
        ([{"backend": "a", "tflops": 1, "arch": "SM90"}], "arch must be written as sm_90 .*got 'SM90'"),
    ],
)
def test_a_file_of_figures_that_makes_no_sense(install, speeds, entries, message):
    install(a=FakeBackend("a", 3))
    speeds(entries)
    with pytest.raises(ValueError, match=f"MAGI_ATTENTION_KERNEL_SPEEDS=.*{message}"):
        choose_backend(REQUEST)


def test_figures_of_names_that_the_original_has(install, speeds):
    install(hopper=FakeBackend("hopper", 1), blackwell=FakeBackend("blackwell", 2))
    speeds([{"backend": "ffa", "tflops": 3}])
    assert choose_backend(REQUEST).name == "hopper"


def test_a_file_of_figures_that_is_not_there(install, monkeypatch):
    install(a=FakeBackend("a", 3))
    monkeypatch.setenv("MAGI_ATTENTION_KERNEL_SPEEDS", "/nowhere.json")
    with pytest.raises(ValueError, match=r"/nowhere\.json: not a readable"):
        choose_backend(REQUEST)


@pytest.mark.parametrize("name", ["sdpa", "sdpa_ol", "SDPA", "reference"])
def test_names_of_the_original_lead_to_the_reference(name):
    assert choose_backend(REQUEST, name).name == "reference"


def test_a_missing_wheel_is_named_with_its_install_command(install):
    install(reference=FakeBackend("reference", 0))
    for name, extra in (("ffa", "hopper"), ("hopper", "hopper"), ("fa4", "blackwell")):
        with pytest.raises(RuntimeError, match=rf"{name}.*pip install 'magi-attention\[{extra}\]'"):
            choose_backend(REQUEST, name)


def test_an_alias_leads_to_an_installed_wheel(install):
    install(hopper=FakeBackend("hopper", 5))
    assert choose_backend(REQUEST, "ffa").name == "hopper"
    install(hopper=FakeBackend("hopper", 5), ffa=FakeBackend("ffa", 1))
    assert choose_backend(REQUEST, "ffa").name == "ffa"


def test_an_unknown_name_is_answered_with_the_known_ones(install):
    install(reference=FakeBackend("reference", 0))
    with pytest.raises(ValueError, match=r"'fa9'.*auto.*ffa.*reference"):
        choose_backend(REQUEST, "fa9")


def test_every_refusal_is_reported_with_its_reason(install):
    install(a=FakeBackend("a", 1, reason="needs a GPU"), b=FakeBackend("b", 2, reason="head dim too large"))
    with pytest.raises(RuntimeError) as error:
        choose_backend(REQUEST)
    assert "a: needs a GPU" in str(error.value)
    assert "b: head dim too large" in str(error.value)
    with pytest.raises(RuntimeError, match="needs a GPU") as error:
        choose_backend(REQUEST, "a")
    assert "head dim" not in str(error.value)


def test_without_any_backend_that_is_said(install):
    install()
    with pytest.raises(RuntimeError, match="none is found, so install magi-attention by pip"):
        choose_backend(REQUEST)


@pytest.mark.parametrize("error", [ImportError("libcuda.so.1"), SystemExit("no libcuda.so.1")], ids=repr)
def test_a_backend_that_cannot_be_imported_does_not_hide_the_others(install, caplog, error):
    install(broken=error, reference=FakeBackend("reference", 0))
    assert choose_backend(REQUEST).name == "reference"
    assert "libcuda.so.1" in caplog.text
    with pytest.raises(RuntimeError, match=r"cannot be loaded.*libcuda"):
        choose_backend(REQUEST, "broken")


class FakeIndexBackend(FakeBackend):
    """With kernels for index attention that serve what the others do."""

    supports_indices = FakeBackend.supports

    def forward_indices(self, *args: object) -> None:
        """Never called, as is the next."""

    backward_indices = forward_indices


@pytest.mark.parametrize(
    ("reason", "name", "expected"),
    [
        ("", "auto", "forward 'b', backward 'b'"),
        (
            "no such GPU",
            "auto",
            "forward plain PyTorch (not b: no such GPU), backward plain PyTorch (not b: no such GPU)",
        ),
        ("", "a", "forward plain PyTorch (no backend in question has a kernel), backward plain PyTorch (no backend"),
    ],
)
def test_what_computes_index_attention_is_logged_once_with_the_reason(install, caplog, reason, name, expected):
    backend = FakeIndexBackend("b", 1, reason=reason)
    install(a=FakeBackend("a", 1), b=backend)
    with caplog.at_level(logging.INFO, logger="magi_attention"):
        for _ in range(2):
            chosen = choose_for_indices(REQUEST, name)
    assert set(chosen) == {backend if "'b'" in expected else None}
    assert len(caplog.records) == 1
    assert expected in caplog.text


def test_each_new_choice_is_logged_once_with_what_was_passed_over(install, caplog):
    install(a=FakeBackend("a", 1), b=FakeBackend("b", 2, reason="no such GPU"))
    with caplog.at_level(logging.INFO, logger="magi_attention"):
        choose_backends(REQUEST)
        choose_backends(REQUEST)
    assert len(caplog.records) == 1
    assert "forward 'a' (expected 1 TFLOP/s; not b: no such GPU), backward 'a'" in caplog.text
