"""What a short distillation wins back of a language model that was compressed in one shot.

    python benchmarks/recovery.py [--only dense,half,most,narrow,blocks] [--resume folder] [--json out.json]

The model is pycode-llama-5m (perplexity on modules that it never saw); the text to distil on is Python's own
standard library without those modules. The training function is plain PyTorch: it brings the logits near
those of the dense model, and learns the text's own next tokens (`--labels 0` leaves them out). Only one thread of
the CPU is used.

- `half`, `most`: 50 % and 70 % of the weights pruned (SparseGPT), distilled with the masks held, then 4 bits
  (GPTQ); beside the dense model in one shot at 3 and at 2 bits (GPTQ), which take about as many bytes. Of 64 weights in
  a row 19 are left at 70 %, and share a scale; dense weights share theirs by 32, as at 50 %.
- `narrow`: a quarter of the FFN's neurons and of the attention heads removed with compensation, then distilled.
- `blocks`: half of the weights pruned by size, then each block distilled alone, without labels, on 64 rows.

`writes Python`: each model goes on from the first lines of the functions of the modules that it never saw, 64 tokens
each, always the likeliest; the share of texts that Python can parse as far as they go,
without a last line that is not whole.

Bytes are those of the stored linear layers, without embedding and head: scales, zero points, and codes; where weights
were pruned the codes of those that are left, and one bit a weight that says which. The file of the native engine,
beside them, holds the whole model, and stores what it runs fastest, not what is smallest.
"""

from __future__ import annotations

import argparse
import ast
import codeop
import logging
import random
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import load_training, save_training, write_json
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import sqcompile
from sqcompile.distillation import distill_logits
from sqcompile.evaluation import logits_of, perplexity
from sqcompile.models import load_model
from sqcompile.passes import (
    GPTQ,
    ApplyMasks,
    DistillBlocks,
    FineTune,
    FoldQDQ,
    MaskWeights,
    RemoveHeads,
    RemoveNeurons,
    SparseGPT,
    pipelines,
)
from sqcompile.quantization.format import Format, PerGroup

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from train_pycode_llama import BOS, EOS, encode, read_sources  # noqa: E402

FOLDER = EXAMPLES / "pycode_llama_5m"
CONTEXT, BATCH = 256, 8
Passes = list[sqcompile.Pass]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="dense,half,most,narrow,blocks", help="names of jobs, separated by commas"
    )
    parser.add_argument(
        "--steps", type=int, help=f"of {BATCH} rows of {CONTEXT} tokens, instead of the job's own"
    )
    parser.add_argument(
        "--labels",
        type=float,
        default=0.5,
        help="share of the text itself in the loss, 0 to 1; the rest is the teacher's",
    )
    parser.add_argument("--rate", type=float, help="highest learning rate, instead of the job's own")
    parser.add_argument(
        "--resume", type=Path, help="folder of checkpoints: a run that was cut off goes on where it was"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    stored = {
        key: torch.from_numpy(value.astype(np.int64)) for key, value in np.load(FOLDER / "tokens.npz").items()
    }
    wanted = options.only.split(",")
    jobs = {name: passes for name, passes in all_jobs().items() if name in wanted}
    teacher = load_model(FOLDER)
    assert isinstance(teacher, nn.Module)
    rows: list[dict[str, Any]] = []
    for name, ways in jobs.items():
        schedule = SCHEDULES.get(name, Schedule())
        steps, rate = options.steps or schedule.steps, options.rate or schedule.rate
        text = rows_of_text(steps * BATCH)
        for title, passes in ways.items():
            train = Distillation(teacher, text, stored["eval"], rate, options.labels, schedule.hold)
            if options.resume:
                train.checkpoint = options.resume / f"{name}-{steps}-{rate:g}.pt"
            print(f"{name}: {title} …", file=sys.stderr, flush=True)
            rows.append({"job": name, "way": title, **measure(passes(train), train, stored)})
            print(f"  {rows[-1]}", file=sys.stderr, flush=True)
    table = Table(
        *("job", "way", "perplexity", "bytes of layers", "native file", "writes Python", "training, CPU s")
    )
    for row in rows:
        trained = f"{row['training_cpu_s']:.0f}" if row["training_cpu_s"] else ""
        sizes = (f"{row['layer_bytes']:,}", f"{row['file_bytes']:,}")
        parses = f"{row['parses']:.0%} of {row['texts']}"
        table.add_row(row["job"], row["way"], f"{row['perplexity']:.3f}", *sizes, parses, trained)
    console = Console(width=130)
    console.print(table)
    for row in rows:
        if row["curve"]:
            console.print(
                f"{row['job']}, {row['way']}: perplexity of 40 rows before and while training: {row['curve']}"
            )
    for row in rows:
        console.rule(f"{row['job']}, {row['way']}")
        console.print(row["sample"], markup=False, highlight=False)
    write_json(options.json, "recovery", rows, labels=options.labels)


def rows_of_text(count: int) -> Tensor:
    """Return [count, CONTEXT] tokens of the training modules, in an order that is always the same."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    sources, _ = read_sources()
    random.Random(0).shuffle(sources)
    rows: list[Tensor] = []
    while sum(map(len, rows)) < count:
        if not sources:
            raise SystemExit(f"the standard library has no more than {sum(map(len, rows))} rows of text")
        stream = encode(tokenizer, [sources.pop() for _ in range(min(8, len(sources)))])
        rows.append(stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT))
    order = torch.randperm(sum(map(len, rows)), generator=torch.Generator().manual_seed(0))
    return torch.cat(rows)[order[:count]]


@dataclass(frozen=True)
class Schedule:
    """How a job trains.

    Attributes:
        steps: Of BATCH rows.
        rate: Highest learning rate.
        hold: Whether it stays there from step 30 until 60 % of the steps are done, and falls to zero in a line;
            otherwise it rises in the first tenth, and falls along a cosine.
    """

    steps: int = 300
    rate: float = 5e-4
    hold: bool = False


SCHEDULES = {"most": Schedule(450, 1e-3, hold=True), "narrow": Schedule(150)}


@dataclass
class Distillation:
    """A training function: bring the logits near the teacher's, once over the text."""

    teacher: nn.Module
    text: Tensor
    held_out: Tensor
    rate: float
    labels: float
    hold: bool = False
    checkpoint: Path | None = None
    seconds: float = 0.0
    curve: list[float] = field(default_factory=list)

    def __call__(self, module: nn.Module) -> dict[str, float]:
        batches = self.text.split(BATCH)
        parameters = [item for item in module.parameters() if item.requires_grad]
        optimizer = torch.optim.AdamW(parameters, self.rate, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = self.schedule(optimizer, len(batches))
        parts = module, optimizer, schedule
        saved = load_training(self.checkpoint, *parts)
        done, self.seconds, self.curve = (
            saved.get("done", 0),
            saved.get("seconds", 0.0),
            saved.get("curve", []),
        )
        if not done:
            self.judge(module)
        loss = torch.full((), torch.nan)
        for number, rows in enumerate(batches[done:], done + 1):
            started = time.thread_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
                with torch.no_grad():
                    wanted = logits_of(self.teacher(input_ids=rows))
                logits = logits_of(module(input_ids=rows))
            loss = (1 - self.labels) * distill_logits(logits.float(), wanted.float())
            if self.labels:
                predicted = logits[:, :-1].float().flatten(0, 1)
                loss = loss + self.labels * F.cross_entropy(predicted, rows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            self.seconds += time.thread_time() - started
            if number % max(1, len(batches) // 3) == 0:
                self.judge(module)
            if number % 50 == 0 or number == len(batches):
                facts = {"done": number, "seconds": self.seconds, "curve": self.curve}
                save_training(self.checkpoint, facts, *parts)
        return {} if done == len(batches) else {"loss": float(loss.detach())}

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        if not self.hold:
            return torch.optim.lr_scheduler.OneCycleLR(
                optimizer, self.rate, total_steps=steps, pct_start=0.1, div_factor=10
            )
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: min(1.0, (done + 1) / 30, (steps - done) / (0.4 * steps))
        )

    def judge(self, module: nn.Module) -> None:
        self.curve.append(round(perplexity(module, self.held_out[:40]), 3))
        print(f"  {self.seconds:.0f} CPU s: {self.curve}", file=sys.stderr, flush=True)


def all_jobs() -> dict[str, dict[str, Any]]:
    """Return by job the ways to do it, each a function of the training function."""
    return {
        "dense": {"dense": lambda train: []},
        "half": {
            "dense, 3 bits in one shot": lambda train: rounded(3),
            "50 % zeros, 4 bits, in one shot": lambda train: pruned(0.5, None),
            "50 % zeros, distilled, 4 bits": lambda train: pruned(0.5, train),
        },
        "most": {
            "dense, 2 bits in one shot": lambda train: rounded(2),
            "70 % zeros, 4 bits, in one shot": lambda train: pruned(0.7, None, group=64),
            "70 % zeros, distilled, 4 bits": lambda train: pruned(0.7, train, group=64),
        },
        "narrow": {
            "25 % of neurons and heads removed": lambda train: narrowed(None),
            "25 % of neurons and heads removed, distilled": narrowed,
        },
        "blocks": {
            "50 % zeros by size, in one shot": lambda train: [by_size()],
            "50 % zeros by size, blocks distilled": lambda train: [by_size(), DistillBlocks()],
        },
    }


def rounded(bits: int, group: int = 32) -> Passes:
    """Round the linear layers in one shot; embedding and head have 8 bits."""
    weight = Format(bits=bits, signed=False, symmetric=False, granularity=PerGroup(group))
    eight = (("kind:embedding", pipelines.INT8_WEIGHT), ("kind:head", pipelines.INT8_WEIGHT))
    return [*pipelines.canonical(), GPTQ(weight=weight, formats=eight), FoldQDQ()]


def pruned(sparsity: float, train: Distillation | None, group: int = 32) -> Passes:
    """Prune, train if there is a function, and round what is left to 4 bits."""
    canonical = pipelines.canonical()
    return [
        *canonical,
        SparseGPT(sparsity=sparsity, exclude=("lm_head",), refit=True),
        *([FineTune(train=train)] if train else []),
        ApplyMasks(),
        *rounded(4, group)[len(canonical) :],
    ]


def by_size() -> sqcompile.Pass:
    return MaskWeights(sparsity=0.5, exclude=("kind:embedding", "kind:head"))


def narrowed(train: Distillation | None) -> Passes:
    return [
        RemoveHeads(ratio=0.25, compensate=True),
        RemoveNeurons(ratio=0.25, compensate=True),
        *([FineTune(train=train)] if train else []),
        *pipelines.canonical(),
    ]


def measure(passes: Passes, train: Distillation, stored: dict[str, Tensor]) -> dict[str, Any]:
    compiled = sqcompile.compile(
        FOLDER,
        passes=passes,
        calibration=[{"input_ids": rows} for rows in stored["calib"][:64].split(8)],
        dynamic_shapes={"input_ids": {0: Dim("batch"), 1: Dim("sequence", max=512)}},
        backend="native",
    )
    assert isinstance(compiled, sqcompile.Compiled)
    inner = [row for row in compiled.report.layers if row.name.startswith("model.layers")]
    return {
        "perplexity": perplexity(compiled, stored["eval"]),
        "layer_bytes": sum(row.size_bytes for row in inner) - saved_bytes(compiled.program),
        "file_bytes": compiled.report.file_bytes,
        "training_cpu_s": train.seconds,
        "curve": list(train.curve),
        **written(compiled),
    }


def written(compiled: sqcompile.Compiled, tokens: int = 64) -> dict[str, Any]:
    """Let a model write functions; return how many it began, the share that parses, and one of them."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    texts = []
    for start in signatures():
        ids = [BOS, *tokenizer.encode(start).ids]
        row = compiled.generate([ids], tokens, eos_token_id=EOS)[0]
        texts.append(tokenizer.decode(list(row)))
    return {"texts": len(texts), "parses": sum(map(parses, texts)) / len(texts), "sample": texts[0]}


def signatures() -> list[str]:
    """Return the first lines of functions of the modules that the model never saw, and the next one's indentation."""
    found = []
    for text in read_sources()[1]:
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and not node.decorator_list:
                line = text.splitlines()[node.lineno - 1]
                if line.endswith(":"):
                    found.append(f"{line}\n   ")  # tokens of words begin with the last space before them
    return found


def parses(text: str) -> bool:
    """Whether the whole lines of a text are Python, or the beginning of some."""
    try:
        codeop.compile_command(text[: text.rfind("\n") + 1], symbol="exec")
    except (SyntaxError, ValueError, OverflowError):
        return False
    return True


def saved_bytes(program: sqcompile.Program) -> int:
    """Return what 4-bit codes of pruned weights would take, less the bits that say which are kept."""
    masks = [promise.mask for name, promise in program.sparsity.items() if name.startswith("model.layers")]
    return sum(int((~mask).sum()) // 2 - mask.numel() // 8 for mask in masks)


if __name__ == "__main__":
    main()
