# SPDX-License-Identifier: Apache-2.0
"""A full mask's backward pass by parts of the keys, without a GPU: which parts, and what is launched where."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall
from magi_kernels_blackwell.fa4 import launch, parts
from magi_kernels_blackwell.fa4.parts import (
    Extent,
    Order,
    Part,
    PassTensors,
    launch_ahead,
    launch_parts,
    order_of_parts,
)
from magi_kernels_blackwell.masks import packed_mask
from magi_kernels_blackwell.prepared import Begun
from tests.core.log_streams import Stream, log_of_streams

NUM_Q, NUM_K, HEADS = 64, 8192, (32, 8)
FULL = [[0, NUM_Q, 0, NUM_K, 0]]


def order_of(first_keys, rows=FULL, heads=HEADS, num_k=NUM_K, **options):
    call = AttentionCall(SliceTable(rows), 0.5, first_keys=first_keys, **options)
    return order_of_parts(packed_mask(call.slices, NUM_Q, num_k), call, heads, num_k)


@pytest.mark.parametrize(
    ("first_keys", "others"),
    [
        (((0, 4096),), [(4096, 8192)]),
        (((4096, 8192),), [(0, 4096)]),
        (((0, 100), (4100, 8192)), [(100, 4100)]),
        (((100, 4096),), [(0, 100), (4096, 8192)]),
    ],
)
def test_others_than_awaited_keys_are_left_of_the_last_heads(first_keys, others):
    """Of as few as make enough blocks: 32 of keys, for 4 heads of queries each."""
    expected = [((0, 4), (0, 8192)), *[((4, 8), run) for run in first_keys]], [((4, 8), run) for run in others]
    assert order_of(first_keys) == expected
    in_slices = [[0, NUM_Q, 0, 3000, 0], [0, NUM_Q, 3000, 8192, 0]]
    assert order_of(first_keys, in_slices) == expected


def test_all_heads_may_be_the_last():
    rows = [[0, NUM_Q, 0, 8100, 0]]
    awaited, others = order_of(((0, 4096),), rows, (128, 1), 8100)
    assert awaited == [((0, 1), (0, 4096))]
    assert others == [((0, 1), (4096, 8100))]


@pytest.mark.parametrize(
    ("first_keys", "options"),
    {
        "nobody waits": ((), {}),
        "all wait": (((0, 8192),), {}),
        "sums have an order": (((0, 4096),), {"deterministic": True}),
        "little": (((0, 4096),), {"heads": (8, 8)}),
        "not all queries": (((0, 4096),), {"rows": [[0, 63, 0, 8192, 0]]}),
        "causal": (((0, 4096),), {"rows": [[0, 64, 0, 8192, 1]]}),
        "documents": (((0, 4096),), {"rows": [[0, 32, 0, 4096, 0], [32, 64, 4096, 8192, 0]]}),
        "many runs": (((0, 100), (200, 300), (400, 500)), {}),
    }.values(),
)
def test_else_all_are_computed_at_once(first_keys, options):
    assert order_of(first_keys, **options) is None


def test_awaited_parts_are_launched_ahead(monkeypatch):
    log = log_of_streams(monkeypatch)
    current, ahead = Stream("current", log), Stream("ahead", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(parts, "_stream_ahead", lambda device, handle: ahead)
    lse, dlse, dq = (torch.zeros(2) for _ in range(3))
    q, k = torch.zeros(1, 3, 8, 1), torch.zeros(1, 3, 4, 1)
    begun = Begun(*torch.arange(24).view(3, 1, 8, 1).unbind())

    class Kernels:
        """Write down what they are asked for, and check what they are given."""

        def __init__(self, name: str) -> None:
            self.name = name
            self.of_keys = f"dk of {name}", f"dv of {name}"

        def begin(self, tensors, *given):
            assert all(a is b for a, b in zip(given, (lse, dlse, dq), strict=True))
            log.append(f"begin {tensors[0]}")
            return begun

        def sums_of_keys(self, like, of_keys):
            assert like is lse
            assert tuple(of_keys) == self.of_keys
            log.append(f"zero sums of {self.name}")
            return f"sums of {self.name}"

        def compute(self, tensors, of_heads, sums, scale):
            assert (sums, scale) == (f"sums of {self.name}", 0.5)
            log.append(f"compute {tensors[0]} by {of_heads.dpsum[0, :, 0].tolist()}")

        def round_keys(self, sums, of_keys, scale):
            assert (sums, tuple(of_keys), scale) == (f"sums of {self.name}", self.of_keys, 0.5)
            log.append(f"round {self.name}")

        def round_queries(self, given, target, scale):
            assert given is begun
            assert target is dq
            assert scale == 0.5
            log.append("round queries")

    def part(name: str) -> Part:
        kernels = Kernels(name)
        return Part(kernels, PassTensors(name, q, k, "v", "out", lse, dlse, dq, *kernels.of_keys))

    def keys_done(rows_there):
        log.append("keys are done")
        rows_there(Stream("reader", log))

    named = {"a": Extent((0, 3), (0, 5)), "b": Extent((3, 4), (0, 2)), "c": Extent((3, 4), (2, 5))}
    names = {extent: name for name, extent in named.items()}
    order = Order([named["a"], named["b"]], [named["c"]])
    launch_parts(part("all"), order, lambda extent: part(names[extent]), 0.5, keys_done)
    assert log == [
        *("begin all", "zero sums of a", "zero sums of b", "zero sums of c"),
        *("current marks", "ahead waits for mark 1 of current", "on ahead"),
        *("compute a by [8, 9, 10, 11, 12, 13]", "compute b by [14, 15]", "round a", "round b", "on current"),
        *("ahead marks", "compute c by [14, 15]", "round c", "current waits for mark 1 of ahead"),
        *("keys are done", "reader waits for mark 1 of ahead", "round queries"),
    ]


@pytest.mark.parametrize("heads", [HEADS, (128, 1), (20, 20)])
def test_every_gradient_is_computed_once_by_queries_of_its_heads(monkeypatch, heads):
    """On Hopper, if somebody waits; else all are computed at once."""
    (heads_q, heads_k), group = heads, heads[0] // heads[1]
    number = torch.arange(heads_q).view(1, -1, 1)
    q = number.expand(NUM_Q, heads_q, 8).contiguous()
    k = number[:, :heads_k].expand(NUM_K, heads_k, 8).contiguous()
    lse = number[0].expand(heads_q, NUM_Q).contiguous()
    call = AttentionCall(SliceTable(FULL), 0.5, first_keys=((0, 4096),))
    launched, told = [], []

    class Kernels:
        def __init__(self, library, arch, tensors, *_):
            self.shapes = [x.shape for x in tensors.inputs]

        def __call__(self, tensors, lse, dlse, gradients, scale, keys_done):
            begun = self.begin(tensors, lse, dlse, gradients[0])
            self.compute(tensors, begun, gradients[1:], scale)
            self.round_keys(gradients[1:], gradients[1:], scale)
            keys_done()
            self.round_queries(begun, gradients[0], scale)

        def begin(self, tensors, lse, dlse, dq):
            assert [x.shape for x in tensors] == self.shapes
            assert dq.shape[2] == heads_q
            assert torch.equal(lse[0], number[0].expand_as(lse[0]))
            return Begun(*[number[0].clone().view(1, -1, 1)] * 3)

        def sums_of_keys(self, like, of_keys):
            return of_keys

        def compute(self, tensors, begun, sums, scale):
            assert [x.shape for x in tensors] == self.shapes
            of_queries = tensors[1][0, 0, :, 0]
            assert torch.equal(of_queries, begun.dq_sum[0, :, 0])
            assert torch.equal(of_queries // group, tensors[2][0, 0, :, 0].repeat_interleave(group))
            launched.append(self)

        def round_keys(self, sums, of_keys, scale):
            for each in of_keys:
                each += 1

        def round_queries(self, begun, dq, scale):
            dq.fill_(7)

    def new_zeros(q, k, v, into):
        return tuple(torch.zeros_like(x) for x in (q, k, v))

    monkeypatch.setattr(launch, "_prepare_backward", Kernels)
    monkeypatch.setattr(launch, "gradients_like", new_zeros)
    monkeypatch.setattr(parts, "launch_ahead", lambda device, awaited, others: awaited() or others() or "there")
    for arch, keys, num_parts in (
        (90, call.first_keys, 2 if heads[1] == 1 else 3),
        (100, call.first_keys, 1),
        (90, (), 1),
    ):
        launched.clear()
        told.clear()
        arguments = q, q, k, k, q, lse, None, replace(call, first_keys=keys)
        dq, dk, dv = launch.launch_own_backward(None, arch, *arguments, keys_done=lambda *x: told.append(x))
        assert len(launched) == num_parts
        ((of_keys, of_values, *there),) = told
        assert of_keys is dk
        assert of_values is dv
        assert there == (["there"] if num_parts > 1 else [])
        assert (dq == 7).all()
        assert (dk == 1).all()
        assert (dv == 1).all()


@pytest.mark.parametrize("with_dlse", [False, True])
def test_a_part_has_views_of_its_rows_and_heads(with_dlse):
    draw = torch.Generator().manual_seed(0)
    dout, q, out, dq = (torch.randn(5, 6, 4, generator=draw) for _ in range(4))
    k, v, dk, dv = (torch.randn(9, 3, 4, generator=draw) for _ in range(4))
    lse, dlse = torch.randn(6, 5, generator=draw), torch.randn(6, 5, generator=draw) if with_dlse else None
    tensors = PassTensors(dout, q, k, v, out, lse, dlse, dq, dk, dv)
    extent = Extent((1, 3), (4, 9))
    assert extent.queries(2) == (2, 6)
    part = tensors.part(extent)
    wanted = PassTensors(
        *(dout[:, 2:], q[:, 2:], k[4:, 1:], v[4:, 1:], out[:, 2:]),
        *(lse[2:], None if dlse is None else dlse[2:], dq[:, 2:], dk[4:, 1:], dv[4:, 1:]),
    )
    for got, each in zip(part, wanted, strict=True):
        if each is None:
            assert got is None
            continue
        assert got.data_ptr() == each.data_ptr()
        assert got.shape == each.shape
        assert got.stride() == each.stride()


@pytest.mark.parametrize("fails", ["awaited", "others"])
def test_after_an_error_the_current_stream_waits_for_what_was_launched_ahead(monkeypatch, fails):
    log = log_of_streams(monkeypatch)
    current, ahead = Stream("current", log), Stream("ahead", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(parts, "_stream_ahead", lambda device, handle: ahead)

    def launch(name: str) -> None:
        log.append(name)
        if name == fails:
            raise RuntimeError(f"no {name}")

    with pytest.raises(RuntimeError, match=f"no {fails}"):
        launch_ahead(torch.device("cuda", 0), lambda: launch("awaited"), lambda: launch("others"))
    number = ahead.num_marks
    assert fails in log
    assert log[-2:] == ["ahead marks", f"current waits for mark {number} of ahead"]


def test_each_stream_has_one_ahead_of_it_with_priority(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: SimpleNamespace(priority=priority))
    parts._stream_ahead.cache_clear()
    device = torch.device("cuda", 0)
    first, again, other = (parts._stream_ahead(device, current) for current in (7, 7, 8))
    parts._stream_ahead.cache_clear()
    assert first is again is not other
    assert first.priority < 0
