"""Training a program block by block, each on what it really gets and towards what the dense model made of it.

A block is a module of the model whose operators one value leaves. Only the values at one place of the two graphs
are held, of as many batches as fit; gradients go through one block and one batch at a time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqcompile.distillation import distill_hidden
from sqcompile.errors import InputError, TrainingError
from sqcompile.evaluate import constant_sources
from sqcompile.hidden import output_of_module
from sqcompile.matching import is_mask
from sqcompile.pipeline.context import PassContext
from sqcompile.program import Program, value_of
from sqcompile.stepwise import Stepwise
from sqcompile.text import locate, module_path

_MOST_WARMUP = 0.1


@dataclass(frozen=True)
class Descent:
    """How one block is trained: AdamW without decay, its rate warmed up and then falling to zero along a cosine.

    Attributes:
        epochs: Passes over the batches.
        rate: Highest learning rate.
        seed: Of the order of the batches.
    """

    epochs: int
    rate: float
    seed: int = 0


@dataclass(frozen=True)
class Region:
    """The part of a program that one module is.

    Attributes:
        name: The module's path.
        output: The value that leaves it.
        dense: The value that leaves it in the dense program.
        nodes: Its operators in graph order, with those that prepare its weights (masks).
        entering: Values that it reads and that are computed outside.
        parameters: The nodes that read its parameters, by name; without those that something outside reads as
            well, which therefore stay.
    """

    name: str
    output: fx.Node
    dense: fx.Node
    nodes: tuple[fx.Node, ...]
    entering: tuple[fx.Node, ...]
    parameters: Mapping[str, tuple[fx.Node, ...]]


@dataclass(frozen=True)
class Recovery:
    """What training did for one block: its error relative to the dense model's output, before and after."""

    before: float
    after: float
    trained: dict[str, Tensor]


@dataclass(frozen=True)
class Module:
    """A module of the model by its path, to choose from."""

    name: str

    @property
    def kind(self) -> str:
        """What selections call it."""
        return "block"


def modules_of(program: Program) -> list[Module]:
    """Return all modules that compute something, in graph order, outer ones before those in them."""
    paths: dict[str, None] = {}
    for node in program.compute_nodes():
        parts = module_path(node).split(".")
        for count in range(1, len(parts) + 1):
            paths[".".join(parts[:count])] = None
    return [Module(path) for path in paths if path]


def outermost(modules: Iterable[Module]) -> list[Module]:
    """Return the modules that lie in none of the others."""
    found: dict[str, Module] = {item.name: item for item in modules}
    return [item for name, item in found.items() if not any(parent in found for parent in _parents(name))]


def numbered(modules: Iterable[Module]) -> list[Module]:
    """Return the outermost modules that are one of several by a number, such as `layers.0`."""
    return outermost(item for item in modules if item.name.rpartition(".")[2].isdigit())


def region_of(program: Program, dense: Program, name: str) -> Region:
    """Return the part of a program that a module is, with its counterpart in the dense program.

    Raises:
        SelectionError: If one of the programs has no operator of that module.
        InputError: If what leaves the module has another type or shape in the dense program.
    """
    output, wanted = output_of_module(program, name), output_of_module(dense, name)
    if not _alike(value_of(output), value_of(wanted)):
        raise InputError(
            "A block does not fit the dense model's.",
            where=f"block '{name}', {locate(output)}",
            seen=_type_text(value_of(output)),
            expected=f"{_type_text(value_of(wanted))}, as it leaves the block of the dense model",
            next_step="compress inside of the blocks, or distil larger ones",
        )
    inside, entering = _inside(name, output)
    readers = [node for node in program.graph.nodes if node.op == "get_attr"]
    parameters: dict[str, tuple[fx.Node, ...]] = {}
    tied: set[str] = set()
    for node in inside:
        for source in node.all_input_nodes:
            if source.op != "get_attr" or str(source.target) in parameters or str(source.target) in tied:
                continue
            tensor = program.tensor(source)
            if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
                continue
            same = tuple(reader for reader in readers if reader.target == source.target)
            if all(_read_only_inside(reader, inside) for reader in same):
                parameters[str(source.target)] = same
            else:
                tied.add(str(source.target))
    order = tuple(node for node in program.compute_nodes() if node in inside)
    return Region(name, output, wanted, order, tuple(entering), parameters)


def recover_regions(
    program: Program,
    dense: Program,
    regions: Sequence[Region],
    descent: Descent,
    context: PassContext,
    *,
    max_bytes: int,
) -> dict[str, Recovery]:
    """Train regions in graph order, on calibration data that went through those already trained.

    Args:
        program: The compressed program; it is only read.
        dense: The program whose values are to be matched; it takes the same inputs.
        regions: What to train; each has parameters.
        descent: How each is trained.
        context: Holds the calibration data.
        max_bytes: Memory for the values of all batches at one place of both graphs.

    Returns:
        What became of each region, by name.

    Raises:
        CalibrationError: If there is no data.
        TrainingError: If an error is no number any more; the text names the block.
    """
    student, teacher = Stepwise(program), Stepwise(dense)
    # A quarter each: values at a place of either graph, what enters the block at hand, and what is to leave it.
    batches = student.batches(context, max_bytes // 4, "distilling blocks: reading")
    ends = {region.output: region for region in regions}
    starts = {node: region for region in regions for node in region.nodes}
    entered: dict[str, dict[fx.Node, list[Any]]] = {region.name: {} for region in regions}
    wanted = _Targets(teacher, batches, {region.dense for region in regions})
    found: dict[str, Recovery] = {}

    def after(node: fx.Node, values: list[Any]) -> list[Any]:
        region = ends.get(node)
        if region is None:
            return values
        targets = [_in_channels(node, target) for target in wanted.take(region.dense)]
        rows = [
            {place: column[index] for place, column in entered[region.name].items()}
            for index in range(len(values))
        ]
        del entered[region.name]
        recovery, computed = _recover(program, region, rows, targets, descent)
        found[region.name] = recovery
        for name, value in recovery.trained.items():
            for reader in region.parameters[name]:
                student.substitutes[reader] = value
        return computed

    for (node, read), _ in zip(
        student.walk(batches, after=after),
        context.progress.track(student.steps, "distilling blocks"),
        strict=False,
    ):
        region = starts.get(node)
        if region is None or region.name not in entered:
            continue
        for source in node.all_input_nodes:
            if source in region.entering and source not in entered[region.name]:
                entered[region.name][source] = list(read(source))
    return found


class _Targets:
    """Values of the dense program, computed no sooner than they are needed."""

    def __init__(self, dense: Stepwise, batches: Sequence[Sequence[Any]], places: set[fx.Node]) -> None:
        self._places = places
        self._kept: dict[fx.Node, list[Any]] = {}
        self._walk = dense.walk(batches, after=self._keep)

    def _keep(self, node: fx.Node, values: list[Any]) -> list[Any]:
        if node in self._places:
            self._kept[node] = values
        return values

    def take(self, node: fx.Node) -> list[Any]:
        """Return the values of a node, one a batch, and forget them."""
        while node not in self._kept and next(self._walk, None) is not None:
            pass
        return self._kept.pop(node)


def _recover(
    program: Program,
    region: Region,
    rows: Sequence[Mapping[fx.Node, Any]],
    targets: Sequence[Tensor],
    descent: Descent,
) -> tuple[Recovery, list[Tensor]]:
    """Train one region, and return what came of it with the values that leave it then."""
    stored = {name: program.tensor(name) for name in region.parameters}
    # Optimizers step in float32, whatever the weights are stored in.
    trained = {
        name: nn.Parameter(value.detach().to(torch.float32, copy=True)) for name, value in stored.items()
    }
    unmasked = _unmasked(program, region)
    run = _runner(program, region, stored, trained, unmasked)

    def error() -> float:
        with torch.no_grad():
            losses = [distill_hidden(run(row), target) for row, target in zip(rows, targets, strict=True)]
        return float(torch.stack(losses).mean())

    with torch.inference_mode(False):
        before = error()
        start = {name: value.detach().clone() for name, value in trained.items()}
        if before > 0:
            _descend(run, list(trained.values()), rows, targets, descent)
        after = error()
        if not math.isfinite(after):
            raise TrainingError(
                "Distilling a block diverged.",
                where=f"block '{region.name}', {locate(region.output)}",
                seen=f"its error went from {before:.3g} to {after}",
                expected="finite numbers",
                next_step="lower the rate",
            )
        if after >= before:  # what was there is better than what training found
            with torch.no_grad():
                for name, value in trained.items():
                    value.copy_(start[name])
            after = before
        with torch.no_grad():
            computed = [run(row) for row in rows]
    results = {}
    if after < before:
        for name, value in trained.items():
            results[name] = _zeroed(value.detach().to(stored[name].dtype), unmasked.get(name))
    return Recovery(before, after, results), computed


def _runner(
    program: Program,
    region: Region,
    stored: Mapping[str, Tensor],
    trained: Mapping[str, nn.Parameter],
    unmasked: Mapping[str, Tensor],
) -> Callable[[Mapping[fx.Node, Any]], Tensor]:
    """Return a function of what enters a region, which computes what leaves it with the weights in training."""
    readers = {reader: name for name, nodes in region.parameters.items() for reader in nodes}

    def run(row: Mapping[fx.Node, Any]) -> Tensor:
        values: dict[fx.Node, Any] = dict(row)

        def load(node: fx.Node) -> Any:
            if node in readers:
                name = readers[node]
                return _zeroed(trained[name].to(stored[name].dtype), unmasked.get(name))
            return program.tensor(node).detach() if node.op == "get_attr" else values[node]

        for node in region.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), load)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        result: Tensor = values[region.output]
        return result

    return run


def _descend(
    run: Callable[[Mapping[fx.Node, Any]], Tensor],
    parameters: list[nn.Parameter],
    rows: Sequence[Mapping[fx.Node, Any]],
    targets: Sequence[Tensor],
    descent: Descent,
) -> None:
    optimizer = torch.optim.AdamW(parameters, descent.rate, weight_decay=0.0)
    total = descent.epochs * len(rows)
    warmup = max(1, int(_MOST_WARMUP * total))
    order = list(range(len(rows)))
    shuffle = random.Random(descent.seed)
    step = 0
    with torch.enable_grad():
        for _ in range(descent.epochs):
            shuffle.shuffle(order)
            for index in order:
                part = (1 + math.cos(math.pi * step / total)) / 2 * min(1.0, (step + 1) / warmup)
                for group in optimizer.param_groups:
                    group["lr"] = descent.rate * part
                loss = distill_hidden(run(rows[index]), targets[index])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                step += 1


def _inside(name: str, output: fx.Node) -> tuple[set[fx.Node], dict[fx.Node, None]]:
    """Return the operators of a module that its output needs, and the values from outside that they read."""
    inside: set[fx.Node] = {output}
    entering: dict[fx.Node, None] = {}
    pending = [output]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source in inside or source.op == "get_attr":
                continue
            path = module_path(source)
            if path == name or path.startswith(f"{name}.") or constant_sources(source):
                inside.add(source)
                pending.append(source)
            else:
                entering[source] = None
    return inside, entering


def _read_only_inside(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether what reads a stored weight, by way of masks and the like, is inside of a module."""
    return all(
        user in inside and (constant_sources(user) is None or _read_only_inside(user, inside))
        for user in node.users
    )


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _type_text(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} [{', '.join(map(str, value.shape))}]"


def _in_channels(node: fx.Node, value: Tensor) -> Tensor:
    """Return a value of the dense program in the channels that the node has: rotated and rescaled alike."""
    if "rotated" in node.meta:
        value = node.meta["rotated"].turn(value)
    return (value * node.meta["rescaled"]).to(value.dtype) if "rescaled" in node.meta else value


def _alike(value: Any, other: Any) -> bool:
    """Whether two recorded values have the same type and sizes; symbols of one program match any of the other."""
    if not isinstance(value, Tensor) or not isinstance(other, Tensor) or value.dim() != other.dim():
        return False
    pairs: Iterable[tuple[Any, Any]] = zip(value.shape, other.shape, strict=True)
    return value.dtype == other.dtype and all(
        size == twin or not (isinstance(size, int) and isinstance(twin, int)) for size, twin in pairs
    )


def _unmasked(program: Program, region: Region) -> dict[str, Tensor]:
    """Return the masks of the weights whose zeros are promised, and that no operator masks."""
    return {
        name: program.sparsity[name].mask
        for name, nodes in region.parameters.items()
        if name in program.sparsity and not all(is_mask(user) for node in nodes for user in node.users)
    }


def _zeroed(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None else value.masked_fill(~mask, 0.0)
