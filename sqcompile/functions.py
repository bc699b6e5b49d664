"""Options that are functions of the user's: given as an object, or by name as `module.py:function`.

A pass prints as text, and a recipe is text; a function cannot be written down. So what an option holds is a
reference: the function, and the place where it can be found again. A function that has no such place (a
lambda, or one defined inside another) works all the same, and its text says that it cannot be read back.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqcompile.errors import FileError, RecipeError, did_you_mean
from sqcompile.modules import import_module

_UNNAMED = "unnamed:"


@dataclass(frozen=True)
class FunctionReference:
    """A function, and where it is found: `module.py:function` or `package.module:function`.

    Attributes:
        location: The place, or `unnamed:` and the function's own name if it can be found nowhere.
        function: The function, or None where it is imported at its first use.
        identity: Tells unnamed functions apart; 0 for those that have a place.
    """

    location: str
    function: Callable[..., Any] | None = field(default=None, compare=False, repr=False)
    identity: int = field(default=0, repr=False)

    @classmethod
    def of(cls, function: FunctionReference | Callable[..., Any]) -> FunctionReference:
        """Return the reference to a function; a reference is returned as it is."""
        if isinstance(function, FunctionReference):
            return function
        location = _location(function)
        if location is not None:
            return cls(location, function)
        name = getattr(function, "__qualname__", type(function).__qualname__)
        return cls(f"{_UNNAMED}{re.sub(r'[^A-Za-z0-9_.]+', '', name)}", function, id(function))

    @classmethod
    def parse(cls, text: str) -> FunctionReference:
        """Read `module.py:function`; nothing is imported yet.

        Raises:
            RecipeError: If the text has no such form.
        """
        module, colon, name = text.strip().rpartition(":")
        if not colon or not module or not name.replace(".", "").isidentifier() or text.startswith(_UNNAMED):
            raise RecipeError(
                f"'{text}' names no function.",
                seen="a function that was given as an object" if text.startswith(_UNNAMED) else text,
                expected="module.py:function, or package.module:function",
                next_step="define it at the top of a file, and name it by the file",
            )
        return cls(text.strip())

    def __str__(self) -> str:
        return self.location

    def load(self) -> Callable[..., Any]:
        """Return the function, imported if need be.

        Raises:
            FileError: If its module cannot be imported, or has no such function.
        """
        if self.function is not None:
            return self.function
        location, _, name = self.location.rpartition(":")
        value: Any = import_module(location)
        for part in name.split("."):
            found = getattr(value, part, None)
            if found is None:
                raise FileError(
                    f"'{location}' has no function '{name}'.",
                    where=self.location,
                    seen=f"no '{part}'",
                    expected="a function at the top of the module",
                    next_step=did_you_mean(part, [key for key in vars(value) if callable(vars(value)[key])]),
                )
            value = found
        if not callable(value):
            raise FileError(
                f"'{self.location}' is no function.",
                where=self.location,
                seen=type(value).__name__,
                expected="something that can be called",
            )
        function: Callable[..., Any] = value
        return function

    def fingerprint(self) -> str:
        """Return a hash of the place and the source, as far as Python can show it.

        What the function calls, and the data that it reads, do not count.
        """
        function = self.load()
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):  # made at run time, written in C, or an object with __call__
            source = ""
        return hashlib.sha256(f"{self.location}\n{source}".encode()).hexdigest()[:16]


def _location(function: Callable[..., Any]) -> str | None:
    """Return where a function is found again, or None."""
    name, module_name = getattr(function, "__qualname__", None), getattr(function, "__module__", None)
    module = sys.modules.get(module_name or "")
    if name is None or module is None:
        return None
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if value is not function:
        return None
    if module_name != "__main__":
        return f"{module_name}:{name}"
    file = getattr(module, "__file__", None)
    return f"{file}:{name}" if file and file.endswith(".py") else None
