"""Compressing a model part by part, so that memory holds one part of it at a time and work survives a crash.

A traced model is cut into parts, block by block (`parts`). Each gets its weights from the files of the
model (`weights`), is compressed by ordinary passes on data that went through the compressed parts before it
(`values`), and is kept in a folder (`work_dir`) from which a run that was cut off goes on (`driver`).
"""

from sqcompile.streaming.driver import Job, Streamed, compress_parts
from sqcompile.streaming.parts import Part, cut, join
from sqcompile.streaming.skeleton import weights_of
from sqcompile.streaming.weights import HeldWeights, StoredWeights, WeightSource

__all__ = [
    "HeldWeights",
    "Job",
    "Part",
    "StoredWeights",
    "Streamed",
    "WeightSource",
    "compress_parts",
    "cut",
    "join",
    "weights_of",
]
