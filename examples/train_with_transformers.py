"""A pruned language model distilled by a Hugging Face Trainer, between two passes of one compilation.

    pip install transformers accelerate
    python examples/train_with_transformers.py [--steps 40]

The training function is given an ordinary module, called as the model is; the trainer needs to be told the loss.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import sqcompile
from sqcompile.distillation import distill_logits
from sqcompile.evaluation import logits_of, perplexity
from sqcompile.passes import ApplyMasks, FineTune, MaskWeights, pipelines

FOLDER = Path(__file__).parent / "pycode_llama_5m"


class Distillation(Trainer):
    """Brings the logits near those of a teacher."""

    def __init__(self, teacher: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self.teacher = teacher.eval()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **rest: Any
    ) -> Any:
        with torch.no_grad():
            wanted = logits_of(self.teacher(**inputs))
        outputs = model(**inputs)
        loss = distill_logits(logits_of(outputs), wanted)
        return (loss, outputs) if return_outputs else loss


def distill(module: nn.Module, teacher: nn.Module, rows: Tensor, steps: int) -> float:
    """The training function: any argument and callback of the trainer goes here; returns the mean loss."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=5e-4,
            lr_scheduler_type="cosine",
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            remove_unused_columns=False,
        )
        trainer = Distillation(
            teacher, model=module, args=arguments, train_dataset=[{"input_ids": row} for row in rows]
        )
        result = trainer.train()
    module.eval()
    return float(result.training_loss)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    stored = {
        key: torch.from_numpy(value.astype(np.int64)) for key, value in np.load(FOLDER / "tokens.npz").items()
    }
    teacher = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    prune = MaskWeights(sparsity=0.5, exclude=("lm_head",))
    train = FineTune(train=lambda module: distill(module, teacher, stored["calib"], options.steps))
    after = [ApplyMasks(), *pipelines.canonical()]
    for title, passes in {
        "dense": after,
        "50 % zeros": [prune, *after],
        "50 % zeros, distilled": [prune, train, *after],
    }.items():
        compiled = sqcompile.compile(
            FOLDER, passes=passes, example_inputs={"input_ids": stored["calib"][:2]}, backend="reference"
        )
        print(f"{title}: perplexity {perplexity(compiled, stored['eval'][:40]):.2f}")


if __name__ == "__main__":
    main()
