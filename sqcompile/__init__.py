"""sqcompile: a compiler that makes trained PyTorch models smaller and faster on CPUs, and proves what it did.

compiled = sqcompile.compile(model, passes=[...], example_inputs=(x,))
compiled(x)                  # the model's own call and output structure
print(compiled.report)       # what every pass did, and what it cost
compiled.save("model.onnx")
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqcompile.api import Compiled, compile, load
    from sqcompile.errors import Error
    from sqcompile.levels import Level
    from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
    from sqcompile.program import Program
    from sqcompile.recipe import Recipe
    from sqcompile.remarks import Remark
    from sqcompile.report import Report
    from sqcompile.tracing import trace

__version__ = "0.1.0"  # the only place: the build reads this line

__all__ = [
    "Compiled",
    "Error",
    "Keeps",
    "Level",
    "Pass",
    "PassContext",
    "PassResult",
    "Program",
    "Recipe",
    "Remark",
    "Report",
    "compile",
    "load",
    "trace",
]

if importlib.util.find_spec("sqcompile.backends") is None:
    # Python searches the current folder, or the script's, before what is installed.
    raise ImportError(
        "This sqcompile is a source tree, and only a part of the package.\n"
        f"  where:    {__path__[0]}\n"
        "  seen:     no sqcompile.backends, which the installation puts beside it\n"
        "  expected: the installed package, or an editable installation of this tree\n"
        "  next:     start Python (or keep the script) in another folder; or, in this one: pip install -e .",
        name="sqcompile.backends",
    )

# Name -> the module that defines it. Names are looked up at their first use, because PyTorch takes more
# than a second to import, and `sqcompile --help` needs none of it.
_HOMES = {
    "Compiled": "api",
    "Error": "errors",
    "Keeps": "pipeline",
    "Level": "levels",
    "Pass": "pipeline",
    "PassContext": "pipeline",
    "PassResult": "pipeline",
    "Program": "program",
    "Recipe": "recipe",
    "Remark": "remarks",
    "Report": "report",
    "compile": "api",
    "load": "api",
    "trace": "tracing",
}
_SUBMODULES = ("passes", "testing")


if not TYPE_CHECKING:  # or mypy would believe that every name exists

    def __getattr__(name):
        """Import what a public name stands for."""
        if name in _SUBMODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
