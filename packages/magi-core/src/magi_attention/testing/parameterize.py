# SPDX-License-Identifier: Apache-2.0
"""A decorator that loops over values inside one test, so that costly set-up is paid once."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def parameterize(name: str, values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call the decorated test once per value of its argument ``name``. May be stacked; the outermost loops slowest."""
    choices = list(values)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def loop(*args: Any, **kwargs: Any) -> None:
            for value in choices:
                test(*args, **kwargs, **{name: value})

        # Test runners read the signature: the looped argument must not look like a fixture.
        signature = inspect.signature(test)
        rest = [parameter for parameter in signature.parameters.values() if parameter.name != name]
        loop.__signature__ = signature.replace(parameters=rest)  # type: ignore[attr-defined]
        return loop

    return decorate
