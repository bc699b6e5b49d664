"""Canonicalization: one form for each computation, so that later passes need to know only that one."""

from sqcompile.passes.canonicalize.canonicalize_activations import CanonicalizeActivations
from sqcompile.passes.canonicalize.canonicalize_layers import CanonicalizeLayers
from sqcompile.passes.canonicalize.fold_batch_norm import FoldBatchNorm
from sqcompile.passes.canonicalize.fold_constants import FoldConstants
from sqcompile.passes.canonicalize.remove_noops import RemoveNoops

__all__ = ["CanonicalizeActivations", "CanonicalizeLayers", "FoldBatchNorm", "FoldConstants", "RemoveNoops"]
