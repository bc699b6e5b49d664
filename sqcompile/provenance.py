"""What an artifact says about how it was made: its recipe, the versions of what made it, and what the data was."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqcompile.data import DataFile
from sqcompile.errors import RecipeError

if TYPE_CHECKING:
    from sqcompile.pipeline import Pass
    from sqcompile.recipe import Recipe

_TOOLS = ("torch", "onnxscript")
"""What a graph, and a file of it, depends on beside sqcompile itself."""

_CHUNK = 1 << 20


def provenance_of(
    model: object,
    recipe: Recipe | None,
    *,
    passes: Sequence[Pass],
    backend: str,
    calibration: object,
    seed: int,
) -> dict[str, Any] | None:
    """Return what an artifact should say about how it was made, or None for a model that has no place of its own.

    Left out is what changes no result: threads, checks, caps on memory, where the output goes.

    Args:
        model: What `compile` was given.
        recipe: The recipe that it was given, which also knows what inputs look like.
        passes: The passes that ran.
        backend: The backend that was asked for.
        calibration: The data that it was given.
        seed: The seed.
    """
    from sqcompile.recipe import Recipe

    if not isinstance(model, (str, Path)):
        return None
    data = DataFile(str(calibration)) if isinstance(calibration, (str, Path)) else calibration
    in_memory = data is not None and not isinstance(data, DataFile)
    made = dataclasses.replace(
        recipe or Recipe(),
        model=str(model),
        passes=tuple(passes),
        backend=backend,
        data=data if isinstance(data, DataFile) else None,
        seed=seed,
        threads=None,
        verify="each",
        max_memory=None,
        work_dir=None,
        output=None,
    )
    return {
        "recipe": made.to_yaml(),
        "seed": seed,
        "data": "in memory" if in_memory else None if made.data is None else data_hash(made.data),
        "versions": _versions(),
    }


def read_provenance(path: str | Path) -> Mapping[str, Any]:
    """Return what an artifact says about how it was made.

    Args:
        path: An artifact, or the folder with it.

    Raises:
        FileError: If it cannot be read.
        RecipeError: If it says nothing.
    """
    from sqcompile.api import load

    found = load(path).signature.provenance
    if found is None:
        raise RecipeError(
            f"'{path}' carries no recipe.",
            where=str(path),
            seen="a model that was compiled from an object in memory, or by an older version",
            expected="an artifact that was compiled from a folder, a file, or module.py:factory",
            next_step="compile it with a recipe file: sqcompile compile -r recipe.yaml",
        )
    return found


def recipe_of(path: str | Path) -> Recipe:
    """Return the recipe that an artifact carries, after checking that its data is still what it was.

    Args:
        path: An artifact, or the folder with it. Paths of the recipe are relative to the present folder.

    Raises:
        FileError: If the artifact or its data cannot be read.
        RecipeError: If it carries none, or the data is another.
    """
    from sqcompile.recipe import Recipe

    found = read_provenance(path)
    recipe = Recipe.parse(str(found["recipe"]), file=f"{path}, recipe")
    stated = found["data"]
    if stated == "in memory":
        raise RecipeError(
            "The artifact was compiled with data that was in memory.",
            where=str(path),
            expected="data from a file",
            next_step="print its recipe (sqcompile recipe print), add `data:`, and compile with that",
        )
    if recipe.data is not None and (seen := data_hash(recipe.data)) != stated:
        raise RecipeError(
            "The data is not what the artifact was compiled with.",
            where=recipe.data.path,
            seen=seen,
            expected=stated,
            next_step="restore the file, or take the recipe without promise: sqcompile recipe print",
        )
    return recipe


def data_hash(data: DataFile) -> str:
    """Return the SHA-256 of a data file.

    Raises:
        FileError: If it cannot be read.
    """
    path, _ = data.check()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _versions() -> dict[str, str]:
    from sqcompile import __version__

    found = {"sqcompile": __version__}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
