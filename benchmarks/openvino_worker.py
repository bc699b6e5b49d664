"""Runs an ONNX model in OpenVINO, in an environment of its own, when it is told to: one line in, one run, its ns out.

python openvino_worker.py MODEL THREADS
"""

import sys
import time

import numpy as np
import openvino


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    model = openvino.Core().compile_model(path, "CPU", settings)
    request = model.create_infer_request()
    shape = [int(size) for size in model.input(0).shape]
    feed = {0: np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
    print(openvino.__version__, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter_ns()
        request.infer(feed)
        print(time.perf_counter_ns() - started, flush=True)


if __name__ == "__main__":
    main()
