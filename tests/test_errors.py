"""Errors: four parts, one base class, and names that are near."""

from __future__ import annotations

import copy
import pickle

import pytest

from sqcompile import errors
from sqcompile.errors import Error, InputError, PassContractError, did_you_mean, nearest

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Error)]


class TestText:
    def test_four_parts(self) -> None:
        error = InputError(
            "Input 'x' has the wrong size.",
            where="input 'x'",
            seen=(2, 9),
            expected="[2, 8]",
            next_step="pass size 8",
        )
        assert str(error) == (
            "Input 'x' has the wrong size.\n"
            "  where:    input 'x'\n"
            "  seen:     (2, 9)\n"
            "  expected: [2, 8]\n"
            "  next:     pass size 8"
        )
        assert error.args == ("Input 'x' has the wrong size.",)

    def test_parts_that_are_missing_are_left_out(self) -> None:
        assert str(Error("It failed.")) == "It failed."
        assert str(Error("It failed.", seen=0)) == "It failed.\n  seen:     0"  # zero says something

    def test_parts_that_are_added_later_show(self) -> None:
        error = Error("It failed.")
        error.where = "pass fold-batch-norm"
        assert "pass fold-batch-norm" in str(error)


class TestKinds:
    @pytest.mark.parametrize("kind", KINDS)
    def test_all_derive_from_one_and_are_documented(self, kind: type[Error]) -> None:
        assert issubclass(kind, Exception) and kind.__doc__
        assert kind is Error or "Base" not in str(kind.__doc__)
        assert kind.exit_code in (1, 2)

    @pytest.mark.parametrize("kind", KINDS)
    def test_travel_between_processes(self, kind: type[Error]) -> None:
        error = kind("What.", where="there", seen=[1], expected="two", next_step="count")
        error.where = "pass a; there"
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(twin) is kind and str(twin) == str(error)

    def test_passes_raise_pass_errors(self) -> None:
        assert issubclass(PassContractError, errors.PassError)
        assert not issubclass(InputError, errors.PassError)


class TestNearest:
    NAMES = ("fold-batch-norm", "fold-constants", "mask-weights", "MinMax")

    def test_best_first(self) -> None:
        assert nearest("fold-batchnorm", self.NAMES)[0] == "fold-batch-norm"
        assert nearest("minmax", self.NAMES) == ["MinMax"]  # letter case does not count
        assert nearest("zzz", self.NAMES) == [] == nearest("fold", [])
        assert len(nearest("fold-batch-norm", [f"fold-batch-norm{i}" for i in range(9)], count=2)) == 2

    def test_advice(self) -> None:
        assert did_you_mean("mask-weight", self.NAMES) == "did you mean 'mask-weights'?"
        assert did_you_mean("zzz", self.NAMES) == (
            "valid names: 'MinMax', 'fold-batch-norm', 'fold-constants', 'mask-weights'"
        )
        many = [f"name{i:02}" for i in range(20)]
        assert did_you_mean("zzz", many).endswith("'name11', …")
        assert did_you_mean("zzz", []) == "there is none to choose from"
