# SPDX-License-Identifier: Apache-2.0
"""Parameters of launches that are kept by the addresses of their tensors; needs no GPU."""

import ctypes
from dataclasses import replace
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from magi_attention.common import packed
from magi_attention.kernels.protocol import AttentionCall
from magi_kernels_hopper import backward, combine, forward
from magi_kernels_hopper.driver import Ready, TensorMap
from magi_kernels_hopper.variants import BackwardVariant, ForwardVariant

TOKENS, HEADS, DIM = 300, (4, 2), 64
CALL = AttentionCall(packed.varlen([0, 100, TOKENS]), DIM**-0.5)


class Kernel:
    """Notes what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[Ready] = []

    def launch_ready(self, blocks: int, stream: int, ready: Ready) -> None:
        assert ready.address == ctypes.addressof(ready.pointers)
        assert ready.pointers[0] == ctypes.addressof(ready.params)
        self.launches.append(ready)


def kernels_of_all_kinds(variant: BackwardVariant, device: torch.device) -> SimpleNamespace:
    return SimpleNamespace(prepare=Kernel(), backward=Kernel(), queries=(Kernel(), Kernel()))


class Maps:
    """Of a tensor's address and strides."""

    def get(self, x: Tensor, box: object, swizzle_bytes: int) -> bytes:
        return bytes(TensorMap((x.data_ptr(), *x.stride())))


ZEROS = torch.zeros(4, dtype=torch.int32)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    for module in (forward, backward):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
        monkeypatch.setattr(module, "counters", lambda device, stream: ZEROS)
        monkeypatch.setattr(module, "tensor_maps", lambda device: Maps())
    monkeypatch.setattr(forward, "_kernel", lambda variant, device: Kernel())
    monkeypatch.setattr(backward, "_kernels", kernels_of_all_kinds)


def tensors(*heads: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """With as much memory behind each, for :func:`apart` and :func:`wider`."""
    return [torch.zeros(2 * TOKENS, each, DIM, dtype=dtype)[:TOKENS] for each in heads]


def address_of(tensor_map: object) -> int:
    return int(tensor_map.words[0])  # type: ignore[attr-defined]


def by_token() -> Tensor:
    return torch.zeros(TOKENS, HEADS[0])


# What may be different about a tensor of a later call.


def elsewhere(x: Tensor | None) -> Tensor:
    return by_token() if x is None else torch.zeros_like(x)


def apart(x: Tensor) -> Tensor:
    """At the same address, as a view of packed keys and values."""
    return x.as_strided(x.shape, (2 * x.stride(0), *x.stride()[1:]))


def by_head(x: Tensor) -> Tensor:
    return x.as_strided(x.shape, (1, x.shape[0]))


def half(x: Tensor) -> Tensor:
    return x.view(torch.float16)


def wider(x: Tensor) -> Tensor:
    """At the same address, in float32."""
    return x.as_strided((2 * x.numel(),), (1,)).view(torch.float32).view(x.shape)


def fields(params: ctypes.Structure, prefix: str = "") -> dict[str, object]:
    """Of a structure and those in it, but tensor maps whole."""
    found: dict[str, object] = {}
    for name, *_ in params._fields_:
        value = getattr(params, name)
        if isinstance(value, TensorMap):
            found[prefix + name] = bytes(value)
        elif isinstance(value, ctypes.Structure):
            found |= fields(value, f"{prefix}{name}.")
        elif not isinstance(value, ctypes.Array):  # padding
            found[prefix + name] = value
    return found


def changed(before: Ready, after: Ready) -> set[str]:
    """The names of the parameters that differ."""
    assert before is not after
    old, new = fields(before.params), fields(after.params)
    return {name for name in old if old[name] != new[name]}


class Backward:
    """A prepared backward pass with the tensors of a call."""

    INPUTS = ("q", "dout", "k", "v", "out", "lse", "dlse")

    def __init__(self, *, fine: bool = False, call: AttentionCall = CALL) -> None:
        self.q, self.dout, self.k, self.v, self.out = tensors(HEADS[0], HEADS[0], HEADS[1], HEADS[1], HEADS[0])
        self.lse, self.dlse = by_token(), None
        self.dq, self.dk, self.dv = (torch.zeros_like(x) for x in (self.q, self.k, self.v))
        self.prepared = backward.PreparedBackward(
            [BackwardVariant(DIM, DIM, "bf16", False, fine)], call, self.q, self.k
        )
        self.workspace = self.prepared.workspace(torch.device("cpu"))

    def launch(self, call: AttentionCall = CALL, **others: Any) -> tuple[Ready, Ready]:
        given = {name: others.get(name, getattr(self, name)) for name in (*self.INPUTS, "dq", "dk", "dv", "workspace")}
        gradients = given["dq"], given["dk"], given["dv"]
        self.prepared.launch(
            call, tuple(given[name] for name in self.INPUTS), gradients, given["workspace"], 1, others.get("keys_done")
        )
        kernels = self.prepared.kernels
        return kernels.prepare.launches[-1], kernels.backward.launches[-1]


def test_backward_parameters_are_kept_for_the_same_tensors_alone():
    case = Backward()
    first = case.launch()
    assert all(again is before for again, before in zip(case.launch(), first, strict=True))
    (other,) = tensors(HEADS[0])
    rows, params = case.launch(dout=other)
    assert rows is not first[0]
    assert rows.params.dout == address_of(params.params.dout) == other.data_ptr()
    dlse = torch.zeros(TOKENS, HEADS[0])
    rows, _ = case.launch(dlse=dlse)
    assert rows.params.dlse == dlse.data_ptr()
    rows, params = case.launch()
    assert rows.params.dlse is None
    assert rows.params.dout == address_of(params.params.dout) == case.dout.data_ptr()


def test_a_launch_rings_where_somebody_waits(monkeypatch):
    told, word, is_captured = [], torch.zeros(1, dtype=torch.int32), False
    rung = SimpleNamespace(lock=Lock(), address=word.data_ptr(), count_launch=lambda: "there")
    monkeypatch.setattr(backward, "bell", lambda device, stream: None if is_captured else rung)
    call = replace(CALL, first_keys=((50, 130),))
    case = Backward(call=call)
    _, quiet = case.launch(call)
    rows, loud = case.launch(call, keys_done=lambda *x: told.append(x))
    assert told == [(case.dk, case.dv, "there")]
    assert changed(quiet, loud) == {"awaited_done", "awaited_there", "num_awaited"}
    assert loud.params.awaited_there == word.data_ptr()
    assert loud.params.num_awaited == 2 * 2 * HEADS[1]  # keys 50 to 130 are in two tiles, of two halves each
    last = rows.params.items_done + 4 * (rows.params.num_items_done - 1)
    assert last == loud.params.awaited_done  # which the launch before leaves zero
    is_captured = True
    assert case.launch(call, keys_done=lambda *x: told.append(x))[1] is quiet
    assert told[1] == (case.dk, case.dv)


def test_copies_of_inputs_are_made_each_time():
    case = Backward()
    (wide,) = tensors(HEADS[0], dtype=torch.float32)
    for _ in range(2):
        rows, params = case.launch(dout=wide)
        assert rows.params.dout == address_of(params.params.dout) != wide.data_ptr()
    assert len({id(each) for each in case.prepared.kernels.backward.launches}) == 2
    strided = torch.zeros(TOKENS, 2 * HEADS[0], DIM, dtype=torch.bfloat16)[:, ::2]
    rows, _ = case.launch(dout=strided)
    assert rows.params.dout != strided.data_ptr()


PROGRESS = {"row_terms", "added", "complete", "items_done"}


@pytest.mark.parametrize(
    ("name", "differs", "of_rows", "of_params"),
    [
        ("q", elsewhere, set(), {"q"}),
        ("dout", elsewhere, {"dout"}, {"dout"}),
        ("k", elsewhere, set(), {"k"}),
        ("v", elsewhere, set(), {"v"}),
        ("out", elsewhere, {"out"}, set()),
        ("lse", elsewhere, {"lse"}, set()),
        ("dlse", elsewhere, {"dlse"}, set()),
        ("dq", elsewhere, {"dq"}, {"dq"}),
        ("dk", elsewhere, set(), {"dk"}),
        ("dv", elsewhere, set(), {"dv"}),
        ("workspace", elsewhere, PROGRESS, PROGRESS | {"dq_sums", "partial"}),
        ("q", apart, set(), {"q"}),
        ("k", apart, set(), {"k"}),
        ("v", apart, set(), {"v"}),
        ("lse", by_head, {"lse_token", "lse_head"}, set()),
        # Of these, copies are read.
        ("dout", apart, {"dout"}, {"dout"}),
        ("out", apart, {"out"}, set()),
        ("dout", half, {"dout"}, {"dout"}),
        ("out", half, {"out"}, set()),
    ],
)
def test_backward_parameters_follow_each_tensor(name, differs, of_rows, of_params):
    case = Backward()
    first = case.launch()
    other = case.launch(**{name: differs(getattr(case, name))})
    assert tuple(changed(*pair) for pair in zip(first, other, strict=True)) == (of_rows, of_params)
    assert all(again is before for again, before in zip(case.launch(), first, strict=True))


def test_backward_parameters_follow_the_counters(monkeypatch):
    case = Backward()
    first = case.launch()
    others = torch.zeros_like(ZEROS)
    monkeypatch.setattr(backward, "counters", lambda device, stream: others)
    assert [changed(*pair) for pair in zip(first, case.launch(), strict=True)] == [set(), {"counters"}]


def test_backward_parameters_follow_each_gradient_of_lse():
    case, given = Backward(), [by_token(), by_token()]
    (rows, _), (other_rows, _) = (case.launch(dlse=dlse) for dlse in given)
    assert changed(rows, other_rows) == {"dlse"}


def test_parts_of_the_workspace_lie_apart_and_are_aligned():
    case = Backward()
    rows, params = (ready.params for ready in case.launch())
    start, prepared = case.workspace.data_ptr(), case.prepared
    sizes, parts = prepared.sizes, 4 * prepared.num_tiles * prepared.sizes.dq_parts
    num_rows = prepared.num_tiles * sizes.tile_m
    spans = [
        (params.dq_sums, 4 * num_rows * DIM),
        (params.row_terms, 8 * (num_rows + backward.GAP * prepared.num_tiles)),
        (params.partial, 4 * prepared.num_shared * sizes.tile_n * DIM),
        (params.added, parts),
        (params.complete, parts),
        (params.items_done, 4 * prepared.num_shared),
    ]
    end = start
    for address, num_bytes in spans:
        assert address >= end
        end = address + num_bytes
    assert end <= start + case.workspace.numel()
    assert all((address - start) % backward.PART_BYTES == 0 for address, _ in spans[:4])
    for name in ("row_terms", "added", "complete", "items_done"):
        assert getattr(rows, name) == getattr(params, name)


def test_forward_parameters_are_kept_for_the_same_tensors_alone():
    q, k, v, out = tensors(HEADS[0], HEADS[1], HEADS[1], HEADS[0])
    lse = torch.zeros(TOKENS, HEADS[0])
    prepared = forward.PreparedForward(ForwardVariant(DIM, DIM, "bf16", False), CALL, q, k)
    assert prepared.tables.num_parts == 1
    for query in (q, q, torch.zeros_like(q)):
        prepared.launch(CALL, (query, k, v), (out, lse, None), False, 1)
    prepared.launch(CALL, (q, k, v), (out, lse, None), True, 1)
    first, again, other, merging = prepared._kernel.launches
    assert again is first
    assert address_of(other.params.q) != address_of(first.params.q) == q.data_ptr()
    assert (first.params.results.merges, merging.params.results.merges) == (0, 1)
    assert all(each.params.counters == ZEROS.data_ptr() for each in (first, other, merging))
    odd = torch.zeros(TOKENS * HEADS[0] * DIM + 1, dtype=torch.bfloat16)[1:].view(q.shape)
    for _ in range(2):
        prepared.launch(CALL, (odd, k, v), (out, lse, None), False, 1)
    *_, copied, copied_again = prepared._kernel.launches
    assert copied is not copied_again
    assert odd.data_ptr() not in (address_of(copied.params.q), address_of(copied_again.params.q))


class Forward:
    """A prepared forward pass with the tensors of a call."""

    def __init__(self) -> None:
        q, k, v, out = tensors(HEADS[0], HEADS[1], HEADS[1], HEADS[0])
        self.given = {"q": q, "k": k, "v": v, "out": out, "lse": by_token(), "max_logits": None, "merge": False}
        self.prepared = forward.PreparedForward(ForwardVariant(DIM, DIM, "bf16", False), CALL, q, k)

    def launch(self, call: AttentionCall = CALL, **others: object) -> Ready:
        q, k, v, *results, merge = (self.given | others).values()
        self.prepared.launch(call, (q, k, v), tuple(results), merge, 1)
        return self.prepared._kernel.launches[-1]


@pytest.mark.parametrize(
    ("name", "differs", "expected"),
    [
        ("q", elsewhere, {"q"}),
        ("k", elsewhere, {"k"}),
        ("v", elsewhere, {"v"}),
        ("out", elsewhere, {"results.out", "out"}),
        ("lse", elsewhere, {"results.lse"}),
        ("q", apart, {"q"}),
        ("k", apart, {"k"}),
        ("v", apart, {"v"}),
        ("lse", by_head, {"results.lse_token", "results.lse_head"}),
        ("out", wider, {"results.out_is_float", "out"}),
        ("max_logits", lambda _: torch.zeros(HEADS[0]), {"results.max_logits", "tolerance"}),
        ("merge", lambda _: True, {"results.merges"}),
    ],
)
def test_forward_parameters_follow_each_argument(name, differs, expected):
    case = Forward()
    first, other = case.launch(), {name: differs(case.given[name])}
    second = case.launch(**other)
    assert changed(first, second) == expected
    assert case.launch() is first
    assert case.launch(**other) is second


def test_forward_parameters_follow_the_largest_scores_and_the_counters(monkeypatch):
    case = Forward()
    one, two = torch.zeros(HEADS[0]), torch.zeros(HEADS[0])
    assert changed(case.launch(max_logits=one), case.launch(max_logits=two)) == {"results.max_logits"}
    first, others = case.launch(), torch.zeros_like(ZEROS)
    monkeypatch.setattr(forward, "counters", lambda device, stream: others)
    assert changed(first, case.launch()) == {"counters"}


# How to score, and the parameters that say it, of the forward kernel and of those of the backward pass.
SCORES = [
    ({"softmax_scale": 0.5}, {"scale", "to_log2"}, {"tolerance"}, {"dq_scale"}),
    ({"softmax_scale": -0.5}, {"scale", "to_log2"}, {"tolerance", "q"}, {"dq_scale", "q"}),  # which reads -q
    ({"softcap": 30.0}, {"cap_slope"}, {"scoring.softcap", "scoring.to_log2"}, {"cap"}),
]


@pytest.mark.parametrize(("others", "both", "of_forward", "of_backward"), SCORES)
def test_parameters_follow_scales_and_softcaps(others, both, of_forward, of_backward):
    """Nothing else about a launch depends on them, so that it is prepared once for all."""
    call, forward_case, backward_case = replace(CALL, **others), Forward(), Backward()
    first, second = forward_case.launch(), forward_case.launch(call)
    assert changed(first, second) == {f"scoring.{name}" for name in both} | of_forward
    assert forward_case.launch() is first
    (rows, params), (other_rows, other_params) = backward_case.launch(), backward_case.launch(call)
    assert not changed(rows, other_rows)
    assert changed(params, other_params) == both | of_backward
    assert backward_case.launch()[1] is params


@pytest.mark.parametrize("softmax_scale", [0.5, -0.25])
def test_gradients_of_queries_apart_follow_scales(softmax_scale):
    case = Backward(fine=True)
    for call in (CALL, replace(CALL, softmax_scale=softmax_scale)):
        case.launch(call)
    first, second = case.prepared._queries_kernel.launches
    of_signs = {"work.q"} if softmax_scale < 0 else set()
    assert changed(first, second) == {"work.scoring.scale", "work.scoring.to_log2", "dq_scale"} | of_signs
    assert second.params.dq_scale == softmax_scale
    assert second.params.work.scoring.scale == abs(softmax_scale)


def test_a_mask_keeps_nothing_for_each_scale_and_softcap(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 1, raising=False)
    q, k, v, out = tensors(HEADS[0], HEADS[1], HEADS[1], HEADS[0])
    lse, slices = by_token(), packed.varlen([0, 100, TOKENS])
    kept = []
    for softmax_scale in (0.125, 0.25, 0.5):
        for softcap in (0.0, 20 * softmax_scale):
            call = AttentionCall(slices, softmax_scale, softcap)
            forward.launch_forward(q, k, v, call, out, lse, merge=False)
            backward.launch_backward(torch.zeros_like(out), q, k, v, out, lse, None, call)
        kept.append(len(slices.__dict__["_derived"]))
    assert kept[0] == kept[1] == kept[2]


@pytest.fixture
def combination(monkeypatch):
    monkeypatch.setattr(combine, "_kernel", lambda variant, device: Kernel())
    tables = SimpleNamespace(num_parts=3, parts=torch.zeros(9, dtype=torch.int32), tile_q=64)
    return combine.Combination(ForwardVariant(DIM, DIM, "bf16", False), tables, torch.device("cpu"))


def test_parts_are_combined_where_each_call_wants_them(combination):
    out, other = tensors(HEADS[0], HEADS[0])
    lse = by_token()
    parts = combination.parts_of(out)
    assert [x.shape for x in parts] == [(3, *out.shape), (3, *lse.shape)]
    for into, merge in ((out, False), (out, False), (other, False), (out, True)):
        combination.launch(parts, into, lse, 1, merge=merge)
    first, again, second, merging = combination._kernel.launches
    assert again is first
    assert (first.params.out, first.params.lse) == (parts[0].data_ptr(), parts[1].data_ptr())
    assert (first.params.results.out, second.params.results.out) == (out.data_ptr(), other.data_ptr())
    assert (first.params.results.merges, merging.params.results.merges) == (0, 1)


@pytest.mark.parametrize(
    ("name", "differs", "expected"),
    [
        ("parts", elsewhere, {"out"}),
        ("parts_lse", elsewhere, {"lse"}),
        ("out", elsewhere, {"results.out"}),
        ("lse", elsewhere, {"results.lse"}),
        ("lse", by_head, {"results.lse_token", "results.lse_head"}),
        ("out", wider, {"results.out_is_float"}),
        ("merge", lambda _: True, {"results.merges"}),
    ],
)
def test_parameters_of_a_combination_follow_each_argument(combination, name, differs, expected):
    (out,) = tensors(HEADS[0])
    parts, parts_lse = combination.parts_of(out)
    given = {"parts": parts, "parts_lse": parts_lse, "out": out, "lse": by_token(), "merge": False}
    other = given | {name: differs(given[name])}
    for each in (given, other, given, other):
        *both, out, lse, merge = each.values()
        combination.launch(tuple(both), out, lse, 1, merge=merge)
    first, second, *again = combination._kernel.launches
    assert changed(first, second) == expected
    assert again[0] is first
    assert again[1] is second
