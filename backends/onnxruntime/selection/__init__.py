"""Program -> program of ATen operators and `torch.ops.sqcompile_ort`: which ONNX Runtime form each layer takes.

The steps, in order; each is a file, and each leaves a program that runs in PyTorch with the same results
(MatMulNBits excepted, which rounds activations that the program leaves in float):

    spell_out         masks, fake quantization
    unsign            activations become uint8
    clamps            ReLU and clips move behind quantization
    linears           Gemm, MatMul, MatMulInteger, MatMulNBits
    convolutions      signed weights, int32 biases
    embeddings        codes are fetched, then dequantized
    primitives        every other quantize, dequantize and dynamic scale
    attention, norms  as PyTorch computes them, and as the runtime fuses them
    shapes            views and pooling as exporter and runtime like them
"""

from __future__ import annotations

from sqcompile.backends.onnxruntime import operators  # noqa: F401  registers torch.ops.sqcompile_ort
from sqcompile.backends.onnxruntime.selection.attention import select_attention
from sqcompile.backends.onnxruntime.selection.clamps import fold_clamps
from sqcompile.backends.onnxruntime.selection.context import Context
from sqcompile.backends.onnxruntime.selection.convolutions import select_convolutions
from sqcompile.backends.onnxruntime.selection.embeddings import select_embeddings
from sqcompile.backends.onnxruntime.selection.linears import select_linears
from sqcompile.backends.onnxruntime.selection.norms import select_norms
from sqcompile.backends.onnxruntime.selection.primitives import lower_primitives
from sqcompile.backends.onnxruntime.selection.shapes import make_views_safe, pad_values, select_pooling
from sqcompile.backends.onnxruntime.selection.spell_out import spell_out
from sqcompile.backends.onnxruntime.selection.unsign import make_unsigned
from sqcompile.program import Program

_STEPS = (
    spell_out,
    make_unsigned,
    fold_clamps,
    pad_values,
    select_linears,
    select_convolutions,
    select_embeddings,
    lower_primitives,
    select_attention,
    select_norms,
    select_pooling,
    make_views_safe,
)


def select(program: Program) -> tuple[Program, list[str]]:
    """Return the program in ONNX Runtime's forms, and notes on the choices; `program` stays as it is."""
    context = Context(program.snapshot())
    for step in _STEPS:
        step(context)
    context.edit.finish()
    return context.program, context.notes
