# SPDX-License-Identifier: Apache-2.0
"""Check on the host that all ranks of a group hold the same digest, through the store that made the process group."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from magi_attention.comm.group import group_rank, has_peers, is_destroyed

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_AGREED = b"agreed"
# How much longer than the leader the others wait, so that they hear its verdict rather than reach their own.
_VERDICT_SLACK_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.05
# After which somebody tells who keeps all others waiting: a rank that saves a checkpoint alone may well take longer.
_SILENCE_S = 30.0


@dataclass
class _History:
    """The checks of one group so far.

    Checks are numbered from 0 again after one that failed, so that ranks that missed checks fall in step again.

    Attributes:
        root: under which the store keeps what belongs to this group.
        num_failed: checks that ended in an error.
        num_checks: checks since the last of these.
        stale_keys: what they left in the store.
        lock: held while a check runs, since threads of a process share the numbers.
    """

    root: str
    num_failed: int = 0
    num_checks: int = 0
    stale_keys: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


# By group and not by its name, which is the name of another group after torch.distributed was initialized anew.
_histories: WeakKeyDictionary[dist.ProcessGroup, _History] = WeakKeyDictionary()
_histories_lock = threading.Lock()


def _history_of(group: dist.ProcessGroup, ranks: Sequence[int], me: int) -> _History:
    """The group's history. A store that outlives groups, as that of torchrun, counts how many had this name.

    So all ranks must have come to a check in every one of them, or in none.
    """
    with _histories_lock:
        history = _histories.get(group)
        if history is None:
            members = sha256(repr(ranks).encode()).hexdigest()[:16]
            root = f"magi_attention/agreement/{group.group_name}/{members}"
            number = _get_default_store().add(f"{root}/groups of {me}", 1)
            history = _histories[group] = _History(f"{root}/{number}")
        return history


def check_agreement(digest: bytes, group: dist.ProcessGroup | None, timeout_s: float = 600.0) -> None:
    """Raise on every rank unless all ranks of ``group`` pass the same digest.

    The group's first rank compares the digests and posts a verdict; if it never comes, the others reach one. Whoever
    posts first wins, so all ranks that take part return, or raise, alike. Runs no GPU work and no collective. The first
    of the ranks that wait longer than half a minute logs a warning with those that they wait for.

    Args:
        digest: what must be equal, some 32 bytes.
        group: the process group; None for this process alone, which agrees at once, as a rank of a fake group does.
        timeout_s: seconds that a rank waits for the others.

    Raises:
        RuntimeError: some ranks passed another digest, or came too late or never; names them by their global ranks.
    """
    if group is None or not has_peers(group):
        return
    with _next_check(group) as check:
        check.store.set(str(check.me), digest.hex())
        verdict = _compare(check, timeout_s) if check.me == 0 else _await_verdict(check, timeout_s)
        check.conclude(verdict == _AGREED)
    if verdict != _AGREED:
        raise RuntimeError(verdict.decode())


def report_failure(reason: str, group: dist.ProcessGroup | None) -> None:
    """Take part in an agreement check with a failure instead of a digest: all other ranks raise at once, and name it.

    Args:
        reason: what went wrong on this rank.
        group: as for :func:`check_agreement`; of one that was destroyed, no rank can hear of it.
    """
    if group is None or is_destroyed(group) or not has_peers(group):
        return
    with _next_check(group) as check:
        _post(check.store, f"rank {check.ranks[check.me]} failed to make its key: {reason}".encode())
        check.store.set(str(check.me), "failed")
        check.conclude(agreed=False)


@contextmanager
def failures_reported(group: dist.ProcessGroup | None, checks: bool) -> Iterator[None]:
    """Let all other ranks know of an error in the block, which comes before an agreement check, so that they raise too.

    Args:
        group: as for :func:`check_agreement`.
        checks: whether the ranks check that they agree at all; without, nobody would hear of it.
    """
    try:
        yield
    except Exception as error:
        if checks:
            report_failure(f"{type(error).__name__}: {error}", group)
        raise


def run_together(call: Callable[[], Result], what: str, group: dist.ProcessGroup, timeout_s: float = 30.0) -> Result:
    """Run on all ranks of ``group`` what exchanges data between them; if it fails on one rank, all raise at once.

    A rank that the failed one leaves waiting goes on without the call, which ends in a thread of its own once the
    group's timeout is over; nothing should be expected of the group after that.

    Args:
        call: what to run.
        what: its name in errors.
        group: the process group.
        timeout_s: seconds that a rank which is done waits for the others.

    Returns:
        What ``call`` returned on this rank.

    Raises:
        RuntimeError: on every rank, if ``call`` raised on one of them, which it names, or some rank never came.
    """
    results: list[Result] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    with _next_check(group) as check:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive() and not check.store.check(["verdict"]):
            thread.join(_LONGEST_PAUSE_S)
        if errors:
            reason = f"{type(errors[0]).__name__}: {errors[0]}"
            _post(check.store, f"{what} failed on rank {check.ranks[check.me]}: {reason}".encode())
        check.store.set(str(check.me), what)
        verdict = _compare(check, timeout_s) if check.me == 0 else _await_verdict(check, timeout_s)
        check.conclude(verdict == _AGREED)
    if verdict != _AGREED:
        raise RuntimeError(verdict.decode()) from (errors[0] if errors else None)
    return results[0]


@contextmanager
def _next_check(group: dist.ProcessGroup) -> "Iterator[_Check]":
    """Take part in the group's next check in the block; other threads of the process come after it."""
    ranks, me = dist.get_process_group_ranks(group), group_rank(group)
    try:
        history = _history_of(group, ranks, me)
        with history.lock:
            yield _Check(history, ranks, me)
    except dist.DistNetworkError as error:
        raise RuntimeError(
            f"the process that keeps the store of the process group is gone: did a rank of {ranks} fail?"
        ) from error


class _Check:
    """This rank's part of the group's next check, in a part of the store of its own."""

    def __init__(self, history: _History, ranks: Sequence[int], me: int) -> None:
        self._history, self.ranks, self.me = history, ranks, me
        self._open()
        while self._ended_without_me():
            logger.warning("ranks of %s gave up a check that this rank did not come to; going on with the next", ranks)
            self.conclude(agreed=False)
            self._open()

    def _open(self) -> None:
        self._name = f"{self._history.num_failed}/{self._history.num_checks}"
        self.store = dist.PrefixStore(f"{self._history.root}/{self._name}", _get_default_store())

    def _ended_without_me(self) -> bool:
        """Whether the others gave up waiting: this rank found the key in its cache, or is that late."""
        return self.store.check(["absent"]) and str(self.me) in self.store.get("absent").decode().split()

    def conclude(self, agreed: bool) -> None:
        """Move on to the next check; the leader deletes what earlier ones left, which all who came have read."""
        history = self._history
        if agreed:
            history.num_checks += 1
        else:
            history.num_failed, history.num_checks = history.num_failed + 1, 0
        if self.me == 0:
            if agreed:
                root = dist.PrefixStore(self._history.root, _get_default_store())
                for key in history.stale_keys:
                    root.delete_key(key)
                history.stale_keys.clear()
            history.stale_keys += [
                f"{self._name}/{member}" for member in (*range(len(self.ranks)), "verdict", "absent")
            ]


def _compare(check: _Check, timeout_s: float) -> bytes:
    """The leader's part: gather the digests and post the verdict."""
    keys = [str(member) for member in range(len(check.ranks))]
    if not _wait(check, keys, timeout_s):
        return _post(check.store, _missing_message(check, timeout_s))
    by_digest: defaultdict[str, list[int]] = defaultdict(list)
    for rank, digest in zip(check.ranks, check.store.multi_get(keys), strict=True):
        by_digest[digest.decode()].append(rank)
    return _post(check.store, _AGREED if len(by_digest) == 1 else _mismatch_message(by_digest))


def _await_verdict(check: _Check, timeout_s: float) -> bytes:
    """The others' part: wait for the verdict; without one, say who is missing."""
    store = check.store
    if _wait(check, ["verdict"], timeout_s + _VERDICT_SLACK_S):
        return bytes(store.get("verdict"))
    if store.check([str(member) for member in range(len(check.ranks))]):  # all have come; the leader is about to judge
        _wait(check, ["verdict"], _VERDICT_SLACK_S)
    return _post(store, _missing_message(check, timeout_s))


def _post(store: dist.Store, verdict: bytes) -> bytes:
    """Post a verdict unless there is one; return the one that holds."""
    return bytes(store.compare_set("verdict", "", verdict.decode()))


def _wait(check: _Check, keys: list[str], timeout_s: float) -> bool:
    """Wait until all keys are set. Asks again and again, since a store that waits is closed to all other threads."""
    began = time.monotonic()
    pause, is_silent = _FIRST_PAUSE_S, True
    while not check.store.check(keys):
        waited = time.monotonic() - began
        if waited > timeout_s:
            return False
        if is_silent and waited > _SILENCE_S:
            _tell_who_is_missing(check, waited, timeout_s)
            is_silent = False
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
    return True


def _tell_who_is_missing(check: _Check, waited_s: float, timeout_s: float) -> None:
    """Log it, if this is the first of the ranks that have come."""
    if any(check.store.check([str(member)]) for member in range(check.me)):
        return
    missing = [check.ranks[member] for member in _missing_members(check)]
    logger.warning(
        "waiting for ranks %s of the group %s to make the same key, since %.0f s and for %.0f s at most",
        missing,
        check.ranks,
        waited_s,
        timeout_s,
    )


def _missing_members(check: _Check) -> list[int]:
    return [member for member in range(len(check.ranks)) if not check.store.check([str(member)])]


def _missing_message(check: _Check, timeout_s: float) -> bytes:
    missing = _missing_members(check)
    check.store.set("absent", " ".join(map(str, missing)))
    # If all came, it is the leader that left without a verdict.
    absent = [check.ranks[member] for member in missing or [0]]
    return (
        f"ranks {absent} of the group {check.ranks} did not come to the agreement check within {timeout_s:g} s: every "
        "rank must make the same keys in the same order"
    ).encode()


def _mismatch_message(by_digest: dict[str, list[int]]) -> bytes:
    parts = [f"ranks {ranks} ({digest[:12]})" for digest, ranks in by_digest.items()]
    largest = max(by_digest.values(), key=len)
    differing = sorted(rank for ranks in by_digest.values() if ranks is not largest for rank in ranks)
    return (
        f"the ranks do not agree on the plan: ranks {differing} differ from ranks {largest}. Digests: "
        f"{', '.join(parts)}. Mask, sizes and configuration must be the same on every rank of the group: is that the "
        "context-parallel group, do its data loaders agree, and are its keys made in one order, by one thread alone?"
    ).encode()
