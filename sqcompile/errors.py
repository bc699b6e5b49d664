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

    `str(error)` is the text of four parts; the parts are also attributes.

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
    """The model cannot be turned into a program; the text names the model's own line.

    - It branches on the values of a tensor: compute both sides and choose with `torch.where`.
    - It takes a size or an index from the values of a tensor: take it from shapes, or pass it as a number.
    - It writes into its own parameters or buffers: take the tensor as an input and return the new value.
    - It leaves PyTorch (`.numpy()`, `.item()`): use the torch function of the same name.
    - It is in training mode: call `model.eval()`.
    - `module.py:factory` raised: call the factory in Python.
    """


class InputError(Error):
    """A call's inputs do not fit: structure, shape, dtype, or a dimension out of its range.

    - A size is not the traced one: make the dimension dynamic (`dynamic_shapes={"x": {0: "batch"}}`).
    - The inputs are not known: pass `example_inputs`, calibration data, or on the command line `--input`.
    - The model fixes a dimension that was declared dynamic: leave it out of `dynamic_shapes`.
    - A token is negative or beyond the vocabulary: use the model's own tokenizer; pad with a token, not with -1.
    """


class CalibrationError(Error):
    """Calibration data is missing, empty, of the wrong shape or type, or holds NaN or infinity.

    - A pass needs data and there is none: pass `calibration=[batch, …]`, or `--data FILE.npz`.
    - Arrays have other names than the model's inputs: name them alike, or take one with `FILE.npz:name`.
    - The kind of number differs (bytes for floats): prepare the data as in training, then convert it.
    """


class FormatError(Error):
    """A number format or pattern that does not exist, or does not fit the tensor it is asked for.

    - Formats are written `int8`, `uint8:affine`, `int4:group=32`, `int8:token:dynamic`: see
      [quantization](quantization.md).
    - Patterns are written `unstructured`, `2:4` or `1x4`.
    """


class SelectionError(Error):
    """A pattern that selects layers matches none; the nearest names are given.

    - List the layers with `sqcompile inspect MODEL`.
    - A pattern is a layer's name, a module path that the layer lies in, a shell pattern (`layers.*.mlp`),
      or `re:` and a regular expression.
    """


class PassError(Error):
    """A pass failed; the text names it, the passes before it, the node and the dumped graph.

    - A pass of your own: the dumped graph is what it was given; `--debug` shows the traceback.
    - A pass of sqcompile: please report it, with the dumped graph.
    """


class PassOptionError(PassError):
    """A pass was given an option that it does not have, or a value that it cannot take.

    - `sqcompile passes NAME` lists the options of a pass with types and defaults.
    """

    exit_code = 2


class ChannelGroupError(PassError):
    """What was named to shrink cannot: something outside of it depends on its size.

    - The model returns it: leave the layer out, or give it a layer of its own before the output.
    - The code takes positions by number (`x[:, 3]`, `x.view(8, -1)` of a mixed dimension): write sizes from `x.shape`.
    - A norm takes statistics over it: remove neurons or heads inside the block instead.
    - `sqcompile.channels.find_groups(program)` prints every group, and why some cannot shrink.
    """


class PassContractError(PassError):
    """A pass broke its contract: it misreported a change, wrote into a tensor, or returned the wrong thing.

    - It reports changes and made none, or the reverse: return the number from `Rewriter.finish()`.
    - It wrote into a tensor: make a new one and call `Rewriter.replace_tensor`.
    - It has no `PassResult`: return one from `run`, also where nothing changed.
    """


class LevelError(PassError):
    """A pass needs another level than the program's, or two passes conflict in their order.

    - Passes on float programs come before quantization.
    - `insert-observers`, `calibrate`, `freeze-observers` belong together, in this order.
    """


class VerifyError(PassError):
    """A program breaks an invariant: structure, shapes, level, quantization or sparsity.

    - After a pass of your own: insert nodes with `Rewriter.call`, which records shapes and types.
    - A scale is not finite and positive: look for NaN, infinity and constant channels in weights and data.
    - A pruned weight has nonzeros again: prune after the pass, or multiply with the mask again.
    """


class NumericError(PassError):
    """The numbers moved further than a pass promised, or turned NaN or infinite.

    - The text names the first layer where both programs part: leave it out of the pass (`exclude`).
    - A pass of your own may promise less: `keeps = Keeps.close(rtol=…)`, or `Keeps.interface()`.
    """


class TrainingError(Error):
    """The user's training function did not do what training is: it changed nothing, or diverged.

    - It trained another object than the module that it was given: give that module's parameters to the optimizer.
    - Weights turned NaN or infinite: lower the learning rate, or clip gradients.
    - It raised: the text names its line; call it with a `Trainable` of your own to debug it.
    - It wrote into a mask or another constant: only parameters and running statistics train.
    """


class UnsupportedError(Error):
    """A backend cannot run the program; every unsupported node is listed at once.

    - Use another backend (`backend="reference"` runs everything), or compile a part of the model.
    """


class BackendError(Error):
    """A backend failed while it lowered, loaded or ran a program, or is not installed.

    - Compile with `backend="reference"` to see whether the program itself is right.
    """


class PretrainedError(Error):
    """A program cannot be saved as a Hugging Face folder, because its class cannot make layers like these.

    - Layers have not lost alike: remove with `scope=layer`, from all layers; the text names one that differs.
    - The class derives the width of heads from their number: remove neurons or whole layers instead.
    - Save a `.pt2` file, which holds any program and trains further.
    """


class FileError(Error):
    """A file cannot be read or written; nothing is left half-written.

    - Files of similar names in the same folder are offered.
    - A full disk or a read-only folder leaves the old file as it was.
    """


class MemoryLimitError(Error):
    """A part of the model does not fit into the memory that was allowed; the text says how much it would take.

    - Raise `max_memory`: with the same `work_dir`, parts that are done stay done.
    - Calibrate with smaller batches: a batch passes through a part as a whole.
    """


class ClusterError(Error):
    """The cluster that was to do the work is not there, or has lost it.

    - Ray is not installed: `pip install "sqcompile[ray]"`.
    - Nobody answers at the address: `ray status` on the head node says whether it runs, and with which port.
    - Versions differ from machine to machine: results would, too.
    - Leave the address out: everything is done in this process.
    """


class RecipeError(Error):
    """A recipe, a pipeline's text or a command line is wrong; line and nearest valid name are given.

    - [Recipes](recipes.md) lists the keys; `sqcompile passes` lists the passes.
    - On a command line, put texts with braces or brackets into quotes.
    """

    exit_code = 2


def nearest(name: str, candidates: Iterable[str], count: int = 3, cutoff: float = 0.4) -> list[str]:
    """Return up to `count` of `candidates` that look most like `name`, best first.

    Args:
        name: What was given.
        candidates: What there is.
        count: The most to return.
        cutoff: How alike they have to be, from 0 (anything) to 1 (the same), as `difflib` has it.
    """
    pool = list(dict.fromkeys(candidates))
    folded = {candidate.lower(): candidate for candidate in pool}
    found = difflib.get_close_matches(name.lower(), list(folded), n=count, cutoff=cutoff)
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
