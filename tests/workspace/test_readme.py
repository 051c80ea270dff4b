# SPDX-License-Identifier: Apache-2.0
"""The usage example of README.md runs as it stands, and stays short."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def example() -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return block


def test_example_runs_in_one_process(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example() + CHECK)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("checked\n")


def test_example_has_at_most_25_lines() -> None:
    assert len(example().splitlines()) <= 25


def test_figures_are_those_of_the_command_below_them() -> None:
    text = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"`magi (plan .*?)`", text)
    done = subprocess.run(
        [sys.executable, "-m", "magi_attention.cli", *command.split(), "--json"],
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
    )
    found = json.loads(done.stdout)
    for name, figures in (("all-gather or ring", found["compared"]["ring"]), ("MagiAttention", found["plan"])):
        million, imbalance = figures["rows_received"] / 1e6, figures["imbalance"]
        assert re.search(rf"^\| {name}.* \| {million:.1f} million \| {imbalance:.2f} \|$", text, re.MULTILINE)
    assert found["compared"]["all_gather"] == found["compared"]["ring"]


# The same attention, written without this package: each document by itself.
CHECK = """
expected = []
qg, kg, vg = project(x).view(total, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
for document in documents:
    rows = slice(document.start, document.end)
    qd, kd, vd = (t[rows].transpose(0, 1) for t in (qg, kg, vg))
    attended = torch.nn.functional.scaled_dot_product_attention(qd, kd, vd, is_causal=True, enable_gqa=True)
    expected.append(attended.transpose(0, 1))
torch.testing.assert_close(y, torch.cat(expected), rtol=1e-4, atol=1e-5)
assert y.dtype == torch.float32
gradient = project.weight.grad.clone()
project.zero_grad()
torch.cat(expected).square().mean().backward()
torch.testing.assert_close(gradient, project.weight.grad, rtol=1e-4, atol=1e-6)
print("checked")
"""
