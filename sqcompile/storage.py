"""Programs in files: `.pt2` archives of torch.export that carry what torch.export does not know.

The graph, tensors and symbolic shapes are torch.export's own format, so that other tools read them;
signature names, level and sparsity promises are one JSON entry beside them.
"""

from __future__ import annotations

import base64
import json
import math
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

import sqcompile.operators.library  # noqa: F401 - registers the operators that archives may hold
from sqcompile.errors import Error, FileError, FormatError, VerifyError
from sqcompile.files import SteadyWriter, atomic_file, require_file
from sqcompile.levels import Level
from sqcompile.program import Program
from sqcompile.rotation import Rotation
from sqcompile.signature import Signature
from sqcompile.sparsity import Pattern, Sparsity
from sqcompile.verify import check_signature

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
            expected="level aten or qdq",
            next_step="freeze the observers first: freeze-observers",
        )
    exported = program.to_exported_program()
    stored = dict(program.tensors())
    entry = json.dumps(
        {
            "version": _VERSION,
            "signature": program.signature.to_json(),
            "level": program.level.value,
            "sparsity": {name: _pack(program.sparsity[name]) for name in stored if name in program.sparsity},
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
            "rotated": _pack_rotations(program),
        }
    )
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        # Through Python's file, and steadily: on a full disk PyTorch's own writer ends the process.
        writer = SteadyWriter(file)
        try:
            torch.export.save(exported, writer, extra_files={_ENTRY: entry})  # type: ignore[arg-type]
        except (OSError, Error):
            raise
        except Exception as error:
            raise FileError(
                "The program cannot be stored.",
                where=str(path),
                seen=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                expected="operators and constants that torch.export can write",
                next_step="please report it with the program's text: print(program)",
            ) from error
        writer.check()


def program_bytes(program: Program) -> bytes:
    """Return a program as the bytes of its file, to be sent to another process.

    Raises:
        FileError: If the program holds observers.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.pt2"
        save_program(program, path)
        return path.read_bytes()


def program_of_bytes(stored: bytes) -> Program:
    """Return the program that `program_bytes` has turned into bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.pt2"
        path.write_bytes(stored)
        return load_program(path)


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
    text = _read_entry(path)
    try:
        # Before the archive: it holds the structures of inputs and outputs, too, whose classes the
        # signature makes known.
        entry = None if text is None else _parse_entry(text, path)
        program = from_exported_program(_load_archive(path))
        if entry is not None:
            _apply(entry, program)
            check_signature(program)
    except Error as error:
        if str(path) not in (error.where or ""):  # the signature knows no path
            error.where = f"{path}, {error.where}" if error.where else str(path)
        if isinstance(error, VerifyError):  # parts of two files, or edited by hand
            raise FileError(
                f"'{path}' describes another program than it holds. {error.what}",
                where=error.where,
                seen=error.seen,
                expected=error.expected,
                next_step="save the program again",
            ) from error
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        zlib.error,
    ) as error:
        raise FileError(
            f"'{path}' carries a damaged description.",
            where=f"{path}, entry {_ENTRY}",
            seen=f"{type(error).__name__}: {error}",
            expected="what Program.save writes",
            next_step="save the program again",
        ) from error
    return program


def _read_entry(path: Path) -> str | None:
    """Return our entry of an archive, or None if it has none, after checking every checksum of it.

    PyTorch checks none: a flipped bit in a weight would load.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            names = [name for name in archive.namelist() if name.endswith(f"/extra/{_ENTRY}")]
            text = archive.read(names[0]).decode("utf-8") if names and not damaged else None
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        NotImplementedError,
        UnicodeDecodeError,
    ) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if damaged:
        raise _damaged(path, f"the checksum of '{damaged}' is wrong")
    return text


def _load_archive(path: Path) -> ExportedProgram:
    from sqcompile.tracing.explain import quiet

    try:
        with path.open("rb") as file, quiet():  # of a damaged one it would print a traceback
            # By path where possible: then tensors are read without a copy.
            return torch.export.load(path if path.suffix == ".pt2" else file)
    except Exception as error:
        raise _damaged(path, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error


def _damaged(path: Path, seen: str) -> FileError:
    return FileError(
        f"'{path}' cannot be loaded.",
        where=str(path),
        seen=seen,
        expected="a file that Program.save or torch.export.save wrote",
        next_step="save it again if it is damaged; if it needs operators of a package, import that first",
    )


def _parse_entry(text: str, path: Path) -> dict[str, Any]:
    entry = json.loads(text)
    if not isinstance(entry, dict) or not isinstance(entry["version"], int):
        raise TypeError("it is no table with a version")
    if entry["version"] > _VERSION:
        raise FileError(
            f"'{path}' was written by a newer version.",
            where=str(path),
            seen=f"version {entry['version']}",
            expected=f"at most {_VERSION}",
            next_step="update sqcompile",
        )
    entry["signature"] = Signature.from_json(entry["signature"])
    return entry


def _apply(entry: dict[str, Any], program: Program) -> None:
    """Give a program what torch.export does not know of it."""
    program.signature = entry["signature"]
    program.level = Level(entry["level"])
    program.sparsity = {name: _unpack(item) for name, item in entry["sparsity"].items()}
    for name, promise in program.sparsity.items():
        if not program.has_tensor(name) or program.tensor(name).shape != promise.mask.shape:
            raise ValueError(f"the mask of '{name}' fits no tensor")
    for node in program.compute_nodes():
        if node.name in entry.get("stands_for", {}):
            node.meta["stands_for"] = str(entry["stands_for"][node.name])
        if node.name in entry.get("rescaled", {}):
            shape, factors = entry["rescaled"][node.name]
            node.meta["rescaled"] = torch.tensor(factors, dtype=torch.float64).reshape(shape)
    if entry.get("rotated"):
        rotations = _unpack_rotations(entry["rotated"])
        for node in program.compute_nodes():
            if node.name in rotations:
                node.meta["rotated"] = rotations[node.name]


def _pack_rotations(program: Program) -> dict[str, Any]:
    """Return the rotations of nodes; their matrices, of which there are few, are stored once."""
    matrices: dict[int, tuple[int, torch.Tensor]] = {}
    nodes = {}
    for node in program.compute_nodes():
        rotation = node.meta.get("rotated")
        if rotation is None:
            continue
        for factor in rotation.factors:
            matrices.setdefault(id(factor), (len(matrices), factor))
        nodes[node.name] = {
            "factors": [matrices[id(factor)][0] for factor in rotation.factors],
            "diagonal": _pack_numbers(rotation.diagonal),
            "shift": None if rotation.shift is None else _pack_numbers(rotation.shift),
        }
    if not nodes:
        return {}
    return {"matrices": [_pack_numbers(matrix) for _, matrix in matrices.values()], "nodes": nodes}


def _unpack_rotations(entry: dict[str, Any]) -> dict[str, Rotation]:
    matrices = [_unpack_numbers(item) for item in entry["matrices"]]
    sides = [math.isqrt(matrix.numel()) for matrix in matrices]
    square = [matrix.reshape(side, side) for matrix, side in zip(matrices, sides, strict=True)]
    found = {}
    for name, item in entry["nodes"].items():
        shift = None if item["shift"] is None else _unpack_numbers(item["shift"])
        factors = tuple(square[index] for index in item["factors"])
        diagonal = _unpack_numbers(item["diagonal"])
        if math.prod(sides[index] for index in item["factors"]) != diagonal.numel():
            raise ValueError(f"the rotation of '{name}' does not fit together")
        found[name] = Rotation(diagonal, factors, shift)
    return found


def _pack_numbers(tensor: torch.Tensor) -> str:
    values = tensor.detach().cpu().to(torch.float64).contiguous().numpy()
    return base64.b64encode(zlib.compress(values.tobytes())).decode("ascii")


def _unpack_numbers(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.float64).copy())


def _pack(record: Sparsity) -> dict[str, Any]:
    bits = np.packbits(record.mask.cpu().numpy().reshape(-1))
    return {
        "pattern": str(record.pattern),
        "shape": list(record.mask.shape),
        "mask": base64.b64encode(zlib.compress(bits.tobytes())).decode("ascii"),
    }


def _unpack(item: dict[str, Any]) -> Sparsity:
    bits = np.frombuffer(zlib.decompress(base64.b64decode(item["mask"])), dtype=np.uint8)
    shape = [int(size) for size in item["shape"]]
    count = math.prod(shape)
    if len(bits) != -(-count // 8):
        raise ValueError(f"a mask of {len(bits)} bytes for {count} weights")
    mask = torch.from_numpy(np.unpackbits(bits, count=count).astype(bool)).reshape(shape)
    try:
        return Sparsity(mask, Pattern.parse(item["pattern"]))
    except FormatError as error:
        raise ValueError(error.what) from error
