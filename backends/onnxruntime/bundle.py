"""A bundle's part for ONNX Runtime: the model, session options, and examples in Python and C++."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from sqcompile.bundle import BundleJob, BundlePart, write_arrays
from sqcompile.errors import FileError

EXAMPLE = Path(__file__).parent / "example"

_USAGE = """
## Run it

    pip install -r requirements.txt
    python example.py

`example.py` opens the model with the options of `session_options.json`, runs it on `inputs`, and compares with
`expected`. It needs ONNX Runtime and NumPy alone, and shows all that a program of your own has to do.

## From C++

Take ONNX Runtime's archive for {target} from its releases; with `ORT` naming the folder it unpacks to:

    c++ -std=c++17 -O2 example.cc -o example -I "$ORT/include" -L "$ORT/lib" -lonnxruntime -Wl,-rpath,"$ORT/lib"
    ./example

## Session options

`session_options.json` holds numbers as ONNX Runtime's C interface takes them: {threads} threads within an operator
and one operator after the other; every optimization of the graph (99), which quantized models need to be fast; errors
only.
"""


def write_onnx_bundle(job: BundleJob, folder: Path) -> BundlePart:
    """Write ONNX Runtime's part of a bundle.

    Args:
        job: What it is made from.
        folder: Where it goes.

    Raises:
        FileError: If the model cannot be read.
    """
    try:
        model = onnx.load(str(job.source), load_external_data=False)
    except Exception as error:  # protobuf's own errors are not documented
        raise FileError(
            f"'{job.source}' is no ONNX model.",
            where=str(job.source),
            seen=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            expected="a file that compiled.save or another tool's exporter wrote",
            next_step="save the model again",
        ) from error
    shutil.copyfile(job.source, folder / "model.onnx")
    beside = sorted(
        {ExternalDataInfo(item).location for item in model.graph.initializer if uses_external_data(item)}
    )
    for name in beside:
        shutil.copyfile(job.source.parent / name, folder / name)
    for name in ("example.py", "example.cc"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    options = {
        "intra_op_num_threads": job.threads,
        "inter_op_num_threads": 1,
        "execution_mode": 0,
        "graph_optimization_level": 99,
        "log_severity_level": 3,
    }
    (folder / "session_options.json").write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    needed = f"numpy\nonnxruntime>={version('onnxruntime')}\n"
    (folder / "requirements.txt").write_text(needed, encoding="utf-8")
    # The model's own names, which an exporter may have had to change.
    inputs = zip(model.graph.input, job.inputs.values(), strict=True)
    outputs = zip(model.graph.output, job.outputs.values(), strict=True)
    write_arrays(folder / "inputs", {item.name: array for item, array in inputs})
    write_arrays(folder / "expected", {item.name: array for item, array in outputs})
    files = {
        "model.onnx": "the model" + "".join(f", with its data in {name}" for name in beside),
        "session_options.json": "how to open it",
        "example.py, requirements.txt": "runs it in Python",
        "example.cc": "runs it in C++",
        "inputs, expected": "example inputs, and the outputs that they gave where this was made",
    }
    return BundlePart("model.onnx", files, _USAGE.format(target=job.target, threads=job.threads))
