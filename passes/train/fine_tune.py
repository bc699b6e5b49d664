"""Training with the user's own function, between other passes."""

from __future__ import annotations

from typing import ClassVar

from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.training import Trainable, TrainFunction, check_function, train_program


class FineTune(Pass):
    """Train the program with your own function: any loop, optimizer and loss.

    The function is given an ordinary module: parameters under the model's own names, called as the model is,
    `train()` and `eval()` switching batch norms and dropouts. It trains that module in place. Masked weights
    stay zero, whatever the optimizer does. What it returns (a number, or a table of numbers, such as the last
    loss) is shown in the report. The model that was handed in keeps its weights.

    Train before `FoldBatchNorm` if batch norms should go on learning; folded ones are part of their layer.

    Rewrites: nothing: parameters and running statistics get new values.
    Keeps: interface(): training changes the numbers.
    Rejects: dropout inside attention, which is traced as 0 and stays so.
    Raises: TrainingError if the function raises, changes no parameter, diverges to NaN, returns another
        module, or writes into a mask or another constant.

    Attributes:
        train: The function, or its name: `module.py:function`. It takes the module, and if it has a second
            argument, a `sqcompile.training.Round`.
        freeze_norms: Batch norms keep their running statistics and use them, even in `train()`: for batches that
            are too small to take statistics of, and for the last epochs.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.interface()

    train: TrainFunction | None = None
    freeze_norms: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", check_function(self.train))
        if self.train is None:
            raise self.reject_option("train", "a function of the module to train, or module.py:function")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Hand out a trainable module, and take back what was trained."""
        assert self.train is not None
        module = Trainable(program, freeze_norms=self.freeze_norms)
        changes, figures = train_program(
            program, self.train, seed=context.seed, where=f"pass {self.name}", module=module
        )
        return PassResult(changes, facts=figures)
