from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqcompile import PassContext, trace
from sqcompile.calibration import Calibration
from sqcompile.distillation import distill_states
from sqcompile.errors import InputError, SelectionError
from sqcompile.hidden import HiddenStates
from sqcompile.passes import Calibrate, FineTune, InsertObservers, RemoveChannels, pipelines
from sqcompile.pipeline import PassManager
from sqcompile.quantization.trainable import TrainableQuantized
from sqcompile.training import Trainable

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
NAMES = ("blocks.0", "blocks.1.conv", "head")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.out = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.out(self.norm(self.conv(x)).relu()))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.head(self.blocks(self.stem(x)).mean((2, 3)))}


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.mark.parametrize("training", [False, True])
def test_the_module_to_train_shows_what_the_model_does(training: bool) -> None:
    original = model()
    module = Trainable(trace(original, (IMAGES,)))
    with HiddenStates(original.train(training), NAMES) as wanted, HiddenStates(module, NAMES) as states:
        expected, seen = original(IMAGES), module.train(training)(IMAGES)
    assert torch.equal(seen["y"], expected["y"]) and list(states) == list(NAMES) and len(states) == 3
    for name in NAMES:
        assert torch.equal(states[name], wanted[name]), name
    assert float(distill_states(states, wanted).detach()) == 0


def test_states_carry_gradients_and_end_with_their_watch() -> None:
    module = Trainable(trace(model(), (IMAGES,)))
    states = HiddenStates(module, ["blocks.0"])
    module(IMAGES)
    first = states["blocks.0"]
    first.sum().backward()
    weights = dict(module.named_parameters())
    assert weights["blocks.0.conv.weight"].grad is not None and weights["blocks.1.conv.weight"].grad is None
    states.close()
    assert isinstance(module(IMAGES + 1), dict)
    assert states["blocks.0"] is first, "nothing is kept after the end"


def test_a_program_under_quantization_shows_its_states() -> None:
    original = model()
    program = trace(original, (IMAGES,))
    context = PassContext(calibration=Calibration([IMAGES], program.signature))
    PassManager([*pipelines.canonical(), InsertObservers(), Calibrate()]).run(program, context)
    module = TrainableQuantized(program)
    with HiddenStates(original, NAMES) as wanted, HiddenStates(module, NAMES) as states:
        original(IMAGES)
        module(IMAGES)
    for name in ("blocks.0", "head"):  # a folded batch norm is part of the convolution before it
        error = (states[name] - wanted[name]).norm() / wanted[name].norm()
        assert 0 < float(error) < 0.05, "8 bits round, and no more"


def test_hooks_of_the_teacher_go() -> None:
    original = model()
    with HiddenStates(original, NAMES):
        original(IMAGES)
    assert not any(module._forward_hooks for module in original.modules())


def test_copies_of_a_watched_module_run() -> None:
    module = Trainable(trace(model(), (IMAGES,)))
    with HiddenStates(module, NAMES):
        twin = copy.deepcopy(module)
        assert torch.equal(twin(IMAGES)["y"], module(IMAGES)["y"])


def test_blocks_that_lost_channels_inside_are_brought_near_their_teacher() -> None:
    original = model()
    losses: list[float] = []

    def train(module: nn.Module) -> None:
        names = ("blocks.0", "blocks.1")
        optimizer = torch.optim.Adam(module.parameters(), 1e-2)
        with HiddenStates(original, names) as teacher, HiddenStates(module, names) as student:
            for _ in range(20):
                with torch.no_grad():
                    original(IMAGES)
                module(IMAGES)
                loss = distill_states(student, teacher)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))

    program = trace(original, (IMAGES,))
    remove = RemoveChannels(ratio=0.5, layers=("blocks.*.conv",))
    PassManager([remove, FineTune(train=train), *pipelines.canonical()]).run(program, PassContext())
    assert program.tensor("blocks.0.conv.weight").shape[0] == 4
    assert losses[-1] < 0.5 * losses[0]


MISTAKES: dict[str, tuple[Any, str]] = {
    "model": (lambda: HiddenStates(model(), ["blocks.2"]), "no module 'blocks.2'"),
    "program": (lambda: HiddenStates(Trainable(trace(model(), (IMAGES,))), ["blok.0"]), "no module 'blok.0'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_refuses_unknown_modules(name: str) -> None:
    make, message = MISTAKES[name]
    with pytest.raises(SelectionError, match=message) as caught:
        make()
    assert caught.value.next_step and "blocks.0" in caught.value.next_step


def test_refuses_states_before_a_call() -> None:
    with pytest.raises(InputError, match="no hidden states yet"):
        HiddenStates(model(), NAMES)["head"]


def test_refuses_other_names_and_widths() -> None:
    states = {"a": torch.zeros(2, 3)}
    with pytest.raises(InputError, match="the same modules"):
        distill_states(states, {"b": torch.zeros(2, 3)})
    with pytest.raises(InputError, match="do not fit") as caught:
        distill_states(states, {"a": torch.zeros(2, 4)})
    assert "'a'" in str(caught.value)
