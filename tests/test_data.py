from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sqcompile
from sqcompile.data import DataFile, as_tensor
from sqcompile.data_text import split_texts
from sqcompile.errors import CalibrationError, FileError

LLAMA = Path(__file__).parents[1] / "examples" / "pycode_llama_5m"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 4)

    def forward(
        self, image: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = image.mean((1, 2)) + self.embed(ids)
        return out if scale is None else out * scale


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.standard_normal((10, 3, 5, 4)),  # float64, as NumPy makes it
        "ids": rng.integers(0, 50, 10).astype(np.int16),
    }


@pytest.fixture
def npz(tmp_path: Path, arrays) -> str:
    np.savez(tmp_path / "x.npz", **arrays)
    return str(tmp_path / "x.npz")


def program(batch: int | str = "batch") -> sqcompile.Program:
    size = 2 if isinstance(batch, str) else batch
    inputs = {"image": torch.randn(size, 3, 5, 4), "ids": torch.zeros(size, dtype=torch.int64)}
    dim = torch.export.Dim("batch")
    shapes = {name: {0: dim} for name in inputs} if isinstance(batch, str) else None
    return sqcompile.trace(Net().eval(), inputs, dynamic_shapes=shapes)


def test_arrays_become_batches_by_name(npz: str, arrays) -> None:
    batches = DataFile(npz, batch=4).open(Net())
    assert len(batches) == 3
    found = list(batches)
    assert [len(batch["ids"]) for batch in found] == [4, 4, 2]
    image = torch.cat([batch["image"] for batch in found])
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image.numpy(), arrays["image"].astype(np.float32))
    assert found[0]["ids"].dtype == torch.int64
    assert [len(batch["ids"]) for batch in batches] == [4, 4, 2]  # readable again


def test_batches_are_copies(npz: str) -> None:
    batches = DataFile(npz, batch=4).open(Net())
    batches.first()["image"].zero_()
    assert batches.first()["image"].abs().sum() > 0


def test_samples_limit_what_is_read(npz: str) -> None:
    assert [len(batch["ids"]) for batch in DataFile(npz, batch=4, samples=6).open(Net())] == [4, 2]
    assert [len(batch["ids"]) for batch in DataFile(npz, samples=1000).open(Net())] == [8, 2]


def test_a_traced_batch_size_is_kept_and_the_rest_left_out(npz: str) -> None:
    batches = DataFile(npz).open(program(batch=4))
    assert [len(batch["ids"]) for batch in batches] == [4, 4]
    assert len(batches) == 2
    assert batches.notes == [
        "2 of 10 samples are left out: they do not fill a batch of 4, which the model was traced with"
    ]
    dynamic = DataFile(npz, batch=4).open(program())
    assert [len(batch["ids"]) for batch in dynamic] == [4, 4, 2]
    assert dynamic.notes == []


def test_another_batch_size_than_the_traced_one_is_an_error(npz: str) -> None:
    with pytest.raises(CalibrationError, match="another batch size"):
        DataFile(npz, batch=3).open(program(batch=4))
    with pytest.raises(CalibrationError, match="fewer samples"):
        DataFile(npz).open(program(batch=11))


def test_npy_is_the_first_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((5, 3), dtype=np.float32))
    batches = DataFile(str(tmp_path / "x.npy")).open(nn.Linear(3, 2))
    assert {name: tuple(value.shape) for name, value in batches.first().items()} == {"input": (5, 3)}


def test_one_array_of_many(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", train=np.zeros((5, 3)), test=np.ones((2, 3)))
    (batch,) = DataFile(f"{tmp_path}/x.npz:test").open(nn.Linear(3, 2))
    assert torch.equal(batch["input"], torch.ones(2, 3))
    with pytest.raises(CalibrationError, match="no array 'tset'") as caught:
        DataFile(f"{tmp_path}/x.npz:tset").open(nn.Linear(3, 2))
    assert "'test'" in str(caught.value)


def test_labels_beside_the_only_input_are_left_out_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, input=np.ones((5, 3)), labels=np.zeros(5))
    with pytest.raises(CalibrationError) as caught:
        DataFile(str(path)).open(nn.Linear(3, 2))
    assert "FILE.npz:input" in str(caught.value.next_step)
    assert DataFile(f"{path}:input").open(nn.Linear(3, 2)).first()["input"].shape == (5, 3)


def test_unnamed_arrays_go_by_order(tmp_path: Path, arrays) -> None:
    np.savez(tmp_path / "x.npz", arrays["image"], arrays["ids"])
    assert set(DataFile(str(tmp_path / "x.npz")).open(Net()).first()) == {"image", "ids"}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"ids": None}, ["nothing for input 'ids'", "add an array named 'ids'"]),
        ({"ids": None, "idz": np.zeros(10)}, ["no input 'idz'", "did you mean 'ids'; otherwise drop"]),
        ({"labels": np.zeros(10)}, ["no input 'labels'", "write the file without 'labels'"]),
        ({"ids": np.zeros(9, dtype=np.int64)}, ["different numbers of samples", "image 10, ids 9"]),
        ({"ids": np.int64(3)}, ["'ids' holds one number"]),
        ({"image": np.zeros((0, 3, 5, 4)), "ids": np.zeros(0, dtype=np.int64)}, ["no samples"]),
        ({"image": np.zeros((10, 3, 5, 5))}, ["wrong shape", "(3, 5, 5), 10 times", "f32[samples, 3, 5, 4]"]),
        ({"image": np.zeros((10, 3, 5))}, ["wrong shape", "(3, 5), 10 times"]),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, arrays, change, parts: list[str]) -> None:
    changed = {name: value for name, value in {**arrays, **change}.items() if value is not None}
    np.savez(tmp_path / "x.npz", **changed)
    with pytest.raises(CalibrationError) as caught:
        DataFile(str(tmp_path / "x.npz")).open(program())
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("values", "dtype", "parts"),
    [
        (np.zeros(3, dtype=np.uint8), torch.float32, ["wrong type", "u8", "f32", "astype(numpy.float32)"]),
        (np.zeros(3), torch.int64, ["wrong type", "f64", "i64"]),
        (np.zeros(3, dtype=np.int64), torch.bool, ["wrong type", "i64", "bool"]),
        (np.array([0, 300]), torch.uint8, ["does not fit", "0 to 300", "0 to 255"]),
    ],
)
def test_kinds_of_numbers_are_never_changed_silently(values, dtype: torch.dtype, parts: list[str]) -> None:
    with pytest.raises(CalibrationError) as caught:
        as_tensor(values, dtype, "x")
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("values", "wanted", "dtype"),
    [
        (np.zeros(3), torch.float16, torch.float16),
        (np.zeros(3, dtype=np.int16), torch.int64, torch.int64),
        (np.zeros(3, dtype=bool), torch.bool, torch.bool),
        (np.zeros(3), None, torch.float32),
        (np.zeros(3, dtype=np.float16), None, torch.float32),
        (np.zeros(3, dtype=np.int32), None, torch.int64),
        (np.zeros(3, dtype=np.uint8), None, torch.uint8),
    ],
)
def test_sizes_of_numbers_follow_the_model(values, wanted: torch.dtype | None, dtype: torch.dtype) -> None:
    assert as_tensor(values, wanted, "x").dtype == dtype


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("x.npz", b"no zip", ["'", "cannot be read"]),
        ("x.npy", b"no array", ["cannot be read"]),
        ("x.npy", b"", ["cannot be read"]),
        ("x.csv", b"1,2", ["is no data file", "'.csv'", ".npz, .npy, .txt"]),
        ("x", b"", ["is no data file", "no suffix"]),
    ],
)
def test_files_that_are_no_data_are_named(
    tmp_path: Path, name: str, content: bytes, parts: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError) as caught:
        DataFile(str(tmp_path / name)).open(Net())
    for part in parts:
        assert part in str(caught.value)


def test_python_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(FileError, match="cannot be read"):
        DataFile(str(tmp_path / "x.npy")).open(Net())


def test_not_finite_data_is_found_while_compiling(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[1.0, np.nan, 2.0]]))
    with pytest.raises(sqcompile.Error, match="NaN or infinity"):
        sqcompile.compile(nn.Linear(3, 2), calibration=tmp_path / "x.npy", backend="reference")


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(4, -1)


def test_a_model_that_fixes_its_batch_is_traced_with_it(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((10, 3), dtype=np.float32))
    file = DataFile(str(tmp_path / "x.npy"), batch=4)
    compiled = sqcompile.compile(FixedBatch(), calibration=file, backend="reference")
    assert str(compiled.program.signature.inputs[0]) == "x: f32[4, 3]"
    assert any("left out" in note for note in compiled.report.notes)


# --- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\ntwo\n\nthree\n", ["one\ntwo", "three"]),
        ("one\n \t\ntwo", ["one", "two"]),
        ("one\n\n", ["one"]),
        ("one\ntwo\n\n", ["one", "two"]),  # a blank line at the end separates nothing
        ("\n\none\ntwo", ["one", "two"]),
        (" \n", []),
    ],
)
def test_texts_are_separated_by_blank_lines_or_else_by_lines(text: str, parts: list[str]) -> None:
    assert split_texts(text) == parts


class Llama(nn.Module):
    """Takes what a language model takes."""

    def forward(self, input_ids: torch.Tensor, past_key_values: object = None) -> torch.Tensor:
        return input_ids + 1


class Encoder(nn.Module):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return input_ids * attention_mask


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "t.txt").write_text(
        "def first(x):\n    return x\n\ndef second(y, z):\n    return y + z\n" * 4
    )
    return str(tmp_path / "t.txt")


def test_a_language_model_gets_equal_pieces_of_running_text(text: str) -> None:
    pytest.importorskip("transformers")
    batches = DataFile(text, context=16, batch=2).open(Llama(), LLAMA)
    rows = torch.cat([batch["input_ids"] for batch in batches])
    assert rows.shape[1] == 16
    assert rows.dtype == torch.int64
    assert (rows == 1).sum() >= 4  # texts end with </s>
    from sqcompile.data_text import load_tokenizer

    decoded = load_tokenizer(None, LLAMA).decode(rows.reshape(-1), skip_special_tokens=True)
    assert decoded.startswith("def first(x):\n    return x")


def test_a_short_text_is_one_piece(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "t.txt").write_text("x = 1")
    (batch,) = DataFile(str(tmp_path / "t.txt")).open(Llama(), LLAMA)
    assert 2 <= batch["input_ids"].shape[1] < 16


def test_an_encoder_gets_one_padded_text_a_sample(text: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(LLAMA)
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(tmp_path / "tok")
    batches = DataFile(text, context=12, tokenizer=str(tmp_path / "tok")).open(Encoder())
    (batch,) = batches
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert len(batch["input_ids"]) == 5  # the joints of the four copies hold no blank line
    assert batch["input_ids"].shape[1] == 12
    assert 0 < int((batch["attention_mask"] == 0).sum())


class Small(Llama):
    """A model of transformers says how many tokens it knows."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.table = nn.Embedding(count, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.table


def test_another_models_tokenizer_is_found_out(text: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(CalibrationError, match="not those of the model's vocabulary") as caught:
        DataFile(text, context=16).open(Small(100), LLAMA)
    assert "ids from 0 to 99" in str(caught.value) and "--tokenizer" in str(caught.value)
    assert text in str(caught.value)
    assert len(DataFile(text, context=16).open(Small(100_000), LLAMA))


@pytest.mark.parametrize("token", [-1, 50])
def test_tokens_in_arrays_are_checked_too(token: int, tmp_path: Path) -> None:
    tokens = np.arange(48).reshape(4, 12)
    np.savez(tmp_path / "x.npz", input_ids=tokens)
    assert DataFile(str(tmp_path / "x.npz")).open(Small(50)).count == 4
    tokens[2, 3] = token
    np.savez(tmp_path / "x.npz", input_ids=tokens)
    with pytest.raises(CalibrationError, match="vocabulary") as caught:
        DataFile(str(tmp_path / "x.npz")).open(Small(50))
    assert f"ids from {min(token, 0)} to {max(token, 47)}" in str(caught.value)


class NoTokens(Small):
    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


def test_models_that_do_not_say_take_any_tokens(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", input_ids=np.full((2, 3), 10**6))
    for model in (Llama(), NoTokens(5)):
        assert DataFile(str(tmp_path / "x.npz")).open(model).count == 2


def test_text_without_a_tokenizer_is_an_error(text: str) -> None:
    with pytest.raises(FileError, match="none beside the model") as caught:
        DataFile(text).open(Llama())
    assert "--tokenizer" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "kind", "part"),
    [
        (b"", CalibrationError, "holds no text"),
        (b"\n \n", CalibrationError, "holds no text"),
        (b"\xff\xfe", FileError, "is no text"),
    ],
)
def test_files_without_text_are_named(tmp_path: Path, content: bytes, kind: type, part: str) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(kind, match=part):
        DataFile(str(tmp_path / "t.txt")).open(Llama(), LLAMA)


def test_a_damaged_tokenizer_is_named(text: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{")
    with pytest.raises(FileError, match="cannot be loaded"):
        DataFile(text, tokenizer=str(tmp_path / "tok")).open(Llama())


@pytest.mark.slow
def test_text_calibrates_a_folder(text: str) -> None:
    pytest.importorskip("transformers")
    compiled = sqcompile.compile(LLAMA, calibration=DataFile(text, context=32, batch=2), backend="reference")
    assert str(compiled.program.signature.inputs[0]) == "input_ids: i64[batch, seq]"
