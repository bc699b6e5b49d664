"""A loaded ONNX model, called as the model that it came from."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from sqcompile.backend import Session, check_threads
from sqcompile.backends.onnxruntime.artifact import GENERATION, OnnxArtifact, read_signature
from sqcompile.backends.onnxruntime.generation.generator import TextGenerator, continue_text
from sqcompile.backends.onnxruntime.generation.rewrite import (
    MASK,
    POSITIONS,
    TOKENS,
    Generation,
    NoGenerationError,
)
from sqcompile.backends.onnxruntime.generation.sampling import Sampling
from sqcompile.backends.onnxruntime.generation.wire import LOGITS, PAST
from sqcompile.backends.onnxruntime.profile import layer_times
from sqcompile.errors import BackendError, FileError, InputError
from sqcompile.files import require_file
from sqcompile.generation import OnToken, continued, split_rows, tokens_needed
from sqcompile.signature import Signature

_ERRORS_ONLY = 3
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})

# What the runtime says of tokens and positions that a table has not: Gather, and a table that was cut to fit.
_OUTSIDE = ("out of data bounds", "Attempting to broadcast an axis")


class OnnxSession(Session):
    """An ONNX Runtime session with the model's own call and output structure.

    Attributes:
        signature: The program's interface.
        inner: The `onnxruntime.InferenceSession`.
        generation: What is known of a model that takes only new tokens; None for any other.
    """

    def __init__(
        self, inner: onnxruntime.InferenceSession, signature: Signature, source: OnnxArtifact | Path
    ) -> None:
        self.inner = inner
        self.signature = signature
        self._source = source
        self._inputs = [item.name for item in inner.get_inputs()]
        self._outputs = [item.name for item in inner.get_outputs()]
        stated = inner.get_modelmeta().custom_metadata_map.get(GENERATION)
        self.generation = None if stated is None else Generation.from_json(stated)
        if self.generation is not None:
            self._outputs = [LOGITS]
        self._generating: OnnxSession | None = self if self.generation is not None else None
        self._generator: TextGenerator | None = None
        self._turn = threading.RLock()

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run on flat, checked inputs and return flat outputs.

        Raises:
            InputError: If a model with a cache cannot take the inputs, or an index lies outside.
            BackendError: If the runtime fails.
        """
        feeds = self.feeds(inputs)
        self._refuse_empty(feeds)
        try:
            results = iter(self.inner.run(self._outputs, feeds))
        except Exception as error:
            if any(mark in str(error) for mark in _OUTSIDE):
                raise InputError(
                    "ONNX Runtime refuses the inputs.",
                    where="call of the program",
                    seen=_text(error),
                    expected="indices that lie inside what they index, such as positions that the model has",
                    next_step="check the values of the inputs, and that they are no longer than the model takes",
                ) from error
            raise BackendError(
                "ONNX Runtime failed while running the model.",
                where="call of the program",
                seen=_text(error),
                next_step="compare with the reference: compile with backend='reference'",
            ) from error
        return [
            torch.from_numpy(np.asarray(next(results))) if value.is_tensor else value.constant
            for value in self.signature.outputs
        ]

    def _refuse_empty(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Refuse inputs without elements where the runtime would end the whole process (seen in 1.32)."""
        empty = next((name for name, item in feeds.items() if not item.size), None)
        if empty is None or not self._recurrent():
            return
        raise InputError(
            "ONNX Runtime cannot run LSTM, GRU and RNN on no data.",
            where=f"input '{empty}'",
            seen=f"sizes {list(feeds[empty].shape)}",
            expected="at least one sample, and one step",
            next_step="leave the call out: there is nothing to compute",
        )

    def _recurrent(self) -> bool:
        source = self._source
        if isinstance(source, OnnxArtifact):
            return any(node.op_type in _RECURRENT for node in source.model.graph)
        graph = onnx.load(source, load_external_data=False).graph
        return any(node.op_type in _RECURRENT for node in graph.node)

    def profile(
        self, inputs: Sequence[Any], layers: Mapping[str, int], *, runs: int = 10
    ) -> dict[str, float]:
        """Return the median time of layers in ns, by name, measured by the runtime itself."""
        options = _options(self.inner.get_session_options().intra_op_num_threads or None)
        source = self._source
        if isinstance(source, OnnxArtifact):
            written = ir.to_proto(source.model)

            def open_session(options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
                return _open_artifact(source, options)
        else:
            written = onnx.load(source, load_external_data=False)

            def open_session(options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
                return _open(str(source), options)

        return layer_times(open_session, options, written, self.feeds(inputs), layers, runs)

    def generator(self, capacity: int = 2048) -> TextGenerator:
        """Return a cache of its own for a text, which is continued step by step.

        Args:
            capacity: Tokens that it may have; the model's own limit where that is less.

        Raises:
            BackendError: If the model does not generate; it says why.
        """
        session = self._session_that_generates()
        assert session.generation is not None
        limit = session.generation.limit
        return TextGenerator(
            session.inner, session.generation, capacity if limit is None else min(capacity, limit)
        )

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
        """Continue prompts, one after the other; see `Session.generate`."""
        sampling = Sampling(temperature, top_k, top_p, seed)
        prompts = split_rows(input_ids, attention_mask)
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        with self._turn:
            session = self._session_that_generates()
            assert session.generation is not None
            _check_cache(kv_cache, session.generation)
            needed = tokens_needed(prompts, max_new_tokens, session.generation.limit)
            if self._generator is None or self._generator.capacity < needed:
                self._generator = None
                self._generator = self.generator(max(256, 1 << (needed - 1).bit_length()))
            new: list[list[int]] = []
            for row, prompt in enumerate(prompts):
                tokens, more = continue_text(
                    self._generator, prompt, max_new_tokens, sampling, ends, row, on_token
                )
                new.append(tokens)
                if not more:
                    new += [[] for _ in prompts[row + 1 :]]
                    break
        return continued(input_ids, new, ends, pad_token_id)

    def _session_that_generates(self) -> OnnxSession:
        """Return the session of the model that takes only new tokens; it is made at the first call."""
        if self._generating is None:
            if not isinstance(self._source, OnnxArtifact):
                raise _no_generation(
                    "a file of the model for whole sequences", "save a folder, and load that"
                )
            try:
                artifact = self._source.generator()
            except NoGenerationError as error:
                raise _no_generation(
                    str(error), "call the model itself; or trace it with a dynamic batch and sequence"
                ) from None
            options = _options(self.inner.get_session_options().intra_op_num_threads or None)
            self._generating = OnnxSession(_open_artifact(artifact, options), artifact.signature, artifact)
        return self._generating

    def feeds(self, inputs: Sequence[Any]) -> dict[str, np.ndarray]:
        """Return flat, checked inputs as the runtime takes them, by the names in the file.

        Raises:
            InputError: If a model with a cache cannot take them.
        """
        tensors = [
            (value.name, _to_numpy(item))
            for item, value in zip(inputs, self.signature.inputs, strict=True)
            if value.is_tensor
        ]
        if self.generation is not None:
            return _without_past(tensors, self.generation)
        return {name: item for name, (_, item) in zip(self._inputs, tensors, strict=True)}


def _without_past(tensors: Sequence[tuple[str, np.ndarray]], generation: Generation) -> dict[str, np.ndarray]:
    """Return the inputs of a model with a cache for whole sequences: nothing is in the cache.

    Raises:
        InputError: If a row is padded before its tokens, or positions are counted otherwise.
    """
    named = dict(tensors)
    tokens = named.pop(TOKENS) if TOKENS in named else named.pop(tensors[0][0])
    batch, length = tokens.shape
    mask = named.pop(MASK, np.ones_like(tokens)).astype(np.int64)
    lengths = mask.sum(1)
    expected = (np.arange(length) < lengths[:, None]).astype(np.int64)
    padded = bool((lengths != length).any())
    if not np.array_equal(mask, expected) or (padded and not generation.rows_differ) or not lengths.all():
        raise InputError(
            "A model with a cache takes tokens from the first place on.",
            where=f"input '{MASK}'",
            seen="padding before tokens" if generation.rows_differ else "padding",
            expected="padding behind the tokens only" if generation.rows_differ else "rows of equal length",
            next_step="pad on the right; or call the model that was compiled, instead of its saved folder",
        )
    given = named.pop(POSITIONS, None)
    if given is not None and not np.array_equal(given * mask, np.arange(length) * mask):
        raise InputError(
            "A model with a cache counts positions itself.",
            where=f"input '{POSITIONS}'",
            seen="positions other than 0, 1, 2, ..",
            expected="0, 1, 2, .. in every row",
            next_step="leave them as they are; or call the model that was compiled, instead of its saved folder",
        )
    feeds = {TOKENS: tokens, MASK: mask}
    for layer, cache in enumerate(generation.caches):
        for kind in ("key", "value"):
            shape = (batch, cache.heads, 0, cache.head_size)
            feeds[PAST.format(layer=layer, kind=kind)] = np.zeros(shape, cache.dtype)
    return feeds


def _check_cache(kv_cache: str, generation: Generation) -> None:
    """Check that a model keeps keys and values as asked; `float32` asks for what it was compiled with.

    Raises:
        InputError: If it does not.
    """
    known = ["float32", *sorted({cache.dtype for cache in generation.caches} - {"float32"})]
    if kv_cache not in known:
        raise InputError(
            "How keys and values are kept is a part of an ONNX model.",
            where="kv_cache",
            seen=repr(kv_cache),
            expected=" or ".join(map(repr, known)),
            next_step="compile with the pass quantize-cache; or with backend='native', which has both caches",
        )


def _no_generation(reason: str, next_step: str) -> BackendError:
    return BackendError(
        "The model does not generate text.",
        where="lowering to ONNX Runtime",
        seen=reason,
        expected="a causal language model: input_ids [batch, sequence], both dynamic, to logits",
        next_step=next_step,
    )


def load(source: OnnxArtifact | Path, threads: int | None) -> OnnxSession:
    """Load an artifact, from memory or from its file.

    Raises:
        FileError: If the file is missing, damaged, or another tool's.
        BackendError: If the runtime refuses the model.
    """
    options = _options(threads)
    if isinstance(source, OnnxArtifact):
        return OnnxSession(_open_artifact(source, options), source.signature, source)
    path = Path(source)
    require_file(path, "ONNX model")
    try:
        inner = _open(str(path), options)
    except Exception as error:
        raise FileError(
            "The ONNX model cannot be loaded.",
            where=str(path),
            seen=_text(error),
            expected="a whole ONNX file, with its .data file beside it if it has one",
            next_step="save the model again",
        ) from error
    return OnnxSession(inner, read_signature(inner.get_modelmeta().custom_metadata_map, path), path)


def _open_artifact(
    artifact: OnnxArtifact, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    try:
        if not artifact.external:
            return _open(artifact.to_bytes(), options)
        with tempfile.TemporaryDirectory(prefix="sqcompile.") as folder:
            return _open(str(artifact.save(Path(folder) / "model.onnx")[0]), options)
    except FileError:
        raise
    except Exception as error:
        raise BackendError(
            "ONNX Runtime refuses the model.",
            where="loading the lowered model",
            seen=_text(error),
            expected="a kernel for every operator",
            next_step="compile with backend='reference', and report this with the text of the program",
        ) from error


def _open(model: str | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _options(threads: int | None) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    check_threads(threads)
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
