# SPDX-License-Identifier: Apache-2.0
"""How a run with emulated GPUs ends."""

import os
import sys

import pytest

_status = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_status] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End at once, with the run's own status.

    Emulated streams are threads, and those of lost ranks wait for ever by reading words of memory. An interpreter that
    ends as usual frees that memory under them, and crashed so after all tests had passed.
    """
    if _status in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[_status])
