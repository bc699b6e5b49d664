"""How an artifact was made, for people: the recipe that it carries, with what the recipe depends on and lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def describe_made(provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what an artifact says about how it was made; the recipe is None where it says nothing."""
    found = provenance or {}
    return {
        "recipe": found.get("recipe"),
        "seed": found.get("seed"),
        "data": found.get("data"),
        "versions": dict(found.get("versions", {})),
        "object": found.get("object"),
        "left_out": list(found.get("left_out", [])),
    }


def show_made(target: Console, about: Mapping[str, Any]) -> None:
    """Print what `describe_made` found."""
    from sqcompile.provenance import recipe_text

    if about["recipe"] is None:
        target.print("It says nothing about how it was made.")
        return
    target.print("made by this recipe:\n", markup=False)
    text = recipe_text({name: value for name, value in about.items() if value is not None})
    target.print(text.rstrip(), markup=False, highlight=False, soft_wrap=True)
