"""Sphinx: `sphinx-build -W docs site` builds the documentation and fails at any warning."""

from __future__ import annotations

from typing import Any

import comfy_executors

project = "comfy-executors"
version = release = comfy_executors.__version__
copyright = "the authors of comfy-executors"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
# What is in there is shown by the pages, and run by the tests.
exclude_patterns = ["examples"]
# The notebook is run by the tests, too; its page shows what is stored in it.
nb_execution_mode = "off"
myst_heading_anchors = 3
# Docstrings write code in single backticks, as Markdown does.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
html_theme = "furo"
html_title = f"comfy-executors {version}"


def keep_whole_sentence(_app: Any, what: str, *args: Any) -> None:
    """Keep napoleon from taking what stands before a colon for the type of a property."""
    lines = args[-1]
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # an empty comment: only the first line is searched for a colon


def setup(app: Any) -> None:
    """Hook into Sphinx, before napoleon does at priority 500."""
    app.connect("autodoc-process-docstring", keep_whole_sentence, priority=400)
