"""Measure the native engine's float kernels beside PyTorch's and ONNX Runtime's.

    python benchmarks/float_kernels.py [--threads 2] [--isa avx2] [--peers] [--json float_kernels.json]

Shapes are those of a 1.1B-parameter Llama (32 heads that share 4 key heads, dimension 64) and of BERT-base.
As in benchmarks/kernels.py every round runs each contender once, in turn, and figures are medians over the
rounds. Attention includes appending the new keys and values, as ONNX Runtime's operator does; PyTorch's is
given keys and values in place, already repeated for the query heads, which its fastest kernel needs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from kernels import Contender, measure, show, version
from numpy.typing import NDArray

from sqcompile.backends.native import _native, cpu_features, float_kernels, kernels

HIDDEN, INTERMEDIATE, ROWS = 2048, 5632, 128
HEADS, KEY_HEADS, HEAD_DIM = 32, 4, 64
CONTEXT = 1024

Floats = NDArray[np.float32]


def normal(*shape: int) -> Floats:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def times(count: int, call: Callable[[], object]) -> Callable[[], object]:
    """Run `call` so often: our own short kernels repeat within one call too, with everything in cache."""

    def run() -> None:
        for _ in range(count):
            call()

    return run


def ort_call(
    operator: str,
    inputs: dict[str, NDArray[Any]],
    constants: dict[str, NDArray[Any]],
    output_shapes: list[tuple[int, ...]],
    threads: int,
    shared: dict[str, str] | None = None,
    **attributes: Any,
) -> Callable[[], object]:
    """One operator of ONNX Runtime, its inputs and outputs bound once.

    `shared` maps outputs to the inputs whose memory they use.
    """
    import onnxruntime
    from onnx import helper, numpy_helper

    domain = attributes.pop("domain", "com.microsoft")
    outputs = [f"y{i}" for i in range(len(output_shapes))]
    node = helper.make_node(operator, [*inputs, *constants], outputs, domain=domain, **attributes)

    def info(name: str, array_type: Any, shape: Any) -> Any:
        return helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(np.dtype(array_type)), shape
        )

    graph = helper.make_graph(
        [node],
        "peer",
        [info(name, array.dtype, array.shape) for name, array in inputs.items()],
        [info(name, np.float32, shape) for name, shape in zip(outputs, output_shapes, strict=True)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name, shape in zip(outputs, output_shapes, strict=True):
        source = (shared or {}).get(name)
        made = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty(shape, np.float32))
        binding.bind_ortvalue_output(name, values[source] if source else made)
    return lambda: session.run_with_iobinding(binding)


def normalize(pool: kernels.ThreadPool, isa: str | None, peers: bool) -> list[Contender]:
    x, weight = normal(ROWS, HIDDEN), normal(HIDDEN)
    y = np.empty_like(x)
    work = x.size / 1e9

    def own(kind: str) -> Callable[[], object]:
        return lambda: _native.norm(pool, isa, kind, x, weight, None, 1e-5, y, 20)

    contenders = [
        Contender("RMSNorm", own("rms"), 20 * work, "G elements/s"),
        Contender("LayerNorm", own("layer"), 20 * work, "G elements/s"),
    ]
    if not peers:
        return contenders
    import torch

    tx, tw = torch.tensor(x), torch.tensor(weight)
    runs: list[tuple[str, str, Callable[[], object]]] = [
        ("pytorch rms_norm", "RMSNorm", lambda: torch.rms_norm(tx, (HIDDEN,), tw, 1e-5)),
        ("pytorch layer_norm", "LayerNorm", lambda: torch.layer_norm(tx, (HIDDEN,), tw, tw, 1e-5)),
    ]
    for operator, against in (
        ("SimplifiedLayerNormalization", "RMSNorm"),
        ("LayerNormalization", "LayerNorm"),
    ):
        call = ort_call(
            operator, {"x": x}, {"w": weight}, [x.shape], pool.threads, domain="", axis=-1, epsilon=1e-5
        )
        runs.append((f"onnxruntime {operator}", against, call))
    contenders += [Contender(n, times(20, r), 20 * work, "G elements/s", against=a) for n, a, r in runs]
    return contenders


def activate(pool: kernels.ThreadPool, isa: str | None, peers: bool) -> list[Contender]:
    x, factor = normal(ROWS, INTERMEDIATE), normal(ROWS, INTERMEDIATE)
    y = np.empty_like(x)
    work = x.size / 1e9

    def own(function: str, times: Floats | None) -> Callable[[], object]:
        index = float_kernels.ACTIVATIONS.index(function)
        return lambda: _native.activation(pool, isa, index, x, times, y, 10)

    contenders = [
        Contender("SiLU(gate) * up", own("silu", factor), 10 * work, "G elements/s"),
        Contender("GELU", own("gelu", None), 10 * work, "G elements/s"),
    ]
    if not peers:
        return contenders
    import torch
    from torch.nn import functional

    tx, tf = torch.tensor(x), torch.tensor(factor)
    runs: list[tuple[str, str, Callable[[], object]]] = [
        ("pytorch silu, mul", "SiLU(gate) * up", lambda: functional.silu(tx) * tf),
        ("pytorch gelu", "GELU", lambda: functional.gelu(tx)),
        ("onnxruntime Gelu", "GELU", ort_call("Gelu", {"x": x}, {}, [x.shape], pool.threads)),
    ]
    contenders += [Contender(n, times(10, r), 10 * work, "G elements/s", against=a) for n, a, r in runs]
    return contenders


def attend(
    pool: kernels.ThreadPool,
    isa: str | None,
    peers: bool,
    heads: int,
    key_heads: int,
    queries: int,
    length: int,
    causal: bool,
) -> list[Contender]:
    q, k, v = (
        normal(1, heads, queries, HEAD_DIM),
        normal(1, key_heads, length, HEAD_DIM),
        normal(1, key_heads, length, HEAD_DIM),
    )
    seen = length - (queries - 1) / 2 if causal else length
    work = 4 * heads * queries * seen * HEAD_DIM / 1e9
    new_k, new_v = (np.ascontiguousarray(x[:, :, length - queries :]) for x in (k, v))
    out = np.empty_like(q)
    scratch = _native.allocate(4 * pool.threads * _native.attention_scratch_count(HEAD_DIM)).view(np.float32)

    def own(quantized: bool) -> Callable[[], object]:
        cache = float_kernels.KvCache(1, key_heads, HEAD_DIM, length, quantized=quantized)
        cache.append(k, v)
        arrays = (cache.k, cache.v, cache.scale)
        first, scale = length - queries, HEAD_DIM**-0.5

        def run() -> None:
            _native.kvcache(pool, isa, new_k, new_v, first, cache.capacity, *arrays)
            _native.attention(
                pool,
                isa,
                q,
                key_heads,
                length,
                first,
                causal,
                scale,
                None,
                None,
                cache.capacity,
                *arrays,
                out,
                scratch,
            )

        return run

    contenders = [
        Contender("float32 cache", own(False), work, "GFLOPS"),
        Contender("8-bit cache", own(True), work, "GFLOPS", against="float32 cache"),
    ]
    if not peers:
        return contenders
    import torch
    from torch.nn import functional

    tq = torch.tensor(q)
    tk, tv = (torch.tensor(x).repeat_interleave(heads // key_heads, dim=1) for x in (k, v))
    contenders.append(
        Contender(
            "pytorch scaled_dot_product_attention",
            lambda: functional.scaled_dot_product_attention(tq, tk, tv, is_causal=causal and queries > 1),
            work,
            "GFLOPS",
            against="float32 cache",
        )
    )
    rows = {"q": (1, queries, heads * HEAD_DIM), "k": (1, queries, key_heads * HEAD_DIM)}
    if causal:
        past = (1, key_heads, length, HEAD_DIM)
        inputs: dict[str, NDArray[Any]] = {
            "q": normal(*rows["q"]),
            "k": normal(*rows["k"]),
            "v": normal(*rows["k"]),
            "past_k": normal(*past),
            "past_v": normal(*past),
            "last": np.array([[length - 1]], np.int32)[0],
            "total": np.array([length], np.int32),
        }
        call = ort_call(
            "GroupQueryAttention",
            inputs,
            {},
            [rows["q"], past, past],
            pool.threads,
            shared={"y1": "past_k", "y2": "past_v"},
            num_heads=heads,
            kv_num_heads=key_heads,
        )
        name = "onnxruntime GroupQueryAttention"
    else:
        inputs = {name: normal(*rows["q"]) for name in "qkv"}
        call = ort_call("MultiHeadAttention", inputs, {}, [rows["q"]], pool.threads, num_heads=heads)
        name = "onnxruntime MultiHeadAttention"
    contenders.append(Contender(name, call, work, "GFLOPS", against="float32 cache"))
    return contenders


def multiply(pool: kernels.ThreadPool, isa: str | None, peers: bool, m: int) -> list[Contender]:
    n, k = (INTERMEDIATE, HIDDEN) if m > 1 else (32000, HIDDEN)
    a, weight = normal(m, k), normal(n, k)
    c = np.empty((m, n), np.float32)
    unit = "GFLOPS" if m > 1 else "GB/s"

    def own(bf16: bool) -> tuple[Callable[[], object], float]:
        packed = float_kernels.pack_float(weight, bfloat16=bf16)
        scratch = _native.allocate(pool.threads * _native.fgemm_scratch_bytes(m, bf16))
        work = 2 * m * n * k / 1e9 if m > 1 else packed.data.nbytes / 1e9
        return lambda: _native.fgemm(pool, isa, a, packed.data, bf16, None, c, scratch), work

    contenders = [
        Contender(name, *own(bf16), unit)
        for name, bf16 in (("float32 weights", False), ("bfloat16 weights", True))
    ]
    if not peers:
        return contenders
    import torch

    ta, tw = torch.tensor(a), torch.tensor(weight)
    work = contenders[0].work
    against = "float32 weights"
    transposed = np.ascontiguousarray(weight.T)
    call = ort_call("MatMul", {"a": a}, {"b": transposed}, [(m, n)], pool.threads, domain="")
    contenders += [
        Contender("pytorch linear", lambda: torch.nn.functional.linear(ta, tw), work, unit, against=against),
        Contender("onnxruntime MatMul", call, work, unit, against=against),
    ]
    return contenders


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=cpu_features().physical_cores)
    parser.add_argument("--isa", default=None, choices=kernels.available_isas())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--peers", action="store_true", help="also measure PyTorch and ONNX Runtime")
    parser.add_argument("--only", help="one part: norm, activation, attention or product")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu sees the calling thread only: it needs --threads 1")
    clock = time.perf_counter if options.clock == "wall" else time.thread_time

    pool = kernels.ThreadPool(options.threads)
    isa = options.isa or kernels.default_isa()
    peers = options.peers
    if peers:
        import torch

        torch.set_num_threads(options.threads)
    features = cpu_features()
    print(f"{features.brand or features.architecture}, {options.threads} threads, {isa}")
    llama, bert = (HEADS, KEY_HEADS), (12, 12)
    parts: list[tuple[str, str, Callable[[], list[Contender]]]] = [
        ("norm", f"Norms, {ROWS} x {HIDDEN}", lambda: normalize(pool, isa, peers)),
        ("activation", f"Activations, {ROWS} x {INTERMEDIATE}", lambda: activate(pool, isa, peers)),
        (
            "attention",
            f"Attention, prefill of {ROWS}, {HEADS}/{KEY_HEADS} heads",
            lambda: attend(pool, isa, peers, *llama, ROWS, ROWS, True),
        ),
        (
            "attention",
            f"Attention, decode at {CONTEXT}, {HEADS}/{KEY_HEADS} heads",
            lambda: attend(pool, isa, peers, *llama, 1, CONTEXT, True),
        ),
        (
            "attention",
            f"Attention, encoder of {ROWS}, 12 heads",
            lambda: attend(pool, isa, peers, *bert, ROWS, ROWS, False),
        ),
        ("product", f"Product, {ROWS} rows", lambda: multiply(pool, isa, peers, ROWS)),
        ("product", "Product, 1 row, weights from memory", lambda: multiply(pool, isa, peers, 1)),
    ]
    if options.only:
        parts = [part for part in parts if part[0] == options.only]
        if not parts:
            parser.error(f"no part is called {options.only}")
    figures: dict[str, Any] = {}
    for _, title, make in parts:
        results = measure(make(), options.rounds, clock)
        show(title, results)
        figures[title] = [asdict(result) for result in results]
    if options.json:
        about = {
            "cpu": features.brand,
            "architecture": features.architecture,
            "threads": options.threads,
            "isa": isa,
            "rounds": options.rounds,
            "clock": options.clock,
            "python": sys.version.split()[0],
            "versions": {name: version(name) for name in ("sqcompile", "numpy", "torch", "onnxruntime")},
        }
        options.json.write_text(json.dumps({"about": about, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
