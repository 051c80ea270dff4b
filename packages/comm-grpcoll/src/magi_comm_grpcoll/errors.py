# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a group collective beyond a bad argument."""


class NotNativeError(RuntimeError):
    """The GPUs of a group can't exchange natively; raised on every rank with the same reason."""


class PlanMismatchError(RuntimeError):
    """The ranks' tables, tensors or calls don't fit each other; raised on every rank, before anything is sent."""


class CapacityError(RuntimeError):
    """An exchange does not fit the memory that a context may take; raised on every rank, before anything is sent."""


class SlotLentError(RuntimeError):
    """An exchange needs a slot whose rows are still lent out, and would wait for ever."""


class PeerTimeoutError(RuntimeError):
    """A rank did not do its part of a collective in time. The context can't be used any more.

    Attributes:
        ranks: the ranks of the group that were waited for.
    """

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


def first_line(error: BaseException) -> str:
    """What went wrong, without the trace that some libraries add."""
    return str(error).partition("\n")[0]
