from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from sqcompile.errors import FileError, RecipeError
from sqcompile.functions import FunctionReference


def train(model: nn.Module) -> None:
    """A function with a place."""


class Trainer:
    @staticmethod
    def fit(model: nn.Module) -> None:
        """A function inside a class."""


def test_a_function_at_the_top_of_a_module_reads_back() -> None:
    for function, name in ((train, "train"), (Trainer.fit, "Trainer.fit")):
        reference = FunctionReference.of(function)
        assert str(reference) == f"{__name__}:{name}"
        again = FunctionReference.parse(str(reference))
        assert again == reference and again.function is None
        assert again.load() is function
    assert FunctionReference.of(reference) is reference


def test_unnamed_functions_work_and_cannot_be_read_back() -> None:
    first, second = FunctionReference.of(lambda: 1), FunctionReference.of(lambda: 2)
    assert (first.load()(), second.load()()) == (1, 2)
    assert first != second, "their texts are equal, and they are not"
    with pytest.raises(RecipeError, match="given as an object"):
        FunctionReference.parse(str(first))


@pytest.mark.parametrize("text", ["train", ":train", "net.py:", "net.py:9x", "net.py:a b"])
def test_refuses_other_texts(text: str) -> None:
    with pytest.raises(RecipeError, match=r"module\.py:function"):
        FunctionReference.parse(text)


def test_loads_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tuning_for_test_functions.py"
    file.write_text("def tune(model):\n    return 7\n\nRATE = 3\n", encoding="utf-8")
    assert FunctionReference.parse(f"{file}:tune").load()(None) == 7
    with pytest.raises(FileError, match="'tune'"):
        FunctionReference.parse(f"{file}:tun").load()
    with pytest.raises(FileError, match="is no function"):
        FunctionReference.parse(f"{file}:RATE").load()
    with pytest.raises(FileError, match="cannot be read"):
        FunctionReference.parse(f"{tmp_path}/absent.py:tune").load()


def test_the_fingerprint_follows_the_source(tmp_path: Path) -> None:
    prints = set()
    for count, body in enumerate(("return 1", "return 2")):
        file = tmp_path / f"source{count}.py"
        file.write_text(f"def tune(model):\n    {body}\n", encoding="utf-8")
        function = FunctionReference.parse(f"{file}:tune").load()
        prints.add(FunctionReference("same:place", function).fingerprint())
    assert len(prints) == 2
    assert FunctionReference.of(train).fingerprint() == FunctionReference.of(train).fingerprint()
