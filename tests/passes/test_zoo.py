"""Each float pass alone, and all in the order of the pipelines, on every CNN of the zoo: numbers hold."""

from __future__ import annotations

import functools

import pytest
from support.passes import CNNS, zoo_program
from support.zoo import ZOO

from sqcompile import Program
from sqcompile.layers import layers_of
from sqcompile.passes import (
    ApplyMasks,
    CanonicalizeActivations,
    CanonicalizeLayers,
    FoldBatchNorm,
    FoldConstants,
    RemoveNoops,
)
from sqcompile.pipeline import Pass, PassContext, PassManager, PassRecord, parse_pass
from sqcompile.testing import check_pass

CANONICALIZE: list[Pass] = [
    FoldConstants(),
    RemoveNoops(),
    CanonicalizeLayers(),
    CanonicalizeActivations(),
    FoldBatchNorm(),
]


@pytest.mark.parametrize("name", CNNS)
@pytest.mark.parametrize("item", CANONICALIZE, ids=str)
def test_each_pass_keeps_what_it_promises(name: str, item: Pass) -> None:
    check_pass(item, zoo_program(name), ZOO[name].inputs())


@functools.cache
def canonical(name: str) -> tuple[Program, PassRecord]:
    program = zoo_program(name).snapshot()
    batch = program.signature.bind(*ZOO[name].inputs())
    *_, record = PassManager(CANONICALIZE, check_batches=[batch]).run(program, PassContext())
    return program, record


@pytest.mark.parametrize("name", [*CNNS, "mlp_mixer", "gpt2", "llama", "bert", "vit", "lstm"])
def test_all_together_leave_no_batch_norm_and_no_dropout(name: str) -> None:
    program, record = canonical(name)
    before = [str(node.target) for node in zoo_program(name).compute_nodes()]
    after = [str(node.target) for node in program.compute_nodes()]
    assert record.distance is not None and record.distance.sqnr_db > 90  # float32 rounding: 1e-6 of the peak
    assert len(after) <= len(before)
    assert "aten.dropout.default" not in after and "aten.addmm.default" not in after
    if name != "densenet":  # its batch norms stand between a concatenation and an activation
        assert "aten.batch_norm.default" not in after


@pytest.mark.parametrize("name", ["resnet_basic", "mobilenet_v2", "shufflenet_v2", "unet"])
@pytest.mark.parametrize(
    "item", ["sparsity=0.5", "sparsity=0.5,scope=global", "pattern=2:4", "pattern=1x4,sparsity=0.5"]
)
def test_masks_promise_zeros_that_stay(name: str, item: str) -> None:
    program = canonical(name)[0].snapshot()
    batch = program.signature.bind(*ZOO[name].inputs())
    masking = parse_pass(f"mask-weights{{{item}}}")
    masked, applied = PassManager([masking, ApplyMasks()], check_batches=[batch]).run(program, PassContext())
    layers = {layer.name: layer for layer in layers_of(program)}
    assert set(masked.facts["sparsity"]) <= set(layers) and len(masked.facts["sparsity"]) > 2
    for layer, sparsity in masked.facts["sparsity"].items():
        weight = program.tensor(layers[layer].weight)
        assert 1 - weight.count_nonzero() / weight.numel() == pytest.approx(sparsity)
        if "global" not in item:
            assert sparsity == pytest.approx(0.5, abs=0.04)  # the smallest layer has 27 weights
    assert applied.distance == masked.distance
