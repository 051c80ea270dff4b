# SPDX-License-Identifier: Apache-2.0
"""The ``magi`` command."""

import sys
from importlib.util import find_spec
from io import TextIOWrapper


def run() -> None:
    """Run the command line; what the machine lacks, be it libraries, memory or room on a disk, is told in one line."""
    missing = [name for name in ("typer", "rich", "matplotlib", "packaging") if find_spec(name) is None]
    if missing:
        sys.exit(f'magi: missing {", ".join(missing)}; run: pip install "magi-attention[cli]"')
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # where a terminal can't show a character, a ? will do
    from magi_attention.cli.main import app

    try:
        app()
    except OverflowError as error:
        sys.exit(f"magi: a number is too large: {error}")
    except (MemoryError, OSError) as error:
        sys.exit(f"magi: {str(error) or type(error).__name__}")
