"""Passes: one rewrite a file, grouped by job; `sqcompile passes` lists them.

Canonicalization brings a model into one form, pruning decides about zeros, quantization about codes,
training wins back what either cost.
`pipelines` holds whole jobs as plain lists of passes.
"""

from sqcompile.passes import pipelines
from sqcompile.passes.canonicalize import (
    CanonicalizeActivations,
    CanonicalizeLayers,
    FoldBatchNorm,
    FoldConstants,
    RemoveNoops,
)
from sqcompile.passes.prune import (
    ApplyMasks,
    MaskWeights,
    RemoveChannels,
    RemoveHeads,
    RemoveLayers,
    RemoveNeurons,
    SparseGPT,
    Wanda,
)
from sqcompile.passes.quantize import (
    AWQ,
    GPTQ,
    AdaRound,
    Calibrate,
    CorrectBias,
    EqualizeLayers,
    FoldQDQ,
    FreezeObservers,
    InsertObservers,
    MixedPrecision,
    QuantizeCache,
    QuantizeWeights,
    RelaxClamps,
    RotateWeights,
    SmoothQuant,
    SplitInputs,
)
from sqcompile.passes.train import (
    DistillBlocks,
    FineTune,
    PruneGradually,
    TrainAdapters,
    TrainQuantized,
    TrainSparse,
)

__all__ = [
    "AWQ",
    "GPTQ",
    "AdaRound",
    "ApplyMasks",
    "Calibrate",
    "CanonicalizeActivations",
    "CanonicalizeLayers",
    "CorrectBias",
    "DistillBlocks",
    "EqualizeLayers",
    "FineTune",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldQDQ",
    "FreezeObservers",
    "InsertObservers",
    "MaskWeights",
    "MixedPrecision",
    "PruneGradually",
    "QuantizeCache",
    "QuantizeWeights",
    "RelaxClamps",
    "RemoveChannels",
    "RemoveHeads",
    "RemoveLayers",
    "RemoveNeurons",
    "RemoveNoops",
    "RotateWeights",
    "SmoothQuant",
    "SparseGPT",
    "SplitInputs",
    "TrainAdapters",
    "TrainQuantized",
    "TrainSparse",
    "Wanda",
    "pipelines",
]
