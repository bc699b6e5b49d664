"""What torch.export could not take, in the words of the model: its own line, and what to do there."""

from __future__ import annotations

import io
import linecache
import logging
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from types import FrameType, TracebackType

from torch import nn

from sqcompile.errors import Error, InputError, TraceError

# Pattern in torch's message -> (what, expected, next step).
_REASONS: tuple[tuple[str, tuple[str, str | None, str]], ...] = (
    (
        r"Could not guard on data-dependent expression",
        (
            "The model branches on the values of a tensor.",
            "a computation that is the same for every input",
            "compute both sides and choose with torch.where, or decide by a shape or an argument",
        ),
    ),
    (
        r"Could not extract specialized integer from data-dependent expression",
        (
            "The model takes a size or an index from the values of a tensor.",
            "sizes that follow from the shapes of the inputs",
            "compute it from shapes, or pass it to the model as a Python number",
        ),
    ),
    (
        r"\.numpy\(\) is not supported|Can't call numpy\(\)|convert .*to a? ?numpy",
        (
            "The model leaves PyTorch for NumPy.",
            "tensor operations only",
            "replace the NumPy call by the torch function of the same name",
        ),
    ),
    (
        r"Exporting a ScriptModule is not supported",
        (
            "A TorchScript module cannot be traced.",
            "the Python module that it was made from",
            "pass the original torch.nn.Module",
        ),
    ),
    (
        r"LinearPackedParams|ConvPackedParams|torch\.classes\.quantized|quantized::",
        (
            "The model is quantized already, by torch.ao.",
            "a model in floating point; quantizing it is what passes are for",
            "pass the model as it was before; or what torch.export made of a quantized one (pt2e), which is read",
        ),
    ),
    (
        r"at least two devices|Unhandled FakeTensor Device Propagation",
        (
            "The model's tensors lie on different devices.",
            "all parameters and inputs on the CPU",
            "load the weights, then move model and inputs with .to('cpu')",
        ),
    ),
    (
        r"Unsupported input type|is not a valid JAX|not a known type.*input",
        (
            "The model takes an object that is neither a tensor, a number nor a container of them.",
            "tensors, numbers, strings, None, and lists, tuples, dicts and dataclasses of them",
            "pass the object's tensors, or register its class with torch.utils._pytree.register_pytree_node",
        ),
    ),
)

_SEE = re.compile(
    r"\n+(?:The error above occurred|For more information|For extended logs|consider using).*", re.S
)


def explain(error: Exception, model: nn.Module) -> Error:
    """Return the error that a user should see instead of what torch.export raised."""
    text = str(error)
    where = model_line(error.__traceback__, model)
    violated = re.search(r"Constraints violated \(([^)]*)\)", text)
    if violated:
        return _explain_constraint(text, violated.group(1), where)
    if "dynamic_shapes" in text and "torch.export" in text and where is None:
        return InputError(
            "dynamic_shapes do not fit the inputs.",
            where="dynamic_shapes",
            seen=_first_sentence(text),
            expected="the structure of the inputs, with {axis: Dim} in the place of each tensor",
            next_step="name the arguments as forward does; None stands for an argument without dynamic sizes",
        )
    found = re.search(r"Found <class '([^']+)'> in output", text)
    if found:
        return TraceError(
            f"The model returns a '{found.group(1)}', whose tensors cannot be found.",
            where=where,
            seen=found.group(1),
            expected="tensors, and tuples, lists, dicts, dataclasses or Hugging Face outputs of them",
            next_step="return one of these (a language model: call it with use_cache=False), "
            "or register the class with torch.utils._pytree.register_pytree_node",
        )
    seen = f"{type(error).__name__}: {_first_sentence(text)}"
    for pattern, (what, expected, next_step) in _REASONS:
        if re.search(pattern, text):
            return TraceError(what, where=where, seen=seen, expected=expected, next_step=next_step)
    return TraceError(
        f"{type(model).__name__} cannot be traced.",
        where=where,
        seen=seen,
        next_step="rewrite that line, or compile the part of the model that does not need it",
    )


def model_line(trace: TracebackType | None, model: nn.Module) -> str | None:
    """Return the innermost line of the model's own code in a traceback, with its module path.

    Such as `blocks.1.attention (model.py:41): if scores.max() > 0:`.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    line = path = None
    while trace is not None:
        frame = trace.tb_frame
        path = paths.get(id(frame.f_locals.get("self")), path)
        if _is_model_code(frame):
            file = frame.f_code.co_filename
            code = linecache.getline(file, trace.tb_lineno).strip()
            place = f"{os.path.basename(file)}:{trace.tb_lineno}"
            line = (f"{path} ({place})" if path else place) + (f": {code}" if code else "")
        trace = trace.tb_next
    return line


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's own logs and warnings about tracing back; TORCH_LOGS still shows them.

    What it has to say about an error (half a graph, on stderr), the error says; and that an attribute
    "was assigned during export" is how pruned modules work. What the model itself prints passes through.
    """
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    printed = io.StringIO()
    graph = None
    try:
        with warnings.catch_warnings(), redirect_stderr(printed):
            warnings.filterwarnings("ignore", message=".*assigned during export")
            yield
    except Exception as error:
        graph = getattr(error, "partial_fx_graph", None)
        raise
    finally:
        logging.disable(previous)
        text = printed.getvalue()
        sys.stderr.write(text if graph is None else text.replace(f"{graph}\n", ""))


_LIBRARIES = tuple(
    os.path.join(root, "")
    for root in (sysconfig.get_path("stdlib"), os.path.dirname(os.path.dirname(__file__)))
)


def _is_model_code(frame: FrameType) -> bool:
    """Whether a frame is neither torch's, Python's nor ours; a model class in a package counts."""
    file = frame.f_code.co_filename
    if file.startswith("<") or re.search(r"[/\\]torch[/\\]", file):
        return False
    inside_library = file.startswith(_LIBRARIES) and "site-packages" not in file
    return not inside_library and isinstance(frame.f_locals.get("self"), nn.Module)


class SizeRangeError(InputError):
    """Sizes that a model does not take, of a dimension that may have them.

    Attributes:
        ranges: `min` and `max` that torch.export suggests, as far as it does, by name of the dimension.
    """

    ranges: dict[str, dict[str, int]]


_SUGGESTED = re.compile(r"(\w+) = Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?\)")


def _explain_constraint(text: str, names: str, where: str | None) -> Error:
    details = " ".join(re.findall(r"^\s+- (.*)$", text, re.M))
    fixed = re.search(
        r"marked (.+?) as dynamic but your code specialized it to be a constant \((\d+)\)", details
    )
    if fixed:
        return InputError(
            f"The model fixes the size of dimension '{names}', which dynamic_shapes says is dynamic.",
            where=where or "dynamic_shapes",
            seen=f"always {fixed.group(2)}",
            expected="code that takes any size",
            next_step="leave the dimension out of dynamic_shapes, or remove what fixes it: a layer of that size, "
            "a Python loop over it, a recurrent layer; or another input that shares it and is not declared",
        )
    equal = re.search(r"The values of (\w+) = .* and (\w+) = .* must always be equal", details)
    if equal:
        return InputError(
            f"Two dimensions are always equal: '{equal.group(1)}' and '{equal.group(2)}'.",
            where=where or "dynamic_shapes",
            seen=details.rstrip("."),
            expected="one name for dimensions that are one size",
            next_step=f"write '{equal.group(2)}' in both places",
        )
    suggestion = re.search(r"Suggested fixes:\n((?:[ \t]+.*\n?)+)", text)
    error = SizeRangeError(
        f"The model does not take every size that dynamic_shapes allows for '{names}'.",
        where=where or "dynamic_shapes",
        seen=details.rstrip(".") or _first_sentence(text),
        expected=" ".join(suggestion.group(1).split()) if suggestion else None,
        next_step="give the dimension this range" if suggestion else "narrow the dimension's range",
    )
    found = _SUGGESTED.findall(suggestion.group(1)) if suggestion else []
    error.ranges = {name: {} for name in re.findall(r"\w+", names)} | {
        name: {end: int(size) for end, size in (("min", least), ("max", most)) if size}
        for name, least, most in found
    }
    return error


def _first_sentence(text: str) -> str:
    lines = [line.strip() for line in _SEE.sub("", text).strip().splitlines() if line.strip()]
    return lines[0] if lines else ""
