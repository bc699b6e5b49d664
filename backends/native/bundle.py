"""A bundle's native part: the model, `sqrun`, the library with its header, and an example in C."""

from __future__ import annotations

import shutil
from pathlib import Path

from sqcompile.backends.native.runtime import find_runtime
from sqcompile.bundle import BundleJob, BundlePart, write_arrays

EXAMPLE = Path(__file__).parent / "cpp" / "example"

_USAGE = """
## Run it

On the device, in this folder:

    ./sqrun model.sqm --info
    mkdir -p results
    ./sqrun model.sqm --threads {threads} --out results {inputs}

Each output is written into `results` as a `.npy` file. `--repeat 50` prints the median time of a call.
{generating}
## From C

    make && ./example

builds `example.c` with the compiler of the device, which needs nothing else, and runs it: it opens the model, runs
it on `inputs`, and compares with `expected`. A cross compiler does it elsewhere:
`make CC={machine}-linux-gnu-gcc`. Without make:

    cc -std=c99 -O2 example.c -o example -L. -lsqcompile -Wl,-rpath,'$ORIGIN' -lm

`sqcompile.h` documents the whole interface. Give `libsqcompile.so` to the linker, and ship it beside your program.
"""

_GENERATING = """
The model continues texts, which are given and printed as token ids:

    ./sqrun model.sqm --generate 64 --threads {threads} 1,2,3
"""


def write_native_bundle(job: BundleJob, folder: Path) -> BundlePart:
    """Write the native part of a bundle.

    Args:
        job: What it is made from.
        folder: Where it goes.

    Raises:
        BackendError: If there is no runtime for the target, and none can be built here.
    """
    from sqcompile.backends.native import _native

    runtime = find_runtime(job.target, job.runtime, job.progress)
    shutil.copyfile(job.source, folder / "model.sqm")
    for name in ("sqrun", "libsqcompile.so", "sqcompile.h"):
        shutil.copyfile(runtime / name, folder / name)
    (folder / "sqrun").chmod(0o755)
    for name in ("example.c", "Makefile"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    write_arrays(folder / "inputs", job.inputs)
    write_arrays(folder / "expected", job.outputs)
    arguments = " ".join(f"{name}=inputs/{name}.npy" for name in job.inputs)
    generates = _native.Model.open(str(job.source)).generates
    usage = _USAGE.format(
        threads=job.threads,
        inputs=arguments,
        generating=_GENERATING.format(threads=job.threads) if generates else "",
        machine=job.target.partition("-")[0],
    )
    files = {
        "model.sqm": "the model",
        "sqrun": "runs it on `.npy` files: one program, without Python",
        "libsqcompile.so, sqcompile.h": "the same for your own programs, in C or what calls C",
        "example.c, Makefile": "an example of that",
        "inputs, expected": "example inputs, and the outputs that they gave where this was made",
    }
    return BundlePart("model.sqm", files, usage)
