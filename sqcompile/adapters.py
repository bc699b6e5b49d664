"""Low-rank adapters: a few parameters beside each weight, which are added to it when training is over."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sqcompile.program import Program
from sqcompile.training import Trainable


class TrainableAdapted(Trainable):
    """A program to train by adapters alone: each chosen weight is W + scale · B A, and W itself is frozen.

    The adapter stands before the weight's mask, so that what is pruned stays zero. B begins at zero, and the
    module as the program.

    Args:
        program: The program; it is only read.
        weights: Names of the weights that get adapters, `NAME_adapter_a` [r, K] and `NAME_adapter_b` [O, r].
        rank: r; at most the smaller side of a weight's matrix [O, K] is taken.
        scale: What the product is multiplied with.
        seed: Seed of the first A.
    Source: Hu et al. 2022 (LoRA), section 4.1.
    """

    def __init__(
        self, program: Program, weights: Sequence[str], *, rank: int, scale: float, seed: int = 0
    ) -> None:
        self._weights, self._rank, self._scale, self._seed = tuple(weights), rank, scale, seed
        self._adapters: dict[str, tuple[str, str]] = {}
        super().__init__(program)

    @torch.no_grad()
    def products(self) -> dict[str, Tensor]:
        """Return what the adapters add to each weight, in its shape, by name of the weight."""
        return {
            name: adapted(torch.zeros_like(weight), self.get_parameter(a), self.get_parameter(b), self._scale)
            for name, (a, b) in self._adapters.items()
            for weight in [self.get_parameter(name)]
        }

    def _prepare(self, twin: Program) -> None:
        super()._prepare(twin)
        for name, tensor in list(twin.tensors()):
            if isinstance(tensor, nn.Parameter):
                twin.set_tensor(name, nn.Parameter(tensor.detach(), requires_grad=False))
        generator = torch.Generator().manual_seed(self._seed)
        graph = twin.graph
        for name in self._weights:
            weight = twin.tensor(name)
            outputs, inputs = weight.shape[0], weight[0].numel()
            rank = min(self._rank, outputs, inputs)
            bound = 1 / math.sqrt(inputs)
            first = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
            reader = next(node for node in graph.nodes if node.op == "get_attr" and node.target == name)
            users = list(reader.users)
            stored = []
            with graph.inserting_before(next(iter(graph.nodes))):
                for which, value in (("a", first), ("b", torch.zeros(outputs, rank))):
                    free = twin.free_name(f"{name}_adapter_{which}")
                    twin.set_tensor(free, nn.Parameter(value.to(weight.dtype)))
                    stored.append(graph.get_attr(free))
            self._adapters[name] = str(stored[0].target), str(stored[1].target)
            with graph.inserting_before(next(twin.compute_nodes())):
                sum_ = graph.call_function(adapted, (reader, *stored, self._scale))
            for user in users:
                user.replace_input_with(reader, sum_)


def adapted(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return weight + scale · B A. Shapes: weight [O, …] with K numbers a row, a [r, K], b [O, r]; result as weight."""
    return weight + scale * (b @ a).view_as(weight)
