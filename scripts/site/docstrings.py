"""Griffe's extension: docstrings as this project writes them, for a Markdown page."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|data|func|meth|mod):`([^`]+)`")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
# Several names with one description, which goes on in the lines that are indented further.
SHARED = re.compile(r"^( +)(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Make ``Example:`` the section that Griffe knows as ``Examples:``, roles plain code, and each name an entry."""

    def on_instance(self, *, obj: griffe.Object, **arguments: Any) -> None:
        if obj.docstring:
            text = ROLE.sub(r"`\1`", EXAMPLE.sub(r"\1Examples:", obj.docstring.value))
            obj.docstring.value = SHARED.sub(separated, text)


def separated(entry: re.Match) -> str:
    """Return an entry for each of the names, with its own type and default value then."""
    indent, names, description = entry.groups()
    return "\n".join(f"{indent}{name}: {description}" for name in names.split(", "))
