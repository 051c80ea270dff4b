# SPDX-License-Identifier: Apache-2.0
"""Values computed from an immutable object and kept with it."""

from collections.abc import Callable
from typing import TypeVar

Derived = TypeVar("Derived")


class KeepsDerived:
    """Keeps what others derive from an immutable object for exactly as long as it lives, or until told to forget."""

    def derived(self, name: object, build: Callable[[], Derived]) -> Derived:
        """Return ``build()``, called once per ``name``."""
        known: dict[object, Derived] = self.__dict__.setdefault("_derived", {})
        try:
            return known[name]  # the name, which may be long, is hashed once
        except KeyError:
            pass
        value = known[name] = build()  # which another thread may drop at once
        return value

    def forget(self, name: object) -> None:
        """Drop one derived value, if it is there; it is built again when it is asked for."""
        self.__dict__.get("_derived", {}).pop(name, None)

    def forget_derived(self) -> None:
        """Drop all derived values; they are built again when they are asked for."""
        self.__dict__.pop("_derived", None)

    def __getstate__(self) -> object:
        """Leave derived values out of copies and pickles: they may be large, or tensors of this process's devices."""
        return {name: value for name, value in self.__dict__.items() if name != "_derived"}
