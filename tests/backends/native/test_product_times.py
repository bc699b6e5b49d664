"""What the native backend predicts for a product, for those who choose formats by time."""

from __future__ import annotations

from sqcompile.backend import get_backend
from sqcompile.quantization.format import Format
from sqcompile.sparsity import Pattern

SHAPE = (2048, 5632)


def ns(
    format: str, sparsity: float = 0.0, pattern: str = "unstructured", backend: str = "native"
) -> float | None:
    return get_backend(backend).product_ns(SHAPE, Format.parse(format), sparsity, Pattern.parse(pattern))


def test_fewer_bytes_take_less_time() -> None:
    four, eight, sparse = ns("uint4:group=32:affine"), ns("int8:channel=0"), ns("int8:channel=0", 0.9)
    assert four is not None and eight is not None and sparse is not None
    assert 0 < four < eight and 0 < sparse < eight


def test_zeros_that_do_not_pay_cost_nothing() -> None:
    dense, nearly = ns("int8:channel=0"), ns("int8:channel=0", 0.01)
    assert dense is not None and nearly is not None and nearly <= dense
    assert ns("uint3:group=32:affine", 0.5) == ns("uint3:group=32:affine")  # no kernel of its own


def test_formats_without_kernels() -> None:
    assert ns("int3:channel=0") is None and ns("int16:group=32") is None
    assert ns("int8:channel=0", backend="onnxruntime") is None
