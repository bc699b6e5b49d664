"""How layers share zeros: outliers as in OWL, and the least loss, against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.programs import seeded
from support.quantize import run
from torch import Tensor, nn

from sqcompile.calibration import Calibration
from sqcompile.errors import PassOptionError
from sqcompile.layers import layers_of
from sqcompile.passes import SparseGPT, Wanda
from sqcompile.pipeline import PassContext
from sqcompile.program import Program
from sqcompile.pruning import prunable_weights
from sqcompile.second_order.allocation import Allocation, allocate, block_of
from sqcompile.sparsity import Pattern
from sqcompile.tracing import trace

NAMES = ("layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b", "layers.2.a", "layers.2.b")


class Block(nn.Module):
    """Two layers; the weights of some blocks have outliers."""

    def __init__(self, outliers: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)
        with torch.no_grad():
            self.a.weight.view(-1)[:outliers] *= 40

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class Stack(nn.Module):
    """Blocks with none, a few and many outliers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(count) for count in (0, 6, 30))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def stack() -> tuple[Program, list[Tensor]]:
    batches = [torch.randn(16, 24, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    return trace(seeded(Stack), (batches[0],)), batches


def shares(by: Allocation, sparsity: float = 0.6, spread: float = 0.1) -> dict[str, float]:
    program, batches = stack()
    weights = prunable_weights(program, layers_of(program), Pattern(), lambda *_: None)
    context = PassContext(Calibration(batches, program.signature))
    found = allocate(program, weights, context, by=by, sparsity=sparsity, spread=spread, max_bytes=2**30)
    return {name.removesuffix(".weight"): value for name, value in found.items()}


def scores() -> dict[str, NDArray[np.float64]]:
    """|w_ij| · ‖x_j‖ of every layer, from the model's own arithmetic."""
    program, batches = stack()
    tensors = {name: tensor.detach().double().numpy() for name, tensor in program.tensors()}
    x = torch.cat(batches).double().numpy()
    found = {}
    for index in range(3):
        a, b = f"layers.{index}.a", f"layers.{index}.b"
        found[a] = np.abs(tensors[f"{a}.weight"]) * np.sqrt(np.square(x).mean(0))
        inner = np.tanh(x @ tensors[f"{a}.weight"].T + tensors[f"{a}.bias"])
        found[b] = np.abs(tensors[f"{b}.weight"]) * np.sqrt(np.square(inner).mean(0))
        x = x + inner @ tensors[f"{b}.weight"].T + tensors[f"{b}.bias"]
    return found


def test_outliers_are_those_of_the_paper() -> None:
    found, all_scores = shares("outliers"), scores()
    ratios = []
    for index in range(3):
        flat = np.concatenate([all_scores[f"layers.{index}.{letter}"].ravel() for letter in "ab"])
        ratios.append((flat > 5 * flat.mean()).mean())
    ratio = np.array(ratios)
    assert ratio[0] == 0 < ratio[1] < ratio[2]
    density = (ratio - ratio.min()) / (ratio.max() - ratio.min()) * 2 * 0.1
    density = density - density.mean() + (1 - 0.6)
    for index in range(3):
        for letter in "ab":
            assert found[f"layers.{index}.{letter}"] == pytest.approx(1 - density[index], abs=1e-6)


def test_sensitivity_loses_the_least_of_all_with_one_threshold() -> None:
    spread = 0.1
    found = shares("sensitivity", spread=spread)
    losses = {
        name: np.sort(np.square(score).ravel()) / np.square(score).sum() for name, score in scores().items()
    }

    def lost(allocation: dict[str, float]) -> float:
        return sum(losses[name][: round(allocation[name] * losses[name].size)].sum() for name in NAMES)

    assert np.mean([found[name] for name in NAMES]) == pytest.approx(0.6, abs=1e-3)
    assert all(0.5 - 1e-9 <= found[name] <= 0.7 + 1e-9 for name in NAMES)
    assert max(found.values()) - min(found.values()) > 0.05
    # The exact best, one threshold for all by bisection over sorted losses.
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        at = {
            name: float(np.clip((losses[name] < middle).mean(), 0.6 - spread, 0.6 + spread)) for name in NAMES
        }
        low, high = (low, middle) if np.mean(list(at.values())) >= 0.6 else (middle, high)
    assert lost(found) == pytest.approx(lost(at), rel=0.02)  # bins of a 64th of a decade
    assert lost(found) < 0.97 * lost(dict.fromkeys(NAMES, 0.6))


def test_uniform_is_uniform_and_needs_no_data() -> None:
    program, _ = stack()
    weights = prunable_weights(program, layers_of(program), Pattern(), lambda *_: None)
    found = allocate(program, weights, PassContext(), by="uniform", sparsity=0.3, spread=0.1, max_bytes=1)
    assert found == {f"{name}.weight": 0.3 for name in NAMES}


@pytest.mark.parametrize("by", ["outliers", "sensitivity"])
@pytest.mark.parametrize("kind", [Wanda, SparseGPT])
def test_passes_share_zeros_so(kind: type[Wanda] | type[SparseGPT], by: Allocation) -> None:
    program, batches = stack()
    item = kind(sparsity=0.6, allocation=by, spread=0.1)
    assert not item.local and kind(sparsity=0.6).local
    (record,) = run([item], program, batches)
    wanted = shares(by)
    for name, value in record.facts["sparsity"].items():
        assert value == pytest.approx(wanted[name], abs=0.042)  # a row of 24 weights loses a whole number


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(PassOptionError, match="allocation"):
        Wanda(pattern="2:4", allocation="outliers")
    with pytest.raises(PassOptionError, match="spread"):
        SparseGPT(sparsity=0.5, spread=0.0)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.12.mlp.up", "model.layers.12"),
        ("lm_head", "lm_head"),
        ("h.0", "h.0"),
        ("conv1.weight", "conv1.weight"),
    ],
)
def test_a_block_is_the_first_numbered_module(name: str, block: str) -> None:
    assert block_of(name) == block
