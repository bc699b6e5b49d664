"""Bundles: folders that run a compiled model on another machine, without sqcompile and without Python.

What every bundle has is written here: the model, example inputs with the outputs that they have to give, and a
README. What runs the model, and the examples in code, come from its backend (`Backend.bundle`).
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sqcompile.errors import FileError, InputError, did_you_mean
from sqcompile.files import atomic_folder
from sqcompile.input_spec import example_call
from sqcompile.progress import Progress, SilentProgress
from sqcompile.saving import SUFFIXES, copy_companions
from sqcompile.signature import Signature

if TYPE_CHECKING:
    from sqcompile.backend import Session

TARGETS = ("x86_64-linux", "aarch64-linux")
"""Machines that a bundle can be for."""

_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


@dataclass(frozen=True)
class BundleJob:
    """What a backend's part of a bundle is made from.

    Attributes:
        source: The artifact's main file.
        target: One of `TARGETS`.
        inputs: Example inputs by name, in the model's order.
        outputs: What the model makes of them, by name, in the model's order.
        threads: Threads within an operator.
        runtime: Folder with a runtime that was built elsewhere, or None.
        progress: Where long work reports.
    """

    source: Path
    target: str
    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]
    threads: int
    runtime: Path | None = None
    progress: Progress = field(default_factory=SilentProgress)


@dataclass(frozen=True)
class BundlePart:
    """What a backend has written into a bundle.

    Attributes:
        model: Name of the model's file in it.
        files: What each file is for, by name, for the README.
        usage: How to run the model, as Markdown.
    """

    model: str
    files: Mapping[str, str]
    usage: str


def write_bundle(
    source: str | Path,
    folder: str | Path,
    *,
    target: str | None = None,
    runtime: str | Path | None = None,
    session: Session | None = None,
    inputs: Sequence[Any] | None = None,
    threads: int | None = None,
    runs: int = 30,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a folder that runs an artifact without sqcompile, whole or not at all.

    Args:
        source: A `.sqm` or `.onnx` file.
        folder: The folder; new or empty.
        target: One of `TARGETS`; None: this machine.
        runtime: Folder with the native runtime for the target (`sqrun`, `libsqcompile.so`), where it was built by other
            means than a compiler on this machine.
        session: The loaded artifact; None: it is loaded.
        inputs: Flat inputs of one call, for the example; None: made up.
        threads: Threads within an operator; None: as many as PyTorch uses.
        runs: Calls to measure, where the target is this machine.
        progress: Where long work reports.

    Returns:
        The files that were written.

    Raises:
        FileError: If the artifact cannot be read, the folder is not empty or cannot be written.
        InputError: If there is no such target, or inputs cannot be made up.
        BackendError: If the runtime for the target is neither there nor can be built; the text says what to install.
    """
    from sqcompile.api import load
    from sqcompile.backend import get_backend

    source, folder = Path(source), Path(folder)
    target = check_bundle_target(target)
    _check_empty(folder)
    if source.suffix not in SUFFIXES:
        raise FileError(
            f"'{source}' is no artifact.",
            where=str(source),
            seen=f"suffix '{source.suffix}'",
            expected=".sqm or .onnx",
            next_step="pass the file that compiled.save wrote",
        )
    threads = threads or torch.get_num_threads()
    progress = progress or SilentProgress()
    session = session or load(source, threads=threads)
    flat = list(inputs) if inputs is not None else _made_up(session.signature, source)
    outputs = session.run(flat)
    signature = session.signature
    job = BundleJob(
        source,
        target,
        {
            value.name: to_numpy(item)
            for value, item in zip(signature.inputs, flat, strict=True)
            if value.is_tensor
        },
        {
            value.name: to_numpy(item)
            for value, item in zip(signature.outputs, outputs, strict=True)
            if isinstance(item, torch.Tensor)
        },
        threads,
        None if runtime is None else Path(runtime),
        progress,
    )
    with atomic_folder(folder) as temporary:
        part = get_backend(SUFFIXES[source.suffix]).bundle(job, temporary)
        if (source.parent / "report.json").is_file():  # a folder that `save` made, tokenizer included
            copy_companions(source.parent, temporary)
        measured = _measure(session, flat, runs, threads, progress) if target == this_target() else None
        text = _readme(job, part, signature, measured, temporary)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        names = sorted(item.relative_to(temporary) for item in temporary.rglob("*") if item.is_file())
    return [folder / name for name in names]


def this_target() -> str:
    """Return the name of this machine among targets, such as `x86_64-linux`."""
    machine = platform.machine().lower()
    return f"{_MACHINES.get(machine, machine)}-{sys.platform}"


def check_bundle_target(target: str | None) -> str:
    """Return a target, this machine if None.

    Raises:
        InputError: If there is none of that name.
    """
    target = target or this_target()
    if target not in TARGETS:
        raise InputError(
            f"There are no bundles for '{target}'.",
            where="target",
            seen=target,
            expected=", ".join(TARGETS),
            next_step=did_you_mean(target, TARGETS),
        )
    return target


def write_arrays(folder: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays as `.npy` files, by name, into a new folder."""
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name.replace('/', '_')}.npy", array)


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """Return a tensor as an array; bfloat16, which NumPy has not, as float32."""
    detached = tensor.detach()
    return (detached.float() if detached.dtype is torch.bfloat16 else detached).cpu().contiguous().numpy()


def _check_empty(folder: Path) -> None:
    if not folder.is_dir():
        return  # what else is in the way is found where the folder is made
    found = sorted(item.name for item in folder.iterdir())
    if not found:
        return
    raise FileError(
        f"'{folder}' is not empty.",
        where=str(folder),
        seen=", ".join(found[:5]) + (", …" if len(found) > 5 else ""),
        expected="a new or empty folder, so that nothing in the bundle is of another model",
        next_step="name another folder, or remove what is in it",
    )


def _made_up(signature: Signature, source: Path) -> list[Any]:
    call = example_call(signature)
    if call is None:
        raise InputError(
            "The artifact's inputs have sizes that depend on each other.",
            where=str(source),
            seen=", ".join(str(value) for value in signature.inputs),
            expected="the inputs of one call",
            next_step="give it data: --data FILE.npz",
        )
    return signature.bind(*call)


def _measure(
    session: Session, inputs: list[Any], runs: int, threads: int, progress: Progress
) -> dict[str, str]:
    from sqcompile.measure import alternate
    from sqcompile.report import environment
    from sqcompile.report_tables import time_text

    (times,) = alternate(lambda: session.run(inputs), runs=runs, progress=progress)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if runs > 1 else (times[0],) * 3
    return {
        "one call": f"{time_text(statistics.median(times))} (median of {runs}; the middle half took "
        f"{time_text(low)} to {time_text(high)}), through sqcompile",
        "threads": str(threads),
        "CPU": environment()["cpu"],
    }


def _readme(
    job: BundleJob, part: BundlePart, signature: Signature, measured: Mapping[str, str] | None, folder: Path
) -> str:
    from sqcompile import __version__
    from sqcompile.report_tables import size_text

    size = sum(file.stat().st_size for file in folder.glob(f"{Path(part.model).stem}*"))
    lines = [
        f"# {job.source.stem}, for {job.target}",
        "",
        f"Made by sqcompile {__version__}, which is not needed to run it.",
        "",
        *_table("file", "what for", {f"`{name}`": text for name, text in part.files.items()}),
        "## Inputs and outputs",
        "",
        "| | name | type | in the example |",
        "|---|---|---|---|",
    ]
    for kind, values, arrays in (
        ("input", signature.inputs, job.inputs),
        ("output", signature.outputs, job.outputs),
    ):
        for value in values:
            if value.name in arrays:
                kind_of = str(value).partition(": ")[2]
                lines.append(f"| {kind} | `{value.name}` | `{kind_of}` | {list(arrays[value.name].shape)} |")
    lines += ["", "Named sizes may change from call to call. Data is row-major.", "", part.usage.strip(), ""]
    lines += ["## Figures", ""]
    figures = {"model": size_text(size), **_reported(job.source)}
    if measured is None:
        figures["one call"] = f"not measured: this bundle was made on another machine than {job.target}"
    lines += _table("", "", {**figures, **(measured or {})})
    return "\n".join(lines)


def _table(left: str, right: str, rows: Mapping[str, str]) -> list[str]:
    return [f"| {left} | {right} |", "|---|---|", *(f"| {key} | {text} |" for key, text in rows.items()), ""]


def _reported(source: Path) -> dict[str, str]:
    """Return figures of the report that `save` wrote beside an artifact, if it did."""
    from sqcompile.report_tables import size_text, time_text

    try:
        report = json.loads((source.parent / "report.json").read_text(encoding="utf-8"))
        found = {}
        if report.get("dense_file_bytes"):
            found["dense model"] = size_text(report["dense_file_bytes"])
        distance = report.get("output_distance")
        if distance and distance["finite"]:
            level = "exact" if distance["sqnr_db"] is None else f"{distance['sqnr_db']:.1f} dB SQNR"
            found["outputs"] = f"{level} against the dense model, on the data that it was compiled with"
        latency = report.get("latency")
        if latency:
            ratio = latency["dense_ns"] / latency["compiled_ns"]
            found["when compiled"] = (
                f"{time_text(latency['dense_ns'])} → {time_text(latency['compiled_ns'])}, {ratio:.2f}x, "
                f"{latency['threads']} threads, {report['environment']['cpu']}"
            )
        return found
    except (OSError, ValueError, LookupError, TypeError):  # none, or another tool's of that name
        return {}
