# SPDX-License-Identifier: Apache-2.0
"""The script that prepares hosts for IBGDA changes nothing unless asked, and the same thing only once."""

import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "enable_ibgda_on_host.sh"
LINE = 'options nvidia NVreg_EnableStreamMemOPs=1 NVreg_RegistryDwords="PeerMappingOverride=1;"\n'


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**path, **environment})


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "etc" / "modprobe.d").mkdir(parents=True)
    return tmp_path


def settings(image: Path) -> Path:
    return image / "etc" / "modprobe.d" / "magi-ibgda.conf"


def test_it_shows_what_it_would_do_and_does_nothing(image):
    done = run("--root", image)
    assert done.returncode == 0, done.stderr
    assert "not written" in done.stdout
    assert f"would write to it: {LINE}" in done.stdout
    assert not list(settings(image).parent.iterdir())


def test_it_writes_once_and_takes_back(image):
    first = run("--apply", "--root", image)
    assert first.returncode == 0, first.stderr
    assert "wrote" in first.stdout
    assert settings(image).read_text().endswith(LINE)
    assert "nothing to do" in run("--root", image, "--apply").stdout
    assert "magi-ibgda.conf: written" in run("--root", image).stdout
    assert [path.name for path in settings(image).parent.iterdir()] == ["magi-ibgda.conf"]
    assert "removed" in run("--remove", "--root", image).stdout
    assert "nothing to do" in run("--remove", "--root", image).stdout
    assert not settings(image).exists()


@pytest.mark.parametrize("gap", [" ", " \\\n  ", " NVreg_Mobile=1 \\\n\\\n"], ids=["one line", "two", "three"])
def test_it_leaves_other_settings_alone(image, gap):
    other = settings(image).with_name("nvidia.conf")
    other.write_text(f'# of the vendor\noptions nvidia{gap}NVreg_RegistryDwords="Other=1;"\n')
    done = run("--apply", "--root", image)
    assert done.returncode == 1
    assert "nvidia.conf sets the same options: join them by hand" in done.stderr
    assert not settings(image).exists()


@pytest.mark.parametrize("place", ["etc", "run", "usr/local/lib", "usr/lib"])
def test_it_sees_other_settings_wherever_modprobe_reads_them(tmp_path, place):
    image = tmp_path / "an image"
    for folder in ("etc", place):
        (image / folder / "modprobe.d").mkdir(parents=True, exist_ok=True)
    other = image / place / "modprobe.d" / "nvidia.conf"
    other.write_text('options nvidia NVreg_RegistryDwords="Other=1;"\n')
    shown = run("--root", image).stdout
    assert f"{other} sets the same options\n--apply would refuse: join them by hand" in shown
    assert "would write" not in shown
    assert run("--apply", "--root", image).returncode == 1
    assert not settings(image).exists()


def test_it_sees_beforehand_that_the_folder_is_missing(tmp_path):
    shown = run("--root", tmp_path).stdout
    assert f"--apply would refuse: {settings(tmp_path).parent} is not there" in shown
    assert "would write" not in shown
    assert run("--root", tmp_path, "--apply").returncode == 1


def test_it_says_how_to_go_on_where_the_initramfs_is_not_rebuilt(tmp_path):
    tool = tmp_path / "update-initramfs"
    tool.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    tool.chmod(0o755)
    functions = re.findall(r"^(?:fail|rebuild_\w+)\(\) \{\n.*?^\}\n", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    program = "set -euo pipefail\nroot=\n" + "".join(functions) + "rebuild_initramfs\n"
    path = {"PATH": f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin"}
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, env=path)
    assert done.returncode == 1
    assert "no space left\nerror: the initramfs is still the old one" in done.stderr
    assert "then run update-initramfs -u" in done.stderr
    assert "reboot" not in done.stdout


def test_it_refuses_containers_and_unknown_arguments():
    inside = run("--apply", container="podman")
    assert inside.returncode == 1
    assert "this is a container: run it on the host" in inside.stderr
    assert run("--force").returncode == 2
    assert "--apply" in run("--help").stdout
