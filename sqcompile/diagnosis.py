"""Finding out whether this machine and installation can do what sqcompile does."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from sqcompile.backend import backend_names, get_backend
from sqcompile.errors import Error
from sqcompile.report import environment

# Packages that are not needed, and what they are for.
_OPTIONAL = {
    "transformers": "folders of Hugging Face, text: pip install sqcompile[llm]",
    "scipy": "mixed precision: pip install sqcompile[llm]",
    "compressed-tensors": "quantized Hugging Face folders: pip install compressed-tensors",
    "gguf": "files for llama.cpp: pip install gguf",
}
# Of the greatest output: the same sums in another order, and int8 weights alike in all.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class BackendState:
    """How a backend is.

    Attributes:
        name: Its name.
        problem: What failed, with the next step; None if a quantized model ran and gave the right numbers.
        facts: What it runs on here.
    """

    name: str
    problem: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """What was found out.

    Attributes:
        environment: CPU, threads, system and versions.
        packages: Versions of packages that are not needed, or what is missed without them.
        backends: Every backend.
    """

    environment: Mapping[str, str]
    packages: Mapping[str, str]
    backends: tuple[BackendState, ...]

    @property
    def healthy(self) -> bool:
        """Whether every backend works."""
        return all(state.problem is None for state in self.backends)


def diagnose() -> Diagnosis:
    """Run a small quantized model in every backend, and collect what results depend on."""
    packages = {}
    for name, purpose in _OPTIONAL.items():
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = f"not installed ({purpose})"
    return Diagnosis(
        {"system": platform.platform(), **environment()},
        packages,
        tuple(_try(name) for name in backend_names()),
    )


def _try(name: str) -> BackendState:
    from sqcompile.api import Compiled, compile  # the API knows the backends by this package's registry

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
            x = torch.randn(4, 64)
        with torch.no_grad():
            wanted = model(x)
        compiled = compile(model, "quantize-weights", (x,), backend=name, verify="off")
        assert isinstance(compiled, Compiled)
        apart = float((compiled(x) - wanted).abs().max() / wanted.abs().max())
        facts = get_backend(name).facts()
    except Error as error:
        return BackendState(name, str(error))
    except Exception as error:  # a broken installation may raise anything
        return BackendState(name, f"{type(error).__name__}: {error}")
    if not apart <= _TOLERANCE:
        return BackendState(name, f"gives wrong numbers: {apart:.3g} of the greatest output away", facts)
    return BackendState(name, None, facts)
