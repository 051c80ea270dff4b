# SPDX-License-Identifier: Apache-2.0
"""Planned attentions by key: one least-recently-used dictionary per process group.

There is one dictionary per group because all ranks of a group make and use keys in the same order: they then also
evict in the same order, and no rank plans (which the ranks check together) while another still finds its plan. What a
rank may do alone, since nothing is sent, keeps no key from giving way. Where one thread makes keys and another uses
them, that holds for keys which are made again within as many new ones as the dictionary keeps, less twice those that
are made ahead.
"""

import threading
from collections import OrderedDict
from functools import cached_property
from itertools import chain
from typing import Any

import torch.distributed as dist

from magi_attention.comm.group import is_destroyed
from magi_attention.env import general
from magi_attention.runtime.key import DistAttnRuntimeKey, sorted_global_ranks

# Of so many most recent keys, the tables that kernels and exchanges derive on the device are kept; plans are small, but
# a long training makes a new mask at every step. More than all masks of all micro-batches in flight.
NUM_KEYS_WITH_TABLES = 64


class DistAttnRuntimeDict:
    """At most ``max_size`` managers by key; the least recently inserted or got one gives way. 0 or less keeps none.

    Threads may share it: one can make the keys of the next steps while another one computes with those there are.
    """

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self._lock = threading.Lock()
        self._most_recent: DistAttnRuntimeKey | None = None
        self._used_alone: DistAttnRuntimeKey | None = None  # since then
        self._managers: OrderedDict[DistAttnRuntimeKey, Any] = OrderedDict()
        self._with_tables: OrderedDict[DistAttnRuntimeKey, Any] = OrderedDict()

    def get(self, key: DistAttnRuntimeKey, default: Any = None) -> Any:
        """The manager of ``key``, which becomes the most recent, or ``default``."""
        manager = self._managers.get(key)
        if manager is None:
            return default
        if self._most_recent is not key or self._used_alone is not None:  # which takes no lock in the layers of a model
            with self._lock:
                if key in self._managers:
                    self._make_most_recent(key)
        return manager

    def use_alone(self, key: DistAttnRuntimeKey) -> Any:
        """The manager of ``key`` or None, for what a rank may do alone: most recent, the key gives way as before."""
        manager = self._managers.get(key)
        if manager is not None and (self._used_alone or self._most_recent) is not key:
            with self._lock:
                if key in self._managers:
                    self._used_alone = key
                    self._keep_tables(key)
        return manager

    def keys(self) -> list[DistAttnRuntimeKey]:
        """All keys, the first to give way first."""
        with self._lock:
            return list(self._managers)

    def get_most_recent_key(self) -> DistAttnRuntimeKey | None:
        """The key inserted, got or used alone last; None if there is none."""
        with self._lock:
            return self._used_alone or next(reversed(self._managers), None)

    def forget_destroyed_groups(self) -> None:
        """Forget the keys of process groups that have been destroyed, which would keep these alive."""
        with self._lock:
            for key in list(self._managers):
                if key.cp_group is not None and is_destroyed(key.cp_group):
                    del self._managers[key]
                    self._with_tables.pop(key, None)
                    if self._most_recent == key:
                        self._most_recent = None
                    if self._used_alone == key:
                        self._used_alone = None

    def clear(self) -> None:
        """Forget all keys."""
        with self._lock:
            self._managers.clear()
            self._with_tables.clear()
            self._most_recent = self._used_alone = None

    def __contains__(self, key: DistAttnRuntimeKey) -> bool:
        return key in self._managers

    def __getitem__(self, key: DistAttnRuntimeKey) -> Any:
        return self._managers[key]

    def __setitem__(self, key: DistAttnRuntimeKey, manager: Any) -> None:
        with self._lock:
            self._managers[key] = manager
            self._make_most_recent(key)
            while len(self._managers) > max(self.max_size, 0):
                evicted, _ = self._managers.popitem(last=False)
                self._with_tables.pop(evicted, None)
            if not self._managers:
                self._most_recent = None

    def _make_most_recent(self, key: DistAttnRuntimeKey) -> None:
        """Move ``key`` to the end, holding the lock."""
        self._most_recent, self._used_alone = key, None
        self._managers.move_to_end(key)
        self._keep_tables(key)

    def _keep_tables(self, key: DistAttnRuntimeKey) -> None:
        """Keep the tables of ``key``, for which those of the least recent one may go, holding the lock."""
        self._with_tables[key] = self._managers[key]
        self._with_tables.move_to_end(key)
        if len(self._with_tables) > NUM_KEYS_WITH_TABLES:
            _, manager = self._with_tables.popitem(last=False)
            manager.release_tables()

    def __len__(self) -> int:
        return len(self._managers)


class DistAttnRuntimeDictManager:
    """A :class:`DistAttnRuntimeDict` of ``max_size_per_group`` for every group, told apart by its global ranks.

    None for that is what the environment says when it is first needed. Groups that
    ``torch.distributed.destroy_process_group`` has ended lose their keys once another key is inserted.
    """

    def __init__(self, max_size_per_group: int | None = None) -> None:
        if max_size_per_group is not None:
            self.max_size_per_group = max_size_per_group
        self._dicts: dict[tuple[int, ...], DistAttnRuntimeDict] = {}

    @cached_property
    def max_size_per_group(self) -> int:
        """How many keys each group keeps at most."""
        return general.dist_attn_runtime_dict_size()  # not when imported: a wrong text would stop `magi doctor` as well

    def get(self, key: DistAttnRuntimeKey, default: Any = None) -> Any:
        """The manager of ``key``, which becomes its group's most recent, or ``default``."""
        return self._dict_of(key.group_ranks).get(key, default)

    def use_alone(self, key: DistAttnRuntimeKey) -> Any:
        """See :meth:`DistAttnRuntimeDict.use_alone`."""
        return self._dict_of(key.group_ranks).use_alone(key)

    def keys(self, cp_group: dist.ProcessGroup | None = None) -> list[DistAttnRuntimeKey]:
        """The group's keys, the least recent first; those of all groups for None."""
        if cp_group is None:
            return list(chain.from_iterable(each.keys() for each in list(self._dicts.values())))
        return self._dict_of(sorted_global_ranks(cp_group)).keys()

    def get_most_recent_key(self, cp_group: dist.ProcessGroup | None) -> DistAttnRuntimeKey | None:
        """The group's key inserted or got last; None if there is none.

        Raises:
            ValueError: ``cp_group`` is None.
        """
        if cp_group is None:
            raise ValueError(
                "cp_group is None, but there is one most recent key for every process group: pass the group"
            )
        return self._dict_of(sorted_global_ranks(cp_group)).get_most_recent_key()

    def clear(self, cp_group: dist.ProcessGroup | None = None) -> None:
        """Forget the group's keys, or for None all keys."""
        if cp_group is None:
            self._dicts.clear()
        else:
            self._dicts.pop(sorted_global_ranks(cp_group), None)

    def __contains__(self, key: DistAttnRuntimeKey) -> bool:
        return key in self._dict_of(key.group_ranks)

    def __getitem__(self, key: DistAttnRuntimeKey) -> Any:
        return self._dict_of(key.group_ranks)[key]

    def __setitem__(self, key: DistAttnRuntimeKey, manager: Any) -> None:
        for each in list(self._dicts.values()):
            each.forget_destroyed_groups()
        self._dict_of(key.group_ranks)[key] = manager

    def _dict_of(self, ranks: tuple[int, ...]) -> DistAttnRuntimeDict:
        found = self._dicts.get(ranks)
        if found is None:
            found = self._dicts.setdefault(ranks, DistAttnRuntimeDict(self.max_size_per_group))
        return found


dist_attn_runtime_dict_mgr = DistAttnRuntimeDictManager()


def find_manager(key: DistAttnRuntimeKey, *, becomes_most_recent: bool = True, is_collective: bool = True) -> Any:
    """The manager of ``key``, which becomes its group's most recent unless told otherwise.

    Args:
        key: the key.
        becomes_most_recent: whether it does.
        is_collective: whether all ranks of the group need it now; if not, it is evicted when it would have been.

    Raises:
        TypeError: ``key`` is no key.
        ValueError: The cache doesn't hold the key, or its process group was destroyed.
    """
    if not isinstance(key, DistAttnRuntimeKey):
        raise TypeError(f"key must be a DistAttnRuntimeKey, as magi_attn_flex_key makes it, not {type(key).__name__}")
    manager = None
    if becomes_most_recent:
        find = dist_attn_runtime_dict_mgr.get if is_collective else dist_attn_runtime_dict_mgr.use_alone
        manager = find(key)
    elif key in dist_attn_runtime_dict_mgr:
        manager = dist_attn_runtime_dict_mgr[key]
    _check_group_lives(key)
    if manager is None:
        size = dist_attn_runtime_dict_mgr.max_size_per_group
        raise ValueError(
            "The dist attn runtime key does not exist! "
            + (
                f"It was cleared, or gave way to newer keys (the cache keeps {size} per group): make it again"
                if size > 0
                else f"No key does with MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE={size}: set it to 1 or more"
            )
        )
    return manager


def _check_group_lives(key: DistAttnRuntimeKey) -> None:
    """Raise ``ValueError`` if the process group of ``key`` was destroyed."""
    if key.cp_group is not None and is_destroyed(key.cp_group):
        raise ValueError(
            "the process group of this key was destroyed: make the key again, with one that was made since"
        )
