"""Griffe's extension: docstrings as this project writes them, for a Markdown page."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|data|func|meth|mod):`([^`]+)`")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Make ``Example:`` the section that Griffe knows as ``Examples:``, and roles plain code."""

    def on_instance(self, *, obj: griffe.Object, **arguments: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"`\1`", EXAMPLE.sub(r"\1Examples:", obj.docstring.value))
