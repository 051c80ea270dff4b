# SPDX-License-Identifier: Apache-2.0
"""What ``magi doctor`` says of transfers between hosts."""

import pytest

from magi_attention.cli.doctor.communication import communication_facts
from magi_comm_grpcoll.fabric import ibgda_fact


def test_the_doctor_tells_what_there_is_between_hosts():
    facts = communication_facts()
    assert facts["transport native, nvshmem"]
    assert facts["transport native, ibgda"]


@pytest.mark.parametrize(
    ("adapters", "parameters", "expected"),
    [
        (0, "", "no Mellanox network adapter is visible"),
        (2, None, "2 mlx5 network adapters; {driver} can't be read: No such file or directory"),
        (
            1,
            'EnableStreamMemOPs: 1\nRegistryDwords: ""\n',
            "1 mlx5 network adapters; the driver is loaded without PeerMappingOverride=1: see docs/ibgda.md",
        ),
        (
            8,
            'EnableStreamMemOPs: 1\nRegistryDwords: "PeerMappingOverride=1;"\n',
            "8 mlx5 network adapters, and the driver is loaded with the options for it",
        ),
    ],
)
def test_whether_a_host_is_ready_for_ibgda(tmp_path, adapters, parameters, expected):
    for number in range(adapters):
        (tmp_path / f"mlx5_{number}").mkdir()
    driver = tmp_path / "params"
    if parameters is not None:
        driver.write_text(parameters)
    assert ibgda_fact(tmp_path, driver) == expected.format(driver=driver)
