"""`compile` and `load`: the whole compiler, one named step a line."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from sqcompile.backend import (
    PREFERENCE,
    Artifact,
    Backend,
    Session,
    backend_names,
    check_threads,
    get_backend,
)
from sqcompile.blocks import find_blocks
from sqcompile.calibration import Calibration
from sqcompile.compare import LayerDistance, compare_layers
from sqcompile.data import Batches, DataFile
from sqcompile.errors import BackendError, FileError, InputError, RecipeError
from sqcompile.executor import Executor, check_reachable, open_executor
from sqcompile.files import require_file
from sqcompile.gguf_file import save_gguf
from sqcompile.measure import measure_latency
from sqcompile.metrics import Distance, output_distance
from sqcompile.models import load_model, model_name
from sqcompile.opening import find_inputs, open_data, trace_any
from sqcompile.pipeline import Pass, PassContext, PassManager, PassRecord, parse_pipeline
from sqcompile.pipeline.manager import Instrument, Verify, check_order, check_verify
from sqcompile.pretrained import Pretrained, refuse_others, save_pretrained
from sqcompile.program import Program
from sqcompile.progress import Progress, SilentProgress
from sqcompile.provenance import provenance_of
from sqcompile.report import Report, environment, layer_rows
from sqcompile.report_pictures import GraphTexts, activation_ranges, weight_maps
from sqcompile.saving import GGUF, SUFFIXES, check_target, save_compiled
from sqcompile.signature import Signature
from sqcompile.statistics import Size, program_size
from sqcompile.streaming import Job, Streamed, compress_parts, weights_of
from sqcompile.tracing.inputs import Inputs

if TYPE_CHECKING:
    from sqcompile.recipe import Recipe

Model = nn.Module | ExportedProgram | fx.GraphModule | Program | str | Path


class Compiled:
    """A compiled model: called as the model is, it returns what the model returns.

    Attributes:
        program: The compiled program, an FX graph underneath.
        report: What every pass did, what every layer became, and what it cost.
        artifact: The lowered program.
        session: The loaded artifact.
    """

    def __init__(
        self,
        program: Program,
        original: Program | Callable[[], Program],
        backend: Backend,
        artifact: Artifact,
        session: Session,
        report: Report,
    ) -> None:
        self.program = program
        self._original = original
        self.backend = backend
        self.artifact = artifact
        self.session = session
        self.report = report

    def __repr__(self) -> str:
        from sqcompile.report_tables import size_text

        made = self.report
        return f"<Compiled {made.model}: {made.backend}, {_layers(len(made.layers))}, {size_text(made.file_bytes)}>"

    @property
    def original(self) -> Program:
        """The program as it was traced; where it was never in memory as a whole, it is loaded now."""
        if not isinstance(self._original, Program):
            self._original = self._original()
        return self._original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled model.

        Raises:
            InputError: If the inputs do not fit.
        """
        return self.session(*args, **kwargs)

    def generate(self, input_ids: Any, max_new_tokens: int, **options: Any) -> Any:
        """Continue prompts of a language model; `Session.generate` has the options.

        Raises:
            InputError: If the prompts do not fit.
            BackendError: If the model or its backend does not generate; it says why.
        """
        return self.session.generate(input_ids, max_new_tokens, **options)

    def save(self, path: str | Path) -> list[Path]:
        """Write the compiled model.

        Args:
            path: A file, by suffix: `.onnx` (ONNX Runtime), `.sqm` (our engine), `.pt2` (PyTorch), `.gguf`
                (llama.cpp: Llama, Mistral and Qwen2 of transformers, without tokenizer); a path without suffix is
                a folder, which for language models also gets tokenizer and config.

        Returns:
            The files that were written.

        Raises:
            FileError: If it cannot be written, or the suffix is unknown.
            PretrainedError: If a GGUF file cannot hold the model; the text names the layer.
        """
        path = Path(path)
        if path.suffix != GGUF:
            return save_compiled(self, path)
        check_target(path)
        if self._pretrained is None:
            raise refuse_others(self.report.model, "a GGUF file")
        return save_gguf(self.program, self._pretrained, path)

    def save_pretrained(self, path: str | Path) -> list[Path]:
        """Write the compiled program as a Hugging Face folder, for a model of transformers.

        The configuration gets the new numbers of layers, heads and neurons, so that `from_pretrained` reads the
        folder. Quantized weights of linear layers are packed in the convention of compressed-tensors (2, 4 or 8
        bits, a scale a channel or group; where one has a zero point, all of one format, and the others float);
        embeddings and tied weights are float. It is read back, and has to compute what the program does.

        Args:
            path: The folder.

        Returns:
            The files that were written.

        Raises:
            PretrainedError: If the class cannot hold the program, as when layers have not lost alike, or the
                convention has not a weight's format; the text names the layer. A `.pt2` file can (`save`).
            FileError: If it cannot be written.
        """
        if self._pretrained is None:
            raise refuse_others(self.report.model, "a Hugging Face folder")
        return save_pretrained(self.program, self.original, self._pretrained, Path(path), self._check_batch)

    def measure(self, *args: Any, runs: int = 30, threads: int | None = None, **kwargs: Any) -> Report:
        """Measure latency, dense against compiled, and add it to the report.

        The dense model is lowered to the same backend, and both are called in turns on this machine.

        Args:
            *args: Inputs of one call; without any, those of the check batch.
            runs: Calls of each.
            threads: Threads within an operator; None: as many as PyTorch uses.
            **kwargs: Keyword inputs.
        """
        inputs = self.program.signature.bind(args, kwargs) if args or kwargs else self._check_batch
        return measure_latency(self, inputs, runs=runs, threads=threads)

    _check_batch: Sequence[Any] = ()
    _pretrained: Pretrained | None = None
    source: str | Path | None = None


class LazyCompiled:
    """A model that is traced and compiled at its first call, with that call's inputs."""

    def __init__(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        self._model = model
        self._options = dict(options)
        self._compiled: Compiled | None = None

    def __repr__(self) -> str:
        if self._compiled is None:
            return f"<LazyCompiled {model_name(self._model)}: compiled at its first call>"
        return f"<LazyCompiled: {self._compiled!r}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compile at the first call, and run."""
        if self._compiled is None:
            compiled = compile(self._model, **{**self._options, "example_inputs": (args, kwargs)})
            assert isinstance(compiled, Compiled)
            self._compiled = compiled
        return self._compiled(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._compiled is None:
            raise _NotCompiledError(
                f"'{name}' is not known yet: the model has not been compiled.",
                where="model compiled without inputs",
                seen="no example inputs, no calibration data, and no call yet",
                expected="one call, or example inputs",
                next_step="call the compiled model once, or pass example_inputs to sqcompile.compile",
            )
        return getattr(self._compiled, name)


def _layers(count: int) -> str:
    return f"{count} layer" + ("" if count == 1 else "s")


class _NotCompiledError(InputError, AttributeError):
    """Also an `AttributeError`, so that `hasattr` and `copy` ask in vain instead of failing."""


def compile(
    model: Model,
    passes: Sequence[Pass | str] | str | Path | Recipe = (),
    example_inputs: Any = None,
    calibration: Iterable[Any] | str | Path | DataFile | None = None,
    dynamic_shapes: Any = None,
    backend: str = "auto",
    *,
    seed: int = 0,
    max_memory: int | str | None = None,
    work_dir: str | Path | None = None,
    verify: Verify = "each",
    threads: int | None = None,
    progress: Progress | None = None,
    instruments: Sequence[Instrument] = (),
    address: str | None = None,
) -> Compiled | LazyCompiled:
    """Compile a model: trace it, run passes over it, check every one, and lower it to a backend.

    Args:
        model: A module, an exported program, an FX graph module, a program, the folder of a Hugging
            Face model, or a `.pt2` file. It is not modified.
        passes: Passes in order: objects, or their text; a whole pipeline as one text; or a recipe or
            its path (`.yaml`), which then also says whatever is left at its default here.
        example_inputs: A tuple (positional), a dict (keyword), a pair (tuple, dict), or one tensor.
            Without any, the first calibration batch is taken, else `model.dummy_inputs`; else the model
            is compiled at its first call.
        calibration: Batches, each in one of these forms too; or a data file (`.npz`, `.npy`, `.txt`).
        dynamic_shapes: As `torch.export.export` takes it, or names: `{"x": {0: "batch"}}`. Folders of
            Hugging Face models get a dynamic batch and sequence by themselves, and modules with a data
            file a dynamic batch, unless they fix it.
        backend: `auto`, `native`, `onnxruntime` or `reference`.
        seed: Seed of everything random.
        max_memory: Cap on resident memory for passes that can obey one: bytes, or text such as `8GB`.
        work_dir: Folder for intermediate results, and for dumps when a pass fails. If every pass is local
            (`Pass.local`) and the model has blocks, they are compressed one after the other: folders of Hugging
            Face are then never in memory as a whole, `max_memory` is a hard cap, and a run that was cut off
            goes on from here.
        verify: `each` (check structure and numbers after every pass), `ends`, or `off`.
        threads: Threads within an operator of the session.
        progress: Where long work reports; silent by default.
        instruments: Called after each pass with the pass and the programs before and after it.
        address: Of a Ray cluster whose machines share the work on layers that do not depend on each other:
            `host:port`, `ray://host:port`, `auto`, or `local` to start one here. None: the environment's
            `SQCOMPILE_RAY_ADDRESS`, if any; else everything is done in this process. Results are the same.

    Returns:
        The compiled model.

    Raises:
        Error: Whatever is wrong, with what, where, seen and expected, and the next step.
    """
    options = {
        "passes": passes,
        "example_inputs": example_inputs,
        "calibration": calibration,
        "dynamic_shapes": dynamic_shapes,
        "backend": backend,
        "seed": seed,
        "max_memory": max_memory,
        "work_dir": work_dir,
        "verify": verify,
        "threads": threads,
        "progress": progress,
        "instruments": instruments,
        "address": address,
    }
    recipe = as_recipe(passes)
    with open_executor(address) as executor:
        return _compile(model, recipe, options if recipe is None else recipe.fill(options), executor)


def _compile(
    model: Model, recipe: Recipe | None, options: dict[str, Any], executor: Executor
) -> Compiled | LazyCompiled:
    """Compile with the options of `compile`, which a recipe has been filled into."""
    passes, example_inputs, calibration, dynamic_shapes, backend = (
        options[name] for name in ("passes", "example_inputs", "calibration", "dynamic_shapes", "backend")
    )
    seed, max_memory, work_dir, verify, threads, instruments = (
        options[name] for name in ("seed", "max_memory", "work_dir", "verify", "threads", "instruments")
    )
    clock = _Clock()
    progress = options["progress"] or SilentProgress()
    # What is cheap to check comes first: tracing a large model takes minutes.
    pipeline = resolve_passes(passes)
    check_order(pipeline)
    check_verify(verify)
    check_seed(seed)
    check_threads(threads)
    memory = parse_bytes(max_memory)
    target = None if backend == "auto" else get_backend(backend)
    by_parts = work_dir is not None and bool(pipeline) and all(item.local for item in pipeline)
    if isinstance(model, (str, Path)):
        progress.note(f"loading {model}")
    loaded = load_model(model, weights=not by_parts)
    batches = open_data(calibration, loaded, model)
    inputs = find_inputs(loaded, example_inputs, batches)
    if inputs is None:
        assert isinstance(loaded, nn.Module)
        return LazyCompiled(loaded, options)
    made_up = example_inputs is None and batches is None and isinstance(loaded, Program)
    name = model_name(loaded, model)
    progress.note(f"tracing {name}")
    with clock.stage("trace"):
        program = trace_any(loaded, inputs, dynamic_shapes, source=model, data=batches)
        if by_parts and len(find_blocks(program)) < 2:
            by_parts, loaded = False, load_model(model)
            program = trace_any(loaded, inputs, dynamic_shapes, source=model, data=batches)
    if recipe is not None:
        recipe.check_inputs(program.signature)
    check_reachable(program, executor)
    original = program.snapshot()
    if isinstance(batches, Batches):
        batches = batches.bind(program.signature)
    data = None if batches is None else Calibration(batches, program.signature)
    check_batch = _check_batch(program.signature, inputs, data)
    streamed: Streamed | None = None
    graphs: GraphTexts | None = None
    with clock.stage("passes"):
        if by_parts:
            assert work_dir is not None
            job = Job(
                passes=pipeline,
                data=check_batch if data is None else data,
                has_data=data is not None,
                work_dir=Path(work_dir),
                seed=seed,
                max_memory=memory,
                verify=verify,
                progress=progress,
                instruments=instruments,
                executor=executor,
            )
            streamed = compress_parts(program, weights_of(model, loaded, program), job)
            program, records = streamed.program, streamed.records
        else:
            context = PassContext(
                calibration=data,
                seed=seed,
                max_memory=memory,
                work_dir=None if work_dir is None else Path(work_dir),
                progress=progress,
                executor=executor,
            )
            graphs = GraphTexts() if verify != "off" else None
            manager = PassManager(
                pipeline,
                check_batches=check_batch,
                verify=verify,
                instruments=instruments if graphs is None else [graphs, *instruments],
                dump_dir=context.work_dir,
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                records = manager.run(program, context)
    if target is None:
        target, reason = choose_backend(program)
    else:
        reason = "asked for"
    made = provenance_of(
        model,
        recipe,
        passes=pipeline,
        backend=backend,
        calibration=calibration,
        seed=seed,
        signature=program.signature,
        example_inputs=example_inputs,
    )
    program.signature = dataclasses.replace(program.signature, provenance=made)
    progress.note(f"lowering to {target.name}")
    with clock.stage("lower"):
        artifact = target.lower(program)
    with clock.stage("load"):
        session = target.load(artifact, threads=threads)
    with clock.stage("check"):
        report = _report(
            name,
            program,
            original,
            target,
            reason,
            artifact,
            session,
            records,
            check_batch,
            verify,
            streamed,
        )
    report.seconds = clock.seconds
    report.graphs = graphs if graphs is not None and graphs.stages else None
    report.notes += getattr(batches, "notes", [])
    if made_up:
        report.notes.append("there is no data: numbers were checked on made-up inputs")
    dense = original if streamed is None else _Dense(model, loaded, original, inputs, dynamic_shapes, batches)
    compiled = Compiled(program, dense, target, artifact, session, report)
    compiled._check_batch = check_batch[0] if check_batch else ()
    compiled.source = model if isinstance(model, (str, Path)) else None
    compiled._pretrained = Pretrained.of(loaded, model)
    return compiled


def load(path: str | Path, threads: int | None = None) -> Session:
    """Load a saved artifact as a callable session.

    Args:
        path: A file that `save` wrote (`.onnx`, `.sqm`, `.pt2`), or the folder that holds it.
        threads: Threads within an operator; None leaves the choice to the runtime.

    Raises:
        FileError: If there is no such file, or it is damaged or of another kind.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise FileError(
            "An artifact is named by its path.",
            where="load",
            seen=type(path).__name__,
            expected="the path of a file that save wrote, or of its folder",
            next_step="pass the path; what compile returned is called as it is",
        )
    path = Path(path)
    if path.is_dir():
        path = next(
            (file for suffix in SUFFIXES if (file := path / f"model{suffix}").is_file()), path / "model.onnx"
        )
    require_file(path, "artifact")
    if path.suffix not in SUFFIXES:
        raise FileError(
            f"'{path}' is no artifact of sqcompile.",
            where=str(path),
            seen=f"suffix '{path.suffix}'",
            expected=" or ".join(SUFFIXES),
            next_step="pass the file that compiled.save wrote",
        )
    return get_backend(SUFFIXES[path.suffix]).load(path, threads=threads)


def as_recipe(passes: object) -> Recipe | None:
    """Return the recipe that `passes` is, or is the path of; None if it is something else.

    Raises:
        RecipeError: If the recipe is wrong.
    """
    from sqcompile.recipe import Recipe

    if isinstance(passes, Recipe):
        return passes
    if isinstance(passes, Path) or (isinstance(passes, str) and passes.endswith((".yaml", ".yml"))):
        return Recipe.load(passes)
    return None


def resolve_passes(passes: Any) -> list[Pass]:
    """Return passes as objects, from objects, texts, or a pipeline's text.

    Raises:
        RecipeError: If a text names no pass.
    """
    if isinstance(passes, str):
        return parse_pipeline(passes)
    if isinstance(passes, (Pass, type)):
        passes = [passes]
    if not isinstance(passes, Iterable):
        raise _no_pass(passes)
    found: list[Pass] = []
    for item in passes:
        if isinstance(item, Pass):
            found.append(item)
        elif isinstance(item, str):
            found += parse_pipeline(item)
        elif isinstance(item, (list, tuple)):
            found += resolve_passes(item)
        else:
            raise _no_pass(item)
    return found


def _no_pass(item: object) -> RecipeError:
    return RecipeError(
        "Passes are objects or texts.",
        where="passes",
        seen=f"the class {item.__name__}" if isinstance(item, type) else repr(item),
        expected="a Pass object, such as FoldBatchNorm(), or its text",
        next_step="add the parentheses"
        if isinstance(item, type)
        else "call it: add the parentheses"
        if callable(item)
        else "pass a Pass object",
    )


def choose_backend(program: Program) -> tuple[Backend, str]:
    """Return the first backend that can run the whole program, and the reason for the choice."""
    reasons = []
    for name in PREFERENCE:
        try:
            backend = get_backend(name)
        except BackendError as error:
            reasons.append(f"{name} is not available ({error.seen})")
            continue
        found = backend.unsupported(program)
        if not found:
            reasons.append(f"{name} runs every operator")
            return backend, "; ".join(reasons)
        node, reason = found[0]
        reasons.append(f"{name} cannot run {len(found)} operators, first %{node.name}: {reason}")
    raise BackendError(
        "No backend can run the program.", seen="; ".join(reasons), expected=", ".join(backend_names())
    )


def parse_bytes(size: int | str | None) -> int | None:
    """Return a size in bytes from a number or a text such as `8GB` (10⁹) or `512MiB` (2²⁰).

    Raises:
        InputError: If the text is no size.
    """
    if size is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*(?:([kmgt]i?)?b?)\s*", str(size), re.IGNORECASE)
    if match is None or isinstance(size, bool) or not math.isfinite(float(match[1])):
        raise InputError(
            f"'{size}' is no size.",
            where="max_memory",
            seen=repr(size),
            expected="a number of bytes, or text such as 8GB (10⁹) or 512MiB (2²⁰)",
            next_step="write a number and a unit: B, kB, MB, GB, TB, KiB, MiB, GiB or TiB",
        )
    unit = (match[2] or "").lower()
    power = " kmgt".index(unit[0]) if unit else 0
    return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power)


def check_seed(seed: object) -> None:
    """Check that a seed is one that PyTorch takes.

    Raises:
        InputError: If not.
    """
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise InputError(
            "The seed is no number that can seed.",
            where="seed",
            seen=repr(seed),
            expected="a whole number of 64 bits",
            next_step="pass a small number, such as seed=0",
        )


def _check_batch(signature: Signature, inputs: Inputs, data: Calibration | None) -> list[list[Any]]:
    """The batch on which numbers are checked: calibration data if there is some, else the example inputs."""
    if data is not None:
        return [data.first()]
    if not inputs[0] and not inputs[1]:
        return []
    return [signature.bind(*inputs)]


def _report(
    name: str,
    program: Program,
    original: Program,
    backend: Backend,
    reason: str,
    artifact: Artifact,
    session: Session,
    records: list[PassRecord],
    check_batch: list[list[Any]],
    verify: Verify,
    streamed: Streamed | None = None,
) -> Report:
    if streamed is not None:
        return _streamed_report(
            name, program, streamed, backend, reason, artifact, session, check_batch, verify
        )
    outputs: Distance | None = None
    parity: Distance | None = None
    layers: list[LayerDistance] = []
    notes = list(artifact.notes)
    predicted = artifact.predict(check_batch[0]) if check_batch else {}
    if check_batch and verify != "off":
        with torch.no_grad():
            reference = [program.run(batch) for batch in check_batch]
            expected = [original.run(batch) for batch in check_batch]
        outputs = output_distance(expected, reference)
        notes += _notes_on(original, expected)
        parity = output_distance(reference, [session.run(batch) for batch in check_batch])
        if records:
            layers = compare_layers(original, program, check_batch)
    pictured = bool(records) and verify != "off"
    original_size: Size = program_size(original)
    rows = layer_rows(program, layers, artifact.choices, predicted)
    return Report(
        model=name,
        backend=backend.name,
        backend_reason=reason,
        original=original_size,
        size=program_size(program),
        file_bytes=artifact.size_bytes,
        passes=records,
        layers=rows,
        output_distance=outputs,
        backend_distance=parity,
        notes=notes,
        environment=environment(),
        weight_maps=weight_maps(program, {row.name: row.sparsity for row in rows}) if pictured else {},
        activations=activation_ranges(program, check_batch[0]) if pictured and check_batch else [],
    )


def _streamed_report(
    name: str,
    program: Program,
    streamed: Streamed,
    backend: Backend,
    reason: str,
    artifact: Artifact,
    session: Session,
    check_batch: list[list[Any]],
    verify: Verify,
) -> Report:
    """Report on a model whose dense form was never in memory as a whole: it is not run again."""
    parity: Distance | None = None
    predicted = artifact.predict(check_batch[0]) if check_batch else {}
    if check_batch and verify != "off":
        with torch.no_grad():
            reference = [program.run(batch) for batch in check_batch]
        parity = output_distance(reference, [session.run(batch) for batch in check_batch])
    peak = f", at most {streamed.peak_bytes / 1e9:.2f} GB resident" if streamed.peak_bytes else ""
    return Report(
        model=name,
        backend=backend.name,
        backend_reason=reason,
        original=streamed.original,
        size=program_size(program),
        file_bytes=artifact.size_bytes,
        passes=streamed.records,
        layers=layer_rows(program, [], artifact.choices, predicted),
        output_distance=streamed.distance,
        backend_distance=parity,
        notes=[*artifact.notes, f"compressed in {streamed.parts} parts{peak}"],
        environment=environment(),
    )


class _Dense:
    """The dense program of a model that was compressed part by part, for those who ask for it."""

    def __init__(
        self, source: Any, loaded: Any, original: Program, inputs: Inputs, dynamic_shapes: Any, data: Any
    ) -> None:
        self._source, self._original = source, original
        self._is_skeleton = isinstance(source, (str, Path)) and isinstance(loaded, nn.Module)
        self._options = inputs, dynamic_shapes, data

    def __call__(self) -> Program:
        if not self._is_skeleton:
            return self._original
        inputs, dynamic_shapes, data = self._options
        whole = load_model(self._source)
        return trace_any(whole, inputs, dynamic_shapes, source=self._source, data=data)


def _notes_on(original: Program, outputs: list[list[Any]]) -> list[str]:
    """Say which outputs of the model itself are not a number, where no comparison can see anything."""
    return [
        f"the model's own output '{value.name}' holds NaN on the check batch"
        for batch in outputs[:1]
        for value, leaf in zip(original.signature.outputs, batch, strict=True)
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any())
    ]


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def stage(self, name: str) -> Any:
        return _Stage(self, name)


class _Stage:
    def __init__(self, clock: _Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.clock.seconds[self.name] = time.perf_counter() - self.started
