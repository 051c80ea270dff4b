# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a request, and what a user is told when none does."""

import logging
from types import SimpleNamespace

import pytest
import torch

from magi_attention.kernels import registry
from magi_attention.kernels.protocol import AttentionRequest, KernelBackend, Support
from magi_attention.kernels.registry import choose_backend, installed_backends

REQUEST = AttentionRequest(torch.device("cpu"), torch.float32, 4, 2, 64, 64)


class FakeBackend:
    def __init__(self, name: str, priority: int, reason: str = "") -> None:
        self.name, self.priority, self.reason = name, priority, reason

    def supports(self, request: AttentionRequest) -> Support:
        return Support(not self.reason, self.reason)


@pytest.fixture
def install(monkeypatch):
    """Pretend that exactly these backends are installed; an exception stands for one that cannot be imported."""

    def load(backend):
        if isinstance(backend, Exception):
            raise backend
        return backend

    def pretend(**backends):
        points = [SimpleNamespace(name=name, load=lambda b=backend: load(b)) for name, backend in backends.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "magi_attention.kernels" else [])
        monkeypatch.setattr(registry, "_logged", set())
        installed_backends.cache_clear()

    yield pretend
    installed_backends.cache_clear()


def test_the_core_installs_its_own_backends():
    backends = installed_backends()
    assert {"flex", "reference"} <= set(backends)
    assert all(isinstance(backend, KernelBackend) for backend in backends.values())
    assert choose_backend(REQUEST).name == "reference"


def test_the_greatest_priority_that_supports_the_request_wins(install):
    install(low=FakeBackend("low", 1), high=FakeBackend("high", 9), best=FakeBackend("best", 10, "too old a GPU"))
    assert choose_backend(REQUEST).name == "high"
    assert list(installed_backends()) == ["best", "high", "low"]


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


def test_an_unknown_name_is_answered_with_the_known_ones(install):
    install(reference=FakeBackend("reference", 0))
    with pytest.raises(ValueError, match=r"'fa9'.*auto.*ffa.*reference"):
        choose_backend(REQUEST, "fa9")


def test_every_refusal_is_reported_with_its_reason(install):
    install(a=FakeBackend("a", 1, "needs a GPU"), b=FakeBackend("b", 2, "head dim too large"))
    with pytest.raises(RuntimeError) as error:
        choose_backend(REQUEST)
    assert "a: needs a GPU" in str(error.value)
    assert "b: head dim too large" in str(error.value)
    with pytest.raises(RuntimeError, match="needs a GPU") as error:
        choose_backend(REQUEST, "a")
    assert "head dim" not in str(error.value)


def test_without_any_backend_that_is_said(install):
    install()
    with pytest.raises(RuntimeError, match="none is installed"):
        choose_backend(REQUEST)


def test_a_backend_that_cannot_be_imported_does_not_hide_the_others(install, caplog):
    install(broken=ImportError("libcuda.so.1"), reference=FakeBackend("reference", 0))
    assert choose_backend(REQUEST).name == "reference"
    assert "libcuda.so.1" in caplog.text
    with pytest.raises(RuntimeError, match=r"cannot be loaded.*libcuda"):
        choose_backend(REQUEST, "broken")


def test_each_new_choice_is_logged_once_with_what_was_passed_over(install, caplog):
    install(a=FakeBackend("a", 1), b=FakeBackend("b", 2, "no such GPU"))
    with caplog.at_level(logging.INFO, logger="magi_attention"):
        choose_backend(REQUEST)
        choose_backend(REQUEST)
    assert len(caplog.records) == 1
    assert "'a'" in caplog.text
    assert "not b: no such GPU" in caplog.text
