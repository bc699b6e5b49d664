"""Passes that turn floating-point programs into integer ones."""

from sqcompile.passes.quantize.ada_round import AdaRound
from sqcompile.passes.quantize.awq import AWQ
from sqcompile.passes.quantize.calibrate import Calibrate
from sqcompile.passes.quantize.correct_bias import CorrectBias
from sqcompile.passes.quantize.equalize_layers import EqualizeLayers
from sqcompile.passes.quantize.fold_qdq import FoldQDQ
from sqcompile.passes.quantize.freeze_observers import FreezeObservers
from sqcompile.passes.quantize.gptq import GPTQ
from sqcompile.passes.quantize.insert_observers import InsertObservers
from sqcompile.passes.quantize.mixed_precision import MixedPrecision
from sqcompile.passes.quantize.quantize_cache import QuantizeCache
from sqcompile.passes.quantize.quantize_weights import QuantizeWeights
from sqcompile.passes.quantize.relax_clamps import RelaxClamps
from sqcompile.passes.quantize.rotate_weights import RotateWeights
from sqcompile.passes.quantize.smooth_quant import SmoothQuant
from sqcompile.passes.quantize.split_inputs import SplitInputs

__all__ = [
    "AWQ",
    "GPTQ",
    "AdaRound",
    "Calibrate",
    "CorrectBias",
    "EqualizeLayers",
    "FoldQDQ",
    "FreezeObservers",
    "InsertObservers",
    "MixedPrecision",
    "QuantizeCache",
    "QuantizeWeights",
    "RelaxClamps",
    "RotateWeights",
    "SmoothQuant",
    "SplitInputs",
]
