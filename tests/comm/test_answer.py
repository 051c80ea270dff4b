# SPDX-License-Identifier: Apache-2.0
"""The native transport, not implemented yet, says so wherever somebody could meet it."""

from importlib.metadata import entry_points

import pytest
import torch

from magi_attention.comm.registry import make_collectives
from magi_attention.config import DistAttnConfig, RuntimeConfig
from magi_comm_grpcoll import NativeCollectives

REASON = "native group collectives are not implemented yet: use 'alltoall'"


def test_transport_is_found_by_its_entry_point() -> None:
    (point,) = entry_points(group="magi_attention.comm", name="native")
    assert point.load() is NativeCollectives


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_supports_no_device_and_says_why(device: str) -> None:
    support = NativeCollectives.supports(torch.device(device))
    assert not support
    assert REASON in support.reason


def test_asking_for_it_by_configuration_gives_the_reason() -> None:
    config = DistAttnConfig(runtime_config=RuntimeConfig(native_grpcoll=True))
    with pytest.raises(RuntimeError, match=REASON):
        make_collectives(None, None, config)


def test_making_it_gives_the_reason() -> None:
    with pytest.raises(RuntimeError, match=REASON):
        NativeCollectives(None)
