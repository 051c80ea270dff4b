# SPDX-License-Identifier: Apache-2.0
"""The CUDA stream on which a process group communicates, beside the stream that computes.

Who owns memory: what a collective returns, or reads of its caller, belongs to the caller's stream, and is neither freed
nor used again before that stream has waited for the collective. What only the collective uses is allocated on, and
belongs to, the communication stream. So memory is never used too early, and the allocator need not be told of streams.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

HIGHEST_PRIORITY = -1
"""Of streams whose kernels are given multiprocessors before those of others. CUDA has higher ones, for other uses."""

_streams: dict[tuple[str, torch.device], torch.cuda.Stream] = {}


def communication_stream(group: dist.ProcessGroup | None, device: torch.device) -> "torch.cuda.Stream | None":
    """The group's stream on ``device``, always the same one; None on a CPU.

    Its priority is high: where a transfer and an attention kernel both wait for multiprocessors, the transfer, which
    needs few of them, goes first.
    """
    if device.type != "cuda":
        return None
    key = "" if group is None else group.group_name, device
    stream = _streams.get(key)
    if stream is None:
        # Of threads that come first together, all take the same one.
        stream = _streams.setdefault(key, torch.cuda.Stream(device, priority=HIGHEST_PRIORITY))
    return stream


_handle_of_current = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # builds without CUDA have none
_known: dict[tuple[int, int], torch.cuda.Stream] = {}


def current_stream(device_index: int) -> torch.cuda.Stream:
    """``torch.cuda.current_stream`` of a GPU, with one object for each stream, found faster than a new one is made."""
    if _handle_of_current is None:
        return torch.cuda.current_stream(device_index)
    key = device_index, _handle_of_current(device_index)
    stream = _known.get(key)
    if stream is None:
        stream = _known[key] = torch.cuda.current_stream(device_index)
    return stream


class EventPool:
    """Events to record anew, since making one takes as long as recording it. Serves all threads.

    A stream waits for what an event was recorded behind when it was told to, whatever the event is recorded behind
    later. So it can be used again once nobody will tell another stream to wait for it.
    """

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []

    def take(self) -> "torch.cuda.Event":
        """An event that nobody waits for any more."""
        try:
            return self._free.pop()
        except IndexError:
            return torch.cuda.Event()

    def put(self, event: "torch.cuda.Event") -> None:
        """Take an event back once nobody will make a stream wait for it."""
        self._free.append(event)

    def let_wait(self, stream: "torch.cuda.Stream", other: "torch.cuda.Stream") -> None:
        """Let a stream wait for all that another one has been given."""
        event = self.take()
        event.record(other)
        stream.wait_event(event)
        self.put(event)


_pools: dict[int, EventPool] = {}


def events_of(device_index: int) -> EventPool:
    """The events of a GPU."""
    pool = _pools.get(device_index)
    return _pools.setdefault(device_index, EventPool()) if pool is None else pool


@contextmanager
def current_in_block(stream: torch.cuda.Stream, before: torch.cuda.Stream) -> Iterator[None]:
    """Make a stream the current one: a tenth of ``torch.cuda.stream``, which finds out which one is current before."""
    torch.cuda.set_stream(stream)
    try:
        yield
    finally:
        torch.cuda.set_stream(before)


@contextmanager
def running_on(stream: "torch.cuda.Stream | None") -> Iterator[None]:
    """Enqueue what follows on ``stream``, after all that the current stream has been given; None changes nothing.

    After an error the current stream waits for what had been enqueued, which uses tensors that may go then.
    """
    if stream is None:
        yield
        return
    caller, events = current_stream(stream.device_index), events_of(stream.device_index)
    events.let_wait(stream, caller)
    with torch.cuda.stream(stream):
        try:
            yield
        except BaseException:
            events.let_wait(caller, stream)
            raise
