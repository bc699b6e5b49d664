"""What the package promises: names, laziness, documentation, types."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import sqcompile
from sqcompile.errors import Error


def test_every_name_is_there_and_documented() -> None:
    documented = {"Program", "Pass", "PassResult", "PassContext", "Level", "Keeps", "Remark", "Error"}
    assert documented | {"compile", "load", "Compiled", "Report", "trace"} <= set(sqcompile.__all__)
    assert sorted(sqcompile.__all__) == list(sqcompile.__all__)
    for name in sqcompile.__all__:
        value = getattr(sqcompile, name)
        assert inspect.getdoc(value), name
        assert value.__module__.startswith("sqcompile."), name
        assert name in dir(sqcompile)


def test_submodules() -> None:
    assert sqcompile.passes.FoldBatchNorm.__module__.startswith("sqcompile.passes.")
    assert callable(sqcompile.testing.check_pass)
    assert callable(sqcompile.passes.pipelines.int8_static)


def test_other_names_are_refused_as_python_does() -> None:
    with pytest.raises(AttributeError, match="module 'sqcompile' has no attribute 'comple'"):
        _ = sqcompile.comple
    assert not hasattr(sqcompile, "comple")


def test_a_source_tree_that_hides_the_installed_package_says_so() -> None:
    """Without an editable installation Python finds the folder that it starts in first, and only the core in it."""
    lines = [
        "import sys",
        # What an editable installation adds, which finds the other two folders.
        "sys.meta_path = [item for item in sys.meta_path if 'Redirect' not in type(item).__name__]",
        f"sys.path.insert(0, {str(Path(sqcompile.__file__).parents[1])!r})",
        "import sqcompile",
    ]
    if (Path(sqcompile.__file__).parent / "backends").is_dir():
        pytest.skip("not the source tree: the whole package is here")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "ImportError: This sqcompile is a source tree" in done.stderr
    assert "pip install -e ." in done.stderr


def test_version() -> None:
    from importlib.metadata import version

    assert sqcompile.__version__ == version("sqcompile")


HEAVY = {
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "scipy",
    "sklearn",
    "torchao",
    "transformers",
    "rich",
    "typer",
    "yaml",
}
"""What takes long to import; some of it is not needed by everybody."""


def imported(script: str) -> set[str]:
    """Return which of the heavy packages a script has imported, in a process of its own."""
    script += f"\nimport sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_is_cheap() -> None:
    """Counted and not timed, which would depend on the machine: nothing heavy is imported before it is used."""
    assert imported("import sqcompile") == set()
    assert imported("import sqcompile.cli") <= {"typer", "rich"}


def test_importing_the_compiler_imports_no_backend() -> None:
    found = imported("import sqcompile; sqcompile.compile, sqcompile.Program, sqcompile.passes")
    assert "torch" in found
    assert found <= {"torch", "numpy", "yaml"}


def test_all_errors_can_be_caught_at_once() -> None:
    from sqcompile import errors

    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, Exception)]
    assert len(kinds) > 10 and all(issubclass(kind, Error) for kind in kinds)


def test_options_of_compile_are_keywords() -> None:
    parameters = inspect.signature(sqcompile.compile).parameters
    positional = [name for name, item in parameters.items() if item.kind is item.POSITIONAL_OR_KEYWORD]
    assert positional == ["model", "passes", "example_inputs", "calibration", "dynamic_shapes", "backend"]
    assert {"seed", "max_memory", "work_dir", "verify"} <= set(parameters)
    assert all(item.default is not item.empty for name, item in parameters.items() if name != "model")
