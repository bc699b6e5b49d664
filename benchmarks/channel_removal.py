"""Structured removal side by side with Torch-Pruning: what each can shrink, and whether it is exact.

    python benchmarks/channel_removal.py [--models resnext,llama] [--json out.json]

Half of the channels, heads and neurons of every architecture of the tests go, in both tools by L2 norm in
each layer. *Runs* means that the smaller model computes outputs of the old shapes with fewer
multiply-accumulates. *Exact* means that they equal, to 2e-5 of the greatest value, those of the original
model with the removed parts of its parameters set to zero; what is removed from under a layer norm changes the
statistics of the rest, and is not exact. Torch-Pruning (`pip install torch-pruning`) is told which layers make
the outputs, and how many heads each layer has; the counts that modules keep as attributes are corrected after it.
It has two attempts, of which the better counts: one with all that it takes, widths of residual streams among it,
and one told to leave all layers alone but those which ours shrinks. Each may take 30 seconds of CPU time.

Then the time of finding groups and of removal as a whole, beyond tracing, for ResNet-50 and a 12-layer BERT with
random weights: CPU time of one thread (which neighbours do not change).
"""

from __future__ import annotations

import argparse
import copy
import logging
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import write_json
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils import _pytree as pytree

from sqcompile import Program
from sqcompile.channels import count_macs, find_groups
from sqcompile.channels.flow import flow_of
from sqcompile.passes import RemoveChannels
from sqcompile.pipeline import PassContext
from sqcompile.tracing import trace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.removal import TOLERANCE, distance, outputs, remove, zero_removed
from support.removal_models import REMOVAL_MODELS
from support.zoo import ZOO

Make = Callable[[], nn.Module]
KINDS = ("channels", "neurons", "heads")
_PATIENCE_S = 30
_QUERIES = re.compile(r"(^|\.)(q_proj|q_lin|query|q|k_proj|k_lin|key|k|v_proj|v_lin|value|v|qkv)$")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="all", help="names of the tests' architectures, or 'all'")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    names = [*ZOO, *REMOVAL_MODELS] if options.models == "all" else options.models.split(",")
    rows = []
    for name in names:
        rows.append(compare(name))
        print(name, *(cells(rows[-1][tool]) for tool in ("ours", "peer")), flush=True)
    peer = f"Torch-Pruning {version('torch-pruning')}"
    table = Table("model", "ours", "MACs left", "error", peer, "MACs left", "error", title="Half removed")
    for row in rows:
        table.add_row(row["model"], *cells(row["ours"]), *cells(row["peer"]))
    console = Console(width=150)
    console.print(table)
    for tool in ("ours", "peer"):
        runs = [row for row in rows if row[tool]["verdict"] == "runs"]
        exact = [row for row in runs if is_exact(row[tool])]
        console.print(f"{tool}: {len(runs)} of {len(rows)} run, {len(exact)} of them exactly")
    times = [timed(name, *case) for name, case in large_models().items()] if options.models == "all" else []
    for row in times:
        console.print(
            f"{row['model']}: groups {row['groups_s']:.2f} s, groups and removal {row['removal_s']:.2f} s, "
            f"{peer} {row['peer_s']:.2f} s, tracing {row['trace_s']:.2f} s"
        )
    write_json(options.json, "channel_removal", [*rows, *times], peer=peer)


def _give_up(number: int, frame: Any) -> None:
    raise TimeoutError(f"not done after {_PATIENCE_S} s of CPU time")


def cells(result: dict[str, Any]) -> list[str]:
    if result["verdict"] != "runs":
        return [result["verdict"][:60], "", ""]
    error = result["error"]
    return ["runs", f"{result['macs_left']:.2f}", "not measured" if error is None else f"{error:.0e}"]


def is_exact(result: dict[str, Any]) -> bool:
    return result.get("error") is not None and bool(result["error"] < TOLERANCE)


def case_of(name: str) -> tuple[Make, Any]:
    if name in ZOO:
        return ZOO[name].make, ZOO[name].inputs()
    return REMOVAL_MODELS[name].make, REMOVAL_MODELS[name].inputs(0)


def compare(name: str) -> dict[str, Any]:
    make, inputs = case_of(name)
    program = trace(make(), inputs)
    return {"model": name, "ours": ours(make, inputs, program), "peer": torch_pruning(make, inputs, program)}


def ours(make: Make, inputs: Any, program: Program) -> dict[str, Any]:
    shrunk, result = remove(RemoveChannels(ratio=0.5, kinds=KINDS), program)
    if not result.changes:
        return {"verdict": "removes nothing"}
    masked = zero_removed(make(), find_groups(program), result.facts["kept"])
    error = distance(outputs(masked, inputs), outputs(shrunk, inputs))
    macs = result.facts["macs"]
    return {"verdict": "runs", "macs_left": macs["after"] / macs["before"], "error": error}


def torch_pruning(make: Make, inputs: Any, program: Program) -> dict[str, Any]:
    """Return the better of both attempts; of two that fail the first."""
    attempts = [attempt(make, inputs, program, only_ours) for only_ours in (False, True)]
    return max(attempts, key=lambda result: (result["verdict"] == "runs") + is_exact(result))


def attempt(make: Make, inputs: Any, program: Program, only_ours: bool) -> dict[str, Any]:
    model = make()
    original = copy.deepcopy(model)
    dense = outputs(model, inputs)
    macs = count_macs(flow_of(program))
    signal.signal(signal.SIGPROF, _give_up)
    signal.setitimer(signal.ITIMER_PROF, _PATIENCE_S)
    try:
        removed = Removed(model)
        for group in pruner_of(model, inputs, program, only_ours).step(interactive=True):
            removed.add(group)
            group.prune()
        seen = outputs(model, inputs)
        if [value.shape for value in seen] != [value.shape for value in dense]:
            return {"verdict": "outputs of other shapes"}
        left = count_macs(flow_of(trace(model, inputs)))
    except Exception as error:
        return {"verdict": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if left >= macs:
        return {"verdict": "removes nothing"}
    masked = removed.zero(original)
    error_of = None if masked is None else distance(outputs(masked, inputs), seen)
    return {"verdict": "runs", "macs_left": left / macs, "error": error_of}


def pruner_of(model: nn.Module, inputs: Any, program: Program, only_ours: bool = False) -> Any:
    """Return Torch-Pruning's pruner with what it has to be told, and module attributes kept in step."""
    import torch_pruning as tp

    groups = find_groups(program)
    last = {
        name
        for group in groups.blocked
        if only_ours or "output of the model" in str(group.blocked)
        for name in group.layers
    }
    if only_ours:
        last |= {name for group in groups if group.kind not in KINDS for name in group.layers}
        last -= {name for group in groups if group.kind in KINDS for name in group.layers}
    modules = dict(model.named_modules())
    heads = {modules[name]: count for name, count in heads_of(model).items()}
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[modules[name] for name in last if name in modules],
        num_heads=heads,
        prune_num_heads=bool(heads),
        prune_head_dims=not heads,
        head_pruning_ratio=0.5,
        forward_fn=lambda called, given: called(*given[0], **given[1]),
        output_transform=lambda value: [
            leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)
        ],
    )
    step = pruner.step

    def stepping(interactive: bool) -> Any:
        yield from step(interactive=interactive)
        correct_attributes(model, pruner)

    pruner.step = stepping
    return pruner


def heads_of(model: nn.Module) -> dict[str, int]:
    """Return the heads of every layer that makes queries, keys or values, by the configuration."""
    config = getattr(model, "config", None)
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not _QUERIES.search(name):
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        names = ("num_heads", "n_heads", "num_attention_heads", "heads")
        count = next(
            (getattr(owner, key) for key in names if isinstance(getattr(owner, key, None), int)), None
        )
        count = count or getattr(config, "num_attention_heads", None)
        if isinstance(count, int):
            width = getattr(owner, "head_dim", None) or getattr(owner, "attention_head_size", None)
            found[name] = module.out_features // width if isinstance(width, int) else count
    return found


def correct_attributes(model: nn.Module, pruner: Any) -> None:
    """Bring the counts that attention modules keep in line with their layers."""
    for name, module in model.named_modules():
        if module not in pruner.num_heads or not re.search(r"(^|\.)(q|query|q_proj|q_lin|qkv)$", name):
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        heads = pruner.num_heads[module]
        for key in ("num_heads", "n_heads", "num_attention_heads", "heads"):
            if isinstance(getattr(owner, key, None), int):
                setattr(owner, key, heads)
        for key in ("all_head_size", "inner_dim", "embed_dim", "dim"):
            if isinstance(getattr(owner, key, None), int):
                setattr(owner, key, module.out_features)


class Removed:
    """What Torch-Pruning takes from each parameter, in the indices of the original model."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._left: dict[tuple[str, int], list[int]] = {}
        self._gone: dict[tuple[str, int], list[int]] = {}
        self._known = True

    def add(self, group: Any) -> None:
        for dependency, indices in group:
            module, way = dependency.target.module, dependency.handler.__name__
            if type(module).__name__.startswith("_") and not list(module.parameters()):
                continue  # a view or a sum, which has nothing of its own
            name = self._names.get(module)
            axes = None if name is None else self._axes(module, "out" in way)
            if axes is None:
                self._known = False
                continue
            for leaf, axis in axes:
                tensor = getattr(module, leaf, None)
                if isinstance(tensor, nn.Parameter):
                    self._take(f"{name}.{leaf}".lstrip("."), axis, tensor.shape[axis], indices)

    def zero(self, model: nn.Module) -> nn.Module | None:
        """Return the model with all that zeroed, or None if something of another kind was removed."""
        if not self._known:
            return None
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for (name, axis), indices in self._gone.items():
            parameters[name].data.index_fill_(axis, torch.tensor(indices), 0)
        return model

    def _take(self, name: str, axis: int, size: int, indices: list[int]) -> None:
        left = self._left.setdefault((name, axis), list(range(size)))
        positions = set(indices)
        if max(positions, default=0) >= len(left):  # indices of all groups, where the weight has those of one
            self._known = False
            return
        self._gone.setdefault((name, axis), []).extend(left[index] for index in positions)
        self._left[name, axis] = [item for index, item in enumerate(left) if index not in positions]

    def _axes(self, module: nn.Module, is_output: bool) -> list[tuple[str, int]] | None:
        if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
            return [("weight", 1), ("bias", 0)] if is_output else [("weight", 0)]
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            return [("weight", 0), ("bias", 0)] if is_output else [("weight", 1)]
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            return [("weight", 0), ("bias", 0)]
        return [("weight", 1)] if isinstance(module, nn.Embedding) else None


def large_models() -> dict[str, tuple[nn.Module, Any]]:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        ResNetConfig,
        ResNetForImageClassification,
    )

    image = {"pixel_values": torch.randn(1, 3, 224, 224)}
    tokens = {"input_ids": torch.randint(0, 1000, (1, 64))}
    return {
        "ResNet-50": (ResNetForImageClassification(ResNetConfig()).eval(), ((), image)),
        "BERT, 12 layers": (BertForSequenceClassification(BertConfig()).eval(), ((), tokens)),
    }


def timed(name: str, model: nn.Module, inputs: Any) -> dict[str, Any]:
    program, trace_s = clocked(lambda: trace(model, inputs))
    item = RemoveChannels(ratio=0.5, kinds=KINDS)
    item.run(program.snapshot(), PassContext())  # the first run imports and registers
    _, groups_s = clocked(lambda: find_groups(program))
    _, removal_s = clocked(lambda: item.run(program.snapshot(), PassContext()))

    def peer() -> None:
        for group in pruner_of(model, inputs, program).step(interactive=True):
            group.prune()

    _, peer_s = clocked(peer)
    return {"model": name, "trace_s": trace_s, "groups_s": groups_s, "removal_s": removal_s, "peer_s": peer_s}


def clocked(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    result = call()
    return result, time.process_time() - started


if __name__ == "__main__":
    main()
