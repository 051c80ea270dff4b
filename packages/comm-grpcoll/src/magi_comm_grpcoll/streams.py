# SPDX-License-Identifier: Apache-2.0
"""The streams of contexts, and what they use until they have ended.

They are not PyTorch's, which hands out 32 of a priority in turns. An exchange would wait behind that of another context
that got the same one, and the watchdogs of two contexts for each other.
"""

from itertools import count

import torch

from magi_comm_grpcoll.driver import driver

_HIGH_PRIORITY = -1

# By GPU, streams that a context used, and that have ended. PyTorch keeps memory by stream, so none is ever destroyed.
_idle: "dict[torch.device, list[ContextStreams]]" = {}
# By number, streams of contexts that are gone, events behind which they have ended, and what they use until then. A
# context may go on any thread, in the middle of anything.
_outliving: "dict[int, tuple[ContextStreams, list[torch.cuda.Event], object]]" = {}
_numbers = count()


class ContextStreams:
    """The streams of a context; see :func:`take_streams`.

    Args:
        device: the GPU.
        num_lanes: how many kinds of collectives arrive apart.

    Attributes:
        send: on which exchanges are sent.
        credit: on which slots are given back.
        arrive: for each kind of collectives, on which they arrive.
        watch: on which the watchdog frees the others.
        all: those that exchanges use.
    """

    def __init__(self, device: torch.device, num_lanes: int) -> None:
        self.device = device
        self.send, self.credit, self.watch, *self.arrive = own_streams(device, 3 + num_lanes)
        self.all = [self.send, self.credit, *self.arrive]


def own_streams(device: torch.device, count: int) -> "list[torch.cuda.Stream]":
    """So many streams of high priority that nothing else uses."""
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # makes the GPU's context this thread's
        return [torch.cuda.ExternalStream(driver().make_stream(_HIGH_PRIORITY), device) for _ in range(count)]


def take_streams(device: torch.device, num_lanes: int) -> ContextStreams:
    """Streams for a context: of one that has gone, or new ones."""
    _drop_outlived()
    try:
        return _idle[device].pop()
    except (KeyError, IndexError):
        return ContextStreams(device, num_lanes)


def let_streams_end(streams: ContextStreams, used: object) -> None:
    """Give the streams of a context that has gone back, and keep what they use until they are done with it."""
    _drop_outlived()
    if all(stream.query() for stream in streams.all):
        _idle.setdefault(streams.device, []).append(streams)
    else:
        _outliving[next(_numbers)] = streams, [stream.record_event() for stream in streams.all], used


def _drop_outlived() -> None:
    for number, (streams, events, _) in [*_outliving.items()]:
        if all(event.query() for event in events) and _outliving.pop(number, None) is not None:
            _idle.setdefault(streams.device, []).append(streams)
