from __future__ import annotations

from pathlib import Path


def test_shows_and_writes_the_report_of_a_folder(run, folder: Path) -> None:
    first = run("compile", "net.py:make", "-d", "x.npz", "-p", "fold-batch-norm", "-o", "build")
    assert first.code == 0, first.err
    shown = run("report", "build")
    assert shown.code == 0 and "fold-batch-norm" in shown.out
    written = run("report", "build", "-o", "page.html")
    assert written.code == 0 and "Wrote page.html" in written.out
    assert '<script type="application/json" id="data">' in (folder / "page.html").read_text()
    assert run("report", "build", "--json").json["passes"][0]["text"] == "fold-batch-norm"


def test_says_where_there_is_none(run, folder: Path) -> None:
    result = run("report", "net.onnx")
    assert result.code == 1 and "--html report.html" in result.err
