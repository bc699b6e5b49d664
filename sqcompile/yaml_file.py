"""YAML with line numbers: every value knows where it stands, so that every mistake can be pointed at.

Plain scalars are read by the grammar of pipelines (`sqcompile.pipeline.text.parse_value`), not by YAML
1.1's, in which `2:4` is the number 124, `no` is false and `1e-5` is text. Quoted scalars are text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from sqcompile.errors import RecipeError, did_you_mean
from sqcompile.pipeline.text import parse_value

_NONE = frozenset({"", "~", "null", "Null", "NULL", "none", "None"})
_WORDS = {"True": True, "TRUE": True, "False": False, "FALSE": False}


@dataclass(frozen=True)
class Node:
    """A value in a YAML file.

    Attributes:
        value: Text, number, truth value or None; a list of nodes; or a dict from keys to nodes.
        place: File and line, as `recipe.yaml, line 3`.
        keys: For a dict, the place of each key.
    """

    value: Any
    place: str
    keys: dict[str, str]

    def plain(self) -> Any:
        """Return the value with plain Python values inside."""
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return self.value

    def table(self, what: str, known: Iterable[str] | None = None) -> dict[str, Node]:
        """Return the value as a dict.

        Args:
            what: What the value stands for, for the error.
            known: The valid keys, or None if any is.

        Raises:
            RecipeError: If it is none, or holds an unknown key.
        """
        if not isinstance(self.value, dict):
            raise self.wrong(what, "a table, key: value")
        valid = None if known is None else list(known)
        for key in self.value:
            if valid is not None and key not in valid:
                raise RecipeError(
                    f"A recipe has no key '{key}'" + ("." if what == "recipe" else f" in '{what}'."),
                    where=self.keys[key],
                    seen=key,
                    expected=", ".join(valid),
                    next_step=did_you_mean(key, valid),
                )
        return self.value

    def items(self) -> list[Node]:
        """Return the value as a list; a single value is a list of one."""
        return self.value if isinstance(self.value, list) else [self]

    def text(self, what: str) -> str:
        """Return the value as text.

        Raises:
            RecipeError: If it is a list, a table, a truth value or nothing.
        """
        if isinstance(self.value, (int, float)) and not isinstance(self.value, bool):
            return str(self.value)
        if not isinstance(self.value, str):
            raise self.wrong(what, "text")
        return self.value

    def integer(self, what: str, least: int = 0) -> int:
        """Return the value as a whole number of at least `least`.

        Raises:
            RecipeError: If it is none.
        """
        if not isinstance(self.value, int) or isinstance(self.value, bool) or self.value < least:
            raise self.wrong(what, f"a whole number, {least} or more")
        return int(self.value)  # without how it was written

    def choice(self, what: str, choices: Iterable[str]) -> str:
        """Return the value, which must be one of a few words.

        Raises:
            RecipeError: If it is none of them, with the nearest.
        """
        words = list(choices)
        if self.value not in words:
            error = self.wrong(what, ", ".join(words))
            error.next_step = did_you_mean(str(self.value), words)
            raise error
        return str(self.value)

    def wrong(self, what: str, expected: str) -> RecipeError:
        """Return the error for a value of the wrong type."""
        return RecipeError(
            f"'{what}' has a value that it cannot take.",
            where=self.place,
            seen=describe(self.value),
            expected=expected,
            next_step="correct this line",
        )


def describe(value: Any) -> str:
    """Return a value and its kind, for an error: `the list [1, 2]`."""
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "a table with " + ", ".join(f"'{key}'" for key in value)
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    return f"the text '{value}'" if isinstance(value, str) else f"the number {value}"


def parse_yaml(text: str, file: str) -> Node:
    """Read one YAML document.

    Args:
        text: The document.
        file: Name of the file, for places.

    Raises:
        RecipeError: If it is no YAML, is empty, or names a key twice.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            return _read(root, file)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(
            f"'{file}' is no YAML.",
            where=f"{file}, line {mark.line + 1}" if mark else file,
            seen=error.problem or error.context,
            expected="keys and values, as `passes: [fold-batch-norm]`",
            next_step="check indentation, colons and brackets at this line",
        ) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"'{file}' is no YAML.", where=file, seen=str(error).splitlines()[0]) from None
    raise RecipeError(
        f"'{file}' is empty.", where=file, expected="at least `passes`", next_step="see docs/recipes.md"
    )


def _read(node: yaml.Node, file: str) -> Node:
    place = f"{file}, line {node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return Node([_read(item, file) for item in node.value], place, {})
    if isinstance(node, yaml.MappingNode):
        return _read_table(node, place, file)
    assert isinstance(node, yaml.ScalarNode)
    if node.style is not None:  # quoted, or a block of text
        return Node(str(node.value), place, {})
    return Node(_scalar(str(node.value), place), place, {})


def _read_table(node: yaml.MappingNode, place: str, file: str) -> Node:
    table: dict[str, Node] = {}
    keys: dict[str, str] = {}
    for key_node, value_node in node.value:
        key_place = f"{file}, line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(
                "A key is not a word.",
                where=key_place,
                seen="a list or table as key",
                expected="key: value",
                next_step="put text with brackets or braces into quotes",
            )
        key = str(key_node.value)
        if key in table:
            raise RecipeError(
                f"The key '{key}' is given twice.",
                where=key_place,
                seen=f"first at {keys[key]}",
                expected="each key once",
                next_step="leave one of the two",
            )
        table[key], keys[key] = _read(value_node, file), key_place
    return Node(table, place, keys)


def _scalar(text: str, place: str) -> Any:
    if text in _NONE:
        return None
    if text in _WORDS:
        return _WORDS[text]
    if text[0] in "[{" or "{" in text:  # a pass with its options
        return text
    try:
        return parse_value(text)
    except RecipeError as error:
        error.where = place
        raise
