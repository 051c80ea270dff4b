# SPDX-License-Identifier: Apache-2.0
"""Checks of the fields of config classes, and of numbers that calls take. Each error names what it is and the value."""

import math
import operator
from collections.abc import Sequence
from contextlib import suppress
from numbers import Real
from typing import Any

from magi_attention.common.errors import MagiTypeError, MagiValueError


def check_type(config: object, name: str, *types: type) -> Any:
    """Return a field's value if it is of one of ``types``; a ``bool`` does not pass for an ``int``.

    The number of another library, as numpy's or a tensor of one integer, becomes a plain one in the field too.
    """
    value = _plain_number(getattr(config, name), types)
    object.__setattr__(config, name, value)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
        raise MagiTypeError(f"{type(config).__name__}.{name} must be {wanted}, not {value!r}")
    return value


def _plain_number(value: Any, types: Sequence[type]) -> Any:
    """The number as an ``int`` or ``float``, where it is one that ``types`` ask for, so that all print it alike."""
    if type(value) in (*types, bool):
        return value
    if int in types:
        with suppress(TypeError):
            return operator.index(value)
    return float(value) if float in types and isinstance(value, Real) else value


def check_positive(config: object, names: Sequence[str], *types: type) -> None:
    """Refuse fields that aren't of one of ``types``, positive and finite; None passes where its type is allowed."""
    for name in names:
        value = check_type(config, name, *types)
        if value is not None and not 0 < value < math.inf:
            wanted = "finite" if value == math.inf else "positive"
            raise MagiValueError(f"{type(config).__name__}.{name} must be {wanted}, not {value!r}")


def check_share(config: object, name: str) -> None:
    """Refuse a field that isn't a number in [0, 1]."""
    if not 0 <= check_type(config, name, int, float) <= 1:
        raise MagiValueError(f"{type(config).__name__}.{name} must lie in [0, 1], not {getattr(config, name)!r}")


def check_scores(softmax_scale: float | None, softcap: float) -> None:
    """Refuse what no scores can be scaled or capped by, tensors among it: no gradients would flow to them."""
    for name, number in (("softmax_scale", softmax_scale), ("softcap", softcap)):
        if not isinstance(number, Real) and not (number is None and name == "softmax_scale"):
            raise MagiTypeError(
                f"{name} must be a number, not {type(number).__name__}; multiply q by a factor that is learned"
            )
    if not 0 <= softcap < math.inf:
        raise MagiValueError(f"softcap is {softcap}; it must be positive and finite, or 0 for none")
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise MagiValueError(f"softmax_scale is {softmax_scale}; it must be finite, or None for head_dim ** -0.5")


def check_sm_margin(sm_margin: int) -> None:
    """Refuse what cannot be a number of multiprocessors."""
    if not isinstance(sm_margin, int) or isinstance(sm_margin, bool):
        raise MagiTypeError(f"sm_margin must be int, not {sm_margin!r}")
    if sm_margin < 0:
        raise MagiValueError(f"sm_margin must be at least 0, not {sm_margin}")
