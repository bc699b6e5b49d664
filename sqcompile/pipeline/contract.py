"""What a pass is: typed options, the levels it needs and leaves, what it keeps, and one method."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import typing
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from typing_extensions import dataclass_transform  # in typing from Python 3.11 on

from sqcompile.errors import PassContractError, PassOptionError
from sqcompile.levels import Level
from sqcompile.remarks import Remark

if TYPE_CHECKING:
    from sqcompile.pipeline.context import PassContext
    from sqcompile.program import Program


@dataclass(frozen=True)
class Keeps:
    """Which equality a pass promises between its input and its output program.

    The pass manager measures it on the check batch after every run, and tests do.
    """

    kind: str
    rtol: float = 0.0
    atol: float = 0.0
    count: int = 0

    @classmethod
    def bitwise(cls) -> Keeps:
        """Equal outputs, bit for bit; -0 counts as 0, and NaN as NaN."""
        return cls("bitwise")

    @classmethod
    def close(cls, *, rtol: float, atol: float = 0.0) -> Keeps:
        """Outputs within `atol + rtol · max|reference|`, per output tensor.

        For outputs in less than 32 bits `rtol` is at least 16 rounding steps of their type (float16:
        1.6 %, bfloat16: 12.5 %): whatever is computed in another order there differs by that.
        """
        return cls("close", rtol=rtol, atol=atol)

    @classmethod
    def steps(cls, count: int) -> Keeps:
        """Outputs within `count` steps of an 8-bit grid over each output's range (max|reference| / 127)."""
        return cls("steps", count=count)

    @classmethod
    def interface(cls) -> Keeps:
        """Only names, shapes and types of inputs and outputs, and finite numbers."""
        return cls("interface")

    def allows(self, reference: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether `value` is what the promise says, given the output before the pass."""
        if reference.shape != value.shape or reference.dtype != value.dtype:
            return False
        if self.kind == "interface" or reference.numel() == 0:
            return True
        if self.kind == "bitwise" or not reference.is_floating_point():
            return bool(torch.equal(reference, value)) or bool(
                torch.allclose(reference, value, rtol=0.0, atol=0.0, equal_nan=True)
            )
        regular = torch.isfinite(reference)
        if not torch.equal(regular, torch.isfinite(value)):
            return False
        if not torch.equal(reference[~regular].nan_to_num(), value[~regular].nan_to_num()):
            return False  # another infinity, or NaN for infinity
        ref, val = reference[regular], value[regular]
        if ref.numel() == 0:
            return True
        peak = float(ref.abs().max())
        rtol = self.rtol if ref.element_size() >= 4 else max(self.rtol, 16 * torch.finfo(ref.dtype).eps)
        bound = self.atol + rtol * peak if self.kind == "close" else self.count * peak / 127
        return float((ref - val).abs().max()) <= bound

    def __str__(self) -> str:
        if self.kind == "close":
            return f"close (rtol {self.rtol:g}, atol {self.atol:g})"
        return f"steps ({self.count})" if self.kind == "steps" else self.kind


@dataclass(frozen=True)
class PassResult:
    """What a pass reports.

    Attributes:
        changes: How many rewrites it did; 0 means that the program is untouched. The manager
            compares this with a fingerprint and rejects a pass that reports the wrong thing.
        remarks: Why rewrites did or did not fire.
        facts: Further figures for the report, by name.
    """

    changes: int = 0
    remarks: tuple[Remark, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


_REGISTRY: dict[str, type[Pass]] = {}


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Pass(ABC):
    """A rewrite of a whole program.

    A subclass declares its options as annotated fields with defaults (it becomes a frozen,
    keyword-only dataclass by itself), the level that it requires and produces, and what it keeps.
    Its text name follows from the class name: `FoldBatchNorm` is `fold-batch-norm`. Options may be given
    as recipes write them (`pattern="2:4"`, `layers="fc"`); `__post_init__` finds them in their own types.

    Where all that a pass does to a layer depends on nothing outside of the layer's block, it says `local = True`:
    then a model may be compressed block by block, and never be in memory as a whole.

    A pass holds no state. It may edit the program's graph freely, through `Rewriter`; it replaces
    tensors and never writes into them; data, seed and progress come from the context.
    """

    name: ClassVar[str]
    requires: ClassVar[Level] = Level.ATEN
    produces: ClassVar[Level] = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.interface()
    changes_interface: ClassVar[bool] = False
    local: ClassVar[bool] = False

    def __init_subclass__(cls, *, register: bool = True, **kwargs: Any) -> None:
        """Make a subclass a dataclass, and known by its text name.

        Args:
            register: Whether recipes and the command line know the pass. Passes that are defined inside
                a function are never known by name.
            **kwargs: For other base classes.

        Raises:
            PassContractError: If an option has no type, or another pass has the name already.
        """
        super().__init_subclass__(**kwargs)
        for name in _CLASS_VARIABLES & inspect.get_annotations(cls).keys():
            del cls.__annotations__[name]  # `keeps: Keeps = …` is typed with care, and no option
        _check_class_variables(cls)
        _check_options(cls)
        check = getattr(cls, "__post_init__", None)

        def read_then_check(self: Pass) -> None:
            from sqcompile.pipeline.text import read_options

            read_options(self)
            found = check(self) if check is not None else None
            if isinstance(found, Exception):
                raise found  # `return self.reject_option(…)`, which was meant to be heard

        cls.__post_init__ = read_then_check  # type: ignore[attr-defined]
        # Applied here and not by a decorator, because a decorator gets forgotten, and then a pass
        # silently has no options.
        dataclass(frozen=True, kw_only=True)(cls)
        # `Pass` refuses as these do; beside them, who writes the decorator all the same would get a TypeError.
        del cls.__setattr__, cls.__delattr__
        if "name" not in cls.__dict__:
            cls.name = text_name(cls.__name__)
        abstract = getattr(cls.run, "__isabstractmethod__", False)
        if register and not abstract and "<locals>" not in cls.__qualname__:
            _register(cls)

    if not TYPE_CHECKING:  # type checkers know from `dataclass_transform` that passes are frozen

        def __setattr__(self, name: str, value: object) -> None:
            raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")

        def __delattr__(self, name: str) -> None:
            raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")

    @abstractmethod
    def run(self, program: Program, context: PassContext) -> PassResult:
        """Rewrite `program` in place and report what was done."""

    def __str__(self) -> str:
        from sqcompile.pipeline.text import pass_text

        return pass_text(self)

    @classmethod
    def parse(cls, text: str) -> Pass:
        """Read one pass from its text, such as `mask-weights{sparsity=0.5}`."""
        from sqcompile.pipeline.text import parse_pass

        return parse_pass(text)

    def reject_option(self, option: str, expected: str) -> PassOptionError:
        """Return the error for an option whose value is out of range."""
        return PassOptionError(
            f"Option '{option}' of {self.name} has a value that it cannot take.",
            where=f"pass {self.name}",
            seen=f"{option}={getattr(self, option)!r}",
            expected=expected,
            next_step=f"see the options with: sqcompile passes {self.name}",
        )


def _check_options(kind: type[Pass]) -> None:
    """Refuse class attributes that look like options and are none, for want of an annotation."""
    annotated = inspect.get_annotations(kind)
    place = f"class {kind.__module__}.{kind.__qualname__}"
    if "__init__" in vars(kind):
        raise PassContractError(
            f"The pass {kind.__name__} has an __init__ of its own.",
            where=place,
            seen="def __init__",
            expected="options as annotated fields, which recipes and the command line can read: ratio: float = 0.5",
            next_step="turn its parameters into fields; checks of their values go into __post_init__",
        )
    hints = _type_hints(kind)
    for name in annotated:
        if _is_mutable(hints.get(name)):
            raise PassContractError(
                f"The option '{name}' of {kind.__name__} is of a type that can be written into.",
                where=place,
                seen=f"{name}: {hints[name]}",
                expected="a type whose values stay as they are, so that a pass equals what its text says",
                next_step="write list[int] as tuple[int, ...], and dict[str, float] as tuple[tuple[str, float], ...]",
            )
        value = vars(kind).get(name)
        if isinstance(value, torch.Tensor) or (type(value).__hash__ is None and not callable(value)):
            raise PassContractError(
                f"The default of the option '{name}' of {kind.__name__} can be written into.",
                where=place,
                seen=f"{name} = {value!r}",
                expected="a value that stays as it is: a number, a text, a tuple, a frozen dataclass",
                next_step="write a list as a tuple: layers: tuple[str, ...] = (); a table as a tuple of pairs",
            )
    for name, value in vars(kind).items():
        plain = not callable(value) and not isinstance(value, (property, classmethod, staticmethod))
        if name.startswith("_") or not plain or name in annotated or name in _CLASS_VARIABLES:
            continue
        raise PassContractError(
            f"'{name}' of the pass {kind.__name__} has no type.",
            where=place,
            seen=f"{name} = {value!r}",
            expected=f"{name}: {type(value).__name__} = …",
            next_step="annotate it as an option, or as ClassVar if it is none",
        )


def _type_hints(kind: type[Pass]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except (NameError, TypeError):  # types that only exist inside a function
        return {}


def _is_mutable(hint: object) -> bool:
    origin = typing.get_origin(hint)
    if origin in (tuple, typing.Union, types.UnionType):
        return any(map(_is_mutable, typing.get_args(hint)))
    return (origin or hint) in (list, dict, set, torch.Tensor)


def _check_class_variables(kind: type[Pass]) -> None:
    """Refuse what is of another type than it has to be, before something far away depends on it."""
    examples = {
        "requires": (Level, "requires = Level.ATEN"),
        "produces": (Level, "produces = Level.QDQ"),
        "keeps": (Keeps, "keeps = Keeps.close(rtol=1e-5)"),
        "changes_interface": (bool, "changes_interface = True"),
        "local": (bool, "local = True"),
        "name": (str, "name = 'replace-silu'"),
    }
    for name, (wanted, example) in examples.items():
        value = vars(kind).get(name)
        if name not in vars(kind) or isinstance(value, property):  # which depends on the options
            continue
        if isinstance(value, wanted) and (name != "name" or re.fullmatch(r"[A-Za-z0-9.+-]+", str(value))):
            continue
        raise PassContractError(
            f"'{name}' of the pass {kind.__name__} is not what it has to be.",
            where=f"class {kind.__module__}.{kind.__qualname__}",
            seen=f"{name} = {value!r}",
            expected="letters, digits and dashes" if isinstance(value, wanted) else wanted.__name__,
            next_step=f"write {example}",
        )


_CLASS_VARIABLES = frozenset({"name", "requires", "produces", "keeps", "changes_interface", "local"})


def _register(kind: type[Pass]) -> None:
    """Let a pass be found by its text name; a class that is defined again takes its old one's place."""
    old = _REGISTRY.get(kind.name)
    if old is not None and not _is_redefinition(old, kind):
        raise PassContractError(
            f"There are two passes called '{kind.name}'.",
            where=f"class {kind.__module__}.{kind.__qualname__}",
            seen=f"{old.__module__}.{old.__qualname__} has the name already",
            expected="a name of its own for each pass",
            next_step="rename the class, set another `name`, or define it with register=False",
        )
    _REGISTRY[kind.name] = kind


def _is_redefinition(old: type[Pass], new: type[Pass]) -> bool:
    """Whether a class comes from the place of another: a cell run again, a module loaded again."""
    if old.__qualname__ != new.__qualname__:
        return False
    if old.__module__ == new.__module__ or "__main__" in (old.__module__, new.__module__):
        return True
    files = {getattr(sys.modules.get(kind.__module__), "__file__", None) for kind in (old, new)}
    return len(files) == 1 and None not in files


def text_name(class_name: str) -> str:
    """Return the text form of a class name: `FoldQDQ` is `fold-qdq`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", class_name)
    return spaced.lower().strip("_").replace("_", "-")


def option_fields(kind: type[Pass]) -> tuple[dataclasses.Field[Any], ...]:
    """Return the options of a pass class."""
    return dataclasses.fields(kind)  # type: ignore[arg-type]
