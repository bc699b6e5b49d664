"""The gallery: recipes of whole jobs, to start from. Each is a file beside this one, tried by a test."""

from __future__ import annotations

from pathlib import Path

from sqcompile.errors import RecipeError, did_you_mean

_FOLDER = Path(__file__).parent


def gallery() -> dict[str, str]:
    """Return what each recipe is for, by name."""
    return {path.stem: _summary(path) for path in sorted(_FOLDER.glob("*.yaml"))}


def gallery_file(name: str) -> Path:
    """Return the file of a recipe.

    Raises:
        RecipeError: If there is none of that name, with the nearest.
    """
    if name not in gallery():
        raise RecipeError(
            f"The gallery has no recipe '{name}'.",
            where="recipe",
            seen=name,
            expected=", ".join(gallery()),
            next_step=did_you_mean(name, gallery()),
        )
    return _FOLDER / f"{name}.yaml"


def _summary(path: Path) -> str:
    """Return the first line of a recipe, which is a comment."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
