"""Reports in files: read back what `Report.to_json` wrote, from a folder, from a report, or from an answer in JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sqcompile.errors import FileError
from sqcompile.files import require_file
from sqcompile.metrics import Distance
from sqcompile.pipeline.manager import PassRecord
from sqcompile.remarks import Remark
from sqcompile.report import Latency, LayerRow, Report
from sqcompile.report_pictures import ActivationRange, GraphTexts, Stage
from sqcompile.statistics import Size


def load_report(path: str | Path) -> Report:
    """Read a report.

    Args:
        path: A `.json` file that `Report.save` or `sqcompile compile --json` wrote, or the folder of a saved model.

    Raises:
        FileError: If there is none, or it cannot be read.
    """
    path = Path(path)
    file = path / "report.json" if path.is_dir() else path
    if file.suffix in (".onnx", ".sqm", ".pt2", ".gguf"):
        raise FileError(
            f"'{file}' holds no report.",
            where=str(file),
            seen="a compiled model alone",
            expected="a folder that holds report.json too, or a report as JSON",
            next_step="compile to a folder, or with --html report.html; how this file was made says: "
            f"sqcompile recipe print {file}",
        )
    require_file(file, "report")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return _report(data.get("report", data))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise FileError(
            f"'{file}' is no report.",
            where=str(file),
            seen=f"{type(error).__name__}: {error}",
            expected="the JSON that sqcompile writes as report.json",
            next_step="compile the model again",
        ) from error


def _report(data: Mapping[str, Any]) -> Report:
    given = _known(Report, data)
    given["original"], given["size"] = Size(**data["original"]), Size(**data["size"])
    given["passes"] = [_record(item) for item in data["passes"]]
    given["layers"] = [_row(item) for item in data["layers"]]
    for name in ("output_distance", "backend_distance"):
        given[name] = _distance(data.get(name))
    given["latency"] = Latency(**data["latency"]) if data.get("latency") else None
    given["quality"] = {name: (dense, made) for name, (dense, made) in data.get("quality", {}).items()}
    given["weight_maps"] = {name: tuple(lines) for name, lines in data.get("weight_maps", {}).items()}
    given["activations"] = [
        ActivationRange(**{**item, "counts": tuple(item["counts"])}) for item in data.get("activations", [])
    ]
    graphs = data.get("graphs")
    given["graphs"] = graphs and GraphTexts(
        list(graphs["lines"]),
        [Stage(item["title"], tuple(item["lines"])) for item in graphs["stages"]],
        graphs["full"],
    )
    return Report(**given)


def _record(data: Mapping[str, Any]) -> PassRecord:
    return PassRecord(
        **{
            **_known(PassRecord, data),
            "size": Size(**data["size"]),
            "distance": _distance(data["distance"]),
            "remarks": tuple(Remark(**item) for item in data["remarks"]),
        }
    )


def _row(data: Mapping[str, Any]) -> LayerRow:
    given = {**_known(LayerRow, data), "shape": tuple(data["shape"]), "distance": _distance(data["distance"])}
    if given["distance"] is not None and not given["distance"].finite and given["loss"] is None:
        given["loss"] = math.inf
    return LayerRow(**given)


def _distance(data: Mapping[str, Any] | None) -> Distance | None:
    """Return a distance; JSON has no infinity, which equal values and those that are not finite have."""
    if data is None:
        return None
    level, error = data["sqnr_db"], data["max_error"]
    if level is None:
        level = math.inf if data["finite"] and error == 0 else -math.inf
    cosine = data["cosine"]
    return Distance(
        level, math.nan if cosine is None else cosine, math.inf if error is None else error, data["finite"]
    )


def _known(kind: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a class has fields for; a later version's report may hold more."""
    names = {item.name for item in fields(kind)}
    return {name: value for name, value in data.items() if name in names}
