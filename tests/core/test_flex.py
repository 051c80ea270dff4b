# SPDX-License-Identifier: Apache-2.0
"""The FlexAttention backend without a GPU: its tables, its layers, its backward algebra, and how often it compiles.

FlexAttention itself has no backward pass on a CPU. So most tests give the backend a dense stand-in that reads the same
tables, in float64; the real one runs eagerly, forward only.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magi_attention.common.slices import SliceTable
from magi_attention.kernels import flex, flex_layer
from magi_attention.kernels.flex import BACKEND, FlexBackend
from magi_attention.kernels.flex_layer import LayerResult, attend_layer
from magi_attention.kernels.flex_tables import BLOCK, LayerTables, layers_of
from magi_attention.kernels.merge import merge_partials
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, KernelBackend
from magi_attention.kernels.sink import apply_sink, sink_gradient
from magi_attention.testing.masks import MASK_FAMILIES, random_masks
from magi_attention.testing.oracle import dense_attention, dense_mask, masked_attention
from magi_attention.testing.stages import assert_stage_is_right, random_inputs, run_stage

CPU = torch.device("cpu")


def mask_of(layer: LayerTables) -> Tensor:
    """The dense mask that a kernel makes of the tables: full tiles unmasked, partial ones by the rows' intervals."""
    num_q, num_k = layer.kv_num_blocks.shape[-1] * BLOCK, layer.q_num_blocks.shape[-1] * BLOCK
    key = torch.arange(num_k)
    starts, stops = layer.bounds[0::2, :, None], layer.bounds[1::2, :, None]
    inside = ((key >= starts) & (key < stops)).any(0)
    mask = torch.zeros(num_q, num_k, dtype=torch.bool)
    for count, index, full in (
        (layer.kv_num_blocks, layer.kv_indices, False),
        (layer.full_kv_num_blocks, layer.full_kv_indices, True),
    ):
        for row in range(count.shape[-1]):
            for column in index[0, 0, row, : count[0, 0, row]].tolist():
                tile = slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK)
                assert not mask[tile].any()
                mask[tile] = True if full else inside[tile]
    return mask


def attend_densely(
    q: Tensor, k: Tensor, v: Tensor, layer: LayerTables, softmax_scale: float, softcap: float, max_scores: bool
) -> LayerResult:
    flat = [x.flatten(1, 2).transpose(0, 1) for x in (q, k, v)]
    out, lse, _ = masked_attention(*flat, mask_of(layer), softmax_scale=softmax_scale, softcap=softcap)
    return LayerResult(out.transpose(0, 1), lse.T, lse.T if max_scores else None)


DENSE = FlexBackend(attend_densely)


def comb(total: int, tooth: int) -> SliceTable:
    """Every row sees ``total / (2 * tooth)`` separate intervals."""
    return SliceTable([[0, total, k, k + tooth, 0] for k in range(0, total, 2 * tooth)])


def test_satisfies_the_protocol():
    assert isinstance(BACKEND, KernelBackend)


@settings(max_examples=40)
@given(random_masks(400), st.integers(0, 200))
def test_tables_say_the_mask_in_both_directions(mask, more_keys):
    total, slices = mask
    seen = torch.zeros(0)
    for layer in layers_of(slices, total, total + more_keys, CPU):
        of_layer = mask_of(layer)
        seen = of_layer.int() + (seen if seen.numel() else 0)
        for forward, backward in (
            ((layer.kv_num_blocks, layer.kv_indices), (layer.q_num_blocks, layer.q_indices)),
            ((layer.full_kv_num_blocks, layer.full_kv_indices), (layer.full_q_num_blocks, layer.full_q_indices)),
        ):
            pairs, transposed = (
                {
                    (row, column)
                    for row in range(count.shape[-1])
                    for column in index[0, 0, row, : count[0, 0, row]].tolist()
                }
                for count, index in (forward, backward)
            )
            assert pairs == {(row, column) for column, row in transposed}
    expected = dense_mask(slices, total, total + more_keys).int()
    if not slices.area():
        assert not seen.numel()
    else:
        # No padded key is seen; padded queries may be anything.
        assert torch.equal(seen[:total, : total + more_keys], expected)
        assert not seen[:total, total + more_keys :].any()


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("family", MASK_FAMILIES)
def test_forward_and_backward_of_a_single_stage(family, softcap):
    total = 290
    slices = MASK_FAMILIES[family](total, np.random.default_rng(7))
    assert_stage_is_right(DENSE, random_inputs(total, total, dims=(8, 5)), slices, softcap=softcap)


@pytest.mark.parametrize("num_intervals", [3, 8, 9, 20])
def test_many_intervals_per_row_are_computed_in_layers(num_intervals):
    tooth = 5
    total = 2 * tooth * num_intervals
    slices = comb(total, tooth)
    layers = layers_of(slices, total, total, CPU)
    assert [len(layer.bounds) // 2 for layer in layers] == {3: [4], 8: [8], 9: [8, 1], 20: [8, 8, 4]}[num_intervals]
    assert_stage_is_right(DENSE, random_inputs(total, total, dims=(8, 8)), slices)


def test_backward_with_a_later_stage_and_a_sink():
    """A stage that is one of several sees only the final out and lse: the weights' algebra of the backward pass."""
    total = 200
    slices = MASK_FAMILIES["random_tiling"](total, np.random.default_rng(1))
    x = random_inputs(total, total)
    sink = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    calls = [AttentionCall(part, 0.4) for part in (slices.clip_columns(0, 90), slices.clip_columns(90, total))]
    (out, lse, _), (out2, lse2, _) = (DENSE.forward(x.q, x.k, x.v, call) for call in calls)
    out, lse = apply_sink(*merge_partials(out, lse, out2, lse2), sink.detach())
    gradients = [DENSE.backward(x.dout, x.q, x.k, x.v, out, lse, x.dlse, call) for call in calls]
    leaves = [tensor.requires_grad_() for tensor in x[:3]]
    truth, truth_lse, _ = dense_attention(*leaves, slices, softmax_scale=0.4, sink=sink)
    expected = torch.autograd.grad((truth, truth_lse), (*leaves, sink), (x.dout, x.dlse))
    actual = [a + b for a, b in zip(*gradients, strict=True)]
    actual.append(sink_gradient(sink.detach(), out, x.dout, lse, x.dlse))
    torch.testing.assert_close((out, lse, *actual), (truth, truth_lse, *expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("num_q", "num_k"), [(0, 5), (5, 0), (5, 5)])
def test_without_any_pair_nothing_is_launched(num_q, num_k):
    def fail(*args: object) -> LayerResult:
        raise AssertionError("a kernel was launched")

    x = random_inputs(num_q, num_k)
    result, gradients = run_stage(FlexBackend(fail), x, AttentionCall(SliceTable([]), 1.0, max_logits=True))
    assert not result.out.any()
    assert (result.lse == -torch.inf).all()
    assert (result.max_logits == -torch.inf).all()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("family", ["causal", "shared_question", "random_tiling", "empty_rows"])
def test_flex_attention_itself_run_eagerly(family, softcap):
    total = 200
    slices = MASK_FAMILIES[family](total, np.random.default_rng(2))
    x = random_inputs(total, total, dims=(16, 32), dtype=torch.float32)
    result = FlexBackend(attend_layer).forward(x.q, x.k, x.v, AttentionCall(slices, 0.3, softcap))
    out, lse, _ = dense_attention(x.q, x.k, x.v, slices, softmax_scale=0.3, softcap=softcap)
    torch.testing.assert_close(result.out, out.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.lse, lse.float(), rtol=1e-4, atol=1e-5)


def test_too_many_scales_say_what_to_do(monkeypatch):
    run = torch.compile(attend_layer, fullgraph=True, backend="eager")
    monkeypatch.setattr(flex_layer, "_compiled", lambda: run)
    monkeypatch.setattr(flex_layer, "MAX_COMPILATIONS", 2)
    q, slices = torch.randn(40, 2, 16), SliceTable([[0, 40, 0, 40, 1]])
    try:
        for softmax_scale in (0.1, 0.2, 0.1):
            BACKEND.forward(q, q, q, AttentionCall(slices, softmax_scale))
        with pytest.raises(RuntimeError, match=r"compiled 2 kinds of calls.* Multiply q by a factor"):
            BACKEND.forward(q, q, q, AttentionCall(slices, 0.3))
    finally:
        torch._dynamo.reset()


def test_one_compilation_serves_all_lengths_and_masks(monkeypatch):
    compiled = []

    def count(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        compiled.append(graph)
        return graph.forward

    run = torch.compile(attend_layer, fullgraph=True, backend=count)
    monkeypatch.setattr(flex_layer, "_compiled", lambda: run)
    rng = np.random.default_rng(0)
    for family, num_q, more_keys in (("causal", 100, 0), ("block_causal", 700, 0), ("varlen_full", 260, 300)):
        slices = MASK_FAMILIES[family](num_q, rng)
        x = random_inputs(num_q, num_q + more_keys, dtype=torch.float32)
        result = BACKEND.forward(x.q, x.k, x.v, AttentionCall(slices, 0.25))
        expected = dense_attention(x.q, x.k, x.v, slices, softmax_scale=0.25)[0]
        torch.testing.assert_close(result.out, expected.float(), rtol=1e-4, atol=1e-5)
    assert len(compiled) == 1


def request(**changes: object) -> AttentionRequest:
    values = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "num_heads_q": 8, "num_heads_kv": 2}
    return AttentionRequest(**(values | {"head_dim": 128, "head_dim_v": 128} | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": CPU}, "CPU"),
        ({"device": torch.device("meta")}, "no values"),
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 8}, "head dims"),
        ({"head_dim_v": 512}, "head dims"),
        ({"max_logits": True, "softcap": True}, "softcap"),
    ],
)
def test_refusals_name_their_reason(changes, reason):
    support = BACKEND.supports(request(**changes))
    assert not support
    assert reason in support.reason


def test_old_gpus_and_missing_triton_are_refused(monkeypatch):
    monkeypatch.setattr(flex, "has_triton", lambda: False)
    assert "pip install triton" in BACKEND.supports(request()).reason
    monkeypatch.setattr(flex, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "(7, 5)" in BACKEND.supports(request()).reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert BACKEND.supports(request(max_logits=True, deterministic=True))
