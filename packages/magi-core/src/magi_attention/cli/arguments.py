# SPDX-License-Identifier: Apache-2.0
"""What several subcommands do with their arguments; light to import, as the commands themselves."""

from pathlib import Path
from typing import NoReturn

import typer

from magi_attention.utils.folders import why_unwritable


def parse_degree(text: str) -> int | None:
    """Return the overlap degree, None for ``auto``."""
    if text == "auto":
        return None
    if not text.isdecimal():
        raise ValueError(f"--overlap-degree must be 0 or more, or auto, not {text}")
    from magi_attention.config import OverlapConfig

    if int(text) > (most := OverlapConfig().max_num_chunks):
        raise ValueError(f"--overlap-degree must be at most {most}, the pieces that remote rows come in, not {text}")
    return int(text)


def check_output(flag: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    """Refuse a path that nothing can be written to, or another kind of file, before anything is computed."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{flag} {path} must end in one of {', '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder; name a file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{flag} {path}: there is no folder {folder}; make it first")
    if reason := why_unwritable(folder):
        raise ValueError(f"{flag} {path} can't be written: {reason}; take another folder")


def fail(error: Exception) -> NoReturn:
    """Say what is wrong and how to put it right, without a traceback."""
    typer.echo(f"magi: {error}", err=True)
    raise typer.Exit(2)
