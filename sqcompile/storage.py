"""Programs in files: `.pt2` archives of torch.export that carry what torch.export does not know.

The graph, tensors and symbolic shapes are torch.export's own format, so that other tools read them;
signature names, level and sparsity promises are one JSON entry beside them.
"""

from __future__ import annotations

import base64
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sqcompile.operators.library  # noqa: F401 - registers the operators that archives may hold
from sqcompile.errors import FileError
from sqcompile.files import atomic_file, require_file
from sqcompile.levels import Level
from sqcompile.program import Program
from sqcompile.signature import Signature
from sqcompile.sparsity import Pattern, Sparsity

_ENTRY = "sqcompile.json"
_VERSION = 1


def save_program(program: Program, path: Path) -> None:
    """Write a program, whole or not at all.

    Raises:
        FileError: If the path cannot be written, or the program holds observers.
    """
    if program.level is Level.OBSERVED:
        raise FileError(
            "A program with observers cannot be saved.",
            where=str(path),
            seen=f"level {program.level}",
            next_step="freeze the observers first: freeze-observers",
        )
    exported = program.to_exported_program()
    entry = json.dumps(
        {
            "version": _VERSION,
            "signature": program.signature.to_json(),
            "level": program.level.value,
            "sparsity": {name: _pack(record) for name, record in program.sparsity.items()},
            # Which node of the traced program a node stands for: what comparing layers goes by.
            "stands_for": {
                node.name: node.meta["stands_for"]
                for node in program.compute_nodes()
                if "stands_for" in node.meta
            },
            "rescaled": {
                node.name: [list(node.meta["rescaled"].shape), node.meta["rescaled"].flatten().tolist()]
                for node in program.compute_nodes()
                if "rescaled" in node.meta
            },
        }
    )
    with atomic_file(path) as temporary:
        # torch.export.save wants its own suffix, and looks at the name for nothing else.
        archive = temporary.with_suffix(".pt2")
        try:
            torch.export.save(exported, archive, extra_files={_ENTRY: entry})
            archive.replace(temporary)
        finally:
            archive.unlink(missing_ok=True)


def load_program(path: Path) -> Program:
    """Read a `.pt2` file: one of ours with all it carries, or any other at level `ATEN`.

    Raises:
        FileError: If the file is missing, damaged, or from a newer version.
    """
    from sqcompile.tracing.export import from_exported_program

    require_file(path, "program")
    if not zipfile.is_zipfile(path):
        raise FileError(
            f"'{path}' is not a .pt2 file.",
            where=str(path),
            seen="no zip archive",
            expected="a file that Program.save or torch.export.save wrote",
            next_step="save the program again",
        )
    extra: dict[str, Any] = {_ENTRY: ""}
    try:
        exported = torch.export.load(path, extra_files=extra)
    except Exception as error:
        raise FileError(
            f"'{path}' cannot be loaded.",
            where=str(path),
            seen=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            expected="a file that Program.save or torch.export.save wrote",
            next_step="the file may be damaged, or need operators of a package that is not imported",
        ) from error
    program = from_exported_program(exported)
    text = extra[_ENTRY]
    if not text:
        return program
    try:
        entry = json.loads(text)
        if entry["version"] > _VERSION:
            raise FileError(
                f"'{path}' was written by a newer version.",
                where=str(path),
                seen=f"version {entry['version']}",
                expected=f"at most {_VERSION}",
                next_step="update sqcompile",
            )
        program.signature = Signature.from_json(entry["signature"])
        program.level = Level(entry["level"])
        program.sparsity = {name: _unpack(item) for name, item in entry["sparsity"].items()}
        for node in program.compute_nodes():
            if node.name in entry.get("stands_for", {}):
                node.meta["stands_for"] = entry["stands_for"][node.name]
            if node.name in entry.get("rescaled", {}):
                shape, factors = entry["rescaled"][node.name]
                node.meta["rescaled"] = torch.tensor(factors, dtype=torch.float64).reshape(shape)
    except FileError as error:
        if str(path) not in (error.where or ""):  # the signature knows no path
            error.where = f"{path}, {error.where}" if error.where else str(path)
        raise
    except (KeyError, ValueError, TypeError) as error:
        raise FileError(
            f"'{path}' carries a damaged description.",
            where=f"{path}, entry {_ENTRY}",
            seen=f"{type(error).__name__}: {error}",
            next_step="save the program again",
        ) from error
    return program


def _pack(record: Sparsity) -> dict[str, Any]:
    bits = np.packbits(record.mask.cpu().numpy().reshape(-1))
    return {
        "pattern": str(record.pattern),
        "shape": list(record.mask.shape),
        "mask": base64.b64encode(zlib.compress(bits.tobytes())).decode("ascii"),
    }


def _unpack(item: dict[str, Any]) -> Sparsity:
    bits = np.frombuffer(zlib.decompress(base64.b64decode(item["mask"])), dtype=np.uint8)
    count = int(np.prod(item["shape"]))
    mask = torch.from_numpy(np.unpackbits(bits, count=count).astype(bool)).reshape(item["shape"])
    return Sparsity(mask, Pattern.parse(item["pattern"]))
