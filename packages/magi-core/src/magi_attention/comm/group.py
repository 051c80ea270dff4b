# SPDX-License-Identifier: Apache-2.0
"""Process groups, where None stands for this process alone, with or without torch.distributed."""

import atexit
import sys
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch.distributed as dist


def group_size(group: dist.ProcessGroup | None) -> int:
    """The number of ranks of a group."""
    return dist.get_world_size(group) if group is not None else 1


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank in a group."""
    return dist.get_rank(group) if group is not None else 0


def has_peers(group: dist.ProcessGroup | None) -> bool:
    """Whether there are other ranks in a group. Of torch's backend "fake", for dry runs, there are only numbers."""
    return group is not None and dist.get_world_size(group) > 1 and dist.get_backend(group) != "fake"


def is_destroyed(group: dist.ProcessGroup) -> bool:
    """Whether ``torch.distributed.destroy_process_group`` has been called for a group."""
    return group not in dist.distributed_c10d._world.pg_map


class GroupName(NamedTuple):
    """What stands for a process group where it is pickled: the group itself can't be.

    Attributes:
        name: PyTorch's for the group.
        ranks: the global ranks of its members, in their order.
        rank: this process's rank in it.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int


def name_group(group: dist.ProcessGroup | None) -> GroupName | None:
    """What a group can be found by again; None for this process alone, and for groups that have been destroyed."""
    if group is None or is_destroyed(group):
        return None
    return GroupName(group.group_name, tuple(dist.get_process_group_ranks(group)), group_rank(group))


def find_named_group(named: GroupName | None) -> dist.ProcessGroup | None:
    """The group of this process that :func:`name_group` makes the same of; None if there is none."""
    groups = list(dist.distributed_c10d._world.pg_map) if named is not None else []
    return next((group for group in groups if name_group(group) == named), None)


def num_groups() -> int:
    """How many groups this process is in; PyTorch names those after it that ranks make without the others."""
    return len(dist.distributed_c10d._world.pg_names)


_holders: WeakValueDictionary[tuple[int, str], object] = WeakValueDictionary()


def let_go_at_exit(holder: object, *names: str) -> None:
    """Set attributes that hold a process group to None when the interpreter exits.

    A gloo group that outlives the interpreter aborts the process, if one of its threads then lets go of a tensor. After
    ``destroy_process_group`` what holds a group are keys, plans and the graphs of results, which may well stand in
    variables of the main module, the last to go; and the functions of torch.distributed.nn, if that was imported when
    there was a default group: it then is the default of their arguments.
    """
    for name in names:
        _holders[id(holder), name] = holder


@atexit.register
def _let_go() -> None:
    for (_, name), holder in list(_holders.items()):
        object.__setattr__(holder, name, None)
    imported = sys.modules.get("torch.distributed.nn.functional")
    for function in list(vars(imported).values()) if imported else []:
        defaults = getattr(function, "__defaults__", None) or ()
        if any(isinstance(default, dist.ProcessGroup) for default in defaults):
            kept = (None if isinstance(default, dist.ProcessGroup) else default for default in defaults)
            function.__defaults__ = tuple(kept)


class GroupHandle:
    """Holds a group for an object that cannot be told to let go itself, such as the context of a gradient."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        let_go_at_exit(self, "group")
