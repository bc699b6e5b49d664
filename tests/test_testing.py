"""The helper for tests of passes: it must fail where a pass is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from support.programs import Mlp, data, mlp, seeded
from torch import nn

from sqcompile.errors import InputError, LevelError, NumericError, PassContractError
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter
from sqcompile.testing import assert_text, check_pass, traced

aten = torch.ops.aten


class ReplaceRelu(Pass, register=False):
    """Replaces each relu by a leaky one of slope zero: fires once, and says where it does not."""

    keeps: ClassVar[Keeps] = Keeps.bitwise()

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Rewriter(program, self.name)
        for node in list(program.compute_nodes()):
            if node.target is not aten.relu.default:
                context.remark(node, "it is no relu")
                continue
            with edit.after(node):
                edit.replace(node, edit.call(aten.leaky_relu.default, node.args[0], 0.0, like=node))
        return PassResult(changes=edit.finish())


EXPECTED = """
    program (level aten)
      input  %x: f32[2, 8]
      tensor @first.weight: f32[16, 8]
      tensor @first.bias: f32[16]
      tensor @second.weight: f32[4, 16]
      tensor @second.bias: f32[4]
      %linear: f32[2, 16] = linear(%x, @first.weight, @first.bias)
      %leaky_relu: f32[2, 16] = leaky_relu(%linear, negative_slope=0)
      %linear_1: f32[2, 4] = linear(%leaky_relu, @second.weight, @second.bias)
      return output=%linear_1
"""


def test_a_pass_that_is_right() -> None:
    model = seeded(Mlp)
    for given in (model, mlp()):
        checked = check_pass(
            ReplaceRelu(), given, (data(2, 8),), expected=EXPECTED, remarks=["no relu", "(first, "]
        )
        assert checked.reasons == ["it is no relu"] * 2 and checked.record.changes > 0
        assert "relu(%linear)" in str(checked.before) and "leaky_relu" in str(checked.after)
    check_pass(ReplaceRelu(), checked.after, (data(2, 8),), unchanged=True, expected=EXPECTED)


def test_programs_need_no_inputs() -> None:
    checked = check_pass(ReplaceRelu(), mlp())
    assert checked.record.distance is None


class TestFailing:
    def test_another_text(self) -> None:
        with pytest.raises(
            AssertionError, match=r"(?s)the text differs.*-.*negative_slope=1.*\+.*negative_slope=0"
        ):
            check_pass(ReplaceRelu(), mlp(), expected=EXPECTED.replace("slope=0", "slope=1"))

    def test_a_change_that_should_not_be(self) -> None:
        with pytest.raises(AssertionError, match="the pass changed the program"):
            check_pass(ReplaceRelu(), mlp(), unchanged=True)

    def test_a_remark_that_is_missing(self) -> None:
        with pytest.raises(AssertionError, match="no remark holds 'two users'"):
            check_pass(ReplaceRelu(), mlp(), remarks=["two users"])

    def failing(self, body: Callable[[Program, PassContext], int], match: str, **options: Any) -> None:
        class Wrong(Pass):
            keeps: ClassVar[Keeps] = options.pop("keeps", Keeps.interface())

            def run(self, program: Program, context: PassContext) -> PassResult:
                return PassResult(changes=body(program, context))

        program = mlp()
        for name, tensor in list(program.tensors()):
            program.set_tensor(name, tensor.detach().clone())  # some passes here write into them
        with pytest.raises((AssertionError, PassContractError, NumericError), match=match):
            check_pass(Wrong(), program, (data(2, 8),), **options)

    def scale(self, program: Program, factor: float) -> int:
        edit = Rewriter(program)
        result = program.output.args[0][0]
        with edit.after(result):
            edit.replace(
                result, edit.call(aten.mul.Tensor, result, factor), only=lambda user: user.op == "output"
            )
        return edit.finish()

    def test_a_second_run_that_changes_again(self) -> None:
        self.failing(lambda program, context: self.scale(program, 2.0), "a second run changes it again")

    def test_a_second_run_that_may(self) -> None:
        class Again(Pass):
            def run(inner, program: Program, context: PassContext) -> PassResult:
                return PassResult(changes=self.scale(program, 2.0))

        check_pass(Again(), mlp(), (data(2, 8),), idempotent=False)

    def test_another_program_each_time(self) -> None:
        counter = itertools.count(1)
        self.failing(lambda program, context: self.scale(program, next(counter)), "gives another program")

    def test_random_numbers_that_are_not_seeded(self) -> None:
        def body(program: Program, context: PassContext) -> int:
            node = next(node for node in program.graph.nodes if node.op == "get_attr")
            Rewriter(program).replace_tensor(node, torch.randn(program.tensor(node).shape))
            return 1

        self.failing(body, r"(?s)gives another program.*tensors with other values: @first\.weight$")

    def test_what_nothing_uses_any_more(self) -> None:
        """A pass that forgets `finish` leaves the old node: it costs time, and no number shows it."""

        def body(program: Program, context: PassContext) -> int:
            edit = Rewriter(program)
            (relu,) = (node for node in program.compute_nodes() if node.target is aten.relu.default)
            with edit.before(relu):
                edit.replace(relu, edit.call(aten.silu.default, relu.args[0], like=relu))
            return edit.changes

        self.failing(body, r"leaves what nothing uses: %relu; end with Rewriter\.finish", idempotent=False)

    def test_what_nothing_used_before_is_not_the_passs_fault(self) -> None:
        class Idle(Pass):
            def run(self, program: Program, context: PassContext) -> PassResult:
                return PassResult()

        program = mlp()
        with program.graph.inserting_before(program.output):
            dead = program.graph.call_function(aten.neg.default, (program.placeholders[0],))
        dead.meta["val"] = program.placeholders[0].meta["val"]
        program.recompile()
        check_pass(Idle(), program, (data(2, 8),), unchanged=True)

    def test_random_numbers_that_are(self) -> None:
        class Random(Pass):
            def run(self, program: Program, context: PassContext) -> PassResult:
                node = next(node for node in program.graph.nodes if node.op == "get_attr")
                made = torch.randn(16, 8, generator=torch.Generator().manual_seed(context.seed))
                if torch.equal(program.tensor(node), made):
                    return PassResult()
                Rewriter(program).replace_tensor(node, made)
                return PassResult(changes=1)

        first, second = (check_pass(Random(), mlp(), (data(2, 8),), seed=seed) for seed in (0, 1))
        assert first.after.fingerprint(content=True) != second.after.fingerprint(content=True)

    def test_numbers_that_move(self) -> None:
        self.failing(
            lambda program, context: self.scale(program, 1.01), "more than it promises", keeps=Keeps.bitwise()
        )

    def test_writing(self) -> None:
        def body(program: Program, context: PassContext) -> int:
            program.tensor("first.weight").data.mul_(2)
            return 0

        self.failing(body, "wrote into the tensor")

    def test_lying(self) -> None:
        self.failing(lambda program, context: 1, "misreports")

    def test_options_that_do_not_survive_as_text(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sqcompile.pipeline import contract

        class Forgetful(Pass):
            ratio: float = 0.5

            def __str__(self) -> str:
                return "forgetful"

            def run(self, program: Program, context: PassContext) -> PassResult:
                return PassResult()

        monkeypatch.setitem(contract._REGISTRY, "forgetful", Forgetful)
        check_pass(Forgetful(), mlp())
        with pytest.raises(AssertionError, match="reads back from its text as another"):
            check_pass(Forgetful(ratio=0.25), mlp())

    def test_inputs_that_do_not_fit(self) -> None:
        with pytest.raises(InputError):
            check_pass(ReplaceRelu(), mlp(), (data(2, 9),))


class TestLevels:
    class Quantize(Pass, register=False):
        produces: ClassVar[Level] = Level.QDQ

        def run(self, program: Program, context: PassContext) -> PassResult:
            return PassResult()

    class NeedsQDQ(Pass, register=False):
        requires = produces = Level.QDQ

        def run(self, program: Program, context: PassContext) -> PassResult:
            return PassResult(facts={"batches": len(list(context.batches("looking")))})

    def test_passes_that_prepare(self) -> None:
        checked = check_pass(
            self.NeedsQDQ(),
            seeded(Mlp),
            (data(2, 8),),
            prepare=[self.Quantize()],
            calibration=iter([data(2, 8)] * 3),
        )
        assert checked.before.level is Level.QDQ and checked.record.facts == {"batches": 3}
        with pytest.raises(LevelError):
            check_pass(self.NeedsQDQ(), seeded(Mlp), (data(2, 8),))

    def test_no_second_run_where_the_level_changes(self) -> None:
        assert check_pass(self.Quantize(), mlp()).after.level is Level.QDQ


class TestTexts:
    def test_indentation_does_not_count(self) -> None:
        assert_text("a\n  b", "\n    a\n      b\n")

    def test_the_new_text_is_printed_whole_on_demand(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SQCOMPILE_ACCEPT", "1")
        with pytest.raises(AssertionError, match="the text is now:\nnew text"):
            assert_text("new text", "old text")


def test_traced() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert model.training
    program = traced(model, (data(2, 3),))
    assert program.level is Level.ATEN and model.training  # the model is left as it was
