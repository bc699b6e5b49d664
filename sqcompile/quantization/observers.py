"""Observers: statistics of the values at one place, from which its quantization range is chosen.

An observer is a value (`Percentile(percentile=99.9)`, text `percentile{percentile=99.9,bins=2048}`);
`start` gives a state that watches one place. A state reads batch after batch and keeps nothing of them:
its size depends on the number of scales or bins, never on the amount of data.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from sqcompile.errors import CalibrationError, PassOptionError, did_you_mean
from sqcompile.quantization import clip
from sqcompile.quantization.affine import block_range, scale_from_range
from sqcompile.quantization.format import Format, PerTensor
from sqcompile.quantization.histogram import Histogram, quantile


@dataclass(frozen=True)
class Observer(ABC):
    """How to choose a range. Subclasses are frozen values that print as text and parse back."""

    word: ClassVar[str]

    def start(self, format: Format | None = None, where: str | None = None) -> ObserverState:
        """Return a state that has seen nothing yet.

        Args:
            format: What the range is for. Its granularity says how many ranges there are; percentiles
                and histograms also read whether it is symmetric, the searches its codes. Default: int8.
            where: The place that is watched, for error texts.

        Raises:
            CalibrationError: The observer does not watch at this format's granularity.
        """
        return self._state(format or Format(), where)

    @abstractmethod
    def _state(self, format: Format, where: str | None) -> ObserverState: ...

    def __str__(self) -> str:
        options = ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        return f"{self.word}{{{options}}}" if options else self.word

    @staticmethod
    def parse(text: str) -> Observer:
        """Return the observer that `text` writes; options left out have their defaults.

        Raises:
            PassOptionError: An unknown observer or option (the nearest valid name is given), or a value
                that is not a number or out of range.
        """
        return _parse(text)


class ObserverState(ABC):
    """What one observer has seen at one place so far.

    Attributes:
        count: Values seen.
        batches: Tensors seen.
    """

    def __init__(self, observer: Observer, format: Format, where: str | None) -> None:
        self.observer = observer
        self.format = format
        self.where = where
        self.count = 0
        self.batches = 0

    def observe(self, x: Tensor) -> None:
        """Take one batch of values into account; nothing changes if it is refused.

        Shapes: x [...], with the same number of scales at every call.

        Raises:
            CalibrationError: x is empty, not floating-point, holds NaN or infinity, or has another
                number of scales than the batches before.
        """
        x = x.detach()
        if not x.is_floating_point():
            raise self.error("an observer watches floating-point values", seen=str(x.dtype))
        if x.numel() == 0:
            raise self.error("an observer was given an empty tensor", seen=f"shape {list(x.shape)}")
        low, high = (bound.float().cpu() for bound in block_range(x, *self.format.granularity.pair))
        if not bool((low.isfinite() & high.isfinite()).all()):
            nans, infinities = int(x.isnan().sum()), int(x.float().isinf().sum())
            raise self.error(
                "an observer saw values that are not finite",
                seen=f"{nans} NaN and {infinities} infinite of {x.numel()} values, batch {self.batches + 1}",
                expected="finite values",
                next_step="check the calibration data, and that the model itself runs without overflow",
            )
        self._update(x, low, high)
        self.count += x.numel()
        self.batches += 1

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the chosen range, low and high.

        Shapes: results as `format.granularity.scale_shape` of the observed tensors, float32.

        Raises:
            CalibrationError: Nothing has been observed.
        """
        if self.count == 0:
            raise self.error(
                "An observer never saw data.",
                seen="0 batches",
                expected="calibrate (or train-quantized) between insert-observers and freeze-observers",
                next_step="put that pass there, with data that reaches this place; or leave it in floating point",
            )
        return self._range()

    def parameters(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point for the chosen range.

        Shapes: as `range`, float32 and int32.

        Raises:
            CalibrationError: Nothing has been observed.
        """
        return scale_from_range(*self.range(), self.format)

    def merge(self, other: ObserverState) -> None:
        """Add what `other` has seen; the result is that of one state that saw both.

        Raises:
            CalibrationError: The other state is of another observer or format, or order matters to this
                kind of observer.
        """
        if (other.observer, other.format) != (self.observer, self.format):
            raise self.error(
                "states of different observers cannot be merged",
                seen=f"{other.observer} for {other.format}",
                expected=f"{self.observer} for {self.format}",
            )
        if other.count == 0:
            return
        self._merge(other)
        self.count += other.count
        self.batches += other.batches

    @abstractmethod
    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Take in x, which is finite and not empty, and whose ranges are low..high."""

    @abstractmethod
    def _range(self) -> tuple[Tensor, Tensor]:
        """Return the range; something has been observed."""

    @abstractmethod
    def _merge(self, other: ObserverState) -> None:
        """Add `other`, which has the same observer and format, and has seen data."""

    def error(
        self, what: str, seen: str, expected: str | None = None, next_step: str | None = None
    ) -> CalibrationError:
        """Return an error that names the place and the observer."""
        place = f"{self.where}, " if self.where else ""
        return CalibrationError(
            what, where=f"{place}observer {self.observer}", seen=seen, expected=expected, next_step=next_step
        )


@dataclass(frozen=True)
class MinMax(Observer):
    """The least and the greatest value seen, for each scale."""

    word: ClassVar[str] = "min-max"

    def _state(self, format: Format, where: str | None) -> ObserverState:
        return _MinMaxState(self, format, where)


@dataclass(frozen=True)
class MovingAverage(Observer):
    """The batches' least and greatest values, averaged with exponentially falling weights.

    Args:
        momentum: Share of the old range that each batch keeps, from 0 to below 1.

    Source: Jacob et al. 2018, section 3.1.
    """

    momentum: float = 0.9
    word: ClassVar[str] = "moving-average"

    def __post_init__(self) -> None:
        _check_option(self, "momentum", 0 <= self.momentum < 1, "0 <= momentum < 1")

    def _state(self, format: Format, where: str | None) -> ObserverState:
        return _MovingAverageState(self, format, where)


@dataclass(frozen=True)
class Percentile(Observer):
    """The range that holds a percentage of the values; exact to one bin of the histogram.

    Symmetric formats take the percentile of the magnitudes; affine formats cut half of the rest off
    either side, as ONNX Runtime does. Per tensor only.

    Args:
        percentile: Percentage of the values to hold, above 50 and up to 100.
        bins: Bins for each sign, a power of two.
    """

    percentile: float = 99.99
    bins: int = 2048
    word: ClassVar[str] = "percentile"

    def __post_init__(self) -> None:
        _check_option(self, "percentile", 50 < self.percentile <= 100, "50 < percentile <= 100")
        _check_bins(self, self.bins)

    def _state(self, format: Format, where: str | None) -> ObserverState:
        return _PercentileState(self, format, where)


@dataclass(frozen=True)
class HistogramMSE(Observer):
    """The range with the least squared quantization error, found on a histogram. Per tensor only.

    Args:
        bins: Bins for each sign, a power of two.
    """

    bins: int = 2048
    word: ClassVar[str] = "histogram-mse"

    def __post_init__(self) -> None:
        _check_bins(self, self.bins)

    def _state(self, format: Format, where: str | None) -> ObserverState:
        return _MSEState(self, format, where)


@dataclass(frozen=True)
class HistogramKL(Observer):
    """The range whose quantized histogram diverges least from the original. Per tensor only.

    Args:
        bins: Bins for each sign, a power of two. The default leaves at least the source's 2048 in use.

    Source: Migacz, "8-bit inference with TensorRT", GTC 2017.
    """

    bins: int = 4096
    word: ClassVar[str] = "histogram-kl"

    def __post_init__(self) -> None:
        _check_bins(self, self.bins)

    def _state(self, format: Format, where: str | None) -> ObserverState:
        return _KLState(self, format, where)


@dataclass(frozen=True)
class Fixed(Observer):
    """A range that is known beforehand, such as that of a sigmoid; data does not move it.

    Args:
        low: Least value.
        high: Greatest value.
    """

    low: float = 0.0
    high: float = 1.0
    word: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        _check_option(self, "low", self.low <= self.high, "low <= high")

    def _state(self, format: Format, where: str | None) -> ObserverState:
        return _FixedState(self, format, where)


class _FixedState(ObserverState):
    def range(self) -> tuple[Tensor, Tensor]:
        return self._range()

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        pass

    def _range(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.observer, Fixed)
        return torch.tensor(self.observer.low), torch.tensor(self.observer.high)

    def _merge(self, other: ObserverState) -> None:
        pass


class _MinMaxState(ObserverState):
    low: Tensor
    high: Tensor

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        if self.count:
            self._check_scales(low)
            low, high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.low, self.high = low, high

    def _check_scales(self, low: Tensor) -> None:
        if low.shape != self.low.shape:
            raise self.error(
                "batches of one observer need the same number of scales",
                seen=f"scales of shape {list(low.shape)} for {self.format}",
                expected=f"{list(self.low.shape)}, as before",
                next_step="observe one scale per tensor where shapes vary",
            )

    def _range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high

    def _merge(self, other: ObserverState) -> None:
        assert isinstance(other, _MinMaxState)
        self._update(other.low, other.low, other.high)


class _MovingAverageState(_MinMaxState):
    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        assert isinstance(self.observer, MovingAverage)
        if self.count:
            self._check_scales(low)
            fresh = 1 - self.observer.momentum
            low, high = self.low.lerp(low, fresh), self.high.lerp(high, fresh)
        self.low, self.high = low, high

    def _merge(self, other: ObserverState) -> None:
        raise self.error(
            "moving averages cannot be merged",
            seen="two states",
            expected="one state that sees all batches in order",
            next_step="calibrate in one process, or use min-max",
        )


class HistogramState(ObserverState):
    """What an observer with a histogram has seen.

    Attributes:
        histogram: Counts of the values.
        low: The least.
        high: The greatest.
    """

    def __init__(
        self, observer: Percentile | HistogramMSE | HistogramKL, format: Format, where: str | None
    ) -> None:
        super().__init__(observer, format, where)
        if not isinstance(format.granularity, PerTensor):
            # A histogram for each channel or group would not be bounded memory in any useful sense.
            raise self.error(
                "a histogram observer watches whole tensors",
                seen=f"format {format}",
                expected="one scale per tensor",
                next_step="use min-max or moving-average for this format",
            )
        self.histogram = Histogram(observer.bins)
        self.low = self.high = 0.0

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self._extend(float(low), float(high))
        self.histogram.add(x, max(-self.low, self.high))

    def _extend(self, low: float, high: float) -> None:
        self.low = min(self.low, low) if self.count else low
        self.high = max(self.high, high) if self.count else high

    def _merge(self, other: ObserverState) -> None:
        assert isinstance(other, HistogramState)
        self._extend(other.low, other.high)
        self.histogram.merge(other.histogram)

    def _range(self) -> tuple[Tensor, Tensor]:
        low, high = self._bounds()
        return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)

    @abstractmethod
    def _bounds(self) -> tuple[float, float]:
        """Return the range as two numbers."""


class _PercentileState(HistogramState):
    def _bounds(self) -> tuple[float, float]:
        assert isinstance(self.observer, Percentile)
        share = self.observer.percentile / 100
        width, bins = self.histogram.width, self.histogram.bins
        if self.format.symmetric:
            bound = min(quantile(self.histogram.magnitudes(), share) * width, max(-self.low, self.high))
            return -bound, bound
        ends = (quantile(self.histogram.counts, at) - bins for at in ((1 - share) / 2, (1 + share) / 2))
        low, high = (min(max(end * width, self.low), self.high) for end in ends)
        return low, high


class _MSEState(HistogramState):
    def _bounds(self) -> tuple[float, float]:
        loss = clip.squared_error(self.histogram, self.format)
        return clip.least_loss(loss, min(self.low, 0.0), max(self.high, 0.0), self.format.symmetric)


class _KLState(HistogramState):
    def _bounds(self) -> tuple[float, float]:
        loss = clip.divergence(self.histogram, self.format)
        return clip.least_loss(loss, min(self.low, 0.0), max(self.high, 0.0), self.format.symmetric)


OBSERVERS: dict[str, type[Observer]] = {
    kind.word: kind for kind in (MinMax, MovingAverage, Percentile, HistogramMSE, HistogramKL, Fixed)
}


def _check_bins(observer: Observer, bins: int) -> None:
    _check_option(observer, "bins", bins >= 16 and bins & (bins - 1) == 0, "a power of two, at least 16")


def _check_option(observer: Observer, name: str, valid: bool, expected: str) -> None:
    if not valid:
        raise PassOptionError(
            f"the option {name!r} of {observer.word} is out of range",
            seen=f"{name}={getattr(observer, name)}",
            expected=expected,
        )


def _parse(text: str) -> Observer:
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\{(.*)\})?\s*", text)
    word = match[1] if match else text
    if match is None or word not in OBSERVERS:
        raise PassOptionError(f"no observer is called {word!r}", next_step=did_you_mean(word, OBSERVERS))
    kind = OBSERVERS[word]
    # Every option has a default, and the default's type is the option's.
    types: dict[str, type] = {field.name: type(field.default) for field in fields(kind)}
    options: dict[str, object] = {}
    for item in filter(None, (match[2] or "").split(",")):
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in types:
            raise PassOptionError(
                f"{word} has no option {name!r}",
                where=f"observer {text!r}",
                next_step=did_you_mean(name, types),
            )
        try:
            options[name] = types[name](value)
        except ValueError:
            raise PassOptionError(
                f"the option {name!r} of {word} is not a number",
                where=f"observer {text!r}",
                seen=value,
                expected=types[name].__name__,
            ) from None
    return kind(**options)
