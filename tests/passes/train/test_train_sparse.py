from __future__ import annotations

from typing import Any

import pytest
import torch
from support.passes import refuse_other_levels
from torch import Tensor, nn

from sqcompile import Pass, PassContext, Program, trace
from sqcompile.errors import PassOptionError, SelectionError, TrainingError
from sqcompile.passes import FineTune, RemoveChannels, TrainSparse
from sqcompile.pipeline import PassManager
from sqcompile.testing import check_pass

IMAGES = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = (IMAGES.mean((1, 2, 3)) > 0).long()


class Net(nn.Module):
    """Sixteen channels for a task that needs one or two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def fit(module: nn.Module) -> float:
    optimizer = torch.optim.SGD(module.parameters(), 0.2, momentum=0.9)
    module.train()
    loss = torch.zeros(())
    for _ in range(120):
        loss = nn.functional.cross_entropy(module(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.eval()
    return float(loss.detach())


def run(*passes: Pass) -> tuple[Program, list[Any]]:
    program = trace(model(), (IMAGES,))
    return program, PassManager(passes).run(program, PassContext())


def hits(program: Program) -> float:
    with torch.no_grad():
        return float((program(IMAGES).argmax(1) == LABELS).float().mean())


def test_l1_makes_zeros_that_stay() -> None:
    checked = check_pass(
        TrainSparse(train=fit, strength=0.05),
        model(),
        (IMAGES,),
        idempotent=False,
    )
    program = checked.after
    zeros = checked.record.facts["zero"]
    assert set(zeros) == {"conv.weight", "head.weight"}
    assert checked.after.text().count("= mask(") == 2
    assert zeros["conv.weight"] > 0.2 and hits(program) > 0.9
    for name, part in zeros.items():
        assert program.sparsity[name].sparsity == pytest.approx(part)
    PassManager([FineTune(train=fit)]).run(program, PassContext())
    for name in zeros:
        assert not program.tensor(name)[~program.sparsity[name].mask].any()


def test_without_a_penalty_there_are_no_zeros() -> None:
    program, _ = run(FineTune(train=fit))
    assert program.tensor("conv.weight").all() and program.tensor("head.weight").all()


@pytest.mark.parametrize(("penalty", "strength"), [("group-lasso", 0.08), ("l0", 0.05)])
def test_units_vanish_and_can_be_removed(penalty: Any, strength: float) -> None:
    program, (record,) = run(TrainSparse(train=fit, penalty=penalty, strength=strength))
    count = record.facts["zero"]["conv"]
    assert 4 <= count < 16 and hits(program) > 0.9
    silent = (program.tensor("head.weight") == 0).all(0)
    assert int(silent.sum()) == count
    made = (program.tensor("conv.weight") == 0).flatten(1).all(1)
    assert torch.equal(silent, made), "what makes a unit goes with what reads it, and nothing else does"
    with torch.no_grad():
        before = program(IMAGES)
        PassManager([RemoveChannels(ratio=count / 16)]).run(program, PassContext())
        # Silent channels are the first to go, and removing them changes no more than the order of sums.
        assert program.tensor("conv.weight").shape[0] == 16 - count
        torch.testing.assert_close(program(IMAGES), before, rtol=1e-5, atol=1e-5)


def test_batch_norm_scales_vanish() -> None:
    program, (record,) = run(TrainSparse(train=fit, penalty="batch-norm", strength=0.15))
    part = record.facts["zero"]["norm.weight"]
    assert 0.2 < part < 1 and hits(program) > 0.9
    assert float((program.tensor("norm.weight") == 0).float().mean()) == part
    assert not program.sparsity and program.tensor("conv.weight").all()


def test_gates_are_folded_as_they_were_trained() -> None:
    outputs: list[Tensor] = []

    def train(module: nn.Module) -> None:
        fit(module)
        with torch.no_grad():
            outputs.append(module(IMAGES))

    program, _ = run(TrainSparse(train=train, penalty="l0", strength=0.05))
    with torch.no_grad():
        torch.testing.assert_close(program(IMAGES), outputs[0], rtol=1e-5, atol=1e-5)
    assert not any("gates" in name for name, _ in program.tensors())


def test_layers_and_exclude() -> None:
    _, (record,) = run(TrainSparse(train=fit, layers=("head",)))
    assert set(record.facts["zero"]) == {"head.weight"}
    _, (record,) = run(TrainSparse(train=fit, penalty="group-lasso", exclude=("conv",)))
    assert record.facts["zero"] == {} and "nothing that 'group-lasso'" in str(record.remarks)
    with pytest.raises(SelectionError, match="cnv"):
        run(TrainSparse(train=fit, layers=("cnv",)))


def test_the_model_keeps_its_weights() -> None:
    original = model()
    state = {name: value.clone() for name, value in original.state_dict().items()}
    for penalty in ("l1", "group-lasso", "batch-norm", "l0"):
        program = trace(original, (IMAGES,))
        PassManager([TrainSparse(train=fit, penalty=penalty)]).run(program, PassContext())  # type: ignore[arg-type]
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items())


def test_text_reads_back() -> None:
    item = TrainSparse(train=fit, penalty="l0", strength=0.5)
    assert str(item) == f"train-sparse{{train={__name__}:fit,penalty=l0,strength=0.5}}"
    assert Pass.parse(str(item)) == item


def test_refuses() -> None:
    refuse_other_levels(TrainSparse(train=fit))
    with pytest.raises(PassOptionError, match="'train'"):
        TrainSparse()
    with pytest.raises(PassOptionError, match="'strength'"):
        TrainSparse(train=fit, strength=0.0)
    with pytest.raises(TrainingError, match="changed no parameter"):
        run(TrainSparse(train=lambda module: None))
