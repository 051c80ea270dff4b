# SPDX-License-Identifier: Apache-2.0
"""One line on a terminal that tells what is being done."""

import sys
import time

LEAST_INTERVAL_S = 0.1
"""Counts are shown no more often, so that showing them takes no time of what is measured."""


class StatusLine:
    """What is being done, each on the same line of stderr as the last; nothing where that is no terminal.

    Args:
        is_shown: whether to show anything at all; of several ranks, one does.
    """

    def __init__(self, is_shown: bool = True) -> None:
        self._is_shown = is_shown and sys.stderr.isatty()
        self._next = 0.0

    def show(self, text: str) -> None:
        """Show a text instead of the last one; an empty one clears the line."""
        if self._is_shown:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
            self._next = time.monotonic() + LEAST_INTERVAL_S

    def count(self, what: str, number: int, total: int) -> None:
        """Show how far something has come, from 1 to ``total``, unless something was shown just now."""
        if self._is_shown and (number == 1 or time.monotonic() >= self._next):
            self.show(f"{what} {number} of {total}")
