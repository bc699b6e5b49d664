"""Pruning: which weights can be masked, and how a mask comes into a program.

Every pass that decides about zeros, by whatever score, starts from `prunable_weights` and ends in
`set_mask`, so that shared weights, earlier masks, groups and promises are understood in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from sqcompile.errors import InputError
from sqcompile.layers import Layer, layers_of, select_layers
from sqcompile.matching import is_mask, tensor_users
from sqcompile.program import Program
from sqcompile.quantization.scheme import HEAD, is_head
from sqcompile.rewrite import Rewriter
from sqcompile.sparsity import Pattern, Sparsity, as_matrix, from_matrix

_HEAD = f"kind:{HEAD}"

RemarkAt = Callable[[fx.Node, str], None]


@dataclass(frozen=True)
class PrunableWeight:
    """A stored weight that may be masked, with every layer that uses it.

    Attributes:
        layers: The layers that use it; one unless the weight is shared.
        tensor: The stored weight, without its mask.
        kept: The mask that is in force, in the weight's shape, or None.
    """

    layers: tuple[Layer, ...]
    tensor: torch.Tensor
    kept: torch.Tensor | None

    @property
    def name(self) -> str:
        """Name of the stored weight."""
        return self.layers[0].weight_name

    @property
    def layer(self) -> Layer:
        """The first layer that uses it, which stands for all in reports."""
        return self.layers[0]

    @property
    def dense(self) -> torch.Tensor:
        """The weight as its layers see it: zero where it is masked."""
        return self.tensor if self.kept is None else self.tensor * self.kept

    @property
    def kept_matrix(self) -> torch.Tensor | None:
        """The mask that is in force as a matrix [O, K], or None."""
        return None if self.kept is None else self.matrix(self.kept)

    def removes(self, mask: torch.Tensor) -> bool:
        """Whether a mask removes anything that is still there."""
        return not bool(mask.all()) if self.kept is None else bool((self.kept & ~mask).any())

    def matrix(self, values: torch.Tensor) -> torch.Tensor:
        """View values of the weight's shape as a matrix [O, K]; see `as_matrix`."""
        return as_matrix(values, self.layer.operator.out_axis, self.layer.operator.in_axis)

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """Give a matrix [O, K] the weight's shape back."""
        entry = self.layer.operator
        return from_matrix(matrix, tuple(self.tensor.shape), entry.out_axis, entry.in_axis)


def choose_layers(
    program: Program,
    include: Sequence[str],
    exclude: Sequence[str],
    kinds: Sequence[str],
    *,
    where: str = "",
) -> list[Layer]:
    """Choose layers to prune, as `select_layers` does, but embeddings only where they are asked for.

    A row of an embedding is all that is known about a token; zeros in it save nothing and cost much. Its
    kind or its exact name asks for it. `kind:head` among the patterns to exclude means the layers that make
    the program's outputs, whatever their names are.

    Raises:
        SelectionError: If a pattern or a kind matches nothing; the nearest names are given.
    """
    patterns = [pattern for pattern in exclude if pattern != _HEAD]
    with_head = _HEAD not in exclude
    chosen = select_layers(layers_of(program), include, patterns, kinds, where=where)
    return [
        layer
        for layer in chosen
        if (layer.kind != "embedding" or "embedding" in kinds or layer.name in include)
        and (with_head or not is_head(layer.node))
    ]


def prunable_weights(
    program: Program, chosen: Sequence[Layer], pattern: Pattern, remark: RemarkAt
) -> list[PrunableWeight]:
    """Return the weights of the chosen layers that can be masked, each once, in graph order.

    Args:
        program: The program.
        chosen: Layers to prune.
        pattern: The pattern that the masks will have.
        remark: Told about each layer that is left as it is, and why.

    Raises:
        InputError: If a weight holds NaN or infinity; the text names the layer.
    """
    users: dict[str, list[Layer]] = {}
    for layer in layers_of(program):
        users.setdefault(layer.weight_name, []).append(layer)
    nodes = {layer.node for layer in chosen}
    found = []
    for name in dict.fromkeys(layer.weight_name for layer in chosen):
        layers = tuple(users[name])
        obstacle = _obstacle(program, layers, nodes, pattern)
        if obstacle is not None:
            for layer in layers:
                if layer.node in nodes:
                    remark(layer.node, f"is not pruned: {obstacle}")
            continue
        tensor = program.tensor(name).detach()
        require_finite(tensor, f"layer '{layers[0].name}', tensor @{name}")
        found.append(PrunableWeight(layers, tensor, _kept(program, layers[0])))
    return found


def set_mask(edit: Rewriter, weight: PrunableWeight, mask: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Mask a weight for all its layers, and promise the zeros.

    What an earlier mask removed stays removed. A mask that removes nothing more changes nothing.

    Args:
        edit: The rewriter.
        weight: The weight.
        mask: True where it is kept, in the weight's shape.
        pattern: The pattern that the mask has.

    Returns:
        The mask that is in force now.
    """
    program = edit.program
    mask = mask if weight.kept is None else mask & weight.kept
    if torch.equal(mask, torch.ones_like(mask) if weight.kept is None else weight.kept):
        return mask
    if not pattern.is_unstructured and not pattern.holds(weight.matrix(mask)):
        pattern = Pattern()  # together with an earlier mask of another pattern there is none
    masked = weight.layer.weight_value
    if is_mask(masked):
        _replace_mask(edit, masked, mask, f"{weight.name}_mask")
    else:
        stored = edit.constant(f"{weight.name}_mask", mask, like=weight.layer.node)
        with edit.before(weight.layer.node):
            node = edit.call(torch.ops.sqcompile.mask.default, masked, stored, like=weight.layer.node)
        for layer in weight.layers:
            assert layer.operator.weight is not None
            edit.set_argument(layer.node, layer.operator.weight, node)
    program.sparsity[weight.name] = Sparsity(mask, pattern)
    return mask


def require_finite(tensor: torch.Tensor, where: str) -> None:
    """Refuse a weight that holds NaN or infinity: neither can be ranked, nor masked to zero.

    Raises:
        InputError: If it does.
    """
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    raise InputError(
        "A weight to prune is not finite.",
        where=where,
        seen=f"{int((~finite).sum())} of {tensor.numel()} weights are NaN or infinite",
        expected="finite weights",
        next_step="mend the model's weights first; their origin is often a diverged training run",
    )


def _obstacle(
    program: Program, layers: tuple[Layer, ...], chosen: set[fx.Node], pattern: Pattern
) -> str | None:
    """Say why a weight that these layers use cannot be masked, or return None."""
    first = layers[0]
    stored = program.tensor(first.weight)
    if not stored.is_floating_point():
        return f"its weight is {stored.dtype}, not floating point"
    others = [layer.name for layer in layers if layer.node not in chosen]
    if others:
        return f"its weight is shared with '{others[0]}', which is not selected"
    if first.weight_name in program.shared:
        return "its weight is shared with another part of the model"
    value = first.weight_value
    masked = value is not first.weight
    if masked and not (is_mask(value) and value.args[0] is first.weight):
        return "what stands between its weight and the layer is more than one mask"
    if masked and not (isinstance(value.args[1], fx.Node) and value.args[1].op == "get_attr"):
        return "its mask is computed, not stored"
    nodes = {layer.node for layer in layers}
    readers = tensor_users(program, first.weight_name)
    strangers = [user for user in readers if user not in ({value} if masked else nodes)]
    strangers += [user for user in value.users if user not in nodes]
    if strangers:
        return f"%{strangers[0].name} uses its weight too"
    if len({(layer.operator.out_axis, layer.operator.in_axis) for layer in layers}) > 1:
        return "the layers that share its weight read it along different axes"
    entry = first.operator
    obstacle = pattern.obstacle(tuple(stored.shape), entry.out_axis, entry.in_axis, first.groups)
    return None if obstacle is None else f"{obstacle}, as the pattern {pattern} needs"


def _kept(program: Program, layer: Layer) -> torch.Tensor | None:
    """Return what earlier pruning keeps of a weight: its mask and its promise together."""
    promise = program.sparsity.get(layer.weight_name)
    kept = None if promise is None else promise.mask
    if is_mask(layer.weight_value):
        node = layer.weight_value.args[1]
        assert isinstance(node, fx.Node)
        mask = program.tensor(node)
        kept = mask if kept is None or torch.equal(kept, mask) else kept & mask
    return kept


def _replace_mask(edit: Rewriter, masked: fx.Node, mask: torch.Tensor, name: str) -> None:
    stored = masked.args[1]
    assert isinstance(stored, fx.Node)
    if len(tensor_users(edit.program, str(stored.target))) == 1:
        edit.replace_tensor(stored, mask)
    else:  # one mask for several weights: from now on this one has its own
        edit.set_argument(masked, 1, edit.constant(name, mask, like=masked))
