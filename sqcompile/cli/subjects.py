"""Opening what a command line names: models, programs and artifacts, and the data to run them on."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqcompile.errors import InputError

if TYPE_CHECKING:
    from sqcompile.backend import Session
    from sqcompile.data import DataFile
    from sqcompile.program import Program
    from sqcompile.signature import Signature


_ARTIFACTS = (".onnx", ".sqm")

_MADE_UP = "there is no data: the inputs are made up"


@dataclass
class Subject:
    """A model or an artifact.

    Attributes:
        name: As the command line names it.
        signature: Its inputs and outputs.
        batches: Batches of keyword inputs: the data's, or one of random numbers.
        notes: What to say about the data.
        program: The program, where there is one.
        session: The loaded artifact, where it is one.
        path: The artifact's file, where it is one.
    """

    name: str
    signature: Signature
    batches: Iterable[Any]
    notes: list[str] = field(default_factory=list)
    program: Program | None = None
    session: Session | None = None
    path: Path | None = None

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run on flat inputs."""
        import torch

        if self.session is not None:
            return self.session.run(inputs)
        assert self.program is not None
        with torch.no_grad():
            return self.program.run(inputs)


@dataclass(frozen=True)
class Feed:
    """What to run subjects on.

    Attributes:
        data: A data file, or None.
        inputs: Descriptions of inputs, for models without data.
        batches: What an earlier subject ran on, so that all run on the same; wins over both.
    """

    data: DataFile | None = None
    inputs: Sequence[str] = ()
    batches: Iterable[Any] | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Feed:
        """Return what the options `data`, `batch`, `samples`, `context`, `tokenizer` and `inputs` say."""
        return cls(data_file(options), options.get("inputs") or ())


def data_file(options: Mapping[str, Any]) -> DataFile | None:
    """Return the data file that the options of `sqcompile.cli.options` describe."""
    from sqcompile.data import DataFile

    if options.get("data") is None:
        return None
    names = ("batch", "samples", "context", "tokenizer")
    return DataFile(options["data"], **{name: options.get(name) for name in names})


def open_subject(name: str, feed: Feed, threads: int | None = None) -> Subject:
    """Open an artifact (`.onnx`, `.sqm`, or the folder with it) or a model.

    Raises:
        Error: If it cannot be opened, or its inputs are not known.
    """
    artifact = artifact_file(name)
    return open_model(name, feed) if artifact is None else open_artifact(name, artifact, feed, threads)


def open_model(name: str, feed: Feed) -> Subject:
    """Load and trace a model.

    Raises:
        Error: If it cannot be loaded or traced, or its inputs are not known.
    """
    from sqcompile.cli.answer import progress
    from sqcompile.data import Batches
    from sqcompile.input_spec import InputSpec, example_inputs
    from sqcompile.models import load_model
    from sqcompile.opening import find_inputs, trace_any

    progress().note(f"loading {name}")
    model = load_model(name)
    batches = feed.batches
    if batches is None and feed.data is not None:
        batches = feed.data.open(model, name)
    specs = [InputSpec.parse(text) for text in feed.inputs]
    inputs = find_inputs(model, example_inputs(specs) if specs and batches is None else None, batches)
    if inputs is None:
        raise unknown_inputs(model)
    axes = {spec.name: spec.dynamic_axes() for spec in specs if spec.dynamic_axes()}
    program = trace_any(model, inputs, axes or None, source=name, data=batches)
    if batches is None:
        return Subject(name, program.signature, [inputs], [_MADE_UP], program=program)
    if isinstance(batches, Batches):
        batches = batches.bind(program.signature)
    return Subject(name, program.signature, batches, getattr(batches, "notes", []), program=program)


def open_artifact(name: str, path: Path, feed: Feed, threads: int | None) -> Subject:
    """Load an artifact as a session.

    Raises:
        Error: If it cannot be loaded.
    """
    from sqcompile.input_spec import example_call

    session = open_session(path, threads)
    if feed.batches is not None:
        return Subject(name, session.signature, feed.batches, session=session, path=path)
    if feed.data is not None:
        batches = feed.data.open(session, path)
        return Subject(name, session.signature, batches, batches.notes, session=session, path=path)
    call = example_call(session.signature)
    if call is None:
        raise InputError(
            "The artifact's inputs have sizes that depend on each other.",
            where=name,
            seen=", ".join(str(value) for value in session.signature.inputs),
            next_step="give it data: --data FILE.npz",
        )
    return Subject(name, session.signature, [call], [_MADE_UP], session=session, path=path)


def open_session(path: Path, threads: int | None) -> Session:
    """Load an artifact, ours or of another tool.

    Raises:
        Error: If it cannot be loaded.
    """
    from sqcompile.api import load
    from sqcompile.cli.foreign import ForeignSession, is_ours

    ours = path.suffix != ".onnx" or is_ours(path)
    return load(path, threads=threads) if ours else ForeignSession(path, threads)


def artifact_file(name: str) -> Path | None:
    """Return the file of an artifact that a runtime runs: itself, or the one in a folder."""
    path = Path(name)
    if path.is_dir():
        return next((file for kind in _ARTIFACTS if (file := path / f"model{kind}").is_file()), None)
    return path if path.suffix in _ARTIFACTS else None


def flat_batches(subject: Subject, batches: Iterable[Any]) -> list[list[Any]]:
    """Return batches as a subject's flat inputs.

    Raises:
        CalibrationError: If one does not fit.
    """
    from sqcompile.calibration import Calibration
    from sqcompile.errors import CalibrationError

    try:
        return list(Calibration(list(batches), subject.signature))
    except CalibrationError as error:
        sizes = {value.shape[0] for value in subject.signature.tensor_inputs if value.shape}
        if (
            str(error.where).endswith("dimension 0")
            and len(sizes) == 1
            and isinstance(size := sizes.pop(), int)
        ):
            error.next_step = f"'{subject.name}' takes {size} samples a call: --batch {size}"
        raise


def unknown_inputs(model: object) -> InputError:
    """Return the error for a module about whose inputs nothing is known."""
    forward = getattr(model, "forward", None)
    names = list(inspect.signature(forward).parameters) if forward else []
    first = names[0] if names else "x"
    return InputError(
        "The model's inputs are not known.",
        where=type(model).__name__,
        seen=f"forward({', '.join(names)}), no data, and no `dummy_inputs`",
        expected="data, or a description of each input",
        next_step=f"add --data FILE.npz (with an array '{first}'), or --input '{first}: f32[batch, 3, 224, 224]'",
    )
