"""Training: winning back what compression cost, with the user's own training function."""

from sqcompile.passes.train.distill_blocks import DistillBlocks
from sqcompile.passes.train.fine_tune import FineTune
from sqcompile.passes.train.prune_gradually import PruneGradually
from sqcompile.passes.train.train_adapters import TrainAdapters
from sqcompile.passes.train.train_quantized import TrainQuantized
from sqcompile.passes.train.train_sparse import TrainSparse

__all__ = ["DistillBlocks", "FineTune", "PruneGradually", "TrainAdapters", "TrainQuantized", "TrainSparse"]
