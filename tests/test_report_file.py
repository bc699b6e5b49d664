"""Reports read back are the reports that were written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.programs import data
from torch import nn

import sqcompile
from sqcompile.api import Compiled
from sqcompile.errors import FileError
from sqcompile.passes import pipelines
from sqcompile.report import Report
from sqcompile.report_file import load_report


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    x = data(4, 8)
    passes = ["mask-weights{sparsity=0.5}", "apply-masks", *pipelines.int8_static()]
    made = sqcompile.compile(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), passes, (x,), [x],
        backend="reference",
    )  # fmt: skip
    assert isinstance(made, Compiled)
    made.report.add_quality("accuracy", 0.98, 0.97)
    return made.report


def test_what_was_written_is_read_back(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "report.json")
    for place in (tmp_path, tmp_path / "report.json"):
        read = load_report(place)
        assert json.loads(read.to_json()) == json.loads(report.to_json())
        assert str(read) == str(report)
    assert read.quality == {"accuracy": (0.98, 0.97)} and "0.98 → 0.97" in str(read)
    assert read.passes[0].distance == report.passes[0].distance


def test_an_answer_of_compile_is_read(report: Report, tmp_path: Path) -> None:
    answer = {"report": {**json.loads(report.to_json()), "of a later version": 1}, "files": []}
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    assert load_report(tmp_path / "answer.json").to_json() == report.to_json()


def test_other_files_are_refused(report: Report, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="holds no report"):
        load_report(tmp_path / "model.sqm")
    with pytest.raises(FileError, match="cannot be read"):
        load_report(tmp_path)
    for text in ("", "[]", "{}", '{"passes": 3}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(FileError, match="is no report"):
            load_report(tmp_path)
    with pytest.raises(FileError, match=r"no '\.txt' file") as caught:
        report.save(tmp_path / "report.txt")
    assert caught.value.next_step == "save it as report.html"
