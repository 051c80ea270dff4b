# SPDX-License-Identifier: Apache-2.0
"""The directive ``environment-table``: the environment variables that the code reads, as a table.

Its option ``which`` takes ``used`` or ``ignored``. The rows come from :data:`magi_attention.env.VARIABLES`, so that the
page cannot differ from the code.
"""

from collections.abc import Callable
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from magi_attention.env import VARIABLES


def markdown_table(ignored: bool) -> list[str]:
    """The lines of a Markdown table of the variables that have an effect, or of those that are ignored."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for variable in VARIABLES.values():
        if variable.ignored == ignored:
            default = f"`{variable.default}`" if variable.default else "unset"
            meaning = variable.meaning.replace("``", "`").replace("|", "\\|")
            lines.append(f"| `{variable.name}` | {default} | {meaning} |")
    return lines


class EnvironmentTable(SphinxDirective):
    """Insert the table."""

    option_spec: ClassVar[dict[str, Callable[[str], str]]] = {
        "which": lambda text: directives.choice(text, ("used", "ignored")),
    }

    def run(self) -> list[nodes.Node]:
        """Parse the table as the page's own Markdown."""
        lines = markdown_table(self.options.get("which", "used") == "ignored")
        container = nodes.container()
        self.state.nested_parse(StringList(lines, source="environment_table"), self.content_offset, container)
        return container.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("environment-table", EnvironmentTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
