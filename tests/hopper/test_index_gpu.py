# SPDX-License-Identifier: Apache-2.0
"""Index attention on a Hopper GPU against the dense float64 oracle with the mask that the lists make."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from magi_attention.functional import flex_flash_attn_func
from magi_attention.kernels.indexed import attend_to_indices
from magi_attention.kernels.protocol import AttentionRequest, IndexCall
from magi_attention.kernels.registry import choose_for_indices
from magi_attention.testing.lists import dense_index_attention, mask_of_lists, random_lists
from magi_attention.testing.metric import assert_within_pytorch_error
from magi_attention.testing.stages import Inputs, random_inputs
from magi_kernels_hopper import BACKEND, index_backward, index_lists
from magi_kernels_hopper.variants import INDEX_SIZES, IndexVariant

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def hopper_gpu():
    request = AttentionRequest(torch.device("cuda"), torch.bfloat16, 4, 2, 128, 128)
    if not (support := BACKEND.supports_indices(request)):
        pytest.skip(support.reason)


@pytest.fixture(params=[False, True], ids=["apart", "together"])
def tokens_share_tiles(request, monkeypatch):
    """Whether they do, where heads leave room, though the tiles be few."""
    monkeypatch.setattr(index_lists, "LEAST_TILES", 0 if request.param else 1 << 30)
    return request.param


LEAVING_ROOM, FILLING = [(2, 2), (6, 2), (8, 1), (5, 1)], [(64, 1), (128, 1)]
HEADS = pytest.mark.parametrize(
    ("heads", "tokens_share_tiles"),
    [*((heads, True) for heads in LEAVING_ROOM), *((heads, False) for heads in [*FILLING, (6, 2)])],
    indirect=["tokens_share_tiles"],
    ids=str,
)


def inputs(num_q, num_k, *, heads=(4, 2), dims=(128, 128), dtype=torch.bfloat16) -> Inputs:
    return random_inputs(num_q, num_k, heads=heads, dims=dims, dtype=dtype, device="cuda")


def lists_for(x: Inputs, longest: int) -> torch.Tensor:
    return random_lists(len(x.q), x.k.shape[1], len(x.k), longest, device="cuda")


def assert_right(x: Inputs, lists: torch.Tensor, scale: float = 0.1, softcap: float = 0.0) -> None:
    result = BACKEND.forward_indices(x.q, x.k, x.v, IndexCall(lists, scale, softcap, max_logits=True))
    scoring = {"softmax_scale": scale, "softcap": softcap}
    exact = dense_index_attention(*(each.double() for each in x[:3]), lists, **scoring)
    plain = dense_index_attention(*x[:3], lists, **scoring)
    for name, mine, truth, torchs in zip(("out", "lse", "max_logits"), result, exact, plain, strict=True):
        assert_within_pytorch_error(mine, truth, torchs, name=name)


@pytest.mark.usefixtures("tokens_share_tiles")
@pytest.mark.parametrize("longest", [64, 128, 37, 200])
def test_lengths_of_lists(longest):
    x = inputs(300, 500)
    assert_right(x, lists_for(x, longest))


@pytest.mark.parametrize("dims", INDEX_SIZES, ids=str)
@HEADS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_every_kernel(dims, heads, tokens_share_tiles, dtype, softcap):
    x = inputs(200, 400, dims=dims, heads=heads, dtype=dtype)
    assert_right(x, lists_for(x, 192), softcap=softcap)


@pytest.mark.usefixtures("tokens_share_tiles")
@pytest.mark.parametrize("scale", [1.0, 0.0, -0.1])
def test_scales(scale):
    x = inputs(100, 100)
    assert_right(x, lists_for(x, 64), scale)


@pytest.mark.usefixtures("tokens_share_tiles")
def test_empty_lists():
    x = inputs(300, 100)
    assert_right(x, torch.full((300, 2, 128), -1, dtype=torch.int32, device="cuda"))


@pytest.mark.usefixtures("tokens_share_tiles")
def test_what_follows_the_end_of_a_list_is_not_read():
    x = inputs(100, 200)
    lists = lists_for(x, 128)
    result = BACKEND.forward_indices(x.q, x.k, x.v, IndexCall(lists, 0.1))
    ended = (lists < 0).cumsum(-1)
    scribbled = lists.masked_fill(ended > 1, 1 << 30)
    again = BACKEND.forward_indices(x.q, x.k, x.v, IndexCall(scribbled, 0.1))
    assert torch.equal(result.out, again.out)


@pytest.mark.usefixtures("tokens_share_tiles")
def test_values_of_other_keys_do_not_matter():
    x = inputs(100, 200)
    lists = lists_for(x, 100).clamp(max=150)
    result = BACKEND.forward_indices(x.q, x.k, x.v, IndexCall(lists, 0.1))
    for each in (x.k, x.v):
        each[151:] = torch.nan
    again = BACKEND.forward_indices(x.q, x.k, x.v, IndexCall(lists, 0.1))
    assert torch.equal(result.out, again.out)


def test_long_lists_of_many_tokens():
    x = inputs(4000, 5000, heads=(16, 2))
    lists = lists_for(x, 2048)
    call = IndexCall(lists, 0.1, max_logits=True)
    torch.testing.assert_close(
        tuple(BACKEND.forward_indices(*x[:3], call)), tuple(attend_to_indices(*x[:3], call)), rtol=2e-2, atol=2e-2
    )


@pytest.mark.usefixtures("tokens_share_tiles")
def test_views_are_read_in_place():
    qkv = torch.randn(300, 12, 128, device="cuda").bfloat16()
    q, k, v = qkv[:, :8], qkv[:, 8:10], qkv[:, 10:]
    call = IndexCall(random_lists(300, 2, 300, 128, device="cuda"), 0.1)
    expected = BACKEND.forward_indices(q.contiguous(), k.contiguous(), v.contiguous(), call)
    assert torch.equal(BACKEND.forward_indices(q, k, v, call).out, expected.out)


@pytest.mark.parametrize(
    ("num_q", "heads", "num_k", "longest"),
    [(100, (8, 1), 70, 64), (101, (12, 4), 5000, 300), (37, (1, 1), 100_000, 90)],
)
def test_lists_of_tokens_that_share_tiles(num_q, heads, num_k, longest, monkeypatch):
    monkeypatch.setattr(index_lists, "LEAST_TILES", 0)
    x = inputs(num_q, num_k, heads=heads)
    lists = lists_for(x, longest)
    ended = (lists < 0).cumsum(-1)
    call = IndexCall(lists.masked_fill(ended > 1, 1 << 30), 0.1)
    indices, bits, tokens = index_lists.lists_of_tiles(IndexVariant(128, 128, "bf16"), call, x.q, x.k)
    assert tokens == min(8, 1 << (64 // (heads[0] // heads[1])).bit_length() - 1)
    mask = torch.nn.functional.pad(mask_of_lists(lists, num_k), (0, 0, 0, 0, 0, -num_q % tokens)).unflatten(
        0, (-1, tokens)
    )
    for tile, of_tokens in enumerate(mask):
        for head in range(heads[1]):
            (keys,) = of_tokens[:, head].any(0).nonzero(as_tuple=True)
            assert torch.equal(indices[tile, head, : len(keys)], keys.int())
            weights = 1 << torch.arange(tokens, device="cuda")
            expected = (of_tokens[:, head, keys] * weights[:, None]).sum(0)
            assert torch.equal(bits[tile, head, : len(keys)].long(), expected)
            end = min(-(-len(keys) // 64) * 64 + 1, indices.shape[2])
            assert (indices[tile, head, len(keys) : end] == -1).all()


def assert_gradients_right(x: Inputs, lists: torch.Tensor, **scoring: float) -> None:
    """Those of the kernels, from the outputs of plain torch, with the order of additions left open and fixed."""
    call = IndexCall(lists, scoring.get("softmax_scale", 0.1), scoring.get("softcap", 0.0))
    scoring = {"softmax_scale": call.softmax_scale, "softcap": call.softcap}
    out, lse, _ = attend_to_indices(*x[:3], call)
    dlse = x.dlse.masked_fill(lse == -torch.inf, 0)

    def dense(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [each.detach().to(dtype).requires_grad_() for each in x[:3]]
        of_dtype, lse, _ = dense_index_attention(*leaves, lists, **scoring)
        return torch.autograd.grad((of_dtype, lse), leaves, (x.dout.to(dtype), dlse.to(lse.dtype)))

    exact, plain = dense(torch.float64), dense(x.q.dtype)
    fixed = replace(call, deterministic=True)
    results = [BACKEND.backward_indices(x.dout, *x[:3], out, lse, dlse, each) for each in (call, fixed, fixed)]
    for gradients in results[:2]:
        for name, mine, truth, torchs in zip(("dq", "dk", "dv"), gradients, exact, plain, strict=True):
            assert_within_pytorch_error(mine, truth, torchs, name=name)
    assert all(torch.equal(once, again) for once, again in zip(*results[1:], strict=True))


@pytest.mark.usefixtures("tokens_share_tiles")
@pytest.mark.parametrize("longest", [64, 128, 37, 200])
def test_gradients_by_lengths_of_lists(longest):
    x = inputs(300, 500)
    assert_gradients_right(x, lists_for(x, longest))


@pytest.mark.parametrize("dims", INDEX_SIZES, ids=str)
@HEADS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradients_of_every_kernel(dims, heads, tokens_share_tiles, dtype, softcap):
    x = inputs(200, 400, dims=dims, heads=heads, dtype=dtype)
    assert_gradients_right(x, lists_for(x, 192), softcap=softcap)


@pytest.mark.usefixtures("tokens_share_tiles")
@pytest.mark.parametrize("scale", [1.0, 0.0, -0.1])
def test_gradients_by_scales(scale):
    x = inputs(100, 100)
    assert_gradients_right(x, lists_for(x, 64), softmax_scale=scale)


@pytest.mark.usefixtures("tokens_share_tiles")
def test_gradients_of_empty_lists():
    x = inputs(300, 100)
    assert_gradients_right(x, torch.full((300, 2, 128), -1, dtype=torch.int32, device="cuda"))


@pytest.mark.usefixtures("tokens_share_tiles")
def test_gradients_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr(index_backward, "BYTES_AT_A_TIME", 1 << 20)
    for heads in ((130, 1), (4, 1)):
        x = inputs(300, 200, heads=heads)
        assert_gradients_right(x, lists_for(x, 100))


@pytest.mark.usefixtures("tokens_share_tiles")
def test_gradients_of_one_key_that_all_name():
    x = inputs(3000, 10)
    assert_gradients_right(x, torch.full((3000, 2, 1), 3, dtype=torch.int32, device="cuda"))


def test_gradients_read_views_in_place():
    qkv = torch.randn(300, 12, 128, device="cuda").bfloat16()
    q, k, v = qkv[:, :8], qkv[:, 8:10], qkv[:, 10:]
    call = IndexCall(random_lists(300, 2, 300, 128, device="cuda"), 0.1, deterministic=True)
    out, lse, _ = BACKEND.forward_indices(q, k, v, call)
    expected = BACKEND.backward_indices(out, *(x.contiguous() for x in (q, k, v)), out, lse, None, call)
    results = BACKEND.backward_indices(out, q, k, v, out, lse, None, call)
    assert all(torch.equal(mine, right) for mine, right in zip(results, expected, strict=True))


@pytest.mark.usefixtures("tokens_share_tiles")
def test_keys_of_others_give_nothing():
    """What lies in memory where no list points may be anything."""
    x = inputs(100, 200)
    lists = lists_for(x, 100).clamp(max=150)
    call = IndexCall(lists, 0.1, deterministic=True)
    out, lse, _ = BACKEND.forward_indices(*x[:3], call)
    expected = BACKEND.backward_indices(x.dout, *x[:3], out, lse, None, call)
    for each in (x.k, x.v):
        each[151:] = torch.nan
    results = BACKEND.backward_indices(x.dout, *x[:3], out, lse, None, call)
    assert all(torch.equal(mine, right) for mine, right in zip(results, expected, strict=True))


def test_it_is_chosen_and_differentiable():
    x = inputs(200, 300)
    backends = choose_for_indices(AttentionRequest.of_tensors(x.q, x.k, x.v))
    assert backends.forward is backends.backward is BACKEND
    lists, leaves = lists_for(x, 128), [each.requires_grad_() for each in x[:3]]
    out, meta = flex_flash_attn_func(*leaves, index_attn_indices=lists)
    gradients = torch.autograd.grad((out, meta.lse), leaves, (x.dout, x.dlse.masked_fill(meta.lse == -torch.inf, 0)))
    exact = [each.detach().double().requires_grad_() for each in leaves]
    plain = [each.detach().requires_grad_() for each in leaves]

    def dense(inputs):
        out, lse, _ = dense_index_attention(*inputs, lists)
        dlse = x.dlse.masked_fill(lse == -torch.inf, 0).to(lse.dtype)
        return torch.autograd.grad((out, lse), inputs, (x.dout.to(out.dtype), dlse))

    for mine, truth, torchs in zip(gradients, dense(exact), dense(plain), strict=True):
        assert_within_pytorch_error(mine, truth, torchs)


@pytest.mark.usefixtures("tokens_share_tiles")
def test_captured_in_a_graph():
    x = inputs(200, 300)
    call = IndexCall(lists_for(x, 128), 0.1)
    expected = BACKEND.forward_indices(*x[:3], call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = BACKEND.forward_indices(*x[:3], call)
    captured.out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured.out, expected.out)


@pytest.mark.usefixtures("tokens_share_tiles")
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_captured_in_a_graph(deterministic):
    x = inputs(200, 300)
    call = IndexCall(lists_for(x, 128), 0.1, deterministic=deterministic)
    out, lse, _ = BACKEND.forward_indices(*x[:3], call)
    expected = BACKEND.backward_indices(x.dout, *x[:3], out, lse, None, call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = BACKEND.backward_indices(x.dout, *x[:3], out, lse, None, call)
    for each in captured:
        each.zero_()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected, rtol=1e-2, atol=1e-2)


OUT_OF_RANGE = """
import torch
from magi_attention.functional import flex_flash_attn_func
q = torch.zeros(64, 2, 128, dtype=torch.bfloat16, device="cuda")
lists = torch.full((64, 2, 64), 64, dtype=torch.int32, device="cuda")
flex_flash_attn_func(q, q, q, index_attn_indices=lists)
torch.cuda.synchronize()
"""


def test_an_index_beyond_the_keys_is_an_error():
    done = subprocess.run([sys.executable, "-c", OUT_OF_RANGE], capture_output=True, text=True)
    assert done.returncode
    assert "CUDA" in done.stderr
