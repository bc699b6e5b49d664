"""Continuing texts: prompts in, tokens out, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sqcompile.backends.native import _native
from sqcompile.backends.native.kernels import default_isa
from sqcompile.errors import BackendError, InputError
from sqcompile.generation import OnToken, as_tokens

KV_CACHES = ("float32", "int8")


class TextGenerator:
    """Rows of tokens that a model continues, with the cache of what they leave behind.

    A row keeps its tokens between calls, so that a conversation goes on where it was, and `rewind` takes back
    what shall not have been said. It may be used by several threads, which then take turns.

    Args:
        model: A model that generates.
        threads: Threads within an operator.
        rows: Texts that are continued together.
        capacity: Tokens that a row may have.
        kv_cache: How keys and values are kept: `float32`, or `int8`, with a scale for each position and head,
            in about a quarter of the memory.

    Raises:
        InputError: If the model takes fewer tokens, or there is no such cache.
        BackendError: If the model does not generate, or there is not enough memory.
    """

    def __init__(
        self, model: _native.Model, threads: int, rows: int, capacity: int, kv_cache: str = "float32"
    ) -> None:
        if kv_cache not in KV_CACHES:
            raise InputError(
                "There is no such cache.",
                where="kv_cache",
                seen=repr(kv_cache),
                expected=" or ".join(map(repr, KV_CACHES)),
                next_step="pass one of them",
            )
        if not model.generates:
            raise no_generation(model)
        self.kv_cache = kv_cache
        self.vocabulary = model.vocabulary
        self.inner: _native.Generator = _run(
            lambda: _native.Generator(model, threads, default_isa(), rows, capacity, kv_cache == "int8"),
            "The cache cannot be made.",
        )

    @property
    def rows(self) -> int:
        """Texts that are continued together."""
        return self.inner.rows

    @property
    def capacity(self) -> int:
        """Tokens that a row may have."""
        return self.inner.capacity

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values."""
        return self.inner.cache_bytes

    def length(self, row: int = 0) -> int:
        """Return how many tokens of a row the model has seen."""
        return self.inner.length(row)

    def feed(self, texts: Mapping[int, Any]) -> None:
        """Append tokens to rows, {row: tokens}, all in one go.

        Raises:
            InputError: If a row is full or does not exist, or a token is not in the vocabulary.
        """
        prompts = [(row, as_tokens(tokens, f"row {row}")) for row, tokens in texts.items()]
        _run(lambda: self.inner.feed(prompts), "The tokens cannot be added.")

    def logits(self, row: int = 0) -> torch.Tensor:
        """Return the logits [vocabulary] behind the last token of a row.

        Raises:
            InputError: If the row is empty, or was taken back since it was fed.
        """
        return torch.from_numpy(_run(lambda: self.inner.logits(row), "There are no logits."))

    def rewind(self, row: int = 0, length: int = 0) -> None:
        """Forget a row's tokens from `length` on.

        Raises:
            InputError: If the row is not that long.
        """
        _run(lambda: self.inner.rewind(row, length), "The row cannot go back.")

    def reset(self) -> None:
        """Forget everything."""
        for row in range(self.rows):
            self.rewind(row)

    def generate(
        self,
        prompts: Mapping[int, Any],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        on_token: OnToken | None = None,
    ) -> dict[int, list[int]]:
        """Append prompts to rows, and choose tokens until each has had its number, or one that ends it.

        Args:
            prompts: Tokens by row.
            max_new_tokens: Tokens to choose for each row.
            temperature: 0 takes the most likely token; else logits are divided by it and one is drawn.
            top_k: Draw among so many of the most likely; 0: among all.
            top_p: Draw among the fewest that together have this probability.
            seed: Of the draws. A row's draws depend on nothing but this, its number and its length.
            eos_token_id: Tokens that end a row.
            on_token: Called with (row, token) as soon as a token is chosen; False ends the generation.

        Returns:
            The new tokens of each row. All but the last are in the cache too.

        Raises:
            InputError: If something does not fit, or an option is out of range.
        """
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        found: dict[int, list[int]] = {row: [] for row in prompts}
        texts = [(row, as_tokens(tokens, f"row {row}")) for row, tokens in prompts.items()]

        def take(row: int, token: int) -> bool:
            found[row].append(token)
            return on_token is None or on_token(row, token) is not False

        _run(
            lambda: self.inner.generate(
                texts, max_new_tokens, temperature, top_k, top_p, seed & (2**64 - 1), ends, take
            ),
            "The prompts cannot be continued.",
        )
        return found


def no_generation(model: _native.Model) -> BackendError:
    """Return the error that says why a model does not generate."""
    import json

    reason = json.loads(model.metadata).get("no_generation", "the file was written without it")
    return BackendError(
        "The model does not generate text.",
        where="lowering to the native engine",
        seen=reason,
        expected="a causal language model: input_ids [batch, sequence], both dynamic, to logits",
        next_step="call the model itself; or trace it with a dynamic batch and sequence",
    )


def _run(call: Callable[[], Any], what: str) -> Any:
    try:
        return call()
    except (ValueError, IndexError, TypeError) as error:
        raise InputError(
            what,
            where="generation",
            seen=str(error).splitlines()[0],
            next_step="check the tokens, the lengths and the options",
        ) from None
    except (RuntimeError, MemoryError) as error:
        raise BackendError(
            what,
            where="generation",
            seen=str(error) or "not enough memory",
            next_step="use fewer rows or a shorter capacity",
        ) from error
