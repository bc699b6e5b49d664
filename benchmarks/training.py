"""What compression during training keeps: accuracy dense, before training, after each epoch, and at the end.

    SQCOMPILE_DATA=… python benchmarks/training.py [--only sparse,int8,int4,macs,digits] [--json out.json]

ResNet-20 on CIFAR-10 images (trained on the first 3,000, judged on 1,000 others; the dense model was trained on
all of them and knows them by heart, so that only differences mean something): 90 % zeros in four rounds,
quantization-aware training at 8 bits and at 4-bit weights, and half of the multiply-accumulates removed. The training
function is plain PyTorch: it brings logits near those of the dense model, where weights go also what leaves the
residual blocks, on flipped and shifted images; no labels.

Then a CNN on handwritten digits, trained here in seconds, with a quarter of its multiply-accumulates, trained on
labels as well: accuracy, and latency against the dense model in each backend, in turns, at several batch sizes.
One of its 450 test images is 0.22 points.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternate, median_ratio, spread, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import sqcompile
from sqcompile.channels import count_macs
from sqcompile.channels.flow import flow_of
from sqcompile.distillation import distill_logits, distill_states
from sqcompile.evaluation import accuracy
from sqcompile.hidden import HiddenStates
from sqcompile.passes import (
    ApplyMasks,
    Calibrate,
    FineTune,
    FoldQDQ,
    FreezeObservers,
    InsertObservers,
    MaskWeights,
    PruneGradually,
    RemoveChannels,
    TrainQuantized,
    pipelines,
)
from sqcompile.quantization.format import Format
from sqcompile.training import Round

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits_cnn import train_digits_cnn

Row = dict[str, Any]
_THREADS = 1
_STATES_WEIGHT = 10.0  # the relative error of states is below 1, the divergence of logits begins far above


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="names of jobs, separated by commas")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(_THREADS)
    jobs: dict[str, Callable[[], Iterator[Row]]] = {
        **{name: lambda name=name: resnet20(name) for name in RESNET_JOBS},
        "digits": digits,
    }
    wanted = [name for name in options.only.split(",") if name] or list(jobs)
    if unknown := [name for name in wanted if name not in jobs]:
        parser.error(f"no job {unknown[0]}; there are {', '.join(jobs)}")
    if set(wanted) & set(RESNET_JOBS) and not os.environ.get("SQCOMPILE_DATA"):
        parser.error("set SQCOMPILE_DATA to the folder of the trained models")
    rows = [row for name in wanted for row in jobs[name]()]
    table = Table(
        "model", "compression", "dense", "untrained", "trained", "points lost", "at most", "seconds"
    )
    for row in rows:
        before = "" if row["untrained"] is None else f"{row['untrained']:.2f}"
        table.add_row(
            *(row["model"], row["compression"], f"{row['dense']:.2f}", before, f"{row['trained']:.2f}"),
            *(f"{row['lost']:.2f}", f"{row['allowed']:g}", f"{row['seconds']:.0f}"),
        )
    console = Console(width=130)
    console.print(table)
    for row in rows:
        console.print(f"{row['model']}, {row['compression']}, accuracy % after each epoch: {row['curve']}")
        for line in row.get("latency", ()):
            console.print(f"  {line}")
    write_json(options.json, "training", rows, threads=_THREADS)


@dataclass
class Distillation:
    """A training function: bring logits and hidden states near the teacher's, and keep the curve.

    Attributes:
        teacher: The dense model.
        images: Training images [N, C, H, W].
        judge: Returns the accuracy of a model in %, on images that no training sees.
        epochs: Passes over the images, in each round.
        rate: Highest learning rate of AdamW; it falls to zero along a cosine in each round.
        labels: Of the images, [N], to be learned as well, or None.
        states: Modules whose outputs are to be near the teacher's, too.
        flips: Whether a flipped image is as good.
        shift: By how many pixels an image may be shifted.
        curve: Accuracy before the first epoch, and after each.
    """

    teacher: nn.Module
    images: Tensor
    judge: Callable[[Any], float]
    epochs: int
    rate: float
    labels: Tensor | None = None
    states: tuple[str, ...] = ()
    flips: bool = True
    shift: int = 4
    curve: list[float] = field(default_factory=list)

    def __call__(self, module: nn.Module, now: Round) -> dict[str, float]:
        self.curve.append(round(self.judge(module), 2))
        optimizer = torch.optim.AdamW(module.parameters(), self.rate, weight_decay=1e-4)
        batches = len(self.images) // 64
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.rate, total_steps=self.epochs * batches, pct_start=0.1
        )
        teacher, student = HiddenStates(self.teacher, self.states), HiddenStates(module, self.states)
        for _ in range(self.epochs):
            module.train()
            for index in torch.randperm(len(self.images)).split(64)[:batches]:
                batch = self.changed(self.images[index])
                with torch.no_grad():
                    wanted = self.teacher(batch)
                logits = module(batch)
                loss = distill_logits(logits, wanted, temperature=2.0)
                if self.labels is not None:
                    loss = loss + F.cross_entropy(logits, self.labels[index])
                if self.states:
                    loss = loss + _STATES_WEIGHT * distill_states(student, teacher)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            module.eval()
            self.curve.append(round(self.judge(module), 2))
        teacher.close()
        student.close()
        print(f"  round {now.number} of {now.count}: {self.curve}", file=sys.stderr, flush=True)
        return {"accuracy %": self.curve[-1]}

    def changed(self, batch: Tensor) -> Tensor:
        """Shift a batch by up to `shift` pixels, and flip half of the batches."""
        height, width = batch.shape[-2:]
        batch = F.pad(batch, (self.shift,) * 4)
        top, left = torch.randint(0, 2 * self.shift + 1, (2,)).tolist()
        batch = batch[:, :, top : top + height, left : left + width]
        return batch.flip(-1) if self.flips and torch.rand(()) < 0.5 else batch


@dataclass(frozen=True)
class Job:
    """One way to compress, with the training that belongs to it, and the points that it may lose."""

    title: str
    epochs: int
    rate: float
    allowed: float
    passes: Callable[[Distillation], list[sqcompile.Pass]]
    states: tuple[str, ...] = ()


def pruned(train: Distillation) -> list[sqcompile.Pass]:
    # The classifier has 640 of 268,000 weights, and one threshold for all would take most of them.
    prune = MaskWeights(sparsity=0.9, scope="global", exclude=("linear",))
    return [PruneGradually(train=train, prune=prune, rounds=4), ApplyMasks(), *pipelines.canonical()]


def quantized(weight: str) -> Callable[[Distillation], list[sqcompile.Pass]]:
    def passes(train: Distillation) -> list[sqcompile.Pass]:
        return [
            *pipelines.canonical(),
            InsertObservers(weight=Format.parse(weight)),
            Calibrate(),
            TrainQuantized(train=train),
            FreezeObservers(),
            FoldQDQ(),
        ]

    return passes


def narrowed(train: Distillation) -> list[sqcompile.Pass]:
    # Inside of the blocks: what runs between them keeps its width, and can be brought near the teacher's.
    remove = RemoveChannels(macs=0.5, layers=("layer*.conv1",), compensate=True)
    return [remove, FineTune(train=train), *pipelines.canonical()]


BLOCKS = tuple(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3))

RESNET_JOBS = {
    "sparse": Job("90 % zeros, 4 rounds", 3, 2e-3, 2.0, pruned, BLOCKS),
    "int8": Job("8 bits, weights and values", 2, 1e-4, 0.3, quantized("int8:channel=0:narrow")),
    "int4": Job("4-bit weights, 8-bit values", 4, 5e-4, 1.0, quantized("int4:channel=0:narrow")),
    "macs": Job("half of the multiply-accumulates", 10, 2e-3, 2.0, narrowed, BLOCKS),
}


def resnet20(name: str) -> Iterator[Row]:
    job = RESNET_JOBS[name]
    data = Path(os.environ["SQCOMPILE_DATA"])
    sys.path.insert(0, str(data))
    from models import CifarResNet
    from safetensors.torch import load_file

    model = CifarResNet(3).eval()
    model.load_state_dict(load_file(data / "resnet20_cifar10/model.safetensors"))
    stored = np.load(data / "resnet20_cifar10/images.npz")
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (CifarResNet.MEAN, CifarResNet.STD))
    images = (torch.from_numpy(stored["x"]).permute(0, 3, 1, 2).float() / 255 - mean) / std
    labels = torch.from_numpy(stored["y"].astype(np.int64))

    def judge(module: Any) -> float:
        return 100 * accuracy(module, images[3000:], labels[3000:])

    train = Distillation(model, images[:3000], judge, job.epochs, job.rate, states=job.states)
    yield compress(
        "ResNet-20",
        job,
        model,
        train,
        calibration=list(images[:512].split(64)),
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
    )[0]


def compress(
    title: str, job: Job, model: nn.Module, train: Distillation, **options: Any
) -> tuple[Row, sqcompile.Compiled]:
    print(f"{title}: {job.title} …", file=sys.stderr, flush=True)
    dense = train.judge(model)
    started = time.perf_counter()
    compiled = sqcompile.compile(model, passes=job.passes(train), backend="onnxruntime", **options)
    seconds = time.perf_counter() - started
    assert isinstance(compiled, sqcompile.Compiled)
    trained = train.judge(compiled)
    return {
        "model": title,
        "compression": job.title,
        "dense": dense,
        "untrained": train.curve[0],
        "trained": trained,
        "lost": dense - trained,
        "allowed": job.allowed,
        "seconds": seconds,
        "curve": list(train.curve),
    }, compiled


def digits() -> Iterator[Row]:
    model, data = train_digits_cnn()

    def judge(module: Any) -> float:
        return 100 * accuracy(module, data.test_images, data.test_labels)

    def passes(train: Distillation) -> list[sqcompile.Pass]:
        return [RemoveChannels(macs=0.25, compensate=True), FineTune(train=train), *pipelines.canonical()]

    job = Job("a quarter of the multiply-accumulates", 60, 1e-2, 0.5, passes)
    train = Distillation(
        model, data.train_images, judge, job.epochs, job.rate, data.train_labels, flips=False, shift=1
    )
    shapes = {"x": {0: torch.export.Dim("batch")}}
    calibration = list(data.train_images[:512].split(64))
    row, compiled = compress("digits CNN", job, model, train, calibration=calibration, dynamic_shapes=shapes)
    macs = [count_macs(flow_of(program)) for program in (compiled.original, compiled.program)]
    row["macs"] = macs
    row["compression"] += f" ({macs[0] / macs[1]:.2f}x fewer)"
    row["latency"] = list(latencies(model, compiled.program, data.test_images, shapes))
    yield row


def latencies(model: nn.Module, small: sqcompile.Program, images: Tensor, shapes: Any) -> Iterator[str]:
    """Yield, for each backend and batch, how much faster the smaller model is, both called in turns."""
    for name in ("onnxruntime", "native"):
        try:
            sessions = {
                "dense": lowered(model, pipelines.canonical(), name, images, shapes),
                "small": lowered(small, [], name, images, shapes),
            }
        except sqcompile.Error as error:
            yield f"{name}: does not run it: {str(error).splitlines()[0]}"
            continue
        for batch in (1, 64, 400):
            rows = images[:batch].contiguous()
            times = alternate(
                {key: lambda session=session, rows=rows: session(rows) for key, session in sessions.items()},
                runs=50,
            )
            yield (
                f"{name}, {batch} images a call: {median_ratio(times['dense'], times['small']):.2f}x faster, "
                f"dense {spread(times['dense'])}, small {spread(times['small'])}"
            )


def lowered(model: Any, passes: list[sqcompile.Pass], backend: str, images: Tensor, shapes: Any) -> Any:
    options = {} if isinstance(model, sqcompile.Program) else {"dynamic_shapes": shapes}
    return sqcompile.compile(model, passes=passes, example_inputs=(images[:8],), backend=backend, **options)


if __name__ == "__main__":
    main()
