from __future__ import annotations

import pytest
import torch
from support.quantize import refuse_level, run, settle, settled, values
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import Level, Program, trace
from sqcompile.calibration import Calibration
from sqcompile.errors import CalibrationError, PassOptionError, SelectionError
from sqcompile.evaluate import run_watched
from sqcompile.layers import layers_of
from sqcompile.passes import Calibrate, CorrectBias, FreezeObservers, InsertObservers
from sqcompile.pipeline import PassContext, PassManager
from sqcompile.quantization import Format, MinMax
from sqcompile.testing import check_pass

COARSE = InsertObservers(weight=Format.parse("int3"), observer=MinMax())


def depthwise() -> nn.Sequential:
    """Depthwise convolutions: nine weights an output, where rounding shifts the mean most."""
    return settled(
        nn.Conv2d(3, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, groups=2),
    )


def means(program: Program, batches: list[Tensor]) -> dict[str, Tensor]:
    """Mean of each channel of each layer's output."""
    layers = {layer.node: layer for layer in layers_of(program)}
    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        run_watched(
            program,
            [batch],
            layers,
            lambda node, value: found.setdefault(layers[node].name, []).append(
                value.flatten(0, -2).T if layers[node].kind == "linear" else value.transpose(0, 1).flatten(1)
            ),
        )
    return {name: torch.cat(parts, 1).mean(1) for name, parts in found.items()}


def shifts(model: nn.Module, batches: list[Tensor], correct: bool = True) -> dict[str, Tensor]:
    """The shift of each channel's mean that quantization leaves, in steps of the int32 bias."""
    program = trace(model, (batches[0],), dynamic_shapes=({0: Dim("batch")},))
    reference = means(program, batches)
    run([COARSE, Calibrate(), *([CorrectBias()] if correct else []), FreezeObservers()], program, batches)
    left = means(program, batches)
    steps = {layer.name: program.tensor(layer.bias.args[1]) for layer in layers_of(program) if layer.bias}  # type: ignore[arg-type]
    return {name: (left[name] - reference[name]).abs() / steps[name] for name in left}


# Half a step is the rounding of the bias itself; the rest is what that of biases before it moves in turn.
STEPS = 2.0


def test_gives_every_channel_its_mean_of_floating_point() -> None:
    batches = [values(size, 3, 8, 8, seed=size) for size in (4, 2, 8)]
    plain, corrected = shifts(depthwise(), batches, False), shifts(depthwise(), batches)
    assert set(corrected) == {"0", "2", "4", "6"}
    assert max(float(shift.max()) for shift in corrected.values()) < STEPS
    assert max(float(shift.max()) for shift in plain.values()) > 5 * STEPS


def test_shows_in_the_biases_alone() -> None:
    x = values(4, 3, 8, 8)
    checked = check_pass(
        CorrectBias(),
        depthwise(),
        (x,),
        prepare=[COARSE, Calibrate()],
        calibration=[x],
        idempotent=False,  # rounding leaves a rest, which a second run corrects again
    )
    before, after = dict(checked.before.tensors()), dict(checked.after.tensors())
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        "0.bias",
        "2.bias",
        "4.bias",
        "6.bias",
    }
    assert checked.before.text() == checked.after.text()
    assert checked.record.facts == {"batches": 1}


def test_does_nothing_where_nothing_is_quantized() -> None:
    check_pass(
        CorrectBias(),
        settled(nn.Tanh()),
        (values(2, 3),),
        prepare=[InsertObservers()],
        calibration=[values(2, 3)],
        unchanged=True,
    )


def test_layers_without_a_bias() -> None:
    """Convolutions get one, whose addition integer kernels do anyway; linear layers only if asked to."""
    model = settled(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 3, bias=False))
    x = values(4, 3, 4, 4)
    options = {"prepare": [COARSE, Calibrate()], "calibration": [x], "idempotent": False}
    checked = check_pass(CorrectBias(), model, (x,), remarks=["it has no bias; add-bias=true"], **options)  # type: ignore[arg-type]
    assert checked.after.has_tensor("0.bias") and not checked.after.has_tensor("2.bias")
    both = check_pass(CorrectBias(add_bias=True), model, (x,), **options)  # type: ignore[arg-type]
    assert both.after.has_tensor("0.bias") and both.after.has_tensor("2.bias")


def test_a_bias_that_layers_share_is_corrected_for_each() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.bias = self.a.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    plain, corrected = (shifts(settle(Shared()), [values(64, 8)], correct) for correct in (False, True))
    assert max(float(shift.max()) for shift in corrected.values()) < STEPS
    assert max(float(shift.max()) for shift in plain.values()) > 5 * STEPS


def test_linear_layers_on_tokens_have_their_channels_last() -> None:
    model = settled(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))
    plain, corrected = (shifts(model, [values(4, 7, 8)], correct) for correct in (False, True))
    assert max(float(shift.max()) for shift in corrected.values()) < STEPS
    assert max(float(shift.max()) for shift in plain.values()) > 5 * STEPS


def test_takes_as_many_batches_as_memory_allows() -> None:
    batches = [values(4, 3, 8, 8, seed=seed) for seed in range(6)]
    program = trace(depthwise(), (batches[0],))
    run([COARSE, Calibrate()], program, batches)
    # Six channels of 8 x 8 values in 4 samples are 6 KiB, of which two or three are alive at once.
    (record,) = run([CorrectBias(max_bytes=40_000)], program, batches)
    assert 1 <= record.facts["batches"] < 6
    assert "more exceed max-bytes" in record.remarks[0].reason
    context = PassContext(calibration=Calibration(batches, program.signature), max_memory=1)
    (record,) = PassManager([CorrectBias()]).run(program, context)
    assert record.facts["batches"] == 1  # never less than one


def test_options_choose_layers() -> None:
    x = values(4, 3, 8, 8)
    for options, changed in (({"layers": ("2",)}, {"2.bias"}), ({"exclude": ("0", "2", "4")}, {"6.bias"})):
        program = trace(depthwise(), (x,))
        run([COARSE, Calibrate()], program, [x])
        before = dict(program.tensors())
        run([CorrectBias(**options)], program, [x])  # type: ignore[arg-type]
        assert {name for name, value in program.tensors() if not torch.equal(value, before[name])} == changed
    with pytest.raises(SelectionError, match="The pattern 'fc' matches no layer"):
        run([CorrectBias(layers=("fc",))], program, [x])
    with pytest.raises(PassOptionError, match="a number of bytes"):
        CorrectBias(max_bytes=0)


def test_comes_after_calibrate() -> None:
    x = values(4, 3, 8, 8)
    program = trace(depthwise(), (x,))
    run([COARSE], program)
    with pytest.raises(CalibrationError, match=r"(?s)never saw data.*node %input_1"):
        run([CorrectBias()], program, [x])


def test_refuses_programs_of_another_level() -> None:
    refuse_level(CorrectBias(), Level.ATEN)
    refuse_level(CorrectBias(), Level.QDQ)
