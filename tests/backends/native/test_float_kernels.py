"""Float kernels against PyTorch's operators, whose semantics they promise."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sqcompile.backends.native import float_kernels, kernels
from sqcompile.errors import InputError

ISAS = kernels.available_isas()
TORCH_ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "exp": torch.exp,
}


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(seen: NDArray[np.float32], expected: torch.Tensor, tolerance: float = 3e-6) -> None:
    """Both round in float32, in different orders: some ulp of numbers about 1."""
    np.testing.assert_allclose(seen, expected.numpy(), rtol=tolerance, atol=tolerance)


# --- normalize --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 31, 768])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_normalize_as_pytorch(kind: str, k: int) -> None:
    x, weight, bias = normal(1, 5, k), normal(2, k), normal(3, k)
    if kind == "rms":
        seen = float_kernels.normalize(x, weight=weight, epsilon=1e-6)
        expected = functional.rms_norm(torch.tensor(x), (k,), torch.tensor(weight), 1e-6)
    else:
        seen = float_kernels.normalize(x, kind="layer", weight=weight, bias=bias)
        expected = functional.layer_norm(
            torch.tensor(x), (k,), torch.tensor(weight), torch.tensor(bias), 1e-5
        )
    close(seen, expected)


# --- activations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", float_kernels.ACTIVATIONS)
def test_activations_as_pytorch(function: str) -> None:
    x = np.linspace(-20, 20, 1001, dtype=np.float32)[None]
    x = np.concatenate([x, [[0.0, np.nan, -87.5, 88.5] + [0.0] * 997]]).astype(np.float32)
    seen = float_kernels.activate(x, function)
    close(seen, TORCH_ACTIVATIONS[function](torch.tensor(x)))


def test_gate_as_pytorch() -> None:
    x, factor = normal(4, 3, 100), normal(5, 3, 100)
    seen = float_kernels.activate(x, "silu", factor=factor)
    close(seen, functional.silu(torch.tensor(x)) * torch.tensor(factor))


# --- products ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("m", [1, 7, 40])
def test_float_product_as_pytorch(m: int, bfloat16: bool) -> None:
    a, weight, bias = normal(6, m, 200), normal(7, 70, 200), normal(8, 70)
    packed = float_kernels.pack_float(weight, bias, bfloat16=bfloat16)
    stored = torch.tensor(weight).bfloat16().float() if bfloat16 else torch.tensor(weight)
    expected = torch.tensor(a) @ stored.T + torch.tensor(bias)
    for pool in (None, kernels.ThreadPool(2)):
        # Sums of 200 products, each about 1.
        close(float_kernels.float_matmul(a, packed, pool=pool), expected, 3e-5)


# --- attention --------------------------------------------------------------------------------------------


def attend(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    *,
    quantized: bool = False,
    **options: object,
) -> NDArray[np.float32]:
    batch, heads, tokens, head_dim = k.shape
    cache = float_kernels.KvCache(batch, heads, head_dim, tokens, quantized=quantized)
    cache.append(k[:, :, : tokens // 3], v[:, :, : tokens // 3])
    cache.append(k[:, :, tokens // 3 :], v[:, :, tokens // 3 :])
    return cache.attend(q, **options)  # type: ignore[arg-type]


def torch_attention(
    q: NDArray[np.float32], k: NDArray[np.float32], v: NDArray[np.float32], **options: object
) -> torch.Tensor:
    return functional.scaled_dot_product_attention(
        torch.tensor(q), torch.tensor(k), torch.tensor(v), enable_gqa=True, **options
    )


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("head_dim", [20, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_as_pytorch(heads: int, kv_heads: int, head_dim: int, causal: bool) -> None:
    q, k, v = (normal(s, 2, h, 90, head_dim) for s, h in ((9, heads), (10, kv_heads), (11, kv_heads)))
    close(attend(q, k, v, causal=causal), torch_attention(q, k, v, is_causal=causal))


def test_queries_that_continue_a_sequence() -> None:
    q, k, v = normal(12, 1, 4, 5, 32), normal(13, 1, 2, 70, 32), normal(14, 1, 2, 70, 32)
    visible = torch.ones(5, 70, dtype=torch.bool).tril(65)
    close(attend(q, k, v, causal=True), torch_attention(q, k, v, attn_mask=visible))
    last = attend(q[:, :, 4:], k, v, causal=True)
    assert (
        last.tobytes() == attend(q, k, v, causal=True)[:, :, 4:].tobytes()
    )  # decoding is prefill, bit for bit


def test_masks_and_rows_that_see_nothing() -> None:
    """PyTorch gives zeros where every key is masked, with booleans and with -inf alike."""
    q, k, v = normal(15, 2, 4, 6, 16), normal(16, 2, 2, 33, 16), normal(17, 2, 2, 33, 16)
    allowed = np.random.default_rng(18).random((2, 6, 33)) < 0.6
    allowed[0, 2] = False
    expected = torch_attention(q, k, v, attn_mask=torch.tensor(allowed[:, None]))
    assert (expected[0, :, 2] == 0).all()
    close(attend(q, k, v, mask=allowed), expected)
    added = np.where(allowed, normal(19, 2, 6, 33), np.float32(-np.inf))
    expected = torch_attention(q, k, v, attn_mask=torch.tensor(added[:, None]))
    assert (expected[0, :, 2] == 0).all()
    close(attend(q, k, v, mask=added), expected)


def test_attention_over_an_8_bit_cache() -> None:
    q, k, v = normal(20, 1, 4, 3, 64), normal(21, 1, 2, 100, 64), normal(22, 1, 2, 100, 64)

    def stored(x: NDArray[np.float32]) -> NDArray[np.float32]:
        scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        return (np.rint(x / scale) * scale).astype(np.float32)

    close(attend(q, k, v, quantized=True), torch_attention(q, stored(k), stored(v)))
    assert np.abs(attend(q, k, v, quantized=True) - attend(q, k, v)).max() < 0.02  # of values about 1


@pytest.mark.parametrize("quantized", [False, True])
def test_the_same_bits_on_every_instruction_set(quantized: bool) -> None:
    q, k, v = normal(23, 1, 6, 30, 40), normal(24, 1, 3, 80, 40), normal(25, 1, 3, 80, 40)
    weight = float_kernels.pack_float(normal(26, 50, 40), bfloat16=quantized)
    results = set()
    for isa in ISAS:
        for threads in (1, 3):
            pool = kernels.ThreadPool(threads)
            out = attend(q, k, v, quantized=quantized, causal=True, isa=isa, pool=pool).reshape(-1, 40)
            out = float_kernels.normalize(out, weight=normal(27, 40), isa=isa, pool=pool)
            out = float_kernels.float_matmul(out, weight, isa=isa, pool=pool)
            results.add(float_kernels.activate(out, "gelu", isa=isa, pool=pool).tobytes())
    assert len(results) == 1


# --- mistakes ---------------------------------------------------------------------------------------------


def test_mistakes_are_refused() -> None:
    x = normal(28, 2, 8)
    with pytest.raises(InputError, match="no float32 array with 2 dimensions"):
        float_kernels.normalize(x.astype(np.float64))
    with pytest.raises(InputError, match="epsilon is negative"):
        float_kernels.normalize(x, epsilon=-1.0)
    with pytest.raises(InputError, match="weight or bias has a wrong length"):
        float_kernels.normalize(x, weight=normal(29, 7))
    with pytest.raises(InputError, match="no such activation"):
        float_kernels.activate(x, "swish")
    with pytest.raises(InputError, match="different shapes"):
        float_kernels.activate(x, "silu", factor=normal(30, 2, 7))
    with pytest.raises(InputError, match="different K"):
        float_kernels.float_matmul(x, float_kernels.pack_float(normal(31, 3, 7)))
    with pytest.raises(InputError, match="one entry an output"):
        float_kernels.pack_float(normal(32, 3, 7), normal(33, 4))
    cache = float_kernels.KvCache(1, 2, 8, 60)
    with pytest.raises(InputError, match="do not fit the cache"):
        cache.append(normal(34, 1, 3, 1, 8), normal(35, 1, 3, 1, 8))
    with pytest.raises(InputError, match="65 tokens do not fit behind the 0 of a cache for 64"):
        cache.append(normal(36, 1, 2, 65, 8), normal(37, 1, 2, 65, 8))
    with pytest.raises(InputError, match="multiple of that of key heads"):
        cache.attend(normal(38, 1, 3, 1, 8))
    with pytest.raises(InputError, match=r"mask is not \[batch, queries, length\]"):
        cache.attend(normal(39, 1, 2, 1, 8), mask=np.ones((1, 1, 5), bool))
