# SPDX-License-Identifier: Apache-2.0
"""Sphinx settings. The build needs neither a GPU nor the network."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from sphinx.application import Sphinx

# Imported for its docstrings; it needs no more than the core does to be imported.
sys.path.insert(0, str(Path(__file__).parents[1] / "packages" / "comm-grpcoll" / "src"))

project = "MagiAttention"
copyright = "the MagiAttention contributors"
version = release = installed_version("magi-attention")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_mock_imports = ["megatron", "torchtitan", "transformers"]  # of magi_attention.integrations
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"MagiAttention {release}"
html_static_path = ["_static"]


def skip_tuple_fields(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out a named tuple's generated field docstrings: the class's docstring describes its fields."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> None:
    """Connect the hook above."""
    app.connect("autodoc-skip-member", skip_tuple_fields)
