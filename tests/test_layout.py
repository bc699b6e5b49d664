"""The layout holds: names agree, each package has one import path, and dependencies point one way."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sqcompile.passes
from sqcompile.pipeline import Pass, registry
from sqcompile.pipeline.contract import option_fields, text_name

ROOT = Path(__file__).resolve().parent.parent
PASSES = {name: kind for name, kind in registry().items() if kind.__module__.startswith("sqcompile.passes")}
GROUPS = sorted(path.name for path in (ROOT / "passes").iterdir() if (path / "__init__.py").exists())
# Files that pull a package's passes together; they hold none themselves.
GATHERING = {"__init__.py", "pipelines.py"}


def sources(*folders: str) -> list[Path]:
    files = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert files
    return files


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the modules that a file imports, with the line; of `from a import b` both `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
            yield node.module or "", node.lineno


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def pass_files() -> list[Path]:
    return [path for path in sources("passes") if path.name not in GATHERING]


@pytest.mark.parametrize("name", PASSES)
def test_class_file_text_and_test_of_a_pass_agree(name: str) -> None:
    kind = PASSES[name]
    *_, group, file = kind.__module__.split(".")
    assert text_name(kind.__name__) == name == file.replace("_", "-")
    assert kind.__module__ == f"sqcompile.passes.{group}.{file}"
    assert (ROOT / "passes" / group / f"{file}.py").exists()
    assert (ROOT / "tests" / "passes" / group / f"test_{file}.py").exists(), "the pass has no test file"
    assert not kind.__name__.endswith("Pass")


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_public(name: str) -> None:
    kind = PASSES[name]
    group = importlib.import_module(kind.__module__.rpartition(".")[0])
    assert getattr(sqcompile.passes, kind.__name__) is kind is getattr(group, kind.__name__)
    assert kind.__name__ in sqcompile.passes.__all__
    assert kind.__name__ in group.__all__


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_documents_its_options(name: str) -> None:
    kind = PASSES[name]
    text = kind.__doc__ or ""
    for option in option_fields(kind):
        assert re.search(rf"^\s+{option.name}: ", text, re.MULTILINE), f"'{option.name}' is not documented"
    assert kind.run.__doc__ and re.search(r"^    (Rewrites|Keeps):", text, re.MULTILINE)


def test_a_file_holds_one_pass() -> None:
    modules = [kind.__module__ for kind in PASSES.values()]
    assert len(set(modules)) == len(modules)
    files = {f"sqcompile.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}" for path in pass_files()}
    assert files == set(modules), "a file in passes/ without a pass, or a pass that is not registered"


def test_every_group_says_what_is_public() -> None:
    for group in GROUPS:
        module = importlib.import_module(f"sqcompile.passes.{group}")
        assert len(set(module.__all__)) == len(module.__all__)
        assert all(issubclass(getattr(module, name), Pass) for name in module.__all__)
    everything = {
        name for group in GROUPS for name in importlib.import_module(f"sqcompile.passes.{group}").__all__
    }
    assert everything == set(sqcompile.passes.__all__) - {"pipelines"}


def test_packages_name_what_they_import_in_full() -> None:
    """A relative import would hide from the tests below."""
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources("sqcompile", "passes", "backends")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_passes_exist_once() -> None:
    """Seen from the repository root `import passes` would work too, and every class would exist twice."""
    kinds = list(registry().values())
    assert not [kind for kind in kinds if kind.__module__.split(".")[0] in ("passes", "backends")]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources("sqcompile", "passes", "backends", "tests", "benchmarks", "examples", "tools")
        for module, line in imports(path)
        if within(module, "passes") or within(module, "backends")
    ]
    assert not wrong


def test_passes_import_the_core_alone() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in pass_files()
        for module, line in imports(path)
        if within(module, "sqcompile.passes") or within(module, "sqcompile.backends")
    ]
    assert not wrong, "what two passes share belongs into the core"


def test_backends_import_the_core_and_themselves() -> None:
    wrong = []
    for backend in sorted(path.name for path in (ROOT / "backends").iterdir() if path.is_dir()):
        for path in (ROOT / "backends" / backend).rglob("*.py"):
            wrong += [
                f"{path.relative_to(ROOT)}:{line} imports {module}"
                for module, line in imports(path)
                if within(module, "sqcompile.passes")
                or (
                    within(module, "sqcompile.backends")
                    and not within(module, f"sqcompile.backends.{backend}")
                )
            ]
    assert not wrong


def test_the_core_imports_neither_passes_nor_backends() -> None:
    """It finds both by name at run time, through importlib, so that either can be left out."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources("sqcompile")
        for module, line in imports(path)
        if within(module, "sqcompile.passes") or within(module, "sqcompile.backends")
    ]
    assert not wrong
