# SPDX-License-Identifier: Apache-2.0
"""Times of methods that take turns on a GPU whose speed changes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist

from magi_attention.cli.bench import marks
from magi_attention.cli.bench.timing import compare_in_cycles, time_in_turns
from magi_attention.cli.bench.turns import Counts, plan_turns

TRUE = np.array([1.0, 1.01, 2.0])


def cycles(speed: np.ndarray, noise: float) -> np.ndarray:
    """Passes ``[methods, cycles, 2]`` of three methods, at the speed of each cycle."""
    draw = np.random.default_rng(0)
    exact = TRUE[:, None, None] / speed[None, :, None]
    return exact * np.exp(noise * draw.standard_normal((*exact.shape[:2], 2)))


def test_a_speed_that_changes_between_cycles_does_not_blur_how_methods_stand():
    speed = np.exp(0.05 * np.random.default_rng(1).standard_normal(25))
    times, errors = compare_in_cycles(cycles(speed, 0.0))
    np.testing.assert_allclose(times, TRUE / np.median(speed), rtol=1e-12)
    np.testing.assert_allclose(errors, 0.0, atol=1e-12)


def test_errors_tell_how_far_ratios_may_be_off():
    speed = np.where(np.arange(400) % 40 < 20, 1.0, 0.95)
    times, errors = compare_in_cycles(cycles(speed, 0.01))
    ratio, error = times[0] / times[1], np.hypot(errors[0] / times[0], errors[1] / times[1])
    assert abs(ratio / (TRUE[0] / TRUE[1]) - 1) < 3 * error
    assert error < 0.001


def test_of_one_method_alone_the_passes_count():
    times, errors = compare_in_cycles(np.array([1.0, 4.0, 2.0, 3.0, 9.0]).reshape(1, 5, 1))
    assert times == pytest.approx([3.0])
    assert errors == pytest.approx([0.929 / 5**0.5 * 2.0])


def test_turns_are_as_long_for_all_methods():
    # Means of 10 ms and of 50 ms: about 0.1 s that are not timed, and 0.2 s that are.
    first = np.array([[0.008, 0.03], [0.012, 0.07]])
    of_turn = Counts(10, 20), Counts(2, 4)
    cycle = 30 * 0.02 + 6 * 0.1
    assert plan_turns(first, 4, 0.0) == (of_turn, 2)
    assert plan_turns(first, 41, 0.0) == (of_turn, 11)
    assert plan_turns(first, 4, 5.5 * cycle) == (of_turn, 5)
    assert plan_turns(np.array([[0.5, 2.0], [0.5, 2.0]]), 4, 0.0) == ((Counts(1, 2), Counts(1, 2)), 2)


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
        taken = sum(getattr(each, name) for each in times)
        assert taken == pytest.approx(sum(getattr(each, name) for each in by_time))


def test_passes_of_a_kind_come_in_a_row(processor):
    """A pass takes longer after one of another method or kind, which is not to be seen."""
    last: list[object] = []

    def work(method: str, kind: str, seconds: float):
        def run(*_: object) -> str:
            processor.seconds += seconds if last == [method, kind] else 10.0
            last[:] = [method, kind]
            return method

        return run

    methods = [(work(name, "f", 0.1), work(name, "b", 0.3)) for name in ("one", "other")]
    for of_method in methods:  # not cold
        for run in of_method:
            run()
    last[:] = []
    found = time_in_turns(methods, torch.device("cpu"), 0, 6)
    assert [each.forward for each in found] == pytest.approx([0.1, 0.1])
    assert [each.backward for each in found] == pytest.approx([0.3, 0.3])


def test_the_backward_passes_of_a_turn_have_the_last_result(processor):
    results, work = iter(range(1000)), processor.work(1e8, 1e9)
    had: list[int] = []

    def forward() -> int:
        work()
        return next(results)

    def backward(result: int) -> None:
        work()
        had.append(result)

    time_in_turns([(forward, backward), (work, work)], torch.device("cpu"), 1, 2)
    assert had[0] == 0
    assert len(set(had)) < len(had)
    assert sorted(had) == had


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
