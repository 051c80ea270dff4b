# SPDX-License-Identifier: Apache-2.0
"""Launches of Triton kernels that are found again, without a GPU: what they are launched with."""

from typing import Any

import pytest
import torch

from magi_attention.utils import triton


class Jitted:
    """Stands for a jitted kernel, and for what it compiles."""

    def __init__(self, compiles: bool = True) -> None:
        self.compiles = compiles
        self.first: list[tuple[Any, ...]] = []
        self.again: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*arguments: Any, stream: int | None = None, **constants: Any) -> "Jitted | None":
            (self.first if stream is None else self.again).append((grid, *arguments, *constants.values(), stream))
            return self if self.compiles else None

        return launch


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(triton, "_known", {})


def launch(kernel: Jitted, tensor: torch.Tensor, key: object) -> None:
    triton.launch(kernel, (3, 1, 1), (tensor, tensor), (5,), (8, 16), {"BLOCK": 4}, key)


def test_a_launch_is_made_again_with_other_addresses_and_free_integers_on_the_current_stream():
    kernel, tensor = Jitted(), torch.zeros(64)
    assert not triton.relaunch("key", -1, (0, 16), (5,))
    launch(kernel, tensor, "key")
    assert triton.relaunch("key", -1, (0, 16), (6,))
    assert kernel.again == [((3, 1, 1), 0, 16, 6, 8, 16, 4, 7)]
    assert not triton.relaunch("key", 0, (0, 16), (6,)), "another GPU has kernels of its own"
    assert not triton.relaunch("other key", -1, (0, 16), (6,))


def test_other_alignment_than_the_kernel_was_compiled_for_is_launched_anew():
    kernel, tensor = Jitted(), torch.zeros(64)
    launch(kernel, tensor[1:], "key")
    assert not triton.relaunch("key", -1, (0, 16), (5,))
    launch(kernel, tensor, "key")
    assert not triton.relaunch("key", -1, (16, 8), (5,))
    assert triton.relaunch("key", -1, (16, 32), (5,))


def test_what_compiles_nothing_or_has_no_key_is_not_kept():
    tensor = torch.zeros(64)
    launch(Jitted(compiles=False), tensor, "key")
    launch(Jitted(), tensor, None)
    assert not triton._known


def test_launches_are_forgotten_where_they_would_be_too_many(monkeypatch):
    monkeypatch.setattr(triton, "MOST_KNOWN", 3)
    kernel, tensor = Jitted(), torch.zeros(64)
    for number in range(5):
        launch(kernel, tensor, number)
        assert triton.relaunch(number, -1, (0, 0), (1,))
    assert len(triton._known) <= 3
