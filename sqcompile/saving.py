"""Saving a compiled model: one file by suffix, or a folder that stands on its own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqcompile.backend import get_backend
from sqcompile.errors import FileError, did_you_mean
from sqcompile.files import atomic_file, atomic_folder, check_writable

if TYPE_CHECKING:
    from sqcompile.api import Compiled

SUFFIXES = {".onnx": "onnxruntime", ".sqm": "native", ".pt2": "reference"}
"""Suffix of an artifact's main file -> the backend that writes and loads it."""

GGUF = ".gguf"
"""Suffix of a language model for llama.cpp, which we write and do not load."""

# What a folder of Hugging Face has beside its weights that users of the compiled model need too.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "preprocessor_config.json",
)


def save_compiled(compiled: Compiled, path: Path) -> list[Path]:
    """Write a compiled model; see `Compiled.save`.

    Raises:
        FileError: If it cannot be written, or the suffix is unknown.
    """
    check_target(path)
    return _save_file(compiled, path) if path.suffix in SUFFIXES else _save_folder(compiled, path)


def check_target(path: Path) -> None:
    """Check that a compiled model can be written to `path`, before the work of compiling it.

    Raises:
        FileError: If the suffix is unknown, or it cannot be written.
    """
    # A folder may have a dot in its name too, as llama-3.2 has.
    names_a_file = re.fullmatch(r"\.[A-Za-z]\w{1,6}", path.suffix)
    known = (*SUFFIXES, GGUF)
    if names_a_file and path.suffix not in known and not path.is_dir():
        raise FileError(
            f"There is no artifact with the suffix '{path.suffix}'.",
            where=str(path),
            seen=path.suffix,
            expected=", ".join(known) + ", or a folder",
            next_step=did_you_mean(path.suffix, known),
        )
    check_writable(path, folder=path.suffix not in known)


def _save_file(compiled: Compiled, path: Path) -> list[Path]:
    if path.suffix == compiled.artifact.suffix:
        return compiled.artifact.save(path)
    return get_backend(SUFFIXES[path.suffix]).lower(compiled.program).save(path)


def _save_folder(compiled: Compiled, path: Path) -> list[Path]:
    """Write the artifact, the report, and tokenizer and configuration of the source folder."""
    with atomic_folder(path) as folder:
        if compiled.source is not None and Path(compiled.source).is_dir():
            copy_companions(Path(compiled.source), folder)
        compiled.artifact.save_folder(folder, _config(folder))
        with atomic_file(folder / "report.json") as file:
            file.write_text(compiled.report.to_json(), encoding="utf-8")
        names = sorted(item.relative_to(folder) for item in folder.rglob("*") if item.is_file())
    return [path / name for name in names]


def _config(folder: Path) -> dict[str, Any]:
    """Return what a folder says of its model; how it generates text stands in a file of its own."""
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            found |= json.loads((folder / name).read_text(encoding="utf-8"))
    return found


def copy_companions(source: Path, folder: Path, leave: Sequence[str] = ()) -> None:
    """Copy what a folder of Hugging Face has beside its weights.

    Args:
        source: The folder.
        folder: Where the copies go.
        leave: Files not to copy.
    """
    for name in _COMPANIONS:
        if name not in leave and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
