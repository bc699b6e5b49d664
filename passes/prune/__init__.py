"""Pruning: deciding which weights are zero, and making them so; removing channels, heads and neurons."""

from sqcompile.passes.prune.apply_masks import ApplyMasks
from sqcompile.passes.prune.mask_weights import MaskWeights
from sqcompile.passes.prune.remove_channels import RemoveChannels

__all__ = ["ApplyMasks", "MaskWeights", "RemoveChannels"]
