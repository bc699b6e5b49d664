"""Named pipelines: whole jobs as plain lists of passes, with the reason for each order.

    sqcompile.compile(model, passes=int8_static(), calibration=batches)
    sqcompile compile model.pt2 -p "int8-static{sparsity=0.5}" …

A pipeline is a starting point: being a list, it can be cut, extended and reordered.
"""

from __future__ import annotations

from collections.abc import Callable

from sqcompile.errors import RecipeError, did_you_mean
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
from sqcompile.quantization.affine import Search
from sqcompile.quantization.format import Format, PerChannel, PerGroup, PerTensor
from sqcompile.quantization.observers import HistogramMSE, Observer
from sqcompile.quantization.scheme import Override
from sqcompile.sparsity import Pattern

INT8_WEIGHT = Format(granularity=PerChannel(0), narrow=True)
INT8_STATIC = Format(signed=False, symmetric=False)
INT8_DYNAMIC = Format(signed=False, symmetric=False, dynamic=True)
UNSTRUCTURED = Pattern()
OBSERVER = HistogramMSE()


def canonical() -> list[Pass]:
    """Return the passes that bring a traced model into the form that all others expect."""
    return [
        RemoveNoops(),  # first: dropout and identities stand between what later passes look for together
        FoldConstants(),  # weights that are computed from stored tensors become stored tensors
        CanonicalizeLayers(),  # products with stored matrices become layers, with their bias inside
        FoldBatchNorm(),  # into layers: needs them in one form, and their bias
        CanonicalizeActivations(),  # last: what batch norm leaves behind a layer is what fuses into it
    ]


def int8_static(
    *,
    sparsity: float | None = None,
    pattern: Pattern | str = UNSTRUCTURED,
    weight: Format | str = INT8_WEIGHT,
    activation: Format | str = INT8_STATIC,
    observer: Observer | str = OBSERVER,
    equalize: bool = True,
    correct_bias: bool = True,
    layers: tuple[str, ...] = ("*",),
    exclude: tuple[str, ...] = (),
    formats: tuple[Override, ...] = (),
) -> list[Pass]:
    """Quantize weights and values to 8 bits with scales from calibration data; for CNNs.

    Args:
        sparsity: Fraction of each weight to prune first, or None.
        pattern: Sparse pattern: `unstructured`, `2:4`, `1x4`, …
        weight: Format of weights.
        activation: Format of values.
        observer: How the ranges of values are chosen.
        equalize: Equalize the channels between layers first.
        correct_bias: Correct the biases for the shift that rounding causes.
        layers: Patterns of the layers to quantize.
        exclude: Patterns of layers to leave in floating point.
        formats: Other formats of weights, by pattern or `kind:…`; `float` for none.
    """
    weight, activation = _format(weight), _format(activation)
    observer = Observer.parse(observer) if isinstance(observer, str) else observer
    # A scale a tensor is spoilt by uneven weights, a scale a channel only by uneven values.
    by = "weights" if isinstance(weight.granularity, PerTensor) else "values"
    return [
        *canonical(),
        *_pruned(sparsity, pattern),  # before ranges are measured: they are those of the pruned model
        *([EqualizeLayers(by=by, exclude=exclude)] if equalize else []),  # type: ignore[arg-type]
        InsertObservers(
            weight=weight,
            activation=activation,
            observer=observer,
            layers=layers,
            exclude=exclude,
            formats=formats,
        ),
        Calibrate(),
        *([CorrectBias()] if correct_bias else []),  # while both the ranges and the float weights exist
        FreezeObservers(),
        FoldQDQ(),
    ]


def int8_dynamic(
    *,
    sparsity: float | None = None,
    pattern: Pattern | str = UNSTRUCTURED,
    weight: Format | str = INT8_WEIGHT,
    activation: Format | str = INT8_DYNAMIC,
    layers: tuple[str, ...] = ("*",),
    exclude: tuple[str, ...] = (),
    formats: tuple[Override, ...] = (),
) -> list[Pass]:
    """Quantize weights to 8 bits and the data of linear layers as it comes; for transformers. No data needed.

    Args:
        sparsity: Fraction of each weight to prune first, or None.
        pattern: Sparse pattern: `unstructured`, `2:4`, `1x4`, …
        weight: Format of weights.
        activation: Format of the data of linear layers; dynamic.
        layers: Patterns of the layers to quantize.
        exclude: Patterns of layers to leave in floating point.
        formats: Other formats of weights, by pattern or `kind:…`; `float` for none.
    """
    return [
        *canonical(),
        *_pruned(sparsity, pattern),  # codes are of the pruned weights: masked ones are exactly zero
        QuantizeWeights(
            weight=_format(weight),
            activation=_format(activation),
            layers=layers,
            exclude=exclude,
            formats=formats,
        ),
        FoldQDQ(),
    ]


def weight_only(
    *,
    bits: int = 4,
    group_size: int = 32,
    sparsity: float | None = None,
    pattern: Pattern | str = UNSTRUCTURED,
    symmetric: bool = False,
    search: Search = "minmax",
    embeddings: Format | str = INT8_WEIGHT,
    layers: tuple[str, ...] = ("*",),
    exclude: tuple[str, ...] = (),
    formats: tuple[Override, ...] = (),
) -> list[Pass]:
    """Quantize weights alone, with a scale a group; for language models, whose speed is that of reading weights.

    Embeddings and the layers that make the outputs get 8 bits: they are few, and at 4 bits they cost more
    accuracy than all other layers together.

    Args:
        bits: Bits a weight.
        group_size: Weights that share a scale.
        sparsity: Fraction of each weight to prune first, or None.
        pattern: Sparse pattern: `unstructured`, `2:4`, `1x4`, …
        symmetric: No zero points: a little smaller, and less accurate.
        search: `minmax`, or `mse` for the least squared error of each scale.
        embeddings: Format of embeddings and output layers.
        layers: Patterns of the layers to quantize.
        exclude: Patterns of layers to leave in floating point.
        formats: Other formats, by pattern or `kind:…`; `float` for none. They count more than `embeddings`.
    """
    weight = Format(bits=bits, signed=symmetric, symmetric=symmetric, granularity=PerGroup(group_size))
    eight = _format(embeddings)
    return [
        *canonical(),
        *_pruned(sparsity, pattern),  # codes are of the pruned weights: masked ones are exactly zero
        QuantizeWeights(
            weight=weight,
            search=search,
            layers=layers,
            exclude=exclude,
            formats=(("kind:embedding", eight), ("kind:head", eight), *formats),
        ),
        FoldQDQ(),
    ]


Pipeline = Callable[..., list[Pass]]
"""A function whose keyword arguments are options, and which returns passes in order."""

PIPELINES: dict[str, Pipeline] = {
    "int8-static": int8_static,
    "int8-dynamic": int8_dynamic,
    "weight-only": weight_only,
}


def find_pipeline(name: str) -> Pipeline:
    """Return a pipeline by name; underscores are understood.

    Raises:
        RecipeError: If there is none, with the nearest names.
    """
    key = name.strip().replace("_", "-")
    if key not in PIPELINES:
        raise RecipeError(
            f"There is no pipeline '{name.strip()}'.",
            seen=name.strip(),
            expected=", ".join(PIPELINES),
            next_step=did_you_mean(key, PIPELINES),
        )
    return PIPELINES[key]


def _pruned(sparsity: float | None, pattern: Pattern | str) -> list[Pass]:
    pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
    if sparsity is None and pattern.fixed_sparsity is None and pattern.is_unstructured:
        return []
    return [MaskWeights(sparsity=sparsity, pattern=pattern), ApplyMasks()]


def _format(format: Format | str) -> Format:
    return Format.parse(format) if isinstance(format, str) else format
