"""The contract of a pass: options, names, the registry, and what it can promise to keep."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

from sqcompile.errors import PassContractError, PassOptionError, RecipeError
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult, contract, registry
from sqcompile.pipeline.contract import option_fields, text_name
from sqcompile.pipeline.text import find_pass
from sqcompile.program import Program


class Probe(Pass, register=False):
    """Does nothing, in several ways."""

    ratio: float = 0.5
    layers: tuple[str, ...] = ()
    limit: ClassVar[int] = 3

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult()


class TestOptions:
    def test_every_pass_is_a_frozen_value(self) -> None:
        item = Probe(ratio=0.25)
        assert item == Probe(ratio=0.25) != Probe() and hash(item) == hash(Probe(ratio=0.25))
        with pytest.raises(dataclasses.FrozenInstanceError):
            item.ratio = 0.75  # type: ignore[misc]
        with pytest.raises(TypeError):
            Probe(0.25)  # type: ignore[misc]
        with pytest.raises(TypeError, match="unexpected keyword"):
            Probe(ration=0.25)  # type: ignore[call-arg]

    def test_subclasses_add_options(self) -> None:
        class More(Probe):
            deep: bool = False

        assert [field.name for field in option_fields(More)] == ["ratio", "layers", "deep"]
        assert str(More(deep=True, ratio=0.25)) == "more{ratio=0.25,deep=true}"

    def test_an_option_without_annotation_is_refused(self) -> None:
        with pytest.raises(PassContractError, match="'amount' of the pass Forgetful has no type") as caught:

            class Forgetful(Pass):
                amount = 0.5

                def run(self, program: Program, context: PassContext) -> PassResult:
                    return PassResult()

        assert "Forgetful" in str(caught.value.where) and caught.value.expected == "amount: float = …"

    def test_overriding_an_option_without_annotation_is_refused(self) -> None:
        # Python would keep 0.5 as the default, and show 0.75 on the class.
        with pytest.raises(PassContractError, match="'ratio'"):

            class Stronger(Probe):
                ratio = 0.75

    def test_what_is_no_option_needs_no_annotation(self) -> None:
        class Fine(Pass):
            requires = produces = Level.QDQ
            keeps = Keeps.bitwise()
            name = "another-name"
            _hidden = 3

            def run(self, program: Program, context: PassContext) -> PassResult:
                return PassResult()

            @property
            def size(self) -> int:
                return 1

            @staticmethod
            def helper() -> int:
                return 1

        assert str(Fine()) == "another-name" and option_fields(Fine) == ()

    def test_out_of_range(self) -> None:
        error = Probe(ratio=2.0).reject_option("ratio", "0 to 1")
        assert isinstance(error, PassOptionError)
        assert error.seen == "ratio=2.0" and error.expected == "0 to 1" and error.where == "pass probe"
        assert "sqcompile passes probe" in str(error.next_step)

    @pytest.mark.parametrize(
        "default", [[], {}, set(), torch.zeros(2)], ids=["list", "dict", "set", "tensor"]
    )
    def test_mutable_defaults_are_refused(self, default: object) -> None:
        with pytest.raises(PassContractError, match="default of the option 'layers' of Mutable") as caught:

            class Mutable(Pass):
                layers: Any = default

                def run(self, program: Program, context: PassContext) -> PassResult:
                    return PassResult()

        assert "tuple" in str(caught.value.next_step)

    @pytest.mark.parametrize(
        "hint",
        [list[int], dict[str, float] | None, tuple[list[str], ...], torch.Tensor],
        ids=["list", "optional", "nested", "tensor"],
    )
    def test_types_that_can_be_written_into_are_refused(self, hint: object) -> None:
        """No text would read back as such a value, and a list that is given would be refused as no list."""
        body = {"__annotations__": {"layers": hint}, "layers": None, "run": Probe.run}
        body |= {"__module__": __name__, "__qualname__": "f.<locals>.Wrong"}
        with pytest.raises(PassContractError, match="option 'layers' of Wrong is of a type") as caught:
            types.new_class("Wrong", (Pass,), exec_body=lambda namespace: namespace.update(body))
        assert "tuple[int, ...]" in str(caught.value.next_step)

    def test_an_init_of_its_own_is_refused(self) -> None:
        with pytest.raises(PassContractError, match="Built has an __init__ of its own") as caught:

            class Built(Pass):
                def __init__(self, ratio: float) -> None: ...

                def run(self, program: Program, context: PassContext) -> PassResult:
                    return PassResult()

        assert "ratio: float" in str(caught.value.expected)

    @pytest.mark.parametrize("frozen", [True, False])
    def test_a_decorator_all_the_same_does_no_harm(self, frozen: bool) -> None:
        @dataclasses.dataclass(frozen=frozen)
        class Decorated(Pass):
            ratio: float = 0.5

            def run(self, program: Program, context: PassContext) -> PassResult:
                return PassResult()

        item = Decorated(ratio=0.25)
        assert str(item) == "decorated{ratio=0.25}"
        assert item == Decorated(ratio=0.25) != Decorated() and hash(item) == hash(Decorated(ratio=0.25))
        with pytest.raises(dataclasses.FrozenInstanceError):
            item.ratio = 0.75  # type: ignore[misc]
        with pytest.raises(dataclasses.FrozenInstanceError):
            del item.ratio

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("requires", "aten"),
            ("produces", "qdq"),
            ("keeps", "bitwise"),
            ("keeps", Keeps.bitwise),
            ("changes_interface", "no"),
            ("name", "replace silu"),
            ("name", "replace_silu"),
        ],
        ids=["requires", "produces", "keeps", "uncalled", "changes", "spaced", "underscored"],
    )
    def test_class_variables_of_another_type_are_refused(self, name: str, value: object) -> None:
        """They would fail far away: a level that is a text equals no level, and prints as one."""
        body = {name: value, "run": Probe.run, "__module__": __name__, "__qualname__": "f.<locals>.Wrong"}
        with pytest.raises(PassContractError, match=f"'{name}' of the pass Wrong is not what"):
            types.new_class("Wrong", (Pass,), exec_body=lambda namespace: namespace.update(body))

    def test_annotated_class_variables_are_no_options(self) -> None:
        class Typed(Pass):
            name: str = "well-typed"
            requires: Level = Level.QDQ
            keeps: Keeps = Keeps.bitwise()
            ratio: float = 0.5

            def run(self, program: Program, context: PassContext) -> PassResult:
                return PassResult()

        assert [field.name for field in option_fields(Typed)] == ["ratio"]
        assert str(Typed()) == "well-typed" and Typed.requires is Level.QDQ

    def test_an_error_that_is_returned_and_not_raised(self) -> None:
        class Quiet(Pass):
            ratio: float = 0.5

            def __post_init__(self) -> PassOptionError | None:
                return self.reject_option("ratio", "0 to 1") if self.ratio > 1 else None

            def run(self, program: Program, context: PassContext) -> PassResult:
                return PassResult()

        with pytest.raises(PassOptionError, match="'ratio' of quiet"):
            Quiet(ratio=2.0)
        assert Quiet(ratio=0.75).ratio == 0.75


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("FoldBatchNorm", "fold-batch-norm"),
        ("FoldQDQ", "fold-qdq"),
        ("QDQFold", "qdq-fold"),
        ("My_Pass", "my-pass"),
        ("GPTQ", "gptq"),
        ("MaskWeights2x4", "mask-weights2x4"),
        ("Wanda", "wanda"),
    ],
)
def test_text_names(name: str, text: str) -> None:
    assert text_name(name) == text


@pytest.fixture
def empty_registry() -> Iterator[dict[str, type[Pass]]]:
    """The registry, put back afterwards."""
    saved = registry()  # with our own passes, which register once a process
    yield contract._REGISTRY
    contract._REGISTRY.clear()
    contract._REGISTRY.update(saved)


SOURCE = """
from sqcompile.pipeline import Pass, PassResult

class {name}(Pass{arguments}):
    version: int = {version}

    def run(self, program, context):
        return PassResult()
"""


def define(
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    name: str,
    version: int = 1,
    arguments: str = "",
    file: Any = None,
) -> type[Pass]:
    """Define a pass at the top of a module, as importing its file would."""
    if module != "__main__":
        made = types.ModuleType(module)
        made.__file__ = file
        monkeypatch.setitem(sys.modules, module, made)
    namespace: dict[str, Any] = {"__name__": module}
    exec(SOURCE.format(name=name, version=version, arguments=arguments), namespace)
    kind: type[Pass] = namespace[name]
    return kind


@pytest.mark.usefixtures("empty_registry")
class TestRegistry:
    def test_passes_of_users_are_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kind = define(monkeypatch, "their_module", "TheirOwnPass")
        assert registry()["their-own-pass"] is kind and find_pass("their_own_pass") is kind
        assert Pass.parse("their-own-pass{version=2}") == kind(version=2)  # type: ignore[call-arg]

    def test_a_class_defined_again_takes_the_old_ones_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("a_notebook", "__main__"):
            define(monkeypatch, module, "TriedAgain", 1)
            new = define(monkeypatch, module, "TriedAgain", 2)
            assert find_pass("tried-again") is new

    def test_a_script_that_is_imported_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        define(monkeypatch, "__main__", "FromScript", 1)
        new = define(monkeypatch, "script", "FromScript", 2)
        assert find_pass("from-script") is new

    def test_one_file_under_two_module_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        define(monkeypatch, "package.passes_of_mine", "Twice", 1, file="/home/passes_of_mine.py")
        new = define(monkeypatch, "passes_of_mine", "Twice", 2, file="/home/passes_of_mine.py")
        assert find_pass("twice") is new

    def test_two_passes_of_one_name_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        old = define(monkeypatch, "first_module", "SameName", file="/first.py")
        with pytest.raises(PassContractError, match="two passes called 'same-name'") as caught:
            define(monkeypatch, "second_module", "SameName", file="/second.py")
        error = caught.value
        assert "second_module.SameName" in str(error.where) and "first_module.SameName" in str(error.seen)
        assert error.expected and error.next_step
        assert find_pass("same-name") is old

    def test_nobody_takes_the_name_of_a_pass_of_ours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        name = next(iter(registry().values())).__name__
        with pytest.raises(PassContractError, match="two passes"):
            define(monkeypatch, "their_module", name)

    def test_private_passes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        define(monkeypatch, "their_module", "Private", arguments=", register=False")

        class Inside(Probe):
            pass

        class Inside2(Probe):
            name = "inside"  # no clash: passes in functions are not known by name

        for name in ("private", "inside", "probe"):
            with pytest.raises(RecipeError):
                find_pass(name)

    def test_unfinished_passes_are_not_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        namespace: dict[str, Any] = {"__name__": __name__, "Pass": Pass}
        exec("class Unfinished(Pass):\n    ratio: float = 0.5\n", namespace)
        assert "unfinished" not in registry()
        with pytest.raises(TypeError, match="abstract"):
            namespace["Unfinished"]()


class TestKeeps:
    x = torch.tensor([1.0, -2.0, 0.0, 127.0])

    @pytest.mark.parametrize(
        "keeps", [Keeps.bitwise(), Keeps.close(rtol=0.0), Keeps.steps(0), Keeps.interface()]
    )
    def test_equal_outputs_are_always_allowed(self, keeps: Keeps) -> None:
        special = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
        for value in (self.x, special, torch.tensor([1, 2]), torch.tensor([True]), torch.empty(0)):
            assert keeps.allows(value, value.clone())

    @pytest.mark.parametrize(
        "keeps", [Keeps.bitwise(), Keeps.close(rtol=9.9), Keeps.steps(99), Keeps.interface()]
    )
    def test_another_type_or_shape_never_is(self, keeps: Keeps) -> None:
        assert not keeps.allows(self.x, self.x.double())
        assert not keeps.allows(self.x, self.x.reshape(2, 2))
        assert not keeps.allows(torch.empty(0, 1), torch.empty(0, 2))

    def test_bitwise(self) -> None:
        moved = self.x.clone()
        moved[1] = torch.nextafter(moved[1], torch.tensor(0.0))
        assert not Keeps.bitwise().allows(self.x, moved)
        assert Keeps.bitwise().allows(torch.tensor([0.0]), torch.tensor([-0.0]))
        assert not Keeps.bitwise().allows(torch.tensor([True, False]), torch.tensor([True, True]))

    def test_close_is_relative_to_the_largest_output(self) -> None:
        keeps = Keeps.close(rtol=0.01, atol=0.5)  # 0.01 · 127 + 0.5 = 1.77
        assert keeps.allows(self.x, self.x + 1.76) and not keeps.allows(self.x, self.x - 1.78)

    def test_steps_are_those_of_eight_bits(self) -> None:
        keeps = Keeps.steps(2)  # the largest output is 127, so that a step is 1
        assert keeps.allows(self.x, self.x + 2) and not keeps.allows(self.x, self.x + 2.01)

    @pytest.mark.parametrize("keeps", [Keeps.bitwise(), Keeps.close(rtol=0.01), Keeps.steps(1)])
    def test_integers_are_equal_or_wrong(self, keeps: Keeps) -> None:
        assert not keeps.allows(torch.tensor([1000, 2]), torch.tensor([1001, 2]))

    @pytest.mark.parametrize("keeps", [Keeps.bitwise(), Keeps.close(rtol=0.01), Keeps.steps(1)])
    @pytest.mark.parametrize("wrong", [math.nan, math.inf])
    def test_no_new_infinity(self, keeps: Keeps, wrong: float) -> None:
        broken = self.x.clone()
        broken[2] = wrong
        assert not keeps.allows(self.x, broken)
        assert not keeps.allows(broken, self.x)

    @pytest.mark.parametrize("keeps", [Keeps.close(rtol=0.01), Keeps.steps(1)])
    def test_what_is_not_finite_stays_as_it_is(self, keeps: Keeps) -> None:
        masked = torch.tensor([1.0, -math.inf])
        assert not keeps.allows(masked, torch.tensor([1.0, math.inf]))
        assert not keeps.allows(masked, torch.tensor([1.0, math.nan]))
        assert keeps.allows(masked, torch.tensor([1.005, -math.inf]))

    def test_interface_allows_other_numbers(self) -> None:
        assert Keeps.interface().allows(self.x, -self.x)

    def test_reads_well(self) -> None:
        kinds = [Keeps.bitwise(), Keeps.close(rtol=1e-5, atol=1e-6), Keeps.steps(2), Keeps.interface()]
        assert list(map(str, kinds)) == [
            "bitwise",
            "close (rtol 1e-05, atol 1e-06)",
            "steps (2)",
            "interface",
        ]


def test_a_result_says_nothing_by_default() -> None:
    result = PassResult()
    assert (result.changes, result.remarks, result.facts) == (0, (), {})
