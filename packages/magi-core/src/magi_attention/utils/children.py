# SPDX-License-Identifier: Apache-2.0
"""Processes that were started by another."""

import os
from multiprocessing import parent_process
from threading import Thread


def end_with_parent() -> None:
    """End this process, whatever it is at, when the one ends that started it by ``multiprocessing``.

    A parent that is killed leaves its children at work otherwise.
    """
    Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
