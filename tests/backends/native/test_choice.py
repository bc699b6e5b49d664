"""Which form a weight gets: by the times of a machine, which the tests make up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.machines import machine
from support.zoo import ZOO
from torch import Tensor, nn
from torch.export import Dim

import sqcompile
from sqcompile.backends.native.artifact import NativeArtifact
from sqcompile.backends.native.kernel_times import SHIPPED, FormTimes, KernelTimes
from sqcompile.backends.native.lower import context
from sqcompile.backends.native.lower.choice import Candidate, Workload, choose, workload_of
from sqcompile.backends.native.session import NativeSession
from sqcompile.passes.prune import ApplyMasks, MaskWeights
from sqcompile.passes.quantize import QuantizeWeights
from sqcompile.pipeline import PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.program import Program
from sqcompile.quantization.format import Format
from sqcompile.tracing import trace

Lower = Callable[[Program], NativeArtifact]
Load = Callable[..., NativeSession]

ONE_ROW = Workload(((1, 1),), cached=False)


DENSE, BITMASK = Candidate("int8", 1.0, 1000.0), Candidate("int8, bitmask", 0.5, 625.0)


@pytest.mark.parametrize(
    ("bitmask_ns", "size_bytes", "form", "remark"),
    [
        (50.0, 625.0, "int8, bitmask", ""),
        (
            109.0,
            625.0,
            "int8, bitmask",
            "sparsity saves 38% of the bytes and no time: 1.09x that of the dense form",
        ),
        (
            111.0,
            625.0,
            "int8",
            "sparsity does not pay: as int8, bitmask, the weight would take 1.11x its time",
        ),
        (
            105.0,
            950.0,
            "int8",
            "sparsity does not pay: as int8, bitmask, the weight would take 1.05x its time",
        ),
        (99.0, 950.0, "int8, bitmask", ""),
    ],
)
def test_the_fastest_wins_and_a_smaller_one_that_is_hardly_slower(
    bitmask_ns: float, size_bytes: float, form: str, remark: str
) -> None:
    bitmask = dataclasses.replace(BITMASK, size_bytes=size_bytes)
    choice, said = choose(machine(int8__bitmask=bitmask_ns), ONE_ROW, [DENSE, bitmask], 64, 64)
    assert choice.form == form
    assert said == (f"{remark} (1 row)" if remark else "")


@pytest.mark.parametrize("rows", [1, 4, 128])
@pytest.mark.parametrize("cached", [True, False])
def test_a_few_zeros_are_no_reason_to_leave_any_out(rows: int, cached: bool) -> None:
    """Codes of a dense weight are zero here and there: by the times that come with the package that pays nowhere."""
    few = [Candidate("int8, bitmask", 0.995, 1120.0), Candidate("int8 in 1x4 blocks", 0.999, 1249.0, 1)]
    choice, _ = choose(KernelTimes.load(SHIPPED), Workload(((rows, 1),), cached), [DENSE, *few], 1024, 1024)
    assert choice is DENSE


def test_without_zeros_there_is_nothing_to_choose() -> None:
    assert choose(machine(), ONE_ROW, [DENSE], 64, 64) == (DENSE, "")


def pruned(layer: nn.Module, text: str, sparsity: float, x: Tensor, pattern: str | None = None) -> Program:
    program = trace(layer.eval(), (x,))
    mask = (
        MaskWeights(sparsity=sparsity) if pattern is None else MaskWeights(sparsity=sparsity, pattern=pattern)
    )
    passes = [mask, ApplyMasks(), QuantizeWeights(weight=Format.parse(text))]
    PassManager(passes).run(program, PassContext())
    return program


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[KernelTimes], None]:
    """Lowers for a machine that is made up."""

    def use(times: KernelTimes) -> None:
        monkeypatch.setattr(context, "kernel_times", lambda: (times, ""))

    return use


INT8, INT4 = "int8:channel=0:narrow", "int4:group=32"


@pytest.mark.parametrize(
    ("text", "pattern", "times", "form", "step"),
    [
        (INT8, None, {"int8__bitmask": 50.0}, "int8, bitmask", "linear_q8_sparse"),
        (INT8, None, {"int8__bitmask": 200.0}, "int8", "linear_q8"),
        (INT8, "1x4", {"int8_in_1x4_blocks": 50.0}, "int8 in 1x4 blocks", "linear_q8_block"),
        (INT8, "1x4", {"int8__bitmask": 50.0}, "int8, bitmask", "linear_q8_sparse"),
        (INT8, "1x4", {"int8": 50.0}, "int8", "linear_q8"),
        (INT4, None, {"4-bit__bitmask": 50.0}, "4-bit, bitmask, groups of 32", "linear_q4_sparse"),
        (INT4, None, {"4-bit": 50.0}, "4-bit, groups of 32", "linear_q4"),
    ],
)
def test_the_times_of_the_machine_decide(
    text: str,
    pattern: str | None,
    times: Mapping[str, float],
    form: str,
    step: str,
    on: Callable[[KernelTimes], None],
    lower: Lower,
    load: Load,
) -> None:
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    program = pruned(nn.Linear(128, 64), text, 0.6, x, pattern)
    on(machine(**times))
    artifact = lower(program)
    (choice,) = artifact.choices.values()
    assert choice.form == form
    assert choice.remark.startswith("sparsity does not pay") == (step in ("linear_q8", "linear_q4"))
    session = load(artifact)
    assert step in {name for name, _ in session.model.steps}
    (result,), (expected,) = session.run([x]), program.run([x])
    # The activation's rounding to 8 bits, whatever the form.
    assert float((result - expected.detach()).norm() / expected.detach().norm()) < 0.01


def test_what_depends_on_rows_is_chosen_for_the_rows_of_the_program(
    on: Callable[[KernelTimes], None], lower: Lower
) -> None:
    """Blocks here take 200 ns whatever the rows, dense weights 100 ns a row."""
    shipped = machine()
    blocks = FormTimes((1, 128), (1.0,), ((200.0,), (200.0,)), ((200.0,), (200.0,)))
    never = FormTimes((1,), (1.0,), ((1e6,),), ((1e6,),))
    forms = {name: times if name == "int8" else never for name, times in shipped.forms.items()}
    on(dataclasses.replace(shipped, forms={**forms, "int8 in 4x4 blocks": blocks}))
    torch.manual_seed(0)
    layer = nn.Linear(128, 64)
    for rows, form in ((1, "int8"), (4, "int8 in 4x4 blocks")):
        program = pruned(layer, INT8, 0.6, torch.randn(rows, 128), "4x4")
        (choice,) = lower(program).choices.values()
        assert choice.form == form, rows
    # A symbol stands for the size that the program was traced with.
    program = trace(layer, (torch.randn(7, 128),), dynamic_shapes={"input": {0: Dim("batch", max=64)}})
    rows = program.placeholders[0].meta["val"].shape[0].node.expr
    assert workload_of(program, rows).calls == ((7, 1),)
    assert workload_of(program, 3 * rows).calls == ((21, 1),)


def test_language_models_are_compiled_for_reading_one_token_at_a_time() -> None:
    for name, texts in (("llama", True), ("bert", False)):
        entry = ZOO[name]
        program = trace(entry.make(), entry.inputs(), dynamic_shapes=entry.dynamic_shapes)
        batch, sequence = (size.node.expr for size in program.placeholders[0].meta["val"].shape)
        calls = workload_of(program, batch * sequence).calls
        assert calls == ((1, 128), (128, 1)) if texts else len(calls) == 1 and calls[0][1] == 1


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = nn.Linear(64, 96, bias=False), nn.Linear(64, 32, bias=False)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.down(torch.cat([self.gate(x).reshape(-1, 96), self.up(x).reshape(-1, 32)], 1))


def test_the_report_states_forms_and_times_and_when_sparsity_does_not_pay(
    on: Callable[[KernelTimes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = machine(int8__bitmask=200.0)
    on(times)
    from sqcompile.backends.native import kernel_times

    monkeypatch.setattr(kernel_times, "kernel_times", lambda: (times, ""))
    compiled = sqcompile.compile(
        Gate().eval(),
        [MaskWeights(sparsity=0.5), ApplyMasks(), QuantizeWeights()],
        example_inputs=torch.randn(3, 64, generator=torch.Generator().manual_seed(0)),
        backend="native",
    )
    rows = {row.name: row for row in compiled.report.layers}
    assert set(rows) == {"gate", "up", "down"}
    assert rows["up"].predicted_ns == pytest.approx(3 * 100.0 * 64 * 32 / 1e6)
    assert {row.form for row in rows.values()} == {"int8"}
    text = str(compiled.report)
    assert "gate, up, down: sparsity does not pay: as int8" in text and "(3 rows)" in text
    assert "predicted" in text and "runs as" in text and "measured" not in text
    compiled.measure(torch.randn(6, 64)[:3], runs=2, threads=1)
    assert all(row.compiled_ns and row.dense_ns for row in rows.values())
    assert "measured" in str(compiled.report)
    report = compiled.report
    assert report.peak is not None and report.peak > 0
    for name, weights in (("gate", 64 * 96), ("up", 64 * 32), ("down", 128 * 64)):
        row = rows[name]
        assert row.multiply_adds == 3 * weights and row.compiled_ns is not None
        assert row.peak_share == pytest.approx(row.multiply_adds / row.compiled_ns / report.peak)
        assert row.kept_share == pytest.approx(row.peak_share * (1 - row.sparsity))
    assert "Time by layer" in str(report) and "without zeros" in str(report)
    assert '"predicted_ns"' in compiled.report.to_json()


def test_layers_that_are_one_product_share_its_time_by_their_weights() -> None:
    session = object.__new__(NativeSession)
    steps = [("linear_q8", "mlp.{gate,up}"), ("mul", "mlp.gate"), ("linear_q8", "head"), ("add", "other")]
    session.model = SimpleNamespace(steps=steps)  # type: ignore[assignment]
    session.inner = SimpleNamespace(profile=lambda arrays: [400, 10, 50, 7])  # type: ignore[assignment]
    session.signature = SimpleNamespace(inputs=[])  # type: ignore[assignment]
    times = session.profile([], {"mlp.gate": 30, "mlp.up": 10, "head": 5, "absent": 1})
    assert times == {"mlp.gate": 310.0, "mlp.up": 100.0, "head": 50.0}


def test_a_remark_on_the_times_is_made_once(monkeypatch: pytest.MonkeyPatch, lower: Lower) -> None:
    monkeypatch.setattr(context, "kernel_times", lambda: (machine(), "whose times these are"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    notes = lower(pruned(model, INT8, 0.5, torch.randn(2, 64))).notes
    assert notes.count("whose times these are") == 1
    # Where nothing was chosen, nobody has to know.
    assert "whose times these are" not in lower(trace(model.eval(), (torch.randn(2, 64),))).notes
