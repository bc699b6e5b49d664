"""Every exception of sqcompile, one class a kind of mistake.

The text of each has four parts: what went wrong, where (node, module path, source line), what was
seen and expected, and the next step. `docs/errors.md` is made from the docstrings below.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class Error(Exception):
    """Base of every exception that sqcompile raises.

    Args:
        what: One sentence that says what went wrong.
        where: The place: node, module path and source line, or file and line.
        seen: What was found there.
        expected: What would have been right.
        next_step: What the reader can do now.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        seen: object = None,
        expected: object = None,
        next_step: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.seen = None if seen is None else str(seen)
        self.expected = None if expected is None else str(expected)
        self.next_step = next_step
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (
            ("where", self.where),
            ("seen", self.seen),
            ("expected", self.expected),
            ("next", self.next_step),
        ):
            if text:
                lines.append(f"  {label + ':':<10}{text}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.__dict__)


def _rebuild(kind: type[Error], state: dict[str, object]) -> Error:
    error = kind(str(state["what"]))
    error.__dict__.update(state)
    return error


class TraceError(Error):
    """The model cannot be turned into a program: control flow on data, an unknown operator, a mutation."""


class InputError(Error):
    """A call's inputs do not fit: structure, shape, dtype, or a dimension out of its range."""


class CalibrationError(Error):
    """Calibration data is missing, empty, of the wrong shape or type, or holds NaN or infinity."""


class FormatError(Error):
    """A number format that does not exist or does not fit the tensor it is asked for."""


class SelectionError(Error):
    """A pattern that selects layers matches none; the nearest names are given."""


class PassError(Error):
    """A pass failed; the text names it, the passes before it, the node and the dumped graph."""


class PassOptionError(PassError):
    """A pass was given an option that it does not have, or a value out of range."""

    exit_code = 2


class PassContractError(PassError):
    """A pass broke its contract: it misreported a change, wrote into a tensor, or changed the interface."""


class LevelError(PassError):
    """A pass needs another level than the program's, or two passes conflict in their order."""


class VerifyError(PassError):
    """A program breaks an invariant: structure, shapes, level, quantization or sparsity."""


class NumericError(PassError):
    """The numbers moved further than a pass promised, or turned NaN or infinite."""


class UnsupportedError(Error):
    """A backend cannot run the program; every unsupported node is listed at once."""


class BackendError(Error):
    """A backend failed while it lowered, loaded or ran a program."""


class FileError(Error):
    """A file cannot be read or written; nothing is left half-written."""


class RecipeError(Error):
    """A recipe or pipeline text is wrong; line and nearest valid name are given."""

    exit_code = 2


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` of `candidates` that look most like `name`, best first."""
    pool = list(dict.fromkeys(candidates))
    folded = {candidate.lower(): candidate for candidate in pool}
    found = difflib.get_close_matches(name.lower(), list(folded), n=count, cutoff=0.4)
    return [folded[key] for key in found]


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return a next step that offers the nearest valid names, or lists all when none is near."""
    pool = list(candidates)
    near = nearest(name, pool)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    shown = ", ".join(repr(n) for n in sorted(pool)[:12])
    return (
        f"valid names: {shown}{', …' if len(pool) > 12 else ''}" if pool else "there is none to choose from"
    )
