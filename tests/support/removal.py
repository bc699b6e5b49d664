"""The exactness test of structured removal: the shrunk program against the model with the same parts zeroed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from sqcompile import Program
from sqcompile.channels import Groups
from sqcompile.pipeline import PassContext, PassResult, verify_program
from sqcompile.pipeline.contract import Pass

# Sums run over fewer terms, in another order; values are of order 1, and networks a few layers deep.
TOLERANCE = 2e-5


def remove(item: Pass, program: Program, context: PassContext | None = None) -> tuple[Program, PassResult]:
    """Run a pass on a copy of a program, and verify what comes out."""
    shrunk = program.snapshot()
    context = context or PassContext()
    context.origin = item.name
    result = item.run(shrunk, context)
    verify_program(shrunk)
    return shrunk, result


def zero_removed(model: nn.Module, groups: Groups, kept: Mapping[str, list[int]]) -> nn.Module:
    """Zero, in the model itself, every parameter's part that belongs to a removed unit.

    Nothing of the compiler's graph takes part in what the model computes then.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group in groups:
        if group.name not in kept:
            continue
        gone = np.setdiff1d(np.arange(len(group)), kept[group.name])
        for member in group.members:
            if member.tensor in parameters:
                places = torch.from_numpy(member.positions[np.isin(member.unit, gone)])
                parameters[member.tensor].data.index_fill_(member.axis, places, 0)
    return model


def outputs(call: Callable[..., Any], inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> list[torch.Tensor]:
    """Call a model or a program and return the tensors that it returns."""
    args, kwargs = inputs
    with torch.no_grad():
        leaves = pytree.tree_leaves(call(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def distance(reference: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Return the greatest difference, in units of each output's greatest magnitude."""
    assert [value.shape for value in reference] == [value.shape for value in other]
    return max(
        float((left - right).abs().max() / left.abs().max().clamp_min(1e-12))
        for left, right in zip(reference, other, strict=True)
    )
