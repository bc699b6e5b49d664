"""Work that does not depend on each other gives the same wherever, and in whatever order, it is done."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from support.executors import Elsewhere
from support.quantize import settled, values
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import Program, trace
from sqcompile.calibration import Calibration
from sqcompile.errors import CalibrationError, ClusterError
from sqcompile.executor import ADDRESS_VARIABLE, InProcess, check_reachable, open_executor
from sqcompile.layers import layers_of
from sqcompile.mixed_precision import Candidate, Measure, measure_sensitivity
from sqcompile.passes import AWQ, GPTQ, AdaRound, ApplyMasks, MixedPrecision, SparseGPT, Wanda
from sqcompile.pipeline import Pass, PassContext, PassManager
from sqcompile.quantization.format import Format

FORMAT = Format.parse("uint4:group=8:affine")


class Gated(nn.Module):
    """Two layers that read one value, and one that reads what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.gate = nn.Linear(16, 24)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(torch.relu(self.gate(x)) * self.up(x))


def gated() -> Program:
    return trace(settled(Gated()), (values(32, 16),), dynamic_shapes=({0: Dim("rows")},))


def context(program: Program, executor: Any) -> PassContext:
    data = [values(64, 16, seed=seed) for seed in range(3)]
    return PassContext(calibration=Calibration(data, program.signature), executor=executor)


@pytest.mark.parametrize(
    ("choose", "work"),
    [
        pytest.param(lambda: GPTQ(weight=FORMAT), "round_weight", id="gptq"),
        pytest.param(
            lambda: GPTQ(weight=Format.parse("int4:group=8:mapping=codebook")), "round_weight", id="codebook"
        ),
        pytest.param(lambda: GPTQ(weight=FORMAT, pattern="2:4"), "round_weight", id="joint"),
        pytest.param(lambda: AdaRound(weight=FORMAT, steps=20), "learn_rounding", id="ada-round"),
        pytest.param(lambda: AWQ(weight=FORMAT), "activation_scale", id="awq"),
        pytest.param(lambda: SparseGPT(sparsity=0.5), "_prune", id="sparse-gpt"),
        pytest.param(lambda: SparseGPT(sparsity=0.5, refit=True), "_prune", id="sparse-gpt-refit"),
        pytest.param(lambda: Wanda(pattern="2:4"), "_prune", id="wanda"),
        pytest.param(lambda: Wanda(sparsity=0.5, refit=True), "_prune", id="wanda-refit"),
        pytest.param(
            lambda: MixedPrecision(quantize=GPTQ(weight=FORMAT), bits=5.0), "_losses", id="mixed-precision"
        ),
    ],
)
def test_passes_give_the_same_wherever_their_work_is_done(choose: Callable[[], Pass], work: str) -> None:
    here, there, executor = gated(), gated(), Elsewhere()
    records = [
        PassManager([choose()]).run(program, context(program, chosen))
        for program, chosen in ((here, InProcess()), (there, executor))
    ]
    wanted, found = dict(here.tensors()), dict(there.tensors())
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert records[0][0].remarks == records[1][0].remarks
    # AWQ scales a value once for all its readers; the last layer's input is made by no norm, but by layer up.
    assert executor.submitted.count(work) == (2 if work == "activation_scale" else 3)


def test_zeros_that_were_there_stay_wherever_the_work_is_done() -> None:
    programs = []
    for executor in (InProcess(), Elsewhere()):
        program = gated()
        passes = [Wanda(sparsity=0.3), ApplyMasks(), GPTQ(weight=FORMAT)]
        PassManager(passes).run(program, context(program, executor))
        programs.append(dict(program.tensors()))
    assert all(torch.equal(tensor, programs[1][name]) for name, tensor in programs[0].items())


@pytest.mark.parametrize("measure", ["fisher", "divergence", "error"])
def test_sensitivities_are_the_same_wherever_they_are_measured(measure: Measure) -> None:
    program, executor = gated(), Elsewhere()
    candidates = [
        Candidate.parse(text) for text in ("uint2:group=8:affine", "int8:channel=0", "int4:group=8+50%")
    ]
    here, there = (
        measure_sensitivity(
            program, layers_of(program), candidates, context(program, chosen), measure=measure
        )
        for chosen in (InProcess(), executor)
    )
    np.testing.assert_array_equal(here.losses, there.losses)
    assert np.isfinite(here.losses).all() and len(set(here.losses.ravel())) == 9
    assert executor.shared == 1  # what judges them holds the program: it is sent once
    assert executor.submitted == ["_losses"] * 3


class Pair(nn.Module):
    """Two layers that read the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(16, 8)
        self.right = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def test_remarks_are_in_the_order_of_layers() -> None:
    """Inputs of ones make a Hessian of ones, which is singular in exact arithmetic: both layers say so."""
    found = []
    for executor in (InProcess(), Elsewhere()):
        program = trace(settled(Pair()), (torch.ones(4, 16),))
        data = [torch.ones(4, 16)]
        about = PassContext(calibration=Calibration(data, program.signature), executor=executor)
        PassManager([SparseGPT(sparsity=0.5, damping=1e-9)]).run(program, about)
        found.append([(remark.node, remark.reason) for remark in about.remarks])
    assert found[0] == found[1]
    assert [node for node, _ in found[0]] == ["linear", "linear_1"]
    assert all("has a singular Hessian: damping 0.0001 instead of 1e-09" in reason for _, reason in found[0])


def test_what_work_raises_is_raised_where_it_is_asked_for() -> None:
    """Squares of the inputs are near the end of float32: their mean is beyond it, and nothing can be inverted."""
    texts = []
    for executor in (InProcess(), Elsewhere()):
        program = trace(settled(Pair()), (torch.ones(4, 16),))
        data = Calibration([torch.full((4, 16), 1.5e19)], program.signature)
        with pytest.raises(CalibrationError, match="cannot be inverted") as caught:
            PassManager([SparseGPT(sparsity=0.5)], verify="off").run(
                program, PassContext(calibration=data, executor=executor)
            )
        assert caught.value.seen and caught.value.expected and caught.value.next_step
        texts.append(str(caught.value))
    assert texts[0] == texts[1] and "layer '0.left'" in texts[0] and "sparse-gpt" in texts[0]


def test_pending_work_is_followed_by_what_is_made_of_it() -> None:
    pending = InProcess().submit(operator.mul, 6, 7)
    assert pending.result() == 42 and pending.then(str).result() == "42"
    assert pending.then(str).then(len).result() == 2
    shared = object()
    assert InProcess().share(shared) is shared


def test_a_model_on_another_device_does_not_go_to_a_cluster() -> None:
    program = gated()
    check_reachable(program, Elsewhere())
    other = mock.Mock(spec=Program)
    other.tensors.return_value = [("weight", mock.Mock(device=torch.device("cuda:0")))]
    check_reachable(other, InProcess())
    with pytest.raises(ClusterError, match="CPUs") as caught:
        check_reachable(other, Elsewhere())
    assert "a model on cuda" in str(caught.value)


def test_without_an_address_work_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    with open_executor() as executor:
        assert isinstance(executor, InProcess)
    monkeypatch.setenv(ADDRESS_VARIABLE, "")
    with open_executor() as executor:
        assert isinstance(executor, InProcess)


def test_the_environment_gives_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv(ADDRESS_VARIABLE, "no-address-at-all")
    with pytest.raises(ClusterError, match="cannot be reached") as caught, open_executor():
        pass
    assert "no-address-at-all" in str(caught.value)
