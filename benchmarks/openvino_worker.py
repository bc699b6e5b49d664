"""Runs an ONNX model or one of OpenVINO's own, in an environment of its own, when it is told to.

python openvino_worker.py MODEL THREADS             one line in, one run, its ns out
python openvino_worker.py --quantize ONNX XML       quantizes a model in floats by NNCF, on random images
"""

import sys
import time

import numpy as np
import openvino


def main() -> None:
    if sys.argv[1] == "--quantize":
        quantize(*sys.argv[2:])
        return
    path, threads = sys.argv[1], int(sys.argv[2])
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    model = openvino.Core().compile_model(path, "CPU", settings)
    request = model.create_infer_request()
    feed = {0: images(model)}
    print("ready", openvino.__version__, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter_ns()
        request.infer(feed)
        print(time.perf_counter_ns() - started, flush=True)


def quantize(path: str, to: str) -> None:
    import nncf

    model = openvino.Core().read_model(path)
    data = nncf.Dataset([images(model)])
    quantized = nncf.quantize(model, data, preset=nncf.QuantizationPreset.MIXED, subset_size=1)
    openvino.save_model(quantized, to, compress_to_fp16=False)


def images(model: "openvino.Model") -> np.ndarray:
    shape = [int(size) for size in model.input(0).shape]
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


if __name__ == "__main__":
    main()
