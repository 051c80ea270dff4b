# SPDX-License-Identifier: Apache-2.0
"""The API in one process, without torch.distributed: a group of one."""

import math
import pickle
import subprocess
import sys

import pytest
import torch

from magi_attention.api import (
    AttnRanges,
    DispatchConfig,
    DistAttnConfig,
    calc_attn,
    clear_cache,
    dispatch,
    dist_attn_runtime_dict_mgr,
    get_position_ids,
    magi_attn_flex_dispatch,
    magi_attn_flex_key,
    magi_attn_varlen_dispatch,
    magi_attn_varlen_key,
    roll,
    roll_simple,
    undispatch,
)
from magi_attention.common import AttnMaskType
from magi_attention.common.enum import AttnRole
from magi_attention.common.slices import SliceTable
from magi_attention.config import RuntimeConfig
from magi_attention.dist_attn_runtime_mgr import init_dist_attn_runtime_mgr
from magi_attention.functional import dispatch_func
from magi_attention.meta import make_dispatch_meta_from_qk_ranges
from magi_attention.runtime.manager import build_manager
from magi_attention.testing.oracle import dense_attention

TOTAL, PADDED = 50, 56
SLICES = SliceTable([[0, 30, 0, 30, 1], [30, 50, 30, 50, 1]])


@pytest.fixture(scope="module")
def key():
    yield magi_attn_varlen_key([0, 30, 50], [0, 30, 50], 4, 2, 8, 0, None, causal=True)
    clear_cache()


def qkv(rows, dtype=torch.float64, heads=(4, 2, 2), dims=(8, 8, 8)):
    generator = torch.Generator().manual_seed(rows)
    return [
        torch.randn(rows, h, d, generator=generator, dtype=torch.float64).to(dtype)
        for h, d in zip(heads, dims, strict=True)
    ]


def test_dispatch_pads_and_undispatch_drops_the_padding(key):
    x = torch.randn(TOTAL, 3, 2, dtype=torch.float64, requires_grad=True)
    local = dispatch(x, key, pad_value=7.0)
    assert local.shape == (PADDED, 3, 2)
    assert local.is_contiguous()
    assert (local[TOTAL:] == 7).all()
    assert torch.equal(undispatch(local, key), x)
    weight = torch.randn(TOTAL, 3, 2, dtype=torch.float64)
    (undispatch(local, key) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_labels_are_padded_with_integers(key):
    local = dispatch(torch.arange(TOTAL), key, pad_value=-100)
    assert local.tolist() == [*range(TOTAL), *[-100] * 6]


@pytest.mark.parametrize(
    ("dtype", "pad_value"),
    [(torch.uint8, -100), (torch.int64, 0.5), (torch.int64, math.inf), (torch.int32, math.nan), (torch.bool, 2)],
)
def test_a_pad_value_that_integers_do_not_have_is_refused(key, dtype, pad_value):
    with pytest.raises(ValueError, match=f"pad_value={pad_value} is no value of {dtype}"):
        dispatch(torch.zeros(TOTAL, dtype=dtype), key, pad_value=pad_value)


@pytest.mark.parametrize(("dtype", "pad_value"), [(torch.bool, True), (torch.int64, 2**53 + 1), (torch.uint8, 255.0)])
def test_integers_are_padded_with_all_that_they_have(key, dtype, pad_value):
    assert (dispatch(torch.zeros(TOTAL, dtype=dtype), key, pad_value=pad_value)[TOTAL:] == pad_value).all()


@pytest.mark.parametrize("rows", [TOTAL - 1, TOTAL + 1, PADDED])
def test_dispatch_checks_the_length(key, rows):
    with pytest.raises(ValueError, match=f"x has {rows} rows in dim 0, but the global sequence .* has {TOTAL}"):
        dispatch(torch.zeros(rows), key)


@pytest.mark.parametrize(
    "call", [undispatch, lambda x, key: roll(x, 1, 0, key), lambda x, key: roll_simple(x, 1, 0, key)]
)
def test_local_functions_check_the_length(key, call):
    with pytest.raises(ValueError, match=f"x has {TOTAL} rows in dim 0, but this rank's share has {PADDED}"):
        call(torch.zeros(TOTAL), key)


def test_tensors_without_that_dim_are_refused(key):
    with pytest.raises(ValueError, match="no dim 0"):
        dispatch(torch.tensor(1.0), key)
    with pytest.raises(ValueError, match="no dim 2"):
        roll(torch.zeros(PADDED, 2), 1, 2, key)
    with pytest.raises(TypeError, match="x must be a tensor, not list"):
        dispatch([1.0] * TOTAL, key)


@pytest.mark.parametrize("shift", [0, 1, -1, 7, 49, 50, 63, -120])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("function", [roll, roll_simple])
def test_roll_rolls_the_real_sequence(key, function, dim, shift):
    x = torch.randn(TOTAL, 3, dtype=torch.float64, requires_grad=True)
    local = dispatch(x, key)
    rolled = function(local if dim == 0 else local.T, shift, dim, key)
    rolled = rolled if dim == 0 else rolled.T
    expected = torch.roll(x, shift, 0)
    assert torch.equal(rolled[:TOTAL], expected)
    assert (rolled[TOTAL:] == 0).all()
    weight = torch.randn(PADDED, 3, dtype=torch.float64)
    gradient = torch.autograd.grad((rolled * weight).sum(), x)[0]
    assert torch.equal(gradient, torch.autograd.grad((expected * weight[:TOTAL]).sum(), x)[0])


def test_position_ids(key):
    ids = get_position_ids(key)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [*range(TOTAL), *[TOTAL - 1] * 6]
    assert get_position_ids(key) is ids


def test_real_rows_without_slices_keep_their_position():
    ranges = AttnRanges.from_ranges([(0, 80)])
    key = magi_attn_flex_key(ranges, ranges, "causal", 100, 100, 4, 2, 8, 0, None)
    assert get_position_ids(key).tolist() == [*range(100), *[99] * 4]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("with_sink", [True, False])
def test_attention_and_gradients(key, padded, with_sink):
    inputs = [x.requires_grad_() for x in qkv(TOTAL)]
    sink = torch.randn(2, 4, dtype=torch.float64, requires_grad=True) if with_sink else None
    local = [dispatch(x, key) for x in inputs] if padded else inputs
    out, meta = calc_attn(*local, key, sink=sink, softcap=3.0, softmax_scale=0.5, return_max_logits=True)
    assert out.shape == (PADDED if padded else TOTAL, 4, 8)
    expected, lse, max_logits = dense_attention(*inputs, SLICES, softmax_scale=0.5, softcap=3.0, sink=sink)
    torch.testing.assert_close(out[:TOTAL], expected)
    torch.testing.assert_close(meta.lse[:TOTAL], lse)
    torch.testing.assert_close(meta.max_logits.double(), max_logits.double(), rtol=1e-5, atol=1e-5)
    wanted = [*inputs, *([sink] if with_sink else [])]
    weight = torch.randn_like(expected)
    for name, got, want in zip(
        ["q", "k", "v", "sink"],
        torch.autograd.grad((out[:TOTAL] * weight).sum() + meta.lse[:TOTAL].sum(), wanted),
        torch.autograd.grad((expected * weight).sum() + lse.sum(), wanted),
        strict=False,
    ):
        torch.testing.assert_close(got, want, msg=lambda m, name=name: f"d{name}: {m}")


def test_padding_attends_to_nothing(key):
    out, meta = calc_attn(*[dispatch(x, key) for x in qkv(TOTAL)], key)
    assert (out[TOTAL:] == 0).all()
    assert (meta.lse[TOTAL:] == float("-inf")).all()
    assert meta.max_logits is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_out_has_the_dtype_of_q(key, dtype):
    inputs = qkv(TOTAL, dtype)
    out, meta = calc_attn(*inputs, key)
    assert (out.dtype, meta.lse.dtype) == (dtype, torch.float32)
    expected, _, _ = dense_attention(*inputs, SLICES)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


MISTAKES = {
    "too short": (lambda: (qkv(TOTAL - 1), {}), ValueError, "49 rows, but rank 0 of the group holds 56"),
    "too long": (lambda: (qkv(PADDED + 1), {}), ValueError, "57 rows"),
    "different rows": (lambda: ([qkv(TOTAL)[0], *qkv(PADDED)[1:]], {}), ValueError, "same number of rows"),
    "no heads": (lambda: ([x[:, 0] for x in qkv(TOTAL)], {}), ValueError, r"q must be \[n, hq, d\]"),
    "zero heads": (lambda: (qkv(TOTAL, heads=(0, 2, 2)), {}), ValueError, "there must be heads, and of a size"),
    "heads of size 0": (lambda: (qkv(TOTAL, dims=(0, 0, 8)), {}), ValueError, "there must be heads, and of a size"),
    "k and v differ": (lambda: (qkv(TOTAL, heads=(4, 2, 1)), {}), ValueError, r"v \(50, 1, 8\)"),
    "head sizes": (lambda: (qkv(TOTAL, dims=(8, 16, 16)), {}), ValueError, "the same head size"),
    "head counts": (lambda: (qkv(TOTAL, heads=(4, 3, 3)), {}), ValueError, "4 query heads must be a multiple of the 3"),
    "dtypes": (lambda: ([qkv(TOTAL)[0].float(), *qkv(TOTAL)[1:]], {}), TypeError, "torch.float32, torch.float64"),
    "learned scale": (
        lambda: (qkv(TOTAL), {"softmax_scale": torch.tensor(0.3)}),
        TypeError,
        "softmax_scale must be a number, not Tensor; multiply q",
    ),
    "integers": (lambda: ([x.long() for x in qkv(TOTAL)], {}), TypeError, "torch.int64"),
    "device": (lambda: ([qkv(TOTAL)[0].to("meta"), *qkv(TOTAL)[1:]], {}), ValueError, "they are on meta, cpu, cpu"),
    "softcap": (lambda: (qkv(TOTAL), {"softcap": -1.0}), ValueError, "softcap is -1.0"),
    "sink shape": (lambda: (qkv(TOTAL), {"sink": torch.zeros(1, 2)}), ValueError, r"sink must be \[s, 4\]"),
    "sink dim": (lambda: (qkv(TOTAL), {"sink": torch.zeros(4)}), ValueError, r"it is \(4,\)"),
    "sink dtype": (lambda: (qkv(TOTAL), {"sink": torch.zeros(1, 4, dtype=torch.int32)}), TypeError, "torch.int32"),
    "sink device": (lambda: (qkv(TOTAL), {"sink": torch.zeros(1, 4, device="meta")}), ValueError, "sink is on meta"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_attention_arguments(key, mistake):
    make, error, message = MISTAKES[mistake]
    tensors, options = make()
    with pytest.raises(error, match=message) as raised:
        calc_attn(*tensors, key, **options)
    assert isinstance(raised.value, AssertionError)


def test_autocast_is_named_where_it_left_other_dtypes(key):
    q, k, v = qkv(TOTAL, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="autocast leaves them as they are"):
        calc_attn(q, k, v.bfloat16(), key)


@pytest.mark.parametrize(
    "options", [{"sink": torch.zeros(1, 4)}, {"return_max_logits": True}], ids=["sink", "max_logits"]
)
def test_flattened_head_groups_exclude_sink_and_max_logits(options):
    config = DistAttnConfig(runtime_config=RuntimeConfig(flatten_head_groups=True))
    key = magi_attn_varlen_key([0, 50], [0, 50], 4, 2, 8, 0, None, dist_attn_config=config)
    with pytest.raises(AssertionError, match="flatten_head_groups"):
        calc_attn(*qkv(TOTAL), key, **options)


def test_deprecated_dispatch_returns_tensor_and_key(key):
    x = torch.randn(TOTAL, 2)
    with pytest.warns(DeprecationWarning, match="magi_attn_varlen_dispatch"):
        local, same = magi_attn_varlen_dispatch(x, [0, 30, 50], [0, 30, 50], 4, 2, 8, 0, None, causal=True)
    assert same == key
    assert torch.equal(local, dispatch(x, key))
    ranges = AttnRanges.from_ranges([(0, 30), (30, 50)])
    with pytest.warns(DeprecationWarning, match="magi_attn_flex_dispatch"):
        local, same = magi_attn_flex_dispatch(x, ranges, ranges, "causal", 50, 50, 4, 2, 8, 0, None)
    assert same == key
    assert torch.equal(local, dispatch(x, key))


def test_runtime_manager_without_padding_or_cache():
    ranges = AttnRanges.from_ranges([(0, 30), (30, 50)])
    manager = init_dist_attn_runtime_mgr(ranges, ranges, [AttnMaskType.CAUSAL] * 2, 50, 50, 4, 2, 8, 16, None)
    inputs = qkv(TOTAL)
    out, _ = manager.calc_attn(*[manager.dispatch_qo(x) for x in inputs])
    torch.testing.assert_close(manager.undispatch_qo(out), dense_attention(*inputs, SLICES)[0])
    assert (manager.key.chunk_size, manager.key.pad_size) == (16, 0)


def test_dispatch_meta_lists_each_rank_s_chunks():
    ranges = AttnRanges.from_ranges([(0, 100)])
    meta, of_keys = make_dispatch_meta_from_qk_ranges(
        ranges, ranges, [AttnMaskType.CAUSAL], 100, 100, 16, 3, 1, DispatchConfig(uneven_shard=True)
    )
    chunks_by_rank = [chunk for chunks in meta.partitions for chunk in chunks]
    assert sorted(chunks_by_rank) == list(range(7))
    assert all(chunks == sorted(chunks) for chunks in meta.partitions)
    assert meta.partitions_perm_idxs == chunks_by_rank
    assert [meta.partitions_perm_idxs[place] for place in meta.partitions_unperm_idxs] == list(range(7))
    assert meta.chunk_actual_sizes == [16] * 6 + [4]
    rows = [
        [row for chunk in chunks for row in range(16 * chunk, min(16 * chunk + 16, 100))] for chunks in meta.partitions
    ]
    assert meta.split_sizes == [len(each) for each in rows]
    assert meta.position_ids.tolist() == rows[1]
    assert [[p for r in held for p in range(r.start, r.end)] for held in meta.host_ranges_per_rank] == rows
    assert (meta.layout.owner == [next(r for r in range(3) if c in meta.partitions[r]) for c in range(7)]).all()
    assert of_keys.partitions == meta.partitions
    assert of_keys.attn_role is not meta.attn_role


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_attention_in_its_inputs_dtype(key, dtype):
    q, k, v = (x.detach().requires_grad_() for x in qkv(PADDED, dtype))
    expected, meta = calc_attn(q, k, v, key)
    gradients = torch.autograd.grad(expected.sum(), (q, k, v))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, meta_autocast = calc_attn(q, k, v, key)
        assert torch.equal(out, expected)
        assert torch.equal(meta_autocast.lse, meta.lse)
        for actual, wanted in zip(torch.autograd.grad(out.sum(), (q, k, v)), gradients, strict=True):
            assert torch.equal(actual, wanted)


def test_results_may_be_modified_in_place(key):
    q, k, v = (x.detach().requires_grad_() for x in qkv(PADDED))
    expected, _ = calc_attn(q, k, v, key)
    out, meta = calc_attn(q, k, v, key)
    out.mul_(2)
    meta.lse.mul_(2)
    assert torch.equal(out, 2 * expected)
    # As for softmax, the backward pass reads the output, and says so if that is not what it was.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("bad", [[1.0], None, 3])
def test_what_is_no_tensor_is_a_type_error(key, bad):
    q, k, v = qkv(PADDED)
    for arguments in ((bad, k, v), (q, bad, v), (q, k, bad)):
        with pytest.raises(TypeError, match="must be a tensor, not"):
            calc_attn(*arguments, key)


@pytest.mark.parametrize("depends", [False, True])
def test_gradients_of_gradients_are_refused(key, depends):
    q, k, v = (x.requires_grad_() for x in qkv(PADDED))
    out, _ = calc_attn(q, k, v, key)
    weight = torch.ones_like(out).requires_grad_(depends)
    (gradient,) = torch.autograd.grad((weight * out).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention has no second derivative"):
        (gradient.square().sum() + q.sum()).backward()


def test_a_graph_of_the_backward_pass_changes_no_gradient(key):
    found = []
    for create_graph in (False, True):
        q, k, v = (x.requires_grad_() for x in qkv(PADDED))
        out, _ = calc_attn(q, k, v, key)
        found.append(torch.autograd.grad(out.sum(), (q, k), create_graph=create_graph))
    assert all(torch.equal(plain, with_graph) for plain, with_graph in zip(*found, strict=True))


def test_tensors_without_values_have_shapes(key):
    q, k, v = (x.to("meta").requires_grad_() for x in qkv(PADDED))
    out, meta = calc_attn(q, k, v, key)
    undispatch(out, key).sum().backward()
    assert (out.shape, meta.lse.shape, k.grad.shape) == (q.shape, q.shape[:2], k.shape)


def test_nested_and_sparse_tensors_are_refused(key):
    nested = torch.nested.nested_tensor([torch.zeros(60, 3), torch.zeros(40, 3)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"x is a nested tensor; pass its packed rows, x.values\(\)"):
        dispatch(nested, key)
    with pytest.raises(TypeError, match=r"x has the layout torch.sparse_coo; pass x.to_dense\(\)"):
        dispatch(torch.eye(TOTAL).to_sparse(), key)


def test_a_shift_is_an_integer(key):
    with pytest.raises(TypeError, match=r"shift must be an integer, not 1\.5"):
        roll(torch.zeros(PADDED), 1.5, 0, key)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"softcap": math.nan}, "softcap is nan"), ({"softmax_scale": math.inf}, "softmax_scale is inf")],
)
def test_options_that_are_not_finite_are_refused(key, options, message):
    with pytest.raises(ValueError, match=message):
        calc_attn(*qkv(PADDED), key, **options)


def test_a_pickled_key_finds_its_plan_in_another_process(key):
    state = pickle.loads(pickle.dumps(key))
    assert "_hash" not in vars(state)
    assert state == key
    assert hash(state) == hash(key)


def test_managers_know_their_layout_and_equal_plans_are_equal(key):
    manager = dist_attn_runtime_dict_mgr[key]
    x = torch.arange(TOTAL)
    assert torch.equal(dispatch_func(x, None, manager.dispatch_meta_q), dispatch(x, key))
    assert manager == build_manager(key)
    assert manager != build_manager(magi_attn_varlen_key([0, 7], [0, 7], 4, 2, 8, 0, None))


@pytest.mark.parametrize("ends", [[0.5, 1], "04", [0, "8"]])
def test_documents_end_at_integers(ends):
    with pytest.raises(TypeError, match="must be integers"):
        magi_attn_varlen_key(ends, ends, 4, 2, 8, 0, None)


@pytest.fixture(scope="module")
def cross_key():
    q_ranges, k_ranges = AttnRanges.from_ranges([(0, 30), (30, 50)]), AttnRanges.from_ranges([(0, 10), (10, 90)])
    yield magi_attn_flex_key(q_ranges, k_ranges, "full", 50, 90, 4, 2, 8, 0, None, is_same_source=False)
    clear_cache()


@pytest.mark.parametrize("padded", [True, False])
def test_cross_attention_and_gradients(cross_key, padded):
    inputs = [x.requires_grad_() for x in (qkv(50)[0], *qkv(90)[1:])]
    roles = (AttnRole.QUERY, AttnRole.KEY, AttnRole.VALUE)
    local = [dispatch(x, cross_key, attn_role=role) for x, role in zip(inputs, roles, strict=True)]
    assert [len(x) for x in local] == [56, 96, 96]
    out, _ = calc_attn(*(local if padded else inputs), cross_key)
    expected = dense_attention(*inputs, SliceTable([[0, 30, 0, 10, 0], [30, 50, 10, 90, 0]]))[0]
    torch.testing.assert_close(out[:50], expected)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((out[:50] * weight).sum(), inputs)
    for got, want in zip(gradients, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((96, 96), "q has 96 rows, but rank 0 of the group holds 56 of the padded sequence's 56"),
        ((56, 56), "k and v have 56 rows, but rank 0 of the group holds 96 of the padded sequence's 96"),
    ],
)
def test_each_side_of_cross_attention_has_its_own_rows(cross_key, rows, message):
    with pytest.raises(ValueError, match=message):
        calc_attn(qkv(rows[0])[0], *qkv(rows[1])[1:], cross_key)
    with pytest.raises(ValueError, match="x has 50 rows in dim 0, but the global sequence without padding has 90"):
        dispatch(torch.zeros(50), cross_key, attn_role=AttnRole.KEY)
    with pytest.raises(ValueError, match="x has 56 rows in dim 0, but this rank's share has 96"):
        undispatch(torch.zeros(56), cross_key, attn_role=AttnRole.VALUE)


@pytest.mark.parametrize(
    "call",
    [
        lambda role, key: dispatch(torch.zeros(TOTAL), key, attn_role=role),
        lambda role, key: undispatch(torch.zeros(PADDED), key, attn_role=role),
        lambda role, key: roll(torch.zeros(PADDED), 1, 0, key, attn_role=role),
        lambda role, key: get_position_ids(key, attn_role=role),
    ],
)
def test_a_role_is_an_attn_role(key, call):
    with pytest.raises(ValueError, match="attn_role must be an AttnRole, got 'key'"):
        call("key", key)


EXITING_PROGRAM = """
import atexit, gc, os, sys

def count_threads():  # registered first, and so called last
    gc.collect()
    print(len(os.listdir("/proc/self/task")))

atexit.register(count_threads)
import torch
import torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
import torch.distributed.nn
from magi_attention.api import calc_attn, dispatch, magi_attn_varlen_key
key = magi_attn_varlen_key([0, 64], [0, 64], 2, 2, 8, 0, dist.group.WORLD, causal=True)
x = dispatch(torch.randn(64, 2, 8, requires_grad=True), key)
out, meta = calc_attn(x, x, x, key)
dist.destroy_process_group()
"""


def test_no_process_group_outlives_the_interpreter(tmp_path):
    command = [sys.executable, "-c", EXITING_PROGRAM, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
