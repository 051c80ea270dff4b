# SPDX-License-Identifier: Apache-2.0
"""Times of methods that take turns on a GPU whose speed changes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist

from magi_attention.cli.bench import marks
from magi_attention.cli.bench.timing import compare_in_cycles, time_in_turns

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


class Processor:
    """A device that takes its time, and counts the cycles of its clock."""

    def __init__(self) -> None:
        self.seconds, self.cycles = 0.0, 0.0

    def work(self, cycles: float, hertz: float) -> Callable[..., torch.Tensor]:
        def passes(*_: object) -> torch.Tensor:
            self.seconds += cycles / hertz
            self.cycles += cycles
            return torch.empty(0)

        return passes

    def read_clocks(self) -> torch.Tensor:
        """Of three multiprocessors, of which the second took no block."""
        read = torch.tensor([self.cycles, self.seconds * 1e9], dtype=torch.float64).round().long() + 1
        return torch.stack([read, torch.zeros_like(read), read + torch.tensor([12345, 0])])


@pytest.fixture
def processor(monkeypatch, tmp_path):
    processor = Processor()
    monkeypatch.setattr(marks.time, "perf_counter", lambda: processor.seconds)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield processor
    dist.destroy_process_group()


def test_at_equal_clocks_cycles_count(processor):
    # The second takes a tenth more cycles, which nobody sees by the time.
    slow = processor.work(2e6, 1.0e9), processor.work(5e6, 1.0e9)
    fast = processor.work(2.2e6, 1.6e9), processor.work(5.5e6, 1.6e9)
    device = torch.device("cpu")
    by_time = time_in_turns([slow, fast], device, 0, 4)
    assert by_time[1].forward == pytest.approx(by_time[0].forward * 1.1 / 1.6)
    assert by_time[0].at_equal_clocks is None
    both = time_in_turns([slow, fast], device, 0, 4, read_clocks=processor.read_clocks)
    times = [each.at_equal_clocks for each in both]
    for name in ("forward", "backward"):
        assert [getattr(each, name) for each in both] == pytest.approx([getattr(each, name) for each in by_time])
        assert getattr(times[1], name) == pytest.approx(1.1 * getattr(times[0], name))
    # All passes together take as long as they did.
    taken = sum(each.forward + each.backward for each in times)
    assert taken == pytest.approx(sum(each.forward + each.backward for each in by_time))


def test_multiprocessors_that_were_not_read_do_not_count():
    before = torch.tensor([[100, 1000], [0, 0], [7, 1000], [0, 0]])
    after = torch.tensor([[1900, 2000], [5, 2000], [0, 0], [0, 0]])
    assert marks.clock_between(before, after) == pytest.approx(1.8e9)


@pytest.mark.gpu
def test_clocks_are_those_of_the_gpu():
    pytest.importorskip("triton")
    from benchmarks.clocks import read_clocks

    before = read_clocks()
    torch.cuda._sleep(10_000_000)  # cycles
    hertz = marks.clock_between(before, read_clocks())
    assert 2e8 < hertz < 4e9
