# SPDX-License-Identifier: Apache-2.0
"""Errors that callers who catch ``AssertionError`` for bad arguments still catch."""


class MagiValueError(ValueError, AssertionError):
    """An argument has a value that cannot be right."""


class MagiTypeError(TypeError, AssertionError):
    """An argument has the wrong type."""
