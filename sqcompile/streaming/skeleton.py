"""A model of transformers without its weights: enough to trace it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sqcompile.errors import FileError
from sqcompile.program import Program
from sqcompile.streaming.weights import HeldWeights, StoredWeights, WeightSource


def build_skeleton(kind: type[Any], path: Path) -> nn.Module:
    """Return the model of a folder with weights that were never written to, and so take no memory.

    What the model computes itself, such as tables of positions, is there: those are made as the model's own
    code does, which a model on the meta device could not.

    Args:
        kind: The class of the model, of transformers.
        path: Its folder.

    Raises:
        FileError: If the configuration is not one of this class.
    """
    from transformers.initialization import no_init_weights

    try:
        config = kind.config_class.from_pretrained(path)
        with no_init_weights(), torch.no_grad():
            model = kind(config)
        model.tie_weights()
    except Exception as error:  # of transformers, and whatever configurations hold
        raise FileError(
            f"The model in '{path}' cannot be built.",
            where=str(path),
            seen=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
            expected="config.json as save_pretrained writes it",
            next_step="check that the folder is complete",
        ) from error
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    assert isinstance(model, nn.Module)
    return model.eval()


def weights_of(source: Any, model: Any, program: Program) -> WeightSource:
    """Return the weights of a model: those in the files of a folder, or those that it holds.

    Args:
        source: What `compile` was given as the model.
        model: What it was loaded as; of a folder its skeleton.
        program: The program that was traced from it.

    Raises:
        FileError: If the files of the folder lack some.
    """
    if not isinstance(source, (str, Path)) or not Path(source).is_dir():
        return HeldWeights(program)
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    others = {name: alike for alike in names.values() for name in alike}
    prefix = getattr(model, "base_model_prefix", "")
    return StoredWeights(
        Path(source),
        program,
        computed={name for name, _ in program.tensors()} - set(others),
        others=others,
        prefix=prefix if isinstance(prefix, str) else "",
    )
