# SPDX-License-Identifier: Apache-2.0
"""Two nodes of two ranks over emulated GPUs: puts between them, copies and pushes inside, without a GPU."""

import pytest
import torch

from magi_comm_grpcoll import ContextOptions, GroupContext
from magi_comm_grpcoll.nodes import RelayedCollectives
from tests.comm.emulation import Group, Handshake, run_ranks
from tests.distributed.exchanges import RandomNeeds, random_tensor

pytestmark = pytest.mark.usefixtures("emulated")

NUM_NODES, PER_NODE = 2, 2
WORLD = NUM_NODES * PER_NODE


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_put_across_once_and_come_back_added_up(seed):
    inters = [Group(NUM_NODES, range(place, WORLD, PER_NODE)) for place in range(PER_NODE)]
    intras = [Group(PER_NODE, range(node * PER_NODE, (node + 1) * PER_NODE)) for node in range(NUM_NODES)]
    all_needs = [RandomNeeds(10 * seed + number, WORLD, 0.7, max_rows=20) for number in range(3)]
    tables = [[needs.table(rank) for rank in range(WORLD)] for needs in all_needs]

    def run(rank, group):
        inter = GroupContext(inters[rank % PER_NODE], ContextOptions(transport="put", timeout_s=30))
        intra = GroupContext(intras[rank // PER_NODE], ContextOptions(timeout_s=30))
        native = RelayedCollectives(Handshake(inter.group, 30), rank, inter, intra, PER_NODE)
        for turn in range(4):
            for needs, table in zip(all_needs, (each[rank] for each in tables), strict=True):
                sources = [random_tensor(turn + 10 * r, (needs.num_rows[r], 4, 8), torch.float32) for r in range(WORLD)]
                work = native.cast([sources[rank]], table, lend=turn % 2 == 1)
                (received,) = work.wait()
                torch.cuda.current_stream().synchronize()
                assert torch.equal(received, needs.received(sources, rank))
                partial = received.clone()
                work.release()
                total = sources[rank].clone()
                native.reduce([partial], table, [total], "sum").wait()
                torch.cuda.current_stream().synchronize()
                counts = torch.tensor([len(needs.partials_of(rank, row)) for row in range(len(total))])[:, None, None]
                torch.testing.assert_close(total, sources[rank] * (1 + counts))
        inter.close()
        intra.close()

    run_ranks(WORLD, run)
