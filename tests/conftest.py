# SPDX-License-Identifier: Apache-2.0
"""Settings that every suite shares."""

import os

import pytest
from hypothesis import settings

# Before torch is first imported: many small ranks on few cores are slower, not faster, with threads of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``gpu`` or ``gpu(n)`` on a machine with fewer GPUs, one marked ``alone`` beside others."""
    if item.get_closest_marker("alone") and (sharing := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
        pytest.skip(f"needs its GPU to itself, {sharing} processes share it: run it with --numprocesses=0")
    if marker := item.get_closest_marker("gpu"):
        import torch

        needed = marker.args[0] if marker.args else 1
        if (present := torch.cuda.device_count()) < needed:
            pytest.skip(f"needs {needed} GPU(s), this machine has {present}")
