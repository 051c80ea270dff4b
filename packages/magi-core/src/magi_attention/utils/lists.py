# SPDX-License-Identifier: Apache-2.0
"""Lists: cumulative lengths, permutations, and questions about all elements."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeVar

Item = TypeVar("Item")


def seqlens2cu_seqlens(seqlens: Sequence[int]) -> list[int]:
    """Cumulative lengths, from 0: ``[2, 3]`` gives ``[0, 2, 5]``."""
    return list(accumulate(seqlens, initial=0))


def cu_seqlens2seqlens(cu_seqlens: Sequence[int]) -> list[int]:
    """The lengths between cumulative ones: ``[0, 2, 5]`` gives ``[2, 3]``."""
    return [end - start for start, end in pairwise(cu_seqlens)]


def flatten_nested_list(nested_list: Sequence[Any]) -> list[Any]:
    """The elements of a list of lists, nested to any depth, in order."""
    flat: list[Any] = []
    for each in nested_list:
        flat.extend(flatten_nested_list(each) if isinstance(each, list) else [each])
    return flat


def perm_idxs2unperm_idxs(perm_idxs: Sequence[int]) -> list[int]:
    """The inverse of a permutation of ``0 .. n - 1``."""
    return argsort(perm_idxs)


def wrap_to_list(x: Any, broadcast_to_length: int = 1) -> list[Any]:
    """``x`` as a list: a list or tuple as it is, anything else repeated ``broadcast_to_length`` times."""
    return list(x) if isinstance(x, list | tuple) else [x] * broadcast_to_length


def is_list_value_all(_list: Sequence[Any], val: Any = None, just_same: bool = False) -> bool:
    """Whether all elements equal ``val`` or, with ``just_same``, one another. True of an empty list."""
    return all(each == (_list[0] if just_same else val) for each in _list)


def is_list_value_any(_list: Sequence[Any], val: Any = None, just_same: bool = False) -> bool:
    """Whether an element equals ``val`` or, with ``just_same``, the first one. False of an empty list."""
    return any(each == (_list[0] if just_same else val) for each in _list)


def is_list_type_all(_list: Sequence[Any], _type: type | tuple[type, ...] = object, just_same: bool = False) -> bool:
    """Whether all elements are of a type or, with ``just_same``, of the first one's. True of an empty list."""
    return all(isinstance(each, type(_list[0]) if just_same else _type) for each in _list)


def transpose_matrix(matrix: Sequence[Sequence[Item]]) -> list[list[Item]]:
    """Rows become columns; all rows must be equally long (``ValueError``)."""
    return [list(column) for column in zip(*matrix, strict=True)]


def argsort(_list: Sequence[Item], key: Callable[[Item], Any] = lambda item: item, reverse: bool = False) -> list[int]:
    """The positions of the elements in sorted order; equal ones keep theirs."""
    return sorted(range(len(_list)), key=lambda i: key(_list[i]), reverse=reverse)


def argmin(_list: Sequence[Item], key: Callable[[Item], Any] = lambda item: item) -> int:
    """The first position of the least element."""
    return min(range(len(_list)), key=lambda i: key(_list[i]))


def argmax(_list: Sequence[Item], key: Callable[[Item], Any] = lambda item: item) -> int:
    """The first position of the greatest element."""
    return max(range(len(_list)), key=lambda i: key(_list[i]))
