"""Finding what does the harm, by trying: the pass after which outputs part, and the layers to leave as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqcompile.compare import compare_layers
from sqcompile.errors import SelectionError
from sqcompile.metrics import Distance, output_distance
from sqcompile.pipeline import Pass
from sqcompile.pipeline.contract import option_fields
from sqcompile.program import Program
from sqcompile.statistics import program_size

MOST_LEFT = 4
"""So many layers are left in floating point at most."""

Run = Callable[[Sequence[Pass]], Program]
"""Runs passes on a fresh copy of the dense program."""


@dataclass(frozen=True)
class PassStep:
    """Where the outputs are after a pass.

    Attributes:
        text: The pass, as text.
        distance: Distance of the outputs from the dense program's, after it.
    """

    text: str
    distance: Distance


class PassWatch:
    """An instrument of the pass manager: compares the outputs with the dense program's after every pass.

    Args:
        dense: The dense program.
        batches: Flat inputs.

    Attributes:
        steps: What was found, in the order of the passes.
    """

    def __init__(self, dense: Program, batches: Sequence[Sequence[Any]]) -> None:
        self._batches = batches
        self._expected = [dense.run(batch) for batch in batches]
        self.steps: list[PassStep] = []

    def __call__(self, item: Pass, before: Program, after: Program) -> None:
        """Run the program after the pass."""
        outputs = [after.run(batch) for batch in self._batches]
        self.steps.append(PassStep(str(item), output_distance(self._expected, outputs)))


@dataclass(frozen=True)
class Trial:
    """A compilation with some layers left in floating point.

    Attributes:
        left: Names of the layers.
        passes: The passes that leave them.
        distance: Distance of the outputs from the dense program's.
        size_bytes: Size of the program.
    """

    left: tuple[str, ...]
    passes: tuple[Pass, ...]
    distance: Distance
    size_bytes: int


def bisect_layers(
    dense: Program,
    passes: Sequence[Pass],
    run: Run,
    batches: Sequence[Sequence[Any]],
    *,
    gain_db: float = 10.0,
    most: int = MOST_LEFT,
) -> list[Trial]:
    """Leave layers in floating point, the one that adds most noise first, until the outputs are better.

    Each trial runs the passes anew, since a layer that is left changes what those behind it are given.

    Args:
        dense: The dense program.
        passes: The passes.
        run: Runs passes on a fresh copy of the dense program.
        batches: Flat inputs on which outputs are compared.
        gain_db: By how much the SQNR of the outputs has to rise.
        most: Layers to leave at most.

    Returns:
        The trials in order, the first with no layer left. It ends with the first that is good enough; where none is,
        with the last that was tried.

    Raises:
        SelectionError: If none of the passes can leave a layer out.
    """
    expected = [dense.run(batch) for batch in batches]
    left: list[str] = []
    trials: list[Trial] = []
    while True:
        chosen = leave_out(passes, left)
        program = run(chosen)
        outputs = output_distance(expected, [program.run(batch) for batch in batches])
        trials.append(Trial(tuple(left), tuple(chosen), outputs, program_size(program).size_bytes))
        good = outputs.finite and outputs.sqnr_db >= _first(trials) + gain_db
        if good or len(left) == most:
            return trials
        rows = [row for row in compare_layers(dense, program, batches) if row.name not in left]
        worst = max(rows, key=lambda row: row.loss, default=None)
        if worst is None or worst.loss <= 0:
            return trials
        left.append(worst.name)


def leave_out(passes: Iterable[Pass], layers: Sequence[str]) -> list[Pass]:
    """Return passes that leave layers as they are: by `formats` where a pass has that option, else by `exclude`.

    Raises:
        SelectionError: If there are layers, and no pass has either option.
    """
    found = list(passes)
    if not layers:
        return found
    changed = [_leaving(item, layers) for item in found]
    if changed == found:
        raise SelectionError(
            "None of the passes can leave a layer out.",
            where="bisect",
            seen=", ".join(str(item) for item in found) or "no passes",
            expected="a pass with the option 'formats' or 'exclude', as quantize-weights and wanda have",
            next_step="compare two programs layer by layer instead",
        )
    return changed


def _leaving(item: Pass, layers: Sequence[str]) -> Pass:
    names = {option.name for option in option_fields(type(item))}
    given: Any = item
    if "formats" in names:
        left = tuple((name, "float") for name in layers)  # last: the last pattern that fits counts
        others = tuple(pair for pair in given.formats if pair[0] not in layers)
        return dataclasses.replace(given, formats=(*others, *left))  # type: ignore[no-any-return]
    if "exclude" in names:
        return dataclasses.replace(given, exclude=(*given.exclude, *layers))  # type: ignore[no-any-return]
    return item


def _first(trials: Sequence[Trial]) -> float:
    """Return the SQNR of the first trial, in dB; of numbers that are not finite none is less."""
    first = trials[0].distance
    return first.sqnr_db if first.finite else -1e9
