# SPDX-License-Identifier: Apache-2.0
"""Let the ranks of a group show each other something on the host, through the store that made the process group."""

import time
from collections import defaultdict
from hashlib import sha256

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from magi_attention.comm.group import group_rank
from magi_comm_grpcoll.errors import NotNativeError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0002, 0.02
# A store of torch takes less than 8 MiB at a time, and closes the connection to whoever sends more.
PART_BYTES = 1 << 22
# How many conversations each group has begun in this process: all ranks begin them in the same order. Groups that
# torch.distributed makes once it was initialized anew have the same names, and may have other ranks.
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
        name = f"{group.group_name}/{sha256(repr(self._ranks).encode()).hexdigest()[:16]}"
        number = _num_begun[name]
        _num_begun[name] += 1
        self._store = dist.PrefixStore(f"magi_grpcoll/{name}/{number}", _get_default_store())
        self._own_keys: list[str] = []  # of the last time

    def exchange(self, message: bytes) -> list[bytes]:
        """Show a message to all ranks; returns theirs, by rank of the group.

        Raises:
            RuntimeError: a rank did not come in time; names it by its global rank.
        """
        keys = [f"{self._num_done}/{rank}" for rank in range(len(self._ranks))]
        try:
            own_keys = self._post(keys[self._me], message)
            self._await(keys)
            answers = self._read(keys)
        except dist.DistNetworkError as error:
            raise RuntimeError(f"the store of the process group is gone: did a rank of {self._ranks} fail?") from error
        for key in self._own_keys:  # who sees all messages of this time knows that all have read those of the last
            self._store.delete_key(key)
        self._own_keys, self._num_done = own_keys, self._num_done + 1
        return answers

    def _post(self, key: str, message: bytes) -> list[str]:
        """Set a key to how many parts of a message are under keys of their own; returns all keys."""
        parts = [message[first : first + PART_BYTES] for first in range(0, len(message), PART_BYTES)]
        keys = _part_keys(key, len(parts))
        for part_key, part in zip(keys, parts, strict=True):
            self._store.set(part_key, part)  # type: ignore[arg-type]  # takes bytes too
        self._store.set(key, str(len(parts)))
        return [key, *keys]

    def _read(self, keys: list[str]) -> list[bytes]:
        """The messages under these keys."""
        counts = [int(count) for count in self._store.multi_get(keys)]
        part_keys = [part for key, count in zip(keys, counts, strict=True) for part in _part_keys(key, count)]
        parts = iter(self._store.multi_get(part_keys) if part_keys else [])
        return [b"".join(bytes(next(parts)) for _ in range(count)) for count in counts]

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


def raise_everywhere(handshake: Handshake, failure: str) -> None:
    """Raise :class:`NotNativeError` on every rank if one of them has a failure to tell."""
    for rank, answer in enumerate(handshake.exchange(failure.encode())):
        if answer:
            raise NotNativeError(f"on rank {rank} {answer.decode()}")


def _part_keys(key: str, count: int) -> list[str]:
    return [f"{key}/{number}" for number in range(count)]
