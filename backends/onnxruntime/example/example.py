"""Runs the model of this folder in ONNX Runtime on the arrays of `inputs`, and compares with `expected`.

pip install -r requirements.txt
python example.py

It ends with 1 if an output of floating point is more than a hundredth of its greatest value away.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
TOLERANCE = 0.01


def open_session() -> onnxruntime.InferenceSession:
    """Open the model with the options of `session_options.json`."""
    given = json.loads((HERE / "session_options.json").read_text(encoding="utf-8"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given["intra_op_num_threads"]
    options.inter_op_num_threads = given["inter_op_num_threads"]
    options.execution_mode = onnxruntime.ExecutionMode(given["execution_mode"])
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel(given["graph_optimization_level"])
    options.log_severity_level = given["log_severity_level"]
    return onnxruntime.InferenceSession(str(HERE / "model.onnx"), options, providers=["CPUExecutionProvider"])


def main() -> int:
    """Run the model once; 0 if the outputs are the expected ones."""
    session = open_session()
    names = [output.name for output in session.get_outputs()]
    feeds = {item.name: np.load(HERE / "inputs" / f"{item.name}.npy") for item in session.get_inputs()}
    wrong = False
    for name, seen in zip(names, session.run(names, feeds), strict=True):
        expected = np.load(HERE / "expected" / f"{name}.npy")
        if seen.shape != expected.shape or not seen.size:
            print(f"{name}: {list(seen.shape)}, where {list(expected.shape)} was expected")
            wrong |= seen.shape != expected.shape
            continue
        if not np.issubdtype(seen.dtype, np.floating):
            print(f"{name}: {list(seen.shape)}, {int((seen != expected).sum())} other than expected")
            continue
        regular = np.isfinite(expected)
        apart = float(np.abs(seen - expected)[regular].max(initial=0.0))
        greatest = float(np.abs(expected)[regular].max(initial=0.0))
        print(
            f"{name}: {list(seen.shape)}, at most {apart:.3g} from what was expected, whose greatest is {greatest:.3g}"
        )
        wrong |= not apart <= TOLERANCE * greatest
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
