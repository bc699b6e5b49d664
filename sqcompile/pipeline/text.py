"""Pipelines as text: `fold-batch-norm,mask-weights{sparsity=0.5,layers=[layer1.*,fc]}` and back.

The grammar, which recipes, the command line and logs share:

    pipeline = item ("," item)*
    item     = name [ "{" option ("," option)* "}" ]
    option   = name "=" value
    value    = "[" value ("," value)* "]"            a list
             | "{" key ":" value ("," …)* "}"        a table, by pattern
             | '"' … '"' | number | true | false | none | bare text

A name is that of a pass, or of a named pipeline (`int8-static`), which stands for its passes. Options
are written with dashes and stand for fields with underscores.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any

from sqcompile.errors import Error, PassOptionError, RecipeError, did_you_mean
from sqcompile.pipeline.contract import _REGISTRY, Pass, option_fields

NamedPipeline = Callable[..., list[Pass]]
"""A function whose keyword arguments are options, and which returns passes in order."""


def registry() -> dict[str, type[Pass]]:
    """Return every known pass class by its text name, ours and those that users have defined."""
    importlib.import_module("sqcompile.passes")
    return dict(sorted(_REGISTRY.items()))


def named_pipelines() -> dict[str, NamedPipeline]:
    """Return the pipelines that have a name, such as `int8-static`: functions that return passes."""
    module = importlib.import_module("sqcompile.passes.pipelines")
    return {name.replace("_", "-"): function for name, function in sorted(module.PIPELINES.items())}


def find_pass(name: str) -> type[Pass]:
    """Return the class of a pass by its text name (underscores and class names are understood).

    Raises:
        RecipeError: If there is none, with the nearest names.
    """
    known = registry()
    key = name.strip().replace("_", "-")
    if key in known:
        return known[key]
    for kind in known.values():
        if kind.__name__ == name.strip():
            return kind
    if key in named_pipelines():
        raise RecipeError(
            f"'{key}' is a pipeline of several passes, and one pass is wanted here.",
            where="passes",
            seen=name.strip(),
            expected="the name of one pass",
            next_step=f"see what it holds with: sqcompile passes {key}",
        )
    raise RecipeError(
        f"There is no pass '{name.strip()}'.",
        where="passes",
        seen=name.strip(),
        expected="the name of a pass or of a pipeline",
        next_step=did_you_mean(key, [*known, *named_pipelines()])
        + " `sqcompile passes` lists all; one of your own is known once its file is imported (--import, `imports:`)",
    )


def pass_text(item: Pass) -> str:
    """Return a pass as text; options at their defaults are left out."""
    shown = []
    for option in option_fields(type(item)):
        value = getattr(item, option.name)
        if value == _default(option):
            continue
        shown.append(f"{option.name.replace('_', '-')}={value_text(value)}")
    return item.name + (f"{{{','.join(shown)}}}" if shown else "")


def pipeline_text(passes: Iterable[Pass]) -> str:
    """Return a pipeline as text."""
    return ",".join(pass_text(item) for item in passes)


def parse_pipeline(text: str) -> list[Pass]:
    """Read a pipeline from text; named pipelines in it are replaced by their passes.

    Raises:
        RecipeError: On a syntax error or an unknown pass.
        PassOptionError: On an unknown option or a value of the wrong type.
    """
    passes: list[Pass] = []
    for part in _split(text, ","):
        if part.strip():
            passes += make_passes(*_parse_item(part))
    return passes


def parse_pass(text: str) -> Pass:
    """Read one pass from text."""
    return make_pass(*_parse_item(text))


def make_passes(name: str, options: Mapping[str, Any]) -> list[Pass]:
    """Build a pass, or the passes of a named pipeline, from plain option values.

    Raises:
        RecipeError: If there is neither a pass nor a pipeline of that name.
        PassOptionError: If it has no such option, or the value does not fit.
    """
    key = name.strip().replace("_", "-")
    pipeline = named_pipelines().get(key)
    if pipeline is None:
        return [make_pass(name, options)]
    values = _read_options(f"pipeline {key}", pipeline_options(pipeline), options)
    try:
        return list(pipeline(**values))
    except Error as error:  # from a format or a pass that the pipeline made of the options
        raise PassOptionError(
            f"Pipeline {key} does not take these options. {error.what}",
            where=f"pipeline {key}" + (f", {error.where}" if error.where else ""),
            seen=", ".join(f"{_dashed(name)}={value_text(value)}" for name, value in values.items()),
            expected=error.expected,
            next_step=f"see the options with: sqcompile passes {key}",
        ) from error


def make_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """Build a pass from its name and plain option values, as recipes give them.

    Raises:
        RecipeError: If there is no such pass.
        PassOptionError: If it has no such option, or the value does not fit.
    """
    kind = find_pass(name)
    hints = typing.get_type_hints(kind)
    fields = option_fields(kind)
    values = _read_options(f"pass {kind.name}", {field.name: hints[field.name] for field in fields}, options)
    for field in fields:
        if field.name not in values and _default(field) is dataclasses.MISSING:
            raise PassOptionError(
                f"Pass {kind.name} needs the option '{_dashed(field.name)}'.",
                where=f"pass {kind.name}",
                seen="no value for it",
                expected=type_text(hints[field.name]),
                next_step=f"write {kind.name}{{{_dashed(field.name)}=…}}",
            )
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:  # from the pass's own check, in __post_init__
        raise PassOptionError(
            f"Pass {kind.name} does not take these options.",
            where=f"pass {kind.name}",
            seen=f"{', '.join(f'{_dashed(key)}={value_text(value)}' for key, value in values.items())} ({error})",
            expected="; ".join(f"{_dashed(field.name)}: {type_text(hints[field.name])}" for field in fields),
            next_step=f"see the options with: sqcompile passes {kind.name}",
        ) from error


def read_options(item: Pass) -> None:
    """Bring the options of a new pass, which may be plain values, into their declared types.

    Raises:
        PassOptionError: If a plain value does not fit.
    """
    try:
        hints = typing.get_type_hints(type(item))
    except (NameError, TypeError):  # types that only exist inside a function: left to the pass itself
        return
    for field in option_fields(type(item)):
        value = getattr(item, field.name)
        if not isinstance(value, (str, int, float, list, tuple, dict)) and value is not None:
            continue  # an object of the option's own type, such as an observer
        owner = f"pass {item.name}"
        (value,) = _read_options(owner, {field.name: hints[field.name]}, {field.name: value}).values()
        object.__setattr__(item, field.name, value)


def pipeline_options(pipeline: NamedPipeline) -> dict[str, Any]:
    """Return the options of a named pipeline: name -> type."""
    hints = typing.get_type_hints(pipeline)
    return {name: hints.get(name, Any) for name in inspect.signature(pipeline).parameters}


def _parse_item(text: str) -> tuple[str, dict[str, Any]]:
    """Split `name{option=value,…}` into the name and its options."""
    text = text.strip()
    name, brace, rest = text.partition("{")
    if brace and not rest.endswith("}"):
        raise RecipeError(
            f"'{text}' lacks the closing brace.",
            seen=text,
            expected="name{option=value}",
            next_step="close the brace; passes are separated by commas",
        )
    options: dict[str, Any] = {}
    for part in _split(rest[:-1], ",") if brace else []:
        if not part.strip():
            continue
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals:
            raise RecipeError(
                f"'{part.strip()}' is no option.",
                seen=text,
                expected="option=value",
                next_step="add '=value'; a list is written in brackets, option=[a,b]",
            )
        if key in options:
            raise RecipeError(
                f"Option '{key}' is given twice.",
                where=f"pass {name}",
                seen=text,
                expected="each option once",
                next_step="leave one of the two",
            )
        options[key] = parse_value(value.strip())
    return name, options


def _read_options(owner: str, hints: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `owner` (`pass fold-batch-norm`) as fields with values of their types."""
    values: dict[str, Any] = {}
    for key, value in options.items():
        field = key.replace("-", "_")
        if field not in hints:
            raise PassOptionError(
                f"{owner[0].upper()}{owner[1:]} has no option '{key}'.",
                where=owner,
                seen=key,
                expected=", ".join(map(_dashed, hints)) or "no options",
                next_step=did_you_mean(key, list(map(_dashed, hints))),
            )
        try:
            values[field] = coerce(value, hints[field])
        except Error as error:  # a format, a pattern, … whose own text is wrong
            raise PassOptionError(
                f"Option '{key}' of {owner} cannot take this value. {error.what}",
                where=owner,
                seen=f"{key}={value_text(value)}",
                expected=error.expected or type_text(hints[field]),
                next_step=error.next_step or f"see the options with: sqcompile passes {owner.split()[-1]}",
            ) from error
        except (TypeError, ValueError) as error:
            raise PassOptionError(
                f"Option '{key}' of {owner} cannot take this value.",
                where=owner,
                seen=f"{key}={value_text(value)} ({error})",
                expected=type_text(hints[field]),
                next_step=f"see the options with: sqcompile passes {owner.split()[-1]}",
            ) from error
    return values


def _dashed(field: str) -> str:
    return field.replace("_", "-")


def coerce(value: Any, hint: Any) -> Any:
    """Turn a plain value (text, number, list, dict) into the type of an option.

    Raises:
        TypeError: If it does not fit.
        ValueError: If it does not fit.
    """
    if hint is Any:
        return _plain(value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in sorted(arguments, key=lambda kind: kind is str):  # text last: everything is text
            if option is type(None):
                if value is None:
                    return None
                continue
            try:
                return coerce(value, option)
            except (TypeError, ValueError, Error):
                continue
        raise TypeError(f"{value!r} fits none of {type_text(hint)}")
    if origin is typing.Literal:
        for argument in arguments:
            if argument == value and type(argument) in type(value).__mro__:
                return argument
        raise ValueError(did_you_mean(str(value), [str(item) for item in arguments]))
    if origin is tuple:
        return _coerce_tuple(value, arguments)
    if isinstance(hint, type):
        return _coerce_type(value, hint)
    raise TypeError(f"options of type {hint} cannot be read from text")


def _plain(value: Any) -> Any:
    """Return a value without how its numbers were written."""
    if isinstance(value, (_Int, _Float)):
        return int(value) if isinstance(value, _Int) else float(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _coerce_tuple(value: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, Mapping):
        value = list(value.items())
    elif not isinstance(value, (list, tuple)):
        value = [value]
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(coerce(item, arguments[0]) for item in value)
    if len(value) != len(arguments):
        raise ValueError(f"{len(arguments)} values are needed")
    return tuple(coerce(item, kind) for item, kind in zip(value, arguments, strict=True))


def _coerce_type(value: Any, hint: type) -> Any:
    if isinstance(value, hint) and type(value) is bool and hint is not bool:
        raise TypeError(f"{value_text(value)} is no {hint.__name__}")  # to Python it is an int
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, int):
        return int(value)
    if hint is str and isinstance(value, (_Int, _Float)):
        return value.text
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if hint is str and isinstance(value, float):
        raise TypeError("write it in quotes, or it is read as a number")
    if isinstance(value, hint):
        return value
    if issubclass(hint, Enum):
        return hint(value)
    if isinstance(value, str) and hasattr(hint, "parse"):
        return hint.parse(value)
    if isinstance(value, (str, _Int, _Float)) and issubclass(hint, PurePath):
        return hint(str(value))
    raise TypeError(f"{type_text(type(value))} is not {hint.__name__}")


def value_text(value: Any) -> str:
    """Return an option's value as text that `parse_value` reads back."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return value_text(value.value)
    if isinstance(value, (tuple, list)):
        if _is_table(value):
            return "{" + ",".join(f"{_key_text(k)}:{value_text(v)}" for k, v in value) + "}"
        return "[" + ",".join(value_text(item) for item in value) + "]"
    text = str(value)
    if isinstance(value, (int, float)):
        return text
    if isinstance(value, str):
        return text if _is_bare(text) else _quoted(text)
    # Formats, observers and the like: their own braces stand, as `percentile{bins=2048}` does.
    return text if _is_one_value(text) else _quoted(text)


def parse_value(text: str) -> Any:
    """Read one value: list, table, quoted text, number, true, false, none or bare text.

    Numbers remember how they were written: a layer called `0.10` is not `0.1`.

    Raises:
        RecipeError: If a bracket or quote is left open, or a key of a table is given twice.
    """
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return [parse_value(part) for part in _split(text[1:-1], ",") if part.strip()]
    if text.startswith("{") and text.endswith("}"):
        return _parse_table(text)
    if text.startswith('"'):
        if not _QUOTED.fullmatch(text):
            raise RecipeError(
                f"'{text}' is no quoted text.",
                seen=text,
                expected='"…", with \\" for a quote inside and \\\\ for a backslash',
                next_step="close the quote, or remove what follows it",
            )
        return re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.S)
    if text in _WORDS:
        return _WORDS[text]
    for kind in (_Int, _Float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _parse_table(text: str) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for part in _split(text[1:-1], ","):
        if not part.strip():
            continue
        key, colon, value = _partition_key(part.strip())
        if not colon:
            raise RecipeError(
                f"'{part.strip()}' is no entry of a table.",
                seen=text,
                expected="{key:value,…}",
                next_step="add ':value'; a key that holds a colon is quoted",
            )
        name = str(parse_value(key))
        if name in table:
            raise RecipeError(
                f"'{name}' stands twice in a table.",
                seen=text,
                expected="each key once",
                next_step="leave one of the two",
            )
        table[name] = parse_value(value)
    return table


class _Int(int):
    """An integer that prints as it was written."""

    text: str

    def __new__(cls, text: str) -> _Int:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


class _Float(float):
    """A number that prints as it was written."""

    text: str

    def __new__(cls, text: str) -> _Float:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


_WORDS = {"true": True, "false": False, "none": None}
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"', re.S)
_CLOSERS = {"[": "]", "{": "}"}


def type_text(hint: Any) -> str:
    """Return a type as users read it: `float`, `int or none`, `list of str`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(item) for item in arguments)
    if origin is typing.Literal:
        return " or ".join(str(item) for item in arguments)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"list of {type_text(arguments[0])}"
        return "(" + ", ".join(type_text(item) for item in arguments) + ")"
    if hint is type(None):
        return "none"
    if isinstance(hint, type) and issubclass(hint, (_Int, _Float)):
        return "int" if issubclass(hint, _Int) else "float"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(value_text(item) for item in hint)
    return getattr(hint, "__name__", str(hint))


def _default(option: dataclasses.Field[Any]) -> Any:
    if option.default is not dataclasses.MISSING:
        return option.default
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return dataclasses.MISSING


def _is_table(value: Sequence[Any]) -> bool:
    """Whether pairs can be written as a table: texts as keys, each once."""
    pairs = all(isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in value)
    return bool(value) and pairs and len({key for key, _ in value}) == len(value)


def _key_text(key: str) -> str:
    return key if _is_bare(key) and ":" not in key else _quoted(key)


def _is_bare(text: str) -> bool:
    """Whether a text reads back as itself, wherever it stands, without quotes."""
    if not text or text != text.strip() or any(character in text for character in ',{}[]="'):
        return False
    return type(parse_value(text)) is str


def _is_one_value(text: str) -> bool:
    """Whether a text, with the brackets in it, reads back as one value."""
    try:
        bare = text == text.strip() and text[:1] not in '[{"' and _split(text, ",") == [text]
        return bare and type(parse_value(text)) is str
    except RecipeError:
        return False


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _partition_key(part: str) -> tuple[str, str, str]:
    quoted = _QUOTED.match(part)
    if quoted is None:
        return part.partition(":")
    rest = part[quoted.end() :].lstrip()
    return quoted.group(), rest[:1] if rest[:1] == ":" else "", rest[1:]


def _split(text: str, separator: str) -> list[str]:
    """Split at separators that stand outside brackets, braces and quotes."""
    parts: list[str] = []
    open_brackets: list[str] = []
    start = index = 0
    while index < len(text):
        character = text[index]
        if character == '"':
            quoted = _QUOTED.match(text, index)
            if quoted is None:
                open_brackets.append('"')
                break
            index = quoted.end()
            continue
        if character in _CLOSERS:
            open_brackets.append(_CLOSERS[character])
        elif character in _CLOSERS.values():
            if not open_brackets or open_brackets.pop() != character:
                raise RecipeError(
                    f"'{text}' closes a bracket that was never opened.",
                    seen=f"'{character}' at character {index + 1}",
                    expected="brackets in pairs",
                    next_step="open it, or quote the text that holds it",
                )
        elif character == separator and not open_brackets:
            parts.append(text[start:index])
            start = index + 1
        index += 1
    if open_brackets:
        raise RecipeError(
            f"'{text}' leaves a bracket or quote open.",
            seen=text,
            expected=f"a closing {open_brackets[-1]}",
            next_step="close it",
        )
    parts.append(text[start:])
    return parts
