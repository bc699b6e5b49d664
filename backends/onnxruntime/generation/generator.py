"""Continuing a text in ONNX Runtime: one row of tokens, and the cache of what they leave behind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from sqcompile.backends.onnxruntime.generation.rewrite import MASK, TOKENS, Generation
from sqcompile.backends.onnxruntime.generation.sampling import Sampling
from sqcompile.backends.onnxruntime.generation.wire import LOGITS, PAST, PRESENT
from sqcompile.errors import BackendError, InputError
from sqcompile.generation import OnToken

_KINDS = ("key", "value")


class TextGenerator:
    """A row of tokens that a model continues.

    The cache has its full size from the start, and the runtime writes each call's keys and values behind those
    before: nothing is copied from call to call.

    Args:
        inner: A session of a model that generates.
        generation: What is known of it.
        capacity: Tokens that the row may have.
    """

    def __init__(self, inner: onnxruntime.InferenceSession, generation: Generation, capacity: int) -> None:
        self.inner = inner
        self.generation = generation
        self.capacity = capacity
        self.length = 0
        self._binding = inner.io_binding()
        self._cache: list[onnxruntime.OrtValue] = []
        self._binding.bind_output(LOGITS, "cpu")
        for layer, cache in enumerate(generation.caches):
            for kind in _KINDS:
                buffer = onnxruntime.OrtValue.ortvalue_from_numpy(
                    np.zeros((1, cache.heads, capacity, cache.head_size), cache.dtype)
                )
                self._cache.append(buffer)
                self._binding.bind_ortvalue_input(PAST.format(layer=layer, kind=kind), buffer)
                self._binding.bind_ortvalue_output(PRESENT.format(layer=layer, kind=kind), buffer)

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values."""
        width = sum(
            2 * cache.heads * cache.head_size * np.dtype(cache.dtype).itemsize
            for cache in self.generation.caches
        )
        return width * self.capacity

    def feed(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append tokens, and return the logits [tokens, vocabulary] behind each.

        Raises:
            InputError: If there is no room for them, or one is not in the vocabulary.
            BackendError: If the runtime fails.
        """
        total = self.length + len(tokens)
        vocabulary = self.generation.vocabulary
        if not len(tokens) or total > self.capacity:
            raise InputError(
                "The tokens cannot be added.",
                where="generation",
                seen=f"{len(tokens)} tokens behind {self.length}",
                expected=f"1 to {self.capacity - self.length}",
                next_step="shorten the text, or make a generator with a greater capacity",
            )
        if vocabulary and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise InputError(
                "A token is not in the vocabulary.",
                where="generation",
                seen=f"tokens from {tokens.min()} to {tokens.max()}",
                expected=f"0 to {vocabulary - 1}",
                next_step="pass what the model's own tokenizer returns",
            )
        self._binding.bind_cpu_input(TOKENS, np.ascontiguousarray(tokens[None]))
        self._binding.bind_cpu_input(MASK, np.ones((1, total), np.int64))
        self._binding.bind_output(LOGITS, "cpu")  # of another size than the last ones
        try:
            self.inner.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(
                "ONNX Runtime failed while continuing a text.",
                seen=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                next_step="compare with the reference: compile with backend='reference'",
            ) from error
        self.length = total
        logits: NDArray[np.float32] = self._binding.get_outputs()[0].numpy()[0]
        return logits

    def reset(self, length: int = 0) -> None:
        """Forget the tokens from `length` on."""
        self.length = min(self.length, length)


def continue_text(
    generator: TextGenerator,
    prompt: NDArray[np.int64],
    max_new_tokens: int,
    sampling: Sampling,
    ends: Sequence[int],
    row: int,
    on_token: OnToken | None,
) -> tuple[list[int], bool]:
    """Return the tokens that continue a prompt, and whether the caller wants more.

    Args:
        generator: Whose cache it uses; what is in it is forgotten.
        prompt: Tokens.
        max_new_tokens: Tokens to choose.
        sampling: How they are chosen.
        ends: Tokens that end the text.
        row: Number of the text.
        on_token: Called with (row, token) as soon as a token is chosen; False ends the generation.
    """
    generator.reset()
    found: list[int] = []
    pending = prompt
    while len(found) < max_new_tokens:
        logits = generator.feed(pending)[-1]
        found.append(sampling.choose(logits, row, generator.length))
        if on_token is not None and on_token(row, found[-1]) is False:
            return found, False
        if found[-1] in ends:
            break
        pending = np.array(found[-1:], np.int64)
    return found, True
