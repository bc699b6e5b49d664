"""Writing a language model as a GGUF file, which llama.cpp and its relatives read.

Weights of 4 and 8 bits keep their codes: Q4_0 (symmetric), Q4_1 (affine) and Q8_0 have a scale for 32 inputs, to
which coarser scales are repeated. Scales are rounded to float16, as the formats have them; everything else is float32.
Token ids go in and out: the tokenizer stays beside the file.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and the blocks of ggml-common.h.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sqcompile.errors import PretrainedError
from sqcompile.files import atomic_file
from sqcompile.levels import Level
from sqcompile.packed_weights import PackedWeight, unpacked
from sqcompile.pretrained import Pretrained, require_applied
from sqcompile.program import Program

_BLOCK = 32
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Kinds of configurations -> the architecture's name, and whether it wants the halves of a rotated pair side by side.
_ARCHITECTURES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False)}


def save_gguf(program: Program, pretrained: Pretrained, path: Path) -> list[Path]:
    """Write a language model as a GGUF file.

    Args:
        program: The program, without masks; float, or with quantized weights.
        pretrained: What it was traced from; its parts have to be all there.
        path: The file.

    Raises:
        PretrainedError: If llama.cpp has no such architecture, or GGUF not a weight's format; the text says which.
        FileError: If it cannot be written.
    """
    gguf = _package()
    require_applied(program)
    architecture, side_by_side = _architecture(pretrained.config)
    plain, packed = (program, []) if program.level is Level.ATEN else unpacked(program, pretrained.state)
    codes = {weight.name: weight for weight in packed}
    tensors = {name: tensor.detach() for name, tensor in plain.tensors() if name in pretrained.state}
    _require_whole(pretrained, tensors)
    tied = _same(pretrained.state.get(_HEAD), pretrained.state.get(_EMBEDDING))
    if tied and _HEAD in tensors and _EMBEDDING not in tensors:
        # The reader takes the embeddings where there is no head.
        tensors[_EMBEDDING] = tensors.pop(_HEAD)
        codes |= {_EMBEDDING: codes.pop(_HEAD)} if _HEAD in codes else {}
    (kind_of_model,) = (kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind_of_model, pretrained.config.num_hidden_layers)
    with atomic_file(path) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        _describe(writer, pretrained.config)
        for name, tensor in tensors.items():
            stem, _, kind = name.rpartition(".")
            target = names.get_name(stem)
            if target is None:
                raise _unknown(f"tensor @{name}", name)
            order = _row_order(pretrained.config, name, len(tensor)) if side_by_side else None
            if name in codes:
                data, type_ = _blocks(codes[name], order)
                writer.add_tensor(f"{target}.{kind}", data, raw_dtype=gguf.GGMLQuantizationType[type_])
            else:
                rows = tensor if order is None else tensor[order]
                writer.add_tensor(f"{target}.{kind}", rows.float().contiguous().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return [path]


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise PretrainedError(
            "GGUF files are written by the gguf package, and it is not installed.",
            where="save",
            seen=str(error),
            next_step="pip install gguf",
        ) from error
    return gguf


def _architecture(config: Any) -> tuple[str, bool]:
    kind = getattr(config, "model_type", type(config).__name__)
    scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in _ARCHITECTURES:
        raise _unknown("the model's configuration", kind)
    if scaling != "default":
        raise _unknown("the model's configuration", f"rotary positions of type {scaling}")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise _unknown("the model's configuration", f"the activation {config.hidden_act}")
    return _ARCHITECTURES[kind]


def _unknown(where: str, seen: str) -> PretrainedError:
    return PretrainedError(
        "A GGUF file cannot hold this model.",
        where=where,
        seen=seen,
        expected=f"a causal language model of the kind {', '.join(_ARCHITECTURES)}, as transformers makes it",
        next_step="save a .sqm or .onnx file",
    )


def _require_whole(pretrained: Pretrained, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != pretrained.state[name].shape:
            raise PretrainedError(
                "A GGUF file is written of models that kept their sizes.",
                where=f"tensor @{name}",
                seen=list(tensor.shape),
                expected=list(pretrained.state[name].shape),
                next_step="write the smaller model with save_pretrained, and compile that folder",
            )
    there = {tensor.data_ptr() for name, tensor in pretrained.state.items() if name in tensors}
    for name, tensor in pretrained.state.items():
        if name not in tensors and tensor.data_ptr() not in there and name.endswith(("weight", "bias")):
            raise PretrainedError(
                "A GGUF file needs every tensor of the model, and the program has not all.",
                where=f"tensor @{name}",
                seen="a program without it",
                expected="the tensors of the class, under its names",
                next_step="leave out passes that fold or replace tensors; or save a .sqm or .onnx file",
            )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.data_ptr() == other.data_ptr()


def _describe(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(_rope_base(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _rope_base(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta", getattr(config, "rope_theta", 10000.0)))


def _row_order(config: Any, name: str, rows: int) -> Tensor | None:
    """Return the order of a query's or key's rows in which the two halves of each head alternate."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((count for part, count in heads.items() if f".{part}." in name), None)
    if count is None:
        return None
    return torch.arange(rows).reshape(count, 2, -1).transpose(1, 2).reshape(-1)


def _blocks(weight: PackedWeight, order: Tensor | None) -> tuple[NDArray[np.uint8], str]:
    """Return the blocks of a weight, uint8 [O, bytes], and the name of their type."""
    codes, scale, points = weight.codes, weight.scale, weight.zero_point
    if order is not None:
        codes, scale = codes[order], scale[order]
        points = None if points is None else points[order]
    rows, depth = codes.shape
    _check_blocks(weight, depth)
    repeat = (depth if weight.group_size is None else weight.group_size) // _BLOCK
    steps = scale.float().repeat_interleave(repeat, 1).numpy().reshape(-1, 1)
    q = codes.numpy().reshape(-1, _BLOCK)
    if weight.bits == 8:
        return np.hstack([_half(steps, weight), q.view(np.uint8)]).reshape(rows, -1), "Q8_0"
    nibbles: NDArray[np.uint8] = (q + 8).astype(np.uint8)
    # The lower halves of the bytes are the first 16 codes, the higher the last.
    packed = nibbles[:, :16] | np.left_shift(nibbles[:, 16:], 4, dtype=np.uint8)
    if points is None:
        return np.hstack([_half(steps, weight), packed]).reshape(rows, -1), "Q4_0"
    shifts = points.repeat_interleave(repeat, 1).numpy().reshape(-1, 1)
    least = steps * (-8 - shifts).astype(np.float32)
    return np.hstack([_half(steps, weight), _half(least, weight), packed]).reshape(rows, -1), "Q4_1"


def _check_blocks(weight: PackedWeight, depth: int) -> None:
    obstacle = None
    if weight.bits == 2:
        obstacle = "2 bits"
    elif weight.bits == 8 and weight.zero_point is not None:
        obstacle = "8 bits with zero points"
    elif (depth if weight.group_size is None else weight.group_size) % _BLOCK:
        obstacle = f"one scale for {weight.group_size or depth} inputs"
    if obstacle is not None:
        raise PretrainedError(
            f"The weight of '{weight.module}' has a format that GGUF has not.",
            where=f"tensor @{weight.name}",
            seen=obstacle,
            expected="4 bits, or 8 bits without zero points, and a scale for a multiple of 32 inputs",
            next_step="quantize to uint4:group=32:affine, int4:group=32 or int8:channel=0",
        )


def _half(values: NDArray[np.floating[Any]], weight: PackedWeight) -> NDArray[np.uint8]:
    half = values.astype(np.float16)
    if not np.isfinite(half).all() or bool(((half == 0) & (values != 0)).any()):
        raise PretrainedError(
            f"The scales of '{weight.module}' do not fit into float16, in which GGUF has them.",
            where=f"tensor @{weight.name}",
            seen=f"magnitudes from {np.abs(values).min():.3g} to {np.abs(values).max():.3g}",
            expected="6e-8 to 65504",
            next_step="save a .sqm or .onnx file",
        )
    return half.view(np.uint8)
