from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sqcompile
from sqcompile import Level, Pass, PassContext, Program, trace
from sqcompile.calibration import Calibration
from sqcompile.errors import CalibrationError, LevelError, PassOptionError, TrainingError
from sqcompile.passes import (
    Calibrate,
    FoldQDQ,
    FreezeObservers,
    InsertObservers,
    MaskWeights,
    TrainQuantized,
)
from sqcompile.pipeline import PassManager
from sqcompile.quantization import Format
from sqcompile.quantization.learned import LearnedState
from sqcompile.quantization.trainable import TrainableQuantized, learned_scale
from sqcompile.testing import check_pass

X = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.randn(8, 4, generator=torch.Generator().manual_seed(1))).tanh()
OBSERVE = InsertObservers(weight=Format.parse("int3:channel=0:narrow"))


@functools.cache
def model() -> nn.Module:
    """A trained model; no test may change it, and none can."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    descend(made, 150, 0.01)
    return made


def descend(module: nn.Module, steps: int, rate: float) -> float:
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (module(X) - Y).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def fit(module: nn.Module) -> float:
    return descend(module, 40, 5e-3)


@functools.cache
def calibrated(before: tuple[Pass, ...], trained: nn.Module | None) -> Program:
    program = trace(trained or model(), (X,))
    context = PassContext(calibration=Calibration([X], program.signature))
    PassManager([*before, OBSERVE, Calibrate()]).run(program, context)
    return program


def longer(module: nn.Module) -> float:
    return descend(module, 100, 1e-2)


def observed(*before: Pass, trained: nn.Module | None = None) -> Program:
    return calibrated(before, trained).snapshot()


def frozen(program: Program, *passes: Pass) -> Program:
    program = program.snapshot()
    PassManager([*passes, FreezeObservers()]).run(program, PassContext())
    return program


def loss(program: Program) -> float:
    with torch.no_grad():
        return float((program(X) - Y).square().mean())


def test_wins_back_what_rounding_cost() -> None:
    program = observed()
    dense = loss(program)
    plain, trained = loss(frozen(program)), loss(frozen(program, TrainQuantized(train=longer)))
    assert plain > 1.1 * dense, "rounding does harm here"
    assert trained - dense < 0.5 * (plain - dense)


def test_the_graph_stays_and_observers_learn() -> None:
    program = observed()
    checked = check_pass(TrainQuantized(train=fit), program, (X,), idempotent=False)
    assert checked.after.text() == checked.before.text()
    assert set(checked.after.observers) == set(checked.before.observers)
    for name, state in checked.after.observers.items():
        assert isinstance(state, LearnedState), name
        assert not isinstance(checked.before.observers[name], LearnedState)
        assert state.scale.shape == (
            (32,) if name.startswith("0.w") else (4,) if name.startswith("2.w") else ()
        )
    assert checked.record.facts["result"] > 0
    assert checked.record.changes == 4 + len(checked.after.observers)


def test_freezing_takes_the_learned_scales_as_they_are() -> None:
    program = observed()
    PassManager([TrainQuantized(train=fit)]).run(program, PassContext())
    after = frozen(program)
    assert after.level is Level.QDQ
    for name, state in program.observers.items():
        assert isinstance(state, LearnedState)
        assert torch.equal(after.tensor(f"{name}_scale"), state.scale), name
        assert torch.equal(after.tensor(f"{name}_zero_point"), state.zero_point), name


def test_what_is_trained_is_what_is_frozen() -> None:
    outputs: list[torch.Tensor] = []

    def train(module: nn.Module) -> None:
        fit(module)
        outputs.append(module(X).detach())

    program = observed()
    after = frozen(program, TrainQuantized(train=train))
    # Frozen biases are int32 at the scale s_x · s_w, which is coarse for weights of 3 bits: a hundredth of the
    # output's range or so, and hidden values may round to the next code.
    largest = float(outputs[0].abs().max())
    difference = (after.run([X])[0] - outputs[0]).abs()
    assert float(difference.max()) < 0.015 * largest and float(difference.mean()) < 0.003 * largest


MAPPINGS = ("tanh", "sigmoid", "mu-law", "log2", "nf", "codebook")


def tabled(mapping: str, *before: Pass, bits: int = 3) -> Program:
    """The model with weights of a mapping, observed and calibrated."""
    program = trace(model(), (X,))
    observe = InsertObservers(weight=Format.parse(f"int{bits}:channel=0:mapping={mapping}"))
    context = PassContext(calibration=Calibration([X], program.signature))
    PassManager([*before, observe, Calibrate()]).run(program, context)
    return program


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_tables_win_back_what_rounding_cost(mapping: str) -> None:
    program = tabled(mapping)
    dense = loss(program)
    plain, trained = loss(frozen(program)), loss(frozen(program, TrainQuantized(train=longer)))
    assert plain > 1.1 * dense, "rounding does harm here"
    assert trained - dense < 0.6 * (plain - dense)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_tables_freeze_to_lookups_with_what_was_learned(mapping: str) -> None:
    outputs: list[torch.Tensor] = []

    def train(module: nn.Module) -> None:
        fit(module)
        outputs.append(module(X).detach())

    program = tabled(mapping)
    start = TrainableQuantized(program).states(program)
    PassManager([TrainQuantized(train=train)]).run(program, PassContext())
    after = frozen(program)
    for name in ("0.weight", "2.weight"):
        state = program.observers[name]
        assert isinstance(state, LearnedState) and state.table is not None
        first = start[name].table
        assert first is not None and torch.equal(state.table, first), "tables stay as fitted"
        assert not torch.equal(state.scale, start[name].scale)
        assert torch.equal(after.tensor(f"{name}_scale"), state.scale)
        assert torch.equal(after.tensor(f"{name}_table"), state.table)
        assert after.tensor(f"{name}_codes").dtype is torch.uint8
        assert int(after.tensor(f"{name}_codes").max()) < 8
        low, high = state.range()
        weight = after.tensor(f"{name}_table")[after.tensor(f"{name}_codes").long()] * state.scale[:, None]
        assert bool((weight >= low[:, None] - 1e-6).all() and (weight <= high[:, None] + 1e-6).all())
    assert after.text().count("lookup(") == 2
    largest = float(outputs[0].abs().max())
    difference = (after.run([X])[0] - outputs[0]).abs()  # biases are int32 now, as with linear codes
    assert float(difference.max()) < 0.015 * largest and float(difference.mean()) < 0.003 * largest


def test_values_with_tables_are_trained_as_they_will_be_looked_up() -> None:
    outputs: list[torch.Tensor] = []

    def train(module: nn.Module) -> None:
        fit(module)
        outputs.append(module(X).detach())

    program = trace(model(), (X,))
    observe = InsertObservers(activation=Format.parse("int4:mapping=tanh"))
    context = PassContext(calibration=Calibration([X], program.signature))
    PassManager([observe, Calibrate(), TrainQuantized(train=train)]).run(program, context)
    states = [state for name, state in program.observers.items() if "." not in name]
    assert states and all(isinstance(state, LearnedState) and state.table is not None for state in states)
    after = frozen(program)
    assert after.text().count("lookup(") == len(states)
    largest = float(outputs[0].abs().max())
    difference = (after.run([X])[0] - outputs[0]).abs()  # biases are int32 now
    assert float(difference.mean()) < 0.01 * largest


def test_masked_tables_stay_masked() -> None:
    program = tabled("codebook", MaskWeights(sparsity=0.5))
    after = frozen(program, TrainQuantized(train=fit))
    codes, table = after.tensor("0.weight_codes"), after.tensor("0.weight_table")
    promise = after.sparsity["0.weight_codes"]
    assert int((~promise.mask).sum()) == codes.numel() // 2
    assert bool((table[codes.long()][~promise.mask] == 0).all())


@pytest.mark.parametrize("backend", ["onnxruntime", "native"])
def test_trained_tables_run_in_backends(backend: str) -> None:
    passes = [
        InsertObservers(weight=Format.parse("int4:channel=0:mapping=nf")),
        Calibrate(),
        TrainQuantized(train=fit),
        FreezeObservers(),
        FoldQDQ(),
    ]
    compiled = sqcompile.compile(model(), passes, example_inputs=(X,), calibration=[X], backend=backend)
    assert isinstance(compiled, sqcompile.Compiled)
    wanted = compiled.program(X)
    # Values are 8-bit codes: what is summed in another order may round to the next one.
    assert float((compiled(X) - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


@pytest.mark.parametrize("learn", [True, False])
def test_learn_scales(learn: bool) -> None:
    names: list[str] = []

    def train(module: nn.Module) -> None:
        names.extend(name for name, _ in module.named_parameters())
        fit(module)

    program = observed()
    start = TrainableQuantized(program).states(program)
    PassManager([TrainQuantized(train=train, learn_scales=learn)]).run(program, PassContext())
    assert any("scale_factor" in name for name in names) == learn
    assert {"0.weight", "0.bias", "2.weight", "2.bias"} <= set(names)
    for name, state in program.observers.items():
        assert isinstance(state, LearnedState)
        assert torch.equal(state.scale, start[name].scale) != learn, name


def test_search_chooses_the_first_scales() -> None:
    program = observed()
    scales = {
        search: TrainableQuantized(program, search=search).states(program)["0.weight"].scale
        for search in ("minmax", "mse")
    }
    assert torch.equal(scales["minmax"], program.tensor("0.weight").detach().abs().amax(1) / 3)
    assert (scales["mse"] <= scales["minmax"]).all() and (scales["mse"] < scales["minmax"]).any()
    assert Pass.parse("train-quantized{train=a.py:f,search=minmax}").search == "minmax"  # type: ignore[attr-defined]


def test_masks_hold() -> None:
    program = observed(MaskWeights(sparsity=0.5))
    zeros = {name: ~promise.mask for name, promise in program.sparsity.items()}
    after = frozen(program, TrainQuantized(train=fit))
    for name, zero in zeros.items():
        codes = after.tensor(f"{name}_codes")
        assert not codes[zero].any() and codes[~zero].any()
        assert f"{name}_codes" in after.sparsity


@pytest.mark.parametrize("freeze", [False, True])
def test_freeze_norms(freeze: bool) -> None:
    torch.manual_seed(0)
    trained = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()
    program = observed(trained=trained)
    before = program.tensor("2.running_mean")
    item = TrainQuantized(train=lambda module: fit(module.train()), freeze_norms=freeze)
    PassManager([item]).run(program, PassContext())
    assert torch.equal(program.tensor("2.running_mean"), before) == freeze


def test_calibrating_anew_forgets_what_was_learned() -> None:
    program = observed()
    context = PassContext(calibration=Calibration([X], program.signature))
    before = {name: state for name, state in program.observers.items() if "weight" not in name}
    PassManager([TrainQuantized(train=fit), Calibrate()]).run(program, context)
    for name in before:
        assert not isinstance(program.observers[name], LearnedState)


def test_a_learned_state_refuses_data() -> None:
    state = LearnedState(observed().observers["0.weight"], torch.ones(32), torch.zeros(32, dtype=torch.int32))
    with pytest.raises(CalibrationError, match="does not follow data"):
        state.observe(X)
    low, high = state.range()
    assert torch.equal(low, torch.full((32,), -3.0)) and torch.equal(high, torch.full((32,), 3.0))


def test_gradient_of_a_scale() -> None:
    start, damping = torch.tensor([0.5, 2.0]), 0.125
    factor = torch.tensor([1.5, -0.5], requires_grad=True)
    scale = learned_scale(factor, start, damping)
    assert torch.equal(scale, torch.tensor([0.75, 1.0])), "never negative"
    scale.backward(torch.tensor([2.0, 3.0]))
    # A step of descent moves the scale by damping · gradient, as LSQ does: start · Δfactor.
    assert factor.grad is not None
    assert torch.allclose(factor.grad * start, torch.tensor([2.0, -3.0]) * damping, rtol=1e-6)
    assert learned_scale(torch.zeros(2), start, damping).min() > 0, "a scale never reaches zero"


def test_fixed_ranges_do_not_learn() -> None:
    trained = nn.Sequential(nn.Linear(8, 4), nn.Sigmoid(), nn.Linear(4, 4))
    program = observed(trained=trained)
    module = TrainableQuantized(program)
    learned = {name for name, _ in module.named_parameters() if "scale_factor" in name}
    assert "sigmoid_scale_factor" not in learned and "0.weight_scale_factor" in learned
    assert "sigmoid" in program.observers


def test_a_program_without_observers_is_left_alone() -> None:
    program = trace(nn.ReLU(), (X,))
    program.level = Level.OBSERVED
    (record,) = PassManager([TrainQuantized(train=fit)]).run(program, PassContext())
    assert record.changes == 0 and "nothing to quantize" in str(record.remarks[0])


def test_refuses_a_program_that_was_not_calibrated() -> None:
    program = trace(model(), (X,))
    with pytest.raises(CalibrationError, match="never saw data"):
        PassManager([OBSERVE, TrainQuantized(train=fit)]).run(program, PassContext())


def spoil(module: nn.Module) -> None:
    with torch.no_grad():
        module.get_parameter("0.weight_scale_factor").fill_(float("inf"))


def move(module: nn.Module) -> None:
    fit(module)
    module.get_buffer("0.weight_zero_point").add_(1)


@pytest.mark.parametrize(
    ("function", "message"), [(spoil, "diverged"), (move, "wrote into")], ids=["inf", "zero"]
)
def test_refuses(function: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        PassManager([TrainQuantized(train=function)]).run(observed(), PassContext())


def test_refuses_other_levels_and_no_function() -> None:
    with pytest.raises(LevelError):
        sqcompile.compile(model(), [TrainQuantized(train=fit)], example_inputs=(X,))
    with pytest.raises(PassOptionError, match="'train'"):
        TrainQuantized()


def test_runs_in_a_backend() -> None:
    compiled = sqcompile.compile(
        model(),
        [OBSERVE, Calibrate(), TrainQuantized(train=fit), FreezeObservers()],
        calibration=[X],
        backend="onnxruntime",
    )
    assert compiled.report.backend_distance.sqnr_db > 40  # codes may fall on either side of a border
