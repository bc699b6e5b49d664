"""Removing attention heads."""

from __future__ import annotations

from sqcompile.channels.removal import Removal


class RemoveHeads(Removal):
    """Remove attention heads for good: query, key, value and output layers shrink together.

    Where several heads of queries share one of keys and values, whole such sets go; if the model has only
    one, or so few that none can go, heads of queries go from every set alike. Heads that share a bias (T5) go in
    all layers. The program computes what it would if the head's output were zero.

    Shapes: rows of query, key and value weights, columns of the output layer; counts of heads in views follow.
    Rewrites: attention over h heads  ==>  the same over fewer.
    Keeps: interface(): removing heads changes what the model computes.
    Rejects: heads whose number something else depends on; each with a remark.
    Raises: PassOptionError for options that contradict each other or are out of range, and for a budget that
        cannot be met; SelectionError for patterns that match no layer; ChannelGroupError where nothing of what
        they match can go; CalibrationError where data is needed and there is none.
    Source: Michel et al. 2019.

    Attributes:
        ratio: Fraction of the heads of every layer to remove (0 ≤ r < 1), rounded down; with
            `scope=global` or `cost` of all layers together.
        macs: Instead of a ratio: fraction of the multiply-accumulates that may be left.
        parameters: Instead of a ratio: fraction of the parameters that may be left.
        latency: Instead of a ratio: fraction of the measured time of a call that may be left.
        latency_ms: Instead of a ratio: the time that a call may take, in milliseconds.
        backend: Where a latency is measured: `native`, `onnxruntime` or `reference`.
        threads: Threads within an operator when a latency is measured; none: as many as PyTorch uses.
        importance: What heads are ranked by; see `RemoveChannels`.
        scope: `layer`: every layer loses alike, as a Hugging Face configuration needs it; `global`: one
            ranking for all; `cost`: one ranking by what the outputs lose with a head, per multiply-accumulate (with
            `parameters`, per parameter) that it saves, measured on calibration data.
        round_to: What is left of a layer's heads is a multiple of this.
        layers: Patterns of the layers that make queries, keys and values, or of modules around them.
        exclude: Patterns of layers to leave as they are.
        compensate: Refit the output layers by least squares on calibration data.
        compensate_behind: Refit all layers behind those as well, towards what they make in the dense model.
        max_bytes: Memory for the values of all batches at one place of the graph while they are refitted.
    """

    def kinds_of_units(self) -> tuple[str, ...]:
        """Return the kinds of groups that the pass takes from."""
        return ("heads",)
