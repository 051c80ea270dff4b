# SPDX-License-Identifier: Apache-2.0
"""Times of methods that take turns on a GPU whose speed changes."""

import numpy as np
import pytest

from magi_attention.cli.bench.timing import compare_in_cycles

TRUE = np.array([[1.0, 3.0], [1.01, 2.9], [2.0, 6.0]])


def cycles(speed: np.ndarray, noise: float) -> np.ndarray:
    """Passes ``[methods, cycles, 2, 2]`` of three methods, at the speed of each cycle."""
    draw = np.random.default_rng(0)
    exact = TRUE[:, None, None] / speed[None, :, None, None]
    return exact * np.exp(noise * draw.standard_normal((*exact.shape[:2], 2, 2)))


def test_a_speed_that_changes_between_cycles_does_not_blur_how_methods_stand():
    speed = np.exp(0.05 * np.random.default_rng(1).standard_normal(25))
    times, errors = compare_in_cycles(cycles(speed, 0.0))
    np.testing.assert_allclose(times, TRUE / np.median(speed), rtol=1e-12)
    np.testing.assert_allclose(errors, 0.0, atol=1e-12)


def test_errors_tell_how_far_ratios_may_be_off():
    speed = np.where(np.arange(400) % 40 < 20, 1.0, 0.95)
    times, errors = compare_in_cycles(cycles(speed, 0.01))
    ratio, error = times[0] / times[1], np.hypot(errors[0] / times[0], errors[1] / times[1])
    assert (abs(ratio / (TRUE[0] / TRUE[1]) - 1) < 3 * error).all()
    assert (error < 0.001).all()


def test_of_one_method_alone_the_passes_count():
    seconds = np.array([1.0, 4.0, 2.0, 3.0, 9.0]).reshape(1, 5, 1, 1).repeat(2, axis=-1)
    times, errors = compare_in_cycles(seconds)
    np.testing.assert_allclose(times, [[3.0, 3.0]])
    assert errors == pytest.approx(np.full((1, 2), 0.929 / 5**0.5 * 2.0))
