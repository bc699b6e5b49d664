from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sqcompile.errors import FileError
from sqcompile.modules import import_module


@pytest.fixture(autouse=True)
def _clean_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_file_is_run_once(tmp_path: Path) -> None:
    (tmp_path / "counted.py").write_text("runs = []\nruns.append(1)\n")
    first = import_module(str(tmp_path / "counted.py"))
    assert import_module(str(tmp_path / "counted.py")) is first
    assert first.runs == [1]


def test_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "twin_module.py").write_text(f"name = '{folder}'\n")
    modules = [import_module(str(tmp_path / folder / "twin_module.py")) for folder in ("a", "b")]
    assert [module.name for module in modules] == ["a", "b"]
    assert all(sys.modules[module.__name__] is module for module in modules)


def test_a_file_finds_its_neighbours_and_hides_no_package(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_it.py").write_text("value = 3\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('hid the standard library')\n")
    (tmp_path / "needs_neighbour.py").write_text("import json\nfrom neighbour_of_it import value\n")
    assert import_module(str(tmp_path / "needs_neighbour.py")).value == 3


@pytest.mark.parametrize(
    ("content", "line", "seen"),
    [
        ("x = 1\ny = (\n", 2, "SyntaxError"),
        ("x = 1\n\nraise ValueError('no data')\n", 3, "ValueError: no data"),
        ("import no_such_package_anywhere\n", 1, "no_such_package_anywhere"),
        ("def f():\n    return 1 / 0\n\n\nf()\n", 2, "ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", 2, "SystemExit"),
    ],
)
def test_what_cannot_be_run_is_named_with_its_line(
    tmp_path: Path, content: str, line: int, seen: str
) -> None:
    path = tmp_path / "wrong_module.py"
    path.write_text(content)
    with pytest.raises(FileError) as caught:
        import_module(str(path))
    assert caught.value.where == f"{path}:{line}"
    assert seen in str(caught.value)
    path.write_text("fine = True\n")  # a failed module is not kept
    assert import_module(str(path)).fine


def test_missing_files_and_modules_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read"):
        import_module(str(tmp_path / "nothing.py"))
    with pytest.raises(FileError, match="cannot be imported"):
        import_module("no_such_module_at_all")


def test_an_error_of_ours_keeps_its_parts(tmp_path: Path) -> None:
    """A pass that is wrong as a class fails while its file is imported; the text of one error is enough."""
    path = tmp_path / "wrong_pass.py"
    path.write_text("from sqcompile import Pass\n\n\nclass Wrong(Pass):\n    ratio = 0.5\n")
    with pytest.raises(
        FileError, match=r"cannot be imported\. 'ratio' of the pass Wrong has no type"
    ) as caught:
        import_module(str(path))
    assert caught.value.where == f"{path}:4, class wrong_pass.Wrong"
    assert caught.value.expected == "ratio: float = …" and "annotate it" in str(caught.value.next_step)
