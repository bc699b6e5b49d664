"""Decode and prefill of a 1.1B-parameter Llama shape: the native engine, llama.cpp, onnxruntime-genai.

    pip install .[bench]; CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python
    python benchmarks/native_llm.py [--layers 22] [--rounds 5] [--quick] [--folder DIR] [--json out.json]

Random weights: speed does not depend on values, but for how many are zero, which magnitude pruning decides.
Every layer has one layer's weights in memory of its own, so that files are made in a minute. All
matrices have one format, the head too. Files are kept in `--folder`, so that a second run only measures.

One round is, for each contender in turn, a prefill of a prompt into an empty cache, then tokens one by one.
Ratios are medians of the rounds' ratios. *of limit* is bytes of weights read a token times tokens a second,
over the read bandwidth that is measured beside it in each round; the embedding, of which a token reads one row,
is left out. Peers that are not installed are left out. Memory of our own generation is measured beside it
(`peak_memory.py`), and with it what the files come to in bits a weight, embedding and head included.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_json
from rich.console import Console
from rich.table import Table

from sqcompile.backends.native import _native
from sqcompile.backends.native.artifact import NativeArtifact
from sqcompile.backends.native.backend import BACKEND
from sqcompile.backends.native.kernels import default_isa
from sqcompile.passes import ApplyMasks, MaskWeights, pipelines
from sqcompile.passes.quantize import QuantizeWeights
from sqcompile.pipeline import Pass, PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.quantization.format import Format
from sqcompile.tracing import trace

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY, CONTEXT = 2048, 5632, 32, 4, 32000, 2048
INT4, INT8 = "int4:group=128", "int8:channel=0:narrow"
OURS: dict[str, tuple[str, float]] = {
    "int4": (INT4, 0.0),
    "int4, 50 % zeros": (INT4, 0.5),
    "int8": (INT8, 0.0),
    "int8, 70 % zeros": (INT8, 0.7),
}
LLAMA = {"llama.cpp Q4_0": "Q4_0", "llama.cpp Q8_0": "Q8_0"}
GENAI, GENAI_DEFAULT = "onnxruntime-genai int4", "onnxruntime-genai int4, blocks of 32"
GENAI_BLOCKS = {
    GENAI: 128,
    GENAI_DEFAULT: 32,
}  # ours are of 128, too; 32 is what its builder makes unless told
# (what, faster, than, target): the ratios that issue 3 asks for
TARGETS = [
    ("decode", "int4", "llama.cpp Q4_0", 1.3),
    ("decode", "int4", GENAI, 1.4),
    ("decode", "int4", GENAI_DEFAULT, 1.4),
    ("decode", "int4, 50 % zeros", "int4", 1.2),
    ("decode", "int4, 50 % zeros", "llama.cpp Q4_0", 1.6),
    ("decode", "int8", "llama.cpp Q8_0", 1.15),
    ("decode", "int8, 70 % zeros", "int8", 2.0),
    ("prefill", "int8", "llama.cpp Q4_0", 2.5),
    ("prefill", "int8", GENAI, 2.5),
    ("prefill", "int8", GENAI_DEFAULT, 2.5),
    ("prefill", "int4", "llama.cpp Q4_0", 2.5),
    ("prefill", "int4", GENAI, 2.5),
    ("prefill", "int4", GENAI_DEFAULT, 2.5),
]


@dataclass
class Contender:
    """Something that takes a prompt, then makes tokens."""

    name: str
    prefill: Callable[[list[int]], None]
    decode: Callable[[int], None]
    weight_bytes: int = 0  # that a token reads
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"prefill": [], "decode": []})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded in each round")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two rounds of 8 tokens")
    parser.add_argument("--only", default="", help="contenders, separated by semicolons")
    parser.add_argument("--folder", type=Path, default=Path("build/native_llm"), help="where files are kept")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.tokens = 2, 8
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    folder = options.folder / f"{options.layers}_layers"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in options.only.split(";") if name] or [*OURS, *LLAMA, *GENAI_BLOCKS]
    contenders = list(_contenders(folder, options, wanted))
    memory = [_memory(name, folder, options) for name in OURS if name in wanted]
    bandwidth = _measure(contenders, options)
    _print(contenders, bandwidth, memory, options)


def _contenders(folder: Path, options: argparse.Namespace, wanted: list[str]) -> Iterator[Contender]:
    model: list[Any] = []

    def dense() -> Any:
        if not model:
            _say("random weights")
            model.append(_model(options.layers))
        return model[0]

    for name, (text, sparsity) in OURS.items():
        if name not in wanted:
            continue
        path = _path(folder, name)
        if not path.exists():
            _build_native(dense(), path, text, sparsity)
        yield _native_contender(name, path, options)
    if not set(wanted).isdisjoint(LLAMA) and _installed("llama_cpp", "gguf"):
        for name, kind in LLAMA.items():
            if name not in wanted:
                continue
            path = folder / f"{kind}.gguf"
            if not path.exists():
                _build_gguf(dense(), path, kind, options.layers)
            yield _llama_contender(name, path, options)
    if not set(wanted).isdisjoint(GENAI_BLOCKS) and _installed("onnxruntime_genai"):
        for name, block in GENAI_BLOCKS.items():
            if name not in wanted:
                continue
            path = folder / f"genai_block{block}"
            if not path.exists():
                _build_genai(dense(), path, block)
            yield _genai_contender(name, path, options)


def _say(text: str) -> None:
    print(f"{text} …", file=sys.stderr, flush=True)


def _installed(*modules: str) -> bool:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out: {', '.join(missing)} not installed", file=sys.stderr)
    return not missing


# --- models --------------------------------------------------------------------------------------------


def _model(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        use_cache=False,
    )
    one = LlamaForCausalLM(config).eval()
    config.num_hidden_layers = layers
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    shared = dict(one.named_parameters())
    for index in range(layers):
        for name, _ in one.model.layers[0].named_parameters():
            place, _, leaf = name.rpartition(".")
            module = model.model.layers[index].get_submodule(place)
            setattr(module, leaf, shared[f"model.layers.0.{name}"])
    model.model.embed_tokens, model.model.norm = one.model.embed_tokens, one.model.norm
    model.model.rotary_emb, model.lm_head = one.model.rotary_emb, one.lm_head
    return model


def _build_native(model: Any, path: Path, text: str, sparsity: float) -> None:
    _say(f"native: {path.name}")
    shapes = {"input_ids": {1: torch.export.Dim("sequence", min=2, max=CONTEXT)}}
    program = trace(model, {"input_ids": torch.zeros(1, 16, dtype=torch.int64)}, dynamic_shapes=shapes)
    masks: list[Pass] = [MaskWeights(sparsity=sparsity), ApplyMasks()] if sparsity else []
    passes = [*pipelines.canonical(), *masks, QuantizeWeights(weight=Format.parse(text))]
    PassManager(passes, verify="off").run(program, PassContext())
    artifact = BACKEND.lower(program)
    assert isinstance(artifact, NativeArtifact)
    NativeArtifact(_unshared(artifact), artifact.notes).save(path)


def _unshared(artifact: NativeArtifact) -> Any:
    """Give each step weights of its own, as the layers of a real model have them."""
    from dataclasses import replace

    plan = artifact.plan
    for part in (plan, plan.generation.plan if plan.generation else None):
        if part is None:
            continue
        seen: dict[tuple[int, int], int] = {}
        copies: dict[int, int] = {}
        steps = []
        for step in part.steps:
            inputs = []
            for value in step.inputs:
                if (
                    value is not None
                    and value.kind == "constant"
                    and plan.tensors[value.source].nbytes > 4096
                ):
                    number = copies[value.source] = copies.get(value.source, 0) + 1
                    key = (value.source, number)
                    if number > 1 and key not in seen:
                        seen[key] = _copy_of(plan, key)
                    if number > 1:
                        value = part.add_shared(value.dtype, value.shape, seen[key], value.layout)
                inputs.append(value)
            steps.append(replace(step, inputs=tuple(inputs)))
        part.steps = steps
    return plan


_COPIES: dict[tuple[int, int, int], int] = {}


def _copy_of(plan: Any, key: tuple[int, int]) -> int:
    """Return the number of a tensor's n-th copy, the same for both plans of a file."""
    full = (id(plan.tensors), *key)
    if full not in _COPIES:
        _COPIES[full] = len(plan.tensors)
        plan.tensors.append(plan.tensors[key[0]])
    return _COPIES[full]


def _tensors(model: Any, layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name in GGUF, tensor) in the order of the file."""
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output.weight", model.lm_head.weight
    yield "output_norm.weight", model.model.norm.weight
    for index in range(layers):
        for name, module in parts.items():
            yield f"blk.{index}.{name}.weight", model.model.layers[index].get_submodule(module).weight


def _build_gguf(model: Any, path: Path, kind: str, layers: int) -> None:
    import gguf

    _say(f"llama.cpp: {path.name}")
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_tokenizer_model("llama")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    writer.add_token_list([*special, *(f"t{index}" for index in range(len(special), VOCABULARY))])
    writer.add_token_scores([0.0] * VOCABULARY)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * (VOCABULARY - len(kinds))])
    quantization = gguf.GGMLQuantizationType[kind]
    known: dict[int, Any] = {}
    for name, tensor in _tensors(model, layers):
        if tensor.dim() == 1:
            writer.add_tensor(name, tensor.detach().numpy())
            continue
        if id(tensor) not in known:
            known[id(tensor)] = gguf.quants.quantize(tensor.detach().numpy(), quantization)
        writer.add_tensor(name, known[id(tensor)], raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def _build_genai(model: Any, path: Path, block: int) -> None:
    """Export by the peer's own builder, from a folder as the hub has them."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    _say(f"onnxruntime-genai: its model builder, blocks of {block}")
    source, partial = path.with_name("genai_source"), path.with_name("genai_partial")
    for item in (source, partial):
        shutil.rmtree(item, ignore_errors=True)
    # Layers that differ: ONNX Runtime keeps packed weights with equal bytes once, and one layer's stay in the cache.
    state = {
        name: value.detach().to(torch.bfloat16).roll(_layer(name), 0)
        for name, value in model.state_dict().items()
    }
    model.config.torch_dtype = "bfloat16"
    model.save_pretrained(source, state_dict=state)
    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(VOCABULARY)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="t1", eos_token="t2", pad_token="t2"
    )
    tokenizer.save_pretrained(source)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(source), "-i", str(source)]
    command += ["-o", str(partial), "-p", "int4", "-e", "cpu", "-c", str(path.with_name("genai_cache"))]
    command += ["--extra_options", f"block_size={block}", "accuracy_level=4"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"onnxruntime-genai's builder failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    shutil.rmtree(source)
    shutil.rmtree(path.with_name("genai_cache"), ignore_errors=True)
    partial.rename(path)


def _layer(name: str) -> int:
    """Return the number of the layer that a tensor of the model belongs to; 0 for those of none."""
    _, found, rest = name.partition("layers.")
    return int(rest.partition(".")[0]) if found else 0


# --- contenders ------------------------------------------------------------------------------------------


def _native_contender(name: str, path: Path, options: argparse.Namespace) -> Contender:
    session: Any = BACKEND.load(path, threads=options.threads)
    generator = session.generator(rows=1, capacity=options.prompt + options.tokens + 1)

    def prefill(prompt: list[int]) -> None:
        generator.reset()
        generator.feed({0: prompt})

    def decode(count: int) -> None:
        generator.generate({0: [1]}, count)

    bits = 4 if OURS[name][0] == INT4 else 8
    return Contender(name, prefill, decode, path.stat().st_size - VOCABULARY * HIDDEN * bits // 8)


def _llama_contender(name: str, path: Path, options: argparse.Namespace) -> Contender:
    import llama_cpp

    llama = llama_cpp.Llama(
        str(path),
        n_ctx=512,
        n_batch=512,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        verbose=False,
    )

    def prefill(prompt: list[int]) -> None:
        llama.reset()
        llama.eval(prompt)

    def decode(count: int) -> None:
        for token in range(count):
            llama.eval([token + 1000])

    bits = 4.5 if LLAMA[name] == "Q4_0" else 8.5
    return Contender(name, prefill, decode, path.stat().st_size - int(VOCABULARY * HIDDEN * bits / 8))


def _genai_contender(name: str, path: Path, options: argparse.Namespace) -> Contender:
    import onnxruntime_genai as genai

    config_path = path / "genai_config.json"
    config = json.loads(config_path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = options.threads
    config_path.write_text(json.dumps(config, indent=4))
    model = genai.Model(str(path))
    state: dict[str, Any] = {}

    def prefill(prompt: list[int]) -> None:
        params = genai.GeneratorParams(model)
        length = options.prompt + options.tokens + 3
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        state["generator"] = genai.Generator(model, params)
        state["generator"].append_tokens(np.array([prompt], np.int32))
        state["generator"].generate_next_token()  # only chosen: its logits are the prompt's

    def decode(count: int) -> None:
        for _ in range(count):
            state["generator"].generate_next_token()

    return Contender(name, prefill, decode, _genai_weight_bytes(path))


def _genai_weight_bytes(path: Path) -> int:
    """Return the bytes of all weights but the embedding's, which stays float32, 262 MB of it."""
    import onnx

    graph = onnx.load(str(next(path.glob("*.onnx"))), load_external_data=False).graph
    tables = {node.input[0] for node in graph.node if node.op_type.startswith("Gather")}
    return sum(
        int(entry.value)
        for tensor in graph.initializer
        if tensor.name not in tables
        for entry in tensor.external_data
        if entry.key == "length"
    )


# --- measuring -------------------------------------------------------------------------------------------


def _measure(contenders: list[Contender], options: argparse.Namespace) -> list[float]:
    """Time all in turns; return the read bandwidth in bytes a second of each round."""
    generator = np.random.default_rng(0)
    pool = _native.ThreadPool(options.threads)
    memory = np.ones(1 << 28, np.uint8)
    bandwidth = []
    for turn in range(options.rounds + 1):  # the first round warms up
        for item in contenders:
            prompt = [int(token) for token in generator.integers(3, VOCABULARY, options.prompt)]
            begin = time.perf_counter()
            item.prefill(prompt)
            middle = time.perf_counter()
            item.decode(options.tokens)
            end = time.perf_counter()
            if turn:
                item.seconds["prefill"].append(middle - begin)
                item.seconds["decode"].append((end - middle) / options.tokens)
        if turn:
            bandwidth.append(_read_bandwidth(memory, pool))
    return bandwidth


def _read_bandwidth(memory: Any, pool: _native.ThreadPool) -> float:
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        _native.read_memory(pool, default_isa(), memory)
        times.append(time.perf_counter() - begin)
    return float(memory.nbytes / min(times[1:]))


def _path(folder: Path, name: str) -> Path:
    text, sparsity = OURS[name]
    return folder / f"{text.partition(':')[0]}_{sparsity:.0%}.sqm"


def _memory(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return bytes of a file, its cache and the peak of generation, by `peak_memory.py` in a process of its own."""
    script = Path(__file__).with_name("peak_memory.py")
    command = [sys.executable, str(script), str(_path(folder, name)), "--json"]
    command += ["--prompt", str(options.prompt), "--tokens", str(options.tokens)]
    done = subprocess.run(
        [*command, "--threads", str(options.threads)], capture_output=True, text=True, check=True
    )
    layer = 2 * HIDDEN * HIDDEN * (1 + KV_HEADS / HEADS) + 3 * HIDDEN * INTERMEDIATE
    weights = options.layers * layer + 2 * VOCABULARY * HIDDEN
    found: dict[str, Any] = json.loads(done.stdout)
    return {"contender": name, **found, "bits_a_weight": 8 * found["file_bytes"] / weights}


def _memory_table(memory: list[dict[str, Any]]) -> Table:
    table = Table("MiB", "file", "bits a weight", "cache", "peak", "beyond file and cache (at most 64)")
    for row in memory:
        sizes = {name: row[f"{name}_bytes"] / 2**20 for name in ("file", "cache", "peak", "beyond")}
        table.add_row(
            row["contender"],
            f"{sizes['file']:.0f}",
            f"{row['bits_a_weight']:.3f}",
            f"{sizes['cache']:.1f}",
            f"{sizes['peak']:.0f}",
            f"{sizes['beyond']:.1f}",
        )
    return table


def _print(
    contenders: list[Contender],
    bandwidth: list[float],
    memory: list[dict[str, Any]],
    options: argparse.Namespace,
) -> None:
    by_name = {item.name: item for item in contenders}
    rows: list[dict[str, Any]] = []
    table = Table("", "read a token", "prefill tok/s", "decode tok/s", "of limit")
    for item in contenders:
        prefill = [options.prompt / seconds for seconds in item.seconds["prefill"]]
        decode = [1 / seconds for seconds in item.seconds["decode"]]
        share = [rate * item.weight_bytes / limit for rate, limit in zip(decode, bandwidth, strict=True)]
        middle = statistics.median(share)
        table.add_row(
            item.name, f"{item.weight_bytes / 1e6:.0f} MB", _range(prefill), _range(decode), f"{middle:.0%}"
        )
        rows.append(
            {
                "contender": item.name,
                "bytes_read_a_token": item.weight_bytes,
                "prefill_tokens_per_second": prefill,
                "decode_tokens_per_second": decode,
                "share_of_read_bandwidth": share,
            }
        )
    console = Console(width=110)
    console.print(table)
    console.print(f"read bandwidth, {options.threads} threads: {_range([x / 1e9 for x in bandwidth])} GB/s")
    ratios = Table("", "ratio (median of rounds)", "spread", "target")
    for what, first, second, target in TARGETS:
        if first not in by_name or second not in by_name:
            continue
        pairs = zip(by_name[second].seconds[what], by_name[first].seconds[what], strict=True)
        values = [slow / fast for slow, fast in pairs]
        middle = statistics.median(values)
        ratios.add_row(
            f"{what}: {first} over {second}",
            f"{middle:.2f}",
            f"{min(values):.2f}–{max(values):.2f}",
            f"{target}",
        )
        rows.append({"what": what, "faster": first, "than": second, "ratios": values, "target": target})
    console.print(ratios)
    console.print(_memory_table(memory))
    rows += memory
    versions = {
        name: getattr(importlib.import_module(name), "__version__", "?")
        for name in ("llama_cpp", "onnxruntime_genai", "onnxruntime")
        if importlib.util.find_spec(name)
    }
    settings = {key: str(value) for key, value in vars(options).items()}
    write_json(options.json, "native_llm", rows, isa=default_isa(), peers=versions, **settings)


def _range(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


if __name__ == "__main__":
    main()
