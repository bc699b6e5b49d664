"""What compression during training keeps: accuracy dense, before training, during it, and at the end.

    SQCOMPILE_DATA=… python benchmarks/training.py [--only NAMES] [--epochs N] [--work FOLDER] [--json out.json]

NAMES are some of sparse, int8, int4, macs, one-shot, scopes and digits, separated by commas.

ResNet-20 on CIFAR-10 images (trained on the first 3,000, judged on 1,000 others; the dense model was trained on
all of them and knows them by heart, so that only differences mean something): 90 % zeros in three rounds,
quantization-aware training at 8 bits and at 4-bit weights, and half of the multiply-accumulates removed. The training
function is plain PyTorch and reads no labels. Quantized models bring logits near those of the dense one. Where weights
go, only what leaves the residual blocks is brought near the dense model's, on images and on windows into collages of
them: it says far more about each image than ten logits do, so that what is learned from few images holds for others.
`as the dense` is the share of the other images that the compressed model puts into the class that the dense one does.
`one-shot` trains nothing and shows what each way to remove weights leaves to be trained; so does `scopes`: it
removes half of the multiply-accumulates in one shot, with compensation, by each way to share the loss among layers.

Then CNNs on handwritten digits, from several seeds, trained here in seconds, with a quarter of their
multiply-accumulates, trained on labels as well: accuracy, and for the first one latency against the dense model in each
backend, in turns, at several batch sizes. One of the 450 test images is 0.22 points.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from common import alternate, load_training, median_ratio, save_training, spread, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import sqcompile
from sqcompile.channels import count_macs
from sqcompile.channels.flow import flow_of
from sqcompile.channels.select import Scope
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
    SparseGPT,
    TrainQuantized,
    Wanda,
    pipelines,
)
from sqcompile.quantization.format import Format
from sqcompile.training import Round, Trainable

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits_cnn import Digits, train_digits_cnn

Row = dict[str, Any]
_THREADS = 1
_DIGITS_SEEDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="names of jobs, separated by commas")
    parser.add_argument(
        "--work", type=Path, help="folder where trainings on ResNet-20 are kept, to go on from"
    )
    parser.add_argument("--epochs", type=int, help="train ResNet-20 for so many epochs at the end")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(_THREADS)
    jobs: dict[str, Callable[[], Iterator[Row]]] = {
        **{
            name: lambda name=name, job=job: resnet20(
                replace(job, epochs=options.epochs or job.epochs), options.work and options.work / name
            )
            for name, job in RESNET_JOBS.items()
        },
        "one-shot": one_shot,
        "scopes": scopes,
        "digits": digits,
    }
    wanted = [name for name in options.only.split(",") if name] or list(jobs)
    if unknown := [name for name in wanted if name not in jobs]:
        parser.error(f"no job {unknown[0]}; there are {', '.join(jobs)}")
    if set(wanted) - {"digits"} and not os.environ.get("SQCOMPILE_DATA"):
        parser.error("set SQCOMPILE_DATA to the folder of the trained models")
    rows = [row for name in wanted for row in jobs[name]()]
    table = Table(
        *("model", "compression", "dense", "untrained", "trained", "points lost", "at most"),
        *("as the dense", "training, CPU s"),
    )
    for row in rows:
        before = "" if row["untrained"] is None else f"{row['untrained']:.2f}"
        table.add_row(
            *(row["model"], row["compression"], f"{row['dense']:.2f}", before, f"{row['trained']:.2f}"),
            *(f"{row['lost']:.2f}", "" if row["allowed"] is None else f"{row['allowed']:g}"),
            *(f"{row['agreement']:.2f}", f"{row['training_cpu_s']:.0f}"),
        )
    console = Console(width=130)
    console.print(table)
    for row in rows:
        if row["curve"]:
            console.print(f"{row['model']}, {row['compression']}, accuracy % while training: {row['curve']}")
        for line in row.get("latency", ()):
            console.print(f"  {line}")
    write_json(options.json, "training", rows, threads=_THREADS)


@dataclass
class Distillation:
    """A training function: bring logits, or hidden states, near the teacher's, and keep the curve.

    The learning rate rises, and falls to zero along a cosine, in each round. The last quarter of the epochs uses the
    running statistics of batch norms, as the compressed model will.

    Attributes:
        teacher: The dense model.
        images: Training images [N, C, H, W].
        judge: Returns the accuracy of a model in %, on images that no training sees.
        epochs: Passes over the images, in the last round.
        rate: Highest learning rate of AdamW.
        labels: Of the images, [N], to be learned as well, or None.
        states: Modules whose outputs are to be near the teacher's, instead of the logits.
        flips: Whether a flipped image is as good.
        shift: By how many pixels an image may be shifted.
        earlier: Passes over the images in the rounds before the last.
        checkpoint: How the files begin where each round is kept after each epoch, and goes on from, if any.
        curve: Accuracy before the first epoch, and ten times in a round.
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
    earlier: int = 0
    checkpoint: Path | None = None
    curve: list[float] = field(default_factory=list)
    cpu_s: float = 0.0

    def __call__(self, module: nn.Module, now: Round) -> dict[str, float]:
        epochs = self.epochs if now.number == now.count else self.earlier
        optimizer = torch.optim.AdamW(module.parameters(), self.rate, weight_decay=1e-4)
        batches = len(self.images) // 64
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.rate, total_steps=epochs * batches, pct_start=0.1
        )
        parts = module, optimizer, schedule
        checkpoint = None if self.checkpoint is None else Path(f"{self.checkpoint}-{epochs}-{now.number}.pt")
        saved = load_training(checkpoint, *parts)
        self.curve, self.cpu_s = saved.get("curve", self.curve), saved.get("cpu_s", self.cpu_s)
        if not saved:
            self.curve.append(round(self.judge(module), 2))
        teacher, student = HiddenStates(self.teacher, self.states), HiddenStates(module, self.states)
        for epoch in range(saved.get("done", 0), epochs):
            started = time.thread_time()
            module.train(epoch < 0.75 * epochs or self.labels is not None)
            for index in torch.randperm(len(self.images)).split(64)[:batches]:
                loss = self.loss(module, self.changed(self.images[index]), index, student, teacher)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            module.eval()
            self.cpu_s += time.thread_time() - started
            if (epoch + 1) % max(1, epochs // 10) == 0 or epoch + 1 == epochs:
                self.curve.append(round(self.judge(module), 2))
                print(
                    f"  round {now.number} of {now.count}, {epoch + 1} epochs, {self.cpu_s:.0f} CPU s: {self.curve}",
                    file=sys.stderr,
                    flush=True,
                )
            save_training(checkpoint, {"done": epoch + 1, "curve": self.curve, "cpu_s": self.cpu_s}, *parts)
        teacher.close()
        student.close()
        return {"accuracy %": self.curve[-1]}

    def loss(
        self, module: nn.Module, batch: Tensor, index: Tensor, student: HiddenStates, teacher: HiddenStates
    ) -> Tensor:
        if self.states:
            batch = torch.cat([batch, windows(self.images, len(batch))])
            batch = batch.contiguous(memory_format=torch.channels_last)  # what these kernels are fast with
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(self.states) and _has_bfloat16()):
            with torch.no_grad():
                wanted = self.teacher(batch)
            logits = module(batch)
        if self.states:
            return distill_states(student, teacher)
        loss = distill_logits(logits.float(), wanted.float(), temperature=2.0)
        return loss if self.labels is None else loss + F.cross_entropy(logits, self.labels[index])

    def changed(self, batch: Tensor) -> Tensor:
        """Shift a batch by up to `shift` pixels, and flip half of the batches."""
        height, width = batch.shape[-2:]
        batch = F.pad(batch, (self.shift,) * 4)
        top, left = torch.randint(0, 2 * self.shift + 1, (2,)).tolist()
        batch = batch[:, :, top : top + height, left : left + width]
        return batch.flip(-1) if self.flips and torch.rand(()) < 0.5 else batch


def windows(images: Tensor, count: int) -> Tensor:
    """Return windows into collages of two by two images, of any scale, angle and stretch, half of them mirrored.

    The dense model has an answer to any picture, so that few images say more about what it computes.

    Shapes: images [N, C, H, W]; result [count, C, H, W].
    Source: Asano and Saeed 2021, arXiv 2112.00725, which distils from windows into one image.
    """
    four = images[torch.randint(0, len(images), (4, count))]
    collage = torch.cat([torch.cat([four[0], four[1]], 3), torch.cat([four[2], four[3]], 3)], 2)
    scale = torch.empty(count).uniform_(math.log(0.25), math.log(0.7)).exp()  # 0.5: as large as they are
    stretch = torch.empty(count).uniform_(-0.2, 0.2).exp()
    angle = torch.empty(count).uniform_(-0.5, 0.5) * (torch.rand(count) < 0.5)
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    across, down = torch.empty(2, count).uniform_(-0.5, 0.5)
    rows = (
        torch.stack([scale * stretch * angle.cos() * mirror, -scale * angle.sin(), across], 1),
        torch.stack([scale * angle.sin() * mirror, scale / stretch * angle.cos(), down], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), [count, *images.shape[1:]], align_corners=False)
    return F.grid_sample(collage, grid, padding_mode="reflection", align_corners=False)


def _has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


@dataclass(frozen=True)
class Job:
    """One way to compress, with the training that belongs to it, and the points that it may lose, if that is said."""

    title: str
    epochs: int
    rate: float
    allowed: float | None
    passes: Callable[[Distillation], list[sqcompile.Pass]]
    states: tuple[str, ...] = ()
    earlier: int = 0


# The classifier has 640 of 268,000 weights, and what leaves it is not looked at while blocks learn.
_SPARSE = SparseGPT(
    sparsity=0.903, step=16, allocation="sensitivity", spread=0.04, refit=True, exclude=("linear",)
)  # rounded down in each 16 columns, this is 90 %


def pruned(train: Distillation) -> list[sqcompile.Pass]:
    rounds = PruneGradually(train=train, prune=_SPARSE, rounds=6, schedule="linear", start=0.6)
    return [*pipelines.canonical(), rounds, ApplyMasks()]


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


# Norms are folded first, so that the layers that read what goes have biases to refit. Inside of the blocks: what
# runs between them keeps its width, and can be brought near the teacher's.
_NARROW = RemoveChannels(
    macs=0.5, layers=("layer*.conv1",), importance="hessian", scope="cost", compensate=True
)


def narrowed(train: Distillation) -> list[sqcompile.Pass]:
    return [*pipelines.canonical(), _NARROW, FineTune(train=train)]


BLOCKS = tuple(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3))

RESNET_JOBS = {
    "sparse": Job("90 % zeros, 6 rounds", 12, 3e-3, 2.0, pruned, BLOCKS, earlier=5),
    "int8": Job("8 bits, weights and values", 2, 1e-4, 0.3, quantized("int8:channel=0:narrow")),
    "int4": Job("4-bit weights, 8-bit values", 4, 5e-4, 1.0, quantized("int4:channel=0:narrow")),
    "macs": Job("half of the multiply-accumulates", 28, 3e-3, 2.0, narrowed, BLOCKS),
}


def scopes() -> Iterator[Row]:
    ways = {f"scope={scope}": replace(_NARROW, scope=scope) for scope in get_args(Scope)}
    ways["scope=cost, refitted behind as well"] = replace(_NARROW, compensate_behind=True)
    for name, remove in ways.items():

        def passes(train: Distillation, remove: RemoveChannels = remove) -> list[sqcompile.Pass]:
            return [*pipelines.canonical(), remove]

        yield from resnet20(Job(f"half in one shot, {name}", 0, 0.0, None, passes))


def one_shot() -> Iterator[Row]:
    for sparsity in (0.7, 0.9):
        ways: dict[str, list[sqcompile.Pass]] = {
            "magnitude": [
                MaskWeights(sparsity=sparsity, scope="global", exclude=("linear",)),
                *pipelines.canonical(),
            ],
            "wanda": [*pipelines.canonical(), Wanda(sparsity=sparsity, exclude=("linear",))],
            "sparse-gpt": [*pipelines.canonical(), replace(_SPARSE, sparsity=sparsity + 0.003)],
        }
        for name, passes in ways.items():
            title = f"{100 * sparsity:.0f} % zeros in one shot, {name}"
            yield from resnet20(
                Job(title, 0, 0.0, None, lambda train, passes=passes: [*passes, ApplyMasks()])
            )


def resnet20(job: Job, checkpoint: Path | None = None) -> Iterator[Row]:
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

    options: dict[str, Any] = {
        "calibration": list(images[:512].split(64)),
        "dynamic_shapes": {"x": {0: torch.export.Dim("batch")}},
    }
    teacher: nn.Module = model
    if job.states:  # the same, faster: without norms
        folded = sqcompile.compile(model, passes=pipelines.canonical(), backend="reference", **options)
        assert isinstance(folded, sqcompile.Compiled)
        teacher = Trainable(folded.program)
    train = Distillation(
        *(teacher, images[:3000], judge, job.epochs, job.rate),
        states=job.states,
        earlier=job.earlier,
        checkpoint=checkpoint,
    )
    yield compress("ResNet-20", job, model, train, images[3000:], **options)[0]


def compress(
    title: str, job: Job, model: nn.Module, train: Distillation, test_images: Tensor, **options: Any
) -> tuple[Row, sqcompile.Compiled]:
    print(f"{title}: {job.title} …", file=sys.stderr, flush=True)
    dense = train.judge(model)
    with torch.no_grad():
        labels = model(test_images).argmax(-1)  # the dense model's own
    compiled = sqcompile.compile(model, passes=job.passes(train), backend="onnxruntime", **options)
    assert isinstance(compiled, sqcompile.Compiled)
    trained = train.judge(compiled)
    return {
        "model": title,
        "compression": job.title,
        "dense": dense,
        "untrained": train.curve[0] if train.curve else None,
        "trained": trained,
        "lost": dense - trained,
        "allowed": job.allowed,
        "training_cpu_s": train.cpu_s,
        "agreement": 100 * accuracy(compiled, test_images, labels),
        "curve": list(train.curve),
    }, compiled


def digits() -> Iterator[Row]:
    rows = []
    for seed in range(_DIGITS_SEEDS):
        model, data = train_digits_cnn(seed)

        def judge(module: Any, data: Digits = data) -> float:
            return 100 * accuracy(module, data.test_images, data.test_labels)

        def passes(train: Distillation) -> list[sqcompile.Pass]:
            # Kernels of both backends take channels by eights, and fewer than eight cost as much.
            remove = RemoveChannels(
                macs=0.25, importance="hessian", scope="global", round_to=8, compensate=True
            )
            return [remove, FineTune(train=train), *pipelines.canonical()]

        job = Job(f"a quarter of the multiply-accumulates, seed {seed}", 60, 1e-2, 0.5, passes)
        train = Distillation(
            model, data.train_images, judge, job.epochs, job.rate, data.train_labels, flips=False, shift=1
        )
        shapes = {"x": {0: torch.export.Dim("batch")}}
        calibration = list(data.train_images[:512].split(64))
        row, compiled = compress(
            *("digits CNN", job, model, train, data.test_images),
            calibration=calibration,
            dynamic_shapes=shapes,
            seed=seed,
        )
        macs = [count_macs(flow_of(program)) for program in (compiled.original, compiled.program)]
        row["macs"] = macs
        row["compression"] += f" ({macs[0] / macs[1]:.2f}x fewer)"
        if seed == 0:
            row["latency"] = list(latencies(model, compiled.program, data.test_images, shapes))
        rows.append(row)
        yield row
    means = {
        name: sum(row[name] for row in rows) / len(rows)
        for name in ("dense", "untrained", "trained", "lost", "agreement", "training_cpu_s")
    }
    yield {**rows[0], **means, "compression": f"mean of {len(rows)} seeds", "curve": [], "latency": []}


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
    options: dict[str, Any] = {} if isinstance(model, sqcompile.Program) else {"dynamic_shapes": shapes}
    options |= {"example_inputs": (images[:8],), "backend": backend, "threads": _THREADS}
    return sqcompile.compile(model, passes=passes, **options)


if __name__ == "__main__":
    main()
