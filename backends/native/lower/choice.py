"""Which form of a weight to pack: the one that takes the least time on this machine, or nearly, in fewer bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from sqcompile.backends.native.cpu import cpu_features
from sqcompile.backends.native.kernel_times import KernelTimes
from sqcompile.backends.native.plan import Size
from sqcompile.program import Program

# A form that is so much smaller than the fastest may take so much longer: measured times are no better than that.
SMALLER, LONGER = 0.9, 1.1

# What a language model does: that many tokens one by one, behind a prompt of so many.
TOKENS, PROMPT = 128, 128

_L3_BYTES = 32 << 20  # where the CPU does not say


@dataclass(frozen=True)
class Candidate:
    """A form that a weight can have.

    Attributes:
        form: Its name, as `kernel_times.FORMS` has it.
        density: Part of the weights, or of the blocks, that it keeps.
        size_bytes: Bytes of its codes and of where they are.
        block_outputs: Outputs of its blocks, if it has any.
    """

    form: str
    density: float
    size_bytes: float
    block_outputs: int = 0


@dataclass(frozen=True)
class Workload:
    """How often a product has how many rows of activations; the share of each number.

    Attributes:
        calls: (rows, calls).
        cached: Whether the model is so small that its weights stay in the CPU's caches.
    """

    calls: tuple[tuple[int, int], ...]
    cached: bool

    def ns(self, times: KernelTimes, candidate: Candidate, n: int, k: int) -> float:
        """Return the time of all calls."""
        return sum(
            calls * times.predict(candidate.form, rows, n, k, candidate.density, cached=self.cached)
            for rows, calls in self.calls
        )

    def __str__(self) -> str:
        if len(self.calls) > 1:
            return f"{TOKENS} tokens behind a prompt of {PROMPT}"
        rows = self.calls[0][0]
        return f"{rows} rows" if rows != 1 else "1 row"


def choose(
    times: KernelTimes, workload: Workload, candidates: Sequence[Candidate], n: int, k: int
) -> tuple[Candidate, str]:
    """Return the form to take, and what is to be said about it: why zeros do not pay, or what is paid for.

    Args:
        times: What products take.
        workload: What the layer has to do.
        candidates: The dense form, then others.
        n: Outputs.
        k: Inputs.
    """
    dense = candidates[0]
    ns = {item: workload.ns(times, item, n, k) for item in candidates}
    fastest = min(candidates, key=ns.__getitem__)
    near = [
        item
        for item in candidates
        if item.size_bytes <= SMALLER * fastest.size_bytes and ns[item] <= LONGER * ns[fastest]
    ]
    best = min(near, key=lambda item: item.size_bytes, default=fastest)
    others = [item for item in candidates if item is not dense]
    if best is dense and others:
        other = min(others, key=ns.__getitem__)
        ratio = ns[other] / ns[dense]
        reason = f"would take {ratio:.2f}x its time" if ratio > 1 else "would save hardly anything"
        return best, f"sparsity does not pay: as {other.form}, the weight {reason} ({workload})"
    if best is not dense and ns[best] > ns[dense]:
        saved = 1 - best.size_bytes / dense.size_bytes
        return best, (
            f"sparsity saves {saved:.0%} of the bytes and no time: {ns[best] / ns[dense]:.2f}x that of the dense form "
            f"({workload})"
        )
    return best, ""


def workload_of(program: Program, rows: Size) -> Workload:
    """Return what a product of so many rows has to do in a program.

    A language model mostly reads one token at a time; where else sizes are symbols, those that it was traced with
    stand for all.
    """
    cached = _stays_in_cache(program)
    if isinstance(rows, int):
        return Workload(((rows, 1),), cached)
    if _continues_texts(program):
        return Workload(((1, TOKENS), (PROMPT, 1)), cached)
    return Workload(((max(int(rows.subs(hints_of(program))), 1), 1),), cached)


def _continues_texts(program: Program) -> bool:
    """Whether a program looks like a language model: tokens [batch, any number], to numbers for each of them."""
    tokens = [node.meta.get("val") for node in program.placeholders]
    first = next((item for item in tokens if isinstance(item, torch.Tensor)), None)
    result = program.output.args[0]
    assert isinstance(result, (tuple, list))
    results = [item.meta.get("val") for item in result if isinstance(item, fx.Node)]
    return (
        first is not None
        and first.dtype is torch.int64
        and first.dim() == 2
        and isinstance(first.shape[1], torch.SymInt)
        and any(
            isinstance(item, torch.Tensor)
            and item.dim() == 3
            and str(item.shape[1]) == str(first.shape[1])
            and not isinstance(item.shape[2], torch.SymInt)
            for item in results
        )
    )


def _stays_in_cache(program: Program) -> bool:
    """Whether the program's tensors fill at most half of the last cache, which others use too."""
    used = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    stored = sum(tensor.numel() * tensor.element_size() for tensor in (program.tensor(name) for name in used))
    return stored <= (cpu_features().l3_bytes or _L3_BYTES) // 2


@dataclass(frozen=True)
class Product:
    """A product with a stored weight, as the report shows it and times are predicted for.

    Attributes:
        form: The weight's form, for people.
        choice: The weight's form, as times are kept by.
        n: Outputs.
        k: Inputs.
        rows: Rows of activations.
        cached: Whether weights stay in the CPU's caches.
        remark: What is to be said of the choice.
        share: Its time as a part of that of the form that times are kept by.
    """

    form: str
    choice: Candidate
    n: int
    k: int
    rows: Size
    cached: bool
    remark: str = ""
    share: float = 1.0

    def ns(self, times: KernelTimes, sizes: Mapping[sympy.Symbol, int]) -> float:
        """Return the time that it will take, with these sizes for symbols."""
        rows = self.rows if isinstance(self.rows, int) else int(self.rows.subs(sizes))
        time = times.predict(self.choice.form, rows, self.n, self.k, self.choice.density, cached=self.cached)
        return self.share * time


def hints_of(program: Program) -> dict[sympy.Symbol, int]:
    """Return the sizes that a program was traced with, by symbol; 1 where that is not known any more."""
    found: dict[sympy.Symbol, int] = {}
    for node in program.placeholders:
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                found[size.node.expr] = int(size.node.hint or 1)
    return found
