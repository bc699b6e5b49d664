"""Making the zeros of masks final."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx, nn

from sqcompile.levels import Level
from sqcompile.matching import is_mask, tensor_users
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.pruning import require_finite
from sqcompile.rewrite import Rewriter
from sqcompile.sparsity import Sparsity


class ApplyMasks(Pass):
    """Bake masks into their weights: the zeros are stored, and the masks are gone.

    From then on the program promises the zeros (`Program.sparsity`), and the verifier holds every later
    pass to them. Weights that `torch.nn.utils.prune` calls `weight_orig` are `weight` again.

    Rewrites: layer(x, mask(@weight, @weight_mask))  ==>  layer(x, @weight), with weight · mask stored.
    Keeps: bitwise().
    Rejects: a mask that is computed; a weight that is computed, or that is used without the mask too.
    Raises: InputError for weights that are NaN or infinite, which no mask makes zero.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.bitwise()
    local: ClassVar[bool] = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Apply each mask, in graph order: of masks upon masks the inner one first."""
        edit = Rewriter(program, self.name)
        facts = {}
        for node in [node for node in program.graph.nodes if is_mask(node)]:
            reason = _obstacle(program, node)
            if reason is not None:
                context.remark(node, f"stays a mask: {reason}")
                continue
            name = _apply(edit, node)
            facts[name] = program.sparsity[name].sparsity
        return PassResult(changes=edit.finish(), facts={"sparsity": facts})


def _obstacle(program: Program, node: fx.Node) -> str | None:
    weight, mask = node.args
    if not isinstance(mask, fx.Node) or mask.op != "get_attr":
        return "it is computed, not stored"
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return "what it masks is computed, not stored"
    others = [user for user in tensor_users(program, str(weight.target)) if user is not node]
    return f"%{others[0].name} uses @{weight.target} without it" if others else None


def _apply(edit: Rewriter, node: fx.Node) -> str:
    """Store the masked weight, and return its name."""
    program = edit.program
    weight, mask_node = node.args
    assert isinstance(weight, fx.Node) and isinstance(mask_node, fx.Node)
    stored, mask = program.tensor(weight), program.tensor(mask_node)
    require_finite(stored, f"tensor @{weight.target}")
    value: torch.Tensor = stored.detach().masked_fill(~mask, 0.0)
    name = str(weight.target)
    promise = program.sparsity.pop(name, None)
    if name.endswith("_orig") and not program.has_tensor(name.removesuffix("_orig")):
        name = name.removesuffix("_orig")
        new = edit.constant(
            name, nn.Parameter(value) if isinstance(stored, nn.Parameter) else value, like=weight
        )
    else:
        edit.replace_tensor(weight, value)
        new = weight
    kept = mask if promise is None else mask & promise.mask
    # The promise of whoever made the mask knows its pattern; masks from elsewhere have none.
    known = promise is not None and torch.equal(promise.mask, kept)
    program.sparsity[name] = promise if promise is not None and known else Sparsity(kept)
    edit.replace(node, new)
    edit.erase(node)
    return name
