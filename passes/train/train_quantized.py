"""Quantization-aware training with the user's own function."""

from __future__ import annotations

from typing import ClassVar

from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.quantization.affine import Search
from sqcompile.quantization.trainable import TrainableQuantized
from sqcompile.training import TrainFunction, check_function, train_program


class TrainQuantized(Pass):
    """Train an observed program as it will be quantized, with scales that learn (LSQ).

    Between `Calibrate` and `FreezeObservers`. Your function is given a module in which every observer rounds to
    the codes of its format; gradients go straight through the rounding where nothing is clipped, and scales of
    weights and values are parameters beside the model's own (`NAME_scale_factor`, near 1). Zero points stay as
    calibrated, and tables of mappings (`int4:mapping=tanh`) as they were fitted before. Masks hold, so that this is
    also the training of sparse quantized models. `FreezeObservers` then takes the learned scales as they are.

    Fold batch norms before the observers are inserted, with trained statistics; what is left of them trains as in
    `FineTune`, or stays as it is in `eval()`. Biases train in floating point, and become int32 when frozen.

    Rewrites: nothing: parameters get new values, and observers learned scales.
    Keeps: interface(): training changes the numbers.
    Rejects: zero points, which stay as calibrated.
    Raises: TrainingError as `FineTune`; CalibrationError if an observer never saw data.
    Source: Esser et al. 2020 (LSQ); Jacob et al. 2018 (straight through).

    Attributes:
        train: The function, or its name: `module.py:function`; as `FineTune` takes it.
        learn_scales: Let scales learn; otherwise they stay as calibrated, and only weights adapt.
        search: How the first scales of weights are chosen: `minmax` covers every weight, `mse` has the least
            squared error.
        freeze_norms: Batch norms that were not folded keep their running statistics and use them, even in
            `train()`, as they will when they are frozen.
    """

    requires = produces = Level.OBSERVED
    keeps: ClassVar[Keeps] = Keeps.interface()

    train: TrainFunction | None = None
    learn_scales: bool = True
    search: Search = "mse"
    freeze_norms: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", check_function(self.train))
        if self.train is None:
            raise self.reject_option("train", "a function of the module to train, or module.py:function")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Hand out the module, and take back weights and scales."""
        assert self.train is not None
        if not program.observers:
            context.remark("program", "has nothing to quantize; fine-tune trains it as it is")
            return PassResult()
        module = TrainableQuantized(
            program, search=self.search, learn_scales=self.learn_scales, freeze_norms=self.freeze_norms
        )
        changes, figures = train_program(
            program, self.train, seed=context.seed, where=f"pass {self.name}", module=module
        )
        states = module.states(program)
        program.observers.update(states)
        return PassResult(changes + len(states), facts=figures)
