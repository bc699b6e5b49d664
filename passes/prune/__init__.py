"""Pruning: deciding which weights are zero, and making them so; removing channels, heads and neurons."""

from sqcompile.passes.prune.apply_masks import ApplyMasks
from sqcompile.passes.prune.mask_weights import MaskWeights
from sqcompile.passes.prune.remove_channels import RemoveChannels
from sqcompile.passes.prune.remove_heads import RemoveHeads
from sqcompile.passes.prune.remove_layers import RemoveLayers
from sqcompile.passes.prune.remove_neurons import RemoveNeurons
from sqcompile.passes.prune.sparse_gpt import SparseGPT
from sqcompile.passes.prune.wanda import Wanda

__all__ = [
    "ApplyMasks",
    "MaskWeights",
    "RemoveChannels",
    "RemoveHeads",
    "RemoveLayers",
    "RemoveNeurons",
    "SparseGPT",
    "Wanda",
]
