# SPDX-License-Identifier: Apache-2.0
"""Measured rates in the folder of ``MAGI_ATTENTION_CACHE_DIR``: one JSON file for each machine."""

import hashlib
import json
import logging
import os
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from magi_attention.env import general
from magi_attention.plan.rates import Rates
from magi_attention.runtime.machine import Machine

FORMAT = 1

logger = logging.getLogger(__name__)


def rates_path(machine: Machine) -> Path:
    """Where the rates of ``machine`` are kept."""
    digest = hashlib.sha256(repr((FORMAT, machine)).encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9]+", "-", machine.device)
    return _folder() / f"{name}-{machine.num_ranks}-{digest}.json"


def load_rates(machine: Machine) -> Rates | None:
    """The kept rates of ``machine``; None if there are none, or with a warning if the file is not what it should be."""
    path = rates_path(machine)
    try:
        entries = _read(path)
        if entries["machine"] != asdict(machine):
            raise ValueError(f"it is of another machine, {entries['machine']}")
        return Rates.from_json(entries["rates"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("measured rates in %s are ignored: %s", path, error)
        return None


def save_rates(machine: Machine, rates: Rates) -> Path | None:
    """Keep the rates of ``machine``; whoever reads the file meanwhile finds the old ones or the new.

    Returns the file, or None, with a warning, where it can't be written.
    """
    path = rates_path(machine)
    text = json.dumps({"format": FORMAT, "machine": asdict(machine), "rates": rates.to_json()}, indent=2) + "\n"
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}")  # only its owner could read a file of tempfile's
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        logger.warning("measured rates can't be kept in %s: %s", path, error)
        return None
    return path


def read_rates(path: Path) -> Rates:
    """The rates in a file that :func:`save_rates` wrote.

    Raises:
        ValueError: it holds something else; says what.
        OSError: it can't be read.
    """
    try:
        return Rates.from_json(_read(path)["rates"])
    except ValueError as error:
        raise ValueError(f"{path} holds no rates as `magi calibrate` writes them: {error}") from None


def newest_rates_path() -> Path | None:
    """The file of rates measured last on any machine that shares this folder; None if there is none."""
    return max(_folder().glob("*.json"), key=lambda path: path.stat().st_mtime, default=None)


def _folder() -> Path:
    return general.cache_dir() / "rates"


def _read(path: Path) -> dict[str, Any]:
    """The file's entries, of which there are all that are ever asked for.

    Raises:
        ValueError: it isn't of this format.
    """
    entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, dict) or entries.get("format") != FORMAT or not {"machine", "rates"} <= entries.keys():
        raise ValueError(f"it has no entries format={FORMAT}, machine and rates")
    return entries
