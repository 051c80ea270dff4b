# SPDX-License-Identifier: Apache-2.0
"""Row-range operations against loops over rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.common.range_op import range_fill_, range_gather, range_reduce

ROWS = 10
pair = st.tuples(st.integers(0, ROWS), st.integers(0, 4)).map(lambda p: (p[0], min(p[0] + p[1], ROWS)))
ranges = st.lists(pair, max_size=5)


def rows_of(some):
    return [row for start, end in some for row in range(start, end)]


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(ranges, st.sampled_from([0, 1]))
def test_gather_concatenates_the_ranges(some, dim):
    x = data(ROWS, ROWS, 2)
    wanted = x[rows_of(some)] if dim == 0 else x[:, rows_of(some)]
    assert torch.equal(range_gather(x, torch.tensor(some, dtype=torch.int32).reshape(-1, 2), dim), wanted)
    output = torch.empty_like(wanted)
    assert range_gather(x, some, dim, output=output) is output
    assert torch.equal(output, wanted)


@given(ranges, st.sampled_from([0, 1]))
def test_fill_changes_the_ranges_in_place(some, dim):
    x = data(ROWS, ROWS, 2)
    wanted = x.clone()
    for row in rows_of(some):
        wanted.select(dim, row).fill_(3.0)
    assert range_fill_(x, some, 3.0, dim) is x
    assert torch.equal(x, wanted)


@st.composite
def matched_ranges(draw):
    """Input and output ranges of equal lengths; output ranges overlap now and then."""
    inputs, outputs = [], []
    for _ in range(draw(st.integers(0, 5))):
        length = draw(st.integers(0, 4))
        for side in (inputs, outputs):
            start = draw(st.integers(0, ROWS - length))
            side.append((start, start + length))
    return inputs, outputs


@given(matched_ranges(), st.sampled_from(["sum", "avg"]), st.booleans(), st.sampled_from([0, 1, 2]))
def test_reduce_adds_or_averages_the_terms_in_order(matched, op, accumulate, dim):
    x, y = data(ROWS, ROWS, 2).movedim(0, dim), data(ROWS, ROWS, 2, seed=1).movedim(0, dim)
    before = y.clone()
    terms = {}
    for source, target in zip(rows_of(matched[0]), rows_of(matched[1]), strict=True):
        old = [before.select(dim, target)] if accumulate else []
        terms.setdefault(target, old).append(x.select(dim, source))
    assert range_reduce(x, y, *matched, dim=dim, reduce_op=op, acc_reduce=accumulate) is y
    for row in range(ROWS):
        wanted = torch.stack(terms[row]).sum(0) if row in terms else before.select(dim, row)
        if row in terms and op == "avg":
            wanted = wanted / len(terms[row])
        torch.testing.assert_close(y.select(dim, row), wanted, rtol=1e-14, atol=1e-14)


@given(matched_ranges(), st.booleans(), st.integers(0, ROWS))
def test_reduce_by_lse_merges_attention_outputs(matched, accumulate, without_keys):
    x, y = data(ROWS, 3, 2), data(ROWS, 3, 2, seed=1)
    x_lse, y_lse = data(ROWS, 3, seed=2), data(ROWS, 3, seed=3)
    x_lse[:without_keys], y_lse[: ROWS // 2] = -math.inf, -math.inf
    x[:without_keys], y[: ROWS // 2] = 0, 0
    old_y, old_lse = y.clone(), y_lse.clone()
    parts = {}
    for source, target in zip(rows_of(matched[0]), rows_of(matched[1]), strict=True):
        old = [(old_y[target], old_lse[target])] if accumulate else []
        parts.setdefault(target, old).append((x[source], x_lse[source]))
    result = range_reduce(x, y, *matched, reduce_op="lse", acc_reduce=accumulate, input_lse=x_lse, output_lse=y_lse)
    assert result[0] is y
    assert result[1] is y_lse
    for row in range(ROWS):
        if row not in parts:
            assert torch.equal(y[row], old_y[row])
            assert torch.equal(y_lse[row], old_lse[row])
            continue
        lse = torch.logsumexp(torch.stack([part[1] for part in parts[row]]), 0)
        weights = [torch.nan_to_num((part[1] - lse).exp(), nan=0.0) for part in parts[row]]
        out = sum(weight[:, None] * part[0] for weight, part in zip(weights, parts[row], strict=True))
        torch.testing.assert_close(y_lse[row], lse, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y[row], out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "reduce_dtype"), [(torch.float32, None), (torch.float64, torch.bfloat16)])
def test_reduce_by_lse_of_another_precision(dtype, reduce_dtype):
    x, y = torch.full((1, 1, 2), 1.0, dtype=dtype), torch.full((1, 1, 2), 3.0, dtype=dtype)
    x_lse, y_lse = (torch.zeros(1, 1, dtype=torch.float64) for _ in range(2))
    rows = [(0, 1)]
    range_reduce(x, y, rows, rows, reduce_op="lse", reduce_dtype=reduce_dtype, input_lse=x_lse, output_lse=y_lse)
    torch.testing.assert_close(y, torch.full_like(y, 2.0))
    torch.testing.assert_close(y_lse, torch.full_like(y_lse, 2.0).log())


def test_low_precision_is_added_in_float32_and_rounded_once():
    x = torch.full((256, 1), 1.0, dtype=torch.bfloat16)
    y = torch.full((1, 1), 256.0, dtype=torch.bfloat16)
    inputs = [(row, row + 1) for row in range(256)]
    range_reduce(x, y, inputs, [(0, 1)] * 256)
    assert y.item() == 512.0  # in bfloat16 itself, 256 + 1 is 256
    again = torch.full((1, 1), 256.0, dtype=torch.bfloat16)
    range_reduce(x, again, inputs, [(0, 1)] * 256, reduce_dtype=torch.bfloat16)
    assert again.item() == 256.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"output_ranges": [(0, 1)]}, "hold 2 rows.*1"),
        ({"reduce_op": "max"}, "sum, avg or lse, not 'max'"),
        ({"reduce_op": "lse"}, "needs input_lse"),
    ],
)
def test_mistakes(arguments, words):
    x = torch.zeros(4, 1)
    with pytest.raises(ValueError, match=words):
        range_reduce(x, x.clone(), **{"input_ranges": [(0, 2)], "output_ranges": [(0, 2)], **arguments})
