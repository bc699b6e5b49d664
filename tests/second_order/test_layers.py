"""Visiting layers with the Hessians of what they will really get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.programs import seeded
from support.quantize import run
from torch import Tensor, nn

from sqcompile.calibration import Calibration
from sqcompile.errors import CalibrationError, InputError
from sqcompile.layers import Layer, layers_of
from sqcompile.passes import GPTQ, SparseGPT
from sqcompile.pipeline import PassContext
from sqcompile.program import Program
from sqcompile.quantization.format import Format
from sqcompile.second_order import Hessian
from sqcompile.second_order.layers import visit_layers
from sqcompile.tracing import trace


class Padded(nn.Module):
    """Tokens with a mask, as tokenizers give them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = torch.relu(self.first(self.embed(input_ids)))
        return self.second(x) * attention_mask.unsqueeze(-1)


def padded() -> Program:
    batch = torch.export.Dim("batch")
    example = tokens()[0]
    shapes = {"input_ids": {0: batch}, "attention_mask": {0: batch}}
    return trace(seeded(Padded), ((), example), dynamic_shapes=shapes)


def tokens(count: int = 3) -> list[dict[str, Tensor]]:
    """Batches of which the first has no padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 20, (count, 4, 5), generator=generator)
    lengths = torch.randint(1, 6, (count, 4, 1), generator=generator)
    lengths[0] = 5
    masks = (torch.arange(5) < lengths).long()
    return [{"input_ids": rows * mask, "attention_mask": mask} for rows, mask in zip(ids, masks, strict=True)]


def hessians(program: Program, context: PassContext, **options: Any) -> dict[str, Hessian]:
    found = {}

    def visit(layer: Layer, hessian: Hessian) -> Tensor:
        found[layer.name] = hessian
        return program.tensor(layer.weight).detach()

    layers = [layer for layer in layers_of(program) if layer.kind == "linear"]
    visit_layers(program, layers, visit, context, purpose="test", **{"max_bytes": 2**30, **options})
    return found


def test_tokens_of_padding_do_not_count() -> None:
    program, data = padded(), tokens()
    found = hessians(program, PassContext(Calibration(data, program.signature)))
    real = torch.cat([batch["input_ids"][batch["attention_mask"] != 0] for batch in data])
    embedded = program.tensor("embed.weight")[real].detach().double().numpy()
    assert found["first"].count == len(real) < 3 * 4 * 5
    np.testing.assert_allclose(
        found["first"].matrix.numpy(), embedded.T @ embedded / len(real), rtol=1e-4, atol=1e-5
    )
    weight, bias = (program.tensor(f"first.{name}").detach().double().numpy() for name in ("weight", "bias"))
    inner = np.maximum(embedded @ weight.T + bias, 0)
    np.testing.assert_allclose(
        found["second"].matrix.numpy(), inner.T @ inner / len(real), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("max_bytes", [0, 500, 2**30])
def test_values_on_disk_are_those_in_memory(max_bytes: int, tmp_path: Path) -> None:
    program, data = padded(), tokens()
    context = PassContext(Calibration(data, program.signature))
    wanted = hessians(program, context, with_dense=True)
    context.work_dir = tmp_path
    found = hessians(program, context, with_dense=True, max_bytes=max_bytes)
    for name, hessian in wanted.items():
        assert torch.equal(found[name].matrix, hessian.matrix)
        assert hessian.cross is not None and found[name].cross is not None
        assert torch.equal(found[name].cross, hessian.cross)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_all_data_is_used_where_it_may_lie_on_disk(tmp_path: Path) -> None:
    program, data = padded(), tokens(6)
    context = PassContext(Calibration(data, program.signature), max_memory=1)
    assert hessians(program, context)["first"].count == 20
    assert [remark.reason for remark in context.remarks] == [
        "sees the first 1 batches only: more exceed max-bytes"
    ]
    context = PassContext(Calibration(data, program.signature), max_memory=1, work_dir=tmp_path)
    assert hessians(program, context)["first"].count > 20 and not context.remarks


def test_a_token_beyond_the_vocabulary_is_named() -> None:
    data = tokens()
    data[2]["input_ids"] = data[2]["input_ids"] + 15
    with pytest.raises(CalibrationError, match="no row of the model's embedding") as caught:
        run([GPTQ(weight=Format.parse("uint4:group=4:affine"))], padded(), data)
    assert "calibration batch 2" in str(caught.value) and "0 to 19" in str(caught.value)


def test_so_is_one_that_only_the_model_computes() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x + 2))

    program = trace(seeded(Shifted), (torch.arange(8),))
    with pytest.raises(InputError, match="cannot run on these inputs") as caught:
        run([GPTQ(weight=Format.parse("uint4:group=4:affine"))], program, [torch.arange(8) + 11])
    assert "embed" in str(caught.value) and "below the size of the vocabulary" in str(caught.value)


def test_dead_channels_and_little_data_are_damped_with_a_remark() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x * (torch.arange(64) % 4 > 0))

    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 1e3
    for item in (
        SparseGPT(sparsity=0.5, damping=1e-9),
        SparseGPT(sparsity=0.5, damping=1e-9, refit=True),
        GPTQ(weight=Format.parse("uint4:group=16:affine"), damping=1e-9),
    ):
        program = trace(seeded(Dead), (x,))
        (record,) = run([item], program, [x])
        assert any("singular Hessian" in remark.reason for remark in record.remarks)
        assert bool(torch.isfinite(program(x)).all())
