"""Folders of Hugging Face with quantized weights, as compressed-tensors writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.removal import distance, outputs
from support.zoo import ZOO

import sqcompile
from sqcompile.errors import PretrainedError
from sqcompile.packed_weights import pack
from sqcompile.passes import QuantizeWeights, pipelines
from sqcompile.quantization import Format

helpers = pytest.importorskip(
    "compressed_tensors.compressors.pack_quantized.helpers", reason="compressed-tensors is not installed"
)
EIGHT = "int8:channel=0:narrow"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(3, 64), (5, 7), (1, 1)])
def test_packs_as_the_peer_does(bits: int, shape: tuple[int, int]) -> None:
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    assert torch.equal(pack(codes, bits), helpers.pack_to_int32(codes, bits))


def compiled(name: str, passes: list[Any]) -> sqcompile.Compiled:
    model, inputs = ZOO[name].make(), ZOO[name].inputs()
    result = sqcompile.compile(model, passes, inputs, backend="reference", verify="ends")
    assert isinstance(result, sqcompile.Compiled)
    return result


def quantized(weight: str, **options: Any) -> list[Any]:
    return [*pipelines.canonical(), QuantizeWeights(weight=Format.parse(weight), **options)]


@pytest.mark.parametrize(
    ("name", "passes", "groups"),
    [
        ("llama", quantized("uint4:group=16:affine", kinds=("linear",)), [(4, "group", 16, False)]),
        ("llama", quantized("uint2:group=16:affine", kinds=("linear",)), [(2, "group", 16, False)]),
        (
            "llama",
            quantized("int4:group=32", formats=(("kind:head", Format.parse(EIGHT)),)),
            [(4, "group", 32, True), (8, "channel", None, True)],
        ),
        ("mistral", quantized("int8:channel=0", kinds=("linear",)), [(8, "channel", None, True)]),
        ("phi3", quantized("uint8:channel=0:affine", kinds=("linear",)), [(8, "channel", None, False)]),
    ],
    ids=["4-affine", "2-affine", "4-and-8", "8-channel", "8-affine"],
)
def test_transformers_reads_what_the_program_computes(
    name: str, passes: list[Any], groups: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    import transformers
    from safetensors.torch import load_file

    result = compiled(name, passes)
    result.save_pretrained(tmp_path / "folder")  # compares outputs itself; here it is done as a user would
    config = json.loads((tmp_path / "folder/config.json").read_text())
    said = [
        (item["num_bits"], item["strategy"], item["group_size"], item["symmetric"])
        for item in (group["weights"] for group in config["quantization_config"]["config_groups"].values())
    ]
    assert said == groups
    stored = load_file(tmp_path / "folder/model.safetensors")
    packed = stored["model.layers.0.mlp.down_proj.weight_packed"]
    assert packed.dtype == torch.int32 and "model.layers.0.mlp.down_proj.weight" not in stored
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32).eval()
    model.config.use_cache = False
    inputs = ZOO[name].inputs()
    assert distance(outputs(result, inputs), outputs(model, inputs)) < 1e-4


def test_tied_and_embedded_weights_stay_float(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    result = compiled("qwen2", pipelines.weight_only(group_size=16))
    result.save_pretrained(tmp_path / "folder")
    stored = load_file(tmp_path / "folder/model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.float32
    # What the codes stand for, and not what was there before.
    assert stored["model.embed_tokens.weight"].unique(dim=1).numel() <= 64 * 255
    assert not any(name.startswith("lm_head.weight_") for name in stored)


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        (quantized("uint3:group=16:affine"), "3 bits"),
        (quantized("int4:group=16:mapping=nf"), "a table of values"),
        (quantized("int8"), "one scale for the whole weight"),
        (quantized("uint4:group=20:affine"), "the last of which is shorter"),
        (pipelines.int8_dynamic(), "this program quantizes data as well"),
        (quantized("int8:channel=0", kinds=("embedding",)), "quantize all layers that share it"),
    ],
    ids=["bits", "table", "tensor", "group", "data", "tied"],
)
def test_says_what_the_convention_lacks(passes: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(PretrainedError) as caught:
        compiled("qwen2", passes).save_pretrained(tmp_path / "folder")
    assert said in str(caught.value) and caught.value.next_step
    assert not (tmp_path / "folder").exists()


def test_says_what_reads_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PretrainedError, match="compressed-tensors package"):
        compiled("llama", quantized("int8:channel=0")).save_pretrained(tmp_path / "folder")
