# SPDX-License-Identifier: Apache-2.0
"""Attention inside torch.compile: one graph, the same results and gradients, few compilations."""

import copy
import gc
import pickle

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from magi_attention.api import (
    calc_attn,
    clear_cache,
    dispatch,
    flex_flash_attn_func,
    get_position_ids,
    magi_attn_varlen_key,
    roll,
    undispatch,
)
from magi_attention.common.enum import AttnRole
from magi_attention.config import DistAttnConfig, RuntimeConfig
from magi_attention.kernels.reference import BACKEND as REFERENCE
from magi_attention.runtime.key import key_of_handle

HEADS, KV_HEADS, DIM = 4, 2, 8


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    clear_cache()
    torch._dynamo.reset()


def make_key(*ends: int, **runtime: object):
    config = DistAttnConfig(runtime_config=RuntimeConfig(**runtime))
    cu_seqlens = [0, *ends]
    return magi_attn_varlen_key(
        cu_seqlens, cu_seqlens, HEADS, KV_HEADS, DIM, 0, None, causal=True, dist_attn_config=config
    )


class Attention(nn.Module):
    """Projections around an attention, with a learnable sink."""

    def __init__(self, attend, with_sink: bool, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.qkv = nn.Linear(16, (HEADS + 2 * KV_HEADS) * DIM, dtype=dtype)
        self.sink = nn.Parameter(torch.randn(1, HEADS, dtype=dtype)) if with_sink else None

    def forward(self, x: Tensor, *mask: object) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k, v = self.qkv(x).unflatten(-1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        out, meta = self.attend(q, k, v, self.sink, *mask)
        return out.flatten(1).tanh(), meta.lse, meta.max_logits


def by_key(q, k, v, sink, key):
    return calc_attn(q, k, v, key, sink=sink, softcap=3.0)


def by_key_with_logits(q, k, v, sink, key):
    return calc_attn(q, k, v, key, sink=sink, return_max_logits=True)


def by_slices(q, k, v, sink, ranges, types):
    return flex_flash_attn_func(q, k, v, ranges, ranges, types, sink=sink, softcap=3.0, return_max_logits=True)


def by_slices_of_one_type(q, k, v, sink, ranges):
    return flex_flash_attn_func(q, k, v, ranges, ranges, sink=sink, deterministic=True)


def run(model: nn.Module, x: Tensor, *mask: object) -> list[Tensor]:
    """Outputs, and the gradients of all parameters and of x, through out and lse."""
    x = x.clone().requires_grad_()
    out, lse, max_logits = model(x, *mask)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(out.square().sum() + lse.sin().sum(), [x, *parameters])
    return [out, lse, *([] if max_logits is None else [max_logits]), *gradients]


def tokens(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(count), dtype=dtype)


def assert_compiles(attend, with_sink: bool, *mask: object, dtype: torch.dtype = torch.float64) -> None:
    model = Attention(attend, with_sink, dtype)
    x = tokens(47 if attend is whole_step else 50, dtype)
    expected = run(model, x, *mask)
    actual = run(torch.compile(model, backend="aot_eager", fullgraph=True), x, *mask)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert all(not each.requires_grad or each.grad_fn is not None for each in actual)


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("attend", [by_key, by_key_with_logits])
def test_calc_attn(attend, with_sink):
    assert_compiles(attend, with_sink, make_key(30, 50, sink_grad_reduce="sum"))


@pytest.mark.parametrize("precision", ["input", "fp64"])
def test_calc_attn_in_another_precision(precision):
    assert_compiles(by_key, True, make_key(30, 50, precision=precision), dtype=torch.float32)


@pytest.mark.parametrize("with_sink", [False, True])
def test_flex_flash_attn_func(with_sink):
    ranges = torch.tensor([[0, 30], [30, 50]])
    assert_compiles(by_slices, with_sink, ranges, torch.tensor([1, 3]))
    assert_compiles(by_slices_of_one_type, with_sink, ranges)


def test_both_passes_of_flex_flash_attn_func_read_the_tables_of_one_mask(monkeypatch):
    """Which the backward pass, that checks nothing again, would otherwise make a second time, also on the device."""
    seen = []
    for name in ("forward", "backward"):
        run_pass = getattr(REFERENCE, name)

        def note(*args, run_pass=run_pass):
            seen.append(args[-1].slices)
            return run_pass(*args)

        monkeypatch.setattr(REFERENCE, name, note)
    compiled = torch.compile(Attention(by_slices_of_one_type, False), backend="aot_eager")
    run(compiled, tokens(50), torch.tensor([[0, 20], [20, 50]]))
    forward, backward = seen
    assert backward is forward


def whole_step(q, k, v, sink, key):
    """From global tensors to global tensors, as a training step that is compiled as a whole."""
    q, k, v = (dispatch(x, key, attn_role=role) for x, role in zip((q, k, v), AttnRole, strict=True))
    q = q + get_position_ids(key)[:, None, None] / 50
    out, meta = calc_attn(q, k, v, key, sink=sink)
    meta.lse = undispatch(meta.lse, key, is_partial_grad=True)
    return undispatch(roll(out, -3, 0, key), key), meta


def test_a_step_with_dispatch_and_undispatch():
    assert_compiles(whole_step, True, make_key(30, 47))  # 47 rows are padded
    ids = torch.arange(47)
    key = make_key(30, 47)
    compiled = torch.compile(lambda x: dispatch(x, key, -100), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ids), dispatch(ids, key, -100))


def test_without_gradients_of_the_lse():
    """What is not used has no gradient, and backends are not asked for it."""
    key, x = make_key(30, 50), tokens(50)
    model = Attention(by_key, with_sink=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, actual = (
        torch.autograd.grad(each(x, key)[0].sum(), list(model.parameters())) for each in (model, compiled)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_new_masks_of_one_shape_compile_twice():
    counter = CompileCounterWithBackend("aot_eager")
    model = Attention(by_key, with_sink=False)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for cut in (10, 20, 30, 40):
        key = make_key(cut, 50)
        torch.testing.assert_close(run(compiled, tokens(50), key), run(model, tokens(50), key))
    assert counter.frame_count == 2


class HoldsItsKey(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return calc_attn(q, k, v, self.key)[0]


def test_new_masks_of_keys_that_a_module_holds_compile_twice_if_the_compiler_is_told_so():
    counter = CompileCounterWithBackend("aot_eager")
    model = HoldsItsKey()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    q, k, v = (torch.randn(50, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        for cut in (10, 20, 30, 40):
            model.key = make_key(cut, 50)
            torch.testing.assert_close(compiled(q, k, v), model(q, k, v))
    assert counter.frame_count == 2


def test_new_masks_of_keys_among_other_arguments_compile_twice():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v, batch: calc_attn(q, k, v, batch["key"])[0], backend=counter)
    q, k, v = (torch.randn(50, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    for cut in (10, 20, 30, 40):
        key = make_key(cut, 50)
        torch.testing.assert_close(compiled(q, k, v, {"key": key}), calc_attn(q, k, v, key)[0])
    assert counter.frame_count == 2


def test_new_masks_and_shares_compile_few_times():
    """Keys that share rows out otherwise must not get the shapes of the first."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, key: undispatch(dispatch(x, key).sin(), key), backend=counter, fullgraph=True)
    for length in (45, 46, 47, 48, 63, 70, 79, 90):
        assert torch.equal(compiled(tokens(length), make_key(9, length)), tokens(length).sin())
    assert counter.frame_count <= 3


def test_new_masks_and_lengths_do_not_compile_again_and_again():
    counter = CompileCounterWithBackend("aot_eager")
    model = Attention(by_key, with_sink=False)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for length in (40, 50, 64, 72, 90):
        key = make_key(length // 3, length)
        torch.testing.assert_close(run(compiled, tokens(length), key), run(model, tokens(length), key))
    assert counter.frame_count <= 2
    counter.clear()
    model = Attention(by_slices_of_one_type, with_sink=False)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for length in (40, 50, 64, 72, 90):
        ranges = torch.tensor([[0, length // 3], [length // 3, length]])
        torch.testing.assert_close(run(compiled, tokens(length), ranges), run(model, tokens(length), ranges))
    assert counter.frame_count <= 2


def test_position_ids_that_nobody_asked_for_before():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(get_position_ids, backend=counter, fullgraph=True)
    for length in (40, 47, 53, 61):
        key = make_key(9, length)
        found = compiled(key)
        assert found.dtype == torch.int64
        assert torch.equal(found, get_position_ids(key))
        assert torch.equal(compiled(key, device="cpu", attn_role=AttnRole.KEY), found)
    assert counter.frame_count <= 4


def test_position_ids_may_be_changed_in_place():
    key = make_key(20, 50)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def relative(key) -> Tensor:
        ids = get_position_ids(key)
        ids -= 20
        return ids

    for _ in range(2):
        assert torch.equal(relative(key), get_position_ids(key) - 20)


def test_mistakes_are_told_as_without_compiling():
    key = make_key(30, 50)
    compiled = torch.compile(by_key, backend="aot_eager", fullgraph=True)
    q, k = torch.randn(50, HEADS, DIM), torch.randn(50, KV_HEADS, DIM)
    with pytest.raises(ValueError, match="row"):
        compiled(q[:20], k[:20], k[:20], None, key)
    whole = torch.tensor([[0, 50]])
    one_call = torch.compile(flex_flash_attn_func, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="q must have shape"):
        one_call(q[:, 0], k, k, whole, whole, sink=torch.zeros(1, HEADS))
    with pytest.raises(ValueError, match="a sink of layout 'ssh' must have shape"):
        one_call(q, k, k, whole, whole, sink=torch.zeros(1, HEADS), sink_layout="ssh")
    with pytest.raises(ValueError, match="x has 20 rows in dim 0"):
        torch.compile(dispatch, backend="aot_eager", fullgraph=True)(q[:20], key)
    clear_cache()
    with pytest.raises(ValueError, match="key does not exist"):
        compiled(q, k, k, None, key)


def test_handles_belong_to_objects():
    key = make_key(30, 50)
    assert key_of_handle(key.handle) is key
    assert copy.deepcopy(key) is key
    for other in (copy.copy(key), pickle.loads(pickle.dumps(key))):
        assert other == key
        assert hash(other) == hash(key)
        assert other.handle != key.handle
        assert key_of_handle(other.handle) is other


def test_a_handle_does_not_keep_its_key():
    handle = make_key(30, 50).handle
    clear_cache()
    gc.collect()
    with pytest.raises(ValueError, match="no longer exists: keep the key"):
        key_of_handle(handle)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operators_keep_their_promises(dtype):
    """Schema, fake results, autograd registration and tracing, as torch.library checks them."""
    key = make_key(30, 50)
    q = torch.randn(50, HEADS, DIM, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(50, KV_HEADS, DIM, dtype=dtype, requires_grad=True) for _ in range(2))
    sink = torch.randn(1, HEADS, dtype=torch.float64, requires_grad=True)
    ops = torch.ops.magi_attention
    torch.library.opcheck(ops.calc_attn.default, (q, k, v, sink, key.handle, None, 0.0, True))
    ranges = torch.tensor([[0, 30], [30, 50]])
    options = ("sh", 0.3, 2.0, False, 0, False, None)
    local, (num_local, _) = dispatch(q.detach(), key).requires_grad_(), key.local_rows
    torch.library.opcheck(ops.dispatch.default, (q, key.handle, "query", num_local, True, 1.0))
    torch.library.opcheck(ops.undispatch.default, (local, key.handle, "query", 50, False))
    torch.library.opcheck(ops.undispatch.default, (local, key.handle, "query", 50, True))
    torch.library.opcheck(ops.scatter_sum.default, (q.detach(), key.handle, "query", num_local))
    torch.library.opcheck(ops.roll.default, (local, key.handle, "key", 3, 0))
    torch.library.opcheck(ops.position_ids.default, (key.handle, "query", num_local, torch.device("cpu")))
    torch.library.opcheck(ops.flex_flash_attn.default, (q, k, v, ranges, ranges, None, sink, *options))
    lists, options = torch.arange(50)[:, None, None] - torch.arange(2 * 7).view(2, 7), (0.3, 2.0, False, 0)
    torch.library.opcheck(ops.index_attention.default, (q, k, v, lists, sink, "sh", True, *options, "auto", "same"))


def test_no_operator_is_captured_in_a_graph():
    """By modes of the compiler that capture CUDA graphs: what operators launch may be others in the next call."""

    def step(x, q, k, v):
        local = undispatch(roll(dispatch(x, key), -1, 0, key), key, is_partial_grad=True)
        return local, calc_attn(q, k, v, key)[0], flex_flash_attn_func(q, k, v, ranges, ranges)[0]

    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    key, ranges = make_key(30, 50), torch.tensor([[0, 30], [30, 50]])
    x, q, k, v = (torch.randn(50, heads, DIM, requires_grad=True) for heads in (1, HEADS, KV_HEADS, KV_HEADS))
    results = torch.compile(step, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))(x, q, k, v)
    torch.autograd.grad([each.sum() for each in results], (x, q, k, v))
    called = {node.target for graph in graphs for node in graph.graph.nodes if "magi" in str(node.target)}
    assert {each.name().removeprefix("magi_attention::") for each in called} == {
        *("dispatch", "undispatch", "roll", "scatter_sum"),
        *("calc_attn", "calc_attn_backward", "flex_flash_attn", "flex_flash_attn_backward"),
    }
    assert all(torch.Tag.cudagraph_unsafe in each.tags for each in called)


def test_backward_after_the_key_left_the_cache():
    key = make_key(16, 32)
    q, k, v = (torch.randn(32, heads, DIM, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS))
    out, _ = torch.compile(by_key, backend="aot_eager")(q, k, v, None, key)
    clear_cache()
    with pytest.raises(ValueError, match=r"gave way to newer keys .*: make it again"):
        out.sum().backward()
