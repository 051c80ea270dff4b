# SPDX-License-Identifier: Apache-2.0
"""From which mean length of ranges on copy engines carry an exchange: measured per kind of GPU, or a first guess."""

import json
import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from magi_attention.env import general

logger = logging.getLogger(__name__)

FIRST_GUESS_BYTES = 1 << 20
# Copy engines leave all multiprocessors to attention; that is worth so much of the speed.
_ENOUGH = 0.9


@cache
def switch_bytes(device_name: str) -> int:
    """The mean length, as :mod:`magi_comm_grpcoll.calibrate` found it on such a GPU, or as first guessed."""
    path = _path(device_name)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["switch_bytes"]
        if not isinstance(found, int) or found < 1:
            raise ValueError(f"switch_bytes is {found!r}")
        return found
    except FileNotFoundError:
        return FIRST_GUESS_BYTES
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is ignored: %s", path, error)
        return FIRST_GUESS_BYTES


def choose_switch(copies: Mapping[int, float], push: Mapping[int, float]) -> int:
    """The least size from which on copy engines are nearly as fast as the kernel, given GB/s by size of a range."""
    sizes = sorted(copies)
    switch = 2 * sizes[-1]
    for size in reversed(sizes):
        if copies[size] < _ENOUGH * push[size]:
            break
        switch = size
    return switch


def keep_switch(device_name: str, rates: Mapping[str, Mapping[int, float]]) -> Path:
    """Keep what was measured: GB/s by transport and size of a range. Returns the file."""
    path = _path(device_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {"switch_bytes": choose_switch(rates["copy_engine"], rates["push"]), "gbs": rates}
    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    switch_bytes.cache_clear()
    return path


def _path(device_name: str) -> Path:
    return general.cache_dir() / "grpcoll" / f"{re.sub(r'[^A-Za-z0-9]+', '-', device_name)}.json"
