# SPDX-License-Identifier: Apache-2.0
"""Check on the host that all ranks of a group hold the same digest, through the store that made the process group."""

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from magi_attention.comm.group import group_rank, group_size

_AGREED = b"agreed"
# How much longer than the leader the others wait, so that they hear its verdict rather than reach their own.
_VERDICT_SLACK_S = 2.0


@dataclass
class _History:
    """The checks of one group so far: their number and the keys that they left in the store."""

    num_checks: int = 0
    stale_keys: list[str] = field(default_factory=list)


_histories: defaultdict[tuple[int, ...], _History] = defaultdict(_History)


def check_agreement(digest: bytes, group: dist.ProcessGroup | None, timeout_s: float = 30.0) -> None:
    """Raise on every rank unless all ranks of ``group`` pass the same digest.

    The group's first rank compares the digests and posts a verdict; if it never comes, the others reach one. Whoever
    posts first wins, so all ranks that take part return, or raise, alike. Runs no GPU work and no collective.

    Args:
        digest: what must be equal, some 32 bytes.
        group: the process group; None for this process alone, which agrees at once.
        timeout_s: seconds that a rank waits for the others.

    Raises:
        RuntimeError: some ranks passed another digest, or came too late or never; names them by their global ranks.
    """
    if group is None or group_size(group) == 1:
        return
    ranks, me = dist.get_process_group_ranks(group), group_rank(group)
    store = _next_store(ranks)
    store.set(str(me), digest.hex())
    verdict = _compare(store, ranks, timeout_s) if me == 0 else _await_verdict(store, ranks, timeout_s)
    if me == 0:
        _forget_earlier(ranks, everyone_came=verdict == _AGREED)
    if verdict != _AGREED:
        raise RuntimeError(verdict.decode())


def report_failure(reason: str, group: dist.ProcessGroup | None) -> None:
    """Take part in an agreement check with a failure instead of a digest: all other ranks raise at once, and name it.

    Args:
        reason: what went wrong on this rank.
        group: as for :func:`check_agreement`.
    """
    if group is None or group_size(group) == 1:
        return
    ranks, me = dist.get_process_group_ranks(group), group_rank(group)
    store = _next_store(ranks)
    _post(store, f"rank {ranks[me]} failed to make its key: {reason}".encode())
    store.set(str(me), "failed")
    if me == 0:
        _forget_earlier(ranks, everyone_came=False)


def _next_store(ranks: list[int]) -> dist.Store:
    """The part of the store that the group's next check uses."""
    history = _histories[tuple(ranks)]
    history.num_checks += 1
    return dist.PrefixStore(f"{_root_of(ranks)}/{history.num_checks - 1}", _get_default_store())


def _root_of(ranks: list[int]) -> str:
    return f"magi_attention/agreement/{sha256(repr(ranks).encode()).hexdigest()[:16]}"


def _compare(store: dist.Store, ranks: list[int], timeout_s: float) -> bytes:
    """The leader's part: gather the digests and post the verdict."""
    keys = [str(member) for member in range(len(ranks))]
    if not _wait(store, keys, timeout_s):
        return _post(store, _missing_message(store, ranks, timeout_s))
    by_digest: defaultdict[str, list[int]] = defaultdict(list)
    for rank, digest in zip(ranks, store.multi_get(keys), strict=True):
        by_digest[digest.decode()].append(rank)
    return _post(store, _AGREED if len(by_digest) == 1 else _mismatch_message(by_digest))


def _await_verdict(store: dist.Store, ranks: list[int], timeout_s: float) -> bytes:
    """The others' part: wait for the verdict; without one, say who is missing."""
    if _wait(store, ["verdict"], timeout_s + _VERDICT_SLACK_S):
        return bytes(store.get("verdict"))
    if store.check([str(member) for member in range(len(ranks))]):  # the last has come; the leader is about to judge
        _wait(store, ["verdict"], _VERDICT_SLACK_S)
    return _post(store, _missing_message(store, ranks, timeout_s))


def _post(store: dist.Store, verdict: bytes) -> bytes:
    """Post a verdict unless there is one; return the one that holds."""
    return bytes(store.compare_set("verdict", "", verdict.decode()))


def _wait(store: dist.Store, keys: list[str], timeout_s: float) -> bool:
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError:  # which one, differs between the kinds of stores
        return False
    return True


def _missing_message(store: dist.Store, ranks: list[int], timeout_s: float) -> bytes:
    missing = [rank for member, rank in enumerate(ranks) if not store.check([str(member)])]
    absent = missing or ranks[:1]  # all came, but the leader left without a verdict
    return (
        f"ranks {absent} of the group {ranks} did not come to the agreement check within {timeout_s:g} s: every "
        "rank must make the same keys in the same order"
    ).encode()


def _mismatch_message(by_digest: dict[str, list[int]]) -> bytes:
    parts = [f"ranks {ranks} ({digest[:12]})" for digest, ranks in by_digest.items()]
    largest = max(by_digest.values(), key=len)
    differing = sorted(rank for ranks in by_digest.values() if ranks is not largest for rank in ranks)
    return (
        f"the ranks do not agree on the plan: ranks {differing} differ from ranks {largest}. Digests: "
        f"{', '.join(parts)}. Mask, sizes and configuration must be the same on every rank of the group"
    ).encode()


def _forget_earlier(ranks: list[int], everyone_came: bool) -> None:
    """Delete the keys of earlier checks: whoever came to this one has read the verdicts of those."""
    history = _histories[tuple(ranks)]
    if everyone_came:
        root = dist.PrefixStore(_root_of(ranks), _get_default_store())
        for key in history.stale_keys:
            root.delete_key(key)
        history.stale_keys.clear()
    number = history.num_checks - 1
    history.stale_keys += [f"{number}/{name}" for name in (*range(len(ranks)), "verdict")]
