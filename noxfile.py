# SPDX-License-Identifier: Apache-2.0
"""The workspace's commands, each written once: ``nox -l`` lists them, ``nox -s NAME -- ARGUMENTS`` runs one.

Under pixi the sessions run in the environment that pixi made (pixi.toml sets ``NOX_DEFAULT_VENV_BACKEND=none``);
elsewhere nox makes a virtual environment for each and keeps it for the next time.
"""

from collections.abc import Sequence
from pathlib import Path

import nox

nox.options.sessions = ["lint", "test"]
nox.options.reuse_venv = "yes"
nox.options.default_venv_backend = "virtualenv"  # whose pip reads the constraints below; uv would not
nox.options.error_on_external_run = True

ROOT = Path(__file__).parent
PACKAGES = ("magi-core", "kernels-hopper", "kernels-blackwell", "comm-grpcoll")
LINTERS = ("import-linter", "mypy", "ruff")
BENCHMARKS = ("import_time", "planner")
DOCUMENTATION_TOOLS = ("furo", "myst-parser", "sphinx")
SUITES: dict[str, tuple[str, ...]] = {
    "core": (),
    "distributed": (),
    "workspace": (
        "build",
        "hatchling",
        "jsonschema",
        "nox",
        "nvidia-nvshmem-cu13",
        "packaging",
        "py-rattler",
        "validate-pyproject",
        "validate-pyproject-schema-store",
    ),
    "hopper": ("-e", "packages/kernels-hopper[test]"),
    "blackwell": ("-e", "packages/kernels-blackwell[test]"),
    "comm": ("-e", "packages/comm-grpcoll[test]"),
    "integrations": ("accelerate>=1.1", "megatron-core>=0.16", "transformers>=5"),
}
DEFAULT_SUITES = ("core", "distributed", "workspace")
PLUGIN_SUITES = ("hopper", "blackwell", "comm")
PARALLEL = ("--numprocesses=2", "--dist=loadfile")  # few: tests start ranks; a file's tests share what they prepare


def install(session: nox.Session, *requirements: str) -> None:
    """Install into the session's own environment; one that pixi made holds everything already."""
    if session.virtualenv.venv_backend != "none":
        # A URL, since pip splits this variable at blanks.
        session.env["PIP_CONSTRAINT"] = (ROOT / ".ci" / "constraints.txt").as_uri()
        session.install(*requirements)


def run_suites(session: nox.Session, suites: Sequence[str]) -> None:
    """Install what ``suites`` need, the core before what requires it, and run them under one pytest."""
    if unknown := sorted(set(suites) - set(SUITES)):
        session.error(f"unknown test suites {unknown}; known are {sorted(SUITES)}")
    install(session, "-e", "packages/magi-core[test]", *(need for suite in suites for need in SUITES[suite]))
    session.run("pytest", *PARALLEL, *(f"tests/{suite}" for suite in suites))


@nox.session
def demo(session: nox.Session) -> None:
    """Train a small Llama on one and on four processes; arguments after `--` go to `magi demo`."""
    install(session, "-e", "packages/magi-core[cli]")
    session.run("magi", "demo", *session.posargs)


@nox.session
def test(session: nox.Session) -> None:
    """Run the suites named after `--`, by default core, distributed, workspace; see SUITES."""
    run_suites(session, session.posargs or DEFAULT_SUITES)


@nox.session
def compile_kernels(session: nox.Session) -> None:
    """Compile all kernels of kernels-blackwell, without a GPU, check their code and write docs/compiled-kernels.md."""
    install(session, "-e", "packages/magi-core[test]", *SUITES["blackwell"])
    session.run("python", "-m", "tests.blackwell.matrix", "docs/compiled-kernels.md")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting, types and layers."""
    install(session, "-e", "packages/magi-core[test]", "nox", *LINTERS)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    session.run("lint-imports")


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheels of the packages named after `--` (by default: all) into dist/PACKAGE."""
    build_wheels(session, session.posargs or PACKAGES)


def build_wheels(session: nox.Session, packages: Sequence[str]) -> None:
    """Build one wheel for each of ``packages``, folders below packages/."""
    if unknown := sorted(set(packages) - set(PACKAGES)):
        session.error(f"unknown packages {unknown}; known are {sorted(PACKAGES)}")
    install(session, "build")
    for package in packages:
        session.run("python", "-m", "build", "--wheel", "--outdir", f"dist/{package}", f"packages/{package}")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into docs/_build/html; a warning is an error."""
    install(session, "-e", "packages/magi-core[cli]", *DOCUMENTATION_TOOLS)
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")


@nox.session
def bench(session: nox.Session) -> None:
    """Run the scripts of benchmarks/ named after `--`, without `.py` (by default: import_time and planner)."""
    install(session, "-e", "packages/magi-core[cli]")
    for script in session.posargs or BENCHMARKS:
        session.run("python", f"benchmarks/{script}.py")


@nox.session
def ci(session: nox.Session) -> None:
    """Do all that `test` leaves out, in one environment: lint, the plug-ins' suites, wheels, docs and a short demo."""
    lint(session)
    run_suites(session, PLUGIN_SUITES)
    build_wheels(session, PACKAGES)
    docs(session)
    session.run("magi", "demo", "--steps", "3")
