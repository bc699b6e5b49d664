"""Docstrings as data: the catalogue of passes and the command line show them."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Docstring:
    """A docstring, taken apart.

    Attributes:
        summary: The first paragraph, on one line.
        body: What follows, up to the first section.
        sections: `Name: text` blocks at the outer indentation, in order, such as `Rewrites`.
    """

    summary: str
    body: str
    sections: dict[str, str]

    @classmethod
    def of(cls, item: object) -> Docstring:
        """Take apart the docstring of a class or function; without one, everything is empty."""
        own = item.__dict__.get("__doc__") if isinstance(item, type) else getattr(item, "__doc__", None)
        return cls.parse(inspect.cleandoc(own or ""))

    @classmethod
    def parse(cls, text: str) -> Docstring:
        """Take apart a docstring whose indentation was cleaned."""
        prose: list[str] = []
        sections: dict[str, list[str]] = {}
        current = prose
        for line in text.splitlines():
            match = re.match(r"([A-Z][A-Za-z]+):(?:\s+(.*))?$", line)
            if match:
                current = sections.setdefault(match[1], [])
                current += [match[2]] if match[2] else []
            elif line and not line.startswith(" ") and current is not prose:
                current = prose  # prose goes on behind a section
                current += ["", line]
            else:
                current.append(line)
        summary, _, body = "\n".join(prose).strip().partition("\n\n")
        return cls(
            " ".join(summary.split()),
            body.strip(),
            {name: _dedent(lines) for name, lines in sections.items()},
        )

    def entries(self, *names: str) -> dict[str, str]:
        """Return the entries `name: text` of the given sections, each text on one line."""
        found: dict[str, str] = {}
        last = ""
        for section in names:
            for line in self.sections.get(section, "").splitlines():
                match = re.match(r"(\w+)(?: \([^)]*\))?: (.*)$", line)
                if match:
                    last = match[1]
                    found[last] = match[2].strip()
                elif last and line.strip():
                    found[last] += " " + line.strip()
        return found

    def paragraphs(self) -> list[str]:
        """Return the body's paragraphs, each on one line."""
        return [" ".join(part.split()) for part in re.split(r"\n\s*\n", self.body) if part.strip()]


def _dedent(lines: list[str]) -> str:
    """Join a section's lines; the first one may stand behind the section's name."""
    inline = bool(lines) and not lines[0].startswith(" ")
    return inspect.cleandoc(("" if inline else "\n") + "\n".join(lines)).strip()


def attribute_docs(kind: type) -> dict[str, str]:
    """Return the texts that stand below a class's annotated fields, each on one line.

    A class whose source is not at hand has none.
    """
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    body = getattr(tree, "body", [])
    found: dict[str, str] = {}
    for item, following in itertools.pairwise(body):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            found[item.target.id] = " ".join(str(following.value.value).split())
    return found
