from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqcompile import Pass, PassContext, Program, trace
from sqcompile.distillation import distill_logits, distill_states
from sqcompile.errors import InputError, PassOptionError, TrainingError
from sqcompile.hidden import HiddenStates
from sqcompile.passes import ApplyMasks, FoldBatchNorm, MaskWeights
from sqcompile.pipeline import PassManager, verify_program
from sqcompile.training import Round, Trainable, check_function, train_program

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
    )
    return made.eval()


def traced(*passes: Pass) -> Program:
    program = trace(model(), (IMAGES,))
    PassManager(passes).run(program, PassContext())
    return program


def descend(module: nn.Module, now: Round | None = None) -> None:
    """Three steps of an optimizer whose weight decay and momentum move weights without gradient, too."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.5)
    module.train()
    for _ in range(3):
        optimizer.zero_grad()
        module(IMAGES).square().mean().backward()
        optimizer.step()
    module.eval()


def test_a_trainable_is_the_model_in_both_modes() -> None:
    original = model()
    module = Trainable(trace(original, (IMAGES,)))
    assert {name for name, _ in module.named_parameters()} == {
        name for name, _ in original.named_parameters()
    }
    assert torch.equal(module(IMAGES), original(IMAGES))
    original.train()
    module.train()
    torch.manual_seed(1)
    expected = original(IMAGES)
    torch.manual_seed(1)
    assert torch.equal(module(IMAGES), expected), "batch statistics and dropout as in training"
    assert torch.equal(module.get_buffer("1.running_mean"), original[1].running_mean)
    assert torch.equal(module.eval()(IMAGES), original.eval()(IMAGES)), "the statistics were updated alike"


def test_frozen_norms_keep_their_statistics_and_use_them() -> None:
    original = model()
    original[3] = nn.Identity()  # a dropout would make training differ by itself
    module = Trainable(trace(original, (IMAGES,)), freeze_norms=True).train()
    assert torch.equal(module(IMAGES), original(IMAGES))
    assert torch.equal(module.get_buffer("1.running_mean"), original[1].running_mean)
    module(IMAGES).sum().backward()
    assert module.get_parameter("1.weight").grad is not None, "scales and shifts go on learning"


def test_gradients_are_the_model_s() -> None:
    original = model()
    module = Trainable(trace(original, (IMAGES,)))
    for item in (original, module):
        item.eval()(IMAGES).square().sum().backward()
    found = dict(module.named_parameters())
    for name, parameter in original.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad)  # sums in another order


def test_a_trainable_follows_its_own_tensors() -> None:
    module = Trainable(traced())
    state = {name: value + 1 for name, value in module.state_dict().items() if value.is_floating_point()}
    before = module(IMAGES)
    twin = copy.deepcopy(module)
    module.load_state_dict(state, strict=False, assign=True)
    assert not torch.equal(module(IMAGES), before)
    assert torch.equal(twin(IMAGES), before), "a copy, as averages of weights make, is independent"


def test_refuses_other_inputs() -> None:
    with pytest.raises(InputError):
        Trainable(traced())(IMAGES[:, :2])


def test_training_reaches_the_program_and_nothing_else() -> None:
    original = model()
    program = trace(original, (IMAGES,))
    snapshot, weights = program.snapshot(), copy.deepcopy(original.state_dict())
    changes, figures = train_program(program, descend)
    assert changes == 8 and figures == {}  # six parameters and two running statistics
    assert not torch.equal(program.run([IMAGES])[0], snapshot.run([IMAGES])[0])
    for name, value in original.state_dict().items():
        assert torch.equal(value, weights[name]), f"the user's {name} has changed"
    for name, tensor in snapshot.tensors():
        assert torch.equal(tensor, weights[name])
        assert isinstance(program.tensor(name), nn.Parameter) == isinstance(tensor, nn.Parameter)
    verify_program(program)


@pytest.mark.parametrize("finish", [(), (ApplyMasks(),)], ids=["masks", "promises"])
def test_zeros_stay(finish: tuple[Pass, ...]) -> None:
    program = traced(MaskWeights(sparsity=0.5), *finish)
    text = program.text()
    zeros = {name: ~promise.mask for name, promise in program.sparsity.items()}
    assert len(zeros) == 2
    train_program(program, descend)
    verify_program(program)
    assert program.text() == text, "training changes numbers, and no graph"
    PassManager([ApplyMasks()]).run(program, PassContext())
    for name, zero in zeros.items():
        assert not program.tensor(name)[zero].any()
        assert program.tensor(name)[~zero].all()


def test_the_seed_decides_and_the_outside_is_untouched() -> None:
    results = []
    for seed in (0, 0, 1):
        program = traced()
        state = torch.get_rng_state()
        train_program(program, descend, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(program.tensor("0.weight"))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode])
def test_trains_where_gradients_are_off(outside: Callable[[], Any]) -> None:
    program = traced()
    with outside():
        assert train_program(program, descend)[0] == 8


def test_figures_and_rounds() -> None:
    seen: list[Round] = []

    def train(module: nn.Module, now: Round) -> dict[str, Any]:
        seen.append(now)
        descend(module)
        return {"loss": torch.tensor(0.5), "epochs": 3, "note": "left out"}

    now = Round(2, 5, 0.3, 7)
    assert train_program(traced(), train, now=now)[1] == {"loss": 0.5, "epochs": 3.0}
    assert seen == [now]


def test_frozen_parameters_stay() -> None:
    original = model()
    original[0].requires_grad_(False)
    program = trace(original, (IMAGES,))
    train_program(program, descend)
    assert torch.equal(program.tensor("0.weight"), original[0].weight)
    assert not program.tensor("0.weight").requires_grad and program.tensor("5.weight").requires_grad


def poison(module: nn.Module) -> None:
    with torch.no_grad():
        module.get_parameter("5.bias").fill_(float("nan"))


def unmask(module: nn.Module) -> None:
    descend(module)
    module.get_buffer("5.weight_mask").fill_(True)


def grow(module: nn.Module) -> None:
    module.get_submodule("5").bias = nn.Parameter(torch.zeros(4))


def fail(module: nn.Module) -> None:
    raise ValueError("no data")


def forward_only(module: nn.Module) -> None:
    module.train()(IMAGES)


def another(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)


MISTAKES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "nothing": (lambda module: None, "changed no parameter"),
    "statistics-only": (forward_only, "changed no parameter"),
    "nan": (poison, "diverged"),
    "nan-loss": (lambda module: float("nan"), "diverged"),
    "mask": (unmask, "wrote into a mask"),
    "shape": (grow, "changed the module itself"),
    "raises": (fail, "training function failed"),
    "another": (another, "returned another module"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_refuses(name: str) -> None:
    function, message = MISTAKES[name]
    program = traced(MaskWeights(sparsity=0.5))
    before = program.fingerprint()
    with pytest.raises(TrainingError, match=message) as caught:
        train_program(program, function)
    assert caught.value.seen and caught.value.expected and caught.value.where
    assert program.fingerprint() == before
    if name == "raises":
        assert "test_training.py" in caught.value.where and "no data" in caught.value.seen
    if name in ("nan", "mask", "shape"):
        assert "@5." in caught.value.where


def wider_teacher(module: nn.Module) -> None:
    with torch.no_grad():
        wanted = nn.Linear(3, 7)(module(IMAGES))
    distill_logits(module(IMAGES), wanted).backward()


def other_modules(module: nn.Module) -> None:
    with HiddenStates(model(), ["0", "5"]) as teacher, HiddenStates(module, ["0"]) as student:
        module(IMAGES)
        distill_states(student, teacher)


def other_images(module: nn.Module) -> None:
    module(IMAGES[..., :3])


STRANGERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "widths": (wider_teacher, "do not fit together"),
    "modules": (other_modules, "states of the same modules"),
    "inputs": (other_images, "wrong size"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_mismatch_names_the_line_of_the_training_function(name: str) -> None:
    function, message = STRANGERS[name]
    program = traced()
    before = program.fingerprint()
    with pytest.raises(InputError, match=message) as caught:
        train_program(program, function)
    lines, start = inspect.getsourcelines(function)
    named = int(re.findall(r"test_training\.py:(\d+)", caught.value.where or "")[0])
    assert start <= named < start + len(lines)
    assert program.fingerprint() == before


def test_refuses_a_program_with_nothing_to_train() -> None:
    with pytest.raises(TrainingError, match="nothing to train"):
        train_program(trace(model().requires_grad_(False), (IMAGES,)), descend)


def test_refuses_what_is_no_function() -> None:
    with pytest.raises(PassOptionError, match="is a function"):
        check_function(3)  # type: ignore[arg-type]
    assert check_function(None) is None


def test_a_folded_batch_norm_trains_as_part_of_its_layer() -> None:
    program = traced(FoldBatchNorm())
    module = Trainable(program)
    assert "1.running_mean" not in module.state_dict()
    assert train_program(program, descend)[0] == 4


def test_a_tied_weight_is_one_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.inner(self.inner(x))}

    rows = torch.ones(2, 4)
    program = trace(Tied().eval(), (rows,))

    def train(module: nn.Module) -> None:
        assert len(list(module.parameters())) == 2
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module(rows)["y"].sum().backward()
        optimizer.step()

    assert train_program(program, train)[0] == 2
