# SPDX-License-Identifier: Apache-2.0
"""The ``magi`` command."""

import sys
from importlib.util import find_spec


def run() -> None:
    """Run the command line; where the libraries that it draws with are missing, say how to install them."""
    missing = [name for name in ("typer", "rich", "matplotlib") if find_spec(name) is None]
    if missing:
        sys.exit(f'magi: missing {", ".join(missing)}; run: pip install "magi-attention[cli]"')
    from magi_attention.cli.main import app

    app()
