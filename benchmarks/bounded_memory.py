"""Compressing a language model in bounded memory, and after crashes.

    python benchmarks/bounded_memory.py [--folder F] [--layers 22] [--max-memory 4GB] [--json out.json]
    python benchmarks/bounded_memory.py --kills 10 --small

Writes a random Llama of 1.1 billion parameters (hidden 2048, intermediate 5632, 22 layers, 32 and 4 heads,
32000 tokens) as a Hugging Face folder in bfloat16 shards if the folder has none, and rounds it to 4 bits with
GPTQ, part by part, in a process of its own whose peak of resident memory the system reports; with `--method wanda`
it zeros half of the weights and rounds to nearest, which takes a tenth of the time. With `--kills` the model is
compressed once more, by processes that are killed at random moments, each going on from what is there, and the
files are compared with those of the run that was left alone. `--small`: 12 layers of width 256.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import write_json
from rich.console import Console
from rich.table import Table

LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4000,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sqcompile-bounded")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--max-memory")
    parser.add_argument("--method", choices=("gptq", "wanda"), default="gptq")
    parser.add_argument("--rows", type=int, default=8, help="rows of calibration tokens")
    parser.add_argument("--context", type=int, default=256, help="tokens a row")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it is killed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # the run itself, in its own process
    options = parser.parse_args()
    if options.work is not None:
        print(json.dumps(compress(options)))
        return
    sizes = SMALL if options.small else LARGE
    layers = options.layers or (12 if options.small else 22)
    options.max_memory = options.max_memory or ("1.5GB" if options.small else "4GB")
    options.folder = options.folder / f"{sizes['hidden_size']}x{layers}"
    write_model(options.folder / "model", sizes, layers)
    rows = [measure(options, options.folder / "whole")]
    if options.kills:
        rows.append(measure_kills(options, rows[0]))
    table = Table("run", "parameters", "parts", "seconds", "peak of memory", "files")
    for row in rows:
        table.add_row(
            row["run"],
            f"{row['parameters'] / 1e6:.0f} million",
            str(row["parts"]),
            f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 1e9:.2f} GB of {options.max_memory}",
            row["files"],
        )
    Console(width=120).print(table)
    write_json(options.json, "bounded_memory", rows, max_memory=options.max_memory)


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Compress once, undisturbed; what was done before is not used."""
    shutil.rmtree(work, ignore_errors=True)
    started = time.perf_counter()
    run = Run(options, work)
    run.wait()
    result = run.result()
    return {
        "run": "undisturbed",
        "seconds": time.perf_counter() - started,
        "start_seconds": run.start_seconds,
        "files": digest(work),
        "peak_bytes": run.peak_bytes,
        **result,
    }


class Run:
    """A process that compresses the model, and the most resident memory that it ever had.

    The system keeps the peak; it is read often, since the process starts it anew with each part.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self._process = subprocess.Popen(command(options, work), stdout=subprocess.PIPE)
        self._job = work / "job.json"
        self._started = time.perf_counter()
        self.start_seconds = 0.0
        self.peak_bytes = 0

    def wait(self, seconds: float = math.inf) -> bool:
        """Wait for the end, for some seconds at most; return whether it has ended."""
        while self._process.poll() is None:
            now = time.perf_counter() - self._started
            if now > seconds:
                return False
            if not self.start_seconds and self._job.is_file():
                self.start_seconds = now
            self.peak_bytes = max(self.peak_bytes, peak_of(self._process.pid))
            time.sleep(0.05)
        return True

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()

    def result(self) -> dict[str, Any]:
        """What it says at its end."""
        text, _ = self._process.communicate()
        if self._process.returncode:
            raise SystemExit(f"the run failed with {self._process.returncode}")
        return json.loads(text)


def peak_of(process: int) -> int:
    """Most resident memory of a process since it was started anew, in bytes; 0 if it has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = [line.split() for line in text.splitlines() if line.startswith("VmHWM:")]
    return int(found[0][1]) * 1024 if found else 0


def measure_kills(options: argparse.Namespace, whole: dict[str, Any]) -> dict[str, Any]:
    """Compress in processes that are killed at random moments; each goes on from what the one before left.

    The moments are such that the work takes about as many processes as are to be killed.
    """
    work = options.folder / "killed"
    shutil.rmtree(work, ignore_errors=True)
    chance = random.Random(options.seed)
    step = (whole["seconds"] - whole["start_seconds"]) / options.kills
    started = time.perf_counter()
    kills, done, peak = 0, [], 0
    while kills < options.kills:
        run = Run(options, work)
        ended = run.wait(whole["start_seconds"] + chance.uniform(0, 2 * step))
        peak = max(peak, run.peak_bytes)
        if ended:  # begin anew, to be killed as often as promised
            run.result()
            done.append("all")
            shutil.rmtree(work)
            continue
        run.kill()
        kills += 1
        done.append(str(len(list(work.glob("part-*.json")))))
    run = Run(options, work)
    run.wait()
    result = run.result()
    same = contents(work) == contents(options.folder / "whole")
    print(f"parts that were done after each kill: {', '.join(done)}", file=sys.stderr)
    return {
        "run": f"killed {kills} times",
        "seconds": time.perf_counter() - started,
        "files": f"{digest(work)}: {'identical' if same else 'DIFFERENT'}",
        "done": done,
        "peak_bytes": max(peak, run.peak_bytes),
        **result,
    }


def contents(work: Path) -> dict[str, str]:
    """A hash of each part."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in work.glob("part-*.pt2")}


def command(options: argparse.Namespace, work: Path) -> list[str]:
    """How a run is started in its own process."""
    plain = ("folder", "max_memory", "method", "rows", "context")
    texts = [text for name in plain for text in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    return [sys.executable, __file__, *texts, "--work", str(work)]


def compress(options: argparse.Namespace) -> dict[str, Any]:
    """Compress in this process, and say what became of the model."""
    compiled = compress_folder(options.folder / "model", options, options.work)
    return {
        "parameters": compiled.report.original.parameters,
        "parts": len(list(options.work.glob("part-*.pt2"))),
        "size_bytes": compiled.report.size.size_bytes,
    }


def compress_folder(model: Path, options: argparse.Namespace, work: Path) -> Any:
    """Compress a model part by part."""
    import logging
    import warnings

    import sqcompile
    from sqcompile.passes import GPTQ, ApplyMasks, FoldQDQ, QuantizeWeights, Wanda, pipelines
    from sqcompile.progress import BarProgress
    from sqcompile.quantization.format import Format, PerGroup

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    weight = Format(bits=4, signed=False, symmetric=False, granularity=PerGroup(32))
    eight = (("kind:embedding", pipelines.INT8_WEIGHT), ("kind:head", pipelines.INT8_WEIGHT))
    methods: dict[str, list[sqcompile.Pass]] = {
        "gptq": [GPTQ(weight=weight, formats=eight)],
        "wanda": [
            Wanda(sparsity=0.5, exclude=("lm_head",)),
            ApplyMasks(),
            QuantizeWeights(weight=weight, formats=eight),
        ],
    }
    vocabulary = json.loads((options.folder / "model" / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(
        0, vocabulary, (options.rows, options.context), generator=torch.Generator().manual_seed(0)
    )
    return sqcompile.compile(
        model,
        [*pipelines.canonical(), *methods[options.method], FoldQDQ()],
        calibration=[{"input_ids": row[None]} for row in tokens],
        max_memory=options.max_memory,
        work_dir=work,
        backend="reference",
        progress=BarProgress(),
    )


def digest(work: Path) -> str:
    """A hash of all parts."""
    total = hashlib.sha256()
    for path in sorted(work.glob("part-*.pt2")):
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def write_model(folder: Path, sizes: dict[str, int], layers: int) -> None:
    """Write a random Llama, a shard a layer, if it is not there."""
    if (folder / "config.json").is_file():
        return
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    places = {}
    for index, tensors in enumerate(shards(sizes, layers, generator)):
        name = f"model-{index:05d}.safetensors"
        write_shard(folder / name, tensors)
        places |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=2048)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def shards(
    sizes: dict[str, int], layers: int, generator: torch.Generator
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of each shard."""
    width, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    keys = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]

    def matrix(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(torch.bfloat16)

    yield {"model.embed_tokens.weight": matrix(vocabulary, width)}
    for index in range(layers):
        shapes = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        layer = {f"model.layers.{index}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            layer[f"model.layers.{index}.{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        yield layer
    yield {
        "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
        "lm_head.weight": matrix(vocabulary, width),
    }


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file of bfloat16 tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + 2 * tensor.numel()],
        }
        end += 2 * tensor.numel()
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())


if __name__ == "__main__":
    main()
