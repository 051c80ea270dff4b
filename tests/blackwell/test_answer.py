# SPDX-License-Identifier: Apache-2.0
"""The Blackwell backend, not implemented yet, says so wherever somebody could meet it."""

import pytest
import torch

from magi_attention.kernels.protocol import AttentionRequest, KernelBackend
from magi_attention.kernels.registry import choose_backend, installed_backends
from magi_kernels_blackwell import BACKEND

REASON = "Blackwell kernels .* not implemented yet: use backend 'flex'"


def request(device: str) -> AttentionRequest:
    return AttentionRequest(torch.device(device), torch.bfloat16, 8, 2, 128, 128)


def test_backend_is_found_by_its_entry_point() -> None:
    assert isinstance(BACKEND, KernelBackend)
    assert installed_backends()["blackwell"] is BACKEND


@pytest.mark.parametrize("name", ["blackwell", "fa4"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_asking_for_it_by_name_gives_the_reason(name: str, device: str) -> None:
    with pytest.raises(RuntimeError, match=REASON):
        choose_backend(request(device), name)


def test_automatic_choice_passes_it_over() -> None:
    assert choose_backend(request("cpu")).name == "reference"


@pytest.mark.parametrize("method", [BACKEND.forward, BACKEND.backward])
def test_computing_with_it_gives_the_reason(method) -> None:
    with pytest.raises(RuntimeError, match=REASON):
        method(None, None, None)
