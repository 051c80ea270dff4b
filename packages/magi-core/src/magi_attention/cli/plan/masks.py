# SPDX-License-Identifier: Apache-2.0
"""Masks from a name, a file of documents' ends or a file of slices, with errors that say where a file is wrong."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magi_attention.api.masks import infer_attn_mask_from_cu_seqlens
from magi_attention.cli.plan.options import PlanOptions
from magi_attention.common import packed, workloads
from magi_attention.common.enum import AttnMaskType
from magi_attention.common.slices import MOST_ROWS, SliceTable, find_double_cover

SLICE_EXAMPLE = '[0, 4096, 0, 4096, "causal"] or {"q": [0, 4096], "k": [0, 4096], "type": "causal"}'
TYPES = {kind.value: number for number, kind in enumerate(AttnMaskType)}


@dataclass(frozen=True, eq=False)
class NamedMask:
    """A mask over ``tokens`` queries and as many keys or, of another sequence, ``tokens_k``; and what to call it."""

    name: str
    slices: SliceTable
    tokens: int
    tokens_k: int | None = None

    @property
    def num_keys(self) -> int:
        """Rows of the sequence of keys."""
        return self.tokens if self.tokens_k is None else self.tokens_k

    @property
    def size(self) -> str:
        """How many rows there are, in words."""
        if self.tokens_k is None:
            return f"{self.tokens:,} tokens"
        return f"{self.tokens:,} queries and {self.tokens_k:,} keys"


def read_mask(options: PlanOptions) -> NamedMask:
    """Build or read the mask that the options name.

    Raises:
        ValueError: if there is no such mask, a file does not hold what it should, two slices keep a common pair, or no
            pair is kept at all.
    """
    if options.mask is not None:
        assert options.tokens is not None
        name = options.mask.replace("-", "_")
        mask = NamedMask(name, workloads.make(name, options.tokens), options.tokens)
    elif options.cu_seqlens is not None and options.cu_seqlens_k is not None:
        mask = _read_documents_of_two(options, options.cu_seqlens, options.cu_seqlens_k)
    elif options.cu_seqlens is not None:
        ends = read_cu_seqlens(options.cu_seqlens)
        left, right = options.window or (-1, -1 if options.causal is False else 0)
        mask = NamedMask(options.cu_seqlens.name, packed.sliding_window(ends, left, right), int(ends[-1]))
    else:
        assert options.slices is not None
        mask = _with_lengths(read_slices(options.slices), options.slices, options.tokens, options.tokens_k)
    if (rows := max(mask.tokens, mask.num_keys)) > MOST_ROWS:
        raise ValueError(f"the mask {mask.name} has {rows} rows; a sequence can have {MOST_ROWS} at most")
    if not mask.slices.area():
        raise ValueError(f"the mask {mask.name} keeps no pair: no query sees any key")
    return mask


def _read_documents_of_two(options: PlanOptions, queries: Path, keys: Path) -> NamedMask:
    """Documents whose queries and keys are of two sequences."""
    ends, ends_k = read_cu_seqlens(queries), read_cu_seqlens(keys)
    if len(ends) != len(ends_k):
        raise ValueError(
            f"{queries} holds {len(ends)} numbers and {keys} {len(ends_k)}: both need the ends of the same documents"
        )
    q_ranges, k_ranges, types, tokens, tokens_k = infer_attn_mask_from_cu_seqlens(
        ends.tolist(), ends_k.tolist(), bool(options.causal), options.window or (-1, -1)
    )
    kinds = [each.to_int_type() for each in types]
    slices = SliceTable.from_lists(q_ranges.to_naive_ranges(), k_ranges.to_naive_ranges(), kinds)
    return NamedMask(f"{queries.name} to {keys.name}", slices, tokens, tokens_k)


def read_cu_seqlens(path: Path) -> NDArray[np.int64]:
    """Read the documents' cumulative lengths, from 0: a .npy array, a .json list, or text with blanks or commas."""
    numbers = {".npy": _read_npy, ".json": _read_json_integers}.get(path.suffix.lower(), _read_text)(path)
    if len(numbers) < 2:
        raise ValueError(f"{path} holds {len(numbers)} numbers; it needs 0 and the end of at least one document")
    if numbers[0] != 0:
        raise ValueError(
            f"{path}, entry 1: the first number must be 0, not {numbers[0]}; then comes the end of each document "
            "(the running sum of the lengths)"
        )
    for entry, (before, end) in enumerate(pairwise(numbers), 2):
        if end < before:
            raise ValueError(
                f"{path}, entry {entry}: {end} is less than {before} before it; the numbers must be the running sum of "
                "the documents' lengths"
            )
        _check_row(end, f"{path}, entry {entry}")
    return np.array(numbers, np.int64)


def _read_npy(path: Path) -> list[int]:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a .npy file of numbers: {error}") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{path} must hold one dimension of integers, not shape {array.shape} of {array.dtype}; save it with "
            "numpy.save(file, numpy.array(cu_seqlens))"
        )
    numbers: list[int] = array.tolist()
    return numbers


def _read_json_integers(path: Path) -> list[int]:
    values = _read_json_list(path, "integers, such as [0, 4096, 10240]")
    for entry, value in enumerate(values, 1):
        if type(value) is not int:
            raise ValueError(f"{path}, entry {entry}: {json.dumps(value)} is not an integer")
    return values


def _read_text(path: Path) -> list[int]:
    numbers = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        for word in line.replace(",", " ").split():
            try:
                numbers.append(int(word))
            except ValueError:
                raise ValueError(f"{path}, line {number}: {word!r} is not an integer") from None
    return numbers


def read_slices(path: Path) -> SliceTable:
    """Read a JSON list of slices, each a list or an object; no two may keep a common pair."""
    entries = _read_json_list(path, f"slices, such as {SLICE_EXAMPLE}")
    slices = SliceTable([_parse_slice(entry, f"{path}, slice {number}") for number, entry in enumerate(entries, 1)])
    doubled = find_double_cover(slices)
    if doubled is not None:
        first, second = (f"slice {index + 1} {json.dumps(entries[index])}" for index in doubled)
        raise ValueError(f"{path}: {first} and {second} keep a common pair of query and key; each may be kept once")
    return slices


def _parse_slice(entry: Any, place: str) -> list[int]:
    if isinstance(entry, dict):
        if unknown := sorted(set(entry) - {"q", "k", "type"}):
            raise ValueError(f"{place}: unknown {', '.join(unknown)}; a slice is {SLICE_EXAMPLE}")
        queries, keys = entry.get("q"), entry.get("k")
        if not (isinstance(queries, list) and isinstance(keys, list) and len(queries) == len(keys) == 2):
            raise ValueError(f"{place}: q and k must each be [start, stop]; a slice is {SLICE_EXAMPLE}")
        entry = [*queries, *keys, entry.get("type", "full")]
    if not isinstance(entry, list) or len(entry) not in (4, 5):
        raise ValueError(f"{place}: {json.dumps(entry)} is not a slice; one is {SLICE_EXAMPLE}")
    *bounds, kind = entry if len(entry) == 5 else [*entry, "full"]
    for bound in bounds:
        if type(bound) is not int or bound < 0:
            raise ValueError(f"{place}: {json.dumps(bound)} is not a row; rows are integers from 0 on")
        _check_row(bound, place)
    for side, start, stop in (("queries", *bounds[:2]), ("keys", *bounds[2:])):
        if stop < start:
            raise ValueError(f"{place}: the {side} [{start}, {stop}) end before they start")
    return [*bounds, _parse_type(kind, place)]


def _check_row(row: int, place: str) -> None:
    if row > MOST_ROWS:
        raise ValueError(f"{place}: {row} is too large; a sequence can have {MOST_ROWS} rows at most")


def _parse_type(kind: Any, place: str) -> int:
    if isinstance(kind, str):
        for name, number in TYPES.items():
            if kind.lower().replace("-", "").replace("_", "") == name.replace("_", ""):
                return number
    elif type(kind) is int and kind in TYPES.values():
        return kind
    known = ", ".join(f"{name} ({number})" for name, number in TYPES.items())
    raise ValueError(f"{place}: {json.dumps(kind)} is not a type of slice; types are {known}")


def _with_lengths(slices: SliceTable, path: Path, tokens: int | None, tokens_k: int | None) -> NamedMask:
    ends: Sequence[int] = slices.rows[:, [1, 3]].max(axis=0, initial=0).tolist()
    limits = (("--tokens", tokens), ("--tokens", tokens) if tokens_k is None else ("--tokens-k", tokens_k))
    for side, column, end, (flag, limit) in zip(("queries", "keys"), (1, 3), ends, limits, strict=True):
        if limit is not None and end > limit:
            index = int(slices.rows[:, column].argmax())
            raise ValueError(f"{path}, slice {index + 1}: its {side} end at {end}, beyond {flag} {limit}")
    return NamedMask(path.name, slices, tokens or (max(ends) if tokens_k is None else ends[0]), tokens_k)


def _read_json_list(path: Path, of_what: str) -> list[Any]:
    try:
        values = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; the file must be a JSON list of {of_what}"
        ) from None
    if not isinstance(values, list):
        raise ValueError(f"{path} must hold a JSON list of {of_what}, not a JSON {type(values).__name__}")
    return values


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors put a byte-order mark in front
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file; binary arrays must be .npy files") from None
