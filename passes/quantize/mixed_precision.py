"""Give each layer the format that it needs, under a budget."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sqcompile.backend import get_backend
from sqcompile.errors import PassOptionError
from sqcompile.levels import Level
from sqcompile.mixed_precision import (
    Candidate,
    Measure,
    Point,
    Sensitivity,
    allocate,
    allocate_within,
    frontier,
    measure_sensitivity,
)
from sqcompile.mixed_precision.sensitivity import measurable
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.pipeline.contract import option_fields
from sqcompile.program import Program
from sqcompile.pruning import choose_layers
from sqcompile.quantization.format import Format, PerGroup
from sqcompile.sparsity import Pattern

CANDIDATES = tuple(
    Candidate(Format(bits=bits, signed=False, symmetric=False, granularity=PerGroup(32)))
    for bits in (2, 3, 4, 8)
)
_BUDGETS = ("bits", "megabytes", "milliseconds", "increase")


class MixedPrecision(Pass):
    """Measure what each format does to each layer, choose one for each under a budget, and quantize so.

    A few layers suffer most from few bits; the choice gives these more and the others less. It is exact: an
    integer program over the measured losses, which are taken to add up. Bits and density are chosen together:
    a candidate may also prune (`uint4:group=32:affine+50%`).

    Other passes do the work: `quantize` gets the choice as its `formats`, `prune` runs once for each sparsity
    that was chosen. Layers that cannot be measured (embeddings, convolutions, tied weights) get what `quantize`
    says.

    Rewrites: as the passes that it runs.
    Keeps: interface().
    Rejects: layers without a Hessian over their inputs (remark).
    Raises: PassOptionError for options out of range, and for a budget that cannot be met, with the closest;
        SelectionError for patterns that match no layer; CalibrationError if there is no data.
    Source: the multiple-choice knapsack problem, solved by HiGHS (Huangfu & Hall 2018); losses as
        Dong et al. 2019 (HAWQ) measure them to second order, or as they are.

    Attributes:
        quantize: The pass that quantizes, with what it shall do to all other layers: `gptq{…}`,
            `quantize-weights{…}`.
        prune: The pass that prunes, for candidates that do: `sparse-gpt{sparsity=0.5}`.
        bits: Budget: bits a weight on average, scales and zero points included.
        megabytes: Instead: size of the chosen layers' weights in MB (10⁶ bytes), scales included.
        milliseconds: Instead: the time of the chosen layers for one row of activations, such as one token, by the
            kernel times of the native engine on this machine (`sqcompile bench --kernels` measures them).
        increase: Instead: the predicted rise of the perplexity as a fraction; the smallest choice within it.
        candidates: What each layer may become: formats, with `+50%`, `+2:4` or `+1x4:80%` behind those that prune.
        measure: `fisher` predicts the divergence from the dense model's distributions by one backward run;
            `divergence` measures it, one run of the model for each layer and candidate; `error` is for models
            whose first output is no logits.
        layers: Patterns of the layers to choose for.
        exclude: Patterns of layers that get what `quantize` says; `kind:head`: those that make the outputs.
        max_batches: Batches on which losses are measured.
        max_bytes: Memory for the values of all batches at one place of the graph, in bytes.
    """

    requires = Level.ATEN
    produces = Level.QDQ
    keeps: ClassVar[Keeps] = Keeps.interface()

    quantize: Pass | None = None
    prune: Pass | None = None
    bits: float | None = None
    megabytes: float | None = None
    milliseconds: float | None = None
    increase: float | None = None
    candidates: tuple[Candidate, ...] = CANDIDATES
    measure: Measure = "fisher"
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    max_batches: int = 4
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        if (
            self.quantize is None
            or not _has(self.quantize, "formats")
            or self.quantize.requires != Level.ATEN
        ):
            raise self.reject_option(
                "quantize", "a pass that takes formats, such as gptq or quantize-weights"
            )
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise self.reject_option(given[-1] if given else "bits", f"one of {', '.join(_BUDGETS)}")
        if not 0 < getattr(self, given[0]) < math.inf:
            raise self.reject_option(given[0], "a positive number")
        if self.increase is not None and self.measure == "error":
            raise self.reject_option("measure", "divergence or fisher: an error says nothing of perplexity")
        if not self.candidates:
            raise self.reject_option("candidates", "one format at least")
        if any(candidate.prunes for candidate in self.candidates) and not (
            self.prune is not None and _has(self.prune, "sparsity", "pattern", "layers")
        ):
            raise self.reject_option(
                "prune", "a pass for the candidates that prune, such as sparse-gpt{sparsity=0.5}"
            )
        if self.max_batches < 1:
            raise self.reject_option("max_batches", "1 or more")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Measure, choose, prune and quantize."""
        assert self.quantize is not None
        chosen = choose_layers(program, self.layers, self.exclude, (), where=f"pass {self.name}")
        layers = measurable(program, chosen, context)
        if not layers:
            context.remark("program", "has no layer to choose a format for")
            return self.quantize.run(program, context)
        table = measure_sensitivity(
            program,
            layers,
            self.candidates,
            context,
            measure=self.measure,
            max_batches=self.max_batches,
            max_bytes=self.max_bytes,
        )
        cost = _times(table) if self.milliseconds is not None else _sizes(table)
        point = self._choose(table, cost)
        choice = {
            name: self.candidates[index] for name, index in zip(table.layers, point.choice, strict=True)
        }
        context.remark("program", _summary(table, cost, point, choice))
        changes = 0
        for kind in dict.fromkeys(candidate for candidate in choice.values() if candidate.prunes):
            same = kind.sparsity, kind.pattern
            names = [
                name for name, item in choice.items() if item.prunes and (item.sparsity, item.pattern) == same
            ]
            changes += self._prune(*same, _exactly(names)).run(program, context).changes
        formats = tuple((_exact(name), candidate.format) for name, candidate in choice.items())
        given: Any = self.quantize
        quantize: Pass = dataclasses.replace(given, formats=(*given.formats, *formats))
        result = quantize.run(program, context)
        return PassResult(
            changes + result.changes, facts={**result.facts, **_facts(table, cost, point, choice)}
        )

    def _choose(self, table: Sensitivity, cost: _Cost) -> Point:
        losses = np.where(np.isfinite(cost.matrix), table.losses, np.inf)
        impossible = ~np.isfinite(losses).any(1)
        if impossible.any():
            name = table.layers[int(impossible.argmax())]
            raise PassOptionError(
                f"{self.name} has no candidate that layer '{name}' can take.",
                where=f"pass {self.name}",
                seen=", ".join(str(candidate) for candidate in self.candidates),
                expected="a scale a tensor, a channel or a group, and a pattern that divides the layer's sizes"
                + ("; kernels of the native engine" if self.milliseconds is not None else ""),
                next_step="add a candidate such as int8:channel=0, or exclude the layer",
            )
        costs = np.where(np.isfinite(losses), cost.matrix, 0.0)
        if self.increase is not None:
            point = allocate_within(losses, costs, math.log1p(self.increase))
            closest = (
                f"{math.expm1(float(losses.min(1).sum())):.3g} or more: so much even the best formats add"
            )
        else:
            budget = {"bits": cost.per_unit, "megabytes": 8e6, "milliseconds": cost.per_unit}
            option = next(name for name in budget if getattr(self, name) is not None)
            point = allocate(losses, costs, getattr(self, option) * budget[option])
            least = float(np.where(np.isfinite(losses), costs, np.inf).min(1).sum())
            closest = f"{least / budget[option]:.4g} {option} or more: so much the cheapest choice takes"
        if point is None:
            option = next(name for name in _BUDGETS if getattr(self, name) is not None)
            raise PassOptionError(
                f"{self.name} cannot meet the budget.",
                where=f"pass {self.name}",
                seen=f"{option}={getattr(self, option):g}",
                expected=closest,
                next_step="allow more, or add other candidates",
            )
        return point

    def _prune(self, sparsity: float, pattern: Pattern, layers: tuple[str, ...]) -> Pass:
        given: Any = self.prune
        share = None if pattern.fixed_sparsity is not None else sparsity
        prune: Pass = dataclasses.replace(given, sparsity=share, pattern=pattern, layers=layers)
        return prune


@dataclasses.dataclass(frozen=True)
class _Cost:
    """What candidates cost.

    Attributes:
        matrix: By layer and candidate, [L, C]; infinite where it is not known.
        unit: What the sum is told in.
        per_unit: How much of the sum makes one of these.
    """

    matrix: NDArray[np.float64]
    unit: str
    per_unit: float


def _sizes(table: Sensitivity) -> _Cost:
    return _Cost(table.bits, "bits a weight", float(table.weights.sum()))


def _times(table: Sensitivity) -> _Cost:
    native = get_backend("native")
    matrix = [
        [native.product_ns(shape, item.format, item.sparsity, item.pattern) for item in table.candidates]
        for shape in table.shapes
    ]
    known = np.array([[np.inf if ns is None else ns for ns in row] for row in matrix])
    return _Cost(known, "ms a row", 1e6)


def _summary(table: Sensitivity, cost: _Cost, point: Point, choice: dict[str, Candidate]) -> str:
    counts = Counter(str(candidate) for candidate in choice.values())
    shares = ", ".join(f"{count} of {text}" for text, count in sorted(counts.items()))
    total = point.cost / cost.per_unit
    return f"takes {total:.4g} {cost.unit}; predicted {table.measure} {point.loss:.3g}; layers: {shares}"


def _facts(table: Sensitivity, cost: _Cost, point: Point, choice: dict[str, Candidate]) -> dict[str, Any]:
    picked = np.arange(len(table.layers)), point.choice
    losses = np.where(np.isfinite(cost.matrix), table.losses, np.inf)
    return {
        "choice": {name: str(candidate) for name, candidate in choice.items()},
        "bits": float(table.bits[picked].sum() / table.weights.sum()),
        "cost": point.cost / cost.per_unit,
        "unit": cost.unit,
        "predicted": point.loss,
        "measure": table.measure,
        "frontier": [
            {"cost": item.cost / cost.per_unit, "predicted": item.loss}
            for item in frontier(losses, np.where(np.isfinite(losses), cost.matrix, 0.0))
        ],
        "sensitivity": {
            name: {
                str(candidate): float(loss)
                for candidate, loss in zip(table.candidates, row, strict=True)
                if np.isfinite(loss)
            }
            for name, row in zip(table.layers, table.losses, strict=True)
        },
    }


def _has(item: Pass, *options: str) -> bool:
    return set(options) <= {field.name for field in option_fields(type(item))}


def _exactly(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(_exact(name) for name in names)


def _exact(name: str) -> str:
    """Return a pattern that matches one name and no other."""
    return f"re:^{re.escape(name)}$"
