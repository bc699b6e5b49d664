"""Removal is exact: the shrunk program computes what the model does with the removed parts zeroed."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.passes import zoo_program
from support.removal import TOLERANCE, distance, outputs, remove, zero_removed
from support.removal_models import REMOVAL_MODELS
from support.zoo import ZOO
from torch import nn

from sqcompile import Program
from sqcompile.channels import Groups, count_macs, find_groups
from sqcompile.channels.flow import flow_of
from sqcompile.passes import RemoveChannels
from sqcompile.tracing import trace

KINDS = {
    "cnn": ("channels",),
    "encoder": ("heads", "neurons"),
    "decoder": ("heads", "neurons"),
    "vision": ("heads", "neurons"),
    "audio": ("heads", "neurons", "channels"),
    "mlp": ("neurons",),
    "recurrent": ("neurons",),
}
EVERYTHING = ("channels", "neurons", "heads", "embedding")


@functools.cache
def traced(name: str) -> tuple[Program, Groups]:
    if name in ZOO:
        program = zoo_program(name)
    else:
        program = trace(REMOVAL_MODELS[name].make(), REMOVAL_MODELS[name].inputs(0))
    return program, find_groups(program)


def model_and_inputs(name: str) -> tuple[nn.Module, Any]:
    if name in ZOO:
        return ZOO[name].make(), ZOO[name].inputs(seed=3)
    return REMOVAL_MODELS[name].make(), REMOVAL_MODELS[name].inputs(3)


def required(name: str) -> tuple[str, ...]:
    if name == "convnext":  # its channels pass layer norms, which take statistics over them
        return ("neurons",)
    return KINDS[ZOO[name].family] if name in ZOO else REMOVAL_MODELS[name].kinds


@pytest.mark.parametrize("name", [*ZOO, *REMOVAL_MODELS])
def test_the_shrunk_program_equals_the_masked_model(name: str) -> None:
    program, groups = traced(name)
    model, inputs = model_and_inputs(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    dense = outputs(model, inputs)
    cases = [(EVERYTHING, 0.25), (EVERYTHING, 0.5), (EVERYTHING, 0.75), (("head-width",), 0.5)]
    lost: set[str] = set()
    for kinds, ratio in cases:
        shrunk, result = remove(RemoveChannels(ratio=ratio, kinds=kinds), program)
        kept = result.facts.get("kept", {})
        if not kept:
            assert result.changes == 0
            continue
        masked = outputs(zero_removed(model, groups, kept), inputs)
        assert distance(masked, outputs(shrunk, inputs)) < TOLERANCE, f"{kinds} at {ratio}"
        # Zeroing has an effect, so that equal outputs mean something.
        assert distance(dense, masked) > 100 * TOLERANCE
        macs = result.facts["macs"]
        assert count_macs(flow_of(shrunk)) == macs["after"] < macs["before"] == count_macs(groups.flow)
        lost |= {group.kind for group in groups if group.name in kept}
        model.load_state_dict(state)
    assert lost >= set(required(name)), f"only {lost} could be removed"


@pytest.mark.parametrize(
    "name", ["resnet_basic", "shufflenet_v2", "resnext", "lstm", "gpt2", "llama", "swin", "t5"]
)
def test_the_shrunk_program_trains_and_exports(name: str) -> None:
    program, _ = traced(name)
    _, (args, kwargs) = model_and_inputs(name)
    shrunk, _ = remove(RemoveChannels(ratio=0.5, kinds=EVERYTHING), program)
    flat = shrunk.signature.bind(args, kwargs)
    names = {key for key, _ in program.graph_module.named_parameters()}
    assert {key for key, _ in shrunk.graph_module.named_parameters()} == names
    loss = sum(value.square().mean() for value in shrunk.run(flat) if value.is_floating_point())
    assert isinstance(loss, torch.Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in shrunk.graph_module.parameters()]
    assert all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients)
    again = shrunk.to_exported_program().module()
    assert distance(outputs(shrunk, (args, kwargs)), outputs(again, (args, kwargs))) < TOLERANCE


@pytest.mark.parametrize("name", ["resnet_basic", "bert", "gpt2", "llama"])
def test_symbolic_dimensions_stay_symbolic(name: str) -> None:
    """Exact for other batches and lengths than those that it was traced with."""
    program, groups = traced(name)
    shrunk, result = remove(RemoveChannels(ratio=0.5, kinds=EVERYTHING), program)
    inputs = ZOO[name].inputs(seed=5, batch=3, sequence=7)
    masked = outputs(zero_removed(ZOO[name].make(), groups, result.facts["kept"]), inputs)
    assert distance(masked, outputs(shrunk, inputs)) < TOLERANCE
    assert [item.name for item in shrunk.signature.inputs] == [item.name for item in program.signature.inputs]
