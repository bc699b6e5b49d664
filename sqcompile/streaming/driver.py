"""Compressing the parts of a model one after the other, in bounded memory, so that a crash loses one at most."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sqcompile.errors import MemoryLimitError
from sqcompile.executor import Executor, InProcess
from sqcompile.layers import layers_of
from sqcompile.metrics import Distance, output_distance
from sqcompile.pipeline.context import PassContext
from sqcompile.pipeline.contract import Pass
from sqcompile.pipeline.manager import Instrument, PassManager, PassRecord, Verify
from sqcompile.program import Program
from sqcompile.progress import Progress, SilentProgress
from sqcompile.statistics import Size, program_size
from sqcompile.streaming import memory
from sqcompile.streaming.parts import Part, cut, join
from sqcompile.streaming.selection import check_selection, narrowed
from sqcompile.streaming.values import PartData, Stream
from sqcompile.streaming.weights import WeightSource
from sqcompile.streaming.work_dir import WorkDir

# Memory that passes need beside a part's weights, in multiples of its largest one: what a sweep works on,
# and what searching scales takes. Measured with GPTQ, act-order and dense targets on layers of Llama 1.1B.
_COPIES = 6


@dataclass(frozen=True)
class Job:
    """What is to be done with every part.

    Attributes:
        passes: Passes that are local, in order.
        data: The model's own inputs, flat, batch after batch; read once a part.
        has_data: Whether passes may see the data, or only checks.
        seed: Seed of everything random.
        max_memory: Cap on resident memory, in bytes, or None.
        work_dir: Folder of the job.
        verify: As `compile` takes it.
        progress: Where the work is shown.
        instruments: Called after each pass of each part.
        executor: Does the work on layers that do not depend on each other; decides no result.
    """

    passes: Sequence[Pass]
    data: Iterable[Sequence[Any]]
    has_data: bool
    work_dir: Path
    seed: int = 0
    max_memory: int | None = None
    verify: Verify = "each"
    progress: Progress = field(default_factory=SilentProgress)
    instruments: Sequence[Instrument] = ()
    executor: Executor = field(default_factory=InProcess)


@dataclass(frozen=True)
class Streamed:
    """What became of a model.

    Attributes:
        program: The whole, compressed; its tensors are mapped from the files of the parts.
        records: What each pass did, over all parts.
        original: Size of the whole before.
        distance: Distance of the outputs from the dense model's on the first batch.
        peak_bytes: The most resident memory that a part took, in bytes; 0 where the system does not say.
        parts: Number of parts.
    """

    program: Program
    records: list[PassRecord]
    original: Size
    distance: Distance | None
    peak_bytes: int
    parts: int


def compress_parts(program: Program, weights: WeightSource, job: Job) -> Streamed:
    """Compress a model part by part; what a folder has of the same job is not done again.

    Each part gets its weights, is compressed by the passes on data that went through the compressed parts
    before it, is written to the work folder, and makes the data for the next one. The dense model's values go
    along, for passes that fit a layer to what it makes there.

    Args:
        program: The model; its tensors are not read.
        weights: Its weights.
        job: What is to be done.

    Raises:
        SelectionError: If a pattern matches nothing in the model.
        MemoryLimitError: If a part does not fit into `max_memory`; says what would.
        FileError: If the work folder belongs to another job, or the disk is full; what is done stays done.
    """
    check_selection(job.passes, program)
    parts = cut(program)
    folder = WorkDir(job.work_dir, _identity(weights, job))
    run = _Run(program, parts, weights, job, folder)
    waiting = [index for index in range(len(parts)) if not folder.is_done(index)]
    # A part whose record is lost is compressed again, and all behind it: they saw its values.
    waiting = list(range(waiting[0], len(parts))) if waiting else []
    if len(waiting) < len(parts):
        job.progress.note(f"{job.work_dir}: {len(parts) - len(waiting)} of {len(parts)} parts are done")
    for index in job.progress.track(waiting, "compressing part by part"):
        run.compress(index)
    folder.clear_values()
    joined = join(program, parts, (folder.load(index) for index in range(len(parts))))
    found = [folder.record(index) for index in range(len(parts))]
    distance = found[-1][0].get("distance")
    return Streamed(
        joined,
        _merged(job.passes, [records for _, records in found]),
        _dense_size(program, sum(int(facts["zeros"]) for facts, _ in found)),
        None if distance is None else Distance(**distance),
        max(int(facts["peak_bytes"]) for facts, _ in found),
        len(parts),
    )


class _Run:
    """The work on one part after the other."""

    def __init__(
        self, program: Program, parts: Sequence[Part], weights: WeightSource, job: Job, folder: WorkDir
    ) -> None:
        self._parts = parts
        self._weights = weights
        self._job = job
        self._folder = folder
        names = [node.name for node in program.placeholders]
        self._dense = Stream(folder.values / "dense", job.data, names)
        self._changed = Stream(folder.values / "compressed", job.data, names)
        self._count = len(job.data) if isinstance(job.data, Sized) else None

    def compress(self, index: int) -> None:
        """Compress one part, keep it, and make the values for the next one.

        Random numbers begin anew with each part, so that those of a run that goes on are the same.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._job.seed)
            self._compress(index)

    def _compress(self, index: int) -> None:
        memory.release()
        memory.reset_peak()
        part = self._parts[index]
        program = part.program.snapshot()
        self._require_room(part)
        for name, _ in list(program.tensors()):
            program.set_tensor(name, self._weights.read(name))
        facts: dict[str, Any] = {"part": part.name, "zeros": program_size(program).zeros}
        last = index == len(self._parts) - 1
        expected = self._advance(program, part, self._dense, last)
        records = self._manager(part, program).run(program, self._context(part, program))
        self._folder.save(index, program)
        results = self._advance(program, part, self._changed, last)
        if last and expected and results:
            facts["distance"] = vars(output_distance([expected], [results]))
        facts["peak_bytes"] = memory.peak_bytes()
        self._folder.finish(index, facts, records)
        kept = {name for later in self._parts[index + 1 :] for name in later.inputs}
        self._dense.drop(kept)
        self._changed.drop(kept)
        self._require_kept(part, facts["peak_bytes"])

    def _context(self, part: Part, program: Program) -> PassContext:
        job = self._job
        context = PassContext(seed=job.seed, work_dir=self._folder.scratch, executor=job.executor)
        if job.has_data:
            context.calibration = PartData(self._changed, part.inputs, program, self._count)
            context.dense_calibration = PartData(self._dense, part.inputs, program, self._count)
        if job.max_memory is not None:
            context.max_memory = max(0, job.max_memory - memory.resident_bytes())
        return context

    def _manager(self, part: Part, program: Program) -> PassManager:
        job = self._job
        check = next(iter(self._changed.read(part.inputs)), None) if job.verify != "off" else None
        return PassManager(
            [narrowed(item, program) for item in job.passes],
            check_batches=[] if check is None else [check],
            verify=job.verify,
            instruments=job.instruments,
            dump_dir=job.work_dir,
        )

    def _advance(self, program: Program, part: Part, stream: Stream, last: bool) -> list[Any]:
        """Run a part over a stream and keep what it makes; of the last part return the first batch's outputs."""
        with torch.no_grad():
            for position, batch in enumerate(stream.read(part.inputs)):
                outputs = program.run(batch)
                if last:
                    return outputs
                stream.write(position, part.outputs, outputs)
        return []

    def _require_room(self, part: Part) -> None:
        """Refuse a part that cannot fit, before hours of work."""
        limit = self._job.max_memory
        if limit is None:
            return
        sizes = [4 * tensor.numel() for _, tensor in part.program.tensors()]
        wanted = memory.resident_bytes() + sum(sizes) + _COPIES * max(sizes, default=0)
        if wanted > limit:
            raise self._too_little(part, f"about {_gigabytes(wanted)} for this part", wanted)

    def _require_kept(self, part: Part, peak: int) -> None:
        limit = self._job.max_memory
        if limit is not None and peak > limit:
            raise self._too_little(part, f"a peak of {_gigabytes(peak)}", peak)

    def _too_little(self, part: Part, seen: str, wanted: int) -> MemoryLimitError:
        return MemoryLimitError(
            "The memory that was allowed is too little for a part of the model.",
            where=f"part '{part.name}'",
            seen=seen,
            expected=f"at most {_gigabytes(self._job.max_memory or 0)}",
            next_step=f"allow max_memory='{_gigabytes(int(wanted * 1.05))}', or calibrate with smaller batches; "
            "parts that are done stay done",
        )


def _identity(weights: WeightSource, job: Job) -> dict[str, str]:
    """Return what decides the result, to the bit."""
    return {
        "model": weights.identity(),
        "passes": ", ".join(map(str, job.passes)),
        "data": _data_hash(job.data) + ("" if job.has_data else ", for checks alone"),
        "seed": str(job.seed),
        "verify": job.verify,
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }


def _data_hash(data: Iterable[Sequence[Any]]) -> str:
    total = hashlib.sha256()
    for batch in data:
        for value in batch:
            if isinstance(value, torch.Tensor):
                flat = value.detach().cpu().contiguous().reshape(-1)
                total.update(f"{value.dtype}{tuple(value.shape)}".encode())
                total.update(flat.view(torch.uint8).numpy().data)
            else:
                total.update(repr(value).encode())
    return total.hexdigest()


def _merged(passes: Sequence[Pass], parts: Sequence[list[PassRecord]]) -> list[PassRecord]:
    """Return one record a pass, over all parts."""
    merged = []
    for item, *records in zip(passes, *parts, strict=True):
        merged.append(
            replace(
                records[0],
                text=str(item),
                changes=sum(record.changes for record in records),
                seconds=sum(record.seconds for record in records),
                check_seconds=sum(record.check_seconds for record in records),
                size=_total([record.size for record in records]),
                distance=None,
                remarks=tuple(dict.fromkeys(remark for record in records for remark in record.remarks)),
                facts=_merged_facts([record.facts for record in records]),
            )
        )
    return merged


def _merged_facts(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add numbers up, and put tables together."""
    merged: dict[str, Any] = {}
    for facts in found:
        for key, value in facts.items():
            old = merged.get(key)
            if isinstance(old, dict) and isinstance(value, dict):
                merged[key] = {**old, **value}
            elif isinstance(old, (int, float)) and isinstance(value, (int, float)):
                merged[key] = old + value
            else:
                merged[key] = value
    return merged


def _dense_size(program: Program, zeros: int) -> Size:
    """Return the size of the whole model, whose tensors hold no values to count zeros of."""
    tensors = dict(program.tensors())
    weights = {layer.weight_name for layer in layers_of(program)}
    return Size(
        parameters=sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point()),
        zeros=zeros,
        weights=sum(tensors[name].numel() for name in weights),
        size_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    )


def _total(sizes: Sequence[Size]) -> Size:
    return Size(
        *(
            sum(getattr(size, name) for size in sizes)
            for name in ("parameters", "zeros", "weights", "size_bytes")
        )
    )


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f}GB"
