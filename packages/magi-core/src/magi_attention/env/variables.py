# SPDX-License-Identifier: Apache-2.0
"""The table of environment variables, filled by the functions that read them."""

import functools
import inspect
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TypeVar

from magi_attention.common.errors import MagiValueError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Variable:
    """One environment variable, as the documentation shows it.

    Attributes:
        name: the variable's name.
        default: the text that stands for an unset or empty variable; empty if there is none.
        meaning: what it does.
        ignored: whether it is accepted without any effect.
        reader: the function that reads it, as ``module.function`` below :mod:`magi_attention.env`.
    """

    name: str
    default: str
    meaning: str
    ignored: bool
    reader: str


VARIABLES: dict[str, Variable] = {}


def variable(
    name: str, default: str = "0", *, ignored: bool = False
) -> Callable[[Callable[[str], Value]], Callable[[], Value]]:
    """Turn a parser of a variable's text into a function without arguments that reads ``name``, and list it.

    The parser's docstring becomes the variable's meaning. A ``ValueError`` of the parser is raised again with the
    variable's name and text.
    """

    def register(parse: Callable[[str], Value]) -> Callable[[], Value]:
        @functools.wraps(parse, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
        def read() -> Value:
            text = os.environ.get(name, "").strip()
            try:
                return parse(text or default)
            except ValueError as error:
                raise MagiValueError(f"environment variable {name}={text!r}: {error}") from None

        del read.__dict__["__wrapped__"]  # else help() and Sphinx would show the parser's parameter
        meaning = " ".join(inspect.cleandoc(parse.__doc__ or "").split())
        module = parse.__module__.rpartition(".")[2]
        VARIABLES[name] = Variable(name, default, meaning, ignored, f"{module}.{parse.__name__}")
        return read

    return register


def parse_flag(text: str) -> bool:
    """Read a switch: ``1`` is on, anything else off."""
    return text == "1"


def parse_int(text: str, minimum: int | None = None) -> int:
    """Read a whole number, at least ``minimum``."""
    least = "" if minimum is None else f", at least {minimum}"
    try:
        number = int(text)
    except ValueError:
        raise ValueError(f"not a whole number{least}") from None
    if minimum is not None and number < minimum:
        raise ValueError(f"must be a whole number{least}")
    return number


def parse_choice(text: str, choices: Collection[str]) -> str:
    """Read one of ``choices``, whatever its case."""
    if text.lower() not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}")
    return text.lower()


def parse_folder(text: str) -> Path:
    """Read a folder; ``~`` is the user's home."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # as in containers that run under a number without a user
        raise ValueError(f"there is no home folder for {text}; set it to a folder that can be written") from None


def texts_set() -> dict[str, str]:
    """The texts of all variables in the table that are set, and of others whose names look as if they belonged."""
    ours = [name for name in os.environ if name in VARIABLES or name.startswith("MAGI_ATTENTION_")]
    return {name: os.environ[name] for name in sorted(ours) if os.environ[name].strip()}


def read_variable(name: str) -> object:
    """Return the value of a variable of the table.

    Raises:
        ValueError: its text makes no sense.
    """
    module, function = VARIABLES[name].reader.split(".")
    value: object = getattr(import_module(f"magi_attention.env.{module}"), function)()
    return value


def check_texts() -> None:
    """Read all variables that are set, but for those that are ignored.

    Raises:
        ValueError: the text of one makes no sense.
    """
    for name in texts_set():
        if name in VARIABLES and not VARIABLES[name].ignored:
            read_variable(name)


def is_set(name: str) -> bool:
    """Whether a variable has any text at all."""
    return bool(os.environ.get(name, "").strip())
