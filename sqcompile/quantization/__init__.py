"""What quantization means: formats, the arithmetic of scales and codes, and observers."""

from sqcompile.quantization.affine import (
    dequantize,
    fake_quantize,
    least_weight_scale,
    quantize,
    quantize_bias,
    scale_for_tensor,
    scale_from_range,
)
from sqcompile.quantization.format import (
    Format,
    Granularity,
    Linear,
    Mapping,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
)
from sqcompile.quantization.observers import (
    Fixed,
    HistogramKL,
    HistogramMSE,
    MinMax,
    MovingAverage,
    Observer,
    ObserverState,
    Percentile,
)

__all__ = [
    "Fixed",
    "Format",
    "Granularity",
    "HistogramKL",
    "HistogramMSE",
    "Linear",
    "Mapping",
    "MinMax",
    "MovingAverage",
    "Observer",
    "ObserverState",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Percentile",
    "dequantize",
    "fake_quantize",
    "least_weight_scale",
    "quantize",
    "quantize_bias",
    "scale_for_tensor",
    "scale_from_range",
]
