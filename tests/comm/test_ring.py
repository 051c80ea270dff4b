# SPDX-License-Identifier: Apache-2.0
"""The protocol of slots and counters, in random orders of everything that streams leave open."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_comm_grpcoll.errors import SlotLentError
from magi_comm_grpcoll.ring import Ring
from tests.comm.simulation import run_exchanges


@settings(max_examples=300)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3), st.integers(1, 12), st.booleans())
def test_nobody_reads_too_early_or_what_is_written_over(seed, num_ranks, num_slots, num_epochs, by_puts):
    run_exchanges(seed, num_ranks, num_slots, num_epochs, by_puts=by_puts)


@pytest.mark.parametrize(
    ("broken", "by_puts"),
    [("credit", False), ("arrival", False), ("fence", False), ("credit", True), ("arrival", True), ("quiet", True)],
)
def test_without_a_wait_it_is_noticed(broken, by_puts):
    def run() -> None:
        for seed in range(50):
            run_exchanges(seed, 3, 2, 12, broken, by_puts)

    with pytest.raises(AssertionError, match="reads"):
        run()


def test_a_slot_that_is_still_lent_is_refused():
    ring = Ring(2)
    assert [ring.begin(), ring.begin()] == [0, 1]
    with pytest.raises(SlotLentError, match="2 exchanges hold rows"):
        ring.begin()
    assert ring.release(1) == 0  # the older one is still lent
    with pytest.raises(SlotLentError):
        ring.begin()
    assert ring.release(0) == 2
    assert ring.begin() == 2
    assert [ring.credit_needed(epoch) for epoch in (0, 1, 2, 5)] == [0, 0, 1, 4]


def test_an_epoch_is_given_back_once():
    ring = Ring(1)
    for epoch in (0, -1):
        with pytest.raises(ValueError, match="not lent"):
            ring.release(epoch)
    ring.release(ring.begin())
    with pytest.raises(ValueError, match="epoch 0 is not lent"):
        ring.release(0)
