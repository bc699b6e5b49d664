"""Finding the model: folders of Hugging Face, `.pt2` files, and `module.py:factory` names."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from sqcompile.errors import FileError, TraceError, did_you_mean
from sqcompile.files import require_file
from sqcompile.modules import failing_line, import_module
from sqcompile.program import Program
from sqcompile.signature import Signature


def load_model(model: Any, *, weights: bool = True) -> Any:
    """Return a model that can be traced: paths are loaded, everything else is returned as it is.

    Args:
        model: A module or program; or the path of a Hugging Face folder or of a `.pt2` file; or
            `module.py:factory` (or `package.module:factory`), a callable that returns a module.
        weights: Whether the weights of folders are read; without, they hold no values and take no memory.

    Raises:
        FileError: If the path leads to no model.
        TraceError: If the model is in training mode, or is nothing that can be traced.
    """
    if isinstance(model, (str, Path)):
        model = _load_path(model, weights)
    if isinstance(model, (Program, ExportedProgram)):
        return model
    if not isinstance(model, nn.Module):
        raise TraceError(
            "The model cannot be traced.",
            where="model",
            seen=f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__,
            expected="a torch.nn.Module, ExportedProgram, GraphModule, a Hugging Face folder or a .pt2 file",
            next_step=_how_to_get_a_module(model),
        )
    if model.training and any(_acts_in_training(module) for module in model.modules()):
        raise TraceError(
            "The model is in training mode.",
            where=type(model).__name__,
            seen="model.training is True, and it has dropout or batch norm",
            expected="a model in eval mode",
            next_step="call model.eval() first",
        )
    return model


def model_name(model: Any, source: Any = None) -> str:
    """Return what people call a model: its class, or of a program, which has none, the file that it came from."""
    if isinstance(model, Program) and isinstance(source, (str, Path)):
        return Path(source).name
    return type(model).__name__


def folder_dynamic_shapes(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """Return a dynamic batch and sequence for the inputs of a Hugging Face model.

    Integer and boolean inputs [N, T] get both; other tensors get a dynamic batch.
    """
    args, kwargs = inputs
    if args:
        return None
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("seq")
    shapes: dict[str, Any] = {}
    for name, value in kwargs.items():
        if not isinstance(value, torch.Tensor):
            shapes[name] = None
        elif value.dim() == 2 and not value.is_floating_point():
            shapes[name] = {0: batch, 1: sequence}
        else:
            shapes[name] = {0: batch} if value.dim() else None
    return shapes


def _how_to_get_a_module(given: Any) -> str:
    """Return a next step for what was given as a model and is none."""
    if isinstance(given, type):
        return "make an instance of it, and call eval()"
    if isinstance(given, Mapping):
        return "that looks like weights: make the module that they belong to, and call its load_state_dict"
    if isinstance(getattr(given, "signature", None), Signature) or hasattr(given, "artifact"):
        return "compile the model that it was made from, with all passes; a compiled one keeps its graph in .program"
    if callable(given):
        return "wrap the function in an nn.Module"
    return "pass the module itself"


def _load_path(source: str | Path, weights: bool) -> Any:
    path = Path(source)
    if path.is_dir():
        return _load_folder(path, weights)
    if path.suffix == ".pt2":
        return Program.load(path)
    text = str(source)
    if ":" in text and not path.exists():
        return _call_factory(text)
    require_file(path, "model")
    raise FileError(
        f"'{path}' is no model.",
        where=text,
        seen=f"a file with suffix '{path.suffix}'",
        expected="a Hugging Face folder, a .pt2 file, or module.py:factory",
        next_step=_how_to_name_a_model(path),
    )


def _how_to_name_a_model(path: Path) -> str:
    """Return a next step for a file that is none of those that hold a model."""
    if path.suffix == ".py":
        return f"name the function that makes the model: {path}:FUNCTION"
    if path.suffix in (".onnx", ".sqm"):
        return (
            "it is compiled already: compile the model that it was made from; "
            "sqcompile inspect says what is known of it"
        )
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors"):
        return (
            "weights, or a pickle, need the code of their model: write a function that makes it and loads "
            f"'{path.name}', and name it: model.py:FUNCTION"
        )
    return "save the model with torch.export.save, or name a function that makes it"


def _load_folder(path: Path, weights: bool) -> nn.Module:
    config_path = path / "config.json"
    require_file(config_path, "model configuration")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError(f"a {type(config).__name__} instead of a table")
    except (ValueError, TypeError) as error:
        raise FileError(
            f"'{config_path}' is no configuration.",
            where=str(config_path),
            seen=str(error),
            expected="config.json as save_pretrained writes it",
            next_step="save the model again with model.save_pretrained(folder)",
        ) from error
    try:
        import transformers
    except ImportError as error:
        raise FileError(
            "Folders of Hugging Face need the transformers package.",
            where=str(path),
            seen=str(error),
            expected="transformers",
            next_step="pip install sqcompile[llm]",
        ) from error
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else "AutoModel"
    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
        raise FileError(
            f"transformers has no architecture '{name}'.",
            where=str(config_path),
            seen=name,
            expected="a model class of transformers",
            next_step=did_you_mean(name, [n for n in dir(transformers) if n.endswith(("Model", "LM"))]),
        )
    if not weights:
        from sqcompile.streaming.skeleton import build_skeleton

        return build_skeleton(kind, path)
    try:
        with without_progress_bars():
            model, loaded = kind.from_pretrained(
                path, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # of transformers, safetensors, PyTorch, and whatever they use
        raise FileError(
            f"The model in '{path}' cannot be loaded.",
            where=str(path),
            seen=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
            expected="config.json and model.safetensors as save_pretrained writes them",
            next_step="check that the folder is complete",
        ) from error
    missing = sorted(loaded["missing_keys"])
    if missing:  # transformers would make them up, at random
        raise FileError(
            f"The folder '{path}' lacks weights of the model.",
            where=str(path),
            seen=f"nothing for {', '.join(missing[:5])}" + (", …" if len(missing) > 5 else ""),
            expected=f"every weight of {name}",
            next_step="complete the folder; or load the model in Python, and pass it to sqcompile.compile",
        )
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # a cache among the outputs is of no use without a session for it
    assert isinstance(model, nn.Module)
    return model.eval()


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars into output that is not its own."""
    import transformers

    settings = transformers.utils.logging
    shown = settings.is_progress_bar_enabled()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            settings.enable_progress_bar()


def _factories(module: ModuleType, name: str) -> str:
    """Return a next step: what a module has under a similar name that may make a model."""
    made = [key for key, value in vars(module).items() if callable(value) or isinstance(value, nn.Module)]
    return did_you_mean(name, [key for key in made if not key.startswith("_")])


def _call_factory(text: str) -> Any:
    location, _, name = text.rpartition(":")
    module = import_module(location)
    factory = getattr(module, name, None)
    if isinstance(factory, nn.Module):
        return factory.eval()
    if hasattr(module, name) and not callable(factory):
        raise FileError(
            f"'{name}' in '{location}' makes no model.",
            where=text,
            seen=f"{type(factory).__name__}: {factory!r:.80}",
            expected="a function without arguments that returns a torch.nn.Module, or such a module",
            next_step=_factories(module, name),
        )
    if not callable(factory):
        raise FileError(
            f"'{location}' has no function '{name}'.",
            where=text,
            seen=name,
            expected="a function without arguments that returns a torch.nn.Module",
            next_step=_factories(module, name),
        )
    missing = _arguments_needed(factory)
    if missing:
        raise TraceError(
            f"'{name}' in '{location}' needs arguments.",
            where=_definition(factory, location),
            seen=f"{name}({', '.join(missing)})",
            expected="a function without arguments that returns a torch.nn.Module",
            next_step=f"write one that calls it: def make(): return {name}({missing[0]}=…), and name {location}:make",
        )
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        raise TraceError(
            f"'{name}' in '{location}' fails to make the model.",
            where=failing_line(error, location),
            seen=f"{type(error).__name__}: {error}",
            expected="a function without arguments that returns a torch.nn.Module",
            next_step=f"call {name}() in Python, and correct it",
        ) from error
    if not isinstance(model, (nn.Module, Program, ExportedProgram)):
        raise TraceError(
            f"'{name}' in '{location}' returns no model.",
            where=_definition(factory, location),
            seen=f"it returned {'None' if model is None else type(model).__name__}",
            expected="a torch.nn.Module",
            next_step="end it with a return of the module" if model is None else _how_to_get_a_module(model),
        )
    return model.eval() if isinstance(model, nn.Module) else model


def _arguments_needed(factory: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that a function cannot be called without."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [item.name for item in parameters if item.default is item.empty and item.kind not in optional]


def _definition(factory: Callable[..., Any], location: str) -> str:
    """Return the line of the user's file where a function or class begins, as `file.py:41`."""
    code = getattr(inspect.unwrap(factory), "__code__", None)
    return location if code is None else f"{location}:{code.co_firstlineno}"


def _acts_in_training(module: nn.Module) -> bool:
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    return module.training and isinstance(module, kinds)
