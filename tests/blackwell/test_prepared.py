# SPDX-License-Identifier: Apache-2.0
"""Launches that skip the projects' Python code, with stand-ins for their functions. Needs none of the wheels."""

from threading import Thread
from types import SimpleNamespace

import pytest
import torch

from magi_kernels_blackwell.prepared import (
    Launch,
    PreparedBackward,
    PreparedForward,
    check_sums,
    direct,
    layout_of,
    watched,
)


class Project:
    """A function that keeps compiled kernels as the projects do, and kernels that note what they get."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple]] = []
        self.compiled = 0
        self.compile_cache: dict[str, object] = {}

    def __call__(self, name: str, *arguments: object) -> None:
        if name not in self.compile_cache:
            self.compiled += 1
            self.compile_cache[name] = lambda *given: self.calls.append((name, given))
        self.compile_cache[name](*arguments)


def test_watched_functions_compile_but_do_not_launch():
    project, other = Project(), Project()
    project("known", 0)
    with watched(project, other) as (launches, of_other):
        project("known", 1, 2)
        project("new", 3)
    assert [launch.arguments for launch in launches] == [(1, 2), (3,)]
    assert not of_other
    assert (project.compiled, len(project.calls)) == (2, 1)
    launches[1].kernel("later")
    project("new", 4)
    assert project.calls[1:] == [("new", ("later",)), ("new", (4,))]


def test_watching_ends_with_an_error_and_leaves_other_threads_alone():
    project = Project()

    def fail() -> None:
        with watched(project) as (launches,):
            thread = Thread(target=project, args=("elsewhere", 1))
            thread.start()
            thread.join()
            assert project.calls == [("elsewhere", (1,))]
            assert not launches
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert project.compile_cache.keys() == {"elsewhere"}


def test_a_freshly_compiled_kernel_is_called_without_its_wrapper():
    class Wrapper:
        def __tvm_ffi_object__(self):
            return print

    assert direct(Wrapper()) is print
    assert direct(len) is len


def test_forward_keeps_what_follows_the_scale():
    prepared = PreparedForward.of_launch(Launch(print, ("q", "k", "v", "out", "lse", 0.5, "table", None)), scale_at=5)
    assert prepared[:2] == (print, ("table", None))


def test_launches_tell_the_allocator_of_their_streams(monkeypatch):
    """Before every launch, and of every table; of what each call has of its own, nothing."""
    recorded: list[tuple[torch.Tensor, int]] = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda table, stream: recorded.append(table))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    x, semaphore, tables = torch.zeros(2, 2), torch.zeros(3), [torch.zeros(1) for _ in range(3)]
    forward = PreparedForward.of_launch(Launch(print, (x, x, x, x, x, 0.5, (tables[0], None))), scale_at=5)
    forward.streams.add_current()
    assert recorded == [tables[0]]
    recorded.clear()
    before, main = (x, x, x, x, x, None, x, tables[1]), (*[x] * 9, 0.5, semaphore, [tables[2]])
    ignore = Launch(lambda *arguments: None, ())
    prepared = PreparedBackward(
        ignore._replace(arguments=before), ignore._replace(arguments=main), [], dlse_at=6, semaphores_at=(10,)
    )
    for _ in range(2):
        prepared((x,) * 5, x, None, (x,) * 3, 0.5)
    assert len(recorded) == 2
    assert recorded[0] is tables[1]
    assert recorded[1] is tables[2]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("with_dlse", [False, True])
def test_backward_passes_tensors_and_fresh_buffers(grouped, with_dlse):
    """Every buffer has the noted shape; sums of dk and dv and semaphores begin as zeros; tables stay what they were."""
    calls: list[tuple] = []

    def kernel(name):
        return lambda *arguments: calls.append((name, *arguments))

    def floats(*shape):
        return torch.full(shape, torch.nan)

    lse, dlse = floats(4, 6), floats(4, 6)
    stats, dq_sum, sums = [floats(4, 8), floats(4, 8)], floats(4, 16), [floats(2, 12), floats(2, 14)]
    semaphore = torch.ones(3, dtype=torch.int32)
    old = {name: floats(2) for name in ("dout", "q", "k", "v", "out", "dq", "dk", "dv")}
    dpsum, lse2 = stats
    dlse_place = dlse if with_dlse else None
    before = (old["out"], old["dout"], dpsum, lse, lse2, dq_sum, "cu", dlse_place, 7)
    of_keys = sums if grouped else [old["dk"], old["dv"]]
    main = (old["q"], old["k"], old["v"], old["dout"], lse2, dpsum, dq_sum, *of_keys, 0.1, semaphore, None, "table")
    after = [(dq_sum, old["dq"], 0.1, "x"), (sums[0], old["dk"], 0.1, "y"), (sums[1], old["dv"], 1.0, "z")]
    prepared = PreparedBackward(
        Launch(kernel("before"), before),
        Launch(kernel("main"), main),
        [Launch(kernel("after"), each) for each in after[: 3 if grouped else 1]],
        dlse_at=7,
        semaphores_at=(10, 11),
    )
    new = {name: floats(2) for name in old}
    gradients = (new["dq"], new["dk"], new["dv"])
    tensors = (new["dout"], new["q"], new["k"], new["v"], new["out"])
    new_lse, new_dlse = floats(4, 6), floats(4, 6) if with_dlse else None
    for _ in range(2):
        calls.clear()
        prepared(tensors, new_lse, new_dlse, gradients, 0.25, kernel("keys are done"))
        (_, out, dout, dpsum, lse_, lse2, dq_sum_, cu, dlse_, seven), (_, *at), *rounded = calls
        assert out is new["out"]
        assert dout is new["dout"]
        assert (lse_ is new_lse, dlse_ is new_dlse, cu, seven) == (True, True, "cu", 7)
        assert dpsum.shape == lse2.shape == (4, 8)
        assert dq_sum_.shape == (4, 16)
        assert all(a is b for a, b in zip(at[:7], (*tensors[1:4], dout, lse2, dpsum, dq_sum_), strict=True))
        assert (at[9], at[11], at[12]) == (0.25, None, "table")
        assert at[10].dtype == torch.int32
        assert at[10].tolist() == [0, 0, 0]
        if grouped:
            assert (at[7].shape, at[8].shape) == ((2, 12), (2, 14))
            assert not at[7].any()
            assert not at[8].any()
        else:
            assert at[7] is new["dk"]
            assert at[8] is new["dv"]
        of_keys = [(at[7], new["dk"], 0.25, "y"), (at[8], new["dv"], 1.0, "z")] if grouped else []
        expected = [*of_keys, (), (dq_sum_, new["dq"], 0.25, "x")]
        for (_, *given), wanted in zip(rounded, expected, strict=True):
            assert all(a is b or a == b for a, b in zip(given, wanted, strict=True))


@pytest.mark.parametrize("num_noted", [0, 1, 2, 3])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_sum_that_nothing_rounds_is_an_error(grouped, num_noted):
    half, sum_of = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)
    main = Launch(print, (*[half] * 4, sum_of, sum_of, sum_of, *[sum_of if grouped else half] * 2, 0.5))
    after = [Launch(print, ())] * num_noted
    if num_noted == (3 if grouped else 1):
        check_sums(main, after, [half] * 3)
    else:
        with pytest.raises(RuntimeError, match="launches otherwise"):
            check_sums(main, after, [half] * 3)


def test_layouts_tell_shapes_strides_and_dtypes_apart():
    x = torch.zeros(4, 6)
    others = [torch.zeros(4, 7), torch.zeros(6, 4).T, x.half(), torch.zeros(1, 6).expand(4, 6)]
    assert layout_of(x) == layout_of(torch.ones(4, 6))
    assert all(layout_of(x) != layout_of(other) for other in others)
