"""The catalogue of passes and named pipelines: what each does, and its options, from the code itself."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from dataclasses import dataclass
from typing import Any

from sqcompile.docstrings import Docstring, attribute_docs
from sqcompile.errors import RecipeError, did_you_mean
from sqcompile.pipeline.contract import Pass, option_fields
from sqcompile.pipeline.text import (
    NamedPipeline,
    named_pipelines,
    pass_text,
    pipeline_options,
    registry,
    type_text,
    value_text,
)

PIPELINES = "pipelines"
YOURS = "yours"

JOBS = {
    PIPELINES: "Pipelines: whole jobs, made of the passes below",
    "canonicalize": "Canonicalize: the same numbers, in fewer and plainer operators",
    "prune": "Prune: zeros, and smaller tensors",
    "quantize": "Quantize: integers for floats",
    "train": "Train: win back what compression cost",
    YOURS: "Yours: passes defined outside sqcompile",
}
"""Job (the folder of the pass) -> what passes of that kind are for."""


@dataclass(frozen=True)
class Option:
    """An option of a pass or pipeline.

    Attributes:
        name: As text has it, with dashes.
        type: Its type, for people.
        default: Its default as text, or None if a value is needed.
        doc: What it means.
    """

    name: str
    type: str
    default: str | None
    doc: str


@dataclass(frozen=True)
class Entry:
    """A pass or a named pipeline.

    Attributes:
        name: Its name in text.
        job: A key of `JOBS`.
        doc: Its docstring.
        options: Its options.
        facts: What its contract says: levels and what it keeps; for a pipeline, its passes.
        home: The module that defines it.
        symbol: Name of the class or function.
    """

    name: str
    job: str
    doc: Docstring
    options: tuple[Option, ...]
    facts: dict[str, str]
    home: str
    symbol: str

    def data(self) -> dict[str, Any]:
        """Return the entry as plain values."""
        return {
            "name": self.name,
            "job": self.job,
            "summary": self.doc.summary,
            "description": self.doc.body,
            "sections": {
                name: text for name, text in self.doc.sections.items() if name not in _OPTION_SECTIONS
            },
            "options": [dataclasses.asdict(option) for option in self.options],
            **self.facts,
        }


_OPTION_SECTIONS = ("Attributes", "Args", "Options")


def catalog() -> list[Entry]:
    """Return every known pipeline and pass, in the order of `JOBS` and then by name."""
    entries = [_pipeline_entry(name, function) for name, function in named_pipelines().items()]
    entries += [_pass_entry(kind) for kind in registry().values()]
    order = list(JOBS)
    return sorted(entries, key=lambda entry: (order.index(entry.job), entry.name))


def find_entry(name: str) -> Entry:
    """Return the pass or pipeline of a name; class names and underscores are understood.

    Raises:
        RecipeError: If there is none, with the nearest names.
    """
    entries = catalog()
    for entry in entries:
        if name.replace("_", "-") == entry.name or name == entry.symbol:
            return entry
    names = [entry.name for entry in entries]
    raise RecipeError(
        f"There is no pass or pipeline '{name}'.",
        seen=name,
        expected="a name that `sqcompile passes` lists",
        next_step=did_you_mean(name.replace("_", "-"), names),
    )


def _pass_entry(kind: type[Pass]) -> Entry:
    doc = Docstring.of(kind)
    try:
        hints = typing.get_type_hints(kind)
    except (NameError, TypeError):  # a pass of a user's, with types that only exist while checking
        hints = {item.name: item.type for item in option_fields(kind)}
    meanings = {**doc.entries(*_OPTION_SECTIONS), **attribute_docs(kind)}
    options = []
    for item in option_fields(kind):
        default: Any = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        options.append(
            Option(
                item.name.replace("_", "-"),
                type_text(hints[item.name]),
                None if default is dataclasses.MISSING else value_text(default),
                meanings.get(item.name, ""),
            )
        )
    facts = {"needs": str(kind.requires), "leaves": str(kind.produces), "keeps": str(kind.keeps)}
    return Entry(kind.name, _job(kind), doc, tuple(options), facts, kind.__module__, kind.__name__)


def _pipeline_entry(name: str, function: NamedPipeline) -> Entry:
    doc = Docstring.of(function)
    meanings = doc.entries(*_OPTION_SECTIONS)
    hints = pipeline_options(function)
    options = []
    for parameter in inspect.signature(function).parameters.values():
        default = None if parameter.default is parameter.empty else value_text(parameter.default)
        options.append(
            Option(
                parameter.name.replace("_", "-"),
                type_text(hints[parameter.name]),
                default,
                meanings.get(parameter.name, ""),
            )
        )
    facts = {"passes": ", ".join(pass_text(item) for item in function())}
    return Entry(name, PIPELINES, doc, tuple(options), facts, function.__module__, function.__name__)


def _job(kind: type[Pass]) -> str:
    parts = kind.__module__.split(".")
    job = parts[2] if parts[:2] == ["sqcompile", "passes"] and len(parts) > 2 else YOURS
    return job if job in JOBS else YOURS
