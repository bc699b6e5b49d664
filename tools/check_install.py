"""Prove that an installed sqcompile is whole: run by `make wheel-check`, outside the repository."""

import importlib
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("sqcompile", "sqcompile.passes", "sqcompile.backends", "sqcompile.backends.native")


def main() -> None:
    for name in PACKAGES:
        module = importlib.import_module(name)
        path = Path(module.__file__ or "")
        print(f"{name}: {path}")
        assert Path(sys.prefix) in path.parents, f"{name} is not the installed copy"

    native = Path(importlib.import_module("sqcompile.backends.native").__file__ or "").parent
    sources = {str(path.relative_to(native / "cpp").parts[0]) for path in (native / "cpp").rglob("*.cc")}
    assert sources == {"base", "capi", "engine", "kernels", "tools"}, f"C++ sources in the wheel: {sources}"

    from sqcompile.backends.native import cpu_features

    print(f"sqcompile {version('sqcompile')} on {cpu_features()}")

    command = Path(sys.executable).with_name("sqcompile")
    subprocess.run([command, "--help"], check=True, stdout=subprocess.DEVNULL)
    check_bundle()


def check_bundle() -> None:
    """Bundle a model with the runtime that was installed, and run it."""
    import torch

    import sqcompile
    from sqcompile.bundle import write_bundle

    with tempfile.TemporaryDirectory() as folder:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval()
        compiled = sqcompile.compile(model, ["quantize-weights"], (torch.ones(2, 8),), backend="native")
        compiled.save(Path(folder) / "model.sqm")
        # Empty, so that nothing could have been built.
        os.environ["SQCOMPILE_CACHE"] = str(Path(folder) / "cache")
        bundle = Path(folder) / "bundle"
        write_bundle(Path(folder) / "model.sqm", bundle, runs=1)
        assert not (Path(folder) / "cache" / "runtimes").exists(), "the wheel has no runtime"
        inputs = [f"{path.stem}={path}" for path in (bundle / "inputs").glob("*.npy")]
        subprocess.run([bundle / "sqrun", bundle / "model.sqm", "--out", folder, *inputs], check=True)


if __name__ == "__main__":
    main()
