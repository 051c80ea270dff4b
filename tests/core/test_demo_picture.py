# SPDX-License-Identifier: Apache-2.0
"""The numbers and the picture that are made of plans."""

from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest

from magi_attention.cli.demo.masks import build_mask
from magi_attention.cli.demo.options import MaskFamily
from magi_attention.cli.picture import BACKGROUND, coverage, mask_image, rank_colours, save_picture
from magi_attention.cli.shares import imbalance, predict_timeline, share_of
from magi_attention.common.slices import SliceTable
from magi_attention.plan.build import build_plans
from magi_attention.plan.layout import Layout
from magi_attention.plan.stages import StageOptions

ENDS = np.array([0, 37, 60, 90])
LAYOUT = Layout(num_real=90, total=96, chunk_size=8, num_ranks=3, owner=np.array([0, 1, 2, 2, 1, 0] * 2))


def plans_for(mask, degree=2):
    return build_plans(mask, LAYOUT, range(3), StageOptions(degree=degree, min_piece=4))


def dense(mask, total):
    i, j = np.mgrid[:total, :total]
    kept = np.zeros((total, total), bool)
    for q0, q1, k0, k1, lower, upper in mask.bands():
        kept |= (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1) & (lower <= j - i) & (j - i <= upper)
    return kept


@pytest.mark.parametrize("family", MaskFamily)
@pytest.mark.parametrize("degree", [0, 1, 3])
def test_shares_against_the_dense_mask(family, degree):
    mask = build_mask(family, ENDS)
    kept = dense(mask, 96)
    owner = np.repeat(LAYOUT.owner, 8)
    for plan in plans_for(mask, degree):
        share = share_of(plan)
        mine = owner == plan.rank
        assert share.tokens == mine[:90].sum()
        assert share.pairs == kept[mine].sum()
        assert share.rows_received == (kept[mine].any(axis=0) & ~mine).sum()
        assert share.rows_of_others == 96 - mine.sum()


def test_imbalance_is_the_maximum_over_the_mean():
    shares = [share_of(plan) for plan in plans_for(build_mask(MaskFamily.CAUSAL, ENDS))]
    pairs = [share.pairs for share in shares]
    assert imbalance(shares) == pytest.approx(max(pairs) / (sum(pairs) / 3))


def test_timeline_keeps_its_order_and_hides_rows_behind_computation():
    plan = plans_for(build_mask(MaskFamily.CAUSAL, ENDS))[0]
    free, slow = predict_timeline(plan, 0.0), predict_timeline(plan, 1e6)
    assert [timing.pairs for timing in free] == [stage.slices.area() for stage in plan.stages]
    assert free[-1].compute_stop == share_of(plan).pairs
    for earlier, later in pairwise(slow):
        assert later.receive_start >= max(earlier.receive_stop, earlier.compute_start)
        assert later.compute_start >= max(earlier.compute_stop, later.receive_stop)
    assert slow[-1].receive_stop == pytest.approx(share_of(plan).rows_received * 1e6)


@pytest.mark.parametrize("family", MaskFamily)
def test_coverage_is_the_share_of_keys_seen(family):
    mask = build_mask(family, ENDS)
    rows = np.arange(0, 90, 7)
    expected = dense(mask, 90)[rows].reshape(len(rows), 30, 3).mean(axis=2)
    assert coverage(mask, rows, np.linspace(0, 90, 31)) == pytest.approx(expected)


def test_mask_image_shows_the_owner_of_each_row():
    mask = SliceTable([[0, 90, 0, 45, 0]])
    colours = rank_colours(3)
    image = mask_image(mask, LAYOUT, colours, 90)
    for row in (0, 9, 89):
        assert image[row, 10] == pytest.approx(colours[LAYOUT.owner[row // 8]])
        assert image[row, 80] == pytest.approx(BACKGROUND)


@pytest.mark.parametrize("num_ranks", [1, 8, 64])
def test_colours_differ(num_ranks):
    assert len(set(rank_colours(num_ranks))) == num_ranks


@pytest.mark.parametrize("degree", [0, 2])
def test_picture_is_written(tmp_path, degree):
    mask = build_mask(MaskFamily.SHARED_QUESTION, ENDS)
    save_picture(tmp_path / "plan.png", mask, plans_for(mask, degree), "title")
    pixels = matplotlib.image.imread(tmp_path / "plan.png")
    assert pixels.shape[:2] == (1300, 1690)
    for colour in rank_colours(3):
        assert (np.abs(pixels[..., :3] - colour).max(axis=-1) < 0.01).sum() > 1000
