"""Passes of a whole model, as they apply to one part of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sqcompile.layers import layers_of, matches, select_layers
from sqcompile.pipeline.contract import Pass, option_fields
from sqcompile.program import Program
from sqcompile.quantization.scheme import HEAD, Site, choose_formats, sites_of

_KIND = "kind:"
# Options of passes that select layers: patterns, kinds, and pairs whose first item is a pattern.
_PATTERNS = ("layers", "exclude", "unpruned")
_KINDS = ("kinds",)
_OVERRIDES = ("formats", "activation_formats", "sparsities")


def check_selection(passes: Sequence[Pass], program: Program) -> None:
    """Check that whatever passes select is there in the whole model: a part may lack it.

    Raises:
        SelectionError: If a pattern or kind matches nothing; the nearest names are given.
    """
    sites, layers = sites_of(program), layers_of(program)
    for item in passes:
        where = f"pass {item.name}"
        known: Sequence[Any] = [*layers, *(site for site in sites if site.layer is None)]
        for field in option_fields(type(item)):
            value = getattr(item, field.name)
            if field.name in _PATTERNS:
                named = [pattern for pattern in value if not pattern.startswith(_KIND)]
                select_layers(known, named, where=where)
            elif field.name in _KINDS:
                select_layers(known, kinds=value, where=where)
            elif field.name in _OVERRIDES:
                choose_formats(sites, None, [(pattern, "float") for pattern, _ in value], where=where)


def narrowed(item: Pass, program: Program) -> Pass:
    """Return a pass without the patterns that match nothing in a part."""
    sites = sites_of(program)
    layers = layers_of(program)
    changes: dict[str, Any] = {}
    for field in option_fields(type(item)):
        value = getattr(item, field.name)
        if field.name in _PATTERNS:
            changes[field.name] = tuple(pattern for pattern in value if _applies(pattern, layers, sites))
        elif field.name in _KINDS and value:
            kinds = {site.kind for site in sites} | {layer.kind for layer in layers}
            found = tuple(kind for kind in value if kind in kinds)
            changes[field.name] = found
            if not found:  # no kinds would mean all of them
                changes["layers"] = ()
        elif field.name in _OVERRIDES:
            changes[field.name] = tuple(pair for pair in value if _applies(pair[0], layers, sites))
    return dataclasses.replace(item, **changes) if changes else item  # type: ignore[type-var]


def _applies(pattern: str, layers: Sequence[Any], sites: Sequence[Site]) -> bool:
    kind = pattern.removeprefix(_KIND)
    if kind == pattern:
        return _matches(pattern, layers, sites)
    return kind == HEAD or any(named.kind == kind for named in (*layers, *sites))


def _matches(pattern: str, layers: Sequence[Any], sites: Sequence[Site]) -> bool:
    return any(matches(pattern, named.name) for named in (*layers, *sites))
