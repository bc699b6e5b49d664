"""Training a program with the user's own training function.

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        model.train()
        for x, y in loader: ...

The function is given a `Trainable`: an ordinary module whose parameters are copies of the program's, under
the model's own names. Afterwards `train_program` checks what came back and takes it into the program. Neither
the program that came in nor the user's model is ever written to.
"""

from __future__ import annotations

import inspect
import math
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqcompile.errors import Error, PassOptionError, TrainingError
from sqcompile.functions import FunctionReference
from sqcompile.hidden import output_of_module
from sqcompile.matching import is_mask
from sqcompile.operators.table import argument
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter
from sqcompile.signature import Signature

TrainFunction = FunctionReference | Callable[..., Any]
"""A training function: called with the trainable module, and with a `Round` if it takes a second argument."""

_aten = torch.ops.aten
# Position of the argument that says whether an operator acts as in training.
_MODES: dict[Any, int] = {
    _aten.batch_norm.default: 5,
    _aten.dropout.default: 2,
    _aten.feature_dropout.default: 2,
    _aten.alpha_dropout.default: 2,
}


@dataclass(frozen=True)
class Round:
    """Which of several trainings this is.

    Attributes:
        number: From 1.
        count: How many there are.
        sparsity: Fraction of the target weights that are pruned now, or None outside of pruning.
        seed: Seed of this training; PyTorch's own generator is seeded with it already.
    """

    number: int = 1
    count: int = 1
    sparsity: float | None = None
    seed: int = 0


class Trainable(nn.Module):
    """A module to train in place of a program: called as the model is, and returning what it returns.

    Its parameters, running statistics and masks are copies under the program's own names. `train()` lets
    batch norms use and update the statistics of the batch, and dropouts drop; `eval()` is how the program
    itself runs. What the graph does not hold cannot be switched: dropout inside attention, which is traced as 0.

    Masked weights have no gradient and no effect. A weight whose zeros are promised without a mask (after
    `ApplyMasks`) gets one for the time of training.

    Args:
        program: The program; it is only read.
        freeze_norms: Batch norms keep their statistics in training, too, and use them.
    """

    def __init__(self, program: Program, *, freeze_norms: bool = False) -> None:
        super().__init__()
        self._freeze_norms = freeze_norms
        twin = program.snapshot()
        self._prepare(twin)
        # Functions, which copies of the module (averages of weights) share.
        self._bind, self._unflatten = _interface(program.signature)
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in twin.tensors():
                self._add(name, tensor)
        plain = twin.snapshot()
        self._switch(twin)
        self._build = _builder({False: plain, True: twin})
        self._modes, self._watched = self._build(()), tuple[str, ...]()
        self._told: Callable[[dict[str, Tensor]], None] | None = None
        self.train(False)

    def watch(self, names: Sequence[str], tell: Callable[[dict[str, Tensor]], None] | None) -> None:
        """Tell a function what leaves some of the model's modules, at every call from now on.

        Args:
            names: Module paths, such as `model.layers.3`; none to stop.
            tell: Called after each run with the values by name, which carry gradients.

        Raises:
            SelectionError: If no operator of the program comes from such a module.
        """
        self._modes, self._watched = self._build(tuple(names)), tuple(names)
        self._told = tell if names else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with the tensors of this module, in its mode.

        Raises:
            InputError: If the inputs do not fit the program.
        """
        flat = self._bind(args, kwargs)
        values = list(MethodType(self._modes[self.training], self)(*flat))
        count = len(values) - len(self._watched)
        if self._told is not None:
            self._told(dict(zip(self._watched, values[count:], strict=True)))
        return self._unflatten(values[:count])

    def _add(self, name: str, tensor: Tensor) -> None:
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            child = owner._modules[part]
            assert child is not None
            owner = child
        value = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, nn.Parameter(value, requires_grad=tensor.requires_grad))
        else:
            owner.register_buffer(leaf, value)

    def _prepare(self, twin: Program) -> None:
        """Edit the copy that is trained: hold its promises about zeros by masks."""
        edit = Rewriter(twin)
        for name, promise in twin.sparsity.items():
            reader = next((n for n in twin.graph.nodes if n.op == "get_attr" and n.target == name), None)
            if reader is None or not twin.tensor(name).is_floating_point():
                continue
            bare = [user for user in reader.users if not is_mask(user)]
            if not bare:
                continue
            mask = edit.constant(f"{name}_mask", promise.mask, like=reader)
            with edit.before(_first_compute(twin)):
                masked = edit.call(torch.ops.sqcompile.mask.default, reader, mask, like=reader)
            edit.replace(reader, masked, only=lambda user, bare=bare: user in bare)  # type: ignore[misc]
        edit.finish()

    def _switch(self, twin: Program) -> None:
        """Let the operators of the copy that know two modes act as in training."""
        _switch(twin, norms=not self._freeze_norms)


def train_program(
    program: Program,
    function: TrainFunction,
    *,
    seed: int = 0,
    where: str = "training",
    now: Round | None = None,
    module: Trainable | None = None,
) -> tuple[int, dict[str, float]]:
    """Train a program's parameters with a user's function, and take the result into the program.

    Args:
        program: The program; its tensors are replaced, none is written to.
        function: The training function.
        seed: Seeds PyTorch's generator, whose state outside is kept.
        where: Who trains, for errors.
        now: What to tell the function about this training.
        module: The module to train, if it is more than a plain `Trainable`.

    Returns:
        The number of tensors that changed, and the numbers that the function returned (a number, or a
        table of numbers) by name.

    Raises:
        TrainingError: If the function raises, changes nothing, diverges, or writes into a constant.
    """
    module = Trainable(program) if module is None else module
    before = {name: value.detach().clone() for name, value in module.state_dict().items()}
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise TrainingError(
            "The program has nothing to train.",
            where=where,
            seen="no parameter that requires a gradient",
            expected="at least one",
            next_step="set requires_grad on the model's parameters before compiling",
        )
    result = _call(FunctionReference.of(function), module, now or Round(seed=seed), seed, where)
    figures = _figures(result, module, where)
    after = module.state_dict()
    statistics = _running_statistics(program)
    changed = [name for name in before if _changed(before[name], after, name, where)]
    parameters = dict(module.named_parameters())
    for name in changed:
        _check_trained(name, after[name], name in parameters or name in statistics, where)
    if not any(name in parameters for name in changed):
        raise TrainingError(
            "The training function changed no parameter.",
            where=where,
            seen="every parameter is as it was before",
            expected="a function that trains the module that it is given, in place",
            next_step="give model.parameters() of the function's own argument to the optimizer",
        )
    edit = Rewriter(program)
    readers = {str(node.target): node for node in program.graph.nodes if node.op == "get_attr"}
    for name in changed:
        if name in readers:
            edit.replace_tensor(readers[name], _taken(program, name, after[name]))
    edit.finish()
    return edit.changes, figures


def check_function(function: TrainFunction | None) -> FunctionReference | None:
    """Return an option's training function as a reference, or None if none was given.

    Raises:
        PassOptionError: If it is nothing that can be called.
    """
    if function is None:
        return None
    if not isinstance(function, FunctionReference) and not callable(function):
        raise PassOptionError(
            "A training function is a function.",
            where="option 'train'",
            seen=repr(function),
            expected="a function of the module to train, or its name: module.py:function",
        )
    return FunctionReference.of(function)


def _call(function: FunctionReference, module: Trainable, now: Round, seed: int, where: str) -> Any:
    train = function.load()
    arguments = (module, now) if _takes_round(train) else (module,)
    try:
        # The caller may stand under no_grad; training needs gradients, and randomness of its own.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
        ):
            torch.manual_seed(seed)
            return train(*arguments)
    except Error as error:  # of a loss or of the module itself: what is missing is the user's line
        error.where = ", ".join(filter(None, (error.where, _user_line(error, function))))
        raise
    except Exception as error:
        raise TrainingError(
            "The training function failed.",
            where=f"{where}, {_user_line(error, function)}",
            seen=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            expected="a function that trains the module that it is given",
            next_step="call it with sqcompile.training.Trainable(program) to debug it",
        ) from error


def _user_line(error: Exception, function: FunctionReference) -> str:
    """Return the innermost line of an error that is neither ours nor PyTorch's."""
    skipped = (os.path.dirname(os.path.abspath(__file__)), os.path.dirname(torch.__file__))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*skipped, "<"))]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else str(function)


def _takes_round(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # functions of C have no signature
        return False
    wanted = [
        item
        for item in parameters
        if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD) and item.default is item.empty
    ]
    return len(wanted) >= 2


def _figures(result: Any, module: Trainable, where: str) -> dict[str, float]:
    """Return what the function returned as numbers by name; a loss that is no number has diverged."""
    if isinstance(result, nn.Module) and result is not module:
        raise TrainingError(
            "The training function returned another module than it was given.",
            where=where,
            seen=type(result).__name__,
            expected="nothing, or figures such as the last loss; the module is trained in place",
            next_step="load the trained weights into the given module: model.load_state_dict(…)",
        )
    table = result if isinstance(result, Mapping) else {"result": result}
    figures = {}
    for name, value in table.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            figures[str(name)] = float(value)
    for name, number in figures.items():
        if not math.isfinite(number):
            raise _diverged(f"the function's own '{name}' is {number}", where)
    return figures


def _changed(before: Tensor, after: Mapping[str, Tensor], name: str, where: str) -> bool:
    now = after.get(name)
    if now is None or now.shape != before.shape or now.dtype != before.dtype:
        raise TrainingError(
            "The training function changed the module itself.",
            where=f"{where}, tensor @{name}",
            seen="no such tensor any more" if now is None else f"{now.dtype} {tuple(now.shape)}",
            expected=f"{before.dtype} {tuple(before.shape)}",
            next_step="change values only; convert a copy for another type of numbers",
        )
    return not torch.equal(before, now.detach().to(before.device))


def _check_trained(name: str, value: Tensor, trains: bool, where: str) -> None:
    if not trains:
        what = "a mask" if value.dtype is torch.bool else "a constant of the model"
        raise TrainingError(
            f"The training function wrote into {what}.",
            where=f"{where}, tensor @{name}",
            seen="other values than before",
            expected="only parameters and running statistics change",
            next_step="prune with a pass; leave the buffers of the module alone",
        )
    finite = value.isfinite()
    if not bool(finite.all()):
        raise _diverged(
            f"{int((~finite).sum())} of {value.numel()} values are NaN or infinite",
            f"{where}, tensor @{name}",
        )


def _diverged(seen: str, where: str) -> TrainingError:
    return TrainingError(
        "Training diverged.",
        where=where,
        seen=seen,
        expected="finite numbers",
        next_step="lower the learning rate, warm it up, or clip gradients",
    )


def _taken(program: Program, name: str, trained: Tensor) -> Tensor:
    """Return a trained tensor as the program stores it: a copy, zero where that was promised."""
    old = program.tensor(name)
    value: Tensor = trained.detach().to(old.device, copy=True)
    reader = next(node for node in program.graph.nodes if node.op == "get_attr" and node.target == name)
    promise = program.sparsity.get(name)
    if promise is not None and not all(is_mask(user) for user in reader.users):
        value = value.masked_fill(~promise.mask, 0.0)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(value, requires_grad=old.requires_grad)
    return value


def _running_statistics(program: Program) -> set[str]:
    """Return the names of the tensors that batch norms update in training."""
    found = set()
    for node in program.compute_nodes():
        if node.target is _aten.batch_norm.default:
            for position in (3, 4):
                value = argument(node, position)
                if isinstance(value, fx.Node) and value.op == "get_attr":
                    found.add(str(value.target))
    return found


def _switch(program: Program, *, norms: bool) -> None:
    """Let the operators that know two modes act as in training; batch norms only if asked for."""
    statistics = _running_statistics(program)
    for node in program.compute_nodes():
        position = _MODES.get(node.target)
        if position is None:
            continue
        if node.target is _aten.batch_norm.default:
            if not norms:
                continue
            sources = [argument(node, place) for place in (3, 4)]
            stored = [
                value for value in sources if isinstance(value, fx.Node) and str(value.target) in statistics
            ]
            if len(stored) != 2:  # computed statistics: there is nothing to update
                continue
        arguments: list[Any] = [argument(node, place) for place in range(position + 1)]
        arguments[position] = True
        node.args = (*arguments, *node.args[position + 1 :])
        names = [item.name for item in node.target._schema.arguments[: position + 1]]  # type: ignore[union-attr]
        node.kwargs = {key: value for key, value in node.kwargs.items() if key not in names}


def _interface(
    signature: Signature,
) -> tuple[Callable[[Sequence[Any], Mapping[str, Any]], list[Any]], Callable[[list[Any]], Any]]:
    def bind(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        return signature.bind(args, kwargs)

    def unflatten(leaves: list[Any]) -> Any:
        return signature.unflatten(leaves)

    return bind, unflatten


def _builder(twins: Mapping[bool, Program]) -> Callable[[tuple[str, ...]], dict[bool, Callable[..., Any]]]:
    """Return a function that makes the code of both modes, which also returns what leaves some modules."""

    def build(names: tuple[str, ...]) -> dict[bool, Callable[..., Any]]:
        return {
            mode: _function(twin.graph_module, twin.graph, [output_of_module(twin, name) for name in names])
            for mode, twin in twins.items()
        }

    return build


def _function(root: nn.Module, graph: fx.Graph, also: Sequence[fx.Node]) -> Callable[..., Any]:
    """Return a graph's code as a function of the module whose tensors it reads, and of the inputs."""
    copied = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    output = copied.graph_copy(graph, nodes, return_output_node=True)
    assert isinstance(output, tuple)
    copied.output((*output[0], *(nodes[node] for node in also)))
    copied.set_codegen(fx.graph.CodeGen())
    function: Callable[..., Any] = type(fx.GraphModule(root, copied)).forward
    return function


def _first_compute(program: Program) -> fx.Node:
    return next(program.compute_nodes())
