# SPDX-License-Identifier: Apache-2.0
"""Group cast and group reduce of a process alone: unusual rows, and what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from magi_attention.comm import AllToAllCollectives, HierarchicalCollectives, make_collectives
from magi_attention.comm.routes import places_of
from magi_attention.config import DistAttnConfig, RuntimeConfig
from magi_attention.kernels.protocol import Support
from tests.distributed.exchanges import RandomNeeds, single_rows, two_hop


def test_a_process_alone_needs_no_group():
    needs = RandomNeeds(seed=5, num_ranks=1)
    collectives = make_collectives(None, None, DistAttnConfig())
    source = torch.randn(needs.num_rows[0], 4)
    (received,) = collectives.cast([source], needs.table(0)).wait()
    assert torch.equal(received, source[needs.needs[0][:, 1]])
    total = source.clone()
    collectives.reduce([received], needs.table(0), [total]).wait()
    sent = np.isin(np.arange(len(source)), needs.needs[0][:, 1])
    assert sent.any()
    assert torch.equal(total[sent], 2 * source[sent])
    assert torch.equal(total[~sent], source[~sent])


def test_conjugations_and_negations_that_are_only_noted_travel():
    table = RandomNeeds(seed=5, num_ranks=1).table(0)
    collectives = AllToAllCollectives(None)
    rows = torch.randn(table.num_source, 4, dtype=torch.complex64).conj()
    (received,) = collectives.cast([rows], table).wait()
    (imaginary,) = collectives.cast([rows.imag], table).wait()
    assert torch.equal(received.imag, imaginary)
    assert torch.equal(received, collectives.cast([rows.resolve_conj()], table).wait()[0])
    total = torch.zeros(table.num_source, 4)
    collectives.reduce([received.conj().imag], table, [total]).wait()
    assert torch.equal(total != 0, total == -rows.imag)


def test_arguments_that_do_not_fit_are_refused():
    table = RandomNeeds(seed=5, num_ranks=1).table(0)
    collectives = AllToAllCollectives(None)
    rows, received = torch.zeros(table.num_source, 2, 3), torch.zeros(table.num_received, 2, 3)
    collectives.cast([rows], table).wait()  # what fits is remembered, and nothing else with it
    collectives.reduce([received], table, [rows]).wait()
    with pytest.raises(ValueError, match=f"tensors must all have {table.num_source} rows"):
        collectives.cast([rows[1:]], table)
    with pytest.raises(ValueError, match=r"but one of them is \(\) on cpu"):
        collectives.cast([rows, rows.sum()], table)
    with pytest.raises(ValueError, match="must not be empty"):
        collectives.cast([], table)
    with pytest.raises(ValueError, match="out must hold a contiguous"):
        collectives.cast([rows], table, out=[received.mT.contiguous().mT])
    cpu = torch.device("cpu")
    for runs in (np.array([[0, table.num_source - 1]]), single_rows(torch.arange(table.num_source - 1))):
        with pytest.raises(ValueError, match=rf"there are {table.num_source - 1} own_places for rows of"):
            collectives.cast([rows], table, own_places=places_of(runs, cpu))
    with pytest.raises(ValueError, match=f"partials must all have {table.num_received} rows"):
        collectives.reduce([received[1:]], table, [rows])
    with pytest.raises(ValueError, match=f"into must all have {table.num_source} rows"):
        collectives.reduce([received], table, [rows[1:]])
    with pytest.raises(ValueError, match="rows of shape"):
        collectives.reduce([received[..., :2]], table, [rows])
    with pytest.raises(ValueError, match="not 'max'"):
        collectives.reduce([received], table, [rows], "max")
    with pytest.raises(ValueError, match="1 partials can't be reduced into 2"):
        collectives.reduce([received], table, [rows, rows])
    with pytest.raises(ValueError, match="'lse' takes one partial"):
        collectives.reduce([received], table, [rows], "lse")
    with pytest.raises(ValueError, match="'lse' takes one partial"):
        collectives.reduce([received] * 2, table, [rows] * 2, "lse", received[..., 0], rows[..., 0])
    outs, lses = [rows, received], [rows[..., 0], received[..., 0]]
    for lse in (lses[0][:, :1], lses[0][1:], rows):
        with pytest.raises(ValueError, match=r"takes tensors \[rows, heads, dim\] with an lse \[rows, heads\]"):
            collectives.reduce([outs[1]], table, [outs[0]], "lse", lses[1], lse)
    with pytest.raises(ValueError, match=r"op 'lse' takes tensors"):
        collectives.reduce([outs[1]], table, [outs[0]], "lse", lses[1][:, :1], lses[0])
    with pytest.raises(ValueError, match=r"op 'lse' takes tensors"):
        collectives.reduce([outs[1].flatten(1)], table, [outs[0].flatten(1)], "lse", lses[1], lses[0])
    with pytest.raises(ValueError, match="only op 'lse'"):
        collectives.reduce([received], table, [rows], "sum", received[..., 0], rows[..., 0])
    with pytest.raises(ValueError, match="among 2 ranks can't run in a group of 1"):
        collectives.cast([rows], RandomNeeds(seed=3, num_ranks=2).table(0))
    with pytest.raises(TypeError, match="HierarchicalCollectives"):
        collectives.cast([rows], two_hop(RandomNeeds(seed=3, num_ranks=4), 0, 2))


# What has no accumulation dtype of its own, and what PyTorch promotes to none.
UNUSUAL = [torch.int32, torch.int64, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("dtype", UNUSUAL, ids=str)
def test_all_dtypes_are_reduced_alike_in_one_hop_and_in_two(dtype, op):
    table = two_hop(RandomNeeds(seed=5, num_ranks=1), 0, 1)
    alone = AllToAllCollectives(None)
    large = 2**25 if dtype in (torch.int32, torch.int64) else 3
    old, results = torch.full((table.inter.num_source, 3), -large).to(dtype), []
    partial = torch.full((table.num_received, 3), 2 * large - 1).to(dtype)
    for collectives, each in ((alone, table.intra), (HierarchicalCollectives(alone, alone), table)):
        results.append(old.clone())
        collectives.reduce([partial], each, [results[-1]], op).wait()
    assert torch.equal(*[x.to(torch.complex128) for x in results])
    sent = np.unique(table.intra.send[:, 1])
    assert len(sent)
    total = large - 1
    expected = torch.tensor(total if op == "sum" else total // 2).to(dtype)
    assert (results[0][sent].to(torch.complex128) == expected.to(torch.complex128)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_rows_without_elements_travel(dtype):
    table = RandomNeeds(seed=5, num_ranks=1).table(0)
    rows, empty = torch.zeros(table.num_source, 0, dtype=dtype), torch.zeros(table.num_received, 0, dtype=dtype)
    (received,) = AllToAllCollectives(None).cast([rows], table).wait()
    assert (received.shape, received.dtype) == (empty.shape, dtype)
    AllToAllCollectives(None).reduce([empty], table, [rows]).wait()


@pytest.mark.parametrize("hops", [1, 2])
def test_conjugations_that_are_only_noted_reach_own_places(hops):
    needs = RandomNeeds(seed=5, num_ranks=1)
    table, alone = two_hop(needs, 0, 1), AllToAllCollectives(None)
    num_rows, first = int(needs.num_rows[0]), table.num_received
    grown = replace(table.intra, num_received=first + num_rows)
    rows = torch.randn(num_rows, 3, dtype=torch.complex64).conj()
    places = places_of(np.array([[first, first + num_rows]]), torch.device("cpu"))
    collectives = alone if hops == 1 else HierarchicalCollectives(alone, alone)
    wanted = grown if hops == 1 else replace(table, intra=grown)
    (received,) = collectives.cast([rows], wanted, own_places=places).wait()
    assert torch.equal(received, torch.cat([needs.received([rows], 0), rows]))


def test_arguments_that_do_not_fit_are_refused_before_the_first_hop():
    table = two_hop(RandomNeeds(seed=5, num_ranks=1), 0, 1)
    collectives = HierarchicalCollectives(AllToAllCollectives(None), AllToAllCollectives(None))
    rows, received = torch.zeros(table.inter.num_source, 2, 3), torch.zeros(table.num_received, 2, 3)
    with pytest.raises(ValueError, match="not 'max'"):
        collectives.reduce([received], table, [rows], "max")
    with pytest.raises(ValueError, match="there are 1 own_places for rows"):
        collectives.reduce([received], table, [rows], own_places=places_of(np.array([[0, 1]]), torch.device("cpu")))
    with pytest.raises(TypeError, match="two-hop"):
        collectives.cast([rows], table.inter)


def test_transports_that_cannot_be_had_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="2-D mesh"):
        make_collectives(None, None, DistAttnConfig(runtime_config=RuntimeConfig(hierarchical_comm=True)))
    native = DistAttnConfig(runtime_config=RuntimeConfig(native_grpcoll=True))
    monkeypatch.setattr("magi_attention.comm.registry.entry_points", lambda **_: ())
    with pytest.raises(RuntimeError, match=r'pip install "magi-attention\[comm\]"'):
        make_collectives(None, None, native)


class RefusingTransport:
    def __init__(self, group: object) -> None:
        raise AssertionError("must not be made")

    @staticmethod
    def supports(device: torch.device) -> Support:
        return Support(False, "no such link here")


def test_a_native_transport_is_asked_before_it_is_made(monkeypatch):
    point = SimpleNamespace(load=lambda: RefusingTransport)
    monkeypatch.setattr("magi_attention.comm.registry.entry_points", lambda **_: (point,))
    with pytest.raises(RuntimeError, match=r"native_grpcoll can't be used on .*: no such link here"):
        make_collectives(None, None, DistAttnConfig(runtime_config=RuntimeConfig(native_grpcoll=True)))
