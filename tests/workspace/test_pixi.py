# SPDX-License-Identifier: Apache-2.0
"""Does pixi.toml say what it means? All that can be known of it without pixi and a conda channel."""

import json
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from packaging.requirements import Requirement
from rattler import MatchSpec

ROOT = Path(__file__).parents[2]
DEPRECATED = {"project", "system-requirements", "depends_on"}
Table = dict[str, Any]

PIXI: Table = tomllib.loads((ROOT / "pixi.toml").read_text())
NOXFILE = runpy.run_path(str(ROOT / "noxfile.py"))


def environments() -> dict[str, list[Table]]:
    """The tables that make up each environment, its own content last."""
    made = {}
    for name, body in {"default": {}, **PIXI["environments"]}.items():
        table = {"features": body} if isinstance(body, list) else body
        base = [] if table.get("no-default-feature") else [PIXI]
        made[name] = [*base, *(PIXI["feature"][feature] for feature in table.get("features", [])), table]
    return made


ENVIRONMENTS = environments()


def merged(environment: str, key: str) -> Table:
    tables = (table.get(key, {}) for table in ENVIRONMENTS[environment])
    return {name: value for table in tables for name, value in table.items()}


def tasks(environment: str) -> dict[str, Table]:
    return {
        name: {"cmd": task} if isinstance(task, str) else task for name, task in merged(environment, "tasks").items()
    }


TASKS = [
    pytest.param(environment, task, id=f"{environment}-{name}")
    for environment in ENVIRONMENTS
    for name, task in tasks(environment).items()
]


def keys(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from keys(inner)


def nox_sessions(environment: str) -> Iterator[tuple[str, list[str]]]:
    """The sessions that an environment's own tasks call, each with its arguments."""
    for name, task in tasks(environment).items():
        if command := task.get("cmd"):
            match = re.fullmatch(r"nox -s (\w+)(?: -- (.+))?", command)
            assert match, f"task {name}: {command!r} is no nox session"
            yield match[1], (match[2] or "").split()


def test_official_schema() -> None:
    schema = json.loads((files("validate_pyproject_schema_store.resources") / "pixi.schema.json").read_text())
    assert [f"{error.json_path}: {error.message}" for error in Draft7Validator(schema).iter_errors(PIXI)] == []


def test_no_deprecated_key() -> None:
    assert not DEPRECATED & set(keys(PIXI))


def test_every_feature_is_used() -> None:
    bodies = PIXI["environments"].values()
    used = {feature for body in bodies for feature in (body if isinstance(body, list) else body.get("features", []))}
    assert used == set(PIXI["feature"])


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_platforms_and_requirements(environment: str) -> None:
    known = {platform if isinstance(platform, str) else platform["name"] for platform in PIXI["workspace"]["platforms"]}
    assert {platform for table in ENVIRONMENTS[environment] for platform in table.get("platforms", [])} <= known
    for name, spec in merged(environment, "dependencies").items():
        MatchSpec(f"{name} {spec}", strict=True)
    for name, spec in merged(environment, "pypi-dependencies").items():
        table = {"version": spec} if isinstance(spec, str) else spec
        if "path" in table:
            project = tomllib.loads((ROOT / table["path"] / "pyproject.toml").read_text())["project"]
            assert project["name"] == name
            assert set(table.get("extras", [])) <= set(project.get("optional-dependencies", {}))
        else:
            Requirement(name + table["version"].replace("*", ""))


@pytest.mark.parametrize(("environment", "task"), TASKS)
def test_task_refers_to_what_exists(environment: str, task: Table) -> None:
    arguments = {argument if isinstance(argument, str) else argument["arg"] for argument in task.get("args", [])}
    templates = json.dumps([task.get("cmd"), task.get("inputs"), task.get("outputs")])
    assert set(re.findall(r"{{\s*(\w+)", templates)) <= arguments | {"pixi"}
    assert task.get("default-environment", environment) in ENVIRONMENTS
    for need in task.get("depends-on", []):
        table = {"task": need} if isinstance(need, str) else need
        assert table["task"] in tasks(table.get("environment", environment))


def test_documentation_is_made_again_when_what_it_shows_has_changed() -> None:
    inputs = PIXI["environments"]["docs"]["tasks"]["docs"]["inputs"]
    seen = {path for pattern in inputs for path in ROOT.glob(pattern)}
    pages = ROOT.glob("docs/**/*.md")
    shown = {
        (page.parent / name).resolve()
        for page in pages
        for name in re.findall(r"{literalinclude} (\S+)", page.read_text())
    }
    assert shown
    assert shown <= seen


def test_every_task_is_a_nox_session() -> None:
    called = {session for environment in ENVIRONMENTS for session, _ in nox_sessions(environment)}
    nox = [sys.executable, "-m", "nox", "-f", str(ROOT / "noxfile.py")]
    listed = subprocess.run([*nox, "-l", "--json", "-s", *called], capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    assert {session["name"] for session in json.loads(listed.stdout)} == called


def test_tasks_name_suites_and_packages_of_the_noxfile() -> None:
    calls = [call for environment in ENVIRONMENTS for call in nox_sessions(environment)]
    suites = {suite for session, arguments in calls if session == "test" for suite in arguments}
    assert suites == set(NOXFILE["SUITES"])
    assert all((ROOT / "tests" / suite).is_dir() for suite in suites)
    (argument,) = PIXI["environments"]["build"]["tasks"]["_wheel"]["args"]
    assert argument["choices"] == list(NOXFILE["PACKAGES"])
    assert set(NOXFILE["PACKAGES"]) == {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")}


def needs(session: str, arguments: list[str]) -> set[str]:
    """The packages that a session installs beside the workspace's own, where pixi's environment doesn't hold them."""
    tools = {"lint": NOXFILE["LINTERS"], "docs": NOXFILE["DOCUMENTATION_TOOLS"]}.get(session, ())
    named = {"test": arguments, "compile_kernels": ["blackwell"]}.get(session, [])
    suites = [NOXFILE["SUITES"][suite] for suite in named]
    names = {name for names in (tools, *suites) for name in names if name != "-e"}
    return {
        tomllib.loads((ROOT / name / "pyproject.toml").read_text())["project"]["name"]
        if "/" in name
        else Requirement(name).name
        for name in (name.partition("[")[0] for name in names)
    }


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_environment_holds_what_its_own_tasks_install_elsewhere(environment: str) -> None:
    for session, arguments in nox_sessions(environment):
        held = {*merged(environment, "dependencies"), *merged(environment, "pypi-dependencies")}
        assert needs(session, arguments) <= held


def test_integrations_need_the_same_versions_everywhere() -> None:
    requirements = map(Requirement, NOXFILE["SUITES"]["integrations"])
    held = PIXI["environments"]["integrations"]["pypi-dependencies"]
    assert {each.name: str(each.specifier) for each in requirements} == held


def test_tools_have_the_versions_of_the_constraints() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = {pin.name: str(pin.specifier) for pin in map(Requirement, filter(re.compile(r"\w").match, lines))}
    for environment in ENVIRONMENTS:
        for name, spec in merged(environment, "dependencies").items():
            assert pins.get(name, f"=={spec}") == f"=={spec}"
