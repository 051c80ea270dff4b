# SPDX-License-Identifier: Apache-2.0
"""Folders that things are kept in."""

import tempfile
from pathlib import Path


def why_unwritable(folder: Path) -> str:
    """Say why no files can be put into a folder, which is made if it is missing; empty if they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)
