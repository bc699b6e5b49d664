"""Named pipelines: whole jobs as plain lists of passes, with the reason for each order.

    sqcompile.compile(model, passes=int8_static(), calibration=batches)
    sqcompile compile model.pt2 -p "int8-static{sparsity=0.5}" …

A pipeline is a starting point: being a list, it can be cut, extended and reordered.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sqcompile.errors import RecipeError, did_you_mean
from sqcompile.mixed_precision import Candidate
from sqcompile.passes.canonicalize import (
    CanonicalizeActivations,
    CanonicalizeLayers,
    FoldBatchNorm,
    FoldConstants,
    RemoveNoops,
)
from sqcompile.passes.prune import ApplyMasks, MaskWeights, SparseGPT
from sqcompile.passes.quantize import (
    GPTQ,
    Calibrate,
    CorrectBias,
    EqualizeLayers,
    FoldQDQ,
    FreezeObservers,
    InsertObservers,
    MixedPrecision,
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


def llm(
    *,
    bits: int | None = None,
    budget: str | None = None,
    sparsity: float | None = None,
    pattern: Pattern | str = UNSTRUCTURED,
    group_size: int = 32,
    embeddings: Format | str = INT8_WEIGHT,
    exclude: tuple[str, ...] = (),
) -> list[Pass]:
    """Compress a language model with calibration data, so that it keeps what it says: the default for quality.

    Weights are rounded by GPTQ against the dense model's outputs, and pruned before by SparseGPT with an exact
    refit. With a budget each layer gets the bits, and the density if a sparsity is given too, that it needs.
    Embeddings and the layers that make the outputs get 8 bits, and are not pruned.

    Args:
        bits: Bits a weight; 4 if there is no budget either.
        budget: Instead: `3.5 bits` a weight on average, scales included, or `700 MB`, both of all layers but
            those; `40 tokens/s`, by the kernel times of the native engine for these layers alone; or `2 %`, the
            rise of the perplexity that is predicted.
        sparsity: Fraction of each weight to prune, or None; with a budget, of the layers that can bear it.
        pattern: Sparse pattern: `unstructured`, `2:4`, `1x4`, …
        group_size: Weights that share a scale.
        embeddings: Format of embeddings and output layers.
        exclude: Patterns of layers to leave in floating point.

    Raises:
        RecipeError: If both bits and a budget are given, or the budget cannot be read.
    """
    if bits is not None and budget is not None:
        raise RecipeError(
            "Bits and a budget contradict each other.",
            where="pipeline llm",
            seen=f"bits={bits}, budget={budget!r}",
            expected="one of both",
            next_step="leave one out",
        )

    def grouped(bits: int) -> Format:
        return Format(bits=bits, signed=False, symmetric=False, granularity=PerGroup(group_size))

    pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
    eight = _format(embeddings)
    left: tuple[Override, ...] = tuple((name, "float") for name in exclude)
    quantize = GPTQ(
        weight=grouped(bits or 4),
        formats=(("kind:embedding", eight), ("kind:head", eight), *left),
    )
    prunes = sparsity is not None or pattern.fixed_sparsity is not None
    prune = None
    if prunes:
        prune = SparseGPT(sparsity=sparsity, pattern=pattern, refit=True, exclude=("kind:head", *exclude))
    if budget is None:
        return [*canonical(), *([prune, ApplyMasks()] if prune else []), quantize, FoldQDQ()]
    formats = [Candidate(grouped(bits)) for bits in (2, 3, 4, 8)]
    if prune is not None:
        share = pattern.fixed_sparsity if sparsity is None else sparsity
        formats += [Candidate(grouped(bits), share or 0.0, pattern) for bits in (3, 4, 8)]
    mixed = MixedPrecision(
        quantize=quantize,
        prune=prune,
        candidates=tuple(formats),
        exclude=("kind:head", *exclude),
        **_read_budget(budget),
    )
    return [*canonical(), mixed, FoldQDQ()]


Pipeline = Callable[..., list[Pass]]
"""A function whose keyword arguments are options, and which returns passes in order."""

PIPELINES: dict[str, Pipeline] = {
    "int8-static": int8_static,
    "int8-dynamic": int8_dynamic,
    "weight-only": weight_only,
    "llm": llm,
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


def _read_budget(text: str) -> dict[str, Any]:
    """Return the option of `MixedPrecision` that a budget such as `3.5 bits`, `700 MB` or `2 %` stands for."""
    match = re.fullmatch(r"\s*([\d.]+)\s*(bits?|MB|GB|tokens/s|%)\s*", text)
    number = float(match[1]) if match is not None and re.fullmatch(r"\d+(\.\d*)?|\.\d+", match[1]) else 0.0
    if match is None or number <= 0:
        raise RecipeError(
            f"'{text}' is no budget.",
            where="pipeline llm",
            seen=text,
            expected="'3.5 bits' (a weight), '700 MB' or '1.5 GB' (of weights), '40 tokens/s', or '2 %' (rise of the "
            "perplexity)",
            next_step="write one of these",
        )
    if match[2] == "%":
        return {"increase": number / 100}
    if match[2] == "tokens/s":
        return {"milliseconds": 1000 / number}
    if match[2] in ("MB", "GB"):
        return {"megabytes": number * (1000 if match[2] == "GB" else 1)}
    return {"bits": number}


def _pruned(sparsity: float | None, pattern: Pattern | str) -> list[Pass]:
    pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
    if sparsity is None and pattern.fixed_sparsity is None and pattern.is_unstructured:
        return []
    return [MaskWeights(sparsity=sparsity, pattern=pattern), ApplyMasks()]


def _format(format: Format | str) -> Format:
    return Format.parse(format) if isinstance(format, str) else format
