# SPDX-License-Identifier: Apache-2.0
"""A failure tells what stands where something else should."""

import torch

from tests.comm.wrong import LastWrong, tell_apart

TERM = (torch.arange(1.0, 257.0) + 700).expand(6, -1)


def test_wrong_values_are_told_by_what_they_are():
    rows = LastWrong(TERM)
    rows.look(TERM.clone(), TERM)
    rows.look_again(TERM)
    assert rows.told() == ""
    got = TERM.clone()
    got[0], got[1, 0], got[2, :3], got[4, 1] = 0, torch.nan, got[2, :3] + 100, 12345.5
    got[5] -= 200
    rows.look(got, TERM)
    got[0] = TERM[0]
    rows.look_again(got)
    rows.look(TERM.clone(), TERM)
    assert rows.told() == (
        "256 not there, 256 of an earlier epoch, 3 of a later epoch, 2 something else, 256 right a little later, "
        "of 1536, in rows [0, 1, 2, 4, 5]: [0.0, 0.0, 0.0, 0.0] instead of [701.0, 702.0, 703.0, 704.0]"
    )


def test_sums_miss_a_term():
    sums = LastWrong(TERM, num_terms=2)
    sums.look(TERM.clone(), 2 * TERM[0])
    assert sums.told().startswith("1536 not there, of 1536")


def test_transports_that_differ_are_told():
    first = torch.arange(60.0).view(5, 4, 3)
    other = first.clone()
    other[2, 1] = 7
    found = {"copy_engine": first, "push": first.clone(), None: other, "put": other.clone()}
    told = tell_apart("rows", found, torch.full_like(first, 7)).split("; ")
    assert told[1:] == [
        "push is like copy_engine",
        "None has 3 other values of rows than copy_engine, in rows [2], 3 of them as before",
        "put is like None",
    ]
