from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.passes import refuse_other_levels
from torch import nn

from sqcompile import Pass, PassContext, Program, trace
from sqcompile.calibration import Calibration
from sqcompile.errors import FileError, PassOptionError, TrainingError
from sqcompile.passes import ApplyMasks, FineTune, MaskWeights, PruneGradually, SparseGPT
from sqcompile.pipeline import PassManager
from sqcompile.testing import check_pass
from sqcompile.training import Round

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
Y = X @ torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))


def fit(module: nn.Module) -> float:
    """A few noisy steps: what a round does depends on the seed."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    loss = torch.zeros(())
    for _ in range(10):
        index = torch.randint(0, 64, (64,))
        loss = (module(X[index]) - Y[index]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


SEEN: list[Round] = []


def record(module: nn.Module, now: Round) -> float:
    SEEN.append(now)
    return fit(module)


STARTS: list[tuple[torch.Tensor, torch.Tensor]] = []


def record_start(module: nn.Module) -> None:
    weight, mask = module.get_parameter("0.weight"), module.get_buffer("0.weight_mask")
    STARTS.append((weight.detach().clone(), mask.clone()))
    fit(module)


STOP_AT = [0]


def stop(module: nn.Module, now: Round) -> None:
    """Train, and be cut off in one round."""
    if now.number == STOP_AT[0]:
        raise KeyboardInterrupt
    fit(module)


GRADUAL = PruneGradually(train=fit, prune=MaskWeights(sparsity=0.75), rounds=3)


def sparsities(item: PruneGradually) -> list[float]:
    SEEN.clear()
    check_pass(item, model(), (X,), idempotent=False)
    count = len(SEEN) // 2  # check_pass runs a pass twice
    return [float(now.sparsity or 0) for now in SEEN[:count]]


def run(item: Pass, folder: Path | None = None, seed: int = 0) -> Program:
    program = trace(model(), (X,))
    PassManager([item]).run(program, PassContext(work_dir=folder, seed=seed))
    return program


def test_reaches_the_target_with_one_mask_a_layer() -> None:
    checked = check_pass(
        GRADUAL,
        model(),
        (X,),
        idempotent=False,
        expected="""
            program (level aten)
              input  %input_1: f32[64, 16]
              tensor @1.weight_mask: bool[4, 16]
              tensor @0.weight_mask: bool[16, 16]
              tensor @0.weight: f32[16, 16]
              tensor @0.bias: f32[16]
              tensor @1.weight: f32[4, 16]
              tensor @1.bias: f32[4]
              %mask: f32[16, 16] = mask(@0.weight, @0.weight_mask)
              %linear: f32[64, 16] = linear(%input_1, %mask, @0.bias)
              %mask_1: f32[4, 16] = mask(@1.weight, @1.weight_mask)
              %linear_1: f32[64, 4] = linear(%linear, %mask_1, @1.bias)
              return output=%linear_1
        """,
    )
    facts = checked.record.facts
    assert [round_["sparsity"] for round_ in facts.values()] == pytest.approx([0.525, 0.7219, 0.75], abs=0.01)
    assert all(0 < round_["result"] < 20 for round_ in facts.values())
    PassManager([ApplyMasks()]).run(checked.after, PassContext())
    assert (checked.after.tensor("0.weight") == 0).sum() == 192


def test_schedules() -> None:
    item = replace(GRADUAL, train=record, rounds=4, prune=MaskWeights(sparsity=0.8))
    # Zhu & Gupta, eq. 1: 0.8 - 0.8 (1 - k/4)³
    assert sparsities(item) == pytest.approx([0.4625, 0.7, 0.7875, 0.8])
    assert sparsities(replace(item, start=0.5)) == pytest.approx([0.63125, 0.75, 0.79375, 0.8])
    assert sparsities(replace(item, schedule="linear")) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert sparsities(replace(item, schedule="one-shot")) == [0.8] * 4
    assert [now.number for now in SEEN[:4]] == [1, 2, 3, 4] and {now.count for now in SEEN} == {4}
    assert len({now.seed for now in SEEN[:4]}) == 4


def test_fractions_of_single_layers_grow_in_step() -> None:
    prune = MaskWeights(sparsity=0.5, sparsities=(("1", 0.25),))
    after = run(PruneGradually(train=fit, prune=prune, rounds=2, schedule="linear"))
    assert {name: promise.sparsity for name, promise in after.sparsity.items()} == {
        "0.weight": 0.5,
        "1.weight": 0.25,
    }


def test_masks_only_grow() -> None:
    STARTS.clear()
    run(replace(GRADUAL, train=record_start))
    masks = [mask for _, mask in STARTS]
    for earlier, later in itertools.pairwise(masks):
        assert not (later & ~earlier).any() and int(later.sum()) < int(earlier.sum())


@pytest.mark.parametrize("rewind", [False, True])
def test_rewinds_to_the_beginning(rewind: bool) -> None:
    STARTS.clear()
    first = model()[0].weight.detach()  # type: ignore[index]
    run(replace(GRADUAL, train=record_start, rewind=rewind))
    assert [bool(torch.equal(weight, first)) for weight, _ in STARTS] == [True, rewind, rewind]


def test_one_round_is_pruning_and_fine_tuning() -> None:
    one = run(PruneGradually(train=fit, prune=MaskWeights(sparsity=0.5), rounds=1), seed=3)
    program = trace(model(), (X,))
    PassManager([MaskWeights(sparsity=0.5), FineTune(train=fit)]).run(program, PassContext(seed=4))
    assert one.fingerprint(content=True) == program.fingerprint(content=True)


@pytest.mark.parametrize("stop_at", [2, 3])
@pytest.mark.parametrize("rewind", [False, True])
def test_resumes_bit_for_bit(tmp_path: Path, stop_at: int, rewind: bool) -> None:
    # A global threshold reaches some layers only in later rounds.
    prune = MaskWeights(sparsity=0.6, scope="global")
    item = PruneGradually(train=stop, prune=prune, rounds=3, schedule="linear", rewind=rewind)
    STOP_AT[0] = 0
    whole = run(item)
    STOP_AT[0] = stop_at
    with pytest.raises(KeyboardInterrupt):
        run(item, tmp_path)
    (file,) = tmp_path.iterdir()
    STOP_AT[0] = 1  # what is done already must not be done again
    resumed = run(item, tmp_path)
    assert resumed.text() == whole.text()
    assert resumed.fingerprint(content=True) == whole.fingerprint(content=True)
    for name, tensor in whole.tensors():
        assert resumed.tensor(name).requires_grad == tensor.requires_grad
    assert list(tmp_path.iterdir()) == [file]


def test_other_options_seeds_and_models_do_not_resume(tmp_path: Path) -> None:
    run(GRADUAL, tmp_path)
    for item, seed in ((replace(GRADUAL, rounds=2), 0), (GRADUAL, 1)):
        before = set(tmp_path.iterdir())
        run(item, tmp_path, seed)
        assert len(set(tmp_path.iterdir()) - before) == 1


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run(GRADUAL, tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(FileError, match="cannot be resumed from") as caught:
        run(GRADUAL, tmp_path)
    assert str(file) in str(caught.value)


def test_text_reads_back() -> None:
    text = str(GRADUAL)
    assert text == f"prune-gradually{{train={__name__}:fit,prune=mask-weights{{sparsity=0.75}},rounds=3}}"
    assert Pass.parse(text) == GRADUAL


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no-function": ({"train": None}, "'train'"),
    "no-pass": ({"prune": None}, "'prune'"),
    "no-sparsity": ({"prune": ApplyMasks()}, "'prune'"),
    "fixed": ({"prune": MaskWeights(pattern="2:4")}, "'prune'"),  # type: ignore[arg-type]
    "rounds": ({"rounds": 0}, "'rounds'"),
    "start": ({"start": 1.0}, "'start'"),
    "schedule": ({"schedule": "cubist"}, "'schedule'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refuses_options(name: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(PassOptionError, match=message):
        replace(GRADUAL, **options)


def test_refuses_other_levels() -> None:
    refuse_other_levels(GRADUAL)


def test_an_error_names_the_round() -> None:
    def diverge(module: nn.Module, now: Round) -> float:
        return fit(module) if now.number == 1 else float("nan")

    with pytest.raises(TrainingError, match="diverged") as caught:
        run(replace(GRADUAL, train=diverge))
    assert "round 2 of 3" in str(caught.value)


def test_takes_any_pass_with_a_sparsity() -> None:
    program = trace(model(), (X,))
    context = PassContext(calibration=Calibration([X], program.signature))
    item = PruneGradually(train=fit, prune=SparseGPT(sparsity=0.5), rounds=2)
    PassManager([item]).run(program, context)
    assert {promise.sparsity for promise in program.sparsity.values()} == {0.5}
