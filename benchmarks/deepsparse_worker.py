"""Runs an ONNX model in DeepSparse, in an environment of its own, when it is told to: one line in, one run, its ns out.

python deepsparse_worker.py MODEL THREADS
"""

import sys
import time

import deepsparse
import numpy as np
import onnx


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    size = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    shape = [part.dim_value for part in size]
    engine = deepsparse.compile_model(path, batch_size=shape[0], num_cores=threads)
    feed = [np.random.default_rng(0).standard_normal(shape, dtype=np.float32)]
    engine.run(feed)
    print("ready", deepsparse.__version__, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter_ns()
        engine.run(feed)
        print(time.perf_counter_ns() - started, flush=True)


if __name__ == "__main__":
    main()
