"""Calibration, sweeps and searches run where the model is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.quantize import settled, values
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import Program, trace
from sqcompile.calibration import Calibration
from sqcompile.mixed_precision import Candidate
from sqcompile.passes import (
    AWQ,
    GPTQ,
    AdaRound,
    ApplyMasks,
    Calibrate,
    FoldQDQ,
    FreezeObservers,
    InsertObservers,
    MixedPrecision,
    QuantizeWeights,
    RotateWeights,
    SmoothQuant,
    SparseGPT,
    SplitInputs,
    Wanda,
)
from sqcompile.pipeline import Pass, PassContext, PassManager
from sqcompile.quantization.format import Format
from sqcompile.second_order import Hessian
from sqcompile.second_order.learned_rounding import learn_rounding
from sqcompile.second_order.rounding import round_weight
from sqcompile.second_order.scaling import smoothing_scale
from sqcompile.sparsity import Pattern

FORMAT = Format.parse("uint4:group=8:affine")
CANDIDATES = tuple(map(Candidate.parse, ("uint2:group=8:affine", "uint4:group=8:affine", "int8:channel=0")))


def hessian() -> Hessian:
    found = Hessian(32)
    x = values(100, 32)
    found.add(x, x + 0.1 * x.flip(0))
    return found


WORK: dict[str, Callable[[Tensor, Hessian], Any]] = {
    "round": partial(round_weight, format=FORMAT),
    "round, minmax": partial(round_weight, format=Format.parse("int3:channel=0"), search="minmax"),
    "round, half-quadratic": partial(round_weight, format=FORMAT, search="half-quadratic"),
    "round and prune": partial(round_weight, format=FORMAT, pattern=Pattern.parse("2:4")),
    "learn": partial(learn_rounding, format=FORMAT, steps=5),
    "smooth": lambda weight, hessian: smoothing_scale([weight], hessian.peak, 0.5),
}


@pytest.mark.parametrize("name", WORK)
def test_nothing_is_made_anywhere_else(name: str) -> None:
    """What is made without saying where lies on `meta` here, and cannot meet what lies on the CPU."""
    weight, about = values(24, 32, seed=3), hessian()
    with torch.no_grad(), torch.device("meta"):
        WORK[name](weight, about)


class Block(nn.Module):
    """A norm, two layers that read it, and one that reads their product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(torch.sigmoid(self.gate(y)) * self.up(y))


PIPELINES: dict[str, Callable[[], list[Pass]]] = {
    "gptq": lambda: [GPTQ(weight=FORMAT), FoldQDQ()],
    "codebook": lambda: [GPTQ(weight=Format.parse("int4:group=8:mapping=codebook"))],
    "tanh": lambda: [QuantizeWeights(weight=Format.parse("int4:group=8:mapping=tanh"), search="mse")],
    "joint": lambda: [GPTQ(weight=FORMAT, sparsity=0.5)],
    "ada-round": lambda: [AdaRound(weight=FORMAT, steps=50)],
    "awq": lambda: [AWQ(weight=FORMAT), QuantizeWeights(weight=FORMAT, search="mse")],
    "smooth-quant": lambda: [
        SmoothQuant(),
        QuantizeWeights(activation=Format.parse("uint8:affine:token:dynamic")),
    ],
    "table of values": lambda: [QuantizeWeights(activation=Format.parse("int4:token:dynamic:mapping=nf"))],
    "rotate": lambda: [RotateWeights(), QuantizeWeights(weight=FORMAT)],
    "split": lambda: [SplitInputs(multiple=8), QuantizeWeights(weight=FORMAT)],
    "sparse-gpt": lambda: [SparseGPT(sparsity=0.5, refit=True), ApplyMasks()],
    "wanda": lambda: [Wanda(pattern="2:4"), ApplyMasks()],
    "sensitivity": lambda: [SparseGPT(sparsity=0.5, allocation="sensitivity"), ApplyMasks()],
    "mixed, fisher": lambda: [MixedPrecision(quantize=GPTQ(weight=FORMAT), bits=8.0, candidates=CANDIDATES)],
    "mixed, divergence": lambda: [
        MixedPrecision(quantize=GPTQ(weight=FORMAT), bits=8.0, candidates=CANDIDATES, measure="divergence")
    ],
    "static": lambda: [InsertObservers(), Calibrate(), FreezeObservers(), FoldQDQ()],
}


def compressed(passes: list[Pass], device: str) -> tuple[Program, Tensor]:
    """Compress a model that lies on a device; return it, and what it gives."""
    model = settled(Block(), Block()).to(device)
    x = values(64, 32).to(device)
    program = trace(model, (x,), dynamic_shapes=({0: Dim("rows")},))
    data = [values(64, 32, seed=seed).to(device) for seed in range(3)]
    context = PassContext(calibration=Calibration(data, program.signature))
    PassManager(passes, check_batches=[[x]]).run(program, context)
    with torch.no_grad():
        return program, program(x).cpu()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", PIPELINES)
def test_a_model_on_a_gpu_is_compressed_there(name: str) -> None:
    with torch.no_grad():
        dense = settled(Block(), Block())(values(64, 32))
    (_, wanted), (program, found) = (compressed(PIPELINES[name](), device) for device in ("cpu", "cuda"))
    large = [tensor for _, tensor in program.tensors() if tensor.dim() > 1]
    assert large and all(tensor.is_cuda for tensor in large)
    # Sums in another order change which of two codes a weight gets; not how good the result is.
    ours, theirs = ((output - dense).square().mean() for output in (found, wanted))
    assert ours <= 1.2 * theirs + 1e-9


@pytest.mark.parametrize("name", PIPELINES)
def test_these_pipelines_do_something(name: str) -> None:
    """So that the test above, on a machine that can run it, compares what it should."""
    with torch.no_grad():
        dense = settled(Block(), Block())(values(64, 32))
    _, output = compressed(PIPELINES[name](), "cpu")
    error = (output - dense).square().mean() / dense.square().mean()
    assert 1e-8 < error < 0.5
