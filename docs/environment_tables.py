# SPDX-License-Identifier: Apache-2.0
"""Write the tables of environment.md again, from the code: ``python docs/environment_tables.py [page.md]``."""

import re
import sys
from pathlib import Path

from magi_attention.env import VARIABLES

PAGE = Path(__file__).parent / "environment.md"


def table(ignored: bool) -> str:
    """The variables that have an effect, or those that are ignored, in Markdown."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for variable in VARIABLES.values():
        if variable.ignored == ignored:
            default = f"`{variable.default}`" if variable.default else "unset"
            meaning = variable.meaning.replace("``", "`").replace("|", "\\|")
            lines.append(f"| `{variable.name}` | {default} | {meaning} |")
    return "\n".join([*lines, ""])


def main(page: Path) -> None:
    """Write them into ``page``, each below its comment."""
    text = page.read_text()
    for comment, ignored in (("<!-- variables in effect -->\n", False), ("<!-- variables ignored -->\n", True)):
        before, after = text.split(comment)
        text = before + comment + table(ignored) + re.sub(r"\A(\|.*\n)*", "", after)
    page.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE)
