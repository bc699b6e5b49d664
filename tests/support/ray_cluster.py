"""Work on a real cluster of Ray, with two CPUs on this machine; prints a word for each thing that held."""

from __future__ import annotations

import os

import ray
import torch
from torch import nn

import sqcompile
from sqcompile.errors import FormatError
from sqcompile.mixed_precision import Candidate
from sqcompile.passes import GPTQ, MixedPrecision
from sqcompile.quantization.format import Format
from sqcompile.ray_executor import open_cluster

FORMAT = Format.parse("uint4:group=8:affine")
PASS = MixedPrecision(
    quantize=GPTQ(weight=FORMAT),
    bits=10.0,
    candidates=tuple(map(Candidate.parse, ("uint2:group=8:affine", "uint4:group=8:affine"))),
    measure="divergence",
)


def compiled(address: str | None) -> sqcompile.Compiled:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).eval()
    data = [torch.randn(64, 16) for _ in range(3)]
    result = sqcompile.compile(model, [PASS], calibration=data, backend="reference", address=address)
    assert isinstance(result, sqcompile.Compiled)
    return result


def main() -> None:
    torch.set_num_threads(1)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=2**28, log_to_driver=False
    )
    print("STARTED", flush=True)

    here, there = compiled(None), compiled("local")
    wanted, found = dict(here.program.tensors()), dict(there.program.tensors())
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert here.report.passes[0].facts == there.report.passes[0].facts
    print("same")

    with open_cluster("local") as executor:
        assert executor.slots == 2
        assert os.getpid() not in {executor.submit(os.getpid).result() for _ in range(2)}
        print("elsewhere")
        shared = executor.share(torch.arange(5))
        pending = [executor.submit(torch.add, shared, index) for index in range(7)]  # more than run at a time
        assert [item.result()[0].item() for item in pending] == list(range(7))
        print("in-order")
        failing = executor.submit(Format.parse, "int4:grouped=32")
        errors = []
        for attempt in (lambda: Format.parse("int4:grouped=32"), failing.result):
            try:
                attempt()
            except FormatError as error:
                errors.append((type(error), vars(error)))
        assert len(errors) == 2 and errors[0] == errors[1]
        try:
            executor.submit(divmod, 1, 0).result()
        except ZeroDivisionError:
            print("errors")
    assert ray.is_initialized()  # it was there before, and stays
    print("kept")


if __name__ == "__main__":
    main()
