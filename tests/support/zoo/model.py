"""What one entry of the zoo is, and how its random weights are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

# One object each: torch.export identifies symbolic dimensions by these, and their names are the ones
# that graph text and ONNX files show.
BATCH = torch.export.Dim("batch", max=64)
SEQUENCE = torch.export.Dim("sequence", min=2, max=48)


@dataclass(frozen=True)
class ZooModel:
    """A small random architecture that the whole test suite can trace, compile and compare.

    Attributes:
        name: Key in `ZOO`.
        family: "cnn", "encoder", "decoder", "vision", "audio", "mlp" or "recurrent".
        make: Builds the model: eval mode, fp32, the same weights at every call.
        make_inputs: `(seed, batch, sequence) -> (args, kwargs)`; models without a sequence ignore the last.
        dynamic_shapes: As torch.export takes it, or None where every shape is fixed.
        notes: What makes this entry different from the others.
        has_sequence: Whether the sequence length is a dimension of the inputs.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    make_inputs: Callable[[int, int, int], Inputs]
    dynamic_shapes: Any
    notes: str = ""
    has_sequence: bool = False

    def inputs(self, seed: int = 0, batch: int = 2, sequence: int = 12) -> Inputs:
        """Return positional and keyword inputs; another seed, batch or sequence gives another set."""
        return self.make_inputs(seed, batch, sequence)


def generator(seed: int) -> torch.Generator:
    """A generator of its own, so that no test depends on the global random state."""
    return torch.Generator().manual_seed(seed)


_DRAW: ContextVar[int] = ContextVar("_DRAW", default=0)


@contextmanager
def other_weights(draw: int) -> Iterator[None]:
    """Models that are made inside have other random weights: those of this draw; 0 is the usual one."""
    token = _DRAW.set(draw)
    try:
        yield
    finally:
        _DRAW.reset(token)


def build_random(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model whose every parameter has a value that shows errors, in eval mode.

    Library initializations hide mistakes: biases are zero, norms are the identity, and weights of
    std 0.02 make every attention uniform. Here matrices keep the variance of what passes through them,
    vectors move away from what they were, and tied parameters stay tied.
    """
    # Constructors draw from the global state, which tests must find as they left it.
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1000 * _DRAW.get())
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape)
                if parameter.ndim < 2:
                    parameter.add_(0.1 * noise)
                    continue
                # Convolutions here feed rectifiers, which halve the variance.
                gain = 2.0 if parameter.ndim == 4 else 1.0
                parameter.copy_(noise * (gain / parameter[0].numel()) ** 0.5)
    return model.eval()


def settle_batch_norms(model: nn.Module, args: tuple[torch.Tensor, ...], seed: int) -> nn.Module:
    """Give batch norms random affine parameters and the statistics of a real batch.

    Invented statistics would let the signal die or explode with depth; the untouched ones (mean 0,
    variance 1) would let a wrong folding pass unseen.
    """
    source = generator(seed)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(0.6 + 0.8 * torch.rand(norm.weight.shape, generator=source))
            norm.bias.copy_(0.3 * torch.randn(norm.bias.shape, generator=source))
            norm.train()
            norm.momentum = 1.0
        model(*args)
        for norm in norms:
            norm.eval()
            norm.momentum = 0.1
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.zero_()
    return model
