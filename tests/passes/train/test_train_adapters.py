from __future__ import annotations

from typing import Any

import pytest
import torch
from support.passes import refuse_other_levels
from torch import Tensor, nn

from sqcompile import Pass, PassContext, Program, trace
from sqcompile.errors import PassOptionError, SelectionError, TrainingError
from sqcompile.passes import ApplyMasks, MaskWeights, TrainAdapters
from sqcompile.pipeline import PassManager
from sqcompile.testing import check_pass

IMAGES = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 12), nn.Linear(12, 3)
    ).eval()


with torch.no_grad():
    WANTED = model()(IMAGES)


def fit(module: nn.Module) -> float:
    """Bring the outputs near those of the dense model; returns the last loss."""
    optimizer = torch.optim.Adam([item for item in module.parameters() if item.requires_grad], 0.02)
    loss = torch.zeros(())
    for _ in range(60):
        loss = (module(IMAGES) - WANTED).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def run(*passes: Pass) -> tuple[Program, list[Any]]:
    program = trace(model(), (IMAGES,))
    return program, PassManager(passes).run(program, PassContext())


def loss(program: Program) -> float:
    with torch.no_grad():
        return float((program(IMAGES) - WANTED).square().mean())


def test_recovers_and_leaves_no_adapter() -> None:
    checked = check_pass(
        TrainAdapters(train=fit, rank=2),
        model(),
        (IMAGES,),
        prepare=[MaskWeights(sparsity=0.5)],
        idempotent=False,
    )
    assert checked.after.text() == checked.before.text(), "the graph is as it was"
    assert loss(checked.after) < 0.2 * loss(checked.before)
    assert checked.record.facts["adapter parameters"] == 2 * (6 + 18 + 12 + 96 + 3 + 12)


@pytest.mark.parametrize("finish", [(), (ApplyMasks(),)], ids=["masks", "promises"])
def test_the_folded_program_is_the_adapted_module(finish: tuple[Pass, ...]) -> None:
    outputs: list[Tensor] = []

    def train(module: nn.Module) -> None:
        fit(module)
        with torch.no_grad():
            outputs.append(module(IMAGES))

    program, _ = run(MaskWeights(sparsity=0.5), *finish, TrainAdapters(train=train))
    with torch.no_grad():
        torch.testing.assert_close(program(IMAGES), outputs[0], rtol=1e-5, atol=1e-6)
    for name, promise in program.sparsity.items():
        weight = program.tensor(name)
        assert not weight[~promise.mask].any() and weight[promise.mask].all(), "no zero comes back"


def test_only_the_adapters_train() -> None:
    trained: list[str] = []
    outputs: list[Tensor] = []

    def train(module: nn.Module) -> None:
        trained.extend(name for name, item in module.named_parameters() if item.requires_grad)
        with torch.no_grad():
            outputs.append(module(IMAGES))
        fit(module)

    program, _ = run(MaskWeights(sparsity=0.5), TrainAdapters(train=train, layers=("3",), rank=2))
    assert trained == ["3.weight_adapter_a", "3.weight_adapter_b"]
    pruned, _ = run(MaskWeights(sparsity=0.5))
    with torch.no_grad():
        assert torch.equal(outputs[0], pruned(IMAGES)), "an adapter begins without effect"
    for name, tensor in pruned.tensors():
        assert torch.equal(program.tensor(name), tensor) == (name != "3.weight"), name
        assert program.tensor(name).requires_grad == tensor.requires_grad
    change = program.tensor("3.weight") - pruned.tensor("3.weight") * program.sparsity["3.weight"].mask
    assert change.detach()[program.sparsity["3.weight"].mask].any()


def test_the_change_has_the_rank() -> None:
    program, _ = run(TrainAdapters(train=half, rank=1, layers=("3", "4")))
    before = dict(model().named_parameters())
    for name in ("3.weight", "4.weight"):
        values = torch.linalg.svdvals((program.tensor(name) - before[name]).detach())
        # What is left beyond the first is the rounding of single precision.
        assert values[0] > 1e-3 and values[1] < 1e-5 * values[0].clamp(min=1)


def half(module: nn.Module) -> None:
    """One large step towards half of the outputs."""
    optimizer = torch.optim.SGD([item for item in module.parameters() if item.requires_grad], 0.5)
    for _ in range(5):
        optimizer.zero_grad()
        (module(IMAGES) - 0.5 * WANTED).square().mean().backward()
        optimizer.step()


def test_text_reads_back() -> None:
    item = TrainAdapters(train=fit, rank=4)
    assert str(item) == f"train-adapters{{train={__name__}:fit,rank=4}}"
    assert Pass.parse(str(item)) == item


def test_without_weights_there_is_a_remark() -> None:
    program = trace(nn.ReLU(), (IMAGES,))
    (record,) = PassManager([TrainAdapters(train=fit)]).run(program, PassContext())
    assert record.changes == 0 and "no weight" in str(record.remarks[0])


def test_refuses() -> None:
    refuse_other_levels(TrainAdapters(train=fit))
    for options in ({}, {"train": fit, "rank": 0}, {"train": fit, "alpha": 0.0}):
        with pytest.raises(PassOptionError):
            TrainAdapters(**options)  # type: ignore[arg-type]
    with pytest.raises(SelectionError):
        run(TrainAdapters(train=fit, layers=("5",)))
    with pytest.raises(TrainingError, match="changed no parameter"):
        run(TrainAdapters(train=lambda module: None))
