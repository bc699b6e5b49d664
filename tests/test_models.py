"""Finding the model: folders, files, factories, and what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.programs import Mlp, data, mlp, seeded
from torch import nn

from sqcompile.backends.reference import ReferenceSession
from sqcompile.errors import Error, FileError, TraceError
from sqcompile.models import folder_dynamic_shapes, load_model, model_name
from sqcompile.program import Program
from sqcompile.tracing import trace


def refused(model: Any, kind: type[Error]) -> Error:
    with pytest.raises(kind) as caught:
        load_model(model)
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


class TestModules:
    def test_are_taken_as_they_are(self) -> None:
        for model in (seeded(Mlp), mlp(), mlp().to_exported_program(), torch.fx.symbolic_trace(seeded(Mlp))):
            assert load_model(model) is model

    @pytest.mark.parametrize(
        "part",
        [nn.Dropout(0.5), nn.Dropout2d(), nn.BatchNorm1d(8), nn.Sequential(nn.Sequential(nn.Dropout()))],
    )
    def test_in_training_mode_are_refused(self, part: nn.Module) -> None:
        model = nn.Sequential(nn.Linear(8, 8), part)
        error = refused(model.train(), TraceError)
        assert error.what == "The model is in training mode." and error.next_step == "call model.eval() first"
        assert load_model(model.eval()) is model

    def test_in_training_mode_that_compute_the_same_are_fine(self) -> None:
        assert load_model(Mlp().train()).training  # fresh modules are; nothing in it cares

    @pytest.mark.parametrize("model", [Mlp, torch.relu, None, 3, {"a": 1}, torch.zeros(3)])
    def test_what_is_no_model(self, model: Any) -> None:
        error = refused(model, TraceError)
        if isinstance(model, type):
            assert error.seen == "the class Mlp" and "instance" in str(error.next_step)

    @pytest.mark.parametrize(
        ("model", "hint"),
        [
            (torch.relu, "wrap the function"),
            (None, "pass the module"),
            (seeded(Mlp).state_dict(), "load_state_dict"),
            (ReferenceSession(mlp()), "that it was made from"),
        ],
        ids=["function", "none", "weights", "session"],
    )
    def test_what_is_no_model_has_its_own_next_step(self, model: Any, hint: str) -> None:
        assert hint in str(refused(model, TraceError).next_step)

    def test_name(self) -> None:
        assert model_name(seeded(Mlp)) == "Mlp"
        assert model_name(seeded(Mlp), "nets.py:mlp") == "Mlp"

    def test_a_program_is_called_as_its_file(self) -> None:
        assert model_name(mlp(), Path("build") / "net.pt2") == "net.pt2"


class TestFiles:
    def test_programs(self, tmp_path: Path) -> None:
        mlp().save(tmp_path / "mlp.pt2")
        for path in (tmp_path / "mlp.pt2", str(tmp_path / "mlp.pt2")):
            program = load_model(path)
            assert isinstance(program, Program) and str(program) == str(mlp())

    @pytest.mark.parametrize("name", ["model.onnx", "weights.bin", "model"])
    def test_of_another_kind(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("")
        assert "is no model" in refused(tmp_path / name, FileError).what

    def test_a_python_file_without_function(self, tmp_path: Path) -> None:
        (tmp_path / "model.py").write_text("")
        assert ":FUNCTION" in str(refused(tmp_path / "model.py", FileError).next_step)

    def test_missing(self, tmp_path: Path) -> None:
        (tmp_path / "model.pt2").write_text("")
        for name in ("modle.pt2", "modle.onnx"):
            assert "model.pt2" in str(refused(tmp_path / name, FileError).next_step)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("net.onnx", "compiled already"),
        ("net.sqm", "compiled already"),
        ("net.pt", "need the code of their model"),
        ("net.safetensors", "need the code of their model"),
        ("net.txt", "torch.export.save"),
    ],
)
def test_files_that_hold_no_model_have_their_own_next_step(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / name).write_bytes(b"0")
    assert hint in str(refused(tmp_path / name, FileError).next_step)


class TestFactories:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / f"factory_{tmp_path.name}.py"  # a name of its own: imported modules stay
        path.write_text(
            "from torch import nn\n"
            "def make():\n    return nn.Sequential(nn.Linear(8, 2), nn.Dropout())\n"
            "def fails():\n    return 1 / 0\n"
            "def nothing():\n    return None\n"
            "number = 3\n"
            "def sized(width, depth=2):\n    return nn.Linear(width, depth)\n"
            "def weights():\n    return make().state_dict()\n"
        )
        return path

    def test_in_a_file(self, file: Path) -> None:
        model = load_model(f"{file}:make")
        assert isinstance(model, nn.Sequential) and not model.training

    def test_in_a_module(self) -> None:
        assert isinstance(load_model("support.programs:Mlp"), Mlp)

    def test_a_name_that_is_near(self, file: Path) -> None:
        error = refused(f"{file}:mkae", FileError)
        assert "'make'" in str(error.next_step) and error.seen == "mkae"
        refused(f"{file}:number", FileError)

    def test_that_fails(self, file: Path) -> None:
        error = refused(f"{file}:fails", TraceError)
        assert str(error.where).endswith(".py:5") and "ZeroDivisionError" in str(error.seen)

    def test_that_exits(self, file: Path) -> None:
        """A script's own `sys.exit` would end the command line without a word of where."""
        file.write_text(file.read_text() + "import sys\ndef leaves():\n    sys.exit('no weights given')\n")
        error = refused(f"{file}:leaves", TraceError)
        assert error.seen == "SystemExit: no weights given" and str(error.where).endswith(".py:15")

    def test_that_makes_no_model(self, file: Path) -> None:
        error = refused(f"{file}:nothing", TraceError)
        assert error.seen == "it returned None" and str(error.where).endswith(".py:6")
        assert "return" in str(error.next_step)
        error = refused(f"{file}:weights", TraceError)
        assert error.seen == "it returned OrderedDict" and "load_state_dict" in str(error.next_step)

    def test_that_needs_arguments(self, file: Path) -> None:
        error = refused(f"{file}:sized", TraceError)
        assert error.seen == "sized(width)" and str(error.where).endswith(".py:9")
        assert "def make(): return sized(width=…)" in str(error.next_step)

    def test_modules_that_are_missing(self, tmp_path: Path) -> None:
        refused("no_such_package.module:make", FileError)
        refused(f"{tmp_path / 'no.py'}:make", FileError)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("folder") / "model"
    config = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=20, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


class TestFolders:
    """Folders of Hugging Face, made of a model with two layers."""

    def copy(self, folder: Path, target: Path) -> Path:
        target.mkdir()
        for item in folder.iterdir():
            (target / item.name).write_bytes(item.read_bytes())
        return target

    def test_gives_the_model_in_eval_mode_without_a_cache(self, folder: Path) -> None:
        model = load_model(str(folder))
        assert type(model).__name__ == "GPT2LMHeadModel" and not model.training and not model.config.use_cache
        assert next(model.parameters()).dtype is torch.float32

    def test_draws_no_bars_of_its_own(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        from transformers.utils import logging

        logging.enable_progress_bar()  # as it is from the start, whatever ran before in this process
        load_model(folder)
        assert capfd.readouterr() == ("", "") and logging.is_progress_bar_enabled()

    def test_dynamic_shapes(self, folder: Path) -> None:
        model = load_model(folder)
        inputs = {
            "input_ids": torch.tensor([[1, 2, 3]] * 2),
            "attention_mask": torch.ones(2, 3, dtype=torch.int64),
        }
        shapes = folder_dynamic_shapes(model, ((), {**inputs, "pixels": data(2, 3, 4, 4), "flag": True}))
        names = {
            name: {axis: dim.__name__ for axis, dim in (axes or {}).items()} for name, axes in shapes.items()
        }
        assert names == {
            "input_ids": {0: "batch", 1: "seq"},
            "attention_mask": {0: "batch", 1: "seq"},
            "pixels": {0: "batch"},
            "flag": {},
        }
        assert folder_dynamic_shapes(model, ((data(2),), {})) is None
        program = trace(model, inputs, dynamic_shapes=folder_dynamic_shapes(model, ((), inputs)))
        assert program(
            input_ids=torch.tensor([[1] * 5]), attention_mask=torch.ones(1, 5, dtype=torch.int64)
        ).logits.shape == (1, 5, 20)

    @pytest.mark.parametrize("text", ["{", "[]", "3", '"text"'])
    def test_a_configuration_that_is_none(self, folder: Path, tmp_path: Path, text: str) -> None:
        path = self.copy(folder, tmp_path / "model")
        (path / "config.json").write_text(text)
        assert "is no configuration" in refused(path, FileError).what

    @pytest.mark.parametrize("name", ["GPT2LMHeadModl", "logging", "no_such_name"])
    def test_an_architecture_that_is_none(self, folder: Path, tmp_path: Path, name: str) -> None:
        path = self.copy(folder, tmp_path / "model")
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
        error = refused(path, FileError)
        assert error.seen == name
        if name.startswith("GPT2"):
            assert "GPT2LMHeadModel" in str(error.next_step)

    def test_a_folder_without_configuration(self, tmp_path: Path) -> None:
        assert "config.json" in refused(tmp_path, FileError).what

    @pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
    def test_weights_that_are_damaged(self, folder: Path, tmp_path: Path, damage: str) -> None:
        path = self.copy(folder, tmp_path / "model")
        weights = path / "model.safetensors"
        content = weights.read_bytes()
        weights.unlink()
        if damage != "missing":
            weights.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"text"}[damage])
        assert "cannot be loaded" in refused(path, FileError).what

    def test_weights_that_are_not_there_are_not_made_up(self, folder: Path, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        path = self.copy(folder, tmp_path / "model")
        weights = safetensors.load_file(path / "model.safetensors")
        gone = next(name for name in weights if name.endswith("mlp.c_fc.weight"))
        del weights[gone]
        safetensors.save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        error = refused(path, FileError)
        assert "lacks weights" in error.what and gone.split(".", 1)[1] in str(error.seen)
