"""Training low-rank adapters, and folding them away."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from sqcompile.adapters import TrainableAdapted
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.pruning import choose_layers
from sqcompile.rewrite import Rewriter
from sqcompile.training import TrainFunction, check_function, train_program


class TrainAdapters(Pass):
    """Train low-rank adapters beside the weights with your own function, then add them to the weights (LoRA).

    Recovery with few trained parameters: the optimizer's state is that of the adapters alone. The weights
    themselves, norms and biases are frozen. Masks stand behind the sum of weight and adapter, in training as
    afterwards: nothing that was pruned comes back. Nothing of the adapters is left in the program.

    Rewrites: nothing: weights W [O, K] become W + alpha / rank · B A, zero where they are masked.
    Keeps: interface(): training changes the numbers.
    Rejects: weights that are no parameters, and embeddings unless named (remark, if nothing is left).
    Raises: TrainingError as `FineTune`; SelectionError for patterns that match no layer.
    Source: Hu et al. 2022 (LoRA).

    Attributes:
        train: The function, or its name: `module.py:function`; as `FineTune` takes it.
        rank: Rank of the adapters; small weights take less.
        alpha: The product of the adapters is multiplied with alpha / rank.
        layers: Patterns of the layers whose weights get adapters.
        exclude: Patterns of layers to leave as they are.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.interface()

    train: TrainFunction | None = None
    rank: int = 8
    alpha: float = 16.0
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", check_function(self.train))
        if self.train is None:
            raise self.reject_option("train", "a function of the module to train, or module.py:function")
        if self.rank < 1:
            raise self.reject_option("rank", "1 or more")
        if not 0 < self.alpha < float("inf"):
            raise self.reject_option("alpha", "a positive number")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Train the adapters and fold them."""
        assert self.train is not None
        where = f"pass {self.name}"
        chosen = choose_layers(program, self.layers, self.exclude, (), where=where)
        names = [
            name
            for name in dict.fromkeys(layer.weight_name for layer in chosen)
            if isinstance(program.tensor(name), nn.Parameter)
        ]
        if not names:
            context.remark("program", "has no weight that an adapter could stand beside")
            return PassResult()
        module = TrainableAdapted(
            program, names, rank=self.rank, scale=self.alpha / self.rank, seed=context.seed
        )
        changes, figures = train_program(program, self.train, seed=context.seed, where=where, module=module)
        edit = Rewriter(program, self.name)
        readers = {str(node.target): node for node in program.graph.nodes if node.op == "get_attr"}
        for name, product in module.products().items():
            old = program.tensor(name)
            value = old.detach() + product.to(old.device)
            promise = program.sparsity.get(name)
            if promise is not None:  # also where a mask follows: what is stored shows the zeros, too
                value = value.masked_fill(~promise.mask, 0.0)
            edit.replace_tensor(readers[name], nn.Parameter(value, requires_grad=old.requires_grad))
        trained = sum(item.numel() for item in module.parameters() if item.requires_grad)
        return PassResult(changes + edit.finish(), facts={**figures, "adapter parameters": trained})
