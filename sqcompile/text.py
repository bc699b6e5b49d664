"""The text of a program, made to be read and to be compared exactly in tests.

    program (level aten)
      input  %x: f32[batch, 3, 8, 8]
      tensor @conv.weight: f32[4, 3, 3, 3]
      %conv2d: f32[batch, 4, 6, 6] = conv2d(%x, @conv.weight)
      return logits=%conv2d

`%` marks values and `@` tensors; arguments that equal the operator's default are left out; operators
of ATen and of `torch.ops.sqcompile` are named without their namespace.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sqcompile.signature import describe_type

if TYPE_CHECKING:
    from sqcompile.program import Program

_MISSING = object()


def program_text(program: Program, *, source: bool = False) -> str:
    """Return the canonical text.

    Args:
        program: The program.
        source: Add module path and source line behind each operator.
    """
    names = symbol_names(program)
    lines = [f"program (level {program.level})"]
    for node in program.placeholders:
        lines.append(f"  input  %{node.name}: {_type(node.meta.get('val'), names)}")
    for name, tensor in program.tensors():
        lines.append(f"  tensor @{name}: {describe_type(tensor.dtype, tuple(tensor.shape))}")
    for node in program.compute_nodes():
        place = f"  # {locate(node)}" if source and (module_path(node) or source_line(node)) else ""
        lines.append(f"  {node_text(node, names)}{place}")
    results = zip(program.signature.outputs, program.output.args[0], strict=True)  # type: ignore[arg-type]
    lines.append("  return " + ", ".join(f"{value.name}={_argument(item)}" for value, item in results))
    return "\n".join(lines)


def program_diff(before: Program, after: Program, *, context: int = 2) -> str:
    """Return the difference of two programs' texts as a unified diff; empty when they are equal."""
    return text_diff(program_text(before), program_text(after), context=context)


def text_diff(
    before: str, after: str, *, context: int = 2, names: tuple[str, str] = ("before", "after")
) -> str:
    """Return a unified diff of two texts."""
    return "\n".join(
        difflib.unified_diff(before.splitlines(), after.splitlines(), *names, n=context, lineterm="")
    )


def node_text(node: fx.Node, names: dict[str, str] | None = None) -> str:
    """Return one operator as `%name: type = operator(arguments)`."""
    return f"%{node.name}: {_type(node.meta.get('val'), names or {})} = {operator_name(node)}({_arguments(node)})"


def operator_name(node: fx.Node) -> str:
    """Return the short name of a node's operator: `conv2d`, `add`, `mean.dim`, `quantize`."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
        overload = target._overloadname
        return name if overload in ("default", "Tensor") else f"{name}.{overload}"
    if node.op in ("placeholder", "get_attr", "output"):
        return {"placeholder": "input", "get_attr": "tensor", "output": "return"}[node.op]
    return getattr(target, "__name__", str(target))


def symbol_names(program: Program) -> dict[str, str]:
    """Map the tracer's symbols (`s77`) to the signature's dimension names (`batch`)."""
    names: dict[str, str] = {}
    for node, value in zip(program.placeholders, program.signature.inputs, strict=False):
        fake = node.meta.get("val")
        if isinstance(fake, torch.Tensor) and value.shape is not None:
            for size, name in zip(fake.shape, value.shape, strict=False):
                if not isinstance(size, int) and isinstance(name, str):
                    names.setdefault(str(size), name)
    return names


def rename_symbols(size: Any, names: dict[str, str]) -> str:
    """Return a size as text, with the tracer's symbols replaced by dimension names."""
    if not names:
        return str(size)
    return re.sub(r"\b[su]\d+\b", lambda match: names.get(match.group(), match.group()), str(size))


def locate(node: fx.Node) -> str:
    """Return where a node comes from: `node %conv2d (layer1.0.conv1, model.py:41)`."""
    inner = ", ".join(part for part in (module_path(node), source_line(node)) if part)
    return f"node %{node.name}" + (f" ({inner})" if inner else "")


def module_path(node: fx.Node) -> str:
    """Return the path of the module that the node was traced in, such as `layer1.0.conv1`."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for name, _ in stack.values():
        path = str(name)
    # Exported programs of exported programs repeat the root as "L['self']." and similar.
    return re.sub(r"^L\['self'\]\.?", "", path)


def source_line(node: fx.Node) -> str:
    """Return the model's own line that made the node, as `file.py:41`, or an empty text."""
    frame = source_frame(node.meta.get("stack_trace") or "")
    return "" if frame is None else f"{frame[0].rsplit('/', 1)[-1]}:{frame[1]}"


def source_frame(stack: str) -> tuple[str, int, str] | None:
    """Return (file, line, code) of the innermost frame outside torch, or of the innermost one."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n?([^\n]*)', stack)
    if not frames:
        return None
    own = [frame for frame in frames if not re.search(r"[/\\]torch[/\\]", frame[0])]
    file, line, code = (own or frames)[-1]
    return file, int(line), code.strip()


def _arguments(node: fx.Node) -> str:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        shown = [_argument(argument) for argument in node.args]
        shown += [f"{name}={_argument(value)}" for name, value in node.kwargs.items()]
        return ", ".join(shown)
    shown = []
    positional = True
    for index, parameter in enumerate(target._schema.arguments):
        value: Any = _MISSING
        if index < len(node.args):
            value = node.args[index]
        elif parameter.name in node.kwargs:
            value = node.kwargs[parameter.name]
        # Our own operators take None for "no axis" and "no groups", which says nothing.
        silent = value is None and target.namespace == "sqcompile"
        if value is _MISSING or silent or _is_default(parameter, value):
            positional = False
            continue
        if positional and _holds_node(value):
            shown.append(_argument(value))
        else:
            positional = False
            shown.append(f"{parameter.name}={_argument(value)}")
    return ", ".join(shown)


def _is_default(parameter: Any, value: Any) -> bool:
    if _holds_node(value) or not parameter.has_default_value():
        return False
    default = parameter.default_value
    if isinstance(value, (list, tuple)):
        # A stride may be written [1, 1], [1] or 1.
        defaults = default if isinstance(default, (list, tuple)) else [default]
        return list(value) == list(defaults) or (
            len(value) > 0 and all(v == d for v in value for d in defaults)
        )
    return bool(default == value and type(default) is type(value))


def _holds_node(value: Any) -> bool:
    if isinstance(value, fx.Node):
        return True
    return isinstance(value, (list, tuple)) and any(_holds_node(item) for item in value)


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument(item) for item in value) + "]"
    if isinstance(value, torch.dtype):
        return describe_type(value, None).removesuffix("[]")
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool) and value == 2**63 - 1:
        return "end"
    return repr(value) if isinstance(value, str) else str(value)


def _type(value: Any, names: dict[str, str]) -> str:
    if isinstance(value, torch.Tensor):
        return describe_type(value.dtype, [rename_symbols(size, names) for size in value.shape])
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_type(item, names) for item in value) + ")"
    if isinstance(value, (bool, torch.SymBool)):
        return "bool"
    if isinstance(value, (int, torch.SymInt)):
        return "int"
    if isinstance(value, (float, torch.SymFloat)):
        return "float"
    return "none"
