# SPDX-License-Identifier: Apache-2.0
"""The four packages agree with each other, and their wheels hold what they must."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from email.message import Message
from email.parser import Parser
from importlib.metadata import distribution, distributions
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.version import Version
from validate_pyproject.api import Validator

ROOT = Path(__file__).parents[2]
Project = dict[str, Any]

FILES = {path.parent.name: path for path in sorted(ROOT.glob("packages/*/pyproject.toml"))}
PROJECTS: dict[str, Project] = {name: tomllib.loads(path.read_text())["project"] for name, path in FILES.items()}
CORE = PROJECTS["magi-core"]
PLUGINS = {name: project for name, project in PROJECTS.items() if project is not CORE}
EXTRAS = {"hopper": "kernels-hopper", "blackwell": "kernels-blackwell", "comm": "comm-grpcoll"}

# Builds without isolation need the build's requirements here.
HAS_NVSHMEM = any(each.name == "nvidia-nvshmem-cu13" for each in distributions())
COMPILES_GRPCOLL = HAS_NVSHMEM and shutil.which("nvcc") is not None

# Loads what the wheel on the path announces and asks it what it can do.
ASK_PLUGIN = """
import sys
from importlib.metadata import distribution, distributions

import torch

points = distribution(sys.argv[1]).entry_points
assert points
for point in points:
    loaded = point.load()
    assert loaded.name == point.name, (loaded.name, point.name)
    request = torch.device("cpu")
    if point.group == "magi_attention.kernels":
        from magi_attention.kernels.protocol import AttentionRequest, KernelBackend

        assert isinstance(loaded, KernelBackend)
        request = AttentionRequest(torch.device("cpu"), torch.float32, 2, 1, 16, 16)
    support = loaded.supports(request)
    assert not support and support.reason, support
"""


@pytest.fixture(scope="module")
def validate() -> Validator:
    """One for all, since it takes seconds to load the schemas."""
    return Validator()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel of each package."""
    built = {}
    without_compiler = {} if shutil.which("nvcc") else {"MAGI_HOPPER_NO_KERNELS": "1"}
    without_compiler |= {} if COMPILES_GRPCOLL else {"MAGI_GRPCOLL_NO_KERNELS": "1"}
    for name, path in FILES.items():
        target = tmp_path_factory.mktemp(name)
        command = ["-m", "build", "--wheel", "--no-isolation", "--outdir", target, path.parent]
        environment = {**os.environ, **without_compiler}
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        (built[name],) = target.iterdir()
    return built


def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.mark.parametrize("path", [ROOT / "pyproject.toml", *FILES.values()], ids=lambda path: path.parent.name)
def test_pyproject_is_valid(path: Path, validate: Validator) -> None:
    content = tomllib.loads(path.read_text())
    assert validate(content) == content


def test_root_holds_tool_settings_only() -> None:
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())) == {"tool"}


@pytest.mark.parametrize("project", PROJECTS.values(), ids=PROJECTS)
def test_metadata_agrees(project: Project) -> None:
    assert Version(project["version"])
    assert "dynamic" not in project
    # One wheel has object code of NVSHMEM in it.
    also = " AND LicenseRef-NVIDIA-Proprietary" if project["name"] == "magi-comm-grpcoll" else ""
    assert project["license"] == CORE["license"] + also == "Apache-2.0" + also
    assert project["requires-python"] == CORE["requires-python"]


@pytest.mark.parametrize("project", PLUGINS.values(), ids=PLUGINS)
def test_plugin_requires_the_core_within_bounds(project: Project) -> None:
    (core,) = (need for need in map(Requirement, project["dependencies"]) if need.name == CORE["name"])
    assert core.specifier.contains(CORE["version"])
    assert "<" in {bound.operator for bound in core.specifier}


@pytest.mark.parametrize("project", PLUGINS.values(), ids=PLUGINS)
def test_cuda_projects_are_required_within_bounds(project: Project) -> None:
    """Their calls take other arguments with a new major version of CUDA."""
    needs = [need for need in map(Requirement, project["dependencies"]) if need.name.startswith("cuda-")]
    assert all("<" in {bound.operator for bound in need.specifier} for need in needs)


def test_core_names_plugins_only_in_their_extras() -> None:
    own = {project["name"] for project in PROJECTS.values()}
    assert not {Requirement(need).name for need in CORE["dependencies"]} & own
    for extra, needs in CORE["optional-dependencies"].items():
        siblings = {need for need in map(Requirement, needs) if need.name in own and need.name != CORE["name"]}
        if extra not in EXTRAS:
            assert not siblings
            continue
        (sibling,) = siblings
        plugin = PROJECTS[EXTRAS[extra]]
        assert sibling.name == plugin["name"]
        assert sibling.specifier.contains(plugin["version"])
        assert "<" in {bound.operator for bound in sibling.specifier}
    (everything,) = map(Requirement, CORE["optional-dependencies"]["all"])
    assert everything.extras >= set(EXTRAS)


def test_containers_that_keep_their_torch_get_what_the_extras_name() -> None:
    """Where the core is installed without its dependencies, the page on installation names those of its extras."""
    page = (ROOT / "docs" / "installation.md").read_text()
    commands = [set(map(Requirement, shlex.split(text))) for text in re.findall(r"pip install (\"typer[^`\n]*)", page)]
    extras = CORE["optional-dependencies"]
    cli, test = (set(map(Requirement, extras[name])) for name in ("cli", "test"))
    assert commands == [cli, cli | {Requirement("nox")} | test - {Requirement("magi-attention[cli]")}]


def test_entry_points_of_the_core_load() -> None:
    points = distribution(CORE["name"]).entry_points
    announced = {(group, name) for group, names in CORE["entry-points"].items() for name in names}
    announced |= {("console_scripts", name) for name in CORE["scripts"]}
    assert announced == {(point.group, point.name) for point in points}
    assert all(callable(point.load()) or point.load().name == point.name for point in points)


@pytest.mark.parametrize("package", PLUGINS)
def test_wheel_of_a_plugin_announces_what_it_can_do(package: str, wheels: dict[str, Path], tmp_path: Path) -> None:
    with ZipFile(wheels[package]) as archive:
        archive.extractall(tmp_path)
    ask = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{ASK_PLUGIN}"]
    done = subprocess.run([*ask, PLUGINS[package]["name"]], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("package", PROJECTS)
def test_wheel_holds_the_package_and_its_license(package: str, wheels: dict[str, Path]) -> None:
    source = FILES[package].parent / "src"
    expected = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    for data in ("py.typed", "*.html", *(["*.cubin"] if shutil.which("nvcc") else [])):
        expected |= {str(path.relative_to(source)) for path in source.rglob(data)}
    if package == "comm-grpcoll" and COMPILES_GRPCOLL:
        sources = FILES[package].parent.glob("csrc/*.cu")
        expected |= {f"magi_comm_grpcoll/_kernels/{path.stem}.fatbin" for path in sources}
    assert expected
    with ZipFile(wheels[package]) as archive:
        names = set(archive.namelist())
        (license,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(license) == (ROOT / "LICENSE").read_bytes()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("/py.typed") for name in names)
    assert "Typing :: Typed" in PROJECTS[package]["classifiers"]


@pytest.mark.parametrize("package", PROJECTS)
def test_wheel_made_of_an_sdist_holds_the_same(package: str, wheels: dict[str, Path], tmp_path: Path) -> None:
    """As `python -m build` makes it, outside of the repository; kernels aside, which would have to be compiled."""
    environment = {**os.environ, "MAGI_HOPPER_NO_KERNELS": "1", "MAGI_GRPCOLL_NO_KERNELS": "1"}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, FILES[package].parent]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as ours, ZipFile(wheels[package]) as direct:
        kernels = {name for name in direct.namelist() if name.endswith((".cubin", ".fatbin"))}
        assert set(ours.namelist()) == set(direct.namelist()) - kernels


@pytest.mark.parametrize(
    ("setting", "package", "module", "kernel"),
    [
        ("MAGI_HOPPER_NO_KERNELS", "kernels-hopper", "magi_kernels_hopper/variants.py", "cubin/forward_d64_bf16.cubin"),
        ("MAGI_GRPCOLL_NO_KERNELS", "comm-grpcoll", "magi_comm_grpcoll/kernels.py", "_kernels/put.fatbin"),
    ],
)
def test_a_wheel_without_kernels_has_none_that_were_compiled_before(
    setting: str, package: str, module: str, kernel: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / package
    compiled = (source / "src" / module).parent / kernel
    shutil.copytree(FILES[package].parent, source, ignore=shutil.ignore_patterns(compiled.parent.name))
    compiled.parent.mkdir()
    compiled.touch()
    monkeypatch.setenv(setting, "1")
    (wheel,) = WheelBuilder(str(source)).build(directory=str(tmp_path))
    with ZipFile(wheel) as opened:
        names = opened.namelist()
    assert module in names
    assert not any(name.endswith(compiled.suffix) for name in names)


@pytest.mark.parametrize("package", PROJECTS)
def test_wheel_says_what_pyproject_says(package: str, wheels: dict[str, Path]) -> None:
    found, project = metadata(wheels[package]), PROJECTS[package]
    assert (found["Name"], found["Version"]) == (project["name"], project["version"])
    assert found["License-Expression"] == project["license"]
    plain = {Requirement(need) for need in found.get_all("Requires-Dist") if "extra ==" not in need}
    assert plain == set(map(Requirement, project["dependencies"]))
    assert found.get_payload().strip() == (FILES[package].parent / "README.md").read_text().strip()
