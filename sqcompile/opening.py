"""What a caller gives, opened: which inputs a model is traced with, data that lies in files, and the traced program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from sqcompile.calibration import LABELS_HINT, as_call, keep_iterator, reject_empty
from sqcompile.data import Batches, DataFile
from sqcompile.errors import CalibrationError, InputError
from sqcompile.input_spec import example_call, with_dims
from sqcompile.models import folder_dynamic_shapes
from sqcompile.program import Program
from sqcompile.tracing import trace
from sqcompile.tracing.explain import SizeRangeError
from sqcompile.tracing.inputs import Inputs, argument_names, check_call, normalize_inputs


def find_inputs(model: object, example_inputs: Any, calibration: Iterable[Any] | None) -> Inputs | None:
    """Return the inputs to trace with, or None if a call must bring them.

    The order is: what was given, the first calibration batch, `model.dummy_inputs`; for what was
    traced before, random numbers of the right types.
    """
    if example_inputs is not None:
        return normalize_inputs(example_inputs)
    if calibration is not None:
        for batch in calibration:
            args, kwargs = as_call(batch, "calibration batch 0")
            if isinstance(model, nn.Module):
                _check_first_batch(model, args, kwargs)
            return tuple(args), dict(kwargs)
        reject_empty()
    if isinstance(model, ExportedProgram):
        return model.example_inputs or ((), {})
    if isinstance(model, Program):
        return example_call(model.signature) or ((), {})
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, (Mapping, tuple, list, torch.Tensor)):
        return normalize_inputs(dummy)
    return None


def _check_first_batch(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    try:
        check_call(model, args, kwargs)
    except InputError as error:
        labels = not kwargs and len(args) > len(argument_names(model)) > 0
        raise CalibrationError(
            error.what.replace("The example inputs do", "The calibration batches do"),
            where="calibration batch 0",
            seen=error.seen,
            expected=error.expected,
            next_step=LABELS_HINT if labels else error.next_step,
        ) from None


def open_data(calibration: Any, model: object, source: object) -> Any:
    """Open calibration data that lies in a file; return any other data in a form that is read repeatedly.

    Raises:
        FileError: If the file cannot be read.
        CalibrationError: If it does not fit the model, or is no collection of batches.
    """
    if isinstance(calibration, (str, Path)):
        calibration = DataFile(str(calibration))
    if isinstance(calibration, DataFile):
        return calibration.open(model, source if isinstance(source, (str, Path)) else None)
    return None if calibration is None else keep_iterator(calibration)  # read twice: example, and data


def trace_any(
    model: Any, inputs: Inputs, dynamic_shapes: Any, *, source: object = None, data: object = None
) -> Program:
    """Trace a module; take programs and exported programs as they are.

    Args:
        model: The model.
        inputs: Example inputs.
        dynamic_shapes: As `compile` takes it.
        source: What `compile` was given as the model; folders get dynamic shapes by themselves.
        data: Calibration data; with a file's, the batch is dynamic unless the model fixes it.
    """
    if isinstance(model, (Program, ExportedProgram)):
        return trace(model)
    names = [*argument_names(model)[: len(inputs[0])], *inputs[1]]
    if dynamic_shapes is not None:
        return _trace_named(model, inputs, dynamic_shapes, names)
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        return trace(model, inputs, dynamic_shapes=folder_dynamic_shapes(model, inputs))
    if isinstance(data, Batches):
        try:
            return _trace_named(model, inputs, {name: {0: "batch"} for name in names}, names)
        except InputError:
            pass  # the model fixes its batch size, or the inputs are wrong, which is raised below
    return trace(model, inputs)


def _trace_named(model: Any, inputs: Inputs, shapes: Any, names: Sequence[str]) -> Program:
    """Trace with dimensions that may be mere names, whose ranges are then what the model takes.

    A stride, say, asks for images of three pixels or more. A name promises nothing about smaller ones; calls with
    them are refused. `Dim`s have the range that the caller gave them.
    """
    ranges: dict[str, dict[str, int]] = {}
    for least in (2, 3, 4, 8, 16, 32, 64):
        try:
            return trace(model, inputs, dynamic_shapes=with_dims(shapes, names, ranges))
        except SizeRangeError as error:
            if not error.ranges.keys() & _named(shapes):
                raise
            for name, suggested in error.ranges.items():
                ranges[name] = {**ranges.get(name, {}), **(suggested or {"min": least})}
    return trace(model, inputs, dynamic_shapes=with_dims(shapes, names, ranges))


def _named(shapes: Any) -> set[str]:
    """Return the names of dimensions that are given as names."""
    given = (
        shapes.values()
        if isinstance(shapes, Mapping)
        else shapes
        if isinstance(shapes, (list, tuple))
        else ()
    )
    return {
        dim for axes in given if isinstance(axes, Mapping) for dim in axes.values() if isinstance(dim, str)
    }
