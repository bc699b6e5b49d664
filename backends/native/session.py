"""A plan, loaded by the C++ engine and called as the model that it came from."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sqcompile.backend import Session, check_threads
from sqcompile.backends.native import _native
from sqcompile.backends.native.artifact import NativeArtifact
from sqcompile.backends.native.cpu import cpu_features
from sqcompile.backends.native.generation import TextGenerator, no_generation
from sqcompile.backends.native.kernels import default_isa
from sqcompile.backends.native.plan import names_of
from sqcompile.errors import BackendError, FileError, InputError
from sqcompile.files import require_file
from sqcompile.generation import OnToken, continued, split_rows, tokens_needed
from sqcompile.signature import Signature

_MOST_THREADS = 256

# Some 0.3 ms each with AVX-512, a twentieth of a second in plain C++; the first runs wake the threads.
_PEAK_RUNS, _PEAK_STEPS = 8, 100_000


class NativeSession(Session):
    """A session of the C++ engine; it may be called from several threads, which then take turns.

    Attributes:
        signature: The program's interface.
        model: The mapped file, which other sessions may share.
        inner: The engine's session.
    """

    def __init__(self, model: _native.Model, threads: int) -> None:
        self.model = model
        self.signature = Signature.from_json(model.metadata)
        self.threads = threads
        self.inner = _native.Session(model, threads, default_isa())
        self._generators: dict[str, TextGenerator] = {}
        self._turn = threading.RLock()

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run on flat, checked inputs and return flat outputs.

        Raises:
            InputError: If an operator refuses the values, such as a token beyond the vocabulary.
            BackendError: If there is not enough memory.
        """
        try:
            results = iter(self.inner.run(self._arrays(inputs)))
        except ValueError as error:
            raise InputError(
                "The engine refuses the inputs.",
                where="call of the program",
                seen=str(error),
                next_step="check the values: indices have to lie inside what they index",
            ) from None
        except (RuntimeError, MemoryError) as error:
            raise BackendError(
                "The engine failed while running the model.",
                seen=str(error) or type(error).__name__,
                next_step="use smaller inputs, or compare with backend='reference'",
            ) from error
        return [
            torch.from_numpy(next(results)).to(value.dtype) if value.is_tensor else value.constant
            for value in self.signature.outputs
        ]

    def profile(
        self, inputs: Sequence[Any], layers: Mapping[str, int], *, runs: int = 10
    ) -> dict[str, float]:
        """Return the median time of layers in ns, by name: of all steps that a layer became.

        Layers that became one product share its time by their weights.
        """
        arrays = self._arrays(inputs)
        times = np.median([self.inner.profile(arrays) for _ in range(runs)], axis=0)
        found: dict[str, float] = {}
        for (_, name), time_ns in zip(self.model.steps, times, strict=True):
            members = [member for member in names_of(name) if member in layers]
            weights = sum(layers[member] for member in members)
            for member in members:
                share = layers[member] / weights if weights else 1 / len(members)
                found[member] = found.get(member, 0.0) + float(time_ns) * share
        return found

    def peak(self) -> float:
        """Return how many multiply-adds of 8-bit codes the session's threads do in a ns on registers, at best.

        A disturbance only ever makes it less.
        """
        pool = _native.ThreadPool(self.threads)
        best = 0.0
        for _ in range(_PEAK_RUNS):
            started = time.perf_counter_ns()
            operations = _native.multiply_registers(pool, self.inner.isa, _PEAK_STEPS)
            best = max(best, operations / 2 / max(time.perf_counter_ns() - started, 1))
        return best

    def generator(self, rows: int = 1, capacity: int = 2048, kv_cache: str = "float32") -> TextGenerator:
        """Return a cache of its own for some texts, which are continued step by step.

        Args:
            rows: Texts.
            capacity: Tokens that each may have; the model's own limit where that is less.
            kv_cache: `float32` or `int8`.

        Raises:
            BackendError: If the model does not generate; it says why.
        """
        if not self.model.generates:
            raise no_generation(self.model)
        return TextGenerator(self.model, self.threads, rows, min(capacity, self.model.limit), kv_cache)

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int,
        *,
        attention_mask: Any = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        on_token: OnToken | None = None,
        kv_cache: str = "float32",
    ) -> Any:
        """Continue prompts; see `Session.generate`."""
        if not self.model.generates:
            raise no_generation(self.model)
        prompts = split_rows(input_ids, attention_mask)
        with self._turn:
            generator = self._generator_for(prompts, max_new_tokens, kv_cache)
            found = generator.generate(
                dict(enumerate(prompts)),
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                eos_token_id=eos_token_id,
                on_token=on_token,
            )
        new = [found[row] for row in range(len(prompts))]
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        return continued(input_ids, new, ends, pad_token_id)

    def _generator_for(
        self, prompts: Sequence[NDArray[np.int64]], max_new_tokens: int, kv_cache: str
    ) -> TextGenerator:
        """Return an empty generator with room for a call; it is kept for the next one."""
        needed = tokens_needed(prompts, max_new_tokens, self.model.limit)
        generator = self._generators.get(kv_cache)
        if generator is None or generator.rows < len(prompts) or generator.capacity < needed:
            room = min(self.model.limit, max(256, 1 << (needed - 1).bit_length()))
            self._generators.pop(kv_cache, None)
            generator = TextGenerator(self.model, self.threads, max(len(prompts), 1), room, kv_cache)
            self._generators[kv_cache] = generator
        generator.reset()
        return generator

    def _arrays(self, inputs: Sequence[Any]) -> list[NDArray[Any]]:
        return [
            (item.float() if item.dtype is torch.bfloat16 else item).detach().contiguous().numpy()
            for item, value in zip(inputs, self.signature.inputs, strict=True)
            if value.is_tensor
        ]


def load(source: NativeArtifact | Path, threads: int | None) -> NativeSession:
    """Load an artifact, from memory or from its file.

    Raises:
        FileError: If the file is missing, damaged, or another tool's.
        BackendError: If there cannot be so many threads.
    """
    threads = threads_of(threads)
    if isinstance(source, NativeArtifact):
        # Through a file, so that the weights are in memory once, as the page cache holds them.
        with tempfile.TemporaryDirectory(prefix="sqcompile.") as folder:
            path = source.save(Path(folder) / "model.sqm")[0]
            return NativeSession(_native.Model.open(str(path)), threads)
    path = Path(source)
    require_file(path, "model")
    try:
        model = _native.Model.open(str(path))
        return NativeSession(model, threads)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise FileError(
            "The model cannot be loaded.",
            where=str(path),
            seen=str(error) or "not enough memory",
            expected="a whole .sqm file of a version that this build reads",
            next_step="save the model again",
        ) from error


def threads_of(threads: int | None) -> int:
    """Return a number of threads that a session can have; None: one a core.

    Raises:
        BackendError: If there cannot be so many.
    """
    check_threads(threads, most=_MOST_THREADS)
    return min(cpu_features().physical_cores, _MOST_THREADS) if threads is None else threads
