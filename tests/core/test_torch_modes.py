# SPDX-License-Identifier: Apache-2.0
"""PyTorch's modes, and the GPU that is current."""

import threading
from types import SimpleNamespace

import torch

from magi_attention.utils.torch_modes import on_device_of


def test_the_first_launch_of_a_thread_has_a_context(monkeypatch):
    """In a new thread PyTorch knows a current GPU, but the driver has none until the CUDA runtime is called there."""
    callers = []
    stream = SimpleNamespace(record_event=lambda: callers.append(threading.current_thread().name))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    x = SimpleNamespace(is_cuda=True, get_device=lambda: 0)

    def launch():
        for _ in range(3):
            with on_device_of(x):
                assert callers[-1] == threading.current_thread().name

    for name in ("forward", "backward"):
        thread = threading.Thread(target=launch, name=name)
        thread.start()
        thread.join()
    assert callers == ["forward", "backward"]
