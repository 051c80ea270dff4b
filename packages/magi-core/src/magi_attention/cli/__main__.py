# SPDX-License-Identifier: Apache-2.0
"""``python -m magi_attention.cli`` is ``magi``."""

from magi_attention.cli import run

if __name__ == "__main__":
    run()
