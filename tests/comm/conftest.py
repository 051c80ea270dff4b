# SPDX-License-Identifier: Apache-2.0
"""What tests of native collectives share."""

import pytest

from tests.comm.emulation import emulate


@pytest.fixture
def emulated(monkeypatch):
    """GPUs that are threads; see :mod:`tests.comm.emulation`."""
    with emulate(monkeypatch):
        yield
