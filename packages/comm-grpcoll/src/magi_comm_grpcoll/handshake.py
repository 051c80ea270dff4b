# SPDX-License-Identifier: Apache-2.0
"""Let the ranks of a group show each other something on the host, through the store that made the process group."""

import time
from collections import defaultdict

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from magi_attention.comm.group import group_rank

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0002, 0.02
# How many conversations each group has begun in this process: all ranks begin them in the same order.
_num_begun: defaultdict[str, int] = defaultdict(int)


class Handshake:
    """A numbered conversation among all ranks of a group. Runs no GPU work and no collective.

    Args:
        group: the process group.
        timeout_s: seconds that a rank waits for the others each time.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self._ranks, self._me = dist.get_process_group_ranks(group), group_rank(group)
        self._timeout_s, self._num_done = timeout_s, 0
        number = _num_begun[group.group_name]
        _num_begun[group.group_name] += 1
        self._store = dist.PrefixStore(f"magi_grpcoll/{group.group_name}/{number}", _get_default_store())

    def exchange(self, message: bytes) -> list[bytes]:
        """Show a message to all ranks; returns theirs, by rank of the group.

        Raises:
            RuntimeError: a rank did not come in time; names it by its global rank.
        """
        keys = [f"{self._num_done}/{rank}" for rank in range(len(self._ranks))]
        try:
            self._store.set(keys[self._me], message)  # type: ignore[arg-type]  # takes bytes too
            self._await(keys)
            answers = [bytes(answer) for answer in self._store.multi_get(keys)]
        except dist.DistNetworkError as error:
            raise RuntimeError(f"the store of the process group is gone: did a rank of {self._ranks} fail?") from error
        if self._num_done:  # who sees all messages of this time knows that all have read those of the last
            self._store.delete_key(f"{self._num_done - 1}/{self._me}")
        self._num_done += 1
        return answers

    def settle(self, proposal: str) -> str:
        """What the first rank to propose something proposed, the same for all; once in a conversation.

        Waits for nobody, so ranks that come late or not at all can't disagree with those that have gone.

        Args:
            proposal: not empty.

        Raises:
            RuntimeError: the store is gone.
        """
        return bytes(self._store.compare_set("settled", "", proposal)).decode()

    def _await(self, keys: list[str]) -> None:
        deadline, pause = time.monotonic() + self._timeout_s, _FIRST_PAUSE_S
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                absent = [rank for rank, key in zip(self._ranks, keys, strict=True) if not self._store.check([key])]
                raise RuntimeError(
                    f"ranks {absent} of the group {self._ranks} did not come to a group collective within "
                    f"{self._timeout_s:g} s: every rank must call the same collectives in the same order"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
