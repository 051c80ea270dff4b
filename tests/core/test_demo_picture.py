# SPDX-License-Identifier: Apache-2.0
"""The numbers and the picture that are made of plans."""

from dataclasses import fields
from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest

from magi_attention.cli.demo.masks import build_mask
from magi_attention.cli.demo.options import MaskFamily
from magi_attention.cli.figures import figures_of_plans
from magi_attention.cli.picture import save_picture
from magi_attention.cli.raster import coverage, mask_image, ownership_image, rank_colors
from magi_attention.common.slices import SliceTable
from magi_attention.plan.build import build_plans
from magi_attention.plan.layout import Layout
from magi_attention.plan.measure_plans import work_of_plans
from magi_attention.plan.rates import Cluster, LayerShape
from magi_attention.plan.stages import StageOptions

ENDS = np.array([0, 37, 60, 90])
LAYOUT = Layout(num_real=90, total=96, chunk_size=8, num_ranks=3, owner=np.array([0, 1, 2, 2, 1, 0] * 2))
NO_LATENCY = {"exchange_latency_us": 0, "kernel_latency_us": 0}


def plans_for(mask, degree=2):
    return build_plans(mask, LAYOUT, range(3), StageOptions(degree=degree, min_piece=4))


def figures_for(mask, degree=2, **cluster):
    return figures_of_plans(mask, plans_for(mask, degree), Cluster(**NO_LATENCY, **cluster), LayerShape())


def dense(mask, total):
    i, j = np.mgrid[:total, :total]
    kept = np.zeros((total, total), bool)
    for q0, q1, k0, k1, lower, upper in mask.bands():
        kept |= (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1) & (lower <= j - i) & (j - i <= upper)
    return kept


@pytest.mark.parametrize("family", MaskFamily)
@pytest.mark.parametrize("degree", [0, 1, 3])
def test_figures_against_the_dense_mask(family, degree):
    mask = build_mask(family, ENDS)
    kept = dense(mask, 96)
    owner = np.repeat(LAYOUT.owner, 8)
    figures = figures_for(mask, degree)
    needed = [kept[owner == rank].any(axis=0) & (owner != rank) for rank in range(3)]
    for rank in range(3):
        mine = owner == rank
        assert figures.work.tokens[rank] == mine[:90].sum()
        assert figures.pairs[rank] == kept[mine].sum()
        assert figures.received[rank] == needed[rank].sum()
        assert figures.sent[rank] == sum(needed[reader][mine].sum() for reader in range(3))
        assert figures.rows_of_others[rank] == 96 - mine.sum()
        assert figures.work.traffic[rank].tolist() == [needed[rank][owner == source].sum() for source in range(3)]


def test_imbalance_is_the_maximum_over_the_mean():
    figures = figures_for(build_mask(MaskFamily.CAUSAL, ENDS))
    assert figures.imbalance == pytest.approx(figures.pairs.max() / figures.pairs.mean())


def test_timeline_keeps_its_order():
    mask = build_mask(MaskFamily.CAUSAL, ENDS)
    forward = figures_for(mask, nvlink_gbs=1e-6).prediction.forward
    for earlier, later in pairwise(range(forward.compute.shape[1])):
        assert (forward.fetch[:, later, 0] >= forward.fetch[:, earlier, 1]).all()
        assert (forward.compute[:, later, 0] >= forward.compute[:, earlier, 1]).all()
        assert (forward.compute[:, later, 0] >= forward.fetch[:, later, 1]).all()
    work = work_of_plans(plans_for(mask))
    busy = np.maximum(work.received, work.sent).sum(axis=1) * LayerShape().bytes_per_row / 1e3
    assert np.diff(forward.fetch).sum(axis=(1, 2)) == pytest.approx(busy)


@pytest.mark.parametrize("family", MaskFamily)
def test_coverage_is_the_share_of_keys_seen(family):
    mask = build_mask(family, ENDS)
    rows = np.arange(0, 90, 7)
    expected = dense(mask, 90)[rows].reshape(len(rows), 30, 3).mean(axis=2)
    assert coverage(mask, rows, np.linspace(0, 90, 31)) == pytest.approx(expected)
    part = dense(mask, 90)[30:60:7, 30:60].reshape(5, 10, 3).mean(axis=2)
    assert coverage(mask, np.arange(30, 60, 7), np.linspace(30, 60, 11)) == pytest.approx(part)


def test_mask_image_shows_the_owner_of_each_row():
    mask = SliceTable([[0, 90, 0, 45, 0]])
    colors = rank_colors(3)
    image = mask_image(mask, LAYOUT, colors, 90)
    part = mask_image(mask, LAYOUT, colors, 30, (30, 60))
    for row in (0, 9, 89):
        assert image[row, 10] == pytest.approx([*colors[LAYOUT.owner[row // 8]], 1])
        assert image[row, 80, 3] == 0
    assert part == pytest.approx(image[30:60, 30:60])


def test_mask_image_shows_the_owner_of_runs_of_any_length():
    layout = Layout(90, 90, 8, 3, np.array([2, 0, 1]), np.array([0, 7, 61, 90]))
    colors = rank_colors(3)
    image = mask_image(SliceTable([[0, 90, 0, 45, 0]]), layout, colors, 90)
    for row, rank in ((0, 2), (6, 2), (7, 0), (60, 0), (61, 1), (89, 1)):
        assert image[row, 10] == pytest.approx([*colors[rank], 1])


def test_ownership_image_shows_each_run():
    image = ownership_image(LAYOUT, rank_colors(3), 96, 3)
    assert np.array_equal(image[..., 3] > 0, np.repeat(LAYOUT.owner, 8) == np.arange(3)[:, None])
    coarse = ownership_image(LAYOUT, rank_colors(3), 5, 2)
    assert (coarse[..., 3] > 0).tolist() == [[True] * 5, [True, True, False, True, True]]


@pytest.mark.parametrize("num_ranks", [1, 8, 64])
def test_colors_differ(num_ranks):
    assert len(set(rank_colors(num_ranks))) == num_ranks


@pytest.mark.parametrize("degree", [0, 2])
def test_picture_is_written(tmp_path, degree):
    mask = build_mask(MaskFamily.SHARED_QUESTION, ENDS)
    save_picture(tmp_path / "plan.png", figures_for(mask, degree), "title")
    pixels = matplotlib.image.imread(tmp_path / "plan.png")
    assert pixels.shape[:2] == (1690, 1690)
    for color in rank_colors(3):
        assert (np.abs(pixels[..., :3] - color).max(axis=-1) < 0.01).sum() > 1000


def test_work_has_one_entry_for_each_rank_and_stage():
    work = work_of_plans(plans_for(build_mask(MaskFamily.CAUSAL, ENDS), 2))
    shapes = {field.name: np.shape(getattr(work, field.name)) for field in fields(work)}
    assert shapes.pop("tokens") == (3,)
    assert shapes.pop("hops") == shapes.pop("queries_travel") == (3,)
    assert shapes.pop("links") == (4, 3, 3)
    assert set(shapes.values()) == {(3, 3)}
