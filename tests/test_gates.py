from __future__ import annotations

import torch
from torch import nn

from sqcompile import trace
from sqcompile.channels import find_groups
from sqcompile.gates import ExpectedL0, TrainableGated, log_odds, mean_gates, open_chance, sample_gates
from sqcompile.regularization import Units

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def gated() -> tuple[nn.Module, TrainableGated]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    program = trace(model, (X,))
    (group,) = find_groups(program)
    units = Units.of(program, group)
    assert isinstance(units, Units)
    return model, TrainableGated(program, [units])


def test_the_chance_of_an_open_gate_is_that_of_its_samples() -> None:
    log_alpha = torch.tensor([-4.0, -1.0, 0.0, 2.0])
    uniform = torch.rand(40_000, 1, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    gates = sample_gates(log_alpha, uniform)
    assert gates.min() == 0 and gates.max() == 1
    # Four standard deviations of a share among 40,000: 4 · sqrt(0.25 / 40000) = 0.01.
    torch.testing.assert_close((gates > 0).float().mean(0), open_chance(log_alpha), rtol=0, atol=0.01)
    assert (gates == 1).float().mean(0)[3] > 0.3, "gates are often exactly open"


def test_gates_without_noise() -> None:
    assert mean_gates(torch.tensor([-10.0, 0.0, 10.0])).tolist() == [0.0, 0.5, 1.0]
    assert mean_gates(log_odds(torch.zeros(1))).item() == 1.0, "a gate begins open"


def test_a_gated_module_begins_as_the_model() -> None:
    model, module = gated()
    assert torch.equal(module(X), model(X))
    module.train()
    torch.manual_seed(0)
    assert not torch.equal(module(X), module(X)), "gates are random in training"
    (name,) = module.gates.values()
    with torch.no_grad():
        module.get_parameter(name)[2] = -1.0
        model[2].weight[:, 2] = 0  # type: ignore[index]
    # The gate of a neuron multiplies what reads it.
    assert torch.equal(module.eval()(X), model(X))
    assert module.factors()["0"].tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]


def test_the_penalty_adds_its_gradient() -> None:
    _, module = gated()
    (name,) = module.gates.values()
    theta = module.get_parameter(name)
    theta.grad = torch.ones(5)
    penalty = ExpectedL0(module, 0.5)
    with torch.no_grad():
        penalty.before()
    chance = open_chance(log_odds(theta.detach()))
    assert float(penalty.value().detach()) == 0.5 * float(chance.sum())
    torch.testing.assert_close(theta.grad, 1 + 0.5 * 20 * chance * (1 - chance))
