"""What an artifact says about how it was made: its recipe, the versions of what made it, and what the data was."""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from sqcompile.data import DataFile
from sqcompile.errors import RecipeError
from sqcompile.input_spec import InputSpec

if TYPE_CHECKING:
    from sqcompile.pipeline import Pass
    from sqcompile.recipe import Recipe
    from sqcompile.signature import Signature

IN_MEMORY = "in memory"
"""What stands for data that was in no file; a hash may follow."""

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
    signature: Signature,
    example_inputs: object = None,
) -> dict[str, Any]:
    """Return what an artifact says about how it was made.

    Left out is what changes no result: threads, checks, caps on memory, where the output goes. What has no text, an
    object as the model or a lambda as an option, is left out of the recipe too, and named beside it.

    Args:
        model: What `compile` was given.
        recipe: The recipe that it was given, which also knows what inputs look like.
        passes: The passes that ran.
        backend: The backend that was asked for.
        calibration: The data that it was given.
        seed: The seed.
        signature: The program's interface, which says what inputs look like where no recipe does.
        example_inputs: The inputs that it was given.

    Returns:
        `recipe`, `seed`, `versions` and `data` (a hash, `in memory`, or None); `object`, the class of a model that was
        in memory; `left_out`, passes that the recipe lacks.
    """
    from sqcompile.recipe import Recipe

    recipe = recipe or Recipe()
    has_place = isinstance(model, (str, Path))
    data = DataFile(str(calibration)) if isinstance(calibration, (str, Path)) else calibration
    file = data if isinstance(data, DataFile) else None
    in_memory = data is not None and file is None
    inputs = recipe.inputs
    if not inputs and file is None and (in_memory or example_inputs is not None or not has_place):
        inputs = _inputs_of(signature)
    obstacles = {index: reason for index, item in enumerate(passes) if (reason := _obstacle(item))}
    written = [item for index, item in enumerate(passes) if index not in obstacles]
    made = dataclasses.replace(
        recipe,
        model=str(model) if has_place else None,
        passes=tuple(written),
        backend=backend,
        data=file,
        inputs=inputs,
        seed=seed,
        imports=recipe.imports or _modules_of(written),
        threads=None,
        verify="each",
        max_memory=None,
        work_dir=None,
        output=None,
    )
    about: dict[str, Any] = {
        "recipe": made.to_yaml(),
        "seed": seed,
        "data": batches_hash(data) if in_memory else None if file is None else data_hash(file),
        "versions": _versions(),
    }
    if not has_place:
        about["object"] = f"{type(model).__module__}.{type(model).__qualname__}"
    if obstacles:
        about["left_out"] = [
            f"pass {index + 1} of {len(passes)}, {passes[index].name}: {reason}"
            for index, reason in obstacles.items()
        ]
    return about


def read_provenance(path: str | Path) -> Mapping[str, Any]:
    """Return what an artifact says about how it was made: `provenance_of` lists it.

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
            seen="a program that was saved without being compiled, or a file of an older version",
            expected="an artifact that sqcompile.compile made",
            next_step="compile it with a recipe file: sqcompile compile -r recipe.yaml",
        )
    return found


def recipe_of(path: str | Path) -> Recipe:
    """Return the recipe that an artifact carries, after checking that it can be run again on the same data.

    Args:
        path: An artifact, or the folder with it. Paths of the recipe are relative to the present folder.

    Raises:
        FileError: If the artifact or its data cannot be read.
        RecipeError: If it carries none, the data is another, or the recipe lacks what had no text: the model, the data
            or a pass.
    """
    from sqcompile.recipe import Recipe

    found = read_provenance(path)
    gaps = list(_gaps(found))
    if gaps:
        raise RecipeError(
            f"The artifact was compiled {gaps[0].what}.",
            where=str(path),
            seen=gaps[0].seen,
            expected=gaps[0].expected,
            next_step=f"print its recipe (sqcompile recipe print {path} > job.yaml), add what it lacks "
            f"({', '.join(gap.mend for gap in gaps)}), and compile with that: sqcompile compile -r job.yaml",
        )
    recipe = Recipe.parse(str(found["recipe"]), file=f"{path}, recipe")
    stated = found["data"]
    if recipe.data is not None and (seen := data_hash(recipe.data)) != stated:
        raise RecipeError(
            "The data is not what the artifact was compiled with.",
            where=recipe.data.path,
            seen=seen,
            expected=stated,
            next_step="restore the file, or take the recipe without promise: sqcompile recipe print",
        )
    return recipe


def recipe_text(about: Mapping[str, Any]) -> str:
    """Return the recipe that an artifact carries as text, with comments on what it depends on and what it lacks.

    Args:
        about: What `read_provenance` returned.
    """
    lines = [f"{name} {number}" for name, number in about["versions"].items()]
    if about.get("data"):
        lines.append(f"data {about['data']}")
    lines += [gap.comment for gap in _gaps(about)]
    lines += about.get("left_out", ())
    return "".join(f"# {line}\n" for line in lines) + str(about["recipe"])


@dataclasses.dataclass(frozen=True)
class _Gap:
    """What a recipe lacks, because it has no text."""

    what: str
    seen: str
    expected: str
    mend: str
    comment: str


def _gaps(about: Mapping[str, Any]) -> Iterator[_Gap]:
    if "object" in about:
        yield _Gap(
            "from an object in memory",
            f"an object of the class {about['object']}",
            "a model that has a place: a Hugging Face folder, a .pt2 file, or module.py:factory",
            "`model:`",
            f"the model was an object in memory, of the class {about['object']}: add `model:`",
        )
    if str(about.get("data")).startswith(IN_MEMORY):
        yield _Gap(
            "with data that was in memory",
            str(about.get("data")),
            "data from a file",
            "`data:`",
            "the data was in memory: add `data:`",
        )
    if about.get("left_out"):
        yield _Gap(
            "with a pass that has no text",
            "; ".join(about["left_out"]),
            "passes that a recipe can name, with options that it can hold",
            "the pass",
            "passes that could not be written down are missing below:",
        )


def _obstacle(item: Pass) -> str | None:
    """Return why a recipe cannot hold a pass, or None: its text has to read back as the pass."""
    from sqcompile.pipeline.text import find_pass, parse_pass, pass_text

    home = f"{type(item).__module__}.{type(item).__qualname__}"
    try:
        known = find_pass(item.name) is type(item)
    except RecipeError:
        known = False
    if not known:
        return f"recipes do not know its class, {home}"
    if type(item).__module__ == "__main__":
        return f"its class, {home}, is defined in the script that was run"
    if _holds(lambda: parse_pass(pass_text(item)) == item):
        return None
    # Not the value: what has no text shows its address, which is another in each run.
    options = ", ".join(f"'{name}'" for name in _without_text(item))
    return f"what it was given for {options or 'an option'} cannot be written as text"


def _without_text(item: Pass) -> Iterator[str]:
    """Yield the options of a pass whose values do not read back from their text."""
    from sqcompile.pipeline.contract import option_fields

    hints = typing.get_type_hints(type(item))
    for option in option_fields(type(item)):
        value = getattr(item, option.name)
        if not _holds(partial(_reads_back, value, hints[option.name])):
            yield option.name.replace("_", "-")


def _reads_back(value: object, hint: Any) -> bool:
    from sqcompile.pipeline.text import coerce, parse_value, value_text

    return bool(coerce(parse_value(value_text(value)), hint) == value)


def _holds(claim: Callable[[], Any]) -> bool:
    """Whether a claim is true; options of users' own types may raise anything when printed, read or compared."""
    try:
        return bool(claim())
    except Exception:
        return False


def _modules_of(passes: Sequence[Pass]) -> tuple[str, ...]:
    """Return the modules that define passes which are not ours: a recipe has to import them first."""
    modules = (type(item).__module__ for item in passes)
    return tuple(dict.fromkeys(name for name in modules if name.partition(".")[0] != "sqcompile"))


def _inputs_of(signature: Signature) -> tuple[InputSpec, ...]:
    """Return what inputs look like as recipes say it; none if one of them cannot be said so."""
    try:
        return tuple(InputSpec.parse(str(value)) for value in signature.inputs)
    except RecipeError:  # constants, sizes that depend on each other, names that are no names
        return ()


def batches_hash(batches: object) -> str:
    """Return `in memory`, with the SHA-256 of the batches where they are a list or tuple of tensors or arrays.

    Whatever else gives batches may give others the next time, or none: it is not asked again.
    """
    if not isinstance(batches, (list, tuple)):
        return IN_MEMORY
    digest = hashlib.sha256()
    for batch in batches:
        leaves, structure = pytree.tree_flatten(batch)
        digest.update(f"{structure}\n".encode())
        for leaf in leaves:
            if not isinstance(leaf, (torch.Tensor, np.ndarray)):
                return IN_MEMORY
            tensor = torch.as_tensor(leaf).detach().cpu()
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"{IN_MEMORY}, sha256:{digest.hexdigest()}"


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
