"""A pruned CNN fine-tuned by a Lightning trainer, between two passes of one compilation.

    pip install lightning scikit-learn
    python examples/train_with_lightning.py [--epochs 8]

The training function is given an ordinary module: it goes into a LightningModule as any other would.
"""

import argparse
import logging
import warnings

import lightning
import torch
from digits_cnn import load_data, train_digits_cnn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sqcompile
from sqcompile.evaluation import accuracy
from sqcompile.passes import ApplyMasks, FineTune, MaskWeights, pipelines


class Recovery(lightning.LightningModule):
    """Trains the module that it wraps, in place."""

    def __init__(self, module: nn.Module, rate: float) -> None:
        super().__init__()
        self.module, self.rate = module, rate

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.module(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.module.parameters(), self.rate)


def fine_tune(module: nn.Module, epochs: int = 8) -> None:
    """The training function: any Lightning callback, logger or strategy goes here."""
    data = load_data()
    loader = DataLoader(TensorDataset(data.train_images, data.train_labels), batch_size=64, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Recovery(module.train(), rate=2e-3), loader)
    module.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    model, data = train_digits_cnn()
    prune = MaskWeights(sparsity=0.8)
    after = [ApplyMasks(), *pipelines.canonical()]
    for title, passes in {
        "dense": after,
        "80 % zeros": [prune, *after],
        "80 % zeros, fine-tuned": [
            prune,
            FineTune(train=lambda module: fine_tune(module, options.epochs)),
            *after,
        ],
    }.items():
        compiled = sqcompile.compile(
            model,
            passes=passes,
            example_inputs=(data.train_images[:8],),
            dynamic_shapes={"x": {0: "batch"}},
            backend="onnxruntime",
        )
        print(f"{title}: {accuracy(compiled, data.test_images, data.test_labels):.2%}")


if __name__ == "__main__":
    main()
