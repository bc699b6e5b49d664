"""Selection: what each layer becomes, as text and as numbers. Nothing here needs ONNX."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from sqcompile.backends.onnxruntime.selection import select
from sqcompile.program import Program
from sqcompile.tracing import trace

CALIBRATED = "uint8:affine"
DYNAMIC = "uint8:affine:dynamic"


class Function(nn.Module):
    """A module of one function, with the layers that it uses."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def _layer(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.layer(x)


def _lines(program: Program) -> str:
    """Return the operators of a program's text, without types, stored tensors and absent arguments."""
    found = []
    for line in program.text().splitlines()[1:]:
        text = re.sub(r", \w+=None", "", line.strip())
        text = re.sub(r": [\w(][^=]*?\] =|: \([^=]*\) =", " =", text)
        if not text.startswith(("tensor @", "input ", "return ")):
            found.append(text)
    return "\n".join(found)


def _check(program: Program, x: torch.Tensor, expected: str, tolerance: float = 2e-5) -> Program:
    before = program.text()
    selected, _ = select(program)
    assert _lines(selected) == textwrap.dedent(expected).strip()
    assert program.text() == before, "the program itself was changed"
    # integer sums against float ones, and biases rounded to int32: the last bits of float32
    torch.testing.assert_close(selected(x), program(x), rtol=tolerance, atol=tolerance)
    return selected


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 16)


def _linear(bias: bool = True) -> nn.Module:
    return Function(_layer, layer=nn.Linear(16, 8, bias=bias)).eval()


# --- linear layers ------------------------------------------------------------------------------------


def test_calibrated_matrix(quantizer: Any, x: torch.Tensor) -> None:
    program = quantizer.weights(trace(_linear(), (x,)), "int8:channel=0")
    quantizer.activations(program, CALIBRATED, [x], kinds=["linear"])
    _check(
        program,
        x,
        """
        %quantize_linear = quantize_linear(%x, @x_scale, @x_zero_point_uint8)
        %dequantize_linear_2 = dequantize_linear(%quantize_linear, @x_scale, @x_zero_point_uint8)
        %dequantize_linear = dequantize_linear(@layer.bias_int32, @layer.bias_scale, axis=0)
        %dequantize_linear_1 = dequantize_linear(@layer.weight_codes, @layer.weight_scale, \
@layer.weight_zero_point_int8, axis=0)
        %linear_1 = linear(%dequantize_linear_2, %dequantize_linear_1, %dequantize_linear)
        """,
    )


def test_calibrated_batch_of_matrices_with_signed_activations(quantizer: Any, x: torch.Tensor) -> None:
    """Activations become unsigned; the weight stands [K, N], as MatMul takes it."""
    batch = x[None]
    program = quantizer.weights(trace(_linear(), (batch,)), "int8:channel=0")
    quantizer.activations(program, "int8", [batch], kinds=["linear"])
    selected = _check(
        program,
        batch,
        """
        %quantize_linear = quantize_linear(%x, @x_scale, @x_zero_point_unsigned_uint8)
        %dequantize_linear_2 = dequantize_linear(%quantize_linear, @x_scale, @x_zero_point_unsigned_uint8)
        %dequantize_linear = dequantize_linear(@layer.bias_int32, @layer.bias_scale, axis=0)
        %dequantize_linear_1 = dequantize_linear(@layer.weight_codes_transposed, @layer.weight_scale, \
@layer.weight_zero_point_int8, axis=1)
        %matmul = matmul(%dequantize_linear_2, %dequantize_linear_1)
        %add = add(%matmul, %dequantize_linear)
        """,
    )
    zero_point = selected.tensor("x_zero_point_unsigned_uint8")
    assert zero_point.dtype == torch.uint8 and int(zero_point) == 128


def test_dynamic(quantizer: Any, x: torch.Tensor) -> None:
    program = quantizer.weights(trace(_linear(), (x,)), "int8:channel=0")
    quantizer.activations(program, DYNAMIC, [x], kinds=["linear"])
    _check(
        program,
        x,
        """
        %dynamic_quantize_linear = dynamic_quantize_linear(%x)
        %getitem_2 = getitem(%dynamic_quantize_linear, 0)
        %getitem_3 = getitem(%dynamic_quantize_linear, 1)
        %getitem_4 = getitem(%dynamic_quantize_linear, 2)
        %matmul_integer = matmul_integer(%getitem_2, @layer.weight_codes_transposed, %getitem_4)
        %to = to.dtype(%matmul_integer, dtype=f32)
        %mul = mul(%getitem_3, @layer.weight_scale)
        %mul_1 = mul(%to, %mul)
        %add = add(%mul_1, @layer.bias)
        """,
    )


def test_dynamic_per_token(quantizer: Any, x: torch.Tensor) -> None:
    program = quantizer.weights(trace(_linear(bias=False), (x,)), "int8:channel=0")
    quantizer.activations(program, "int8:token:dynamic", [x], kinds=["linear"])
    _check(
        program,
        x,
        """
        %abs_1 = abs(%x)
        %amax = amax(%abs_1, keepdim=True)
        %div = div(%amax, other=127)
        %clamp_min = clamp_min(%div, min=1.0842e-19)
        %eq = eq.Scalar(%amax, other=0)
        %where = where.ScalarSelf(%eq, self=1, other=%clamp_min)
        %to_4 = to.dtype(%where, dtype=i32)
        %full_like = full_like(%to_4, fill_value=128)
        %to_1 = to.dtype(%full_like, dtype=u8)
        %reshape = reshape(%where, shape=[-1])
        %reshape_1 = reshape(%to_1, shape=[-1])
        %quantize_linear = quantize_linear(%x, %reshape, %reshape_1, axis=0)
        %matmul_integer = matmul_integer(%quantize_linear, @layer.weight_codes_transposed, \
@layer.weight_codes_offset128)
        %to = to.dtype(%matmul_integer, dtype=f32)
        %mul = mul(%to, %where)
        %mul_1 = mul(%mul, @layer.weight_scale)
        """,
    )


@pytest.mark.parametrize(
    "activation",
    [
        "int8:dynamic",
        "uint8:token:affine:dynamic",
        "int8:token:dynamic",
        "uint4:affine:dynamic",
        "int8:narrow",
    ],
)
@pytest.mark.parametrize("weight", ["int8:channel=0", "uint8:affine:channel=0", "int8", "int4:channel=0"])
@pytest.mark.parametrize("shape", [(3, 16), (2, 3, 16)], ids=str)
def test_every_pair_of_formats_keeps_its_values(
    quantizer: Any, activation: str, weight: str, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    program = quantizer.weights(trace(_linear(), (x,)), weight)
    quantizer.activations(program, activation, [x], kinds=["linear"])
    selected, _ = select(program)
    # a bias is rounded to s_x · s_w, which is coarse for weights of four bits
    torch.testing.assert_close(selected(x), program(x), rtol=1e-4, atol=1e-3)
    kinds = {node.target for node in selected.compute_nodes()}
    integer = torch.ops.sqcompile_ort.matmul_integer.default in kinds
    assert integer == ("dynamic" in activation)


def test_equal_data_is_quantized_once(quantizer: Any, x: torch.Tensor) -> None:
    module = Function(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(16, 8), b=nn.Linear(16, 8)).eval()
    program = quantizer.weights(trace(module, (x,)), "int8:channel=0")
    quantizer.activations(program, DYNAMIC, [x], kinds=["linear"])
    selected, _ = select(program)
    targets = [node.target for node in selected.compute_nodes()]
    assert targets.count(torch.ops.sqcompile_ort.dynamic_quantize_linear.default) == 1
    assert targets.count(torch.ops.sqcompile_ort.matmul_integer.default) == 2


def test_weight_only(quantizer: Any, x: torch.Tensor) -> None:
    program = quantizer.weights(trace(_linear(), (x,)), "uint4:affine:group=16")
    _check(
        program,
        x,
        """
        %matmul_nbits = matmul_nbits(%x, @layer.weight_codes_packed, @layer.weight_codes_scales, \
@layer.weight_codes_zero_points, @layer.bias, columns=16, outputs=8, bits=4, block_size=16, accuracy_level=4)
        """,
        tolerance=0.05,  # activations are rounded to 8 bits
    )


def test_weight_only_as_gpt2_writes_it(quantizer: Any, x: torch.Tensor) -> None:
    """addmm(bias, x, weight [K, N]), with groups along the first axis."""
    module = Function(lambda m, x: torch.addmm(m.layer.bias, x, m.layer.weight), layer=nn.Linear(8, 16))
    module.layer.bias = nn.Parameter(torch.randn(8))  # type: ignore[union-attr]
    program = quantizer.weights(trace(module.eval(), (x,)), "int8:group=16@0")
    selected = _check(
        program,
        x,
        """
        %matmul_nbits = matmul_nbits(%x, @layer.weight_codes_packed, @layer.weight_codes_scales, \
bias=@layer.bias, columns=16, outputs=8, bits=8, block_size=16, accuracy_level=4)
        """,
        tolerance=0.05,
    )
    assert tuple(selected.tensor("layer.weight_codes_packed").shape) == (8, 1, 16)


def test_groups_that_the_operator_does_not_know_are_dequantized(quantizer: Any, x: torch.Tensor) -> None:
    program = quantizer.weights(trace(_linear(), (x,)), "int4:group=6")
    _check(
        program,
        x,
        """
        %dequantize_linear = dequantize_linear(@layer.weight_codes, @layer.weight_scale, \
@layer.weight_zero_point_int8, axis=-1, block_size=6)
        %linear = linear(%x, %dequantize_linear, @layer.bias)
        """,
    )


def test_a_bias_beyond_int32_stays_float_and_is_noted(quantizer: Any, x: torch.Tensor) -> None:
    module = _linear()
    with torch.no_grad():
        module.layer.weight[0] = 1e-12  # type: ignore[union-attr, index]
        module.layer.bias[0] = 1.0  # type: ignore[union-attr, index]
    program = quantizer.weights(trace(module, (x,)), "int8:channel=0")
    quantizer.activations(program, CALIBRATED, [x], kinds=["linear"])
    selected, notes = select(program)
    assert len(notes) == 1 and "layer.bias stays float" in notes[0]
    torch.testing.assert_close(selected(x), program(x), rtol=1e-5, atol=1e-5)


# --- embeddings ---------------------------------------------------------------------------------------

IDS = torch.tensor([[1, 5, 0], [9, 9, 2]])


def test_embedding_with_a_scale_a_row(quantizer: Any) -> None:
    program = quantizer.weights(trace(Function(_layer, layer=nn.Embedding(10, 16)), (IDS,)), "int8:channel=0")
    _check(
        program,
        IDS,
        """
        %embedding_1 = embedding(@layer.weight_codes, %x)
        %to = to.dtype(%embedding_1, dtype=f32)
        %embedding_2 = embedding(@layer.weight_scale_rows, %x)
        %mul = mul(%to, %embedding_2)
        """,
        tolerance=0,
    )


def test_embedding_of_four_bits(quantizer: Any) -> None:
    program = quantizer.weights(
        trace(Function(_layer, layer=nn.Embedding(10, 32)), (IDS,)), "uint4:affine:group=16"
    )
    _check(
        program,
        IDS,
        """
        %reshape = reshape(@layer.weight_codes_packed, shape=[10, 16])
        %gather_block_quantized = gather_block_quantized(%reshape, %x, @layer.weight_codes_scales, \
@layer.weight_codes_zero_points, bits=4, block_size=16)
        """,
        tolerance=0,
    )


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "uint8:affine",
        "uint8:affine:channel=0",
        "int8:group=16",
        "int4:group=6",
        "int8:group=3@0",
        "uint4:affine:channel=0",
        "int2:group=16",
        "int16:channel=0",
        "int8:channel=1",
    ],
)
def test_embeddings_fetch_before_they_dequantize(quantizer: Any, text: str) -> None:
    program = quantizer.weights(trace(Function(_layer, layer=nn.Embedding(10, 16)), (IDS,)), text)
    selected, _ = select(program)
    assert torch.equal(selected(IDS), program(IDS))
    for node in selected.compute_nodes():
        assert node.target is not torch.ops.sqcompile_ort.dequantize_linear.default


@pytest.mark.parametrize("text", ["int4:group=16", "int8:channel=0", "int8:group=16"])
def test_a_tied_weight_is_stored_once(quantizer: Any, text: str) -> None:
    def tied(m: Any, ids: torch.Tensor) -> torch.Tensor:
        return functional.linear(m.layer(ids) * 1.5, m.layer.weight)

    program = quantizer.weights(trace(Function(tied, layer=nn.Embedding(10, 32)), (IDS,)), text)
    selected, _ = select(program)
    torch.testing.assert_close(selected(IDS), program(IDS), rtol=0.05, atol=0.3)
    codes = [
        name
        for name, tensor in selected.tensors()
        if tensor.numel() >= 160 and not tensor.is_floating_point()
    ]
    assert codes == ["layer.weight_codes_packed"]


def test_a_tied_weight_of_integer_layers_is_stored_once(quantizer: Any) -> None:
    def tied(m: Any, ids: torch.Tensor) -> torch.Tensor:
        return functional.linear(m.layer(ids) * 1.5, m.layer.weight)

    program = quantizer.weights(trace(Function(tied, layer=nn.Embedding(10, 32)), (IDS,)), "int8:channel=0")
    quantizer.activations(program, DYNAMIC, [IDS], kinds=["linear"])
    selected, _ = select(program)
    torch.testing.assert_close(selected(IDS), program(IDS), rtol=1e-5, atol=1e-5)
    assert [name for name, tensor in selected.tensors() if tensor.numel() == 320] == ["layer.weight_codes"]


# --- activations, convolutions ------------------------------------------------------------------------


def _clamped(m: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.hardtanh(m.layer(x), -0.5, 0.25)


@pytest.mark.parametrize(
    ("function", "activation", "bounds"),
    [
        (lambda m, x: torch.relu(m.layer(x)), "uint8:affine", None),  # zero is the least code
        (lambda m, x: torch.relu(m.layer(x)), "int8", (128, 255)),
        (lambda m, x: functional.relu6(m.layer(x)), "int8:affine", None),
        (_clamped, "uint8:affine", None),  # calibrated on what the clamp left
        (lambda m, x: m.layer(x).clamp(min=0.0), "int8", (128, 255)),
    ],
)
def test_clamps_move_behind_quantization(
    quantizer: Any, x: torch.Tensor, function: Any, activation: str, bounds: tuple[int, int] | None
) -> None:
    program = quantizer.weights(
        trace(Function(function, layer=nn.Linear(16, 8)).eval(), (x,)), "int8:channel=0"
    )
    quantizer.activations(program, activation, [x], kinds=["linear"], outputs=True)
    selected, _ = select(program)
    torch.testing.assert_close(selected(x), program(x), rtol=1e-5, atol=1e-5)
    nodes = list(selected.compute_nodes())
    layer = next(node for node in nodes if node.target is torch.ops.aten.linear.default)
    (quantize,) = layer.users
    assert quantize.target is torch.ops.sqcompile_ort.quantize_linear.default
    clamps = [node.args[1:3] for node in nodes if node.target is torch.ops.aten.clamp.default]
    assert clamps == ([] if bounds is None else [bounds])


def test_a_clamp_with_another_user_stays(quantizer: Any, x: torch.Tensor) -> None:
    module = Function(lambda m, x: (lambda y: m.layer(y) + y.sum())(torch.relu(x)), layer=nn.Linear(16, 8))
    program = quantizer.weights(trace(module.eval(), (x,)), "int8:channel=0")
    quantizer.activations(program, CALIBRATED, [x], kinds=["linear"])
    selected, _ = select(program)
    assert torch.ops.aten.relu.default in {node.target for node in selected.compute_nodes()}
    torch.testing.assert_close(selected(x), program(x), rtol=1e-5, atol=1e-5)


def test_codes_stay_signed_where_they_are_returned(x: torch.Tensor) -> None:
    sq = torch.ops.sqcompile

    class Codes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale, zero = torch.tensor(0.1), torch.tensor(0, dtype=torch.int32)
            return sq.quantize(x, scale, zero, None, None, -128, 127).flip(0)

    program = trace(Codes(), (x,))
    selected, _ = select(program)
    assert selected(x).dtype == torch.int8 and torch.equal(selected(x), program(x))


def test_calibrated_convolution(quantizer: Any) -> None:
    image = torch.randn(1, 3, 6, 6)
    module = Function(lambda m, x: functional.relu6(m.layer(x)), layer=nn.Conv2d(3, 4, 3)).eval()
    program = quantizer.weights(trace(module, (image,)), "uint8:affine:channel=0")
    quantizer.activations(program, "int8:affine", [image], kinds=["conv2d"], outputs=True)
    selected, _ = select(program)
    assert selected.tensor("layer.weight_codes_int8").dtype == torch.int8
    assert selected.tensor("layer.bias_int32").dtype == torch.int32
    step = float(selected.tensor("relu6_scale"))
    torch.testing.assert_close(selected(image), program(image), rtol=0, atol=1.01 * step)


# --- masks, attention, norms, shapes ------------------------------------------------------------------


def test_masks_are_baked_in() -> None:
    layer = nn.Linear(16, 8)
    mask = torch.rand(8, 16) > 0.5
    module = Function(
        lambda m, x: functional.linear(
            x, torch.ops.sqcompile.mask(m.layer.weight, m.layer.keep), m.layer.bias
        ),
        layer=layer,
    )
    layer.register_buffer("keep", mask)
    x = torch.randn(3, 16)
    program = trace(module.eval(), (x,))
    selected = _check(program, x, "%linear = linear(%x, @layer.weight_masked, @layer.bias)", tolerance=0)
    assert torch.equal(selected.tensor("layer.weight_masked"), layer.weight * mask)


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
}


@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
def test_attention(options: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 5, 8)
    module = Function(lambda _, x: functional.scaled_dot_product_attention(x, x * 2, x + 1, **options))
    program = trace(module, (x,))
    selected, _ = select(program)
    torch.testing.assert_close(selected(x), program(x), rtol=1e-5, atol=1e-6)
    assert "scaled_dot_product_attention" not in selected.text()


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attention_with_a_mask(kind: str) -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            y = functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
            return functional.scaled_dot_product_attention(y, x, x, attn_mask=mask)

    x = torch.randn(2, 3, 5, 8)
    mask: torch.Tensor = torch.rand(2, 1, 5, 5) > 0.5
    mask[0, 0, 0] = False  # a row that attends to nothing: PyTorch returns zeros
    if kind == "float":
        mask = torch.randn(2, 1, 5, 5)
    program = trace(Masked(), (x, mask))
    selected, _ = select(program)
    torch.testing.assert_close(selected(x, mask), program(x, mask), rtol=1e-5, atol=1e-6)
    text = selected.text()
    if kind == "bool":
        assert float(selected(x, mask)[0, :, 0].abs().max()) == 0
        assert text.count("any.dim(") == 1, "two layers share what is made of the mask"


def test_root_mean_square_norm(x: torch.Tensor) -> None:
    module = Function(lambda _, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * 3)
    program = trace(module, (x,))
    selected, _ = select(program)
    torch.testing.assert_close(selected(x), program(x), rtol=1e-6, atol=1e-6)
    assert "rsqrt" not in selected.text() and "sqrt" in selected.text()


@pytest.mark.parametrize(
    ("function", "pools"),
    [
        (lambda _, x: x.mean((2, 3)), True),
        (lambda _, x: x.mean((-1, -2), keepdim=True), True),
        (lambda _, x: functional.adaptive_avg_pool2d(x, 1), True),
        (lambda _, x: functional.adaptive_avg_pool2d(x, 2), False),
        (lambda _, x: x.mean((1, 2)), False),
        (lambda _, x: x.mean(3), False),
    ],
)
def test_means_over_space_are_pooling(function: Any, pools: bool) -> None:
    image = torch.randn(2, 3, 4, 4)
    program = trace(Function(function), (image,))
    selected, _ = select(program)
    torch.testing.assert_close(selected(image), program(image))
    assert ("global_average_pool" in selected.text()) == pools
