# SPDX-License-Identifier: Apache-2.0
"""Contexts have streams of their own, and those that have ended serve the next one."""

import gc

import pytest
import torch

from magi_comm_grpcoll import ContextOptions, GroupContext
from magi_comm_grpcoll.streams import own_streams
from tests.comm.emulation import run_ranks
from tests.comm.test_native import fragmented_table


@pytest.mark.gpu(1)
def test_own_streams_are_no_others():
    device = torch.device("cuda", 0)
    of_torch = {torch.cuda.Stream(device, priority=-1).cuda_stream for _ in range(32)}
    streams = own_streams(device, 40)
    assert len({stream.cuda_stream for stream in streams} - of_torch) == 40
    assert {(stream.device, stream.priority) for stream in streams} == {(device, -1)}
    number = torch.zeros((), device=device)
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000)
            number += 1
        torch.cuda.current_stream(device).wait_stream(stream)
    assert number.item() == 40


@pytest.mark.usefixtures("emulated")
def test_contexts_share_no_stream_while_both_live():
    def run(rank, group):
        first, second = (GroupContext(group, ContextOptions(timeout_s=30)) for _ in range(2))
        streams = [{*context._streams.all, context._streams.watch} for context in (first, second)]
        assert not streams[0] & streams[1]
        assert all(len(each) == 5 for each in streams)

    run_ranks(2, run)


@pytest.mark.usefixtures("emulated")
def test_streams_that_have_ended_serve_the_next_context():
    def run(rank, group):
        seen = []
        for _ in range(6):
            native, table = GroupContext(group, ContextOptions(timeout_s=30)), fragmented_table(rank, 2, 4, 2)
            seen.append(native._streams)
            native.cast([torch.ones(table.num_source, 4)], table).wait_host()
            native.close()
            del native, table
            gc.collect()
        return seen

    taken = {streams for seen in run_ranks(2, run) for streams in seen}
    assert len(taken) <= 4  # of two ranks, whose next may come before the last has ended
