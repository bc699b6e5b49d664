from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import sqcompile

REFERENCE = ("--backend", "reference")


def test_writes_an_artifact_that_computes_what_the_model_does(run, folder: Path) -> None:
    result = run("compile", "net.py:make", "-d", "x.npz", "-p", "fold-batch-norm", "-o", "build/net.onnx")
    assert result.code == 0, result.err
    assert "fold-batch-norm" in result.out
    assert "Wrote build/net.onnx" in result.out
    images = torch.from_numpy(np.load("x.npz")["image"])
    from sqcompile.models import load_model

    with torch.no_grad():
        expected = load_model("net.py:make")(images)
    seen = sqcompile.load(folder / "build/net.onnx")(images)
    # Folding and another runtime round in another order: float32's own rounding, a few times over.
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6)


def test_without_output_says_that_nothing_was_written(run, folder: Path) -> None:
    before = sorted(folder.iterdir())
    result = run("compile", "net.py:make", "-d", "x.npz", *REFERENCE)
    assert result.code == 0
    assert "Nothing was written" in result.out
    assert [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"] == before


def test_json_is_all_that_is_on_standard_output(run, folder: Path) -> None:
    result = run(
        "compile",
        "net.py:make",
        "-d",
        "x.npz",
        "-p",
        "fold-batch-norm",
        "-o",
        "net.pt2",
        "--json",
        *REFERENCE,
    )
    assert result.code == 0
    data = result.json  # fails if anything else was printed, such as the model's own line
    assert data["files"] == ["net.pt2"]
    assert [record["text"] for record in data["report"]["passes"]] == ["fold-batch-norm"]
    assert "making the net" in result.err


def test_the_recipe_in_the_answer_compiles_the_same_again(run, folder: Path) -> None:
    first = run(
        "compile", "net.py:make", "-d", "x.npz", "--batch", "5", "-p", "quantize-weights{weight=int4:group=8}",
        "-o", "net.pt2", "--json", *REFERENCE,
    )  # fmt: skip
    (folder / "again.yaml").write_text(first.json["recipe"])
    second = run("compile", "-r", "again.yaml", "-o", "again.pt2", "--json")
    assert second.code == 0, second.err
    report = [{**record, "seconds": 0, "check_seconds": 0} for record in second.json["report"]["passes"]]
    assert report == [
        {**record, "seconds": 0, "check_seconds": 0} for record in first.json["report"]["passes"]
    ]


def test_options_win_over_the_recipe(run, folder: Path) -> None:
    (folder / "r.yaml").write_text(
        "model: net.py:make\npasses: [fold-batch-norm]\nbackend: onnxruntime\ndata: {path: x.npz, batch: 2}\n"
    )
    result = run("compile", "-r", "r.yaml", "-p", "remove-noops", "--batch", "4", "--json", *REFERENCE)
    assert result.code == 0, result.err
    assert result.json["report"]["backend"] == "reference"
    assert [record["text"] for record in result.json["report"]["passes"]] == ["remove-noops"]
    assert "batch: 4" in result.json["recipe"]


def test_inputs_as_text_stand_for_data_and_name_dimensions(run, folder: Path) -> None:
    result = run(
        "compile", "net.py:make", "-i", "image: f32[batch, 3, h=6, w=6]", "-o", "net.pt2", *REFERENCE
    )
    assert result.code == 0, result.err
    program = sqcompile.Program.load(folder / "net.pt2")
    assert [str(value) for value in program.signature.inputs] == ["image: f32[batch, 3, h, w]"]


def test_measures_on_demand(run, folder: Path) -> None:
    result = run("compile", "net.py:make", "-d", "x.npz", "--measure", "--runs", "2", "--json", *REFERENCE)
    assert result.json["report"]["latency"]["runs"] == 2


def test_writes_the_report_as_html(run, folder: Path) -> None:
    result = run("compile", "net.py:make", "-d", "x.npz", "--html", "report.html", *REFERENCE)
    assert result.code == 0
    assert "Wrote report.html" in result.out
    assert "<html" in (folder / "report.html").read_text()


def test_dumps_the_graph_after_every_pass(run, folder: Path) -> None:
    result = run(
        "compile",
        "net.py:make",
        "-d",
        "x.npz",
        "-p",
        "fold-batch-norm,remove-noops",
        "--dump-dir",
        "dump",
        *REFERENCE,
    )
    assert result.code == 0, result.err
    names = sorted(path.name for path in (folder / "dump").iterdir())
    assert names == [
        "00-traced.txt",
        "01-fold-batch-norm.diff",
        "01-fold-batch-norm.txt",
        "02-remove-noops.diff",
        "02-remove-noops.txt",
    ]
    assert "batch_norm" in (folder / "dump/00-traced.txt").read_text()
    assert "batch_norm" not in (folder / "dump/01-fold-batch-norm.txt").read_text()
    diff = (folder / "dump/01-fold-batch-norm.diff").read_text()
    assert any(line.startswith("-") and "batch_norm" in line for line in diff.splitlines())
    assert (folder / "dump/02-remove-noops.diff").read_text() == "\n"


def test_prints_graphs_on_standard_error(run, folder: Path) -> None:
    result = run(
        "compile", "net.py:make", "-d", "x.npz", "-p", "fold-batch-norm,remove-noops",
        "--print-before", "fold-batch-norm", "--print-after", "FoldBatchNorm", "--json", *REFERENCE,
    )  # fmt: skip
    assert result.code == 0, result.err
    before, after = result.err.split("# after fold-batch-norm")
    assert "# before fold-batch-norm" in before
    assert "batch_norm(" in before
    assert "batch_norm(" not in after
    assert "remove-noops" not in result.err
    assert result.json


def test_a_pass_of_ones_own_is_imported_by_file(run, folder: Path) -> None:
    (folder / "mine.py").write_text(
        "from sqcompile import Pass, PassResult\n\n\n"
        "class DoNothingOfMine(Pass):\n"
        '    """Do nothing, on purpose."""\n\n'
        "    times: int = 1\n\n"
        "    def run(self, program, context):\n"
        "        return PassResult()\n"
    )
    arguments = (
        "compile",
        "net.py:make",
        "-d",
        "x.npz",
        "-p",
        "do-nothing-of-mine{times=2}",
        "--json",
        *REFERENCE,
    )
    result = run(*arguments, "--import", "mine.py")
    assert result.code == 0, result.err
    assert result.json["report"]["passes"][0]["text"] == "do-nothing-of-mine{times=2}"


@pytest.mark.parametrize("target", [["--pretrained", "hf"], ["-o", "net.gguf"]], ids=["folder", "gguf"])
def test_what_only_transformers_can_hold_is_refused_before_any_work(
    run, folder: Path, monkeypatch: pytest.MonkeyPatch, target: list[str]
) -> None:
    monkeypatch.setattr(
        "sqcompile.recipe.Recipe.compile", lambda *a, **k: pytest.fail("it did the work first")
    )
    result = run("compile", "net.py:make", "-d", "x.npz", *target)
    assert result.code == 1
    assert "Only models of transformers" in result.err and ".pt2" in result.err
    assert not (folder / target[1]).exists()


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["net.py:make"], 1, ["inputs are not known", "forward(image)", "--input 'image: f32"]),
        (["net.py:mak", "-d", "x.npz"], 1, ["no function 'mak'", "did you mean 'make'"]),
        (["net.py:broken", "-d", "x.npz"], 1, ["fails to make the model", "net.py:28", "no weights here"]),
        (
            ["net.py:number", "-d", "x.npz"],
            1,
            ["'number' in 'net.py' makes no model", "int: 3", "'net' or 'make'"],
        ),
        (["nett.py:make", "-d", "x.npz"], 1, ["'nett.py' cannot be read", "did you mean 'net.py'"]),
        (["net.py:make", "-d", "y.npz"], 1, ["'y.npz' cannot be read"]),
        (
            ["net.py:make", "-d", "x.npz", "-p", "fold-bach-norm"],
            2,
            ["no pass 'fold-bach-norm'", "'fold-batch-norm'"],
        ),
        (
            ["net.py:make", "-d", "x.npz", "-p", "quantize-weights{weigt=int4}"],
            2,
            ["no option 'weigt'", "'weight'"],
        ),
        (
            ["net.py:make", "-d", "x.npz", "-p", "quantize-weights{weight=int99}"],
            2,
            ["'weight' of pass", "'int9"],
        ),
        (
            ["net.py:make", "-d", "x.npz", "-p", "quantize-weights{layers=[cnov]}"],
            1,
            ["'cnov' matches no", "conv"],
        ),
        (["net.py:make", "-d", "x.npz", "-o", "a.onx"], 1, ["suffix '.onx'", "did you mean '.onnx'"]),
        (["net.py:make", "-d", "x.npz", "-o", "net.py/a.onnx"], 1, ["'net.py/a.onnx' cannot be written"]),
        (["net.py:make", "-d", "x.npz", "-b", "onx"], 2, ["--backend", "did you mean 'onnxruntime'"]),
        (["net.py:make", "-d", "x.npz", "--verify", "eahc"], 2, ["--verify", "did you mean 'each'"]),
        (["net.py:make", "-d", "x.npz", "--max-memory", "lots"], 1, ["'lots' is no size", "8GB"]),
        (["net.py:make", "--batch", "3"], 2, ["--batch", "add --data"]),
        (["net.py:make", "-i", "imgae: f32[2, 3, 8, 8]"], 1, ["do not fit Net.forward", "imgae"]),
        (["net.py:make", "-i", "image f32"], 2, ["describes no input", "x: f32[batch"]),
        (
            ["net.py:make", "-d", "x.npz", "-p", "remove-noops", "--print-after", "noops"],
            2,
            ["no pass 'noops'"],
        ),
        (["-r", "nope.yaml"], 1, ["recipe 'nope.yaml' cannot be read"]),
        ([], 2, ["no model to compile"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_mistakes_are_named_with_their_repair(
    run, folder: Path, arguments, code: int, parts: list[str]
) -> None:
    result = run("compile", *arguments)
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["-o", "a.onx"], "suffix '.onx'"),
        (["-o", "folder.onnx"], "name a file in it"),
        (["-o", "x.npz/net.sqm"], "'x.npz' is not a folder"),
        (["-o", "a.onnx", "--html", "folder.onnx"], "'folder.onnx' cannot be written"),
        (["--pretrained", "x.npz"], "'x.npz' cannot be written"),
        (["--work-dir", "x.npz"], "'x.npz' cannot be written"),
        (["--dump-dir", "x.npz"], "'x.npz' cannot be written"),
    ],
)
def test_a_wrong_output_is_found_before_any_work(run, folder: Path, options: list[str], part: str) -> None:
    (folder / "folder.onnx").mkdir()
    before = sorted(folder.rglob("*"))
    result = run("compile", "net.py:make", "-d", "x.npz", *options)
    assert result.code == 1
    assert part in result.err
    assert "making the net" not in result.err
    assert sorted(folder.rglob("*")) == before  # trying leaves nothing


@pytest.mark.parametrize(
    ("name", "backend"), [("a.onnx", "onnxruntime"), ("a.sqm", "native"), ("a", "native")]
)
def test_the_report_is_of_what_is_written(run, folder: Path, name: str, backend: str) -> None:
    about = run("compile", "net.py:make", "-d", "x.npz", "-o", name, "--json").json
    assert about["report"]["backend"] == backend
    if Path(name).suffix:
        assert about["report"]["file_bytes"] == (folder / name).stat().st_size


def test_an_artifact_whose_recipe_leaves_the_backend_open_is_made_again_to_the_bit(run, folder: Path) -> None:
    run("compile", "net.py:make", "-d", "x.npz", "-o", "open")  # a folder, with what auto chooses
    result = run("compile", "--from", "open/model.sqm", "-o", "again.sqm", "--json")
    assert result.json["same"] is True


def test_inputs_of_a_wrong_type_are_shown_with_it(run, folder: Path) -> None:
    np.savez(folder / "bytes.npz", image=np.zeros((4, 3, 8, 8), np.uint8))
    result = run("compile", "net.py:make", "-d", "bytes.npz")
    assert result.code == 1
    assert "u8[4, 3, 8, 8]" in result.err and "element types" in result.err


def test_errors_are_json_too(run, folder: Path) -> None:
    result = run("compile", "net.py:make", "-d", "x.npz", "-p", "fold-bach-norm", "--json")
    assert result.code == 2
    error = result.json["error"]
    assert error["kind"] == "RecipeError"
    assert error["what"] == "There is no pass 'fold-bach-norm'."
    assert "There is no pass 'fold-bach-norm'." in result.err


def test_debug_shows_the_traceback(run, folder: Path) -> None:
    with pytest.raises(sqcompile.Error, match="no pass 'nope'"):
        run("compile", "net.py:make", "-d", "x.npz", "-p", "nope", "--debug")


def test_an_instance_in_a_module_is_a_model_too(run, folder: Path) -> None:
    result = run("compile", "net.py:net", "-d", "x.npz", *REFERENCE)
    assert result.code == 0, result.err


def test_a_saved_program_compiles_without_data(run, folder: Path) -> None:
    run("compile", "net.py:make", "-d", "x.npz", "-o", "net.pt2", *REFERENCE)
    result = run("compile", "net.pt2", "-p", "fold-batch-norm", "--json", *REFERENCE)
    assert result.code == 0, result.err
    report = result.json["report"]
    assert report["passes"][0]["distance"]["sqnr_db"] > 100  # float32's rounding only, and it was measured
    assert any("made-up inputs" in note for note in report["notes"])


def test_a_model_that_got_smaller_goes_back_to_a_folder_of_transformers(run, tmp_path: Path) -> None:
    import transformers
    from support.zoo import ZOO

    model = ZOO["llama"].make()
    model.save_pretrained(tmp_path / "wide")
    common = ("-i", "input_ids: int64[1, 8]", *REFERENCE)
    result = run(
        "compile", str(tmp_path / "wide"), *common, "-p", "remove-neurons{ratio=0.5}",
        "--pretrained", str(tmp_path / "narrow"), "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert str(tmp_path / "narrow" / "config.json") in result.json["files"]
    narrow = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
    assert narrow.config.intermediate_size == model.config.intermediate_size // 2


def test_what_transformers_cannot_hold_is_no_folder(run, folder: Path) -> None:
    result = run("compile", "net.py:make", "-d", "x.npz", "--pretrained", "narrow", *REFERENCE)
    assert result.code == 1
    assert "Only models of transformers" in result.err
    assert not (folder / "narrow").exists()
