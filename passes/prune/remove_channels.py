"""Removing channels of convolutions."""

from __future__ import annotations

from sqcompile.channels.removal import Removal


class RemoveChannels(Removal):
    """Remove channels for good: every tensor that holds them shrinks, and so does every backend's work.

    A channel goes with everything that makes, normalizes or reads it, through residual sums,
    concatenations and views (its *group*; `sqcompile.channels.find_groups` prints all). The program computes
    what it would if the channel were zero wherever it is read. Remove before `FoldBatchNorm`, and train
    afterwards; the program stays trainable.

    Shapes: weights [O, I / groups, …] lose rows and columns, norms their entries; constants in views, splits,
        slices, numbers of groups follow. Inputs and outputs keep their shapes.
    Rewrites: layer(x, @weight) over n channels  ==>  the same over fewer, and all that is tied to it.
    Keeps: interface(): removing channels changes what the model computes.
    Rejects: channels that the model returns or takes, that a layer or group norm takes statistics over, that
        are looked up by number, or that enter an operator which nothing is known about; each with a remark.
    Raises: PassOptionError for options that contradict each other or are out of range, and for a budget that
        cannot be met; SelectionError for patterns that match no layer; ChannelGroupError where nothing of what
        they match can go; CalibrationError where data is needed and there is none.
    Source: Fang et al. 2023 (groups); Li et al. 2017 (norms); He et al. 2017 (least squares).

    Attributes:
        ratio: Fraction of the channels of every group to remove (0 ≤ r < 1), rounded down; with
            `scope=global` or `cost` of all groups together.
        macs: Instead of a ratio: fraction of the multiply-accumulates that may be left.
        parameters: Instead of a ratio: fraction of the parameters that may be left.
        latency: Instead of a ratio: fraction of the time of a call that may be left. Candidates are lowered and
            measured on this machine, on the first calibration batch; the report says predicted and measured time.
        latency_ms: Instead of a ratio: the time that a call may take, in milliseconds.
        backend: Where a latency is measured: `native`, `onnxruntime` or `reference`.
        threads: Threads within an operator when a latency is measured; none: as many as PyTorch uses.
        importance: What channels are ranked by: `l1` or `l2` norm of their weights, `batch-norm` scales,
            `geometric-median`, `activation`, `taylor` and `hessian` (need calibration data), or `random`.
            `hessian` counts that others can take over, and belongs with `compensate`.
        scope: `layer`: every group loses alike; `global`: one ranking for all, so that groups of unimportant
            channels lose more; `cost`: one ranking by what the outputs lose with a channel, per multiply-accumulate
            (with `parameters`, per parameter) that it saves; half of each group is removed by itself and the
            outputs are compared, which needs calibration data.
        round_to: What is left of a group is a multiple of this, as kernels like it.
        layers: Patterns of the layers that make the channels; a group goes by all layers that make it.
        exclude: Patterns of layers to leave as they are, with everything that is tied to them.
        compensate: Refit the layers that read what is removed, by least squares on calibration data.
        compensate_behind: Refit all layers behind those as well, towards what they make in the dense model.
        max_bytes: Memory for the values of all batches at one place of the graph while they are refitted.
        kinds: What to remove: some of `channels`, `neurons`, `heads`, `head-width` (the width of each), and
            `embedding` (the width of an embedding and all that is added to it).
    """

    kinds: tuple[str, ...] = ("channels",)

    def __post_init__(self) -> None:
        self.check_options()
        known = ("channels", "neurons", "heads", "head-width", "embedding")
        if not self.kinds or any(kind not in known for kind in self.kinds):
            raise self.reject_option("kinds", f"some of {', '.join(known)}")

    def kinds_of_units(self) -> tuple[str, ...]:
        """Return the kinds of groups that the pass takes from."""
        return self.kinds
