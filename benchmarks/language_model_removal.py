"""Heads and neurons removed from a language model in one shot: perplexity with and without compensation.

    python benchmarks/language_model_removal.py [--importance l2,activation] [--rows 128] [--json out.json]

A quarter of the neurons and of the heads of every layer of pycode-llama-5m goes, ranked by each importance,
once as they are and once with the layers behind refitted. `share` is the rise of the perplexity over the dense
model's as a part of the rise without compensation. Held-out tokens are those of `tokens.npz`; calibration
sees others. Below the table, what the compensated models write on from the same words, each token the likeliest.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_json
from rich.console import Console
from rich.table import Table

import sqcompile
from sqcompile.evaluation import logits_of, perplexity
from sqcompile.passes import RemoveHeads, RemoveNeurons

FOLDER = Path(__file__).parents[1] / "examples" / "pycode_llama_5m"
IMPORTANCES = ("l2", "activation", "taylor", "hessian")
PROMPT = "def read_config(path):\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--importance", default=",".join(IMPORTANCES))
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--rows", type=int, default=128, help="rows of calibration tokens")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    stored = {
        key: torch.from_numpy(value.astype(np.int64)) for key, value in np.load(FOLDER / "tokens.npz").items()
    }
    calibration = [{"input_ids": rows} for rows in stored["calib"][: options.rows].split(8)]
    dense = compiled([], calibration)
    base = perplexity(dense.program, stored["eval"])
    table = Table("importance", "compensated", "perplexity", "share of the rise", "MACs left", "seconds")
    table.add_row("dense", "", f"{base:.2f}", "", "1.00", "")
    samples = {"dense": written(dense.program)}
    rows: list[dict[str, Any]] = []
    for importance in options.importance.split(","):
        rise = 0.0
        for compensate in (False, True):
            settings: Any = {"ratio": options.ratio, "importance": importance, "compensate": compensate}
            started = time.perf_counter()
            result = compiled([RemoveNeurons(**settings), RemoveHeads(**settings)], calibration)
            seconds = time.perf_counter() - started
            found = perplexity(result.program, stored["eval"])
            rise = rise or found - base
            macs = [record.facts["macs"] for record in result.report.passes]
            row = {
                "importance": importance,
                "compensated": compensate,
                "perplexity": found,
                "share": (found - base) / rise,
                "macs_left": macs[-1]["after"] / macs[0]["before"],
                "seconds": seconds,
            }
            rows.append(row)
            table.add_row(
                importance,
                "yes" if compensate else "no",
                f"{found:.2f}",
                f"{row['share']:.3f}",
                f"{row['macs_left']:.2f}",
                f"{seconds:.0f}",
            )
            print(importance, compensate, f"{found:.3f}", flush=True)
        samples[importance] = written(result.program)
    console = Console(width=120)
    console.print(table)
    for name, text in samples.items():
        console.rule(name)
        console.print(text, markup=False, highlight=False)
    write_json(options.json, "language_model_removal", rows, dense=base, samples=samples)


def compiled(passes: list[Any], calibration: list[Any]) -> sqcompile.Compiled:
    result = sqcompile.compile(FOLDER, passes, calibration=calibration, backend="reference", verify="ends")
    assert isinstance(result, sqcompile.Compiled)
    return result


def written(model: Callable[..., Any], tokens: int = 64) -> str:
    """Return what a model writes after the prompt, each token the likeliest."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        for _ in range(tokens):
            next_id = logits_of(model(input_ids=ids))[:, -1:].argmax(-1)
            ids = torch.cat([ids, next_id], 1)
    text: str = tokenizer.decode(ids[0])
    return text


if __name__ == "__main__":
    main()
