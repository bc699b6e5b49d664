"""Convolutions and what surrounds them in CNNs: floats against PyTorch, codes against the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.image_programs import images, images_program
from support.machines import machine
from support.parity import Steps
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from sqcompile.backends.native import kernel_times
from sqcompile.backends.native.artifact import NativeArtifact
from sqcompile.backends.native.backend import BACKEND
from sqcompile.backends.native.session import NativeSession
from sqcompile.calibration import Calibration
from sqcompile.errors import InputError
from sqcompile.passes import pipelines
from sqcompile.passes.prune import ApplyMasks, MaskWeights
from sqcompile.pipeline import Pass, PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.program import Program
from sqcompile.quantization.format import Format
from sqcompile.tracing import trace

Lower = Callable[[Program], NativeArtifact]
Load = Callable[..., NativeSession]
Compare = Callable[..., NativeSession]

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1x1": (lambda: nn.Conv2d(6, 20, 1), (2, 6, 5, 7)),
    "3x3": (lambda: nn.Conv2d(5, 17, 3, padding=1), (2, 5, 6, 7)),
    "stride": (lambda: nn.Conv2d(8, 16, 3, stride=(2, 3), padding=(1, 0)), (2, 8, 9, 10)),
    "dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=(2, 1), padding=2), (1, 4, 7, 7)),
    "rectangle": (lambda: nn.Conv2d(3, 6, (1, 5), padding=(0, 2), bias=False), (2, 3, 4, 9)),
    "groups": (lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), (2, 8, 5, 5)),
    "wide_groups": (lambda: nn.Conv2d(24, 36, 3, groups=3), (1, 24, 5, 5)),
    "odd_groups": (lambda: nn.Conv2d(9, 6, 3, groups=3, padding=1), (2, 9, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(19, 19, 3, groups=19, padding=1), (2, 19, 6, 5)),
    "depthwise_stride": (lambda: nn.Conv2d(16, 16, 5, groups=16, stride=2, padding=2), (1, 16, 9, 8)),
    "multiplier": (lambda: nn.Conv2d(4, 12, 3, groups=4), (2, 4, 6, 6)),
    "same": (lambda: nn.Conv2d(3, 4, 4, padding="same"), (1, 3, 6, 6)),
    "valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (1, 3, 6, 6)),
    "stem": (lambda: nn.Conv2d(3, 64, 7, stride=2, padding=3), (1, 3, 21, 22)),
    "spectrogram": (lambda: nn.Conv2d(1, 20, (10, 4), stride=2, padding=(5, 1)), (2, 1, 19, 10)),
    "grey": (lambda: nn.Conv2d(1, 6, 3, padding=1), (2, 1, 9, 40)),
    "grey_dilation": (lambda: nn.Conv2d(1, 6, 3, padding=2, dilation=2), (1, 1, 9, 8)),
    "two_channels": (lambda: nn.Conv2d(2, 17, (3, 8), stride=(1, 3), padding=(1, 2)), (2, 2, 5, 70)),
    "wave": (lambda: nn.Conv1d(1, 8, 9, stride=4, padding=4), (2, 1, 300)),
    "row": (lambda: nn.Conv1d(6, 10, 3, stride=2, padding=1), (2, 6, 11)),
    "row_depthwise": (lambda: nn.Conv1d(7, 7, 3, groups=7, padding=1), (2, 7, 11)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 9, 3, stride=2, padding=1, output_padding=1), (2, 6, 4, 5)),
    "transposed_groups": (lambda: nn.ConvTranspose2d(8, 8, 4, stride=2, groups=2, bias=False), (1, 8, 3, 3)),
    "transposed_dilation": (lambda: nn.ConvTranspose2d(3, 5, 2, stride=3, dilation=2), (1, 3, 4, 3)),
    "transposed_cropping": (lambda: nn.ConvTranspose2d(3, 5, 2, stride=1, padding=3), (1, 3, 8, 9)),
    "transposed_row": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (2, 4, 7)),
    "one_pixel": (lambda: nn.Conv2d(4, 6, 3, padding=1), (1, 4, 1, 1)),
}


def _made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def _random(shape: Sequence[int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _steps(session: NativeSession) -> Counter[str]:
    return Counter(name for name, _ in session.model.steps)


@pytest.mark.parametrize("name", LAYERS)
def test_float_layers_agree(name: str, compare: Compare) -> None:
    make, shape = LAYERS[name]
    session = compare(lambda m, x: m.layer(x), [_random(shape)], layer=_made(make))
    assert sum(_steps(session)[kind] for kind in ("conv", "conv_depthwise")) == 1


def _quantized(model: nn.Module, shape: Sequence[int], activation: str, dims: Any = None) -> Program:
    program = trace(model, (_random(shape),), dynamic_shapes=dims)
    calibration = Calibration([_random(shape, seed) for seed in range(4)], program.signature)
    passes = pipelines.int8_static(activation=Format.parse(activation), equalize=False)
    PassManager(passes).run(program, PassContext(calibration=calibration))
    return program


def _agrees(program: Program, session: NativeSession, calls: Sequence[Tensor]) -> None:
    steps = Steps()
    for call in calls:
        inputs = program.signature.bind((call,), {})
        steps.add(program, inputs, session.run(inputs))
    assert steps.agree(), steps


class Codes(nn.Module):
    """A layer between others, so that codes come in and go out."""

    def __init__(self, layer: nn.Module, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layer(x))


@pytest.mark.parametrize("activation", ["uint8:affine", "int8"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_codes_agree(name: str, activation: str, lower: Lower, load: Load) -> None:
    """Sums are exact, so outputs are the reference's but for ties; see `support.parity`."""
    make, shape = LAYERS[name]
    program = _quantized(Codes(_made(make), F.relu), shape, activation)
    session = load(lower(program))
    steps = _steps(session)
    assert steps["conv_q8"] + steps["conv_q8_depthwise"] == 1
    assert not steps["conv"] and not steps["conv_depthwise"]
    _agrees(program, session, [_random(shape, seed) for seed in range(6)])


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.4, 0.7),
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": F.elu,
    "hardsigmoid": F.hardsigmoid,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_the_end_of_the_convolution(name: str, lower: Lower, load: Load) -> None:
    layer = _made(lambda: nn.Conv2d(4, 20, 3, padding=1))
    model = nn.Sequential(Codes(layer, ACTIVATIONS[name]), _made(lambda: nn.Conv2d(20, 3, 1)))
    program = _quantized(model, (2, 4, 6, 6), "uint8:affine")
    session = load(lower(program))
    codes = {"slice", "permute", "cast", "sub", "mul", "contiguous"}  # what the last codes stand for
    assert set(_steps(session)) - codes == {"quantize_image", "conv_q8"}
    _agrees(program, session, [_random((2, 4, 6, 6), seed) for seed in range(4)])


class Residual(nn.Module):
    """Two convolutions, their sum with what came in, squeeze and excite, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.first = nn.Conv2d(24, 20, 1)
        self.second = nn.Conv2d(20, 24, 3, padding=1)
        self.squeeze = nn.Conv2d(24, 8, 1)
        self.excite = nn.Conv2d(8, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.max_pool2d(x, 3, stride=1, padding=1)
        x = F.relu(x + self.second(F.hardswish(self.first(x))))
        gate = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        x = x * F.hardsigmoid(self.excite(gate))
        return self.head(x.mean((2, 3)))


DIMS = {"x": {0: Dim("batch", min=1, max=64), 2: Dim("height", min=8), 3: Dim("width", min=8)}}


def test_a_block_is_fused_and_takes_other_batches_and_sizes(lower: Lower, load: Load) -> None:
    program = _quantized(_made(Residual), (2, 3, 16, 16), "uint8:affine", DIMS)
    session = load(lower(program))
    steps = _steps(session)
    assert steps["conv_q8"] == 5
    assert not steps["add_codes"], "the sum is the end of the second convolution"
    shapes = [(2, 3, 16, 16), (1, 3, 9, 20), (5, 3, 16, 16), (2, 3, 32, 8), (1, 3, 9, 20)]
    _agrees(program, session, [_random(shape, seed) for seed, shape in enumerate(shapes)])


def test_threads_change_nothing(lower: Lower, load: Load) -> None:
    program = _quantized(_made(Residual), (2, 3, 16, 16), "uint8:affine", DIMS)
    artifact = lower(program)
    inputs = program.signature.bind((_random((4, 3, 40, 40)),), {})
    results = [load(artifact, threads).run(inputs)[0] for threads in (1, 2, 3)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_an_empty_batch(lower: Lower, load: Load) -> None:
    dims = {"input": {0: Dim("batch", min=0, max=8)}}
    program = trace(_made(lambda: nn.Conv2d(3, 4, 3)), (_random((2, 3, 5, 5)),), dynamic_shapes=dims)
    session = load(lower(program))
    for batch in (3, 0, 1):
        x = _random((batch, 3, 5, 5))
        torch.testing.assert_close(session.run([x])[0], program.run([x])[0].detach(), rtol=1e-5, atol=1e-6)


def test_a_batch_of_none_images_of_one_pixel_and_changing_sizes(lower: Lower, load: Load) -> None:
    """In 8 bits, through every form of a convolution; sizes come back, and are prepared by then."""
    program = images_program()
    artifact = lower(program)
    forms = {name: choice.form for name, choice in artifact.choices.items()}
    assert forms["blocks"] == "int8 in 1x4 blocks" and forms["elements"] == "int8, nonzeros"
    session = load(artifact)
    shapes = [(2, 9, 8), (1, 1, 1), (0, 5, 5), (4, 16, 16), (3, 1, 16), (1, 1, 1), (1, 16, 1), (2, 9, 8)]
    for batch, height, width in shapes:
        (result,) = session.run([images(batch, height, width)])
        assert result.shape == program.run([images(batch, height, width)])[0].shape
    _agrees(program, session, [images(*shape) for shape in shapes if shape[0]])
    with pytest.raises(InputError, match="height is 0; the model takes 1 to 16"):
        session.run([torch.zeros(1, 3, 0, 4)])
    with pytest.raises(InputError, match="width is 17"):
        session.run([torch.zeros(1, 3, 4, 17)])
    with pytest.raises(InputError, match="dimension 1"):
        session.run([torch.zeros(1, 4, 4, 4)])
    assert session.run([images(2, 9, 8)])[0].isfinite().all()


def test_what_a_kernel_sees_of_few_channels_lies_together(lower: Lower, load: Load) -> None:
    """Else three of four bytes of a grey image would say nothing."""
    dims = {"input": {2: Dim("height", min=4, max=64), 3: Dim("width", min=4, max=64)}}
    program = _quantized(
        _made(lambda: nn.Sequential(nn.Conv2d(1, 8, (10, 4), 2, (5, 1)), nn.ReLU())),
        (1, 1, 20, 10),
        "int8",
        dims,
    )
    artifact = lower(program)
    session = load(artifact)
    assert [product.k for product in artifact.products.values()] == [40]
    _agrees(
        program, session, [_random((1, 1, height, width)) for height, width in ((20, 10), (4, 5), (7, 64))]
    )


def test_an_image_that_is_too_small_is_an_error(lower: Lower, load: Load) -> None:
    dims = {"input": {2: Dim("height", min=7, max=64)}}
    layer = _made(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2)))
    program = trace(layer, (_random((1, 3, 16, 16)),), dynamic_shapes=dims)
    session = load(lower(program))
    with pytest.raises(InputError, match="height is 4; the model takes 7 to 64"):
        session.run([_random((1, 3, 4, 16))])
    with pytest.raises(InputError, match="dimension 3"):
        session.run([_random((1, 3, 8, 15))])
    x = _random((1, 3, 8, 16))
    torch.testing.assert_close(session.run([x])[0], program.run([x])[0].detach(), rtol=1e-5, atol=1e-6)


class Wide(nn.Module):
    """Convolutions with enough channels for zeros to pay, one of them with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.point = nn.Conv2d(32, 64, 1)
        self.square = nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.last = nn.Conv2d(64, 30, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.point(F.relu(self.stem(x))))
        return self.last(F.relu(self.square(x)))


def _pruned(sparsity: float, pattern: str = "1x4") -> Program:
    program = trace(_made(Wide), (_random((2, 3, 12, 12)),))
    calibration = Calibration([_random((2, 3, 12, 12), seed) for seed in range(2)], program.signature)
    masks: list[Pass] = [
        MaskWeights(sparsity=sparsity, pattern=pattern, layers=("point", "square", "last")),
        ApplyMasks(),
    ]
    PassManager([*masks, *pipelines.int8_static(equalize=False)]).run(
        program, PassContext(calibration=calibration)
    )
    return program


def _agrees_on_any_number_of_threads(program: Program, artifact: NativeArtifact) -> None:
    inputs = program.signature.bind((_random((2, 3, 12, 12)),), {})
    sessions = [BACKEND.load(artifact, threads=threads) for threads in (1, 2, 3)]
    _agrees(program, sessions[1], [_random((2, 3, 12, 12), seed) for seed in range(4)])
    results = [session.run(inputs)[0] for session in sessions]
    assert all(torch.equal(result, results[0]) for result in results)


def test_blocks_of_zeros_are_skipped_where_that_pays(lower: Lower, load: Load) -> None:
    program = _pruned(0.85)
    artifact = lower(program)
    session = load(artifact)
    assert _steps(session)["conv_q8_block"] == 3, "of the stem nothing is zero"
    assert artifact.choices["square"].form == "int8 in 1x4 blocks" and not artifact.choices["square"].remark
    _agrees_on_any_number_of_threads(program, artifact)


def test_single_weights_are_skipped_where_that_pays(lower: Lower, load: Load) -> None:
    program = _pruned(0.85, "unstructured")
    artifact = lower(program)
    session = load(artifact)
    assert _steps(session)["conv_q8_sparse"] >= 1 and not _steps(session)["conv_q8_block"]
    assert artifact.choices["square"].form == "int8, nonzeros" and not artifact.choices["square"].remark
    assert artifact.choices["stem"].form == "int8", "nothing in it is zero"
    _agrees_on_any_number_of_threads(program, artifact)


def test_zeros_that_do_not_pay_are_said(lower: Lower, load: Load) -> None:
    artifact = lower(_pruned(0.45))
    assert not _steps(load(artifact))["conv_q8_block"]
    remarks = {name: choice.remark for name, choice in artifact.choices.items() if choice.remark}
    assert remarks.keys() == {"point", "square", "last"}
    assert all(
        "sparsity does not pay" in remark and "45% of the weights are zero" in remark
        for remark in remarks.values()
    )


def test_times_are_predicted_from_products_of_as_many_rows_as_pixels(
    lower: Lower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine where a million weights take 100 ns a row; what skips zeros takes its part of that."""
    artifact = lower(_pruned(0.85))
    monkeypatch.setattr(kernel_times, "kernel_times", lambda: (machine(), ""))
    predicted = artifact.predict([_random((2, 3, 12, 12))])
    dense = {"point": 2 * 144 * 100.0 * 32 * 64 / 1e6, "square": 2 * 36 * 100.0 * 64 * 64 * 9 / 1e6}
    for name, time in dense.items():
        assert predicted[name] == pytest.approx(time * artifact.products[name].share)
        assert 0.1 < artifact.products[name].share < 0.85
    assert artifact.products["stem"].share == 1.0


def test_a_profile_speaks_of_the_layers(lower: Lower, load: Load) -> None:
    program = _pruned(0.85)
    session = load(lower(program))
    layers = dict.fromkeys(("stem", "point", "square", "last"), 1)
    times = session.profile([_random((2, 3, 12, 12))], layers, runs=3)
    assert times.keys() == layers.keys()
    assert all(time > 0 for time in times.values())


FUNCTIONS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "max_pool": (lambda m, x: F.max_pool2d(x, 3, 2, 1), (2, 5, 7, 8)),
    "max_pool_dilated": (lambda m, x: F.max_pool2d(x, (2, 3), dilation=(2, 1)), (1, 5, 8, 8)),
    "max_pool_ceil": (lambda m, x: F.max_pool2d(x, 3, 2, ceil_mode=True), (1, 3, 8, 8)),
    "max_pool_row": (lambda m, x: F.max_pool1d(x, 3, 2), (2, 5, 9)),
    "avg_pool": (lambda m, x: F.avg_pool2d(x, 3, 2, 1), (2, 5, 7, 8)),
    "avg_pool_ceil": (lambda m, x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), (2, 5, 8, 8)),
    "avg_pool_inside": (lambda m, x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (2, 5, 7, 8)),
    "avg_pool_divisor": (lambda m, x: F.avg_pool2d(x, 2, divisor_override=3), (2, 5, 6, 6)),
    "avg_pool_row": (lambda m, x: F.avg_pool1d(x, 3, 1, 1), (2, 5, 9)),
    "adaptive": (lambda m, x: F.adaptive_avg_pool2d(x, (3, 4)), (2, 5, 7, 9)),
    "adaptive_row": (lambda m, x: F.adaptive_avg_pool1d(x, 4), (2, 5, 9)),
    "global": (lambda m, x: F.adaptive_avg_pool2d(x, 1), (2, 5, 7, 9)),
    "nearest": (lambda m, x: F.interpolate(x, scale_factor=2), (2, 5, 3, 4)),
    "nearest_size": (lambda m, x: F.interpolate(x, size=(7, 5)), (2, 5, 3, 9)),
    "bilinear": (lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"), (2, 5, 3, 4)),
    "bilinear_smaller": (lambda m, x: F.interpolate(x, size=(3, 5), mode="bilinear"), (1, 5, 8, 4)),
    "bilinear_corners": (
        lambda m, x: F.interpolate(x, size=(9, 7), mode="bilinear", align_corners=True),
        (2, 5, 3, 4),
    ),
    "pad": (lambda m, x: F.pad(x, (1, 2, 0, 3), value=1.5), (2, 3, 4, 5)),
    "crop": (lambda m, x: F.pad(x, (-1, 2, 1, -2)), (2, 3, 4, 5)),
    "reflect": (lambda m, x: F.pad(x, (1, 2, 3, 0), mode="reflect"), (2, 3, 4, 5)),
    "replicate": (lambda m, x: F.pad(x, (1, 2, 3, 0), mode="replicate"), (2, 3, 4, 5)),
    "circular": (lambda m, x: F.pad(x, (1, 2, 3, 0), mode="circular"), (2, 3, 4, 5)),
    "pixel_shuffle": (lambda m, x: F.pixel_shuffle(x, 2), (2, 12, 3, 4)),
    "channel_shuffle": (lambda m, x: F.channel_shuffle(x, 3), (2, 12, 3, 4)),
    "elu": (lambda m, x: F.elu(x, 0.7), (2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_images_agree(name: str, compare: Compare) -> None:
    function, shape = FUNCTIONS[name]
    compare(function, [_random(shape)])


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_that_nothing_took_in(affine: bool, compare: Compare) -> None:
    norm = nn.BatchNorm2d(5, affine=affine)
    for buffer, low in ((norm.running_mean, -1.0), (norm.running_var, 0.5)):
        assert buffer is not None
        buffer.uniform_(low, 2.0, generator=torch.Generator().manual_seed(3))
    compare(lambda m, x: m.norm(x), [_random((2, 5, 3, 4))], norm=norm)


def test_a_maximum_with_a_nan_is_a_nan(compare: Compare) -> None:
    x = _random((1, 3, 4, 4))
    x[0, 1, 2, 2] = torch.nan
    compare(lambda m, x: F.max_pool2d(x, 2), [x])
