from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.passes import zoo_program
from support.quantize import DEQUANTIZE, QUANTIZE, calls, settled, values
from support.zoo import ZOO
from torch import nn

import sqcompile
from sqcompile import Level
from sqcompile.calibration import Calibration
from sqcompile.errors import PassOptionError, RecipeError
from sqcompile.layers import layers_of
from sqcompile.passes import CorrectBias, EqualizeLayers, FoldQDQ, MaskWeights, MixedPrecision, SparseGPT
from sqcompile.passes.pipelines import PIPELINES, find_pipeline, int8_dynamic, int8_static, llm, weight_only
from sqcompile.pipeline import PassContext, PassManager, parse_pipeline, pipeline_text
from sqcompile.pipeline.manager import check_order
from sqcompile.quantization import Format, Percentile
from sqcompile.quantization.format import PerTensor
from sqcompile.sparsity import Pattern

CANONICAL = "remove-noops,fold-constants,canonicalize-layers,fold-batch-norm,canonicalize-activations,"


def test_the_lists() -> None:
    assert pipeline_text(int8_static()) == (
        CANONICAL
        + "equalize-layers{by=values},insert-observers,calibrate,correct-bias,freeze-observers,fold-qdq"
    )
    assert (
        pipeline_text(int8_dynamic())
        == CANONICAL + "quantize-weights{activation=uint8:affine:dynamic},fold-qdq"
    )
    assert pipeline_text(weight_only()) == (
        CANONICAL
        + 'quantize-weights{weight=uint4:group=32:affine,formats={"kind:embedding":int8:channel=0:narrow,'
        '"kind:head":int8:channel=0:narrow}},fold-qdq'
    )


@pytest.mark.parametrize("name", PIPELINES)
def test_have_names_and_text(name: str) -> None:
    pipeline = find_pipeline(name)
    assert find_pipeline(name.replace("-", "_")) is pipeline
    assert parse_pipeline(name) == pipeline()
    assert parse_pipeline(pipeline_text(pipeline())) == pipeline()
    check_order(pipeline(sparsity=0.5, pattern="1x4"))


def test_take_options_as_text() -> None:
    assert parse_pipeline(
        "int8-static{sparsity=0.5,pattern=1x4,weight=int8,observer=percentile{percentile=99}}"
    ) == (
        int8_static(
            sparsity=0.5, pattern=Pattern(columns=4), weight="int8", observer=Percentile(percentile=99.0)
        )
    )
    with pytest.raises(PassOptionError, match="group-size"):
        parse_pipeline("weight-only{group-sizes=64}")


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"(?s)no pipeline 'int8-statik'.*did you mean 'int8-static'"):
        find_pipeline("int8-statik")


@pytest.mark.parametrize("name", PIPELINES)
def test_prune_first_if_asked_to(name: str) -> None:
    dense, sparse = find_pipeline(name)(), find_pipeline(name)(sparsity=0.5)
    prune: Any = next(item for item in sparse if item not in dense)
    assert isinstance(prune, SparseGPT if name == "llm" else MaskWeights) and prune.sparsity == 0.5
    assert len(sparse) == len(dense) + 2
    pattern = Pattern.parse("2:4")
    assert replace(prune, sparsity=None, pattern=pattern) in find_pipeline(name)(pattern="2:4")


def options_of(items: list[Any], kind: type[Any]) -> Any:
    (found,) = [item for item in items if isinstance(item, kind)]
    return found


def test_static_options() -> None:
    assert not any(isinstance(item, EqualizeLayers) for item in int8_static(equalize=False))
    assert not any(isinstance(item, CorrectBias) for item in int8_static(correct_bias=False))
    assert options_of(int8_static(weight="int8"), EqualizeLayers).by == "weights"
    observers = int8_static(
        activation="int8", observer="min-max", layers=("a",), exclude=("b",), formats=(("c", "float"),)
    )[6]
    assert str(observers) == (
        "insert-observers{activation=int8,observer=min-max,layers=[a],exclude=[b],formats={c:float}}"
    )


def test_dynamic_and_weight_only_options() -> None:
    assert str(int8_dynamic(activation="int8:token:dynamic", weight="int8", exclude=("b",))[5]) == (
        "quantize-weights{weight=int8,activation=int8:token:dynamic,exclude=[b]}"
    )
    item = weight_only(bits=3, group_size=64, symmetric=True, search="mse", embeddings="int8", layers=("a",))[
        5
    ]
    assert str(item) == (
        'quantize-weights{weight=int3:group=64,search=mse,layers=[a],formats={"kind:embedding":int8,"kind:head":int8}}'
    )
    assert isinstance(item.weight.granularity, PerTensor) is False  # type: ignore[attr-defined]


def test_the_formats_option_counts_more_than_the_embeddings_option() -> None:
    program = zoo_program("llama").snapshot()
    PassManager(weight_only(formats=(("kind:head", Format.parse("int4:group=16")),))).run(
        program, PassContext()
    )
    (head,) = [layer for layer in layers_of(program) if layer.name == "lm_head"]
    assert head.weight_value.args[6] == 7


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        *((name, "int8-static") for name, model in ZOO.items() if model.family == "cnn"),
        *((name, "int8-static") for name in ("mlp_mixer", "gru", "llama", "bert", "vit")),
        *((name, "int8-dynamic") for name, model in ZOO.items() if model.family != "cnn"),
        *(
            (name, "weight-only")
            for name in ("resnet_basic", "mobilenet_v1", "unet", "lstm", "gpt2", "gemma", "bert")
        ),
    ],
)
def test_quantize_every_architecture(name: str, pipeline: str) -> None:
    """All layers, close numbers, and a second folding that finds nothing left."""
    model, program = ZOO[name], zoo_program(name).snapshot()
    batches = [model.inputs(seed=seed) for seed in range(2)]
    context = PassContext(calibration=Calibration(batches, program.signature))
    args, kwargs = sqcompile.tracing.export.normalize_inputs(batches[0])
    check = program.signature.bind(args, kwargs)
    records = PassManager(find_pipeline(pipeline)(), check_batches=[check]).run(program, context)
    assert program.level is Level.QDQ
    layers = layers_of(program)
    assert layers and all(layer.weight_value.target is DEQUANTIZE for layer in layers)
    distance = records[-1].distance
    # Random weights have no outliers: 8 bits are 26 dB and more, 4 bits 10 and more, on every one of them.
    assert distance is not None and distance.sqnr_db > (10 if pipeline == "weight-only" else 26)
    (again,) = PassManager([FoldQDQ()]).run(program, context)
    assert again.changes == 0
    if pipeline == "int8-static" and model.family == "cnn":
        data = [layer.data for layer in layers if layer.data is not None]
        assert all(value.target is DEQUANTIZE for value in data)
    if pipeline == "weight-only":
        assert not calls(program, QUANTIZE)


def test_compile_takes_a_pipeline_by_name() -> None:
    x = values(8, 6)
    model = settled(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    compiled = sqcompile.compile(
        model, passes="int8-static{sparsity=0.5}", calibration=[x], backend="reference"
    )
    assert isinstance(compiled, sqcompile.Compiled)
    with torch.no_grad():
        assert compiled(x).shape == model(x).shape
    assert {str(promise) for promise in compiled.program.sparsity.values()} == {"unstructured, 50.0 % zeros"}


def test_llm() -> None:
    eight = '{"kind:embedding":int8:channel=0:narrow,"kind:head":int8:channel=0:narrow}'
    assert pipeline_text(llm()) == f"{CANONICAL}gptq{{formats={eight}}},fold-qdq"
    assert pipeline_text(llm(bits=3, sparsity=0.5)) == (
        f"{CANONICAL}sparse-gpt{{sparsity=0.5,refit=true,exclude=[kind:head]}},apply-masks,"
        f"gptq{{weight=uint3:group=32:affine,formats={eight}}},fold-qdq"
    )


@pytest.mark.parametrize(
    ("budget", "option"),
    [
        ("3.5 bits", {"bits": 3.5}),
        ("1bit", {"bits": 1.0}),
        ("700 MB", {"megabytes": 700.0}),
        ("1.5GB", {"megabytes": 1500.0}),
        ("40 tokens/s", {"milliseconds": 25.0}),
        ("2 %", {"increase": 0.02}),
    ],
)
def test_llm_takes_a_budget(budget: str, option: dict[str, float]) -> None:
    item = llm(budget=budget, sparsity=0.5)[-2]
    assert isinstance(item, MixedPrecision)
    assert {name: getattr(item, name) for name in ("bits", "megabytes", "milliseconds", "increase")} == {
        "bits": None,
        "megabytes": None,
        "milliseconds": None,
        "increase": None,
        **option,
    }
    assert [str(candidate) for candidate in item.candidates if candidate.prunes] == [
        f"uint{bits}:group=32:affine+50%" for bits in (3, 4, 8)
    ]
    assert item.quantize == llm()[-2] and item.prune == llm(sparsity=0.5)[-4]


@pytest.mark.parametrize("budget", ["3.5", "much", "0 bits", "1.2.3 bits", "-3 MB", ""])
def test_a_budget_that_cannot_be_read(budget: str) -> None:
    with pytest.raises(RecipeError, match="is no budget"):
        llm(budget=budget)


def test_bits_and_a_budget() -> None:
    with pytest.raises(RecipeError, match="contradict"):
        llm(bits=4, budget="3.5 bits")
