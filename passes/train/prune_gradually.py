"""Pruning in rounds, with training after each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from sqcompile.checkpoint import Checkpoint, checkpoint_path
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter
from sqcompile.training import Round, TrainFunction, check_function, train_program

Schedule = Literal["cubic", "linear", "one-shot"]


class PruneGradually(Pass):
    """Prune a little, train, prune more, train, …, until the target is reached.

    What is pruned, by which score and how far, says another pass (`mask-weights{sparsity=0.9,scope=global}`,
    `wanda{sparsity=0.5}`); it runs once a round with a part of its sparsity. Between rounds your own function
    trains the program as `FineTune` does, with a new optimizer; masks hold.

    With `work_dir` each round ends in a checkpoint, and a run that was cut off goes on after its last round,
    with the same result bit for bit, if the function is repeatable. Masks and tensors are stored; where the
    pruning pass adds tensors of other kinds, there is none, and a remark says so.

    Rewrites: as the pruning pass; parameters and running statistics get new values.
    Keeps: interface(): pruning and training change the numbers.
    Rejects: checkpoints for passes that do more than mask and replace weights.
    Raises: TrainingError as `FineTune`; FileError if a checkpoint is damaged; whatever the pruning pass raises.
    Source: Zhu & Gupta 2017, section 3 (cubic); Frankle & Carbin 2019 (rewind).

    Attributes:
        train: The function, or its name: `module.py:function`. It takes the module, and if it has a second
            argument, a `sqcompile.training.Round`, which says the round and its sparsity.
        prune: The pass that prunes, with the sparsity to reach at the end.
        rounds: How often to prune and train.
        schedule: `cubic` prunes fast at first and slowly at the end, s = s₁ − (s₁ − s₀)(1 − k/n)³; `linear` the
            same in each round; `one-shot` all in the first round, so that the others only train.
        start: Sparsity s₀ before the first round, as a fraction of the target.
        rewind: After pruning, give what is left its value from before the first round, so that each training
            starts from there (lottery tickets).
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.interface()

    train: TrainFunction | None = None
    prune: Pass | None = None
    rounds: int = 5
    schedule: Schedule = "cubic"
    start: float = 0.0
    rewind: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", check_function(self.train))
        if self.train is None:
            raise self.reject_option("train", "a function of the module to train, or module.py:function")
        if self.rounds < 1:
            raise self.reject_option("rounds", "1 or more")
        if not 0 <= self.start < 1:
            raise self.reject_option("start", "a fraction f of the target, 0 ≤ f < 1")
        sparsity = getattr(self.prune, "sparsity", None)
        if self.prune is None or self.prune.requires is not Level.ATEN:
            raise self.reject_option("prune", "a pass on float programs, such as mask-weights{sparsity=0.9}")
        if self.prune.produces is not Level.ATEN or not isinstance(sparsity, float):
            raise self.reject_option(
                "prune", "a pass with the sparsity to reach, such as mask-weights{sparsity=0.9}"
            )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Go through the rounds, from the last checkpoint on."""
        assert self.prune is not None and self.train is not None
        train = check_function(self.train)
        assert train is not None
        beginning = {name: tensor for name, tensor in program.tensors() if isinstance(tensor, nn.Parameter)}
        path = None
        changes, done, facts = 0, 0, dict[str, Any]()
        if context.work_dir is not None:
            identity = program.fingerprint(content=True), self, train.fingerprint(), context.seed
            path = checkpoint_path(context.work_dir, self.name, *identity)
            if path.exists():
                saved = Checkpoint.load(path)
                changes, done, facts = saved.apply(program, path), saved.rounds, saved.facts
                context.progress.note(f"resuming after round {done} of {self.rounds}: {path}")
        for number in context.progress.track(range(done + 1, self.rounds + 1), "pruning and training"):
            sparsity = self._sparsity(number)
            changes += self._prune(sparsity).run(program, context).changes
            if self.rewind:
                changes += _rewind(program, beginning)
            now = Round(number, self.rounds, sparsity, context.seed + number)
            trained, figures = train_program(
                program,
                train,
                seed=now.seed,
                where=f"pass {self.name}, round {number} of {self.rounds}",
                now=now,
            )
            changes += trained
            facts |= {f"round {number}": {"sparsity": _zeros(program), **figures}}
            if path is not None and not self._save(program, path, number, facts, beginning):
                context.remark("program", f"has no checkpoint: {self.prune.name} adds tensors beside masks")
                path = None
        return PassResult(changes, facts=facts)

    def _fraction(self, number: int) -> float:
        """Return the part of the target that is reached in a round."""
        if self.schedule == "one-shot":
            return 1.0
        left = 1 - number / self.rounds
        return 1 - (1 - self.start) * (left**3 if self.schedule == "cubic" else left)

    def _sparsity(self, number: int) -> float:
        target: float = self.prune.sparsity  # type: ignore[union-attr]
        return target if number == self.rounds else target * self._fraction(number)

    def _prune(self, sparsity: float) -> Pass:
        """Return the pruning pass for a round; fractions for single layers grow in step."""
        item: Any = self.prune
        options: dict[str, Any] = {"sparsity": sparsity}
        if getattr(item, "sparsities", ()):
            part = sparsity / item.sparsity if item.sparsity else 1.0
            options["sparsities"] = tuple((name, value * part) for name, value in item.sparsities)
        changed: Pass = dataclasses.replace(item, **options)
        return changed

    def _save(
        self,
        program: Program,
        path: Path,
        rounds: int,
        facts: dict[str, Any],
        beginning: Mapping[str, Tensor],
    ) -> bool:
        """Write a checkpoint if the state can be brought back from it."""
        parameters = {name for name, tensor in program.tensors() if isinstance(tensor, nn.Parameter)}
        if parameters != set(beginning):
            return False
        Checkpoint.of(program, rounds, facts).save(path)
        return True


def _rewind(program: Program, beginning: Mapping[str, Tensor]) -> int:
    edit = Rewriter(program)
    for node in [node for node in program.graph.nodes if node.op == "get_attr"]:
        if str(node.target) in beginning:
            edit.replace_tensor(node, beginning[str(node.target)])
    edit.finish()
    return edit.changes


def _zeros(program: Program) -> float:
    """Return the fraction of zeros in all pruned weights together."""
    masks = [promise.mask for promise in program.sparsity.values()]
    total = sum(mask.numel() for mask in masks)
    return sum(int((~mask).sum()) for mask in masks) / total if total else 0.0
