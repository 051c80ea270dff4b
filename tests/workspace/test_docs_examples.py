# SPDX-License-Identifier: Apache-2.0
"""The Python blocks of the documentation that are marked ``<!-- run -->`` run, top to bottom, page by page.

A block marked ``<!-- run: torchrun -->`` is a program of its own. It runs on one and on two processes, which must print
the same losses.
"""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^<!-- (run[^>]*?) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, mark: str) -> list[str]:
    """The blocks of a page with a mark, each behind empty lines, so that errors name the lines of the page."""
    text = (DOCS / page).read_text()
    return ["\n" * text.count("\n", 0, found.start(2)) + found[2] for found in BLOCK.finditer(text) if found[1] == mark]


def run(*command: str | Path, folder: Path, **variables: str) -> str:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("MAGI_ATTENTION_")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", ["quickstart.md", "development.md", "concepts/index-attention.md"])
def test_blocks_run_in_order(page: str, tmp_path: Path) -> None:
    found = blocks(page, "run")
    assert found
    script = tmp_path / "page.py"
    script.write_text(
        "namespace = {}\n"
        + "".join(f"exec(compile({block!r}, {page!r}, 'exec'), namespace)\n" for block in found)
        + "print('ran', len(namespace) > 1)\n"
    )
    assert run(script, folder=tmp_path).endswith("ran True\n")


def test_training_script_gives_the_same_losses_on_one_and_two_processes(tmp_path: Path) -> None:
    (program,) = blocks("quickstart.md", "run: torchrun")
    (tmp_path / "train.py").write_text(program)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    outputs = [run("train.py", folder=tmp_path, **alone), run(*launcher, "train.py", folder=tmp_path)]
    losses = [[float(loss) for loss in re.findall(r"loss (\S+)", output)] for output in outputs]
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert losses[0][-1] < losses[0][0]


def test_every_python_block_is_marked_or_meant_to_be_read() -> None:
    """A new block of the quick start is run, unless somebody decides otherwise here."""
    text = (DOCS / "quickstart.md").read_text()
    assert text.count("```python\n") == len(BLOCK.findall(text))


@pytest.mark.parametrize(
    "module", ["api", "comm.primitive", "common", "config", "dist_attn_runtime_mgr", "functional", "meta", "utils"]
)
def test_api_reference_has_every_public_name(module: str) -> None:
    reference = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    names = import_module(f"magi_attention.{module}").__all__
    missing = [name for name in names if not re.search(rf"\b{name}\b", reference)]
    assert not missing


def test_tables_of_environment_variables_are_those_of_the_code(tmp_path: Path) -> None:
    page = DOCS / "environment.md"
    again = tmp_path / page.name
    again.write_text(page.read_text())
    run(DOCS / "environment_tables.py", again, folder=tmp_path)
    assert again.read_text() == page.read_text(), "python docs/environment_tables.py writes them"


def test_figure_is_drawn_from_a_plan(tmp_path: Path) -> None:
    run(DOCS / "figures.py", tmp_path / "idea.png", folder=tmp_path)
    assert (tmp_path / "idea.png").read_bytes().startswith(b"\x89PNG")
