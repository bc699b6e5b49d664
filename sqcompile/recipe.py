"""Recipes: one compilation as a YAML file, checked strictly, with line numbers.

    model: models/encoder
    passes:
      - fold-batch-norm
      - mask-weights: {sparsity: 0.5, pattern: 2:4}
      - int8-static
    data: {path: calibration.npz, batch: 16}
    output: build/encoder.onnx

Paths are relative to the recipe's folder. `docs/recipes.md` lists every key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from sqcompile.backend import backend_names
from sqcompile.data import DataFile
from sqcompile.errors import Error, PassOptionError, RecipeError, did_you_mean
from sqcompile.files import require_file
from sqcompile.gallery import gallery_file
from sqcompile.input_spec import InputSpec, example_inputs
from sqcompile.modules import import_module
from sqcompile.pipeline import Pass, parse_pipeline
from sqcompile.pipeline.manager import Verify
from sqcompile.pipeline.text import make_passes, pass_text
from sqcompile.yaml_file import Node, parse_yaml

if TYPE_CHECKING:
    from sqcompile.api import Compiled, LazyCompiled
    from sqcompile.signature import Signature


@dataclass(frozen=True)
class Recipe:
    """One compilation: what to compile, how, and where to.

    Attributes:
        model: A Hugging Face folder, a `.pt2` file or `module.py:factory`.
        passes: The passes, in order; named pipelines are replaced by their passes.
        backend: `auto`, `onnxruntime` or `reference`.
        data: Calibration data.
        inputs: What the inputs look like, for models without data; names make dimensions dynamic.
        dynamic_shapes: Input -> axis -> name of the dimension.
        seed: Seed of everything random.
        threads: Threads within an operator.
        verify: `each`, `ends` or `off`.
        max_memory: Cap on resident memory, as `8GB`.
        work_dir: Folder for intermediate results and dumps.
        output: Where the compiled model goes.
        imports: Python files or modules that define passes of one's own.
    """

    model: str | None = None
    passes: tuple[Pass, ...] = ()
    backend: str = "auto"
    data: DataFile | None = None
    inputs: tuple[InputSpec, ...] = ()
    dynamic_shapes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    seed: int = 0
    threads: int | None = None
    verify: Verify = "each"
    max_memory: str | None = None
    work_dir: str | None = None
    output: str | None = None
    imports: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe.

        Args:
            path: The file, or the name of one in the gallery.

        Raises:
            FileError: If the file cannot be read.
            RecipeError: If it is no YAML, has an unknown key, or a value of the wrong type; the text
                names the line and the nearest valid name.
            PassOptionError: If a pass has no such option, or the value does not fit.
        """
        path = Path(path)
        if path.suffix == "" and not path.exists():  # a name in the gallery
            path = gallery_file(str(path))
        require_file(path, "recipe")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"'{path}' is no text.", where=str(path), seen=str(error)) from error
        return cls.parse(text, file=str(path), folder=path.parent)

    @classmethod
    def parse(cls, text: str, *, file: str = "recipe", folder: Path = Path()) -> Recipe:
        """Read a recipe from text.

        Args:
            text: The YAML text.
            file: Name of the file, for errors.
            folder: What relative paths are relative to.

        Raises:
            RecipeError: As `load` does.
        """
        table = parse_yaml(text, file).table("recipe", [item.name for item in fields(cls)])
        given = {key: node for key, node in table.items() if node.value is not None}
        reader = _Reader(folder)
        if "imports" in given:  # first: it defines the passes that the others name
            for location, node in zip(
                reader.imports(given["imports"]), given["imports"].items(), strict=True
            ):
                with _at(node):
                    import_module(location)
        return cls(**{key: getattr(reader, key)(node) for key, node in given.items()})

    def to_yaml(self) -> str:
        """Return the recipe as YAML that `parse` reads back; what is at its default is left out."""
        table: dict[str, Any] = {}
        default = Recipe()
        for item in fields(self):
            value = getattr(self, item.name)
            if value != getattr(default, item.name):
                table[item.name] = _plain(item.name, value)
        return (
            yaml.safe_dump(table, sort_keys=False, allow_unicode=True, width=100) if table else "passes: []\n"
        )

    def fill(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of `sqcompile.compile`, with what is at its default taken from the recipe.

        Args:
            options: Options by name, as the caller gave them.
        """
        ours: dict[str, Any] = {
            "backend": self.backend,
            "calibration": self.data,
            "dynamic_shapes": self.axes() or None,
            "example_inputs": example_inputs(self.inputs) or None,
            "seed": self.seed,
            "max_memory": self.max_memory,
            "threads": self.threads,
            "verify": self.verify,
            "work_dir": self.work_dir,
        }
        if self.data is not None or options.get("calibration") is not None:
            ours["example_inputs"] = None  # real data is the better example
            ours["calibration"] = self._sized_data()
            if self.inputs:
                ours["dynamic_shapes"] = self.axes()  # also if empty: a size that is written down stays fixed
        defaults = {"backend": "auto", "seed": 0, "verify": "each"}
        filled = {
            name: ours[name] if name in ours and value == defaults.get(name) else value
            for name, value in options.items()
        }
        return {**filled, "passes": list(self.passes)}

    def axes(self) -> dict[str, dict[int, str]]:
        """Return the names of dynamic dimensions, input -> axis -> name, from both places."""
        named = {spec.name: spec.dynamic_axes() for spec in self.inputs}
        for name, axes in self.dynamic_shapes.items():
            named[name] = {**named.get(name, {}), **axes}
        return {name: axes for name, axes in named.items() if axes}

    def check_inputs(self, signature: Signature) -> None:
        """Check that a traced model has the inputs, and their sizes, that the recipe describes.

        With data they come from the data, and what the recipe says could go unheard.

        Raises:
            RecipeError: If it has not.
        """
        traced = {value.name: value for value in signature.tensor_inputs}
        for spec in self.inputs:
            value = traced.get(spec.name)
            if value is None:
                raise RecipeError(
                    f"The model has no input '{spec.name}'.",
                    where="inputs",
                    seen=str(spec),
                    expected=", ".join(map(str, traced.values())),
                    next_step=did_you_mean(spec.name, list(traced)),
                )
            shape = value.shape or ()
            if len(shape) != len(spec.shape) or any(
                isinstance(told, int) and isinstance(size, int) and told != size
                for told, size in zip(spec.shape, shape, strict=True)
            ):
                raise RecipeError(
                    f"The input '{spec.name}' has other sizes than it is described with.",
                    where="inputs",
                    seen=str(value),
                    expected=str(spec),
                    next_step="describe it as the data and the model have it, or give other data",
                )

    def _sized_data(self) -> DataFile | None:
        """Return the data, in batches of the size that the inputs are described with."""
        fixed = [spec.shape[0] for spec in self.inputs if spec.shape and isinstance(spec.shape[0], int)]
        if self.data is None or not fixed:
            return self.data
        if self.data.batch not in (None, fixed[0]):
            raise RecipeError(
                "The inputs are described with another batch size than the data is read with.",
                where="inputs",
                seen=f"{', '.join(map(str, self.inputs))}, and batches of {self.data.batch}",
                expected=f"batches of {fixed[0]}",
                next_step="leave the batch size of the data out, or name the dimension to let it change",
            )
        return replace(self.data, batch=fixed[0])

    def compile(self, **options: Any) -> Compiled | LazyCompiled:
        """Compile the recipe's model; options given here win over the recipe's.

        Args:
            **options: As `sqcompile.compile` takes them.

        Raises:
            RecipeError: If the recipe names no model.
            Error: Whatever `sqcompile.compile` raises.
        """
        from sqcompile.api import compile

        if self.model is None:
            raise RecipeError(
                "The recipe names no model.",
                seen="no key 'model'",
                expected="a Hugging Face folder, a .pt2 file or module.py:factory",
                next_step="add `model: …`, or pass the model: sqcompile.compile(model, passes=recipe)",
            )
        return compile(self.model, passes=self, **options)


class _Reader:
    """Turns the node of each key into the value of the recipe's field of that name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def model(self, node: Node) -> str:
        return self._location(node.text("model"))

    def passes(self, node: Node) -> tuple[Pass, ...]:
        passes: list[Pass] = []
        for item in node.items():
            with _at(item):
                passes += _read_passes(item)
        return tuple(passes)

    def backend(self, node: Node) -> str:
        return node.choice("backend", _backends())

    def data(self, node: Node) -> DataFile:
        if not isinstance(node.value, dict):
            return DataFile(self._path(node.text("data")))
        table = {
            key: item
            for key, item in node.table("data", [item.name for item in fields(DataFile)]).items()
            if item.value is not None
        }
        if "path" not in table:
            raise RecipeError(
                "The data has no path.",
                where=node.place,
                seen=", ".join(table) or "nothing",
                expected="path: FILE.npz, FILE.npy or FILE.txt",
                next_step="add the path",
            )
        numbers = {
            key: table[key].integer(f"data.{key}", 1)
            for key in ("batch", "samples", "context")
            if key in table
        }
        tokenizer = self._path(table["tokenizer"].text("data.tokenizer")) if "tokenizer" in table else None
        return DataFile(self._path(table["path"].text("data.path")), tokenizer=tokenizer, **numbers)

    def inputs(self, node: Node) -> tuple[InputSpec, ...]:
        if isinstance(node.value, dict):
            texts = {f"{name}: {item.text(f'inputs.{name}')}": item for name, item in node.value.items()}
        else:
            texts = {item.text("inputs"): item for item in node.items()}
        specs = []
        for text, item in texts.items():
            with _at(item):
                specs.append(InputSpec.parse(text))
        return tuple(specs)

    def dynamic_shapes(self, node: Node) -> dict[str, dict[int, str]]:
        shapes: dict[str, dict[int, str]] = {}
        for name, item in node.table("dynamic_shapes").items():
            shapes[name] = {}
            for axis, dim in item.table(f"dynamic_shapes.{name}").items():
                if not axis.lstrip("-").isdigit():
                    raise RecipeError(
                        f"'{axis}' is no axis.",
                        where=item.keys[axis],
                        seen=axis,
                        expected="axis: name, such as {0: batch}",
                        next_step="number the axes from 0",
                    )
                label = dim.text(f"dynamic_shapes.{name}.{axis}")
                if not label.isidentifier():
                    raise dim.wrong(f"dynamic_shapes.{name}.{axis}", "a name, such as batch")
                shapes[name][int(axis)] = label
        return shapes

    def seed(self, node: Node) -> int:
        return node.integer("seed")

    def threads(self, node: Node) -> int:
        return node.integer("threads", 1)

    def verify(self, node: Node) -> str:
        return node.choice("verify", get_args(Verify))

    def max_memory(self, node: Node) -> str:
        from sqcompile.api import parse_bytes

        text = node.text("max_memory")
        with _at(node):
            parse_bytes(text)
        return text

    def work_dir(self, node: Node) -> str:
        return self._path(node.text("work_dir"))

    def output(self, node: Node) -> str:
        return self._path(node.text("output"))

    def imports(self, node: Node) -> tuple[str, ...]:
        return tuple(self._location(item.text("imports"), ".py") for item in node.items())

    def _path(self, text: str) -> str:
        """Return a path relative to the recipe; what follows the colon of `file.npz:name` stays."""
        return str(self._folder / text)

    def _location(self, text: str, suffix: str = "") -> str:
        """Return a model or module: files relative to the recipe, names of packages as they are."""
        name = text.rpartition(":")[0] or text
        is_file = name.endswith(".py") or ":" not in text
        if suffix:
            is_file = name.endswith(suffix)
        return self._path(text) if is_file else text


def _read_passes(node: Node) -> Sequence[Pass]:
    """Read one entry of `passes`: text, or a table {name: {option: value}}."""
    if not isinstance(node.value, dict):
        return parse_pipeline(node.text("passes"))
    if len(node.value) != 1:
        raise RecipeError(
            "An entry of passes names one pass.",
            where=node.place,
            seen=", ".join(node.value) or "no name",
            expected="- name: {option: value}",
            next_step="indent the options further than the name, or put them into braces",
        )
    ((name, options),) = node.value.items()
    if options.value is None:
        return make_passes(name, {})
    values = {key: item.plain() for key, item in options.table(name).items()}
    try:
        return make_passes(name, values)
    except PassOptionError as error:
        option = (error.seen or "").partition("=")[0]
        if option in options.keys:  # closer than the line of the pass
            error.where = f"{options.keys[option]}: {error.where}"
        raise


@contextmanager
def _at(node: Node) -> Iterator[None]:
    """Add the line of a node to errors that name none."""
    try:
        yield
    except Error as error:
        if error.where is None:
            error.where = node.place
        elif ", line " not in error.where:
            error.where = f"{node.place}: {error.where}"
        raise


def _plain(name: str, value: Any) -> Any:
    """Return the value of a field as YAML holds it."""
    if name == "passes":
        return [pass_text(item) for item in value]
    if name == "inputs":
        return [str(item) for item in value]
    if name == "data":
        shown = {item.name: getattr(value, item.name) for item in fields(value)}
        return {key: item for key, item in shown.items() if item is not None}
    if name == "dynamic_shapes":
        return {key: dict(axes) for key, axes in value.items()}
    return list(value) if isinstance(value, tuple) else value


def check_choices(recipe: Recipe) -> Recipe:
    """Check the fields that take one of a few words, for recipes that were not read from a file.

    Raises:
        RecipeError: If one has another value, with the nearest.
    """
    for name, value, choices in (
        ("backend", recipe.backend, _backends()),
        ("verify", recipe.verify, get_args(Verify)),
    ):
        if value not in choices:
            raise RecipeError(
                f"'{name}' has a value that it cannot take.",
                where=f"command line, --{name}",
                seen=value,
                expected=", ".join(choices),
                next_step=did_you_mean(value, choices),
            )
    if recipe.max_memory is not None:
        from sqcompile.api import parse_bytes

        parse_bytes(recipe.max_memory)
    return recipe


def _backends() -> list[str]:
    return ["auto", *backend_names()]
