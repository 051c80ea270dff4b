# SPDX-License-Identifier: Apache-2.0
"""Process groups, where None stands for this process alone, with or without torch.distributed."""

import torch.distributed as dist


def group_size(group: dist.ProcessGroup | None) -> int:
    """The number of ranks of a group."""
    return dist.get_world_size(group) if group is not None else 1


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank in a group."""
    return dist.get_rank(group) if group is not None else 0
