"""What compression during training keeps: accuracy dense, before training, during it, and at the end.

    SQCOMPILE_DATA=… python benchmarks/training.py [--only sparse,int8,int4,macs,scopes,digits] [--json out.json]

ResNet-20 on CIFAR-10 images (trained on the first 3,000, judged on 1,000 others; the dense model was trained on
all of them and knows them by heart, so that only differences mean something): 90 % zeros in five rounds,
quantization-aware training at 8 bits and at 4-bit weights, and half of the multiply-accumulates removed. The training
function is plain PyTorch: it brings logits near those of the dense model, where weights go also what leaves the
residual blocks, on flipped and shifted images, there also on mixtures of two; no labels. `as the dense` is the share
of the other images that the compressed model puts into the class that the dense one does. `scopes` trains nothing: it
removes half of the multiply-accumulates in one shot, with compensation, by each way to share the loss among layers.

Then CNNs on handwritten digits, from several seeds, trained here in seconds, with a quarter of their
multiply-accumulates, trained on labels as well: accuracy, and for the first one latency against the dense model in each
backend, in turns, at several batch sizes. One of the 450 test images is 0.22 points.
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
from typing import Any, get_args

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
    TrainQuantized,
    pipelines,
)
from sqcompile.quantization.format import Format
from sqcompile.training import Round

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits_cnn import Digits, train_digits_cnn

Row = dict[str, Any]
_THREADS = 1
_DIGITS_SEEDS = 5
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
        **{name: lambda job=job: resnet20(job) for name, job in RESNET_JOBS.items()},
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
    """A training function: bring logits and hidden states near the teacher's, and keep the curve.

    The learning rate rises, and falls to zero along a cosine, in each round. The last quarter of the epochs uses the
    running statistics of batch norms, as the compressed model will.

    Attributes:
        teacher: The dense model.
        images: Training images [N, C, H, W].
        judge: Returns the accuracy of a model in %, on images that no training sees.
        epochs: Passes over the images, in the last round.
        rate: Highest learning rate of AdamW.
        labels: Of the images, [N], to be learned as well, or None.
        states: Modules whose outputs are to be near the teacher's, too.
        flips: Whether a flipped image is as good.
        shift: By how many pixels an image may be shifted.
        mixed: Whether two thirds of the batches are mixtures of images: cut into each other, or one over the other.
            The teacher has an answer to any image, so that few images say more about what it computes.
        earlier: Passes over the images in the rounds before the last.
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
    mixed: bool = False
    earlier: int = 0
    curve: list[float] = field(default_factory=list)
    cpu_s: float = 0.0

    def __call__(self, module: nn.Module, now: Round) -> dict[str, float]:
        epochs = self.epochs if now.number == now.count else self.earlier
        self.curve.append(round(self.judge(module), 2))
        optimizer = torch.optim.AdamW(module.parameters(), self.rate, weight_decay=1e-4)
        batches = len(self.images) // 64
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.rate, total_steps=epochs * batches, pct_start=0.1
        )
        teacher, student = HiddenStates(self.teacher, self.states), HiddenStates(module, self.states)
        for epoch in range(epochs):
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
        teacher.close()
        student.close()
        return {"accuracy %": self.curve[-1]}

    def loss(
        self, module: nn.Module, batch: Tensor, index: Tensor, student: HiddenStates, teacher: HiddenStates
    ) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed and _has_bfloat16()):
            with torch.no_grad():
                wanted = self.teacher(batch)
            logits = module(batch)
        loss = distill_logits(logits.float(), wanted.float(), temperature=2.0)
        if self.labels is not None:
            loss = loss + F.cross_entropy(logits, self.labels[index])
        if self.states:
            loss = loss + _STATES_WEIGHT * distill_states(student, teacher)
        return loss

    def changed(self, batch: Tensor) -> Tensor:
        """Shift a batch by up to `shift` pixels, flip half of the batches, and mix two thirds of them if asked to."""
        height, width = batch.shape[-2:]
        batch = F.pad(batch, (self.shift,) * 4)
        top, left = torch.randint(0, 2 * self.shift + 1, (2,)).tolist()
        batch = batch[:, :, top : top + height, left : left + width]
        if self.flips and torch.rand(()) < 0.5:
            batch = batch.flip(-1)
        if not self.mixed:
            return batch
        way = int(torch.randint(0, 3, ()))
        others = batch[torch.randperm(len(batch))]
        if way == 1:  # source: Zhang et al. 2018 (mixup)
            part = torch.rand(len(batch), 1, 1, 1)
            return part * batch + (1 - part) * others
        if way == 2:  # source: Yun et al. 2019 (CutMix), with any rectangle
            bounds = torch.randint(0, height + 1, (2,)).sort()[0], torch.randint(0, width + 1, (2,)).sort()[0]
            (top, bottom), (left, right) = (pair.tolist() for pair in bounds)
            batch = batch.clone()
            batch[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        return batch


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
    mixed: bool = False
    earlier: int = 0


def pruned(train: Distillation) -> list[sqcompile.Pass]:
    # The classifier has 640 of 268,000 weights, and one threshold for all would take most of them.
    prune = MaskWeights(sparsity=0.9, scope="global", exclude=("linear",))
    return [PruneGradually(train=train, prune=prune, rounds=5), ApplyMasks(), *pipelines.canonical()]


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
    layers = ("layer*.conv1",)
    remove = RemoveChannels(macs=0.5, layers=layers, importance="hessian", scope="global", compensate=True)
    return [remove, FineTune(train=train), *pipelines.canonical()]


BLOCKS = tuple(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3))

RESNET_JOBS = {
    "sparse": Job("90 % zeros, 5 rounds", 40, 2e-3, 2.0, pruned, BLOCKS, mixed=True, earlier=3),
    "int8": Job("8 bits, weights and values", 2, 1e-4, 0.3, quantized("int8:channel=0:narrow")),
    "int4": Job("4-bit weights, 8-bit values", 4, 5e-4, 1.0, quantized("int4:channel=0:narrow")),
    "macs": Job("half of the multiply-accumulates", 20, 2e-3, 2.0, narrowed, BLOCKS, mixed=True),
}


def scopes() -> Iterator[Row]:
    for scope in get_args(Scope):

        def passes(train: Distillation, scope: Scope = scope) -> list[sqcompile.Pass]:
            # Norms first: the layers that read what goes then have biases to refit.
            remove = RemoveChannels(
                macs=0.5, layers=("layer*.conv1",), importance="hessian", scope=scope, compensate=True
            )
            return [*pipelines.canonical(), remove]

        yield from resnet20(Job(f"half in one shot, scope={scope}", 0, 0.0, None, passes))


def resnet20(job: Job) -> Iterator[Row]:
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

    train = Distillation(
        *(model, images[:3000], judge, job.epochs, job.rate),
        states=job.states,
        mixed=job.mixed,
        earlier=job.earlier,
    )
    yield compress(
        "ResNet-20",
        job,
        model,
        train,
        images[3000:],
        calibration=list(images[:512].split(64)),
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
    )[0]


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
