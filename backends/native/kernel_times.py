"""What products take on a machine: measured times, kept in a file, and what they say about other sizes.

`sqcompile bench --kernels` measures (`measure_kernels.py`) and writes the file into the user's cache folder; without
one, the times that come with the package are used, which were measured on the CPU that they name. A file is
for one CPU, instruction set and number of threads; any other is left alone.

    {"version": 1, "cpu": …, "isa": …, "threads": …, "overhead_ns": …, "forms": {form: {
        "rows": [1, …], "density": [0.1, …], "cache": [[…], …], "memory": [[…], …]}}}

`cache` and `memory` hold the ns that a million weights (zeros included) take, a line for each number of rows of
activations and a column for each density: of weights, or of blocks, that are not zero. In `memory`, weights are
read from there; in `cache`, a model is so small that it stays in the CPU's caches.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sqcompile.backends.native.cpu import cpu_features
from sqcompile.backends.native.kernels import default_isa
from sqcompile.errors import FileError
from sqcompile.files import atomic_file, require_file
from sqcompile.quantization.format import Format, PerGroup
from sqcompile.sparsity import Pattern

VERSION = 1
SHIPPED = Path(__file__).with_name("kernel_times.json")
CACHE_VARIABLE = "SQCOMPILE_CACHE"

FORMS = (
    "float32",
    "int8",
    "int8, bitmask",
    "int8 in 1x4 blocks",
    "int8 in 4x4 blocks",
    "int8 in 16x4 blocks",
    "8-bit",
    "4-bit",
    "3-bit",
    "2-bit",
    "4-bit, bitmask",
)
"""Forms of weights that have kernels of their own; those by bits have scales by groups."""

_STEP = "run `sqcompile bench --kernels`, which measures this machine and writes the file anew"


@dataclass(frozen=True)
class FormTimes:
    """Times of one form of weights.

    Attributes:
        rows: Rows of activations, ascending from 1.
        density: Parts of weights or blocks that are not zero, ascending.
        cache: [rows, density], in ns for a million weights that lie in the CPU's caches.
        memory: The same for weights in memory.
    """

    rows: tuple[int, ...]
    density: tuple[float, ...]
    cache: tuple[tuple[float, ...], ...]
    memory: tuple[tuple[float, ...], ...]

    def ns(self, rows: float, weights: float, density: float, *, cached: bool) -> float:
        """Return the time of a product: linear between what was measured, and along the rows also beyond."""
        table = self.cache if cached else self.memory
        lines = [float(np.interp(density, self.density, line)) for line in table]
        beyond = max(rows / self.rows[-1], 1.0)
        return float(np.interp(rows, self.rows, lines)) * beyond * weights / 1e6


@dataclass(frozen=True)
class KernelTimes:
    """What products take on one machine.

    Attributes:
        cpu: Its name.
        isa: Instruction set of the kernels.
        threads: Threads of each product.
        overhead_ns: Time of a product without work: threads that wake, and a step of a plan.
        forms: Times by form.
        source: The file that they come from.
    """

    cpu: str
    isa: str
    threads: int
    overhead_ns: float
    forms: Mapping[str, FormTimes]
    source: Path | None = None

    def predict(
        self, form: str, rows: int, n: int, k: int, density: float = 1.0, *, cached: bool = False
    ) -> float:
        """Return the time of a product [rows, K] x [N, K] in ns.

        Args:
            form: One of `FORMS`.
            rows: Rows of the activation.
            n: Outputs.
            k: Inputs.
            density: Part of the weights, or of the blocks, that is not zero; dense forms take no notice.
            cached: Whether the whole model stays in the CPU's caches.
        """
        if rows <= 0 or n <= 0 or k <= 0:
            return self.overhead_ns
        return self.overhead_ns + self.forms[form].ns(rows, n * k, density, cached=cached)

    @property
    def is_of_this_machine(self) -> bool:
        """Whether they were measured on a CPU as this one, with the instruction set that is used now."""
        return (self.cpu, self.isa) == (cpu_name(), default_isa())

    def save(self, path: Path) -> Path:
        """Write them, whole or not at all.

        Raises:
            FileError: If the file cannot be written.
        """
        content = {
            "version": VERSION,
            "cpu": self.cpu,
            "isa": self.isa,
            "threads": self.threads,
            "overhead_ns": self.overhead_ns,
            "forms": {name: asdict(times) for name, times in self.forms.items()},
        }
        with atomic_file(path) as temporary:
            temporary.write_text(_layout(content), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> KernelTimes:
        """Read them.

        Raises:
            FileError: If the file is missing, damaged, or of another version.
        """
        require_file(path, "file of kernel times")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["version"] if isinstance(content, dict) else None
            if version != VERSION:
                raise ValueError(f"version {version!r}")
            return cls._from(content, path)
        except (ValueError, KeyError, TypeError, OSError) as error:
            missing = isinstance(error, KeyError)
            raise FileError(
                "The file holds no kernel times.",
                where=str(path),
                seen=f"no {error.args[0]!r}" if missing else str(error).splitlines()[0],
                expected=f"JSON of version {VERSION}, with positive times of {len(FORMS)} forms of weights",
                next_step=_STEP,
            ) from None

    @classmethod
    def _from(cls, content: dict[str, Any], path: Path) -> KernelTimes:
        forms = {name: _form(name, content["forms"][name]) for name in FORMS}
        overhead = float(content["overhead_ns"])
        threads = content["threads"]
        if not math.isfinite(overhead) or overhead < 0 or not isinstance(threads, int) or threads < 1:
            raise ValueError(f"overhead_ns {overhead}, threads {threads!r}")
        return cls(str(content["cpu"]), str(content["isa"]), threads, overhead, forms, path)


def form_names(format: Format, sparsity: float, pattern: Pattern) -> list[tuple[str, float]]:
    """Return the forms in which a weight may be stored, with the density of each; none if no kernel has its format."""
    if isinstance(format.granularity, PerGroup):
        forms = [(f"{format.bits}-bit", 1.0)]
    elif format.bits == 8:
        forms = [("int8", 1.0)]
    else:
        return []
    dense = forms[0][0]
    if sparsity and pattern.columns == pattern.rows == 1:
        forms.append((f"{dense}, bitmask", 1 - sparsity))
    elif sparsity:
        forms.append((f"{dense} in {pattern} blocks", 1 - sparsity))
    return [(form, density) for form, density in forms if form in FORMS]


def _form(name: str, content: Any) -> FormTimes:
    rows, density = tuple(map(int, content["rows"])), tuple(map(float, content["density"]))
    tables = [tuple(tuple(map(float, line)) for line in content[kind]) for kind in ("cache", "memory")]
    for axis in (rows, density):
        if not axis or axis[0] <= 0 or any(a >= b for a, b in pairwise(axis)):
            raise ValueError(f"{name}: rows {rows}, density {density}")
    for table in tables:
        if [len(line) for line in table] != [len(density)] * len(rows):
            raise ValueError(f"{name}: {len(table)} lines of times for {len(rows)} numbers of rows")
        if not all(math.isfinite(item) and item > 0 for line in table for item in line):
            raise ValueError(f"{name}: times that are not positive")
    return FormTimes(rows, density, *tables)


def _layout(content: dict[str, Any]) -> str:
    """Return JSON with a line for each line of a table, so that two files can be compared."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[([^\[\]{}]*)\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def cpu_name() -> str:
    """Return the name under which times of this CPU are kept: brand, family and model."""
    features = cpu_features()
    brand = features.brand or features.vendor or "unknown"
    return f"{brand} ({features.architecture}, family {features.family}, model {features.model})"


def cache_folder() -> Path:
    """Return the user's folder for what can be made again: $SQCOMPILE_CACHE, or where the system wants it."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "sqcompile"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "sqcompile" / "Cache"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sqcompile"


def cache_file(threads: int | None = None) -> Path:
    """Return where the times of this CPU, instruction set and number of threads are kept."""
    key = hashlib.sha256(cpu_name().encode()).hexdigest()[:8]
    return cache_folder() / f"kernels-{default_isa()}-{threads or default_threads()}threads-{key}.json"


def default_threads() -> int:
    """Return with how many threads a session runs unless told otherwise."""
    return cpu_features().physical_cores


def kernel_times() -> tuple[KernelTimes, str]:
    """Return the times to choose by, and what is to be said about them (nothing, as a rule).

    A cache is no reason to fail: a file that is damaged, or another CPU's, is left out and named.
    """
    path = cache_file()
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        stamp = None
    return _kernel_times(path, stamp)


@lru_cache(maxsize=4)
def _kernel_times(path: Path, stamp: int | None) -> tuple[KernelTimes, str]:
    problem = ""
    if stamp is not None:
        try:
            times = KernelTimes.load(path)
        except FileError as error:
            problem = f"{path} holds no kernel times ({error.seen}) and is left out; {_STEP}"
        else:
            if times.is_of_this_machine:
                return times, ""
            problem = f"{path} holds the times of {times.cpu}, {times.isa}, and is left out; {_STEP}"
    shipped = KernelTimes.load(SHIPPED)
    if not problem and not shipped.is_of_this_machine:
        problem = (
            f"forms of weights were chosen by the times of {shipped.cpu}, {shipped.isa}, {shipped.threads} threads; "
            "`sqcompile bench --kernels` measures this machine"
        )
    return shipped, problem
