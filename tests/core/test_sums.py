# SPDX-License-Identifier: Apache-2.0
"""Where a pass adds up more than a few results of low precision, the sum is rounded once."""

from types import SimpleNamespace

import torch

from magi_attention.kernels.protocol import AttentionResult
from magi_attention.runtime.backward import SavedAttention, _GradientSums, _row_term
from magi_attention.runtime.forward import _Results


def number(value: float) -> torch.Tensor:
    """Of one row with one head of one dim."""
    return torch.full((1, 1, 1), value, dtype=torch.bfloat16)


def test_three_outputs_of_a_query_are_merged_in_float32():
    schedule = SimpleNamespace(most_results=3, blank_queries=False)
    results = _Results(SimpleNamespace(forward=SimpleNamespace(schedule=schedule, steps=())), number(0), number(0))
    for value in (256, 258, 258):  # bfloat16 has no 257, the mean of the first two
        results.merge(None, AttentionResult(number(value), torch.zeros(1, 1), None))
    assert results.finish().out.bfloat16() == 258


def test_gradients_of_a_query_or_a_key_are_added_up_in_float32():
    schedule = SimpleNamespace(
        most_results=3,
        most_key_results=4,
        blank_queries=False,
        blank_keys=False,
        blank_late_keys=False,
        home_keys=None,
    )
    job = SimpleNamespace(
        backward=SimpleNamespace(schedule=schedule),
        options=SimpleNamespace(backward_high_precision_reduce=False),
        collectives=None,
    )
    saved = SavedAttention(number(0), number(0), number(0), number(0), torch.zeros(1, 1))
    sums = _GradientSums(job, saved, number(0), None)
    for total in (sums._dq, *sums._own, *sums._late):
        for value in (256, 1, 1):
            total.add(None, number(value), not total.is_new)
        assert total.allocated(torch.bfloat16).bfloat16() == 258


def test_what_travels_in_place_of_outputs_is_added_up_in_float32():
    out, dout = torch.tensor([[[256, 1]]]).bfloat16(), torch.ones(1, 1, 2, dtype=torch.bfloat16)
    saved = SavedAttention(out, out, out, out, torch.zeros(1, 1))
    assert _row_term(saved, dout, None) == -257
    assert _row_term(saved, dout, torch.ones(1, 1)) == -256
