"""`sqcompile bench`: models and artifacts against each other, in one run on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqcompile.cli import options
from sqcompile.cli.answer import Answer, command, progress
from sqcompile.cli.bench_kernels import bench_kernels

if TYPE_CHECKING:
    from rich.console import Console

    from sqcompile.backend import Session
    from sqcompile.cli.subjects import Subject


@dataclass(frozen=True)
class Timing:
    """How long the calls of one subject took.

    Attributes:
        name: As the command line names it.
        backend: What ran it.
        median_ns: Median of one call, in ns.
        low_ns: The quarter of the calls that were faster took at most this.
        high_ns: The quarter of the calls that were slower took at least this.
        ratio: How many times faster than the first subject.
        size_bytes: Size of the artifact.
    """

    name: str
    backend: str
    median_ns: float
    low_ns: float
    high_ns: float
    ratio: float
    size_bytes: int


@command
def bench(
    subjects: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL_OR_ARTIFACT...",
            help=f".sqm and .onnx files, folders with one; {options.MODEL_HELP}",
            show_default=False,
        ),
    ] = None,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Measure the native engine's kernels on this machine, about a minute: from then on, compiling "
            "chooses the form of weights by these times.",
        ),
    ] = False,
    runs: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 50,
    warmup: Annotated[int, typer.Option(min=0, help="Calls of each before.")] = 5,
    threads: options.Threads = None,
    backend: options.Backend = None,
    data: options.Data = None,
    batch: options.Batch = None,
    context: options.Context = None,
    tokenizer: options.Tokenizer = None,
    inputs: options.Inputs = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> Answer:
    """Measure latency: call models and artifacts in turns, and compare medians.

    A model is first lowered, without passes, to the backend that `--backend` names. All are called with
    the same inputs, in turns, so that a drift of the machine's speed meets all alike; the ratio says how
    many times faster than the first one is.

    **Examples**

        sqcompile bench nets.py:resnet build/resnet.onnx -d images.npz --threads 1

        sqcompile bench dense.onnx int8.sqm sparse.sqm --runs 200

        sqcompile bench --kernels
    """
    if kernels:
        if subjects:
            raise typer.BadParameter(f"--kernels measures no models: leave out {', '.join(subjects)}")
        return bench_kernels(backend or "native", threads)
    if not subjects:
        raise typer.BadParameter("name models or artifacts to measure, or pass --kernels")
    import torch

    from sqcompile.cli.subjects import Feed, flat_batches, open_subject
    from sqcompile.measure import alternate

    feed = Feed.of(locals())
    count = threads or torch.get_num_threads()
    torch.set_num_threads(count)
    opened = [open_subject(subjects[0], feed, count)]
    same = Feed(batches=opened[0].batches)
    opened += [open_subject(name, same, count) for name in subjects[1:]]
    lowered = [_session(subject, backend or "auto", count) for subject in opened]
    first_batch = next(iter(opened[0].batches))
    calls = [
        _call(session, flat_batches(subject, [first_batch])[0])
        for subject, (session, _, _) in zip(opened, lowered, strict=True)
    ]
    times = alternate(*calls, runs=runs, warmup=warmup, progress=progress())
    timings = _timings(opened, lowered, times)
    about = _about(opened[0], first_batch, count, runs)
    return Answer(
        lambda target: _show(target, timings, about), {**about, "timings": [asdict(item) for item in timings]}
    )


def _session(subject: Subject, backend: str, threads: int) -> tuple[Session, str, int]:
    """Return a session, the name of its backend and the artifact's size."""
    from sqcompile.api import choose_backend
    from sqcompile.backend import get_backend
    from sqcompile.saving import SUFFIXES

    if subject.session is not None:
        assert subject.path is not None
        size = sum(file.stat().st_size for file in subject.path.parent.glob(f"{subject.path.name}*"))
        return subject.session, SUFFIXES[subject.path.suffix], size
    assert subject.program is not None
    target = choose_backend(subject.program)[0] if backend == "auto" else get_backend(backend)
    artifact = target.lower(subject.program)
    return target.load(artifact, threads=threads), target.name, artifact.size_bytes


def _call(session: Session, inputs: list[Any]) -> Any:
    return lambda: session.run(inputs)


def _timings(
    subjects: list[Subject], lowered: list[tuple[Session, str, int]], times: list[list[float]]
) -> list[Timing]:
    from statistics import median, quantiles

    first = median(times[0])
    found = []
    for subject, (_, backend, size_bytes), taken in zip(subjects, lowered, times, strict=True):
        low, _, high = quantiles(taken, n=4, method="inclusive") if len(taken) > 1 else (taken[0],) * 3
        found.append(
            Timing(subject.name, backend, median(taken), low, high, first / median(taken), size_bytes)
        )
    return found


def _about(subject: Subject, batch: Any, threads: int, runs: int) -> dict[str, Any]:
    from sqcompile.report import environment
    from sqcompile.signature import describe_type

    shapes = [
        f"{value.name}: {describe_type(value.dtype, tuple(leaf.shape))}"
        for value, leaf in zip(subject.signature.inputs, _flat(subject, batch), strict=True)
        if value.is_tensor
    ]
    return {
        "inputs": shapes,
        "runs": runs,
        "notes": subject.notes,
        "environment": {**environment(), "threads": str(threads)},
    }


def _flat(subject: Subject, batch: Any) -> list[Any]:
    from sqcompile.cli.subjects import flat_batches

    return flat_batches(subject, [batch])[0]


def _show(target: Console, timings: list[Timing], about: dict[str, Any]) -> None:
    from rich.table import Table

    from sqcompile.report_tables import size_text, time_text

    table = Table()
    for title in ("", "backend", "size", "median", "middle half", "speed"):
        table.add_column(title, justify="left" if title in ("", "backend") else "right", overflow="fold")
    for index, item in enumerate(timings):
        table.add_row(
            item.name,
            item.backend,
            size_text(item.size_bytes),
            time_text(item.median_ns),
            f"{time_text(item.low_ns)} – {time_text(item.high_ns)}",
            "1.00x (the first)" if index == 0 else f"{item.ratio:.2f}x",
        )
    target.print(table)
    environment = about["environment"]
    target.print(f"Inputs: {', '.join(about['inputs'])}", markup=False)
    for note in about["notes"]:
        target.print(f"Note: {note}", markup=False)
    target.print(
        f"{about['runs']} alternating calls of each, {environment['threads']} threads, {environment['cpu']}, "
        f"torch {environment['torch']}",
        markup=False,
    )
