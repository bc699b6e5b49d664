"""Pruning: deciding which weights are zero, and making them so."""

from sqcompile.passes.prune.apply_masks import ApplyMasks
from sqcompile.passes.prune.mask_weights import MaskWeights

__all__ = ["ApplyMasks", "MaskWeights"]
