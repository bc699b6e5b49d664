"""Every recipe of the gallery does on a small model what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.programs import data, seeded
from torch import nn

import sqcompile
from sqcompile import Recipe
from sqcompile.api import Compiled
from sqcompile.errors import RecipeError
from sqcompile.gallery import gallery, gallery_file

TUNING = """
import torch


def train(module):
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)
    images = torch.ones(4, 3, 8, 8)
    loss = module(images).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())
"""


class Language(nn.Module):
    """Tokens in, logits out; layers that groups of 64 fit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)
        self.head = nn.Linear(64, 32)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        logits: torch.Tensor = self.head(x + self.down(torch.tanh(self.up(x))))
        return logits


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(image)))
        logits: torch.Tensor = self.head(torch.relu(self.deep(x)).mean((2, 3)))
        return logits


def compiled(name: str) -> Compiled:
    recipe = Recipe.load(name)
    if name.startswith(("cnn", "edge", "qat")):
        model, batches = seeded(Images), [data(4, 3, 8, 8, seed=seed) for seed in range(3)]
    elif name.startswith("encoder"):
        model = seeded(lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)))
        batches = [data(8, 64, seed=seed) for seed in range(3)]
    else:
        model = seeded(Language)
        draw = np.random.default_rng(0)
        batches = [torch.from_numpy(draw.integers(0, 32, (8, 16))) for _ in range(3)]
    made = sqcompile.compile(model, recipe, calibration=batches)
    assert isinstance(made, Compiled)
    return made


@pytest.fixture(autouse=True)
def _tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuning.py").write_text(TUNING)


WEIGHTS = {
    "cnn-int8": {"stem": "int8:channel", "deep": "int8:channel", "head": "int8:channel"},
    "cnn-structured": {"stem": "int8:channel", "deep": "int8:channel", "head": "int8:channel"},
    "edge-cnn": {"stem": "int8:channel", "deep": "int8:channel", "head": "int8:channel"},
    "encoder-block-sparse": {"0": "int8:channel", "2": "int8:channel"},
    "encoder-int8": {"0": "int8:channel", "2": "int8:channel"},
    "llm-4bit": {"embed": "int8:channel", "up": "uint4:group=32", "head": "int8:channel"},
    "llm-sparse-4bit": {"embed": "int8:channel", "up": "uint4:group=32", "head": "int8:channel"},
    "llm-mixed-budget": {"embed": "int8:channel", "head": "int8:channel"},
    "nf4": {"embed": "int8:channel", "up": "table of 16:group=64", "head": "int8:channel"},
    "qat": {"stem": "int4:channel", "deep": "int4:channel", "head": "int4:channel"},
}


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_each_recipe_compiles_a_small_model(name: str) -> None:
    if name == "llm-mixed-budget":
        pytest.importorskip("scipy")
    made = compiled(name)
    rows = {row.name: row for row in made.report.layers}
    assert {layer: rows[layer].weight for layer in WEIGHTS[name]} == WEIGHTS[name]
    distance = made.report.output_distance
    assert distance is not None and distance.finite
    if name == "llm-sparse-4bit":
        assert rows["up"].sparsity >= 0.5 and rows["head"].sparsity < 0.3  # nothing but rounding's own
    if name == "encoder-block-sparse":
        assert rows["0"].sparsity >= 0.79 and made.report.backend == "native"
    if name == "edge-cnn":
        assert rows["deep"].sparsity >= 0.49 and rows["stem"].sparsity < 0.3
    if name == "cnn-structured":
        assert rows["deep"].shape[0] < 16 and made.report.size.parameters < made.report.original.parameters
    if name == "llm-mixed-budget":
        (facts,) = [record.facts for record in made.report.passes if record.facts.get("frontier")]
        assert facts["bits"] <= 3.5
    if name == "qat":
        assert any(record.text.startswith("train-quantized") for record in made.report.passes)


def test_there_are_ten_and_each_says_what_it_is_for() -> None:
    assert sorted(gallery()) == sorted(WEIGHTS) and len(WEIGHTS) == 10
    for name, summary in gallery().items():
        assert summary.endswith("."), name
        text = gallery_file(name).read_text(encoding="utf-8")
        assert f"-r {name}" in text, "it says how it is called"
        # Whoever takes one adds a model and data of their own.
        recipe = Recipe.load(name)
        assert recipe.model is None and recipe.data is None and recipe.output is None


def test_other_names() -> None:
    with pytest.raises(RecipeError, match="no recipe 'cnn-int4'") as caught:
        Recipe.load("cnn-int4")
    assert "cnn-int8" in (caught.value.next_step or "")
