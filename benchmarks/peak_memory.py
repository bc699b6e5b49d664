"""Peak memory of text generation with a `.sqm` file, beside the file and the cache of keys and values.

    python benchmarks/peak_memory.py model.sqm [--prompt 128] [--tokens 32] [--threads 2] [--kv-cache int8]

Measured in this process, which has loaded Python and PyTorch before and forgets its old peak then (Linux): what
counts is how far resident memory rises from there, the mapped file included. *Beyond* is what is left of it
without the file and the cache: memory of activations, prepared sizes, threads and results. Bits a weight divide
the whole file by the weights that are multiplied or looked up, `--weights` of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sqcompile.backends.native import session as _  # noqa: F401  (what it imports belongs to the state before)
from sqcompile.backends.native.backend import BACKEND

LIMIT = 64 << 20


def peak_of(
    path: Path, *, prompt: int, tokens: int, threads: int, kv_cache: str = "float32", rows: int = 1
) -> dict[str, Any]:
    """Generate with a model and return sizes in bytes: file, cache, peak and beyond."""
    forget_peak()
    before = status("VmRSS")
    session: Any = BACKEND.load(path, threads=threads)
    generator = session.generator(rows=rows, capacity=prompt + tokens, kv_cache=kv_cache)
    vocabulary = session.model.vocabulary
    texts = {row: [(7 * place + row) % vocabulary for place in range(prompt)] for row in range(rows)}
    generator.generate(texts, tokens)
    peak = status("VmHWM") - before
    file_bytes = path.stat().st_size
    return {
        "file_bytes": file_bytes,
        "cache_bytes": generator.cache_bytes,
        "peak_bytes": peak,
        "beyond_bytes": peak - file_bytes - generator.cache_bytes,
    }


def forget_peak() -> None:
    """Let the peak of resident memory begin again, from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def status(name: str) -> int:
    """Return a size from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--kv-cache", default="float32", choices=("float32", "int8"))
    parser.add_argument("--weights", type=float, help="weights of the model, to print bits of each")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = peak_of(
        options.model,
        prompt=options.prompt,
        tokens=options.tokens,
        threads=options.threads,
        kv_cache=options.kv_cache,
        rows=options.rows,
    )
    if options.json:
        print(json.dumps(found))
        return
    for name, size in found.items():
        print(f"{name.removesuffix('_bytes'):<8}{size / 2**20:>9.1f} MiB")
    if options.weights:
        print(f"{'bits':<8}{8 * found['file_bytes'] / options.weights:>9.3f} a weight")
    verdict = "met" if found["beyond_bytes"] <= LIMIT else "missed"
    print(f"at most {LIMIT >> 20} MiB beyond file and cache: {verdict}")


if __name__ == "__main__":
    main()
