# SPDX-License-Identifier: Apache-2.0
"""All ranks of a group as threads of one process, which share its one device: every arrangement of kernels on a GPU.

Rows are packed, put in place, merged and summed by the kernels that a group of several GPUs uses, on its streams; only
the transfer itself is a copy.
"""

import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from threading import Barrier

import numpy as np
import pytest
import torch
from torch import Tensor

from magi_attention.comm.alltoall import AllToAllCollectives
from magi_attention.comm.packing import Pieces
from magi_attention.comm.work import PendingWork, StreamWork
from magi_attention.common import packed
from magi_attention.common.intervals import merge
from magi_attention.common.slices import SliceTable
from magi_attention.config import LocalityDispatchAlg, RuntimeConfig
from magi_attention.kernels.merge import merge_into
from magi_attention.kernels.protocol import AttentionResult
from magi_attention.kernels.registry import installed_backends
from magi_attention.plan.build import build_plans
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.layout import Layout
from magi_attention.plan.stages import StageOptions
from magi_attention.runtime import early, job
from magi_attention.runtime.autograd import dist_attn_func
from magi_attention.runtime.costs import Costs
from magi_attention.runtime.job import DistAttnRuntime
from magi_attention.testing.metric import assert_within_pytorch_error
from magi_attention.testing.oracle import dense_attention, dense_mask, masked_attention
from tests.core.test_schedule import COSTS, in_both_passes

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS, HEADS, DIM = 384, (4, 2), 32
MASKS = {
    "causal": packed.varlen([0, TOKENS]),
    "packed causal": packed.varlen([0, 125, 150, 320, TOKENS]),
    "full": SliceTable([[0, TOKENS, 0, TOKENS, 0]]),
    "window": packed.sliding_window([0, TOKENS], left=50, right=0),
}
SHORT = Costs(
    pair=0.0,
    fetched_row=1.0,
    exchange=1.0,
    merged_row=0.0,
    summed_row=0.0,
    call=0.0,
    merge=0.0,
    regular=0.0,
    least_work=1.0,
    window=128,
)
"""Of passes that are over before the host could launch an exchange."""


@dataclass
class Switch:
    """Where the ranks' packed rows lie while all copy what is for them."""

    num_ranks: int
    barrier: Barrier = field(init=False)
    slots: dict[int, Sequence[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = Barrier(self.num_ranks, timeout=60)


class ThreadCollectives(AllToAllCollectives):
    """One rank's collectives among threads."""

    def __init__(self, rank: int, switch: Switch) -> None:
        super().__init__(None)
        self.rank, self.switch, self.num_ranks = rank, switch, switch.num_ranks

    def _can_send_pieces(self, device: torch.device) -> bool:
        return True

    def _send(
        self, packed: Tensor | Pieces, landed: Tensor, counts: tuple[list[int], list[int]], async_op: bool
    ) -> None:
        send, recv = counts
        pairs = zip(*packed, strict=True) if isinstance(packed, Pieces) else [(packed.split(send), landed.split(recv))]
        for sent, received in pairs:
            assert [len(piece) for piece in sent] == send
            self.switch.slots[self.rank] = sent
            self.switch.barrier.wait()
            for peer, into in enumerate(received):
                into.copy_(self.switch.slots[peer][self.rank])
            self.switch.barrier.wait()


def attend(rank: int, switch: Switch, plan, costs, tensors: list[Tensor], keep: bool) -> list[Tensor]:
    """One rank's out, lse, dq, dk and dv."""
    options = RuntimeConfig(kernel_backend="reference", keep_received=keep).resolved()
    runtime = DistAttnRuntime(plan, ThreadCollectives(rank, switch), None, options, costs)
    rows = torch.from_numpy(plan.layout.positions(rank)).to(tensors[0].device)
    q, k, v, dout, dlse = (x[rows] for x in tensors)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    for _ in range(2):  # the second call takes what the first one prepared
        out, meta = dist_attn_func(*leaves, runtime)
        with torch.autograd.set_multithreading_enabled(False):
            gradients = torch.autograd.grad((out, meta.lse), leaves, (dout, dlse))
    return [out.detach(), meta.lse.detach(), *gradients]


def attend_on_all(slices, layout, degree, costs, tensors: list[Tensor], keep: bool) -> list[list[Tensor]]:
    """What :func:`attend` returns on every rank."""
    plans = build_plans(slices, layout, range(layout.num_ranks), StageOptions(degree=degree, min_piece=16))
    switch = Switch(layout.num_ranks)
    with ThreadPoolExecutor(layout.num_ranks) as pool:
        running = [pool.submit(attend, rank, switch, plan, costs, tensors, keep) for rank, plan in enumerate(plans)]
        return [each.result() for each in running]


def dense(attend_densely, dtype: torch.dtype, tensors: list[Tensor]) -> list[Tensor]:
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors[:3])
    out, lse, _ = attend_densely(q, k, v)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (tensors[3].to(out), tensors[4].to(lse)))
    return [out.detach(), lse.detach(), *gradients]


@pytest.fixture(autouse=True)
def any_rows_may_be_kept(monkeypatch):
    monkeypatch.setattr(job, "MOST_KEPT", 100.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*sorted(COSTS), "short"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_arrangement_is_right(device, dtype, name, mask, monkeypatch):
    monkeypatch.setattr(early, "LEAST_EARLY_ROWS", 1)
    slices, costs = MASKS[mask], in_both_passes(SHORT if name == "short" else replace(COSTS[name], window=16))
    draw = torch.Generator().manual_seed(0)
    shapes = ((HEADS[0], DIM), (HEADS[1], DIM), (HEADS[1], DIM), (HEADS[0], DIM))
    tensors = [torch.randn(TOKENS, *shape, generator=draw).to(device, dtype) for shape in shapes]
    tensors.append(torch.randn(TOKENS, HEADS[0], generator=draw).to(device))
    truth = dense(lambda q, k, v: dense_attention(q, k, v, slices), torch.float64, tensors)
    kept = dense_mask(slices, TOKENS, TOKENS, device)
    plain = dense(lambda q, k, v: masked_attention(q, k, v, kept), dtype, tensors)
    for num_ranks, degree, keep in ((2, 1, True), (2, 1, False), (3, 2, False)):
        layout = make_layout(
            slices, num_real=TOKENS, total=TOKENS, chunk_size=16, num_ranks=num_ranks, algorithm=LocalityDispatchAlg()
        )
        if num_ranks == 3:  # runs of any length
            cuts = np.array([0, 3, 64, 125, 150, 200, 256, 331, TOKENS])
            layout = Layout(TOKENS, TOKENS, 16, num_ranks, np.array([0, 1, 0, 2, 1, 0, 1, 2]), cuts)
        order = torch.from_numpy(np.concatenate([layout.positions(rank) for rank in range(num_ranks)])).to(device)
        results = attend_on_all(slices, layout, degree, costs, tensors, keep)
        for number, (reference, pytorch) in enumerate(zip(truth, plain, strict=True)):
            actual = torch.cat([result[number] for result in results])
            says = f"{('out', 'lse', 'dq', 'dk', 'dv')[number]}, {num_ranks} ranks, kept {keep}"
            if dtype == torch.float64:
                torch.testing.assert_close(actual, reference[order], rtol=1e-9, atol=1e-9, msg=says)
            else:
                assert_within_pytorch_error(actual, reference[order], pytorch[order], 2.0, says)


class KeysFirst:
    """The reference, which tells of gradients of keys before it returns those of queries."""

    def __init__(self) -> None:
        self.reference = installed_backends()["reference"]
        self.num_told = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.reference, name)

    def backward_keys_first(self, keys_done, target, *tensors) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = self.reference.backward(*tensors)
        keys_done(dk, dv)
        self.num_told += 1
        return dq, dk, dv


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(COSTS))
def test_gradients_of_keys_go_home_before_those_of_queries_are_there(device, name, monkeypatch):
    slices = packed.varlen([0, TOKENS])
    layout = make_layout(
        slices, num_real=TOKENS, total=TOKENS, chunk_size=16, num_ranks=2, algorithm=LocalityDispatchAlg()
    )
    shapes = ((HEADS[0], DIM), (HEADS[1], DIM), (HEADS[1], DIM), (HEADS[0], DIM), (HEADS[0],))
    tensors = [torch.randn(TOKENS, *shape, dtype=torch.float64, device=device) for shape in shapes]
    expected = attend_on_all(slices, layout, 1, in_both_passes(COSTS[name]), tensors, keep=True)
    backend, launched_inside, begun_inside = KeysFirst(), [], []
    monkeypatch.setitem(installed_backends(), "reference", backend)
    reduce = ThreadCollectives.reduce

    def is_inside() -> bool:
        return any(frame.name == "backward_keys_first" for frame in traceback.extract_stack())

    def noted_reduce(self, *arguments, **options):
        launched_inside.append(is_inside())
        return reduce(self, *arguments, **options)

    # Only on what travels home are kernels for queries to wait while they are launched.
    for kind in (PendingWork, StreamWork):
        monkeypatch.setattr(kind, "wait_packed", lambda self: begun_inside.append(is_inside()))
    monkeypatch.setattr(ThreadCollectives, "reduce", noted_reduce)
    actual = attend_on_all(slices, layout, 1, in_both_passes(COSTS[name]), tensors, keep=True)
    # Two ranks attend twice; where a kernel on own rows comes last, it hides the way home.
    assert len(launched_inside) == 4
    assert sum(launched_inside) == backend.num_told == (4 if name == "together" else backend.num_told)
    assert sum(begun_inside) == backend.num_told
    for ours, wanted in zip(actual, expected, strict=True):
        for x, y in zip(ours, wanted, strict=True):
            assert torch.equal(x, y)


class SomeKeysFirst(KeysFirst):
    """The same, which also says when gradients of some keys are there."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[tuple[int, int], ...]] = []
        self.given: list[tuple[Tensor, Tensor]] = []

    def backward_keys_first(self, keys_done, target, *tensors) -> tuple[Tensor, Tensor, Tensor]:
        dq, *of_keys = self.reference.backward(*tensors)
        dk, dv = (x.bfloat16() for x in of_keys)
        self.asked.append(tensors[-1].first_keys)
        self.given.append((dk, dv))
        keys_done(dk, dv, *([rows_there] if tensors[-1].first_keys else []))
        return dq, dk, dv


def rows_there(stream) -> None:
    """Lets a stream wait until they are."""


@pytest.mark.parametrize("can_send_early", [False, True])
@pytest.mark.parametrize("in_float32", [False, True])
@pytest.mark.parametrize("name", sorted(COSTS))
def test_gradients_of_received_keys_go_home_before_those_of_own_keys_are_there(
    name, in_float32, can_send_early, monkeypatch
):
    slices = packed.varlen([0, TOKENS])
    layout = make_layout(
        slices, num_real=TOKENS, total=TOKENS, chunk_size=16, num_ranks=2, algorithm=LocalityDispatchAlg()
    )
    shapes = ((HEADS[0], DIM), (HEADS[1], DIM), (HEADS[1], DIM), (HEADS[0], DIM), (HEADS[0],))
    tensors = [torch.randn(TOKENS, *shape, dtype=torch.bfloat16) for shape in shapes]
    backend, given = SomeKeysFirst(), []
    monkeypatch.setitem(installed_backends(), "reference", backend)
    monkeypatch.setattr(ThreadCollectives, "sends_early", lambda *_: can_send_early)
    monkeypatch.setenv("MAGI_ATTENTION_BACKWARD_HIGH_PRECISION_REDUCE", "1" if in_float32 else "0")
    reduce = ThreadCollectives.reduce

    def noted_reduce(self, partials, table, into, own_places=None, rows_there=None):
        given.append((self.rank, table, rows_there))
        return reduce(self, partials, table, into, own_places=own_places)

    monkeypatch.setattr(ThreadCollectives, "reduce", noted_reduce)
    attend_on_all(slices, layout, 1, in_both_passes(COSTS[name], backward_regular=1e9), tensors, keep=True)
    assert len(given) == 4
    early = [table for _, table, ready in given if ready is rows_there]
    assert all(ready in (None, rows_there) for _, _, ready in given)
    may_go_early = can_send_early and not in_float32
    assert len(early) in {"together": [4], "apart": [0]}.get(name, [0, 2, 4]) if may_go_early else not early
    for table in early:  # of a buffer with own rows in it, the runs that come home
        received = tuple((start, stop) for start, stop in merge(table.recv[:, 1:]).tolist())
        assert received in backend.asked
        assert 0 < sum(stop - start for start, stop in received) < table.num_received
    assert may_go_early or not any(backend.asked)


@pytest.mark.parametrize("regular", [0.0, 1e9], ids=["several kernels", "one kernel"])
@pytest.mark.parametrize("mask", ["causal", "no late keys"])
@pytest.mark.parametrize("name", sorted(COSTS))
def test_only_gradients_that_go_home_as_the_kernel_writes_them_are_there_before_its_end(
    name, mask, regular, monkeypatch
):
    """Not sums of several kernels, nor copies, as of a kernel for some of the keys: these are made behind all of it."""
    slices = packed.varlen([0, TOKENS]) if mask == "causal" else SliceTable([[0, TOKENS, 0, TOKENS - 150, 0]])
    layout = make_layout(
        slices, num_real=TOKENS, total=TOKENS, chunk_size=16, num_ranks=2, algorithm=LocalityDispatchAlg()
    )
    shapes = ((HEADS[0], DIM), (HEADS[1], DIM), (HEADS[1], DIM), (HEADS[0], DIM), (HEADS[0],))
    tensors = [torch.randn(TOKENS, *shape, dtype=torch.bfloat16) for shape in shapes]
    backend = SomeKeysFirst()
    monkeypatch.setitem(installed_backends(), "reference", backend)
    monkeypatch.setattr(ThreadCollectives, "sends_early", lambda *_: True)
    reduce, written = ThreadCollectives.reduce, []

    def noted_reduce(self, partials, table, into, own_places=None, rows_there=None):
        if rows_there is not None:
            written.append(any(x is partials[0] and y is partials[1] for x, y in backend.given))
        return reduce(self, partials, table, into, own_places=own_places)

    monkeypatch.setattr(ThreadCollectives, "reduce", noted_reduce)
    attend_on_all(slices, layout, 1, in_both_passes(COSTS[name], backward_regular=regular), tensors, keep=True)
    assert all(written)
    assert len(written) == sum(map(bool, backend.asked))  # no others are asked for first
    assert written or name != "together" or mask != "causal" or not regular


class WritesInPlace:
    """The reference, which writes results where it is told to."""

    def __init__(self) -> None:
        self.reference = installed_backends()["reference"]
        self.num_written = {"forward": 0, "backward": 0}

    def __getattr__(self, name: str) -> object:
        return getattr(self.reference, name)

    def _written(self, direction: str, target: Tensor, result: Tensor) -> Tensor:
        assert (target.shape, target.dtype, target.is_contiguous()) == (result.shape, result.dtype, True)
        self.num_written[direction] += 1
        return target.copy_(result)

    def forward_into(self, out, lse, q, k, v, call) -> AttentionResult:
        result = self.reference.forward(q, k, v, call)
        assert (lse.shape, lse.dtype) == (result.lse.shape, result.lse.dtype)
        out = self._written("forward", out, result.out.to(q.dtype))
        return result._replace(out=out, lse=lse.copy_(result.lse))

    def backward_into(self, target, *tensors) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = self.reference.backward(*tensors)
        return self._written("backward", target, dq.to(tensors[1].dtype)), dk, dv


class MergesInPlace(WritesInPlace):
    """The same, which also merges them where it is told to."""

    def forward_onto(self, out, lse, q, k, v, call) -> Tensor | None:
        result = self.reference.forward(q, k, v, call)
        merge_into(out, lse, result.out, result.lse)
        self.num_written["onto"] = 1
        return result.max_logits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_kernels_that_write_in_place_give_the_same(device, dtype, monkeypatch):
    monkeypatch.setattr(early, "LEAST_EARLY_ROWS", 1)
    draw = torch.Generator().manual_seed(0)
    shapes = ((HEADS[0], DIM), (HEADS[1], DIM), (HEADS[1], DIM), (HEADS[0], DIM))
    tensors = [torch.randn(TOKENS, *shape, generator=draw).to(device, dtype) for shape in shapes]
    tensors.append(torch.randn(TOKENS, HEADS[0], generator=draw).to(device))
    backends, tolerance = (WritesInPlace(), MergesInPlace()), 1e-9 if dtype == torch.float64 else 0.05
    for name, (mask, degree) in product(COSTS, (("packed causal", 1), ("window", 2))):
        slices, costs = MASKS[mask], in_both_passes(replace(COSTS[name], window=16))
        layout = make_layout(
            slices, num_real=TOKENS, total=TOKENS, chunk_size=16, num_ranks=2, algorithm=LocalityDispatchAlg()
        )
        expected = attend_on_all(slices, layout, degree, costs, tensors, keep=False)
        for backend in backends:
            with monkeypatch.context() as patch:
                patch.setitem(installed_backends(), "reference", backend)
                actual = attend_on_all(slices, layout, degree, costs, tensors, keep=False)
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert all(count for backend in backends for count in backend.num_written.values())
    assert "onto" in backends[1].num_written
