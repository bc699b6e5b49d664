"""What every benchmark shares: alternating timing, the environment, JSON output."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sqcompile.report import environment


def alternate(
    calls: Mapping[str, Callable[[], Any]], *, runs: int, warmup: int = 3, settle: bool = False
) -> dict[str, list[float]]:
    """Call all in turns, `runs` times each, and return the times in ns, by name.

    Turns let a drift of the machine's speed (neighbours, clock) meet all alike. Threads of some runtimes
    spin for a while after a call, on cores that the next one wants: to `settle`, each makes an untimed call
    before the timed one. (A pause would do as well, but a core that slept is half as fast at first.)
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            if settle:
                call()
            started = time.perf_counter_ns()
            call()
            times[name].append(float(time.perf_counter_ns() - started))
    return times


def median_ratio(base: list[float], other: list[float]) -> float:
    """Return how many times faster `other` is than `base`: the median of the ratios of each turn."""
    return statistics.median(first / second for first, second in zip(base, other, strict=True))


def spread(times: list[float]) -> str:
    """Return `median ms (minimum to maximum)`."""
    low, middle, high = min(times), statistics.median(times), max(times)
    return f"{middle / 1e6:.3f} ms ({low / 1e6:.3f} to {high / 1e6:.3f})"


def save_training(path: Path | None, facts: dict[str, Any], *parts: Any) -> None:
    """Write where a training is, if a path is given: facts, the state of PyTorch's generator, and of each part.

    Args:
        path: The file; it is replaced as a whole.
        facts: Numbers, lists and text.
        parts: The module, its optimizer, …, with `state_dict`.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    torch.save((facts, torch.get_rng_state(), [part.state_dict() for part in parts]), partial)
    os.replace(partial, path)


def load_training(path: Path | None, *parts: Any) -> dict[str, Any]:
    """Bring a training to where it was, and return the facts; none, and no change, if there is no such file."""
    if path is None or not path.exists():
        return {}
    facts, random_state, states = torch.load(path, weights_only=True)
    torch.set_rng_state(random_state)
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    return dict(facts)


def write_json(path: Path | None, name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    """Write the rows with CPU, versions and settings, if a path is given."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "environment": environment(), "settings": settings, "rows": rows}
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
