"""Saving a program as a folder of Hugging Face that `from_pretrained` reads: for models that lost parts alike.

A class of transformers makes its layers from a few numbers in its configuration. Where every layer has lost
alike, other numbers make the smaller model; which ones is tried, and believed only if the class then wants exactly
the program's shapes, and what is read back from the folder computes the program's outputs.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sqcompile.channels import find_groups
from sqcompile.channels.groups import Group
from sqcompile.errors import Error, PretrainedError
from sqcompile.files import atomic_folder
from sqcompile.levels import Level
from sqcompile.matching import is_mask
from sqcompile.models import without_progress_bars
from sqcompile.packed_weights import PackedWeight, quantization_config, readable, unpacked
from sqcompile.program import Program
from sqcompile.saving import copy_companions

# Names that configurations have for one and the same thing.
_LAYERS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
_NEURONS = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "d_ff",
    "hidden_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
)
_HEADS = (
    "num_attention_heads",
    "num_heads",
    "n_head",
    "n_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
_KEY_HEADS = ("num_key_value_heads",)
_HEAD_WIDTHS = ("head_dim", "d_kv")
_EMBEDDINGS = ("hidden_size", "d_model", "n_embd", "dim")

# Of the greatest output: the same sums in PyTorch, some of them by other kernels.
_TOLERANCE = 1e-4

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pretrained:
    """What a program was before it was traced: a model of transformers.

    Attributes:
        kind: Its class.
        config: A copy of its configuration.
        state: Its tensors, by name; also those that the traced call did not need.
        folder: Where it was read from, or None.
    """

    kind: type[nn.Module]
    config: Any
    state: Mapping[str, Tensor]
    folder: Path | None

    @classmethod
    def of(cls, model: object, source: object = None) -> Pretrained | None:
        """Return this for a model of transformers, None for any other."""
        kinds = [base.__module__.partition(".")[0] for base in type(model).__mro__]
        if not isinstance(model, nn.Module) or "transformers" not in kinds or not hasattr(model, "config"):
            return None
        folder = Path(source) if isinstance(source, (str, Path)) and Path(source).is_dir() else None
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        config: Any = copy.deepcopy(model.config)
        if folder is not None and hasattr(config, "use_cache"):  # which loading for tracing has switched off
            config.use_cache = type(config).from_pretrained(folder).use_cache
        return cls(type(model), config, state, folder)


def save_pretrained(
    program: Program, original: Program, pretrained: Pretrained, path: Path, batch: Sequence[Any]
) -> list[Path]:
    """Write a program as a folder of Hugging Face: weights, configuration, and what else the source folder has.

    Args:
        program: The program, without masks; float, or with quantized weights, which are then written in the
            convention of compressed-tensors.
        original: The same as it was traced.
        pretrained: What it was traced from.
        path: The folder.
        batch: Flat inputs, on which what was written is compared with the program.

    Returns:
        The files that were written.

    Raises:
        PretrainedError: If the class cannot hold the program; the text names the layer.
        FileError: If the folder cannot be written.
    """
    require_applied(program)
    plain, packed = program, list[PackedWeight]()
    if program.level is not Level.ATEN:
        plain, packed = unpacked(program, pretrained.state)
        _require_reader()
    before, after = _shapes(original, pretrained), _shapes(plain, pretrained)
    # A weight that was tied may have a tensor of its own now.
    before |= {name: tuple(pretrained.state[name].shape) for name in after if name not in before}
    blocks = _Blocks(before, after)
    _require_one_width(before, blocks)
    wanted = {blocks.names.get(name, name): shape for name, shape in blocks.after.items()}
    config = _fitting_config(pretrained, original, before, blocks, wanted)
    model: Any = _filled(pretrained, config, plain, blocks)
    # Tied tensors stay as they are: the class would tie codes of one to floats of the other.
    alone = {
        name for name, count in Counter(map(_identity, model.state_dict().values())).items() if count == 1
    }
    state, kept = dict(model.state_dict()), list[PackedWeight]()
    for weight in readable(packed):
        weight = replace(weight, name=blocks.names.get(weight.name, weight.name))
        if _identity(state[weight.name]) in alone:
            del state[weight.name]
            state |= weight.tensors()
            kept.append(weight)
    with atomic_folder(path) as folder, without_progress_bars():
        if kept:
            layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            model.config.quantization_config = quantization_config(kept, layers)
        model.save_pretrained(folder, state_dict=state)
        if pretrained.folder is not None:
            copy_companions(pretrained.folder, folder, leave=("config.json",))
        _require_equal(pretrained, folder, program, batch)
        names = sorted(item.relative_to(folder) for item in folder.rglob("*") if item.is_file())
    return [path / name for name in names]


def refuse_others(model: str, target: str) -> PretrainedError:
    """Return the error for a model that is not of transformers, and what it was to become."""
    return PretrainedError(
        f"Only models of transformers can be saved as {target}.",
        where="save",
        seen=model,
        expected="a model whose class is one of transformers, or the folder of one",
        next_step="save a .pt2 file, which holds any program",
    )


# --- what has changed ----------------------------------------------------------------------------------


def require_applied(program: Program) -> None:
    """Check that no weight is masked.

    Raises:
        PretrainedError: If one is.
    """
    masks = [node for node in program.compute_nodes() if is_mask(node)]
    if masks:
        raise PretrainedError(
            "The files of other tools hold weights without masks.",
            where=f"node %{masks[0].name}",
            seen=f"{len(masks)} masks",
            expected="a program whose masks are applied",
            next_step="run apply-masks before",
        )


def _require_reader() -> None:
    """Check that what is written can be read back."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise PretrainedError(
            "Quantized weights are read back by the compressed-tensors package, and it is not installed.",
            where="save_pretrained",
            seen="a program with quantized weights",
            next_step="pip install compressed-tensors",
        )


def _shapes(program: Program, pretrained: Pretrained) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's tensors that a program uses."""
    return {name: tuple(tensor.shape) for name, tensor in program.tensors() if name in pretrained.state}


class _Blocks:
    """Numbered modules of which some are gone, and the names that the others get.

    Attributes:
        after: Shapes of the program's tensors, under the names that they have there.
        names: New names of those that move up.
        kept: Numbers of the modules that are left, and how many there were, by stack (`model.layers`), where some went.
    """

    def __init__(self, before: Shapes, after: Shapes) -> None:
        self.after = after
        self.kept: dict[str, tuple[list[int], int]] = {}
        old, new = _stacks(before), _stacks(after)
        for stack, modules in old.items():
            left = new.get(stack, {})
            for number, names in left.items():
                if names != modules[number]:
                    raise _torn(f"{stack}.{number}", modules[number] - names, names)
            if len(left) < len(modules):
                self.kept[stack] = sorted(left), len(modules)
        self.names: dict[str, str] = {}
        for name in after:
            stack, place, rest = _numbered(name)
            if stack in self.kept and place is not None:
                self.names[name] = f"{stack}.{self.kept[stack][0].index(place)}.{rest}"


def _stacks(names: Shapes) -> dict[str, dict[int, set[str]]]:
    """Return the tensors of numbered modules, by stack and number."""
    stacks: dict[str, dict[int, set[str]]] = {}
    for name in names:
        stack, number, _ = _numbered(name)
        if number is not None:
            stacks.setdefault(stack, {}).setdefault(number, set()).add(name)
    return stacks


def _torn(block: str, gone: set[str], left: set[str]) -> PretrainedError:
    return PretrainedError(
        f"Only a part of '{block}' is gone, and its class makes it whole.",
        where=f"tensor @{min(left)}",
        seen=f"{len(left)} tensors are left, {len(gone)} are gone, as @{min(gone)}",
        expected="all of its tensors, or none",
        next_step="remove other blocks (a norm behind a sum stays, and so does a bias that others share); or save "
        "a .pt2 file",
    )


def _numbered(name: str) -> tuple[str, int | None, str]:
    """Return `model.layers`, 3, `mlp.up_proj.weight` of such a name."""
    found = re.match(r"(.*?)\.(\d+)\.(.*)", name)
    return (found[1], int(found[2]), found[3]) if found else (name, None, "")


def _require_one_width(before: Shapes, blocks: _Blocks) -> None:
    """Check that tensors which differ in a number only have lost alike."""
    sizes: dict[tuple[str, int, int], dict[int, list[str]]] = {}
    for name, shape in blocks.after.items():
        for axis, size in enumerate(shape):
            key = re.sub(r"\d+", "*", name), axis, before[name][axis]
            sizes.setdefault(key, {}).setdefault(size, []).append(name)
    for (_, axis, old), found in sizes.items():
        if len(found) > 1:
            rare = min(found.values(), key=len)[0]
            listed = "; ".join(
                f"{size} in {', '.join(names[:3])}" + (", …" if len(names) > 3 else "")
                for size, names in sorted(found.items())
            )
            raise PretrainedError(
                "The model's layers have not lost alike, and their configuration has one number for all.",
                where=f"tensor @{rare} dimension {axis}",
                seen=f"{listed} (of {old})",
                expected="one size in all layers",
                next_step="remove with scope=layer and without layers or exclude; or save a .pt2 file",
            )


# --- the configuration -----------------------------------------------------------------------------------


def _fitting_config(
    pretrained: Pretrained, original: Program, before: Shapes, blocks: _Blocks, wanted: Shapes
) -> Any:
    """Return a configuration with which the class wants the program's shapes."""
    nearest: list[str] | None = None
    for changes in _candidates(pretrained.config, original, before, blocks):
        config = copy.deepcopy(pretrained.config)
        if len({_identity(pretrained.state[name]) for name in blocks.after}) < len(blocks.after):
            config.tie_word_embeddings = False
        for name, value in changes.items():
            setattr(config, name, value)
        misfits = _misfits(pretrained.kind, config, wanted)
        if not misfits:
            return config
        if nearest is None or len(misfits) < len(nearest):
            nearest = misfits
    assert nearest is not None
    raise PretrainedError(
        f"No configuration of {pretrained.kind.__name__} makes layers of these sizes.",
        where=nearest[0].partition(":")[0],
        seen=nearest[0].partition(": ")[2] + (f"; and {len(nearest) - 1} more" if nearest[1:] else ""),
        expected="sizes that follow from the configuration's numbers",
        next_step="leave that layer out (exclude), or heads where the configuration has no width of its own for "
        "them; or save a .pt2 file",
    )


def _candidates(config: Any, original: Program, before: Shapes, blocks: _Blocks) -> Iterator[dict[str, Any]]:
    """Yield changes of the configuration that may account for what has gone."""
    changes: dict[str, Any] = {}
    for stack, (kept, count) in blocks.kept.items():
        changes |= dict.fromkeys(_fields(config, _LAYERS, count, stack), len(kept))
        kinds = getattr(config, "layer_types", None)
        if isinstance(kinds, list) and len(kinds) == count:
            changes["layer_types"] = [kinds[index] for index in kept]
    ratios: set[float] = set()
    for group in find_groups(original):
        for member in group.members:
            if member.role != "makes" or member.tensor not in blocks.after:
                continue
            ratio = blocks.after[member.tensor][member.axis] / before[member.tensor][member.axis]
            if ratio == 1:
                continue
            if group.kind in ("heads", "head-width"):
                ratios.add(ratio)
            else:
                changes |= _width(config, group, ratio, member.tensor)
    yield changes
    heads, keys = _present(config, _HEADS), _present(config, _KEY_HEADS)
    widths = _present(config, _HEAD_WIDTHS)
    for ratio in sorted(ratios):
        fewer = {name: round(value * ratio) for name, value in heads.items()}
        fewer_keys = {name: round(value * ratio) for name, value in keys.items()}
        # Some classes have a width of heads only where the configuration says one.
        width = widths or {"head_dim": _head_width(config, heads)}
        yield changes | fewer | fewer_keys | width
        yield changes | fewer | width
        yield changes | {name: round(value * ratio) for name, value in width.items()}


def _width(config: Any, group: Group, ratio: float, tensor: str) -> dict[str, int]:
    names = {"neurons": _NEURONS, "embedding": _EMBEDDINGS}.get(group.kind, ())
    fields = _fields(config, names, len(group), tensor)
    if not fields:  # a width that the configuration leaves to the class
        fields = [name for name in names if getattr(config, name, 0) is None]
    return dict.fromkeys(fields, round(len(group) * ratio))


def _fields(config: Any, names: Sequence[str], value: int, place: str) -> list[str]:
    """Return the fields of a value: those that name the place's side, else those that name none."""
    found = [name for name, held in _present(config, names).items() if held == value]
    sides = [side for side in ("encoder", "decoder") if side in place]
    named = [name for name in found if any(side in name for side in sides)]
    return named or [name for name in found if not re.search("encoder|decoder", name)]


def _present(config: Any, names: Sequence[str]) -> dict[str, int]:
    values = {name: getattr(config, name, None) for name in names}
    # Classes give some fields second names, which they write through.
    known = set(config.to_dict())
    return {name: value for name, value in values.items() if isinstance(value, int) and name in known}


def _head_width(config: Any, heads: Mapping[str, int]) -> int:
    width = next(iter(_present(config, _EMBEDDINGS).values()), 0)
    return width // max(1, *heads.values(), 1)


def _misfits(kind: type[nn.Module], config: Any, wanted: Shapes) -> list[str]:
    """Return the tensors that a class would make otherwise, as text."""
    try:
        with torch.device("meta"):
            made = {name: tuple(tensor.shape) for name, tensor in kind(config).state_dict().items()}
    except Exception as error:  # whatever a class does with numbers that it was not made for
        return [f"{kind.__name__}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"]
    return [
        f"tensor @{name}: {list(shape)}, where the class makes {list(made[name]) if name in made else 'none'}"
        for name, shape in wanted.items()
        if made.get(name) != shape
    ]


# --- the model --------------------------------------------------------------------------------------------


def _filled(pretrained: Pretrained, config: Any, program: Program, blocks: _Blocks) -> nn.Module:
    """Return a model of the class with the program's tensors."""
    # Tied tensors have one name in the program, and several in the class.
    owners = {_identity(pretrained.state[name]): name for name in blocks.after}
    sources = {
        name: name if name in blocks.after else owners.get(_identity(tensor))
        for name, tensor in pretrained.state.items()
    }
    state = {
        blocks.names.get(name, name): program.tensor(source).detach()
        for name, source in sources.items()
        if source is not None
    }
    extra = [
        name
        for name, tensor in program.tensors()
        if isinstance(tensor, nn.Parameter) and name not in blocks.after
    ]
    with torch.device("meta"):
        model = pretrained.kind(config)
    missing, _ = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    for name, tensor in model.state_dict().items():
        if name not in missing or not tensor.is_meta:
            continue
        unused = pretrained.state.get(name)  # the traced call did not need it
        if unused is None or unused.shape != tensor.shape:
            extra.append(name)
        else:
            model.load_state_dict({name: unused}, strict=False, assign=True)
    if extra:
        raise PretrainedError(
            f"The program and {pretrained.kind.__name__} do not have the same tensors.",
            where=f"tensor @{extra[0]}",
            seen=", ".join(f"@{name}" for name in extra[:5]) + (", …" if len(extra) > 5 else ""),
            expected="the tensors of the class, under its names",
            next_step="leave out passes that fold or replace tensors; or save a .pt2 file",
        )
    return model.eval()


def _identity(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _require_equal(pretrained: Pretrained, folder: Path, program: Program, batch: Sequence[Any]) -> None:
    """Check that what was written computes what the program does."""
    try:
        model = pretrained.kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)  # type: ignore[attr-defined]
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        args, kwargs = pytree.tree_unflatten(list(batch), program.signature.in_spec)
        with torch.no_grad():
            made = _tensors(model.eval()(*args, **kwargs))
            wanted = _tensors(program.run(batch))
    except Error:
        raise
    except Exception as error:  # of transformers, safetensors, and the model's own code
        raise _unequal(
            pretrained, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from error
    if [tensor.shape for tensor in made] != [tensor.shape for tensor in wanted]:
        raise _unequal(pretrained, f"{len(made)} outputs, or outputs of other shapes")
    for index, (one, other) in enumerate(zip(made, wanted, strict=True)):
        apart = float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
        if not apart <= _TOLERANCE * float(other.double().abs().max().clamp_min(1e-6)):
            raise _unequal(pretrained, f"output {index} differs by {apart:.3g}")


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _unequal(pretrained: Pretrained, seen: str) -> PretrainedError:
    return PretrainedError(
        f"{pretrained.kind.__name__} does not compute with these weights what the program does.",
        where="save_pretrained, reading back what was written",
        seen=seen,
        expected=f"equal outputs, to {_TOLERANCE:g} of the greatest",
        next_step="the program computes something that the class does not (a mean over fewer channels, rotary "
        "widths); save a .pt2 file",
    )
