"""The pass manager: every way in which a pass can lie, break or fail is caught, named, and undone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.programs import Mlp, conv_net, data, mlp, seeded
from torch import fx

import sqcompile
from sqcompile.errors import (
    CalibrationError,
    Error,
    InputError,
    LevelError,
    NumericError,
    PassContractError,
    PassError,
    PassOptionError,
    VerifyError,
)
from sqcompile.layers import layers_of
from sqcompile.levels import Level
from sqcompile.pipeline import (
    Keeps,
    Pass,
    PassContext,
    PassManager,
    PassRecord,
    PassResult,
    parse_pipeline,
)
from sqcompile.program import Program
from sqcompile.quantization import Format, MinMax
from sqcompile.rewrite import Rewriter
from sqcompile.sparsity import Pattern, Sparsity

aten = torch.ops.aten
ours = torch.ops.sqcompile


class ScaleUp(Pass, register=False):
    """An honest pass: multiplies the output."""

    by: float = 2.0

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Rewriter(program, self.name)
        result = program.output.args[0][0]
        with edit.after(result):
            scaled = edit.call(aten.mul.Tensor, result, self.by, like=result)
        edit.replace(result, scaled, only=lambda user: user.op == "output")
        return PassResult(changes=edit.finish())


class Idle(Pass, register=False):
    """An honest pass that finds nothing to do, and says why."""

    keeps: ClassVar[Keeps] = Keeps.bitwise()

    def run(self, program: Program, context: PassContext) -> PassResult:
        context.remark(linear(program), "its weight is fine")
        return PassResult(facts={"seen": 2})


def linear(program: Program, index: int = 0) -> fx.Node:
    return [node for node in program.compute_nodes() if node.target is aten.linear.default][index]


def weight(program: Program) -> torch.Tensor:
    return program.tensor("first.weight")


def quantized_weight(
    program: Program,
    *,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    axis: int | None = 0,
    group: int | None = None,
    bits: tuple[int, int] = (-128, 127),
) -> int:
    """Quantize the weight of the first layer, as well or as badly as asked."""
    edit = Rewriter(program, "quantize-by-hand")
    node = linear(program)
    rows, depth = weight(program).shape
    shape = (rows,) if group is None else (rows, -(-depth // group))
    arguments = [
        edit.constant(
            "first.weight_codes", torch.full((rows, depth), 3, dtype=torch.int8) if codes is None else codes
        ),
        edit.constant("first.weight_scale", torch.full(shape, 0.1) if scale is None else scale),
        edit.constant(
            "first.weight_zero_point",
            torch.zeros(shape, dtype=torch.int32) if zero_point is None else zero_point,
        ),
    ]
    with edit.before(node):
        value = edit.call(ours.dequantize.default, *arguments, axis, group, *bits, like=node)
    edit.set_argument(node, 1, value)
    return edit.finish()


Body = Callable[[Program, PassContext], Any]


def misbehaving(body: Body, **attributes: Any) -> Pass:
    """Make a pass from a function; a number that it returns is what it reports as changes."""

    class Misbehaving(Pass):
        requires = attributes.get("requires", Level.ATEN)
        produces = attributes.get("produces", Level.ATEN)
        keeps = attributes.get("keeps", Keeps.interface())

        def run(self, program: Program, context: PassContext) -> PassResult:
            result = body(program, context)
            return PassResult(changes=result) if isinstance(result, int) else result

    return Misbehaving()


def edit_with(action: Callable[[Rewriter], Any]) -> Body:
    """Make a body that edits a program and reports honestly."""

    def body(program: Program, context: PassContext) -> int:
        edit = Rewriter(program, "edit")
        action(edit)
        return max(1, edit.finish())

    return body


def replace_output(edit: Rewriter, target: Any, *arguments: Any) -> None:
    result = edit.program.output.args[0][0]
    with edit.after(result):
        new = edit.call(target, result, *arguments, like=result)
    edit.replace(result, new, only=lambda user: user.op == "output")


# --- what passes do wrong ---------------------------------------------------------------------------


def change_silently(program: Program, context: PassContext) -> int:
    ScaleUp().run(program, context)
    return 0


def replace_weight_silently(program: Program, context: PassContext) -> int:
    Rewriter(program).replace_tensor(linear(program).args[1], weight(program).detach() * 2)
    return 0


def promise_silently(program: Program, context: PassContext) -> int:
    program.sparsity["first.weight"] = Sparsity(torch.ones(16, 8, dtype=torch.bool))
    return 0


def rename_input_silently(program: Program, context: PassContext) -> int:
    old = program.signature
    program.signature = replace(old, inputs=(replace(old.inputs[0], name="data"),))
    return 0


def rename_placeholder_silently(program: Program, context: PassContext) -> int:
    program.placeholders[0].name = "data"
    return 0


def write(program: Program, context: PassContext) -> int:
    with torch.no_grad():
        weight(program).mul_(2)
    return 1


def write_past_the_version(program: Program, context: PassContext) -> int:
    weight(program).data.mul_(2)
    return 0


def write_with_numpy(program: Program, context: PassContext) -> int:
    weight(program).detach().numpy()[0, :] = 0
    return ScaleUp().run(program, context).changes


def reorder_with_numpy(program: Program, context: PassContext) -> int:
    array = weight(program).detach().numpy()
    array[:] = array[::-1].copy()
    return 0


def move_data(program: Program, context: PassContext) -> int:
    weight(program).data = torch.zeros(16, 8)
    return 1


def wrong_shape(program: Program, context: PassContext) -> int:
    node = linear(program)
    node.meta["val"] = node.meta["val"].new_empty(2, 17)
    return 1


def wrong_type(program: Program, context: PassContext) -> int:
    node = linear(program)
    node.meta["val"] = node.meta["val"].double()
    return 1


def forgotten_type(program: Program, context: PassContext) -> int:
    with program.graph.inserting_after(linear(program)):
        new = program.graph.call_function(aten.relu.default, (linear(program),))
    linear(program).replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return 1


def shrink_weight_only(program: Program, context: PassContext) -> int:
    program.set_tensor("first.weight", torch.zeros(15, 8))
    return 1


def shrink_weight_and_record(program: Program, context: PassContext) -> int:
    Rewriter(program).replace_tensor(linear(program).args[1], torch.zeros(15, 8))
    return 1


def use_before_definition(program: Program, context: PassContext) -> int:
    program.output.prev.prev.prev.append(linear(program))
    return 1


def read_nothing(program: Program, context: PassContext) -> int:
    node = linear(program)
    with program.graph.inserting_before(node):
        missing = program.graph.get_attr("no.such.tensor")
    missing.meta["val"] = node.args[1].meta["val"]
    node.args = (node.args[0], missing, node.args[2])
    return 1


def call_python(program: Program, context: PassContext) -> int:
    edit = Rewriter(program)
    replace_output(edit, torch.relu)
    return edit.finish()


def call_module(program: Program, context: PassContext) -> int:
    program.graph_module.add_module("relu", torch.nn.ReLU())
    node = linear(program)
    with program.graph.inserting_after(node):
        new = program.graph.call_module("relu", (node,))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return 1


def drop_an_output(program: Program, context: PassContext) -> int:
    program.output.args = ((),)
    return 1


def drop_an_output_and_its_declaration(program: Program, context: PassContext) -> int:
    program.output.args = ((),)
    program.signature = replace(program.signature, outputs=())
    return 1


def rename_output(program: Program, context: PassContext) -> int:
    (value,) = program.signature.outputs
    program.signature = replace(program.signature, outputs=(replace(value, name="logits"),))
    return 1


def add_input(program: Program, context: PassContext) -> int:
    first = program.placeholders[0]
    with program.graph.inserting_after(first):
        program.graph.placeholder("extra").meta["val"] = first.meta["val"]
    return 1


def declare_another_input(program: Program, context: PassContext) -> int:
    add_input(program, context)
    old = program.signature
    program.signature = replace(old, inputs=(*old.inputs, replace(old.inputs[0], name="extra")))
    return 1


def widen_dimension(program: Program, context: PassContext) -> int:
    program.signature = replace(program.signature, dims={"batch": (0, None)})
    return 1


def divide_by_zero(program: Program, context: PassContext) -> int:
    ScaleUp().run(program, context)
    return 1 // 0


def wrong_call(program: Program, context: PassContext) -> int:
    edit = Rewriter(program)
    node = linear(program)
    with edit.before(node):
        edit.call(aten.linear.default, node.args[0], node.args[0], node.args[0], node.args[0])
    return edit.finish()


def recurse(program: Program, context: PassContext) -> int:
    return recurse(program, context)


CASES: dict[str, tuple[Body, type[Error], str]] = {
    # It lies about what it did.
    "changes silently": (change_silently, PassContractError, "misreports"),
    "changes nothing": (lambda program, context: 1, PassContractError, "misreports"),
    "replaces a weight silently": (replace_weight_silently, PassContractError, "misreports"),
    "promises silently": (promise_silently, PassContractError, "misreports"),
    "renames an input silently": (rename_input_silently, PassContractError, "misreports"),
    "renames a placeholder silently": (rename_placeholder_silently, PassContractError, "misreports"),
    "counts below zero": (lambda program, context: -1, PassContractError, "number of changes"),
    "returns nothing": (lambda program, context: None, PassContractError, "returned no PassResult"),
    # It writes into tensors, which belong to the user's model.
    "writes": (write, PassContractError, "wrote into the tensor 'first.weight'"),
    "writes past the version": (write_past_the_version, PassContractError, "wrote into the tensor"),
    "writes with numpy": (write_with_numpy, PassContractError, "wrote into the tensor"),
    "reorders with numpy": (reorder_with_numpy, PassContractError, "wrote into the tensor"),
    "moves the data": (move_data, PassContractError, "wrote into the tensor"),
    # It leaves a program that is none.
    "wrong shape": (wrong_shape, VerifyError, "recorded type of 'linear' is wrong"),
    "wrong type": (wrong_type, VerifyError, "recorded type of 'linear' is wrong"),
    "forgotten type": (forgotten_type, VerifyError, "recorded type of 'relu' is wrong"),
    "tensor of another shape": (
        shrink_weight_only,
        VerifyError,
        "type of the tensor 'first.weight' is wrong",
    ),
    "weight and bias do not fit": (shrink_weight_and_record, VerifyError, "arguments of 'linear' do not fit"),
    "use before definition": (use_before_definition, VerifyError, "not well-formed"),
    "a tensor that is not there": (read_nothing, VerifyError, "does not hold"),
    "a Python function": (call_python, VerifyError, "no operator"),
    "a module": (call_module, VerifyError, "no operator"),
    "an operator in place": (
        edit_with(lambda edit: replace_output(edit, aten.relu_.default)),
        VerifyError,
        "'relu_', which writes into its arguments",
    ),
    "an operator of another level": (
        edit_with(lambda edit: replace_output(edit, ours.observe.default, "name")),
        LevelError,
        "cannot hold 'observe'",
    ),
    # It changes the interface.
    "renames a placeholder": (
        lambda program, context: rename_placeholder_silently(program, context) + 1,
        VerifyError,
        "changed the program's inputs",
    ),
    "drops an output": (drop_an_output, VerifyError, "another number of outputs"),
    "drops an output everywhere": (
        drop_an_output_and_its_declaration,
        VerifyError,
        "changed the program's outputs",
    ),
    "renames an output": (rename_output, VerifyError, "changed the program's outputs"),
    "adds an input": (add_input, VerifyError, "another number of inputs"),
    "adds an input everywhere": (declare_another_input, VerifyError, "changed the program's inputs"),
    "widens a dimension": (widen_dimension, VerifyError, "range of a dimension"),
    "returns another type": (
        edit_with(lambda edit: replace_output(edit, aten.to.dtype, torch.float64)),
        VerifyError,
        "output 'output' is not what the signature says",
    ),
    "returns another shape": (
        edit_with(lambda edit: replace_output(edit, aten.unsqueeze.default, 0)),
        VerifyError,
        "output 'output' is not what the signature says",
    ),
    # It makes numbers that are none.
    "makes NaN": (
        edit_with(lambda edit: replace_output(edit, aten.mul.Tensor, math.nan)),
        NumericError,
        "more than it promises",
    ),
    "makes infinity": (
        edit_with(lambda edit: replace_output(edit, aten.div.Tensor, 0.0)),
        NumericError,
        "more than it promises",
    ),
    # It fails.
    "divides by zero": (divide_by_zero, PassError, "failed"),
    "recurses": (recurse, PassError, "failed"),
}


def run(
    passes: list[Pass], program: Program | None = None, batch: Any = ..., **options: Any
) -> tuple[Program, list[PassRecord]]:
    program = mlp() if program is None else program
    batches = [[data(2, 8)]] if batch is ... else ([] if batch is None else [batch])
    records = PassManager(passes, check_batches=batches, **options).run(program, PassContext())
    return program, records


class TestCatching:
    # torch.fx warns of what one of the passes here does.
    @pytest.mark.filterwarnings("ignore:Failed to fetch module", "ignore:Attempted to insert a get_attr Node")
    @pytest.mark.parametrize("case", CASES)
    def test_names_the_pass_and_restores_the_program(self, case: str, tmp_path: Path) -> None:
        body, kind, text = CASES[case]
        program = fresh()
        ScaleUp().run(program, PassContext())  # what an earlier pass left must be kept
        good = program.snapshot()
        with pytest.raises(Error) as caught:
            run([Idle(), misbehaving(body), ScaleUp(by=3.0)], program, dump_dir=tmp_path)
        error = caught.value
        assert type(error) is kind and text in error.what
        assert "pass misbehaving (after idle)" in str(error.where)
        assert error.seen and error.expected and error.next_step
        (dump,) = tmp_path.iterdir()
        assert str(dump) in str(error.next_step)
        assert (
            dump.read_text().splitlines()[0] == "program (level aten)" and "programs.py:" in dump.read_text()
        )
        assert str(program) == str(good) and program.level is Level.ATEN
        assert program.signature == good.signature and program.sparsity == {}
        if "wrote into" not in text:
            assert program.fingerprint() == good.fingerprint()
            assert torch.equal(program(data(2, 8)), good(data(2, 8)))

    def test_says_where_in_the_model(self) -> None:
        with pytest.raises(VerifyError) as caught:
            run([misbehaving(wrong_shape)])
        assert "node %linear (first, programs.py:" in str(caught.value.where)

    def test_says_where_in_a_pass_of_the_users(self) -> None:
        """A line of the pass itself, not one of a library that it calls."""

        def ask_nothing(program: Program, context: PassContext) -> int:
            return len(program.tensor("nothing"))

        for body, kind in ((ask_nothing, PassError), (wrong_call, VerifyError)):
            line = body.__code__.co_firstlineno + (1 if body is ask_nothing else 4)
            with pytest.raises(kind) as caught:
                run([misbehaving(body)])
            # The body is called by `run`, in this file too: the innermost line counts.
            assert f"pass misbehaving (after no other pass), test_manager.py:{line}" in str(
                caught.value.where
            )
        with pytest.raises(PassError) as caught:
            run([misbehaving(ask_nothing)])
        assert str(caught.value.next_step).startswith("correct the pass") and "KeyError" in str(
            caught.value.seen
        )

    def test_a_pass_that_keeps_state(self) -> None:
        class Stateful(Pass):
            def run(self, program: Program, context: PassContext) -> PassResult:
                self.seen = 1  # type: ignore[attr-defined]
                return PassResult()

        with pytest.raises(PassError) as caught:
            run([Stateful()])
        assert "holds no state" in str(caught.value.next_step)

    def test_an_assertion_without_text(self) -> None:
        def asserts(program: Program, context: PassContext) -> int:
            raise AssertionError

        with pytest.raises(PassError) as caught:
            run([misbehaving(asserts)])
        assert caught.value.seen == "AssertionError"

    @pytest.mark.parametrize("error", [ValueError("oops"), InputError("This model is too small.")])
    def test_says_what_a_failing_pass_has_written_before(self, error: Exception) -> None:
        """The program is restored, but it shares its tensors with the model."""

        def write_then_raise(program: Program, context: PassContext) -> int:
            weight(program).data.zero_()
            raise error

        with pytest.raises(Error) as caught:
            run([misbehaving(write_then_raise)], fresh())
        assert "also wrote into the tensor 'first.weight'" in str(caught.value.next_step)
        with pytest.raises(Error) as caught:
            run([misbehaving(divide_by_zero)], fresh())
        assert "wrote into" not in str(caught.value.next_step)

    def test_a_remark_that_is_none(self) -> None:
        class Talking(Pass):
            def run(self, program: Program, context: PassContext) -> PassResult:
                return PassResult(remarks=("nothing to do",))  # type: ignore[arg-type]

        with pytest.raises(PassContractError, match="a remark that is none") as caught:
            run([Talking()])
        assert "context.remark" in str(caught.value.next_step)

    def test_a_pass_says_itself_what_is_wrong_with_the_input(self) -> None:
        def needs_data(program: Program, context: PassContext) -> int:
            ScaleUp().run(program, context)
            return len(list(context.batches("looking")))

        with pytest.raises(CalibrationError) as caught:
            run([ScaleUp(), misbehaving(needs_data)])
        assert str(caught.value.where).startswith("pass misbehaving (after scale-up)")
        assert "graph before misbehaving" in str(caught.value.next_step)

    def test_an_interrupt_restores_the_program_too(self) -> None:
        def interrupted(program: Program, context: PassContext) -> int:
            ScaleUp().run(program, context)
            raise KeyboardInterrupt

        program, good = mlp(), mlp()
        with pytest.raises(KeyboardInterrupt):
            run([misbehaving(interrupted)], program)
        assert str(program) == str(good)

    def test_a_pass_that_forgets_to_recompile(self) -> None:
        def edit(program: Program, context: PassContext) -> int:
            result = program.output.args[0][0]
            with program.graph.inserting_after(result):
                new = program.graph.call_function(aten.neg.default, (result,))
            new.meta["val"] = result.meta["val"]
            program.output.args = ((new,),)
            return 1

        x = data(2, 8)
        before = mlp()(x)  # the code of the graph exists now
        program = mlp()
        program(x)
        _, (record,) = run([misbehaving(edit)], program)
        assert torch.equal(program(x), -before)
        assert record.distance is not None and record.distance.cosine < -0.99

    def test_writes_into_what_an_earlier_pass_stored(self) -> None:
        def replace_weight(program: Program, context: PassContext) -> int:
            Rewriter(program).replace_tensor(linear(program).args[1], torch.ones(16, 8))
            return 1

        with pytest.raises(PassContractError, match="wrote into the tensor 'first"):
            run([Idle(), misbehaving(replace_weight), Idle(), misbehaving(write_past_the_version)], fresh())

    def test_earlier_writes_do_not_blame_later_passes(self) -> None:
        """Tensors are compared with what they were before this pass, not before the first."""
        program = fresh()
        with pytest.raises(PassContractError):
            run([misbehaving(write_past_the_version)], program)
        run([Idle()], program)


def fresh() -> Program:
    """Return a program whose tensors are its own: some of the passes here write into them."""
    program = mlp(dynamic=True)
    for name, tensor in list(program.tensors()):
        program.set_tensor(name, tensor.detach().clone())
    return program


# --- numbers ----------------------------------------------------------------------------------------


def shift(amount: float, keeps: Keeps) -> Pass:
    return misbehaving(edit_with(lambda edit: replace_output(edit, aten.add.Tensor, amount)), keeps=keeps)


class TestPromises:
    @pytest.mark.parametrize(
        ("keeps", "allowed", "refused"),
        [
            (Keeps.bitwise(), 0.0, 1e-4),
            (Keeps.close(rtol=0.0, atol=1e-3), 9e-4, 2e-3),
            (Keeps.close(rtol=1e-2), 1e-4, 1e-1),
            (Keeps.steps(1), 1e-4, 1e-1),
        ],
    )
    def test_outputs_within_what_a_pass_keeps(self, keeps: Keeps, allowed: float, refused: float) -> None:
        run([shift(allowed, keeps)])
        with pytest.raises(NumericError) as caught:
            run([shift(refused, keeps)])
        assert str(keeps) in str(caught.value.expected) and "output 'output'" in str(caught.value.where)

    def test_says_where_the_numbers_part(self) -> None:
        def spoil_the_second_layer(edit: Rewriter) -> None:
            node = linear(edit.program, 1).args[2]
            edit.replace_tensor(node, edit.program.tensor(node).detach() + 0.01)

        with pytest.raises(NumericError) as caught:
            run([misbehaving(edit_with(spoil_the_second_layer), keeps=Keeps.bitwise())])
        assert "first at node %linear_1 (second, programs.py:" in str(caught.value.where)

    def test_promises_are_about_the_program_before_not_the_first(self) -> None:
        _, records = run([ScaleUp(by=100.0), Idle(), shift(0.0, Keeps.bitwise())])
        distances = [record.distance for record in records]
        assert distances[0] == distances[1] == distances[2]
        assert distances[0] is not None and distances[0].sqnr_db < 0

    def test_nan_of_the_model_itself_is_no_fault(self) -> None:
        program = mlp()
        run([shift(0.0, Keeps.bitwise())], program, batch=[torch.full((2, 8), math.nan)])

    def test_a_program_that_no_longer_runs(self) -> None:
        def index_beyond(edit: Rewriter) -> None:
            result = edit.program.output.args[0][0]
            with edit.after(result):
                index = edit.call(aten.full.default, [4], 9, dtype=torch.int64)
                new = edit.call(aten.index_select.default, result, 1, index, like=result)
            edit.replace(result, new, only=lambda user: user.op == "output")

        with pytest.raises(VerifyError, match="no longer runs") as caught:
            run([misbehaving(edit_with(index_beyond))])
        assert "%index_select" in str(caught.value.where) and "Error: " in str(caught.value.seen)

    def test_inputs_on_which_the_model_fails_are_no_fault_of_a_pass(self) -> None:
        with pytest.raises(InputError) as caught:
            run([Idle()], batch=[data(2, 9)])
        assert "%linear" in str(caught.value.where) and "pass" not in str(caught.value.where)


# --- masks, promises, quantization --------------------------------------------------------------------


def masked() -> Program:
    """A program whose first weight has a mask, and whose second has a promise."""
    program = mlp()
    edit = Rewriter(program)
    node = linear(program)
    mask = torch.arange(128).reshape(16, 8) % 2 == 0
    with edit.before(node):
        value = edit.call(ours.mask.default, node.args[1], edit.constant("first.weight_mask", mask))
    edit.set_argument(node, 1, value)
    pruned = program.tensor("second.weight").detach().clone()
    keep = torch.tensor([True, True, False, False] * 4).expand(4, 16).contiguous()
    edit.replace_tensor(linear(program, 1).args[1], pruned * keep)
    edit.finish()
    program.sparsity["second.weight"] = Sparsity(keep, Pattern.parse("2:4"))
    return program


def forget_mask(edit: Rewriter) -> None:
    value = linear(edit.program).args[1]
    edit.replace(value, value.args[0])


def misfit_mask(edit: Rewriter) -> None:
    edit.replace_tensor(linear(edit.program).args[1].args[1], torch.ones(8, 16, dtype=torch.bool))


def revive_weights(edit: Rewriter) -> None:
    node = linear(edit.program, 1).args[1]
    edit.replace_tensor(node, edit.program.tensor(node).detach() + 1e-6)


def replace_pruned_weight(edit: Rewriter) -> None:
    edit.replace(linear(edit.program, 1).args[1], edit.constant("second.weight", torch.ones(4, 16)))


def widen_promise(edit: Rewriter) -> None:
    edit.program.sparsity["second.weight"] = Sparsity(
        torch.ones(4, 16, dtype=torch.bool), Pattern.parse("2:4")
    )


def break_promise(edit: Rewriter) -> None:
    keep = torch.ones(4, 16, dtype=torch.bool)
    keep[0, 2:4] = False  # as the weight is, but half a block
    edit.program.sparsity["second.weight"] = Sparsity(keep, Pattern.parse("1x4"))


class TestMasks:
    @pytest.mark.parametrize(
        ("action", "text", "seen"),
        [
            (forget_mask, "has lost its mask", "@first.weight"),
            (misfit_mask, "do not fit together", ""),
            (revive_weights, "no longer has the sparsity", "32 weights are nonzero"),
            (replace_pruned_weight, "has lost its mask", "@second.weight_1"),
            (widen_promise, "no longer has the sparsity", "without the pattern 2:4"),
            (break_promise, "no longer has the sparsity", "without the pattern 1x4"),
        ],
    )
    def test_a_pass_that_breaks_one(self, action: Callable[[Rewriter], None], text: str, seen: str) -> None:
        program = masked()
        good = program.fingerprint()
        with pytest.raises(VerifyError) as caught:
            run([Idle(), misbehaving(edit_with(action))], program)
        error = caught.value
        assert text in error.what and seen in str(error.seen)
        assert "pass misbehaving (after idle)" in str(error.where) and error.next_step
        assert program.fingerprint() == good and set(program.sparsity) == {"second.weight"}

    def test_passes_that_keep_them(self) -> None:
        def bake_in(edit: Rewriter) -> None:
            node = linear(edit.program)
            value = node.args[1]
            keep = edit.program.tensor(value.args[1])
            edit.replace_tensor(value.args[0], edit.program.tensor(value.args[0]).detach() * keep)
            edit.replace(value, value.args[0])
            edit.program.sparsity["first.weight"] = Sparsity(keep)

        def prune_more(edit: Rewriter) -> None:
            node = linear(edit.program, 1).args[1]
            edit.replace_tensor(node, torch.zeros(4, 16))

        def prune_differently(edit: Rewriter) -> None:
            mask = linear(edit.program).args[1].args[1]
            edit.replace_tensor(mask, ~edit.program.tensor(mask))

        for action in (bake_in, prune_more, prune_differently):
            run([misbehaving(edit_with(action)), Idle()], masked())


def random_codes(low: int, high: int) -> torch.Tensor:
    codes = torch.randint(low, high, (16, 8), generator=torch.Generator().manual_seed(0))
    return codes.to(torch.int8)


QUANTIZATION: dict[str, tuple[dict[str, Any], str]] = {
    "zero scale": ({"scale": torch.tensor([0.0] + [0.1] * 15)}, "A scale is not a positive finite number."),
    "negative scale": ({"scale": torch.full((16,), -0.1)}, "A scale is not a positive finite number."),
    "NaN scale": ({"scale": torch.full((16,), math.nan)}, "A scale is not a positive finite number."),
    "infinite scale": ({"scale": torch.full((16,), math.inf)}, "A scale is not a positive finite number."),
    "zero point above": ({"zero_point": torch.full((16,), 128, dtype=torch.int32)}, "A zero point is out of"),
    "zero point below": (
        {"zero_point": torch.full((16,), -129, dtype=torch.int32)},
        "A zero point is out of",
    ),
    "zero point of floats": ({"zero_point": torch.zeros(16)}, "A zero point is no integer."),
    "zero point of another shape": (
        {"zero_point": torch.zeros(1, dtype=torch.int32)},
        "The shape of a zero point does not fit",
    ),
    "codes above": (
        {"codes": torch.full((16, 8), 8, dtype=torch.int8), "bits": (-8, 7)},
        "Stored codes are out",
    ),
    "codes below": (
        {"codes": torch.full((16, 8), -9, dtype=torch.int8), "bits": (-8, 7)},
        "Stored codes are out",
    ),
    "codes of floats": ({"codes": torch.zeros(16, 8)}, "Stored codes are no integers."),
    "scales of another group": (
        {"group": 4, "scale": torch.full((16, 3), 0.1), "axis": 1},
        "The arguments of 'dequantize' do not fit together.",
    ),
    "scales of another axis": (
        {"scale": torch.full((8,), 0.1), "zero_point": torch.zeros(8, dtype=torch.int32)},
        "The arguments of 'dequantize' do not fit together.",
    ),
}


class TestQuantization:
    @pytest.mark.parametrize("case", QUANTIZATION)
    def test_a_pass_that_quantizes_badly(self, case: str) -> None:
        options, text = QUANTIZATION[case]
        item = misbehaving(lambda program, context: quantized_weight(program, **options), produces=Level.QDQ)
        program = mlp()
        good = program.fingerprint()
        with pytest.raises(VerifyError) as caught:
            run([ScaleUp(), item], program, batch=None)
        error = caught.value
        assert text in error.what and "pass misbehaving (after scale-up)" in str(error.where)
        assert error.seen and error.expected and error.next_step
        assert program.level is Level.ATEN and "codes" not in str(program)
        assert program.fingerprint() != good  # the scale-up before it stays

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"axis": None, "scale": torch.tensor(0.1), "zero_point": torch.tensor(0, dtype=torch.int32)},
            {"axis": 1, "group": 4, "zero_point": torch.full((16, 2), 127, dtype=torch.int32)},
            {"bits": (-8, 7), "codes": random_codes(-8, 8)},
        ],
    )
    def test_a_pass_that_quantizes_well(self, options: dict[str, Any]) -> None:
        item = misbehaving(lambda program, context: quantized_weight(program, **options), produces=Level.QDQ)
        program, _ = run([item])
        assert program.level is Level.QDQ and len(layers_of(program)) == 2

    def test_an_operator_that_the_new_level_does_not_know(self) -> None:
        item = misbehaving(lambda program, context: quantized_weight(program))
        with pytest.raises(LevelError, match="level aten cannot hold 'dequantize'"):
            run([item])

    def test_an_observe_node_without_observer(self) -> None:
        body = edit_with(lambda edit: replace_output(edit, ours.observe.default, "output"))
        with pytest.raises(VerifyError, match="no observer") as caught:
            run([misbehaving(body, produces=Level.OBSERVED)])
        assert "'output'" in str(caught.value.seen)

    def test_observing_silently(self) -> None:
        """Only what an observer has seen changes, and the pass says that nothing has."""

        def insert(program: Program, context: PassContext) -> int:
            program.observers["output"] = MinMax().start(Format())
            return edit_with(lambda edit: replace_output(edit, ours.observe.default, "output"))(
                program, context
            )

        def watch(changes: int) -> Body:
            def body(program: Program, context: PassContext) -> int:
                program.observers["output"].observe(data(2, 4))
                return changes

            return body

        observed = {"requires": Level.OBSERVED, "produces": Level.OBSERVED}
        start = misbehaving(insert, produces=Level.OBSERVED)
        program, records = run([start, misbehaving(watch(1), **observed)])
        assert program.observers["output"].count == 8 and records[1].changes == 1
        with pytest.raises(PassContractError, match="misreports"):
            run([misbehaving(watch(0), **observed)], program)
        assert program.observers["output"].count == 8  # restored: the failed pass's data is forgotten

    def test_a_level_alone_is_no_change(self) -> None:
        """A pass that quantizes nothing still leaves its level, and may not claim to have changed anything."""
        program, records = run([misbehaving(lambda program, context: 0, produces=Level.QDQ)])
        assert program.level is Level.QDQ and records[0].changes == 0
        with pytest.raises(PassContractError, match="misreports"):
            run([misbehaving(lambda program, context: 5, produces=Level.QDQ)])


# --- order and modes ----------------------------------------------------------------------------------


class TestOrder:
    def test_levels_are_checked_before_anything_runs(self) -> None:
        quantize = misbehaving(lambda program, context: pytest.fail("it ran"), produces=Level.QDQ)
        with pytest.raises(LevelError) as caught:
            PassManager([quantize, ScaleUp()])
        error = caught.value
        assert "scale-up cannot follow misbehaving" in error.what
        assert error.seen == "misbehaving leaves level qdq" and error.expected == "level aten"
        assert error.next_step and error.where == "pass scale-up"

    def test_each_conflict_gets_its_own_advice(self) -> None:
        levels = [Level.ATEN, Level.OBSERVED, Level.QDQ]
        advice = set()
        for left in levels:
            for right in levels:
                if left is right:
                    continue
                first = misbehaving(lambda program, context: 0, requires=left, produces=left)
                second = misbehaving(lambda program, context: 0, requires=right, produces=right)
                with pytest.raises(LevelError) as caught:
                    PassManager([first, second])
                advice.add(caught.value.next_step)
        assert len(advice) >= 4

    @pytest.mark.parametrize(
        ("text", "hint"),
        [
            ("insert-observers,calibrate,freeze-observers,fold-qdq,remove-noops", "before insert-observers"),
            ("insert-observers,remove-noops", "before insert-observers"),
            ("int8-static,int8-static", "leave one out"),
            ("remove-noops,fold-qdq", "insert-observers, calibrate, freeze-observers"),
            ("remove-noops,calibrate", "put insert-observers before calibrate"),
            ("insert-observers,fold-qdq", "put calibrate and freeze-observers before fold-qdq"),
        ],
        ids=["far", "near", "twice", "nothing-quantized", "nothing-observed", "not-frozen"],
    )
    def test_the_advice_is_right_at_the_first_try(self, text: str, hint: str) -> None:
        with pytest.raises(LevelError) as caught:
            PassManager(parse_pipeline(text))
        assert hint in str(caught.value.next_step)

    def test_a_program_that_is_quantized_already(self) -> None:
        compiled = sqcompile.compile(seeded(Mlp), "int8-dynamic", data(2, 8), backend="reference")
        with pytest.raises(LevelError, match="quantized already"):
            sqcompile.compile(compiled.program, "int8-dynamic", backend="reference")

    def test_a_program_of_another_level(self) -> None:
        item = misbehaving(lambda program, context: 0, requires=Level.QDQ, produces=Level.QDQ)
        with pytest.raises(LevelError, match="needs a program of level qdq") as caught:
            run([item])
        assert caught.value.seen == "level aten"
        assert "quantize before misbehaving" in str(caught.value.next_step)

    def test_a_broken_program_is_no_fault_of_a_pass(self) -> None:
        program = mlp()
        wrong_shape(program, PassContext())
        with pytest.raises(VerifyError) as caught:
            run([Idle()], program)
        assert "pass" not in str(caught.value.where)


class TestModes:
    def test_records(self) -> None:
        program = mlp()
        _, (idle, scaled) = run([Idle(), ScaleUp(by=1.001)], program)
        assert (idle.text, idle.changes, idle.facts) == ("idle", 0, {"seen": 2})
        assert scaled.text == "scale-up{by=1.001}" and scaled.changes > 0
        (remark,) = idle.remarks
        assert (remark.origin, remark.node, remark.module) == ("idle", "linear", "first")
        assert remark.source.startswith("programs.py:") and remark.reason == "its weight is fine"
        assert idle.distance is not None and idle.distance.sqnr_db == math.inf
        # A factor of 1.001 leaves an error of 0.1 %, 60 dB below the signal.
        assert scaled.distance is not None and scaled.distance.sqnr_db == pytest.approx(60, abs=0.1)
        assert idle.seconds >= 0 and idle.check_seconds >= 0
        assert idle.size.parameters == 16 * 8 + 16 + 4 * 16 + 4

    def test_remarks_do_not_pile_up(self) -> None:
        _, records = run([Idle(), Idle()])
        assert [len(record.remarks) for record in records] == [1, 1]

    def test_instruments_see_before_and_after(self) -> None:
        seen: list[tuple[str, str, str]] = []
        program = mlp()
        start = str(program)
        run([ScaleUp(), Idle()], program, instruments=[lambda *a: seen.append(tuple(map(str, a)))])
        assert [item[0] for item in seen] == ["scale-up", "idle"]
        assert seen[0][1] == start and seen[0][2] == seen[1][1] == seen[1][2] == str(program) != start

    def test_a_failing_instrument_is_no_failing_pass(self) -> None:
        def instrument(item: Pass, before: Program, after: Program) -> None:
            raise ZeroDivisionError

        program = mlp()
        with pytest.raises(ZeroDivisionError):
            run([ScaleUp()], program, instruments=[instrument])
        assert "mul" in str(program)

    def test_unknown_mode(self) -> None:
        with pytest.raises(PassOptionError) as caught:
            PassManager([], verify="end")  # type: ignore[arg-type]
        assert caught.value.seen == "verify='end'" and "'ends'" in str(caught.value.next_step)

    def test_no_passes(self) -> None:
        for mode in ("each", "ends", "off"):
            assert run([], verify=mode)[1] == []

    def test_off_checks_reports_and_levels_only(self) -> None:
        run([misbehaving(drop_an_output_and_its_declaration)], verify="off")
        _, (record,) = run([ScaleUp()], verify="off")
        assert record.distance is None
        for body in (change_silently, write):
            with pytest.raises(PassContractError):
                run([misbehaving(body)], fresh(), verify="off")

    @pytest.mark.parametrize(
        "case",
        [
            "wrong shape",
            "renames an output",
            "makes NaN",
            "an operator of another level",
            "a Python function",
        ],
    )
    def test_ends_finds_it_in_the_last_program(self, case: str) -> None:
        body, kind, _ = CASES[case]
        program = mlp()
        good = str(program)
        # The pass after it changes nothing: the harm must be found all the same.
        with pytest.raises(kind) as caught:
            run([ScaleUp(), misbehaving(body), Idle()], program, verify="ends")
        assert "after scale-up, misbehaving, idle" in str(caught.value.where)
        assert str(program) == good  # back to the first: which pass it was is not known

    def test_ends_measures_the_last_program(self) -> None:
        _, records = run([ScaleUp(), Idle()], verify="ends")
        assert records[0].distance is None
        assert records[1].distance is not None and records[1].distance.sqnr_db == pytest.approx(0.0)

    def test_a_declared_change_of_the_interface(self) -> None:
        class Doubled(Pass):
            """Returns everything twice."""

            changes_interface: ClassVar[bool] = True

            def run(self, program: Program, context: PassContext) -> PassResult:
                (result,) = program.output.args[0]
                (value,) = program.signature.outputs
                program.output.args = ((result, result),)
                spec = torch.utils._pytree.tree_structure((0, 0))
                program.signature = replace(
                    program.signature,
                    outputs=(replace(value, name="a"), replace(value, name="b")),
                    out_spec=spec,
                )
                return PassResult(changes=1)

        for mode in ("each", "ends"):
            program, records = run([ScaleUp(), Doubled(), ScaleUp(by=3.0)], verify=mode)
            left, right = program(data(2, 8))
            assert torch.equal(left, right) and torch.equal(left, mlp()(data(2, 8)) * 2 * 3)
            assert records[2].distance is None  # nothing left to compare with
        # Promises of later passes hold all the same, from one program to the next.
        with pytest.raises(NumericError):
            run([Doubled(), shift(1.0, Keeps.bitwise())])

    def test_a_declared_change_of_the_inputs(self) -> None:
        class TakesMore(Pass):
            changes_interface: ClassVar[bool] = True

            def run(self, program: Program, context: PassContext) -> PassResult:
                declare_another_input(program, context)
                old = program.signature
                program.signature = replace(
                    old, in_spec=torch.utils._pytree.tree_structure(((0, 0), {})), arg_names=("x", "extra")
                )
                return PassResult(changes=1)

        program, records = run([TakesMore(), ScaleUp()])
        assert program(data(2, 8), data(2, 8)).shape == (2, 4)
        assert [record.distance for record in records] == [None, None]

    def test_several_check_batches(self) -> None:
        program = conv_net()
        batches = [[data(2, 3, 6, 6, seed=seed)] for seed in range(3)]
        (record,) = PassManager([Idle()], check_batches=batches).run(program, PassContext())
        assert record.distance is not None and record.distance.max_error == 0
