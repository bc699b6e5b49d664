"""`compile` and `load`: where inputs come from, what is refused before work starts, and what is kept."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.programs import ConvNet, Mlp, TwoInputs, data, mlp, seeded
from torch import nn

import sqcompile
from sqcompile.api import Compiled, LazyCompiled, parse_bytes
from sqcompile.errors import (
    BackendError,
    CalibrationError,
    Error,
    FileError,
    InputError,
    LevelError,
    NumericError,
    PassOptionError,
    RecipeError,
    TraceError,
)
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter

aten = torch.ops.aten


class AddNoise(Pass, register=False):
    """Adds noise to every weight: random, and seeded."""

    amount: float = 0.01

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Rewriter(program, self.name)
        for node in [node for node in program.graph.nodes if node.op == "get_attr"]:
            tensor = program.tensor(node).detach()
            edit.replace_tensor(node, tensor + self.amount * torch.randn_like(tensor))
        return PassResult(changes=edit.finish(), facts={"seed": context.seed})


class Count(Pass, register=False):
    """Counts the calibration batches."""

    keeps: ClassVar[Keeps] = Keeps.bitwise()

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(facts={"batches": len(list(context.batches("counting")))})


def compiled(*arguments: Any, **options: Any) -> Compiled:
    found = sqcompile.compile(*arguments, **{"backend": "reference", **options})
    assert isinstance(found, Compiled)
    return found


def refused(kind: type[Error], *arguments: Any, **options: Any) -> Error:
    with pytest.raises(kind) as caught:
        sqcompile.compile(*arguments, **{"backend": "reference", **options})
    error = caught.value
    assert (
        type(error) is kind
        and error.what
        and error.where
        and error.seen
        and error.expected
        and error.next_step
    )
    return error


def state_of(model: nn.Module) -> str:
    """Hash everything that a model is: values, types, flags, modes, hooks and attributes."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name}{id(tensor)}{tensor.dtype}{tensor.requires_grad}{tensor.grad is None}".encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        digest.update(f"{name}{module.training}{sorted(vars(module))}".encode())
        digest.update(f"{list(module._forward_hooks)}{list(module._forward_pre_hooks)}".encode())
    return digest.hexdigest()


class TestInputs:
    """Example inputs are found in the documented order."""

    def model(self, *rows: int) -> nn.Module:
        model = seeded(Mlp)
        if rows:
            model.dummy_inputs = {"x": data(*rows, 8)}
        return model

    def rows(self, made: Compiled) -> Any:
        assert made.program.signature.inputs[0].shape is not None
        return made.program.signature.inputs[0].shape[0]

    def test_what_is_given_comes_first(self) -> None:
        made = compiled(self.model(5), [Count()], (data(2, 8),), [data(2, 8)] * 3)
        assert self.rows(made) == 2 and made.report.passes[0].facts == {"batches": 3}

    def test_then_the_first_calibration_batch(self) -> None:
        made = compiled(self.model(5), [Count()], calibration=[data(3, 8)] * 4)
        assert self.rows(made) == 3 and made.report.passes[0].facts == {"batches": 4}

    def test_then_dummy_inputs(self) -> None:
        assert self.rows(compiled(self.model(5))) == 5

    @pytest.mark.parametrize(
        "form", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}, lambda x: ((x,), {})]
    )
    def test_in_every_form(self, form: Any) -> None:
        x = data(2, 8)
        assert torch.equal(compiled(seeded(Mlp), (), form(x))(x), seeded(Mlp)(x))

    def test_a_generator_serves_as_example_and_as_data(self) -> None:
        reads: list[int] = []

        def stream() -> Iterator[torch.Tensor]:
            for index in range(3):
                reads.append(index)
                yield data(2, 8)

        made = compiled(seeded(Mlp), [Count()], calibration=stream())
        assert made.report.passes[0].facts == {"batches": 3} and reads == [0, 1, 2]

    def test_dynamic_shapes(self) -> None:
        for shapes in ({"x": {0: "rows"}}, ({0: torch.export.Dim("rows")},)):
            made = compiled(seeded(Mlp), (), (data(2, 8),), dynamic_shapes=shapes)
            assert self.rows(made) == "rows" and made(data(7, 8)).shape == (7, 4)

    def test_nested_inputs_and_outputs(self) -> None:
        pair = {"left": data(3, 4), "right": data(3, 4)}
        made = compiled(TwoInputs(), (), ((data(3, 4),), {"pair": pair}))
        expected = TwoInputs()(data(3, 4), pair)
        found = made(pair=pair, x=data(3, 4))
        assert list(found) == ["total", "parts"] and torch.equal(found["parts"][1], expected["parts"][1])

    def test_calibration_with_labels(self) -> None:
        batches = [(data(2, 8), torch.arange(2))]
        error = refused(CalibrationError, seeded(Mlp), (), None, batches)
        assert error.where == "calibration batch 0"
        assert "batch[0] for batch in loader" in str(error.next_step)
        assert compiled(seeded(Mlp), [], calibration=[batch[0] for batch in batches])

    def test_a_pipeline_that_was_not_called(self) -> None:
        error = refused(RecipeError, seeded(Mlp), [sqcompile.passes.pipelines.int8_static], data(2, 8))
        assert "parentheses" in str(error.next_step)

    @pytest.mark.parametrize("calibration", [data(2, 8), {"x": data(2, 8)}, 3])
    def test_calibration_that_is_no_collection(self, calibration: Any) -> None:
        refused(CalibrationError, seeded(Mlp), (), None, calibration)

    @pytest.mark.parametrize("calibration", [[], iter(())])
    def test_calibration_that_is_empty(self, calibration: Any) -> None:
        for inputs in (None, (data(2, 8),)):
            refused(CalibrationError, seeded(Mlp), (), inputs, calibration)

    def test_calibration_of_something_else(self) -> None:
        error = refused(CalibrationError, seeded(Mlp), [Count()], None, [data(2, 8), data(2, 7)])
        assert "calibration batch 1, input 'x'" in str(error.where)
        assert refused(CalibrationError, seeded(Mlp), (), None, ["text"]).where == "calibration batch 0"

    def test_exported_programs_and_programs(self, tmp_path: Path) -> None:
        x = data(2, 8)
        exported = torch.export.export(seeded(Mlp), (x,))
        torch.export.save(exported, tmp_path / "model.pt2")
        for model in (exported, mlp(), torch.fx.symbolic_trace(seeded(Mlp)), tmp_path / "model.pt2"):
            made = compiled(model, (), x if isinstance(model, nn.Module) else None)
            assert torch.equal(made(x), seeded(Mlp)(x))


class TestLazy:
    def test_compiles_at_the_first_call(self) -> None:
        made = sqcompile.compile(seeded(Mlp), [AddNoise(amount=0.0)], backend="reference")
        assert isinstance(made, LazyCompiled)
        x = data(2, 8)
        assert torch.equal(made(x), seeded(Mlp)(x)) and torch.equal(made(x=x), seeded(Mlp)(x))
        assert made.report.passes[0].text == "add-noise{amount=0.0}" and made.program.level is Level.ATEN
        with pytest.raises(InputError, match="wrong size"):
            made(data(3, 8))  # compiled for two rows

    def test_knows_nothing_before(self) -> None:
        made = sqcompile.compile(seeded(Mlp), backend="reference")
        with pytest.raises(InputError, match="'report' is not known yet") as caught:
            _ = made.report
        error = caught.value
        assert error.where and error.seen and error.expected and error.next_step
        assert not hasattr(made, "report") and not hasattr(made, "_repr_html_")

    def test_a_first_call_that_fails_leaves_it_as_it_was(self) -> None:
        made = sqcompile.compile(seeded(Mlp), backend="reference")
        with pytest.raises(InputError):
            made(data(2, 9))
        assert made(data(2, 8)).shape == (2, 4)

    def test_mistakes_that_need_no_inputs_are_found_at_once(self) -> None:
        refused(RecipeError, seeded(Mlp), ["no-such-pass"])
        refused(TraceError, nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train())


class TestPasses:
    def test_objects_texts_and_mixtures(self) -> None:
        x = data(2, 8)
        for passes in (
            [sqcompile.passes.RemoveNoops(), sqcompile.passes.FoldConstants()],
            ["remove-noops", "fold-constants"],
            "remove-noops, fold-constants",
            [sqcompile.passes.RemoveNoops(), "fold-constants"],
            [["remove-noops"], (sqcompile.passes.FoldConstants(),)],
            (item for item in ("remove-noops", "fold-constants")),
        ):
            made = compiled(seeded(Mlp), passes, (x,))
            assert [record.text for record in made.report.passes] == ["remove-noops", "fold-constants"]

    @pytest.mark.parametrize("passes", [sqcompile.passes.RemoveNoops(), "remove-noops"])
    def test_a_single_one(self, passes: Any) -> None:
        assert [record.text for record in compiled(seeded(Mlp), passes, (data(2, 8),)).report.passes] == [
            "remove-noops"
        ]

    @pytest.mark.parametrize("passes", [[], (), "", " , "])
    def test_none(self, passes: Any) -> None:
        assert compiled(seeded(Mlp), passes, (data(2, 8),)).report.passes == []

    @pytest.mark.parametrize("passes", [[AddNoise], AddNoise])
    def test_a_class_instead_of_an_object(self, passes: Any) -> None:
        error = refused(RecipeError, seeded(Mlp), passes, (data(2, 8),))
        assert error.seen == "the class AddNoise" and error.next_step == "add the parentheses"

    @pytest.mark.parametrize("passes", [[3], [None], 3, None, [AddNoise(), object()]])
    def test_what_is_no_pass(self, passes: Any) -> None:
        refused(RecipeError, seeded(Mlp), passes, (data(2, 8),))

    def test_a_wrong_option(self) -> None:
        refused(PassOptionError, seeded(Mlp), ["mask-weights{sparsty=0.5}"], (data(2, 8),))

    def test_conflicts_are_found_before_tracing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sqcompile.opening.trace", lambda *a, **k: pytest.fail("it traced"))
        error = refused(LevelError, seeded(Mlp), ["insert-observers", "fold-batch-norm"], (data(2, 8),))
        assert "fold-batch-norm cannot follow insert-observers" in error.what
        refused(PassOptionError, seeded(Mlp), (), (data(2, 8),), verify="always")
        refused(InputError, seeded(Mlp), (), (data(2, 8),), max_memory="lots")
        refused(InputError, seeded(Mlp), (), (data(2, 8),), seed="seven")
        refused(BackendError, seeded(Mlp), (), (data(2, 8),), backend="onnxruntme")
        with pytest.raises(FileError, match="named by its path"):
            sqcompile.load(None)  # type: ignore[arg-type]
        for threads in (0, -1, "2", True, 1.5):
            refused(BackendError, seeded(Mlp), (), (data(2, 8),), threads=threads)


class TestBackends:
    def test_unknown(self) -> None:
        error = refused(BackendError, seeded(Mlp), (), (data(2, 8),), backend="onnxruntme")
        assert "'onnxruntime'" in str(error.next_step) and "auto" in str(error.expected)

    def test_the_choice_has_a_reason(self) -> None:
        made = compiled(seeded(Mlp), (), (data(2, 8),))
        assert made.report.backend == "reference" and made.report.backend_reason == "asked for"
        assert made.backend.name == "reference"


class TestVerify:
    def spoiling(self) -> Pass:
        class Spoil(Pass):
            keeps: ClassVar[Keeps] = Keeps.bitwise()

            def run(self, program: Program, context: PassContext) -> PassResult:
                return AddNoise().run(program, context)

        return Spoil()

    def test_modes(self) -> None:
        arguments = (seeded(Mlp), [self.spoiling()], (data(2, 8),))
        with pytest.raises(NumericError, match="Pass spoil changed the numbers"):
            compiled(*arguments)
        ends = compiled(*arguments, verify="ends").report
        assert ends.output_distance is not None and ends.passes[0].distance is not None
        off = compiled(*arguments, verify="off").report
        assert off.output_distance is None and off.passes[0].distance is None

    def test_dumps_go_where_the_work_goes(self, tmp_path: Path) -> None:
        with pytest.raises(NumericError) as caught:
            compiled(seeded(Mlp), [self.spoiling()], (data(2, 8),), work_dir=tmp_path / "work")
        (dump,) = (tmp_path / "work").iterdir()
        assert str(dump) in str(caught.value.next_step)


class TestReproducibility:
    def test_the_same_call_makes_the_same(self) -> None:
        def run(seed: int) -> Compiled:
            torch.rand(seed + 3)  # whatever happened before
            return compiled(seeded(ConvNet), [AddNoise(), AddNoise()], (data(2, 3, 6, 6),), seed=seed)

        first, second, other = run(1), run(1), run(2)
        assert str(first.program) == str(second.program)
        for (name, left), (_, right) in zip(first.program.tensors(), second.program.tensors(), strict=True):
            assert torch.equal(left, right), name
        assert first.program.fingerprint(content=True) == second.program.fingerprint(content=True)
        assert first.program.fingerprint(content=True) != other.program.fingerprint(content=True)
        assert first.report.passes[0].facts == {"seed": 1}

    def test_the_callers_random_numbers_stay(self) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        compiled(seeded(Mlp), [AddNoise()], (data(2, 8),))
        assert torch.equal(torch.rand(3), expected)


class TestTheModel:
    @pytest.mark.parametrize("mode", [True, False])
    def test_is_left_as_it_was(self, mode: bool) -> None:
        model = seeded(ConvNet).train(mode)  # nothing in it acts in training
        model.stem.weight.requires_grad_(False)
        model.stem.register_forward_hook(lambda *a: None)
        x = data(2, 3, 6, 6)
        before, inputs = state_of(model), x.clone()
        made = compiled(model, [AddNoise(), "remove-noops,fold-constants"], (x,), [x, x])
        made(x)
        made.program.set_tensor("stem.weight", torch.zeros(8, 3, 3, 3))
        assert state_of(model) == before and torch.equal(x, inputs)

    def test_with_batch_norm_too(self) -> None:
        model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)))
        x = data(2, 3, 6, 6)
        before = state_of(model)
        made = compiled(model, ["fold-batch-norm"], (x,))
        # The fold computes the same products with other rounding.
        assert torch.allclose(made(x), model(x), rtol=1e-5, atol=1e-6) and state_of(model) == before

    def test_in_training_mode_is_refused(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
        error = refused(TraceError, model, (), (data(2, 8),))
        assert error.next_step == "call model.eval() first" and model.training

    @pytest.mark.parametrize("model", [Mlp, torch.relu, None])
    def test_that_is_none(self, model: Any) -> None:
        refused(TraceError, model, (), (data(2, 8),))

    def test_whose_own_outputs_are_not_a_number(self) -> None:
        model = seeded(Mlp)
        with torch.no_grad():
            model.second.bias[1] = torch.nan
        made = compiled(model, (), (data(2, 8),))
        assert "the model's own output 'output' holds NaN on the check batch" in made.report.notes

    def test_may_be_deleted(self) -> None:
        model = seeded(Mlp)
        made = compiled(model, (), (data(2, 8),))
        expected = model(data(2, 8))
        del model
        assert torch.equal(made(data(2, 8)), expected)


@pytest.fixture(scope="module")
def made() -> Compiled:
    return compiled(seeded(Mlp), [AddNoise()], (data(2, 8),), [data(2, 8, seed=5)])


class TestCompiled:
    def test_holds_both_programs(self, made: Compiled) -> None:
        x = data(2, 8)
        assert torch.equal(made.original(x), seeded(Mlp)(x)) and torch.equal(made.program(x), made(x))
        assert not torch.equal(made(x), made.original(x)) and not made(x).requires_grad

    def test_refuses_inputs_that_do_not_fit(self, made: Compiled) -> None:
        for bad in (data(2, 9), data(2, 8).double(), data(8)):
            with pytest.raises(InputError):
                made(bad)

    def test_saves_and_loads(self, made: Compiled, tmp_path: Path) -> None:
        x = data(2, 8)
        (path,) = made.save(tmp_path / "new" / "model.pt2")
        assert path == tmp_path / "new" / "model.pt2"
        for source in (path, str(path)):
            session = sqcompile.load(source)
            assert torch.equal(session(x), made(x)) and torch.equal(session(x=x), made(x))
        again = compiled(path, [AddNoise(amount=0.0)])  # what was compiled can be compiled further
        assert torch.equal(again(x), made(x))

    def test_saves_folders(self, made: Compiled, tmp_path: Path) -> None:
        files = made.save(tmp_path / "model-v1.5")
        assert sorted(file.name for file in files) == ["model.pt2", "report.json"]
        assert all(file.is_file() for file in files)
        assert torch.equal(sqcompile.load(tmp_path / "model-v1.5")(data(2, 8)), made(data(2, 8)))
        assert json.loads((tmp_path / "model-v1.5" / "report.json").read_text())["model"] == "Mlp"

    def test_unknown_suffixes(self, made: Compiled, tmp_path: Path) -> None:
        with pytest.raises(FileError) as caught:
            made.save(tmp_path / "model.onx")
        assert "'.onnx'" in str(caught.value.next_step)
        (tmp_path / "model.txt").write_text("")
        with pytest.raises(FileError, match="no artifact"):
            sqcompile.load(tmp_path / "model.txt")
        with pytest.raises(FileError):
            sqcompile.load(tmp_path / "model.pt2")
        with pytest.raises(FileError):
            sqcompile.load(tmp_path)

    def test_measures(self, made: Compiled) -> None:
        report = made.measure(runs=2)
        assert report is made.report and report.latency is not None
        assert report.latency.runs == 2 and report.latency.dense_ns > 0 and report.latency.speedup > 0
        assert report.dense_file_bytes == 4 * 212
        with pytest.raises(InputError, match="without a run"):
            made.measure(runs=0)
        with pytest.raises(InputError, match="wrong size"):
            made.measure(data(2, 9))

    def test_copies(self, made: Compiled) -> None:
        assert torch.equal(copy.copy(made)(data(2, 8)), made(data(2, 8)))


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            (None, None),
            (0, 0),
            (512, 512),
            ("512", 512),
            ("8GB", 8 * 10**9),
            ("8 gb", 8 * 10**9),
            ("1.5MB", 1_500_000),
            ("512MiB", 512 * 2**20),
            ("2KiB", 2048),
            ("3kB", 3000),
            ("1e9", 10**9),
            ("2TB", 2 * 10**12),
            ("8G", 8 * 10**9),
            ("100 B", 100),
        ],
    )
    def test_of_memory(self, text: Any, size: int | None) -> None:
        assert parse_bytes(text) == size

    @pytest.mark.parametrize(
        "text", ["", "GB", "8XB", "eight", "-5GB", -5, "inf", "nan", "1e999", True, "8 8", 1.5j]
    )
    def test_that_are_none(self, text: Any) -> None:
        with pytest.raises(InputError, match="is no size") as caught:
            parse_bytes(text)
        assert caught.value.where and caught.value.seen and caught.value.expected and caught.value.next_step


class TestRepr:
    """What an interactive session shows of each public object: short, true, and known without work."""

    def test_no_public_object_shows_an_address(self) -> None:
        for name in sqcompile.__all__:
            item = getattr(sqcompile, name)
            if isinstance(item, type) and item is not Pass:  # each pass is a dataclass of its own
                assert item.__repr__ is not object.__repr__, name
        assert repr(Count()) == "Count()"

    def test_compiled_objects(self, tmp_path: Path) -> None:
        x = data(2, 4)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        lazy = sqcompile.compile(net, "quantize-weights", backend="native")
        assert repr(lazy) == "<LazyCompiled Sequential: compiled at its first call>"
        lazy(x)
        made = sqcompile.compile(net, "quantize-weights", (x,), backend="native")
        assert isinstance(made, Compiled)
        shown = repr(made)
        assert shown.startswith("<Compiled Sequential: native, 2 layers, ")
        assert repr(lazy) == f"<LazyCompiled: {shown}>"
        size_bytes = made.save(tmp_path / "net.sqm")[0].stat().st_size
        assert shown.endswith(f", {size_bytes / 1000:.2f} kB>")
        interface = "(input: f32[2, 4]) -> (output: f32[2, 3])"
        assert repr(made.session) == f"<NativeSession: {interface}>"
        assert repr(made.artifact) == "<NativeArtifact: .sqm>" and repr(made.backend) == "<Backend native>"
        operators = len(list(made.program.compute_nodes()))
        assert repr(made.program) == f"<Program: {interface}, {operators} operators, level qdq>"
        report = repr(made.report)
        assert report.startswith("<Report on Sequential: native, weights 268 B -> ") and "SQNR" in report
        single = compiled(nn.Linear(4, 2), (), (x,))
        assert "1 layer, " in repr(single) and "1 operator, " in repr(single.program)
