"""Removing neurons of linear and recurrent layers."""

from __future__ import annotations

from sqcompile.channels.removal import Removal


class RemoveNeurons(Removal):
    """Remove hidden neurons for good: of feed-forward blocks, gated or not, classifiers, LSTMs and GRUs.

    A neuron goes with every weight that makes or reads it: in gated blocks its gate, its value and its column of
    the layer behind. All layers and directions of one recurrent operator lose the same units. The width
    of the residual stream is no neuron; see `RemoveChannels(kinds=["embedding"])`.

    Shapes: rows of the layers before, columns of the layers behind.
    Rewrites: linear(act(linear(x, @w1)), @w2) over n neurons  ==>  the same over fewer.
    Keeps: interface(): removing neurons changes what the model computes.
    Rejects: neurons that the model returns, or that a norm takes statistics over; each with a remark.
    Raises: PassOptionError for options that contradict each other or are out of range, and for a budget that
        cannot be met; SelectionError for patterns that match no layer; ChannelGroupError where nothing of what
        they match can go; CalibrationError where data is needed and there is none.
    Source: He et al. 2017 (least squares); Ma et al. 2023 (gated blocks).

    Attributes:
        ratio: Fraction of the neurons of every group to remove (0 ≤ r < 1), rounded down; with
            `scope=global` or `cost` of all groups together.
        macs: Instead of a ratio: fraction of the multiply-accumulates that may be left.
        parameters: Instead of a ratio: fraction of the parameters that may be left.
        latency: Instead of a ratio: fraction of the measured time of a call that may be left.
        latency_ms: Instead of a ratio: the time that a call may take, in milliseconds.
        backend: Where a latency is measured: `native`, `onnxruntime` or `reference`.
        threads: Threads within an operator when a latency is measured; none: as many as PyTorch uses.
        importance: What neurons are ranked by; see `RemoveChannels`.
        scope: `layer`: every layer loses alike, as a Hugging Face configuration needs it; `global`: one
            ranking for all; `cost`: one ranking by what the outputs lose with a neuron, per multiply-accumulate (with
            `parameters`, per parameter) that it saves, measured on calibration data.
        round_to: What is left of a group is a multiple of this.
        layers: Patterns of the layers that make the neurons.
        exclude: Patterns of layers to leave as they are, with everything that is tied to them.
        compensate: Refit the layers behind by least squares on calibration data.
        compensate_behind: Refit all layers behind those as well, towards what they make in the dense model.
        max_bytes: Memory for the values of all batches at one place of the graph while they are refitted.
    """

    def kinds_of_units(self) -> tuple[str, ...]:
        """Return the kinds of groups that the pass takes from."""
        return ("neurons",)
