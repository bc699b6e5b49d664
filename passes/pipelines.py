"""Named pipelines: whole jobs as plain lists of passes, with the reason for each order.

A pipeline is a function that returns passes, so a list can be changed before it is used:

    passes = pipelines.int8_static(sparsity=0.5)
    passes.insert(0, MyPass())

In text (command line, recipes) they are written as passes are: `int8-static{sparsity=0.5}`.
"""

from __future__ import annotations

from collections.abc import Callable

from sqcompile.passes.canonicalize import (
    CanonicalizeActivations,
    CanonicalizeLayers,
    FoldBatchNorm,
    FoldConstants,
    RemoveNoops,
)
from sqcompile.passes.prune import ApplyMasks, MaskWeights
from sqcompile.passes.quantize import (
    Calibrate,
    CorrectBias,
    EqualizeLayers,
    FoldQDQ,
    FreezeObservers,
    InsertObservers,
    QuantizeWeights,
)
from sqcompile.pipeline import Pass
from sqcompile.quantization import Format, PerChannel, PerGroup, PerTensor
from sqcompile.quantization.observers import HistogramMSE, Observer
from sqcompile.quantization.scheme import Override
from sqcompile.sparsity import Pattern


def canonicalize() -> list[Pass]:
    """Bring a traced model into the form that every other pass expects; the numbers stay.

    Returns:
        The passes, from `aten` to `aten`.
    """
    return [
        # First, so that patterns are not hidden behind dropout, casts and full slices.
        RemoveNoops(),
        # Weights that are computed from constants become stored tensors, which layers need.
        FoldConstants(),
        # One form of each layer and activation, before anything looks for layers.
        CanonicalizeLayers(),
        CanonicalizeActivations(),
        # After them: batch norm folds into layers, and activations behind it then follow the layer.
        FoldBatchNorm(),
    ]


def prune(
    sparsity: float | None = None,
    pattern: Pattern = Pattern(),  # noqa: B008 - immutable
    exclude: tuple[str, ...] = (),
) -> list[Pass]:
    """Zero the smallest weights of every layer and bake the zeros in.

    Args:
        sparsity: Fraction of the weights to zero; None for N:M patterns, which fix it, or for none.
        pattern: `unstructured`, N:M (`2:4`) or blocks (`1x4`).
        exclude: Patterns of layers to leave dense.

    Returns:
        The passes, from `aten` to `aten`; none if nothing is to be pruned.
    """
    if sparsity is None and pattern.fixed_sparsity is None:
        return []
    # Baked in at once: the zeros are promises that the verifier then holds quantization to.
    return [MaskWeights(sparsity=sparsity, pattern=pattern, exclude=exclude), ApplyMasks()]


def int8_static(
    sparsity: float | None = None,
    pattern: Pattern = Pattern(),  # noqa: B008 - immutable
    exclude: tuple[str, ...] = (),
    formats: tuple[Override, ...] = (),
    activation_formats: tuple[Override, ...] = (),
    observer: Observer = HistogramMSE(),  # noqa: B008 - immutable
    equalize: bool = False,
    correct_bias: bool = True,
) -> list[Pass]:
    """Quantize weights and activations to int8, with scales from calibration data. For CNNs.

    Args:
        sparsity: Fraction of the weights to zero first.
        pattern: Pattern of the zeros.
        exclude: Patterns of layers to leave in floating point.
        formats: Other formats of weights, by pattern or `kind:…`.
        activation_formats: Other formats of activations, alike.
        observer: How the range of an activation is chosen.
        equalize: Equalize channels across layers; helps weights with one scale a tensor.
        correct_bias: Correct biases for the shift in the mean; matters for depthwise convolutions.

    Returns:
        The passes, from `aten` to `qdq`.
    """
    return [
        *canonicalize(),
        # Before observers: they must see the activations of the pruned model.
        *prune(sparsity, pattern, exclude),
        # Between folding, which gives layers their final weights, and the scales that depend on them.
        *([EqualizeLayers(exclude=exclude)] if equalize else []),
        InsertObservers(
            exclude=exclude, formats=formats, activation_formats=activation_formats, observer=observer
        ),
        Calibrate(),
        # Needs calibrated ranges and the float weights, both of which exist only here.
        *([CorrectBias(add_bias=True)] if correct_bias else []),
        FreezeObservers(),
        # Last: it tidies the pairs that freezing has made, each for its own operator.
        FoldQDQ(),
    ]


def int8_dynamic(
    sparsity: float | None = None,
    pattern: Pattern = Pattern(),  # noqa: B008 - immutable
    exclude: tuple[str, ...] = (),
    formats: tuple[Override, ...] = (),
) -> list[Pass]:
    """Quantize weights to int8 ahead of time and activations at run time. For transformers.

    Embeddings get int8 weights too. No calibration data is needed.

    Args:
        sparsity: Fraction of the weights to zero first.
        pattern: Pattern of the zeros.
        exclude: Patterns of layers to leave in floating point.
        formats: Other formats of weights, by pattern or `kind:…`.

    Returns:
        The passes, from `aten` to `qdq`.
    """
    return [
        *canonicalize(),
        *prune(sparsity, pattern, exclude),
        QuantizeWeights(
            # Narrow: symmetric codes, as integer kernels expect of weights.
            weight=Format(granularity=PerChannel(0), narrow=True),
            # The one dynamic format that ONNX itself has, DynamicQuantizeLinear.
            activation=Format(signed=False, symmetric=False, granularity=PerTensor(), dynamic=True),
            exclude=exclude,
            formats=formats,
        ),
        FoldQDQ(),
    ]


def weight_only(
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    sparsity: float | None = None,
    pattern: Pattern = Pattern(),  # noqa: B008 - immutable
    exclude: tuple[str, ...] = (),
    formats: tuple[Override, ...] = (),
) -> list[Pass]:
    """Quantize only the weights, in groups, rounding to nearest. For language models.

    Args:
        bits: Bits a weight, 2 to 8.
        group_size: Weights along the inputs that share a scale; ONNX Runtime's kernels take powers of
            two from 16 on.
        symmetric: Without zero points: a little smaller, a little less exact.
        sparsity: Fraction of the weights to zero first.
        pattern: Pattern of the zeros.
        exclude: Patterns of layers to leave in floating point.
        formats: Other formats, by pattern or `kind:…`, such as `lm_head` at 8 bits.

    Returns:
        The passes, from `aten` to `qdq`.
    """
    # Signed codes around zero without zero points, unsigned ones with: as MatMulNBits has them.
    weight = Format(bits=bits, signed=symmetric, symmetric=symmetric, granularity=PerGroup(group_size))
    return [
        *canonicalize(),
        *prune(sparsity, pattern, exclude),
        QuantizeWeights(weight=weight, exclude=exclude, formats=formats),
    ]


PIPELINES: dict[str, Callable[..., list[Pass]]] = {
    "canonicalize": canonicalize,
    "prune": prune,
    "int8_static": int8_static,
    "int8_dynamic": int8_dynamic,
    "weight_only": weight_only,
}
"""Every named pipeline; texts write the names with dashes."""
