# SPDX-License-Identifier: Apache-2.0
"""Process groups, where None stands for this process alone, with or without torch.distributed."""

import atexit
import sys
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
