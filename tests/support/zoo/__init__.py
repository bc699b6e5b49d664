"""Small random architectures: everything that the compiler must trace, compile and run alike."""

from __future__ import annotations

from .classic_cnns import CLASSIC_CNNS
from .mobile_cnns import MOBILE_CNNS
from .model import BATCH, SEQUENCE, Inputs, ZooModel
from .other_models import OTHER_MODELS
from .transformers_models import TRANSFORMERS_MODELS

ZOO: dict[str, ZooModel] = {
    model.name: model for model in (*CLASSIC_CNNS, *MOBILE_CNNS, *OTHER_MODELS, *TRANSFORMERS_MODELS)
}

__all__ = ["BATCH", "SEQUENCE", "ZOO", "Inputs", "ZooModel"]
