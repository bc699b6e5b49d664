"""`sqcompile compare`: two models or artifacts on the same data, and the layer where they part."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from sqcompile.cli import options
from sqcompile.cli.answer import Answer, command, progress

if TYPE_CHECKING:
    from rich.console import Console

    from sqcompile.api import Compiled
    from sqcompile.bisect import PassStep, Trial
    from sqcompile.cli.file_values import Fed, FileValues
    from sqcompile.cli.subjects import Subject
    from sqcompile.compare import LayerDistance, NamedValues
    from sqcompile.metrics import Distance
    from sqcompile.pipeline import Pass
    from sqcompile.pipeline.manager import Instrument
    from sqcompile.program import Program
    from sqcompile.recipe import Recipe
    from sqcompile.watched import WatchedSession

_JUMP_DB = 10.0
"""A fall of the SQNR by so much, from one layer to the next, is called a jump."""

_ROUNDING_DB = 100.0
"""Above it, two values differ by the rounding of float32 only."""

_GOOD_DB = 50.0
"""What counts as undisturbed: above it, a fall is the first rounding and no jump."""

_MAX_NAMES = 8
"""So many layers that were not compared are named."""


@command
def compare(
    reference: Annotated[
        str, typer.Argument(metavar="A", help=f"What is right: an .onnx file; {options.MODEL_HELP}")
    ],
    other: Annotated[str, typer.Argument(metavar="B", help="What to judge, in one of these forms too.")],
    data: options.Data = None,
    batch: options.Batch = None,
    samples: options.Samples = None,
    context: options.Context = None,
    tokenizer: options.Tokenizer = None,
    inputs: options.Inputs = None,
    threads: options.Threads = None,
    bisect: Annotated[
        bool,
        typer.Option(
            "--bisect",
            help="Compile B's recipe again: name the pass after which the outputs part; then leave the worst layers in "
            "floating point, one more each time, until the outputs are 10 dB better, and print the passes to paste.",
        ),
    ] = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> Answer:
    """Compare two models or artifacts: their outputs, and layer by layer where the error comes from.

    SQNR is the power of the signal over that of the error: 20 dB is an error of a tenth, 40 dB of a
    hundredth. Layers are paired by name. Outputs are those of the runtimes, and so are the layers of an .onnx or .sqm
    file: the recipe that it carries is compiled again, with each layer's value as a further output. An .onnx file whose
    recipe cannot be run (of an object in Python), or that another tool wrote, is asked for its values itself.

    **Examples**

        sqcompile compare nets.py:resnet build/resnet.onnx -d images.npz

        sqcompile compare dense.pt2 pruned.pt2 -d images.npz --samples 32

        sqcompile compare nets.py:resnet build/resnet.onnx -d images.npz --bisect
    """
    from sqcompile.cli.subjects import Feed, flat_batches, open_subject

    feed = Feed.of(locals())
    first = open_subject(reference, feed, threads)
    batches = list(first.batches)
    second = open_subject(other, Feed(batches=first.batches), threads)
    _check_outputs(first, second)
    pairs = list(zip(flat_batches(first, batches), flat_batches(second, batches), strict=True))
    outputs = _compare_outputs(first, second, pairs)
    layers, why_not = _compare_layers(first, second, [flat for flat, _ in pairs], threads)
    jump = find_jump(layers)
    steps, trials = _bisect(first, second, [flat for flat, _ in pairs]) if bisect else ([], [])
    blamed = find_jump(steps)
    about = {
        "reference": reference,
        "other": other,
        "batches": len(batches),
        "outputs": {name: _data(distance) for name, distance in outputs.items()},
        "layers": [
            {"name": row.name, "node": row.node, "place": row.place, **_data(row.distance)} for row in layers
        ],
        "jump": None if jump is None else layers[jump].name,
        "notes": [*first.notes, *why_not],
        "passes": [{"pass": step.text, **_data(step.distance)} for step in steps],
        "pass_jump": None if blamed is None else steps[blamed].text,
        "bisect": [_trial_data(trial, trials[0]) for trial in trials],
    }
    return Answer(lambda target: _show(target, about, outputs, layers, jump), about)


def find_jump(layers: Sequence[LayerDistance | PassStep]) -> int | None:
    """Return the index of the first layer, or pass, at which the error jumps; None if it grows evenly.

    A jump is a fall of the SQNR by 10 dB or more below the least of the layers before it, which counts
    as 50 dB at most, so that a first rounding from exact to 41 dB is none.
    """
    least = _GOOD_DB
    for index, row in enumerate(layers):
        level = row.distance.sqnr_db if row.distance.finite else -math.inf
        if level <= least - _JUMP_DB:
            return index
        least = min(least, level)
    return None


def _check_outputs(first: Subject, second: Subject) -> None:
    from sqcompile.errors import InputError

    names = [
        [value.name for value in subject.signature.outputs if value.is_tensor] for subject in (first, second)
    ]
    if len(names[0]) != len(names[1]):
        raise InputError(
            "The two have different outputs, so they cannot be compared.",
            where=f"{first.name} and {second.name}",
            seen=f"{', '.join(names[0])} and {', '.join(names[1])}",
            expected="the same outputs in the same order",
            next_step="compare a model with what was compiled from it",
        )


def _compare_outputs(
    first: Subject, second: Subject, pairs: Sequence[tuple[list[Any], list[Any]]]
) -> dict[str, Distance]:
    import torch

    from sqcompile.errors import InputError
    from sqcompile.metrics import DistanceMeter

    meters: dict[str, DistanceMeter] = {}
    for left, right in progress().track(pairs, "running both"):
        for value, expected, seen in zip(
            first.signature.outputs, first.run(left), second.run(right), strict=True
        ):
            if not isinstance(expected, torch.Tensor):
                continue
            if expected.shape != seen.shape:
                raise InputError(
                    f"The output '{value.name}' has two different shapes.",
                    where=f"{first.name} and {second.name}",
                    seen=f"{tuple(expected.shape)} and {tuple(seen.shape)}",
                    expected="equal shapes",
                    next_step="compare a model with what was compiled from it",
                )
            meters.setdefault(value.name, DistanceMeter()).add(expected, seen)
    return {name: meter.result() for name, meter in meters.items()}


def _compare_layers(
    first: Subject, second: Subject, batches: Sequence[list[Any]], threads: int | None
) -> tuple[list[LayerDistance], list[str]]:
    """Return one row a layer, and what to say about them: with none, the reason."""
    from sqcompile.compare import compare_layers
    from sqcompile.errors import BackendError

    sides: list[_Side | _FileSide] = []
    for subject in (first, second):
        side, reason = _side_of(subject, threads)
        if side is None:
            return [], [reason]
        sides.append(side)
    tracked = progress().track(batches, "comparing layers")
    left, right = sides
    if isinstance(left, _FileSide) or isinstance(right, _FileSide):
        return _compare_named(left, right, tracked)
    try:
        rows = compare_layers(
            left.program, right.program, tracked, run_reference=left.run, run_program=right.run
        )
        notes = [note for side in sides for note in side.notes()]
    except BackendError as error:
        # A runtime that cannot hand the layers over is no reason to show none.
        rows = compare_layers(left.program, right.program, batches)
        notes = [f"the layers are those of the recipes, run in PyTorch: {error.what}"]
    return rows, notes if rows else [*notes, "the two have no layers of the same names"]


def _compare_named(
    left: _Side | _FileSide, right: _Side | _FileSide, batches: Iterable[Sequence[Any]]
) -> tuple[list[LayerDistance], list[str]]:
    """Compare by the names of values, which is all that a file without a recipe has."""
    from sqcompile.compare import compare_named
    from sqcompile.errors import BackendError

    # A program knows its layers and their lines; a file has operators, which may belong to one layer.
    knows = left if isinstance(right, _FileSide) and isinstance(left, _Side) else right
    layers = knows.values.layers()
    try:
        rows = compare_named(left.values, right.values, layers, batches)
        notes = [note for side in (left, right) for note in side.notes()]
    except BackendError as error:
        return [], [f"layers cannot be compared: {error}"]
    judged = {row.node for row in rows}
    missing = [layer.name for layer in layers if layer.node not in judged]
    if not rows:
        return [], [
            f"'{left.name}' and '{right.name}' show their outputs only: no layer's value has the same name and shape "
            "in both. Files of sqcompile, of torch.onnx.export(dynamo=True), and what onnxruntime.quantization makes "
            "of these have the names of the traced model"
        ]
    if missing:
        notes.append(
            f"{len(missing)} of {len(layers)} layers have no value of one shape in both (fused, rotated or pruned): "
            f"{', '.join(missing[:_MAX_NAMES])}{', …' if len(missing) > _MAX_NAMES else ''}"
        )
    return rows, notes


@dataclass(frozen=True)
class _Side:
    """A program to compare, and what runs it: None is PyTorch."""

    name: str
    program: Program
    run: WatchedSession | None = None

    @cached_property
    def values(self) -> NamedValues:
        """Its values by name."""
        from sqcompile.compare import ProgramValues

        return ProgramValues(self.program, self.run)

    def notes(self) -> list[str]:
        """Return what to say about the layers, once they have been compared."""
        if self.run is None:
            return []
        return [
            _said(
                f"the layers of '{self.name}' are its runtime's own: its recipe was compiled again with each of them "
                "as an output",
                "so compiled",
                self.run.apart,
            )
        ]


@dataclass(frozen=True)
class _FileSide:
    """An ONNX file to compare whose recipe cannot be run again, if it has any."""

    name: str
    values: FileValues

    def notes(self) -> list[str]:
        """Return what to say about the layers, once they have been compared."""
        names = "" if self.values.ours else ", paired by equal names"
        return [
            _said(
                f"the layers of '{self.name}' are the file's own values, each as a further output of it{names}",
                "with them",
                self.values.apart,
            )
        ]


def _said(about: str, when: str, apart: Distance) -> str:
    """Add by how much the outputs of what was watched differ from those of the file, if they do."""
    if apart.finite and apart.sqnr_db >= _ROUNDING_DB:
        return about
    return f"{about}; {when}, its outputs are not the file's: {apart}, as operators fuse differently"


def _side_of(subject: Subject, threads: int | None) -> tuple[_Side | _FileSide | None, str]:
    """Return what shows the layers of a subject, or why nothing does.

    An artifact's program is made again by the recipe that it carries; an .onnx file that carries none which can be run
    is asked for its values itself.
    """
    from sqcompile.backend import get_backend
    from sqcompile.errors import Error
    from sqcompile.provenance import recipe_of
    from sqcompile.saving import SUFFIXES
    from sqcompile.watched import WatchedSession

    if subject.program is not None:
        return _Side(subject.name, subject.program), ""
    assert subject.path is not None and subject.session is not None
    try:
        recipe = recipe_of(subject.path)
    except Error as error:
        if subject.path.suffix == ".onnx":
            return _file_side(subject, threads)
        return None, (
            f"'{subject.name}' shows its outputs only: {error.what} Save what was compiled as .onnx or .pt2 too "
            "(compiled.save('model.onnx')): their layers can be compared"
        )
    program = _compile(recipe, recipe.passes).program
    writer = SUFFIXES[subject.path.suffix]
    # The recipe's own where that is a kind of the one which writes such files: native-exact, say.
    backend = get_backend(recipe.backend if recipe.backend.startswith(writer) else writer)
    return _Side(
        subject.name, program, WatchedSession(program, backend, subject.session, threads=threads)
    ), ""


def _file_side(subject: Subject, threads: int | None) -> tuple[_FileSide | None, str]:
    from sqcompile.cli.file_values import FileValues

    assert subject.path is not None
    values = FileValues(subject.path, cast("Fed", subject.session), threads)
    if not values.layers_are_known:
        return None, (
            f"'{subject.name}' shows its outputs only: the version of sqcompile that wrote it did not say which of its "
            "values are those of layers. Compile it again to compare them"
        )
    return _FileSide(subject.name, values), ""


def _compile(recipe: Recipe, passes: Sequence[Pass], instruments: Sequence[Instrument] = ()) -> Compiled:
    import dataclasses

    from sqcompile.api import LazyCompiled
    from sqcompile.cli.subjects import unknown_inputs

    changed = dataclasses.replace(recipe, passes=tuple(passes), backend="reference", verify="off")
    made = changed.compile(progress=progress(), instruments=instruments)
    if isinstance(made, LazyCompiled):
        raise unknown_inputs(made._model)
    return made


def _bisect(
    first: Subject, second: Subject, batches: Sequence[list[Any]]
) -> tuple[list[PassStep], list[Trial]]:
    from sqcompile.bisect import MOST_LEFT, PassWatch, bisect_layers
    from sqcompile.errors import InputError
    from sqcompile.provenance import recipe_of

    if second.path is None or first.program is None:
        raise InputError(
            "There is no recipe to change.",
            where="compare --bisect",
            seen=f"{first.name} and {second.name}",
            expected="a model, and an .onnx or .sqm file that was compiled from one",
            next_step="compile to .onnx or .sqm, and compare with that",
        )
    recipe = recipe_of(second.path)
    watch = PassWatch(first.program, batches)

    tried = itertools.count(1)

    def run(passes: Sequence[Pass]) -> Program:
        progress().note(f"bisecting, trial {next(tried)} of {MOST_LEFT + 1} at most")
        instruments = [] if watch.steps else [watch]  # the first trial is the recipe as it is
        return _compile(recipe, passes, instruments).program

    trials = bisect_layers(first.program, recipe.passes, run, batches)
    return watch.steps, trials


def _trial_data(trial: Trial, whole: Trial) -> dict[str, Any]:
    from sqcompile.pipeline.text import pass_text

    old = set(whole.passes)
    return {
        "left": list(trial.left),
        "passes": [pass_text(item) for item in trial.passes if item not in old],
        "size_bytes": trial.size_bytes,
        **_data(trial.distance),
    }


def _data(distance: Distance) -> dict[str, Any]:
    return {
        "sqnr_db": distance.sqnr_db,
        "cosine": distance.cosine,
        "max_error": distance.max_error,
        "finite": distance.finite,
    }


def _show(
    target: Console,
    about: dict[str, Any],
    outputs: dict[str, Distance],
    layers: Sequence[LayerDistance],
    jump: int | None,
) -> None:

    target.print(
        f"{about['other']} against {about['reference']}, {about['batches']} batches of data", markup=False
    )
    table = _table("output")
    for name, distance in outputs.items():
        table.add_row(name, *_cells(distance))
    target.print(table)
    if layers:
        table = _table("layer", "source")
        for index, row in enumerate(layers):
            mark = " ◀ jumps here" if index == jump else ""
            style = "bold" if index == jump else None
            table.add_row(row.name + mark, *_cells(row.distance), _source(row.place), style=style)
        target.print(table)
        target.print(_verdict(layers, jump), markup=False)
    for note in about["notes"]:
        target.print(f"Note: {note}", markup=False)
    if about["bisect"]:
        _show_passes(target, about["passes"], about["pass_jump"])
        _show_trials(target, about["bisect"])


def _show_passes(target: Console, steps: Sequence[dict[str, Any]], jump: str | None) -> None:
    from rich.table import Table

    table = Table("after the pass", "SQNR of the outputs", title="Passes", title_justify="left")
    marked = False
    for step in steps:
        here = not marked and step["pass"] == jump
        marked = marked or here
        level = step["sqnr_db"]
        shown = "not finite" if not step["finite"] else "exact" if level == math.inf else f"{level:.1f} dB"
        table.add_row(step["pass"] + (" ◀ jumps here" if here else ""), shown, style="bold" if here else None)
    target.print(table)


def _show_trials(target: Console, trials: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    from sqcompile.report_tables import size_text

    table = Table("left in floating point", "SQNR", "weights", title="Trials", title_justify="left")
    for trial in trials:
        shown = "not finite" if trial["sqnr_db"] is None else f"{trial['sqnr_db']:.1f} dB"
        table.add_row(", ".join(trial["left"]) or "nothing", shown, size_text(trial["size_bytes"]))
    target.print(table)
    if trials[-1]["passes"]:
        target.print("In the recipe, instead of the passes of these names:", markup=False)
        for text in trials[-1]["passes"]:
            target.print(f"  - {text}", markup=False, soft_wrap=True)


def _verdict(layers: Sequence[LayerDistance], jump: int | None) -> str:
    from sqcompile.report_tables import sqnr_text

    if jump is not None:
        row = layers[jump]
        return (
            f"The error jumps at layer '{row.name}' ({sqnr_text(row.distance)}); leave it in floating point, or "
            "give it more bits, to see what it costs."
        )
    if all(math.isinf(row.distance.sqnr_db) for row in layers):
        return "All layers are equal."
    if all(row.distance.sqnr_db > _ROUNDING_DB for row in layers):
        return "All layers agree up to the rounding of float32."
    return "The error does not jump at any layer: it grows evenly."


def _table(first: str, *rest: str) -> Any:
    from rich.table import Table

    table = Table()
    for column in (first, "SQNR", "cosine", "max error", *rest):
        right = column in ("SQNR", "cosine", "max error")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _source(place: str) -> str:
    """Return the source line at the end of a place; the module path there is the layer's name again."""
    match = re.search(r"([^\s,(]+:\d+)\)$", place)
    return match[1] if match else ""


def _cells(distance: Distance) -> list[str]:
    from sqcompile.report_tables import sqnr_text

    return [sqnr_text(distance), f"{distance.cosine:.6f}", f"{distance.max_error:.3g}"]
