"""Measured times of kernels: interpolation, their file, and whose they are."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from sqcompile.backends.native import kernel_times
from sqcompile.backends.native.kernel_times import FORMS, SHIPPED, FormTimes, KernelTimes
from sqcompile.errors import FileError

# 1 and 8 rows, a tenth and half of the weights kept; in ns for a million weights.
PLAIN = FormTimes((1, 8), (0.1, 0.5), ((100.0, 200.0), (800.0, 900.0)), ((300.0, 400.0), (800.0, 900.0)))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv(kernel_times.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path


def times(**changes: Any) -> KernelTimes:
    return dataclasses.replace(KernelTimes.load(SHIPPED), **changes)


@pytest.mark.parametrize(
    ("rows", "density", "cached", "million_ns"),
    [
        (1, 0.1, True, 100.0),
        (1, 0.3, True, 150.0),
        (1, 0.5, False, 400.0),
        (1, 0.01, True, 100.0),  # sparser than measured: as the sparsest
        (1, 0.9, True, 200.0),
        (2, 0.1, True, 200.0),
        (8, 0.5, True, 900.0),
        (16, 0.5, True, 1800.0),  # more rows than measured: in proportion
        (64, 0.3, False, 6800.0),
    ],
)
def test_times_are_linear_between_what_was_measured(
    rows: int, density: float, cached: bool, million_ns: float
) -> None:
    assert PLAIN.ns(rows, 1e6, density, cached=cached) == pytest.approx(million_ns)
    assert PLAIN.ns(rows, 3e6, density, cached=cached) == pytest.approx(3 * million_ns)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cached", [True, False])
def test_more_work_never_takes_less_time(form: str, cached: bool) -> None:
    shipped = KernelTimes.load(SHIPPED)
    densities = [number / 20 for number in range(1, 21)]
    rows = [1, 2, 3, 5, 8, 31, 32, 100, 128, 129, 1000]
    table = [[shipped.predict(form, m, 512, 512, d, cached=cached) for d in densities] for m in rows]
    assert all(a <= b for line in table for a, b in itertools.pairwise(line))
    assert all(
        a <= b for above, below in itertools.pairwise(table) for a, b in zip(above, below, strict=True)
    )
    assert table[0][0] > shipped.overhead_ns
    # What is read from memory does not come faster than from a cache.
    assert shipped.predict(form, 1, 512, 512, 0.5) >= shipped.predict(form, 1, 512, 512, 0.5, cached=True)


def test_nothing_takes_the_overhead() -> None:
    shipped = KernelTimes.load(SHIPPED)
    assert shipped.predict("int8", 0, 64, 64) == shipped.predict("int8", 1, 0, 64) == shipped.overhead_ns


def test_a_file_is_read_as_it_was_written(folder: Path) -> None:
    written = times(overhead_ns=123.5, threads=3)
    path = written.save(folder / "deep" / "times.json")
    assert dataclasses.replace(KernelTimes.load(path), source=None) == dataclasses.replace(
        written, source=None
    )
    assert [item.name for item in path.parent.iterdir()] == ["times.json"]
    assert json.loads(path.read_text())["version"] == 1


def damaged(change: str) -> str:
    text = SHIPPED.read_text(encoding="utf-8")
    content = json.loads(text)
    form = content["forms"]["int8"]
    match change:
        case "cut":
            return text[: len(text) // 2]
        case "list":
            return "[1, 2]"
        case "version":
            content["version"] = 2
        case "form":
            del content["forms"]["int8"]
        case "negative":
            form["memory"][0][0] = -1.0
        case "infinite":
            form["memory"][0][0] = float("inf")
        case "text":
            form["memory"][0][0] = "fast"
        case "short":
            form["memory"].pop()
        case "rows":
            form["rows"] = form["rows"][::-1]
        case "threads":
            content["threads"] = 0
    return json.dumps(content)


DAMAGES = ["cut", "list", "version", "form", "negative", "infinite", "text", "short", "rows", "threads"]


@pytest.mark.parametrize("change", DAMAGES)
def test_a_damaged_file_is_named(change: str, folder: Path) -> None:
    path = folder / "times.json"
    path.write_text(damaged(change), encoding="utf-8")
    with pytest.raises(FileError) as error:
        KernelTimes.load(path)
    assert error.value.where == str(path) and error.value.seen and error.value.expected
    assert "sqcompile bench --kernels" in str(error.value.next_step)


def test_without_a_file_the_shipped_times_are_taken(folder: Path) -> None:
    found, remark = kernel_times.kernel_times()
    assert found.source == SHIPPED
    assert (remark == "") == found.is_of_this_machine
    assert remark == "" or "`sqcompile bench --kernels` measures this machine" in remark


def own(**changes: Any) -> KernelTimes:
    return times(cpu=kernel_times.cpu_name(), isa=kernel_times.default_isa(), **changes)


def test_the_times_of_this_machine_are_taken(folder: Path) -> None:
    path = own(overhead_ns=777.0).save(kernel_times.cache_file())
    assert path.is_relative_to(folder / "cache")
    found, remark = kernel_times.kernel_times()
    assert (found.overhead_ns, found.source, remark) == (777.0, path, "")
    own(overhead_ns=888.0).save(path)
    assert kernel_times.kernel_times()[0].overhead_ns == 888.0


@pytest.mark.parametrize("what", ["damaged", "foreign"])
def test_a_file_that_is_of_no_use_is_left_out_and_named(what: str, folder: Path) -> None:
    path = own(overhead_ns=777.0).save(kernel_times.cache_file())
    if what == "damaged":
        path.write_text("{", encoding="utf-8")
    else:
        times(cpu="another CPU").save(path)
    found, remark = kernel_times.kernel_times()
    assert found.source == SHIPPED
    assert str(path) in remark and "left out" in remark and "sqcompile bench --kernels" in remark


def test_cpus_instruction_sets_and_threads_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {kernel_times.cache_file(threads) for threads in (1, 2)}
    monkeypatch.setattr(kernel_times, "default_isa", lambda: "scalar")
    paths.add(kernel_times.cache_file(1))
    monkeypatch.setattr(kernel_times, "cpu_name", lambda: "another CPU")
    paths.add(kernel_times.cache_file(1))
    assert len(paths) == 4


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SQCOMPILE_CACHE": "/chosen", "XDG_CACHE_HOME": "/xdg"}, "/chosen"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/sqcompile"),
        ({"XDG_CACHE_HOME": "not/absolute", "HOME": "/home/user"}, "/home/user/.cache/sqcompile"),
        ({"HOME": "/home/user"}, "/home/user/.cache/sqcompile"),
    ],
    ids=["chosen", "xdg", "relative", "home"],
)
def test_the_cache_is_where_the_system_wants_it(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("SQCOMPILE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert kernel_times.cache_folder() == Path(expected)


def test_measuring_fills_every_form() -> None:
    from sqcompile.backends.native.measure_kernels import measure_kernels

    found = measure_kernels(threads=1, quick=True)
    assert tuple(found.forms) == FORMS and found.threads == 1 and found.is_of_this_machine
    for form in FORMS:
        few, many = (found.predict(form, rows, 1024, 1024, 0.5, cached=True) for rows in (1, 128))
        # Beside other work a product may take ten times as long, but no kernel does 128 rows in the time of one.
        assert 0 < few < many
