"""The report: figures that are right, blame that is right, and texts that are whole."""

from __future__ import annotations

import json
import math
import operator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from support.programs import ConvNet, Mlp, conv_net, data, mlp, seeded
from torch import nn

import sqcompile
from sqcompile.api import Compiled
from sqcompile.compare import LayerDistance
from sqcompile.errors import FileError
from sqcompile.layers import layers_of
from sqcompile.levels import Level
from sqcompile.metrics import Distance
from sqcompile.pipeline import Pass, PassContext, PassRecord, PassResult
from sqcompile.program import Program
from sqcompile.progress import BarProgress
from sqcompile.remarks import Remark
from sqcompile.report import Latency, LayerRow, Report, environment, layer_rows, value_format
from sqcompile.report_tables import size_text, sqnr_text, time_text
from sqcompile.rewrite import Rewriter
from sqcompile.statistics import Size

ours = torch.ops.sqcompile
SIZE = Size(100, 25, 50, 400)


def record(text: str, sqnr: float | None, **options: Any) -> PassRecord:
    distance = None if sqnr is None else Distance(sqnr, 1.0, 0.0, finite=sqnr > -math.inf)
    return PassRecord(text, 1, 0.1, 0.2, SIZE, distance, **options)


def row(name: str, loss: float | None = None, **options: Any) -> LayerRow:
    return LayerRow(
        name, name, "linear", "model.py:3", (4, 8), "float32", "float32", 32, 0.0, 128, loss=loss, **options
    )


def report(
    passes: list[PassRecord] | None = None, layers: list[LayerRow] | None = None, **options: Any
) -> Report:
    return Report("Model", "reference", "asked for", SIZE, SIZE, 400, passes or [], layers or [], **options)


class Spoil(Pass, register=False):
    """Adds noise to the weight of one layer."""

    layer: str = ""
    amount: float = 1e-3

    def run(self, program: Program, context: PassContext) -> PassResult:
        layer = next(layer for layer in layers_of(program) if layer.name == self.layer)
        weight = program.tensor(layer.weight).detach()
        Rewriter(program).replace_tensor(layer.weight, weight + self.amount * data(*weight.shape, seed=8))
        return PassResult(changes=1)


class TestBlame:
    @pytest.mark.parametrize(
        ("levels", "blamed"),
        [
            ([], None),
            ([None, None], None),
            ([math.inf, math.inf], None),
            ([140.0, 120.0, 110.0], None),  # rounding of float32
            ([130.0, 65.0], 1),  # not the fold before it, though it fell from infinity
            ([40.0, 5.0], 1),  # 45 dB and 35 dB apart, and a thousand times the noise
            ([10.0, 9.0, 8.9], 0),
            ([40.0, 41.0, 20.0], 2),
            ([None, 30.0, None, 30.0], 1),
            ([50.0, -math.inf, -math.inf], 1),
            ([-3.0, -20.0], 1),
        ],
    )
    def test_of_passes(self, levels: list[float | None], blamed: int | None) -> None:
        found = report([record(f"pass{index}", level) for index, level in enumerate(levels)]).worst_pass()
        assert (found.text if found else None) == (None if blamed is None else f"pass{blamed}")

    @pytest.mark.parametrize(
        ("losses", "blamed"),
        [
            ([], None),
            ([None], None),
            ([0.0, 1e-12], None),
            ([0.1, 0.3, 0.2], 1),
            ([None, 1e-6], 1),
            ([0.5, math.inf], 1),
        ],
    )
    def test_of_layers(self, losses: list[float | None], blamed: int | None) -> None:
        found = report(layers=[row(f"layer{index}", loss) for index, loss in enumerate(losses)]).worst_layer()
        assert (found.name if found else None) == (None if blamed is None else f"layer{blamed}")

    def test_of_a_compilation(self) -> None:
        """Two layers are spoiled, one more; by two passes, of which the second does it."""

        passes = [Spoil(layer="head"), Spoil(layer="stem", amount=0.3), Spoil(layer="up")]
        made = sqcompile.compile(seeded(ConvNet), passes, (data(2, 3, 6, 6),), backend="reference")
        assert isinstance(made, Compiled)
        worst, layer = made.report.worst_pass(), made.report.worst_layer()
        assert worst is not None and worst.text == "spoil{layer=stem,amount=0.3}"
        assert layer is not None and layer.name == "stem"
        text = str(made.report)
        assert text.count("◀") == 2 and "largest loss" in text


class TestLayers:
    def test_rows(self) -> None:
        rows = layer_rows(conv_net(), [LayerDistance("up", "conv_transpose2d", "", Distance(20.0, 1.0, 0.0))])
        assert [item.name for item in rows] == ["stem", "depthwise", "up", "head"]
        stem, up = rows[0], rows[2]
        assert (stem.kind, stem.shape, stem.parameters, stem.size_bytes) == ("conv2d", (8, 3, 3, 3), 216, 864)
        assert (stem.weight, stem.activation, stem.sparsity) == ("float32", "float32", 0.0)
        assert stem.place.startswith("programs.py:") and stem.distance is None and stem.loss is None
        assert up.distance is not None and up.loss == pytest.approx(0.01)

    @pytest.mark.parametrize(
        ("scale", "arguments", "shown"),
        [
            ((), (None, None, -128, 127), "int8"),
            ((16,), (0, None, -127, 127), "int8:channel"),
            ((16, 2), (1, 4, -8, 7), "int4:group=4"),
            ((16, 2), (1, 4, 0, 15), "uint4:group=4"),
            ((16, 2), (1, 4, 0, 3), "uint2:group=4"),
        ],
    )
    def test_formats_of_weights(self, scale: tuple[int, ...], arguments: tuple[Any, ...], shown: str) -> None:
        program = mlp()
        edit = Rewriter(program)
        layer = layers_of(program)[0]
        stored = (
            edit.constant("codes", torch.ones(16, 8, dtype=torch.int8)),
            edit.constant("scale", torch.ones(scale)),
            edit.constant("zero", torch.zeros(scale, dtype=torch.int32)),
        )
        with edit.before(layer.node):
            value = edit.call(ours.dequantize.default, *stored, *arguments)
        edit.set_argument(layer.node, 1, value)
        edit.finish()
        program.level = Level.QDQ
        (found, _) = layer_rows(program)
        assert found.weight == shown and found.activation == "float32"
        bits = int("".join(filter(str.isdigit, shown.split(":")[0])))
        count = max(1, math.prod(scale))
        affine = 0 if arguments[2] < 0 else math.ceil(count * bits / 8)  # symmetric zero points take nothing
        assert found.size_bytes == 128 * bits // 8 + 4 * count + affine

    def test_formats_of_values(self) -> None:
        program = mlp()
        edit = Rewriter(program)
        layer = layers_of(program)[0]
        x = layer.data
        with edit.before(layer.node):
            masked = edit.call(
                ours.mask.default, layer.weight, edit.constant("m", torch.ones(16, 8, dtype=torch.bool))
            )
            made = edit.call(ours.dynamic_scale.default, x, -1, -1, 0, 255, False)
            scale, zero = (edit.call(operator.getitem, made, index) for index in (0, 1))
            codes = edit.call(ours.quantize.default, x, scale, zero, -1, -1, 0, 255)
            value = edit.call(ours.dequantize.default, codes, scale, zero, -1, -1, 0, 255)
        assert value_format(masked) == "float32 masked"
        assert value_format(value) == "uint8:token:dynamic"

    @pytest.mark.parametrize(
        ("weight", "sparsity", "dense", "compiled", "verdict"),
        [
            ("int8", 0.0, 200.0, 100.0, "2.00x faster"),
            ("int8", 0.0, 100.0, 99.0, "does not pay here (1.01x)"),
            ("int8", 0.0, 100.0, 200.0, "does not pay here (0.50x)"),
            ("float32", 0.5, 100.0, 100.0, "does not pay here (1.00x)"),
            ("float32", 0.0, 100.0, 200.0, ""),
            ("float16", 0.0, 100.0, 200.0, ""),
            ("int8", 0.0, None, 100.0, ""),
            ("int8", 0.0, 100.0, 0.0, "100.00x faster"),
        ],
    )
    def test_verdicts(
        self, weight: str, sparsity: float, dense: float | None, compiled: float, verdict: str
    ) -> None:
        item = row("layer", dense_ns=dense, compiled_ns=compiled)
        item.weight, item.sparsity = weight, sparsity
        assert item.verdict == verdict


class TestTexts:
    def full(self) -> Report:
        remarks = tuple(Remark("mask-weights", f"node{index}", "it is small") for index in range(12))
        return report(
            [
                record("mask-weights{layers=[fc],exclude=[/x]}", 30.0, remarks=remarks, facts={"share": 0.5}),
                record("fold", math.inf),
            ],
            [row("blocks.[0]", 0.1, distance=Distance(10.0, 0.9, 1.0), dense_ns=3e6, compiled_ns=1.5e6)],
            output_distance=Distance(30.0, 1.0, 0.1),
            backend_distance=Distance(math.inf, 1.0, 0.0),
            latency=Latency(2e6, 1e6, 30, 2),
            dense_file_bytes=1600,
            seconds={"trace": 1.25},
            notes=["a note with [brackets]"],
            environment=environment(),
        )

    def test_printed(self) -> None:
        text = str(self.full())
        # Brackets are no tags of rich's: options of passes and names of layers have them.
        assert "mask-weights{layers=[fc],exclude=[/x]}" in text.replace("\n", "")
        for part in (
            "sqcompile: Model",
            "4.00x smaller",
            "50.0 % zeros",
            "30.0 dB",
            "exact",
            "2.00x, median of 30 alternating calls, 2 threads",
            "blocks.[0]",
            "3.00 ms",
            "1.50 ms",
            "mask-weights: node0: it is small",
            "… and 4 more",
            "Note: a note with [brackets]",
            "trace 1.2 s",
        ):
            assert part in text, part
        assert "\x1b" not in text

    def test_printed_with_nothing_known(self) -> None:
        text = str(report())
        assert "Passes" not in text and "Layers" not in text and "sqcompile: Model" in text

    def test_times_are_drawn_with_their_shares_of_the_peak(self) -> None:
        """A machine of 100 multiply-adds a ns: `dense` takes twice as long as it could, `sparse` skips what is zero."""
        dense = row("dense", compiled_ns=4000.0, dense_ns=9000.0, multiply_adds=200_000, peak_share=0.5)
        sparse = row("sparse", compiled_ns=1000.0, dense_ns=9000.0, multiply_adds=200_000, peak_share=2.0)
        sparse.sparsity = 0.75
        floats = row("floats", compiled_ns=100.0, dense_ns=100.0, multiply_adds=1000)
        few = [row(f"few{index}", compiled_ns=1.0) for index in range(30)]
        text = str(report(layers=[floats, sparse, dense, *few], peak=100.0))
        start = text.index("Time by layer")
        assert "what 100 multiply-adds a ns would take" in text[start:]
        bars = {line.split()[0]: line for line in text[start:].splitlines() if line.split()[1:]}
        assert bars["dense"].count("█") == 20 and bars["dense"].count("░") == 20
        assert bars["dense"].rstrip().endswith("50 %") and "4.00 µs" in bars["dense"]
        assert bars["sparse"].count("█") == 5 and bars["sparse"].count("░") == 5
        assert bars["sparse"].rstrip().endswith("200 %, 50 % without zeros")
        assert bars["floats"].count("█") == 0 and bars["floats"].count("░") == 1
        assert "9" in bars["9"].split()[0] and "others" in bars["9"]
        assert "of peak" in text[:start] and "200 %" in text[:start]

    def test_without_times_nothing_is_drawn(self) -> None:
        text = str(report(layers=[row("layer")]))
        assert "Time by layer" not in text and "of peak" not in text

    def test_the_frontier_is_drawn(self) -> None:
        points = [
            {"cost": 3.0, "predicted": 0.1},
            {"cost": 4.0, "predicted": 0.01},
            {"cost": 9.0, "predicted": 0.0},
        ]
        facts = {"frontier": points, **points[1], "measure": "divergence", "unit": "bits a weight"}
        lines = str(report([record("mixed-precision{bits=4}", None, facts=facts)])).splitlines()
        start = next(
            number for number, line in enumerate(lines) if "What each budget would have lost" in line
        )
        bars = {line.split()[0]: line.count("█") for line in lines[start + 2 : start + 5]}
        assert bars == {"3.00": 40, "4.00": 1, "9.00": 1}
        assert [line.split()[0] for line in lines if "◀ chosen" in line] == ["4.00"]

    def test_json(self) -> None:
        plain = json.loads(self.full().to_json())
        assert plain["worst_pass"].startswith("mask-weights") and plain["worst_layer"] == "blocks.[0]"
        assert plain["size"] == {"parameters": 100, "zeros": 25, "weights": 50, "size_bytes": 400}
        assert plain["backend_distance"]["sqnr_db"] is None  # JSON has no infinity
        assert plain["layers"][0]["verdict"] == "" and plain["layers"][0]["distance"]["sqnr_db"] == 10.0
        assert plain["passes"][0]["facts"] == {"share": 0.5} and len(plain["passes"][0]["remarks"]) == 12
        assert set(plain["environment"]) == {"cpu", "threads", "python", "torch", "sqcompile"}

    def test_json_of_facts(self) -> None:
        facts = {"scale": torch.tensor(0.5), "list": (1, math.nan), 3: torch.ones(2), "level": Level.ATEN}
        plain = json.loads(report([record("pass", None, facts=facts)]).to_json())
        assert plain["passes"][0]["facts"] == {
            "scale": 0.5,
            "list": [1, None],
            "3": [1.0, 1.0],
            "level": "aten",
        }

    def test_html(self, tmp_path: Path) -> None:
        class Reader(HTMLParser):
            text = ""

            def handle_data(self, data: str) -> None:
                self.text += data

        self.full().to_html(tmp_path / "new" / "report.html")
        reader = Reader()
        reader.feed((tmp_path / "new" / "report.html").read_text(encoding="utf-8"))
        assert "mask-weights{layers=[fc],exclude=[/x]}" in reader.text and "blocks.[0]" in reader.text
        (tmp_path / "file").write_text("")
        with pytest.raises(FileError):
            self.full().to_html(tmp_path / "file" / "report.html")

    def test_units(self) -> None:
        assert [size_text(size) for size in (0, 999, 1000, 1_240_000, 3e9)] == [
            "0 B",
            "999 B",
            "1.00 kB",
            "1.24 MB",
            "3.00 GB",
        ]
        assert [time_text(time) for time in (None, 5, 1500, 2e6, 3e9)] == [
            "",
            "5 ns",
            "1.50 µs",
            "2.00 ms",
            "3.00 s",
        ]
        distances = [
            None,
            Distance(41.26, 1, 0),
            Distance(math.inf, 1, 0),
            Distance(-math.inf, 0, 1),
            Distance(0, 0, 0, finite=False),
        ]
        assert list(map(sqnr_text, distances)) == ["", "41.3 dB", "exact", "-inf dB", "not finite"]

    def test_progress_shows_brackets_too(self, capsys: pytest.CaptureFixture[str]) -> None:
        BarProgress().note("[1/2] mask-weights{layers=[fc]}")
        assert "[1/2] mask-weights{layers=[fc]}" in capsys.readouterr().err
        assert list(BarProgress().track([1, 2], "reading [a]")) == [1, 2]


@pytest.fixture(scope="module")
def made() -> Report:
    compiled = sqcompile.compile(seeded(Mlp), ["remove-noops"], (data(2, 8),), backend="reference")
    assert isinstance(compiled, Compiled)
    return compiled.report


class TestCompilation:
    def test_figures(self, made: Report) -> None:
        assert made.model == "Mlp" and made.size == made.original and made.file_bytes == 4 * 212
        assert made.output_distance is not None and made.output_distance.sqnr_db == math.inf
        assert made.backend_distance is not None and made.backend_distance.max_error == 0
        assert set(made.seconds) == {"trace", "passes", "lower", "load", "check"}
        assert all(seconds >= 0 for seconds in made.seconds.values())
        assert [item.name for item in made.layers] == ["first", "second"]
        assert all(item.loss == 0.0 for item in made.layers)
        assert made.worst_pass() is None and made.worst_layer() is None

    def test_without_weights(self) -> None:
        compiled = sqcompile.compile(nn.ReLU(), ["remove-noops"], (data(2),), backend="reference")
        assert isinstance(compiled, Compiled)
        assert compiled.report.layers == [] and "x smaller" not in str(compiled.report)
        json.loads(compiled.report.to_json())
