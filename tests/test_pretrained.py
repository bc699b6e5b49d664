"""Folders of Hugging Face that models come back to after they lost parts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.programs import Mlp, data, seeded
from support.removal import TOLERANCE, distance, outputs
from support.zoo import ZOO
from torch import nn

import sqcompile
from sqcompile.errors import PretrainedError
from sqcompile.passes import (
    MaskWeights,
    RemoveChannels,
    RemoveHeads,
    RemoveLayers,
    RemoveNeurons,
    RotateWeights,
    pipelines,
)

HALF = [RemoveLayers(ratio=0.5, importance="last"), RemoveHeads(ratio=0.5), RemoveNeurons(ratio=0.25)]


def compiled(model: nn.Module, passes: list[Any], inputs: Any) -> sqcompile.Compiled:
    result = sqcompile.compile(model, passes, inputs, backend="reference", verify="ends")
    assert isinstance(result, sqcompile.Compiled)
    return result


def read(name: str, folder: Path) -> Any:
    """Read a folder as its users do, with nothing of ours."""
    import transformers

    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, loaded = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not loaded["missing_keys"]
    model.config.use_cache = False
    return model.eval()


@pytest.mark.parametrize(
    ("name", "passes", "numbers"),
    [
        (
            "llama",
            HALF,
            {
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "intermediate_size": 48,
            },
        ),
        # The class takes a width of heads only where the configuration says one.
        ("qwen2", HALF, {"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8, "layer_types": 1}),
        ("phi3", [RemoveNeurons(ratio=0.5)], {"intermediate_size": 32}),  # gate and value in one weight
        (
            "gpt2",
            [RemoveNeurons(ratio=0.5), HALF[0]],
            {"n_inner": 64, "n_layer": 1},
        ),  # the class's default: None
        ("bert", [RemoveNeurons(ratio=0.5, exclude=("*pooler*",))], {"intermediate_size": 32}),
        ("t5_encoder", [RemoveHeads(ratio=0.5), RemoveNeurons(ratio=0.25)], {"num_heads": 2, "d_ff": 48}),
        ("vit", HALF, {"num_hidden_layers": 1, "intermediate_size": 48}),
    ],
    ids=["llama", "qwen2", "phi3", "gpt2", "bert", "t5_encoder", "vit"],
)
def test_the_class_makes_the_smaller_model(
    name: str, passes: list[Any], numbers: dict[str, int], tmp_path: Path
) -> None:
    model, inputs = ZOO[name].make(), ZOO[name].inputs()
    before = model.config.to_dict()
    result = compiled(model, passes, inputs)
    files = result.save_pretrained(tmp_path / "small")
    assert {file.name for file in files} >= {"config.json", "model.safetensors"}
    loaded = read(name, tmp_path / "small")
    small = sum(parameter.numel() for parameter in loaded.parameters())
    assert small < sum(parameter.numel() for parameter in model.parameters())
    config = loaded.config.to_dict()
    found = {key: len(config[key]) if isinstance(config[key], list) else config[key] for key in numbers}
    assert found == numbers
    assert distance(outputs(result.program, inputs), outputs(loaded, inputs)) < TOLERANCE
    assert model.config.to_dict() == before


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_rotated_model_is_one_of_its_class(name: str, tmp_path: Path) -> None:
    """The head of qwen2 is tied to its embedding, and is not any more once the norm before it is folded."""
    inputs = ZOO[name].inputs()
    result = compiled(ZOO[name].make(), [*pipelines.canonical(), RotateWeights()], inputs)
    assert result.report.passes[-1].facts == {"residual": 1, "values": 2}
    result.save_pretrained(tmp_path / "rotated")
    loaded = read(name, tmp_path / "rotated")
    assert loaded.config.tie_word_embeddings is False
    assert distance(outputs(result.program, inputs), outputs(loaded, inputs)) < TOLERANCE
    assert distance(outputs(result.original, inputs), outputs(loaded, inputs)) < 10 * TOLERANCE


def test_a_folder_keeps_its_tokenizer_and_compiles_again(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "examples" / "pycode_llama_5m"
    inputs = {"input_ids": torch.arange(16).reshape(1, 16)}
    result = sqcompile.compile(source, HALF, inputs, backend="reference", verify="off")
    result.save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "small" / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 32)
    assert config["use_cache"] is True  # as in the source: only tracing goes without
    again = sqcompile.compile(tmp_path / "small", [], inputs, backend="reference", verify="off")
    assert distance(outputs(result, ((), inputs)), outputs(again, ((), inputs))) < TOLERANCE


def refused(model: nn.Module, passes: list[Any], inputs: Any, path: Path) -> PretrainedError:
    result = compiled(model, passes, inputs)
    with pytest.raises(PretrainedError) as caught:
        result.save_pretrained(path)
    assert not path.exists()
    assert all(getattr(caught.value, part) for part in ("what", "where", "seen", "expected", "next_step"))
    return caught.value


@pytest.mark.parametrize(
    ("name", "passes", "said"),
    [
        (
            "llama",
            [RemoveNeurons(ratio=0.5, layers=("model.layers.1",))],
            r"have not lost alike.*@model\.layers\.[01]\.mlp\.\w+\.weight dimension 0.*32 in .* 64 in ",
        ),
        (
            "bert",
            [RemoveHeads(ratio=0.5)],
            r"@bert\.encoder\.layer\.0\.attention\.self\.query\.weight.*\[16, 32\]",
        ),
        ("bert", [HALF[0]], r"Only a part of 'bert\.encoder\.layer\.0' is gone.*LayerNorm"),
        (
            "llama",
            [RemoveChannels(ratio=0.25, kinds=("embedding",))],
            r"does not compute with these weights what the program does.*output 0 differs",
        ),
        ("llama", [MaskWeights(sparsity=0.5)], r"node %.*masks.*apply-masks"),
    ],
    ids=["widths", "heads", "norms", "statistics", "masks"],
)
def test_says_what_its_class_cannot_hold(name: str, passes: list[Any], said: str, tmp_path: Path) -> None:
    error = refused(ZOO[name].make(), passes, ZOO[name].inputs(), tmp_path / "small")
    assert re.search(said, str(error).replace("\n", " "))


def test_other_models_have_no_such_folder(tmp_path: Path) -> None:
    error = refused(seeded(Mlp), [RemoveNeurons(ratio=0.5)], data(2, 8), tmp_path / "small")
    assert "Only models of transformers" in str(error) and "Mlp" in str(error.seen)
