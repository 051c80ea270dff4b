# SPDX-License-Identifier: Apache-2.0
"""Values computed from an immutable object and kept with it."""

from collections.abc import Callable
from typing import TypeVar

Derived = TypeVar("Derived")


class KeepsDerived:
    """Keeps what others derive from an immutable object for exactly as long as it lives, or until told to forget."""

    def derived(self, name: object, build: Callable[[], Derived]) -> Derived:
        """Return ``build()``, called once per ``name``."""
        known = self.__dict__.setdefault("_derived", {})
        if name not in known:
            known[name] = build()
        return known[name]

    def forget_derived(self) -> None:
        """Drop all derived values; they are built again when they are asked for."""
        self.__dict__.pop("_derived", None)
