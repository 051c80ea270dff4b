# SPDX-License-Identifier: Apache-2.0
"""Parameters of launches that are kept by the addresses of their tensors; needs no GPU."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from magi_attention.common import packed
from magi_attention.kernels.protocol import AttentionCall
from magi_kernels_hopper import backward, combine, forward
from magi_kernels_hopper.driver import Ready
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


class Maps:
    """Of a tensor's address."""

    def get(self, x: Tensor, box: object, swizzle_bytes: int) -> bytes:
        return x.data_ptr().to_bytes(128, "little")


ZEROS = torch.zeros(4, dtype=torch.int32)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    for module in (forward, backward):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
        monkeypatch.setattr(module, "counters", lambda device, stream: ZEROS)
        monkeypatch.setattr(module, "tensor_maps", lambda device: Maps())
    monkeypatch.setattr(forward, "_kernel", lambda variant, device: Kernel())
    kernels = lambda variant, device: SimpleNamespace(prepare=Kernel(), backward=Kernel())  # noqa: E731
    monkeypatch.setattr(backward, "_kernels", kernels)


def tensors(*heads: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.zeros(TOKENS, each, DIM, dtype=dtype) for each in heads]


def address_of(tensor_map: object) -> int:
    return int(tensor_map.words[0])  # type: ignore[attr-defined]


class Backward:
    """A prepared backward pass with the tensors of a call."""

    def __init__(self) -> None:
        self.q, self.dout, self.k, self.v, self.out = tensors(HEADS[0], HEADS[0], HEADS[1], HEADS[1], HEADS[0])
        self.lse = torch.zeros(TOKENS, HEADS[0])
        self.gradients = tuple(torch.zeros_like(x) for x in (self.q, self.k, self.v))
        self.prepared = backward.PreparedBackward(BackwardVariant(DIM, DIM, "bf16", False), CALL, self.q, self.k)
        self.workspace = self.prepared.workspace(torch.device("cpu"))

    def launch(self, dout: Tensor | None = None, dlse: Tensor | None = None) -> tuple[Ready, Ready]:
        inputs = (self.q, self.dout if dout is None else dout, self.k, self.v, self.out, self.lse, dlse)
        self.prepared.launch(inputs, self.gradients, self.workspace, 1)
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
        prepared.launch((query, k, v), (out, lse, None), False, 1)
    prepared.launch((q, k, v), (out, lse, None), True, 1)
    first, again, other, merging = prepared._kernel.launches
    assert again is first
    assert address_of(other.params.q) != address_of(first.params.q) == q.data_ptr()
    assert (first.params.results.merges, merging.params.results.merges) == (0, 1)
    assert all(each.params.counters == ZEROS.data_ptr() for each in (first, other, merging))
    odd = torch.zeros(TOKENS * HEADS[0] * DIM + 1, dtype=torch.bfloat16)[1:].view(q.shape)
    for _ in range(2):
        prepared.launch((odd, k, v), (out, lse, None), False, 1)
    *_, copied, copied_again = prepared._kernel.launches
    assert copied is not copied_again
    assert odd.data_ptr() not in (address_of(copied.params.q), address_of(copied_again.params.q))


def test_parts_are_combined_where_each_call_wants_them(monkeypatch):
    monkeypatch.setattr(combine, "_kernel", lambda variant, device: Kernel())
    tables = SimpleNamespace(num_parts=3, parts=torch.zeros(9, dtype=torch.int32), tile_q=64)
    combination = combine.Combination(ForwardVariant(DIM, DIM, "bf16", False), tables, torch.device("cpu"))
    out, other = tensors(HEADS[0], HEADS[0])
    lse, by_head = torch.zeros(TOKENS, HEADS[0]), torch.zeros(HEADS[0], TOKENS).T
    parts = combination.parts_of(out)
    assert [x.shape for x in parts] == [(3, *out.shape), (3, *lse.shape)]
    for into, merge in ((out, False), (out, False), (other, False), (out, True)):
        combination.launch(parts, into, lse, 1, merge=merge)
    combination.launch(parts, out, by_head, 1, merge=False)
    first, again, elsewhere, merging, strided = combination._kernel.launches
    assert again is first
    assert (first.params.out, first.params.lse) == (parts[0].data_ptr(), parts[1].data_ptr())
    assert (first.params.results.out, elsewhere.params.results.out) == (out.data_ptr(), other.data_ptr())
    assert (first.params.results.merges, merging.params.results.merges) == (0, 1)
    assert (strided.params.results.lse_token, strided.params.results.lse_head) == by_head.stride()
