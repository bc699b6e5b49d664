"""Train a small Llama on the running Python's standard library: the model of pycode_llama_5m.

    python examples/train_pycode_llama.py --output /tmp/llama --steps 3000
    python examples/train_pycode_llama.py --evaluate examples/pycode_llama_5m

The folder that it writes loads with transformers (`AutoModelForCausalLM.from_pretrained`) and holds
`tokens.npz` beside the model: `eval` [200, 256] from modules that training never saw, and `calib`
[128, 256] from the others. A run that was stopped goes on where its last checkpoint was written.
"""

import argparse
import math
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HELD_OUT = frozenset(
    "argparse configparser csv fractions heapq queue shlex statistics textwrap zipfile".split()
)
# Not source that a person wrote to be read: tests, generated tables, other people's packages.
LEFT_OUT = frozenset("encodings idle_test lib2to3 pydoc_data site-packages dist-packages test tests".split())

CONTEXT, BATCH = 256, 32
VOCABULARY, BOS, EOS = 2048, 0, 1
PEAK_RATE, WARM_UP = 2e-3, 0.02
CHECKPOINT_SECONDS = 60


def read_sources() -> tuple[list[str], list[str]]:
    """The standard library's texts: those to train on, and those held out."""
    root = Path(sysconfig.get_path("stdlib"))
    training, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if LEFT_OUT.intersection(parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        (held_out if parts[0] in HELD_OUT else training).append(text)
    return training, held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: any text can be encoded, so there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one stream, each between <s> and </s>. Token ids [tokens], int64."""
    stream = [[BOS, *item.ids, EOS] for item in tokenizer.encode_batch(texts)]
    return torch.tensor([token for ids in stream for token in ids])


def windows(stream: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Random pieces of the stream [count, CONTEXT]."""
    starts = torch.randint(len(stream) - CONTEXT, (count,), generator=generator)
    return torch.stack([stream[start : start + CONTEXT] for start in starts.tolist()])


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """exp of the mean loss over every predicted token of `tokens` [rows, length]."""
    model.eval()
    loss = 0.0
    for rows in tokens.split(8):
        logits = model(input_ids=rows).logits[:, :-1]
        loss += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return math.exp(loss / tokens[:, 1:].numel())


def new_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def new_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine down to a tenth; progress 0..1."""
    if progress < WARM_UP:
        return PEAK_RATE * max(progress / WARM_UP, 0.05)
    cosine = 0.5 * (1 + math.cos(math.pi * min((progress - WARM_UP) / (1 - WARM_UP), 1.0)))
    return PEAK_RATE * (0.1 + 0.9 * cosine)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename: a crash leaves the old file or the new one, never half of one."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def train(output: Path, steps: int, minutes: float, seed: int) -> None:
    """Train, write the folder, print the held-out perplexity."""
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / "checkpoint.pt"
    training_texts, held_out_texts = read_sources()
    tokenizer = train_tokenizer(training_texts)
    stream = encode(tokenizer, training_texts)
    generator = torch.Generator().manual_seed(seed)
    held_out = windows(encode(tokenizer, held_out_texts), 200, generator)
    calibration = windows(stream, 128, generator)
    print(f"{len(training_texts)} files, {len(stream):,} tokens; held out: {len(held_out_texts)} files")

    torch.manual_seed(seed)
    model = new_model()
    optimizer = new_optimizer(model)
    first, spent = 0, 0.0
    settings = {"steps": steps, "minutes": minutes, "seed": seed, "tokens": len(stream)}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            sys.exit(
                f"{checkpoint} belongs to a run with {state['settings']}, this one has {settings}: "
                "use the same options to go on with it, or another --output to start anew"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
        print(f"going on at step {first}")

    started = saved = reported = time.monotonic()
    for step in range(first, steps):
        seconds = spent + time.monotonic() - started
        progress = max(step / steps, seconds / (60 * minutes))  # whichever limit comes first
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        # A generator of its own for each step: a resumed run draws what the whole run would have.
        batch = windows(stream, BATCH, torch.Generator().manual_seed(seed * 1_000_003 + step))
        logits = model(input_ids=batch).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        now = time.monotonic()
        if step == first or now - reported > 10:
            reported = now
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
        if now - saved > CHECKPOINT_SECONDS:
            saved = now
            state = {
                "settings": settings,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "seconds": spent + now - started,
            }
            replace_file(checkpoint, lambda path, state=state: torch.save(state, path))

    model.half().float()  # the perplexity of what is stored
    print(f"held-out perplexity {perplexity(model, held_out):.2f}")
    write_folder(output, model, tokenizer, {"eval": held_out, "calib": calibration})
    checkpoint.unlink(missing_ok=True)


def write_folder(
    output: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, tokens: dict[str, torch.Tensor]
) -> None:
    """fp16 weights, configuration, tokenizer and tokens; each file appears whole."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=512
    )
    compact = {name: ids.numpy().astype(np.int16) for name, ids in tokens.items()}  # ids < 2048
    with tempfile.TemporaryDirectory(dir=output, prefix=".part-") as folder:
        wrapped.save_pretrained(folder)
        model.half().save_pretrained(folder)
        np.savez_compressed(Path(folder) / "tokens.npz", **compact)
        for path in files_weights_last(Path(folder)):
            os.replace(path, output / path.name)
    print(f"wrote {output}")


def files_weights_last(folder: Path) -> Iterator[Path]:
    """The weights last: a folder that has them has everything."""
    yield from sorted(folder.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name))


def evaluate(folder: Path) -> None:
    """Print the perplexity of a written folder on its held-out tokens, computed in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.from_numpy(np.load(folder / "tokens.npz")["eval"].astype(np.int64))
    print(f"held-out perplexity {perplexity(model, tokens):.2f}, {tokens.numel():,} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("examples/output/pycode_llama"), help="folder")
    parser.add_argument("--steps", type=int, default=3000, help="of 32 pieces of 256 tokens (%(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop by then (no limit)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="only print a folder's perplexity")
    options = parser.parse_args()
    if options.evaluate:
        evaluate(options.evaluate)
    else:
        train(options.output, options.steps, options.minutes, options.seed)


if __name__ == "__main__":
    main()
